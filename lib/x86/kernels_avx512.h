/*
 * What the AVX-512 variants share: 16 floats a vector, 32 registers, masks.
 * Included after TARGET, KERNELS, NAME and words_dot are defined; includes the
 * bodies.
 */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define PRIMITIVE static inline __attribute__((always_inline)) TARGET
#define VEC       __m512
#define VEC_LEN   16
#define INDEX     __m512i

#define TILE_QUERIES 4
#define GEMM_VECS    4

#define vec_zero()                  _mm512_setzero_ps()
#define vec_set1(x)                 _mm512_set1_ps(x)
#define vec_load(p)                 _mm512_loadu_ps(p)
#define vec_store(p, v)             _mm512_storeu_ps(p, v)
#define vec_add(a, b)               _mm512_add_ps(a, b)
#define vec_sub(a, b)               _mm512_sub_ps(a, b)
#define vec_div(a, b)               _mm512_div_ps(a, b)
#define vec_mul(a, b)               _mm512_mul_ps(a, b)
#define vec_max(a, b)               _mm512_max_ps(a, b)
#define vec_or(a, b)                _mm512_or_ps(a, b)
#define vec_fma(a, b, c)            _mm512_fmadd_ps(a, b, c)
#define vec_select_less(a, b, x, y) _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x)

PRIMITIVE __m512 vec_load_half(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

PRIMITIVE void vec_store_half(uint16_t *p, __m512 v)
{
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

PRIMITIVE __mmask16 lanes_below(size_t n)
{
    return (__mmask16)((1u << n) - 1);
}

PRIMITIVE __m512 vec_load_part(const float *p, size_t n, __m512 other)
{
    return _mm512_mask_loadu_ps(other, lanes_below(n), p);
}

PRIMITIVE void vec_store_part(float *p, size_t n, __m512 v)
{
    _mm512_mask_storeu_ps(p, lanes_below(n), v);
}

PRIMITIVE __m512 vec_add_exponent(__m512 p, __m512 n)
{
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
}

/* The sum of the two halves, as in the last step of a horizontal sum. */
PRIMITIVE __m256 fold(__m512 v)
{
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

PRIMITIVE __m128 vec_sum4(__m512 a, __m512 b, __m512 c, __m512 d)
{
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m256 abcd = fold(_mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee)));

    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

PRIMITIVE float vec_sum(__m512 v)
{
    return _mm_cvtss_f32(vec_sum4(v, v, v, v));
}

PRIMITIVE float vec_largest(__m512 v)
{
    return _mm512_reduce_max_ps(v);
}

PRIMITIVE unsigned vec_live(__m512 bits)
{
    const __m512i value = _mm512_castps_si512(bits);

    return _mm512_test_epi32_mask(value, _mm512_set1_epi32(0x7fffffff));
}

#define index_start()           _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
#define index_add(a, n)         _mm512_add_epi32(a, _mm512_set1_epi32(n))
#define index_load(p)           _mm512_loadu_si512(p)
#define index_load_part(p, n)   _mm512_maskz_loadu_epi32(lanes_below(n), p)
#define index_shift_4(a)        _mm512_srli_epi32(a, 4)
#define index_shift_left_23(a)  _mm512_slli_epi32(a, 23)
#define index_shift_right_23(a) _mm512_srai_epi32(a, 23)
#define index_sub(a, b)         _mm512_sub_epi32(a, b)
#define index_set1(x)           _mm512_set1_epi32(x)
#define index_of(v)             _mm512_castps_si512(v)
#define vec_of(a)               _mm512_castsi512_ps(a)
#define vec_at_least(a, b)      ((unsigned)_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ))
#define vec_table(p, index)     _mm512_permutexvar_ps(index, _mm512_loadu_ps(p)) /* looks at the lowest 4 bits */
#define index_store(p, v)       _mm512_storeu_si512(p, v)

PRIMITIVE void vec_update_largest(__m512 *largest, __m512i *at, __m512 value, __m512i now)
{
    const __mmask16 greater = _mm512_cmp_ps_mask(value, *largest, _CMP_GT_OQ);

    *largest = _mm512_mask_mov_ps(*largest, greater, value);
    *at = _mm512_mask_mov_epi32(*at, greater, now);
}

#define WORDS             __m512i
#define words_zero()      _mm512_setzero_si512()
#define words_load(p)     _mm512_loadu_si512(p)
#define words_to_float(v) _mm512_cvtepi32_ps(v)

PRIMITIVE __m512i words_widen(const int8_t *p)
{
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

PRIMITIVE __m512i words_widen_16(const int8_t *p)
{
    return _mm512_cvtepi8_epi16(_mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)p)));
}

#define words_set1(x)          _mm512_set1_epi16(x)
#define words_join(mask, a, b) _mm512_ternarylogic_epi32(mask, a, b, 0xca)
#define words_and(a, b)        _mm512_and_si512(a, b)
#define words_left_4(a)        _mm512_slli_epi16(a, 4)
#define words_right_4(a)       _mm512_srli_epi16(a, 4)

PRIMITIVE __m512i bytes_words(const uint8_t *p, size_t n)
{
    const __m128i first = _mm_loadu_si128((const __m128i *)(const void *)p);

    if (n < 32) return _mm512_cvtepu8_epi16(_mm256_zextsi128_si256(first));
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

PRIMITIVE __m512i words_low(const int16_t *p, size_t n)
{
    const __m512i first = _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)(const void *)p));

    if (n < 32) return first;
    return _mm512_inserti64x4(first, _mm256_loadu_si256((const __m256i *)(const void *)(p + 32)), 1);
}
#define words_high(p, n) words_low((p) + 16, n)

#define bytes_index(p)         _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p)))
#define index_join(mask, a, b) _mm512_ternarylogic_epi32(mask, a, b, 0xca)
#define index_and(a, b)        _mm512_and_si512(a, b)
#define index_left_4(a)        _mm512_slli_epi32(a, 4)
#define vec_of_index(a)        _mm512_cvtepi32_ps(a)
#define vec_swap_1(v)          _mm512_permute_ps(v, 0xb1)
#define vec_swap_2(v)          _mm512_permute_ps(v, 0x4e)
#define vec_swap_4(v)          _mm512_shuffle_f32x4(v, v, 0xb1)
#define vec_swap_8(v)          _mm512_shuffle_f32x4(v, v, 0x4e)

PRIMITIVE void store_columns(float *dst, __m128i low, __m128i high)
{
    _mm512_storeu_ps(dst, _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1)));
}

#include "kernels_template.h"
