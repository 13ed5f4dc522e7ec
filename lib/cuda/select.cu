/*
 * Compaction: scores of a level's clusters become, for every (sequence, KV head),
 * an ascending list of groups of 8 rows of what the clusters hold: keys below the
 * finest level, clusters of the next finer level above it.
 *
 * One pair of (sequence, head) belongs to one thread block, or to a cluster of up to 8
 * (sm_90): each goes through its share of the clusters and owns a share of the
 * pair's bits, one a group (one a row above the finest level). Bits are set in the
 * owner's shared memory, wherever it is; then every owner counts its own, learns
 * what stands before it and writes its part of the list. Order and counts depend
 * on nothing but the scores.
 */
#include <cooperative_groups.h>

#include "device.cuh"

namespace {

enum { THREADS = 512, WARPS = THREADS / SQZ_WARP, MAX_CLUSTER = 8, LOADS = 8 /* clusters a thread, early */ };

struct cluster_place {
    uint32_t rank, size;
};

__device__ __forceinline__ cluster_place place()
{
#if __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    return {cluster.block_rank(), cluster.num_blocks()};
#else
    return {0, 1};
#endif
}

__device__ __forceinline__ void sync_all()
{
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#else
    __syncthreads();
#endif
}

/* The same variable in the shared memory of block `rank` of the cluster. */
template <class T>
__device__ __forceinline__ T *of_rank(T *p, uint32_t rank)
{
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(p, rank);
#else
    return p;
#endif
}

__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

/* Sum over the block, in a fixed order; scratch: WARPS + 1 numbers. Every thread gets it. */
__device__ float block_sum(float x, float *scratch)
{
    x = warp_sum(x);
    if (threadIdx.x % SQZ_WARP == 0) scratch[threadIdx.x / SQZ_WARP] = x;
    __syncthreads();
    float total = 0;
    for (int w = 0; w < WARPS; w++) total += scratch[w];
    __syncthreads();
    return total;
}

/* Exclusive running sum over the block's threads; *total is the whole. */
__device__ uint32_t block_scan(uint32_t x, uint32_t *scratch, uint32_t *total)
{
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    uint32_t inclusive = x;
#pragma unroll
    for (int step = 1; step < SQZ_WARP; step *= 2) {
        const uint32_t before = __shfl_up_sync(~0u, inclusive, step);
        if (lane >= step) inclusive += before;
    }
    if (lane == SQZ_WARP - 1) scratch[warp] = inclusive;
    __syncthreads();
    uint32_t base = 0, sum = 0;
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) base += scratch[w];
        sum += scratch[w];
    }
    __syncthreads();
    *total = sum;
    return base + inclusive - x;
}

/* Entries of the list that a word of bits becomes: its bits, or its bytes that are not zero. */
__device__ __forceinline__ uint32_t entries(uint32_t word, bool bytes)
{
    if (!bytes) return word;
    word |= word >> 4;
    word |= word >> 2;
    word |= word >> 1;
    return word & 0x01010101u;
}

/* EARLY: thread blocks are few enough that all wait on the multiprocessors while the kernel before ends; then what does not
 * come from it is loaded meanwhile, and what does all at once. With more of them the registers for it cost more (H100: 32
 * heads 10 us later, 8 heads 6 us earlier). */
