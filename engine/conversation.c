/* Conversations as tokens; conversation.h describes them. Like the pieces around a document (text.c), those around
 * messages come from the template applied to words that stand for them. */
#include "conversation.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "text.h"

enum { MARK_BYTES = 24, MOST_MESSAGES = 100000 };

static const char blank_line[] = "\n\n", question_words[] = "Question: ", answer_words[] = "\nAnswer:";

/* The word that stands for message i: of one length, so that none begins another. */
static void write_mark(char mark[MARK_BYTES], size_t i)
{
    snprintf(mark, MARK_BYTES, "SQZMESSAGE%06uMARK", (unsigned)(i % MOST_MESSAGES));
}

static enum sqz_status append_text(struct sqz_tokens *tokens, const struct sqz_model *model, const char *text,
                                   struct sqz_error *error)
{
    return sqz_text_append(tokens, model, text, strlen(text), false, error);
}

const char *sqz_model_template(const struct sqz_model *model)
{
    return model->chat_template;
}

size_t sqz_model_special_text(const struct sqz_model *model, int32_t token, char *buffer, size_t capacity)
{
    if (token < 0 || (uint32_t)token >= model->info.n_vocab) return 0;
    const int32_t n = llama_token_to_piece(model->vocab, token, buffer, (int32_t)capacity, 0, true);
    return n > 0 ? (size_t)n : 0;
}

/* ---- Without a template ------------------------------------------------------------- */

static enum sqz_status append_plain_message(struct sqz_tokens *tokens, const struct sqz_model *model,
                                            const struct sqz_message *m, struct sqz_error *error)
{
    const bool user = strcmp(m->role, "user") == 0, assistant = strcmp(m->role, "assistant") == 0;
    enum sqz_status status = user ? append_text(tokens, model, question_words, error) : SQZ_OK;
    if (status == SQZ_OK && assistant) status = append_text(tokens, model, " ", error);
    if (status == SQZ_OK) status = sqz_text_append(tokens, model, m->text, m->n_bytes, false, error);
    if (status == SQZ_OK) status = append_text(tokens, model, user ? answer_words : blank_line, error);
    return status;
}

/* ---- With one --------------------------------------------------------------------------- */

/* The template around the words that stand for the messages; malloc'ed. */
static enum sqz_status render_marks(char **out, const struct sqz_model *model, const struct sqz_message *messages,
                                    size_t n, struct sqz_error *error)
{
    struct llama_chat_message *chat = calloc(n, sizeof *chat);
    char(*marks)[MARK_BYTES] = calloc(n, sizeof *marks);
    enum sqz_status status = SQZ_OK;
    *out = NULL;
    if (!chat || !marks) status = sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for %zu messages", n);
    for (size_t i = 0; i < n && status == SQZ_OK; i++) {
        write_mark(marks[i], i);
        chat[i] = (struct llama_chat_message){messages[i].role, marks[i]};
    }
    if (status == SQZ_OK) status = sqz_text_render(out, model, chat, n, error);
    free(chat);
    free(marks);
    return status;
}

/* What stands in the template before, between and behind the messages, each followed by its message. behind: what
 * stands before the first belongs to the context. */
static enum sqz_status append_rendered(struct sqz_tokens *tokens, const struct sqz_model *model, const char *rendered,
                                       const struct sqz_message *messages, size_t n, bool behind,
                                       struct sqz_error *error)
{
    char mark[MARK_BYTES];
    const char *at = rendered;
    enum sqz_status status = SQZ_OK;
    for (size_t i = 0; i < n && status == SQZ_OK; i++) {
        write_mark(mark, i);
        const char *found = strstr(at, mark);
        if (!found)
            return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                                 "the model's chat template drops message %zu of %zu, whose role is %s", i + 1, n,
                                 messages[i].role);
        if (!(behind && i == 0)) status = sqz_text_append(tokens, model, at, (size_t)(found - at), true, error);
        if (status == SQZ_OK)
            status = sqz_text_append(tokens, model, messages[i].text, messages[i].n_bytes, false, error);
        at = found + strlen(mark);
    }
    return status != SQZ_OK ? status : sqz_text_append(tokens, model, at, strlen(at), true, error);
}

static enum sqz_status append_conversation(struct sqz_tokens *tokens, const struct sqz_model *model, bool has_template,
                                           const struct sqz_message *messages, size_t n, bool behind,
                                           struct sqz_error *error)
{
    char *rendered;
    enum sqz_status status = SQZ_OK;
    if (n == 0 || n > MOST_MESSAGES)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%zu messages: allowed are 1 to %d", n, (int)MOST_MESSAGES);
    if (!has_template || !model->chat_template) {
        for (size_t i = 0; i < n && status == SQZ_OK; i++)
            status = append_plain_message(tokens, model, &messages[i], error);
        return status;
    }
    status = render_marks(&rendered, model, messages, n, error);
    if (status != SQZ_OK) return status;
    status = append_rendered(tokens, model, rendered, messages, n, behind, error);
    free(rendered);
    return status;
}

