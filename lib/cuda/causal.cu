/*
 * Attention of a text that is being read: T tokens that are the last of n_rows.
 *
 * What lies before the T tokens all of them see, which is not causal and goes by the
 * Hopper kernel where there is one; among themselves they are a small causal block.
 * The two merge by their log-sum-exp. With one causal call for all, 131,072 tokens of
 * the 8B shape took 24 s of an H200 for attention alone, 187 TFLOP/s.
 */
#include "arena.h"
#include "block_attention.cuh"
#include "calls.h"

namespace
{

enum { THREADS = 256, LEAST_PAST = 1024 /* rows before the tokens that a call of their own is worth */ };

struct merge_args {
    float *out; /* in and out */
    const float *other, *lse, *other_lse;
    uint32_t head_dim;
    size_t n; /* numbers / 4 */
};

__global__ void __launch_bounds__(THREADS) merge_kernel(const merge_args a)
{
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x, row = i * 4 / a.head_dim;
    if (i >= a.n) return;
    /* Both parts have rows: a token sees itself, and all that is past. */
    const float most = fmaxf(a.lse[row], a.other_lse[row]);
    const float x = expf(a.lse[row] - most), y = expf(a.other_lse[row] - most), share = x / (x + y);
    float4 *out = (float4 *)a.out + i, u = *out;
    const float4 v = ((const float4 *)a.other)[i];
    u.x = share * u.x + (1.0f - share) * v.x;
    u.y = share * u.y + (1.0f - share) * v.y;
    u.z = share * u.z + (1.0f - share) * v.z;
    u.w = share * u.w + (1.0f - share) * v.w;
    *out = u;
}

struct sqz_cuda_block_attention whole_of(const struct sqz_gpu_causal *a)
{
    struct sqz_cuda_block_attention c;
    memset(&c, 0, sizeof c);
    c.type = SQZ_ROW_F16;
    c.n_head = a->shape.n_head;
    c.n_head_kv = a->shape.n_head_kv;
    c.head_dim = a->shape.head_dim;
    c.scale = a->shape.scale;
    c.n_tokens = a->n_tokens;
    c.queries = a->queries;
    c.keys = a->keys;
    c.values = a->values;
    c.head_rows = a->capacity_rows;
    c.n_rows = a->n_rows;
    c.causal = true;
    c.windowed = a->window_tokens != 0;
    c.first_row = (int32_t)((int64_t)a->n_rows - a->n_tokens + 1 - a->window_tokens);
    c.out = a->out ? (void *)a->out : (void *)16; /* sizes follow from which pointers there are */
    c.out_f32 = true;
    c.workspace = a->workspace;
    c.workspace_bytes = a->workspace_bytes;
    return c;
}

bool is_split(const struct sqz_gpu_causal *a)
{
    return !a->window_tokens && a->n_rows >= a->n_tokens + LEAST_PAST &&
           sqz_block_attention_hopper_has(a->shape.head_dim, false);
}

struct parts {
    struct sqz_cuda_block_attention past, own;
    void *scratch;
    size_t scratch_bytes;
};

/* The two calls, their results and what each needs of scratch, one after the other on the stream. */
struct parts carve(struct sqz_arena *arena, const struct sqz_gpu_causal *a)
{
    const size_t rows = (size_t)a->n_tokens * a->shape.n_head, past = a->n_rows - a->n_tokens;
    struct parts p;
    p.past = p.own = whole_of(a);
    p.past.causal = false;
    p.past.n_rows = (uint32_t)past;
    p.own.n_rows = a->n_tokens;
    p.own.keys = (const char *)a->keys + past * a->shape.head_dim * 2;
    p.own.values = (const char *)a->values + past * a->shape.head_dim * 2;
    p.own.out = sqz_arena_take(arena, rows, a->shape.head_dim, sizeof(float));
    p.past.lse = (float *)sqz_arena_take(arena, rows, 1, sizeof(float));
    p.own.lse = (float *)sqz_arena_take(arena, rows, 1, sizeof(float));
    if (!arena->base) p.own.out = p.past.lse = p.own.lse = (float *)16;
    const size_t first = sqz_cuda_block_attention_workspace_bytes(&p.past),
                 second = sqz_cuda_block_attention_workspace_bytes(&p.own);
    p.scratch_bytes = (first > second ? first : second) + 256;
    p.scratch = sqz_arena_take(arena, p.scratch_bytes, 1, 1);
    p.past.workspace = p.own.workspace = (void *)(((uintptr_t)p.scratch + 255) & ~(uintptr_t)255);
    p.past.workspace_bytes = p.own.workspace_bytes = p.scratch_bytes - 256;
    return p;
}

enum sqz_status merge(const struct parts *p, void *stream)
{
    const size_t n = (size_t)p->past.n_tokens * p->past.n_head * p->past.head_dim / 4;
    const merge_args args = {(float *)p->past.out, (const float *)p->own.out, p->past.lse,
                             p->own.lse,           p->past.head_dim,          n};
    return sqz_launch(merge_kernel, dim3((unsigned)((n + THREADS - 1) / THREADS)), THREADS, 0, 1, false, args, stream);
}

} // namespace

extern "C" size_t sqz_gpu_causal_workspace_bytes(const struct sqz_gpu_causal *a)
{
    const struct sqz_cuda_block_attention whole = whole_of(a);
    struct sqz_arena arena = sqz_arena_on(NULL);
    if (!sqz_cuda_block_attention_supported(&whole)) return 0;
    if (!is_split(a)) return sqz_cuda_block_attention_workspace_bytes(&whole) + 256;
    carve(&arena, a);
    return sqz_arena_bytes(&arena);
}

extern "C" enum sqz_status sqz_gpu_causal(const struct sqz_gpu_causal *a, void *stream)
{
    const struct sqz_cuda_block_attention whole = whole_of(a);
    if (!is_split(a)) return sqz_cuda_block_attention_launch(&whole, false, stream);
    if (a->workspace_bytes < sqz_gpu_causal_workspace_bytes(a)) return SQZ_ERROR_ARGUMENT;
    struct sqz_arena arena = sqz_arena_on(a->workspace);
    const struct parts p = carve(&arena, a);
    enum sqz_status status = sqz_cuda_block_attention_launch(&p.past, false, stream);
    if (status == SQZ_OK) status = sqz_cuda_block_attention_launch(&p.own, false, stream);
    return status == SQZ_OK ? merge(&p, stream) : status;
}
