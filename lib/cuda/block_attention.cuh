/*
 * What the two ways of block attention share: block_attention.cu (sm_80 and
 * newer) and block_attention_hopper.cu (sm_90a).
 */
#ifndef SQZ_LIB_CUDA_BLOCK_ATTENTION_CUH
#define SQZ_LIB_CUDA_BLOCK_ATTENTION_CUH

#include "tiles.cuh"

enum { SQZ_BLOCK_QUERY_ROWS = 128, SQZ_BLOCK_MAX_SPLITS = 16, SQZ_BLOCK_MAX_HEADS = 1024 };

struct sqz_block_attention_params {
    const void *queries, *keys, *values;
    const uint32_t *groups, *n_groups;
    size_t head_rows;
    uint32_t n_head, group, n_query_rows; /* H, G, T * G */
    uint32_t n_rows, group_capacity, n_splits, n_tokens;
    float scale_log2;
    bool causal, out_f32, windowed;
    int32_t first_row; /* windowed: token t sees no row before first_row + t */
    void *out;       /* [T][H][D] or NULL */
    float *lse;      /* [T][H] or NULL */
    float *part_out; /* [n_splits][T][H][D] normalised, with more than one split */
    float *part_lse; /* [n_splits][T][H] base 2 */

    /* The tail (tail_block.cu): columns are the clusters of a list; a product becomes the logit
     * min(product factor + norm part + x, 0) + log2 N. NULL: rows in groups. */
    const uint32_t *list, *n_list;     /* [K][list_capacity], [K] */
    const float *numbers;              /* [K][3][list_capacity]: log2 N, part, factor */
    const float *query_x, *query_norm; /* [K][query_stride] */
    uint32_t list_capacity, query_stride;
    const float *lse_base; /* [T][H] natural, what lse is to be raised by; or NULL */
    struct sqz_cuda_part *parts;     /* [T][H] or NULL */
    struct sqz_cuda_block_tail tail; /* behind the rows: Hopper's kernel alone */
    uint32_t *arrived, n_arrived;
};

/* Sets the counters to 0; all thread blocks, of so many threads, behind the kernel before. */
template <int THREADS> __device__ __forceinline__ void sqz_block_clear_arrived(const sqz_block_attention_params &p)
{
    const uint32_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    for (uint32_t i = block * THREADS + threadIdx.x; i < p.n_arrived; i += gridDim.x * gridDim.y * gridDim.z * THREADS)
        p.arrived[i] = 0;
}

/* A finished row's log-sum-exp, base 2, to where it is wanted. */
__device__ __forceinline__ void sqz_block_store_lse(const sqz_block_attention_params &p, size_t row, float lse)
{
    if (p.parts) p.parts[row] = {lse, lse > -INFINITY ? 1.0f : 0.0f};
    if (p.lse) p.lse[row] = lse > -INFINITY ? lse * SQZ_LN2 + (p.lse_base ? p.lse_base[row] : 0.0f) : -INFINITY;
}

enum sqz_status sqz_block_attention_portable(const sqz_block_attention_params &p, enum sqz_row_type type,
                                             uint32_t head_dim, void *workspace, size_t workspace_bytes,
                                             bool after_ours, void *stream);
size_t sqz_block_attention_portable_bytes(const struct sqz_cuda_block_attention *a);

/* Row of [T][H] of query row r of a KV head. */
__device__ __forceinline__ size_t sqz_block_row(const sqz_block_attention_params &p, uint32_t head_kv, uint32_t r)
{
    return (size_t)(r / p.group) * p.n_head + (size_t)head_kv * p.group + r % p.group;
}

/* Groups of a KV head and the rows in them; a ragged group is the last of its head and of the list. */
__device__ __forceinline__ void sqz_block_count(const sqz_block_attention_params &p, uint32_t head_kv,
                                                uint32_t *n_groups, uint32_t *n_columns)
{
    const uint32_t all = (p.n_rows + 7) / 8;
    if (!p.groups) {
        *n_groups = all;
        *n_columns = p.n_rows;
        return;
    }
    const uint32_t n = p.n_groups[head_kv];
    *n_groups = n;
    *n_columns = n * 8;
    if (n && p.n_rows % 8 && p.groups[(size_t)head_kv * p.group_capacity + n - 1] == all - 1)
        *n_columns -= 8 - p.n_rows % 8;
}

