/*
 * Hopper's pieces: warpgroup products (wgmma), bulk tensor copies, mbarriers.
 *
 * Operands lie in shared memory in atoms of 8 rows of 128 bytes whose 16-byte
 * chunks are exchanged: chunk c of row r is at c ^ (r % 8), which is what a
 * tensor copy with a swizzle of 128 bytes writes. An atom is 1,024 bytes and
 * starts at a multiple of that.
 *
 * "By rows" (K-major) an operand's atoms follow each other down its rows,
 * `stride` bytes apart, and a product takes 16 columns: 32 bytes into the atom.
 * "By columns" (MN-major: values, whose rows are what is summed over) atoms 64
 * columns apart are `leading` bytes apart and atoms 8 rows apart `stride`.
 *
 * Accumulators, lane 4 g + t of warp w: d[4 j + i] is row 16 w + g + 8 (i / 2),
 * column 8 j + 2 t + i % 2. Two neighbouring j are a fragment of 16 columns.
 */
#ifndef SQZ_LIB_CUDA_HOPPER_CUH
#define SQZ_LIB_CUDA_HOPPER_CUH

#include <cuda.h>

#include "device.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SQZ_HOPPER_CODE 1
#endif

/* A tensor map of rows [n_heads][n_rows][D], head h at row h * head_rows, for boxes of box_rows rows: shared memory
 * [D / 64][box_rows][64]; rows at n_rows and above come as zeros. */
static inline bool sqz_tensor_map(CUtensorMap *map, enum sqz_row_type type, const void *rows, uint32_t n_heads,
                                  size_t head_rows, uint32_t n_rows, uint32_t head_dim, uint32_t box_rows)
{
    typedef CUresult (*encode_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                  const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                  CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    void *entry = NULL;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found) !=
            cudaSuccess ||
        found != cudaDriverEntryPointSuccess) {
        cudaGetLastError();
        return false;
    }
    const cuuint64_t size[4] = {64, n_rows, head_dim / 64, n_heads};
    const cuuint64_t stride[3] = {(cuuint64_t)head_dim * 2, 128, (cuuint64_t)head_rows * head_dim * 2};
    const cuuint32_t box[4] = {64, box_rows, head_dim / 64, 1}, step[4] = {1, 1, 1, 1};
    return ((encode_fn)entry)(
               map, type == SQZ_ROW_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
               (void *)rows, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/* Whether a kernel's code on this device is Hopper's own: compiled for another target it is empty, four registers. */
static inline bool sqz_hopper_kernel(const void *kernel)
{
    cudaFuncAttributes attributes;
    if (sqz_device_get().capability != 90) return false;
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) {
        cudaGetLastError();
        return false;
    }
    return attributes.numRegs > 32;
}

#ifdef SQZ_HOPPER_CODE

__device__ __forceinline__ uint32_t sqz_shared(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* ---- Barriers --------------------------------------------------------------- */

__device__ __forceinline__ void sqz_barrier_init(uint64_t *barrier, uint32_t n_arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(sqz_shared(barrier)), "r"(n_arrivals) : "memory");
}
__device__ __forceinline__ void sqz_barrier_init_done()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void sqz_barrier_arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(sqz_shared(barrier)) : "memory");
}
__device__ __forceinline__ void sqz_barrier_expect(uint64_t *barrier, uint32_t n_bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(sqz_shared(barrier)), "r"(n_bytes)
                 : "memory");
}
/* Waits until the phase of this parity has ended; of a new barrier, phase 1 has. */
__device__ __forceinline__ void sqz_barrier_wait(uint64_t *barrier, uint32_t parity)
{
    asm volatile(
        "{\n\t.reg .pred done;\n\tagain:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@!done bra again;\n\t}" ::"r"(sqz_shared(barrier)),
        "r"(parity)
        : "memory");
}

/* ---- Copies ----------------------------------------------------------------- */

/* Brings a tensor map near, before it is asked for. */
__device__ __forceinline__ void sqz_prefetch_map(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void sqz_copy_rows(void *to, const CUtensorMap *map, int row, int head, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %3, "
                 "%5}], [%2];" ::"r"(sqz_shared(to)),
                 "l"(map), "r"(sqz_shared(barrier)), "r"(0), "r"(row), "r"(head)
                 : "memory");
}
__device__ __forceinline__ void sqz_copy_bytes(void *to, const void *from, uint32_t n_bytes, uint64_t *barrier)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(sqz_shared(to)),
        "l"(from), "r"(n_bytes), "r"(sqz_shared(barrier))
        : "memory");
}
/* What threads stored in shared memory becomes visible to products and copies. */
__device__ __forceinline__ void sqz_stores_to_async()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ---- Products --------------------------------------------------------------- */

