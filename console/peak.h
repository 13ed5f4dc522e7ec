/* What the cores of this machine can multiply and add at most, each instruction set by itself. */
#ifndef SQZ_CONSOLE_PEAK_H
#define SQZ_CONSOLE_PEAK_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

/* An instruction that this CPU and OS can run. Rates count a multiplication and an addition as two. */
struct peak {
    const char *name; /* "avx512_fma", "avx512_vnni", ... */
    bool f32;         /* multiplies F32 numbers (false: narrower ones, for the reader to compare with) */
    double per_second;
};

/* Measures every instruction known for this machine's architecture with n_threads threads: a loop over registers alone,
 * several short runs of it, the best taken. Returns how many of peaks[0..capacity) were filled. */
size_t peaks_measure(struct peak *peaks, size_t capacity, int n_threads);

/* The highest F32 rate; 0 when there is none. */
double peaks_best_f32(const struct peak *peaks, size_t n);

/* {"avx512_fma": 1e9 operations a second, ...} */
json_t *peaks_json(const struct peak *peaks, size_t n);

#endif
