/*
 * Clustering: which centres are near a key. Products of 128 keys with tiles of 64
 * centres by mma.sync, keys gathered by row through cp.async; cluster.cuh has the
 * score and why it is relative to a mean.
 *
 * compare: a thread block takes 128 keys of one group's list and goes through the
 * group's centres; the two stay in the caches (a group has about sqrt(C) centres), so
 * this is bound by the gathered keys, 2 D bytes each, once a group that they look at.
 * nearest: all centres of a head, few enough, keeping the best ones.
 * Shared memory: (128 + 2 * 64) rows of D numbers padded to a power of two, and biases:
 * 64.5 KiB at D 128, three thread blocks a multiprocessor.
 * Head sizes: 64, 96, 128, 256. sm_80 and newer.
 */
#include "cluster.cuh"
#include "tiles.cuh"

namespace
{

enum { THREADS = 256, ROWS = SQZ_CLUSTER_TILE, BN = 64, PROBES = SQZ_CLUSTER_PROBES };

template <int D> struct shape {
    static const int tile_bytes = BN * sqz_tile<D>::stride;
    static const size_t shared_bytes = (size_t)ROWS * sqz_tile<D>::stride + 2 * tile_bytes + 2 * BN * sizeof(float);
};

/* Goes through centres centre_of(first) to centre_of(end - 1): each(r, product less bias, i) of centre i and the
 * thread's row r of two, which are 8 apart; row_of(r): the row that stands at r of 128, or N for none. */
template <class Type, int D, class RowOf, class CentreOf, class Each>
__device__ __forceinline__ void go_through(const sqz_cluster_keys &k, const sqz_cluster_centres &centres, uint32_t head,
                                           uint32_t first, uint32_t end, RowOf row_of, CentreOf centre_of, Each each)
{
    typedef sqz_tile<D> Tile;
    extern __shared__ __align__(128) char shared[];
    const uint32_t rows = (uint32_t)__cvta_generic_to_shared(shared), columns = rows + ROWS * Tile::stride;
    float *const bias = (float *)(shared + ROWS * Tile::stride + 2 * shape<D>::tile_bytes);
    const int warp = threadIdx.x / 32;
    auto load_centres = [&](uint32_t stage, uint32_t from) {
        const size_t base = (size_t)head * centres.n;
        for (int i = threadIdx.x; i < BN * Tile::chunks; i += THREADS) {
            const int r = i / Tile::chunks, c = i % Tile::chunks;
            const bool exists = from + r < end;
            const size_t at = exists ? (base + centre_of(from + r)) * D + c * 8 : 0;
            sqz_copy16(Tile::at(columns + stage * shape<D>::tile_bytes, r, c), (const char *)centres.d + at * 2,
                       exists);
        }
        if (threadIdx.x < BN)
            bias[stage * BN + threadIdx.x] =
                from + threadIdx.x < end ? centres.bias[base + centre_of(from + threadIdx.x)] : INFINITY;
    };
    for (int i = threadIdx.x; i < ROWS * Tile::chunks; i += THREADS) {
        const int r = i / Tile::chunks, c = i % Tile::chunks;
        const uint32_t row = row_of(r);
        const bool exists = row < k.n_rows;
        const size_t at = exists ? ((size_t)head * k.n_rows + row) * D + c * 8 : 0;
        sqz_copy16(Tile::at(rows, r, c), (const char *)k.keys + at * 2, exists);
    }
    load_centres(0, first);
    sqz_copy16_commit();
    for (uint32_t from = first, stage = 0; from < end; from += BN, stage ^= 1) {
        sqz_copy16_wait<0>();
        __syncthreads(); /* this tile has come, and all warps have left the one before */
        if (from + BN < end) load_centres(stage ^ 1, from + BN);
        sqz_copy16_commit();
        float s[BN / 2];
        sqz_tile_products<Type, D, BN>(s, rows, warp * 16, columns + stage * shape<D>::tile_bytes);
#pragma unroll
        for (int j = 0; j < BN / 8; j++) {
            const uint32_t column = 8 * j + 2 * (threadIdx.x % 4);
            const float2 b = *(const float2 *)(bias + stage * BN + column);
#pragma unroll
            for (int i = 0; i < 4; i++) each(i / 2, s[4 * j + i] - (i % 2 ? b.y : b.x), from + column + i % 2);
        }
    }
    sqz_copy16_wait<0>();
}

struct compare_args {
    sqz_cluster_keys k;
    sqz_cluster_list list;
    sqz_cluster_centres centres;
    const uint32_t *number, *first;
    uint32_t base;
    unsigned long long *best;
};

/* Grid: (tile, head). */
template <class Type, int D> __global__ void __launch_bounds__(THREADS) compare_kernel(const compare_args a)
{
    const uint32_t head = blockIdx.y, n_groups = a.list.n_groups, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t *tile_start = a.list.tile_start + (size_t)head * (n_groups + 1);
    if (blockIdx.x >= tile_start[n_groups]) return;
    const uint32_t group = sqz_place_of(tile_start, n_groups, blockIdx.x);
    const uint32_t *start = a.list.start + (size_t)head * (n_groups + 1);
    const uint32_t begin = start[group] + (blockIdx.x - tile_start[group]) * ROWS, stop = start[group + 1];
    const uint32_t *first = a.first + (size_t)head * (n_groups + 1);
    if (first[group] == first[group + 1]) return;
    const uint32_t *list = a.list.row + (size_t)head * a.list.capacity;
    auto row_of = [&](uint32_t r) { return begin + r < stop ? list[begin + r] : a.k.n_rows; };
    const uint32_t *number = a.number ? a.number + (size_t)head * a.centres.n : NULL;
    auto centre_of = [&](uint32_t i) { return number ? number[i] : a.base + i; };
    float best[2] = {-INFINITY, -INFINITY};
    uint32_t at[2] = {0, 0};
    go_through<Type, D>(a.k, a.centres, head, first[group], first[group + 1], row_of, centre_of,
                        [&](int r, float x, uint32_t i) {
        if (x > best[r]) {
            best[r] = x;
            at[r] = i;
        }
    });
#pragma unroll
    for (int r = 0; r < 2; r++) {
        unsigned long long x = best[r] > -INFINITY ? sqz_cluster_pack(best[r], centre_of(at[r])) : 0;
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            const unsigned long long other = __shfl_xor_sync(~0u, x, step);
            x = other > x ? other : x;
        }
        const uint32_t row = row_of(warp * 16 + lane / 4 + 8 * r);
        if (lane % 4 == 0 && row < a.k.n_rows && x) atomicMax(a.best + (size_t)head * a.k.n_rows + row, x);
    }
}

