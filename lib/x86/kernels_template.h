/*
 * The bodies of the x86 kernels, written once for any vector width. Included by
 * kernels_avx2.c and kernels_avx512.c after they define:
 *
 *   TARGET            target attribute of every function
 *   KERNELS, NAME     the table to define and its name
 *   VEC, VEC_LEN      vector of floats (8 or 16), its length
 *   TILE_QUERIES      most queries of a tile of the row kernels, 3 or 4: four rows times so many sums fit the registers
 *   GEMM_VECS         vectors across a 6-row tile of gemm
 *   vec_zero, vec_set1, vec_load, vec_store, vec_load_half (F16 -> F32), vec_add, vec_sub, vec_mul, vec_or,
 *   vec_max(x, m)             m where x is NaN
 *   vec_fma(a, b, c)          a * b + c
 *   vec_load_part(p, n, other), vec_store_part(p, n, v)   the first n < VEC_LEN lanes; nothing else is touched
 *   vec_store_half(p, v)      F32 -> F16, all lanes
 *   vec_select_less(a, b, x, y)   a < b ? x : y
 *   vec_add_exponent(p, n)    the low 9 bits of n added to sign and exponent of p
 *   vec_sum, vec_largest      horizontal
 *   vec_sum4(a, b, c, d)      the four horizontal sums, one __m128
 *   vec_live(bits)            mask of the lanes that are neither 0 nor -0
 *   vec_table(p, index)       p[lowest 4 bits of each index]
 *   index_load(p), index_load_part(p, n) (zeros above), index_shift_4(index)
 *   index_of, vec_of          the same bits; index_set1, index_sub, index_shift_left_23, index_shift_right_23 (signed)
 *   vec_at_least(a, b)        mask of the lanes where a >= b
 *   vec_div
 *   INDEX, index_start, index_add, index_store, vec_update_largest   for argmax_biased
 *   store_columns(dst, low, high)   16 F16 of two registers -> 16 floats
 *   WORDS                     vector of 2 * VEC_LEN 16-bit integers
 *   words_zero, words_load(p), words_widen(p) (INT8 -> INT16), words_widen_16(p) (16 of them, zeros above)
 *   words_dot(sum, a, b)      sum + products of neighbours added in pairs, 32-bit lanes; words_to_float(sum)
 *   words_set1, words_and, words_left_4, words_right_4, words_join(mask, a, b) (bits of a where the mask has ones, else b)
 *   bytes_words(p, n)         as many bytes of n (16 or more) as there are words, zero-extended, zeros above
 *   words_low(p, n), words_high(p, n)   the words of queries that numbers of the lower and of the upper halves of those
 *                             bytes go with: of every 32 the first, and the last 16
 *   bytes_index(p)            VEC_LEN bytes as 32-bit integers; index_and, index_join, index_left_4, vec_of_index (as floats)
 *   vec_swap_1, _2, _4, _8    lanes exchanged with those whose number differs in that bit (_8: 16 lanes alone)
 *
 * Speed: on Zen 3 the converting load vcvtph2ps runs once a cycle and FMA twice, so every F16 row vector is
 * converted once for all queries of a tile, and tiles keep at least 8 independent sums (FMA latency 4, two a
 * cycle). Tiles are functions of constants, inlined and unrolled.
 */
#include <math.h>
#include <string.h>

#include "../kernels_variants.h"
#include "squeeze_attention.h"

#define INLINE static inline __attribute__((always_inline)) TARGET
#define KERNEL static TARGET
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

/* Reading ahead of F16 rows, in bytes. Prefetch instructions never fault, so running past the end is harmless; the
 * address is formed as an integer because a pointer there would be undefined. */
#define AHEAD_BYTES 4096 /* 8 rows of the largest head_dim */
#define LINE_BYTES  64

INLINE void prefetch(const void *base, size_t offset_bytes)
{
    _mm_prefetch((const char *)((uintptr_t)base + offset_bytes), _MM_HINT_T1);
}

INLINE size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* ---- Conversions -------------------------------------------------------------------------------- */

KERNEL void f16_to_f32(float *dst, const uint16_t *src, size_t n)
{
    size_t i = 0;

    for (; i + VEC_LEN <= n; i += VEC_LEN) vec_store(dst + i, vec_load_half(src + i));
    if (i < n) {
        uint16_t part[VEC_LEN] = {0};

        memcpy(part, src + i, (n - i) * sizeof part[0]);
        vec_store_part(dst + i, n - i, vec_load_half(part));
    }
}

KERNEL void f32_to_f16(uint16_t *dst, const float *src, size_t n)
{
    size_t i = 0;

    for (; i + VEC_LEN <= n; i += VEC_LEN) vec_store_half(dst + i, vec_load(src + i));
    if (i < n) {
        uint16_t part[VEC_LEN];

        vec_store_half(part, vec_load_part(src + i, n - i, vec_zero()));
        memcpy(dst + i, part, (n - i) * sizeof part[0]);
    }
}

/* ---- row_logits --------------------------------------------------------------------------------- */

/* sum[q * n_rows + r] = vector of partial products of query q and row r. n_queries, n_rows and ahead are constants. */
INLINE void multiply_tile(VEC *sum, const float *queries, size_t n_queries, const uint16_t *const *row, size_t n_rows,
                          bool ahead, size_t head_dim)
{
    UNROLL
    for (size_t i = 0; i < n_queries * n_rows; i++) sum[i] = vec_zero();
    for (size_t i = 0; i < head_dim; i += VEC_LEN) {
        VEC query[TILE_QUERIES];

        UNROLL
        for (size_t q = 0; q < n_queries; q++) query[q] = vec_load(queries + q * head_dim + i);
        /* The rows of a tile are neighbours: this step reads n_rows * VEC_LEN * 2 bytes, and as many are asked for. */
        if (ahead) {
            UNROLL
            for (size_t line = 0; line < n_rows * VEC_LEN * 2; line += LINE_BYTES)
                prefetch(row[0], AHEAD_BYTES + i * n_rows * 2 + line);
        }
        UNROLL
        for (size_t r = 0; r < n_rows; r++) {
            const VEC x = vec_load_half(row[r] + i);

            UNROLL
            for (size_t q = 0; q < n_queries; q++) sum[q * n_rows + r] = vec_fma(query[q], x, sum[q * n_rows + r]);
        }
    }
}

