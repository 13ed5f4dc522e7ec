/*
 * The selectors of the other methods against choices made here in double
 * precision: which rows QUEST's page bounds, a window and the oracle take, how
 * many a budget allows, and what is counted for choosing; what a question attends
 * to, by which SnapKV chooses.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "eval_methods.h"
#include "kernels.h"
#include "snapkv_scores.h"

_Noreturn void die(const char *format, ...)
{
    fprintf(stderr, "die: %s\n", format);
    exit(1);
}

enum { DIM = 32, HEADS_KV = 2, GROUP = 3, MAX_ROWS = 1000 };

static uint64_t random_state;

static double random_number(void) /* (-1, 1), splitmix64 */
{
    uint64_t z = random_state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return (double)(int64_t)(z ^ z >> 31) * 0x1p-63;
}

struct fixture {
    struct sqz_layer layer;
    uint16_t *keys;
    double *exact; /* [K][n_rows][D] the keys' values */
    float queries[GROUP * DIM];
    struct page_bounds pages;
    float *bounds;
};

/* Page bounds as page_bounds_make() lays them out, of one layer, made here. */
static void make_bounds(struct fixture *f)
{
    const size_t n = f->layer.n_rows, n_pages = (n + 15) / 16;
    f->bounds = calloc(HEADS_KV * n_pages * 2 * DIM, sizeof *f->bounds);
    f->pages = (struct page_bounds){.bounds = &f->bounds, .n_layer = 1};
    for (size_t h = 0; h < HEADS_KV; h++) {
        for (size_t i = 0; i < n * DIM; i++) {
            const size_t row = i / DIM, dim = i % DIM;
            float *page = f->bounds + ((h * n_pages + row / 16) * 2) * DIM;
            const float x = (float)f->exact[h * n * DIM + i];
            page[dim] = row % 16 == 0 || x < page[dim] ? x : page[dim];
            page[DIM + dim] = row % 16 == 0 || x > page[DIM + dim] ? x : page[DIM + dim];
        }
    }
}

static void make_fixture(struct fixture *f, size_t n_rows, uint64_t seed)
{
    const size_t n = HEADS_KV * n_rows * DIM;
    random_state = seed;
    memset(f, 0, sizeof *f);
    f->layer.shape = (struct sqz_layer_shape){HEADS_KV * GROUP, HEADS_KV, DIM, 0.5f};
    f->layer.n_rows = f->layer.n_fixed = (uint32_t)n_rows;
    f->keys = malloc(n * sizeof *f->keys);
    f->exact = malloc(n * sizeof *f->exact);
    float *numbers = malloc(n * sizeof *numbers);
    for (size_t i = 0; i < n; i++) numbers[i] = (float)random_number();
    sqz_kernels_get()->f32_to_f16(f->keys, numbers, n);
    sqz_kernels_get()->f16_to_f32(numbers, f->keys, n);
    for (size_t i = 0; i < n; i++) f->exact[i] = (double)numbers[i];
    free(numbers);
    for (size_t i = 0; i < GROUP * DIM; i++) f->queries[i] = (float)(3.0 * random_number());
    f->layer.keys = sqz_f16_rows(f->keys);
    make_bounds(f);
}

static void free_fixture(struct fixture *f)
{
    free(f->keys);
    free(f->exact);
    free(f->bounds);
}

/* Runs a selector; returns how many rows it chose. */
static size_t choose(const struct fixture *f, enum eval_method method, uint32_t head, float budget, uint32_t *rows,
                     uint64_t *index_bytes)
{
    const struct sqz_selector selector = method_selector(method, &f->pages);
    void *workspace = malloc(selector.workspace_bytes(selector.data, &f->layer));
    const struct sqz_select_call call = {&f->layer, 0, head, f->queries, GROUP, budget, workspace};
    const size_t n = selector.select(selector.data, &call, rows, index_bytes);
    free(workspace);
    for (size_t i = 0; i < n; i++) {
        assert_true(rows[i] < f->layer.n_rows);
        assert_true(i == 0 || rows[i] > rows[i - 1]);
    }
    return n;
}

/* How many scores are larger than that of `i` beyond doubt. */
static size_t rank_of(const double *scores, size_t n, size_t i)
{
    size_t larger = 0;
    for (size_t j = 0; j < n; j++) larger += scores[j] > scores[i] * (1.0 + 1e-5) + 1e-12;
    return larger;
}

