/*
 * The keys of opened clusters and their estimates, as every kernel that goes
 * through them does: e = logit of the key's centroid + one number of every part
 * of its code (lib/codes.h).
 *
 * A warp takes 32 clusters at a time, one a lane. The keys of those that are
 * opened, one after the other as if they were neighbours, are dealt to the lanes
 * 32 at a time, so that no lane goes idle for a closed cluster. Tables are in
 * shared memory: lanes that ask one part of 16 numbers for different ones meet
 * different banks, those that ask for the same one are served together.
 */
#ifndef SQZ_LIB_CUDA_LOOKUP_CODES_CUH
#define SQZ_LIB_CUDA_LOOKUP_CODES_CUH

#include "device.cuh"

enum { SQZ_CODES_THREADS = 256, SQZ_CODES_WARPS = SQZ_CODES_THREADS / SQZ_WARP };

/* Where a block stands: a pair's clusters 32 at a time, a unit, every n_splits * WARPS-th of which is a warp's. */
struct sqz_codes_place {
    uint32_t pair, head, split, n_clusters, n_units;
    /* A unit is four runs of 8 clusters a quarter of the pair's apart: neighbours are alike, and opened together, so
     * 32 in a row would leave some warps with much more to do than others. sqz_opened_bit() is the way back. */
    __device__ __forceinline__ uint32_t cluster(uint32_t unit, int lane) const
    {
        return lane / 8 * 8 * n_units + 8 * unit + lane % 8;
    }
};

__device__ __forceinline__ sqz_codes_place sqz_codes_here(const sqz_cuda_lookup_codes &a)
{
    const uint32_t n_pairs = a.n_head_kv * a.n_sequences, n = a.offsets.n_clusters[a.offsets.level];
    const uint32_t pair = blockIdx.x % n_pairs; /* pairs side by side: they open unequal amounts */
    return {pair, pair % a.n_head_kv, blockIdx.x / n_pairs, n, (n + SQZ_WARP - 1) / SQZ_WARP};
}

/* Where a plan's numbers for a pair are. */
__device__ __forceinline__ size_t sqz_plan_place(const sqz_cuda_lookup_codes &a, const sqz_codes_place &here)
{
    return (size_t)here.pair / a.n_head_kv * a.plan_stride + here.head;
}

/* What a warp has in shared memory: of its opened clusters in order, the first key, less the keys dealt before it, and
 * the logits of their centroids. Q: the query rows of a group, rounded up. */
template <int Q> struct sqz_codes_unit {
    uint32_t start[SQZ_WARP];
    float logit[Q][SQZ_WARP];
};

/* Copies the tables of a pair's queries, [W][G][8][16], to shared memory; the caller synchronises. */
__device__ __forceinline__ void sqz_codes_tables(float *shared, const sqz_cuda_lookup_codes &a, uint32_t pair)
{
    const uint32_t n = a.codes.n_words * a.group * SQZ_CODE_TABLE;
    const float4 *from = (const float4 *)(a.tables + (size_t)pair * n);
    for (uint32_t i = threadIdx.x; i < n / 4; i += SQZ_CODES_THREADS) ((float4 *)shared)[i] = from[i];
}

static inline size_t sqz_codes_table_bytes(const struct sqz_cuda_lookup_codes *a)
{
    return (size_t)a->codes.n_words * a->group * SQZ_CODE_TABLE * sizeof(float);
}

/* log2 of the denominator of query row r of the pair, from `n` parts of this level and what was known before; a warp.
 * Four parts a lane are asked for together: every block waits for this before it can begin. */
__device__ __forceinline__ float sqz_codes_total(const sqz_cuda_lookup_codes &a, const sqz_cuda_part *parts, uint32_t n,
                                                 uint32_t pair, uint32_t r)
{
    const uint32_t lane = threadIdx.x % SQZ_WARP, all = n + a.n_base + a.n_closed;
    const float2 *level = (const float2 *)parts + (size_t)pair * n * a.group + r;
    const float2 *base = (const float2 *)a.base_parts + (size_t)pair * a.n_base * a.group + r;
    const float2 *closed = (const float2 *)a.closed_parts + (size_t)pair * a.closed_stride * a.group + r;
    sqz_softmax_state s = sqz_softmax_empty();
    for (uint32_t first = lane; first < all; first += 4 * SQZ_WARP) {
        float2 part[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t i = first + j * SQZ_WARP;
            part[j] = make_float2(-INFINITY, 0.0f);
            if (i < n) part[j] = level[(size_t)i * a.group];
            else if (i < n + a.n_base) part[j] = base[(size_t)(i - n) * a.group];
            else if (i < all) part[j] = closed[(size_t)(i - n - a.n_base) * a.group];
        }
#pragma unroll
        for (int j = 0; j < 4; j++) s = sqz_softmax_merged(s, {part[j].x, part[j].y});
    }
#pragma unroll
    for (int step = 16; step; step /= 2) {
        sqz_softmax_state other;
        other.maximum = __shfl_xor_sync(~0u, s.maximum, step);
        other.sum = __shfl_xor_sync(~0u, s.sum, step);
        s = sqz_softmax_merged(s, other);
    }
    return sqz_softmax_log2(s);
}

