/*
 * Between the process that has the connections (supervisor.h) and rank 0, which
 * answers: a socket over which connections are handed over, and what each says
 * of itself. It has a name of Linux's abstract kind, so that no file is left, and
 * is only for processes of the same user.
 */
#ifndef SQZ_SERVER_HANDOVER_H
#define SQZ_SERVER_HANDOVER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>

#include "squeeze.h"

/* The variable of the environment in which rank 0 finds the name. */
#define HANDOVER_VARIABLE "SQUEEZE_SUPERVISOR"

enum handover_kind {
    HANDOVER_WELCOME = 1, /* to rank 0: value is how often ranks were started again */
    HANDOVER_READY,       /* from rank 0: it answers; value is its number of contexts */
    HANDOVER_CONNECTION,  /* to rank 0, with a descriptor, and whom it comes from */
    HANDOVER_STOP,        /* to rank 0: no more comes, answers in work may end */
};

struct handover_message {
    uint32_t kind, value;
    uint32_t peer_bytes; /* of an address */
    struct sockaddr_storage peer;
};

enum { HANDOVER_NAME_MAX = 64 };

/* Listens under a name that nobody can guess. -1: errno says why. */
int handover_listen(char name[HANDOVER_NAME_MAX]);
/* -1: nobody (any more), or a process of another user. */
int handover_accept(int listening);
/* Rank 0's end, welcomed; *restarts is what the welcome says. Errors: IO. */
enum sqz_status handover_join(const char *name, int *out, unsigned *restarts, struct sqz_error *error);

/* Never waits. False: it did not go. descriptor -1: none; else it is the caller's still. */
bool handover_send(int out, const struct handover_message *message, int descriptor);
/* 1: a message; 0: none now; -1: the other end is gone. *descriptor is the caller's then, -1: none. */
int handover_receive(int in, struct handover_message *message, int *descriptor);

#endif
