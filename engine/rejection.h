/*
 * Speculative sampling (arXiv 2211.17192): one step of it, over two distributions
 * of n words each, F32 [n], not negative, sum about 1. What it chooses is distributed
 * as `odds`, whatever the draft was drawn from.
 */
#ifndef SQZ_ENGINE_REJECTION_H
#define SQZ_ENGINE_REJECTION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The word at which the sum of the odds passes u of their whole, u in [0, 1). */
int32_t sqz_draw(const float *odds, size_t n, double u);

/* The next word, of which `draft` was drawn from draft_odds; NULL: it was no draw, all of the odds are the draft's. It is
 * kept with probability min(1, odds / draft_odds), where `keep`, in [0, 1), is below that; else a word is drawn by u from
 * what the odds have more than draft_odds. The two numbers are independent of each other and of the draft's. */
int32_t sqz_reject(const float *odds, const float *draft_odds, size_t n, int32_t draft, double keep, double u);

/* A number in [0, 1) of its own for each seed, place in an answer and use of it: what is drawn at a place does not depend
 * on how often was drawn before. */
enum sqz_draw_use { SQZ_DRAW_DRAFT, SQZ_DRAW_KEEP, SQZ_DRAW_WORD };
double sqz_draw_number(uint32_t seed, size_t place, enum sqz_draw_use use);

#endif
