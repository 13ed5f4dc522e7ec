/*
 * Exact speculation by measured rates: what a cycle of drafts and their
 * verification takes behind contexts of any length, and what it gains
 * (speculation_gain.h). With `here` rates are measured: whole runs of 1 to 16
 * tokens on a context of a few, and attention on layers of random numbers
 * (analyze_rates.h); no draft is made and no context of the lengths asked for.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "analyze.h"
#include "analyze_predict.h"
#include "common.h"
#include "inputs.h"
#include "json_output.h"
#include "machine.h"
#include "memory.h"
#include "rates_file.h"
#include "session.h"
#include "signals.h"
#include "speculation_gain.h"
#include "times.h"

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

enum { RUNS_A_ROUND = 6 };

/* ---- Measuring ---------------------------------------------------------------------------- */

struct probe {
    struct short_run run;
    struct rate_probe *rates;
    struct times rest[BATCH_RATES];
    float *logits; /* [MOST_BATCH_TOKENS][n_vocab] */
};

static void open_probe(struct probe *p, const struct analysis *a, const struct speculation_request *request,
                       const struct sqz_squeeze_options *squeeze)
{
    struct sqz_model_info info;
    short_run_open(&p->run, request->model_path, request->n_threads, squeeze);
    sqz_model_get_info(p->run.model, &info);
    p->logits = allocate((size_t)MOST_BATCH_TOKENS * info.n_vocab, sizeof *p->logits);
    p->rates = rate_probe_open(&a->shape, squeeze, info.n_threads);
    for (int i = 0; i < BATCH_RATES; i++) rate_probe_add_run(p->rates, batch_tokens[i]);
}

/* Every size of run in turn, each with the logits of all its tokens. */
static void run_round(struct probe *p)
{
    struct sqz_context_info info;
    struct sqz_error error;
    struct sqz_session *session = p->run.session;
    sqz_context_get_info(p->run.context, &info);
    for (int k = 0; k < RUNS_A_ROUND; k++) {
        for (int i = 0; i < BATCH_RATES; i++) {
            sqz_session_reset(session);
            session->all_logits = p->logits;
            const double since = now_seconds();
            stop_on(sqz_session_run(session, info.tokens, batch_tokens[i], &error), &error);
            times_add(&p->rest[i], now_seconds() - since);
            session->all_logits = NULL;
        }
    }
    rate_probe_measure(p->rates);
}

static void measure(struct analysis *a, const struct speculation_request *request,
                    const struct sqz_squeeze_options *squeeze, struct speculation_rates *rates)
{
    struct probe p = {0};
    catch_signals();
    open_probe(&p, a, request, squeeze);
    for (size_t round = 0; round < request->n_repeats; round++) {
        if (!request->quiet) fprintf(stderr, "analyze: round %zu of %zu\n", round + 1, request->n_repeats);
        run_round(&p);
    }
    rates->attention = rate_probe_fit(p.rates);
    for (int i = 0; i < BATCH_RATES; i++)
        rates->batches[i] =
            (struct batch_rate){times_median(&p.rest[i]), fmax(0, rate_probe_run_byte(p.rates, batch_tokens[i]))};
    rate_probe_close(p.rates);
    short_run_close(&p.run);
    free(p.logits);
}

/* ---- The table ------------------------------------------------------------------------------ */

static const struct table_column columns[] = {
    {"tokens", "tokens", 1, 10},
    {"draft_budget", "draft reads", 1, 4},
    {"gamma", "drafted", 1, 4},
    {"token_seconds", "exact ms", 1e3, 4},
    {"draft_seconds", "a draft ms", 1e3, 4},
    {"verify_seconds", "verify ms", 1e3, 4},
    {"tokens_a_cycle", "tokens a cycle", 1, 4},
    {"gain", "gain", 1, 4},
    {"best_gamma", "drafted at best", 1, 4},
    {"best_gain", "gain", 1, 4},
};

int view_speculation(struct analysis *a, const struct speculation_request *request)
{
    struct speculation_rates rates;
    struct sqz_squeeze_options squeeze;
    struct table table;
    json_t *more = json_object();
    const bool here = strcmp(request->rates, "here") == 0;
    fill_counts(&a->tokens, 4096, 9);
    sqz_squeeze_options_default(&squeeze, SQZ_RULE_DEFAULT);
    if (here) measure(a, request, &squeeze, &rates);
    else rates_read(request->rates, &rates);
    if (!(rates.attention.coded_key > 0)) squeeze.code_words = 0; /* whole clusters */
    const double budget = a->lookup.budget, acceptance = a->speculation.acceptance;
    const struct sqz_lookup_model lookup =
        context_lookup(&a->shape, &squeeze, budget, squeeze.code_words ? a->lookup.coded_share : 0);
    table_begin(&table, "speculation", NULL, columns, COUNT_OF(columns));
    for (size_t i = 0; i < a->tokens.n; i++) {
        const double n = (double)a->tokens.value[i];
        const struct speculation_gain g =
            speculation_gain(&a->shape, &lookup, &rates, n, acceptance, a->speculation.gamma);
        const size_t best = speculation_best_gamma(&a->shape, &lookup, &rates, n, acceptance);
        const double numbers[] = {n,
                                  budget,
                                  (double)a->speculation.gamma,
                                  g.token,
                                  g.draft,
                                  g.verify,
                                  g.cycle_tokens,
                                  g.gain,
                                  (double)best,
                                  speculation_gain(&a->shape, &lookup, &rates, n, acceptance, best).gain};
        for (size_t k = 0; k < COUNT_OF(numbers); k++) table_number(&table, numbers[k]);
    }
    json_object_set_new(more, "acceptance", json_number(acceptance));
    json_object_set_new(more, "short_context_seconds", json_number(rates.batches[0].rest));
    json_object_set_new(more, "rates", rates_json(&rates.attention));
    json_object_set_new(more, "batches", batches_json(&rates));
    if (here) json_object_set_new(more, "machine", machine_json((int)measured_threads(request->n_threads)));
    json_object_set_new(more, "roofline", json_null()); /* no peak rate counts */
    print_subject(a);
    return analysis_print(a, &table, 1, more);
}
