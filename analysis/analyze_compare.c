/*
 * Prediction against measurement: a prepared context, and beginnings of it
 * prepared anew, asked at several budgets.
 *
 * A roofline from peak rates alone is a lower bound, far below what kernels
 * reach. The prediction takes what is measured beside it, and no time of a run
 * that is predicted:
 *   - everything but attention: a run on the first few tokens of the context;
 *   - attention: the rates of analyze_rates.h, of dense attention, of looking up
 *     centroids, of codes of single keys and of reading what is retained, on
 *     layers of random numbers of the model's shape.
 * Then seconds a token = those of the short run + for every layer its attention
 * over the whole context, less over the short one. How much is read follows
 * from the budget as in sqz_lookup_reads(); only the share of keys whose codes
 * are read, a matter of the text, is counted, in the tokens before the run.
 * Calibration and runs take turns, because the speed of a shared machine
 * drifts; medians count.
 */
#define _GNU_SOURCE /* mkdtemp */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "analyze.h"
#include "analyze_rates.h"
#include "common.h"
#include "inputs.h"
#include "json_output.h"
#include "llama_library.h"
#include "machine.h"
#include "memory.h"
#include "progress.h"
#include "times.h"

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

enum { SHORT_TOKENS = 32, WARM_TOKENS = 4 };
static const double usual_opened = 0.28; /* of a lower level's centroids: docs/analyze.md */

/* One length of the context, with a session. */
struct length {
    size_t n_tokens;
    struct sqz_context *context;
    struct sqz_session *session;
};

struct measured {
    struct length *length;
    double budget, read; /* aimed at: as asked, or the context's floor; what attention read */
    double coded_share;  /* keys whose codes were read, in the tokens before the run */
    struct times times;  /* a token */
};

struct compare {
    struct analysis *a;
    const struct compare_request *request;
    struct sqz_model *model;
    struct sqz_model_info info;
    struct sqz_squeeze_options squeeze;        /* of the context */
    struct length lengths[COUNT_LIST_MAX + 1]; /* the last one is the short one */
    size_t n_lengths;
    struct measured runs[COUNT_LIST_MAX * REAL_LIST_MAX];
    size_t n_runs;
    struct measured shortest; /* dense */
    struct rate_probe *probe;
    struct attention_rates rates;
};

/* ---- Contexts ----------------------------------------------------------------------------- */

/* The first n tokens of a context, prepared with its options into a file that is gone when this returns. */
static struct sqz_context *prepare_beginning(struct compare *c, const struct sqz_context_info *info, size_t n,
                                             bool dense)
{
    struct sqz_error error;
    struct sqz_prepare_options options;
    char directory[4096], file[4200];
    struct sqz_context *context = NULL;
    snprintf(directory, sizeof directory, "%s/squeeze-analyze-XXXXXX", temporary_parent());
    if (!mkdtemp(directory)) die("%s: cannot make a temporary folder", directory);
    snprintf(file, sizeof file, "%s/context.sqz.gguf", directory);
    sqz_prepare_options_default(&options);
    options.squeeze = info->squeeze;
    if (dense) options.squeeze.n_levels = 0;
    if (!c->request->quiet) fprintf(stderr, "analyze: preparing the first %zu tokens\n", n);
    enum sqz_status status = sqz_prepare_tokens(c->model, info->tokens, n, file, &options, NULL, &error);
    if (status == SQZ_OK) status = sqz_context_open(&context, file, NULL, &error);
    unlink(file);
    rmdir(directory);
    stop_on(status, &error);
    return context;
}

static void add_length(struct compare *c, struct sqz_context *context, size_t n_tokens)
{
    struct sqz_error error;
    struct length *length = &c->lengths[c->n_lengths++];
    length->context = context;
    length->n_tokens = n_tokens;
    stop_on(sqz_session_create(&length->session, c->model, context, NULL, &error), &error);
}

static void open_lengths(struct compare *c)
{
    struct sqz_context_info info;
    struct count_list wanted = c->request->lengths;
    struct sqz_context *whole = open_context(c->request->context_path, NULL);
    sqz_context_get_info(whole, &info);
    c->model = open_model(c->request->model_path, measured_threads(c->request->n_threads), (double)info.rope_scale);
    sqz_model_get_info(c->model, &c->info);
    c->squeeze = info.squeeze;
    if (info.squeeze.n_levels == 0 || info.n_tokens < 4 * SHORT_TOKENS) {
        die("%s: a context to compare with needs clusters and at least %d tokens; this one has %u levels and %zu "
            "tokens",
            c->request->context_path, 4 * SHORT_TOKENS, info.squeeze.n_levels, info.n_tokens);
    }
    for (size_t part = 4; wanted.n < 3 && part > 0 && c->request->lengths.n == 0; part /= 2)
        wanted.value[wanted.n++] = info.n_tokens / part;
    for (size_t i = 0; i < wanted.n; i++) {
        if (wanted.value[i] > info.n_tokens)
            usage_error("--lengths %zu: the context has %zu tokens", wanted.value[i], info.n_tokens);
        if (wanted.value[i] < info.n_tokens)
            add_length(c, prepare_beginning(c, &info, wanted.value[i], false), wanted.value[i]);
    }
    add_length(c, prepare_beginning(c, &info, SHORT_TOKENS, true), SHORT_TOKENS);
    struct length last = c->lengths[c->n_lengths - 1];
    c->n_lengths--;
    add_length(c, whole, info.n_tokens);
    c->lengths[c->n_lengths] = last;
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
    run->read = sqz_attention_stats_share(&stats.attention);
}

