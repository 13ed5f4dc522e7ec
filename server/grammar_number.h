/* Numbers within bounds as expressions of llama.cpp's grammars. */
#ifndef SQZ_SERVER_GRAMMAR_NUMBER_H
#define SQZ_SERVER_GRAMMAR_NUMBER_H

#include <jansson.h>

#include "bytes.h"

/* Whether a schema has minimum, maximum, exclusiveMinimum, exclusiveMaximum or multipleOf. */
bool grammar_has_bounds(const json_t *schema);
/* Appends the expression of the numbers that these allow, whole ones or any, of at most 16 digits before the point and
 * 16 behind it, without exponent. False, and what is wrong: nothing is within them, or they cannot be kept. */
bool grammar_number(struct bytes *out, const json_t *schema, bool whole, const char **problem);

#endif
