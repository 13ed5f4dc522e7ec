/*
 * lib/rows.c: rows of each type hold what was stored in them to half a step, and
 * every call sees the same numbers in them; bytes and addresses by hand.
 */
#include "layer_fixture.h"

#include "rows.h"

enum { HEADS = 3 };

/* How rows are made: their type, how many of them are not rounded, and the centroids that others are relative to. */
struct kind {
    enum sqz_row_type type;
    uint32_t n_whole, n_centres; /* of the centres as many as there are rows for them */
    enum sqz_row_type centres;
};

/* Rows of HEADS heads in memory of their own, and what they should hold. */
struct made {
    struct sqz_rows rows;
    float *wanted; /* [HEADS][n][d] */
    size_t n, d;
};

/* Clusters of 1, 2, 3, ... rows, the last with all that are left. Returns how many. */
static uint32_t make_offsets(uint32_t *offset, uint32_t most, size_t n_rows)
{
    uint32_t n = 0, at = 0;
    for (; n < most && at < n_rows; n++) {
        offset[n] = at;
        at += n + 1;
    }
    offset[n] = (uint32_t)n_rows;
    return n;
}

static struct sqz_centres make_centres(const struct kind *kind, size_t n_rows, size_t d, double magnitude)
{
    struct sqz_centres c = {.type = kind->centres};
    uint32_t offset[64];
    c.n = make_offsets(offset, kind->n_centres, n_rows);
    uint32_t *all = take(HEADS * (c.n + 1), sizeof *all);
    float *wanted = random_floats(HEADS * c.n * d, 77, magnitude);
    for (size_t h = 0; h < HEADS; h++) memcpy(all + h * (c.n + 1), offset, (c.n + 1) * sizeof *all);
    struct sqz_rows rows = {.type = c.type, .data = take(HEADS * c.n, sqz_row_data_bytes(c.type, d))};
    if (c.type == SQZ_ROW_I8) {
        rows.scale = take(HEADS * c.n, sizeof(float));
        rows.mean = random_floats(HEADS * d, 5, 2 * magnitude);
    }
    for (size_t h = 0; h < HEADS; h++) {
        const struct sqz_rows head = sqz_rows_of_head(&rows, c.n, d, h);
        for (size_t i = 0; i < c.n; i++) sqz_rows_store(&head, i, wanted + (h * c.n + i) * d, d);
    }
    free(wanted);
    c.data = rows.data, c.scale = rows.scale, c.mean = rows.mean, c.offset = all;
    return c;
}

static void make_planes(struct sqz_rows *rows, const struct kind *kind, size_t n, size_t d, double magnitude)
{
    const uint32_t n_whole = kind->n_whole < n ? kind->n_whole : (uint32_t)n;
    const size_t rounded = HEADS * (n - n_whole);
    rows->planes.n_whole = n_whole;
    rows->planes.step = take(rounded, sizeof(uint16_t));
    rows->planes.whole = take(HEADS * n_whole * d, sizeof(uint16_t));
    if (rows->type == SQZ_ROW_I44) rows->planes.lower = take(rounded, sqz_plane_bytes(d));
    if (kind->centres && n > n_whole) rows->planes.centres = make_centres(kind, n - n_whole, d, magnitude);
    else rows->mean = random_floats(HEADS * d, 6, 2 * magnitude);
}

static struct made make_rows(const struct kind *kind, size_t n, size_t d, double magnitude)
{
    const enum sqz_row_type type = kind->type;
    struct made m = {{.type = type, .data = take(HEADS * n, sqz_row_data_bytes(type, d))},
                     random_floats(HEADS * n * d, n + d, magnitude),
                     n,
                     d};
    if (type == SQZ_ROW_I8) {
        m.rows.scale = take(HEADS * n, sizeof(float));
        m.rows.mean = random_floats(HEADS * d, 5, 2 * magnitude);
    }
    if (sqz_row_is_planes(type)) make_planes(&m.rows, kind, n, d, magnitude);
    for (size_t h = 0; h < HEADS; h++) {
        const struct sqz_rows head = sqz_rows_of_head(&m.rows, n, d, h);
        for (size_t i = 0; i < n; i++) sqz_rows_store(&head, i, m.wanted + (h * n + i) * d, d);
    }
    return m;
}

