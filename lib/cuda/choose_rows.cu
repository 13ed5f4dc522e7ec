/*
 * From a token's queries to the groups of rows that it reads, in one launch: what lookup_rows, select, code_tables,
 * lookup_codes, weigh_left, list_marks and tail_rows do in up to seven, for one level of clusters and few sequences.
 * There a step takes a microsecond or two whatever it has to do: to start, to find its instructions, to ask for what
 * the one before it wrote, and to end.
 *
 * One cluster of thread blocks has a pair (sequence, KV head) to itself and holds everything about it in shared memory.
 * Tiles of 16 clusters go to blocks in turn, because neighbours are alike: what one block had to open and to estimate
 * alone would be waited for by all. Blocks meet at barriers of the hardware, and write what others need into their
 * shared memory:
 *
 *   logits of the tiles, exact mass     ->  every block: denominators
 *   [codes: opened clusters, estimates  ->  every block: denominators again]
 *   [of several ranks: both denominators again, to and from the other GPUs (ranks.cuh)]
 *   marks, one bit a group of 8 rows    ->  the block that has that range of groups
 *   the list, and the tail, a partial result of each block
 *
 * Every instruction is met for the first time, far away since a model's products ran, and most of them once: to fetch them
 * takes longer than what they do. So loops are not unrolled, nothing is written down twice, and the copy engine loads.
 *
 * Centroids do not depend on the kernel before, so they are asked for before it ends. The token's own key and value, and
 * its F32 queries, are taken as llama.cpp has them, and written to where the next kernel looks for them.
 *
 * Formulas are lib/method.h's; those files say more about each step. Sums depend on the number of blocks alone.
 */
#include <cuda_pipeline.h>

#include "block_cluster.cuh"
#include "code_parts.h"
#include "contexts.h"
#include "hopper.cuh"
#include "ranks.cuh"
#include "row_tiles.cuh"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / SQZ_WARP,
    TILE = 16,
    COLUMNS = 8, /* query rows of a pair, at most */
    MAX_RANKS = SQZ_CHOOSE_MAX_RANKS,
    FEW_RANKS = 8, /* a pair's, at least, where each has a multiprocessor to itself */
    LEAST_RANKS = 4,
    MOST_LOCAL = 1024, /* clusters of a block, likewise; and, with codes, */
    MOST_LOCAL_CODED = 512,
    MAX_D = SQZ_CHOOSE_MAX_DIM,
    PARTS = SQZ_CODE_PARTS,
    ENTRIES = SQZ_CODE_ENTRIES,
    MOST_SLOTS = 8,
    MOST_SHARED = 200 * 1024,
    OPEN_BITS = 9, /* hold the threads of a block */
    WORKING = 64 * 1024, /* bytes, such that two blocks find room on a multiprocessor */
    MOST_DIRECTIONS = 32 * 1024
};

/* ---- Shared memory ------------------------------------------------------------------ */

/* Where the arrays of a block begin, in bytes. */
struct layout {
    uint32_t n_tiles, n_local;                /* tiles and clusters of a block, at most */
    uint32_t n_words, word_bits, words_each;  /* of the pair's marks, of a block's, a power of two */
    uint32_t n_slots;                         /* tiles of a warp that are on their way */
    uint32_t n_kept;                          /* estimates of so many times 32 keys of a warp are kept */
    uint32_t starts, variance, unit;          /* of the clusters: [n_tiles][17], [n_local], [n_local] */
    uint32_t logit;                           /* [n_local][G]: y, later what the tail adds them with */
    uint32_t marks;                           /* [words_each] */
    uint32_t directions, book, first, spread; /* of the head's codes */
    uint32_t coordinate, tables;              /* [G][M], [W][G][8][16] */
    uint32_t list, open;                      /* [n_local] opened clusters; one byte a cluster: whether it is */
    uint32_t working;                         /* one after the other: [warps][n_slots] tiles of centroids; estimates,
                                                 [warps][n_kept][G or W][32]; value centroids; [warps][G][D] of the tail */
    uint32_t bytes;
};

__host__ __device__ inline uint32_t row_bytes(const sqz_cuda_choose_rows &a)
{
    return a.level.centroids.type == SQZ_ROW_I8 ? a.head_dim : 2 * a.head_dim;
}
__host__ __device__ inline uint32_t tile_bytes(const sqz_cuda_choose_rows &a)
{
    return TILE * row_bytes(a);
}

layout layout_of(const sqz_cuda_choose_rows &a, uint32_t ranks)
{
    layout l;
    uint32_t at = 0;
    const uint32_t group = a.n_head / a.n_head_kv, m = a.codes.n_directions, w = a.codes.n_words;
    auto take = [&](uint32_t bytes) {
        const uint32_t here = at;
        at += (bytes + 15) / 16 * 16;
        return here;
    };
    l.n_tiles = ((a.level.n_clusters + TILE - 1) / TILE + ranks - 1) / ranks;
    l.n_local = l.n_tiles * TILE;
    l.n_words = (uint32_t)(((uint64_t)a.n_rows + 32 * SQZ_GROUP_ROWS - 1) / (32 * SQZ_GROUP_ROWS));
    l.word_bits = 0;
    while (((l.n_words - 1) >> l.word_bits) >= ranks) l.word_bits++;
    l.words_each = 1u << l.word_bits;
    l.n_slots = WORKING / (WARPS * tile_bytes(a));
    if (l.n_slots > MOST_SLOTS) l.n_slots = MOST_SLOTS;
    l.n_kept = WORKING / (WARPS * (group > w ? group : w) * SQZ_WARP * (uint32_t)sizeof(float));
    l.starts = take(l.n_tiles * (TILE + 1) * 4);
    l.variance = take(l.n_local * 4);
    l.unit = take(l.n_local * 4);
    l.logit = take(l.n_local * group * 4);
    l.marks = take(l.words_each * 4);
    l.directions = take(w ? m * a.head_dim * 2 : 0);
    l.book = take(w ? ENTRIES * m * 2 : 0);
    l.first = take(w ? (PARTS * w + 1) * 4 : 0);
    l.spread = take(w ? m * 4 : 0);
    l.coordinate = take(w ? group * m * 4 : 0);
    l.tables = take(w * group * SQZ_CODE_TABLE * 4);
    l.list = take(w ? l.n_local * 2 : 0);
    l.open = take(w ? l.n_local : 0);
    l.working = take(WORKING);
    l.bytes = at;
    return l;
}

/* N: contexts that a launch can have. What one has is told apart at compile time: a token alone asks for nothing twice. */
template <int N> struct call {
    sqz_cuda_choose_rows a;
    layout l;
    sqz_cuda_context context[N];
    uint8_t context_of[N == 1 ? 1 : SQZ_MOST_CONTEXT_SEQUENCES];
    sqz_cuda_ranks ranks[N == 1]; /* n_ranks is 0 where there are no others */

    __device__ __forceinline__ const sqz_cuda_ranks *elsewhere() const
    {
        return N == 1 && ranks->n_ranks ? ranks : NULL;
    }
    __device__ __forceinline__ const sqz_cuda_context &of(uint32_t sequence) const
    {
        return context[N == 1 ? 0 : context_of[sequence]];
    }
};
static_assert(sizeof(call<SQZ_MOST_CONTEXTS>) <= 4096, "what a kernel can be given");

#ifdef SQZ_HOPPER_CODE

/* Of one size whatever a call needs. */
struct small_memory {
    sqz_cuda_user user; /* these are asked for before the query is there */
    float mean[MAX_D], variance_gain, log_threshold, tail_gain;
    uint32_t user_rows;
    uint64_t arrived[WARPS][MOST_SLOTS], rows_arrived[WARPS]; /* tiles, and value centroids */
    sqz_softmax_state warp_all[WARPS][COLUMNS], warp_exact[WARPS][COLUMNS];
    sqz_cuda_part parts[MAX_RANKS][COLUMNS];                   /* written by the others */
    float sums[MAX_RANKS][COLUMNS], warp_sums[WARPS][COLUMNS]; /* the first: by the others */
    float log2_total[COLUMNS], level_total[COLUMNS], norm[COLUMNS], gain[COLUMNS], width[COLUMNS];
    uint32_t step; /* of the mailbox */
    uint4 query[MAX_D / 32][SQZ_WARP]; /* as warps multiply it, where another GPU has told it */
    float tail_sum[WARPS][COLUMNS];
    uint32_t scratch[WARPS];
};

/* ---- What every step asks ------------------------------------------------------------- */

struct chooser {
    const sqz_cuda_choose_rows &a;
    const sqz_cuda_context &x; /* of the pair */
    const layout &l;
    char *memory;
    small_memory &small;
    const sqz_cluster_place here;
    const sqz_cuda_ranks *elsewhere; /* or NULL */
    uint32_t pair, head, sequence, group, n_clusters, n_mine; /* n_mine: tiles of this block */

