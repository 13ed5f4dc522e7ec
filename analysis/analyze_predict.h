/*
 * What a token is predicted to take on a context: the time of a token on SHORT_TOKENS, which is all but attention, and
 * for every layer what its attention does more than there, at rates that were measured (analyze_rates.h on the CPU,
 * fit_tokens() on a card). What attention does follows from the shape, the context's options and the budget; of the
 * text only the share of keys is taken whose codes are read.
 */
#ifndef SQZ_ANALYSIS_ANALYZE_PREDICT_H
#define SQZ_ANALYSIS_ANALYZE_PREDICT_H

#include "analyze_rates.h"

/* What a token's attention does more than on SHORT_TOKENS that are all read, all layers together. */
struct attention_work {
    double lookup_layers, dense_layers; /* layers without a window that choose; that read everything */
    double lookup_bytes;                /* of centroids with their numbers */
    double coded_keys;                  /* keys whose codes are read */
    double row_bytes, dense_bytes;      /* of retained keys and values; of those of layers that read all they see */
};

/* How a context's layers look up at a budget. coded_share: of the keys, whose codes are read. */
struct sqz_lookup_model context_lookup(const struct sqz_model_shape *shape, const struct sqz_squeeze_options *squeeze,
                                       double budget, double coded_share);

/* On a context of n_keys tokens; a budget of 1 reads all. */
struct attention_work expected_work(const struct sqz_model_shape *shape, const struct sqz_lookup_model *lookup,
                                    double n_keys);
/* The same, with the rows and codes that n_tokens tokens have read there. Where nothing was looked up, all was read. */
struct attention_work counted_work(const struct sqz_model_shape *shape, const struct sqz_lookup_model *lookup,
                                   double n_keys, const struct sqz_attention_stats *stats, double n_tokens);

/* Seconds a token, and what they are made of. */
struct predicted {
    double seconds;
    double rest, lookup, codes, rows; /* all but attention; looking up; single keys; reading keys and values */
};
struct predicted predict(const struct attention_work *work, const struct attention_rates *rates, double rest);

/* A token's work and time. */
struct timed_work {
    struct attention_work work;
    double seconds;
};
/* The rates by which such works take such times beside `rest`, the time of a token on SHORT_TOKENS, as nearly as they
 * can; relative errors count, and no rate is below 0. dense_layer and layer are what is beyond the layers of `rest`. */
struct attention_rates fit_tokens(const struct timed_work *timed, size_t n, double rest);

#endif
