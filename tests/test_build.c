/*
 * Building layers: what sqz_layer_create() and the calls below it promise about
 * order, centroids, errors and determinism, and that calibration predicts what
 * attention then reads and loses. References are in double precision.
 */
#include "layer_fixture.h"

#include "build.h"
#include "codes.h"
#include "lookup_keys.h"

#define BORDER 1e-4 /* relative distance of a score to a threshold below which it may fall on either side */

static struct sqz_error error;

static struct sqz_squeeze_options options_of(uint32_t n_levels)
{
    struct sqz_squeeze_options o;
    sqz_squeeze_options_default(&o, SQZ_RULE_DEFAULT);
    o.n_levels = n_levels;
    o.index = SQZ_INDEX_F16;
    o.centroid_share[0] = n_levels > 1 ? 0.1f : 0.05f;
    o.centroid_share[1] = 0.03f;
    o.centroid_share[2] = 0.01f;
    o.n_sinks = 4;
    o.n_window = 32;
    o.n_iterations = 6;
    return o;
}

static struct sqz_layer *create(const struct material *m, const float *queries, size_t n_queries,
                                const struct sqz_squeeze_options *o, int n_threads)
{
    struct sqz_layer *layer = NULL;
    if (sqz_layer_create(&layer, &m->shape, m->keys, m->values, m->n_rows, queries, n_queries, o, n_threads, &error))
        fail_msg("sqz_layer_create: %s", error.message);
    return layer;
}

/* ---- Structure -------------------------------------------------------------------- */

/* Number `at` of INT8 rows of a KV head, counted from the first head's first. */
static double small_number(const struct sqz_rows *rows, size_t d, uint32_t head, size_t at)
{
    return (double)rows->scale[at / d] * sqz_rows_i8(rows)[at] + (double)rows->mean[head * d + at % d];
}

/* Rows are those of the input in another order, and every number of the index is what layer.h says. */
static void check_structure(const struct sqz_layer *layer, const struct material *m,
                            const struct sqz_squeeze_options *o)
{
    const size_t d = m->shape.head_dim, n = m->n_rows;
    const bool small = layer->keys.type == SQZ_ROW_I8;
    const uint16_t *values = sqz_rows_f16(&layer->values);
    uint16_t *keys = take(m->shape.n_head_kv * n * d, sizeof *keys); /* the input's, in the layer's order */
    unsigned char *seen = take(n, 1);
    for (uint32_t h = 0; h < m->shape.n_head_kv; h++) {
        const int32_t *position = layer->position + h * n;
        memset(seen, 0, n);
        for (size_t i = 0; i < n; i++) {
            check_true("position", i, position[i], 0,
                       position[i] >= 0 && (size_t)position[i] < n && !seen[position[i]]++);
            const size_t from = (h * n + (size_t)position[i]) * d, to = (h * n + i) * d;
            memcpy(keys + to, m->keys + from, d * sizeof *keys);
            if (!small) assert_memory_equal(sqz_rows_f16(&layer->keys) + to, keys + to, d * sizeof *keys);
            assert_memory_equal(values + to, m->values + from, d * sizeof(uint16_t));
        }
        for (size_t i = 0; i < layer->n_fixed; i++)
            check_close("fixed rows in order", i, position[i],
                        i < o->n_sinks || !layer->n_levels ? (double)i : (double)(n - layer->n_fixed + i), 0);
        for (size_t i = h * n * d; small && i < (h + 1) * n * d; i++)
            check_close("INT8 key", i, small_number(&layer->keys, d, h, i), half_value(keys[i]),
                        0.5001 * (double)layer->keys.scale[i / d] + 1e-6 * fabs(half_value(keys[i])));
        for (uint32_t l = 0; l < layer->n_levels; l++) {
            const struct sqz_level *level = &layer->level[l];
            const uint32_t *offset = level->offset + h * (level->n_clusters + 1);
            const uint32_t below = l ? layer->level[l - 1].n_clusters : layer->n_rows - layer->n_fixed;
            check_close("first offset", l, offset[0], 0, 0);
            check_close("last offset", l, offset[level->n_clusters], below, 0);
            for (uint32_t c = 0; c < level->n_clusters; c++) {
                check_true("offsets increase", c, offset[c], offset[c + 1], offset[c] < offset[c + 1]);
                uint32_t first;
                const size_t n_keys = sqz_cluster_keys(layer, h, l, c, &first);
                check_close("cluster rows", c, (double)sqz_layer_cluster_rows(layer, h, l, c), (double)n_keys, 0);
                double variance = 0;
                for (size_t j = 0; j < d; j++) {
                    double mean = 0, value = 0, square = 0, magnitude = 0;
                    for (size_t i = first; i < first + n_keys; i++) {
                        const double key = half_value(keys[(h * n + i) * d + j]);
                        mean += key / (double)n_keys;
                        square += key * key / (double)n_keys;
                        value += half_value(values[(h * n + i) * d + j]) / (double)n_keys;
                        magnitude = fmax(magnitude, fabs(key));
                    }
                    variance += fmax(square - mean * mean, 0);
                    const size_t at = (h * level->n_clusters + c) * d + j;
                    if (level->centroids.type == SQZ_ROW_I8) /* to half a step of the centroid's scale */
                        check_close("INT8 centroid", at, small_number(&level->centroids, d, h, at), mean,
                                    0.5001 * (double)level->centroids.scale[at / d] + 1e-6 * magnitude);
                    else /* to F16: 11 bits */
                        check_close("centroid", at, half_value(sqz_rows_f16(&level->centroids)[at]), mean,
                                    fabs(mean) * 0x1p-11 + 0x1p-24);
                    if (layer->tail)
                        check_close("value centroid", at, half_value(sqz_rows_f16(&level->value_centroids)[at]), value,
                                    fabs(value) * 0x1p-11 + 0x1p-24);
                }
                check_close("variance", c, level->variance[h * level->n_clusters + c], variance,
                            1e-4 * variance + 1e-6);
            }
        }
    }
    free(keys);
    free(seen);
}

static void structure(void **unused)
{
    (void)unused;
    static const uint32_t shapes[][3] = {{4, 2, 32}, {3, 1, 80}, {6, 3, 64}};
    for (uint32_t levels = 1; levels <= 3; levels++)
        for (size_t i = 0; i < 4; i++) {
            const uint32_t *s = shapes[(levels + i) % 3];
            struct material m = make_material(make_shape(s[0], s[1], s[2]), 900, 20, 5 + i);
            struct sqz_squeeze_options o = options_of(levels);
            o.tail = i % 2 == 0;
            o.center = i % 2 == 0;
            o.metric = i % 2 ? SQZ_METRIC_COSINE : SQZ_METRIC_EUCLIDEAN;
            o.index = i < 2 ? SQZ_INDEX_F16 : SQZ_INDEX_INT8;
            o.keys = i < 3 ? SQZ_INDEX_F16 : SQZ_INDEX_INT8;
            float *queries = make_queries(&m, 8, 9, 0.5);
            struct sqz_layer *layer = create(&m, queries, 8, &o, 2);
            describe("levels %u, heads %u/%u, dim %u, metric %d", levels, s[0], s[1], s[2], (int)o.metric);
            struct sqz_layer_info info;
            sqz_layer_get_info(layer, &info);
            check_close("levels", 0, info.n_levels, levels, 0);
            check_close("fixed rows", 0, (double)info.n_fixed_rows, 36, 0);
            for (uint32_t l = 0; l < levels; l++)
                check_close("clusters", l, info.n_clusters[l], (double)lround((double)o.centroid_share[l] * (900 - 36)),
                            0);
            check_structure(layer, &m, &o);
            sqz_layer_free(layer);
            free(queries);
            free_material(&m);
        }
}

