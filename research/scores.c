/*
 * Scores of answers; scores.h says which. The definitions are those that the
 * evaluations' own scripts compute; where this file departs from one, the
 * comment of the score says how and why.
 */
#include "scores.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "memory.h"
#include "score_words.h"

const char *const score_names[N_SCORES] = {
    [SCORE_F1] = "f1",
    [SCORE_ROUGE_L] = "rouge_l",
    [SCORE_EXACT] = "exact",
    [SCORE_EXAM] = "exam",
    [SCORE_CODE] = "code",
    [SCORE_CLASSIFICATION] = "classification",
    [SCORE_RETRIEVAL] = "retrieval",
    [SCORE_COUNT] = "count",
    [SCORE_ALL_STRINGS] = "all_strings",
    [SCORE_ANY_STRING] = "any_string",
};

/* F-measure with beta 1: 2 P R / (P + R) with P = common / n and R = common / m. */
static double f_measure(size_t common, size_t n, size_t m)
{
    return common ? 2.0 * (double)common / ((double)n + (double)m) : 0.0;
}

/* ---- Bags and sequences of normalised words ------------------------------------------ */

/* Both without words: 1, as SQuAD 2.0 has it; LongBench's script, whose references all have some, gives 0. */
static double score_f1(const char *prediction, const char *reference)
{
    struct words ours = normalised_words(prediction), theirs = normalised_words(reference);
    size_t n_ids = number_words(&ours, &theirs), common = 0;
    size_t *unmatched = allocate(n_ids, sizeof *unmatched); /* [id] of the reference */
    for (size_t i = 0; i < theirs.n_words; i++) unmatched[theirs.word[i].id]++;
    for (size_t i = 0; i < ours.n_words; i++) {
        size_t *left = &unmatched[ours.word[i].id];
        common += *left > 0;
        *left -= *left > 0;
    }
    double score = n_ids ? f_measure(common, ours.n_words, theirs.n_words) : 1.0;
    free(unmatched);
    words_free(&ours);
    words_free(&theirs);
    return score;
}

static double score_exact(const char *prediction, const char *reference)
{
    struct words ours = normalised_words(prediction), theirs = normalised_words(reference);
    bool equal = ours.n_words == theirs.n_words;
    for (size_t i = 0; equal && i < ours.n_words; i++) {
        const struct word *a = &ours.word[i], *b = &theirs.word[i];
        equal = a->n_bytes == b->n_bytes && memcmp(a->bytes, b->bytes, a->n_bytes) == 0;
    }
    words_free(&ours);
    words_free(&theirs);
    return equal ? 1.0 : 0.0;
}

/* ---- Longest common subsequences ------------------------------------------------------- */

/* The length of the longest common subsequence of x and y. row: [n_y + 1], overwritten. from_above: NULL, or
 * n_x * n_y zeroed bits; those are set where x[i] != y[j] and leaving out x[i] is better than leaving out y[j]. */
static size_t longest_common(const uint32_t *x, size_t n_x, const uint32_t *y, size_t n_y, uint32_t *row,
                             unsigned char *from_above)
{
    memset(row, 0, (n_y + 1) * sizeof *row);
    for (size_t i = 0; i < n_x; i++) {
        uint32_t diagonal = 0;
        for (size_t j = 0; j < n_y; j++) {
            uint32_t above = row[j + 1];
            if (x[i] == y[j]) {
                row[j + 1] = diagonal + 1;
            } else if (above <= row[j]) {
                row[j + 1] = row[j];
            } else if (from_above) {
                size_t bit = i * n_y + j;
                from_above[bit / 8] = (unsigned char)(from_above[bit / 8] | 1u << bit % 8);
            }
            diagonal = above;
        }
    }
    return row[n_y];
}

/* ---- ROUGE-L ----------------------------------------------------------------------------- */

/* Sentences end at every '.', also at that of a decimal fraction. One of white space alone is kept with one empty word,
 * as the package has it. */
