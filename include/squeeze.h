/*
 * squeeze: answers many questions about one long, fixed context without
 * reading the whole key-value (KV) cache at every token.
 *
 * A context is read once with exact attention ("prepare"). Its keys are
 * clustered; later queries are compared with the centroids, the clusters that
 * matter are retained, and exact attention runs on those keys alone
 * (Squeezed Attention, arXiv 2411.09688). docs/method.md explains the method,
 * docs/format.md the context file.
 *
 * Letters used for shapes, slowest dimension first:
 *   T tokens   H query heads   K key-value heads (H is a multiple of K)
 *   N rows (keys) of the context   D head dimension   C clusters
 * F16 means IEEE 754 binary16 in a uint16_t; F32 means float.
 *
 * Sizes carry their unit: _bytes, _tokens, _rows. Every function that can
 * fail returns enum sqz_status and, where it takes a struct sqz_error, writes
 * a sentence that says what was found and what is allowed. NULL is accepted
 * for any struct sqz_error pointer. Every _free function accepts NULL.
 *
 * Threads: objects may be used from any thread, one call at a time an object.
 * A struct sqz_context is read-only once open and may be shared by any number
 * of sessions. Calls use OpenMP inside where a thread count says so. A program
 * that is to share its machine should see to GOMP_SPINCOUNT or OMP_WAIT_POLICY
 * before the OpenMP runtime is loaded: by default its threads spin while they
 * wait. Results do not depend on the number of threads.
 */
#ifndef SQUEEZE_H
#define SQUEEZE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SQZ_VERSION_MAJOR 0
#define SQZ_VERSION_MINOR 1
#define SQZ_VERSION_PATCH 0

#if defined(SQZ_SHARED) && (defined(__GNUC__) || defined(__clang__))
#define SQZ_API __attribute__((visibility("default")))
#else
#define SQZ_API
#endif

/* "0.1.0"; static storage. */
SQZ_API const char *sqz_version(void);

/* ---- Status ------------------------------------------------------------ */

/* Numbers are never reused or changed. */
enum sqz_status {
    SQZ_OK = 0,
    SQZ_ERROR_ARGUMENT = 1,    /* an argument outside what the call allows */
    SQZ_ERROR_MEMORY = 2,      /* an allocation failed */
    SQZ_ERROR_IO = 3,          /* the operating system refused; errno's text is in the message */
    SQZ_ERROR_FORMAT = 4,      /* a file is not what it claims, is damaged, or a value is out of range */
    SQZ_ERROR_UNSUPPORTED = 5, /* well formed, but this build or method cannot express it */
    SQZ_ERROR_MISMATCH = 6,    /* a context prepared for another model */
    SQZ_ERROR_LENGTH = 7,      /* more tokens than the model's context holds */
    SQZ_ERROR_CANCELLED = 8,   /* a callback asked to stop */
    SQZ_ERROR_TEXT = 9,        /* nothing visible, not UTF-8, a NUL, or a known format that is no text */
    SQZ_ERROR_INTERNAL = 10    /* a library below failed in a way it should not */
};

/* "SQZ_ERROR_IO" and so on; "SQZ_STATUS_UNKNOWN" for other values. */
SQZ_API const char *sqz_status_name(enum sqz_status status);

struct sqz_error {
    enum sqz_status status;
    char message[768]; /* one line, no final full stop or newline; "" when status is SQZ_OK */
};

/* Called during long work with the phase and how much of it is done. Return
 * false to cancel: the call that was given the callback then cleans up and
 * returns SQZ_ERROR_CANCELLED. */
struct sqz_progress {
    const char *phase;  /* "read", "cluster", "write", ...: static storage */
    double done, total; /* in the unit below; total > 0 */
    const char *unit;   /* "tokens", "layers", "bytes" */
    double seconds;     /* since the phase began */
};
typedef bool (*sqz_progress_callback)(const struct sqz_progress *progress, void *user_data);

/* ---- How a context is squeezed ------------------------------------------ */

#define SQZ_MAX_LEVELS 8

enum sqz_rule {
    SQZ_RULE_DEFAULT = 0, /* the options below, as docs/method.md measured them */
    SQZ_RULE_PAPER = 1    /* Squeezed Attention as published: cosine clusters, one threshold, no sinks, no tail */
};

enum sqz_metric {
    SQZ_METRIC_COSINE = 0,   /* spherical k-means */
    SQZ_METRIC_EUCLIDEAN = 1 /* k-means on squared distance */
};

enum sqz_group {
    SQZ_GROUP_MEAN = 0, /* a cluster's score is the mean over the query heads that share the keys */
    SQZ_GROUP_MAX = 1   /* ... the maximum */
};

