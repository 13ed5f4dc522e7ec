/* Pictures through gnuplot: any script, and a context's cluster sizes and budget curve. */
#ifndef SQZ_CONSOLE_PLOT_H
#define SQZ_CONSOLE_PLOT_H

#include "curves.h"
#include "squeeze.h"
#include "text_buffer.h"

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

/* The same for a gnuplot script, with its data inside, that sets the terminal for the path and writes to standard
 * output. */
int plot_draw(const char *path, const struct text_buffer *script);

bool plot_has_gnuplot(void); /* whether it can be started by its name */

/* Whether the file name ends in what can be drawn: .png or .svg. */
bool plot_can_draw(const char *path);
bool plot_is_svg(const char *path);

#endif