struct nearest_args {
    sqz_cluster_keys k;
    sqz_cluster_rows rows;
    sqz_cluster_centres centres;
    uint32_t *probe;
    float *score;
};

/* The P best of what it is shown, best first. */
template <int P> struct few_best {
    float value[P];
    uint32_t at[P];
    __device__ __forceinline__ void insert(float x, uint32_t centre)
    {
        if (!(x > value[P - 1])) return;
        value[P - 1] = x;
        at[P - 1] = centre;
#pragma unroll
        for (int i = P - 1; i > 0; i--) {
            if (value[i] > value[i - 1]) {
                const float v = value[i];
                const uint32_t c = at[i];
                value[i] = value[i - 1], at[i] = at[i - 1];
                value[i - 1] = v, at[i - 1] = c;
            }
        }
    }
};

/* Grid: (128 rows, head). */
template <class Type, int D, int P> __global__ void __launch_bounds__(THREADS) nearest_kernel(const nearest_args a)
{
    const uint32_t head = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32, begin = blockIdx.x * ROWS;
    auto row_of = [&](uint32_t r) { return begin + r < a.rows.n ? a.rows.row(begin + r) : a.k.n_rows; };
    few_best<P> best[2];
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < P; i++) best[r].value[i] = -INFINITY, best[r].at[i] = a.centres.n;
    auto centre_of = [](uint32_t i) { return i; };
    go_through<Type, D>(a.k, a.centres, head, 0, a.centres.n, row_of, centre_of,
                        [&](int r, float x, uint32_t i) { best[r].insert(x, i); });
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            float value[P];
            uint32_t at[P];
#pragma unroll
            for (int i = 0; i < P; i++) {
                value[i] = __shfl_xor_sync(~0u, best[r].value[i], step);
                at[i] = __shfl_xor_sync(~0u, best[r].at[i], step);
            }
