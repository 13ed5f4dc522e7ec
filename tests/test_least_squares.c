/*
 * Fits without negative coefficients: exact systems of badly scaled columns, a minimum worked out by hand, one that
 * lies on the border, and the conditions of a minimum (Kuhn and Tucker's) on random systems.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "common.h"
#include "least_squares.h"

_Noreturn void die(const char *format, ...)
{
    fprintf(stderr, "die: %s\n", format);
    exit(1);
}

#define assert_close(got, wanted, tolerance) check_close(got, wanted, tolerance, __LINE__)

static void check_close(double got, double wanted, double tolerance, int line)
{
    if (!(fabs(got - wanted) <= tolerance))
        fail_msg("line %d: got %.17g, wanted %.17g within %g", line, got, wanted, tolerance);
}

static void test_exact_systems(void **state)
{
    (void)state;
    /* Seconds a layer, a byte, a key, as attention has them: 12 powers of ten apart. */
    const double wanted[] = {2e-5, 8e-11, 1e-8},
                 a[] = {4, 4e5, 0, 4, 9e6, 0, 4, 2e5, 9000, 4, 8e5, 40000, 4, 3e6, 52000};
    double b[5], x[3];
    for (int r = 0; r < 5; r++) b[r] = a[3 * r] * wanted[0] + a[3 * r + 1] * wanted[1] + a[3 * r + 2] * wanted[2];
    least_squares(x, a, b, 5, 3);
    for (int i = 0; i < 3; i++) assert_close(x[i] / wanted[i], 1, 1e-6);
}

/* Nearest to 1, 2, 6 along t is t = 3 (mean), and with a slope of its own: 1/2 + 5/2 i. */
static void test_by_hand(void **state)
{
    (void)state;
    const double ones[] = {1, 1, 1}, line[] = {1, 0, 1, 1, 1, 2}, b[] = {1, 2, 6}, falling[] = {6, 2, 1};
    double x[2];
    least_squares(x, ones, b, 3, 1);
    assert_close(x[0], 3, 1e-12);
    least_squares(x, line, b, 3, 2);
    assert_close(x[0], 0.5, 1e-9);
    assert_close(x[1], 2.5, 1e-9);
    least_squares(x, line, falling, 3, 2); /* a slope of -2.5 is not allowed */
    assert_close(x[0], 3, 1e-9);
    assert_close(x[1], 0, 0);
}

static void test_columns_of_zeros(void **state)
{
    (void)state;
    const double a[] = {0, 2, 0, 4}, b[] = {4, 8};
    double x[2] = {7, 7};
    least_squares(x, a, b, 2, 2);
    assert_close(x[0], 0, 0);
    assert_close(x[1], 2, 1e-12);
}

static double random_number(uint64_t *state)
{
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (double)(*state >> 33) * 0x1p-31;
}

/* The gradient is 0 where a coefficient is above 0, and not below 0 where it is 0. */
static void test_is_a_minimum(void **state)
{
    (void)state;
    enum { ROWS = 19, COLUMNS = 9 };
    uint64_t seed = 1;
    int n_zero = 0;
    for (int trial = 0; trial < 50; trial++) {
        double a[ROWS * COLUMNS], b[ROWS], x[COLUMNS];
        for (int i = 0; i < ROWS * COLUMNS; i++) a[i] = random_number(&seed) < 0.3 ? 0 : random_number(&seed);
        for (int r = 0; r < ROWS; r++) b[r] = random_number(&seed);
        least_squares(x, a, b, ROWS, COLUMNS);
        for (int j = 0; j < COLUMNS; j++) {
            double gradient = 0;
            for (int r = 0; r < ROWS; r++) {
                double rest = -b[r];
                for (int k = 0; k < COLUMNS; k++) rest += a[r * COLUMNS + k] * x[k];
                gradient += a[r * COLUMNS + j] * rest;
            }
            n_zero += x[j] == 0;
            if (!(x[j] >= 0) || !(x[j] > 0 ? fabs(gradient) < 1e-6 : gradient > -1e-6))
                fail_msg("trial %d, column %d: x %g, gradient %g", trial, j, x[j], gradient);
        }
    }
    assert_true(n_zero > 10 && n_zero < 50 * COLUMNS - 10);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exact_systems),
        cmocka_unit_test(test_by_hand),
        cmocka_unit_test(test_columns_of_zeros),
        cmocka_unit_test(test_is_a_minimum),
    };
    return cmocka_run_group_tests_name("least_squares", tests, NULL, NULL);
}