enum sqz_index {
    SQZ_INDEX_F16 = 0,
    SQZ_INDEX_INT8 = 1 /* INT8 with an F32 scale a row: half the bytes */
};

enum sqz_row_format {
    SQZ_ROWS_F16 = 0,
    SQZ_ROWS_INT4_4 = 1, /* 4 + 4 bits in two planes, together INT8, with an F16 step a row: half the bytes */
    SQZ_ROWS_INT4 = 2    /* the upper 4 bits alone: a quarter */
};

/* Options of clustering and calibration. sqz_squeeze_options_default() fills
 * them for a rule; change single fields after. */
struct sqz_squeeze_options {
    size_t size;                          /* sizeof(struct sqz_squeeze_options), set by _default() */
    enum sqz_rule rule;                   /* recorded in the context file */
    uint32_t n_levels;                    /* 0 (dense: no clusters) to SQZ_MAX_LEVELS */
    float centroid_share[SQZ_MAX_LEVELS]; /* clusters of a level as a share of the clusterable keys, the finest level
                                             first: 0.05, 0.01, ...; above 0, at most 0.5, decreasing */
    enum sqz_metric metric;
    enum sqz_group group;
    enum sqz_index index; /* format of the centroids */
    enum sqz_index keys;  /* format of the keys of clustered layers. INT8: there are no others, so that a budget of 1
                               reads rounded keys, too */
    enum sqz_row_format
        rows;               /* format of keys and values of clustered layers, but for sinks and window, which stay F16;
                                 other than F16: keys is F16, and a budget of 1 reads rounded rows */
    uint32_t n_sinks;       /* first tokens, always retained */
    uint32_t n_window;      /* last tokens, always retained */
    uint32_t n_iterations;  /* of k-means, 1 to 1000 */
    uint32_t code_words;    /* 32-bit words of code for every key, by which single keys are chosen; 0 (none) to 4 */
    bool center;            /* subtract the mean key before clustering */
    bool variance;          /* correct a centroid's logit by the spread of its keys; calibration chooses how much */
    bool per_head;          /* thresholds per KV head (false: one for all layers and heads) */
    bool tail;              /* estimate what pruned clusters would have contributed */
    bool value_skip;        /* do not read value rows whose own weight is below the threshold; a card reads all */
    uint32_t n_calibration; /* queries kept for calibration, taken from the last tokens of the context; 1 to 1024 */
    uint64_t seed;
};

/* Fills all fields. A rule that is neither of the two is recorded as given and refused where options are used. */
SQZ_API void sqz_squeeze_options_default(struct sqz_squeeze_options *options, enum sqz_rule rule);

/* ---- One attention layer (no model, no file) ------------------------------ */

struct sqz_layer_shape {
    uint32_t n_head;    /* H, 1 to 1024 */
    uint32_t n_head_kv; /* K, divides H */
    uint32_t head_dim;  /* D, 32 to 256, a multiple of 16 */
    float scale;        /* logits are scale * q.k, usually 1/sqrt(D) */
};

/* The keys and values of one layer, clustered, calibrated and sorted;
 * squeeze_attention.h says what is in it. */
struct sqz_layer;

/* Builds a layer from keys and values, F16 [K][N][D] each, and calibration
 * queries, F32 [n_queries][H][D], those of the last n_queries rows. All are
 * copied; the caller keeps its own. n_rows (N): 1 to 2^31 - 1. n_queries: at
 * most n_rows; it may be 0 and queries NULL when options->n_levels is 0.
 * n_threads: at least 1. *out is NULL on failure. Errors: ARGUMENT, MEMORY. */
SQZ_API enum sqz_status sqz_layer_create(struct sqz_layer **out, const struct sqz_layer_shape *shape,
                                         const uint16_t *keys, const uint16_t *values, size_t n_rows,
                                         const float *queries, size_t n_queries,
                                         const struct sqz_squeeze_options *options, int n_threads,
                                         struct sqz_error *error);
SQZ_API void sqz_layer_free(struct sqz_layer *layer);

/* What calls of attention have read. Layers that keep only a sliding window
 * cost the same at any context length and are not counted. */
struct sqz_attention_stats {
    uint64_t context_bytes;  /* all keys and values of the layer, times the selections made */
    uint64_t centroid_bytes; /* centroids, value centroids and their per-cluster numbers, codes */
    uint64_t key_bytes, value_bytes;
    uint64_t n_selections;              /* selections made: one a query block and KV head */
    uint64_t retained_keys, total_keys; /* keys that got exact attention; all keys, times the selections made */
    uint64_t coded_keys;                /* keys whose codes were read */
};

