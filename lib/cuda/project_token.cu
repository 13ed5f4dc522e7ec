/*
 * Products of a single token with quantised weights (calls.h, struct sqz_gpu_projections): less work for each
 * weight than tensor cores take, which multiply eight tokens or none.
 *
 * The token's numbers become integers of 16 bits, as many steps of each part of 32, in two planes of 8 bits;
 * weights are multiplied with both by dp4a. So a weight is exact, and a number is to 2^-16 of the largest of its
 * part.
 *
 * The block makes the integers together, in the place where the last weights of the first round will come. A warp has
 * a slice of 2,048 inputs, two parts a lane, in registers, and goes through rows of the matrices, four
 * at a time, whose weights come to shared memory by asynchronous copies that begin before the kernel in front has
 * ended. Slices' sums meet in shared memory in the end, so that there is one barrier in all.
 */
#include "projections.cuh"

namespace
{

using sqz_few::word_at;

enum {
    WARPS = 8,
    THREADS = WARPS * SQZ_WARP,
    PART = 32,
    PAIR = 2 * PART, /* of a lane */
    SLICE = PAIR * SQZ_WARP,
    PAIR_WORDS = 36,         /* of a pair's inputs in shared memory: lanes' lie in different banks */
    AT_ONCE = 8,             /* loads of a thread */
    ROWS = 4,                /* at once */
    RING_BYTES = 112 * 1024, /* at most, where two kernels are to share a multiprocessor, */
    MOST_SHARED = 226 * 1024,
};

/* A lane's 64 inputs: as integers, times `step`; whole: their sums. */
struct inputs {
    int high[2][PART / 4], low[2][PART / 4], whole[2];
    float step[2];
};

/* ---- Types of weights ------------------------------------------------------------------ */

__device__ __forceinline__ float half_of(uint32_t bits)
{
    return __half2float(__ushort_as_half((unsigned short)bits));
}

/* Codes of 4 neighbours with a part's inputs 4 j to 4 j + 3. */
__device__ __forceinline__ void multiply(int *high, int *low, const inputs &x, int part, int j, uint32_t codes)
{
    *high = __dp4a((int)codes, x.high[part][j], *high);
    *low = __dp4a((int)codes, x.low[part][j], *low);
}

__device__ __forceinline__ float joined(int high, int low)
{
    return (float)(high * 256 + low);
}

/* 16 bytes of nibbles: the low ones are inputs 0 to 15 of the part, the high ones the others. `less` of each code. */
__device__ __forceinline__ float nibbles(const uint32_t (&w)[4], const inputs &x, int part, int less)
{
    int high = 0, low = -less * x.whole[part];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        multiply(&high, &low, x, part, j, w[j] & 0x0f0f0f0f);
        multiply(&high, &low, x, part, j + 4, w[j] >> 4 & 0x0f0f0f0f);
    }
    return joined(high, low) * x.step[part];
}

/* BYTES of a slice. sum(): what lane's weights, in the slice's row, come to. */
struct q4_0 {
    enum { BYTES = SLICE / 32 * 18 };
    static __device__ __forceinline__ float sum(const uint8_t *row, uint32_t lane, const inputs &x)
    {
        const uint8_t *const at = row + 36 * lane;
        uint32_t w[9];
#pragma unroll
        for (int i = 0; i < 9; i++) w[i] = word_at(at + 4 * i);
        const uint32_t first[4] = {__byte_perm(w[0], w[1], 0x5432), __byte_perm(w[1], w[2], 0x5432),
                                   __byte_perm(w[2], w[3], 0x5432), __byte_perm(w[3], w[4], 0x5432)};
        const uint32_t second[4] = {w[5], w[6], w[7], w[8]};
        return half_of(w[0]) * nibbles(first, x, 0, 8) + half_of(w[4] >> 16) * nibbles(second, x, 1, 8);
    }
};

struct q4_1 {
    enum { BYTES = SLICE / 32 * 20 };
    static __device__ __forceinline__ float sum(const uint8_t *row, uint32_t lane, const inputs &x)
    {
        const uint2 *const at = (const uint2 *)(row + 40 * lane);
        const uint2 w[5] = {at[0], at[1], at[2], at[3], at[4]};
        const uint32_t first[4] = {w[0].y, w[1].x, w[1].y, w[2].x}, second[4] = {w[3].x, w[3].y, w[4].x, w[4].y};
        const float least = half_of(w[0].x >> 16) * x.step[0] * (float)x.whole[0] +
                            half_of(w[2].y >> 16) * x.step[1] * (float)x.whole[1];
        return half_of(w[0].x) * nibbles(first, x, 0, 0) + half_of(w[2].y) * nibbles(second, x, 1, 0) + least;
    }
};

