/* The NEON kernels that go from clusters to single keys. Counts of keys are short, some 20 a cluster. */
#if defined(__aarch64__)

#include <math.h>
#include <string.h>

#include "../kernels.h"
#include "neon.h"

enum { TILE_QUERIES = 4 };

/* Bytes of table[lane & 15] in every lane: a table of 16 floats is the 64 bytes that one byte look-up reaches. */
INLINE uint8x16_t bytes_of(uint32x4_t codes)
{
    return vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100), vandq_u32(codes, vdupq_n_u32(15)), 0x04040404));
}

INLINE float32x4_t look_up(const float *table, uint8x16_t at)
{
    return vreinterpretq_f32_u8(vqtbl4q_u8(vld1q_u8_x4((const uint8_t *)table), at));
}

INLINE uint32x4_t load_words(const uint32_t *p, size_t n)
{
    return vreinterpretq_u32_f32(load_part((const float *)(const void *)p, n, zero()));
}

/* Where a code points to is found once for all queries. */
INLINE void codes_tile(float *out, size_t stride, const float *tables, size_t n_all, size_t n_queries,
                       const uint32_t *words, size_t word_stride, size_t n_words, size_t n)
{
    for (size_t i = 0; i < n; i += LANES) {
        float32x4_t sum[TILE_QUERIES];

        UNROLL
        for (size_t q = 0; q < n_queries; q++) sum[q] = load_part(out + q * stride + i, n - i, zero());
        for (size_t w = 0; w < n_words; w++) {
            const float *table = tables + w * n_all * 8 * 16;
            uint32x4_t codes = load_words(words + w * word_stride + i, n - i);

            for (size_t p = 0; p < 8; p++) {
                const uint8x16_t at = bytes_of(codes);

                UNROLL
                for (size_t q = 0; q < n_queries; q++)
                    sum[q] = vaddq_f32(sum[q], look_up(table + (q * 8 + p) * 16, at));
                codes = vshrq_n_u32(codes, 4);
            }
        }
        UNROLL
        for (size_t q = 0; q < n_queries; q++) store_part(out + q * stride + i, n - i, sum[q]);
    }
}

void sqz_add_codes_neon(float *out, size_t stride, const float *tables, size_t n_queries, const uint32_t *words,
                        size_t word_stride, size_t n_words, size_t n)
{
    for (size_t q = 0, tile; q < n_queries; q += tile) {
        float *rows = out + q * stride;
        const float *first = tables + q * 8 * 16;

        tile = smaller(n_queries - q, TILE_QUERIES);
        switch (tile) {
        case 1: codes_tile(rows, stride, first, n_queries, 1, words, word_stride, n_words, n); break;
        case 2: codes_tile(rows, stride, first, n_queries, 2, words, word_stride, n_words, n); break;
        case 3: codes_tile(rows, stride, first, n_queries, 3, words, word_stride, n_words, n); break;
        default: codes_tile(rows, stride, first, n_queries, 4, words, word_stride, n_words, n); break;
        }
    }
}

void sqz_repeat_neon(float *out, size_t stride, const float *values, size_t value_stride, size_t n_queries,
                     const uint32_t *counts, size_t n)
{
    for (size_t q = 0; q < n_queries; q++) {
        float *to = out + q * stride;

        for (size_t s = 0; s < n; s++) {
            const float32x4_t value = vdupq_n_f32(values[q * value_stride + s]);

            for (size_t i = 0; i < counts[s]; i += LANES) store_part(to + i, counts[s] - i, value);
            to += counts[s];
        }
    }
}

void sqz_segment_sums_neon(float *sums, size_t sum_stride, const float *x, size_t stride, size_t n_queries,
                           const uint32_t *counts, size_t n)
{
    for (size_t q = 0; q < n_queries; q++) {
        const float *from = x + q * stride;

        for (size_t s = 0; s < n; s++) {
            float32x4_t sum = zero();

            for (size_t i = 0; i < counts[s]; i += LANES)
                sum = vaddq_f32(sum, load_part(from + i, counts[s] - i, zero()));
            sums[q * sum_stride + s] = vaddvq_f32(sum);
            from += counts[s];
        }
    }
}

void sqz_scale_max_neon(float *largest, float *x, float factor, size_t n)
{
    for (size_t i = 0; i < n; i += LANES) {
        const float32x4_t y = vmulq_n_f32(load_part(x + i, n - i, zero()), factor);

        store_part(x + i, n - i, y);
        store_part(largest + i, n - i, vmaxnmq_f32(y, load_part(largest + i, n - i, zero())));
    }
}

size_t sqz_list_at_least_neon(uint32_t *list, const float *x, size_t n, float limit)
{
    const float32x4_t limit_vec = vdupq_n_f32(limit);
    size_t n_listed = 0, i = 0;

    for (; i + 2 * LANES <= n; i += 2 * LANES) { /* a bit for each: 4 a lane, the lanes of two vectors side by side */
        const uint16x4_t low = vmovn_u32(vcgeq_f32(vld1q_f32(x + i), limit_vec));
        const uint16x4_t high = vmovn_u32(vcgeq_f32(vld1q_f32(x + i + LANES), limit_vec));
        uint64_t bits = vget_lane_u64(vreinterpret_u64_u8(vmovn_u16(vcombine_u16(low, high))), 0);

        for (bits &= 0x0101010101010101; bits; bits &= bits - 1)
            list[n_listed++] = (uint32_t)(i + (size_t)__builtin_ctzll(bits) / 8);
    }
    for (; i < n; i++)
        if (x[i] >= limit) list[n_listed++] = (uint32_t)i;
    return n_listed;
}

/* As log_of() of kernels_portable.c, which explains it. */
INLINE float32x4_t log_of(float32x4_t x)
{
    const int32x4_t bits = vreinterpretq_s32_f32(x);
    const int32x4_t exponent = vshrq_n_s32(vsubq_s32(bits, vdupq_n_s32(0x3f3504f3)), 23);
    const float32x4_t m = vreinterpretq_f32_s32(vsubq_s32(bits, vshlq_n_s32(exponent, 23)));
    const float32x4_t one = vdupq_n_f32(1.0f), s = vdivq_f32(vsubq_f32(m, one), vaddq_f32(m, one)), t = vmulq_f32(s, s);
    float32x4_t p = vdupq_n_f32(2.0f / 9.0f);

    p = vfmaq_f32(vdupq_n_f32(2.0f / 7.0f), p, t);
    p = vfmaq_f32(vdupq_n_f32(2.0f / 5.0f), p, t);
    p = vfmaq_f32(vdupq_n_f32(2.0f / 3.0f), p, t);
    p = vfmaq_f32(vdupq_n_f32(2.0f), p, t);
    p = vfmaq_f32(vmulq_n_f32(vcvtq_f32_s32(exponent), 0x1.62e430p-1f), p, s);
    return select_less(x, vdupq_n_f32(0x1p-126f), vdupq_n_f32(-INFINITY), p);
}

void sqz_log_shifted_neon(float *x, float shift, size_t n)
{
    for (size_t i = 0; i < n; i += LANES)
        store_part(x + i, n - i, vaddq_f32(log_of(load_part(x + i, n - i, vdupq_n_f32(1.0f))), vdupq_n_f32(shift)));
}

#else
typedef int sqz_neon_keys_needs_aarch64; /* ISO C wants a declaration in every file */
#endif
