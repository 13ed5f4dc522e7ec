/*
 * Products of few tokens with quantised weights that share their input: what a token's queries, keys and values are
 * made by, or the two halves of a gated layer.
 *
 * Bound by the reading of the weights, once, and by what a launch costs before its first byte arrives. So weights
 * go to shared memory by asynchronous copies that start before the kernel in front has ended, in a ring of every
 * warp's own; the warps of a block share the inputs of the same rows, and add up.
 *
 * A code n of 4, 6 or 8 bits is left where it lies in its half word: as F16 that is n 2^-24, a subnormal number,
 * which tensor cores multiply exactly. What codes are less, or values at least, comes to a product of factors with
 * the sums of the tokens' numbers, once for each chunk, by tensor cores as well; factors of parts are F32. So
 * weights are exact, tokens are F16, and sums F32.
 *
 * A token's numbers are multiplied by a power of two that makes the largest just fit: F16 holds what is 2^-28 of
 * it.
 */
#include "arena.h"
#include "calls.h"
#include "copies.cuh"
#include "device.cuh"
#include "weights.h"

extern "C" enum sqz_status sqz_gpu_project_token(const struct sqz_gpu_projections *a, void *stream);

namespace
{

enum {
    MAKERS = 256, /* threads of a block that makes tokens ready */
    CHUNK = 256,  /* inputs of a row that a warp takes at once */
    PART = 32,    /* of them share a factor, or two halves have one each */
    PARTS = CHUNK / PART,
    TILE = 16,                   /* rows of a tensor core's product, */
    GROUP = 8,                   /* and tokens */
    KEPT_NUMBERS = 16384,        /* of tokens: as many as a block's threads hold in registers */
    KEPT_STEP = PART * SQZ_WARP, /* inputs of a token are so many times something, so that a warp has one token's */
    STAGES = 4,
    MOST_SHARED = 226 * 1024, /* of a block; devices that have less leave products to ggml */
};

#define SMALLEST 0x1p-24f /* what a code's lowest bit is as F16 */

/* ---- Types of weights ------------------------------------------------------------------ */

/* Of a row's chunk in shared memory: what one lane of four multiplies of a pair of parts. */
struct pair_of_parts {
    uint4 codes[2];     /* of tensor cores' two steps */
    float factor[2][2]; /* [part][half] */
};

/* What a chunk's results are more than its codes', of a row: factor times the tokens' sums times these, two of
 * parts 2 t and 2 t + 1, or of halves 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t. */
struct correction {
    uint32_t numbers[2]; /* pairs of F16 */
    float factor;
};

__device__ __forceinline__ float half_at(const uint8_t *at)
{
    return __half2float(*(const __half *)at);
}

__device__ __forceinline__ uint32_t word_at(const uint8_t *at)
{
    return *(const uint32_t *)at;
}

__device__ __forceinline__ uint32_t two_halves(const uint8_t *first, const uint8_t *second)
{
    return *(const uint16_t *)first | (uint32_t) * (const uint16_t *)second << 16;
}

/* Nibbles of 4 bytes: the low ones of bytes 0 and 2, the high ones, 16 times as large, and those of bytes 1 and 3. */
__device__ __forceinline__ uint4 nibbles(uint32_t q)
{
    const uint32_t odd = q >> 8;
    return make_uint4(q & 0x000f000f, q & 0x00f000f0, odd & 0x000f000f, odd & 0x00f000f0);
}

/* BYTES of a chunk; PITCH: of a row's in shared memory, an odd multiple of 16, so that eight rows lie in different
 * banks. HALVES: factors of a part. place(): which of a part's numbers is the k-th that lane t multiplies;
 * divided(): whether it comes divided by 16, since its code is 16 times as large. */
struct q4_0 {
    enum { TYPE = SQZ_WEIGHTS_Q4_0, BYTES = 144, PITCH = 144, HALVES = 1, WARPS = 16 };
    static __host__ __device__ constexpr int place(int t, int k)
    {
        return 4 * t + k % 2 * 2 + k / 2 % 2 * 16 + k / 4;
    }
    static __host__ __device__ constexpr bool divided(int k)
    {
        return k / 2 % 2;
    }
    static __device__ __forceinline__ pair_of_parts pair(const uint8_t *row, int p, int t)
    {
        const uint8_t *const at = row + 36 * p;
        pair_of_parts x;
        x.codes[0] = nibbles(__byte_perm(word_at(at + 4 * t), word_at(at + 4 * t + 4), 0x5432));
        x.codes[1] = nibbles(word_at(at + 20 + 4 * t));
        x.factor[0][0] = half_at(at);
        x.factor[1][0] = half_at(at + 18);
        return x;
    }
    static __device__ __forceinline__ correction less(const uint8_t *row, int t)
    {
        return {{two_halves(row + 36 * t, row + 36 * t + 18), 0}, -8.0f};
    }
};

struct q4_1 : q4_0 {
    enum { TYPE = SQZ_WEIGHTS_Q4_1, BYTES = 160, PITCH = 176, HALVES = 1, WARPS = 16 };
    static __device__ __forceinline__ pair_of_parts pair(const uint8_t *row, int p, int t)
    {
        pair_of_parts x;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint8_t *const at = row + 20 * (2 * p + i);
            x.codes[i] = nibbles(word_at(at + 4 + 4 * t));
            x.factor[i][0] = half_at(at);
        }
        return x;
    }
    static __device__ __forceinline__ correction less(const uint8_t *row, int t)
    {
        return {{two_halves(row + 40 * t + 2, row + 40 * t + 22), 0}, 1.0f};
    }
};