    template <class T> __device__ __forceinline__ T *at(uint32_t offset) const
    {
        return (T *)(memory + offset);
    }
    /* The cluster of the head that is this block's number `local`; n_clusters or above: none. */
    __device__ __forceinline__ uint32_t cluster(uint32_t local) const
    {
        return (local / TILE * here.size + here.rank) * TILE + local % TILE;
    }
    __device__ __forceinline__ bool exists(uint32_t local) const
    {
        return local < n_mine * TILE && cluster(local) < n_clusters;
    }
    /* Keys [begin, end) of a cluster, counted from n_fixed. */
    __device__ __forceinline__ uint32_t begin(uint32_t local) const
    {
        return at<uint32_t>(l.starts)[local / TILE * (TILE + 1) + local % TILE];
    }
    __device__ __forceinline__ uint32_t end(uint32_t local) const
    {
        return at<uint32_t>(l.starts)[local / TILE * (TILE + 1) + local % TILE + 1];
    }
    __device__ __forceinline__ float *logit(uint32_t local) const
    {
        return at<float>(l.logit) + local * group;
    }
    __device__ __forceinline__ float variance(uint32_t local) const
    {
        return x.level.variance ? at<float>(l.variance)[local] : 0.0f;
    }
    __device__ __forceinline__ bool has_tail() const
    {
        return a.tail_gain && x.tail && !sqz_tail_is_off(small.tail_gain);
    }
    /* The word of marks that group / 32 is, wherever it lies. */
    __device__ __forceinline__ uint32_t *mark_word(uint32_t word) const
    {
        return sqz_of_rank(at<uint32_t>(l.marks) + (word & (l.words_each - 1)), word >> l.word_bits);
    }
    __device__ __forceinline__ bool is_marked(uint32_t mark) const
    {
        return *mark_word(mark / 32) >> mark % 32 & 1;
    }
    __device__ __forceinline__ void set_marks(uint32_t first, uint32_t end) const
    {
#pragma unroll 1
        while (first < end) {
            const uint32_t stop = min(end, (first | 31) + 1), n = stop - first;
            atomicOr(mark_word(first / 32), ~0u >> (32 - n) << first % 32);
            first = stop;
        }
    }
};

__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

/* ---- Logits and denominators ------------------------------------------------------------ */

/* Asks for what does not depend on the query, into shared memory. */
__device__ __forceinline__ void ask_for_numbers(const chooser &c)
{
    const sqz_cuda_choose_rows &a = c.a;
    const uint32_t n = c.n_clusters;
    const uint32_t *offset = c.x.level.offset + (size_t)c.head * (n + 1);
    auto four = [](void *to, const void *from) { __pipeline_memcpy_async(to, from, 4); };
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < c.n_mine * (TILE + 1); i += THREADS) {
        const uint32_t tile = i / (TILE + 1), first = (tile * c.here.size + c.here.rank) * TILE;
        four(c.at<uint32_t>(c.l.starts) + i, offset + min(first + i % (TILE + 1), n));
    }
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < c.n_mine * TILE; i += THREADS) {
        const size_t at = (size_t)c.head * n + min(c.cluster(i), n - 1);
        if (c.x.level.variance) four(c.at<float>(c.l.variance) + i, c.x.level.variance + at);
        if (c.x.level.centroids.scale) four(c.at<float>(c.l.unit) + i, c.x.level.centroids.scale + at);
    }
    if (c.x.level.centroids.mean)
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < a.head_dim; i += THREADS)
            four(c.small.mean + i, c.x.level.centroids.mean + (size_t)c.head * a.head_dim + i);
    if (threadIdx.x == THREADS - 1) {
        const size_t plan = (size_t)c.sequence * a.plan_stride + c.head;
        if (c.x.variance_gain) four(&c.small.variance_gain, c.x.variance_gain + c.head);
        else c.small.variance_gain = 0;
        if (a.tail_gain) four(&c.small.tail_gain, a.tail_gain + plan);
        four(&c.small.log_threshold, a.log_threshold + plan);
        if (a.users) {
            static_assert(sizeof(sqz_cuda_user) % 8 == 0, "8 bytes at a time");
#pragma unroll 1
            for (int i = 0; i < (int)sizeof(sqz_cuda_user) / 8; i++)
                __pipeline_memcpy_async((uint2 *)&c.small.user + i, (const uint2 *)(a.users + c.sequence) + i, 8);
        } else if (a.user_rows) {
            four(&c.small.user_rows, a.user_rows + c.sequence);
        }
    }
    const uint32_t w = c.x.codes.n_words, m = c.x.codes.n_directions;
    if (w) {
        const uint32_t pieces = m * a.head_dim / 8;
        const uint16_t *directions = c.x.codes.directions + (size_t)c.head * m * a.head_dim;
        const uint16_t *book = c.x.codes.book + (size_t)c.head * ENTRIES * m;
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < pieces; i += THREADS)
            __pipeline_memcpy_async(c.at<uint4>(c.l.directions) + i, directions + 8 * i, 16);
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < ENTRIES * m / 2; i += THREADS) /* a head's begins at an even place */
            four(c.at<uint32_t>(c.l.book) + i, (const uint32_t *)book + i);
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < PARTS * w + 1; i += THREADS)
            four(c.at<uint32_t>(c.l.first) + i, c.x.codes.first + (size_t)c.head * (PARTS * w + 1) + i);
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < m; i += THREADS)
            four(c.at<float>(c.l.spread) + i, c.x.codes.spread + (size_t)c.head * m + i);
    }
    __pipeline_commit();
}

/* The queries of a pair as every warp multiplies them: lane 4 g + t has row g. */
struct query_rows {
    uint4 x[MAX_D / 32];
    float norm, mean; /* the lane's parts of |q|^2 and q . mean key */

    __device__ __forceinline__ void load(const chooser &c, int g, int t)
    {
        const sqz_cuda_choose_rows &a = c.a;
        const size_t row = (size_t)c.pair * c.group + g;
        const float *fresh = a.fresh.queries ? a.fresh.queries + c.sequence * a.fresh.query_token_stride +
                                                   (c.head * c.group + g) * a.fresh.query_head_stride
                                             : NULL;
#pragma unroll
        for (int j = 0; j < MAX_D / 32; j++) {
            const uint32_t at = 8 * (t + 4 * j);
            x[j] = make_uint4(0, 0, 0, 0);
            if (g >= c.group || at >= a.head_dim) continue;
            if (fresh) {
                const float4 low = *(const float4 *)(fresh + at), high = *(const float4 *)(fresh + at + 4);
                x[j] = make_uint4(sqz_f16::pack(low.x, low.y), sqz_f16::pack(low.z, low.w),
                                  sqz_f16::pack(high.x, high.y), sqz_f16::pack(high.z, high.w));
            } else {
                x[j] = *(const uint4 *)((const __half *)a.queries + row * a.head_dim + at);
            }
        }
    }

    /* From what the first rank's tell() gives; a warp, for all of the block. */
    __device__ __forceinline__ void take(const chooser &c, int g, int t)
    {
        const uint32_t pieces = c.a.head_dim / 8, row = c.pair * c.group + (g < c.group ? g : 0);
        sqz_ranks_take_query<MAX_D / 32>(
            *c.elsewhere, sqz_mailbox_step(*c.elsewhere), row,
            [=](int j) { return t + 4 * j < pieces ? t + 4 * j : t; }, x);
#pragma unroll
        for (int j = 0; j < MAX_D / 32; j++) {
            if (g >= c.group || t + 4 * j >= pieces) x[j] = make_uint4(0, 0, 0, 0);
            c.small.query[j][4 * g + t] = x[j];
        }
    }
    __device__ __forceinline__ void look(const chooser &c, int lane)
    {
#pragma unroll
        for (int j = 0; j < MAX_D / 32; j++) x[j] = c.small.query[j][lane];
    }
    __device__ __forceinline__ void tell(const chooser &c, uint32_t step, int g, int t) const
    {
#pragma unroll
        for (int j = 0; j < MAX_D / 32; j++)
            if (g < c.group && 8 * (t + 4 * j) < c.a.head_dim)
                sqz_ranks_tell_query(*c.elsewhere, step, c.pair * c.group + g, t + 4 * j, x[j]);
    }

    __device__ __forceinline__ void store(const chooser &c, int g, int t) const
    {
#pragma unroll
        for (int j = 0; j < MAX_D / 32; j++) {
            const uint32_t at = 8 * (t + 4 * j);
            if (g < c.group && at < c.a.head_dim)
                *(uint4 *)((__half *)c.a.queries + ((size_t)c.pair * c.group + g) * c.a.head_dim + at) = x[j];
        }
    }

