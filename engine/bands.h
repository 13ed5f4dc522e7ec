/*
 * A text that is read on cards by bands of layers: all of its batches go through
 * the first layers, then all through the next ones. Rows of a band are complete, and
 * on their way to the file, while the bands behind it are read. What goes from one
 * band to the next stays on the card that goes on with it, of all tokens. Every number
 * is as when all layers are read at once.
 *
 * Of several cards each has a part of every band (SQZ_SPLIT_TURNS), so that all of them
 * work on every band.
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
    size_t n_tokens;              /* of the text */
    size_t rows_bytes;            /* that the text's keys and values will take on a card */

    bool whole; /* the run is of all layers; it finds out whether they can be read by bands: otherwise n becomes 1 */
    size_t first_token; /* of the run's batch; while it runs, of the batch in work */
    size_t
        n_batches; /* the run is of so many batches, one behind the other, all of its batch's size; 1, unless `repeats` */
    bool repeats;                                       /* set by the whole run: all but the first band may be run so */
    bool (*batch)(void *user_data, size_t first_token); /* before a part of a batch is launched; false: stop */
    void *user_data;

    uint32_t n_seen;           /* layers that llama.cpp has come to in this run */
    struct sqz_gpu_bands *gpu; /* what it takes on the cards, gpu_bands.h; begins as NULL */
};

static inline uint32_t sqz_band_begin(const struct sqz_bands *b)
{
    return b->now ? b->end[b->now - 1] : 0;
}

/* Divides layers into bands of which every one has as many on each of n_cards, as far as they go round: at most `most`, 1
 * where there are too few layers. Returns how many. The first is the largest, since llama.cpp is asked for each of its
 * batches, and its rows have the longest time to be written in; the last the smallest: it is waited for.
 * SQUEEZE_GPU_BANDS=N asks for another number. */
uint32_t sqz_bands_plan(uint32_t end[SQZ_MOST_BANDS], uint32_t n_layer, uint32_t n_cards, uint32_t most);

#endif
