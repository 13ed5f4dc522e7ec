/* Rank 0's connections; handed.h describes it. */
#define _POSIX_C_SOURCE 200809L
#include "handed.h"

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "error.h"
#include "handover.h"
#include "server.h"

struct handed {
    int socket;
    struct MHD_Daemon *daemon;
    pthread_t thread;
    atomic_bool stopping;
};

/* Of this process, of which there is one server. */
static atomic_bool told;

bool server_told_to_stop(void)
{
    return told;
}

static void *take(void *data)
{
    struct handed *h = data;
    while (!h->stopping && !told) {
        struct pollfd any = {.fd = h->socket, .events = POLLIN};
        struct handover_message message;
        int descriptor;
        if (poll(&any, 1, 100) <= 0) continue;
        const int n = handover_receive(h->socket, &message, &descriptor);
        if (n < 0 || (n > 0 && message.kind == HANDOVER_STOP)) told = true;
        if (n > 0 && descriptor >= 0 && message.peer_bytes <= sizeof message.peer) /* It closes what it cannot take. */
            MHD_add_connection(h->daemon, descriptor, (const struct sockaddr *)&message.peer,
                               (socklen_t)message.peer_bytes);
        else if (descriptor >= 0) close(descriptor);
    }
    return NULL;
}

enum sqz_status handed_start(struct handed **out, int socket, struct MHD_Daemon *daemon, struct sqz_error *error)
{
    struct handed *h = calloc(1, sizeof *h);
    *out = NULL;
    if (!h) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory");
    h->socket = socket;
    h->daemon = daemon;
    if (pthread_create(&h->thread, NULL, take, h) != 0) {
        free(h);
        return sqz_error_set(error, SQZ_ERROR_INTERNAL, "no thread could be started");
    }
    *out = h;
    return SQZ_OK;
}

void handed_stop(struct handed *h)
{
    if (!h) return;
    h->stopping = true;
    pthread_join(h->thread, NULL);
    free(h);
}
