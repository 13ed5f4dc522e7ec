/*
 * Kernels of rows in planes by products of bytes (vpdpbusd), included by
 * planes_template.h where DOT_BYTES(sum, a, b) is there: sum + products of
 * unsigned by signed bytes, four neighbours added to a 32-bit lane. What is
 * multiplied with, a query or the weights of rows, has 16 bits: two signed bytes
 * q = 256 h + l, of which h is multiplied first, the sum moved up, and l added.
 *
 * A sum of 256 numbers of up to 255 times up to 127 * 257 is below 2^31.
 */

#define BYTES_OF(words) _mm512_cvtepi16_epi8(words)

INLINE __m512i load_row(const uint8_t *p, __mmask64 mask)
{
    return _mm512_maskz_loadu_epi8(mask, p);
}

/* The numbers of the lower halves of a row's bytes, and of the upper ones. */
INLINE void split_bytes(__m512i *low, __m512i *high, __m512i u, __m512i l, bool both)
{
    const __m512i upper = _mm512_set1_epi8((char)240), half = _mm512_set1_epi8(15);

    if (both) {
        *low = _mm512_ternarylogic_epi32(upper, _mm512_slli_epi16(u, 4), l, 0xca);
        *high = _mm512_ternarylogic_epi32(upper, u, _mm512_srli_epi16(l, 4), 0xca);
    } else {
        *low = _mm512_and_si512(u, half);
        *high = _mm512_and_si512(_mm512_srli_epi16(u, 4), half);
    }
}

/* ---- plane_logits ------------------------------------------------------------------------------- */

#define MOST_PLANE_BYTES 128

/* A query's bytes: h and l of the numbers that the lower halves of a row's bytes have, and of those of the upper ones. */
struct byte_query {
    int8_t part[4][MOST_PLANE_BYTES + 64]; /* low h, high h, low l, high l */
};

INLINE void split_query(struct byte_query *out, const int16_t *query, size_t bytes, int *sum)
{
    __m512i total = _mm512_setzero_si512();

    for (size_t b = 0; b < bytes; b += 16) {
        const __m512i q = _mm512_loadu_si512(query + 2 * b);
        const __m512i h = _mm512_srai_epi16(_mm512_add_epi16(q, _mm512_set1_epi16(128)), 8);
        const __m256i h8 = BYTES_OF(h), l8 = BYTES_OF(_mm512_sub_epi16(q, _mm512_slli_epi16(h, 8)));

        total = words_dot(total, q, _mm512_set1_epi16(1));
        _mm_storeu_si128((__m128i *)(void *)(out->part[0] + b), _mm256_castsi256_si128(h8));
        _mm_storeu_si128((__m128i *)(void *)(out->part[1] + b), _mm256_extracti128_si256(h8, 1));
        _mm_storeu_si128((__m128i *)(void *)(out->part[2] + b), _mm256_castsi256_si128(l8));
        _mm_storeu_si128((__m128i *)(void *)(out->part[3] + b), _mm256_extracti128_si256(l8, 1));
    }
    *sum = _mm512_reduce_add_epi32(total);
}

/* Sums of the lanes of four vectors: in each 128 bits that of the same ones of a, b, c, d. */
INLINE __m512i add_lanes(__m512i a, __m512i b, __m512i c, __m512i d)
{
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));

    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

/* Products of 4 vectors of rows with a few queries; pairs: of two rows each of 32 bytes, the first at[j] and at[j + 4].
 * All counts and `pairs`, `both` are constants but bytes, which is one where there are pairs. */
