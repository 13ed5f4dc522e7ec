/*
 * lib/rows.c: rows of each type hold what was stored in them to half a step, and
 * every call sees the same numbers in them; bytes and addresses by hand.
 */
#include "layer_fixture.h"

#include "rows.h"

enum { HEADS = 3 };

/* Rows of HEADS heads in memory of their own, and what they should hold. */
struct made {
    struct sqz_rows rows;
    float *wanted; /* [HEADS][n][d] */
    size_t n, d;
};

static struct made make_rows(enum sqz_row_type type, size_t n, size_t d, double magnitude)
{
    struct made m = {{type, take(HEADS * n, sqz_row_data_bytes(type, d)), NULL, NULL},
                     random_floats(HEADS * n * d, n + d, magnitude),
                     n,
                     d};
    if (type == SQZ_ROW_I8) {
        m.rows.scale = take(HEADS * n, sizeof(float));
        m.rows.mean = random_floats(HEADS * d, 5, 2 * magnitude);
    }
    for (size_t h = 0; h < HEADS; h++) {
        const struct sqz_rows head = sqz_rows_of_head(&m.rows, n, d, h);
        for (size_t i = 0; i < n; i++) sqz_rows_store(&head, i, m.wanted + (h * n + i) * d, d);
    }
    return m;
}

static void free_rows(struct made *m)
{
    free((void *)(uintptr_t)m->rows.data);
    free((void *)(uintptr_t)m->rows.scale);
    free((void *)(uintptr_t)m->rows.mean);
    free(m->wanted);
}

/* Half a step of a row's type at number `at` of all: of F16 2^-11 of it, of INT8 half its scale, and rounding. */
static double half_step(const struct made *m, size_t at)
{
    const double x = fabs((double)m->wanted[at]);
    return m->rows.type == SQZ_ROW_I8 ? 0.5001 * (double)m->rows.scale[at / m->d] + 1e-6 * x : x * 0x1p-11 + 0x1p-24;
}

static const enum sqz_row_type types[] = {SQZ_ROW_F16, SQZ_ROW_I8};
static const size_t dims[] = {32, 48, 80, 256}, counts[] = {1, 3, 31, 127, 129};

static void bytes_and_addresses(void **unused)
{
    (void)unused;
    assert_int_equal(sqz_row_bytes(SQZ_ROW_NONE, 64), 0);
    assert_int_equal(sqz_row_bytes(SQZ_ROW_F16, 64), 128);
    assert_int_equal(sqz_row_bytes(SQZ_ROW_BF16, 64), 128);
    assert_int_equal(sqz_row_bytes(SQZ_ROW_I8, 64), 68);
    assert_int_equal(sqz_row_data_bytes(SQZ_ROW_I8, 64), 64);
    assert_string_equal(sqz_row_type_name(SQZ_ROW_I8), "I8");
    assert_string_equal(sqz_row_type_name((enum sqz_row_type)9), "unknown");
    char numbers[7 * 5 * 96];
    float scale[7 * 5], mean[7 * 48];
    const struct sqz_rows small = {SQZ_ROW_I8, numbers, scale, mean}, halves = {SQZ_ROW_F16, numbers, NULL, NULL};
    assert_ptr_equal(sqz_row_at(&small, 5, 48, 3, 2), numbers + (3 * 5 + 2) * 48);
    assert_ptr_equal(sqz_row_at(&halves, 5, 48, 3, 2), numbers + (3 * 5 + 2) * 96);
    const struct sqz_rows head = sqz_rows_of_head(&small, 5, 48, 3), part = sqz_rows_from(&head, 48, 2);
    assert_ptr_equal(head.data, numbers + 3 * 5 * 48);
    assert_ptr_equal(head.scale, scale + 3 * 5);
    assert_ptr_equal(head.mean, mean + 3 * 48);
    assert_ptr_equal(part.data, numbers + (3 * 5 + 2) * 48);
    assert_ptr_equal(part.scale, scale + 3 * 5 + 2);
    assert_ptr_equal(part.mean, head.mean);
    const struct sqz_rows none = {SQZ_ROW_NONE, NULL, NULL, NULL}, none_of_head = sqz_rows_of_head(&none, 5, 48, 3);
    assert_true(none_of_head.type == SQZ_ROW_NONE && !none_of_head.data);
    assert_true(sqz_f16_rows(NULL).type == SQZ_ROW_NONE);
}

