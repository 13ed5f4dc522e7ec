/*
 * What the kernels for products of few tokens have in common (projections.cu, projections_split.cu): types of weights as
 * tensor cores take them, tokens made ready for them, and what becomes of a result.
 *
 * A code n of 4, 6 or 8 bits is left where it lies in its half word: as F16 that is n 2^-24, a subnormal number,
 * which tensor cores multiply exactly. What codes are less, or values at least, comes to a product of factors with
 * the sums of the tokens' numbers, once for each chunk, by tensor cores as well; factors of parts are F32. So
 * weights are exact, tokens are F16, and sums F32.
 *
 * A token's numbers are multiplied by a power of two that makes the largest just fit: F16 holds what is 2^-28 of
 * it.
 */
#ifndef SQZ_LIB_CUDA_PROJECTIONS_CUH
#define SQZ_LIB_CUDA_PROJECTIONS_CUH

#include "calls.h"
#include "copies.cuh"
#include "device.cuh"
#include "weights.h"

namespace sqz_few
{

enum {
    MAKERS = 512, /* threads of a block that makes tokens ready */
    CHUNK = 256,  /* inputs of a row that a warp takes at once */
    PART = 32,    /* of them share a factor, or two halves have one each */
    PARTS = CHUNK / PART,
    TILE = 16, /* rows of a tensor core's product, */
    GROUP = 8, /* and tokens */
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
    bool by_words; /* numbers are [part][n_places / 8][4 words][8 places][4 lanes] words instead */
};

#define SUM_SCALE 0x1p-6f

/* What a token's numbers are multiplied by, and what its results are then. */
__device__ __forceinline__ float fitting_factor(float most)
{
    const int exponent = max((int)(__float_as_uint(most) >> 23 & 255) - 127, -100);
    return most > 0 ? __uint_as_float((uint32_t)(13 - exponent + 127) << 23) : 1.0f;
}

/* What one thread makes ready of a token: the eight numbers of a part that a lane t multiplies, which are four and four
 * neighbours; unit u of a token: part u / 4, lane u % 4. */
template <class Type> struct eight {
    enum { STEP = Type::place(1, 0) - Type::place(0, 0), SECOND = STEP == 4 ? 16 : 4 };

    float x[8];

    /* Which of x is the k-th that the lane multiplies. */
    static __device__ constexpr int local(int k)
    {
        return Type::place(0, k) < 4 ? Type::place(0, k) : Type::place(0, k) - SECOND + 4;
    }
    __device__ __forceinline__ void take(const float *from, uint32_t unit)
    {
        const float4 *const at = (const float4 *)(from + unit / 4 * PART + unit % 4 * STEP);
        const float4 a = at[0], b = at[SECOND / 4];
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
        x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    }
    /* Times `by`. All lanes of a warp, whose units are neighbours, of one token. */
    __device__ __forceinline__ void put(const places &to, uint32_t unit, uint32_t token, float factor) const
    {
        const uint32_t part = unit / 4, t = unit % 4;
        float sums[2] = {0, 0};
        uint32_t packed[4];
#pragma unroll
        for (int k = 0; k < 8; k += 2) {
            const int first = local(k), second = local(k + 1);
            const float by = Type::divided(k) ? 0.0625f : 1.0f, back = Type::divided(k) ? 16.0f : 1.0f;
            packed[k / 2] = sqz_f16::pack(x[first] * factor * by, x[second] * factor * by);
            const float2 rounded = sqz_f16::unpack(packed[k / 2]);
            sums[Type::HALVES == 2 ? first / 4 : 0] += back * rounded.x;
            sums[Type::HALVES == 2 ? second / 4 : 0] += back * rounded.y;
        }
        const size_t first = (size_t)part * to.n_places * 4; /* numbers before the part's */
        if (to.by_words)
#pragma unroll
            for (int w = 0; w < 4; w++)
                ((uint32_t *)(to.numbers + first))[(token / GROUP * 4 + w) * SQZ_WARP + token % GROUP * 4 + t] =
                    packed[w];
        else to.numbers[first + token * 4 + t] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
#pragma unroll
        for (int h = 0; h < Type::HALVES; h++) {
            float sum = sums[h] * SUM_SCALE;
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (t == 0) put_sum(to, part, token, h, sum);
        }
    }
    static __device__ __forceinline__ void put_sum(const places &to, uint32_t part, uint32_t token, int h, float sum)
    {
        const uint32_t k = part % PARTS * Type::HALVES + h, lane = k % PARTS / 2, second = k / PARTS;
        __half *const at =
            to.sums + (((size_t)part / PARTS * to.n_places + token) * 4 + lane) * 4 * Type::HALVES + 2 * second + k % 2;
        const __half rounded = __float2half_rn(sum);
        at[0] = rounded;
        at[2 * Type::HALVES] = __float2half_rn(sum - __half2float(rounded));
    }
};

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

/* Multiplies a unit by `norm`, and measures it: squares before, the largest after. Without one, squares are not asked
 * for. */
template <class Type> __device__ __forceinline__ measured measure(const float *norm, uint32_t unit, eight<Type> *e)
{
    measured m = {0.0f, 0.0f};
    if (norm) {
        eight<Type> factors;
        factors.take(norm, unit);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            m.squares += e->x[i] * e->x[i];
            e->x[i] *= factors.x[i];
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) m.most = fmaxf(m.most, fabsf(e->x[i]));
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
    const uint32_t n_units = a.n_in / 8; /* whole warps' */
    eight<Type> e = {};
    measured m = {0.0f, 0.0f};
    sqz_let_next_start();
    sqz_wait_for_previous();
    for (uint32_t unit = threadIdx.x; unit < n_units && exists; unit += MAKERS) {
        e.take(in, unit);
        m = both(m, measure(a.norm, unit, &e));
    }
    m = measured_by_warp(m);
    if (threadIdx.x % SQZ_WARP == 0) of_warps[threadIdx.x / SQZ_WARP] = m;
    __syncthreads();
    m = {0.0f, 0.0f};
    for (int w = 0; w < MAKERS / SQZ_WARP; w++) m = both(m, of_warps[w]);
    const scale s = scale_of(m, a);
    for (uint32_t unit = threadIdx.x; unit < n_units; unit += MAKERS) {
        if (exists && n_units > MAKERS) {
            e.take(in, unit);
            measure(a.norm, unit, &e);
        }
        e.put(a.to, unit, token, s.by);
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
    tokens_args tokens; /* made ready */
};

/* Halves of sums. */
template <class Type> __host__ __device__ size_t sums_of(uint32_t n_in, uint32_t n_places)
{
    return (size_t)n_in / CHUNK * n_places * 16 * Type::HALVES;
}

/* The matrix that a tile of all of them belongs to. */
__device__ __forceinline__ uint32_t matrix_of(const project_args &a, uint32_t tile)
{
    uint32_t k = 0;
    while (k + 1 < a.n_matrices && tile >= a.matrices[k + 1].first_tile) k++;
    return k;
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
            k = matrix_of(a, tile);
            tile -= a.matrices[k].first_tile;
        }
        weights = a.matrices[k].weights + (size_t)tile * TILE * row_bytes;
    }
};

