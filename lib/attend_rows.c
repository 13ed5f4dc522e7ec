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

/* What pruned clusters would have contributed, from their value centroids. Returns the bytes read of those. */
static size_t add_tail_rows(struct sqz_softmax *state, const struct sqz_layer *layer, const struct sqz_job *job,
                            float skip_below)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const struct sqz_selection *s = &job->selection;
    const size_t d = state->head_dim;
    float total[SQZ_MAX_GROUP_QUERIES];
    size_t read = 0;
    if (!layer->tail || sqz_tail_is_off(job->plan.tail_gain) || s->n_pruned == 0) return 0;
    for (size_t r = 0; r < state->n_rows; r++) {
        k->exp_sum(s->pruned_logit + r * s->pruned_stride, s->n_pruned, state->maximum[r]);
        k->multiply(s->pruned_logit + r * s->pruned_stride, s->pruned_keys + r * s->pruned_stride, s->n_pruned);
    }
    k->drop_below(s->pruned_logit, s->pruned_stride, state->n_rows, s->n_pruned, skip_below, total);
    for (size_t r = 0; r < state->n_rows; r++) state->sum[r] += total[r];
    for (size_t first = 0, end; first < s->n_pruned; first = end) { /* one run of the list a level */
        const struct sqz_level *level = &layer->level[s->pruned_level[first]];
        const struct sqz_rows rows = sqz_rows_of_head(&level->value_centroids, level->n_clusters, d, job->head);
        for (end = first + 1; end < s->n_pruned && s->pruned_level[end] == s->pruned_level[first];) end++;
        read += sqz_rows_accumulate(state->out, s->pruned_logit + first, s->pruned_stride, state->n_rows, &rows,
                                    s->pruned_cluster + first, 0, end - first, d);
    }
    return read;
}

/* Retained rows go into pieces of at most SQZ_CLAIM_ROWS rows, the pieces into slots of about as many rows each: fixed
 * by what is retained, never by the number of threads. */
static void split_ranges(struct sqz_job *job, const struct sqz_range *ranges, size_t n_ranges)
{
    size_t n_rows = 0;
    job->n_pieces = 0;
    for (size_t i = 0; i < n_ranges; i++) {
        n_rows += ranges[i].end - ranges[i].begin;
        for (uint32_t begin = ranges[i].begin, n; begin < ranges[i].end; begin += n) {
            n = ranges[i].end - begin < SQZ_CLAIM_ROWS ? ranges[i].end - begin : SQZ_CLAIM_ROWS;
            job->pieces[job->n_pieces++] = (struct sqz_range){begin, begin + n};
        }
    }
    job->n_claimed_rows = n_rows;
    job->n_slots = (n_rows + SQZ_CLAIM_ROWS - 1) / SQZ_CLAIM_ROWS;
    if (job->n_slots > SQZ_MAX_SLOTS) job->n_slots = SQZ_MAX_SLOTS;
    size_t slot = 0, seen = 0;
    for (size_t i = 0; i < job->n_pieces; i++) {
        while (slot < job->n_slots && seen * job->n_slots >= slot * n_rows) job->slot_first[slot++] = (uint32_t)i;
        seen += job->pieces[i].end - job->pieces[i].begin;
    }
    while (slot <= job->n_slots) job->slot_first[slot++] = (uint32_t)job->n_pieces;
}

/* Chooses what retained keys are read as, and makes the queries' form for that. Where the keys are there twice, sinks,
 * window and what is dense read `keys`: only one of the two is ever another type than F16. */
static void set_retained(const struct sqz_layer *layer, struct sqz_job *job, bool dense)
{
    const size_t d = layer->shape.head_dim;
    if (!dense && layer->retained_keys.type)
        job->retained = sqz_rows_of_head(&layer->retained_keys, layer->n_rows, d, job->head);
    sqz_row_queries_set(&job->rows, &job->retained, d);
}

