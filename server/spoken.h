/* The text of an answer as it is made of tokens: whole characters, and nothing that may yet become a stop. */
#ifndef SQZ_SERVER_SPOKEN_H
#define SQZ_SERVER_SPOKEN_H

#include "bytes.h"

enum { MOST_STOPS = 16, MOST_STOP_BYTES = 256 };

struct stops {
    size_t n;
    char *text[MOST_STOPS]; /* malloc'ed, none empty */
};
void stops_free(struct stops *stops);

struct spoken {
    struct bytes text; /* all of it that is no stop */
    struct bytes part; /* the beginning of a character */
    size_t n_ready;    /* bytes of text that are surely of the answer */
    int stop;          /* number of the stop that ended it; -1: none */
};

void spoken_begin(struct spoken *spoken);
/* Appends the bytes of a token. Nothing is taken after a stop. stops may be NULL. */
void spoken_put(struct spoken *spoken, const struct stops *stops, const char *data, size_t n);
/* The answer is over: what was held back belongs to it. */
void spoken_end(struct spoken *spoken);
void spoken_free(struct spoken *spoken);

#endif
