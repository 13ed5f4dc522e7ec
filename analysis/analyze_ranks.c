/*
 * A token over several ranks, by measured rates (ranks_step.h): an H200's, those of a file, or this machine's, measured with
 * the model. Under mpirun messages between the ranks are measured, too; no token of a context that lies in several places is
 * run.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "analyze.h"
#include "analyze_predict.h"
#include "common.h"
#include "json_output.h"
#include "machine.h"
#include "many_ranks.h"
#include "memory.h"
#include "ranks_step.h"
#include "rates_file.h"
#include "session.h"
#include "signals.h"
#include "times.h"

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

enum { RUNS_A_ROUND = 12, MOST_RANKS = 1024 };

/* ---- The machine ---------------------------------------------------------------------------- */

static void measure(const struct analysis *a, const struct speculation_request *request,
                    const struct sqz_squeeze_options *squeeze, struct ranks_machine *machine)
{
    struct short_run run;
    struct sqz_model_info info;
    struct sqz_error error;
    struct ranks_trial trial;
    struct times rest = {0};
    catch_signals();
    short_run_open(&run, request->model_path, request->n_threads, squeeze);
    sqz_model_get_info(run.model, &info);
    struct rate_probe *probe = rate_probe_open(&a->shape, squeeze, info.n_threads);
    const double layer_weights = (sqz_shape_weight_bytes(&a->shape, &a->bits) -
                                  a->shape.n_vocab * (double)a->shape.n_embd * a->bits.output / 8) /
                                 a->shape.n_layer;
    rate_probe_in_shards(probe, (size_t)layer_weights);
    for (size_t round = 0; round < request->n_repeats; round++) {
        if (!request->quiet) fprintf(stderr, "analyze: round %zu of %zu\n", round + 1, request->n_repeats);
        for (int i = 0; i < RUNS_A_ROUND; i++) {
            const int32_t token = 1;
            sqz_session_reset(run.session);
            const double since = now_seconds();
            stop_on(sqz_session_run(run.session, &token, 1, &error), &error);
            times_add(&rest, now_seconds() - since);
        }
        rate_probe_measure(probe);
    }
    *machine = (struct ranks_machine){
        .way = RANKS_LED,
        .rates = rate_probe_fit(probe),
        .rest = times_median(&rest),
        .threads = info.n_threads,
        .cores = (double)sysconf(_SC_NPROCESSORS_ONLN),
        .host_ranks = MOST_RANKS,
        .memory = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGE_SIZE),
    };
    rate_probe_close(probe);
    short_run_close(&run);
    if (!ranks_try(&trial, a->shape.n_head, a->shape.head_dim, (size_t)layer_weights, info.n_threads)) return;
    machine->inside = machine->between = (struct ranks_link){trial.latency, trial.byte};
    machine->host_ranks = (uint32_t)trial.n_here;
    machine->memory /= trial.n_here;
    machine->tried_ranks = (uint32_t)trial.n;
    machine->tried_layer = trial.layer;
}

/* What stands in a file beside the rates of attention. */
enum { N_FIELDS = 8 };
static const char *const field_names[N_FIELDS] = {"threads",         "cores",
                                                  "host_ranks",      "memory_bytes",
                                                  "message_seconds", "message_seconds_a_byte",
                                                  "tried_ranks",     "tried_layer_seconds"};

static json_t *machine_numbers(const struct ranks_machine *m)
{
    const double fields[N_FIELDS] = {m->threads,        m->cores,       m->host_ranks,  m->memory,
                                     m->inside.latency, m->inside.byte, m->tried_ranks, m->tried_layer};
    json_t *json = json_object();
    for (int i = 0; i < N_FIELDS; i++) json_object_set_new(json, field_names[i], json_number(fields[i]));
    return json;
}

static void machine_of_file(const char *path, struct ranks_machine *m)
{
    struct speculation_rates rates;
    double field[N_FIELDS];
    json_error_t error;
    rates_read(path, &rates);
    json_t *root = json_load_file(path, 0, &error);
    const json_t *from = root ? json_object_get(root, "ranks_machine") : NULL;
    if (!from) die("%s: has no \"ranks_machine\"; squeeze analyze ranks --rates here --json writes it", path);
    for (int i = 0; i < N_FIELDS; i++) {
        const json_t *value = json_object_get(from, field_names[i]);
        field[i] = json_number_value(value);
        if (!json_is_number(value) || !(field[i] >= 0 && field[i] < 1e15))
            die("%s: \"%s\" must be a number from 0 to 1e15", path, field_names[i]);
    }
    *m = (struct ranks_machine){.way = RANKS_LED,
                                .rates = rates.attention,
                                .rest = rates.batches[0].rest,
                                .threads = field[0],
                                .cores = field[1],
                                .host_ranks = (uint32_t)fmax(1, fmin(field[2], MOST_RANKS)),
                                .inside = {field[4], field[5]},
                                .between = {field[4], field[5]},
                                .memory = field[3],
                                .tried_ranks = (uint32_t)fmin(field[6], MOST_RANKS),
                                .tried_layer = field[7]};
    json_decref(root);
}

