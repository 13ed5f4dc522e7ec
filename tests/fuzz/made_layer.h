/*
 * Squeezed layers made of numbers that an input chooses: every count, optional
 * array and format that the checks allow, with allowed but strange numbers in
 * them, and now and then one that they do not allow.
 */
#ifndef SQZ_FUZZ_MADE_LAYER_H
#define SQZ_FUZZ_MADE_LAYER_H

#include "fuzz.h"

/* What the layers of one context share. */
struct made_form {
    uint32_t n_tokens;
    enum sqz_rule rule;
    enum sqz_index index, key_format;
    bool keys_alone;          /* INT8 keys without F16 ones */
    enum sqz_row_format rows; /* in planes: key_format is F16 */
};

struct made_layer {
    struct sqz_layer layer;
    void *blocks[120];
    size_t n_blocks;
};

struct made_form choose_form(struct choices *choices, uint32_t most_tokens);
void make_layer(struct made_layer *made, const struct made_form *form, struct choices *choices);
void free_made_layer(struct made_layer *made);

#endif
