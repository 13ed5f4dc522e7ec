/*
 * Who is answered when. One thread has the model: every step takes the next token of each answer and pieces of the
 * questions and documents that wait, as large as a step may take time. Users take turns.
 */
#ifndef SQZ_SERVER_SCHEDULER_H
#define SQZ_SERVER_SCHEDULER_H

#include "jobs.h"
#include "metrics.h"
#include "request.h"

struct scheduler;

struct scheduler_options {
    struct sqz_model *model;
    struct library *library;
    struct jobs *jobs;
    struct metrics *metrics;
    size_t n_slots;               /* answers at once */
    size_t queue_limit;           /* requests that wait */
    double step_seconds;          /* most that a step should take */
    bool on_card;                 /* the model is */
    const char *(*trouble)(void); /* as struct server_ranks; NULL: there is never any */
};

enum sqz_status scheduler_start(struct scheduler **out, const struct scheduler_options *options,
                                struct sqz_error *error);

/* Hands a request over. False, and the fault (429, 503), when there is no room: it then stays the caller's. */
bool scheduler_submit(struct scheduler *scheduler, struct request *request, struct fault *fault);

void scheduler_wake(struct scheduler *scheduler); /* a job came, or somebody left */

/* Takes no more; what waits is refused, what is being answered may go on for so long. trouble: why, or NULL, as
 * fault_of_end(). */
void scheduler_stop(struct scheduler *scheduler, double seconds, const char *trouble);
void scheduler_free(struct scheduler *scheduler);

struct request *request_create(struct ask *ask, struct stream *stream, const struct writer *writer, unsigned user,
                               double seconds); /* takes what is in ask; NULL: out of memory */
void request_free(struct request *request, struct library *library);

#endif
