/*
 * squeeze eval: accuracy of squeezed attention and of other methods against
 * dense attention, at every budget asked for. Each document is read once; all
 * its questions are asked under every method and budget on the same engine.
 *
 * With --record every document's figures are added to a file as soon as they
 * are complete, and a later run with the same options goes on behind them.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "eval.h"
#include "gpu.h"
#include "identity.h"
#include "inputs.h"
#include "json_output.h"
#include "memory.h"
#include "options.h"
#include "outputs.h"
#include "plot.h"
#include "squeeze_flags.h"
#include "synthetic.h"

/* What is measured where nothing is said; of contexts in shards what can read them. */
static const char *const every_method = "squeezed,paper,quest,window,oracle";

static const struct option_rule rules[] = {
    {"answer-tokens", "no-distances", "reference answers are not run"},
    {"reply-tokens", "no-scores !speculate", "no replies are generated"},
    {"skip prompts", "!operand", "they are of files"},
    {"document-seed", "!synthetic", "no document is made"},
    {"rule levels " SQUEEZE_FLAG_NAMES, "!methods~squeezed !methods~int4", "they describe these methods"},
    {"maps", "!methods~squeezed", "they show that method"},
    {"draft draft-budget draft-rows draft-tokens draft-weights draft-steady", "!speculate", "nothing is drafted"},
    {"draft-budget draft-rows", "draft=ngram", "the text drafts, which reads nothing of the context"},
    {"draft-weights", "draft=ngram", "the text drafts, which needs no weights"},
    {"draft-rows", "!rows", "drafts read rows of F16 (--rows int4+4 has rows in planes)"},
    {0},
};

static const struct command_help help = {
    "eval", "FILE.jsonl...",
    "Measures what squeezed attention loses, and what other methods lose at the same budget: distance of the "
    "next-token "
    "distributions from dense attention on the reference answers, and the benchmarks' own scores of generated replies. "
    "Files are of L-Eval, LongBench or RULER, or have a document, questions and answers a line; --synthetic makes "
    "tasks.",
    "  squeeze eval quality.jsonl multidoc_qa.jsonl --documents 5 --questions 3\n"
    "  squeeze eval qasper.jsonl --prompts dataset2prompt.json --methods squeezed,squeezed:2,quest --budget 0.125\n"
    "  squeeze eval --synthetic niah_single:4K,niah_multikey:4K --documents 3 --questions 10 --no-distances\n"
    "  squeeze eval quality.jsonl --keep contexts --record quality.records --plot quality.svg --json\n"
    "  squeeze eval quality.jsonl --methods int4+4,int4 --no-scores\n"
    "  mpirun -n 4 squeeze eval quality.jsonl --keep contexts\n"
    "  squeeze eval quality.jsonl --methods quantspec,streaming,snapkv,squeezed --speculate --draft self "
    "--no-distances "
    "--no-scores\n",
    rules};

/* Calibration queries that a base context holds at least, so that it serves every rule. */
enum { BASE_CALIBRATION = 128, MAX_FILES = 1024, SYNTHETIC_TASKS = 64 };

struct command {
    struct eval eval;
    struct squeeze_flags squeeze;
    const char *model_path, *methods, *synthetic, *keep, *record, *prompts, *plot, *maps;
    size_t documents, questions, skip, n_threads, answer_tokens, reply_tokens, document_seed;
    double rope_scale;
    struct gpu_flags gpu;
    struct real_list budgets;
    bool json, quiet, no_scores, no_distances;
    json_t *records, *known;                   /* array; by key, of the file of an earlier run */
    json_t *seen;                              /* keys of this run */
    char options[IDENTITY_TEXT];               /* what a record depends on but the document */
    size_t n_left_out, n_measured, n_expected; /* documents; expected: at most */
    bool changed;                              /* a file, while it was read */
    size_t n_passed_over;                      /* of those left out, what the options ask to leave out */
    double measuring_seconds;
};

