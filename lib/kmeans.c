/*
 * K-means of one head's keys, Euclidean or spherical: the call itself, which
 * takes the tree (kmeans_tree.c) where a problem is large enough to gain, and
 * Lloyd's iterations over all centroids (kmeans_lloyd.c) elsewhere.
 */
#include "cluster.h"

#include <math.h>

#include "kmeans_lloyd.h"
#include "kmeans_points.h"
#include "kmeans_tree.h"
#include "kmeans_update.h"

static bool arguments_ok(size_t n_points, size_t dim, const struct sqz_kmeans_options *options)
{
    return n_points >= 1 && n_points < UINT32_MAX && dim >= 16 && dim % 16 == 0 && options->n_clusters >= 1 &&
           options->n_clusters <= n_points && options->n_threads >= 0 && options->n_threads <= SQZ_KMEANS_MAX_THREADS;
}

/* Of the assignment as it stands, in prepared units. */
static double objective(struct kmeans *km)
{
    double total = 0, *sum = km->scratch->sum;
    sqz_kmeans_sort(km);
    for (size_t c = 0; c < km->n_clusters; c++) {
        sqz_kmeans_sum(km, c, sum);
        if (km->cosine) {
            double square = 0;
            for (size_t i = 0; i < km->dim; i++) square += sum[i] * sum[i];
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
    if (!arguments_ok(n_points, dim, options)) return SIZE_MAX;
    const size_t flat_bytes = lay_out(&flat, n_points, dim, options, NULL);
    if (!sqz_kmeans_tree_worth(n_points, options->n_clusters)) return flat_bytes;
    const size_t tree_bytes = sqz_kmeans_tree_bytes(n_points, dim, options);
    return tree_bytes > flat_bytes ? tree_bytes : flat_bytes;
}

double sqz_kmeans(uint32_t *assignment, const float *points, size_t n_points, size_t dim,
                  const struct sqz_kmeans_options *options, void *workspace)
{
    if (!arguments_ok(n_points, dim, options)) return 0;
    if (sqz_kmeans_tree_worth(n_points, options->n_clusters)) {
        const double objective_of_tree = sqz_kmeans_tree(assignment, points, n_points, dim, options, workspace);
        if (objective_of_tree >= 0) return objective_of_tree;
    }
    return run_flat(assignment, points, n_points, dim, options, workspace);
}
