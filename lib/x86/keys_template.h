/*
 * The kernels that go from clusters to single keys, for any vector width.
 * Included by kernels_template.h, whose primitives they use; counts of keys are
 * short, some 20 a cluster, so what happens at their ends decides.
 */

/* Tables of a tile of queries lie in the first-level cache; one shift of the codes serves all of them. */
INLINE void codes_tile(float *out, size_t stride, const float *tables, size_t n_all, size_t n_queries,
                       const uint32_t *words, size_t word_stride, size_t n_words, size_t i, size_t n)
{
    const bool whole = n - i >= VEC_LEN;
    VEC sum[TILE_QUERIES];

    UNROLL
    for (size_t q = 0; q < n_queries; q++)
        sum[q] = whole ? vec_load(out + q * stride + i) : vec_load_part(out + q * stride + i, n - i, vec_zero());
    for (size_t w = 0; w < n_words; w++) {
        const uint32_t *at = words + w * word_stride + i;
        const float *table = tables + w * n_all * 8 * 16;
        INDEX codes = whole ? index_load(at) : index_load_part(at, n - i);

        UNROLL
        for (size_t p = 0; p < 8; p++) {
            UNROLL
            for (size_t q = 0; q < n_queries; q++) sum[q] = vec_add(sum[q], vec_table(table + (q * 8 + p) * 16, codes));
            codes = index_shift_4(codes);
        }
    }
    UNROLL
    for (size_t q = 0; q < n_queries; q++)
        if (whole) vec_store(out + q * stride + i, sum[q]);
        else vec_store_part(out + q * stride + i, n - i, sum[q]);
}

#define CODES_OF(n_queries)                                                                                            \
    KERNEL void codes_of_##n_queries(float *out, size_t stride, const float *tables, size_t n_all,                     \
                                     const uint32_t *words, size_t word_stride, size_t n_words, size_t n)              \
    {                                                                                                                  \
        for (size_t i = 0; i < n; i += VEC_LEN)                                                                        \
            codes_tile(out, stride, tables, n_all, n_queries, words, word_stride, n_words, i, n);                      \
    }
CODES_OF(1)
CODES_OF(2)
CODES_OF(3)
#if TILE_QUERIES > 3
CODES_OF(4)
#endif

KERNEL void add_codes(float *out, size_t stride, const float *tables, size_t n_queries, const uint32_t *words,
                      size_t word_stride, size_t n_words, size_t n)
{
    for (size_t q = 0, tile; q < n_queries; q += tile) {
        float *rows = out + q * stride;
        const float *first = tables + q * 8 * 16;

        tile = smaller(n_queries - q, TILE_QUERIES);
        switch (tile) {
        case 1: codes_of_1(rows, stride, first, n_queries, words, word_stride, n_words, n); break;
        case 2: codes_of_2(rows, stride, first, n_queries, words, word_stride, n_words, n); break;
        case 3: codes_of_3(rows, stride, first, n_queries, words, word_stride, n_words, n); break;
#if TILE_QUERIES > 3
        default: codes_of_4(rows, stride, first, n_queries, words, word_stride, n_words, n); break;
#endif
        }
    }
}

/* The last store ends where the numbers end and may lie over the one before: partial stores are slow on some CPUs. */
KERNEL void repeat(float *out, size_t stride, const float *values, size_t value_stride, size_t n_queries,
                   const uint32_t *counts, size_t n)
{
    for (size_t q = 0; q < n_queries; q++) {
        float *to = out + q * stride;

        for (size_t s = 0; s < n; s++) {
            const VEC value = vec_set1(values[q * value_stride + s]);
            const size_t count = counts[s];

            for (size_t i = 0; i + VEC_LEN <= count; i += VEC_LEN) vec_store(to + i, value);
            if (count >= VEC_LEN) vec_store(to + count - VEC_LEN, value);
            else vec_store_part(to, count, value);
            to += count;
        }
    }
}