struct q8_0 {
    enum { TYPE = SQZ_WEIGHTS_Q8_0, BYTES = 272, PITCH = 272, HALVES = 1, WARPS = 8 };
    static __host__ __device__ constexpr int place(int t, int k)
    {
        return 8 * t + k / 4 * 4 + k % 2 * 2 + k / 2 % 2;
    }
    static __host__ __device__ constexpr bool divided(int)
    {
        return false;
    }
    static __device__ __forceinline__ uint4 bytes(uint32_t first, uint32_t second)
    {
        first ^= 0x80808080; /* signed ones from 128 on */
        second ^= 0x80808080;
        return make_uint4(first & 0x00ff00ff, first >> 8 & 0x00ff00ff, second & 0x00ff00ff, second >> 8 & 0x00ff00ff);
    }
    static __device__ __forceinline__ pair_of_parts pair(const uint8_t *row, int p, int t)
    {
        const uint8_t *const at = row + 68 * p, *const first = at + 8 * t, *const second = at + 36 + 8 * t;
        const uint32_t middle = word_at(first + 4);
        pair_of_parts x;
        x.codes[0] =
            bytes(__byte_perm(word_at(first), middle, 0x5432), __byte_perm(middle, word_at(first + 8), 0x5432));
        x.codes[1] = bytes(word_at(second), word_at(second + 4));
        x.factor[0][0] = half_at(at);
        x.factor[1][0] = half_at(at + 34);
        return x;
    }
    static __device__ __forceinline__ correction less(const uint8_t *row, int t)
    {
        return {{two_halves(row + 68 * t, row + 68 * t + 34), 0}, -128.0f};
    }
};

