/*
 * Bodies of the inner loops of clustering, included once a variant. The
 * including file defines before:
 *   TARGET, PRIMITIVE, KERNELS, NAME   as in kernels_template.h
 *   VEC, VEC_LEN, INDEX                a vector of floats, their number, a vector of as many 32-bit integers
 *   TILE_VECS                          vectors across a 6-row tile of nearest
 *   vec_set1, vec_load, vec_store, vec_add, vec_max, vec_fma
 *   index_start, index_add(a, n), index_store(p, v)
 *   vec_update_largest(&largest, &at, value, now)   lanes of value above largest, and now, take over
 *   vec_largest(v)                     horizontal
 *   vec_equal(a, b), vec_at_least(a, b)   mask of the lanes that are equal, not below
 *   transpose_block(dst, ld, row)      dst[i * ld + r] = row[r][i] for VEC_LEN rows and columns
 */
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "../kmeans_kernels.h"

#define INLINE static inline __attribute__((always_inline)) TARGET
#define KERNEL static TARGET
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

#define TILE_ROWS 6

INLINE size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

struct running {
    VEC largest[TILE_ROWS];
    INDEX at[TILE_ROWS];
};

/* Scores of n_rows points with n_vecs vectors of columns, both constants, taken into the running maxima. */
INLINE void score_tile(struct running *running, const float *const *row, size_t n_rows, const float *block,
                       size_t width, const float *bias, size_t n_vecs, INDEX now, size_t dim)
{
    VEC sum[TILE_ROWS * TILE_VECS];

    UNROLL
    for (size_t i = 0; i < n_rows; i++) {
        UNROLL
        for (size_t v = 0; v < n_vecs; v++) sum[i * n_vecs + v] = vec_load(bias + v * VEC_LEN);
    }
    for (size_t l = 0; l < dim; l++) {
        VEC right[TILE_VECS];

        UNROLL
        for (size_t v = 0; v < n_vecs; v++) right[v] = vec_load(block + l * width + v * VEC_LEN);
        UNROLL
        for (size_t i = 0; i < n_rows; i++) {
            const VEC left = vec_set1(row[i][l]);

            UNROLL
            for (size_t v = 0; v < n_vecs; v++) sum[i * n_vecs + v] = vec_fma(left, right[v], sum[i * n_vecs + v]);
        }
    }
    UNROLL
    for (size_t v = 0; v < n_vecs; v++) {
        UNROLL
        for (size_t i = 0; i < n_rows; i++)
            vec_update_largest(&running->largest[i], &running->at[i], sum[i * n_vecs + v], now);
        now = index_add(now, VEC_LEN);
    }
}

/* Which lane holds the largest; of equals the one with the smallest column. */
INLINE uint32_t first_of_largest(VEC largest, INDEX at, float *best)
{
    uint32_t column[VEC_LEN], first;
    unsigned equal;

    *best = vec_largest(largest);
    equal = vec_equal(largest, vec_set1(*best));
    index_store(column, at);
    first = column[__builtin_ctz(equal)];
    for (equal &= equal - 1; equal; equal &= equal - 1) {
        const uint32_t other = column[__builtin_ctz(equal)];
        first = other < first ? other : first;
    }
    return first;
}

INLINE void nearest_rows(float *best, uint32_t *column, const float *const *row, size_t n_rows, const float *panel,
                         const float *bias, size_t n, size_t dim)
{
    struct running running;

    UNROLL
    for (size_t i = 0; i < n_rows; i++) {
        running.largest[i] = vec_set1(-INFINITY);
        running.at[i] = index_start();
    }
    for (size_t first = 0; first < n; first += SQZ_KMEANS_BLOCK) {
        const size_t width = smaller(SQZ_KMEANS_BLOCK, n - first);
        const float *block = panel + first * dim;
        size_t j = 0;

        for (; j + TILE_VECS * VEC_LEN <= width; j += TILE_VECS * VEC_LEN) {
            score_tile(&running, row, n_rows, block + j, width, bias + first + j, TILE_VECS,
                       index_add(index_start(), (int)(first + j)), dim);
        }
        if (TILE_VECS > 2 && j + 2 * VEC_LEN <= width) {
            score_tile(&running, row, n_rows, block + j, width, bias + first + j, 2,
                       index_add(index_start(), (int)(first + j)), dim);
            j += 2 * VEC_LEN;
        }
        for (; j < width; j += VEC_LEN) {
            score_tile(&running, row, n_rows, block + j, width, bias + first + j, 1,
                       index_add(index_start(), (int)(first + j)), dim);
        }
    }
    UNROLL
    for (size_t i = 0; i < n_rows; i++) column[i] = first_of_largest(running.largest[i], running.at[i], &best[i]);
}

