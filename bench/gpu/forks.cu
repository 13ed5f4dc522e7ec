/*
 * What it costs to have a second GPU take part in a token's layers, without anything being computed (docs/gpu.md, "Two
 * GPUs"): a layer is a kernel of 20 or 80 us on the first GPU, the products, and a node at which the first waits for one word of the
 * second. Microseconds of a token, launch to end as the host sees it, for ways of starting the second's kernel:
 *
 *   alone    the first waits for nobody
 *   event    one graph of both GPUs: the second's stream follows the first's by an event a layer, and joins it at the end
 *   once     one graph of both: it follows by one event at the beginning, then waits for a word of the first's a layer
 *   apart    a graph each, launched one after the other; the same words
 *
 *   forks OUT.json
 *
 * Build: nvcc -O2 -std=c++17 -gencode arch=compute_90a,code=sm_90a bench/gpu/forks.cu -o forks
 */
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cuda_runtime.h>

#define CHECK(call)                                                                                                     \
    do {                                                                                                                \
        const cudaError_t error_ = (call);                                                                              \
        if (error_ != cudaSuccess) {                                                                                    \
            fprintf(stderr, "forks: %s: %s\n", #call, cudaGetErrorString(error_));                                      \
            exit(1);                                                                                                    \
        }                                                                                                               \
    } while (0)

namespace
{

enum way { ALONE, EVENT, ONCE, APART, WAYS };
const char *const names[WAYS] = {"alone", "event", "once", "apart"};
enum { TOKENS = 200, PATIENCE_NS = 2000000000 };

/* In each GPU's memory: calls that it has ended, and the word that the other stores. */
struct box {
    uint64_t calls, word, late;
};

__device__ uint64_t now()
{
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

__device__ void tell(box *to, uint64_t call)
{
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(&to->word), "l"(call) : "memory");
}

__device__ void wait_for(box *mine, uint64_t call)
{
    const uint64_t since = now();
    uint64_t word;
    do {
        asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(word) : "l"(&mine->word) : "memory");
        if (now() - since > PATIENCE_NS) {
            mine->late = call;
            return;
        }
    } while (word < call);
}

__global__ void products(uint32_t ns)
{
    const uint64_t since = now();
    while (now() - since < ns) {}
}

/* tells: the other is told that this one is here, before it is waited for. */
__global__ void node(box *mine, box *other, bool tells, bool waits)
{
    const uint64_t call = mine->calls + 1;
    if (tells) tell(other, call);
    if (waits) wait_for(mine, call);
    mine->calls = call;
}

/* The second's: waits for the first where it was not started by it, then answers. */
__global__ void node_beside(box *mine, box *other, bool waits)
{
    const uint64_t call = mine->calls + 1;
    if (waits) wait_for(mine, call);
    tell(other, call);
    mine->calls = call;
}

struct gpus {
    cudaStream_t stream[2];
    cudaEvent_t come, done;
    box *boxes[2];
    cudaGraphExec_t graph[2];
    uint32_t products_ns;
};

void on_first(gpus &g, enum way way)
{
    CHECK(cudaSetDevice(0));
    products<<<1, 32, 0, g.stream[0]>>>(g.products_ns);
    if (way == EVENT) {
        CHECK(cudaEventRecord(g.come, g.stream[0]));
        CHECK(cudaStreamWaitEvent(g.stream[1], g.come));
        CHECK(cudaSetDevice(1));
        node_beside<<<1, 1, 0, g.stream[1]>>>(g.boxes[1], g.boxes[0], false);
        CHECK(cudaSetDevice(0));
    }
    node<<<1, 1, 0, g.stream[0]>>>(g.boxes[0], g.boxes[1], way == ONCE || way == APART, way != ALONE);
}

void beside(gpus &g)
{
    CHECK(cudaSetDevice(1));
    node_beside<<<1, 1, 0, g.stream[1]>>>(g.boxes[1], g.boxes[0], true);
    CHECK(cudaSetDevice(0));
}

cudaGraphExec_t ended(cudaStream_t stream)
{
    cudaGraph_t graph;
    cudaGraphExec_t made;
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&made, graph, 0));
    CHECK(cudaGraphDestroy(graph));
    return made;
}

