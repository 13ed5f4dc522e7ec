/*
 * Reading a text whose rows lie in shards, in one process or several: each process
 * computes its blocks of the text, whose keys and values stay where they are
 * computed. At a node the queries of all blocks in work go to everybody, each
 * attends by its shards' rows, and partial outputs merge by their LSE.
 *
 * Of a layer with a window rows move in place of queries: a block sees those of few
 * blocks before it alone, and keys and values of K heads, F16, are half as many bytes as
 * queries and outputs at most, an eighth where four query heads share them. Each process
 * keeps the last rows of the text so far, of every block that its own ones see, and
 * attends as one process does: the same to the bit, whoever reads. The first one ends
 * with the window that is written.
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

/* Rows a head that a layer needs room for here while it is read. */
size_t sqz_held_room(const struct sqz_held_shards *held, size_t window_tokens);

/* Keys and values [from, from + n) of every head, [K][capacity][D], become rows [0, n), [K][to_capacity][D]; to_capacity: at
 * most capacity. */
void sqz_rows_to_front(const struct sqz_layer_input *in, size_t capacity, size_t from, size_t n, size_t to_capacity);

struct sqz_reading_shards;

/* For layers `inputs` [n_layer] with sqz_held_room() rows of room, whose keys and values come to lie shard by shard of those
 * held here, each [K][n][D], and whose queries, those of the last n_queries tokens, are kept here. The place outlives it, and was told of the shapes
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

/* Behind the last token: rows of layers with a window lie as inputs say, [K][n_rows][D], at the process that holds the
 * first shard. */
void sqz_reading_shards_end(struct sqz_reading_shards *r);

/* Behind an error of the exchange memory that messages may still come to stays. */
void sqz_reading_shards_free(struct sqz_reading_shards *r);

#endif
