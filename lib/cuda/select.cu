/*
 * Compaction: scores of a level's clusters become, for every (sequence, KV head),
 * an ascending list of groups of 8 rows of what the clusters hold: keys below the
 * finest level, clusters of the next finer level above it.
 *
 * One pair of (sequence, head) belongs to one thread block, or to a cluster of up to 8
 * (sm_90). Clusters lie in the order of their rows, so each block owns a range of
 * the pair's bits, one a group (one a row above the finest level), and goes through
 * the clusters that touch it: those across an edge are seen from both sides. Every
 * owner counts its own bits, tells the others, and writes its part of the list. Order
 * and counts depend on nothing but the scores.
 *
 * What it takes is latencies one after the other, so there are few: what does not come
 * from the kernel before is found before that ends, and blocks of a pair meet once.
 */
#include "block_cluster.cuh"

namespace
{

enum { THREADS = 512, WARPS = THREADS / SQZ_WARP, MAX_CLUSTER = 8 };

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

/* Entries of the list that a word of bits becomes: its bits, or its bytes that are not zero. */
__device__ __forceinline__ uint32_t entries(uint32_t word, bool bytes)
{
    if (!bytes) return word;
    word |= word >> 4;
    word |= word >> 2;
    word |= word >> 1;
    return word & 0x01010101u;
}

/* The first of n places, ascending, whose end[place] is above `row`, n when there is none: each thread looks at one place
 * in THREADS, then at what lies before the first of those. All threads. */
__device__ uint32_t first_above(const uint32_t *end, uint32_t n, uint32_t row)
{
    uint32_t from = 0, count = n;
    while (count) {
        const uint32_t step = (count + THREADS - 1) / THREADS, at = threadIdx.x * step + step - 1;
        const bool below = at < count && end[from + at] <= row;
        const uint32_t n_below = (uint32_t)__syncthreads_count(below) * step;
        from += n_below;
        if (step == 1) break;
        count = min(step, n - from);
    }
    return from;
}

/* QUADS: the group is a multiple of four query heads, whose logits are loaded together. */
template <bool QUADS> __global__ void __launch_bounds__(THREADS, 2) select_kernel(const sqz_cuda_select_list a)
{
    extern __shared__ uint32_t bits[]; /* this block's share of the pair's bits */
    __shared__ float log2_total[SQZ_ROWS_MAX_GROUP], pruned_mass[MAX_CLUSTER][SQZ_ROWS_MAX_GROUP], sums[WARPS + 1];
    __shared__ uint32_t scratch[WARPS], counts[MAX_CLUSTER];
    const sqz_cluster_place here = sqz_cluster_here();
    const uint32_t pair = blockIdx.x / here.size, head = pair % a.n_head_kv, group = a.group;
    const uint32_t n_clusters = a.offsets.n_clusters[a.offsets.level];
    const int shift = a.rows_bits ? 0 : 3;
    const uint32_t n_units = (uint32_t)(((uint64_t)a.n_rows + (1u << shift) - 1) >> shift);
    const uint32_t n_words = (n_units + 31) / 32, per_block = (n_words + here.size - 1) / here.size;
    const uint32_t first_word = min(here.rank * per_block, n_words), words = min(per_block, n_words - first_word);
    const bool last_block = here.rank + 1 == here.size;
    const int lane = threadIdx.x % SQZ_WARP;

    sqz_let_next_start();
    sqz_cluster_arrive();
    for (uint32_t i = threadIdx.x; i < per_block; i += THREADS) bits[i] = 0;
    /* Rows [low, high) beyond the fixed ones are this block's; a cluster's numbers are whose its first row is. */
    const uint32_t *offset = a.offsets.offset[a.offsets.level] + (size_t)head * (n_clusters + 1);
    auto rows_before = [&](uint32_t word) {
        const uint64_t row = (uint64_t)word * 32 << shift;
        return row > a.n_fixed ? (uint32_t)(row - a.n_fixed) : 0;
    };
    const uint32_t low = rows_before(first_word), high = last_block ? ~0u : rows_before(first_word + words);
    const uint32_t first = here.rank ? first_above(offset + 1, n_clusters, low) : 0;
    const uint32_t end = last_block ? n_clusters : first_above(offset, n_clusters, high - (high > 0));
    const float log_threshold =
        a.log_threshold ? a.log_threshold[(size_t)pair / a.n_head_kv * a.plan_stride + head] : 0.0f;
    float limit = exp2f(sqz_cluster_limit(log_threshold, a.offsets.level) * SQZ_LOG2E);
    __syncthreads(); /* bits are zero */

    auto set_units =
        [&](uint32_t first, uint32_t end) { /* [first, end), where they are this block's */
        first = max(first, first_word * 32);
        end = min(end, (first_word + words) * 32);
        for (uint32_t word = first / 32; first < end; word++) {
            const uint32_t stop = min(end, 32 * (word + 1)), n = stop - first;
            const uint32_t mask = (n == 32 ? ~0u : (1u << n) - 1) << first % 32;
            atomicOr(bits + word - first_word, mask);
            first = stop;
        }
    };
    /* Clusters. */
    const float each = a.group_max ? 1.0f : 1.0f / (float)group;
    const uint32_t *active = a.active ? a.active + (size_t)pair * a.active_words : NULL;
    /* A score is made of what is loaded first, of several clusters together, and of the group's further logits. */
    enum { FIRST = QUADS ? 4 : 1, LOADS = QUADS ? 4 : 8 /* clusters of a thread */ };
    struct loaded {
        float x[FIRST];
    };
    const float *const numbers =
        a.logit ? a.logit + (size_t)pair * n_clusters * group : a.score + (size_t)pair * n_clusters;
    auto load = [&](uint32_t c) {
        loaded l;
        if (QUADS) *(float4 *)l.x = *(const float4 *)(numbers + (size_t)c * group);
        else l.x[0] = numbers[(size_t)c * group];
        return l;
    };
    auto score_of = [&](uint32_t c, const loaded &l) {
        if (!a.logit) return l.x[0];
        float score = 0;
        auto add = [&](float logit, uint32_t r) {
            const float s = exp2f(logit - log2_total[r]);
            score = a.group_max ? fmaxf(score, s) : score + s * each;
        };
#pragma unroll
        for (int r = 0; r < FIRST; r++) add(l.x[r], r);
        for (uint32_t r = FIRST; r < group; r++) add(numbers[(size_t)c * group + r], r);
        return score;
    };
    auto takes_part = [&](uint32_t c) { return !active || (active[c / 32] >> c % 32 & 1); };
    auto mine = [&](uint32_t from) { return from < high && from >= low; };
    /* The loop runs twice, at first for the fixed rows alone while the kernel before ends: its instructions, which come
     * from device memory the first time (3 us, H100), and the offsets are near then. What other kernels write is not
     * looked at so early, not even to be dropped: it would stay in the first-level cache. */
#pragma unroll 1
    for (int pass = 0; pass < 2; pass++) {
        if (pass) {
            sqz_wait_for_previous();
            if (a.limit) limit = a.limit[pair];
            /* Denominators. */
            if (a.logit) {
                for (uint32_t r = threadIdx.x / SQZ_WARP; r < group; r += WARPS) {
                    sqz_softmax_state s =
                        sqz_merged_parts(a.parts + (size_t)pair * a.n_splits * group + r, a.n_splits, group);
                    if (a.known) s = sqz_softmax_merged(s, {a.known[(size_t)pair * group + r], 1.0f});
                    else if (a.n_base)
                        s = sqz_softmax_merged(
                            s, sqz_merged_parts(a.base_parts + (size_t)pair * a.n_base * group + r, a.n_base, group));
                    if (threadIdx.x % SQZ_WARP == 0) log2_total[r] = sqz_softmax_log2(s);
                }
            }
            __syncthreads();
            if (a.logit && a.log_total && here.rank == 0 && threadIdx.x < group)
                a.log_total[(size_t)pair * group + threadIdx.x] = log2_total[threadIdx.x] * SQZ_LN2;
            for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < a.n_arrived; i += gridDim.x * THREADS)
                a.arrived[i] = 0;
        }
        for (uint32_t base = first + threadIdx.x; base < end; base += THREADS * LOADS) {
            uint32_t from[LOADS], to[LOADS];
            loaded x[LOADS] = {};
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const uint32_t c = min(base + i * THREADS, end - 1);
                from[i] = offset[c];
                to[i] = offset[c + 1];
                if (pass) x[i] = load(c);
            }
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const uint32_t c = base + i * THREADS;
                if (c >= end || (pass && !takes_part(c))) continue;
                const bool retained = pass ? score_of(c, x[i]) >= limit : threadIdx.x == 0;
                const uint32_t begin = pass ? a.n_fixed + from[i] : 0, stop = a.n_fixed + (pass ? to[i] : 0);
                if (retained) {
                    if (stop > begin) set_units(begin >> shift, ((stop - 1) >> shift) + 1);
                } else if (pass && a.pruned_out && mine(from[i])) {
                    atomicOr(a.pruned_out + (size_t)pair * a.pruned_words + c / 32, 1u << c % 32);
                }
            }
        }
    }
    /* What this level prunes stays in the denominators of the finer ones. */
    if (a.known_out) {
        for (uint32_t r = 0; r < group; r++) {
            float mass = 0;
            for (uint32_t c = first + threadIdx.x; c < end; c += THREADS) {
                if (!mine(offset[c]) || !takes_part(c) || score_of(c, load(c)) >= limit) continue;
                const float y = a.logit[((size_t)pair * n_clusters + c) * group + r];
                mass += (float)sqz_keys_under(a.offsets, head, c) * exp2f(y - log2_total[r]);
            }
            mass = block_sum(mass, sums);
            if (threadIdx.x == 0) pruned_mass[0][r] = mass;
        }
    }
    __syncthreads();

    /* The list. */
    uint32_t marks = 0, total;
    for (uint32_t i = threadIdx.x; i < words; i += THREADS) marks += __popc(entries(bits[i], a.rows_bits));
    sqz_block_scan<WARPS>(marks, scratch, &total);
    sqz_cluster_wait(); /* every block of the pair has started */
    if (threadIdx.x < here.size) sqz_of_rank(counts, threadIdx.x)[here.rank] = total;
    if (a.known_out && here.rank && threadIdx.x < group)
        sqz_of_rank(pruned_mass[here.rank], 0)[threadIdx.x] = pruned_mass[0][threadIdx.x];
    sqz_cluster_arrive();
    sqz_cluster_wait(); /* every count is there, and nobody looks into another block from here on */
    uint32_t before = 0, all = 0;
    for (uint32_t rank = 0; rank < here.size; rank++) {
        if (rank < here.rank) before += counts[rank];
        all += counts[rank];
    }
    if (here.rank == 0) {
        if (threadIdx.x == 0) {
            a.n_groups[pair] = all;
            if (a.n_retained) a.n_retained[pair] = all;
            if (a.read && a.rows_bits) a.read[pair].centroids += min(all * SQZ_GROUP_ROWS, a.n_rows);
        }
        if (a.known_out && threadIdx.x < group) {
            const uint32_t r = threadIdx.x;
            float mass = 0;
            for (uint32_t rank = 0; rank < here.size; rank++) mass += pruned_mass[rank][r];
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
            a.known_out[(size_t)pair * group + r] = sqz_softmax_log2(sqz_softmax_merged(
                {known, known > -INFINITY ? 1.0f : 0.0f}, {pruned, pruned > -INFINITY ? 1.0f : 0.0f}));
        }
    }
    uint32_t *list = a.groups + (size_t)pair * a.group_capacity;
    for (uint32_t i = 0; i < words; i += THREADS) { /* the same number of rounds for every thread: block_scan meets */
        const uint32_t at = i + threadIdx.x, word = at < words ? bits[at] : 0;
        const uint32_t marks = entries(word, a.rows_bits);
        const uint32_t place = before + sqz_block_scan<WARPS>(__popc(marks), scratch, &total);
        before += total;
        /* A word at a time, a bit a lane, so that stores are side by side. */
        for (uint32_t left = __ballot_sync(~0u, marks != 0); left; left &= left - 1) {
            const int from = __ffs(left) - 1;
            const uint32_t of_word = __shfl_sync(~0u, marks, from), to = __shfl_sync(~0u, place, from);
            const uint32_t bit = 32 * (first_word + at - lane + from) + lane;
            if (of_word >> lane & 1) list[to + __popc(of_word & ((1u << lane) - 1))] = a.rows_bits ? bit / 8 : bit;
        }
        if (a.active_out && at < words) a.active_out[(size_t)pair * a.active_out_words + first_word + at] = word;
    }
    if (!a.left_out) return;
    /* All clusters go with the pass. */
    if (a.read && here.rank == 0 && threadIdx.x == 0) a.read[pair].value_centroids += n_clusters;

    /* Keys that are in no listed group: a cluster's last groups may be another block's. */
    auto is_listed = [&](uint32_t g) {
        return *sqz_of_rank(bits + g / 32 % per_block, g / 32 / per_block) >> g % 32 & 1;
    };
    float *left = a.left_out + (size_t)pair * a.left_stride;
    for (uint32_t c = first + threadIdx.x; c < end; c += THREADS) {
        const uint32_t from = offset[c], stop = a.n_fixed + offset[c + 1];
        if (!mine(from)) continue;
        uint32_t n = 0;
        for (uint32_t row = a.n_fixed + from, next; row < stop; row = next) {
            next = min(stop, (row / SQZ_GROUP_ROWS + 1) * SQZ_GROUP_ROWS);
            if (!is_listed(row / SQZ_GROUP_ROWS)) n += next - row;
        }
        left[c] = n ? log2f((float)n) : -INFINITY;
    }
    if (last_block)
        for (uint32_t c = n_clusters + threadIdx.x; c < a.left_stride; c += THREADS) left[c] = -INFINITY;
    sqz_cluster_arrive();
    sqz_cluster_wait(); /* nobody looks into this block any more */
}

} // namespace

