/*
 * What the ways take in which tokens of one batch go through a layer of a context: a selection each, one selection for
 * all, everything. engine/card_ways.c reckons with these numbers.
 *
 *   nvcc -O2 -std=c++17 -arch=native -Iinclude -Ilib bench/gpu/ways.cu -o ways libsqueeze_cuda.so -Xlinker -rpath=.
 *   ./ways [ROWS:TOKENS[:codes][:tail]|:long]...
 *
 * 32 over 8 heads of 128, F16. Keys lie about centroids of random numbers, 20 a cluster; queries of different tokens
 * resemble each other as much as it takes for what they select together. Each time is that of a call within a captured
 * graph of 20, the least of 5. Prints one line of JSON a case.
 */
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <vector>

#include "squeeze_cuda.h"

enum { H = 32, K = 8, D = 128, KEYS = 20, N_USER = 300, CALLS = 20, POINTS = 256 };

static void must(bool ok, const char *what)
{
    if (ok) return;
    fprintf(stderr, "ways: %s: %s\n", what, cudaGetErrorString(cudaGetLastError()));
    exit(1);
}

static void *zeros(size_t bytes)
{
    void *p = NULL;
    must(cudaMalloc(&p, bytes ? bytes : 1) == cudaSuccess && cudaMemset(p, 0, bytes) == cudaSuccess, "memory");
    return p;
}

template <class T> static T *upload(const std::vector<T> &v)
{
    T *p = (T *)zeros(v.size() * sizeof(T));
    must(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess, "copy");
    return p;
}

static __device__ float noise(uint64_t x)
{
    x ^= x >> 33, x *= 0xff51afd7ed558ccdull, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53ull, x ^= x >> 33;
    return ((float)(x & 0xffff) + (float)(x >> 16 & 0xffff) - 65535.0f) / 65536.0f * 2.45f; /* variance 1 */
}

/* Numbers by place: of a centroid where each > 1, and noise about it. */
static __global__ void fill(__half *out, size_t n, uint64_t seed, uint32_t each, float spread)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        const size_t row = i / D, centre = row / each * D + i % D;
        out[i] = __float2half(noise(seed + centre) + spread * noise(seed * 77 + i));
    }
}

static void *random_rows(size_t rows, uint64_t seed, uint32_t each, float spread)
{
    __half *p = (__half *)zeros(rows * D * 2);
    fill<<<512, 256>>>(p, rows * D, seed << 40, each, spread);
    return p;
}

static __global__ void fill_words(uint32_t *out, size_t n)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        out[i] = __float_as_uint(noise(i)) * 2654435761u;
}

/* Single keys: codes of two words over 64 directions, as prepare makes them of heads of 128. */
static struct sqz_codes make_codes(uint32_t n_keys)
{
    enum { WORDS = 2, DIRECTIONS = 64 };
    struct sqz_codes c;
    memset(&c, 0, sizeof c);
    c.n_words = WORDS, c.n_directions = DIRECTIONS;
    uint32_t *words = (uint32_t *)zeros((size_t)K * WORDS * n_keys * 4);
    fill_words<<<512, 256>>>(words, (size_t)K * WORDS * n_keys);
    c.words = words;
    std::vector<__half> directions((size_t)K * DIRECTIONS * D), book((size_t)K * 16 * DIRECTIONS);
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (__half &x : directions) x = __float2half(normal(random) / sqrtf(D));
    for (__half &x : book) x = __float2half(normal(random) * 0.5f);
    std::vector<uint32_t> first;
    for (int k = 0; k < K; k++)
        for (int i = 0; i <= 8 * WORDS; i++) first.push_back(i * DIRECTIONS / (8 * WORDS));
    c.directions = (uint16_t *)upload(directions);
    c.book = (uint16_t *)upload(book);
    c.first = upload(first);
    c.spread = upload(std::vector<float>(K * DIRECTIONS, 0.5f));
    return c;
}

static struct sqz_layer make_layer(uint32_t n, bool coded)
{
    struct sqz_layer l;
    memset(&l, 0, sizeof l);
    l.space = SQZ_SPACE_CUDA;
    l.shape.n_head = H, l.shape.n_head_kv = K, l.shape.head_dim = D, l.shape.scale = 0.0884f;
    l.n_fixed = 68;
    const uint32_t c = (n - l.n_fixed) / KEYS;
    l.n_rows = n = l.n_fixed + c * KEYS;
    l.keys.type = l.values.type = SQZ_ROW_F16;
    l.keys.data = random_rows((size_t)K * n, 1, KEYS, 0.5f); /* about other centres: time does not depend on it */
    l.values.data = random_rows((size_t)K * n, 2, 1, 0);
    l.n_levels = 1;
    l.level[0].value_centroids.type = SQZ_ROW_F16;
    l.level[0].value_centroids.data = random_rows((size_t)K * c, 4, 1, 0);
    l.level[0].n_clusters = c;
    l.level[0].centroids.type = SQZ_ROW_F16;
    l.level[0].centroids.data = random_rows((size_t)K * c, 3, 1, 0);
    std::vector<uint32_t> offset;
    for (int k = 0; k < K; k++)
        for (uint32_t i = 0; i <= c; i++) offset.push_back(i * KEYS);
    l.level[0].offset = upload(offset);
    l.level[0].variance = upload(std::vector<float>((size_t)K * c, 0.25f));
    if (coded) l.codes = make_codes(n - l.n_fixed);
    return l;
}

