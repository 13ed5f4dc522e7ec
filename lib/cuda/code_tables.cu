/*
 * What a query reads of keys by their codes: the 16 numbers of every part
 * (lib/codes.h), and how far a key's logit may lie from its centroid's.
 *
 *   coordinate_i = direction_i . q
 *   table[p][e]  = scale log2 e * sum over the directions i of part p of coordinate_i book[e][i]
 *   deviation    = scale log2 e * sqrt(sum over i of coordinate_i^2 spread_i)
 *
 * Grid: query row. Everything it reads of a head is some 14 KB (M 48, D 128), and
 * nothing comes from the kernel before it, a lookup that was launched plainly: the
 * work is done in that one's shadow, and only the end waits for it.
 */
#include "code_parts.h"
#include "device.cuh"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / SQZ_WARP,
    ENTRIES = SQZ_CODE_ENTRIES,
    PARTS = SQZ_CODE_PARTS,
    MAX_DIRECTIONS = 256
};

__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

template <class Type> __global__ void __launch_bounds__(THREADS) tables_kernel(const sqz_cuda_code_tables a)
{
    typedef typename Type::element element;
    __shared__ float query[256], coordinate[MAX_DIRECTIONS];
    const uint32_t group = a.n_head / a.n_head_kv, row = blockIdx.x, pair = row / group, head = pair % a.n_head_kv;
    const uint32_t d = a.head_dim, m = a.codes.n_directions, n_words = a.codes.n_words;
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    const __half *directions = (const __half *)a.codes.directions + (size_t)head * m * d;
    const __half *book = (const __half *)a.codes.book + (size_t)head * ENTRIES * m;
    const uint32_t *first = a.codes.first + (size_t)head * (PARTS * n_words + 1);
    const float factor = a.scale * SQZ_LOG2E;
    sqz_let_next_start();
    if (threadIdx.x < d) query[threadIdx.x] = (float)((const element *)a.queries)[(size_t)row * d + threadIdx.x];
    __syncthreads();
#pragma unroll 4
    for (uint32_t i = warp; i < m; i += WARPS) {
        float dot = 0;
        for (uint32_t j = 2 * lane; j < d; j += 2 * SQZ_WARP) { /* d is even, rows start at even places */
            const float2 x = __half22float2(*(const __half2 *)(directions + (size_t)i * d + j));
            dot += x.x * query[j] + x.y * query[j + 1];
        }
        dot = warp_sum(dot);
        if (lane == 0) coordinate[i] = dot;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < n_words * SQZ_CODE_TABLE; i += THREADS) {
        const uint32_t part = i / ENTRIES, entry = i % ENTRIES, word = part / PARTS;
        float sum = 0;
        for (uint32_t j = first[part]; j < first[part + 1]; j++) sum += coordinate[j] * (float)book[entry * m + j];
        a.tables[(((size_t)pair * n_words + word) * group + row % group) * SQZ_CODE_TABLE + i % SQZ_CODE_TABLE] =
            factor * sum;
    }
    if (warp == 0) {
        float variance = 0, norm = 0;
        for (uint32_t i = lane; i < m; i += SQZ_WARP)
            variance += coordinate[i] * coordinate[i] * a.codes.spread[(size_t)head * m + i];
        for (uint32_t i = lane; i < d; i += SQZ_WARP) norm += query[i] * query[i];
        variance = warp_sum(variance);
        norm = warp_sum(norm);
        const float gain = a.variance_gain ? a.variance_gain[head] : 0.0f;
        if (lane == 0) a.reach[row] = {factor * sqrtf(variance), sqz_spread_factor(gain, a.scale, d, norm) * SQZ_LOG2E};
    }
    sqz_wait_for_previous(); /* who waits for this kernel waits for the lookup, too */
}

} // namespace

extern "C" enum sqz_status sqz_cuda_code_tables_launch(const struct sqz_cuda_code_tables *a, bool after_ours,
                                                       void *stream)
{
    return sqz_launch(a->type == SQZ_ROW_F16 ? tables_kernel<sqz_f16> : tables_kernel<sqz_bf16>,
                      dim3(a->n_sequences * a->n_head), THREADS, 0, 1, after_ours, *a, stream);
}
