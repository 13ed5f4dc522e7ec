/*
 * Products of few tokens whose inputs are divided among the blocks of a cluster (projections_split.cu). Within
 * lib/cuda/.
 */
#ifndef SQZ_LIB_CUDA_PROJECTIONS_SPLIT_H
#define SQZ_LIB_CUDA_PROJECTIONS_SPLIT_H

#include "projections.cuh"

/* Groups of tokens that a kernel is compiled for: the least that holds so many tokens. */
static inline int sqz_few_groups(uint32_t n_tokens)
{
    int n = 1;
    while ((uint32_t)n * sqz_few::GROUP < n_tokens) n *= 2;
    return n;
}

/* a.tokens: made ready, for sqz_few_groups() groups. n_rounds is not looked at. */
template <class Type> enum sqz_status sqz_project_split(const sqz_few::project_args &a, bool after_ours, void *stream);

#endif
