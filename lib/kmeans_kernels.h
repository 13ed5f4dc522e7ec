/*
 * The inner loops of clustering, in variants for each instruction set: which
 * centroid is nearest to a point, and putting centroids where that loop wants
 * them. Products and the search for the largest are one loop, because the
 * lists that k-means compares a point with are short (32 centroids): written
 * out and searched again, a row of scores costs as much as its products.
 *
 * A panel holds n columns of dim numbers in blocks of SQZ_KMEANS_BLOCK columns,
 * block after block, each [dim][columns of the block]; the last block may be
 * narrower. n is a multiple of SQZ_GEMM_N, dim of 16. No pointer needs an
 * alignment beyond its type.
 */
#ifndef SQZ_LIB_KMEANS_KERNELS_H
#define SQZ_LIB_KMEANS_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

#define SQZ_KMEANS_BLOCK 64 /* columns: a block of 64 dimensions takes 16 KiB, half of a first-level cache */

struct sqz_kmeans_kernels {
    const char *name;

    /* best[r] = the largest over j < n of dot(point r, column j) + bias[j], column[r] = the first j that has it, for
     * r < m (may be 0). Point r is rows + index[r] * dim, or rows + r * dim where index is NULL. No product is NaN, no
     * column has a bias of -infinity unless another one is finite. */
    void (*nearest)(float *best, uint32_t *column, const float *rows, const uint32_t *index, size_t m,
                    const float *panel, const float *bias, size_t n, size_t dim);

    /* Column j of the panel = rows + index[j] * dim (rows + j * dim where index is NULL) for j < n, zeros for the
     * columns behind them up to n_columns. */
    void (*gather_panel)(float *panel, size_t n_columns, const float *rows, const uint32_t *index, size_t n,
                         size_t dim);

    /* value[i], at[i] = the count largest x[j] and their j, largest first, of equals the first; 1 <= count <= n. n is a
     * multiple of SQZ_GEMM_N. x[at[i]] become -infinity. */
    void (*few_largest)(float *value, uint32_t *at, size_t count, float *x, size_t n);

    /* Returns how many x[j] are at least limit; at[i] = the first `most` such j. n is a multiple of SQZ_GEMM_N. */
    size_t (*at_least)(uint32_t *at, size_t most, const float *x, size_t n, float limit);
};

/* Those that go with sqz_kernels_get(). */
const struct sqz_kmeans_kernels *sqz_kmeans_kernels_get(void);

extern const struct sqz_kmeans_kernels sqz_kmeans_kernels_portable;
#if defined(__x86_64__)
extern const struct sqz_kmeans_kernels sqz_kmeans_kernels_avx2;
extern const struct sqz_kmeans_kernels sqz_kmeans_kernels_avx512;
#endif

#endif
