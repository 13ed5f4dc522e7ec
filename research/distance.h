/*
 * Distances between the next-token distributions of a dense and a squeezed
 * run, summed over many tokens. Everything is in double precision with a
 * log-softmax that cannot overflow.
 */
#ifndef SQZ_RESEARCH_DISTANCE_H
#define SQZ_RESEARCH_DISTANCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct distance {
    size_t n_tokens, n_top1;                        /* compared; the likeliest token was the same */
    double kl_sum, nll_dense_sum, nll_squeezed_sum; /* nats */
    double *kl;                                     /* [n_tokens] */
    size_t capacity;
};

/* Adds one token: KL(dense || squeezed), agreement, and the reference token's negative log-likelihood in both.
 * False when a figure is not finite. Dies without memory. */
bool distance_add(struct distance *distance, const float *dense, const float *squeezed, size_t n_vocab,
                  int32_t reference);
/* The share-quantile of the token's KL (0.99: 99% are no larger); 0 for none. Sorts distance->kl. */
double distance_kl_quantile(struct distance *distance, double share);
void distance_free(struct distance *distance);

#endif
