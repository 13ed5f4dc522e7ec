/*
 * Clustering: centres from members, and clusters that lost all of theirs.
 *
 * update: a warp a cluster goes through its members in ascending order of rows and adds
 * them up in F64, so that a sum depends on nothing but the members; once more, from the
 * caches, for their scores with the new centre. Bound by memory: 2 D bytes a row.
 * repair: by one thread block a head, and nothing where no cluster is empty. Every
 * cluster of two or more offers the row that is farthest from its centre; the empty ones
 * take the farthest of those, up to MOST_FAR of them; what is then still empty (keys
 * that have few different values) takes rows in order from clusters that have two or more.
 */
#include "cluster.cuh"

namespace
{

enum { THREADS = 256, MOST_FAR = 1024, REPAIR_THREADS = 1024 };

/* Grid: clusters of all heads, a warp each. */
template <class Type, int PAIRS /* of a lane */>
__global__ void __launch_bounds__(THREADS) update_kernel(const sqz_cluster_update a)
{
    const size_t i = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const uint32_t n = a.centres.n, pairs = a.k.head_dim / 2, lane = threadIdx.x % 32;
    if (i >= (size_t)a.k.n_heads * n) return;
    const uint32_t head = (uint32_t)(i / n), c = (uint32_t)(i % n);
    const uint32_t *start = a.start + (size_t)head * a.start_stride + c, *rows = a.row + (size_t)head * a.capacity;
    const uint32_t begin = start[0], end = start[1];
    if (begin == end) return;
    const uint32_t *keys = (const uint32_t *)a.k.keys + (size_t)head * a.k.n_rows * pairs;
    double sum[PAIRS][2], self = 0;
    float2 mean[PAIRS];
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        sum[j][0] = sum[j][1] = 0;
        mean[j] = lane + 32 * j < pairs ? ((const float2 *)a.k.mean)[(size_t)head * pairs + lane + 32 * j]
                                        : make_float2(0, 0);
    }
    for (uint32_t at = begin; at < end; at += 32) {
        const uint32_t mine = at + lane < end ? rows[at + lane] : 0, m = min(32u, end - at);
        if (a.cost && at + lane < end) self += (double)a.self[(size_t)head * a.k.n_rows + mine];
#pragma unroll 4
        for (uint32_t r = 0; r < m; r++) {
            const uint32_t row = __shfl_sync(~0u, mine, r);
#pragma unroll
            for (int j = 0; j < PAIRS; j++) {
                if (lane + 32 * j >= pairs) continue;
                const float2 x = Type::unpack(keys[(size_t)row * pairs + lane + 32 * j]);
                sum[j][0] += (double)(x.x - mean[j].x);
                sum[j][1] += (double)(x.y - mean[j].y);
            }
        }
    }
    const double inverse = 1.0 / (end - begin);
    double square = 0;
    float bias = 0;
    float2 centre[PAIRS];
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        if (lane + 32 * j >= pairs) continue;
        const double x = sum[j][0] * inverse, y = sum[j][1] * inverse;
        const uint32_t d = Type::pack((float)x, (float)y);
        const float2 z = centre[j] = Type::unpack(d);
        ((uint32_t *)a.centres.d)[i * pairs + lane + 32 * j] = d;
        bias += z.x * (mean[j].x + 0.5f * z.x) + z.y * (mean[j].y + 0.5f * z.y);
        square += x * x + y * y;
        if (a.centroids)
            ((float2 *)a.centroids)[i * pairs + lane + 32 * j] =
                make_float2((float)(x + mean[j].x), (float)(y + mean[j].y));
    }
    for (int step = 16; step; step /= 2) {
        bias += __shfl_xor_sync(~0u, bias, step);
        square += __shfl_xor_sync(~0u, square, step);
        self += __shfl_xor_sync(~0u, self, step);
    }
    for (uint32_t at = begin; a.best && at < end; at += 32) {
        const uint32_t mine = at + lane < end ? rows[at + lane] : 0, m = min(32u, end - at);
        float score = 0;
#pragma unroll 4
        for (uint32_t r = 0; r < m; r++) {
            const uint32_t row = __shfl_sync(~0u, mine, r);
            float sum = 0;
#pragma unroll
            for (int j = 0; j < PAIRS; j++) {
                if (lane + 32 * j >= pairs) continue;
                const float2 x = Type::unpack(keys[(size_t)row * pairs + lane + 32 * j]);
                sum += x.x * centre[j].x + x.y * centre[j].y;
            }
#pragma unroll
            for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
            if (lane == r) score = sum - bias;
        }
        if (at + lane < end) a.best[(size_t)head * a.k.n_rows + mine] = sqz_cluster_pack(score, c);
    }
    if (lane) return;
    a.centres.bias[i] = bias;
    const double cost = fmax(0.0, self - square * (end - begin));
    if (a.cost) a.cost[i] = cost;
    if (a.variance) a.variance[i] = (float)(cost * inverse);
}

