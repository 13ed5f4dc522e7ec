/*
 * Finding centroids without comparing with all: centroids lie in groups of
 * points that are near each other, and a point or centroid is compared with
 * the groups whose centres are nearest to it.
 */
#ifndef SQZ_LIB_KMEANS_LISTS_H
#define SQZ_LIB_KMEANS_LISTS_H

#include "kmeans_problem.h"

#define SQZ_KMEANS_NEIGHBOURS 32 /* centroids that a point is compared with in a narrow pass, its own among them */
#define SQZ_KMEANS_LIST_ROWS  8  /* centroids whose neighbours are looked up together */

/* Centroids by group: those of group g are first_cluster[g] to first_cluster[g + 1] - 1, their panel begins at column
 * first_column[g]. */
struct kmeans_groups {
    size_t n;
    const struct kmeans *centre; /* its n centroids, its panel and bias are the groups' centres */
    uint32_t *first_cluster;     /* [n + 1] */
    uint32_t *first_column;      /* [n + 1] */
    float *panel, *bias;         /* of all columns; bias -infinity in the padding */
};

/* What a thread that looks up neighbours writes to. */
struct kmeans_list_scratch {
    float *centre;      /* [SQZ_KMEANS_LIST_ROWS][columns of the centres' panel] */
    float *score;       /* [SQZ_KMEANS_LIST_ROWS][n_clusters] of candidates */
    uint32_t *cluster;  /* [SQZ_KMEANS_LIST_ROWS][n_clusters] which candidates they are */
    uint64_t *sort_key; /* [n_clusters] */
};

void sqz_kmeans_carve_list_scratch(struct kmeans_list_scratch *scratch, struct sqz_arena *arena, size_t n_clusters,
                                   size_t n_groups);

/* scores[r][j] = score of row r with centre j, for m <= SQZ_KMEANS_ROWS rows; rows are centre->n_columns apart. */
void sqz_kmeans_score_centres(float *scores, const struct kmeans *centre, const float *rows, size_t m);

/* Copies the centroids of km into the groups' panels. */
void sqz_kmeans_fill_groups(struct kmeans_groups *groups, const struct kmeans *km);

/* neighbour[c][SQZ_KMEANS_NEIGHBOURS] = the centroids nearest to c, c first, for clusters [begin, begin + m), m at most
 * SQZ_KMEANS_LIST_ROWS. Short of candidates, c stands there again. */
void sqz_kmeans_find_neighbours(uint32_t *neighbour, const struct kmeans *km, const struct kmeans_groups *groups,
                                size_t begin, size_t m, struct kmeans_scratch *scratch,
                                struct kmeans_list_scratch *list);

#endif
