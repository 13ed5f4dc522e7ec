/*
 * squeeze inspect: what a context file holds, how large its parts are, what
 * each budget reads and loses, and a picture of both.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common.h"
#include "context_file.h"
#include "curves.h"
#include "inputs.h"
#include "json_output.h"
#include "options.h"
#include "outputs.h"
#include "plot.h"
#include "squeeze_flags.h"

static const struct command_help help = {
    "inspect", "CONTEXT",
    "Shows what a context file holds: model, tokens, clusters, sizes, and what each budget reads and loses. The "
    "mass lost is what the calibration queries lost before the tail estimate gave some of it back.",
    "  squeeze inspect book.sqz.gguf\n"
    "  squeeze inspect book.sqz.gguf --plot book.png\n"
    "  squeeze inspect book.sqz.gguf --layer 3 --json\n",
    NULL};

static const double budgets[] = {0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0};

enum { N_BUDGETS = sizeof budgets / sizeof budgets[0] };

struct inspect {
    const char *path, *plot;
    bool json, verify, layer_given;
    size_t layer;
    uint32_t first, last; /* layers shown: first to last - 1 */
    struct sqz_context_info info;
    struct size_histogram levels[SQZ_MAX_LEVELS];
    uint32_t n_levels; /* most of any layer shown */
    uint32_t n_shards; /* 0: it is one file */
    uint32_t n_clustered, n_sliding;
    struct curve_set curves;
};

static void count_clusters(struct inspect *inspect, const struct sqz_context *context)
{
    for (uint32_t i = inspect->first; i < inspect->last; i++) {
        const struct sqz_layer *layer = sqz_context_layer(context, i);
        struct sqz_layer_info shape;
        sqz_layer_get_info(layer, &shape);
        inspect->n_clustered += shape.n_levels > 0;
        inspect->n_sliding += shape.sliding_window;
        if (shape.n_levels > inspect->n_levels) inspect->n_levels = shape.n_levels;
        for (uint32_t level = 0; level < shape.n_levels; level++) {
            for (uint32_t k = 0; k < shape.shape.n_head_kv; k++)
                for (uint32_t c = 0; c < shape.n_clusters[level]; c++)
                    size_histogram_add(&inspect->levels[level], sqz_layer_cluster_rows(layer, k, level, c));
        }
    }
}

/* ---- Text ------------------------------------------------------------------------ */

/* Keys that are INT8 may have exact ones beside them, in files that were written when these were always kept. */
static const char *key_format(const struct sqz_context_info *info)
{
    if (info->squeeze.rows != SQZ_ROWS_F16) return row_format_name(info->squeeze.rows);
    if (info->squeeze.keys != SQZ_INDEX_INT8) return index_names[0];
    return info->rounded_keys ? "int8" : "int8 beside f16";
}

static void print_rule(const struct sqz_context_info *info)
{
    const struct sqz_squeeze_options *squeeze = &info->squeeze;
    printf(
        "rule       %s: %s distance%s, centroids %s, %u word%s of code a key, %s %s, thresholds %s%s%s%s, "
        "%u sinks, window %u\n",
        rule_names[squeeze->rule == 1], metric_names[squeeze->metric == SQZ_METRIC_EUCLIDEAN],
        squeeze->center ? " of centred keys" : "", index_names[squeeze->index == SQZ_INDEX_INT8], squeeze->code_words,
        squeeze->code_words == 1 ? "" : "s", squeeze->rows == SQZ_ROWS_F16 ? "keys" : "keys and values",
        key_format(info), squeeze->per_head ? "per head" : "common to all heads", squeeze->variance ? ", variance" : "",
        squeeze->tail ? ", tail" : "", squeeze->value_skip ? ", value skip" : "", squeeze->n_sinks, squeeze->n_window);
}

static const char *floor_meaning(const struct sqz_context_info *info)
{
    if (info->squeeze.rule == SQZ_RULE_PAPER && info->budget_floor < 1.0f)
        return "what the published rule reads at any budget";
    return info->budget_floor < 1.0f ? "smaller budgets are raised to it" : "every question reads everything";
}

/* The budget that is aimed at when this one is asked for. */
static double effective_budget(const struct inspect *inspect, double budget)
{
    const double floor = (double)inspect->info.budget_floor;
    return inspect->info.squeeze.rule == SQZ_RULE_PAPER || budget > floor ? budget : floor;
}

