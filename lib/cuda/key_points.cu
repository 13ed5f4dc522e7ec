/*
 * The curve of a layer with codes: up to which threshold of a grid a query reads
 * each group of 8 rows. A key is retained where its own score and its cluster's
 * reach come to the threshold, as in lookup_codes.cu, but under one denominator
 * for all thresholds, that of every key's estimate (lib/calibrate.c does the same).
 */
#include "lookup_codes.cuh"

namespace
{

enum { THREADS = SQZ_CODES_THREADS, WARPS = SQZ_CODES_WARPS };

__device__ __forceinline__ int point_of(const sqz_cuda_key_points &a, float log2_read_to)
{
    return sqz_curve_point(log2_read_to * SQZ_LN2, a.first, a.step, (int)a.n_points);
}

/* log2 of the largest over the group, or of the mean, of 2^y under the totals. */
template <int Q>
__device__ __forceinline__ float log2_score(const sqz_cuda_lookup_codes &a, const float (&y)[Q],
                                            const float *log2_total)
{
    float largest = -INFINITY, sum = 0;
#pragma unroll
    for (int r = 0; r < Q; r++) {
        if (!sqz_codes_has<Q>(a, r)) break;
        largest = fmaxf(largest, y[r] - log2_total[r]);
        sum += exp2f(y[r] - log2_total[r]);
    }
    return a.group_max ? largest : log2f(sum / (float)a.group);
}

template <int Q, int W> __global__ void __launch_bounds__(THREADS, 1) points_kernel(const sqz_cuda_key_points args)
{
    extern __shared__ float tables[];
    __shared__ sqz_codes_unit<Q> units[WARPS];
    __shared__ float level_total[Q], log2_total[Q], gain[Q], width[Q];
    __shared__ int points[WARPS][SQZ_WARP]; /* of opened clusters in order: up to which they are */
    const sqz_cuda_lookup_codes &a = args.lookup;
    const sqz_codes_place here = sqz_codes_here(a);
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    sqz_let_next_start();
    sqz_wait_for_previous();
    for (uint32_t r = warp; r < a.group; r += WARPS) {
        const sqz_cuda_reach reach = a.reach[(size_t)here.pair * a.group + r];
        const float level = sqz_codes_total(a, a.parts, a.n_parts, here.pair, r);
        const float total = sqz_codes_total(a, a.key_parts, a.n_splits, here.pair, r);
        if (lane > 0) continue;
        level_total[r] = level;
        log2_total[r] = total;
        gain[r] = reach.gain;
        width[r] = sqz_open_deviations(0) * reach.deviation;
    }
    sqz_codes_tables(tables, a, here.pair);
    __syncthreads();
    const size_t n_groups = (a.n_rows + SQZ_GROUP_ROWS - 1) / SQZ_GROUP_ROWS;
    uint32_t *group_point = args.group_point + here.pair * n_groups;
    for (uint32_t unit = here.split * WARPS + warp; unit < here.n_units; unit += a.n_splits * WARPS) {
        const uint32_t c = here.cluster(unit, lane);
        sqz_codes_cluster<Q> cluster;
        cluster.load(a, here, c, c < here.n_clusters);
        float reach = log2_score<Q>(a, cluster.y, level_total);
#pragma unroll
        for (int r = 0; r < Q; r++)
            if (sqz_codes_has<Q>(a, r))
                reach =
                    fmaxf(reach, sqz_reach(cluster.plain(r, gain), width[r], sqrtf(cluster.variance), level_total[r]));
        const uint32_t opened = __ballot_sync(~0u, cluster.end > cluster.begin);
        if (!opened) continue;
        __syncwarp();
        if (opened >> lane & 1) points[warp][__popc(opened & ((1u << lane) - 1))] = point_of(args, reach);
        auto count = [&](uint32_t key, bool exists, uint32_t rank, const float(&e)[Q]) {
            const int own = point_of(args, log2_score<Q>(a, e, log2_total));
            const int point = min(own, points[warp][rank]); /* sqz_key_read_to(), in points */
            if (exists && point >= 0) atomicMax(group_point + (a.n_fixed + key) / SQZ_GROUP_ROWS, (uint32_t)point + 1);
        };
        sqz_each_key<Q, W>(a, here.head, tables, units[warp], opened, cluster, gain, count);
    }
}

} // namespace

extern "C" enum sqz_status sqz_cuda_key_points_launch(const struct sqz_cuda_key_points *a, bool after_ours,
                                                      void *stream)
{
    static const sqz_codes_kernels<sqz_cuda_key_points> kernels = SQZ_CODES_KERNELS(points_kernel);
    return sqz_codes_launch(kernels, &a->lookup, *a, sqz_codes_table_bytes(&a->lookup), after_ours, stream);
}
