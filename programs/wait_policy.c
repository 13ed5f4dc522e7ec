/* How OpenMP's threads wait; wait_policy.h describes it. */
#define _POSIX_C_SOURCE 200809L /* setenv, readlink */
#include "wait_policy.h"

#include <limits.h>
#include <stdlib.h>
#include <sys/auxv.h>
#include <unistd.h>

/* Turns of the loop in which a thread waits before it goes to sleep. */
static const char spin_count[] = "2500";

/* Variables with which users choose themselves; those of LLVM's runtime, which has other defaults, among them. */
static const char *const choices[] = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY"};

void choose_wait_policy(char **argv)
{
    char path[PATH_MAX];
    for (size_t i = 0; i < sizeof choices / sizeof choices[0]; i++)
        if (getenv(choices[i])) return;
    /* Without a loader the program was given to one by hand, and the loader is what would be started again. */
    if (getauxval(AT_BASE) == 0) return;
    /* By its own name, so that the process keeps it; a program that was replaced meanwhile has none. */
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    if (n <= 0 || setenv("GOMP_SPINCOUNT", spin_count, 1) != 0) return;
    path[n] = '\0';
    execv(path, argv);
}
