/*
 * An open context as the files that open it share it. Arrays of a layer lie in
 * the map, but for those whose numbers steer memory accesses and searches: these
 * are copied before they are checked, so that a file that changes while it is
 * open can spoil an answer and nothing else.
 */
#ifndef SQZ_STORE_OPEN_CONTEXT_H
#define SQZ_STORE_OPEN_CONTEXT_H

#include "mapped_file.h"

enum { SQZ_CONTEXT_TEXTS = 4 };

struct sqz_context {
    struct sqz_mapped_file file;
    struct sqz_context_meta meta;
    uint32_t version;              /* of the format */
    char *text[SQZ_CONTEXT_TEXTS]; /* what meta's strings point to */
    struct sqz_layer *layers;      /* [meta.n_layer] */
    void *copies;                  /* tokens and what steers */
    uint64_t kv_bytes, index_bytes;
    uint64_t metadata_checksum;
    /* Of an index: */
    const char **shard_files; /* [meta.shard.count] into shard_names */
    char *shard_names;
    uint64_t *shard_checksums;
    struct sqz_context **shards; /* [meta.shard.count] those that are held here; its layers are views of one of them */

    float budget_floor; /* of all layers together, lib/floor.h */
};

/* ---- context_keys.c: values of keys ---------------------------------------------------- */

/* gguf.h's typed getters abort on a wrong type, so no getter is called before these. */
enum sqz_status sqz_find_key(const struct gguf_context *gguf, const char *key, enum gguf_type type, int64_t *id,
                             const struct sqz_report *report);
enum sqz_status sqz_find_array(const struct gguf_context *gguf, const char *key, enum gguf_type type, size_t n,
                               const void **values, const struct sqz_report *report);

/* Fills context->meta, but for the tokens, and the counts of context->layers, all checked. */
enum sqz_status sqz_read_keys(struct sqz_context *context, const struct gguf_context *gguf,
                              const struct sqz_report *report);

/* ---- context_shards.c: contexts in shards ------------------------------------------------- */

static inline bool sqz_context_is_index(const struct sqz_context *context)
{
    return context->meta.shard.count && !context->meta.shard.number;
}
/* Opens the shards that are held here, each by `open`, and forms the layers. */
typedef enum sqz_status (*sqz_open_file)(struct sqz_context **out, const char *path,
                                         const struct sqz_context_options *options, struct sqz_error *error);
enum sqz_status sqz_open_shards(struct sqz_context *context, const char *path,
                                const struct sqz_context_options *options, sqz_open_file open,
                                const struct sqz_report *report);

/* ---- context_copy.c: arrays that steer --------------------------------------------------- */

/* Puts copies in place of the map's tokens and steering arrays. Layers and tokens are bound to the map. */
enum sqz_status sqz_copy_steering(struct sqz_context *context, const struct sqz_report *report);

#endif
