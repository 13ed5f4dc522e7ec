/*
 * The context file: GGUF, written through ggml's gguf.h. docs/format.md is its
 * description. Reading maps the file and forms struct sqz_layer views after
 * every count, type, shape, offset and checksum has been checked.
 */
#ifndef SQZ_STORE_CONTEXT_FILE_H
#define SQZ_STORE_CONTEXT_FILE_H

#include "squeeze.h"
#include "layer.h"

/* Which of LongRoPE's factors a context was read with. */
enum sqz_rope_factors {
    SQZ_ROPE_FACTORS_UNSAID = 0, /* files that do not say: written before it was chosen by the document's length */
    SQZ_ROPE_FACTORS_NONE = 1,   /* the model has no such choice */
    SQZ_ROPE_FACTORS_SHORT = 2,
    SQZ_ROPE_FACTORS_LONG = 3
};

/* Which part of a context in shards a file is; count 0: a context by itself. */
struct sqz_shard_place {
    uint32_t count, number; /* 1 to count; 0: the index */
    uint32_t block_tokens;  /* lib/shards.h deals tokens out in such blocks */
    /* Of the whole context. Shard 1 has the last rows of layers with a window, the other shards none of these. 0: not said, in
     * files of version 5, whose layers have no window. */
    uint32_t n_tokens;
    /* Of the index, [count]: names beside it, and the checksums of their metadata, by which they are known. */
    const char *const *files;
    const uint64_t *checksums;
};

/* Everything about a context that is not a layer's tensor. Pointers belong to the caller on writing, to the open
 * context on reading. */
struct sqz_context_meta {
    const char *model_name, *model_architecture, *model_fingerprint; /* fingerprint: 1 to 64 hex digits */
    const char *source_name;                                         /* may be "" */
    const int32_t *tokens;
    size_t n_tokens;
    bool has_template;
    float rope_scale;
    uint32_t rope_factors; /* enum sqz_rope_factors */
    uint32_t n_layer;
    struct sqz_squeeze_options squeeze;
    struct sqz_shard_place shard;
};

/* Writing. Shapes are declared first (which fixes the file's layout), then layers are written in any order, then
 * commit. The file is built beside the final path under a temporary name (unlinked from the start where the file
 * system allows), synced, and renamed over the old file at commit. */
struct sqz_context_writer;

/* What a layer will hold: only the counts and which arrays are present are read from `shapes` (pointers non-NULL where
 * an array will be given; the arrays' contents are not touched). NULL for the index of shards, which has no layers. */
enum sqz_status sqz_context_writer_create(struct sqz_context_writer **out, const char *path,
                                          const struct sqz_context_meta *meta, const struct sqz_layer *shapes,
                                          struct sqz_error *error);
/* The same in two steps: what takes time, where a file system clears what it reserves, is in the second. The tokens stay
 * until then; nothing else is asked of the writer before, but abort. */
enum sqz_status sqz_context_writer_open(struct sqz_context_writer **out, const char *path,
                                        const struct sqz_context_meta *meta, const struct sqz_layer *shapes,
                                        struct sqz_error *error);
enum sqz_status sqz_context_writer_reserve(struct sqz_context_writer *writer, struct sqz_error *error);
/* Layers are written by so many threads from now on; one until then. The file does not depend on it. */
void sqz_context_writer_set_threads(struct sqz_context_writer *writer, int n_threads);
/* Writes keys and values of one layer, of which nothing else is looked at, and their checksums: put_layer() leaves them
 * out then. */
enum sqz_status sqz_context_writer_put_rows(struct sqz_context_writer *writer, uint32_t index,
                                            const struct sqz_layer *layer, struct sqz_error *error);
/* Writes the tensors of one layer and their checksums. */
enum sqz_status sqz_context_writer_put_layer(struct sqz_context_writer *writer, uint32_t index,
                                             const struct sqz_layer *layer, struct sqz_error *error);
/* Where commit puts the metadata's checksum, by which an index knows a shard. */
void sqz_context_writer_tell_checksum(struct sqz_context_writer *writer, uint64_t *checksum);
/* Sync, rename, sync the directory. The writer is freed whatever happens. *file_bytes may be NULL. */
enum sqz_status sqz_context_writer_commit(struct sqz_context_writer *writer, uint64_t *file_bytes,
                                          struct sqz_error *error);
/* Removes the temporary file, frees the writer. NULL is fine. */
void sqz_context_writer_abort(struct sqz_context_writer *writer);

/* Reading: sqz_context_open() and friends of squeeze.h, and the meta for engine/. */
const struct sqz_context_meta *sqz_context_get_meta(const struct sqz_context *context);
/* Tokens of the text that the file is of, or is a shard of: behind them a window's rows end. */
static inline size_t sqz_meta_text_tokens(const struct sqz_context_meta *meta)
{
    return meta->shard.n_tokens ? meta->shard.n_tokens : meta->n_tokens;
}

/* ---- Contexts in shards ------------------------------------------------------------- */

/* Of contexts that this process opens from now on, it holds the shards from rank * count / n_ranks up to the next
 * rank's first; others hold the rest. Rank 0 of 1, all of them, until then. Before any is opened. */
void sqz_shards_hold(uint32_t n_ranks, uint32_t rank);

/* 0: a context by itself. Of others sqz_context_layer() has counts and curves alone, and no rows. Those of layers with a
 * window are all in shard 0. */
uint32_t sqz_context_n_shards(const struct sqz_context *context);
/* The index's path as it was opened, and the checksum of its metadata. */
const char *sqz_context_path(const struct sqz_context *context);
uint64_t sqz_context_checksum(const struct sqz_context *context);
/* A checksum of what the layers of all shards are alike in: another process that has another has shards of another context. */
uint64_t sqz_context_kind(const struct sqz_context *context);
/* Shard `shard`, counted from 0; NULL: another process holds it. */
const struct sqz_context *sqz_context_shard(const struct sqz_context *context, uint32_t shard);

#endif
