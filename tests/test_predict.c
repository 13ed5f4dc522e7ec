/*
 * Predictions: work of a layer counted by hand, and rates that are found again from times that were made with them.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "analyze_predict.h"
#include "close.h"
#include "common.h"
#include "speculation_gain.h"

static const struct sqz_model_shape shape = {
    .n_layer = 12, .n_head = 8, .n_head_kv = 2, .head_dim = 64, .n_window_layer = 4, .n_window_tokens = 100};
static const struct sqz_squeeze_options squeeze = {
    .n_levels = 1, .centroid_share = {0.05f}, .index = SQZ_INDEX_F16, .code_words = 1};

static struct attention_work work_at(double n_keys, double budget, double coded_share)
{
    const struct sqz_lookup_model lookup = context_lookup(&shape, &squeeze, budget, coded_share);
    return expected_work(&shape, &lookup, n_keys);
}

static void test_work_by_hand(void **state)
{
    (void)state;
    const struct attention_work all = work_at(2000, 1, 0), some = work_at(2000, 0.25, 0.5), few = work_at(64, 1, 0);
    assert_close(all.dense_layers, 8, 0);
    assert_close(all.lookup_layers + all.lookup_bytes + all.coded_keys + all.row_bytes, 0, 0);
    /* Keys and values of two heads of 64 F16 numbers; four layers see 100 rows, of the short context 32. */
    assert_close(all.dense_bytes, 512.0 * (8 * (2000 - 32) + 4 * (100 - 32)), 1e-12);
    assert_close(few.dense_bytes, 512.0 * 12 * (64 - 32), 1e-12);
    assert_close(some.dense_layers, 0, 0);
    assert_close(some.dense_bytes, 512.0 * 4 * (100 - 32), 1e-12);
    assert_close(some.lookup_layers, 8, 0);
    /* A centroid of 128 bytes, a number of its first row and a variance. */
    assert_close(some.lookup_bytes, 8 * 2 * 100 * (128.0 + 8), 1e-6);
    assert_close(some.coded_keys, 8 * 2 * 1000, 1e-12);
    /* A quarter of the bytes is read in all; what codes need of a head once is the least of it. */
    const double read = some.lookup_bytes + 4 * some.coded_keys + some.row_bytes, quarter = 0.25 * 8 * 512 * 2000;
    if (!(read <= quarter && read > 0.9 * quarter)) fail_msg("%g bytes are read, wanted at most %g", read, quarter);
}

static void test_counted_work(void **state)
{
    (void)state;
    const struct sqz_lookup_model lookup = context_lookup(&shape, &squeeze, 0.25, 0.5);
    struct sqz_attention_stats stats = {.centroid_bytes = 1, .coded_keys = 3000, .key_bytes = 500, .value_bytes = 400};
    const struct attention_work counted = counted_work(&shape, &lookup, 2000, &stats, 10);
    assert_close(counted.coded_keys, 300, 1e-12);
    assert_close(counted.row_bytes, 90, 1e-12);
    assert_close(counted.lookup_bytes, work_at(2000, 0.25, 0).lookup_bytes, 1e-12);
    /* Where no centroid was read, everything was, whatever was asked for. */
    stats.centroid_bytes = 0;
    const struct attention_work all = counted_work(&shape, &lookup, 2000, &stats, 10);
    assert_close(all.dense_layers, 8, 0);
    assert_close(all.dense_bytes, work_at(2000, 1, 0).dense_bytes, 1e-12);
    assert_close(all.row_bytes + all.lookup_layers, 0, 0);
}

static void test_rates_are_found(void **state)
{
    (void)state;
    enum { N_TIMED = 12 };
    static const double lengths[] = {1000, 3000, 6000}, budgets[] = {0.1, 0.2, 0.35, 1}, coded[] = {0.3, 0.4, 0.7, 0};
    const double rest = 2e-3, layer = 2e-5, dense = 5e-6, lookup_byte = 3e-12, key = 2e-11, row_byte = 8e-13,
                 dense_byte = 3e-13;
    struct timed_work timed[N_TIMED];
    for (int i = 0; i < N_TIMED; i++) {
        const struct attention_work w = work_at(lengths[i / 4], budgets[i % 4], coded[i % 4]);
        timed[i].work = w;
        timed[i].seconds = rest + w.lookup_layers * layer + w.dense_layers * dense + w.lookup_bytes * lookup_byte +
                           w.coded_keys * key + w.row_bytes * row_byte + w.dense_bytes * dense_byte;
    }
    const struct attention_rates rates = fit_tokens(timed, N_TIMED, rest);
    assert_close(rates.layer, layer, 1e-4);
    assert_close(rates.dense_layer, dense, 1e-4);
    assert_close(rates.lookup_byte, lookup_byte, 1e-3);
    assert_close(rates.coded_key, key, 1e-3);
    assert_close(rates.row_byte, row_byte, 1e-3);
    assert_close(rates.dense_byte, dense_byte, 1e-4);
    if (!(rates.misfit < 1e-6)) fail_msg("off by %g", rates.misfit);
    /* At a length and a budget that it has not seen, and in its parts. */
    const struct attention_work w = work_at(9000, 0.15, 0.35);
    const struct predicted p = predict(&w, &rates, rest);
    assert_close(p.lookup, 8 * layer + w.lookup_bytes * lookup_byte, 1e-4);
    assert_close(p.codes, w.coded_keys * key, 1e-3);
    assert_close(p.rows, w.row_bytes * row_byte + w.dense_bytes * dense_byte, 1e-3);
    assert_close(p.seconds, p.rest + p.lookup + p.codes + p.rows, 1e-12);
    assert_close(p.rest, rest, 0);
}

