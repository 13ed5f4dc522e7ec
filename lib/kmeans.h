/*
 * Inside k-means: what its files share. Callers use cluster.h.
 *
 * A problem is n points of dim numbers, prepared: finite, at most about 1,
 * centred (Euclidean) or of length 1 (cosine). A point x is nearest to the
 * centroid c with the largest score
 *     x.c - |c|^2 / 2   (Euclidean)        x.c   (cosine)
 *
 *   kmeans.c         the call, preparing points, Lloyd's iterations over all centroids
 *   kmeans_seed.c    k-means++
 *   kmeans_update.c  centroids from assignments, empty clusters
 *   kmeans_tree.c    large problems: groups of points, seeds in each
 *   kmeans_passes.c  and passes over the few centroids that matter to a point
 *   kmeans_lists.c   the centroids around a centroid
 *
 * Results do not depend on the number of threads: work is cut into pieces of
 * fixed size that write to places of their own, sums run in a fixed order.
 */
#ifndef SQZ_LIB_KMEANS_H
#define SQZ_LIB_KMEANS_H

#include "arena.h"
#include "cluster.h"
#include "kmeans_kernels.h"
#include "random.h"

#define SQZ_KMEANS_ROWS 64       /* points of one matrix product: 16 KiB at dim 64 */
#define SQZ_KMEANS_COLUMNS 256   /* columns of one matrix product: a tile of scores takes 64 KiB */
#define SQZ_KMEANS_SEED_BATCH 32 /* seeds accepted per pass over the points */

/* What a thread writes to while it works. */
struct kmeans_scratch {
    float *rows;  /* [SQZ_KMEANS_ROWS][dim] */
    float *tile;  /* [SQZ_KMEANS_ROWS][tile columns] */
    float *panel; /* of SQZ_KMEANS_SEED_BATCH columns */
    double *sum;  /* [dim] */
};

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
    uint32_t *order;      /* [n] points sorted by cluster */
    uint32_t *start;      /* [n_clusters + 1] */
    float *centroid;      /* [n_clusters][dim] */
    float *bias;          /* [n_columns] -|c|^2 / 2 or 0; -infinity in the padding */
    float *panel;         /* all centroids transposed, blocks of [dim][SQZ_KMEANS_COLUMNS]; NULL in the tree */
};

static inline size_t sqz_kmeans_minimum(size_t a, size_t b)
{
    return a < b ? a : b;
}

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
    for (size_t i = 0; i < dim; i += 64 / sizeof *row) {
        __builtin_prefetch(row + i, 0, 2);
    }
#else
    (void)row;
    (void)dim;
#endif
}

/* sum += row, a fixed order, so that compilers may use vectors without being allowed to reorder. */
static inline void sqz_kmeans_add_row(double *sum, const float *row, size_t dim)
{
    for (size_t i = 0; i < dim; i += 16) {
        for (size_t j = 0; j < 16; j++) {
            sum[i + j] += (double)row[i + j];
        }
    }
}

/* ---- kmeans.c ---------------------------------------------------------------- */

float sqz_kmeans_dot(const float *a, const float *b, size_t dim);
void sqz_kmeans_normalise(float *v, size_t dim);
float sqz_kmeans_bias(const struct kmeans *km, const float *centroid);

/* How the caller's points become prepared ones. */
struct kmeans_scale {
    const float *points; /* [n][dim] the caller's */
    size_t n, dim;
    bool cosine;
    float factor, unscale; /* powers of two: points * factor are at most 1, times unscale the caller's again */
    float *mean;           /* [dim] of points * factor; zeros for cosine */
};

/* Fills all but the first four fields. partial: [chunks of n][dim] sums, see sqz_kmeans_scale_chunks(). */
void sqz_kmeans_scale_find(struct kmeans_scale *scale, double *partial, int n_threads);
size_t sqz_kmeans_scale_chunks(size_t n);
void sqz_kmeans_scale_row(const struct kmeans_scale *scale, float *x, size_t point);

/* Carves the arrays of a problem; with_panel: as Lloyd's iterations over all centroids need them. */
void sqz_kmeans_carve(struct kmeans *km, struct sqz_arena *arena, bool with_panel);
void sqz_kmeans_carve_scratch(struct kmeans *km, struct sqz_arena *arena, size_t tile_columns);

/* Seeds, then up to n_iterations of Lloyd's over all centroids. x and self are ready. */
void sqz_kmeans_lloyd(struct kmeans *km, struct sqz_random *random, uint32_t n_iterations);

/* Transposes all centroids into km->panel, whose n_clusters and n_columns are the problem's, and fills bias. */
void sqz_kmeans_fill_panel(struct kmeans *km);

/* ---- kmeans_seed.c ----------------------------------------------------------- */

/* Adds up to `wanted` k-means++ seeds to the n_seeds there are, by the costs that km->score gives, and assigns points
 * that are nearer to one of them. With n_seeds 0 the scores are those with centres that are no seeds, so points take the
 * first new seeds whatever their score is; where they are -infinity, or every point lies on its centre, the first seed
 * is drawn uniformly. Returns the seeds there are now: fewer than asked for when every point lies on a seed. */
size_t sqz_kmeans_add_seeds(struct kmeans *km, struct sqz_random *random, size_t n_seeds, size_t wanted);

/* Assigns every point to the nearest of n_clusters seeds, none of which is left without a point. */
void sqz_kmeans_seed(struct kmeans *km, struct sqz_random *random);

double sqz_kmeans_total_cost(const struct kmeans *km);

/* ---- kmeans_update.c --------------------------------------------------------- */

/* Fills order and start from assignment. */
void sqz_kmeans_sort(struct kmeans *km);

/* sum[dim] = sum of the points of cluster c, by order and start. */
void sqz_kmeans_sum(const struct kmeans *km, size_t c, double *sum);

/* Writes centroid c as the mean, or its direction, of `count` points that sum up to sum. */
void sqz_kmeans_set_centroid(struct kmeans *km, size_t c, const double *sum, size_t count);

/* Gives every empty cluster the point that is farthest from its centroid, among points that leave nothing empty
 * behind. There are enough as n_clusters <= n. Overwrites start. Returns the number of points moved. */
size_t sqz_kmeans_repair(struct kmeans *km);

/* ---- kmeans_tree.c ----------------------------------------------------------- */

/* Whether a problem is large enough to gain. */
bool sqz_kmeans_tree_worth(size_t n, size_t n_clusters);
size_t sqz_kmeans_tree_bytes(size_t n, size_t dim, const struct sqz_kmeans_options *options);

/* As sqz_kmeans(). Returns a negative number, assignment undefined, when the points have too few different values. */
double sqz_kmeans_tree(uint32_t *assignment, const float *points, size_t n, size_t dim,
                       const struct sqz_kmeans_options *options, void *workspace);

#endif
