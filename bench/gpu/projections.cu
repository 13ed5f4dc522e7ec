/*
 * Products of few tokens (lib/cuda/projections.cu) in the order of a layer: queries, keys and values; output; the two
 * halves of the gated layer; down.
 *
 *   nvcc -O2 -std=c++17 -arch=native -Iinclude -Ilib bench/gpu/projections.cu -o projections libsqueeze_cuda.so \
 *       -Xlinker -rpath=.
 *   ./projections [TYPE[:TOKENS]]...     TYPE: GGUF's number, 2 = Q4_0
 *
 * Weights of 8 layers of an 8B shape take turns, so that none is found in a cache. Results are first held against sums
 * of the weights widened, in double precision. Each time is of a captured graph of 8 layers, the least of 5; `share` is
 * that of 4.8 TB/s. One line of JSON a case.
 */
#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "cuda/calls.h"
#include "cuda/weights.h"

enum { E = 4096, KV = 1024, F = 14336, LAYERS = 8, TURNS = 5 };

static const struct sqz_gpu_calls *calls;

static void must(bool ok, const char *what)
{
    if (ok) return;
    fprintf(stderr, "projections: %s: %s\n", what, cudaGetErrorString(cudaGetLastError()));
    exit(1);
}

static void *zeros(size_t bytes)
{
    void *p = NULL;
    must(cudaMalloc(&p, bytes) == cudaSuccess && cudaMemset(p, 0, bytes) == cudaSuccess &&
             cudaDeviceSynchronize() == cudaSuccess,
         "memory"); /* streams of the library's do not wait for the default one */
    return p;
}

static uint32_t state = 1;
static uint32_t random_bits(void)
{
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state;
}
static float random_unit(void)
{
    return (float)(random_bits() >> 8) * 0x1p-24f;
}

/* Random codes, factors between 1/64 and 1/8. */
static std::vector<uint8_t> random_weights(int type, size_t n_out, size_t n_in)
{
    const struct sqz_weights_block block = sqz_weights_block_of(type);
    std::vector<uint8_t> w(n_out * n_in / block.n * block.bytes);
    for (size_t i = 0; i < w.size(); i++) w[i] = (uint8_t)(random_bits() >> 9);
    for (size_t at = 0; at < w.size(); at += block.bytes) {
        uint8_t *factor = &w[at] + (type == SQZ_WEIGHTS_Q6_K ? 209 : 1);
        *factor = (uint8_t)(0x24 + *factor % 12);
        if (type == SQZ_WEIGHTS_Q4_K || type == SQZ_WEIGHTS_Q4_1) w[at + 3] = (uint8_t)(0x24 + w[at + 3] % 12);
    }
    return w;
}

static float *random_tokens(uint32_t n, size_t n_in, std::vector<float> *host)
{
    host->resize(n * n_in);
    for (float &x : *host) x = 4 * random_unit() - 2;
    for (size_t i = 0; n > 3 && i < n_in; i++) (*host)[3 * n_in + i] *= 1e5f; /* what F16 does not hold */
    float *p = (float *)zeros(n * n_in * sizeof(float));
    must(cudaMemcpy(p, host->data(), n * n_in * sizeof(float), cudaMemcpyHostToDevice) == cudaSuccess, "copy");
    return p;
}

