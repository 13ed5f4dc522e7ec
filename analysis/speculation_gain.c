/* What exact speculation gains; speculation_gain.h. */
#include "speculation_gain.h"

const size_t batch_tokens[BATCH_RATES] = {1, 2, 3, 5, 8, 11, 16};

void speculation_rates_fill(struct speculation_rates *rates, double rest)
{
    for (int i = 0; i < BATCH_RATES; i++)
        rates->batches[i] = (struct batch_rate){.rest = rest, .dense_byte = rates->attention.dense_byte};
}

/* Rates of a run of n tokens. */
static struct batch_rate rate_of(const struct speculation_rates *rates, size_t n)
{
    int i = 0;
    while (i + 2 < BATCH_RATES && batch_tokens[i + 1] < n) i++;
    const struct batch_rate *low = &rates->batches[i], *high = &rates->batches[i + 1];
    const double at = ((double)n - (double)batch_tokens[i]) / ((double)batch_tokens[i + 1] - (double)batch_tokens[i]);
    return (struct batch_rate){low->rest + at * (high->rest - low->rest),
                               low->dense_byte + at * (high->dense_byte - low->dense_byte)};
}

/* A run of n tokens that read everything. */
static double run_seconds(const struct sqz_model_shape *shape, const struct speculation_rates *rates, double n_keys,
                          size_t n)
{
    const struct sqz_lookup_model all = {.kind = SQZ_LOOKUP_SHARES, .n_levels = 1, .budget = 1};
    const struct attention_work work = expected_work(shape, &all, n_keys);
    const struct batch_rate rate = rate_of(rates, n);
    struct attention_rates attention = rates->attention;
    attention.dense_byte = rate.dense_byte;
    return predict(&work, &attention, rate.rest).seconds;
}

struct speculation_gain speculation_gain(const struct sqz_model_shape *shape, const struct sqz_lookup_model *lookup,
                                         const struct speculation_rates *rates, double n_keys, double acceptance,
                                         size_t gamma)
{
    const struct attention_work drafted = expected_work(shape, lookup, n_keys);
    struct speculation_gain g = {
        .token = run_seconds(shape, rates, n_keys, 1),
        .draft = predict(&drafted, &rates->attention, rates->batches[0].rest).seconds,
        .verify = run_seconds(shape, rates, n_keys, gamma + 1),
        .cycle_tokens = sqz_speculation_tokens(acceptance, (uint32_t)gamma),
    };
    g.gain = g.cycle_tokens * g.token / ((double)gamma * g.draft + g.verify);
    return g;
}

size_t speculation_best_gamma(const struct sqz_model_shape *shape, const struct sqz_lookup_model *lookup,
                              const struct speculation_rates *rates, double n_keys, double acceptance)
{
    size_t best = 0;
    double most = 1;
    for (size_t gamma = 1; gamma < MOST_BATCH_TOKENS; gamma++) {
        const double gain = speculation_gain(shape, lookup, rates, n_keys, acceptance, gamma).gain;
        if (gain > most) most = gain, best = gamma;
    }
    return best;
}