struct q4_k : q4_0 {
    enum { TYPE = SQZ_WEIGHTS_Q4_K, BYTES = 144, PITCH = 144, HALVES = 1, WARPS = 16 };
    static __host__ __device__ constexpr bool divided(int)
    {
        return false;
    }
    static __device__ __forceinline__ pair_of_parts pair(const uint8_t *row, int p, int t)
    {
        const uint32_t first = word_at(row + 16 + 32 * p + 4 * t), second = word_at(row + 32 + 32 * p + 4 * t);
        const uint4 a = nibbles(first), b = nibbles(second);
        const float whole = half_at(row);
        pair_of_parts x;
        x.codes[0] = make_uint4(a.x, b.x, a.z, b.z);
        x.codes[1] = make_uint4(a.y, b.y, a.w, b.w);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float factor, least;
            sqz_weights_part(row + 4, (uint32_t)(2 * p + i), &factor, &least);
            x.factor[i][0] = whole * factor * (i ? 0.0625f : 1.0f); /* high nibbles are 16 times as large */
        }
        return x;
    }
    static __device__ __forceinline__ correction less(const uint8_t *row, int t)
    {
        float factor, least[2];
        sqz_weights_part(row + 4, (uint32_t)(2 * t), &factor, &least[0]);
        sqz_weights_part(row + 4, (uint32_t)(2 * t + 1), &factor, &least[1]);
        return {{sqz_f16::pack(least[0], least[1]), 0}, -half_at(row + 2)};
    }
};

struct q6_k {
    enum { TYPE = SQZ_WEIGHTS_Q6_K, BYTES = 210, PITCH = 240, HALVES = 2, WARPS = 8 };
    static __host__ __device__ constexpr int place(int t, int k)
    {
        return 4 * t + k / 4 * 16 + k % 2 * 2 + k / 2 % 2;
    }
    static __host__ __device__ constexpr bool divided(int)
    {
        return false;
    }
    /* Rows begin at even addresses. */
    static __device__ __forceinline__ uint32_t any_word_at(const uint8_t *at)
    {
        const uint16_t *const both = (const uint16_t *)at;
        return both[0] | (uint32_t)both[1] << 16;
    }
    static __device__ __forceinline__ void put(uint32_t low, uint32_t high, uint32_t *even, uint32_t *odd)
    {
        const uint32_t codes = (low & 0x0f0f0f0f) | (high & 0x03030303) << 4;
        *even = codes & 0x00ff00ff;
        *odd = codes >> 8 & 0x00ff00ff;
    }
    static __device__ __forceinline__ pair_of_parts pair(const uint8_t *row, int p, int t)
    {
        const int half = p / 2, upper = p % 2; /* of a chunk; its four parts are nibbles' low, low, high, high */
        const uint8_t *const low = row + 64 * half + 4 * t, *const high = row + 128 + 32 * half + 4 * t;
        const uint32_t high_first = any_word_at(high) >> 4 * upper, high_second = any_word_at(high + 16) >> 4 * upper;
        const float factor = half_at(row + 208);
        pair_of_parts x;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t first = any_word_at(low + 32 * i) >> 4 * upper;
            const uint32_t second = any_word_at(low + 32 * i + 16) >> 4 * upper;
            put(first, high_first >> 2 * i, &x.codes[i].x, &x.codes[i].y);
            put(second, high_second >> 2 * i, &x.codes[i].z, &x.codes[i].w);
#pragma unroll
            for (int j = 0; j < 2; j++)
                x.factor[i][j] = factor * (float)(int8_t)row[192 + 8 * half + 4 * upper + 2 * i + j];
        }
        return x;
    }
    static __device__ __forceinline__ correction less(const uint8_t *row, int t)
    {
        const int8_t *const at = (const int8_t *)row + 192 + 2 * t;
        return {{sqz_f16::pack(at[0], at[1]), sqz_f16::pack(at[8], at[9])}, -32.0f * half_at(row + 208)};
    }
};

/* With as many registers for each thread as there are, which sums of 16 tokens need. */
template <class Type> struct fewer_warps : Type {
    enum { WARPS = 8 };
};

/* ---- Tokens ------------------------------------------------------------------------------ */

/* What the kernels read of tokens: numbers [part][n_places][4 lanes][8] as F16 in the order of the type; and the
 * sums of parts or of their halves, times SUM_SCALE, as F16 and what that leaves, [chunk][n_places][4 lanes][2
 * HALVES][2]: those that a lane multiplies with a correction's numbers, first all of them, then what was left. */
