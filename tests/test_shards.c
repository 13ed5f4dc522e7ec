/*
 * Contexts in shards: how tokens are dealt out, and that calibration in common
 * says of all shards together what attention then reads of them.
 */
#include "layer_fixture.h"

#include "attention.h"
#include "lookup.h"
#include "shards.h"

static struct sqz_error error;

static void test_deal(void **state)
{
    static const struct sqz_deal deals[] = {{1, 512, 1},    {513, 512, 2},  {1024, 512, 2}, {1025, 512, 2},
                                            {5183, 512, 4}, {4000, 512, 3}, {31, 1, 7},     {97, 8, 5}};
    (void)state;
    for (size_t c = 0; c < COUNT(deals); c++) {
        const struct sqz_deal *d = &deals[c];
        size_t all = 0;
        char *seen = calloc(d->n_tokens, 1);
        assert_non_null(seen);
        for (uint32_t s = 0; s < d->count; s++) {
            const size_t n = sqz_deal_tokens(d, s, d->n_tokens);
            for (size_t i = 0; i < n; i++) {
                const size_t position = sqz_deal_position(d, s, i);
                assert_true(position < d->n_tokens && !seen[position]);
                seen[position] = 1;
                /* Of the tokens before it the shard has those that it counts before it. */
                assert_int_equal(sqz_deal_tokens(d, s, position), i);
                assert_int_equal(sqz_deal_tokens(d, s, position + 1), i + 1);
            }
            all += n;
        }
        assert_int_equal(all, d->n_tokens);
        free(seen);
    }
}

enum { COUNT_SHARDS = 3, QUERIES = 48, ROWS = 3000 };

/* [K][T][D] of a shard's rows. */
static uint16_t *dealt(const struct sqz_deal *deal, uint32_t shard, const uint16_t *rows, size_t n_heads, size_t d)
{
    const size_t n = sqz_deal_tokens(deal, shard, deal->n_tokens);
    uint16_t *out = take(n_heads * n * d, sizeof *out);
    for (size_t h = 0; h < n_heads; h++)
        for (size_t i = 0; i < n; i++)
            memcpy(out + (h * n + i) * d, rows + (h * deal->n_tokens + sqz_deal_position(deal, shard, i)) * d,
                   d * sizeof *out);
    return out;
}

/* What the kept queries read of all shards together, and the output against a dense one in double precision. */
static void check_read(const struct sqz_layer *layers, const float *queries, float budget, double *share,
                       float *out_merged)
{
    const size_t d = layers->shape.head_dim, rows = QUERIES * layers->shape.n_head;
    float *total[COUNT_SHARDS], *out = take(rows * d, sizeof *out), *lse = take(rows, sizeof *lse);
    float *elsewhere = take(rows, sizeof *elsewhere), *merged_lse = take(rows, sizeof *merged_lse);
    struct sqz_attend_call calls[COUNT_SHARDS];
    struct sqz_attention_stats stats = {0};
    size_t thread_bytes = 0;
    for (int s = 0; s < COUNT_SHARDS; s++) {
        const size_t bytes = sqz_attend_thread_bytes(&layers[s], 0, 1);
        if (bytes > thread_bytes) thread_bytes = bytes;
        total[s] = take(rows, sizeof *total[s]);
        calls[s] = (struct sqz_attend_call){.layer = &layers[s],
                                            .queries = queries,
                                            .out = out,
                                            .lse = lse,
                                            .query_token_stride = layers->shape.n_head * d,
                                            .query_head_stride = d,
                                            .out_token_stride = layers->shape.n_head * d,
                                            .out_head_stride = d,
                                            .n_tokens = QUERIES,
                                            .n_context_tokens = layers[s].n_rows,
                                            .budget = budget,
                                            .block_tokens = 1,
                                            .stats = &stats};
    }
    void *workspace = take(sqz_attend_batch_workspace_bytes(thread_bytes, COUNT_SHARDS, 1), 1);
    sqz_attend_totals(&(struct sqz_attend_batch){calls, COUNT_SHARDS, 1, thread_bytes, workspace}, total);
    for (size_t r = 0; r < rows; r++) merged_lse[r] = -INFINITY;
    memset(out_merged, 0, rows * d * sizeof *out_merged);
    for (int s = 0; s < COUNT_SHARDS; s++) {
        for (size_t r = 0; r < rows; r++) {
            elsewhere[r] = -INFINITY;
            for (int o = 0; o < COUNT_SHARDS; o++)
                if (o != s) elsewhere[r] = sqz_log_add(elsewhere[r], total[o][r]);
        }
        calls[s].elsewhere = elsewhere;
        sqz_attend_batch(&(struct sqz_attend_batch){&calls[s], 1, 1, thread_bytes, workspace});
        sqz_merge_partial(out_merged, merged_lse, out, lse, rows, d);
    }
    *share = sqz_attention_stats_share(&stats);
    for (int s = 0; s < COUNT_SHARDS; s++) free(total[s]);
    free(workspace);
    free(out);
    free(lse);
    free(elsewhere);
    free(merged_lse);
}

