/* Rows in planes, inside kernels: turning, and where a number lies. */
#ifndef SQZ_LIB_CUDA_PLANES_CUH
#define SQZ_LIB_CUDA_PLANES_CUH

#include "device.cuh"
#include "planes.h"

/* Numbers that are turned together: the largest power of two that divides D. */
template <int D> struct sqz_turn_run {
    enum { LENGTH = D & -D };
};

/* Turns the D numbers of a warp, lane l has numbers l + 32 j; its own inverse. */
template <int D> __device__ __forceinline__ void sqz_turn_warp(float (&x)[D / 32])
{
    const int lane = threadIdx.x % SQZ_WARP;
#pragma unroll
    for (int step = 1; step < SQZ_WARP; step *= 2)
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
            const float other = __shfl_xor_sync(~0u, x[j], step);
            x[j] = lane & step ? other - x[j] : x[j] + other;
        }
#pragma unroll
    for (int step = 1; step < sqz_turn_run<D>::LENGTH / 32; step *= 2)
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
            if (j & step) continue;
            const float a = x[j], b = x[j + step];
            x[j] = a + b;
            x[j + step] = a - b;
        }
    const float norm = rsqrtf((float)sqz_turn_run<D>::LENGTH);
#pragma unroll
    for (int j = 0; j < D / 32; j++) x[j] *= norm;
}

__device__ __forceinline__ float sqz_f16_number(uint16_t bits)
{
    return __half2float(__ushort_as_half(bits));
}

/* Numbers lane + 32 j of a row of planes, turned: without their step. */
template <int D>
__device__ __forceinline__ void sqz_plane_unpack(float (&x)[D / 32], const uint8_t *upper, const uint8_t *lower)
{
    const int lane = threadIdx.x % SQZ_WARP;
#pragma unroll
    for (int j = 0; j < D / 32; j++) {
        const int at = 16 * j + lane % 16, shift = lane / 16 * 4;
        const int u = upper[at] >> shift & 15;
        x[j] = lower ? (float)(16 * u + (lower[at] >> shift & 15)) - 127.5f : (float)u - 7.5f;
    }
}

/* Numbers lane + 32 j of row number `at` of keys and values, relative to what they are relative to. steps: the row's. */
template <int D>
__device__ __forceinline__ void sqz_plane_row(float (&key)[D / 32], float (&value)[D / 32],
                                              const sqz_cuda_plane_layer &l, uint32_t steps, float value_unit,
                                              size_t at)
{
    auto turned = [at](float(&x)[D / 32], const sqz_cuda_planes &p, float step) {
        sqz_plane_unpack<D>(x, p.upper + at * (D / 2), p.lower ? p.lower + at * (D / 2) : NULL);
        sqz_turn_warp<D>(x);
        step *= p.lower ? 0.0625f : 1.0f;
#pragma unroll
        for (int j = 0; j < D / 32; j++) x[j] *= step;
    };
    turned(key, l.keys, sqz_f16_number((uint16_t)steps));
    turned(value, l.values, sqz_f16_number((uint16_t)(steps >> 16)) * value_unit);
}

/* The number whose 4 bits are the lower ones of byte b of a plane's row; the upper ones are of the number 16 on. */
__device__ __forceinline__ int sqz_plane_number(int b)
{
    return b / 16 * 32 + b % 16;
}

#endif
