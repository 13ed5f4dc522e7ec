/* The kernels of rows in planes in plain C; kernels.h says what they do. */
#include "kernels_variants.h"
#include "squeeze_attention.h"

enum { MAX_NUMBERS = 256 };

/* The numbers of a row, sqz_plane_bytes() times 2, less `less`. */
static void unpack(int16_t *out, const uint8_t *upper, const uint8_t *lower, size_t bytes, int less)
{
    for (size_t b = 0; b < bytes; b += 16, out += 32) {
        for (size_t i = 0; i < 16; i++) {
            const int u = upper[b + i], l = lower ? lower[b + i] : 0;

            out[i] = (int16_t)((lower ? (u & 15) << 4 | (l & 15) : u & 15) - less);
            out[i + 16] = (int16_t)((lower ? (u & 240) | l >> 4 : u >> 4) - less);
        }
    }
}

void sqz_plane_logits_portable(float *logits, size_t stride, const int16_t *queries, const float *query_factor,
                               const float *half, size_t n_queries, const uint8_t *upper, const uint8_t *lower,
                               const float *row_factor, const uint32_t *index, size_t n_rows, size_t n_listed,
                               size_t head_dim)
{
    const size_t bytes = sqz_plane_bytes(head_dim), n = 2 * bytes;
    int16_t row[MAX_NUMBERS];

    (void)n_listed;
    for (size_t r = 0; r < n_rows; r++) {
        const size_t at = (index ? index[r] : r) * bytes;

        unpack(row, upper + at, lower ? lower + at : NULL, bytes, lower ? 128 : 8);
        for (size_t q = 0; q < n_queries; q++) {
            int32_t sum = 0; /* at most 256 * 32767 * 128 */

            for (size_t i = 0; i < n; i++) sum += queries[q * n + i] * row[i];
            logits[q * stride + r] = query_factor[q] * row_factor[r] * (half[q] + (float)sum);
        }
    }
}

size_t sqz_plane_sums_portable(float *out, const float *weights, size_t stride, size_t n_queries, const uint8_t *upper,
                               const uint8_t *lower, const float *row_factor, const uint32_t *index, size_t n_rows,
                               size_t head_dim)
{
    const size_t bytes = sqz_plane_bytes(head_dim), n = 2 * bytes;
    int16_t row[MAX_NUMBERS];
    size_t n_read = 0;

    for (size_t r = 0; r < n_rows; r++) {
        const size_t at = (index ? index[r] : r) * bytes;
        bool live = false;

        for (size_t q = 0; q < n_queries; q++) live |= weights[q * stride + r] != 0.0f;
        if (!live) continue;
        n_read++;
        unpack(row, upper + at, lower ? lower + at : NULL, bytes, 0);
        for (size_t q = 0; q < n_queries; q++) {
            const float weight = weights[q * stride + r] * row_factor[r];

            for (size_t i = 0; i < n; i++) out[q * n + i] += weight * (float)row[i];
        }
    }
    return n_read;
}

void sqz_turn_portable(float *x, size_t n, size_t length, float factor)
{
    for (size_t half = 1; half < length; half *= 2) {
        for (size_t first = 0; first < n; first += 2 * half) {
            for (size_t i = first; i < first + half; i++) {
                const float a = x[i], b = x[i + half];

                x[i] = a + b;
                x[i + half] = a - b;
            }
        }
    }
    for (size_t i = 0; i < n; i++) x[i] *= factor;
}
