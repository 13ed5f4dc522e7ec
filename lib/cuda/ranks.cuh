/*
 * What ranks tell each other through mailboxes (squeeze_cuda.h, struct
 * sqz_cuda_ranks), from within kernels: each number is one word of 8 bytes with the
 * call's number beside it, stored into the memory of the rank that waits for it. A
 * word arrives whole, so there is neither a fence nor a flag, and nothing is cleared:
 * the number of another call is not the one that is waited for.
 *
 * Calls take turns with two places a word. Who stores call n + 2's has ended call n + 1,
 * and so has taken what its peer stored after ending call n: nobody looks at that
 * place any more.
 *
 *   header, 256 bytes
 *   totals   [2][2 exchanges of a call][n_ranks, from][n_rows][2]  maximum and sum, base 2
 *   outputs  [2][n_ranks, from][n_rows][MAX_DIM + 1]               normalised, then the log-sum-exp
 *   queries  [2][n_rows][MAX_DIM / 2]                              pairs of F16 numbers of the first rank, where it leads
 *
 * Where the first rank leads, the others tell their outputs to it alone. Turns are enough there, too: it tells the
 * queries of call n + 2 when it has the outputs of call n + 1, which the others told behind all that they took of call n;
 * and who tells an output or a total of call n + 2 has these queries.
 */
#ifndef SQZ_LIB_CUDA_RANKS_CUH
#define SQZ_LIB_CUDA_RANKS_CUH

#include "device.cuh"

enum { SQZ_MAILBOX_HEADER = 256, SQZ_MAILBOX_EXCHANGES = 2, SQZ_MAILBOX_MAX_DIM = 256, SQZ_MAILBOX_LOOKS = 64 };

/* Words before those of a place. */
__host__ __device__ inline size_t sqz_mailbox_totals(const sqz_cuda_ranks &r, uint32_t turn, uint32_t which,
                                                     uint32_t from)
{
    return (((size_t)turn * SQZ_MAILBOX_EXCHANGES + which) * r.n_ranks + from) * r.n_rows * 2;
}
__host__ __device__ inline size_t sqz_mailbox_outputs(const sqz_cuda_ranks &r, uint32_t turn, uint32_t from)
{
    return sqz_mailbox_totals(r, 2, 0, 0) + ((size_t)turn * r.n_ranks + from) * r.n_rows * (SQZ_MAILBOX_MAX_DIM + 1);
}
__host__ __device__ inline size_t sqz_mailbox_queries(const sqz_cuda_ranks &r, uint32_t turn)
{
    return sqz_mailbox_outputs(r, 2, 0) + (size_t)turn * r.n_rows * (SQZ_MAILBOX_MAX_DIM / 2);
}

/* The words of rank `of`. */
__device__ __forceinline__ uint64_t *sqz_mailbox_words(const sqz_cuda_ranks &r, uint32_t of)
{
    return (uint64_t *)((char *)r.mailbox[of] + SQZ_MAILBOX_HEADER);
}
__device__ __forceinline__ struct sqz_cuda_mailbox *sqz_mailbox_header(const sqz_cuda_ranks &r)
{
    return (struct sqz_cuda_mailbox *)r.mailbox[r.rank];
}

/* The number of the call that a kernel is part of; when the kernel before has ended. */
__device__ __forceinline__ uint32_t sqz_mailbox_step(const sqz_cuda_ranks &r)
{
    return __ldcg(&sqz_mailbox_header(r)->step) + 1;
}

__device__ __forceinline__ void sqz_mailbox_tell(uint64_t *word, uint32_t x, uint32_t step)
{
    const uint64_t of = (uint64_t)step << 32 | x;
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(of) : "memory");
}
__device__ __forceinline__ void sqz_mailbox_tell(uint64_t *word, float x, uint32_t step)
{
    sqz_mailbox_tell(word, __float_as_uint(x), step);
}
__device__ __forceinline__ uint64_t sqz_mailbox_look(const uint64_t *word)
{
    uint64_t of;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(of) : "l"(word) : "memory");
    return of;
}

