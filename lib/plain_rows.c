/* Rows of F16 and INT8; plain_rows.h and rows.h say what each call does. */
#include "plain_rows.h"

#include <math.h>
#include <string.h>

#include "kernels.h"

static const uint16_t *f16_at(const struct sqz_rows *rows, size_t row, size_t head_dim)
{
    return sqz_rows_f16(rows) + row * head_dim;
}

static const int8_t *i8_at(const struct sqz_rows *rows, size_t row, size_t head_dim)
{
    return sqz_rows_i8(rows) + row * head_dim;
}

/* ---- Queries ------------------------------------------------------------------------ */

float sqz_i16_round(int16_t *row, const float *q, size_t head_dim, float most)
{
    float largest = 0;
    for (size_t i = 0; i < head_dim; i++) largest = fabsf(q[i]) > largest ? fabsf(q[i]) : largest;
    const float inverse = largest > 0 ? most / largest : 0.0f;
    const float whole = 12582912.0f; /* 1.5 * 2^23: adding it rounds to the nearest integer, ties to even */
    /* NaN and infinity, of a file's keys or of a model gone astray, have no integer. They are in the mean's logit. */
    for (size_t i = 0; i < head_dim; i++) {
        const float x = q[i] * inverse;
        row[i] = fabsf(x) < most + 0.5f ? (int16_t)(x + whole - whole) : 0;
    }
    memset(row + head_dim, 0, (sqz_i16_stride(head_dim) - head_dim) * sizeof *row);
    return largest;
}

void sqz_i16_queries_set(const struct sqz_i16_queries *out, const float *queries, size_t n_query_rows, size_t head_dim,
                         float scale, const float *key_mean)
{
    for (size_t r = 0; r < n_query_rows; r++) {
        const float *q = queries + r * head_dim;
        out->factor[r] =
            scale * sqz_i16_round(out->rows + r * sqz_i16_stride(head_dim), q, head_dim, 32767.0f) / 32767.0f;
        out->mean_logit[r] = scale * sqz_kernels_get()->dot(q, key_mean, head_dim);
    }
}

void sqz_plain_queries_set(const struct sqz_row_queries *queries, const struct sqz_rows *rows, size_t head_dim)
{
    if (rows->type == SQZ_ROW_I8)
        sqz_i16_queries_set(&queries->i16, queries->f32, queries->n, head_dim, queries->scale, rows->mean);
}

static void move_i16(struct sqz_i16_queries *queries, size_t first, size_t head_dim)
{
    if (!queries->rows) return;
    queries->rows += first * sqz_i16_stride(head_dim);
    queries->factor += first;
    queries->mean_logit += first;
}

struct sqz_row_queries sqz_row_queries_part(const struct sqz_row_queries *queries, size_t first, size_t n,
                                            size_t head_dim)
{
    struct sqz_row_queries part = *queries;
    part.f32 += first * head_dim;
    part.n = n;
    move_i16(&part.i16, first, head_dim);
    move_i16(&part.turned, first, head_dim);
    if (part.centre_logits) part.centre_logits += first * part.centre_stride;
    return part;
}

/* ---- Logits ------------------------------------------------------------------------- */

static void add_mean_logits(float *logits, size_t stride, const float *mean_logit, size_t n_queries, size_t n_rows)
{
    for (size_t q = 0; q < n_queries; q++)
        for (size_t i = 0; i < n_rows; i++) logits[q * stride + i] += mean_logit[q];
}

