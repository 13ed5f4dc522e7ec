/*
 * How far two distributions of the next token are apart, by their logits.
 */
#ifndef SQZ_TESTS_DIVERGENCE_H
#define SQZ_TESTS_DIVERGENCE_H

#include <math.h>
#include <stddef.h>

/* KL(a || b) of n logits each, in nats. */
static inline double logits_divergence(const float *a, const float *b, size_t n)
{
    double most_a = -INFINITY, most_b = -INFINITY, sum_a = 0, sum_b = 0, kl = 0;
    for (size_t i = 0; i < n; i++) {
        most_a = fmax(most_a, (double)a[i]);
        most_b = fmax(most_b, (double)b[i]);
    }
    for (size_t i = 0; i < n; i++) {
        sum_a += exp((double)a[i] - most_a);
        sum_b += exp((double)b[i] - most_b);
    }
    for (size_t i = 0; i < n; i++) {
        const double log_a = (double)a[i] - most_a - log(sum_a), log_b = (double)b[i] - most_b - log(sum_b);
        kl += exp(log_a) * (log_a - log_b);
    }
    return kl;
}

#endif
