/*
 * Products of few tokens, where one multiprocessor cannot hold what all inputs of the tokens are: 64 tokens of 4,096
 * numbers are half a megabyte, which every multiprocessor would read for a few rows of weights each.
 *
 * A block has rows of so many warps, two tiles each, and a share of the inputs; the blocks of a cluster have the same
 * rows and all inputs among them, and add up through each other's shared memory. Weights, which every warp brings for
 * itself, and tokens, which all read, come to shared memory chunk by chunk; weights of the first chunks before the
 * kernel in front has ended.
 */
#include "projections_split.h"

#include <atomic>

#include "block_cluster.cuh"
#include "hopper.cuh"

namespace
{

using namespace sqz_few;

enum {
    MT = 2, /* tiles of a warp: of a gate and of what it gates, where gated */
    MOST_WARPS = 8,
    MOST_BLOCKS = 8, /* of a cluster */
    MOST_STAGES = 4,
};

/* A chunk in shared memory: weights of each warp, tokens' numbers, their sums. */
template <class Type, int NT> struct stage {
    enum {
        PLACES = NT * GROUP,
        ROWS = MT * TILE * Type::PITCH, /* of a warp */
        NUMBERS = PARTS * PLACES * 4 * (int)sizeof(uint4),
        SUMS = PLACES * 16 * Type::HALVES * (int)sizeof(__half),
        MOST_BYTES = MOST_WARPS * ROWS + NUMBERS + SUMS,
        FITTING = MOST_SHARED / MOST_BYTES,
        STAGES = FITTING < MOST_STAGES ? FITTING : MOST_STAGES
    };
};

struct split_args {
    project_args p;
    uint32_t n_pairs; /* of tiles */
};

/* What a block's threads bring, chunk by chunk. */
template <class Type, int NT> struct supply {
    typedef stage<Type, NT> Stage;
    enum {
        SEGMENTS = (Type::BYTES + 15) / 16,
        PIECES = MT * TILE * SEGMENTS,
        COPIES = (PIECES + SQZ_WARP - 1) / SQZ_WARP /* of a lane */
    };
    uint8_t *base;
    uint32_t first, n, stage_bytes; /* chunks */
    uint32_t row_bytes;             /* below 2^24 */
    const uint8_t *tiles[MT];

    __device__ __forceinline__ uint8_t *stage_of(uint32_t i) const
    {
        return base + i % Stage::STAGES * stage_bytes;
    }
    __device__ __forceinline__ uint8_t *rows_of(uint32_t i) const
    {
        return stage_of(i) + threadIdx.x / SQZ_WARP * Stage::ROWS;
    }
    __device__ __forceinline__ uint8_t *tokens_of(uint32_t i) const
    {
        return stage_of(i) + blockDim.x / SQZ_WARP * Stage::ROWS;
    }
    /* Where a row's part of a chunk lies behind the last multiple of 16 bytes. */
    __device__ __forceinline__ uint32_t shift_of(uint32_t i) const
    {
        return (first + i) * Type::BYTES & 15;
    }
    __device__ __forceinline__ const uint8_t *row_at(uint32_t row, uint32_t i) const
    {
        const uint32_t at = (first + i) * Type::BYTES & ~15u;
        return (row < TILE ? tiles[0] : tiles[1]) + (row % TILE * row_bytes + at);
    }
    __device__ __forceinline__ void fetch_weights(uint32_t i)
    {
        if (i >= n) return;
        uint8_t *const to = rows_of(i);
#pragma unroll
        for (int c = 0; c < COPIES; c++) {
            const uint32_t piece = threadIdx.x % SQZ_WARP + c * SQZ_WARP, row = piece / SEGMENTS;
            const uint32_t at = piece % SEGMENTS * 16;
            if (piece < PIECES) sqz_copy_16(to + row * Type::PITCH + at, row_at(row, i) + at);
        }
    }
    __device__ __forceinline__ void fetch_tokens(const places &x, uint32_t i)
    {
        if (i >= n) return;
        const uint8_t *const numbers = (const uint8_t *)x.numbers + (size_t)(first + i) * Stage::NUMBERS;
        const uint8_t *const sums = (const uint8_t *)x.sums + (size_t)(first + i) * Stage::SUMS;
        uint8_t *const to = tokens_of(i);
#pragma unroll 4
        for (uint32_t at = threadIdx.x * 16; at < Stage::NUMBERS; at += blockDim.x * 16)
            sqz_copy_16(to + at, numbers + at);
        for (uint32_t at = threadIdx.x * 16; at < Stage::SUMS; at += blockDim.x * 16)
            sqz_copy_16(to + Stage::NUMBERS + at, sums + at);
    }
};

#ifdef SQZ_HOPPER_CODE

/* d = 64 rows, four warps' tiles, by the groups' numbers, 16 inputs (+ d where add). */
template <int NT>
__device__ __forceinline__ void multiply_rows(float (&d)[NT * 4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                              uint64_t b, int add);
#define MULTIPLY_ROWS(NT, N, D, A, B, ADD, ...)                                                                        \
    template <>                                                                                                        \
    __device__ __forceinline__ void multiply_rows<NT>(float(&d)[NT * 4], uint32_t a0, uint32_t a1, uint32_t a2,        \
                                                      uint32_t a3, uint64_t b, int add)                                \
    {                                                                                                                  \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " ADD ", 0;\n\t"                                            \
                     "wgmma.mma_async.sync.aligned.m64n" N "k16.f32.f16.f16 {" D "}, {" A "}, " B ", p, 1, 1, 0;\n\t}" \
                     : __VA_ARGS__                                                                                     \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(add));                                          \
    }
MULTIPLY_ROWS(4, "32", "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "%16, %17, %18, %19",
              "%20", "%21", SQZ_WGMMA_8(0), SQZ_WGMMA_8(8))
MULTIPLY_ROWS(8, "64", SQZ_WGMMA_NAMES_64, "%32, %33, %34, %35", "%36", "%37", SQZ_WGMMA_32(0))

/* 16 columns of the part's numbers, from word `word` on, for wgmma: unlike sqz_operand() not exchanged. */
__device__ __forceinline__ uint64_t numbers_at(const uint8_t *part, int word)
{
    const uint32_t words = SQZ_WARP * 4, group = 4 * words; /* bytes between eight inputs and the next; groups */
    return (uint64_t)((sqz_shared(part + word * words) & 0x3ffff) >> 4) | (uint64_t)(words >> 4) << 16 |
           (uint64_t)(group >> 4) << 32;
}

template <int NT>
__device__ __forceinline__ void scale_up(float (&sums)[NT][4], const float (&d)[NT * 4], float low, float high)
{
#pragma unroll
    for (int j = 0; j < NT; j++) {
        const float c[4] = {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]};
        add_scaled(sums[j], c, low, high);
    }
}

/* Of step u, a part or, where halves have factors of their own, half a part: begins tile m's product. */
template <class Type, int NT>
__device__ __forceinline__ void begin_step(float (&d)[NT * 4], const pair_of_parts &low, const pair_of_parts &high,
                                           int u, const uint8_t *tokens)
{
    const int part = u / Type::HALVES, h = u % Type::HALVES;
    const uint8_t *const numbers = tokens + part * NT * 4 * SQZ_WARP * 4;
    const uint4 a = low.codes[part % 2], b = high.codes[part % 2];
    sqz_hold(d);
    sqz_wgmma_begin();
    if (h == 0) multiply_rows<NT>(d, a.x, b.x, a.y, b.y, numbers_at(numbers, 0), 0);
    if (h + 1 == Type::HALVES) multiply_rows<NT>(d, a.z, b.z, a.w, b.w, numbers_at(numbers, 2), Type::HALVES == 1);
    sqz_wgmma_commit();
}

/* All codes of a chunk: one tile's product is under way while the other's results are scaled, and the next pair of
 * parts comes from shared memory meanwhile. */
template <class Type, int NT>
__device__ __forceinline__ void multiply_codes(float (&sums)[MT][NT][4], const uint8_t *row, const uint8_t *tokens)
{
    enum { STEPS = PARTS * Type::HALVES, OF_PAIR = 2 * Type::HALVES };
    const int t = threadIdx.x % 4;
    float d[MT][NT * 4];
    pair_of_parts low[2][MT], high[2][MT];
#pragma unroll
    for (int m = 0; m < MT; m++) {
        low[0][m] = Type::pair(row + m * TILE * Type::PITCH, 0, t);
        high[0][m] = Type::pair(row + (m * TILE + 8) * Type::PITCH, 0, t);
    }
#pragma unroll
    for (int m = 0; m < MT; m++) begin_step<Type, NT>(d[m], low[0][m], high[0][m], 0, tokens);
#pragma unroll
    for (int u = 0; u < STEPS; u++) {
        const int p = u / OF_PAIR, part = u / Type::HALVES, h = u % Type::HALVES, next = (u + 1) / OF_PAIR % 2;
        if ((u + 1) % OF_PAIR == 0 && u + 1 < STEPS)
#pragma unroll
            for (int m = 0; m < MT; m++) {
                low[next][m] = Type::pair(row + m * TILE * Type::PITCH, p + 1, t);
                high[next][m] = Type::pair(row + (m * TILE + 8) * Type::PITCH, p + 1, t);
            }
#pragma unroll
        for (int m = 0; m < MT; m++) {
            if (u + 1 < STEPS || m + 1 < MT) sqz_wgmma_wait<1>();
            else sqz_wgmma_wait<0>();
            sqz_hold(d[m]);
            scale_up<NT>(sums[m], d[m], low[p % 2][m].factor[part % 2][h], high[p % 2][m].factor[part % 2][h]);
            if (u + 1 < STEPS) begin_step<Type, NT>(d[m], low[next][m], high[next][m], u + 1, tokens);
        }
    }
}

#else

template <class Type, int NT>
__device__ __forceinline__ void multiply_codes(float (&sums)[MT][NT][4], const uint8_t *row, const uint8_t *tokens)
{
    enum { TOGETHER = 4 };
    const uint32_t *const words = (const uint32_t *)tokens + threadIdx.x % SQZ_WARP;
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int p = 0; p < PARTS / 2; p++) {
        pair_of_parts low[MT], high[MT];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            low[m] = Type::pair(row + m * TILE * Type::PITCH, p, t);
            high[m] = Type::pair(row + (m * TILE + 8) * Type::PITCH, p, t);
        }
#pragma unroll
        for (int step = 0; step < 2 * NT / TOGETHER; step++) {
            const int i = step / (NT / TOGETHER), first = step % (NT / TOGETHER) * TOGETHER;
            uint4 x[TOGETHER];
#pragma unroll
            for (int k = 0; k < TOGETHER; k++) {
                const uint32_t *const at = words + ((2 * p + i) * NT + first + k) * 4 * SQZ_WARP;
                x[k] = make_uint4(at[0], at[SQZ_WARP], at[2 * SQZ_WARP], at[3 * SQZ_WARP]);
            }
            multiply_part<Type, MT, TOGETHER>(sums, first, low, high, i, x);
        }
    }
}

