/*
 * What goes from the scheduler to one connection: bytes in a bounded queue, and whether there is still somebody who
 * reads them. The scheduler writes, the connection's thread takes; whoever waits is woken.
 */
#ifndef SQZ_SERVER_STREAM_H
#define SQZ_SERVER_STREAM_H

#include <pthread.h>
#include <stdatomic.h>

#include "bytes.h"

enum { STREAM_MOST_BYTES = 64 * 1024 };

struct stream {
    pthread_mutex_t lock;
    atomic_int references;
    struct bytes out; /* not taken yet */
    bool events;      /* goes out as it comes; else whole, when it is finished */
    bool finished, gone, aborted;
    int status;      /* HTTP, of one that goes out whole */
    int retry_after; /* seconds; 0: not said */
    double written_at;
    bool sleeping;             /* the connection is, until wake() */
    void (*wake)(void *owner); /* under the lock */
    void *owner;               /* NULL: no connection any more */
};

struct stream *stream_create(bool events); /* one reference; NULL: out of memory */
void stream_retain(struct stream *stream);
void stream_release(struct stream *stream);

/* For who writes. Bytes for nobody, or beyond what memory there is, are dropped. */
void stream_write(struct stream *stream, const char *data, size_t n);
void stream_finish(struct stream *stream, int status, int retry_after);
void stream_abort(struct stream *stream); /* the connection ends without an end of the answer */
bool stream_has_room(struct stream *stream);
bool stream_is_gone(struct stream *stream);
/* A comment, when nothing was written for so long: proves that somebody reads. */
void stream_keep_alive(struct stream *stream, double now, double seconds);

/* For the connection. wake is called, under the lock, when it sleeps and there is something for it. */
void stream_join(struct stream *stream, void (*wake)(void *owner), void *owner);
void stream_leave(struct stream *stream); /* nobody reads any more */

#endif
