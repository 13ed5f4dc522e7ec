/*
 * Attention of a block of tokens that share one selection in a head: tiles of
 * rows are converted once and go through matrix products.
 */
#include <math.h>
#include <string.h>

#include "attend_job.h"
#include "kernels.h"

/* Retained rows, copied side by side so that short ranges fill whole tiles. */
static void add_gathered(struct sqz_softmax *state, const struct sqz_job *job, struct sqz_job_scratch *t)
{
    const size_t d = state->head_dim;
    struct sqz_rows keys, values;
    size_t filled = 0;
    for (size_t i = 0; i < job->selection.n_ranges; i++) {
        size_t at = job->selection.ranges[i].begin, end = job->selection.ranges[i].end;
        while (at < end) {
            const size_t n = end - at < SQZ_TILE_ROWS - filled ? end - at : SQZ_TILE_ROWS - filled;
            keys = sqz_rows_gather(&t->gather_keys, filled, &job->keys, at, n, d);
            values = sqz_rows_gather(&t->gather_values, filled, &job->values, at, n, d);
            filled += n;
            at += n;
            if (filled < SQZ_TILE_ROWS) continue;
            sqz_softmax_add_tile(state, job->queries, job->rows.scale, &keys, &values, 0, filled, NULL, NULL, &t->tile);
            filled = 0;
        }
    }
    if (filled)
        sqz_softmax_add_tile(state, job->queries, job->rows.scale, &keys, &values, 0, filled, NULL, NULL, &t->tile);
}

/* Value centroids whose largest weight reaches skip_below, with all query rows: tiles of matrix products. Returns the bytes
 * read of them. */
static size_t add_tail_block(struct sqz_softmax *state, const struct sqz_layer *layer, const struct sqz_job *job,
                             float skip_below, struct sqz_job_scratch *t)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const struct sqz_selection *s = &job->selection;
    const size_t d = state->head_dim;
    float *largest = s->pruned_largest;
    if (!layer->tail) return 0;
    memset(largest, 0, s->n_pruned * sizeof *largest);
    for (size_t r = 0; r < state->n_rows; r++) {
        float *weight = s->pruned_logit + r * s->pruned_stride;
        sqz_softmax_raise(state, r, sqz_job_reference(layer, s, r, state->maximum[r]));
        k->exp_sum(weight, s->n_pruned, state->maximum[r]);
        k->multiply(weight, s->pruned_keys + r * s->pruned_stride, s->n_pruned);
        for (size_t p = 0; p < s->n_pruned; p++) largest[p] = weight[p] > largest[p] ? weight[p] : largest[p];
    }
    size_t read = 0;
    for (size_t p = 0; p < s->n_pruned;) {
        uint32_t column[SQZ_TILE_ROWS];
        struct sqz_rows gathered;
        size_t n = 0;
        for (; p < s->n_pruned && n < SQZ_TILE_ROWS; p++) {
            if (!(largest[p] >= skip_below)) continue;
            const struct sqz_level *level = &layer->level[s->pruned_level[p]];
            const struct sqz_rows rows = sqz_rows_of_head(&level->value_centroids, level->n_clusters, d, job->head);
            gathered = sqz_rows_gather(&t->gather_values, n, &rows, s->pruned_cluster[p], 1, d);
            read += sqz_rows_bytes(&rows, s->pruned_cluster[p], 1, d);
            column[n++] = (uint32_t)p;
        }
        if (n == 0) break;
        for (size_t r = 0; r < state->n_rows; r++) {
            const float *weight = s->pruned_logit + r * s->pruned_stride;
            float *out = t->tile.logits + r * SQZ_TILE_ROWS, sum = 0;
            for (size_t j = 0; j < n; j++) sum += out[j] = weight[column[j]];
            state->sum[r] += sum;
        }
        sqz_rows_to_f32(t->tile.values, &gathered, 0, n, d);
        k->gemm(state->out, d, t->tile.logits, SQZ_TILE_ROWS, t->tile.values, d, state->n_rows, d, n, 1.0f, true);
    }
    return read;
}

static void add_everything(const struct sqz_attend_call *c, struct sqz_job *job, size_t n_tokens,
                           struct sqz_job_scratch *t, struct sqz_softmax *state)
{
    const struct sqz_layer *layer = c->layer;
    size_t first[SQZ_MAX_BLOCK_TOKENS], last[SQZ_MAX_BLOCK_TOKENS];
    if (layer->sliding_window) {
        for (size_t i = 0; i < n_tokens; i++) {
            first[i] = sqz_job_first_row(c, job->token + i);
            last[i] = layer->n_rows;
        }
        sqz_add_limited(state, job->queries, job->rows.scale, &job->keys, &job->values, first[0], first[0],
                        layer->n_rows, first, last, layer->shape.n_head / layer->shape.n_head_kv, t);
    } else {
        sqz_add_tiles(state, job->queries, job->rows.scale, &job->keys, &job->values, 0, layer->n_rows, t);
    }
    sqz_job_count_keys(c, job, &job->keys, 0, layer->n_rows);
    t->value_bytes_read += sqz_rows_bytes(&job->values, 0, layer->n_rows, layer->shape.head_dim);
}

void sqz_job_block(const struct sqz_attend_call *c, struct sqz_job *job, size_t n_tokens, struct sqz_job_scratch *t,
                   struct sqz_softmax *state)
{
    const struct sqz_layer *layer = c->layer;
    sqz_job_set(c, job, n_tokens);
    if (c->joint) sqz_job_add_joint_rows(c, job, n_tokens, t, state);
    else if (c->n_user) sqz_job_add_user_rows(c, job, n_tokens, t, state);
    if (sqz_job_is_dense(c, &job->plan)) {
        add_everything(c, job, n_tokens, t, state);
        return;
    }
    sqz_add_tiles(state, job->queries, job->rows.scale, &job->keys, &job->values, 0, layer->n_fixed, t);
    const bool paper = layer->rule == SQZ_RULE_PAPER;
    for (size_t r = 0; r < state->n_rows; r++) {
        job->base[r] = state->sum[r] > 0 && !paper ? state->maximum[r] + logf(state->sum[r]) : -INFINITY;
        if (c->elsewhere) job->base[r] = sqz_log_add(job->base[r], sqz_job_elsewhere(c, job, r));
    }
    sqz_lookup(&job->selection, layer, job->head, &job->plan, job->queries, job->norms, state->n_rows, job->base,
               paper ? 0 : sqz_block_rows(layer, job->head, c->budget), job->lookup);
    if (layer->will_read) sqz_job_announce(layer, job);
    add_gathered(state, job, t);
    job->value_centroid_bytes_read = add_tail_block(state, layer, job, sqz_job_value_skip(layer, &job->plan), t);
    job->centroid_rows_read = job->selection.n_centroids_read;
    job->code_bytes_read = job->selection.code_bytes_read;
    job->codes_read = job->selection.n_codes_read;
    const size_t n_read = layer->n_fixed + job->selection.n_retained;
    sqz_job_count_keys(c, job, &job->keys, 0, n_read);
    t->value_bytes_read += sqz_rows_bytes(&job->values, 0, n_read, layer->shape.head_dim);
}
