/*
 * Attention: dense causal attention for reading a context, and attention over
 * one squeezed layer plus the user's own rows for answering. Partial results
 * carry their running maximum and sum, and merge exactly (log-sum-exp, LSE).
 */
#ifndef SQZ_LIB_ATTENTION_H
#define SQZ_LIB_ATTENTION_H

#include "layer.h"

/* Dense causal attention of a chunk of T queries at positions [first_position, first_position + T) over keys and
 * values F16 [K][capacity_rows][D] whose row is their position; rows up to each query's own position are read.
 * window_tokens: 0, or a query at p sees positions > p - window_tokens. Queries and out: F32, element (t, h, i) at
 * t * token_stride + h * head_stride + i. */
struct sqz_causal_call {
    struct sqz_layer_shape shape;
    const float *queries;
    float *out;
    size_t query_token_stride, query_head_stride, out_token_stride, out_head_stride; /* in floats */
    size_t n_tokens, first_position, window_tokens;
    const uint16_t *keys, *values;
    size_t capacity_rows;
    int n_threads;
    void *workspace;
};
size_t sqz_causal_workspace_bytes(const struct sqz_layer_shape *shape, int n_threads);
void sqz_attention_causal(const struct sqz_causal_call *call);

enum { SQZ_MAX_BLOCK_TOKENS = 192 };

/* Attention of T tokens that follow the context. */
struct sqz_attend_call {
    const struct sqz_layer *layer;
    const float *queries;
    float *out;
    float *lse; /* [T][H]; may be NULL */
    size_t query_token_stride, query_head_stride, out_token_stride, out_head_stride; /* in floats */
    size_t n_tokens;

    /* The user's rows after the context, F16 [K][user_capacity_rows][D]. Token t sees the first n_user - T + t + 1 of
     * them when they include the tokens themselves (causal); n_user 0: none. */
    const uint16_t *user_keys, *user_values;
    size_t user_capacity_rows, n_user;
    size_t n_context_tokens; /* position of user row 0; used by sliding-window layers */

    float budget;         /* (0, 1] */
    float log_offset;     /* added to the log threshold: the session's correction towards the budget asked */
    size_t block_tokens;  /* tokens that share one selection, 1 to SQZ_MAX_BLOCK_TOKENS; at a budget of 1 no matter */
    int n_threads;
    struct sqz_attention_stats *stats; /* added to; may be NULL */
    void *workspace;
};

/* Bytes for any call on `layer` with n_user up to max_user_rows and block_tokens up to max_block_tokens. */
size_t sqz_attend_workspace_bytes(const struct sqz_layer *layer, size_t max_user_rows, size_t max_block_tokens,
                                  int n_threads);
void sqz_attend(const struct sqz_attend_call *call);

/* Calls of several sequences, each as sqz_attend() would run it alone, to the bit. The layers have the same numbers of
 * heads and the same head dimension; they may be of different contexts. n_threads and workspace of the calls are not
 * looked at. */
struct sqz_attend_batch {
    const struct sqz_attend_call *calls;
    size_t n_calls; /* at least 1 */
    int n_threads;
    void *workspace;
};
/* Bytes that a thread needs for such calls on `layer`, of all layers the most; bytes for a batch of up to max_calls. */
size_t sqz_attend_thread_bytes(const struct sqz_layer *layer, size_t max_user_rows, size_t max_block_tokens);
size_t sqz_attend_batch_workspace_bytes(size_t thread_bytes, size_t max_calls, int n_threads);
void sqz_attend_batch(const struct sqz_attend_batch *batch);

#endif
