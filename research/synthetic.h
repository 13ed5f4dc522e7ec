/*
 * Synthetic long-context tasks at any length, made from a seed: documents of
 * which every answer is known. The tasks and their default sizes follow RULER
 * (Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context
 * Language Models?", arXiv 2404.06654); all text is our own.
 *
 *   needles      Sentences "A special magic number for KEY is: VALUE." stand
 *                in generated prose; KEY is two hyphenated words, VALUE has
 *                seven digits, and no key or value serves two questions.
 *     niah_single      one needle a question
 *     niah_multikey    one asked needle and three distractors with other keys
 *     niah_multivalue  four needles with one key, all four values are asked
 *     niah_multiquery  four needles with four keys, all asked at once
 *   variable_tracking  Chains of five assignments (four hops) in such prose,
 *                one chain a question and one more that nobody asks for; a
 *                variable is always assigned before it is used.
 *   common_words  A shuffled numbered list: ten words occur 30 times each, as
 *                many others as fit 3 times each.
 *   frequent_words  A shuffled text of six-letter coded words, the word of rank
 *                k standing floor(n / (zeta(2) k^2)) times among n. Dots take
 *                the place of rank 1, as in RULER; ranks 2 to 4 are asked.
 *
 * To each of several questions about one document the others' needles and
 * chains are distractors: niah_single with n questions is RULER's multi-key
 * task with n keys. The four needles of a question stand about a quarter of the
 * text apart, so the first of several asked ones is in the first quarter.
 *
 * The same arguments give the same document on every machine, as long as
 * `count` counts the same. Bytes may change between versions.
 */
#ifndef SQZ_RESEARCH_SYNTHETIC_H
#define SQZ_RESEARCH_SYNTHETIC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum synthetic_kind {
    SYNTHETIC_NEEDLE,
    SYNTHETIC_NEEDLE_MULTI_KEY,
    SYNTHETIC_NEEDLE_MULTI_VALUE,
    SYNTHETIC_NEEDLE_MULTI_QUERY,
    SYNTHETIC_VARIABLES,
    SYNTHETIC_COMMON_WORDS,
    SYNTHETIC_FREQUENT_WORDS,
    N_SYNTHETIC
};

enum { SYNTHETIC_MIN_TOKENS = 64, SYNTHETIC_MAX_TOKENS = 10000000, SYNTHETIC_MAX_QUESTIONS = 1000 };

extern const char *const synthetic_names[N_SYNTHETIC];

struct synthetic_question {
    char *question; /* ends by asking for nothing but the answers */
    char **answers; /* a right reply contains every one (RULER's string_match_all) */
    size_t n_answers;
    size_t depth_percent; /* needles: where the first asked one begins in the text's bytes, 0..100; otherwise 0 */
};

struct synthetic_document {
    char *text; /* with a NUL behind it */
    size_t text_bytes;
    struct synthetic_question *questions;
    size_t n_questions;
};

/* Fills document, to be released by synthetic_free(), with a text of at most n_tokens (SYNTHETIC_MIN_TOKENS to
 * SYNTHETIC_MAX_TOKENS) as count(user_data, text, n_bytes) counts them: 97% and more of that where a sentence or a word
 * is small against it. The questions are not counted. Count is called on small texts first and then, as a rule, once or
 * twice at the full length.
 *
 * n_questions, 1 to SYNTHETIC_MAX_QUESTIONS, is how many are asked about needles or variables, each with keys and
 * values of its own and asked needles spread evenly over the text; the two word tasks have one question whatever it is.
 *
 * Dies when n_tokens is out of range or too small for the task (and says the least it takes), and without memory. */
void synthetic_make(struct synthetic_document *document, enum synthetic_kind kind, size_t n_tokens, size_t n_questions,
                    uint64_t seed, size_t (*count)(void *user_data, const char *text, size_t n_bytes), void *user_data);
void synthetic_free(struct synthetic_document *document); /* leaves it empty; an empty one is fine */

/* Reads "niah_single:4096" or "niah_single:4K" (K: times 1024). Returns false, and leaves both as they were, when the
 * name is unknown, the number is not plain digits or is out of range, or anything follows. */
bool synthetic_parse(const char *spec, enum synthetic_kind *kind, size_t *n_tokens);

#endif
