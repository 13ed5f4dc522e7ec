/*
 * Prediction against measurement: a prepared context, and beginnings of it
 * prepared anew, asked at several budgets.
 *
 * A roofline from peak rates alone is a lower bound, far below what kernels
 * reach. The prediction (analyze_predict.h) takes what is measured beside it, and no
 * time of a run that is predicted:
 *   - everything but attention: a run on the first few tokens of the context;
 *   - on the CPU, rates of attention on layers of random numbers of the model's
 *     shape (analyze_rates.h);
 *   - on a card, whole tokens on contexts of other lengths, of the same tokens in
 *     random order: what stands between two launches, in which caches rows are, and
 *     which kernels the engine takes is then as in a run.
 * How much is read follows from the budget as in sqz_lookup_reads(); only the share
 * of keys whose codes are read, a matter of the text, is counted, in the tokens
 * before the run. Calibration and runs take turns, because the speed of a shared
 * machine drifts; medians count.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "analyze.h"
#include "analyze_predict.h"
#include "answer.h"
#include "common.h"
#include "inputs.h"
#include "json_output.h"
#include "llama_library.h"
#include "machine.h"
#include "memory.h"
#include "progress.h"
#include "random.h"
#include "rates_file.h"
#include "times.h"

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

enum { WARM_TOKENS = 4, N_PROBES = 3 };
static const double budgets[] = {0.05, 0.1, 0.25, 1.0};
/* On a card: lengths of what rates come from, as shares of the context, none of them of what is measured by default;
 * budgets of these. */
static const double probe_shares[N_PROBES] = {0.125, 0.375, 0.75};
static const double probe_budgets[] = {0.06, 0.12, 0.2, 0.35, 1.0};

enum { N_BUDGETS = COUNT_OF(budgets), N_PROBE_BUDGETS = COUNT_OF(probe_budgets) };

/* One length of the context, with a session. */
struct length {
    size_t n_tokens;
    struct sqz_context *context;
    struct sqz_session *session;
};

struct measured {
    const struct length *length;
    double budget, read;              /* aimed at: as asked, or the context's floor; what attention read */
    double coded_share;               /* keys whose codes were read, in the tokens before the run */
    struct sqz_attention_stats stats; /* of a run's tokens */
    struct times times;               /* a token */
};

struct compare {
    struct analysis *a;
    const struct compare_request *request;
    struct sqz_model *model;
    struct sqz_model_info info;
    struct sqz_squeeze_options squeeze; /* of the context */
    struct length shortest, lengths[COUNT_LIST_MAX + 1], probes[N_PROBES];
    size_t n_lengths;
    struct measured short_run, runs[(COUNT_LIST_MAX + 1) * REAL_LIST_MAX];
    size_t n_runs;
    /* Where rates come from: */
    struct rate_probe *probe;                               /* on the CPU */
    bool on_card;                                           /* else: */
    struct measured probe_runs[N_PROBES * N_PROBE_BUDGETS]; /* whole tokens */
    struct attention_rates rates;
};

/* ---- Contexts ----------------------------------------------------------------------------- */

/* n tokens, prepared with the context's options, or `dense`. */
static struct sqz_context *prepare_tokens(struct compare *c, const int32_t *tokens, size_t n, bool dense)
{
    struct sqz_squeeze_options squeeze = c->squeeze;
    if (dense) squeeze.n_levels = 0;
    return analysis_context(c->model, &squeeze, tokens, n);
}

static void open_length(struct compare *c, struct length *length, struct sqz_context *context, size_t n_tokens)
{
    struct sqz_error error;
    length->context = context;
    length->n_tokens = n_tokens;
    stop_on(sqz_session_create(&length->session, c->model, context, NULL, &error), &error);
}

static void open_beginning(struct compare *c, struct length *length, const int32_t *tokens, size_t n, bool dense)
{
    if (!c->request->quiet) fprintf(stderr, "analyze: preparing the first %zu tokens\n", n);
    open_length(c, length, prepare_tokens(c, tokens, n, dense), n);
}

