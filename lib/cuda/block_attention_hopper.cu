/*
 * Attention of a block of tokens on Hopper (sm_90a): online softmax
 * (arXiv 1805.02867) over tiles of keys, both products as wgmma.
 *
 * Math: logits S = scale Q K^T in base 2, running maximum and sum per row,
 * O = sum of 2^(S - maximum) V / sum.
 * Work: tiles of BN rows, of all heads one after the other, whatever each head
 * retains. W thread blocks form a gang: they read the same tiles at the same time,
 * so that they meet in the second-level cache, for W blocks of 128 query rows. Where
 * there are more than W such blocks the heads come again, once a round. All tiles of
 * all rounds are cut into as many equal stretches as there are gangs, or tiles. What a stretch
 * has of a head is final where it is all of the head's tiles; else it is one of two
 * partial results that a thread block can have (of a head that begins before its
 * stretch, and of one that ends after), which merge_parts puts together.
 * Grid: x the member of the gang, y the gang; at most one thread block a
 * multiprocessor.
 * Warpgroup 0 copies, warpgroups 1 and 2 hold 64 query rows each; where there are no more,
 * the second goes home. While a tile's weights are multiplied with its values the next
 * tile's logits are made and exponentiated.
 * Copies: one tensor copy for a group of 8 retained rows (8 D 2 bytes), straight
 * into the swizzled tile, so a gathered tile costs what a contiguous one does (one copy
 * for all of a contiguous tile is a little slower);
 * rows beyond the end and groups beyond the list come as zeros, never as what
 * happens to be in memory (0 times NaN).
 * TAIL: among a head's tiles are those of all clusters of a level, centroids as keys and
 * values; a product becomes the logit of what the cluster stands for. They lie evenly
 * among the others, because they take longer.
 * Shared memory: 2 * 64 * D * 2 bytes of queries + STAGES * 2 * BN * D * 2 of keys
 * and values + barriers and numbers: at D 128 224 KiB (BN 128, 3 stages), with a tail 168 (2).
 * Layout of a tile: [BN / 8 groups][D / 64][8 rows][128 bytes].
 * Head sizes: 64, 128, 256, not causal. The rest is block_attention.cu's.
 */
#include "block_attention.cuh"
#include "hopper.cuh"

namespace
{

enum {
    MOST_HEADS = 256 /* KV heads */,
    ROW_NUMBERS = 5 /* of a query row, for the tail */
};

template <int D, bool TAIL> struct tiles {
    static const int bn = D == 256 ? 64 : 128, stages = D == 256 || (TAIL && D == 128) ? 2 : 3;
    static const int tile_bytes = bn * D * 2, query_bytes = 64 * D * 2;
    static const int number_bytes = TAIL ? 3 * bn * (int)sizeof(float) : 0; /* of a tile's clusters */
    static const int number_places = 2 * stages; /* their logits are made when the keys' place may be free already */
    static const int row_bytes = TAIL ? 64 * ROW_NUMBERS * (int)sizeof(float) : 0; /* of a warpgroup */
    static const size_t shared_bytes = 1024 + 2 * query_bytes + (size_t)stages * 2 * tile_bytes +
                                       number_places * number_bytes + 2 * row_bytes + 4 * stages * sizeof(uint64_t);
    static_assert(shared_bytes + (MOST_HEADS + 2) * sizeof(uint32_t) <= 227 * 1024, "what a thread block can have");
};

/* How the work is shared out: W, rounds, gangs. */
struct gangs {
    uint32_t width, n_rounds, n_gangs;
};

struct hopper_args {
    sqz_block_attention_params p;
    gangs g;
    CUtensorMap keys, values, centroids, value_centroids; /* boxes of 8 rows */
};

/* prefix[h]: tiles of all heads before h, [K + 1] in shared memory; by one warp. */
template <int BN>
__device__ __forceinline__ void count_tiles(const sqz_block_attention_params &p, uint32_t n_heads, uint32_t *prefix)
{
    const uint32_t lane = threadIdx.x % 32;
    uint32_t before = 0;
    for (uint32_t base = 0; base < n_heads; base += 32) {
        uint32_t n_groups = 0, n_columns;
        if (base + lane < n_heads) sqz_block_count(p, base + lane, &n_groups, &n_columns);
        uint32_t inclusive = (n_groups + BN / 8 - 1) / (BN / 8);
        if (p.tail.centroids && base + lane < n_heads) inclusive += (p.tail.n_clusters + BN - 1) / BN;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const uint32_t x = __shfl_up_sync(~0u, inclusive, step);
            if (lane >= step) inclusive += x;
        }
        if (base + lane < n_heads) prefix[base + lane + 1] = before + inclusive;
        before += __shfl_sync(~0u, inclusive, 31);
    }
    if (lane == 0) prefix[0] = 0;
}

