/*
 * card_cost.h. Constants are fitted to bench/gpu/ways.cu (docs/gpu.md); tests/test_card_cost.c
 * has the times.
 */
#include "card_cost.h"

#include <math.h>
#include <stdint.h>

static const double each_fixed = 16, each_token = 0.8, /* launches one behind the other; a token's own part */
    logits_us = 5.5e4,                                 /* of single query rows and clusters */
    weigh_fixed = 14, weighed_us = 3.0e4,              /* of those that a tail weighs */
    codes_fixed = 30,                                  /* more where there are codes: */
    codes_us = 9.0e4, coded_rows_us = 2.2e4;           /* of single tokens, and of those rows that are read */
static const double all_fixed = 24, one_pass_token = 0.8,
                    row_bytes_us = 4.2e6;                     /* of a context, for up to 128 query rows of a KV head */
static const double one_fixed = 45, cluster_bytes_us = 5.2e5, /* of centroids, for as many: all that finds rows */
    tail_fixed = 7, tail_bytes_us = 1.2e6,                    /* of centroids, in the pass */
    united_fixed = 40;                                        /* more than a selection of each */
static const double shared_fixed = 90,
                    shared_bytes_us = 6.7e5; /* of centroids, for as many: lookup and tail by products */

static const double plane_bytes_us = 3.0e6, plane_rows = 16, /* query rows that read planes once, */
    most_plane_rows = 128;                                   /* up to so many; more have F16 rows made first */

/* Of F16 keys or values. */
static double row_bytes(const struct sqz_card_task *t)
{
    return t->heads_kv * t->dim * sizeof(uint16_t);
}

/* Query rows of a KV head go through a context in blocks of 128. */
static double blocks(const struct sqz_card_task *t)
{
    return ceil(t->tokens * t->heads / t->heads_kv / 128);
}

static double plane_bytes(const struct sqz_card_task *t)
{
    return t->heads_kv * t->dim * t->number_bytes;
}

/* To make F16 rows of planes. */
static double unpack_us(const struct sqz_card_task *t)
{
    return t->number_bytes > 0 ? 2 * t->rows * (plane_bytes(t) + row_bytes(t)) / row_bytes_us : 0;
}

static double f16_pass_us(const struct sqz_card_task *t, double share)
{
    return unpack_us(t) + blocks(t) * 2 * share * t->rows * row_bytes(t) / row_bytes_us;
}

static double pass_us(const struct sqz_card_task *t, double share)
{
    const double query_rows = t->tokens * t->heads / t->heads_kv;
    if (t->number_bytes <= 0 || query_rows > most_plane_rows) return f16_pass_us(t, share);
    return ceil(query_rows / plane_rows) * 2 * share * t->rows * plane_bytes(t) / plane_bytes_us;
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
    return each_fixed + each_token * t->tokens + logits / logits_us +
           (t->tail ? weigh_fixed + logits / weighed_us : 0) + (t->coded ? codes_fixed + keys : 0);
}

double sqz_card_each_us(const struct sqz_card_task *t, double share)
{
    const double rows_us = t->number_bytes > 0 ? plane_bytes(t) / plane_bytes_us : row_bytes(t) / row_bytes_us;
    return lookup_us(t, share) + t->tokens * 2 * share * t->rows * rows_us;
}

double sqz_card_one_us(const struct sqz_card_task *t, double share, double united)
{
    const bool by_each = t->coded || t->several_levels || (t->tail && t->number_bytes > 0);
    const double centroids = centroid_bytes(t), tail = t->tail ? tail_fixed + centroids / tail_bytes_us : 0;
    const double found = by_each ? lookup_us(t, share) + united_fixed : one_fixed + centroids / cluster_bytes_us + tail;
    return found + one_pass_token * t->tokens + pass_us(t, united);
}

double sqz_card_all_us(const struct sqz_card_task *t)
{
    return all_fixed + one_pass_token * t->tokens + pass_us(t, 1);
}

double sqz_card_shared_us(const struct sqz_card_task *t, double share)
{
    return shared_fixed + centroid_bytes(t) / shared_bytes_us + f16_pass_us(t, share);
}

double sqz_card_long_all_us(const struct sqz_card_task *t)
{
    return all_fixed + f16_pass_us(t, 1);
}