INLINE void byte_tile(__m512i *sum, const struct byte_query *queries, size_t n_queries, const uint8_t *upper,
                      const uint8_t *lower, const size_t *at, size_t bytes, bool pairs, bool both)
{
    UNROLL
    for (size_t j = 0; j < 4 * n_queries; j++) sum[j] = _mm512_setzero_si512();
    for (size_t i = 0; i < bytes; i += 64) {
        const __mmask64 mask = bytes - i < 64 ? ((__mmask64)1 << (bytes - i)) - 1 : ~(__mmask64)0;

        UNROLL
        for (size_t j = 0; j < 4; j++) {
            __m512i u, l = _mm512_setzero_si512(), low, high;

            if (pairs) {
                u = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(const void *)(upper + at[j])));
                u = _mm512_inserti64x4(u, _mm256_loadu_si256((const __m256i *)(const void *)(upper + at[j + 4])), 1);
                if (both) {
                    l = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(const void *)(lower + at[j])));
                    l = _mm512_inserti64x4(l, _mm256_loadu_si256((const __m256i *)(const void *)(lower + at[j + 4])),
                                           1);
                }
            } else {
                u = load_row(upper + at[j] + i, mask);
                if (both) l = load_row(lower + at[j] + i, mask);
            }
            split_bytes(&low, &high, u, l, both);
            UNROLL
            for (size_t q = 0; q < n_queries; q++) {
                __m512i part[4], products;

                UNROLL
                for (size_t k = 0; k < 4; k++) {
                    const int8_t *from = queries[q].part[k] + i;

                    if (pairs)
                        part[k] = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(const void *)from));
                    else part[k] = _mm512_loadu_si512(from);
                }
                products = DOT_BYTES(DOT_BYTES(_mm512_setzero_si512(), low, part[0]), high, part[1]);
                products = DOT_BYTES(_mm512_slli_epi32(products, 8), low, part[2]);
                products = DOT_BYTES(products, high, part[3]);
                sum[q * 4 + j] = _mm512_add_epi32(sum[q * 4 + j], products);
            }
        }
    }
}

/* n_queries, pairs and both are constants. */
INLINE void byte_rows(float *logits, size_t stride, const int16_t *rows, const float *query_factor, const float *half,
                      size_t n_queries, const uint8_t *upper, const uint8_t *lower, const float *row_factor,
                      const uint32_t *index, size_t n_rows, size_t n_listed, size_t bytes, bool pairs, bool both)
{
    const size_t n_tile = pairs ? 8 : 4;
    struct byte_query queries[TILE_QUERIES];
    int32_t less[TILE_QUERIES]; /* the middle of a row's numbers times the query */

    for (size_t q = 0; q < n_queries; q++) {
        split_query(&queries[q], rows + q * 2 * bytes, bytes, &less[q]);
        less[q] *= both ? 128 : 8;
        for (size_t k = 0; k < 4 && bytes % 64; k++) memset(queries[q].part[k] + bytes, 0, 64 - bytes % 64);
    }
    for (size_t r = 0; r < n_rows; r += n_tile) {
        const size_t n_valid = smaller(n_tile, n_rows - r);
        const __mmask8 valid = (__mmask8)((1u << n_valid) - 1);
        const __m256 factor = _mm256_maskz_loadu_ps(valid, row_factor + r);
        __m512i sum[TILE_QUERIES * 4];
        size_t at[8];

        if (index && n_listed > r) {
            ask_listed(upper, bytes, index + r, n_listed - r, n_tile);
            if (both) ask_listed(lower, bytes, index + r, n_listed - r, n_tile);
        } else if (!index) {
            for (size_t line = 0; line < n_tile * bytes; line += LINE_BYTES) {
                prefetch(upper, r * bytes + AHEAD_BYTES / 2 + line);
                if (both) prefetch(lower, r * bytes + AHEAD_BYTES / 2 + line);
            }
        }
        UNROLL
        for (size_t j = 0; j < n_tile; j++) {
            const size_t row = r + smaller(j, n_valid - 1);

            at[j] = (index ? index[row] : row) * bytes;
        }
        byte_tile(sum, queries, n_queries, upper, lower, at, bytes, pairs, both);
        UNROLL
        for (size_t q = 0; q < n_queries; q++) {
            const __m512i all = add_lanes(sum[q * 4], sum[q * 4 + 1], sum[q * 4 + 2], sum[q * 4 + 3]);
            const __m512i two = _mm512_add_epi32(all, _mm512_shuffle_i32x4(all, all, 0xb1));
            /* Lanes 0 and 2 have four rows each; of single rows their sum is wanted. */
            const __m512i four = pairs ? _mm512_shuffle_i32x4(two, two, 0x08)
                                       : _mm512_add_epi32(two, _mm512_shuffle_i32x4(two, two, 0x4e));
            const __m256i whole = _mm256_sub_epi32(_mm512_castsi512_si256(four), _mm256_set1_epi32(less[q]));
            const __m256 dot = _mm256_add_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(half[q]));

            _mm256_mask_storeu_ps(logits + q * stride + r, valid,
                                  _mm256_mul_ps(dot, _mm256_mul_ps(_mm256_set1_ps(query_factor[q]), factor)));
        }
    }
}