/* Gangs that have work: of more, some stretches between two others would be empty. */
__device__ __forceinline__ uint64_t busy_gangs(const gangs &g, uint64_t all_tiles)
{
    return min((uint64_t)g.n_gangs, all_tiles);
}

#ifdef SQZ_HOPPER_CODE
/* A gang's stretch, one head after the other. */
struct stretch {
    const uint32_t *prefix;
    uint64_t at, end;
    uint32_t n_heads, round, head, first, last; /* tiles [first, last) of the head */
    bool begins, ends;                          /* with the head's first tile, with its last */

    __device__ __forceinline__ stretch(const gangs &g, const uint32_t *prefix, uint32_t n_heads, uint32_t gang)
        : prefix(prefix), n_heads(n_heads)
    {
        const uint64_t all = (uint64_t)prefix[n_heads] * g.n_rounds, n = busy_gangs(g, all);
        at = gang < n ? all * gang / n : 0;
        end = gang < n ? all * (gang + 1) / n : 0;
    }
    __device__ __forceinline__ bool next()
    {
        if (at >= end) return false;
        const uint32_t each = prefix[n_heads], place = (uint32_t)(at % each);
        round = (uint32_t)(at / each);
        head = sqz_place_of(prefix, n_heads, place);
        const uint64_t stop = min(end, at + (prefix[head + 1] - place));
        first = place - prefix[head];
        last = first + (uint32_t)(stop - at);
        begins = first == 0;
        ends = last == prefix[head + 1] - prefix[head];
        at = stop;
        return true;
    }
};
#endif

/* Partial result of thread block (gang, member): 1 of the head that begins in its stretch, 0 of the one before. */
__device__ __forceinline__ size_t part_of(const gangs &g, uint32_t gang, uint32_t member, bool begins)
{
    return ((size_t)gang * g.width + member) * 2 + begins;
}

#ifdef SQZ_HOPPER_CODE

/* Queries of a warpgroup as operands: in registers, which leaves the shared memory's bandwidth to keys and values, or, for
 * the largest heads, where they are. */
template <class Type, int D, bool REGISTERS> struct query_operand;

template <class Type, int D> struct query_operand<Type, D, true> {
    uint32_t a[D / 16][4];
    __device__ __forceinline__ void load(const char *queries)
    {
        const int lane = threadIdx.x % 32, r = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            const int chunk = 2 * k + lane / 16;
            sqz_fragments(a[k], sqz_shared(queries) + chunk / 8 * 8192 + r * 128 + ((chunk ^ r) & 7) * 16);
        }
    }
    template <int BN> __device__ __forceinline__ void product(float (&s)[BN / 2], uint64_t b, int k) const
    {
        sqz_wgmma_rs_rows<Type, BN>(s, a[k][0], a[k][1], a[k][2], a[k][3], b, k > 0);
    }
};

template <class Type, int D> struct query_operand<Type, D, false> {
    const char *queries;
    __device__ __forceinline__ void load(const char *from)
    {
        queries = from;
    }
    template <int BN> __device__ __forceinline__ void product(float (&s)[BN / 2], uint64_t b, int k) const
    {
        sqz_wgmma_ss<Type, BN>(s, sqz_operand(queries + (k / 4) * 8192 + (k % 4) * 32, 16, 1024), b, k > 0);
    }
};

template <class Type, int D, int BN, class Queries>
__device__ __forceinline__ void logits(float (&s)[BN / 2], const Queries &queries, const char *keys)
{
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        queries.template product<BN>(s, sqz_operand(keys + (k / 4) * 1024 + (k % 4) * 32, 16, 8 * D * 2), k);
}

template <class Type, int D, int BN>
__device__ __forceinline__ void weigh(float (&o)[D / 2], const uint32_t (&w)[BN / 4], const char *values)
{
#pragma unroll
    for (int k = 0; k < BN / 16; k++) {
        const uint64_t b = sqz_operand(values + k * 2 * 8 * D * 2, 1024, 8 * D * 2);
        sqz_wgmma_rs<Type, D>(o, w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3], b, 1);
    }
}