struct places {
    uint4 *numbers;
    __half *sums;
    uint32_t n_places;
};

#define SUM_SCALE 0x1p-6f

/* What a token's numbers are multiplied by, and what its results are then. */
__device__ __forceinline__ float fitting_factor(float most)
{
    const int exponent = max((int)(__float_as_uint(most) >> 23 & 255) - 127, -100);
    return most > 0 ? __uint_as_float((uint32_t)(13 - exponent + 127) << 23) : 1.0f;
}

/* One part of a token: its 32 numbers, already multiplied. */
template <class Type>
__device__ __forceinline__ void put_part(const places &to, uint32_t part, uint32_t token, const float (&x)[PART])
{
    float sums[2] = {0, 0};
#pragma unroll
    for (int t = 0; t < 4; t++) {
        uint32_t packed[4];
#pragma unroll
        for (int k = 0; k < 8; k += 2) {
            const int first = Type::place(t, k), second = Type::place(t, k + 1);
            const float by = Type::divided(k) ? 0.0625f : 1.0f, back = Type::divided(k) ? 16.0f : 1.0f;
            packed[k / 2] = sqz_f16::pack(x[first] * by, x[second] * by);
            const float2 rounded = sqz_f16::unpack(packed[k / 2]);
            sums[Type::HALVES == 2 ? first / 16 : 0] += back * rounded.x;
            sums[Type::HALVES == 2 ? second / 16 : 0] += back * rounded.y;
        }
        to.numbers[((size_t)part * to.n_places + token) * 4 + t] =
            make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
#pragma unroll
    for (int h = 0; h < Type::HALVES; h++) {
        const uint32_t k = part % PARTS * Type::HALVES + h, lane = k % PARTS / 2, second = k / PARTS;
        __half *const at =
            to.sums + (((size_t)part / PARTS * to.n_places + token) * 4 + lane) * 4 * Type::HALVES + 2 * second + k % 2;
        const float sum = sums[h] * SUM_SCALE;
        const __half rounded = __float2half_rn(sum);
        at[0] = rounded;
        at[2 * Type::HALVES] = __float2half_rn(sum - __half2float(rounded));
    }
}

__device__ __forceinline__ void take_part(const float *from, float (&x)[PART])
{
#pragma unroll
    for (int i = 0; i < PART / 4; i++) {
        const float4 four = ((const float4 *)from)[i];
        x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
    }
}

struct tokens_args {
    places to;
    float *back;     /* [n_places] what results are multiplied by */
    const float *in; /* [T][n_in] */
    const float
        *norm;     /* [n_in] what numbers are multiplied by, once their mean square is 1; NULL: they are as they are */
    float epsilon; /* that is added to the mean square */
    uint32_t n_in, n_tokens;
};

/* Of parts of a token: the largest number, and the sum of squares. */
struct measured {
    float most, squares;
};

/* Multiplies a part by `norm`, and measures it: squares before, the largest after. Without one, squares are not
 * asked for. */
__device__ __forceinline__ measured measure_part(const float *norm, uint32_t part, float (&x)[PART])
{
    measured m = {0.0f, 0.0f};
    if (norm) {
        float factors[PART];
        take_part(norm + part * PART, factors);
#pragma unroll
        for (int i = 0; i < PART; i++) {
            m.squares += x[i] * x[i];
            x[i] *= factors[i];
        }
    }
#pragma unroll
    for (int i = 0; i < PART; i++) m.most = fmaxf(m.most, fabsf(x[i]));
    return m;
}

__device__ __forceinline__ measured both(measured a, measured b)
{
    return {fmaxf(a.most, b.most), a.squares + b.squares};
}

__device__ __forceinline__ measured measured_by_warp(measured m)
{
#pragma unroll
    for (int step = 16; step; step /= 2)
        m = both(m, {__shfl_xor_sync(~0u, m.most, step), __shfl_xor_sync(~0u, m.squares, step)});
    return m;
}

/* What a token's numbers, times `norm`, are multiplied by, and its results. */
struct scale {
    float by, back;
};

__device__ __forceinline__ scale scale_of(measured m, const tokens_args &a)
{
    const float factor = fitting_factor(m.most);
    const float rms = a.norm ? rsqrtf(m.squares / (float)a.n_in + a.epsilon) : 1.0f;
    return {factor, rms / (factor * SMALLEST)};
}

/* A block a place: tokens, and zeros behind them. */
template <class Type> __global__ void __launch_bounds__(MAKERS) tokens_kernel(const tokens_args a)
{
    __shared__ measured of_warps[MAKERS / SQZ_WARP];
    const uint32_t token = blockIdx.x;
    const float *const in = a.in + (size_t)token * a.n_in;
    const bool exists = token < a.n_tokens;
    float x[PART] = {0};
    measured m = {0.0f, 0.0f};
    sqz_let_next_start();
    sqz_wait_for_previous();
    for (uint32_t part = threadIdx.x; part < a.n_in / PART && exists; part += MAKERS) {
        take_part(in + part * PART, x);
        m = both(m, measure_part(a.norm, part, x));
    }
    m = measured_by_warp(m);
    if (threadIdx.x % SQZ_WARP == 0) of_warps[threadIdx.x / SQZ_WARP] = m;
    __syncthreads();
    m = {0.0f, 0.0f};
    for (int w = 0; w < MAKERS / SQZ_WARP; w++) m = both(m, of_warps[w]);
    const scale s = scale_of(m, a);
    for (uint32_t part = threadIdx.x; part < a.n_in / PART; part += MAKERS) {
        if (exists) {
            take_part(in + part * PART, x);
            measure_part(a.norm, part, x);
        }
#pragma unroll
        for (int i = 0; i < PART; i++) x[i] *= s.by;
        put_part<Type>(a.to, part, token, x);
    }
    if (threadIdx.x == 0) a.back[token] = s.back;
}

/* ---- Products ------------------------------------------------------------------------------ */

struct matrix {
    const uint8_t *weights;
    float *out;
    const float *add; /* or NULL */
    uint32_t n_out, add_stride, first_tile;
};

struct project_args {
    struct matrix matrices[SQZ_MOST_PROJECTIONS];
    uint32_t n_matrices, n_tiles; /* of all; of one where gated */
    uint32_t n_in, n_tokens, n_rounds;
    bool gated;
    tokens_args tokens; /* made ready, where they are not kept */
};

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

/* Halves of sums. */
template <class Type> __host__ __device__ size_t sums_of(uint32_t n_in, uint32_t n_places)
{
    return (size_t)n_in / CHUNK * n_places * 16 * Type::HALVES;
}

template <class Type> size_t kept_bytes(uint32_t n_in, uint32_t n_tokens)
{
    return ((size_t)n_in * n_tokens + sums_of<Type>(n_in, n_tokens)) * sizeof(__half) +
           KEPT_NUMBERS / KEPT_STEP * sizeof(measured);
}

/* Rows of tile m of a round. */
template <int MT> struct tile_rows {
    const uint8_t *weights;
    __device__ tile_rows(const project_args &a, uint32_t round, int m, size_t row_bytes)
    {
        uint32_t tile, k = 0;
        if (a.gated) {
            const int half = MT > 1 ? MT / 2 : 1;
            tile = min(round * half + m % half, a.n_tiles - 1);
            k = m / half;
        } else {
            tile = min(round * MT + m, a.n_tiles - 1);
            while (k + 1 < a.n_matrices && tile >= a.matrices[k + 1].first_tile) k++;
            tile -= a.matrices[k].first_tile;
        }
        weights = a.matrices[k].weights + (size_t)tile * TILE * row_bytes;
    }
};

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

__device__ __forceinline__ void add_scaled(float (&sum)[4], const float (&c)[4], float low, float high)
{
    sum[0] += low * c[0];
    sum[1] += low * c[1];
    sum[2] += high * c[2];
    sum[3] += high * c[3];
}

/* One part: rows g and g + 8 of a tile with a group of tokens. */
template <class Type>
__device__ __forceinline__ void multiply_part(float (&sum)[4], const pair_of_parts &low, const pair_of_parts &high,
                                              int i, uint4 x)
{
    const uint4 a = low.codes[i], b = high.codes[i];
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f}, d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (Type::HALVES == 1) {
        sqz_mma_chunk<sqz_f16>(c, a, b, x);
        add_scaled(sum, c, low.factor[i][0], high.factor[i][0]);
        return;
    }
    sqz_mma<sqz_f16>(c, a.x, b.x, a.y, b.y, x.x, x.y);
    sqz_mma<sqz_f16>(d, a.z, b.z, a.w, b.w, x.z, x.w);
    add_scaled(sum, c, low.factor[i][0], high.factor[i][0]);
    add_scaled(sum, d, low.factor[i][1], high.factor[i][1]);
}

