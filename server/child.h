/* A program of others that makes text of bytes which strangers sent: a child process that may do as good as nothing. */
#ifndef SQZ_SERVER_CHILD_H
#define SQZ_SERVER_CHILD_H

#include "bytes.h"

struct child_limits {
    size_t memory_bytes; /* of its address space */
    size_t output_bytes;
    unsigned seconds;
};

enum child_end {
    CHILD_DONE,
    CHILD_FAILED,      /* it ended by itself, and says it could not */
    CHILD_KILLED,      /* it broke a limit of the system's or crashed */
    CHILD_LATE,        /* it took longer than it may; killed */
    CHILD_LARGE,       /* it wrote more than it may; killed */
    CHILD_STOPPED,     /* go_on said no; killed */
    CHILD_NOT_STARTED, /* no memory, no process */
};

/* Runs the program arguments[0], a path, with these arguments (NULL behind the last) and no shell; input is what it reads
 * from standard input, output gets what it writes. It has no network, cannot open files but the system's own, cannot write
 * any, and dies with the caller's thread. go_on is asked some times a second. *code: its exit code, when it FAILED. */
enum child_end child_run(const char *const *arguments, const void *input, size_t n, const struct child_limits *limits,
                         bool (*go_on)(void *data), void *data, struct bytes *output, int *code);

#endif
