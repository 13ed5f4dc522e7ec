/*
 * One document under every setting. The document is read by the model once;
 * every method has the same engine, template, sampler and kernels, and differs
 * only in which rows a query reads.
 *
 * Distances: the reference answer is run token by token. The dense run comes
 * first and its logits are kept; the logits that predict answer token i are
 * those after token i - 1 (the question's last token for the first).
 * Scores: the reply, greedy, against the references.
 */
#include "eval.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "answer.h"
#include "backend_selected.h"
#include "common.h"
#include "distance.h"
#include "eval_speculate.h"
#include "error.h"
#include "json_output.h"
#include "many_ranks.h"
#include "memory.h"
#include "progress.h"
#include "session.h"

/* Room for the template around a question. */
enum { TEMPLATE_TOKENS = 64 };

/* NULL, and no tokens, for a text that has none, such as an empty reference answer. */
static int32_t *tokens_of(const struct eval *eval, const char *text, size_t *n)
{
    struct sqz_error error = {0};
    int32_t *tokens = NULL;
    *n = 0;
    sqz_model_tokenize(eval->model, text, strlen(text), &tokens, n, &error);
    return tokens;
}

/* ---- What is left out ------------------------------------------------------------------ */

void eval_leave_out(struct eval *eval, const struct eval_document *document, size_t question, const char *format, ...)
{
    char why[600], where[96] = "";
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(why, sizeof why, format, arguments);
    va_end(arguments);
    if (question) snprintf(where, sizeof where, "question %zu ", question);
    if (document->path) warn("%s:%zu: %sleft out: %s", document->path, document->line, where, why);
    else warn("%s: %sleft out: %s", document->task, where, why);
    json_t *entry = json_object();
    json_object_set_new(entry, "file", document->path ? json_text(document->path) : json_null());
    json_object_set_new(entry, "line", document->path ? json_count(document->line) : json_null());
    json_object_set_new(entry, "task", json_text(document->task));
    json_object_set_new(entry, "question", question ? json_count(question) : json_null());
    json_object_set_new(entry, "why", json_text(why));
    json_array_append_new(eval->left_out, entry);
}

/* ---- Questions ------------------------------------------------------------------------- */

/* A question whose answer and reply have room behind the document. */
struct prepared_question {
    const struct eval_question *question;
    int32_t *tokens, *answer;
    size_t n_tokens, n_answer;
    float *dense;              /* [n_answer][n_vocab] logits of the dense run */
    struct answer_step *steps; /* [n_steps] the dense run's reply */
    size_t n_steps;
};

static size_t reply_tokens(const struct eval *eval, const struct eval_question *question)
{
    return question->max_tokens < eval->max_reply_tokens ? question->max_tokens : eval->max_reply_tokens;
}

/* Fills questions[] with those that fit; returns how many. */
static size_t prepare_questions(struct eval *eval, const struct eval_document *document, struct sqz_session *session,
                                struct prepared_question *questions)
{
    struct sqz_session_stats stats;
    struct sqz_error error = {0};
    size_t n = 0;
    sqz_session_get_stats(session, &stats);
    for (size_t i = 0; i < document->n_questions && n < eval->max_questions; i++) {
        const struct eval_question *question = &document->questions[i];
        struct prepared_question *p = &questions[n];
        memset(p, 0, sizeof *p);
        p->question = question;
        if (sqz_session_question_tokens(session, question->text, strlen(question->text), true, &p->tokens, &p->n_tokens,
                                        &error) != SQZ_OK) {
            eval_leave_out(eval, document, i + 1, "%s", error.message);
            continue;
        }
        p->answer = tokens_of(eval, question->references[0], &p->n_answer);
        if (p->n_answer > eval->max_answer_tokens) p->n_answer = eval->max_answer_tokens;
        const size_t reply = reply_tokens(eval, question), longest = p->n_answer > reply ? p->n_answer : reply;
        const bool fits = p->n_tokens + longest <= stats.n_left_tokens, compared = p->n_answer > 0 || !eval->distances;
        if (!fits || !compared) {
            eval_leave_out(eval, document, i + 1,
                           fits ? "its reference answer is empty, nothing can be compared (--no-distances asks it)"
                                : "%zu tokens, which with the answer do not fit behind the document",
                           p->n_tokens);
            free(p->tokens);
            free(p->answer);
            continue;
        }
        n++;
    }
    return n;
}

