/*
 * A text that is read on a card by bands of layers: all of its batches go through
 * the first layers, then all through the next ones. Rows of a band are complete, and
 * on their way to the file, while the bands behind it are read. What goes from one
 * band to the next stays on the card, of all tokens. Every number is as when all
 * layers are read at once.
 */
#ifndef SQZ_ENGINE_BANDS_H
#define SQZ_ENGINE_BANDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SQZ_MOST_BANDS = 16 };

struct sqz_bands {
    uint32_t n, now;              /* how many there are, and which one a run is of */
    uint32_t end[SQZ_MOST_BANDS]; /* the layer behind each */
    size_t n_tokens, first_token; /* of the text; of a run's batch */
    size_t rows_bytes;            /* that the text's keys and values will take on the card */

    /* Set by the first run. n becomes 1 when the model's graph cannot be cut so, or the card has no room: all layers
     * ran. */
    int card;
    void *between; /* on it, F32 [n_tokens][row_bytes] */
    size_t row_bytes;
};

static inline uint32_t sqz_band_begin(const struct sqz_bands *b)
{
    return b->now ? b->end[b->now - 1] : 0;
}

#endif
