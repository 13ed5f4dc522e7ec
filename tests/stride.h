/*
 * SQUEEZE_TEST_STRIDE=n, for where all takes tens of times as long, in an emulator or with sanitizers: of many cases that a
 * test goes through, about one in n. tests/CMakeLists.txt says where. Without it, all.
 */
#ifndef TESTS_STRIDE_H
#define TESTS_STRIDE_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

static inline size_t stride(void)
{
    const char *text = getenv("SQUEEZE_TEST_STRIDE");
    return text && atoi(text) > 0 ? (size_t)atoi(text) : 1;
}

/* Whether a case is left out: scattered, lest it keep step with one of the lists that the cases are made of. */
static inline bool passed_over(uint64_t number)
{
    return (number * 2654435761u >> 16) % stride() != 0;
}

#endif
