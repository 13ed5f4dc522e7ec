/* From the scheduler to a connection; stream.h describes it. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include "stream.h"

#include <stdlib.h>

#include "clock.h"

struct stream *stream_create(bool events)
{
    struct stream *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    pthread_mutex_init(&s->lock, NULL);
    atomic_init(&s->references, 1);
    s->events = events;
    s->written_at = sqz_clock_seconds();
    return s;
}

void stream_retain(struct stream *s)
{
    atomic_fetch_add(&s->references, 1);
}

void stream_release(struct stream *s)
{
    if (!s || atomic_fetch_sub(&s->references, 1) != 1) return;
    bytes_free(&s->out);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

static void wake(struct stream *s)
{
    if (!s->sleeping || !s->owner) return;
    s->sleeping = false;
    s->wake(s->owner);
}

void stream_write(struct stream *s, const char *data, size_t n)
{
    pthread_mutex_lock(&s->lock);
    if (!s->gone && !s->finished) {
        bytes_append(&s->out, data, n);
        if (s->out.failed) s->aborted = s->gone = true;
        s->written_at = sqz_clock_seconds();
        if (s->events) wake(s);
    }
    pthread_mutex_unlock(&s->lock);
}

void stream_finish(struct stream *s, int status, int retry_after)
{
    pthread_mutex_lock(&s->lock);
    s->finished = true;
    s->status = status;
    s->retry_after = retry_after;
    wake(s);
    pthread_mutex_unlock(&s->lock);
}

void stream_abort(struct stream *s)
{
    pthread_mutex_lock(&s->lock);
    s->aborted = s->gone = true;
    wake(s);
    pthread_mutex_unlock(&s->lock);
}

bool stream_has_room(struct stream *s)
{
    pthread_mutex_lock(&s->lock);
    const bool room = !s->events || s->out.n < STREAM_MOST_BYTES;
    pthread_mutex_unlock(&s->lock);
    return room;
}

bool stream_is_gone(struct stream *s)
{
    pthread_mutex_lock(&s->lock);
    const bool gone = s->gone;
    pthread_mutex_unlock(&s->lock);
    return gone;
}

void stream_keep_alive(struct stream *s, double now, double seconds)
{
    pthread_mutex_lock(&s->lock);
    if (s->events && !s->gone && !s->finished && s->out.n == 0 && now - s->written_at >= seconds) {
        bytes_put(&s->out, ": still here\n\n");
        s->written_at = now;
        wake(s);
    }
    pthread_mutex_unlock(&s->lock);
}

void stream_join(struct stream *s, void (*wake_up)(void *owner), void *owner)
{
    pthread_mutex_lock(&s->lock);
    s->wake = wake_up;
    s->owner = owner;
    pthread_mutex_unlock(&s->lock);
}

void stream_leave(struct stream *s)
{
    pthread_mutex_lock(&s->lock);
    s->gone = true;
    s->owner = NULL;
    bytes_free(&s->out);
    pthread_mutex_unlock(&s->lock);
}
