/*
 * What the kernels share: element types, 16-byte loads, the tensor-core product,
 * the softmax state and its merge, and launching with programmatic dependence.
 *
 * Logits are kept in base 2 (times log2 e) inside kernels, because the hardware's
 * exponential is; they become natural where they leave lib/cuda.
 */
#ifndef SQZ_LIB_CUDA_DEVICE_CUH
#define SQZ_LIB_CUDA_DEVICE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "method.h"
#include "ops.h"

#define SQZ_LOG2E 1.4426950408889634f
#define SQZ_LN2   0.6931471805599453f

enum { SQZ_WARP = 32 };

/* ---- Types ---------------------------------------------------------------------- */

struct sqz_f16 {
    typedef __half element;
    static __device__ __forceinline__ float2 unpack(uint32_t pair)
    {
        __half2 h;
        memcpy(&h, &pair, sizeof h);
        return __half22float2(h);
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high)
    {
        const __half2 h = __floats2half2_rn(low, high);
        uint32_t pair;
        memcpy(&pair, &h, sizeof pair);
        return pair;
    }
};

struct sqz_bf16 {
    typedef __nv_bfloat16 element;
    static __device__ __forceinline__ float2 unpack(uint32_t pair)
    {
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high)
    {
        const __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
        uint32_t pair;
        memcpy(&pair, &h, sizeof pair);
        return pair;
    }
};

/* ---- Memory ---------------------------------------------------------------------- */

/* 16 bytes that are read once: past the first-level cache. Zeros where !exists, whose address is not looked at. */
__device__ __forceinline__ uint4 sqz_load_once(const void *p, bool exists)
{
    uint4 x;
    asm volatile("{\n\t.reg .pred exists;\n\tsetp.ne.u32 exists, %5, 0;\n\t"
                 "mov.u32 %0, 0;\n\tmov.u32 %1, 0;\n\tmov.u32 %2, 0;\n\tmov.u32 %3, 0;\n\t"
                 "@exists ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
                 : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
                 : "l"(p), "r"((unsigned)exists));
    return x;
}
__device__ __forceinline__ uint2 sqz_load_once8(const void *p, bool exists)
{
    uint2 x;
    asm volatile("{\n\t.reg .pred exists;\n\tsetp.ne.u32 exists, %3, 0;\n\tmov.u32 %0, 0;\n\tmov.u32 %1, 0;\n\t"
                 "@exists ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];\n\t}"
                 : "=&r"(x.x), "=&r"(x.y)
                 : "l"(p), "r"((unsigned)exists));
    return x;
}

/* ---- Tensor core ------------------------------------------------------------------- */

/* c += a b, 16 x 16 by 16 x 8. Lane 4 g + t: a0 row g, a1 row g + 8, columns 2t and 2t + 1; a2, a3 the same 8 columns
 * on; b0, b1 rows as a's columns, column g; c0, c1 row g, columns 2t and 2t + 1; c2, c3 row g + 8. */
template <class Type>
__device__ __forceinline__ void sqz_mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1);
template <>
__device__ __forceinline__ void sqz_mma<sqz_f16>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                 uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void sqz_mma<sqz_bf16>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                  uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* The product of 16 rows with 8 queries, both as lanes load them: lane 4 g + t holds of rows g (low) and g + 8 (high),
 * and of query g, the 8 numbers from 8 (t + 4 j) on. The order in which a product walks the head dimension does not
 * matter as long as both sides keep it, so 16-byte loads are fragments as they come. */
template <class Type> __device__ __forceinline__ void sqz_mma_chunk(float (&c)[4], uint4 low, uint4 high, uint4 query)
{
    sqz_mma<Type>(c, low.x, high.x, low.y, high.y, query.x, query.y);
    sqz_mma<Type>(c, low.z, high.z, low.w, high.w, query.z, query.w);
}

/* 2^x as the hardware has it: exp2f() adds three instructions for results below 2^-126, which a softmax does not need. */
__device__ __forceinline__ float sqz_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* ---- Running sums -------------------------------------------------------------------- */

