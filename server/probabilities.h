/* Probabilities of an answer's tokens, as chat completions and responses show them. */
#ifndef SQZ_SERVER_PROBABILITIES_H
#define SQZ_SERVER_PROBABILITIES_H

#include <jansson.h>

#include "request.h"

/* The text of a token, in UTF-8. */
json_t *probability_text(const struct request *request, int32_t token);
/* How many tokens' texts lie within the first text_bytes of the answer; those before n_said_sent were shown already. */
size_t probabilities_until(const struct choice *choice, size_t text_bytes);
/* An array of tokens [from, to): text, log probability, bytes, and the likeliest in their places. */
json_t *probabilities_json(const struct choice *choice, size_t from, size_t to);

#endif
