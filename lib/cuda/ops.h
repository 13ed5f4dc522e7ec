/*
 * lib/cuda/ from within: the operations that sqz_cuda_attend() is made of, each
 * one .cu file with one launcher. squeeze_cuda.h has the rules that hold for all
 * of them (device pointers, caller's stream and workspace, no synchronisation).
 * Launchers trust their arguments: squeeze_cuda.h's calls have checked them.
 *
 * "rows" below: few query rows (one token), which read every key once and are
 * bound by memory; "block": many query rows that share a selection, matrix
 * products.
 *
 * A selection is, for every (sequence, KV head), a list of groups of 8 rows in
 * ascending order and a count; group g is rows 8g to 8g + 7 of the head, of which
 * those at n_rows or above do not exist.
 */
#ifndef SQZ_LIB_CUDA_OPS_H
#define SQZ_LIB_CUDA_OPS_H

#include "squeeze_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { SQZ_GROUP_ROWS = 8 };

/* What a kernel is told of a level: its arguments have 4,096 bytes, for up to 16 contexts. On the device rows are of types
 * that have nothing else. */
struct sqz_cuda_rows {
    enum sqz_row_type type;
    const void *data;
    const float *scale, *mean;
};
struct sqz_cuda_level {
    uint32_t n_clusters;
    struct sqz_cuda_rows centroids, value_centroids;
    const uint32_t *offset;
    const float *variance;
};
static inline struct sqz_cuda_rows sqz_cuda_rows_of(const struct sqz_rows *r)
{
    const struct sqz_cuda_rows rows = {r->type, r->data, r->scale, r->mean};
    return rows;
}
static inline struct sqz_cuda_level sqz_cuda_level_of(const struct sqz_level *l)
{
    const struct sqz_cuda_level level = {l->n_clusters, sqz_cuda_rows_of(&l->centroids),
                                         sqz_cuda_rows_of(&l->value_centroids), l->offset, l->variance};
    return level;
}

/* after_ours, in all launchers: the kernel before on the stream is one of lib/cuda/'s (device.cuh, sqz_launch()). */

/* Maximum and sum of a part of a softmax, base 2. */
struct sqz_cuda_part {
    float maximum, sum;
};

/* The chain of offsets from a level down to rows, of all heads. */
struct sqz_cuda_offsets {
    uint32_t level;                         /* whose clusters are meant */
    const uint32_t *offset[SQZ_MAX_LEVELS]; /* [K][n_clusters + 1] */
    uint32_t n_clusters[SQZ_MAX_LEVELS];
};

/* ---- Attention of a block of tokens (block_attention.cu) -------------------------- */

/* Clusters of one level that stand, among a block's rows, for their keys that are not there (lib/method.h, y'): in the
 * same pass, with what a lookup of the same tokens leaves in its workspace. */
struct sqz_cuda_block_tail {
    const void *centroids;       /* type [K][C][D], of INT8 ones the integers; NULL: there is no tail */
    const void *value_centroids; /* type [K][C][D] */
    uint32_t n_clusters, stride; /* C; a multiple of 128 */
    const float *left;           /* [K][stride] log2 of the keys that a cluster stands for; -INFINITY: none */
    const float *spread;         /* [K][stride] what is times |q|^2 a cluster's v, base 2 */
    const float *factor; /* [K][stride] times a product is x, base 2; NULL: scale; with */
    const float *shift;  /* [K][T G] and this added; or NULL */
    const float *norm;   /* [K][T G] |q|^2 */
    const float *log_total;            /* [T][H] log Z */
    const float *gain, *log_threshold; /* [K] of each token, */
    uint32_t token_stride;             /* so far from one token's to the next's: K, or 0 */
    float skip; /* clusters whose weights are below skip times the threshold for all G rows of a token add nothing */
};

/* Attention of T tokens over the rows of one source (the context, or the user's own rows). Query row (t, h) reads KV
 * head h / G. No row seen: output 0, lse -INFINITY. */
