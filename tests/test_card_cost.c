/*
 * What tokens on one context are reckoned to take, each way, against what
 * bench/gpu/ways.cu measured on an H200: 32 over 8 heads of 128, F16, one level.
 * The way that is reckoned cheapest is hardly dearer than the
 * cheapest that was measured, and never the dearest.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>

#include "card_cost.h"

enum { EACH, ONE, ALL, N_WAYS };

static const struct measured {
    uint32_t rows, tokens;
    bool coded, tail;
    double share, united, us[N_WAYS];
} measured[] = {
    {131068, 8, false, false, 0.041, 0.100, {99, 95, 162}},
    {131068, 8, false, false, 0.041, 0.252, {106, 116, 163}},
    {131068, 8, false, false, 0.108, 0.223, {162, 110, 162}},
    {131068, 8, false, false, 0.109, 0.520, {177, 149, 162}},
    {131068, 32, false, false, 0.041, 0.148, {286, 127, 181}},
    {131068, 32, false, false, 0.042, 0.585, {333, 187, 180}},
    {131068, 32, false, false, 0.108, 0.301, {521, 146, 181}},
    {131068, 32, false, false, 0.109, 0.853, {600, 216, 181}},
    {131068, 8, false, true, 0.041, 0.100, {173, 113, 162}},
    {131068, 8, false, true, 0.041, 0.252, {178, 134, 162}},
    {131068, 8, false, true, 0.108, 0.223, {233, 129, 162}},
    {131068, 8, false, true, 0.109, 0.520, {246, 166, 163}},
    {131068, 32, false, true, 0.041, 0.148, {554, 149, 181}},
    {131068, 32, false, true, 0.042, 0.585, {598, 208, 181}},
    {131068, 32, false, true, 0.108, 0.301, {777, 165, 181}},
    {131068, 32, false, true, 0.109, 0.853, {855, 243, 180}},
    {131068, 64, false, true, 0.041, 0.173, {1071, 206, 275}},
    {131068, 64, false, true, 0.042, 0.752, {1150, 354, 276}},
    {131068, 64, false, true, 0.108, 0.339, {1491, 248, 277}},
    {131068, 64, false, true, 0.109, 0.942, {1650, 397, 278}},
    {32768, 8, false, false, 0.032, 0.080, {39, 66, 66}},
    {32768, 8, false, false, 0.040, 0.240, {44, 72, 66}},
    {32768, 8, false, false, 0.087, 0.188, {49, 69, 66}},
    {32768, 8, false, false, 0.103, 0.502, {58, 87, 66}},
    {32768, 32, false, false, 0.032, 0.121, {104, 88, 84}},
    {32768, 32, false, false, 0.040, 0.567, {117, 112, 84}},
    {32768, 32, false, false, 0.087, 0.261, {141, 97, 84}},
    {32768, 32, false, false, 0.103, 0.845, {167, 121, 84}},
    {32768, 8, false, true, 0.032, 0.080, {71, 73, 67}},
    {32768, 8, false, true, 0.040, 0.240, {76, 85, 67}},
    {32768, 8, false, true, 0.087, 0.188, {81, 79, 67}},
    {32768, 8, false, true, 0.103, 0.502, {89, 99, 67}},
    {32768, 32, false, true, 0.032, 0.121, {213, 96, 84}},
    {32768, 32, false, true, 0.040, 0.567, {227, 125, 84}},
    {32768, 32, false, true, 0.087, 0.261, {247, 110, 85}},
    {32768, 32, false, true, 0.103, 0.845, {277, 136, 84}},
    {131068, 8, true, false, 0.043, 0.105, {249, 249, 179}},
    {131068, 8, true, false, 0.043, 0.191, {251, 258, 179}},
    {131068, 8, true, false, 0.043, 0.267, {254, 270, 180}},
    {131068, 8, true, false, 0.104, 0.222, {348, 296, 179}},
    {131068, 8, true, false, 0.105, 0.374, {352, 317, 180}},
    {131068, 8, true, false, 0.105, 0.519, {356, 336, 179}},
    {131068, 32, true, false, 0.043, 0.156, {756, 675, 202}},
    {131068, 32, true, false, 0.043, 0.368, {792, 715, 202}},
    {131068, 32, true, false, 0.043, 0.613, {809, 748, 202}},
    {131068, 32, true, false, 0.104, 0.302, {1113, 834, 200}},
    {131068, 32, true, false, 0.104, 0.597, {1157, 873, 201}},
    {131068, 32, true, false, 0.105, 0.862, {1182, 909, 200}},
};
enum { N_MEASURED = sizeof measured / sizeof *measured };

static void reckon(double us[N_WAYS], const struct measured *m)
{
    const struct sqz_card_task t = {.tokens = m->tokens,
                                    .heads = 32,
                                    .heads_kv = 8,
                                    .dim = 128,
                                    .rows = m->rows,
                                    .clusters = floor(m->rows / 20.0),
                                    .coded = m->coded,
                                    .tail = m->tail};
    us[EACH] = sqz_card_each_us(&t, m->share);
    us[ONE] = sqz_card_one_us(&t, m->share, m->united);
    us[ALL] = sqz_card_all_us(&t);
}

static int least(const double us[N_WAYS])
{
    int way = EACH;
    for (int i = ONE; i < N_WAYS; i++)
        if (us[i] < us[way]) way = i;
    return way;
}

static void test_reckoned_as_measured(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_MEASURED; i++) {
        double us[N_WAYS];
        reckon(us, &measured[i]);
        for (int way = 0; way < N_WAYS; way++)
            if (!(fabs(us[way] / measured[i].us[way] - 1) < 0.25))
                fail_msg("row %zu, way %d: %.0f us, measured %.0f", i, way, us[way], measured[i].us[way]);
    }
}

static void test_never_the_dearest(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_MEASURED; i++) {
        double us[N_WAYS], dearest = 0;
        const double *was = measured[i].us;
        reckon(us, &measured[i]);
        for (int way = 0; way < N_WAYS; way++) dearest = fmax(dearest, was[way]);
        const int way = least(us);
        if (!(was[way] <= 1.15 * was[least(was)]) || !(was[way] < dearest))
            fail_msg("row %zu: way %d takes %.0f us, way %d %.0f", i, way, was[way], least(was), was[least(was)]);
    }
}

/* More tokens, rows or selected rows never take less; of rows in planes, up to 31 tokens, whose 124 query rows a KV head
 * read them as they are: more have F16 rows made first, which can be less. */
