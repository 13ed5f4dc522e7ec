/*
 * Products of many tokens with quantised weights: out = in W^T, F32 to F32.
 *
 * Weights and tokens become F16 and go through cuBLAS with F32 sums. The integer
 * products of ggml's back end, which need no such copy, are bound by something else
 * than the tensor cores: 131,072 tokens of the 8B shape took 10 s of an H200, 170
 * TFLOP/s, where F16 has 700.
 * A token whose largest number F16 does not hold is divided by a power of two, and
 * its results multiplied.
 *
 * cuBLAS is the one that ggml's back end has loaded: this library does not need it.
 */
#include "arena.h"
#include "calls.h"
#include "device.cuh"
#include "weights.h"

#include <cublas_v2.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

namespace
{

enum {
    THREADS = 256,
    LEAST_TOKENS = 256,       /* fewer are not worth the copy of the weights */
    PART_BYTES = 128 << 20,   /* of F16 weights at once */
    LIBRARY_BYTES = 32 << 20, /* what cuBLAS asks for on Hopper */
};

/* What is called of cuBLAS. */
struct library {
    decltype(&cublasCreate_v2) create;
    decltype(&cublasDestroy_v2) destroy;
    decltype(&cublasSetStream_v2) set_stream;
    decltype(&cublasSetWorkspace_v2) set_workspace;
    cublasStatus_t (*multiply)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k,
                               const void *alpha, const void *a, cudaDataType, int lda, const void *b, cudaDataType,
                               int ldb, const void *beta, void *c, cudaDataType, int ldc, cublasComputeType_t,
                               cublasGemmAlgo_t);
};

struct multiplier {
    library calls;
    cublasHandle_t handle;
};

bool find(library *l)
{
    char name[32];
    snprintf(name, sizeof name, "libcublas.so.%d", CUDART_VERSION / 1000);
    void *found = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!found) return false;
    l->create = (decltype(l->create))dlsym(found, "cublasCreate_v2");
    l->destroy = (decltype(l->destroy))dlsym(found, "cublasDestroy_v2");
    l->set_stream = (decltype(l->set_stream))dlsym(found, "cublasSetStream_v2");
    l->set_workspace = (decltype(l->set_workspace))dlsym(found, "cublasSetWorkspace_v2");
    l->multiply = (decltype(l->multiply))dlsym(found, "cublasGemmEx");
    return l->create && l->destroy && l->set_stream && l->set_workspace && l->multiply;
}

/* Where F16 products with F32 sums have the full rate, and were measured: on consumer cards they have half of it. */
bool fast_here(void)
{
    int device = 0, major = 0, minor = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
           cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
           (major == 9 || (major == 10 && minor <= 3));
}

/* ---- Kernels ------------------------------------------------------------------------ */

struct widen_args {
    uint4 *out;
    const void *weights;
    size_t n; /* numbers / 8 */
};

/* Eight numbers a thread: 16 bytes written, neighbours by neighbours. NUMBERS: how two of them are packed. */
template <class NUMBERS, int TYPE> __global__ void __launch_bounds__(THREADS) widen_kernel(const widen_args a)
{
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= a.n) return;
    float x[8];
    sqz_weights_eight(TYPE, a.weights, i, x);
    a.out[i] = make_uint4(NUMBERS::pack(x[0], x[1]), NUMBERS::pack(x[2], x[3]), NUMBERS::pack(x[4], x[5]),
                          NUMBERS::pack(x[6], x[7]));
}

struct tokens_args {
    uint2 *narrow;    /* F16 [T][n] */
    const float4 *in; /* [T][n] */
    float *divided;   /* [T] by what */
    uint32_t n_quads; /* n / 4 */
};

__device__ __forceinline__ float largest(const float4 x)
{
    return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
}

__device__ __forceinline__ uint2 narrow(const float4 x, float factor)
{
    return make_uint2(sqz_f16::pack(x.x * factor, x.y * factor), sqz_f16::pack(x.z * factor, x.w * factor));
}

