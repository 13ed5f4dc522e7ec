/*
 * Attention of few query rows, such as one generated token: every row of keys
 * and values is read once for all queries that share the head. Weights are
 * taken relative to the denominator that the lookup estimates, so a row's
 * weight is its probability and rows below the threshold need no value.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "attend_job.h"
#include "kernels.h"

/* Adds rows whose logits are known: [n_rows of state][stride]. A row whose weights are all below skip_below is left
 * out altogether, value unread. Returns value rows read. The logits are overwritten. */
static size_t add_rows(struct sqz_softmax *state, float *logits, size_t stride, size_t n, const uint16_t *values,
                       float skip_below)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    float total[SQZ_MAX_GROUP_QUERIES];
    if (n == 0) return 0;
    for (size_t r = 0; r < state->n_rows; r++) {
        const float maximum = k->max(logits + r * stride, n);
        if (!(maximum <= state->maximum[r] + SQZ_EXPONENT_SLACK)) sqz_softmax_raise(state, r, maximum);
        total[r] = k->exp_sum(logits + r * stride, n, state->maximum[r]);
    }
    if (skip_below > 0) {
        memset(total, 0, sizeof total);
        for (size_t i = 0; i < n; i++) {
            float largest = 0;
            for (size_t r = 0; r < state->n_rows; r++) largest = fmaxf(largest, logits[r * stride + i]);
            const float keep = largest >= skip_below ? 1.0f : 0.0f;
            for (size_t r = 0; r < state->n_rows; r++) {
                logits[r * stride + i] *= keep;
                total[r] += logits[r * stride + i];
            }
        }
    }
    for (size_t r = 0; r < state->n_rows; r++) state->sum[r] += total[r];
    return k->row_accumulate(state->out, logits, stride, state->n_rows, values, n, state->head_dim);
}

/* What pruned clusters would have contributed, from their value centroids. */
static size_t add_tail_rows(struct sqz_softmax *state, const struct sqz_layer *layer, const struct sqz_job *job,
                            float *weights, float skip_below)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const struct sqz_selection *s = &job->selection;
    const size_t d = state->head_dim;
    size_t read = 0, p = 0;
    if (!layer->tail || s->n_pruned == 0) return 0;
    for (size_t r = 0; r < state->n_rows; r++)
        k->exp_sum(s->pruned_logit + r * s->pruned_stride, s->n_pruned, state->maximum[r]);
    while (p < s->n_pruned) { /* one run of the list a level */
        const struct sqz_level *level = &layer->level[s->pruned[p].level];
        const size_t n = level->n_clusters, first = p;
        memset(weights, 0, state->n_rows * n * sizeof *weights);
        for (; p < s->n_pruned && s->pruned[p].level == s->pruned[first].level; p++) {
            float largest = 0;
            for (size_t r = 0; r < state->n_rows; r++)
                largest = fmaxf(largest, s->pruned_logit[r * s->pruned_stride + p]);
            if (!(largest * s->pruned_keys[p] >= skip_below)) continue;
            for (size_t r = 0; r < state->n_rows; r++) {
                const float weight = s->pruned_logit[r * s->pruned_stride + p] * s->pruned_keys[p];
                weights[r * n + s->pruned[p].cluster] = weight;
                state->sum[r] += weight;
            }
        }
        read += k->row_accumulate(state->out, weights, n, state->n_rows,
                                  level->value_centroids + (size_t)job->head * n * d, n, d);
    }
    return read;
}

static void split_claims(struct sqz_job *job, uint32_t begin, uint32_t end)
{
    while (begin < end) {
        const uint32_t n = end - begin < SQZ_CLAIM_ROWS ? end - begin : SQZ_CLAIM_ROWS;
        job->claims[job->n_claims++] = (struct sqz_range){begin, begin + n};
        begin += n;
    }
}

