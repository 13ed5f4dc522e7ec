/*
 * Between llama.cpp's attention nodes and these kernels: F32 queries become F16, the
 * tokens' keys and values go behind their sequences' own rows, F16 results become
 * F32. 16 bytes a thread; bound by launching for one token, by memory for many.
 */
#include "calls.h"
#include "device.cuh"
#include "ranks.cuh"

namespace
{

enum { THREADS = 256, EACH = 8 /* numbers of 2 bytes a thread */ };

struct take_args {
    sqz_gpu_node node;
    uint32_t *counters, n_counters; /* that are set to 0 */
    sqz_cuda_ranks ranks;           /* of which the first leads; n_ranks 0: there are none */
};

struct give_args {
    float2 *out;
    const __half2 *from;
    size_t n_pairs;
    uint32_t row_pairs, padded_pairs;
};

__device__ __forceinline__ uint4 narrowed(const float *from)
{
    const float4 a = *(const float4 *)from, b = *(const float4 *)(from + 4);
    uint4 x;
    x.x = sqz_f16::pack(a.x, a.y);
    x.y = sqz_f16::pack(a.z, a.w);
    x.z = sqz_f16::pack(b.x, b.y);
    x.w = sqz_f16::pack(b.z, b.w);
    return x;
}

/* First the pieces of the queries, then those of the rows. */
__global__ void __launch_bounds__(THREADS) take_kernel(const take_args args)
{
    const sqz_gpu_node &a = args.node;
    const uint32_t pieces = a.padded_dim / EACH, there = a.head_dim / EACH;
    const uint4 zeros = make_uint4(0, 0, 0, 0);
    const size_t n_queries = a.queries_f16 ? (size_t)a.n_tokens * a.n_head * pieces : 0;
    size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    sqz_let_next_start();
    sqz_wait_for_previous();
    for (size_t c = i; c < args.n_counters; c += (size_t)gridDim.x * THREADS) args.counters[c] = 0;
    if (i < n_queries) {
        const uint32_t piece = i % pieces, head = i / pieces % a.n_head;
        const size_t token = i / pieces / a.n_head;
        const float *from = a.queries + token * a.query_token_stride + head * a.query_head_stride + piece * EACH;
        uint4 x = zeros;
        if (piece < there && args.ranks.n_ranks) {
            const uint32_t step = sqz_mailbox_step(args.ranks);
            uint4 of[1];
            if (args.ranks.rank) {
                sqz_ranks_take_query<1>(args.ranks, step, i / pieces, [=](int) { return piece; }, of);
                x = of[0];
            } else {
                x = narrowed(from);
                sqz_ranks_tell_query(args.ranks, step, i / pieces, piece, x);
            }
        } else if (piece < there) {
            x = narrowed(from);
        }
        ((uint4 *)a.queries_f16)[i] = x;
        return;
    }
    i -= n_queries;
    if (!a.keys || i >= (size_t)a.n_tokens * a.n_head_kv * pieces) return;
    const uint32_t piece = i % pieces, head = i / pieces % a.n_head_kv;
    const size_t token = i / pieces / a.n_head_kv;
    sqz_cuda_user user = {a.own_keys, a.own_values, (uint32_t)a.capacity_rows, (uint32_t)(a.first_row + token + 1)};
    if (a.users) user = a.users[token];
    const size_t to = ((size_t)head * user.capacity_rows + user.n_rows - 1) * pieces + piece;
    const size_t key = token * a.key_token_stride + head * a.key_head_stride + piece * EACH;
    const size_t value = token * a.value_token_stride + head * a.value_head_stride + piece * EACH;
    ((uint4 *)user.keys)[to] = piece < there ? *(const uint4 *)((const __half *)a.keys + key) : zeros;
    ((uint4 *)user.values)[to] = piece < there ? *(const uint4 *)((const __half *)a.values + value) : zeros;
}

__global__ void __launch_bounds__(THREADS) give_kernel(const give_args a)
{
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    sqz_let_next_start();
    sqz_wait_for_previous();
    if (i < a.n_pairs) a.out[i] = __half22float2(a.from[i / a.row_pairs * a.padded_pairs + i % a.row_pairs]);
}

unsigned blocks_of(size_t n)
{
    return (unsigned)((n + THREADS - 1) / THREADS);
}

bool aligned(const void *p, size_t stride_a, size_t stride_b, size_t size)
{
    return p && (uintptr_t)p % 16 == 0 && stride_a * size % 16 == 0 && stride_b * size % 16 == 0;
}

} // namespace

extern "C" bool sqz_gpu_node_good(const struct sqz_gpu_node *a)
{
    return a->n_tokens && a->head_dim && a->head_dim % EACH == 0 && a->padded_dim >= a->head_dim &&
           a->padded_dim % EACH == 0 && a->n_head_kv &&
           (!a->queries_f16 || aligned(a->queries, a->query_token_stride, a->query_head_stride, 4)) &&
           (a->keys ? aligned(a->keys, a->key_token_stride, a->key_head_stride, 2) &&
                          aligned(a->values, a->value_token_stride, a->value_head_stride, 2) &&
                          (a->users || (a->own_keys && a->own_values))
                    : a->queries_f16 != NULL);
}

extern "C" enum sqz_status sqz_gpu_take_and_clear(const struct sqz_gpu_node *a, uint32_t *counters, uint32_t n,
                                                  const struct sqz_cuda_ranks *led, void *stream)
{
    if (!sqz_gpu_node_good(a)) return SQZ_ERROR_ARGUMENT;
    const size_t heads = (a->keys ? a->n_head_kv : 0) + (a->queries_f16 ? a->n_head : 0);
    struct take_args args = {*a, counters, n, {}};
    if (led) args.ranks = *led;
    return sqz_launch(take_kernel, dim3(blocks_of(a->n_tokens * heads * (a->padded_dim / EACH))), THREADS, 0, 1, false,
                      args, stream);
}

extern "C" enum sqz_status sqz_gpu_take(const struct sqz_gpu_node *a, void *stream)
{
    return sqz_gpu_take_and_clear(a, NULL, 0, NULL, stream);
}

extern "C" enum sqz_status sqz_gpu_give(float *out, const void *f16, size_t n_rows, uint32_t head_dim,
                                        uint32_t padded_dim, void *stream)
{
    const give_args a = {(float2 *)out, (const __half2 *)f16, n_rows * (head_dim / 2), head_dim / 2, padded_dim / 2};
    if (!out || !f16 || n_rows == 0 || head_dim == 0 || head_dim % 2 || padded_dim % 2 || padded_dim < head_dim)
        return SQZ_ERROR_ARGUMENT;
    return sqz_launch(give_kernel, dim3(blocks_of(a.n_pairs)), THREADS, 0, 1, true, a, stream);
}