/* The same seed gives the same layer whatever the number of threads; another seed another order. */
static void determinism(void **unused)
{
    (void)unused;
    struct material m = make_material(make_shape(6, 3, 32), 1000, 20, 3);
    struct sqz_squeeze_options o = options_of(2);
    o.code_words = 2;
    float *queries = make_queries(&m, 20, 4, 0.5);
    struct sqz_layer *one = create(&m, queries, 20, &o, 1);
    for (int threads = 1; threads <= 5; threads += 2) {
        struct sqz_layer *other = create(&m, queries, 20, &o, threads);
        assert_memory_equal(other->position, one->position, 3 * 1000 * sizeof(int32_t));
        for (uint32_t l = 0; l < 2; l++) {
            const size_t c = one->level[l].n_clusters;
            assert_memory_equal(other->level[l].offset, one->level[l].offset, 3 * (c + 1) * sizeof(uint32_t));
            assert_memory_equal(other->level[l].centroids.data, one->level[l].centroids.data,
                                3 * c * 32 * sizeof(uint16_t));
            assert_memory_equal(other->level[l].variance, one->level[l].variance, 3 * c * sizeof(float));
        }
        assert_memory_equal(other->share, one->share, 3 * one->n_curve * sizeof(float));
        assert_memory_equal(other->lost_mass, one->lost_mass, 3 * one->n_curve * sizeof(float));
        assert_memory_equal(other->tail_gain, one->tail_gain, 3 * one->n_curve * sizeof(float));
        assert_memory_equal(other->global_share, one->global_share, one->n_curve * sizeof(float));
        assert_memory_equal(other->variance_gain, one->variance_gain, 3 * sizeof(float));
        const struct sqz_codes *codes = &one->codes;
        const size_t directions = codes->n_directions, words = codes->n_words;
        assert_true(words == 2 && directions == 32);
        assert_memory_equal(other->codes.words, codes->words, 3 * words * (1000 - one->n_fixed) * sizeof(uint32_t));
        assert_memory_equal(other->codes.directions, codes->directions, 3 * directions * 32 * sizeof(uint16_t));
        assert_memory_equal(other->codes.book, codes->book, 3 * SQZ_CODE_ENTRIES * directions * sizeof(uint16_t));
        assert_memory_equal(other->codes.first, codes->first, 3 * (SQZ_CODE_PARTS * words + 1) * sizeof(uint32_t));
        assert_memory_equal(other->codes.spread, codes->spread, 3 * directions * sizeof(float));
        sqz_layer_free(other);
    }
    o.seed = 99;
    struct sqz_layer *other = create(&m, queries, 20, &o, 2);
    assert_memory_not_equal(other->position, one->position, 3 * 1000 * sizeof(int32_t));
    sqz_layer_free(other);
    sqz_layer_free(one);
    free(queries);
    free_material(&m);
}

/* ---- Errors -------------------------------------------------------------------------- */

static void expect_error(enum sqz_status status, const char *found, const char *allowed)
{
    if (status != SQZ_ERROR_ARGUMENT || error.status != status || !strstr(error.message, found) ||
        !strstr(error.message, allowed))
        fail_msg("status %d, message \"%s\": wanted %d and a message with \"%s\" and \"%s\"", (int)status,
                 error.message, (int)SQZ_ERROR_ARGUMENT, found, allowed);
}

