/*
 * What every room reads of struct sqz_layer (squeeze_attention.h) beside its
 * fields. lib/ builds one in memory, store/ points one at a mapped file; the
 * kernels do not care which.
 */
#ifndef SQZ_LIB_LAYER_H
#define SQZ_LIB_LAYER_H

#include "rows.h"

/* The rows that a query which chose alone reads of a head's retained keys. */
static inline const struct sqz_rows *sqz_retained_keys(const struct sqz_layer *layer)
{
    return layer->retained_keys.type ? &layer->retained_keys : &layer->keys;
}

/* The mean key, [K][D], that all I8 rows of a layer are relative to, and whether there are any (else it is NULL). Setting
 * it gives it to each of them. */
bool sqz_layer_has_mean(const struct sqz_layer *layer);
const float *sqz_layer_mean(const struct sqz_layer *layer);
void sqz_layer_set_mean(struct sqz_layer *layer, const float *mean);

/* Gives rows in planes what they share with other arrays of the layer: keys the centroids of level 0, value centroids the
 * values' mean. Called again whenever one of these arrays is somewhere else. */
void sqz_layer_join_planes(struct sqz_layer *layer);

/* Bytes of a row of keys and of values, of all that are always retained, and the share of F16 rows' that all are. */
static inline size_t sqz_row_pair_bytes(const struct sqz_layer *layer)
{
    const size_t d = layer->shape.head_dim;
    return sqz_row_bytes(layer->keys.type, d) + sqz_row_bytes(layer->values.type, d);
}
static inline size_t sqz_fixed_bytes(const struct sqz_layer *layer)
{
    const size_t d = layer->shape.head_dim;
    return sqz_rows_bytes(&layer->keys, 0, layer->n_fixed, d) + sqz_rows_bytes(&layer->values, 0, layer->n_fixed, d);
}
static inline float sqz_dense_share(const struct sqz_layer *layer)
{
    const size_t pairs = layer->n_rows - layer->n_fixed, f16 = 2 * sqz_row_bytes(SQZ_ROW_F16, layer->shape.head_dim);
    const double bytes = (double)sqz_fixed_bytes(layer) + (double)pairs * (double)sqz_row_pair_bytes(layer);
    return layer->n_rows ? (float)(bytes / ((double)layer->n_rows * (double)f16)) : 1.0f;
}

/* Makes keys, values and value centroids of a clustered layer, whose counts are known, of a format in planes; of value
 * centroids all 8 bits, for they are few. */
void sqz_layer_plan_planes(struct sqz_layer *layer, enum sqz_row_format format);

/* ARGUMENT for a layer whose arrays the CPU cannot read: in another space, or with rows of a type that it does not know. */
enum sqz_status sqz_layer_check_host(const struct sqz_layer *layer, struct sqz_error *error);

/* One KV head as a layer of its own; points into the layer's arrays. */
struct sqz_layer sqz_layer_head(const struct sqz_layer *layer, uint32_t head_kv);

/* Keys of a cluster of any level; *first, when asked for, becomes its first row. A cluster is one range of the level
 * below, so its two ends lead down to its rows. */
static inline uint32_t sqz_cluster_keys(const struct sqz_layer *layer, uint32_t head_kv, uint32_t level,
                                        uint32_t cluster, uint32_t *first)
{
    uint32_t begin = cluster, end = cluster + 1;
    for (uint32_t l = level + 1; l-- > 0;) {
        const uint32_t *offset = layer->level[l].offset + (size_t)head_kv * (layer->level[l].n_clusters + 1);
        begin = offset[begin];
        end = offset[end];
    }
    if (first) *first = layer->n_fixed + begin;
    return end - begin;
}

#endif