    template <bool INT8> __device__ __forceinline__ void sum_up(const chooser &c, int t)
    {
        norm = mean = 0;
#pragma unroll
        for (int j = 0; j < MAX_D / 32; j++) {
            const uint32_t pairs[4] = {x[j].x, x[j].y, x[j].z, x[j].w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 q = sqz_f16::unpack(pairs[i]);
                const uint32_t at = 8 * (t + 4 * j) + 2 * i;
                norm += q.x * q.x + q.y * q.y;
                if (INT8 && at < c.a.head_dim) {
                    const float2 m = *(const float2 *)(c.small.mean + at);
                    mean += q.x * m.x + q.y * m.y;
                }
            }
        }
    }
};

/* The sequence's own rows; the last may still be where llama.cpp has it. */
struct own_rows {
    const __half *keys, *fresh;
    uint32_t n;
};

__device__ __forceinline__ own_rows own_rows_of(const chooser &c)
{
    const sqz_cuda_choose_rows &a = c.a;
    own_rows own = {NULL, NULL, 0};
    if (!a.n_user) return own;
    if (a.users) {
        own.n = min(c.small.user.n_rows, a.n_user);
        own.keys = (const __half *)c.small.user.keys + (size_t)c.head * c.small.user.capacity_rows * a.head_dim;
    } else {
        own.n = a.user_rows ? min(c.small.user_rows, a.n_user) : a.n_user;
        own.keys = (const __half *)a.user_keys + (size_t)c.pair * a.user_capacity_rows * a.head_dim;
    }
    if (a.fresh.keys)
        own.fresh =
            (const __half *)a.fresh.keys + c.sequence * a.fresh.key_token_stride + c.head * a.fresh.key_head_stride;
    return own;
}

/* 16 rows by 8 queries: 16-byte pieces of rows g and g + 8 as product operands. */
__device__ __forceinline__ void multiply(float (&y)[4], const uint4 (&low)[MAX_D / 32], const uint4 (&high)[MAX_D / 32],
                                         const query_rows &query)
{
#pragma unroll
    for (int j = 0; j < MAX_D / 32; j++) sqz_mma_chunk<sqz_f16>(y, low[j], high[j], query.x[j]);
}

/* A lane's sums: the maximum is finite, so that nothing is asked before it is subtracted. */
#define FLOOR (-1e30f)

__device__ __forceinline__ void add_logit(sqz_softmax_state &s, float y, float count)
{
    const float maximum = fmaxf(s.maximum, y);
    s.sum = s.sum * sqz_exp2(s.maximum - maximum) + count * sqz_exp2(y - maximum);
    s.maximum = maximum;
}

__device__ __forceinline__ sqz_softmax_state merged(sqz_softmax_state a, sqz_softmax_state b)
{
    const float maximum = fmaxf(a.maximum, b.maximum);
    return {maximum, a.sum * sqz_exp2(a.maximum - maximum) + b.sum * sqz_exp2(b.maximum - maximum)};
}

/* The mass of own rows that another kernel has read, of a lane's columns. */
__device__ __forceinline__ void add_known(const chooser &c, sqz_softmax_state (&state)[2], int t)
{
#pragma unroll
    for (int k = 0; k < 2; k++) {
        if (!c.a.known || 2 * t + k >= c.group) continue;
        const sqz_cuda_part part = c.a.known[((size_t)c.pair * c.a.n_tail + c.a.n_tail - 1) * c.group + 2 * t + k];
        state[k] = merged(state[k], {part.maximum, part.sum});
    }
}

/* Exact mass of fixed rows and own rows: tiles of 16, over all warps of the cluster, the last first, because the first
 * ones have more centroids. */
struct exact_rows {
    uint32_t fixed_tiles, n_tiles, first, step;
    own_rows own;

    __device__ __forceinline__ exact_rows(const chooser &c)
    {
        own = own_rows_of(c);
        fixed_tiles = (c.x.n_fixed + TILE - 1) / TILE;
        n_tiles = c.x.exact ? fixed_tiles + (own.n + TILE - 1) / TILE : 0;
        first = (WARPS - 1 - threadIdx.x / SQZ_WARP) * c.here.size + c.here.rank;
        step = WARPS * c.here.size;
    }
    /* Rows of a tile's source, the tile's first, and where row `row` lies. */
    __device__ __forceinline__ const __half *row(const chooser &c, uint32_t tile, uint32_t row) const
    {
        if (tile < fixed_tiles) {
            const uint32_t n = c.x.fixed_alone ? c.x.n_fixed : c.x.n_rows;
            return (const __half *)c.x.keys + ((size_t)c.head * n + row) * c.a.head_dim;
        }
        return own.fresh && row + 1 == own.n ? own.fresh : own.keys + (size_t)row * c.a.head_dim;
    }
    __device__ __forceinline__ uint32_t n_rows(const chooser &c, uint32_t tile) const
    {
        return tile < fixed_tiles ? c.x.n_fixed : own.n;
    }
    __device__ __forceinline__ uint32_t first_row(uint32_t tile) const
    {
        return (tile < fixed_tiles ? tile : tile - fixed_tiles) * TILE;
    }
    /* Brings the warp's first tile near: half a row of 256 bytes a lane. */
    __device__ __forceinline__ void approach(const chooser &c) const
    {
        const uint32_t lane = threadIdx.x % SQZ_WARP, at = lane % 2 * 64;
        if (first >= n_tiles || first_row(first) + lane / 2 >= n_rows(c, first) || at >= c.a.head_dim) return;
        const __half *p = row(c, first, first_row(first) + lane / 2) + at;
        asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
    }
    __device__ __forceinline__ void add(const chooser &c, sqz_softmax_state (&state)[2], const query_rows &query,
                                        float factor, int g, int t) const
    {
        const uint32_t d = c.a.head_dim;
#pragma unroll 1
        for (uint32_t tile = first; tile < n_tiles; tile += step) {
            const uint32_t n = n_rows(c, tile), low = first_row(tile) + g, high = low + 8;
            const __half *low_row = row(c, tile, low), *high_row = row(c, tile, high);
            uint4 of_low[MAX_D / 32], of_high[MAX_D / 32];
            float y[4] = {0, 0, 0, 0};
#pragma unroll
            for (int j = 0; j < MAX_D / 32; j++) {
                const uint32_t at = 8 * (t + 4 * j);
                of_low[j] = of_high[j] = make_uint4(0, 0, 0, 0);
                if (low < n && at < d) of_low[j] = *(const uint4 *)(low_row + at);
                if (high < n && at < d) of_high[j] = *(const uint4 *)(high_row + at);
            }
            multiply(y, of_low, of_high, query);
#pragma unroll
            for (int i = 0; i < 4; i++)
                if ((i < 2 ? low : high) < n) add_logit(state[i % 2], y[i] * factor, 1.0f);
        }
    }
};

/* ---- Logits of centroids ------------------------------------------------------------------------ */

/* A warp's tiles of 16 centroids come by the copy engine into its slots, in turn. */
struct centroid_tiles {
    const char *from; /* the head's */
    char *slots;
    uint64_t *arrived;

    __device__ __forceinline__ centroid_tiles(const chooser &c)
    {
        const uint32_t warp = threadIdx.x / SQZ_WARP;
        from = (const char *)c.x.level.centroids.data + (size_t)c.head * c.n_clusters * row_bytes(c.a);
        slots = c.at<char>(c.l.working) + (size_t)warp * c.l.n_slots * tile_bytes(c.a);
        arrived = c.small.arrived[warp];
    }
    /* By one lane. */
    __device__ __forceinline__ void ask(const chooser &c, uint32_t tile, uint32_t slot) const
    {
        const uint32_t first = (tile * c.here.size + c.here.rank) * TILE;
        const uint32_t bytes = min((uint32_t)TILE, c.n_clusters - first) * row_bytes(c.a);
        sqz_barrier_expect(arrived + slot, bytes);
        sqz_copy_bytes(slots + slot * tile_bytes(c.a), from + (size_t)first * row_bytes(c.a), bytes, arrived + slot);
    }
    __device__ __forceinline__ void begin(const chooser &c) const
    {
        if (threadIdx.x % SQZ_WARP) return;
#pragma unroll 1
        for (uint32_t slot = 0; slot < c.l.n_slots; slot++) sqz_barrier_init(arrived + slot, 1);
        sqz_barrier_init(c.small.rows_arrived + threadIdx.x / SQZ_WARP, 1);
        sqz_barrier_init_done();
        uint32_t tile = threadIdx.x / SQZ_WARP;
#pragma unroll 1
        for (uint32_t slot = 0; slot < c.l.n_slots && tile < c.n_mine; slot++, tile += WARPS) ask(c, tile, slot);
    }
};