static void measure(struct compare *c)
{
    static const double defaults[] = {0.05, 0.1, 0.25, 1.0};
    const struct real_list *asked = &c->request->budgets;
    const size_t n = asked->n ? asked->n : COUNT_OF(defaults);
    c->shortest = (struct measured){.length = &c->lengths[c->n_lengths], .budget = 1.0};
    for (size_t i = 0; i < c->n_lengths * n; i++) {
        c->runs[c->n_runs++] =
            (struct measured){.length = &c->lengths[i / n], .budget = asked->n ? asked->value[i % n] : defaults[i % n]};
    }
    for (size_t repeat = 0; repeat < c->request->n_repeats; repeat++) {
        if (!c->request->quiet) fprintf(stderr, "analyze: round %zu of %zu\n", repeat + 1, c->request->n_repeats);
        for (size_t i = 0; i < c->n_runs; i++) {
            /* Beside every run: what else a machine does shows in seconds, and must show in both. */
            run_tokens(c, &c->shortest);
            rate_probe_measure(c->probe);
            run_tokens(c, &c->runs[i]);
        }
    }
    c->rates = rate_probe_fit(c->probe);
}

/* ---- Prediction --------------------------------------------------------------------------------------- */

/* The context's own lookup. */
static struct sqz_lookup_model lookup_of(const struct compare *c, const struct measured *run)
{
    const double beside = 8 * (sizeof(uint32_t) + sizeof(float)), scale = 8 * sizeof(float), d = c->a->shape.head_dim;
    struct sqz_lookup_model lookup = {.kind = SQZ_LOOKUP_SHARES,
                                      .n_levels = c->squeeze.n_levels,
                                      .budget = run->budget,
                                      .opened_share = usual_opened,
                                      .centroid_bits = c->squeeze.index == SQZ_INDEX_INT8 ? 8 + (scale + beside) / d
                                                                                          : 16 + beside / d,
                                      .code_words = c->squeeze.code_words,
                                      .coded_share = run->coded_share};
    for (uint32_t l = 0; l < lookup.n_levels; l++) lookup.centroid_share[l] = (double)c->squeeze.centroid_share[l];
    return lookup;
}

/* Seconds a token, and what they are made of. */
struct predicted {
    double seconds;
    double rest, lookup, codes, rows; /* all but attention; looking up; single keys; reading keys and values */
    double bound;                     /* from peak rates alone */
};

/* What a layer's dense attention takes more over n keys than in the short context. */
static double dense_more(const struct compare *c, double n_keys, double window)
{
    const struct sqz_model_shape *s = &c->a->shape;
    const double pair = 4.0 * s->n_head_kv * s->head_dim;
    return c->rates.dense_byte * pair * (fmin(n_keys, window) - fmin(SHORT_TOKENS, window));
}

static double bound(const struct compare *c, const struct measured *run, const struct sqz_lookup_model *lookup)
{
    struct sqz_costs costs;
    struct sqz_error error;
    struct sqz_workload work = sqz_workload_decode(1, run->length->n_tokens + WARM_TOKENS, c->request->n_generated);
    work.scores = SQZ_SCORES_ON_CHIP;
    stop_on(sqz_roofline(&costs, &c->a->shape, &c->a->bits, &work, lookup, &error), &error);
    return sqz_costs_seconds(&costs, SQZ_CLASS_AGGREGATE, &c->a->roof) / (double)c->request->n_generated;
}

