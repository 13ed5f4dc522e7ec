/*
 * The few inner loops that everything in lib/ is made of, in variants for each
 * instruction set. One table of variants feeds dispatch, tests and bench.
 *
 * All float sums are F32; F16 is IEEE 754 binary16. Pointers need no alignment
 * beyond their type. Rows are contiguous: row r starts at r * head_dim.
 * head_dim is a multiple of 16 from 32 to 256. No kernel allocates.
 */
#ifndef SQZ_LIB_KERNELS_H
#define SQZ_LIB_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SQZ_MAX_GROUP_QUERIES 16    /* most queries one call of the row kernels takes */
#define SQZ_PLANE_QUERY_MOST  32639 /* 127 * 257, of queries of rows in planes */
#define SQZ_GEMM_N            16    /* gemm's n must be a multiple of this */

struct sqz_kernels {
    const char *name; /* "portable", "avx2", "avx512", "neon" */

    void (*f16_to_f32)(float *dst, const uint16_t *src, size_t n);
    void (*f32_to_f16)(uint16_t *dst, const float *src, size_t n); /* round to nearest even; overflow gives infinity */

    /* Logits of a few queries with many F16 rows, each row read once:
     * logits[q * stride + r] = scale * dot(queries + q * head_dim, rows + r * head_dim)
     * for q < n_queries (1 to SQZ_MAX_GROUP_QUERIES), r < n_rows (may be 0); stride >= n_rows. */
    void (*row_logits)(float *logits, size_t stride, const float *queries, size_t n_queries, const uint16_t *rows,
                       size_t n_rows, size_t head_dim, float scale);

    /* The same with INT8 rows that have a factor each and INT16 queries that have one:
     * logits[q * stride + r] = query_factor[q] * row_factor[r] * dot(query q, row r), the product in integers.
     * Query q starts at q * (head_dim rounded up to a multiple of 32) and is padded with zeros. Values of rows are -127
     * to 127, of queries -32767 to 32767. Where head_dim is no multiple of 32 nothing is read past a row. */
    void (*row_logits_i8)(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                          size_t n_queries, const int8_t *rows, const float *row_factor, size_t n_rows,
                          size_t head_dim);

    /* Both for rows picked by a list: row r is that of index[r]. The list goes on behind the n_rows of this call, to
     * n_listed >= n_rows entries: rows are asked for some entries ahead. */
    void (*listed_logits)(float *logits, size_t stride, const float *queries, size_t n_queries, const uint16_t *rows,
                          const uint32_t *index, size_t n_rows, size_t n_listed, size_t head_dim, float scale);
    void (*listed_logits_i8)(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                             size_t n_queries, const int8_t *rows, const float *row_factor, const uint32_t *index,
                             size_t n_rows, size_t n_listed, size_t head_dim);

    /* out[q * head_dim + i] += sum over r of weights[q * stride + r] * rows[at(r) * head_dim + i], at(r) = index[r], or
     * r where index is NULL. A row whose n_queries weights are all exactly zero is not read from memory. Returns how
     * many rows were read. */
    size_t (*row_accumulate)(float *out, const float *weights, size_t stride, size_t n_queries, const uint16_t *rows,
                             const uint32_t *index, size_t n_rows, size_t head_dim);

    /* Rows in planes (struct sqz_planes): numbers u of 4 bits, or with a lower plane of 8, not negative. upper, lower:
     * sqz_plane_bytes(head_dim) bytes a row. index: which rows; NULL: the first n_rows.
     *
     * logits[q * stride + r] = query_factor[q] * row_factor[r] * (half[q] + sum over i of queries[q][i] *
     * (u[at(r)][i] - 8, or 128 with a lower plane)), the sum in integers. Queries as for row_logits_i8, but up to
     * SQZ_PLANE_QUERY_MOST: a variant may take them as 256 times a signed byte and another. The list goes on to
     * n_listed >= n_rows. */
    void (*plane_logits)(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                         const float *half, size_t n_queries, const uint8_t *upper, const uint8_t *lower,
                         const float *row_factor, const uint32_t *index, size_t n_rows, size_t n_listed,
                         size_t head_dim);

    /* out[q][i] += sum over r of weights[q * stride + r] * row_factor[r] * u[at(r)][i]; rows of out have
     * 2 * sqz_plane_bytes(head_dim) numbers, whose last are those of the padding. Rows without a weight as in
     * row_accumulate. A variant may round the products of weights and factors, of 256 rows at a time, to integers times
     * a 32639th of the largest; the sum of those products is as it was. Returns how many rows were read. */
    size_t (*plane_sums)(float *out, const float *weights, size_t stride, size_t n_queries, const uint8_t *upper,
                         const uint8_t *lower, const float *row_factor, const uint32_t *index, size_t n_rows,
                         size_t head_dim);

