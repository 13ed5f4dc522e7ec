/*
 * Sequences that read together: what any of them selected becomes one selection
 * for all, and the one pass over it becomes a part of each sequence's result.
 *
 * Marks of a head are shared among thread blocks. Each gathers its words in shared
 * memory, from the sequences' marks or from their lists, where its range begins by
 * a search, and writes them once, or once for every sequence (the tail asks for
 * them by sequence). Or-ing has no order, so the bits depend on the selections alone.
 */
#include "device.cuh"

namespace
{

enum { THREADS = 256, WARPS = THREADS / SQZ_WARP, MOST_WORDS = 2048 /* of a thread block */ };

struct unite_args {
    sqz_cuda_unite a;
    uint32_t n_words, n_splits;
};

/* The first place of an ascending list whose group is `group` or more. */
__device__ uint32_t place_in_list(const uint32_t *list, uint32_t n, uint32_t group)
{
    uint32_t low = 0, high = n;
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (list[middle] < group) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* Words [first, end) of a head from lists: a warp a sequence. */
__device__ void gather_lists(uint32_t *bits, const sqz_cuda_unite &a, uint32_t head, uint32_t first, uint32_t end)
{
    const uint32_t lane = threadIdx.x % SQZ_WARP;
    for (uint32_t b = threadIdx.x / SQZ_WARP; b < a.n_sequences; b += WARPS) {
        const size_t pair = (size_t)b * a.n_head_kv + head;
        const uint32_t *list = a.groups + pair * a.group_capacity;
        const uint32_t n = a.n_groups[pair];
        for (uint32_t i = place_in_list(list, n, 32 * first) + lane; i < n; i += SQZ_WARP) {
            const uint32_t group = list[i];
            if (group / 32 >= end) break;
            atomicOr(bits + group / 32 - first, 1u << group % 32);
        }
    }
}

/* Grid: (head, split of its words). */
__global__ void __launch_bounds__(THREADS) unite_kernel(const unite_args args)
{
    __shared__ uint32_t bits[MOST_WORDS];
    const sqz_cuda_unite &a = args.a;
    sqz_let_next_start();
    sqz_wait_for_previous();
    const uint32_t head = blockIdx.x / args.n_splits, split = blockIdx.x % args.n_splits;
    const uint32_t first = (uint32_t)((uint64_t)args.n_words * split / args.n_splits);
    const uint32_t end = (uint32_t)((uint64_t)args.n_words * (split + 1) / args.n_splits);
    const size_t stride = (size_t)a.n_head_kv * a.mark_words, place = (size_t)head * a.mark_words;
    for (uint32_t w = first + threadIdx.x; w < end; w += THREADS) {
        uint32_t word = 0;
        for (uint32_t b = 0; a.marks && b < a.n_sequences; b++) word |= a.marks[b * stride + place + w];
        bits[w - first] = word;
    }
    __syncthreads();
    if (!a.marks) gather_lists(bits, a, head, first, end);
    __syncthreads();
    for (uint32_t copy = 0; copy < a.n_copies; copy++)
        for (uint32_t w = first + threadIdx.x; w < end; w += THREADS)
            a.united[copy * stride + place + w] = bits[w - first];
}

/* A warp a query row, rows in the order [B][K][G], as the pass has them. */
__global__ void __launch_bounds__(THREADS) join_kernel(const sqz_cuda_join a)
{
    const uint32_t row = blockIdx.x * WARPS + threadIdx.x / SQZ_WARP, lane = threadIdx.x % SQZ_WARP;
    sqz_let_next_start();
    sqz_wait_for_previous();
    if (row >= a.n_pairs * a.group) return;
    const size_t to = ((size_t)(row / a.group) * a.n_parts + a.part) * a.group + row % a.group;
    const float lse = a.lse[row];
    if (lane == 0) a.parts[to] = {lse * SQZ_LOG2E, lse > -INFINITY ? 1.0f : 0.0f};
    for (uint32_t d = 4 * lane; d < a.head_dim; d += 4 * SQZ_WARP)
        *(float4 *)(a.part_out + to * a.head_dim + d) = *(const float4 *)(a.out + (size_t)row * a.head_dim + d);
}

} // namespace

extern "C" enum sqz_status sqz_cuda_unite_launch(const struct sqz_cuda_unite *a, bool after_ours, void *stream)
{
    const uint32_t n_words = (a->n_groups_of_head + 31) / 32, fill = 2 * (uint32_t)sqz_cuda_multiprocessors();
    const uint32_t least = (n_words + MOST_WORDS - 1) / MOST_WORDS, most = (n_words + SQZ_WARP - 1) / SQZ_WARP;
    uint32_t n_splits = fill / a->n_head_kv < most ? fill / a->n_head_kv : most;
    if (n_splits < least) n_splits = least;
    const unite_args args = {*a, n_words, n_splits};
    return sqz_launch(unite_kernel, dim3(n_splits * a->n_head_kv), THREADS, 0, 1, after_ours, args, stream);
}

extern "C" enum sqz_status sqz_cuda_join_launch(const struct sqz_cuda_join *a, bool after_ours, void *stream)
{
    return sqz_launch(join_kernel, dim3((a->n_pairs * a->group + WARPS - 1) / WARPS), THREADS, 0, 1, after_ours, *a,
                      stream);
}
