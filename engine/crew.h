/*
 * How many threads a model runs with: one a core, or fewer while other
 * processes use the cores.
 *
 * Threads that share every product wait for the slowest of them at the end of
 * each. Where one has to share its core, all stand still for the time slices
 * of the stranger: two threads beside one busy process on two cores are slower
 * than one thread alone. So now and then, between two runs, the crew looks how
 * much of the cores went to others, and leaves those cores to them.
 *
 * With a thread for every CPU each has one of its own while a run lasts. Linux otherwise puts two of them on one CPU when
 * a stranger has run for a moment on the other, and leaves them there for some milliseconds while that one is idle: each
 * spins at a barrier for the other, who waits for the CPU, and a token of 10 ms takes 40 to 100.
 *
 * Results never depend on the number of threads, only speed does.
 */
#ifndef SQZ_ENGINE_CREW_H
#define SQZ_ENGINE_CREW_H

#include "cores.h"

struct sqz_crew {
    int most, left, now; /* threads there are; those that others leave a core to; those of this run */
    bool fixed;          /* as many as were asked for, whatever happens */
    bool settled;        /* something has been decided */
    bool placed;         /* each has a CPU where there are as many; false: they go where they are sent */
    struct sqz_cores cores;
    struct sqz_cores_reading last; /* when it was last looked */
    double ended_at;               /* when the last run was over */
};

/* As many as are worth starting: one for each core that this process may use, or the user's OMP_NUM_THREADS. */
int sqz_crew_most(void);

/* n_threads of them, whatever happens; 0: one a core, fewer while the machine is busy. Begins to watch. */
void sqz_crew_begin(struct sqz_crew *crew, int n_threads);

/* Before a run of n_tokens tokens: how many threads it gets, crew->now, and their places. A batch of many gets all: its products take
 * longer than a time slice and their parts go to whoever is free, so that every thread adds its share of a core. */
int sqz_crew_step(struct sqz_crew *crew, size_t n_tokens);
/* After a run, by the thread that made it, or after whatever else this process was busy with since sqz_crew_begin(). */
void sqz_crew_pause(struct sqz_crew *crew);

/* Lets the threads go that OpenMP keeps for the calling thread, which computes nothing for a while. GNU's runtime counts
 * those of all threads together, and once they are more than the CPUs the threads that compute hardly spin any more:
 * they sleep and are woken some 200 times a token, which on two cores takes a tenth of the speed and more. */
void sqz_crew_dismiss(void);

/* The decision by itself: what is read at the end of a stretch of time that began at crew->last. */
void sqz_crew_decide(struct sqz_crew *crew, const struct sqz_cores_reading *reading);

#endif
