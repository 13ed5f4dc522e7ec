/*
 * A place for contexts in shards: a place on the CPU for each shard that is held
 * here, and whoever holds the others. For each node every shard looks up, the
 * denominators are summed, each attends to what it chose by the sum, and outputs
 * merge by their LSE. A sequence's own rows are behind the first shard, which has
 * all rows of layers with a window: at these nobody else is asked.
 */
#ifndef SQZ_ENGINE_BACKEND_SHARDS_H
#define SQZ_ENGINE_BACKEND_SHARDS_H

#include "backend.h"

/* A part of a call as those who hold other shards get it. Its tokens come behind those of the parts before. */
struct sqz_elsewhere_part {
    uint32_t context, n_tokens, block_tokens, upper;
    uint32_t all; /* every row is read, by the parts together: denominators are not asked for */
    float budget, log_offset;
};

/* A node on its way through all shards of one context. All arrays are of the n_tokens of all parts together. */
struct sqz_elsewhere_node {
    uint32_t layer, n_head, head_dim;
    size_t n_parts, n_tokens;
    const struct sqz_elsewhere_part *parts;
    const struct sqz_attention_node *node;    /* whose queries are sent: part i has tokens from first_token[i] on */
    const size_t *first_token;                /* [n_parts] */
    struct sqz_attention_stats *const *stats; /* [n_parts], added to */
};

/* Processes that hold the other shards. One call at a time. An error is final: later calls fail with it, too. */
struct sqz_elsewhere {
    void *user_data;
    /* Everybody opens the context's index and what they hold; *id names it from then on. Errors: IO, FORMAT and others, with
     * who it is that has it. */
    enum sqz_status (*open)(void *user_data, const struct sqz_context *context, uint32_t *id, struct sqz_error *error);
    void (*close)(void *user_data, uint32_t id);
    /* Sends queries; the others begin to look up. Errors: IO. */
    enum sqz_status (*begin)(void *user_data, const struct sqz_elsewhere_node *node, struct sqz_error *error);
    /* log_total [T][H] is what the shards here have; it becomes what all have, and the others begin to attend. */
    enum sqz_status (*sum)(void *user_data, const struct sqz_elsewhere_node *node, float *log_total,
                           struct sqz_error *error);
    /* out [T][H][D] and lse [T][H] become those of all. Adds to the parts' stats. */
    enum sqz_status (*merge)(void *user_data, const struct sqz_elsewhere_node *node, float *out, float *lse,
                             struct sqz_error *error);
};
/* Of all sessions that begin from now on; NULL (at first): a context must have all its shards here. */
void sqz_shards_elsewhere(const struct sqz_elsewhere *elsewhere);

/* The model's place for contexts in shards, made when the first comes. All sessions on such contexts are in it, so that those
 * on one context are one node. Errors: UNSUPPORTED (a model on a card), MEMORY. */
enum sqz_status sqz_backend_shards_of(struct sqz_backend **out, struct sqz_model *model, struct sqz_error *error);
void sqz_backend_shards_free(struct sqz_backend *backend);

/* The same for a process that holds shards for others and has no model: over `place`, which is on the CPU. */
enum sqz_status sqz_backend_shards_over(struct sqz_backend **out, struct sqz_backend *place, uint32_t n_head_most,
                                        uint32_t head_dim_most, bool own_elsewhere, struct sqz_error *error);

/* Shards and ranks are added up in pairs, pairs of pairs and so on, so that the sum is the same to the bit whether one process
 * holds a pair or two do: n of them are the first sqz_shards_half(n) and the rest. n: above 1. */
static inline size_t sqz_shards_half(size_t n)
{
    size_t half = 1;
    while (2 * half < n) half *= 2;
    return half;
}
/* The log of the sum of n numbers, `stride` apart, of which these are the logs. */
float sqz_shards_log_sum(const float *first, size_t stride, size_t n);

/* The two steps by themselves, for whoever answers such a process. n_tokens of all parts together, packed. */
struct sqz_shards_step {
    const struct sqz_backend_call *call;
    size_t n_tokens;
    uint32_t n_head, head_dim;
};
/* total [T][H]: what the shards here have. */
void sqz_shards_total(struct sqz_backend *backend, const struct sqz_shards_step *step, float *total);
/* whole [T][H]: what all shards have; NULL: every row is read. out [T][H][D] and lse [T][H] of those here. Behind sqz_shards_total(), where there
 * is a whole. */
void sqz_shards_attend(struct sqz_backend *backend, const struct sqz_shards_step *step, const float *whole, float *out,
                       float *lse);

#endif
