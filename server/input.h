/* A client's JSON: parsed within limits, its values read with their bounds. */
#ifndef SQZ_SERVER_INPUT_H
#define SQZ_SERVER_INPUT_H

#include <jansson.h>
#include <stdint.h>

#include "fault.h"

enum { INPUT_MOST_DEPTH = 64, INPUT_MOST_VALUES = 500000 };

/* NULL, and the fault, for what is no JSON object within the limits. */
json_t *input_parse(const char *text, size_t n_bytes, struct fault *fault);

/* Each reads a key that may be missing or null, which leaves *value as it is. A value of another kind, no number or one
 * out of bounds is a fault that names the key and says what is allowed. They return false when there is a fault. */
bool input_real(const json_t *object, const char *key, double low, double high, double *value, struct fault *fault);
bool input_count(const json_t *object, const char *key, int64_t low, int64_t high, int64_t *value, struct fault *fault);
bool input_flag(const json_t *object, const char *key, bool *value, struct fault *fault);
/* The text lives as long as the object. */
bool input_text(const json_t *object, const char *key, const char **value, struct fault *fault);
bool input_object(const json_t *object, const char *key, const json_t **value, struct fault *fault);
bool input_array(const json_t *object, const char *key, const json_t **value, struct fault *fault);

const char *input_kind(const json_t *value); /* "a number", "an object" */

#endif
