/*
 * Lookup of a block of tokens: scores of clusters over T * G query rows, their mean or maximum.
 *
 * Math, base 2 inside: y = scale q.C + a v (ops.h), Z_r = 2^base_r + sum_c N_c 2^y,
 * score_c = mean or maximum over r of 2^(y - log Z_r). Logits are made twice, never stored:
 * T * G * C of them a head are 100 times the centroids' bytes.
 *   pass 1  rows are queries, columns centroids: maximum and sum of each row
 *   pass 2  rows are centroids, columns queries: sum of each row; or 3, the maximum; or 4, the largest sum of a token's
 *           columns. Where each token has a threshold, logits of 3 and 4 are relative to it.
 * Both reduce along columns, which a thread keeps to itself, so nothing is added
 * across thread blocks and results do not depend on their order. Every column
 * brings two numbers (x, y) and every row one, z: the logit is s * product + z y + x.
 *   pass 1: x = log2 N_c, y = the cluster's part of a v, z = |q|^2
 *   passes 2 and 3: x = -log2 Z_r, y = |q|^2, z = the cluster's part
 * The tail of a block (tail_block.cu) is pass 3 by itself, with the whole of v and Z given.
 * Queries are first packed by KV head [K][T G][D]. INT8 centroids become `type` as the
 * integers they are, which is exact; their scale is the cluster's factor in place of s,
 * and the query's product with the mean is a shift of its logits.
 *
 * Grid: x the block of 128 rows, y the KV head, z the split of the columns (pass 1
 * of few queries).
 * Hopper (sm_90a) is block_lookup_hopper.cu's for D 64 and 128. Elsewhere mma.sync:
 * (128 + 2 * 64) rows of shared memory, 64 KiB at D 128. D 64, 96, 128, 256.
 */
#include "block_lookup.cuh"

