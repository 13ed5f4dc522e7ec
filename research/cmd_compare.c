/*
 * squeeze compare: how far squeezed answers are from dense ones. Reference
 * answers are teacher-forced through a dense session (budget 1) and a squeezed
 * one for every budget, side by side; at each answer token the distributions
 * of the next token are compared. Or, with --against-cpu, through a session on a
 * card and one on the CPU for every budget: what the card alone makes of it.
 *
 * The logits that predict answer token i are those after token i - 1 (the
 * question's last token for the first), so the last answer token is never run.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "answer.h"
#include "common.h"
#include "distance.h"
#include "eval_file.h"
#include "gpu.h"
#include "inputs.h"
#include "json_output.h"
#include "kept_contexts.h"
#include "many_ranks.h"
#include "options.h"
#include "outputs.h"
#include "squeeze_flags.h"

static const struct option_rule rules[] = {
    SQUEEZE_FLAG_RULE,
    {"budget", "levels=0", "without clusters every budget reads everything"},
    {"against-cpu", "gpu-layers=0", "nothing runs on a card"},
    {0},
};

static const struct command_help help = {
    "compare", "FILE.jsonl",
    "Measures how far squeezed answers are from dense ones: reference answers are run through both, token by token. "
    "FILE holds JSON lines with input (the document), instructions (questions) and outputs (answers).",
    "  squeeze compare quality.jsonl --documents 5 --questions 4\n"
    "  squeeze compare quality.jsonl --keep contexts --budget 0.05,0.1,0.2 --json\n"
    "  squeeze compare quality.jsonl --keep contexts --rule paper --levels 2\n"
    "  squeeze compare quality.jsonl --documents 5 --budget 0.1,1 --against-cpu\n",
    rules};

/* Room for the template around a question, when it is judged whether a document fits. */
enum { TEMPLATE_TOKENS = 64 };

/* Calibration queries that a kept context holds at least, so that it serves every rule. */
enum { KEPT_CALIBRATION = 128 };

struct budget_result {
    double budget;
    struct distance distance;
    struct sqz_attention_stats question, answer;
};

struct compare {
    const char *path, *model_path, *keep;
    size_t documents, questions, skip, n_threads, n_shards;
    double rope_scale;
    bool json, quiet, against_cpu;
    struct gpu_flags gpu;
    struct real_list budgets;
    struct squeeze_flags squeeze;
    struct sqz_squeeze_options options;
    struct sqz_model *model, *on_cpu; /* on_cpu: the same again, with against_cpu */
    struct sqz_model_info model_info;
    struct kept_contexts kept;
    size_t n_documents, n_questions, n_skipped_documents, n_skipped_questions;
    bool changed;     /* the file, while it was read */
    json_t *left_out; /* {"line", "question", "why"} of what was skipped */
    struct budget_result results[REAL_LIST_MAX];
    struct sqz_session
        *sessions[2 * REAL_LIST_MAX]; /* [n_sessions] of the budgets, then what they are compared with: */
    size_t n_sessions;                /* the CPU's of the budgets, or a dense one */
};

/* The session that budget i's is compared with. */
static struct sqz_session *reference_session(const struct compare *compare, size_t i)
{
    return compare->sessions[compare->budgets.n + (compare->against_cpu ? i : 0)];
}

/* ---- Measuring ------------------------------------------------------------------------ */

static enum sqz_status run_everywhere(struct compare *compare, const int32_t *tokens, size_t n_tokens,
                                      struct sqz_error *error)
{
    enum sqz_status status = SQZ_OK;
    for (size_t i = 0; i < compare->n_sessions && status == SQZ_OK; i++)
        status = sqz_session_run(compare->sessions[i], tokens, n_tokens, error);
    stop_on(SQZ_OK, NULL); /* or when interrupted */
    return status;
}

static void collect_stats(struct compare *compare, bool of_answer)
{
    struct sqz_session_stats stats;
    for (size_t i = 0; i < compare->budgets.n; i++) {
        struct budget_result *result = &compare->results[i];
        sqz_session_get_stats(compare->sessions[i], &stats);
        sqz_attention_stats_add(of_answer ? &result->answer : &result->question, &stats.attention);
        sqz_session_clear_stats(compare->sessions[i]);
    }
}

