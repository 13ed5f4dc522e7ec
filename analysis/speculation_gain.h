/*
 * What exact speculation gains: a cycle drafts some tokens with a part of the context and verifies them, with the one that
 * was asked for, in one run that reads all of it. Seconds of each come from rates that were measured on the machine, in no
 * run of such a cycle:
 *
 *   draft     everything but attention of a token, and its attention at the draft's budget (analyze_predict.h)
 *   verify    everything but attention of a run of so many tokens, and attention that reads each row once for all of
 *             them, whose time a byte was measured for so many tokens
 *   a cycle   keeps (1 - a^(g+1)) / (1 - a) tokens of g drafted ones of which each is accepted with chance a
 *
 * beside an exact token by itself, which is a run of one.
 */
#ifndef SQZ_ANALYSIS_SPECULATION_GAIN_H
#define SQZ_ANALYSIS_SPECULATION_GAIN_H

#include "analyze_predict.h"

enum { BATCH_RATES = 7, MOST_BATCH_TOKENS = 16 };
/* Sizes of runs that are measured, ascending, the first is 1. Between them rates are drawn as lines. */
extern const size_t batch_tokens[BATCH_RATES];

/* A run of so many tokens. */
struct batch_rate {
    double rest;       /* seconds of one on SHORT_TOKENS, logits of all its tokens */
    double dense_byte; /* seconds a byte of keys and values that all its tokens read */
};

struct speculation_rates {
    struct attention_rates attention; /* of a token by itself */
    struct batch_rate batches[BATCH_RATES];
};

/* Where no larger runs were measured: memory is the limit, and a run takes what its bytes take, as one token does. */
void speculation_rates_fill(struct speculation_rates *rates, double rest);

/* Seconds, and tokens a cycle. gain: tokens a second by such cycles over those without drafts. */
struct speculation_gain {
    double token, draft, verify, cycle_tokens, gain;
};

/* On a context of n_keys tokens; lookup: of the draft, a budget of 1 reads all; gamma: drafted tokens a cycle, 0 (none)
 * to MOST_BATCH_TOKENS - 1. */
struct speculation_gain speculation_gain(const struct sqz_model_shape *shape, const struct sqz_lookup_model *lookup,
                                         const struct speculation_rates *rates, double n_keys, double acceptance,
                                         size_t gamma);

/* The number of drafted tokens that gains most, 0 where none pays. */
size_t speculation_best_gamma(const struct sqz_model_shape *shape, const struct sqz_lookup_model *lookup,
                              const struct speculation_rates *rates, double n_keys, double acceptance);

#endif