/* Exclusive running sum over the block's threads; *total is the whole. scratch: WARPS numbers, shared. */
template <int WARPS> __device__ uint32_t sqz_block_scan(uint32_t x, uint32_t *scratch, uint32_t *total)
{
    const int lane = threadIdx.x % SQZ_WARP, warp = threadIdx.x / SQZ_WARP;
    uint32_t inclusive = x;
#pragma unroll
    for (int step = 1; step < SQZ_WARP; step *= 2) {
        const uint32_t before = __shfl_up_sync(~0u, inclusive, step);
        if (lane >= step) inclusive += before;
    }
    if (lane == SQZ_WARP - 1) scratch[warp] = inclusive;
    __syncthreads();
    uint32_t base = 0, sum = 0;
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) base += scratch[w];
        sum += scratch[w];
    }
    __syncthreads();
    *total = sum;
    return base + inclusive - x;
}

/* ---- Softmax state -------------------------------------------------------------------- */

/* A maximum (base 2) and the sum of exponentials relative to it; the output that belongs to it is the caller's, in
 * the same scale. Empty: maximum -INFINITY, sum 0; merges as nothing. */
struct sqz_softmax_state {
    float maximum, sum;
};

__device__ __forceinline__ sqz_softmax_state sqz_softmax_empty()
{
    return {-INFINITY, 0.0f};
}

/* What a state's sum and output are multiplied with when its maximum is raised: 1 for an empty one, whose sum is 0
 * (infinities do not subtract). */
__device__ __forceinline__ float sqz_softmax_factor(float maximum, float raised)
{
    return raised == -INFINITY ? 1.0f : exp2f(maximum - raised);
}

__device__ __forceinline__ sqz_softmax_state sqz_softmax_merged(sqz_softmax_state a, sqz_softmax_state b)
{
    const float maximum = fmaxf(a.maximum, b.maximum);
    return {maximum, a.sum * sqz_softmax_factor(a.maximum, maximum) + b.sum * sqz_softmax_factor(b.maximum, maximum)};
}

/* Adds `count` rows of logit y (base 2). */
__device__ __forceinline__ void sqz_softmax_add(sqz_softmax_state *s, float y, float count)
{
    if (y > s->maximum) {
        s->sum *= exp2f(s->maximum - y);
        s->maximum = y;
    }
    if (y > -INFINITY) s->sum += count * exp2f(y - s->maximum);
}

/* log2 of the whole. */
__device__ __forceinline__ float sqz_softmax_log2(sqz_softmax_state s)
{
    return s.sum > 0 ? s.maximum + log2f(s.sum) : -INFINITY;
}

/* Parts 0, stride, 2 stride, ... merged by a warp, in an order that depends on n alone; every lane gets it. */
__device__ __forceinline__ sqz_softmax_state sqz_merged_parts(const sqz_cuda_part *parts, uint32_t n, uint32_t stride)
{
    sqz_softmax_state s = sqz_softmax_empty();
    for (uint32_t i = threadIdx.x % SQZ_WARP; i < n; i += SQZ_WARP)
        s = sqz_softmax_merged(s, {parts[(size_t)i * stride].maximum, parts[(size_t)i * stride].sum});
#pragma unroll
    for (int step = 16; step; step /= 2) {
        sqz_softmax_state other;
        other.maximum = __shfl_xor_sync(~0u, s.maximum, step);
        other.sum = __shfl_xor_sync(~0u, s.sum, step);
        s = sqz_softmax_merged(s, other);
    }
    return s;
}

/* ---- Clusters ----------------------------------------------------------------------- */

/* Rows under a cluster of any level, counted from n_fixed: a cluster is one range of the level below, so its two ends
 * lead down to its rows. */
__device__ __forceinline__ void sqz_rows_under(const sqz_cuda_offsets &o, uint32_t head, uint32_t cluster,
                                               uint32_t *first, uint32_t *last)
{
    uint32_t begin = cluster, end = cluster + 1;
    for (uint32_t l = o.level + 1; l-- > 0;) {
        const uint32_t *offset = o.offset[l] + (size_t)head * (o.n_clusters[l] + 1);
        begin = offset[begin];
        end = offset[end];
    }
    *first = begin;
    *last = end;
}
__device__ __forceinline__ uint32_t sqz_keys_under(const sqz_cuda_offsets &o, uint32_t head, uint32_t cluster)
{
    uint32_t begin, end;
    sqz_rows_under(o, head, cluster, &begin, &end);
    return end - begin;
}