/* ---- The place ---------------------------------------------------------------------------- */

/* Whether any method chooses its rows on the CPU, or attention is looked into there. All are then measured there: a card's
 * products differ by more than some methods do. */
static bool needs_cpu(const struct eval *eval)
{
    bool needs = eval->recall;
    for (size_t i = 0; i < eval->n_drafts; i++) needs = needs || eval->drafts[i].method != METHOD_SQUEEZED;
    for (size_t i = 0; i < eval->n_settings; i++) needs = needs || method_selects(eval->settings[i].method);
    return needs;
}

static void choose_place(struct command *command)
{
    if (!needs_cpu(&command->eval) || command->gpu.n_layers == 0) return;
    if (sqz_gpu_count() > 0)
        warn("quest, window, oracle, recall and drafts of other methods are computed on the CPU alone, so all of this "
             "runs there (dense, "
             "squeezed "
             "and paper run on a card)");
    command->gpu.n_layers = 0;
}

/* ---- Records -------------------------------------------------------------------------- */

/* Everything that a record depends on but the document. */
static void identify_options(struct command *command)
{
    const struct eval *eval = &command->eval;
    struct identity id = identity_begin();
    identity_print(&id, "%s|%s|%.9g|%zu|%zu|%zu|%d|%d|%d", sqz_version(), eval->model_info.fingerprint,
                   command->rope_scale, eval->max_questions, eval->max_answer_tokens, eval->max_reply_tokens,
                   eval->distances, eval->scores, eval->recall);
    identity_add_squeeze(&id, &eval->squeeze);
    for (size_t i = 0; i < eval->n_settings; i++) {
        identity_print(&id, "%d %u %.9g", (int)eval->settings[i].method, eval->settings[i].n_levels,
                       eval->settings[i].budget);
    }
    if (eval->same_bytes) identity_print(&id, "same bytes");
    if (eval->n_shards > 1) identity_print(&id, "%zu shards", eval->n_shards);
    if (eval->speculate) {
        const struct speculation_flags *f = &eval->speculation;
        identity_print(&id, "speculate %d %.9g %zu %d %d", f->draft, f->draft_budget, f->draft_tokens, f->steady,
                       f->draft_rows);
        for (size_t i = 0; i < eval->n_drafts; i++)
            identity_print(&id, "%d %u", (int)eval->drafts[i].method, eval->drafts[i].n_levels);
        if (eval->model_info.draft_size_bytes)
            identity_print(&id, " weights of %llu bytes", (unsigned long long)eval->model_info.draft_size_bytes);
    }
    if (eval->model_info.n_gpu_layers) identity_print(&id, "on a card");
    identity_end(&id, command->options);
}

static void add_texts(struct identity *id, const char *const *texts, size_t n)
{
    identity_print(id, "%zu texts", n);
    for (size_t i = 0; i < n; i++) identity_add_text(id, texts[i]);
}

/* What a document's record depends on: also how its replies are judged and how long they may be. */
static void document_key(char key[IDENTITY_TEXT], const struct command *command, const struct eval_document *document,
                         size_t length)
{
    struct identity id = identity_begin();
    if (length) identity_print(&id, "%zu tokens", length);
    identity_add_text(&id, command->options);
    identity_add_text(&id, document->task);
    identity_add(&id, document->text, document->text_bytes);
    for (size_t i = 0; i < document->n_questions && i < command->eval.max_questions; i++) {
        const struct eval_question *question = &document->questions[i];
        identity_print(&id, "%d %d %zu", (int)question->score, question->first_line, question->max_tokens);
        identity_add_text(&id, question->text);
        add_texts(&id, question->references, question->n_references);
        add_texts(&id, question->classes, question->n_classes);
    }
    identity_end(&id, key);
}