/* A tile of keys or values, whose place is free, by one warp: a lane a group, group `from` of the head. */
template <int D>
__device__ __forceinline__ void copy_tile(char *to, const CUtensorMap *map, uint32_t from, uint32_t head,
                                          uint64_t *full)
{
    const uint32_t lane = threadIdx.x % 32;
    if (lane < tiles<D, false>::bn / 8) sqz_copy_rows(to + lane * 8 * D * 2, map, (int)from * 8, (int)head, full);
}

/* What tile i of a head's n is where n_tail of them are of clusters: which of those, or of the others. */
struct tile_kind {
    bool of_tail;
    uint32_t index;
};
__device__ __forceinline__ tile_kind kind_of(uint32_t i, uint32_t n, uint32_t n_tail)
{
    const uint32_t before = (uint32_t)((uint64_t)i * n_tail / n), to_here = (uint32_t)((uint64_t)(i + 1) * n_tail / n);
    return {to_here > before, to_here > before ? before : i - before};
}

/* Numbers of a query row, [ROW_NUMBERS][64], for the tail: |q|^2, what INT8 centroids add, g, log Z, and the least that
 * counts, base 2. */
__device__ __forceinline__ void number_row(float *to, const sqz_block_attention_params &p, uint32_t head, uint32_t row)
{
    const sqz_cuda_block_tail &tail = p.tail;
    const uint32_t mine = min(row, p.n_query_rows - 1);
    const size_t at = (size_t)head * p.n_query_rows + mine,
                 pair = (size_t)(mine / p.group) * tail.token_stride + head;
    const float gain = tail.gain[pair], total = tail.log_total[sqz_block_row(p, head, mine)] * SQZ_LOG2E;
    const float least = total + log2f(tail.skip) + tail.log_threshold[pair] * SQZ_LOG2E;
    to[0] = tail.norm[at];
    to[64] = tail.shift ? tail.shift[at] : 0.0f;
    to[128] = gain * SQZ_LOG2E;
    to[192] = total;
    to[256] = sqz_tail_is_off(gain) ? INFINITY : least;
}

/* Products of clusters to unscaled logits of what they stand for. of_rows: number_row() of the thread's first row and 8
 * further; of_clusters: [3][BN] as the copies bring them, shared. */
template <int BN>
__device__ __forceinline__ void tail_logits(float (&s)[BN / 2], const sqz_block_attention_params &p,
                                            const float *of_rows, uint32_t of_clusters)
{
    static_assert(BN <= 128, "a bit a column of a thread");
    uint32_t counts[2] = {0, 0}; /* columns whose weights do */
    const bool scaled = p.tail.factor != NULL;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float norm = of_rows[8 * r], shift = of_rows[64 + 8 * r], gain = of_rows[128 + 8 * r],
                    total = of_rows[192 + 8 * r], least = of_rows[256 + 8 * r];
#pragma unroll
        for (int j = 0; j < BN / 8; j++) {
            const uint32_t at = of_clusters + (8 * j + 2 * (threadIdx.x % 4)) * (uint32_t)sizeof(float);
            const float2 left = sqz_load_shared8(at), spread = sqz_load_shared8(at + BN * 4);
            float2 factor = make_float2(p.scale_log2, p.scale_log2);
            if (scaled) factor = sqz_load_shared8(at + BN * 8);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float &x = s[4 * j + 2 * r + i];
                x = fmaf(x, i ? factor.y : factor.x, shift);
                x = sqz_tail_bound(sqz_tail_logit(x, norm, i ? spread.y : spread.x, gain), total);
                x += i ? left.y : left.x;
                counts[r] |= (uint32_t)(x >= least) << (2 * j + i);
            }
        }
        for (uint32_t step = 4; step < 4 * p.group; step *= 2) counts[r] |= __shfl_xor_sync(~0u, counts[r], step);
    }
    const float inverse = 1.0f / p.scale_log2;
#pragma unroll
    for (int i = 0; i < BN / 2; i++) s[i] = counts[i / 2 % 2] >> (2 * (i / 4) + i % 2) & 1 ? s[i] * inverse : -INFINITY;
}

