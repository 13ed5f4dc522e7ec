/* Rows of 4 and of 4 + 4 bits: plane_rows.h says what each call does. */
#include "plane_rows.h"

#include <math.h>
#include <string.h>

#include "kernels.h"
#include "plain_rows.h"

enum {
    PART = 256,       /* rows that are listed together */
    AHEAD = 64,       /* rows of the list behind them, for kernels to ask for */
    CENTRES = 64,     /* clusters whose logits are computed together */
    MAX_NUMBERS = 256 /* of a row */
};

/* Rows that are not rounded, as rows of their own. */
static struct sqz_rows whole_rows(const struct sqz_rows *rows)
{
    return sqz_f16_rows(rows->planes.whole);
}

static const uint8_t *upper_of(const struct sqz_rows *rows)
{
    return rows->data;
}

static const uint8_t *lower_at(const struct sqz_rows *rows, size_t at, size_t head_dim)
{
    return rows->type == SQZ_ROW_I44 ? rows->planes.lower + at * sqz_plane_bytes(head_dim) : NULL;
}

/* What the stored numbers, which are not negative, are above those of struct sqz_planes, and the weight of one of them
 * in steps. */
static float middle_of(const struct sqz_rows *rows)
{
    return rows->type == SQZ_ROW_I44 ? 128.0f : 8.0f;
}
static float unit_of(const struct sqz_rows *rows)
{
    return rows->type == SQZ_ROW_I44 ? 1.0f / 16 : 1.0f;
}

void sqz_turn(float *row, size_t head_dim)
{
    const size_t length = head_dim & (~head_dim + 1); /* the largest power of two that divides it */
    sqz_kernels_get()->turn(row, head_dim, length, 1.0f / sqrtf((float)length));
}

/* Rows of one kind from number i of the list on: not rounded, or in planes. Returns where they end. */
static size_t end_of_kind(const struct sqz_rows *rows, const uint32_t *index, size_t first, size_t i, size_t n)
{
    const size_t n_whole = rows->planes.n_whole;
    if (!index) return first + i < n_whole && n_whole < first + n ? n_whole - first : n;
    const bool whole = index[i] < n_whole;
    if (n_whole == 0) return n;
    while (++i < n && (index[i] < n_whole) == whole) {
    }
    return i;
}

static size_t row_at(const uint32_t *index, size_t first, size_t i)
{
    return index ? index[i] : first + i;
}

/* ---- Queries ------------------------------------------------------------------------ */

/* The centroids as rows of one head. */
static struct sqz_rows centre_rows(const struct sqz_centres *centres)
{
    return (struct sqz_rows){
        .type = centres->type, .data = centres->data, .scale = centres->scale, .mean = centres->mean};
}

void sqz_plane_queries_set(const struct sqz_row_queries *queries, const struct sqz_rows *rows, size_t head_dim)
{
    const struct sqz_rows centres = centre_rows(&rows->planes.centres);
    const struct sqz_i16_queries *turned = &queries->turned;
    float row[MAX_NUMBERS];
    sqz_plain_queries_set(queries, &centres, head_dim);
    for (size_t r = 0; r < queries->n; r++) {
        const float *q = queries->f32 + r * head_dim;
        int16_t *numbers = turned->rows + r * sqz_i16_stride(head_dim);
        int32_t sum = 0;
        if (rows->mean) queries->i16.mean_logit[r] = queries->scale * sqz_kernels_get()->dot(q, rows->mean, head_dim);
        memcpy(row, q, head_dim * sizeof *row);
        sqz_turn(row, head_dim);
        turned->factor[r] = queries->scale * unit_of(rows) *
                            sqz_i16_round(numbers, row, head_dim, SQZ_PLANE_QUERY_MOST) / SQZ_PLANE_QUERY_MOST;
        for (size_t i = 0; i < head_dim; i++) sum += numbers[i];
        turned->mean_logit[r] = 0.5f * (float)sum;
    }
}

/* ---- Logits ------------------------------------------------------------------------- */

/* The cluster that row number `row` of the planes is in; near: one not far from it. */
static uint32_t cluster_of(const struct sqz_centres *c, uint32_t near, uint32_t row)
{
    uint32_t low = near, high, step = 1;
    if (row < c->offset[low]) low = 0;
    for (high = low + 1; high < c->n && c->offset[high] <= row; step *= 2) {
        low = high;
        high = c->n - high > step ? high + step : c->n;
    }
    while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        if (c->offset[middle] <= row) low = middle;
        else high = middle;
    }
    return low;
}