static void print_head(const struct inspect *inspect)
{
    const struct sqz_context_info *info = &inspect->info;
    char a[NUMBER_TEXT_MAX], b[NUMBER_TEXT_MAX], c[NUMBER_TEXT_MAX];
    char name[PLAIN_TEXT_MAX];
    printf("model      %s, fingerprint %.16s\n", plain_text(name, info->model_name), info->model_fingerprint);
    if (info->source_name && *info->source_name) printf("document   %s\n", plain_text(name, info->source_name));
    printf("context    %s tokens, %s chat template", count_text(a, info->n_tokens),
           info->has_template ? "in the model's" : "without a");
    if (info->rope_scale > 1.0f) printf(", rope scale %g", (double)info->rope_scale);
    if (info->long_rope_factors) printf(", long RoPE factors");
    printf("\nlayers     %u, %u heads, %u key-value heads, head dim %u\n", info->n_layer, info->n_head, info->n_head_kv,
           info->head_dim);
    if (inspect->layer_given) printf("shown      layer %u alone\n", inspect->first);
    if (inspect->n_sliding > 0) printf("           %u keep only a sliding window\n", inspect->n_sliding);
    print_rule(info);
    printf("sizes      file %s: keys and values %s, index %s\n", bytes_text(a, info->file_bytes),
           bytes_text(b, info->kv_bytes), bytes_text(c, info->index_bytes));
    if (info->rounded_keys && info->squeeze.rows != SQZ_ROWS_F16)
        printf("own rows   of questions and answers as %s, too, behind the newest 129 to 256, where these are\n",
               row_format_name(info->squeeze.rows));
    printf("floor      %.3g: %s\n", (double)info->budget_floor, floor_meaning(info));
    if (info->rounded_keys && info->squeeze.rows == SQZ_ROWS_INT4_4)
        printf(
            "exact      to int8 alone: a budget of 1 reads everything, but keys and values are kept as %s, rounded\n",
            row_format_name(info->squeeze.rows));
    else if (info->rounded_keys && info->squeeze.rows != SQZ_ROWS_F16)
        printf("exact      no: a budget of 1 reads everything, but keys and values are kept as %s, rounded\n",
               row_format_name(info->squeeze.rows));
    else if (info->rounded_keys)
        printf("exact      no: a budget of 1 reads every key, but keys are kept as int8 alone, rounded\n");
}

static void print_levels(const struct inspect *inspect)
{
    char a[NUMBER_TEXT_MAX], b[NUMBER_TEXT_MAX];
    if (inspect->n_shards) {
        printf("\nin %u shards, each with clusters of its own\n", inspect->n_shards);
        return;
    }
    if (inspect->n_levels == 0) {
        printf("\nnot clustered: every question reads everything\n");
        return;
    }
    printf("\n%-8s%12s%12s%12s%12s\n", "level", "clusters", "fewest keys", "mean", "most keys");
    for (uint32_t level = 0; level < inspect->n_levels; level++) {
        const struct size_histogram *histogram = &inspect->levels[level];
        double mean = histogram->n_clusters ? (double)histogram->sum / (double)histogram->n_clusters : 0.0;
        printf("%-8u%12s%12llu%12.1f%12s\n", level + 1, count_text(a, histogram->n_clusters),
               (unsigned long long)histogram->smallest, mean, count_text(b, histogram->largest));
    }
}

static void print_budgets(const struct inspect *inspect)
{
    char bytes[NUMBER_TEXT_MAX];
    struct curve_point point;
    if (inspect->curves.n_heads == 0) return;
    printf("\n%-8s%10s%14s%14s%12s%20s\n", "budget", "read", "bytes", "ln threshold", "mass lost", "10%..90% of heads");
    for (size_t i = 0; i < N_BUDGETS; i++) {
        char threshold[NUMBER_TEXT_MAX] = "-";
        curve_at_budget(&inspect->curves, effective_budget(inspect, budgets[i]), &point);
        if (isfinite(point.log_threshold)) snprintf(threshold, sizeof threshold, "%.2f", point.log_threshold);
        printf("%-8g%9.1f%%%14s%14s%11.2f%%%11.2f..%.2f%%\n", budgets[i], 100.0 * point.share,
               bytes_text(bytes, (uint64_t)point.read_bytes), threshold, 100.0 * point.lost_mean,
               100.0 * point.lost_low, 100.0 * point.lost_high);
    }
}

/* ---- JSON ---------------------------------------------------------------------------- */

