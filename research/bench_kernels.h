/*
 * What the parts of `squeeze bench kernels` share:
 *   bench_kernels.c         the command: options, which measurements, progress
 *   bench_kernels_layer.c   a layer whose clusters are known because it was drawn from them
 *   bench_kernels_budget.c  the threshold at which a layer reads the share of its bytes that was asked for
 *   bench_kernels_case.c    one context length and number of queries: the operations, their times
 *   bench_kernels_parts.c   the lookup, the merge, and a bare read of what is retained, by themselves
 *   bench_kernels_check.c   attention in double precision, against which every result is held before it is timed
 *   bench_kernels_lookup.c  the lookup in double precision, against which every selection is held
 *   bench_kernels_rows.c    rows in planes beside F16 (--rows)
 *   bench_kernels_output.c  table, JSON, picture
 */
#ifndef SQZ_RESEARCH_BENCH_KERNELS_H
#define SQZ_RESEARCH_BENCH_KERNELS_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "arena.h"
#include "attention.h"
#include "layer.h"
#include "lookup.h"
#include "machine.h"
#include "pages.h"
#include "peak.h"

enum {
    BENCH_LEVELS = 2,   /* most levels of clusters */
    BENCH_REPEATS = 64, /* most repeats */
    BENCH_CURVE = 3,    /* points of the curve from a budget to a threshold */
};

/* How a layer is looked up: levels of clusters, format of centroids and of retained keys. */
struct bench_format {
    uint32_t n_levels; /* 0: no matter */
    enum sqz_index centroids, keys;
};
bool bench_same_format(struct bench_format a, struct bench_format b);

/* ---- The layer ---------------------------------------------------------------------- */

struct bench_layer_options {
    struct sqz_layer_shape shape;
    size_t n_rows;                  /* of the context */
    size_t n_user;                  /* most rows of the user behind it */
    double centroid_share;          /* clusters of level 1 as a share of the keys; of level 2: a fifth of them */
    bool int8_centroids, int8_keys; /* these in INT8 too */
    uint32_t code_words;            /* of code for every key */
    bool huge_pages;
    int n_threads;
};

/* Keys and values of all rows, the clusters they were drawn from, two levels of them. The rows of the user that follow
 * the context in head h are the first rows of head h + 1 (behind the last head stand n_user rows more), so that they
 * directly follow it in memory and an attention over one piece of memory, such as ggml's, can read the same rows. */
struct bench_layer {
    struct bench_layer_options options;
    struct sqz_layer layer;                                    /* in F16, BENCH_LEVELS levels, no curve */
    struct sqz_rows small_keys, small_centroids[BENCH_LEVELS]; /* the same as INT8, where that is asked for */
    struct pages rows, index;
};

/* Shape and counts, no arrays yet: enough to say how many bytes things take. */
void bench_layer_outline(struct bench_layer *layer, const struct bench_layer_options *options);

/* Bytes that bench_layer_make() takes. */
size_t bench_layer_bytes(const struct bench_layer_options *options);

/* False when there is no memory, or a signal was caught. Everything is drawn from fixed seeds. */
bool bench_layer_make(struct bench_layer *layer, const struct bench_layer_options *options);
void bench_layer_free(struct bench_layer *layer);

/* The layer in a format, with its finest levels. Pointers are those of `layer`. */
struct sqz_layer bench_layer_view(const struct bench_layer *layer, struct bench_format format);

/* Queries of n_tokens tokens that follow the context, F32 [n_tokens][H][D]. */
void bench_layer_queries(const struct bench_layer *layer, float *queries, size_t n_tokens);

/* ---- The budget ------------------------------------------------------------------------ */

/* A view of a layer with a curve from budgets to thresholds of its own. */
struct bench_variant {
    struct bench_format format;
    struct sqz_layer layer; /* points into what follows */
    float log_threshold[BENCH_CURVE], global_share[BENCH_CURVE];
    float *share, *tail_gain;         /* [K][BENCH_CURVE]; malloc'ed */
    float log_offset;                 /* for sqz_attend() */
    struct sqz_attention_stats stats; /* of one run of the whole call */
};

