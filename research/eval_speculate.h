/* Exact answers of one document, drafted by each method in turn, beside those without drafts: `squeeze eval --speculate`. */
#ifndef SQZ_RESEARCH_EVAL_SPECULATE_H
#define SQZ_RESEARCH_EVAL_SPECULATE_H

#include <jansson.h>

#include "eval.h"

/*
 * The document's first questions, up to `most`, that fit, answered with drafts of each method of eval->drafts and without:
 * an array of {"method", "n_tokens", "seconds_a_token", with drafts, "seconds_a_token_alone", "draft_bytes", what a drafted
 * token of the model's reads of the context, "same", whether both say the same, and what speculation_json() has}. All
 * methods draft by the same budget, the document's floor at least, but quantspec, which reads all rows; what they drafted
 * is run on F16 rows. NULL: what the error says, or a signal.
 */
json_t *eval_speculate(const struct eval *eval, struct sqz_context *base, const struct eval_document *document,
                       const char *label, struct sqz_error *error);

/* Of all records that have some: by method, and of each by length of the contexts and by document. */
void eval_print_speculation(const struct eval *eval, const json_t *records);
json_t *eval_speculation_json(const struct eval *eval, const json_t *records);

#endif
