/*
 * Exact attention of one token on what each (sequence, KV head) retains, or on
 * all rows, and on the user's own rows: every row of keys and values is read once
 * for up to 8 query heads that share it.
 *
 * The work is tiles of 16 rows: two groups of a pair's list, then its user rows. Every
 * pair's tiles are cut into stretches, about equal over all pairs, one a thread block
 * (of more than 32 pairs two or more, in turn), so every multiprocessor has the same bytes
 * to read whatever each head retains. No stretch has two pairs: to end one and begin another takes 9 us (H100), a third of what a
 * block has to do where contexts are short. Multiprocessors are not equally fast (from
 * 200 to 310 us for the same bytes), so a long stretch has up to SQZ_ROWS_PIECES pieces: a
 * block takes the first, large one of its own stretch, then whichever of all small ones
 * is next. The block that finishes a pair's last part merges them all, in the order of
 * the tiles, and writes the output: who made a part does not show in it.
 *
 * A warp reads a tile's keys as operands of the tensor core (sqz_mma_chunk), turns
 * logits into weights, and multiplies the values: by multiply-adds in F32 for one query,
 * on the tensor core for more (group_state). Loads of a tile's values and of the next
 * tile's keys are on their way while one of the two is computed with. A weight may stand
 * up to 2^SLACK above the maximum that it is relative to, so the state is rescaled rarely.
 *
 * Shared memory: prefix sums of stretches (4 (B K + 1) bytes), the queries as fragments
 * (32 D bytes a block of 8), and for merging 8 warps x Q x (D + 2) floats.
 */
#include "contexts.h"
#include "device.cuh"
#include "ranks.cuh"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / SQZ_WARP,
    TILE = 16,
    CHUNK = 8,        /* query heads of a pass */
    LITTLE = 4 * WARPS /* tiles of a stretch where there are many pairs */
};

#define SLACK 10.0f

/* How the lanes of a warp lie over value rows: LANES a row, ROWS rows a load. */
template <int D> struct value_lanes {
    enum { LANES = D / 8, ROWS = SQZ_WARP / LANES, LOADS = TILE / ROWS };
};