/* Four INT8 numbers as two pairs of halves: x + 128 as the low bits of 1024 + x + 128. */
__device__ __forceinline__ uint2 widened(uint32_t four)
{
    const uint32_t raised = four ^ 0x80808080u, low = __byte_perm(raised, 0x64646464u, 0x4140),
                   high = __byte_perm(raised, 0x64646464u, 0x4342);
    const __half2 bias = __float2half2_rn(1024.0f + 128.0f);
    uint2 x;
    __half2 a, b;
    memcpy(&a, &low, sizeof a);
    memcpy(&b, &high, sizeof b);
    a = __hsub2(a, bias);
    b = __hsub2(b, bias);
    memcpy(&x.x, &a, sizeof a);
    memcpy(&x.y, &b, sizeof b);
    return x;
}

/* Numbers 8 at .. 8 at + 7 of a row in shared memory as halves. */
template <bool INT8> __device__ __forceinline__ uint4 piece_of(const char *row, uint32_t at)
{
    if (!INT8) return *(const uint4 *)(row + 16 * at);
    const uint2 x = *(const uint2 *)(row + 8 * at);
    const uint2 a = widened(x.x), b = widened(x.y);
    return make_uint4(a.x, a.y, b.x, b.y);
}

template <bool INT8>
__device__ __forceinline__ void add_centroids(const chooser &c, const centroid_tiles &tiles,
                                              sqz_softmax_state (&state)[2], const query_rows &query, float factor,
                                              const float (&gain)[2], const float (&mean)[2], int g, int t)
{
    uint32_t slot = 0, parity = 0;
#pragma unroll 1
    for (uint32_t tile = threadIdx.x / SQZ_WARP; tile < c.n_mine; tile += WARPS) {
        const char *rows = tiles.slots + slot * tile_bytes(c.a) + g * row_bytes(c.a);
        float y[4] = {0, 0, 0, 0};
        sqz_barrier_wait(tiles.arrived + slot, parity);
#pragma unroll
        for (int j = 0; j < MAX_D / 32; j++) {
            if (32 * j >= c.a.head_dim) break;
            sqz_mma_chunk<sqz_f16>(y, piece_of<INT8>(rows, t + 4 * j),
                                   piece_of<INT8>(rows + 8 * row_bytes(c.a), t + 4 * j), query.x[j]);
        }
        __syncwarp(); /* all lanes have read */
        const uint32_t next = tile + c.l.n_slots * WARPS;
        if (threadIdx.x % SQZ_WARP == 0 && next < c.n_mine) tiles.ask(c, next, slot);
        if (++slot == c.l.n_slots) slot = 0, parity ^= 1;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t local = tile * TILE + 8 * half + g;
            if (!c.exists(local)) continue;
            const float keys = (float)(c.end(local) - c.begin(local)), spread = c.variance(local);
            const float unit = INT8 ? c.at<float>(c.l.unit)[local] : 1.0f;
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (2 * t + k >= c.group) continue;
                const float x = (y[2 * half + k] * unit + mean[k]) * factor + gain[k] * spread;
                c.logit(local)[2 * t + k] = x;
                add_logit(state[k], x, keys);
            }
        }
    }
}

/* ---- Denominators ------------------------------------------------------------------------------- */

/* Merges states over lanes, `first` apart and twice as far until `end`: maxima, then sums. */
__device__ __forceinline__ sqz_softmax_state merged_lanes(sqz_softmax_state s, int first, int end)
{
    float maximum = s.maximum, sum;
#pragma unroll
    for (int step = first; step < end; step *= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
    sum = s.sum * sqz_exp2(s.maximum - maximum);
#pragma unroll
    for (int step = first; step < end; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return {maximum, sum};
}

/* Lanes' states of columns 2t and 2t + 1 become the warp's. */
__device__ __forceinline__ void store_states(const sqz_softmax_state (&state)[2], sqz_softmax_state *to)
{
    const int lane = threadIdx.x % SQZ_WARP;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const sqz_softmax_state s = merged_lanes(state[i], 4, SQZ_WARP);
        if (lane < 4) to[2 * lane + i] = s;
    }
}

/* The block's part of every denominator goes to all blocks. The cluster's blocks have started. */
__device__ __forceinline__ void tell_parts(const chooser &c)
{
    if (threadIdx.x >= WARPS * COLUMNS) return; /* whole warps */
    const uint32_t column = threadIdx.x / WARPS, warp = threadIdx.x % WARPS;
    const sqz_softmax_state s = merged_lanes(c.small.warp_all[warp][column], 1, WARPS);
#pragma unroll 1
    for (uint32_t rank = warp; rank < c.here.size; rank += WARPS)
        *sqz_of_rank(&c.small.parts[c.here.rank][column], rank) = {s.maximum, s.sum};
}

/* A column's state of this rank becomes that of all ranks; a thread. Every block of the pair takes what the others' first
 * ones tell. which: of the launch's exchanges. */
__device__ __forceinline__ sqz_softmax_state of_all_ranks(const chooser &c, uint32_t column, uint32_t which,
                                                          sqz_softmax_state mine)
{
    return sqz_ranks_total(*c.elsewhere, c.small.step, which, c.pair * c.group + column, c.here.rank == 0, mine);
}

__device__ __forceinline__ void add_up_parts(const chooser &c, float *log2_total)
{
    static_assert(COLUMNS * MAX_RANKS <= THREADS, "a thread a part");
    if (threadIdx.x < COLUMNS * MAX_RANKS) { /* whole warps */
        const uint32_t column = threadIdx.x / MAX_RANKS, rank = threadIdx.x % MAX_RANKS;
        sqz_softmax_state s = {FLOOR, 0.0f};
        if (rank < c.here.size) s = {c.small.parts[rank][column].maximum, c.small.parts[rank][column].sum};
        s = merged_lanes(s, 1, MAX_RANKS);
        if (c.elsewhere && rank == 0 && column < c.group) s = of_all_ranks(c, column, 0, s);
        if (rank == 0) log2_total[column] = sqz_softmax_log2(s);
    }
    __syncthreads();
}

/* ---- The tail --------------------------------------------------------------------------- */

/* What a cluster that is not read weighs is left where its logits were: zeros where it does not count. */
template <int Q> struct tail_weights {
    float factor[Q], extra, skip;

    __device__ __forceinline__ void set(const chooser &c)
    {
        const float used = c.small.variance_gain;
#pragma unroll
        for (int r = 0; r < Q; r++)
            factor[r] = sqz_spread_factor(1.0f - used, c.a.scale, c.a.head_dim, c.small.norm[r]) * SQZ_LOG2E;
        extra = c.small.tail_gain * SQZ_LOG2E;
        skip = c.x.tail_skip * expf(c.small.log_threshold);
    }
    __device__ __forceinline__ void store(const chooser &c, uint32_t local, const float (&weight)[Q]) const
    {
        bool counts = false;
#pragma unroll
        for (int r = 0; r < Q; r++) counts = counts || (r < c.group && weight[r] >= skip);
#pragma unroll
        for (int r = 0; r < Q; r++)
            if (r < c.group) c.logit(local)[r] = counts ? weight[r] : 0.0f;
    }
    /* A cluster of which `keys` keys are not read. */
    __device__ __forceinline__ void weigh(const chooser &c, uint32_t local, uint32_t keys) const
    {
        float weight[Q];
#pragma unroll
        for (int r = 0; r < Q; r++) {
            const float total = c.small.log2_total[r];
            weight[r] = 0;
            if (r >= c.group || !keys) continue;
            const float y = sqz_tail_logit(c.logit(local)[r], factor[r], c.variance(local), extra);
            weight[r] = (float)keys * sqz_exp2(sqz_tail_bound(y, total) - total);
        }
        store(c, local, weight);
    }
};

/* Adds up value centroids by the weights that are where logits were, 32 clusters of a warp at a time, by the copy engine;
 * all threads. */
template <int Q> __device__ __forceinline__ void add_tail(const chooser &c)
{
    const sqz_cuda_choose_rows &a = c.a;
    const uint32_t d = a.head_dim, lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    const __half *values = (const __half *)c.x.level.value_centroids.data + (size_t)c.head * c.n_clusters * d;
    __half *rows = c.at<__half>(c.l.working) + (size_t)warp * SQZ_WARP * d;
    uint64_t *arrived = c.small.rows_arrived + warp;
    uint32_t parity = 0;
    static_assert(WARPS * SQZ_WARP * MAX_D * 2 <= WORKING, "32 rows a warp");
    float acc[Q][4] = {}, sum[Q] = {};
    uint32_t n_read = 0;
    sqz_stores_to_async(); /* what the place was used for before */
    __syncthreads();       /* all weights are there */
#pragma unroll 1
    for (uint32_t base = warp * SQZ_WARP; base < c.n_mine * TILE; base += THREADS) {
        const uint32_t local = base + lane;
        bool counts = false;
        if (c.exists(local))
#pragma unroll 1
            for (uint32_t r = 0; r < c.group; r++) counts = counts || c.logit(local)[r] > 0;
        uint32_t left = __ballot_sync(~0u, counts);
        if (!left) continue;
        n_read += __popc(left);
        if (lane == 0) sqz_barrier_expect(arrived, __popc(left) * d * 2);
        __syncwarp();
        if (counts)
            sqz_copy_bytes(rows + __popc(left & ((1u << lane) - 1)) * d, values + (size_t)c.cluster(local) * d, d * 2,
                           arrived);
        sqz_barrier_wait(arrived, parity);
        parity ^= 1;
#pragma unroll 1
        for (uint32_t i = 0; left; i++, left &= left - 1) {
            const float *weight = c.logit(base + __ffs(left) - 1);
            const uint2 value = 4 * lane < d ? *(const uint2 *)(rows + i * d + 4 * lane) : make_uint2(0, 0);
            const float2 low = sqz_f16::unpack(value.x), high = sqz_f16::unpack(value.y);
#pragma unroll
            for (int r = 0; r < Q; r++) {
                const float w = r < c.group ? weight[r] : 0.0f;
                sum[r] += w;
                acc[r][0] += w * low.x, acc[r][1] += w * low.y;
                acc[r][2] += w * high.x, acc[r][3] += w * high.y;
            }
        }
        __syncwarp(); /* all lanes have read */
    }
    if (a.read && n_read && lane == 0) atomicAdd(&a.read[c.pair].value_centroids, n_read);
    __syncthreads(); /* the place has another use */
    float *out = c.at<float>(c.l.working);
#pragma unroll
    for (int r = 0; r < Q; r++) {
        if (r >= c.group) break;
        if (4 * lane < d)
            *(float4 *)(out + (warp * c.group + r) * d + 4 * lane) =
                make_float4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
        if (lane == 0) c.small.tail_sum[warp][r] = sum[r];
    }
    __syncthreads();
    const size_t part = ((size_t)c.pair * a.n_tail + c.here.rank) * c.group;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < c.group * d; i += THREADS) {
        float x = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) x += out[w * c.group * d + i];
        a.tail_out[part * d + i] = x;
    }
    if (threadIdx.x < c.group) {
        float all = 0;
#pragma unroll 1
        for (int w = 0; w < WARPS; w++) all += c.small.tail_sum[w][threadIdx.x];
        a.tail_parts[part + threadIdx.x] = {all > 0 ? c.small.log2_total[threadIdx.x] : -INFINITY, all};
    }
}

