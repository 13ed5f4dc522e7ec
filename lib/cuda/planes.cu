/*
 * What stands beside rows in planes on a GPU, and F16 rows made of them (planes.h).
 *
 * The index is made once, when a context comes: cluster and beginnings of clusters of every group of 8 rows, so that
 * who reads a group knows what its keys are relative to, and both steps of a row in one word. A value's step is
 * divided by a power of two, so that a weight times a step is a number that F16 has.
 */
#include "planes.cuh"

namespace
{

enum { THREADS = 256, MOST_THREADS = 1024 };

struct index_call {
    struct sqz_cuda_plane_layer layer;
    const uint16_t *key_step, *value_step;
    const uint32_t *offset;
};

/* A block a head: the largest step of a value, as a power of two. Steps that are no numbers count as the largest that F16
 * has. */
__global__ void __launch_bounds__(MOST_THREADS) unit_kernel(const __grid_constant__ index_call a)
{
    __shared__ float largest[MOST_THREADS / SQZ_WARP];
    const uint32_t head = blockIdx.x, n = a.layer.n_rows - a.layer.n_whole;
    const uint16_t *step = a.value_step + (size_t)head * n;
    float x = 0;
    for (uint32_t i = threadIdx.x; i < n; i += MOST_THREADS)
        x = fmaxf(x, fminf(fabsf(sqz_f16_number(step[i])), 65504.0f));
#pragma unroll
    for (int s = 16; s; s /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, s));
    if (threadIdx.x % SQZ_WARP == 0) largest[threadIdx.x / SQZ_WARP] = x;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < MOST_THREADS / SQZ_WARP; i++) x = fmaxf(x, largest[i]);
    float unit = 1;
    if (x > 0) unit = ldexpf(1.0f, ilogbf(x) + 1);
    a.layer.value_unit[head] = unit;
}

/* A thread a group. */
__global__ void __launch_bounds__(THREADS) index_kernel(const __grid_constant__ index_call a)
{
    const struct sqz_cuda_plane_layer &l = a.layer;
    const uint32_t head = blockIdx.y, group = blockIdx.x * THREADS + threadIdx.x, n = l.n_rows - l.n_whole;
    const uint32_t n_groups = (uint32_t)(((uint64_t)l.n_rows + SQZ_GROUP_ROWS - 1) / SQZ_GROUP_ROWS);
    if (group >= n_groups) return;
    const uint32_t begin = max(group * SQZ_GROUP_ROWS, l.n_whole),
                   end = min(group * SQZ_GROUP_ROWS + SQZ_GROUP_ROWS, l.n_rows);
    const uint32_t *offset = a.offset + (size_t)head * (l.n_clusters + 1);
    const float inverse = 1.0f / l.value_unit[head];
    uint32_t cluster = 0, starts = 0;
    if (begin < end) cluster = sqz_place_of(offset, l.n_clusters, begin - l.n_whole);
    uint32_t now = cluster;
    for (uint32_t row = begin; row < end; row++) {
        const uint32_t local = row - l.n_whole;
        const size_t at = (size_t)head * n + local;
        if (now + 1 < l.n_clusters && offset[now + 1] <= local) {
            now++; /* no cluster is empty */
            starts |= 1u << (row - group * SQZ_GROUP_ROWS);
        }
        const __half value = __float2half(sqz_f16_number(a.value_step[at]) * inverse);
        l.steps[at] = a.key_step[at] | (uint32_t)__half_as_ushort(value) << 16;
    }
    l.place[(size_t)head * n_groups + group] = cluster << 8 | starts;
}

struct to_f16_call {
    struct sqz_cuda_plane_layer layer;
    __half *keys, *values;
};

/* A warp a row of a head. */
template <int D> __global__ void __launch_bounds__(THREADS) to_f16_kernel(const __grid_constant__ to_f16_call a)
{
    const struct sqz_cuda_plane_layer &l = a.layer;
    const uint32_t head = blockIdx.y, row = blockIdx.x * (THREADS / SQZ_WARP) + threadIdx.x / SQZ_WARP;
    const int lane = threadIdx.x % SQZ_WARP;
    if (row >= l.n_rows) return;
    const size_t to = ((size_t)head * l.n_rows + row) * D;
    if (row < l.n_whole) {
        const size_t from = ((size_t)head * l.n_whole + row) * D;
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
            a.keys[to + lane + 32 * j] = __ushort_as_half(l.keys.whole[from + lane + 32 * j]);
            a.values[to + lane + 32 * j] = __ushort_as_half(l.values.whole[from + lane + 32 * j]);
        }
        return;
    }
    const size_t at = (size_t)head * (l.n_rows - l.n_whole) + row - l.n_whole;
    const uint32_t group = row / SQZ_GROUP_ROWS;
    const uint32_t n_groups = (uint32_t)(((uint64_t)l.n_rows + SQZ_GROUP_ROWS - 1) / SQZ_GROUP_ROWS);
    const uint32_t place = l.place[(size_t)head * n_groups + group];
    const size_t cluster =
        (size_t)head * l.n_clusters + (place >> 8) + __popc(place & ((2u << row % SQZ_GROUP_ROWS) - 1) & 0xff);
    float key[D / 32], value[D / 32];
    sqz_plane_row<D>(key, value, l, l.steps[at], l.value_unit[head], at);
