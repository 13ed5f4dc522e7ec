/*
 * The passes over the points of a large problem, which move points and
 * centroids, and what they work on; kmeans_tree.c makes it.
 */
#ifndef SQZ_LIB_KMEANS_PASSES_H
#define SQZ_LIB_KMEANS_PASSES_H

#include "kmeans_lists.h"
#include "random.h"

#define SQZ_KMEANS_PROBES        8 /* groups that a point remembers at most */
#define SQZ_KMEANS_NO_GROUP      UINT16_MAX
#define SQZ_KMEANS_WIDE_ROWS     1024 /* points of one piece of a wide pass */
#define SQZ_KMEANS_NEAR_CLUSTERS 16   /* clusters of one piece of a narrow pass */

struct kmeans_seeding {
    struct sqz_random random;
    double cost;
    size_t n_seeds, wanted;
};

struct kmeans_move {
    uint32_t point, from;
};

struct kmeans_tree_scratch {
    struct kmeans_list_scratch list;
    float *best;      /* [SQZ_KMEANS_WIDE_ROWS] */
    uint32_t *found;  /* [SQZ_KMEANS_WIDE_ROWS] */
    uint32_t *begin;  /* [n_groups + 1] of the points that look into a group */
    uint32_t *looks;  /* [SQZ_KMEANS_WIDE_ROWS * SQZ_KMEANS_PROBES] those points */
    float *value;     /* [SQZ_KMEANS_WIDE_ROWS] */
    uint32_t *column; /* [SQZ_KMEANS_WIDE_ROWS] */
};

struct kmeans_tree {
    struct kmeans km;     /* all points, in the order of their groups; no panel */
    struct kmeans sample; /* its clusters are the groups */
    struct kmeans_groups groups;
    struct kmeans_scale scale;
    double *partial;       /* [chunks][dim] for scale */
    double *square;        /* [n / SQZ_KMEANS_ROWS rounded up] sums of |x|^2 */
    uint32_t *point;       /* [n] the caller's number of a row */
    uint32_t *group_start; /* [n_groups + 1] rows */
    uint16_t *probe;       /* [n][SQZ_KMEANS_PROBES] of the caller's points, the nearest first, then NO_GROUP */
    float reach;           /* a group is remembered up to this multiple of the nearest one's cost */
    struct kmeans_seeding *seeding; /* [n_groups] */
    uint32_t *neighbour;            /* [n_clusters][SQZ_KMEANS_NEIGHBOURS] */
    double *sum;                    /* [n_clusters][dim] */
    union {
        float *home_score;        /* [n] of the caller's points with the centre of their group */
        struct kmeans_move *move; /* [n] of the pieces of a pass, where each begins in piece_start */
    };
    uint32_t *piece_start, *piece_count;
    size_t n_pieces;
    struct kmeans_tree_scratch *scratch; /* [n_threads] */
};

/* Runs up to n_iterations passes from the assignment there is; sums and centroids are those of the result. */
void sqz_kmeans_run_passes(struct kmeans_tree *tree, uint32_t n_iterations);

/* Sums and centroids of the assignment from nothing. */
void sqz_kmeans_update_all(struct kmeans_tree *tree);

#endif