/* ---- The calls ---------------------------------------------------------------------------- */

static enum sqz_status append_beginning(struct sqz_tokens *tokens, const struct sqz_model *model,
                                        struct sqz_error *error)
{
    if (!llama_vocab_get_add_bos(model->vocab)) return SQZ_OK;
    tokens->data = malloc(sizeof *tokens->data);
    if (!tokens->data) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for tokens");
    tokens->data[tokens->n++] = llama_vocab_bos(model->vocab);
    return SQZ_OK;
}

static enum sqz_status hand_over(struct sqz_tokens *tokens, enum sqz_status status, int32_t **out, size_t *n)
{
    if (status != SQZ_OK) free(tokens->data);
    *out = status == SQZ_OK ? tokens->data : NULL;
    *n = status == SQZ_OK ? tokens->n : 0;
    return status;
}

enum sqz_status sqz_conversation_tokens(const struct sqz_model *model, bool has_template,
                                        const struct sqz_message *messages, size_t n_messages, int32_t **out,
                                        size_t *n_tokens, struct sqz_error *error)
{
    struct sqz_tokens tokens = {NULL, 0};
    sqz_error_clear(error);
    enum sqz_status status = append_beginning(&tokens, model, error);
    if (status == SQZ_OK)
        status = append_conversation(&tokens, model, has_template, messages, n_messages, false, error);
    return hand_over(&tokens, status, out, n_tokens);
}

enum sqz_status sqz_conversation_tokens_behind(const struct sqz_model *model, bool has_template,
                                               const struct sqz_message *messages, size_t n_messages, int32_t **out,
                                               size_t *n_tokens, struct sqz_error *error)
{
    struct sqz_tokens tokens = {NULL, 0};
    sqz_error_clear(error);
    const enum sqz_status status = append_conversation(&tokens, model, has_template, messages, n_messages, true, error);
    return hand_over(&tokens, status, out, n_tokens);
}

enum sqz_status sqz_beginning_tokens(const struct sqz_model *model, const char *text, size_t n_bytes, int32_t **out,
                                     size_t *n_tokens, struct sqz_error *error)
{
    struct sqz_tokens tokens = {NULL, 0};
    sqz_error_clear(error);
    enum sqz_status status = append_beginning(&tokens, model, error);
    if (status == SQZ_OK) status = sqz_text_append(&tokens, model, text, n_bytes, false, error);
    return hand_over(&tokens, status, out, n_tokens);
}

/* ---- A context's document ---------------------------------------------------------------------- */

/* How many tokens of a context stand before its document; false where they are not this model's. */
static bool tokens_before(const struct sqz_model *model, const struct sqz_context_meta *meta, size_t *n_before,
                          enum sqz_status *status, struct sqz_error *error)
{
    struct sqz_tokens tokens = {NULL, 0};
    const struct sqz_message document = {"user", "", 0};
    char mark[MARK_BYTES], *rendered = NULL;
    *status = append_beginning(&tokens, model, error);
    if (*status == SQZ_OK && meta->has_template && model->chat_template) {
        *status = render_marks(&rendered, model, &document, 1, error);
        write_mark(mark, 0);
        const char *found = rendered ? strstr(rendered, mark) : NULL;
        if (found) *status = sqz_text_append(&tokens, model, rendered, (size_t)(found - rendered), true, error);
    }
    const bool same = *status == SQZ_OK && tokens.n <= meta->n_tokens &&
                      (tokens.n == 0 || memcmp(tokens.data, meta->tokens, tokens.n * sizeof *tokens.data) == 0);
    *n_before = same ? tokens.n : 0;
    free(rendered);
    free(tokens.data);
    return same;
}

enum sqz_status sqz_context_document(const struct sqz_model *model, const struct sqz_context *context, char **text,
                                     size_t *n_bytes, size_t *n_before, bool *begins_plainly, struct sqz_error *error)
{
    const struct sqz_context_meta *meta = sqz_context_get_meta(context);
    enum sqz_status status;
    char piece[512];
    size_t n = 0, capacity = 4096;
    sqz_error_clear(error);
    *text = NULL;
    *n_bytes = 0;
    *begins_plainly = tokens_before(model, meta, n_before, &status, error);
    if (status != SQZ_OK) return status;
    char *all = malloc(capacity);
    for (size_t i = *n_before; i < meta->n_tokens && all; i++) {
        const size_t more = sqz_model_token_text(model, meta->tokens[i], piece, sizeof piece);
        if (n + more + 1 > capacity) {
            char *larger = realloc(all, capacity = 2 * capacity + more);
            if (!larger) free(all);
            all = larger;
        }
        if (all) memcpy(all + n, piece, more);
        n += more;
    }
    if (!all) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a document of %zu bytes", n);
    while (n > 0 && all[n - 1] == '\n') n--;
    all[n] = '\0';
    *text = all;
    *n_bytes = n;
    return SQZ_OK;
}
