/*
 * Kernels of rows in planes, included by kernels_template.h, whose comment names
 * what they are made of: products of INT16 queries with numbers of 4 or 8 bits,
 * sums of such rows, and what turns a row.
 */

#if defined(DOT_BYTES)
#include "planes_bytes.h"
#else

/* Bytes of a row that fill a vector of words. */
#define PLANE_STEP WORDS_LEN

/* The words of PLANE_STEP bytes of a row's planes: numbers of their lower halves, and of their upper ones. */
INLINE void plane_words(WORDS *low, WORDS *high, const uint8_t *upper, const uint8_t *lower, size_t n)
{
    const WORDS u = bytes_words(upper, n);

    if (lower) {
        const WORDS l = bytes_words(lower, n);

        *low = words_join(words_set1(240), words_left_4(u), l);
        *high = words_join(words_set1(240), u, words_right_4(l));
    } else {
        *low = words_and(u, words_set1(15));
        *high = words_right_4(u);
    }
}

/* A few queries as plane_logits() takes them. */
struct plane_queries {
    const int16_t *rows;
    const float *factor, *half;
};

/* n_queries x n_valid products, n_valid <= 4; n_queries and whether there is a lower plane are constants. Sums of a lane,
 * of up to 256 products of at most 32767 * 128 once their middle is taken off, stay below 2^31 in the end, and wrap on
 * the way. */
INLINE void plane_tile(float *logits, size_t stride, const struct plane_queries *queries, size_t n_queries,
                       const uint8_t *upper, const uint8_t *lower, const float *factor, const size_t *at,
                       size_t n_valid, const WORDS *middle, size_t head_dim)
{
    const size_t bytes = sqz_plane_bytes(head_dim), query_stride = 2 * bytes;
    const __m128 row_factor = _mm_loadu_ps(factor);
    WORDS sum[TILE_QUERIES * 4];

    UNROLL
    for (size_t j = 0; j < n_queries * 4; j++) sum[j] = middle[j / 4];
    for (size_t i = 0; i < bytes; i += PLANE_STEP) {
        const size_t n = smaller(PLANE_STEP, bytes - i);

        UNROLL
        for (size_t r = 0; r < 4; r++) {
            WORDS low, high;

            plane_words(&low, &high, upper + at[r] + i, lower ? lower + at[r] + i : NULL, n);
            UNROLL
            for (size_t q = 0; q < n_queries; q++) {
                const int16_t *query = queries->rows + q * query_stride + 2 * i;

                sum[q * 4 + r] = words_dot(sum[q * 4 + r], low, words_low(query, n));
                sum[q * 4 + r] = words_dot(sum[q * 4 + r], high, words_high(query, n));
            }
        }
    }
    UNROLL
    for (size_t q = 0; q < n_queries; q++) {
        const __m128 dot = vec_sum4(words_to_float(sum[q * 4]), words_to_float(sum[q * 4 + 1]),
                                    words_to_float(sum[q * 4 + 2]), words_to_float(sum[q * 4 + 3]));
        const __m128 scaled = _mm_mul_ps(_mm_set1_ps(queries->factor[q]), row_factor);

        store_logits(logits + q * stride, _mm_mul_ps(_mm_add_ps(dot, _mm_set1_ps(queries->half[q])), scaled), n_valid);
    }
}

/* What sums of a query begin with: what the middle of a row's numbers, times the query, takes off. */
INLINE WORDS plane_middle(const int16_t *query, size_t bytes, int middle)
{
    WORDS sum = words_zero();

    for (size_t i = 0; i < bytes; i += PLANE_STEP) {
        const size_t n = smaller(PLANE_STEP, bytes - i);

        sum = words_dot(sum, words_set1(-middle), words_low(query + 2 * i, n));
        sum = words_dot(sum, words_set1(-middle), words_high(query + 2 * i, n));
    }
    return sum;
}

INLINE void plane_rows(float *logits, size_t stride, const struct plane_queries *queries, size_t n_queries,
                       const uint8_t *upper, const uint8_t *lower, const float *row_factor, const uint32_t *index,
                       size_t n_rows, size_t n_listed, size_t head_dim)
{
    const size_t bytes = sqz_plane_bytes(head_dim);
    WORDS middle[TILE_QUERIES];

    UNROLL
    for (size_t q = 0; q < n_queries; q++)
        middle[q] = plane_middle(queries->rows + q * 2 * bytes, bytes, lower ? 128 : 8);
    for (size_t r = 0; r < n_rows; r += 4) {
        const size_t n_valid = smaller(4, n_rows - r);
        float factor[4] = {0};
        size_t at[4];

        if (index && n_listed > 0) {
            ask_listed(upper, bytes, index + r, n_listed - r, 4);
            if (lower) ask_listed(lower, bytes, index + r, n_listed - r, 4);
        } else if (!index) {
            for (size_t line = 0; line < 4 * bytes; line += LINE_BYTES) {
                prefetch(upper, r * bytes + AHEAD_BYTES / 2 + line);
                if (lower) prefetch(lower, r * bytes + AHEAD_BYTES / 2 + line);
            }
        }
        UNROLL
        for (size_t j = 0; j < 4; j++) {
            const size_t row = r + smaller(j, n_valid - 1);

            at[j] = (index ? index[row] : row) * bytes;
        }
        memcpy(factor, row_factor + r, n_valid * sizeof factor[0]);
        plane_tile(logits + r, stride, queries, n_queries, upper, lower, factor, at, n_valid, middle, head_dim);
    }
}

