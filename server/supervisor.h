/*
 * A server whose work is done by ranks: this process has the socket that clients
 * reach and the job of ranks as a child. Each connection is handed over to rank
 * 0, which answers as it would by itself. When a rank dies, MPI ends the job: whoever
 * was being answered is told, others are told until it is back, and it is started
 * again. docs/ranks.md says why so.
 */
#ifndef SQZ_SERVER_SUPERVISOR_H
#define SQZ_SERVER_SUPERVISOR_H

#include "ranks_job.h"
#include "server.h"

struct supervisor_options {
    struct server_options server; /* where it listens, keys, limits of time and connections */
    struct ranks_job_options job;
    double start_seconds;      /* that mpirun and MPI have to start until rank 0 comes */
    double most_pause_seconds; /* between two starts of the ranks; the first is half a second, each twice the last */
};

/* Serves until stop() says so. ready is called once ranks answer for the first time, say when they are lost and when they are
 * back. Errors: as server_run(), and IO: mpirun, or ranks that end before they have answered once. */
enum sqz_status supervisor_run(const struct supervisor_options *options, bool (*stop)(void),
                               void (*ready)(const char *host, unsigned port, size_t n_contexts),
                               void (*say)(const char *text), struct sqz_error *error);

#endif