static struct words split_sentences(const char *text)
{
    struct words words = {0};
    while (*text && words.n_words < SCORE_MAX_WORDS) {
        const char *end = text + strcspn(text, ".");
        size_t first = words.n_words;
        split_words(&words, text, end, SCORE_MAX_WORDS);
        if (words.n_words == first && end > text) words_add(&words, text, 0, true);
        else if (words.n_words > first) words.word[first].begins_sentence = true;
        text = end + (*end == '.');
    }
    return words;
}

static size_t sentence_end(const struct words *words, size_t begin)
{
    size_t end = begin + 1;
    while (end < words->n_words && !words->word[end].begins_sentence) end++;
    return end;
}

/* Ids of the words, and how many different ones there are. */
static uint32_t *word_ids(const struct words *words, size_t n_ids, size_t *n_different)
{
    uint32_t *ids = allocate(words->n_words, sizeof *ids);
    bool *seen = allocate(n_ids, sizeof *seen);
    *n_different = 0;
    for (size_t i = 0; i < words->n_words; i++) {
        ids[i] = words->word[i].id;
        *n_different += !seen[ids[i]];
        seen[ids[i]] = true;
    }
    free(seen);
    return ids;
}

/* Marks in common[id] the words of a longest common subsequence of two sentences. Of several, the one that the package
 * finds: from the end, a match is taken wherever there is one, else y's word goes unless x's must. */
static void mark_common(const uint32_t *x, size_t n_x, const uint32_t *y, size_t n_y, uint32_t *row,
                        unsigned char *from_above, bool *common)
{
    memset(from_above, 0, (n_x * n_y + 7) / 8);
    longest_common(x, n_x, y, n_y, row, from_above);
    for (size_t i = n_x, j = n_y; i && j;) {
        size_t bit = (i - 1) * n_y + j - 1;
        if (x[i - 1] == y[j - 1]) {
            common[x[i - 1]] = true;
            i--;
            j--;
        } else if (from_above[bit / 8] >> bit % 8 & 1) {
            i--;
        } else {
            j--;
        }
    }
}

/* ROUGE-L at summary level as the package `rouge` 1.0.1 computes its "f", which LongBench takes. Words are neither put
 * in lower case nor freed of punctuation. For each pair of a sentence of the reference and one of the answer a longest
 * common subsequence of words is found; with C different words in all of these, P = C / different words of the answer,
 * R = C / different words of the reference, F = 2 P R / (P + R).
 * Three departures: the package adds 1e-8 to P + R; it fails on sentences of many hundred words, where its recursion
 * is too deep and LongBench counts 0; and what is beyond SCORE_MAX_WORDS is ignored here. */
static double score_rouge_l(const char *prediction, const char *reference)
{
    struct words ours = split_sentences(prediction), theirs = split_sentences(reference);
    size_t n_ids = number_words(&ours, &theirs), n_ours, n_theirs, n_common = 0;
    uint32_t *our_ids = word_ids(&ours, n_ids, &n_ours), *their_ids = word_ids(&theirs, n_ids, &n_theirs);
    uint32_t *row = allocate(ours.n_words + 1, sizeof *row);
    unsigned char *from_above = allocate(ours.n_words * theirs.n_words / 8 + 1, 1);
    bool *common = allocate(n_ids, sizeof *common);
    for (size_t i = 0, i_end; i < theirs.n_words; i = i_end) {
        i_end = sentence_end(&theirs, i);
        for (size_t j = 0, j_end; j < ours.n_words; j = j_end) {
            j_end = sentence_end(&ours, j);
            mark_common(their_ids + i, i_end - i, our_ids + j, j_end - j, row, from_above, common);
        }
    }
    for (size_t i = 0; i < n_ids; i++) n_common += common[i];
    free(common);
    free(from_above);
    free(row);
    free(their_ids);
    free(our_ids);
    words_free(&theirs);
    words_free(&ours);
    return f_measure(n_common, n_ours, n_theirs);
}

/* ---- Examinations -------------------------------------------------------------------------- */

