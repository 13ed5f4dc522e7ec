/*
 * What one token's attention takes on a GPU over rows of 4 and of 4 + 4 bits, beside rows in F16: a layer, of layers of
 * distinct memory in one CUDA graph, dense and at a share of the rows, whose lookup is timed, too.
 *
 *   planes OUT.json LIBRARY.so [check|once]
 *
 * Before anything is timed, every kernel is held against attention in double over rows that are made, on the host, of
 * planes as squeeze_attention.h describes them; and at the sizes that are timed against the library's own attention
 * over the same rows in F16. The F16 rows that are timed are those of both planes.
 * Build: nvcc -O2 -std=c++17 -gencode arch=compute_90a,code=sm_90a -Iinclude -Ilib/cuda -Ilib bench/gpu/planes.cu
 *        lib/cuda/planes.cu lib/cuda/attend_planes.cu -o planes -ldl
 */
#include <algorithm>
#include <cuda_profiler_api.h>
#include <dlfcn.h>
#include <functional>
#include <math.h>
#include <string.h>
#include <string>
#include <vector>

#include "made.cuh"
#include "planes.h"
#include "squeeze_cuda.h"

namespace
{

enum { REPEATS = 15, FIXED = 83, OWN = 200, OWN_ROOM = 256, ROWS_OF_CLUSTER = 20, MOST_SEQUENCES = 8 };

struct shape {
    uint32_t h, k, d;
};

/* ---- Made layers --------------------------------------------------------------------------- */

struct layer {
    shape s;
    uint32_t n_rows, n_clusters, n_planes;
    uint64_t seed;
    uint8_t *plane[4]; /* keys upper, lower, values upper, lower */
    uint16_t *step[2];
    __half *whole[2];
    float *value_mean, *centroid_scale, *centroid_mean, *variance;
    int8_t *centroids_i8;
    __half *centroids_f16;
    uint32_t *offset;
    struct sqz_cuda_plane_layer planes; /* both, with the INT8 centroids */
    __half *keys, *values;              /* the same rows in F16; or NULL */
    __half *queries, *own[2], *out;
    struct sqz_cuda_user *users;
    float *log_threshold, *lse;
    struct sqz_layer f16;
};

__global__ void bytes_kernel(uint32_t *to, uint64_t n, uint64_t seed)
{
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < n; i += (uint64_t)gridDim.x * blockDim.x)
        to[i] = mixed(seed * 0x100000001b3ull + i);
}

__global__ void steps_kernel(__half *to, uint64_t n, uint64_t seed, float step)
{
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < n; i += (uint64_t)gridDim.x * blockDim.x)
        to[i] = __float2half(step * (0.7f + 0.6f * (float)(mixed(seed + i) & 255) / 255.0f));
}

__host__ __device__ inline uint32_t cluster_start(uint64_t seed, uint32_t n, uint32_t n_clusters, uint32_t head,
                                                  uint32_t c)
{
    if (c == 0 || c >= n_clusters) return c ? n : 0;
    const float each = (float)n / (float)n_clusters;
    const float moved = ((mixed(seed + head * 65536ull + c) & 1023) / 1023.0f - 0.5f) * 0.9f * (each - 1);
    return (uint32_t)((double)c * n / n_clusters + moved);
}

__host__ __device__ inline float centre(uint64_t seed, uint32_t head, uint32_t c, uint32_t d, uint32_t dim)
{
    return 0.8f * normal(seed + 1, ((uint64_t)head * 65536 + c / 5) * dim + d) +
           0.6f * normal(seed + 2, ((uint64_t)head * 65536 + c) * dim + d);
}

/* A block a cluster of a head. */
__global__ void clusters_kernel(layer l)
{
    const uint32_t head = blockIdx.y, c = blockIdx.x, d = threadIdx.x, dim = blockDim.x;
    __shared__ float largest[256];
    const uint64_t at = (uint64_t)head * l.n_clusters + c;
    const float x = centre(l.seed, head, c, d, dim);
    largest[d] = fabsf(x);
    __syncthreads();
    for (uint32_t step = dim / 2; step; step /= 2) {
        if (d < step) largest[d] = fmaxf(largest[d], largest[d + step]);
        __syncthreads();
    }
    const float scale = largest[0] / 127.0f;
    l.centroids_i8[at * dim + d] = (int8_t)rintf(x / scale);
    l.centroids_f16[at * dim + d] = __float2half(x);
    if (c == 0) l.centroid_mean[head * dim + d] = 0.1f * normal(l.seed + 7, head * dim + d);
    if (c == 0) l.value_mean[head * dim + d] = 0.2f * normal(l.seed + 8, head * dim + d);
    if (d) return;
    l.centroid_scale[at] = scale;
    l.variance[at] = 0.12f * dim;
    l.offset[at + head] = cluster_start(l.seed, l.n_planes, l.n_clusters, head, c);
    if (c + 1 == l.n_clusters) l.offset[at + head + 1] = l.n_planes;
}