__device__ __forceinline__ uint64_t sqz_operand(const void *p, uint32_t leading_bytes, uint32_t stride_bytes)
{
    return (uint64_t)((sqz_shared(p) & 0x3ffff) >> 4) | (uint64_t)(leading_bytes >> 4) << 16 |
           (uint64_t)(stride_bytes >> 4) << 32 | (uint64_t)1 << 62;
}
__device__ __forceinline__ void sqz_wgmma_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void sqz_wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void sqz_wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
/* Keeps the compiler from moving uses of accumulators across. */
template <int N> __device__ __forceinline__ void sqz_hold(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N> __device__ __forceinline__ void sqz_registers_more()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void sqz_registers_less()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* d (64 x N) = a b^T (+ d where add): a 64 rows, b N rows, both by rows, 16 columns. */
template <class Type, int N>
__device__ __forceinline__ void sqz_wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, int add);
/* d (64 x N) = a b (+ d where add): a a fragment of 64 rows and 16 columns, b 16 rows of N columns, by columns. */
template <class Type, int N>
__device__ __forceinline__ void sqz_wgmma_rs(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint64_t b, int add);

/* The same product with b N rows of 16 columns, by rows: d (64 x N) = a b^T (+ d where add). */
template <class Type, int N>
__device__ __forceinline__ void sqz_wgmma_rs_rows(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                  uint64_t b, int add);

/* The accumulators of N columns, by name and as operands, and the numbers of what comes after them: two descriptors and
 * whether to add (SS), or four registers, a descriptor and whether to add (RS). */
#define SQZ_WGMMA_NAMES_64                                                                                             \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SQZ_WGMMA_NAMES_128                                                                                            \
    SQZ_WGMMA_NAMES_64 ", "                                                                                            \
                       "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "              \
                       "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SQZ_WGMMA_NAMES_256                                                                                            \
    SQZ_WGMMA_NAMES_128                                                                                                \
    ", "                                                                                                               \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                                 \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                                 \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                     \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SQZ_WGMMA_8(i)                                                                                                 \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),        \
        "+f"(d[i + 7])
#define SQZ_WGMMA_32(i)      SQZ_WGMMA_8(i), SQZ_WGMMA_8(i + 8), SQZ_WGMMA_8(i + 16), SQZ_WGMMA_8(i + 24)
#define SQZ_WGMMA_D_64       SQZ_WGMMA_32(0)
#define SQZ_WGMMA_D_128      SQZ_WGMMA_32(0), SQZ_WGMMA_32(32)
#define SQZ_WGMMA_D_256      SQZ_WGMMA_D_128, SQZ_WGMMA_32(64), SQZ_WGMMA_32(96)
#define SQZ_WGMMA_SS_64      "%32, %33"
#define SQZ_WGMMA_SS_ADD_64  "%34"
#define SQZ_WGMMA_SS_128     "%64, %65"
#define SQZ_WGMMA_SS_ADD_128 "%66"
#define SQZ_WGMMA_RS_64      "{%32, %33, %34, %35}, %36"
#define SQZ_WGMMA_RS_ADD_64  "%37"
#define SQZ_WGMMA_RS_128     "{%64, %65, %66, %67}, %68"
#define SQZ_WGMMA_RS_ADD_128 "%69"
#define SQZ_WGMMA_RS_256     "{%128, %129, %130, %131}, %132"
#define SQZ_WGMMA_RS_ADD_256 "%133"

/* layout: whether a and b, where they are in shared memory, are by columns. */
#define SQZ_WGMMA(KIND, T, N, layout, ...)                                                                             \
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " SQZ_WGMMA_##KIND##_ADD_##N                                    \
                 ", 0;\n\t"                                                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." T "." T " {" SQZ_WGMMA_NAMES_##N                    \
                 "}, " SQZ_WGMMA_##KIND##_##N ", p, 1, 1, " layout ";\n\t}"                                            \
                 : SQZ_WGMMA_D_##N                                                                                     \
                 : __VA_ARGS__, "r"(add))
#define SQZ_WGMMA_SS(Type, T, N)                                                                                       \
    template <>                                                                                                        \
    __device__ __forceinline__ void sqz_wgmma_ss<Type, N>(float(&d)[N / 2], uint64_t a, uint64_t b, int add)           \
    {                                                                                                                  \
        SQZ_WGMMA(SS, T, N, "0, 0", "l"(a), "l"(b));                                                                   \
    }
#define SQZ_WGMMA_RS(name, Type, T, N, layout)                                                                         \
    template <>                                                                                                        \
    __device__ __forceinline__ void name<Type, N>(float(&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2,             \
                                                  uint32_t a3, uint64_t b, int add)                                    \
    {                                                                                                                  \
        SQZ_WGMMA(RS, T, N, layout, "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));                                       \
    }
#define SQZ_WGMMA_TYPE(Type, T)                                                                                        \
    SQZ_WGMMA_SS(Type, T, 64)                                                                                          \
    SQZ_WGMMA_SS(Type, T, 128)                                                                                         \
    SQZ_WGMMA_RS(sqz_wgmma_rs_rows, Type, T, 128, "0")                                                                 \
    SQZ_WGMMA_RS(sqz_wgmma_rs, Type, T, 64, "1")                                                                       \
    SQZ_WGMMA_RS(sqz_wgmma_rs, Type, T, 128, "1")                                                                      \
    SQZ_WGMMA_RS(sqz_wgmma_rs, Type, T, 256, "1")

SQZ_WGMMA_TYPE(sqz_f16, "f16")
SQZ_WGMMA_TYPE(sqz_bf16, "bf16")

#endif /* SQZ_HOPPER_CODE */

#endif
