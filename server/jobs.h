/*
 * Documents being prepared. Their texts lie in the folder until they are contexts, so that a job goes on after a
 * restart. Reading is done by the scheduler's thread in pieces; what follows needs no model and has a thread of its
 * own. A document that came with a request is read by the request's own session, and its job takes over the rows.
 */
#ifndef SQZ_SERVER_JOBS_H
#define SQZ_SERVER_JOBS_H

#include "library.h"

struct jobs;

enum sqz_status jobs_open(struct jobs **out, struct library *library, struct sqz_model *model, bool model_on_card,
                          size_t most_text_bytes, struct sqz_error *error);
void jobs_close(struct jobs *jobs); /* what is not finished goes on at the next start */

/* A document under a name. False, and the fault, when it cannot be taken. */
bool jobs_add_text(struct jobs *jobs, const char *id, const char *text, size_t n_bytes, struct fault *fault);
/* The same for a document that document_kind() knows; text is made of it later. */
bool jobs_add_file(struct jobs *jobs, const char *id, const char *data, size_t n_bytes, struct fault *fault);
/* Tokens that conversations begin with, under a name of their own. Returns a number for who will read them, until whose
 * jobs_release() the job waits; 0: they are being prepared already, or cannot be. */
uint64_t jobs_add_tokens(struct jobs *jobs, const int32_t *tokens, size_t n_tokens);
/* The reader reads no further: the job reads on by itself, from where that came to. */
void jobs_release(struct jobs *jobs, uint64_t reader);

void jobs_cancel(struct jobs *jobs, struct entry *entry);

/* For the scheduler's thread: whether a document waits to be read, and to read up to n_tokens tokens of it. Returns
 * tokens read. */
bool jobs_have_work(struct jobs *jobs);
size_t jobs_step(struct jobs *jobs, size_t n_tokens);
/* On a card a document that was read is squeezed within jobs_step(), which calls this every few milliseconds then. */
void jobs_meanwhile(struct jobs *jobs, void (*meanwhile)(void *data), void *data);

/* Also: takes over what the reader's session has, n_read of its prompt's tokens. False: the job needs no more of it. */
bool jobs_follow(struct jobs *jobs, uint64_t reader, const struct sqz_session *session, size_t n_read);

#endif
