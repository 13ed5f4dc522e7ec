/*
 * Tokens of sequences on several contexts in one launch: what the kernels of single
 * tokens are told of each context. Shapes, types and what the lookup does (levels,
 * words of codes) are the same for all; sequences lie context by context.
 */
#ifndef SQZ_LIB_CUDA_CONTEXTS_H
#define SQZ_LIB_CUDA_CONTEXTS_H

#include "ops.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { SQZ_MOST_CONTEXTS = 16, SQZ_MOST_CONTEXT_SEQUENCES = 64 };

/* As in struct sqz_cuda_choose_rows and struct sqz_cuda_attend_rows. */
struct sqz_cuda_context {
    struct sqz_cuda_level level;
    struct sqz_codes codes;
    const void *keys, *values;
    uint32_t n_rows, n_fixed;
    const float *variance_gain;
    float tail_skip;
    bool exact, group_max, tail, fixed_alone; /* tail: it has one, where there are gains */
};

struct sqz_cuda_contexts {
    uint32_t n;
    struct sqz_cuda_context context[SQZ_MOST_CONTEXTS];
    uint8_t of[SQZ_MOST_CONTEXT_SEQUENCES]; /* a sequence's */
};

/* The calls of ops.h for several contexts; args has the largest of each context's numbers. contexts: host, or NULL: args
 * has all of the only one. */
uint32_t sqz_cuda_choose_contexts_ranks(const struct sqz_cuda_choose_rows *args, const struct sqz_cuda_contexts *contexts);
enum sqz_status sqz_cuda_choose_contexts_launch(const struct sqz_cuda_choose_rows *args,
                                                const struct sqz_cuda_contexts *contexts, uint32_t ranks,
                                                bool after_ours, void *stream);
enum sqz_status sqz_cuda_attend_contexts_launch(const struct sqz_cuda_attend_rows *args,
                                                const struct sqz_cuda_contexts *contexts, bool after_ours,
                                                void *stream);

#ifdef __cplusplus
}
#endif

#endif
