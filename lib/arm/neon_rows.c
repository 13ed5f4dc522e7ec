/*
 * The kernels with NEON that read rows of keys and values.
 *
 * A conversion from F16 takes a floating point pipe like a multiplication does,
 * and some cores convert on one pipe only. So every vector of a row is
 * converted once for all queries of a tile, and tiles are as large as the
 * registers allow. Weights come from lanes (fmla by element), which saves the
 * instructions that would spread them. Tiles are functions of constants,
 * inlined and unrolled.
 */
#if defined(__aarch64__)

#include "neon.h"

#include <string.h>

#include "../kernels.h"

#define TILE_QUERIES 4    /* most queries of a tile */
#define AHEAD_BYTES  4096 /* how far ahead rows are asked for: 8 F16 rows of the largest head_dim */

/* How many of the n queries left go into the next tile: as many as fit, fewer where that avoids a lone query at the
 * end, since the tiles of one query are bound by the conversions. */
INLINE size_t next_queries(size_t n)
{
    return n > TILE_QUERIES && n % TILE_QUERIES == 1 ? TILE_QUERIES - 1 : smaller(n, TILE_QUERIES);
}

/* ---- row_logits --------------------------------------------------------------------------------- */

/* n_queries x n_tile logits, both constants: up to 16 sums stay in registers, beside two vectors of each query. Of a
 * short tile the first n_valid are stored. ahead: n_tile rows are asked for AHEAD_BYTES behind the first. */
INLINE void logits_of_rows(float *logits, size_t stride, const float *queries, size_t n_queries,
                           const uint16_t *const *row, size_t n_tile, size_t n_valid, bool ahead, size_t head_dim,
                           float scale)
{
    float32x4_t sum[16];

    UNROLL
    for (size_t i = 0; i < n_queries * n_tile; i++) sum[i] = zero();
    for (size_t i = 0; i < head_dim; i += 8) {
        float32x4_t query[TILE_QUERIES][2], x[2];

        /* The rows of a tile are neighbours: this step reads n_tile * 16 bytes, and as many are asked for. */
        if (ahead) {
            UNROLL
            for (size_t line = 0; line < n_tile * 16; line += LINE_BYTES)
                prefetch(row[0], AHEAD_BYTES + i * n_tile * 2 + line);
        }
        UNROLL
        for (size_t q = 0; q < n_queries; q++) {
            query[q][0] = vld1q_f32(queries + q * head_dim + i);
            query[q][1] = vld1q_f32(queries + q * head_dim + i + 4);
        }
        UNROLL
        for (size_t r = 0; r < n_tile; r++) {
            load_halves(x, row[r] + i);
            if (r % 2) KEEP_LOADS_BELOW();
            UNROLL
            for (size_t q = 0; q < n_queries; q++)
                sum[q * n_tile + r] = vfmaq_f32(sum[q * n_tile + r], query[q][0], x[0]);
            UNROLL
            for (size_t q = 0; q < n_queries; q++)
                sum[q * n_tile + r] = vfmaq_f32(sum[q * n_tile + r], query[q][1], x[1]);
        }
    }
    UNROLL
    for (size_t q = 0; q < n_queries; q++) {
        UNROLL
        for (size_t r = 0; r < n_tile; r += 4) {
            const float32x4_t *s = sum + q * n_tile + r;
            const float32x4_t total = vpaddq_f32(vpaddq_f32(s[0], s[1]), vpaddq_f32(s[2], s[3]));

            if (r < n_valid) store_part(logits + q * stride + r, n_valid - r, vmulq_n_f32(total, scale));
        }
    }
}

/* The rows are neighbours. A short tile repeats its last one instead of reading past it. */
INLINE void logits_tile(float *logits, size_t stride, const float *queries, size_t n_queries, const uint16_t *rows,
                        size_t n_tile, size_t n_valid, bool ahead, size_t head_dim, float scale)
{
    const uint16_t *row[8];

    UNROLL
    for (size_t r = 0; r < n_tile; r++) row[r] = rows + (n_valid >= n_tile ? r : smaller(r, n_valid - 1)) * head_dim;
    logits_of_rows(logits, stride, queries, n_queries, row, n_tile, n_valid, ahead, head_dim, scale);
}