static void test_calibrate(void **state)
{
    const struct sqz_deal deal = {ROWS, 256, COUNT_SHARDS};
    const struct sqz_layer_shape shape = make_shape(6, 2, 64);
    struct material m = make_material(shape, ROWS, 40, 11);
    float *queries = make_queries(&m, QUERIES, 12, 1.5), *squeezed = take(QUERIES * 6 * 64, sizeof *squeezed);
    float *dense = take(QUERIES * 6 * 64, sizeof *dense);
    uint16_t *halves = take(QUERIES * 6 * 64, sizeof *halves);
    struct sqz_layer layers[COUNT_SHARDS];
    struct sqz_layer_input inputs[COUNT_SHARDS];
    struct sqz_squeeze_options o;
    (void)state;
    sqz_squeeze_options_default(&o, SQZ_RULE_DEFAULT);
    o.n_iterations = 4;
    o.n_sinks = 4;
    o.n_window = 16;
    to_half(halves, queries, QUERIES * 6 * 64);
    for (uint32_t s = 0; s < COUNT_SHARDS; s++)
        inputs[s] = (struct sqz_layer_input){.shape = shape,
                                             .keys = dealt(&deal, s, m.keys, 2, 64),
                                             .values = dealt(&deal, s, m.values, 2, 64),
                                             .n_rows = sqz_deal_tokens(&deal, s, ROWS),
                                             .queries = halves,
                                             .n_queries = QUERIES};
    assert_int_equal(sqz_layers_plan(layers, inputs, COUNT_SHARDS, &o, &error), SQZ_OK);
    assert_int_equal(sqz_layers_cluster(layers, inputs, COUNT_SHARDS, &o, 1, NULL, NULL, &error), SQZ_OK);
    assert_int_equal(sqz_shards_calibrate(layers, NULL, 1, &deal, NULL, &o, 1, NULL, NULL, &error), SQZ_OK);
    const size_t points = layers[0].n_curve;
    assert_true(points > 0);
    for (int s = 0; s < COUNT_SHARDS; s++) {
        assert_null(layers[s].shared);
        assert_memory_equal(layers[s].log_threshold, layers[0].log_threshold, points * sizeof(float));
        assert_memory_equal(layers[s].global_share, layers[0].global_share, points * sizeof(float));
        assert_memory_equal(layers[s].share, layers[0].share, 2 * points * sizeof(float));
        assert_memory_equal(layers[s].lost_mass, layers[0].lost_mass, 2 * points * sizeof(float));
    }
    for (size_t t = 0; t < points; t++) {
        check_true("lost mass", t, layers[0].lost_mass[t], 1,
                   layers[0].lost_mass[t] >= 0 && layers[0].lost_mass[t] <= 1);
        check_true("share falls", t, layers[0].global_share[t], 0,
                   t == 0 || layers[0].global_share[t] <= layers[0].global_share[t - 1]);
    }
    /* The queries that calibrated read what calibration says of them. Thresholds lie on a grid whose shares are joined by
     * straight lines, and a query at a position counted what stands before it alone. */
    for (float budget = 0.15f; budget < 0.5f; budget *= 1.6f) {
        double share, whole, error_squared = 0, size = 0;
        check_read(layers, queries, 1, &whole, dense);
        check_read(layers, queries, budget, &share, squeezed);
        describe("budget %g", (double)budget);
        check_close("share that is read", 0, share, (double)budget, 0.1 * (double)budget);
        check_close("share of everything", 0, whole, 1, 1e-6);
        for (size_t i = 0; i < QUERIES * 6 * 64; i++) {
            error_squared += pow((double)squeezed[i] - (double)dense[i], 2);
            size += pow((double)dense[i], 2);
        }
        check_true("error of the output", 0, sqrt(error_squared / size), 0.3, error_squared < 0.09 * size);
    }
    for (int s = 0; s < COUNT_SHARDS; s++) {
        sqz_layer_release(&layers[s]);
        free(inputs[s].keys);
        free(inputs[s].values);
    }
    free(queries);
    free(halves);
    free(squeezed);
    free(dense);
    free_material(&m);
}

