/* The two GPUs of ranks.cu: their mailboxes, NCCL where there is one, and the calls of attention on them. */
#ifndef SQZ_BENCH_GPU_RANKS_GPUS_CUH
#define SQZ_BENCH_GPU_RANKS_GPUS_CUH

#include <dlfcn.h>
#include <functional>
#include <nccl.h>
#include <thread>

#include "ranks_layers.cuh"

namespace
{

const uint64_t PATIENCE = 2000000000ull;

void good(enum sqz_status s, const char *what)
{
    if (s == SQZ_OK) return;
    fprintf(stderr, "ranks: %s: status %d\n", what, (int)s);
    exit(1);
}

struct nccl {
    decltype(&ncclCommInitAll) init;
    decltype(&ncclAllGather) all_gather;
    decltype(&ncclGetErrorString) error;
    decltype(&ncclGetVersion) version;
    ncclComm_t comm[RANKS];
    int number; /* its version's; 0: none */
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
    if (!n.init || !n.all_gather || !n.error || !n.version) return false;
    n.version(&n.number);
    const ncclResult_t r = n.init(n.comm, RANKS, devices);
    printf("NCCL %d: %s\n", n.number, n.error(r));
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

} // namespace

#endif
