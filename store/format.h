/*
 * What writer and reader of the context file share: limits, the table of a
 * layer's tensors, the checks of counts and contents, and how both report.
 * docs/format.md is the description; a change here is a change there.
 */
#ifndef SQZ_STORE_FORMAT_H
#define SQZ_STORE_FORMAT_H

#include "context_file.h"

#include <ggml.h>
#include <gguf.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "context files are little endian and are mapped as they are: this host cannot read them"
#endif

#define SQZ_FORMAT_ARCHITECTURE   "squeeze-context"
#define SQZ_FORMAT_CHECKSUM_KIND  "xxh3-64"
#define SQZ_KEY_VERSION           "squeeze.version"
#define SQZ_KEY_OPTION_ROWS       "squeeze.option.rows"  /* from version SQZ_FORMAT_PLANES on */
#define SQZ_KEY_ROPE_FACTORS      "squeeze.rope_factors" /* the one optional key */
#define SQZ_KEY_SHARD_COUNT       "squeeze.shard.count"  /* these from version SQZ_FORMAT_SHARDS on */
#define SQZ_KEY_SHARD_NUMBER      "squeeze.shard.number"
#define SQZ_KEY_SHARD_BLOCK       "squeeze.shard.block_tokens"
#define SQZ_KEY_SHARD_TOKENS      "squeeze.shard.token_count" /* from version SQZ_FORMAT_WINDOWS on */
#define SQZ_KEY_SHARD_FILES       "squeeze.shard.files"       /* of the index alone */
#define SQZ_KEY_SHARD_CHECKSUMS   "squeeze.shard.checksums"
#define SQZ_KEY_CHECKSUM_TENSORS  "squeeze.checksum.tensors"
#define SQZ_KEY_CHECKSUM_METADATA "squeeze.checksum.metadata"

enum {
    /* Versions that are read. What an older program reads is written as the oldest: keys that are INT8 alone need 3, rows
     * in planes 4, shards and their index 5, those of layers with a window 6. */
    SQZ_FORMAT_OLDEST = 2,
    SQZ_FORMAT_SMALL_KEYS = 3,
    SQZ_FORMAT_PLANES = 4,
    SQZ_FORMAT_SHARDS = 5,
    SQZ_FORMAT_WINDOWS = 6,
    SQZ_FORMAT_NEWEST = SQZ_FORMAT_WINDOWS,
    SQZ_FORMAT_ALIGNMENT = 64, /* one cache line: aligned rows for every vector width in use */

    /* Bounds on what a file may make its reader do. The largest context they allow (1024 layers of 8 levels) has
     * 80,897 tensors and under 8 MiB of metadata. */
    SQZ_FORMAT_MAX_LAYERS = 1024,
    SQZ_FORMAT_MAX_KEYS = 4096,
    SQZ_FORMAT_MAX_TENSORS = 131072,
    SQZ_FORMAT_MAX_ARRAY_STRINGS = 65536,
    SQZ_FORMAT_MAX_METADATA_BYTES = 16 << 20,
    SQZ_FORMAT_MAX_NAME_BYTES = 4096, /* model and source names */
    SQZ_FORMAT_MAX_CURVE = 65536,
    SQZ_FORMAT_MAX_QUERIES = 65536,

    SQZ_FORMAT_LAYER_TENSORS = 26 + 7 * SQZ_MAX_LEVELS
};

/* ---- Reporting ------------------------------------------------------------ */

/* Where a failure is reported: "path: message; hint", or "message" without a path. */
struct sqz_report {
    const char *path;
    enum sqz_status status; /* of a failed check: ARGUMENT when writing, FORMAT when reading */
    const char *hint;       /* "" for none */
    struct sqz_error *error;
};

/* Returns report->status. */
__attribute__((format(printf, 2, 3))) enum sqz_status sqz_report_fail(const struct sqz_report *report,
                                                                      const char *format, ...);

/* The same with another status and no hint. Returns `status`. */
__attribute__((format(printf, 3, 4))) enum sqz_status sqz_report_as(const struct sqz_report *report,
                                                                    enum sqz_status status, const char *format, ...);

/* ---- A layer's tensors -------------------------------------------------------- */

enum sqz_need { SQZ_NEED_NEVER, SQZ_NEED_MAYBE, SQZ_NEED_ALWAYS };

