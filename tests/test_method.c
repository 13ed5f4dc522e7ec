/*
 * The method's formulas (lib/method.h) against double precision, and its
 * decisions asked both ways: what a lookup reads at a threshold, and up to which
 * threshold calibration counts it.
 */
#include "layer_fixture.h"

#include "method.h"

static void formulas(void **unused)
{
    (void)unused;
    struct sqz_random random;
    sqz_random_seed(&random, 1);
    for (size_t i = 0; i < 2000; i++) {
        const float gain = (float)gauss(&random), scale = 0.01f + (float)(i % 40) * 0.01f, norm = (float)(i % 97);
        const uint32_t d = 16 * (uint32_t)(1 + i % 16);
        const double factor = (double)gain * (double)scale * (double)scale * (double)norm / (2.0 * d);
        const float x = (float)(3 * gauss(&random)), s = (float)(i % 13), tail = (float)gauss(&random);
        check_close("spread factor", i, sqz_spread_factor(gain, scale, d, norm), factor, 1e-6 * fabs(factor));
        const double y = (double)x + factor * (double)s + (double)tail;
        check_close("tail logit", i, sqz_tail_logit(x, (float)factor, s, tail), y, 1e-5 * (1 + fabs(y)));
        check_close("tail bound", i, sqz_tail_bound((float)y, x), fmin((float)y, x), 0);
        check_close("reach", i, sqz_reach(x, s, tail, gain), (double)x + (double)s * (double)tail - (double)gain,
                    1e-5 * (1 + fabs(y)));
        check_close("score, mean", i, sqz_add_score(1.0f, 0.5f, d, false), 1.0 + 0.5 / d, 1e-6);
        check_close("score, maximum", i, sqz_add_score(0.25f, 0.5f, d, true), 0.5, 0);
    }
    assert_true(sqz_tail_is_off(SQZ_TAIL_OFF));
    assert_false(sqz_tail_is_off(-10.0f)); /* the least that calibration gives */
}

/* The last grid point at or below a level, found by trying them all. */
static int point_by_trial(double level)
{
    int point = -1;
    for (int t = 0; t < SQZ_CURVE_POINTS; t++)
        if (level >= (double)SQZ_CURVE_FIRST + (double)SQZ_CURVE_STEP * t) point = t;
    return point;
}

static void grid(void **unused)
{
    (void)unused;
    for (float level = -25.0f; level < 5.0f; level += 0.0625f) /* exact in binary, grid points among them */
        check_close("point", (size_t)((level + 25) * 16),
                    sqz_curve_point(level, SQZ_CURVE_FIRST, SQZ_CURVE_STEP, SQZ_CURVE_POINTS),
                    point_by_trial((double)level), 0);
    assert_int_equal(sqz_curve_point(NAN, SQZ_CURVE_FIRST, SQZ_CURVE_STEP, SQZ_CURVE_POINTS), -1);
    assert_int_equal(sqz_curve_point(-INFINITY, SQZ_CURVE_FIRST, SQZ_CURVE_STEP, SQZ_CURVE_POINTS), -1);
    assert_int_equal(sqz_curve_point(INFINITY, SQZ_CURVE_FIRST, SQZ_CURVE_STEP, SQZ_CURVE_POINTS),
                     SQZ_CURVE_POINTS - 1);
}

/* Whatever is asked by a limit at a threshold is counted up to the same threshold, but for rounding at the limit. */
static void asked_both_ways(void **unused)
{
    (void)unused;
    struct sqz_random random;
    sqz_random_seed(&random, 2);
    size_t read = 0, left = 0;
    for (size_t i = 0; i < 20000; i++) {
        const float log_score = (float)(-8 + 4 * gauss(&random)), threshold = (float)(-8 + 4 * gauss(&random));
        const uint32_t level = (uint32_t)(i % 3);
        const float up_to = sqz_cluster_read_to(log_score, level), value_up_to = sqz_value_read_to(log_score);
        if (fabsf(up_to - threshold) > 1e-4f) {
            const bool by_limit = expf(log_score) >= expf(sqz_cluster_limit(threshold, level));
            check_true("cluster", i, up_to, threshold, by_limit == (up_to >= threshold));
            read += by_limit;
            left += !by_limit;
        }
        if (fabsf(value_up_to - threshold) > 1e-4f)
            check_true("value", i, value_up_to, threshold,
                       (expf(log_score) >= sqz_value_limit(threshold)) == (value_up_to >= threshold));
        check_close("key", i, sqz_key_read_to(log_score, threshold), fmin(log_score, threshold), 0);
    }
    assert_true(read > 5000 && left > 5000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(formulas),
        cmocka_unit_test(grid),
        cmocka_unit_test(asked_both_ways),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
