/*
 * squeeze ask: answers to one or more questions about a prepared context, each
 * on its own. The answer is streamed to standard output; -v adds figures on
 * standard error, --json prints answer and figures as one object instead.
 */
#include <stdio.h>

#include "answer.h"
#include "common.h"
#include "inputs.h"
#include "json_output.h"
#include "options.h"
#include "text_buffer.h"
#include "texts.h"

static const struct option_rule rules[] = {ANSWER_FLAG_RULES, {0}};

static const struct command_help help = {
    "ask", "CONTEXT QUESTION...",
    "Answers questions about a prepared context, each on its own. A question '-' is read from standard input. One that "
    "cannot be answered is said and costs the others nothing; the exit code is then 1.",
    "  squeeze ask book.sqz.gguf \"Who wrote the letter?\"\n"
    "  squeeze ask book.sqz.gguf -v --prune 90% \"Who wrote it?\" \"To whom?\"\n"
    "  squeeze ask book.sqz.gguf --json - < question.txt\n",
    rules};

struct ask {
    const char *model_path;
    struct answer_flags flags;
    bool verbose, json;
    size_t n_questions;
    struct question *questions;
    double model_seconds, context_seconds, session_seconds;
    struct sqz_model *model;
    struct sqz_context *context;
    struct sqz_session *session;
};

/* As it was written; an exact answer's is 1. */
static double asked_budget(const struct ask *ask)
{
    return ask->flags.speculation.exact ? 1.0 : ask->flags.budget;
}

static void print_figures(const struct ask *ask, const struct answer *answer)
{
    char threads[64], own[NUMBER_TEXT_MAX];
    struct sqz_session_stats stats;
    sqz_session_get_stats(ask->session, &stats);
    fprintf(stderr,
            "read %.1f%% of the context (asked for %.1f%%, floor %.1f%%); first token after %.3f s; %zu tokens in "
            "%.2f s, %.1f tokens/s; %s\n",
            100.0 * answer->budget_read, 100.0 * asked_budget(ask), 100.0 * (double)stats.budget_floor,
            answer->first_token_seconds, answer->n_tokens, answer->seconds, answer->tokens_per_second,
            threads_text(threads, sizeof threads, answer));
    if (stats.own_bytes)
        fprintf(stderr, "keys and values of question and answer take %s\n", bytes_text(own, stats.own_bytes));
    print_speculation(&answer->speculation, stderr);
}

static const char *end_name(enum answer_end end)
{
    switch (end) {
    case ANSWER_ENDED: return "end";
    case ANSWER_MAX_TOKENS: return "max-tokens";
    case ANSWER_NO_ROOM: return "no-room";
    case ANSWER_STOPPED: return "stopped";
    }
    return "unknown";
}

static json_t *answer_json(const struct ask *ask, const struct question *question, const struct answer *answer)
{
    struct sqz_session_stats stats;
    const char *fallback = sqz_session_fallback(ask->session);
    json_t *root = json_object();
    sqz_session_get_stats(ask->session, &stats);
    json_object_set_new(root, "question", json_bytes(question->text, question->n_bytes));
    json_object_set_new(root, "answer", json_text(answer->text.text ? answer->text.text : ""));
    json_object_set_new(root, "end", json_string(end_name(answer->end)));
    json_object_set_new(root, "n_question_tokens", json_count(answer->n_question_tokens));
    json_object_set_new(root, "n_tokens", json_count(answer->n_tokens));
    json_object_set_new(root, "seconds", json_number(answer->seconds));
    json_object_set_new(root, "first_token_seconds", json_number(answer->first_token_seconds));
    json_object_set_new(root, "tokens_per_second", json_number(answer->tokens_per_second));
    json_object_set_new(root, "budget_asked", json_number(asked_budget(ask)));
    json_object_set_new(root, "exact", json_string(exact_names[ask->flags.speculation.exact]));
    if (ask->flags.speculation.exact) json_object_set_new(root, "speculation", speculation_json(&answer->speculation));
    json_object_set_new(root, "budget_floor", json_number((double)stats.budget_floor));
    json_object_set_new(root, "budget_read", json_number(answer->budget_read));
    json_object_set_new(root, "own_bytes", json_count(stats.own_bytes));
    json_object_set_new(root, "fallback", fallback[0] ? json_text(fallback) : json_null());
    json_object_set_new(root, "threads_least", json_count((uint64_t)answer->least_threads));
    json_object_set_new(root, "threads_most", json_count((uint64_t)answer->most_threads));
    json_object_set_new(root, "model_open_seconds", json_number(ask->model_seconds));
    json_object_set_new(root, "context_open_seconds", json_number(ask->context_seconds));
    json_object_set_new(root, "session_open_seconds", json_number(ask->session_seconds));
    json_object_set_new(root, "version", json_text(sqz_version()));
    return root;
}

/* A question without an answer. */
static json_t *error_json(const struct question *question)
{
    json_t *root = json_object();
    json_object_set_new(root, "question", json_bytes(question->text, question->n_bytes));
    json_object_set_new(root, "error", json_text(question->error.message));
    json_object_set_new(root, "version", json_text(sqz_version()));
    return root;
}

/* Which question a message is about: nothing for the only one. */
static const char *question_name(const struct ask *ask, size_t i, char name[32])
{
    snprintf(name, 32, ask->n_questions > 1 ? "question %zu: " : "", i + 1);
    return name;
}

