/*
 * The kernels with NEON, for every 64-bit ARM CPU: the table, conversions and
 * what runs over plain vectors of floats. neon_rows.c and neon_matrix.c hold
 * the rest.
 */
#if defined(__aarch64__)

#include "neon.h"

#include <math.h>
#include <string.h>

#include "../kernels_variants.h"

/* ---- Conversions -------------------------------------------------------------------------------- */

static void f16_to_f32(float *dst, const uint16_t *src, size_t n)
{
    size_t i = 0;
    float32x4_t v[2];

    for (; i + 8 <= n; i += 8) {
        load_halves(v, src + i);
        vst1q_f32(dst + i, v[0]);
        vst1q_f32(dst + i + 4, v[1]);
    }
    if (i < n) {
        uint16_t halves[8] = {0};
        float floats[8];

        memcpy(halves, src + i, (n - i) * sizeof halves[0]);
        load_halves(v, halves);
        vst1q_f32(floats, v[0]);
        vst1q_f32(floats + 4, v[1]);
        memcpy(dst + i, floats, (n - i) * sizeof floats[0]);
    }
}

static void f32_to_f16(uint16_t *dst, const float *src, size_t n)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8) store_halves(dst + i, vld1q_f32(src + i), vld1q_f32(src + i + 4));
    if (i < n) {
        float floats[8] = {0};
        uint16_t halves[8];

        memcpy(floats, src + i, (n - i) * sizeof floats[0]);
        store_halves(halves, vld1q_f32(floats), vld1q_f32(floats + 4));
        memcpy(dst + i, halves, (n - i) * sizeof halves[0]);
    }
}

/* ---- Vectors of floats -------------------------------------------------------------------------- */

static float max(const float *x, size_t n)
{
    const float32x4_t lowest = vdupq_n_f32(-INFINITY);
    float32x4_t largest[4] = {lowest, lowest, lowest, lowest};
    size_t i = 0;

    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        UNROLL
        for (size_t v = 0; v < 4; v++)
            largest[v] = vmaxnmq_f32(vld1q_f32(x + i + v * LANES), largest[v]); /* the other one where one is NaN */
    }
    for (; i < n; i += LANES) largest[0] = vmaxnmq_f32(load_part(x + i, n - i, lowest), largest[0]);
    return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(largest[0], largest[1]), vmaxnmq_f32(largest[2], largest[3])));
}

/* As exp_of() of kernels_portable.c, which explains it. */
INLINE float32x4_t exp_of(float32x4_t x)
{
    const float32x4_t magic = vdupq_n_f32(0x1.8p23f);
    const float32x4_t shifted = vfmaq_f32(magic, x, vdupq_n_f32(0x1.715476p0f));
    const float32x4_t n = vsubq_f32(shifted, magic);
    const float32x4_t high = vfmsq_f32(x, n, vdupq_n_f32(0x1.62e4p-1f));
    const float32x4_t r = vfmsq_f32(high, n, vdupq_n_f32(0x1.7f7d1cp-20f));
    const uint32x4_t exponent = vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23);
    float32x4_t p = vdupq_n_f32(0x1.6a23d0p-10f);

    p = vfmaq_f32(vdupq_n_f32(0x1.123a20p-7f), p, r);
    p = vfmaq_f32(vdupq_n_f32(0x1.5558f2p-5f), p, r);
    p = vfmaq_f32(vdupq_n_f32(0x1.555492p-3f), p, r);
    p = vfmaq_f32(vdupq_n_f32(0x1.fffffcp-2f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    p = vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(p), exponent));
    p = select_less(vdupq_n_f32(88.7228f), x, vdupq_n_f32(INFINITY), p);
    return select_less(x, vdupq_n_f32(-87.33f), zero(), p);
}

static float exp_sum(float *x, size_t n, float shift)
{
    const float32x4_t shift_vec = vdupq_n_f32(shift);
    float32x4_t sum[4] = {zero(), zero(), zero(), zero()};
    size_t i = 0;

    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        UNROLL
        for (size_t v = 0; v < 4; v++) {
            const float32x4_t y = exp_of(vsubq_f32(vld1q_f32(x + i + v * LANES), shift_vec));

            vst1q_f32(x + i + v * LANES, y);
            sum[v] = vaddq_f32(sum[v], y);
        }
    }
    for (; i < n; i += LANES) { /* missing lanes are -INFINITY, whose exponential is 0 */
        const float32x4_t y = exp_of(vsubq_f32(load_part(x + i, n - i, vdupq_n_f32(-INFINITY)), shift_vec));

        store_part(x + i, n - i, y);
        sum[0] = vaddq_f32(sum[0], y);
    }
    return vaddvq_f32(vaddq_f32(vaddq_f32(sum[0], sum[1]), vaddq_f32(sum[2], sum[3])));
}

static void scale(float *x, float factor, size_t n)
{
    for (size_t i = 0; i < n; i += LANES)
        store_part(x + i, n - i, vmulq_n_f32(load_part(x + i, n - i, zero()), factor));
}

static void multiply(float *x, const float *y, size_t n)
{
    for (size_t i = 0; i < n; i += LANES)
        store_part(x + i, n - i, vmulq_f32(load_part(x + i, n - i, zero()), load_part(y + i, n - i, zero())));
}

static void add_scaled(float *z, const float *x, float factor, const float *y, size_t n)
{
    for (size_t i = 0; i < n; i += LANES) {
        const float32x4_t sum = vfmaq_n_f32(load_part(x + i, n - i, zero()), load_part(y + i, n - i, zero()), factor);

        store_part(z + i, n - i, sum);
    }
}