/* n_known >= n_rows rows lie behind one another: what is asked for ahead is never past them. */
INLINE void logits_rows(float *logits, size_t stride, const float *queries, size_t n_queries, const uint16_t *rows,
                        size_t n_rows, size_t n_known, size_t n_tile, size_t head_dim, float scale)
{
    const size_t n_far = AHEAD_BYTES / (head_dim * sizeof rows[0]) + n_tile;
    size_t r = 0;

    for (; r + n_far <= n_known && r + n_tile <= n_rows; r += n_tile)
        logits_tile(logits + r, stride, queries, n_queries, rows + r * head_dim, n_tile, n_tile, true, head_dim, scale);
    for (; r + n_tile <= n_rows; r += n_tile) {
        logits_tile(logits + r, stride, queries, n_queries, rows + r * head_dim, n_tile, n_tile, false, head_dim,
                    scale);
    }
    if (n_tile > 4 && r + 4 <= n_rows) {
        logits_tile(logits + r, stride, queries, n_queries, rows + r * head_dim, 4, 4, false, head_dim, scale);
        r += 4;
    }
    if (r < n_rows)
        logits_tile(logits + r, stride, queries, n_queries, rows + r * head_dim, 4, n_rows - r, false, head_dim, scale);
}

void sqz_row_logits_neon(float *logits, size_t stride, const float *queries, size_t n_queries, const uint16_t *rows,
                         size_t n_rows, size_t head_dim, float scale)
{
    /* Where several tiles share the rows, they do so block by block out of the first-level cache. A block is as long as
     * the prefetch distance, so that the first tile asks for the whole next block. */
    const size_t rows_ahead = AHEAD_BYTES / (head_dim * sizeof rows[0]) / 8 * 8;
    const size_t block = n_queries > TILE_QUERIES ? rows_ahead : n_rows;

    for (size_t r = 0; r < n_rows; r += block) {
        const size_t n = smaller(block, n_rows - r), known = n_rows - r;
        const uint16_t *first = rows + r * head_dim;

        for (size_t q = 0, count; q < n_queries; q += count) {
            const float *query = queries + q * head_dim;
            float *out = logits + q * stride + r;

            count = next_queries(n_queries - q);
            switch (count) {
            case 1: logits_rows(out, stride, query, 1, first, n, known, 8, head_dim, scale); break;
            case 2: logits_rows(out, stride, query, 2, first, n, known, 8, head_dim, scale); break;
            case 3: logits_rows(out, stride, query, 3, first, n, known, 4, head_dim, scale); break;
            default: logits_rows(out, stride, query, 4, first, n, known, 4, head_dim, scale); break;
            }
        }
    }
}

/* ---- row_logits_i8 ------------------------------------------------------------------------------ */

/* As logits_tile(), four rows. Integers of 16 bits are multiplied into sums of 32, one of which could hold all the 256
 * products of at most 127 * 32767. */
INLINE void logits_i8_of_rows(float *logits, size_t stride, const int16_t *queries, size_t query_stride,
                              const float *query_factor, size_t n_queries, const int8_t *const *row, float32x4_t factor,
                              size_t n_valid, bool ahead, size_t head_dim)
{
    int32x4_t sum[TILE_QUERIES][4];

    UNROLL
    for (size_t r = 0; r < 4; r++) {
        UNROLL
        for (size_t q = 0; q < n_queries; q++) sum[q][r] = vdupq_n_s32(0);
    }
    for (size_t i = 0; i < head_dim; i += 16) {
        int16x8_t query[TILE_QUERIES][2];

        if (ahead) prefetch(row[0], AHEAD_BYTES + i * 4);
        UNROLL
        for (size_t q = 0; q < n_queries; q++) {
            query[q][0] = vld1q_s16(queries + q * query_stride + i);
            query[q][1] = vld1q_s16(queries + q * query_stride + i + 8);
        }
        UNROLL
        for (size_t r = 0; r < 4; r++) {
            const int8x16_t bytes = vld1q_s8(row[r] + i);
            const int16x8_t x[2] = {vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)};

            if (r % 2) KEEP_LOADS_BELOW();
            UNROLL
            for (size_t j = 0; j < 2; j++) {
                UNROLL
                for (size_t q = 0; q < n_queries; q++)
                    sum[q][r] = vmlal_s16(sum[q][r], vget_low_s16(x[j]), vget_low_s16(query[q][j]));
                UNROLL
                for (size_t q = 0; q < n_queries; q++) sum[q][r] = vmlal_high_s16(sum[q][r], x[j], query[q][j]);
            }
        }
    }
    UNROLL
    for (size_t q = 0; q < n_queries; q++) {
        const int32x4_t *s = sum[q];
        const float32x4_t total = vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(s[0], s[1]), vpaddq_s32(s[2], s[3])));

        store_part(logits + q * stride, n_valid, vmulq_f32(vmulq_n_f32(factor, query_factor[q]), total));
    }
}