/* Share of the context's KV bytes that was read, centroids included; 0 when
 * nothing was counted. */
SQZ_API double sqz_attention_stats_share(const struct sqz_attention_stats *stats);
/* Adds every field of stats to sum. */
SQZ_API void sqz_attention_stats_add(struct sqz_attention_stats *sum, const struct sqz_attention_stats *stats);

/* Attention of n_tokens (T) query tokens, F32 [T][H][D], over all rows of the
 * layer at a budget (share of the KV bytes read, 0 < budget <= 1; 1 is dense:
 * exact but for what F16 or INT8 rounded when the layer was made).
 * Blocks of up to 64 tokens share one selection per KV head. out: F32
 * [T][H][D]; lse: F32 [T][H], the natural logarithm of the sum of the
 * exponentials of the logits, or NULL; stats is added to, or NULL. n_threads:
 * at least 1. Nothing is written on failure. A budget below
 * sqz_layer_floor() is taken as it is: little but what is read at any budget
 * is read then. Errors: ARGUMENT (also a layer that is not in host memory),
 * MEMORY. */
SQZ_API enum sqz_status sqz_layer_attend(const struct sqz_layer *layer, const float *queries, size_t n_tokens,
                                         float budget, float *out, float *lse, int n_threads,
                                         struct sqz_attention_stats *stats, struct sqz_error *error);

/* The least budget that buys something, above 0, at most 1. Sinks, window,
 * centroids and what codes need once are read at any budget; of few rows they
 * are a large share, and a budget that leaves no room for keys that a query
 * chose is worse than a window. The floor is that share and room for some
 * hundreds of keys, more where the calibration queries lose much without; 1
 * where reading all costs no more, as for a layer without clusters. With
 * SQZ_RULE_PAPER: what is read when nothing is chosen. */
SQZ_API float sqz_layer_floor(const struct sqz_layer *layer);

/* ---- A model ---------------------------------------------------------------- */

/* llama.cpp's log is the whole process's, and the library leaves it alone: its
 * messages go where the program sends them by llama_log_set(), to standard
 * error by default. After this call nothing is printed, and what llama.cpp
 * complains about is quoted in the library's own messages. For programs that
 * do not link llama.cpp themselves; to be called once, before all else. */
SQZ_API void sqz_llama_log_take(void);

struct sqz_model; /* a model opened through llama.cpp */

/* What tokens of one batch on one context, users' or a question's, read of it. Only with EACH does an answer not depend
 * on who else asks; with the others every token reads at least what it would alone. Of more than 64 tokens of one
 * question EACH reads everything on a card, and ONE whole clusters. */
enum sqz_together {
    SQZ_TOGETHER_CHEAPEST, /* each time the one of the following that takes least, by what passes before have read, on
                              the CPU by what rows of the model's shape took when it was opened */
    SQZ_TOGETHER_EACH,     /* what each selected */
    SQZ_TOGETHER_ONE,      /* for all what any of them selected; on a card alone */
    SQZ_TOGETHER_ALL       /* everything */
};

/* 16-bit copies (BF16) of quantised weights beside them on a card: products of 65 to 255 tokens at once are up to 2.5
 * times as fast with them (those of more are 16-bit ones without). They take two bytes a weight of the card's memory, up
 * to half of what is free, else there are none. */
enum sqz_copies {
    SQZ_COPIES_AUTO, /* when more than 64 sessions go together */
    SQZ_COPIES_NEVER,
    SQZ_COPIES_ALWAYS /* from the first run on */
};

/* What several cards of a host share out. */
enum sqz_split {
    SQZ_SPLIT_LAYERS, /* the model's layers and their part of every context; contexts in shards are refused */
    SQZ_SPLIT_ROWS, /* contexts in shards: a card holds one of them, and the first the model and sessions' own rows. Contexts of
                         one file lie on the first card */
    SQZ_SPLIT_TURNS /* as LAYERS, which cards have in turns: a text's first rows are complete, and written, sooner, and each
                         token goes from card to card more often. For models that prepare */
};