/* Lines of an earlier run. The last one may have been cut off when it was interrupted: what is no record is left out. */
static void read_records(struct command *command)
{
    command->known = json_object();
    FILE *file = command->record ? fopen(command->record, "rb") : NULL;
    if (command->record && !file && errno != ENOENT) die("%s: %s", command->record, strerror(errno));
    char *line = NULL;
    size_t capacity = 0;
    ssize_t n;
    while (file && (n = getline(&line, &capacity, file)) > 0) {
        json_t *record = json_loadb(line, (size_t)n, 0, NULL);
        const char *key = json_string_value(json_object_get(record, "key"));
        const json_t *settings = json_object_get(record, "settings");
        bool usable = key && json_is_string(json_object_get(record, "task")) &&
                      json_array_size(settings) == command->eval.n_settings;
        for (size_t i = 0; usable && i < json_array_size(settings); i++)
            usable = json_array_size(json_array_get(settings, i)) > 0;
        if (usable) json_object_set(command->known, key, record);
        json_decref(record);
    }
    free(line);
    if (file) fclose(file);
}

static void write_record(const struct command *command, const json_t *record)
{
    if (!command->record) return;
    FILE *file = fopen(command->record, "ab");
    char *line = json_dumps(record, JSON_COMPACT);
    /* After a line that was cut off, an empty one keeps this one whole. */
    if (!file || !line || fprintf(file, "\n%s\n", line) < 0 || fclose(file) != 0)
        die("%s: %s", command->record, strerror(errno));
    free(line);
}

/* ---- Documents ------------------------------------------------------------------------ */

/* The document, its context cut to `length` unless that is 0. False when there is no record of it. */
static bool run_length(struct command *command, const struct eval_document *document, size_t length)
{
    char key[IDENTITY_TEXT], label[PLAIN_TEXT_MAX + 32], task[PLAIN_TEXT_MAX];
    document_key(key, command, document, length);
    if (json_object_get(command->seen, key)) { /* files repeat documents; they would count twice */
        eval_leave_out(&command->eval, document, 0, "it came before, with the same questions");
        command->n_left_out++;
        command->n_passed_over++;
        return false;
    }
    json_object_set_new(command->seen, key, json_true());
    json_t *record = json_object_get(command->known, key);
    if (record) {
        json_array_append(command->records, record);
        return true;
    }
    const double since = now_seconds();
    snprintf(label, sizeof label, "%s %zu: ", plain_text(task, document->task), json_array_size(command->records) + 1);
    record = eval_run_document(&command->eval, document, length, label);
    if (!record) {
        command->n_left_out++;
        return false;
    }
    command->n_measured++;
    command->measuring_seconds += now_seconds() - since;
    const size_t n_done = json_array_size(command->records) + command->n_left_out + 1;
    if (!command->quiet) {
        const size_t n_left = command->n_expected > n_done ? command->n_expected - n_done : 0;
        fprintf(stderr, "%s%.0f s; %zu of at most %zu documents, about %.0f min left\n", label, now_seconds() - since,
                n_done, command->n_expected,
                (double)n_left * command->measuring_seconds / (double)command->n_measured / 60.0);
    }
    json_t *rest = record;
    record = json_pack("{s:s}", "key", key); /* first: outputs.h knows the file by it */
    json_object_update(record, rest);
    json_decref(rest);
    write_record(command, record);
    json_array_append_new(command->records, record);
    return true;
}

/* At every length that was asked for. False when there is no record of it at any. */
static bool run_document(struct command *command, const struct eval_document *document)
{
    const struct count_list *lengths = &command->eval.lengths;
    bool any = false;
    for (size_t i = 0; i < lengths->n; i++) any = run_length(command, document, lengths->value[i]) || any;
    return lengths->n ? any : run_length(command, document, 0);
}

