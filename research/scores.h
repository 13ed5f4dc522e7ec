/*
 * Scores of an answer against reference answers, as three evaluations of long
 * contexts define them: LongBench (arXiv 2308.14508), L-Eval (2307.11088) and
 * RULER (2404.06654). Every score is in [0, 1].
 *
 *   f1              LongBench qa_f1: words both have, after normalisation
 *   rouge_l         LongBench rouge: longest common subsequences of words, by sentence
 *   exact           the same words in the same order, after normalisation
 *   exam            L-Eval, closed questions: letters of choices, or True / False
 *   code            LongBench code_sim: edit similarity of one line
 *   classification  LongBench: names of classes that occur in the answer
 *   retrieval       LongBench: share of the answer's numbers that are the paragraph's
 *   count           LongBench: share of the answer's numbers that are the right one
 *   all_strings     RULER string_match_all: share of the references that occur
 *   any_string      RULER string_match_part: whether any reference occurs
 *
 * Normalisation, here always SQuAD's: lower case, ASCII punctuation dropped, the
 * words a, an and the dropped, white space collapsed. Lower case is of ASCII,
 * Latin, Greek and Cyrillic letters below U+0460; other scripts stay as they are.
 *
 * Left out: LongBench's Chinese qa_f1_zh and rouge_zh, which need a segmenter of
 * words, and what L-Eval does to the answers of gsm100, codeU and topic retrieval
 * before it compares them; its ROUGE is of another package than LongBench's.
 *
 * Texts are UTF-8 that ends with NUL, but any bytes are fine: one that cannot be
 * UTF-8 is a character of its own. Memory is linear in the texts, and rouge_l and
 * code, which take quadratic time, read no further than the limits below.
 */
#ifndef SQZ_RESEARCH_SCORES_H
#define SQZ_RESEARCH_SCORES_H

#include <stddef.h>

enum {
    SCORE_MAX_WORDS = 8192,     /* of each text that rouge_l reads: 8 MiB of memory, below a second */
    SCORE_MAX_CHARACTERS = 8192 /* of each line that code reads */
};

enum score_kind {
    SCORE_F1,
    SCORE_ROUGE_L,
    SCORE_EXACT,
    SCORE_EXAM,
    SCORE_CODE,
    SCORE_CLASSIFICATION,
    SCORE_RETRIEVAL,
    SCORE_COUNT,
    SCORE_ALL_STRINGS,
    SCORE_ANY_STRING,
    N_SCORES
};

extern const char *const score_names[N_SCORES];

/* The best score over the references; all_strings: the share of them that occur. 0 without references.
 * classes: for classification, the names of all classes; else NULL, 0. Dies without memory. */
double score_answer(enum score_kind kind, const char *prediction, const char *const *references, size_t n_references,
                    const char *const *classes, size_t n_classes);

/* Keeps, in place, only the first line that is not empty: what LongBench scores of trec, triviaqa, samsum and lsht,
 * since models go on with further examples there. */
void score_first_line(char *prediction);

#endif
