/*
 * Products of few tokens with quantised weights that share their input: what a token's queries, keys and values are
 * made by, or the two halves of a gated layer.
 *
 * Bound by the reading of the weights, once, and by what a launch costs before its first byte arrives. So weights
 * go to shared memory by asynchronous copies that start before the kernel in front has ended, in a ring of every
 * warp's own; the warps of a block share the inputs of the same rows, and add up.
 */
#include "arena.h"
#include "projections.cuh"
#include "projections_split.h"

extern "C" enum sqz_status sqz_gpu_project_token(const struct sqz_gpu_projections *a, void *stream);

namespace
{

using namespace sqz_few;

template <class Type> __host__ __device__ constexpr size_t ring_bytes()
{
    return (size_t)Type::WARPS * STAGES * TILE * Type::PITCH;
}

/* Floats of a warp's results for one group of tokens: eight tokens' rows lie in different banks. */
template <int MT> __host__ __device__ constexpr int results_pitch()
{
    return MT * TILE + 4;
}

template <class Type, int MT> __host__ __device__ constexpr size_t results_bytes()
{
    return sizeof(float) * 2 * Type::WARPS * GROUP * results_pitch<MT>();
}

/* Of a warp: the steps through its block's rounds, its chunks of their rows, and the tiles of these; and their
 * weights on the way to shared memory. */
template <class Type, int MT> struct ring {
    enum {
        SEGMENTS = (Type::BYTES + 15) / 16,
        COPIES = (TILE * SEGMENTS + SQZ_WARP - 1) / SQZ_WARP, /* of a lane */
        STAGE = TILE * Type::PITCH
    };
    uint8_t *base;
    uint32_t round, chunk, n_chunks, stage;
    size_t row_bytes;
    const uint8_t *tiles[MT];

    __device__ __forceinline__ void find_tiles(const project_args &a)
    {
#pragma unroll
        for (int m = 0; m < MT; m++) tiles[m] = tile_rows<MT>(a, round, m, row_bytes).weights;
    }
    __device__ __forceinline__ ring(const project_args &a, uint8_t *shared)
    {
        const uint32_t warp = threadIdx.x / SQZ_WARP;
        base = shared + (size_t)warp * STAGES * STAGE;
        round = blockIdx.x;
        chunk = warp;
        n_chunks = a.n_in / CHUNK;
        stage = 0;
        row_bytes = (size_t)n_chunks * Type::BYTES;
        if (chunk < n_chunks) find_tiles(a);
        else round = a.n_rounds; /* more warps than chunks */
#pragma unroll
        for (int i = 0; i + 1 < STAGES; i++) fetch(a, i % MT);
    }
    /* The copies of the next step, tile m; one group of copies each time, also where nothing is left. */
    __device__ __forceinline__ void fetch(const project_args &a, int m)
    {
        if (round < a.n_rounds) {
            const uint32_t lane = threadIdx.x % SQZ_WARP;
            const uint8_t *const from = tiles[m] + ((size_t)chunk * Type::BYTES & ~(size_t)15);
            uint8_t *const to = base + stage * STAGE;
#pragma unroll
            for (int i = 0; i < COPIES; i++) {
                const uint32_t piece = lane + i * SQZ_WARP, row = piece / SEGMENTS, segment = piece % SEGMENTS;
                if (piece < TILE * SEGMENTS)
                    sqz_copy_16(to + row * Type::PITCH + segment * 16, from + row * row_bytes + segment * 16);
            }
            if (m == MT - 1) next(a);
        }
        sqz_close_copies();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    __device__ __forceinline__ void next(const project_args &a)
    {
        chunk += Type::WARPS;
        if (chunk < n_chunks) return;
        chunk = threadIdx.x / SQZ_WARP;
        round += gridDim.x;
        if (round < a.n_rounds) find_tiles(a);
    }
    /* The stage that is read next, complete: the one after those under way. */
    __device__ __forceinline__ const uint8_t *arrived()
    {
        sqz_wait_for_copies<STAGES - 2>();
        __syncwarp();
        return base + (stage + 1 == STAGES ? 0 : stage + 1) * STAGE;
    }
};

/* Tokens' numbers of a chunk and their sums, as lane 4 g + t multiplies them. */
template <class Type, int NT> struct chunk_of_tokens {
    uint4 numbers[PARTS][NT];
    uint32_t sums[NT][2 * Type::HALVES];

    __device__ __forceinline__ void take(const places &p, uint32_t chunk)
    {
        const uint32_t lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int j = 0; j < NT; j++) {
            const uint32_t token = j * GROUP + g;
            const bool exists = token < p.n_places;
            const uint32_t *const s =
                (const uint32_t *)p.sums + (((size_t)chunk * p.n_places + token) * 4 + t) * 2 * Type::HALVES;
#pragma unroll
            for (int i = 0; i < PARTS; i++)
                numbers[i][j] = exists ? p.numbers[((size_t)(chunk * PARTS + i) * p.n_places + token) * 4 + t]
                                       : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int k = 0; k < 2 * Type::HALVES; k++) sums[j][k] = exists ? s[k] : 0;
        }
    }
};