struct unpack_args {
    sqz_cluster_keys k;
    sqz_cluster_centres centres;
    unsigned long long *best;
    uint32_t *assignment;
};

/* A thread a row. A row whose groups have no centre among them has been compared with none; its warp compares it with
 * all of the head's. */
template <class Type> __global__ void __launch_bounds__(THREADS) unpack_kernel(const unpack_args a)
{
    const size_t first = (size_t)blockIdx.x * THREADS + threadIdx.x / 32 * 32, n = (size_t)a.k.n_heads * a.k.n_rows;
    const uint32_t lane = threadIdx.x % 32, pairs = a.k.head_dim / 2;
    const size_t i = first + lane;
    unsigned long long mine = i < n ? a.best[i] : 1;
    for (uint32_t none = __ballot_sync(~0u, mine == 0); none; none &= none - 1) {
        const int which = __ffs(none) - 1;
        const size_t row = first + which, base = row / a.k.n_rows * a.centres.n;
        const uint32_t *x = (const uint32_t *)a.k.keys + row * pairs;
        unsigned long long best = 0;
        for (uint32_t c = lane; c < a.centres.n; c += 32) {
            const uint32_t *d = (const uint32_t *)a.centres.d + (base + c) * pairs;
            float score = -a.centres.bias[base + c];
            for (uint32_t p = 0; p < pairs; p++) {
                const float2 u = Type::unpack(x[p]), v = Type::unpack(d[p]);
                score += u.x * v.x + u.y * v.y;
            }
            const unsigned long long packed = sqz_cluster_pack(score, c);
            best = packed > best ? packed : best;
        }
        for (int step = 16; step; step /= 2) {
            const unsigned long long other = __shfl_xor_sync(~0u, best, step);
            best = other > best ? other : best;
        }
        if (lane == which) a.best[i] = mine = best;
    }
    if (i < n) a.assignment[i] = sqz_cluster_centre(mine);
}

/* Grid: head. */
__global__ void __launch_bounds__(THREADS)
    objective_kernel(const double *cost, float *objective, uint32_t n_clusters, uint32_t n_rows)
{
    __shared__ double sums[THREADS];
    double sum = 0;
    for (uint32_t c = threadIdx.x; c < n_clusters; c += THREADS) sum += cost[(size_t)blockIdx.x * n_clusters + c];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (uint32_t half = THREADS / 2; half; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) objective[blockIdx.x] = (float)(sums[0] / n_rows);
}

/* Whether a head has an empty cluster, told by its sorted members: the same for the whole thread block. */
__device__ bool any_empty(const sqz_cluster_repair &a, uint32_t head)
{
    const uint32_t *start = a.start + (size_t)head * (a.n_clusters + 1);
    bool found = false;
    for (uint32_t c = threadIdx.x; c < a.n_clusters; c += blockDim.x) found = found || start[c] == start[c + 1];
    return __syncthreads_or(found);
}

