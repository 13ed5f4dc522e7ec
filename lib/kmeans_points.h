/*
 * Points as k-means wants them: finite, at most about 1, centred (Euclidean)
 * or of length 1 (cosine).
 */
#ifndef SQZ_LIB_KMEANS_POINTS_H
#define SQZ_LIB_KMEANS_POINTS_H

#include <stdbool.h>
#include <stddef.h>

static inline size_t sqz_kmeans_minimum(size_t a, size_t b)
{
    return a < b ? a : b;
}

float sqz_kmeans_dot(const float *a, const float *b, size_t dim);
void sqz_kmeans_normalise(float *v, size_t dim);

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

#endif
