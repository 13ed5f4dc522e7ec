/* Text out of tokens; spoken.h describes it. */
#define _GNU_SOURCE /* memmem */
#include "spoken.h"

#include <stdlib.h>
#include <string.h>

void stops_free(struct stops *stops)
{
    for (size_t i = 0; i < stops->n; i++) free(stops->text[i]);
    stops->n = 0;
}

void spoken_begin(struct spoken *s)
{
    memset(s, 0, sizeof *s);
    s->stop = -1;
}

/* The stop that begins first from byte `from` on; false: none. */
static bool find_stop(const struct spoken *s, const struct stops *stops, size_t from, size_t *at, int *which)
{
    bool found = false;
    for (size_t i = 0; i < stops->n; i++) {
        const char *hit = memmem(s->text.data + from, s->text.n - from, stops->text[i], strlen(stops->text[i]));
        if (!hit || (found && (size_t)(hit - s->text.data) >= *at)) continue;
        *at = (size_t)(hit - s->text.data);
        *which = (int)i;
        found = true;
    }
    return found;
}

/* Bytes at the end that are the beginning of a stop. */
static size_t held_back(const struct spoken *s, const struct stops *stops)
{
    size_t most = 0;
    for (size_t i = 0; i < stops->n; i++) {
        const size_t length = strlen(stops->text[i]);
        size_t n = length - 1 < s->text.n ? length - 1 : s->text.n;
        while (n > most && memcmp(s->text.data + s->text.n - n, stops->text[i], n) != 0) n--;
        if (n > most) most = n;
    }
    return most;
}

void spoken_put(struct spoken *s, const struct stops *stops, const char *data, size_t n)
{
    size_t at = 0;
    if (s->stop >= 0) return;
    bytes_append(&s->part, data, n);
    if (!s->part.data) return;
    const size_t whole = utf8_whole(s->part.data, s->part.n);
    const size_t from = s->n_ready;
    bytes_append_utf8(&s->text, s->part.data, whole);
    bytes_drop(&s->part, whole);
    s->n_ready = s->text.n;
    if (!stops || !s->text.data) return;
    if (find_stop(s, stops, from, &at, &s->stop)) {
        s->text.data[at] = '\0';
        s->text.n = s->n_ready = at;
        return;
    }
    s->n_ready -= held_back(s, stops);
}

void spoken_end(struct spoken *s)
{
    if (s->stop < 0 && s->part.n) bytes_append_utf8(&s->text, s->part.data, s->part.n);
    bytes_free(&s->part);
    s->n_ready = s->text.n;
}

void spoken_free(struct spoken *s)
{
    bytes_free(&s->text);
    bytes_free(&s->part);
}
