/* Layers that latency.cu and ranks.cu make: rows around centres, the same on every machine. */
#ifndef SQZ_BENCH_GPU_MADE_LAYER_CUH
#define SQZ_BENCH_GPU_MADE_LAYER_CUH

#include <math.h>
#include <string.h>

#include "made.cuh"
#include "squeeze_attention.h"

namespace
{

enum { H = 32, K = 8, G = H / K, D = 128, FIXED = 80, OWN = 200 };
enum { WORDS = 2, DIRECTIONS = 48 };

__device__ float centre(uint64_t seed, uint32_t head, uint32_t cluster, uint32_t d)
{
    return 0.8f * normal(seed + 1, ((uint64_t)head * 65536 + cluster / 5) * D + d) +
           0.6f * normal(seed + 2, ((uint64_t)head * 65536 + cluster) * D + d);
}

struct made {
    uint64_t seed;
    uint32_t n_rows, n_clusters;
    __half *keys, *values, *value_centroids;
    int8_t *centroids;
    float *scale, *mean, *variance;
    uint32_t *offset, *words;
};

/* Start::of(m, head, c): the row behind the fixed ones that cluster c begins with; of m.n_clusters the end. */
/* A block a cluster of a head; the first also makes the fixed rows. */
template <class Start> __global__ void make_kernel(made m)
{
    const uint32_t head = blockIdx.y, c = blockIdx.x, d = threadIdx.x;
    __shared__ float largest[D];
    const uint32_t begin = Start::of(m, head, c), end = Start::of(m, head, c + 1);
    const float x = centre(m.seed, head, c, d);
    auto row = [&](uint32_t i, float of) {
        const uint64_t at = ((uint64_t)head * m.n_rows + i) * D + d;
        m.keys[at] = __float2half(of + 0.35f * normal(m.seed + 3, at));
        m.values[at] = __float2half(normal(m.seed + 4, at));
    };
    for (uint32_t i = begin; i < end; i++) {
        row(FIXED + i, x);
        if (d < WORDS) m.words[((uint64_t)head * WORDS + d) * (m.n_rows - FIXED) + i] = mixed(m.seed * 77 + i * 2 + d);
    }
    if (c == 0)
        for (uint32_t i = 0; i < FIXED; i++) row(i, 0.3f);
    largest[d] = fabsf(x);
    __syncthreads();
    for (int step = D / 2; step; step /= 2) {
        if (d < step) largest[d] = fmaxf(largest[d], largest[d + step]);
        __syncthreads();
    }
    const uint64_t at = (uint64_t)head * m.n_clusters + c;
    const float scale = largest[0] / 127.0f;
    m.centroids[at * D + d] = (int8_t)rintf(x / scale);
    m.value_centroids[at * D + d] = __float2half(0.2f * normal(m.seed + 5, at * D + d));
    if (d == 0) {
        m.scale[at] = scale;
        m.variance[at] = 0.35f * 0.35f * D;
        m.offset[at + head] = begin;
        if (c + 1 == m.n_clusters) m.offset[at + head + 1] = end;
    }
    if (c == 0) m.mean[head * D + d] = 0;
}

/* The layer that these arrays are. */
struct sqz_layer layer_of(const made &m, uint32_t n_fixed, bool group_max)
{
    struct sqz_layer r;
    memset(&r, 0, sizeof r);
    r.space = SQZ_SPACE_CUDA;
    r.shape = {H, K, D, 1.0f / sqrtf((float)D)};
    r.n_rows = m.n_rows, r.n_fixed = n_fixed;
    r.keys = {SQZ_ROW_F16, m.keys, NULL, NULL}, r.values = {SQZ_ROW_F16, m.values, NULL, NULL};
    r.n_levels = 1;
    r.level[0] = {m.n_clusters,
                  {SQZ_ROW_I8, m.centroids, m.scale, m.mean},
                  {SQZ_ROW_F16, m.value_centroids, NULL, NULL},
                  m.offset,
                  m.variance};
    r.group = group_max ? SQZ_GROUP_MAX : SQZ_GROUP_MEAN;
    return r;
}

} // namespace

#endif
