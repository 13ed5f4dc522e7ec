/*
 * How rows are added to a running softmax in the jobs of sqz_attend(): those
 * whose logits are known, rows as they are for few query rows, tiles of matrix
 * products for many; see attend_job.h.
 */
#include <math.h>

#include "attend_job.h"
#include "kernels.h"

void sqz_add_weigh(struct sqz_softmax *state, float *logits, size_t stride, size_t n, float skip_below)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    float total[SQZ_MAX_GROUP_QUERIES];
    for (size_t r = 0; r < state->n_rows; r++) {
        const float maximum = k->max(logits + r * stride, n);
        if (!(maximum <= state->maximum[r] + SQZ_EXPONENT_SLACK)) sqz_softmax_raise(state, r, maximum);
        total[r] = k->exp_sum(logits + r * stride, n, state->maximum[r]);
    }
    if (skip_below > 0) k->drop_below(logits, stride, state->n_rows, n, skip_below, total);
    for (size_t r = 0; r < state->n_rows; r++) state->sum[r] += total[r];
}

size_t sqz_add_known(struct sqz_softmax *state, float *logits, size_t stride, size_t n, const struct sqz_rows *values,
                     size_t first, float skip_below)
{
    if (n == 0) return 0;
    sqz_add_weigh(state, logits, stride, n, skip_below);
    return sqz_rows_accumulate(state->out, logits, stride, state->n_rows, values, NULL, first, n, state->head_dim);
}

void sqz_add_few(struct sqz_softmax *state, const struct sqz_row_queries *queries, const struct sqz_rows *keys,
                 const struct sqz_rows *values, size_t begin, size_t end, struct sqz_job_scratch *t)
{
    const size_t d = state->head_dim, most = sqz_row_is_planes(keys->type) ? SQZ_CLAIM_ROWS : SQZ_TILE_ROWS;
    for (size_t at = begin, n; at < end; at += n) {
        n = end - at < most ? end - at : most;
        for (size_t q = 0, m; q < state->n_rows; q += m) { /* the rows stay in the cache */
            m = state->n_rows - q < SQZ_MAX_GROUP_QUERIES ? state->n_rows - q : SQZ_MAX_GROUP_QUERIES;
            const struct sqz_row_queries part = sqz_row_queries_part(queries, q, m, d);
            struct sqz_softmax some = {m, d, state->out + q * d, state->maximum + q, state->sum + q};
            sqz_rows_logits(t->tile.logits, most, &part, keys, at, n, d, NULL);
            sqz_add_known(&some, t->tile.logits, most, n, values, at, 0);
        }
    }
}

void sqz_add_tiles(struct sqz_softmax *state, const float *queries, float scale, const struct sqz_rows *keys,
                   const struct sqz_rows *values, size_t begin, size_t end, struct sqz_job_scratch *t)
{
    for (size_t at = begin; at < end; at += SQZ_TILE_ROWS) {
        const size_t n = end - at < SQZ_TILE_ROWS ? end - at : SQZ_TILE_ROWS;
        sqz_softmax_add_tile(state, queries, scale, keys, values, at, n, NULL, NULL, &t->tile);
    }
}

void sqz_add_limited(struct sqz_softmax *state, const float *queries, float scale, const struct sqz_rows *keys,
                     const struct sqz_rows *values, size_t at, size_t begin, size_t end, const size_t *first,
                     const size_t *last, size_t group, struct sqz_job_scratch *t)
{
    for (size_t n; begin < end; at += n, begin += n) {
        n = end - begin < SQZ_TILE_ROWS ? end - begin : SQZ_TILE_ROWS;
        for (size_t r = 0; r < state->n_rows; r++) {
            const size_t low = first[r / group] > begin ? first[r / group] - begin : 0;
            const size_t high = last[r / group] > begin ? last[r / group] - begin : 0;
            t->last[r] = (uint32_t)(high < n ? high : n);
            t->first[r] = (uint32_t)(low < t->last[r] ? low : t->last[r]);
        }
        sqz_softmax_add_tile(state, queries, scale, keys, values, at, n, t->first, t->last, &t->tile);
    }
}

void sqz_add_to_total(float *log_total, const struct sqz_row_queries *queries, const struct sqz_rows *keys,
                      size_t first, size_t end, size_t d, struct sqz_job_scratch *t)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    for (size_t at = first, n; at < end; at += n) {
        n = end - at < SQZ_CLAIM_ROWS ? end - at : SQZ_CLAIM_ROWS;
        for (size_t q = 0, m; q < queries->n; q += m) {
            m = queries->n - q < SQZ_MAX_GROUP_QUERIES ? queries->n - q : SQZ_MAX_GROUP_QUERIES;
            const struct sqz_row_queries part = sqz_row_queries_part(queries, q, m, d);
            sqz_rows_logits(t->logits, SQZ_CLAIM_ROWS, &part, keys, at, n, d, NULL);
            for (size_t r = 0; r < m; r++) {
                float *x = t->logits + r * SQZ_CLAIM_ROWS;
                const float largest = k->max(x, n);
                log_total[q + r] = sqz_log_add(log_total[q + r], largest + logf(k->exp_sum(x, n, largest)));
            }
        }
    }
}