extern "C" enum sqz_status sqz_cuda_select_list_launch(const struct sqz_cuda_select_list *a, bool after_ours,
                                                       void *stream)
{
    const struct sqz_device device = sqz_device_get();
    const uint32_t pairs = a->n_sequences * a->n_head_kv;
    const int shift = a->rows_bits ? 0 : 3;
    const uint32_t n_units = (uint32_t)(((uint64_t)a->n_rows + (1u << shift) - 1) >> shift),
                   n_words = (n_units + 31) / 32;
    unsigned cluster = sqz_compiled_for_90((const void *)select_kernel<false>) ? MAX_CLUSTER : 1;
    /* No more than multiprocessors: all wait on them while the kernel before ends, and there is no second round. */
    while (cluster > 1 && pairs * cluster > (unsigned)device.n_multiprocessors) cluster /= 2;
    const size_t shared = (size_t)((n_words + cluster - 1) / cluster) * sizeof(uint32_t);
    if (a->pruned_out && cudaMemsetAsync(a->pruned_out, 0, (size_t)pairs * a->pruned_words * sizeof(uint32_t),
                                         (cudaStream_t)stream) != cudaSuccess) {
        cudaGetLastError();
        return SQZ_ERROR_INTERNAL;
    }
    const bool quads = a->logit && a->group % 4 == 0;
    return sqz_launch(quads ? select_kernel<true> : select_kernel<false>, dim3(pairs * cluster), THREADS, shared,
                      cluster, after_ours && !a->pruned_out, *a, stream);
}