static void argument_errors(void **unused)
{
    (void)unused;
    struct material m = make_material(make_shape(4, 2, 32), 300, 8, 3);
    float *queries = make_queries(&m, 10, 4, 0.5);
    const struct sqz_squeeze_options good = options_of(2);
    struct sqz_squeeze_options o;
    struct sqz_layer_shape s;
    struct sqz_layer *layer = (struct sqz_layer *)&m;
#define CREATE(shape, rows, q, nq, opt, threads)                                                                       \
    sqz_layer_create(&layer, shape, m.keys, m.values, rows, q, nq, opt, threads, &error)
#define BAD_SHAPE(field, value, found, allowed)                                                                        \
    (s = m.shape, s.field = value, expect_error(CREATE(&s, 300, queries, 10, &good, 1), found, allowed),               \
     assert_null(layer))
#define BAD_OPTION(field, value, found, allowed)                                                                       \
    (o = good, o.field = value, expect_error(CREATE(&m.shape, 300, queries, 10, &o, 1), found, allowed),               \
     assert_null(layer))
    BAD_SHAPE(n_head, 0, "0 query heads", "1 to 1024");
    BAD_SHAPE(n_head, 1026, "1026 query heads", "1 to 1024");
    BAD_SHAPE(n_head, 5, "5 query heads and 2 key-value heads", "multiple");
    BAD_SHAPE(n_head_kv, 0, "0 key-value heads", "multiple");
    BAD_SHAPE(head_dim, 16, "head dimension 16", "32 to 256");
    BAD_SHAPE(head_dim, 272, "head dimension 272", "32 to 256");
    BAD_SHAPE(head_dim, 40, "head dimension 40", "steps of 16");
    BAD_SHAPE(scale, 0, "scale 0", "above 0");
    BAD_SHAPE(scale, NAN, "nan", "above 0");
    BAD_SHAPE(scale, INFINITY, "inf", "finite");
    BAD_OPTION(size, 3, "3 bytes", "have");
    BAD_OPTION(rule, (enum sqz_rule)7, "rule 7", "0 (default) and 1 (paper)");
    BAD_OPTION(n_levels, SQZ_MAX_LEVELS + 1, "9 levels", "0 to 8");
    BAD_OPTION(metric, (enum sqz_metric)2, "metric 2", "0 and 1");
    BAD_OPTION(group, (enum sqz_group)5, "reduction 5", "0 and 1");
    BAD_OPTION(centroid_share[0], 0, "share 0 of level 1", "at most 0.5");
    BAD_OPTION(centroid_share[0], NAN, "nan", "at most 0.5");
    BAD_OPTION(centroid_share[0], 0.6f, "share 0.6", "at most 0.5");
    BAD_OPTION(centroid_share[1], 0.1f, "share 0.1 of level 2", "less than the level below");
    BAD_OPTION(n_iterations, 0, "0 iterations", "1 to 1000");
    BAD_OPTION(n_iterations, 1001, "1001 iterations", "1 to 1000");
    BAD_OPTION(n_calibration, 0, "0 calibration", "1 to 1024");
    BAD_OPTION(n_calibration, 1025, "1025 calibration", "1 to 1024");
    BAD_OPTION(code_words, SQZ_CODE_MAX_WORDS + 1, "5 words of code", "0 to 4");
    BAD_OPTION(code_words, UINT32_MAX, "4294967295 words of code", "0 to 4");
    expect_error(CREATE(&m.shape, 0, queries, 0, &good, 1), "0 rows", "1 to 2147483647");
    expect_error(CREATE(&m.shape, (size_t)INT32_MAX + 1, queries, 10, &good, 1), "2147483648 rows", "1 to 2147483647");
    expect_error(CREATE(&m.shape, SIZE_MAX, queries, 10, &good, 1), "rows", "1 to 2147483647");
    expect_error(CREATE(&m.shape, 9, queries, 10, &good, 1), "10 queries", "9 rows");
    expect_error(CREATE(&m.shape, 300, queries, 0, &good, 1), "no calibration queries", "at least one");
    expect_error(CREATE(&m.shape, 300, NULL, 10, &good, 1), "no calibration queries", "at least one");
    expect_error(CREATE(&m.shape, 300, queries, 10, &good, 0), "0 threads", "at least 1");
    expect_error(CREATE(&m.shape, 300, queries, 10, &good, -3), "-3 threads", "at least 1");
    /* Without an error struct the status still comes. */
    assert_int_equal(sqz_layer_create(&layer, &m.shape, m.keys, m.values, 0, queries, 0, &good, 1, NULL),
                     SQZ_ERROR_ARGUMENT);

    layer = create(&m, queries, 10, &good, 1);
    assert_int_equal(error.status, SQZ_OK);
    assert_string_equal(error.message, "");
    float out[4 * 32];
#define ATTEND(budget, tokens, threads)                                                                                \
    sqz_layer_attend(layer, queries, tokens, budget, out, NULL, threads, NULL, &error)
    expect_error(ATTEND(0, 1, 1), "budget 0", "more than 0 and at most 1");
    expect_error(ATTEND(-0.5f, 1, 1), "budget -0.5", "more than 0 and at most 1");
    expect_error(ATTEND(1.5f, 1, 1), "budget 1.5", "more than 0 and at most 1");
    expect_error(ATTEND(NAN, 1, 1), "nan", "more than 0 and at most 1");
    expect_error(ATTEND(0.5f, 1, 0), "0 threads", "at least 1");
    layer->space = SQZ_SPACE_CUDA;
    expect_error(ATTEND(0.5f, 1, 1), "memory space 1", "0, the host's");
    assert_int_equal(sqz_layer_cluster_rows(layer, 0, 0, 0), 0);
    layer->space = SQZ_SPACE_HOST;
    const struct sqz_layer kept = *layer;
    layer->keys.type = SQZ_ROW_BF16;
    expect_error(ATTEND(0.5f, 1, 1), "keys of type BF16", "F16, I8");
    layer->keys = kept.keys;
    layer->values.type = SQZ_ROW_I8;
    expect_error(ATTEND(0.5f, 1, 1), "values of type I8", "are F16");
    layer->values = kept.values;
    layer->level[0].centroids.type = SQZ_ROW_NONE;
    expect_error(ATTEND(0.5f, 1, 1), "centroids of type none", "F16, I8");
    *layer = kept;
    assert_int_equal(ATTEND(0.5f, 0, 1), SQZ_OK);
    assert_int_equal(ATTEND(0.5f, 1, 1), SQZ_OK);
    assert_string_equal(error.message, "");
    sqz_layer_free(layer);
    sqz_layer_free(NULL);
    free(queries);
    free_material(&m);
}

/* ---- Layers that are not clustered, degenerate keys ---------------------------------------- */

static struct reference reference;
static struct reference_result wanted;

static void check_dense(const struct sqz_layer *layer, const struct material *m, const float *queries, size_t n_tokens,
                        float budget)
{
    const size_t d = m->shape.head_dim, h = m->shape.n_head;
    float *out = take(n_tokens * h * d, sizeof *out), *lse = take(n_tokens * h, sizeof *lse);
    assert_int_equal(sqz_layer_attend(layer, queries, n_tokens, budget, out, lse, 2, NULL, &error), SQZ_OK);
    for (size_t i = 0; i < n_tokens * h; i++) {
        reference_reset(&reference);
        const size_t first = i % h / (h / m->shape.n_head_kv) * m->n_rows;
        for (size_t row = 0; row < m->n_rows; row++)
            reference_add(&reference, queries + i * d, m->keys + (first + row) * d, m->values + (first + row) * d, d,
                          (double)m->shape.scale);
        reference_finish(&reference, d, &wanted);
        check_close("lse", i, lse[i], wanted.lse, wanted.tolerance);
        for (size_t j = 0; j < d; j++)
            check_close("dense layer", i * d + j, out[i * d + j], wanted.out[j], wanted.out_tolerance[j]);
    }
    free(out);
    free(lse);
}

static void dense_layers(void **unused)
{
    (void)unused;
    static const size_t rows[] = {1, 5, 36, 99, 100, 400};
    for (size_t i = 0; i < COUNT(rows); i++) {
        struct material m = make_material(make_shape(4, 2, 32), rows[i], 3, i);
        float *queries = make_queries(&m, 70, 4, 0.5);
        const size_t n_queries = rows[i] < 10 ? rows[i] : 10;
        for (uint32_t levels = 0; levels <= 1; levels++) {
            /* 36 fixed rows and 64 to cluster are the fewest that are worth an index. */
            const struct sqz_squeeze_options o = options_of(levels);
            struct sqz_layer *layer = create(&m, levels ? queries : NULL, levels ? n_queries : 0, &o, 2);
            describe("rows %zu, levels %u", rows[i], levels);
            const bool clustered = levels && rows[i] >= 100;
            check_close("levels", 0, layer->n_levels, clustered, 0);
            check_structure(layer, &m, &o);
            /* Also those that stay dense keep their queries: other options may cluster them. */
            check_close("queries", 0, layer->n_queries, levels ? (double)n_queries : 0, 0);
            check_dense(layer, &m, queries, 1, clustered ? 1.0f : 0.1f);
            check_dense(layer, &m, queries, 70, clustered ? 1.0f : 0.1f);
            const float *threshold, *share, *lost;
            check_close("curve", 0, (double)sqz_layer_curve(layer, 0, &threshold, &share, &lost),
                        clustered ? SQZ_CURVE_POINTS : 0, 0);
            sqz_layer_free(layer);
        }
        free(queries);
        free_material(&m);
    }
}

