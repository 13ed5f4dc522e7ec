/*
 * Synthetic tasks with white-space-separated words as tokens: sizes, the same
 * bytes for the same seed, and every answer worked out again from the text
 * alone. Needs research/synthetic*.c and console/text_buffer.c; die() is here.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"
#include "synthetic.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* Only children of expect_death() are meant to come here: without clean-up, as in the program. */
_Noreturn void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fflush(stderr);
    _exit(1);
}

struct calls {
    size_t n_calls, n_bytes;
};

static size_t count_words(void *user_data, const char *text, size_t n_bytes)
{
    struct calls *calls = user_data;
    size_t n = 0;
    bool inside = false;
    for (size_t i = 0; i < n_bytes; i++) {
        bool space = text[i] == ' ' || text[i] == '\n';
        n += !space && !inside;
        inside = !space;
    }
    calls->n_calls++;
    calls->n_bytes += n_bytes;
    return n;
}

static struct synthetic_document make(enum synthetic_kind kind, size_t n_tokens, size_t n_questions, uint64_t seed)
{
    struct synthetic_document document;
    struct calls calls = {0};
    synthetic_make(&document, kind, n_tokens, n_questions, seed, count_words, &calls);
    return document;
}

static size_t occurrences(const char *text, const char *string)
{
    size_t n = 0;
    for (const char *at = strstr(text, string); at; at = strstr(at + 1, string)) n++;
    return n;
}

static void append(char *into, size_t capacity, const char *from, size_t n)
{
    assert_true(n < capacity);
    memcpy(into, from, n);
    into[n] = '\0';
}

/* ---- Sizes and seeds ---------------------------------------------------------------- */

static void sizes(void **unused)
{
    (void)unused;
    static const struct {
        size_t n_tokens, n_questions;
    } cases[] = {{64, 1}, {200, 1}, {701, 1}, {1000, 3}, {4096, 10}, {30011, 7}, {300000, 40}};
    static const size_t least[N_SYNTHETIC] = {64, 200, 200, 200, 200, 701, 200};
    for (int kind = 0; kind < N_SYNTHETIC; kind++) {
        for (size_t i = 0; i < COUNT(cases); i++) {
            const size_t n_tokens = cases[i].n_tokens;
            if (n_tokens < least[kind]) continue;
            struct synthetic_document d;
            struct calls calls = {0}, once = {0};
            synthetic_make(&d, (enum synthetic_kind)kind, n_tokens, cases[i].n_questions, 5 + i, count_words, &calls);
            const size_t n = count_words(&once, d.text, d.text_bytes);
            /* A sentence has up to some 30 words. */
            const size_t lower = n_tokens < 500 ? n_tokens - 35 : n_tokens * 95 / 100;
            if (n > n_tokens || n < lower)
                fail_msg("%s: %zu words, wanted %zu to %zu", synthetic_names[kind], n, lower, n_tokens);
            /* Counting is what takes the time: not much more than two texts' worth where texts are large. */
            if (calls.n_calls > 25 || (n_tokens >= 4096 && calls.n_bytes > d.text_bytes * 5 / 2)) {
                fail_msg("%s: %zu calls counted %zu bytes for a text of %zu", synthetic_names[kind], calls.n_calls,
                         calls.n_bytes, d.text_bytes);
            }
            assert_int_equal(strlen(d.text), d.text_bytes);
            assert_false(isspace((unsigned char)d.text[d.text_bytes - 1]));
            assert_int_equal(d.n_questions, kind < SYNTHETIC_COMMON_WORDS ? cases[i].n_questions : 1);
            for (size_t q = 0; q < d.n_questions; q++) {
                assert_non_null(strstr(d.questions[q].question, "Answer with only "));
                assert_true(d.questions[q].n_answers > 0);
                for (size_t a = 0; a < d.questions[q].n_answers; a++)
                    assert_non_null(strstr(d.text, d.questions[q].answers[a]));
            }
            synthetic_free(&d);
            assert_null(d.text);
            synthetic_free(&d);
        }
    }
}