/* Queries of sequence b look at some cluster. */
__global__ void query_kernel(__half *q, layer l)
{
    const uint32_t h = blockIdx.x, b = blockIdx.y, d = threadIdx.x, head = h / (l.s.h / l.s.k);
    const uint32_t pick = mixed(l.seed + h + 1000 * b) % l.n_clusters;
    const float x = (0.5f + 0.15f * (float)(h % 5)) * (centre(l.seed, head, pick, d, blockDim.x) +
                                                       0.5f * normal(l.seed + 6, (b * l.s.h + h) * blockDim.x + d));
    q[((size_t)b * l.s.h + h) * blockDim.x + d] = __float2half(x);
}

void good(enum sqz_status s, const char *what)
{
    if (s == SQZ_OK) return;
    fprintf(stderr, "planes: %s: status %d (%s)\n", what, (int)s, cudaGetErrorString(cudaGetLastError()));
    exit(1);
}

layer make_layer(shape s, uint32_t n_rows, uint64_t seed, bool with_f16)
{
    layer l;
    memset(&l, 0, sizeof l);
    l.s = s, l.n_rows = n_rows, l.n_planes = n_rows - FIXED, l.n_clusters = std::max(l.n_planes / ROWS_OF_CLUSTER, 1u),
    l.seed = seed * 1000;
    const size_t rows = (size_t)s.k * l.n_planes, clusters = (size_t)s.k * l.n_clusters, plane = rows * s.d / 2;
    for (int i = 0; i < 4; i++) {
        l.plane[i] = device<uint8_t>(plane);
        bytes_kernel<<<1024, 256>>>((uint32_t *)l.plane[i], plane / 4, l.seed + 20 + i);
    }
    for (int i = 0; i < 2; i++) {
        l.step[i] = device<uint16_t>(rows);
        steps_kernel<<<256, 256>>>((__half *)l.step[i], rows, l.seed + 30 + i, i ? 0.2f : 0.076f);
        l.whole[i] = device<__half>((size_t)s.k * FIXED * s.d);
        noise_kernel<<<64, 256>>>(l.whole[i], (uint64_t)s.k * FIXED * s.d, l.seed + 40 + i, i ? 1.0f : 0.6f);
        l.own[i] = device<__half>((size_t)s.k * OWN_ROOM * s.d);
        noise_kernel<<<64, 256>>>(l.own[i], (uint64_t)s.k * OWN_ROOM * s.d, l.seed + 50 + i, i ? 1.0f : 0.5f);
    }
    l.value_mean = device<float>(s.k * s.d), l.centroid_mean = device<float>(s.k * s.d);
    l.centroid_scale = device<float>(clusters), l.variance = device<float>(clusters);
    l.centroids_i8 = device<int8_t>(clusters * s.d), l.centroids_f16 = device<__half>(clusters * s.d);
    l.offset = device<uint32_t>(clusters + s.k);
    clusters_kernel<<<dim3(l.n_clusters, s.k), s.d>>>(l);
    l.queries = device<__half>((size_t)MOST_SEQUENCES * s.h * s.d),
    l.out = device<__half>((size_t)MOST_SEQUENCES * s.h * s.d);
    query_kernel<<<dim3(s.h, MOST_SEQUENCES), s.d>>>(l.queries, l);
    std::vector<struct sqz_cuda_user> users;
    for (uint32_t b = 0; b < MOST_SEQUENCES; b++)
        users.push_back({l.own[0], l.own[1], OWN_ROOM, b == 0 ? (uint32_t)OWN : 37 * b, 0});
    l.users = device<struct sqz_cuda_user>(users.size());
    CHECK(cudaMemcpy(l.users, users.data(), users.size() * sizeof users[0], cudaMemcpyHostToDevice));
    l.log_threshold = device<float>(s.k), l.lse = device<float>(MOST_SEQUENCES * s.h);
    struct sqz_cuda_plane_layer &p = l.planes;
    p.n_head_kv = s.k, p.head_dim = s.d, p.n_rows = n_rows, p.n_whole = FIXED, p.n_clusters = l.n_clusters;
    p.keys = {l.plane[0], l.plane[1], (const uint16_t *)l.whole[0]};
    p.values = {l.plane[2], l.plane[3], (const uint16_t *)l.whole[1]};
    p.value_mean = l.value_mean;
    p.centroids = {SQZ_ROW_I8, l.centroids_i8, l.centroid_scale, l.centroid_mean};
    p.steps = device<uint32_t>(rows), p.place = device<uint32_t>((size_t)s.k * ((n_rows + 7) / 8));
    p.value_unit = device<float>(s.k);
    good(sqz_cuda_plane_index_launch(&p, l.step[0], l.step[1], l.offset, NULL), "index");
    if (with_f16) {
        l.keys = device<__half>((size_t)s.k * n_rows * s.d), l.values = device<__half>((size_t)s.k * n_rows * s.d);
        good(sqz_cuda_planes_to_f16_launch(&p, l.keys, l.values, NULL), "to F16");
    }
    struct sqz_layer &f = l.f16;
    f.space = SQZ_SPACE_CUDA;
    f.shape = {s.h, s.k, s.d, 1.0f / sqrtf((float)s.d)};
    f.n_rows = n_rows, f.n_fixed = FIXED;
    f.keys = {SQZ_ROW_F16, l.keys}, f.values = {SQZ_ROW_F16, l.values};
    f.n_levels = 1;
    f.level[0].n_clusters = l.n_clusters;
    f.level[0].centroids = {SQZ_ROW_I8, l.centroids_i8, l.centroid_scale, l.centroid_mean};
    f.level[0].offset = l.offset, f.level[0].variance = l.variance;
    f.group = SQZ_GROUP_MAX;
    return l;
}