struct sqz_cuda_block_attention {
    enum sqz_row_type type;
    uint32_t n_head, n_head_kv, head_dim;
    float scale;
    uint32_t n_tokens;         /* T */
    const void *queries;       /* type [T][H][D] */
    const void *keys, *values; /* type, head k begins at row k * head_rows */
    size_t head_rows;
    uint32_t n_rows;          /* rows of a head that exist, may be 0 */
    const uint32_t *groups;   /* [K][group_capacity] the selection; NULL: all rows */
    const uint32_t *n_groups; /* [K] */
    uint32_t group_capacity;
    bool causal; /* token t sees rows below n_rows - T + t + 1 (groups is NULL then; n_rows >= T) */
    bool windowed; /* and no row before first_row + t (groups is NULL then) */
    int32_t first_row;
    void *out;   /* [T][H][D], F32 where out_f32, else type; NULL: only lse is wanted */
    bool out_f32;
    float *lse;                  /* [T][H] natural logarithm; or NULL */
    struct sqz_cuda_part *parts; /* [T][H] the same as parts of whoever merges; or NULL */
    struct sqz_cuda_block_tail tail;
    uint32_t *arrived; /* [n_arrived] counters that are set to 0 for who comes next */
    uint32_t n_arrived;
    void *workspace;
    size_t workspace_bytes;
};
bool sqz_cuda_block_attention_supported(const struct sqz_cuda_block_attention *args);
/* Whether there can be a tail: on this device, of heads of this dimension, of groups of 1, 2, 4 or 8. */
bool sqz_cuda_block_attention_has_tail(uint32_t head_dim, uint32_t group);
size_t sqz_cuda_block_attention_workspace_bytes(const struct sqz_cuda_block_attention *args);
enum sqz_status sqz_cuda_block_attention_launch(const struct sqz_cuda_block_attention *args, bool after_ours,
                                                void *stream);

/* ---- Lookup of a block of tokens (block_lookup.cu) ---------------------------------- */

/* Scores of one level's clusters over the T * G query rows of a KV head. For query row r, cluster c of N_c keys:
 *        x = scale q.C      y = x + variance_gain * scale^2 |q|^2 variance / (2 D)
 *         Z = exp(base_lse) + sum over c of N_c exp(y)       score_c = mean (maximum) over r of exp(y) / Z
 * Columns that `active` leaves out are not part of Z and get score -1. */
struct sqz_cuda_block_lookup {
    enum sqz_row_type type;
    uint32_t n_head, n_head_kv, head_dim;
    float scale;
    uint32_t n_tokens;
    const void *queries;             /* type [T][H][D] */
    uint32_t n_clusters;             /* C */
    const void *centroids;           /* type [K][C][D], or NULL and */
    const int8_t *centroids_i8;      /* [K][C][D]: C = key_mean + centroid_scale * centroids_i8 */
    const float *centroid_scale;     /* [K][C] */
    const float *key_mean;           /* [K][D] */
    struct sqz_cuda_offsets offsets; /* lead to N_c, keys of the clusters */
    const float *variance;           /* [K][C] or NULL */
    const float *variance_gain;      /* [K] or NULL */
    const float *base_lse;           /* [T][H] or NULL: nothing outside the clusters, or, with n_base, */
    const struct sqz_cuda_part *base_parts; /* [T][K][n_base][G] */
    uint32_t n_base;
    const float *log_threshold; /* [T][K]: each token's scores are the mean (maximum) over its own G rows, over its
                                   threshold, and score is the largest of all tokens; NULL: one selection, as above */
    const uint32_t *active;          /* [K][ceil(C / 32)] bit c % 32 of word c / 32: cluster c takes part; NULL: all */
    bool group_max;
    float *score;     /* [K][C] out; NULL: only log Z is wanted */
    float *log_total; /* [T][H] out: log Z; or NULL */
    void *workspace;
    size_t workspace_bytes;
};
/* Whether log_threshold can be given: means are over 1, 2, 4 or 8 rows. */
bool sqz_cuda_block_lookup_of_any(uint32_t group, bool group_max);
bool sqz_cuda_block_lookup_supported(const struct sqz_cuda_block_lookup *args);
size_t sqz_cuda_block_lookup_workspace_bytes(const struct sqz_cuda_block_lookup *args);
enum sqz_status sqz_cuda_block_lookup_launch(const struct sqz_cuda_block_lookup *args, bool after_ours, void *stream);
/* What the launch leaves of a tail in its workspace, as long as that is not used again: centroids, n_clusters, stride,
 * spread, factor, shift and norm. The rest is not touched. */
