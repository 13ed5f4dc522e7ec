/*
 * The kernels in plain C: correct on every machine, the reference for the
 * others' shape, and fast enough to be used where no SIMD variant exists.
 *
 * Sums are kept in LANES separate floats, which lets a compiler use whatever
 * vectors its target has without being allowed to reorder float additions.
 * F16 is converted with integer arithmetic; NaNs come out quiet with the upper
 * bits of their payload, as the x86 and ARM instructions do it.
 */
#include <math.h>
#include <string.h>

#include "kernels_variants.h"

#define LANES        8
#define MAX_HEAD_DIM 256

static inline float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of_f16(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    const uint32_t normal = (magnitude << 13) + (112u << 23); /* exponent bias 15 -> 127 */
    const uint32_t special = normal + (112u << 23);           /* exponent 31 -> 255 */
    const uint32_t quiet = magnitude > 0x7c00 ? 1u << 22 : 0;
    const uint32_t subnormal = bits_of((float)(int32_t)magnitude * 0x1p-24f);
    const uint32_t bits = magnitude < 0x0400 ? subnormal : magnitude < 0x7c00 ? normal : special | quiet;

    return float_of(sign | bits);
}

static inline uint16_t f16_of_float(float value)
{
    const uint32_t bits = bits_of(value), sign = bits >> 31 << 15, magnitude = bits & 0x7fffffff;
    uint32_t half;

    if (magnitude > 0x7f800000) half = 0x7e00 | (magnitude >> 13 & 0x3ff);
    else if (magnitude >= 0x477ff000) /* 65520, half way between the largest F16 and the next power of two */
        half = 0x7c00;
    else if (magnitude < 0x38800000) /* below 2^-14: one ulp of 0.5f is one unit of a subnormal F16 */
        half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    else half = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    return (uint16_t)(sign | half);
}

static void f16_to_f32(float *dst, const uint16_t *src, size_t n)
{
    for (size_t i = 0; i < n; i++) dst[i] = float_of_f16(src[i]);
}

static void f32_to_f16(uint16_t *dst, const float *src, size_t n)
{
    for (size_t i = 0; i < n; i++) dst[i] = f16_of_float(src[i]);
}