static void free_questions(struct prepared_question *questions, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        free(questions[i].tokens);
        free(questions[i].answer);
        free(questions[i].dense);
        free(questions[i].steps);
    }
    free(questions);
}

/* ---- One setting ----------------------------------------------------------------------- */

/* Runs the reference answer. Without `distance` (the dense run) the logits are kept, with it compared. */
static enum sqz_status run_answer(const struct eval *eval, struct sqz_session *session,
                                  struct prepared_question *question, struct distance *distance,
                                  struct sqz_error *error)
{
    const size_t n_vocab = eval->model_info.n_vocab;
    if (!distance) {
        question->dense = malloc(question->n_answer * n_vocab * sizeof *question->dense);
        if (!question->dense) die("out of memory");
    }
    enum sqz_status status = sqz_session_run(session, question->tokens, question->n_tokens, error);
    for (size_t i = 0; i < question->n_answer && status == SQZ_OK; i++) {
        const float *logits = sqz_session_logits(session);
        float *dense = question->dense + i * n_vocab;
        if (!distance) memcpy(dense, logits, n_vocab * sizeof *dense);
        else if (!distance_add(distance, dense, logits, n_vocab, question->answer[i]))
            return sqz_error_set(error, SQZ_ERROR_INTERNAL, "the model gave logits that are not finite numbers");
        if (i + 1 < question->n_answer) status = sqz_session_run(session, &question->answer[i], 1, error);
    }
    return status;
}

/* Notes in answer what the dense run's lead was where this reply goes another way; nothing where it does not. */
static void compare_replies(json_t *answer, const struct prepared_question *question, const struct answer_step *steps,
                            size_t n_steps)
{
    for (size_t i = 0; i < n_steps && i < question->n_steps; i++) {
        if (steps[i].token != question->steps[i].token) {
            json_object_set_new(answer, "lead", json_number(question->steps[i].lead));
            return;
        }
    }
}

/* Adds the reply's score to answer. The dense run's reply is kept with the question. */
static enum sqz_status score_reply(const struct eval *eval, struct sqz_session *session,
                                   struct prepared_question *prepared, bool dense, json_t *answer,
                                   struct sqz_error *error)
{
    const struct eval_question *question = prepared->question;
    const size_t longest = reply_tokens(eval, question);
    struct answer given;
    struct answer_step *steps = allocate(longest, sizeof *steps);
    size_t n_steps = 0;
    const enum sqz_status status = answer_question(session, eval->model, question->text, strlen(question->text), true,
                                                   longest, false, &given, steps, &n_steps, error);
    if (status != SQZ_OK) {
        text_buffer_free(&given.text);
        free(steps);
        return status;
    }
    char *reply = given.text.text ? given.text.text : allocate(1, 1);
    if (question->first_line) score_first_line(reply);
    const double score = score_answer(question->score, reply, question->references, question->n_references,
                                      question->classes, question->n_classes);
    free(reply);
    json_object_set_new(answer, "score", json_number(score));
    if (dense) {
        prepared->steps = steps;
        prepared->n_steps = n_steps;
        return SQZ_OK;
    }
    compare_replies(answer, prepared, steps, n_steps);
    free(steps);
    return SQZ_OK;
}

static json_t *numbers_json(const double *x, size_t n)
{
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++) json_array_append_new(list, json_number(x[i]));
    return list;
}

/* The bar of a document's questions under all settings. */
struct asked {
    struct progress progress;
    double since;
    size_t done, total;
};

static void show_asked(struct asked *asked)
{
    stop_on(SQZ_OK, NULL); /* or when interrupted */
    const struct sqz_progress now = {"ask", (double)asked->done, (double)asked->total, "answers",
                                     now_seconds() - asked->since};
    progress_show(&now, &asked->progress);
}

/* The distances of a reference answer, added to answer. */
static enum sqz_status measure_distance(const struct eval *eval, struct sqz_session *session,
                                        struct prepared_question *question, bool dense, json_t *answer,
                                        struct sqz_error *error)
{
    const size_t n_vocab = eval->model_info.n_vocab;
    struct distance distance = {0};
    enum sqz_status status = run_answer(eval, session, question, dense ? NULL : &distance, error);
    for (size_t t = 0; dense && t < question->n_answer && status == SQZ_OK; t++) { /* its distance from itself */
        const float *logits = question->dense + t * n_vocab;
        if (!distance_add(&distance, logits, logits, n_vocab, question->answer[t]))
            status = sqz_error_set(error, SQZ_ERROR_INTERNAL, "the model gave logits that are not finite numbers");
    }
    json_object_set_new(answer, "kl", numbers_json(distance.kl, distance.n_tokens));
    json_object_set_new(answer, "top1", json_count(distance.n_top1));
    json_object_set_new(answer, "nll", json_number(distance.nll_squeezed_sum));
    json_object_set_new(answer, "nll_dense", json_number(distance.nll_dense_sum));
    distance_free(&distance);
    return status;
}