/* The rows are neighbours. A short tile repeats its last one instead of reading past it. */
INLINE void logits_i8_tile(float *logits, size_t stride, const int16_t *queries, size_t query_stride,
                           const float *query_factor, size_t n_queries, const int8_t *rows, const float *row_factor,
                           size_t n_valid, bool ahead, size_t head_dim)
{
    const int8_t *row[4];

    UNROLL
    for (size_t r = 0; r < 4; r++) row[r] = rows + (n_valid >= 4 ? r : smaller(r, n_valid - 1)) * head_dim;
    logits_i8_of_rows(logits, stride, queries, query_stride, query_factor, n_queries, row,
                      load_part(row_factor, n_valid, zero()), n_valid, ahead, head_dim);
}

INLINE void logits_i8_rows(float *logits, size_t stride, const int16_t *queries, size_t query_stride,
                           const float *query_factor, size_t n_queries, const int8_t *rows, const float *row_factor,
                           size_t n_rows, size_t n_known, size_t head_dim)
{
    const size_t n_far = AHEAD_BYTES / head_dim + 4;
    size_t r = 0;

    for (; r + n_far <= n_known && r + 4 <= n_rows; r += 4) {
        logits_i8_tile(logits + r, stride, queries, query_stride, query_factor, n_queries, rows + r * head_dim,
                       row_factor + r, 4, true, head_dim);
    }
    for (; r < n_rows; r += 4) {
        logits_i8_tile(logits + r, stride, queries, query_stride, query_factor, n_queries, rows + r * head_dim,
                       row_factor + r, smaller(4, n_rows - r), false, head_dim);
    }
}

void sqz_row_logits_i8_neon(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                            size_t n_queries, const int8_t *rows, const float *row_factor, size_t n_rows,
                            size_t head_dim)
{
    const size_t d = head_dim, qs = (d + 31) / 32 * 32;
    const size_t block = n_queries > TILE_QUERIES ? AHEAD_BYTES / d / 4 * 4 : n_rows; /* as for F16 rows */

    for (size_t r = 0; r < n_rows; r += block) {
        const size_t n = smaller(block, n_rows - r), known = n_rows - r;
        const int8_t *first = rows + r * d;
        const float *row = row_factor + r;

        for (size_t q = 0, count; q < n_queries; q += count) {
            const int16_t *query = queries + q * qs;
            const float *factor = query_factor + q;
            float *out = logits + q * stride + r;

            count = next_queries(n_queries - q);
            switch (count) {
            case 1: logits_i8_rows(out, stride, query, qs, factor, 1, first, row, n, known, d); break;
            case 2: logits_i8_rows(out, stride, query, qs, factor, 2, first, row, n, known, d); break;
            case 3: logits_i8_rows(out, stride, query, qs, factor, 3, first, row, n, known, d); break;
            default: logits_i8_rows(out, stride, query, qs, factor, 4, first, row, n, known, d); break;
            }
        }
    }
}

/* ---- Listed rows -------------------------------------------------------------------------------- */

/* x86/kernels_template.h says why each tile asks for rows this far down the list. */
#define LISTED_AHEAD_BYTES 8192
#define LISTED_AHEAD_ROWS  64
#define LISTED_BLOCK       32 /* rows that several tiles of queries share go through them in blocks; the first tile asks */

INLINE void ask_listed(const void *rows, size_t row_bytes, const uint32_t *index, size_t n_listed, size_t n_tile)
{
    const size_t n_ahead = smaller(LISTED_AHEAD_ROWS, LISTED_AHEAD_BYTES / row_bytes);

    for (size_t r = n_ahead; r < n_ahead + n_tile && r < n_listed; r++)
        for (size_t i = 0; i < row_bytes; i += LINE_BYTES) prefetch(rows, (size_t)index[r] * row_bytes + i);
}

