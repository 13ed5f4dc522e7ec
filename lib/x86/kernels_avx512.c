/* The kernels with AVX-512 (F, BW, VL, DQ). */
#if defined(__x86_64__)

#define TARGET               __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define KERNELS              sqz_kernels_avx512
#define NAME                 "avx512"
#define words_dot(sum, a, b) _mm512_add_epi32(sum, _mm512_madd_epi16(a, b))

#include "kernels_avx512.h"

#else
typedef int sqz_kernels_avx512_needs_x86_64; /* ISO C wants a declaration in every file */
#endif