struct sqz_model_options {
    size_t size;      /* sizeof(struct sqz_model_options), set by _default() */
    int n_threads;    /* up to 1024: as many, always; 0: one a core, fewer while other processes use the cores */
    float rope_scale; /* 0 or 1: as trained; s > 1, to 64, stretches the context s times: the model's own RoPE
                           scaling (linear, YaRN, LongRoPE) by s more; linear where it has none */
    int n_gpu_layers; /* last layers, the output counted as one, that run on a graphics card; -1: all of them where
                           there is a card; 0: none (default) */
    size_t gpu_memory_bytes; /* most that contexts and sessions take of it; 0: what is free */
    int together;            /* enum sqz_together, on a card */
    int together_cpu;        /* the same of a model without layers on a card: EACH (default), CHEAPEST or ALL */
    int weight_copies;       /* enum sqz_copies, on a card */
    int split;               /* enum sqz_split, on several cards; with ROWS all layers have to be on a card, or none */
    const char *draft_path;  /* a file of the same model in fewer bits, as sqz_model_quantize() makes it, whose weights
                                  draft exact answers; NULL (default): the model's own */
};
SQZ_API void sqz_model_options_default(struct sqz_model_options *options);

/* Opens a GGUF model. options may be NULL; *out is NULL on failure. Errors:
 * ARGUMENT, IO, FORMAT (not a GGUF, or damaged), UNSUPPORTED (an architecture
 * whose attention cannot be expressed; the message names it), MEMORY. */
SQZ_API enum sqz_status sqz_model_open(struct sqz_model **out, const char *path,
                                       const struct sqz_model_options *options, struct sqz_error *error);
SQZ_API void sqz_model_free(struct sqz_model *model); /* after its sessions */

/* The fingerprint that sqz_model_info has, of a file that is not opened as a model. Errors: IO, FORMAT. */
SQZ_API enum sqz_status sqz_model_fingerprint(char out[65], const char *path, struct sqz_error *error);

/* Writes the model at `path` with 4-bit weights (llama.cpp's Q4_0) to out_path, which appears when it is whole; one that
 * is there stays. n_threads 0: one a core. Errors: ARGUMENT, IO, FORMAT, UNSUPPORTED (its weights have fewer than 6
 * bits as they are). */
SQZ_API enum sqz_status sqz_model_quantize(const char *out_path, const char *path, int n_threads,
                                           struct sqz_error *error);

struct sqz_model_info {
    char name[128]; /* general.name of the file, or its architecture */
    char architecture[64];
    char description[128]; /* "llama 135M Q4_1" */
    char fingerprint[65];  /* hex; equal for equal files */
    uint32_t n_layer, n_head, n_head_kv, head_dim, n_vocab;
    uint32_t n_context_tokens; /* most tokens the model holds, with the rope_scale it was opened with */
    uint32_t n_window_tokens;  /* sliding window of its local layers; 0: none */
    uint64_t n_parameters, size_bytes, draft_size_bytes; /* of the weights that draft; 0: the model's own do */
    bool unknown_chat_template; /* the file has one that llama.cpp cannot apply: plain text stands in its place */
    bool has_chat_template;
    int n_threads;                /* at most */
    uint32_t n_gpu_layers;        /* on a graphics card, the output counted as one */
    uint32_t n_row_cards;         /* that contexts in shards are read by, one each (SQZ_SPLIT_ROWS); 0: by none */
    uint64_t weight_copies_bytes; /* on cards, as of now */
};
/* Copies; nothing in *info depends on the model afterwards. */
SQZ_API void sqz_model_get_info(const struct sqz_model *model, struct sqz_model_info *info);

/* Tokens of a UTF-8 text, special-token strings in it taken as plain text, no
 * token added in front. In every text that the library takes, byte order marks
 * at its start are left out and CR LF and CR count as LF. *tokens is malloc'ed,
 * caller frees; NULL on failure. Errors: TEXT, LENGTH (about 2 GiB), MEMORY,
 * INTERNAL. */
SQZ_API enum sqz_status sqz_model_tokenize(const struct sqz_model *model, const char *text, size_t text_bytes,
                                           int32_t **tokens, size_t *n_tokens, struct sqz_error *error);

/* The text of one token (UTF-8 bytes, perhaps a part of a character). Returns
 * bytes written to buffer, at most capacity; control tokens give 0 bytes. */
SQZ_API size_t sqz_model_token_text(const struct sqz_model *model, int32_t token, char *buffer, size_t capacity);

/* ---- Prepare: text -> context file -------------------------------------------- */

struct sqz_prepare_options {
    size_t size; /* sizeof(struct sqz_prepare_options), set by _default() */
    struct sqz_squeeze_options squeeze;
    size_t truncate_tokens;  /* 0: refuse a document that does not fit; else keep the context's first n tokens */
    size_t reserve_tokens;   /* room asked for question and answer; default 256; the report says what is left */
    bool raw;                /* true: no chat template around the document; questions stand in plain text */
    const char *source_name; /* recorded; NULL: none */
    uint32_t n_shards; /* 2 to 1024: so many files beside out_path, which becomes their index; docs/ranks.md. 0 and
                                1: one file. UNSUPPORTED with a model on a card where several processes prepare */
    sqz_progress_callback progress;
    void *user_data;
};
SQZ_API void sqz_prepare_options_default(struct sqz_prepare_options *options);