/* Writes two neighbouring columns of a finished row of [T][H]. */
template <class Type>
__device__ __forceinline__ void sqz_block_store(const sqz_block_attention_params &p, size_t row, uint32_t head_dim,
                                                uint32_t column, float a, float b)
{
    const size_t at = row * head_dim + column;
    if (p.out_f32) *(float2 *)((float *)p.out + at) = make_float2(a, b);
    else *(uint32_t *)((char *)p.out + at * 2) = Type::pack(a, b);
}

/* What a row's weights are relative to: a maximum of unscaled logits, which is raised (and sums and outputs with it) only
 * when a weight would stand more than 2^SLACK above it. Rescaling the output for every tile took a sixth of a tile's
 * instructions. */
struct sqz_block_rows {
    float maximum[2], sum[2];

    __device__ __forceinline__ void reset()
    {
        maximum[0] = maximum[1] = -INFINITY;
        sum[0] = sum[1] = 0.0f;
    }

    /* Logits of a tile to weights in place, s[4 j + 2 r + i] row r of two, column 8 j + 2 (lane % 4) + i; columns from
     * limit on are masked. Returns whether (of any row of the warp) the maximum was raised; outputs so far are then to be
     * multiplied with factor. */
    template <int BN>
    __device__ __forceinline__ bool soften(float (&s)[BN / 2], float (&factor)[2], float scale, int limit0, int limit1)
    {
        const float SLACK = 8.0f;
        const int lane = threadIdx.x % 32;
        if (limit0 < BN || limit1 < BN) {
#pragma unroll
            for (int i = 0; i < BN / 2; i++)
                if (8 * (i / 4) + 2 * (lane % 4) + i % 2 >= (i / 2 % 2 ? limit1 : limit0)) s[i] = -INFINITY;
        }
        float m[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            m[r] = s[2 * r];
#pragma unroll
            for (int j = 0; j < BN / 8; j++) m[r] = fmaxf(m[r], fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
        }
        const bool above =
            m[0] * scale > fmaf(maximum[0], scale, SLACK) || m[1] * scale > fmaf(maximum[1], scale, SLACK);
        const bool raises = __any_sync(~0u, above);
        if (raises) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                m[r] = fmaxf(m[r], __shfl_xor_sync(~0u, m[r], 1));
                m[r] = fmaxf(m[r], __shfl_xor_sync(~0u, m[r], 2));
                const float raised = fmaxf(maximum[r], m[r]);
                /* infinities do not subtract */
                factor[r] = raised == -INFINITY ? 1.0f : sqz_exp2((maximum[r] - raised) * scale);
                maximum[r] = raised;
                sum[r] *= factor[r];
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float base = maximum[r] == -INFINITY ? 0.0f : maximum[r] * scale;
            float l[2] = {0.0f, 0.0f};
#pragma unroll
            for (int j = 0; j < BN / 8; j++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float &x = s[4 * j + 2 * r + i];
                    x = sqz_exp2(fmaf(x, scale, -base));
                    l[i] += x;
                }
            }
            sum[r] += l[0] + l[1];
        }
        return raises;
    }
};

/* Hopper's kernel for the call, where it has one; else UNSUPPORTED. */
bool sqz_block_attention_hopper_has(uint32_t head_dim, bool causal);
size_t sqz_block_attention_hopper_bytes(const struct sqz_cuda_block_attention *a);
enum sqz_status sqz_block_attention_hopper(const sqz_block_attention_params &p, enum sqz_row_type type,
                                           uint32_t head_dim, void *workspace, size_t workspace_bytes, bool after_ours,
                                           void *stream);

#endif
