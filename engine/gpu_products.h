/*
 * Which nodes of llama.cpp's graph go as products of ours with few tokens: matrices that share an input in one
 * call, with the norm in front of them, a gated layer's halves with the gate, what is added behind a product with
 * it. On ggml's public interface.
 */
#ifndef SQZ_ENGINE_GPU_PRODUCTS_H
#define SQZ_ENGINE_GPU_PRODUCTS_H

#include <stdbool.h>

#include "cuda/calls.h"
#include "ggml.h"

/* Whether a node is a view or a leaf. */
bool sqz_gpu_computes_nothing(const struct ggml_tensor *node);

/* Whether a node is a product of F32 tokens with one matrix. */
bool sqz_gpu_multiplies(const struct ggml_tensor *node);

/* What a caller knows of the graph beyond the public interface. */
struct sqz_gpu_graph {
    struct ggml_cgraph *graph;
    const struct sqz_gpu_calls *calls;
    /* A tensor of contiguous rows in the card's memory. */
    bool (*is_plain)(const struct ggml_tensor *t, const void *user_data);
    /* How many nodes need node i's result; INT_MAX: somebody else may as well. */
    int (*uses)(struct ggml_cgraph *graph, int i);
    int (*view_uses)(struct ggml_cgraph *graph, int i); /* the same of a view */
    const void *user_data;
};

/* The same of tensors that are all plain, of sizes that calls of ours take. */
bool sqz_gpu_multiplies_plainly(const struct sqz_gpu_graph *g, const struct ggml_tensor *node);

/* At most a product and what is added to it, for each matrix, and the two of a norm. */
enum { SQZ_MOST_GROUPED = 2 * SQZ_MOST_PROJECTIONS + 2 };

struct sqz_gpu_group {
    struct sqz_gpu_projections call;      /* all but its workspace */
    int n_nodes, nodes[SQZ_MOST_GROUPED]; /* that it stands for */
    struct ggml_tensor
        *moved[SQZ_MOST_PROJECTIONS]; /* results whose place is still in use: the caller gives them another
                                                        until the graph has run; NULL: in its place */
};

/* The group that begins with node i, which is run there; done[j]: node j has been run. False: there is none. */
bool sqz_gpu_find_group(const struct sqz_gpu_graph *g, int i, const bool *done, struct sqz_gpu_group *group);

#endif
