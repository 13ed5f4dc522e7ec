/*
 * A layer from its rows: cluster, sort, summarise, code; lib/build.c on the GPU, for
 * layers of one level whose keys stay F16 and are clustered by squared distance.
 *
 * Keys that can be clustered are packed for sqz_cuda_cluster(), whose means and
 * variances are those of the raw keys. Rows of a head then become fixed ones, sinks
 * and window, and behind them clusters in order. The mean key that INT8 centroids
 * are relative to is that of the centroids, each as often as it has keys.
 */
#include "build_layer.cuh"

namespace
{

enum { THREADS = 256, WARPS = THREADS / SQZ_WARP, MEAN_THREADS = 1024 };

struct place_args {
    uint32_t n_rows, n_fixed, n_sinks, n_heads;
    const uint32_t *order; /* [K][n_rows - n_fixed] */
    int32_t *position;     /* [K][n_rows] */
};

__global__ void __launch_bounds__(THREADS) place_kernel(const place_args a)
{
    const uint32_t i = blockIdx.x * THREADS + threadIdx.x, head = blockIdx.y, n = a.n_rows - a.n_fixed;
    if (i >= a.n_rows) return;
    uint32_t position = i;
    if (i >= a.n_fixed) position = a.n_sinks + a.order[(size_t)head * n + i - a.n_fixed];
    else if (i >= a.n_sinks) position = a.n_rows - a.n_fixed + i; /* the window's rows are the last */
    a.position[(size_t)head * a.n_rows + i] = (int32_t)position;
}

struct gather_args {
    const uint4 *from;
    uint4 *to;
    const int32_t *position;
    uint32_t n_rows, pieces; /* of 16 bytes a row */
};

/* Rows of `from`, in the order of their positions, to where they are sorted. */
__global__ void __launch_bounds__(THREADS) gather_kernel(const gather_args a)
{
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x, base = (size_t)blockIdx.y * a.n_rows;
    if (i >= (size_t)a.n_rows * a.pieces) return;
    const size_t from = base + (size_t)a.position[base + i / a.pieces];
    a.to[base * a.pieces + i] = a.from[from * a.pieces + i % a.pieces];
}

struct mean_args {
    uint32_t n_clusters, head_dim, n_rows;
    const float *centroids; /* [K][C][D] */
    const uint32_t *offset; /* [K][C + 1] */
    float *mean;            /* [K][D] */
};

/* A thread a number and a part of the clusters. */
__global__ void __launch_bounds__(MEAN_THREADS) mean_kernel(const mean_args a)
{
    __shared__ double part[MEAN_THREADS];
    const uint32_t d = a.head_dim, n_parts = MEAN_THREADS / d, i = threadIdx.x % d, p = threadIdx.x / d;
    const uint32_t *offset = a.offset + (size_t)blockIdx.x * (a.n_clusters + 1);
    const float *centroids = a.centroids + (size_t)blockIdx.x * a.n_clusters * d;
    double sum = 0;
    for (uint32_t c = p; p < n_parts && c < a.n_clusters; c += n_parts)
        sum += (double)centroids[(size_t)c * d + i] * (offset[c + 1] - offset[c]);
    part[threadIdx.x] = sum;
    __syncthreads();
    if (p > 0) return;
    for (uint32_t x = 1; x < n_parts; x++) sum += part[x * d + i];
    a.mean[(size_t)blockIdx.x * d + i] = (float)(sum / a.n_rows);
}

struct summary_args {
    uint32_t n_clusters, head_dim, n_rows, n_fixed;
    const float *from;      /* [K][C][D] centroids */
    const uint32_t *offset; /* [K][C + 1] */
    const __half *values;   /* [K][N][D] sorted */
    const float *mean;      /* [K][D] */
    int8_t *small;          /* [K][C][D] and scale; or NULL, and */
    float *scale;
    __half *plain;
    __half *value_centroids; /* or NULL */
    uint32_t *cluster_of;    /* [K][N - fixed] */
};

/* INT8 as lib/rows.c makes it, or F16. */
__device__ void store_centroid(const summary_args &a, size_t row, uint32_t head)
{
    const uint32_t lane = threadIdx.x % SQZ_WARP, d = a.head_dim;
    const float *from = a.from + row * d, *mean = a.mean + (size_t)head * d;
    float largest = 0;
    for (uint32_t i = lane; a.plain && i < d; i += SQZ_WARP) a.plain[row * d + i] = __float2half_rn(from[i]);
    if (a.plain) return;
    for (uint32_t i = lane; i < d; i += SQZ_WARP) largest = fmaxf(largest, fabsf(from[i] - mean[i]));
    for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    for (uint32_t i = lane; i < d; i += SQZ_WARP)
        a.small[row * d + i] = (int8_t)__float2int_rn((from[i] - mean[i]) * inverse);
    if (lane == 0) a.scale[row] = largest / 127.0f;
}

/* A warp a cluster; a lane has pairs of numbers lane, lane + 32, ... */
__global__ void __launch_bounds__(THREADS) summary_kernel(const summary_args a)
{
    const uint32_t c = blockIdx.x * WARPS + threadIdx.x / SQZ_WARP, head = blockIdx.y, lane = threadIdx.x % SQZ_WARP;
    if (c >= a.n_clusters) return;
    const size_t row = (size_t)head * a.n_clusters + c;
    const uint32_t *offset = a.offset + (size_t)head * (a.n_clusters + 1) + c;
    const uint32_t begin = offset[0], end = offset[1], pairs = a.head_dim / 2;
    store_centroid(a, row, head);
    for (uint32_t i = begin + lane; i < end; i += SQZ_WARP) a.cluster_of[(size_t)head * (a.n_rows - a.n_fixed) + i] = c;
    if (!a.value_centroids) return;
    const __half2 *values = (const __half2 *)a.values + ((size_t)head * a.n_rows + a.n_fixed) * pairs;
    for (uint32_t p = lane; p < pairs; p += SQZ_WARP) {
        float2 sum = make_float2(0, 0);
        for (uint32_t i = begin; i < end; i++) {
            const float2 x = __half22float2(values[(size_t)i * pairs + p]);
            sum.x += x.x;
            sum.y += x.y;
        }
        const float n = (float)(end - begin);
        ((__half2 *)a.value_centroids)[row * pairs + p] = __floats2half2_rn(sum.x / n, sum.y / n);
    }
}

struct buffers {
    void *rows;           /* [K][N][D] */
    uint32_t *order;      /* [K][n] */
    float *centroids;     /* [K][C][D] */
    uint32_t *cluster_of; /* [K][n] */
    void *cluster, *codes;
    size_t cluster_bytes;
};

struct sqz_cuda_cluster_args cluster_args(const struct sqz_gpu_build *a)
{
    const struct sqz_layer *l = a->layer;
    struct sqz_cuda_cluster_args c;
    memset(&c, 0, sizeof c);
    c.type = SQZ_ROW_F16;
    c.n_head_kv = l->shape.n_head_kv;
    c.n_rows = l->n_rows - l->n_fixed;
    c.head_dim = l->shape.head_dim;
    c.n_clusters = l->level[0].n_clusters;
    c.n_passes = a->options->n_iterations;
    c.seed = a->seed;
    return c;
}

struct buffers carve(struct sqz_arena *arena, const struct sqz_gpu_build *a)
{
    const struct sqz_layer *l = a->layer;
    const size_t k = l->shape.n_head_kv, d = l->shape.head_dim, n = l->n_rows - l->n_fixed;
    const struct sqz_cuda_cluster_args c = cluster_args(a);
    struct buffers b;
    b.rows = sqz_arena_take(arena, k * l->n_rows, d, 2);
    b.order = (uint32_t *)sqz_arena_take(arena, k, n, sizeof(uint32_t));
    b.centroids = (float *)sqz_arena_take(arena, k * l->level[0].n_clusters, d, sizeof(float));
    b.cluster_of = (uint32_t *)sqz_arena_take(arena, k, n, sizeof(uint32_t));
    b.cluster_bytes = sqz_cuda_cluster_workspace_bytes(&c);
    b.cluster = sqz_arena_take(arena, b.cluster_bytes, 1, 1);
    b.codes = l->codes.n_words ? sqz_arena_take(arena, sqz_build_codes_bytes(l), 1, 1) : NULL;
    return b;
}

bool supported(const struct sqz_gpu_build *a)
{
    const struct sqz_layer *l = a->layer;
    const struct sqz_cuda_cluster_args c = cluster_args(a);
    return l->n_levels == 1 && l->keys.type == SQZ_ROW_F16 && l->values.type == SQZ_ROW_F16 &&
           l->shape.head_dim <= SQZ_BUILD_MAX_DIM && l->n_fixed < l->n_rows && l->n_queries &&
           a->options->metric == SQZ_METRIC_EUCLIDEAN && sqz_cuda_cluster_supported(&c);
}

enum sqz_status copied(void *to, size_t to_stride, const void *from, size_t from_stride, size_t bytes, size_t n,
                       void *stream)
{
    const cudaError_t error =
        cudaMemcpy2DAsync(to, to_stride, from, from_stride, bytes, n, cudaMemcpyDeviceToDevice, (cudaStream_t)stream);
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess ? SQZ_OK : SQZ_ERROR_INTERNAL;
}

/* Packs the rows between sinks and window, and clusters them. */
enum sqz_status cluster(const struct sqz_gpu_build *a, const struct buffers *b, void *stream)
{
    const struct sqz_layer *l = a->layer;
    const size_t row = (size_t)l->shape.head_dim * 2, n = l->n_rows - l->n_fixed;
    struct sqz_cuda_cluster_args c = cluster_args(a);
    enum sqz_status status = copied(b->rows, n * row, (const char *)l->keys.data + a->options->n_sinks * row,
                                    l->n_rows * row, n * row, l->shape.n_head_kv, stream);
    c.keys = b->rows;
    c.centroids = b->centroids;
    c.variance = sqz_writable(l->level[0].variance);
    c.offset = sqz_writable(l->level[0].offset);
    c.order = b->order;
    c.workspace = b->cluster;
    c.workspace_bytes = b->cluster_bytes;
    return status == SQZ_OK ? sqz_cuda_cluster(&c, stream) : status;
}

enum sqz_status sort_rows(const struct sqz_layer *l, const struct buffers *b, const void *rows, void *stream)
{
    const uint32_t pieces = l->shape.head_dim / 8;
    const size_t bytes = (size_t)l->shape.n_head_kv * l->n_rows * l->shape.head_dim * 2;
    const gather_args gather = {(const uint4 *)b->rows, (uint4 *)const_cast<void *>(rows), l->position, l->n_rows,
                                pieces};
    const dim3 grid((unsigned)(((size_t)l->n_rows * pieces + THREADS - 1) / THREADS), l->shape.n_head_kv);
    const enum sqz_status status = copied(b->rows, bytes, rows, bytes, bytes, 1, stream);
    return status == SQZ_OK ? sqz_launch(gather_kernel, grid, THREADS, 0, 1, false, gather, stream) : status;
}

enum sqz_status summarise(const struct sqz_layer *l, const struct buffers *b, void *stream)
{
    const struct sqz_level *v = &l->level[0];
    const bool small = v->centroids.type == SQZ_ROW_I8;
    const uint32_t c = v->n_clusters, d = l->shape.head_dim, k = l->shape.n_head_kv;
    enum sqz_status status = SQZ_OK;
    if (small) {
        const mean_args mean = {c, d, l->n_rows - l->n_fixed, b->centroids, v->offset, sqz_writable(v->centroids.mean)};
        status = sqz_launch(mean_kernel, dim3(k), MEAN_THREADS, 0, 1, false, mean, stream);
    }
    summary_args s;
    memset(&s, 0, sizeof s);
    s.n_clusters = c;
    s.head_dim = d;
    s.n_rows = l->n_rows;
    s.n_fixed = l->n_fixed;
    s.from = b->centroids;
    s.offset = v->offset;
    s.values = (const __half *)l->values.data;
    s.mean = v->centroids.mean;
    s.small = small ? (int8_t *)const_cast<void *>(v->centroids.data) : NULL;
    s.plain = small ? NULL : (__half *)const_cast<void *>(v->centroids.data);
    s.scale = sqz_writable(v->centroids.scale);
    s.value_centroids = v->value_centroids.type ? (__half *)const_cast<void *>(v->value_centroids.data) : NULL;
    s.cluster_of = b->cluster_of;
    return status == SQZ_OK
               ? sqz_launch(summary_kernel, dim3((c + WARPS - 1) / WARPS, k), THREADS, 0, 1, false, s, stream)
               : status;
}

} // namespace

