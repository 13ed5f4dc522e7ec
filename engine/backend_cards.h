/*
 * All cards that a model's layers lie on, as one place of attention: each card is
 * a place of backend_cuda.h with the layers that llama.cpp put there. Layers that
 * stayed on the host belong to the first. Or the first has all layers, and shares the
 * rows of contexts in shards with the others.
 */
#ifndef SQZ_ENGINE_BACKEND_CARDS_H
#define SQZ_ENGINE_BACKEND_CARDS_H

#include "backend.h"
#include "backend_cuda.h"

/* split: ROWS: llama.cpp put all layers on the first card, and contexts in shards have the rows on all. layers: the model's, whose `card` is looked at when a context is bound and later; they outlive the place. memory_bytes:
 * on each card, as sqz_backend_cuda_create() has it. Errors: MEMORY, UNSUPPORTED. */
enum sqz_status sqz_backend_cards_create(struct sqz_backend **out, const struct sqz_gpu_calls *calls, int n_cards,
                                         enum sqz_split split, size_t memory_bytes, enum sqz_together together,
                                         const struct sqz_model_layer *layers, int n_threads, struct sqz_error *error);
void sqz_backend_cards_free(struct sqz_backend *backend);

/* Of all cards together; contexts that are on several count on each. */
struct sqz_backend_cuda_use sqz_backend_cards_use(const struct sqz_backend *backend);

#endif
