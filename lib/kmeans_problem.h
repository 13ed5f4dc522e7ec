/*
 * Inside k-means: what its files share. Callers use cluster.h.
 *
 * A problem is n points of dim numbers, prepared: finite, at most about 1,
 * centred (Euclidean) or of length 1 (cosine). A point x is nearest to the
 * centroid c with the largest score
 *     x.c - |c|^2 / 2   (Euclidean)        x.c   (cosine)
 *
 * Each file calls those below it alone:
 *   kmeans.c          the call
 *   kmeans_tree.c     large problems: groups of points, seeds in each
 *   kmeans_passes.c   and passes over the few centroids that matter to a point
 *   kmeans_lists.c    the centroids around a centroid
 *   kmeans_lloyd.c    Lloyd's iterations over all centroids
 *   kmeans_seed.c     k-means++
 *   kmeans_update.c   centroids from assignments, empty clusters
 *   kmeans_problem.c  a problem: its arrays and its costs
 *   kmeans_points.c   preparing points
 *
 * Results do not depend on the number of threads: work is cut into pieces of
 * fixed size that write to places of their own, sums run in a fixed order.
 */
#ifndef SQZ_LIB_KMEANS_PROBLEM_H
#define SQZ_LIB_KMEANS_PROBLEM_H

#include "arena.h"
#include "kmeans_kernels.h"
#include "kmeans_points.h"

#define SQZ_KMEANS_ROWS       64  /* points of one matrix product: 16 KiB at dim 64 */
#define SQZ_KMEANS_COLUMNS    256 /* columns of one matrix product: a tile of scores takes 64 KiB */
#define SQZ_KMEANS_SEED_BATCH 32  /* seeds accepted per pass over the points */

/* What a thread writes to while it works. */
struct kmeans_scratch {
    float *rows;  /* [SQZ_KMEANS_ROWS][dim] */
    float *tile;  /* [SQZ_KMEANS_ROWS][tile columns] */
    float *panel; /* of SQZ_KMEANS_SEED_BATCH columns */
    double *sum;  /* [dim] */
};

/* A point of the heap in repair. */
struct kmeans_far {
    float cost;
    uint32_t point;
};

/* A problem, or a run of its points taken as one of its own. */
struct kmeans {
    const struct sqz_kernels *kernels;
    const struct sqz_kmeans_kernels *inner;
    size_t n, dim, n_clusters, n_columns; /* n_columns: n_clusters rounded up to whole vectors */
    bool cosine;
    int n_threads;
    struct kmeans_scratch *scratch; /* [n_threads] */

    float *x;             /* [n][dim] prepared points */
    float *self;          /* [n] |x|^2 */
    float *score;         /* [n] with the assigned centroid */
    uint32_t *assignment; /* [n] */
    union {
        double *cumulative;      /* [n] costs summed up, while seeding */
        struct kmeans_far *heap; /* [n] farthest first, in repair */
    };
    uint32_t *order; /* [n] points sorted by cluster */
    uint32_t *start; /* [n_clusters + 1] */
    float *centroid; /* [n_clusters][dim] */
    float *bias;     /* [n_columns] -|c|^2 / 2 or 0; -infinity in the padding */
    float *panel;    /* all centroids transposed, blocks of [dim][SQZ_KMEANS_COLUMNS]; NULL in the tree */
};

/* Rounded up to whole vectors. */
static inline size_t sqz_kmeans_columns(size_t n)
{
    return (n + SQZ_GEMM_N - 1) / SQZ_GEMM_N * SQZ_GEMM_N;
}

/* What the iterations minimise, of one point: |x - c|^2, or 1 - cosine (0 for a zero vector, whose direction is
 * anything). */
static inline float sqz_kmeans_cost(const struct kmeans *km, size_t p, float score)
{
    const float cost = km->self[p] - (km->cosine ? score : 2 * score);
    return cost > 0 ? cost : 0;
}

/* Threads for a step of so many multiplications and additions: one where waiting for others would take longer, which on
 * a machine that others use too is a time slice. */
static inline int sqz_kmeans_team(const struct kmeans *km, size_t work)
{
    return work < ((size_t)1 << 22) ? 1 : km->n_threads;
}

/* Asks for a row that will be read soon. */
static inline void sqz_kmeans_fetch(const float *row, size_t dim)
{
#if defined(__GNUC__)
    for (size_t i = 0; i < dim; i += 64 / sizeof *row) __builtin_prefetch(row + i, 0, 2);
#else
    (void)row;
    (void)dim;
#endif
}

/* sum += row, a fixed order, so that compilers may use vectors without being allowed to reorder. */
static inline void sqz_kmeans_add_row(double *sum, const float *row, size_t dim)
{
    for (size_t i = 0; i < dim; i += 16)
        for (size_t j = 0; j < 16; j++) sum[i + j] += (double)row[i + j];
}

float sqz_kmeans_bias(const struct kmeans *km, const float *centroid);

double sqz_kmeans_total_cost(const struct kmeans *km);

/* Carves the arrays of a problem; with_panel: as Lloyd's iterations over all centroids need them. */
void sqz_kmeans_carve(struct kmeans *km, struct sqz_arena *arena, bool with_panel);
void sqz_kmeans_carve_scratch(struct kmeans *km, struct sqz_arena *arena, size_t tile_columns);

#endif
