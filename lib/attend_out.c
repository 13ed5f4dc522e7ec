/* What a job of sqz_attend() leaves: its rows of the output, and counts of what it read; see attend_job.h. */
#include <float.h>
#include <math.h>

#include "attend_job.h"

void sqz_job_write(const struct sqz_attend_call *c, const struct sqz_job *job, size_t n_tokens,
                   const struct sqz_softmax *state)
{
    const size_t d = state->head_dim, group = c->layer->shape.n_head / c->layer->shape.n_head_kv;
    for (size_t r = 0; r < n_tokens * group; r++) {
        const size_t token = sqz_job_place(c, job->token + r / group), head = job->head * group + r % group;
        float *out = c->out + token * c->out_token_stride + head * c->out_head_stride;
        const bool any = state->sum[r] >= FLT_MIN; /* nothing seen at all, or next to nothing: output 0 */
        const float inverse = any ? 1.0f / state->sum[r] : 0.0f;
        for (size_t i = 0; i < d; i++) out[i] = state->out[r * d + i] * inverse;
        if (c->lse)
            c->lse[token * c->layer->shape.n_head + head] = any ? state->maximum[r] + logf(state->sum[r]) : -INFINITY;
    }
}

void sqz_job_count_claimed(const struct sqz_attend_call *c, struct sqz_job *job)
{
    const size_t first = sqz_job_is_dense(c, &job->plan) ? 0 : c->layer->n_fixed; /* no window has rounded rows */
    sqz_job_count_keys(c, job, &job->retained, first, job->n_claimed_rows);
}

void sqz_job_count(const struct sqz_job *job, struct sqz_attend_totals *totals)
{
    totals->selections++;
    totals->centroid_rows += job->centroid_rows_read;
    totals->code_bytes += job->code_bytes_read;
    totals->codes += job->codes_read;
    totals->value_centroid_bytes += job->value_centroid_bytes_read;
    totals->key_rows += job->key_rows_read;
    totals->key_bytes += job->key_bytes_read;
}

void sqz_attend_totals_add(struct sqz_attend_totals *sum, const struct sqz_attend_totals *more)
{
    sum->selections += more->selections;
    sum->centroid_rows += more->centroid_rows;
    sum->code_bytes += more->code_bytes;
    sum->codes += more->codes;
    sum->value_centroid_bytes += more->value_centroid_bytes;
    sum->key_rows += more->key_rows;
    sum->key_bytes += more->key_bytes;
    sum->value_bytes += more->value_bytes;
}

static void add_stats(const struct sqz_layer *layer, const struct sqz_attend_totals *t,
                      struct sqz_attention_stats *stats)
{
    /* Layers that keep only a window cost the same at any context length: no budget applies to them. */
    if (!stats || layer->sliding_window) return;
    stats->n_selections += t->selections;
    stats->context_bytes += t->selections * sqz_whole_bytes(layer);
    stats->centroid_bytes += t->centroid_rows * sqz_centroid_bytes(layer) + t->value_centroid_bytes;
    stats->centroid_bytes += t->code_bytes;
    stats->key_bytes += t->key_bytes;
    stats->value_bytes += t->value_bytes;
    stats->retained_keys += t->key_rows;
    stats->total_keys += t->selections * layer->n_rows;
    stats->coded_keys += t->codes;
}

void sqz_attend_add_stats(const struct sqz_attend_call *c, const struct sqz_attend_totals *t)
{
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim;
    const uint64_t heads = layer->shape.n_head_kv;
    const struct sqz_attend_totals all = {.selections = heads,
                                          .key_rows = heads * layer->n_rows,
                                          .key_bytes = heads * sqz_rows_bytes(&layer->keys, 0, layer->n_rows, d),
                                          .value_bytes = heads * sqz_rows_bytes(&layer->values, 0, layer->n_rows, d)};
    if (!c->joint) add_stats(layer, t, c->stats);
    for (size_t i = 0; c->joint && i < c->n_tokens; i++) add_stats(layer, &all, c->joint[i].stats);
}

void sqz_merge_partial(float *out, float *lse, const float *other_out, const float *other_lse, size_t n_rows,
                       size_t head_dim)
{
    for (size_t r = 0; r < n_rows; r++) {
        const float largest = fmaxf(lse[r], other_lse[r]);
        if (largest == -INFINITY) continue; /* no rows in either: out stays 0 */
        const float mine = expf(lse[r] - largest), other = expf(other_lse[r] - largest), sum = mine + other;
        float *to = out + r * head_dim;
        const float *from = other_out + r * head_dim;
        for (size_t i = 0; i < head_dim; i++) to[i] = (mine * to[i] + other * from[i]) / sum;
        lse[r] = largest + logf(sum);
    }
}