struct q8_0 {
    enum { BYTES = SLICE / 32 * 34 };
    static __device__ __forceinline__ float bytes(const uint32_t (&w)[8], const inputs &x, int part)
    {
        int high = 0, low = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) multiply(&high, &low, x, part, j, w[j]);
        return joined(high, low) * x.step[part];
    }
    static __device__ __forceinline__ float sum(const uint8_t *row, uint32_t lane, const inputs &x)
    {
        const uint8_t *const at = row + 68 * lane;
        uint32_t w[17], first[8], second[8];
#pragma unroll
        for (int i = 0; i < 17; i++) w[i] = word_at(at + 4 * i);
#pragma unroll
        for (int i = 0; i < 8; i++) first[i] = __byte_perm(w[i], w[i + 1], 0x5432), second[i] = w[i + 9];
        return half_of(w[0]) * bytes(first, x, 0) + half_of(w[8] >> 16) * bytes(second, x, 1);
    }
};

/* Four lanes have a block of 256. */
struct q4_k {
    enum { BYTES = SLICE / 256 * 144 };
    static __device__ __forceinline__ float sum(const uint8_t *row, uint32_t lane, const inputs &x)
    {
        const uint8_t *const block = row + 144 * (lane / 4);
        const uint4 header = *(const uint4 *)block, *const at = (const uint4 *)(block + 16 + 32 * (lane % 4));
        const uint4 a = at[0], b = at[1];
        const uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        float sums = 0.0f;
#pragma unroll
        for (int part = 0; part < 2; part++) {
            int high = 0, low = 0;
            float factor, least;
#pragma unroll
            for (int j = 0; j < 8; j++) multiply(&high, &low, x, part, j, w[j] >> 4 * part & 0x0f0f0f0f);
            numbers(header, 2 * (lane % 4) + part, &factor, &least);
            sums += x.step[part] * (half_of(header.x) * factor * joined(high, low) -
                                    half_of(header.x >> 16) * least * (float)x.whole[part]);
        }
        return sums;
    }
    static __device__ __forceinline__ uint32_t byte_of(uint32_t word, uint32_t i)
    {
        return word >> 8 * i & 255;
    }
    /* sqz_weights_part() of a header in registers. */
    static __device__ __forceinline__ void numbers(const uint4 &header, uint32_t j, float *factor, float *least)
    {
        const uint32_t i = j % 4, low = byte_of(header.y, i), middle = byte_of(header.z, i),
                       high = byte_of(header.w, i);
        *factor = (float)(j < 4 ? low & 63 : (high & 15) | low >> 6 << 4);
        *least = (float)(j < 4 ? middle & 63 : high >> 4 | middle >> 6 << 4);
    }
};

/* ---- The token --------------------------------------------------------------------------- */

/* Numbers to integers: x times `by`, to the nearest, both planes of four of them. */
__device__ __forceinline__ void put_four(const float *x, float by, int *high, int *low)
{
    const float MAGIC = 12582912.0f; /* 1.5 2^23: the integer is in the lowest bits of the sum */
    uint32_t u[4];
#pragma unroll
    for (int i = 0; i < 4; i++) u[i] = __float_as_uint(fmaf(x[i], by, MAGIC)) - 0x4b400000u + 128;
    const uint32_t lows = __byte_perm(__byte_perm(u[0], u[1], 0x0040), __byte_perm(u[2], u[3], 0x0040), 0x5410);
    const uint32_t highs = __byte_perm(__byte_perm(u[0], u[1], 0x0051), __byte_perm(u[2], u[3], 0x0051), 0x5410);
    *low = (int)(lows ^ 0x80808080u);
    *high = (int)highs;
}

