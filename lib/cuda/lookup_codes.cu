/*
 * From clusters to single keys, as lib/lookup_keys.c does it (there are the
 * formulas): which clusters may hold a key above the threshold, the denominator
 * with what codes say of the keys of those, and the keys that reach the threshold.
 *
 * The denominator has to be complete before the first key can be compared, but the
 * one that the clusters gave is near: estimates that reach the threshold under
 * half of it are candidates, of which every group of 8 rows keeps the largest of
 * each query, its peak. Where the group's scores are joined by the largest and the
 * denominator was not off by more than that, peaks are all that marking looks at.
 * Else estimates are made a second time; to keep them all would take 4 GB for 64
 * sequences over 512K keys of 32 heads.
 *
 * Sums depend on the number of splits alone. Grid: (split, pair); a warp takes 32
 * clusters at a time.
 */
#include "lookup_codes.cuh"

namespace
{

enum { THREADS = SQZ_CODES_THREADS, WARPS = SQZ_CODES_WARPS };

/* Sums of 2^y for Q query rows, a part in every lane, relative to a base that a warp's lanes share: it is raised only
 * when a logit stands 2^60 above it, so most of what is added needs no look at maxima. */
template <int Q> struct warp_sums {
    float base[Q], sum[Q];

    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (int r = 0; r < Q; r++) base[r] = -INFINITY, sum[r] = 0;
    }

    /* By all lanes; `count` of each, in those that have one. */
    __device__ __forceinline__ void add(const sqz_cuda_lookup_codes &a, const float (&y)[Q], float count, bool exists)
    {
        bool above = false;
#pragma unroll
        for (int r = 0; r < Q; r++) above = above || (sqz_codes_has<Q>(a, r) && y[r] > base[r] + 60.0f);
        if (__any_sync(~0u, above && exists)) raise(a, y, exists);
#pragma unroll
        for (int r = 0; r < Q; r++)
            if (exists && sqz_codes_has<Q>(a, r)) sum[r] += count * sqz_exp2(y[r] - base[r]);
    }

    __device__ __noinline__ static float raised(float base, float y)
    {
#pragma unroll
        for (int step = 16; step; step /= 2) y = fmaxf(y, __shfl_xor_sync(~0u, y, step));
        return fmaxf(base, y);
    }
    __device__ __forceinline__ void raise(const sqz_cuda_lookup_codes &a, const float (&y)[Q], bool exists)
    {
#pragma unroll
        for (int r = 0; r < Q; r++) {
            if (!sqz_codes_has<Q>(a, r)) break;
            const float to = raised(base[r], exists ? y[r] : -INFINITY);
            sum[r] *= sqz_softmax_factor(base[r], to);
            base[r] = to;
        }
    }
};

/* Adds up a block's sums into parts[r], in a fixed order. */
template <int Q> __device__ void store_sums(warp_sums<Q> &sums, const sqz_cuda_lookup_codes &a, sqz_cuda_part *parts)
{
    __shared__ sqz_softmax_state shared[WARPS][Q];
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
#pragma unroll
    for (int r = 0; r < Q; r++) {
        if (!sqz_codes_has<Q>(a, r)) break;
#pragma unroll
        for (int step = 16; step; step /= 2) sums.sum[r] += __shfl_xor_sync(~0u, sums.sum[r], step);
        if (lane == 0) shared[warp][r] = {sums.base[r], sums.sum[r]};
    }
    __syncthreads();
    if (threadIdx.x < a.group) {
        sqz_softmax_state all = shared[0][threadIdx.x];
        for (int w = 1; w < WARPS; w++) all = sqz_softmax_merged(all, shared[w][threadIdx.x]);
        parts[threadIdx.x] = {all.maximum, all.sum};
    }
}

/* No key among the marks yet: the groups of fixed rows alone. A split's share of the words. */
__device__ void clear_marks(const sqz_cuda_lookup_codes &a, const sqz_codes_place &here)
{
    const uint32_t n_fixed = (a.n_fixed + SQZ_GROUP_ROWS - 1) / SQZ_GROUP_ROWS;
    for (uint32_t w = here.split * THREADS + threadIdx.x; w < a.mark_words; w += a.n_splits * THREADS) {
        const uint32_t left = n_fixed > 32 * w ? n_fixed - 32 * w : 0;
        a.marks[(size_t)here.pair * a.mark_words + w] = left >= 32 ? ~0u : (1u << left) - 1;
    }
}

/* How far the denominator may fall short of the clusters' for peaks to do, log2; more than what `fine` allows. */
#define SLACK      1.0f
#define SLACK_USED 0.9f