__device__ __forceinline__ uint32_t warp_total(uint32_t x)
{
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

/* The arguments, whose rows are here, of one or of several contexts. */
struct rows_call : sqz_cuda_attend_rows {
    uint32_t n_contexts;
    struct {
        const void *keys, *values;
        uint32_t n_rows;
    } context[SQZ_MOST_CONTEXTS];
    uint8_t context_of[SQZ_MOST_CONTEXT_SEQUENCES];
    sqz_cuda_ranks ranks; /* n_ranks 0: there are none */
};

struct pair_source {
    const uint32_t *groups; /* NULL: all rows */
    uint32_t n_groups, n_rows, n_user;
    const void *keys, *values, *user_keys, *user_values; /* from the head's first row on */
};

/* The number of a sequence's context. */
__device__ __forceinline__ uint32_t context_of(const rows_call &a, uint32_t sequence)
{
    return a.n_contexts > 1 ? a.context_of[sequence] : 0;
}

template <class Args> __device__ __forceinline__ uint32_t pair_user_rows(const Args &a, uint32_t pair)
{
    if (!a.n_user) return 0;
    const uint32_t sequence = a.n_sequences > 1 ? pair / a.n_head_kv : 0; /* a division is a tenth of a microsecond */
    if (a.users) return min(a.users[sequence].n_rows, a.n_user);
    return a.user_rows ? min(a.user_rows[sequence], a.n_user) : a.n_user;
}

/* Rows of the context that a window leaves out, where all n_rows are read. */
template <class Args> __device__ __forceinline__ uint32_t pair_unseen(const Args &a, uint32_t pair, uint32_t n_rows)
{
    return a.groups || !a.users ? 0 : min(a.users[pair / a.n_head_kv].first_row, n_rows);
}

template <class Args> __device__ __forceinline__ uint32_t pair_groups(const Args &a, uint32_t pair)
{
    if (a.groups) return a.n_groups[pair];
    const uint32_t n_rows = a.context[context_of(a, pair / a.n_head_kv)].n_rows;
    return (uint32_t)(((uint64_t)n_rows - pair_unseen(a, pair, n_rows) + SQZ_GROUP_ROWS - 1) / SQZ_GROUP_ROWS);
}

/* Where a tile's halves of 8 rows are: the first row of each, how many exist, and whether they are the user's. */
struct tile_place {
    uint32_t low, high; /* groups */
    uint32_t n_low, n_high;
    bool user;
};

__device__ __forceinline__ tile_place place_tile(const pair_source &s, uint32_t tile)
{
    tile_place p;
    const uint32_t listed = (s.n_groups + 1) / 2;
    p.user = tile >= listed;
    const uint32_t i = p.user ? 2 * (tile - listed) : 2 * tile, n_rows = p.user ? s.n_user : s.n_rows;
    bool second = true;
    p.low = i, p.high = i + 1;
    if (!p.user) {
        second = i + 1 < s.n_groups;
        if (s.groups) {
            const uint2 both = *(const uint2 *)(s.groups + i); /* the capacity is even: the second is there to read */
            p.low = both.x, p.high = both.y;
        }
    }
    const uint64_t low = (uint64_t)p.low * SQZ_GROUP_ROWS, high = (uint64_t)p.high * SQZ_GROUP_ROWS;
    p.n_low = low < n_rows ? (uint32_t)min((uint64_t)SQZ_GROUP_ROWS, n_rows - low) : 0;
    p.n_high = second && high < n_rows ? (uint32_t)min((uint64_t)SQZ_GROUP_ROWS, n_rows - high) : 0;
    return p;
}

/* The same, nothing where the tile is not below `end`. */
__device__ __forceinline__ tile_place place_tile_below(const pair_source &s, uint32_t tile, uint32_t end)
{
    return tile < end ? place_tile(s, tile) : tile_place{0, 0, 0, 0, false};
}

template <class Type, int D> struct key_tile {
    uint4 low[D / 32], high[D / 32];
    __device__ __forceinline__ void load(const pair_source &s, const tile_place &p, int g, int t)
    {
        typedef typename Type::element element;
        const element *base = (const element *)(p.user ? s.user_keys : s.keys);
        const element *low_row = base + ((size_t)p.low * SQZ_GROUP_ROWS + g) * D;
        const element *high_row = base + ((size_t)p.high * SQZ_GROUP_ROWS + g) * D;
#pragma unroll
        for (int j = 0; j < D / 32; j++) low[j] = sqz_load_once(low_row + 8 * (t + 4 * j), g < p.n_low);
#pragma unroll
        for (int j = 0; j < D / 32; j++) high[j] = sqz_load_once(high_row + 8 * (t + 4 * j), g < p.n_high);
    }
};

/* Shared memory of a block. */
template <int D, int Q> struct block_memory {
    float out[WARPS][Q][D], maximum[WARPS][Q], sum[WARPS][Q], factor[WARPS][Q];
};

/* State of a warp that serves one query, whose logits lanes 4 g have: the maximum, the sum over the lane's own rows,
 * and the output over the lane's own rows and its 8 dimensions, by multiply-adds in F32. */
template <int D> struct warp_state {
    float maximum, sum, out[8];

    __device__ __forceinline__ void reset()
    {
        maximum = -INFINITY, sum = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = 0;
    }

    /* Logits y[0] and y[2] (rows g and g + 8; -INFINITY: no such row) become weights. */
    __device__ __forceinline__ void weigh(float (&y)[4])
    {
        const float largest = fmaxf(y[0], y[2]);
        if (__any_sync(~0u, largest > maximum + SLACK)) raise(largest);
        const float base = maximum == -INFINITY ? 0.0f : maximum;
        y[0] = sqz_exp2(y[0] - base);
        y[2] = sqz_exp2(y[2] - base);
        sum += y[0] + y[2];
    }

    __device__ __forceinline__ void raise(float largest)
    {
#pragma unroll
        for (int step = 4; step < SQZ_WARP; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
        const float raised = fmaxf(maximum, largest), factor = sqz_softmax_factor(maximum, raised);
        maximum = raised;
        sum *= factor;
        const float f = __shfl_sync(~0u, factor, 0);
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] *= f;
    }

    /* Adds value rows that came by load `load` of the tile, with the weights of weigh(). */
    template <class Type> __device__ __forceinline__ void add(const float (&weight)[4], uint4 value, int load)
    {
        typedef value_lanes<D> lanes;
        const int lane = threadIdx.x % SQZ_WARP, row = load * lanes::ROWS + lane / lanes::LANES;
        const int half = load * lanes::ROWS / 8; /* no load has rows of both halves */
        const float w = __shfl_sync(~0u, weight[2 * half], row % 8 * 4);
        const uint32_t pairs[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 x = Type::unpack(pairs[i]);
            out[2 * i] += w * x.x;
            out[2 * i + 1] += w * x.y;
        }
    }

    __device__ __forceinline__ void store(block_memory<D, 1> *memory)
    {
        typedef value_lanes<D> lanes;
        const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
#pragma unroll
        for (int step = 4; step < SQZ_WARP; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (lane == 0) memory->maximum[warp][0] = maximum, memory->sum[warp][0] = sum;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float x = out[i], all = x;
#pragma unroll
            for (int r = 1; r < lanes::ROWS; r++) all += __shfl_down_sync(~0u, x, r * lanes::LANES);
            if (lane < lanes::LANES) memory->out[warp][0][8 * lane + i] = all;
        }
    }
};

/* Loads of values that are on their way together: all where registers allow. */
template <int D> struct value_batch {
    enum { ALL = value_lanes<D>::LOADS, N = ALL > 8 ? 4 : ALL };
};

template <class Type, int D>
__device__ __forceinline__ void load_values(uint4 (&value)[value_batch<D>::N], const pair_source &s,
                                            const tile_place &p, int batch)
{
    typedef typename Type::element element;
    typedef value_lanes<D> lanes;
    const int lane = threadIdx.x % SQZ_WARP, lane_row = lane / lanes::LANES;
    const element *base = (const element *)(p.user ? s.user_values : s.values);
#pragma unroll
    for (int i = 0; i < value_batch<D>::N; i++) {
        const int load = batch * value_batch<D>::N + i, half = load * lanes::ROWS / 8;
        const uint32_t row = (load * lanes::ROWS + lane_row) % 8, n = half ? p.n_high : p.n_low;
        const uint32_t group = half ? p.high : p.low;
        value[i] = sqz_load_once(base + ((size_t)group * SQZ_GROUP_ROWS + row) * D + lane % lanes::LANES * 8,
                                 row < n && lane_row < lanes::ROWS);
    }
}

/* The same for several queries, where multiply-adds in F32 would take longer than the bytes: values go through the
 * tensor core too, transposed, with weights rounded to the type. Logits are products of queries (rows; half of them are
 * none) and keys, so that lane 4 g + t has those of query g with rows 2t, 2t + 1, 2t + 8 and 2t + 9 of the tile, which is how the
 * second product takes weights; it also loads those four rows' values, 8 dimensions of chunk g + 8 m. */
template <int D, int Q> struct group_state {
    enum { CHUNKS = (D / 8 + 7) / 8 };
    float maximum, sum;      /* of query g; sum: over the lane's own rows */
    float out[CHUNKS][4][4]; /* [m][e]: dimension 2 e of the chunk, queries 2t and 2t + 1, then dimension 2 e + 1 */

    __device__ __forceinline__ void reset()
    {
        maximum = -INFINITY, sum = 0;
#pragma unroll
        for (int m = 0; m < CHUNKS; m++)
#pragma unroll
            for (int e = 0; e < 4; e++)
#pragma unroll
                for (int i = 0; i < 4; i++) out[m][e][i] = 0;
    }

    __device__ __forceinline__ void weigh(float (&y)[4])
    {
        const float largest = fmaxf(fmaxf(y[0], y[1]), fmaxf(y[2], y[3]));
        if (__any_sync(~0u, largest > maximum + SLACK)) raise(largest);
        const float base = maximum == -INFINITY ? 0.0f : maximum;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            y[i] = sqz_exp2(y[i] - base);
            sum += y[i];
        }
    }

    __device__ __forceinline__ void raise(float largest)
    {
        const int t = threadIdx.x % 4;
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        const float raised = fmaxf(maximum, largest), factor = sqz_softmax_factor(maximum, raised);
        maximum = raised;
        sum *= factor;
        const float f[2] = {__shfl_sync(~0u, factor, 8 * t), __shfl_sync(~0u, factor, 8 * t + 4)};
#pragma unroll
        for (int m = 0; m < CHUNKS; m++)
#pragma unroll
            for (int e = 0; e < 4; e++)
#pragma unroll
                for (int i = 0; i < 4; i++) out[m][e][i] *= f[i % 2];
    }

    /* value: of the four rows, chunk by chunk. */
    template <class Type> __device__ __forceinline__ void add(const float (&weight)[4], const uint4 (&value)[CHUNKS][4])
    {
        const uint32_t b0 = Type::pack(weight[0], weight[1]), b1 = Type::pack(weight[2], weight[3]);
#pragma unroll
        for (int m = 0; m < CHUNKS; m++) {
            const uint4 *v = value[m];
            auto one = [&](float(&to)[4], uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
                sqz_mma<Type>(to, __byte_perm(x0, x1, 0x5410), __byte_perm(x0, x1, 0x7632), __byte_perm(x2, x3, 0x5410),
                              __byte_perm(x2, x3, 0x7632), b0, b1);
            };
            one(out[m][0], v[0].x, v[1].x, v[2].x, v[3].x);
            one(out[m][1], v[0].y, v[1].y, v[2].y, v[3].y);
            one(out[m][2], v[0].z, v[1].z, v[2].z, v[3].z);
            one(out[m][3], v[0].w, v[1].w, v[2].w, v[3].w);
        }
    }

    __device__ __forceinline__ void store(block_memory<D, Q> *memory)
    {
        const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP, g = lane / 4, t = lane % 4;
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (t == 0 && g < Q) memory->maximum[warp][g] = maximum, memory->sum[warp][g] = sum;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (2 * t + i >= Q) break;
#pragma unroll
            for (int m = 0; m < CHUNKS; m++) {
                if (g + 8 * m >= D / 8) break;
#pragma unroll
                for (int e = 0; e < 4; e++)
                    *(float2 *)&memory->out[warp][2 * t + i][8 * (g + 8 * m) + 2 * e] =
                        make_float2(out[m][e][i], out[m][e][2 + i]);
            }
        }
    }
};

