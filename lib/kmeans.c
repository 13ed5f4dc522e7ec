/*
 * K-means of one head's keys, Euclidean or spherical: the call itself, and
 * Lloyd's iterations that compare every point with every centroid, for
 * problems too small to gain from a tree (kmeans_tree.c).
 *
 * Points are copied once: non-finite values become 0, a power of two brings
 * the largest to at most 1 (no square overflows or vanishes), the mean is
 * subtracted (Euclidean) or the length set to 1 (cosine). Scores come from
 * gemm over blocks of rows and columns that stay in cache.
 */
#include "kmeans.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "threads.h"

#define CHUNK 1024        /* points of one partial sum */
#define STOP_CHANGE 1e-4  /* relative change of the objective that ends the iterations */

_Static_assert(SQZ_KMEANS_SEED_BATCH % SQZ_GEMM_N == 0 && SQZ_KMEANS_COLUMNS % SQZ_GEMM_N == 0 &&
                   SQZ_KMEANS_BLOCK % SQZ_GEMM_N == 0,
               "panels hold whole vectors");

static bool arguments_ok(size_t n_points, size_t dim, const struct sqz_kmeans_options *options)
{
    return n_points >= 1 && n_points < UINT32_MAX && dim >= 16 && dim % 16 == 0 && options->n_clusters >= 1 &&
           options->n_clusters <= n_points && options->n_threads >= 0 && options->n_threads <= SQZ_KMEANS_MAX_THREADS;
}

/* ---- Preparing the points ---------------------------------------------------- */

/* A fixed order of sixteen partial sums, so that compilers may use vectors without being allowed to reorder. */
float sqz_kmeans_dot(const float *a, const float *b, size_t dim)
{
    float partial[16] = {0};
    for (size_t i = 0; i < dim; i += 16) {
        for (size_t j = 0; j < 16; j++) {
            partial[j] += a[i + j] * b[i + j];
        }
    }
    for (size_t width = 8; width > 0; width /= 2) {
        for (size_t j = 0; j < width; j++) {
            partial[j] += partial[j + width];
        }
    }
    return partial[0];
}