/* The threshold at which a token reads this share. */
static float threshold_of(const struct sqz_layer *l, const void *queries, double share)
{
    struct sqz_cuda_calibrate_args a;
    memset(&a, 0, sizeof a);
    a.layer = l, a.n_queries = 1, a.queries = queries, a.n_points = POINTS, a.first = -16, a.step = 0.05f;
    a.share = (float *)zeros(K * POINTS * sizeof(float));
    a.workspace_bytes = sqz_cuda_calibrate_workspace_bytes(&a);
    a.workspace = zeros(a.workspace_bytes);
    must(sqz_cuda_calibrate(&a, NULL) == SQZ_OK, "calibration");
    std::vector<float> shares(K * POINTS);
    must(cudaMemcpy(shares.data(), a.share, shares.size() * sizeof(float), cudaMemcpyDeviceToHost) == cudaSuccess,
         "copy");
    cudaFree(a.share);
    cudaFree(a.workspace);
    int best = 0;
    for (int i = 0; i < POINTS; i++)
        if (fabs(shares[i] - share) < fabs(shares[best] - share)) best = i;
    return a.first + a.step * (float)best;
}

static double time_us(const struct sqz_cuda_attend_args *a)
{
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t captured;
    cudaEvent_t from, to;
    must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess, "a stream");
    must(sqz_cuda_attend(a, stream) == SQZ_OK && cudaStreamSynchronize(stream) == cudaSuccess, "a call");
    must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed) == cudaSuccess, "capture");
    for (int i = 0; i < CALLS; i++) must(sqz_cuda_attend(a, stream) == SQZ_OK, "a call");
    must(cudaStreamEndCapture(stream, &graph) == cudaSuccess, "capture");
    must(cudaGraphInstantiate(&captured, graph, 0) == cudaSuccess, "capture");
    cudaEventCreate(&from), cudaEventCreate(&to);
    float least = INFINITY;
    for (int i = 0; i < 6; i++) {
        float ms = 0;
        cudaEventRecord(from, stream);
        cudaGraphLaunch(captured, stream);
        cudaEventRecord(to, stream);
        must(cudaEventSynchronize(to) == cudaSuccess, "a graph");
        cudaEventElapsedTime(&ms, from, to);
        if (i) least = fminf(least, ms);
    }
    cudaGraphExecDestroy(captured), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
    return 1e3 * least / CALLS;
}

static double share_of(const uint32_t *device, size_t n, const struct sqz_layer *l)
{
    std::vector<uint32_t> counts(n);
    double sum = 0;
    must(cudaMemcpy(counts.data(), device, n * sizeof(uint32_t), cudaMemcpyDeviceToHost) == cudaSuccess, "copy");
    for (uint32_t x : counts) sum += 8.0 * x;
    return sum / (double)n / l->n_rows;
}