/* A text that is read by shards: each block by the rows of every shard, whose partial outputs merge. */
static void test_read(void **state)
{
    const struct sqz_deal deal = {ROWS, 256, COUNT_SHARDS};
    const struct sqz_layer_shape shape = make_shape(6, 2, 64);
    const size_t d = 64, n_head = 6, blocks = (ROWS + deal.block_tokens - 1) / deal.block_tokens;
    struct material m = make_material(shape, ROWS, 40, 21);
    float *queries = make_queries(&m, deal.block_tokens, 22, 1.5);
    float *out = take(deal.block_tokens * n_head * d, sizeof *out),
          *lse = take(deal.block_tokens * n_head, sizeof *lse);
    float *part = take(deal.block_tokens * n_head * d, sizeof *out);
    float *part_lse = take(deal.block_tokens * n_head, sizeof *lse);
    uint16_t *keys[COUNT_SHARDS], *values[COUNT_SHARDS];
    struct reference *reference = take(1, sizeof *reference);
    struct reference_result wanted;
    void *workspace = take(sqz_causal_workspace_bytes(&shape, 2), 1);
    (void)state;
    for (uint32_t s = 0; s < COUNT_SHARDS; s++) {
        keys[s] = dealt(&deal, s, m.keys, 2, d);
        values[s] = dealt(&deal, s, m.values, 2, d);
    }
    for (size_t b = 0; b < blocks; b++) {
        const size_t at = b * deal.block_tokens, left = ROWS - at;
        const size_t n = left < deal.block_tokens ? left : deal.block_tokens;
        memset(out, 0, n * n_head * d * sizeof *out);
        for (size_t i = 0; i < n * n_head; i++) lse[i] = -INFINITY;
        for (uint32_t s = 0; s < COUNT_SHARDS; s++) {
            const struct sqz_causal_call call = {.shape = shape,
                                                 .queries = queries,
                                                 .out = part,
                                                 .query_token_stride = n_head * d,
                                                 .query_head_stride = d,
                                                 .out_token_stride = n_head * d,
                                                 .out_head_stride = d,
                                                 .n_tokens = n,
                                                 .first_position = sqz_deal_tokens(&deal, s, at),
                                                 .keys = keys[s],
                                                 .values = values[s],
                                                 .capacity_rows = sqz_deal_tokens(&deal, s, ROWS),
                                                 .lse = part_lse,
                                                 .not_own = b % COUNT_SHARDS != s,
                                                 .n_threads = 2,
                                                 .workspace = workspace};
            for (size_t i = 0; i < n * n_head * d; i++) part[i] = NAN;
            sqz_attention_causal(&call);
            describe("block %zu, shard %u", b, s);
            if (call.first_position == 0 && call.not_own)
                for (size_t i = 0; i < n * n_head; i++)
                    check_true("nothing there", i, part_lse[i], 0, part_lse[i] == -INFINITY && part[i * d] == 0);
            sqz_merge_partial(out, lse, part, part_lse, n * n_head, d);
        }
        /* The first and last tokens of the block; merging rounds once more for each shard. */
        for (size_t t = 0; t < n; t += n - 1)
            for (size_t h = 0; h < n_head; h++) {
                const size_t row = (t * n_head + h) * d, head = h / 3 * ROWS * d;
                reference_reset(reference);
                for (size_t i = 0; i <= at + t; i++)
                    reference_add(reference, queries + row, m.keys + head + i * d, m.values + head + i * d, d,
                                  (double)shape.scale);
                reference_finish(reference, d, &wanted);
                for (size_t i = 0; i < d; i++)
                    check_close("read by shards", row + i, out[row + i], wanted.out[i], 2 * wanted.out_tolerance[i]);
            }
    }
    for (uint32_t s = 0; s < COUNT_SHARDS; s++) {
        free(keys[s]);
        free(values[s]);
    }
    free(workspace);
    free(reference);
    free(queries);
    free(out);
    free(lse);
    free(part);
    free(part_lse);
    free_material(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_deal), cmocka_unit_test(test_calibrate),
                                       cmocka_unit_test(test_read)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