template <int D, int Q> struct state_of {
    typedef group_state<D, Q> type;
};
template <int D> struct state_of<D, 1> {
    typedef warp_state<D> type;
};

template <class Type, int D, int Q>
__device__ __forceinline__ void add_tiles(group_state<D, Q> &state, const rows_call &a, const pair_source &s,
                                          tile_place here, tile_place next, uint32_t first, uint32_t end,
                                          const uint4 *fragments)
{
    enum { CHUNKS = group_state<D, Q>::CHUNKS };
    typedef typename Type::element element;
    const int lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
    const float factor = a.scale * SQZ_LOG2E;
    uint32_t tile = first + threadIdx.x / SQZ_WARP;
    if (tile >= end) return;
    key_tile<Type, D> keys;
    keys.load(s, here, g, t);
    for (; tile < end; tile += WARPS) {
        uint4 value[CHUNKS][4];
        const element *base = (const element *)(here.user ? s.user_values : s.values);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t row = 2 * t + i % 2, n = i < 2 ? here.n_low : here.n_high;
            const element *p = base + ((size_t)(i < 2 ? here.low : here.high) * SQZ_GROUP_ROWS + row) * D;
#pragma unroll
            for (int m = 0; m < CHUNKS; m++)
                value[m][i] = sqz_load_once(p + 8 * (g + 8 * m), row < n && g + 8 * m < D / 8);
        }
        float low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
            const uint4 q = fragments[j * SQZ_WARP + lane];
            sqz_mma<Type>(low, q.x, 0, q.y, 0, keys.low[j].x, keys.low[j].y);
            sqz_mma<Type>(low, q.z, 0, q.w, 0, keys.low[j].z, keys.low[j].w);
            sqz_mma<Type>(high, q.x, 0, q.y, 0, keys.high[j].x, keys.high[j].y);
            sqz_mma<Type>(high, q.z, 0, q.w, 0, keys.high[j].z, keys.high[j].w);
        }
        const bool more = tile + WARPS < end;
        tile_place after = next;
        if (more) {
            keys.load(s, next, g, t);
            if (tile + 2 * WARPS < end) after = place_tile(s, tile + 2 * WARPS);
        }
        float y[4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            y[i] = 2 * t + i < here.n_low ? low[i] * factor : -INFINITY;
            y[2 + i] = 2 * t + i < here.n_high ? high[i] * factor : -INFINITY;
        }
        state.weigh(y);
        state.template add<Type>(y, value);
        here = next;
        next = after;
    }
}

/* The tiles [first, end) of a pair, warps in turn; here, next: where the warp's first two are. */
template <class Type, int D, int Q>
__device__ __forceinline__ void add_tiles(warp_state<D> &state, const rows_call &a, const pair_source &s,
                                          tile_place here, tile_place next, uint32_t first, uint32_t end,
                                          const uint4 *fragments)
{
    typedef value_batch<D> batch;
    const int lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
    const float factor = a.scale * SQZ_LOG2E;
    uint32_t tile = first + threadIdx.x / SQZ_WARP;
    if (tile >= end) return;
    key_tile<Type, D> keys;
    keys.load(s, here, g, t);
    for (; tile < end; tile += WARPS) {
        uint4 value[batch::N];
        load_values<Type, D>(value, s, here, 0);
        float y[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < D / 32; j++)
            sqz_mma_chunk<Type>(y, keys.low[j], keys.high[j], fragments[j * SQZ_WARP + lane]);
        const bool more = tile + WARPS < end;
        tile_place after = next;
        if (more) {
            keys.load(s, next, g, t);
            if (tile + 2 * WARPS < end) after = place_tile(s, tile + 2 * WARPS);
        }
        y[0] = g < here.n_low ? y[0] * factor : -INFINITY;
        y[2] = g < here.n_high ? y[2] * factor : -INFINITY;
        state.weigh(y);
#pragma unroll
        for (int b = 0; b < batch::ALL / batch::N; b++) {
            if (b > 0) load_values<Type, D>(value, s, here, b);
#pragma unroll
            for (int i = 0; i < batch::N; i++) state.template add<Type>(y, value[i], b * batch::N + i);
        }
        here = next;
        next = after;
    }
}

