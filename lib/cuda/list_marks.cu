/*
 * Bits to lists: the marked groups of every (sequence, KV head), ascending.
 *
 * A head's words are shared among n_splits thread blocks. Each counts for itself
 * the bits before its share, a few KB in the second-level cache, so none waits
 * for another. Then 256 words at a time: a running sum gives every word its place,
 * and a warp writes the bits of a word side by side.
 */
#include "device.cuh"

namespace
{

enum { THREADS = 256, WARPS = THREADS / SQZ_WARP, MAX_SPLITS = 16 };

/* Grid: (split of a pair's words), pairs. */
__global__ void __launch_bounds__(THREADS) list_kernel(const sqz_cuda_list_marks a)
{
    __shared__ uint32_t scratch[WARPS], word_of[THREADS], place_of[THREADS];
    const uint32_t pair = blockIdx.x / a.n_splits, split = blockIdx.x % a.n_splits;
    const uint32_t n_words = (a.n_groups_of_head + 31) / 32;
    const uint32_t first = (uint32_t)((uint64_t)n_words * split / a.n_splits);
    const uint32_t end = (uint32_t)((uint64_t)n_words * (split + 1) / a.n_splits);
    const uint32_t *marks = a.marks + (size_t)pair * a.mark_words;
    uint32_t *list = a.groups + (size_t)pair * a.group_capacity;
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    sqz_let_next_start();
    sqz_wait_for_previous();
    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < a.n_arrived; i += gridDim.x * THREADS) a.arrived[i] = 0;
    uint32_t count = 0, before, total;
    for (uint32_t i = threadIdx.x; i < first; i += THREADS) count += __popc(marks[i]);
    sqz_block_scan<WARPS>(count, scratch, &before);
    for (uint32_t at = first; at < end; at += THREADS) { /* the same rounds for every thread: block_scan meets */
        const uint32_t word = at + threadIdx.x < end ? marks[at + threadIdx.x] : 0;
        word_of[threadIdx.x] = word;
        place_of[threadIdx.x] = before + sqz_block_scan<WARPS>(__popc(word), scratch, &total);
        __syncwarp(); /* a warp goes through its own words */
        before += total;
        for (int i = 0; i < SQZ_WARP; i++) {
            const uint32_t bits = word_of[SQZ_WARP * warp + i];
            if (bits >> lane & 1)
                list[place_of[SQZ_WARP * warp + i] + __popc(bits & ((1u << lane) - 1))] =
                    32 * (at + SQZ_WARP * warp + i) + lane;
        }
        __syncwarp();
    }
    if (split + 1 == a.n_splits && threadIdx.x == 0) {
        a.n_groups[pair] = before;
        if (a.n_retained) a.n_retained[pair] = before;
    }
}

} // namespace

/* A thread block for every 256 words of a head, up to MAX_SPLITS: each reads all marks before its own. */
extern "C" enum sqz_status sqz_cuda_list_marks_launch(const struct sqz_cuda_list_marks *a, bool after_ours,
                                                      void *stream)
{
    struct sqz_cuda_list_marks split = *a;
    split.n_splits = ((a->n_groups_of_head + 31) / 32 + THREADS - 1) / THREADS;
    if (split.n_splits > MAX_SPLITS) split.n_splits = MAX_SPLITS;
    return sqz_launch(list_kernel, dim3(a->n_pairs * split.n_splits), THREADS, 0, 1, after_ours, split, stream);
}