/* Four neighbours, of eight lanes' part: number `four` of the token's fours. */
__device__ __forceinline__ void put_part(const float (&x)[4], uint32_t four, uint32_t *to)
{
    float most = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
#pragma unroll
    for (int step = 4; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    int high, low;
    put_four(x, most > 0x1p-100f ? 32512.0f / most : 0.0f, &high, &low);
    int whole = __dp4a(high, 0x01010101, 0) * 256 + __dp4a(low, 0x01010101, 0);
#pragma unroll
    for (int step = 4; step; step /= 2) whole += __shfl_xor_sync(~0u, whole, step);
    const uint32_t j = four % 8, part = four / 8 % 2;
    uint32_t *const pair = to + four / 16 * PAIR_WORDS;
    pair[8 * part + j] = (uint32_t)high;
    pair[16 + 8 * part + j] = (uint32_t)low;
    if (j > 0) return;
    pair[32 + part] = (uint32_t)whole;
    pair[34 + part] = __float_as_uint(most * (1.0f / 32512.0f));
}

/* All inputs, four a thread at a time, to shared memory, where take_inputs() finds them. Returns the thread's sum of
 * their squares, before `norm`, where there is one. */
__device__ __forceinline__ float make_inputs(const float *in, const float *norm, uint32_t n_in, uint32_t *to)
{
    float squares = 0.0f;
    for (uint32_t first = threadIdx.x; first < n_in / 4; first += AT_ONCE * THREADS) { /* whole warps' */
        float4 x[AT_ONCE], factors[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const uint32_t four = first + i * THREADS;
            if (four < n_in / 4) x[i] = ((const float4 *)in)[four];
            if (four < n_in / 4 && norm) factors[i] = ((const float4 *)norm)[four];
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const uint32_t four = first + i * THREADS;
            if (four >= n_in / 4) break;
            float y[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
            if (norm) {
                squares += y[0] * y[0] + y[1] * y[1] + y[2] * y[2] + y[3] * y[3];
                y[0] *= factors[i].x, y[1] *= factors[i].y, y[2] *= factors[i].z, y[3] *= factors[i].w;
            }
            put_part(y, four, to);
        }
    }
    return squares;
}

__device__ __forceinline__ inputs take_inputs(const uint32_t *from, uint32_t pair)
{
    const uint4 *const at = (const uint4 *)(from + pair * PAIR_WORDS);
    inputs x;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint4 v = at[i];
        int(&to)[2][PART / 4] = i < 4 ? x.high : x.low;
        to[i / 2 % 2][i % 2 * 4] = (int)v.x, to[i / 2 % 2][i % 2 * 4 + 1] = (int)v.y;
        to[i / 2 % 2][i % 2 * 4 + 2] = (int)v.z, to[i / 2 % 2][i % 2 * 4 + 3] = (int)v.w;
    }
    const uint4 v = at[8];
    x.whole[0] = (int)v.x, x.whole[1] = (int)v.y;
    x.step[0] = __uint_as_float(v.z), x.step[1] = __uint_as_float(v.w);
    return x;
}

/* ---- Rows ---------------------------------------------------------------------------------- */

struct matrix {
    const uint8_t *weights;
    float *out;
    const float *add; /* or NULL */
    uint32_t n_out, first_unit;
};

struct token_args {
    struct matrix matrices[SQZ_MOST_PROJECTIONS];
    uint32_t n_matrices, n_units; /* of ROWS rows: of all matrices; of one where gated */
    uint32_t n_in, n_slices, row_bytes;
    bool gated;
    const float *in, *norm;
    float epsilon;
};

/* What a block has: units, each one or, where gated, two runs of ROWS rows. */
struct share {
    uint32_t first, n_runs;
    __device__ __forceinline__ share(const token_args &a)
    {
        first = (uint32_t)((uint64_t)a.n_units * blockIdx.x / gridDim.x);
        n_runs = ((uint32_t)((uint64_t)a.n_units * (blockIdx.x + 1) / gridDim.x) - first) * (a.gated ? 2 : 1);
    }
};

__device__ __forceinline__ uint32_t matrix_of(const token_args &a, uint32_t unit)
{
    uint32_t k = 0;
    while (k + 1 < a.n_matrices && unit >= a.matrices[k + 1].first_unit) k++;
    return k;
}

/* Weights of run number i of the block, from its rows' beginnings on. */
__device__ __forceinline__ const uint8_t *run_weights(const token_args &a, const share &s, uint32_t i)
{
    const uint32_t unit = s.first + (a.gated ? i / 2 : i), k = a.gated ? i % 2 : matrix_of(a, unit);
    return a.matrices[k].weights + (size_t)(unit - (a.gated ? 0 : a.matrices[k].first_unit)) * ROWS * a.row_bytes;
}

/* A warp's runs on their way to shared memory. */
template <class Type, int STAGES> struct ring {
    enum { SEGMENTS = Type::BYTES / 16, STAGE = ROWS * Type::BYTES, COPIES = ROWS * SEGMENTS / SQZ_WARP };
    uint8_t *base;                    /* the warp's place in a stage of all */
    uint32_t run, step, stage, bytes; /* of the slice */

    __device__ __forceinline__ void fetch(const token_args &a, const share &s, uint32_t from)
    {
        if (run < s.n_runs) {
            const uint8_t *const rows = run_weights(a, s, run) + from;
            uint8_t *const to = base + stage * WARPS * STAGE;
#pragma unroll
            for (int i = 0; i < COPIES; i++) {
                const uint32_t piece = threadIdx.x % SQZ_WARP + i * SQZ_WARP, row = piece / SEGMENTS;
                const uint32_t at = piece % SEGMENTS * 16;
                if (at < bytes) sqz_copy_16(to + row * Type::BYTES + at, rows + (size_t)row * a.row_bytes + at);
            }
        }
        sqz_close_copies();
        run += step;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    __device__ __forceinline__ const uint8_t *arrived()
    {
        sqz_wait_for_copies<STAGES - 2>();
        __syncwarp();
        return base + (stage + 1 == STAGES ? 0 : stage + 1) * WARPS * STAGE;
    }
};

/* Each lane's sums of four rows: lane 8 i has row i's of the warp. */
__device__ __forceinline__ float summed(const float (&x)[ROWS])
{
    const bool upper = threadIdx.x & 16, second = threadIdx.x & 8;
    const float a = (upper ? x[2] : x[0]) + __shfl_xor_sync(~0u, upper ? x[0] : x[2], 16);
    const float b = (upper ? x[3] : x[1]) + __shfl_xor_sync(~0u, upper ? x[1] : x[3], 16);
    float sum = (second ? b : a) + __shfl_xor_sync(~0u, second ? a : b, 8);
#pragma unroll
    for (int step = 4; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
}

/* Of a row of the block, all slices' sums. */
__device__ __forceinline__ float added_up(const float *sums, uint32_t row, uint32_t n_slices)
{
    float sum = 0.0f;
    for (uint32_t i = 0; i < n_slices; i++) sum += sums[row * n_slices + i];
    return sum;
}

__device__ __forceinline__ float root_factor(const token_args &a, const float *squares)
{
    if (!a.norm) return 1.0f;
    return rsqrtf(added_up(squares, 0, WARPS) / (float)a.n_in + a.epsilon);
}

/* Where a row of the block, number i of its results, goes. */
struct place {
    const matrix &m;
    uint32_t row;
    __device__ __forceinline__ place(const token_args &a, const share &s, uint32_t i)
        : m(a.matrices[a.gated ? 0 : matrix_of(a, s.first + i / ROWS)])
    {
        row = (s.first + i / ROWS - (a.gated ? 0 : m.first_unit)) * ROWS + i % ROWS;
    }
    __device__ __forceinline__ float added() const
    {
        return m.add ? m.add[row] : 0.0f;
    }
};

__device__ __forceinline__ uint32_t results_of(const token_args &a, const share &s)
{
    return s.n_runs / (a.gated ? 2 : 1) * ROWS;
}

/* first_added: to the thread's first row, asked for while there was something else to wait for. */
__device__ __forceinline__ void put_rows(const token_args &a, const share &s, const float *sums, float factor,
                                         float first_added)
{
    const uint32_t each = a.gated ? 2 : 1;
    for (uint32_t i = threadIdx.x; i < results_of(a, s); i += THREADS) {
        const place to(a, s, i);
        const uint32_t row = i / ROWS * each * ROWS + i % ROWS;
        float x = factor * added_up(sums, row, a.n_slices);
        if (a.gated) x = sqz_few::gated(x, factor * added_up(sums, row + ROWS, a.n_slices));
        to.m.out[to.row] = x + (i == threadIdx.x ? first_added : to.added());
    }
}

template <class Type, int STAGES> constexpr size_t ring_bytes()
{
    return (size_t)WARPS * STAGES * ROWS * Type::BYTES;
}

template <class Type, int STAGES> __global__ void __launch_bounds__(THREADS, 2) token_kernel(const token_args a)
{
    extern __shared__ __align__(16) uint8_t shared[];
    __shared__ float squares[WARPS];
    const uint32_t warp = threadIdx.x / SQZ_WARP, lane = threadIdx.x % SQZ_WARP, slice = warp % a.n_slices;
    const uint32_t n_groups = WARPS / a.n_slices, group = warp / a.n_slices, pair = slice * SQZ_WARP + lane;
    float *const sums = (float *)(shared + (size_t)WARPS * STAGES * ROWS * Type::BYTES);
    const share s(a);
    const uint32_t from = slice * Type::BYTES, left = a.row_bytes - from;
    ring<Type, STAGES> weights = {shared + (size_t)warp * ROWS * Type::BYTES, group < n_groups ? group : s.n_runs,
                                  n_groups, 0, left < Type::BYTES ? left : Type::BYTES};
    uint32_t *const numbers = (uint32_t *)(shared + (size_t)(STAGES - 1) * WARPS * ROWS * Type::BYTES);
    static_assert((size_t)WARPS * SQZ_WARP * PAIR_WORDS * 4 <= (size_t)WARPS * ROWS * Type::BYTES, "the last stage");
#pragma unroll
    for (int i = 0; i + 1 < STAGES; i++) weights.fetch(a, s, from);
    sqz_let_next_start();
    sqz_wait_for_previous();
    const float own = sqz_few::sum_of_warp(make_inputs(a.in, a.norm, a.n_in, numbers));
    if (lane == 0) squares[warp] = own;
    __syncthreads();
    inputs x = {};
    if (pair < a.n_in / PAIR) x = take_inputs(numbers, pair);
    const float first_added = threadIdx.x < results_of(a, s) ? place(a, s, threadIdx.x).added() : 0.0f;
    __syncthreads(); /* the last stage is filled now */
    for (uint32_t run = group; group < n_groups && run < s.n_runs; run += n_groups) {
        const uint8_t *const rows = weights.arrived();
        float row[ROWS];
        weights.fetch(a, s, from);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            row[r] = pair < a.n_in / PAIR ? Type::sum(rows + r * Type::BYTES, lane, x) : 0.0f;
        const float sum = summed(row);
        if (lane % 8 == 0) sums[(run * ROWS + lane / 8) * a.n_slices + slice] = sum;
    }
    __syncthreads();
    put_rows(a, s, sums, root_factor(a, squares), first_added);
}

/* ---- Launching ------------------------------------------------------------------------------ */

template <class Type> enum sqz_status launch(const struct sqz_gpu_projections *p, void *stream)
{
    const struct sqz_weights_block block = sqz_weights_block_of(p->type);
    const uint32_t n_multiprocessors = (uint32_t)sqz_device_get().n_multiprocessors;
    token_args a = {};
    for (uint32_t i = 0; i < p->n_matrices; i++) {
        a.matrices[i] = {(const uint8_t *)p->matrices[i].weights, p->matrices[i].out, p->matrices[i].add,
                         p->matrices[i].n_out, a.n_units};
        if (i == 0 || !p->gated) a.n_units += p->matrices[i].n_out / ROWS;
    }
    a.n_matrices = p->n_matrices;
    a.n_in = p->n_in;
    a.n_slices = (p->n_in + SLICE - 1) / SLICE;
    a.row_bytes = p->n_in / block.n * block.bytes;
    a.gated = p->gated;
    a.in = p->in;
    a.norm = p->norm;
    a.epsilon = p->norm_epsilon;
    if (a.n_slices > WARPS || n_multiprocessors == 0) return SQZ_ERROR_UNSUPPORTED;
    const uint32_t n_blocks = a.n_units < n_multiprocessors ? a.n_units : n_multiprocessors;
    const size_t rows = ((size_t)a.n_units / n_blocks + 1) * ROWS * (a.gated ? 2 : 1);
    const size_t results = rows * a.n_slices * sizeof(float);
    constexpr int STAGES = ring_bytes<Type, 3>() <= RING_BYTES ? 3 : 2;
    if (ring_bytes<Type, STAGES>() + results > MOST_SHARED) return SQZ_ERROR_UNSUPPORTED;
    return sqz_launch(token_kernel<Type, STAGES>, dim3(n_blocks), THREADS, ring_bytes<Type, STAGES>() + results, 1,
                      p->after_ours, a, stream);
}

} // namespace

extern "C" enum sqz_status sqz_gpu_project_token(const struct sqz_gpu_projections *p, void *stream)
{
    switch (p->type) {
    case SQZ_WEIGHTS_Q4_0: return launch<q4_0>(p, stream);
    case SQZ_WEIGHTS_Q4_1: return launch<q4_1>(p, stream);
    case SQZ_WEIGHTS_Q8_0: return launch<q8_0>(p, stream);
    case SQZ_WEIGHTS_Q4_K: return launch<q4_k>(p, stream);
    }
    return SQZ_ERROR_UNSUPPORTED;
}