/* ---- Whole clusters ------------------------------------------------------------------------ */

template <int Q> __device__ __forceinline__ void mark_clusters(const chooser &c)
{
    const float limit = exp2f(sqz_cluster_limit(c.small.log_threshold, 0) * SQZ_LOG2E);
    const float each = 1.0f / (float)c.group;
    const bool has_tail = c.has_tail();
    tail_weights<Q> tail;
    if (has_tail) tail.set(c);
#pragma unroll 1
    for (uint32_t local = threadIdx.x; local < c.n_mine * TILE; local += THREADS) {
        if (!c.exists(local)) continue;
        float score = 0;
#pragma unroll
        for (int r = 0; r < Q; r++) {
            if (r >= c.group) break;
            const float s = sqz_exp2(c.logit(local)[r] - c.small.log2_total[r]);
            score = c.x.group_max ? fmaxf(score, s) : score + s * each;
        }
        const uint32_t begin = c.x.n_fixed + c.begin(local), end = c.x.n_fixed + c.end(local);
        const bool retained = score >= limit;
        if (retained && end > begin) c.set_marks(begin / SQZ_GROUP_ROWS, (end - 1) / SQZ_GROUP_ROWS + 1);
        if (has_tail) tail.weigh(c, local, retained ? 0 : end - begin);
    }
}

/* ---- Single keys, by their codes ------------------------------------------------------------ */

/* coordinate_i = direction_i . q, by the tensor core, 16 directions a warp. */
__device__ __forceinline__ void take_coordinates(const chooser &c, const query_rows &query, int g, int t)
{
    const uint32_t m = c.x.codes.n_directions, d = c.a.head_dim;
    const __half *directions = c.at<__half>(c.l.directions);
#pragma unroll 1
    for (uint32_t first = threadIdx.x / SQZ_WARP * TILE; first < m; first += WARPS * TILE) {
        const uint32_t low = min(first + g, m - 1), high = min(first + g + 8, m - 1); /* rows that there are */
        const char *low_row = (const char *)(directions + low * d), *high_row = (const char *)(directions + high * d);
        float x[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < MAX_D / 32; j++) {
            if (32 * j >= d) break;
            sqz_mma_chunk<sqz_f16>(x, piece_of<false>(low_row, t + 4 * j), piece_of<false>(high_row, t + 4 * j), query.x[j]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t column = 2 * t + i % 2, direction = first + g + 8 * (i / 2);
            if (column < c.group && direction < m) c.at<float>(c.l.coordinate)[column * m + direction] = x[i];
        }
    }
}

/* Tables of what the codes add to a logit, and how far a key's may lie from its centroid's (code_tables.cu). */
__device__ __forceinline__ void make_tables(const chooser &c)
{
    const sqz_cuda_choose_rows &a = c.a;
    const uint32_t m = c.x.codes.n_directions;
    const float factor = a.scale * SQZ_LOG2E;
    const float *coordinate = c.at<float>(c.l.coordinate), *spread = c.at<float>(c.l.spread);
    const uint32_t *first = c.at<uint32_t>(c.l.first);
    const __half *book = c.at<__half>(c.l.book);
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < c.x.codes.n_words * c.group * SQZ_CODE_TABLE; i += THREADS) {
        const uint32_t row = i / SQZ_CODE_TABLE, word = row / c.group, r = row % c.group, entry = i % ENTRIES;
        const uint32_t part = word * PARTS + i % SQZ_CODE_TABLE / ENTRIES;
        float sum = 0;
#pragma unroll 1
        for (uint32_t j = first[part]; j < first[part + 1]; j++)
            sum += coordinate[r * m + j] * __half2float(book[entry * m + j]);
        c.at<float>(c.l.tables)[i] = factor * sum;
    }
    const float gain = c.x.level.variance ? c.small.variance_gain : 0.0f;
    const int lane = threadIdx.x % SQZ_WARP;
#pragma unroll 1
    for (uint32_t r = threadIdx.x / SQZ_WARP; r < c.group; r += WARPS) {
        float variance = 0;
#pragma unroll 1
        for (uint32_t i = lane; i < m; i += SQZ_WARP) variance += coordinate[r * m + i] * coordinate[r * m + i] * spread[i];
        variance = warp_sum(variance);
        if (lane > 0) continue;
        c.small.width[r] = sqz_open_deviations(0) * factor * sqrtf(variance);
        c.small.gain[r] = sqz_spread_factor(gain, a.scale, a.head_dim, c.small.norm[r]) * SQZ_LOG2E;
    }
}

/* Which clusters may hold a key that reaches the threshold: their list, in order; what the others weigh, relative to the
 * clusters' own denominators, is added to sum. All threads. */
template <int Q> __device__ __forceinline__ uint32_t open_clusters(const chooser &c, float (&sum)[Q])
{
    const sqz_cuda_choose_rows &a = c.a;
    const float log2_limit = c.small.log_threshold * SQZ_LOG2E, limit = exp2f(log2_limit);
    const float each = 1.0f / (float)c.group;
    const bool largest = c.group == 1 || c.x.group_max; /* scores are compared as logits: no exponentials */
    uint32_t n_open = 0, n_codes = 0; /* codes: keys of opened clusters */
#pragma unroll 1
    for (uint32_t base = 0; base < c.n_mine * TILE; base += THREADS) { /* the same rounds for every thread */
        const uint32_t local = base + threadIdx.x;
        const bool exists = c.exists(local);
        uint32_t open = 0; /* the lowest bit; above OPEN_BITS its keys */
        if (exists) {
            const float variance = c.variance(local), root = sqrtf(variance);
            const uint32_t keys = c.end(local) - c.begin(local);
            float score = 0, reach = -INFINITY;
#pragma unroll
            for (int r = 0; r < Q; r++) {
                if (r >= c.group) break;
                const float y = c.logit(local)[r], total = c.small.level_total[r];
                reach = fmaxf(reach, sqz_reach(y - c.small.gain[r] * variance, c.small.width[r], root, total));
                if (largest) reach = fmaxf(reach, y - total);
                else score += sqz_exp2(y - total) * each;
            }
            open = keys && (reach >= log2_limit || (!largest && score >= limit)) ? 1 | keys << OPEN_BITS : 0;
            if (!open) {
#pragma unroll
                for (int r = 0; r < Q; r++)
                    if (r < c.group) sum[r] += (float)keys * sqz_exp2(c.logit(local)[r] - c.small.level_total[r]);
            }
            c.at<uint8_t>(c.l.open)[local] = open & 1;
        }
        uint32_t more;
        const uint32_t place = sqz_block_scan<WARPS>(open, c.small.scratch, &more) & ((1 << OPEN_BITS) - 1);
        if (open) c.at<uint16_t>(c.l.list)[n_open + place] = (uint16_t)local;
        n_open += more & ((1 << OPEN_BITS) - 1);
        n_codes += more >> OPEN_BITS;
    }
    if (a.read && threadIdx.x == 0) atomicAdd(&a.read[c.pair].codes, n_codes);
    __syncthreads();
    return n_open;
}

