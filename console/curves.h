/*
 * The calibrated curves of a context, read at a budget: what `inspect` prints
 * and draws. A head's curve gives, for falling thresholds, the share of its KV
 * bytes that is read and the attention mass that is lost.
 */
#ifndef SQZ_CONSOLE_CURVES_H
#define SQZ_CONSOLE_CURVES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "squeeze.h"

struct curve_head {
    const float *log_threshold, *share, *lost_mass; /* [n], share falling; they die with the context */
    size_t n;
    double kv_bytes, dense_share; /* as F16; what a budget of 1 reads of them */
};

struct curve_set {
    struct curve_head *heads; /* of every clustered layer */
    size_t n_heads;
    double dense_bytes; /* keys and values of the layers that are not clustered: read at any budget */
    bool per_head;      /* a threshold a head; false: one for all */
};

/* What a budget means, over all heads of the set. */
struct curve_point {
    double log_threshold;                  /* mean */
    double share;                          /* of the clustered layers' KV bytes, mean */
    double lost_mean, lost_low, lost_high; /* attention mass lost: mean, 10th and 90th percentile over heads */
    double read_bytes;                     /* of one selection in every layer */
};

/* Layers first to last - 1 of the context. Dies without memory. */
void curve_set_create(struct curve_set *set, const struct sqz_context *context, uint32_t first, uint32_t last);
void curve_set_free(struct curve_set *set);

/* False when no layer is clustered. */
bool curve_at_budget(const struct curve_set *set, double budget, struct curve_point *point);

#endif