/* Merges the warps' states into partial result `to`; all threads. */
template <class Type, int D, int Q>
__device__ void store_part(typename state_of<D, Q>::type &state, block_memory<D, Q> *memory, sqz_cuda_part *to,
                           float *to_out, uint32_t n_queries)
{
    state.store(memory);
    __syncthreads();
    if (threadIdx.x < WARPS * Q) { /* a lane a warp of the block, its neighbours are the other warps */
        const int q = threadIdx.x / WARPS, w = threadIdx.x % WARPS;
        const unsigned lanes = WARPS * Q < SQZ_WARP ? (1u << WARPS * Q % SQZ_WARP) - 1 : ~0u;
        const float maximum = memory->maximum[w][q];
        float largest = maximum;
#pragma unroll
        for (int step = 1; step < WARPS; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, step));
        const float factor = sqz_softmax_factor(maximum, largest);
        float sum = memory->sum[w][q] * factor;
#pragma unroll
        for (int step = 1; step < WARPS; step *= 2) sum += __shfl_xor_sync(lanes, sum, step);
        memory->factor[w][q] = factor;
        if (w == 0 && q < n_queries) to[q] = {largest, sum};
    }
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < n_queries * D; i += THREADS) {
        const uint32_t q = i / D;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += memory->out[w][q][i % D] * memory->factor[w][q];
        to_out[i] = sum;
    }
}

/* How a block's threads lie over the merged output: 4 numbers a thread, and so many shares of the parts. */
template <int D, int Q> struct merge_lanes {
    enum {
        EACH = Q * D / 4,
        FIT = THREADS / EACH > 0 ? THREADS / EACH : 1,
        SHARES = FIT < WARPS ? FIT : WARPS, /* whose sums fit where the warps' outputs were */
        ITEMS = (EACH + THREADS - 1) / THREADS,
        LOADS = 16 / ITEMS /* parts that are asked for at once */
    };
};

/* What this rank has of a pair; shared. */
template <int D, int Q> struct rank_result {
    float4 out[Q * D / 4]; /* [Q][D] */
    float lse[Q];
};

/* Four numbers of a row, from number `column` on, and its log-sum-exp go to the first rank; a thread. */
template <int D>
__device__ __forceinline__ void tell_result(const sqz_cuda_ranks &r, uint32_t step, size_t row, uint32_t column,
                                            float4 x, float lse)
{
    uint64_t *words = sqz_mailbox_words(r, 0) + sqz_mailbox_outputs(r, step % 2, r.rank) + row * (SQZ_MAILBOX_MAX_DIM + 1);
    sqz_mailbox_tell(words + column, x.x, step);
    sqz_mailbox_tell(words + column + 1, x.y, step);
    sqz_mailbox_tell(words + column + 2, x.z, step);
    sqz_mailbox_tell(words + column + 3, x.w, step);
    if (column == 0) sqz_mailbox_tell(words + D, lse, step);
}

/* The same of the first rank become those of all. */
template <int D>
__device__ __forceinline__ float4 result_of_all(const rows_call &a, uint32_t step, size_t row, uint32_t column, float4 mine,
                                                float lse, bool dry)
{
    sqz_ranks_result<4> all;
    const float first[4] = {mine.x, mine.y, mine.z, mine.w};
    all.add(first, lse);
#pragma unroll 1
    for (uint32_t from = 1; from < a.ranks.n_ranks; from++) {
        const uint64_t *words = sqz_mailbox_words(a.ranks, 0) + sqz_mailbox_outputs(a.ranks, step % 2, from) +
                                row * (SQZ_MAILBOX_MAX_DIM + 1);
        float x[5];
        sqz_mailbox_take_from<5>(a.ranks, from, [=](int i) { return words + (i < 4 ? column + i : D); }, step, x,
                                 dry);
        const float theirs[4] = {x[0], x[1], x[2], x[3]};
        all.add(theirs, x[4]);
    }
    const float inverse = all.inverse();
    if (a.lse && column == 0 && !dry) a.lse[row] = all.lse();
    return make_float4(all.out[0] * inverse, all.out[1] * inverse, all.out[2] * inverse, all.out[3] * inverse);
}

/* A pair's results go to the first rank, which waits for those of all. All threads, apart from what they had to do, whose
 * registers are full. step: the call's number, which all of the block know. dry: nothing is waited for, told or written,
 * see attend_kernel(). */
template <class Type, int D, int Q>
__device__ __noinline__ void share_pair(const rows_call &a, uint32_t step, size_t row, uint32_t n_queries,
                                        const rank_result<D, Q> *mine, bool dry)
{
    __syncthreads();
    if (threadIdx.x == THREADS - 1 && !dry) sqz_ranks_arrive(a.ranks, a.n_sequences * a.n_head_kv * gridDim.y);
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < n_queries * (D / 4); i += THREADS) {
        const uint32_t query = i / (D / 4), column = i % (D / 4) * 4;
        if (a.ranks.rank) {
            if (!dry) tell_result<D>(a.ranks, step, row + query, column, mine->out[i], mine->lse[query]);
            continue;
        }
        const float4 x = result_of_all<D>(a, step, row + query, column, mine->out[i], mine->lse[query], dry);
        const size_t to = (row + query) * D + column;
        if (dry) continue;
        if (a.out_f32) *(float4 *)(a.out_f32 + to) = x;
        else *(uint2 *)((uint16_t *)a.out + to) = make_uint2(Type::pack(x.x, x.y), Type::pack(x.z, x.w));
    }
}

/* Merges parts first, first + 1, ... of a pair, and its tail, and writes output and lse; all threads. Reads what other
 * blocks wrote: past the first-level cache. memory: shared, as much as block_memory's `out`. What it takes is latencies: so
 * outputs are asked for together with what weighs them, LOADS a thread, and all parts' weights are found at once, a warp a
 * query. A part without weight is not looked at further. dry: of one part, nothing is read or written; see attend_kernel().
 * SHARED: what comes out goes to *of_all, for share_pair(). */