static float dot_row(const float *a, const float *b, size_t n) /* n is a multiple of LANES */
{
    float sum[LANES] = {0};

    for (size_t i = 0; i < n; i += LANES)
        for (size_t j = 0; j < LANES; j++) sum[j] += a[i + j] * b[i + j];
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

static void row_logits(float *logits, size_t stride, const float *queries, size_t n_queries, const uint16_t *rows,
                       size_t n_rows, size_t head_dim, float scale)
{
    float row[MAX_HEAD_DIM];

    for (size_t r = 0; r < n_rows; r++) {
        f16_to_f32(row, rows + r * head_dim, head_dim);
        for (size_t q = 0; q < n_queries; q++)
            logits[q * stride + r] = scale * dot_row(queries + q * head_dim, row, head_dim);
    }
}

static void row_logits_i8(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                          size_t n_queries, const int8_t *rows, const float *row_factor, size_t n_rows, size_t head_dim)
{
    const size_t query_stride = (head_dim + 31) / 32 * 32;

    for (size_t r = 0; r < n_rows; r++) {
        for (size_t q = 0; q < n_queries; q++) {
            int32_t sum = 0;

            for (size_t i = 0; i < head_dim; i++) sum += queries[q * query_stride + i] * rows[r * head_dim + i];
            logits[q * stride + r] = query_factor[q] * row_factor[r] * (float)sum;
        }
    }
}

static void listed_logits(float *logits, size_t stride, const float *queries, size_t n_queries, const uint16_t *rows,
                          const uint32_t *index, size_t n_rows, size_t n_listed, size_t head_dim, float scale)
{
    (void)n_listed;
    for (size_t r = 0; r < n_rows; r++)
        row_logits(logits + r, stride, queries, n_queries, rows + (size_t)index[r] * head_dim, 1, head_dim, scale);
}

static void listed_logits_i8(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                             size_t n_queries, const int8_t *rows, const float *row_factor, const uint32_t *index,
                             size_t n_rows, size_t n_listed, size_t head_dim)
{
    (void)n_listed;
    for (size_t r = 0; r < n_rows; r++) {
        row_logits_i8(logits + r, stride, queries, query_factor, n_queries, rows + (size_t)index[r] * head_dim,
                      row_factor + index[r], 1, head_dim);
    }
}

static bool is_live(const float *weights, size_t stride, size_t n_queries)
{
    for (size_t q = 0; q < n_queries; q++)
        if (weights[q * stride] != 0.0f) return true;
    return false;
}

static size_t row_accumulate(float *out, const float *weights, size_t stride, size_t n_queries, const uint16_t *rows,
                             const uint32_t *index, size_t n_rows, size_t head_dim)
{
    float row[MAX_HEAD_DIM];
    size_t n_read = 0;

    for (size_t r = 0; r < n_rows; r++) {
        if (!is_live(weights + r, stride, n_queries)) continue;
        f16_to_f32(row, rows + (index ? index[r] : r) * head_dim, head_dim);
        for (size_t q = 0; q < n_queries; q++) {
            const float weight = weights[q * stride + r];
            float *sum = out + q * head_dim;

            for (size_t i = 0; i < head_dim; i++) sum[i] += weight * row[i];
        }
        n_read++;
    }
    return n_read;
}

static float max(const float *x, size_t n)
{
    float largest = -INFINITY;

    for (size_t i = 0; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

/* exp(x) = 2^n * exp(r), n = round(x / ln 2), r = x - n ln 2 with ln 2 split in two so that n * 0x1.62e4p-1 is exact,
 * and a minimax polynomial for exp(r) on |r| <= ln 2 / 2, relative error 3.1e-9 before rounding. Adding n to the
 * exponent bits is right as long as the result is a normal number, which the two limits make sure of.
 * x86/kernels_template.h does the same in vectors. */
static inline float exp_of(float x)
{
    const float round_magic = 0x1.8p23f; /* adding it leaves the rounded integer in the low mantissa bits */
    const float shifted = x * 0x1.715476p0f + round_magic;
    const float n = shifted - round_magic;
    const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    float p = 0x1.6a23d0p-10f;

    p = p * r + 0x1.123a20p-7f;
    p = p * r + 0x1.5558f2p-5f;
    p = p * r + 0x1.555492p-3f;
    p = p * r + 0x1.fffffcp-2f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    p = float_of(bits_of(p) + (bits_of(shifted) << 23));
    p = x > 88.7228f ? INFINITY : p;
    return x < -87.33f ? 0.0f : p;
}

static float exp_sum(float *x, size_t n, float shift)
{
    float sum[LANES] = {0}, total;
    size_t i = 0;

    for (; i + LANES <= n; i += LANES) {
        for (size_t j = 0; j < LANES; j++) {
            x[i + j] = exp_of(x[i + j] - shift);
            sum[j] += x[i + j];
        }
    }
    total = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
    for (; i < n; i++) {
        x[i] = exp_of(x[i] - shift);
        total += x[i];
    }
    return total;
}

static void drop_below(float *weights, size_t stride, size_t n_queries, size_t n, float limit, float *sums)
{
    for (size_t q = 0; q < n_queries; q++) sums[q] = 0.0f;
    for (size_t i = 0; i < n; i++) {
        float largest = 0.0f;

        for (size_t q = 0; q < n_queries; q++)
            largest = weights[q * stride + i] > largest ? weights[q * stride + i] : largest;
        for (size_t q = 0; q < n_queries; q++) {
            float *w = weights + q * stride + i;

            *w = largest < limit ? 0.0f : *w;
            sums[q] += *w;
        }
    }
}

static void add_codes(float *out, size_t stride, const float *tables, size_t n_queries, const uint32_t *words,
                      size_t word_stride, size_t n_words, size_t n)
{
    for (size_t w = 0; w < n_words; w++) {
        for (size_t q = 0; q < n_queries; q++) {
            const float *table = tables + (w * n_queries + q) * 8 * 16;
            const uint32_t *codes = words + w * word_stride;

            for (size_t i = 0; i < n; i++) {
                float sum = out[q * stride + i];

                for (size_t p = 0; p < 8; p++) sum += table[p * 16 + (codes[i] >> 4 * p & 15)];
                out[q * stride + i] = sum;
            }
        }
    }
}

static void repeat(float *out, size_t stride, const float *values, size_t value_stride, size_t n_queries,
                   const uint32_t *counts, size_t n)
{
    for (size_t q = 0; q < n_queries; q++) {
        float *to = out + q * stride;

        for (size_t s = 0; s < n; s++)
            for (uint32_t i = 0; i < counts[s]; i++) *to++ = values[q * value_stride + s];
    }
}

static void segment_sums(float *sums, size_t sum_stride, const float *x, size_t stride, size_t n_queries,
                         const uint32_t *counts, size_t n)
{
    for (size_t q = 0; q < n_queries; q++) {
        const float *from = x + q * stride;

        for (size_t s = 0; s < n; s++) {
            float sum = 0.0f;

            for (uint32_t i = 0; i < counts[s]; i++) sum += *from++;
            sums[q * sum_stride + s] = sum;
        }
    }
}

static void scale_max(float *largest, float *x, float factor, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        x[i] *= factor;
        largest[i] = x[i] > largest[i] ? x[i] : largest[i];
    }
}

static size_t list_at_least(uint32_t *list, const float *x, size_t n, float limit)
{
    size_t n_listed = 0;

    for (size_t block = 0; block < n; block += LANES) { /* few are: a block that has none is passed over as one */
        const size_t count = n - block < LANES ? n - block : LANES;
        float largest = -INFINITY;

        for (size_t i = block; i < block + count; i++) largest = x[i] > largest ? x[i] : largest;
        for (size_t i = block; i < block + count && largest >= limit; i++)
            if (x[i] >= limit) list[n_listed++] = (uint32_t)i;
    }
    return n_listed;
}

/* x = 2^e m with m from sqrt(1/2) to sqrt(2): log x = e log 2 + log m, and with s = (m - 1) / (m + 1), at most 0.172 in
 * size, log m = 2 (s + s^3 / 3 + s^5 / 5 + ...), whose terms behind s^9 add less than 1e-9. */
static inline float log_of(float x)
{
    const int32_t above = (int32_t)bits_of(x) - 0x3f3504f3; /* bits of sqrt(1/2) */
    const int32_t exponent = above >> 23;
    const float m = float_of(bits_of(x) - ((uint32_t)exponent << 23)), s = (m - 1.0f) / (m + 1.0f), t = s * s;
    const float p = 2.0f + t * (2.0f / 3.0f + t * (2.0f / 5.0f + t * (2.0f / 7.0f + t * (2.0f / 9.0f))));

    return x < 0x1p-126f ? -INFINITY : s * p + (float)exponent * 0x1.62e430p-1f;
}

static void log_shifted(float *x, float shift, size_t n)
{
    for (size_t i = 0; i < n; i++) x[i] = log_of(x[i]) + shift;
}

static void scale(float *x, float factor, size_t n)
{
    for (size_t i = 0; i < n; i++) x[i] *= factor;
}

static void transpose_f16(float *dst, size_t ld, const uint16_t *rows, size_t n_rows, size_t head_dim)
{
    for (size_t i = 0; i < head_dim; i++) {
        for (size_t r = 0; r < n_rows; r++) dst[i * ld + r] = float_of_f16(rows[r * head_dim + i]);
        for (size_t r = n_rows; r < ld; r++) dst[i * ld + r] = 0.0f;
    }
}

static void gemm(float *c, size_t ldc, const float *a, size_t lda, const float *b, size_t ldb, size_t m, size_t n,
                 size_t k, float alpha, bool accumulate)
{
    for (size_t i = 0; i < m; i++) {
        for (size_t j = 0; j < n; j += SQZ_GEMM_N) {
            float sum[SQZ_GEMM_N] = {0};
            float *out = c + i * ldc + j;

            for (size_t l = 0; l < k; l++)
                for (size_t x = 0; x < SQZ_GEMM_N; x++) sum[x] += a[i * lda + l] * b[l * ldb + j + x];
            for (size_t x = 0; x < SQZ_GEMM_N; x++) out[x] = alpha * sum[x] + (accumulate ? out[x] : 0.0f);
        }
    }
}

static void multiply(float *x, const float *y, size_t n)
{
    for (size_t i = 0; i < n; i++) x[i] *= y[i];
}

static void add_scaled(float *z, const float *x, float factor, const float *y, size_t n)
{
    for (size_t i = 0; i < n; i++) z[i] = x[i] + factor * y[i];
}

static float dot(const float *x, const float *y, size_t n)
{
    const size_t whole = n / LANES * LANES;
    float sum = dot_row(x, y, whole);

    for (size_t i = whole; i < n; i++) sum += x[i] * y[i];
    return sum;
}

static size_t argmax_biased(const float *x, const float *bias, size_t n, float *best)
{
    size_t index = 0;

    *best = -INFINITY;
    for (size_t i = 0; i < n; i++) {
        const float value = x[i] + bias[i];
        if (value > *best) {
            *best = value;
            index = i;
        }
    }
    return index;
}

const struct sqz_kernels sqz_kernels_portable = {
    .name = "portable",
    .f16_to_f32 = f16_to_f32,
    .f32_to_f16 = f32_to_f16,
    .row_logits = row_logits,
    .row_logits_i8 = row_logits_i8,
    .listed_logits = listed_logits,
    .listed_logits_i8 = listed_logits_i8,
    .plane_logits = sqz_plane_logits_portable,
    .plane_sums = sqz_plane_sums_portable,
    .turn = sqz_turn_portable,
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
