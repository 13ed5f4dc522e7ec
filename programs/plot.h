/* Pictures of a context through gnuplot: cluster sizes and the budget curve. */
#ifndef SQZ_PROGRAMS_PLOT_H
#define SQZ_PROGRAMS_PLOT_H

#include "curves.h"
#include "squeeze.h"

/* Cluster sizes are counted by powers of two: bin b holds sizes above 2^(b-1) up to 2^b, bin 0 size 1. */
enum { SIZE_BINS = 32 };

struct size_histogram {
    uint64_t n[SIZE_BINS];
    uint64_t n_clusters, smallest, largest, sum;
};

void size_histogram_add(struct size_histogram *histogram, size_t size);

/* Draws into a .png or .svg file, which appears whole or not at all. Says what went wrong and returns the exit code. */
int plot_context(const char *path, const struct size_histogram *levels, uint32_t n_levels,
                 const struct curve_set *curves);

/* Whether the file name ends in what plot_context() can draw. */
bool plot_can_draw(const char *path);

#endif
