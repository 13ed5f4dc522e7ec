/* Rates of attention as JSON, as `squeeze analyze -c` and `what-if --rates here` write them, and read back. */
#ifndef SQZ_ANALYSIS_RATES_FILE_H
#define SQZ_ANALYSIS_RATES_FILE_H

#include <jansson.h>

#include "speculation_gain.h"

json_t *rates_json(const struct attention_rates *rates);
/* {"tokens", "rest_seconds", "dense_seconds_a_byte"} of each size of run. */
json_t *batches_json(const struct speculation_rates *rates);

/* Of a file with "rates", "short_context_seconds" and perhaps "batches" (else speculation_rates_fill()). Dies, with what is
 * wrong, when it is no such file. */
void rates_read(const char *path, struct speculation_rates *rates);

#endif
