/*
 * The inner loops of clustering in plain C, and the choice among the variants:
 * the one that goes with the variant that kernels.c has chosen, so that hiding
 * or forcing an instruction set holds for both.
 */
#include "kmeans_kernels.h"

#include <math.h>
#include <string.h>

static size_t minimum(size_t a, size_t b)
{
    return a < b ? a : b;
}

static void nearest(float *best, uint32_t *column, const float *rows, const uint32_t *index, size_t m,
                    const float *panel, const float *bias, size_t n, size_t dim)
{
    for (size_t r = 0; r < m; r++) {
        const float *point = rows + (index ? index[r] : r) * dim;
        best[r] = -INFINITY;
        column[r] = 0;
        for (size_t j = 0; j < n; j += SQZ_GEMM_N) {
            const size_t first = j / SQZ_KMEANS_BLOCK * SQZ_KMEANS_BLOCK;
            const size_t width = minimum(SQZ_KMEANS_BLOCK, n - first);
            const float *block = panel + first * dim + (j - first);
            float sum[SQZ_GEMM_N] = {0};
            for (size_t i = 0; i < dim; i++)
                for (size_t x = 0; x < SQZ_GEMM_N; x++) sum[x] += point[i] * block[i * width + x];
            for (size_t x = 0; x < SQZ_GEMM_N; x++) {
                const float score = sum[x] + bias[j + x];
                column[r] = score > best[r] ? (uint32_t)(j + x) : column[r];
                best[r] = score > best[r] ? score : best[r];
            }
        }
    }
}

static void gather_panel(float *panel, size_t n_columns, const float *rows, const uint32_t *index, size_t n, size_t dim)
{
    for (size_t first = 0; first < n_columns; first += SQZ_KMEANS_BLOCK) {
        const size_t width = minimum(SQZ_KMEANS_BLOCK, n_columns - first);
        float *block = panel + first * dim;
        for (size_t j = 0; j < width; j++) {
            const size_t column = first + j;
            const float *row = column < n ? rows + (index ? index[column] : column) * dim : NULL;
            for (size_t i = 0; i < dim; i++) block[i * width + j] = row ? row[i] : 0.0f;
        }
    }
}

static void few_largest(float *value, uint32_t *at, size_t count, float *x, size_t n)
{
    for (size_t i = 0; i < count; i++) {
        size_t best = 0;
        for (size_t j = 1; j < n; j++) best = x[j] > x[best] ? j : best;
        value[i] = x[best];
        at[i] = (uint32_t)best;
        x[best] = -INFINITY;
    }
}

static size_t at_least(uint32_t *at, size_t most, const float *x, size_t n, float limit)
{
    size_t count = 0;
    for (size_t j = 0; j < n; j++) {
        if (x[j] >= limit) {
            if (count < most) at[count] = (uint32_t)j;
            count++;
        }
    }
    return count;
}

const struct sqz_kmeans_kernels sqz_kmeans_kernels_portable = {
    .name = "portable",
    .nearest = nearest,
    .gather_panel = gather_panel,
    .few_largest = few_largest,
    .at_least = at_least,
};

const struct sqz_kmeans_kernels *sqz_kmeans_kernels_get(void)
{
#if defined(__x86_64__)
    const char *name = sqz_kernels_get()->name;
    if (strncmp(name, "avx512", 6) == 0) /* with or without more behind it */
        return &sqz_kmeans_kernels_avx512;
    if (strcmp(name, "avx2") == 0) return &sqz_kmeans_kernels_avx2;
#endif
    return &sqz_kmeans_kernels_portable;
}
