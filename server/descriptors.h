/* Connections are descriptors: as many as the system lets a process have. */
#ifndef SQZ_SERVER_DESCRIPTORS_H
#define SQZ_SERVER_DESCRIPTORS_H

#include <sys/resource.h>

static inline void raise_descriptors(size_t wanted)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
    const rlim_t more = wanted + 256;
    if (limit.rlim_cur >= more) return;
    limit.rlim_cur = limit.rlim_max == RLIM_INFINITY || more < limit.rlim_max ? more : limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

#endif