void capture(gpus &g, enum way way, int n_layers)
{
    const bool forks = way == EVENT || way == ONCE;
    CHECK(cudaSetDevice(0));
    CHECK(cudaStreamBeginCapture(g.stream[0], cudaStreamCaptureModeRelaxed));
    if (forks) {
        CHECK(cudaEventRecord(g.come, g.stream[0]));
        CHECK(cudaStreamWaitEvent(g.stream[1], g.come));
    }
    for (int l = 0; l < n_layers; l++) {
        if (way == ONCE) beside(g);
        on_first(g, way);
    }
    if (forks) {
        CHECK(cudaSetDevice(1));
        CHECK(cudaEventRecord(g.done, g.stream[1]));
        CHECK(cudaSetDevice(0));
        CHECK(cudaStreamWaitEvent(g.stream[0], g.done));
    }
    products<<<1, 32, 0, g.stream[0]>>>(g.products_ns);
    g.graph[0] = ended(g.stream[0]);
    g.graph[1] = NULL;
    if (way != APART) return;
    CHECK(cudaSetDevice(1));
    CHECK(cudaStreamBeginCapture(g.stream[1], cudaStreamCaptureModeRelaxed));
    for (int l = 0; l < n_layers; l++) beside(g);
    CHECK(cudaSetDevice(1));
    g.graph[1] = ended(g.stream[1]);
    CHECK(cudaSetDevice(0));
}

/* Median of a token's microseconds. */
double timed(gpus &g)
{
    std::vector<double> us;
    for (int t = 0; t < TOKENS; t++) {
        const auto since = std::chrono::steady_clock::now();
        CHECK(cudaGraphLaunch(g.graph[0], g.stream[0]));
        if (g.graph[1]) {
            CHECK(cudaSetDevice(1));
            CHECK(cudaGraphLaunch(g.graph[1], g.stream[1]));
            CHECK(cudaSetDevice(0));
        }
        CHECK(cudaStreamSynchronize(g.stream[0]));
        us.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - since).count());
        if (g.graph[1]) CHECK(cudaStreamSynchronize(g.stream[1]));
    }
    for (cudaGraphExec_t graph : g.graph)
        if (graph) CHECK(cudaGraphExecDestroy(graph));
    std::sort(us.begin(), us.end());
    return us[TOKENS / 2];
}

} // namespace

int main(int argc, char **argv)
{
    int n = 0;
    if (argc != 2) {
        fprintf(stderr, "usage: forks OUT.json\n");
        return 2;
    }
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);
    if (cudaGetDeviceCount(&n) != cudaSuccess || n < 2) {
        fprintf(stderr, "forks: %d devices are here, 2 are needed\n", n);
        return 1;
    }
    gpus g;
    for (int i = 1; i >= 0; i--) {
        CHECK(cudaSetDevice(i));
        CHECK(cudaDeviceEnablePeerAccess(1 - i, 0));
        CHECK(cudaStreamCreateWithFlags(&g.stream[i], cudaStreamNonBlocking));
        CHECK(cudaEventCreateWithFlags(i ? &g.done : &g.come, cudaEventDisableTiming));
        CHECK(cudaMalloc(&g.boxes[i], sizeof(box)));
        CHECK(cudaMemset(g.boxes[i], 0, sizeof(box)));
    }
    FILE *out = fopen(argv[1], "w");
    if (!out) {
        perror(argv[1]);
        return 1;
    }
    fprintf(out, "{\"what\": \"us of a token of so many layers, products and a node, and products once more, median of %d; bench/gpu/forks.cu\", "
                 "\"rows\": [",
            TOKENS);
    bool right = true;
    bool first = true;
    for (int w = 0; w < WAYS; w++)
        for (int i = 0; i < 6; i++) {
            const int n_layers = i % 3 == 0 ? 2 : i % 3 == 1 ? 8 : 32;
            g.products_ns = i < 3 ? 20000 : 80000;
            for (box *b : g.boxes) CHECK(cudaMemset(b, 0, sizeof *b));
            CHECK(cudaDeviceSynchronize());
            capture(g, (enum way)w, n_layers);
            const double us = timed(g);
            for (box *b : g.boxes) {
                box now;
                CHECK(cudaMemcpy(&now, b, sizeof now, cudaMemcpyDefault));
                if (now.late) right = false, fprintf(stderr, "forks: %s: waited in vain\n", names[w]);
            }
            printf("%-6s %2d layers, products of %u us: %8.1f us\n", names[w], n_layers, g.products_ns / 1000, us);
            fprintf(out, "%s\n{\"way\": \"%s\", \"layers\": %d, \"us_products\": %u, \"us\": %.1f}", first ? "" : ",",
                    names[w], n_layers, g.products_ns / 1000, us);
            first = false;
        }
    fprintf(out, "\n]}\n");
    return fclose(out) || !right ? 1 : 0;
}
