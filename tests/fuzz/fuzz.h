/*
 * What the fuzz targets share: numbers taken from an input, a file in memory
 * that holds it, arrays that end exactly where AddressSanitizer sees one byte
 * more, attention over a layer in every way that a caller has, and system calls
 * that fail when they are told to.
 *
 * A target is libFuzzer's LLVMFuzzerTestOneInput(); replay.c runs the same on
 * files without libFuzzer. README.md says how they are run.
 */
#ifndef SQZ_FUZZ_H
#define SQZ_FUZZ_H

#include "layer.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);
size_t LLVMFuzzerCustomMutator(uint8_t *bytes, size_t n, size_t capacity, unsigned seed);
size_t LLVMFuzzerMutate(uint8_t *bytes, size_t n, size_t capacity); /* libFuzzer's own */

/* Ends the run as a crash, with a sentence: a promise is broken that no sanitizer knows of. */
_Noreturn void fuzz_fail(const char *promise, const char *found);

/* ---- Numbers of an input ------------------------------------------------------- */

/* The input's bytes one after another, zeros behind its end; and random numbers that depend on nothing but it. */
struct choices {
    const uint8_t *bytes;
    size_t n, at;
    uint64_t state;
};

struct choices choices_of(const uint8_t *bytes, size_t n);
uint8_t choose_byte(struct choices *choices);
uint32_t choose_below(struct choices *choices, uint32_t n); /* n at least 1; one or two bytes */
uint32_t random_u32(struct choices *choices);
uint32_t random_below(struct choices *choices, uint32_t n);

/* ---- Files in memory --------------------------------------------------------------- */

/* A path under which the bytes can be opened until the next call. */
const char *fuzz_file(const uint8_t *bytes, size_t n);
void fuzz_file_resize(size_t n); /* the same file; what it grows by was never written */

/* ---- Layers -------------------------------------------------------------------------- */

/* Puts copies with exact ends in place of a layer's arrays; exact_end() frees them and puts the old ones back. */
struct exact_arrays {
    struct sqz_layer *layer;
    struct sqz_layer old;
    void *copies[64];
    size_t n;
};
void exact_begin(struct exact_arrays *exact, struct sqz_layer *layer);
void exact_end(struct exact_arrays *exact);

/* Attention over a layer whose counts and contents are checked: budget, tokens, queries, rows of the user, threshold
 * and paging are chosen by the input. */
void fuzz_attend(const struct sqz_layer *layer, size_t n_context_tokens, struct choices *choices);

/* ---- System calls that fail ------------------------------------------------------------ */

/* Of the calls listed in faults.c, the n-th from now on fails (0: none), and with `from_then_on` all that follow;
 * `how` says with which error. The linker puts faults.c between the program and the C library. */
void faults_begin(uint32_t n, uint8_t how, bool from_then_on);
void faults_end(void);

/* Until faults_end(): what /proc/self/cgroup holds, up to a zero byte, and behind it what every limit of a group says.
 * The bytes stay the caller's. */
void faults_system_files(const uint8_t *bytes, size_t n);

#endif
