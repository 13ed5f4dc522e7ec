/*
 * Drafts from the text itself: answers quote. What followed the last three
 * tokens, or the last two, where they stood before: in the answer and the
 * question, else in the context, there last. A table of hashed places, which
 * later places overwrite.
 */
#ifndef SQZ_ENGINE_DRAFT_NGRAM_H
#define SQZ_ENGINE_DRAFT_NGRAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct sqz_ngram_table {
    uint32_t *place[2]; /* [size] one past the last token of a pair, of three; 0: none */
    size_t size;        /* a power of two */
};

struct sqz_ngrams {
    const int32_t *context; /* [n_context], the caller's */
    size_t n_context;
    int32_t *own; /* [room] */
    size_t n_own, room;
    struct sqz_ngram_table of_context, of_own;
};

/* False: out of memory; what there is is freed. */
bool sqz_ngrams_create(struct sqz_ngrams *ngrams, const int32_t *context, size_t n_context, size_t most_own);
void sqz_ngrams_free(struct sqz_ngrams *ngrams);
/* Forgets all but the context. */
void sqz_ngrams_reset(struct sqz_ngrams *ngrams);
/* Tokens of the user's own: the n_tokens behind the first n_before. */
void sqz_ngrams_add(struct sqz_ngrams *ngrams, size_t n_before, const int32_t *tokens, size_t n_tokens);

/* Fills draft with up to `most` tokens that followed the last own tokens and behind[0 .. n_behind) where they stood
 * before. Returns how many; then *n_equal, 2 or 3, is how many tokens were the same. */
size_t sqz_ngrams_find(const struct sqz_ngrams *ngrams, const int32_t *behind, size_t n_behind, int32_t *draft,
                       size_t most, size_t *n_equal);

#endif
