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
 * Build: nvcc -O2 -std=c++17 -gencode arch=compute_90a,code=sm_90a -Iinclude -Ilib/cuda -Ilib bench/gpu/ranks.cu with
 * the objects of lib/cuda/ -o ranks -ldl
 */
#include <algorithm>
#include <atomic>

#include "ranks.h"
#include "ranks_checks.cuh"

namespace
{

enum { BATCHES = 9, REPLAYS = 10, ALONE = 64 };

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

/* ---- Rows of OUT.json ----------------------------------------------------------------------------- */

struct measured {
    uint32_t n_rows, keys_a_cluster, n_layers;
    double budget, us_one, us_half, read[RANKS];
};

void write_row(FILE *out, const struct measured &m, uint32_t ranks, const char *kind, double us, double bytes)
{
    static bool first = true;
    printf("%8u rows, %2u a cluster, budget %-5.3g %u %-4s %8.2f us a layer, %.2fx of one, half alone %.2f, "
           "over it %.2f; read %.4f %.4f\n",
           m.n_rows, m.keys_a_cluster, m.budget, ranks, kind, us, m.us_one / us, m.us_half,
           ranks > 1 ? us - m.us_half : 0.0, m.read[0], m.read[1]);
    fflush(stdout);
    fprintf(out,
            "%s\n{\"ranks\": %u, \"kind\": \"%s\", \"context_tokens\": %u, \"keys_a_cluster\": %u, \"budget\": %g, "
            "\"layers\": %u, \"ms\": %.5f, \"vs_one\": %.3f, \"bytes_a_token_layer\": %.0f, \"kl_mean\": null, "
            "\"predicted_ms\": null, \"ms_half_alone\": %.5f, \"read\": [%.4f, %.4f]}",
            first ? "" : ",", ranks, kind, m.n_rows, m.keys_a_cluster, m.budget, m.n_layers, us / 1e3, m.us_one / us,
            bytes, m.us_half / 1e3, m.read[0], m.read[1]);
    first = false;
}

/* The share of its rows that a GPU has read in the call before. */
double share_read(const gpu &g)
{
    double groups = 0, rows = 0;
    for (const layer &l : g.layers) {
        uint32_t n[K];
        CHECK(cudaMemcpy(n, l.retained, sizeof n, cudaMemcpyDefault));
        for (uint32_t x : n) groups += x;
        rows += (double)K * l.m.n_rows;
    }
    return groups * 8 / rows;
}

/* Both ranks with the thresholds of one GPU, and each alone with its own. */
void set_thresholds(std::vector<layer> &one, const work &w, double budget)
{
    for (size_t i = 0; i < one.size(); i++) {
        CHECK(cudaSetDevice(0));
        set_threshold(gpus[0], one[i], w, ONE, budget);
        for (gpu &g : gpus) {
            CHECK(cudaSetDevice(g.number));
            CHECK(cudaMemcpy(g.layers[i].log_threshold, one[i].log_threshold, K * 4, cudaMemcpyDefault));
            set_threshold(g, g.layers[i], w, ALONE_HALF, budget);
        }
    }
}

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
        struct measured m = {n_rows, keys_a_cluster, n_layers, budget, 0, 0, {1, 1}};
        if (!w.dense) set_thresholds(one, w, budget);
        m.us_one = timed_one(one, w);
        m.us_half = timed_layers(w, ALONE_HALF);
        for (enum way way : {PEERS, NCCL}) {
            if (way == NCCL && !the_nccl.there) continue;
            const double us = timed_layers(w, way);
            for (gpu &g : gpus)
                if (!w.dense) m.read[g.number] = share_read(g);
            if (way == PEERS) write_row(out, m, 1, way_names[ONE], m.us_one, 0);
            write_row(out, m, RANKS, way_names[way], us, bytes_sent(w.dense, way));
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
    /* To load a kernel is to wait for those that run, and those may wait for us. */
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);
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
            "{\n\"right\": %s,\n\"machine\": {\"gpu\": \"%s\", \"n_gpus\": %d, \"cuda\": \"%d.%d\", \"nccl\": %d, "
            "\"version\": \"%d.%d.%d\", \"command\": \"bench/gpu/ranks OUT.json LIBNCCL.so.2\",\n"
            "\"what\": \"one token's attention in one layer of F16 rows, heads %d:%d of %d\"},\n\"exchange\": [",
            all_right ? "true" : "false", card.name, RANKS, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10,
            the_nccl.number, SQZ_VERSION_MAJOR, SQZ_VERSION_MINOR, SQZ_VERSION_PATCH, H, K, D);
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