void free_layer(layer &l)
{
    for (uint8_t *p : l.plane) CHECK(cudaFree(p));
    for (void *p :
         {(void *)l.step[0], (void *)l.step[1], (void *)l.planes.steps, (void *)l.planes.place, (void *)l.keys,
          (void *)l.values, (void *)l.centroids_i8, (void *)l.centroids_f16, (void *)l.own[0], (void *)l.own[1]})
        CHECK(cudaFree(p));
}

/* ---- Calls ----------------------------------------------------------------------------------- */

struct library {
    size_t (*bytes)(const struct sqz_cuda_attend_args *);
    enum sqz_status (*attend)(const struct sqz_cuda_attend_args *, void *);
    enum sqz_status (*select)(const struct sqz_cuda_attend_args *, struct sqz_cuda_selection *, void *);
};

struct bench {
    library lib;
    void *workspace;
    size_t workspace_bytes;
    struct sqz_cuda_part *parts;
    float *part_out;
    size_t slot_rows;
    uint32_t *arrived;
    uint32_t n_blocks;
    cudaStream_t stream;
};

struct sqz_cuda_attend_args f16_args(const bench &b, const layer &l, bool dense, uint32_t n_sequences)
{
    struct sqz_cuda_attend_args a;
    memset(&a, 0, sizeof a);
    a.layer = &l.f16;
    a.plan.log_threshold = l.log_threshold;
    a.dense = dense;
    a.n_sequences = n_sequences, a.n_tokens = 1;
    a.queries = l.queries;
    a.out = l.out;
    a.users = l.users;
    a.n_user = OWN_ROOM;
    a.workspace = b.workspace;
    a.workspace_bytes = b.workspace_bytes;
    return a;
}

struct sqz_cuda_attend_planes plane_args(const bench &b, const layer &l, bool both,
                                         const struct sqz_cuda_selection *list, uint32_t n_sequences)
{
    struct sqz_cuda_attend_planes a;
    memset(&a, 0, sizeof a);
    a.layer = l.planes;
    if (!both) a.layer.keys.lower = a.layer.values.lower = NULL;
    a.n_head = l.s.h, a.n_sequences = n_sequences;
    a.scale = l.f16.shape.scale;
    a.queries = l.queries;
    if (list) a.groups = list->groups, a.n_groups = list->n_groups, a.group_capacity = list->capacity;
    a.users = l.users, a.n_user = OWN_ROOM;
    a.n_blocks = b.n_blocks;
    a.parts = b.parts, a.part_out = b.part_out, a.arrived = b.arrived;
    a.out = l.out, a.lse = l.lse;
    return a;
}

void attend_planes(const bench &b, const struct sqz_cuda_attend_planes &a)
{
    const uint32_t group = a.n_head / a.layer.n_head_kv, rows = a.together ? a.n_sequences * group : group;
    if ((size_t)sqz_cuda_attend_planes_slots(&a) * rows > b.slot_rows) good(SQZ_ERROR_ARGUMENT, "room for parts");
    good(sqz_cuda_attend_planes_launch(&a, true, b.stream), "attend_planes");
}

/* ---- In double -------------------------------------------------------------------------------- */

template <class T> std::vector<T> host(const T *from, size_t n)
{
    std::vector<T> x(n);
    CHECK(cudaMemcpy(x.data(), from, n * sizeof(T), cudaMemcpyDeviceToHost));
    return x;
}

struct truth {
    layer l;
    std::vector<double> keys[2], values[2]; /* [K][N][D] of the upper plane alone, and of both */
    std::vector<__half> queries;
    std::vector<__half> own[2];
};

