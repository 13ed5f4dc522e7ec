/* Layers of ranks.cu: groups around centres, the same on every machine, and the halves of them that two ranks have. */
#ifndef SQZ_BENCH_GPU_RANKS_LAYERS_CUH
#define SQZ_BENCH_GPU_RANKS_LAYERS_CUH

#include <math.h>
#include <string.h>
#include <vector>

#include "made_layer.cuh"
#include "squeeze_cuda.h"

namespace
{

enum { RANKS = 2 };

/* Fixed rows and half the clusters end at row n_rows / 2 in every head. */
struct in_halves {
    static __device__ uint32_t of(const made &m, uint32_t head, uint32_t c)
    {
        const uint32_t half = m.n_clusters / 2, middle = m.n_rows / 2 - FIXED;
        const uint32_t base = c < half ? 0 : middle, n = c < half ? middle : m.n_rows / 2;
        const uint32_t of = c < half ? half : m.n_clusters - half, i = c < half ? c : c - half;
        if (i == 0) return base;
        if (i == of) return base + n;
        const float moved =
            ((mixed(m.seed + head * 65536ull + c) & 1023) / 1023.0f - 0.5f) * 0.9f * ((float)n / of - 1);
        return base + (uint32_t)((double)i * n / of + moved);
    }
};

__global__ void query_kernel(__half *q, uint64_t seed, uint32_t n_clusters)
{
    const uint32_t h = blockIdx.x, d = threadIdx.x, pick = mixed(seed + h) % n_clusters;
    const float x = centre(seed, h / G, pick, d) + 0.5f * normal(seed + 6, h * D + d);
    q[h * D + d] = __float2half((0.5f + 0.15f * (float)(h % 5)) * x);
}

/* A layer, or a rank's part of one, on the device it was made on. */
struct layer {
    struct sqz_layer rows;
    made m;
    __half *queries, *out, *own_keys, *own_values;
    float *log_threshold, *alone_threshold, *variance_gain, *tail_gain;
    uint32_t *retained, n_own;
    std::vector<void *> memory;