/* Contexts of the context's own tokens, drawn at random behind its first one. */
static void open_probes(struct compare *c, const struct sqz_context_info *info)
{
    struct sqz_random random;
    int32_t *tokens = allocate(info->n_tokens, sizeof *tokens);
    sqz_random_seed(&random, 1);
    for (size_t i = 0; i < info->n_tokens; i++)
        tokens[i] = info->tokens[i ? sqz_random_below(&random, info->n_tokens) : 0];
    for (size_t i = 0; i < N_PROBES; i++) {
        const size_t n = (size_t)(probe_shares[i] * (double)info->n_tokens);
        if (!c->request->quiet) fprintf(stderr, "analyze: preparing %zu tokens in random order\n", n);
        open_length(c, &c->probes[i], prepare_tokens(c, tokens, n, false), n);
    }
    free(tokens);
    struct sqz_context_info longest;
    sqz_context_get_info(c->probes[N_PROBES - 1].context, &longest);
    if (longest.budget_floor >= 1 && info->budget_floor < 1) {
        die("%s: of %zu of its %zu tokens everything is read at any budget, so that nothing tells what choosing takes "
            "on "
            "a card; take a longer context, or the CPU (-ngl 0)",
            c->request->context_path, longest.n_tokens, info->n_tokens);
    }
}

/* The context, and what is measured of it: a half and a quarter where nothing was asked for. */
static struct sqz_context *open_whole(struct compare *c, struct sqz_context_info *info, struct count_list *wanted)
{
    struct sqz_context *whole = open_context(c->request->context_path, NULL);
    sqz_context_get_info(whole, info);
    c->squeeze = info->squeeze;
    *wanted = c->request->lengths;
    if (info->squeeze.n_levels == 0 || info->n_tokens < 4 * SHORT_TOKENS) {
        die("%s: a context to compare with needs clusters and at least %d tokens; this one has %u levels and %zu "
            "tokens",
            c->request->context_path, 4 * SHORT_TOKENS, info->squeeze.n_levels, info->n_tokens);
    }
    for (size_t part = 4; c->request->lengths.n == 0 && part > 1; part /= 2)
        wanted->value[wanted->n++] = info->n_tokens / part;
    for (size_t i = 0; i < wanted->n; i++)
        if (wanted->value[i] > info->n_tokens)
            usage_error("--lengths %zu: the context has %zu tokens", wanted->value[i], info->n_tokens);
    return whole;
}

static void open_lengths(struct compare *c)
{
    const struct compare_request *request = c->request;
    struct sqz_context_info info;
    struct count_list wanted;
    struct sqz_context *whole = open_whole(c, &info, &wanted);
    c->model = open_model_on(request->model_path, measured_threads(request->n_threads), (double)info.rope_scale,
                             &request->gpu);
    sqz_model_get_info(c->model, &c->info);
    c->on_card = c->info.n_gpu_layers > 0;
    if (request->here && c->on_card) machine_choose_card(c->a, request->precision);
    else if (request->here) machine_choose(c->a, NULL, "here", request->precision, request->n_threads);
    for (size_t i = 0; i < wanted.n; i++)
        if (wanted.value[i] < info.n_tokens)
            open_beginning(c, &c->lengths[c->n_lengths++], info.tokens, wanted.value[i], false);
    open_beginning(c, &c->shortest, info.tokens, SHORT_TOKENS, true);
    open_length(c, &c->lengths[c->n_lengths++], whole, info.n_tokens);
    say_fallback(c->lengths[c->n_lengths - 1].session, "");
    if (c->on_card) open_probes(c, &info);
    else c->probe = rate_probe_open(&c->a->shape, &c->squeeze, c->info.n_threads);
}

/* ---- Runs ------------------------------------------------------------------------------------------ */

static double coded_share(const struct sqz_attention_stats *stats)
{
    return stats->total_keys ? (double)stats->coded_keys / (double)stats->total_keys : 0;
}