/* One key many times: whatever is pruned, the tail is exact in mass, and without spread nothing can be NaN. */
static void duplicate_keys(void **unused)
{
    (void)unused;
    for (int zero = 0; zero < 2; zero++)
        for (uint32_t levels = 1; levels <= 3; levels++) {
            struct material m = make_material(make_shape(4, 2, 32), 600, 1, 8);
            for (size_t i = 0; i < 2 * 600 * 32; i++) m.keys[i] = zero ? 0 : m.keys[i / (600 * 32) * 600 * 32 + i % 32];
            float *queries = make_queries(&m, 12, 4, 0.5);
            struct sqz_squeeze_options o = options_of(levels);
            o.metric = levels == 2 ? SQZ_METRIC_COSINE : SQZ_METRIC_EUCLIDEAN;
            struct sqz_layer *layer = create(&m, queries, 12, &o, 2);
            describe("duplicates, zero %d, levels %u", zero, levels);
            check_structure(layer, &m, &o);
            for (size_t t = 0; t < 81 * 2; t++) {
                check_true("share", t, layer->share[t], 0, layer->share[t] >= 0 && layer->share[t] <= 3);
                check_true("lost mass", t, layer->lost_mass[t], 0,
                           layer->lost_mass[t] >= 0 && layer->lost_mass[t] <= 1.001f);
                /* F16 centroids: logits differ from the keys' by their rounding. */
                check_close("tail gain", t, layer->tail_gain[t], 0, 0.05);
            }
            float out[12 * 4 * 32], lse[12 * 4];
            check_dense(layer, &m, queries, 3, 1);
            for (size_t i = 0; i < 3; i++) {
                static const float budgets[] = {0.1f, 0.3f, 0.9f};
                for (size_t tokens = 1; tokens <= 12; tokens += 11) {
                    assert_int_equal(sqz_layer_attend(layer, queries, tokens, budgets[i], out, lse, 2, NULL, &error),
                                     SQZ_OK);
                    for (size_t j = 0; j < tokens * 4 * 32; j++)
                        check_true("out", j, out[j], 0, fabs((double)out[j]) < 6);
                    for (size_t j = 0; j < tokens * 4; j++) check_true("lse", j, lse[j], 0, isfinite(lse[j]));
                }
            }
            sqz_layer_free(layer);
            free(queries);
            free_material(&m);
        }
}

/* ---- Calibration ----------------------------------------------------------------------------- */

struct curve {
    double share[SQZ_CURVE_POINTS], lost[SQZ_CURVE_POINTS], true_mass[SQZ_CURVE_POINTS], estimated[SQZ_CURVE_POINTS];
};

/* Key scores of a token by codes, from the logits of centroids: estimates become weights under their own total. */
static void weigh_estimates(const struct sqz_layer *layer, uint32_t head_kv, const float *query, const double *logit,
                            double base, double *weight, double *log_total, double *deviation)
{
    const struct sqz_codes *codes = &layer->codes;
    const size_t d = layer->shape.head_dim, m = codes->n_directions, parts = SQZ_CODE_PARTS * codes->n_words;
    const size_t c = layer->level[0].n_clusters, n = layer->n_rows - layer->n_fixed;
    const uint32_t *offset = layer->level[0].offset + head_kv * (c + 1), *first = codes->first + head_kv * (parts + 1);
    double along[MAX_HEAD_DIM], variance = 0, largest = base, total;
    for (size_t i = 0; i < m; i++) {
        along[i] = exact_logit(query, codes->directions + (head_kv * m + i) * d, d, (double)layer->shape.scale, NULL);
        variance += along[i] * along[i] * (double)codes->spread[head_kv * m + i];
    }
    *deviation = sqrt(variance);
    for (size_t i = 0; i < c; i++)
        for (size_t row = offset[i]; row < offset[i + 1]; row++) {
            weight[row] = logit[i];
            for (size_t p = 0; p < parts; p++) {
                const uint32_t word = codes->words[(head_kv * codes->n_words + p / 8) * n + row] >> 4 * (p % 8) & 15;
                for (size_t x = first[p]; x < first[p + 1]; x++)
                    weight[row] += along[x] * half_value(codes->book[(head_kv * SQZ_CODE_ENTRIES + word) * m + x]);
            }
            largest = fmax(largest, weight[row]);
        }
    total = layer->rule == SQZ_RULE_PAPER ? 0 : exp(base - largest);
    for (size_t row = 0; row < n; row++) total += exp(weight[row] - largest);
    *log_total = largest + log(total);
    for (size_t row = 0; row < n; row++) weight[row] = exp(weight[row] - *log_total);
}

/* Query t of a head, and its squared norm. */
static double query_of(float *q, const struct sqz_layer *layer, size_t t, size_t head)
{
    const size_t d = layer->shape.head_dim;
    double norm = 0;
    for (size_t i = 0; i < d; i++) {
        q[i] = (float)half_value(layer->queries[(t * layer->shape.n_head + head) * d + i]);
        norm += (double)q[i] * q[i];
    }
    return norm;
}

/* Query t's logits with the keys before it, minus infinity with those behind, and their log-sum, in log_all. Returns that
 * of the keys that are always read. */
static double seen_logits(double *x, double *log_all, const struct sqz_layer *layer, uint32_t head_kv, size_t t,
                          const float *q)
{
    const size_t d = layer->shape.head_dim, n = layer->n_rows;
    double base = (double)-INFINITY;
    reference_reset(&reference);
    for (size_t i = 0; i < n; i++) {
        const uint16_t *key = sqz_rows_f16(&layer->keys) + (head_kv * n + i) * d;
        x[i] = exact_logit(q, key, d, (double)layer->shape.scale, NULL);
        if ((size_t)layer->position[head_kv * n + i] > n - layer->n_queries + t) x[i] = (double)-INFINITY;
        else reference_add_logit(&reference, x[i], NULL);
        if (i + 1 == layer->n_fixed) base = reference_lse(&reference);
    }
    *log_all = reference_lse(&reference);
    return base;
}

/* As reference_curve() for a layer with codes. Clusters are opened, and their keys retained, by scores that lie up to
 * `border` from their thresholds. The library tells the point of a key from its score by a logarithm within 0.03. */
