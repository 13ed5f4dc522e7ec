/* Rows of every type: rows.h says what each call does. */
#include "rows.h"

#include <math.h>
#include <string.h>

#include "kernels.h"

enum { TILE = 128 };

const char *sqz_row_type_name(enum sqz_row_type type)
{
    static const char *const names[] = {"none", "F16", "BF16", "I8"};
    return (unsigned)type < sizeof names / sizeof *names ? names[type] : "unknown";
}

static const uint16_t *f16_at(const struct sqz_rows *rows, size_t row, size_t head_dim)
{
    return sqz_row_at(rows, 0, head_dim, 0, row);
}

static const int8_t *i8_at(const struct sqz_rows *rows, size_t row, size_t head_dim)
{
    return sqz_row_at(rows, 0, head_dim, 0, row);
}

struct sqz_rows sqz_rows_of_head(const struct sqz_rows *rows, size_t n_rows, size_t head_dim, size_t head_kv)
{
    struct sqz_rows head = *rows;
    if (rows->type == SQZ_ROW_NONE) return head;
    head.data = sqz_row_at(rows, n_rows, head_dim, head_kv, 0);
    if (rows->scale) head.scale = rows->scale + head_kv * n_rows;
    if (rows->mean) head.mean = rows->mean + head_kv * head_dim;
    return head;
}

struct sqz_rows sqz_rows_from(const struct sqz_rows *rows, size_t head_dim, size_t first)
{
    struct sqz_rows part = *rows;
    part.data = sqz_row_at(rows, 0, head_dim, 0, first);
    if (rows->scale) part.scale = rows->scale + first;
    return part;
}

/* ---- Queries ------------------------------------------------------------------------ */

void sqz_i16_queries_set(const struct sqz_i16_queries *out, const float *queries, size_t n_query_rows, size_t head_dim,
                         float scale, const float *key_mean)
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

void sqz_row_queries_set(const struct sqz_row_queries *queries, const struct sqz_rows *rows, size_t head_dim)
{
    if (rows->type == SQZ_ROW_I8)
        sqz_i16_queries_set(&queries->i16, queries->f32, queries->n, head_dim, queries->scale, rows->mean);
}

struct sqz_row_queries sqz_row_queries_part(const struct sqz_row_queries *queries, size_t first, size_t n,
                                            size_t head_dim)
{
    struct sqz_row_queries part = *queries;
    part.f32 += first * head_dim;
    part.n = n;
    if (part.i16.rows) {
        part.i16.rows += first * sqz_i16_stride(head_dim);
        part.i16.factor += first;
        part.i16.mean_logit += first;
    }
    return part;
}

/* ---- Logits ------------------------------------------------------------------------- */

static void add_mean_logits(float *logits, size_t stride, const float *mean_logit, size_t n_queries, size_t n_rows)
{
    for (size_t q = 0; q < n_queries; q++)
        for (size_t i = 0; i < n_rows; i++) logits[q * stride + i] += mean_logit[q];
}

