/* What the APIs that ask for answers share: options of a request, and handing it to the scheduler. */
#ifndef SQZ_SERVER_ASKING_H
#define SQZ_SERVER_ASKING_H

#include "core.h"
#include "input.h"
#include "prompt.h"
#include "tools.h"

/* A new ask with the server's defaults and an id that begins so. */
void asking_begin(struct ask *ask, enum ask_kind kind, const struct server *server, const char *prefix);

/* temperature, top_p, top_k, min_p, seed, penalties, logit_bias and squeeze, which all APIs have alike. entry: of the
 * context that the request is on, or NULL. */
bool asking_sampling(const json_t *body, struct ask *ask, double temperature, const struct entry *entry,
                     struct fault *fault);
/* A string, or an array of some. */
bool asking_stops(const json_t *body, const char *key, struct ask *ask, struct fault *fault);
/* response_format, or text.format: JSON mode or a schema. key: as messages name it. */
bool asking_format(const json_t *format, const char *key, struct ask *ask, struct fault *fault);
/* OpenAI's tool_choice: a word, or an object. function: the object in it that has the name of the one to be called. */
bool asking_tool_choice(const json_t *choice, const json_t *function, struct tools *tools, struct fault *fault);
/* The conversation with its tools becomes the prompt of that model, to be answered as the body asks; answer: false: it is
 * only counted. */
bool asking_talk(struct call *call, const json_t *body, const char *model, struct ask *ask, struct talk *talk,
                 const struct tools *tools, bool answer);

/* What an API makes of a request's body: the options, and the conversation with its tools as the prompt. */
typedef bool asking_take(struct call *call, const json_t *body, struct ask *ask, struct talk *talk,
                         struct tools *tools);
/* A new ask, filled by that from the request's body; false: the fault says why not. */
bool asking_read(struct call *call, struct ask *ask, enum ask_kind kind, const char *prefix, asking_take *take);
/* The whole of it: read, submitted, or freed. */
void asking_answer(struct call *call, enum ask_kind kind, const char *prefix, asking_take *take,
                   const struct writer *writer);

/* Makes a request of what was asked and waits for a place. */
void asking_submit(struct call *call, struct ask *ask, const struct writer *writer);

extern const struct writer write_openai, write_responses, write_messages;

/* How a stream's JSON goes out: `data: {...}`, with the event's name before it where there is one. Takes value. */
void write_event(struct stream *stream, const char *name, json_t *value);
/* As a whole. */
void write_whole(struct stream *stream, int status, json_t *value);
/* The calls in a complete answer, as tools_calls() has them; NULL: none. What was held back of a stream because it
 * might have become one, and did not, goes out. Fills c->called and c->n_plain. */
json_t *write_calls(struct request *request, struct choice *choice);
/* {"share_read", "missed_mass", of exact answers "exact", "drafted_tokens" and "accepted_tokens", where asked for "passages"} of an answer on a context; NULL without one. */
json_t *write_squeeze(const struct usage *usage);

#endif
