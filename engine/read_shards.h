/*
 * Reading a text whose rows lie in shards, in one process or several: each process
 * computes its blocks of the text, whose keys and values stay where they are
 * computed. At a node the queries of all blocks in work go to everybody, each
 * attends by its shards' rows, and partial outputs merge by their LSE.
 *
 * They merge in an order that does not depend on how many processes there are, where
 * those are a power of two or as many as shards: shards whose numbers are equal modulo
 * 2 m first, then those that are so modulo m. So what is read is the same to the bit.
 */
#ifndef SQZ_ENGINE_READ_SHARDS_H
#define SQZ_ENGINE_READ_SHARDS_H

#include "backend.h"
#include "exchange.h"
#include "shards.h"

/* Of the shards of a deal process `first` of `step` holds those of number first, first + step, ... */
struct sqz_held_shards {
    struct sqz_deal deal;
    uint32_t first, step;
};
static inline bool sqz_shard_is_held(const struct sqz_held_shards *held, uint32_t shard)
{
    return shard % held->step == held->first;
}
/* Tokens of the shards held here whose numbers are below `shard`; rows are one after another in that order. */
size_t sqz_held_tokens(const struct sqz_held_shards *held, uint32_t shard);

struct sqz_reading_shards;

/* For layers `inputs` [n_layer], whose keys and values come to lie shard by shard of those held here, each [K][n][D], and
 * whose queries, those of the last n_queries tokens, are kept here. The place outlives it, and was told of the shapes
 * (plan_reading()). exchange NULL: held is everything. Errors: MEMORY. */
enum sqz_status sqz_reading_shards_begin(struct sqz_reading_shards **out, const struct sqz_held_shards *held,
                                         const struct sqz_exchange *exchange, struct sqz_backend *place,
                                         struct sqz_layer_input *inputs, uint32_t n_layer, struct sqz_error *error);

/* The text's tokens [at, at + n) are in work here, all of one block: 0 tokens where the text has no more for this process.
 * Others have the whole blocks of the same turn, before and behind it. */
void sqz_reading_shards_turn(struct sqz_reading_shards *r, size_t at, size_t n);

/* A node of these tokens: takes their rows, keeps queries, attends, also for the others. node NULL: there are no tokens
 * here, only the others' of this layer. Errors: those of the exchange. */
enum sqz_status sqz_reading_shards_node(struct sqz_reading_shards *r, uint32_t layer,
                                        const struct sqz_attention_node *node, int n_threads, struct sqz_error *error);

/* Behind an error of the exchange memory that messages may still come to stays. */
void sqz_reading_shards_free(struct sqz_reading_shards *r);

#endif
