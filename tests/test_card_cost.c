/*
 * What tokens on one context are reckoned to take, each way, against what
 * bench/gpu/ways.cu measured on an H200: 32 over 8 heads of 128, F16, one level
 * without a tail. The way that is reckoned cheapest is hardly dearer than the
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
    bool coded;
    double share, united, us[N_WAYS];
} measured[] = {
    {131068, 8, false, 0.041, 0.100, {108, 110, 177}},   {131068, 8, false, 0.041, 0.180, {112, 122, 178}},
    {131068, 8, false, 0.041, 0.252, {116, 134, 178}},   {131068, 8, false, 0.108, 0.223, {181, 129, 178}},
    {131068, 8, false, 0.108, 0.373, {187, 149, 178}},   {131068, 8, false, 0.109, 0.520, {195, 171, 178}},
    {131068, 32, false, 0.041, 0.148, {309, 141, 206}},  {131068, 32, false, 0.041, 0.346, {338, 175, 226}},
    {131068, 32, false, 0.042, 0.585, {354, 207, 222}},  {131068, 32, false, 0.108, 0.301, {568, 164, 235}},
    {131068, 32, false, 0.108, 0.588, {604, 206, 220}},  {131068, 32, false, 0.109, 0.853, {631, 240, 223}},
    {131068, 40, false, 0.041, 0.155, {401, 164, 289}},  {131068, 40, false, 0.041, 0.374, {406, 214, 291}},
    {131068, 40, false, 0.041, 0.640, {426, 277, 295}},  {131068, 40, false, 0.108, 0.313, {651, 199, 292}},
    {131068, 40, false, 0.108, 0.618, {723, 269, 300}},  {131068, 40, false, 0.109, 0.887, {761, 334, 299}},
    {131068, 64, false, 0.041, 0.173, {578, 183, 317}},  {131068, 64, false, 0.041, 0.438, {622, 248, 338}},
    {131068, 64, false, 0.042, 0.752, {647, 321, 376}},  {131068, 64, false, 0.108, 0.339, {1058, 224, 367}},
    {131068, 64, false, 0.108, 0.681, {1158, 306, 363}}, {131068, 64, false, 0.109, 0.942, {1196, 365, 359}},
    {32768, 8, false, 0.032, 0.080, {63, 105, 88}},      {32768, 8, false, 0.039, 0.173, {52, 87, 83}},
    {32768, 8, false, 0.040, 0.240, {52, 91, 83}},       {32768, 8, false, 0.087, 0.188, {64, 87, 82}},
    {32768, 8, false, 0.101, 0.357, {71, 100, 83}},      {32768, 8, false, 0.103, 0.502, {73, 107, 82}},
    {32768, 32, false, 0.032, 0.121, {109, 106, 103}},   {32768, 32, false, 0.039, 0.334, {122, 122, 102}},
    {32768, 32, false, 0.040, 0.567, {128, 132, 102}},   {32768, 32, false, 0.087, 0.261, {151, 117, 102}},
    {32768, 32, false, 0.102, 0.576, {174, 133, 102}},   {32768, 32, false, 0.103, 0.845, {186, 142, 102}},
    {131068, 8, true, 0.043, 0.105, {249, 249, 179}},    {131068, 8, true, 0.043, 0.191, {251, 258, 179}},
    {131068, 8, true, 0.043, 0.267, {254, 270, 180}},    {131068, 8, true, 0.104, 0.222, {348, 296, 179}},
    {131068, 8, true, 0.105, 0.374, {352, 317, 180}},    {131068, 8, true, 0.105, 0.519, {356, 336, 179}},
    {131068, 32, true, 0.043, 0.156, {756, 675, 202}},   {131068, 32, true, 0.043, 0.368, {792, 715, 202}},
    {131068, 32, true, 0.043, 0.613, {809, 748, 202}},   {131068, 32, true, 0.104, 0.302, {1113, 834, 200}},
    {131068, 32, true, 0.104, 0.597, {1157, 873, 201}},  {131068, 32, true, 0.105, 0.862, {1182, 909, 200}},
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
                                    .coded = m->coded};
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

/* More tokens, rows or selected rows never take less. */
static void test_more_takes_more(void **state)
{
    static const struct sqz_card_task base = {8, 32, 8, 128, 65536, 3276, false, true, false};
    (void)state;
    for (int coded = 0; coded < 2; coded++)
        for (double tokens = 2; tokens < 600; tokens *= 1.7) {
            struct sqz_card_task a = base;
            a.coded = coded;
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
