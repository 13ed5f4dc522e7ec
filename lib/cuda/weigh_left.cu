/*
 * The keys of opened clusters that are not read, for the tail: per cluster and
 * query row the sum of their estimated shares of the total. It takes the place of
 * the cluster's logit, which nobody asks for any more, and tail_rows.cu reads it
 * there.
 *
 * A cluster's keys are neighbours among those dealt to the lanes: a running sum
 * over lanes that stops at clusters' ends, then one lane adds a cluster's part to
 * its sum. Order is fixed, so are the bits.
 */
#include "lookup_codes.cuh"

namespace
{

enum { THREADS = SQZ_CODES_THREADS, WARPS = SQZ_CODES_WARPS };

template <int Q, int W>
__global__ void __launch_bounds__(THREADS, sqz_codes_blocks(Q)) left_kernel(const sqz_cuda_lookup_codes a)
{
    extern __shared__ float tables[];
    __shared__ sqz_codes_unit<Q> units[WARPS];
    __shared__ float sums[WARPS][Q][SQZ_WARP], log2_total[Q], gain[Q];
    const sqz_codes_place here = sqz_codes_here(a);
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    sqz_let_next_start();
    sqz_wait_for_previous();
    for (uint32_t r = threadIdx.x; r < a.group; r += THREADS) {
        const size_t row = (size_t)here.pair * a.group + r;
        log2_total[r] = a.log_total[row] * SQZ_LOG2E;
        gain[r] = a.reach[row].gain;
    }
    sqz_codes_tables(tables, a, here.pair);
    __syncthreads();
    if (sqz_tail_is_off(a.tail_gain[sqz_plan_place(a, here)])) return; /* tail_rows.cu does not look either */

    const uint32_t *marks = a.marks + (size_t)here.pair * a.mark_words;
    float(*sum)[SQZ_WARP] = sums[warp];
    for (uint32_t unit = here.split * WARPS + warp; unit < here.n_units; unit += a.n_splits * WARPS) {
        const uint32_t opened = a.opened[(size_t)here.pair * here.n_units + unit], c = here.cluster(unit, lane);
        if (!opened) continue;
        sqz_codes_cluster<Q> cluster;
        cluster.load(a, here, c, opened >> lane & 1);
#pragma unroll
        for (int r = 0; r < Q; r++) sum[r][lane] = 0;
        auto weigh = [&](uint32_t key, bool there, uint32_t rank, const float(&e)[Q]) {
            const uint32_t group = (a.n_fixed + key) / SQZ_GROUP_ROWS;
            const bool left = there && !(marks[group / 32] >> group % 32 & 1);
            const uint32_t own = there ? rank : ~0u, next = __shfl_down_sync(~0u, own, 1);
            const bool last = there && (lane == SQZ_WARP - 1 || next != own);
            if (!__any_sync(~0u, left)) return;
            __syncwarp(); /* a cluster's keys before these were another lane's to add */
#pragma unroll
            for (int r = 0; r < Q; r++) {
                if (!sqz_codes_has<Q>(a, r)) break;
                float x = left ? exp2f(e[r] - log2_total[r]) : 0.0f;
#pragma unroll
                for (int step = 1; step < SQZ_WARP; step *= 2) {
                    const float before = __shfl_up_sync(~0u, x, step);
                    const uint32_t whose = __shfl_up_sync(~0u, own, step);
                    if (lane >= step && whose == own) x += before;
                }
                if (last) sum[r][rank] += x;
            }
        };
        sqz_each_key<Q, W>(a, here.head, tables, units[warp], opened, cluster, gain, weigh);
        __syncwarp();
        if (opened >> lane & 1) {
            const int rank = __popc(opened & ((1u << lane) - 1));
            for (uint32_t r = 0; r < a.group; r++)
                a.logit[((size_t)here.pair * here.n_clusters + c) * a.group + r] = sum[r][rank];
        }
        __syncwarp();
    }
}

} // namespace

extern "C" enum sqz_status sqz_cuda_weigh_left_launch(const struct sqz_cuda_lookup_codes *a, bool after_ours,
                                                      void *stream)
{
    static const sqz_codes_kernels<sqz_cuda_lookup_codes> kernels = SQZ_CODES_KERNELS(left_kernel);
    return sqz_codes_launch(kernels, a, *a, sqz_codes_table_bytes(a), after_ours, stream);
}
