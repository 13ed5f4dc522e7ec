/*
 * The program as several processes under mpirun: rank 0 runs the command and the
 * model as ever, the others hold shards of contexts and attend to them. Started
 * without mpirun, or as one process, nothing here does anything.
 */
#ifndef SQZ_CONSOLE_MANY_RANKS_H
#define SQZ_CONSOLE_MANY_RANKS_H

#include <jansson.h>
#include <stdbool.h>

/* Before the command begins. Returns in rank 0 and in a process by itself; the others work until rank 0 ends, and end the
 * process. A command that has no use for ranks, and a program that was built without MPI, are refused. */
void ranks_begin(const char *command);

/* How many ranks there are; 1 in a process by itself. */
unsigned ranks_count(void);
/* Which rank is lost, so that nothing more comes of the others; NULL: none. Static. */
const char *ranks_trouble(void);
/* Whether this program can be several processes. */
bool ranks_built(void);

/* What a rank has sent for a token and layer: NULL in a process by itself. */
json_t *ranks_json(void);

#endif