struct sqz_prepare_report {
    size_t n_document_tokens; /* before truncation */
    size_t n_context_tokens;  /* prepared, template included */
    size_t n_left_tokens;     /* what the model's context leaves for question and answer */
    double read_seconds, cluster_seconds, calibrate_seconds, write_seconds, total_seconds;
    uint64_t file_bytes;
    float budget_floor; /* as sqz_context_info has it */
    size_t n_card_layers,
        n_host_layers;  /* clustered layers of those on a card: all; what was left to the host, for want
                                             of memory there or of a kernel for their shape or these options */
    char fallback[240]; /* of a model on a card: which layers were read on the CPU, and why, a sentence; "": none */
};

/* Reads the document (UTF-8; new lines at its end do not count unless raw) with
 * the model, clusters, calibrates and writes out_path. The file appears whole or not at all; an old file of that name
 * stays until then. options and report may be NULL. Errors: ARGUMENT,
 * TEXT, LENGTH (by how many tokens), IO, MEMORY, CANCELLED,
 * UNSUPPORTED, INTERNAL. */
SQZ_API enum sqz_status sqz_prepare(struct sqz_model *model, const char *text, size_t text_bytes, const char *out_path,
                                    const struct sqz_prepare_options *options, struct sqz_prepare_report *report,
                                    struct sqz_error *error);

/* The same for n_tokens tokens that are already there (no template is put
 * around them). Errors: ARGUMENT also for a token that the model does not have;
 * TEXT for no tokens. */
SQZ_API enum sqz_status sqz_prepare_tokens(struct sqz_model *model, const int32_t *tokens, size_t n_tokens,
                                           const char *out_path, const struct sqz_prepare_options *options,
                                           struct sqz_prepare_report *report, struct sqz_error *error);

/* ---- A prepared context ----------------------------------------------------------- */

struct sqz_context; /* an open context file, memory-mapped */

/* Which tensors' checksums are compared when a file is opened. Counts, shapes
 * and ranges are checked whatever this says. */
enum sqz_verify {
    SQZ_VERIFY_AUTO = 0, /* ALL when the file is under half the memory there is, else INDEX */
    SQZ_VERIFY_ALL = 1,
    SQZ_VERIFY_INDEX = 2 /* all but keys and values */
};

struct sqz_context_options {
    size_t size; /* sizeof(struct sqz_context_options), set by _default() */
    enum sqz_verify verify;
    uint64_t memory_bytes; /* what may be counted on; 0: the machine's memory, or its control group's limit. Of a
                              context above three quarters of it only the pages that are retained are read */
};
SQZ_API void sqz_context_options_default(struct sqz_context_options *options);

/* Opens a context file; options may be NULL; *out is NULL on failure. Errors:
 * ARGUMENT, IO, FORMAT (what was found, what is allowed, where), UNSUPPORTED,
 * MEMORY.
 *
 * The file should not change while it is open; another may take its name
 * (rename()). What leads memory accesses is copied, so a change spoils answers
 * at most, and sqz_session_run() and sqz_context_squeeze() refuse a file that
 * was written to or has another size, before they work and after. A file that
 * is cut off while they run, or whose disk fails, raises SIGBUS, which is the
 * program's to handle: sqz_context_page_lost(). */
SQZ_API enum sqz_status sqz_context_open(struct sqz_context **out, const char *path,
                                         const struct sqz_context_options *options, struct sqz_error *error);
SQZ_API void sqz_context_free(struct sqz_context *context); /* after its sessions */

/* Whether the file has the size and the time of its last change that it had
 * when it was opened, and lost no page since. Errors: IO. About a microsecond. */
SQZ_API enum sqz_status sqz_context_check_unchanged(const struct sqz_context *context, struct sqz_error *error);

/* For a handler of SIGBUS, which a library does not install by itself: whether
 * address, si_addr of its siginfo_t, was in the file of an open context. All of
 * that context then reads as zeros, so the handler may return: what was at work
 * goes on, and fails with IO. False: none of ours; the signal means what it
 * always does, also for a page of a model, which llama.cpp maps.
 * Async-signal-safe, from any thread. */
SQZ_API bool sqz_context_page_lost(const void *address);

