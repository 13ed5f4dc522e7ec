/*
 * Tiles of 16 rows as operands of the tensor core (sqz_mma_chunk), F16, BF16 or
 * INT8, straight from 16-byte (8-byte) loads.
 */
#ifndef SQZ_LIB_CUDA_ROW_TILES_CUH
#define SQZ_LIB_CUDA_ROW_TILES_CUH

#include "device.cuh"

/* Rows as tiles of 16: a lane loads parts of row `low` and row `high`. */
template <class Type, int D> struct sqz_half_rows {
    uint4 low[D / 32], high[D / 32];
    __device__ __forceinline__ void load(const typename Type::element *rows, size_t low_row, size_t high_row,
                                         bool has_low, bool has_high, int t)
    {
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
            low[j] = sqz_load_once(rows + low_row * D + 8 * (t + 4 * j), has_low);
            high[j] = sqz_load_once(rows + high_row * D + 8 * (t + 4 * j), has_high);
        }
    }
    __device__ __forceinline__ void product(float (&c)[4], const uint4 (&query)[D / 32]) const
    {
#pragma unroll
        for (int j = 0; j < D / 32; j++) sqz_mma_chunk<Type>(c, low[j], high[j], query[j]);
    }
};

/* Four INT8 numbers as two pairs of the type; integers of 8 bits are exact in both. */
template <class Type> __device__ __forceinline__ uint2 sqz_widen(uint32_t four)
{
    if (std::is_same<Type, sqz_f16>::value) {
        /* The same of F16, 2^10 + x + 128: half the instructions. */
        const uint32_t raised = four ^ 0x80808080u;
        uint2 two = make_uint2(__byte_perm(raised, 0x64646464u, 0x4140), __byte_perm(raised, 0x64646464u, 0x4342));
        __half2 low, high;
        memcpy(&low, &two.x, sizeof low);
        memcpy(&high, &two.y, sizeof high);
        const __half2 bias = __half2half2(__ushort_as_half(0x6480)); /* 1152 */
        low = __hsub2(low, bias), high = __hsub2(high, bias);
        memcpy(&two.x, &low, sizeof low);
        memcpy(&two.y, &high, sizeof high);
        return two;
    }
    /* x + 128 as the low byte of 2^23 + x + 128, from which the constant is subtracted. */
    const uint32_t raised = four ^ 0x80808080u;
    const float bias = 8388608.0f + 128.0f;
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = __uint_as_float(__byte_perm(raised, 0x4b000000u, 0x7440 + i)) - bias;
    return make_uint2(Type::pack(x[0], x[1]), Type::pack(x[2], x[3]));
}

template <class Type, int D> struct sqz_int8_rows {
    uint2 low[D / 32], high[D / 32];
    __device__ __forceinline__ void load(const int8_t *rows, size_t low_row, size_t high_row, bool has_low,
                                         bool has_high, int t)
    {
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
            low[j] = sqz_load_once8(rows + low_row * D + 8 * (t + 4 * j), has_low);
            high[j] = sqz_load_once8(rows + high_row * D + 8 * (t + 4 * j), has_high);
        }
    }
    static __device__ __forceinline__ uint4 widened(uint2 eight)
    {
        const uint2 a = sqz_widen<Type>(eight.x), b = sqz_widen<Type>(eight.y);
        return make_uint4(a.x, a.y, b.x, b.y);
    }
    __device__ __forceinline__ void product(float (&c)[4], const uint4 (&query)[D / 32]) const
    {
#pragma unroll
        for (int j = 0; j < D / 32; j++) sqz_mma_chunk<Type>(c, widened(low[j]), widened(high[j]), query[j]);
    }
};

/* The squared norm of query row t of each lane's own columns 2t and 2t + 1, and any other sum that lanes hold a part of
 * for query row g: reduced over the four lanes of a row, then fetched for the columns. */
__device__ __forceinline__ float2 sqz_for_columns(float part, int t)
{
    part += __shfl_xor_sync(~0u, part, 1);
    part += __shfl_xor_sync(~0u, part, 2);
    return make_float2(__shfl_sync(~0u, part, 8 * t), __shfl_sync(~0u, part, 8 * t + 4));
}

#endif
