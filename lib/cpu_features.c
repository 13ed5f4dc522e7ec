/*
 * Detection of CPU features: CPUID for what the CPU has, XCR0 for what the OS
 * saves on a context switch; on 64-bit ARM there is nothing to ask. Compiled
 * without any architecture flag, so that this code itself runs everywhere.
 */
#include "cpu_features.h"

#include <stdatomic.h>
#include <stddef.h>
#ifdef SQZ_TEST
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#endif

#if defined(__x86_64__)
#include <cpuid.h>

#define XCR0_SSE_AVX 0x06u /* XMM and upper halves of YMM */
#define XCR0_AVX512  0xe6u /* those, opmasks, upper halves of ZMM0-15, ZMM16-31 */

static uint32_t read_xcr0(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

/* Skylake-SP, Cascade Lake and Cooper Lake (family 6, model 0x55) lower the core's clock for about a millisecond after
 * 512-bit multiplications: our calls are shorter than that, so the code around them would pay. */
static uint32_t prefer_512(void)
{
    uint32_t eax, ebx, ecx, edx, family, model;

    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
    family = (eax >> 8) & 0xf;
    model = ((eax >> 4) & 0xf) | ((eax >> 12) & 0xf0);
    return family == 6 && model == 0x55 ? 0 : SQZ_CPU_PREFER_512;
}

static uint32_t detect(void)
{
    uint32_t eax, ebx, ecx, edx, xcr0, features = 0;

    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return 0;
    xcr0 = read_xcr0();
    if ((xcr0 & XCR0_SSE_AVX) != XCR0_SSE_AVX) return 0;
    features |= ecx & bit_FMA ? SQZ_CPU_FMA : 0;
    features |= ecx & bit_F16C ? SQZ_CPU_F16C : 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return features;
    features |= ebx & bit_AVX2 ? SQZ_CPU_AVX2 : 0;
    if ((xcr0 & XCR0_AVX512) == XCR0_AVX512) {
        features |= ebx & bit_AVX512F ? SQZ_CPU_AVX512F : 0;
        features |= ebx & bit_AVX512BW ? SQZ_CPU_AVX512BW : 0;
        features |= ebx & bit_AVX512VL ? SQZ_CPU_AVX512VL : 0;
        features |= ebx & bit_AVX512DQ ? SQZ_CPU_AVX512DQ : 0;
        features |= ecx & bit_AVX512VNNI ? SQZ_CPU_AVX512VNNI : 0;
        features |= prefer_512();
    }
    return features;
}
#elif defined(__aarch64__)
static uint32_t detect(void)
{
    return SQZ_CPU_NEON;
}
#else
static uint32_t detect(void)
{
    return 0;
}
#endif

#ifdef SQZ_TEST
static uint32_t hidden_by_environment(void)
{
    static const struct {
        const char *name;
        uint32_t bits;
    } names[] = {
        {"avx2", SQZ_CPU_AVX2},         {"fma", SQZ_CPU_FMA},
        {"f16c", SQZ_CPU_F16C},         {"avx512f", SQZ_CPU_AVX512F},
        {"avx512bw", SQZ_CPU_AVX512BW}, {"avx512vl", SQZ_CPU_AVX512VL},
        {"avx512dq", SQZ_CPU_AVX512DQ}, {"prefer512", SQZ_CPU_PREFER_512},
        {"neon", SQZ_CPU_NEON},         {"avx512vnni", SQZ_CPU_AVX512VNNI},
    };
    const char *text = getenv("SQZ_DISABLE_CPU_FEATURES");
    uint32_t hidden = 0;

    while (text && *text) {
        const size_t length = strcspn(text, ",");
        size_t i = 0;

        while (i < sizeof names / sizeof names[0] &&
               !(strlen(names[i].name) == length && memcmp(names[i].name, text, length) == 0))
            i++;
        if (i == sizeof names / sizeof names[0]) {
            fprintf(stderr, "SQZ_DISABLE_CPU_FEATURES: unknown feature '%.*s'\n", (int)length, text);
            abort();
        }
        hidden |= names[i].bits;
        text += length + (text[length] == ',');
    }
    return hidden;
}
#else
static uint32_t hidden_by_environment(void)
{
    return 0;
}
#endif

uint32_t sqz_cpu_features(void)
{
    static const uint32_t known = UINT32_C(1) << 31; /* tells "asked, none found" from "not asked yet" */
    static _Atomic uint32_t cached;
    uint32_t features = atomic_load_explicit(&cached, memory_order_relaxed);

    if (!features) {
        /* Threads that race here all store the same value. */
        features = known | (detect() & ~hidden_by_environment());
        atomic_store_explicit(&cached, features, memory_order_relaxed);
    }
    return features & ~known;
}