static json_t *squeeze_json(const struct sqz_squeeze_options *squeeze)
{
    json_t *root = json_object();
    json_t *shares = json_array();
    for (uint32_t i = 0; i < squeeze->n_levels && i < SQZ_MAX_LEVELS; i++)
        json_array_append_new(shares, json_number((double)squeeze->centroid_share[i]));
    json_object_set_new(root, "rule", json_string(rule_names[squeeze->rule == 1]));
    json_object_set_new(root, "levels", json_count(squeeze->n_levels));
    json_object_set_new(root, "centroid_share", shares);
    json_object_set_new(root, "metric", json_string(metric_names[squeeze->metric == SQZ_METRIC_EUCLIDEAN]));
    json_object_set_new(root, "group", json_string(group_names[squeeze->group == SQZ_GROUP_MAX]));
    json_object_set_new(root, "index", json_string(index_names[squeeze->index == SQZ_INDEX_INT8]));
    json_object_set_new(root, "code_words", json_count(squeeze->code_words));
    json_object_set_new(root, "keys", json_string(index_names[squeeze->keys == SQZ_INDEX_INT8]));
    json_object_set_new(root, "rows", json_string(row_format_name(squeeze->rows)));
    json_object_set_new(root, "sinks", json_count(squeeze->n_sinks));
    json_object_set_new(root, "window", json_count(squeeze->n_window));
    json_object_set_new(root, "iterations", json_count(squeeze->n_iterations));
    json_object_set_new(root, "center", json_boolean(squeeze->center));
    json_object_set_new(root, "variance", json_boolean(squeeze->variance));
    json_object_set_new(root, "per_head", json_boolean(squeeze->per_head));
    json_object_set_new(root, "tail", json_boolean(squeeze->tail));
    json_object_set_new(root, "value_skip", json_boolean(squeeze->value_skip));
    json_object_set_new(root, "calibration", json_count(squeeze->n_calibration));
    json_object_set_new(root, "seed", json_count(squeeze->seed));
    return root;
}

static json_t *levels_json(const struct inspect *inspect)
{
    json_t *list = json_array();
    for (uint32_t level = 0; level < inspect->n_levels && !inspect->n_shards; level++) {
        const struct size_histogram *histogram = &inspect->levels[level];
        json_t *entry = json_object();
        json_object_set_new(entry, "level", json_count(level + 1));
        json_object_set_new(entry, "clusters", json_count(histogram->n_clusters));
        json_object_set_new(entry, "smallest", json_count(histogram->smallest));
        json_object_set_new(entry, "largest", json_count(histogram->largest));
        json_object_set_new(entry, "keys", json_count(histogram->sum));
        json_array_append_new(list, entry);
    }
    return list;
}

static json_t *budgets_json(const struct inspect *inspect)
{
    json_t *list = json_array();
    struct curve_point point;
    for (size_t i = 0; i < N_BUDGETS && inspect->curves.n_heads > 0; i++) {
        json_t *entry = json_object();
        curve_at_budget(&inspect->curves, effective_budget(inspect, budgets[i]), &point);
        json_object_set_new(entry, "budget", json_number(budgets[i]));
        json_object_set_new(entry, "share", json_number(point.share));
        json_object_set_new(entry, "read_bytes", json_count((uint64_t)point.read_bytes));
        json_object_set_new(entry, "log_threshold", json_number(point.log_threshold));
        json_object_set_new(entry, "lost_mass", json_number(point.lost_mean));
        json_object_set_new(entry, "lost_mass_p10", json_number(point.lost_low));
        json_object_set_new(entry, "lost_mass_p90", json_number(point.lost_high));
        json_array_append_new(list, entry);
    }
    return list;
}