/* What the command line says of it. */
static void change_machine(struct ranks_machine *m, const struct sqz_model_shape *shape, const struct ranks_request *r)
{
    struct ranks_link inside = m->inside, between = m->between;
    if (r->latency_us >= 0) inside.latency = 1e-6 * r->latency_us;
    if (r->bandwidth > 0) inside.byte = 1e-9 / r->bandwidth;
    if (m->way == RANKS_LED && (r->latency_us >= 0 || r->bandwidth > 0)) between = inside;
    if (r->hosts_latency_us >= 0) between.latency = 1e-6 * r->hosts_latency_us;
    if (r->hosts_bandwidth > 0) between.byte = 1e-9 / r->hosts_bandwidth;
    if (r->cores || r->host_ranks) m->tried_ranks = 0; /* such ranks were not tried */
    ranks_change_links(m, shape, &inside, &between);
    if (r->cores) m->cores = (double)r->cores;
    if (r->host_ranks) m->host_ranks = (uint32_t)r->host_ranks;
    if (r->memory > 0) m->memory = r->memory * 0x1p30;
}

/* ---- Output ---------------------------------------------------------------------------------- */

static const struct table_column step_columns[] = {
    {"tokens", "tokens", 1, 10},
    {"ranks", "ranks", 1, 5},
    {"seconds_a_token", "ms a token", 1e3, 4},
    {"vs_one", "vs one", 1, 3},
    {"model_seconds", "model", 1e3, 4},
    {"lookup_seconds", "lookup", 1e3, 4},
    {"rows_seconds", "rows", 1e3, 4},
    {"queries_seconds", "queries", 1e3, 3},
    {"totals_seconds", "totals", 1e3, 3},
    {"outputs_seconds", "outputs", 1e3, 3},
    {"bytes_a_token_layer", "bytes a token, layer", 1, 6},
    {"memory_bytes", "GB a rank", 1e-9, 4},
    {"fits", "fits", 0, 0},
};

static const struct table_column choice_columns[] = {
    {"tokens", "tokens", 1, 10},
    {"fewest_ranks", "fewest that hold it", 1, 5},
    {"worth_ranks", "doubling pays up to", 1, 5},
    {"worth_seconds", "ms a token", 1e3, 4},
    {"fastest_ranks", "fastest", 1, 5},
    {"fastest_seconds", "ms a token", 1e3, 4},
};

static void add_step(struct table *t, const struct ranks_machine *m, double tokens, uint32_t n,
                     const struct ranks_step *s, double one)
{
    const double numbers[] = {tokens,  n,          s->seconds, one / s->seconds, s->model,       s->lookup,
                              s->rows, s->queries, s->totals,  s->outputs,       s->layer_bytes, s->memory};
    for (size_t i = 0; i < COUNT_OF(numbers); i++) table_number(t, numbers[i]);
    table_text(t, !(m->memory > 0) ? "?" : s->memory <= m->memory ? "yes" : "no");
}

static void add_choice(struct table *t, const struct ranks_machine *m, const struct ranks_context *c)
{
    const struct ranks_choice choice = ranks_choose(m, c, MOST_RANKS);
    const bool fits = choice.fewest > 0;
    table_number(t, c->n_keys);
    table_number(t, fits ? choice.fewest : NAN);
    table_number(t, fits ? choice.worth : NAN);
    table_number(t, fits ? ranks_step(m, c, choice.worth).seconds : NAN);
    table_number(t, fits ? choice.fastest : NAN);
    table_number(t, fits ? ranks_step(m, c, choice.fastest).seconds : NAN);
}