template <class Type, int BN> __device__ __forceinline__ void pack(uint32_t (&w)[BN / 4], const float (&s)[BN / 2])
{
#pragma unroll
    for (int i = 0; i < BN / 4; i++) w[i] = Type::pack(s[2 * i], s[2 * i + 1]);
}

#endif

template <class Type, int D, bool TAIL>
__global__ void __launch_bounds__(384, 1) attend_block_hopper(const __grid_constant__ hopper_args args)
{
#ifdef SQZ_HOPPER_CODE
    typedef tiles<D, TAIL> L;
    constexpr int BN = L::bn, STAGES = L::stages;
    extern __shared__ char raw[];
    char *const shared = (char *)(((uintptr_t)raw + 1023) & ~(uintptr_t)1023);
    char *const keys = shared + 2 * L::query_bytes, *const values = keys + STAGES * L::tile_bytes,
               *const of_clusters = values + STAGES * L::tile_bytes,
               *const of_rows = of_clusters + L::number_places * L::number_bytes;
    uint64_t *const key_full = (uint64_t *)(of_rows + 2 * L::row_bytes), *const value_full = key_full + STAGES,
                    *const key_free = value_full + STAGES, *const value_free = key_free + STAGES;
    __shared__ uint32_t prefix[MOST_HEADS + 1];
    const sqz_block_attention_params &p = args.p;
    const uint32_t n_heads = p.n_head / p.group, member = blockIdx.x, gang = blockIdx.y;
    const uint32_t n_tail = TAIL ? (p.tail.n_clusters + BN - 1) / BN : 0; /* tiles of a head */
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0); /* known to be the same for all of a warp */
    const bool alone = p.n_query_rows <= SQZ_BLOCK_QUERY_ROWS / 2; /* warpgroup 1 has all rows */
    sqz_let_next_start();
    if (threadIdx.x == 0) {
        sqz_prefetch_map(&args.keys);
        sqz_prefetch_map(&args.values);
        if (TAIL) sqz_prefetch_map(&args.centroids);
        if (TAIL) sqz_prefetch_map(&args.value_centroids);
    }
    sqz_wait_for_previous();
    sqz_block_clear_arrived<384>(p);
    if (threadIdx.x < 32) count_tiles<BN>(p, n_heads, prefix);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            sqz_barrier_init(key_full + i, 1);
            sqz_barrier_init(value_full + i, 1);
            sqz_barrier_init(key_free + i, alone ? 128 : 256);
            sqz_barrier_init(value_free + i, alone ? 128 : 256);
        }
        sqz_barrier_init_done();
    }
    __syncthreads();
    if (warpgroup == 0) {
        sqz_registers_less<40>();
        if (threadIdx.x < 32) {
            const uint32_t lane = threadIdx.x, beyond = (p.n_rows + 7) / 8;
            int stage = 0, place = 0;
            uint32_t parity = 1;
            for (stretch work(args.g, prefix, n_heads, gang); work.next();) {
                const uint32_t head = work.head;
                const uint32_t *const list = p.groups ? p.groups + (size_t)head * p.group_capacity : NULL;
                const uint32_t n_groups = p.groups ? p.n_groups[head] : beyond;
                for (uint32_t tile = work.first; tile < work.last; tile++) {
                    tile_kind kind = {false, tile};
                    if (TAIL) kind = kind_of(tile, prefix[head + 1] - prefix[head], n_tail);
                    const bool of_tail = TAIL && kind.of_tail;
                    const uint32_t g = kind.index * (BN / 8) + lane, n_numbers = p.tail.factor ? 3 : 2;
                    uint32_t from = of_tail ? g : beyond;
                    if (!of_tail && lane < BN / 8 && g < n_groups) from = list ? list[g] : g;
                    sqz_barrier_wait(key_free + stage, parity);
                    if (lane == 0)
                        sqz_barrier_expect(key_full + stage, L::tile_bytes + (of_tail ? n_numbers * BN * 4 : 0));
                    __syncwarp();
                    copy_tile<D>(keys + stage * L::tile_bytes, of_tail ? &args.centroids : &args.keys, from, head,
                                 key_full + stage);
                    if (of_tail && lane < n_numbers) {
                        const float *const source = lane == 0 ? p.tail.left : lane == 1 ? p.tail.spread : p.tail.factor;
                        sqz_copy_bytes(of_clusters + place * L::number_bytes + lane * BN * 4,
                                       source + (size_t)head * p.tail.stride + kind.index * BN, BN * 4,
                                       key_full + stage);
                    }
                    if (++place == L::number_places) place = 0;
                    sqz_barrier_wait(value_free + stage, parity);
                    if (lane == 0) sqz_barrier_expect(value_full + stage, L::tile_bytes);
                    __syncwarp();
                    copy_tile<D>(values + stage * L::tile_bytes, of_tail ? &args.value_centroids : &args.values, from,
                                 head, value_full + stage);
                    if (++stage == STAGES) {
                        stage = 0;
                        parity ^= 1;
                    }
                }
            }
        }
    } else if (warpgroup == 1 || !alone) {
        sqz_registers_more<232>();
        const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, half = warpgroup - 1;
        char *const queries = shared + half * L::query_bytes;
        uint32_t before = 0; /* tiles of the stretch before this head's */
        for (stretch work(args.g, prefix, n_heads, gang); work.next();) {
            const uint32_t head = work.head;
            const uint32_t row0 = (work.round * args.g.width + member) * SQZ_BLOCK_QUERY_ROWS + half * 64;
            uint32_t n_groups, n_columns;
            sqz_block_count(p, head, &n_groups, &n_columns);
            asm volatile("bar.sync %0, 128;" ::"r"(warpgroup) : "memory"); /* nobody's products need the old queries */
            for (int i = thread; i < 64 * D / 8; i += 128) {
                const int r = i / (D / 8), c = i % (D / 8);
                uint4 x = make_uint4(0, 0, 0, 0);
                if (row0 + r < p.n_query_rows)
                    x = *(const uint4 *)((const char *)p.queries + (sqz_block_row(p, head, row0 + r) * D + c * 8) * 2);
                *(uint4 *)(queries + (c / 8) * 8192 + r * 128 + ((c % 8) ^ (r % 8)) * 16) = x;
            }
            float *const row_numbers = (float *)(of_rows + half * L::row_bytes);
            if (TAIL && thread < 64) number_row(row_numbers + thread, p, head, row0 + thread);
            sqz_stores_to_async();
            asm volatile("bar.sync %0, 128;" ::"r"(warpgroup) : "memory");
            query_operand<Type, D, (D <= 128)> operand; /* [D / 64][64 rows][128 bytes] */
            operand.load(queries);

            float s[BN / 2], o[D / 2], factor[2];
            uint32_t w[BN / 4];
            sqz_block_rows rows;
            rows.reset();
#pragma unroll
            for (int i = 0; i < D / 2; i++) o[i] = 0.0f;
            const uint32_t row = row0 + thread / 32 * 16 + lane / 4; /* the thread's first */
            auto soften = [&](uint32_t tile) {
                tile_kind kind = {false, tile};
                if (TAIL) kind = kind_of(tile, prefix[head + 1] - prefix[head], n_tail);
                if (TAIL && kind.of_tail)
                    tail_logits<BN>(s, p, row_numbers + row - row0,
                                    sqz_shared(of_clusters) +
                                        (before + tile - work.first) % L::number_places * L::number_bytes);
                const uint32_t end = TAIL && kind.of_tail ? p.tail.n_clusters : n_columns;
                const int n = (int)min((uint32_t)BN, end - kind.index * BN);
                return rows.soften<BN>(s, factor, p.scale_log2, n, n);
            };
            /* Places of the head's tile i, and how often they have been used before. */
            auto stage_of = [&](uint32_t i) { return (before + i - work.first) % STAGES; };
            auto parity_of = [&](uint32_t i) { return (before + i - work.first) / STAGES & 1; };
            uint32_t tile = work.first;
            sqz_barrier_wait(key_full + stage_of(tile), parity_of(tile));
            sqz_hold(s);
            sqz_wgmma_begin();
            logits<Type, D, BN>(s, operand, keys + stage_of(tile) * L::tile_bytes);
            sqz_wgmma_commit();
            sqz_wgmma_wait<0>();
            sqz_hold(s);
            sqz_barrier_arrive(key_free + stage_of(tile));
            soften(tile);
            pack<Type, BN>(w, s);
            for (; tile + 1 < work.last; tile++) {
                const uint32_t next = tile + 1;
                sqz_barrier_wait(key_full + stage_of(next), parity_of(next));
                sqz_hold(s);
                sqz_hold(o);
                sqz_wgmma_begin();
                logits<Type, D, BN>(s, operand, keys + stage_of(next) * L::tile_bytes);
                sqz_wgmma_commit();
                sqz_barrier_wait(value_full + stage_of(tile), parity_of(tile));
                weigh<Type, D, BN>(o, w, values + stage_of(tile) * L::tile_bytes);
                sqz_wgmma_commit();
                sqz_wgmma_wait<1>();
                sqz_hold(s);
                sqz_barrier_arrive(key_free + stage_of(next));
                const bool raised = soften(next);
                sqz_wgmma_wait<0>();
                sqz_hold(o);
                sqz_barrier_arrive(value_free + stage_of(tile));
                pack<Type, BN>(w, s);
                if (raised) {
#pragma unroll
                    for (int i = 0; i < D / 2; i++) o[i] *= factor[i / 2 % 2];
                }
            }
            sqz_barrier_wait(value_full + stage_of(tile), parity_of(tile));
            sqz_hold(o);
            sqz_wgmma_begin();
            weigh<Type, D, BN>(o, w, values + stage_of(tile) * L::tile_bytes);
            sqz_wgmma_commit();
            sqz_wgmma_wait<0>();
            sqz_hold(o);
            sqz_barrier_arrive(value_free + stage_of(tile));
            before += work.last - work.first;

            const bool whole = work.begins && work.ends;
            const size_t part = part_of(args.g, gang, member, work.begins) * SQZ_BLOCK_QUERY_ROWS;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float l = rows.sum[r];
                l += __shfl_xor_sync(~0u, l, 1);
                l += __shfl_xor_sync(~0u, l, 2);
                const uint32_t mine = row + 8 * r;
                if (mine >= p.n_query_rows) continue;
                const size_t at = sqz_block_row(p, head, mine), place = part + mine % SQZ_BLOCK_QUERY_ROWS;
                const float inverse = l > 0 ? 1.0f / l : 0.0f;
                const float lse = l > 0 ? rows.maximum[r] * p.scale_log2 + log2f(l) : -INFINITY;
                if (p.out) {
#pragma unroll
                    for (int j = 0; j < D / 8; j++) {
                        const uint32_t column = 8 * j + 2 * (lane % 4);
                        const float a = o[4 * j + 2 * r] * inverse, b = o[4 * j + 2 * r + 1] * inverse;
                        if (whole) sqz_block_store<Type>(p, at, D, column, a, b);
                        else *(float2 *)(p.part_out + place * D + column) = make_float2(a, b);
                    }
                }
                if (lane % 4) continue;
                if (!whole) p.part_lse[place] = lse;
                else sqz_block_store_lse(p, at, lse);
            }
        }
    }
