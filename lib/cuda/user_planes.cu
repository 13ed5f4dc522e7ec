/*
 * Own rows in planes (planes.h): blocks of 128 F16 rows put there, moved, and made F16 again for whoever multiplies blocks.
 *
 * A block's planes are those that lib/user_rows.c makes of the same rows, bit for bit where sums are added in the same order:
 * the mean of its keys in the order of the rows, a row less its base, turned, its step, and its numbers. What differs is where a
 * value's step is: over a power of two of its sequence and head, as in a context's index (planes.cu). When a block has a value
 * with a larger one than any before, that number grows, and the steps before are divided once more, which is exact.
 */
#include "planes.cuh"

namespace
{

enum { BLOCK = SQZ_CUDA_USER_BLOCK, THREADS = 512, WARPS = THREADS / SQZ_WARP, EACH = BLOCK / WARPS };

struct flush_call {
    const float *value_mean; /* [K][D] */
    char *planes;
    sqz_cuda_user_places at;
    bool both;
    uint32_t capacity, first_block, n_blocks, key_capacity;
    const __half *keys, *values;
};

/* An eighth of the largest number as F16, not below it; what F16 has no number for gets its largest. */
__device__ __forceinline__ uint16_t step_of(float largest)
{
    const uint16_t most = 0x7bff;
    const uint16_t step = __half_as_ushort(__float2half_rn(largest / 8));
    if (step > most) return most;
    return sqz_f16_number(step) < largest / 8 && step < most ? step + 1 : step;
}

/* Mean of a block's rows as F16, by its first D threads, in `mean` and in its place. */
template <int D> __device__ __forceinline__ void make_centroid(float *mean, const __half *rows, __half *to)
{
    const int d = threadIdx.x;
    if (d < D) {
        float sum = 0;
#pragma unroll 16
        for (int r = 0; r < BLOCK; r++) sum = __fadd_rn(sum, __half2float(rows[(size_t)r * D + d]));
        const __half rounded = __float2half_rn(__fmul_rn(sum, 1.0f / BLOCK));
        to[d] = rounded;
        mean[d] = __half2float(rounded);
    }
    __syncthreads();
}

/* A row into its planes, by a warp; returns its step. */
template <int D>
__device__ __forceinline__ uint16_t store_row(const __half *row, const float *base, uint8_t *upper, uint8_t *lower)
{
    const int lane = threadIdx.x % SQZ_WARP;
    float x[D / 32], largest = 0;
#pragma unroll
    for (int j = 0; j < D / 32; j++) x[j] = __half2float(row[lane + 32 * j]) - base[lane + 32 * j];
    sqz_turn_warp<D>(x);
#pragma unroll
    for (int j = 0; j < D / 32; j++) largest = fmaxf(largest, fabsf(x[j]));
#pragma unroll
    for (int s = 16; s; s /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, s));
    const uint16_t step = step_of(largest);
    const float width = sqz_f16_number(step), inverse = width > 0 ? 16.0f / width : 0.0f;
#pragma unroll
    for (int j = 0; j < D / 32; j++) {
        const float y = floorf(x[j] * inverse); /* NaN becomes the smallest */
        const uint32_t u = y >= 127.0f ? 255 : y > -128.0f ? (int)y + 128 : 0, v = __shfl_down_sync(~0u, u, 16);
        if (lane >= 16) continue;
        upper[16 * j + lane] = (uint8_t)(u >> 4 | (v & 0xf0));
        if (lower) lower[16 * j + lane] = (uint8_t)((u & 15) | (v & 15) << 4);
    }
    return step;
}

/* Steps of values in units: a step above all before makes the unit larger. All threads; step: those of the block. */
__device__ void store_value_steps(const uint16_t *step, float *unit, uint32_t *steps, uint32_t block)
{
    __shared__ float largest[WARPS], new_unit;
    float x = threadIdx.x < BLOCK ? sqz_f16_number(step[threadIdx.x]) : 0.0f;
#pragma unroll
    for (int s = 16; s; s /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, s));
    if (threadIdx.x % SQZ_WARP == 0) largest[threadIdx.x / SQZ_WARP] = x;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < WARPS; i++) x = fmaxf(x, largest[i]);
        const float needed = x > 0 ? ldexpf(1.0f, ilogbf(x) + 1) : 1.0f;
        new_unit = block && *unit >= needed ? *unit : needed;
    }
    __syncthreads();
    __half *halves = (__half *)steps + 1; /* the upper one of each word */
    const float old = *unit;
    if (block && new_unit != old)
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < block * BLOCK; i += THREADS)
            halves[2 * i] = __float2half(__half2float(halves[2 * i]) * (old / new_unit));
    if (threadIdx.x < BLOCK)
        halves[2 * ((size_t)block * BLOCK + threadIdx.x)] = __float2half(sqz_f16_number(step[threadIdx.x]) / new_unit);
    __syncthreads();
    if (threadIdx.x == 0) *unit = new_unit;
    __syncthreads();
}