/* Whether a kernel that has waited since `since` (0 at first: then it is set) for rank `from` gives up, for this call and
 * those that follow. */
__device__ __forceinline__ bool sqz_mailbox_gives_up(const sqz_cuda_ranks &r, uint32_t from, uint64_t *since)
{
    uint64_t now;
    uint32_t *failed = &sqz_mailbox_header(r)->failed;
    if (__ldcg(failed)) return true;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (!*since) *since = now;
    if (now - *since <= r.patience_ns) return false;
    if (atomicCAS(failed, 0, from + 1) == 0 && r.failed) *(volatile uint32_t *)r.failed = from + 1;
    return true;
}

/* N words that rank `from` stores, number i at place(i); NaN of one that does not in time. dry: whatever is there. */
template <int N, class Place>
__device__ __forceinline__ void sqz_mailbox_take_from(const sqz_cuda_ranks &r, uint32_t from, const Place &place,
                                                      uint32_t step, float (&x)[N], bool dry = false)
{
    uint64_t since = 0;
#pragma unroll 1
    for (uint32_t looks = 1;; looks++) {
        bool all = true;
        uint64_t of[N];
#pragma unroll
        for (int i = 0; i < N; i++) of[i] = sqz_mailbox_look(place(i));
#pragma unroll
        for (int i = 0; i < N; i++) {
            all = all && (uint32_t)(of[i] >> 32) == step;
            x[i] = __uint_as_float((uint32_t)of[i]);
        }
        if (all || dry) return;
        if (looks % SQZ_MAILBOX_LOOKS || !sqz_mailbox_gives_up(r, from, &since)) continue;
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = __uint_as_float(0x7fffffffu);
        return;
    }
}
/* The same, `stride` apart. */
template <int N>
__device__ __forceinline__ void sqz_mailbox_take(const sqz_cuda_ranks &r, uint32_t from, const uint64_t *words,
                                                 uint32_t stride, uint32_t step, float (&x)[N])
{
    sqz_mailbox_take_from<N>(r, from, [=](int i) { return words + (size_t)i * stride; }, step, x);
}

/* A query row's state of this rank becomes that of all, the same to the bit on each: added up in the order of ranks; a
 * thread. tells: whether the others learn this one's from this thread. */
__device__ __forceinline__ sqz_softmax_state sqz_ranks_total(const sqz_cuda_ranks &r, uint32_t step, uint32_t which,
                                                             uint32_t row, bool tells, sqz_softmax_state mine)
{
    const uint32_t turn = step % 2;
#pragma unroll 1
    for (uint32_t to = 0; tells && to < r.n_ranks; to++) {
        if (to == r.rank) continue;
        uint64_t *words = sqz_mailbox_words(r, to) + sqz_mailbox_totals(r, turn, which, r.rank) + 2 * (size_t)row;
        sqz_mailbox_tell(words, mine.maximum, step);
        sqz_mailbox_tell(words + 1, mine.sum, step);
    }
    sqz_softmax_state all = sqz_softmax_empty();
#pragma unroll 1
    for (uint32_t from = 0; from < r.n_ranks; from++) {
        float x[2] = {mine.maximum, mine.sum};
        if (from != r.rank)
            sqz_mailbox_take<2>(
                r, from, sqz_mailbox_words(r, r.rank) + sqz_mailbox_totals(r, turn, which, from) + 2 * (size_t)row, 1,
                step, x);
        all = sqz_softmax_merged(all, {x[0], x[1]});
    }
    return all;
}

/* ---- Queries of the first rank ------------------------------------------------------------- */