#endif
}

enum { MERGE_THREADS = 256, TOGETHER = 8 /* parts that are asked for at once */ };

struct merge_args {
    sqz_block_attention_params p;
    gangs g;
};

/* Rows whose head was cut, or is empty, a warp each. Grid: (block of query rows, head, part of its rows). */
template <class Type, int D> __global__ void __launch_bounds__(MERGE_THREADS) merge_parts(const merge_args args)
{
    constexpr int BN = tiles<D, false>::bn, PAIRS = D / 64; /* of columns, of a lane */
    __shared__ uint32_t prefix[SQZ_BLOCK_MAX_HEADS + 1];
    const sqz_block_attention_params &p = args.p;
    const gangs &g = args.g;
    const uint32_t n_heads = p.n_head / p.group, head = blockIdx.y;
    sqz_let_next_start();
    sqz_wait_for_previous();
    if (threadIdx.x < 32) count_tiles<BN>(p, n_heads, prefix);
    __syncthreads();
    const uint32_t each = prefix[n_heads], n_tiles = prefix[head + 1] - prefix[head];
    const uint32_t round = blockIdx.x / g.width, member = blockIdx.x % g.width;
    const uint64_t all = (uint64_t)each * g.n_rounds, begin = (uint64_t)each * round + prefix[head];
    uint32_t first = 0, n_parts = 0; /* gangs */
    if (n_tiles) {
        const uint64_t n = busy_gangs(g, all);
        first = (uint32_t)(((begin + 1) * n - 1) / all);
        n_parts = (uint32_t)(((begin + n_tiles) * n - 1) / all) - first + 1;
        if (n_parts == 1) return;
    }
    const uint32_t lane = threadIdx.x % 32, rows = SQZ_BLOCK_QUERY_ROWS / gridDim.z;
    for (uint32_t i = threadIdx.x / 32; i < rows; i += MERGE_THREADS / 32) {
        const uint32_t in_block = blockIdx.z * rows + i, row = blockIdx.x * SQZ_BLOCK_QUERY_ROWS + in_block;
        if (row >= p.n_query_rows) return;
        auto place = [&](uint32_t part) {
            return part_of(g, first + part, member, part == 0) * SQZ_BLOCK_QUERY_ROWS + in_block;
        };
        float maximum = -INFINITY, sum = 0.0f;
        for (uint32_t part = lane; part < n_parts; part += 32) maximum = fmaxf(maximum, p.part_lse[place(part)]);
#pragma unroll
        for (int step = 16; step; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
        for (uint32_t part = lane; maximum > -INFINITY && part < n_parts; part += 32)
            sum += sqz_exp2(p.part_lse[place(part)] - maximum);
#pragma unroll
        for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        const size_t at = sqz_block_row(p, head, row);
        if (lane == 0) sqz_block_store_lse(p, at, sum > 0 ? maximum + log2f(sum) : -INFINITY);
        if (!p.out) continue;
        float2 out[PAIRS];
#pragma unroll
        for (int j = 0; j < PAIRS; j++) out[j] = make_float2(0, 0);
        for (uint32_t base = 0; sum > 0 && base < n_parts; base += 32) {
            const float mine = base + lane < n_parts ? sqz_exp2(p.part_lse[place(base + lane)] - maximum) / sum : 0.0f;
            const uint32_t n = min(32u, n_parts - base);
            for (uint32_t part = 0; part < n; part += TOGETHER) {
                float2 x[TOGETHER][PAIRS];
#pragma unroll
                for (int i = 0; i < TOGETHER; i++) {
                    const float *from = p.part_out + place(base + min(part + i, n - 1)) * D + 2 * lane;
#pragma unroll
                    for (int j = 0; j < PAIRS; j++) x[i][j] = *(const float2 *)(from + 64 * j);
                }
#pragma unroll
                for (int i = 0; i < TOGETHER; i++) {
                    const float w = __shfl_sync(~0u, mine, part + i) * (float)(part + i < n);
#pragma unroll
                    for (int j = 0; j < PAIRS; j++) {
                        out[j].x += w * x[i][j].x;
                        out[j].y += w * x[i][j].y;
                    }
                }
            }
        }
#pragma unroll
        for (int j = 0; j < PAIRS; j++) sqz_block_store<Type>(p, at, D, 64 * j + 2 * lane, out[j].x, out[j].y);
    }
}

/* The gangs that leave the fewest multiprocessors idle, the widest of those: on the shape and the device alone, so that
 * workspace and launch agree. */
gangs gangs_of(uint64_t n_query_rows)
{
    const int n = sqz_device_get().n_multiprocessors;
    const uint32_t sm = n > 0 ? (uint32_t)n : 132;
    const uint64_t n_blocks = (n_query_rows + SQZ_BLOCK_QUERY_ROWS - 1) / SQZ_BLOCK_QUERY_ROWS;
    gangs best = {1, (uint32_t)n_blocks, sm};
    double best_share = 0;
    for (uint32_t width = 1; width <= sm && width <= n_blocks; width++) {
        const uint32_t rounds = (uint32_t)((n_blocks + width - 1) / width), count = sm / width;
        const double share = (double)count * (double)n_blocks / ((double)rounds * sm);
        if (share >= best_share * 0.98) {
            best = {width, rounds, count};
            if (share > best_share) best_share = share;
        }
    }
    return best;
}

size_t part_bytes(const gangs &g, uint32_t head_dim)
{
    return (size_t)g.width * g.n_gangs * 2 * SQZ_BLOCK_QUERY_ROWS * head_dim * sizeof(float);
}

template <class Type, int D, bool TAIL>
enum sqz_status launch(const sqz_block_attention_params &p, const gangs &g, enum sqz_row_type type, bool after_ours,
                       void *stream)
{
    if (!sqz_hopper_kernel((const void *)attend_block_hopper<Type, D, TAIL>)) return SQZ_ERROR_UNSUPPORTED;
    hopper_args args;
    args.p = p;
    args.g = g;
    const uint32_t n_head_kv = p.n_head / p.group, c = p.tail.n_clusters;
    if (n_head_kv > MOST_HEADS || !sqz_tensor_map(&args.keys, type, p.keys, n_head_kv, p.head_rows, p.n_rows, D, 8) ||
        !sqz_tensor_map(&args.values, type, p.values, n_head_kv, p.head_rows, p.n_rows, D, 8))
        return SQZ_ERROR_UNSUPPORTED;
    if (TAIL && (!sqz_tensor_map(&args.centroids, type, p.tail.centroids, n_head_kv, c, c, D, 8) ||
                 !sqz_tensor_map(&args.value_centroids, type, p.tail.value_centroids, n_head_kv, c, c, D, 8)))
        return SQZ_ERROR_UNSUPPORTED;
    const enum sqz_status status = sqz_launch(attend_block_hopper<Type, D, TAIL>, dim3(g.width, g.n_gangs), 384,
                                              tiles<D, TAIL>::shared_bytes, 1, after_ours, args, stream);
    if (status != SQZ_OK) return status;
    const merge_args merge = {p, g};
    const uint32_t n_blocks = (p.n_query_rows + SQZ_BLOCK_QUERY_ROWS - 1) / SQZ_BLOCK_QUERY_ROWS;
    uint32_t parts = 1; /* of a block's rows: a few thread blocks for every multiprocessor */
    while (parts < 16 && (uint64_t)n_blocks * n_head_kv * parts < 512) parts *= 2;
    return sqz_launch(merge_parts<Type, D>, dim3(n_blocks, n_head_kv, parts), MERGE_THREADS, 0, 1, true, merge, stream);
}

template <class Type, int D>
enum sqz_status launch_any(const sqz_block_attention_params &p, const gangs &g, enum sqz_row_type type, bool after_ours,
                           void *stream)
{
    if (!p.tail.centroids) return launch<Type, D, false>(p, g, type, after_ours, stream);
    if (D > 128) return SQZ_ERROR_UNSUPPORTED;
    return launch<Type, D <= 128 ? D : 128, true>(p, g, type, after_ours, stream);
}

} // namespace