static void seeds(void **unused)
{
    (void)unused;
    for (int i = 0; i < N_SYNTHETIC; i++) {
        enum synthetic_kind kind = (enum synthetic_kind)i;
        struct synthetic_document a = make(kind, 3000, 4, 1), b = make(kind, 3000, 4, 1), c = make(kind, 3000, 4, 2);
        assert_int_equal(a.text_bytes, b.text_bytes);
        assert_memory_equal(a.text, b.text, a.text_bytes);
        assert_string_not_equal(a.text, c.text);
        for (size_t q = 0; q < a.n_questions; q++) {
            assert_string_equal(a.questions[q].question, b.questions[q].question);
            assert_int_equal(a.questions[q].depth_percent, b.questions[q].depth_percent);
            assert_int_equal(a.questions[q].n_answers, b.questions[q].n_answers);
            for (size_t k = 0; k < a.questions[q].n_answers; k++) {
                assert_string_equal(a.questions[q].answers[k], b.questions[q].answers[k]);
                assert_string_not_equal(a.questions[q].answers[k], c.questions[q].answers[k]);
            }
        }
        synthetic_free(&a);
        synthetic_free(&b);
        synthetic_free(&c);
    }
}

/* ---- Needles ---------------------------------------------------------------------------- */

enum { MAX_NEEDLES = 256, NAME_MAX_BYTES = 64 };

struct found_needle {
    char key[NAME_MAX_BYTES], value[NAME_MAX_BYTES];
    size_t begin;
};

static size_t find_needles(const char *text, struct found_needle *needles)
{
    static const char before_key[] = "A special magic number for ", before_value[] = " is: ";
    size_t n = 0;
    for (const char *at = strstr(text, before_key); at; at = strstr(at + 1, before_key)) {
        const char *key = at + strlen(before_key), *key_end = strstr(key, before_value);
        assert_non_null(key_end);
        const char *value = key_end + strlen(before_value);
        assert_true(n < MAX_NEEDLES);
        append(needles[n].key, NAME_MAX_BYTES, key, (size_t)(key_end - key));
        append(needles[n].value, NAME_MAX_BYTES, value, strspn(value, "0123456789"));
        assert_int_equal(strlen(needles[n].value), 7);
        assert_true(value[7] == '.');
        needles[n++].begin = (size_t)(at - text);
    }
    return n;
}

static bool is_answer(const struct synthetic_question *question, const char *string)
{
    bool is = false;
    for (size_t i = 0; i < question->n_answers; i++) is = is || strcmp(question->answers[i], string) == 0;
    return is;
}

static void check_needles(enum synthetic_kind kind, size_t n_tokens, size_t n_questions, uint64_t seed)
{
    static struct found_needle needles[MAX_NEEDLES];
    struct synthetic_document d = make(kind, n_tokens, n_questions, seed);
    const size_t n_each = kind == SYNTHETIC_NEEDLE ? 1 : 4, n = find_needles(d.text, needles);
    size_t n_asked[MAX_NEEDLES] = {0}, first_in_tenth[10] = {0};
    assert_int_equal(n, n_questions * n_each);
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(occurrences(d.text, needles[i].value), 1);
        assert_int_equal(occurrences(d.text, needles[i].key), kind == SYNTHETIC_NEEDLE_MULTI_VALUE ? 4 : 1);
    }
    for (size_t q = 0; q < n_questions; q++) {
        const struct synthetic_question *question = &d.questions[q];
        size_t n_answered = 0, first = SIZE_MAX;
        for (size_t i = 0; i < n; i++) {
            /* Keys in the question and values in the answers must be the same needles. */
            bool asked = strstr(question->question, needles[i].key) != NULL;
            assert_true(asked == is_answer(question, needles[i].value));
            n_asked[i] += asked;
            n_answered += asked;
            first = asked && first == SIZE_MAX ? needles[i].begin : first;
        }
        assert_int_equal(n_answered, question->n_answers);
        assert_int_equal(n_answered, kind == SYNTHETIC_NEEDLE_MULTI_KEY ? 1 : n_each);
        const size_t depth = first * 100 / d.text_bytes, stated = question->depth_percent;
        if (stated > 100 || depth > stated + 10 || stated > depth + 10) {
            fail_msg("%s, %zu tokens, seed %zu, question %zu: stands at %zu%%, not at %zu%%", synthetic_names[kind],
                     n_tokens, (size_t)seed, q, depth, stated);
        }
        first_in_tenth[depth < 100 ? depth / 10 : 9]++;
    }
    for (size_t i = 0; i < n; i++) assert_true(n_asked[i] <= 1);
    /* Evenly: with 20 questions every tenth of the text has its two, give or take one near a border. */
    bool one_needle = kind == SYNTHETIC_NEEDLE || kind == SYNTHETIC_NEEDLE_MULTI_KEY;
    for (size_t i = 0; i < 10 && n_questions == 20 && one_needle; i++)
        if (first_in_tenth[i] < 1 || first_in_tenth[i] > 3)
            fail_msg("%s: %zu of 20 needles in tenth %zu", synthetic_names[kind], first_in_tenth[i], i);
    synthetic_free(&d);
}

