/* Times of something that is run again and again, and their median. */
#ifndef SQZ_CONSOLE_TIMES_H
#define SQZ_CONSOLE_TIMES_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TIMES_MAX = 512 };

struct times {
    double seconds[TIMES_MAX];
    size_t n;
};

/* A time beyond TIMES_MAX is not kept. */
static inline void times_add(struct times *times, double seconds)
{
    if (times->n < TIMES_MAX) times->seconds[times->n++] = seconds;
}

static inline int times_compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Of the values in order, the one at that share of them: 0 the least, 0.5 the median, 1 the most; 0 for none. n is at
 * most TIMES_MAX. */
static inline double times_quantile(const double *values, size_t n, double share)
{
    double sorted[TIMES_MAX];
    memcpy(sorted, values, n * sizeof *sorted);
    qsort(sorted, n, sizeof *sorted, times_compare);
    return n ? sorted[(size_t)(share * (double)(n - 1) + 0.5)] : 0.0;
}

static inline double times_median(const struct times *times) /* NAN: none */
{
    double sorted[TIMES_MAX];
    memcpy(sorted, times->seconds, times->n * sizeof *sorted);
    qsort(sorted, times->n, sizeof *sorted, times_compare);
    return times->n ? sorted[times->n / 2] : NAN;
}

#endif
