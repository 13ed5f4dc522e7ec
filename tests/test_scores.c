/*
 * The scores of answers, each by cases counted by hand: with precision P = common / n and recall R = common / m,
 * F = 2 P R / (P + R) = 2 common / (n + m). Then what every score must stand: empty texts, bytes that are no UTF-8,
 * megabytes.
 *
 * Texts are copied to memory of their exact size, so the sanitized tests see a read behind the end.
 * A score is a quotient of small integers: 1e-12 covers its roundings, and no other answer is that close.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common.h"
#include "random.h"
#include "scores.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* In the place of console/common.c, which needs more of the program than the scores do. */
_Noreturn void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    abort();
}

static char *copy_text(const char *text)
{
    size_t n_bytes = strlen(text) + 1;
    char *copy = malloc(n_bytes);
    assert_non_null(copy);
    return memcpy(copy, text, n_bytes);
}

static double score(enum score_kind kind, const char *prediction, const char *reference)
{
    char *ours = copy_text(prediction), *theirs = copy_text(reference);
    const char *const references[] = {theirs};
    double result = score_answer(kind, ours, references, 1, NULL, 0);
    free(ours);
    free(theirs);
    return result;
}

struct score_case {
    const char *prediction, *reference;
    double want;
};

static bool near(double got, double want)
{
    double difference = got - want;
    return difference <= 1e-12 && difference >= -1e-12;
}

static void check_cases(enum score_kind kind, const struct score_case *cases, size_t n_cases)
{
    for (size_t i = 0; i < n_cases; i++) {
        double got = score(kind, cases[i].prediction, cases[i].reference);
        if (!near(got, cases[i].want)) {
            fail_msg("%s, case %zu: \"%s\" against \"%s\": got %.15g, want %.15g", score_names[kind], i,
                     cases[i].prediction, cases[i].reference, got, cases[i].want);
        }
    }
}

/* ---- Each score -------------------------------------------------------------------- */

static void test_names(void **unused)
{
    (void)unused;
    for (size_t i = 0; i < N_SCORES; i++) assert_non_null(score_names[i]);
    assert_string_equal(score_names[SCORE_F1], "f1");
    assert_string_equal(score_names[SCORE_ANY_STRING], "any_string");
}

static void test_f1(void **unused)
{
    (void)unused;
    static const struct score_case cases[] = {
        {"The cat sat.", "a cat SAT", 1.0},                       /* cat sat | cat sat */
        {"the cat sat on the mat", "cat mat", 2.0 * 2 / (4 + 2)}, /* cat sat on mat | cat mat */
        {"blue blue red", "blue", 2.0 * 1 / (3 + 1)},             /* the second blue finds no partner */
        {"blue blue red", "blue blue", 2.0 * 2 / (3 + 2)},
        {"red", "blue", 0.0},
        {"t-he a.n cat", "cat", 1.0},                  /* punctuation goes before articles do */
        {"theatre an\ttheory", "theatre theory", 1.0}, /* only whole words are articles */
        {"it's", "its", 1.0},
        {"snake_case", "snakecase", 1.0},
        {"\u00C9COLE \u0141\u00D3D\u0178 \u039F\u0394\u0388 \u041C\u0418\u0420 \u017B\u0139",       /* capitals, */
         "\u00E9cole \u0142\u00F3d\u00FF \u03BF\u03B4\u03AD \u043C\u0438\u0440 \u017C\u013A", 1.0}, /* small letters */
        {"\u00D7 \u0130 \u0131", "\u00F7 i i", 0.0}, /* signs and Turkish letters are no pairs */
        {"x\u00A0y\u3000z\u2003w", "w x y z", 1.0},  /* spaces beyond ASCII */
        {"\u201Ca\u201D", "\u201C\u201D", 0.0},      /* "a" becomes a space between two quotes: 2 words | 1 */
        {"the\u2014end", "\u2014end", 1.0},          /* a dash ends a word */
        {"an\u00E9e", "\u00E9e", 0.0},               /* a letter does not */
        {"", "", 1.0},
        {"", "word", 0.0},
        {"word", "", 0.0},
        {"...!?", "The a an.", 1.0}, /* nothing remains of both */
        {"...", "word", 0.0},
    };
    check_cases(SCORE_F1, cases, COUNT(cases));
}

static void test_exact(void **unused)
{
    (void)unused;
    static const struct score_case cases[] = {
        {"The  Eiffel\nTower!", "eiffel tower", 1.0},
        {"tower eiffel", "eiffel tower", 0.0},
        {"eiffel", "eiffel tower", 0.0},
        {"ab c", "a bc", 0.0}, /* ab c | bc */
        {"", "", 1.0},
        {"", "x", 0.0},
        {"!", "the", 1.0},
    };
    check_cases(SCORE_EXACT, cases, COUNT(cases));
}