#endif

/* A chunk of the warp's tiles with all tokens. */
template <class Type, int NT>
__device__ __forceinline__ void multiply_chunk(float (&sums)[MT][NT][4], const uint8_t *rows, const uint8_t *tokens)
{
    const uint32_t lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
    const uint8_t *const row = rows + g * Type::PITCH;
    multiply_codes<Type, NT>(sums, row, tokens);
    const uint32_t *const at = (const uint32_t *)(tokens + stage<Type, NT>::NUMBERS) + (size_t)lane * 2 * Type::HALVES;
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const correction low = Type::less(row + m * TILE * Type::PITCH, t),
                         high = Type::less(row + (m * TILE + 8) * Type::PITCH, t);
#pragma unroll
        for (int j = 0; j < NT; j++) {
            uint32_t x[2 * Type::HALVES];
#pragma unroll
            for (int k = 0; k < 2 * Type::HALVES; k++) x[k] = at[j * SQZ_WARP * 2 * Type::HALVES + k];
            correct<Type>(sums[m][j], low, high, x);
        }
    }
}

/* A lane's sums of both tiles of a pair with group j, complete: rows g and g + 8, tokens 2 t and 2 t + 1. */
__device__ __forceinline__ void put_sums(const project_args &a, uint32_t pair, uint32_t j, uint32_t lane,
                                         const float (&sums)[MT][4])
{
    const uint32_t g = lane / 4, first = j * GROUP + lane % 4 * 2;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const uint32_t token = first + e % 2, row = g + e / 2 * 8;
        if (token >= a.n_tokens) continue;
        const float back = a.tokens.back[token];
        if (a.gated) {
            if (pair < a.n_tiles)
                put_number(a.matrices[0], token, pair * TILE + row, gated(back * sums[0][e], back * sums[1][e]));
            continue;
        }
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const uint32_t tile = pair * MT + m;
            if (tile >= a.n_tiles) continue;
            const matrix &to = a.matrices[matrix_of(a, tile)];
            put_number(to, token, (tile - to.first_tile) * TILE + row, back * sums[m][e]);
        }
    }
}