/* Whether cluster c of a pair is opened, from the pair's words: lookup_codes.cuh takes four runs of 8 clusters
 * together, a quarter of n_words words' clusters apart. */
__device__ __forceinline__ bool sqz_opened_bit(const uint32_t *opened, uint32_t n_words, uint32_t c)
{
    const uint32_t in_run = c % (8 * n_words);
    return opened[in_run / 8] >> (c / (8 * n_words) * 8 + c % 8) & 1;
}

/* The last of n places, ascending, whose start is at most x; start[0] is. */
__device__ __forceinline__ uint32_t sqz_place_of(const uint32_t *start, uint32_t n, uint32_t x)
{
    uint32_t low = 0, high = n;
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (start[middle] <= x) low = middle;
        else high = middle;
    }
    return low;
}

/* ---- Launching ------------------------------------------------------------------------- */

/* A kernel launched after another with programmatic dependence starts early and waits here until the one before has
 * ended and its writes are visible. No effect when launched plainly. */
__device__ __forceinline__ void sqz_wait_for_previous()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/* Lets the next one start; it still waits for the end of this kernel. */
__device__ __forceinline__ void sqz_let_next_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* Compute capability as 90, multiprocessors; {0, 0} without a device. Attributes are cached by the runtime: no
 * synchronisation. */
struct sqz_device {
    int capability, n_multiprocessors;
};
static inline struct sqz_device sqz_device_get(void)
{
    struct sqz_device d = {0, 0};
    int device, major, minor, n;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
        cudaGetLastError(); /* not to be found by the next launch */
        return d;
    }
    d.capability = major * 10 + minor;
    d.n_multiprocessors = n;
    return d;
}

/* Whether a kernel's code on this device was compiled for sm_90 or newer: a newer device may run what was compiled for
 * sm_80, which neither waits for the kernel before it nor knows of clusters. */
static inline bool sqz_compiled_for_90(const void *kernel)
{
    cudaFuncAttributes attributes;
    if (sqz_device_get().capability < 90) return false;
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) {
        cudaGetLastError();
        return false;
    }
    return attributes.ptxVersion >= 90;
}

/* Whether a kernel may be given so many bytes of shared memory: 48 KiB come without asking, what it declares included.
 * Its limit is raised once, to all that the device has: no thread takes from what another has asked for. */
static inline bool sqz_allow_shared(const void *kernel, size_t bytes)
{
    cudaFuncAttributes attributes;
    int device, most;
    bool ok = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && cudaGetDevice(&device) == cudaSuccess &&
              cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess;
    if (ok) most -= (int)attributes.sharedSizeBytes;
    if (ok && attributes.maxDynamicSharedSizeBytes < most)
        ok = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most) == cudaSuccess;
    if (!ok) cudaGetLastError(); /* not to be found by the next launch */
    return ok && bytes <= (size_t)most;
}

/* Launches kernel(args) on the stream. after_ours: the kernel before it on the stream is one of this library's, every
 * one of which waits for its own predecessor; only then may it overlap with that kernel's end. cluster: thread blocks
 * of a cluster along x, 1 where sqz_compiled_for_90() is false. */
template <class Args>
static inline enum sqz_status sqz_launch(void (*kernel)(const Args), dim3 grid, unsigned threads, size_t shared_bytes,
                                         unsigned cluster, bool after_ours, const Args &args, void *stream)
{
    if (shared_bytes && !sqz_allow_shared((const void *)kernel, shared_bytes)) return SQZ_ERROR_UNSUPPORTED;
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = (cudaStream_t)stream;
    config.attrs = attributes;
    const bool hopper = (after_ours || cluster > 1) && sqz_compiled_for_90((const void *)kernel);
    if (after_ours && hopper) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1 && hopper) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = cluster;
        attributes[config.numAttrs].val.clusterDim.y = 1;
        attributes[config.numAttrs++].val.clusterDim.z = 1;
    }
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess ? SQZ_OK : SQZ_ERROR_INTERNAL;
}

#endif
