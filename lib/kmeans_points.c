/*
 * Points are copied once: non-finite values become 0, a power of two brings
 * the largest to at most 1 (no square overflows or vanishes), the mean is
 * subtracted (Euclidean) or the length set to 1 (cosine).
 */
#include "kmeans_points.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define CHUNK 1024 /* points of one partial sum */

/* A fixed order of sixteen partial sums, so that compilers may use vectors without being allowed to reorder. */
float sqz_kmeans_dot(const float *a, const float *b, size_t dim)
{
    float partial[16] = {0};
    for (size_t i = 0; i < dim; i += 16)
        for (size_t j = 0; j < 16; j++) partial[j] += a[i + j] * b[i + j];
    for (size_t width = 8; width > 0; width /= 2)
        for (size_t j = 0; j < width; j++) partial[j] += partial[j + width];
    return partial[0];
}

/* Sets the length of v to 1. Two steps, because squares of what is small beside the largest point may vanish. */
void sqz_kmeans_normalise(float *v, size_t dim)
{
    float largest = 0;
    int exponent;
    for (size_t i = 0; i < dim; i++) {
        const float magnitude = fabsf(v[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest <= 0) return;
    (void)frexpf(largest, &exponent);
    if (exponent < -8)
        for (size_t i = 0; i < dim; i++) v[i] = ldexpf(v[i], -exponent);
    const float factor = 1.0f / sqrtf(sqz_kmeans_dot(v, v, dim));
    for (size_t i = 0; i < dim; i++) v[i] *= factor;
}

size_t sqz_kmeans_scale_chunks(size_t n)
{
    return (n + CHUNK - 1) / CHUNK;
}

static float finite_or_zero(float v)
{
    return fabsf(v) <= FLT_MAX ? v : 0.0f; /* false for NaN */
}

/* Adds the points of a chunk up; returns the largest magnitude. In lanes of sixteen, as sqz_kmeans_dot(). */
static float scan_chunk(const struct kmeans_scale *scale, size_t chunk, double *sum)
{
    float largest[16] = {0}, most = 0;
    memset(sum, 0, scale->dim * sizeof *sum);
    for (size_t p = chunk * CHUNK; p < sqz_kmeans_minimum(scale->n, (chunk + 1) * CHUNK); p++) {
        const float *from = scale->points + p * scale->dim;
        for (size_t i = 0; i < scale->dim; i += 16) {
            for (size_t j = 0; j < 16; j++) {
                const float v = finite_or_zero(from[i + j]), magnitude = fabsf(v);
                largest[j] = magnitude > largest[j] ? magnitude : largest[j];
                sum[i + j] += (double)v;
            }
        }
    }
    for (size_t j = 0; j < 16; j++) most = largest[j] > most ? largest[j] : most;
    return most;
}

void sqz_kmeans_scale_find(struct kmeans_scale *scale, double *partial, int n_threads)
{
    const size_t n = scale->n, dim = scale->dim, n_chunks = sqz_kmeans_scale_chunks(n);
    float largest = 0;
    int exponent = 0;
#pragma omp parallel for reduction(max : largest) num_threads(n_threads) if (n_threads > 1)
    for (size_t chunk = 0; chunk < n_chunks; chunk++) {
        const float most = scan_chunk(scale, chunk, partial + chunk * dim);
        largest = most > largest ? most : largest;
    }
    if (largest > 0) (void)frexpf(largest, &exponent);
    exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
    scale->factor = ldexpf(1.0f, -exponent);
    scale->unscale = ldexpf(1.0f, exponent);
    for (size_t chunk = 1; chunk < n_chunks; chunk++)
        for (size_t i = 0; i < dim; i++) partial[i] += partial[chunk * dim + i];
    for (size_t i = 0; i < dim; i++)
        scale->mean[i] = scale->cosine ? 0.0f : (float)(partial[i] * (double)scale->factor / (double)n);
}

void sqz_kmeans_scale_row(const struct kmeans_scale *scale, float *x, size_t point)
{
    const float *from = scale->points + point * scale->dim;
    for (size_t i = 0; i < scale->dim; i++) x[i] = finite_or_zero(from[i]) * scale->factor - scale->mean[i];
    if (scale->cosine) sqz_kmeans_normalise(x, scale->dim);
}