static void f16_logits(float *logits, size_t stride, const struct sqz_row_queries *q, const uint16_t *rows,
                       size_t n_rows, size_t head_dim, float *scratch)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    if (q->n <= SQZ_MAX_GROUP_QUERIES) {
        k->row_logits(logits, stride, q->f32, q->n, rows, n_rows, head_dim, q->scale);
        return;
    }
    /* Whole tiles go through the matrix product; a ragged end has too few columns for its padded width. */
    size_t whole = n_rows / SQZ_GEMM_N * SQZ_GEMM_N;
    for (size_t at = 0; at < whole; at += SQZ_ROWS_TILE) {
        size_t n = whole - at < SQZ_ROWS_TILE ? whole - at : SQZ_ROWS_TILE;
        k->transpose_f16(scratch, n, rows + at * head_dim, n, head_dim);
        k->gemm(logits + at, stride, q->f32, head_dim, scratch, n, q->n, n, head_dim, q->scale, false);
    }
    for (size_t i = 0; i < q->n && whole < n_rows; i += SQZ_MAX_GROUP_QUERIES) {
        size_t n = q->n - i < SQZ_MAX_GROUP_QUERIES ? q->n - i : SQZ_MAX_GROUP_QUERIES;
        k->row_logits(logits + i * stride + whole, stride, q->f32 + i * head_dim, n, rows + whole * head_dim,
                      n_rows - whole, head_dim, q->scale);
    }
}

/* Blocks of rows that stay in the first-level cache, where several groups of queries share them. */
static void i8_logits(float *logits, size_t stride, const struct sqz_row_queries *q, const int8_t *rows,
                      const float *scale, size_t n_rows, size_t head_dim)
{
    const size_t block = q->n > SQZ_MAX_GROUP_QUERIES ? SQZ_ROWS_TILE : n_rows;
    for (size_t at = 0; at < n_rows; at += block) {
        const size_t n = n_rows - at < block ? n_rows - at : block;
        for (size_t i = 0, m; i < q->n; i += m) {
            m = q->n - i < SQZ_MAX_GROUP_QUERIES ? q->n - i : SQZ_MAX_GROUP_QUERIES;
            float *to = logits + i * stride + at;
            sqz_kernels_get()->row_logits_i8(to, stride, q->i16.rows + i * sqz_i16_stride(head_dim), q->i16.factor + i,
                                             m, rows + at * head_dim, scale + at, n, head_dim);
            add_mean_logits(to, stride, q->i16.mean_logit + i, m, n);
        }
    }
}

void sqz_plain_logits(float *logits, size_t stride, const struct sqz_row_queries *queries, const struct sqz_rows *rows,
                      size_t first, size_t n, size_t head_dim, float *scratch)
{
    if (rows->type == SQZ_ROW_I8)
        i8_logits(logits, stride, queries, i8_at(rows, first, head_dim), rows->scale + first, n, head_dim);
    else f16_logits(logits, stride, queries, f16_at(rows, first, head_dim), n, head_dim, scratch);
}

void sqz_plain_listed_logits(float *logits, size_t stride, const struct sqz_row_queries *queries,
                             const struct sqz_rows *rows, const uint32_t *index, size_t n, size_t n_listed,
                             size_t head_dim)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    if (rows->type != SQZ_ROW_I8) {
        k->listed_logits(logits, stride, queries->f32, queries->n, rows->data, index, n, n_listed, head_dim,
                         queries->scale);
        return;
    }
    k->listed_logits_i8(logits, stride, queries->i16.rows, queries->i16.factor, queries->n, rows->data, rows->scale,
                        index, n, n_listed, head_dim);
    add_mean_logits(logits, stride, queries->i16.mean_logit, queries->n, n);
}

/* ---- As floats ----------------------------------------------------------------------- */

void sqz_plain_to_f32(float *out, const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim)
{
    if (rows->type != SQZ_ROW_I8) {
        sqz_kernels_get()->f16_to_f32(out, f16_at(rows, first, head_dim), n * head_dim);
        return;
    }
    for (size_t r = first; r < first + n; r++) {
        const int8_t *numbers = i8_at(rows, r, head_dim);
        for (size_t i = 0; i < head_dim; i++) *out++ = rows->mean[i] + rows->scale[r] * (float)numbers[i];
    }
}
