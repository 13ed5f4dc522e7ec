/* JSON schemas as llama.cpp's grammars (GBNF), so that an answer can be nothing but what a schema allows. */
#ifndef SQZ_SERVER_GRAMMAR_H
#define SQZ_SERVER_GRAMMAR_H

#include <jansson.h>

#include "fault.h"

/* The grammar of any JSON object. */
void grammar_of_json(struct bytes *grammar);
/* The grammar of a schema. Understood are type, enum, const, properties, required, additionalProperties, items,
 * prefixItems, minItems, maxItems, minLength, maxLength, pattern, minimum, maximum, exclusiveMinimum, exclusiveMaximum,
 * multipleOf, anyOf, oneOf, allOf of one, and $ref within the schema; formats and annotations do not narrow what is
 * said. False, and the fault, for what cannot be kept. */
bool grammar_of_schema(struct bytes *grammar, const json_t *schema, struct fault *fault);
/* The same with text around it, for each of n schemas a way: before[i] JSON behind. */
bool grammar_of_choices(struct bytes *grammar, const char *const *before, const json_t *const *schemas, size_t n,
                        const char *behind, struct fault *fault);

#endif
