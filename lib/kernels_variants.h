/*
 * The tables of kernels that the variant files define and kernels.c lists.
 * Only kernels.c takes them by name; everybody else goes through kernels.h.
 */
#ifndef SQZ_LIB_KERNELS_VARIANTS_H
#define SQZ_LIB_KERNELS_VARIANTS_H

#include "kernels.h"

extern const struct sqz_kernels sqz_kernels_portable;
#if defined(__x86_64__)
extern const struct sqz_kernels sqz_kernels_avx2;        /* needs AVX2, FMA, F16C */
extern const struct sqz_kernels sqz_kernels_avx512;      /* needs those and AVX-512 F, BW, VL, DQ */
extern const struct sqz_kernels sqz_kernels_avx512_vnni; /* and VNNI */
#endif
#if defined(__aarch64__)
extern const struct sqz_kernels sqz_kernels_neon;
#endif

/* In plain C, kernels_planes.c, also for variants that have none of their own. */
void sqz_plane_logits_portable(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                               const float *half, size_t n_queries, const uint8_t *upper, const uint8_t *lower,
                               const float *row_factor, const uint32_t *index, size_t n_rows, size_t n_listed,
                               size_t head_dim);
size_t sqz_plane_sums_portable(float *out, const float *weights, size_t stride, size_t n_queries, const uint8_t *upper,
                               const uint8_t *lower, const float *row_factor, const uint32_t *index, size_t n_rows,
                               size_t head_dim);
void sqz_turn_portable(float *x, size_t n, size_t length, float factor);

#endif