/* Grid: head. */
__global__ void __launch_bounds__(REPAIR_THREADS) repair_kernel(const sqz_cluster_repair a)
{
    __shared__ unsigned long long found[REPAIR_THREADS / 32];
    __shared__ uint32_t next_empty;
    const uint32_t head = blockIdx.x, n = a.n_clusters, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (!any_empty(a, head)) return;
    const uint32_t *start = a.start + (size_t)head * (n + 1), *rows = a.row + (size_t)head * a.n_rows;
    uint2 *farthest = a.farthest + (size_t)head * n;
    uint32_t *count = a.count + (size_t)head * n, *assignment = a.assignment + (size_t)head * a.n_rows;
    const size_t base = (size_t)head * a.n_rows;
    for (uint32_t c = warp; c < n; c += REPAIR_THREADS / 32) {
        unsigned long long far = 0; /* cost (not negative: its bits are in order), then the smaller row */
        const uint32_t members = start[c + 1] - start[c];
        for (uint32_t i = start[c] + lane; members > 1 && i < start[c + 1]; i += 32) {
            const uint32_t row = rows[i];
            const float cost = fmaxf(0.0f, a.self[base + row] - 2.0f * sqz_cluster_score(a.best[base + row]));
            const unsigned long long x = (unsigned long long)__float_as_uint(cost) << 32 | (uint32_t)~row;
            far = x > far ? x : far;
        }
        for (int step = 16; step; step /= 2) {
            const unsigned long long x = __shfl_xor_sync(~0u, far, step);
            far = x > far ? x : far;
        }
        if (lane == 0) {
            farthest[c] = make_uint2((uint32_t)(far >> 32), members > 1 ? ~(uint32_t)far : ~0u);
            count[c] = members;
        }
    }
    if (threadIdx.x == 0) next_empty = 0;
    __syncthreads();
    auto find_empty = [&] { /* by thread 0 */
                            while (next_empty < n && start[next_empty] != start[next_empty + 1]) next_empty++;
                            return next_empty < n;
    };
    for (int taken = 0; taken < MOST_FAR; taken++) {
        unsigned long long best = 0; /* cost, cluster */
        for (uint32_t c = threadIdx.x; c < n; c += REPAIR_THREADS) {
            if (farthest[c].y == ~0u) continue;
            const unsigned long long x = (unsigned long long)farthest[c].x << 32 | (uint32_t)~c;
            best = x > best ? x : best;
        }
        for (int step = 16; step; step /= 2) {
            const unsigned long long x = __shfl_xor_sync(~0u, best, step);
            best = x > best ? x : best;
        }
        if (lane == 0) found[warp] = best;
        __syncthreads();
        bool more = false;
        if (threadIdx.x == 0) {
            for (int w = 1; w < REPAIR_THREADS / 32; w++) best = found[w] > best ? found[w] : best;
            if (best && find_empty()) {
                const uint32_t c = ~(uint32_t)best;
                assignment[farthest[c].y] = next_empty++;
                farthest[c].y = ~0u;
                count[c]--;
                more = true;
            }
        }
        if (!__syncthreads_or(more)) break;
    }
    if (threadIdx.x) return;
    for (uint32_t c = 0; c < n && find_empty(); c++) {
        for (uint32_t i = start[c]; i < start[c + 1] && count[c] > 1 && find_empty(); i++) {
            if (assignment[rows[i]] != c) continue; /* has been taken */
            assignment[rows[i]] = next_empty++;
            count[c]--;
        }
    }
}

template <class Type> enum sqz_status update_any(const sqz_cluster_update &u, void *stream)
{
    const unsigned blocks = (unsigned)(((size_t)u.k.n_heads * u.centres.n + THREADS / 32 - 1) / (THREADS / 32));
    const uint32_t pairs = u.k.head_dim / 2;
    return sqz_launch(pairs <= 32   ? update_kernel<Type, 1>
                      : pairs <= 64 ? update_kernel<Type, 2>
                                    : update_kernel<Type, 4>,
                      dim3(blocks), THREADS, 0, 1, false, u, stream);
}

enum sqz_status last_error()
{
    return cudaGetLastError() == cudaSuccess ? SQZ_OK : SQZ_ERROR_INTERNAL;
}

} // namespace

enum sqz_status sqz_cluster_update_launch(const sqz_cluster_update &u, void *stream)
{
    return u.k.type == SQZ_ROW_F16 ? update_any<sqz_f16>(u, stream) : update_any<sqz_bf16>(u, stream);
}

enum sqz_status sqz_cluster_unpack(const sqz_cluster_keys &k, const sqz_cluster_centres &centres,
                                   unsigned long long *best, uint32_t *assignment, void *stream)
{
    const unpack_args a = {k, centres, best, assignment};
    const dim3 grid((unsigned)(((size_t)k.n_heads * k.n_rows + THREADS - 1) / THREADS));
    return k.type == SQZ_ROW_F16 ? sqz_launch(unpack_kernel<sqz_f16>, grid, THREADS, 0, 1, false, a, stream)
                                 : sqz_launch(unpack_kernel<sqz_bf16>, grid, THREADS, 0, 1, false, a, stream);
}

enum sqz_status sqz_cluster_objective(uint32_t n_heads, uint32_t n_rows, uint32_t n_clusters, const double *cost,
                                      float *objective, void *stream)
{
    objective_kernel<<<n_heads, THREADS, 0, (cudaStream_t)stream>>>(cost, objective, n_clusters, n_rows);
    return last_error();
}

enum sqz_status sqz_cluster_repair_launch(const sqz_cluster_repair &r, void *stream)
{
    return sqz_launch(repair_kernel, dim3(r.n_heads), REPAIR_THREADS, 0, 1, false, r, stream);
}