/* Adds to e what the 8 codes of a word say; table: [G][8][16]. */
template <int Q>
__device__ __forceinline__ void add_codes(float (&e)[Q], uint32_t word, const float *table, uint32_t group)
{
    /* Of the number in its part, the code times 4: four of every other code side by side, then a byte of those. */
    const uint32_t even = word << 2 & 0x3c3c3c3cu, odd = word >> 2 & 0x3c3c3c3cu;
    uint32_t at_byte[PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; p++) at_byte[p] = __byte_perm(p % 2 ? odd : even, 0, 0x4440 + p / 2);
#pragma unroll
    for (int r = 0; r < Q; r++) {
        if (r >= group) break;
        float x[PARTS];
#pragma unroll
        for (int p = 0; p < PARTS; p++)
            x[p] = *(const float *)((const char *)(table + r * SQZ_CODE_TABLE + ENTRIES * p) + at_byte[p]);
        e[r] += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
    }
}

/* The keys of opened clusters, a cluster a warp, 32 keys at a time. Codes of the first n_kept times 32 of a warp are asked
 * for together, and their estimates take the place of the codes. */
struct opened_keys {
    uint32_t n_open, n_words, n_keys;
    const uint32_t *words; /* of the head */
    uint32_t *kept;        /* the lane's of the warp's first 32 */
    uint32_t each;         /* numbers from those to the next 32 */

    __device__ __forceinline__ opened_keys(const chooser &c, uint32_t open)
    {
        n_open = open;
        n_words = c.x.codes.n_words;
        n_keys = c.x.n_rows - c.x.n_fixed;
        words = c.x.codes.words + (size_t)c.head * n_words * n_keys;
        each = max(c.group, n_words) * SQZ_WARP;
        kept = c.at<uint32_t>(c.l.working) + (size_t)threadIdx.x / SQZ_WARP * c.l.n_kept * each + threadIdx.x % SQZ_WARP;
    }
    /* Calls f(local, key, there, slot, last) for every 32 keys: the lane's, whether it has one, and whether they are the
     * cluster's last. */
    template <class F> __device__ __forceinline__ void walk(const chooser &c, F f) const
    {
        uint32_t slot = 0;
#pragma unroll 1
        for (uint32_t i = threadIdx.x / SQZ_WARP; i < n_open; i += WARPS) {
            const uint32_t local = c.at<uint16_t>(c.l.list)[i], begin = c.begin(local), end = c.end(local);
#pragma unroll 1
            for (uint32_t at = begin; at < end; at += SQZ_WARP, slot++) {
                const uint32_t key = at + threadIdx.x % SQZ_WARP;
                f(local, key, key < end, slot, at + SQZ_WARP >= end);
            }
        }
    }
    __device__ __forceinline__ void ask(const chooser &c) const
    {
        walk(c, [&](uint32_t, uint32_t key, bool there, uint32_t slot, bool) {
            if (!there || slot >= c.l.n_kept) return;
#pragma unroll 1
            for (uint32_t w = 0; w < n_words; w++)
                __pipeline_memcpy_async(kept + slot * each + w * SQZ_WARP, words + (size_t)w * n_keys + key, 4);
        });
        __pipeline_commit();
    }
    /* first: the first time, kept are codes. */
    template <int Q>
    __device__ __forceinline__ void estimate(const chooser &c, uint32_t local, uint32_t key, bool there, uint32_t slot,
                                             bool first, float (&e)[Q]) const
    {
        uint32_t *own = kept + slot * each;
        const bool has_place = slot < c.l.n_kept;
        if (has_place && !first) {
#pragma unroll
            for (int r = 0; r < Q; r++) e[r] = r < c.group ? __uint_as_float(own[r * SQZ_WARP]) : -INFINITY;
            return;
        }
        const float variance = c.variance(local);
#pragma unroll
        for (int r = 0; r < Q; r++)
            e[r] = r < c.group ? c.logit(local)[r] - c.small.gain[r] * variance : -INFINITY;
#pragma unroll 1
        for (uint32_t w = 0; w < n_words; w++) {
            uint32_t word = 0;
            if (has_place) word = own[w * SQZ_WARP];
            else if (there) word = __ldg(words + (size_t)w * n_keys + key);
            add_codes<Q>(e, word, c.at<float>(c.l.tables) + w * c.group * SQZ_CODE_TABLE, c.group);
        }
        if (!has_place) return;
#pragma unroll
        for (int r = 0; r < Q; r++)
            if (r < c.group) own[r * SQZ_WARP] = __float_as_uint(e[r]);
    }
};

/* Denominators from the estimates in place of opened clusters, told to all and added up; all threads. */
template <int Q> __device__ __forceinline__ void total_keys(const chooser &c, float (&sum)[Q])
{
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
#pragma unroll
    for (int r = 0; r < Q; r++) {
        const float all = warp_sum(sum[r]);
        if (lane == 0) c.small.warp_sums[warp][r] = all;
    }
    __syncthreads();
    const uint32_t column = threadIdx.x / MAX_RANKS, rank = threadIdx.x % MAX_RANKS;
    if (column < c.group && rank < c.here.size) {
        const float base = c.small.level_total[column];
        float all = 0;
#pragma unroll 1
        for (int w = 0; w < WARPS; w++) {
            const sqz_softmax_state exact = c.small.warp_exact[w][column];
            all += c.small.warp_sums[w][column] + exact.sum * sqz_exp2(exact.maximum - base);
        }
        *sqz_of_rank(&c.small.sums[c.here.rank][column], rank) = all;
    }
    sqz_cluster_arrive();
    sqz_cluster_wait();
    if (threadIdx.x < c.group) {
        float all = 0;
#pragma unroll 1
        for (uint32_t i = 0; i < c.here.size; i++) all += c.small.sums[i][threadIdx.x];
        if (c.elsewhere) all = of_all_ranks(c, threadIdx.x, 1, {0.0f, all}).sum;
        c.small.log2_total[threadIdx.x] = c.small.level_total[threadIdx.x] + (all > 0 ? log2f(all) : 0.0f);
    }
    __syncthreads();
}

/* Keys of a closed cluster that are not in marked groups. None of those lies inside it, so its ends tell. */
__device__ __forceinline__ uint32_t keys_left(const chooser &c, uint32_t local)
{
    uint32_t begin = c.x.n_fixed + c.begin(local), end = c.x.n_fixed + c.end(local);
    if (begin == end) return 0;
    const uint32_t first = begin / SQZ_GROUP_ROWS, last = (end - 1) / SQZ_GROUP_ROWS;
    if (c.is_marked(last)) end = max(begin, last * SQZ_GROUP_ROWS);
    if (c.is_marked(first)) begin = min(end, (first + 1) * SQZ_GROUP_ROWS);
    return end - begin;
}

/* Three times through the keys of opened clusters, in one loop: for the denominators; to mark the groups of those that
 * reach the threshold; and, with a tail, to weigh what is not read, when everything is marked. All threads. */