static void warn_of_cut(const struct ask *ask, size_t i, const struct answer *answer)
{
    char name[32];
    question_name(ask, i, name);
    if (answer->end == ANSWER_NO_ROOM) warn("%sthe answer was cut off: no room is left in the model's context", name);
    else if (answer->end == ANSWER_MAX_TOKENS)
        warn("%sthe answer was cut off after %zu tokens; --max-tokens allows more", name, answer->n_tokens);
}

/* Returns the exit code; *result gets the answer as JSON when wanted. A question that cannot be answered gets the
 * reason. */
static int ask_one(struct ask *ask, size_t i, json_t **result)
{
    struct question *question = &ask->questions[i];
    struct answer answer;
    char name[32];
    sqz_session_reset(ask->session);
    enum sqz_status status = answer_question(ask->session, ask->model, question->text, question->n_bytes, true,
                                             ask->flags.max_tokens, !ask->json, &answer, NULL, NULL, &question->error);
    if (!ask->json && answer.text.n_bytes > 0) putchar('\n');
    int code = close_stdout();
    if (signal_caught()) {
        warn("interrupted");
        code = 128 + signal_caught();
    } else if (status != SQZ_OK) {
        warn("%s%s", question_name(ask, i, name), question->error.message);
        code = 1;
    } else if (code == 0 && !ask->json) {
        warn_of_cut(ask, i, &answer);
    }
    if (code == 0 && ask->verbose) print_figures(ask, &answer);
    if (code == 0 && ask->json) *result = answer_json(ask, question, &answer);
    text_buffer_free(&answer.text);
    return code;
}

/* Whether the others can still be answered: what was wrong was wrong with this question. */
static bool can_go_on(const struct question *question, int code)
{
    const enum sqz_status status = question->error.status;
    return code == 0 || (code == 1 && (status == SQZ_ERROR_TEXT || status == SQZ_ERROR_LENGTH));
}

static int ask_all(struct ask *ask)
{
    json_t *answers = json_array();
    int code = 0;
    bool going = true, printed = false;
    for (size_t i = 0; i < ask->n_questions && going; i++) {
        json_t *result = NULL;
        int one = 1;
        if (ask->questions[i].error.status == SQZ_OK) {
            if (printed && !ask->json) putchar('\n');
            one = ask_one(ask, i, &result);
            printed = printed || one == 0;
        }
        going = can_go_on(&ask->questions[i], one);
        code = going && one == 0 ? code : one;
        json_array_append_new(answers, result ? result : error_json(&ask->questions[i]));
    }
    if (!ask->json || signal_caught()) {
        json_decref(answers);
        return code;
    }
    json_t *only = json_array_get(answers, 0);
    const int printing = print_json(ask->n_questions == 1 ? json_incref(only) : json_pack("{s:O}", "answers", answers));
    json_decref(answers);
    return code ? code : printing;
}

int cmd_ask(int argc, char **argv)
{
    struct ask ask = {.flags = ANSWER_FLAGS_INIT};
    /* clang-format off */
    const struct option options[] = {
        MODEL_OPTION(ask.model_path),
        ANSWER_FLAG_OPTIONS(ask.flags),
        JSON_OPTION(ask.json),
        {.kind = OPTION_FLAG, .letter = 'v', .name = "verbose", .value = &ask.verbose,
         .help = "print the share that was read, tokens/s, the time to the first token and the times of opening"},
        {.kind = OPTION_END},
    };
    /* clang-format on */
    struct sqz_session_options session_options;
    struct sqz_context_info info;
    struct sqz_error error = {0};
    int n = options_parse(&help, options, argc, argv, 2, 1000);
    answer_flags_apply(&ask.flags, &session_options);
    catch_signals();

    double start = now_seconds();
    ask.context = open_context(argv[1], NULL);
    ask.context_seconds = now_seconds() - start;
    sqz_context_get_info(ask.context, &info);
    ask.flags.gpu.in_shards = info.n_shards > 0;
    ask.n_questions = (size_t)n - 1;
    ask.questions = read_questions(ask.n_questions, argv + 2, argv[1]);
    start = now_seconds();
    ask.model = open_model_drafting(ask.model_path, ask.flags.n_threads, info.rope_scale, &ask.flags.gpu,
                                    ask.flags.speculation.draft_weights);
    ask.model_seconds = now_seconds() - start;
    warn_of_template(ask.model);
    int code;
    start = now_seconds();
    if (sqz_session_create(&ask.session, ask.model, ask.context, &session_options, &error) == SQZ_OK) {
        ask.session_seconds = now_seconds() - start;
        if (ask.verbose)
            fprintf(stderr, "context opened in %.3f s, model in %.3f s, the context brought to it in %.3f s\n",
                    ask.context_seconds, ask.model_seconds, ask.session_seconds);
        sqz_session_set_cancel(ask.session, signal_cancelled, NULL);
        say_floor(ask.session, "");
        say_fallback(ask.session, "");
        code = ask_all(&ask);
    } else {
        code = report(&error);
    }
    questions_free(ask.questions, ask.n_questions);
    sqz_session_free(ask.session);
    sqz_context_free(ask.context);
    sqz_model_free(ask.model);
    return code;
}
