/*
 * One token over several ranks (squeeze_cuda.h, struct sqz_cuda_ranks): the two
 * exchanges of a call, each in the order of the stream. Totals between lookup and
 * selection, where that is not one launch (choose_rows.cu exchanges them itself), and
 * results behind attention.
 */
#ifndef SQZ_LIB_CUDA_RANKS_H
#define SQZ_LIB_CUDA_RANKS_H

#include "ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Whether a call's ranks are in order; a layer of this dimension, n_rows query rows. */
bool sqz_cuda_ranks_good(const struct sqz_cuda_ranks *ranks, size_t n_rows, size_t head_dim);

/* Denominators of all ranks from the parts of this one. */
struct sqz_cuda_rank_totals {
    const struct sqz_cuda_ranks *ranks; /* host */
    uint32_t n_pairs, group;
    const struct sqz_cuda_part *parts, *base_parts; /* [pairs][n_splits][G], [pairs][n_base][G] */
    uint32_t n_splits, n_base;
    struct sqz_cuda_part *mine, *all; /* [pairs][G], [n_ranks][pairs][G] scratch of a gathering */
    struct sqz_cuda_part *total;      /* [pairs][G] out */
};
enum sqz_status sqz_cuda_rank_totals_launch(const struct sqz_cuda_rank_totals *args, void *stream);

/* Results of all ranks from this one's. */
struct sqz_cuda_rank_merge {
    const struct sqz_cuda_ranks *ranks; /* host */
    uint32_t n_rows, head_dim;
    float *
        mine; /* [n_rows][D] normalised, and behind those [n_rows] log-sum-exps, natural, -INFINITY: nothing was seen */
    float *all; /* [n_ranks] of the same: scratch of a gathering */
    enum sqz_row_type type;
    void *out;      /* type [n_rows][D], or */
    float *out_f32; /* [n_rows][D] in its place */
    float *lse;     /* [n_rows] or NULL */
};
enum sqz_status sqz_cuda_rank_merge_launch(const struct sqz_cuda_rank_merge *args, void *stream);

/* Ends a call of mailboxes that has no results. */
enum sqz_status sqz_cuda_rank_end_launch(const struct sqz_cuda_ranks *ranks, void *stream);

#ifdef __cplusplus
}
#endif

#endif