/* Clusters and calibrates an open context anew, from its own keys, values and
 * stored queries (no model needed), and writes out_path as sqz_prepare does;
 * out_path may be the context's own file. Of options, squeeze and progress
 * count; options and report may be NULL. n_threads: up to 1024; 0: one a core.
 * Errors: ARGUMENT (also a context without stored queries), IO, MEMORY,
 * CANCELLED. */
SQZ_API enum sqz_status sqz_context_squeeze(const struct sqz_context *context, const char *out_path,
                                            const struct sqz_prepare_options *options, int n_threads,
                                            struct sqz_prepare_report *report, struct sqz_error *error);

struct sqz_context_info {
    const char *model_name, *model_fingerprint, *source_name; /* die with the context */
    const int32_t *tokens; /* [n_tokens] the context's tokens; die with the context */
    size_t n_tokens;
    uint32_t n_layer, n_head, n_head_kv, head_dim;
    uint32_t n_window_layers; /* layers that keep only a sliding window */
    uint32_t n_shards;        /* files that it lies in, beside their index; 0: it is one file */
    float rope_scale;         /* how far the model's own RoPE scaling was stretched, 1 to 64 */
    bool long_rope_factors;   /* of a LongRoPE model: its long factors, else the short ones */
    bool has_template;        /* a chat template stands around the document */
    struct sqz_squeeze_options squeeze;
    uint64_t file_bytes, kv_bytes, index_bytes; /* index: centroids, offsets, thresholds, positions */
    float budget_floor;      /* sqz_layer_floor() of all layers together; 1: every question reads everything */
    uint32_t format_version; /* of the file */
    bool rounded_keys;       /* clustered layers keep their keys as INT8 alone, or keys and values as squeeze.rows says:
                                   a budget of 1 reads all of them, but each number only to half a step */
};
/* What *info points to belongs to the context. */
SQZ_API void sqz_context_get_info(const struct sqz_context *context, struct sqz_context_info *info);

/* One layer of a context; NULL when layer >= n_layer. Dies with the context. */
SQZ_API const struct sqz_layer *sqz_context_layer(const struct sqz_context *context, uint32_t layer);

struct sqz_layer_info {
    struct sqz_layer_shape shape;
    size_t n_rows, n_fixed_rows; /* fixed: sinks and window, or the whole layer when it is not clustered */
    bool sliding_window;         /* keeps only the last rows of the context */
    uint32_t n_levels;
    uint32_t n_clusters[SQZ_MAX_LEVELS];
    float dense_share; /* what a budget of 1 reads of the bytes that shares are of, keys and values as F16:
                                      1, or less where keys are INT8 */
};
SQZ_API void sqz_layer_get_info(const struct sqz_layer *layer, struct sqz_layer_info *info);

/* Keys of cluster `cluster` of a level (0 is the finest) of one KV head; 0 out of range. */
SQZ_API size_t sqz_layer_cluster_rows(const struct sqz_layer *layer, uint32_t head_kv, uint32_t level,
                                      uint32_t cluster);

/* The calibrated curve of one KV head: at point i, thresholds of
 * exp(log_threshold[i]) made the calibration queries read share[i] of the KV
 * bytes and lose lost_mass[i] of the attention mass. Returns the number of
 * points (0: not clustered, or head_kv out of range; the arrays are then NULL);
 * arrays die with the layer. Each pointer may be NULL. */
SQZ_API size_t sqz_layer_curve(const struct sqz_layer *layer, uint32_t head_kv, const float **log_threshold,
                               const float **share, const float **lost_mass);

/* ---- Ask ---------------------------------------------------------------------------- */

struct sqz_session; /* one user's tokens on top of a shared context */

/* What answers are exact to. An exact session reads all of the context for every token that it keeps (its budget is 1),
 * and is faster than that by what it runs ahead: drafts of the next tokens, made with a small part of the context or
 * taken from the text, are run in one batch with the token that is asked for, and those that the session would have
 * chosen itself cost nothing when their turn comes. docs/speculation.md says what exact means. */
enum sqz_exact {
    SQZ_EXACT_NO = 0,
    SQZ_EXACT_F16 = 1, /* to the model, with keys and values in F16 */
    SQZ_EXACT_INT8 = 2 /* to INT8 keys and values, of contexts that have them in 4 + 4 bits: both planes of every row */
};
enum sqz_draft {
    SQZ_DRAFT_CHAIN = 0, /* from the text where that promises more, else by the model */
    SQZ_DRAFT_SELF = 1,  /* by the model, with the draft budget's part of the context */
    SQZ_DRAFT_NGRAM = 2, /* what followed the last tokens where they stood before */
    SQZ_DRAFT_NONE = 3   /* every token is run by itself */
};
/* What drafts of the model read of rows of 4 + 4 bits. */
enum sqz_draft_rows {
    SQZ_DRAFT_ROWS_UPPER = 0, /* their upper plane alone: 4 bits of each number, half the bytes */
    SQZ_DRAFT_ROWS_BOTH = 1,  /* both planes, as exact runs do */
    SQZ_DRAFT_ROWS_F16 = 2    /* in statistics: the context's rows are F16 */
};