template <bool EARLY>
__global__ void __launch_bounds__(THREADS) select_kernel(const sqz_cuda_select_list a)
{
    extern __shared__ uint32_t bits[]; /* this block's share of the pair's bits */
    __shared__ float log2_total[SQZ_ROWS_MAX_GROUP], pruned_mass[SQZ_ROWS_MAX_GROUP], sums[WARPS + 1];
    __shared__ uint32_t scratch[WARPS], count;
    const cluster_place here = place();
    const uint32_t pair = blockIdx.x / here.size, head = pair % a.n_head_kv, group = a.group;
    const uint32_t n_clusters = a.offsets.n_clusters[a.offsets.level];
    const int shift = a.rows_bits ? 0 : 3;
    const uint32_t n_units = (uint32_t)(((uint64_t)a.n_rows + (1u << shift) - 1) >> shift);
    const uint32_t n_words = (n_units + 31) / 32, per_block = (n_words + here.size - 1) / here.size;

    sqz_let_next_start();
    for (uint32_t i = threadIdx.x; i < per_block; i += THREADS) bits[i] = 0;
    const uint32_t *offset = a.offsets.offset[a.offsets.level] + (size_t)head * (n_clusters + 1);
    const uint32_t first = (uint32_t)((uint64_t)n_clusters * here.rank / here.size);
    const uint32_t end = (uint32_t)((uint64_t)n_clusters * (here.rank + 1) / here.size);
    enum { N = EARLY ? LOADS : 1 };
    uint32_t early_from[N], early_to[N];
    float early[N];
#pragma unroll
    for (int i = 0; EARLY && i < N; i++) {
        const uint32_t c = first + threadIdx.x + i * THREADS;
        early_from[i] = c < end ? offset[c] : 0;
        early_to[i] = c < end ? offset[c + 1] : 0;
    }
    if (EARLY) sync_all(); /* bits are zero everywhere before the first is set */
    sqz_wait_for_previous();
#pragma unroll
    for (int i = 0; EARLY && i < N; i++) {
        const uint32_t c = first + threadIdx.x + i * THREADS;
        early[i] = 0;
        if (c < end && !a.logit) early[i] = a.score[(size_t)pair * n_clusters + c];
        else if (c < end && group == 1) early[i] = a.logit[(size_t)pair * n_clusters + c];
    }

    /* Denominators. */
    if (a.logit) {
        for (uint32_t r = threadIdx.x / SQZ_WARP; r < group; r += WARPS) {
            sqz_softmax_state s =
                sqz_merged_parts(a.parts + (size_t)pair * a.n_splits * group + r, a.n_splits, group);
            if (a.known)
                s = sqz_softmax_merged(s, {a.known[(size_t)pair * group + r], 1.0f});
            else if (a.n_base)
                s = sqz_softmax_merged(s, sqz_merged_parts(a.base_parts + (size_t)pair * a.n_base * group + r, a.n_base,
                                                       group));
            if (threadIdx.x % SQZ_WARP == 0) log2_total[r] = sqz_softmax_log2(s);
        }
    }
    if (EARLY) __syncthreads();
    else sync_all();
    if (a.logit && a.log_total && here.rank == 0 && threadIdx.x < group)
        a.log_total[(size_t)pair * group + threadIdx.x] = log2_total[threadIdx.x] * SQZ_LN2;
    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < a.n_arrived; i += gridDim.x * THREADS) a.arrived[i] = 0;

    auto set_units = [&](uint32_t first, uint32_t end) { /* [first, end) */
        for (uint32_t word = first / 32; first < end; word++) {
            const uint32_t stop = min(end, 32 * (word + 1)), n = stop - first;
            const uint32_t mask = (n == 32 ? ~0u : (1u << n) - 1) << first % 32;
            atomicOr(of_rank(bits + word % per_block, word / per_block), mask);
            first = stop;
        }
    };
    if (here.rank == 0 && threadIdx.x == 0 && a.n_fixed) set_units(0, (a.n_fixed + (1u << shift) - 1) >> shift);

    /* Clusters. */
    const float log2_limit = (a.log_threshold[head] - a.margin) * SQZ_LOG2E, limit = exp2f(log2_limit);
    const float each = a.group_max ? 1.0f : 1.0f / (float)group;
    const uint32_t *active = a.active ? a.active + (size_t)pair * a.active_words : NULL;
    auto score_of = [&](uint32_t c) {
        if (!a.logit) return a.score[(size_t)pair * n_clusters + c];
        const float *y = a.logit + ((size_t)pair * n_clusters + c) * group;
        float score = 0;
        for (uint32_t r = 0; r < group; r++) {
            const float s = exp2f(y[r] - log2_total[r]);
            score = a.group_max ? fmaxf(score, s) : score + s * each;
        }
        return score;
    };
    auto takes_part = [&](uint32_t c) { return !active || (active[c / 32] >> c % 32 & 1); };
    auto choose = [&](uint32_t c, uint32_t from, uint32_t to, float score) {
        if (!takes_part(c)) return;
        if (score >= limit) {
            if (to > from) set_units((a.n_fixed + from) >> shift, ((a.n_fixed + to - 1) >> shift) + 1);
        } else if (a.pruned_out) {
            atomicOr(a.pruned_out + (size_t)pair * a.pruned_words + c / 32, 1u << c % 32);
        }
    };
    const bool have_score = !a.logit || group == 1;
#pragma unroll
    for (int i = 0; EARLY && i < N; i++) {
        const uint32_t c = first + threadIdx.x + i * THREADS;
        if (c >= end) break;
        const float score = !have_score ? score_of(c) : a.logit ? exp2f(early[i] - log2_total[0]) : early[i];
        choose(c, early_from[i], early_to[i], score);
    }
