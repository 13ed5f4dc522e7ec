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

#endif