static void test_rouge_l(void **unused)
{
    (void)unused;
    static const struct score_case cases[] = {
        {"police killed the gunman", "police kill the gunman", 2.0 * 3 / (4 + 4)}, /* police the gunman */
        {"the gunman kill police", "police kill the gunman", 2.0 * 2 / (4 + 4)},   /* the gunman */
        {"Police", "police", 0.0},                                                 /* case counts, */
        {"end,", "end", 0.0},                                                      /* punctuation too, */
        {"end.", "end", 1.0},                                                      /* but not the full stop */
        {"a b. c d", "c d. a b", 1.0},             /* sentences may change places: a b c d of 4, 4 */
        {"a b c d", "c d a b", 2.0 * 2 / (4 + 4)}, /* words of one may not */
        /* The example of the paper on ROUGE: w1 w2 of the first sentence, w1 w3 w5 of the second: 4 different words,
         * of 5 of the reference and 8 of the answer, w1 to w3 and w5 to w9. */
        {"w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 2.0 * 4 / (8 + 5)},
        {"a a a a", "a", 1.0}, /* different words: 1 and 1 */
        /* Common subsequences of the same length: "b" or "a". From the end, y = "b a" against x = "a b": y's word goes
         * first, so "b" stays; then 1 of 2 and 2. In both ways one. */
        {"b a", "a b", 2.0 * 1 / (2 + 2)},
        /* x = "a b" against "b a" and "b": "b" and "b", so {b}; against "a" too, {a, b}: 2 of 2 and 2. */
        {"b a. b", "a b", 2.0 * 1 / (2 + 2)},
        {"b a. a", "a b", 2.0 * 2 / (2 + 2)},
        {"3.5", "3 . 5", 2.0 * 2 / (2 + 2)},    /* sentences "3", "5" | "3 ", " 5" */
        {"yes. ", "yes", 2.0 * 1 / (2 + 1)},    /* a sentence of an empty word behind the stop, */
        {"yes. ", "yes.\n", 2.0 * 2 / (2 + 2)}, /* which matches another */
        {"", "", 0.0},
        {"", "a", 0.0},
        {"a", "", 0.0},
        {"...", "...", 0.0},
        {"\u65E5\u672C\u3000\u8A9E", "\u65E5\u672C \u8A9E", 1.0},
    };
    check_cases(SCORE_ROUGE_L, cases, COUNT(cases));
}

static void test_exam(void **unused)
{
    (void)unused;
    static const struct score_case cases[] = {
        {"A", "A", 1.0},
        {"B", "A", 0.0},
        {"(B)", "(B) Their subconscious knew", 1.0},
        {"B. Their subconscious", "(B) Their subconscious knew", 1.0},
        {"Answer: B", "B", 1.0}, /* the letter of "Answer" does not stand alone */
        {"Because of this, C.", "C", 1.0},
        {"B. Not A, as some think", "B", 1.0}, /* one choice is right: the first counts */
        {"AB", "A", 0.0},                      /* a wrong one */
        {"AC", "AC", 1.0},
        {"CA", "AC", 1.0},
        {"AC, since B is wrong", "AC", 1.0}, /* letters in one word are the whole answer */
        {"A, C", "AC", 1.0},
        {"A. this\nC. that", "AC", 1.0},
        {"(A)(C)", "AC", 1.0},
        {"A C\nQuestion 2: B", "AC", 1.0},
        {"Question 2: B", "B", 1.0},
        {"A", "AC", 0.25},
        {"AC", "ABCD", 0.25},
        {"AB", "AC", 0.0},
        {"A, B, C", "AC", 0.0},
        {"AA", "A", 0.0}, /* no set of different letters */
        {"b", "B", 0.0},  /* small letters are no choices */
        {"E", "A", 0.0},
        {"none of them", "A", 0.0},
        {"", "A", 0.0},
        {"True", "True [fact: False]", 1.0},
        {"The statement is false.", "False", 1.0},
        {"untrue", "True", 0.0}, /* no word "true" */
        {"False", "True [fact: False]", 0.0},
        {"True [fact: False]", "True [fact: False]", 1.0},
        {"TRUE [Fact: it is true]", "True [fact: False]", 0.5},
        {"false [fact: false]", "True [fact: False]", 0.5},
        {"False [fact: True]", "True [fact: False]", 0.0},
        {"True [fact: unknown]", "True [fact: False]", 0.5},
        {"", "True [fact: False]", 0.0},
        {"True", "True love", 0.0}, /* a text, not a verdict */
        {"the true love.", "True love", 1.0},
        {"27", "27", 1.0},
        {"", "", 1.0},
        {"x", "...", 0.0},
    };
    check_cases(SCORE_EXAM, cases, COUNT(cases));
}

static void test_code(void **unused)
{
    (void)unused;
    static const struct score_case cases[] = {
        {"return x", "return x", 1.0},
        {"\n\nreturn x\nreturn y", "return x", 1.0},
        {"```c\n# comment\n// another\nreturn x", "return x", 1.0},
        {"x = 1 # one\ny = 2", "y = 2", 1.0}, /* code with a comment is skipped as well */
        {"# one\n\ny = 2", "y = 2", 0.0},     /* the empty line is taken */
        {"abcd", "abxd", 0.75},               /* 2 * 3 / 8 */
        {"abc", "abd", 0.67},                 /* 2 * 2 / 6 = 0.667, to a hundredth */
        {"ab", "ba", 0.5},                    /* 2 * 1 / 4 */
        {"a", "abbbbbbbbbbbbbb", 0.12},       /* 2 * 1 / 16 = 0.125, half to even */
        {"\u00E9a", "\u00E8a", 0.5},          /* characters, not bytes: 2 * 1 / 4 */
        {"a\xFF", "a\xFE", 0.5},
        {"# only", "", 1.0}, /* both empty */
        {"# only", "x", 0.0},
        {"", "", 1.0},
        {"x", "", 0.0},
        {"a / b", "a / b", 1.0},
        {"a /", "a /", 1.0},
    };
    check_cases(SCORE_CODE, cases, COUNT(cases));
}

static void test_classification(void **unused)
{
    (void)unused;
    static const char *const classes[] = {"Food", "City", "Other location", "location", "Other", "State"};
    static const struct score_case cases[] = {
        {"City", "City", 1.0},
        {"It is a City.", "City", 1.0},
        {"City or State", "City", 1.0 / 2},
        {"City, State, Food", "City", 1.0 / 3},
        {"city", "City", 0.0}, /* case counts */
        {"State", "City", 0.0},
        {"Other location", "Other location", 1.0}, /* its parts drop out */
        {"Other location", "location", 1.0 / 3},   /* with a longer name and "Other" */
        {"Other location, City", "Other location", 1.0 / 2},
        {"Other", "Other location", 0.0},
        {"", "City", 0.0},
        {"Planet", "Planet", 0.0}, /* no class */
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        double got =
            score_answer(SCORE_CLASSIFICATION, cases[i].prediction, &cases[i].reference, 1, classes, COUNT(classes));
        if (!near(got, cases[i].want)) {
            fail_msg("case %zu: \"%s\" against \"%s\": got %.15g, want %.15g", i, cases[i].prediction,
                     cases[i].reference, got, cases[i].want);
        }
    }
    assert_true(near(score(SCORE_CLASSIFICATION, "City", "City"), 0.0)); /* without classes */
}

static void test_numbers(void **unused)
{
    (void)unused;
    static const struct score_case retrieval[] = {
        {"Paragraph 12", "Paragraph 12", 1.0},
        {"12", "Paragraph 12", 1.0},
        {"Paragraph 12 or 3", "Paragraph 12", 1.0 / 2},
        {"12, 12, 3", "Paragraph 12", 2.0 / 3},
        {"Paragraph 1", "Paragraph 12", 0.0},
        {"Paragraph 123", "Paragraph 12", 0.0},
        {"012", "Paragraph 12", 0.0},
        {"1.2", "Paragraph 1", 1.0 / 2}, /* two numbers */
        {"7", "3rd: Paragraph 7", 1.0},
        {"12",
         "\u6BB5\u843D"
         "12",
         1.0},
        {"none", "Paragraph 12", 0.0},
        {"", "Paragraph 12", 0.0},
        {"12", "Paragraph", 0.0},
        {"12", "", 0.0},
    };
    static const struct score_case counts[] = {
        {"5", "5", 1.0}, {"There are 5 of 30.", "5", 1.0 / 2}, {"55", "5", 0.0}, {"five", "5", 0.0}, {"", "", 0.0},
    };
    check_cases(SCORE_RETRIEVAL, retrieval, COUNT(retrieval));
    check_cases(SCORE_COUNT, counts, COUNT(counts));
}

static void test_strings(void **unused)
{
    (void)unused;
    static const char *const references[] = {"Alpha", "42", "\u00C9t\u00E9", "gamma ray"};
    static const char *const empty[] = {"", "x"}, *const repeated[] = {"aab", "abacab"};
    assert_true(near(score_answer(SCORE_ALL_STRINGS, "alphabet 1423", references, 4, NULL, 0), 2.0 / 4));
    assert_true(near(score_answer(SCORE_ANY_STRING, "alphabet 1423", references, 4, NULL, 0), 1.0));
    assert_true(
        near(score_answer(SCORE_ALL_STRINGS, "GAMMA RAY, \u00E9T\u00C9, 42, ALPHA", references, 4, NULL, 0), 4.0 / 4));
    assert_true(near(score_answer(SCORE_ALL_STRINGS, "gamma  ray", references, 4, NULL, 0), 0.0));
    assert_true(near(score_answer(SCORE_ANY_STRING, "gamma  ray", references, 4, NULL, 0), 0.0));
    assert_true(near(score_answer(SCORE_ALL_STRINGS, "", references, 4, NULL, 0), 0.0));
    assert_true(near(score_answer(SCORE_ALL_STRINGS, "", empty, 2, NULL, 0), 1.0 / 2));
    assert_true(near(score_answer(SCORE_ALL_STRINGS, "aaab", repeated, 2, NULL, 0), 1.0 / 2));
    assert_true(near(score_answer(SCORE_ALL_STRINGS, "abaabacacabacab", repeated, 2, NULL, 0), 2.0 / 2));
}

/* The best reference counts, and no reference is no score. */
static void test_references(void **unused)
{
    (void)unused;
    static const char *const references[] = {"red", "blue sky", "sky"};
    assert_true(near(score_answer(SCORE_F1, "sky", references, 2, NULL, 0), 2.0 * 1 / (1 + 2)));
    assert_true(near(score_answer(SCORE_F1, "sky", references, 3, NULL, 0), 1.0));
    for (int kind = 0; kind < N_SCORES; kind++)
        assert_true(near(score_answer((enum score_kind)kind, "", NULL, 0, NULL, 0), 0.0));
}

static void test_first_line(void **unused)
{
    (void)unused;
    static const char *const cases[][2] = {
        {"", ""},
        {"\n\n", ""},
        {"one", "one"},
        {"one\ntwo", "one"},
        {"\n\none\n\ntwo", "one"},
        {" \none", " "},
        {"one\r\ntwo", "one\r"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        char *text = copy_text(cases[i][0]);
        score_first_line(text);
        assert_string_equal(text, cases[i][1]);
        free(text);
    }
}

/* ---- What every score must stand -------------------------------------------------------- */

static size_t random_below(uint64_t *state, size_t limit)
{
    return (size_t)(sqz_splitmix64(state) % limit);
}

/* Bytes at random, pieces that scores look for among them, against one another: no crash, and a share. */
static void test_hostile_bytes(void **unused)
{
    (void)unused;
    static const char *const pieces[] = {
        "\xC3",
        "\xE2\x80",
        "\xF0\x9F\x98",
        "\xF4\x90\x80\x80",
        "\xED\xA0\x80",
        "\xC0\x80",
        "\xE0\x81\x81",
        "\x80",
        "\xFF",
        "\xC3\x89",
        "the ",
        "A",
        "[fact:",
        "true",
        "\n",
        ".",
        "`",
        "//",
        "Paragraph ",
        "7",
        "\t",
        "\xE3\x80\x80",
    };
    uint64_t state = 5;
    for (int trial = 0; trial < 3000; trial++) {
        char text[2][30 * 10 + 1]; /* "Paragraph " is the longest piece */
        for (size_t side = 0; side < 2; side++) {
            size_t n = 0, n_wanted = random_below(&state, 30);
            for (size_t i = 0; i < n_wanted; i++) {
                size_t piece = random_below(&state, 2 * COUNT(pieces));
                if (piece < COUNT(pieces)) {
                    memcpy(text[side] + n, pieces[piece], strlen(pieces[piece]));
                    n += strlen(pieces[piece]);
                } else {
                    text[side][n++] = (char)(1 + random_below(&state, 255));
                }
            }
            text[side][n] = '\0';
        }
        for (int kind = 0; kind < N_SCORES; kind++) {
            char *ours = copy_text(text[0]), *theirs = copy_text(text[1]);
            const char *const references[] = {theirs, ours}, *const classes[] = {theirs, ours, "A"};
            double got = score_answer((enum score_kind)kind, ours, references, 1, classes, 3);
            if (!(got >= 0.0 && got <= 1.0)) fail_msg("%s, trial %d: got %g", score_names[kind], trial, got);
            free(ours);
            free(theirs);
        }
        if (!near(score(SCORE_F1, text[0], text[0]), 1.0) || !near(score(SCORE_CODE, "x\xFFy", "x\xFFy"), 1.0))
            fail_msg("trial %d: a text is not equal to itself", trial);
    }
    assert_true(near(score(SCORE_F1, "\xE0\x81\x81", "a"), 0.0));     /* a long form of 'A' is no letter, */
    assert_true(near(score(SCORE_F1, "x\xE0\x80\xA0y", "x y"), 0.0)); /* one of ' ' no space */
    assert_true(near(score(SCORE_F1, "a\xC3", "a\xC3"), 1.0));        /* cut off */
    assert_true(near(score(SCORE_F1, "x \xC3", "x"), 2.0 * 1 / (2 + 1)));
}

static char *repeat(const char *piece, size_t n_bytes)
{
    size_t n_piece = strlen(piece), n = n_bytes / n_piece * n_piece;
    char *text = malloc(n + 1);
    assert_non_null(text);
    for (size_t i = 0; i < n; i++) text[i] = piece[i % n_piece];
    text[n] = '\0';
    return text;
}

/* Every score of a megabyte, the worst of them two sides of one sentence and of one-word sentences, in processor time
 * that does not depend on what else runs. Sanitizers make loops over arrays several times slower. */
static void test_long_texts(void **unused)
{
    (void)unused;
#if defined(__SANITIZE_ADDRESS__)
    const double limit_seconds = 20.0;
#else
    const double limit_seconds = 2.0;
#endif
    static const char *const pieces[] = {"a b c d ", "x",  "a.b.", ".",      " ",     "the ",
                                         "`\n",      "7,", "\xFF", "\u00C9", "[fact:"};
    for (size_t i = 0; i < COUNT(pieces); i++) {
        char *ours = repeat(pieces[i], (size_t)1 << 20), *theirs = repeat(pieces[i], ((size_t)1 << 20) - 64);
        const char *const references[] = {theirs}, *const classes[] = {theirs, ours};
        for (int kind = 0; kind < N_SCORES; kind++) {
            clock_t start = clock();
            double got = score_answer((enum score_kind)kind, ours, references, 1, classes, 2);
            double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
            if (!(got >= 0.0 && got <= 1.0) || !(seconds <= limit_seconds))
                fail_msg("%s of \"%s\" repeated: got %g after %g s", score_names[kind], pieces[i], got, seconds);
        }
        free(ours);
        free(theirs);
    }
}

/* What is within the limits counts, the next word or character does not. */
static void test_limits(void **unused)
{
    (void)unused;
    /* "w w ... w last": 2 different words where "last" is read, else 1. */
    char *within = repeat("w ", 2 * (SCORE_MAX_WORDS - 1) + 8), *beyond = repeat("w ", 2 * SCORE_MAX_WORDS + 8);
    strcpy(within + 2 * (SCORE_MAX_WORDS - 1), "last");
    strcpy(beyond + 2 * SCORE_MAX_WORDS, "last");
    assert_true(near(score(SCORE_ROUGE_L, within, "w last"), 1.0));
    assert_true(near(score(SCORE_ROUGE_L, beyond, "w last"), 2.0 * 1 / (1 + 2)));
    assert_true(near(score(SCORE_ROUGE_L, beyond, within), 2.0 * 1 / (1 + 2)));
    free(within);
    free(beyond);

    /* 2 (1/4) / (1 + 1/4) = 0.4 of what is read, also where there is twice as much. */
    char *line = repeat("x", 2 * SCORE_MAX_CHARACTERS), *quarter = repeat("x", SCORE_MAX_CHARACTERS / 4);
    assert_true(near(score(SCORE_CODE, line, quarter), 0.4));
    line[SCORE_MAX_CHARACTERS] = '\0';
    assert_true(near(score(SCORE_CODE, line, quarter), 0.4));
    line[SCORE_MAX_CHARACTERS / 2] = '\0'; /* 2 (1/4) / (1/2 + 1/4) */
    assert_true(near(score(SCORE_CODE, line, quarter), 0.67));
    free(line);
    free(quarter);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),          cmocka_unit_test(test_f1),         cmocka_unit_test(test_exact),
        cmocka_unit_test(test_rouge_l),        cmocka_unit_test(test_exam),       cmocka_unit_test(test_code),
        cmocka_unit_test(test_classification), cmocka_unit_test(test_numbers),    cmocka_unit_test(test_strings),
        cmocka_unit_test(test_references),     cmocka_unit_test(test_first_line), cmocka_unit_test(test_hostile_bytes),
        cmocka_unit_test(test_long_texts),     cmocka_unit_test(test_limits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
