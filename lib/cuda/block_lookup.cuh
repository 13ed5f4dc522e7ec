/*
 * What the two ways of block lookup share: block_lookup.cu (sm_80 and newer) and
 * block_lookup_hopper.cu (sm_90a): arguments of a pass, and how a thread turns its
 * part of a tile of products into sums of its two rows.
 */
#ifndef SQZ_LIB_CUDA_BLOCK_LOOKUP_CUH
#define SQZ_LIB_CUDA_BLOCK_LOOKUP_CUH

#include "tiles.cuh"

enum { SQZ_LOOKUP_ROWS = 128 /* of a thread block */, SQZ_LOOKUP_COLUMNS = 64 /* of a tile */ };

struct sqz_lookup_pass {
    const void *rows, *columns;      /* type [K][n_rows][D], [K][n_columns][D] */
    const float *row_number;         /* [K][n_rows] z */
    const float2 *column_numbers;    /* [K][column_stride] (x, y); x is -INFINITY for columns that do not count */
    uint32_t n_rows, n_columns, column_stride, n_splits;
    float scale_log2;
    float *maximum, *sum;            /* pass 1: [n_splits][K][n_rows] */
    float *score;                    /* pass 2: [K][n_rows] */
    float inverse_count;
    const uint32_t *active;          /* pass 2: [K][active_words] or NULL */
    uint32_t active_words;
};

__device__ __forceinline__ float4 sqz_load_shared16(uint32_t from)
{
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(from)
                 : "memory");
    return x;
}

/* A thread's two rows (8 apart) and its columns, 8 j + 2 (lane % 4) and the one after: sums relative to base.
 *
 * Pass 1 does not look for a tile's maximum: base stays what it was as long as the tile's sum stays below LIMIT, which a
 * sum in F32 can be without losing anything; only a tile above it (the first one of a row, and few later) is gone
 * through again. Sums of pass 2 are absolute: base 0. */
template <int PASS>
struct sqz_lookup_rows_state {
    float z[2], base[2], sum[2];

    __device__ __forceinline__ void reset(const sqz_lookup_pass &p, uint32_t head, uint32_t row)
    {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            z[r] = row + 8 * r < p.n_rows ? p.row_number[(size_t)head * p.n_rows + row + 8 * r] : 0.0f;
            base[r] = PASS == 1 ? -INFINITY : 0.0f;
            sum[r] = 0.0f;
        }
    }

    /* Calls each(r, i, logit relative to what `from` gives for the row) for the thread's part of a tile. */
    template <int BN, bool SPREAD, class Each>
    __device__ __forceinline__ void go_through(const float (&s)[BN / 2], uint32_t numbers, float scale,
                                               const float (&from)[2], Each each) const
    {
#pragma unroll
        for (int j = 0; j < BN / 8; j++) {
            const float4 n = sqz_load_shared16(numbers + (8 * j + 2 * (threadIdx.x % 4)) * (uint32_t)sizeof(float2));
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float x0 = PASS == 1 ? n.x - from[r] : n.x, x1 = PASS == 1 ? n.z - from[r] : n.z;
                if (SPREAD) {
                    x0 = fmaf(z[r], n.y, x0);
                    x1 = fmaf(z[r], n.w, x1);
                }
                each(r, 0, fmaf(s[4 * j + 2 * r], scale, x0));
                each(r, 1, fmaf(s[4 * j + 2 * r + 1], scale, x1));
            }
        }
    }

    /* s: products of a tile, as an accumulator has them; numbers: shared memory, of the tile's columns. */
    template <int BN, bool SPREAD>
    __device__ __forceinline__ void add(const float (&s)[BN / 2], uint32_t numbers, float scale)
    {
        const float LIMIT = 1.2e18f; /* 2^60 */
        float l[2][2] = {{0, 0}, {0, 0}};
        go_through<BN, SPREAD>(s, numbers, scale, base, [&](int r, int i, float y) { l[r][i] += sqz_exp2(y); });
        if (PASS == 1) {
            const bool fits = l[0][0] + l[0][1] <= LIMIT && l[1][0] + l[1][1] <= LIMIT; /* NaN does not */
            if (__any_sync(~0u, !fits)) raise<BN, SPREAD>(s, numbers, scale, l);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) sum[r] += l[r][0] + l[r][1];
    }

    /* Raises base to the tile's maximum and makes the tile's sums again. */
    template <int BN, bool SPREAD>
    __device__ __forceinline__ void raise(const float (&s)[BN / 2], uint32_t numbers, float scale, float (&l)[2][2])
    {
        const float zero[2] = {0, 0};
        float m[2] = {base[0], base[1]};
        go_through<BN, SPREAD>(s, numbers, scale, zero, [&](int r, int, float y) { m[r] = fmaxf(m[r], y); });
#pragma unroll
        for (int r = 0; r < 2; r++) {
            l[r][0] = l[r][1] = 0.0f;
            if (m[r] == -INFINITY) m[r] = 0.0f; /* infinities do not subtract */
            sum[r] *= sqz_exp2(base[r] - m[r]); /* 0 when base is -INFINITY */
        }
        go_through<BN, SPREAD>(s, numbers, scale, m, [&](int r, int i, float y) { l[r][i] += sqz_exp2(y); });
#pragma unroll
        for (int r = 0; r < 2; r++) base[r] = sum[r] + l[r][0] + l[r][1] > 0 ? m[r] : -INFINITY;
    }

    /* A row's four lanes to one, and to memory. row: the thread's first. */
    __device__ __forceinline__ void write(const sqz_lookup_pass &p, uint32_t head, uint32_t split, uint32_t row)
    {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sqz_softmax_state all = {base[r], sum[r]};
#pragma unroll
            for (int step = 1; step < 4; step *= 2) {
                const sqz_softmax_state other = {__shfl_xor_sync(~0u, all.maximum, step),
                                                 __shfl_xor_sync(~0u, all.sum, step)};
                if (PASS == 1) all = sqz_softmax_merged(all, other);
                else all.sum += other.sum;
            }
            const uint32_t to = row + 8 * r;
            if (threadIdx.x % 4 || to >= p.n_rows) continue;
            const size_t at = (size_t)head * p.n_rows + to;
            if (PASS == 1) {
                const size_t n = (size_t)gridDim.y * p.n_rows;
                p.maximum[split * n + at] = all.maximum;
                p.sum[split * n + at] = all.sum;
            } else {
                const bool counts = !p.active || (p.active[(size_t)head * p.active_words + to / 32] >> to % 32 & 1);
                p.score[at] = counts ? all.sum * p.inverse_count : -1.0f;
            }
        }
    }
};

/* Hopper's kernel for a pass; UNSUPPORTED where the device or the shape has none. */
enum sqz_status sqz_block_lookup_hopper(const sqz_lookup_pass &p, int pass, enum sqz_cuda_type type, uint32_t head_dim,
                                        uint32_t n_head_kv, bool spread, void *stream);

#endif