/* The cluster's blocks each add up and put an equal share of the results. `all`: shared, of sums [warp][tile][group]
 * [lane]. */
template <int NT>
__device__ __forceinline__ void put_together(const project_args &a, float4 *all, uint32_t first_pair,
                                             const float (&sums)[MT][NT][4])
{
    const sqz_cluster_place here = sqz_cluster_here();
    const uint32_t lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP, n = blockDim.x * NT;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int j = 0; j < NT; j++)
            all[((warp * MT + m) * NT + j) * SQZ_WARP + lane] =
                make_float4(sums[m][j][0], sums[m][j][1], sums[m][j][2], sums[m][j][3]);
    sqz_cluster_arrive();
    sqz_cluster_wait();
    for (uint32_t i = n * here.rank / here.size + threadIdx.x; i < n * (here.rank + 1) / here.size; i += blockDim.x) {
        const uint32_t w = i / (NT * SQZ_WARP), rest = i % (NT * SQZ_WARP);
        float whole[MT][4] = {};
        for (uint32_t r = 0; r < here.size; r++)
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const float4 x = sqz_of_rank(all, r)[(w * MT + m) * NT * SQZ_WARP + rest];
                whole[m][0] += x.x, whole[m][1] += x.y, whole[m][2] += x.z, whole[m][3] += x.w;
            }
        put_sums(a, first_pair + w, rest / SQZ_WARP, rest % SQZ_WARP, whole);
    }
    sqz_cluster_arrive(); /* nobody leaves whose sums are still read */
    sqz_cluster_wait();
}

