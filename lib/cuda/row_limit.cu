/*
 * The score from which a block's clusters are retained where it has so many rows to
 * read and no threshold: the lowest with which they hold no more, as lib/lookup.c
 * finds it by halving.
 *
 * A thread block a head counts keys by the logarithm of their clusters' scores, in BINS
 * parts of [LOW, 0], then once more in the part in which the rows come to an end. The
 * sums are integers, so their order does not matter.
 */
#include "device.cuh"

namespace
{

enum { THREADS = 1024, WARPS = THREADS / SQZ_WARP, EACH = 4 /* bins of a thread */, BINS = THREADS * EACH };

#define LOW  (-80.0f)
#define HIGH (-1e-4f) /* within the last bin: scores of 1 */

/* Where bin 0 begins and how wide one is, of natural logarithms of scores. */
struct scale {
    float from, width;

    __device__ __forceinline__ float start(uint32_t bin) const
    {
        return from + (float)bin * width;
    }
};

__device__ __forceinline__ void count(uint32_t *bins, const sqz_cuda_row_limit &a, uint32_t head, scale s)
{
    const uint32_t n_clusters = a.offsets.n_clusters[a.offsets.level];
    for (uint32_t c = threadIdx.x; c < n_clusters; c += THREADS) {
        const float score = a.score[(size_t)head * n_clusters + c];
        if (!(score > 0)) continue;
        const float at = (fminf(logf(score), HIGH) - s.from) / s.width;
        if (at >= 0 && at < (float)BINS) atomicAdd(bins + (uint32_t)at, sqz_keys_under(a.offsets, head, c));
    }
}

/* The highest bin with which the bins from the top on hold more than *rows, -1: none; *rows becomes what the bins above
 * leave of it. All threads; the bins are used up. */
__device__ __forceinline__ int bin_that_passes(uint32_t *bins, uint32_t *scratch, int *found, uint32_t *rows)
{
    const uint32_t top = BINS - 1 - EACH * threadIdx.x; /* a thread's highest */
    uint32_t sum = 0, total;
    if (threadIdx.x == 0) *found = -1;
    for (int i = 0; i < EACH; i++) sum += bins[top - i];
    uint32_t above = sqz_block_scan<WARPS>(sum, scratch, &total);
    for (int i = 0; i < EACH; i++) {
        const uint32_t n = bins[top - i];
        if (above <= *rows && above + n > *rows) {
            *found = (int)top - i;
            scratch[0] = above;
        }
        above += n;
    }
    __syncthreads();
    if (*found >= 0) *rows -= scratch[0];
    return *found;
}

__global__ void __launch_bounds__(THREADS) limit_kernel(const sqz_cuda_row_limit a)
{
    __shared__ uint32_t bins[BINS], scratch[WARPS];
    __shared__ int found;
    const uint32_t head = blockIdx.x;
    scale s = {LOW, -LOW / BINS};
    float limit = expf(LOW); /* of all rows that count at all */
    sqz_let_next_start();
    sqz_wait_for_previous();
    uint32_t rows = a.retain_rows[head];
    for (int round = 0; round < 2; round++) {
        for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
        __syncthreads();
        count(bins, a, head, s);
        __syncthreads();
        const int bin = bin_that_passes(bins, scratch, &found, &rows);
        if (bin < 0) break;
        limit = expf(s.start(bin + 1));
        s = {s.start(bin), s.width / BINS};
        __syncthreads(); /* found and scratch have been read */
    }
    if (threadIdx.x == 0) a.limit[head] = limit;
}

} // namespace

extern "C" enum sqz_status sqz_cuda_row_limit_launch(const struct sqz_cuda_row_limit *a, bool after_ours, void *stream)
{
    return sqz_launch(limit_kernel, dim3(a->n_head_kv), THREADS, 0, 1, after_ours, *a, stream);
}
