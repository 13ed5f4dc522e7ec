/*
 * What the two ways of block lookup share: block_lookup.cu (sm_80 and newer) and
 * block_lookup_hopper.cu (sm_90a): arguments of a pass, and how a thread turns its
 * part of a tile of products into sums of its two rows.
 */
#ifndef SQZ_LIB_CUDA_BLOCK_LOOKUP_CUH
#define SQZ_LIB_CUDA_BLOCK_LOOKUP_CUH

#include "tiles.cuh"

struct sqz_lookup_pass {
    const void *rows, *columns;       /* type [K][n_rows][D], [K][n_columns][D] */
    const float *row_number;          /* [K][n_rows] z */
    const float *column_x, *column_y; /* [K][column_stride]; x is -INFINITY for columns that do not count */
    const float *row_shift;           /* pass 1: [K][n_rows] added to logits, base 2; or NULL */
    const float *factor; /* [K][cluster_stride] what products with a cluster are multiplied with; or NULL and */
    float scale_log2;
    uint32_t n_rows, n_columns, column_stride, cluster_stride, n_splits;
    float *maximum, *sum;   /* pass 1: [n_splits][K][n_rows] */
    float *score;           /* passes 2 to 4: [K][n_rows] */
    float inverse_count;    /* passes 2 and 4 */
    uint32_t group;         /* pass 4: neighbouring columns that are a token's: 2, 4 or 8 */
    const uint32_t *active; /* passes 2 and 3: [K][active_words] or NULL */
    uint32_t active_words;
};

/* Where a tile's numbers of columns are in shared memory. */
struct sqz_lookup_numbers {
    uint32_t x, y, factor;
};

/* A thread's two rows (8 apart) and its columns, 8 j + 2 (lane % 4) and the one after: sums relative to base.
 *
 * Pass 1 does not look for a tile's maximum: base stays what it was as long as the tile's sum stays below LIMIT, which a
 * sum in F32 can be without losing anything; only a tile above it (the first one of a row, and few later) is gone
 * through again. Sums of pass 2 are absolute: base 0. Pass 3 keeps the largest logit in place of a sum, and takes one
 * exponential at the end. Pass 4 keeps the largest sum over a token's columns, which lie in neighbouring lanes.
 * SPREAD: z and y count. FACTORS: clusters' factors, which are those of columns in pass 1 and of rows in the others. */
