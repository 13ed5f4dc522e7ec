/*
 * The talk's table of asymptotic costs (QuantSpec, arXiv 2502.10424, table 1), typed in here, against the exponents
 * that the program fits to its own formulas.
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

#include "asymptotic.h"
#include "common.h"

_Noreturn void die(const char *format, ...)
{
    fprintf(stderr, "die: %s\n", format);
    exit(1);
}

/* One column of the table. Terms of the bytes that the talk counts apart carry their names. */
static const struct {
    enum growth_phase phase;
    enum growth_class growth_class;
    const char *flops, *bytes, *intensity[N_REGIMES];
} talk[] = {
    {GROWTH_PREFILL, GROWTH_LINEAR, "O(B S_L d^2)", "O(B S_L d) activations + O(d^2) weights", {"B S_L", "d"}},
    {GROWTH_PREFILL, GROWTH_ATTENTION, "O(B S_L^2 d)", "O(B S_L d) activations + O(B S_L) scores", {"S_L", "S_L"}},
    {GROWTH_PREFILL, GROWTH_AGGREGATE, "O(B S_L d^2) + O(B S_L^2 d)", "O(B S_L d) + O(d^2)", {"B S_L", "S_L"}},
    {GROWTH_DECODE, GROWTH_LINEAR, "O(k B d^2)", "O(k B d) activations + O(k d^2) weights", {"B", "B"}},
    {GROWTH_DECODE, GROWTH_ATTENTION, "O(k B S_L d)", "O(k B S_L d) activations + O(k B S_L) scores", {"1", "1"}},
    {GROWTH_DECODE, GROWTH_AGGREGATE, "O(k B d^2) + O(k B S_L d)", "O(k B S_L d) + O(k d^2)", {"B", "1"}},
};

enum { N_COLUMNS = sizeof talk / sizeof *talk };

static void test_table_of_the_talk(void **state)
{
    (void)state;
    for (int i = 0; i < N_COLUMNS; i++) {
        struct growth growth[N_REGIMES];
        char text[GROWTH_TEXT_MAX];
        for (int regime = 0; regime < N_REGIMES; regime++) {
            growth_fit(&growth[regime], talk[i].phase, talk[i].growth_class, (enum regime)regime);
            power_law_text(&growth[regime].intensity, text, sizeof text);
            assert_string_equal(text, talk[i].intensity[regime]);
        }
        growth_flops_text(growth, text);
        assert_string_equal(text, talk[i].flops);
        growth_bytes_text(growth, talk[i].growth_class, text);
        assert_string_equal(text, talk[i].bytes);
    }
}

/* A regime is chosen well when its leading terms are power laws: within 5% of one over a factor of four in every
 * variable. */
static void test_sweeps_follow_power_laws(void **state)
{
    (void)state;
    for (int i = 0; i < N_COLUMNS; i++) {
        for (int regime = 0; regime < N_REGIMES; regime++) {
            struct growth growth;
            growth_fit(&growth, talk[i].phase, talk[i].growth_class, (enum regime)regime);
            const struct power_law *laws[] = {&growth.flops, &growth.bytes, &growth.intensity};
            for (int l = 0; l < 3; l++) {
                if (!(laws[l]->deviation <= log2(1.05)) || !power_law_is_whole(laws[l])) {
                    fail_msg("phase %d, class %d, regime %d, quantity %d: deviation %g", (int)talk[i].phase,
                             (int)talk[i].growth_class, regime, l, laws[l]->deviation);
                }
            }
        }
    }
}

/* What the picture shows follows the laws: doubling a variable, far from S_L = d, multiplies by 2 to its exponent. */
static void test_intensity_follows_the_laws(void **state)
{
    (void)state;
    static const double tokens[N_REGIMES] = {16, 0x1p30}, width = 8192;
    for (int i = 0; i < N_COLUMNS; i++) {
        for (int regime = 0; regime < N_REGIMES; regime++) {
            const enum growth_phase phase = talk[i].phase;
            const enum growth_class c = talk[i].growth_class;
            struct growth growth;
            growth_fit(&growth, phase, c, (enum regime)regime);
            const double *e = growth.intensity.exponent, s = tokens[regime];
            const double once = growth_intensity(phase, c, 2, s, width);
            const double got[] = {growth_intensity(phase, c, 4, s, width) / once,
                                  growth_intensity(phase, c, 2, 2 * s, width) / once,
                                  growth_intensity(phase, c, 2, s, 2 * width) / once};
            const double wanted[] = {exp2(e[VARIABLE_B]), exp2(e[VARIABLE_S]), exp2(e[VARIABLE_D])};
            for (int v = 0; v < 3; v++)
                if (!(fabs(got[v] / wanted[v] - 1) <= 0.1))
                    fail_msg("column %d, regime %d, variable %d: %g, wanted %g", i, regime, v, got[v], wanted[v]);
        }
    }
}

static void test_text_of_laws(void **state)
{
    (void)state;
    char text[64];
    const struct power_law broken = {.exponent = {0.0, 1.02, 0.5, -1.0}}, none = {.deviation = NAN};
    power_law_text(&broken, text, sizeof text);
    assert_string_equal(text, "B S_L^0.50 d^-1");
    assert_false(power_law_is_whole(&broken));
    power_law_text(&none, text, sizeof text);
    assert_string_equal(text, "");
    assert_false(power_law_is_whole(&none));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_table_of_the_talk),
        cmocka_unit_test(test_sweeps_follow_power_laws),
        cmocka_unit_test(test_intensity_follows_the_laws),
        cmocka_unit_test(test_text_of_laws),
    };
    return cmocka_run_group_tests_name("asymptotic", tests, NULL, NULL);
}