#pragma unroll 4
    for (uint32_t c = first + threadIdx.x + (EARLY ? N * THREADS : 0); c < end; c += THREADS)
        choose(c, offset[c], offset[c + 1], score_of(c));
    /* What this level prunes stays in the denominators of the finer ones. */
    if (a.known_out) {
        for (uint32_t r = 0; r < group; r++) {
            float mass = 0;
            for (uint32_t c = first + threadIdx.x; c < end; c += THREADS) {
                if (!takes_part(c) || score_of(c) >= limit) continue;
                const float y = a.logit[((size_t)pair * n_clusters + c) * group + r];
                mass += (float)sqz_keys_under(a.offsets, head, c) * exp2f(y - log2_total[r]);
            }
            mass = block_sum(mass, sums);
            if (threadIdx.x == 0) pruned_mass[r] = mass;
        }
    }
    sync_all(); /* every bit is set */

    /* The list. */
    const uint32_t first_word = min(here.rank * per_block, n_words), words = min(per_block, n_words - first_word);
    uint32_t mine = 0, total;
    for (uint32_t i = threadIdx.x; i < words; i += THREADS) mine += __popc(entries(bits[i], a.rows_bits));
    block_scan(mine, scratch, &total);
    if (threadIdx.x == 0) count = total;
    sync_all(); /* every count is there */
    uint32_t before = 0, all = 0;
    for (uint32_t rank = 0; rank < here.size; rank++) {
        const uint32_t n = *of_rank(&count, rank);
        if (rank < here.rank) before += n;
        all += n;
    }
    if (here.rank == 0) {
        if (threadIdx.x == 0) {
            a.n_groups[pair] = all;
            if (a.n_retained) a.n_retained[pair] = all;
        }
        if (a.known_out && threadIdx.x < group) {
            const uint32_t r = threadIdx.x;
            float mass = 0;
            for (uint32_t rank = 0; rank < here.size; rank++) mass += of_rank(pruned_mass, rank)[r];
            float known = a.known ? a.known[(size_t)pair * group + r] : -INFINITY;
            if (!a.known && a.n_base) {
                sqz_softmax_state s = sqz_softmax_empty();
                for (uint32_t i = 0; i < a.n_base; i++) {
                    const sqz_cuda_part p = a.base_parts[((size_t)pair * a.n_base + i) * group + r];
                    s = sqz_softmax_merged(s, {p.maximum, p.sum});
                }
                known = sqz_softmax_log2(s);
            }
            const float pruned = mass > 0 ? log2_total[r] + log2f(mass) : -INFINITY;
            a.known_out[(size_t)pair * group + r] =
                sqz_softmax_log2(sqz_softmax_merged({known, known > -INFINITY ? 1.0f : 0.0f},
                                                    {pruned, pruned > -INFINITY ? 1.0f : 0.0f}));
        }
    }
    uint32_t *list = a.groups + (size_t)pair * a.group_capacity;
    for (uint32_t i = 0; i < words; i += THREADS) { /* the same number of rounds for every thread: block_scan meets */
        const uint32_t at = i + threadIdx.x, word = at < words ? bits[at] : 0;
        uint32_t marks = entries(word, a.rows_bits);
        uint32_t place = before + block_scan(__popc(marks), scratch, &total);
        before += total;
        for (; marks; marks &= marks - 1) {
            const uint32_t bit = 32 * (first_word + at) + __ffs(marks) - 1;
            list[place++] = a.rows_bits ? bit / 8 : bit;
        }
        if (a.active_out && at < words) a.active_out[(size_t)pair * a.active_out_words + first_word + at] = word;
    }
    sync_all(); /* no block leaves while another reads its shared memory */
}

} // namespace

extern "C" enum sqz_status sqz_cuda_select_list_launch(const struct sqz_cuda_select_list *a, bool after_ours,
                                                       void *stream)
{
    const struct sqz_device device = sqz_device_get();
    const uint32_t pairs = a->n_sequences * a->n_head_kv;
    const int shift = a->rows_bits ? 0 : 3;
    const uint32_t n_units = (uint32_t)(((uint64_t)a->n_rows + (1u << shift) - 1) >> shift), n_words = (n_units + 31) / 32;
    unsigned cluster = sqz_compiled_for_90((const void *)select_kernel<false>) ? MAX_CLUSTER : 1;
    while (cluster > 1 && pairs * cluster > 2u * (unsigned)device.n_multiprocessors) cluster /= 2;
    const size_t shared = (size_t)((n_words + cluster - 1) / cluster) * sizeof(uint32_t);
    if (a->pruned_out &&
        cudaMemsetAsync(a->pruned_out, 0, (size_t)pairs * a->pruned_words * sizeof(uint32_t), (cudaStream_t)stream) !=
            cudaSuccess) {
        cudaGetLastError();
        return SQZ_ERROR_INTERNAL;
    }
    const bool few = pairs * cluster <= (unsigned)device.n_multiprocessors;
    return sqz_launch(few ? select_kernel<true> : select_kernel<false>, dim3(pairs * cluster), THREADS, shared, cluster,
                      after_ours && !a->pruned_out, *a, stream);
}