#define BYTE_ROWS_OF(n_queries)                                                                                        \
    KERNEL void byte_rows_##n_queries(float *logits, size_t stride, const int16_t *rows, const float *query_factor,    \
                                      const float *half, const uint8_t *upper, const uint8_t *lower,                   \
                                      const float *row_factor, const uint32_t *index, size_t n_rows, size_t n_listed,  \
                                      size_t bytes)                                                                    \
    {                                                                                                                  \
        if (bytes == 32 && lower)                                                                                      \
            byte_rows(logits, stride, rows, query_factor, half, n_queries, upper, lower, row_factor, index, n_rows,    \
                      n_listed, 32, true, true);                                                                       \
        else if (bytes == 32)                                                                                          \
            byte_rows(logits, stride, rows, query_factor, half, n_queries, upper, NULL, row_factor, index, n_rows,     \
                      n_listed, 32, true, false);                                                                      \
        else if (lower)                                                                                                \
            byte_rows(logits, stride, rows, query_factor, half, n_queries, upper, lower, row_factor, index, n_rows,    \
                      n_listed, bytes, false, true);                                                                   \
        else                                                                                                           \
            byte_rows(logits, stride, rows, query_factor, half, n_queries, upper, NULL, row_factor, index, n_rows,     \
                      n_listed, bytes, false, false);                                                                  \
    }
BYTE_ROWS_OF(1)
BYTE_ROWS_OF(2)
BYTE_ROWS_OF(3)
BYTE_ROWS_OF(4)

KERNEL void plane_logits(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                         const float *half, size_t n_queries, const uint8_t *upper, const uint8_t *lower,
                         const float *row_factor, const uint32_t *index, size_t n_rows, size_t n_listed,
                         size_t head_dim)
{
    const size_t bytes = sqz_plane_bytes(head_dim);

    for (size_t q = 0, count; q < n_queries; q += count) {
        const int16_t *rows = queries + q * 2 * bytes;
        const float *f = query_factor + q, *h = half + q;
        const size_t listed = q == 0 ? n_listed : 0;
        float *out = logits + q * stride;

        count = next_queries(n_queries - q);
        switch (count) {
        case 1: byte_rows_1(out, stride, rows, f, h, upper, lower, row_factor, index, n_rows, listed, bytes); break;
        case 2: byte_rows_2(out, stride, rows, f, h, upper, lower, row_factor, index, n_rows, listed, bytes); break;
        case 3: byte_rows_3(out, stride, rows, f, h, upper, lower, row_factor, index, n_rows, listed, bytes); break;
        default: byte_rows_4(out, stride, rows, f, h, upper, lower, row_factor, index, n_rows, listed, bytes); break;
        }
    }
}

/* ---- plane_sums --------------------------------------------------------------------------------- */

#define SUM_ROWS       256      /* that are added before sums are floats: more could pass 2^31 */
#define SUM_ROWS_AHEAD 16       /* rows of the list that are asked for before they are added */
#define WEIGHT_MOST    32639.0f /* 127 * 257 */

/* Rows that have a weight: where their numbers begin, their weights times their factors, and these as h and l of
 * integers, what one of them is and what all of them are. */
struct byte_weights {
    size_t n, at[SUM_ROWS];
    float weight[SQZ_MAX_GROUP_QUERIES][SUM_ROWS];
    int8_t part[SQZ_MAX_GROUP_QUERIES][2][SUM_ROWS];
    float unit[SQZ_MAX_GROUP_QUERIES], sum[SQZ_MAX_GROUP_QUERIES];
    int32_t whole[SQZ_MAX_GROUP_QUERIES];
};