static void add_read(struct sqz_attention_stats *read, const struct sqz_session *session)
{
    struct sqz_session_stats stats;
    sqz_session_get_stats(session, &stats);
    sqz_attention_stats_add(read, &stats.attention);
}

/* The answers of one setting, whose session is there; NULL on failure. */
static json_t *run_setting(const struct eval *eval, struct sqz_session *session, struct prepared_question *questions,
                           size_t n_questions, bool dense, struct asked *asked, struct sqz_error *error)
{
    json_t *answers = json_array();
    enum sqz_status status = SQZ_OK;
    for (size_t i = 0; i < n_questions && status == SQZ_OK; i++, asked->done++) {
        struct sqz_attention_stats read = {0};
        json_t *answer = json_object();
        show_asked(asked);
        if (eval->distances) {
            sqz_session_reset(session);
            status = measure_distance(eval, session, &questions[i], dense, answer, error);
            add_read(&read, session);
        }
        if (eval->scores && status == SQZ_OK) {
            sqz_session_reset(session);
            status = score_reply(eval, session, &questions[i], dense, answer, error);
            add_read(&read, session);
        }
        json_object_set_new(answer, "read",
                            json_number((double)(read.centroid_bytes + read.key_bytes + read.value_bytes)));
        json_object_set_new(answer, "context", json_number((double)read.context_bytes));
        json_array_append_new(answers, answer);
    }
    if (status != SQZ_OK) {
        json_decref(answers);
        return NULL;
    }
    return answers;
}

static json_t *recall_json(const struct sqz_recall *recall)
{
    const size_t n = (size_t)recall->n_layer * recall->n_head_kv;
    json_t *json = json_object();
    json_object_set_new(json, "layers", json_count(recall->n_layer));
    json_object_set_new(json, "heads", json_count(recall->n_head_kv));
    json_object_set_new(json, "mass", numbers_json(recall->mass, n));
    json_object_set_new(json, "keys", numbers_json(recall->keys, n));
    json_object_set_new(json, "n", numbers_json(recall->n, n));
    return json;
}

/* ---- One document ---------------------------------------------------------------------- */

/* Whether two settings read the same context at the same time. */
static bool same_context(const struct eval *eval, const struct eval_setting *a, const struct eval_setting *b)
{
    if (eval->n_shards > 1) return true;
    if (eval->same_bytes && method_selects(a->method) != method_selects(b->method))
        return false; /* selections wait for what SQUEEZED reads, the dense run comes before it */
    const bool plain_a = method_selects(a->method) || a->method == METHOD_DENSE;
    const bool plain_b = method_selects(b->method) || b->method == METHOD_DENSE;
    return plain_a == plain_b && (plain_a || (a->method == b->method && a->n_levels == b->n_levels));
}

/* What the squeezed setting of the same budget has read, as a share; `done`: the answers of settings so far. */
static double squeezed_share(const struct eval *eval, const struct eval_setting *setting, const json_t *done)
{
    double read = 0.0, context = 0.0;
    for (size_t i = 0; i < eval->n_settings; i++) {
        const struct eval_setting *other = &eval->settings[i];
        const json_t *answers = json_array_get(done, i);
        if (other->method != METHOD_SQUEEZED || other->budget != setting->budget || context > 0.0) continue;
        for (size_t a = 0; a < json_array_size(answers); a++) {
            read += json_number_value(json_object_get(json_array_get(answers, a), "read"));
            context += json_number_value(json_object_get(json_array_get(answers, a), "context"));
        }
    }
    return context > 0.0 ? read / context : setting->budget;
}

/* What a setting is given: what was asked for, or what SQUEEZED has read; that may be a value or two more than all. */
static float budget_of(const struct eval *eval, const struct eval_setting *setting, const json_t *done)
{
    const bool follows = eval->same_bytes && (method_selects(setting->method) || setting->method == METHOD_PAPER);
    const double budget = follows ? squeezed_share(eval, setting, done) : setting->budget;
    return budget < 1.0 ? (float)budget : 1.0f;
}

