/*
 * squeeze chat: questions in turn on one session, so that later ones see the
 * earlier ones and their answers. Line editing through libedit at a terminal,
 * where lines that are pasted together are one question; else every line is
 * one. Ctrl-C stops an answer; at the prompt it quits.
 */
#define _POSIX_C_SOURCE 200809L

#include <editline/readline.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

#include "answer.h"
#include "common.h"
#include "inputs.h"
#include "options.h"
#include "text_buffer.h"
#include "texts.h"

static const struct option_rule rules[] = {ANSWER_FLAG_RULES, {0}};

static const struct command_help help = {
    "chat", "CONTEXT",
    "Answers questions about a prepared context in turn; each sees the earlier ones and their answers. Commands at "
    "the prompt: /budget [SHARE], /reset, /stats, /help, /quit. A question that begins with / is asked with //. Lines "
    "pasted together at a terminal are one question; from a file or a pipe every line is one.",
    "  squeeze chat book.sqz.gguf\n"
    "  squeeze chat book.sqz.gguf --budget 0.2 --temp 0.7\n"
    "  printf 'Who is she?\\nAnd her brother?\\n' | squeeze chat book.sqz.gguf\n",
    rules};

struct chat {
    const char *model_path;
    struct answer_flags flags;
    bool terminal;
    bool first; /* nothing was asked since the start or /reset */
    bool quit;
    bool failed; /* a question was not answered */
    size_t line; /* of the input, where it is no terminal; the first is 1 */
    struct sqz_model *model;
    struct sqz_context *context;
    struct sqz_session *session;
    struct answer last; /* its text is not kept */
};

/* A question's most bytes: far above any model's context; stops an endless line. */
static const size_t longest_line_bytes = (size_t)64 << 20;

/* Whether more comes from the terminal at once, as it does when several lines are pasted. The terminal gives out bytes
 * before their new line only while it is not in its canonical mode. */
static bool more_is_pasted(void)
{
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    struct termios usual, raw;
    if (tcgetattr(STDIN_FILENO, &usual) != 0) return false;
    raw = usual;
    raw.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
    raw.c_cc[VMIN] = 1;
    raw.c_cc[VTIME] = 0;
    tcsetattr(STDIN_FILENO, TCSANOW, &raw);
    const bool more = poll(&input, 1, 30) > 0;
    tcsetattr(STDIN_FILENO, TCSANOW, &usual);
    return more;
}

static bool is_command(const char *text)
{
    text += strspn(text, " \t");
    return text[0] == '/' && text[1] != '/';
}

/* What is typed or pasted up to a new line with nothing behind it; false at the end of the input or after a signal. */
static bool read_terminal(struct text_buffer *text)
{
    bool more = true;
    for (const char *prompt = "> "; more; prompt = "| ") {
        char *line = readline(prompt);
        if (!line || signal_caught()) {
            free(line);
            return text->n_bytes > 0 && !signal_caught();
        }
        if (*line) add_history(line);
        if (text->n_bytes > 0) text_buffer_append(text, "\n", 1);
        text_buffer_append(text, line, strlen(line));
        free(line);
        more = !is_command(text->text) && more_is_pasted();
    }
    return true;
}

/* The next line of a file or pipe, its NULs too; false at the end of the input or after a signal. */
static bool read_line(struct text_buffer *text)
{
    int c;
    bool any = false;
    while ((c = getc(stdin)) != EOF && c != '\n') {
        const char byte = (char)c;
        any = true;
        if (text->n_bytes < longest_line_bytes) text_buffer_append(text, &byte, 1);
    }
    if (ferror(stdin) && !signal_caught()) die("standard input: %s", strerror(errno));
    return (any || c == '\n') && !signal_caught();
}

static bool next_text(struct chat *chat, struct text_buffer *text)
{
    text_buffer_append(text, "", 0);
    if (chat->terminal) return read_terminal(text);
    chat->line++;
    return read_line(text);
}

static void print_commands(void)
{
    printf("/budget [SHARE]  show or set the share of the context that is read, e.g. /budget 0.2\n"
           "/reset           forget the questions and answers so far\n"
           "/stats           tokens used and left, figures of the last answer\n"
           "/help            this text\n"
           "/quit            leave (so does Ctrl-D)\n"
           "//...            ask a question that begins with /\n");
}

