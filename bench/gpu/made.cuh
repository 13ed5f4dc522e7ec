/* What the timings of bench/gpu/ share: memory, and numbers that are made, the same on every machine. */
#ifndef SQZ_BENCH_GPU_MADE_CUH
#define SQZ_BENCH_GPU_MADE_CUH

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

namespace
{

void check(cudaError_t e, const char *what)
{
    if (e == cudaSuccess) return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(e));
    exit(1);
}
#define CHECK(call) check(call, #call)

template <class T> T *device(size_t n)
{
    void *p = NULL;
    CHECK(cudaMalloc(&p, n * sizeof(T)));
    return (T *)p;
}

__device__ __host__ inline uint32_t mixed(uint64_t x)
{
    x ^= x >> 31, x *= 0x9e3779b97f4a7c15ull, x ^= x >> 29, x *= 0xbf58476d1ce4e5b9ull, x ^= x >> 32;
    return (uint32_t)x;
}

/* About normal: four bytes added up. */
__device__ __host__ inline float normal(uint64_t seed, uint64_t i)
{
    const uint32_t x = mixed(seed * 0x100000001b3ull + i);
    const int sum = (int)(x & 255) + (int)(x >> 8 & 255) + (int)(x >> 16 & 255) + (int)(x >> 24);
    return ((float)sum - 510.0f) / 147.8f;
}

__global__ void noise_kernel(__half *to, uint64_t n, uint64_t seed, float scale)
{
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < n; i += (uint64_t)gridDim.x * blockDim.x)
        to[i] = __float2half(scale * normal(seed, i));
}

} // namespace

#endif
