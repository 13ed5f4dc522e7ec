/*
 * The exchanges of several ranks (ranks.h): a warp a query row. Through mailboxes
 * (ranks.cuh) each is one launch, in which a warp stores its row into every other
 * rank's memory and waits for theirs; where the caller gathers, one launch before and
 * one behind that. What it takes is the way over and back, about two microseconds
 * between GPUs on one switch, and not what goes over.
 *
 * Rows are added up in the order of the ranks, on all of them: results are the same to
 * the bit everywhere.
 */
#include "ranks.h"

#include <stdio.h>

#include "ranks.cuh"

namespace
{

enum { THREADS = 128, WARPS = THREADS / SQZ_WARP };

uint32_t blocks_for(uint32_t n_rows)
{
    return (n_rows + WARPS - 1) / WARPS;
}

/* ---- Totals --------------------------------------------------------------------------------- */

struct totals_call {
    struct sqz_cuda_ranks ranks;
    uint32_t n_rows, group;
    const struct sqz_cuda_part *parts, *base_parts;
    uint32_t n_splits, n_base;
    struct sqz_cuda_part *out; /* [n_rows] */
};

/* PEERS: out is of all ranks, else of this one. */
template <bool PEERS> __global__ void __launch_bounds__(THREADS) totals_kernel(const totals_call a)
{
    const uint32_t row = blockIdx.x * WARPS + threadIdx.x / SQZ_WARP, pair = row / a.group, r = row % a.group;
    sqz_let_next_start();
    sqz_wait_for_previous();
    if (row >= a.n_rows) return;
    const uint32_t step = PEERS ? sqz_mailbox_step(a.ranks) : 0;
    sqz_softmax_state s = sqz_merged_parts(a.parts + (size_t)pair * a.n_splits * a.group + r, a.n_splits, a.group);
    if (a.n_base)
        s = sqz_softmax_merged(
            s, sqz_merged_parts(a.base_parts + (size_t)pair * a.n_base * a.group + r, a.n_base, a.group));
    if (threadIdx.x % SQZ_WARP) return;
    if (PEERS) s = sqz_ranks_total(a.ranks, step, 0, row, true, s);
    a.out[row] = {s.maximum, s.sum};
}

struct sum_call {
    const struct sqz_cuda_part *all; /* [n_ranks][n_rows] */
    uint32_t n_ranks, n_rows;
    struct sqz_cuda_part *out;
};

/* A thread a row. */
__global__ void __launch_bounds__(THREADS) sum_kernel(const sum_call a)
{
    const uint32_t row = blockIdx.x * THREADS + threadIdx.x;
    sqz_let_next_start();
    sqz_wait_for_previous();
    if (row >= a.n_rows) return;
    sqz_softmax_state s = sqz_softmax_empty();
    for (uint32_t i = 0; i < a.n_ranks; i++) {
        const struct sqz_cuda_part part = a.all[(size_t)i * a.n_rows + row];
        s = sqz_softmax_merged(s, {part.maximum, part.sum});
    }
    a.out[row] = {s.maximum, s.sum};
}

/* ---- Results -------------------------------------------------------------------------------- */

struct merge_call {
    struct sqz_cuda_ranks ranks;
    uint32_t n_rows, n_ranks;
    const float *mine, *all; /* mailboxes: mine */
    bool f16;
    void *out;
    float *out_f32, *lse;
};

/* EACH: numbers of a lane. Where the first rank leads, this is its: it tells nobody. */
template <int EACH, bool PEERS> __global__ void __launch_bounds__(THREADS) merge_kernel(const merge_call a)
{
    enum { D = EACH * SQZ_WARP };
    const uint32_t row = blockIdx.x * WARPS + threadIdx.x / SQZ_WARP, lane = threadIdx.x % SQZ_WARP;
    const size_t rows = a.n_rows, at = (size_t)row * D + lane;
    sqz_let_next_start();
    sqz_wait_for_previous();
    if (row < a.n_rows) {
        const uint32_t step = PEERS ? sqz_mailbox_step(a.ranks) : 0, turn = step % 2;
        float own[EACH + 1]; /* the last: the log-sum-exp */
        if (PEERS) {
            const size_t word = (size_t)row * (SQZ_MAILBOX_MAX_DIM + 1) + lane;
#pragma unroll
            for (int i = 0; i < EACH; i++) own[i] = a.mine[at + i * SQZ_WARP];
            own[EACH] = a.mine[rows * D + row];
#pragma unroll 1
            for (uint32_t to = 0; to < a.n_ranks && !a.ranks.led; to++) {
                if (to == a.ranks.rank) continue;
                uint64_t *words =
                    sqz_mailbox_words(a.ranks, to) + sqz_mailbox_outputs(a.ranks, turn, a.ranks.rank) + word;
#pragma unroll
                for (int i = 0; i < EACH; i++) sqz_mailbox_tell(words + i * SQZ_WARP, own[i], step);
                if (lane == 0) sqz_mailbox_tell(words + D, own[EACH], step);
            }
        }
        sqz_ranks_result<EACH> result;
#pragma unroll 1
        for (uint32_t from = 0; from < a.n_ranks; from++) {
            float x[EACH], lse[1] = {own[EACH]};
            if (!PEERS) {
                const float *of = a.all + from * rows * (D + 1);
#pragma unroll
                for (int i = 0; i < EACH; i++) x[i] = of[at + i * SQZ_WARP];
                lse[0] = of[rows * D + row];
            } else if (from != a.ranks.rank) {
                const uint64_t *words = sqz_mailbox_words(a.ranks, a.ranks.rank) +
                                        sqz_mailbox_outputs(a.ranks, turn, from) +
                                        (size_t)row * (SQZ_MAILBOX_MAX_DIM + 1);
                sqz_mailbox_take<EACH>(a.ranks, from, words + lane, SQZ_WARP, step, x);
                sqz_mailbox_take<1>(a.ranks, from, words + D, 1, step, lse);
            } else {
#pragma unroll
                for (int i = 0; i < EACH; i++) x[i] = own[i];
            }
            result.add(x, lse[0]);
        }
        const float inverse = result.inverse();
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const float x = result.out[i] * inverse;
            const size_t to = at + i * SQZ_WARP;
            if (a.out_f32) a.out_f32[to] = x;
            else if (a.f16) ((__half *)a.out)[to] = __float2half(x);
            else ((__nv_bfloat16 *)a.out)[to] = __float2bfloat16(x);
        }
        if (a.lse && lane == 0) a.lse[row] = result.lse();
    }
    if (PEERS) sqz_ranks_end_call(a.ranks, gridDim.x);
}

