/*
 * Peak arithmetic rates; peak.h describes them.
 *
 * A loop of independent multiply-adds over registers, nothing loaded or stored.
 * Two fused multiply-add units with 4 cycles of latency need 8 sums in flight;
 * 12 leave room for a unit with more and still fit the 16 registers of AVX2
 * beside the two factors. The compiler is told nothing about the factors, so
 * it cannot fold the loop away.
 */
#include "peak.h"

#include <stdint.h>

#include "common.h"
#include "cpu_features.h"
#include "json_output.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { SUMS = 12, RUNS = 8 };

struct instruction {
    const char *name;
    bool (*supported)(void);
    void (*loop)(size_t rounds); /* SUMS of them a round */
    double operations;           /* of one of them */
    bool f32;
};

/* Keeps a value in a register, unknown to the compiler from here on. */
#if defined(__x86_64__)
#define OPAQUE(x) __asm__ volatile("" : "+v"(x))
#elif defined(__aarch64__)
#define OPAQUE(x) __asm__ volatile("" : "+w"(x))
#endif

#define OPAQUE_SUMS                                                                                                    \
    OPAQUE(s0);                                                                                                        \
    OPAQUE(s1);                                                                                                        \
    OPAQUE(s2);                                                                                                        \
    OPAQUE(s3);                                                                                                        \
    OPAQUE(s4);                                                                                                        \
    OPAQUE(s5);                                                                                                        \
    OPAQUE(s6);                                                                                                        \
    OPAQUE(s7);                                                                                                        \
    OPAQUE(s8);                                                                                                        \
    OPAQUE(s9);                                                                                                        \
    OPAQUE(s10);                                                                                                       \
    OPAQUE(s11)

/* A loop over sums of a type; `step` makes the next sum of `s`. Sums that begin as known and equal would be computed
 * once for all. */
#define LOOP(type, zero, step)                                                                                         \
    type s0 = zero, s1 = zero, s2 = zero, s3 = zero, s4 = zero, s5 = zero, s6 = zero, s7 = zero, s8 = zero, s9 = zero, \
         s10 = zero, s11 = zero;                                                                                       \
    OPAQUE_SUMS;                                                                                                       \
    for (size_t i = 0; i < rounds; i++) {                                                                              \
        s0 = step(s0), s1 = step(s1), s2 = step(s2), s3 = step(s3), s4 = step(s4), s5 = step(s5);                      \
        s6 = step(s6), s7 = step(s7), s8 = step(s8), s9 = step(s9), s10 = step(s10), s11 = step(s11);                  \
    }                                                                                                                  \
    OPAQUE_SUMS

#if defined(__x86_64__)

static bool has_avx2(void)
{
    return (sqz_cpu_features() & SQZ_CPU_ALL_AVX2) == SQZ_CPU_ALL_AVX2;
}

static bool has_avx512(void)
{
    return (sqz_cpu_features() & SQZ_CPU_ALL_AVX512) == SQZ_CPU_ALL_AVX512;
}

/* The compiler's own detection, which looks at what the OS saves as well. */
static bool has_avx512_bf16(void)
{
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
}

static bool has_avx512_vnni(void)
{
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
}

__attribute__((target("avx2,fma"))) static void loop_avx2(size_t rounds)
{
    __m256 a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(1e-9f);
    OPAQUE(a);
    OPAQUE(b);
#define STEP(s) _mm256_fmadd_ps(a, b, s)
    LOOP(__m256, _mm256_setzero_ps(), STEP);
#undef STEP
}

__attribute__((target("avx512f"))) static void loop_avx512(size_t rounds)
{
    __m512 a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(1e-9f);
    OPAQUE(a);
    OPAQUE(b);
#define STEP(s) _mm512_fmadd_ps(a, b, s)
    LOOP(__m512, _mm512_setzero_ps(), STEP);
#undef STEP
}

__attribute__((target("avx512f,avx512vnni"))) static void loop_avx512_vnni(size_t rounds)
{
    __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(0);
    OPAQUE(a);
    OPAQUE(b);
#define STEP(s) _mm512_dpbusd_epi32(s, a, b)
    LOOP(__m512i, _mm512_setzero_si512(), STEP);
#undef STEP
}

#if defined(__AVX512BF16__) || (defined(__GNUC__) && __GNUC__ >= 10)
#define HAVE_BF16_LOOP
__attribute__((target("avx512f,avx512bf16"))) static void loop_avx512_bf16(size_t rounds)
{
    __m512i bits = _mm512_setzero_si512();
    OPAQUE(bits);
    const __m512bh a = (__m512bh)bits, b = (__m512bh)bits;
#define STEP(s) _mm512_dpbf16_ps(s, a, b)
    LOOP(__m512, _mm512_setzero_ps(), STEP);
#undef STEP
}
#endif

#elif defined(__aarch64__)

static bool always(void)
{
    return true;
}

static void loop_neon(size_t rounds)
{
    float32x4_t a = vdupq_n_f32(1.0f), b = vdupq_n_f32(1e-9f);
    OPAQUE(a);
    OPAQUE(b);
#define STEP(s) vfmaq_f32(s, a, b)
    LOOP(float32x4_t, vdupq_n_f32(0.0f), STEP);
#undef STEP
}

#endif

static const struct instruction instructions[] = {
#if defined(__x86_64__)
    {"avx2_fma", has_avx2, loop_avx2, 16, true},
    {"avx512_fma", has_avx512, loop_avx512, 32, true},
#ifdef HAVE_BF16_LOOP
    {"avx512_bf16", has_avx512_bf16, loop_avx512_bf16, 64, false},
#endif
    {"avx512_vnni", has_avx512_vnni, loop_avx512_vnni, 128, false},
#elif defined(__aarch64__)
    {"neon_fma", always, loop_neon, 8, true},
#endif
    {NULL, NULL, NULL, 0, false},
};

/* Rounds a second of all threads together: the best of some runs of a few milliseconds, in which a core that was taken
 * away for a while shows least. */
static double rounds_per_second(const struct instruction *instruction, int n_threads)
{
    const size_t rounds = 2000000; /* 12 million instructions: 3 to 6 ms */
    double best = 0.0;
    (void)n_threads; /* without OpenMP it is one */
    for (int run = 0; run < RUNS; run++) {
        size_t threads = 0;
        double since = now_seconds();
#pragma omp parallel num_threads(n_threads) reduction(+ : threads)
        {
            instruction->loop(rounds);
            threads++;
        }
        double seconds = now_seconds() - since;
        if (seconds > 0.0 && (double)(rounds * threads) / seconds > best) best = (double)(rounds * threads) / seconds;
    }
    return best;
}

size_t peaks_measure(struct peak *peaks, size_t capacity, int n_threads)
{
    size_t n = 0;
    for (const struct instruction *i = instructions; i->name && n < capacity; i++)
        if (i->supported())
            peaks[n++] = (struct peak){i->name, i->f32, rounds_per_second(i, n_threads) * SUMS * i->operations};
    return n;
}

double peaks_best_f32(const struct peak *peaks, size_t n)
{
    double best = 0.0;
    for (size_t i = 0; i < n; i++) best = peaks[i].f32 && peaks[i].per_second > best ? peaks[i].per_second : best;
    return best;
}

json_t *peaks_json(const struct peak *peaks, size_t n)
{
    json_t *all = json_object();
    for (size_t i = 0; i < n; i++) json_object_set_new(all, peaks[i].name, json_number(peaks[i].per_second / 1e9));
    return all;
}