void sqz_cuda_block_tail_set(const struct sqz_cuda_block_lookup *args, struct sqz_cuda_block_tail *tail);

/* ---- Tail of a block of tokens (tail_block.cu) ---------------------------------------- */

/* What pruned clusters of one level would have contributed: attention over their centroids, with the logit
 * min(y', log Z) + log N of lib/method.h; clusters whose weights are below skip * threshold for all query rows of a KV
 * head are left out. */
struct sqz_cuda_tail_block {
    struct sqz_cuda_block_lookup lookup; /* the level; active: what was pruned; log_total: given, of the finest level;
                                            variance_gain, base_lse, score, workspace: not looked at */
    const void *value_centroids;         /* type [K][C][D] */
    const float *tail_gain, *log_threshold; /* [K] */
    float skip;
    struct sqz_cuda_read *read; /* [K] value_centroids added to; or NULL */
    float *out; /* F32 [T][H][D] normalised */
    float *lse; /* [T][H] natural logarithm, -INFINITY where nothing counts */
    void *workspace;
    size_t workspace_bytes;
};
size_t sqz_cuda_tail_block_workspace_bytes(const struct sqz_cuda_tail_block *args);
enum sqz_status sqz_cuda_tail_block_launch(const struct sqz_cuda_tail_block *args, bool after_ours, void *stream);

/* ---- Few query rows: one token of B sequences ----------------------------------------- */

enum {
    SQZ_ROWS_MAX_GROUP = 64,     /* G; more query heads a KV head go through the block operations */
    SQZ_ROWS_MAX_PAIRS = 8192,   /* B * K: their prefix sums stay in 32 KiB of shared memory */
    SQZ_ROWS_MAX_ROWS = 1 << 23, /* N: one bit a group in 128 KiB of shared memory, on devices without clusters */
    SQZ_ROWS_MAX_SPLITS = 64,    /* parts of a level's clusters */
    SQZ_ROWS_USER_ROWS = 1024,   /* user rows whose mass one thread block adds up */
    SQZ_ROWS_MAX_BLOCKS = 448,   /* thread blocks that share the retained rows, */
    SQZ_ROWS_PIECES = 4,         /* each in at most so many pieces */
    SQZ_ROWS_TAIL_SPLITS = 8
};