/* Adds the seconds a token; the tokens are the context's own first ones, whose text does not matter. */
static void run_tokens(struct compare *c, struct measured *run)
{
    const struct length *length = run->length;
    struct sqz_error error;
    struct sqz_context_info info;
    struct sqz_session_stats stats;
    sqz_session_reset(length->session);
    stop_on(sqz_session_set_budget(length->session, (float)run->budget, &error), &error);
    sqz_context_get_info(length->context, &info);
    for (size_t i = 0; i < WARM_TOKENS; i++)
        stop_on(sqz_session_run(length->session, &info.tokens[i % info.n_tokens], 1, &error), &error);
    sqz_session_get_stats(length->session, &stats);
    if (stats.budget > stats.budget_asked) run->budget = (double)stats.budget;
    run->coded_share = coded_share(&stats.attention);
    sqz_session_clear_stats(length->session);
    const double since = now_seconds();
    for (size_t i = 0; i < c->request->n_generated; i++)
        stop_on(sqz_session_run(length->session, &info.tokens[(WARM_TOKENS + i) % info.n_tokens], 1, &error), &error);
    times_add(&run->times, (now_seconds() - since) / (double)c->request->n_generated);
    sqz_session_get_stats(length->session, &stats);
    run->stats = stats.attention;
    run->read = sqz_attention_stats_share(&stats.attention);
}

/* Whole tokens, from which a card's rates come. */
static void run_probes(struct compare *c)
{
    for (size_t i = 0; i < COUNT_OF(c->probe_runs) && c->on_card; i++) {
        struct measured *run = &c->probe_runs[i];
        run->length = &c->probes[i / N_PROBE_BUDGETS];
        run->budget = probe_budgets[i % N_PROBE_BUDGETS];
        run_tokens(c, run);
    }
}

static void measure(struct compare *c)
{
    const struct real_list *asked = &c->request->budgets;
    const size_t n = asked->n ? asked->n : N_BUDGETS;
    c->short_run = (struct measured){.length = &c->shortest, .budget = 1.0};
    for (size_t i = 0; i < c->n_lengths * n; i++) {
        c->runs[c->n_runs++] =
            (struct measured){.length = &c->lengths[i / n], .budget = asked->n ? asked->value[i % n] : budgets[i % n]};
    }
    for (size_t repeat = 0; repeat < c->request->n_repeats; repeat++) {
        if (!c->request->quiet) fprintf(stderr, "analyze: round %zu of %zu\n", repeat + 1, c->request->n_repeats);
        run_probes(c);
        for (size_t i = 0; i < c->n_runs; i++) {
            /* Beside every run: what else a machine does shows in seconds, and must show in both. */
            run_tokens(c, &c->short_run);
            if (c->probe) rate_probe_measure(c->probe);
            run_tokens(c, &c->runs[i]);
        }
    }
}

/* ---- Prediction --------------------------------------------------------------------------------------- */

static struct sqz_lookup_model lookup_of(const struct compare *c, const struct measured *run)
{
    return context_lookup(&c->a->shape, &c->squeeze, run->budget, run->coded_share);
}

/* From peak rates alone. */
static double bound(const struct compare *c, const struct measured *run)
{
    struct sqz_costs costs;
    struct sqz_error error;
    const struct sqz_lookup_model lookup = lookup_of(c, run);
    struct sqz_workload work = sqz_workload_decode(1, run->length->n_tokens + WARM_TOKENS, c->request->n_generated);
    work.scores = SQZ_SCORES_ON_CHIP;
    stop_on(sqz_roofline(&costs, &c->a->shape, &c->a->bits, &work, &lookup, &error), &error);
    return sqz_costs_seconds(&costs, SQZ_CLASS_AGGREGATE, &c->a->roof) / (double)c->request->n_generated;
}

static double rest_seconds(const struct compare *c)
{
    return times_median(&c->short_run.times);
}

static struct predicted predict_run(const struct compare *c, const struct measured *run)
{
    const struct sqz_lookup_model lookup = lookup_of(c, run);
    const struct attention_work work = expected_work(&c->a->shape, &lookup, (double)run->length->n_tokens);
    return predict(&work, &c->rates, rest_seconds(c));
}

/* What a card's rates come from. */
static struct timed_work timed_probe(const struct compare *c, const struct measured *run)
{
    const struct sqz_lookup_model lookup = lookup_of(c, run);
    return (struct timed_work){counted_work(&c->a->shape, &lookup, (double)run->length->n_tokens, &run->stats,
                                            (double)c->request->n_generated),
                               times_median(&run->times)};
}

