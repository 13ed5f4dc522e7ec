/* Reading memory: its rate, and something that takes a known time and leaves nothing in the caches. */
#ifndef SQZ_CONSOLE_MEMORY_PROBE_H
#define SQZ_CONSOLE_MEMORY_PROBE_H

#include <stdbool.h>
#include <stddef.h>

#include "pages.h"

/* A buffer far larger than the caches, for reading all of it again and again. It lies in 2 MiB pages where the system
 * gives them: with 4 KiB pages the walks of the page tables are measured too (a Zen 4 virtual machine: 45 to 52 GB/s
 * in place of 58 to 64). The bandwidth of a shared machine changes while a program runs (the same one: 35 GB/s for
 * seconds, then 62), so whoever wants a share of it measures it right beside what is compared. */
struct memory_probe {
    struct pages pages;
    int n_threads;
    size_t at; /* where the next read of a part begins, in words */
};

bool memory_probe_open(struct memory_probe *probe, int n_threads); /* false: no memory */
void memory_probe_close(struct memory_probe *probe);

/* One pass: bytes a second. Afterwards the caches hold nothing else. */
double memory_probe_read(const struct memory_probe *probe);
/* So many bytes of it, behind those of the time before; seconds. */
double memory_probe_read_some(struct memory_probe *probe, size_t n_bytes);

#endif
