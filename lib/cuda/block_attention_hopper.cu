/*
 * Attention of a block of tokens on Hopper (sm_90a): online softmax
 * (arXiv 1805.02867) over tiles of keys, both products as wgmma.
 *
 * Math: logits S = scale Q K^T in base 2, running maximum and sum per row,
 * O = sum of 2^(S - maximum) V / sum.
 * Grid: x the block of 128 query rows, y the KV head, z the split of its list.
 * Warpgroup 0 copies, warpgroups 1 and 2 hold 64 query rows each. While a
 * tile's weights are multiplied with its values the next tile's logits are
 * made and exponentiated.
 * Copies: one tensor copy for a group of 8 retained rows (8 D 2 bytes), straight
 * into the swizzled tile, so a gathered tile costs what a contiguous one does;
 * rows beyond the end and groups beyond the list come as zeros, never as what
 * happens to be in memory (0 times NaN).
 * Shared memory: 2 * 64 * D * 2 bytes of queries + STAGES * 2 * BN * D * 2 of keys
 * and values + barriers: 160 KiB at D 128 (BN 128, 2 stages).
 * Layout of a tile: [BN / 8 groups][D / 64][8 rows][128 bytes].
 * Head sizes: 64, 128, 256, not causal. The rest is block_attention.cu's.
 */
#include "block_attention.cuh"
#include "hopper.cuh"

namespace {

template <int D>
struct tiles {
    static const int bn = D == 256 ? 64 : 128, stages = D == 64 ? 3 : 2;
    static const int tile_bytes = bn * D * 2, query_bytes = 64 * D * 2;
    static const size_t shared_bytes = 1024 + 2 * query_bytes + (size_t)stages * 2 * tile_bytes + 256;
};

struct hopper_args {
    sqz_block_attention_params p;
    CUtensorMap keys, values;
};

#ifdef SQZ_HOPPER_CODE

template <class Type, int D, int BN>
__device__ __forceinline__ void logits(float (&s)[BN / 2], const char *queries, const char *keys)
{
    /* Queries: [D / 64][64 rows][128 bytes]. */
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        const uint64_t a = sqz_operand(queries + (k / 4) * 8192 + (k % 4) * 32, 16, 1024);
        const uint64_t b = sqz_operand(keys + (k / 4) * 1024 + (k % 4) * 32, 16, 8 * D * 2);
        sqz_wgmma_ss<Type, BN>(s, a, b, k > 0);
    }
}

template <class Type, int D, int BN>
__device__ __forceinline__ void weigh(float (&o)[D / 2], const uint32_t (&w)[BN / 4], const char *values)
{
#pragma unroll
    for (int k = 0; k < BN / 16; k++) {
        const uint64_t b = sqz_operand(values + k * 2 * 8 * D * 2, 1024, 8 * D * 2);
        sqz_wgmma_rs<Type, D>(o, w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3], b, 1);
    }
}

template <class Type, int BN>
__device__ __forceinline__ void pack(uint32_t (&w)[BN / 4], const float (&s)[BN / 2])
{
#pragma unroll
    for (int i = 0; i < BN / 4; i++) w[i] = Type::pack(s[2 * i], s[2 * i + 1]);
}

#endif