/* Floats as integers in the same order; 0 is below all. */
__device__ __forceinline__ uint32_t ordered(float x)
{
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* KEYS: level 0. */
template <int Q, int W, bool KEYS> __device__ __forceinline__ void open_clusters(const sqz_cuda_lookup_codes &a)
{
    extern __shared__ float tables[];
    __shared__ sqz_codes_unit<KEYS ? Q : 1> units[KEYS ? WARPS : 1];
    __shared__ float log2_total[Q], gain[Q], width[Q];
    const sqz_codes_place here = sqz_codes_here(a);
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    sqz_let_next_start();
    sqz_wait_for_previous();
    const uint32_t *active = a.active ? a.active + (size_t)here.pair * here.n_units : NULL;
    auto takes_part = [&](uint32_t c) {
        return c < here.n_clusters && (!active || active[c / SQZ_WARP] >> c % SQZ_WARP & 1);
    };
    const uint32_t first = here.split * WARPS + warp, step = a.n_splits * WARPS;
    sqz_codes_cluster<Q> cluster, next;
    uint32_t c, next_c = here.cluster(first, lane);
    bool exists, next_exists = first < here.n_units && takes_part(next_c);
    next.load(a, here, next_c, next_exists);
    for (uint32_t r = warp; r < a.group; r += WARPS) {
        const float total = a.open_all ? 0.0f : sqz_codes_total(a, a.parts, a.n_parts, here.pair, r);
        const sqz_cuda_reach reach = a.reach[(size_t)here.pair * a.group + r];
        if (lane > 0) continue;
        log2_total[r] = total;
        gain[r] = reach.gain;
        width[r] = sqz_open_deviations(a.offsets.level) * reach.deviation;
        if (KEYS && a.peaks && here.split == 0) a.level_total[(size_t)here.pair * a.group + r] = total;
    }
    if (KEYS) {
        sqz_codes_tables(tables, a, here.pair);
        if (a.marks) clear_marks(a, here);
    }
    __syncthreads();

    const float log2_limit = a.open_all ? -INFINITY : a.log_threshold[sqz_plan_place(a, here)] * SQZ_LOG2E,
                limit = exp2f(log2_limit);
    const float each = 1.0f / (float)a.group;
    const bool largest = Q == 1 || a.group_max; /* scores are compared as logits: no exponentials */
    warp_sums<Q> sums;
    sums.clear();
    uint32_t n_codes = 0; /* of the lane's clusters */
    float candidate[Q];
#pragma unroll
    for (int r = 0; r < Q; r++) candidate[r] = sqz_codes_has<Q>(a, r) ? log2_limit + log2_total[r] - SLACK : INFINITY;
    uint32_t *peaks = KEYS && a.peaks ? a.peaks + (size_t)here.pair * a.group * a.peak_stride : NULL;
    for (uint32_t unit = first; unit < here.n_units; unit += step) {
        c = next_c;
        cluster = next;
        exists = next_exists;
        if (unit + step < here.n_units) { /* on its way while this one is gone through */
            next_c = here.cluster(unit + step, lane);
            next_exists = takes_part(next_c);
            next.load(a, here, next_c, next_exists);
        }
        float score = 0, reach = -INFINITY;
        const float root = sqrtf(cluster.variance);
#pragma unroll
        for (int r = 0; r < Q; r++) {
            if (!sqz_codes_has<Q>(a, r)) break;
            reach = fmaxf(reach, sqz_reach(cluster.plain(r, gain), width[r], root, log2_total[r]));
            if (largest) reach = fmaxf(reach, cluster.y[r] - log2_total[r]);
            else score += sqz_exp2(cluster.y[r] - log2_total[r]) * each;
        }
        const bool reaches = reach >= log2_limit || (!largest && score >= limit);
        const bool open = exists && cluster.end > cluster.begin && reaches, closed = exists && !open;
        const uint32_t opened = __ballot_sync(~0u, open);
        float keys = 0; /* that a closed cluster stands for */
        if (closed) keys = (float)(KEYS ? cluster.end - cluster.begin : sqz_keys_under(a.offsets, here.head, c));
        sums.add(a, cluster.y, keys, closed);
        if (!KEYS) {
            if (c < here.n_clusters) a.score[(size_t)here.pair * here.n_clusters + c] = open ? INFINITY : -1.0f;
            continue;
        }
        if (open) n_codes += cluster.end - cluster.begin;
        if (lane == 0 && a.opened) a.opened[(size_t)here.pair * here.n_units + unit] = opened;
        if (KEYS && opened) {
            auto add = [&](uint32_t key, bool there, uint32_t, const float(&e)[Q]) {
                const uint32_t group = (a.n_fixed + key) / SQZ_GROUP_ROWS;
                sums.add(a, e, 1.0f, there);
#pragma unroll
                for (int r = 0; r < Q; r++)
                    if (peaks && there && e[r] >= candidate[r] && sqz_codes_has<Q>(a, r))
                        atomicMax(peaks + (size_t)r * a.peak_stride + group, ordered(e[r]));
            };
            if constexpr (KEYS) sqz_each_key<Q, W>(a, here.head, tables, units[warp], opened, cluster, gain, add);
        }
    }
    if (KEYS && a.read) {
        n_codes = __reduce_add_sync(~0u, n_codes);
        if (lane == 0 && n_codes) atomicAdd(&a.read[here.pair].codes, n_codes);
    }
    const size_t part = KEYS ? (size_t)here.pair * a.n_splits : (size_t)here.pair * a.closed_stride + a.n_closed;
    store_sums<Q>(sums, a, (KEYS ? a.key_parts : a.closed_parts) + (part + here.split) * a.group);
}

template <int Q, int W>
__global__ void __launch_bounds__(THREADS, sqz_codes_blocks(Q)) open_kernel(const sqz_cuda_lookup_codes a)
{
    open_clusters<Q, W, true>(a);
}

template <int Q, int W> __global__ void __launch_bounds__(THREADS) open_coarse_kernel(const sqz_cuda_lookup_codes a)
{
    open_clusters<Q, W, false>(a);
}

/* Marks groups whose peaks reach the bounds: a word of marks a warp, PEAKS of them on their way together. */
template <int Q>
__device__ void mark_peaks(const sqz_cuda_lookup_codes &a, const sqz_codes_place &here, const float (&bound)[Q])
{
    enum { PEAKS = Q <= 2 ? 8 / Q : 1 };
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    const uint32_t n_groups = (a.n_rows + SQZ_GROUP_ROWS - 1) / SQZ_GROUP_ROWS, step = a.n_splits * WARPS;
    const uint32_t *peaks = a.peaks + (size_t)here.pair * a.group * a.peak_stride;
    uint32_t *marks = a.marks + (size_t)here.pair * a.mark_words;
    for (uint32_t word = here.split * WARPS + warp; word < a.mark_words; word += PEAKS * step) {
        uint32_t peak[PEAKS][Q];
#pragma unroll
        for (int i = 0; i < PEAKS; i++)
#pragma unroll
            for (int r = 0; r < Q; r++) {
                const uint32_t group = 32 * (word + i * step) + lane;
                peak[i][r] = 0;
                if (group < n_groups && sqz_codes_has<Q>(a, r))
                    peak[i][r] = __ldg(peaks + (size_t)r * a.peak_stride + group);
            }
#pragma unroll
        for (int i = 0; i < PEAKS; i++) {
            bool reaches = false;
#pragma unroll
            for (int r = 0; r < Q; r++) reaches = reaches || peak[i][r] >= ordered(bound[r]);
            const uint32_t bits = __ballot_sync(~0u, reaches);
            if (lane == 0 && bits) marks[word + i * step] |= bits; /* there are those of fixed rows */
        }
    }
}

template <int Q, int W>
__global__ void __launch_bounds__(THREADS, sqz_codes_blocks(Q)) mark_kernel(const sqz_cuda_lookup_codes a)
{
    extern __shared__ float tables[];
    __shared__ sqz_codes_unit<Q> units[WARPS];
    __shared__ float log2_total[Q], gain[Q];
    const sqz_codes_place here = sqz_codes_here(a);
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    sqz_let_next_start();
    sqz_wait_for_previous();
    bool fine = a.peaks != NULL;
    for (uint32_t r = warp; r < a.group; r += WARPS) {
        const size_t row = (size_t)here.pair * a.group + r;
        const float before = fine ? a.level_total[row] : 0.0f;
        const float total = sqz_codes_total(a, a.key_parts, a.n_splits, here.pair, r);
        fine = fine && total >= before - SLACK_USED;
        if (lane > 0) continue;
        log2_total[r] = total;
        gain[r] = a.reach[row].gain;
        if (a.log_total && here.split == 0) a.log_total[row] = total * SQZ_LN2;
    }
    const float log2_limit = a.log_threshold[sqz_plan_place(a, here)] * SQZ_LOG2E, limit = exp2f(log2_limit);
    fine = __syncthreads_and(fine);
    const float each = 1.0f / (float)a.group;
    const bool largest = Q == 1 || a.group_max; /* compared as logits: no exponentials */
    float bound[Q];                             /* of an estimate that reaches the threshold for its query alone */
#pragma unroll
    for (int r = 0; r < Q; r++) bound[r] = sqz_codes_has<Q>(a, r) ? log2_limit + log2_total[r] : INFINITY;
    if (fine) {
        mark_peaks<Q>(a, here, bound);
        return;
    }
    sqz_codes_tables(tables, a, here.pair);
    const uint32_t first = here.split * WARPS + warp, step = a.n_splits * WARPS;
    const uint32_t *all_opened = a.opened + (size_t)here.pair * here.n_units;
    sqz_codes_cluster<Q> cluster, next;
    uint32_t opened, next_opened = first < here.n_units ? all_opened[first] : 0;
    next.load(a, here, here.cluster(first, lane), next_opened >> lane & 1);
    __syncthreads();
    uint32_t *marks = a.marks + (size_t)here.pair * a.mark_words;
    for (uint32_t unit = first; unit < here.n_units; unit += step) {
        cluster = next;
        opened = next_opened;
        if (unit + step < here.n_units) {
            next_opened = all_opened[unit + step];
            next.load(a, here, here.cluster(unit + step, lane), next_opened >> lane & 1);
        }
        if (!opened) continue;
        auto mark = [&](uint32_t key, bool there, uint32_t, const float(&e)[Q]) {
            bool reaches = false;
            if (largest) {
#pragma unroll
                for (int r = 0; r < Q; r++) reaches = reaches || e[r] >= bound[r];
            } else {
                float score = 0;
#pragma unroll
                for (int r = 0; r < Q; r++)
                    if (sqz_codes_has<Q>(a, r)) score += sqz_exp2(e[r] - log2_total[r]) * each;
                reaches = score >= limit;
            }
            const bool retained = there && reaches;
            const uint32_t group = (a.n_fixed + key) / SQZ_GROUP_ROWS, all = __ballot_sync(~0u, retained);
            if (!all) return;
            /* Keys side by side are often retained together: the first of a group marks it. */
            const uint32_t before = all & ((1u << lane) - 1), last = before ? 31 - __clz(before) : lane;
            const uint32_t group_before = __shfl_sync(~0u, group, last);
            if (retained && (!before || group_before != group)) atomicOr(marks + group / 32, 1u << group % 32);
        };
        sqz_each_key<Q, W>(a, here.head, tables, units[warp], opened, cluster, gain, mark);
    }
}

} // namespace

