/*
 * squeeze bench kernels: our attention and its parts beside ggml's flash attention and beside what the machine can do,
 * for the shape of one layer, context lengths and numbers of queries. No model is needed: keys, values and queries are
 * drawn (bench_kernels_layer.c says how). Every result is held against double precision before anything is timed.
 */
#include "bench_kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "inputs.h"
#include "json_output.h"
#include "options.h"
#include "outputs.h"
#include "plot.h"

static const struct option_rule rules[] = {
    {"queries levels keys block ggml seconds plot", "rows",
     "rows in planes are timed beside F16, in calls of 1, 5 and 8 tokens, by one level of clusters"},
    {0}};

static const struct command_help help = {
    "bench kernels", "",
    "Times dense and squeezed attention and their parts on one layer, beside ggml's flash attention and the machine's "
    "read bandwidth and arithmetic peak. Needs no model; results are checked before they are timed.",
    "  squeeze bench kernels\n"
    "  squeeze bench kernels --shape llama-2-7b --tokens 512K --queries 1 --levels 2 --index int8 --keys f16,int8\n"
    "  squeeze bench kernels --tokens 4K,16K,64K,256K --queries 1 --plot cost.svg --json\n"
    "  squeeze bench kernels --rows --shape smollm2 --tokens 8K,32K\n"
    "  squeeze bench kernels --heads 16 --kv-heads 4 --head-dim 96 --tokens 10000\n",
    rules};

struct preset {
    const char *name;
    uint32_t n_head, n_head_kv, head_dim;
};

static const struct preset presets[] = {
    {"llama-2-7b", 32, 32, 128},
    {"llama-3-8b", 32, 8, 128},
    {"smollm2", 9, 3, 64},
    {"qwen2.5-0.5b", 14, 2, 64},
};
static const char *const preset_names[] = {"llama-2-7b", "llama-3-8b", "smollm2", "qwen2.5-0.5b", NULL};
static const char *const format_names[] = {"f16", "int8", NULL};

/* Most of the available memory that a case may take. */
static const double memory_share = 0.95;

struct command {
    struct count_list shapes, tokens, queries, levels, index, keys;
    size_t heads, kv_heads, head_dim, layer_heads; /* 0: as the preset says */
    bool shape_given;
    double budget, centroids, seconds;
    size_t code_words, block, repeats, n_threads;
    int ggml, cold, huge_pages;
    bool json, quiet, planes; /* planes: --rows */
    const char *plot;

    struct bench_shape list[COUNT_LIST_MAX];
    struct bench_rows rows;
    struct bench_report report;
    struct memory_probe probe;
};

/* ---- Shapes ---------------------------------------------------------------------------------- */

static struct bench_shape make_shape(const struct command *command, const struct preset *preset)
{
    struct bench_shape shape;
    const uint32_t group = preset->n_head / preset->n_head_kv;
    uint32_t n_head_kv = preset->n_head_kv;
    memset(&shape, 0, sizeof shape);
    if (command->layer_heads) {
        if (command->layer_heads > n_head_kv)
            usage_error("--layer-heads %zu: %s has %u KV heads", command->layer_heads, preset->name, n_head_kv);
        n_head_kv = (uint32_t)command->layer_heads;
    }
    snprintf(shape.name, sizeof shape.name, "%s", preset->name);
    shape.n_head_kv = preset->n_head_kv;
    shape.shape = (struct sqz_layer_shape){n_head_kv * group, n_head_kv, preset->head_dim,
                                           (float)(1.0 / sqrt((double)preset->head_dim))};
    return shape;
}

/* The shape of --heads, --kv-heads and --head-dim. */
static struct preset own_shape(const struct command *command)
{
    struct preset own = {"custom", (uint32_t)command->heads, 0, (uint32_t)command->head_dim};
    if (command->shape_given)
        usage_error("--shape names a shape, --heads, --kv-heads and --head-dim describe one: give one or the other");
    if (!command->heads || !command->head_dim)
        usage_error("a shape of your own needs --heads and --head-dim, e.g. --heads 32 --kv-heads 8 --head-dim 128");
    own.n_head_kv = command->kv_heads ? (uint32_t)command->kv_heads : own.n_head;
    if (own.n_head % own.n_head_kv != 0)
        usage_error("--kv-heads %u: allowed are divisors of the %u query heads", own.n_head_kv, own.n_head);
    if (own.head_dim % 16 != 0) usage_error("--head-dim %u: allowed are multiples of 16 from 32 to 256", own.head_dim);
    return own;
}

