/*
 * Layers without a file: made ones of every allowed shape with strange numbers,
 * and ones that sqz_layer_create() clusters and calibrates, attended to. What
 * the library makes of numbers, the checks of the context file must take.
 */
#include "fuzz.h"
#include "format.h"
#include "made_layer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static enum sqz_status check(const struct sqz_layer *layer, size_t n_tokens, struct sqz_error *error)
{
    const struct sqz_report report = {NULL, SQZ_ERROR_FORMAT, "", error};
    const struct sqz_row_tokens tokens = {n_tokens, n_tokens};
    const enum sqz_status status = sqz_check_layer_counts(layer, 0, tokens, &report);
    return status ? status : sqz_check_layer_contents(layer, 0, tokens, &report);
}

static void attend_to_made(struct choices *c)
{
    struct made_layer made;
    struct sqz_error error;
    const struct made_form form = choose_form(c, 300);
    make_layer(&made, &form, c);
    if (check(&made.layer, form.n_tokens, &error)) fuzz_fail("a made layer passes the checks", error.message);
    fuzz_attend(&made.layer, form.n_tokens, c);
    free_made_layer(&made);
}

static struct sqz_squeeze_options choose_options(struct choices *c)
{
    static const float shares[] = {0.4f, 0.05f, 0.5f, 1e-6f, 0.25f, 0.01f};
    static const uint32_t counts[] = {0, 1, 3, 0xffffffffu, 0x80000000u, 16, 200};
    struct sqz_squeeze_options options;
    const uint8_t how = choose_byte(c), kind = choose_byte(c);
    sqz_squeeze_options_default(&options, (enum sqz_rule)(how & 1));
    options.n_levels = kind % 4;
    options.centroid_share[0] = shares[choose_byte(c) % 6];
    for (uint32_t i = 1; i < options.n_levels; i++)
        options.centroid_share[i] = options.centroid_share[i - 1] / (float)(2 + choose_byte(c) % 3);
    options.metric = (enum sqz_metric)(kind >> 2 & 1);
    options.group = (enum sqz_group)(kind >> 3 & 1);
    options.index = (enum sqz_index)(kind >> 4 & 1);
    options.keys = (enum sqz_index)(kind >> 5 & 1);
    options.center = kind & 64;
    options.variance = kind & 128;
    options.per_head = how & 2;
    options.tail = how & 4;
    options.value_skip = how & 8;
    options.code_words = how >> 4 & 3;
    options.n_sinks = counts[choose_byte(c) % (how & 64 ? 7 : 3)];
    options.n_window = counts[choose_byte(c) % (how & 64 ? 7 : 3)];
    options.n_iterations = 1 + how % 3;
    options.n_calibration = 1 + choose_byte(c) % 4;
    return options;
}

/* Now and then a number from the ends of the range, or none at all; returns whether all are below 2. */
static bool choose_rows(uint16_t *rows, size_t n, struct choices *c)
{
    static const uint16_t strange[] = {0x7e00, 0x7c00, 0xfc00, 0x7bff, 0xfbff, 1, 0, 0x3c00};
    const uint8_t how = choose_byte(c);
    for (size_t i = 0; i < n; i++) {
        rows[i] = how % 8 == 1 ? strange[how >> 5] : (uint16_t)(random_u32(c) & 0xb7ff);
        if (how & 8 && random_below(c, how & 16 ? 3 : 200) == 0) rows[i] = strange[random_below(c, 8)];
    }
    return how % 8 != 1 && !(how & 8);
}

static bool choose_queries(float *queries, size_t n, struct choices *c)
{
    static const float sizes[] = {1.0f, 1.0f, 0.0f, 1e30f, 3e38f, 1e-45f};
    const uint8_t how = choose_byte(c);
    for (size_t i = 0; i < n; i++) {
        queries[i] = sizes[how % 6] * ((float)random_below(c, 2001) / 1000.0f - 1.0f);
        if (how & 64 && random_below(c, 30) == 0) queries[i] = how & 128 ? NAN : INFINITY;
    }
    return how % 6 < 3 && !(how & 64);
}

static void attend_to_created(struct choices *c)
{
    static const uint32_t dims[] = {32, 48, 64, 32}; /* the time that codes take grows with its third power */
    const uint8_t how = choose_byte(c);
    const uint32_t n_head_kv = 1 + (how & 1), n_head = n_head_kv * (1 + (how >> 1 & 3) % 3);
    const uint32_t head_dim = dims[how & 64 ? 0 : how >> 3 & 3];
    const struct sqz_layer_shape shape = {n_head, n_head_kv, head_dim, how & 32 ? 3e38f : 0.125f};
    const size_t n_rows = (how & 64 ? 64 : 1) + (size_t)choose_byte(c) % 60, d = shape.head_dim;
    const struct sqz_squeeze_options options = choose_options(c);
    const size_t n_queries = choose_byte(c) % 5 < n_rows ? (size_t)1 + c->state % 2 : 1;
    const size_t n = n_head_kv * n_rows * d, n_query_values = n_queries * n_head * d;
    uint16_t *keys = malloc(n * sizeof *keys), *values = malloc(n * sizeof *values);
    float *queries = malloc(n_query_values * sizeof *queries);
    struct sqz_layer *layer = NULL;
    struct sqz_error error = {SQZ_OK, ""};
    const uint8_t fault = choose_byte(c);
    if (!keys || !values || !queries) fuzz_fail("a target has memory", "keys and values");
    const bool calm_keys = choose_rows(keys, n, c), calm_values = choose_rows(values, n, c);
    const bool calm = choose_queries(queries, n_query_values, c) && calm_keys && calm_values && shape.scale < 1;
    faults_begin(how & 128 ? fault : 0, 0, fault & 1);
    const enum sqz_status status =
        sqz_layer_create(&layer, &shape, keys, values, n_rows, queries, n_queries, &options, 1, &error);
    faults_end();
    if (!status != !!layer || (status && !error.message[0]))
        fuzz_fail("creating gives a layer or a message", error.message);
    /* What comes of infinite keys may not be a number; then it is refused with a message, and not attended to. */
    const bool storable = layer && !check(layer, n_rows, &error);
    if (layer && calm && !storable) fuzz_fail("what the library makes of numbers can be stored", error.message);
    if (storable) fuzz_attend(layer, n_rows, c);
    sqz_layer_free(layer);
    free(keys);
    free(values);
    free(queries);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    struct choices choices = choices_of(bytes, n);
    if (choose_byte(&choices) % 16) attend_to_made(&choices);
    else attend_to_created(&choices);
    return 0;
}