/* The variant's curve, with no threshold found yet; stays where it is, for the layer points into it. */
void bench_variant_make(struct bench_variant *variant, const struct bench_layer *layer, struct bench_format format);
void bench_variant_free(struct bench_variant *variant);

/* A threshold that nothing passes. */
void bench_variant_retain_nothing(struct bench_variant *variant);

/* Finds the threshold at which queries of the call, each with a selection of its own, read the budget, and each head's
 * share there and a nat around it; then the offset at which the call itself reads the budget. call->layer is the
 * variant's; its statistics are left in variant->stats. False when a signal was caught. */
bool bench_variant_meet_budget(struct bench_variant *variant, struct sqz_attend_call *call);

/* ---- The check ----------------------------------------------------------------------- */

/* A call whose result is held against the reference: sqz_attend()'s arguments, of which `out` was computed. */
struct check_result {
    bool ok;
    double error;      /* largest difference as a share of the sum of weight times |value| */
    char message[256]; /* what is wrong, with numbers */
};

/* Attention over every row. tolerance: least error allowed, as a share of the same sum; 0: what F32 sums give. */
struct check_result check_dense(const struct sqz_attend_call *call, double tolerance);

/* The squeezed result, with check_dense()'s tolerance: which clusters were retained, and attention over their rows, the fixed rows, the user's rows and
 * the tail. n_threads of the call serve the check as well. */
struct check_result check_squeezed(const struct sqz_attend_call *call, double tolerance);

/* The log of the exact mass of the user's and the fixed rows for each query row of a KV head, in the order of
 * sqz_lookup()'s base_lse: base[token * G + g]. */
void check_base_lse(const struct sqz_attend_call *call, uint32_t head_kv, float *base);

/* ---- Parts --------------------------------------------------------------------------- */

/* All lookups of a call: one a block of tokens and KV head. */
struct bench_lookup {
    float *queries, *norms, *base; /* [K][T * G][D], [K][T * G], [K][T * G] */
    char *workspace;
    size_t workspace_bytes; /* a thread */
};
void bench_lookup_carve(struct bench_lookup *lookup, struct sqz_arena *arena, const struct sqz_layer *layer,
                        size_t n_queries, size_t block_tokens, int n_threads);
/* Queries, norms and the exact mass of the rows outside the clusters. */
void bench_lookup_fill(struct bench_lookup *lookup, const struct sqz_attend_call *call);
/* What lookups read and retain, all of a call together. */
struct bench_lookup_counts {
    size_t centroids, code_bytes, codes, rows_retained;
};
/* retain_rows as for sqz_lookup(). */
struct bench_lookup_counts bench_lookup_run(struct bench_lookup *lookup, const struct sqz_attend_call *call,
                                            size_t retain_rows);

/* A bare read of the keys and values that one query retains: every line is loaded and summed, nothing else. What memory
 * allows a kernel that reads these pieces, which is less than it allows one long read. */
struct bench_read {
    const struct sqz_layer *layer;
    struct sqz_range *ranges;  /* [K][max_ranges]: clusters, or with codes single keys */
    size_t *n_ranges;          /* [K] */
    size_t max_ranges, n_rows; /* rows: of all heads together */
    int n_threads;
};
void bench_read_carve(struct bench_read *read, struct sqz_arena *arena, const struct sqz_layer *layer);
/* The ranges of a call of one token. */
void bench_read_fill(struct bench_read *read, const struct bench_lookup *lookup, const struct sqz_attend_call *call);
void bench_read_run(const struct bench_read *read);

/* Partial sums of every KV head, to be merged into the first of them. */
struct bench_merge {
    struct sqz_softmax *states; /* [n_heads][n_parts] */
    size_t n_heads, n_parts;
    int n_threads;
};
void bench_merge_carve(struct bench_merge *merge, struct sqz_arena *arena, const struct sqz_layer *layer,
                       size_t n_queries, size_t n_parts);
void bench_merge_fill(struct bench_merge *merge); /* sums as attention leaves them: maxima some nats apart */
void bench_merge_run(struct bench_merge *merge);
struct check_result bench_merge_check(struct bench_merge *merge); /* fills, runs and compares */

/* ---- Measurements --------------------------------------------------------------------- */

