/*
 * Lloyd's iterations over all centroids. Scores come from gemm over blocks of
 * rows and columns that stay in cache.
 */
#include "kmeans_lloyd.h"

#include <math.h>

#include "kmeans_seed.h"
#include "kmeans_update.h"
#include "threads.h"

#define STOP_CHANGE 1e-4 /* relative change of the objective that ends the iterations */

_Static_assert(SQZ_KMEANS_SEED_BATCH % SQZ_GEMM_N == 0 && SQZ_KMEANS_COLUMNS % SQZ_GEMM_N == 0 &&
                   SQZ_KMEANS_BLOCK % SQZ_GEMM_N == 0,
               "panels hold whole vectors");

/* Transposes all centroids into km->panel and fills the padding of bias. */
static void fill_panel(struct kmeans *km)
{
    const size_t dim = km->dim;
    for (size_t begin = 0; begin < km->n_columns; begin += SQZ_KMEANS_COLUMNS) {
        const size_t width = sqz_kmeans_minimum(SQZ_KMEANS_COLUMNS, km->n_columns - begin);
        float *block = km->panel + begin * dim;
        for (size_t j = 0; j < width; j++) {
            const size_t c = begin + j;
            const float *row = km->centroid + c * dim;
            const bool real = c < km->n_clusters;
            if (!real) km->bias[c] = -INFINITY;
            for (size_t i = 0; i < dim; i++) block[i * width + j] = real ? row[i] : 0.0f;
        }
    }
}

static void update_centroids(struct kmeans *km)
{
    const int n_threads = sqz_kmeans_team(km, km->n * km->dim);
    sqz_kmeans_sort(km);
#pragma omp parallel for schedule(dynamic, 4) num_threads(n_threads) if (n_threads > 1)
    for (size_t c = 0; c < km->n_clusters; c++) {
        double *sum = km->scratch[sqz_thread_number()].sum;
        sqz_kmeans_sum(km, c, sum);
        sqz_kmeans_set_centroid(km, c, sum, km->start[c + 1] - km->start[c]);
    }
    fill_panel(km);
}

/* Compares points [begin, begin + m) with every centroid; returns how many moved. A point moves only to a centroid
 * strictly nearer than its own, so that equal centroids do not empty each other. */
static size_t assign_tile(struct kmeans *km, size_t begin, size_t m, float *tile)
{
    float best[SQZ_KMEANS_ROWS], own[SQZ_KMEANS_ROWS];
    uint32_t cluster[SQZ_KMEANS_ROWS];
    size_t n_moved = 0;
    for (size_t r = 0; r < m; r++) {
        best[r] = -INFINITY;
        own[r] = -INFINITY;
        cluster[r] = km->assignment[begin + r];
    }
    for (size_t column = 0; column < km->n_columns; column += SQZ_KMEANS_COLUMNS) {
        const size_t width = sqz_kmeans_minimum(SQZ_KMEANS_COLUMNS, km->n_columns - column);
        km->kernels->gemm(tile, width, km->x + begin * km->dim, km->dim, km->panel + column * km->dim, width, m, width,
                          km->dim, 1.0f, false);
        for (size_t r = 0; r < m; r++) {
            const float *scores = tile + r * width;
            const size_t mine = km->assignment[begin + r] - column; /* wraps when it is not in this block */
            float value;
            const size_t j = km->kernels->argmax_biased(scores, km->bias + column, width, &value);
            if (value > best[r]) {
                best[r] = value;
                cluster[r] = (uint32_t)(column + j);
            }
            if (mine < width) own[r] = scores[mine] + km->bias[column + mine];
        }
    }
    for (size_t r = 0; r < m; r++) {
        const bool moves = best[r] > own[r];
        n_moved += moves && cluster[r] != km->assignment[begin + r];
        km->assignment[begin + r] = moves ? cluster[r] : km->assignment[begin + r];
        km->score[begin + r] = moves ? best[r] : own[r];
    }
    return n_moved;
}

static size_t assign_all(struct kmeans *km)
{
    size_t n_moved = 0;
    const int n_threads = sqz_kmeans_team(km, km->n * km->n_columns * km->dim / 16);
#pragma omp parallel for schedule(dynamic, 1) reduction(+ : n_moved) num_threads(n_threads) if (n_threads > 1)
    for (size_t begin = 0; begin < km->n; begin += SQZ_KMEANS_ROWS) {
        const size_t m = sqz_kmeans_minimum(SQZ_KMEANS_ROWS, km->n - begin);
        n_moved += assign_tile(km, begin, m, km->scratch[sqz_thread_number()].tile);
    }
    return n_moved;
}

void sqz_kmeans_lloyd(struct kmeans *km, struct sqz_random *random, uint32_t n_iterations)
{
    sqz_kmeans_seed(km, random);
    double before = sqz_kmeans_total_cost(km);
    for (uint32_t i = 0; i < n_iterations; i++) {
        update_centroids(km);
        size_t n_moved = assign_all(km);
        n_moved += sqz_kmeans_repair(km);
        const double cost = sqz_kmeans_total_cost(km);
        if (n_moved == 0 || before - cost <= STOP_CHANGE * before) return;
        before = cost;
    }
}