/* Logits of one level's clusters (lookup_rows.cu): y of block lookup, base 2, with the maximum and sum of N_c 2^y. */
struct sqz_cuda_lookup_rows {
    enum sqz_row_type type;
    uint32_t n_head, n_head_kv, head_dim, n_sequences;
    float scale;
    const void *queries; /* type [B][H][D] */
    struct sqz_cuda_level level;
    struct sqz_cuda_offsets offsets;
    const float *key_mean, *variance_gain; /* [K][D], of the level's centroids, [K]; or NULL */
    const uint32_t *groups, *n_groups;     /* [B][K][group_capacity], [B][K]: groups of 8 clusters; NULL: all */
    const uint32_t *active;                /* [B][K][active_words] one bit a cluster, with groups */
    uint32_t group_capacity, active_words;
    const void *keys; /* type [K][N][D], or the fixed ones alone; NULL: no exact mass is wanted, now or ever */
    uint32_t n_rows, n_fixed;
    bool fixed_alone; /* keys are [K][n_fixed][D] */
    const void *user_keys; /* type [B][K][user_capacity_rows][D] */
    uint32_t user_capacity_rows, n_user;
    const uint32_t *user_rows;
    const struct sqz_cuda_user *users; /* [B] in place of the four above; or NULL */
    float *logit;                      /* [B][K][C][G] out; of clusters that take part */
    uint32_t n_splits, n_base;         /* sqz_cuda_lookup_rows_splits(); n_base: 1 + blocks of user rows, or 0 */
    uint32_t n_known;                  /* of n_base the last, which are there */
    struct sqz_cuda_part *parts;       /* [B][K][n_splits][G] out */
    struct sqz_cuda_part *base_parts;  /* [B][K][n_base][G] out: exact mass, with keys */
    uint32_t *clear;                   /* [n_clear] set to 0 on the way, n_clear a multiple of 4; or NULL */
    size_t n_clear;
};
/* Fills what follows from a layer's level: type, shape, level, offsets, key_mean, keys, n_rows, n_fixed; the rest is 0. */
void sqz_cuda_lookup_rows_set(struct sqz_cuda_lookup_rows *args, const struct sqz_layer *layer, uint32_t level);
/* Whether the kernels can read a layer: host arithmetic alone. */
bool sqz_cuda_layer_supported(const struct sqz_layer *layer);
/* Why not, half a sentence about it; NULL: they can. */
const char *sqz_cuda_layer_obstacle(const struct sqz_layer *layer);
uint32_t sqz_cuda_lookup_rows_splits(uint32_t n_head_kv, uint32_t n_clusters, uint32_t n_multiprocessors);
enum sqz_status sqz_cuda_lookup_rows_launch(const struct sqz_cuda_lookup_rows *args, bool after_ours, void *stream);

/* Scores to lists (select.cu), for one level. From logits with parts, or from scores as block lookup gives them. */
struct sqz_cuda_select_list {
    uint32_t n_sequences, n_head_kv, group; /* B, K, G */
    const float *logit;                     /* [B][K][C][G] base 2, or NULL and */
    const float *score;                     /* [B][K][C] */
    const struct sqz_cuda_part *parts, *base_parts;
    uint32_t n_splits, n_base;
    const float *known; /* [B][K][G] log2 of the mass known before this level, in place of
                                                 base_parts; NULL at the coarsest */
    bool group_max;
    struct sqz_cuda_offsets offsets;
    const uint32_t *active; /* [B][K][active_words] or NULL */
    uint32_t active_words;
    const float *log_threshold;  /* [K], or [B][K] and; NULL: 0, of scores relative to it */
    uint32_t plan_stride;        /* K; else 0 */
    const float *limit; /* [B][K] scores from which clusters are retained, in place of log_threshold; or NULL */
    uint32_t n_rows, n_fixed;    /* rows that the offsets lead to, and come after: N and n_fixed at level 0,
                                                 clusters of the level below and 0 above */
    bool rows_bits;              /* above level 0: children are told apart, one bit each */
    uint32_t *groups, *n_groups; /* [B][K][group_capacity], [B][K] out */
    uint32_t group_capacity;
    uint32_t *active_out; /* [B][K][active_out_words] out, with rows_bits */
    uint32_t active_out_words;
    float *known_out;     /* [B][K][G] out with rows_bits, from logits: known plus what was pruned */
    uint32_t *pruned_out; /* [B][K][active_words_of_level] out or NULL: clusters that took part and
                                                 were pruned, one bit each; zeroed by the kernel */
    uint32_t pruned_words;
    float *log_total;     /* [B][K][G] out: natural log Z; from logits; or NULL */
    uint32_t *n_retained; /* [B][K] out: a copy of n_groups; or NULL */
    struct sqz_cuda_read *read; /* [B][K] centroids added to, of the level below, and with left_out value centroids,
                                   all of them; or NULL */
    uint32_t *arrived;    /* [n_arrived] counters that are set to 0 for who comes next */
    uint32_t n_arrived;
    float *left_out; /* [B][K][left_stride] or NULL: at level 0, log2 of a cluster's keys that are in no listed group,
                        -INFINITY: none */
    uint32_t left_stride;
};
enum sqz_status sqz_cuda_select_list_launch(const struct sqz_cuda_select_list *args, bool after_ours, void *stream);

