/*
 * A token over several ranks: times summed by hand, cores that are shared, where more ranks stop paying, and an H200's rates
 * found again in what they are from.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "close.h"
#include "common.h"
#include "ranks_step.h"

/* Ten layers; of a token 512 bytes of keys and values a layer. */
static const struct sqz_model_shape shape = {.n_layer = 10, .n_head = 8, .n_head_kv = 2, .head_dim = 64};

static struct ranks_machine machine_of(double cores)
{
    return (struct ranks_machine){.way = RANKS_LED,
                                  .rates = {.dense_layer = 1e-6, .dense_beyond = 1e-6, .dense_byte = 1e-9},
                                  .rest = 0.01,
                                  .threads = 1,
                                  .cores = cores,
                                  .host_ranks = 1024,
                                  .inside = {1e-5, 1e-9},
                                  .between = {1e-3, 1e-8}};
}

static struct ranks_context context_of(double n_keys, double budget)
{
    return (struct ranks_context){
        .shape = &shape,
        .lookup = {.kind = SQZ_LOOKUP_SHARES, .n_levels = 1, .centroid_share = {0.05}, .budget = budget},
        .n_keys = n_keys,
        .weight_bytes = 1e6};
}

static void test_by_hand(void **state)
{
    (void)state;
    const struct ranks_machine m = machine_of(8);
    const struct ranks_context c = context_of(8000, 1);
    const struct ranks_step one = ranks_step(&m, &c, 1), two = ranks_step(&m, &c, 2), four = ranks_step(&m, &c, 4);
    /* All rows but the 32 that are in `rest`. */
    assert_close(one.seconds, 0.01 + 10 * (1e-6 + 512e-9 * (8000 - 32)), 1e-12);
    assert_close(one.queries + one.totals + one.outputs + one.layer_bytes, 0, 0);
    assert_close(two.rows, 10 * (1e-6 + 512e-9 * (4000 - 32)), 1e-12);
    /* Queries of 2,048 bytes and 64, denominators of 32 there and back, outputs of 2,048 with 32 and 72: a message each. */
    assert_close(two.queries, 10 * (1e-5 + 2112e-9), 1e-12);
    assert_close(two.totals, 10 * 2 * (1e-5 + 32e-9), 1e-12);
    assert_close(two.outputs, 10 * (1e-5 + 2152e-9), 1e-12);
    assert_close(two.seconds, two.model + two.lookup + two.rows + two.queries + two.totals + two.outputs, 1e-12);
    assert_close(two.layer_bytes, 2184, 0);
    /* Rank 0 sends queries to two, of which one sends them on; what comes back from three comes one behind another. */
    assert_close(four.queries, 10 * (2 * (1e-5 + 2112e-9) + 2112e-9), 1e-12);
    assert_close(four.totals, 10 * (1e-5 + 3 * 32e-9 + 2 * (1e-5 + 32e-9)), 1e-12);
    assert_close(four.outputs, 10 * (1e-5 + 3 * 2152e-9), 1e-12);
    assert_close(four.layer_bytes, 2112 + 32 + 2152 + 32, 0);
    /* A rank's weights and its part of the rows; centroids of F16, 128 bytes, with value centroids. */
    assert_close(four.memory, 1e6 + 2000 * 10 * 2 * (256 + 0.05 * 128), 1e-9);
}

/* Six of the ten layers have a window of 1,000 tokens: rank 0's, without messages. */
static void test_windows(void **state)
{
    (void)state;
    const struct sqz_model_shape windows = {
        .n_layer = 10, .n_head = 8, .n_head_kv = 2, .head_dim = 64, .n_window_layer = 6, .n_window_tokens = 1000};
    const struct ranks_machine m = machine_of(2);
    struct ranks_context c = context_of(8000, 1);
    c.shape = &windows;
    const struct ranks_step one = ranks_step(&m, &c, 1), two = ranks_step(&m, &c, 2), four = ranks_step(&m, &c, 4);
    const double window = 6 * 512e-9 * (1000 - 32);
    assert_close(one.rows, 4 * (1e-6 + 512e-9 * (8000 - 32)) + window, 1e-12);
    assert_close(two.rows, 4 * (1e-6 + 512e-9 * (4000 - 32)) + window, 1e-12);
    /* Four ranks of two cores attend twice as long at layers that are shared, rank 0 alone at the others as ever. */
    assert_close(four.rows, 2 * 4 * (1e-6 + 512e-9 * (2000 - 32)) + window, 1e-12);
    assert_close(two.queries, 4 * (1e-5 + 2112e-9), 1e-12);
    assert_close(two.totals, 4 * 2 * (1e-5 + 32e-9), 1e-12);
    assert_close(two.outputs, 4 * (1e-5 + 2152e-9), 1e-12);
    assert_close(two.layer_bytes, 2184, 0);
    assert_close(two.memory, 1e6 + 4000 * 4 * 2 * (256 + 0.05 * 128) + 6 * 2 * 1000 * 256, 1e-9);
    /* A context that is shorter than the window. */
    c.n_keys = 500;
    assert_close(ranks_step(&m, &c, 1).rows, 4 * (1e-6 + 512e-9 * (500 - 32)) + 6 * 512e-9 * (500 - 32), 1e-12);
}