/* Lists the rows of up to SUM_ROWS that have a weight. */
INLINE void list_weights(struct byte_weights *w, const float *weights, size_t stride, size_t n_queries,
                         const float *row_factor, const uint32_t *index, size_t first, size_t n, size_t bytes)
{
    uint32_t column[SUM_ROWS + 16];
    __m512 most[SQZ_MAX_GROUP_QUERIES], sum[SQZ_MAX_GROUP_QUERIES];

    w->n = 0;
    for (size_t q = 0; q < n_queries; q++) most[q] = sum[q] = _mm512_setzero_ps();
    for (size_t r = 0; r < n; r += 16) {
        const __mmask16 part = n - r < 16 ? lanes_below(n - r) : (__mmask16)~0;
        __m512 bits = _mm512_setzero_ps(), factor;
        __mmask16 live;

        for (size_t q = 0; q < n_queries; q++)
            bits = _mm512_or_ps(bits, _mm512_maskz_loadu_ps(part, weights + q * stride + first + r));
        live = (__mmask16)vec_live(bits);
        if (live == (__mmask16)~0) {
            factor = _mm512_loadu_ps(row_factor + first + r);
            _mm512_storeu_si512(column + w->n, index_add(index_start(), (int)(first + r)));
            for (size_t q = 0; q < n_queries; q++) {
                const __m512 product = _mm512_mul_ps(_mm512_loadu_ps(weights + q * stride + first + r), factor);

                most[q] = _mm512_max_ps(_mm512_abs_ps(product), most[q]);
                sum[q] = _mm512_add_ps(sum[q], product);
                _mm512_storeu_ps(w->weight[q] + w->n, product);
            }
            w->n += 16;
            continue;
        }
        factor = _mm512_maskz_loadu_ps(live, row_factor + first + r);
        _mm512_storeu_si512(column + w->n,
                            _mm512_maskz_compress_epi32(live, index_add(index_start(), (int)(first + r))));
        for (size_t q = 0; q < n_queries; q++) {
            const __m512 x = _mm512_maskz_loadu_ps(live, weights + q * stride + first + r);
            const __m512 product = _mm512_mul_ps(x, factor);

            most[q] = _mm512_max_ps(_mm512_abs_ps(product), most[q]);
            sum[q] = _mm512_add_ps(sum[q], product);
            _mm512_mask_storeu_ps(w->weight[q] + w->n, lanes_below((size_t)__builtin_popcount(live)),
                                  _mm512_maskz_compress_ps(live, product));
        }
        w->n += (size_t)__builtin_popcount(live);
    }
    for (size_t j = 0; j < w->n; j++) w->at[j] = (index ? index[column[j]] : column[j]) * bytes;
    for (size_t q = 0; q < n_queries; q++) {
        const float largest = _mm512_reduce_max_ps(most[q]);

        w->unit[q] = largest / WEIGHT_MOST;
        w->sum[q] = _mm512_reduce_add_ps(sum[q]);
    }
}

/* Rounds the weights to integers. Those of missing rows up to a multiple of 4 are 0. */
INLINE void round_weights(struct byte_weights *w, size_t n_queries)
{
    for (size_t q = 0; q < n_queries; q++) {
        const __m512 inverse = _mm512_set1_ps(w->unit[q] > 0 ? 1.0f / w->unit[q] : 0.0f);
        __m512i whole = _mm512_setzero_si512();

        for (size_t j = 0; j < w->n; j += 16) {
            const __mmask16 part = w->n - j < 16 ? lanes_below(w->n - j) : (__mmask16)~0;
            const __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(part, w->weight[q] + j), inverse);
            const __m512i most = _mm512_set1_epi32((int)WEIGHT_MOST);
            /* The inverse may be rounded up. */
            const __m512i i = _mm512_max_epi32(_mm512_min_epi32(_mm512_cvtps_epi32(x), most),
                                               _mm512_sub_epi32(_mm512_setzero_si512(), most));
            const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(128)), 8);

            whole = _mm512_add_epi32(whole, i);
            _mm_storeu_si128((__m128i *)(void *)(w->part[q][0] + j), _mm512_cvtepi32_epi8(h));
            _mm_storeu_si128((__m128i *)(void *)(w->part[q][1] + j),
                             _mm512_cvtepi32_epi8(_mm512_sub_epi32(i, _mm512_slli_epi32(h, 8))));
        }
        w->whole[q] = _mm512_reduce_add_epi32(whole);
    }
    while (w->n % 4) w->at[w->n] = w->at[w->n - 1], w->n++;
}