static void free_rows(struct made *m)
{
    const struct sqz_planes *p = &m->rows.planes;
    const void *const arrays[] = {m->rows.data, m->rows.scale,   m->rows.mean,     p->lower,        p->step,
                                  p->whole,     p->centres.data, p->centres.scale, p->centres.mean, p->centres.offset};
    for (size_t i = 0; i < COUNT(arrays); i++) free((void *)(uintptr_t)arrays[i]);
    free(m->wanted);
}

/* Whether a row's numbers are rounded together, by a step of the turned row. */
static bool is_turned(const struct made *m, size_t row)
{
    return sqz_row_is_planes(m->rows.type) && row % m->n >= m->rows.planes.n_whole;
}

/* The step of a turned row of all heads. */
static double step_of(const struct made *m, size_t row)
{
    const size_t n_whole = m->rows.planes.n_whole, at = row / m->n * (m->n - n_whole) + row % m->n - n_whole;
    return half_value(m->rows.planes.step[at]) / (m->rows.type == SQZ_ROW_I44 ? 16 : 1);
}

/* Half a step of a row's type at number `at` of all: of F16 2^-11 of it, of INT8 half its scale, and rounding. Of turned
 * rows each number is a sum of up to 256 errors of half a step, times 1 over the square root of how many. */
static double half_step(const struct made *m, size_t at)
{
    const double x = fabs((double)m->wanted[at]);
    if (is_turned(m, at / m->d)) {
        const double length = (double)(m->d & (~m->d + 1));
        return 0.5 * step_of(m, at / m->d) * (sqrt(length) + 1e-3) + 1e-5;
    }
    return m->rows.type == SQZ_ROW_I8 ? 0.5001 * (double)m->rows.scale[at / m->d] + 1e-6 * x : x * 0x1p-11 + 0x1p-24;
}

static const struct kind kinds[] = {
    {.type = SQZ_ROW_F16},
    {.type = SQZ_ROW_I8},
    {.type = SQZ_ROW_I4},
    {.type = SQZ_ROW_I4, .n_whole = 5, .n_centres = 9, .centres = SQZ_ROW_I8},
    {.type = SQZ_ROW_I44, .n_whole = 20, .n_centres = 9, .centres = SQZ_ROW_F16},
    {.type = SQZ_ROW_I44, .n_whole = 3},
};

static const char *name_of(const struct kind *kind)
{
    static char name[80];
    snprintf(name, sizeof name, "%s, %u whole, centres %s", sqz_row_type_name(kind->type), (unsigned)kind->n_whole,
             sqz_row_type_name(kind->centres));
    return name;
}

static const size_t dims[] = {32, 48, 80, 256}, counts[] = {1, 3, 31, 127, 129};

static void bytes_and_addresses(void **unused)
{
    (void)unused;
    assert_int_equal(sqz_row_bytes(SQZ_ROW_NONE, 64), 0);
    assert_int_equal(sqz_row_bytes(SQZ_ROW_F16, 64), 128);
    assert_int_equal(sqz_row_bytes(SQZ_ROW_BF16, 64), 128);
    assert_int_equal(sqz_row_bytes(SQZ_ROW_I8, 64), 68);
    assert_int_equal(sqz_row_data_bytes(SQZ_ROW_I8, 64), 64);
    assert_int_equal(sqz_row_bytes(SQZ_ROW_I4, 64), 34);
    assert_int_equal(sqz_row_bytes(SQZ_ROW_I44, 64), 66);
    assert_int_equal(sqz_row_bytes(SQZ_ROW_I44, 80), 98); /* of 96 numbers */
    assert_string_equal(sqz_row_type_name(SQZ_ROW_I8), "I8");
    assert_string_equal(sqz_row_type_name(SQZ_ROW_I44), "I4+4");
    assert_string_equal(sqz_row_type_name((enum sqz_row_type)9), "unknown");
    char numbers[7 * 5 * 96];
    float scale[7 * 5], mean[7 * 48];
    const struct sqz_rows small = {.type = SQZ_ROW_I8, .data = numbers, .scale = scale, .mean = mean};
    const struct sqz_rows halves = {.type = SQZ_ROW_F16, .data = numbers};
    assert_ptr_equal(sqz_row_at(&small, 5, 48, 3, 2), numbers + (3 * 5 + 2) * 48);
    assert_ptr_equal(sqz_row_at(&halves, 5, 48, 3, 2), numbers + (3 * 5 + 2) * 96);
    const struct sqz_rows head = sqz_rows_of_head(&small, 5, 48, 3);
    assert_ptr_equal(head.data, numbers + 3 * 5 * 48);
    assert_ptr_equal(head.scale, scale + 3 * 5);
    assert_ptr_equal(head.mean, mean + 3 * 48);
    const struct sqz_rows none = {.type = SQZ_ROW_NONE}, none_of_head = sqz_rows_of_head(&none, 5, 48, 3);
    assert_true(none_of_head.type == SQZ_ROW_NONE && !none_of_head.data);
    assert_true(sqz_f16_rows(NULL).type == SQZ_ROW_NONE);
    uint16_t whole[7 * 2 * 48], step[7 * 3];
    uint8_t lower[7 * 3 * 32];
    const struct sqz_rows planes = {
        .type = SQZ_ROW_I44, .data = numbers, .planes = {.lower = lower, .step = step, .whole = whole, .n_whole = 2}};
    assert_ptr_equal(sqz_row_at(&planes, 5, 48, 3, 1), whole + (3 * 2 + 1) * 48);
    assert_ptr_equal(sqz_row_at(&planes, 5, 48, 3, 4), numbers + (3 * 3 + 2) * 32);
    const struct sqz_rows third = sqz_rows_of_head(&planes, 5, 48, 3), upper = sqz_rows_upper(&third);
    assert_ptr_equal(third.data, numbers + 3 * 3 * 32);
    assert_ptr_equal(third.planes.lower, lower + 3 * 3 * 32);
    assert_ptr_equal(third.planes.step, step + 3 * 3);
    assert_ptr_equal(third.planes.whole, whole + 3 * 2 * 48);
    assert_true(upper.type == SQZ_ROW_I4 && upper.data == third.data && !upper.planes.lower);
    assert_int_equal(sqz_rows_bytes(&planes, 1, 3, 48), 96 + 2 * 66);
    assert_int_equal(sqz_rows_bytes(&upper, 2, 3, 48), 3 * 34);
    assert_int_equal(sqz_rows_bytes(&small, 1, 3, 48), 3 * 52);
}