/* A block a token. What was read first is in registers or caches still when its largest number is known. */
__global__ void __launch_bounds__(THREADS) narrow_kernel(const tokens_args a)
{
    const float LARGEST = 32768.0f;
    const float4 *const in = a.in + (size_t)blockIdx.x * a.n_quads;
    uint2 *const out = a.narrow + (size_t)blockIdx.x * a.n_quads;
    float most = 0.0f;
    for (uint32_t i = threadIdx.x; i < a.n_quads; i += THREADS) {
        const float4 x = in[i];
        most = fmaxf(most, largest(x));
        out[i] = narrow(x, 1.0f);
    }
    const bool large = __syncthreads_or(most > LARGEST);
    float by = 1.0f;
    if (large) {
        __shared__ float shared[THREADS];
        shared[threadIdx.x] = most;
        __syncthreads();
        for (int step = THREADS / 2; step > 0; step /= 2) {
            if (threadIdx.x < step) shared[threadIdx.x] = fmaxf(shared[threadIdx.x], shared[threadIdx.x + step]);
            __syncthreads();
        }
        by = exp2f(ceilf(log2f(shared[0] / LARGEST)));
        for (uint32_t i = threadIdx.x; i < a.n_quads; i += THREADS) out[i] = narrow(in[i], 1.0f / by);
    }
    if (threadIdx.x == 0) a.divided[blockIdx.x] = by;
}

struct restore_args {
    float *out; /* [T][n] */
    const float *divided;
    uint32_t n;
};

__global__ void __launch_bounds__(THREADS) restore_kernel(const restore_args a)
{
    const float by = a.divided[blockIdx.x];
    if (by == 1.0f) return;
    float *const out = a.out + (size_t)blockIdx.x * a.n;
    for (uint32_t i = threadIdx.x; i < a.n; i += THREADS) out[i] *= by;
}

/* ---- Launching ------------------------------------------------------------------------ */

unsigned blocks_of(size_t n)
{
    return (unsigned)((n + THREADS - 1) / THREADS);
}

template <class NUMBERS> enum sqz_status widen(int type, const widen_args &a, void *stream)
{
#define WIDEN(T)                                                                                                       \
    case T: return sqz_launch(widen_kernel<NUMBERS, T>, dim3(blocks_of(a.n)), THREADS, 0, 1, false, a, stream)
    switch (type) {
        WIDEN(SQZ_WEIGHTS_Q4_0);
        WIDEN(SQZ_WEIGHTS_Q4_1);
        WIDEN(SQZ_WEIGHTS_Q5_0);
        WIDEN(SQZ_WEIGHTS_Q5_1);
        WIDEN(SQZ_WEIGHTS_Q8_0);
        WIDEN(SQZ_WEIGHTS_Q4_K);
        WIDEN(SQZ_WEIGHTS_Q5_K);
        WIDEN(SQZ_WEIGHTS_Q6_K);
    }
#undef WIDEN
    return SQZ_ERROR_UNSUPPORTED;
}

/* Rows of weights that are copied at once. */
uint32_t rows_at_once(const struct sqz_gpu_product *a)
{
    const size_t most = PART_BYTES / (a->n_in * sizeof(__half));
    return a->n_out < most ? a->n_out : (uint32_t)(most & ~(size_t)127);
}

struct places {
    void *library, *tokens, *weights;
    float *divided;
};

struct places carve(struct sqz_arena *arena, const struct sqz_gpu_product *a)
{
    struct places p;
    p.library = sqz_arena_take(arena, LIBRARY_BYTES + 256, 1, 1);
    p.tokens = sqz_arena_take(arena, a->n_tokens, a->n_in, sizeof(__half));
    p.divided = (float *)sqz_arena_take(arena, a->n_tokens, 1, sizeof(float));
    p.weights = sqz_arena_take(arena, rows_at_once(a), a->n_in, sizeof(__half));
    p.library = (void *)(((uintptr_t)p.library + 255) & ~(uintptr_t)255);
    return p;
}