/* A thread block has the keys or the values of a head, of all blocks one after the other. */
template <int D> __global__ void __launch_bounds__(THREADS) flush_kernel(const __grid_constant__ flush_call a)
{
    __shared__ uint4 tile[BLOCK * D / 8]; /* the block's rows: everybody waits for memory once */
    __shared__ float base[D];
    __shared__ uint16_t step[BLOCK];
    const __half *const rows = (const __half *)tile;
    const uint32_t head = blockIdx.x, warp = threadIdx.x / SQZ_WARP;
    const bool values = blockIdx.y != 0;
    const uint4 *from = (const uint4 *)((values ? a.values : a.keys) + (size_t)head * a.key_capacity * D);
    const size_t row = (size_t)head * a.capacity;
    uint8_t *upper = (uint8_t *)a.planes + a.at.upper[values] + row * (D / 2);
    uint8_t *lower = a.both ? (uint8_t *)a.planes + a.at.lower[values] + row * (D / 2) : NULL;
    uint32_t *steps = (uint32_t *)(a.planes + a.at.steps) + row;
    __half *centroids = (__half *)(a.planes + a.at.centroids) + (size_t)head * (a.capacity / BLOCK) * D;
    if (values && threadIdx.x < D) base[threadIdx.x] = a.value_mean[(size_t)head * D + threadIdx.x];
#pragma unroll 1
    for (uint32_t block = a.first_block; block < a.first_block + a.n_blocks; block++, from += BLOCK * D / 8) {
#pragma unroll
        for (int i = 0; i < BLOCK * D / 8 / THREADS; i++)
            tile[threadIdx.x + i * THREADS] = from[threadIdx.x + i * THREADS];
        __syncthreads();
        if (!values) make_centroid<D>(base, rows, centroids + (size_t)block * D);
#pragma unroll 2
        for (int i = 0; i < EACH; i++) {
            const int r = warp * EACH + i;
            const size_t at = ((size_t)block * BLOCK + r) * (D / 2);
            const uint16_t s = store_row<D>(rows + (size_t)r * D, base, upper + at, lower ? lower + at : NULL);
            if (threadIdx.x % SQZ_WARP == 0) step[r] = s;
        }
        __syncthreads();
        if (values) store_value_steps(step, (float *)(a.planes + a.at.unit) + head, steps, block);
        else if (threadIdx.x < BLOCK)
            ((uint16_t *)(steps + (size_t)block * BLOCK + threadIdx.x))[0] = step[threadIdx.x];
        __syncthreads();
    }
}

struct rows_call {
    sqz_cuda_user_rows a;
    sqz_cuda_plane_layer layer; /* of the rows in planes */
    const __half *centroids;
};

/* A warp a row of a head. */
template <int D> __global__ void __launch_bounds__(THREADS) rows_kernel(const __grid_constant__ rows_call c)
{
    const sqz_cuda_user_rows &a = c.a;
    const uint32_t head = blockIdx.y, row = a.first + blockIdx.x * WARPS + threadIdx.x / SQZ_WARP;
    const int lane = threadIdx.x % SQZ_WARP;
    if (row >= a.end) return;
    __half *keys = (__half *)a.keys + ((size_t)head * a.n_rows + row) * D,
           *values = (__half *)a.values + ((size_t)head * a.n_rows + row) * D;
    if (row >= a.n_plane_rows) {
        const size_t from = ((size_t)head * a.user_capacity_rows + row - a.user_first_row) * D;
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
            keys[lane + 32 * j] = ((const __half *)a.user_keys)[from + lane + 32 * j];
            values[lane + 32 * j] = ((const __half *)a.user_values)[from + lane + 32 * j];
        }
        return;
    }
    const size_t at = (size_t)head * a.plane_capacity_rows + row;
    const __half *centroid = c.centroids + at / BLOCK * D;
    float key[D / 32], value[D / 32];
    sqz_plane_row<D>(key, value, c.layer, c.layer.steps[at], c.layer.value_unit[head], at);
#pragma unroll
    for (int j = 0; j < D / 32; j++) {
        const int d = lane + 32 * j;
        keys[d] = __float2half(__half2float(centroid[d]) + key[j]);
        values[d] = __float2half(c.layer.value_mean[(size_t)head * D + d] + value[j]);
    }
}

bool supported(const struct sqz_layer *l)
{
    return l && sqz_row_is_planes(l->keys.type) && sqz_cuda_layer_supported(l);
}

} // namespace

extern "C" size_t sqz_cuda_user_planes_bytes(const struct sqz_layer *l, uint32_t n_rows)
{
    if (!supported(l) || n_rows == 0 || n_rows % BLOCK || n_rows > SQZ_ROWS_MAX_ROWS) return 0;
    const struct sqz_cuda_user_places at = sqz_cuda_user_places_of(l->shape.n_head_kv, l->shape.head_dim, n_rows);
    const size_t plane = at.upper[1] - at.upper[0];
    return at.lower[0] + (l->keys.type == SQZ_ROW_I44 ? 2 * plane : 0);
}