void turn(double *x, size_t d)
{
    const size_t run = d & (~d + 1);
    for (size_t r = 0; r < d; r += run)
        for (size_t step = 1; step < run; step *= 2)
            for (size_t i = r; i < r + run; i++)
                if (!((i - r) & step)) {
                    const double a = x[i], b = x[i + step];
                    x[i] = a + b, x[i + step] = a - b;
                }
    for (size_t i = 0; i < d; i++) x[i] /= sqrt((double)run);
}

truth truth_of(const layer &l, bool i8)
{
    truth t;
    t.l = l;
    const size_t k = l.s.k, d = l.s.d, n = l.n_rows, in = l.n_planes, c = l.n_clusters;
    const std::vector<uint32_t> offset = host(l.offset, k * (c + 1));
    const std::vector<int8_t> ci = host(l.centroids_i8, k * c * d);
    const std::vector<__half> ch = host(l.centroids_f16, k * c * d);
    const std::vector<float> cs = host(l.centroid_scale, k * c), cm = host(l.centroid_mean, k * d),
                             vm = host(l.value_mean, k * d);
    t.queries = host(l.queries, (size_t)MOST_SEQUENCES * l.s.h * d);
    for (int i = 0; i < 2; i++) t.own[i] = host(l.own[i], k * OWN_ROOM * d);
    for (int of = 0; of < 2; of++) {
        const std::vector<uint8_t> upper = host(l.plane[2 * of], k * in * d / 2),
                                   lower = host(l.plane[2 * of + 1], k * in * d / 2);
        const std::vector<uint16_t> steps = host(l.step[of], k * in);
        const std::vector<__half> whole = host(l.whole[of], k * FIXED * d);
        for (int both = 0; both < 2; both++) {
            std::vector<double> &to = of ? t.values[both] : t.keys[both];
            to.resize(k * n * d);
            for (size_t h = 0; h < k; h++) {
                size_t cluster = 0;
                for (size_t r = 0; r < n; r++) {
                    double *x = &to[(h * n + r) * d];
                    if (r < FIXED) {
                        for (size_t i = 0; i < d; i++) x[i] = __half2float(whole[(h * FIXED + r) * d + i]);
                        continue;
                    }
                    const size_t local = r - FIXED, at = h * in + local;
                    while (offset[h * (c + 1) + cluster + 1] <= local) cluster++;
                    __half step_bits;
                    memcpy(&step_bits, &steps[at], 2);
                    const double step = __half2float(step_bits);
                    for (size_t i = 0; i < d; i++) {
                        const size_t byte = at * d / 2 + i / 32 * 16 + i % 16, shift = i % 32 < 16 ? 0 : 4;
                        const int u = (upper[byte] >> shift & 15) - 8, v = lower[byte] >> shift & 15;
                        x[i] = both ? (16 * u + v + 0.5) * step / 16 : (u + 0.5) * step;
                    }
                    turn(x, d);
                    for (size_t i = 0; i < d; i++)
                        x[i] += of   ? vm[h * d + i]
                                : i8 ? cm[h * d + i] + (double)cs[h * c + cluster] * ci[(h * c + cluster) * d + i]
                                     : (double)__half2float(ch[(h * c + cluster) * d + i]);
                }
            }
        }
    }
    return t;
}

/* Output of one head of a sequence over the listed groups (NULL: all) and its own rows; returns the log of the sum. */
double exact(double *out, const truth &t, bool both, uint32_t sequence, uint32_t h, const std::vector<uint32_t> *groups,
             uint32_t n_own)
{
    const size_t d = t.l.s.d, n = t.l.n_rows, k = h / (t.l.s.h / t.l.s.k);
    std::vector<double> y;
    std::vector<const double *> values;
    std::vector<double> own(n_own * d);
    std::vector<double> q(d);
    for (size_t i = 0; i < d; i++)
        q[i] = (double)__half2float(t.queries[((size_t)sequence * t.l.s.h + h) * d + i]) / sqrt((double)d);
    auto row = [&](const double *key, const double *value) {
        double sum = 0;
        for (size_t i = 0; i < d; i++) sum += q[i] * key[i];
        y.push_back(sum);
        values.push_back(value);
    };
    const size_t n_groups = groups ? groups->size() : (n + 7) / 8;
    for (size_t g = 0; g < n_groups; g++)
        for (size_t r = (groups ? (*groups)[g] : g) * 8, end = std::min(r + 8, n); r < end; r++)
            row(&t.keys[both][(k * n + r) * d], &t.values[both][(k * n + r) * d]);
    for (size_t r = 0; r < n_own; r++) {
        std::vector<double> key(d);
        for (size_t i = 0; i < d; i++) {
            key[i] = __half2float(t.own[0][(k * OWN_ROOM + r) * d + i]);
            own[r * d + i] = __half2float(t.own[1][(k * OWN_ROOM + r) * d + i]);
        }
        row(key.data(), &own[r * d]);
    }
    double largest = -INFINITY, sum = 0;
    for (double x : y) largest = std::max(largest, x);
    std::fill(out, out + d, 0.0);
    for (size_t i = 0; i < y.size(); i++) {
        const double w = exp(y[i] - largest);
        sum += w;
        for (size_t j = 0; j < d; j++) out[j] += w * values[i][j];
    }
    for (size_t j = 0; j < d; j++) out[j] /= sum;
    return largest + log(sum);
}