namespace
{

enum { ROWS = 128, MAX_SPLITS = 32, SPLIT_TILES = 4 /* of 64 columns, at least */ };

typedef sqz_lookup_pass pass_args;

/* ---- sm_80 and newer ---------------------------------------------------------- */

template <int D> struct shape {
    static const int bn = 64, tile_bytes = bn * sqz_tile<D>::stride;
    static const int number_bytes = bn * 3 * (int)sizeof(float);
    static const size_t shared_bytes = (size_t)ROWS * sqz_tile<D>::stride + 2 * tile_bytes + 2 * number_bytes;
};

template <class Type, int D, int PASS, bool SPREAD, bool FACTORS>
__global__ void __launch_bounds__(256) lookup(const pass_args p)
{
    typedef sqz_tile<D> Tile;
    constexpr int BN = shape<D>::bn;
    extern __shared__ __align__(128) char shared[];
    const uint32_t rows = (uint32_t)__cvta_generic_to_shared(shared), columns = rows + ROWS * Tile::stride;
    const uint32_t numbers = columns + 2 * shape<D>::tile_bytes;
    const uint32_t head = blockIdx.y, split = blockIdx.z, row0 = blockIdx.x * ROWS;
    const uint32_t n_tiles = (p.n_columns + BN - 1) / BN;
    const uint32_t first = (uint32_t)((uint64_t)n_tiles * split / p.n_splits),
                   last = (uint32_t)((uint64_t)n_tiles * (split + 1) / p.n_splits);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    auto load = [&](uint32_t to, const void *from, uint32_t begin, uint32_t n, uint32_t n_all) {
        for (uint32_t i = threadIdx.x; i < n * Tile::chunks; i += 256) {
            const uint32_t r = i / Tile::chunks, c = i % Tile::chunks;
            const bool exists = begin + r < n_all;
            const size_t at = exists ? ((size_t)head * n_all + begin + r) * D + c * 8 : 0;
            sqz_copy16(Tile::at(to, (int)r, (int)c), (const char *)from + at * 2, exists);
        }
    };
    auto load_columns = [&](uint32_t stage, uint32_t tile) {
        load(columns + stage * shape<D>::tile_bytes, p.columns, tile * BN, BN, p.n_columns);
        const uint32_t part = threadIdx.x % (BN / 4), which = threadIdx.x / (BN / 4);
        const float *const from = which == 0                           ? p.column_x
                                  : which == 1 && SPREAD               ? p.column_y
                                  : which == 2 && PASS == 1 && FACTORS ? p.factor
                                                                       : NULL;
        if (from)
            sqz_copy16(numbers + stage * shape<D>::number_bytes + threadIdx.x * 16,
                       from + (size_t)head * p.column_stride + tile * BN + 4 * part, true);
    };
    sqz_let_next_start();
    sqz_wait_for_previous();
    const uint32_t row = row0 + warp * 16 + lane / 4;
    float s[BN / 2];
    sqz_lookup_rows_state<PASS, SPREAD, FACTORS> state;
    state.reset(p, head, row);
    load(rows, p.rows, row0, ROWS, p.n_rows);
    if (first < last) load_columns(0, first);
    sqz_copy16_commit();
    for (uint32_t tile = first; tile < last; tile++) {
        const uint32_t stage = (tile - first) & 1;
        sqz_copy16_wait<0>();
        __syncthreads(); /* this tile has come, and all warps have left the one before */
        if (tile + 1 < last) load_columns(stage ^ 1, tile + 1);
        sqz_copy16_commit();
        sqz_tile_products<Type, D, BN>(s, rows, warp * 16, columns + stage * shape<D>::tile_bytes);
        const uint32_t here = numbers + stage * shape<D>::number_bytes;
        state.template add<BN>(s, {here, here + BN * 4, here + BN * 8});
    }
    sqz_copy16_wait<0>();
    state.write(p, head, split, row);
}

/* ---- Before and between the passes ----------------------------------------------- */

/* Thread blocks for queries, then for numbers of clusters, head by head, then for INT8 centroids. */
struct prepare_blocks {
    uint32_t queries, of_head, clusters, centroids;
};

struct prepare_args {
    struct sqz_cuda_block_lookup a;
    prepare_blocks blocks;
    uint32_t group, active_words, column_stride, query_stride;
    void *queries, *centroids; /* packed; centroids: of INT8 ones */
    float *norm;               /* [K][T G] |q|^2 */
    float *part;               /* [K][C] the cluster's part of a v, base 2, to be multiplied by |q|^2 */
    float *factor, *shift;     /* of INT8 centroids: [K][column_stride] scales, [K][T G] products of queries and mean,
                                  times s; or NULL */
    float *cluster_x, *cluster_y; /* [K][column_stride] */
    float *spread;                /* [K][column_stride] the whole of v, base 2, to be multiplied by |q|^2 */
    float *query_x, *query_y;     /* [K][query_stride] */
    const float *maximum, *sum;
    uint32_t n_splits;
    const float *tail_gain; /* [K], for the tail: log Z is given and all of v counts; else NULL */
};

/* A warp a query row. */
template <class Type> __device__ __forceinline__ void pack_queries(const prepare_args &q, uint32_t block)
{
    const struct sqz_cuda_block_lookup &a = q.a;
    const size_t n = (size_t)a.n_tokens * a.n_head, row = (size_t)block * 8 + threadIdx.x / 32;
    const uint32_t lane = threadIdx.x % 32;
    if (row >= n) return;
    const uint32_t t = (uint32_t)(row / a.n_head), h = (uint32_t)(row % a.n_head), head = h / q.group;
    const size_t to = (size_t)head * a.n_tokens * q.group + (size_t)t * q.group + h % q.group;
    float norm = 0.0f, shift = 0.0f;
    for (uint32_t c = lane; c < a.head_dim / 2; c += 32) {
        const uint32_t pair = ((const uint32_t *)a.queries)[row * (a.head_dim / 2) + c];
        const float2 x = Type::unpack(pair);
        norm += x.x * x.x + x.y * x.y;
        if (q.shift) {
            const float *mean = a.key_mean + (size_t)head * a.head_dim + 2 * c;
            shift += x.x * mean[0] + x.y * mean[1];
        }
        ((uint32_t *)q.queries)[to * (a.head_dim / 2) + c] = pair;
    }
    for (int step = 16; step; step /= 2) {
        norm += __shfl_xor_sync(~0u, norm, step);
        shift += __shfl_xor_sync(~0u, shift, step);
    }
    if (lane == 0) {
        q.norm[to] = norm;
        if (q.shift) q.shift[to] = shift * a.scale * SQZ_LOG2E;
    }
}

/* Numbers of clusters, padded columns included. */
__device__ __forceinline__ void number_clusters(const prepare_args &q, uint32_t block, uint32_t head)
{
    const struct sqz_cuda_block_lookup &a = q.a;
    const uint32_t c = block * 256 + threadIdx.x;
    if (c >= q.column_stride) return;
    float x = -INFINITY, part = 0.0f, spread = 0.0f;
    if (c < a.n_clusters) {
        const size_t at = (size_t)head * a.n_clusters + c;
        const float gain = q.tail_gain ? 1.0f : a.variance_gain ? a.variance_gain[head] : 0.0f;
        if (a.variance) {
            part = sqz_spread_factor(gain, a.scale, a.head_dim, SQZ_LOG2E) * a.variance[at];
            spread = sqz_spread_factor(1.0f, a.scale, a.head_dim, SQZ_LOG2E) * a.variance[at];
        }
        if (!a.active || (a.active[(size_t)head * q.active_words + c / 32] >> c % 32 & 1))
            x = log2f((float)sqz_keys_under(a.offsets, head, c));
        q.part[at] = part;
        if (q.factor) q.factor[(size_t)head * q.column_stride + c] = a.centroid_scale[at] * a.scale * SQZ_LOG2E;
    } else if (q.factor) {
        q.factor[(size_t)head * q.column_stride + c] = 0.0f;
    }
    q.cluster_x[(size_t)head * q.column_stride + c] = x;
    q.cluster_y[(size_t)head * q.column_stride + c] = part;
    q.spread[(size_t)head * q.column_stride + c] = spread;
}

/* A warp a centroid. */
template <class Type> __device__ __forceinline__ void widen_centroids(const prepare_args &q, uint32_t block)
{
    const struct sqz_cuda_block_lookup &a = q.a;
    const size_t n = (size_t)a.n_head_kv * a.n_clusters, row = (size_t)block * 8 + threadIdx.x / 32;
    if (row >= n) return;
    for (uint32_t c = threadIdx.x % 32; c < a.head_dim / 2; c += 32) {
        const char2 x = ((const char2 *)a.centroids_i8)[row * (a.head_dim / 2) + c];
        ((uint32_t *)q.centroids)[row * (a.head_dim / 2) + c] = Type::pack(x.x, x.y);
    }
}

template <class Type>
__global__ void __launch_bounds__(256) prepare_all(const prepare_args q)
{
    const prepare_blocks &n = q.blocks;
    sqz_let_next_start();
    sqz_wait_for_previous();
    const uint32_t block = blockIdx.x;
    if (block < n.queries) pack_queries<Type>(q, block);
    else if (block < n.queries + n.clusters)
        number_clusters(q, (block - n.queries) % n.of_head, (block - n.queries) / n.of_head);
    else widen_centroids<Type>(q, block - n.queries - n.clusters);
}

enum : uint32_t { TOGETHER = 8 /* parts that are asked for at once */ };

/* log Z of every query row, and its numbers as a column. */
template <class Type> __global__ void __launch_bounds__(256) add_totals(const prepare_args q)
{
    const struct sqz_cuda_block_lookup &a = q.a;
    const uint32_t r = blockIdx.x * 256 + threadIdx.x, head = blockIdx.y, n_rows = a.n_tokens * q.group;
    sqz_let_next_start();
    sqz_wait_for_previous();
    if (r >= q.query_stride) return;
    float x = -INFINITY, y = 0.0f;
    if (r < n_rows) {
        const size_t at = (size_t)head * n_rows + r, n = (size_t)a.n_head_kv * n_rows;
        const size_t out = (size_t)(r / q.group) * a.n_head + (size_t)head * q.group + r % q.group;
        sqz_softmax_state s = sqz_softmax_empty();
        for (uint32_t first = 0; first < q.n_splits; first += TOGETHER) {
            sqz_softmax_state part[TOGETHER];
#pragma unroll
            for (uint32_t i = 0; i < TOGETHER; i++) {
                const size_t from = min(first + i, q.n_splits - 1) * n + at;
                part[i] = {q.maximum[from], q.sum[from]};
            }
#pragma unroll
            for (uint32_t i = 0; i < TOGETHER; i++)
                if (first + i < q.n_splits) s = sqz_softmax_merged(s, part[i]);
        }
        if (a.base_lse && a.base_lse[out] > -INFINITY) s = sqz_softmax_merged(s, {a.base_lse[out] * SQZ_LOG2E, 1.0f});
        const size_t pair = (size_t)(r / q.group) * a.n_head_kv + head;
        for (uint32_t i = 0; i < a.n_base; i++) {
            const sqz_cuda_part part = a.base_parts[(pair * a.n_base + i) * q.group + r % q.group];
            s = sqz_softmax_merged(s, {part.maximum, part.sum});
        }
        const float total = q.tail_gain ? a.log_total[out] * SQZ_LOG2E : sqz_softmax_log2(s);
        if (total > -INFINITY) {
            x = (q.shift ? q.shift[at] : 0.0f) + (q.tail_gain ? q.tail_gain[head] * SQZ_LOG2E : 0.0f) - total;
            y = q.norm[at];
            if (a.log_threshold) x -= a.log_threshold[pair] * SQZ_LOG2E;
        }
        if (a.log_total && !q.tail_gain) a.log_total[out] = total * SQZ_LN2;
    }
    q.query_x[(size_t)head * q.query_stride + r] = x;
    q.query_y[(size_t)head * q.query_stride + r] = y;
}

/* ---- The call ------------------------------------------------------------------ */

/* Parts of pass 1's columns, on either kernel. */
uint32_t splits_of(const struct sqz_cuda_block_lookup *a)
{
    const int n = sqz_device_get().n_multiprocessors;
    const uint64_t rows = (uint64_t)a->n_tokens * (a->n_head / a->n_head_kv);
    const uint64_t each = sqz_block_lookup_hopper_rows(rows, a->n_clusters);
    const uint64_t places = (n > 0 ? (uint64_t)n : 132) * (each <= ROWS ? 2 : 1);
    const uint64_t blocks = (rows + each - 1) / each * a->n_head_kv, tiles = ((uint64_t)a->n_clusters + 63) / 64;
    return sqz_cuda_splits_for(blocks, places, tiles / SPLIT_TILES < MAX_SPLITS ? tiles / SPLIT_TILES : MAX_SPLITS);
}

struct buffers {
    char *queries, *centroids;
    float *norm, *part, *maximum, *sum, *factor, *shift;
    float *cluster_x, *cluster_y, *query_x, *query_y, *spread;
    size_t n_bytes;
};

struct buffers carve(const struct sqz_cuda_block_lookup *a)
{
    struct buffers b;
    char *at = (char *)a->workspace;
    size_t used = 0;
    auto take = [&](size_t n) {
        char *p = at ? at + used : NULL;
        used += (n + 255) & ~(size_t)255;
        return p;
    };
    const size_t k = a->n_head_kv, rows = (size_t)a->n_tokens * a->n_head, clusters = k * a->n_clusters,
                 splits = splits_of(a);
    b.queries = take(rows * a->head_dim * 2);
    b.centroids = take(a->centroids ? 0 : clusters * a->head_dim * 2);
    b.norm = (float *)take(rows * sizeof(float));
    b.part = (float *)take(clusters * sizeof(float));
    b.maximum = (float *)take(splits * rows * sizeof(float));
    b.sum = (float *)take(splits * rows * sizeof(float));
    const size_t cluster_bytes = k * (((size_t)a->n_clusters + 127) / 128 * 128) * sizeof(float),
                 query_bytes = k * ((rows / k + 127) / 128 * 128) * sizeof(float);
    b.cluster_x = (float *)take(cluster_bytes);
    b.cluster_y = (float *)take(cluster_bytes);
    b.spread = (float *)take(cluster_bytes);
    b.query_x = (float *)take(query_bytes);
    b.query_y = (float *)take(query_bytes);
    b.factor = a->centroids ? NULL : (float *)take(cluster_bytes);
    b.shift = a->centroids ? NULL : (float *)take(rows * sizeof(float));
    b.n_bytes = used;
    return b;
}

template <class Type, int D, int PASS>
enum sqz_status launch_pass(const pass_args &p, const struct sqz_cuda_block_lookup *a, bool spread, void *stream)
{
    const dim3 grid((p.n_rows + ROWS - 1) / ROWS, a->n_head_kv, p.n_splits);
    if (D == 64 || D == 128) {
        const enum sqz_status status = sqz_block_lookup_hopper(p, PASS, a->type, D, a->n_head_kv, spread, stream);
        if (status != SQZ_ERROR_UNSUPPORTED) return status;
    }
    if (p.factor)
        return sqz_launch(lookup<Type, D, PASS, true, true>, grid, 256, shape<D>::shared_bytes, 1, true, p, stream);
    return sqz_launch(spread ? lookup<Type, D, PASS, true, false> : lookup<Type, D, PASS, false, false>, grid, 256,
                      shape<D>::shared_bytes, 1, true, p, stream);
}

template <class Type, int PASS>
enum sqz_status launch_any(const pass_args &p, const struct sqz_cuda_block_lookup *a, bool spread, void *stream)
{
    switch (a->head_dim) {
    case 64: return launch_pass<Type, 64, PASS>(p, a, spread, stream);
    case 96: return launch_pass<Type, 96, PASS>(p, a, spread, stream);
    case 128: return launch_pass<Type, 128, PASS>(p, a, spread, stream);
    case 256: return launch_pass<Type, 256, PASS>(p, a, spread, stream);
    }
    return SQZ_ERROR_UNSUPPORTED;
}

/* Numbers of queries and clusters; *q says where they are. */
template <class Type>
enum sqz_status prepare(prepare_args *q, const struct sqz_cuda_block_lookup *a, const float *tail_gain, bool after_ours,
                        void *stream)
{
    const struct buffers b = carve(a);
    const uint32_t k = a->n_head_kv, group = a->n_head / k, n_rows = a->n_tokens * group;
    const size_t rows = (size_t)a->n_tokens * a->n_head, clusters = (size_t)k * a->n_clusters;
    memset(q, 0, sizeof *q);
    q->a = *a;
    q->group = group;
    q->active_words = (a->n_clusters + 31) / 32;
    q->column_stride = (a->n_clusters + 127) / 128 * 128;
    q->query_stride = (n_rows + 127) / 128 * 128;
    q->queries = b.queries;
    q->centroids = b.centroids;
    q->norm = b.norm;
    q->part = b.part;
    q->cluster_x = b.cluster_x;
    q->cluster_y = b.cluster_y;
    q->spread = b.spread;
    q->query_x = b.query_x;
    q->query_y = b.query_y;
    q->maximum = b.maximum;
    q->sum = b.sum;
    q->n_splits = tail_gain ? 0 : splits_of(a);
    q->factor = b.factor;
    q->shift = b.shift;
    q->tail_gain = tail_gain;
    const uint32_t of_head = (q->column_stride + 255) / 256;
    q->blocks = {(uint32_t)((rows + 7) / 8), of_head, k * of_head, a->centroids ? 0 : (uint32_t)((clusters + 7) / 8)};
    return sqz_launch(prepare_all<Type>, dim3(q->blocks.queries + q->blocks.clusters + q->blocks.centroids), 256, 0, 1,
                      after_ours, *q, stream);
}

/* Pass 2, 3 or 4, after add_totals(). */
template <class Type> enum sqz_status launch_scores(const prepare_args &q, int pass, bool spread, void *stream)
{
    const struct sqz_cuda_block_lookup *const a = &q.a;
    pass_args p;
    memset(&p, 0, sizeof p);
    p.rows = a->centroids ? a->centroids : q.centroids;
    p.columns = q.queries;
    p.row_number = q.part;
    p.column_x = q.query_x;
    p.column_y = q.query_y;
    p.factor = q.factor;
    p.cluster_stride = q.column_stride;
    p.n_rows = a->n_clusters;
    p.n_columns = a->n_tokens * q.group;
    p.column_stride = q.query_stride;
    p.n_splits = 1;
    p.scale_log2 = a->scale * SQZ_LOG2E;
    p.score = a->score;
    p.inverse_count = 1.0f / (float)(pass == 4 ? q.group : p.n_columns);
    p.group = q.group;
    p.active = a->active;
    p.active_words = q.active_words;
    switch (pass) {
    case 2: return launch_any<Type, 2>(p, a, spread, stream);
    case 3: return launch_any<Type, 3>(p, a, spread, stream);
    default: return launch_any<Type, 4>(p, a, spread, stream);
    }
}

template <class Type> enum sqz_status launch_totals(const prepare_args &q, void *stream)
{
    return sqz_launch(add_totals<Type>, dim3((q.query_stride + 255) / 256, q.a.n_head_kv), 256, 0, 1, true, q, stream);
}

template <class Type> enum sqz_status launch(const struct sqz_cuda_block_lookup *a, bool after_ours, void *stream)
{
    const struct buffers b = carve(a);
    const bool spread = a->variance && a->variance_gain;
    prepare_args q;
    enum sqz_status status = prepare<Type>(&q, a, NULL, after_ours, stream);
    pass_args p;
    memset(&p, 0, sizeof p);
    p.rows = b.queries;
    p.columns = a->centroids ? a->centroids : b.centroids;
    p.row_number = b.norm;
    p.column_x = b.cluster_x;
    p.column_y = b.cluster_y;
    p.row_shift = b.shift;
    p.factor = b.factor;
    p.cluster_stride = q.column_stride;
    p.n_rows = a->n_tokens * q.group;
    p.n_columns = a->n_clusters;
    p.column_stride = q.column_stride;
    p.n_splits = q.n_splits;
    p.scale_log2 = a->scale * SQZ_LOG2E;
    p.maximum = b.maximum;
    p.sum = b.sum;
    if (status == SQZ_OK) status = launch_any<Type, 1>(p, a, spread, stream);
    if (status == SQZ_OK) status = launch_totals<Type>(q, stream);
    if (status != SQZ_OK || !a->score) return status;
    const bool maximum = a->group_max || (a->log_threshold && q.group == 1);
    return launch_scores<Type>(q, maximum ? 3 : a->log_threshold ? 4 : 2, spread, stream);
}

template <class Type>
enum sqz_status launch_tail(const struct sqz_cuda_block_lookup *a, const float *tail_gain,
                            struct sqz_lookup_tail *numbers, bool after_ours, void *stream)
{
    prepare_args q;
    enum sqz_status status = prepare<Type>(&q, a, tail_gain, after_ours, stream);
    *numbers = {a->centroids ? a->centroids : q.centroids,
                q.query_x,
                q.query_y,
                q.part,
                q.factor,
                q.query_stride,
                q.column_stride};
    if (status == SQZ_OK) status = launch_totals<Type>(q, stream);
    return status == SQZ_OK ? launch_scores<Type>(q, 3, a->variance != NULL, stream) : status;
}

} // namespace