static void make_shapes(struct command *command)
{
    if (command->heads || command->kv_heads || command->head_dim) {
        const struct preset own = own_shape(command);
        command->shapes.n = 1;
        command->list[0] = make_shape(command, &own);
        return;
    }
    for (size_t i = 0; i < command->shapes.n; i++)
        command->list[i] = make_shape(command, &presets[command->shapes.value[i]]);
}

/* ---- Cases ---------------------------------------------------------------------------------------- */

static void say(const struct command *command, const char *shape, size_t n_tokens, const char *what)
{
    char tokens[NUMBER_TEXT_MAX];
    if (!command->quiet) fprintf(stderr, "bench: %s, %s tokens: %s\n", shape, count_text(tokens, n_tokens), what);
}

static size_t most_queries(const struct command *command)
{
    size_t most = 1;
    for (size_t i = 0; i < command->queries.n; i++)
        most = command->queries.value[i] > most ? command->queries.value[i] : most;
    return most;
}

static bool holds(const struct count_list *list, size_t value)
{
    for (size_t i = 0; i < list->n; i++)
        if (list->value[i] == value) return true;
    return false;
}

static struct bench_case_options case_options(const struct command *command, const struct bench_layer *layer,
                                              size_t shape, size_t n_queries)
{
    struct bench_case_options o = {
        .layer = layer,
        .shape = shape,
        .shape_name = command->list[shape].name,
        .n_queries = n_queries,
        .block_tokens = command->block < n_queries ? command->block : n_queries,
        .n_repeats = command->repeats,
        .budget = command->budget,
        .seconds = command->seconds,
        .ggml = command->ggml == 1,
        .cold = command->cold == 1,
        .n_threads = (int)command->n_threads,
        .probe = &command->probe,
        .quiet = command->quiet,
    };
    for (size_t i = 0; i < command->levels.n; i++) o.n_levels[command->levels.value[i]] = true;
    for (size_t i = 0; i < command->index.n; i++) o.centroids[command->index.value[i]] = true;
    for (size_t i = 0; i < command->keys.n; i++) o.keys[command->keys.value[i]] = true;
    return o;
}

/* Whether the case fits beside a layer (that is there already, or still to be made); else its rows say why not. */
static bool fits(struct command *command, const struct bench_case_options *o, bool layer_is_there)
{
    char needs[NUMBER_TEXT_MAX], has[NUMBER_TEXT_MAX], why[96];
    const size_t bytes = bench_case_bytes(o) + (layer_is_there ? 0 : bench_layer_bytes(&o->layer->options));
    const size_t available = pages_available_bytes();
    if ((double)bytes <= memory_share * (double)available) return true;
    snprintf(why, sizeof why, "needs %s, %s are available: try fewer --layer-heads", bytes_text(needs, bytes),
             bytes_text(has, available));
    say(command, o->shape_name, o->layer->layer.n_rows, why);
    bench_case_skip(o, &command->rows, why);
    return false;
}

/* All numbers of queries on one layer. False when a signal was caught. */
static bool run_layer(struct command *command, size_t shape, size_t n_tokens)
{
    const struct bench_layer_options options = {
        .shape = command->list[shape].shape,
        .n_rows = n_tokens,
        .n_user = most_queries(command),
        .centroid_share = command->centroids,
        .int8_centroids = holds(&command->index, SQZ_INDEX_INT8),
        .int8_keys = holds(&command->keys, SQZ_INDEX_INT8),
        .code_words = (uint32_t)command->code_words,
        .huge_pages = command->huge_pages == 1,
        .n_threads = (int)command->n_threads,
    };
    struct bench_layer layer;
    bool made = false, ok = true;
    bench_layer_outline(&layer, &options);
    for (size_t i = 0; i < command->queries.n && ok; i++) {
        const struct bench_case_options o = case_options(command, &layer, shape, command->queries.value[i]);
        if (!fits(command, &o, made)) continue;
        if (!made) {
            char bytes[NUMBER_TEXT_MAX], what[64];
            snprintf(what, sizeof what, "drawing %s", bytes_text(bytes, bench_layer_bytes(&options)));
            say(command, o.shape_name, n_tokens, what);
            made = bench_layer_make(&layer, &options);
            if (!made && !signal_caught())
                die("out of memory for %s of keys and values", bytes_text(bytes, bench_layer_bytes(&options)));
        }
        ok = made && bench_case_run(&o, &command->rows);
    }
    bench_layer_free(&layer);
    return ok;
}