static bool compare_logits(struct compare *compare, int32_t reference)
{
    for (size_t i = 0; i < compare->budgets.n; i++)
        if (!distance_add(&compare->results[i].distance, sqz_session_logits(reference_session(compare, i)),
                          sqz_session_logits(compare->sessions[i]), compare->model_info.n_vocab, reference))
            return false;
    return true;
}

/* Runs the question and its answer through every session. What was added to the results is of the whole answer, or,
 * when it returns false with `error` filled, for the caller to take back. */
static bool compare_answer(struct compare *compare, const int32_t *question, size_t n_question, const int32_t *answer,
                           size_t n_answer, struct sqz_error *error)
{
    if (run_everywhere(compare, question, n_question, error) != SQZ_OK) return false;
    collect_stats(compare, false);
    for (size_t i = 0; i < n_answer; i++) {
        if (!compare_logits(compare, answer[i])) {
            snprintf(error->message, sizeof error->message, "the model gave logits that are not finite numbers");
            return false;
        }
        if (i + 1 < n_answer && run_everywhere(compare, &answer[i], 1, error) != SQZ_OK) return false;
    }
    collect_stats(compare, true);
    return true;
}

/* The results of before a question; the memory of the distances stays theirs. */
static void take_back(struct compare *compare, const struct budget_result before[REAL_LIST_MAX])
{
    for (size_t i = 0; i < compare->budgets.n; i++) {
        struct budget_result *result = &compare->results[i];
        double *kl = result->distance.kl;
        const size_t capacity = result->distance.capacity;
        *result = before[i];
        result->distance.kl = kl;
        result->distance.capacity = capacity;
    }
}

/* Says and notes what is skipped; question 0: the whole document. */
static void leave_out(struct compare *compare, const struct eval_document *document, size_t question,
                      const char *format, ...) PRINTF_LIKE(4, 5);
static void leave_out(struct compare *compare, const struct eval_document *document, size_t question,
                      const char *format, ...)
{
    char why[600], where[48] = "";
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(why, sizeof why, format, arguments);
    va_end(arguments);
    if (question) snprintf(where, sizeof where, "question %zu ", question);
    warn("%s:%zu: %sskipped: %s", compare->path, document->line, where, why);
    json_t *entry = json_object();
    json_object_set_new(entry, "line", json_count(document->line));
    json_object_set_new(entry, "question", question ? json_count(question) : json_null());
    json_object_set_new(entry, "why", json_text(why));
    json_array_append_new(compare->left_out, entry);
    *(question ? &compare->n_skipped_questions : &compare->n_skipped_documents) += 1;
}

/* Asks question `number`; false when it was left out. */
static bool compare_question(struct compare *compare, const struct eval_document *document, size_t number)
{
    const struct eval_question *question = &document->questions[number - 1];
    struct sqz_error error = {0};
    struct sqz_session_stats stats;
    int32_t *question_tokens = NULL, *answer_tokens = NULL;
    size_t n_question = 0, n_answer = 0;
    for (size_t i = 0; i < compare->n_sessions; i++) {
        sqz_session_reset(compare->sessions[i]);
        sqz_session_clear_stats(compare->sessions[i]);
    }
    const char *answer = question->references[0];
    const bool usable =
        sqz_session_question_tokens(compare->sessions[0], question->text, strlen(question->text), true,
                                    &question_tokens, &n_question, &error) == SQZ_OK &&
        sqz_model_tokenize(compare->model, answer, strlen(answer), &answer_tokens, &n_answer, &error) == SQZ_OK;
    sqz_session_get_stats(compare->sessions[0], &stats);
    const bool fits = usable && n_answer > 0 && n_question + n_answer - 1 <= stats.n_left_tokens;
    bool done = false;
    if (!usable) {
        leave_out(compare, document, number, "%s%s", question_tokens ? "its answer: " : "", error.message);
    } else if (!fits) {
        leave_out(compare, document, number, "%zu tokens, which with the answer's %zu do not fit behind the document",
                  n_question, n_answer);
    } else {
        struct budget_result before[REAL_LIST_MAX];
        memcpy(before, compare->results, sizeof before);
        done = compare_answer(compare, question_tokens, n_question, answer_tokens, n_answer, &error);
        if (!done) {
            if (ranks_trouble()) die("%s", ranks_trouble());
            take_back(compare, before);
            leave_out(compare, document, number, "%s", error.message);
        }
    }
    free(question_tokens);
    free(answer_tokens);
    return done;
}