/* A set of choices, a bit for each of A to D, when the bytes are nothing but different ones of these; else 0. */
static unsigned choice_set(const char *bytes, size_t n_bytes)
{
    unsigned set = 0;
    for (size_t i = 0; i < n_bytes; i++) {
        unsigned choice = bytes[i] >= 'A' && bytes[i] <= 'D' ? 1u << (bytes[i] - 'A') : 0;
        if (!choice || set & choice) return 0;
        set |= choice;
    }
    return set;
}

/* The choices a reference begins with, up to its first white space: "B", "AC", "(B) Their secret ..."; 0: none. */
static unsigned reference_choices(const char *reference)
{
    struct words words = {0};
    char letters[8];
    size_t n_letters = 0;
    split_words(&words, reference, reference + strlen(reference), 1);
    for (size_t i = 0; words.n_words && i < words.word[0].n_bytes && n_letters < sizeof letters; i++) {
        char byte = words.word[0].bytes[i];
        if (!is_punctuation((unsigned char)byte)) letters[n_letters++] = byte;
    }
    words_free(&words);
    return choice_set(letters, n_letters);
}

/* The choices an answer names: its first word that is nothing but letters of choices. Where several choices are right,
 * a first single letter is joined by those that follow it, up to a next "Question". */
static unsigned answer_choices(const char *answer, bool several)
{
    unsigned choices = 0;
    const char *word;
    size_t n_bytes;
    while ((word = next_word(&answer, &n_bytes)) != NULL && !(choices && bytes_equal(word, n_bytes, "Question"))) {
        unsigned set = choice_set(word, n_bytes);
        if (set && !choices && (n_bytes > 1 || !several)) return set;
        choices |= set;
    }
    return choices;
}

enum verdict { VERDICT_NONE, VERDICT_TRUE, VERDICT_FALSE };

struct judgement {
    enum verdict answer, fact; /* by the document; in the world */
    bool has_fact, alone;      /* there is a "[fact:"; the answer is one word */
};

/* The first "true" or "false" of a text in lower case; *n_words: how many words there are. */
static enum verdict first_verdict(const char *text, size_t *n_words)
{
    enum verdict verdict = VERDICT_NONE;
    const char *word;
    size_t n_bytes;
    for (*n_words = 0; (word = next_word(&text, &n_bytes)) != NULL; ++*n_words) {
        if (verdict == VERDICT_NONE) {
            verdict = bytes_equal(word, n_bytes, "true")    ? VERDICT_TRUE
                      : bytes_equal(word, n_bytes, "false") ? VERDICT_FALSE
                                                            : VERDICT_NONE;
        }
    }
    return verdict;
}

static struct judgement judge(const char *text)
{
    static const char fact_mark[] = "[fact:";
    struct judgement judgement = {VERDICT_NONE, VERDICT_NONE, false, false};
    char *copy = lower_text(text);
    char *fact = strstr(copy, fact_mark);
    size_t n_words;
    if (fact) {
        judgement.has_fact = true;
        judgement.fact = first_verdict(fact + sizeof fact_mark - 1, &n_words);
        *fact = '\0';
    }
    judgement.answer = first_verdict(copy, &n_words);
    judgement.alone = n_words == 1;
    free(copy);
    return judgement;
}

/* L-Eval's closed questions, of three kinds by the reference.
 * Choices: 1 for the same set, 0.25 for a part of it that is not empty, 0 with any wrong one. L-Eval's script takes the
 * first A, B, C or D of an answer even inside a word ("Answer: B" is A) and guesses A when there is none; here a letter
 * counts only if it stands alone, and none scores 0.
 * True or False, with "[fact: ...]" for what holds outside of the document: L-Eval counts the two as an item each, so
 * their mean; the first alone where the answer gives no fact.
 * Anything else: as score_exact(). */
