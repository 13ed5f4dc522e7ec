/* Asynchronous copies of a thread, from global to shared memory, 16 bytes each; in groups that are waited for in turn. */
#ifndef SQZ_LIB_CUDA_COPIES_CUH
#define SQZ_LIB_CUDA_COPIES_CUH

#include <stdint.h>

__device__ __forceinline__ void sqz_copy_16(void *shared, const void *global)
{
    const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

__device__ __forceinline__ void sqz_close_copies()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Until all but the last N groups are there. */
template <int N> __device__ __forceinline__ void sqz_wait_for_copies()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif
