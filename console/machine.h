/* The machine that figures were measured on: its description and its read bandwidth. */
#ifndef SQZ_CONSOLE_MACHINE_H
#define SQZ_CONSOLE_MACHINE_H

#include <jansson.h>
#include <stdbool.h>

#include "pages.h"

/* CPU model, cores, threads used, instruction set chosen, memory, compiler, operating system. */
json_t *machine_json(int n_threads);

/* Where figures come from: adds the machine, the versions and the command line to an object. */
void add_origin_json(json_t *root, int n_threads);

/* A buffer far larger than the caches, for reading all of it again and again. It lies in 2 MiB pages where the system
 * gives them: with 4 KiB pages the walks of the page tables are measured too (a Zen 4 virtual machine: 45 to 52 GB/s
 * in place of 58 to 64). The bandwidth of a shared machine changes while a program runs (the same one: 35 GB/s for
 * seconds, then 62), so whoever wants a share of it measures it right beside what is compared. */
struct memory_probe {
    struct pages pages;
    int n_threads;
};

bool memory_probe_open(struct memory_probe *probe, int n_threads); /* false: no memory */
void memory_probe_close(struct memory_probe *probe);

/* One pass: bytes a second. Afterwards the caches hold nothing else. */
double memory_probe_read(const struct memory_probe *probe);

/* The best of several passes. 0 when there is no memory for the buffer. */
double machine_read_bandwidth(int n_threads);

#endif
