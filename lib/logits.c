/*
 * Logits of queries with rows, whatever the rows' number format and however
 * many queries there are. Few go through the rows once, many through matrix
 * products of tiles.
 */
#include "logits.h"

#include <math.h>
#include <string.h>

#include "kernels.h"

enum { TILE = 128 };

size_t sqz_logits_scratch_floats(size_t head_dim)
{
    return TILE * head_dim;
}

void sqz_logits(float *logits, size_t stride, const float *queries, size_t n_query_rows, const uint16_t *rows,
                size_t n_rows, size_t head_dim, float scale, float *scratch)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    if (n_query_rows <= SQZ_MAX_GROUP_QUERIES) {
        k->row_logits(logits, stride, queries, n_query_rows, rows, n_rows, head_dim, scale);
        return;
    }
    /* Whole tiles go through the matrix product; a ragged end has too few columns for its padded width. */
    size_t whole = n_rows / SQZ_GEMM_N * SQZ_GEMM_N;
    for (size_t at = 0; at < whole; at += TILE) {
        size_t n = whole - at < TILE ? whole - at : TILE;
        k->transpose_f16(scratch, n, rows + at * head_dim, n, head_dim);
        k->gemm(logits + at, stride, queries, head_dim, scratch, n, n_query_rows, n, head_dim, scale, false);
    }
    for (size_t q = 0; q < n_query_rows && whole < n_rows; q += SQZ_MAX_GROUP_QUERIES) {
        size_t n = n_query_rows - q < SQZ_MAX_GROUP_QUERIES ? n_query_rows - q : SQZ_MAX_GROUP_QUERIES;
        k->row_logits(logits + q * stride + whole, stride, queries + q * head_dim, n, rows + whole * head_dim,
                      n_rows - whole, head_dim, scale);
    }
}

void sqz_i16_queries_set(const struct sqz_i16_queries *out, const float *queries, size_t n_query_rows,
                         size_t head_dim, float scale, const float *key_mean)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const size_t stride = sqz_i16_stride(head_dim);
    for (size_t r = 0; r < n_query_rows; r++) {
        const float *q = queries + r * head_dim;
        int16_t *row = out->rows + r * stride;
        float largest = 0;
        for (size_t i = 0; i < head_dim; i++) largest = fabsf(q[i]) > largest ? fabsf(q[i]) : largest;
        const float inverse = largest > 0 ? 32767.0f / largest : 0.0f;
        const float whole = 12582912.0f; /* 1.5 * 2^23: adding it rounds to the nearest integer, ties to even */
        /* NaN and infinity, of a file's keys or of a model gone astray, have no integer. They are in the mean's logit. */
        for (size_t i = 0; i < head_dim; i++) {
            const float x = q[i] * inverse;
            row[i] = fabsf(x) < 32767.5f ? (int16_t)(x + whole - whole) : 0;
        }
        memset(row + head_dim, 0, (stride - head_dim) * sizeof *row);
        out->factor[r] = scale * largest / 32767.0f;
        out->mean_logit[r] = scale * k->dot(q, key_mean, head_dim);
    }
}

static void add_mean_logits(float *logits, size_t stride, const float *mean_logit, size_t n_queries, size_t n_rows)
{
    for (size_t q = 0; q < n_queries; q++) {
        for (size_t i = 0; i < n_rows; i++) logits[q * stride + i] += mean_logit[q];
    }
}

void sqz_logits_i8(float *logits, size_t stride, const struct sqz_i16_queries *queries, size_t first_query,
                   size_t n_queries, const int8_t *rows, const float *row_factor, size_t n_rows, size_t head_dim)
{
    sqz_kernels_get()->row_logits_i8(logits, stride, queries->rows + first_query * sqz_i16_stride(head_dim),
                                     queries->factor + first_query, n_queries, rows, row_factor, n_rows, head_dim);
    add_mean_logits(logits, stride, queries->mean_logit + first_query, n_queries, n_rows);
}

void sqz_listed_logits_i8(float *logits, size_t stride, const struct sqz_i16_queries *queries, size_t n_queries,
                          const int8_t *rows, const float *row_factor, const uint32_t *index, size_t n_rows,
                          size_t n_listed, size_t head_dim)
{
    sqz_kernels_get()->listed_logits_i8(logits, stride, queries->rows, queries->factor, n_queries, rows, row_factor,
                                        index, n_rows, n_listed, head_dim);
    add_mean_logits(logits, stride, queries->mean_logit, n_queries, n_rows);
}

void sqz_centroid_logits(float *logits, size_t stride, const struct sqz_layer *layer, uint32_t level, uint32_t head_kv,
                         const float *queries, const struct sqz_i16_queries *quantised, size_t n_query_rows,
                         size_t first, size_t n, float *scratch)
{
    const struct sqz_level *l = &layer->level[level];
    const size_t d = layer->shape.head_dim, at = (size_t)head_kv * l->n_clusters + first;
    if (layer->index == SQZ_INDEX_F16) {
        sqz_logits(logits, stride, queries, n_query_rows, l->centroids + at * d, n, d, layer->shape.scale, scratch);
        return;
    }
    /* Blocks of rows that stay in the first-level cache, where several groups of queries share them. */
    const size_t block = n_query_rows > SQZ_MAX_GROUP_QUERIES ? TILE : n;
    for (size_t c = 0; c < n; c += block) {
        const size_t count = n - c < block ? n - c : block;
        for (size_t r = 0, m; r < n_query_rows; r += m) {
            m = n_query_rows - r < SQZ_MAX_GROUP_QUERIES ? n_query_rows - r : SQZ_MAX_GROUP_QUERIES;
            sqz_logits_i8(logits + r * stride + c, stride, quantised, r, m, l->centroids_i8 + (at + c) * d,
                          l->centroid_scale + at + c, count, d);
        }
    }
}