extern "C" size_t sqz_gpu_build_workspace_bytes(const struct sqz_gpu_build *a)
{
    struct sqz_arena arena = sqz_arena_on(NULL);
    if (!supported(a)) return 0;
    carve(&arena, a);
    return sqz_arena_bytes(&arena);
}

extern "C" enum sqz_status sqz_gpu_build(const struct sqz_gpu_build *a, void *stream)
{
    const struct sqz_layer *l = a->layer;
    const size_t bytes = sqz_gpu_build_workspace_bytes(a);
    if (bytes == 0) return SQZ_ERROR_UNSUPPORTED;
    if (a->workspace_bytes < bytes) return SQZ_ERROR_ARGUMENT;
    struct sqz_arena arena = sqz_arena_on(a->workspace);
    const struct buffers b = carve(&arena, a);
    const place_args place = {l->n_rows,          l->n_fixed, a->options->n_sinks,
                              l->shape.n_head_kv, b.order,    sqz_writable(l->position)};
    enum sqz_status status = cluster(a, &b, stream);
    if (status == SQZ_OK)
        status = sqz_launch(place_kernel, dim3((l->n_rows + THREADS - 1) / THREADS, l->shape.n_head_kv), THREADS, 0, 1,
                            false, place, stream);
    if (status == SQZ_OK) status = sort_rows(l, &b, l->keys.data, stream);
    if (status == SQZ_OK) status = sort_rows(l, &b, l->values.data, stream);
    if (status == SQZ_OK) status = summarise(l, &b, stream);
    return status == SQZ_OK && l->codes.n_words ? sqz_build_codes(l, b.cluster_of, b.codes, stream) : status;
}