static void test_shares_cores(void **state)
{
    (void)state;
    const struct ranks_machine alone = machine_of(8), crowded = machine_of(2);
    struct ranks_machine hosts = machine_of(1), tried = machine_of(8);
    struct ranks_context c = context_of(8000, 1);
    /* Four ranks of two cores attend as long as two; what rank 0 computes by itself is as long. */
    assert_close(ranks_step(&crowded, &c, 4).rows, 2 * ranks_step(&alone, &c, 4).rows, 1e-12);
    assert_close(ranks_step(&crowded, &c, 4).model, 0.01, 0);
    assert_close(ranks_step(&crowded, &c, 2).rows, ranks_step(&alone, &c, 2).rows, 0);
    /* A host each: no core is shared, and messages go between hosts. */
    hosts.host_ranks = 1;
    assert_close(ranks_step(&hosts, &c, 4).rows, ranks_step(&alone, &c, 4).rows, 0);
    assert_close(ranks_step(&hosts, &c, 2).totals, 10 * 2 * (1e-3 + 32e-8), 1e-12);
    /* Five shards on four ranks: one holds two of them. */
    c.n_shards = 5;
    assert_close(ranks_step(&alone, &c, 4).rows, 10 * 2 * (1e-6 + 512e-9 * (1600 - 32)), 1e-12);
    c.n_shards = 0;
    /* Messages as a whole were measured; others' are in proportion. */
    tried.tried_ranks = 2;
    tried.tried_layer = 1e-3;
    const struct ranks_step two = ranks_step(&tried, &c, 2), four = ranks_step(&tried, &c, 4),
                            plain = ranks_step(&alone, &c, 4);
    assert_close(two.queries + two.totals + two.outputs, 10 * 1e-3, 1e-12);
    const struct ranks_step by_links = ranks_step(&alone, &c, 2);
    assert_close(four.queries / plain.queries, two.queries / by_links.queries, 1e-12);
    /* Another line: four messages of a layer with their bytes change, what was measured beside them stays. */
    const struct ranks_link slow = {5e-3, 1e-8};
    const double bytes = 2112 + 32 + 32 + 2152;
    ranks_change_links(&tried, &shape, &slow, &slow);
    const struct ranks_step slowly = ranks_step(&tried, &c, 2);
    assert_close(slowly.queries + slowly.totals + slowly.outputs,
                 10 * (1e-3 + 4 * (5e-3 - 1e-5) + bytes * (1e-8 - 1e-9)), 1e-12);
    /* Messages that were measured shorter as a whole than one by one leave nothing beside them. */
    tried.tried_layer = 1e-3;
    ranks_change_links(&tried, &shape, &alone.inside, &alone.inside);
    assert_close(tried.tried_layer, 4e-5 + bytes * 1e-9, 1e-12);
}

static void test_stops_paying(void **state)
{
    (void)state;
    struct ranks_machine m = machine_of(1024);
    struct ranks_context c = context_of(1e6, 1);
    struct ranks_choice choice = ranks_choose(&m, &c, 1024);
    double best = INFINITY;
    uint32_t fastest = 0;
    for (uint32_t n = 1; n <= 1024; n *= 2) {
        const double seconds = ranks_step(&m, &c, n).seconds;
        if (seconds < best) {
            best = seconds;
            fastest = n;
        }
    }
    assert_int_equal(choice.fewest, 1);
    assert_int_equal(choice.fastest, fastest);
    assert_true(choice.worth > 1 && choice.worth <= choice.fastest);
    const double worth = ranks_step(&m, &c, choice.worth).seconds;
    assert_true(ranks_step(&m, &c, 2 * choice.worth).seconds > 0.95 * worth);
    assert_true(worth < 0.95 * ranks_step(&m, &c, choice.worth / 2).seconds);
    /* Slow lines: one rank is best, unless its memory is too small. */
    m.inside.latency = 1;
    assert_int_equal(ranks_choose(&m, &c, 1024).worth, 1);
    assert_int_equal(ranks_choose(&m, &c, 1024).fastest, 1);
    m.memory = 0.3 * (ranks_step(&m, &c, 1).memory - 1e6) + 1e6;
    assert_int_equal(ranks_choose(&m, &c, 1024).fewest, 4);
    assert_int_equal(ranks_choose(&m, &c, 1024).fastest, 4);
    m.memory = 1e6;
    assert_int_equal(ranks_choose(&m, &c, 1024).fewest, 0);
}

/* One GPU as it was measured, within what six times and five rates leave; two in a layer by peers. */
static void test_h200(void **state)
{
    (void)state;
    static const struct sqz_model_shape llama = {.n_layer = 32, .n_head = 32, .n_head_kv = 8, .head_dim = 128};
    struct ranks_machine m;
    struct sqz_squeeze_options squeeze;
    ranks_machine_h200(&m, 4.077e9, &squeeze);
    assert_close(m.rest, 2.799e-3, 1e-9);
    const double wanted[][3] = {{131072, 0.05, 41.24e-6}, {1048576, 0.125, 319.41e-6}, {1048576, 1, 983.1e-6}};
    for (size_t i = 0; i < 3; i++) {
        const struct ranks_context c = {
            .shape = &llama, .lookup = context_lookup(&llama, &squeeze, wanted[i][1], 0), .n_keys = wanted[i][0]};
        const struct ranks_step one = ranks_step(&m, &c, 1), two = ranks_step(&m, &c, 2), nine = ranks_step(&m, &c, 9);
        assert_close(one.lookup + one.rows, 32 * wanted[i][2], 0.01);
        assert_close(two.layer_bytes, 2 * (128 + 128 * 129), 0);
        assert_close(two.totals + two.outputs, 32 * 5e-6, 0.01);
        /* Two hosts: a round between them for each of both. */
        assert_true(nine.totals > 32 * m.between.latency && nine.outputs > 32 * m.between.latency);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_by_hand), cmocka_unit_test(test_windows),
                                       cmocka_unit_test(test_shares_cores), cmocka_unit_test(test_stops_paying),
                                       cmocka_unit_test(test_h200)};
    return cmocka_run_group_tests_name("ranks_step", tests, NULL, NULL);
}
