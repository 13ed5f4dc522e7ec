/*
 * Clustering: seeds. In every round rows are drawn by what they cost, their squared
 * distance to the nearest seed of the rounds before (at first: to their group's
 * centre), evenly along the running sum of costs in the order of the groups: one row
 * at every multiple of the mean cost a seed, from a random start. So groups get seeds
 * in proportion to what they cost, as k-means++ would give them, and the seeds of a
 * round come sorted by group. A row that costs more than that is drawn again; the
 * cluster stays empty and is repaired (cluster_update.cu).
 */
#include "cluster.cuh"

namespace
{

enum { THREADS = 256, DRAW_CHUNK = 1024 };

__device__ __forceinline__ uint64_t mixed(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}
/* In [0, 1). */
__device__ __forceinline__ double random_of(uint64_t seed, uint32_t head, uint32_t i)
{
    return (double)(mixed(mixed(seed + head) + i) >> 11) * 0x1p-53;
}

struct take_args {
    sqz_cluster_keys k;
    sqz_cluster_centres centres;
    uint32_t first, n;
    const uint32_t *at;
    uint64_t seed;
};

/* A warp a centre. */
template <class Type> __global__ void __launch_bounds__(THREADS) take_kernel(const take_args a)
{
    const size_t i = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const uint32_t n = a.n, pairs = a.k.head_dim / 2;
    if (i >= (size_t)a.k.n_heads * n) return;
    const uint32_t head = (uint32_t)(i / n), c = (uint32_t)(i % n);
    const size_t to = (size_t)head * a.centres.n + a.first + c;
    uint32_t row;
    if (a.at) row = a.at[i];
    else row = (uint32_t)min((double)a.k.n_rows - 1, (c + random_of(a.seed, head, c)) * ((double)a.k.n_rows / n));
    float bias = 0;
    for (uint32_t p = threadIdx.x % 32; p < pairs; p += 32) {
        const float2 x = Type::unpack(((const uint32_t *)a.k.keys)[((size_t)head * a.k.n_rows + row) * pairs + p]);
        const float2 m = ((const float2 *)a.k.mean)[(size_t)head * pairs + p];
        const uint32_t d = Type::pack(x.x - m.x, x.y - m.y);
        const float2 y = Type::unpack(d);
        ((uint32_t *)a.centres.d)[to * pairs + p] = d;
        bias += y.x * (m.x + 0.5f * y.x) + y.y * (m.y + 0.5f * y.y);
    }
    for (int step = 16; step; step /= 2) bias += __shfl_xor_sync(~0u, bias, step);
    if (threadIdx.x % 32 == 0) a.centres.bias[to] = bias;
}

/* ---- Drawing ------------------------------------------------------------------- */

/* Running sums over the thread block, exclusive, in an order that depends on nothing else; total: of all. */
__device__ double block_scan(double x, double *total)
{
    __shared__ double sums[THREADS / 32];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double inclusive = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const double y = __shfl_up_sync(~0u, inclusive, step);
        if (lane >= step) inclusive += y;
    }
    const double lower = __shfl_up_sync(~0u, inclusive, 1);
    if (lane == 31) sums[warp] = inclusive;
    __syncthreads();
    double before = 0, all = 0;
    for (uint32_t w = 0; w < THREADS / 32; w++) {
        if (w < warp) before += sums[w];
        all += sums[w];
    }
    __syncthreads();
    *total = all;
    return before + (lane ? lower : 0.0);
}

/* What the row at place i of its head's list costs. */
__device__ __forceinline__ double cost_of(const sqz_cluster_draw &d, uint32_t head, uint32_t i)
{
    const size_t at = (size_t)head * d.n_rows + d.row[(size_t)head * d.n_rows + i];
    const unsigned long long best = d.best[at];
    return fmax(0.0f, d.self[at] - 2.0f * (best ? sqz_cluster_score(best) : d.home[at]));
}

/* Grid: (chunk, head). */
__global__ void __launch_bounds__(THREADS) sum_kernel(const sqz_cluster_draw d, uint32_t n_chunks)
{
    double sum = 0, total;
    for (uint32_t j = 0; j < DRAW_CHUNK / THREADS; j++) {
        const uint32_t i = blockIdx.x * DRAW_CHUNK + threadIdx.x * (DRAW_CHUNK / THREADS) + j;
        if (i < d.n_rows) sum += cost_of(d, blockIdx.y, i);
    }
    block_scan(sum, &total);
    if (threadIdx.x == 0) d.sums[(size_t)blockIdx.y * (n_chunks + 1) + blockIdx.x] = total;
}

/* Sums of chunks to running sums; the last is the whole. Grid: head. */
__global__ void __launch_bounds__(THREADS) running_kernel(const sqz_cluster_draw d, uint32_t n_chunks)
{
    double *const sums = d.sums + (size_t)blockIdx.x * (n_chunks + 1);
    double so_far = 0;
    for (uint32_t base = 0; base < n_chunks; base += THREADS) {
        const uint32_t i = base + threadIdx.x;
        double total;
        const double here = so_far + block_scan(i < n_chunks ? sums[i] : 0.0, &total);
        if (i < n_chunks) sums[i] = here;
        so_far += total;
    }
    if (threadIdx.x == 0) sums[n_chunks] = so_far;
}

