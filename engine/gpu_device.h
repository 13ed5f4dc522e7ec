/*
 * A ggml device of our own for each card: it hands llama.cpp's graphs to ggml's
 * CUDA back end and runs ours where they have flash attention, or products of many
 * tokens with quantised weights, ordered by events, without the host waiting anywhere. A graph that comes again, one token of the
 * same sequences after another, is captured whole into one CUDA graph and
 * launched as such from then on.
 *
 * Everything of ggml that is not public is in gpu_device.c.
 */
#ifndef SQZ_ENGINE_GPU_DEVICE_H
#define SQZ_ENGINE_GPU_DEVICE_H

#include <stdbool.h>
#include <stdint.h>

#include "backend.h"
#include "bands.h"
#include "cuda/calls.h"
#include "ggml-backend.h"
#include "gpu.h"
#include "gpu_weights.h"

/* What the thread's runs do at attention nodes. */
struct sqz_gpu_handler {
    void *user_data;
    bool inspect; /* nodes are looked at from the host: the card is waited for before each */
    /* Before a graph with attention: what differs from the last time goes to the card by `stream`. The number says what
     * else the launches depend on: with the same one, what was captured is right; 0: nothing can be captured. *beside,
     * empty before: other cards' streams that the nodes launch on, too. False: stop. */
    bool (*begin)(void *user_data, int card, void *stream, uint64_t *key, struct sqz_gpu_beside *beside);
    /* Launches one node's attention on `stream` of that card. While `capturing` it may not wait. False: stop. */
    bool (*node)(void *user_data, struct ggml_tensor *node, int card, void *stream);
    /* [SQZ_MOST_CARDS] where 16-bit copies of weights are wanted, made when a graph comes; the caller frees them. */
    struct sqz_gpu_weights **weights;
    /* In place of all its n_nodes nodes, when what was captured is launched. */
    void (*replayed)(void *user_data, uint32_t n_nodes);
    /* NULL, or the layers that are wanted, and which layer the next node is of, where that does not follow. */
    struct sqz_bands *bands;
    void (*go_to)(void *user_data, uint32_t layer);
    /* A product was refused; the run ends. */
    void (*product_failed)(void *user_data);
};

/* Runs of this thread have this handler from now on; NULL: graphs go to ggml's back end as they are. */
void sqz_gpu_device_enter(const struct sqz_gpu_handler *handler);

/* Whether ggml's back end is one that this file was compiled for. */
bool sqz_gpu_device_fits(ggml_backend_reg_t registry);

/* Makes one for the next card, over ggml's: at most SQZ_MOST_CARDS. */
ggml_backend_dev_t sqz_gpu_device_add(ggml_backend_dev_t inner, const struct sqz_gpu_calls *calls);

/* The same card once more, number 0 to SQZ_MOST_BANDS - 1: llama.cpp gives each device of its list layers that follow one
 * another, and so a card gets several such groups. */
ggml_backend_dev_t sqz_gpu_device_again(int card, uint32_t number);

/* Graphs captured and launched again since the program began, and products that were ours, of many tokens and groups of
 * few, for tests and for the curious. */
struct sqz_gpu_device_counts {
    uint64_t captured, replayed, eager, products, groups;
};
struct sqz_gpu_device_counts sqz_gpu_device_count(void);

#endif