enum bench_op { OP_DENSE, OP_CAUSAL, OP_GGML, OP_LOOKUP, OP_READ, OP_SPARSE, OP_MERGE, OP_SQUEEZED, N_OPS };
extern const char *const bench_op_names[N_OPS];

/* Times of one operation, in seconds, and the read bandwidth measured beside each. */
struct bench_times {
    double seconds[BENCH_REPEATS], bandwidth[BENCH_REPEATS];
    size_t n;
};

/* A line of the result. */
struct bench_row {
    enum bench_op op;
    size_t shape; /* which of the command's shapes */
    size_t n_tokens, n_queries;
    struct bench_format format;
    struct bench_times times; /* n == 0: skipped, see `skipped` */
    double bytes, flops;      /* read and computed by one run, as the man page counts them */
    double budget_read;       /* share of the context's KV bytes that was read; 0: no matter */
    bool verified;            /* held against double precision, itself or as a part of what was */
    double error;             /* of the check */
    char skipped[96];         /* why */
};

struct bench_rows {
    struct bench_row *rows; /* malloc'ed */
    size_t n, capacity;
};

struct bench_case_options {
    const struct bench_layer *layer;
    size_t shape;
    const char *shape_name;
    size_t n_queries, block_tokens, n_repeats;
    double budget, seconds; /* of one run of one operation, and of all rounds, at most */
    bool n_levels[BENCH_LEVELS + 1], centroids[2], keys[2]; /* which formats are measured */
    bool ggml, cold;
    int n_threads;
    const struct memory_probe *probe;
    bool quiet;
};

/* Measures all operations of a case and adds its rows; rows that are there already, of shorter contexts, tell what is
 * too slow to be run. Dies when a result is wrong. False when a signal was caught. */
bool bench_case_run(const struct bench_case_options *options, struct bench_rows *rows);

/* Adds the rows of a case that is not run. */
void bench_case_skip(const struct bench_case_options *options, struct bench_rows *rows, const char *why);

/* Bytes that it takes beside the layer, of which the outline is enough. */
size_t bench_case_bytes(const struct bench_case_options *options);

/* ---- Results -------------------------------------------------------------------------- */

struct bench_shape {
    char name[64]; /* "llama-3-8b" */
    struct sqz_layer_shape shape;
    uint32_t n_head_kv; /* of the whole layer; shape may hold fewer of them */
};

struct bench_report {
    const struct bench_shape *shapes;
    size_t n_shapes;
    const struct bench_rows *rows;
    struct peak peaks[8];
    size_t n_peaks;
    double bandwidth, bandwidth_low; /* of all probes: the best, the tenth part of the way up from the worst */
    double budget, centroid_share;
    size_t code_words, block_tokens;
    bool cold, huge_pages;
    int n_threads;
};

/* A quantile of the times: 0 the fastest, 0.5 the median, 1 the slowest. */
double bench_quantile(const struct bench_times *times, double share);

/* What the row reaches of its limit: for one query the read bandwidth measured beside it, for many the FMA peak. */
double bench_limit_share(const struct bench_report *report, const struct bench_row *row);

int bench_print_table(const struct bench_report *report);
int bench_print_json(const struct bench_report *report);
int bench_plot(const struct bench_report *report, const char *path); /* exit code */

/* ---- Rows in planes beside F16: bench_kernels_rows.c ---------------------------------------- */

enum { SQZ_ROWS_BENCH_TOKENS = 8 }; /* most of a call */

struct bench_rows_options {
    const struct bench_layer *layer;
    enum sqz_index centroids;
    double budget;
    size_t n_repeats;
    bool cold;
    const struct memory_probe *probe;
};

/* Bytes that it takes beside the layer. */
size_t bench_rows_bytes(const struct bench_layer *layer);
/* Measures one context length and appends its rows. Dies when a result is wrong. False when a signal was caught. */
bool bench_rows_run(const struct bench_rows_options *options, json_t *rows);
void bench_rows_print(const json_t *rows);
/* The same of a sequence's own rows going into planes: bench_own_rows.c. Of contexts too short for two blocks nothing. */
bool bench_own_rows_run(const struct bench_rows_options *options, json_t *rows);

/* The command; argv[0] is its name. Returns the exit code. */
int bench_kernels(int argc, char **argv);

#endif