template <class Type, int D, int Q, bool SHARED>
__device__ __forceinline__ void finish_pair(const rows_call &a, uint32_t pair, uint32_t first_query,
                                            uint32_t n_queries, size_t first_part, uint32_t n_parts, float *memory,
                                            bool dry, rank_result<D, Q> *of_all)
{
    typedef merge_lanes<D, Q> lanes;
    enum { CAPACITY = WARPS * D, KEPT = 2 /* parts of a lane that are not asked for twice */, MORE = 4 };
    static_assert(Q <= WARPS, "a warp a query");
    const uint32_t group = a.n_head / a.n_head_kv, n = n_parts + (dry ? 0 : a.n_tail), stride = group * D;
    const int lane = threadIdx.x % SQZ_WARP;
    const size_t row = (size_t)pair * group + first_query, tail = (size_t)pair * a.n_tail;
    const uint32_t q = threadIdx.x / SQZ_WARP;
    const uint32_t share = lanes::ITEMS == 1 ? threadIdx.x / lanes::EACH : 0;
    auto part = [&](uint32_t i) {
        if (dry) return sqz_softmax_empty();
        const sqz_cuda_part *p = i < n_parts ? a.parts + (first_part + i) * group + first_query + q
                                             : a.tail_parts + (tail + i - n_parts) * group + first_query + q;
        const float2 x = __ldcg((const float2 *)p);
        return sqz_softmax_state{x.x, x.y};
    };
    auto query_of = [&](int k) { return (threadIdx.x % lanes::EACH + k * THREADS) / (D / 4); };
    auto has_work = [&](int k) { return query_of(k) < n_queries && share < lanes::SHARES; };
    /* Of part i: parts lie `stride` apart, those of the tail elsewhere. */
    auto output = [&](int k, uint32_t i) {
        const size_t column = (size_t)(first_query + query_of(k)) * D + threadIdx.x % (D / 4) * 4;
        const float *from = i < n_parts ? a.part_out + (first_part + i) * stride : a.tail_out + (tail + i - n_parts) * stride;
        return from + column;
    };
    sqz_softmax_state early[KEPT], all = sqz_softmax_empty();
    float4 x[lanes::ITEMS][lanes::LOADS], out[lanes::ITEMS];
#pragma unroll
    for (int k = 0; k < KEPT; k++) early[k] = lane + k * SQZ_WARP < n && q < n_queries ? part(lane + k * SQZ_WARP) : all;
#pragma unroll
    for (int k = 0; k < lanes::ITEMS; k++) {
        const float *from = output(k, share);
        const uint32_t known = dry || !has_work(k) ? 0 : n_parts;
        out[k] = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < lanes::LOADS; j++, from += lanes::SHARES * stride) {
            x[k][j] = make_float4(0, 0, 0, 0);
            if (share + j * lanes::SHARES < known) x[k][j] = __ldcg((const float4 *)from);
        }
    }
    float inverse = 0;
    if (q < n_queries) {
        float maximum = -INFINITY, sum = 0;
#pragma unroll
        for (int k = 0; k < KEPT; k++) maximum = fmaxf(maximum, early[k].maximum);
#pragma unroll 1
        for (uint32_t i = lane + KEPT * SQZ_WARP; i < n; i += SQZ_WARP) maximum = fmaxf(maximum, part(i).maximum);
#pragma unroll
        for (int step = 16; step; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
#pragma unroll
        for (int k = 0; k < KEPT; k++) sum += early[k].sum * sqz_softmax_factor(early[k].maximum, maximum);
#pragma unroll 1
        for (uint32_t i = lane + KEPT * SQZ_WARP; i < n; i += SQZ_WARP) {
            const sqz_softmax_state s = part(i);
            sum += s.sum * sqz_softmax_factor(s.maximum, maximum);
        }
#pragma unroll
        for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        all = {maximum, sum};
        inverse = sum > 0 ? 1.0f / sum : 0.0f;
        const float lse = sqz_softmax_log2(all) * SQZ_LN2;
        if (SHARED && lane == 0) of_all->lse[q] = lse;
        if (!SHARED && lane == 0 && a.lse && !dry) a.lse[row + q] = lse;
    }
#pragma unroll 1
    for (uint32_t base = 0; base < n; base += CAPACITY) {
        const uint32_t end = min(n, base + CAPACITY);
        if (q < n_queries) {
#pragma unroll
            for (int k = 0; k < KEPT; k++) {
                const uint32_t i = lane + k * SQZ_WARP;
                if (base == 0 && i < end) memory[i * Q + q] = sqz_softmax_factor(early[k].maximum, all.maximum) * inverse;
            }
#pragma unroll 1
            for (uint32_t i = base ? base + lane : lane + KEPT * SQZ_WARP; i < end; i += SQZ_WARP)
                memory[(i - base) * Q + q] = sqz_softmax_factor(part(i).maximum, all.maximum) * inverse;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < lanes::ITEMS; k++) {
            if (!has_work(k)) continue;
            const float *weight = memory + query_of(k);
            auto add = [&](float w, float4 of) {
                out[k].x += w * of.x, out[k].y += w * of.y, out[k].z += w * of.z, out[k].w += w * of.w;
            };
            uint32_t next = base + share;
            if (base == 0) {
                const uint32_t known = min(end, n_parts);
#pragma unroll
                for (int j = 0; j < lanes::LOADS; j++)
                    if (share + j * lanes::SHARES < known) add(weight[(share + j * lanes::SHARES) * Q], x[k][j]);
                next += min((known + lanes::SHARES - 1 - share) / lanes::SHARES, (uint32_t)lanes::LOADS) * lanes::SHARES;
            }
#pragma unroll 1
            for (; next < end; next += lanes::SHARES * MORE) {
                float4 rest[MORE];
                float w[MORE];
#pragma unroll
                for (int j = 0; j < MORE; j++) {
                    const uint32_t i = next + j * lanes::SHARES;
                    w[j] = i < end && !dry ? weight[(i - base) * Q] : 0.0f;
                    rest[j] = make_float4(0, 0, 0, 0);
                    if (w[j] != 0) rest[j] = __ldcg((const float4 *)output(k, i));
                }
#pragma unroll
                for (int j = 0; j < MORE; j++) add(w[j], rest[j]);
            }
        }
        __syncthreads(); /* memory is free again */
    }
    if (lanes::SHARES > 1) {
        float4 *sums = (float4 *)memory;
        if (share < lanes::SHARES) sums[threadIdx.x] = out[0];
        __syncthreads();
        if (share == 0)
            for (int i = 1; i < lanes::SHARES; i++) {
                const float4 of = sums[threadIdx.x + i * lanes::EACH];
                out[0].x += of.x, out[0].y += of.y, out[0].z += of.z, out[0].w += of.w;
            }
    }
#pragma unroll
    for (int k = 0; k < lanes::ITEMS; k++) {
        if (!has_work(k) || share > 0 || dry) continue;
        if (SHARED) {
            of_all->out[threadIdx.x + k * THREADS] = out[k];
            continue;
        }
        const size_t to = (row + query_of(k)) * D + threadIdx.x % (D / 4) * 4;
        if (a.out_f32) *(float4 *)(a.out_f32 + to) = out[k];
        else *(uint2 *)((uint16_t *)a.out + to) = make_uint2(Type::pack(out[k].x, out[k].y), Type::pack(out[k].z, out[k].w));
    }
}