static struct {
    const char *begin;
    size_t bytes;
} announced[4];
static size_t n_announced;

static void note_announced(const void *begin, size_t bytes)
{
    assert_true(n_announced < COUNT(announced));
    announced[n_announced].begin = begin;
    announced[n_announced++].bytes = bytes;
}

/* All arrays of numbers that a range of rows lies in, and nothing else. */
static void announces(void **unused)
{
    (void)unused;
    char upper[5 * 32];
    uint16_t whole[2 * 48];
    uint8_t lower[5 * 32];
    const struct sqz_rows planes = {
        .type = SQZ_ROW_I44, .data = upper, .planes = {.lower = lower, .whole = whole, .n_whole = 2}};
    sqz_rows_announce(&planes, 1, 4, 48, note_announced);
    assert_int_equal(n_announced, 3);
    assert_ptr_equal(announced[0].begin, whole + 48);
    assert_int_equal(announced[0].bytes, 96);
    assert_ptr_equal(announced[1].begin, upper);
    assert_int_equal(announced[1].bytes, 3 * 32);
    assert_ptr_equal(announced[2].begin, lower);
    assert_int_equal(announced[2].bytes, 3 * 32);
    n_announced = 0;
    sqz_rows_announce(&planes, 4, 1, 48, note_announced);
    assert_int_equal(n_announced, 2);
    assert_ptr_equal(announced[1].begin, lower + 2 * 32);
}

/* Each way to read rows gives the numbers that were stored. */
static void check_reads(const struct made *m, size_t h)
{
    const size_t n = m->n, d = m->d, ld = (n + SQZ_GEMM_N - 1) / SQZ_GEMM_N * SQZ_GEMM_N, first = n / 3,
                 left = n - first;
    const struct sqz_rows head = sqz_rows_of_head(&m->rows, n, d, h);
    float *row = take(n * d, sizeof *row), *across = take(d * ld, sizeof *across);
    uint16_t *halves = take(n * d, sizeof *halves);
    const struct sqz_row_buffer buffer = {take(n, d * sizeof(uint16_t)), take(n, sizeof(float))};
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
        /* F16, where they were in planes. */
        check_close("gathered", at, row[i], m->wanted[at],
                    half_step(m, at) +
                        (is_turned(m, at / d) ? (fabs((double)m->wanted[at]) + half_step(m, at)) * 0x1p-11 : 0));
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
    for (size_t t = 0; t < COUNT(kinds); t++)
        for (size_t d = 0; d < COUNT(dims); d++)
            for (size_t n = 0; n < COUNT(counts); n++) {
                struct made m = make_rows(&kinds[t], counts[n], dims[d], 3);
                describe("%s, dim %zu, rows %zu", name_of(&kinds[t]), dims[d], counts[n]);
                for (size_t h = 0; h < HEADS; h++) check_reads(&m, h);
                free_rows(&m);
            }
}

