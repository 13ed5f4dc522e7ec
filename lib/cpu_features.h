/*
 * What the CPU and the operating system can do, asked once.
 *
 * On x86-64 the bit of a vector extension is set only when CPUID reports the
 * extension and the OS saves its registers (XCR0), so a set bit means that the
 * instructions may be executed. Whether that is a good idea is a separate bit:
 * PREFER_512.
 *
 * Test builds (macro SQZ_TEST) can hide extensions: the environment variable
 * SQZ_DISABLE_CPU_FEATURES holds names out of "avx2,fma,f16c,avx512f,avx512bw,
 * avx512vl,avx512dq,avx512vnni,prefer512,neon", comma separated; an unknown name aborts.
 * Other builds do not read the environment.
 */
#ifndef SQZ_LIB_CPU_FEATURES_H
#define SQZ_LIB_CPU_FEATURES_H

#include <stdint.h>

enum {
    SQZ_CPU_AVX2 = 1 << 0,
    SQZ_CPU_FMA = 1 << 1,
    SQZ_CPU_F16C = 1 << 2,
    SQZ_CPU_AVX512F = 1 << 3,
    SQZ_CPU_AVX512BW = 1 << 4,
    SQZ_CPU_AVX512VL = 1 << 5,
    SQZ_CPU_AVX512DQ = 1 << 6,
    SQZ_CPU_PREFER_512 = 1 << 7, /* 512-bit vectors do not slow down the code around them */
    SQZ_CPU_NEON = 1 << 8,       /* every 64-bit ARM CPU has it */
    SQZ_CPU_AVX512VNNI = 1 << 9,

    SQZ_CPU_ALL_AVX2 = SQZ_CPU_AVX2 | SQZ_CPU_FMA | SQZ_CPU_F16C,
    SQZ_CPU_ALL_AVX512 = SQZ_CPU_ALL_AVX2 | SQZ_CPU_AVX512F | SQZ_CPU_AVX512BW | SQZ_CPU_AVX512VL | SQZ_CPU_AVX512DQ
};

/* Bits of the enum above; 0 on other machines than x86-64 and 64-bit ARM. Thread-safe. */
uint32_t sqz_cpu_features(void);

#endif
