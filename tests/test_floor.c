/*
 * The floor of a budget: by hand-made curves what floor.h promises, and on
 * layers that are built here that it is met when it is asked for and that less
 * buys next to nothing.
 */
#include "layer_fixture.h"

#include "floor.h"

enum { POINTS = 9, MOST_HEADS = 4 };

/* A layer of which a floor needs no more than counts and curves. */
struct made {
    struct sqz_layer layer;
    float threshold[POINTS], share[MOST_HEADS * POINTS], lost[MOST_HEADS * POINTS];
};

/* Shares fall evenly from 1 to `least`, lost mass is lost_per_share times what is not read. */
static void make_layer(struct made *made, uint32_t n_rows, uint32_t n_heads, double least, double lost_per_share)
{
    memset(made, 0, sizeof *made);
    for (int t = 0; t < POINTS; t++) made->threshold[t] = (float)t - POINTS;
    for (uint32_t i = 0; i < n_heads * POINTS; i++) {
        const double share = 1 - (1 - least) * (i % POINTS) / (POINTS - 1);
        made->share[i] = (float)share;
        made->lost[i] = (float)(lost_per_share * (1 - share));
    }
    made->layer = (struct sqz_layer){
        .shape = make_shape(n_heads, n_heads, 32),
        .n_rows = n_rows,
        .n_fixed = 80,
        .n_levels = 1,
        .n_curve = POINTS,
        .log_threshold = made->threshold,
        .share = made->share,
        .lost_mass = made->lost,
        .global_share = made->share,
    };
}

static void check_floor(const char *what, const struct made *made, double wanted)
{
    const double got = (double)sqz_layer_floor(&made->layer);
    check_close(what, made->layer.n_rows, got, wanted, 1e-4);
}

static void room_for_chosen_rows(void **unused)
{
    struct made made;
    (void)unused;
    describe("hand-made curves");
    make_layer(&made, 4000, 2, 0.03, 0.01);
    check_floor("fewest rows where nothing is lost", &made, 0.03 + 160.0 / 4000);
    make_layer(&made, 4000, 2, 0.03, 1);
    check_floor("most rows where much is lost", &made, 0.03 + 320.0 / 4000);
    make_layer(&made, 4000, 2, 0.03, 0.2 / 0.91);
    check_floor("rows that bring the loss down", &made, 0.09);
    made.layer.global_share = NULL;
    check_floor("the same with thresholds per head", &made, 0.09);
    make_layer(&made, 1000000, 1, 0.01, 1);
    check_floor("a long context", &made, 0.01 + 320.0 / 1e6);
}

static void dense_where_choosing_saves_nothing(void **unused)
{
    static const uint32_t rows[] = {1, 32, 79, 80, 81, 144, 400, 600};
    struct made made;
    (void)unused;
    describe("short layers");
    for (size_t i = 0; i < COUNT(rows); i++) {
        make_layer(&made, rows[i], 1, 0.1, 0.01);
        check_floor("short", &made, 1);
    }
    make_layer(&made, 100000, 1, 0.4, 0.01);
    check_floor("a window of four tenths", &made, 1);
    make_layer(&made, 100000, 1, 1.5, 0.01);
    check_floor("an index larger than the rows", &made, 1);
    make_layer(&made, 4000, 1, 0.03, 0.01);
    made.layer.n_levels = made.layer.n_curve = 0;
    check_floor("no clusters", &made, 1);
}

/* What preparation asks before it clusters agrees with the floor of what it would get. */
static void clusters_that_pay(void **unused)
{
    struct sqz_squeeze_options options;
    (void)unused;
    describe("whether clusters pay");
    sqz_squeeze_options_default(&options, SQZ_RULE_DEFAULT);
    check_true("80 fixed, 160 chosen", 719, 0, 0, !sqz_clusters_pay(719, &options) && sqz_clusters_pay(720, &options));
    options.n_sinks = options.n_window = 0;
    check_true("none fixed", 479, 0, 0, !sqz_clusters_pay(479, &options) && sqz_clusters_pay(480, &options));
    options.n_window = 4000000000;
    check_true("a window beyond any layer", 0, 0, 0, !sqz_clusters_pay(1000000, &options));
    sqz_squeeze_options_default(&options, SQZ_RULE_PAPER);
    check_true("published rule", 1, 0, 0, sqz_clusters_pay(1, &options));
}

static void published_rule(void **unused)
{
    struct made made;
    (void)unused;
    describe("published rule");
    make_layer(&made, 400, 2, 0.42, 1);
    made.layer.rule = SQZ_RULE_PAPER;
    check_floor("what is read at any budget", &made, 0.42);
}

