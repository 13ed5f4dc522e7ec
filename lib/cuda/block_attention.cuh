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
    bool causal, out_f32;
    void *out;       /* [T][H][D] or NULL */
    float *lse;      /* [T][H] or NULL */
    float *part_out; /* [n_splits][T][H][D] normalised, with more than one split */
    float *part_lse; /* [n_splits][T][H] base 2 */
};

enum sqz_status sqz_block_attention_portable(const sqz_block_attention_params &p, enum sqz_cuda_type type,
                                             uint32_t head_dim, void *workspace, size_t workspace_bytes, void *stream);
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

/* Logits of a tile to weights in place, d[4 j + 2 r + i] row r of two, column 8 j + 2 (lane % 4) + i; columns from limit
 * on are masked. factor: what brings older sums and outputs to the new maximum. Maxima are of unscaled logits. */
template <int BN>
__device__ __forceinline__ void sqz_block_soften(float (&s)[BN / 2], float (&maximum)[2], float (&sum)[2],
                                                 float (&factor)[2], float scale, int limit0, int limit1)
{
    const int lane = threadIdx.x % 32;
    if (limit0 < BN || limit1 < BN) {
#pragma unroll
        for (int i = 0; i < BN / 2; i++)
            if (8 * (i / 4) + 2 * (lane % 4) + i % 2 >= (i / 2 % 2 ? limit1 : limit0)) s[i] = -INFINITY;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float m = s[2 * r];
#pragma unroll
        for (int j = 0; j < BN / 8; j++) m = fmaxf(m, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        const float raised = fmaxf(maximum[r], m);
        const float base = raised == -INFINITY ? 0.0f : raised * scale; /* infinities do not subtract */
        factor[r] = sqz_exp2(fmaf(maximum[r], scale, -base));
        maximum[r] = raised;
        float l = 0.0f;
#pragma unroll
        for (int j = 0; j < BN / 8; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float &x = s[4 * j + 2 * r + i];
                x = sqz_exp2(fmaf(x, scale, -base));
                l += x;
            }
        }
        sum[r] = sum[r] * factor[r] + l;
    }
}

/* Hopper's kernel for the call, where it has one; else UNSUPPORTED. */
bool sqz_block_attention_hopper_has(uint32_t head_dim, bool causal);
size_t sqz_block_attention_hopper_bytes(const struct sqz_cuda_block_attention *a);
enum sqz_status sqz_block_attention_hopper(const sqz_block_attention_params &p, enum sqz_cuda_type type,
                                           uint32_t head_dim, void *workspace, size_t workspace_bytes, void *stream);

#endif