static void test_window(void **state)
{
    static const size_t sizes[] = {1, 3, 4, 5, 100, 1000};
    uint32_t rows[MAX_ROWS];
    (void)state;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        struct fixture f;
        uint64_t bytes = 9;
        make_fixture(&f, sizes[s], s + 1);
        const size_t wanted = (size_t)(0.125 * (double)sizes[s]) > 1 ? (size_t)(0.125 * (double)sizes[s]) : 1;
        const size_t n = choose(&f, METHOD_WINDOW, 1, 0.125f, rows, &bytes);
        assert_int_equal(n, wanted);
        assert_int_equal(bytes, 0);
        for (size_t i = 0; i < n; i++) assert_int_equal(rows[i], i < 4 ? i : sizes[s] - n + i);
        assert_int_equal(choose(&f, METHOD_WINDOW, 0, 1.0f, rows, &bytes), sizes[s]);
        free_fixture(&f);
    }
}

static void test_oracle(void **state)
{
    static double scores[MAX_ROWS];
    uint32_t rows[MAX_ROWS];
    (void)state;
    for (uint64_t seed = 1; seed <= 20; seed++) {
        struct fixture f;
        uint64_t bytes = 9;
        const size_t n_rows = seed % 5 == 0 ? MAX_ROWS : 40 + 13 * (size_t)seed;
        const uint32_t head = (uint32_t)(seed % 2);
        make_fixture(&f, n_rows, seed);
        memset(scores, 0, sizeof scores);
        for (size_t r = 0; r < GROUP; r++) {
            double total = 0.0;
            for (int pass = 0; pass < 2; pass++) {
                for (size_t i = 0; i < n_rows; i++) {
                    double logit = 0.0;
                    for (size_t j = 0; j < DIM; j++)
                        logit += (double)f.queries[r * DIM + j] * f.exact[(head * n_rows + i) * DIM + j];
                    const double weight = exp(0.5 * logit);
                    if (pass == 0) total += weight;
                    else scores[i] += weight / total;
                }
            }
        }
        const size_t n = choose(&f, METHOD_ORACLE, head, 0.1f, rows, &bytes);
        assert_int_equal(n, (size_t)(0.1f * (float)n_rows));
        assert_int_equal(bytes, 0);
        for (size_t i = 0; i < n; i++) assert_true(rank_of(scores, n_rows, rows[i]) < n);
        free_fixture(&f);
    }
}

static void test_quest(void **state)
{
    static double scores[MAX_ROWS];
    uint32_t rows[MAX_ROWS];
    (void)state;
    for (uint64_t seed = 1; seed <= 20; seed++) {
        struct fixture f;
        uint64_t bytes = 0;
        const size_t n_rows = 160 + 37 * (size_t)seed, n_pages = (n_rows + 15) / 16;
        const uint32_t head = (uint32_t)(seed % 2);
        make_fixture(&f, n_rows, seed);
        for (size_t p = 0; p < n_pages; p++) { /* the largest logit that the bounds allow, over the group */
            scores[p] = -INFINITY;
            for (size_t r = 0; r < GROUP; r++) {
                double bound = 0.0;
                for (size_t j = 0; j < DIM; j++) {
                    double low = INFINITY, high = -INFINITY;
                    for (size_t i = p * 16; i < p * 16 + 16 && i < n_rows; i++) {
                        low = fmin(low, f.exact[(head * n_rows + i) * DIM + j]);
                        high = fmax(high, f.exact[(head * n_rows + i) * DIM + j]);
                    }
                    bound += fmax((double)f.queries[r * DIM + j] * low, (double)f.queries[r * DIM + j] * high);
                }
                scores[p] = fmax(scores[p], bound);
            }
        }
        const size_t n = choose(&f, METHOD_QUEST, head, 0.25f, rows, &bytes);
        assert_int_equal(bytes, n_pages * 2 * DIM * 2);
        const double left = 0.25 * (double)n_rows * DIM * 4 - (double)bytes;
        const size_t k = (size_t)(left / (16 * DIM * 4)) > 1 ? (size_t)(left / (16 * DIM * 4)) : 1;
        size_t n_chosen_pages = 0;
        for (size_t i = 0; i < n; i++) {
            if (i == 0 || rows[i] / 16 != rows[i - 1] / 16) {
                const size_t page = rows[i] / 16, first = page * 16;
                const size_t n_page = n_rows - first < 16 ? n_rows - first : 16;
                assert_int_equal(rows[i], first);
                assert_int_equal(rows[i + n_page - 1], first + n_page - 1); /* whole */
                assert_true(rank_of(scores, n_pages, page) < k);
                n_chosen_pages++;
            }
        }
        assert_int_equal(n_chosen_pages, k);
        /* The bounds alone may take all that the budget has: a page is read all the same. */
        assert_true(choose(&f, METHOD_QUEST, head, 0.01f, rows, &bytes) >= 1);
        /* At a budget of 1 the bounds take a sixteenth of it, and the last page may be short. */
        assert_true(choose(&f, METHOD_QUEST, head, 1.0f, rows, &bytes) + 2 * 16 >= n_rows * 15 / 16);
        free_fixture(&f);
    }
}

