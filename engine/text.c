/*
 * Tokens of documents and questions. The chat template is llama.cpp's own: it
 * is applied to messages that hold marker words, and the text between markers
 * gives the pieces that stand around a document, a question and an answer. Only
 * those pieces may hold control tokens: in a document or question "<|im_end|>"
 * is plain text.
 */
#include "text.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "intake.h"

/* Words that no template holds and no template changes (no blanks, one case, plain letters). */
static const char document_mark[] = "SQZDOCUMENTMARK", question_mark[] = "SQZQUESTIONMARK",
                  answer_mark[] = "SQZANSWERMARK", blank_line[] = "\n\n";

/* Around a question where there is no chat template: a pattern that plain language models go on with. */
static const char question_words[] = "Question: ", answer_words[] = "\nAnswer:", question_line[] = "\nQuestion:";

const char *sqz_text_usable_template(const char *template)
{
    char buffer[4096];
    const struct llama_chat_message message = {"user", document_mark};
    if (!template) return NULL;
    const int32_t n = llama_chat_apply_template(template, &message, 1, true, buffer, sizeof buffer - 1);
    if (n < 0 || (size_t)n >= sizeof buffer) return NULL;
    buffer[n] = '\0';
    return strstr(buffer, document_mark) ? template : NULL;
}

enum sqz_status sqz_text_append(struct sqz_tokens *tokens, const struct sqz_model *model, const char *text,
                                size_t n_bytes, bool special, struct sqz_error *error)
{
    if (n_bytes == 0) return SQZ_OK;
    if (n_bytes > INT32_MAX - 16)
        return sqz_error_set(error, SQZ_ERROR_LENGTH, "a text of %zu bytes: at most %d can be tokenized at once",
                             n_bytes, INT32_MAX - 16);
    size_t room = n_bytes + 8; /* a token stands for at least one byte, a few may be added in front */
    int32_t *grown = realloc(tokens->data, (tokens->n + room) * sizeof *grown);
    if (!grown) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for %zu tokens", tokens->n + room);
    tokens->data = grown;
    const int32_t n =
        llama_tokenize(model->vocab, text, (int32_t)n_bytes, tokens->data + tokens->n, (int32_t)room, false, special);
    if (n < 0) return sqz_error_set(error, SQZ_ERROR_INTERNAL, "llama.cpp could not tokenize %zu bytes", n_bytes);
    tokens->n += (size_t)n;
    return SQZ_OK;
}

enum sqz_status sqz_model_tokenize(const struct sqz_model *model, const char *text, size_t text_bytes, int32_t **out,
                                   size_t *n_tokens, struct sqz_error *error)
{
    const struct sqz_text_source source = {.what = "the text"};
    struct sqz_tokens tokens = {NULL, 0};
    char *taken;
    size_t n_taken;
    sqz_error_clear(error);
    *out = NULL;
    *n_tokens = 0;
    enum sqz_status status = sqz_text_intake_copy(&taken, &n_taken, text, text_bytes, SQZ_TEXT_PLAIN, &source, error);
    if (status == SQZ_OK) status = sqz_text_append(&tokens, model, taken, n_taken, false, error);
    free(taken);
    if (status != SQZ_OK) {
        free(tokens.data);
        return status;
    }
    *out = tokens.data;
    *n_tokens = tokens.n;
    return SQZ_OK;
}

size_t sqz_model_token_text(const struct sqz_model *model, int32_t token, char *buffer, size_t capacity)
{
    if (token < 0 || (uint32_t)token >= model->info.n_vocab) return 0;
    const int32_t n = llama_token_to_piece(model->vocab, token, buffer, (int32_t)capacity, 0, false);
    return n > 0 ? (size_t)n : 0;
}

enum sqz_status sqz_text_render(char **out, const struct sqz_model *model, const struct llama_chat_message *messages,
                                size_t n_messages, struct sqz_error *error)
{
    int32_t size = 4096;
    *out = NULL;
    for (int attempt = 0; attempt < 2; attempt++) {
        char *text = malloc((size_t)size + 1);
        if (!text) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for the chat template");
        const int32_t n = llama_chat_apply_template(model->chat_template, messages, n_messages, true, text, size);
        if (n >= 0 && n <= size) {
            text[n] = '\0';
            *out = text;
            return SQZ_OK;
        }
        free(text);
        if (n < 0) break;
        size = n;
    }
    return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED, "llama.cpp cannot apply the model's chat template");
}

