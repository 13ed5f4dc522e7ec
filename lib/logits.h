/*
 * Logits of queries with rows in the number formats that layers have.
 */
#ifndef SQZ_LIB_LOGITS_H
#define SQZ_LIB_LOGITS_H

#include "layer.h"

/* Logits of any number of query rows with F16 rows: logits[q * stride + r]. tile: scratch of
 * sqz_logits_scratch_floats(D) floats. */
size_t sqz_logits_scratch_floats(size_t head_dim);
void sqz_logits(float *logits, size_t stride, const float *queries, size_t n_query_rows, const uint16_t *rows,
                size_t n_rows, size_t head_dim, float scale, float *scratch);

/* Queries in the form in which INT8 rows take them: INT16 rows, D rounded up to a multiple of 32 apart, what a row is to
 * be multiplied by, and its logit with the mean that INT8 rows are relative to. [n_query_rows] */
struct sqz_i16_queries {
    int16_t *rows;
    float *factor, *mean_logit;
};
static inline size_t sqz_i16_stride(size_t head_dim)
{
    return (head_dim + 31) / 32 * 32;
}
/* key_mean: [D] */
void sqz_i16_queries_set(const struct sqz_i16_queries *out, const float *queries, size_t n_query_rows,
                         size_t head_dim, float scale, const float *key_mean);

/* row_logits_i8() with the mean's part added. */
void sqz_logits_i8(float *logits, size_t stride, const struct sqz_i16_queries *queries, size_t first_query,
                   size_t n_queries, const int8_t *rows, const float *row_factor, size_t n_rows, size_t head_dim);

/* listed_logits_i8() with the mean's part added. */
void sqz_listed_logits_i8(float *logits, size_t stride, const struct sqz_i16_queries *queries, size_t n_queries,
                          const int8_t *rows, const float *row_factor, const uint32_t *index, size_t n_rows,
                          size_t n_listed, size_t head_dim);

/* Logits of query rows with centroids [first, first + n) of a level, whatever their format. quantised: of the same
 * queries; not looked at with an F16 index. */
void sqz_centroid_logits(float *logits, size_t stride, const struct sqz_layer *layer, uint32_t level, uint32_t head_kv,
                         const float *queries, const struct sqz_i16_queries *quantised, size_t n_query_rows,
                         size_t first, size_t n, float *scratch);

#endif