static void reference_key_curve(const struct sqz_layer *layer, uint32_t head_kv, double border, struct curve *curve)
{
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv, n = layer->n_rows;
    const size_t c = layer->level[0].n_clusters, n_keys = n - layer->n_fixed;
    const double scale = (double)layer->shape.scale, row_bytes = 2 * (double)d;
    const uint32_t *offset = layer->level[0].offset + head_kv * (c + 1);
    double *logit = take(group * c, sizeof *logit), *score = take(c, sizeof *score), *reach = take(c, sizeof *reach);
    double *closed = take(c, sizeof *closed), *weight = take(group * n_keys, sizeof *weight), *x = take(n, sizeof *x);
    double *mass = take(n_keys, sizeof *mass), *guess = take(n_keys, sizeof *guess);
    double *key_score = take(n_keys, sizeof *key_score);
    memset(curve, 0, sizeof *curve);
    for (size_t t = 0; t < layer->n_queries; t++) {
        memset(score, 0, c * sizeof *score);
        memset(closed, 0, c * sizeof *closed);
        memset(mass, 0, n_keys * sizeof *mass);
        memset(guess, 0, n_keys * sizeof *guess);
        memset(key_score, 0, n_keys * sizeof *key_score);
        for (size_t i = 0; i < c; i++) reach[i] = (double)-INFINITY;
        for (size_t g = 0; g < group; g++) {
            float q[MAX_HEAD_DIM];
            double norm, base, log_true, total, cluster_total, key_total, deviation;
            norm = query_of(q, layer, t, head_kv * group + g);
            base = seen_logits(x, &log_true, layer, head_kv, t, q);
            total = layer->rule == SQZ_RULE_PAPER ? 0 : exp(base);
            for (size_t i = 0; i < c; i++) {
                const double v = scale * scale * norm * layer->level[0].variance[head_kv * c + i] / (2 * (double)d);
                logit[g * c + i] =
                    exact_logit(q, sqz_rows_f16(&layer->level[0].centroids) + (head_kv * c + i) * d, d, scale, NULL);
                total += (offset[i + 1] - offset[i]) * exp(logit[g * c + i] + layer->variance_gain[head_kv] * v);
                closed[i] += (offset[i + 1] - offset[i]) * exp(logit[g * c + i] + v - log_true);
            }
            cluster_total = log(total);
            double *w = weight + g * n_keys;
            weigh_estimates(layer, head_kv, q, logit + g * c, base, w, &key_total, &deviation);
            for (size_t i = 0; i < c; i++) {
                const double s = (double)layer->level[0].variance[head_kv * c + i];
                const double v = scale * scale * norm * s / (2 * (double)d);
                const double share = exp(logit[g * c + i] + layer->variance_gain[head_kv] * v - cluster_total);
                score[i] = layer->group == SQZ_GROUP_MAX ? fmax(score[i], share) : score[i] + share / (double)group;
                reach[i] = fmax(reach[i],
                                logit[g * c + i] + (double)SQZ_OPEN_DEVIATIONS * deviation * sqrt(s) - cluster_total);
            }
            for (size_t i = 0; i < n_keys; i++) {
                key_score[i] =
                    layer->group == SQZ_GROUP_MAX ? fmax(key_score[i], w[i]) : key_score[i] + w[i] / (double)group;
                mass[i] += exp(x[layer->n_fixed + i] - log_true);
                guess[i] += w[i] * exp(key_total - log_true);
            }
        }
        for (size_t p = 0; p < SQZ_CURVE_POINTS; p++) {
            const double limit = (double)layer->log_threshold[p];
            double bytes = (double)c * (row_bytes + 8) + 2 * row_bytes * layer->n_fixed;
            bytes += (double)sqz_code_head_bytes(layer);
            for (size_t i = 0; i < c; i++) {
                const bool open = reach[i] >= limit + border || log(score[i]) >= limit + border;
                size_t left = 0;
                for (size_t row = offset[i]; row < offset[i + 1]; row++) {
                    bytes += open ? 4.0 * layer->codes.n_words : 0;
                    if (open && log(key_score[row]) >= limit + border) {
                        bytes += 2 * row_bytes;
                        continue;
                    }
                    left++;
                    curve->lost[p] += mass[row] / (double)(group * layer->n_queries);
                    curve->true_mass[p] += mass[row];
                    curve->estimated[p] += open ? guess[row] : 0;
                }
                curve->estimated[p] += open ? 0 : closed[i];
                if (layer->tail && left) bytes += row_bytes;
            }
            curve->share[p] += bytes / (2 * row_bytes * (double)n) / layer->n_queries;
        }
    }
    free(logit);
    free(score);
    free(reach);
    free(closed);
    free(weight);
    free(x);
    free(mass);
    free(guess);
    free(key_score);
}

/* The curve of a head of a layer with one level and without value_skip, by its definition; thresholds multiplied by
 * 1 + border. */
static void reference_curve(const struct sqz_layer *layer, uint32_t head_kv, double border, struct curve *curve)
{
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv, n = layer->n_rows;
    const size_t c = layer->level[0].n_clusters;
    const double scale = (double)layer->shape.scale, row_bytes = 2 * (double)d;
    const uint32_t *offset = layer->level[0].offset + head_kv * (c + 1);
    double *score = take(c, sizeof *score), *mass = take(c, sizeof *mass), *estimate = take(c, sizeof *estimate);
    double *x = take(n, sizeof *x), *y = take(c, sizeof *y);
    float q[MAX_HEAD_DIM];
    memset(curve, 0, sizeof *curve);
    for (size_t t = 0; t < layer->n_queries; t++) {
        memset(score, 0, c * sizeof *score);
        memset(mass, 0, c * sizeof *mass);
        memset(estimate, 0, c * sizeof *estimate);
        for (size_t g = 0; g < group; g++) {
            double norm, log_true, base, total;
            norm = query_of(q, layer, t, head_kv * group + g);
            base = seen_logits(x, &log_true, layer, head_kv, t, q);
            total = layer->rule == SQZ_RULE_PAPER ? 0 : exp(base);
            for (size_t i = 0; i < c; i++) {
                const double v = scale * scale * norm * layer->level[0].variance[head_kv * c + i] / (2 * (double)d);
                const double logit =
                    exact_logit(q, sqz_rows_f16(&layer->level[0].centroids) + (head_kv * c + i) * d, d, scale, NULL);
                y[i] = logit + layer->variance_gain[head_kv] * v;
                total += (offset[i + 1] - offset[i]) * exp(y[i]);
                estimate[i] += (offset[i + 1] - offset[i]) * exp(logit + v - log_true);
                for (uint32_t row = offset[i]; row < offset[i + 1]; row++)
                    mass[i] += exp(x[layer->n_fixed + row] - log_true);
            }
            for (size_t i = 0; i < c; i++) {
                const double s = exp(y[i]) / total;
                if (layer->group == SQZ_GROUP_MAX) score[i] = fmax(score[i], s);
                else score[i] += s / (double)group;
            }
        }
        for (size_t p = 0; p < SQZ_CURVE_POINTS; p++) {
            const double limit = exp((double)layer->log_threshold[p]) * (1 + border);
            double bytes = (double)c * (row_bytes + 8) + 2 * row_bytes * layer->n_fixed;
            for (size_t i = 0; i < c; i++) {
                if (score[i] >= limit) {
                    bytes += 2 * row_bytes * (offset[i + 1] - offset[i]);
                    continue;
                }
                if (layer->tail) bytes += row_bytes;
                curve->lost[p] += mass[i] / (double)(group * layer->n_queries);
                curve->true_mass[p] += mass[i];
                curve->estimated[p] += estimate[i];
            }
            curve->share[p] += bytes / (2 * row_bytes * (double)n) / layer->n_queries;
        }
    }
    free(score);
    free(mass);
    free(estimate);
    free(x);
    free(y);
}