static size_t questions_of(const struct compare *compare, const struct eval_document *document)
{
    return document->n_questions < compare->questions ? document->n_questions : compare->questions;
}

static size_t count_tokens(const struct compare *compare, const char *text, size_t n_bytes)
{
    struct sqz_error error = {0};
    int32_t *tokens = NULL;
    size_t n = 0;
    sqz_model_tokenize(compare->model, text, n_bytes, &tokens, &n, &error); /* none where it fails */
    free(tokens);
    return n;
}

/* Whether the document with its longest question and answer fits; asked before the costly reading. */
static bool document_fits(struct compare *compare, const struct eval_document *document)
{
    size_t n_document = count_tokens(compare, document->text, document->text_bytes), longest = 0;
    for (size_t i = 0; i < questions_of(compare, document); i++) {
        const char *question = document->questions[i].text, *answer = document->questions[i].references[0];
        size_t n = count_tokens(compare, question, strlen(question)) + count_tokens(compare, answer, strlen(answer));
        longest = n > longest ? n : longest;
    }
    if (n_document + longest + TEMPLATE_TOKENS > compare->model_info.n_context_tokens) {
        leave_out(compare, document, 0, "%zu tokens and %zu of question, answer and template; the model holds %u",
                  n_document, longest + TEMPLATE_TOKENS, compare->model_info.n_context_tokens);
        return false;
    }
    return true;
}

/* exact: the context that dense answers are of. */
static bool create_sessions(struct compare *compare, const struct sqz_context *context, const struct sqz_context *exact,
                            const char *label, struct sqz_error *error)
{
    struct sqz_session_options options;
    const size_t n = compare->budgets.n;
    compare->n_sessions = compare->against_cpu ? 2 * n : n + 1;
    for (size_t i = 0; i < compare->n_sessions; i++) {
        struct sqz_model *model = i >= n && compare->against_cpu ? compare->on_cpu : compare->model;
        sqz_session_options_default(&options);
        options.budget = i < n || compare->against_cpu ? (float)compare->budgets.value[i % n] : 1.0f;
        const struct sqz_context *of = i < n || compare->against_cpu ? context : exact;
        if (sqz_session_create(&compare->sessions[i], model, of, &options, error) != SQZ_OK) return false;
        sqz_session_set_cancel(compare->sessions[i], signal_cancelled, NULL);
        if (!compare->quiet && i < n) say_floor(compare->sessions[i], label);
    }
    if (!compare->quiet && compare->n_documents == 0) say_fallback(compare->sessions[0], "");
    return true;
}

static void free_sessions(struct compare *compare)
{
    for (size_t i = 0; i < compare->n_sessions; i++) {
        sqz_session_free(compare->sessions[i]);
        compare->sessions[i] = NULL;
    }
}

/* The document's context and, where that has rounded rows, in *base one that has not; else that stays NULL. */
static struct sqz_context *open_document(struct compare *compare, const struct eval_document *document,
                                         const char *label, struct sqz_context **base, struct sqz_error *error)
{
    const struct sqz_squeeze_options *options = &compare->options; /* in shards of F16 rows, too */
    if (options->keys == SQZ_INDEX_F16 && options->rows == SQZ_ROWS_F16)
        return kept_contexts_open(&compare->kept, document->text, document->text_bytes, 0, options, label, error);
    *base = kept_contexts_base(&compare->kept, document->text, document->text_bytes, 0, label, error);
    return *base ? kept_contexts_squeeze(&compare->kept, *base, options, label, error) : NULL;
}

