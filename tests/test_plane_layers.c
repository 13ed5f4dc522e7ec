/*
 * Layers whose keys and values are kept as 4 or 4 + 4 bits: attention over one is
 * attention over its twin, which has the numbers that the rows hold as F16 and
 * the same clusters, codes and curves; what is read is counted in bytes of the
 * type; and rounding costs what it is said to.
 *
 * Tolerance: the twin's keys and values are rounded to F16, 2^-11 of a number,
 * which moves a logit by up to that share of the magnitudes of its products, M,
 * and turned queries are INT16, 2^-15 of the largest of their numbers. Both are
 * well below 2^-9 M, and twice that is what weights may be off by.
 */
#include "plane_twins.h"

enum { USER_ROWS = 40 };

static const struct variation variations[] = {
    {4, 2, 64, 1, 2, SQZ_ROWS_INT4_4, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, true, false},
    {4, 2, 64, 1, 2, SQZ_ROWS_INT4_4, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, true, true},
    {4, 2, 64, 1, 2, SQZ_ROWS_INT4, SQZ_INDEX_F16, SQZ_RULE_DEFAULT, true, false},
    {3, 1, 80, 2, 0, SQZ_ROWS_INT4_4, SQZ_INDEX_F16, SQZ_RULE_PAPER, true, false},
    {7, 1, 48, 3, 1, SQZ_ROWS_INT4, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, false, false},
    {2, 2, 256, 1, 0, SQZ_ROWS_INT4_4, SQZ_INDEX_INT8, SQZ_RULE_PAPER, false, true},
    {17, 1, 32, 1, 0, SQZ_ROWS_INT4, SQZ_INDEX_INT8, SQZ_RULE_PAPER, true, false},
};

/* Bytes that are read, of rows of the type and of rows that are not rounded. */
static void check_bytes(const struct sqz_layer *l, const struct sqz_attend_call *c, const struct run *r)
{
    const size_t d = l->shape.head_dim, fixed = r->stats.n_selections * l->n_fixed;
    const struct sqz_rows keys = c->upper ? sqz_rows_upper(&l->keys) : l->keys;
    const size_t row = sqz_row_bytes(keys.type, d);
    const double wanted = (double)(fixed * 2 * d + (r->stats.retained_keys - fixed) * row);
    check_close("key bytes", 0, (double)r->stats.key_bytes, wanted, 0);
    check_close("value bytes", 0, (double)r->stats.value_bytes, wanted, 0);
}

static void check_twins(const struct twins *t, const struct sqz_attend_call *c)
{
    const struct sqz_layer *l = t->layer;
    const size_t d = l->shape.head_dim, n = c->n_tokens * l->shape.n_head;
    struct run got = run(l, c), wanted = run(&t->twin, c);
    const double off = 2 * 0x1p-9 * largest_magnitude(&t->twin, c->queries, c->n_tokens);
    check_close("retained keys", 0, (double)got.stats.retained_keys, (double)wanted.stats.retained_keys, 0);
    check_true("something is left out", 0, (double)got.stats.retained_keys, (double)got.stats.total_keys,
               c->budget == 1 || c->block_tokens > 1 || got.stats.retained_keys < got.stats.total_keys);
    for (size_t i = 0; i < n; i++) {
        double size = 0;
        check_close("lse", i, got.lse[i], wanted.lse[i], off);
        for (size_t j = 0; j < d; j++) size = fmax(size, fabs((double)wanted.out[i * d + j]));
        /* Values are up to 5, of which a weight that is off by a share moves as much. */
        for (size_t j = 0; j < d; j++)
            check_close("output", i * d + j, got.out[i * d + j], wanted.out[i * d + j], off * (size + 1) + 0x1p-10 * 5);
    }
    check_bytes(l, c, &got);
    free_run(&got);
    free_run(&wanted);
}