INLINE void store_logits(float *dst, __m128 value, size_t n)
{
    if (n >= 4) {
        _mm_storeu_ps(dst, value);
    } else {
        float lanes[4];

        _mm_storeu_ps(lanes, value);
        memcpy(dst, lanes, n * sizeof lanes[0]);
    }
}

/* The sums of a tile, of which n_valid <= n_tile rows are there. */
INLINE void store_tile(float *logits, size_t stride, const VEC *sum, size_t n_queries, size_t n_tile, size_t n_valid,
                       __m128 scale)
{
    UNROLL
    for (size_t q = 0; q < n_queries; q++) {
        UNROLL
        for (size_t r = 0; r < n_tile; r += 4) {
            const VEC *s = sum + q * n_tile + r;

            if (r < n_valid)
                store_logits(logits + q * stride + r, _mm_mul_ps(vec_sum4(s[0], s[1], s[2], s[3]), scale), n_valid - r);
        }
    }
}

/* Logits of n_valid <= n_tile rows; a short tile repeats its last row instead of reading past it. */
INLINE void logits_tile(float *logits, size_t stride, const float *queries, size_t n_queries, const uint16_t *rows,
                        size_t n_tile, size_t n_valid, bool ahead, size_t head_dim, __m128 scale)
{
    const uint16_t *row[8];
    VEC sum[16];

    UNROLL
    for (size_t r = 0; r < n_tile; r++) row[r] = rows + (n_valid >= n_tile ? r : smaller(r, n_valid - 1)) * head_dim;
    multiply_tile(sum, queries, n_queries, row, n_tile, ahead, head_dim);
    store_tile(logits, stride, sum, n_queries, n_tile, n_valid, scale);
}

/* n_known >= n_rows rows lie behind one another: what is asked for ahead is never past them. */
INLINE void logits_rows(float *logits, size_t stride, const float *queries, size_t n_queries, const uint16_t *rows,
                        size_t n_rows, size_t n_known, size_t n_tile, size_t head_dim, float scale)
{
    const __m128 scale4 = _mm_set1_ps(scale);
    const size_t n_far = AHEAD_BYTES / (head_dim * sizeof rows[0]) + n_tile;
    size_t r = 0;

    for (; r + n_far <= n_known && r + n_tile <= n_rows; r += n_tile) {
        logits_tile(logits + r, stride, queries, n_queries, rows + r * head_dim, n_tile, n_tile, true, head_dim,
                    scale4);
    }
    for (; r + n_tile <= n_rows; r += n_tile) {
        logits_tile(logits + r, stride, queries, n_queries, rows + r * head_dim, n_tile, n_tile, false, head_dim,
                    scale4);
    }
    if (n_tile > 4 && r + 4 <= n_rows) {
        logits_tile(logits + r, stride, queries, n_queries, rows + r * head_dim, 4, 4, false, head_dim, scale4);
        r += 4;
    }
    if (r < n_rows) {
        logits_tile(logits + r, stride, queries, n_queries, rows + r * head_dim, 4, n_rows - r, false, head_dim,
                    scale4);
    }
}

KERNEL void logits_rows_1(float *logits, size_t stride, const float *queries, const uint16_t *rows, size_t n_rows,
                          size_t n_known, size_t head_dim, float scale)
{
    logits_rows(logits, stride, queries, 1, rows, n_rows, n_known, 8, head_dim, scale);
}

KERNEL void logits_rows_2(float *logits, size_t stride, const float *queries, const uint16_t *rows, size_t n_rows,
                          size_t n_known, size_t head_dim, float scale)
{
    logits_rows(logits, stride, queries, 2, rows, n_rows, n_known, 4, head_dim, scale);
}

KERNEL void logits_rows_3(float *logits, size_t stride, const float *queries, const uint16_t *rows, size_t n_rows,
                          size_t n_known, size_t head_dim, float scale)
{
    logits_rows(logits, stride, queries, 3, rows, n_rows, n_known, 4, head_dim, scale);
}

#if TILE_QUERIES == 4
KERNEL void logits_rows_4(float *logits, size_t stride, const float *queries, const uint16_t *rows, size_t n_rows,
                          size_t n_known, size_t head_dim, float scale)
{
    logits_rows(logits, stride, queries, 4, rows, n_rows, n_known, 4, head_dim, scale);
}
#endif

/* How many of the n queries left go into the next tile: as many as fit, fewer where that avoids a lone query at the
 * end, since the tiles of one query are bound by the conversions. */
INLINE size_t next_queries(size_t n)
{
    return n > TILE_QUERIES && n % TILE_QUERIES == 1 ? TILE_QUERIES - 1 : smaller(n, TILE_QUERIES);
}

KERNEL void row_logits(float *logits, size_t stride, const float *queries, size_t n_queries, const uint16_t *rows,
                       size_t n_rows, size_t head_dim, float scale)
{
    /* Where several tiles share the rows, they do so block by block out of L1. A block is as long as the prefetch
     * distance, so that the first tile asks for the whole next block. */
    const size_t rows_ahead = AHEAD_BYTES / (head_dim * sizeof rows[0]) / 8 * 8;
    const size_t block = n_queries > TILE_QUERIES ? rows_ahead : n_rows;

    for (size_t r = 0; r < n_rows; r += block) {
        const size_t n = smaller(block, n_rows - r);
        const uint16_t *first = rows + r * head_dim;

        for (size_t q = 0, count; q < n_queries; q += count) {
            const float *query = queries + q * head_dim;
            float *out = logits + q * stride + r;

            count = next_queries(n_queries - q);
            switch (count) {
            case 1: logits_rows_1(out, stride, query, first, n, n_rows - r, head_dim, scale); break;
            case 2: logits_rows_2(out, stride, query, first, n, n_rows - r, head_dim, scale); break;
#if TILE_QUERIES == 4
            case 4: logits_rows_4(out, stride, query, first, n, n_rows - r, head_dim, scale); break;
#endif
            default: logits_rows_3(out, stride, query, first, n, n_rows - r, head_dim, scale); break;
            }
        }
    }
}

/* ---- row_logits_i8 ------------------------------------------------------------------------------ */

