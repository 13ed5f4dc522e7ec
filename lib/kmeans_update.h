/* Centroids from assignments, and points for clusters that have none. */
#ifndef SQZ_LIB_KMEANS_UPDATE_H
#define SQZ_LIB_KMEANS_UPDATE_H

#include "kmeans_problem.h"

/* Fills order and start from assignment. */
void sqz_kmeans_sort(struct kmeans *km);

/* sum[dim] = sum of the points of cluster c, by order and start. */
void sqz_kmeans_sum(const struct kmeans *km, size_t c, double *sum);

/* Writes centroid c as the mean, or its direction, of `count` points that sum up to sum. */
void sqz_kmeans_set_centroid(struct kmeans *km, size_t c, const double *sum, size_t count);

/* Gives every empty cluster the point that is farthest from its centroid, among points that leave nothing empty
 * behind. There are enough as n_clusters <= n. Overwrites start. Returns the number of points moved. */
size_t sqz_kmeans_repair(struct kmeans *km);

#endif