/* Scores from which clusters of the finest level are retained, as many as hold retain_rows rows (row_limit.cu). */
struct sqz_cuda_row_limit {
    uint32_t n_head_kv;
    struct sqz_cuda_offsets offsets;
    const float *score;          /* [K][C]; clusters that take no part have -1 */
    const uint32_t *retain_rows; /* [K] */
    float *limit;                /* [K] out */
};
enum sqz_status sqz_cuda_row_limit_launch(const struct sqz_cuda_row_limit *args, bool after_ours, void *stream);

/* What pruned clusters of one level would have contributed (tail_rows.cu): partial results relative to log Z. */
struct sqz_cuda_tail_rows {
    enum sqz_row_type type;
    uint32_t n_head, n_head_kv, head_dim, n_sequences;
    float scale;
    const void *queries;
    struct sqz_cuda_level level;
    struct sqz_cuda_offsets offsets;
    const float *variance_gain, *tail_gain; /* [K]; tail_gain and log_threshold as plan_stride says */
    uint32_t plan_stride;                   /* from a sequence's numbers to the next one's: K, or 0 */
    const float *logit;                     /* [B][K][C][G] of the level */
    const uint32_t *pruned;                 /* [B][K][pruned_words]; NULL: all */
    uint32_t pruned_words;
    const float *log_total;     /* [B][K][G] natural, of the finest level */
    const float *log_threshold; /* [K] */
    float skip;                 /* times the threshold: weights below add nothing */
    const uint32_t *opened; /* [B][K][words of C] sqz_opened_bit(): clusters whose logits are in truth what their unread
                                                 keys weigh, as a share of the total; NULL: none */
    const uint32_t *marks;  /* [B][K][mark_words] groups that are read: those rows of a cluster do not
                                                 count; NULL: all do */
    uint32_t mark_words, n_fixed; /* with marks */
    bool united;                  /* marks may lie inside of clusters, not at their ends alone */
    struct sqz_cuda_read *read;   /* [B][K] value_centroids added to; or NULL */
    uint32_t n_parts, first_part; /* this launch fills parts [first_part, + SQZ_ROWS_TAIL_SPLITS) */
    struct sqz_cuda_part *parts;  /* [B][K][n_parts][G] out */
    float *out;                   /* [B][K][n_parts][G][D] out, not normalised */
};
enum sqz_status sqz_cuda_tail_rows_launch(const struct sqz_cuda_tail_rows *args, bool after_ours, void *stream);

/* The tokens' queries, keys and values where llama.cpp has them, one token a sequence; strides in elements. */
struct sqz_cuda_fresh {
    const float *queries; /* NULL: nothing is fresh */
    size_t query_token_stride, query_head_stride;
    const void *keys, *values; /* they become row n_rows - 1 of their users */
    size_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;
};

enum {
    SQZ_CHOOSE_MAX_RANKS = 16, /* thread blocks of a pair */
    SQZ_CHOOSE_MAX_DIM = 128
};

