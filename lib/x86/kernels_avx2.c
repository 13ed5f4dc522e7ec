/*
 * The kernels with AVX2, FMA and F16C: 8 floats a vector, 16 registers. Bodies
 * are in kernels_template.h; this file holds what the width decides.
 */
#if defined(__x86_64__)

#include <immintrin.h>
#include <stdint.h>
#include <stddef.h>

#define TARGET    __attribute__((target("avx2,fma,f16c")))
#define PRIMITIVE static inline __attribute__((always_inline)) TARGET
#define KERNELS   sqz_kernels_avx2
#define NAME      "avx2"
#define VEC       __m256
#define VEC_LEN   8
#define INDEX     __m256i

#define TILE_QUERIES 3
#define GEMM_VECS    2

#define vec_zero()                  _mm256_setzero_ps()
#define vec_set1(x)                 _mm256_set1_ps(x)
#define vec_load(p)                 _mm256_loadu_ps(p)
#define vec_store(p, v)             _mm256_storeu_ps(p, v)
#define vec_add(a, b)               _mm256_add_ps(a, b)
#define vec_sub(a, b)               _mm256_sub_ps(a, b)
#define vec_div(a, b)               _mm256_div_ps(a, b)
#define vec_mul(a, b)               _mm256_mul_ps(a, b)
#define vec_max(a, b)               _mm256_max_ps(a, b)
#define vec_or(a, b)                _mm256_or_ps(a, b)
#define vec_fma(a, b, c)            _mm256_fmadd_ps(a, b, c)
#define vec_select_less(a, b, x, y) _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ))

PRIMITIVE __m256 vec_load_half(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}

PRIMITIVE void vec_store_half(uint16_t *p, __m256 v)
{
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* All ones in the first n lanes. */
PRIMITIVE __m256i lanes_below(size_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

PRIMITIVE __m256 vec_load_part(const float *p, size_t n, __m256 other)
{
    const __m256i mask = lanes_below(n);
    return _mm256_blendv_ps(other, _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
}

PRIMITIVE void vec_store_part(float *p, size_t n, __m256 v)
{
    _mm256_maskstore_ps(p, lanes_below(n), v);
}

PRIMITIVE __m256 vec_add_exponent(__m256 p, __m256 n)
{
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}

PRIMITIVE __m128 vec_sum4(__m256 a, __m256 b, __m256 c, __m256 d)
{
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));

    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

PRIMITIVE float vec_sum(__m256 v)
{
    return _mm_cvtss_f32(vec_sum4(v, v, v, v));
}

PRIMITIVE float vec_largest(__m256 v)
{
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));

    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

PRIMITIVE unsigned vec_live(__m256 bits)
{
    const __m256i magnitude = _mm256_slli_epi32(_mm256_castps_si256(bits), 1);
    const __m256i zero = _mm256_cmpeq_epi32(magnitude, _mm256_setzero_si256());

    return ~(unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(zero)) & 0xff;
}

#define index_start()           _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)
#define index_add(a, n)         _mm256_add_epi32(a, _mm256_set1_epi32(n))
#define index_load(p)           _mm256_loadu_si256((const __m256i *)(const void *)(p))
#define index_load_part(p, n)   _mm256_maskload_epi32((const int *)(const void *)(p), lanes_below(n))
#define index_shift_4(a)        _mm256_srli_epi32(a, 4)
#define index_shift_left_23(a)  _mm256_slli_epi32(a, 23)
#define index_shift_right_23(a) _mm256_srai_epi32(a, 23)
#define index_sub(a, b)         _mm256_sub_epi32(a, b)
#define index_set1(x)           _mm256_set1_epi32(x)
#define index_of(v)             _mm256_castps_si256(v)
#define vec_of(a)               _mm256_castsi256_ps(a)
#define vec_at_least(a, b)      ((unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)))
#define index_store(p, v)       _mm256_storeu_si256((__m256i *)(void *)(p), v)

/* Each half of the table by the lowest 3 bits, then the one that bit 3 says, moved to the sign that blendv looks at. */
PRIMITIVE __m256 vec_table(const float *p, __m256i index)
{
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p + 8), index);

    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

PRIMITIVE void vec_update_largest(__m256 *largest, __m256i *at, __m256 value, __m256i now)
{
    const __m256 greater = _mm256_cmp_ps(value, *largest, _CMP_GT_OQ);

    *largest = _mm256_blendv_ps(*largest, value, greater);
    *at = _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(*at), _mm256_castsi256_ps(now), greater));
}

#define WORDS                __m256i
#define words_zero()         _mm256_setzero_si256()
#define words_load(p)        _mm256_loadu_si256((const __m256i *)(const void *)(p))
#define words_dot(sum, a, b) _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
#define words_to_float(v)    _mm256_cvtepi32_ps(v)

PRIMITIVE __m256i words_widen(const int8_t *p)
{
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)p));
}

#define words_widen_16(p) words_widen(p) /* a whole vector: never needed */

#define words_set1(x)          _mm256_set1_epi16(x)
#define words_join(mask, a, b) _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b))
#define words_and(a, b)        _mm256_and_si256(a, b)
#define words_left_4(a)        _mm256_slli_epi16(a, 4)
#define words_right_4(a)       _mm256_srli_epi16(a, 4)

PRIMITIVE __m256i bytes_words(const uint8_t *p, size_t n)
{
    (void)n; /* planes have whole vectors */
    return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(const void *)p));
}

PRIMITIVE __m256i words_low(const int16_t *p, size_t n)
{
    (void)n;
    return words_load(p);
}
#define words_high(p, n) words_low((p) + 16, n)

#define bytes_index(p)         _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(p)))
#define index_join(mask, a, b) words_join(mask, a, b)
#define index_and(a, b)        _mm256_and_si256(a, b)
#define index_left_4(a)        _mm256_slli_epi32(a, 4)
#define vec_of_index(a)        _mm256_cvtepi32_ps(a)
#define vec_swap_1(v)          _mm256_permute_ps(v, 0xb1)
#define vec_swap_2(v)          _mm256_permute_ps(v, 0x4e)
#define vec_swap_4(v)          _mm256_permute2f128_ps(v, v, 1)

PRIMITIVE void store_columns(float *dst, __m128i low, __m128i high)
{
    _mm256_storeu_ps(dst, _mm256_cvtph_ps(low));
    _mm256_storeu_ps(dst + 8, _mm256_cvtph_ps(high));
}

#include "kernels_template.h"

#else
typedef int sqz_kernels_avx2_needs_x86_64; /* ISO C wants a declaration in every file */
#endif