/* At level 0 as many as fill the multiprocessors about six times: heads open unequal amounts, and blocks that wait take
 * what early ones leave; no fewer than 32 clusters a warp. */
extern "C" uint32_t sqz_cuda_lookup_codes_splits(uint32_t n_pairs, uint32_t level, uint32_t n_clusters,
                                                 uint32_t n_multiprocessors)
{
    const uint32_t most = (n_clusters + SQZ_WARP * WARPS - 1) / (SQZ_WARP * WARPS);
    uint32_t n = 6 * n_multiprocessors / n_pairs;
    if (level) return SQZ_CODES_COARSE_SPLITS;
    n = n < most ? n : most;
    return n < 1 ? 1 : n < SQZ_CODES_MAX_SPLITS ? n : SQZ_CODES_MAX_SPLITS;
}

extern "C" enum sqz_status sqz_cuda_open_clusters_launch(const struct sqz_cuda_lookup_codes *a, bool after_ours,
                                                         void *stream)
{
    typedef sqz_codes_kernels<sqz_cuda_lookup_codes> kernels;
    static const kernels keys = SQZ_CODES_KERNELS(open_kernel);
    static const kernels coarse = SQZ_CODES_KERNELS(open_coarse_kernel);
    return a->offsets.level ? sqz_codes_launch(coarse, a, *a, 0, after_ours, stream)
                            : sqz_codes_launch(keys, a, *a, sqz_codes_table_bytes(a), after_ours, stream);
}

extern "C" enum sqz_status sqz_cuda_mark_keys_launch(const struct sqz_cuda_lookup_codes *a, bool after_ours,
                                                     void *stream)
{
    static const sqz_codes_kernels<sqz_cuda_lookup_codes> kernels = SQZ_CODES_KERNELS(mark_kernel);
    return sqz_codes_launch(kernels, a, *a, sqz_codes_table_bytes(a), after_ours, stream);
}