template <class Type, int NT>
__global__ void __launch_bounds__(MOST_WARPS *SQZ_WARP, 1) split_kernel(const split_args a)
{
    extern __shared__ __align__(16) uint8_t shared[];
    enum { STAGES = stage<Type, NT>::STAGES };
    const sqz_cluster_place here = sqz_cluster_here();
    const uint32_t n_warps = blockDim.x / SQZ_WARP, first_pair = blockIdx.x / here.size * n_warps,
                   pair = first_pair + threadIdx.x / SQZ_WARP, n_chunks = a.p.n_in / CHUNK;
    supply<Type, NT> s;
    s.base = shared;
    s.stage_bytes = n_warps * stage<Type, NT>::ROWS + stage<Type, NT>::NUMBERS + stage<Type, NT>::SUMS;
    s.first = n_chunks * here.rank / here.size;
    s.n = n_chunks * (here.rank + 1) / here.size - s.first;
    s.row_bytes = n_chunks * Type::BYTES;
#pragma unroll
    for (int m = 0; m < MT; m++) s.tiles[m] = tile_rows<MT>(a.p, pair, m, s.row_bytes).weights;
#pragma unroll
    for (int i = 0; i + 1 < STAGES; i++) s.fetch_weights(i);
    sqz_let_next_start();
    sqz_wait_for_previous();
#pragma unroll
    for (int i = 0; i + 1 < STAGES; i++) {
        s.fetch_tokens(a.p.tokens.to, i);
        sqz_close_copies();
    }
    float sums[MT][NT][4] = {};
    for (uint32_t i = 0; i < s.n; i++) {
        sqz_wait_for_copies<STAGES - 2>();
#ifdef SQZ_HOPPER_CODE
        sqz_stores_to_async(); /* copies of threads, which products read */
#endif
        __syncthreads(); /* so that all have left the stage that is filled now */
        s.fetch_weights(i + STAGES - 1);
        s.fetch_tokens(a.p.tokens.to, i + STAGES - 1);
        sqz_close_copies();
        multiply_chunk<Type, NT>(sums, s.rows_of(i) + s.shift_of(i), s.tokens_of(i));
    }
    if (here.size > 1) {
        __syncthreads();
        put_together<NT>(a.p, (float4 *)shared, first_pair, sums);
        return;
    }
#pragma unroll
    for (int j = 0; j < NT; j++) {
        const float both[MT][4] = {{sums[0][j][0], sums[0][j][1], sums[0][j][2], sums[0][j][3]},
                                   {sums[1][j][0], sums[1][j][1], sums[1][j][2], sums[1][j][3]}};
        put_sums(a.p, pair, j, threadIdx.x % SQZ_WARP, both);
    }
}