#define WORDS_LEN (2 * VEC_LEN)

/* n_queries x n_valid dot products in integers, n_valid <= 4; n_queries is a constant. A short tile repeats its last row.
 * Sums of a lane stay below 2^31: 256 products of at most 127 * 32767. The last 16 numbers of a row are widened by
 * themselves where a vector would reach past it. ahead: what is asked for, NULL for nothing. */
INLINE void logits_i8_tile(float *logits, size_t stride, const int16_t *queries, size_t query_stride,
                           const float *query_factor, size_t n_queries, const int8_t *const *row, const float *factor,
                           size_t n_valid, const int8_t *ahead, size_t head_dim)
{
    WORDS sum[TILE_QUERIES * 4];
    size_t i = 0;

    UNROLL
    for (size_t j = 0; j < n_queries * 4; j++) sum[j] = words_zero();
    for (; i + WORDS_LEN <= head_dim; i += WORDS_LEN) {
        if (ahead) {
            UNROLL
            for (size_t line = 0; line < 4 * WORDS_LEN; line += LINE_BYTES) prefetch(ahead, i * 4 + line);
        }
        UNROLL
        for (size_t r = 0; r < 4; r++) {
            const WORDS x = words_widen(row[r] + i);

            UNROLL
            for (size_t q = 0; q < n_queries; q++)
                sum[q * 4 + r] = words_dot(sum[q * 4 + r], x, words_load(queries + q * query_stride + i));
        }
    }
    if (i < head_dim) {
        UNROLL
        for (size_t r = 0; r < 4; r++) {
            const WORDS x = words_widen_16(row[r] + i);

            UNROLL
            for (size_t q = 0; q < n_queries; q++)
                sum[q * 4 + r] = words_dot(sum[q * 4 + r], x, words_load(queries + q * query_stride + i));
        }
    }
    UNROLL
    for (size_t q = 0; q < n_queries; q++) {
        const __m128 dot = vec_sum4(words_to_float(sum[q * 4]), words_to_float(sum[q * 4 + 1]),
                                    words_to_float(sum[q * 4 + 2]), words_to_float(sum[q * 4 + 3]));

        store_logits(logits + q * stride,
                     _mm_mul_ps(dot, _mm_mul_ps(_mm_set1_ps(query_factor[q]), _mm_loadu_ps(factor))), n_valid);
    }
}

INLINE void logits_i8_rows(float *logits, size_t stride, const int16_t *queries, size_t query_stride,
                           const float *query_factor, size_t n_queries, const int8_t *rows, const float *row_factor,
                           size_t n_rows, size_t head_dim)
{
    for (size_t r = 0; r < n_rows; r += 4) {
        const size_t n_valid = smaller(4, n_rows - r);
        const int8_t *first = rows + r * head_dim, *row[4];
        float factor[4] = {0};

        UNROLL
        for (size_t j = 0; j < 4; j++) row[j] = first + smaller(j, n_valid - 1) * head_dim;
        memcpy(factor, row_factor + r, n_valid * sizeof factor[0]);
        logits_i8_tile(logits + r, stride, queries, query_stride, query_factor, n_queries, row, factor, n_valid,
                       (const int8_t *)((uintptr_t)first + AHEAD_BYTES), head_dim);
    }
}

KERNEL void row_logits_i8(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                          size_t n_queries, const int8_t *rows, const float *row_factor, size_t n_rows, size_t head_dim)
{
    const size_t query_stride = (head_dim + 31) / 32 * 32;

    for (size_t q = 0, count; q < n_queries; q += count) {
        const int16_t *query = queries + q * query_stride;
        const float *factor = query_factor + q;
        float *out = logits + q * stride;

        count = next_queries(n_queries - q);
        switch (count) {
        case 1: logits_i8_rows(out, stride, query, query_stride, factor, 1, rows, row_factor, n_rows, head_dim); break;
        case 2: logits_i8_rows(out, stride, query, query_stride, factor, 2, rows, row_factor, n_rows, head_dim); break;
#if TILE_QUERIES == 4
        case 4: logits_i8_rows(out, stride, query, query_stride, factor, 4, rows, row_factor, n_rows, head_dim); break;
#endif
        default: logits_i8_rows(out, stride, query, query_stride, factor, 3, rows, row_factor, n_rows, head_dim); break;
        }
    }
}

/* ---- Listed rows -------------------------------------------------------------------------------- */

/* Retained keys lie in pieces of some 20 rows: hardware that reads ahead notices a piece when it is nearly over. Each
 * tile asks for as many rows as it reads, so far ahead that they arrive while others are computed with; asking for
 * whole pieces instead leaves the memory idle during what follows. Two Zen 4 cores, pieces of 20 rows of 128: 20.7 GB/s
 * with pieces asked for two ahead, 24.2 with rows 8 KiB ahead, 25 for a loop that only reads. */
#define LISTED_AHEAD_BYTES 8192
#define LISTED_AHEAD_ROWS  64

INLINE void ask_listed(const void *rows, size_t row_bytes, const uint32_t *index, size_t n_listed, size_t n_tile)
{
    const size_t n_ahead = smaller(LISTED_AHEAD_ROWS, LISTED_AHEAD_BYTES / row_bytes);

    for (size_t r = n_ahead; r < n_ahead + n_tile && r < n_listed; r++)
        for (size_t i = 0; i < row_bytes; i += LINE_BYTES) prefetch(rows, (size_t)index[r] * row_bytes + i);
}

/* Rows shared by several tiles of queries go through them in blocks that stay in L1; the first tile asks. */
#define LISTED_BLOCK 32

INLINE void listed_rows(float *logits, size_t stride, const float *queries, size_t n_queries, const uint16_t *rows,
                        const uint32_t *index, size_t n_rows, size_t n_listed, size_t n_tile, size_t head_dim,
                        __m128 scale)
{
    for (size_t r = 0; r < n_rows; r += n_tile) {
        const size_t n_valid = smaller(n_tile, n_rows - r);
        const uint16_t *row[8];
        VEC sum[16];

        if (n_listed > 0) ask_listed(rows, head_dim * sizeof rows[0], index + r, n_listed - r, n_tile);
        UNROLL
        for (size_t j = 0; j < n_tile; j++) row[j] = rows + (size_t)index[r + smaller(j, n_valid - 1)] * head_dim;
        multiply_tile(sum, queries, n_queries, row, n_tile, false, head_dim);
        store_tile(logits + r, stride, sum, n_queries, n_tile, n_valid, scale);
    }
}

