/*
 * What the ways take in which tokens of one batch go through a context on the CPU (enum sqz_together): measured once on
 * rows of the model's shape, since it is a matter of the machine how a lookup and gathered rows compare with products of
 * many queries; then arithmetic alone. Only how ways compare matters.
 */
#ifndef SQZ_ENGINE_CPU_COST_H
#define SQZ_ENGINE_CPU_COST_H

#include "layer.h"

struct sqz_cpu_cost {
    double looked_up,
        selected;         /* seconds of a thread a row, token and KV head: of every row, and of those selected more */
    double passed, joint; /* a row and KV head: of a block of tokens that go together, and for each of them more */
};

/* Some tens of milliseconds on n_threads threads. Errors: MEMORY. */
enum sqz_status sqz_cpu_cost_measure(struct sqz_cpu_cost *cost, const struct sqz_layer_shape *shape, int n_threads,
                                     struct sqz_error *error);

/* A token's selection of this share of a layer's rows, as a part of all threads' time. */
double sqz_cpu_each_seconds(const struct sqz_cpu_cost *cost, const struct sqz_layer_shape *shape, size_t n_rows,
                            double share, int n_threads);
/* n_tokens tokens that go through all rows together. */
double sqz_cpu_all_seconds(const struct sqz_cpu_cost *cost, const struct sqz_layer_shape *shape, size_t n_rows,
                           size_t n_tokens, int n_threads);

#endif
