/*
 * The tail of a block of tokens: pruned clusters of a level stand for their keys,
 * with weight N_c exp(min(y', log Z)) and their mean value (lib/method.h), as
 * tail_rows.cu has it for one token.
 *
 *   block lookup's pass 3  the largest exp(y' - log Z) of every pruned cluster
 *   list                   clusters that count, and their numbers side by side
 *   block attention        over the list, centroids as keys and values
 *
 * Logits are relative to log Z, which lse gets back at the end. The attention is the
 * mma.sync kernel's on every device: its clusters lie apart, one row each.
 */
#include "block_attention.cuh"
#include "block_lookup.cuh"

namespace
{

enum { THREADS = 1024, WARPS = THREADS / SQZ_WARP, EACH = 8 /* clusters of a thread in a row */ };

struct list_args {
    struct sqz_cuda_offsets offsets;
    struct sqz_lookup_tail from;
    const float *score, *log_threshold; /* [K][C], [K] */
    float skip, scale_log2;
    uint32_t *list, *n_list; /* [K][capacity], [K] out */
    sqz_cuda_read *read;
    float *numbers;          /* [K][3][capacity] out */
    uint32_t capacity;
};

/* A thread block a head. */
__global__ void __launch_bounds__(THREADS) list_kernel(const list_args a)
{
    __shared__ uint32_t sums[WARPS];
    const uint32_t head = blockIdx.x, n_clusters = a.offsets.n_clusters[a.offsets.level];
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    sqz_let_next_start();
    sqz_wait_for_previous();
    const float skip = a.skip * expf(a.log_threshold[head]);
    const float *score = a.score + (size_t)head * n_clusters;
    float *numbers = a.numbers + (size_t)head * 3 * a.capacity;
    uint32_t n_before = 0;
    for (uint32_t base = 0; base < n_clusters; base += THREADS * EACH) {
        const uint32_t first = base + threadIdx.x * EACH;
        float largest[EACH], keys[EACH];
        uint32_t n = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) largest[i] = first + i < n_clusters ? score[first + i] : -1.0f;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            keys[i] = 0;
            if (!(largest[i] >= 0)) continue; /* not of the pruned */
            const float count = (float)sqz_keys_under(a.offsets, head, first + i);
            if (count * fminf(largest[i], 1.0f) >= skip) keys[i] = count, n++;
        }
        uint32_t inclusive = n;
#pragma unroll
        for (int step = 1; step < SQZ_WARP; step *= 2) {
            const uint32_t x = __shfl_up_sync(~0u, inclusive, step);
            if (lane >= step) inclusive += x;
        }
        if (lane == SQZ_WARP - 1) sums[warp] = inclusive;
        __syncthreads();
        uint32_t at = n_before + inclusive - n;
        for (int w = 0; w < WARPS; w++) {
            if (w < warp) at += sums[w];
            n_before += sums[w];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (!(keys[i] > 0)) continue;
            const uint32_t c = first + i;
            a.list[(size_t)head * a.capacity + at] = c;
            numbers[at] = log2f(keys[i]);
            numbers[a.capacity + at] = a.from.part[(size_t)head * n_clusters + c];
            numbers[2 * a.capacity + at] =
                a.from.factor ? a.from.factor[(size_t)head * a.from.cluster_stride + c] : a.scale_log2;
            at++;
        }
    }
    if (threadIdx.x == 0) a.n_list[head] = n_before;
    if (threadIdx.x == 0 && a.read) a.read[head].value_centroids += n_before;
}

struct buffers {
    float *score, *numbers;
    uint32_t *list, *n_list, capacity;
    void *lookup, *attention;
    size_t lookup_bytes, attention_bytes, n_bytes;
};

struct buffers carve(const struct sqz_cuda_tail_block *a)
{
    struct buffers b;
    const size_t k = a->lookup.n_head_kv, c = a->lookup.n_clusters;
    char *const start = (char *)a->workspace;
    size_t used = 0;
    auto take = [&](size_t n) {
        char *p = start ? start + used : NULL;
        used += (n + 255) & ~(size_t)255;
        return p;
    };
    struct sqz_cuda_block_attention shape;
    memset(&shape, 0, sizeof shape);
    shape.n_head = a->lookup.n_head;
    shape.n_head_kv = a->lookup.n_head_kv;
    shape.head_dim = a->lookup.head_dim;
    shape.n_tokens = a->lookup.n_tokens;
    shape.n_rows = a->lookup.n_clusters;
    b.capacity = (a->lookup.n_clusters + 63) / 64 * 64; /* whole tiles */
    b.score = (float *)take(k * c * sizeof(float));
    b.list = (uint32_t *)take(k * b.capacity * sizeof(uint32_t));
    b.n_list = (uint32_t *)take(k * sizeof(uint32_t));
    b.numbers = (float *)take(k * 3 * b.capacity * sizeof(float));
    b.lookup_bytes = sqz_cuda_block_lookup_workspace_bytes(&a->lookup);
    b.lookup = take(b.lookup_bytes);
    b.attention_bytes = sqz_block_attention_portable_bytes(&shape);
    b.attention = take(b.attention_bytes);
    b.n_bytes = used;
    return b;
}

} // namespace

extern "C" size_t sqz_cuda_tail_block_workspace_bytes(const struct sqz_cuda_tail_block *a)
{
    return carve(a).n_bytes;
}

extern "C" enum sqz_status sqz_cuda_tail_block_launch(const struct sqz_cuda_tail_block *a, bool after_ours,
                                                      void *stream)
{
    const struct buffers b = carve(a);
    if (!a->workspace || a->workspace_bytes < b.n_bytes) return SQZ_ERROR_ARGUMENT;
    struct sqz_cuda_block_lookup lookup = a->lookup;
    lookup.score = b.score;
    lookup.workspace = b.lookup;
    lookup.workspace_bytes = b.lookup_bytes;
    struct list_args l;
    memset(&l, 0, sizeof l);
    enum sqz_status status = sqz_block_lookup_tail(&lookup, a->tail_gain, &l.from, after_ours, stream);
    if (status != SQZ_OK) return status;
    l.offsets = lookup.offsets;
    l.score = b.score;
    l.log_threshold = a->log_threshold;
    l.skip = a->skip;
    l.read = a->read;
    l.scale_log2 = lookup.scale * SQZ_LOG2E;
    l.list = b.list;
    l.n_list = b.n_list;
    l.numbers = b.numbers;
    l.capacity = b.capacity;
    status = sqz_launch(list_kernel, dim3(lookup.n_head_kv), THREADS, 0, 1, true, l, stream);
    if (status != SQZ_OK) return status;
    sqz_block_attention_params p;
    memset(&p, 0, sizeof p);
    p.queries = lookup.queries;
    p.keys = l.from.centroids;
    p.values = a->value_centroids;
    p.head_rows = lookup.n_clusters;
    p.n_head = lookup.n_head;
    p.group = lookup.n_head / lookup.n_head_kv;
    p.n_query_rows = lookup.n_tokens * p.group;
    p.n_rows = lookup.n_clusters;
    p.n_tokens = lookup.n_tokens;
    p.out = a->out;
    p.out_f32 = true;
    p.lse = a->lse;
    p.list = b.list;
    p.n_list = b.n_list;
    p.numbers = b.numbers;
    p.query_x = l.from.query_x;
    p.query_norm = l.from.query_y;
    p.list_capacity = b.capacity;
    p.query_stride = l.from.query_stride;
    p.lse_base = lookup.log_total;
    return sqz_block_attention_portable(p, lookup.type, lookup.head_dim, b.attention, b.attention_bytes, true, stream);
}
