/*
 * Thread block clusters (sm_90): where a block stands in its cluster, the barrier
 * of all its blocks, and each other's shared memory. On older devices a block is
 * a cluster of its own.
 */
#ifndef SQZ_LIB_CUDA_BLOCK_CLUSTER_CUH
#define SQZ_LIB_CUDA_BLOCK_CLUSTER_CUH

#include <cooperative_groups.h>

#include "device.cuh"

struct sqz_cluster_place {
    uint32_t rank, size;
};

__device__ __forceinline__ sqz_cluster_place sqz_cluster_here()
{
#if __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    return {cluster.block_rank(), cluster.num_blocks()};
#else
    return {0, 1};
#endif
}

/* All blocks of the cluster have come to their arrive when wait returns, and what they wrote before is there. All threads
 * of a block; the instructions want a warp's lanes together. */
__device__ __forceinline__ void sqz_cluster_arrive()
{
    __syncwarp();
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void sqz_cluster_wait()
{
    __syncwarp();
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

/* The same variable in the shared memory of block `rank` of the cluster. */
template <class T> __device__ __forceinline__ T *sqz_of_rank(T *p, uint32_t rank)
{
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(p, rank);
#else
    return p;
#endif
}

#endif
