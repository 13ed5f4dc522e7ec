/* What decides a result, as 128 bits; identity.h describes it. */
#include "identity.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

struct identity identity_begin(void)
{
    XXH3_state_t *state = XXH3_createState(); /* aligned for its vectors */
    if (!state || XXH3_128bits_reset(state) != XXH_OK) die("out of memory");
    return (struct identity){state};
}

void identity_add(struct identity *identity, const void *bytes, size_t n)
{
    const uint64_t length = n;
    XXH3_128bits_update(identity->state, &length, sizeof length);
    XXH3_128bits_update(identity->state, bytes, n);
}

void identity_add_text(struct identity *identity, const char *text)
{
    identity_add(identity, text, strlen(text));
}

void identity_print(struct identity *identity, const char *format, ...)
{
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    const int n = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (n < 0 || (size_t)n >= sizeof text) die("what identifies a result does not fit into %zu bytes", sizeof text);
    identity_add(identity, text, (size_t)n);
}

void identity_add_squeeze(struct identity *identity, const struct sqz_squeeze_options *s)
{
    identity_print(identity, "|%d|%u|%d|%d|%d|%u|%d|%u|%u|%u|%d%d%d%d%d|%u|%" PRIu64, (int)s->rule, s->n_levels,
                   (int)s->metric, (int)s->group, (int)s->index, s->code_words, (int)s->keys, s->n_sinks, s->n_window,
                   s->n_iterations, s->center, s->variance, s->per_head, s->tail, s->value_skip, s->n_calibration,
                   (uint64_t)s->seed);
    if (s->rows != SQZ_ROWS_F16) identity_print(identity, "|rows %d", (int)s->rows);
    identity_add(identity, s->centroid_share, sizeof s->centroid_share);
}

void identity_end(struct identity *identity, char text[IDENTITY_TEXT])
{
    const XXH128_hash_t hash = XXH3_128bits_digest(identity->state);
    snprintf(text, IDENTITY_TEXT, "%016" PRIx64 "%016" PRIx64, (uint64_t)hash.high64, (uint64_t)hash.low64);
    XXH3_freeState(identity->state);
    identity->state = NULL;
}
