/*
 * A context in shards: its tokens in blocks, dealt out in turns, so that each
 * place has as much of the causal work as the next one. Every shard is clustered
 * by itself; what is read of all of them is chosen by the same thresholds and the
 * denominators of the whole, so calibration sums over them.
 */
#ifndef SQZ_LIB_SHARDS_H
#define SQZ_LIB_SHARDS_H

#include "build.h"

enum { SQZ_SHARD_BLOCK_TOKENS = 512, SQZ_MOST_SHARDS = 1024 };

/* How n_tokens are dealt out to `count` shards in blocks of block_tokens. */
struct sqz_deal {
    size_t n_tokens, block_tokens;
    uint32_t count;
};

/* How many of the first n tokens of the context the shard has, all of which are its first ones. */
size_t sqz_deal_tokens(const struct sqz_deal *deal, uint32_t shard, size_t n);
/* Where token number i of the shard stands in the context. */
size_t sqz_deal_position(const struct sqz_deal *deal, uint32_t shard, size_t i);

/* What processes that hold some of the shards each tell each other. of_shard [deal->count][n]: what the shards here have
 * goes to the others, what theirs have is filled in. */
struct sqz_shards_spread {
    enum sqz_status (*spread)(void *user_data, float *const *of_shard, size_t n, struct sqz_error *error);
    void *user_data;
};

/* Calibrates clustered shards, layer l of shard s at layers[s * n_layers + l], each of which kept the same last queries of
 * the context: thresholds, shares and lost mass are those of the whole context afterwards, the same in every shard; gains
 * are each shard's own. inputs, likewise, and spread: which shards are elsewhere, planned here but not clustered, of
 * which only curves are then known; NULL: none. Errors: MEMORY, CANCELLED, those of spread. */
enum sqz_status sqz_shards_calibrate(struct sqz_layer *layers, const struct sqz_layer_input *inputs, size_t n_layers,
                                     const struct sqz_deal *deal, const struct sqz_shards_spread *spread,
                                     const struct sqz_squeeze_options *options, int n_threads,
                                     sqz_build_progress progress, void *user_data, struct sqz_error *error);

#endif