#pragma unroll
            for (int i = 0; i < P; i++) best[r].insert(value[i], at[i]);
        }
        const uint32_t i = begin + warp * 16 + lane / 4 + 8 * r;
        if (lane % 4 || i >= a.rows.n) continue;
#pragma unroll
        for (int p = 0; p < P; p++) a.probe[((size_t)head * a.rows.n + i) * P + p] = best[r].at[p];
        if (a.score) a.score[(size_t)head * a.rows.n + i] = best[r].value[0];
    }
}

/* Grid: head. Threads take pairs of numbers, several rows at a time; sums in a fixed order. */
template <class Type> __global__ void __launch_bounds__(THREADS) mean_kernel(const sqz_cluster_keys k, float *mean)
{
    __shared__ double sums[THREADS][2];
    const uint32_t head = blockIdx.x, pairs = k.head_dim / 2, n = min(k.n_rows, 4096u);
    const uint32_t pair = threadIdx.x % pairs, apart = THREADS / pairs, mine = threadIdx.x / pairs;
    double a = 0, b = 0;
    for (uint32_t i = mine; mine < apart && i < n; i += apart) {
        const uint32_t row = (uint32_t)((uint64_t)i * k.n_rows / n);
        const float2 x = Type::unpack(((const uint32_t *)k.keys)[((size_t)head * k.n_rows + row) * pairs + pair]);
        a += x.x;
        b += x.y;
    }
    sums[threadIdx.x][0] = a;
    sums[threadIdx.x][1] = b;
    __syncthreads();
    if (mine) return;
    for (uint32_t i = 1; i < apart; i++) {
        a += sums[i * pairs + pair][0];
        b += sums[i * pairs + pair][1];
    }
    mean[(size_t)head * k.head_dim + 2 * pair] = (float)(a / n);
    mean[(size_t)head * k.head_dim + 2 * pair + 1] = (float)(b / n);
}

/* A warp a row. */
template <class Type> __global__ void __launch_bounds__(THREADS) self_kernel(const sqz_cluster_keys k, float *self)
{
    const size_t row = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= (size_t)k.n_heads * k.n_rows) return;
    const uint32_t pairs = k.head_dim / 2;
    const float2 *mean = (const float2 *)k.mean + row / k.n_rows * pairs;
    float sum = 0;
    for (uint32_t c = threadIdx.x % 32; c < pairs; c += 32) {
        const float2 x = Type::unpack(((const uint32_t *)k.keys)[row * pairs + c]), m = mean[c];
        sum += (x.x - m.x) * (x.x - m.x) + (x.y - m.y) * (x.y - m.y);
    }
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) self[row] = sum;
}

/* |d|^2 / 2: what a group's bias is to rows that are relative to the mean already. A warp a centre. */
template <class Type>
__global__ void __launch_bounds__(THREADS)
    half_square_kernel(const sqz_cluster_centres c, uint32_t pairs, size_t n, float *out)
{
    const size_t i = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (i >= n) return;
    float sum = 0;
    for (uint32_t p = threadIdx.x % 32; p < pairs; p += 32) {
        const float2 x = Type::unpack(((const uint32_t *)c.d)[i * pairs + p]);
        sum += x.x * x.x + x.y * x.y;
    }
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) out[i] = 0.5f * sum;
}

template <class Type, int D> enum sqz_status launch_compare(const compare_args &a, void *stream)
{
    const uint32_t tiles = a.list.capacity / ROWS + a.list.n_groups;
    return sqz_launch(compare_kernel<Type, D>, dim3(tiles, a.k.n_heads), THREADS, shape<D>::shared_bytes, 1, false, a,
                      stream);
}
template <class Type> enum sqz_status compare_any(const compare_args &a, void *stream)
{
    switch (a.k.head_dim) {
    case 64: return launch_compare<Type, 64>(a, stream);
    case 96: return launch_compare<Type, 96>(a, stream);
    case 128: return launch_compare<Type, 128>(a, stream);
    case 256: return launch_compare<Type, 256>(a, stream);
    }
    return SQZ_ERROR_UNSUPPORTED;
}