template <int Q> __device__ __forceinline__ void choose_keys(const chooser &c, bool has_tail)
{
    enum { SUM, MARK, WEIGH };
    const float log2_limit = c.small.log_threshold * SQZ_LOG2E, limit = sqz_exp2(log2_limit);
    const float each = 1.0f / (float)c.group;
    const bool largest = c.group == 1 || c.x.group_max;
    const int lane = threadIdx.x % SQZ_WARP;
    float sum[Q] = {};
    const opened_keys keys(c, open_clusters<Q>(c, sum));
    tail_weights<Q> tail;
    if (has_tail) tail.set(c);
    keys.ask(c);
    __pipeline_wait_prior(0);
    __syncwarp();
#pragma unroll 1
    for (int turn = SUM; turn <= WEIGH; turn++) {
        const float *total = turn == SUM ? c.small.level_total : c.small.log2_total;
        keys.walk(c, [&](uint32_t local, uint32_t key, bool there, uint32_t slot, bool last) {
            float e[Q], share[Q], score = 0, reach = -INFINITY;
            keys.estimate<Q>(c, local, key, there, slot, turn == SUM, e);
#pragma unroll
            for (int r = 0; r < Q; r++) {
                const float x = r < c.group ? e[r] - total[r] : -INFINITY;
                share[r] = sqz_exp2(fminf(x, 100.0f)); /* no estimate is so far above that this bound comes to bear */
                score += share[r] * each;
                reach = fmaxf(reach, x);
            }
            const uint32_t mark = (c.x.n_fixed + key) / SQZ_GROUP_ROWS;
            if (turn == MARK) {
                const bool retained = there && (largest ? reach >= log2_limit : score >= limit);
                const uint32_t all = __ballot_sync(~0u, retained);
                /* Keys side by side are often retained together: the first of a group marks it. */
                const uint32_t before = all & ((1u << lane) - 1), nearest = before ? 31 - __clz(before) : lane;
                const uint32_t mark_before = __shfl_sync(~0u, mark, nearest);
                if (retained && (!before || mark_before != mark)) c.set_marks(mark, mark + 1);
                return;
            }
            if (there && (turn == SUM || !c.is_marked(mark))) {
#pragma unroll
                for (int r = 0; r < Q; r++) sum[r] += share[r];
            }
            if (turn == SUM || !last) return;
            float weight[Q];
#pragma unroll
            for (int r = 0; r < Q; r++) {
                weight[r] = fminf(warp_sum(sum[r]) * sqz_exp2(tail.extra), 1.0f);
                sum[r] = 0;
            }
            if (lane == 0) tail.store(c, local, weight);
        });
        if (turn == SUM) {
            total_keys<Q>(c, sum);
        } else if (turn == MARK) {
            sqz_cluster_arrive();
            sqz_cluster_wait(); /* everything is marked */
            if (!has_tail) return;
        }
#pragma unroll
        for (int r = 0; r < Q; r++) sum[r] = 0;
    }
#pragma unroll 1
    for (uint32_t local = threadIdx.x; local < c.n_mine * TILE; local += THREADS)
        if (c.exists(local) && !c.at<uint8_t>(c.l.open)[local]) tail.weigh(c, local, keys_left(c, local));
}

/* ---- The list --------------------------------------------------------------------------------- */

/* Marks of the blocks before this one; every warp for itself, because to look is quicker than to be told. */
__device__ __forceinline__ uint32_t marks_before(const chooser &c)
{
    const uint32_t lane = threadIdx.x % SQZ_WARP, n = c.l.words_each;
    uint32_t count = 0;
#pragma unroll 1
    for (uint32_t i = lane; i < n; i += SQZ_WARP) {
#pragma unroll
        for (uint32_t rank = 0; rank < MAX_RANKS - 1; rank++)
            if (rank < c.here.rank) count += __popc(*sqz_of_rank(c.at<uint32_t>(c.l.marks) + i, rank));
    }
    return __reduce_add_sync(~0u, count);
}

/* Every warp knows where each word's part of the list begins, and writes every WARPS-th, a bit a lane. */
__device__ __forceinline__ void write_list(const chooser &c, uint32_t before)
{
    const uint32_t lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    const uint32_t first_word = c.here.rank * c.l.words_each, *marks = c.at<uint32_t>(c.l.marks);
    uint32_t *list = c.a.groups + (size_t)c.pair * c.a.group_capacity;
#pragma unroll 1
    for (uint32_t first = 0; first < c.l.words_each; first += SQZ_WARP) {
        const uint32_t word = first + lane < c.l.words_each ? marks[first + lane] : 0, n = __popc(word);
        uint32_t to_me = n;
#pragma unroll
        for (int step = 1; step < SQZ_WARP; step *= 2) {
            const uint32_t x = __shfl_up_sync(~0u, to_me, step);
            if (lane >= step) to_me += x;
        }
#pragma unroll 1
        for (uint32_t i = 0; i < SQZ_WARP / WARPS; i++) {
            const uint32_t from = warp + i * WARPS, bits = __shfl_sync(~0u, word, from);
            const uint32_t place = before + __shfl_sync(~0u, to_me - n, from) + __popc(bits & ((1u << lane) - 1));
            if (bits >> lane & 1) list[place] = 32 * (first_word + first + from) + lane;
        }
        before += __shfl_sync(~0u, to_me, SQZ_WARP - 1);
    }
    if (c.here.rank + 1 < c.here.size || threadIdx.x > 0) return;
    c.a.n_groups[c.pair] = before;
    if (c.a.n_retained) c.a.n_retained[c.pair] = before;
}

/* ---- The kernel --------------------------------------------------------------------------------- */

/* The token's own key and value go behind its sequence's rows. */
__device__ __forceinline__ void append_row(const chooser &c)
{
    const sqz_cuda_choose_rows &a = c.a;
    const uint32_t pieces = a.head_dim / 8, i = threadIdx.x;
    if (!a.fresh.keys || c.here.rank + 1 < c.here.size || i >= 2 * pieces) return;
    const sqz_cuda_user &user = c.small.user;
    const size_t to = ((size_t)c.head * user.capacity_rows + user.n_rows - 1) * pieces + i % pieces;
    const sqz_cuda_fresh &f = a.fresh;
    const size_t key = c.sequence * f.key_token_stride + c.head * f.key_head_stride,
                 value = c.sequence * f.value_token_stride + c.head * f.value_head_stride;
    if (i < pieces) ((uint4 *)user.keys)[to] = *(const uint4 *)((const __half *)f.keys + key + 8 * i);
    else ((uint4 *)user.values)[to] = *(const uint4 *)((const __half *)f.values + value + 8 * (i - pieces));
}

#endif /* SQZ_HOPPER_CODE */

/* Q: query rows of a pair, rounded up. */
template <bool INT8, bool CODES, int Q, int N>
__global__ void __launch_bounds__(THREADS, 2) choose_kernel(const __grid_constant__ call<N> all)
{
#ifdef SQZ_HOPPER_CODE
    const sqz_cuda_choose_rows &a = all.a;
    extern __shared__ uint4 dynamic[];
    __shared__ small_memory small;
    const sqz_cluster_place place = sqz_cluster_here();
    const uint32_t pair = blockIdx.x / place.size;
    const sqz_cuda_context &of_pair = all.of(pair / a.n_head_kv);
    const uint32_t n_all = (of_pair.level.n_clusters + TILE - 1) / TILE;
    const chooser c = {a,
                       of_pair,
                       all.l,
                       (char *)dynamic,
                       small,
                       place,
                       all.elsewhere(),
                       pair,
                       pair % a.n_head_kv,
                       pair / a.n_head_kv,
                       a.n_head / a.n_head_kv,
                       of_pair.level.n_clusters,
                       place.rank < n_all ? (n_all - place.rank - 1) / place.size + 1 : 0};
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP, g = lane / 4, t = lane % 4;

    /* What does not come from the kernel before. */
    sqz_let_next_start();
    const centroid_tiles tiles(c);
    query_rows query;
    /* The first GPU of several tells its query before all else: a fresh one comes from a kernel that has ended. */
    const bool led = c.elsewhere && c.elsewhere->led && a.fresh.queries, told = led && c.elsewhere->rank,
               tells = led && !told && place.rank == 0 && warp == 0;
    const uint32_t step = tells ? sqz_mailbox_step(*c.elsewhere) : 0;
    if (led && !told) query.load(c, g, t);
    tiles.begin(c);
    if (tells) query.tell(c, step, g, t);
    ask_for_numbers(c);
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < c.l.words_each; i += THREADS) c.at<uint32_t>(c.l.marks)[i] = 0;
    sqz_wait_for_previous();
    if (!led) query.load(c, g, t);
    if (told) { /* all else is here when the query comes; one warp alone waits for it */
        __pipeline_wait_prior(0);
        __syncthreads();
        exact_rows(c).approach(c);
        if (warp == 0) query.take(c, g, t);
    }
    if (c.elsewhere && threadIdx.x == THREADS - 1) small.step = sqz_mailbox_step(*c.elsewhere);
    sqz_cluster_arrive(); /* this block has started, and nothing is marked */
    __pipeline_wait_prior(0);
    __syncthreads();
    if (told) query.look(c, lane);
    const exact_rows rows(c);
    if (!told) rows.approach(c);
    query.sum_up<INT8>(c, t);
    const float2 norms = sqz_for_columns(query.norm, t), means = sqz_for_columns(query.mean, t);
    if (warp == 0 && g == 0) small.norm[2 * t] = norms.x, small.norm[2 * t + 1] = norms.y;

    const float factor = a.scale * SQZ_LOG2E;
    const float unit_gain = sqz_spread_factor(c.x.level.variance ? small.variance_gain : 0.0f, a.scale, a.head_dim, SQZ_LOG2E);
    const float gain[2] = {unit_gain * norms.x, unit_gain * norms.y}, mean[2] = {means.x, means.y};
    sqz_softmax_state state[2] = {{FLOOR, 0.0f}, {FLOOR, 0.0f}}, exact[2] = {{FLOOR, 0.0f}, {FLOOR, 0.0f}};
    add_centroids<INT8>(c, tiles, state, query, factor, gain, mean, g, t);
    rows.add(c, exact, query, factor, g, t);
    if (c.x.exact && place.rank == 0 && warp == 0 && g == 0) add_known(c, exact, t);
    if (CODES) take_coordinates(c, query, g, t);