#pragma unroll
    for (int j = 0; j < D / 32; j++) {
        const int d = lane + 32 * j;
        float base;
        if (l.centroids.type == SQZ_ROW_I8)
            base = l.centroids.mean[(size_t)head * D + d] +
                   l.centroids.scale[cluster] * (float)((const int8_t *)l.centroids.data)[cluster * D + d];
        else base = __half2float(((const __half *)l.centroids.data)[cluster * D + d]);
        a.keys[to + d] = __float2half(base + key[j]);
        a.values[to + d] = __float2half(l.value_mean[(size_t)head * D + d] + value[j]);
    }
}

size_t aligned(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

struct sqz_cuda_planes planes_of(const struct sqz_rows *rows)
{
    return {(const uint8_t *)rows->data, rows->type == SQZ_ROW_I44 ? rows->planes.lower : NULL, rows->planes.whole};
}

/* Arrays of the index, one behind the other. */
struct index_places {
    size_t place, steps, end;
};
struct index_places places_of(const struct sqz_layer *l)
{
    const size_t k = l->shape.n_head_kv, n = l->n_rows;
    struct index_places p;
    p.place = aligned(k * sizeof(float));
    p.steps = p.place + aligned(k * ((n + SQZ_GROUP_ROWS - 1) / SQZ_GROUP_ROWS) * sizeof(uint32_t));
    p.end = p.steps + aligned(k * (n - l->keys.planes.n_whole) * sizeof(uint32_t));
    return p;
}

} // namespace

extern "C" struct sqz_cuda_plane_layer sqz_cuda_plane_layer_of(const struct sqz_layer *l, const void *index)
{
    struct sqz_cuda_plane_layer p = {};
    const struct index_places at = places_of(l);
    p.n_head_kv = l->shape.n_head_kv;
    p.head_dim = l->shape.head_dim;
    p.n_rows = l->n_rows;
    p.n_whole = l->keys.planes.n_whole;
    p.keys = planes_of(&l->keys);
    p.values = planes_of(&l->values);
    p.value_mean = l->values.mean;
    p.n_clusters = l->level[0].n_clusters;
    p.centroids = sqz_cuda_rows_of(&l->level[0].centroids);
    p.value_unit = (float *)index;
    p.place = (uint32_t *)((char *)index + at.place);
    p.steps = (uint32_t *)((char *)index + at.steps);
    return p;
}

extern "C" size_t sqz_cuda_plane_index_bytes(const struct sqz_layer *layer)
{
    const bool planes = layer && sqz_row_is_planes(layer->keys.type) && sqz_cuda_layer_supported(layer);
    return planes ? places_of(layer).end : 0;
}

extern "C" enum sqz_status sqz_cuda_plane_index(const struct sqz_layer *l, void *index, void *stream)
{
    if (!l || !index || (uintptr_t)index % 16 || l->space != SQZ_SPACE_CUDA) return SQZ_ERROR_ARGUMENT;
    if (!sqz_cuda_plane_index_bytes(l) || sqz_cuda_multiprocessors() == 0) return SQZ_ERROR_UNSUPPORTED;
    if (!l->keys.planes.step || !l->values.planes.step || !l->level[0].offset) return SQZ_ERROR_ARGUMENT;
    const struct sqz_cuda_plane_layer p = sqz_cuda_plane_layer_of(l, index);
    return sqz_cuda_plane_index_launch(&p, l->keys.planes.step, l->values.planes.step, l->level[0].offset, stream);
}

extern "C" enum sqz_status sqz_cuda_plane_index_launch(const struct sqz_cuda_plane_layer *layer,
                                                       const uint16_t *key_step, const uint16_t *value_step,
                                                       const uint32_t *offset, void *stream)
{
    const index_call a = {*layer, key_step, value_step, offset};
    const uint32_t n_groups = (uint32_t)(((uint64_t)layer->n_rows + SQZ_GROUP_ROWS - 1) / SQZ_GROUP_ROWS);
    const enum sqz_status status =
        sqz_launch(unit_kernel, dim3(layer->n_head_kv), MOST_THREADS, 0, 1, false, a, stream);
    if (status != SQZ_OK) return status;
    return sqz_launch(index_kernel, dim3((n_groups + THREADS - 1) / THREADS, layer->n_head_kv), THREADS, 0, 1, false, a,
                      stream);
}

extern "C" enum sqz_status sqz_cuda_planes_to_f16_launch(const struct sqz_cuda_plane_layer *layer, void *keys,
                                                         void *values, void *stream)
{
    const to_f16_call a = {*layer, (__half *)keys, (__half *)values};
    const dim3 grid((layer->n_rows + THREADS / SQZ_WARP - 1) / (THREADS / SQZ_WARP), layer->n_head_kv);
    switch (layer->head_dim) {
    case 64: return sqz_launch(to_f16_kernel<64>, grid, THREADS, 0, 1, false, a, stream);
    case 96: return sqz_launch(to_f16_kernel<96>, grid, THREADS, 0, 1, false, a, stream);
    case 128: return sqz_launch(to_f16_kernel<128>, grid, THREADS, 0, 1, false, a, stream);
    case 256: return sqz_launch(to_f16_kernel<256>, grid, THREADS, 0, 1, false, a, stream);
    }
    return SQZ_ERROR_UNSUPPORTED;
}
