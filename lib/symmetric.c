/* Cholesky's decomposition and Jacobi's eigenvalue method; symmetric.h has the contracts. */
#include "symmetric.h"

#include <math.h>
#include <string.h>

void sqz_cholesky(double *a, size_t n)
{
    double largest = 0;
    for (size_t i = 0; i < n; i++) largest = fmax(largest, a[i * n + i]);
    const double least = largest > 0 ? largest * 1e-12 : 1.0;
    for (size_t i = 0; i < n; i++) {
        for (size_t j = 0; j <= i; j++) {
            double sum = a[i * n + j];
            for (size_t k = 0; k < j; k++) sum -= a[i * n + k] * a[j * n + k];
            if (i == j) a[i * n + j] = sqrt(fmax(sum, least));
            else a[i * n + j] = a[j * n + j] * a[j * n + j] > 2 * least ? sum / a[j * n + j] : 0;
        }
        for (size_t j = i + 1; j < n; j++) a[i * n + j] = 0;
    }
}

/* Rotates rows p and q of a matrix of n columns. */
static void rotate_rows(double *a, size_t n, size_t p, size_t q, double cosine, double sine)
{
    double *x = a + p * n, *y = a + q * n;
    for (size_t k = 0; k < n; k++) {
        const double u = x[k], v = y[k];
        x[k] = cosine * u - sine * v;
        y[k] = sine * u + cosine * v;
    }
}

static void rotate_columns(double *a, size_t n, size_t p, size_t q, double cosine, double sine)
{
    for (size_t k = 0; k < n; k++) {
        const double u = a[k * n + p], v = a[k * n + q];
        a[k * n + p] = cosine * u - sine * v;
        a[k * n + q] = sine * u + cosine * v;
    }
}

static double off_diagonal(const double *a, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < i; j++) sum += a[i * n + j] * a[i * n + j];
    return sum;
}

static void sort_descending(double *values, double *vectors, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        size_t best = i;
        for (size_t j = i + 1; j < n; j++) best = values[j] > values[best] ? j : best;
        if (best == i) continue;
        const double value = values[i];
        values[i] = values[best];
        values[best] = value;
        for (size_t k = 0; k < n; k++) {
            const double x = vectors[i * n + k];
            vectors[i * n + k] = vectors[best * n + k];
            vectors[best * n + k] = x;
        }
    }
}

void sqz_symmetric_eigen(double *values, double *vectors, double *a, size_t n)
{
    enum { MOST_SWEEPS = 30 };
    double norm = 0;
    memset(vectors, 0, n * n * sizeof *vectors);
    for (size_t i = 0; i < n; i++) vectors[i * n + i] = 1;
    for (size_t i = 0; i < n * n; i++) norm += a[i] * a[i];
    /* Codes need the directions to three digits or so. */
    for (int sweep = 0; sweep < MOST_SWEEPS && off_diagonal(a, n) > 1e-14 * norm; sweep++)
        for (size_t p = 0; p + 1 < n; p++)
            for (size_t q = p + 1; q < n; q++) {
                const double apq = a[p * n + q];
                if (apq * apq <= 1e-30 * norm) continue;
                const double theta = (a[q * n + q] - a[p * n + p]) / (2 * apq);
                const double t = (theta >= 0 ? 1.0 : -1.0) / (fabs(theta) + sqrt(theta * theta + 1));
                const double cosine = 1 / sqrt(t * t + 1), sine = t * cosine;
                rotate_rows(a, n, p, q, cosine, sine);
                rotate_columns(a, n, p, q, cosine, sine);
                rotate_rows(vectors, n, p, q, cosine, sine);
            }
    for (size_t i = 0; i < n; i++) values[i] = fmax(a[i * n + i], 0);
    sort_descending(values, vectors, n);
}
