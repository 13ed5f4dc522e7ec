/* analyze_predict.h: work from shapes and budgets, times from work, and rates from times of whole tokens. */
#include "analyze_predict.h"

#include <math.h>
#include <stdlib.h>

#include "least_squares.h"
#include "memory.h"

static const double usual_opened = 0.28; /* of a lower level's centroids: docs/analyze.md */

/* ---- Work ------------------------------------------------------------------------------------ */

struct sqz_lookup_model context_lookup(const struct sqz_model_shape *shape, const struct sqz_squeeze_options *squeeze,
                                       double budget, double coded_share)
{
    const double beside = 8 * (sizeof(uint32_t) + sizeof(float)), scale = 8 * sizeof(float), d = shape->head_dim;
    struct sqz_lookup_model lookup = {.kind = SQZ_LOOKUP_SHARES,
                                      .n_levels = squeeze->n_levels,
                                      .budget = budget,
                                      .opened_share = usual_opened,
                                      .centroid_bits =
                                          squeeze->index == SQZ_INDEX_INT8 ? 8 + (scale + beside) / d : 16 + beside / d,
                                      .code_words = squeeze->code_words,
                                      .coded_share = coded_share};
    for (uint32_t l = 0; l < lookup.n_levels; l++) lookup.centroid_share[l] = (double)squeeze->centroid_share[l];
    return lookup;
}

/* Keys and values that a layer of n keys reads more than one of SHORT_TOKENS, both within a window. */
static double dense_more(double pair_bytes, double n_keys, double window)
{
    return pair_bytes * (fmin(n_keys, window) - fmin(SHORT_TOKENS, window));
}

struct attention_work expected_work(const struct sqz_model_shape *s, const struct sqz_lookup_model *lookup,
                                    double n_keys)
{
    const struct sqz_bit_widths bits = {.kv = 16}; /* contexts are F16 */
    const double head = (double)s->n_head_kv * s->head_dim, pair = 4 * head;
    const double n_global = (double)s->n_layer - s->n_window_layer;
    struct attention_work w = {0};
    if (s->n_window_layer) w.dense_bytes = s->n_window_layer * dense_more(pair, n_keys, s->n_window_tokens);
    if (lookup->budget < 1) {
        const struct sqz_lookup_counts n = sqz_lookup_reads(lookup, &bits, s->head_dim, n_keys);
        w.lookup_layers = n_global;
        w.lookup_bytes = n_global * n.compared * head * lookup->centroid_bits / 8;
        w.coded_keys = n_global * n.coded * s->n_head_kv;
        w.row_bytes = n_global * pair * n.retained;
    } else {
        w.dense_layers = n_global;
        w.dense_bytes += n_global * dense_more(pair, n_keys, INFINITY);
    }
    return w;
}

struct attention_work counted_work(const struct sqz_model_shape *shape, const struct sqz_lookup_model *lookup,
                                   double n_keys, const struct sqz_attention_stats *stats, double n_tokens)
{
    struct sqz_lookup_model all = *lookup;
    all.budget = 1;
    if (!stats->centroid_bytes) return expected_work(shape, &all, n_keys);
    struct attention_work w = expected_work(shape, lookup, n_keys);
    w.coded_keys = (double)stats->coded_keys / n_tokens;
    w.row_bytes = ((double)stats->key_bytes + (double)stats->value_bytes) / n_tokens;
    return w;
}

/* ---- Times ----------------------------------------------------------------------------------- */

struct predicted predict(const struct attention_work *w, const struct attention_rates *r, double rest)
{
    struct predicted p = {
        .rest = rest,
        .lookup = w->lookup_layers * r->layer_beyond + w->lookup_bytes * r->lookup_byte,
        .codes = w->coded_keys * r->coded_key,
        .rows = w->row_bytes * r->row_byte + w->dense_layers * r->dense_beyond + w->dense_bytes * r->dense_byte,
    };
    p.seconds = p.rest + p.lookup + p.codes + p.rows;
    return p;
}

/* ---- Rates from whole tokens ----------------------------------------------------------------- */

enum { TERM_LAYER, TERM_LOOKUP, TERM_CODES, TERM_ROWS, TERM_DENSE_LAYER, TERM_DENSE, N_TERMS };

struct attention_rates fit_tokens(const struct timed_work *timed, size_t n, double rest)
{
    double *a = allocate(n * (N_TERMS + 1), sizeof *a), *b = a + n * N_TERMS, x[N_TERMS];
    for (size_t i = 0; i < n; i++) {
        const struct attention_work *w = &timed[i].work;
        double *terms = a + i * N_TERMS;
        terms[TERM_LAYER] = w->lookup_layers / timed[i].seconds;
        terms[TERM_LOOKUP] = w->lookup_bytes / timed[i].seconds;
        terms[TERM_CODES] = w->coded_keys / timed[i].seconds;
        terms[TERM_ROWS] = w->row_bytes / timed[i].seconds;
        terms[TERM_DENSE_LAYER] = w->dense_layers / timed[i].seconds;
        terms[TERM_DENSE] = w->dense_bytes / timed[i].seconds;
        b[i] = 1 - rest / timed[i].seconds;
    }
    least_squares(x, a, b, n, N_TERMS);
    free(a);
    struct attention_rates rates = {.dense_layer = x[TERM_DENSE_LAYER],
                                    .dense_byte = x[TERM_DENSE],
                                    .layer = x[TERM_LAYER],
                                    .dense_beyond = x[TERM_DENSE_LAYER],
                                    .layer_beyond = x[TERM_LAYER],
                                    .lookup_byte = x[TERM_LOOKUP],
                                    .coded_key = x[TERM_CODES],
                                    .row_byte = x[TERM_ROWS]};
    for (size_t i = 0; i < n; i++)
        rates.misfit += fabs(predict(&timed[i].work, &rates, rest).seconds / timed[i].seconds - 1) / (double)n;
    return rates;
}