/* NULL on failure. */
static struct sqz_session *session_for(const struct eval *eval, const struct sqz_context *context, float budget,
                                       struct sqz_error *error)
{
    struct sqz_session_options options;
    struct sqz_session *session;
    sqz_session_options_default(&options);
    options.budget = budget;
    if (sqz_session_create(&session, eval->model, context, &options, error) != SQZ_OK) return NULL;
    sqz_session_set_cancel(session, signal_cancelled, NULL);
    return session;
}

/* Whether the document is long enough and, cut to `length` unless that is 0, with its shortest question fits; asked
 * before the costly reading. */
static bool document_fits(struct eval *eval, const struct eval_document *document, size_t length)
{
    size_t n_document, least = SIZE_MAX;
    free(tokens_of(eval, document->text, &n_document));
    if (n_document < eval->least_tokens || n_document < length) return false;
    n_document = length && length < n_document ? length : n_document;
    for (size_t i = 0; i < document->n_questions; i++) {
        size_t n;
        free(tokens_of(eval, document->questions[i].text, &n));
        n += reply_tokens(eval, &document->questions[i]);
        least = n < least ? n : least;
    }
    if (n_document + least + TEMPLATE_TOKENS <= eval->model_info.n_context_tokens) return true;
    eval_leave_out(eval, document, 0, "%zu tokens and %zu of question, reply and template; the model holds %u",
                   n_document, least + TEMPLATE_TOKENS, eval->model_info.n_context_tokens);
    return false;
}

/* A document while it is measured. */
struct run {
    struct eval *eval;
    const struct eval_document *document;
    size_t length; /* that the context is cut to; 0: it is whole */
    const char *label;
    struct sqz_context *base;
    struct prepared_question *questions;
    size_t n_questions;
    json_t *settings, *recalls; /* by setting, as the next two, which are of those that round */
    json_t *files, *files_f16;
    json_t *speculation; /* of exact answers; NULL: not wanted */
    struct asked asked;
    const struct eval_setting *at; /* the setting in work */
    struct sqz_error error;
};

/* The bytes of the setting's file, and of the base's, whose rows are F16. */
static void note_file(struct run *run, size_t setting, const struct sqz_context *context)
{
    struct sqz_context_info info, f16;
    sqz_context_get_info(context, &info);
    sqz_context_get_info(run->base, &f16);
    json_array_set_new(run->files, setting, json_number((double)info.file_bytes));
    json_array_set_new(run->files_f16, setting, json_number((double)f16.file_bytes));
}

static bool run_session(struct run *run, struct sqz_session *session, const struct sqz_context *context, size_t i,
                        const struct sqz_selector *selector)
{
    struct eval *eval = run->eval;
    struct sqz_recall recall = {0};
    struct backend_selected selected;
    if (eval->recall && sqz_recall_create(&recall, context, eval->model_info.n_layer, &run->error) != SQZ_OK)
        return false;
    if ((selector || eval->recall) &&
        backend_selected_wrap(&selected, session, selector, eval->recall ? &recall : NULL, &run->error) != SQZ_OK) {
        sqz_recall_free(&recall);
        return false;
    }
    if (i == 0) run->n_questions = prepare_questions(eval, run->document, session, run->questions);
    run->asked.total = eval->n_settings * run->n_questions;
    json_t *answers = run_setting(eval, session, run->questions, run->n_questions, i == 0, &run->asked, &run->error);
    json_array_set_new(run->settings, i, answers ? answers : json_null());
    if (eval->recall) json_array_set_new(run->recalls, i, recall_json(&recall));
    sqz_recall_free(&recall);
    return answers != NULL;
}