/* Adds to the logits of n rows of the planes, up to PART, those of their centroids. local: their numbers; NULL: from `first` on. */
static void add_centre_logits(float *logits, size_t stride, const struct sqz_row_queries *q,
                              const struct sqz_rows *rows, const uint32_t *local, size_t first, size_t n,
                              size_t head_dim)
{
    const struct sqz_centres *c = &rows->planes.centres;
    const struct sqz_rows centres = centre_rows(c);
    const struct sqz_kernels *k = sqz_kernels_get();
    uint32_t cluster[CENTRES], count[CENTRES], last = 0;
    float centre[SQZ_MAX_GROUP_QUERIES * CENTRES], more[SQZ_MAX_GROUP_QUERIES * PART];
    for (size_t i = 0, at = 0; i < n; i = at) {
        size_t m = 0;
        for (size_t since; at < n && m < CENTRES; m++) {
            since = at;
            cluster[m] = last = cluster_of(c, last, (uint32_t)row_at(local, first, at));
            const size_t begin = c->offset[last], past = c->offset[last + 1];
            if (local)
                while (++at < n && local[at] >= begin && local[at] < past) {
                }
            else at = past - first < n ? past - first : n;
            count[m] = (uint32_t)(at - since);
        }
        for (size_t r = 0; r < q->n && q->centre_logits; r++)
            for (size_t s = 0; s < m; s++)
                centre[r * CENTRES + s] = q->centre_logits[r * q->centre_stride + cluster[s]];
        if (!q->centre_logits) sqz_plain_listed_logits(centre, CENTRES, q, &centres, cluster, m, m, head_dim);
        k->repeat(more, PART, centre, CENTRES, q->n, count, m);
        for (size_t r = 0; r < q->n; r++) {
            float *to = logits + r * stride + i;
            k->add_scaled(to, to, 1.0f, more + r * PART, at - i);
        }
    }
}

/* Logits of up to PART rows of the planes with up to SQZ_MAX_GROUP_QUERIES query rows. factor: what each row's product
 * is to be multiplied by. */
static void part_logits(float *logits, size_t stride, const struct sqz_row_queries *q, const struct sqz_rows *rows,
                        const uint32_t *local, size_t first, size_t n, size_t n_listed, const float *factor,
                        size_t head_dim)
{
    const size_t at = local ? 0 : first;
    sqz_kernels_get()->plane_logits(logits, stride, q->turned.rows, q->turned.factor, q->turned.mean_logit, q->n,
                                    upper_of(rows) + at * sqz_plane_bytes(head_dim), lower_at(rows, at, head_dim),
                                    factor, local, n, n_listed, head_dim);
    for (size_t r = 0; r < q->n && rows->mean; r++)
        for (size_t i = 0; i < n; i++) logits[r * stride + i] += q->i16.mean_logit[r];
    if (rows->planes.centres.type) add_centre_logits(logits, stride, q, rows, local, first, n, head_dim);
}

/* Rows in planes alone; of a list numbers as in the whole. */
static void plane_logits(float *logits, size_t stride, const struct sqz_row_queries *queries,
                         const struct sqz_rows *rows, const uint32_t *index, size_t first, size_t n, size_t n_listed,
                         size_t head_dim)
{
    const uint32_t n_whole = rows->planes.n_whole;
    uint32_t local[PART + AHEAD];
    uint16_t step[PART];
    float factor[PART];
    for (size_t i = 0, m; i < n; i += m) {
        m = n - i < PART ? n - i : PART;
        size_t listed = n_listed - i < m + AHEAD ? n_listed - i : m + AHEAD;
        for (size_t j = 0; index && j < listed; j++) local[j] = index[i + j] < n_whole ? 0 : index[i + j] - n_whole;
        const size_t from = index ? 0 : first + i - n_whole;
        const uint16_t *steps = index ? step : rows->planes.step + from;
        for (size_t j = 0; index && j < m; j++) step[j] = rows->planes.step[local[j]];
        sqz_kernels_get()->f16_to_f32(factor, steps, m);
        for (size_t q = 0, some; q < queries->n; q += some) {
            some = queries->n - q < SQZ_MAX_GROUP_QUERIES ? queries->n - q : SQZ_MAX_GROUP_QUERIES;
            const struct sqz_row_queries part = sqz_row_queries_part(queries, q, some, head_dim);
            part_logits(logits + q * stride + i, stride, &part, rows, index ? local : NULL, from, m,
                        q == 0 ? listed : m, factor, head_dim);
        }
    }
}

void sqz_plane_logits(float *logits, size_t stride, const struct sqz_row_queries *queries, const struct sqz_rows *rows,
                      const uint32_t *index, size_t first, size_t n, size_t n_listed, size_t head_dim, float *scratch)
{
    const struct sqz_rows whole = whole_rows(rows);
    for (size_t i = 0, end; i < n; i = end) {
        const size_t row = row_at(index, first, i);
        const uint32_t *list = index ? index + i : NULL;
        end = end_of_kind(rows, index, first, i, n);
        if (row >= rows->planes.n_whole)
            plane_logits(logits + i, stride, queries, rows, list, row, end - i, n_listed - i, head_dim);
        else if (index) sqz_plain_listed_logits(logits + i, stride, queries, &whole, list, end - i, end - i, head_dim);
        else sqz_plain_logits(logits + i, stride, queries, &whole, row, end - i, head_dim, scratch);
    }
}