static void check_monotone(const struct sqz_layer *layer)
{
    const size_t n = layer->n_curve;
    for (size_t h = 0; h < layer->shape.n_head_kv; h++) {
        const float *share = layer->share + h * n, *lost = layer->lost_mass + h * n;
        for (size_t t = 0; t < n; t++) {
            check_true("share is a share", t, share[t], 0, share[t] > 0 && share[t] < 1.3f);
            check_true("lost mass is a share", t, lost[t], 0, lost[t] >= 0 && lost[t] <= 1.0001f);
            check_true("tail gain is bounded", t, layer->tail_gain[h * n + t], 0,
                       layer->tail_gain[h * n + t] >= -10 && layer->tail_gain[h * n + t] <= 4);
            if (!t) continue;
            check_true("share decreases", t, share[t], share[t - 1], share[t] <= share[t - 1]);
            check_true("lost mass increases", t, lost[t], lost[t - 1], lost[t] >= lost[t - 1]);
        }
        /* At e^-20 next to everything is retained; at e^0 nothing but a row that has all the mass. */
        check_true("share at the lowest threshold", h, share[0], 1, share[0] > 0.9f || layer->value_skip);
        check_close("lost mass at the lowest threshold", h, lost[0], 0, 1e-4);
        check_true("share at the highest threshold", h, share[n - 1], 0.3, share[n - 1] < 0.3f);
    }
    for (size_t t = 0; t < n; t++) {
        check_close("threshold", t, layer->log_threshold[t],
                    (double)SQZ_CURVE_FIRST + (double)SQZ_CURVE_STEP * (double)t, 0);
        if (!layer->global_share) continue;
        double mean = 0;
        for (size_t h = 0; h < layer->shape.n_head_kv; h++) mean += layer->share[h * n + t] / layer->shape.n_head_kv;
        check_close("global share", t, layer->global_share[t], mean, 1e-6);
    }
}

static void calibration_curve(void **unused)
{
    (void)unused;
    for (size_t run = 0; run < 13; run++) {
        /* Cases 0 to 5 without codes and again with 1 to 3 words; the last with clusters of hundreds of keys. */
        static const uint32_t shapes[][3] = {{4, 2, 32}, {3, 1, 64}, {8, 2, 48}};
        const size_t i = run % 6;
        const uint32_t *s = shapes[i % 3];
        struct material m = make_material(make_shape(s[0], s[1], s[2]), run == 12 ? 1500 : 500, 16, 10 + i);
        struct sqz_squeeze_options o = options_of(1);
        o.code_words = run < 6 ? 0 : 1 + (uint32_t)i % 3;
        if (run == 12) o.centroid_share[0] = 0.002f;
        o.rule = i == 4 ? SQZ_RULE_PAPER : SQZ_RULE_DEFAULT;
        o.group = i == 3 ? SQZ_GROUP_MAX : SQZ_GROUP_MEAN;
        o.tail = i != 2;
        o.per_head = i % 2;
        o.value_skip = false;
        o.variance = i != 1;
        float *queries = make_queries(&m, 37, 4, 0.5);
        const size_t n_queries = i == 5 ? 37 : 13; /* 37: some come before rows that are clustered */
        struct sqz_layer *layer = create(&m, queries, n_queries, &o, 2);
        describe("calibration %zu", run);
        assert_int_equal(layer->global_share == NULL, o.per_head);
        check_monotone(layer);
        static struct curve low, high;
        for (uint32_t h = 0; h < s[1]; h++) {
            double cuts = 0;
            check_true("variance gain", h, layer->variance_gain[h], 0,
                       layer->variance_gain[h] >= 0 && layer->variance_gain[h] <= 1.5f &&
                           (o.variance || layer->variance_gain[h] == 0));
            if (run < 6) {
                reference_curve(layer, h, -BORDER, &low);
                reference_curve(layer, h, BORDER, &high);
            } else {
                reference_key_curve(layer, h, -0.031, &low);
                reference_key_curve(layer, h, 0.031, &high);
            }
            double least = 100; /* shares are made not to increase, which value centroids of opened clusters may do */
            for (size_t t = 0; t < SQZ_CURVE_POINTS; t++) {
                least = fmin(least, high.share[t]);
                const size_t at = h * SQZ_CURVE_POINTS + t;
                check_true("lost mass", at, layer->lost_mass[at], low.lost[t],
                           layer->lost_mass[at] >= low.lost[t] - 1e-5 && layer->lost_mass[at] <= high.lost[t] + 1e-5);
                check_true("share", at, layer->share[at], low.share[t],
                           layer->share[at] <= low.share[t] + 1e-5 && layer->share[at] >= least - 1e-5);
                if (low.lost[t] == high.lost[t] && low.estimated[t] == high.estimated[t] && low.true_mass[t] > 0)
                    check_close("tail gain", at, layer->tail_gain[at],
                                fmin(fmax(log(low.true_mass[t] / low.estimated[t]), -10), 4), 1e-4);
                cuts += low.lost[t] > 0.01 && low.lost[t] < 0.99;
            }
            check_true("points between all and nothing", h, cuts, 3, cuts >= 3);
        }
        sqz_layer_free(layer);
        free(queries);
        free_material(&m);
    }
    for (uint32_t levels = 2; levels <= 3; levels++) {
        struct material m = make_material(make_shape(4, 2, 32), 900, 16, 10);
        struct sqz_squeeze_options o = options_of(levels);
        o.value_skip = levels == 3;
        float *queries = make_queries(&m, 20, 4, 0.5);
        struct sqz_layer *layer = create(&m, queries, 20, &o, 2);
        describe("calibration, levels %u", levels);
        check_monotone(layer);
        sqz_layer_free(layer);
        free(queries);
        free_material(&m);
    }
}

/* Rows that lookups of the kept queries retain at a point of the curve, a query's on average: each knows the fixed rows
 * before it exactly. Scores within rounding of the threshold may fall on either side: *slack rows. */