static double asked_budget(const struct chat *chat)
{
    return chat->flags.speculation.exact ? 1.0 : chat->flags.budget;
}

static void set_budget(struct chat *chat, const char *text)
{
    struct sqz_error error = {0};
    double budget = 0.0;
    if (!*text) {
        printf("budget %g\n", asked_budget(chat));
    } else if (!parse_budget_text(text, &budget)) {
        warn("budget %s: allowed is more than 0 and at most 1, e.g. 0.1", text);
    } else if (sqz_session_set_budget(chat->session, (float)budget, &error) != SQZ_OK) {
        report(&error);
    } else {
        chat->flags.budget = budget;
        printf("budget %g\n", budget);
        say_floor(chat->session, "");
    }
}

static void print_stats(const struct chat *chat)
{
    struct sqz_session_stats stats;
    char used[NUMBER_TEXT_MAX], left[NUMBER_TEXT_MAX], own[NUMBER_TEXT_MAX], threads[64];
    sqz_session_get_stats(chat->session, &stats);
    printf("%s tokens used, %s left, budget %g, floor %.3g\n", count_text(used, stats.n_user_tokens),
           count_text(left, stats.n_left_tokens), asked_budget(chat), (double)stats.budget_floor);
    if (stats.own_bytes) printf("their keys and values take %s\n", bytes_text(own, stats.own_bytes));
    if (chat->last.n_tokens > 0) {
        printf("last answer: read %.1f%% of the context, first token after %.3f s, %zu tokens in %.2f s, "
               "%.1f tokens/s; %s\n",
               100.0 * chat->last.budget_read, chat->last.first_token_seconds, chat->last.n_tokens, chat->last.seconds,
               chat->last.tokens_per_second, threads_text(threads, sizeof threads, &chat->last));
        print_speculation(&chat->last.speculation, stdout);
    }
}

static void reset(struct chat *chat)
{
    sqz_session_reset(chat->session);
    chat->first = true;
}

/* Whether the first n bytes are a command that takes nothing behind it. */
static bool is_known(const char *line, size_t n)
{
    static const char *const names[] = {"/reset", "/stats", "/help", "/quit"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strlen(names[i]) == n && memcmp(names[i], line, n) == 0) return true;
    return false;
}

static void run_command(struct chat *chat, const char *line)
{
    size_t n = strcspn(line, " \t");
    const char *rest = line + n + strspn(line + n, " \t");
    if (n == 7 && memcmp(line, "/budget", n) == 0) set_budget(chat, rest);
    else if (*rest && is_known(line, n)) warn("%.*s takes nothing behind it; /help shows the commands", (int)n, line);
    else if (strcmp(line, "/reset") == 0) reset(chat);
    else if (strcmp(line, "/stats") == 0) print_stats(chat);
    else if (strcmp(line, "/help") == 0) print_commands();
    else if (strcmp(line, "/quit") == 0) chat->quit = true;
    else warn("no command %.*s; /help shows the commands, and /%s asks it as a question", (int)n, line, line);
}

/* Says what came of a question; returns the exit code when the chat cannot go on, else 0. */
static int say_outcome(enum sqz_status status, const char *name, const struct answer *answer,
                       const struct sqz_error *error)
{
    if (status == SQZ_ERROR_LENGTH) {
        warn("%s: %s; /reset forgets the earlier questions and makes room", name, error->message);
    } else if (status == SQZ_ERROR_CANCELLED) {
        warn("stopped before the answer; the question is forgotten");
    } else if (status != SQZ_OK) {
        const int code = report(error);
        return status == SQZ_ERROR_TEXT ? 0 : code;
    } else if (answer->end == ANSWER_NO_ROOM) {
        warn("the answer was cut off: no room is left in the model's context; /reset makes room");
    } else if (answer->end == ANSWER_MAX_TOKENS) {
        warn("the answer was cut off after %zu tokens (--max-tokens)", answer->n_tokens);
    }
    return 0;
}

/* Asks what passed the intake; returns as say_outcome(). */
static int ask(struct chat *chat, const struct question *question, const char *name)
{
    struct sqz_error error = {0};
    struct answer answer;
    enum sqz_status status = answer_question(chat->session, chat->model, question->text, question->n_bytes, chat->first,
                                             chat->flags.max_tokens, true, &answer, NULL, NULL, &error);
    if (answer.text.n_bytes > 0) putchar('\n');
    text_buffer_free(&answer.text);
    chat->last = answer;
    chat->first = chat->first && status != SQZ_OK;
    chat->failed = chat->failed || status != SQZ_OK;
    const int code = say_outcome(status, name, &answer, &error);
    if (signal_caught() == SIGINT) signal_forget();
    return code;
}