/* Each way to read rows gives the numbers that were stored. */
static void check_reads(const struct made *m, size_t h)
{
    const size_t n = m->n, d = m->d, ld = (n + SQZ_GEMM_N - 1) / SQZ_GEMM_N * SQZ_GEMM_N, first = n / 3,
                 left = n - first;
    const struct sqz_rows head = sqz_rows_of_head(&m->rows, n, d, h);
    float *row = take(n * d, sizeof *row), *across = take(d * ld, sizeof *across);
    uint16_t *halves = take(n * d, sizeof *halves);
    const struct sqz_row_buffer buffer = {take(n, sqz_row_data_bytes(head.type, d)), take(n, sizeof(float))};
    sqz_rows_to_f32(row, &head, first, left, d);
    sqz_rows_to_f16(halves, &head, first, left, d);
    memset(across, 0xff, d * ld * sizeof *across);
    sqz_rows_transpose(across, ld, &head, first, left, d);
    for (size_t i = 0; i < left; i++)
        for (size_t j = 0; j < d; j++) {
            const size_t at = (h * n + first + i) * d + j;
            const double rounding = fabs((double)m->wanted[at]) * 0x1p-11 + half_step(m, at) * 0x1p-11 + 0x1p-24;
            check_close("as F32", at, row[i * d + j], m->wanted[at], half_step(m, at));
            check_close("across", at, across[j * ld + i], row[i * d + j], fabs((double)row[i * d + j]) * 2 * UNIT);
            check_close("as F16", at, half_value(halves[i * d + j]), m->wanted[at], half_step(m, at) + rounding);
        }
    for (size_t j = 0; j < d; j++)
        for (size_t i = left; i < ld; i++) check_close("padding", j * ld + i, across[j * ld + i], 0, 0);
    /* The rows from the last to the first, then read as a whole. */
    struct sqz_rows gathered = head;
    for (size_t i = 0; i < n; i++) gathered = sqz_rows_gather(&buffer, i, &head, n - 1 - i, 1, d);
    sqz_rows_to_f32(row, &gathered, 0, n, d);
    for (size_t i = 0; i < n * d; i++) {
        const size_t at = (h * n + n - 1 - i / d) * d + i % d;
        check_close("gathered", at, row[i], m->wanted[at], half_step(m, at));
    }
    free(row);
    free(across);
    free(halves);
    free(buffer.data);
    free(buffer.scale);
}

static void stored_and_read(void **unused)
{
    (void)unused;
    for (size_t t = 0; t < COUNT(types); t++)
        for (size_t d = 0; d < COUNT(dims); d++)
            for (size_t n = 0; n < COUNT(counts); n++) {
                struct made m = make_rows(types[t], counts[n], dims[d], 3);
                describe("%s, dim %zu, rows %zu", sqz_row_type_name(types[t]), dims[d], counts[n]);
                for (size_t h = 0; h < HEADS; h++) check_reads(&m, h);
                free_rows(&m);
            }
}

/* Logits with rows and with rows of a list, against double precision over the numbers that the rows hold. Queries of INT8
 * rows are INT16: half a 32767th of the largest number, times the magnitudes of a row less the mean. */
static void check_logits(const struct made *m, size_t n_queries)
{
    const size_t n = m->n, d = m->d, h = 1, stride = n + 3;
    const struct sqz_rows head = sqz_rows_of_head(&m->rows, n, d, h);
    float *q = random_floats(n_queries * d, 4, 1), *out = take(n_queries * stride, sizeof *out);
    float *listed = take(n_queries * stride, sizeof *listed), *row = take(n * d, sizeof *row);
    float *factor = take(n_queries, sizeof *factor), *mean_logit = take(n_queries, sizeof *mean_logit);
    int16_t *quantised = take(n_queries * sqz_i16_stride(d), sizeof *quantised);
    float *scratch = take(sqz_logits_scratch_floats(d), sizeof *scratch);
    uint32_t *list = take(n, sizeof *list);
    for (size_t i = 0; i < n; i++) list[i] = (uint32_t)(n - 1 - i);
    const struct sqz_row_queries queries = {q, {quantised, factor, mean_logit}, n_queries, 0.3f};
    sqz_row_queries_set(&queries, &head, d);
    sqz_rows_logits(out, stride, &queries, &head, 0, n, d, scratch);
    for (size_t first = 0; first < n_queries; first += SQZ_MAX_GROUP_QUERIES) {
        const size_t some = n_queries - first < SQZ_MAX_GROUP_QUERIES ? n_queries - first : SQZ_MAX_GROUP_QUERIES;
        const struct sqz_row_queries part = sqz_row_queries_part(&queries, first, some, d);
        sqz_rows_listed_logits(listed + first * stride, stride, &part, &head, list, n, n, d);
    }
    sqz_rows_to_f32(row, &head, 0, n, d);
    for (size_t r = 0; r < n_queries; r++)
        for (size_t i = 0; i < n; i++) {
            double x = 0, magnitude = 0, away = 0, largest = 0;
            for (size_t j = 0; j < d; j++) {
                x += (double)q[r * d + j] * (double)row[i * d + j];
                magnitude += fabs((double)q[r * d + j] * (double)row[i * d + j]);
                largest = fmax(largest, fabs((double)q[r * d + j]));
                if (head.mean) {
                    magnitude += fabs((double)q[r * d + j] * (double)head.mean[j]);
                    away += fabs((double)row[i * d + j] - (double)head.mean[j]);
                }
            }
            const double allowed = 0.3 * (4 * (double)(d + 2) * UNIT * magnitude + 0.51 * largest / 32767 * away);
            check_close("logit", r * n + i, out[r * stride + i], (double)0.3f * x, allowed + 1e-30);
            check_close("listed", r * n + i, listed[r * stride + n - 1 - i], (double)0.3f * x, allowed + 1e-30);
        }
    free(q), free(out), free(listed), free(row), free(factor), free(mean_logit), free(quantised), free(scratch);
    free(list);
}

static void logits(void **unused)
{
    (void)unused;
    for (size_t t = 0; t < COUNT(types); t++)
        for (size_t d = 0; d < COUNT(dims); d++)
            for (size_t n = 0; n < COUNT(counts); n++) {
                struct made m = make_rows(types[t], counts[n], dims[d], 1);
                describe("%s, dim %zu, rows %zu", sqz_row_type_name(types[t]), dims[d], counts[n]);
                check_logits(&m, 1);
                check_logits(&m, 16);
                check_logits(&m, 21);
                free_rows(&m);
            }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bytes_and_addresses),
        cmocka_unit_test(stored_and_read),
        cmocka_unit_test(logits),
    };
    return cmocka_run_group_tests_name("rows", tests, NULL, NULL);
}
