/* The running softmax of softmax.h. */
#include "softmax.h"

#include <math.h>
#include <string.h>

#include "kernels.h"

void sqz_softmax_reset(struct sqz_softmax *state)
{
    memset(state->out, 0, state->n_rows * state->head_dim * sizeof *state->out);
    for (size_t r = 0; r < state->n_rows; r++) {
        state->maximum[r] = -INFINITY;
        state->sum[r] = 0;
    }
}

void sqz_softmax_raise(struct sqz_softmax *state, size_t row, float maximum)
{
    if (!(maximum > state->maximum[row])) return;
    if (state->sum[row] != 0) {
        float factor = expf(state->maximum[row] - maximum);
        state->sum[row] *= factor;
        sqz_kernels_get()->scale(state->out + row * state->head_dim, factor, state->head_dim);
    }
    state->maximum[row] = maximum;
}

void sqz_softmax_add_tile(struct sqz_softmax *state, const float *queries, float scale, const struct sqz_rows *keys,
                          const struct sqz_rows *values, size_t at, size_t n, const uint32_t *first,
                          const uint32_t *last, struct sqz_tile_scratch *scratch)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const size_t d = state->head_dim, stride = SQZ_TILE_ROWS;
    const size_t padded = (n + SQZ_GEMM_N - 1) / SQZ_GEMM_N * SQZ_GEMM_N;
    sqz_rows_transpose(scratch->keys, padded, keys, at, n, d);
    k->gemm(scratch->logits, stride, queries, d, scratch->keys, padded, state->n_rows, padded, d, scale, false);
    for (size_t r = 0; r < state->n_rows; r++) {
        float *x = scratch->logits + r * stride;
        size_t begin = first ? first[r] : 0, end = last ? last[r] : n;
        float maximum = begin < end ? k->max(x + begin, end - begin) : -INFINITY;
        if (maximum == -INFINITY) {
            memset(x, 0, n * sizeof *x);
            continue;
        }
        sqz_softmax_raise(state, r, maximum);
        state->sum[r] += k->exp_sum(x + begin, end - begin, state->maximum[r]);
        memset(x, 0, begin * sizeof *x);
        memset(x + end, 0, (n - end) * sizeof *x);
    }
    sqz_rows_to_f32(scratch->values, values, at, n, d);
    k->gemm(state->out, d, scratch->logits, stride, scratch->values, d, state->n_rows, d, n, 1.0f, true);
}

void sqz_softmax_merge(struct sqz_softmax *into, const struct sqz_softmax *from)
{
    const size_t d = into->head_dim;
    for (size_t r = 0; r < into->n_rows; r++) {
        if (from->sum[r] == 0) continue;
        sqz_softmax_raise(into, r, from->maximum[r]);
        float factor = expf(from->maximum[r] - into->maximum[r]);
        into->sum[r] += factor * from->sum[r];
        float *a = into->out + r * d;
        const float *b = from->out + r * d;
        for (size_t i = 0; i < d; i++) a[i] += factor * b[i];
    }
}
