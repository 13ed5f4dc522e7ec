/*
 * What the ways take in which tokens of one batch go through a context on a card
 * (enum sqz_together): arithmetic alone, in microseconds a layer, from constants
 * fitted to an H200. Only how ways compare matters, so other cards need no numbers
 * of their own.
 */
#ifndef SQZ_ENGINE_CARD_COST_H
#define SQZ_ENGINE_CARD_COST_H

#include <stdbool.h>

struct sqz_card_task {
    double tokens, heads, heads_kv, dim, rows, clusters;
    bool coded, tail, several_levels; /* codes of single keys; where there are those or several levels, what any token
                                         selects is found by a selection of each */
    double number_bytes;              /* of a key's or value's number in planes; 0: they are F16 */
};

/* share: of the rows, that a token selects; united: that all of them select together. */
double sqz_card_each_us(const struct sqz_card_task *task, double share);
double sqz_card_one_us(const struct sqz_card_task *task, double share, double united);
double sqz_card_all_us(const struct sqz_card_task *task);
/* A long question, whose tokens share a selection of this share, with a tail. */
double sqz_card_shared_us(const struct sqz_card_task *task, double share);
/* The same question where everything is read: its tokens have their own rows in common. */
double sqz_card_long_all_us(const struct sqz_card_task *task);

#endif