/* A tile's chunk with all tokens. */
template <class Type, int NT>
__device__ __forceinline__ void multiply_tile(float (&sums)[1][NT][4], const uint8_t *stage, uint32_t shift,
                                              const chunk_of_tokens<Type, NT> &x)
{
    const uint32_t lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
    const uint8_t *const row = stage + g * Type::PITCH + shift;
#pragma unroll
    for (int p = 0; p < PARTS / 2; p++) {
        const pair_of_parts low[1] = {Type::pair(row, p, t)}, high[1] = {Type::pair(row + 8 * Type::PITCH, p, t)};
#pragma unroll
        for (int i = 0; i < 2; i++) multiply_part<Type, 1, NT>(sums, 0, low, high, i, x.numbers[2 * p + i]);
    }
    const correction low = Type::less(row, t), high = Type::less(row + 8 * Type::PITCH, t);
#pragma unroll
    for (int j = 0; j < NT; j++) correct<Type>(sums[0][j], low, high, x.sums[j]);
}

/* All warps' sums of one row and token. */
template <int MT, int WARPS>
__device__ __forceinline__ float added_up(const float *results, uint32_t row, uint32_t token)
{
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += results[(w * GROUP + token) * results_pitch<MT>() + row];
    return sum;
}

template <int MT, int WARPS>
__device__ __forceinline__ void put_result(const project_args &a, const float *results, uint32_t round, uint32_t row,
                                           uint32_t place, uint32_t token, float back)
{
    const uint32_t tile = round * (a.gated ? MT / 2 : MT) + row / TILE, k = a.gated ? 0 : matrix_of(a, tile);
    if (tile >= a.n_tiles) return;
    float x = back * added_up<MT, WARPS>(results, row, place);
    if (a.gated) x = gated(x, back * added_up<MT, WARPS>(results, row + MT / 2 * TILE, place));
    put_number(a.matrices[k], token, (tile - (a.gated ? 0 : a.matrices[k].first_tile)) * TILE + row % TILE, x);
}

/* A round's results, one group of tokens after another, by turns in two buffers. */
template <int MT, int NT, int WARPS>
__device__ __forceinline__ void put_round(const project_args &a, const float (&sums)[MT][1][NT][4], float *buffers,
                                          uint32_t *turn, uint32_t round, const float *back)
{
    const uint32_t lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4, warp = threadIdx.x / SQZ_WARP;
    const uint32_t n_rows = a.gated ? MT / 2 * TILE : MT * TILE;
#pragma unroll
    for (int j = 0; j < NT; j++) {
        const uint32_t n_places = min(GROUP, a.n_tokens - j * GROUP);
        float *const results = buffers + (*turn)++ % 2 * WARPS * GROUP * results_pitch<MT>();
        float *const own = results + (warp * GROUP + 2 * t) * results_pitch<MT>() + g;
#pragma unroll
        for (int m = 0; m < MT; m++) {
            if (2 * t >= n_places) continue;
            own[m * TILE] = sums[m][0][j][0];
            own[m * TILE + results_pitch<MT>()] = sums[m][0][j][1];
            own[m * TILE + 8] = sums[m][0][j][2];
            own[m * TILE + results_pitch<MT>() + 8] = sums[m][0][j][3];
        }
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < n_rows * n_places; i += WARPS * SQZ_WARP) {
            const uint32_t place = i / n_rows, token = j * GROUP + place;
            put_result<MT, WARPS>(a, results, round, i % n_rows, place, token, back[token]);
        }
    }
}