/* From queries to lists in one launch (choose_rows.cu), with the tail's partial results: one level, F16, sm_90. */
struct sqz_cuda_choose_rows {
    enum sqz_row_type type;
    uint32_t n_head, n_head_kv, head_dim, n_sequences;
    float scale;
    struct sqz_cuda_fresh fresh;
    void *queries; /* F16 [B][H][D]; written where fresh */
    struct sqz_cuda_level level;
    struct sqz_codes codes;
    const void *keys; /* F16 [K][N][D], with fixed_alone [K][n_fixed][D] */
    uint32_t n_rows, n_fixed;
    bool fixed_alone;
    const void *user_keys; /* F16 [B][K][user_capacity_rows][D] */
    uint32_t user_capacity_rows, n_user;
    const uint32_t *user_rows;
    const struct sqz_cuda_user *users;                         /* [B] in place of the four above, with fresh; or NULL */
    bool exact, group_max;                                     /* exact: fixed and own rows are in the denominators */
    const float *variance_gain, *log_threshold, *tail_gain;    /* [K] or NULL, [K], [K] or NULL; the last two as */
    uint32_t plan_stride;                                      /* tells: from a sequence's to the next's, K or 0 */
    float tail_skip;
    uint32_t *groups, *n_groups; /* [B][K][group_capacity], [B][K] out */
    uint32_t group_capacity;
    uint32_t *n_retained;             /* [B][K] out or NULL */
    struct sqz_cuda_read *read;       /* [B][K] added to; or NULL */
    float *log_total;                 /* [B][K][G] out, natural; or NULL */
    struct sqz_cuda_part *tail_parts; /* [B][K][n_tail][G] out, the first `ranks` of each, with tail_gain; or NULL */
    float *tail_out;                  /* [B][K][n_tail][G][D] out, of parts that are not empty */
    uint32_t n_tail;
    const struct sqz_cuda_part *known; /* [B][K][n_tail][G] the last of each has own rows that are not among these; or NULL */
    uint32_t *arrived;                /* [n_arrived] counters that are set to 0 for who comes next */
    uint32_t n_arrived;
    const struct sqz_cuda_ranks *elsewhere; /* host, with mailboxes: denominators are those of all ranks, in the same
                                               launch; NULL, or one context */
};
/* Thread blocks of a pair; 0: not for this call, or not on this device. */
uint32_t sqz_cuda_choose_rows_ranks(const struct sqz_cuda_choose_rows *args);
enum sqz_status sqz_cuda_choose_rows_launch(const struct sqz_cuda_choose_rows *args, uint32_t ranks, bool after_ours,
                                            void *stream);

/* ---- Few query rows of a layer with codes ---------------------------------------------- */

enum {
    SQZ_CODE_TABLE = 8 * 16,     /* numbers of a query and word */
    SQZ_CODES_MAX_GROUP = 16,    /* G; larger groups choose whole clusters, as lib/lookup.c does */
    SQZ_CODES_MAX_SPLITS = 128,  /* parts of the clusters of level 0 */
    SQZ_CODES_COARSE_SPLITS = 16 /* and of every coarser level */
};

/* What a query row knows of clusters before their keys, base 2. */
struct sqz_cuda_reach {
    float deviation; /* standard deviation of a logit in a cluster of variance 1 */
    float gain;      /* times a cluster's variance: the correction that is in y */
};

/* Tables and reach of all query rows (code_tables.cu). after_ours: behind a lookup that was launched without. */
struct sqz_cuda_code_tables {
    enum sqz_row_type type;
    uint32_t n_head, n_head_kv, head_dim, n_sequences;
    float scale;
    const void *queries; /* type [B][H][D] */
    struct sqz_codes codes;
    const float *variance_gain;   /* [K] or NULL */
    float *tables;                /* [B][K][W][G][8][16] out, base 2 */
    struct sqz_cuda_reach *reach; /* [B][K][G] out */
};
enum sqz_status sqz_cuda_code_tables_launch(const struct sqz_cuda_code_tables *args, bool after_ours, void *stream);

