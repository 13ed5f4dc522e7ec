/* A conversation as a request says it: turns of text. */
#ifndef SQZ_SERVER_TALK_H
#define SQZ_SERVER_TALK_H

#include <jansson.h>

#include "tool_calls.h"
#include "fault.h"

struct turn {
    const char *role; /* "system", "user", "assistant" */
    struct bytes text;
};

struct talk {
    struct turn *turns;
    size_t n, capacity;
    enum call_format calls; /* how it holds calls of tools */
    struct bytes begun;     /* the beginning of the answer, where the client says it */
};

enum { MOST_TURNS = 10000 };

/* The text of a new turn; one of the role that spoke last goes on there. NULL: no memory, or too many. */
struct bytes *talk_say(struct talk *talk, const char *role, struct fault *fault);
void talk_free(struct talk *talk);

/* A last turn of the assistant's is the beginning of the answer. */
void talk_begin_answer(struct talk *talk);

/* Appends a content: a string, or parts of which only texts are understood. CR LF becomes LF. */
bool talk_content(struct bytes *text, const json_t *content, const char *param, struct fault *fault);
void talk_text(struct bytes *text, const char *data, size_t n); /* the same for plain text */

/* Text that has to stand before everything else: in the system turn, made when there is none. */
bool talk_instruct(struct talk *talk, const char *text, size_t n, struct fault *fault);

#endif