static void run_file(struct command *command, const char *path)
{
    struct eval_file file;
    struct eval_document document;
    size_t n_seen = 0, n_taken = 0;
    eval_open(&file, path, command->prompts);
    while (n_taken < command->documents && eval_next(&file, &document) == EVAL_DOCUMENT) {
        if (n_seen++ >= command->skip) n_taken += run_document(command, &document);
        eval_release(&document);
    }
    if (file.problem.n_bytes > 0) { /* every line was checked */
        warn("%s:%zu: the file changed while it was read: %s", path, file.line, file.problem.text);
        command->changed = true;
    }
    eval_close(&file);
}

/* Tokens as the model counts them. */
static size_t count_tokens(void *user_data, const char *text, size_t n_bytes)
{
    struct eval *eval = user_data;
    struct sqz_error error = {0};
    int32_t *tokens = NULL;
    size_t n = 0;
    if (sqz_model_tokenize(eval->model, text, n_bytes, &tokens, &n, &error) != SQZ_OK) exit(report(&error));
    free(tokens);
    return n;
}

/* The made document in the form of one that was read; points into `made`. */
static void take_synthetic(struct eval_document *document, const struct synthetic_document *made,
                           enum synthetic_kind kind)
{
    memset(document, 0, sizeof *document);
    snprintf(document->task, sizeof document->task, "%s", synthetic_names[kind]);
    document->text = made->text;
    document->text_bytes = made->text_bytes;
    document->n_questions = made->n_questions;
    document->questions = calloc(made->n_questions, sizeof *document->questions);
    if (!document->questions) die("out of memory");
    for (size_t i = 0; i < made->n_questions; i++) {
        struct eval_question *question = &document->questions[i];
        question->text = made->questions[i].question;
        question->n_references = made->questions[i].n_answers;
        question->references = malloc(question->n_references * sizeof *question->references);
        if (!question->references) die("out of memory");
        for (size_t a = 0; a < question->n_references; a++) question->references[a] = made->questions[i].answers[a];
        question->score = SCORE_ALL_STRINGS;
        question->max_tokens = 128;
    }
}

struct synthetic_task {
    enum synthetic_kind kind;
    size_t n_tokens;
};

static void make_synthetic(struct command *command, struct synthetic_document *made, const struct synthetic_task *task,
                           size_t number)
{
    synthetic_make(made, task->kind, task->n_tokens, command->questions < SIZE_MAX ? command->questions : 1,
                   command->document_seed + number, count_tokens, &command->eval);
}

static size_t synthetic_documents(const struct command *command)
{
    return command->documents < SIZE_MAX ? command->documents : 1;
}

static void run_synthetic(struct command *command, const struct synthetic_task *task)
{
    for (size_t i = 0; i < synthetic_documents(command); i++) {
        struct synthetic_document made;
        struct eval_document document;
        make_synthetic(command, &made, task, i);
        take_synthetic(&document, &made, task->kind);
        run_document(command, &document);
        eval_release(&document);
        synthetic_free(&made);
    }
}

/* Reads --synthetic into tasks; usage error when one is none. Returns how many. */
static size_t parse_synthetic(const struct command *command, struct synthetic_task *tasks)
{
    size_t n = 0;
    char *text = command->synthetic ? strdup(command->synthetic) : NULL, *rest = text;
    for (char *spec = text ? strtok_r(text, ",", &rest) : NULL; spec; spec = strtok_r(NULL, ",", &rest)) {
        if (n == SYNTHETIC_TASKS) usage_error("--synthetic: more than %d tasks", SYNTHETIC_TASKS);
        if (!synthetic_parse(spec, &tasks[n].kind, &tasks[n].n_tokens)) {
            usage_error("--synthetic: '%s': allowed is a task and its length in tokens, for example niah_single:4096; "
                        "tasks are niah_single, niah_multikey, niah_multivalue, niah_multiquery, variable_tracking, "
                        "common_words and frequent_words",
                        spec);
        }
        n++;
    }
    free(text);
    return n;
}