/* ---- Rows in planes ----------------------------------------------------------------------------------- */

/* One length, rows of all kinds. False when a signal was caught. */
static bool run_rows(struct command *command, size_t shape, size_t n_tokens, json_t *rows)
{
    const struct bench_layer_options options = {
        .shape = command->list[shape].shape,
        .n_rows = n_tokens,
        .n_user = SQZ_ROWS_BENCH_TOKENS,
        .centroid_share = command->centroids,
        .int8_centroids = command->index.value[0] == SQZ_INDEX_INT8,
        .code_words = (uint32_t)command->code_words,
        .huge_pages = command->huge_pages == 1,
        .n_threads = (int)command->n_threads,
    };
    const size_t available = pages_available_bytes();
    struct bench_layer layer;
    char needs[NUMBER_TEXT_MAX], has[NUMBER_TEXT_MAX];
    bench_layer_outline(&layer, &options);
    const size_t bytes = bench_layer_bytes(&options) + bench_rows_bytes(&layer);
    if ((double)bytes > memory_share * (double)available)
        die("%zu tokens need %s, %s are available: try fewer --layer-heads", n_tokens, bytes_text(needs, bytes),
            bytes_text(has, available));
    say(command, command->list[shape].name, n_tokens, "drawing and rounding rows");
    bool ok = bench_layer_make(&layer, &options);
    if (!ok && !signal_caught()) die("out of memory for %s of keys and values", bytes_text(needs, bytes));
    say(command, command->list[shape].name, n_tokens, "checking and timing");
    const struct bench_rows_options how = {.layer = &layer,
                                           .centroids = (enum sqz_index)command->index.value[0],
                                           .budget = command->budget,
                                           .n_repeats = command->repeats,
                                           .cold = command->cold == 1,
                                           .probe = &command->probe};
    ok = ok && bench_rows_run(&how, rows) && bench_own_rows_run(&how, rows);
    bench_layer_free(&layer);
    return ok;
}

static int run_all_rows(struct command *command)
{
    json_t *rows = json_array();
    bool ok = true;
    if (!memory_probe_open(&command->probe, (int)command->n_threads))
        die("out of memory for measuring the read bandwidth");
    for (size_t i = 0; i < command->tokens.n && ok; i++) ok = run_rows(command, 0, command->tokens.value[i], rows);
    if (!ok) {
        json_decref(rows);
        warn("interrupted");
        return 128 + signal_caught();
    }
    if (!command->json) {
        bench_rows_print(rows);
        json_decref(rows);
        return close_stdout();
    }
    json_t *root = json_object();
    json_object_set_new(root, "shape", json_string(command->list[0].name));
    json_object_set_new(root, "budget", json_number(command->budget));
    json_object_set_new(root, "code_words", json_count(command->code_words));
    json_object_set_new(root, "cache", json_string(command->cold == 1 ? "cold" : "warm"));
    json_object_set_new(root, "rows", rows);
    add_origin_json(root, (int)command->n_threads);
    return print_json(root);
}

/* ---- The machine ------------------------------------------------------------------------------------- */