/* From the logits of a level's clusters to single keys (lookup_codes.cu), in the order of the launchers. */
struct sqz_cuda_lookup_codes {
    uint32_t n_head_kv, n_sequences, group;
    struct sqz_codes codes;
    uint32_t n_rows, n_fixed;
    struct sqz_cuda_offsets offsets;
    const float *variance;  /* [K][C] of the level, or NULL */
    const uint32_t *active; /* [B][K][words of C] clusters that take part; NULL: all */
    float *logit;           /* [B][K][C][G] y */
    const struct sqz_cuda_reach *reach;
    const float *tables;
    const float *log_threshold;             /* [K], or [B][K] and */
    uint32_t plan_stride;                   /* K; else 0 */
    bool group_max, open_all;               /* open_all: no threshold, every key is estimated */
    const struct sqz_cuda_part *parts;      /* [B][K][n_parts][G] of the level's clusters */
    const struct sqz_cuda_part *base_parts; /* [B][K][n_base][G] */
    struct sqz_cuda_part *closed_parts;     /* [B][K][closed_stride][G], n_closed of them of coarser levels; a coarse
                                                 level adds n_splits, behind those */
    uint32_t n_parts, n_base, n_closed, closed_stride;
    uint32_t n_splits;               /* sqz_cuda_lookup_codes_splits() */
    struct sqz_cuda_part *key_parts; /* [B][K][n_splits][G] level 0: of keys and closed clusters */
    uint32_t *opened;                /* [B][K][words of C] level 0, sqz_opened_bit() */
    struct sqz_cuda_read *read;      /* [B][K] codes added to, by open_clusters; or NULL */
    float *level_total;              /* [B][K][G] level 0, with peaks: log2 of the clusters' denominator */
    uint32_t *peaks;                 /* [B][K][G][peak_stride] zeros: largest estimate of a group of 8 rows,
                                                 among those that may reach the threshold; NULL: estimates are made
                                                 twice, which the mean over a group of heads needs */
    uint32_t peak_stride;
    float *score;    /* [B][K][C] coarse levels: INFINITY where opened, else -1 */
    uint32_t *marks; /* [B][K][mark_words] one bit a group of 8 rows: those to be read */
    uint32_t mark_words;
    float *log_total;       /* [B][K][G] natural; or NULL */
    const float *tail_gain; /* as log_threshold, for left */
};
uint32_t sqz_cuda_lookup_codes_splits(uint32_t n_pairs, uint32_t level, uint32_t n_clusters,
                                      uint32_t n_multiprocessors);
/* Opens clusters; at level 0 also the denominator from the estimates of their keys, and marks of fixed rows alone. */
enum sqz_status sqz_cuda_open_clusters_launch(const struct sqz_cuda_lookup_codes *args, bool after_ours, void *stream);
/* Level 0: marks the groups of keys whose estimates reach the threshold. */
enum sqz_status sqz_cuda_mark_keys_launch(const struct sqz_cuda_lookup_codes *args, bool after_ours, void *stream);
/* Level 0, with the marks complete: in place of an opened cluster's logits what its keys outside of them weigh. */
enum sqz_status sqz_cuda_weigh_left_launch(const struct sqz_cuda_lookup_codes *args, bool after_ours, void *stream);

/* Of calibration (key_points.cu), behind open_clusters with open_all: for every group of 8 rows one more than the last
 * point of a grid of log thresholds (point i: first + i * step) at which one of its keys is retained; 0: at none. */
struct sqz_cuda_key_points {
    struct sqz_cuda_lookup_codes lookup; /* of level 0; threshold, marks, opened are not looked at */
    float first, step;
    uint32_t n_points;
    uint32_t *group_point; /* [B][K][groups of N] zeros; out */
};
enum sqz_status sqz_cuda_key_points_launch(const struct sqz_cuda_key_points *args, bool after_ours, void *stream);

/* Marks to lists (list_marks.cu). */
struct sqz_cuda_list_marks {
    uint32_t n_pairs, n_groups_of_head, mark_words;
    uint32_t n_splits;           /* set by the launcher */
    const uint32_t *marks;       /* [pairs][mark_words] */
    uint32_t *groups, *n_groups; /* [pairs][group_capacity], [pairs] out */
    uint32_t group_capacity;
    uint32_t *n_retained; /* [pairs] out or NULL */
    uint32_t *arrived;    /* [n_arrived] counters that are set to 0 for who comes next */
    uint32_t n_arrived;
};
enum sqz_status sqz_cuda_list_marks_launch(const struct sqz_cuda_list_marks *args, bool after_ours, void *stream);

/* What any sequence of a head selected (unite.cu). */
struct sqz_cuda_unite {
    uint32_t n_sequences, n_head_kv, n_groups_of_head, mark_words;
    const uint32_t *marks;             /* [B][K][mark_words], or NULL and */
    const uint32_t *groups, *n_groups; /* [B][K][group_capacity], [B][K] */
    uint32_t group_capacity;
    uint32_t *united; /* [n_copies][K][mark_words] out */
    uint32_t n_copies;
};
enum sqz_status sqz_cuda_unite_launch(const struct sqz_cuda_unite *args, bool after_ours, void *stream);