INLINE VEC segment(const float *x, size_t n)
{
    VEC sum = vec_zero();
    size_t i = 0;

    for (; i + VEC_LEN <= n; i += VEC_LEN) sum = vec_add(sum, vec_load(x + i));
    return i < n ? vec_add(sum, vec_load_part(x + i, n - i, vec_zero())) : sum;
}

/* Four horizontal sums cost little more than one. */
KERNEL void segment_sums(float *sums, size_t sum_stride, const float *x, size_t stride, size_t n_queries,
                         const uint32_t *counts, size_t n)
{
    for (size_t q = 0; q < n_queries; q++) {
        const float *from = x + q * stride;
        float *to = sums + q * sum_stride;
        size_t s = 0;

        for (; s + 4 <= n; s += 4) {
            VEC part[4];

            UNROLL
            for (size_t i = 0; i < 4; i++) {
                part[i] = segment(from, counts[s + i]);
                from += counts[s + i];
            }
            _mm_storeu_ps(to + s, vec_sum4(part[0], part[1], part[2], part[3]));
        }
        for (; s < n; s++) {
            to[s] = vec_sum(segment(from, counts[s]));
            from += counts[s];
        }
    }
}

KERNEL void scale_max(float *largest, float *x, float factor, size_t n)
{
    const VEC factor_vec = vec_set1(factor);
    size_t i = 0;

    for (; i + VEC_LEN <= n; i += VEC_LEN) {
        const VEC y = vec_mul(vec_load(x + i), factor_vec);

        vec_store(x + i, y);
        vec_store(largest + i, vec_max(y, vec_load(largest + i)));
    }
    if (i < n) {
        const VEC y = vec_mul(vec_load_part(x + i, n - i, vec_zero()), factor_vec);

        vec_store_part(x + i, n - i, y);
        vec_store_part(largest + i, n - i, vec_max(y, vec_load_part(largest + i, n - i, vec_zero())));
    }
}

KERNEL size_t list_at_least(uint32_t *list, const float *x, size_t n, float limit)
{
    const VEC limit_vec = vec_set1(limit);
    size_t n_listed = 0;

    for (size_t i = 0; i < n; i += VEC_LEN) {
        const VEC v = n - i >= VEC_LEN ? vec_load(x + i) : vec_load_part(x + i, n - i, vec_set1(-INFINITY));

        for (unsigned at_least = vec_at_least(v, limit_vec); at_least; at_least &= at_least - 1) {
            const size_t at = i + (size_t)__builtin_ctz(at_least);

            if (at < n) /* an infinite limit is reached by what is not there as well */
                list[n_listed++] = (uint32_t)at;
        }
    }
    return n_listed;
}

/* As log_of() of kernels_portable.c, which explains it. */
INLINE VEC vec_log(VEC x)
{
    const INDEX bits = index_of(x), above = index_sub(bits, index_set1(0x3f3504f3));
    const INDEX exponent = index_shift_right_23(above);
    const VEC m = vec_of(index_sub(bits, index_shift_left_23(exponent)));
    const VEC s = vec_div(vec_sub(m, vec_set1(1.0f)), vec_add(m, vec_set1(1.0f))), t = vec_mul(s, s);
    VEC p = vec_set1(2.0f / 9.0f);

    p = vec_fma(p, t, vec_set1(2.0f / 7.0f));
    p = vec_fma(p, t, vec_set1(2.0f / 5.0f));
    p = vec_fma(p, t, vec_set1(2.0f / 3.0f));
    p = vec_fma(p, t, vec_set1(2.0f));
    p = vec_fma(p, s, vec_mul(words_to_float(exponent), vec_set1(0x1.62e430p-1f)));
    return vec_select_less(x, vec_set1(0x1p-126f), vec_set1(-INFINITY), p);
}

KERNEL void log_shifted(float *x, float shift, size_t n)
{
    const VEC shift_vec = vec_set1(shift);
    size_t i = 0;

    for (; i + VEC_LEN <= n; i += VEC_LEN) vec_store(x + i, vec_add(vec_log(vec_load(x + i)), shift_vec));
    if (i < n) vec_store_part(x + i, n - i, vec_add(vec_log(vec_load_part(x + i, n - i, vec_set1(1.0f))), shift_vec));
}