template <int PASS, bool SPREAD, bool FACTORS> struct sqz_lookup_rows_state {
    float z[2], base[2], sum[2], shift[2], scale[2];
    uint32_t group;

    __device__ __forceinline__ void reset(const sqz_lookup_pass &p, uint32_t head, uint32_t row)
    {
        group = p.group;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint32_t mine = row + 8 * r;
            const bool exists = mine < p.n_rows;
            const size_t at = (size_t)head * p.n_rows + mine;
            z[r] = SPREAD && exists ? p.row_number[at] : 0.0f;
            shift[r] = PASS == 1 && FACTORS && exists ? p.row_shift[at] : 0.0f;
            scale[r] = PASS != 1 && FACTORS && exists ? p.factor[(size_t)head * p.cluster_stride + mine] : p.scale_log2;
            base[r] = PASS == 1 ? -INFINITY : 0.0f;
            sum[r] = PASS == 3 ? -INFINITY : 0.0f;
        }
    }

    /* Calls each(r, i, logit relative to `from` of the row) for the thread's part of a tile. */
    template <int BN, class Each>
    __device__ __forceinline__ void go_through(const float (&s)[BN / 2], sqz_lookup_numbers numbers,
                                               const float (&from)[2], Each each) const
    {
#pragma unroll
        for (int j = 0; j < BN / 8; j++) {
            const uint32_t at = (8 * j + 2 * (threadIdx.x % 4)) * (uint32_t)sizeof(float);
            const float2 x = sqz_load_shared8(numbers.x + at);
            float2 y, f;
            if (SPREAD) y = sqz_load_shared8(numbers.y + at);
            if (PASS == 1 && FACTORS) f = sqz_load_shared8(numbers.factor + at);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float x0 = PASS == 1 ? x.x - from[r] : x.x, x1 = PASS == 1 ? x.y - from[r] : x.y;
                if (SPREAD) {
                    x0 = fmaf(z[r], y.x, x0);
                    x1 = fmaf(z[r], y.y, x1);
                }
                const bool columns = PASS == 1 && FACTORS;
                each(r, 0, fmaf(s[4 * j + 2 * r], columns ? f.x : scale[r], x0));
                each(r, 1, fmaf(s[4 * j + 2 * r + 1], columns ? f.y : scale[r], x1));
            }
        }
    }

    /* s: products of a tile, as an accumulator has them. */
    template <int BN> __device__ __forceinline__ void add(const float (&s)[BN / 2], sqz_lookup_numbers numbers)
    {
        const float LIMIT = 1.2e18f; /* 2^60 */
        const float from[2] = {base[0] - shift[0], base[1] - shift[1]};
        if (PASS == 3) {
            float m[2][2] = {{sum[0], -INFINITY}, {sum[1], -INFINITY}};
            go_through<BN>(s, numbers, from, [&](int r, int i, float y) { m[r][i] = fmaxf(m[r][i], y); });
#pragma unroll
            for (int r = 0; r < 2; r++) sum[r] = fmaxf(m[r][0], m[r][1]);
            return;
        }
        if (PASS == 4) {
            float first[2] = {0, 0};
            go_through<BN>(s, numbers, from, [&](int r, int i, float y) {
                if (i == 0) {
                    first[r] = sqz_exp2(y);
                    return;
                }
                float token = first[r] + sqz_exp2(y);
                if (group >= 4) token += __shfl_xor_sync(~0u, token, 1);
                if (group >= 8) token += __shfl_xor_sync(~0u, token, 2);
                sum[r] = fmaxf(sum[r], token);
            });
            return;
        }
        float l[2][2] = {{0, 0}, {0, 0}};
        go_through<BN>(s, numbers, from, [&](int r, int i, float y) { l[r][i] += sqz_exp2(y); });
        if (PASS == 1) {
            const bool fits = l[0][0] + l[0][1] <= LIMIT && l[1][0] + l[1][1] <= LIMIT; /* NaN does not */
            if (__any_sync(~0u, !fits)) raise<BN>(s, numbers, l);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) sum[r] += l[r][0] + l[r][1];
    }

    /* Raises base to the tile's maximum and makes the tile's sums again. */
    template <int BN>
    __device__ __forceinline__ void raise(const float (&s)[BN / 2], sqz_lookup_numbers numbers, float (&l)[2][2])
    {
        const float zero[2] = {-shift[0], -shift[1]};
        float m[2] = {base[0], base[1]};
        go_through<BN>(s, numbers, zero, [&](int r, int, float y) { m[r] = fmaxf(m[r], y); });
        float from[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            l[r][0] = l[r][1] = 0.0f;
            if (m[r] == -INFINITY) m[r] = 0.0f; /* infinities do not subtract */
            sum[r] *= sqz_exp2(base[r] - m[r]); /* 0 when base is -INFINITY */
            from[r] = m[r] - shift[r];
        }
        go_through<BN>(s, numbers, from, [&](int r, int i, float y) { l[r][i] += sqz_exp2(y); });
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
                else all.sum = PASS >= 3 ? fmaxf(all.sum, other.sum) : all.sum + other.sum;
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
                const float score = PASS == 3 ? sqz_exp2(all.sum) : all.sum * p.inverse_count;
                p.score[at] = counts ? score : -1.0f;
            }
        }
    }
};

/* What the tail takes of a lookup's workspace, as pass 3 has it. */
struct sqz_lookup_tail {
    const void *centroids;          /* type [K][C][D] */
    const float *query_x, *query_y; /* [K][query_stride] */
    const float *part;              /* [K][C] */
    const float *factor;            /* [K][cluster_stride] or NULL: scale, base 2, for all */
    uint32_t query_stride, cluster_stride;
};
/* score[c] = the largest exp(y' - log Z_r) over query rows r, y' as in lib/method.h but not yet below log Z;
 * a->log_total is given. */
enum sqz_status sqz_block_lookup_tail(const struct sqz_cuda_block_lookup *a, const float *tail_gain,
                                      struct sqz_lookup_tail *numbers, bool after_ours, void *stream);

/* Rows of a thread block there: what splits are chosen by. */
uint32_t sqz_block_lookup_hopper_rows(uint64_t n_rows, uint64_t n_columns);
/* Hopper's kernel for a pass (1, 2 or 3); UNSUPPORTED where the device or the shape has none. */
enum sqz_status sqz_block_lookup_hopper(const sqz_lookup_pass &p, int pass, enum sqz_row_type type, uint32_t head_dim,
                                        uint32_t n_head_kv, bool spread, void *stream);

#endif
