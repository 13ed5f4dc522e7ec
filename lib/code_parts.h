/*
 * What a code is made of (codes.h), and how directions are shared out among its
 * parts: once, for C and CUDA C.
 */
#ifndef SQZ_LIB_CODE_PARTS_H
#define SQZ_LIB_CODE_PARTS_H

#include "method.h"

enum {
    SQZ_CODE_PARTS = 8,    /* of a word */
    SQZ_CODE_ENTRIES = 16, /* of a part */
    SQZ_CODE_MAX_WORDS = 4,
    SQZ_CODE_DIRECTIONS = 24, /* coded for each word; measured in docs/method.md */
};

/* Shares m directions out among n_parts parts: bits go to the direction whose remaining variance is largest, half a bit
 * at a time, each of which takes half of it (the rate of a Gaussian); then the part with the fewest bits takes the next
 * direction. Directions without bits come last and still help a little. values: variances [m], the largest first. left,
 * bits, part_of: scratch, [m]. Out: first [n_parts + 1] and chosen [m], the directions of each part one behind the
 * other. */
SQZ_FORMULA void sqz_share_directions(uint32_t m, uint32_t n_parts, const double *values, double *left, double *bits,
                                      uint32_t *part_of, uint32_t *chosen, uint32_t *first)
{
    double load[SQZ_CODE_PARTS * SQZ_CODE_MAX_WORDS];
    uint32_t at = 0;
    for (uint32_t i = 0; i < m; i++) {
        left[i] = values[i];
        bits[i] = 0;
    }
    for (uint32_t given = 0; given < 8 * n_parts; given++) { /* 4 bits a part */
        uint32_t best = 0;
        for (uint32_t i = 1; i < m; i++) best = left[i] > left[best] ? i : best;
        bits[best] += 0.5;
        left[best] *= 0.5;
    }
    for (uint32_t p = 0; p < n_parts; p++) load[p] = 0;
    for (uint32_t i = 0; i < m; i++) {
        uint32_t best = 0;
        for (uint32_t p = 1; p < n_parts; p++) best = load[p] < load[best] ? p : best;
        part_of[i] = best;
        load[best] += bits[i] + 0.01;
    }
    for (uint32_t p = 0; p < n_parts; p++) {
        first[p] = at;
        for (uint32_t i = 0; i < m; i++)
            if (part_of[i] == p) chosen[at++] = i;
    }
    first[n_parts] = at;
}

#endif
