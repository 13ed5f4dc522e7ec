/*
 * One token's attention over the rows of two GPUs of a host (docs/gpu.md, "Two GPUs"): each has half of every layer's
 * rows with its own clusters, beside one GPU with the clusters of both.
 *
 *   ranks OUT.json [LIBNCCL.so.2 [anyway]]
 *
 * First everything is checked: selections and results against the one GPU's, dense ones against sums in double, both
 * ways over, and a rank that does not answer. Then it is timed: layers of distinct memory in one CUDA graph a GPU, both
 * started by a thread each; what counts is the slower GPU. "Half" is a GPU's half alone, with thresholds at which it
 * reads its share without the other. anyway: what is wrong is timed too, and OUT.json says so.
 *
 * Build: nvcc -O2 -std=c++17 -gencode arch=compute_90a,code=sm_90a -Iinclude -Ilib/cuda -Ilib bench/gpu/ranks.cu with the
 * objects of lib/cuda/ -o ranks -ldl
 */
#include <algorithm>
#include <atomic>
#include <chrono>
#include <dlfcn.h>
#include <functional>
#include <math.h>
#include <nccl.h>
#include <string.h>
#include <thread>
#include <vector>

#include "made.cuh"
#include "ranks.h"

namespace
{

enum { H = 32, K = 8, G = H / K, D = 128, FIXED = 80, OWN = 200, RANKS = 2, BATCHES = 9, REPLAYS = 10, ALONE = 64 };
enum { WORDS = 2, DIRECTIONS = 48 };
const uint64_t PATIENCE = 2000000000ull;

void good(enum sqz_status s, const char *what)
{
    if (s == SQZ_OK) return;
    fprintf(stderr, "ranks: %s: status %d\n", what, (int)s);
    exit(1);
}

/* ---- Made layers -------------------------------------------------------------------------- */

__device__ float centre(uint64_t seed, uint32_t head, uint32_t cluster, uint32_t d)
{
    return 0.8f * normal(seed + 1, ((uint64_t)head * 65536 + cluster / 5) * D + d) +
           0.6f * normal(seed + 2, ((uint64_t)head * 65536 + cluster) * D + d);
}

/* Fixed rows and half the clusters end at row n_rows / 2 in every head. */
struct made {
    uint64_t seed;
    uint32_t n_rows, n_clusters;
    __half *keys, *values, *value_centroids;
    int8_t *centroids;
    float *scale, *mean, *variance;
    uint32_t *offset, *words;
};

__device__ uint32_t cluster_start(const made &m, uint32_t head, uint32_t c)
{
    const uint32_t half = m.n_clusters / 2, middle = m.n_rows / 2 - FIXED;
    const uint32_t base = c < half ? 0 : middle, n = c < half ? middle : m.n_rows / 2;
    const uint32_t of = c < half ? half : m.n_clusters - half, i = c < half ? c : c - half;
    if (i == 0) return base;
    if (i == of) return base + n;
    const float moved = ((mixed(m.seed + head * 65536ull + c) & 1023) / 1023.0f - 0.5f) * 0.9f * ((float)n / of - 1);
    return base + (uint32_t)((double)i * n / of + moved);
}

/* A block a cluster of a head; the first also makes the fixed rows. */
__global__ void make_kernel(made m)
{
    const uint32_t head = blockIdx.y, c = blockIdx.x, d = threadIdx.x;
    __shared__ float largest[D];
    const uint32_t begin = cluster_start(m, head, c), end = cluster_start(m, head, c + 1);
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
        memset(&rows, 0, sizeof rows);
        n_own = own;
        rows.space = SQZ_SPACE_CUDA;
        rows.shape = {H, K, D, 1.0f / sqrtf((float)D)};
        rows.n_rows = m.n_rows, rows.n_fixed = n_fixed;
        rows.keys = {SQZ_ROW_F16, m.keys, NULL, NULL}, rows.values = {SQZ_ROW_F16, m.values, NULL, NULL};
        rows.n_levels = 1;
        rows.level[0] = {m.n_clusters,
                         {SQZ_ROW_I8, m.centroids, m.scale, m.mean},
                         {SQZ_ROW_F16, m.value_centroids, NULL, NULL},
                         m.offset,
                         m.variance};
        rows.group = group_max ? SQZ_GROUP_MAX : SQZ_GROUP_MEAN;
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
    make_kernel<<<dim3(l.m.n_clusters, K), D>>>(l.m);
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

/* ---- The GPUs --------------------------------------------------------------------------------- */

struct nccl {
    decltype(&ncclCommInitAll) init;
    decltype(&ncclAllGather) all_gather;
    decltype(&ncclGetErrorString) error;
    decltype(&ncclGetVersion) version;
    ncclComm_t comm[RANKS];
    bool there;
};
nccl the_nccl;

enum sqz_status gather_by_nccl(void *with, const void *mine, void *all, size_t bytes, void *stream)
{
    const ncclResult_t r = the_nccl.all_gather(mine, all, bytes, ncclInt8, (ncclComm_t)with, (cudaStream_t)stream);
    if (r != ncclSuccess) fprintf(stderr, "ranks: ncclAllGather: %s\n", the_nccl.error(r));
    return r == ncclSuccess ? SQZ_OK : SQZ_ERROR_INTERNAL;
}

bool open_nccl(const char *path)
{
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        printf("no NCCL: %s\n", dlerror());
        return false;
    }
    nccl &n = the_nccl;
    n.init = (decltype(n.init))dlsym(handle, "ncclCommInitAll");
    n.all_gather = (decltype(n.all_gather))dlsym(handle, "ncclAllGather");
    n.error = (decltype(n.error))dlsym(handle, "ncclGetErrorString");
    n.version = (decltype(n.version))dlsym(handle, "ncclGetVersion");
    const int devices[RANKS] = {0, 1};
    int version = 0;
    if (!n.init || !n.all_gather || !n.error || !n.version) return false;
    n.version(&version);
    const ncclResult_t r = n.init(n.comm, RANKS, devices);
    printf("NCCL %d: %s\n", version, n.error(r));
    n.there = r == ncclSuccess;
    return n.there;
}

enum way { ALONE_HALF, PEERS, NCCL, ONE };
const char *const way_names[] = {"half", "peer", "nccl", "one"};

struct gpu {
    int number;
    cudaStream_t stream;
    char *workspace;
    size_t workspace_bytes;
    struct sqz_cuda_ranks peers, gathering;
    std::vector<layer> layers;
    cudaGraphExec_t graph;
    double us;
};
gpu gpus[RANKS];

void on_both(const std::function<void(gpu &)> &f)
{
    std::vector<std::thread> threads;
    for (gpu &g : gpus)
        threads.emplace_back([&g, &f] {
            CHECK(cudaSetDevice(g.number));
            f(g);
        });
    for (std::thread &t : threads) t.join();
}

void set_up(uint32_t n_rows_of_queries)
{
    char why[256];
    const int devices[RANKS] = {0, 1}, wrong[RANKS] = {0, 63};
    if (sqz_cuda_ranks_connect(wrong, RANKS, why, sizeof why) != SQZ_ERROR_UNSUPPORTED) {
        fprintf(stderr, "ranks: device 63 was connected\n");
        exit(1);
    }
    printf("refused as it should be: %s\n", why);
    if (sqz_cuda_ranks_connect(devices, RANKS, why, sizeof why) != SQZ_OK) {
        fprintf(stderr, "ranks: %s\n", why);
        exit(1);
    }
    for (int i = 0; i < RANKS; i++) {
        gpu &g = gpus[i];
        CHECK(cudaSetDevice(i));
        g.number = i;
        CHECK(cudaStreamCreateWithFlags(&g.stream, cudaStreamNonBlocking));
        g.workspace_bytes = (size_t)768 << 20;
        g.workspace = device<char>(g.workspace_bytes);
        const size_t bytes = sqz_cuda_mailbox_bytes(RANKS, n_rows_of_queries);
        char *mailbox = device<char>(bytes);
        CHECK(cudaMemset(mailbox, 0, bytes));
        for (gpu &of : gpus) of.peers.mailbox[i] = mailbox;
        CHECK(cudaDeviceSynchronize());
    }
    for (uint32_t i = 0; i < RANKS; i++) {
        gpu &g = gpus[i];
        g.peers.rank = i, g.peers.n_ranks = RANKS, g.peers.n_rows = n_rows_of_queries, g.peers.patience_ns = PATIENCE;
        g.gathering = g.peers;
        g.gathering.gather = gather_by_nccl;
        g.gathering.gather_with = the_nccl.comm[i];
    }
}

struct work {
    bool dense, codes, tail;
};

struct sqz_cuda_attend_args args_of(const gpu &g, const layer &l, const work &w, enum way way)
{
    struct sqz_cuda_attend_args a;
    memset(&a, 0, sizeof a);
    a.layer = &l.rows;
    a.dense = w.dense;
    a.plan.log_threshold = way == ALONE_HALF ? l.alone_threshold : l.log_threshold;
    a.plan.variance_gain = l.variance_gain;
    a.plan.tail_gain = w.tail ? l.tail_gain : NULL;
    a.plan.tail_skip = 0.5f;
    a.n_sequences = a.n_tokens = 1;
    a.queries = l.queries;
    a.out = l.out;
    a.user_keys = l.own_keys, a.user_values = l.own_values;
    a.user_capacity_rows = OWN;
    a.n_user = l.n_own;
    a.n_retained = l.retained;
    a.workspace = g.workspace;
    a.workspace_bytes = g.workspace_bytes;
    a.ranks = way == PEERS ? &g.peers : way == NCCL ? &g.gathering : NULL;
    return a;
}

void attend(gpu &g, const layer &l, const work &w, enum way way)
{
    const struct sqz_cuda_attend_args a = args_of(g, l, w, way);
    good(sqz_cuda_attend(&a, g.stream), way_names[way]);
}

/* Every head's threshold, so that the wanted share of its rows is read; one GPU, on which the layer is. */
void set_threshold(gpu &g, layer &l, work w, enum way way, double share)
{
    const float wanted = (float)(share * l.m.n_rows / 8.0);
    std::vector<float> low(K, -30.0f), high(K, 0.0f), middle(K);
    std::vector<uint32_t> n(K);
    w.tail = false;
    const struct sqz_cuda_attend_args a = args_of(g, l, w, way);
    for (int i = 0; i < 20; i++) {
        struct sqz_cuda_selection selection;
        for (int h = 0; h < K; h++) middle[h] = (low[h] + high[h]) / 2;
        CHECK(cudaMemcpyAsync((void *)a.plan.log_threshold, middle.data(), K * 4, cudaMemcpyHostToDevice, g.stream));
        good(sqz_cuda_select(&a, &selection, g.stream), "select");
        CHECK(cudaMemcpyAsync(n.data(), selection.n_groups, K * 4, cudaMemcpyDeviceToHost, g.stream));
        CHECK(cudaStreamSynchronize(g.stream));
        for (int h = 0; h < K; h++) ((float)n[h] > wanted ? low : high)[h] = middle[h];
    }
}

/* ---- Checks ------------------------------------------------------------------------------------- */

bool all_right = true;

void result(bool right, const char *what, const char *numbers)
{
    printf("%s %s: %s\n", right ? "right" : "WRONG", what, numbers);
    fflush(stdout);
    all_right = all_right && right;
}

/* Which groups a head reads, from this row's group on. */
void selected(gpu &g, const layer &l, const work &w, enum way way, uint32_t from, std::vector<std::vector<char>> &marks)
{
    struct sqz_cuda_selection s;
    const struct sqz_cuda_attend_args a = args_of(g, l, w, way);
    good(sqz_cuda_select(&a, &s, g.stream), "select");
    std::vector<uint32_t> n(K), list;
    CHECK(cudaMemcpyAsync(n.data(), s.n_groups, K * 4, cudaMemcpyDeviceToHost, g.stream));
    CHECK(cudaStreamSynchronize(g.stream));
    for (int h = 0; h < K; h++) {
        list.resize(n[h]);
        CHECK(cudaMemcpy(list.data(), s.groups + (size_t)h * s.capacity, n[h] * 4, cudaMemcpyDeviceToHost));
        for (uint32_t group : list) marks[h][from / 8 + group]++;
    }
}

std::vector<float> output(const layer &l)
{
    std::vector<__half> half(H * D);
    std::vector<float> out;
    CHECK(cudaMemcpy(half.data(), l.out, H * D * 2, cudaMemcpyDefault));
    for (__half x : half) out.push_back(__half2float(x));
    return out;
}

/* Largest difference over the largest number of the first; NaN where one is. */
double difference(const std::vector<float> &a, const std::vector<float> &b)
{
    double largest = 0, worst = 0;
    for (size_t i = 0; i < a.size(); i++) {
        largest = std::max(largest, (double)fabsf(a[i]));
        const double d = fabs((double)a[i] - b[i]);
        if (!(d <= worst)) worst = d;
        if (worst != worst) break;
    }
    return worst / largest;
}

/* All rows of a layer and the user's, in double. */
std::vector<float> reference(const layer &l)
{
    auto halves = [](const __half *p, size_t n) {
        std::vector<__half> x(n);
        CHECK(cudaMemcpy(x.data(), p, n * 2, cudaMemcpyDefault));
        return x;
    };
    const size_t n = l.m.n_rows;
    const auto keys = halves(l.m.keys, K * n * D), values = halves(l.m.values, K * n * D), q = halves(l.queries, H * D),
               own_keys = halves(l.own_keys, K * OWN * D), own_values = halves(l.own_values, K * OWN * D);
    std::vector<float> out(H * D);
    std::vector<std::thread> threads;
    for (int h = 0; h < H; h++)
        threads.emplace_back([&, h] {
            std::vector<double> sum(D, 0.0), logit;
            double largest = -INFINITY, total = 0;
            auto row = [&](const std::vector<__half> &of, const std::vector<__half> &own, size_t i) {
                return i < n ? &of[(h / G * n + i) * D] : &own[((size_t)(h / G) * OWN + i - n) * D];
            };
            for (size_t i = 0; i < n + OWN; i++) {
                double x = 0;
                for (int d = 0; d < D; d++)
                    x += (double)__half2float(q[h * D + d]) * __half2float(row(keys, own_keys, i)[d]);
                logit.push_back(x * l.rows.shape.scale);
                largest = std::max(largest, logit.back());
            }
            for (size_t i = 0; i < n + OWN; i++) {
                const double w = exp(logit[i] - largest);
                total += w;
                for (int d = 0; d < D; d++) sum[d] += w * __half2float(row(values, own_values, i)[d]);
            }
            for (int d = 0; d < D; d++) out[h * D + d] = (float)(sum[d] / total);
        });
    for (std::thread &t : threads) t.join();
    return out;
}

void check_way(layer &all, layer (&half)[RANKS], const work &w, enum way way, const char *name)
{
    char what[160], numbers[200];
    gpu &g = gpus[0];
    CHECK(cudaSetDevice(0));
    attend(g, all, w, ONE);
    CHECK(cudaStreamSynchronize(g.stream));
    const std::vector<float> want = output(all);
    size_t differ = 0, groups = 0, of_each[RANKS] = {0, 0};
    if (!w.dense) {
        std::vector<std::vector<char>> one(K, std::vector<char>(all.m.n_rows / 8 + 1)), parts[RANKS] = {one, one};
        selected(g, all, w, ONE, 0, one);
        on_both(
            [&](gpu &of) { selected(of, half[of.number], w, way, of.number * all.m.n_rows / 2, parts[of.number]); });
        for (int h = 0; h < K; h++)
            for (size_t i = 0; i < one[h].size(); i++) {
                groups += one[h][i];
                of_each[0] += parts[0][h][i], of_each[1] += parts[1][h][i];
                differ += one[h][i] != parts[0][h][i] + parts[1][h][i];
            }
    }
    double off[RANKS] = {0, 0}, again = 0;
    std::vector<float> first;
    for (int turn = 0; turn < 5; turn++) {
        on_both([&](gpu &of) {
            layer &l = half[of.number];
            CHECK(cudaMemsetAsync(l.out, 0xff, H * D * 2, of.stream));
            attend(of, l, w, way);
            CHECK(cudaStreamSynchronize(of.stream));
        });
        std::vector<float> got[RANKS] = {output(half[0]), output(half[1])};
        if (turn == 0) first = got[0];
        for (int i = 0; i < RANKS; i++) off[i] = std::max(off[i], difference(want, got[i]));
        again += memcmp(first.data(), got[0].data(), H * D * 4) || memcmp(first.data(), got[1].data(), H * D * 4);
    }
    snprintf(what, sizeof what, "%s, %s, %u rows, %u clusters", name, way_names[way], all.m.n_rows, all.m.n_clusters);
    snprintf(numbers, sizeof numbers,
             "off %.1e and %.1e of one GPU's, %zu of %zu groups differ (%zu + %zu), %g of 5 not alike", off[0], off[1],
             differ, groups, of_each[0], of_each[1], again);
    result(off[0] < 2e-3 && off[1] < 2e-3 && again == 0 && differ <= 4 + groups / 5000, what, numbers);
}

void check_dense(layer &all, layer (&half)[RANKS])
{
    const std::vector<float> want = reference(all);
    const std::vector<float> got[RANKS] = {output(half[0]), output(half[1])};
    char numbers[100];
    snprintf(numbers, sizeof numbers, "off %.1e and %.1e", difference(want, got[0]), difference(want, got[1]));
    result(difference(want, got[0]) < 2e-3 && difference(want, got[1]) < 2e-3, "dense, against sums in double",
           numbers);
}

/* A rank alone gives up in time, says so, and has no result; cleared, all goes on. */
void check_silence(layer &all, layer (&half)[RANKS])
{
    typedef std::chrono::steady_clock clock;
    const work w = {false, false, false};
    gpu &g = gpus[0];
    CHECK(cudaSetDevice(0));
    struct sqz_cuda_mailbox header;
    g.peers.patience_ns = 5000000;
    const clock::time_point begin = clock::now();
    for (int i = 0; i < 32; i++) attend(g, half[0], w, PEERS);
    CHECK(cudaStreamSynchronize(g.stream));
    const double ms = std::chrono::duration<double, std::milli>(clock::now() - begin).count();
    g.peers.patience_ns = PATIENCE;
    CHECK(cudaMemcpy(&header, g.peers.mailbox[0], sizeof header, cudaMemcpyDefault));
    const std::vector<float> out = output(half[0]);
    size_t numbers = 0;
    for (float x : out) numbers += x == x;
    char text[120];
    snprintf(text, sizeof text, "32 layers in %.1f ms, failed %u, %zu numbers in %zu", ms, header.failed, numbers,
             out.size());
    result(header.failed == 2 && numbers == 0 && ms < 1000, "a rank that does not answer, 5 ms of patience", text);
    for (void *mailbox : {g.peers.mailbox[0], g.peers.mailbox[1]})
        CHECK(cudaMemset(mailbox, 0, sqz_cuda_mailbox_bytes(RANKS, g.peers.n_rows)));
    for (gpu &of : gpus) {
        CHECK(cudaSetDevice(of.number));
        CHECK(cudaDeviceSynchronize());
    }
    check_way(all, half, w, PEERS, "after that");
}

void check_all(uint32_t n_rows, uint32_t keys_a_cluster, bool codes)
{
    gpu &g = gpus[0];
    CHECK(cudaSetDevice(0));
    layer all = make_layer(n_rows, keys_a_cluster, 1), half[RANKS];
    set_threshold(g, all, {false, false, false}, ONE, 0.05);
    for (uint32_t i = 0; i < RANKS; i++) {
        CHECK(cudaSetDevice(i));
        half[i] = half_of(all, i);
    }
    for (enum way way : {PEERS, NCCL}) {
        if (way == NCCL && !the_nccl.there) continue;
        check_way(all, half, {true, false, false}, way, "dense");
        if (way == PEERS && n_rows <= 32768) check_dense(all, half);
        check_way(all, half, {false, false, false}, way, "clusters");
        check_way(all, half, {false, false, true}, way, "clusters and tail");
    }
    check_silence(all, half);
    if (codes) {
        CHECK(cudaSetDevice(0));
        make_codes(all, 1);
        set_threshold(g, all, {false, true, false}, ONE, 0.05);
        for (uint32_t i = 0; i < RANKS; i++) {
            CHECK(cudaSetDevice(i));
            make_codes(half[i], 1);
            CHECK(cudaMemcpy(half[i].log_threshold, all.log_threshold, K * 4, cudaMemcpyDefault));
        }
        check_way(all, half, {false, true, false}, PEERS, "codes");
        check_way(all, half, {false, true, true}, PEERS, "codes and tail");
    }
    all.release();
    for (layer &l : half) l.release();
}

/* ---- Times ---------------------------------------------------------------------------------------- */

std::atomic<int> waiting;

/* Microseconds of one replay, median of batches, of the GPUs' slower one; every GPU has its graph. */
double timed(uint32_t n_gpus)
{
    std::vector<double> us[RANKS];
    waiting = 0;
    auto run = [&](gpu &g) {
        cudaEvent_t begin, end;
        if ((uint32_t)g.number >= n_gpus) return;
        CHECK(cudaEventCreate(&begin));
        CHECK(cudaEventCreate(&end));
        for (int batch = -1; batch < BATCHES; batch++) {
            waiting++;
            while (waiting < (int)n_gpus * (batch + 2)) std::this_thread::yield();
            CHECK(cudaEventRecord(begin, g.stream));
            for (int i = 0; i < REPLAYS; i++) CHECK(cudaGraphLaunch(g.graph, g.stream));
            CHECK(cudaEventRecord(end, g.stream));
            CHECK(cudaEventSynchronize(end));
            float ms;
            CHECK(cudaEventElapsedTime(&ms, begin, end));
            if (batch >= 0) us[g.number].push_back(ms * 1e3 / REPLAYS);
        }
        CHECK(cudaEventDestroy(begin));
        CHECK(cudaEventDestroy(end));
        CHECK(cudaGraphExecDestroy(g.graph));
    };
    on_both(run);
    double slower = 0;
    for (uint32_t i = 0; i < n_gpus; i++) {
        std::sort(us[i].begin(), us[i].end());
        slower = std::max(slower, us[i][BATCHES / 2]);
    }
    return slower;
}

/* What f launches on the GPU's stream, as its graph. */
void capture(gpu &g, const std::function<void(gpu &)> &f)
{
    cudaGraph_t graph;
    CHECK(cudaStreamBeginCapture(g.stream, cudaStreamCaptureModeThreadLocal));
    f(g);
    CHECK(cudaStreamEndCapture(g.stream, &graph));
    CHECK(cudaGraphInstantiate(&g.graph, graph, 0));
    CHECK(cudaGraphDestroy(graph));
}

double timed_layers(const work &w, enum way way)
{
    on_both([&](gpu &g) {
        for (layer &l : g.layers) attend(g, l, w, way); /* once outside of a graph */
        CHECK(cudaStreamSynchronize(g.stream));
        capture(g, [&](gpu &of) {
            for (layer &l : of.layers) attend(of, l, w, way);
        });
    });
    return timed(RANKS) / gpus[0].layers.size();
}

double timed_one(std::vector<layer> &layers, const work &w)
{
    gpu &g = gpus[0];
    CHECK(cudaSetDevice(0));
    for (layer &l : layers) attend(g, l, w, ONE);
    CHECK(cudaStreamSynchronize(g.stream));
    capture(g, [&](gpu &of) {
        for (layer &l : layers) attend(of, l, w, ONE);
    });
    return timed(1) / layers.size();
}

/* The exchanges alone, of one layer: results, or totals and results. */
double timed_exchange(enum way way, bool totals)
{
    on_both([&](gpu &g) {
        float *mine = (float *)g.workspace, *all = mine + H * (D + 1), *out = all + RANKS * H * (D + 1);
        struct sqz_cuda_part *parts = (struct sqz_cuda_part *)(g.workspace + (1 << 20));
        CHECK(cudaMemset(g.workspace, 0, 2 << 20));
        const struct sqz_cuda_ranks *ranks = way == PEERS ? &g.peers : &g.gathering;
        struct sqz_cuda_rank_totals t = {ranks, K, G, parts, NULL, 16, 0, parts + 4096, parts + 8192, parts + 16384};
        struct sqz_cuda_rank_merge m = {ranks, H, D, mine, all, SQZ_ROW_F16, NULL, out, NULL};
        auto launch = [&](gpu &of, int n) {
            for (int i = 0; i < n; i++) {
                if (totals) good(sqz_cuda_rank_totals_launch(&t, of.stream), "totals");
                good(sqz_cuda_rank_merge_launch(&m, of.stream), "merge");
            }
        };
        CHECK(cudaDeviceSynchronize());
        launch(g, 2);
        CHECK(cudaStreamSynchronize(g.stream));
        capture(g, [&](gpu &of) { launch(of, ALONE); });
    });
    return timed(RANKS) / ALONE;
}

/* Bytes that a rank sends for a token and layer. */
double bytes_sent(bool dense, enum way way)
{
    const double words = H * (D + 1) + (dense ? 0 : 2 * H);
    return (RANKS - 1) * words * (way == PEERS ? 8 : 4);
}

bool first_row = true;

void time_layers(FILE *out, uint32_t n_rows, uint32_t keys_a_cluster, uint32_t n_layers,
                 const std::vector<double> &budgets)
{
    std::vector<layer> one;
    for (uint32_t i = 0; i < n_layers; i++) {
        CHECK(cudaSetDevice(0));
        one.push_back(make_layer(n_rows, keys_a_cluster, i + 1));
        for (gpu &g : gpus) {
            CHECK(cudaSetDevice(g.number));
            g.layers.push_back(half_of(one.back(), g.number));
        }
    }
    for (double budget : budgets) {
        const work w = {budget >= 1, false, budget < 1};
        double read[RANKS] = {1, 1};
        for (uint32_t i = 0; i < n_layers && !w.dense; i++) {
            CHECK(cudaSetDevice(0));
            set_threshold(gpus[0], one[i], w, ONE, budget);
            for (gpu &g : gpus) {
                CHECK(cudaSetDevice(g.number));
                CHECK(cudaMemcpy(g.layers[i].log_threshold, one[i].log_threshold, K * 4, cudaMemcpyDefault));
                set_threshold(g, g.layers[i], w, ALONE_HALF, budget);
            }
        }
        const double alone = timed_one(one, w), half = timed_layers(w, ALONE_HALF);
        auto row = [&](uint32_t ranks, const char *kind, double us, double bytes) {
            printf("%8u rows, %2u a cluster, budget %-5.3g %u %-4s %8.2f us a layer, %.2fx of one, half alone %.2f, "
                   "over it %.2f; "
                   "read %.4f %.4f\n",
                   n_rows, keys_a_cluster, budget, ranks, kind, us, alone / us, half, ranks > 1 ? us - half : 0.0,
                   read[0], read[1]);
            fflush(stdout);
            fprintf(
                out,
                "%s\n{\"ranks\": %u, \"kind\": \"%s\", \"context_tokens\": %u, \"keys_a_cluster\": %u, \"budget\": %g, "
                "\"layers\": %u, \"ms\": %.5f, \"vs_one\": %.3f, \"bytes_a_token_layer\": %.0f, \"ms_half_alone\": "
                "%.5f, "
                "\"read\": [%.4f, %.4f]}",
                first_row ? "" : ",", ranks, kind, n_rows, keys_a_cluster, budget, n_layers, us / 1e3, alone / us,
                bytes, half / 1e3, read[0], read[1]);
            first_row = false;
        };
        for (enum way way : {PEERS, NCCL}) {
            if (way == NCCL && !the_nccl.there) continue;
            const double us = timed_layers(w, way);
            for (gpu &g : gpus) {
                double groups = 0;
                for (layer &l : g.layers) {
                    uint32_t n[K];
                    CHECK(cudaMemcpy(n, l.retained, sizeof n, cudaMemcpyDefault));
                    for (uint32_t x : n) groups += x;
                }
                if (!w.dense) read[g.number] = groups * 8 / K / n_layers / (n_rows / 2);
            }
            if (way == PEERS) row(1, way_names[ONE], alone, 0);
            row(RANKS, way_names[way], us, bytes_sent(w.dense, way));
        }
    }
    CHECK(cudaSetDevice(0));
    for (layer &l : one) l.release();
    for (gpu &g : gpus) {
        CHECK(cudaSetDevice(g.number));
        for (layer &l : g.layers) l.release();
        g.layers.clear();
    }
}

} // namespace

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: ranks OUT.json [LIBNCCL.so.2 [anyway]]\n");
        return 2;
    }
    setenv("CUDA_MODULE_LOADING", "EAGER",
           1); /* to load a kernel is to wait for those that run, and those may wait for us */
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n < RANKS) {
        fprintf(stderr, "ranks: %d devices are here, %d are needed\n", n, RANKS);
        return 1;
    }
    if (argc > 2) open_nccl(argv[2]);
    set_up(H);
    check_all(32768, 20, true);
    check_all(131072, 3, false); /* too many clusters for one launch */
    if (!all_right && argc < 4) return 1;
    cudaDeviceProp card;
    CHECK(cudaGetDeviceProperties(&card, 0));
    FILE *out = fopen(argv[1], "w");
    if (!out) {
        perror(argv[1]);
        return 1;
    }
    fprintf(out,
            "{\n\"right\": %s,\n\"machine\": {\"gpu\": \"%s\", \"n_gpus\": %d, \"heads\": %d, \"heads_kv\": %d, "
            "\"head_dim\": %d, "
            "\"command\": \"bench/gpu/ranks OUT.json LIBNCCL.so.2\"},\n\"exchange\": [",
            all_right ? "true" : "false", card.name, RANKS, H, K, D);
    bool first = true;
    for (enum way way : {PEERS, NCCL}) {
        if (way == NCCL && !the_nccl.there) continue;
        const double merge = timed_exchange(way, false), both = timed_exchange(way, true);
        printf("exchanges alone, %s: merge %.2f us, totals and merge %.2f us\n", way_names[way], merge, both);
        fprintf(out, "%s\n{\"kind\": \"%s\", \"us_merge\": %.2f, \"us_totals_and_merge\": %.2f}", first ? "" : ",",
                way_names[way], merge, both);
        first = false;
    }
    fprintf(out, "\n],\n\"rows\": [");
    time_layers(out, 131072, 20, 16, {0.05, 0.125, 1});
    time_layers(out, 1048576, 20, 4, {0.05, 0.125, 1});
    time_layers(out, 1048576, 32, 4, {0.05});
    fprintf(out, "\n]\n}\n");
    return fclose(out) || !all_right ? 1 : 0;
}
