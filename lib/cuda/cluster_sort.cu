/*
 * Clustering: rows sorted by key, a stable radix sort of 8 bits a pass.
 *
 * A pass cuts the items of a head into chunks of 4,096, one a thread block: digits
 * are counted (histogram [K][256][chunks]), the counts become places by one running sum
 * a head, and every warp puts its 512 items where they belong, 32 at a time in order,
 * equal digits told apart by match.any. Bound by memory: three reads and a write of
 * 8 bytes an item and pass.
 */
#include "cluster.cuh"

namespace
{

enum { THREADS = 256, WARPS = THREADS / SQZ_WARP, DIGITS = 256, CHUNK = 4096, WARP_ITEMS = CHUNK / WARPS };

struct pass_args {
    const uint32_t *keys, *values; /* [K][capacity]; values NULL: what rows says */
    uint32_t *keys_out, *values_out;
    sqz_cluster_rows rows;
    uint32_t capacity, n_chunks, shift, *histogram;
};

/* Counts of the thread block's warps: count [WARPS][DIGITS]. */
__device__ __forceinline__ void count_digits(const pass_args &a, const uint32_t *keys, uint32_t (*count)[DIGITS])
{
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int w = 0; w < WARPS; w++) count[w][threadIdx.x] = 0;
    __syncthreads();
    const uint32_t begin = blockIdx.x * CHUNK + warp * WARP_ITEMS;
    for (uint32_t i = begin + lane; i < begin + WARP_ITEMS && i < a.rows.n; i += 32)
        atomicAdd(&count[warp][keys[i] >> a.shift & 255], 1);
    __syncthreads();
}

/* Grid: (chunk, head). */
__global__ void __launch_bounds__(THREADS) histogram_kernel(const pass_args a)
{
    __shared__ uint32_t count[WARPS][DIGITS];
    count_digits(a, a.keys + (size_t)blockIdx.y * a.capacity, count);
    uint32_t sum = 0;
    for (int w = 0; w < WARPS; w++) sum += count[w][threadIdx.x];
    a.histogram[((size_t)blockIdx.y * DIGITS + threadIdx.x) * a.n_chunks + blockIdx.x] = sum;
}

/* x: running sums of n numbers, exclusive, by one thread block of 1,024. */
__global__ void __launch_bounds__(1024) scan_kernel(uint32_t *numbers, uint32_t n)
{
    __shared__ uint32_t sums[32];
    uint32_t *const x = numbers + (size_t)blockIdx.x * n;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t before = 0;
    for (uint32_t base = 0; base < n; base += 4096) {
        uint32_t v[4], mine = 0;
        const uint32_t at = base + 4 * threadIdx.x;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[i] = at + i < n ? x[at + i] : 0;
            mine += v[i];
        }
        uint32_t inclusive = mine;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const uint32_t y = __shfl_up_sync(~0u, inclusive, step);
            if (lane >= step) inclusive += y;
        }
        if (lane == 31) sums[warp] = inclusive;
        __syncthreads();
        uint32_t total = 0, here = before + inclusive - mine;
        for (uint32_t w = 0; w < 32; w++) {
            if (w < warp) here += sums[w];
            total += sums[w];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (at + i < n) x[at + i] = here;
            here += v[i];
        }
        before += total;
        __syncthreads();
    }
}

/* Grid: (chunk, head). */
__global__ void __launch_bounds__(THREADS) scatter_kernel(const pass_args a)
{
    __shared__ uint32_t place[WARPS][DIGITS];
    const size_t base = (size_t)blockIdx.y * a.capacity;
    const uint32_t *const keys = a.keys + base;
    count_digits(a, keys, place);
    uint32_t at = a.histogram[((size_t)blockIdx.y * DIGITS + threadIdx.x) * a.n_chunks + blockIdx.x];
    for (int w = 0; w < WARPS; w++) {
        const uint32_t n = place[w][threadIdx.x];
        place[w][threadIdx.x] = at;
        at += n;
    }
    __syncthreads();
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, begin = blockIdx.x * CHUNK + warp * WARP_ITEMS;
    for (uint32_t first = begin; first < begin + WARP_ITEMS && first < a.rows.n; first += 32) {
        const uint32_t i = first + lane;
        const bool exists = i < a.rows.n;
        const uint32_t key = exists ? keys[i] : 0, digit = exists ? key >> a.shift & 255 : DIGITS;
        const uint32_t equal = __match_any_sync(~0u, digit), before = __popc(equal & ((1u << lane) - 1));
        uint32_t to = 0;
        if (exists) to = place[warp][digit] + before;
        __syncwarp();
        if (exists && before == 0) place[warp][digit] += __popc(equal);
        __syncwarp();
        if (exists) {
            a.keys_out[base + to] = key;
            a.values_out[base + to] = a.values ? a.values[base + i] : a.rows.row(i);
        }
    }
}