/* A block's memory; of several ranks with what it tells. */
template <int D, int Q, bool SHARED> struct memory_of : block_memory<D, Q> {};
template <int D, int Q> struct memory_of<D, Q, true> : block_memory<D, Q> {
    alignas(16) rank_result<D, Q> of_all;
};
template <int D, int Q> __device__ __forceinline__ rank_result<D, Q> *results_of(memory_of<D, Q, false> *)
{
    return NULL;
}
template <int D, int Q> __device__ __forceinline__ rank_result<D, Q> *results_of(memory_of<D, Q, true> *memory)
{
    return &memory->of_all;
}

/* How the work is cut: stretches of one pair each, of at most `each` tiles, and their pieces. */
struct work_cut {
    uint32_t n_stretches, n_pieces; /* pieces of a stretch */

    /* Where piece i of a stretch of n tiles begins: after 25 of 32 parts of it, then 4, 2 and 1; of fewer pieces the
     * last has what is left. */
    __device__ __forceinline__ uint32_t begin(uint32_t i, uint32_t n) const
    {
        return i == 0 ? 0 : i == n_pieces ? n : (uint32_t)((uint64_t)n * (33 - (8u >> (i - 1))) / 32);
    }
};

__device__ __forceinline__ uint32_t tiles_of(uint32_t n_groups, uint32_t n_user)
{
    return (n_groups + 1) / 2 + (n_user + TILE - 1) / TILE;
}
__device__ __forceinline__ uint32_t tiles_of(const rows_call &a, uint32_t pair)
{
    return tiles_of(pair_groups(a, pair), pair_user_rows(a, pair));
}

/* n / d of numbers below 2^24, in a third of the time that it takes for all: every block waits for a row of these. */
__device__ __forceinline__ uint32_t quotient(uint32_t n, uint32_t d)
{
    const uint32_t near = (uint32_t)__fdividef((float)n, (float)d);
    const int32_t left = (int32_t)(n - near * d);
    return left < 0 ? near - 1 : left >= (int32_t)d ? near + 1 : near;
}

/* Of at most `each` tiles; one without tiles where a pair reads nothing. */
__device__ __forceinline__ uint32_t stretches_of(uint32_t n_tiles, uint32_t each)
{
    return max(quotient(n_tiles + each - 1, each), 1u);
}

__device__ __forceinline__ uint32_t up_to_me(uint32_t x)
{
    const int lane = threadIdx.x % SQZ_WARP;
#pragma unroll
    for (int step = 1; step < SQZ_WARP; step *= 2) {
        const uint32_t before = __shfl_up_sync(~0u, x, step);
        if (lane >= step) x += before;
    }
    return x;
}

/* prefix[p]: stretches before pair p, of n_pairs and fewer than 32; returns the most tiles that one has: the fewest with
 * which stretches are not more than thread blocks. A warp, a lane a pair; several candidates together where lanes allow. */
__device__ __forceinline__ uint32_t cut_few(const rows_call &a, uint32_t n_pairs, uint32_t *prefix)
{
    const uint32_t lane = threadIdx.x, n = lane < n_pairs ? tiles_of(a, lane) : 0, total = warp_total(n);
    const uint32_t bits = n_pairs > 1 ? 32 - __clz(n_pairs - 1) : 0, width = 1u << bits, turns = SQZ_WARP >> bits;
    const uint32_t of_mine = __shfl_sync(~0u, n, lane & (width - 1)), turn = lane >> bits;
    uint32_t low = max(quotient(total + gridDim.x - 1, gridDim.x), 1u), high = max(total, 1u);
    if (n_pairs < gridDim.x) high = max(min(high, quotient(total, gridDim.x - n_pairs) + 1), low);
#pragma unroll 1
    while (low < high) { /* `high` does, and so does what is above one that does */
        const uint32_t step = (high - low + turns - 1) >> (5 - bits), tried = low + turn * step;
        uint32_t stretches = (lane & (width - 1)) < n_pairs ? stretches_of(of_mine, tried) : 0;
#pragma unroll 1
        for (uint32_t i = 1; i < width; i *= 2) stretches += __shfl_xor_sync(~0u, stretches, i);
        const uint32_t fit = __ballot_sync(~0u, stretches <= gridDim.x && tried < high);
        const uint32_t n_tried = min(quotient(high - low + step - 1, step), turns);
        const uint32_t first = fit ? (uint32_t)(__ffs(fit) - 1) >> bits : n_tried;
        if (first < n_tried) high = low + first * step;
        if (first > 0) low = low + (first - 1) * step + 1;
    }
    const uint32_t mine = lane < n_pairs ? stretches_of(n, low) : 0, before = up_to_me(mine) - mine;
    if (lane <= n_pairs) prefix[lane] = before;
    return low;
}

