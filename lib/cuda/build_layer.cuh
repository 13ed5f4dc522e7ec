/*
 * Building a layer on the GPU from within: what build_layer.cu and build_codes.cu
 * share. Arrays of all heads; the layer's pointers are written through, as
 * lib/build.c does.
 */
#ifndef SQZ_LIB_CUDA_BUILD_LAYER_CUH
#define SQZ_LIB_CUDA_BUILD_LAYER_CUH

#include "arena.h"
#include "calls.h"
#include "device.cuh"

/* Writable view of an array of a layer. */
template <class T> static inline T *sqz_writable(const T *p)
{
    return const_cast<T *>(p);
}

/* A centroid's number i as the lookup knows it. */
struct sqz_centroid_view {
    const void *data;
    const float *scale, *mean;
    uint32_t n, head_dim;
    __device__ __forceinline__ float number(uint32_t head, uint32_t c, uint32_t i) const
    {
        const size_t row = (size_t)head * n + c;
        if (!scale) return __half2float(((const __half *)data)[row * head_dim + i]);
        return mean[(size_t)head * head_dim + i] + scale[row] * (float)((const int8_t *)data)[row * head_dim + i];
    }
};
static inline sqz_centroid_view sqz_centroids_of(const struct sqz_layer *l)
{
    const struct sqz_rows *c = &l->level[0].centroids;
    const bool small = c->type == SQZ_ROW_I8;
    return {c->data, small ? c->scale : NULL, small ? c->mean : NULL, l->level[0].n_clusters, l->shape.head_dim};
}

/* The last two as lib/codes.h has them. */
enum { SQZ_BUILD_MAX_DIM = 256 };

/* Codes of all heads (build_codes.cu). cluster_of: [K][n_rows - n_fixed] of a key, counted from n_fixed, its cluster. */
size_t sqz_build_codes_bytes(const struct sqz_layer *l);
enum sqz_status sqz_build_codes(const struct sqz_layer *l, const uint32_t *cluster_of, void *workspace, void *stream);

#endif