/* What a tile's results are more than its codes' (struct correction). Of 8 sums, what was left takes the places of the
 * other 8. */
template <class Type, int NT>
__device__ __forceinline__ void correct(float (&sums)[NT][4], const uint8_t *row, const chunk_of_tokens<Type, NT> &x)
{
    const float UNIT = SMALLEST / SUM_SCALE;
    const uint32_t t = threadIdx.x % 4;
    const correction low = Type::less(row, t), high = Type::less(row + 8 * Type::PITCH, t);
    const int other = Type::HALVES - 1;
#pragma unroll
    for (int j = 0; j < NT; j++) {
        float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        sqz_mma<sqz_f16>(c, low.numbers[0], high.numbers[0], low.numbers[other], high.numbers[other], x.sums[j][0],
                         x.sums[j][1]);
        if (Type::HALVES == 2)
            sqz_mma<sqz_f16>(c, low.numbers[0], high.numbers[0], low.numbers[1], high.numbers[1], x.sums[j][2 * other],
                             x.sums[j][2 * other + 1]);
        add_scaled(sums[j], c, UNIT * low.factor, UNIT * high.factor);
    }
}

/* A tile's chunk with all tokens. */
template <class Type, int NT>
__device__ __forceinline__ void multiply_tile(float (&sums)[NT][4], const uint8_t *stage, uint32_t shift,
                                              const chunk_of_tokens<Type, NT> &x)
{
    const uint32_t lane = threadIdx.x % SQZ_WARP, g = lane / 4, t = lane % 4;
    const uint8_t *const row = stage + g * Type::PITCH + shift;
#pragma unroll
    for (int p = 0; p < PARTS / 2; p++) {
        const pair_of_parts low = Type::pair(row, p, t), high = Type::pair(row + 8 * Type::PITCH, p, t);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < NT; j++) multiply_part<Type>(sums[j], low, high, i, x.numbers[2 * p + i][j]);
    }
    correct<Type, NT>(sums, row, x);
}