#define PLANE_ROWS_OF(n)                                                                                               \
    KERNEL void plane_rows_##n(float *logits, size_t stride, const struct plane_queries *queries,                      \
                               const uint8_t *upper, const uint8_t *lower, const float *row_factor,                    \
                               const uint32_t *index, size_t n_rows, size_t n_listed, size_t head_dim)                 \
    {                                                                                                                  \
        if (lower)                                                                                                     \
            plane_rows(logits, stride, queries, n, upper, lower, row_factor, index, n_rows, n_listed, head_dim);       \
        else plane_rows(logits, stride, queries, n, upper, NULL, row_factor, index, n_rows, n_listed, head_dim);       \
    }
PLANE_ROWS_OF(1)
PLANE_ROWS_OF(2)
PLANE_ROWS_OF(3)
#if TILE_QUERIES == 4
PLANE_ROWS_OF(4)
#endif

KERNEL void plane_logits(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                         const float *half, size_t n_queries, const uint8_t *upper, const uint8_t *lower,
                         const float *row_factor, const uint32_t *index, size_t n_rows, size_t n_listed,
                         size_t head_dim)
{
    const size_t query_stride = 2 * sqz_plane_bytes(head_dim);

    for (size_t q = 0, count; q < n_queries; q += count) {
        const struct plane_queries some = {queries + q * query_stride, query_factor + q, half + q};
        const size_t listed = q == 0 ? n_listed : 0;
        float *out = logits + q * stride;

        count = next_queries(n_queries - q);
        switch (count) {
        case 1: plane_rows_1(out, stride, &some, upper, lower, row_factor, index, n_rows, listed, head_dim); break;
        case 2: plane_rows_2(out, stride, &some, upper, lower, row_factor, index, n_rows, listed, head_dim); break;
#if TILE_QUERIES == 4
        case 4: plane_rows_4(out, stride, &some, upper, lower, row_factor, index, n_rows, listed, head_dim); break;
#endif
        default: plane_rows_3(out, stride, &some, upper, lower, row_factor, index, n_rows, listed, head_dim); break;
        }
    }
}

/* ---- plane_sums --------------------------------------------------------------------------------- */

#define PLANE_SUMS_AHEAD 16 /* rows of the list that are asked for before they are added */

/* Rows that have a weight, and where their numbers begin. */
struct plane_list {
    uint32_t column[LIST_ROWS + VEC_LEN];
    size_t at[LIST_ROWS];
};

/* Adds n_rows rows; n_rows and n_queries are constants, and whether there is a lower plane. */
INLINE void plane_sums_tile(float *out, const float *weights, size_t stride, size_t n_queries, const uint8_t *upper,
                            const uint8_t *lower, const float *row_factor, const uint32_t *column, const size_t *at,
                            size_t n_rows, size_t bytes)
{
    VEC weight[16];

    UNROLL
    for (size_t r = 0; r < n_rows; r++) {
        UNROLL
        for (size_t q = 0; q < n_queries; q++)
            weight[q * n_rows + r] = vec_set1(weights[q * stride + column[r]] * row_factor[column[r]]);
    }
    for (size_t i = 0; i < bytes; i += VEC_LEN) {
        float *const low_out = out + i / 16 * 32 + i % 16, *const high_out = low_out + 16;
        VEC low[TILE_QUERIES], high[TILE_QUERIES];

        UNROLL
        for (size_t q = 0; q < n_queries; q++) {
            low[q] = vec_load(low_out + q * 2 * bytes);
            high[q] = vec_load(high_out + q * 2 * bytes);
        }
        UNROLL
        for (size_t r = 0; r < n_rows; r++) {
            const INDEX u = bytes_index(upper + at[r] + i);
            INDEX a = index_and(u, index_set1(15)), b = index_shift_4(u);

            if (lower) {
                const INDEX l = bytes_index(lower + at[r] + i);

                a = index_join(index_set1(240), index_left_4(u), l);
                b = index_join(index_set1(240), u, index_shift_4(l));
            }
            UNROLL
            for (size_t q = 0; q < n_queries; q++) {
                low[q] = vec_fma(weight[q * n_rows + r], vec_of_index(a), low[q]);
                high[q] = vec_fma(weight[q * n_rows + r], vec_of_index(b), high[q]);
            }
        }
        UNROLL
        for (size_t q = 0; q < n_queries; q++) {
            vec_store(low_out + q * 2 * bytes, low[q]);
            vec_store(high_out + q * 2 * bytes, high[q]);
        }
    }
}

