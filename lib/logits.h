/*
 * Logits of queries with the centroids of a layer, whatever these are kept as.
 */
#ifndef SQZ_LIB_LOGITS_H
#define SQZ_LIB_LOGITS_H

#include "layer.h"

/* Makes the form of the queries that a head's centroids want. */
void sqz_centroid_queries_set(const struct sqz_row_queries *queries, const struct sqz_layer *layer, uint32_t head_kv);

/* Logits of query rows with centroids [first, first + n) of a level; scratch as for sqz_rows_logits(). */
void sqz_centroid_logits(float *logits, size_t stride, const struct sqz_layer *layer, uint32_t level, uint32_t head_kv,
                         const struct sqz_row_queries *queries, size_t first, size_t n, float *scratch);

#endif