template <class Type, int MT, int NT>
__global__ void __launch_bounds__(Type::WARPS *SQZ_WARP, 1) project_kernel(const project_args a)
{
    extern __shared__ __align__(16) uint8_t shared[];
    float *const buffers = (float *)(shared + ring_bytes<Type>());
    ring<Type, MT> weights(a, shared);
    sqz_let_next_start();
    sqz_wait_for_previous();
    uint32_t turn = 0, taken = ~0u;
    chunk_of_tokens<Type, NT> now;
    for (uint32_t round = blockIdx.x; round < a.n_rounds; round += gridDim.x) {
        float sums[MT][1][NT][4] = {};
        for (uint32_t chunk = threadIdx.x / SQZ_WARP; chunk < a.tokens.n_in / CHUNK; chunk += Type::WARPS) {
            const uint32_t shift = (uint32_t)((size_t)chunk * Type::BYTES & 15);
            if (chunk != taken) now.take(a.tokens.to, taken = chunk); /* rounds of one chunk each have the same */
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const uint8_t *const stage = weights.arrived();
                weights.fetch(a, (m + STAGES - 1) % MT);
                multiply_tile<Type, NT>(sums[m], stage, shift, now);
            }
        }
        put_round<MT, NT, Type::WARPS>(a, sums, buffers, &turn, round, a.tokens.back);
    }
}

/* ---- Launching ------------------------------------------------------------------------------ */

bool enough_shared(void)
{
    int device = 0, most = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
           most >= MOST_SHARED + 1024;
}

/* How a call goes: tiles of a warp at once, groups of tokens; split: by projections_split.cu. */
struct plan {
    int mt, nt;
    bool split;
    uint32_t n_tiles, n_rounds; /* tiles: of one matrix where gated */
};

uint32_t rounds_of(uint32_t n, uint32_t each)
{
    return (n + each - 1) / each;
}

/* One tile at a time where two leave more multiprocessors idle in the last round. */
int tiles_at_once(uint32_t n_tiles)
{
    const uint32_t n = (uint32_t)sqz_device_get().n_multiprocessors;
    if (n == 0) return 2;
    return 10 * rounds_of(n_tiles, n) < 9 * 2 * rounds_of(rounds_of(n_tiles, 2), n) ? 1 : 2;
}

template <class Type> bool good(const struct sqz_gpu_projections *a)
{
    const size_t row_bytes = (size_t)a->n_in / CHUNK * Type::BYTES;
    if (a->n_in == 0 || a->n_in % CHUNK || row_bytes % 16 || a->n_in > 1 << 20) return false;
    if (a->n_tokens == 0 || a->n_tokens > SQZ_MOST_PROJECTED || a->n_matrices == 0 ||
        a->n_matrices > SQZ_MOST_PROJECTIONS || (a->gated && a->n_matrices != 2))
        return false;
    for (uint32_t i = 0; i < a->n_matrices; i++)
        if (a->matrices[i].n_out == 0 || a->matrices[i].n_out % TILE || a->matrices[i].n_out > 1 << 24) return false;
    return !a->gated || a->matrices[0].n_out == a->matrices[1].n_out;
}

template <class Type> struct plan plan_of(const struct sqz_gpu_projections *a)
{
    struct plan p = {};
    for (uint32_t i = 0; i < (a->gated ? 1 : a->n_matrices); i++) p.n_tiles += a->matrices[i].n_out / TILE;
    p.nt = sqz_few_groups(a->n_tokens);
    p.split = p.nt > 2;
    p.mt = p.nt == 1 && !a->gated ? tiles_at_once(p.n_tiles) : 2;
    p.n_rounds = rounds_of(p.n_tiles, a->gated ? (uint32_t)p.mt / 2 : (uint32_t)p.mt);
    return p;
}

template <class Type, int MT, int NT> enum sqz_status launch(const project_args &p, bool after_ours, void *stream)
{
    const uint32_t n = (uint32_t)sqz_device_get().n_multiprocessors;
    return sqz_launch(project_kernel<Type, MT, NT>, dim3(p.n_rounds < n ? p.n_rounds : n), Type::WARPS * SQZ_WARP,
                      ring_bytes<Type>() + results_bytes<Type, MT>(), 1, after_ours, p, stream);
}

template <class Type>
enum sqz_status launch_planned(const struct plan &plan, const project_args &p, bool after_ours, void *stream)
{
    if (plan.split) return sqz_project_split<Type>(p, after_ours, stream);
    if (plan.mt == 1) return launch<Type, 1, 1>(p, after_ours, stream);
    if (plan.nt == 1) return launch<Type, 2, 1>(p, after_ours, stream);
    return launch<fewer_warps<Type>, 2, 2>(p, after_ours, stream);
}