void sqz_job_begin(const struct sqz_attend_call *c, struct sqz_job *job, struct sqz_job_scratch *t,
                   struct sqz_softmax *state)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv;
    sqz_job_set(c, job, 1);
    const bool dense = sqz_job_is_dense(c, &job->plan);
    split_ranges(job, NULL, 0);
    set_retained(layer, job, dense);

    if (c->n_user) sqz_job_add_own_rows(c, job, t, state);
    if (dense) {
        const struct sqz_range all = {(uint32_t)sqz_job_first_row(c, job->token), layer->n_rows};
        split_ranges(job, &all, 1);
        return;
    }

    /* The denominator so far: user rows and fixed rows, exactly. */
    float base[SQZ_MAX_GROUP_QUERIES], fixed_maximum[SQZ_MAX_GROUP_QUERIES], total[SQZ_MAX_GROUP_QUERIES];
    float *fixed = t->logits;
    const size_t fixed_stride = layer->n_fixed > SQZ_CLAIM_ROWS ? layer->n_fixed : SQZ_CLAIM_ROWS;
    if (layer->n_fixed) sqz_rows_logits(fixed, fixed_stride, &job->rows, &job->keys, 0, layer->n_fixed, d, NULL);
    for (size_t r = 0; r < group; r++) {
        float *x = fixed + r * fixed_stride;
        if (layer->n_fixed) sqz_softmax_raise(state, r, k->max(x, layer->n_fixed));
        fixed_maximum[r] = state->maximum[r];
        const float known = state->sum[r] + k->exp_sum(x, layer->n_fixed, state->maximum[r]);
        base[r] = known > 0 && layer->rule != SQZ_RULE_PAPER ? state->maximum[r] + logf(known) : -INFINITY;
        if (c->elsewhere) base[r] = sqz_log_add(base[r], sqz_job_elsewhere(c, job, r));
    }
    sqz_lookup(&job->selection, layer, job->head, &job->plan, job->queries, job->norms, group, base, 0, job->lookup);
    job->rows.centre_logits = job->selection.centroid_logit;
    job->rows.centre_stride = job->selection.pruned_stride;
    for (size_t r = 0; r < group; r++) {
        job->reference[r] = sqz_job_reference(layer, &job->selection, r, state->maximum[r]);
        sqz_softmax_raise(state, r, job->reference[r]);
    }
    const float skip = sqz_job_value_skip(layer, &job->plan);
    if (layer->n_fixed) { /* their weights stand relative to an older maximum */
        for (size_t r = 0; r < group; r++) {
            float *x = fixed + r * fixed_stride;
            const float factor = expf(fixed_maximum[r] - state->maximum[r]);
            if (factor != 1.0f) k->scale(x, factor, layer->n_fixed);
        }
        k->drop_below(fixed, fixed_stride, group, layer->n_fixed, skip, total);
        for (size_t r = 0; r < group; r++) state->sum[r] += total[r];
        t->value_bytes_read +=
            sqz_rows_accumulate(state->out, fixed, fixed_stride, group, &job->values, NULL, 0, layer->n_fixed, d);
    }
    job->value_centroid_bytes_read = add_tail_rows(state, layer, job, skip);
    job->centroid_rows_read = job->selection.n_centroids_read;
    job->code_bytes_read = job->selection.code_bytes_read;
    job->codes_read = job->selection.n_codes_read;
    sqz_job_count_keys(c, job, &job->keys, 0, layer->n_fixed);
    split_ranges(job, job->selection.ranges, job->selection.n_ranges);
    if (layer->will_read) sqz_job_announce(layer, job);
}

void sqz_job_total(const struct sqz_attend_call *c, struct sqz_job *job, struct sqz_job_scratch *t, float *log_total)
{
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv;
    sqz_job_set(c, job, 1);
    sqz_row_queries_set(&job->rows, &job->keys, d);
    for (size_t r = 0; r < group; r++) log_total[r] = -INFINITY;
    if (c->n_user && (sqz_job_is_dense(c, &job->plan) || layer->rule != SQZ_RULE_PAPER))
        sqz_job_total_own_rows(c, job, t, log_total); /* the paper's is over clusters alone */
    if (sqz_job_is_dense(c, &job->plan)) {
        sqz_add_to_total(log_total, &job->rows, &job->keys, sqz_job_first_row(c, job->token), layer->n_rows, d, t);
        return;
    }
    if (layer->rule != SQZ_RULE_PAPER) sqz_add_to_total(log_total, &job->rows, &job->keys, 0, layer->n_fixed, d, t);
    memcpy(job->base, log_total, group * sizeof *log_total);
    sqz_lookup(&job->selection, layer, job->head, &job->plan, job->queries, job->norms, group, job->base, 0,
               job->lookup);
    memcpy(log_total, job->selection.log_total, group * sizeof *log_total);
}

