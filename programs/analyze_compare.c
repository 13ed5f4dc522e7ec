/*
 * Prediction against measurement: a prepared context, and beginnings of it
 * prepared anew, asked at several budgets.
 *
 * A roofline from peak rates alone is a lower bound, far below what kernels
 * reach. The prediction takes three attained rates that are measured beside it,
 * none of them in a run that is predicted:
 *   - products with weights: bytes of weights a second in a run on the first
 *     few tokens of the context, where attention is nothing;
 *   - dense and squeezed attention: bytes of keys, values and centroids a second
 *     on layers of random numbers of the model's shape, larger together than
 *     the caches.
 * Then seconds a token = weights / first rate + KV bytes / second or third, the
 * bytes those of sqz_roofline(). Calibration and runs take turns, because the
 * speed of a shared machine drifts; medians count.
 */
#define _GNU_SOURCE /* mkdtemp */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "analyze.h"
#include "baseline.h"
#include "common.h"
#include "inputs.h"
#include "json_output.h"
#include "machine.h"
#include "progress.h"

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

enum { MAX_REPEATS = 512, SHORT_TOKENS = 32, RATE_ROWS = 4096, RATE_LAYERS_MAX = 64, WARM_TOKENS = 4 };
static const double rate_bytes = 128e6; /* of all layers of random numbers: above usual caches */

struct times {
    double seconds[MAX_REPEATS];
    size_t n;
};

/* One length of the context, with a session. */
struct length {
    size_t n_tokens;
    struct sqz_context *context;
    struct sqz_session *session;
};

struct measured {
    struct length *length;
    double budget, read; /* asked; what attention read */
    struct times times;  /* a token */
};

enum rate { RATE_DENSE, RATE_SQUEEZED, N_RATES };

struct compare {
    struct analysis *a;
    const struct compare_request *request;
    struct sqz_model *model;
    struct sqz_model_info info;
    struct length lengths[COUNT_LIST_MAX + 1]; /* the last one is the short one */
    size_t n_lengths;
    struct measured runs[COUNT_LIST_MAX * REAL_LIST_MAX];
    size_t n_runs;
    struct times weights;           /* a token of the short context */
    struct sqz_layer *layers[N_RATES][RATE_LAYERS_MAX];
    size_t n_layers;
    float *query, *out;
    struct times rates[N_RATES];    /* seconds a byte */
};