INLINE void listed_rows(float *logits, size_t stride, const float *queries, size_t n_queries, const uint16_t *rows,
                        const uint32_t *index, size_t n_rows, size_t n_listed, size_t n_tile, size_t head_dim,
                        float scale)
{
    for (size_t r = 0; r < n_rows; r += n_tile) {
        const size_t n_valid = smaller(n_tile, n_rows - r);
        const uint16_t *row[8];

        if (n_listed > 0) ask_listed(rows, head_dim * sizeof rows[0], index + r, n_listed - r, n_tile);
        UNROLL
        for (size_t j = 0; j < n_tile; j++) row[j] = rows + (size_t)index[r + smaller(j, n_valid - 1)] * head_dim;
        logits_of_rows(logits + r, stride, queries, n_queries, row, n_tile, n_valid, false, head_dim, scale);
    }
}

void sqz_listed_logits_neon(float *logits, size_t stride, const float *queries, size_t n_queries, const uint16_t *rows,
                            const uint32_t *index, size_t n_rows, size_t n_listed, size_t head_dim, float scale)
{
    const size_t block = n_queries > TILE_QUERIES ? LISTED_BLOCK : n_rows;

    for (size_t r = 0; r < n_rows; r += block) {
        const size_t n = smaller(block, n_rows - r);
        const uint32_t *at = index + r;

        for (size_t q = 0, count; q < n_queries; q += count) {
            const size_t listed = q == 0 ? n_listed - r : 0;
            const float *query = queries + q * head_dim;
            float *out = logits + q * stride + r;

            count = next_queries(n_queries - q);
            switch (count) {
            case 1: listed_rows(out, stride, query, 1, rows, at, n, listed, 8, head_dim, scale); break;
            case 2: listed_rows(out, stride, query, 2, rows, at, n, listed, 8, head_dim, scale); break;
            case 3: listed_rows(out, stride, query, 3, rows, at, n, listed, 4, head_dim, scale); break;
            default: listed_rows(out, stride, query, 4, rows, at, n, listed, 4, head_dim, scale); break;
            }
        }
    }
}

INLINE void listed_i8_rows(float *logits, size_t stride, const int16_t *queries, size_t query_stride,
                           const float *query_factor, size_t n_queries, const int8_t *rows, const float *row_factor,
                           const uint32_t *index, size_t n_rows, size_t n_listed, size_t head_dim)
{
    for (size_t r = 0; r < n_rows; r += 4) {
        const size_t n_valid = smaller(4, n_rows - r);
        const int8_t *row[4];
        float factor[4];

        if (n_listed > 0) {
            ask_listed(rows, head_dim, index + r, n_listed - r, 4);
            if (r + LISTED_AHEAD_ROWS < n_listed) /* a line of factors serves 16 neighbours */
                prefetch(row_factor, (size_t)index[r + LISTED_AHEAD_ROWS] * sizeof row_factor[0]);
        }
        UNROLL
        for (size_t j = 0; j < 4; j++) {
            const size_t at = index[r + smaller(j, n_valid - 1)];

            row[j] = rows + at * head_dim;
            factor[j] = row_factor[at];
        }
        logits_i8_of_rows(logits + r, stride, queries, query_stride, query_factor, n_queries, row, vld1q_f32(factor),
                          n_valid, false, head_dim);
    }
}

void sqz_listed_logits_i8_neon(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                               size_t n_queries, const int8_t *rows, const float *row_factor, const uint32_t *index,
                               size_t n_rows, size_t n_listed, size_t head_dim)
{
    const size_t d = head_dim, qs = (d + 31) / 32 * 32, block = n_queries > TILE_QUERIES ? LISTED_BLOCK : n_rows;

    for (size_t r = 0; r < n_rows; r += block) {
        const size_t n = smaller(block, n_rows - r);
        const uint32_t *at = index + r;

        for (size_t q = 0, count; q < n_queries; q += count) {
            const size_t listed = q == 0 ? n_listed - r : 0;
            const int16_t *query = queries + q * qs;
            const float *factor = query_factor + q;
            float *out = logits + q * stride + r;

            count = next_queries(n_queries - q);
            switch (count) {
            case 1: listed_i8_rows(out, stride, query, qs, factor, 1, rows, row_factor, at, n, listed, d); break;
            case 2: listed_i8_rows(out, stride, query, qs, factor, 2, rows, row_factor, at, n, listed, d); break;
            case 3: listed_i8_rows(out, stride, query, qs, factor, 3, rows, row_factor, at, n, listed, d); break;
            default: listed_i8_rows(out, stride, query, qs, factor, 4, rows, row_factor, at, n, listed, d); break;
            }
        }
    }
}