/* Sets the length of v to 1. Two steps, because squares of what is small beside the largest point may vanish. */
void sqz_kmeans_normalise(float *v, size_t dim)
{
    float largest = 0;
    int exponent;
    for (size_t i = 0; i < dim; i++) {
        const float magnitude = fabsf(v[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest <= 0) {
        return;
    }
    (void)frexpf(largest, &exponent);
    if (exponent < -8) {
        for (size_t i = 0; i < dim; i++) {
            v[i] = ldexpf(v[i], -exponent);
        }
    }
    const float factor = 1.0f / sqrtf(sqz_kmeans_dot(v, v, dim));
    for (size_t i = 0; i < dim; i++) {
        v[i] *= factor;
    }
}

float sqz_kmeans_bias(const struct kmeans *km, const float *centroid)
{
    return km->cosine ? 0.0f : -0.5f * sqz_kmeans_dot(centroid, centroid, km->dim);
}

size_t sqz_kmeans_scale_chunks(size_t n)
{
    return (n + CHUNK - 1) / CHUNK;
}

static float finite_or_zero(float v)
{
    return fabsf(v) <= FLT_MAX ? v : 0.0f; /* false for NaN */
}

/* Adds the points of a chunk up; returns the largest magnitude. In lanes of sixteen, as sqz_kmeans_dot(). */
static float scan_chunk(const struct kmeans_scale *scale, size_t chunk, double *sum)
{
    float largest[16] = {0}, most = 0;
    memset(sum, 0, scale->dim * sizeof *sum);
    for (size_t p = chunk * CHUNK; p < sqz_kmeans_minimum(scale->n, (chunk + 1) * CHUNK); p++) {
        const float *from = scale->points + p * scale->dim;
        for (size_t i = 0; i < scale->dim; i += 16) {
            for (size_t j = 0; j < 16; j++) {
                const float v = finite_or_zero(from[i + j]), magnitude = fabsf(v);
                largest[j] = magnitude > largest[j] ? magnitude : largest[j];
                sum[i + j] += (double)v;
            }
        }
    }
    for (size_t j = 0; j < 16; j++) {
        most = largest[j] > most ? largest[j] : most;
    }
    return most;
}

void sqz_kmeans_scale_find(struct kmeans_scale *scale, double *partial, int n_threads)
{
    const size_t n = scale->n, dim = scale->dim, n_chunks = sqz_kmeans_scale_chunks(n);
    float largest = 0;
    int exponent = 0;
#pragma omp parallel for reduction(max : largest) num_threads(n_threads) if (n_threads > 1)
    for (size_t chunk = 0; chunk < n_chunks; chunk++) {
        const float most = scan_chunk(scale, chunk, partial + chunk * dim);
        largest = most > largest ? most : largest;
    }
    if (largest > 0) {
        (void)frexpf(largest, &exponent);
    }
    exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
    scale->factor = ldexpf(1.0f, -exponent);
    scale->unscale = ldexpf(1.0f, exponent);
    for (size_t chunk = 1; chunk < n_chunks; chunk++) {
        for (size_t i = 0; i < dim; i++) {
            partial[i] += partial[chunk * dim + i];
        }
    }
    for (size_t i = 0; i < dim; i++) {
        scale->mean[i] = scale->cosine ? 0.0f : (float)(partial[i] * (double)scale->factor / (double)n);
    }
}

void sqz_kmeans_scale_row(const struct kmeans_scale *scale, float *x, size_t point)
{
    const float *from = scale->points + point * scale->dim;
    for (size_t i = 0; i < scale->dim; i++) {
        x[i] = finite_or_zero(from[i]) * scale->factor - scale->mean[i];
    }
    if (scale->cosine) {
        sqz_kmeans_normalise(x, scale->dim);
    }
}

/* ---- Lloyd's iterations over all centroids -------------------------------------- */

void sqz_kmeans_fill_panel(struct kmeans *km)
{
    const size_t dim = km->dim;
    for (size_t begin = 0; begin < km->n_columns; begin += SQZ_KMEANS_COLUMNS) {
        const size_t width = sqz_kmeans_minimum(SQZ_KMEANS_COLUMNS, km->n_columns - begin);
        float *block = km->panel + begin * dim;
        for (size_t j = 0; j < width; j++) {
            const size_t c = begin + j;
            const float *row = km->centroid + c * dim;
            const bool real = c < km->n_clusters;
            if (!real) {
                km->bias[c] = -INFINITY;
            }
            for (size_t i = 0; i < dim; i++) {
                block[i * width + j] = real ? row[i] : 0.0f;
            }
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
    sqz_kmeans_fill_panel(km);
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
            if (mine < width) {
                own[r] = scores[mine] + km->bias[column + mine];
            }
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
        if (n_moved == 0 || before - cost <= STOP_CHANGE * before) {
            return;
        }
        before = cost;
    }
}

/* ---- The whole ------------------------------------------------------------------ */

/* Of the assignment as it stands, in prepared units. */
static double objective(struct kmeans *km)
{
    double total = 0, *sum = km->scratch->sum;
    sqz_kmeans_sort(km);
    for (size_t c = 0; c < km->n_clusters; c++) {
        sqz_kmeans_sum(km, c, sum);
        if (km->cosine) {
            double square = 0;
            for (size_t i = 0; i < km->dim; i++) {
                square += sum[i] * sum[i];
            }
            total += (double)(km->start[c + 1] - km->start[c]) - sqrt(square);
            continue;
        }
        const double share = 1.0 / (double)(km->start[c + 1] - km->start[c]);
        for (size_t k = km->start[c]; k < km->start[c + 1]; k++) {
            const float *x = km->x + km->order[k] * km->dim;
            for (size_t i = 0; i < km->dim; i++) {
                const double difference = (double)x[i] - sum[i] * share;
                total += difference * difference;
            }
        }
    }
    return total > 0 ? total / (double)km->n : 0;
}

void sqz_kmeans_carve_scratch(struct kmeans *km, struct sqz_arena *arena, size_t tile_columns)
{
    km->scratch = sqz_arena_take(arena, (size_t)km->n_threads, 1, sizeof *km->scratch);
    for (int t = 0; t < km->n_threads; t++) {
        const struct kmeans_scratch scratch = {
            .rows = sqz_arena_take(arena, SQZ_KMEANS_ROWS, km->dim, sizeof *scratch.rows),
            .tile = sqz_arena_take(arena, SQZ_KMEANS_ROWS, tile_columns, sizeof *scratch.tile),
            .panel = sqz_arena_take(arena, SQZ_KMEANS_SEED_BATCH, km->dim, sizeof *scratch.panel),
            .sum = sqz_arena_take(arena, km->dim, 1, sizeof *scratch.sum),
        };
        if (km->scratch) {
            km->scratch[t] = scratch;
        }
    }
}

void sqz_kmeans_carve(struct kmeans *km, struct sqz_arena *arena, bool with_panel)
{
    const size_t n = km->n, dim = km->dim, k = km->n_clusters;
    km->n_columns = sqz_kmeans_columns(k);
    km->x = sqz_arena_take(arena, n, dim, sizeof *km->x);
    km->self = sqz_arena_take(arena, n, 1, sizeof *km->self);
    km->score = sqz_arena_take(arena, n, 1, sizeof *km->score);
    km->cumulative = sqz_arena_take(arena, n, 1, sizeof *km->cumulative);
    km->order = sqz_arena_take(arena, n, 1, sizeof *km->order);
    km->start = sqz_arena_take(arena, k + 1, 1, sizeof *km->start);
    km->centroid = sqz_arena_take(arena, k, dim, sizeof *km->centroid);
    km->bias = sqz_arena_take(arena, km->n_columns, 1, sizeof *km->bias);
    km->panel = with_panel ? sqz_arena_take(arena, km->n_columns, dim, sizeof *km->panel) : NULL;
}

struct flat {
    struct kmeans km;
    struct kmeans_scale scale;
    double *partial;
};

/* Cuts the workspace into arrays; with workspace NULL only counts. Returns bytes, SIZE_MAX when they do not fit. */
static size_t lay_out(struct flat *flat, size_t n, size_t dim, const struct sqz_kmeans_options *options,
                      void *workspace)
{
    struct sqz_arena arena = sqz_arena_on(workspace);
    struct kmeans *km = &flat->km;
    km->n = n;
    km->dim = dim;
    km->n_clusters = options->n_clusters;
    km->n_threads = options->n_threads > 1 ? options->n_threads : 1;
    sqz_kmeans_carve(km, &arena, true);
    sqz_kmeans_carve_scratch(km, &arena, SQZ_KMEANS_COLUMNS);
    flat->scale.mean = sqz_arena_take(&arena, dim, 1, sizeof *flat->scale.mean);
    flat->partial = sqz_arena_take(&arena, sqz_kmeans_scale_chunks(n), dim, sizeof *flat->partial);
    return sqz_arena_bytes(&arena);
}

static double run_flat(uint32_t *assignment, const float *points, size_t n, size_t dim,
                       const struct sqz_kmeans_options *options, void *workspace)
{
    struct flat flat;
    struct sqz_random random;
    struct kmeans *km = &flat.km;
    (void)lay_out(&flat, n, dim, options, workspace);
    km->kernels = sqz_kernels_get();
    km->inner = sqz_kmeans_kernels_get();
    km->cosine = options->metric == SQZ_METRIC_COSINE;
    km->assignment = assignment;
    flat.scale.points = points;
    flat.scale.n = n;
    flat.scale.dim = dim;
    flat.scale.cosine = km->cosine;
    sqz_kmeans_scale_find(&flat.scale, flat.partial, km->n_threads);
    for (size_t p = 0; p < n; p++) {
        sqz_kmeans_scale_row(&flat.scale, km->x + p * dim, p);
        km->self[p] = sqz_kmeans_dot(km->x + p * dim, km->x + p * dim, dim);
    }
    sqz_random_seed(&random, options->seed);
    sqz_kmeans_lloyd(km, &random, options->n_iterations);
    const double unscale = km->cosine ? 1.0 : (double)flat.scale.unscale;
    return objective(km) * unscale * unscale;
}

size_t sqz_kmeans_workspace_bytes(size_t n_points, size_t dim, const struct sqz_kmeans_options *options)
{
    struct flat flat;
    if (!arguments_ok(n_points, dim, options)) {
        return SIZE_MAX;
    }
    const size_t flat_bytes = lay_out(&flat, n_points, dim, options, NULL);
    if (!sqz_kmeans_tree_worth(n_points, options->n_clusters)) {
        return flat_bytes;
    }
    const size_t tree_bytes = sqz_kmeans_tree_bytes(n_points, dim, options);
    return tree_bytes > flat_bytes ? tree_bytes : flat_bytes;
}

double sqz_kmeans(uint32_t *assignment, const float *points, size_t n_points, size_t dim,
                  const struct sqz_kmeans_options *options, void *workspace)
{
    if (!arguments_ok(n_points, dim, options)) {
        return 0;
    }
    if (sqz_kmeans_tree_worth(n_points, options->n_clusters)) {
        const double objective_of_tree = sqz_kmeans_tree(assignment, points, n_points, dim, options, workspace);
        if (objective_of_tree >= 0) {
            return objective_of_tree;
        }
    }
    return run_flat(assignment, points, n_points, dim, options, workspace);
}
