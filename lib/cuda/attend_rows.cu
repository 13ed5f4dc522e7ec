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
#include "device.cuh"

namespace
{

enum { THREADS = 256, WARPS = THREADS / SQZ_WARP, TILE = 16, CHUNK = 8 /* query heads of a pass */ };

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

struct pair_source {
    const uint32_t *groups; /* NULL: all rows */
    uint32_t n_groups, n_rows, n_user;
    size_t first_row, first_user_row; /* of the head in keys and values, of the pair in the user's, which are */
    const void *user_keys, *user_values;
};

template <class Args> __device__ __forceinline__ uint32_t pair_user_rows(const Args &a, uint32_t pair)
{
    if (!a.n_user) return 0;
    if (a.users) return min(a.users[pair / a.n_head_kv].n_rows, a.n_user);
    return a.user_rows ? min(a.user_rows[pair / a.n_head_kv], a.n_user) : a.n_user;
}

/* Rows of the context that a window leaves out, where all are read. */
template <class Args> __device__ __forceinline__ uint32_t pair_unseen(const Args &a, uint32_t pair)
{
    return a.groups || !a.users ? 0 : min(a.users[pair / a.n_head_kv].first_row, a.n_rows);
}

template <class Args> __device__ __forceinline__ uint32_t pair_groups(const Args &a, uint32_t pair)
{
    if (a.groups) return a.n_groups[pair];
    return (uint32_t)(((uint64_t)a.n_rows - pair_unseen(a, pair) + SQZ_GROUP_ROWS - 1) / SQZ_GROUP_ROWS);
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

template <class Type, int D> struct key_tile {
    uint4 low[D / 32], high[D / 32];
    __device__ __forceinline__ void load(const void *keys, const pair_source &s, const tile_place &p, int g, int t)
    {
        typedef typename Type::element element;
        const element *base = (const element *)(p.user ? s.user_keys : keys);
        const size_t first = p.user ? s.first_user_row : s.first_row;
        const element *low_row = base + (first + (size_t)p.low * SQZ_GROUP_ROWS + g) * D;
        const element *high_row = base + (first + (size_t)p.high * SQZ_GROUP_ROWS + g) * D;
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
        y[0] = exp2f(y[0] - base);
        y[2] = exp2f(y[2] - base);
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
__device__ __forceinline__ void load_values(uint4 (&value)[value_batch<D>::N], const void *values, const pair_source &s,
                                            const tile_place &p, int batch)
{
    typedef typename Type::element element;
    typedef value_lanes<D> lanes;
    const int lane = threadIdx.x % SQZ_WARP, lane_row = lane / lanes::LANES;
    const element *base = (const element *)(p.user ? s.user_values : values);
    const size_t first = p.user ? s.first_user_row : s.first_row;
#pragma unroll
    for (int i = 0; i < value_batch<D>::N; i++) {
        const int load = batch * value_batch<D>::N + i, half = load * lanes::ROWS / 8;
        const uint32_t row = (load * lanes::ROWS + lane_row) % 8, n = half ? p.n_high : p.n_low;
        const uint32_t group = half ? p.high : p.low;
        value[i] = sqz_load_once(base + (first + (size_t)group * SQZ_GROUP_ROWS + row) * D + lane % lanes::LANES * 8,
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
            y[i] = exp2f(y[i] - base);
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
__device__ __forceinline__ void add_tiles(group_state<D, Q> &state, const sqz_cuda_attend_rows &a, const pair_source &s,
                                          uint32_t first, uint32_t end, const uint4 *fragments)
{
    enum { CHUNKS = group_state<D, Q>::CHUNKS };
    typedef typename Type::element element;
    const int lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
    const float factor = a.scale * SQZ_LOG2E;
    uint32_t tile = first + threadIdx.x / SQZ_WARP;
    if (tile >= end) return;
    tile_place here = place_tile(s, tile);
    key_tile<Type, D> keys;
    keys.load(a.keys, s, here, g, t);
    tile_place next = tile + WARPS < end ? place_tile(s, tile + WARPS) : here;
    for (; tile < end; tile += WARPS) {
        uint4 value[CHUNKS][4];
        const element *base = (const element *)(here.user ? s.user_values : a.values);
        const size_t from = here.user ? s.first_user_row : s.first_row;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t row = 2 * t + i % 2, n = i < 2 ? here.n_low : here.n_high;
            const element *p = base + (from + (size_t)(i < 2 ? here.low : here.high) * SQZ_GROUP_ROWS + row) * D;
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
            keys.load(a.keys, s, next, g, t);
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

/* The tiles [first, end) of a pair, warps in turn. */
template <class Type, int D, int Q>
__device__ __forceinline__ void add_tiles(warp_state<D> &state, const sqz_cuda_attend_rows &a, const pair_source &s,
                                          uint32_t first, uint32_t end, const uint4 *fragments)
{
    typedef value_batch<D> batch;
    const int lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
    const float factor = a.scale * SQZ_LOG2E;
    uint32_t tile = first + threadIdx.x / SQZ_WARP;
    if (tile >= end) return;
    tile_place here = place_tile(s, tile);
    key_tile<Type, D> keys;
    keys.load(a.keys, s, here, g, t);
    tile_place next = tile + WARPS < end ? place_tile(s, tile + WARPS) : here;
    for (; tile < end; tile += WARPS) {
        uint4 value[batch::N];
        load_values<Type, D>(value, a.values, s, here, 0);
        float y[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < D / 32; j++)
            sqz_mma_chunk<Type>(y, keys.low[j], keys.high[j], fragments[j * SQZ_WARP + lane]);
        const bool more = tile + WARPS < end;
        tile_place after = next;
        if (more) {
            keys.load(a.keys, s, next, g, t);
            if (tile + 2 * WARPS < end) after = place_tile(s, tile + 2 * WARPS);
        }
        y[0] = g < here.n_low ? y[0] * factor : -INFINITY;
        y[2] = g < here.n_high ? y[2] * factor : -INFINITY;
        state.weigh(y);
#pragma unroll
        for (int b = 0; b < batch::ALL / batch::N; b++) {
            if (b > 0) load_values<Type, D>(value, a.values, s, here, b);
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
    for (uint32_t i = threadIdx.x; i < n_queries * D; i += THREADS) {
        const uint32_t q = i / D;
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += memory->out[w][q][i % D] * memory->factor[w][q];
        to_out[i] = sum;
    }
}

/* Merges parts first, first + 1, ... of a pair, and its tail, and writes output and lse; all threads. Reads what other
 * blocks wrote: past the first-level cache. weight: shared, [WARPS * D][Q]. Weights come first, a warp a query, so that
 * the loads of outputs do not wait for one another: one part after the other took 40 us for 33 parts (H100). */
template <class Type, int D, int Q>
__device__ void finish_pair(const sqz_cuda_attend_rows &a, uint32_t pair, uint32_t first_query, uint32_t n_queries,
                            size_t first_part, uint32_t n_parts, float *weight)
{
    const uint32_t group = a.n_head / a.n_head_kv, n = n_parts + a.n_tail;
    const int lane = threadIdx.x % SQZ_WARP;
    const size_t row = (size_t)pair * group + first_query, tail = (size_t)pair * a.n_tail;
    enum { CAPACITY = WARPS * D, ITEMS = (Q * D / 2 + THREADS - 1) / THREADS };
    const uint32_t q = threadIdx.x / SQZ_WARP;
    auto part = [&](uint32_t i) {
        const sqz_cuda_part *p = i < n_parts ? a.parts + (first_part + i) * group + first_query + q
                                             : a.tail_parts + (tail + i - n_parts) * group + first_query + q;
        const float2 x = __ldcg((const float2 *)p);
        return sqz_softmax_state{x.x, x.y};
    };
    static_assert(Q <= WARPS, "a warp a query");
    sqz_softmax_state all = sqz_softmax_empty();
    float inverse = 0;
    if (q < n_queries) {
        for (uint32_t i = lane; i < n; i += SQZ_WARP) all = sqz_softmax_merged(all, part(i));
#pragma unroll
        for (int step = 16; step; step /= 2) {
            sqz_softmax_state other;
            other.maximum = __shfl_xor_sync(~0u, all.maximum, step);
            other.sum = __shfl_xor_sync(~0u, all.sum, step);
            all = sqz_softmax_merged(all, other);
        }
        inverse = all.sum > 0 ? 1.0f / all.sum : 0.0f;
        if (lane == 0 && a.lse) a.lse[row + q] = sqz_softmax_log2(all) * SQZ_LN2;
    }
    float2 out[ITEMS];
#pragma unroll
    for (int k = 0; k < ITEMS; k++) out[k] = make_float2(0, 0);
    for (uint32_t base = 0; base < n; base += CAPACITY) {
        const uint32_t end = min(n, base + CAPACITY);
        for (uint32_t i = base + lane; i < end && q < n_queries; i += SQZ_WARP)
            weight[(i - base) * Q + q] = sqz_softmax_factor(part(i).maximum, all.maximum) * inverse;
        __syncthreads();
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            const uint32_t i = threadIdx.x + k * THREADS, d = i % (D / 2) * 2, of = i / (D / 2);
            if (of >= n_queries) break;
            auto add =
                [&](const float *from, uint32_t first, uint32_t last) { /* parts, from: of part 0 */
#pragma unroll 8
                for (uint32_t j = first; j < last; j++) {
                    const float2 x = __ldcg((const float2 *)(from + (size_t)j * group * D));
                    const float w = weight[(j - base) * Q + of];
                    out[k].x += w * x.x;
                    out[k].y += w * x.y;
                }
            };
            const size_t column = (size_t)(first_query + of) * D + d;
            add(a.part_out + first_part * group * D + column, base, min(end, n_parts));
            if (end > n_parts)
                add(a.tail_out + tail * group * D + column - (size_t)n_parts * group * D, max(base, n_parts), end);
        }
        __syncthreads(); /* weight is free again */
    }
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
        const uint32_t i = threadIdx.x + k * THREADS;
        if (i < n_queries * (D / 2))
            ((uint32_t *)a.out)[((row + i / (D / 2)) * D) / 2 + i % (D / 2)] = Type::pack(out[k].x, out[k].y);
    }
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

template <class Type, int D, int Q>
__global__ void __launch_bounds__(THREADS, D > 128 ? 1 : 2) attend_kernel(const sqz_cuda_attend_rows a)
{
    extern __shared__ uint4 dynamic[];
    __shared__ uint32_t warp_sums[WARPS], longest, next_place;
    __shared__ bool last;
    uint4 *fragments = dynamic;
    block_memory<D, Q> *memory = (block_memory<D, Q> *)(fragments + D / 32 * SQZ_WARP);
    uint32_t *prefix = (uint32_t *)(memory + 1);
    const uint32_t n_pairs = a.n_sequences * a.n_head_kv, group = a.n_head / a.n_head_kv;
    const uint32_t first_query = blockIdx.y * CHUNK, n_queries = min(group - first_query, (uint32_t)Q);
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;

    sqz_let_next_start();
    sqz_wait_for_previous();

    auto tiles_of = [&](uint32_t pair) {
        return (pair_groups(a, pair) + 1) / 2 + (pair_user_rows(a, pair) + TILE - 1) / TILE;
    };
    const uint32_t own = (n_pairs + THREADS - 1) / THREADS; /* pairs of a thread */
    const uint32_t from = min(threadIdx.x * own, n_pairs), to = min(from + own, n_pairs);
    uint32_t total = 0;
    for (uint32_t p = from; p < to; p++) total += tiles_of(p);
    total = warp_total(total);
    if (n_pairs <= SQZ_WARP) { /* the shortest stretches that are not more than thread blocks */
        if (warp == 0) {
            const uint32_t n = threadIdx.x < n_pairs ? tiles_of(threadIdx.x) : 0;
            uint32_t low = max((total + gridDim.x - 1) / gridDim.x, 1u), high = max(total, 1u);
            if (n_pairs < gridDim.x) high = max(min(high, total / (gridDim.x - n_pairs) + 1), low);
            while (low < high) {
                const uint32_t middle = (low + high) / 2;
                if (warp_total((n + middle - 1) / middle) <= gridDim.x) high = middle;
                else low = middle + 1;
            }
            if (lane == 0) longest = low, warp_sums[0] = total;
        }
        __syncthreads();
        total = warp_sums[0];
    } else {
        if (lane == 0) warp_sums[warp] = total;
        __syncthreads();
        total = 0;
        for (int w = 0; w < WARPS; w++) total += warp_sums[w];
        if (threadIdx.x == 0) longest = total / (2 * gridDim.x) + 1; /* more than thread blocks, which take turns */
        __syncthreads();
    }
    /* prefix[p]: stretches before pair p. */
    const uint32_t each = longest;
    {
        uint32_t sum = 0;
        for (uint32_t p = from; p < to; p++) sum += (tiles_of(p) + each - 1) / each;
        uint32_t inclusive = sum;
#pragma unroll
        for (int step = 1; step < SQZ_WARP; step *= 2) {
            const uint32_t before = __shfl_up_sync(~0u, inclusive, step);
            if (lane >= step) inclusive += before;
        }
        if (lane == SQZ_WARP - 1) warp_sums[warp] = inclusive;
        __syncthreads();
        uint32_t at = inclusive - sum;
        for (int w = 0; w < warp; w++) at += warp_sums[w];
        for (uint32_t p = from; p < to; p++) {
            prefix[p] = at;
            at += (tiles_of(p) + each - 1) / each;
        }
        if (threadIdx.x == THREADS - 1) prefix[n_pairs] = at;
        __syncthreads();
    }
    /* Small pieces have two tiles a warp, and a pair not too many parts to merge. */
    work_cut cut = {prefix[n_pairs], n_pairs > SQZ_WARP ? 1u : each >= 512 ? 4u : each >= 256 ? 3u : 1u};
    while (cut.n_pieces > 1 && cut.n_pieces * cut.n_stretches > 140 * n_pairs) cut.n_pieces--;

    /* Pairs that read nothing have no stretch. */
    for (uint32_t p = blockIdx.x; p < n_pairs; p += gridDim.x)
        if (prefix[p + 1] == prefix[p])
            finish_pair<Type, D, Q>(a, p, first_query, n_queries, 0, 0, &memory->out[0][0][0]);

    /* Places in the order of work: the first pieces of all stretches, then the second, ... A block's first one is its
     * own, then it takes whichever is next. */
    uint32_t *const taken = a.arrived + (size_t)n_pairs * gridDim.y + blockIdx.y;
    const uint32_t n_places = cut.n_stretches * cut.n_pieces;
    for (uint32_t place = blockIdx.x; place < n_places; place = next_place) {
        const uint32_t stretch = place % cut.n_stretches, piece = place / cut.n_stretches;
        const uint32_t pair = sqz_place_of(prefix, n_pairs, stretch); /* the last of those that begin there has tiles */
        const uint32_t head = pair % a.n_head_kv;
        const sqz_cuda_user *own = a.n_user && a.users ? a.users + pair / a.n_head_kv : NULL;
        const uint32_t unseen = pair_unseen(a, pair);
        const pair_source source = {a.groups ? a.groups + (size_t)pair * a.group_capacity : NULL,
                                    pair_groups(a, pair),
                                    a.n_rows - unseen,
                                    pair_user_rows(a, pair),
                                    (size_t)head * a.n_rows + unseen,
                                    own ? (size_t)head * own->capacity_rows : (size_t)pair * a.user_capacity_rows,
                                    own ? own->keys : a.user_keys,
                                    own ? own->values : a.user_values};
        typedef typename Type::element element;
        for (int i = threadIdx.x; i < D / 32 * SQZ_WARP; i += THREADS) {
            const uint32_t query = i % SQZ_WARP / 4, chunk = i % 4 + 4 * (i / SQZ_WARP);
            const element *q =
                (const element *)a.queries + ((size_t)pair * group + first_query + query) * D + 8 * chunk;
            fragments[i] = query < n_queries ? *(const uint4 *)q : make_uint4(0, 0, 0, 0);
        }
        const uint32_t n_tiles = tiles_of(pair), n_mine = prefix[pair + 1] - prefix[pair];
        const uint32_t mine = stretch - prefix[pair];
        const uint32_t least = n_tiles / n_mine, more = n_tiles % n_mine; /* so many have one more */
        const uint32_t first = least * mine + min(mine, more), n = least + (mine < more);
        __syncthreads();
        typename state_of<D, Q>::type state;
        state.reset();
        add_tiles<Type, D, Q>(state, a, source, first + cut.begin(piece, n), first + cut.begin(piece + 1, n),
                              fragments);
        uint32_t next = n_places;
        if (threadIdx.x == 0 && n_places > gridDim.x) next = gridDim.x + atomicAdd(taken, 1);
        /* Parts of a pair follow each other: in the order of its tiles, whoever made them. */
        const size_t part = ((size_t)stretch * cut.n_pieces + piece) * group + first_query;
        store_part<Type, D, Q>(state, memory, a.parts + part, a.part_out + part * D, n_queries);

        /* The last of the pair's blocks to come here merges. */
        const uint32_t n_parts = n_mine * cut.n_pieces;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            last = atomicAdd(a.arrived + (size_t)pair * gridDim.y + blockIdx.y, 1) == n_parts - 1;
            __threadfence();
            next_place = next;
        }
        __syncthreads();
        if (last)
            finish_pair<Type, D, Q>(a, pair, first_query, n_queries, (size_t)prefix[pair] * cut.n_pieces, n_parts,
                                    &memory->out[0][0][0]);
    }
}

template <class Type, int D, int Q>
enum sqz_status launch(const struct sqz_cuda_attend_rows *a, bool after_ours, void *stream)
{
    const uint32_t group = a->n_head / a->n_head_kv, pairs = a->n_sequences * a->n_head_kv;
    const size_t shared =
        (size_t)D / 32 * SQZ_WARP * sizeof(uint4) + sizeof(block_memory<D, Q>) + (pairs + 1) * sizeof(uint32_t);
    return sqz_launch(attend_kernel<Type, D, Q>, dim3(a->n_blocks, (group + CHUNK - 1) / CHUNK), THREADS, shared, 1,
                      after_ours, *a, stream);
}

template <class Type, int D>
enum sqz_status launch_group(const struct sqz_cuda_attend_rows *a, bool after_ours, void *stream)
{
    const uint32_t group = a->n_head / a->n_head_kv;
    if (group == 1) return launch<Type, D, 1>(a, after_ours, stream);
    if (group == 2) return launch<Type, D, 2>(a, after_ours, stream);
    if (group <= 4) return launch<Type, D, 4>(a, after_ours, stream);
    return launch<Type, D, CHUNK>(a, after_ours, stream);
}

template <class Type> enum sqz_status launch_type(const struct sqz_cuda_attend_rows *a, bool after_ours, void *stream)
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

extern "C" enum sqz_status sqz_cuda_attend_rows_launch(const struct sqz_cuda_attend_rows *a, bool after_ours,
                                                       void *stream)
{
    return a->type == SQZ_ROW_F16 ? launch_type<sqz_f16>(a, after_ours, stream)
                                  : launch_type<sqz_bf16>(a, after_ours, stream);
}
