/*
 * squeeze prepare: a document becomes a context file. With --from, an existing
 * context is clustered anew without its model. The output appears whole or not
 * at all; an interrupted or failed run leaves an older file as it was.
 */
#define _POSIX_C_SOURCE 200809L

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common.h"
#include "inputs.h"
#include "json_output.h"
#include "many_ranks.h"
#include "options.h"
#include "outputs.h"
#include "progress.h"
#include "squeeze_flags.h"
#include "texts.h"

static const struct option_rule rules[] = {
    {"model truncate rope-scale reserve raw gpu-layers gpu-memory split gpu-copies", "from",
     "the context is taken as its model read it"},
    SQUEEZE_FLAG_RULE,
    {0},
};

static const struct command_help help = {
    "prepare", "DOCUMENT",
    "Reads a document once with the model and writes a context file that 'ask' and 'chat' answer from. DOCUMENT is "
    "UTF-8 text, '-' standard input.",
    "  squeeze prepare book.txt\n"
    "  squeeze prepare - -o notes.sqz.gguf < notes.txt\n"
    "  squeeze prepare long.txt --truncate --reserve 1000\n"
    "  mpirun -n 4 squeeze prepare book.txt\n"
    "  squeeze prepare --from book.sqz.gguf --rule paper -o paper.sqz.gguf\n",
    rules};

struct prepare {
    const char *model_path, *output_option, *from;
    size_t n_threads, truncate, reserve, shards;
    double rope_scale;
    struct gpu_flags gpu;
    bool raw, quiet, json;
    struct squeeze_flags squeeze;
    struct sqz_prepare_options options;
    struct sqz_prepare_report report;
    char *output;
    char model_name[128];
    uint64_t weight_copies_bytes;
};

/* Whether a name's ending says no more than that it is text: "report-2024.06" has none that does. */
static bool is_text_ending(const char *ending)
{
    static const char *const known[] = {".txt",  ".text", ".md",  ".markdown", ".rst",
                                        ".adoc", ".org",  ".tex", ".htm",      ".html"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcasecmp(ending, known[i]) == 0) return true;
    return false;
}

/* "dir/book.txt" -> "dir/book.sqz.gguf", "dir/v1.2" -> "dir/v1.2.sqz.gguf"; malloc'ed. */
static char *default_output(const char *document)
{
    const char *slash = strrchr(document, '/');
    const char *name = slash ? slash + 1 : document;
    const char *dot = strrchr(name, '.');
    size_t stem = dot && dot > name && is_text_ending(dot) ? (size_t)(dot - document) : strlen(document);
    char *path = malloc(stem + sizeof ".sqz.gguf");
    if (!path) die("out of memory");
    memcpy(path, document, stem);
    memcpy(path + stem, ".sqz.gguf", sizeof ".sqz.gguf");
    return path;
}