    /* Every run of `length` numbers of x [n] becomes its product with the Hadamard matrix of that size (Sylvester's, entry
     * i, j: 1 or -1 as i & j has an even or an odd number of bits), times factor. length: a power of two from 16 to 256
     * that divides n. */
    void (*turn)(float *x, size_t n, size_t length, float factor);

    /* Columns of weights[q * stride + r], r < n, in which no weight reaches limit become 0, and sums[q] the sum of what
     * is left of row q. Weights are not negative. */
    void (*drop_below)(float *weights, size_t stride, size_t n_queries, size_t n, float limit, float *sums);

    /* Adds what 4-bit codes stand for, 8 in a word, the first in the lowest bits, words [n_words][word_stride]:
     * out[q * stride + i] += sum over w < n_words, p < 8 of
     *                        tables[((w * n_queries + q) * 8 + p) * 16 + (words[w * word_stride + i] >> 4 * p & 15)]. */
    void (*add_codes)(float *out, size_t stride, const float *tables, size_t n_queries, const uint32_t *words,
                      size_t word_stride, size_t n_words, size_t n);

    /* Segments: counts[s] numbers for each s < n, one after the other. Each query's values repeated as often, and the sum
     * of each segment. */
    void (*repeat)(float *out, size_t stride, const float *values, size_t value_stride, size_t n_queries,
                   const uint32_t *counts, size_t n);
    void (*segment_sums)(float *sums, size_t sum_stride, const float *x, size_t stride, size_t n_queries,
                         const uint32_t *counts, size_t n);

    /* x[i] *= factor; largest[i] becomes x[i] where that is larger. */
    void (*scale_max)(float *largest, float *x, float factor, size_t n);

    /* Lists the i with x[i] >= limit, ascending. Returns how many. */
    size_t (*list_at_least)(uint32_t *list, const float *x, size_t n, float limit);

    /* x[i] = log(x[i]) + shift, absolute error of the logarithm below 2e-7 (1 + |log x|); -INFINITY for x[i] below
     * 2^-126. x is not negative. */
    void (*log_shifted)(float *x, float shift, size_t n);

    float (*max)(const float *x, size_t n); /* -INFINITY for n == 0 */

    /* x[i] = exp(x[i] - shift), returns the sum (0 for n == 0). Relative error of each below 4e-7 for
     * x[i] - shift in [-87, 0]; below -103 gives 0; -INFINITY gives exactly 0. shift is finite. */
    float (*exp_sum)(float *x, size_t n, float shift);

    void (*scale)(float *x, float factor, size_t n);
    void (*multiply)(float *x, const float *y, size_t n); /* x[i] *= y[i] */
    /* z[i] = x[i] + factor * y[i]; z may be x. */
    void (*add_scaled)(float *z, const float *x, float factor, const float *y, size_t n);
    float (*dot)(const float *x, const float *y, size_t n);

    /* dst[i * ld + r] = rows[r * head_dim + i] as F32 for r < n_rows; columns n_rows .. ld-1 are set to 0.
     * ld >= n_rows, a multiple of SQZ_GEMM_N. */
    void (*transpose_f16)(float *dst, size_t ld, const uint16_t *rows, size_t n_rows, size_t head_dim);

    /* Small matrix product out of cache: c[m][n] = alpha * a[m][k] * b[k][n], plus c when accumulate.
     * Row strides lda, ldb, ldc in floats. n is a multiple of SQZ_GEMM_N; m and k are any, m may be 0.
     * a and b are meant to lie in the first- or second-level cache. */
    void (*gemm)(float *c, size_t ldc, const float *a, size_t lda, const float *b, size_t ldb, size_t m, size_t n,
                 size_t k, float alpha, bool accumulate);

    /* Index of the largest x[i] + bias[i] (the first of equals), its value in *best. n >= 1. */
    size_t (*argmax_biased)(const float *x, const float *bias, size_t n, float *best);
};

/* The fastest variant that this CPU and OS can run; resolved once, thread-safe. */
const struct sqz_kernels *sqz_kernels_get(void);

/* Variant by index for tests and bench, fastest last; NULL past the end. *supported says whether it can run here.
 * A variant that was not compiled in is not listed. */
const struct sqz_kernels *sqz_kernels_variant(size_t index, bool *supported);

/* Makes sqz_kernels_get() return the named variant from now on, false when unknown or unsupported. For tests and
 * bench. */
bool sqz_kernels_force(const char *name);

#endif