/* Row i of the list has [edge of i, edge of i + 1) of the running sum; targets are (j + u) of the mean cost a seed. The
 * edges of neighbours are one number, so no target is lost or taken twice. Grid: (chunk, head). */
__global__ void __launch_bounds__(THREADS) draw_kernel(const sqz_cluster_draw d, uint32_t n_chunks)
{
    enum { EACH = DRAW_CHUNK / THREADS };
    __shared__ double edges[THREADS + 1];
    const uint32_t head = blockIdx.y;
    const double *const sums = d.sums + (size_t)head * (n_chunks + 1), all = sums[n_chunks];
    const uint32_t first = blockIdx.x * DRAW_CHUNK + threadIdx.x * EACH;
    const bool even = !(all > 0); /* nothing costs anything: every row as much */
    double cost[EACH], mine = 0, total;
    for (int j = 0; j < EACH; j++) {
        cost[j] = first + j < d.n_rows ? (even ? 1.0 : cost_of(d, head, first + j)) : 0.0;
        mine += cost[j];
    }
    const double base = even ? (double)blockIdx.x * DRAW_CHUNK : sums[blockIdx.x];
    edges[threadIdx.x] = base + block_scan(mine, &total);
    const bool last_chunk = blockIdx.x + 1 == n_chunks;
    if (threadIdx.x == 0) edges[THREADS] = last_chunk ? INFINITY : even ? base + DRAW_CHUNK : sums[blockIdx.x + 1];
    __syncthreads();
    const double step = (even ? (double)d.n_rows : all) / d.n_wanted, u = random_of(d.seed, head, 0);
    auto targets_below = [&](double edge) { /* targets (j + u) step < edge */
                                            const double n = ceil(edge / step - u);
                                            return n <= 0 ? 0u : n >= d.n_wanted ? d.n_wanted : (uint32_t)n;
    };
    double edge = edges[threadIdx.x];
    uint32_t from = targets_below(edge);
    const uint32_t until = targets_below(edges[threadIdx.x + 1]);
    for (int j = 0; j < EACH && first + j < d.n_rows; j++) {
        edge += cost[j];
        /* The thread's last row takes what is left, up to the next thread's edge. */
        const bool last = j + 1 == EACH || first + j + 1 == d.n_rows;
        const uint32_t to = last ? until : min(max(targets_below(edge), from), until);
        for (; from < to; from++) {
            const size_t at = (size_t)head * d.n_wanted + from;
            d.drawn[at] = d.row[(size_t)head * d.n_rows + first + j];
            d.place[at] = first + j;
        }
    }
}

/* Grid: (groups, head). */
__global__ void __launch_bounds__(THREADS) first_kernel(const sqz_cluster_draw d)
{
    const uint32_t g = blockIdx.x * THREADS + threadIdx.x, head = blockIdx.y;
    if (g > d.n_groups) return;
    const uint32_t begin = d.start[(size_t)head * (d.n_groups + 1) + g], *place = d.place + (size_t)head * d.n_wanted;
    uint32_t low = 0, high = d.n_wanted;
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (place[middle] < begin) low = middle + 1;
        else high = middle;
    }
    d.first[(size_t)head * (d.n_groups + 1) + g] = low;
}

enum sqz_status last_error()
{
    return cudaGetLastError() == cudaSuccess ? SQZ_OK : SQZ_ERROR_INTERNAL;
}

} // namespace

enum sqz_status sqz_cluster_take_rows(const sqz_cluster_keys &k, const sqz_cluster_centres &centres, uint32_t first,
                                      uint32_t n, const uint32_t *at, uint64_t seed, void *stream)
{
    const take_args a = {k, centres, first, n, at, seed};
    const unsigned blocks = (unsigned)(((size_t)k.n_heads * n + THREADS / 32 - 1) / (THREADS / 32));
    return k.type == SQZ_ROW_F16 ? sqz_launch(take_kernel<sqz_f16>, dim3(blocks), THREADS, 0, 1, false, a, stream)
                                 : sqz_launch(take_kernel<sqz_bf16>, dim3(blocks), THREADS, 0, 1, false, a, stream);
}

uint32_t sqz_cluster_draw_chunks(uint32_t n_rows)
{
    return (n_rows + DRAW_CHUNK - 1) / DRAW_CHUNK;
}

enum sqz_status sqz_cluster_draw_launch(const sqz_cluster_draw &d, void *stream)
{
    const cudaStream_t s = (cudaStream_t)stream;
    const uint32_t n_chunks = sqz_cluster_draw_chunks(d.n_rows);
    sum_kernel<<<dim3(n_chunks, d.n_heads), THREADS, 0, s>>>(d, n_chunks);
    running_kernel<<<d.n_heads, THREADS, 0, s>>>(d, n_chunks);
    draw_kernel<<<dim3(n_chunks, d.n_heads), THREADS, 0, s>>>(d, n_chunks);
    first_kernel<<<dim3(d.n_groups / THREADS + 1, d.n_heads), THREADS, 0, s>>>(d);
    return last_error();
}
