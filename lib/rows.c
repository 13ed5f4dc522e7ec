/* Rows of every type: rows.h says what each call does. */
#include "rows.h"

#include <math.h>
#include <string.h>

#include "kernels.h"
#include "plain_rows.h"
#include "plane_rows.h"

const char *sqz_row_type_name(enum sqz_row_type type)
{
    static const char *const names[] = {"none", "F16", "BF16", "I8", "I4", "I4+4"};
    return (unsigned)type < sizeof names / sizeof *names ? names[type] : "unknown";
}

static void move_centres(struct sqz_centres *c, size_t head_dim, size_t head_kv)
{
    c->data = (const char *)c->data + head_kv * c->n * sqz_row_data_bytes(c->type, head_dim);
    if (c->scale) c->scale += head_kv * c->n;
    if (c->mean) c->mean += head_kv * head_dim;
    c->offset += head_kv * (c->n + 1);
}

/* To a head's first row. */
static void move_planes(struct sqz_planes *p, size_t n_rows, size_t head_dim, size_t head_kv)
{
    if (p->lower) p->lower += head_kv * (n_rows - p->n_whole) * sqz_plane_bytes(head_dim);
    if (p->whole) p->whole += head_kv * p->n_whole * head_dim;
    p->step += head_kv * (n_rows - p->n_whole);
    if (p->centres.type) move_centres(&p->centres, head_dim, head_kv);
}

struct sqz_rows sqz_rows_of_head(const struct sqz_rows *rows, size_t n_rows, size_t head_dim, size_t head_kv)
{
    struct sqz_rows head = *rows;
    const size_t n_whole = rows->planes.n_whole;
    if (rows->type == SQZ_ROW_NONE) return head;
    head.data = (const char *)rows->data + head_kv * (n_rows - n_whole) * sqz_row_data_bytes(rows->type, head_dim);
    if (rows->scale) head.scale = rows->scale + head_kv * n_rows;
    if (rows->mean) head.mean = rows->mean + head_kv * head_dim;
    if (sqz_row_is_planes(rows->type)) move_planes(&head.planes, n_rows, head_dim, head_kv);
    return head;
}

struct sqz_rows sqz_rows_upper(const struct sqz_rows *rows)
{
    struct sqz_rows upper = *rows;
    if (rows->type != SQZ_ROW_I44) return upper;
    upper.type = SQZ_ROW_I4;
    upper.planes.lower = NULL;
    return upper;
}

void sqz_rows_announce(const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim,
                       void (*will_read)(const void *begin, size_t bytes))
{
    const size_t n_whole = rows->planes.n_whole, left = n_whole > first ? n_whole - first : 0;
    const size_t whole = left < n ? left : n, bytes = sqz_row_data_bytes(rows->type, head_dim);
    if (whole) will_read(sqz_row_at(rows, 0, head_dim, 0, first), whole * sqz_row_bytes(SQZ_ROW_F16, head_dim));
    if (n == whole) return;
    will_read(sqz_row_at(rows, 0, head_dim, 0, first + whole), (n - whole) * bytes);
    if (rows->type == SQZ_ROW_I44)
        will_read(rows->planes.lower + (first + whole - n_whole) * bytes, (n - whole) * bytes);
}

/* ---- Queries ------------------------------------------------------------------------ */

void sqz_row_queries_set(const struct sqz_row_queries *queries, const struct sqz_rows *rows, size_t head_dim)
{
    if (sqz_row_is_planes(rows->type)) sqz_plane_queries_set(queries, rows, head_dim);
    else sqz_plain_queries_set(queries, rows, head_dim);
}

/* ---- Logits ------------------------------------------------------------------------- */

size_t sqz_logits_scratch_floats(size_t head_dim)
{
    return SQZ_ROWS_TILE * head_dim;
}

void sqz_rows_logits(float *logits, size_t stride, const struct sqz_row_queries *queries, const struct sqz_rows *rows,
                     size_t first, size_t n, size_t head_dim, float *scratch)
{
    if (sqz_row_is_planes(rows->type))
        sqz_plane_logits(logits, stride, queries, rows, NULL, first, n, n, head_dim, scratch);
    else sqz_plain_logits(logits, stride, queries, rows, first, n, head_dim, scratch);
}

void sqz_rows_listed_logits(float *logits, size_t stride, const struct sqz_row_queries *queries,
                            const struct sqz_rows *rows, const uint32_t *index, size_t n, size_t n_listed,
                            size_t head_dim)
{
    if (sqz_row_is_planes(rows->type))
        sqz_plane_logits(logits, stride, queries, rows, index, 0, n, n_listed, head_dim, NULL);
    else sqz_plain_listed_logits(logits, stride, queries, rows, index, n, n_listed, head_dim);
}

/* ---- Sums of values, tiles ----------------------------------------------------------- */

size_t sqz_rows_accumulate(float *out, const float *weights, size_t stride, size_t n_queries,
                           const struct sqz_rows *rows, const uint32_t *index, size_t first, size_t n, size_t head_dim)
{
    if (sqz_row_is_planes(rows->type))
        return sqz_plane_accumulate(out, weights, stride, n_queries, rows, index, first, n, head_dim);
    const uint16_t *from = sqz_rows_f16(rows) + (index ? 0 : first * head_dim);
    return sqz_row_bytes(rows->type, head_dim) *
           sqz_kernels_get()->row_accumulate(out, weights, stride, n_queries, from, index, n, head_dim);
}

void sqz_rows_to_f32(float *out, const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim)
{
    if (sqz_row_is_planes(rows->type)) sqz_plane_to_f32(out, rows, first, n, head_dim);
    else sqz_plain_to_f32(out, rows, first, n, head_dim);
}

void sqz_rows_transpose(float *out, size_t ld, const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim)
{
    enum { SOME = 16 };
    float row[SOME * 256]; /* of the largest head dimension */
    if (rows->type == SQZ_ROW_F16) {
        sqz_kernels_get()->transpose_f16(out, ld, sqz_row_at(rows, 0, head_dim, 0, first), n, head_dim);
        return;
    }
    for (size_t r = 0, some; r < n; r += some) {
        some = n - r < SOME ? n - r : SOME;
        sqz_rows_to_f32(row, rows, first + r, some, head_dim);
        for (size_t i = 0; i < head_dim; i++)
            for (size_t j = 0; j < some; j++) out[i * ld + r + j] = row[j * head_dim + i];
    }
    for (size_t i = 0; i < head_dim; i++) memset(out + i * ld + n, 0, (ld - n) * sizeof *out);
}

void sqz_rows_to_f16(uint16_t *out, const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim)
{
    float row[256]; /* the largest head dimension */
    if (rows->type == SQZ_ROW_F16) {
        memcpy(out, sqz_row_at(rows, 0, head_dim, 0, first), n * head_dim * sizeof *out);
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
    if (sqz_row_is_planes(rows->type)) {
        sqz_rows_to_f16((uint16_t *)buffer->data + at * head_dim, rows, first, n, head_dim);
        return sqz_f16_rows(buffer->data);
    }
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
    if (sqz_row_is_planes(rows->type)) {
        sqz_plane_store(rows, at, row, head_dim);
        return;
    }
    void *to = (void *)(uintptr_t)sqz_row_at(rows, 0, head_dim, 0, at);
    if (rows->type == SQZ_ROW_I8) ((float *)(uintptr_t)rows->scale)[at] = quantise(to, row, rows->mean, head_dim);
    else sqz_kernels_get()->f32_to_f16(to, row, head_dim);
}