#pragma unroll
    for (int k = 0; k < 2; k++) state[k] = merged(state[k], exact[k]);
    store_states(state, small.warp_all[warp]);
    if (CODES) store_states(exact, small.warp_exact[warp]);
    __syncthreads();
    sqz_cluster_wait(); /* all blocks have started */
    tell_parts(c);
    sqz_cluster_arrive();
    if (a.fresh.queries && place.rank == 0 && warp == 0) query.store(c, g, t);
    append_row(c);
    if (CODES) make_tables(c);
    sqz_cluster_wait();
    add_up_parts(c, CODES ? small.level_total : small.log2_total);

    /* Marks. */
    const bool tail = c.has_tail();
    if (place.rank == 0) {
        const uint32_t n_fixed = (c.x.n_fixed + SQZ_GROUP_ROWS - 1) / SQZ_GROUP_ROWS;
#pragma unroll 1
        for (uint32_t i = 32 * threadIdx.x; i < n_fixed; i += 32 * THREADS) c.set_marks(i, min(i + 32, n_fixed));
    }
    if (CODES) {
        choose_keys<Q>(c, tail);
    } else {
        mark_clusters<Q>(c);
        sqz_cluster_arrive();
        sqz_cluster_wait(); /* everything is marked */
    }
    const uint32_t before = marks_before(c);
    sqz_cluster_arrive();
    if (a.log_total && place.rank == 0 && threadIdx.x < c.group)
        a.log_total[(size_t)pair * c.group + threadIdx.x] = small.log2_total[threadIdx.x] * SQZ_LN2;
#pragma unroll 1
    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < a.n_arrived; i += gridDim.x * THREADS) a.arrived[i] = 0;
    write_list(c, before);
    if (tail) {
        add_tail<Q>(c);
    } else if (a.tail_parts && threadIdx.x < c.group) {
        a.tail_parts[((size_t)pair * a.n_tail + place.rank) * c.group + threadIdx.x] = {-INFINITY, 0.0f};
    }
    sqz_cluster_wait(); /* nobody looks into this block any more */
#endif
}

template <int N> struct kernels {
    typedef void (*kernel)(const call<N>);

    template <int Q> static kernel of(bool int8, bool codes)
    {
        if (int8) return codes ? choose_kernel<true, true, Q, N> : choose_kernel<true, false, Q, N>;
        return codes ? choose_kernel<false, true, Q, N> : choose_kernel<false, false, Q, N>;
    }
    static kernel of(const struct sqz_cuda_choose_rows *a)
    {
        const bool int8 = a->level.centroids.type == SQZ_ROW_I8, codes = a->codes.n_words != 0;
        return a->n_head / a->n_head_kv <= 4 ? of<4>(int8, codes) : of<8>(int8, codes);
    }
};

const void *kernel_of(const struct sqz_cuda_choose_rows *a, bool several)
{
    return several ? (const void *)kernels<SQZ_MOST_CONTEXTS>::of(a) : (const void *)kernels<1>::of(a);
}

struct sqz_cuda_context only_context(const struct sqz_cuda_choose_rows *a)
{
    struct sqz_cuda_context c = {};
    c.level = a->level;
    c.codes = a->codes;
    c.keys = a->keys;
    c.n_rows = a->n_rows;
    c.n_fixed = a->n_fixed;
    c.fixed_alone = a->fixed_alone;
    c.variance_gain = a->variance_gain;
    c.tail_skip = a->tail_skip;
    c.exact = a->exact;
    c.group_max = a->group_max;
    c.tail = true;
    return c;
}

/* Whether n clusters of so many blocks are on the device at the same time; n 0: whether one can be. */
bool fit_together(const void *k, uint32_t n, uint32_t ranks, uint32_t bytes)
{
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute cluster;
    int most = 0;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = ranks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3((n ? n : 1) * ranks);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = bytes;
    config.attrs = &cluster;
    config.numAttrs = 1;
    auto set = [k](cudaFuncAttribute what, int to) { return cudaFuncSetAttribute(k, what, to) == cudaSuccess; };
    const bool ok =
        bytes <= MOST_SHARED && sqz_allow_shared(k, MOST_SHARED) &&
        set(cudaFuncAttributeNonPortableClusterSizeAllowed, ranks > 8) &&
        set(cudaFuncAttributeClusterSchedulingPolicyPreference, cudaClusterSchedulingPolicySpread) &&
        cudaOccupancyMaxActiveClusters(&most, k, &config) == cudaSuccess;
    if (!ok) cudaGetLastError();
    return ok && most >= (int)(n ? n : 1);
}

/* Clusters of a block, at most. */
uint32_t most_local(const struct sqz_cuda_choose_rows *a)
{
    return a->codes.n_words ? MOST_LOCAL_CODED : MOST_LOCAL;
}

/* The most blocks of a pair, not fewer than `least`, with which all pairs' are on the device together and its
 * multiprocessors have so many each; 0: there are none. */
uint32_t ranks_together(const struct sqz_cuda_choose_rows *a, const void *k, uint32_t least, uint32_t each)
{
    const uint32_t pairs = a->n_sequences * a->n_head_kv, n = (uint32_t)sqz_device_get().n_multiprocessors;
    for (uint32_t ranks = MAX_RANKS; ranks >= least; ranks /= 2) {
        const layout l = layout_of(*a, ranks);
        if (pairs * ranks <= each * n && l.n_local <= most_local(a) && fit_together(k, pairs, ranks, l.bytes)) return ranks;
    }
    return 0;
}

/* The fewest with which a pair finds room, where pairs come one after the other. */
uint32_t ranks_in_turn(const struct sqz_cuda_choose_rows *a, const void *k)
{
    for (uint32_t ranks = LEAST_RANKS; ranks <= MAX_RANKS; ranks *= 2) {
        const layout l = layout_of(*a, ranks);
        if (l.n_local <= most_local(a) && fit_together(k, 0, ranks, l.bytes)) return ranks;
    }
    return 0;
}

} // namespace

extern "C" uint32_t sqz_cuda_choose_contexts_ranks(const struct sqz_cuda_choose_rows *a,
                                                   const struct sqz_cuda_contexts *contexts)
{
    const uint32_t group = a->n_head / a->n_head_kv;
    const void *k = kernel_of(a, contexts != NULL);
    if (a->type != SQZ_ROW_F16 || a->head_dim > MAX_D || a->head_dim % 32 || group > COLUMNS ||
        (a->codes.n_words && a->codes.n_directions * a->head_dim * 2 > MOST_DIRECTIONS) || !sqz_hopper_kernel(k))
        return 0;
    uint32_t ranks = ranks_together(a, k, FEW_RANKS, 1);
    if (!ranks) ranks = ranks_together(a, k, LEAST_RANKS, 2);
    /* On one context steps over the whole device are quicker then, because all sequences read the same centroids. */
    return ranks || !contexts ? ranks : ranks_in_turn(a, k);
}

extern "C" enum sqz_status sqz_cuda_choose_contexts_launch(const struct sqz_cuda_choose_rows *a,
                                                           const struct sqz_cuda_contexts *contexts, uint32_t ranks,
                                                           bool after_ours, void *stream)
{
    const layout l = layout_of(*a, ranks);
    const dim3 grid(a->n_sequences * a->n_head_kv * ranks);
    if (!contexts) {
        struct call<1> one = {*a, l, {only_context(a)}, {0}, {}};
        if (a->elsewhere) one.ranks[0] = *a->elsewhere;
        return sqz_launch(kernels<1>::of(a), grid, THREADS, l.bytes, ranks, after_ours, one, stream);
    }
    struct call<SQZ_MOST_CONTEXTS> all = {*a, l};
    memcpy(all.context, contexts->context, contexts->n * sizeof *contexts->context);
    memcpy(all.context_of, contexts->of, a->n_sequences);
    return sqz_launch(kernels<SQZ_MOST_CONTEXTS>::of(a), grid, THREADS, l.bytes, ranks, after_ours, all, stream);
}

extern "C" uint32_t sqz_cuda_choose_rows_ranks(const struct sqz_cuda_choose_rows *a)
{
    return sqz_cuda_choose_contexts_ranks(a, NULL);
}

extern "C" enum sqz_status sqz_cuda_choose_rows_launch(const struct sqz_cuda_choose_rows *a, uint32_t ranks,
                                                       bool after_ours, void *stream)
{
    return sqz_cuda_choose_contexts_launch(a, NULL, ranks, after_ours, stream);
}