static int print_inspect_json(const struct inspect *inspect)
{
    const struct sqz_context_info *info = &inspect->info;
    json_t *root = json_object();
    json_object_set_new(root, "file", json_text(inspect->path));
    json_object_set_new(root, "model", json_text(info->model_name));
    json_object_set_new(root, "fingerprint", json_text(info->model_fingerprint));
    json_object_set_new(root, "source", json_text(info->source_name ? info->source_name : ""));
    json_object_set_new(root, "tokens", json_count(info->n_tokens));
    json_object_set_new(root, "template", json_boolean(info->has_template));
    json_object_set_new(root, "rope_scale", json_number((double)info->rope_scale));
    json_object_set_new(root, "long_rope_factors", json_boolean(info->long_rope_factors));
    json_object_set_new(root, "layers", json_count(info->n_layer));
    json_object_set_new(root, "heads", json_count(info->n_head));
    json_object_set_new(root, "kv_heads", json_count(info->n_head_kv));
    json_object_set_new(root, "head_dim", json_count(info->head_dim));
    json_object_set_new(root, "sliding_window_layers", json_count(info->n_window_layers));
    json_object_set_new(root, "file_bytes", json_count(info->file_bytes));
    json_object_set_new(root, "kv_bytes", json_count(info->kv_bytes));
    json_object_set_new(root, "index_bytes", json_count(info->index_bytes));
    json_object_set_new(root, "budget_floor", json_number((double)info->budget_floor));
    json_object_set_new(root, "format_version", json_count(info->format_version));
    json_object_set_new(root, "rounded_keys", json_boolean(info->rounded_keys));
    json_object_set_new(root, "own_rows",
                        json_string(row_format_name(info->rounded_keys ? info->squeeze.rows : SQZ_ROWS_F16)));
    json_object_set_new(root, "squeeze", squeeze_json(&info->squeeze));
    if (inspect->layer_given) json_object_set_new(root, "layer", json_count(inspect->first));
    if (inspect->n_shards) json_object_set_new(root, "shards", json_count(inspect->n_shards)); /* have the clusters */
    json_object_set_new(root, "clusters", levels_json(inspect));
    json_object_set_new(root, "budgets", budgets_json(inspect));
    json_object_set_new(root, "verified", json_boolean(inspect->verify));
    json_object_set_new(root, "version", json_text(sqz_version()));
    return print_json(root);
}

static int show(struct inspect *inspect)
{
    int code = 0;
    if (inspect->json) {
        code = print_inspect_json(inspect);
    } else {
        print_head(inspect);
        print_levels(inspect);
        print_budgets(inspect);
        if (inspect->verify) printf("\nevery checksum agrees\n");
        code = close_stdout();
    }
    if (code == 0 && inspect->plot) {
        if (inspect->curves.n_heads == 0) {
            warn("%s: nothing to draw: %s not clustered", inspect->path,
                 inspect->layer_given ? "the layer is" : "the context is");
            return 1;
        }
        code = plot_context(inspect->plot, inspect->levels, inspect->n_levels, &inspect->curves);
    }
    return code;
}

int cmd_inspect(int argc, char **argv)
{
    struct inspect inspect = {0};
    /* clang-format off */
    const struct option options[] = {
        JSON_OPTION(inspect.json),
        {.kind = OPTION_TEXT, .name = "plot", .argument = "FILE", .value = &inspect.plot,
         .help = "draw cluster sizes and the budget curve into a .png or .svg file (needs gnuplot)"},
        {.kind = OPTION_COUNT, .name = "layer", .argument = "N", .value = &inspect.layer, .low = 0, .high = 1e6,
         .given = &inspect.layer_given, .help = "show one layer alone, the first is 0"},
        {.kind = OPTION_FLAG, .name = "verify", .value = &inspect.verify,
         .help = "check every checksum, also of keys and values larger than half the memory"},
        {.kind = OPTION_END},
    };
    /* clang-format on */
    struct sqz_context_options context_options;
    options_parse(&help, options, argc, argv, 1, 1);
    inspect.path = argv[1];
    if (inspect.plot && !plot_can_draw(inspect.plot))
        usage_error("--plot %s: allowed is a name that ends in .png or .svg", inspect.plot);
    outputs_check((const struct output[]){{"--plot", inspect.plot, OUTPUT_PICTURE}, {0}}, &inspect.path, 1);
    sqz_context_options_default(&context_options);
    context_options.verify = inspect.verify ? SQZ_VERIFY_ALL : SQZ_VERIFY_AUTO;
    struct sqz_context *context = open_context(inspect.path, &context_options);
    inspect.n_shards = sqz_context_n_shards(context);
    if (inspect.plot && inspect.n_shards)
        die("%s: clusters of a context in %u shards are not drawn", inspect.path, inspect.n_shards);
    sqz_context_get_info(context, &inspect.info);
    inspect.last = inspect.info.n_layer;
    if (inspect.layer_given) {
        if (inspect.layer >= inspect.info.n_layer)
            usage_error("--layer %zu: the context has layers 0 to %u", inspect.layer, inspect.info.n_layer - 1);
        inspect.first = (uint32_t)inspect.layer;
        inspect.last = inspect.first + 1;
    }
    count_clusters(&inspect, context);
    curve_set_create(&inspect.curves, context, inspect.first, inspect.last);
    int code = show(&inspect);
    curve_set_free(&inspect.curves);
    sqz_context_free(context);
    return code;
}
