/* The passages of a document and how much of an answer's attention each had. */
#ifndef SQZ_SERVER_PASSAGES_H
#define SQZ_SERVER_PASSAGES_H

#include <jansson.h>

#include "library.h"

enum { MOST_PASSAGES = 192 };

struct passage {
    size_t from, to; /* bytes of the document */
    double share;    /* of the attention that all of them had; they sum to 1 */
};

/* Cuts a text into passages of about the same length, some hundred of a long one, each up to the end of a line, a
 * sentence or a word. Returns how many. */
size_t passages_cut(struct passage passages[MOST_PASSAGES], const char *text, size_t n_bytes);

/* Adds what each token had to the passage in which it begins, and makes shares of it. n_bytes[i]: of token i. Tokens behind
 * the last passage count for that. False: none had anything. */
bool passages_share(struct passage *passages, size_t n, const size_t *n_bytes, const float *had, size_t n_tokens);

/* Of a session's answer; malloc'ed, NULL: not known. The context's sinks are left out: they have most of any token's
 * attention, whatever was asked. */
struct passage *passages_of_answer(const struct sqz_model *model, const struct entry *entry,
                                   const struct sqz_session *session, size_t *n);

json_t *passages_json(const struct passage *passages, size_t n); /* null where they are not known */

#endif
