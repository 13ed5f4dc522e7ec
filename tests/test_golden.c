/*
 * Context files that earlier versions of squeeze wrote, and damaged ones, as
 * tests/golden/ keeps them: each is opened, holds what its table says, is
 * attended to on every layer and converted as `prepare --from` does; each
 * damaged one is refused with its status and reason. A later version of the
 * format may refuse to open a file only when it converts it.
 */
#define _DEFAULT_SOURCE /* PATH_MAX */
#include "context_file.h"

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static const char *golden_path(const char *name)
{
    static char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/tests/golden/%s", getenv("SQUEEZE_SOURCE"), name);
    return path;
}

/* Lines of a table: comments begin with #. */
static bool next_line(FILE *table, char line[512])
{
    while (fgets(line, 512, table)) {
        line[strcspn(line, "\n")] = '\0';
        if (line[0] && line[0] != '#') return true;
    }
    return false;
}

static FILE *open_table(const char *name)
{
    FILE *table = fopen(golden_path(name), "r");
    if (!table) fail_msg("%s cannot be read", golden_path(name));
    return table;
}

static struct sqz_context *open_context(const char *path)
{
    struct sqz_context *context = NULL;
    struct sqz_error error;
    if (sqz_context_open(&context, path, NULL, &error)) fail_msg("%s: %s", path, error.message);
    return context;
}

/* ---- Attention -------------------------------------------------------------------- */

enum { N_QUERY_TOKENS = 3 };

/* The same queries on every machine: multiples of 1/8. out: [N_QUERY_TOKENS][H][D], the caller frees. */
static float *attend(const struct sqz_layer *layer, float budget, const char *name)
{
    struct sqz_layer_info info;
    struct sqz_error error;
    sqz_layer_get_info(layer, &info);
    const size_t n = N_QUERY_TOKENS * (size_t)info.shape.n_head * info.shape.head_dim;
    float *queries = calloc(n, sizeof *queries), *out = calloc(n, sizeof *out);
    assert_non_null(queries);
    assert_non_null(out);
    for (size_t i = 0; i < n; i++) queries[i] = (float)((int)(i * 37 % 29) - 14) / 8.0f;
    if (sqz_layer_attend(layer, queries, N_QUERY_TOKENS, budget, out, NULL, 1, NULL, &error))
        fail_msg("%s: %s", name, error.message);
    for (size_t i = 0; i < n; i++)
        if (!isfinite(out[i])) fail_msg("%s: output %zu at budget %g is %g", name, i, (double)budget, (double)out[i]);
    free(queries);
    return out;
}

/* One number of a layer's output at budget 1: a mean with weights 1 to 7, so that order counts. Outputs are below 2 and
 * wrong by some 1e-5; the table has six digits. */
static double dense_sum(const struct sqz_layer *layer, const char *name)
{
    struct sqz_layer_info info;
    double sum = 0;
    sqz_layer_get_info(layer, &info);
    const size_t n = N_QUERY_TOKENS * (size_t)info.shape.n_head * info.shape.head_dim;
    float *out = attend(layer, 1.0f, name);
    for (size_t i = 0; i < n; i++) sum += (double)(1 + i % 7) * (double)out[i];
    free(out);
    return sum / (double)n;
}

/* Squared error of a third of the bytes against all, relative to the square of all. */
static double relative_error(const struct sqz_layer *layer, const char *name)
{
    struct sqz_layer_info info;
    double error = 0, size = 0;
    sqz_layer_get_info(layer, &info);
    const size_t n = N_QUERY_TOKENS * (size_t)info.shape.n_head * info.shape.head_dim;
    float *dense = attend(layer, 1.0f, name), *out = attend(layer, 0.33f, name);
    for (size_t i = 0; i < n; i++) {
        error += ((double)out[i] - (double)dense[i]) * ((double)out[i] - (double)dense[i]);
        size += (double)dense[i] * (double)dense[i];
    }
    free(dense);
    free(out);
    return error / size;
}

/* ---- Whole files --------------------------------------------------------------------- */

struct row {
    char name[32];
    unsigned n_tokens, rule, n_levels, index, keys, code_words, n_windows, clusters, rows;
    double error, sum[2];
};

static bool read_row(FILE *table, struct row *row)
{
    char line[512];
    if (!next_line(table, line)) return false;
    row->rows = SQZ_ROWS_F16;
    if (sscanf(line, "%31s %u %u %u %u %u %u %u %u %lf %lf %lf %u", row->name, &row->n_tokens, &row->rule,
               &row->n_levels, &row->index, &row->keys, &row->code_words, &row->n_windows, &row->clusters, &row->error,
               &row->sum[0], &row->sum[1], &row->rows) < 12)
        fail_msg("the table has a line that cannot be read: %s", line);
    return true;
}

static void check_number(const struct row *row, const char *what, double got, double wanted, double tolerance)
{
    if (!(fabs(got - wanted) <= tolerance)) fail_msg("%s: %s is %.9g; wanted %.9g", row->name, what, got, wanted);
}

