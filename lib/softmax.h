/*
 * Running softmax over tiles of keys: for R query rows the unnormalised output,
 * the maximum and the sum of exponentials so far. An empty state has maximum
 * -INFINITY, sum 0 and output 0, and merges as nothing. The recurrence is the
 * online softmax of Milakov and Gimelshein (arXiv 1805.02867).
 */
#ifndef SQZ_LIB_SOFTMAX_H
#define SQZ_LIB_SOFTMAX_H

#include <stddef.h>
#include <stdint.h>

#include "rows.h"

enum { SQZ_TILE_ROWS = 128 }; /* keys a tile; K^T and V tiles of 64 dims stay in the second-level cache */

struct sqz_softmax {
    size_t n_rows, head_dim;
    float *out;     /* [n_rows][head_dim] */
    float *maximum; /* [n_rows] */
    float *sum;     /* [n_rows] */
};

void sqz_softmax_reset(struct sqz_softmax *state);

/* Raises the maximum of a row to at least `maximum`, rescaling what it holds. */
void sqz_softmax_raise(struct sqz_softmax *state, size_t row, float maximum);

/* Scratch of the tile functions for up to max_rows query rows. */
struct sqz_tile_scratch {
    float *logits; /* [max_rows][SQZ_TILE_ROWS] */
    float *keys;   /* [head_dim][SQZ_TILE_ROWS] */
    float *values; /* [SQZ_TILE_ROWS][head_dim] */
};

/* Adds a tile: rows [at, at + n) of a head, n up to SQZ_TILE_ROWS. Query row r sees columns [first[r], last[r]) of it;
 * NULL: all. */
void sqz_softmax_add_tile(struct sqz_softmax *state, const float *queries, float scale, const struct sqz_rows *keys,
                          const struct sqz_rows *values, size_t at, size_t n, const uint32_t *first,
                          const uint32_t *last, struct sqz_tile_scratch *scratch);

/* Merges `from` into `into` (same shapes). */
void sqz_softmax_merge(struct sqz_softmax *into, const struct sqz_softmax *from);

#endif
