/* The inner loops of clustering with AVX2 and FMA. Bodies are in kmeans_template.h. */
#if defined(__x86_64__)

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define TARGET    __attribute__((target("avx2,fma,f16c")))
#define PRIMITIVE static inline __attribute__((always_inline)) TARGET
#define KERNELS   sqz_kmeans_kernels_avx2
#define NAME      "avx2"
#define VEC       __m256
#define VEC_LEN   8
#define INDEX     __m256i
#define TILE_VECS 2

#define vec_set1(x)        _mm256_set1_ps(x)
#define vec_load(p)        _mm256_loadu_ps(p)
#define vec_store(p, v)    _mm256_storeu_ps(p, v)
#define vec_max(a, b)      _mm256_max_ps(a, b)
#define vec_fma(a, b, c)   _mm256_fmadd_ps(a, b, c)
#define vec_equal(a, b)    ((unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)))
#define vec_at_least(a, b) ((unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)))
#define index_start()      _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)
#define index_add(a, n)    _mm256_add_epi32(a, _mm256_set1_epi32(n))
#define index_store(p, v)  _mm256_storeu_si256((__m256i *)(void *)(p), v)

PRIMITIVE float vec_largest(__m256 v)
{
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));

    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

PRIMITIVE void vec_update_largest(__m256 *largest, __m256i *at, __m256 value, __m256i now)
{
    const __m256 greater = _mm256_cmp_ps(value, *largest, _CMP_GT_OQ);

    *largest = _mm256_blendv_ps(*largest, value, greater);
    *at = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(*at), _mm256_castsi256_ps(now), greater));
}

/* Rows 0 and 4, 1 and 5, ... in the halves of a register: two rounds of unpacking inside the halves leave columns. */
PRIMITIVE __m256 load_halves(const float *const *row, size_t first, size_t column)
{
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row[first] + column)),
                                _mm_loadu_ps(row[first + 4] + column), 1);
}

PRIMITIVE void transpose_block(float *dst, size_t ld, const float *const *row)
{
    for (size_t column = 0; column < 8; column += 4) {
        const __m256 a = load_halves(row, 0, column), b = load_halves(row, 1, column);
        const __m256 c = load_halves(row, 2, column), d = load_halves(row, 3, column);
        const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
        const __m256d ef = _mm256_castps_pd(_mm256_unpackhi_ps(a, b)), gh = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));

        _mm256_storeu_ps(dst + column * ld, _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)));
        _mm256_storeu_ps(dst + (column + 1) * ld, _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
        _mm256_storeu_ps(dst + (column + 2) * ld, _mm256_castpd_ps(_mm256_unpacklo_pd(ef, gh)));
        _mm256_storeu_ps(dst + (column + 3) * ld, _mm256_castpd_ps(_mm256_unpackhi_pd(ef, gh)));
    }
}

#include "kmeans_template.h"

#else
typedef int sqz_kmeans_avx2_needs_x86_64; /* ISO C wants a declaration in every file */
#endif