/* Asks what was read, or says why it is no question; returns as say_outcome(). */
static int take(struct chat *chat, char *text, size_t n_bytes)
{
    struct question question = {.text = text, .n_bytes = n_bytes};
    char name[32] = "the question";
    if (!chat->terminal) snprintf(name, sizeof name, "line %zu", chat->line);
    if (n_bytes >= longest_line_bytes) {
        warn("%s is longer than %zu MiB", name, longest_line_bytes >> 20);
        chat->failed = true;
        return 0;
    }
    take_question(&question, name, NULL);
    if (question.error.status == SQZ_OK) return ask(chat, &question, name);
    report(&question.error);
    chat->failed = true;
    return 0;
}

static int talk(struct chat *chat)
{
    struct text_buffer line = {0};
    int code = 0;
    while (!chat->quit && code == 0 && !signal_caught() && next_text(chat, &line)) {
        char *text = line.text + strspn(line.text, " \t\r\n");
        size_t n_bytes = line.n_bytes - (size_t)(text - line.text);
        if (is_command(text) && !memchr(text, '\0', n_bytes)) {
            while (strchr(" \t\r\n", text[n_bytes - 1])) text[--n_bytes] = '\0';
            run_command(chat, text);
        } else if (n_bytes > 0) {
            const bool doubled = text[0] == '/';
            code = take(chat, text + doubled, n_bytes - doubled);
        }
        line.n_bytes = 0;
        if (!flush_stdout()) code = close_stdout();
    }
    text_buffer_free(&line);
    if (chat->terminal && !chat->quit) putchar('\n');
    if (code == 0 && signal_caught()) code = 128 + signal_caught();
    if (code == 0 && chat->failed && !chat->terminal) code = 1;
    const int closing = code ? 0 : close_stdout();
    return code ? code : closing;
}

static void greet(const struct chat *chat, const struct sqz_context_info *info)
{
    struct sqz_session_stats stats;
    char tokens[NUMBER_TEXT_MAX], left[NUMBER_TEXT_MAX], name[PLAIN_TEXT_MAX];
    sqz_session_get_stats(chat->session, &stats);
    printf("%s: %s tokens of context, %s left for questions and answers; /help shows the commands\n",
           plain_text(name, info->source_name && *info->source_name ? info->source_name : "context"),
           count_text(tokens, info->n_tokens), count_text(left, stats.n_left_tokens));
}

int cmd_chat(int argc, char **argv)
{
    struct chat chat = {.flags = ANSWER_FLAGS_INIT, .first = true};
    /* clang-format off */
    const struct option options[] = {
        MODEL_OPTION(chat.model_path),
        ANSWER_FLAG_OPTIONS(chat.flags),
        {.kind = OPTION_END},
    };
    /* clang-format on */
    struct sqz_session_options session_options;
    struct sqz_context_info info;
    struct sqz_error error = {0};
    options_parse(&help, options, argc, argv, 1, 1);
    answer_flags_apply(&chat.flags, &session_options);
    chat.terminal = isatty(STDIN_FILENO) == 1 && isatty(STDOUT_FILENO) == 1;
    catch_signals();

    chat.context = open_context(argv[1], NULL);
    sqz_context_get_info(chat.context, &info);
    chat.flags.gpu.in_shards = info.n_shards > 0;
    chat.model = open_model_drafting(chat.model_path, chat.flags.n_threads, info.rope_scale, &chat.flags.gpu,
                                     chat.flags.speculation.draft_weights);
    warn_of_template(chat.model);
    int code;
    if (sqz_session_create(&chat.session, chat.model, chat.context, &session_options, &error) == SQZ_OK) {
        sqz_session_set_cancel(chat.session, signal_cancelled, NULL);
        say_floor(chat.session, "");
        say_fallback(chat.session, "");
        if (chat.terminal) greet(&chat, &info);
        code = talk(&chat);
    } else {
        code = report(&error);
    }
    sqz_session_free(chat.session);
    sqz_context_free(chat.context);
    sqz_model_free(chat.model);
    return code;
}
