/*
 * Attention on a graphics card: backend.h by the calls of libsqueeze_cuda, on
 * device memory. A context is uploaded when it is first asked about and shared by
 * all sequences; contexts stay until the memory is needed for others, the least
 * recently used leaves first. What has no kernel here, layers of a shape that is
 * not supported, is computed by the CPU's place, from copies.
 */
#ifndef SQZ_ENGINE_BACKEND_CUDA_H
#define SQZ_ENGINE_BACKEND_CUDA_H

#include "backend.h"
#include "cuda/calls.h"

/* `card`: of calls. memory_bytes: that contexts and rows may take; 0: what the card has free, less a reserve. layers:
 * of the model, those on this card are this place's; NULL: all are. n_threads: of what is computed on the CPU. Errors:
 * MEMORY, UNSUPPORTED. */
enum sqz_status sqz_backend_cuda_create(struct sqz_backend **out, const struct sqz_gpu_calls *calls, int card,
                                        size_t memory_bytes, enum sqz_together together,
                                        const struct sqz_model_layer *layers, int n_threads, struct sqz_error *error);
/* Contexts in shards have them on the first n_cards cards, this place's in front, which is card 0; each has so much memory
 * for them. Others lie here alone, as ever. n_cards: 2 and more, of which SQZ_CUDA_MOST_RANKS are used. Errors: MEMORY,
 * UNSUPPORTED. */
enum sqz_status sqz_backend_cuda_share(struct sqz_backend *backend, int n_cards, size_t memory_bytes,
                                       struct sqz_error *error);
void sqz_backend_cuda_free(struct sqz_backend *backend);

struct sqz_backend_cuda_use {
    size_t memory_bytes, limit_bytes;          /* taken; may be taken */
    size_t n_resident, n_uploads, n_evictions; /* contexts on the card; so far */
    size_t n_joined;                           /* calls that were launched for several contexts together */
    size_t n_cpu_layers;                       /* of all bound contexts: layers without a kernel */
};
struct sqz_backend_cuda_use sqz_backend_cuda_use(const struct sqz_backend *backend);

#endif