/* The tokens to shared memory, from registers: a thread has so many parts, and a warp's are of one token. */
template <class Type>
__device__ __forceinline__ void keep_tokens(const tokens_args &a, const places &to, measured *of_warps, float *back)
{
    enum { THREADS = Type::WARPS * SQZ_WARP, EACH = KEPT_NUMBERS / PART / THREADS };
    const uint32_t n_parts = a.n_in / PART, n = n_parts * a.n_tokens;
    float x[EACH][PART];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const uint32_t own = threadIdx.x + i * THREADS;
        measured m = {0.0f, 0.0f};
        if (own < n) {
            take_part(a.in + (size_t)own * PART, x[i]);
            m = measure_part(a.norm, own % n_parts, x[i]);
        }
        m = measured_by_warp(m);
        if (own < n && own % SQZ_WARP == 0) of_warps[own / SQZ_WARP] = m;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const uint32_t own = threadIdx.x + i * THREADS;
        if (own >= n) continue;
        const uint32_t token = own / n_parts, part = own % n_parts, each = n_parts / SQZ_WARP;
        measured m = {0.0f, 0.0f};
        for (uint32_t w = token * each; w < (token + 1) * each; w++) m = both(m, of_warps[w]);
        const scale s = scale_of(m, a);
#pragma unroll
        for (int k = 0; k < PART; k++) x[i][k] *= s.by;
        put_part<Type>(to, part, token, x[i]);
        if (part == 0) back[token] = s.back;
    }
    __syncthreads();
}