/* 16 bytes of four rows, across: lane i has byte i of each. */
INLINE __m512i across(const uint8_t *plane, const size_t *at)
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i within = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(const void *)(plane + at[0])));

    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(const void *)(plane + at[1])), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(const void *)(plane + at[2])), 2);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(const void *)(plane + at[3])), 3);
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(order, x), within);
}

INLINE __m512i weights_of_4(const int8_t *p)
{
    int32_t four;

    memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
}

INLINE void ask_plane_row(const uint8_t *upper, const uint8_t *lower, size_t at, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += LINE_BYTES) {
        prefetch(upper, at + i);
        if (lower) prefetch(lower, at + i);
    }
}

/* The numbers of bytes [c, c + 16) of the rows, across: for each four of them those of lower and of upper halves. */
INLINE void cross_rows(__m512i (*numbers)[2], const struct byte_weights *w, const uint8_t *upper, const uint8_t *lower,
                       size_t c, bool both)
{
    for (size_t r = 0; r < w->n; r += 4)
        split_bytes(&numbers[r / 4][0], &numbers[r / 4][1], across(upper + c, w->at + r),
                    both ? across(lower + c, w->at + r) : _mm512_setzero_si512(), both);
}

/* Adds bytes [begin, end) of the rows for queries from number `first` on; n_queries, both, and whether there are `numbers`
 * of 16 bytes already, are constants. */
INLINE void add_bytes(float *out, const struct byte_weights *w, size_t first, size_t n_queries, const uint8_t *upper,
                      const uint8_t *lower, size_t bytes, size_t begin, size_t end, bool both, bool ask,
                      const __m512i (*numbers)[2])
{
    const int middle = both ? 128 : 8;

    for (size_t c = begin; c < end; c += 16) {
        __m512i sum[TILE_QUERIES][2][2]; /* of numbers of the lower halves, the upper ones; h, l */

        UNROLL
        for (size_t q = 0; q < n_queries; q++)
            sum[q][0][0] = sum[q][0][1] = sum[q][1][0] = sum[q][1][1] = _mm512_setzero_si512();
        for (size_t r = 0; r < w->n; r += 4) {
            __m512i low, high;

            if (ask && c == 0)
                for (size_t j = r + SUM_ROWS_AHEAD; j < r + SUM_ROWS_AHEAD + 4 && j < w->n; j++)
                    ask_plane_row(upper, both ? lower : NULL, w->at[j], bytes);
            if (numbers) {
                low = numbers[r / 4][0];
                high = numbers[r / 4][1];
            } else {
                split_bytes(&low, &high, across(upper + c, w->at + r),
                            both ? across(lower + c, w->at + r) : _mm512_setzero_si512(), both);
            }
            UNROLL
            for (size_t q = 0; q < n_queries; q++) {
                const __m512i h = weights_of_4(w->part[first + q][0] + r), l = weights_of_4(w->part[first + q][1] + r);

                sum[q][0][0] = DOT_BYTES(sum[q][0][0], low, h);
                sum[q][0][1] = DOT_BYTES(sum[q][0][1], low, l);
                sum[q][1][0] = DOT_BYTES(sum[q][1][0], high, h);
                sum[q][1][1] = DOT_BYTES(sum[q][1][1], high, l);
            }
        }
        UNROLL
        for (size_t q = 0; q < n_queries; q++) {
            /* Less the middle times what the weights are in all, as integers and as they were: rounding does not move
             * all numbers together. */
            const __m512i less = _mm512_set1_epi32(middle * w->whole[first + q]);
            const __m512 unit = _mm512_set1_ps(w->unit[first + q]),
                         more = _mm512_set1_ps((float)middle * w->sum[first + q]);

            UNROLL
            for (size_t k = 0; k < 2; k++) {
                float *to = out + (first + q) * 2 * bytes + 2 * c + 16 * k;
                const __m512i all = _mm512_add_epi32(_mm512_slli_epi32(sum[q][k][0], 8), sum[q][k][1]);
                const __m512 x = _mm512_cvtepi32_ps(_mm512_sub_epi32(all, less));

                _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_fmadd_ps(unit, x, more)));
            }
        }
    }
}