static float dot(const float *x, const float *y, size_t n)
{
    float32x4_t sum[4] = {zero(), zero(), zero(), zero()};
    size_t i = 0;

    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        UNROLL
        for (size_t v = 0; v < 4; v++)
            sum[v] = vfmaq_f32(sum[v], vld1q_f32(x + i + v * LANES), vld1q_f32(y + i + v * LANES));
    }
    for (; i < n; i += LANES)
        sum[0] = vfmaq_f32(sum[0], load_part(x + i, n - i, zero()), load_part(y + i, n - i, zero()));
    return vaddvq_f32(vaddq_f32(vaddq_f32(sum[0], sum[1]), vaddq_f32(sum[2], sum[3])));
}

static void drop_below(float *weights, size_t stride, size_t n_queries, size_t n, float limit, float *sums)
{
    const float32x4_t limit_vec = vdupq_n_f32(limit);
    float32x4_t sum[SQZ_MAX_GROUP_QUERIES];

    for (size_t q = 0; q < n_queries; q++) sum[q] = zero();
    for (size_t i = 0; i < n; i += LANES) {
        float32x4_t largest = zero();

        for (size_t q = 0; q < n_queries; q++)
            largest = vmaxnmq_f32(load_part(weights + q * stride + i, n - i, zero()), largest);
        for (size_t q = 0; q < n_queries; q++) {
            float *w = weights + q * stride + i;
            const float32x4_t kept = select_less(largest, limit_vec, zero(), load_part(w, n - i, zero()));

            sum[q] = vaddq_f32(sum[q], kept);
            store_part(w, n - i, kept);
        }
    }
    for (size_t q = 0; q < n_queries; q++) sums[q] = vaddvq_f32(sum[q]);
}

INLINE void update_largest(float32x4_t *largest, uint32x4_t *at, float32x4_t value, uint32x4_t now)
{
    const uint32x4_t greater = vcgtq_f32(value, *largest);

    *largest = vbslq_f32(greater, value, *largest);
    *at = vbslq_u32(greater, now, *at);
}

static size_t argmax_biased(const float *x, const float *bias, size_t n, float *best)
{
    static const uint32_t first_lanes[LANES] = {0, 1, 2, 3};
    const size_t most = (size_t)1 << 30; /* indices are 32-bit in the vectors: larger inputs go piece by piece */
    const float32x4_t lowest = vdupq_n_f32(-INFINITY);
    size_t index = 0;

    *best = -INFINITY;
    for (size_t first = 0; first < n; first += most) {
        const size_t count = smaller(most, n - first);
        const float *xs = x + first, *bs = bias + first;
        float32x4_t largest[2] = {lowest, lowest};
        uint32x4_t now = vld1q_u32(first_lanes), at[2] = {now, now};
        float value[2 * LANES];
        uint32_t position[2 * LANES];
        size_t i = 0, winner = 0;

        for (; i + 2 * LANES <= count; i += 2 * LANES) {
            UNROLL
            for (size_t v = 0; v < 2; v++) {
                const float32x4_t sum = vaddq_f32(vld1q_f32(xs + i + v * LANES), vld1q_f32(bs + i + v * LANES));

                update_largest(&largest[v], &at[v], sum, now);
                now = vaddq_u32(now, vdupq_n_u32(LANES));
            }
        }
        for (; i < count; i += LANES) {
            const float32x4_t sum =
                vaddq_f32(load_part(xs + i, count - i, lowest), load_part(bs + i, count - i, zero()));

            update_largest(&largest[0], &at[0], sum, now);
            now = vaddq_u32(now, vdupq_n_u32(LANES));
        }
        for (size_t v = 0; v < 2; v++) {
            vst1q_f32(value + v * LANES, largest[v]);
            vst1q_u32(position + v * LANES, at[v]);
        }
        for (size_t lane = 1; lane < 2 * LANES; lane++)
            if (value[lane] > value[winner] || (value[lane] == value[winner] && position[lane] < position[winner]))
                winner = lane;
        if (value[winner] > *best) {
            *best = value[winner];
            index = first + position[winner];
        }
    }
    return index;
}

const struct sqz_kernels sqz_kernels_neon = {
    .name = "neon",
    .f16_to_f32 = f16_to_f32,
    .f32_to_f16 = f32_to_f16,
    .row_logits = sqz_row_logits_neon,
    .row_logits_i8 = sqz_row_logits_i8_neon,
    .listed_logits = sqz_listed_logits_neon,
    .listed_logits_i8 = sqz_listed_logits_i8_neon,
    .plane_logits = sqz_plane_logits_neon,
    .plane_sums = sqz_plane_sums_neon,
    .turn = sqz_turn_portable,
    .row_accumulate = sqz_row_accumulate_neon,
    .add_codes = sqz_add_codes_neon,
    .repeat = sqz_repeat_neon,
    .segment_sums = sqz_segment_sums_neon,
    .scale_max = sqz_scale_max_neon,
    .list_at_least = sqz_list_at_least_neon,
    .log_shifted = sqz_log_shifted_neon,
    .max = max,
    .exp_sum = exp_sum,
    .drop_below = drop_below,
    .scale = scale,
    .multiply = multiply,
    .add_scaled = add_scaled,
    .dot = dot,
    .transpose_f16 = sqz_transpose_f16_neon,
    .gemm = sqz_gemm_neon,
    .argmax_biased = argmax_biased,
};

#else
typedef int sqz_kernels_neon_needs_aarch64; /* ISO C wants a declaration in every file */
#endif
