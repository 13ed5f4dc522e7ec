/*
 * Text on its way to tokens and back: tokenizing, and the chat template's pieces
 * around a document and a question. What comes in passes intake.h first.
 */
#ifndef SQZ_ENGINE_TEXT_H
#define SQZ_ENGINE_TEXT_H

#include "model.h"

struct sqz_tokens {
    int32_t *data; /* malloc'ed */
    size_t n;
};

/* `template` when llama.cpp can apply it, else NULL. */
const char *sqz_text_usable_template(const char *template);

/* The model's template around messages, and the start of an answer; malloc'ed. */
enum sqz_status sqz_text_render(char **out, const struct sqz_model *model, const struct llama_chat_message *messages,
                                size_t n_messages, struct sqz_error *error);

/* Appends the tokens of a text. special: control tokens written out in it are recognised. */
enum sqz_status sqz_text_append(struct sqz_tokens *tokens, const struct sqz_model *model, const char *text,
                                size_t n_bytes, bool special, struct sqz_error *error);

/* Tokens of a whole context: what the template puts before the document, the document, a blank line. */
enum sqz_status sqz_text_context(struct sqz_tokens *tokens, const struct sqz_model *model, const char *document,
                                 size_t n_bytes, bool raw, size_t *n_document_tokens, struct sqz_error *error);

/* Tokens from a question to the start of its answer. first: the question follows the document in one turn. */
enum sqz_status sqz_text_question(struct sqz_tokens *tokens, const struct sqz_model *model, bool has_template,
                                  const char *question, size_t n_bytes, bool first, struct sqz_error *error);

/* Of an answer in plain text, the bytes before its end; what may be the beginning of an end is held back. */
size_t sqz_text_answer_bytes(const char *text, size_t n_bytes, bool *ended);

#endif
