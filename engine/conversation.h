/*
 * Conversations as tokens: messages in the model's chat template, from their beginning or behind a prepared document.
 * What the messages say is plain text: "<|im_end|>" in one ends no turn.
 */
#ifndef SQZ_ENGINE_CONVERSATION_H
#define SQZ_ENGINE_CONVERSATION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "squeeze.h"

struct sqz_message {
    const char *role; /* "system", "user" or "assistant": goes into the template as it is */
    const char *text; /* UTF-8 without NUL */
    size_t n_bytes;
};

/* Tokens of a conversation up to where its next answer begins; *tokens is malloc'ed. Without has_template, or with a
 * model that has none, turns stand as "Question:" and "Answer:". Errors: ARGUMENT (no messages), UNSUPPORTED (the
 * template cannot be applied, or drops one), MEMORY, LENGTH. */
enum sqz_status sqz_conversation_tokens(const struct sqz_model *model, bool has_template,
                                        const struct sqz_message *messages, size_t n_messages, int32_t **tokens,
                                        size_t *n_tokens, struct sqz_error *error);

/* The same for a conversation whose first message, the user's, begins with a prepared document: the text is what
 * follows the document there, and tokens are those behind the context's. */
enum sqz_status sqz_conversation_tokens_behind(const struct sqz_model *model, bool has_template,
                                               const struct sqz_message *messages, size_t n_messages, int32_t **tokens,
                                               size_t *n_tokens, struct sqz_error *error);

/* The model's chat template, as its file has it and llama.cpp knows it; NULL: none. It lives as long as the model. */
const char *sqz_model_template(const struct sqz_model *model);

/* The text of a special token, which sqz_model_token_text() gives none: bytes written, at most capacity; 0: none. */
size_t sqz_model_special_text(const struct sqz_model *model, int32_t token, char *buffer, size_t capacity);

/* Tokens of a text that begins a sequence, with the model's token for a beginning where it wants one. */
enum sqz_status sqz_beginning_tokens(const struct sqz_model *model, const char *text, size_t n_bytes, int32_t **tokens,
                                     size_t *n_tokens, struct sqz_error *error);

/* The document of a context that was prepared with or without a template, as text without new lines at its end:
 * malloc'ed, with a NUL behind it, the texts of all tokens but the first *n_before. *begins_plainly: before it stands what this model's template puts there, or
 * nothing but the token for a beginning. */
enum sqz_status sqz_context_document(const struct sqz_model *model, const struct sqz_context *context, char **text,
                                     size_t *n_bytes, size_t *n_before, bool *begins_plainly, struct sqz_error *error);

#endif
