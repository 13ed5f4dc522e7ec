/*
 * 16-bit copies of a model's quantised matrices on a card. ggml's kernels for quantised weights take one token as fast
 * as memory gives them; for dozens at once they are slower than cuBLAS, by which ggml multiplies 16-bit matrices (and for
 * hundreds than lib/cuda/products.cu, which needs no copies that stay). Copies are BF16, products with them are summed in
 * F32: what weights and activations lose by it is less than the 8 bits to which activations are rounded for quantised
 * weights. From how many tokens on copies are faster is measured on the card when they are made.
 */
#ifndef SQZ_ENGINE_GPU_WEIGHTS_H
#define SQZ_ENGINE_GPU_WEIGHTS_H

#include <stdbool.h>
#include <stddef.h>

#include "cuda/calls.h"
#include "ggml-backend.h"

struct sqz_gpu_weights; /* of one model on one card */

/* NULL: no memory. */
struct sqz_gpu_weights *sqz_gpu_weights_create(void);
void sqz_gpu_weights_free(struct sqz_gpu_weights *w); /* NULL: nothing */

/* Copies every quantised matrix that the graph multiplies by and that has none yet, on `stream` of the card's calls;
 * `backend` is ggml's on the card. Where they would take more than half of the card's free memory there are none, from
 * then on. True: there are new ones. */
bool sqz_gpu_weights_make(struct sqz_gpu_weights *w, ggml_backend_t backend, struct ggml_cgraph *graph,
                          const struct sqz_gpu_calls *calls, void *stream);

/* What a node of a graph is to be multiplied by in place of its first source; NULL: by that. */
struct ggml_tensor *sqz_gpu_weights_for(const struct sqz_gpu_weights *w, const struct ggml_tensor *node);

/* Of the card's memory, all copies. */
size_t sqz_gpu_weights_bytes(const struct sqz_gpu_weights *w);

#endif