/* A call's results against double precision; the largest difference by the sum of products' sizes. */
static double check(int type, uint32_t n_tokens, uint32_t n_in, std::vector<uint32_t> n_out, bool gated, bool add,
                    bool norm)
{
    struct sqz_gpu_projections a = {};
    std::vector<std::vector<uint8_t>> weights;
    std::vector<float> in, added;
    a.type = type, a.n_in = n_in, a.n_tokens = n_tokens, a.n_matrices = (uint32_t)n_out.size(), a.gated = gated;
    a.in = random_tokens(n_tokens, n_in, &in);
    const float *add_there = random_tokens(n_tokens, n_out[0], &added);
    if (norm) {
        std::vector<float> factors;
        a.norm = random_tokens(1, n_in, &factors);
        a.norm_epsilon = 1e-5f;
        for (uint32_t t = 0; t < n_tokens; t++) {
            double squares = 0;
            for (size_t j = 0; j < n_in; j++) squares += (double)in[t * n_in + j] * in[t * n_in + j];
            for (size_t j = 0; j < n_in; j++)
                in[t * n_in + j] = (float)(in[t * n_in + j] / sqrt(squares / n_in + 1e-5) * factors[j]);
        }
    }
    for (uint32_t i = 0; i < a.n_matrices; i++) {
        weights.push_back(random_weights(type, n_out[i], n_in));
        void *p = zeros(weights[i].size());
        cudaMemcpy(p, weights[i].data(), weights[i].size(), cudaMemcpyHostToDevice);
        a.matrices[i].weights = p;
        a.matrices[i].n_out = n_out[i];
        a.matrices[i].out = (float *)zeros((size_t)n_tokens * n_out[i] * sizeof(float));
    }
    if (add) a.matrices[0].add = add_there, a.matrices[0].add_stride = n_out[0];
    a.workspace_bytes = calls->projections_workspace_bytes(&a);
    must(a.workspace_bytes > 0, "not supported");
    a.workspace = zeros(a.workspace_bytes);
    cudaStream_t stream = (cudaStream_t)calls->create_stream();
    must(calls->project(&a, stream) == SQZ_OK && calls->wait(stream), "project");
    double worst = 0;
    for (uint32_t i = 0; i < (gated ? 1 : a.n_matrices); i++) {
        std::vector<float> out((size_t)n_tokens * n_out[i]), rows[2];
        cudaMemcpy(out.data(), a.matrices[i].out, out.size() * sizeof(float), cudaMemcpyDeviceToHost);
        for (size_t o = 0; o < n_out[i]; o += o % 16 == 15 ? n_out[i] / 32 / 16 * 16 + 1 : 1) {
            for (uint32_t k = 0; k < (gated ? 2u : 1u); k++) {
                rows[k].resize(n_in);
                for (size_t j = 0; j < n_in / 8; j++)
                    sqz_weights_eight(type, weights[gated ? k : i].data(), o * n_in / 8 + j, &rows[k][8 * j]);
            }
            for (uint32_t t = 0; t < n_tokens; t++) {
                double sums[2] = {0, 0}, size = 0;
                for (uint32_t k = 0; k < (gated ? 2u : 1u); k++)
                    for (size_t j = 0; j < n_in; j++) {
                        const double x = (double)rows[k][j] * in[t * n_in + j];
                        sums[k] += x;
                        size += fabs(x);
                    }
                double wanted = gated ? sums[0] / (1 + exp(-sums[0])) * sums[1] : sums[0];
                if (gated) size *= 1 + fabs(sums[0]) + fabs(sums[1]);
                if (add && i == 0) wanted += added[t * n_out[0] + o];
                const double off = fabs((double)out[t * n_out[i] + o] - wanted) / size;
                if (!(off <= worst)) worst = off;
            }
        }
    }
    calls->free_stream(stream);
    cudaFree(a.workspace);
    cudaFree((void *)a.in);
    cudaFree((void *)add_there);
    cudaFree((void *)a.norm);
    for (uint32_t i = 0; i < a.n_matrices; i++) cudaFree((void *)a.matrices[i].weights), cudaFree(a.matrices[i].out);
    return worst;
}

struct layer {
    struct sqz_gpu_projections steps[4];
    size_t bytes;
};

static void add_matrix(struct layer *l, int step, int type, uint32_t n_in, uint32_t n_out, float *out)
{
    struct sqz_gpu_projections *a = &l->steps[step];
    const struct sqz_weights_block block = sqz_weights_block_of(type);
    const size_t bytes = (size_t)n_in * n_out / block.n * block.bytes;
    a->matrices[a->n_matrices].weights = zeros(bytes);
    a->matrices[a->n_matrices].n_out = n_out;
    a->matrices[a->n_matrices++].out = out;
    l->bytes += bytes;
}

static float time_graph(const std::vector<layer> &layers, int step, cudaStream_t stream)
{
    must(calls->begin_capture(stream), "capture");
    for (const layer &l : layers)
        for (int s = 0; s < 4; s++)
            if (step < 0 || s == step) {
                struct sqz_gpu_projections a = l.steps[s];
                a.after_ours = &l != &layers[0] || (step < 0 && s > 0);
                must(calls->project(&a, stream) == SQZ_OK, "project");
            }
    void *graph = calls->end_capture(stream);
    must(graph != NULL, "graph");
    float best = 1e9f;
    cudaEvent_t from, to;
    cudaEventCreate(&from), cudaEventCreate(&to);
    for (int i = 0; i <= TURNS; i++) {
        float ms;
        cudaEventRecord(from, stream);
        must(calls->launch(graph, stream), "launch");
        cudaEventRecord(to, stream);
        must(cudaEventSynchronize(to) == cudaSuccess, "run");
        cudaEventElapsedTime(&ms, from, to);
        if (i > 0 && ms < best) best = ms;
    }
    calls->free_captured(graph);
    return best * 1000 / LAYERS;
}

