/*
 * K-means over the keys of one KV head, the hierarchy above it, and the order
 * that makes every cluster one contiguous range.
 */
#ifndef SQZ_LIB_CLUSTER_H
#define SQZ_LIB_CLUSTER_H

#include "squeeze.h"

#define SQZ_KMEANS_MAX_THREADS 1024

struct sqz_kmeans_options {
    uint32_t n_clusters;    /* 1 to n_points */
    uint32_t n_iterations;  /* at most; stops early when no point moves */
    enum sqz_metric metric; /* cosine: assign by direction, centroid is the normalised mean direction */
    uint64_t seed;          /* the same seed and input give the same result, whatever the thread count */
    int n_threads;          /* 0 and 1: the calling thread alone, as where many heads run side by side */
};

/* Bytes of scratch that sqz_kmeans() needs; SIZE_MAX when the arguments are not allowed or the sum does not fit. */
size_t sqz_kmeans_workspace_bytes(size_t n_points, size_t dim, const struct sqz_kmeans_options *options);

/* Assigns points, F32 [n_points][dim] (dim a multiple of 16), to clusters. assignment: [n_points] out, every cluster
 * non-empty. workspace: at least _workspace_bytes(). Runs on the calling thread alone (callers run many heads side by
 * side). Returns the mean squared distance of a point to the mean of its cluster (Euclidean), or
 * the mean of 1 - cosine to the centroid (cosine). */
double sqz_kmeans(uint32_t *assignment, const float *points, size_t n_points, size_t dim,
                  const struct sqz_kmeans_options *options, void *workspace);

/* A hierarchy over one head's clusterable keys. Level 0: n_clusters[0] clusters of the points. Level L: n_clusters[L]
 * clusters of the level L-1 centroids (each centroid one point, as published). order: [n_points] out, point indices
 * sorted so that every cluster of every level is contiguous, coarsest first; inside a level-0 cluster ascending.
 * offset[L]: [n_clusters[L] + 1] out, in units of the level below (points for level 0). Returns the level-0
 * objective. points are clustered as given (the caller centres them). */
size_t sqz_hierarchy_workspace_bytes(size_t n_points, size_t dim, uint32_t n_levels, const uint32_t *n_clusters,
                                     const struct sqz_kmeans_options *options);
double sqz_hierarchy(uint32_t *order, uint32_t *const *offset, const float *points, size_t n_points, size_t dim,
                     uint32_t n_levels, const uint32_t *n_clusters, const struct sqz_kmeans_options *options,
                     void *workspace);

#endif