__device__ __forceinline__ float gated(float gate, float up)
{
    return gate / (1.0f + expf(-gate)) * up;
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
    uint32_t tile = round * (a.gated ? MT / 2 : MT) + row / TILE, k = 0;
    if (tile >= a.n_tiles) return;
    float x = back * added_up<MT, WARPS>(results, row, place);
    if (a.gated) x = gated(x, back * added_up<MT, WARPS>(results, row + MT / 2 * TILE, place));
    else
        while (k + 1 < a.n_matrices && tile >= a.matrices[k + 1].first_tile) k++;
    const struct matrix &m = a.matrices[k];
    const uint32_t o = (tile - (a.gated ? 0 : m.first_tile)) * TILE + row % TILE;
    if (m.add) x += m.add[(size_t)token * m.add_stride + o];
    m.out[(size_t)token * m.n_out + o] = x;
}

/* A round's results, one group of tokens after another, by turns in two buffers. */
template <int MT, int NT, int WARPS>
__device__ __forceinline__ void put_round(const project_args &a, const float (&sums)[MT][NT][4], float *buffers,
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
            own[m * TILE] = sums[m][j][0];
            own[m * TILE + results_pitch<MT>()] = sums[m][j][1];
            own[m * TILE + 8] = sums[m][j][2];
            own[m * TILE + results_pitch<MT>() + 8] = sums[m][j][3];
        }
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < n_rows * n_places; i += WARPS * SQZ_WARP) {
            const uint32_t place = i / n_rows, token = j * GROUP + place;
            put_result<MT, WARPS>(a, results, round, i % n_rows, place, token, back[token]);
        }
    }
}

/* KEPT: tokens are in shared memory. */
template <class Type, int MT, int NT, bool KEPT>
__global__ void __launch_bounds__(Type::WARPS *SQZ_WARP, 1) project_kernel(const project_args a)
{
    extern __shared__ __align__(16) uint8_t shared[];
    __shared__ float kept_back[KEPT_NUMBERS / KEPT_STEP];
    float *const buffers = (float *)(shared + ring_bytes<Type>());
    places x = a.tokens.to;
    const float *back = a.tokens.back;
    ring<Type, MT> weights(a, shared);
    sqz_let_next_start();
    sqz_wait_for_previous();
    if (KEPT) {
        uint8_t *const kept = shared + ring_bytes<Type>() + results_bytes<Type, MT>();
        x.numbers = (uint4 *)kept;
        x.sums = (__half *)kept + (size_t)a.n_in * a.n_tokens;
        x.n_places = a.n_tokens;
        keep_tokens<Type>(a.tokens, x, (measured *)(x.sums + sums_of<Type>(a.n_in, a.n_tokens)), kept_back);
        back = kept_back;
    }
    uint32_t turn = 0, taken = ~0u;
    chunk_of_tokens<Type, NT> now;
    for (uint32_t round = blockIdx.x; round < a.n_rounds; round += gridDim.x) {
        float sums[MT][NT][4] = {};
        for (uint32_t chunk = threadIdx.x / SQZ_WARP; chunk < a.tokens.n_in / CHUNK; chunk += Type::WARPS) {
            const uint32_t shift = (uint32_t)((size_t)chunk * Type::BYTES & 15);
            if (chunk != taken) now.take(x, taken = chunk); /* rounds of one chunk each have the same */
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const uint8_t *const stage = weights.arrived();
                weights.fetch(a, (m + STAGES - 1) % MT);
                multiply_tile<Type, NT>(sums[m], stage, shift, now);
            }
        }
        put_round<MT, NT, Type::WARPS>(a, sums, buffers, &turn, round, back);
    }
}