#define LISTED_ROWS_OF(n, n_tile)                                                                                      \
    KERNEL void listed_rows_##n(float *logits, size_t stride, const float *queries, const uint16_t *rows,              \
                                const uint32_t *index, size_t n_rows, size_t n_listed, size_t head_dim, float scale)   \
    {                                                                                                                  \
        listed_rows(logits, stride, queries, n, rows, index, n_rows, n_listed, n_tile, head_dim, _mm_set1_ps(scale));  \
    }
LISTED_ROWS_OF(1, 8)
LISTED_ROWS_OF(2, 4)
LISTED_ROWS_OF(3, 4)
#if TILE_QUERIES == 4
LISTED_ROWS_OF(4, 4)
#endif

KERNEL void listed_logits(float *logits, size_t stride, const float *queries, size_t n_queries, const uint16_t *rows,
                          const uint32_t *index, size_t n_rows, size_t n_listed, size_t head_dim, float scale)
{
    const size_t block = n_queries > TILE_QUERIES ? LISTED_BLOCK : n_rows;

    for (size_t r = 0; r < n_rows; r += block) {
        const size_t n = smaller(block, n_rows - r);

        for (size_t q = 0, count; q < n_queries; q += count) {
            const size_t listed = q == 0 ? n_listed - r : 0;
            const float *query = queries + q * head_dim;
            float *out = logits + q * stride + r;

            count = next_queries(n_queries - q);
            switch (count) {
            case 1: listed_rows_1(out, stride, query, rows, index + r, n, listed, head_dim, scale); break;
            case 2: listed_rows_2(out, stride, query, rows, index + r, n, listed, head_dim, scale); break;
#if TILE_QUERIES == 4
            case 4: listed_rows_4(out, stride, query, rows, index + r, n, listed, head_dim, scale); break;
#endif
            default: listed_rows_3(out, stride, query, rows, index + r, n, listed, head_dim, scale); break;
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
        logits_i8_tile(logits + r, stride, queries, query_stride, query_factor, n_queries, row, factor, n_valid, NULL,
                       head_dim);
    }
}

KERNEL void listed_logits_i8(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                             size_t n_queries, const int8_t *rows, const float *row_factor, const uint32_t *index,
                             size_t n_rows, size_t n_listed, size_t head_dim)
{
    const size_t query_stride = (head_dim + 31) / 32 * 32;
    const size_t block = n_queries > TILE_QUERIES ? LISTED_BLOCK : n_rows;

    for (size_t r = 0; r < n_rows; r += block) {
        const size_t n = smaller(block, n_rows - r);
        const uint32_t *at = index + r;

        for (size_t q = 0, count; q < n_queries; q += count) {
            const size_t listed = q == 0 ? n_listed - r : 0;
            const int16_t *query = queries + q * query_stride;
            const float *f = query_factor + q;
            float *out = logits + q * stride + r;

            count = next_queries(n_queries - q);
#define LISTED_I8(n_queries)                                                                                           \
    listed_i8_rows(out, stride, query, query_stride, f, n_queries, rows, row_factor, at, n, listed, head_dim)
            switch (count) {
            case 1: LISTED_I8(1); break;
            case 2: LISTED_I8(2); break;
#if TILE_QUERIES == 4
            case 4: LISTED_I8(4); break;
#endif
            default: LISTED_I8(3); break;
            }
#undef LISTED_I8
        }
    }
}

/* ---- row_accumulate ----------------------------------------------------------------------------- */

#define LIST_ROWS  64 /* rows whose weights are looked at together */
#define LIST_AHEAD 64 /* rows of the smallest head_dim, 32, in AHEAD_BYTES */
_Static_assert(LIST_AHEAD * 32 * sizeof(uint16_t) >= AHEAD_BYTES, "the list holds all rows asked for ahead");

/* Adds n_rows listed rows into n_queries rows of out; both counts are constants and fix how many weights stay in
 * registers. The sums pass through L1: that costs a load and a store for n_rows FMAs, and lets whole rows stream by
 * once, in order, for any head_dim. column[r] is where the weights of row at[r] stand. The rows n_ahead entries further
 * down the list are asked for. */
INLINE void accumulate_tile(float *out, const float *weights, size_t stride, size_t n_queries, const uint16_t *rows,
                            const uint32_t *column, const uint32_t *at, size_t n_rows, size_t n_ahead, size_t head_dim)
{
    const uint16_t *row[8];
    VEC weight[16];

    UNROLL
    for (size_t r = 0; r < n_rows; r++) {
        const uint16_t *next = rows + (size_t)at[r + n_ahead] * head_dim;

        row[r] = rows + (size_t)at[r] * head_dim;
        for (size_t i = 0; i < head_dim; i += LINE_BYTES / sizeof next[0]) prefetch(next + i, 0);
        UNROLL
        for (size_t q = 0; q < n_queries; q++) weight[q * n_rows + r] = vec_set1(weights[q * stride + column[r]]);
    }
    for (size_t i = 0; i < head_dim; i += VEC_LEN) {
        VEC sum[TILE_QUERIES];

        UNROLL
        for (size_t q = 0; q < n_queries; q++) sum[q] = vec_load(out + q * head_dim + i);
        UNROLL
        for (size_t r = 0; r < n_rows; r++) {
            const VEC x = vec_load_half(row[r] + i);

            UNROLL
            for (size_t q = 0; q < n_queries; q++) sum[q] = vec_fma(weight[q * n_rows + r], x, sum[q]);
        }
        UNROLL
        for (size_t q = 0; q < n_queries; q++) vec_store(out + q * head_dim + i, sum[q]);
    }
}

/* n listed rows, n_tile at a time, then one by one. */
INLINE void accumulate_list_of(float *out, const float *weights, size_t stride, size_t n_queries, const uint16_t *rows,
                               const uint32_t *column, const uint32_t *at, size_t n, size_t n_tile, size_t n_ahead,
                               size_t head_dim)
{
    size_t j = 0;

    for (; j + n_tile <= n; j += n_tile)
        accumulate_tile(out, weights, stride, n_queries, rows, column + j, at + j, n_tile, n_ahead, head_dim);
    for (; j < n; j++) accumulate_tile(out, weights, stride, n_queries, rows, column + j, at + j, 1, n_ahead, head_dim);
}

/* The usual head_dims as constants: 10% on Zen 3, by saved address registers. */
INLINE void accumulate_list(float *out, const float *weights, size_t stride, size_t n_queries, const uint16_t *rows,
                            const uint32_t *column, const uint32_t *at, size_t n, size_t n_tile, size_t n_ahead,
                            size_t head_dim)
{
    switch (head_dim) {
    case 64: accumulate_list_of(out, weights, stride, n_queries, rows, column, at, n, n_tile, n_ahead, 64); break;
    case 128: accumulate_list_of(out, weights, stride, n_queries, rows, column, at, n, n_tile, n_ahead, 128); break;
    default: accumulate_list_of(out, weights, stride, n_queries, rows, column, at, n, n_tile, n_ahead, head_dim); break;
    }
}

KERNEL void accumulate_list_1(float *out, const float *weights, size_t stride, const uint16_t *rows,
                              const uint32_t *column, const uint32_t *at, size_t n, size_t n_ahead, size_t head_dim)
{
    accumulate_list(out, weights, stride, 1, rows, column, at, n, 8, n_ahead, head_dim);
}

KERNEL void accumulate_list_2(float *out, const float *weights, size_t stride, const uint16_t *rows,
                              const uint32_t *column, const uint32_t *at, size_t n, size_t n_ahead, size_t head_dim)
{
    accumulate_list(out, weights, stride, 2, rows, column, at, n, 4, n_ahead, head_dim);
}

KERNEL void accumulate_list_3(float *out, const float *weights, size_t stride, const uint16_t *rows,
                              const uint32_t *column, const uint32_t *at, size_t n, size_t n_ahead, size_t head_dim)
{
    accumulate_list(out, weights, stride, 3, rows, column, at, n, 4, n_ahead, head_dim);
}

#if TILE_QUERIES == 4
KERNEL void accumulate_list_4(float *out, const float *weights, size_t stride, const uint16_t *rows,
                              const uint32_t *column, const uint32_t *at, size_t n, size_t n_ahead, size_t head_dim)
{
    accumulate_list(out, weights, stride, 4, rows, column, at, n, 4, n_ahead, head_dim);
}
#endif

/* Appends to list the columns of [first, first + n) that have a weight other than zero; returns how many. Writes up to
 * VEC_LEN entries more than that. Without a branch on the weights: live columns come in irregular patterns. */
INLINE size_t list_live(uint32_t *list, const float *weights, size_t stride, size_t n_queries, size_t first, size_t n)
{
    size_t n_live = 0;

    for (size_t r = 0; r < n; r += VEC_LEN) {
        const size_t part = smaller(VEC_LEN, n - r);
        VEC bits = vec_zero();
        unsigned mask;

        for (size_t q = 0; q < n_queries; q++) {
            const float *w = weights + q * stride + first + r;
            bits = vec_or(bits, part == VEC_LEN ? vec_load(w) : vec_load_part(w, part, vec_zero()));
        }
        mask = vec_live(bits);
        UNROLL
        for (size_t j = 0; j < VEC_LEN; j++) {
            list[n_live] = (uint32_t)(first + r + j);
            n_live += mask >> j & 1;
        }
    }
    return n_live;
}

KERNEL size_t row_accumulate(float *out, const float *weights, size_t stride, size_t n_queries, const uint16_t *rows,
                             const uint32_t *index, size_t n_rows, size_t head_dim)
{
    const size_t n_ahead = AHEAD_BYTES / (head_dim * sizeof rows[0]);
    /* Live columns in order, and the rows they belong to: those to add, then those to ask for. */
    uint32_t column[2 * LIST_ROWS + LIST_AHEAD + VEC_LEN], other[2 * LIST_ROWS + LIST_AHEAD + VEC_LEN];
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
            for (size_t i = 0; i < head_dim; i += LINE_BYTES / sizeof rows[0]) prefetch(rows + at[j] * head_dim + i, 0);
        for (size_t q = 0, count; q < n_queries; q += count) {
            const float *w = weights + q * stride;
            float *sum = out + q * head_dim;

            count = next_queries(n_queries - q);
            switch (count) {
            case 1: accumulate_list_1(sum, w, stride, rows, column, at, n, n_ahead, head_dim); break;
            case 2: accumulate_list_2(sum, w, stride, rows, column, at, n, n_ahead, head_dim); break;
#if TILE_QUERIES == 4
            case 4: accumulate_list_4(sum, w, stride, rows, column, at, n, n_ahead, head_dim); break;
#endif
            default: accumulate_list_3(sum, w, stride, rows, column, at, n, n_ahead, head_dim); break;
            }
        }
        n_read += n;
        n_listed -= n;
        memmove(column, column + n, n_listed * sizeof column[0]);
        if (index) memmove(at, at + n, n_listed * sizeof at[0]);
    }
}

/* ---- Vectors of floats -------------------------------------------------------------------------- */

KERNEL float max(const float *x, size_t n)
{
    const VEC lowest = vec_set1(-INFINITY);
    VEC largest[4] = {lowest, lowest, lowest, lowest};
    size_t i = 0;

    for (; i + 4 * VEC_LEN <= n; i += 4 * VEC_LEN) {
        UNROLL
        for (size_t v = 0; v < 4; v++) largest[v] = vec_max(vec_load(x + i + v * VEC_LEN), largest[v]);
    }
    for (; i + VEC_LEN <= n; i += VEC_LEN) largest[0] = vec_max(vec_load(x + i), largest[0]);
    if (i < n) largest[1] = vec_max(vec_load_part(x + i, n - i, lowest), largest[1]);
    return vec_largest(vec_max(vec_max(largest[0], largest[1]), vec_max(largest[2], largest[3])));
}

/* As exp_of() of kernels_portable.c, which explains it. */
INLINE VEC vec_exp(VEC x)
{
    const VEC magic = vec_set1(0x1.8p23f);
    const VEC shifted = vec_fma(x, vec_set1(0x1.715476p0f), magic);
    const VEC n = vec_sub(shifted, magic);
    const VEC r = vec_fma(n, vec_set1(-0x1.7f7d1cp-20f), vec_fma(n, vec_set1(-0x1.62e4p-1f), x));
    VEC p = vec_set1(0x1.6a23d0p-10f);

    p = vec_fma(p, r, vec_set1(0x1.123a20p-7f));
    p = vec_fma(p, r, vec_set1(0x1.5558f2p-5f));
    p = vec_fma(p, r, vec_set1(0x1.555492p-3f));
    p = vec_fma(p, r, vec_set1(0x1.fffffcp-2f));
    p = vec_fma(p, r, vec_set1(1.0f));
    p = vec_fma(p, r, vec_set1(1.0f));
    p = vec_add_exponent(p, shifted);
    p = vec_select_less(vec_set1(88.7228f), x, vec_set1(INFINITY), p);
    return vec_select_less(x, vec_set1(-87.33f), vec_zero(), p);
}

KERNEL float exp_sum(float *x, size_t n, float shift)
{
    const VEC shift_vec = vec_set1(shift);
    VEC sum[2] = {vec_zero(), vec_zero()};
    size_t i = 0;

    for (; i + 2 * VEC_LEN <= n; i += 2 * VEC_LEN) {
        UNROLL
        for (size_t v = 0; v < 2; v++) {
            const VEC y = vec_exp(vec_sub(vec_load(x + i + v * VEC_LEN), shift_vec));

            vec_store(x + i + v * VEC_LEN, y);
            sum[v] = vec_add(sum[v], y);
        }
    }
    if (i + VEC_LEN <= n) {
        const VEC y = vec_exp(vec_sub(vec_load(x + i), shift_vec));

        vec_store(x + i, y);
        sum[0] = vec_add(sum[0], y);
        i += VEC_LEN;
    }
    if (i < n) { /* the missing lanes are -INFINITY, whose exponential is 0 */
        const VEC y = vec_exp(vec_sub(vec_load_part(x + i, n - i, vec_set1(-INFINITY)), shift_vec));

        vec_store_part(x + i, n - i, y);
        sum[1] = vec_add(sum[1], y);
    }
    return vec_sum(vec_add(sum[0], sum[1]));
}

KERNEL void scale(float *x, float factor, size_t n)
{
    const VEC factor_vec = vec_set1(factor);
    size_t i = 0;

    for (; i + VEC_LEN <= n; i += VEC_LEN) vec_store(x + i, vec_mul(vec_load(x + i), factor_vec));
    if (i < n) vec_store_part(x + i, n - i, vec_mul(vec_load_part(x + i, n - i, vec_zero()), factor_vec));
}

KERNEL void multiply(float *x, const float *y, size_t n)
{
    size_t i = 0;

    for (; i + VEC_LEN <= n; i += VEC_LEN) vec_store(x + i, vec_mul(vec_load(x + i), vec_load(y + i)));
    if (i < n) {
        const size_t part = n - i;

        vec_store_part(x + i, part,
                       vec_mul(vec_load_part(x + i, part, vec_zero()), vec_load_part(y + i, part, vec_zero())));
    }
}

KERNEL void add_scaled(float *z, const float *x, float factor, const float *y, size_t n)
{
    const VEC factor_vec = vec_set1(factor);
    size_t i = 0;

    for (; i + VEC_LEN <= n; i += VEC_LEN) vec_store(z + i, vec_fma(factor_vec, vec_load(y + i), vec_load(x + i)));
    if (i < n) {
        const size_t part = n - i;

        vec_store_part(
            z + i, part,
            vec_fma(factor_vec, vec_load_part(y + i, part, vec_zero()), vec_load_part(x + i, part, vec_zero())));
    }
}

KERNEL float dot(const float *x, const float *y, size_t n)
{
    VEC sum[2] = {vec_zero(), vec_zero()};
    size_t i = 0;

    for (; i + 2 * VEC_LEN <= n; i += 2 * VEC_LEN) {
        UNROLL
        for (size_t v = 0; v < 2; v++)
            sum[v] = vec_fma(vec_load(x + i + v * VEC_LEN), vec_load(y + i + v * VEC_LEN), sum[v]);
    }
    for (; i < n; i += VEC_LEN) {
        const size_t part = smaller(VEC_LEN, n - i);

        sum[0] = vec_fma(vec_load_part(x + i, part, vec_zero()), vec_load_part(y + i, part, vec_zero()), sum[0]);
    }
    return vec_sum(vec_add(sum[0], sum[1]));
}

KERNEL void drop_below(float *weights, size_t stride, size_t n_queries, size_t n, float limit, float *sums)
{
    const VEC limit_vec = vec_set1(limit);
    VEC sum[SQZ_MAX_GROUP_QUERIES];

    for (size_t q = 0; q < n_queries; q++) sum[q] = vec_zero();
    for (size_t i = 0; i < n; i += VEC_LEN) {
        const size_t part = smaller(VEC_LEN, n - i);
        VEC largest = vec_zero();

        for (size_t q = 0; q < n_queries; q++)
            largest = vec_max(vec_load_part(weights + q * stride + i, part, vec_zero()), largest);
        for (size_t q = 0; q < n_queries; q++) {
            float *w = weights + q * stride + i;
            const VEC kept = vec_select_less(largest, limit_vec, vec_zero(), vec_load_part(w, part, vec_zero()));

            sum[q] = vec_add(sum[q], kept);
            vec_store_part(w, part, kept);
        }
    }
    for (size_t q = 0; q < n_queries; q++) sums[q] = vec_sum(sum[q]);
}

KERNEL size_t argmax_biased(const float *x, const float *bias, size_t n, float *best)
{
    const size_t most = (size_t)1 << 30; /* indices are 32-bit in the vectors: larger inputs go piece by piece */
    size_t index = 0;

    *best = -INFINITY;
    for (size_t first = 0; first < n; first += most) {
        const size_t count = smaller(most, n - first);
        const VEC lowest = vec_set1(-INFINITY);
        VEC largest[2] = {lowest, lowest};
        INDEX at[2] = {index_start(), index_start()}, now = index_start();
        float value[2 * VEC_LEN];
        int32_t position[2 * VEC_LEN];
        size_t i = 0, winner = 0;

        for (; i + 2 * VEC_LEN <= count; i += 2 * VEC_LEN) {
            const float *xs = x + first + i, *bs = bias + first + i;

            vec_update_largest(&largest[0], &at[0], vec_add(vec_load(xs), vec_load(bs)), now);
            now = index_add(now, VEC_LEN);
            vec_update_largest(&largest[1], &at[1], vec_add(vec_load(xs + VEC_LEN), vec_load(bs + VEC_LEN)), now);
            now = index_add(now, VEC_LEN);
        }
        for (; i < count; i += VEC_LEN) {
            const size_t part = smaller(VEC_LEN, count - i);
            const float *xs = x + first + i, *bs = bias + first + i;
            const VEC sum = part == VEC_LEN
                                ? vec_add(vec_load(xs), vec_load(bs))
                                : vec_add(vec_load_part(xs, part, lowest), vec_load_part(bs, part, vec_zero()));

            vec_update_largest(&largest[0], &at[0], sum, now);
            now = index_add(now, VEC_LEN);
        }
        for (size_t v = 0; v < 2; v++) {
            vec_store(value + v * VEC_LEN, largest[v]);
            index_store(position + v * VEC_LEN, at[v]);
        }
        for (size_t lane = 1; lane < 2 * VEC_LEN; lane++)
            if (value[lane] > value[winner] || (value[lane] == value[winner] && position[lane] < position[winner]))
                winner = lane;
        if (value[winner] > *best) {
            *best = value[winner];
            index = first + (size_t)position[winner];
        }
    }
    return index;
}

/* ---- transpose_f16 ------------------------------------------------------------------------------ */

/* column[j] = element j of eight rows; rows from n_valid on are taken as zero. */
INLINE void transpose_8x8(__m128i *column, const uint16_t *rows, size_t n_valid, size_t head_dim)
{
    __m128i a[8], b[8];

    UNROLL
    for (size_t r = 0; r < 8; r++) {
        a[r] =
            r < n_valid ? _mm_loadu_si128((const __m128i *)(const void *)(rows + r * head_dim)) : _mm_setzero_si128();
    }
    UNROLL
    for (size_t r = 0; r < 4; r++) {
        b[2 * r] = _mm_unpacklo_epi16(a[r], a[r + 4]);
        b[2 * r + 1] = _mm_unpackhi_epi16(a[r], a[r + 4]);
    }
    UNROLL
    for (size_t r = 0; r < 4; r++) {
        a[2 * r] = _mm_unpacklo_epi16(b[r], b[r + 4]);
        a[2 * r + 1] = _mm_unpackhi_epi16(b[r], b[r + 4]);
    }
    UNROLL
    for (size_t r = 0; r < 4; r++) {
        column[2 * r] = _mm_unpacklo_epi16(a[r], a[r + 4]);
        column[2 * r + 1] = _mm_unpackhi_epi16(a[r], a[r + 4]);
    }
}

INLINE void transpose_16x8(float *dst, size_t ld, const uint16_t *rows, size_t n_valid, size_t head_dim)
{
    __m128i low[8], high[8];

    transpose_8x8(low, rows, n_valid, head_dim);
    transpose_8x8(high, rows + (n_valid > 8 ? 8 * head_dim : 0), n_valid > 8 ? n_valid - 8 : 0, head_dim);
    UNROLL
    for (size_t j = 0; j < 8; j++) store_columns(dst + j * ld, low[j], high[j]);
}

KERNEL void transpose_f16(float *dst, size_t ld, const uint16_t *rows, size_t n_rows, size_t head_dim)
{
    size_t r = 0;

    for (; r + 16 <= n_rows; r += 16)
        for (size_t i = 0; i < head_dim; i += 8)
            transpose_16x8(dst + i * ld + r, ld, rows + r * head_dim + i, 16, head_dim);
    if (r < n_rows) {
        for (size_t i = 0; i < head_dim; i += 8)
            transpose_16x8(dst + i * ld + r, ld, rows + r * head_dim + i, n_rows - r, head_dim);
        r += 16;
    }
    for (size_t i = 0; r < ld && i < head_dim; i++) memset(dst + i * ld + r, 0, (ld - r) * sizeof dst[0]);
}

/* ---- gemm --------------------------------------------------------------------------------------- */

#define GEMM_ROWS      6
#define GEMM_WIDTH     (GEMM_VECS * VEC_LEN)
#define PACK_FLOATS    8192 /* of b, copied where that pays; 32 KiB of stack */
#define PACK_ROWS_OF_C 24   /* ... it does from here on: four tiles share the copy */
/* ... and for b with longer rows, which share few cache sets: m 256, n 4096, k 256 on Zen 3, 53% of peak -> 87% */
#define PACK_STRIDE 128

/* n_rows x n_vecs vectors of c, both constants. */
INLINE void gemm_tile(float *c, size_t ldc, const float *a, size_t lda, const float *b, size_t ldb, size_t n_rows,
                      size_t n_vecs, size_t k, float alpha, bool accumulate)
{
    const VEC alpha_vec = vec_set1(alpha);
    VEC sum[GEMM_ROWS * 4];

    UNROLL
    for (size_t i = 0; i < n_rows * n_vecs; i++) sum[i] = vec_zero();
    for (size_t l = 0; l < k; l++) {
        VEC right[8];

        UNROLL
        for (size_t v = 0; v < n_vecs; v++) right[v] = vec_load(b + l * ldb + v * VEC_LEN);
        UNROLL
        for (size_t i = 0; i < n_rows; i++) {
            const VEC left = vec_set1(a[i * lda + l]);

            UNROLL
            for (size_t v = 0; v < n_vecs; v++) sum[i * n_vecs + v] = vec_fma(left, right[v], sum[i * n_vecs + v]);
        }
    }
    UNROLL
    for (size_t i = 0; i < n_rows; i++) {
        UNROLL
        for (size_t v = 0; v < n_vecs; v++) {
            float *out = c + i * ldc + v * VEC_LEN;
            const VEC product = vec_mul(sum[i * n_vecs + v], alpha_vec);

            vec_store(out, accumulate ? vec_add(product, vec_load(out)) : product);
        }
    }
}

/* m rows, n_vecs vectors. A last tile of one or two rows would leave the FMA units idle, so the rows before it are
 * shared out: 7 is 4 + 3, 8 is 4 + 4. */
INLINE void gemm_panel(float *c, size_t ldc, const float *a, size_t lda, const float *b, size_t ldb, size_t m,
                       size_t n_vecs, size_t k, float alpha, bool accumulate)
{
    while (m) {
        const size_t rows = m == 7 || m == 8 ? 4 : smaller(m, GEMM_ROWS);

        switch (rows) {
        case 1: gemm_tile(c, ldc, a, lda, b, ldb, 1, n_vecs, k, alpha, accumulate); break;
        case 2: gemm_tile(c, ldc, a, lda, b, ldb, 2, n_vecs, k, alpha, accumulate); break;
        case 3: gemm_tile(c, ldc, a, lda, b, ldb, 3, n_vecs, k, alpha, accumulate); break;
        case 4: gemm_tile(c, ldc, a, lda, b, ldb, 4, n_vecs, k, alpha, accumulate); break;
        case 5: gemm_tile(c, ldc, a, lda, b, ldb, 5, n_vecs, k, alpha, accumulate); break;
        default: gemm_tile(c, ldc, a, lda, b, ldb, 6, n_vecs, k, alpha, accumulate); break;
        }
        c += rows * ldc;
        a += rows * lda;
        m -= rows;
    }
}

/* One to three rows of c: wider tiles, or there are too few sums to keep two FMA units busy. */
INLINE size_t gemm_few_rows(float *c, size_t ldc, const float *a, size_t lda, const float *b, size_t ldb, size_t m,
                            size_t n, size_t k, float alpha, bool accumulate)
{
    size_t j = 0;

    switch (m) {
    case 1:
        for (; j + 8 * VEC_LEN <= n; j += 8 * VEC_LEN)
            gemm_tile(c + j, ldc, a, lda, b + j, ldb, 1, 8, k, alpha, accumulate);
        break;
    case 2:
        for (; j + 4 * VEC_LEN <= n; j += 4 * VEC_LEN)
            gemm_tile(c + j, ldc, a, lda, b + j, ldb, 2, 4, k, alpha, accumulate);
        break;
    case 3:
        for (; j + 4 * VEC_LEN <= n; j += 4 * VEC_LEN)
            gemm_tile(c + j, ldc, a, lda, b + j, ldb, 3, 4, k, alpha, accumulate);
        break;
    default: break;
    }
    return j;
}

KERNEL void gemm_wide_panel(float *c, size_t ldc, const float *a, size_t lda, const float *b, size_t ldb, size_t m,
                            size_t k, float alpha, bool accumulate)
{
    gemm_panel(c, ldc, a, lda, b, ldb, m, GEMM_VECS, k, alpha, accumulate);
}

/* SQZ_GEMM_N columns. */
KERNEL void gemm_narrow_panel(float *c, size_t ldc, const float *a, size_t lda, const float *b, size_t ldb, size_t m,
                              size_t k, float alpha, bool accumulate)
{
    gemm_panel(c, ldc, a, lda, b, ldb, m, SQZ_GEMM_N / VEC_LEN, k, alpha, accumulate);
}

/* Panels of GEMM_WIDTH columns from column j on, each copied first so that its rows are neighbours. */
KERNEL void gemm_packed(float *c, size_t ldc, const float *a, size_t lda, const float *b, size_t ldb, size_t m,
                        size_t k, float alpha, bool accumulate)
{
    float packed[PACK_FLOATS] __attribute__((aligned(64)));

    for (size_t l = 0, depth; l < k; l += depth) {
        depth = smaller(PACK_FLOATS / GEMM_WIDTH, k - l);
        for (size_t i = 0; i < depth; i++) {
            UNROLL
            for (size_t v = 0; v < GEMM_VECS; v++)
                vec_store(packed + i * GEMM_WIDTH + v * VEC_LEN, vec_load(b + (l + i) * ldb + v * VEC_LEN));
        }
        gemm_wide_panel(c, ldc, a + l, lda, packed, GEMM_WIDTH, m, depth, alpha, accumulate || l > 0);
    }
}

KERNEL void gemm(float *c, size_t ldc, const float *a, size_t lda, const float *b, size_t ldb, size_t m, size_t n,
                 size_t k, float alpha, bool accumulate)
{
    const bool pack = m >= PACK_ROWS_OF_C && ldb > PACK_STRIDE && k > 0;
    size_t j = gemm_few_rows(c, ldc, a, lda, b, ldb, m, n, k, alpha, accumulate);

    for (; j + GEMM_WIDTH <= n; j += GEMM_WIDTH)
        if (pack) gemm_packed(c + j, ldc, a, lda, b + j, ldb, m, k, alpha, accumulate);
        else gemm_wide_panel(c + j, ldc, a, lda, b + j, ldb, m, k, alpha, accumulate);
    for (; j < n; j += SQZ_GEMM_N) gemm_narrow_panel(c + j, ldc, a, lda, b + j, ldb, m, k, alpha, accumulate);
}

#include "keys_template.h"
#include "planes_template.h"

const struct sqz_kernels KERNELS = {
    .name = NAME,
    .f16_to_f32 = f16_to_f32,
    .f32_to_f16 = f32_to_f16,
    .row_logits = row_logits,
    .row_logits_i8 = row_logits_i8,
    .listed_logits = listed_logits,
    .listed_logits_i8 = listed_logits_i8,
    .plane_logits = plane_logits,
    .plane_sums = plane_sums,
    .turn = turn,
    .row_accumulate = row_accumulate,
    .add_codes = add_codes,
    .repeat = repeat,
    .segment_sums = segment_sums,
    .scale_max = scale_max,
    .list_at_least = list_at_least,
    .log_shifted = log_shifted,
    .max = max,
    .exp_sum = exp_sum,
    .drop_below = drop_below,
    .scale = scale,
    .multiply = multiply,
    .add_scaled = add_scaled,
    .dot = dot,
    .transpose_f16 = transpose_f16,
    .gemm = gemm,
    .argmax_biased = argmax_biased,
};