struct sqz_session_options {
    size_t size;          /* sizeof(struct sqz_session_options), set by _default() */
    float budget;         /* share of the context's KV bytes a query reads, (0, 1]; 1 is dense; default 0.1. Less
                                than the context's budget_floor is raised to it (not with SQZ_RULE_PAPER) */
    size_t n_user_tokens; /* most tokens of the user's own, question and answer together; 0, and anything above:
                                what the model's context leaves */
    /* Sampling, by llama.cpp's samplers. */
    float temperature;  /* 0 (default: greedy) to 100 */
    float top_p;        /* (0, 1]; default 0.95 */
    uint32_t seed;      /* default 1; the same seed gives the same tokens, whichever it is */
    bool attention_map; /* notes where in the context attention goes, for sqz_session_attention_map() */

    int exact;          /* enum sqz_exact, SQZ_EXACT_NO by default; else the budget is 1, whatever it says */
    int draft;          /* enum sqz_draft of an exact session, SQZ_DRAFT_CHAIN by default */
    float draft_budget; /* (0, 1], raised as the budget is; default 0.05. With draft_rows UPPER it says which rows are
                                read, those that it has room for as F16; a quarter of their bytes is */
    uint32_t
        draft_tokens;  /* most tokens a draft, 1 to 16; default 7. It has as many as pay by what was measured so far */
    bool draft_steady; /* it has as many as it may, whatever that takes: then an answer does not depend on times, which
                              by the length of drafts decide how batches are rounded, and what is drawn */
    int draft_rows;    /* enum sqz_draft_rows; UPPER by default. Of contexts with F16 rows no matter */
};
SQZ_API void sqz_session_options_default(struct sqz_session_options *options);

/* Model and context must outlive the session; options may be NULL; *out is
 * NULL on failure. Sessions on one model share its llama.cpp context: one call
 * at a time on all of them. Errors: ARGUMENT, MISMATCH (context of another
 * model), LENGTH (the context leaves no room), MEMORY. */
SQZ_API enum sqz_status sqz_session_create(struct sqz_session **out, struct sqz_model *model,
                                           const struct sqz_context *context, const struct sqz_session_options *options,
                                           struct sqz_error *error);
SQZ_API void sqz_session_free(struct sqz_session *session);

/* Forgets the user's tokens, logits, statistics, the thresholds' correction and
 * the sampler's state; context and options stay. */
SQZ_API void sqz_session_reset(struct sqz_session *session);

/* The budget of the tokens that follow, raised as that of the options is.
 * Errors: ARGUMENT (outside (0, 1], or the session is exact; the old one stays). */
SQZ_API enum sqz_status sqz_session_set_budget(struct sqz_session *session, float budget, struct sqz_error *error);

/* cancelled is asked often while sqz_session_run() works, on its thread; true
 * ends the run with CANCELLED. NULL: never. */
SQZ_API void sqz_session_set_cancel(struct sqz_session *session, bool (*cancelled)(void *user_data), void *user_data);

/* Tokens of a question as the model's chat template wants it after the
 * context (first == true: the question follows the document in the same turn;
 * false: a new user turn after an answer). The question is UTF-8, taken as
 * plain text without the blanks and new lines at its ends. *tokens is
 * malloc'ed, caller frees; NULL on failure. Errors: TEXT, LENGTH (about 2 GiB),
 * UNSUPPORTED (the chat template cannot be applied), MEMORY, INTERNAL. */
SQZ_API enum sqz_status sqz_session_question_tokens(const struct sqz_session *session, const char *question,
                                                    size_t question_bytes, bool first, int32_t **tokens,
                                                    size_t *n_tokens, struct sqz_error *error);

/* Runs n_tokens tokens after all earlier ones. Afterwards sqz_session_logits()
 * holds the next-token logits of the last one. On failure the session keeps
 * none of them and has no logits. Errors: ARGUMENT (no tokens, or one that the
 * model does not have), LENGTH (with how many tokens are left), IO (the context
 * file changed while it was open), CANCELLED, MEMORY, INTERNAL. */
SQZ_API enum sqz_status sqz_session_run(struct sqz_session *session, const int32_t *tokens, size_t n_tokens,
                                        struct sqz_error *error);