/* alike: how much of a query all tokens have in common, 0 to 1. */
static void measure(const struct sqz_layer *l, uint32_t b, bool tail, double share, float alike)
{
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    std::vector<__half> queries((size_t)b * H * D);
    std::vector<float> common(H * D);
    for (float &x : common) x = normal(random);
    for (size_t i = 0; i < queries.size(); i++)
        queries[i] = __float2half(sqrtf(alike) * common[i % (H * D)] + sqrtf(1 - alike) * normal(random));
    std::vector<struct sqz_cuda_user> users(b);
    for (auto &u : users)
        u = {random_rows((size_t)K * N_USER, 5, 1, 0), random_rows((size_t)K * N_USER, 6, 1, 0), N_USER, N_USER, 0};
    struct sqz_cuda_attend_args a;
    memset(&a, 0, sizeof a);
    a.layer = l;
    a.n_sequences = b;
    a.n_tokens = 1;
    a.queries = upload(queries);
    a.out = zeros(queries.size() * 2);
    a.users = upload(users);
    a.n_user = 1024;
    a.n_retained = (uint32_t *)zeros(b * K * 4);
    std::vector<float> thresholds((size_t)b * K, threshold_of(l, a.queries, share));
    a.plan.log_threshold = upload(thresholds);
    if (tail) a.plan.tail_gain = upload(std::vector<float>((size_t)b * K, 0));
    a.plan.tail_skip = 0.5f;
    a.plan.per_sequence = true;
    double us[2][2], read[2] = {0, 0};
    for (int dense = 0; dense < 2; dense++)
        for (int together = 0; together < 2; together++) {
            a.dense = dense, a.together = together;
            a.workspace_bytes = sqz_cuda_attend_workspace_bytes(&a);
            a.workspace = zeros(a.workspace_bytes);
            us[dense][together] = time_us(&a);
            if (!dense) read[together] = share_of(a.n_retained, together ? K : (size_t)b * K, l);
            cudaFree(a.workspace);
        }
    printf(
        "{\"rows\": %u, \"codes\": %s, \"tail\": %s, \"tokens\": %u, \"read_each\": %.4f, "
        "\"read_united\": %.4f, \"each_us\": %.1f, "
        "\"one_us\": %.1f, \"all_us\": %.1f, \"all_each_us\": %.1f}\n",
        l->n_rows, l->codes.n_words ? "true" : "false", tail ? "true" : "false", b, read[0], read[1], us[0][0],
        us[0][1], us[1][1], us[1][0]);
    fflush(stdout);
    for (auto &u : users) cudaFree((void *)u.keys), cudaFree((void *)u.values);
    cudaFree((void *)a.queries), cudaFree(a.out), cudaFree((void *)a.users), cudaFree(a.n_retained);
    cudaFree((void *)a.plan.log_threshold), cudaFree((void *)a.plan.tail_gain);
}

/* A long question, whose tokens share a selection: without and with a tail, then everything. */
static void measure_long(const struct sqz_layer *l, uint32_t t, double share)
{
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    std::vector<__half> queries((size_t)t * H * D);
    for (__half &x : queries) x = __float2half(normal(random));
    struct sqz_cuda_attend_args a;
    memset(&a, 0, sizeof a);
    a.layer = l;
    a.n_sequences = 1;
    a.n_tokens = t;
    a.queries = upload(queries);
    a.out = zeros(queries.size() * 2);
    a.user_keys = random_rows((size_t)K * t, 5, 1, 0);
    a.user_values = random_rows((size_t)K * t, 6, 1, 0);
    a.user_capacity_rows = a.n_user = t;
    a.n_retained = (uint32_t *)zeros(K * 4);
    a.plan.log_threshold = upload(std::vector<float>(K, threshold_of(l, a.queries, share)));
    a.plan.retain_rows = upload(std::vector<uint32_t>(K, (uint32_t)(share * l->n_rows)));
    a.plan.tail_skip = 0.5f;
    double us[3], read = 0;
    for (int way = 0; way < 3; way++) {
        a.dense = way == 2;
        a.plan.tail_gain = way == 1 ? upload(std::vector<float>(K, 0)) : NULL;
        a.workspace_bytes = sqz_cuda_attend_workspace_bytes(&a);
        a.workspace = zeros(a.workspace_bytes);
        us[way] = time_us(&a);
        cudaFree(a.workspace);
        if (way == 0) read = share_of(a.n_retained, K, l);
    }
    printf("{\"rows\": %u, \"question\": %u, \"read\": %.4f, \"shared_us\": %.1f, \"with_tail_us\": %.1f, "
           "\"all_us\": %.1f}\n",
           l->n_rows, t, read, us[0], us[1], us[2]);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    static const char *const usual[] = {"131072:1",        "131072:8",       "131072:32",      "131072:40",
                                        "131072:8:tail",   "131072:32:tail", "32768:8",        "32768:32",
                                        "32768:8:tail",    "32768:32:tail",  "131072:1:codes", "131072:8:codes",
                                        "131072:32:codes"};
    std::vector<const char *> cases(usual, usual + sizeof usual / sizeof *usual);
    if (argc > 1) cases.assign(argv + 1, argv + argc);
    struct sqz_layer l;
    uint32_t rows = 0;
    bool coded = false;
    for (const char *one : cases) {
        uint32_t wanted = 0, b = 0;
        must(sscanf(one, "%u:%u", &wanted, &b) == 2, one);
        const bool codes = strstr(one, "codes") != NULL;
        if (wanted != rows || codes != coded) l = make_layer(wanted, codes);
        rows = wanted, coded = codes;
        if (strstr(one, "long")) {
            for (double share : {0.04, 0.1, 0.3}) measure_long(&l, b, share);
            continue;
        }
        for (double share : {0.04, 0.1})
            for (float alike : {0.9f, 0.6f, 0.2f})
                if (b > 1 || alike > 0.8f) measure(&l, b, strstr(one, "tail"), share, alike);
    }
    return 0;
}
