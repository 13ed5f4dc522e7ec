/*
 * The tail of one token: every pruned cluster of a level stands for its keys with
 * weight N_c exp(min(y', log Z)), y' = scale q.C + v + g, and its mean value
 * (lib/method.h). Weights are relative to log Z. A cluster whose weights are all
 * below skip * threshold is left out for all queries that share the head, as on
 * the CPU; most are, so a warp weighs 32 clusters at a time, one a lane, and then
 * adds the few value centroids that count.
 *
 * With codes a cluster that was opened weighs exp(g) times what weigh_left.cu
 * found of its keys, and keys that were read for their group's sake are no part
 * of N_c: those of a closed cluster's two ends at most.
 */
#include "device.cuh"

namespace
{

enum { THREADS = 512, WARPS = THREADS / SQZ_WARP, MAX_CHUNK = 8, LOADS = 4 /* value centroids together */ };

/* Keys of a cluster that are not in marked groups. Of one sequence's own none lies inside a closed cluster, so its ends
 * tell. */
__device__ __forceinline__ uint32_t keys_left(const sqz_cuda_tail_rows &a, uint32_t pair, uint32_t head,
                                              uint32_t cluster)
{
    uint32_t begin, end;
    sqz_rows_under(a.offsets, head, cluster, &begin, &end);
    if (!a.marks || begin == end) return end - begin;
    begin += a.n_fixed;
    end += a.n_fixed;
    const uint32_t *marks = a.marks + (size_t)pair * a.mark_words;
    const uint32_t first = begin / SQZ_GROUP_ROWS, last = (end - 1) / SQZ_GROUP_ROWS;
    if (a.united) {
        uint32_t left = 0;
        for (uint32_t group = first; group <= last; group++) {
            if (marks[group / 32] >> group % 32 & 1) continue;
            left += min(end, (group + 1) * SQZ_GROUP_ROWS) - max(begin, group * SQZ_GROUP_ROWS);
        }
        return left;
    }
    if (marks[last / 32] >> last % 32 & 1) end = max(begin, last * SQZ_GROUP_ROWS);
    if (marks[first / 32] >> first % 32 & 1) begin = min(end, (first + 1) * SQZ_GROUP_ROWS);
    return end - begin;
}

/* Grid: (pair, split, CHUNK queries of the group). */
template <class Type, int CHUNK> __global__ void __launch_bounds__(THREADS, 1) tail_kernel(const sqz_cuda_tail_rows a)
{
    enum { EACH = 256 / SQZ_WARP }; /* dimensions a lane at most: 4 lane + i % 4, and 128 more where i is 4 and above */
    __shared__ float out[WARPS][256], sums[WARPS], gains[SQZ_ROWS_MAX_GROUP], extra[SQZ_ROWS_MAX_GROUP];
    typedef typename Type::element element;
    const uint32_t pair = blockIdx.x, head = pair % a.n_head_kv, group = a.n_head / a.n_head_kv, d = a.head_dim;
    const size_t plan = (size_t)pair / a.n_head_kv * a.plan_stride + head;
    const uint32_t n_clusters = a.level.n_clusters, first_query = blockIdx.z * CHUNK;
    const uint32_t n_queries = min(group - first_query, (uint32_t)CHUNK);
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    sqz_let_next_start();
    sqz_wait_for_previous();

    /* y' = y + (1 - a) v + g, in base 2. */
    for (uint32_t r = warp; r < group; r += WARPS) {
        const element *q = (const element *)a.queries + ((size_t)pair * group + r) * d;
        float norm = 0;
        for (uint32_t i = lane; i < d; i += SQZ_WARP) norm += (float)q[i] * (float)q[i];
#pragma unroll
        for (int step = 16; step; step /= 2) norm += __shfl_xor_sync(~0u, norm, step);
        const float used = a.variance_gain ? a.variance_gain[head] : 0.0f;
        if (lane == 0) {
            gains[r] = sqz_spread_factor(1.0f - used, a.scale, d, norm) * SQZ_LOG2E;
            extra[r] = a.tail_gain[plan] * SQZ_LOG2E;
        }
    }
    __syncthreads();

    const float skip = a.skip * expf(a.log_threshold[plan]);
    const bool off = sqz_tail_is_off(a.tail_gain[plan]);
    const uint32_t *pruned = a.pruned ? a.pruned + (size_t)pair * a.pruned_words : NULL;
    const uint32_t *opened = a.opened ? a.opened + (size_t)pair * ((n_clusters + 31) / 32) : NULL;
    const float *logit = a.logit + (size_t)pair * n_clusters * group;
    const float *total = a.log_total + (size_t)pair * group;
    const float *variance = a.level.variance ? a.level.variance + (size_t)head * n_clusters : NULL;
    const element *values = (const element *)a.level.value_centroids.data + (size_t)head * n_clusters * d;
    auto weight_of =
        [&](uint32_t c, uint32_t r, float keys) { /* keys below 0: opened */
        const float log2_total = total[r] * SQZ_LOG2E;
        if (keys < 0) return fminf(logit[(size_t)c * group + r] * exp2f(extra[r]), 1.0f);
        const float y = sqz_tail_logit(logit[(size_t)c * group + r], gains[r], variance ? variance[c] : 0.0f, extra[r]);
        return keys * exp2f(sqz_tail_bound(y, log2_total) - log2_total);
    };
    float acc[CHUNK][EACH], sum[CHUNK];
#pragma unroll
    for (int q = 0; q < CHUNK; q++) {
        sum[q] = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) acc[q][i] = 0;
    }
    const uint32_t n_words = (n_clusters + 31) / 32;
    uint32_t n_read = 0;
    for (uint32_t w = blockIdx.y * WARPS + warp; w < n_words; w += gridDim.y * WARPS) {
        const uint32_t c = 32 * w + lane;
        float weight[CHUNK];
        bool counts = false;
        if (c < n_clusters && !off && (!pruned || pruned[w] >> lane & 1)) {
            const bool open = opened && sqz_opened_bit(opened, n_words, c);
            const float keys = open ? -1.0f : (float)keys_left(a, pair, head, c);
            for (uint32_t r = 0; r < group; r++) counts = counts || weight_of(c, r, keys) >= skip;
            if (counts) {
#pragma unroll
                for (int q = 0; q < CHUNK; q++) weight[q] = q < n_queries ? weight_of(c, first_query + q, keys) : 0.0f;
            }
        }
        uint32_t left = __ballot_sync(~0u, counts);
        n_read += __popc(left);
        while (left) {
            int from[LOADS];
            uint2 value[LOADS][EACH / 4];
#pragma unroll
            for (int j = 0; j < LOADS; j++) {
                from[j] = __ffs(left) - 1; /* below 0: none */
                left &= left - 1;
                const element *row = values + (size_t)(32 * w + from[j]) * d + 4 * lane;
#pragma unroll
                for (int i = 0; i < EACH / 4; i++)
                    value[j][i] = sqz_load_once8(row + 4 * SQZ_WARP * i, from[j] >= 0 && 4 * (lane + SQZ_WARP * i) < d);
            }
#pragma unroll
            for (int j = 0; j < LOADS; j++) {
                if (from[j] < 0) break;
                float v[EACH];
#pragma unroll
                for (int i = 0; i < EACH / 4; i++) {
                    const float2 low = Type::unpack(value[j][i].x), high = Type::unpack(value[j][i].y);
                    v[4 * i] = low.x, v[4 * i + 1] = low.y, v[4 * i + 2] = high.x, v[4 * i + 3] = high.y;
                }
#pragma unroll
                for (int q = 0; q < CHUNK; q++) {
                    const float shared_weight = __shfl_sync(~0u, weight[q], from[j]);
                    sum[q] += shared_weight;
#pragma unroll
                    for (int i = 0; i < EACH; i++) acc[q][i] += shared_weight * v[i];
                }
            }
        }
    }
    if (a.read && n_read && lane == 0 && blockIdx.z == 0) atomicAdd(&a.read[pair].value_centroids, n_read);
    const size_t part = ((size_t)pair * a.n_parts + a.first_part + blockIdx.y) * group + first_query;
#pragma unroll
    for (int q = 0; q < CHUNK; q++) {
        if (q >= n_queries) break;
#pragma unroll
        for (int i = 0; i < EACH; i++) out[warp][4 * (lane + i / 4 * SQZ_WARP) + i % 4] = acc[q][i];
        if (lane == 0) sums[warp] = sum[q];
        __syncthreads();
        float x = 0, all = 0;
        for (int w = 0; w < WARPS; w++) {
            if (threadIdx.x < d) x += out[w][threadIdx.x];
            all += sums[w];
        }
        if (threadIdx.x < d) a.out[(part + q) * d + threadIdx.x] = x;
        if (threadIdx.x == 0) a.parts[part + q] = {all > 0 ? total[first_query + q] * SQZ_LOG2E : -INFINITY, all};
        __syncthreads();
    }
}

} // namespace

extern "C" enum sqz_status sqz_cuda_tail_rows_launch(const struct sqz_cuda_tail_rows *a, bool after_ours, void *stream)
{
    const uint32_t group = a->n_head / a->n_head_kv, pairs = a->n_sequences * a->n_head_kv;
    const int i = group == 1 ? 0 : group == 2 ? 1 : group <= 4 ? 2 : 3, chunk = 1 << i;
    static void (*const kernels[2][4])(const sqz_cuda_tail_rows) = {
        {tail_kernel<sqz_f16, 1>, tail_kernel<sqz_f16, 2>, tail_kernel<sqz_f16, 4>, tail_kernel<sqz_f16, MAX_CHUNK>},
        {tail_kernel<sqz_bf16, 1>, tail_kernel<sqz_bf16, 2>, tail_kernel<sqz_bf16, 4>,
         tail_kernel<sqz_bf16, MAX_CHUNK>}};
    return sqz_launch(kernels[a->type != SQZ_ROW_F16][i],
                      dim3(pairs, SQZ_ROWS_TAIL_SPLITS, (group + chunk - 1) / chunk), THREADS, 0, 1, after_ours, *a,
                      stream);
}
