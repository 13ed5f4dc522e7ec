/*
 * What drafting is made of, without a model: speculative sampling keeps the
 * distribution (chi-square over a small vocabulary, and over one that a wrong rule
 * is caught by), n-grams find what followed, and the length of drafts follows
 * what was kept and what took how long.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <string.h>

#include "draft_ngram.h"
#include "draft_pace.h"
#include "random.h"
#include "rejection.h"

enum { N_WORDS = 8, N_TRIALS = 200000 };

static void random_odds(struct sqz_random *random, float *odds, bool some_zero)
{
    double sum = 0;
    for (int i = 0; i < N_WORDS; i++) {
        odds[i] = some_zero && sqz_random_unit(random) < 0.4 ? 0 : (float)sqz_random_unit(random);
        sum += (double)odds[i];
    }
    odds[3] += 0.1f, sum += 0.1; /* never all zeros */
    for (int i = 0; i < N_WORDS; i++) odds[i] = (float)((double)odds[i] / sum);
}

/* Of N_TRIALS choices; a word of odds 0 that was chosen makes it infinite. */
static double chi_square(const size_t *seen, const float *odds)
{
    double sum = 0;
    for (int i = 0; i < N_WORDS; i++) {
        const double expected = (double)odds[i] * N_TRIALS;
        if (expected > 0) sum += ((double)seen[i] - expected) * ((double)seen[i] - expected) / expected;
        else if (seen[i]) return INFINITY;
    }
    return sum;
}

enum rule { RIGHT, RIGHT_WITHOUT_ODDS, KEEP_ALL, DRAW_AGAIN };

static double try_rule(enum rule rule, const float *p, const float *q, uint32_t seed)
{
    size_t seen[N_WORDS] = {0};
    for (size_t i = 0; i < N_TRIALS; i++) {
        const double keep = sqz_draw_number(seed, i, SQZ_DRAW_KEEP), u = sqz_draw_number(seed, i, SQZ_DRAW_WORD);
        const int32_t draft =
            rule == RIGHT_WITHOUT_ODDS ? 3 : sqz_draw(q, N_WORDS, sqz_draw_number(seed, i, SQZ_DRAW_DRAFT));
        int32_t word = draft;
        if (rule == RIGHT) word = sqz_reject(p, q, N_WORDS, draft, keep, u);
        if (rule == RIGHT_WITHOUT_ODDS) word = sqz_reject(p, NULL, N_WORDS, draft, keep, u);
        if (rule == DRAW_AGAIN && keep * (double)q[draft] >= (double)p[draft]) word = sqz_draw(p, N_WORDS, u);
        assert_in_range(word, 0, N_WORDS - 1);
        seen[word]++;
    }
    return chi_square(seen, p);
}

/* 7 degrees of freedom: above 35 once in 90,000 times; the seeds are fixed, and integers make the numbers. */
static void test_rejection_keeps_odds(void **state)
{
    struct sqz_random random;
    float p[N_WORDS], q[N_WORDS];
    (void)state;
    sqz_random_seed(&random, 5);
    for (uint32_t i = 0; i < 12; i++) {
        random_odds(&random, p, i % 2);
        random_odds(&random, q, i % 3 == 2);
        const double right = try_rule(RIGHT, p, q, i), text = try_rule(RIGHT_WITHOUT_ODDS, p, q, i);
        const double same = try_rule(RIGHT, p, p, i);
        if (!(right < 35) || !(text < 35) || !(same < 35))
            fail_msg("case %u: chi-square %.1f, %.1f without odds, %.1f with the same odds", i, right, text, same);
        const double all = try_rule(KEEP_ALL, p, q, i), again = try_rule(DRAW_AGAIN, p, q, i);
        if (!(all > 1000) || !(again > 100)) fail_msg("case %u: a wrong rule passes: %.1f, %.1f", i, all, again);
    }
}

