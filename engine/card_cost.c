/*
 * card_cost.h. Constants are fitted to bench/gpu/ways.cu, those of tails and long
 * questions to whole steps (docs/gpu.md); tests/test_card_cost.c has the times.
 */
#include "card_cost.h"

#include <math.h>
#include <stdint.h>

static const double each_fixed = 32, each_token = 0.6, /* launches one behind the other; a token's own part */
    logits_us = 5.5e4,                                 /* of single query rows and clusters */
    weighed_us = 9.0e4,                                /* of those that a tail weighs */
    codes_fixed = 30,                                  /* more where there are codes: */
    codes_us = 9.0e4, coded_rows_us = 2.2e4;           /* of single tokens, and of those rows that are read */
static const double all_fixed = 46, one_pass_token = 0.9,
                    row_bytes_us = 4.4e6;                     /* of a context, for up to 128 query rows of a KV head */
static const double one_fixed = 81, cluster_bytes_us = 5.0e6, /* of centroids, for as many */
    united_fixed = 40;                                        /* more than a selection of each */
static const double shared_fixed = 230,
                    shared_bytes_us = 3.3e5; /* of centroids, for as many: lookup and tail by products */

/* Of keys or values. */
static double row_bytes(const struct sqz_card_task *t)
{
    return t->heads_kv * t->dim * sizeof(uint16_t);
}

/* Query rows of a KV head go through a context in blocks of 128. */
static double blocks(const struct sqz_card_task *t)
{
    return ceil(t->tokens * t->heads / t->heads_kv / 128);
}

static double pass_us(const struct sqz_card_task *t, double share)
{
    return blocks(t) * 2 * share * t->rows * row_bytes(t) / row_bytes_us;
}

static double centroid_bytes(const struct sqz_card_task *t)
{
    return blocks(t) * t->clusters * row_bytes(t);
}

/* A selection of each, with what the tail takes. */
static double lookup_us(const struct sqz_card_task *t, double share)
{
    const double logits = t->tokens * t->clusters * t->heads;
    const double keys = t->tokens * t->rows * t->heads_kv * (1 / codes_us + share / coded_rows_us);
    return each_fixed + each_token * t->tokens + logits / logits_us + (t->tail ? logits / weighed_us : 0) +
           (t->coded ? codes_fixed + keys : 0);
}

double sqz_card_each_us(const struct sqz_card_task *t, double share)
{
    return lookup_us(t, share) + t->tokens * 2 * share * t->rows * row_bytes(t) / row_bytes_us;
}

double sqz_card_one_us(const struct sqz_card_task *t, double share, double united)
{
    const bool by_each = t->coded || t->tail || t->several_levels;
    const double found =
        by_each ? lookup_us(t, share) + united_fixed : one_fixed + centroid_bytes(t) / cluster_bytes_us;
    return found + one_pass_token * t->tokens + pass_us(t, united);
}

double sqz_card_all_us(const struct sqz_card_task *t)
{
    return all_fixed + one_pass_token * t->tokens + pass_us(t, 1);
}

double sqz_card_shared_us(const struct sqz_card_task *t, double share)
{
    return shared_fixed + centroid_bytes(t) / shared_bytes_us + pass_us(t, share);
}