#define ADD_BYTES_OF(n_queries)                                                                                        \
    KERNEL void add_bytes_##n_queries(float *out, const struct byte_weights *w, const uint8_t *upper,                  \
                                      const uint8_t *lower, size_t bytes)                                              \
    {                                                                                                                  \
        if (lower) add_bytes(out, w, 0, n_queries, upper, lower, bytes, 0, bytes, true, true, NULL);                   \
        else add_bytes(out, w, 0, n_queries, upper, NULL, bytes, 0, bytes, false, true, NULL);                         \
    }                                                                                                                  \
    KERNEL void add_crossed_##n_queries(float *out, const struct byte_weights *w, size_t first,                        \
                                        const __m512i(*numbers)[2], size_t bytes, size_t c, bool both)                 \
    {                                                                                                                  \
        if (both) add_bytes(out, w, first, n_queries, NULL, NULL, bytes, c, c + 16, true, false, numbers);             \
        else add_bytes(out, w, first, n_queries, NULL, NULL, bytes, c, c + 16, false, false, numbers);                 \
    }
ADD_BYTES_OF(1)
ADD_BYTES_OF(2)
ADD_BYTES_OF(3)
ADD_BYTES_OF(4)

/* More queries than a tile has: rows are put across once for all of them. */
KERNEL void add_many(float *out, const struct byte_weights *w, size_t n_queries, const uint8_t *upper,
                     const uint8_t *lower, size_t bytes)
{
    __m512i numbers[SUM_ROWS / 4][2];

    for (size_t c = 0; c < bytes; c += 16) {
        if (lower) cross_rows(numbers, w, upper, lower, c, true);
        else cross_rows(numbers, w, upper, NULL, c, false);
        for (size_t q = 0, count; q < n_queries; q += count) {
            count = next_queries(n_queries - q);
            switch (count) {
            case 1: add_crossed_1(out, w, q, numbers, bytes, c, lower); break;
            case 2: add_crossed_2(out, w, q, numbers, bytes, c, lower); break;
            case 3: add_crossed_3(out, w, q, numbers, bytes, c, lower); break;
            default: add_crossed_4(out, w, q, numbers, bytes, c, lower); break;
            }
        }
    }
}

KERNEL size_t plane_sums(float *out, const float *weights, size_t stride, size_t n_queries, const uint8_t *upper,
                         const uint8_t *lower, const float *row_factor, const uint32_t *index, size_t n_rows,
                         size_t head_dim)
{
    const size_t bytes = sqz_plane_bytes(head_dim);
    struct byte_weights w;
    size_t n_read = 0;

    for (size_t first = 0; first < n_rows; first += SUM_ROWS) {
        list_weights(&w, weights, stride, n_queries, row_factor, index, first, smaller(SUM_ROWS, n_rows - first),
                     bytes);
        n_read += w.n;
        if (w.n == 0) continue;
        for (size_t j = 0; j < (n_queries > TILE_QUERIES ? w.n : smaller(SUM_ROWS_AHEAD, w.n)) && index; j++)
            ask_plane_row(upper, lower, w.at[j], bytes);
        round_weights(&w, n_queries);
        switch (n_queries) {
        case 1: add_bytes_1(out, &w, upper, lower, bytes); break;
        case 2: add_bytes_2(out, &w, upper, lower, bytes); break;
        case 3: add_bytes_3(out, &w, upper, lower, bytes); break;
        case 4: add_bytes_4(out, &w, upper, lower, bytes); break;
        default: add_many(out, &w, n_queries, upper, lower, bytes); break;
        }
    }
    return n_read;
}