/* Milliseconds over the number of ranks, a curve a context, and those of the messages, which are the same for all. */
static int draw(const struct analysis *a, const struct count_list *ranks, const struct ranks_step *steps)
{
    static const char *const colours[] = {"#3b4cc0", "#2a9d4a", "#b40426", "#000000"};
    double x[COUNT_LIST_MAX], *const y = allocate((a->tokens.n + 1) * ranks->n, sizeof *y);
    double *const sent = y + a->tokens.n * ranks->n;
    struct plot_curve curves[COUNT_LIST_MAX + 1];
    size_t alone = 0; /* of the list, which send nothing */
    for (size_t r = 0; r < ranks->n; r++) {
        x[r] = (double)ranks->value[r];
        sent[r] = 1e3 * (steps[r].queries + steps[r].totals + steps[r].outputs);
        if (alone == r && !(sent[r] > 0)) alone++;
    }
    for (size_t i = 0; i < a->tokens.n; i++) {
        char text[NUMBER_TEXT_MAX];
        double *const ms = y + i * ranks->n;
        for (size_t r = 0; r < ranks->n; r++) ms[r] = 1e3 * steps[i * ranks->n + r].seconds;
        curves[i] = (struct plot_curve){.x = x, .y = ms, .n = ranks->n, .colour = colours[i % COUNT_OF(colours)]};
        snprintf(curves[i].label, sizeof curves[i].label, "%s tokens", short_count(text, a->tokens.value[i]));
    }
    curves[a->tokens.n] = (struct plot_curve){.label = "of that messages",
                                              .x = x + alone,
                                              .y = sent + alone,
                                              .n = ranks->n - alone,
                                              .colour = "#666666",
                                              .dashed = true};
    char title[160];
    snprintf(title, sizeof title, "%s, a budget of %g", a->shape.name, a->lookup.budget);
    const struct plot_panel panel = {.title = title,
                                     .x_label = "ranks",
                                     .y_label = "a generated token (ms)",
                                     .curves = curves,
                                     .n_curves = a->tokens.n + (alone < ranks->n)};
    const int code = plot_panels(a->plot, &panel, 1);
    free(y);
    return code;
}

int view_ranks(struct analysis *a, const struct ranks_request *request)
{
    const char *rates = request->measured.rates;
    const bool here = rates && strcmp(rates, "here") == 0;
    const double weights = sqz_shape_weight_bytes(&a->shape, &a->bits);
    struct sqz_squeeze_options squeeze;
    struct ranks_machine machine;
    struct count_list ranks = request->ranks;
    struct table tables[2];
    json_t *more = json_object();
    int code = 0;
    if (a->tokens.n == 0) a->tokens = (struct count_list){3, {131072, 1048576, 10485760}};
    fill_counts(&ranks, 1, 7);
    sqz_squeeze_options_default(&squeeze, SQZ_RULE_DEFAULT);
    if (here) measure(a, &request->measured, &squeeze, &machine);
    else if (rates) machine_of_file(rates, &machine);
    else ranks_machine_h200(&machine, weights, &squeeze);
    change_machine(&machine, &a->shape, request);
    if (!(machine.inside.latency > 0 || machine.between.latency > 0) && ranks.value[ranks.n - 1] > 1)
        usage_error("no message was measured: start this under mpirun, or give --latency-us and --bandwidth");
    if (!(machine.rates.coded_key > 0)) squeeze.code_words = 0; /* whole clusters */
    struct ranks_context context = {
        .shape = &a->shape,
        .lookup = context_lookup(&a->shape, &squeeze, a->lookup.budget, squeeze.code_words ? a->lookup.coded_share : 0),
        .weight_bytes = weights,
        .n_shards = (uint32_t)request->n_shards,
    };
    struct ranks_step *steps = allocate(a->tokens.n * ranks.n, sizeof *steps);
    table_begin(&tables[0], "steps", NULL, step_columns, COUNT_OF(step_columns));
    table_begin(&tables[1], "choice",
                "Where more ranks stop paying (a doubling by which a token gets less than 5% faster)", choice_columns,
                COUNT_OF(choice_columns));
    for (size_t i = 0; i < a->tokens.n; i++) {
        context.n_keys = (double)a->tokens.value[i];
        const double one = ranks_step(&machine, &context, 1).seconds;
        for (size_t r = 0; r < ranks.n; r++) {
            struct ranks_step *s = &steps[i * ranks.n + r];
            *s = ranks_step(&machine, &context, (uint32_t)ranks.value[r]);
            add_step(&tables[0], &machine, context.n_keys, (uint32_t)ranks.value[r], s, one);
        }
        add_choice(&tables[1], &machine, &context);
    }
    if (a->plot) code = draw(a, &ranks, steps);
    free(steps);
    json_object_set_new(more, "budget", json_number(a->lookup.budget));
    json_object_set_new(more, "message_layers", json_integer(a->shape.n_layer - a->shape.n_window_layer));
    json_object_set_new(more, "short_context_seconds", json_number(machine.rest));
    json_object_set_new(more, "rates", rates_json(&machine.rates));
    json_object_set_new(more, "ranks_machine", machine_numbers(&machine));
    if (here) json_object_set_new(more, "machine", machine_json((int)machine.threads));
    json_object_set_new(more, "roofline", json_null()); /* no peak rate counts */
    print_subject(a);
    return analysis_print(a, tables, 2, more) || code;
}