/* What row i of a head holds beyond what it is relative to, and that, as far as it is known. */
static double base_of(const struct sqz_rows *head, size_t i, size_t j, size_t d)
{
    const struct sqz_centres *c = &head->planes.centres;
    const struct sqz_rows centres = {.type = c->type, .data = c->data, .scale = c->scale, .mean = c->mean};
    float row[MAX_HEAD_DIM];
    uint32_t cluster = 0;
    if (!c->type) return head->mean ? (double)head->mean[j] : 0;
    while (c->offset[cluster + 1] <= i - head->planes.n_whole) cluster++;
    sqz_rows_to_f32(row, &centres, cluster, 1, d);
    return (double)row[j];
}

/* Logits with rows and with rows of a list, against double precision over the numbers that the rows hold. Queries of INT8
 * rows are INT16: half a 32767th of the largest number, times the magnitudes of a row less the mean. Of rows in planes they
 * are turned, to numbers up to the root of D as large; and the centroids may be INT8 themselves. */
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
    float *turned_factor = take(n_queries, sizeof *factor), *half = take(n_queries, sizeof *half);
    int16_t *turned = take(n_queries * sqz_i16_stride(d), sizeof *turned);
    const struct sqz_row_queries queries = {.f32 = q,
                                            .i16 = {quantised, factor, mean_logit},
                                            .n = n_queries,
                                            .scale = 0.3f,
                                            .turned = {turned, turned_factor, half}};
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
                if (head.mean && !is_turned(m, i)) {
                    magnitude += fabs((double)q[r * d + j] * (double)head.mean[j]);
                    away += fabs((double)row[i * d + j] - (double)head.mean[j]);
                }
            }
            if (is_turned(m, i)) {
                const double root = sqrt((double)d), size = fabs(largest) * root;
                double square = 0;
                for (size_t j = 0; j < d; j++) {
                    const double base = base_of(&head, i, j, d), x_less = (double)row[i * d + j] - base;
                    square += x_less * x_less;
                    magnitude += 2 * (fabs((double)q[r * d + j] * base) + size * (fabs(x_less) + fabs(base)) / root);
                    away += head.planes.centres.mean ? fabs(base - (double)head.planes.centres.mean[j]) : 0;
                }
                away += root * root * sqrt(square); /* turned: the sum of magnitudes is at most the root of D lengths */
            }
            const double allowed = 0.3 * (4 * (double)(d + 2) * UNIT * magnitude + 0.51 * largest / 32767 * away);
            check_close("logit", r * n + i, out[r * stride + i], (double)0.3f * x, allowed + 1e-30);
            check_close("listed", r * n + i, listed[r * stride + n - 1 - i], (double)0.3f * x, allowed + 1e-30);
        }
    free(q), free(out), free(listed), free(row), free(factor), free(mean_logit), free(quantised), free(scratch);
    free(turned_factor), free(half), free(turned);
    free(list);
}

static void logits(void **unused)
{
    (void)unused;
    for (size_t t = 0; t < COUNT(kinds); t++)
        for (size_t d = 0; d < COUNT(dims); d++)
            for (size_t n = 0; n < COUNT(counts); n++) {
                struct made m = make_rows(&kinds[t], counts[n], dims[d], 1);
                describe("%s, dim %zu, rows %zu", name_of(&kinds[t]), dims[d], counts[n]);
                check_logits(&m, 1);
                check_logits(&m, 16);
                check_logits(&m, 21);
                free_rows(&m);
            }
}

