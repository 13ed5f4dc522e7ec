/*
 * squeeze chat: questions in turn on one session, so that later ones see the
 * earlier ones and their answers. Line editing through libedit at a terminal,
 * plain lines otherwise. Ctrl-C stops an answer; at the prompt it quits.
 */
#define _POSIX_C_SOURCE 200809L

#include <editline/readline.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "answer.h"
#include "common.h"
#include "inputs.h"
#include "options.h"
#include "text_buffer.h"

static const struct option_rule rules[] = {ANSWER_FLAG_RULE, {0}};

static const struct command_help help = {
    "chat", "CONTEXT",
    "Answers questions about a prepared context in turn; each sees the earlier ones and their answers. Commands at "
    "the prompt: /budget [SHARE], /reset, /stats, /help, /quit.",
    "  squeeze chat book.sqz.gguf\n"
    "  squeeze chat book.sqz.gguf --budget 0.2 --temp 0.7\n"
    "  printf 'Who is she?\\nAnd her brother?\\n' | squeeze chat book.sqz.gguf\n",
    rules};

struct chat {
    const char *model_path;
    struct answer_flags flags;
    bool terminal;
    bool first;       /* nothing was asked since the start or /reset */
    bool quit;
    struct sqz_model *model;
    struct sqz_context *context;
    struct sqz_session *session;
    struct answer last; /* its text is not kept */
};

/* The next line without its newline, malloc'ed; NULL at the end of the input or after a signal. */
static char *next_line(const struct chat *chat)
{
    char *line = NULL;
    size_t capacity = 0;
    if (chat->terminal) {
        line = readline("> ");
        if (signal_caught()) {
            free(line);
            return NULL;
        }
        if (line && *line) {
            add_history(line);
        }
        return line;
    }
    ssize_t n = getline(&line, &capacity, stdin);
    if (n < 0) {
        free(line);
        return NULL;
    }
    while (n > 0 && (line[n - 1] == '\n' || line[n - 1] == '\r')) {
        line[--n] = '\0';
    }
    return line;
}

static void print_commands(void)
{
    printf("/budget [SHARE]  show or set the share of the context that is read, e.g. /budget 0.2\n"
           "/reset           forget the questions and answers so far\n"
           "/stats           tokens used and left, figures of the last answer\n"
           "/help            this text\n"
           "/quit            leave (so does Ctrl-D)\n");
}

static void set_budget(struct chat *chat, const char *text)
{
    struct sqz_error error = {0};
    double budget = 0.0;
    if (!*text) {
        printf("budget %g\n", chat->flags.budget);
    } else if (!parse_budget_text(text, &budget)) {
        warn("budget %s: allowed is more than 0 and at most 1, e.g. 0.1", text);
    } else if (sqz_session_set_budget(chat->session, (float)budget, &error) != SQZ_OK) {
        report(&error);
    } else {
        chat->flags.budget = budget;
        printf("budget %g\n", budget);
    }
}

static void print_stats(const struct chat *chat)
{
    struct sqz_session_stats stats;
    char used[NUMBER_TEXT_MAX], left[NUMBER_TEXT_MAX], threads[64];
    sqz_session_get_stats(chat->session, &stats);
    printf("%s tokens used, %s left, budget %g\n", count_text(used, stats.n_user_tokens),
           count_text(left, stats.n_left_tokens), chat->flags.budget);
    if (chat->last.n_tokens > 0) {
        printf("last answer: read %.1f%% of the context, first token after %.3f s, %zu tokens in %.2f s, "
               "%.1f tokens/s; %s\n",
               100.0 * chat->last.budget_read, chat->last.first_token_seconds, chat->last.n_tokens,
               chat->last.seconds, chat->last.tokens_per_second,
               threads_text(threads, sizeof threads, &chat->last));
    }
}

static void reset(struct chat *chat)
{
    sqz_session_reset(chat->session);
    chat->first = true;
}

static void run_command(struct chat *chat, const char *line)
{
    size_t n = strcspn(line, " \t");
    const char *rest = line + n + strspn(line + n, " \t");
    if (n == 7 && memcmp(line, "/budget", n) == 0) {
        set_budget(chat, rest);
    } else if (*rest) {
        warn("%.*s takes nothing behind it; /help shows the commands", (int)n, line);
    } else if (strcmp(line, "/reset") == 0) {
        reset(chat);
    } else if (strcmp(line, "/stats") == 0) {
        print_stats(chat);
    } else if (strcmp(line, "/help") == 0) {
        print_commands();
    } else if (strcmp(line, "/quit") == 0) {
        chat->quit = true;
    } else {
        warn("no command %.*s; /help shows the commands", (int)n, line);
    }
}