/* Every line of every file, before anything is prepared: what is wrong is listed, and the run ends. */
static void check_files(struct command *command, char **paths, size_t n_paths)
{
    size_t n_bad = 0;
    for (size_t i = 0; i < n_paths; i++) {
        const size_t n = eval_check(paths[i], command->prompts, &n_bad);
        const size_t behind = n > command->skip ? n - command->skip : 0;
        command->n_expected += behind < command->documents ? behind : command->documents;
    }
    eval_stop_on_bad(n_bad);
}

static void run_all(struct command *command, char **paths, size_t n_paths, const struct synthetic_task *tasks,
                    size_t n_tasks)
{
    command->seen = json_object();
    read_records(command);
    command->n_expected += n_tasks * synthetic_documents(command);
    command->n_expected *= command->eval.lengths.n ? command->eval.lengths.n : 1;
    for (size_t i = 0; i < n_tasks; i++) { /* a length that is too short is found before the files' work */
        struct synthetic_document made;
        make_synthetic(command, &made, &tasks[i], 0);
        synthetic_free(&made);
    }
    for (size_t i = 0; i < n_paths; i++) run_file(command, paths[i]);
    for (size_t i = 0; i < n_tasks; i++) run_synthetic(command, &tasks[i]);
    if (json_array_size(command->records) == 0)
        die("no document with a question that fits: %zu left out", command->n_left_out);
}

/* The exit code of a run whose results were printed: whether all that was wanted was measured. With --documents those
 * that do not fit are passed over as asked. */
static int completeness(const struct command *command)
{
    const size_t n = json_array_size(command->eval.left_out);
    const bool wanted_fewer = command->documents < SIZE_MAX && json_array_size(command->records) >= command->n_expected;
    return command->changed || (n > command->n_passed_over && !wanted_fewer) ? EXIT_INCOMPLETE : 0;
}

static void check_outputs(const struct command *command, char **files, size_t n_files)
{
    const char **inputs = allocate(n_files + 2, sizeof *inputs);
    char *model = choose_model(command->model_path);
    const struct output outputs[] = {{"--record", command->record, OUTPUT_RECORDS},
                                     {"--plot", command->plot, OUTPUT_PICTURE},
                                     {"--maps", command->maps, OUTPUT_PICTURE},
                                     {"--keep", command->keep, OUTPUT_FOLDER},
                                     {0}};
    for (size_t i = 0; i < n_files; i++) inputs[i] = files[i];
    inputs[n_files] = command->prompts;
    inputs[n_files + 1] = model;
    outputs_check(outputs, inputs, n_files + 2);
    free(inputs);
    free(model);
}

