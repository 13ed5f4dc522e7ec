/*
 * What the files of the NEON variant share: helpers for whole and partial
 * vectors, and the kernels that kernels_neon.c takes from the other files.
 *
 * Every 64-bit ARM CPU has NEON, so there is nothing to detect and no target
 * attribute. Base ARMv8.0-A alone is used: F16 is converted (fcvtl), never
 * computed with.
 */
#ifndef SQZ_LIB_ARM_NEON_H
#define SQZ_LIB_ARM_NEON_H

#include <arm_neon.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

/* Two hints that emit no instruction; each takes back a choice of compilers that needs more registers than there are.
 * The reasons given were read off the code that GCC 12 makes, with llvm-mca's model of TSV110, not timed on a CPU.
 *
 * Loads stay on their side: GCC gathers those of a whole tile at its top and then moves sums about (row_logits, four
 * queries: 30 cycles a step -> 20, which is what its multiplications and conversions alone take). */
#define KEEP_LOADS_BELOW() __asm__ volatile("" ::: "memory")
/* The lanes of v stay in v: before a loop that multiplies by lanes of a vector from outside, compilers spread each of
 * them over a vector of its own (row_accumulate, four queries: 34 loads in a step -> 15). */
#define KEEP_LANES(v) __asm__("" : "+w"(v))

#define LANES      4 /* floats a vector */
#define LINE_BYTES 64

/* Into the second-level cache. A prefetch never faults; the address is formed as an integer because a pointer past the
 * end of an array would be undefined. */
INLINE void prefetch(const void *base, size_t offset_bytes)
{
    __builtin_prefetch((const void *)((uintptr_t)base + offset_bytes), 0, 2);
}

INLINE size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

INLINE float32x4_t zero(void)
{
    return vdupq_n_f32(0.0f);
}

/* The first n lanes from memory, the others from other; nothing else is read. n >= LANES: all. */
INLINE float32x4_t load_part(const float *p, size_t n, float32x4_t other)
{
    if (n >= LANES) return vld1q_f32(p);
    other = n > 0 ? vld1q_lane_f32(p, other, 0) : other;
    other = n > 1 ? vld1q_lane_f32(p + 1, other, 1) : other;
    return n > 2 ? vld1q_lane_f32(p + 2, other, 2) : other;
}

/* The first n lanes to memory; nothing else is written. n >= LANES: all. */
INLINE void store_part(float *p, size_t n, float32x4_t v)
{
    if (n >= LANES) {
        vst1q_f32(p, v);
        return;
    }
    if (n & 2) {
        vst1_f32(p, vget_low_f32(v));
        p += 2;
        v = vextq_f32(v, v, 2);
    }
    if (n & 1) vst1q_lane_f32(p, v, 0);
}

/* a < b ? x : y */
INLINE float32x4_t select_less(float32x4_t a, float32x4_t b, float32x4_t x, float32x4_t y)
{
    return vbslq_f32(vcltq_f32(a, b), x, y);
}

/* Eight F16 as two vectors. */
INLINE void load_halves(float32x4_t *v, const uint16_t *p)
{
    const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(p));

    v[0] = vcvt_f32_f16(vget_low_f16(halves));
    v[1] = vcvt_high_f32_f16(halves);
}

INLINE void store_halves(uint16_t *p, float32x4_t low, float32x4_t high)
{
    vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(low), high)));
}

/* The kernels of neon_rows.c, neon_keys.c, neon_matrix.c and neon_planes.c; kernels.h says what they do. */
void sqz_row_logits_neon(float *logits, size_t stride, const float *queries, size_t n_queries, const uint16_t *rows,
                         size_t n_rows, size_t head_dim, float scale);
void sqz_row_logits_i8_neon(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                            size_t n_queries, const int8_t *rows, const float *row_factor, size_t n_rows,
                            size_t head_dim);
void sqz_listed_logits_neon(float *logits, size_t stride, const float *queries, size_t n_queries, const uint16_t *rows,
                            const uint32_t *index, size_t n_rows, size_t n_listed, size_t head_dim, float scale);
void sqz_listed_logits_i8_neon(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                               size_t n_queries, const int8_t *rows, const float *row_factor, const uint32_t *index,
                               size_t n_rows, size_t n_listed, size_t head_dim);
size_t sqz_row_accumulate_neon(float *out, const float *weights, size_t stride, size_t n_queries, const uint16_t *rows,
                               const uint32_t *index, size_t n_rows, size_t head_dim);
void sqz_add_codes_neon(float *out, size_t stride, const float *tables, size_t n_queries, const uint32_t *words,
                        size_t word_stride, size_t n_words, size_t n);
void sqz_repeat_neon(float *out, size_t stride, const float *values, size_t value_stride, size_t n_queries,
                     const uint32_t *counts, size_t n);
void sqz_segment_sums_neon(float *sums, size_t sum_stride, const float *x, size_t stride, size_t n_queries,
                           const uint32_t *counts, size_t n);
void sqz_scale_max_neon(float *largest, float *x, float factor, size_t n);
size_t sqz_list_at_least_neon(uint32_t *list, const float *x, size_t n, float limit);
void sqz_log_shifted_neon(float *x, float shift, size_t n);
void sqz_plane_logits_neon(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                           const float *half, size_t n_queries, const uint8_t *upper, const uint8_t *lower,
                           const float *row_factor, const uint32_t *index, size_t n_rows, size_t n_listed,
                           size_t head_dim);
size_t sqz_plane_sums_neon(float *out, const float *weights, size_t stride, size_t n_queries, const uint8_t *upper,
                           const uint8_t *lower, const float *row_factor, const uint32_t *index, size_t n_rows,
                           size_t head_dim);
void sqz_transpose_f16_neon(float *dst, size_t ld, const uint16_t *rows, size_t n_rows, size_t head_dim);
void sqz_gemm_neon(float *c, size_t ldc, const float *a, size_t lda, const float *b, size_t ldb, size_t m, size_t n,
                   size_t k, float alpha, bool accumulate);

#endif