/* The tokens, and where the kernels read them from. */
template <class Type>
struct tokens_args carve(struct sqz_arena *arena, const struct sqz_gpu_projections *a, const struct plan &plan)
{
    const uint32_t n = (uint32_t)plan.nt * GROUP;
    struct tokens_args t = {};
    t.to.numbers = (uint4 *)sqz_arena_take(arena, n, a->n_in, sizeof(__half));
    t.to.sums = (__half *)sqz_arena_take(arena, sums_of<Type>(a->n_in, n), 1, sizeof(__half));
    t.to.n_places = n;
    t.to.by_words = plan.split;
    t.back = (float *)sqz_arena_take(arena, n, 1, sizeof(float));
    t.in = a->in;
    t.norm = a->norm;
    t.epsilon = a->norm_epsilon;
    t.n_in = a->n_in;
    t.n_tokens = a->n_tokens;
    return t;
}

template <class Type> size_t workspace_bytes(const struct sqz_gpu_projections *a)
{
    if (!good<Type>(a) || !enough_shared()) return 0;
    const struct plan plan = plan_of<Type>(a);
    struct sqz_arena arena = sqz_arena_on(NULL);
    carve<Type>(&arena, a, plan);
    return sqz_arena_bytes(&arena) + SQZ_ARENA_ALIGNMENT;
}

bool aligned(const struct sqz_gpu_projections *a)
{
    uintptr_t all = (uintptr_t)a->in | (uintptr_t)a->norm;
    for (uint32_t i = 0; i < a->n_matrices; i++) all |= (uintptr_t)a->matrices[i].weights;
    return all % 16 == 0;
}

template <class Type> enum sqz_status project(const struct sqz_gpu_projections *a, void *stream)
{
    const size_t bytes = workspace_bytes<Type>(a);
    if (bytes == 0 || a->workspace_bytes < bytes || !aligned(a)) return SQZ_ERROR_ARGUMENT;
    if (a->n_tokens == 1) { /* fewer instructions for each weight, where the kernel has the type */
        const enum sqz_status status = sqz_gpu_project_token(a, stream);
        if (status != SQZ_ERROR_UNSUPPORTED) return status;
    }
    const struct plan plan = plan_of<Type>(a);
    project_args p = {};
    bool after_ours = a->after_ours;
    for (uint32_t i = 0, tile = 0; i < a->n_matrices; tile += a->matrices[i++].n_out / TILE)
        p.matrices[i] = {(const uint8_t *)a->matrices[i].weights,
                         a->matrices[i].out,
                         a->matrices[i].add,
                         a->matrices[i].n_out,
                         a->matrices[i].add_stride,
                         tile};
    p.n_matrices = a->n_matrices;
    p.n_tiles = plan.n_tiles;
    p.n_in = a->n_in;
    p.n_tokens = a->n_tokens;
    p.n_rounds = plan.n_rounds;
    p.gated = a->gated;
    struct sqz_arena arena = sqz_arena_on(a->workspace);
    p.tokens = carve<Type>(&arena, a, plan);
    if (!a->same_in) {
        const enum sqz_status status =
            sqz_launch(tokens_kernel<Type>, dim3(p.tokens.to.n_places), MAKERS, 0, 1, after_ours, p.tokens, stream);
        if (status != SQZ_OK) return status;
        after_ours = true;
    }
    return launch_planned<Type>(plan, p, after_ours, stream);
}

} // namespace

#define FOR_TYPE(type, call, otherwise)                                                                                \
    switch (type) {                                                                                                    \
    case SQZ_WEIGHTS_Q4_0: return call(q4_0);                                                                          \
    case SQZ_WEIGHTS_Q4_1: return call(q4_1);                                                                          \
    case SQZ_WEIGHTS_Q8_0: return call(q8_0);                                                                          \
    case SQZ_WEIGHTS_Q4_K: return call(q4_k);                                                                          \
    case SQZ_WEIGHTS_Q6_K: return call(q6_k);                                                                          \
    }                                                                                                                  \
    return otherwise

extern "C" size_t sqz_gpu_projections_workspace_bytes(const struct sqz_gpu_projections *a)
{
#define BYTES_OF(T) workspace_bytes<T>(a)
    FOR_TYPE(a->type, BYTES_OF, 0);
#undef BYTES_OF
}

extern "C" enum sqz_status sqz_gpu_project(const struct sqz_gpu_projections *a, void *stream)
{
#define PROJECT(T) project<T>(a, stream)
    FOR_TYPE(a->type, PROJECT, SQZ_ERROR_UNSUPPORTED);
#undef PROJECT
}
