/*
 * A small seeded generator for clustering and tests: xoshiro256** 1.0 by
 * Blackman and Vigna ("Scrambled Linear Pseudorandom Number Generators",
 * arXiv 1805.01407), its state filled by SplitMix64. The same seed gives the
 * same numbers on every machine. Not for secrets.
 */
#ifndef SQZ_LIB_RANDOM_H
#define SQZ_LIB_RANDOM_H

#include <stdint.h>

struct sqz_random {
    uint64_t state[4];
};

static inline uint64_t sqz_splitmix64(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static inline void sqz_random_seed(struct sqz_random *random, uint64_t seed)
{
    for (int i = 0; i < 4; i++) random->state[i] = sqz_splitmix64(&seed);
}

static inline uint64_t sqz_rotate_left(uint64_t x, int bits)
{
    return (x << bits) | (x >> (64 - bits));
}

static inline uint64_t sqz_random_next(struct sqz_random *random)
{
    uint64_t *s = random->state;
    const uint64_t result = sqz_rotate_left(s[1] * 5, 7) * 9;
    const uint64_t t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = sqz_rotate_left(s[3], 45);
    return result;
}

/* Uniform in [0, 1), 53 bits. */
static inline double sqz_random_unit(struct sqz_random *random)
{
    return (double)(sqz_random_next(random) >> 11) * 0x1.0p-53;
}

/* Uniform in [0, n), n >= 1; the bias is below n / 2^53. */
static inline uint64_t sqz_random_below(struct sqz_random *random, uint64_t n)
{
    const uint64_t i = (uint64_t)(sqz_random_unit(random) * (double)n);
    return i < n ? i : n - 1;
}

#endif