/* The same of many pairs: more stretches than thread blocks, which take turns; all threads. */
__device__ __forceinline__ uint32_t cut_many(const rows_call &a, uint32_t n_pairs, uint32_t *prefix,
                                             uint32_t *warp_sums)
{
    const uint32_t own = (n_pairs + THREADS - 1) / THREADS; /* pairs of a thread */
    const uint32_t from = min(threadIdx.x * own, n_pairs), to = min(from + own, n_pairs);
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    uint32_t total = 0, sum = 0;
#pragma unroll 1
    for (uint32_t p = from; p < to; p++) total += tiles_of(a, p);
    total = warp_total(total);
    if (lane == 0) warp_sums[warp] = total;
    __syncthreads();
    total = 0;
    for (int w = 0; w < WARPS; w++) total += warp_sums[w];
    uint32_t each = total / (2 * gridDim.x) + 1;
    /* Of little work one turn each: a stretch takes longer to end than a few more tiles. */
    if (each < LITTLE && n_pairs < gridDim.x) each = max(total / (gridDim.x - n_pairs / 2) + 1, 2u * WARPS);
#pragma unroll 1
    for (uint32_t p = from; p < to; p++) sum += stretches_of(tiles_of(a, p), each);
    const uint32_t inclusive = up_to_me(sum);
    __syncthreads(); /* warp_sums has been read */
    if (lane == SQZ_WARP - 1) warp_sums[warp] = inclusive;
    __syncthreads();
    uint32_t at = inclusive - sum;
    for (int w = 0; w < warp; w++) at += warp_sums[w];
#pragma unroll 1
    for (uint32_t p = from; p < to; p++) {
        prefix[p] = at;
        at += stretches_of(tiles_of(a, p), each);
    }
    if (threadIdx.x == THREADS - 1) prefix[n_pairs] = at;
    return each;
}

/* The first round is dry: it goes through everything with nothing to do while the kernel before ends, because instructions
 * are far away when a model's products were in between, and would be waited for one after the other. Blocks of the second
 * half find no place until that kernel has ended, and need not. */
template <class Type, int D, int Q, bool SHARED>
__global__ void __launch_bounds__(THREADS, D > 128 ? 1 : 2) attend_kernel(const __grid_constant__ rows_call a)
{
    extern __shared__ uint4 dynamic[];
    __shared__ uint32_t warp_sums[WARPS], longest, next_place, step; /* step: of several ranks */
    __shared__ bool last;
    typedef typename Type::element element;
    enum : uint32_t { DRY = ~0u, BEGIN = ~1u };
    uint4 *fragments = dynamic;
    memory_of<D, Q, SHARED> *memory = (memory_of<D, Q, SHARED> *)(fragments + D / 32 * SQZ_WARP);
    uint32_t *prefix = (uint32_t *)(memory + 1);
    const uint32_t n_pairs = a.n_sequences * a.n_head_kv, group = a.n_head / a.n_head_kv;
    const uint32_t first_query = blockIdx.y * CHUNK, n_queries = min(group - first_query, (uint32_t)Q);
    const int warp = threadIdx.x / SQZ_WARP;
    work_cut cut = {0, 1};
    uint32_t *const taken = a.arrived + (size_t)n_pairs * gridDim.y + blockIdx.y;
    uint32_t n_places = 0;

    sqz_let_next_start();
    /* Places in the order of work: the first pieces of all stretches, then the second, ... A block's first one is its
     * own, then it takes whichever is next. */
#pragma unroll 1
    for (uint32_t place = blockIdx.x < gridDim.x / 2 ? DRY : BEGIN; place >= BEGIN || place < n_places;
         place = next_place) {
        if (place == BEGIN) {
            sqz_wait_for_previous();
            if (SHARED && threadIdx.x == THREADS - 1) step = sqz_mailbox_step(a.ranks);
            if (n_pairs >= SQZ_WARP) {
                const uint32_t each = cut_many(a, n_pairs, prefix, warp_sums);
                if (threadIdx.x == 0) longest = each;
            } else if (warp == 0) {
                longest = cut_few(a, n_pairs, prefix);
            }
            __syncthreads();
            /* Small pieces have two tiles a warp, and a pair not too many parts to merge. */
            cut = {prefix[n_pairs], n_pairs >= SQZ_WARP ? 1u : longest >= 512 ? 4u : longest >= 256 ? 3u : 1u};
            while (cut.n_pieces > 1 && cut.n_pieces * cut.n_stretches > 140 * n_pairs) cut.n_pieces--;
            n_places = cut.n_stretches * cut.n_pieces;
            place = blockIdx.x;
            if (place >= n_places) break;
        }
        const bool dry = place == DRY;
        uint32_t pair = 0, n_mine = 1, from = 0, end = WARPS, stretch = 0, piece = 0;
        pair_source source = {NULL, 0, 0, 0, NULL, NULL, NULL, NULL};
        if (!dry) {
            stretch = place;
            if (cut.n_pieces > 1) stretch = place % cut.n_stretches, piece = place / cut.n_stretches;
            pair = sqz_place_of(prefix, n_pairs, stretch);
            const uint32_t sequence = a.n_sequences > 1 ? pair / a.n_head_kv : 0, head = pair - sequence * a.n_head_kv;
            const sqz_cuda_user *own = a.n_user && a.users ? a.users + sequence : NULL;
            const uint32_t i = context_of(a, sequence), n_rows = a.context[i].n_rows, unseen = pair_unseen(a, pair, n_rows);
            const size_t seen = ((size_t)head * n_rows + unseen) * D,
                         of_user = (own ? (size_t)head * own->capacity_rows : (size_t)pair * a.user_capacity_rows) * D;
            source = {a.groups ? a.groups + (size_t)pair * a.group_capacity : NULL,
                      pair_groups(a, pair),
                      n_rows - unseen,
                      pair_user_rows(a, pair),
                      (const element *)a.context[i].keys + seen,
                      (const element *)a.context[i].values + seen,
                      (const element *)(own ? own->keys : a.user_keys) + of_user,
                      (const element *)(own ? own->values : a.user_values) + of_user};
            const uint32_t n_tiles = tiles_of(source.n_groups, source.n_user), mine = stretch - prefix[pair];
            n_mine = prefix[pair + 1] - prefix[pair];
            const uint32_t least = quotient(n_tiles, n_mine), more = n_tiles - least * n_mine; /* so many have one more */
            const uint32_t first = least * mine + min(mine, more), n = least + (mine < more);
            from = first, end = first + n;
            if (cut.n_pieces > 1) from = first + cut.begin(piece, n), end = first + cut.begin(piece + 1, n);
        }
        const tile_place here = place_tile_below(source, from + warp, dry ? 0 : end), /* together with the queries */
            after = place_tile_below(source, from + warp + WARPS, dry ? 0 : end);
#pragma unroll 1
        for (int i = threadIdx.x; i < D / 32 * SQZ_WARP; i += THREADS) {
            const uint32_t query = i % SQZ_WARP / 4, chunk = i % 4 + 4 * (i / SQZ_WARP);
            const element *q =
                (const element *)a.queries + ((size_t)pair * group + first_query + query) * D + 8 * chunk;
            fragments[i] = query < n_queries && !dry ? *(const uint4 *)q : make_uint4(0, 0, 0, 0);
        }
        __syncthreads();
        typename state_of<D, Q>::type state;
        state.reset();
        add_tiles<Type, D, Q>(state, a, source, here, after, from, end, fragments);
        uint32_t next = n_places;
        if (threadIdx.x == 0 && n_places > gridDim.x) next = gridDim.x + atomicAdd(taken, 1);
        /* Parts of a pair follow each other: in the order of its tiles, whoever made them. */
        const size_t part = ((size_t)stretch * cut.n_pieces + piece) * group + first_query;
        store_part<Type, D, Q>(state, memory, a.parts + part, a.part_out + part * D, dry ? 0 : n_queries);

        /* The last of the pair's blocks to come here merges. */
        const uint32_t n_parts = n_mine * cut.n_pieces;
        __syncthreads();
        if (threadIdx.x == 0) {
            last = dry;
            next_place = dry ? (uint32_t)BEGIN : next;
            if (!dry) {
                __threadfence(); /* of all that the block wrote: the barrier orders it before this */
                last = atomicAdd(a.arrived + (size_t)pair * gridDim.y + blockIdx.y, 1) == n_parts - 1;
                __threadfence();
            }
        }
        __syncthreads();
        if (last)
            finish_pair<Type, D, Q, SHARED>(a, pair, first_query, n_queries,
                                            dry ? 0 : (size_t)prefix[pair] * cut.n_pieces, n_parts,
                                            &memory->out[0][0][0], dry, results_of(memory));
        if (SHARED && last)
            share_pair<Type, D, Q>(a, dry ? 0 : step, (size_t)pair * group + first_query, n_queries, results_of(memory),
                                   dry);
    }
}