static int compare_doubles(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(struct times times)
{
    qsort(times.seconds, times.n, sizeof *times.seconds, compare_doubles);
    return times.n ? times.seconds[times.n / 2] : NAN;
}

static void add_time(struct times *times, double seconds)
{
    if (times->n < MAX_REPEATS) {
        times->seconds[times->n++] = seconds;
    }
}

/* ---- Contexts ----------------------------------------------------------------------------- */

/* The first n tokens of a context, prepared with its options into a file that is gone when this returns. */
static struct sqz_context *prepare_beginning(struct compare *c, const struct sqz_context_info *info, size_t n,
                                             bool dense)
{
    struct sqz_error error;
    struct sqz_prepare_options options;
    const char *folder = getenv("TMPDIR");
    char directory[4096], file[4200];
    struct sqz_context *context = NULL;
    snprintf(directory, sizeof directory, "%s/squeeze-analyze-XXXXXX", folder && *folder ? folder : "/tmp");
    if (!mkdtemp(directory)) {
        die("%s: cannot make a temporary folder", directory);
    }
    snprintf(file, sizeof file, "%s/context.sqz.gguf", directory);
    sqz_prepare_options_default(&options);
    options.squeeze = info->squeeze;
    if (dense) {
        options.squeeze.n_levels = 0;
    }
    if (!c->request->quiet) {
        fprintf(stderr, "analyze: preparing the first %zu tokens\n", n);
    }
    enum sqz_status status = sqz_prepare_tokens(c->model, info->tokens, n, file, &options, NULL, &error);
    if (status == SQZ_OK) {
        status = sqz_context_open(&context, file, NULL, &error);
    }
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
    c->model = open_model(c->request->model_path, c->request->n_threads, (double)info.rope_scale);
    sqz_model_get_info(c->model, &c->info);
    if (info.squeeze.n_levels == 0 || info.n_tokens < 4 * SHORT_TOKENS) {
        die("%s: a context to compare with needs clusters and at least %d tokens; this one has %u levels and %zu tokens",
            c->request->context_path, 4 * SHORT_TOKENS, info.squeeze.n_levels, info.n_tokens);
    }
    for (size_t part = 4; wanted.n < 3 && part > 0 && c->request->lengths.n == 0; part /= 2) {
        wanted.value[wanted.n++] = info.n_tokens / part;
    }
    for (size_t i = 0; i < wanted.n; i++) {
        if (wanted.value[i] > info.n_tokens) {
            usage_error("--lengths %zu: the context has %zu tokens", wanted.value[i], info.n_tokens);
        }
        if (wanted.value[i] < info.n_tokens) {
            add_length(c, prepare_beginning(c, &info, wanted.value[i], false), wanted.value[i]);
        }
    }
    add_length(c, prepare_beginning(c, &info, SHORT_TOKENS, true), SHORT_TOKENS);
    struct length last = c->lengths[c->n_lengths - 1];
    c->n_lengths--;
    add_length(c, whole, info.n_tokens);
    c->lengths[c->n_lengths] = last;
}

/* ---- Attained rates of attention ---------------------------------------------------------------- */

static double random_number(uint64_t *state) /* (-1, 1), splitmix64 */
{
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return (double)(int64_t)(z ^ z >> 31) * 0x1p-63;
}

/* An F16 in (-2, 2): sign, exponents 11 to 15, mantissa. */
static uint16_t random_half(uint64_t *state)
{
    const uint64_t bits = (uint64_t)(fabs(random_number(state)) * 0x1p40);
    return (uint16_t)((bits & 0x83ff) | ((11 + bits / 0x10000 % 5) << 10));
}

static void make_layers(struct compare *c)
{
    struct sqz_error error;
    struct sqz_squeeze_options options;
    const struct sqz_model_shape *s = &c->a->shape;
    const struct sqz_layer_shape shape = {s->n_head, s->n_head_kv, s->head_dim, (float)(1 / sqrt((double)s->head_dim))};
    const size_t n = (size_t)s->n_head_kv * RATE_ROWS * s->head_dim, width = (size_t)s->n_head * s->head_dim;
    const size_t n_queries = 64;
    uint64_t state = 1;
    uint16_t *rows = malloc(2 * n * sizeof *rows);
    c->query = malloc(n_queries * width * sizeof *c->query);
    c->out = malloc(width * sizeof *c->out);
    if (!rows || !c->query || !c->out) {
        die("out of memory");
    }
    c->n_layers = (size_t)fmin(RATE_LAYERS_MAX, ceil(rate_bytes / (4.0 * (double)n)));
    for (size_t i = 0; i < n_queries * width; i++) {
        c->query[i] = (float)(4 * random_number(&state));
    }
    for (size_t l = 0; l < c->n_layers; l++) {
        for (size_t i = 0; i < 2 * n; i++) {
            rows[i] = random_half(&state);
        }
        for (int rate = 0; rate < N_RATES; rate++) {
            sqz_squeeze_options_default(&options, SQZ_RULE_DEFAULT);
            options.n_levels = rate == RATE_DENSE ? 0 : 1;
            stop_on(sqz_layer_create(&c->layers[rate][l], &shape, rows, rows + n, RATE_ROWS, c->query, n_queries,
                                     &options, c->info.n_threads, &error), &error);
        }
    }
    free(rows);
}

static void time_rate(struct compare *c, enum rate rate)
{
    struct sqz_error error;
    struct sqz_attention_stats stats = {0};
    const double since = now_seconds();
    for (size_t l = 0; l < c->n_layers; l++) {
        stop_on(sqz_layer_attend(c->layers[rate][l], c->query, 1, rate == RATE_DENSE ? 1.0f : 0.1f, c->out, NULL,
                                 c->info.n_threads, &stats, &error), &error);
    }
    const double bytes = (double)(stats.centroid_bytes + stats.key_bytes + stats.value_bytes);
    add_time(&c->rates[rate], (now_seconds() - since) / bytes);
}

/* ---- Runs ------------------------------------------------------------------------------------------ */

/* Seconds a token; the tokens are the context's own first ones, whose text does not matter. */
static double run_tokens(struct compare *c, struct length *length, double budget, double *read)
{
    struct sqz_error error;
    struct sqz_context_info info;
    struct sqz_session_stats stats;
    sqz_session_reset(length->session);
    stop_on(sqz_session_set_budget(length->session, (float)budget, &error), &error);
    sqz_context_get_info(length->context, &info);
    for (size_t i = 0; i < WARM_TOKENS; i++) {
        stop_on(sqz_session_run(length->session, &info.tokens[i % info.n_tokens], 1, &error), &error);
    }
    sqz_session_clear_stats(length->session);
    const double since = now_seconds();
    for (size_t i = 0; i < c->request->n_generated; i++) {
        stop_on(sqz_session_run(length->session, &info.tokens[(WARM_TOKENS + i) % info.n_tokens], 1, &error), &error);
    }
    const double seconds = (now_seconds() - since) / (double)c->request->n_generated;
    sqz_session_get_stats(length->session, &stats);
    *read = sqz_attention_stats_share(&stats.attention);
    return seconds;
}

static void measure(struct compare *c)
{
    double ignored;
    static const double defaults[] = {0.05, 0.1, 0.25, 1.0};
    const struct real_list *asked = &c->request->budgets;
    const size_t n = asked->n ? asked->n : COUNT_OF(defaults);
    for (size_t i = 0; i < c->n_lengths * n; i++) {
        c->runs[c->n_runs++] = (struct measured){.length = &c->lengths[i / n],
                                                 .budget = asked->n ? asked->value[i % n] : defaults[i % n]};
    }
    for (size_t repeat = 0; repeat < c->request->n_repeats; repeat++) {
        if (!c->request->quiet) {
            fprintf(stderr, "analyze: round %zu of %zu\n", repeat + 1, c->request->n_repeats);
        }
        for (size_t i = 0; i < c->n_runs; i++) {
            /* Beside every run: what else a machine does shows in seconds, and must show in both. */
            add_time(&c->weights, run_tokens(c, &c->lengths[c->n_lengths], 1.0, &ignored));
            time_rate(c, RATE_DENSE);
            time_rate(c, RATE_SQUEEZED);
            add_time(&c->runs[i].times, run_tokens(c, c->runs[i].length, c->runs[i].budget, &c->runs[i].read));
        }
    }
}

/* ---- Prediction --------------------------------------------------------------------------------------- */

static struct sqz_costs costs_at(const struct compare *c, size_t n_tokens, double budget)
{
    struct sqz_costs costs;
    struct sqz_error error;
    const struct sqz_lookup_model lookup = {.kind = SQZ_LOOKUP_SHARES, .n_levels = 1, .centroid_share = {1e-6},
                                            .budget = budget, .opened_share = 0};
    struct sqz_workload work = sqz_workload_decode(1, n_tokens + WARM_TOKENS, c->request->n_generated);
    work.scores = SQZ_SCORES_ON_CHIP;
    stop_on(sqz_roofline(&costs, &c->a->shape, &c->a->bits, &work, &lookup, &error), &error);
    return costs;
}

struct predicted {
    double calibrated, bound; /* seconds a token */
};

static struct predicted predict(const struct compare *c, size_t n_tokens, double budget)
{
    const double n = (double)c->request->n_generated;
    const struct sqz_costs costs = costs_at(c, n_tokens, budget), shortest = costs_at(c, SHORT_TOKENS, 1.0);
    const struct sqz_op_cost attention = sqz_costs_sum(&costs, SQZ_CLASS_ATTENTION);
    const struct sqz_op_cost little = sqz_costs_sum(&shortest, SQZ_CLASS_ATTENTION);
    const double rate = median(c->rates[budget < 1 ? RATE_SQUEEZED : RATE_DENSE]);
    return (struct predicted){
        .calibrated = median(c->weights) + (attention.kv_bytes * rate - little.kv_bytes * median(c->rates[RATE_DENSE])) / n,
        .bound = sqz_costs_seconds(&costs, SQZ_CLASS_AGGREGATE, &c->a->roof) / n,
    };
}

static const struct table_column compare_columns[] = {
    {"tokens", "tokens", 1, 10},
    {"budget", "budget", 1, 3},
    {"budget_read", "read", 1, 3},
    {"measured_seconds", "measured ms", 1e3, 4},
    {"predicted_seconds", "predicted ms", 1e3, 4},
    {"error", "error %", 100, 3},
    {"bound_seconds", "roofline ms", 1e3, 4},
    {"fastest_seconds", NULL, 1, 4},
};

static double add_rows(const struct compare *c, struct table *t)
{
    double sum = 0.0;
    for (size_t i = 0; i < c->n_runs; i++) {
        const struct measured *run = &c->runs[i];
        const struct predicted p = predict(c, run->length->n_tokens, run->budget);
        const double seconds = median(run->times);
        double fastest = INFINITY;
        for (size_t k = 0; k < run->times.n; k++) {
            fastest = fmin(fastest, run->times.seconds[k]);
        }
        table_number(t, (double)run->length->n_tokens);
        table_number(t, run->budget);
        table_number(t, run->read);
        table_number(t, seconds);
        table_number(t, p.calibrated);
        table_number(t, p.calibrated / seconds - 1);
        table_number(t, p.bound);
        table_number(t, fastest);
        sum += fabs(p.calibrated / seconds - 1);
    }
    return sum / (double)c->n_runs;
}

static int draw(const struct compare *c)
{
    struct text_buffer script = {0};
    plot_begin(&script, c->a->plot, 640, 520);
    text_buffer_print(&script, "$runs << END\n");
    for (size_t i = 0; i < c->n_runs; i++) {
        const struct predicted p = predict(c, c->runs[i].length->n_tokens, c->runs[i].budget);
        text_buffer_print(&script, "%.9g %.9g\n", 1e3 * p.calibrated, 1e3 * median(c->runs[i].times));
    }
    text_buffer_print(&script, "END\nset xlabel 'predicted ms a token'\nset ylabel 'measured ms a token'\n"
                               "set xrange [0:*]\nset yrange [0:*]\nset key left top\n"
                               "plot x with lines lc rgb 'black' title 'equal', 1.2 * x with lines dt 2 lc rgb '#999999' "
                               "title '20%%', 0.8 * x with lines dt 2 lc rgb '#999999' notitle, $runs using 1:2 with "
                               "points pt 7 lc rgb '#b40426' title 'contexts and budgets'\n");
    return plot_finish(&script, c->a->plot);
}

static json_t *compare_json(const struct compare *c, double error)
{
    return json_pack("{s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o}", "mean_absolute_error", json_number(error),
                     "short_context_seconds", json_number(median(c->weights)), "dense_attention_gb_s",
                     json_number(1e-9 / median(c->rates[RATE_DENSE])), "squeezed_attention_gb_s",
                     json_number(1e-9 / median(c->rates[RATE_SQUEEZED])), "measured_tokens",
                     json_count(c->request->n_generated), "repeats", json_count(c->request->n_repeats), "machine",
                     machine_json(c->info.n_threads), "llama_version", json_text(sqz_llama_version()));
}

static void close_all(struct compare *c)
{
    for (size_t i = 0; i <= c->n_lengths; i++) {
        sqz_session_free(c->lengths[i].session);
        sqz_context_free(c->lengths[i].context);
    }
    for (size_t l = 0; l < c->n_layers; l++) {
        sqz_layer_free(c->layers[RATE_DENSE][l]);
        sqz_layer_free(c->layers[RATE_SQUEEZED][l]);
    }
    sqz_model_free(c->model);
    free(c->query);
    free(c->out);
    free(c);
}

int view_compare(struct analysis *a, const struct compare_request *request)
{
    struct table table;
    struct compare *c = calloc(1, sizeof *c);
    int code = 0;
    if (!c) {
        die("out of memory");
    }
    c->a = a;
    c->request = request;
    catch_signals();
    open_lengths(c);
    make_layers(c);
    measure(c);
    print_subject(a);
    table_begin(&table, "runs", NULL, compare_columns, COUNT_OF(compare_columns));
    const double error = add_rows(c, &table);
    if (a->format == OUTPUT_TEXT) {
        printf("mean absolute error of the predicted time a token: %.1f%%; attained by attention: dense %.1f GB/s, "
               "squeezed %.1f GB/s; a token on %d tokens: %.2f ms\n\n", 100 * error,
               1e-9 / median(c->rates[RATE_DENSE]), 1e-9 / median(c->rates[RATE_SQUEEZED]), SHORT_TOKENS,
               1e3 * median(c->weights));
    }
    if (a->plot) {
        code = draw(c);
    }
    code = analysis_print(a, &table, 1, compare_json(c, error)) || code;
    close_all(c);
    return code;
}