/* Runs tokens of several sessions of one model together, each after its own
 * earlier ones: they share every matrix product, so that n users cost little
 * more than one until the products are bound by arithmetic. Contexts, budgets
 * and cancel callbacks are each session's own; contexts read with the same
 * RoPE share a pass. Each item's status and error say how it fared, as
 * sqz_session_run() would; one that fails or is cancelled leaves the others
 * untouched. Results are those of each session alone, up to the rounding of
 * llama.cpp's products, which depends on the size of a batch. Nothing is run,
 * and ARGUMENT returned, when a session is missing, comes twice or is of
 * another model; else OK. */
struct sqz_batch_item {
    struct sqz_session *session;
    const int32_t *tokens;
    size_t n_tokens;
    enum sqz_status status; /* filled, as is error */
    struct sqz_error error;
};
SQZ_API enum sqz_status sqz_batch_run(struct sqz_batch_item *items, size_t n_items, struct sqz_error *error);

/* F32 [n_vocab], valid until the next call on the session; NULL before the first run and after one that failed. */
SQZ_API const float *sqz_session_logits(const struct sqz_session *session);

/* How many bytes of an answer's text so far are surely the answer. With a chat template all: the model ends it. Without
 * one no token may ever end it: it ends before a blank line, or a line that begins with "Question:", and *ended is then
 * true. What may be the beginning of either is held back: it belongs to the answer when the model ends there. */
SQZ_API size_t sqz_session_answer_bytes(const struct sqz_session *session, const char *text, size_t text_bytes,
                                        bool *ended);

/* Samples the next token from the logits; *end is true when it ends the
 * answer. The token is not run yet: pass it to sqz_session_run(). Without
 * logits: -1, and *end is true. */
SQZ_API int32_t sqz_session_sample(struct sqz_session *session, bool *end);

/* Of an exact session. A cycle is a draft and the batch that verifies it. */
struct sqz_speculation_stats {
    uint64_t n_cycles, n_drafted, n_drafted_by_text; /* tokens */
    uint64_t n_accepted, n_tested; /* drafted tokens that were kept; that were looked at: behind the first
                                                        of a draft that is not kept, none is */
    double draft_seconds, verify_seconds;
    float draft_budget;               /* aimed at */
    int draft_rows;                   /* enum sqz_draft_rows */
    struct sqz_attention_stats draft; /* what drafts read; the session's own are of exact runs alone */
};

struct sqz_session_stats {
    size_t n_user_tokens, n_left_tokens;      /* run so far; still possible */
    struct sqz_attention_stats attention;     /* since create, reset or sqz_session_clear_stats() */
    double run_seconds, attention_seconds;    /* in sqz_session_run(); in the attention of that; since then too */
    int least_threads, most_threads;          /* that its runs took; since then too, 0 before the first */
    float budget_asked, budget_floor;         /* as set; of the context */
    float budget;                             /* aimed at: the larger of the two, but as asked with SQZ_RULE_PAPER */
    struct sqz_speculation_stats speculation; /* since then, too; zeros of a session that is not exact */
    size_t own_bytes;                         /* that keys and values of the user's tokens take; 0: not known */
};
SQZ_API void sqz_session_get_stats(const struct sqz_session *session, struct sqz_session_stats *stats);
/* Which of the context's tokens the answer attended to: F32 shares [n_context], each the share of attention that one had,
 * a mean over query heads of the tokens that were run one at a time, which an answer's are. Weights are exact; each token
 * looks at one KV head in 16, in turn, and at what was retained. What is left of 1 went to the user's own tokens and
 * to what was not. Returns how many query heads the mean is over. 0, and nothing is written: the session's options did not
 * ask for it, no such token has run, or attention was computed on a card. */
SQZ_API uint64_t sqz_session_attention_map(const struct sqz_session *session, float *shares);
/* Of a model on a card: which layers have no kernel there for this context, so that their attention runs on the CPU, and
 * why: a sentence, valid as long as the session; "": none. */
SQZ_API const char *sqz_session_fallback(const struct sqz_session *session);
SQZ_API void sqz_session_clear_stats(struct sqz_session *session); /* the user's tokens stay */

/* ---- Introspection -------------------------------------------------------------------- */

struct sqz_variant_info {
    const char *name;      /* "portable", "avx2", "avx512" */
    bool built, supported; /* compiled in; this CPU and OS can run it */
    bool chosen;           /* what calls use now */
};
/* Variant number `index`; false past the last. */
SQZ_API bool sqz_variant_get(size_t index, struct sqz_variant_info *info);

#ifdef __cplusplus
}
#endif

#endif /* SQUEEZE_H */
