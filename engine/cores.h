/*
 * What this process may use of the machine's cores, and how much of them is in
 * use: affinity, the CPU quota of control groups, CPU time of everybody.
 * Linux tells; where a file is not there or says something else, there is no
 * limit and nobody else.
 */
#ifndef SQZ_ENGINE_CORES_H
#define SQZ_ENGINE_CORES_H

#include <stdbool.h>
#include <stddef.h>

enum { SQZ_CORES_MAX = 1024 }; /* CPUs that an affinity mask is read for */

struct sqz_cores {
    int n_allowed;               /* CPUs that this process may run on, at least 1 */
    bool allowed[SQZ_CORES_MAX]; /* which ones */
    double quota;                /* cores that the control groups grant together; 0: no limit */
    char group_stat[256];        /* file with the CPU time of the group that sets the quota; "": none */
};

/* CPU seconds up to now; only differences mean something. */
struct sqz_cores_reading {
    double at;    /* wall clock */
    double all;   /* of everybody on the CPUs that are allowed; a niced process does not count, unless this one is */
    double group; /* of everybody who shares our quota */
    double own;   /* of this process */
};

void sqz_cores_find(struct sqz_cores *cores);
/* Cores that this process can keep busy, at least 1. */
int sqz_cores_count(const struct sqz_cores *cores);
/* false: this system does not tell. Takes some tens of microseconds. */
bool sqz_cores_read(const struct sqz_cores *cores, struct sqz_cores_reading *reading);

/* ---- The formats, by themselves ---------------------------------------------------- */

/* Cores of a file cpu.max ("150000 100000" is 1.5; "max 100000"); 0: no limit, or no such text. */
double sqz_cores_parse_quota(const char *text);
/* Busy seconds in the text of /proc/stat, of the CPUs that are allowed; negative: no such text. */
double sqz_cores_parse_stat(const char *text, const struct sqz_cores *cores, bool with_niced, double ticks_a_second);
/* The path that a line of /proc/self/cgroup has for the controller ("cpu"; "" is version 2), false: no such line. */
bool sqz_cores_parse_group(const char *text, const char *controller, char *path, size_t size);

#endif
