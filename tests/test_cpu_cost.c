/* What the ways take in which tokens go through a context on the CPU: reckoned from made-up costs, and measured. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>

#include "cpu_cost.h"
#include "error.h"

static const struct sqz_layer_shape shape = {9, 3, 64, 0.125f};

/* A selection's time grows with its share and the rows, and is divided by threads. */
static void test_each(void **state)
{
    const struct sqz_cpu_cost cost = {.looked_up = 1, .selected = 10};
    (void)state;
    assert_true(fabs(sqz_cpu_each_seconds(&cost, &shape, 100, 0, 1) - 300) < 1e-9);
    assert_true(fabs(sqz_cpu_each_seconds(&cost, &shape, 100, 0.5, 1) - 1800) < 1e-9);
    assert_true(fabs(sqz_cpu_each_seconds(&cost, &shape, 200, 0.5, 2) - 1800) < 1e-9);
}

/* Rows are passed once a block, threads take blocks in turns; more tokens never take less, and each less than the first. */
static void test_all(void **state)
{
    const struct sqz_cpu_cost cost = {.passed = 100, .joint = 1};
    (void)state;
    for (int n_threads = 1; n_threads <= 8; n_threads *= 2) {
        double last = 0, least_each = INFINITY;
        for (size_t n = 1; n <= 256; n *= 2) {
            const double seconds = sqz_cpu_all_seconds(&cost, &shape, 1000, n, n_threads);
            if (!(seconds >= last) || !isfinite(seconds) || !(seconds / (double)n <= 1.01 * least_each))
                fail_msg("%zu tokens, %d threads: %g seconds, half as many %g", n, n_threads, seconds, last);
            last = seconds;
            least_each = fmin(least_each, seconds / (double)n);
        }
    }
    assert_true(sqz_cpu_all_seconds(&cost, &shape, 1000, 16, 1) >
                1.9 * sqz_cpu_all_seconds(&cost, &shape, 1000, 16, 2));
}

/* On any machine: finite, and selecting more takes more. Nothing is asked of how fast. */
static void test_measure(void **state)
{
    static const struct sqz_layer_shape shapes[] = {{9, 3, 64, 0.125f}, {4, 1, 256, 0.0625f}, {32, 32, 32, 0.17f}};
    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct sqz_cpu_cost cost;
        struct sqz_error error;
        if (sqz_cpu_cost_measure(&cost, &shapes[i], 1 + (int)i, &error) != SQZ_OK) fail_msg("%s", error.message);
        const double each = sqz_cpu_each_seconds(&cost, &shapes[i], 1000, 0.3, 2);
        const double all = sqz_cpu_all_seconds(&cost, &shapes[i], 1000, 16, 2);
        if (!(cost.looked_up >= 0 && cost.selected >= 0 && cost.passed >= 0 && cost.joint >= 0 && each > 0 && all > 0 &&
              each < 1 && all < 16))
            fail_msg("shape %zu: looked up %g, selected %g, passed %g, joint %g", i, cost.looked_up, cost.selected,
                     cost.passed, cost.joint);
        print_message("%u heads of %u on %u: a token by itself at 0.1 %.1f, at 0.3 %.1f us, of 16 together %.1f us\n",
                      shapes[i].n_head, shapes[i].head_dim, shapes[i].n_head_kv,
                      1e6 * sqz_cpu_each_seconds(&cost, &shapes[i], 1000, 0.1, 1),
                      1e6 * sqz_cpu_each_seconds(&cost, &shapes[i], 1000, 0.3, 1),
                      1e6 * sqz_cpu_all_seconds(&cost, &shapes[i], 1000, 16, 1) / 16);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_each), cmocka_unit_test(test_all),
                                       cmocka_unit_test(test_measure)};
    return cmocka_run_group_tests_name("cpu_cost", tests, NULL, NULL);
}