__device__ __forceinline__ void add_scaled(float (&sum)[4], const float (&c)[4], float low, float high)
{
    sum[0] += low * c[0];
    sum[1] += low * c[1];
    sum[2] += high * c[2];
    sum[3] += high * c[3];
}

/* One part: rows g and g + 8 of each tile with groups [first, first + N) of tokens. Products of a kind stand together, so
 * that none waits for the one before it. */
template <class Type, int MT, int N, int NT>
__device__ __forceinline__ void multiply_part(float (&sums)[MT][NT][4], int first, const pair_of_parts (&low)[MT],
                                              const pair_of_parts (&high)[MT], int i, const uint4 (&x)[N])
{
    float c[MT][N][4] = {}, d[MT][N][4] = {};
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const uint4 a = low[m].codes[i], b = high[m].codes[i];
            sqz_mma<sqz_f16>(c[m][j], a.x, b.x, a.y, b.y, x[j].x, x[j].y);
        }
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const uint4 a = low[m].codes[i], b = high[m].codes[i];
            sqz_mma<sqz_f16>(Type::HALVES == 1 ? c[m][j] : d[m][j], a.z, b.z, a.w, b.w, x[j].z, x[j].w);
        }
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int m = 0; m < MT; m++) {
            add_scaled(sums[m][first + j], c[m][j], low[m].factor[i][0], high[m].factor[i][0]);
            if (Type::HALVES == 2) add_scaled(sums[m][first + j], d[m][j], low[m].factor[i][1], high[m].factor[i][1]);
        }
}

/* What a tile's results are more than its codes' (struct correction), of a group of tokens whose sums are x. Of 8 sums,
 * what was left takes the places of the other 8. */
template <class Type>
__device__ __forceinline__ void correct(float (&sum)[4], const correction &low, const correction &high,
                                        const uint32_t (&x)[2 * Type::HALVES])
{
    const float UNIT = SMALLEST / SUM_SCALE;
    const int other = Type::HALVES - 1;
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    sqz_mma<sqz_f16>(c, low.numbers[0], high.numbers[0], low.numbers[other], high.numbers[other], x[0], x[1]);
    if (Type::HALVES == 2)
        sqz_mma<sqz_f16>(c, low.numbers[0], high.numbers[0], low.numbers[1], high.numbers[1], x[2 * other],
                         x[2 * other + 1]);
    add_scaled(sum, c, UNIT * low.factor, UNIT * high.factor);
}

__device__ __forceinline__ float sum_of_warp(float x)
{
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

__device__ __forceinline__ float gated(float gate, float up)
{
    return gate / (1.0f + expf(-gate)) * up;
}

/* A row's result of one token, complete. */
__device__ __forceinline__ void put_number(const matrix &m, uint32_t token, uint32_t row, float x)
{
    if (m.add) x += m.add[(size_t)token * m.add_stride + row];
    m.out[(size_t)token * m.n_out + row] = x;
}

} // namespace sqz_few

#endif