static struct predicted predict(const struct compare *c, const struct measured *run)
{
    const struct sqz_model_shape *s = &c->a->shape;
    const struct attention_rates *rates = &c->rates;
    const struct sqz_lookup_model lookup = lookup_of(c, run);
    const struct sqz_bit_widths bits = {.kv = 16}; /* contexts are F16 */
    const double n_keys = (double)run->length->n_tokens, head = (double)s->n_head_kv * s->head_dim;
    const struct sqz_lookup_counts n = sqz_lookup_reads(&lookup, &bits, s->head_dim, n_keys);
    const double n_global = (double)s->n_layer - s->n_window_layer;
    struct predicted p = {.rest = times_median(&c->shortest.times), .bound = bound(c, run, &lookup)};
    p.rows = s->n_window_layer ? s->n_window_layer * dense_more(c, n_keys, s->n_window_tokens) : 0;
    if (run->budget < 1) {
        const double less = rates->dense_layer + rates->dense_byte * 4 * head * SHORT_TOKENS;
        p.lookup = n_global *
                   (fmax(0, rates->layer - less) + rates->lookup_byte * n.compared * head * lookup.centroid_bits / 8);
        p.codes = n_global * rates->coded_key * n.coded * s->n_head_kv;
        p.rows += n_global * rates->row_byte * 4 * head * n.retained;
    } else {
        p.rows += n_global * dense_more(c, n_keys, INFINITY);
    }
    p.seconds = p.rest + p.lookup + p.codes + p.rows;
    return p;
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
};

static struct errors add_rows(const struct compare *c, struct table *t)
{
    struct errors errors = {0, 0};
    for (size_t i = 0; i < c->n_runs; i++) {
        const struct measured *run = &c->runs[i];
        const struct predicted p = predict(c, run);
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
                                  p.bound,
                                  fastest};
        for (size_t k = 0; k < COUNT_OF(numbers); k++) table_number(t, numbers[k]);
        errors.mean += fabs(error) / (double)c->n_runs;
        errors.worst = fmax(errors.worst, fabs(error));
    }
    return errors;
}

static int draw(const struct compare *c)
{
    struct text_buffer script = {0};
    plot_begin(&script, c->a->plot, 640, 520);
    text_buffer_print(&script, "$runs << END\n");
    for (size_t i = 0; i < c->n_runs; i++) {
        const struct predicted p = predict(c, &c->runs[i]);
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

static json_t *compare_json(const struct compare *c, struct errors errors)
{
    const struct attention_rates *r = &c->rates;
    json_t *rates = json_object();
    const struct {
        const char *key;
        double value;
    } numbers[] = {
        {"dense_seconds_a_layer", r->dense_layer},
        {"dense_seconds_a_byte", r->dense_byte},
        {"lookup_seconds_a_layer", r->layer},
        {"lookup_seconds_a_byte", r->lookup_byte},
        {"codes_seconds_a_key", r->coded_key},
        {"rows_seconds_a_byte", r->row_byte},
        {"misfit", r->misfit},
    };
    for (size_t i = 0; i < COUNT_OF(numbers); i++)
        json_object_set_new(rates, numbers[i].key, json_number(numbers[i].value));
    return json_pack("{s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o}", "mean_absolute_error", json_number(errors.mean),
                     "worst_absolute_error", json_number(errors.worst), "short_context_seconds",
                     json_number(times_median(&c->shortest.times)), "rates", rates, "measured_tokens",
                     json_count(c->request->n_generated), "repeats", json_count(c->request->n_repeats), "machine",
                     machine_json(c->info.n_threads), "llama_version", json_text(sqz_llama_version()));
}

/* A part that did not show in the times has no rate. */
static void print_rate(const char *name, double seconds_a_byte)
{
    if (seconds_a_byte > 0) printf(", %s %.3g GB/s", name, 1e-9 / seconds_a_byte);
}

static void print_summary(const struct compare *c, struct errors errors)
{
    const struct attention_rates *r = &c->rates;
    printf("absolute error of the predicted time a token: mean %.1f%%, worst %.1f%%\n", 100 * errors.mean,
           100 * errors.worst);
    printf("attained: a token on %d tokens %.2f ms; attention: a lookup's beginning %.1f us a layer", SHORT_TOKENS,
           1e3 * times_median(&c->shortest.times), 1e6 * r->layer);
    if (c->squeeze.code_words) printf(", codes %.3g ns a key", 1e9 * r->coded_key);
    print_rate("centroids", r->lookup_byte);
    print_rate("retained rows", r->row_byte);
    print_rate("dense", r->dense_byte);
    printf("; these fit their own measurements to %.1f%%\n\n", 100 * r->misfit);
}

static void close_all(struct compare *c)
{
    for (size_t i = 0; i <= c->n_lengths; i++) {
        sqz_session_free(c->lengths[i].session);
        sqz_context_free(c->lengths[i].context);
    }
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
    c->probe = rate_probe_open(&a->shape, &c->squeeze, c->info.n_threads);
    measure(c);
    print_subject(a);
    table_begin(&table, "runs", NULL, compare_columns, COUNT_OF(compare_columns));
    const struct errors errors = add_rows(c, &table);
    if (a->format == OUTPUT_TEXT) print_summary(c, errors);
    if (a->plot) code = draw(c);
    code = analysis_print(a, &table, 1, compare_json(c, errors)) || code;
    close_all(c);
    return code;
}
