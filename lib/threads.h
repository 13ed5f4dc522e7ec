/*
 * The threads of OpenMP, one of them where there is no OpenMP. lib/ starts no
 * threads of other kinds.
 */
#ifndef SQZ_LIB_THREADS_H
#define SQZ_LIB_THREADS_H

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

/* Threads that are worth starting: one a core. */
static inline int sqz_core_count(void)
{
#ifdef _OPENMP
    return omp_get_num_procs();
#else
    return 1;
#endif
}

#endif