static void bench(int type, uint32_t n_tokens)
{
    std::vector<layer> layers(LAYERS);
    std::vector<float> host;
    float *x = random_tokens(n_tokens, F, &host), *out[3];
    for (float *&o : out) o = (float *)zeros((size_t)n_tokens * F * sizeof(float));
    size_t workspace_bytes = 0;
    for (layer &l : layers) {
        l = {};
        for (int s = 0; s < 4; s++)
            l.steps[s].type = type, l.steps[s].n_tokens = n_tokens, l.steps[s].in = x, l.steps[s].n_in = s == 3 ? F : E;
        add_matrix(&l, 0, type, E, E, out[0]), add_matrix(&l, 0, type, E, KV, out[1]),
            add_matrix(&l, 0, type, E, KV, out[2]);
        add_matrix(&l, 1, type, E, E, out[0]);
        add_matrix(&l, 2, type, E, F, out[0]), add_matrix(&l, 2, type, E, F, out[1]);
        l.steps[2].gated = true;
        add_matrix(&l, 3, type, F, E, out[2]);
        l.steps[0].norm = l.steps[2].norm = x;
        l.steps[3].matrices[0].add = l.steps[1].matrices[0].add = out[1];
        l.steps[3].matrices[0].add_stride = l.steps[1].matrices[0].add_stride = E;
        for (const struct sqz_gpu_projections &a : l.steps)
            workspace_bytes = fmax(workspace_bytes, calls->projections_workspace_bytes(&a));
    }
    void *workspace = zeros(workspace_bytes);
    for (layer &l : layers)
        for (struct sqz_gpu_projections &a : l.steps) a.workspace = workspace, a.workspace_bytes = workspace_bytes;
    cudaStream_t stream = (cudaStream_t)calls->create_stream();
    float us[4], whole = time_graph(layers, -1, stream);
    for (int s = 0; s < 4; s++) us[s] = time_graph(layers, s, stream);
    printf("{\"type\": %d, \"tokens\": %u, \"layer_us\": %.2f, \"share\": %.3f, \"qkv_us\": %.2f, \"out_us\": %.2f, "
           "\"gate_up_us\": %.2f, \"down_us\": %.2f}\n",
           type, n_tokens, whole, layers[0].bytes / 4.8e6 / whole, us[0], us[1], us[2], us[3]);
    fflush(stdout);
    for (layer &l : layers)
        for (struct sqz_gpu_projections &a : l.steps)
            for (uint32_t i = 0; i < a.n_matrices; i++) cudaFree((void *)a.matrices[i].weights);
    for (float *o : out) cudaFree(o);
    cudaFree(x);
    cudaFree(workspace);
    calls->free_stream(stream);
}

static void check_all(int type)
{
    const uint32_t tokens[] = {1, 3, 4, 8, 13, 16, 17, 33, 64};
    double worst = 0;
    for (uint32_t n : tokens) {
        const double off[] = {check(type, n, 4096, {4096, 1024, 1024}, false, true, true),
                              check(type, n, 4096, {4096, 4096}, true, false, true),
                              check(type, n, 14336, {4096}, false, true, false),
                              check(type, n, 2048, {48}, false, false, false)};
        for (int i = 0; i < 4; i++) {
            if (!(off[i] <= 0x1p-11))
                printf("{\"type\": %d, \"tokens\": %u, \"case\": %d, \"off\": %g}\n", type, n, i, off[i]);
            if (!(off[i] <= worst)) worst = off[i];
        }
    }
    printf("{\"type\": %d, \"worst\": %g, \"good\": %s}\n", type, worst, worst <= 0x1p-11 ? "true" : "false");
    fflush(stdout);
}

int main(int argc, char **argv)
{
    calls = sqz_gpu_calls();
    for (int i = 1; i < argc; i++) {
        int type = atoi(argv[i]);
        const char *tokens = strchr(argv[i], ':');
        if (tokens) bench(type, (uint32_t)atoi(tokens + 1));
        else check_all(type);
    }
    return 0;
}