static struct attention_rates fit(const struct compare *c)
{
    struct timed_work timed[COUNT_OF(c->probe_runs)];
    if (c->probe) return rate_probe_fit(c->probe);
    for (size_t i = 0; i < COUNT_OF(timed); i++) timed[i] = timed_probe(c, &c->probe_runs[i]);
    return fit_tokens(timed, COUNT_OF(timed), rest_seconds(c));
}

static const struct table_column compare_columns[] = {
    {"tokens", "tokens", 1, 10},
    {"budget", "budget", 1, 3},
    {"budget_read", "read", 1, 4},
    {"measured_seconds", "measured ms", 1e3, 4},
    {"predicted_seconds", "predicted ms", 1e3, 4},
    {"error", "error %", 100, 3},
    {"rest_seconds", "all else ms", 1e3, 3},
    {"lookup_seconds", "lookup ms", 1e3, 3},
    {"codes_seconds", "codes ms", 1e3, 3},
    {"rows_seconds", "rows ms", 1e3, 3},
    {"coded_share", "by code", 1, 3},
    {"bound_seconds", "roofline ms", 1e3, 4},
    {"fastest_seconds", NULL, 1, 4},
};

struct errors {
    double mean, worst; /* absolute, relative to what was measured */
    double attention;   /* the same of what all runs together take more than the short one; NAN: nothing */
};

static struct errors add_rows(const struct compare *c, struct table *t)
{
    struct errors errors = {0, 0, 0};
    double more = 0;
    for (size_t i = 0; i < c->n_runs; i++) {
        const struct measured *run = &c->runs[i];
        const struct predicted p = predict_run(c, run);
        const double seconds = times_median(&run->times), error = p.seconds / seconds - 1;
        double fastest = INFINITY;
        for (size_t k = 0; k < run->times.n; k++) fastest = fmin(fastest, run->times.seconds[k]);
        const double numbers[] = {(double)run->length->n_tokens,
                                  run->budget,
                                  run->read,
                                  seconds,
                                  p.seconds,
                                  error,
                                  p.rest,
                                  p.lookup,
                                  p.codes,
                                  p.rows,
                                  run->coded_share,
                                  bound(c, run),
                                  fastest};
        for (size_t k = 0; k < COUNT_OF(numbers); k++) table_number(t, numbers[k]);
        errors.mean += fabs(error) / (double)c->n_runs;
        errors.worst = fmax(errors.worst, fabs(error));
        errors.attention += fabs(p.seconds - seconds);
        more += seconds - p.rest;
    }
    errors.attention = more > 0 ? errors.attention / more : NAN;
    return errors;
}

static int draw(const struct compare *c)
{
    struct text_buffer script = {0};
    plot_begin(&script, c->a->plot, 640, 520);
    text_buffer_print(&script, "$runs << END\n");
    for (size_t i = 0; i < c->n_runs; i++) {
        const struct predicted p = predict_run(c, &c->runs[i]);
        text_buffer_print(&script, "%.9g %.9g\n", 1e3 * p.seconds, 1e3 * times_median(&c->runs[i].times));
    }
    text_buffer_print(&script,
                      "END\nset xlabel 'predicted ms a token'\nset ylabel 'measured ms a token'\n"
                      "set xrange [0:*]\nset yrange [0:*]\nset key left top\n"
                      "plot x with lines lc rgb 'black' title 'equal', 1.2 * x with lines dt 2 lc rgb '#999999' "
                      "title '20%%', 0.8 * x with lines dt 2 lc rgb '#999999' notitle, $runs using 1:2 with "
                      "points pt 7 lc rgb '#b40426' title 'contexts and budgets'\n");
    return plot_finish(&script, c->a->plot);
}