/* Peaks before and after, the better ones: a core that was busy elsewhere shows less. */
static void measure_peaks(struct bench_report *report)
{
    struct peak again[sizeof report->peaks / sizeof report->peaks[0]];
    const size_t n = peaks_measure(again, sizeof again / sizeof again[0], report->n_threads);
    for (size_t i = 0; i < n; i++)
        if (i >= report->n_peaks || again[i].per_second > report->peaks[i].per_second) report->peaks[i] = again[i];
    report->n_peaks = n;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void measure_bandwidth(struct command *command)
{
    enum { PASSES = 48 };
    struct bench_report *report = &command->report;
    size_t n = PASSES;
    for (size_t i = 0; i < command->rows.n; i++) n += command->rows.rows[i].times.n;
    double *all = malloc(n * sizeof *all);
    if (!all) die("out of memory");
    n = 0;
    for (size_t i = 0; i < command->rows.n; i++) {
        const struct bench_times *times = &command->rows.rows[i].times;
        memcpy(all + n, times->bandwidth, times->n * sizeof *all);
        n += times->n;
    }
    for (int pass = 0; pass < PASSES; pass++) all[n++] = memory_probe_read(&command->probe);
    qsort(all, n, sizeof *all, compare_doubles);
    report->bandwidth = all[n - 1];
    report->bandwidth_low = all[n / 10];
    free(all);
}

/* ---- The command ----------------------------------------------------------------------------------------- */

static int compare_counts(const void *a, const void *b)
{
    size_t x = *(const size_t *)a, y = *(const size_t *)b;
    return (x > y) - (x < y);
}

static void check_options(struct command *command)
{
    if (command->budget > 0.9)
        usage_error("--budget %g: allowed is at most 0.9 here; the dense rows read everything", command->budget);
    if (command->centroids > 0.5)
        usage_error("--centroids %g: allowed is more than 0 and at most 0.5, e.g. 0.05", command->centroids);
    if (command->plot && !plot_can_draw(command->plot))
        usage_error("--plot %s: allowed are names that end in .png or .svg", command->plot);
    outputs_check((const struct output[]){{"--plot", command->plot, OUTPUT_PICTURE}, {0}}, NULL, 0);
    if (command->planes && (command->shapes.n != 1 || command->index.n != 1))
        usage_error("--rows: allowed are one --shape and one --index");
    command->n_threads = measured_threads(command->n_threads);
    make_shapes(command);
    /* Shorter contexts tell how long longer ones will take. */
    qsort(command->tokens.value, command->tokens.n, sizeof command->tokens.value[0], compare_counts);
}

static int run(struct command *command)
{
    struct bench_report *report = &command->report;
    report->shapes = command->list;
    report->n_shapes = command->shapes.n;
    report->rows = &command->rows;
    report->budget = command->budget;
    report->centroid_share = command->centroids;
    report->code_words = command->code_words;
    report->block_tokens = command->block;
    report->cold = command->cold == 1;
    report->huge_pages = command->huge_pages == 1;
    report->n_threads = (int)command->n_threads;
    if (!memory_probe_open(&command->probe, report->n_threads)) die("out of memory for measuring the read bandwidth");
    measure_peaks(report);
    bool ok = true;
    for (size_t shape = 0; shape < command->shapes.n && ok; shape++)
        for (size_t i = 0; i < command->tokens.n && ok; i++) ok = run_layer(command, shape, command->tokens.value[i]);
    if (!ok) {
        warn("interrupted");
        return 128 + signal_caught();
    }
    measure_peaks(report);
    measure_bandwidth(command);
    int code = command->json ? bench_print_json(report) : bench_print_table(report);
    if (command->plot && code == 0) code = bench_plot(report, command->plot);
    return code;
}

int bench_kernels(int argc, char **argv)
{
    struct sqz_squeeze_options defaults;
    struct command command = {
        .shapes = {1, {1}},
        .tokens = {3, {4096, 16384, 65536}},
        .queries = {4, {1, 16, 128, 512}},
        .levels = {2, {1, 2}},
        .budget = 0.125,
        .centroids = 0.05,
        .seconds = 60.0,
        .block = 64,
        .repeats = 5,
        .ggml = 1,
        .cold = 1,
        .huge_pages = 1,
    };
    /* clang-format off */
    const struct option options[] = {
        {.kind = OPTION_CHOICES, .name = "shape", .argument = "NAME[,...]", .value = &command.shapes,
         .choices = preset_names, .given = &command.shape_given,
         .help = "layers of llama-2-7b (32 heads of 128), llama-3-8b (32, 8 of keys; the default), smollm2 (9 and 3 of "
                 "64), qwen2.5-0.5b (14 and 2 of 64)"},
        {.kind = OPTION_COUNT, .name = "heads", .argument = "N", .value = &command.heads, .low = 1, .high = 1024,
         .example = "32", .help = "query heads of a shape of your own"},
        {.kind = OPTION_COUNT, .name = "kv-heads", .argument = "N", .value = &command.kv_heads, .low = 1, .high = 1024,
         .example = "8", .help = "its key-value heads (as many)"},
        {.kind = OPTION_COUNT, .name = "head-dim", .argument = "N", .value = &command.head_dim, .low = 32, .high = 256,
         .example = "128", .help = "its head dimension"},
        {.kind = OPTION_COUNT, .name = "layer-heads", .argument = "N", .value = &command.layer_heads, .low = 1,
         .high = 1024, .example = "8", .help = "use N key-value heads of the layer, where memory is short"},
        {.kind = OPTION_COUNTS, .name = "tokens", .argument = "N[,...]", .value = &command.tokens, .low = 1024,
         .high = 16777216, .example = "4K,64K", .help = "lengths of the context (4K,16K,64K)"},
        {.kind = OPTION_FLAG, .name = "rows", .value = &command.planes,
         .help = "time rows of 4 + 4 bits beside F16, by both planes and by the upper one"},
        {.kind = OPTION_COUNTS, .name = "queries", .argument = "N[,...]", .value = &command.queries, .low = 1,
         .high = 1024, .example = "1,512", .help = "queries at once (1,16,128,512)"},
        {.kind = OPTION_BUDGET, .letter = 'b', .name = "budget", .argument = "SHARE", .value = &command.budget,
         .example = "0.125", .help = "share of the KV bytes that the squeezed runs read (0.125)"},
        {.kind = OPTION_COUNTS, .name = "levels", .argument = "N[,...]", .value = &command.levels, .low = 1,
         .high = BENCH_LEVELS, .example = "1,2", .help = "levels of clusters (1,2)"},
        {.kind = OPTION_BUDGET, .name = "centroids", .argument = "SHARE", .value = &command.centroids,
         .example = "0.05", .help = "clusters of the finest level as a share of the keys (0.05)"},
        {.kind = OPTION_CHOICES, .name = "index", .argument = "F[,...]", .value = &command.index,
         .choices = format_names, .help = "format of the centroids: f16, int8 (as prepare does)"},
        {.kind = OPTION_CHOICES, .name = "keys", .argument = "F[,...]", .value = &command.keys,
         .choices = format_names, .help = "format of the keys: f16, int8 (as prepare does)"},
        {.kind = OPTION_COUNT, .name = "code-words", .argument = "N", .value = &command.code_words, .low = 0,
         .high = 4, .example = "1", .help = "32-bit words of code for every key; 0: none (as prepare does)"},
        {.kind = OPTION_COUNT, .name = "block", .argument = "N", .value = &command.block, .low = 1,
         .high = SQZ_MAX_BLOCK_TOKENS, .example = "64", .help = "tokens that share a selection (64)"},
        THREADS_OPTION(command.n_threads),
        {.kind = OPTION_COUNT, .name = "repeats", .argument = "N", .value = &command.repeats, .low = 1,
         .high = BENCH_REPEATS, .example = "5", .help = "times everything is measured, in turn (5)"},
        {.kind = OPTION_REAL, .name = "seconds", .argument = "S", .value = &command.seconds, .low = 0.0, .high = 1e6,
         .above = true, .example = "60",
         .help = "leave out what would take longer a run; begin no new round after this long (60)"},
        {.kind = OPTION_SWITCH, .name = "ggml", .value = &command.ggml, .help = "time ggml's attention too"},
        {.kind = OPTION_SWITCH, .name = "cold", .value = &command.cold,
         .help = "empty the caches before every run, as the rest of a model would"},
        {.kind = OPTION_SWITCH, .name = "huge-pages", .value = &command.huge_pages,
         .help = "ask for 2 MiB pages for keys and values"},
        {.kind = OPTION_TEXT, .name = "plot", .argument = "FILE", .value = &command.plot,
         .help = "draw time against context length into a .png or .svg file (needs gnuplot)"},
        {.kind = OPTION_FLAG, .letter = 'q', .name = "quiet", .value = &command.quiet, .help = "no progress"},
        JSON_OPTION(command.json),
        {.kind = OPTION_END},
    };
    /* clang-format on */
    sqz_squeeze_options_default(&defaults, SQZ_RULE_DEFAULT);
    command.index = (struct count_list){1, {(size_t)defaults.index}};
    command.keys = (struct count_list){1, {(size_t)defaults.keys}};
    command.code_words = defaults.code_words;
    options_parse(&help, options, argc, argv, 0, 0);
    check_options(&command);
    catch_signals();
    int code = command.planes ? run_all_rows(&command) : run(&command);
    memory_probe_close(&command.probe);
    free(command.rows.rows);
    return code;
}