template <class Type, int D>
__global__ void __launch_bounds__(384, 1) attend_block_hopper(const __grid_constant__ hopper_args args)
{
#ifdef SQZ_HOPPER_CODE
    typedef tiles<D> L;
    constexpr int BN = L::bn, STAGES = L::stages;
    extern __shared__ char raw[];
    char *const shared = (char *)(((uintptr_t)raw + 1023) & ~(uintptr_t)1023);
    char *const keys = shared + 2 * L::query_bytes, *const values = keys + STAGES * L::tile_bytes;
    uint64_t *const key_full = (uint64_t *)(values + STAGES * L::tile_bytes), *const value_full = key_full + STAGES,
                    *const key_free = value_full + STAGES, *const value_free = key_free + STAGES;
    const sqz_block_attention_params &p = args.p;
    const uint32_t head = blockIdx.y, split = blockIdx.z;
    const int warpgroup = threadIdx.x / 128;
    uint32_t n_groups, n_columns;
    sqz_block_count(p, head, &n_groups, &n_columns);
    const uint32_t n_tiles = (n_groups + BN / 8 - 1) / (BN / 8);
    const uint32_t first = (uint32_t)((uint64_t)n_tiles * split / p.n_splits),
                   last = (uint32_t)((uint64_t)n_tiles * (split + 1) / p.n_splits);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            sqz_barrier_init(key_full + i, 1);
            sqz_barrier_init(value_full + i, 1);
            sqz_barrier_init(key_free + i, 256);
            sqz_barrier_init(value_free + i, 256);
        }
        sqz_barrier_init_done();
    }
    __syncthreads();
    if (warpgroup == 0) {
        sqz_registers_less<24>();
        if (threadIdx.x < 32) {
            const uint32_t lane = threadIdx.x, beyond = (p.n_rows + 7) / 8;
            const uint32_t *const list = p.groups ? p.groups + (size_t)head * p.group_capacity : NULL;
            int stage = 0;
            uint32_t parity = 1;
            for (uint32_t tile = first; tile < last; tile++) {
                const uint32_t g = tile * (BN / 8) + lane;
                uint32_t from = beyond;
                if (lane < BN / 8 && g < n_groups) from = list ? list[g] : g;
                sqz_barrier_wait(key_free + stage, parity);
                if (lane == 0) sqz_barrier_expect(key_full + stage, L::tile_bytes);
                __syncwarp();
                if (lane < BN / 8)
                    sqz_copy_rows(keys + stage * L::tile_bytes + lane * 8 * D * 2, &args.keys, (int)from * 8,
                                  (int)head, key_full + stage);
                sqz_barrier_wait(value_free + stage, parity);
                if (lane == 0) sqz_barrier_expect(value_full + stage, L::tile_bytes);
                __syncwarp();
                if (lane < BN / 8)
                    sqz_copy_rows(values + stage * L::tile_bytes + lane * 8 * D * 2, &args.values, (int)from * 8,
                                  (int)head, value_full + stage);
                if (++stage == STAGES) {
                    stage = 0;
                    parity ^= 1;
                }
            }
        }
    } else {
        sqz_registers_more<240>();
        const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
        const uint32_t row0 = blockIdx.x * SQZ_BLOCK_QUERY_ROWS + (warpgroup - 1) * 64;
        char *const queries = shared + (warpgroup - 1) * L::query_bytes;
        for (int i = thread; i < 64 * D / 8; i += 128) {
            const int r = i / (D / 8), c = i % (D / 8);
            uint4 x = make_uint4(0, 0, 0, 0);
            if (row0 + r < p.n_query_rows)
                x = *(const uint4 *)((const char *)p.queries + (sqz_block_row(p, head, row0 + r) * D + c * 8) * 2);
            *(uint4 *)(queries + (c / 8) * 8192 + r * 128 + ((c % 8) ^ (r % 8)) * 16) = x;
        }
        sqz_stores_to_async();
        asm volatile("bar.sync %0, 128;" ::"r"(warpgroup) : "memory");

        float s[BN / 2], o[D / 2], maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, factor[2];
        uint32_t w[BN / 4];
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = 0.0f;
        int stage = 0;
        uint32_t parity = 0;
        if (first < last) {
            sqz_barrier_wait(key_full, 0);
            sqz_hold(s);
            sqz_wgmma_begin();
            logits<Type, D, BN>(s, queries, keys);
            sqz_wgmma_commit();
            sqz_wgmma_wait<0>();
            sqz_hold(s);
            sqz_barrier_arrive(key_free);
            const int n_first = (int)min((uint32_t)BN, n_columns - first * BN);
            sqz_block_soften<BN>(s, maximum, sum, factor, p.scale_log2, n_first, n_first);
            pack<Type, BN>(w, s);
            for (uint32_t tile = first + 1; tile < last; tile++) {
                int next = stage + 1;
                uint32_t next_parity = parity;
                if (next == STAGES) {
                    next = 0;
                    next_parity ^= 1;
                }
                sqz_barrier_wait(key_full + next, next_parity);
                sqz_hold(s);
                sqz_hold(o);
                sqz_wgmma_begin();
                logits<Type, D, BN>(s, queries, keys + next * L::tile_bytes);
                sqz_wgmma_commit();
                sqz_barrier_wait(value_full + stage, parity);
                weigh<Type, D, BN>(o, w, values + stage * L::tile_bytes);
                sqz_wgmma_commit();
                sqz_wgmma_wait<1>();
                sqz_hold(s);
                sqz_barrier_arrive(key_free + next);
                const int n = (int)min((uint32_t)BN, n_columns - tile * BN);
                sqz_block_soften<BN>(s, maximum, sum, factor, p.scale_log2, n, n);
                sqz_wgmma_wait<0>();
                sqz_hold(o);
                sqz_barrier_arrive(value_free + stage);
                pack<Type, BN>(w, s);
#pragma unroll
                for (int i = 0; i < D / 2; i++) o[i] *= factor[i / 2 % 2];
                stage = next;
                parity = next_parity;
            }
            sqz_barrier_wait(value_full + stage, parity);
            sqz_hold(o);
            sqz_wgmma_begin();
            weigh<Type, D, BN>(o, w, values + stage * L::tile_bytes);
            sqz_wgmma_commit();
            sqz_wgmma_wait<0>();
            sqz_hold(o);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float l = sum[r];
            l += __shfl_xor_sync(~0u, l, 1);
            l += __shfl_xor_sync(~0u, l, 2);
            const uint32_t row = row0 + thread / 32 * 16 + lane / 4 + 8 * r;
            if (row >= p.n_query_rows) continue;
            const size_t at = sqz_block_row(p, head, row);
            const float inverse = l > 0 ? 1.0f / l : 0.0f;
            if (p.out) {
#pragma unroll
                for (int j = 0; j < D / 8; j++)
                    sqz_block_store<Type>(p, split, at, D, 8 * j + 2 * (lane % 4), o[4 * j + 2 * r] * inverse,
                                          o[4 * j + 2 * r + 1] * inverse);
            }
            if (lane % 4 == 0)
                sqz_block_store_lse(p, split, at, l > 0 ? maximum[r] * p.scale_log2 + log2f(l) : -INFINITY);
        }
    }