int cmd_eval(int argc, char **argv)
{
    struct command command = {.documents = SIZE_MAX,
                              .questions = SIZE_MAX,
                              .rope_scale = 1.0,
                              .methods = every_method,
                              .answer_tokens = 128,
                              .reply_tokens = 64,
                              .document_seed = 1,
                              .gpu = GPU_FLAGS_EACH,
                              .budgets = {2, {0.0625, 0.125}},
                              .squeeze = SQUEEZE_FLAGS_INIT,
                              .eval = {.speculation = SPECULATION_FLAGS_INIT}};
    /* clang-format off */
    const struct option options[] = {
        MODEL_OPTION(command.model_path),
        {.kind = OPTION_TEXT, .name = "methods", .argument = "METHOD[,...]", .value = &command.methods,
         .help = "squeezed, paper (the published rule), quest, window, oracle; squeezed:2 has two levels (default: all "
                 "of these but the last; of contexts in shards squeezed alone); streaming; int4+4 and int4, all rows in "
                 "these formats; with --speculate "
                 "those who draft: squeezed, streaming, snapkv, quantspec"},
        {.kind = OPTION_BUDGETS, .letter = 'b', .name = "budget", .argument = "SHARE[,...]", .value = &command.budgets,
         .help = "shares of the context that are read, what is read to choose included (default 0.0625,0.125)"},
        {.kind = OPTION_TEXT, .name = "synthetic", .argument = "TASK:TOKENS[,...]", .value = &command.synthetic,
         .help = "made documents: niah_single, niah_multikey, niah_multivalue, niah_multiquery, variable_tracking, "
                 "common_words, frequent_words"},
        {.kind = OPTION_COUNT, .name = "documents", .argument = "N", .value = &command.documents, .low = 1,
         .high = 1e9, .help = "the first N documents of each file that fit (default: all), or N of each synthetic task "
                              "(default 1)"},
        {.kind = OPTION_COUNT, .name = "questions", .argument = "N", .value = &command.questions, .low = 1,
         .high = 1e9, .help = "the first N questions of each (default: all), or N of each synthetic document"},
        {.kind = OPTION_COUNT, .name = "skip", .argument = "N", .value = &command.skip, .low = 0, .high = 1e9,
         .help = "pass over the first N documents of each file"},
        {.kind = OPTION_COUNT, .name = "least-tokens", .argument = "N", .value = &command.eval.least_tokens, .low = 1,
         .high = 1e9, .example = "5000", .help = "leave out documents of fewer tokens"},
        {.kind = OPTION_COUNTS, .name = "lengths", .argument = "TOKENS[,...]", .value = &command.eval.lengths, .low = 1,
         .high = 1e9, .example = "256,1K", .help = "cut every context to each of these lengths: its first so many "
                                                   "tokens; figures stand apart for each"},
        {.kind = OPTION_FLAG, .name = "same-bytes", .value = &command.eval.same_bytes,
         .help = "give the other methods the share that squeezed has read, where that is not what was asked for"},
        {.kind = OPTION_COUNT, .name = "answer-tokens", .argument = "N", .value = &command.answer_tokens, .low = 1,
         .high = 4096, .example = "128", .help = "tokens of a reference answer that are compared (default 128)"},
        {.kind = OPTION_COUNT, .name = "reply-tokens", .argument = "N", .value = &command.reply_tokens, .low = 1,
         .high = 4096, .example = "64", .help = "longest reply, where the task's own limit is not smaller (default 64)"},
        {.kind = OPTION_FLAG, .name = "no-scores", .value = &command.no_scores, .help = "generate no replies"},
        {.kind = OPTION_FLAG, .name = "no-distances", .value = &command.no_distances,
         .help = "do not compare distributions"},
        {.kind = OPTION_TEXT, .name = "prompts", .argument = "FILE", .value = &command.prompts,
         .help = "LongBench's prompts by dataset, a JSON object"},
        {.kind = OPTION_TEXT, .name = "keep", .argument = "FOLDER", .value = &command.keep,
         .help = "keep prepared documents there and use them again, also with other options"},
        SHARDS_OPTION(command.eval.n_shards),
        {.kind = OPTION_TEXT, .name = "record", .argument = "FILE", .value = &command.record,
         .help = "add each document's figures to this file; the same options go on where it ends"},
        {.kind = OPTION_TEXT, .name = "plot", .argument = "FILE", .value = &command.plot,
         .help = "draw quality against budget into a .png or .svg file (needs gnuplot)"},
        {.kind = OPTION_FLAG, .name = "recall", .value = &command.eval.recall,
         .help = "measure the attention mass that is reached, by layer and head (twice the time)"},
        {.kind = OPTION_TEXT, .name = "maps", .argument = "FILE", .value = &command.maps,
         .help = "draw lost mass and retained keys by layer and head into a .png or .svg file (needs gnuplot); measures "
                 "recall"},
        {.kind = OPTION_FLAG, .name = "speculate", .value = &command.eval.speculate,
         .help = "also answer exactly, by drafts of each method and without: what was kept, tokens a cycle and the speed"},
        DRAFT_OPTIONS(command.eval.speculation),
        {.kind = OPTION_COUNT, .name = "document-seed", .argument = "N", .value = &command.document_seed, .low = 0,
         .high = 1e9, .help = "of the first synthetic document (default 1)"},
        {.kind = OPTION_REAL, .name = "rope-scale", .argument = "S", .value = &command.rope_scale, .low = 1,
         .high = 64, .example = "2", .help = "stretch the model's context S times (beside its own RoPE scaling)"},
        SQUEEZE_FLAG_OPTIONS(command.squeeze),
        THREADS_OPTION(command.n_threads),
        GPU_OPTIONS(command.gpu),
        {.kind = OPTION_FLAG, .letter = 'q', .name = "quiet", .value = &command.quiet, .help = "no progress"},
        JSON_OPTION(command.json),
        {.kind = OPTION_END},
    };
    /* clang-format on */
    struct eval *eval = &command.eval;
    struct synthetic_task tasks[SYNTHETIC_TASKS];
    const int n_files = options_parse(&help, options, argc, argv, 0, MAX_FILES);
    if (n_files == 0 && !command.synthetic) usage_error("give a file of documents with questions, or --synthetic");
    if (command.no_scores && command.no_distances && !eval->speculate)
        usage_error("--no-scores and --no-distances leave nothing to measure");
    if (command.plot && !plot_can_draw(command.plot))
        usage_error("--plot '%s': allowed is a name that ends in .png or .svg", command.plot);
    if (command.maps && !plot_can_draw(command.maps))
        usage_error("--maps '%s': allowed is a name that ends in .png or .svg", command.maps);
    eval->recall = eval->recall || command.maps;
    squeeze_flags_apply(&command.squeeze, &eval->squeeze);
    kept_contexts_take_shards(&eval->n_shards, &command.gpu, &eval->squeeze);
    if (eval->n_shards > 1 && command.methods == every_method) command.methods = "squeezed";
    eval_settings_parse(eval, command.methods, &command.budgets);
    eval->max_questions = command.questions;
    eval->max_answer_tokens = command.answer_tokens;
    eval->max_reply_tokens = command.reply_tokens;
    eval->distances = !command.no_distances;
    eval->scores = !command.no_scores;
    eval->quiet = command.quiet;
    const size_t n_tasks = parse_synthetic(&command, tasks);
    check_outputs(&command, argv + 1, (size_t)n_files);
    check_files(&command, argv + 1, (size_t)n_files);
    command.records = json_array();
    eval->left_out = json_array();
    catch_signals();
    const double start = now_seconds();
    choose_place(&command);
    eval->model = open_model_drafting(command.model_path, command.n_threads, command.rope_scale, &command.gpu,
                                      eval->speculation.draft_weights);
    sqz_model_get_info(eval->model, &eval->model_info);
    identify_options(&command);
    char *model_path = choose_model(command.model_path);
    eval->kept = (struct kept_contexts){
        .model = eval->model,
        .folder = command.keep,
        .fingerprint = eval->model_info.fingerprint,
        .rope_scale = command.rope_scale,
        .n_threads = eval->model_info.n_threads,
        .n_shards = (uint32_t)eval->n_shards,
        .model_path = model_path,
        .n_asked_threads = command.n_threads,
        .n_calibration =
            eval->squeeze.n_calibration > BASE_CALIBRATION ? eval->squeeze.n_calibration : BASE_CALIBRATION,
        .quiet = command.quiet,
    };
    kept_contexts_begin(&eval->kept);
    run_all(&command, argv + 1, (size_t)n_files, tasks, n_tasks);
    int code = command.json ? eval_print_json(eval, command.records, now_seconds() - start)
                            : eval_print_table(eval, command.records);
    if (code == 0 && command.plot) code = eval_plot(eval, command.records, command.plot);
    if (code == 0 && command.maps) code = eval_plot_maps(eval, command.records, command.maps);
    code = code ? code : completeness(&command);
    json_decref(command.records);
    json_decref(eval->left_out);
    json_decref(command.known);
    json_decref(command.seen);
    sqz_model_free(eval->model);
    free(model_path);
    return code;
}