/* Logits with centroids that are known already are what is added for them. */
static void known_centres(void **unused)
{
    (void)unused;
    enum { N = 60, D = 64, QUERIES = 3, CENTRES = 9 };
    const struct kind kind = {.type = SQZ_ROW_I44, .n_whole = 5, .n_centres = CENTRES, .centres = SQZ_ROW_I8};
    struct made m = make_rows(&kind, N, D, 1);
    const struct sqz_rows head = sqz_rows_of_head(&m.rows, N, D, 1);
    float *q = random_floats(QUERIES * D, 4, 1), known[QUERIES * CENTRES], out[2][QUERIES * N], factor[2][QUERIES],
          more[2][QUERIES];
    int16_t numbers[2][QUERIES * D];
    uint32_t list[N];
    struct sqz_row_queries queries = {.f32 = q,
                                      .i16 = {numbers[0], factor[0], more[0]},
                                      .n = QUERIES,
                                      .scale = 0.3f,
                                      .turned = {numbers[1], factor[1], more[1]}};
    describe("known centres");
    sqz_row_queries_set(&queries, &head, D);
    sqz_rows_logits(out[0], N, &queries, &head, 0, N, D, NULL);
    for (size_t i = 0; i < N; i++) list[i] = (uint32_t)i;
    for (size_t i = 0; i < QUERIES * CENTRES; i++) known[i] = (float)(100 * (i + 1));
    queries.centre_logits = known;
    queries.centre_stride = CENTRES;
    sqz_rows_listed_logits(out[1], N, &queries, &head, list, N, N, D);
    for (size_t r = 0; r < QUERIES; r++)
        for (size_t i = 0, c = 0; i < N; i++) {
            const struct sqz_centres *centres = &head.planes.centres;
            const struct sqz_rows rows = {
                .type = centres->type, .data = centres->data, .scale = centres->scale, .mean = centres->mean};
            float row[D];
            double logit = 0;
            if (i >= 5)
                while (centres->offset[c + 1] <= i - 5) c++;
            sqz_rows_to_f32(row, &rows, c, 1, D);
            for (size_t j = 0; j < D; j++) logit += 0.3 * (double)q[r * D + j] * (double)row[j];
            const double wanted =
                i < 5 ? (double)out[0][r * N + i] : (double)out[0][r * N + i] - logit + (double)known[r * CENTRES + c];
            check_close("logit", r * N + i, out[1][r * N + i], wanted, 0.01);
        }
    free(q);
    free_rows(&m);
}

/* Sums of rows, of all and of a list, against double precision over the numbers that the rows hold; rows without a weight
 * are not read, and the bytes are of those that are. */
static void check_sums(const struct made *m, size_t n_queries)
{
    const size_t n = m->n, d = m->d, h = 2, stride = n + 1, first = n / 4, left = n - first;
    const struct sqz_rows head = sqz_rows_of_head(&m->rows, n, d, h);
    float *weights = random_floats(n_queries * stride, 9, 1), *row = take(n * d, sizeof *row);
    float *out = take(n_queries * d, sizeof *out), *listed = take(n_queries * d, sizeof *listed);
    uint32_t *list = take(n, sizeof *list);
    size_t bytes = 0;
    for (size_t i = 0; i < left; i++) {
        list[i] = (uint32_t)(first + (i * 7 + 3) % left);
        for (size_t r = 0; r < n_queries; r++) {
            float *w = &weights[r * stride + i];
            *w = i % 3 ? fabsf(*w) : 0.0f;
        }
    }
    const bool distinct = left % 7 != 0; /* then the list has every row once */
    for (size_t i = 0; i < n_queries * d; i++) out[i] = listed[i] = (float)(i % 5);
    for (size_t i = 0; i < left; i++) bytes += i % 3 ? sqz_rows_bytes(&head, first + i, 1, d) : 0;
    const size_t read = sqz_rows_accumulate(out, weights, stride, n_queries, &head, NULL, first, left, d);
    check_close("bytes", 0, (double)read, (double)bytes, 0);
    if (distinct) sqz_rows_accumulate(listed, weights, stride, n_queries, &head, list, 0, left, d);
    sqz_rows_to_f32(row, &head, 0, n, d);
    for (size_t r = 0; r < n_queries; r++) {
        double scale = 0; /* turned rows mix all numbers of a row */
        for (size_t i = 0; i < left; i++)
            for (size_t j = 0; j < d; j++) {
                const double mean = head.mean ? fabs((double)head.mean[j]) : 0;
                scale += (double)weights[r * stride + i] * (fabs((double)row[(first + i) * d + j]) + mean);
            }
        for (size_t j = 0; j < d; j++) {
            double x = (double)(float)((r * d + j) % 5), y = x;
            for (size_t i = 0; i < left; i++) {
                x += (double)weights[r * stride + i] * (double)row[(first + i) * d + j];
                y += (double)weights[r * stride + i] * (double)row[(size_t)list[i] * d + j];
            }
            const double allowed = 16 * (double)(n + d) * UNIT * (scale + 5);
            check_close("sum", r * d + j, out[r * d + j], x, allowed);
            if (distinct) check_close("sum of a list", r * d + j, listed[r * d + j], y, allowed);
        }
    }
    free(weights), free(row), free(out), free(listed), free(list);
}

