/*
 * Lookup: queries against centroids, from the coarsest level down, giving the
 * ranges of rows that deserve exact attention and the pruned clusters whose
 * contribution is estimated (the tail).
 *
 * method.h has the formulas: logits, scores, what is retained, the tail.
 *
 * A layer with codes goes on to single keys (lookup_keys.c): clusters that may
 * hold one above the threshold are opened, every key of theirs gets an estimate
 * of its own and is retained or left to the tail by itself.
 */
#ifndef SQZ_LIB_LOOKUP_H
#define SQZ_LIB_LOOKUP_H

#include "layer.h"
#include "logits.h"
#include "method.h"
#include "plan.h"

struct sqz_range {
    uint32_t begin, end;
};

/* Result of a lookup of n_rows query rows in one KV head; arrays are the workspace's. */
struct sqz_selection {
    struct sqz_range *ranges; /* rows of the layer (n_fixed included in the numbers), ascending, disjoint */
    size_t n_ranges, n_retained;
    uint32_t *pruned_level, *pruned_cluster; /* [n_pruned] the coarsest level first, clusters ascending; of
                                                 level 0 the closed ones, then the opened ones, ascending each */
    size_t n_pruned;
    float *pruned_logit; /* [n_query_rows][pruned_stride] y'; the mass is pruned_keys * exp(pruned_logit) */
    size_t pruned_stride;
    float *pruned_keys;    /* [n_query_rows][pruned_stride] N; of an opened cluster 1, where y' is the logarithm of
                                 what its pruned keys weigh together, -INFINITY where that is nothing */
    float *pruned_largest; /* [n_pruned] free for whoever adds the tail */
    float *log_total;      /* [n_query_rows] log Z after the lookup */
    float *centroid_logit; /* [n_query_rows][pruned_stride] logits with all centroids of level 0, where it is the only
                              level; else NULL */
    size_t n_centroids_read;
    size_t n_codes_read;    /* keys whose codes were read */
    size_t code_bytes_read; /* of them and of what the head's codes need once */
};

size_t sqz_lookup_workspace_bytes(const struct sqz_layer *layer, size_t max_query_rows);

/* queries: F32 [n_query_rows][D]; squared_norms [n_query_rows]; base_lse: log of the exact mass of rows outside the
 * clusters for each query row; NULL: none, as published. retain_rows: 0 to apply the plan's threshold, else the
 * threshold is lowered or raised so that about that many rows are retained. workspace: at least _workspace_bytes();
 * the selection points into it. */
void sqz_lookup(struct sqz_selection *selection, const struct sqz_layer *layer, uint32_t head_kv,
                const struct sqz_head_plan *plan, const float *queries, const float *squared_norms, size_t n_query_rows,
                const float *base_lse, size_t retain_rows, void *workspace);

/* Bytes of one centroid with the numbers that lookup reads beside it (offset, variance, an INT8 index's scale). */
static inline size_t sqz_centroid_bytes(const struct sqz_layer *layer)
{
    const size_t beside = sizeof(uint32_t) + sizeof(float);
    return sqz_row_bytes(layer->level[0].centroids.type, layer->shape.head_dim) + beside;
}

/* Bytes that shares are of: a head's keys and values as F16, whatever they are kept as, so that a budget means the same
 * of every context. */
static inline size_t sqz_whole_bytes(const struct sqz_layer *layer)
{
    return 2 * (size_t)layer->n_rows * sqz_row_bytes(SQZ_ROW_F16, layer->shape.head_dim);
}

/* Bytes of a retained key. */
static inline size_t sqz_key_bytes(const struct sqz_layer *layer)
{
    return sqz_row_bytes(sqz_retained_keys(layer)->type, layer->shape.head_dim);
}

/* What a block of tokens that share a selection retains of the clusters' rows (retain_rows), to come to the budget's
 * share of the bytes, whatever single tokens' thresholds have been moved to: value centroids may all be read. */
size_t sqz_block_rows(const struct sqz_layer *layer, uint32_t head_kv, float budget);

/* The log of a sum from the logs of its parts. */
float sqz_log_add(float a, float b);

#endif