struct lists {
    struct sqz_cuda_selection on_card;
    std::vector<std::vector<uint32_t>> groups;
};

/* A list for each of n pairs: runs and single groups, some of them everything or the fixed ones alone. */
lists make_lists(const layer &l, uint32_t n, uint64_t seed)
{
    lists x;
    const uint32_t n_groups = (l.n_rows + 7) / 8, capacity = (n_groups + 1) / 2 * 2, fixed = (FIXED + 7) / 8;
    std::vector<uint32_t> all(n * capacity), counts;
    for (uint32_t p = 0; p < n; p++) {
        std::vector<uint32_t> list;
        for (uint32_t g = 0; g < n_groups; g++) {
            const bool run = mixed(seed + p * 7919 + g / 6) % 5 == 0, single = mixed(seed + p * 104729 + g) % 11 == 0;
            if (g < fixed || (p % 7 == 5) || (p % 7 != 6 && (run || single))) list.push_back(g);
        }
        std::copy(list.begin(), list.end(), all.begin() + p * capacity);
        counts.push_back((uint32_t)list.size());
        x.groups.push_back(list);
    }
    uint32_t *d_all = device<uint32_t>(all.size()), *d_counts = device<uint32_t>(n);
    CHECK(cudaMemcpy(d_all, all.data(), all.size() * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(d_counts, counts.data(), n * 4, cudaMemcpyHostToDevice));
    x.on_card = {d_all, d_counts, capacity, NULL};
    return x;
}

/* ---- Checks ------------------------------------------------------------------------------------ */

bool checked(const bench &b, const truth &t, bool i8, bool both, bool listed, bool together, uint32_t n_sequences,
             FILE *log)
{
    const layer &l = t.l;
    const uint32_t h = l.s.h, k = l.s.k, d = l.s.d, group = h / k;
    const lists list = make_lists(l, together ? k : n_sequences * k, l.seed + n_sequences);
    struct sqz_cuda_attend_planes a = plane_args(b, l, both, listed ? &list.on_card : NULL, n_sequences);
    if (!i8) a.layer.centroids = {SQZ_ROW_F16, l.centroids_f16, NULL, NULL};
    struct sqz_cuda_part *to_parts = device<struct sqz_cuda_part>(n_sequences * h * 2);
    float *to_out = device<float>((size_t)n_sequences * h * 2 * d);
    if (together) {
        a.together = true;
        a.users = NULL, a.n_user = 0;
        a.to_parts = to_parts, a.to_out = to_out, a.n_to = 2, a.to = 1;
        a.out = NULL, a.lse = NULL;
    }
    double worst = 0, largest = 0, worst_lse = 0;
    for (int again = 0; again < 2; again++) { /* counters are zeros again */
        attend_planes(b, a);
        CHECK(cudaStreamSynchronize(b.stream));
    }
    const std::vector<__half> out = host(l.out, (size_t)n_sequences * h * d);
    const std::vector<float> lse = host(l.lse, n_sequences * h), part = host(to_out, (size_t)n_sequences * h * 2 * d);
    const std::vector<struct sqz_cuda_part> sums = host(to_parts, n_sequences * h * 2);
    std::vector<double> want(d);
    for (uint32_t s = 0; s < n_sequences; s++)
        for (uint32_t i = 0; i < h; i++) {
            const uint32_t own = together ? 0
                                 : s == 0 ? (uint32_t)OWN
                                          : 37 * s,
                           pair = together ? i / group : s * k + i / group;
            const double log_sum = exact(want.data(), t, both, s, i, listed ? &list.groups[pair] : NULL, own);
            const size_t at = ((size_t)(s * k + i / group) * 2 + 1) * group + i % group;
            const double got_lse =
                together ? (sums[at].maximum + log2((double)sums[at].sum)) * 0.6931471805599453 : lse[s * h + i];
            const double off = fabs(got_lse - log_sum);
            if (!(off <= worst_lse)) worst_lse = off;
            for (uint32_t j = 0; j < d; j++) {
                const double got = together ? part[at * d + j] / (double)sums[at].sum
                                            : (double)__half2float(out[((size_t)s * h + i) * d + j]);
                const double e = fabs(got - want[j]);
                if (!(e <= worst)) worst = e;
                largest = std::max(largest, fabs(want[j]));
            }
        }
    const bool right = worst <= 2e-3 * largest && worst_lse <= 1e-3;
    fprintf(log, "%s %2u/%-2u heads of %3u, %s, %s centroids, %s, %u sequences%s: off %.2e of %.3f, log sum %.1e\n",
            right ? "right" : "WRONG", h, k, d, both ? "4 + 4 bits" : "4 bits", i8 ? "INT8" : "F16",
            listed ? "lists" : "dense", n_sequences, together ? " together" : "", worst, largest, worst_lse);
    CHECK(cudaFree(to_parts));
    CHECK(cudaFree(to_out));
    CHECK(cudaFree((void *)list.on_card.groups));
    CHECK(cudaFree((void *)list.on_card.n_groups));
    return right;
}

bool check_shape(const bench &b, shape s, uint32_t n_rows)
{
    layer l = make_layer(s, n_rows, 7 + s.h + s.k + s.d, true);
    bool right = true;
    for (int i8 = 0; i8 < 2; i8++) {
        struct sqz_cuda_plane_layer p = l.planes;
        if (!i8) p.centroids = {SQZ_ROW_F16, l.centroids_f16, NULL, NULL};
        const truth t = truth_of(l, i8);
        for (int both = 0; both < 2; both++) {
            struct sqz_cuda_plane_layer one = p;
            if (!both) one.keys.lower = one.values.lower = NULL;
            good(sqz_cuda_planes_to_f16_launch(&one, l.keys, l.values, b.stream), "to F16");
            CHECK(cudaStreamSynchronize(b.stream));
            const size_t n = (size_t)s.k * n_rows * s.d;
            const std::vector<__half> keys = host(l.keys, n), values = host(l.values, n);
            double worst = 0;
            for (size_t i = 0; i < n; i++)
                for (double e : {fabs(__half2float(keys[i]) - t.keys[both][i]) / (1 + fabs(t.keys[both][i])),
                                 fabs(__half2float(values[i]) - t.values[both][i]) / (1 + fabs(t.values[both][i]))})
                    if (!(e <= worst)) worst = e;
            if (!(worst <= 6e-4)) right = false;
            printf("%s rows as F16, heads of %u, %s, %s centroids: off %.1e\n", worst <= 6e-4 ? "right" : "WRONG", s.d,
                   both ? "4 + 4 bits" : "4 bits", i8 ? "INT8" : "F16", worst);
            for (int listed = 0; listed < 2; listed++) {
                right &= checked(b, t, i8, both, listed, false, 1, stdout);
                right &= checked(b, t, i8, both, listed, false, 3, stdout);
                right &= checked(b, t, i8, both, listed, true, 2, stdout);
                right &= checked(b, t, i8, both, listed, true, 5, stdout);
            }
            fflush(stdout);
        }
    }
    free_layer(l);
    return right;
}

/* ---- Times ---------------------------------------------------------------------------------------- */

/* Microseconds a layer, median of replays of a graph of all layers. */
double timed(const bench &b, std::vector<layer> &layers, const std::function<void(layer &)> &one)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t begin, end;
    std::vector<float> ms(REPEATS);
    CHECK(cudaStreamBeginCapture(b.stream, cudaStreamCaptureModeRelaxed));
    for (layer &l : layers) one(l);
    CHECK(cudaStreamEndCapture(b.stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    for (int i = -3; i < REPEATS; i++) {
        CHECK(cudaEventRecord(begin, b.stream));
        CHECK(cudaGraphLaunch(exec, b.stream));
        CHECK(cudaEventRecord(end, b.stream));
        CHECK(cudaEventSynchronize(end));
        if (i >= 0) CHECK(cudaEventElapsedTime(&ms[i], begin, end));
    }
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    std::sort(ms.begin(), ms.end());
    return ms[REPEATS / 2] * 1e3 / (double)layers.size();
}

/* Every head's threshold, so that the wanted share of its rows is read; returns the share. */
double set_thresholds(const bench &b, std::vector<layer> &layers, double share)
{
    double all = 0;
    for (layer &l : layers) {
        const uint32_t k = l.s.k;
        std::vector<float> low(k, -30.0f), high(k, 0.0f), middle(k);
        std::vector<uint32_t> n(k);
        for (int i = 0; i < 18; i++) {
            for (uint32_t h = 0; h < k; h++) middle[h] = (low[h] + high[h]) / 2;
            struct sqz_cuda_selection s;
            CHECK(cudaMemcpyAsync(l.log_threshold, middle.data(), k * 4, cudaMemcpyHostToDevice, b.stream));
            const struct sqz_cuda_attend_args a = f16_args(b, l, false, 1);
            good(b.lib.select(&a, &s, b.stream), "select");
            CHECK(cudaMemcpyAsync(n.data(), s.n_groups, k * 4, cudaMemcpyDeviceToHost, b.stream));
            CHECK(cudaStreamSynchronize(b.stream));
            for (uint32_t h = 0; h < k; h++) ((double)n[h] * 8 > share * l.n_rows ? low : high)[h] = middle[h];
        }
        for (uint32_t h = 0; h < k; h++) all += (double)n[h] * 8 / l.n_rows / k / (double)layers.size();
    }
    return all;
}

/* Largest difference of two runs' outputs over the largest number. */
double difference(std::vector<layer> &layers, const std::function<void(layer &)> &one,
                  const std::function<void(layer &)> &two, cudaStream_t stream)
{
    double worst = 0, largest = 0;
    for (size_t i = 0; i < layers.size(); i += 7) {
        layer &l = layers[i];
        one(l);
        CHECK(cudaStreamSynchronize(stream));
        const std::vector<__half> a = host(l.out, l.s.h * l.s.d);
        two(l);
        CHECK(cudaStreamSynchronize(stream));
        const std::vector<__half> c = host(l.out, l.s.h * l.s.d);
        for (size_t j = 0; j < a.size(); j++) {
            const double e = fabs((double)__half2float(a[j]) - (double)__half2float(c[j]));
            if (!(e <= worst)) worst = e;
            largest = std::max(largest, fabs((double)__half2float(a[j])));
        }
    }
    return worst / largest;
}

struct output {
    FILE *file;
    bool first;
};

bool time_shape(const bench &b, output &o, shape s, uint32_t n_rows, int n_layers, double asked_share)
{
    std::vector<layer> layers;
    for (int i = 0; i < n_layers; i++) layers.push_back(make_layer(s, n_rows, 100 + i, true));
    CHECK(cudaDeviceSynchronize());
    bool right = true;
    for (int squeezed = 0; squeezed < 2; squeezed++) {
        const double share = squeezed ? set_thresholds(b, layers, asked_share) : 1.0;
        auto f16 = [&](layer &l) {
            const struct sqz_cuda_attend_args a = f16_args(b, l, !squeezed, 1);
            good(b.lib.attend(&a, b.stream), "attend");
        };
        auto select = [&](layer &l, struct sqz_cuda_selection *list) {
            const struct sqz_cuda_attend_args a = f16_args(b, l, false, 1);
            good(b.lib.select(&a, list, b.stream), "select");
        };
        auto planes = [&](layer &l, bool both) {
            struct sqz_cuda_selection list;
            if (squeezed) select(l, &list);
            attend_planes(b, plane_args(b, l, both, squeezed ? &list : NULL, 1));
        };
        const double off = difference(
            layers, f16, [&](layer &l) { planes(l, true); }, b.stream);
        right = right && off < 6e-3; /* F16 rows are rounded, 2^-11, and so are outputs */
        const double rows = share * n_rows * s.k, lookup_bytes = (double)s.k * layers[0].n_clusters * (s.d + 8);
        double us_f16 = 0;
        const double us_select = squeezed ? timed(
                                                b, layers,
                                                [&](layer &l) {
            struct sqz_cuda_selection list;
            select(l, &list);
                                                })
            : 0;
        for (int kind = 0; kind < 3; kind++) {
            const bool both = kind == 2;
            const double us = kind == 0 ? timed(b, layers, f16) : timed(b, layers, [&](layer &l) { planes(l, both); });
            if (kind == 0) us_f16 = us;
            const double row_bytes = kind == 0 ? 4.0 * s.d : s.d * (both ? 2.0 : 1.0) + 4.5;
            const double bytes = rows * row_bytes + (squeezed || kind ? lookup_bytes : 0) + (double)s.k * OWN * 4 * s.d;
            const char *type = kind == 0 ? "f16" : both ? "int4+4" : "int4";
            printf("%2u/%-2u heads of %3u, %6u rows, %-6s %5.3f read: %8.2f us (select %6.2f), %6.0f GB/s (%.3f of 4.8 "
                   "TB/s), %.2fx F16, off %.1e\n",
                   s.h, s.k, s.d, n_rows, type, share, us, us_select, bytes / us / 1e3, bytes / us / 4.8e6, us_f16 / us,
                   off);
            fflush(stdout);
            fprintf(o.file,
                    "%s\n{\"heads\": %u, \"kv_heads\": %u, \"head_dim\": %u, \"tokens\": %u, \"own_tokens\": %u, "
                    "\"layers\": %d, \"rows\": \"%s\", "
                    "\"share\": %.4f, \"us\": %.2f, \"us_of_selecting\": %.2f, \"gb_s\": %.0f, \"share_of_4.8_tb_s\": "
                    "%.3f, \"times_f16\": %.3f, "
                    "\"difference_to_f16\": %.1e}",
                    o.first ? "" : ",", s.h, s.k, s.d, n_rows, (unsigned)OWN, n_layers, type, share, us, us_select,
                    bytes / us / 1e3, bytes / us / 4.8e6, us_f16 / us, off);
            o.first = false;
        }
    }
    for (layer &l : layers) free_layer(l);
    return right;
}

/* Calls of every kind on one layer, for a profiler. */
void run_once(const bench &b, shape s, uint32_t n_rows)
{
    std::vector<layer> layers = {make_layer(s, n_rows, 100, true)};
    set_thresholds(b, layers, 0.125);
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaProfilerStart());
    for (int both = 0; both < 2; both++) attend_planes(b, plane_args(b, layers[0], both, NULL, 1));
    const struct sqz_cuda_attend_args a = f16_args(b, layers[0], false, 1);
    good(b.lib.attend(&a, b.stream), "attend");
    struct sqz_cuda_selection list;
    good(b.lib.select(&a, &list, b.stream), "select");
    for (int both = 0; both < 2; both++) attend_planes(b, plane_args(b, layers[0], both, &list, 1));
    CHECK(cudaStreamSynchronize(b.stream));
    CHECK(cudaProfilerStop());
    free_layer(layers[0]);
}

} // namespace