enum sqz_status multiply(multiplier *m, const struct sqz_gpu_product *a, const struct places &p, uint32_t from,
                         uint32_t n)
{
    const float one = 1.0f, zero = 0.0f;
    return m->calls.multiply(m->handle, CUBLAS_OP_T, CUBLAS_OP_N, (int)n, (int)a->n_tokens, (int)a->n_in, &one,
                             p.weights, CUDA_R_16F, (int)a->n_in, p.tokens, CUDA_R_16F, (int)a->n_in, &zero,
                             a->out + from, CUDA_R_32F, (int)a->n_out, CUBLAS_COMPUTE_32F,
                             CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS
               ? SQZ_OK
               : SQZ_ERROR_INTERNAL;
}

enum sqz_status multiply_parts(multiplier *m, const struct sqz_gpu_product *a, const struct places &p, void *stream)
{
    const struct sqz_weights_block block = sqz_weights_block_of(a->type);
    const size_t row_bytes = (size_t)a->n_in / block.n * block.bytes;
    const uint32_t step = rows_at_once(a);
    enum sqz_status status = SQZ_OK;
    for (uint32_t from = 0; from < a->n_out && status == SQZ_OK; from += step) {
        const uint32_t n = a->n_out - from < step ? a->n_out - from : step;
        const widen_args w = {(uint4 *)p.weights, (const char *)a->weights + from * row_bytes, (size_t)n * a->n_in / 8};
        status = widen<sqz_f16>(a->type, w, stream);
        if (status == SQZ_OK) status = multiply(m, a, p, from, n);
    }
    return status;
}

} // namespace

extern "C" void *sqz_gpu_create_multiplier(void)
{
    multiplier *m = (multiplier *)calloc(1, sizeof *m);
    if (m && fast_here() && find(&m->calls) && m->calls.create(&m->handle) == CUBLAS_STATUS_SUCCESS) return m;
    free(m);
    return NULL;
}

extern "C" void sqz_gpu_free_multiplier(void *multiplier_)
{
    multiplier *m = (multiplier *)multiplier_;
    if (m) m->calls.destroy(m->handle);
    free(m);
}

extern "C" size_t sqz_gpu_product_workspace_bytes(const struct sqz_gpu_product *a)
{
    const struct sqz_weights_block block = sqz_weights_block_of(a->type);
    struct sqz_arena arena = sqz_arena_on(NULL);
    if (block.n == 0 || a->n_tokens < LEAST_TOKENS || a->n_tokens > 65535 || a->n_in == 0 || a->n_in % block.n ||
        a->n_in > PART_BYTES / 256 / sizeof(__half) || a->n_out == 0 || a->n_out % 8 || a->n_out > INT32_MAX)
        return 0;
    carve(&arena, a);
    return sqz_arena_bytes(&arena);
}

extern "C" enum sqz_status sqz_gpu_product(void *multiplier_, const struct sqz_gpu_product *a, void *stream)
{
    multiplier *m = (multiplier *)multiplier_;
    const size_t bytes = sqz_gpu_product_workspace_bytes(a);
    if (!m || bytes == 0 || a->workspace_bytes < bytes || (uintptr_t)a->in % 16 || (uintptr_t)a->weights % 2)
        return SQZ_ERROR_ARGUMENT;
    struct sqz_arena arena = sqz_arena_on(a->workspace);
    const struct places p = carve(&arena, a);
    const tokens_args t = {(uint2 *)p.tokens, (const float4 *)a->in, p.divided, a->n_in / 4};
    if (m->calls.set_stream(m->handle, (cudaStream_t)stream) != CUBLAS_STATUS_SUCCESS ||
        m->calls.set_workspace(m->handle, p.library, LIBRARY_BYTES) != CUBLAS_STATUS_SUCCESS)
        return SQZ_ERROR_INTERNAL;
    enum sqz_status status = SQZ_OK;
    if (!a->same_in) status = sqz_launch(narrow_kernel, dim3(a->n_tokens), THREADS, 0, 1, false, t, stream);
    if (status == SQZ_OK) status = multiply_parts(m, a, p, stream);
    const restore_args r = {a->out, p.divided, a->n_out};
    return status == SQZ_OK ? sqz_launch(restore_kernel, dim3(a->n_tokens), THREADS, 0, 1, false, r, stream) : status;
}

extern "C" enum sqz_status sqz_gpu_widen(int type, const void *weights, size_t n, void *out, void *stream)
{
    const struct sqz_weights_block block = sqz_weights_block_of(type);
    if (block.n == 0) return SQZ_ERROR_UNSUPPORTED;
    if (n % block.n || n / 8 / THREADS >= INT32_MAX || (uintptr_t)out % 16 || (uintptr_t)weights % 2)
        return SQZ_ERROR_ARGUMENT;
    return widen<sqz_bf16>(type, widen_args{(uint4 *)out, weights, n / 8}, stream);
}