struct bounds_args {
    const uint32_t *keys; /* sorted */
    uint32_t *start, n, capacity, n_starts, start_stride;
};

/* start[k]: the first item whose key is k or more. Grid: (items, head). */
__global__ void __launch_bounds__(THREADS) bounds_kernel(const bounds_args a)
{
    const uint32_t i = blockIdx.x * THREADS + threadIdx.x;
    if (i > a.n) return;
    const uint32_t *const keys = a.keys + (size_t)blockIdx.y * a.capacity;
    uint32_t *const start = a.start + (size_t)blockIdx.y * a.start_stride;
    const uint32_t from = i ? keys[i - 1] + 1 : 0, to = i < a.n ? keys[i] + 1 : a.n_starts;
    for (uint32_t k = from; k < to && k < a.n_starts; k++) start[k] = i;
}

struct tiles_args {
    const uint32_t *start;
    uint32_t *tile_start, n_groups;
};

/* Grid: head; one warp. */
__global__ void __launch_bounds__(32) tiles_kernel(const tiles_args a)
{
    const uint32_t *const start = a.start + (size_t)blockIdx.x * (a.n_groups + 1);
    uint32_t *const tile_start = a.tile_start + (size_t)blockIdx.x * (a.n_groups + 1);
    uint32_t before = 0;
    for (uint32_t base = 0; base < a.n_groups; base += 32) {
        const uint32_t g = base + threadIdx.x;
        const uint32_t n = g < a.n_groups ? (start[g + 1] - start[g] + SQZ_CLUSTER_TILE - 1) / SQZ_CLUSTER_TILE : 0;
        uint32_t inclusive = n;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const uint32_t y = __shfl_up_sync(~0u, inclusive, step);
            if (threadIdx.x >= step) inclusive += y;
        }
        if (g < a.n_groups) tile_start[g] = before + inclusive - n;
        before += __shfl_sync(~0u, inclusive, 31);
    }
    if (threadIdx.x == 0) tile_start[a.n_groups] = before;
}

uint32_t chunks_of(uint32_t n)
{
    return (n + CHUNK - 1) / CHUNK;
}

} // namespace

size_t sqz_cluster_histogram_words(uint32_t n_heads, uint32_t n)
{
    return (size_t)n_heads * DIGITS * chunks_of(n);
}

enum sqz_status sqz_cluster_sort_launch(const sqz_cluster_sort &s, void *stream)
{
    pass_args a;
    memset(&a, 0, sizeof a);
    a.rows = s.rows;
    a.capacity = s.capacity;
    a.n_chunks = chunks_of(s.rows.n);
    a.histogram = s.histogram;
    a.keys = s.keys;
    const dim3 grid(a.n_chunks, s.n_heads);
    const cudaStream_t on = (cudaStream_t)stream;
    uint32_t n_passes = 1;
    while (n_passes < 4 && (s.n_keys - 1) >> 8 * n_passes) n_passes++;
    for (uint32_t pass = 0; pass < n_passes; pass++) {
        a.shift = 8 * pass;
        a.keys_out = s.scratch[pass % 2];
        a.values_out = pass + 1 == n_passes ? s.sorted : s.scratch[2 + pass % 2];
        histogram_kernel<<<grid, THREADS, 0, on>>>(a);
        scan_kernel<<<s.n_heads, 1024, 0, on>>>(a.histogram, DIGITS * a.n_chunks);
        scatter_kernel<<<grid, THREADS, 0, on>>>(a);
        a.keys = a.keys_out;
        a.values = a.values_out;
    }
    const bounds_args b = {a.keys, s.start, s.rows.n, s.capacity, s.n_starts, s.start_stride};
    bounds_kernel<<<dim3(s.rows.n / THREADS + 1, s.n_heads), THREADS, 0, on>>>(b);
    return cudaGetLastError() == cudaSuccess ? SQZ_OK : SQZ_ERROR_INTERNAL;
}

enum sqz_status sqz_cluster_tiles(uint32_t n_heads, uint32_t n_groups, const uint32_t *start, uint32_t *tile_start,
                                  void *stream)
{
    const tiles_args a = {start, tile_start, n_groups};
    return sqz_launch(tiles_kernel, dim3(n_heads), 32, 0, 1, false, a, stream);
}