template <class Type, int D> enum sqz_status launch_nearest(const nearest_args &a, uint32_t n_probes, void *stream)
{
    const dim3 grid((a.rows.n + ROWS - 1) / ROWS, a.k.n_heads);
    return sqz_launch(n_probes == 1 ? nearest_kernel<Type, D, 1> : nearest_kernel<Type, D, PROBES>, grid, THREADS,
                      shape<D>::shared_bytes, 1, false, a, stream);
}
template <class Type> enum sqz_status nearest_any(const nearest_args &a, uint32_t n_probes, void *stream)
{
    switch (a.k.head_dim) {
    case 64: return launch_nearest<Type, 64>(a, n_probes, stream);
    case 96: return launch_nearest<Type, 96>(a, n_probes, stream);
    case 128: return launch_nearest<Type, 128>(a, n_probes, stream);
    case 256: return launch_nearest<Type, 256>(a, n_probes, stream);
    }
    return SQZ_ERROR_UNSUPPORTED;
}

enum sqz_status last_error()
{
    return cudaGetLastError() == cudaSuccess ? SQZ_OK : SQZ_ERROR_INTERNAL;
}

} // namespace

enum sqz_status sqz_cluster_compare(const sqz_cluster_keys &k, const sqz_cluster_list &list,
                                    const sqz_cluster_centres &centres, const uint32_t *number, const uint32_t *first,
                                    uint32_t base, unsigned long long *best, void *stream)
{
    const compare_args a = {k, list, centres, number, first, base, best};
    return k.type == SQZ_ROW_F16 ? compare_any<sqz_f16>(a, stream) : compare_any<sqz_bf16>(a, stream);
}

enum sqz_status sqz_cluster_nearest(const sqz_cluster_keys &k, const sqz_cluster_rows &rows,
                                    const sqz_cluster_centres &centres, uint32_t n_probes, uint32_t *probe,
                                    float *score, void *stream)
{
    const nearest_args a = {k, rows, centres, probe, score};
    return k.type == SQZ_ROW_F16 ? nearest_any<sqz_f16>(a, n_probes, stream)
                                 : nearest_any<sqz_bf16>(a, n_probes, stream);
}

enum sqz_status sqz_cluster_mean(const sqz_cluster_keys &k, float *mean, void *stream)
{
    const cudaStream_t s = (cudaStream_t)stream;
    if (k.type == SQZ_ROW_F16) mean_kernel<sqz_f16><<<k.n_heads, THREADS, 0, s>>>(k, mean);
    else mean_kernel<sqz_bf16><<<k.n_heads, THREADS, 0, s>>>(k, mean);
    return last_error();
}

enum sqz_status sqz_cluster_self(const sqz_cluster_keys &k, float *self, void *stream)
{
    const cudaStream_t s = (cudaStream_t)stream;
    const unsigned blocks = (unsigned)(((size_t)k.n_heads * k.n_rows + THREADS / 32 - 1) / (THREADS / 32));
    if (k.type == SQZ_ROW_F16) self_kernel<sqz_f16><<<blocks, THREADS, 0, s>>>(k, self);
    else self_kernel<sqz_bf16><<<blocks, THREADS, 0, s>>>(k, self);
    return last_error();
}

enum sqz_status sqz_cluster_group_centres(const sqz_cluster_keys &k, const sqz_cluster_centres &centres,
                                          const sqz_cluster_centres &groups, float *half_square, uint32_t *group,
                                          void *stream)
{
    const size_t n = (size_t)k.n_heads * groups.n;
    const unsigned blocks = (unsigned)((n + THREADS / 32 - 1) / (THREADS / 32));
    const cudaStream_t s = (cudaStream_t)stream;
    if (k.type == SQZ_ROW_F16)
        half_square_kernel<sqz_f16><<<blocks, THREADS, 0, s>>>(groups, k.head_dim / 2, n, half_square);
    else half_square_kernel<sqz_bf16><<<blocks, THREADS, 0, s>>>(groups, k.head_dim / 2, n, half_square);
    const sqz_cluster_keys rows = {k.type, k.n_heads, centres.n, k.head_dim, centres.d, NULL};
    const sqz_cluster_centres plain = {groups.n, groups.d, half_square};
    const enum sqz_status status = last_error();
    return status == SQZ_OK ? sqz_cluster_nearest(rows, {centres.n, 1, 1}, plain, 1, group, NULL, stream) : status;
}
