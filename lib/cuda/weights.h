/*
 * Quantised weights as GGUF files have them, eight neighbouring numbers at a time,
 * for C and CUDA. Blocks of 32 numbers, or of 256 in parts of 16 or 32; a block's
 * factors are F16. One byte of codes holds two numbers 16, 32 or 64 apart.
 */
#ifndef SQZ_LIB_CUDA_WEIGHTS_H
#define SQZ_LIB_CUDA_WEIGHTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define SQZ_WEIGHTS_FUNCTION static __host__ __device__ __forceinline__
#else
#define SQZ_WEIGHTS_FUNCTION static inline
#endif

/* The numbers that GGUF has for them. */
enum sqz_weights {
    SQZ_WEIGHTS_Q4_0 = 2,
    SQZ_WEIGHTS_Q4_1 = 3,
    SQZ_WEIGHTS_Q5_0 = 6,
    SQZ_WEIGHTS_Q5_1 = 7,
    SQZ_WEIGHTS_Q8_0 = 8,
    SQZ_WEIGHTS_Q4_K = 12,
    SQZ_WEIGHTS_Q5_K = 13,
    SQZ_WEIGHTS_Q6_K = 14
};

/* Numbers of a block and its bytes; {0, 0}: none of these types. */
struct sqz_weights_block {
    uint32_t n, bytes;
};

SQZ_WEIGHTS_FUNCTION struct sqz_weights_block sqz_weights_block_of(int type)
{
    struct sqz_weights_block b = {32, 0};
    switch (type) {
    case SQZ_WEIGHTS_Q4_0: b.bytes = 18; break;
    case SQZ_WEIGHTS_Q4_1: b.bytes = 20; break;
    case SQZ_WEIGHTS_Q5_0: b.bytes = 22; break;
    case SQZ_WEIGHTS_Q5_1: b.bytes = 24; break;
    case SQZ_WEIGHTS_Q8_0: b.bytes = 34; break;
    case SQZ_WEIGHTS_Q4_K: b.n = 256, b.bytes = 144; break;
    case SQZ_WEIGHTS_Q5_K: b.n = 256, b.bytes = 176; break;
    case SQZ_WEIGHTS_Q6_K: b.n = 256, b.bytes = 210; break;
    default: b.n = 0;
    }
    return b;
}

SQZ_WEIGHTS_FUNCTION float sqz_weights_half(const uint8_t *at)
{
    const uint16_t h = *(const uint16_t *)(const void *)at; /* blocks have even sizes */
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(h));
#else
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    const float small = (float)fraction * 0x1p-24f;
    uint32_t bits = sign | (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | fraction << 13;
    float x;
    memcpy(&x, &bits, sizeof x);
    return exponent ? x : sign ? -small : small;
#endif
}

/* Factor and least of part j, of 8, of a block of Q4_K or Q5_K: 6 bits each, in 12 bytes. */
SQZ_WEIGHTS_FUNCTION void sqz_weights_part(const uint8_t *packed, uint32_t j, float *factor, float *least)
{
    if (j < 4) {
        *factor = (float)(packed[j] & 63);
        *least = (float)(packed[j + 4] & 63);
    } else {
        *factor = (float)((packed[j + 4] & 15) | packed[j - 4] >> 6 << 4);
        *least = (float)(packed[j + 4] >> 4 | packed[j] >> 6 << 4);
    }
}

/* Blocks of 32: numbers [8 p, 8 p + 8) of one, p < 4. */
SQZ_WEIGHTS_FUNCTION void sqz_weights_of_32(int type, const uint8_t *block, uint32_t p, float x[8])
{
    const bool least = type == SQZ_WEIGHTS_Q4_1 || type == SQZ_WEIGHTS_Q5_1;
    const bool five = type == SQZ_WEIGHTS_Q5_0 || type == SQZ_WEIGHTS_Q5_1;
    const float d = sqz_weights_half(block), add = least ? sqz_weights_half(block + 2) : 0;
    const uint8_t *high = block + (least ? 4 : 2), *codes = high + (five ? 4 : 0);
    if (type == SQZ_WEIGHTS_Q8_0) {
        for (int i = 0; i < 8; i++) x[i] = d * (float)(int8_t)codes[8 * p + (uint32_t)i];
        return;
    }
    const int zero = least ? 0 : five ? 16 : 8, fifth = five ? high[p] : 0;
    for (int i = 0; i < 8; i++) {
        const int byte = codes[8 * (p % 2) + (uint32_t)i];
        const int code = (p < 2 ? byte & 15 : byte >> 4) | (fifth >> i & 1) << 4;
        x[i] = d * (float)(code - zero) + add;
    }
}

/* Q4_K and Q5_K: numbers [8 p, 8 p + 8), p < 32, of part p / 4. */
SQZ_WEIGHTS_FUNCTION void sqz_weights_of_parts(int type, const uint8_t *block, uint32_t p, float x[8])
{
    const bool five = type == SQZ_WEIGHTS_Q5_K;
    const uint32_t part = p / 4, at = p % 4 * 8;
    const uint8_t *high = block + 16, *codes = high + (five ? 32 : 0) + part / 2 * 32;
    float factor, least;
    sqz_weights_part(block + 4, part, &factor, &least);
    factor *= sqz_weights_half(block);
    least *= sqz_weights_half(block + 2);
    for (int i = 0; i < 8; i++) {
        const uint32_t k = at + (uint32_t)i;
        const int fifth = five ? high[k] >> part & 1 : 0;
        x[i] = factor * (float)((part % 2 ? codes[k] >> 4 : codes[k] & 15) | fifth << 4) - least;
    }
}

/* Q6_K: numbers [8 p, 8 p + 8), p < 32; each half of the block has four quarters of 32. */
SQZ_WEIGHTS_FUNCTION void sqz_weights_of_6(const uint8_t *block, uint32_t p, float x[8])
{
    const uint32_t half = p / 16, quarter = p / 4 % 4, at = p % 4 * 8;
    const uint8_t *low = block + half * 64 + quarter % 2 * 32, *high = block + 128 + half * 32;
    const int factor = (int8_t)block[192 + half * 8 + quarter * 2 + at / 16];
    const float d = sqz_weights_half(block + 208) * (float)factor;
    for (int i = 0; i < 8; i++) {
        const uint32_t k = at + (uint32_t)i;
        const int code = (quarter < 2 ? low[k] & 15 : low[k] >> 4) | (high[k] >> 2 * quarter & 3) << 4;
        x[i] = d * (float)(code - 32);
    }
}

/* Numbers [8 i, 8 i + 8) of weights of a known type. */
SQZ_WEIGHTS_FUNCTION void sqz_weights_eight(int type, const void *weights, size_t i, float x[8])
{
    const struct sqz_weights_block b = sqz_weights_block_of(type);
    const uint8_t *block = (const uint8_t *)weights + i * 8 / b.n * b.bytes;
    const uint32_t p = (uint32_t)(i % (b.n / 8));
    if (b.n == 32) sqz_weights_of_32(type, block, p, x);
    else if (type == SQZ_WEIGHTS_Q6_K) sqz_weights_of_6(block, p, x);
    else sqz_weights_of_parts(type, block, p, x);
}

#endif