static void needles_stand_where_stated(void **unused)
{
    (void)unused;
    for (int kind = SYNTHETIC_NEEDLE; kind <= SYNTHETIC_NEEDLE_MULTI_QUERY; kind++) {
        for (uint64_t seed = 0; seed < 12; seed++) {
            check_needles((enum synthetic_kind)kind, 256, 1, seed);
            check_needles((enum synthetic_kind)kind, 1500, 5, seed);
            check_needles((enum synthetic_kind)kind, 8192, 20, seed);
        }
    }
}

static int compare_strings(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static void prose_is_varied(void **unused)
{
    (void)unused;
    struct synthetic_document d = make(SYNTHETIC_NEEDLE, 60000, 1, 3);
    static char *sentences[20000];
    size_t n = 0, n_repeated = 0;
    for (char *s = strtok(d.text, ".\n"); s; s = strtok(NULL, ".\n")) {
        assert_true(n < COUNT(sentences));
        sentences[n++] = s + strspn(s, " ");
        assert_true(isupper((unsigned char)sentences[n - 1][0]) || isdigit((unsigned char)sentences[n - 1][0]));
        assert_null(strchr(s, '@'));
    }
    assert_true(n > 2000);
    qsort(sentences, n, sizeof *sentences, compare_strings);
    for (size_t i = 1; i < n; i++) n_repeated += strcmp(sentences[i - 1], sentences[i]) == 0;
    assert_int_equal(n_repeated, 0);
    synthetic_free(&d);
}

/* ---- Variables ---------------------------------------------------------------------------- */

struct assignment {
    char name[NAME_MAX_BYTES], value[NAME_MAX_BYTES]; /* the value is what the name stands for at the end */
};

/* Reads the text as a program: every right side must be a number or a variable assigned before. */
static size_t run_assignments(const char *text, struct assignment *assignments)
{
    size_t n = 0;
    for (const char *at = strstr(text, "VAR "); at; at = strstr(at, "VAR ")) {
        char right[NAME_MAX_BYTES];
        int used = 0;
        assert_true(n < MAX_NEEDLES);
        struct assignment *assignment = &assignments[n];
        if (sscanf(at, "VAR %5[A-Z] = VAR %5[A-Z].%n", assignment->name, right, &used) == 2 && used > 0) {
            size_t i = 0;
            while (i < n && strcmp(assignments[i].name, right) != 0) i++;
            assert_true(i < n);
            memcpy(assignment->value, assignments[i].value, NAME_MAX_BYTES);
        } else {
            int n_read = sscanf(at, "VAR %5[A-Z] = %5[0-9].%n", assignment->name, assignment->value, &used);
            if (n_read != 2 || used == 0) fail_msg("no assignment: %.40s", at);
        }
        for (size_t i = 0; i < n; i++) assert_string_not_equal(assignments[i].name, assignment->name);
        n++;
        at += used;
    }
    return n;
}

static void variables_have_their_values(void **unused)
{
    (void)unused;
    static const size_t n_questions[] = {1, 2, 9};
    static struct assignment assignments[MAX_NEEDLES];
    for (size_t c = 0; c < COUNT(n_questions); c++) {
        for (uint64_t seed = 0; seed < 12; seed++) {
            struct synthetic_document d = make(SYNTHETIC_VARIABLES, 2000, n_questions[c], seed);
            const size_t n = run_assignments(d.text, assignments);
            assert_int_equal(n, (n_questions[c] + 1) * 5); /* a chain nobody asks for */
            for (size_t q = 0; q < d.n_questions; q++) {
                size_t n_right = 0;
                for (size_t i = 0; i < n; i++) {
                    bool asked = strstr(d.questions[q].question, assignments[i].value) != NULL;
                    assert_true(asked == is_answer(&d.questions[q], assignments[i].name));
                    n_right += asked;
                }
                assert_int_equal(n_right, 5);
                assert_int_equal(d.questions[q].n_answers, 5);
            }
            synthetic_free(&d);
        }
    }
}

/* ---- Words ----------------------------------------------------------------------------------- */

struct tally {
    const char *word;
    size_t n;
};

static int by_frequency(const void *a, const void *b)
{
    size_t x = ((const struct tally *)a)->n, y = ((const struct tally *)b)->n;
    return (x < y) - (x > y);
}

/* Cuts up the text behind its first paragraph and counts every word, numbers "12." left out: most frequent first. */
static size_t tally_words(char *text, struct tally **tallies)
{
    char *body = strstr(text, "\n\n"), **words = malloc(strlen(text) * sizeof *words);
    size_t n = 0, n_different = 0;
    assert_non_null(body);
    assert_non_null(words);
    for (char *word = strtok(body, " \n"); word; word = strtok(NULL, " \n"))
        if (!isdigit((unsigned char)word[0])) words[n++] = word;
    qsort(words, n, sizeof *words, compare_strings);
    *tallies = calloc(n, sizeof **tallies);
    assert_non_null(*tallies);
    for (size_t i = 0; i < n; i++) {
        if (i == 0 || strcmp(words[i], words[i - 1]) != 0) (*tallies)[n_different++].word = words[i];
        (*tallies)[n_different - 1].n++;
    }
    free(words);
    qsort(*tallies, n_different, sizeof **tallies, by_frequency);
    return n_different;
}

static void common_words_are_common(void **unused)
{
    (void)unused;
    static const size_t n_tokens[] = {700, 5000, 250000}; /* the last takes words of three parts */
    for (size_t c = 0; c < COUNT(n_tokens); c++) {
        struct synthetic_document d = make(SYNTHETIC_COMMON_WORDS, n_tokens[c], 3, 7 + c);
        struct tally *tallies;
        const char *list = strstr(d.text, "\n\n");
        assert_int_equal(strncmp(list, "\n\n1. ", 5), 0);
        assert_non_null(strstr(list, " 300. "));
        const size_t n = tally_words(d.text, &tallies);
        assert_int_equal(d.questions[0].n_answers, 10);
        assert_true(n >= 20);
        for (size_t i = 0; i < n; i++) {
            assert_int_equal(tallies[i].n, i < 10 ? 30 : 3);
            assert_true(is_answer(&d.questions[0], tallies[i].word) == (i < 10));
            assert_int_equal(occurrences(tallies[i].word, "-"), n_tokens[c] < 250000 ? 1 : 2);
            /* A reply with another word must not pass as an answer. */
            for (size_t a = 0; a < 10 && i >= 10; a++) assert_null(strstr(tallies[i].word, d.questions[0].answers[a]));
        }
        free(tallies);
        synthetic_free(&d);
    }
}

static void frequent_words_are_frequent(void **unused)
{
    (void)unused;
    static const size_t n_tokens[] = {90, 100, 150, 1000, 100000};
    for (size_t c = 0; c < COUNT(n_tokens); c++) {
        struct synthetic_document d = make(SYNTHETIC_FREQUENT_WORDS, n_tokens[c], 1, 11 + c);
        struct tally *tallies;
        const size_t n = tally_words(d.text, &tallies);
        assert_int_equal(d.questions[0].n_answers, 3);
        assert_true(n >= 5);
        assert_string_equal(tallies[0].word, "...");
        for (size_t i = 1; i < 4; i++) {
            assert_true(is_answer(&d.questions[0], tallies[i].word));
            assert_true(tallies[i].n > tallies[4].n);
            /* Zipf with exponent 2: as rounding down to whole words leaves it. */
            const double expected = (double)tallies[0].n / (double)((i + 1) * (i + 1));
            assert_true((double)tallies[i].n > expected - 1.0 && (double)tallies[i].n <= expected + 1.0);
        }
        for (size_t i = 1; i < n; i++) assert_int_equal(strlen(tallies[i].word), 6);
        free(tallies);
        synthetic_free(&d);
    }
}

/* ---- What is refused ---------------------------------------------------------------------------- */

/* Runs synthetic_make() in a child: it must end with exit code 1 and say `part`. */
static void expect_death(enum synthetic_kind kind, size_t n_tokens, size_t n_questions, const char *part)
{
    int ends[2], status;
    char message[512];
    size_t n = 0;
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        make(kind, n_tokens, n_questions, 1);
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t got; n < sizeof message - 1 && (got = read(ends[0], message + n, sizeof message - 1 - n)) > 0;)
        n += (size_t)got;
    message[n] = '\0';
    close(ends[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 1);
    if (!strstr(message, part))
        fail_msg("%s, %zu tokens: said \"%s\", wanted \"%s\"", synthetic_names[kind], n_tokens, message, part);
}

static void refused(void **unused)
{
    (void)unused;
    expect_death(SYNTHETIC_NEEDLE, 63, 1, "64 to 10000000 tokens, not 63");
    expect_death(SYNTHETIC_NEEDLE, 10000001, 1, "64 to 10000000 tokens");
    expect_death(SYNTHETIC_NEEDLE, 4096, 0, "1 to 1000 questions, not 0");
    expect_death(SYNTHETIC_NEEDLE, 4096, SIZE_MAX, "1 to 1000 questions");
    expect_death(SYNTHETIC_NEEDLE, 100, 30, "niah_single with 30 questions takes at least ");
    expect_death(SYNTHETIC_NEEDLE_MULTI_VALUE, 64, 2, "niah_multivalue with 2 questions takes at least ");
    expect_death(SYNTHETIC_VARIABLES, 64, 5, "variable_tracking with 5 questions takes at least ");
    expect_death(SYNTHETIC_COMMON_WORDS, 600, 1, "common_words with 1 question takes at least ");
    expect_death(SYNTHETIC_FREQUENT_WORDS, 64, 1, "frequent_words with 1 question takes at least ");
}

static void specs(void **unused)
{
    (void)unused;
    static const struct {
        const char *spec;
        enum synthetic_kind kind;
        size_t n_tokens;
    } good[] = {
        {"niah_single:4096", SYNTHETIC_NEEDLE, 4096},
        {"niah_multikey:4K", SYNTHETIC_NEEDLE_MULTI_KEY, 4096},
        {"niah_multivalue:64", SYNTHETIC_NEEDLE_MULTI_VALUE, 64},
        {"niah_multiquery:1K", SYNTHETIC_NEEDLE_MULTI_QUERY, 1024},
        {"variable_tracking:128K", SYNTHETIC_VARIABLES, 131072},
        {"common_words:10000000", SYNTHETIC_COMMON_WORDS, 10000000},
        {"frequent_words:9765K", SYNTHETIC_FREQUENT_WORDS, 9999360},
    };
    /* clang-format off */
    static const char *const bad[] = {
        "", ":", "niah_single", "niah_single:", "niah_single:K", ":4096", "niah:4096", "niah_singles:4096",
        "NIAH_single:4096", " niah_single:4096", "niah_single :4096", "niah_single: 4096", "niah_single:4096 ",
        "niah_single:+4096", "niah_single:-4096", "niah_single:04096", "niah_single:0", "niah_single:63",
        "niah_single:10000001", "niah_single:9766K", "niah_single:4k", "niah_single:4KK", "niah_single:4M",
        "niah_single:4.5K", "niah_single:0x1000", "niah_single:4096:1", "niah_single:18446744073709555712",
        "niah_single:99999999999999999999999999999999K", "niah_single:4096,niah_multikey:4096",
    };
    /* clang-format on */
    for (size_t i = 0; i < COUNT(good); i++) {
        enum synthetic_kind kind = N_SYNTHETIC;
        size_t n_tokens = 0;
        assert_true(synthetic_parse(good[i].spec, &kind, &n_tokens));
        assert_int_equal(kind, good[i].kind);
        assert_int_equal(n_tokens, good[i].n_tokens);
    }
    for (size_t i = 0; i < COUNT(bad); i++) {
        enum synthetic_kind kind = N_SYNTHETIC;
        size_t n_tokens = 77;
        if (synthetic_parse(bad[i], &kind, &n_tokens)) fail_msg("\"%s\" was taken", bad[i]);
        assert_int_equal(kind, N_SYNTHETIC);
        assert_int_equal(n_tokens, 77);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes),
        cmocka_unit_test(seeds),
        cmocka_unit_test(needles_stand_where_stated),
        cmocka_unit_test(prose_is_varied),
        cmocka_unit_test(variables_have_their_values),
        cmocka_unit_test(common_words_are_common),
        cmocka_unit_test(frequent_words_are_frequent),
        cmocka_unit_test(refused),
        cmocka_unit_test(specs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
