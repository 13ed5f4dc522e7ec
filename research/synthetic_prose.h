/* What the texts of synthetic tasks are written with: sentences of a small grammar, words for keys and lists. */
#ifndef SQZ_RESEARCH_SYNTHETIC_PROSE_H
#define SQZ_RESEARCH_SYNTHETIC_PROSE_H

#include <stddef.h>
#include <stdint.h>

#include "random.h"
#include "text_buffer.h"

enum { PROSE_WORD_LISTS = 8 };

/* Sentences in turn; random is seeded by the caller. */
struct prose {
    struct sqz_random random;
    size_t last[PROSE_WORD_LISTS], last_template;
    size_t paragraph_left; /* sentences */
};

/* The words with n_things things, all different: `begin` and `step`, prime to their number, make their order. */
struct vocabulary {
    uint64_t n_words, begin, step;
    unsigned n_things;
};

void append_string(struct text_buffer *text, const char *string);

/* One sentence, without a space behind it. */
void append_sentence(struct text_buffer *text, struct prose *prose);

/* Seeds nothing: random is the caller's stream. n_things 1 or 2. */
struct vocabulary make_vocabulary(struct sqz_random *random, unsigned n_things);

/* Word i, i below n_words. */
void append_word(struct text_buffer *text, const struct vocabulary *vocabulary, uint64_t i);

/* Number `code` written with n letters from `first`. */
void append_letters(struct text_buffer *text, uint64_t code, size_t n, char first);

#endif