static void compare_document(struct compare *compare, const struct eval_document *document)
{
    char label[48];
    struct sqz_context_info info;
    struct sqz_error error = {0};
    double start = now_seconds();
    snprintf(label, sizeof label, "document %zu: ", compare->n_documents + 1);
    struct sqz_context *base = NULL, *context = open_document(compare, document, label, &base, &error);
    if (!context || !create_sessions(compare, context, base ? base : context, label, &error)) {
        stop_on(SQZ_OK, NULL); /* or when interrupted */
        if (ranks_trouble()) die("%s", ranks_trouble());
        leave_out(compare, document, 0, "%s", error.message);
        free_sessions(compare);
        sqz_context_free(context);
        sqz_context_free(base);
        return;
    }
    double prepared = now_seconds();
    sqz_context_get_info(context, &info);
    size_t before = compare->results[0].distance.n_tokens;
    for (size_t i = 0; i < questions_of(compare, document); i++)
        compare->n_questions += compare_question(compare, document, i + 1);
    compare->n_documents++;
    if (!compare->quiet) {
        fprintf(stderr, "%s%zu tokens in %.1f s, %zu answer tokens in %.1f s\n", label, info.n_tokens, prepared - start,
                compare->results[0].distance.n_tokens - before, now_seconds() - prepared);
    }
    free_sessions(compare);
    sqz_context_free(context);
    sqz_context_free(base);
}

static void compare_file(struct compare *compare)
{
    struct eval_file file;
    struct eval_document document;
    size_t n_seen = 0;
    eval_open(&file, compare->path, NULL);
    while (compare->n_documents < compare->documents && eval_next(&file, &document) == EVAL_DOCUMENT) {
        if (n_seen++ >= compare->skip) {
            if (document_fits(compare, &document)) compare_document(compare, &document);
        }
        eval_release(&document);
    }
    if (file.problem.n_bytes > 0) { /* every line was checked */
        warn("%s:%zu: the file changed while it was read: %s", compare->path, file.line, file.problem.text);
        compare->changed = true;
    }
    eval_close(&file);
    if (compare->results[0].distance.n_tokens == 0)
        die("%s: no document with a question that fits: %zu skipped", compare->path, compare->n_skipped_documents);
}

/* ---- Output ------------------------------------------------------------------------------ */

static void set_result(json_t *root, struct budget_result *result)
{
    struct distance *distance = &result->distance;
    struct sqz_attention_stats both = result->question;
    double n = (double)distance->n_tokens;
    sqz_attention_stats_add(&both, &result->answer);
    json_object_set_new(root, "budget_asked", json_number(result->budget));
    json_object_set_new(root, "budget_read", json_number(sqz_attention_stats_share(&both)));
    json_object_set_new(root, "budget_read_question", json_number(sqz_attention_stats_share(&result->question)));
    json_object_set_new(root, "budget_read_answer", json_number(sqz_attention_stats_share(&result->answer)));
    json_object_set_new(root, "kl_mean", json_number(distance->kl_sum / n));
    json_object_set_new(root, "kl_p99", json_number(distance_kl_quantile(distance, 0.99)));
    json_object_set_new(root, "top1", json_number((double)distance->n_top1 / n));
    json_object_set_new(root, "nll_diff", json_number((distance->nll_squeezed_sum - distance->nll_dense_sum) / n));
    json_object_set_new(root, "nll_dense", json_number(distance->nll_dense_sum / n));
    json_object_set_new(root, "tokens", json_count(distance->n_tokens));
}

static int print_results_json(struct compare *compare, double seconds)
{
    json_t *root = json_object();
    /* One budget stands at the top level; more stand in `budgets`, the first at the top as well. */
    set_result(root, &compare->results[0]);
    if (compare->budgets.n > 1) {
        json_t *list = json_array();
        for (size_t i = 0; i < compare->budgets.n; i++) {
            json_t *entry = json_object();
            set_result(entry, &compare->results[i]);
            json_array_append_new(list, entry);
        }
        json_object_set_new(root, "budgets", list);
    }
    json_object_set_new(root, "documents", json_count(compare->n_documents));
    json_object_set_new(root, "questions", json_count(compare->n_questions));
    json_object_set_new(root, "documents_skipped", json_count(compare->n_skipped_documents));
    json_object_set_new(root, "questions_skipped", json_count(compare->n_skipped_questions));
    json_object_set(root, "left_out", compare->left_out);
    json_object_set_new(root, "rule", json_string(rule_names[compare->squeeze.rule]));
    json_object_set_new(root, "keys", json_string(index_names[compare->options.keys == SQZ_INDEX_INT8]));
    json_object_set_new(root, "rows", json_string(row_format_name(compare->options.rows)));
    json_object_set_new(root, "index", json_string(index_names[compare->options.index == SQZ_INDEX_INT8]));
    json_object_set_new(root, "code_words", json_count(compare->options.code_words));
    json_object_set_new(root, "levels", json_count(compare->options.n_levels));
    json_object_set_new(root, "file", json_text(compare->path));
    json_object_set_new(root, "model", json_text(compare->model_info.name));
    json_object_set_new(root, "model_description", json_text(compare->model_info.description));
    json_object_set_new(root, "threads", json_count((uint64_t)compare->model_info.n_threads));
    json_object_set_new(root, "gpu_layers", json_count(compare->model_info.n_gpu_layers));
    if (compare->n_shards > 1) json_object_set_new(root, "shards", json_count(compare->n_shards));
    json_object_set_new(root, "compared_with", json_string(compare->against_cpu ? "CPU" : "dense"));
    json_object_set_new(root, "seconds", json_number(seconds));
    json_object_set_new(root, "version", json_text(sqz_version()));
    json_object_set_new(root, "command", json_command_line());
    return print_json(root);
}