/* ---- Launching ------------------------------------------------------------------------------ */

/* Blocks of a cluster, warps of a block, and of clusters how many there are. */
struct division {
    uint32_t n_blocks, n_warps, n_clusters;
};

template <class Type, int NT> size_t shared_bytes(const struct division &d)
{
    typedef stage<Type, NT> Stage;
    static_assert(Stage::STAGES >= 2 && MOST_WARPS * MT * NT * SQZ_WARP * sizeof(float4) <= MOST_SHARED, "room");
    const size_t ring = Stage::STAGES * ((size_t)d.n_warps * Stage::ROWS + Stage::NUMBERS + Stage::SUMS);
    const size_t results = d.n_blocks > 1 ? (size_t)d.n_warps * MT * NT * SQZ_WARP * sizeof(float4) : 0;
    return ring > results ? ring : results;
}

template <class Type, int NT> uint32_t ask_clusters_at_once(const struct division &d)
{
    cudaLaunchAttribute attribute = {};
    cudaLaunchConfig_t config = {};
    int n = 0;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = d.n_blocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(d.n_clusters * d.n_blocks);
    config.blockDim = dim3(d.n_warps * SQZ_WARP);
    config.dynamicSmemBytes = shared_bytes<Type, NT>(d);
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&n, split_kernel<Type, NT>, &config) == cudaSuccess && n > 0) return (uint32_t)n;
    cudaGetLastError();
    return 0;
}

/* How many clusters run at once: their blocks lie in one part of the card, which leaves some multiprocessors over. CUDA is
 * asked once: not every launch is captured. */