/* Normalised results of query rows [B][K][G] become part `part` of n_parts that come along to attend_rows (unite.cu). */
struct sqz_cuda_join {
    uint32_t n_pairs, group, head_dim, n_parts, part;
    const float *out, *lse;      /* [B][K][G][D], natural [B][K][G] */
    struct sqz_cuda_part *parts; /* [B][K][n_parts][G] out */
    float *part_out;             /* [B][K][n_parts][G][D] out */
};
enum sqz_status sqz_cuda_join_launch(const struct sqz_cuda_join *args, bool after_ours, void *stream);

/* Exact attention of one token (attend_rows.cu) on a selection, or on all rows, and on the user's rows. */
struct sqz_cuda_attend_rows {
    enum sqz_row_type type;
    uint32_t n_head, n_head_kv, head_dim, n_sequences;
    float scale;
    const void *queries, *keys, *values;
    uint32_t n_rows;
    const uint32_t *groups, *n_groups; /* [B][K][group_capacity], [B][K]; NULL: all rows */
    uint32_t group_capacity;           /* even */
    const void *user_keys, *user_values;
    uint32_t user_capacity_rows, n_user;
    const uint32_t *user_rows;
    const struct sqz_cuda_user *users;      /* [B] in place of the five above; or NULL */
    uint32_t n_tail;                        /* partial results that come along: 0 or more */
    const struct sqz_cuda_part *tail_parts; /* [B][K][n_tail][G] */
    const float *tail_out;                  /* [B][K][n_tail][G][D]; not looked at where a part is empty */
    uint32_t n_blocks;                      /* sqz_cuda_attend_rows_blocks() */
    struct sqz_cuda_part *parts;            /* [SQZ_ROWS_PIECES * n_blocks + B * K][G] scratch */
    float *part_out;                        /* [SQZ_ROWS_PIECES * n_blocks + B * K][G][D] scratch */
    uint32_t *arrived;                      /* [B * K + 1][ceil(G / 8)] zeros */
    void *out;                              /* type [B][H][D], or */
    float *out_f32;                         /* [B][H][D] in its place */
    float *lse;                             /* [B][H] or NULL */
    const struct sqz_cuda_ranks *led;       /* host, of which the first leads: there results are those of all ranks, the
                                               others tell them alone. Then the call is ended; or NULL */
};
uint32_t sqz_cuda_attend_rows_blocks(uint32_t n_multiprocessors);
enum sqz_status sqz_cuda_attend_rows_launch(const struct sqz_cuda_attend_rows *args, bool after_ours, void *stream);

/* Parts that each of n thread blocks' work is cut into: the fewest whose last wave fills nine tenths of the places on
 * the device, else the best of up to `most`. */
static inline uint32_t sqz_cuda_splits_for(uint64_t n_blocks, uint64_t n_places, uint64_t most)
{
    uint32_t best = 1;
    double best_share = 0;
    for (uint32_t s = 1; s == 1 || s <= most; s++) {
        const uint64_t all = n_blocks * s, waves = (all + n_places - 1) / n_places;
        const double share = (double)all / (double)(waves * n_places);
        if (share > best_share + 0.02) {
            best_share = share;
            best = s;
        }
        if (share >= 0.9) break;
    }
    return best;
}

/* ---- Small steps (merge.cu) ------------------------------------------------------------ */

/* out = log(exp(a) + exp(b)) of n numbers; either may be NULL: -INFINITY. out may be a or b. */
enum sqz_status sqz_cuda_log_add_launch(const float *a, const float *b, float *out, uint32_t n, bool after_ours,
                                        void *stream);
/* sqz_cuda_merge(). */
enum sqz_status sqz_cuda_merge_launch(const struct sqz_cuda_merge_args *args, bool after_ours, void *stream);
/* Zeroes device memory on the stream. */
enum sqz_status sqz_cuda_clear_launch(void *memory, size_t n_bytes, void *stream);
/* Multiprocessors of the current device; 0: none that these kernels run on. */
int sqz_cuda_multiprocessors(void);

#ifdef __cplusplus
}
#endif

#endif