KERNEL void nearest(float *best, uint32_t *column, const float *rows, const uint32_t *index, size_t m,
                    const float *panel, const float *bias, size_t n, size_t dim)
{
    while (m) {
        /* A last tile of one or two rows would leave the FMA units idle: 7 is 4 + 3, 8 is 4 + 4. */
        const size_t n_rows = m == 7 || m == 8 ? 4 : smaller(m, TILE_ROWS);
        const float *row[TILE_ROWS];

        for (size_t i = 0; i < n_rows; i++) row[i] = rows + (index ? index[i] : i) * dim;
        switch (n_rows) {
        case 1: nearest_rows(best, column, row, 1, panel, bias, n, dim); break;
        case 2: nearest_rows(best, column, row, 2, panel, bias, n, dim); break;
        case 3: nearest_rows(best, column, row, 3, panel, bias, n, dim); break;
        case 4: nearest_rows(best, column, row, 4, panel, bias, n, dim); break;
        case 5: nearest_rows(best, column, row, 5, panel, bias, n, dim); break;
        default: nearest_rows(best, column, row, 6, panel, bias, n, dim); break;
        }
        best += n_rows;
        column += n_rows;
        if (index) index += n_rows;
        else rows += n_rows * dim;
        m -= n_rows;
    }
}

KERNEL void gather_panel(float *panel, size_t n_columns, const float *rows, const uint32_t *index, size_t n, size_t dim)
{
    static const float zeros[VEC_LEN];

    for (size_t first = 0; first < n_columns; first += SQZ_KMEANS_BLOCK) {
        const size_t width = smaller(SQZ_KMEANS_BLOCK, n_columns - first);
        float *block = panel + first * dim;

        for (size_t j = 0; j < width; j += VEC_LEN) {
            const float *row[VEC_LEN];
            size_t step[VEC_LEN];

            for (size_t r = 0; r < VEC_LEN; r++) {
                const size_t column = first + j + r;
                row[r] = column < n ? rows + (index ? index[column] : column) * dim : zeros;
                step[r] = column < n ? VEC_LEN : 0;
            }
            for (size_t i = 0; i < dim; i += VEC_LEN) {
                transpose_block(block + i * width + j, width, row);
                for (size_t r = 0; r < VEC_LEN; r++) row[r] += step[r];
            }
        }
    }
}

KERNEL void few_largest(float *value, uint32_t *at, size_t count, float *x, size_t n)
{
    for (size_t i = 0; i < count; i++) {
        VEC most = vec_load(x);
        size_t j = VEC_LEN;
        unsigned equal;

        for (; j < n; j += VEC_LEN) most = vec_max(most, vec_load(x + j));
        value[i] = vec_largest(most);
        for (j = 0; (equal = vec_equal(vec_load(x + j), vec_set1(value[i]))) == 0;) j += VEC_LEN;
        at[i] = (uint32_t)j + (uint32_t)__builtin_ctz(equal);
        x[at[i]] = -INFINITY;
    }
}

KERNEL size_t at_least(uint32_t *at, size_t most, const float *x, size_t n, float limit)
{
    const VEC bound = vec_set1(limit);
    size_t count = 0;

    for (size_t j = 0; j < n; j += VEC_LEN) {
        for (unsigned found = vec_at_least(vec_load(x + j), bound); found; found &= found - 1) {
            if (count < most) at[count] = (uint32_t)j + (uint32_t)__builtin_ctz(found);
            count++;
        }
    }
    return count;
}

const struct sqz_kmeans_kernels KERNELS = {
    .name = NAME,
    .nearest = nearest,
    .gather_panel = gather_panel,
    .few_largest = few_largest,
    .at_least = at_least,
};