struct sqz_tensor_spec {
    char name[GGML_MAX_NAME];
    enum ggml_type type; /* F16, F32, I32 or I8 */
    int64_t ne[3];       /* ggml order, fastest first; trailing ones for lower ranks */
    uint64_t bytes;
    enum sqz_need need;
    size_t slot; /* byte offset in struct sqz_layer of the pointer to the array */
    bool bulk;   /* keys and values; everything else is the index */
    bool rows;   /* of bulk, what a layer's `keys` and `values` are made of */
    bool steers; /* its numbers are checked and lead accesses and searches; so do positions, which only
                                squeezing again reads */
};

/* Fills specs with the tensors that a layer of these counts may have, index first, key and value last; returns how
 * many. The counts have passed sqz_check_layer_counts(). */
size_t sqz_layer_tensors(struct sqz_tensor_spec specs[SQZ_FORMAT_LAYER_TENSORS], const struct sqz_layer *layer,
                         uint32_t index);

const void *sqz_slot_get(const struct sqz_layer *layer, size_t slot);
void sqz_slot_set(struct sqz_layer *layer, size_t slot, const void *array);

/* Bytes rounded up to the alignment; bytes are at most INT64_MAX. */
static inline uint64_t sqz_format_pad(uint64_t bytes)
{
    return (bytes + (SQZ_FORMAT_ALIGNMENT - 1)) & ~(uint64_t)(SQZ_FORMAT_ALIGNMENT - 1);
}

/* ---- Checks --------------------------------------------------------------------- */

enum sqz_status sqz_check_meta(const struct sqz_context_meta *meta, const struct sqz_report *report);
enum sqz_status sqz_check_tokens(const int32_t *tokens, size_t n_tokens, const struct sqz_report *report);

/* Of a context by itself nothing. */
enum sqz_status sqz_check_shard_place(const struct sqz_shard_place *shard, size_t n_tokens,
                                      const struct sqz_report *report);

/* Tokens that the rows of a file's layers are of. */
struct sqz_row_tokens {
    size_t n;          /* one row each, but in layers with a window */
    size_t window_end; /* of the text whose last rows those have; 0: none of theirs are in the file */
};
struct sqz_row_tokens sqz_row_tokens_of(const struct sqz_context_meta *meta);

/* Scalars of a layer against each other and the number of tokens. */
enum sqz_status sqz_check_layer_counts(const struct sqz_layer *layer, uint32_t index, struct sqz_row_tokens tokens,
                                       const struct sqz_report *report);

/* What a layer's rows are kept as in a file of a version under the options that its context was squeezed with. */
void sqz_layer_set_types(struct sqz_layer *layer, const struct sqz_squeeze_options *options, uint32_t version);

/* Whether they are kept so. */
enum sqz_status sqz_check_layer_types(const struct sqz_layer *layer, uint32_t index,
                                      const struct sqz_squeeze_options *options, uint32_t version,
                                      const struct sqz_report *report);

/* Everything in a layer's arrays that steers a pointer or a search. Counts are checked and arrays present. */
enum sqz_status sqz_check_layer_contents(const struct sqz_layer *layer, uint32_t index, struct sqz_row_tokens tokens,
                                         const struct sqz_report *report);

/* ---- The bounded walk over a GGUF's metadata ---------------------------------------- */

struct sqz_tensor_entry {
    const char *name; /* in the file, not terminated */
    size_t name_bytes;
    uint32_t id; /* order in the file */
    int32_t type;
    int64_t ne[GGML_MAX_DIMS];
    uint64_t offset, bytes; /* offset from the start of the file */
    bool known, bulk;       /* set when it is bound to what it is for: other tensors are not looked at */
};

struct sqz_walk {
    uint64_t data_offset; /* where tensor data begins = bytes of metadata */
    uint64_t file_bytes;  /* what the file must have */
    uint64_t checksum_at; /* file offset of the metadata checksum; 0: none */
    size_t n_tensors;
    struct sqz_tensor_entry *tensors; /* sorted by name; malloc'ed */
};

/* Walks header, keys and tensor infos of a mapped file without trusting any count, so that gguf_init_from_buffer()
 * can neither fail, log, nor allocate out of proportion on it afterwards. Refuses what is not a context of a known version:
 * not a GGUF, a model, another version. walk->tensors is freed by the caller, also after a failure. */
enum sqz_status sqz_walk_metadata(struct sqz_walk *walk, const uint8_t *data, size_t size,
                                  const struct sqz_report *report);

/* NULL when there is none of that name. */
struct sqz_tensor_entry *sqz_walk_find(const struct sqz_walk *walk, const char *name);

#endif
