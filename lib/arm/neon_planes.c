/* Kernels of rows in planes with NEON; kernels.h says what they do, neon.h what they are made of. */
#if defined(__aarch64__)

#include "neon.h"

#include "../kernels_variants.h"
#include "squeeze_attention.h"

enum { AHEAD = 32 }; /* rows of a list that are asked for before they are read */

/* The 16 numbers of the lower halves of 16 bytes of a row's planes, and of their upper ones. */
INLINE void load_numbers(uint8x16_t numbers[2], const uint8_t *upper, const uint8_t *lower)
{
    const uint8x16_t u = vld1q_u8(upper), low_bits = vdupq_n_u8(15);

    if (lower) {
        const uint8x16_t l = vld1q_u8(lower);

        numbers[0] = vorrq_u8(vshlq_n_u8(u, 4), vandq_u8(l, low_bits));
        numbers[1] = vorrq_u8(vandq_u8(u, vdupq_n_u8(240)), vshrq_n_u8(l, 4));
    } else {
        numbers[0] = vandq_u8(u, low_bits);
        numbers[1] = vshrq_n_u8(u, 4);
    }
}

INLINE void ask(const uint8_t *upper, const uint8_t *lower, size_t at, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += LINE_BYTES) {
        prefetch(upper, at + i);
        if (lower) prefetch(lower, at + i);
    }
}

/* sum += 16 numbers times 16 of a query. */
INLINE int32x4_t add_products(int32x4_t sum, int16x8_t first, int16x8_t second, const int16_t *query)
{
    const int16x8_t a = vld1q_s16(query), b = vld1q_s16(query + 8);

    sum = vmlal_s16(sum, vget_low_s16(first), vget_low_s16(a));
    sum = vmlal_high_s16(sum, first, a);
    sum = vmlal_s16(sum, vget_low_s16(second), vget_low_s16(b));
    return vmlal_high_s16(sum, second, b);
}

/* Products of a row with n_queries queries, a constant. */
INLINE void row_logits(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                       const float *half, size_t n_queries, const uint8_t *upper, const uint8_t *lower, float factor,
                       size_t bytes)
{
    const int16x8_t middle = vdupq_n_s16(lower ? 128 : 8);
    int32x4_t sum[4];

    UNROLL
    for (size_t q = 0; q < n_queries; q++) sum[q] = vdupq_n_s32(0);
    for (size_t i = 0; i < bytes; i += 16) {
        uint8x16_t numbers[2];

        load_numbers(numbers, upper + i, lower ? lower + i : NULL);
        UNROLL
        for (size_t part = 0; part < 2; part++) {
            const uint8x16_t u = numbers[part];
            const int16x8_t first = vsubq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(u))), middle);
            const int16x8_t second = vsubq_s16(vreinterpretq_s16_u16(vmovl_high_u8(u)), middle);

            UNROLL
            for (size_t q = 0; q < n_queries; q++)
                sum[q] = add_products(sum[q], first, second, queries + q * 2 * bytes + 2 * i + 16 * part);
        }
    }
    UNROLL
    for (size_t q = 0; q < n_queries; q++)
        logits[q * stride] = query_factor[q] * factor * (half[q] + (float)vaddvq_s32(sum[q]));
}

void sqz_plane_logits_neon(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                           const float *half, size_t n_queries, const uint8_t *upper, const uint8_t *lower,
                           const float *row_factor, const uint32_t *index, size_t n_rows, size_t n_listed,
                           size_t head_dim)
{
    const size_t bytes = sqz_plane_bytes(head_dim);

    for (size_t r = 0; r < n_rows; r++) {
        const size_t at = (index ? index[r] : r) * bytes;
        const uint8_t *const l = lower ? lower + at : NULL;

        if (index && r + AHEAD < n_listed) ask(upper, lower, index[r + AHEAD] * bytes, bytes);
        for (size_t q = 0, count; q < n_queries; q += count) {
            const int16_t *query = queries + q * 2 * bytes;
            const float *f = query_factor + q, *h = half + q;
            float *out = logits + q * stride + r;

            count = smaller(4, n_queries - q);
            switch (count) {
            case 1: row_logits(out, stride, query, f, h, 1, upper + at, l, row_factor[r], bytes); break;
            case 2: row_logits(out, stride, query, f, h, 2, upper + at, l, row_factor[r], bytes); break;
            case 3: row_logits(out, stride, query, f, h, 3, upper + at, l, row_factor[r], bytes); break;
            default: row_logits(out, stride, query, f, h, 4, upper + at, l, row_factor[r], bytes); break;
            }
        }
    }
}

/* Four of 16 numbers as floats. */
INLINE float32x4_t floats_of(uint8x16_t numbers, size_t part)
{
    const uint16x8_t words = part < 2 ? vmovl_u8(vget_low_u8(numbers)) : vmovl_high_u8(numbers);

    return vcvtq_f32_u32(part % 2 ? vmovl_high_u16(words) : vmovl_u16(vget_low_u16(words)));
}

size_t sqz_plane_sums_neon(float *out, const float *weights, size_t stride, size_t n_queries, const uint8_t *upper,
                           const uint8_t *lower, const float *row_factor, const uint32_t *index, size_t n_rows,
                           size_t head_dim)
{
    const size_t bytes = sqz_plane_bytes(head_dim);
    size_t n_read = 0;

    for (size_t r = 0; r < n_rows; r++) {
        const size_t at = (index ? index[r] : r) * bytes;
        float weight[SQZ_MAX_GROUP_QUERIES];
        bool live = false;

        for (size_t q = 0; q < n_queries; q++) {
            live |= weights[q * stride + r] != 0.0f;
            weight[q] = weights[q * stride + r] * row_factor[r];
        }
        if (!live) continue;
        n_read++;
        for (size_t i = 0; i < bytes; i += 16) {
            uint8x16_t numbers[2];

            load_numbers(numbers, upper + at + i, lower ? lower + at + i : NULL);
            UNROLL
            for (size_t part = 0; part < 8; part++) {
                const float32x4_t x = floats_of(numbers[part / 4], part % 4);
                float *sum = out + 2 * i + 4 * part;

                for (size_t q = 0; q < n_queries; q++, sum += 2 * bytes)
                    vst1q_f32(sum, vfmaq_n_f32(vld1q_f32(sum), x, weight[q]));
            }
        }
    }
    return n_read;
}

#else
typedef int sqz_neon_planes_needs_aarch64; /* ISO C wants a declaration in every file */
#endif