/* Whether a group has query row r of the Q that a kernel is compiled for. */
template <int Q> __device__ __forceinline__ bool sqz_codes_has(const sqz_cuda_lookup_codes &a, int r)
{
    return Q <= 2 || r < a.group;
}

/* A lane's cluster, and y: its logits as the lookup left them. */
template <int Q> struct sqz_codes_cluster {
    uint32_t begin, end;
    float variance, y[Q];

    __device__ __forceinline__ void load(const sqz_cuda_lookup_codes &a, const sqz_codes_place &here, uint32_t cluster,
                                         bool exists)
    {
        begin = end = 0;
        variance = 0;
        if (exists) {
            const uint32_t *offset = a.offsets.offset[a.offsets.level] + (size_t)here.head * (here.n_clusters + 1);
            begin = offset[cluster];
            end = offset[cluster + 1];
            if (a.variance) variance = a.variance[(size_t)here.head * here.n_clusters + cluster];
        }
        const float *logit = a.logit + ((size_t)here.pair * here.n_clusters + cluster) * a.group;
#pragma unroll
        for (int r = 0; r < Q; r++) y[r] = exists && sqz_codes_has<Q>(a, r) ? logit[r] : 0.0f;
    }
    /* Without the correction for its variance. */
    __device__ __forceinline__ float plain(int r, const float *gain) const
    {
        return y[r] - gain[r] * variance;
    }
};

/* Adds to e what the 8 codes of a word say; table: [G][8][16] shared. */
template <int Q>
__device__ __forceinline__ void sqz_add_codes(float (&e)[Q], uint32_t word, const float *table,
                                              const sqz_cuda_lookup_codes &a)
{
    /* Of the number in its part, the code times 4: four of every other code side by side, then a byte of those. */
    const uint32_t even = word << 2 & 0x3c3c3c3cu, odd = word >> 2 & 0x3c3c3c3cu;
    uint32_t at_byte[8];
#pragma unroll
    for (int p = 0; p < 8; p++) at_byte[p] = __byte_perm(p % 2 ? odd : even, 0, 0x4440 + p / 2);
#pragma unroll
    for (int r = 0; r < Q; r++) {
        if (!sqz_codes_has<Q>(a, r)) break;
        float x[8];
#pragma unroll
        for (int p = 0; p < 8; p++)
            x[p] = *(const float *)((const char *)(table + r * SQZ_CODE_TABLE + 16 * p) + at_byte[p]);
        e[r] += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
    }
}

/* gain: [G] shared. Calls each(key, exists, rank, e) for the keys of the unit's opened clusters, by all lanes together:
 * the key counted from n_fixed, whether the lane has one, which of the opened clusters holds it, and its estimates in
 * base 2. W: words of a code, rounded up. */