static void sums(void **unused)
{
    (void)unused;
    for (size_t t = 0; t < COUNT(kinds); t++)
        for (size_t d = 0; d < COUNT(dims); d++)
            for (size_t n = 0; n < COUNT(counts); n++) {
                if (kinds[t].type == SQZ_ROW_I8 || kinds[t].centres) continue; /* values are not kept so */
                struct made m = make_rows(&kinds[t], counts[n], dims[d], 1);
                describe("%s, dim %zu, rows %zu", name_of(&kinds[t]), dims[d], counts[n]);
                check_sums(&m, 1);
                check_sums(&m, 5);
                check_sums(&m, 16);
                free_rows(&m);
            }
}

/* Both planes against the definition in squeeze_attention.h, bit by bit, with a Hadamard matrix made from it; what the
 * upper one says alone is within half its step. Numbers that F16 has no step for, and NaN, stay numbers of the planes. */
static void planes_by_definition(void **unused)
{
    (void)unused;
    for (size_t i = 0; i < COUNT(dims); i++) {
        const size_t d = dims[i], length = d & (~d + 1), n = 40;
        const struct kind kind = {.type = SQZ_ROW_I44, .n_whole = 2};
        struct made m = make_rows(&kind, n, d, 2);
        const struct sqz_rows upper = sqz_rows_upper(&m.rows);
        float *both = take(n * d, sizeof *both), *alone = take(n * d, sizeof *alone);
        describe("dim %zu", d);
        sqz_rows_to_f32(both, &m.rows, 0, n, d);
        sqz_rows_to_f32(alone, &upper, 0, n, d);
        for (size_t r = 2; r < n; r++) {
            double turned[MAX_HEAD_DIM], high[MAX_HEAD_DIM], low[MAX_HEAD_DIM];
            const uint8_t *planes[2] = {(const uint8_t *)m.rows.data + (r - 2) * sqz_plane_bytes(d),
                                        m.rows.planes.lower + (r - 2) * sqz_plane_bytes(d)};
            const double step = half_value(m.rows.planes.step[r - 2]);
            for (size_t j = 0; j < d; j++) {
                turned[j] = 0;
                for (size_t l = j / length * length; l < j / length * length + length; l++)
                    turned[j] += ((double)m.wanted[r * d + l] - (double)m.rows.mean[l]) / sqrt((double)length) *
                                 (__builtin_popcountll(j & l & (length - 1)) % 2 ? -1 : 1);
                const size_t byte = j / 32 * 16 + j % 16, shift = j % 32 / 16 * 4;
                const int u = (planes[0][byte] >> shift & 15) - 8, l = planes[1][byte] >> shift & 15;
                high[j] = (u + 0.5) * step;
                low[j] = (16 * u + l + 0.5) * step / 16;
                check_close("upper", r * d + j, high[j], turned[j], 0.5001 * step + 1e-5);
                check_close("both", r * d + j, low[j], turned[j], 0.5001 * step / 16 + 1e-5);
            }
            for (size_t j = 0; j < d; j++) {
                double wanted_high = (double)m.rows.mean[j], wanted_low = wanted_high;
                for (size_t l = j / length * length; l < j / length * length + length; l++) {
                    const int sign = __builtin_popcountll(j & l & (length - 1)) % 2 ? -1 : 1;
                    wanted_high += sign * high[l] / sqrt((double)length);
                    wanted_low += sign * low[l] / sqrt((double)length);
                }
                check_close("turned back", r * d + j, both[r * d + j], wanted_low, 1e-4);
                check_close("the upper alone", r * d + j, alone[r * d + j], wanted_high, 1e-4);
            }
        }
        float odd[MAX_HEAD_DIM] = {0};
        odd[0] = 3e38f, odd[1] = NAN, odd[2] = -INFINITY;
        sqz_rows_store(&m.rows, n - 1, odd, d);
        assert_true(half_value(m.rows.planes.step[HEADS * 0 + n - 3]) <= 65504);
        free(both), free(alone);
        free_rows(&m);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bytes_and_addresses),  cmocka_unit_test(stored_and_read), cmocka_unit_test(logits),
        cmocka_unit_test(known_centres),        cmocka_unit_test(announces),       cmocka_unit_test(sums),
        cmocka_unit_test(planes_by_definition),
    };
    return cmocka_run_group_tests_name("rows", tests, NULL, NULL);
}