/* Keys that are all alike: exactly as many rows as the budget allows, the first ones. */
static void test_ties(void **state)
{
    uint32_t rows[MAX_ROWS];
    struct fixture f;
    uint64_t bytes;
    (void)state;
    make_fixture(&f, 300, 5);
    memset(f.keys, 0, HEADS_KV * 300 * DIM * sizeof *f.keys);
    const size_t n = choose(&f, METHOD_ORACLE, 0, 0.1f, rows, &bytes);
    assert_int_equal(n, 30);
    for (size_t i = 0; i < n; i++) assert_int_equal(rows[i], i);
    free_fixture(&f);
}

/* Probabilities of two tokens behind a user row, whose denominators have the user's rows that each sees, and their pools. */
static void test_snapkv(void **state)
{
    enum { ROWS = 203, CAPACITY = 7, BEFORE = 1, TOKENS = 2 };
    static double wanted[ROWS];
    static float weight[ROWS], pooled[ROWS], logits[ROWS + CAPACITY], numbers[HEADS_KV * CAPACITY * DIM];
    static float queries[TOKENS * HEADS_KV * GROUP * DIM];
    static uint16_t own[HEADS_KV * CAPACITY * DIM];
    (void)state;
    for (uint64_t seed = 1; seed <= 4; seed++) {
        struct fixture f;
        const size_t head = seed % 2;
        double sum = 0.0;
        make_fixture(&f, ROWS, seed);
        for (size_t i = 0; i < HEADS_KV * CAPACITY * DIM; i++) numbers[i] = (float)random_number();
        for (size_t i = 0; i < TOKENS * HEADS_KV * GROUP * DIM; i++) queries[i] = (float)(3.0 * random_number());
        sqz_kernels_get()->f32_to_f16(own, numbers, HEADS_KV * CAPACITY * DIM);
        sqz_kernels_get()->f16_to_f32(numbers, own, HEADS_KV * CAPACITY * DIM);
        const struct sqz_attend_call call = {.layer = &f.layer,
                                             .queries = queries,
                                             .query_token_stride = HEADS_KV * GROUP * DIM,
                                             .query_head_stride = DIM,
                                             .n_tokens = TOKENS,
                                             .user_keys = own,
                                             .user_capacity_rows = CAPACITY,
                                             .n_user = BEFORE + TOKENS};
        memset(wanted, 0, sizeof wanted);
        memset(weight, 0, sizeof weight);
        for (size_t t = 0; t < TOKENS; t++) {
            for (size_t g = 0; g < GROUP; g++) {
                const float *q = queries + ((t * HEADS_KV + head) * GROUP + g) * DIM;
                double e[ROWS + CAPACITY], total = 0.0;
                for (size_t i = 0; i < ROWS + BEFORE + t + 1; i++) {
                    double logit = 0.0;
                    for (size_t j = 0; j < DIM; j++)
                        logit += (double)q[j] * (i < ROWS ? f.exact[(head * ROWS + i) * DIM + j]
                                                          : (double)numbers[(head * CAPACITY + i - ROWS) * DIM + j]);
                    total += e[i] = exp(0.5 * logit);
                }
                for (size_t i = 0; i < ROWS; i++) wanted[i] += e[i] / total;
            }
            snapkv_add(weight, logits, &call, head, t);
        }
        for (size_t i = 0; i < ROWS; i++) {
            assert_true(fabs((double)weight[i] - wanted[i]) <= 1e-5 * wanted[i] + 1e-9); /* F32 sums of 32 products */
            sum += wanted[i];
        }
        assert_true(sum > 0.5 && sum < TOKENS * GROUP); /* the user's rows have the rest */
        snapkv_pool(pooled, weight, ROWS);
        for (size_t i = 0; i < ROWS; i++) {
            float largest = 0.0f;
            for (size_t j = i < 3 ? 0 : i - 3; j <= i + 3 && j < ROWS; j++)
                largest = weight[j] > largest ? weight[j] : largest;
            assert_true(pooled[i] == largest);
        }
        free_fixture(&f);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_window), cmocka_unit_test(test_oracle), cmocka_unit_test(test_quest),
        cmocka_unit_test(test_ties),   cmocka_unit_test(test_snapkv),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
