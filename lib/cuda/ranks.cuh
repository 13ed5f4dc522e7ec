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

__device__ __forceinline__ void sqz_mailbox_tell(uint64_t *word, float x, uint32_t step)
{
    const uint64_t of = (uint64_t)step << 32 | __float_as_uint(x);
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(of) : "memory");
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
    atomicCAS(failed, 0, from + 1);
    return true;
}

/* N words that rank `from` stores, `stride` apart; NaN of one that does not in time. */
template <int N>
__device__ __forceinline__ void sqz_mailbox_take(const sqz_cuda_ranks &r, uint32_t from, const uint64_t *words,
                                                 uint32_t stride, uint32_t step, float (&x)[N])
{
    uint64_t since = 0;
#pragma unroll 1
    for (uint32_t looks = 1;; looks++) {
        bool all = true;
        uint64_t of[N];
#pragma unroll
        for (int i = 0; i < N; i++) of[i] = sqz_mailbox_look(words + (size_t)i * stride);
#pragma unroll
        for (int i = 0; i < N; i++) {
            all = all && (uint32_t)(of[i] >> 32) == step;
            x[i] = __uint_as_float((uint32_t)of[i]);
        }
        if (all) return;
        if (looks % SQZ_MAILBOX_LOOKS || !sqz_mailbox_gives_up(r, from, &since)) continue;
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = __uint_as_float(0x7fffffffu);
        return;
    }
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

#endif
