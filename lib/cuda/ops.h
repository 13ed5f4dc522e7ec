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

/* ---- Attention of a block of tokens (block_attention.cu) -------------------------- */

/* Attention of T tokens over the rows of one source (the context, or the user's own rows). Query row (t, h) reads KV
 * head h / G. No row seen: output 0, lse -INFINITY. */
struct sqz_cuda_block_attention {
    enum sqz_cuda_type type;
    uint32_t n_head, n_head_kv, head_dim;
    float scale;
    uint32_t n_tokens;         /* T */
    const void *queries;       /* type [T][H][D] */
    const void *keys, *values; /* type, head k begins at row k * head_rows */
    size_t head_rows;
    uint32_t n_rows;           /* rows of a head that exist, may be 0 */
    const uint32_t *groups;    /* [K][group_capacity] the selection; NULL: all rows */
    const uint32_t *n_groups;  /* [K] */
    uint32_t group_capacity;
    bool causal;               /* token t sees rows below n_rows - T + t + 1 (groups is NULL then; n_rows >= T) */
    void *out;                 /* [T][H][D], F32 where out_f32, else type; NULL: only lse is wanted */
    bool out_f32;
    float *lse;                /* [T][H] natural logarithm; or NULL */
    void *workspace;
    size_t workspace_bytes;
};
bool sqz_cuda_block_attention_supported(const struct sqz_cuda_block_attention *args);
size_t sqz_cuda_block_attention_workspace_bytes(const struct sqz_cuda_block_attention *args);
enum sqz_status sqz_cuda_block_attention_launch(const struct sqz_cuda_block_attention *args, void *stream);

/* ---- Lookup of a block of tokens (block_lookup.cu) ---------------------------------- */

/* Scores of one level's clusters, averaged over the T * G query rows of a KV head. For query row r, cluster c of N_c
 * keys:   x = scale q.C      y = x + variance_gain * scale^2 |q|^2 variance / (2 D)
 *         Z = exp(base_lse) + sum over c of N_c exp(y)       score_c = mean over r of exp(y) / Z
 * Columns that `active` leaves out are not part of Z and get score -1. */
struct sqz_cuda_block_lookup {
    enum sqz_cuda_type type;
    uint32_t n_head, n_head_kv, head_dim;
    float scale;
    uint32_t n_tokens;
    const void *queries;         /* type [T][H][D] */
    uint32_t n_clusters;         /* C */
    const void *centroids;       /* type [K][C][D], or NULL and */
    const int8_t *centroids_i8;  /* [K][C][D]: C = key_mean + centroid_scale * centroids_i8 */
    const float *centroid_scale; /* [K][C] */
    const float *key_mean;       /* [K][D] */
    const uint32_t *n_keys;      /* [K][C] N_c, keys of the clusters */
    const float *variance;       /* [K][C] or NULL */
    const float *variance_gain;  /* [K] or NULL */
    const float *base_lse;       /* [T][H] or NULL: nothing outside the clusters */
    const uint32_t *active;      /* [K][ceil(C / 32)] bit c % 32 of word c / 32: cluster c takes part; NULL: all */
    float *score;                /* [K][C] out */
    float *log_total;            /* [T][H] out: log Z; or NULL */
    void *workspace;
    size_t workspace_bytes;
};
bool sqz_cuda_block_lookup_supported(const struct sqz_cuda_block_lookup *args);
size_t sqz_cuda_block_lookup_workspace_bytes(const struct sqz_cuda_block_lookup *args);
enum sqz_status sqz_cuda_block_lookup_launch(const struct sqz_cuda_block_lookup *args, void *stream);

#ifdef __cplusplus
}
#endif

#endif