static void test_more_takes_more(void **state)
{
    static const struct sqz_card_task base = {8, 32, 8, 128, 65536, 3276, false, true, false, 0};
    static const double number_bytes[] = {0, 0.516, 1.016};
    (void)state;
    for (int coded = 0; coded < 2; coded++)
        for (int rows = 0; rows < 3; rows++)
            for (double tokens = 2; tokens < (rows ? 31 : 600); tokens *= 1.7) {
                struct sqz_card_task a = base;
                a.coded = coded;
                a.number_bytes = number_bytes[rows];
                a.tokens = floor(tokens);
                struct sqz_card_task b = a;
                b.tokens++;
                assert_true(sqz_card_each_us(&b, 0.1) > sqz_card_each_us(&a, 0.1));
                assert_true(sqz_card_one_us(&b, 0.1, 0.2) > sqz_card_one_us(&a, 0.1, 0.2));
                assert_true(sqz_card_all_us(&b) > sqz_card_all_us(&a));
                assert_true(sqz_card_each_us(&a, 0.2) > sqz_card_each_us(&a, 0.1));
                assert_true(sqz_card_one_us(&a, 0.1, 0.3) > sqz_card_one_us(&a, 0.1, 0.2));
                assert_true(sqz_card_shared_us(&a, 0.2) > sqz_card_shared_us(&a, 0.1));
                b = a;
                b.rows *= 2, b.clusters *= 2;
                assert_true(sqz_card_shared_us(&b, 0.1) > sqz_card_shared_us(&a, 0.1));
                assert_true(sqz_card_long_all_us(&b) > sqz_card_long_all_us(&a));
                assert_true(sqz_card_all_us(&b) > sqz_card_all_us(&a));
            }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reckoned_as_measured),
        cmocka_unit_test(test_never_the_dearest),
        cmocka_unit_test(test_more_takes_more),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
