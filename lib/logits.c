/* Logits of queries with centroids; rows.h has what depends on their type. */
#include "logits.h"

static struct sqz_rows centroids_of(const struct sqz_layer *layer, uint32_t level, uint32_t head_kv)
{
    const struct sqz_level *l = &layer->level[level];
    return sqz_rows_of_head(&l->centroids, l->n_clusters, layer->shape.head_dim, head_kv);
}

void sqz_centroid_queries_set(const struct sqz_row_queries *queries, const struct sqz_layer *layer, uint32_t head_kv)
{
    const struct sqz_rows rows = centroids_of(layer, 0, head_kv);
    sqz_row_queries_set(queries, &rows, layer->shape.head_dim);
}

void sqz_centroid_logits(float *logits, size_t stride, const struct sqz_layer *layer, uint32_t level, uint32_t head_kv,
                         const struct sqz_row_queries *queries, size_t first, size_t n, float *scratch)
{
    const struct sqz_rows rows = centroids_of(layer, level, head_kv);
    sqz_rows_logits(logits, stride, queries, &rows, first, n, layer->shape.head_dim, scratch);
}