/* Dense layers among clustered ones count for nothing; the others by their rows. */
static void layers_together(void **unused)
{
    struct made made[3];
    struct sqz_layer layers[3];
    (void)unused;
    describe("layers together");
    make_layer(&made[0], 5000, 1, 0.02, 0.01);
    make_layer(&made[1], 512, 2, 1, 0);
    made[1].layer.n_levels = made[1].layer.n_curve = 0;
    made[1].layer.sliding_window = true;
    make_layer(&made[2], 5000, 3, 0.06, 0.01);
    for (size_t i = 0; i < COUNT(layers); i++) layers[i] = made[i].layer;
    check_close("mean over heads", 0, (double)sqz_budget_floor(layers, 3), (0.02 + 3 * 0.06) / 4 + 160.0 / 5000, 1e-4);
    check_close("dense layers alone", 0, (double)sqz_budget_floor(&layers[1], 1), 1, 0);
    check_close("no layers", 0, (double)sqz_budget_floor(layers, 0), 1, 0);
}

/* Mean squared error of attention at a budget, relative to dense; *share is what was read. */
static double error_at(const struct sqz_layer *layer, const float *queries, size_t n_tokens, float budget,
                       double *share)
{
    const size_t row = (size_t)layer->shape.n_head * layer->shape.head_dim;
    float *dense = take(row, sizeof *dense), *out = take(row, sizeof *out);
    struct sqz_attention_stats stats = {0};
    struct sqz_error error;
    double difference = 0, size = 0;
    for (size_t t = 0; t < n_tokens; t++) {
        if (sqz_layer_attend(layer, queries + t * row, 1, 1, dense, NULL, 2, NULL, &error) ||
            sqz_layer_attend(layer, queries + t * row, 1, budget, out, NULL, 2, &stats, &error))
            fail_msg("%s", error.message);
        for (size_t i = 0; i < row; i++) {
            difference += ((double)out[i] - (double)dense[i]) * ((double)out[i] - (double)dense[i]);
            size += (double)dense[i] * (double)dense[i];
        }
    }
    *share = sqz_attention_stats_share(&stats);
    free(dense);
    free(out);
    return difference / size;
}

/* Every kind of layer reads about its floor when it is asked for, and errs a good deal less than at the least that it
 * can read. */
static void built_layers(void **unused)
{
    static const struct {
        uint32_t n_head, n_head_kv, head_dim, n_levels, code_words;
        enum sqz_index index, keys;
    } kinds[] = {
        {4, 2, 64, 1, 2, SQZ_INDEX_INT8, SQZ_INDEX_F16}, {2, 2, 64, 2, 2, SQZ_INDEX_F16, SQZ_INDEX_F16},
        {4, 1, 64, 1, 0, SQZ_INDEX_INT8, SQZ_INDEX_F16}, {4, 2, 64, 1, 1, SQZ_INDEX_INT8, SQZ_INDEX_INT8},
        {20, 1, 32, 1, 2, SQZ_INDEX_F16, SQZ_INDEX_F16},
    };
    (void)unused;
    for (size_t i = 0; i < COUNT(kinds); i++) {
        const struct sqz_layer_shape shape = make_shape(kinds[i].n_head, kinds[i].n_head_kv, kinds[i].head_dim);
        struct material m = make_material(shape, 1500, 60, i);
        float *queries = make_queries(&m, 32, i + 1, 4);
        struct sqz_squeeze_options options;
        struct sqz_layer *layer;
        struct sqz_error error;
        double read_least, read;
        sqz_squeeze_options_default(&options, SQZ_RULE_DEFAULT);
        options.n_levels = kinds[i].n_levels;
        options.code_words = kinds[i].code_words;
        options.index = kinds[i].index;
        options.keys = kinds[i].keys;
        if (sqz_layer_create(&layer, &m.shape, m.keys, m.values, m.n_rows, queries, 32, &options, 2, &error))
            fail_msg("%s", error.message);
        describe("kind %zu", i);
        const float floor = sqz_layer_floor(layer);
        check_true("floor", i, (double)floor, 160.0 / 1500, floor > 160.0f / 1500 && floor <= SQZ_FLOOR_DENSE);
        const double least_error = error_at(layer, queries, 32, 1e-6f, &read_least);
        const double floor_error = error_at(layer, queries, 32, floor, &read);
        check_true("least is below", i, read_least, (double)floor, read_least < (double)floor - 0.05);
        /* A session corrects its thresholds on the way; these queries alone read what they need. */
        check_true("read at the floor", i, read, (double)floor, read > read_least && read <= 1.4 * (double)floor);
        check_true("error at the floor", i, floor_error, least_error, floor_error <= 0.7 * least_error);
        sqz_layer_free(layer);
        free(queries);
        free_material(&m);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(room_for_chosen_rows), cmocka_unit_test(dense_where_choosing_saves_nothing),
        cmocka_unit_test(clusters_that_pay),    cmocka_unit_test(published_rule),
        cmocka_unit_test(layers_together),      cmocka_unit_test(built_layers),
    };
    return cmocka_run_group_tests_name("floor", tests, NULL, NULL);
}