static int print_results(struct compare *compare, double seconds)
{
    char model[PLAIN_TEXT_MAX];
    printf("%s, rule %s, %u level%s: %zu documents, %zu questions, %zu answer tokens, %.0f s\n",
           plain_text(model, compare->model_info.description), rule_names[compare->squeeze.rule],
           compare->options.n_levels, compare->options.n_levels == 1 ? "" : "s", compare->n_documents,
           compare->n_questions, compare->results[0].distance.n_tokens, seconds);
    if (compare->against_cpu)
        printf("with %u layers on a card, against the same on the CPU\n", compare->model_info.n_gpu_layers);
    for (size_t i = 0; i < json_array_size(compare->left_out); i++) {
        const json_t *entry = json_array_get(compare->left_out, i);
        char why[PLAIN_TEXT_MAX];
        printf("line %lld skipped: %s\n", (long long)json_integer_value(json_object_get(entry, "line")),
               plain_text(why, json_string_value(json_object_get(entry, "why"))));
    }
    printf("%-8s%8s%10s%8s%12s%12s%10s%11s%11s\n", "budget", "read", "question", "answer", "KL mean", "KL p99", "top 1",
           "NLL dense", "NLL diff");
    for (size_t i = 0; i < compare->budgets.n; i++) {
        struct budget_result *result = &compare->results[i];
        struct distance *distance = &result->distance;
        struct sqz_attention_stats both = result->question;
        double n = (double)distance->n_tokens;
        sqz_attention_stats_add(&both, &result->answer);
        printf("%-8g%7.1f%%%9.1f%%%7.1f%%%12.5f%12.4f%9.2f%%%11.4f%+11.4f\n", result->budget,
               100.0 * sqz_attention_stats_share(&both), 100.0 * sqz_attention_stats_share(&result->question),
               100.0 * sqz_attention_stats_share(&result->answer), distance->kl_sum / n,
               distance_kl_quantile(distance, 0.99), 100.0 * (double)distance->n_top1 / n, distance->nll_dense_sum / n,
               (distance->nll_squeezed_sum - distance->nll_dense_sum) / n);
    }
    return close_stdout();
}

static void check_outputs(const struct compare *compare)
{
    char *model = choose_model(compare->model_path);
    const char *inputs[] = {compare->path, model};
    const struct output outputs[] = {{"--keep", compare->keep, OUTPUT_FOLDER}, {0}};
    outputs_check(outputs, inputs, sizeof inputs / sizeof *inputs);
    free(model);
}

static void open_models(struct compare *compare)
{
    const struct gpu_flags none = {0};
    compare->model = open_model_on(compare->model_path, compare->n_threads, compare->rope_scale, &compare->gpu);
    sqz_model_get_info(compare->model, &compare->model_info);
    if (!compare->against_cpu) return;
    if (compare->model_info.n_gpu_layers == 0) die("--against-cpu: there is no card: %s", sqz_gpu_reason());
    compare->on_cpu = open_model_on(compare->model_path, compare->n_threads, compare->rope_scale, &none);
}

