/*
 * The kernels with NEON for matrices out of the cache: register-tiled product
 * and the transposition that feeds it.
 */
#if defined(__aarch64__)

#include "neon.h"

#include <string.h>

#include "../kernels.h"

/* ---- transpose_f16 ------------------------------------------------------------------------------ */

/* Eight columns of eight rows; rows from n_valid on are taken as zero. */
INLINE void transpose_8x8(float *dst, size_t ld, const uint16_t *rows, size_t n_valid, size_t head_dim)
{
    uint16x8_t a[8], b[8];

    UNROLL
    for (size_t r = 0; r < 8; r++) a[r] = r < n_valid ? vld1q_u16(rows + r * head_dim) : vdupq_n_u16(0);
    /* Three rounds, each of which interleaves row r with row r + 4. */
    UNROLL
    for (size_t r = 0; r < 4; r++) {
        b[2 * r] = vzip1q_u16(a[r], a[r + 4]);
        b[2 * r + 1] = vzip2q_u16(a[r], a[r + 4]);
    }
    UNROLL
    for (size_t r = 0; r < 4; r++) {
        a[2 * r] = vzip1q_u16(b[r], b[r + 4]);
        a[2 * r + 1] = vzip2q_u16(b[r], b[r + 4]);
    }
    UNROLL
    for (size_t r = 0; r < 4; r++) {
        b[2 * r] = vzip1q_u16(a[r], a[r + 4]);
        b[2 * r + 1] = vzip2q_u16(a[r], a[r + 4]);
    }
    UNROLL
    for (size_t j = 0; j < 8; j++) {
        const float16x8_t column = vreinterpretq_f16_u16(b[j]);

        vst1q_f32(dst + j * ld, vcvt_f32_f16(vget_low_f16(column)));
        vst1q_f32(dst + j * ld + 4, vcvt_high_f32_f16(column));
    }
}

void sqz_transpose_f16_neon(float *dst, size_t ld, const uint16_t *rows, size_t n_rows, size_t head_dim)
{
    size_t r = 0;

    for (; r + 8 <= n_rows; r += 8)
        for (size_t i = 0; i < head_dim; i += 8)
            transpose_8x8(dst + i * ld + r, ld, rows + r * head_dim + i, 8, head_dim);
    if (r < n_rows) {
        for (size_t i = 0; i < head_dim; i += 8)
            transpose_8x8(dst + i * ld + r, ld, rows + r * head_dim + i, n_rows - r, head_dim);
        r += 8;
    }
    for (size_t i = 0; r < ld && i < head_dim; i++) memset(dst + i * ld + r, 0, (ld - r) * sizeof dst[0]);
}

/* ---- gemm --------------------------------------------------------------------------------------- */

#define GEMM_ROWS      4
#define GEMM_VECS      (SQZ_GEMM_N / LANES) /* 4 x 16: 16 sums, 4 vectors of b, 4 of a */
#define PACK_FLOATS    8192                 /* of b, copied where that pays; 32 KiB of stack */
#define PACK_ROWS_OF_C 16                   /* ... it does from here on: four tiles share the copy */
#define PACK_STRIDE    128                  /* ... and for b with longer rows, which share few cache sets */

/* Step l + lane of four: one vector of every row of a holds all four factors. The lane must be a literal. */
#define GEMM_STEP(lane)                                                                                                \
    do {                                                                                                               \
        KEEP_LOADS_BELOW();                                                                                            \
        UNROLL                                                                                                         \
        for (size_t v = 0; v < n_vecs; v++) {                                                                          \
            const float32x4_t right = vld1q_f32(b + (l + (lane)) * ldb + v * LANES);                                   \
            UNROLL                                                                                                     \
            for (size_t i = 0; i < n_rows; i++)                                                                        \
                sum[i * n_vecs + v] = vfmaq_laneq_f32(sum[i * n_vecs + v], right, left[i], lane);                      \
        }                                                                                                              \
    } while (0)