INLINE void ask_plane_row(const uint8_t *upper, const uint8_t *lower, size_t at, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += LINE_BYTES) {
        prefetch(upper, at + i);
        if (lower) prefetch(lower, at + i);
    }
}

INLINE void plane_sums_of(float *out, const float *weights, size_t stride, size_t n_queries, const uint8_t *upper,
                          const uint8_t *lower, const float *row_factor, const struct plane_list *list, size_t n,
                          size_t n_tile, size_t bytes)
{
    size_t r = 0;

    for (; r + n_tile <= n; r += n_tile) {
        for (size_t j = r + PLANE_SUMS_AHEAD; j < r + PLANE_SUMS_AHEAD + n_tile && j < n; j++)
            ask_plane_row(upper, lower, list->at[j], bytes);
        plane_sums_tile(out, weights, stride, n_queries, upper, lower, row_factor, list->column + r, list->at + r,
                        n_tile, bytes);
    }
    for (; r < n; r++)
        plane_sums_tile(out, weights, stride, n_queries, upper, lower, row_factor, list->column + r, list->at + r, 1,
                        bytes);
}

#define PLANE_SUMS_OF(n_queries, n_tile)                                                                               \
    KERNEL void plane_sums_##n_queries(float *out, const float *weights, size_t stride, const uint8_t *upper,          \
                                       const uint8_t *lower, const float *row_factor, const struct plane_list *list,   \
                                       size_t n, size_t bytes)                                                         \
    {                                                                                                                  \
        if (lower) plane_sums_of(out, weights, stride, n_queries, upper, lower, row_factor, list, n, n_tile, bytes);   \
        else plane_sums_of(out, weights, stride, n_queries, upper, NULL, row_factor, list, n, n_tile, bytes);          \
    }
PLANE_SUMS_OF(1, 8)
PLANE_SUMS_OF(2, 4)
PLANE_SUMS_OF(3, 4)
#if TILE_QUERIES == 4
PLANE_SUMS_OF(4, 4)
#endif

KERNEL size_t plane_sums(float *out, const float *weights, size_t stride, size_t n_queries, const uint8_t *upper,
                         const uint8_t *lower, const float *row_factor, const uint32_t *index, size_t n_rows,
                         size_t head_dim)
{
    const size_t bytes = sqz_plane_bytes(head_dim);
    struct plane_list list;
    size_t n_read = 0;

    for (size_t first = 0; first < n_rows; first += LIST_ROWS) {
        const size_t n = list_live(list.column, weights, stride, n_queries, first, smaller(LIST_ROWS, n_rows - first));

        for (size_t j = 0; j < n; j++) list.at[j] = (index ? index[list.column[j]] : list.column[j]) * bytes;
        for (size_t j = 0; j < smaller(PLANE_SUMS_AHEAD, n); j++) ask_plane_row(upper, lower, list.at[j], bytes);
        for (size_t q = 0, count; q < n_queries && n > 0; q += count) {
            const float *w = weights + q * stride;
            float *sum = out + q * 2 * bytes;

            count = next_queries(n_queries - q);
            switch (count) {
            case 1: plane_sums_1(sum, w, stride, upper, lower, row_factor, &list, n, bytes); break;
            case 2: plane_sums_2(sum, w, stride, upper, lower, row_factor, &list, n, bytes); break;
#if TILE_QUERIES == 4
            case 4: plane_sums_4(sum, w, stride, upper, lower, row_factor, &list, n, bytes); break;
#endif
            default: plane_sums_3(sum, w, stride, upper, lower, row_factor, &list, n, bytes); break;
            }
        }
        n_read += n;
    }
    return n_read;
}

#endif

/* ---- turn ----------------------------------------------------------------------------------------- */

/* Lane j becomes lane j + its partner where the bit is not set, partner - lane j where it is. */
#define TURN_LANES(x, bit, swap) vec_fma(sign_##bit, x, swap(x))

KERNEL void turn(float *x, size_t n, size_t length, float factor)
{
    static const float signs[4][16] = {{1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
                                       {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
                                       {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
                                       {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1}};
    const VEC sign_1 = vec_load(signs[0]), sign_2 = vec_load(signs[1]), sign_4 = vec_load(signs[2]);

    for (size_t i = 0; i < n; i += VEC_LEN) {
        VEC v = vec_mul(vec_load(x + i), vec_set1(factor));

        v = TURN_LANES(v, 1, vec_swap_1);
        v = TURN_LANES(v, 2, vec_swap_2);
        v = TURN_LANES(v, 4, vec_swap_4);
#if VEC_LEN == 16
        v = vec_fma(vec_load(signs[3]), v, vec_swap_8(v));
#endif
        vec_store(x + i, v);
    }
    for (size_t half = VEC_LEN; half < length; half *= 2) {
        for (size_t first = 0; first < n; first += 2 * half) {
            for (size_t i = first; i < first + half; i += VEC_LEN) {
                const VEC a = vec_load(x + i), b = vec_load(x + i + half);

                vec_store(x + i, vec_add(a, b));
                vec_store(x + i + half, vec_sub(a, b));
            }
        }
    }
}