/* sqz_text_context() of a document that passed the intake. */
static enum sqz_status append_context(struct sqz_tokens *tokens, const struct sqz_model *model, const char *document,
                                      size_t n_bytes, bool raw, size_t *n_document_tokens, struct sqz_error *error)
{
    enum sqz_status status = SQZ_OK;
    char *text = NULL;
    if (llama_vocab_get_add_bos(model->vocab)) {
        tokens->data = malloc(sizeof *tokens->data);
        if (!tokens->data) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for tokens");
        tokens->data[tokens->n++] = llama_vocab_bos(model->vocab);
    }
    if (model->chat_template && !raw) {
        const struct llama_chat_message message = {"user", document_mark};
        status = sqz_text_render(&text, model, &message, 1, error);
        if (status != SQZ_OK) return status;
        const char *mark = strstr(text, document_mark);
        status = sqz_text_append(tokens, model, text, mark ? (size_t)(mark - text) : 0, true, error);
    }
    const size_t before = tokens->n;
    if (status == SQZ_OK) status = sqz_text_append(tokens, model, document, n_bytes, false, error);
    *n_document_tokens = tokens->n - before;
    if (status == SQZ_OK && !raw) status = sqz_text_append(tokens, model, blank_line, strlen(blank_line), false, error);
    free(text);
    return status;
}

enum sqz_status sqz_text_context(struct sqz_tokens *tokens, const struct sqz_model *model, const char *document,
                                 size_t n_bytes, bool raw, size_t *n_document_tokens, struct sqz_error *error)
{
    const struct sqz_text_source source = {.what = "the document"};
    char *taken;
    enum sqz_status status = sqz_text_intake_copy(&taken, &n_bytes, document, n_bytes,
                                                  raw ? SQZ_TEXT_PLAIN : SQZ_TEXT_DOCUMENT, &source, error);
    if (status == SQZ_OK) status = append_context(tokens, model, taken, n_bytes, raw, n_document_tokens, error);
    free(taken);
    return status;
}

/* sqz_text_question() of a question that passed the intake. */
static enum sqz_status append_question(struct sqz_tokens *tokens, const struct sqz_model *model, bool has_template,
                                       const char *question, size_t n_bytes, bool first, struct sqz_error *error)
{
    enum sqz_status status = SQZ_OK;
    if (!has_template || !model->chat_template) {
        if (!first) status = sqz_text_append(tokens, model, blank_line, strlen(blank_line), false, error);
        if (status == SQZ_OK)
            status = sqz_text_append(tokens, model, question_words, strlen(question_words), false, error);
        if (status == SQZ_OK) status = sqz_text_append(tokens, model, question, n_bytes, false, error);
        if (status == SQZ_OK) status = sqz_text_append(tokens, model, answer_words, strlen(answer_words), false, error);
        return status;
    }
    /* First: the rest of the user's turn. Later: from the end of the last answer through a new turn. */
    const struct llama_chat_message messages[] = {
        {"user", document_mark}, {"assistant", answer_mark}, {"user", question_mark}};
    char *text = NULL;
    status =
        first ? sqz_text_render(&text, model, messages, 1, error) : sqz_text_render(&text, model, messages, 3, error);
    if (status != SQZ_OK) return status;
    const char *mark = strstr(text, first ? document_mark : question_mark);
    const char *start = first ? mark : strstr(text, answer_mark);
    if (!mark || !start) {
        free(text);
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED, "the model's chat template drops parts of a conversation");
    }
    if (!first) {
        start += strlen(answer_mark);
        status = sqz_text_append(tokens, model, start, (size_t)(mark - start), true, error);
    }
    mark += strlen(first ? document_mark : question_mark);
    if (status == SQZ_OK) status = sqz_text_append(tokens, model, question, n_bytes, false, error);
    if (status == SQZ_OK) status = sqz_text_append(tokens, model, mark, strlen(mark), true, error);
    free(text);
    return status;
}

enum sqz_status sqz_text_question(struct sqz_tokens *tokens, const struct sqz_model *model, bool has_template,
                                  const char *question, size_t n_bytes, bool first, struct sqz_error *error)
{
    const struct sqz_text_source source = {.what = "the question"};
    char *taken;
    enum sqz_status status =
        sqz_text_intake_copy(&taken, &n_bytes, question, n_bytes, SQZ_TEXT_QUESTION, &source, error);
    if (status == SQZ_OK) status = append_question(tokens, model, has_template, taken, n_bytes, first, error);
    free(taken);
    return status;
}

/* Bytes of `mark` with which text begins, all that is there of it. */
static size_t common_bytes(const char *text, size_t n_bytes, const char *mark)
{
    size_t n = 0;
    while (n < n_bytes && mark[n] && text[n] == mark[n]) n++;
    return n;
}

size_t sqz_text_answer_bytes(const char *text, size_t n_bytes, bool *ended)
{
    size_t at = 0;
    while (at < n_bytes && (text[at] == ' ' || (text[at] >= '\t' && text[at] <= '\r'))) at++;
    for (*ended = false; at < n_bytes; at++) {
        if (text[at] != '\n') continue;
        const size_t blank = common_bytes(text + at, n_bytes - at, blank_line);
        const size_t question = common_bytes(text + at, n_bytes - at, question_line);
        *ended = !blank_line[blank] || !question_line[question];
        if (*ended || at + blank == n_bytes || at + question == n_bytes) return at;
    }
    return n_bytes;
}