/* Where numbers 8 piece .. 8 piece + 7 of a query row are in the mailbox of rank `of`: four words. */
__device__ __forceinline__ uint64_t *sqz_ranks_query(const sqz_cuda_ranks &r, uint32_t of, uint32_t step, size_t row,
                                                     uint32_t piece)
{
    return sqz_mailbox_words(r, of) + sqz_mailbox_queries(r, step % 2) + row * (SQZ_MAILBOX_MAX_DIM / 2) + 4 * piece;
}

/* Tells all others a piece of a row; a thread of the first rank. */
__device__ __forceinline__ void sqz_ranks_tell_query(const sqz_cuda_ranks &r, uint32_t step, size_t row, uint32_t piece,
                                                     uint4 x)
{
#pragma unroll 1
    for (uint32_t to = 1; to < r.n_ranks; to++) {
        uint64_t *words = sqz_ranks_query(r, to, step, row, piece);
        sqz_mailbox_tell(words, x.x, step);
        sqz_mailbox_tell(words + 1, x.y, step);
        sqz_mailbox_tell(words + 2, x.z, step);
        sqz_mailbox_tell(words + 3, x.w, step);
    }
}

/* N pieces of a row, number i is piece piece_of(i); a thread of another rank. */
template <int N, class Pieces>
__device__ __forceinline__ void sqz_ranks_take_query(const sqz_cuda_ranks &r, uint32_t step, size_t row,
                                                     const Pieces &piece_of, uint4 (&x)[N])
{
    float pairs[4 * N];
    sqz_mailbox_take_from<4 * N>(
        r, 0, [&](int i) { return sqz_ranks_query(r, r.rank, step, row, piece_of(i / 4)) + i % 4; }, step, pairs);
#pragma unroll
    for (int i = 0; i < N; i++)
        x[i] = make_uint4(__float_as_uint(pairs[4 * i]), __float_as_uint(pairs[4 * i + 1]),
                          __float_as_uint(pairs[4 * i + 2]), __float_as_uint(pairs[4 * i + 3]));
}

/* ---- Results ------------------------------------------------------------------------------------ */

/* N numbers of a row as all ranks have them, from what each has, normalised, and its log-sum-exp. Written such that it is
 * the same to the bit wherever it is compiled. */
template <int N> struct sqz_ranks_result {
    float out[N] = {}, maximum = -INFINITY, sum = 0;

    __device__ __forceinline__ void add(const float (&x)[N], float lse)
    {
        if (lse == -INFINITY) return; /* what has not arrived, NaN, goes on */
        const float part = lse * SQZ_LOG2E, raised = fmaxf(maximum, part),
                    factor = sqz_softmax_factor(maximum, raised), weight = exp2f(part - raised);
#pragma unroll
        for (int i = 0; i < N; i++) out[i] = __fmaf_rn(out[i], factor, __fmul_rn(weight, x[i]));
        sum = __fmaf_rn(sum, factor, weight);
        maximum = raised;
    }
    __device__ __forceinline__ float inverse() const
    {
        return sum == 0 ? 0.0f : 1.0f / sum;
    }
    __device__ __forceinline__ float lse() const
    {
        return sum == 0 ? -INFINITY : (maximum + log2f(sum)) * SQZ_LN2;
    }
};

/* The last of n_blocks blocks to come here ends the call: all know its number. A thread of each. */
__device__ __forceinline__ void sqz_ranks_arrive(const sqz_cuda_ranks &r, uint32_t n_blocks)
{
    struct sqz_cuda_mailbox *header = sqz_mailbox_header(r);
    if (atomicAdd(&header->arrived, 1) + 1 < n_blocks) return;
    header->arrived = 0;
    header->step++;
}
/* The same of blocks whose threads know it each by itself; all threads. */
__device__ __forceinline__ void sqz_ranks_end_call(const sqz_cuda_ranks &r, uint32_t n_blocks)
{
    __syncthreads();
    if (threadIdx.x == 0) sqz_ranks_arrive(r, n_blocks);
}

#endif