/* n_rows x n_vecs vectors of c, both constants. */
INLINE void gemm_tile(float *c, size_t ldc, const float *a, size_t lda, const float *b, size_t ldb, size_t n_rows,
                      size_t n_vecs, size_t k, float alpha, bool accumulate)
{
    float32x4_t sum[GEMM_ROWS * GEMM_VECS], left[GEMM_ROWS];
    size_t l = 0;

    UNROLL
    for (size_t i = 0; i < n_rows * n_vecs; i++) sum[i] = zero();
    for (; l + 4 <= k; l += 4) {
        UNROLL
        for (size_t i = 0; i < n_rows; i++) left[i] = vld1q_f32(a + i * lda + l);
        GEMM_STEP(0);
        GEMM_STEP(1);
        GEMM_STEP(2);
        GEMM_STEP(3);
    }
    for (; l < k; l++) {
        UNROLL
        for (size_t i = 0; i < n_rows; i++) left[i] = vld1q_dup_f32(a + i * lda + l);
        GEMM_STEP(0);
    }
    UNROLL
    for (size_t i = 0; i < n_rows; i++) {
        UNROLL
        for (size_t v = 0; v < n_vecs; v++) {
            float *out = c + i * ldc + v * LANES;
            const float32x4_t product = vmulq_n_f32(sum[i * n_vecs + v], alpha);

            vst1q_f32(out, accumulate ? vaddq_f32(product, vld1q_f32(out)) : product);
        }
    }
}

/* m rows, SQZ_GEMM_N columns. A last tile of one or two rows would leave the FMA units idle, so the rows before it are
 * shared out: 5 is 3 + 2, 6 is 3 + 3. */
static void gemm_panel(float *c, size_t ldc, const float *a, size_t lda, const float *b, size_t ldb, size_t m, size_t k,
                       float alpha, bool accumulate)
{
    while (m) {
        const size_t rows = m == 5 || m == 6 ? 3 : smaller(m, GEMM_ROWS);

        switch (rows) {
        case 1: gemm_tile(c, ldc, a, lda, b, ldb, 1, GEMM_VECS, k, alpha, accumulate); break;
        case 2: gemm_tile(c, ldc, a, lda, b, ldb, 2, GEMM_VECS, k, alpha, accumulate); break;
        case 3: gemm_tile(c, ldc, a, lda, b, ldb, 3, GEMM_VECS, k, alpha, accumulate); break;
        default: gemm_tile(c, ldc, a, lda, b, ldb, 4, GEMM_VECS, k, alpha, accumulate); break;
        }
        c += rows * ldc;
        a += rows * lda;
        m -= rows;
    }
}

/* The same, out of a copy of b's columns in which the rows are neighbours. */
static void gemm_packed(float *c, size_t ldc, const float *a, size_t lda, const float *b, size_t ldb, size_t m,
                        size_t k, float alpha, bool accumulate)
{
    float packed[PACK_FLOATS] __attribute__((aligned(64)));

    for (size_t l = 0, depth; l < k; l += depth) {
        depth = smaller(PACK_FLOATS / SQZ_GEMM_N, k - l);
        for (size_t i = 0; i < depth; i++) memcpy(packed + i * SQZ_GEMM_N, b + (l + i) * ldb, SQZ_GEMM_N * sizeof b[0]);
        gemm_panel(c, ldc, a + l, lda, packed, SQZ_GEMM_N, m, depth, alpha, accumulate || l > 0);
    }
}

void sqz_gemm_neon(float *c, size_t ldc, const float *a, size_t lda, const float *b, size_t ldb, size_t m, size_t n,
                   size_t k, float alpha, bool accumulate)
{
    const bool pack = m >= PACK_ROWS_OF_C && ldb > PACK_STRIDE && k > 0;
    size_t j = 0;

    /* One or two rows of c: wider tiles, or there are too few sums to keep the FMA units busy. */
    for (; m == 1 && j + 2 * SQZ_GEMM_N <= n; j += 2 * SQZ_GEMM_N)
        gemm_tile(c + j, ldc, a, lda, b + j, ldb, 1, 2 * GEMM_VECS, k, alpha, accumulate);
    for (; m == 2 && j + 2 * SQZ_GEMM_N <= n; j += 2 * SQZ_GEMM_N)
        gemm_tile(c + j, ldc, a, lda, b + j, ldb, 2, 2 * GEMM_VECS, k, alpha, accumulate);
    for (; j < n; j += SQZ_GEMM_N)
        if (pack) gemm_packed(c + j, ldc, a, lda, b + j, ldb, m, k, alpha, accumulate);
        else gemm_panel(c + j, ldc, a, lda, b + j, ldb, m, k, alpha, accumulate);
}

#else
typedef int sqz_neon_matrix_needs_aarch64; /* ISO C wants a declaration in every file */
#endif