bool sqz_block_attention_hopper_has(uint32_t head_dim, bool causal)
{
    return !causal && (head_dim == 64 || head_dim == 128 || head_dim == 256);
}

extern "C" bool sqz_cuda_block_attention_has_tail(uint32_t head_dim, uint32_t group)
{
    return (head_dim == 64 || head_dim == 128) && (group == 1 || group == 2 || group == 4 || group == 8) &&
           sqz_hopper_kernel((const void *)attend_block_hopper<sqz_f16, 128, true>);
}

size_t sqz_block_attention_hopper_bytes(const struct sqz_cuda_block_attention *a)
{
    if (!sqz_block_attention_hopper_has(a->head_dim, a->causal)) return 0;
    const gangs g = gangs_of((uint64_t)a->n_tokens * (a->n_head / a->n_head_kv));
    return part_bytes(g, a->head_dim) + part_bytes(g, 1);
}

enum sqz_status sqz_block_attention_hopper(const sqz_block_attention_params &params, enum sqz_row_type type,
                                           uint32_t head_dim, void *workspace, size_t workspace_bytes, bool after_ours,
                                           void *stream)
{
    const bool f16 = type == SQZ_ROW_F16;
    const gangs g = gangs_of(params.n_query_rows);
    sqz_block_attention_params p = params;
    if (workspace_bytes < part_bytes(g, head_dim) + part_bytes(g, 1)) return SQZ_ERROR_ARGUMENT;
    p.part_out = (float *)workspace;
    p.part_lse = (float *)((char *)workspace + part_bytes(g, head_dim));
    switch (head_dim) {
    case 64:
        return f16 ? launch_any<sqz_f16, 64>(p, g, type, after_ours, stream)
                   : launch_any<sqz_bf16, 64>(p, g, type, after_ours, stream);
    case 128:
        return f16 ? launch_any<sqz_f16, 128>(p, g, type, after_ours, stream)
                   : launch_any<sqz_bf16, 128>(p, g, type, after_ours, stream);
    case 256:
        return f16 ? launch_any<sqz_f16, 256>(p, g, type, after_ours, stream)
                   : launch_any<sqz_bf16, 256>(p, g, type, after_ours, stream);
    }
    return SQZ_ERROR_UNSUPPORTED;
}