static double score_exam(const char *prediction, const char *reference)
{
    unsigned right = reference_choices(reference);
    if (right) {
        unsigned chosen = answer_choices(prediction, (right & (right - 1)) != 0);
        return chosen == right ? 1.0 : chosen && !(chosen & ~right) ? 0.25 : 0.0;
    }
    struct judgement theirs = judge(reference);
    if (theirs.answer == VERDICT_NONE || !theirs.alone) return score_exact(prediction, reference);
    struct judgement ours = judge(prediction);
    double answer = ours.answer == theirs.answer ? 1.0 : 0.0;
    if (theirs.fact == VERDICT_NONE || !ours.has_fact) return answer;
    return (answer + (ours.fact == theirs.fact ? 1.0 : 0.0)) / 2.0;
}

/* ---- Code ------------------------------------------------------------------------------------ */

/* The first line without a backquote, '#' or "//": fences and comments are skipped, and so is code with a comment
 * behind it, but not an empty line unless the text begins with it. Without any, the empty line at the end. */
static const char *first_code_line(const char *text, size_t *n_bytes)
{
    text += strspn(text, "\n");
    for (;;) {
        *n_bytes = strcspn(text, "\n");
        bool skip = false;
        for (size_t i = 0; i < *n_bytes && !skip; i++)
            skip = text[i] == '`' || text[i] == '#' || (text[i] == '/' && text[i + 1] == '/');
        if (!skip) return text;
        text += *n_bytes;
        if (!*text) {
            *n_bytes = 0;
            return text;
        }
        text++;
    }
}

static uint32_t *decode_line(const char *text, size_t n_bytes, size_t *n_characters)
{
    size_t capacity = n_bytes < SCORE_MAX_CHARACTERS ? n_bytes : SCORE_MAX_CHARACTERS;
    uint32_t *characters = allocate(capacity, sizeof *characters);
    *n_characters = 0;
    for (size_t at = 0; at < n_bytes && *n_characters < capacity;)
        at += decode_character(text + at, &characters[(*n_characters)++]);
    return characters;
}

/* LongBench takes fuzz.ratio() of the package fuzzywuzzy: per cent, rounded half to even, of 2 M / T, where T is the
 * characters of both texts. M here is the length of their longest common subsequence, as with python-Levenshtein
 * installed (substitution costs 2); without it the package takes difflib's matching blocks, which are at most as long.
 * The reference is compared whole, also when it has several lines. */
static double score_code(const char *prediction, const char *reference)
{
    size_t line_bytes, reference_bytes = strlen(reference), n_ours, n_theirs;
    const char *line = first_code_line(prediction, &line_bytes);
    if (line_bytes == reference_bytes && memcmp(line, reference, line_bytes) == 0) return 1.0;
    uint32_t *ours = decode_line(line, line_bytes, &n_ours);
    uint32_t *theirs = decode_line(reference, reference_bytes, &n_theirs);
    uint32_t *row = allocate(n_theirs + 1, sizeof *row);
    size_t matches = longest_common(ours, n_ours, theirs, n_theirs, row, NULL);
    free(row);
    free(theirs);
    free(ours);
    double percent = 100.0 * f_measure(matches, n_ours, n_theirs);
    unsigned whole = (unsigned)percent;
    double rest = percent - whole;
    whole += rest > 0.5 || (rest == 0.5 && whole % 2);
    return whole / 100.0;
}

/* ---- What occurs in the answer ----------------------------------------------------------------- */

/* Whether part occurs in text, in linear time by the algorithm of Knuth, Morris and Pratt: strstr() of the GNU library
 * 2.36 takes 20 s for a megabyte of "a b c d " in another. */
static bool occurs(const char *part, const char *text)
{
    size_t n_bytes = strlen(part), matched = 0;
    if (strlen(text) < n_bytes) return false;
    /* border[n]: bytes of the longest proper prefix of part's first n + 1 bytes that is also their suffix */
    size_t *border = allocate(n_bytes, sizeof *border);
    for (size_t i = 1; i < n_bytes; i++) {
        while (matched && part[i] != part[matched]) matched = border[matched - 1];
        matched += part[i] == part[matched];
        border[i] = matched;
    }
    matched = 0;
    for (; *text && matched < n_bytes; text++) {
        while (matched && *text != part[matched]) matched = border[matched - 1];
        matched += *text == part[matched];
    }
    free(border);
    return matched == n_bytes;
}