/* The draft is kept as often as it can be: the sum of what both distributions have. */
static void test_rejection_keeps_often(void **state)
{
    struct sqz_random random;
    float p[N_WORDS], q[N_WORDS];
    double both = 0;
    size_t n_kept = 0;
    (void)state;
    sqz_random_seed(&random, 6);
    random_odds(&random, p, false);
    random_odds(&random, q, false);
    for (int i = 0; i < N_WORDS; i++) both += fmin((double)p[i], (double)q[i]);
    for (size_t i = 0; i < N_TRIALS; i++) {
        const int32_t draft = sqz_draw(q, N_WORDS, sqz_draw_number(1, i, SQZ_DRAW_DRAFT));
        n_kept += sqz_reject(p, q, N_WORDS, draft, sqz_draw_number(1, i, SQZ_DRAW_KEEP),
                             sqz_draw_number(1, i, SQZ_DRAW_WORD)) == draft;
    }
    const double kept = (double)n_kept / N_TRIALS;
    if (!(fabs(kept - both) < 0.006)) fail_msg("%.4f of the drafts were kept, %.4f could be", kept, both);
}

static void test_edges(void **state)
{
    const float one[4] = {0, 0, 1, 0}, other[4] = {1, 0, 0, 0};
    (void)state;
    assert_int_equal(sqz_draw(one, 4, 0), 2);
    assert_int_equal(sqz_draw(one, 4, 0x1.fffffffffffffp-1), 2);
    assert_int_equal(sqz_reject(one, one, 4, 2, 0.999, 0.5), 2);
    assert_int_equal(sqz_reject(one, other, 4, 0, 0, 0.5), 2);
    assert_int_equal(sqz_reject(one, NULL, 4, 2, 0.999, 0.5), 2);
    assert_int_equal(sqz_reject(one, NULL, 4, 1, 0, 0.5), 2);
    for (uint32_t seed = 0; seed < 50; seed++)
        for (size_t place = 0; place < 50; place++) {
            const double a = sqz_draw_number(seed, place, SQZ_DRAW_KEEP),
                         b = sqz_draw_number(seed, place, SQZ_DRAW_WORD);
            assert_true(a >= 0 && a < 1 && a != b);
            assert_true(a == sqz_draw_number(seed, place, SQZ_DRAW_KEEP));
            assert_true(a != sqz_draw_number(seed, place + 1, SQZ_DRAW_KEEP));
        }
}

/* ---- N-grams ------------------------------------------------------------------------- */

static void expect_draft(const struct sqz_ngrams *g, int32_t token, size_t n_equal, const int32_t *wanted, size_t n)
{
    int32_t draft[8] = {0};
    size_t equal = 0;
    assert_int_equal(sqz_ngrams_find(g, &token, 1, draft, 4, &equal), n);
    assert_memory_equal(draft, wanted, n * sizeof *draft);
    if (n) assert_int_equal(equal, n_equal);
}

static void test_ngrams(void **state)
{
    static const int32_t context[] = {1, 2, 3, 4, 5, 6, 7, 2, 3, 9, 10};
    struct sqz_ngrams g;
    (void)state;
    assert_true(sqz_ngrams_create(&g, context, 11, 3)); /* room grows */
    expect_draft(&g, 5, 0, NULL, 0);
    sqz_ngrams_add(&g, 0, (const int32_t[]){1, 2}, 2);
    expect_draft(&g, 3, 3, (const int32_t[]){4, 5, 6, 7}, 4); /* three were the same, though the pair stood later */
    sqz_ngrams_add(&g, 2, (const int32_t[]){8, 2}, 2);
    expect_draft(&g, 3, 2, (const int32_t[]){9, 10}, 2);
    sqz_ngrams_add(&g, 4, (const int32_t[]){3, 20, 21, 2}, 4);
    expect_draft(&g, 3, 2, (const int32_t[]){20, 21, 2}, 3); /* what is own goes first, and ends where it ends */
    expect_draft(&g, 99, 0, NULL, 0);
    sqz_ngrams_add(&g, 7, (const int32_t[]){77}, 1); /* not behind what is there: left out */
    assert_int_equal(g.n_own, 8);
    sqz_ngrams_reset(&g);
    expect_draft(&g, 3, 0, NULL, 0);
    sqz_ngrams_add(&g, 0, (const int32_t[]){2}, 1);
    expect_draft(&g, 3, 2, (const int32_t[]){9, 10}, 2);
    sqz_ngrams_free(&g);
    assert_true(sqz_ngrams_create(&g, context, 1, 0)); /* next to nothing */
    expect_draft(&g, 1, 0, NULL, 0);
    sqz_ngrams_free(&g);
}

/* ---- Lengths --------------------------------------------------------------------------------- */

/* What answers take by the lengths that are chosen, relative to token by token: a model whose drafted tokens are kept so
 * often, a drafted token and each token of a batch beyond the first take so much of an exact one. captured: the first two
 * runs of each kind take five times as long, as on a card. */