/* ---- Launching ------------------------------------------------------------------------------ */

template <class Type> size_t shared_bytes(int mt, bool kept, uint32_t n_in, uint32_t n_tokens)
{
    return ring_bytes<Type>() + (mt == 1 ? results_bytes<Type, 1>() : results_bytes<Type, 2>()) +
           (kept ? kept_bytes<Type>(n_in, n_tokens) : 0);
}

bool enough_shared(void)
{
    int device = 0, most = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
           most >= MOST_SHARED + 1024;
}

/* How a call goes: tiles and groups of tokens of a block, whether it keeps tokens in shared memory. */
struct plan {
    int mt, nt;
    bool kept;
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
    p.nt = a->n_tokens <= GROUP ? 1 : 2;
    p.mt = p.nt == 1 && !a->gated ? tiles_at_once(p.n_tiles) : 2;
    p.kept = (size_t)a->n_in * a->n_tokens <= KEPT_NUMBERS && a->n_in % KEPT_STEP == 0 &&
             shared_bytes<Type>(p.mt, true, a->n_in, a->n_tokens) <= MOST_SHARED;
    p.n_rounds = rounds_of(p.n_tiles, a->gated ? (uint32_t)p.mt / 2 : (uint32_t)p.mt);
    return p;
}

template <class Type, int MT, int NT, bool KEPT>
enum sqz_status launch(const project_args &p, bool after_ours, void *stream)
{
    const size_t bytes = shared_bytes<Type>(MT, KEPT, p.n_in, p.n_tokens);
    const uint32_t n = (uint32_t)sqz_device_get().n_multiprocessors;
    return sqz_launch(project_kernel<Type, MT, NT, KEPT>, dim3(p.n_rounds < n ? p.n_rounds : n), Type::WARPS * SQZ_WARP,
                      bytes, 1, after_ours, p, stream);
}

template <class Type>
enum sqz_status launch_planned(const struct plan &plan, const project_args &p, bool after_ours, void *stream)
{
    if (plan.kept && plan.mt == 1) return launch<Type, 1, 1, true>(p, after_ours, stream);
    if (plan.kept) return launch<Type, 2, 1, true>(p, after_ours, stream);
    if (plan.mt == 1) return launch<Type, 1, 1, false>(p, after_ours, stream);
    if (plan.nt == 1) return launch<Type, 2, 1, false>(p, after_ours, stream);
    return launch<fewer_warps<Type>, 2, 2, false>(p, after_ours, stream);
}

/* The tokens, and where the kernels read them from where they do not keep them. */
template <class Type>
struct tokens_args carve(struct sqz_arena *arena, const struct sqz_gpu_projections *a, const struct plan &plan)
{
    const uint32_t n = (uint32_t)plan.nt * GROUP;
    struct tokens_args t = {};
    if (!plan.kept) {
        t.to.numbers = (uint4 *)sqz_arena_take(arena, n, a->n_in, sizeof(__half));
        t.to.sums = (__half *)sqz_arena_take(arena, sums_of<Type>(a->n_in, n), 1, sizeof(__half));
        t.to.n_places = n;
        t.back = (float *)sqz_arena_take(arena, n, 1, sizeof(float));
    }
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
    if (!plan.kept && !a->same_in) {
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