/* A card on which a short context takes as long as a long one: nothing is below 0. */
static void test_no_negative_rate(void **state)
{
    (void)state;
    struct timed_work timed[6];
    for (int i = 0; i < 6; i++) {
        timed[i].work = work_at(1000 * (1 + i / 2), i % 2 ? 1 : 0.2, i % 2 ? 0 : 0.4);
        timed[i].seconds = 1e-3 - 1e-5 * i;
    }
    const struct attention_rates r = fit_tokens(timed, 6, 1.1e-3);
    assert_close(r.layer + r.dense_layer + r.lookup_byte + r.coded_key + r.row_byte + r.dense_byte, 0, 0);
    assert_close(predict(&timed[0].work, &r, 1.1e-3).seconds, 1.1e-3, 0);
}

/* A cycle added up by hand. */
static void test_speculation_gain(void **state)
{
    (void)state;
    const double rest = 2e-3, byte = 4e-13, n = 50000, a = 0.9;
    struct speculation_rates rates = {
        .attention = {
            .dense_byte = byte, .row_byte = 5e-13, .lookup_byte = 1e-12, .coded_key = 3e-11, .layer_beyond = 1e-6}};
    const struct sqz_lookup_model draft = context_lookup(&shape, &squeeze, 0.05, 0.2);
    speculation_rates_fill(&rates, rest);
    const struct attention_work few = work_at(n, 0.05, 0.2), all = work_at(n, 1, 0);
    const double token = rest + all.dense_bytes * byte;
    const double drafted = rest + few.lookup_layers * 1e-6 + few.lookup_bytes * 1e-12 + few.coded_keys * 3e-11 +
                           few.row_bytes * 5e-13 + few.dense_bytes * byte;
    struct speculation_gain g = speculation_gain(&shape, &draft, &rates, n, a, 4);
    assert_close(g.token, token, 1e-12);
    assert_close(g.draft, drafted, 1e-12);
    assert_close(g.verify, token, 1e-12); /* memory is the limit */
    assert_close(g.cycle_tokens, 1 + a + a * a + a * a * a + a * a * a * a, 1e-12);
    assert_close(g.gain, g.cycle_tokens * token / (4 * drafted + token), 1e-12);
    /* Runs of 3 and 5 tokens were measured; one of 4 lies between, those of 1 are a token as it was. */
    rates.batches[2] = (struct batch_rate){3e-3, 6e-13};
    rates.batches[3] = (struct batch_rate){5e-3, 10e-13};
    g = speculation_gain(&shape, &draft, &rates, n, a, 3);
    assert_close(g.token, token, 1e-12);
    assert_close(g.verify, 4e-3 + all.dense_bytes * 8e-13, 1e-12);
    assert_close(g.gain, g.cycle_tokens * token / (3 * drafted + g.verify), 1e-12);
    /* Nothing drafted gains nothing; nothing kept, nothing is to be drafted; the best is better than its neighbours. */
    assert_close(speculation_gain(&shape, &draft, &rates, n, a, 0).gain, 1, 1e-12);
    assert_int_equal(speculation_best_gamma(&shape, &draft, &rates, n, 0), 0);
    speculation_rates_fill(&rates, rest);
    const size_t best = speculation_best_gamma(&shape, &draft, &rates, 400000, 0.95);
    const double most = speculation_gain(&shape, &draft, &rates, 400000, 0.95, best).gain;
    assert_true(best > 0 && best < MOST_BATCH_TOKENS - 1);
    assert_true(most > 1 && most >= speculation_gain(&shape, &draft, &rates, 400000, 0.95, best - 1).gain);
    assert_true(most >= speculation_gain(&shape, &draft, &rates, 400000, 0.95, best + 1).gain);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_work_by_hand),     cmocka_unit_test(test_counted_work),
        cmocka_unit_test(test_rates_are_found),  cmocka_unit_test(test_no_negative_rate),
        cmocka_unit_test(test_speculation_gain),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
