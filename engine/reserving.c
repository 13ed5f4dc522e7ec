/* Room for a file beside other work; reserving.h. */
#define _GNU_SOURCE /* clock_gettime */
#include "reserving.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "error.h"

enum { MOMENT_NS = 20000000 };

struct sqz_reserving {
    struct sqz_context_writer *writer;
    pthread_t thread;
    bool threaded;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool done; /* under the lock, as what follows */
    enum sqz_status status;
    struct sqz_error error;
};

static void *reserve(void *data)
{
    struct sqz_reserving *r = data;
    struct sqz_error error;
    sqz_error_clear(&error);
    const enum sqz_status status = sqz_context_writer_reserve(r->writer, &error);
    pthread_mutex_lock(&r->lock);
    r->status = status;
    r->error = error;
    r->done = true;
    pthread_cond_signal(&r->changed);
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

static void wait_a_moment(struct sqz_reserving *r)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += MOMENT_NS;
    if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
    pthread_mutex_lock(&r->lock);
    while (!r->done && pthread_cond_timedwait(&r->changed, &r->lock, &until) == 0) continue;
    pthread_mutex_unlock(&r->lock);
}

enum sqz_status sqz_reserving_begin(struct sqz_reserving **out, struct sqz_context_writer *writer,
                                    struct sqz_error *error)
{
    struct sqz_reserving *r = calloc(1, sizeof *r);
    *out = NULL;
    if (!r) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory to reserve a file");
    r->writer = writer;
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->changed, NULL);
    r->threaded = pthread_create(&r->thread, NULL, reserve, r) == 0;
    if (r->threaded) wait_a_moment(r);
    else reserve(r);
    *out = r;
    return sqz_reserving_look(r, error);
}

enum sqz_status sqz_reserving_look(struct sqz_reserving *r, struct sqz_error *error)
{
    if (!r) return SQZ_OK;
    pthread_mutex_lock(&r->lock);
    const enum sqz_status status = r->done ? r->status : SQZ_OK;
    if (status != SQZ_OK && error) *error = r->error;
    pthread_mutex_unlock(&r->lock);
    return status;
}

enum sqz_status sqz_reserving_end(struct sqz_reserving *r, struct sqz_error *error)
{
    if (!r) return SQZ_OK;
    if (r->threaded) pthread_join(r->thread, NULL);
    const enum sqz_status status = r->status;
    if (status != SQZ_OK && error) *error = r->error;
    pthread_cond_destroy(&r->changed);
    pthread_mutex_destroy(&r->lock);
    free(r);
    return status;
}