/* ---- Sums of values -------------------------------------------------------------------- */

/* Numbers to sum others with. */
#define ONES_16  1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1
#define ONES_64  ONES_16, ONES_16, ONES_16, ONES_16
#define ONES_256 ONES_64, ONES_64, ONES_64, ONES_64

/* What rows in planes add, turned, and the sums of their weights. */
struct turned_sums {
    float out[SQZ_MAX_GROUP_QUERIES * MAX_NUMBERS]; /* [queries][numbers of a plane's row] */
    float weight[SQZ_MAX_GROUP_QUERIES], scaled[SQZ_MAX_GROUP_QUERIES];
};

/* Adds up to PART rows of the planes. Returns how many were read. */
static size_t add_part(struct turned_sums *sums, const float *weights, size_t stride, size_t n_queries,
                       const struct sqz_rows *rows, const uint32_t *index, size_t first, size_t n, size_t head_dim)
{
    static const float ones[PART] = {ONES_256};
    const struct sqz_kernels *k = sqz_kernels_get();
    const uint32_t n_whole = rows->planes.n_whole;
    const size_t from = index ? 0 : first - n_whole;
    uint32_t local[PART];
    uint16_t step[PART];
    float factor[PART];
    for (size_t i = 0; index && i < n; i++) local[i] = index[i] - n_whole;
    for (size_t i = 0; index && i < n; i++) step[i] = rows->planes.step[local[i]];
    k->f16_to_f32(factor, index ? step : rows->planes.step + from, n);
    if (unit_of(rows) != 1.0f) k->scale(factor, unit_of(rows), n);
    for (size_t q = 0; q < n_queries; q++) {
        sums->weight[q] += k->dot(weights + q * stride, ones, n);
        sums->scaled[q] += k->dot(weights + q * stride, factor, n);
    }
    return k->plane_sums(sums->out, weights, stride, n_queries, upper_of(rows) + from * sqz_plane_bytes(head_dim),
                         lower_at(rows, from, head_dim), factor, index ? local : NULL, n, head_dim);
}

/* Turns the sums back and adds them to the output. */
static void add_turned(float *out, struct turned_sums *sums, size_t n_queries, const struct sqz_rows *rows,
                       size_t head_dim)
{
    const size_t numbers = 2 * sqz_plane_bytes(head_dim);
    for (size_t q = 0; q < n_queries; q++) {
        const float middle = (middle_of(rows) - 0.5f) * sums->scaled[q], weight = sums->weight[q];
        float *x = sums->out + q * numbers, *to = out + q * head_dim;
        for (size_t i = 0; i < head_dim; i++) x[i] -= middle;
        sqz_turn(x, head_dim);
        for (size_t i = 0; i < head_dim; i++) to[i] += x[i] + weight * rows->mean[i];
    }
}

size_t sqz_plane_accumulate(float *out, const float *weights, size_t stride, size_t n_queries,
                            const struct sqz_rows *rows, const uint32_t *index, size_t first, size_t n, size_t head_dim)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const size_t row_bytes = sqz_row_bytes(rows->type, head_dim), whole_bytes = head_dim * sizeof(uint16_t);
    struct turned_sums sums;
    size_t bytes = 0, n_read = 0;
    memset(sums.out, 0, n_queries * 2 * sqz_plane_bytes(head_dim) * sizeof *sums.out);
    memset(sums.weight, 0, sizeof sums.weight);
    memset(sums.scaled, 0, sizeof sums.scaled);
    for (size_t i = 0, end; i < n; i = end) {
        const size_t row = row_at(index, first, i);
        end = end_of_kind(rows, index, first, i, n);
        if (row >= rows->planes.n_whole) {
            if (end - i > PART) end = i + PART;
            n_read +=
                add_part(&sums, weights + i, stride, n_queries, rows, index ? index + i : NULL, row, end - i, head_dim);
        } else {
            const uint16_t *from = rows->planes.whole + (index ? 0 : row * head_dim);
            bytes += whole_bytes * k->row_accumulate(out, weights + i, stride, n_queries, from,
                                                     index ? index + i : NULL, end - i, head_dim);
        }
    }
    if (n_read) add_turned(out, &sums, n_queries, rows, head_dim);
    return bytes + n_read * row_bytes;
}

/* ---- As floats ---------------------------------------------------------------------------- */