size_t sqz_logits_scratch_floats(size_t head_dim)
{
    return TILE * head_dim;
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
    for (size_t at = 0; at < whole; at += TILE) {
        size_t n = whole - at < TILE ? whole - at : TILE;
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
    const size_t block = q->n > SQZ_MAX_GROUP_QUERIES ? TILE : n_rows;
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

void sqz_rows_logits(float *logits, size_t stride, const struct sqz_row_queries *queries, const struct sqz_rows *rows,
                     size_t first, size_t n, size_t head_dim, float *scratch)
{
    if (rows->type == SQZ_ROW_I8)
        i8_logits(logits, stride, queries, i8_at(rows, first, head_dim), rows->scale + first, n, head_dim);
    else f16_logits(logits, stride, queries, f16_at(rows, first, head_dim), n, head_dim, scratch);
}

void sqz_rows_listed_logits(float *logits, size_t stride, const struct sqz_row_queries *queries,
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

/* ---- Sums of values, tiles ----------------------------------------------------------- */

size_t sqz_rows_accumulate(float *out, const float *weights, size_t stride, size_t n_queries,
                           const struct sqz_rows *rows, const uint32_t *index, size_t n, size_t head_dim)
{
    return sqz_kernels_get()->row_accumulate(out, weights, stride, n_queries, rows->data, index, n, head_dim);
}

static inline float i8_number(const struct sqz_rows *rows, size_t row, const int8_t *numbers, size_t i)
{
    return rows->mean[i] + rows->scale[row] * (float)numbers[i];
}

void sqz_rows_to_f32(float *out, const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim)
{
    if (rows->type != SQZ_ROW_I8) {
        sqz_kernels_get()->f16_to_f32(out, f16_at(rows, first, head_dim), n * head_dim);
        return;
    }
    for (size_t r = first; r < first + n; r++) {
        const int8_t *numbers = i8_at(rows, r, head_dim);
        for (size_t i = 0; i < head_dim; i++) *out++ = i8_number(rows, r, numbers, i);
    }
}

void sqz_rows_transpose(float *out, size_t ld, const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim)
{
    if (rows->type != SQZ_ROW_I8) {
        sqz_kernels_get()->transpose_f16(out, ld, f16_at(rows, first, head_dim), n, head_dim);
        return;
    }
    for (size_t r = 0; r < n; r++) {
        const int8_t *numbers = i8_at(rows, first + r, head_dim);
        for (size_t i = 0; i < head_dim; i++) out[i * ld + r] = i8_number(rows, first + r, numbers, i);
    }
    for (size_t i = 0; i < head_dim; i++) memset(out + i * ld + n, 0, (ld - n) * sizeof *out);
}

void sqz_rows_to_f16(uint16_t *out, const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim)
{
    float row[256]; /* the largest head dimension */
    if (rows->type != SQZ_ROW_I8) {
        memcpy(out, f16_at(rows, first, head_dim), n * head_dim * sizeof *out);
        return;
    }
    for (size_t r = 0; r < n; r++) {
        sqz_rows_to_f32(row, rows, first + r, 1, head_dim);
        sqz_kernels_get()->f32_to_f16(out + r * head_dim, row, head_dim);
    }
}

struct sqz_rows sqz_rows_gather(const struct sqz_row_buffer *buffer, size_t at, const struct sqz_rows *rows,
                                size_t first, size_t n, size_t head_dim)
{
    const size_t bytes = sqz_row_data_bytes(rows->type, head_dim);
    struct sqz_rows gathered = *rows;
    memcpy((char *)buffer->data + at * bytes, sqz_row_at(rows, 0, head_dim, 0, first), n * bytes);
    gathered.data = buffer->data;
    if (rows->scale) {
        memcpy(buffer->scale + at, rows->scale + first, n * sizeof *buffer->scale);
        gathered.scale = buffer->scale;
    }
    return gathered;
}

/* ---- Writing ------------------------------------------------------------------------- */

/* Rounds a row less the mean to INT8; returns what its numbers are to be multiplied by. */
static float quantise(int8_t *out, const float *row, const float *mean, size_t d)
{
    float largest = 0;
    for (size_t j = 0; j < d; j++) largest = fmaxf(largest, fabsf(row[j] - mean[j]));
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    for (size_t j = 0; j < d; j++) out[j] = (int8_t)lrintf((row[j] - mean[j]) * inverse);
    return largest / 127.0f;
}

void sqz_rows_store(const struct sqz_rows *rows, size_t at, const float *row, size_t head_dim)
{
    void *to = (void *)(uintptr_t)sqz_row_at(rows, 0, head_dim, 0, at);
    if (rows->type == SQZ_ROW_I8) ((float *)(uintptr_t)rows->scale)[at] = quantise(to, row, rows->mean, head_dim);
    else sqz_kernels_get()->f32_to_f16(to, row, head_dim);
}
