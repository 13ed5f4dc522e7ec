/*
 * Connections of a supervisor (supervisor.h): each brings one request, whose head
 * is read here. It is then handed over to rank 0 and bytes go to and fro, or it is
 * answered here. Of one thread, around one epoll.
 */
#ifndef SQZ_SERVER_RELAY_H
#define SQZ_SERVER_RELAY_H

#include <stdint.h>

#include "answered.h"

struct relays;

/* The head of a request. */
struct asked {
    const char *head; /* with the request's line; NULL: rank 0 had it, and was lost before it answered */
    size_t head_bytes;
    char method[16];
    char path[256]; /* without what follows a '?', cut off */
    enum asked_api api;
};

struct relays_options {
    int epoll; /* data.ptr of what is added here is for relays_event() */
    size_t most;
    double header_seconds;
    /* The answer to a request to which there is none of rank 0, to the end of `out`. */
    void (*answer)(void *data, const struct asked *asked, struct bytes *out);
    void *data;
};

/* NULL: out of memory. */
struct relays *relays_create(const struct relays_options *options);
void relays_free(struct relays *relays);

/* Everybody who waits at this socket. */
void relays_accept(struct relays *relays, int listening);
void relays_event(struct relays *relays, void *data, uint32_t events);
/* Behind the events that epoll gave together, some times a second at least. */
void relays_tick(struct relays *relays);

/* Where requests are handed over from now on (handover.h); -1: nowhere, they are answered here. */
void relays_to(struct relays *relays, int socket);
/* Rank 0 is no more. Those that it had not answered to the end are told so, by answer() where it had not begun. */
void relays_break(struct relays *relays, const struct fault *fault);
/* Connections that are open. */
size_t relays_count(const struct relays *relays);

#endif
