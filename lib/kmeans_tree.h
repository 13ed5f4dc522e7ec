/* K-means of large problems. */
#ifndef SQZ_LIB_KMEANS_TREE_H
#define SQZ_LIB_KMEANS_TREE_H

#include "cluster.h"

/* Whether a problem is large enough to gain. */
bool sqz_kmeans_tree_worth(size_t n, size_t n_clusters);
size_t sqz_kmeans_tree_bytes(size_t n, size_t dim, const struct sqz_kmeans_options *options);

/* As sqz_kmeans(). Returns a negative number, assignment undefined, when the points have too few different values. */
double sqz_kmeans_tree(uint32_t *assignment, const float *points, size_t n, size_t dim,
                       const struct sqz_kmeans_options *options, void *workspace);

#endif