/* Refuses what gives the output no name: standard input, a pipe such as <(...), a device, another context. */
static void require_name(const struct prepare *prepare, const char *document)
{
    struct stat status;
    if (prepare->from) usage_error("-o FILE is needed with --from");
    if (strcmp(document, "-") == 0)
        usage_error("-o FILE is needed with a document from standard input: squeeze prepare - -o NAME.sqz.gguf");
    const bool is_named = strncmp(document, "/dev/", 5) != 0 && strncmp(document, "/proc/", 6) != 0;
    if (stat(document, &status) == 0 && !S_ISDIR(status.st_mode) && (!S_ISREG(status.st_mode) || !is_named)) {
        usage_error("-o FILE is needed: %s is no file with a name of its own; squeeze prepare ... -o NAME.sqz.gguf",
                    document);
    }
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* Where no name was given, the context of another document (book.md beside book.txt) is not replaced. One that cannot
 * be opened is of use to nobody. */
static void check_default_output(const struct prepare *prepare, const char *document)
{
    struct sqz_error error;
    struct sqz_context *context;
    struct sqz_context_info info;
    if (access(prepare->output, F_OK) != 0 || sqz_context_open(&context, prepare->output, NULL, &error) != SQZ_OK)
        return;
    sqz_context_get_info(context, &info);
    if (!info.source_name || strcmp(info.source_name, base_name(document)) != 0) {
        usage_error("%s is there, prepared from another document than %s; choose a name with -o", prepare->output,
                    base_name(document));
    }
    sqz_context_free(context);
}

static void check_output(struct prepare *prepare, const char *document)
{
    char *model = prepare->from ? NULL : choose_model(prepare->model_path);
    const char *inputs[] = {prepare->from, document, model};
    const struct output outputs[] = {{"-o", prepare->output, OUTPUT_CONTEXT}, {0}};
    outputs_check(outputs, inputs, sizeof inputs / sizeof *inputs);
    if (!prepare->output_option) check_default_output(prepare, document);
    free(model);
}

static void print_summary(const struct prepare *prepare)
{
    const struct sqz_prepare_report *report = &prepare->report;
    char tokens[NUMBER_TEXT_MAX], left[NUMBER_TEXT_MAX], size[NUMBER_TEXT_MAX], name[PLAIN_TEXT_MAX];
    printf("%s: %s tokens, %s\n", plain_text(name, prepare->output), count_text(tokens, report->n_context_tokens),
           bytes_text(size, report->file_bytes));
    if (!prepare->from)
        printf("room left for question and answer: %s tokens\n", count_text(left, report->n_left_tokens));
    if (report->budget_floor < 1.0f) printf("least budget: %.3g\n", (double)report->budget_floor);
    else printf("least budget: 1, every question reads everything\n");
    printf("%.1f s: read %.1f s", report->total_seconds, report->read_seconds);
    if (report->read_seconds > 0) printf(" (%.0f tokens/s)", (double)report->n_context_tokens / report->read_seconds);
    printf(", cluster %.1f s, calibrate %.1f s, write %.1f s\n", report->cluster_seconds, report->calibrate_seconds,
           report->write_seconds);
}

static int print_report_json(const struct prepare *prepare)
{
    const struct sqz_prepare_report *report = &prepare->report;
    json_t *root = json_object();
    json_object_set_new(root, "output", json_text(prepare->output));
    json_object_set_new(root, "model", json_text(prepare->model_name));
    json_object_set_new(root, "rule", json_string(rule_names[prepare->squeeze.rule]));
    json_object_set_new(root, "levels", json_count(prepare->options.squeeze.n_levels));
    json_object_set_new(root, "n_document_tokens", json_count(report->n_document_tokens));
    json_object_set_new(root, "n_context_tokens", json_count(report->n_context_tokens));
    if (!prepare->from) json_object_set_new(root, "n_left_tokens", json_count(report->n_left_tokens));
    json_object_set_new(root, "budget_floor", json_number((double)report->budget_floor));
    json_object_set_new(root, "file_bytes", json_count(report->file_bytes));
    json_object_set_new(root, "n_card_layers", json_count(report->n_card_layers));
    json_object_set_new(root, "n_host_layers", json_count(report->n_host_layers));
    json_object_set_new(root, "fallback", report->fallback[0] ? json_text(report->fallback) : json_null());
    json_object_set_new(root, "weight_copies_bytes", json_count(prepare->weight_copies_bytes));
    json_object_set_new(root, "read_seconds", json_number(report->read_seconds));
    json_object_set_new(root, "cluster_seconds", json_number(report->cluster_seconds));
    json_object_set_new(root, "calibrate_seconds", json_number(report->calibrate_seconds));
    json_object_set_new(root, "write_seconds", json_number(report->write_seconds));
    json_object_set_new(root, "seconds", json_number(report->total_seconds));
    json_object_set_new(root, "version", json_text(sqz_version()));
    json_object_set_new(root, "command", json_command_line());
    return print_json(root);
}

/* Says why it failed and returns the exit code. */
static int report_failure(const struct prepare *prepare, const struct sqz_error *error)
{
    if (error->status == SQZ_ERROR_CANCELLED && signal_caught()) {
        warn("interrupted; nothing was written, %s is as it was", prepare->output);
        return 128 + signal_caught();
    }
    return report(error);
}

static enum sqz_status run_from(struct prepare *prepare, struct sqz_error *error)
{
    struct sqz_context_info info;
    struct sqz_context *context = open_context(prepare->from, NULL);
    sqz_context_get_info(context, &info);
    snprintf(prepare->model_name, sizeof prepare->model_name, "%s", info.model_name);
    prepare->options.source_name = info.source_name;
    enum sqz_status status = sqz_context_squeeze(context, prepare->output, &prepare->options, (int)prepare->n_threads,
                                                 &prepare->report, error);
    sqz_context_free(context);
    return status;
}

static enum sqz_status run_document(struct prepare *prepare, const char *document, struct sqz_error *error)
{
    struct sqz_model_info info;
    size_t n_bytes = 0;
    char *text = read_document(document, prepare->raw, prepare->output, &n_bytes);
    prepare->gpu.prepares = prepare->shards < 2; /* into shards all layers are read at once */
    struct sqz_model *model =
        open_model_on(prepare->model_path, prepare->n_threads, prepare->rope_scale, &prepare->gpu);
    if (!prepare->raw) warn_of_template(model);
    sqz_model_get_info(model, &info);
    snprintf(prepare->model_name, sizeof prepare->model_name, "%s", info.name);
    prepare->options.source_name = strcmp(document, "-") == 0 ? NULL : base_name(document);
    if (prepare->truncate == SIZE_MAX)
        prepare->truncate = info.n_context_tokens > prepare->reserve ? info.n_context_tokens - prepare->reserve : 1;
    prepare->options.truncate_tokens = prepare->truncate;
    char *path = choose_model(prepare->model_path);
    ranks_prepare_begin(&prepare->options, path, info.fingerprint, prepare->n_threads, prepare->rope_scale,
                        prepare->output, text, n_bytes);
    free(path);
    enum sqz_status status =
        sqz_prepare(model, text, n_bytes, prepare->output, &prepare->options, &prepare->report, error);
    ranks_prepare_end(status, error, prepare->report.n_context_tokens, &info);
    sqz_model_get_info(model, &info);
    prepare->weight_copies_bytes = info.weight_copies_bytes;
    sqz_model_free(model);
    free(text);
    return status;
}

static void warn_of_limits(const struct prepare *prepare)
{
    const struct sqz_prepare_report *report = &prepare->report;
    if (report->n_left_tokens < prepare->reserve) {
        warn("only %zu tokens are left for question and answer, %zu were asked for; --truncate=%zu leaves them",
             report->n_left_tokens, prepare->reserve,
             report->n_context_tokens > prepare->reserve - report->n_left_tokens
                 ? report->n_context_tokens - (prepare->reserve - report->n_left_tokens)
                 : 1);
    }
    if (report->n_host_layers)
        warn("%zu of %zu layers were clustered on the CPU: the card has no room for them (--gpu-memory), or no kernel "
             "for "
             "their shape or these options",
             report->n_host_layers, report->n_card_layers);
    if (report->fallback[0]) warn("%s", report->fallback);
    if (prepare->truncate && report->n_context_tokens < report->n_document_tokens) {
        warn("the document's %zu tokens were cut to a context of %zu", report->n_document_tokens,
             report->n_context_tokens);
    }
}

int cmd_prepare(int argc, char **argv)
{
    struct prepare prepare = {.reserve = 256, .rope_scale = 1.0, .gpu = GPU_FLAGS_INIT, .squeeze = SQUEEZE_FLAGS_INIT};
    /* clang-format off */
    const struct option options[] = {
        MODEL_OPTION(prepare.model_path),
        {.kind = OPTION_TEXT, .letter = 'o', .name = "output", .argument = "FILE", .value = &prepare.output_option,
         .help = "context file to write (default: the document's name and .sqz.gguf, in place of .txt, .md and the like)"},
        {.kind = OPTION_TEXT, .name = "from", .argument = "CONTEXT", .value = &prepare.from,
         .help = "cluster an existing context anew, without its model and document"},
        {.kind = OPTION_COUNT_MAYBE, .name = "truncate", .argument = "N", .value = &prepare.truncate, .low = 1,
         .high = 1e9, .example = "7000", .help = "keep the first N tokens of the context, or what fits"},
        {.kind = OPTION_REAL, .name = "rope-scale", .argument = "S", .value = &prepare.rope_scale, .low = 1,
         .high = 64, .example = "2", .help = "stretch the model's context S times (beside its own RoPE scaling)"},
        {.kind = OPTION_COUNT, .name = "reserve", .argument = "N", .value = &prepare.reserve, .low = 0, .high = 1e9,
         .example = "256", .help = "tokens wanted for question and answer; a warning when fewer are left (256)"},
        {.kind = OPTION_FLAG, .name = "raw", .value = &prepare.raw, .help = "no chat template around the document"},
        {.kind = OPTION_COUNT, .name = "shards", .argument = "N", .value = &prepare.shards, .low = 1, .high = 1024,
         .example = "4", .help = "write N shards beside an index of them, for as many processes (1: one file; under mpirun a multiple of "
                 "those)"},
        SQUEEZE_FLAG_OPTIONS(prepare.squeeze),
        THREADS_OPTION(prepare.n_threads),
        GPU_OPTIONS(prepare.gpu),
        {.kind = OPTION_FLAG, .letter = 'q', .name = "quiet", .value = &prepare.quiet,
         .help = "no progress and no summary"},
        JSON_OPTION(prepare.json),
        {.kind = OPTION_END},
    };
    /* clang-format on */
    struct sqz_error error = {0};
    struct progress progress;
    int n = options_parse(&help, options, argc, argv, 0, 1);
    const char *document = argv[1];
    if (prepare.from && ranks_count() > 1) usage_error("--from is one process; under mpirun documents are prepared");
    ranks_take_shards(&prepare.shards, &prepare.gpu.n_layers);
    if ((n == 0) != (prepare.from != NULL)) {
        usage_error(n == 0 ? "no document; usage: squeeze prepare DOCUMENT [-o FILE]"
                           : "--from takes no document: it uses the context's own keys");
    }
    if (!prepare.output_option) require_name(&prepare, document);
    sqz_prepare_options_default(&prepare.options);
    squeeze_flags_apply(&prepare.squeeze, &prepare.options.squeeze);
    prepare.output = prepare.output_option ? strdup(prepare.output_option) : default_output(document);
    if (!prepare.output) die("out of memory");
    check_output(&prepare, n == 1 ? document : NULL);
    prepare.options.reserve_tokens = prepare.reserve;
    prepare.options.raw = prepare.raw;
    prepare.options.n_shards = (uint32_t)prepare.shards;
    prepare.options.progress = progress_show;
    prepare.options.user_data = &progress;

    catch_signals();
    progress_begin(&progress, prepare.quiet, "");
    enum sqz_status status = prepare.from ? run_from(&prepare, &error) : run_document(&prepare, document, &error);
    progress_end(&progress);
    int code = 0;
    if (status != SQZ_OK) {
        code = report_failure(&prepare, &error);
    } else {
        if (!prepare.from) warn_of_limits(&prepare);
        if (prepare.json) {
            code = print_report_json(&prepare);
        } else if (!prepare.quiet) {
            print_summary(&prepare);
            code = close_stdout();
        }
    }
    free(prepare.output);
    return code;
}
