/* Wall-clock seconds for progress and reports. */
#ifndef SQZ_ENGINE_CLOCK_H
#define SQZ_ENGINE_CLOCK_H

#include <time.h>

static inline double sqz_clock_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

#endif