/* Classes named in the answer, less those that are only a part of the right one's name: 1 / how many, if the right one
 * is among them. LongBench's script forgets to drop a second one that comes directly behind a dropped one. */
static double score_classification(const char *prediction, const char *reference, const char *const *classes,
                                   size_t n_classes)
{
    size_t n_named = 0;
    bool right = false;
    for (size_t i = 0; i < n_classes; i++) {
        bool is_right = strcmp(classes[i], reference) == 0;
        if (occurs(classes[i], prediction) && (is_right || !occurs(classes[i], reference))) {
            n_named++;
            right = right || is_right;
        }
    }
    return right ? 1.0 / (double)n_named : 0.0;
}

/* The next run of digits at or behind text; NULL: none left. */
static const char *next_number(const char *text, size_t *n_digits)
{
    static const char digits[] = "0123456789";
    text += strcspn(text, digits);
    *n_digits = strspn(text, digits);
    return *n_digits ? text : NULL;
}

/* The share of the answer's numbers that are the reference's, which is its first one behind `mark`, or its first where
 * the mark does not occur. Compared digit by digit: 07 is not 7. No numbers: 0. */
static double score_numbers(const char *prediction, const char *reference, const char *mark)
{
    const char *marked = strstr(reference, mark);
    size_t n_digits, n, n_numbers = 0, n_right = 0;
    const char *right = next_number(marked ? marked + strlen(mark) : reference, &n_digits);
    for (const char *number = prediction; right && (number = next_number(number, &n)) != NULL; number += n) {
        n_numbers++;
        n_right += n == n_digits && memcmp(number, right, n) == 0;
    }
    return n_numbers ? (double)n_right / (double)n_numbers : 0.0;
}

/* How many of the references occur in the prediction, whatever the case of their letters. An empty one does. */
static size_t count_occurring(const char *prediction, const char *const *references, size_t n_references)
{
    char *text = lower_text(prediction);
    size_t n_occurring = 0;
    for (size_t i = 0; i < n_references; i++) {
        char *reference = lower_text(references[i]);
        n_occurring += occurs(reference, text);
        free(reference);
    }
    free(text);
    return n_occurring;
}

/* ---- All ------------------------------------------------------------------------------------------ */

static double score_one(enum score_kind kind, const char *prediction, const char *reference, const char *const *classes,
                        size_t n_classes)
{
    switch (kind) {
    case SCORE_F1: return score_f1(prediction, reference);
    case SCORE_ROUGE_L: return score_rouge_l(prediction, reference);
    case SCORE_EXACT: return score_exact(prediction, reference);
    case SCORE_EXAM: return score_exam(prediction, reference);
    case SCORE_CODE: return score_code(prediction, reference);
    case SCORE_CLASSIFICATION: return score_classification(prediction, reference, classes, n_classes);
    case SCORE_RETRIEVAL: return score_numbers(prediction, reference, "Paragraph ");
    case SCORE_COUNT: return score_numbers(prediction, reference, "");
    case SCORE_ALL_STRINGS:
    case SCORE_ANY_STRING:
    case N_SCORES: break;
    }
    return 0.0;
}

double score_answer(enum score_kind kind, const char *prediction, const char *const *references, size_t n_references,
                    const char *const *classes, size_t n_classes)
{
    if (n_references == 0) return 0.0;
    if (kind == SCORE_ALL_STRINGS || kind == SCORE_ANY_STRING) {
        size_t n_occurring = count_occurring(prediction, references, n_references);
        return kind == SCORE_ALL_STRINGS ? (double)n_occurring / (double)n_references : n_occurring > 0;
    }
    double best = 0.0;
    for (size_t i = 0; i < n_references; i++) {
        double score = score_one(kind, prediction, references[i], classes, n_classes);
        best = score > best ? score : best;
    }
    return best;
}

void score_first_line(char *prediction)
{
    char *line = prediction + strspn(prediction, "\n");
    size_t n_bytes = strcspn(line, "\n");
    memmove(prediction, line, n_bytes);
    prediction[n_bytes] = '\0';
}
