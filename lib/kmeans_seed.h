/* K-means++: the first centroids. */
#ifndef SQZ_LIB_KMEANS_SEED_H
#define SQZ_LIB_KMEANS_SEED_H

#include "kmeans_problem.h"
#include "random.h"

/* Adds up to `wanted` k-means++ seeds to the n_seeds there are, by the costs that km->score gives, and assigns points
 * that are nearer to one of them. With n_seeds 0 the scores are those with centres that are no seeds, so points take the
 * first new seeds whatever their score is; where they are -infinity, or every point lies on its centre, the first seed
 * is drawn uniformly. Returns the seeds there are now: fewer than asked for when every point lies on a seed. */
size_t sqz_kmeans_add_seeds(struct kmeans *km, struct sqz_random *random, size_t n_seeds, size_t wanted);

/* Assigns every point to the nearest of n_clusters seeds, none of which is left without a point. */
void sqz_kmeans_seed(struct kmeans *km, struct sqz_random *random);

#endif
