/* Lloyd's iterations that compare every point with every centroid. */
#ifndef SQZ_LIB_KMEANS_LLOYD_H
#define SQZ_LIB_KMEANS_LLOYD_H

#include "kmeans_problem.h"
#include "random.h"

/* Seeds, then up to n_iterations of Lloyd's over all centroids. x and self are ready. */
void sqz_kmeans_lloyd(struct kmeans *km, struct sqz_random *random, uint32_t n_iterations);

#endif
