/*
 * `squeeze serve`: prepared contexts for many users over HTTP. The room's face to the program; core.h is what its files
 * share.
 */
#ifndef SQZ_SERVER_SERVER_H
#define SQZ_SERVER_SERVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "squeeze.h"

/* Of a server that is several processes (docs/ranks.md). */
struct server_ranks {
    unsigned n;        /* 1: it is one */
    unsigned restarts; /* they were started again so often */
    const char *(*trouble)(
        void); /* why contexts of several ranks cannot be read any more; NULL: they can, or it is one */
};

struct server_options {
    const char *model_name; /* as clients name it */
    const char *contexts;   /* folder */
    const char *host;
    unsigned port;        /* 0: any that is free */
    const char *key_file; /* NULL: none */
    bool public_without_keys;
    bool model_on_card;
    float budget;                /* where a request names none */
    size_t n_slots, queue_limit; /* answers at once; requests that wait */
    size_t most_body_bytes, most_upload_bytes, most_answer_tokens, most_connections;
    double request_seconds; /* most that a request may take */
    double header_seconds;  /* and a client to say what it wants */
    double stop_seconds;    /* that answers in work have when the server stops */
    double step_seconds;
    size_t auto_prepare_tokens; /* 0: never */
    uint64_t disk_bytes;        /* of the folder; 0: no limit */
    struct server_ranks ranks;
    int supervisor; /* socket over which connections come (handover.h); -1: it listens at host and port itself */
};

/* Serves until stop() says so, which is asked some times a second. ready is called once it listens, with the port.
 * Errors: IO (folder, keys, address), ARGUMENT (a public address without keys), MEMORY, INTERNAL. */
enum sqz_status server_run(struct sqz_model *model, const struct server_options *options, bool (*stop)(void),
                           void (*ready)(const char *host, unsigned port, size_t n_contexts), struct sqz_error *error);

/* Whether the supervisor has said that this process is to stop, or is gone: for stop() to ask. */
bool server_told_to_stop(void);

#endif