/* Everything is read: long pieces, one after the other. */
static void add_pieces(struct sqz_softmax *state, const struct sqz_job *job, size_t first, size_t end,
                       struct sqz_job_scratch *t)
{
    const size_t d = state->head_dim;
    for (size_t i = first; i < end; i++) {
        const size_t begin = job->pieces[i].begin, n = job->pieces[i].end - begin;
        sqz_rows_logits(t->logits, SQZ_CLAIM_ROWS, &job->rows, &job->keys, begin, n, d, NULL);
        t->value_bytes_read += sqz_add_known(state, t->logits, SQZ_CLAIM_ROWS, n, &job->values, begin, 0);
    }
}

/* The rows of pieces from *next on, until the list has at least `wanted` or they end. Returns how many it has. */
static size_t list_rows(uint32_t *list, size_t n, size_t wanted, const struct sqz_range *pieces, size_t *next,
                        size_t end)
{
    for (; n < wanted && *next < end; (*next)++) {
        const struct sqz_range piece = pieces[*next];
        for (uint32_t row = piece.begin; row < piece.end; row++) list[n++] = row;
    }
    return n;
}

void sqz_job_slot(const struct sqz_attend_call *c, const struct sqz_job *job, size_t slot, struct sqz_job_scratch *t,
                  struct sqz_softmax *state)
{
    const size_t d = state->head_dim, end = job->slot_first[slot + 1], wanted = SQZ_CLAIM_ROWS + SQZ_LISTED_AHEAD;
    size_t next = job->slot_first[slot], n_listed = 0;
    sqz_softmax_reset(state);
    if (sqz_job_is_dense(c, &job->plan)) {
        add_pieces(state, job, next, end, t);
        return;
    }
    const float skip = sqz_job_value_skip(c->layer, &job->plan);
    for (size_t r = 0; r < state->n_rows; r++) sqz_softmax_raise(state, r, job->reference[r]);
    n_listed = list_rows(t->index, 0, wanted, job->pieces, &next, end);
    /* The first rows, for which no earlier pass has asked. No function of its own: compilers see one that only
     * prefetches as one without effect, and drop it. */
    const size_t row_bytes = sqz_row_data_bytes(job->retained.type, d), line = 64;
    for (size_t j = 0; j < n_listed && j * row_bytes < SQZ_LISTED_AHEAD * line; j++)
        for (size_t i = 0; i < row_bytes; i += line)
            __builtin_prefetch((const char *)sqz_row_at(&job->retained, 0, d, 0, t->index[j]) + i, 0, 2);
    for (; n_listed > 0; n_listed = list_rows(t->index, n_listed, wanted, job->pieces, &next, end)) {
        const size_t n = n_listed < SQZ_CLAIM_ROWS ? n_listed : SQZ_CLAIM_ROWS;
        sqz_rows_listed_logits(t->logits, SQZ_CLAIM_ROWS, &job->rows, &job->retained, t->index, n, n_listed, d);
        sqz_add_weigh(state, t->logits, SQZ_CLAIM_ROWS, n, skip);
        t->value_bytes_read +=
            sqz_rows_accumulate(state->out, t->logits, SQZ_CLAIM_ROWS, state->n_rows, &job->values, t->index, 0, n, d);
        n_listed -= n;
        memmove(t->index, t->index + n, n_listed * sizeof *t->index);
    }
}

void sqz_job_fill_empty(const struct sqz_attend_call *c, const struct sqz_job *job, struct sqz_job_scratch *t,
                        struct sqz_softmax *state)
{
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim, n = layer->n_fixed;
    if (sqz_job_is_dense(c, &job->plan) || !layer->value_skip || n == 0) return;
    for (size_t r = 0; r < state->n_rows; r++) {
        if (state->sum[r] >= FLT_MIN) continue;
        const struct sqz_row_queries query = sqz_row_queries_part(&job->rows, r, 1, d);
        struct sqz_softmax row = {1, d, state->out + r * d, state->maximum + r, state->sum + r};
        sqz_softmax_reset(&row);
        sqz_rows_logits(t->logits, n, &query, &job->keys, 0, n, d, NULL);
        t->value_bytes_read += sqz_add_known(&row, t->logits, n, n, &job->values, 0, 0);
    }
}
