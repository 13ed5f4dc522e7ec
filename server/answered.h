/*
 * What a supervisor sees of an answer that passes through it: where it ends, and
 * that of a stream of events only whole ones go on, so that one may follow that
 * says what went wrong.
 */
#ifndef SQZ_SERVER_ANSWERED_H
#define SQZ_SERVER_ANSWERED_H

#include "fault.h"

/* The API by which a request came, and how it says faults. */
enum asked_api { ASKED_OPENAI, ASKED_RESPONSES, ASKED_ANTHROPIC };
enum asked_api asked_api_of(const char *path);

struct answered {
    enum asked_api api;
    bool bodiless; /* the request was a HEAD */
    enum { ANSWER_HEAD, ANSWER_COUNTED, ANSWER_UNTIL_END, ANSWER_CHUNKS, ANSWER_EVENTS, ANSWER_DONE } state;
    size_t left;            /* of ANSWER_COUNTED */
    bool begun;             /* something was passed on */
    struct bytes in, event; /* not understood yet; the beginning of an event */
    unsigned n_events;
};

/* More of it came: what can go on goes to the end of `out`. */
void answered_take(struct answered *answer, const char *data, size_t n, struct bytes *out);
/* Nothing more comes of an answer that has begun. Writes what is missing: the fault as the last event. False: nothing can be
 * said in HTTP's terms any more, the connection can only break off. */
bool answered_break(struct answered *answer, const struct fault *fault, struct bytes *out);
void answered_free(struct answered *answer);

/* A whole answer with the fault. */
void answered_fault(const struct fault *fault, enum asked_api api, bool bodiless, struct bytes *out);
/* One with a body of `type`; retry_after in seconds, 0: not said. */
void answered_body(int status, const char *type, const struct bytes *body, int retry_after, bool bodiless,
                   struct bytes *out);

/* The value of a header in an HTTP head, without blanks around it, cut off at `most`; false: it has none. */
bool head_value(const char *head, size_t n, const char *name, char *value, size_t most);

#endif