template <class Type, int NT> uint32_t clusters_at_once(const struct division &d)
{
    enum { MOST_DEVICES = 16 };
    static std::atomic<uint32_t> known[MOST_DEVICES][MOST_BLOCKS + 1][2]; /* and one more; 0: not yet */
    int device = 0;
    if (d.n_blocks == 1) return (uint32_t)sqz_device_get().n_multiprocessors;
    if (cudaGetDevice(&device) != cudaSuccess || device >= MOST_DEVICES) return 0;
    std::atomic<uint32_t> &n = known[device][d.n_blocks][d.n_warps == MOST_WARPS];
    if (n == 0) n = ask_clusters_at_once<Type, NT>(d) + 1;
    return n - 1;
}

/* What a division takes, in nanoseconds, as measured: rounds, in each the reading of the weights at the memory's rate, or
 * the products, by four warps nearly what eight take; and adding up. */
float cost_of(const struct division &d, uint32_t at_once, uint32_t n_in, int n_groups, float bytes_a_weight)
{
    const uint32_t n_chunks = (n_in / CHUNK + d.n_blocks - 1) / d.n_blocks;
    const float rounds = (float)((d.n_clusters + at_once - 1) / at_once);
    const float together = (float)(d.n_clusters < at_once ? d.n_clusters : at_once) * (float)d.n_blocks;
    const float weights = (float)(d.n_warps * MT * TILE * n_chunks * CHUNK) * bytes_a_weight * together / 4200;
    const float products = (float)n_chunks * (600.0f + 220.0f * (float)n_groups) * (d.n_warps == 8 ? 1.0f : 0.8f);
    return rounds * (1000 + fmaxf(weights, products)) + (d.n_blocks > 1 ? 1500 : 0);
}

template <class Type, int NT> struct division best_division(uint32_t n_pairs, uint32_t n_in)
{
    const uint32_t most = sqz_compiled_for_90((const void *)split_kernel<Type, NT>) ? MOST_BLOCKS : 1;
    struct division best = {1, MOST_WARPS, (n_pairs + MOST_WARPS - 1) / MOST_WARPS};
    float least = INFINITY;
    sqz_allow_shared((const void *)split_kernel<Type, NT>, 0);
    for (uint32_t n_blocks = 1; n_blocks <= most && n_blocks <= n_in / CHUNK; n_blocks++)
        for (uint32_t n_warps = 4; n_warps <= MOST_WARPS; n_warps += 4) { /* tensor cores take four warps' rows */
            const struct division d = {n_blocks, n_warps, (n_pairs + n_warps - 1) / n_warps};
            const uint32_t at_once = clusters_at_once<Type, NT>(d);
            const float cost = at_once ? cost_of(d, at_once, n_in, NT, (float)Type::BYTES / CHUNK) : INFINITY;
            if (cost < least) best = d, least = cost;
        }
    return best;
}

template <class Type, int NT> enum sqz_status launch(const split_args &a, bool after_ours, void *stream)
{
    const struct division d = best_division<Type, NT>(a.n_pairs, a.p.n_in);
    return sqz_launch(split_kernel<Type, NT>, dim3(d.n_clusters * d.n_blocks), d.n_warps * SQZ_WARP,
                      shared_bytes<Type, NT>(d), d.n_blocks, after_ours, a, stream);
}

} // namespace

template <class Type> enum sqz_status sqz_project_split(const project_args &p, bool after_ours, void *stream)
{
    const split_args a = {p, p.gated ? p.n_tiles : (p.n_tiles + MT - 1) / MT};
    switch (sqz_few_groups(p.n_tokens)) {
    case 4: return launch<Type, 4>(a, after_ours, stream);
    case 8: return launch<Type, 8>(a, after_ours, stream);
    }
    return SQZ_ERROR_UNSUPPORTED;
}

template enum sqz_status sqz_project_split<q4_0>(const project_args &, bool, void *);
template enum sqz_status sqz_project_split<q4_1>(const project_args &, bool, void *);
template enum sqz_status sqz_project_split<q8_0>(const project_args &, bool, void *);
template enum sqz_status sqz_project_split<q4_k>(const project_args &, bool, void *);
template enum sqz_status sqz_project_split<q6_k>(const project_args &, bool, void *);