static double looked_up(const struct sqz_layer *layer, uint32_t head, size_t point, double *slack, void *workspace)
{
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv;
    const uint16_t *keys = sqz_rows_f16(&layer->keys) + (size_t)head * layer->n_rows * d;
    const float at = layer->log_threshold[point];
    size_t rows[3] = {0}; /* at the point, just above, just below */
    float query[SQZ_MAX_GROUP_QUERIES * MAX_HEAD_DIM], norm[SQZ_MAX_GROUP_QUERIES], base[SQZ_MAX_GROUP_QUERIES];
    for (uint32_t t = 0; t < layer->n_queries; t++) {
        const int32_t position = (int32_t)(layer->n_rows - layer->n_queries + t);
        for (size_t g = 0; g < group; g++) {
            const uint16_t *q = layer->queries + ((size_t)t * layer->shape.n_head + head * group + g) * d;
            double known = 0, square = 0;
            for (size_t i = 0; i < d; i++) query[g * d + i] = (float)half_value(q[i]);
            for (size_t i = 0; i < d; i++) square += (double)query[g * d + i] * (double)query[g * d + i];
            for (size_t i = 0; i < layer->n_fixed; i++)
                if (layer->position[head * layer->n_rows + i] <= position)
                    known += exp(exact_logit(query + g * d, keys + i * d, d, (double)layer->shape.scale, NULL));
            norm[g] = (float)square;
            base[g] = layer->rule == SQZ_RULE_PAPER ? -INFINITY : (float)log(known);
        }
        for (int i = 0; i < 3; i++) {
            const float threshold = at + (i == 1 ? 1e-4f : i == 2 ? -1e-4f : 0.0f);
            const struct sqz_head_plan plan = {threshold, 0, layer->variance_gain[head]};
            struct sqz_selection s;
            sqz_lookup(&s, layer, head, &plan, query, norm, group, base, 0, workspace);
            rows[i] += s.n_retained;
        }
    }
    *slack = (double)(rows[2] - rows[1]) / layer->n_queries;
    return (double)rows[0] / layer->n_queries;
}

/* Calibration counts as retained what a lookup retains: a share is the bytes of the centroids, of the fixed rows, and of
 * the keys and values of exactly those rows. */
static void counted_as_looked_up(void **unused)
{
    (void)unused;
    for (size_t run = 0; run < 4; run++) {
        struct material m = make_material(make_shape(4, 2, 32), 600, 16, 20 + run);
        struct sqz_squeeze_options o = options_of(1);
        o.code_words = 0;
        o.tail = o.value_skip = false;
        o.rule = run == 1 ? SQZ_RULE_PAPER : SQZ_RULE_DEFAULT;
        o.group = run == 2 ? SQZ_GROUP_MAX : SQZ_GROUP_MEAN;
        o.variance = run != 3;
        float *queries = make_queries(&m, 11, 4, 0.5);
        struct sqz_layer *layer = create(&m, queries, 11, &o, 2);
        void *workspace = take(1, sqz_lookup_workspace_bytes(layer, SQZ_MAX_GROUP_QUERIES));
        const double row = 4.0 * layer->shape.head_dim; /* key and value */
        size_t between = 0;
        describe("counts against lookups %zu", run);
        for (uint32_t h = 0; h < layer->shape.n_head_kv; h++)
            for (size_t t = 0; t < SQZ_CURVE_POINTS; t += 4) {
                double slack, rows = looked_up(layer, h, t, &slack, workspace);
                const double once = (double)layer->level[0].n_clusters * (double)sqz_centroid_bytes(layer);
                check_close("share", h * SQZ_CURVE_POINTS + t, layer->share[h * SQZ_CURVE_POINTS + t],
                            (once + row * (layer->n_fixed + rows)) / (row * layer->n_rows),
                            1e-6 + slack / layer->n_rows);
                between += rows > 0 && rows < layer->n_rows - layer->n_fixed;
            }
        check_true("points between all and nothing", run, (double)between, 8, between >= 8);
        free(workspace);
        sqz_layer_free(layer);
        free(queries);
        free_material(&m);
    }
}

/* A head's calibration in a workspace of exactly the promised size gives what the layer holds. */
static void calibration_workspace(void **unused)
{
    (void)unused;
    static const uint32_t groups[] = {1, 3, 71};
    for (size_t i = 0; i < COUNT(groups); i++)
        for (uint32_t levels = 1; levels <= 3; levels += 2) {
            struct material m = make_material(make_shape(groups[i] * 2, 2, 32), 501, 16, 10 + i);
            const struct sqz_squeeze_options o = options_of(levels);
            float *queries = make_queries(&m, 11, 4, 0.5);
            struct sqz_layer *layer = create(&m, queries, 11, &o, 2);
            float share[SQZ_CURVE_POINTS], lost[SQZ_CURVE_POINTS], gain[SQZ_CURVE_POINTS], variance;
            const struct sqz_head_curve out = {share, lost, gain, &variance};
            struct guarded workspace = workspace_take(sqz_calibrate_workspace_bytes(layer));
            sqz_calibrate_head(layer, 1, true, &out, workspace.data);
            assert_memory_equal(share, layer->share + SQZ_CURVE_POINTS, sizeof share);
            assert_memory_equal(lost, layer->lost_mass + SQZ_CURVE_POINTS, sizeof lost);
            assert_memory_equal(gain, layer->tail_gain + SQZ_CURVE_POINTS, sizeof gain);
            assert_memory_equal(&variance, layer->variance_gain + 1, sizeof variance);
            guarded_free(workspace);
            sqz_layer_free(layer);
            free(queries);
            free_material(&m);
        }
}

static double share_of(const struct sqz_attention_stats *s)
{
    return (double)(s->centroid_bytes + s->key_bytes + s->value_bytes) / (double)s->context_bytes;
}

/* Share that calibration queries read, one token a call. */
static double measured_share(const struct sqz_layer *layer, const float *queries, size_t n_queries, float budget)
{
    const size_t values = (size_t)layer->shape.n_head * layer->shape.head_dim;
    struct sqz_attention_stats stats = {0};
    float *out = take(values, sizeof *out);
    for (size_t t = 0; t < n_queries; t++)
        assert_int_equal(sqz_layer_attend(layer, queries + t * values, 1, budget, out, NULL, 1, &stats, &error),
                         SQZ_OK);
    free(out);
    return share_of(&stats);
}

/* What calibration is for: at a budget, its queries read about that share. The queries are long enough for scores to
 * spread over many thresholds, as a model's do. Right at a point of the curve nothing is interpolated, and what is left
 * is that calibration lets a query see no row after its own. */
static void budget_is_kept(void **unused)
{
    (void)unused;
    static const float budgets[] = {0.12f, 0.2f, 0.4f};
    for (size_t run = 0; run < 10; run++) { /* with codes, then without */
        const size_t i = run % 5;
        struct material m = make_material(make_shape(6, 2, 64), 2000, 60, 30 + i);
        struct sqz_squeeze_options o = options_of(i == 4 ? 2 : 1);
        o.code_words = run < 5;
        o.per_head = i % 2;
        o.value_skip = i != 1;
        o.tail = i != 2;
        if (i == 3) o.group = SQZ_GROUP_MAX;
        float *queries = make_queries(&m, 32, 4, 1.0);
        struct sqz_layer *layer = create(&m, queries, 32, &o, 2);
        for (size_t b = 0; b < COUNT(budgets); b++) {
            describe("budget %g, codes %u, per head %d, skip %d, tail %d, levels %u", (double)budgets[b], o.code_words,
                     (int)o.per_head, (int)o.value_skip, (int)o.tail, o.n_levels);
            check_close("share read", b, measured_share(layer, queries, 32, budgets[b]), budgets[b], 0.1 * budgets[b]);
        }
        for (size_t t = 0; layer->global_share && t < SQZ_CURVE_POINTS; t += 5) {
            const float share = layer->global_share[t];
            if (!(share > 0.08f && share < 0.9f)) continue; /* below, little more than the index is read */
            describe("point %zu, codes %u, skip %d, tail %d, levels %u", t, o.code_words, (int)o.value_skip,
                     (int)o.tail, o.n_levels);
            check_close("share read at a point", t, measured_share(layer, queries, 32, share), share, 0.05 * share);
        }
        sqz_layer_free(layer);
        free(queries);
        free_material(&m);
    }
}