__global__ void __launch_bounds__(SQZ_WARP) end_kernel(const __grid_constant__ sqz_cuda_ranks ranks)
{
    sqz_let_next_start();
    sqz_wait_for_previous();
    sqz_ranks_end_call(ranks, 1);
}

template <bool PEERS> enum sqz_status launch_merge(const struct merge_call &a, uint32_t head_dim, void *stream)
{
    const dim3 grid(blocks_for(a.n_rows));
    switch (head_dim) {
    case 64: return sqz_launch(merge_kernel<2, PEERS>, grid, THREADS, 0, 1, PEERS, a, stream);
    case 96: return sqz_launch(merge_kernel<3, PEERS>, grid, THREADS, 0, 1, PEERS, a, stream);
    case 128: return sqz_launch(merge_kernel<4, PEERS>, grid, THREADS, 0, 1, PEERS, a, stream);
    case 256: return sqz_launch(merge_kernel<8, PEERS>, grid, THREADS, 0, 1, PEERS, a, stream);
    }
    return SQZ_ERROR_UNSUPPORTED;
}

/* ---- Devices ---------------------------------------------------------------------------------- */

/* Lets device `from` store into device `to`'s memory. */
cudaError_t let_store(int from, int to)
{
    int can = 0;
    cudaError_t error = cudaDeviceCanAccessPeer(&can, from, to);
    if (error == cudaSuccess && !can) error = cudaErrorPeerAccessUnsupported;
    if (error == cudaSuccess) error = cudaSetDevice(from);
    if (error == cudaSuccess) error = cudaDeviceEnablePeerAccess(to, 0);
    if (error != cudaSuccess) cudaGetLastError(); /* not to be found by the next launch */
    return error == cudaErrorPeerAccessAlreadyEnabled ? cudaSuccess : error;
}

} // namespace

extern "C" size_t sqz_cuda_mailbox_bytes(uint32_t n_ranks, uint32_t n_rows)
{
    if (n_ranks < 2 || n_ranks > SQZ_CUDA_MOST_RANKS || n_rows == 0 || n_rows > 64 * 1024) return 0;
    struct sqz_cuda_ranks r = {};
    r.n_ranks = n_ranks;
    r.n_rows = n_rows;
    return SQZ_MAILBOX_HEADER + sqz_mailbox_queries(r, 2) * sizeof(uint64_t);
}

