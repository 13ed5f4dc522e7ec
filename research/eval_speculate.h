/* Exact answers of one document with drafts beside those without: `squeeze eval --speculate`. */
#ifndef SQZ_RESEARCH_EVAL_SPECULATE_H
#define SQZ_RESEARCH_EVAL_SPECULATE_H

#include <jansson.h>

#include "eval.h"

/* The document's first questions, up to `most`, that fit, answered both ways: an array of {"n_tokens", "seconds_a_token", with drafts, "seconds_a_token_alone",
 * "same", whether both say the same, and what speculation_json() has}. NULL: what the error says, or a signal. */
json_t *eval_speculate(const struct eval *eval, const struct sqz_context *context, const struct eval_document *document,
                       struct sqz_error *error);

/* Of all records that have some: by document and over all. */
void eval_print_speculation(const json_t *records);
json_t *eval_speculation_json(const json_t *records);

#endif
