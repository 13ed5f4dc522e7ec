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

/* The number whose 4 bits are the lower ones of byte b of a plane's row; the upper ones are of the number 16 on. */
__device__ __forceinline__ int sqz_plane_number(int b)
{
    return b / 16 * 32 + b % 16;
}

#endif