static void attended_as_twins(void **unused)
{
    (void)unused;
    static const struct {
        size_t n_tokens, block_tokens, n_user;
        float budget;
        int n_threads;
    } cases[] = {{1, 1, 0, 1, 1},     {1, 1, USER_ROWS, 1, 3}, {1, 1, 0, 0.12f, 2},   {1, 1, USER_ROWS, 0.15f, 1},
                 {5, 1, 0, 0.15f, 2}, {20, 16, 0, 1, 2},       {20, 16, 0, 0.15f, 2}, {3, 3, USER_ROWS, 0.15f, 1}};
    for (size_t v = 0; v < COUNT(variations); v++) {
        struct twins t = make_twins(&variations[v], 700, 300 + v);
        const struct sqz_layer *l = t.layer;
        const size_t d = l->shape.head_dim;
        uint16_t *user_keys = random_halves(l->shape.n_head_kv * USER_ROWS * d, 8, 1);
        uint16_t *user_values = random_halves(l->shape.n_head_kv * USER_ROWS * d, 9, 1);
        for (size_t i = 0; i < COUNT(cases); i++) {
            /* A block retains as many rows as a share of the bytes allows, which is more of small ones: as published it
             * goes by the threshold, like single tokens. */
            const bool block =
                cases[i].block_tokens > 1 || l->shape.n_head / l->shape.n_head_kv > SQZ_MAX_GROUP_QUERIES;
            if (block && cases[i].budget < 1 && variations[v].rule != SQZ_RULE_PAPER) continue;
            float *queries = make_queries(&t.material, cases[i].n_tokens, 70 + i, 0.4);
            const struct sqz_attend_call call = {.queries = queries,
                                                 .n_tokens = cases[i].n_tokens,
                                                 .block_tokens = cases[i].block_tokens,
                                                 .n_user = cases[i].n_user,
                                                 .user_keys = user_keys,
                                                 .user_values = user_values,
                                                 .user_capacity_rows = USER_ROWS,
                                                 .n_context_tokens = l->n_rows,
                                                 .budget = cases[i].budget,
                                                 .upper = variations[v].upper,
                                                 .n_threads = cases[i].n_threads};
            describe("variation %zu, case %zu", v, i);
            check_twins(&t, &call);
            free(queries);
        }
        free(user_keys);
        free(user_values);
        free_twins(&t);
    }
}

/* A few tokens that read everything of a long layer, of up to 48 query rows: as its twin, and the same bits for any number of
 * threads. */
static void attended_by_few_tokens(void **unused)
{
    (void)unused;
    static const struct variation of[] = {
        {6, 2, 64, 1, 2, SQZ_ROWS_INT4_4, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, true, false},
        {6, 2, 64, 1, 2, SQZ_ROWS_INT4_4, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, true, true},
        {2, 1, 96, 1, 0, SQZ_ROWS_INT4, SQZ_INDEX_F16, SQZ_RULE_PAPER, true, false},
    };
    enum { ROWS = 2300 };
    for (size_t v = 0; v < COUNT(of); v++) {
        struct twins t = make_twins(&of[v], ROWS, 500 + v);
        const struct sqz_layer *l = t.layer;
        const size_t d = l->shape.head_dim;
        uint16_t *user_keys = random_halves(l->shape.n_head_kv * USER_ROWS * d, 8, 1);
        uint16_t *user_values = random_halves(l->shape.n_head_kv * USER_ROWS * d, 9, 1);
        for (size_t n = 2; n <= 16; n += 7) {
            float *queries = make_queries(&t.material, n, 70 + n, 0.4);
            struct sqz_attend_call call = {.queries = queries,
                                           .n_tokens = n,
                                           .block_tokens = 1,
                                           .n_user = USER_ROWS,
                                           .user_keys = user_keys,
                                           .user_values = user_values,
                                           .user_capacity_rows = USER_ROWS,
                                           .n_context_tokens = l->n_rows,
                                           .budget = 1,
                                           .upper = of[v].upper,
                                           .n_threads = 1};
            describe("few tokens: variation %zu, %zu tokens", v, n);
            check_twins(&t, &call);
            struct run one = run(l, &call);
            call.n_threads = 3;
            struct run three = run(l, &call);
            assert_memory_equal(one.out, three.out, n * l->shape.n_head * d * sizeof *one.out);
            free_run(&one);
            free_run(&three);
            free(queries);
        }
        free(user_keys);
        free(user_values);
        free_twins(&t);
    }
}