int main(int argc, char **argv)
{
    const bool check_only = argc == 4 && strcmp(argv[3], "check") == 0,
               once = argc == 4 && strcmp(argv[3], "once") == 0;
    if (argc != 3 && !check_only && !once) {
        fprintf(stderr, "usage: planes OUT.json LIBRARY.so [check|once]\n");
        return 2;
    }
    void *handle = dlopen(argv[2], RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        fprintf(stderr, "planes: %s\n", dlerror());
        return 1;
    }
    bench b;
    b.lib.bytes = (decltype(b.lib.bytes))dlsym(handle, "sqz_cuda_attend_workspace_bytes");
    b.lib.attend = (decltype(b.lib.attend))dlsym(handle, "sqz_cuda_attend");
    b.lib.select = (decltype(b.lib.select))dlsym(handle, "sqz_cuda_select");
    cudaDeviceProp card;
    CHECK(cudaGetDeviceProperties(&card, 0));
    CHECK(cudaStreamCreateWithFlags(&b.stream, cudaStreamNonBlocking));
    b.workspace_bytes = (size_t)512 << 20;
    b.workspace = device<char>(b.workspace_bytes);
    b.n_blocks = 2 * (uint32_t)card.multiProcessorCount;
    b.slot_rows = (size_t)1 << 16;
    b.parts = device<struct sqz_cuda_part>(b.slot_rows), b.part_out = device<float>(b.slot_rows * 128);
    b.arrived = device<uint32_t>(1 << 14);
    CHECK(cudaMemset(b.arrived, 0, 4 << 14));
    if (once) {
        for (uint32_t n : {131072u, 524288u}) run_once(b, {32, 8, 128}, n);
        return 0;
    }
    bool right = true;
    for (const shape &s : {shape{32, 8, 128}, shape{8, 8, 128}, shape{9, 3, 64}, shape{16, 2, 128}, shape{16, 2, 64}})
        right &= check_shape(b, s, 5003);
    right &= check_shape(b, {4, 1, 128}, 90);
    right &= check_shape(b, {4, 2, 128}, 21011);
    printf("%s\n", right ? "all right" : "SOMETHING IS WRONG");
    if (!right || check_only) return right ? 0 : 1;
    output o = {fopen(argv[1], "w"), true};
    if (!o.file) return 1;
    fprintf(o.file,
            "{\n\"machine\": {\"gpu\": \"%s\", \"command\": \"bench/gpu/planes OUT.json LIBRARY.so\"},\n\"rows\": [",
            card.name);
    right &= time_shape(b, o, {32, 8, 128}, 32768, 32, 0.125);
    right &= time_shape(b, o, {32, 8, 128}, 131072, 32, 0.125);
    right &= time_shape(b, o, {32, 8, 128}, 524288, 32, 0.125);
    right &= time_shape(b, o, {32, 32, 128}, 131072, 16, 0.125);
    right &= time_shape(b, o, {32, 8, 64}, 131072, 32, 0.125);
    fprintf(o.file, "\n]\n}\n");
    fclose(o.file);
    printf("%s\n", right ? "all right" : "SOMETHING IS WRONG");
    return right ? 0 : 1;
}