/* Returns the exit code when the chat cannot go on, else 0. */
static int ask(struct chat *chat, const char *question)
{
    struct sqz_error error = {0};
    struct answer answer;
    int code = 0;
    enum sqz_status status = answer_question(chat->session, chat->model, question, strlen(question), chat->first,
                                             chat->flags.max_tokens, true, &answer, NULL, NULL, &error);
    if (answer.text.n_bytes > 0) {
        putchar('\n');
    }
    text_buffer_free(&answer.text);
    chat->last = answer;
    if (status == SQZ_ERROR_LENGTH) {
        warn("%s; /reset forgets the earlier questions and makes room", error.message);
    } else if (status == SQZ_ERROR_CANCELLED) {
        warn("stopped before the answer; the question is forgotten");
    } else if (status == SQZ_ERROR_TEXT) {
        report(&error);
    } else if (status != SQZ_OK) {
        code = report(&error);
    } else {
        chat->first = false;
        if (answer.end == ANSWER_NO_ROOM) {
            warn("the answer was cut off: no room is left in the model's context; /reset makes room");
        } else if (answer.end == ANSWER_MAX_TOKENS) {
            warn("the answer was cut off after %zu tokens (--max-tokens)", answer.n_tokens);
        }
    }
    if (signal_caught() == SIGINT) {
        signal_forget();
    }
    return code;
}

static int talk(struct chat *chat)
{
    int code = 0;
    while (!chat->quit && code == 0 && !signal_caught()) {
        char *line = next_line(chat);
        if (!line) {
            break;
        }
        const char *text = line + strspn(line, " \t");
        if (*text == '/') {
            run_command(chat, text);
        } else if (*text) {
            code = ask(chat, text);
        }
        free(line);
        if (fflush(stdout) != 0) {
            code = close_stdout();
        }
    }
    if (chat->terminal && !chat->quit) {
        putchar('\n');
    }
    if (code == 0 && signal_caught()) {
        code = 128 + signal_caught();
    }
    return code ? code : close_stdout();
}

static void greet(const struct chat *chat, const struct sqz_context_info *info)
{
    struct sqz_session_stats stats;
    char tokens[NUMBER_TEXT_MAX], left[NUMBER_TEXT_MAX], name[PLAIN_TEXT_MAX];
    sqz_session_get_stats(chat->session, &stats);
    printf("%s: %s tokens of context, %s left for questions and answers; /help shows the commands\n",
           plain_text(name, info->source_name && *info->source_name ? info->source_name : "context"), count_text(tokens, info->n_tokens),
           count_text(left, stats.n_left_tokens));
}

int cmd_chat(int argc, char **argv)
{
    struct chat chat = {.flags = ANSWER_FLAGS_INIT, .first = true};
    const struct option options[] = {
        MODEL_OPTION(chat.model_path),
        ANSWER_FLAG_OPTIONS(chat.flags),
        {.kind = OPTION_END},
    };
    struct sqz_session_options session_options;
    struct sqz_context_info info;
    struct sqz_error error = {0};
    options_parse(&help, options, argc, argv, 1, 1);
    answer_flags_apply(&chat.flags, &session_options);
    chat.terminal = isatty(STDIN_FILENO) == 1 && isatty(STDOUT_FILENO) == 1;
    catch_signals();

    chat.context = open_context(argv[1], NULL);
    sqz_context_get_info(chat.context, &info);
    chat.model = open_model(chat.model_path, chat.flags.n_threads, info.rope_scale);
    int code;
    if (sqz_session_create(&chat.session, chat.model, chat.context, &session_options, &error) == SQZ_OK) {
        sqz_session_set_cancel(chat.session, signal_cancelled, NULL);
        if (chat.terminal) {
            greet(&chat, &info);
        }
        code = talk(&chat);
    } else {
        code = report(&error);
    }
    sqz_session_free(chat.session);
    sqz_context_free(chat.context);
    sqz_model_free(chat.model);
    return code;
}