static double simulate(double kept, double draft, double more, bool captured, double *mean_length)
{
    enum { N_ANSWER = 2000 };
    struct sqz_draft_pace p;
    size_t n_answer = 0, n_drafted = 0, n_cycles = 0, n_first[SQZ_MOST_DRAFT_TOKENS + 2] = {0}, n_drafts = 0;
    double seconds = 0;
    sqz_draft_pace_begin(&p, 15, false, captured);
    for (size_t step = 0; n_answer < N_ANSWER; step++) {
        double gain;
        size_t n = sqz_draft_pace_wants_token(&p) ? 0 : sqz_draft_pace_length(&p, SQZ_DRAFTED_BY_MODEL, 15, &gain);
        if (n == 0 && !sqz_draft_pace_wants_token(&p) && sqz_draft_pace_tries(&p, SQZ_DRAFTED_BY_MODEL))
            n = SQZ_DRAFT_TRIED;
        n_answer++;
        const double slow = captured && n_first[n]++ < 2 ? 5 : 1;
        if (n == 0) {
            sqz_draft_pace_note_token(&p, slow, draft);
            seconds += slow;
            continue;
        }
        if (captured && !sqz_draft_pace_repeats(&p, n + 1)) fail_msg("a draft of %zu tokens is not captured", n);
        const double batch = slow * (1 + more * (double)n);
        for (size_t i = 0; i < n; i++) {
            const double took = captured && n_drafts++ < 2 ? 5 * draft : draft;
            sqz_draft_pace_note_draft(&p, took);
            seconds += took;
        }
        sqz_draft_pace_note_batch(&p, n + 1, batch);
        seconds += batch;
        n_cycles++;
        n_drafted += n;
        for (size_t i = 0; i < n; i++) {
            const bool good = sqz_draw_number(9, step * 16 + i, SQZ_DRAW_KEEP) < kept;
            sqz_draft_pace_note_kept(&p, SQZ_DRAFTED_BY_MODEL, good);
            if (!good) break;
            n_answer++;
        }
    }
    *mean_length = n_cycles ? (double)n_drafted / (double)n_cycles : 0;
    return seconds / (double)n_answer;
}

static void test_lengths(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        const bool captured = i;
        double often, seldom, length;
        double took = simulate(0.96, 0.2, 0.05, captured, &often);
        if (!(took < 0.47) || !(often >= 7))
            fail_msg("good drafts: %.2f of the time by drafts of %.1f tokens", took, often);
        took = simulate(0.6, 0.2, 0.05, captured, &seldom);
        if (!(took < 0.88) || !(seldom < 5)) fail_msg("poor drafts: %.2f by drafts of %.1f", took, seldom);
        /* Where drafts cannot pay, nothing is lost but what captures take: they take too long, are never kept, or batches
         * do. */
        const double never[][3] = {{0.96, 1.1, 0.05}, {0.05, 0.3, 0.1}, {0.96, 0.5, 0.9}, {0.5, 0.9, 0.5}};
        for (size_t j = 0; j < sizeof never / sizeof *never; j++) {
            took = simulate(never[j][0], never[j][1], never[j][2], captured, &length);
            if (!(took <= (captured ? 1.05 : 1.03))) fail_msg("case %zu: %.3f of the time token by token", j, took);
        }
    }
}

static void test_steady(void **state)
{
    struct sqz_draft_pace p;
    double gain;
    (void)state;
    sqz_draft_pace_begin(&p, 5, true, false);
    for (int i = 0; i < 300; i++) {
        assert_false(sqz_draft_pace_wants_token(&p));
        assert_int_equal(sqz_draft_pace_length(&p, SQZ_DRAFTED_BY_MODEL, 9, &gain), 5);
        assert_int_equal(sqz_draft_pace_length(&p, SQZ_DRAFTED_BY_PAIR, 3, &gain), 3);
        sqz_draft_pace_note_draft(&p, 100);
        sqz_draft_pace_note_batch(&p, 6, 100);
        sqz_draft_pace_note_kept(&p, SQZ_DRAFTED_BY_MODEL, false);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rejection_keeps_odds),
        cmocka_unit_test(test_rejection_keeps_often),
        cmocka_unit_test(test_edges),
        cmocka_unit_test(test_ngrams),
        cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_steady),
    };
    return cmocka_run_group_tests_name("drafts", tests, NULL, NULL);
}
