/*
 * An input that is a context file with eight bytes behind it, which choose what
 * is done with the file. Its checksums, padding and size are made right before
 * it is opened: what a fuzzer changes would otherwise be refused at the first
 * checksum, and an attacker can compute checksums as well.
 */
#ifndef SQZ_FUZZ_CONTEXT_INPUT_H
#define SQZ_FUZZ_CONTEXT_INPUT_H

#include "fuzz.h"

enum { CONTEXT_CHOICES = 8 };

struct context_input {
    uint8_t *file; /* malloc'ed */
    size_t n;
    struct choices choices;
};

struct context_input context_input_of(const uint8_t *bytes, size_t n);

/* Changes single numbers of metadata and tensors to values at the edges, swaps, repeats, and at times leaves the bytes
 * to libFuzzer. */
size_t context_input_mutate(uint8_t *bytes, size_t n, size_t capacity, unsigned seed);

#endif
