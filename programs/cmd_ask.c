/*
 * squeeze ask: answers to one or more questions about a prepared context, each
 * on its own. The answer is streamed to standard output; -v adds figures on
 * standard error, --json prints answer and figures as one object instead.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "answer.h"
#include "common.h"
#include "inputs.h"
#include "json_output.h"
#include "options.h"
#include "text_buffer.h"

static const struct option_rule rules[] = {ANSWER_FLAG_RULE, {0}};

static const struct command_help help = {
    "ask", "CONTEXT QUESTION...",
    "Answers questions about a prepared context, each on its own. A question '-' is read from standard input.",
    "  squeeze ask book.sqz.gguf \"Who wrote the letter?\"\n"
    "  squeeze ask book.sqz.gguf -v --prune 90% \"Who wrote it?\" \"To whom?\"\n"
    "  squeeze ask book.sqz.gguf --json - < question.txt\n",
    rules};

struct ask {
    const char *model_path;
    struct answer_flags flags;
    bool verbose, json;
    double model_seconds, context_seconds;
    struct sqz_model *model;
    struct sqz_context *context;
    struct sqz_session *session;
};

static void print_figures(const struct ask *ask, const struct answer *answer)
{
    char threads[64];
    fprintf(stderr,
            "read %.1f%% of the context (asked for %.1f%%); first token after %.3f s; %zu tokens in %.2f s, "
            "%.1f tokens/s; %s\n",
            100.0 * answer->budget_read, 100.0 * ask->flags.budget, answer->first_token_seconds, answer->n_tokens,
            answer->seconds, answer->tokens_per_second, threads_text(threads, sizeof threads, answer));
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

static json_t *answer_json(const struct ask *ask, const char *question, const struct answer *answer)
{
    json_t *root = json_object();
    json_object_set_new(root, "question", json_text(question));
    json_object_set_new(root, "answer", json_text(answer->text.text ? answer->text.text : ""));
    json_object_set_new(root, "end", json_string(end_name(answer->end)));
    json_object_set_new(root, "n_question_tokens", json_count(answer->n_question_tokens));
    json_object_set_new(root, "n_tokens", json_count(answer->n_tokens));
    json_object_set_new(root, "seconds", json_number(answer->seconds));
    json_object_set_new(root, "first_token_seconds", json_number(answer->first_token_seconds));
    json_object_set_new(root, "tokens_per_second", json_number(answer->tokens_per_second));
    json_object_set_new(root, "budget_asked", json_number(ask->flags.budget));
    json_object_set_new(root, "budget_read", json_number(answer->budget_read));
    json_object_set_new(root, "threads_least", json_count((uint64_t)answer->least_threads));
    json_object_set_new(root, "threads_most", json_count((uint64_t)answer->most_threads));
    json_object_set_new(root, "model_open_seconds", json_number(ask->model_seconds));
    json_object_set_new(root, "context_open_seconds", json_number(ask->context_seconds));
    json_object_set_new(root, "version", json_text(sqz_version()));
    return root;
}

/* Returns the exit code; *result gets the answer as JSON when wanted. */
static int ask_one(struct ask *ask, const char *question, size_t n_bytes, json_t **result)
{
    struct sqz_error error = {0};
    struct answer answer;
    int code = 0;
    sqz_session_reset(ask->session);
    enum sqz_status status = answer_question(ask->session, ask->model, question, n_bytes, true, ask->flags.max_tokens,
                                             !ask->json, &answer, NULL, NULL, &error);
    if (!ask->json && answer.text.n_bytes > 0) {
        putchar('\n');
    }
    code = close_stdout();
    if (signal_caught()) {
        warn("interrupted");
        code = 128 + signal_caught();
    } else if (status != SQZ_OK) {
        code = report(&error);
    } else if (answer.end == ANSWER_NO_ROOM) {
        warn("the answer was cut off: no room is left in the model's context");
    }
    if (code == 0 && ask->verbose) {
        print_figures(ask, &answer);
    }
    if (code == 0 && ask->json) {
        *result = answer_json(ask, question, &answer);
    }
    text_buffer_free(&answer.text);
    return code;
}

static int ask_all(struct ask *ask, int n_questions, char **questions)
{
    json_t *results = NULL;
    int code = 0;
    for (int i = 0; i < n_questions && code == 0; i++) {
        size_t n_bytes = strlen(questions[i]);
        char *input = strcmp(questions[i], "-") == 0 ? read_whole_file("-", &n_bytes) : NULL;
        const char *question = input ? input : questions[i];
        json_t *result = NULL;
        if (i > 0 && !ask->json) {
            putchar('\n');
        }
        code = ask_one(ask, question, n_bytes, &result);
        free(input);
        if (result && n_questions == 1) {
            results = result;
        } else if (result) {
            results = results ? results : json_object();
            if (!json_object_get(results, "answers")) {
                json_object_set_new(results, "answers", json_array());
            }
            json_array_append_new(json_object_get(results, "answers"), result);
        }
    }
    if (code == 0 && ask->json) {
        return print_json(results);
    }
    json_decref(results);
    return code;
}

int cmd_ask(int argc, char **argv)
{
    struct ask ask = {.flags = ANSWER_FLAGS_INIT};
    const struct option options[] = {
        MODEL_OPTION(ask.model_path),
        ANSWER_FLAG_OPTIONS(ask.flags),
        JSON_OPTION(ask.json),
        {.kind = OPTION_FLAG, .letter = 'v', .name = "verbose", .value = &ask.verbose,
         .help = "print the share that was read, tokens/s, the time to the first token and the times of opening"},
        {.kind = OPTION_END},
    };
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
    start = now_seconds();
    ask.model = open_model(ask.model_path, ask.flags.n_threads, info.rope_scale);
    ask.model_seconds = now_seconds() - start;
    if (ask.verbose) {
        fprintf(stderr, "context opened in %.3f s, model in %.3f s\n", ask.context_seconds, ask.model_seconds);
    }
    int code;
    if (sqz_session_create(&ask.session, ask.model, ask.context, &session_options, &error) == SQZ_OK) {
        sqz_session_set_cancel(ask.session, signal_cancelled, NULL);
        code = ask_all(&ask, n - 1, argv + 2);
    } else {
        code = report(&error);
    }
    sqz_session_free(ask.session);
    sqz_context_free(ask.context);
    sqz_model_free(ask.model);
    return code;
}