extern "C" enum sqz_status sqz_cuda_ranks_connect(const int *devices, uint32_t n, char *why, size_t room)
{
    int before;
    if (!devices || n < 2 || n > SQZ_CUDA_MOST_RANKS) {
        if (why) snprintf(why, room, "%u devices were given, 2 to %d can be connected", n, SQZ_CUDA_MOST_RANKS);
        return SQZ_ERROR_ARGUMENT;
    }
    cudaError_t error = cudaGetDevice(&before);
    if (error != cudaSuccess) {
        cudaGetLastError();
        if (why) snprintf(why, room, "there is no device: %s", cudaGetErrorString(error));
        return SQZ_ERROR_UNSUPPORTED;
    }
    for (uint32_t i = 0; i < n && error == cudaSuccess; i++)
        for (uint32_t j = 0; j < n && error == cudaSuccess; j++) {
            if (devices[i] == devices[j]) continue;
            error = let_store(devices[i], devices[j]);
            if (error != cudaSuccess && why)
                snprintf(why, room, "device %d cannot store into the memory of device %d: %s", devices[i], devices[j],
                         cudaGetErrorString(error));
        }
    cudaSetDevice(before);
    return error == cudaSuccess ? SQZ_OK : SQZ_ERROR_UNSUPPORTED;
}

extern "C" bool sqz_cuda_ranks_good(const struct sqz_cuda_ranks *r, size_t n_rows, size_t head_dim)
{
    if (r->n_ranks < 2 || r->n_ranks > SQZ_CUDA_MOST_RANKS || r->rank >= r->n_ranks || head_dim > SQZ_MAILBOX_MAX_DIM)
        return false;
    if (r->gather) return !r->led;
    for (uint32_t i = 0; i < r->n_ranks; i++)
        if (!r->mailbox[i] || (uintptr_t)r->mailbox[i] % 256) return false;
    return n_rows <= r->n_rows && sqz_cuda_mailbox_bytes(r->n_ranks, r->n_rows) > 0;
}

extern "C" enum sqz_status sqz_cuda_rank_totals_launch(const struct sqz_cuda_rank_totals *a, void *stream)
{
    const struct sqz_cuda_ranks *r = a->ranks;
    struct totals_call c = {*r,        a->n_pairs * a->group,         a->group, a->parts, a->base_parts, a->n_splits,
                            a->n_base, r->gather ? a->mine : a->total};
    const dim3 grid(blocks_for(c.n_rows));
    if (!r->gather) return sqz_launch(totals_kernel<true>, grid, THREADS, 0, 1, true, c, stream);
    enum sqz_status status = sqz_launch(totals_kernel<false>, grid, THREADS, 0, 1, true, c, stream);
    if (status == SQZ_OK) status = r->gather(r->gather_with, a->mine, a->all, c.n_rows * sizeof *a->mine, stream);
    const struct sum_call s = {a->all, r->n_ranks, c.n_rows, a->total};
    return status == SQZ_OK
               ? sqz_launch(sum_kernel, dim3((c.n_rows + THREADS - 1) / THREADS), THREADS, 0, 1, false, s, stream)
               : status;
}

extern "C" enum sqz_status sqz_cuda_rank_merge_launch(const struct sqz_cuda_rank_merge *a, void *stream)
{
    const struct sqz_cuda_ranks *r = a->ranks;
    const struct merge_call c = {*r,     a->n_rows,  r->n_ranks, a->mine, a->all, a->type == SQZ_ROW_F16,
                                 a->out, a->out_f32, a->lse};
    if (!r->gather) return launch_merge<true>(c, a->head_dim, stream);
    const size_t bytes = (size_t)a->n_rows * (a->head_dim + 1) * sizeof(float);
    const enum sqz_status status = r->gather(r->gather_with, a->mine, a->all, bytes, stream);
    return status == SQZ_OK ? launch_merge<false>(c, a->head_dim, stream) : status;
}

extern "C" enum sqz_status sqz_cuda_rank_end_launch(const struct sqz_cuda_ranks *r, void *stream)
{
    return sqz_launch(end_kernel, dim3(1), SQZ_WARP, 0, 1, true, *r, stream);
}