/* What a row of the planes is turned into, without the step: [head_dim rounded up to 32]. */
static void unpack(float *out, const struct sqz_rows *rows, size_t at, size_t head_dim)
{
    const size_t bytes = sqz_plane_bytes(head_dim);
    const uint8_t *upper = upper_of(rows) + at * bytes, *lower = lower_at(rows, at, head_dim);
    const float middle = middle_of(rows) - 0.5f;
    for (size_t b = 0; b < bytes; b += 16, out += 32)
        for (size_t i = 0; i < 16; i++) {
            const unsigned u = upper[b + i], l = lower ? lower[b + i] : 0;
            const unsigned low = lower ? (u & 15) << 4 | (l & 15) : u & 15, high = lower ? (u & 240) | l >> 4 : u >> 4;
            out[i] = (float)(int)low - middle;
            out[i + 16] = (float)(int)high - middle;
        }
}

/* What row number `at` of the planes is relative to. *cluster: whose centroid `row` holds already. */
static const float *base_of(const struct sqz_rows *rows, size_t at, float *row, uint32_t *cluster, size_t head_dim)
{
    const struct sqz_centres *c = &rows->planes.centres;
    if (!c->type) return rows->mean;
    const uint32_t now = cluster_of(c, *cluster < c->n ? *cluster : 0, (uint32_t)at);
    if (now != *cluster) {
        const struct sqz_rows centres = centre_rows(c);
        sqz_plain_to_f32(row, &centres, now, 1, head_dim);
        *cluster = now;
    }
    return row;
}

void sqz_plane_to_f32(float *out, const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const size_t n_whole = rows->planes.n_whole, in_whole = first < n_whole ? n_whole - first : 0;
    const size_t whole = in_whole < n ? in_whole : n;
    float x[MAX_NUMBERS], centre[MAX_NUMBERS];
    uint32_t cluster = UINT32_MAX;
    if (whole) k->f16_to_f32(out, rows->planes.whole + first * head_dim, whole * head_dim);
    for (size_t r = first + whole; r < first + n; r++) {
        float step, *to = out + (r - first) * head_dim;
        const float *base = base_of(rows, r - n_whole, centre, &cluster, head_dim);
        k->f16_to_f32(&step, rows->planes.step + r - n_whole, 1);
        step *= unit_of(rows);
        unpack(x, rows, r - n_whole, head_dim);
        sqz_turn(x, head_dim);
        for (size_t i = 0; i < head_dim; i++) to[i] = base[i] + step * x[i];
    }
}

/* ---- Writing ------------------------------------------------------------------------------- */

/* An eighth of the largest number as F16, not below it: nothing is cut off. What F16 has no number for gets its
 * largest. */
static uint16_t step_of(const float *x, size_t n)
{
    const uint16_t most = 0x7bff;
    float largest = 0, rounded;
    uint16_t step;
    for (size_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(x[i]));
    largest /= 8;
    sqz_kernels_get()->f32_to_f16(&step, &largest, 1);
    if (step > most) return most;
    sqz_kernels_get()->f16_to_f32(&rounded, &step, 1);
    return rounded < largest && step < most ? (uint16_t)(step + 1) : step;
}

void sqz_plane_store(const struct sqz_rows *rows, size_t at, const float *row, size_t head_dim)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const size_t n_whole = rows->planes.n_whole, bytes = sqz_plane_bytes(head_dim);
    if (at < n_whole) {
        k->f32_to_f16((uint16_t *)(uintptr_t)rows->planes.whole + at * head_dim, row, head_dim);
        return;
    }
    float x[MAX_NUMBERS], centre[MAX_NUMBERS], step;
    uint32_t cluster = UINT32_MAX;
    const size_t local = at - n_whole;
    const float *base = base_of(rows, local, centre, &cluster, head_dim);
    uint8_t *upper = (uint8_t *)(uintptr_t)rows->data + local * bytes;
    uint8_t *lower = (uint8_t *)(uintptr_t)lower_at(rows, local, head_dim);
    uint16_t *half = (uint16_t *)(uintptr_t)rows->planes.step + local;
    for (size_t i = 0; i < head_dim; i++) x[i] = row[i] - base[i];
    sqz_turn(x, head_dim);
    *half = step_of(x, head_dim);
    k->f16_to_f32(&step, half, 1);
    const float inverse = step > 0 ? 16.0f / step : 0.0f;
    memset(upper, 0, bytes);
    if (lower) memset(lower, 0, bytes);
    for (size_t i = 0; i < head_dim; i++) {
        const float y = floorf(x[i] * inverse); /* NaN becomes the smallest */
        const unsigned u = (unsigned)(y >= 127.0f ? 255 : y > -128.0f ? (int)y + 128 : 0);
        const size_t byte = i / 32 * 16 + i % 16, shift = i % 32 < 16 ? 0 : 4;
        upper[byte] |= (uint8_t)(u >> 4 << shift);
        if (lower) lower[byte] |= (uint8_t)((u & 15) << shift);
    }
}
