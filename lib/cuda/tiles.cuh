/*
 * Tiles of 16-bit rows in shared memory for mma.sync, sm_80 and newer: rows of
 * D numbers, padded to a power of two of 16-byte chunks; chunk c of row r is at
 * c ^ (r % 8), so that neither the copies nor ldmatrix meet in a bank.
 */
#ifndef SQZ_LIB_CUDA_TILES_CUH
#define SQZ_LIB_CUDA_TILES_CUH

#include "device.cuh"

template <int D> struct sqz_tile {
    static const int chunks = D / 8, stride = (D <= 64 ? 8 : D <= 128 ? 16 : 32) * 16; /* bytes a row */
    static_assert(D % 16 == 0 && D <= 256, "rows of whole fragments");
    static __device__ __forceinline__ uint32_t at(uint32_t tile, int row, int chunk)
    {
        return tile + row * stride + ((chunk ^ (row & 7)) << 4);
    }
};

/* 16 bytes into shared memory; zeros where !exists, whose address is not looked at. */
__device__ __forceinline__ void sqz_copy16(uint32_t to, const void *from, bool exists)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void sqz_copy16_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> __device__ __forceinline__ void sqz_copy16_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ float2 sqz_load_shared8(uint32_t from)
{
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from) : "memory");
    return x;
}
__device__ __forceinline__ void sqz_fragments(uint32_t (&x)[4], uint32_t from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(from)
                 : "memory");
}
__device__ __forceinline__ void sqz_fragments_transposed(uint32_t (&x)[4], uint32_t from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(from)
                 : "memory");
}

/* s (16 x BN of a warp) = rows row0.. of tile a times the BN rows of tile b. s[4 j + i]: as an accumulator of block j. */
template <class Type, int D, int BN>
__device__ __forceinline__ void sqz_tile_products(float (&s)[BN / 2], uint32_t a, int row0, uint32_t b)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < BN / 2; i++) s[i] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t x[4];
        sqz_fragments(x, sqz_tile<D>::at(a, row0 + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int j = 0; j < BN / 16; j++) {
            uint32_t y[4];
            sqz_fragments(y, sqz_tile<D>::at(b, 16 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            sqz_mma<Type>(*(float(*)[4])(s + 8 * j), x[0], x[1], x[2], x[3], y[0], y[1]);
            sqz_mma<Type>(*(float(*)[4])(s + 8 * j + 4), x[0], x[1], x[2], x[3], y[2], y[3]);
        }
    }
}

#endif
