/* Distances between distributions; distance.h describes them. */
#include "distance.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"

/* Natural log of the sum of exponentials, and the index of the largest logit. */
static double log_sum_exp(const float *logits, size_t n, size_t *top)
{
    double sum = 0.0;
    *top = 0;
    for (size_t i = 1; i < n; i++)
        if (logits[i] > logits[*top]) *top = i;
    double largest = logits[*top];
    for (size_t i = 0; i < n; i++) sum += exp((double)logits[i] - largest);
    return largest + log(sum);
}

bool distance_add(struct distance *distance, const float *dense, const float *squeezed, size_t n_vocab,
                  int32_t reference)
{
    size_t dense_top, squeezed_top;
    double dense_lse = log_sum_exp(dense, n_vocab, &dense_top);
    double squeezed_lse = log_sum_exp(squeezed, n_vocab, &squeezed_top);
    double kl = 0.0;
    for (size_t i = 0; i < n_vocab; i++) {
        double log_p = (double)dense[i] - dense_lse;
        double p = exp(log_p);
        if (p > 0.0) kl += p * (log_p - ((double)squeezed[i] - squeezed_lse));
    }
    double nll_dense = dense_lse - (double)dense[reference];
    double nll_squeezed = squeezed_lse - (double)squeezed[reference];
    if (!isfinite(kl) || !isfinite(nll_dense) || !isfinite(nll_squeezed)) return false;
    if (distance->n_tokens == distance->capacity) {
        size_t capacity = distance->capacity ? distance->capacity * 2 : 1024;
        bool fits = capacity <= SIZE_MAX / sizeof *distance->kl;
        double *larger = fits ? realloc(distance->kl, capacity * sizeof *larger) : NULL;
        if (!larger) die("out of memory");
        distance->kl = larger;
        distance->capacity = capacity;
    }
    distance->kl[distance->n_tokens++] = kl;
    distance->kl_sum += kl;
    distance->n_top1 += dense_top == squeezed_top;
    distance->nll_dense_sum += nll_dense;
    distance->nll_squeezed_sum += nll_squeezed;
    return true;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double distance_kl_quantile(struct distance *distance, double share)
{
    if (distance->n_tokens == 0) return 0.0;
    qsort(distance->kl, distance->n_tokens, sizeof *distance->kl, compare_doubles);
    double index = ceil(share * (double)distance->n_tokens) - 1.0;
    return distance->kl[index < 0.0 ? 0 : (size_t)index];
}

void distance_free(struct distance *distance)
{
    free(distance->kl);
    memset(distance, 0, sizeof *distance);
}
