/*
 * The threshold that meets a budget. The library finds it with a curve that was calibrated on the last queries of the
 * context; here the queries at hand are the calibration. As in the library one threshold serves all heads, so heads of
 * flat attention read much and sharp ones little; a curve of three points a nat apart around it is all that the calls
 * of one case look at.
 */
#include "bench_kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"

enum { SAMPLES = 8, STEPS = 24, CORRECTIONS = 5 };

static const double lowest = -30.0, highest = 0.0, tolerance = 0.01, largest_offset = 0.95;

void bench_variant_make(struct bench_variant *v, const struct bench_layer *layer, struct bench_format format)
{
    const size_t n = (size_t)layer->layer.shape.n_head_kv * BENCH_CURVE;
    memset(v, 0, sizeof *v);
    v->format = format;
    v->share = calloc(n, sizeof *v->share);
    v->tail_gain = calloc(n, sizeof *v->tail_gain); /* 0: values of pruned clusters weigh what their keys promise */
    if (!v->share || !v->tail_gain) die("out of memory");
    v->layer = bench_layer_view(layer, format);
    v->layer.n_curve = BENCH_CURVE;
    v->layer.log_threshold = v->log_threshold;
    v->layer.global_share = v->global_share;
    v->layer.share = v->share;
    v->layer.tail_gain = v->tail_gain;
}

void bench_variant_free(struct bench_variant *v)
{
    free(v->share);
    free(v->tail_gain);
    v->share = v->tail_gain = NULL;
}

/* Whatever the budget, calls take the middle of the curve. */
static void set_threshold(struct bench_variant *v, double log_threshold, float budget)
{
    for (int i = 0; i < BENCH_CURVE; i++) v->log_threshold[i] = (float)log_threshold + (float)(i - 1);
    v->global_share[0] = 1.0f;
    v->global_share[1] = budget;
    v->global_share[2] = 0.0f;
}

void bench_variant_retain_nothing(struct bench_variant *v)
{
    set_threshold(v, 1.0, 0.0f); /* scores are at most 1: log 0 */
    v->global_share[0] = 0.0f;
    memset(v->share, 0, (size_t)v->layer.shape.n_head_kv * BENCH_CURVE * sizeof *v->share);
}

/* Some tokens of a call, far apart, each with a selection of its own. */
static struct sqz_attend_call some_tokens(const struct sqz_attend_call *call)
{
    struct sqz_attend_call some = *call;
    const size_t n = call->n_tokens < SAMPLES ? call->n_tokens : SAMPLES;
    some.n_tokens = n;
    some.n_user = n;
    some.query_token_stride = call->n_tokens / n * call->query_token_stride;
    some.block_tokens = 1;
    some.log_offset = 0.0f;
    return some;
}

static double share_of(const struct sqz_attend_call *call)
{
    struct sqz_attend_call counted = *call;
    struct sqz_attention_stats stats = {0};
    counted.stats = &stats;
    sqz_attend(&counted);
    return sqz_attention_stats_share(&stats);
}

static double share_at(struct bench_variant *v, const struct sqz_attend_call *call, double log_threshold)
{
    set_threshold(v, log_threshold, call->budget);
    return share_of(call);
}

/* The log threshold at which the call reads its budget: a bracket of 2 nats that is moved until it holds the budget,
 * then halved. A first guess is a key's share of flat attention. */
static double find_threshold(struct bench_variant *v, const struct sqz_attend_call *call)
{
    double high = -log((double)v->layer.n_rows) + 1.0, low = high;
    int step = 0;
    while (step++ < STEPS && high < highest && share_at(v, call, high) > call->budget && !signal_caught()) {
        low = high;
        high += 2.0;
    }
    while (step++ < STEPS && (low == high || share_at(v, call, low) <= call->budget) && low > lowest &&
           !signal_caught()) {
        high = low == high ? high : low;
        low -= 2.0;
    }
    while (step++ < STEPS && high - low > 0.01 && !signal_caught()) {
        const double middle = 0.5 * (low + high), share = share_at(v, call, middle);
        if (fabs(share / call->budget - 1.0) < tolerance) return middle;
        *(share > call->budget ? &low : &high) = middle;
    }
    return 0.5 * (low + high);
}

/* Every head's share at the points of the curve. */
static void measure_heads(struct bench_variant *v, const struct sqz_attend_call *call, double log_threshold)
{
    const uint32_t n_heads = v->layer.shape.n_head_kv, group = v->layer.shape.n_head / n_heads;
    const size_t d = v->layer.shape.head_dim;
    double mean[BENCH_CURVE] = {0};
    float shares[BENCH_CURVE];
    for (uint32_t h = 0; h < n_heads && !signal_caught(); h++) {
        const struct sqz_layer head = sqz_layer_head(&v->layer, h);
        struct sqz_attend_call one = *call;
        one.layer = &head;
        one.queries += h * group * one.query_head_stride;
        one.user_keys += h * one.user_capacity_rows * d;
        one.user_values += h * one.user_capacity_rows * d;
        for (int i = 0; i < BENCH_CURVE; i++) {
            shares[i] = (float)share_at(v, &one, log_threshold + i - 1);
            mean[i] += shares[i] / n_heads;
        }
        memcpy(v->share + (size_t)h * BENCH_CURVE, shares, sizeof shares);
    }
    set_threshold(v, log_threshold, call->budget);
    for (int i = 0; i < BENCH_CURVE; i++) v->global_share[i] = (float)mean[i];
}

bool bench_variant_meet_budget(struct bench_variant *v, struct sqz_attend_call *call)
{
    const struct sqz_attend_call some = some_tokens(call);
    measure_heads(v, &some, find_threshold(v, &some));
    const double nats = 0.5 * log((double)v->global_share[0] / (double)v->global_share[2]);
    const double slope = nats > 0.05 ? nats : 0.05; /* of the logarithm of the share over the threshold's */
    v->log_offset = 0.0f;
    for (int i = 0; i < CORRECTIONS && !signal_caught(); i++) {
        struct sqz_attend_call counted = *call;
        memset(&v->stats, 0, sizeof v->stats);
        counted.log_offset = v->log_offset;
        counted.stats = &v->stats;
        sqz_attend(&counted);
        const double off = log(sqz_attention_stats_share(&v->stats) / call->budget);
        if (fabs(off) < tolerance || i + 1 == CORRECTIONS) break;
        const double next = v->log_offset + off / slope;
        v->log_offset = (float)fmax(-largest_offset, fmin(largest_offset, next));
    }
    call->log_offset = v->log_offset;
    return !signal_caught();
}
