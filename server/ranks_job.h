/* The ranks of a server as a child: mpirun, and who of them was lost. Linux keeps what mpirun leaves behind a child of ours, so
 * that no process outlives the server. */
#ifndef SQZ_SERVER_RANKS_JOB_H
#define SQZ_SERVER_RANKS_JOB_H

#include <stdbool.h>
#include <sys/types.h>

#include "bytes.h"
#include "squeeze.h"

struct ranks_job_options {
    unsigned n;
    const char *hosts;          /* a file, or names with commas between them; NULL: this machine */
    char *const *arguments;     /* of this program, behind its name, and NULL */
    const char *start_variable; /* of the environment, for ranks wherever they run; NULL: none */
};

struct ranks_job {
    pid_t mpirun; /* 0: none */
    int said;     /* what it writes to its standard error; -1: none */
    unsigned n;
    struct bytes line; /* the last, not whole yet */
    char lost[160];    /* "rank 2 of 4 exited on signal 9 (Killed)"; "": nobody is known to be */
    double asked;      /* when it was asked to end; 0: it was not */
    int status;        /* of mpirun, when it has ended, as waitpid() has it */
};

/* Once. Errors: IO (there is no mpirun). */
enum sqz_status ranks_job_prepare(struct sqz_error *error);
/* Errors: IO. */
enum sqz_status ranks_job_start(struct ranks_job *job, const struct ranks_job_options *options,
                                struct sqz_error *error);
/* Passes on what was written to standard error, and learns from it. */
void ranks_job_listen(struct ranks_job *job);
/* Whether mpirun has ended: then everything of it has, what it left behind was killed. */
bool ranks_job_ended(struct ranks_job *job);
/* Asks mpirun to end; called again, makes it after some seconds. */
void ranks_job_end(struct ranks_job *job);

#endif
