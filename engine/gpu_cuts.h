/*
 * Where llama.cpp's graph can be cut between layers: behind a sum that is all that what follows needs of what came
 * before. On ggml's public interface.
 */
#ifndef SQZ_ENGINE_GPU_CUTS_H
#define SQZ_ENGINE_GPU_CUTS_H

#include "gpu_products.h"

/* The number of the node behind the first such sum that follows the graph's first n_layers layers; `last`: behind the last
 * one, and these are all layers of the graph, which is one card's part of a larger one. 0: there is none. */
int sqz_gpu_find_cut(const struct sqz_gpu_graph *g, uint32_t n_layers, bool last);

/* Whether a layer looks at the keys of another one, which must be those of its own batch. */
bool sqz_gpu_shares_keys(const struct sqz_gpu_graph *g);

#endif