template <int Q, int W, class Each>
__device__ __forceinline__ void sqz_each_key(const sqz_cuda_lookup_codes &a, uint32_t head, const float *tables,
                                             sqz_codes_unit<Q> &unit, uint32_t opened,
                                             const sqz_codes_cluster<Q> &cluster, const float *gain, Each each)
{
    enum { BATCH = Q <= 2 ? 2 : 1 }; /* times 32 keys are on their way while as many are computed with */
    const int lane = threadIdx.x % SQZ_WARP;
    const bool open = opened >> lane & 1;
    const uint32_t size = open ? cluster.end - cluster.begin : 0, up_to_me = (2u << lane) - 1;
    uint32_t inclusive = size;
#pragma unroll
    for (int step = 1; step < SQZ_WARP; step *= 2) {
        const uint32_t before = __shfl_up_sync(~0u, inclusive, step);
        if (lane >= step) inclusive += before;
    }
    const uint32_t n_keys = __shfl_sync(~0u, inclusive, SQZ_WARP - 1), dealt = inclusive - size;
    __syncwarp();
    if (open) {
        const int rank = __popc(opened & (up_to_me >> 1));
        unit.start[rank] = cluster.begin - dealt;
#pragma unroll
        for (int r = 0; r < Q; r++)
            if (sqz_codes_has<Q>(a, r)) unit.logit[r][rank] = cluster.plain(r, gain);
    }
    __syncwarp();

    const uint32_t all_keys = a.n_rows - a.n_fixed, begins_at = open ? dealt : ~0u;
    const uint32_t *words[W];
#pragma unroll
    for (int w = 0; w < W; w++) words[w] = a.codes.words + ((size_t)head * a.codes.n_words + w) * all_keys;
#pragma unroll
    for (int w = 0; w < W; w++) asm("" : "+l"(words[w])); /* kept as it is: else it is made again for every key */
    uint32_t n_before = ~0u, rank[BATCH], key[BATCH], word[BATCH][W], next_rank[BATCH], next_key[BATCH];
    uint32_t next_word[BATCH][W];
    /* Every lane's keys among those from `at` on, and their codes: on their way while those before are worked on. */
    auto deal = [&](uint32_t at) {
#pragma unroll
        for (int i = 0; i < BATCH; i++, at += SQZ_WARP) {
            if (at >= n_keys) break;
            uint32_t begins; /* of the clusters among these keys; a shift by more than 31 gives 0 */
            asm("shl.b32 %0, 1, %1;" : "=r"(begins) : "r"(begins_at - at));
            begins = __reduce_or_sync(~0u, begins);
            next_rank[i] = n_before + __popc(begins & up_to_me);
            n_before += __popc(begins);
            next_key[i] = unit.start[next_rank[i]] + at + lane;
            const bool exists = at + lane < n_keys;
#pragma unroll
            for (int w = 0; w < W; w++)
                next_word[i][w] = exists && (w == 0 || w < a.codes.n_words) ? __ldg(words[w] + next_key[i]) : 0;
        }
    };
    deal(0);
    for (uint32_t at = 0; at < n_keys; at += BATCH * SQZ_WARP) {
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            rank[i] = next_rank[i];
            key[i] = next_key[i];
#pragma unroll
            for (int w = 0; w < W; w++) word[i][w] = next_word[i][w];
        }
        deal(at + BATCH * SQZ_WARP);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const uint32_t first = at + i * SQZ_WARP;
            if (first >= n_keys) break;
            float e[Q];
#pragma unroll
            for (int r = 0; r < Q; r++) e[r] = unit.logit[r][rank[i]];
#pragma unroll
            for (int w = 0; w < W; w++) {
                if (w > 0 && w >= a.codes.n_words) break;
                sqz_add_codes<Q>(e, word[i][w], tables + w * (Q <= 2 ? Q : a.group) * SQZ_CODE_TABLE, a);
            }
            each(key[i], first + lane < n_keys, rank[i], e);
        }
    }
}

/* Instances of a kernel: for W 2 and 4, Q 1, 2, 4, 8 and 16. */
template <class Args> struct sqz_codes_kernels {
    void (*of[10])(const Args);
};
#define SQZ_CODES_KERNELS(kernel)                                                                                      \
    {                                                                                                                  \
        {                                                                                                              \
            kernel<1, 2>, kernel<2, 2>, kernel<4, 2>, kernel<8, 2>, kernel<16, 2>, kernel<1, 4>, kernel<2, 4>,         \
                kernel<4, 4>, kernel<8, 4>, kernel<16, 4>                                                              \
        }                                                                                                              \
    }

/* Launches the one whose Q and W hold the group and the code of `a`, which is args or a part of it. */
template <class Args>
static inline enum sqz_status sqz_codes_launch(const sqz_codes_kernels<Args> &kernels,
                                               const struct sqz_cuda_lookup_codes *a, const Args &args,
                                               size_t shared_bytes, bool after_ours, void *stream)
{
    const int i = (a->group == 1   ? 0
                   : a->group == 2 ? 1
                   : a->group <= 4 ? 2
                   : a->group <= 8 ? 3
                                   : 4) +
                  (a->codes.n_words <= 2 ? 0 : 5);
    return sqz_launch(kernels.of[i], dim3(a->n_head_kv * a->n_sequences * a->n_splits), SQZ_CODES_THREADS, shared_bytes,
                      1, after_ours, args, stream);
}

/* Thread blocks that registers leave on a multiprocessor. */
__host__ __device__ constexpr int sqz_codes_blocks(int q)
{
    return q <= 2 ? 4 : q <= 4 ? 3 : q <= 8 ? 2 : 1;
}

#endif