/* The settings that read the same context as the first. */
static bool run_context(struct run *run, size_t first)
{
    struct eval *eval = run->eval;
    const double paused = now_seconds();
    struct page_bounds pages = {0};
    run->at = &eval->settings[first];
    struct sqz_context *context = eval->n_shards > 1 /* everybody's */
                                      ? run->base
                                      : eval_context_for(eval, run->base, run->at, run->label, &run->error);
    bool ok = context != NULL;
    if (ok && method_rounds(run->at->method)) note_file(run, first, context);
    /* Asking alone counts. */
    run->asked.since = run->asked.done == 0 ? now_seconds() : run->asked.since + now_seconds() - paused;
    progress_begin(&run->asked.progress, eval->quiet, run->label);
    if (ok && eval->n_shards < 2 && (first == 0 || method_selects(run->at->method)))
        page_bounds_make(&pages, context, eval->model_info.n_layer);
    for (size_t i = first; i < eval->n_settings && ok; i++) {
        if (!same_context(eval, &eval->settings[i], &eval->settings[first])) continue;
        run->at = &eval->settings[i];
        const struct sqz_selector selector = method_selector(run->at->method, &pages);
        const float budget = budget_of(eval, run->at, run->settings);
        struct sqz_session *session = session_for(eval, context, budget, &run->error);
        if (session && !eval->quiet && !method_selects(run->at->method)) say_floor(session, run->label);
        if (session && !eval->quiet && i == 0) say_fallback(session, run->label);
        ok = session && run_session(run, session, context, i, method_selects(run->at->method) ? &selector : NULL);
        sqz_session_free(session);
    }
    progress_end(&run->asked.progress);
    page_bounds_free(&pages);
    if (context != run->base) sqz_context_free(context);
    return ok;
}

static bool run_settings(struct run *run)
{
    const struct eval *eval = run->eval;
    for (size_t i = 0; i < eval->n_settings; i++) {
        json_array_append_new(run->settings, json_null());
        json_array_append_new(run->recalls, json_null());
        json_array_append_new(run->files, json_null());
        json_array_append_new(run->files_f16, json_null());
    }
    for (size_t first = 0; first < eval->n_settings; first++) { /* of those that share a context */
        bool seen = false;
        if (first > 0 && !eval->distances && !eval->scores) { /* the first one knows the questions, and that is all */
            json_array_set(run->settings, first, json_array_get(run->settings, 0));
            continue;
        }
        for (size_t i = 0; i < first; i++)
            seen = seen || same_context(eval, &eval->settings[i], &eval->settings[first]);
        if (!seen && !run_context(run, first)) return false;
    }
    return true;
}

static json_t *record_of(const struct run *run)
{
    struct sqz_context_info info;
    json_t *record = json_object();
    sqz_context_get_info(run->base, &info);
    if (run->eval->recall) json_object_set(record, "recall", run->recalls);
    json_object_set_new(record, "task", json_text(run->document->task));
    json_object_set_new(record, "tokens", json_count(info.n_tokens));
    if (run->length) json_object_set_new(record, "length", json_count(run->length));
    json_object_set(record, "settings", run->settings);
    json_object_set(record, "file", run->files);
    json_object_set(record, "file_f16", run->files_f16);
    if (run->speculation) json_object_set(record, "speculation", run->speculation);
    return record;
}

/* Notes a document that failed with the setting that was in work; exits when it was interrupted, or a rank is lost. */
static void leave_out_failed(struct run *run)
{
    char setting[64] = "";
    stop_on(SQZ_OK, NULL);
    if (ranks_trouble()) die("%s", ranks_trouble());
    if (run->at) eval_setting_name(setting, sizeof setting, run->at);
    eval_leave_out(run->eval, run->document, 0, "%s%s%s", setting, *setting ? ": " : "",
                   run->error.message[0] ? run->error.message : sqz_status_name(run->error.status));
}

json_t *eval_run_document(struct eval *eval, const struct eval_document *document, size_t length, const char *label)
{
    if (!document_fits(eval, document, length)) return NULL;
    struct run run = {.eval = eval, .document = document, .length = length, .label = label, .asked = {.total = 1}};
    run.questions = allocate(document->n_questions, sizeof *run.questions);
    run.settings = json_array();
    run.recalls = json_array();
    run.files = json_array();
    run.files_f16 = json_array();
    run.base = eval->n_shards > 1
                   ? kept_contexts_open(&eval->kept, document->text, document->text_bytes, length, &eval->squeeze,
                                        label, &run.error)
                   : kept_contexts_base(&eval->kept, document->text, document->text_bytes, length, label, &run.error);
    bool ok = run.base && run_settings(&run);
    if (ok && eval->speculate) {
        run.at = NULL;
        run.speculation = eval_speculate(eval, run.base, document, label, &run.error);
        ok = run.speculation;
    }
    if (!ok) leave_out_failed(&run);
    json_t *record = ok && run.n_questions > 0 ? record_of(&run) : NULL;
    free_questions(run.questions, run.n_questions);
    sqz_context_free(run.base);
    json_decref(run.settings);
    json_decref(run.recalls);
    json_decref(run.files);
    json_decref(run.files_f16);
    json_decref(run.speculation);
    return record;
}