int cmd_compare(int argc, char **argv)
{
    struct compare compare = {.documents = SIZE_MAX,
                              .questions = SIZE_MAX,
                              .rope_scale = 1.0,
                              .budgets = {1, {0.1}},
                              .gpu = GPU_FLAGS_EACH,
                              .squeeze = SQUEEZE_FLAGS_INIT};
    /* clang-format off */
    const struct option options[] = {
        MODEL_OPTION(compare.model_path),
        {.kind = OPTION_COUNT, .name = "documents", .argument = "N", .value = &compare.documents, .low = 1,
         .high = 1e9, .help = "the first N documents that fit (default: all)"},
        {.kind = OPTION_COUNT, .name = "questions", .argument = "N", .value = &compare.questions, .low = 1,
         .high = 1e9, .help = "the first N questions of each (default: all)"},
        {.kind = OPTION_COUNT, .name = "skip", .argument = "N", .value = &compare.skip, .low = 0, .high = 1e9,
         .help = "pass over the first N documents"},
        {.kind = OPTION_BUDGETS, .letter = 'b', .name = "budget", .argument = "SHARE[,...]", .value = &compare.budgets,
         .help = "shares of the context that are read (default 0.1)"},
        {.kind = OPTION_TEXT, .name = "keep", .argument = "FOLDER", .value = &compare.keep,
         .help = "keep prepared documents there and use them again, also with other options below"},
        SHARDS_OPTION(compare.n_shards),
        {.kind = OPTION_REAL, .name = "rope-scale", .argument = "S", .value = &compare.rope_scale, .low = 1,
         .high = 64, .example = "2", .help = "stretch the model's context S times (beside its own RoPE scaling)"},
        {.kind = OPTION_FLAG, .name = "against-cpu", .value = &compare.against_cpu,
         .help = "compare the card's distributions with the CPU's at the same budget, in place of squeezed with dense ones"},
        SQUEEZE_FLAG_OPTIONS(compare.squeeze),
        THREADS_OPTION(compare.n_threads),
        GPU_OPTIONS(compare.gpu),
        {.kind = OPTION_FLAG, .letter = 'q', .name = "quiet", .value = &compare.quiet, .help = "no progress"},
        JSON_OPTION(compare.json),
        {.kind = OPTION_END},
    };
    /* clang-format on */
    options_parse(&help, options, argc, argv, 1, 1);
    compare.path = argv[1];
    squeeze_flags_apply(&compare.squeeze, &compare.options);
    kept_contexts_take_shards(&compare.n_shards, &compare.gpu, &compare.options);
    for (size_t i = 0; i < compare.budgets.n; i++) compare.results[i].budget = compare.budgets.value[i];
    check_outputs(&compare);
    size_t n_bad = 0;
    eval_check(compare.path, NULL, &n_bad);
    eval_stop_on_bad(n_bad);
    compare.left_out = json_array();
    catch_signals();
    double start = now_seconds();
    const size_t n_asked_threads = compare.n_threads;
    char *model_path = choose_model(compare.model_path);
    open_models(&compare);
    compare.n_threads = (size_t)compare.model_info.n_threads;
    compare.kept = (struct kept_contexts){
        .model = compare.model,
        .folder = compare.keep,
        .fingerprint = compare.model_info.fingerprint,
        .rope_scale = compare.rope_scale,
        .n_threads = compare.model_info.n_threads,
        .n_shards = (uint32_t)compare.n_shards,
        .model_path = model_path,
        .n_asked_threads = n_asked_threads,
        .n_calibration =
            compare.options.n_calibration > KEPT_CALIBRATION ? compare.options.n_calibration : KEPT_CALIBRATION,
        .quiet = compare.quiet,
    };
    kept_contexts_begin(&compare.kept);
    compare_file(&compare);
    double seconds = now_seconds() - start;
    int code = compare.json ? print_results_json(&compare, seconds) : print_results(&compare, seconds);
    /* With --documents those that do not fit are passed over as asked. */
    const bool fewer = compare.documents < SIZE_MAX && compare.n_documents == compare.documents;
    if (code == 0 && (compare.changed || compare.n_skipped_questions || (compare.n_skipped_documents && !fewer)))
        code = EXIT_INCOMPLETE;
    json_decref(compare.left_out);
    for (size_t i = 0; i < compare.budgets.n; i++) distance_free(&compare.results[i].distance);
    sqz_model_free(compare.model);
    sqz_model_free(compare.on_cpu);
    free(model_path);
    return code;
}