extern "C" enum sqz_status sqz_cuda_flush(const struct sqz_cuda_flush_args *a, void *stream)
{
    if (!a || !a->layer || !a->planes || !a->keys || !a->values || a->layer->space != SQZ_SPACE_CUDA)
        return SQZ_ERROR_ARGUMENT;
    if (!sqz_cuda_user_planes_bytes(a->layer, a->capacity_rows) || sqz_cuda_multiprocessors() == 0)
        return SQZ_ERROR_UNSUPPORTED;
    if (a->first_block > a->capacity_rows / BLOCK || a->n_blocks > a->capacity_rows / BLOCK - a->first_block ||
        a->n_blocks > a->key_capacity_rows / BLOCK || !a->layer->values.mean ||
        ((uintptr_t)a->keys | (uintptr_t)a->values) % 16)
        return SQZ_ERROR_ARGUMENT;
    if (a->n_blocks == 0) return SQZ_OK;
    const uint32_t k = a->layer->shape.n_head_kv, d = a->layer->shape.head_dim;
    const flush_call c = {a->layer->values.mean,
                          (char *)a->planes,
                          sqz_cuda_user_places_of(k, d, a->capacity_rows),
                          a->layer->keys.type == SQZ_ROW_I44,
                          a->capacity_rows,
                          a->first_block,
                          a->n_blocks,
                          a->key_capacity_rows,
                          (const __half *)a->keys,
                          (const __half *)a->values};
    return sqz_launch(d == 64 ? flush_kernel<64> : flush_kernel<128>, dim3(k, 2), THREADS, 0, 1, false, c, stream);
}

extern "C" enum sqz_status sqz_cuda_move_user_planes(const struct sqz_layer *l, void *to, uint32_t to_rows,
                                                     const void *from, uint32_t from_rows, uint32_t n_blocks,
                                                     void *stream)
{
    if (!sqz_cuda_user_planes_bytes(l, to_rows) || !sqz_cuda_user_planes_bytes(l, from_rows))
        return SQZ_ERROR_UNSUPPORTED;
    if (!to || !from || n_blocks > to_rows / BLOCK || n_blocks > from_rows / BLOCK) return SQZ_ERROR_ARGUMENT;
    const uint32_t k = l->shape.n_head_kv, d = l->shape.head_dim;
    const struct sqz_cuda_user_places a = sqz_cuda_user_places_of(k, d, to_rows),
                                      b = sqz_cuda_user_places_of(k, d, from_rows);
    /* Where an array is in both, and bytes that a block has of it. */
    const struct {
        size_t to, from, block;
    } arrays[] = {{a.centroids, b.centroids, d * sizeof(uint16_t)}, {a.steps, b.steps, BLOCK * sizeof(uint32_t)},
                  {a.upper[0], b.upper[0], BLOCK * d / 2},          {a.upper[1], b.upper[1], BLOCK * d / 2},
                  {a.lower[0], b.lower[0], BLOCK * d / 2},          {a.lower[1], b.lower[1], BLOCK * d / 2}};
    const size_t n_arrays = l->keys.type == SQZ_ROW_I44 ? 6 : 4, n = n_blocks;
    bool ok =
        cudaMemcpyAsync(to, from, k * sizeof(float), cudaMemcpyDeviceToDevice, (cudaStream_t)stream) == cudaSuccess;
    for (size_t i = 0; i < n_arrays && n && ok; i++)
        ok = cudaMemcpy2DAsync((char *)to + arrays[i].to, to_rows / BLOCK * arrays[i].block,
                               (const char *)from + arrays[i].from, from_rows / BLOCK * arrays[i].block,
                               n * arrays[i].block, k, cudaMemcpyDeviceToDevice, (cudaStream_t)stream) == cudaSuccess;
    if (!ok) cudaGetLastError();
    return ok ? SQZ_OK : SQZ_ERROR_INTERNAL;
}

extern "C" enum sqz_status sqz_cuda_user_rows_launch(const struct sqz_cuda_user_rows *a, void *stream)
{
    const uint32_t k = a->layer->shape.n_head_kv, d = a->layer->shape.head_dim;
    const struct sqz_cuda_user_places at = sqz_cuda_user_places_of(k, d, a->plane_capacity_rows);
    const char *planes = (const char *)a->planes;
    const bool both = a->layer->keys.type == SQZ_ROW_I44;
    rows_call c = {};
    c.a = *a;
    c.centroids = (const __half *)(planes + at.centroids);
    c.layer.value_mean = a->layer->values.mean;
    c.layer.keys.upper = (const uint8_t *)planes + at.upper[0];
    c.layer.values.upper = (const uint8_t *)planes + at.upper[1];
    c.layer.keys.lower = both ? (const uint8_t *)planes + at.lower[0] : NULL;
    c.layer.values.lower = both ? (const uint8_t *)planes + at.lower[1] : NULL;
    c.layer.steps = (uint32_t *)(uintptr_t)(planes + at.steps);
    c.layer.value_unit = (float *)(uintptr_t)(planes + at.unit);
    if (a->first >= a->end) return SQZ_OK;
    const dim3 grid((a->end - a->first + WARPS - 1) / WARPS, k);
    return sqz_launch(d == 64 ? rows_kernel<64> : rows_kernel<128>, grid, THREADS, 0, 1, false, c, stream);
}
