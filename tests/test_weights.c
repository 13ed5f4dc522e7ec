/*
 * Quantised weights as lib/cuda/weights.h reads them, against ggml: blocks of random
 * bytes, their factors of a common size. Both multiply in F32, in another order for
 * some types.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <ggml.h>
#include <math.h>
#include <stdlib.h>

#include "cuda/weights.h"
#include "random.h"

enum { BLOCKS = 64 };

/* Every F16 factor of a block between 2^-9 and 2, of either sign. */
static void fill(uint8_t *blocks, size_t n_bytes, size_t block_bytes, const int *factors)
{
    struct sqz_random random;
    sqz_random_seed(&random, 7);
    for (size_t i = 0; i < n_bytes; i++) blocks[i] = (uint8_t)(sqz_random_unit(&random) * 256);
    for (size_t at = 0; at < n_bytes; at += block_bytes)
        for (int f = 0; f < 2 && factors[f] >= 0; f++) {
            uint8_t *high = blocks + at + factors[f] + 1;
            *high = (uint8_t)((*high & 0x83) | (6 + *high % 9) << 2);
        }
}

static void check(int type, const int *factors)
{
    const struct sqz_weights_block b = sqz_weights_block_of(type);
    const size_t n = BLOCKS * b.n;
    assert_int_equal(b.n, ggml_blck_size((enum ggml_type)type));
    assert_int_equal(b.bytes, ggml_type_size((enum ggml_type)type));
    uint8_t *blocks = malloc((size_t)BLOCKS * b.bytes);
    float *wanted = malloc(n * sizeof *wanted), got[8];
    fill(blocks, (size_t)BLOCKS * b.bytes, b.bytes, factors);
    ggml_get_type_traits((enum ggml_type)type)->to_float(blocks, wanted, (int64_t)n);
    for (size_t i = 0; i < n; i++) {
        if (i % 8 == 0) sqz_weights_eight(type, blocks, i / 8, got);
        /* The sum of two rounded products of at most 2 * 63 * 31. */
        if (!(fabsf(got[i % 8] - wanted[i]) <= 1e-3f + 1e-6f * fabsf(wanted[i])))
            fail_msg("%s, number %zu: got %g, wanted %g", ggml_type_name((enum ggml_type)type), i, (double)got[i % 8],
                     (double)wanted[i]);
    }
    free(blocks);
    free(wanted);
}

static void test_types(void **state)
{
    static const struct {
        int type, factors[2]; /* where a block's F16 factors stand; -1: no second one */
    } types[] = {
        {SQZ_WEIGHTS_Q4_0, {0, -1}}, {SQZ_WEIGHTS_Q4_1, {0, 2}},    {SQZ_WEIGHTS_Q5_0, {0, -1}},
        {SQZ_WEIGHTS_Q5_1, {0, 2}},  {SQZ_WEIGHTS_Q8_0, {0, -1}},   {SQZ_WEIGHTS_Q4_K, {0, 2}},
        {SQZ_WEIGHTS_Q5_K, {0, 2}},  {SQZ_WEIGHTS_Q6_K, {208, -1}},
    };
    (void)state;
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) check(types[i].type, types[i].factors);
}

/* F16, as far as factors need it: what the bits say. */
static void test_half(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x7c00; h++) {
        const uint16_t both[2] = {(uint16_t)h, (uint16_t)(h | 0x8000)};
        const double exponent = h >> 10, fraction = h & 1023;
        const double x = h >> 10 ? ldexp(1024 + fraction, (int)exponent - 25) : ldexp(fraction, -24);
        assert_true((double)sqz_weights_half((const uint8_t *)&both[0]) == x);
        assert_true((double)sqz_weights_half((const uint8_t *)&both[1]) == -x);
    }
}

static void test_none(void **state)
{
    (void)state;
    assert_int_equal(sqz_weights_block_of(GGML_TYPE_F16).n, 0);
    assert_int_equal(sqz_weights_block_of(GGML_TYPE_Q2_K).n, 0);
    assert_int_equal(sqz_weights_block_of(-1).n, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_types), cmocka_unit_test(test_half),
                                       cmocka_unit_test(test_none)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