static void check_holds(const struct row *row, const struct sqz_context *context)
{
    struct sqz_context_info info;
    struct sqz_layer_info layer;
    sqz_context_get_info(context, &info);
    sqz_layer_get_info(sqz_context_layer(context, 1), &layer);
    check_number(row, "tokens", (double)info.n_tokens, row->n_tokens, 0);
    check_number(row, "layers", info.n_layer, 2, 0);
    check_number(row, "rule", info.squeeze.rule, row->rule, 0);
    check_number(row, "levels", layer.n_levels, row->n_levels, 0);
    check_number(row, "index", info.squeeze.index, row->index, 0);
    check_number(row, "keys", info.squeeze.keys, row->keys, 0);
    check_number(row, "rows", info.squeeze.rows, row->rows, 0);
    check_number(row, "code words", sqz_context_layer(context, 1)->codes.n_words, row->code_words, 0);
    check_number(row, "windows", info.n_window_layers, row->n_windows, 0);
    check_number(row, "clusters", layer.n_clusters[0], row->clusters, 0);
    check_number(row, "token 3", info.tokens[3], 93, 0);
    assert_string_equal(info.model_name, "Golden");
    assert_string_equal(info.source_name, "golden.txt");
    assert_true(info.has_template);
}

/* off: how far sums of dense attention may be from the table's. */
static void check_attended(const struct row *row, const struct sqz_context *context, double off)
{
    for (uint32_t i = 0; i < 2; i++) {
        const struct sqz_layer *layer = sqz_context_layer(context, i);
        check_number(row, i ? "output of layer 1" : "output of layer 0", dense_sum(layer, row->name), row->sum[i], off);
        check_number(row, "error at a budget of a third", relative_error(layer, row->name), 0, row->error);
    }
}

static enum sqz_status squeeze(const struct sqz_context *context, const char *path, bool dense, struct sqz_error *error)
{
    struct sqz_context_info info;
    struct sqz_prepare_options options;
    sqz_context_get_info(context, &info);
    sqz_prepare_options_default(&options);
    options.squeeze = info.squeeze;
    if (dense) options.squeeze.n_levels = 0;
    return sqz_context_squeeze(context, path, &options, 1, NULL, error);
}

/* Squeezed again with its own options, or without clusters where it kept no queries to choose them by: the same rows
 * come out, perhaps in another order. Those in planes are rounded a second time, relative to other centroids. */
static void check_converts(const struct row *row, const struct sqz_context *context)
{
    char path[PATH_MAX];
    struct sqz_context_info info;
    struct sqz_error error;
    snprintf(path, sizeof path, "%s/%s.gguf", getenv("SQUEEZE_TEST_FOLDER"), row->name);
    const enum sqz_status status = squeeze(context, path, false, &error);
    if (status && (status != SQZ_ERROR_ARGUMENT || squeeze(context, path, true, &error)))
        fail_msg("%s: cannot be converted: %s", row->name, error.message);
    struct sqz_context *again = open_context(path);
    sqz_context_get_info(again, &info);
    check_number(row, "tokens after converting", (double)info.n_tokens, row->n_tokens, 0);
    check_number(row, "windows after converting", info.n_window_layers, row->n_windows, 0);
    check_attended(row, again, row->rows == SQZ_ROWS_INT4 ? 0.05 : row->rows == SQZ_ROWS_INT4_4 ? 0.003 : 1e-4);
    sqz_context_free(again);
    unlink(path);
}

static void test_files(void **state)
{
    struct row row;
    FILE *table = open_table("files.txt");
    size_t n = 0;
    (void)state;
    for (; read_row(table, &row); n++) {
        char name[64];
        snprintf(name, sizeof name, "%s.gguf", row.name);
        struct sqz_context *context = open_context(golden_path(name));
        check_holds(&row, context);
        check_attended(&row, context, 1e-4);
        check_converts(&row, context);
        sqz_context_free(context);
    }
    fclose(table);
    assert_true(n >= 11);
}

/* ---- Damaged files ----------------------------------------------------------------------- */

static void test_damaged(void **state)
{
    char line[512], name[64], status[64], path[128];
    FILE *table = open_table("damaged.txt");
    size_t n = 0;
    int at = 0;
    (void)state;
    for (; next_line(table, line); n++) {
        struct sqz_context *context = NULL;
        struct sqz_error error = {SQZ_OK, ""};
        if (sscanf(line, "%63s %63s %n", name, status, &at) != 2)
            fail_msg("the table has a line that cannot be read: %s", line);
        snprintf(path, sizeof path, "damaged/%s.gguf", name);
        const enum sqz_status got = sqz_context_open(&context, golden_path(path), NULL, &error);
        if (strcmp(sqz_status_name(got), status) || !strstr(error.message, line + at) || context)
            fail_msg("%s: %s, \"%s\"; wanted %s with \"%s\"", name, sqz_status_name(got), error.message, status,
                     line + at);
    }
    fclose(table);
    assert_true(n >= 20);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_damaged),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