void sqz_job_begin(const struct sqz_attend_call *c, struct sqz_job *job, struct sqz_job_scratch *t,
                   struct sqz_softmax *state)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv;
    const uint16_t *keys = layer->keys + (size_t)job->head * layer->n_rows * d;
    const uint16_t *values = layer->values + (size_t)job->head * layer->n_rows * d;
    const float scale = layer->shape.scale;
    sqz_job_gather_queries(c, job, 1);
    job->plan = sqz_head_plan_at(layer, job->head, c->budget, c->log_offset);
    const bool dense = sqz_job_is_dense(c, &job->plan);
    job->n_claims = 0;
    job->centroid_rows_read = job->value_centroid_rows_read = job->key_rows_read = 0;

    const size_t user_first = sqz_job_first_user_row(c, job->token), user_last = sqz_job_last_user_row(c, job->token);
    const size_t n_user = user_last > user_first ? user_last - user_first : 0;
    const size_t user_at = ((size_t)job->head * c->user_capacity_rows + user_first) * d;
    const uint16_t *user_keys = n_user ? c->user_keys + user_at : NULL;
    const uint16_t *user_values = n_user ? c->user_values + user_at : NULL;
    float *logits = t->logits;
    const size_t stride = n_user > SQZ_CLAIM_ROWS ? n_user : SQZ_CLAIM_ROWS;
    if (n_user) k->row_logits(logits, stride, job->queries, group, user_keys, n_user, d, scale);

    if (dense) {
        for (size_t r = 0; r < group; r++) state->maximum[r] = -INFINITY;
        add_rows(state, logits, stride, n_user, user_values, 0);
        split_claims(job, (uint32_t)sqz_job_first_row(c, job->token), layer->n_rows);
        return;
    }

    /* The denominator so far: user rows and fixed rows, exactly. */
    float base[SQZ_MAX_GROUP_QUERIES];
    add_rows(state, logits, stride, n_user, user_values, 0);
    float *fixed = t->logits;
    const size_t fixed_stride = layer->n_fixed > SQZ_CLAIM_ROWS ? layer->n_fixed : SQZ_CLAIM_ROWS;
    if (layer->n_fixed) k->row_logits(fixed, fixed_stride, job->queries, group, keys, layer->n_fixed, d, scale);
    for (size_t r = 0; r < group; r++) {
        if (layer->n_fixed) sqz_softmax_raise(state, r, k->max(fixed + r * fixed_stride, layer->n_fixed));
        memcpy(t->copy, fixed + r * fixed_stride, layer->n_fixed * sizeof *fixed);
        const float total = state->sum[r] + k->exp_sum(t->copy, layer->n_fixed, state->maximum[r]);
        base[r] = total > 0 ? state->maximum[r] + logf(total) : -INFINITY;
    }
    sqz_lookup(&job->selection, layer, job->head, &job->plan, job->queries, job->norms, group,
               layer->rule == SQZ_RULE_PAPER ? NULL : base, 0, job->lookup);
    for (size_t r = 0; r < group; r++) {
        job->reference[r] = sqz_job_reference(layer, &job->selection, r, state->maximum[r]);
        sqz_softmax_raise(state, r, job->reference[r]);
    }
    const float skip = sqz_job_value_skip(layer, &job->plan);
    t->value_rows_read += add_rows(state, fixed, fixed_stride, layer->n_fixed, values, skip);
    job->value_centroid_rows_read = add_tail_rows(state, layer, job, t->tail, skip);
    job->centroid_rows_read = job->selection.n_centroids_read;
    job->key_rows_read = layer->n_fixed;
    for (size_t i = 0; i < job->selection.n_ranges; i++)
        split_claims(job, job->selection.ranges[i].begin, job->selection.ranges[i].end);
}

void sqz_job_claim(const struct sqz_attend_call *c, const struct sqz_job *job, size_t claim, struct sqz_job_scratch *t,
                   struct sqz_softmax *state)
{
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim;
    const struct sqz_range range = job->claims[claim];
    const size_t n = range.end - range.begin, row = (size_t)job->head * layer->n_rows + range.begin;
    sqz_kernels_get()->row_logits(t->logits, SQZ_CLAIM_ROWS, job->queries, state->n_rows, layer->keys + row * d, n, d,
                                  layer->shape.scale);
    const float skip = sqz_job_is_dense(c, &job->plan) ? 0.0f : sqz_job_value_skip(layer, &job->plan);
    t->value_rows_read += add_rows(state, t->logits, SQZ_CLAIM_ROWS, n, layer->values + row * d, skip);
}

void sqz_job_fill_empty(const struct sqz_attend_call *c, const struct sqz_job *job, struct sqz_job_scratch *t,
                        struct sqz_softmax *state)
{
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim, n = layer->n_fixed, at = (size_t)job->head * layer->n_rows * d;
    if (sqz_job_is_dense(c, &job->plan) || !layer->value_skip || n == 0) return;
    for (size_t r = 0; r < state->n_rows; r++) {
        if (state->sum[r] >= FLT_MIN) continue;
        struct sqz_softmax row = {1, d, state->out + r * d, state->maximum + r, state->sum + r};
        sqz_softmax_reset(&row);
        sqz_kernels_get()->row_logits(t->logits, n, job->queries + r * d, 1, layer->keys + at, n, d,
                                      layer->shape.scale);
        t->value_rows_read += add_rows(&row, t->logits, n, n, layer->values + at, 0);
    }
}