/* ---- row_accumulate ----------------------------------------------------------------------------- */

#define LIST_ROWS  64 /* rows whose weights are looked at together */
#define LIST_AHEAD 64 /* rows of the smallest head_dim, 32, in AHEAD_BYTES */
_Static_assert(LIST_AHEAD * 32 * sizeof(uint16_t) >= AHEAD_BYTES, "the list holds all rows asked for ahead");

/* The weights of four listed rows. */
INLINE float32x4_t load_weights(const float *weights, const uint32_t *column)
{
    float32x4_t v = vld1q_dup_f32(weights + column[0]);

    v = vld1q_lane_f32(weights + column[1], v, 1);
    v = vld1q_lane_f32(weights + column[2], v, 2);
    return vld1q_lane_f32(weights + column[3], v, 3);
}

INLINE void ask_for_row(const uint16_t *row, size_t head_dim)
{
    for (size_t i = 0; i < head_dim; i += LINE_BYTES / sizeof row[0]) prefetch(row + i, 0);
}

/* Adds eight listed rows into n_queries rows of out, a constant. The sums pass through the first-level cache: that
 * costs a load and a store for eight FMAs, and lets whole rows stream by once, in order, for any head_dim. column[r]
 * is where the weights of row at[r] stand. The rows n_ahead entries further down the list are asked for. */
INLINE void accumulate_8(float *out, const float *weights, size_t stride, size_t n_queries, const uint16_t *rows,
                         const uint32_t *column, const uint32_t *at, size_t n_ahead, size_t head_dim)
{
    const uint16_t *row[8];
    float32x4_t weight[TILE_QUERIES][2];

    UNROLL
    for (size_t r = 0; r < 8; r++) {
        row[r] = rows + (size_t)at[r] * head_dim;
        ask_for_row(rows + (size_t)at[r + n_ahead] * head_dim, head_dim);
    }
    UNROLL
    for (size_t q = 0; q < n_queries; q++) {
        weight[q][0] = load_weights(weights + q * stride, column);
        weight[q][1] = load_weights(weights + q * stride, column + 4);
    }
    for (size_t i = 0; i < head_dim; i += 8) {
        float32x4_t sum[TILE_QUERIES][2], x[4][2];

        UNROLL
        for (size_t q = 0; q < n_queries; q++) {
            sum[q][0] = vld1q_f32(out + q * head_dim + i);
            sum[q][1] = vld1q_f32(out + q * head_dim + i + 4);
            KEEP_LANES(weight[q][0]);
            KEEP_LANES(weight[q][1]);
        }
        UNROLL
        for (size_t half = 0; half < 2; half++) {
            UNROLL
            for (size_t r = 0; r < 4; r++) load_halves(x[r], row[4 * half + r] + i);
            KEEP_LOADS_BELOW();
            UNROLL
            for (size_t qv = 0; qv < 2 * n_queries; qv++) {
                const size_t q = qv / 2, v = qv % 2;

                sum[q][v] = vfmaq_laneq_f32(sum[q][v], x[0][v], weight[q][half], 0);
                sum[q][v] = vfmaq_laneq_f32(sum[q][v], x[1][v], weight[q][half], 1);
                sum[q][v] = vfmaq_laneq_f32(sum[q][v], x[2][v], weight[q][half], 2);
                sum[q][v] = vfmaq_laneq_f32(sum[q][v], x[3][v], weight[q][half], 3);
            }
        }
        UNROLL
        for (size_t q = 0; q < n_queries; q++) {
            vst1q_f32(out + q * head_dim + i, sum[q][0]);
            vst1q_f32(out + q * head_dim + i + 4, sum[q][1]);
        }
    }
}

/* The same for the rows left at the end of the list, one at a time; what they could ask for was asked for before. */
INLINE void accumulate_1(float *out, const float *weights, size_t stride, size_t n_queries, const uint16_t *row,
                         size_t head_dim)
{
    for (size_t i = 0; i < head_dim; i += 8) {
        float32x4_t x[2];

        load_halves(x, row + i);
        UNROLL
        for (size_t q = 0; q < n_queries; q++) {
            float *sum = out + q * head_dim + i;
            const float weight = weights[q * stride];

            vst1q_f32(sum, vfmaq_n_f32(vld1q_f32(sum), x[0], weight));
            vst1q_f32(sum + 4, vfmaq_n_f32(vld1q_f32(sum + 4), x[1], weight));
        }
    }
}

