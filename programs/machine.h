/* The machine that figures were measured on: its description and its read bandwidth. */
#ifndef SQZ_PROGRAMS_MACHINE_H
#define SQZ_PROGRAMS_MACHINE_H

#include <jansson.h>

/* CPU model, cores, threads used, instruction set chosen, memory, compiler, operating system. */
json_t *machine_json(int n_threads);

/* Bytes a second that n_threads read from memory together: the best of several passes over a buffer far larger than
 * the caches. 0 when there is no memory for it. */
double machine_read_bandwidth(int n_threads);

#endif