template <class Type, int D, int Q, bool SHARED>
enum sqz_status launch_shared(const struct rows_call *a, bool after_ours, void *stream)
{
    const uint32_t group = a->n_head / a->n_head_kv, pairs = a->n_sequences * a->n_head_kv;
    const size_t shared =
        (size_t)D / 32 * SQZ_WARP * sizeof(uint4) + sizeof(memory_of<D, Q, SHARED>) + (pairs + 1) * sizeof(uint32_t);
    return sqz_launch(attend_kernel<Type, D, Q, SHARED>, dim3(a->n_blocks, (group + CHUNK - 1) / CHUNK), THREADS, shared, 1,
                      after_ours, *a, stream);
}

/* Of several ranks F16 alone. */
template <class Type, int D, int Q>
enum sqz_status launch(const struct rows_call *a, bool after_ours, void *stream)
{
    if (!a->ranks.n_ranks) return launch_shared<Type, D, Q, false>(a, after_ours, stream);
    if (!std::is_same<Type, sqz_f16>::value) return SQZ_ERROR_UNSUPPORTED;
    return launch_shared<sqz_f16, D, Q, true>(a, after_ours, stream);
}

template <class Type, int D>
enum sqz_status launch_group(const struct rows_call *a, bool after_ours, void *stream)
{
    const uint32_t group = a->n_head / a->n_head_kv;
    if (group == 1) return launch<Type, D, 1>(a, after_ours, stream);
    if (group == 2) return launch<Type, D, 2>(a, after_ours, stream);
    if (group <= 4) return launch<Type, D, 4>(a, after_ours, stream);
    return launch<Type, D, CHUNK>(a, after_ours, stream);
}

template <class Type> enum sqz_status launch_type(const struct rows_call *a, bool after_ours, void *stream)
{
    switch (a->head_dim) {
    case 64: return launch_group<Type, 64>(a, after_ours, stream);
    case 96: return launch_group<Type, 96>(a, after_ours, stream);
    case 128: return launch_group<Type, 128>(a, after_ours, stream);
    case 256: return launch_group<Type, 256>(a, after_ours, stream);
    }
    return SQZ_ERROR_UNSUPPORTED;
}

} // namespace

/* Two blocks a multiprocessor stay resident; where registers allow one, a second round of equal stretches follows. */
extern "C" uint32_t sqz_cuda_attend_rows_blocks(uint32_t n_multiprocessors)
{
    const uint32_t n = 2 * n_multiprocessors;
    return n < 1 ? 1 : n > SQZ_ROWS_MAX_BLOCKS ? SQZ_ROWS_MAX_BLOCKS : n;
}

extern "C" enum sqz_status sqz_cuda_attend_contexts_launch(const struct sqz_cuda_attend_rows *a,
                                                           const struct sqz_cuda_contexts *contexts, bool after_ours,
                                                           void *stream)
{
    struct rows_call all;
    memset(&all, 0, sizeof all);
    (struct sqz_cuda_attend_rows &)all = *a;
    all.n_contexts = contexts ? contexts->n : 1;
    if (a->led) all.ranks = *a->led;
    all.context[0] = {a->keys, a->values, a->n_rows};
    for (uint32_t i = 0; contexts && i < contexts->n; i++)
        all.context[i] = {contexts->context[i].keys, contexts->context[i].values, contexts->context[i].n_rows};
    if (contexts) memcpy(all.context_of, contexts->of, a->n_sequences);
    return a->type == SQZ_ROW_F16 ? launch_type<sqz_f16>(&all, after_ours, stream)
                                  : launch_type<sqz_bf16>(&all, after_ours, stream);
}

extern "C" enum sqz_status sqz_cuda_attend_rows_launch(const struct sqz_cuda_attend_rows *a, bool after_ours,
                                                       void *stream)
{
    return sqz_cuda_attend_contexts_launch(a, NULL, after_ours, stream);
}
