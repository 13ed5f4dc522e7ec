/* Characters and words of answers, as scores compare them. */
#ifndef SQZ_RESEARCH_SCORE_WORDS_H
#define SQZ_RESEARCH_SCORE_WORDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct word {
    const char *bytes;
    size_t n_bytes;
    uint32_t id;          /* number_words() */
    bool begins_sentence; /* split_sentences() */
};

struct words {
    struct word *word;
    size_t n_words, capacity;
    char *text; /* what the words point into, when it is theirs; else NULL */
};

/* The character at `text`, which must not be its end. Returns its bytes, at least 1. */
size_t decode_character(const char *text, uint32_t *character);

/* ASCII's 32 signs, Python's string.punctuation. */
bool is_punctuation(uint32_t character);

/* A copy in lower case; the caller frees it. */
char *lower_text(const char *text);

/* The next run of word characters at or behind *text, which moves behind it; NULL: none left. */
const char *next_word(const char **text, size_t *n_bytes);

/* Whether the bytes are the whole of text. */
bool bytes_equal(const char *bytes, size_t n_bytes, const char *text);

void words_free(struct words *words);
/* The bytes are pointed to, not copied. */
void words_add(struct words *words, const char *bytes, size_t n_bytes, bool begins_sentence);

/* Appends what white space separates in [text, end), while there are fewer than max_words. */
void split_words(struct words *words, const char *text, const char *end, size_t max_words);

/* The words of a text after normalisation. Punctuation goes first, so "t-he" is an article too, and one ends where any
 * character is that belongs to no word: of "the" with a curly apostrophe and s, the apostrophe and s remain. */
struct words normalised_words(const char *text);

/* Gives words that are equal, of either text, the same id. Returns the ids, which begin at 0. */
size_t number_words(struct words *a, struct words *b);

#endif
