/*
 * The threads of OpenMP, one of them where there is no OpenMP. lib/ starts no
 * threads of other kinds.
 */
#ifndef SQZ_LIB_THREADS_H
#define SQZ_LIB_THREADS_H

#include <sched.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* Number of the calling thread in its team, from 0. */
static inline int sqz_thread_number(void)
{
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* A turn of a loop that waits for another thread, the turns counted from 0. Spins briefly, then lets others run: on a busy
 * machine that thread may have lost its core. */
static inline void sqz_thread_wait(unsigned turn)
{
    if (turn > 1000) sched_yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
}

/* Threads that are worth starting: one a core. */
static inline int sqz_core_count(void)
{
#ifdef _OPENMP
    return omp_get_num_procs();
#else
    return 1;
#endif
}

/* Threads to start where n_cores may be used: that many, or what the user set OMP_NUM_THREADS to when that is not what
 * OpenMP would choose by itself. */
static inline int sqz_default_threads(int n_cores)
{
#ifdef _OPENMP
    const int n = omp_get_max_threads();
    return n != omp_get_num_procs() ? n : n_cores;
#else
    (void)n_cores;
    return 1;
#endif
}

#endif
