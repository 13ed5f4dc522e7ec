/* Documents and questions on their way in; texts.h describes it. */
#define _POSIX_C_SOURCE 200809L

#include "texts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common.h"
#include "inputs.h"
#include "intake.h"
#include "memory.h"
#include "text_buffer.h"

static const char plain_in_shells[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789%+,-./:=@_";

static void append(struct text_buffer *buffer, const char *text)
{
    text_buffer_append(buffer, text, strlen(text));
}

char *shell_word(const char *text)
{
    struct text_buffer word = {0};
    append(&word, text[0] == '-' ? "./" : ""); /* a name, not an option */
    if (*text && strspn(text, plain_in_shells) == strlen(text)) {
        append(&word, text);
        return word.text;
    }
    append(&word, "'");
    for (const char *p = text; *p; p++) text_buffer_append(&word, *p == '\'' ? "'\\''" : p, *p == '\'' ? 4 : 1);
    append(&word, "'");
    return word.text;
}

/* " | COMMAND WORD BEHIND", the word quoted; malloc'ed. */
static char *piped_into(const char *command, const char *word, const char *behind)
{
    struct text_buffer text = {0};
    char *quoted = shell_word(word);
    append(&text, " | ");
    append(&text, command);
    append(&text, quoted);
    append(&text, behind);
    free(quoted);
    return text.text;
}

char *read_document(const char *path, bool raw, const char *output, size_t *n_bytes)
{
    struct sqz_error error = {0};
    const bool is_stdin = strcmp(path, "-") == 0;
    char *file = is_stdin ? NULL : shell_word(path), *then = piped_into("squeeze prepare - -o ", output, "");
    char *text = read_whole_file(path, n_bytes);
    const struct sqz_text_source source = {is_stdin ? "standard input" : path, file, then};
    if (sqz_text_intake(text, n_bytes, raw ? SQZ_TEXT_PLAIN : SQZ_TEXT_DOCUMENT, &source, &error) != SQZ_OK)
        exit(report(&error));
    free(then);
    free(file);
    return text;
}

void take_question(struct question *question, const char *what, const char *then)
{
    const struct sqz_text_source source = {.what = what, .then = then};
    question->error = (struct sqz_error){0};
    sqz_text_intake(question->text, &question->n_bytes, SQZ_TEXT_QUESTION, &source, &question->error);
}

static char *copy_of(const char *text, size_t n_bytes)
{
    char *copy = allocate(n_bytes + 1, 1);
    memcpy(copy, text, n_bytes);
    return copy;
}

/* Standard input as a question; says what a person at a terminal is waited for. */
static char *read_standard_input(size_t *n_bytes)
{
    if (isatty(STDIN_FILENO) == 1) warn("reading the question from the terminal; Ctrl-D on a line of its own ends it");
    return read_whole_file("-", n_bytes);
}

static bool is_standard_input(const char *argument)
{
    return strcmp(argument, "-") == 0;
}

static void read_question(struct question *question, const char *argument, const char *what, const char *then)
{
    if (is_standard_input(argument)) {
        question->text = read_standard_input(&question->n_bytes);
    } else {
        question->n_bytes = strlen(argument);
        question->text = copy_of(argument, question->n_bytes);
        then = NULL;
    }
    take_question(question, what, then);
    if (question->error.status != SQZ_OK) report(&question->error);
}

struct question *read_questions(size_t n, char **arguments, const char *context)
{
    struct question *questions = allocate(n, sizeof *questions);
    char *then = piped_into("squeeze ask ", context, " -");
    size_t n_dashes = 0;
    for (size_t i = 0; i < n; i++) n_dashes += is_standard_input(arguments[i]);
    if (n_dashes > 1) usage_error("'-' is given %zu times, but standard input can be read only once", n_dashes);
    for (size_t i = 0; i < n; i++) {
        char what[64] = "the question";
        if (n > 1) snprintf(what, sizeof what, "question %zu", i + 1);
        read_question(&questions[i], arguments[i], what, then);
    }
    free(then);
    return questions;
}

void questions_free(struct question *questions, size_t n)
{
    for (size_t i = 0; i < n; i++) free(questions[i].text);
    free(questions);
}
