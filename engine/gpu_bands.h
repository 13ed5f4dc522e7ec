/*
 * Bands of layers on cards: which nodes of what llama.cpp gives a card are of the band, what goes from one part to the
 * next, and batches that go through a band without llama.cpp. Between two parts lie the sums of all tokens, on the card
 * that goes on with them; a part reads its batch's there, and the next one's are written from where they were made. On
 * ggml's public interface.
 */
#ifndef SQZ_ENGINE_GPU_BANDS_H
#define SQZ_ENGINE_GPU_BANDS_H

#include "bands.h"
#include "gpu_products.h"

/* What llama.cpp gives a card in one go: layers that follow one another. */
struct sqz_gpu_segment {
    struct sqz_gpu_graph known;
    int card;
    void *engine;
    void *stream, *event;        /* of ours; an event of that card */
    bool (*enter)(void *engine); /* what is launched on our stream from now on follows all that was launched before */
    bool (*run)(void *engine, struct ggml_cgraph *graph, int from, int to); /* nodes [from, to) */
    bool (*leave)(void *engine);                                            /* ggml's stream goes on behind ours */
};

/* A segment of n_layers layers, of a run by bands, or of the whole one that comes first, behind which nothing is held back.
 * go_to tells the handler which layer its next node is of. False: stop. */
bool sqz_gpu_bands_run(struct sqz_bands *bands, const struct sqz_gpu_segment *segment, uint32_t n_layers,
                       void (*go_to)(void *user_data, uint32_t layer), void *user_data);

/* When nothing runs any more. NULL is fine. */
void sqz_gpu_bands_free(struct sqz_bands *bands);

#endif