/* The squared error of attention's output, as a share of its own square, of all tokens; the numbers of make_material(). */
static double rounding(enum sqz_row_format format, bool upper)
{
    const struct variation v = {4, 2, 64, 1, 2, format, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, true, upper};
    struct twins t = make_twins(&v, 700, 44);
    const size_t n = 16 * (size_t)t.layer->shape.n_head * t.layer->shape.head_dim;
    float *queries = make_queries(&t.material, 16, 3, 0.5);
    const struct sqz_attend_call call = {
        .queries = queries, .n_tokens = 16, .block_tokens = 16, .budget = 1, .upper = upper, .n_threads = 2};
    /* The same rows before they were rounded, in the order of the layer. */
    struct sqz_layer exact = t.twin;
    const size_t k = exact.shape.n_head_kv, d = exact.shape.head_dim;
    uint16_t *keys = take(k * 700 * d, sizeof *keys), *values = take(k * 700 * d, sizeof *values);
    for (size_t h = 0; h < k; h++)
        for (size_t i = 0; i < 700; i++) {
            const size_t from = (h * 700 + (size_t)exact.position[h * 700 + i]) * d, to = (h * 700 + i) * d;
            memcpy(keys + to, t.material.keys + from, d * sizeof *keys);
            memcpy(values + to, t.material.values + from, d * sizeof *values);
        }
    exact.keys = sqz_f16_rows(keys);
    exact.values = sqz_f16_rows(values);
    struct run got = run(t.layer, &call), wanted = run(&exact, &call);
    double error = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        const double off = (double)got.out[i] - (double)wanted.out[i];
        error += off * off;
        size += (double)wanted.out[i] * (double)wanted.out[i];
    }
    free_run(&got);
    free_run(&wanted);
    free(queries);
    free(keys);
    free(values);
    free_twins(&t);
    return error / size;
}

/* 4 bits of gaussian numbers, whose largest of 64 is 2.5 to 3 deviations away, are off by 1/12 of the square of an eighth
 * of that, a hundredth; 8 bits by 256 times less. */
static void rounding_costs(void **unused)
{
    (void)unused;
    const double both = rounding(SQZ_ROWS_INT4_4, false), upper = rounding(SQZ_ROWS_INT4_4, true),
                 four = rounding(SQZ_ROWS_INT4, false);
    describe("squared error of an output");
    check_true("4 + 4 bits", 0, both, 1e-4, both < 1e-4);
    check_true("4 bits", 0, four, 0.02, four < 0.02 && four > 20 * both);
    check_close("the upper plane of 4 + 4 bits", 0, upper, four, 0.001 * four);
}

static void refused_options(void **unused)
{
    (void)unused;
    struct sqz_squeeze_options o;
    struct sqz_error error;
    sqz_squeeze_options_default(&o, SQZ_RULE_DEFAULT);
    o.rows = (enum sqz_row_format)3;
    assert_int_equal(sqz_squeeze_options_check(&o, &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "format 3 of keys and values"));
    o.rows = SQZ_ROWS_INT4;
    o.keys = SQZ_INDEX_INT8;
    assert_int_equal(sqz_squeeze_options_check(&o, &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "one of them"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attended_as_twins),
        cmocka_unit_test(attended_by_few_tokens),
        cmocka_unit_test(rounding_costs),
        cmocka_unit_test(refused_options),
    };
    return cmocka_run_group_tests_name("plane_layers", tests, NULL, NULL);
}