#endif
}

template <class Type, int D>
enum sqz_status launch(const sqz_block_attention_params &p, enum sqz_cuda_type type, void *stream)
{
    if (!sqz_hopper_kernel((const void *)attend_block_hopper<Type, D>)) return SQZ_ERROR_UNSUPPORTED;
    hopper_args args;
    args.p = p;
    const uint32_t n_head_kv = p.n_head / p.group;
    if (!sqz_tensor_map(&args.keys, type, p.keys, n_head_kv, p.head_rows, p.n_rows, D, 8) ||
        !sqz_tensor_map(&args.values, type, p.values, n_head_kv, p.head_rows, p.n_rows, D, 8))
        return SQZ_ERROR_UNSUPPORTED;
    const dim3 grid((p.n_query_rows + SQZ_BLOCK_QUERY_ROWS - 1) / SQZ_BLOCK_QUERY_ROWS, n_head_kv, p.n_splits);
    return sqz_launch(attend_block_hopper<Type, D>, grid, 384, tiles<D>::shared_bytes, 1, false, args, stream);
}

} // namespace

bool sqz_block_attention_hopper_has(uint32_t head_dim, bool causal)
{
    return !causal && (head_dim == 64 || head_dim == 128 || head_dim == 256);
}

enum sqz_status sqz_block_attention_hopper(const sqz_block_attention_params &p, enum sqz_cuda_type type,
                                           uint32_t head_dim, void *stream)
{
    const bool f16 = type == SQZ_CUDA_F16;
    switch (head_dim) {
    case 64: return f16 ? launch<sqz_f16, 64>(p, type, stream) : launch<sqz_bf16, 64>(p, type, stream);
    case 128: return f16 ? launch<sqz_f16, 128>(p, type, stream) : launch<sqz_bf16, 128>(p, type, stream);
    case 256: return f16 ? launch<sqz_f16, 256>(p, type, stream) : launch<sqz_bf16, 256>(p, type, stream);
    }
    return SQZ_ERROR_UNSUPPORTED;
}
