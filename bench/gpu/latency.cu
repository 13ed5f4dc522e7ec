/*
 * What one token's attention takes on a GPU, a layer: as the engine calls it (calls.h), 32 layers of distinct memory in
 * one CUDA graph, and between them the traffic of a model's products, so that neither rows nor instructions are still
 * in a cache when their turn comes. The graph is timed with and without attention; the difference is attention's.
 *
 *   latency OUT.json LIBRARY.so [LIBRARY.so ...]
 *
 * Several libraries, of one version each of lib/cuda/, are timed side by side and their results compared with the
 * first one's. Build: nvcc -O2 -std=c++17 -arch=sm_90 -Iinclude -Ilib/cuda -Ilib bench/gpu/latency.cu -o latency -ldl
 */
#include <algorithm>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <vector>

#include "calls.h"
#include "made_layer.cuh"

namespace
{

enum { LAYERS = 32, OWN_ROOM = 1024, REPEATS = 21 };

/* ---- Made layers -------------------------------------------------------------------------- */

struct even {
    static __device__ uint32_t of(const made &m, uint32_t head, uint32_t c)
    {
        const uint32_t n = m.n_rows - FIXED;
        if (c == 0 || c >= m.n_clusters) return c ? n : 0;
        const float each = (float)n / (float)m.n_clusters;
        const float moved = ((mixed(m.seed + head * 65536ull + c) & 1023) / 1023.0f - 0.5f) * 0.9f * (each - 1);
        return (uint32_t)((double)c * n / m.n_clusters + moved);
    }
};

__global__ void query_kernel(float *q, uint64_t seed, uint32_t n_clusters)
{
    const uint32_t h = blockIdx.x, d = threadIdx.x, pick = mixed(seed + h) % n_clusters;
    q[h * D + d] =
        (0.5f + 0.15f * (float)(h % 5)) * (centre(seed, h / G, pick, d) + 0.5f * normal(seed + 6, h * D + d));
}

/* ---- What goes on between attentions ------------------------------------------------------- */

/* Reads n words of 16 bytes, as a product with one vector does. */
__global__ void __launch_bounds__(256) product_kernel(const uint4 *weights, size_t n, float *out)
{
    float sum = 0;
    for (size_t i = blockIdx.x * (size_t)256 + threadIdx.x; i < n; i += (size_t)gridDim.x * 256) {
        const uint4 x = weights[i];
        sum += __uint_as_float((x.x ^ x.y ^ x.z ^ x.w) & 0x3fffffff);
    }
    if (sum == -1.0f) *out = sum;
}

const size_t product_bytes[] = {9437184, 33030144, 33030144, 33030144, 14155776}; /* behind attention, and before it */

struct work {
    uint32_t n_rows;
    bool codes, tail;
    float share; /* of the rows that is read */
};

struct layer {
    struct sqz_layer rows;
    made m;
    float *queries, *log_threshold, *variance_gain, *tail_gain;
    __half *own_keys, *own_values, *new_keys, *new_values;
    struct sqz_cuda_user *user;
    uint32_t *retained;
    float *out;
    char *weights;
};

struct library {
    std::string name;
    const struct sqz_gpu_calls *calls;
    std::vector<float> out;
    std::vector<uint32_t> retained;
};

struct bench {
    std::vector<layer> layers;
    __half *queries_f16, *out_f16;
    void *workspace;
    size_t workspace_bytes;
    cudaStream_t theirs, ours;
    cudaEvent_t event;
    float *sink;
};

void make_codes(layer &l, uint64_t seed)
{
    struct sqz_codes &c = l.rows.codes;
    __half *directions = device<__half>((size_t)K * DIRECTIONS * D),
           *book = device<__half>((size_t)K * 16 * DIRECTIONS);
    std::vector<uint32_t> first;
    std::vector<float> spread((size_t)K * DIRECTIONS, 1.0f / D);
    for (int h = 0; h < K; h++)
        for (int p = 0; p <= 8 * WORDS; p++) first.push_back(p * DIRECTIONS / (8 * WORDS));
    noise_kernel<<<64, 256>>>(directions, (uint64_t)K * DIRECTIONS * D, seed + 8, 0.0884f);
    noise_kernel<<<64, 256>>>(book, (uint64_t)K * 16 * DIRECTIONS, seed + 9, 0.33f);
    uint32_t *d_first = device<uint32_t>(first.size());
    float *d_spread = device<float>(spread.size());
    CHECK(cudaMemcpy(d_first, first.data(), first.size() * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(d_spread, spread.data(), spread.size() * 4, cudaMemcpyHostToDevice));
    c = {WORDS, DIRECTIONS, l.m.words, (const uint16_t *)directions, (const uint16_t *)book, d_first, d_spread};
}

layer make_layer(uint32_t n_rows, uint64_t seed, const float *tail_gains)
{
    layer l;
    memset(&l, 0, sizeof l);
    made &m = l.m;
    m.seed = seed * 1000, m.n_rows = n_rows, m.n_clusters = (n_rows - FIXED) / 20;
    const size_t rows = (size_t)K * n_rows, clusters = (size_t)K * m.n_clusters;
    m.keys = device<__half>(rows * D), m.values = device<__half>(rows * D);
    m.value_centroids = device<__half>(clusters * D), m.centroids = device<int8_t>(clusters * D);
    m.scale = device<float>(clusters), m.mean = device<float>(K * D), m.variance = device<float>(clusters);
    m.offset = device<uint32_t>(clusters + K), m.words = device<uint32_t>(rows * WORDS);
    make_kernel<even><<<dim3(m.n_clusters, K), D>>>(m);
    l.queries = device<float>(H * D);
    query_kernel<<<H, D>>>(l.queries, m.seed, m.n_clusters);
    l.own_keys = device<__half>((size_t)K * OWN_ROOM * D), l.own_values = device<__half>((size_t)K * OWN_ROOM * D);
    l.new_keys = device<__half>(K * D), l.new_values = device<__half>(K * D);
    noise_kernel<<<64, 256>>>(l.own_keys, (uint64_t)K * OWN_ROOM * D, m.seed + 10, 0.5f);
    noise_kernel<<<64, 256>>>(l.own_values, (uint64_t)K * OWN_ROOM * D, m.seed + 11, 1.0f);
    noise_kernel<<<8, 256>>>(l.new_keys, K * D, m.seed + 12, 0.5f);
    noise_kernel<<<8, 256>>>(l.new_values, K * D, m.seed + 13, 1.0f);
    l.log_threshold = device<float>(K), l.variance_gain = device<float>(K), l.tail_gain = device<float>(K);
    const std::vector<float> gains(K, 0.7f);
    CHECK(cudaMemcpy(l.variance_gain, gains.data(), K * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(l.tail_gain, tail_gains, K * 4, cudaMemcpyHostToDevice));
    const struct sqz_cuda_user user = {l.own_keys, l.own_values, OWN_ROOM, OWN};
    l.user = device<struct sqz_cuda_user>(1);
    CHECK(cudaMemcpy(l.user, &user, sizeof user, cudaMemcpyHostToDevice));
    l.retained = device<uint32_t>(K);
    l.out = device<float>(H * D);
    size_t all = 0;
    for (size_t b : product_bytes) all += b;
    l.weights = device<char>(all);
    CHECK(cudaMemset(l.weights, 0x5a, all));
    l.rows = layer_of(m, FIXED, true);
    return l;
}

struct sqz_cuda_attend_args args_of(const bench &b, const layer &l, const work &w)
{
    struct sqz_cuda_attend_args a;
    memset(&a, 0, sizeof a);
    a.layer = &l.rows;
    a.plan.log_threshold = l.log_threshold;
    a.plan.variance_gain = l.variance_gain;
    a.plan.tail_gain = w.tail ? l.tail_gain : NULL;
    a.plan.tail_skip = 0.5f;
    a.plan.per_sequence = true;
    a.n_sequences = a.n_tokens = 1;
    a.queries = b.queries_f16;
    a.out = b.out_f16;
    a.users = l.user;
    a.n_user = OWN_ROOM;
    a.n_retained = l.retained;
    a.workspace = b.workspace;
    a.workspace_bytes = b.workspace_bytes;
    return a;
}

struct sqz_gpu_node node_of(const bench &b, const layer &l)
{
    struct sqz_gpu_node n;
    memset(&n, 0, sizeof n);
    n.n_tokens = 1, n.n_head = H, n.n_head_kv = K, n.head_dim = n.padded_dim = D;
    n.queries = l.queries, n.query_token_stride = H * D, n.query_head_stride = D;
    n.keys = l.new_keys, n.values = l.new_values;
    n.key_token_stride = n.value_token_stride = K * D, n.key_head_stride = n.value_head_stride = D;
    n.users = l.user;
    n.queries_f16 = b.queries_f16;
    return n;
}

void good(enum sqz_status s, const char *what)
{
    if (s == SQZ_OK) return;
    fprintf(stderr, "latency: %s: status %d\n", what, (int)s);
    exit(1);
}

void attend(const library &lib, const bench &b, const layer &l, const work &w)
{
    const struct sqz_cuda_attend_args a = args_of(b, l, w);
    const struct sqz_gpu_node n = node_of(b, l);
    if (lib.calls->size >= offsetof(struct sqz_gpu_calls, attend_node) + sizeof(void *)) {
        good(lib.calls->attend_node(&a, &n, l.out, b.ours), "attend_node");
        return;
    }
    good(lib.calls->take(&n, b.ours), "take");
    good(lib.calls->attend(&a, b.ours), "attend");
    good(lib.calls->give(l.out, a.out, H, D, D, b.ours), "give");
}

/* Every head's threshold, so that the wanted share of its rows is read. */
void set_thresholds(const library &lib, const bench &b, const work &w)
{
    const float wanted = w.share * (float)w.n_rows / 8.0f;
    for (const layer &l : b.layers) {
        std::vector<float> low(K, -30.0f), high(K, 0.0f), middle(K);
        std::vector<uint32_t> n(K);
        for (int i = 0; i < 16; i++) {
            for (int h = 0; h < K; h++) middle[h] = (low[h] + high[h]) / 2;
            CHECK(cudaMemcpyAsync(l.log_threshold, middle.data(), K * 4, cudaMemcpyHostToDevice, b.ours));
            attend(lib, b, l, w);
            CHECK(cudaMemcpyAsync(n.data(), l.retained, K * 4, cudaMemcpyDeviceToHost, b.ours));
            CHECK(cudaStreamSynchronize(b.ours));
            for (int h = 0; h < K; h++) ((float)n[h] > wanted ? low : high)[h] = middle[h];
        }
    }
}

cudaGraphExec_t captured(const bench &b, const library *lib, const work &w, bool products)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(b.ours, cudaStreamCaptureModeRelaxed));
    CHECK(cudaEventRecord(b.event, b.ours));
    CHECK(cudaStreamWaitEvent(b.theirs, b.event, 0));
    for (const layer &l : b.layers) {
        const char *from = l.weights;
        for (size_t i = 0; products && i < sizeof product_bytes / sizeof *product_bytes; i++) {
            product_kernel<<<132 * 8, 256, 0, b.theirs>>>((const uint4 *)from, product_bytes[i] / 16, b.sink);
            from += product_bytes[i];
        }
        if (!lib) continue;
        CHECK(cudaEventRecord(b.event, b.theirs));
        CHECK(cudaStreamWaitEvent(b.ours, b.event, 0));
        attend(*lib, b, l, w);
        CHECK(cudaEventRecord(b.event, b.ours));
        CHECK(cudaStreamWaitEvent(b.theirs, b.event, 0));
    }
    CHECK(cudaEventRecord(b.event, b.theirs));
    CHECK(cudaStreamWaitEvent(b.ours, b.event, 0));
    CHECK(cudaStreamEndCapture(b.ours, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CHECK(cudaGraphDestroy(graph));
    return exec;
}

/* Microseconds a layer, median. */
double timed(const bench &b, cudaGraphExec_t graph)
{
    cudaEvent_t begin, end;
    std::vector<float> ms(REPEATS);
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    for (int i = -3; i < REPEATS; i++) {
        CHECK(cudaEventRecord(begin, b.ours));
        CHECK(cudaGraphLaunch(graph, b.ours));
        CHECK(cudaEventRecord(end, b.ours));
        CHECK(cudaEventSynchronize(end));
        if (i >= 0) CHECK(cudaEventElapsedTime(&ms[i], begin, end));
    }
    CHECK(cudaGraphExecDestroy(graph));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    std::sort(ms.begin(), ms.end());
    return ms[REPEATS / 2] * 1e3 / LAYERS;
}

void results(library &lib, const bench &b)
{
    lib.out.resize((size_t)LAYERS * H * D);
    lib.retained.resize((size_t)LAYERS * K);
    for (int i = 0; i < LAYERS; i++) {
        CHECK(cudaMemcpy(&lib.out[(size_t)i * H * D], b.layers[i].out, H * D * 4, cudaMemcpyDeviceToHost));
        CHECK(cudaMemcpy(&lib.retained[(size_t)i * K], b.layers[i].retained, K * 4, cudaMemcpyDeviceToHost));
        CHECK(cudaMemset(b.layers[i].out, 0xff, H * D * 4));
        CHECK(cudaMemset(b.layers[i].retained, 0xff, K * 4));
    }
}

/* Largest difference over the largest number of the first one's results; NaN where one is. */
double difference(const library &a, const library &b)
{
    double largest = 0, worst = 0;
    for (size_t i = 0; i < a.out.size(); i++) {
        largest = std::max(largest, (double)fabsf(a.out[i]));
        const double d = fabs((double)a.out[i] - b.out[i]);
        if (!(d <= worst)) worst = d;
        if (worst != worst) break;
    }
    return worst / largest;
}

} // namespace

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: latency OUT.json LIBRARY.so [LIBRARY.so ...]\n");
        return 2;
    }
    std::vector<library> libs;
    for (int i = 2; i < argc; i++) {
        void *handle = dlopen(argv[i], RTLD_NOW | RTLD_LOCAL);
        if (!handle) {
            fprintf(stderr, "latency: %s\n", dlerror());
            return 1;
        }
        typedef const struct sqz_gpu_calls *(*function)(void);
        libs.push_back({argv[i], ((function)dlsym(handle, SQZ_GPU_CALLS_NAME))(), {}, {}});
    }
    cudaDeviceProp card;
    CHECK(cudaGetDeviceProperties(&card, 0));
    FILE *out = fopen(argv[1], "w");
    fprintf(
        out,
        "{\n\"machine\": {\"gpu\": \"%s\", \"command\": \"bench/gpu/latency OUT.json LIBRARY.so ...\"},\n\"rows\": [",
        card.name);
    bench b;
    CHECK(cudaStreamCreateWithFlags(&b.theirs, cudaStreamNonBlocking));
    CHECK(cudaStreamCreateWithFlags(&b.ours, cudaStreamNonBlocking));
    CHECK(cudaEventCreateWithFlags(&b.event, cudaEventDisableTiming));
    b.queries_f16 = device<__half>(H * D), b.out_f16 = device<__half>(H * D);
    b.workspace_bytes = (size_t)256 << 20;
    b.workspace = device<char>(b.workspace_bytes);
    b.sink = device<float>(1);
    bool first_row = true, right = true;
    for (uint32_t n_rows : {32768u, 131072u}) {
        for (int i = 0; i < LAYERS; i++) {
            float gains[K];
            for (int h = 0; h < K; h++) gains[h] = (i + h) % 4 == 0 ? 0.2f : -100.0f; /* a quarter of the tails is on */
            b.layers.push_back(make_layer(n_rows, i + 1, gains));
            make_codes(b.layers.back(), i + 1);
        }
        CHECK(cudaDeviceSynchronize());
        const struct sqz_codes codes = b.layers[0].rows.codes;
        (void)codes;
        for (const work &w :
             {work{n_rows, false, false, 0.10f}, work{n_rows, false, true, 0.046f}, work{n_rows, true, true, 0.046f}}) {
            for (layer &l : b.layers) l.rows.codes.n_words = w.codes ? WORDS : 0;
            set_thresholds(libs[0], b, w);
            const double nothing = timed(b, captured(b, NULL, w, true));
            for (library &lib : libs) {
                const double alone = timed(b, captured(b, &lib, w, false));
                const double between = timed(b, captured(b, &lib, w, true)) - nothing;
                results(lib, b);
                const double off = difference(libs[0], lib);
                size_t groups = 0, other = 0;
                for (size_t i = 0; i < lib.retained.size(); i++) {
                    groups += lib.retained[i];
                    other += lib.retained[i] != libs[0].retained[i];
                }
                right = right && off < 4e-3;
                const double bytes =
                    (double)groups / LAYERS * 8 * 4 * D + (double)K * b.layers[0].m.n_clusters * (D + 12);
                const double limit = bytes / 4.2e6;
                printf("%7u rows, %-8s%-5s %4.1f%% read: alone %6.2f us, in a model %6.2f us (products %6.2f), bytes "
                       "%5.2f, "
                       "off %.1e, %zu counts differ  %s\n",
                       n_rows, w.codes ? "codes" : "clusters", w.tail ? ", tail" : "",
                       (double)groups / LAYERS * 8 * 100 / K / n_rows, alone, between, nothing, limit, off, other,
                       lib.name.c_str());
                fflush(stdout);
                fprintf(out,
                        "%s\n{\"library\": \"%s\", \"rows\": %u, \"selects\": \"%s\", \"tail\": %s, \"read\": %.4f, "
                        "\"us_alone\": %.2f, \"us_in_a_model\": %.2f, \"us_of_bytes_at_4.2_tb_s\": %.2f, "
                        "\"share_of_limit\": "
                        "%.3f, \"difference\": %.2e}",
                        first_row ? "" : ",", lib.name.c_str(), n_rows, w.codes ? "codes" : "clusters",
                        w.tail ? "true" : "false", (double)groups / LAYERS * 8 / K / n_rows, alone, between, limit,
                        limit / between, off);
                first_row = false;
            }
        }
        CHECK(cudaDeviceSynchronize());
        for (layer &l : b.layers)
            for (void *p : {(void *)l.m.keys, (void *)l.m.values, (void *)l.m.value_centroids, (void *)l.m.centroids,
                            (void *)l.m.words, (void *)l.weights})
                CHECK(cudaFree(p));
        b.layers.clear();
    }
    fprintf(out, "\n]\n}\n");
    fclose(out);
    return right ? 0 : 1;
}
