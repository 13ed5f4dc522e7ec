/*
 * What attention costs on this machine, part by part: measured on layers of random numbers of a model's shape, squeezed
 * as a context is, and fitted. No context and no model is touched.
 */
#ifndef SQZ_ANALYSIS_ANALYZE_RATES_H
#define SQZ_ANALYSIS_ANALYZE_RATES_H

#include <stddef.h>

#include "squeeze_roofline.h"

enum { SHORT_TOKENS = 32 }; /* of a context that is read whole: a token on it tells what all but attention takes */

/* Seconds. All KV heads of a layer together. */
struct attention_rates {
    double dense_layer, dense_byte;    /* a layer; a byte of keys and values, all of which are read */
    double layer;                      /* a layer that looks up: what does not grow with the context */
    double dense_beyond, layer_beyond; /* what these take more than a layer of SHORT_TOKENS rows that are all read */
    double lookup_byte;                /* centroids with their numbers */
    double coded_key;                  /* a key of an opened cluster: its codes, its estimate, its share of the tail */
    double row_byte;                   /* retained keys and values */
    double misfit;                     /* mean error of the fit at the points it is made from, relative */
};

struct rate_probe;

/* options: how the layers are squeezed, with one level or more. Dies without memory. */
struct rate_probe *rate_probe_open(const struct sqz_model_shape *shape, const struct sqz_squeeze_options *options,
                                   int n_threads);
/* From now on layers are attended to as the shards of one are: denominators of all first, then what they choose; and not
 * behind a whole cache of something else but behind the weights of a layer, so many bytes, as in a model. */
void rate_probe_in_shards(struct rate_probe *probe, size_t layer_weights);
void rate_probe_close(struct rate_probe *probe); /* NULL is fine */

/* Every point once more, in turn; with caches that hold nothing of it. A tenth of a second or so. */
void rate_probe_measure(struct rate_probe *probe);

/* From the medians of what was measured so far; at least once. */
struct attention_rates rate_probe_fit(const struct rate_probe *probe);

/* The same layers read whole by n_tokens tokens at once, 1 to RATE_PROBE_TOKENS, in every rate_probe_measure() from now on,
 * at most RATE_PROBE_SIZES sizes; seconds a byte of keys and values, by what longer layers take more than shorter ones. */
enum { RATE_PROBE_TOKENS = 16, RATE_PROBE_SIZES = 8 };
void rate_probe_add_run(struct rate_probe *probe, size_t n_tokens);
double rate_probe_run_byte(const struct rate_probe *probe, size_t n_tokens);

#endif
