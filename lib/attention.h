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
 * t * token_stride + h * head_stride + i.
 * Of a text whose rows lie in several places, of which keys and values are one, rows are those of the place, first_position
 * is how many of them stand before the chunk, and lse [T][H] receives that of the output, which is this place's part
 * (0 and -INFINITY where it has no rows). Where the chunk's own rows lie in another place (`not_own`), each query sees the
 * first first_position rows. */
struct sqz_causal_call {
    struct sqz_layer_shape shape;
    const float *queries;
    float *out;
    size_t query_token_stride, query_head_stride, out_token_stride, out_head_stride; /* in floats */
    size_t n_tokens, first_position, window_tokens;
    const uint16_t *keys, *values;
    size_t capacity_rows;
    float *lse;   /* NULL: the text's rows lie in one place */
    bool not_own; /* no window then */
    int n_threads;
    void *workspace;
};
size_t sqz_causal_workspace_bytes(const struct sqz_layer_shape *shape, int n_threads);
void sqz_attention_causal(const struct sqz_causal_call *call);

struct sqz_attention_map; /* attention_map.h */
struct sqz_user_rows;     /* user_rows.h */

enum { SQZ_MAX_BLOCK_TOKENS = 192 };

/* A token of several sequences that go through all rows of a context together. */
struct sqz_joint_token {
    size_t at;                     /* its number in the call's queries, out and lse */
    const uint16_t *keys, *values; /* of its own sequence, F16 [K][capacity_rows][D]; it sees the first n_rows */
    size_t capacity_rows, n_rows;
    struct sqz_attention_stats *stats; /* added to: everything is read; may be NULL */
    const struct sqz_user_rows *user;  /* in the place of keys and values; NULL: those */
};

/* Attention of T tokens that follow the context. */
struct sqz_attend_call {
    const struct sqz_layer *layer;
    const float *queries;
    float *out;
    float *lse;                                                                      /* [T][H]; may be NULL */
    size_t query_token_stride, query_head_stride, out_token_stride, out_head_stride; /* in floats */
    size_t n_tokens;

    /* The user's rows after the context, F16 [K][user_capacity_rows][D]. Token t sees the first n_user - T + t + 1 of
     * them when they include the tokens themselves (causal); n_user 0: none. */
    const uint16_t *user_keys, *user_values;
    const struct sqz_user_rows *user; /* in the place of these and their capacity; NULL: those */
    size_t user_capacity_rows, n_user;
    size_t n_context_tokens; /* position of user row 0; used by sliding-window layers */

    /* Of a context whose rows lie in several places, of which this layer is one: the log of the sum of exponentials of
     * what lies in the others, [T][H]; NULL: nothing does. Keys are chosen by their share of the whole (a block of many
     * tokens reads its budget of this place); out and lse are of this place alone, for sqz_merge_partial(). */
    const float *elsewhere;

    float budget;     /* (0, 1] */
    bool upper;       /* rows of 4 + 4 bits are read by their upper plane alone, half the bytes; others as they are */
    float log_offset; /* added to the log threshold: the session's correction towards the budget asked */
    size_t block_tokens; /* tokens that share one selection, 1 to SQZ_MAX_BLOCK_TOKENS; at a budget of 1 no matter */
    int n_threads;
    /* [T], or NULL. Not NULL: a budget of 1, a layer without a window, neither user_keys nor user, n_user the most n_rows of
     * any, no stats and no map of the call itself. */
    const struct sqz_joint_token *joint;
    struct sqz_attention_stats *stats; /* added to; may be NULL */
    struct sqz_attention_map *map;     /* added to by calls of one token; may be NULL */
    size_t map_turn;                   /* KV head h is looked at where (map_turn + h) % SQZ_MAP_TURNS is 0 */
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
    size_t thread_bytes; /* that the workspace was planned with: as much as any of the calls needs */
    void *workspace;
};
/* Bytes that a thread needs for such calls on `layer`, of all layers the most; bytes for a batch of up to max_calls. */
size_t sqz_attend_thread_bytes(const struct sqz_layer *layer, size_t max_user_rows, size_t max_block_tokens);
size_t sqz_attend_batch_workspace_bytes(size_t thread_bytes, size_t max_calls, int n_threads);
void sqz_attend_batch(const struct sqz_attend_batch *batch);

/* Joint tokens of a call that go through the rows in one job: so many at most, of n_tokens. */
size_t sqz_attend_joint_block(const struct sqz_layer_shape *shape, size_t n_tokens);

/* What this layer's rows and the user's have in the denominator, for other places to choose by: log_total[i], [T][H] of
 * call i, becomes the log of the sum of their exponentials as the lookup estimates it, exact where everything is read.
 * The calls' elsewhere, out, lse and stats are not looked at. */
void sqz_attend_totals(const struct sqz_attend_batch *batch, float *const *log_total);

/* Attention over two sets of rows from that over each: out F32 [n_rows][D] and lse [n_rows] become those of both. An lse
 * of -INFINITY stands for no rows. Exact: softmax over a union is the average weighted by the sums of exponentials. */
void sqz_merge_partial(float *out, float *lse, const float *other_out, const float *other_lse, size_t n_rows,
                       size_t head_dim);

#endif