    template <class T> T *take(size_t n)
    {
        T *p = device<T>(n);
        memory.push_back(p);
        return p;
    }
    void allocate(uint32_t n_rows, uint32_t n_clusters)
    {
        const size_t all = (size_t)K * n_rows, clusters = (size_t)K * n_clusters;
        m.n_rows = n_rows, m.n_clusters = n_clusters;
        m.keys = take<__half>(all * D), m.values = take<__half>(all * D);
        m.value_centroids = take<__half>(clusters * D), m.centroids = take<int8_t>(clusters * D);
        m.scale = take<float>(clusters), m.mean = take<float>(K * D), m.variance = take<float>(clusters);
        m.offset = take<uint32_t>(clusters + K), m.words = take<uint32_t>(all * WORDS);
        queries = take<__half>(H * D), out = take<__half>(H * D);
        own_keys = take<__half>((size_t)K * OWN * D), own_values = take<__half>((size_t)K * OWN * D);
        log_threshold = take<float>(K), alone_threshold = take<float>(K);
        variance_gain = take<float>(K), tail_gain = take<float>(K);
        retained = take<uint32_t>(K);
    }
    void describe(uint32_t n_fixed, uint32_t own, bool group_max)
    {
        n_own = own;
        rows = layer_of(m, n_fixed, group_max);
    }
    void release()
    {
        for (void *p : memory) CHECK(cudaFree(p));
        memory.clear();
    }
};

/* On the current device. */
layer make_layer(uint32_t n_rows, uint32_t keys_a_cluster, uint64_t seed)
{
    layer l = {};
    l.m.seed = seed * 1000;
    l.allocate(n_rows, n_rows / keys_a_cluster / 2 * 2);
    make_kernel<in_halves><<<dim3(l.m.n_clusters, K), D>>>(l.m);
    query_kernel<<<H, D>>>(l.queries, l.m.seed, l.m.n_clusters);
    noise_kernel<<<64, 256>>>(l.own_keys, (uint64_t)K * OWN * D, l.m.seed + 10, 0.5f);
    noise_kernel<<<64, 256>>>(l.own_values, (uint64_t)K * OWN * D, l.m.seed + 11, 1.0f);
    std::vector<float> gain(K, 0.7f), tail(K);
    for (int h = 0; h < K; h++) tail[h] = h % 4 == 0 ? 0.2f : -100.0f; /* a quarter of the tails is on */
    CHECK(cudaMemcpy(l.variance_gain, gain.data(), K * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(l.tail_gain, tail.data(), K * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemset(l.log_threshold, 0, K * 4));
    l.describe(FIXED, OWN, true);
    CHECK(cudaDeviceSynchronize());
    return l;
}

/* Codes of the same directions and book whichever part of a layer it is. */
void make_codes(layer &l, uint64_t seed)
{
    struct sqz_codes &c = l.rows.codes;
    __half *directions = l.take<__half>((size_t)K * DIRECTIONS * D),
           *book = l.take<__half>((size_t)K * 16 * DIRECTIONS);
    std::vector<uint32_t> first;
    std::vector<float> spread((size_t)K * DIRECTIONS, 1.0f / D);
    for (int h = 0; h < K; h++)
        for (int p = 0; p <= 8 * WORDS; p++) first.push_back(p * DIRECTIONS / (8 * WORDS));
    noise_kernel<<<64, 256>>>(directions, (uint64_t)K * DIRECTIONS * D, seed + 8, 0.0884f);
    noise_kernel<<<64, 256>>>(book, (uint64_t)K * 16 * DIRECTIONS, seed + 9, 0.33f);
    uint32_t *d_first = l.take<uint32_t>(first.size());
    float *d_spread = l.take<float>(spread.size());
    CHECK(cudaMemcpy(d_first, first.data(), first.size() * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(d_spread, spread.data(), spread.size() * 4, cudaMemcpyHostToDevice));
    CHECK(cudaDeviceSynchronize());
    c = {WORDS, DIRECTIONS, l.m.words, (const uint16_t *)directions, (const uint16_t *)book, d_first, d_spread};
}

/* Rank `rank`'s half of a layer, on the current device: the first has the fixed rows, the last the user's. */
layer half_of(const layer &all, uint32_t rank)
{
    layer l = {};
    const uint32_t n = all.m.n_rows / 2, c = all.m.n_clusters / 2, fixed = rank ? 0 : FIXED;
    l.m.seed = all.m.seed;
    l.allocate(n, c);
    auto slices = [&](void *to, const void *from, size_t n_runs, size_t from_each, size_t skip, size_t bytes) {
        for (size_t i = 0; i < n_runs; i++)
            CHECK(cudaMemcpyAsync((char *)to + i * bytes, (const char *)from + i * from_each + skip, bytes,
                                  cudaMemcpyDefault));
    };
    auto same = [&](void *to, const void *from, size_t bytes) { slices(to, from, 1, 0, 0, bytes); };
    const size_t row = D * 2, n_all = all.m.n_rows, c_all = all.m.n_clusters;
    slices(l.m.keys, all.m.keys, K, n_all * row, rank * n * row, n * row);
    slices(l.m.values, all.m.values, K, n_all * row, rank * n * row, n * row);
    slices(l.m.value_centroids, all.m.value_centroids, K, c_all * row, rank * c * row, c * row);
    slices(l.m.centroids, all.m.centroids, K, c_all * D, (size_t)rank * c * D, (size_t)c * D);
    slices(l.m.scale, all.m.scale, K, c_all * 4, rank * (size_t)c * 4, (size_t)c * 4);
    slices(l.m.variance, all.m.variance, K, c_all * 4, rank * (size_t)c * 4, (size_t)c * 4);
    slices(l.m.words, all.m.words, K * WORDS, (n_all - FIXED) * 4, rank ? (size_t)(n - FIXED) * 4 : 0,
           (size_t)(n - fixed) * 4);
    same(l.m.mean, all.m.mean, K * D * 4);
    same(l.queries, all.queries, H * D * 2);
    same(l.own_keys, all.own_keys, (size_t)K * OWN * D * 2);
    same(l.own_values, all.own_values, (size_t)K * OWN * D * 2);
    same(l.log_threshold, all.log_threshold, K * 4);
    same(l.variance_gain, all.variance_gain, K * 4);
    same(l.tail_gain, all.tail_gain, K * 4);
    std::vector<uint32_t> offset((c_all + 1) * K), mine;
    CHECK(cudaMemcpy(offset.data(), all.m.offset, offset.size() * 4, cudaMemcpyDefault));
    for (int h = 0; h < K; h++)
        for (uint32_t i = 0; i <= c; i++) {
            const uint32_t *of = &offset[h * (c_all + 1) + rank * c];
            mine.push_back(of[i] - of[0]);
        }
    CHECK(cudaMemcpy(l.m.offset, mine.data(), mine.size() * 4, cudaMemcpyHostToDevice));
    CHECK(cudaDeviceSynchronize());
    l.describe(fixed, rank ? OWN : 0, all.rows.group == SQZ_GROUP_MAX);
    return l;
}
} // namespace

#endif