extern "C" bool sqz_cuda_block_lookup_of_any(uint32_t group, bool group_max)
{
    return group_max || group == 1 || group == 2 || group == 4 || group == 8;
}

extern "C" bool sqz_cuda_block_lookup_supported(const struct sqz_cuda_block_lookup *a)
{
    const uint32_t d = a->head_dim;
    return (a->type == SQZ_ROW_F16 || a->type == SQZ_ROW_BF16) && (d == 64 || d == 96 || d == 128 || d == 256) &&
           a->n_head_kv && a->n_head_kv <= 65535 && a->n_head && a->n_head % a->n_head_kv == 0 && a->n_tokens &&
           a->n_clusters;
}

extern "C" size_t sqz_cuda_block_lookup_workspace_bytes(const struct sqz_cuda_block_lookup *a)
{
    return carve(a).n_bytes;
}

extern "C" enum sqz_status sqz_cuda_block_lookup_launch(const struct sqz_cuda_block_lookup *a, bool after_ours,
                                                        void *stream)
{
    if (!a->workspace || a->workspace_bytes < carve(a).n_bytes) return SQZ_ERROR_ARGUMENT;
    return a->type == SQZ_ROW_F16 ? launch<sqz_f16>(a, after_ours, stream) : launch<sqz_bf16>(a, after_ours, stream);
}

extern "C" void sqz_cuda_block_tail_set(const struct sqz_cuda_block_lookup *a, struct sqz_cuda_block_tail *tail)
{
    const struct buffers b = carve(a);
    tail->centroids = a->centroids ? a->centroids : b.centroids;
    tail->n_clusters = a->n_clusters;
    tail->stride = (a->n_clusters + 127) / 128 * 128;
    tail->spread = b.spread;
    tail->factor = b.factor;
    tail->shift = b.shift;
    tail->norm = b.norm;
}

enum sqz_status sqz_block_lookup_tail(const struct sqz_cuda_block_lookup *a, const float *tail_gain,
                                      struct sqz_lookup_tail *numbers, bool after_ours, void *stream)
{
    if (!a->workspace || a->workspace_bytes < carve(a).n_bytes) return SQZ_ERROR_ARGUMENT;
    return a->type == SQZ_ROW_F16 ? launch_tail<sqz_f16>(a, tail_gain, numbers, after_ours, stream)
                                  : launch_tail<sqz_bf16>(a, tail_gain, numbers, after_ours, stream);
}