/* What a card's rates were fitted to; null on the CPU. */
static json_t *calibration_json(const struct compare *c)
{
    json_t *runs = c->on_card ? json_array() : json_null();
    for (size_t i = 0; i < COUNT_OF(c->probe_runs) && c->on_card; i++) {
        const struct measured *run = &c->probe_runs[i];
        const struct timed_work timed = timed_probe(c, run);
        json_array_append_new(runs, json_pack("{s:o,s:o,s:o,s:o,s:o,s:o}", "tokens", json_count(run->length->n_tokens),
                                              "budget", json_number(run->budget), "budget_read", json_number(run->read),
                                              "coded_share", json_number(run->coded_share), "measured_seconds",
                                              json_number(timed.seconds), "fitted_seconds",
                                              json_number(predict(&timed.work, &c->rates, rest_seconds(c)).seconds)));
    }
    return runs;
}

static json_t *compare_json(const struct compare *c, struct errors errors)
{
    json_t *more = json_object();
    json_object_set_new(more, "mean_absolute_error", json_number(errors.mean));
    json_object_set_new(more, "worst_absolute_error", json_number(errors.worst));
    json_object_set_new(more, "attention_error", json_number(errors.attention));
    json_object_set_new(more, "short_context_seconds", json_number(rest_seconds(c)));
    json_object_set_new(more, "rates", rates_json(&c->rates));
    json_object_set_new(more, "gpu_layers", json_count(c->info.n_gpu_layers));
    json_object_set_new(more, "calibration", calibration_json(c));
    json_object_set_new(more, "measured_tokens", json_count(c->request->n_generated));
    json_object_set_new(more, "repeats", json_count(c->request->n_repeats));
    json_object_set_new(more, "machine", machine_json(c->info.n_threads));
    json_object_set_new(more, "llama_version", json_text(sqz_llama_version()));
    return more;
}

/* A part that did not show in the times has no rate. */
static void print_rate(const char *name, double seconds_a_byte)
{
    if (seconds_a_byte > 0) printf(", %s %.3g GB/s", name, 1e-9 / seconds_a_byte);
}

static void print_summary(const struct compare *c, struct errors errors)
{
    const struct attention_rates *r = &c->rates;
    printf("absolute error of the predicted time a token: mean %.1f%%, worst %.1f%%", 100 * errors.mean,
           100 * errors.worst);
    if (errors.attention < INFINITY)
        printf("; of what it is beyond %d tokens %.1f%%", SHORT_TOKENS, 100 * errors.attention);
    if (c->on_card) {
        printf("\n%u layers on a card; rates are those of tokens on %zu, %zu and %zu tokens in random order",
               c->info.n_gpu_layers, c->probes[0].n_tokens, c->probes[1].n_tokens, c->probes[2].n_tokens);
    }
    printf("\nattained: a token on %d tokens %.2f ms; attention: a lookup's beginning %.1f us a layer", SHORT_TOKENS,
           1e3 * rest_seconds(c), 1e6 * r->layer);
    if (c->squeeze.code_words) printf(", codes %.3g ns a key", 1e9 * r->coded_key);
    print_rate("centroids", r->lookup_byte);
    print_rate("retained rows", r->row_byte);
    print_rate("dense", r->dense_byte);
    printf("; these fit their own measurements to %.1f%%\n\n", 100 * r->misfit);
}

static void close_length(struct length *length)
{
    sqz_session_free(length->session);
    sqz_context_free(length->context);
}

static void close_all(struct compare *c)
{
    for (size_t i = 0; i < c->n_lengths; i++) close_length(&c->lengths[i]);
    for (size_t i = 0; i < N_PROBES; i++) close_length(&c->probes[i]);
    close_length(&c->shortest);
    rate_probe_close(c->probe);
    sqz_model_free(c->model);
    free(c);
}

int view_compare(struct analysis *a, const struct compare_request *request)
{
    struct table table;
    struct compare *c = allocate(1, sizeof *c);
    int code = 0;
    c->a = a;
    c->request = request;
    catch_signals();
    open_lengths(c);
    measure(c);
    c->rates = fit(c);
    print_subject(a);
    table_begin(&table, "runs", NULL, compare_columns, COUNT_OF(compare_columns));
    const struct errors errors = add_rows(c, &table);
    if (a->format == OUTPUT_TEXT) print_summary(c, errors);
    if (a->plot) code = draw(c);
    code = analysis_print(a, &table, 1, compare_json(c, errors)) || code;
    close_all(c);
    return code;
}