/* Relative error of attention at a budget of a tenth against keeping as many keys at random. */
static void better_than_random(void **unused)
{
    (void)unused;
    enum { TOKENS = 16, N = 2000, D = 64, H = 4 };
    for (uint64_t seed = 1; seed <= 2; seed++) {
        struct material m = make_material(make_shape(H, 2, D), N, 60, seed);
        struct sqz_squeeze_options o = options_of(1);
        float *calibration = make_queries(&m, 32, 4, 0.5), *queries = make_queries(&m, TOKENS, 77, 0.5);
        struct sqz_layer *layer = create(&m, calibration, 32, &o, 2);
        struct sqz_random random;
        sqz_random_seed(&random, seed);
        double squeezed = 0, dropped = 0, norm = 0;
        for (size_t t = 0; t < TOKENS; t++) {
            float out[H * D];
            assert_int_equal(sqz_layer_attend(layer, queries + t * H * D, 1, 0.1f, out, NULL, 1, NULL, &error), SQZ_OK);
            for (size_t h = 0; h < H; h++) {
                static struct reference_result exact, sample;
                const float *q = queries + (t * H + h) * D;
                for (int pass = 0; pass < 2; pass++) {
                    reference_reset(&reference);
                    for (size_t i = h / 2 * N; i < (h / 2 + 1) * N; i++)
                        if (!pass || sqz_random_unit(&random) < 0.1)
                            reference_add(&reference, q, m.keys + i * D, m.values + i * D, D, (double)m.shape.scale);
                    reference_finish(&reference, D, pass ? &sample : &exact);
                }
                for (size_t i = 0; i < D; i++) {
                    squeezed += pow(out[h * D + i] - exact.out[i], 2);
                    dropped += pow(sample.out[i] - exact.out[i], 2);
                    norm += exact.out[i] * exact.out[i];
                }
            }
        }
        describe("seed %llu", (unsigned long long)seed);
        check_true("squared error against that of random keys", 0, squeezed / norm, dropped / norm,
                   squeezed < 0.05 * dropped);
        sqz_layer_free(layer);
        free(calibration);
        free(queries);
        free_material(&m);
    }
}

/* ---- Many layers ------------------------------------------------------------------------------- */

static bool count_progress(void *user_data, size_t done, size_t total)
{
    size_t *counts = user_data;
    assert_true(done >= 1 && done <= total);
    assert_int_equal(total, 3);
    counts[0]++;
    return counts[0] < counts[1];
}

static void many_layers(void **unused)
{
    (void)unused;
    struct material m[3] = {make_material(make_shape(4, 2, 32), 700, 16, 1),
                            make_material(make_shape(2, 1, 48), 400, 16, 2),
                            make_material(make_shape(4, 2, 32), 50, 4, 3)};
    struct sqz_layer_input inputs[3];
    struct sqz_layer layers[3];
    uint16_t *queries[3];
    const struct sqz_squeeze_options o = options_of(1);
    for (size_t i = 0; i < 3; i++) {
        const size_t n = 9 * m[i].shape.n_head * m[i].shape.head_dim;
        float *q = make_queries(&m[i], 9, 6, 0.5);
        queries[i] = take(n, sizeof *queries[i]);
        to_half(queries[i], q, n);
        free(q);
        inputs[i] = (struct sqz_layer_input){m[i].shape, m[i].keys, m[i].values, m[i].n_rows, queries[i],
                                             9,          0,         0,           false,       false};
    }
    inputs[2].window_tokens = 50; /* a sliding-window layer: the last 50 of 700 positions */
    inputs[2].first_position = 650;
    size_t counts[2] = {0, SIZE_MAX};
    assert_int_equal(sqz_layers_plan(layers, inputs, 3, &o, &error), SQZ_OK);
    assert_int_equal(sqz_layers_cluster(layers, inputs, 3, &o, 1, count_progress, counts, &error), SQZ_OK);
    assert_int_equal(counts[0], 3);
    assert_int_equal(sqz_layers_calibrate(layers, 3, &o, 2, NULL, NULL, &error), SQZ_OK);
    describe("many layers");
    assert_true(layers[2].sliding_window && layers[2].n_levels == 0 && layers[2].n_fixed == 50);
    for (int32_t i = 0; i < 100; i++) assert_int_equal(layers[2].position[i], 650 + i % 50);
    for (size_t t = 0; t < SQZ_CURVE_POINTS; t++) {
        const double mean = (700.0 * ((double)layers[0].share[t] + layers[0].share[SQZ_CURVE_POINTS + t]) +
                             400.0 * layers[1].share[t]) /
                            1800;
        check_close("global share, rows weigh", t, layers[0].global_share[t], mean, 1e-6);
        check_close("global share of the other layer", t, layers[1].global_share[t], layers[0].global_share[t], 0);
    }
    for (size_t i = 0; i < 3; i++) sqz_layer_release(&layers[i]);
    assert_null(layers[0].owned);

    counts[0] = 0;
    counts[1] = 2; /* cancelled at the second head */
    assert_int_equal(sqz_layers_plan(layers, inputs, 3, &o, &error), SQZ_OK);
    assert_int_equal(sqz_layers_cluster(layers, inputs, 3, &o, 1, count_progress, counts, &error), SQZ_ERROR_CANCELLED);
    assert_int_equal(counts[0], 2);
    for (size_t i = 0; i < 3; i++) sqz_layer_release(&layers[i]);

    /* An error leaves layers that may be released. */
    inputs[1].n_rows = 0;
    expect_error(sqz_layers_plan(layers, inputs, 3, &o, &error), "0 rows", "1 to 2147483647");
    for (size_t i = 0; i < 3; i++) sqz_layer_release(&layers[i]);
    for (size_t i = 0; i < 3; i++) {
        free(queries[i]);
        free_material(&m[i]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(structure),
        cmocka_unit_test(determinism),
        cmocka_unit_test(argument_errors),
        cmocka_unit_test(dense_layers),
        cmocka_unit_test(duplicate_keys),
        cmocka_unit_test(calibration_curve),
        cmocka_unit_test(counted_as_looked_up),
        cmocka_unit_test(calibration_workspace),
        cmocka_unit_test(budget_is_kept),
        cmocka_unit_test(better_than_random),
        cmocka_unit_test(many_layers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
