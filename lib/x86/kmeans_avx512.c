/* The inner loops of clustering with AVX-512 (F, BW, VL, DQ). Bodies are in kmeans_template.h. */
#if defined(__x86_64__)

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define TARGET    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define PRIMITIVE static inline __attribute__((always_inline)) TARGET
#define KERNELS   sqz_kmeans_kernels_avx512
#define NAME      "avx512"
#define VEC       __m512
#define VEC_LEN   16
#define INDEX     __m512i
#define TILE_VECS 4

#define vec_set1(x)        _mm512_set1_ps(x)
#define vec_load(p)        _mm512_loadu_ps(p)
#define vec_store(p, v)    _mm512_storeu_ps(p, v)
#define vec_max(a, b)      _mm512_max_ps(a, b)
#define vec_fma(a, b, c)   _mm512_fmadd_ps(a, b, c)
#define vec_largest(v)     _mm512_reduce_max_ps(v)
#define vec_equal(a, b)    ((unsigned)_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ))
#define vec_at_least(a, b) ((unsigned)_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ))
#define index_start()      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
#define index_add(a, n)    _mm512_add_epi32(a, _mm512_set1_epi32(n))
#define index_store(p, v)  _mm512_storeu_si512(p, v)

PRIMITIVE void vec_update_largest(__m512 *largest, __m512i *at, __m512 value, __m512i now)
{
    const __mmask16 greater = _mm512_cmp_ps_mask(value, *largest, _CMP_GT_OQ);

    *largest = _mm512_mask_mov_ps(*largest, greater, value);
    *at = _mm512_mask_mov_epi32(*at, greater, now);
}

/* Four rows' quarter i of 16 lanes in one register each, transposed inside the quarters by two rounds of unpacking;
 * loading rows 0, 4, 8, 12 into the quarters leaves whole columns. */
PRIMITIVE __m512 load_quarters(const float *const *row, size_t first, size_t column)
{
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(row[first] + column));

    v = _mm512_insertf32x4(v, _mm_loadu_ps(row[first + 4] + column), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(row[first + 8] + column), 2);
    return _mm512_insertf32x4(v, _mm_loadu_ps(row[first + 12] + column), 3);
}

PRIMITIVE void transpose_block(float *dst, size_t ld, const float *const *row)
{
    for (size_t column = 0; column < 16; column += 4) {
        const __m512 a = load_quarters(row, 0, column), b = load_quarters(row, 1, column);
        const __m512 c = load_quarters(row, 2, column), d = load_quarters(row, 3, column);
        const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
        const __m512d ef = _mm512_castps_pd(_mm512_unpackhi_ps(a, b)), gh = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));

        _mm512_storeu_ps(dst + column * ld, _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)));
        _mm512_storeu_ps(dst + (column + 1) * ld, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
        _mm512_storeu_ps(dst + (column + 2) * ld, _mm512_castpd_ps(_mm512_unpacklo_pd(ef, gh)));
        _mm512_storeu_ps(dst + (column + 3) * ld, _mm512_castpd_ps(_mm512_unpackhi_pd(ef, gh)));
    }
}

#include "kmeans_template.h"

#else
typedef int sqz_kmeans_avx512_needs_x86_64; /* ISO C wants a declaration in every file */
#endif
