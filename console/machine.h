/* The machine that figures were measured on: its description and its read bandwidth. */
#ifndef SQZ_CONSOLE_MACHINE_H
#define SQZ_CONSOLE_MACHINE_H

#include <jansson.h>
#include <stdbool.h>

#include "memory_probe.h"

/* CPU model, cores, threads used, instruction set chosen, memory, compiler, operating system. */
json_t *machine_json(int n_threads);

/* Where figures come from: adds the machine, the versions and the command line to an object. */
void add_origin_json(json_t *root, int n_threads);

/* The best of several passes. 0 when there is no memory for the buffer. */
double machine_read_bandwidth(int n_threads);

#endif