INLINE void accumulate_list(float *out, const float *weights, size_t stride, size_t n_queries, const uint16_t *rows,
                            const uint32_t *column, const uint32_t *at, size_t n, size_t n_ahead, size_t head_dim)
{
    size_t j = 0;

    for (; j + 8 <= n; j += 8)
        accumulate_8(out, weights, stride, n_queries, rows, column + j, at + j, n_ahead, head_dim);
    for (; j < n; j++)
        accumulate_1(out, weights + column[j], stride, n_queries, rows + (size_t)at[j] * head_dim, head_dim);
}

/* Appends to list the columns of [first, first + n) that have a weight other than zero; returns how many. Writes up to
 * LANES entries more than that. Without a branch on the weights: live columns come in irregular patterns. */
INLINE size_t list_live(uint32_t *list, const float *weights, size_t stride, size_t n_queries, size_t first, size_t n)
{
    size_t n_live = 0;

    for (size_t r = 0; r < n; r += LANES) {
        uint32x4_t bits = vdupq_n_u32(0);
        uint64_t live;

        for (size_t q = 0; q < n_queries; q++) {
            const float32x4_t w = load_part(weights + q * stride + first + r, n - r, zero());
            bits = vorrq_u32(bits, vreinterpretq_u32_f32(w));
        }
        bits = vtstq_u32(bits, vdupq_n_u32(0x7fffffff)); /* all ones but for 0 and -0 */
        live = vget_lane_u64(vreinterpret_u64_u16(vmovn_u32(bits)), 0);
        UNROLL
        for (size_t j = 0; j < LANES; j++) {
            list[n_live] = (uint32_t)(first + r + j);
            n_live += live >> 16 * j & 1;
        }
    }
    return n_live;
}

size_t sqz_row_accumulate_neon(float *out, const float *weights, size_t stride, size_t n_queries, const uint16_t *rows,
                               const uint32_t *index, size_t n_rows, size_t head_dim)
{
    const size_t n_ahead = AHEAD_BYTES / (head_dim * sizeof rows[0]);
    /* Live columns in order, and the rows they belong to: those to add, then those to ask for. */
    uint32_t column[2 * LIST_ROWS + LIST_AHEAD + LANES], other[2 * LIST_ROWS + LIST_AHEAD + LANES];
    uint32_t *at = index ? other : column;
    size_t n_listed = 0, seen = 0, n_read = 0;

    for (;;) {
        size_t n;

        while (seen < n_rows && n_listed < LIST_ROWS + n_ahead) {
            const size_t n_new = smaller(LIST_ROWS, n_rows - seen), before = n_listed;

            n_listed += list_live(column + n_listed, weights, stride, n_queries, seen, n_new);
            for (size_t j = before; index && j < n_listed; j++) at[j] = index[column[j]];
            seen += n_new;
        }
        if (n_listed == 0) return n_read;
        n = smaller(LIST_ROWS, n_listed);
        for (size_t j = n_listed; j < n + n_ahead; j++) {
            column[j] = column[n_listed - 1];
            at[j] = at[n_listed - 1];
        }
        for (size_t j = 0; n_read == 0 && j < smaller(n_ahead, n_listed); j++) /* nobody asked for the first rows */
            ask_for_row(rows + (size_t)at[j] * head_dim, head_dim);
        for (size_t q = 0, count; q < n_queries; q += count) {
            const float *w = weights + q * stride;
            float *sum = out + q * head_dim;

            count = next_queries(n_queries - q);
            switch (count) {
            case 1: accumulate_list(sum, w, stride, 1, rows, column, at, n, n_ahead, head_dim); break;
            case 2: accumulate_list(sum, w, stride, 2, rows, column, at, n, n_ahead, head_dim); break;
            case 3: accumulate_list(sum, w, stride, 3, rows, column, at, n, n_ahead, head_dim); break;
            default: accumulate_list(sum, w, stride, 4, rows, column, at, n, n_ahead, head_dim); break;
            }
        }
        n_read += n;
        n_listed -= n;
        memmove(column, column + n, n_listed * sizeof column[0]);
        if (index) memmove(at, at + n, n_listed * sizeof at[0]);
    }
}

#else
typedef int sqz_neon_rows_needs_aarch64; /* ISO C wants a declaration in every file */
#endif
