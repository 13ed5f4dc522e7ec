/*
 * Where llama.cpp's graph can be cut between layers: behind a sum that is all that what follows needs of what came
 * before. On ggml's public interface.
 */
#ifndef SQZ_ENGINE_GPU_CUTS_H
#define SQZ_ENGINE_GPU_CUTS_H

#include "bands.h"
#include "gpu_products.h"

/* cut[b]: the node behind band b, whose result is the one before it; of the last one the number of nodes. False: there
 * is no such node for some band, or layers share keys. */
bool sqz_gpu_find_cuts(const struct sqz_gpu_graph *g, const struct sqz_bands *bands, int cut[SQZ_MOST_BANDS]);

#endif
