/*
 * Attention of tokens that follow a context: lookup, exact attention on what is
 * retained, the tail, the user's own rows, and the merge.
 *
 * A generated token is one job a KV head. A job first looks up (centroids, the
 * fixed rows and the user's rows), which also gives an estimate of the softmax
 * denominator; its retained rows are then split into claims that all threads
 * take in turn, so that one query keeps every core busy even when heads retain
 * very different amounts. Weights are taken relative to that denominator, so a
 * row's weight is its probability and rows below the threshold need no value.
 *
 * Blocks of tokens that share a selection go through tiles of matrix products
 * instead, one block a thread.
 */
#define _POSIX_C_SOURCE 200809L /* sched_yield */
#include <float.h>
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>

#include "arena.h"
#include "attention.h"
#include "kernels.h"
#include "lookup.h"
#include "softmax.h"

#ifdef _OPENMP
#include <omp.h>
#endif

enum {
    CLAIM_ROWS = 256,     /* rows a thread takes at a time: 32 KiB of keys at head dim 64 */
    N_SLOTS = 8,          /* a head's claims are summed in this many parts, whatever the thread count, and the parts in
                             order: results do not depend on which thread was faster */
    EXPONENT_SLACK = 40,  /* a logit this far above the estimated denominator rescales the state */
};

/* ---- Buffers ---------------------------------------------------------------- */

struct job {
    uint32_t head;
    size_t token;
    float *queries;      /* [R][D] */
    float *norms, *base; /* [R] */
    float *reference;    /* [R] estimated log denominator */
    struct sqz_head_plan plan;
    struct sqz_selection selection;
    void *lookup;
    struct sqz_range *claims; /* pieces of the retained ranges, at most CLAIM_ROWS rows each */
    size_t n_claims;
    atomic_size_t next_slot;
    atomic_int ready;
    uint64_t centroid_rows_read, value_centroid_rows_read, key_rows_read;
};

struct thread_scratch {
    float *logits;       /* [G][logits_stride] */
    float *copy;         /* [logits_stride] */
    float *tail;         /* [G][C] */
    struct sqz_tile_scratch tile;
    uint16_t *gather_keys, *gather_values; /* [TILE][D] */
    uint32_t *first, *last;
    struct sqz_softmax state;              /* of the block in hand */
    uint64_t value_rows_read;
};

struct layout {
    size_t rows, group, n_jobs, logits_stride, max_clusters, max_claims;
};

static size_t max_size(size_t a, size_t b)
{
    return a > b ? a : b;
}

static struct layout layout_of(const struct sqz_layer *layer, size_t max_user_rows, size_t max_block_tokens,
                               int n_threads)
{
    struct layout l;
    l.group = layer->shape.n_head / layer->shape.n_head_kv;
    l.rows = l.group * max_block_tokens;
    l.n_jobs = max_size(layer->shape.n_head_kv, (size_t)n_threads);
    l.max_clusters = layer->n_levels ? layer->level[0].n_clusters : 0;
    l.logits_stride = max_size(max_size(layer->n_levels ? layer->n_fixed : 0, max_user_rows), CLAIM_ROWS);
    l.max_claims = layer->n_rows / CLAIM_ROWS + l.max_clusters + 2;
    return l;
}

static void carve_job(struct sqz_arena *arena, struct job *job, const struct layout *l, size_t d)
{
    job->queries = sqz_arena_take(arena, l->rows * d, sizeof(float));
    job->norms = sqz_arena_take(arena, l->rows, sizeof(float));
    job->base = sqz_arena_take(arena, l->rows, sizeof(float));
    job->reference = sqz_arena_take(arena, l->rows, sizeof(float));
    job->claims = sqz_arena_take(arena, l->max_claims, sizeof(struct sqz_range));
    job->lookup = sqz_arena_take(arena, l->max_clusters ? sqz_lookup_workspace_bytes(l->max_clusters, l->rows, d) : 0, 1);
}

static struct sqz_softmax carve_state(struct sqz_arena *arena, size_t rows, size_t d)
{
    struct sqz_softmax state = {rows, d, NULL, NULL, NULL};
    state.out = sqz_arena_take(arena, rows * d, sizeof(float));
    state.maximum = sqz_arena_take(arena, rows, sizeof(float));
    state.sum = sqz_arena_take(arena, rows, sizeof(float));
    return state;
}

static void carve_thread(struct sqz_arena *arena, struct thread_scratch *s, const struct layout *l,
                         const struct sqz_layer_shape *shape)
{
    const size_t d = shape->head_dim, tile = SQZ_TILE_ROWS;
    s->logits = sqz_arena_take(arena, l->group * l->logits_stride, sizeof(float));
    s->copy = sqz_arena_take(arena, l->logits_stride, sizeof(float));
    s->tail = sqz_arena_take(arena, l->group * max_size(l->max_clusters, 1), sizeof(float));
    s->tile.logits = sqz_arena_take(arena, l->rows * tile, sizeof(float));
    s->tile.keys = sqz_arena_take(arena, tile * d, sizeof(float));
    s->tile.values = sqz_arena_take(arena, tile * d, sizeof(float));
    s->gather_keys = sqz_arena_take(arena, tile * d, sizeof(uint16_t));
    s->gather_values = sqz_arena_take(arena, tile * d, sizeof(uint16_t));
    s->first = sqz_arena_take(arena, l->rows, sizeof(uint32_t));
    s->last = sqz_arena_take(arena, l->rows, sizeof(uint32_t));
    s->state = carve_state(arena, l->rows, d);
}

/* Partial results of one token: for every KV head what its lookup gives, then one for each slot of claims. */
static struct sqz_softmax *carve_parts(struct sqz_arena *arena, const struct layout *l, const struct sqz_layer_shape *shape)
{
    const size_t n = shape->n_head_kv * (1 + (size_t)N_SLOTS);
    struct sqz_softmax *parts = sqz_arena_take(arena, n, sizeof *parts);
    for (size_t i = 0; i < n; i++) {
        const struct sqz_softmax state = carve_state(arena, l->group, shape->head_dim);
        if (arena->base) parts[i] = state;
    }
    return parts;
}

size_t sqz_attend_workspace_bytes(const struct sqz_layer *layer, size_t max_user_rows, size_t max_block_tokens,
                                  int n_threads)
{
    const struct layout l = layout_of(layer, max_user_rows, max_block_tokens, n_threads);
    struct sqz_arena arena = sqz_arena_on(NULL);
    struct job job;
    struct thread_scratch scratch;
    sqz_arena_take(&arena, l.n_jobs, sizeof(struct job));
    sqz_arena_take(&arena, (size_t)n_threads, sizeof(struct thread_scratch));
    for (size_t i = 0; i < l.n_jobs; i++) carve_job(&arena, &job, &l, layer->shape.head_dim);
    for (int i = 0; i < n_threads; i++) carve_thread(&arena, &scratch, &l, &layer->shape);
    carve_parts(&arena, &l, &layer->shape);
    return sqz_arena_bytes(&arena);
}

/* ---- Rows: few queries, rows read once ------------------------------------------- */

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
        if (!(maximum <= state->maximum[r] + EXPONENT_SLACK)) sqz_softmax_raise(state, r, maximum);
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

/* What weights of query row r are taken relative to: the estimated log denominator. A wide cluster may be estimated far
 * too high; the reference then stays where the largest of the known rows and the tail neither underflows nor is
 * skipped. */
static float reference_of(const struct sqz_layer *layer, const struct sqz_selection *s, size_t r, float known_maximum)
{
    const float tail =
        layer->tail ? sqz_kernels_get()->max(s->pruned_logit + r * s->pruned_stride, s->n_pruned) : -INFINITY;
    const float largest = fmaxf(known_maximum + EXPONENT_SLACK, tail);
    return largest == -INFINITY ? s->log_total[r] : fminf(s->log_total[r], largest);
}

/* What pruned clusters would have contributed, from their value centroids. */
static size_t add_tail_rows(struct sqz_softmax *state, const struct sqz_layer *layer, struct job *job, float *weights,
                            float skip_below)
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

/* Rows of the context that a token's window lets it see, for layers that keep only a window. */
static size_t first_visible_row(const struct sqz_attend_call *c, size_t token)
{
    const struct sqz_layer *layer = c->layer;
    if (!layer->sliding_window) return 0;
    const size_t position = c->n_context_tokens + c->n_user - c->n_tokens + token;
    const size_t row0 = c->n_context_tokens - layer->n_rows; /* position of row 0 */
    const size_t oldest = position + 1 > layer->n_window_tokens ? position + 1 - layer->n_window_tokens : 0;
    if (oldest <= row0) return 0;
    return oldest - row0 < layer->n_rows ? oldest - row0 : layer->n_rows;
}

static size_t first_visible_user_row(const struct sqz_attend_call *c, size_t token)
{
    if (!c->layer->sliding_window) return 0;
    const size_t position = c->n_context_tokens + c->n_user - c->n_tokens + token;
    const size_t oldest =
        position + 1 > c->layer->n_window_tokens ? position + 1 - c->layer->n_window_tokens : 0;
    return oldest > c->n_context_tokens ? oldest - c->n_context_tokens : 0;
}

static size_t user_rows_seen(const struct sqz_attend_call *c, size_t token)
{
    return c->n_user ? c->n_user - c->n_tokens + token + 1 : 0;
}

static void gather_queries(const struct sqz_attend_call *c, struct job *job, size_t n_tokens)
{
    const size_t d = c->layer->shape.head_dim, group = c->layer->shape.n_head / c->layer->shape.n_head_kv;
    for (size_t r = 0; r < n_tokens * group; r++) {
        const float *q = c->queries + (job->token + r / group) * c->query_token_stride +
                         (job->head * group + r % group) * c->query_head_stride;
        float norm = 0;
        for (size_t i = 0; i < d; i++) norm += q[i] * q[i];
        memcpy(job->queries + r * d, q, d * sizeof *q);
        job->norms[r] = norm;
    }
}

static void split_claims(struct job *job, uint32_t begin, uint32_t end)
{
    while (begin < end) {
        const uint32_t n = end - begin < CLAIM_ROWS ? end - begin : CLAIM_ROWS;
        job->claims[job->n_claims++] = (struct sqz_range){begin, begin + n};
        begin += n;
    }
}

static bool is_dense(const struct sqz_attend_call *c, const struct sqz_head_plan *plan)
{
    return c->layer->n_levels == 0 || plan->log_threshold == -INFINITY;
}

static float value_skip_of(const struct sqz_layer *layer, const struct sqz_head_plan *plan)
{
    return layer->value_skip ? SQZ_VALUE_SKIP * expf(plan->log_threshold) : 0.0f;
}

/* Lookup of one token in one head and everything that needs no claims: fixed rows, user rows, tail. */
static void begin_job(const struct sqz_attend_call *c, struct job *job, struct thread_scratch *t,
                      struct sqz_softmax *state)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv;
    const uint16_t *keys = layer->keys + (size_t)job->head * layer->n_rows * d;
    const uint16_t *values = layer->values + (size_t)job->head * layer->n_rows * d;
    const float scale = layer->shape.scale;
    gather_queries(c, job, 1);
    job->plan = sqz_head_plan_at(layer, job->head, c->budget, c->log_offset);
    const bool dense = is_dense(c, &job->plan);
    job->n_claims = 0;
    job->centroid_rows_read = job->value_centroid_rows_read = job->key_rows_read = 0;

    const size_t user_first = first_visible_user_row(c, job->token), user_last = user_rows_seen(c, job->token);
    const size_t n_user = user_last > user_first ? user_last - user_first : 0;
    const size_t user_at = ((size_t)job->head * c->user_capacity_rows + user_first) * d;
    const uint16_t *user_keys = n_user ? c->user_keys + user_at : NULL;
    const uint16_t *user_values = n_user ? c->user_values + user_at : NULL;
    float *logits = t->logits;
    const size_t stride = max_size(n_user, CLAIM_ROWS);
    if (n_user) k->row_logits(logits, stride, job->queries, group, user_keys, n_user, d, scale);

    if (dense) {
        for (size_t r = 0; r < group; r++) state->maximum[r] = -INFINITY;
        add_rows(state, logits, stride, n_user, user_values, 0);
        split_claims(job, (uint32_t)first_visible_row(c, job->token), layer->n_rows);
        return;
    }

    /* The denominator so far: user rows and fixed rows, exactly. */
    float base[SQZ_MAX_GROUP_QUERIES];
    add_rows(state, logits, stride, n_user, user_values, 0);
    float *fixed = t->logits;
    const size_t fixed_stride = max_size(layer->n_fixed, CLAIM_ROWS);
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
        job->reference[r] = reference_of(layer, &job->selection, r, state->maximum[r]);
        sqz_softmax_raise(state, r, job->reference[r]);
    }
    const float skip = value_skip_of(layer, &job->plan);
    t->value_rows_read += add_rows(state, fixed, fixed_stride, layer->n_fixed, values, skip);
    job->value_centroid_rows_read = add_tail_rows(state, layer, job, t->tail, skip);
    job->centroid_rows_read = job->selection.n_centroids_read;
    job->key_rows_read = layer->n_fixed;
    for (size_t i = 0; i < job->selection.n_ranges; i++)
        split_claims(job, job->selection.ranges[i].begin, job->selection.ranges[i].end);
}

/* Skipping values may leave a query row with nothing, when no row weighs as much as the threshold: such a row gets
 * exact attention over the fixed rows. */
static void fill_empty_rows(const struct sqz_attend_call *c, const struct job *job, struct thread_scratch *t,
                            struct sqz_softmax *state)
{
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim, n = layer->n_fixed, at = (size_t)job->head * layer->n_rows * d;
    if (is_dense(c, &job->plan) || !layer->value_skip || n == 0) return;
    for (size_t r = 0; r < state->n_rows; r++) {
        if (state->sum[r] >= FLT_MIN) continue;
        struct sqz_softmax row = {1, d, state->out + r * d, state->maximum + r, state->sum + r};
        sqz_softmax_reset(&row);
        sqz_kernels_get()->row_logits(t->logits, n, job->queries + r * d, 1, layer->keys + at, n, d,
                                      layer->shape.scale);
        t->value_rows_read += add_rows(&row, t->logits, n, n, layer->values + at, 0);
    }
}

static void run_claim(const struct sqz_attend_call *c, struct job *job, size_t claim, struct thread_scratch *t,
                      struct sqz_softmax *state)
{
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim;
    const struct sqz_range range = job->claims[claim];
    const size_t n = range.end - range.begin, row = (size_t)job->head * layer->n_rows + range.begin;
    sqz_kernels_get()->row_logits(t->logits, CLAIM_ROWS, job->queries, state->n_rows, layer->keys + row * d, n, d,
                                  layer->shape.scale);
    const float skip = is_dense(c, &job->plan) ? 0.0f : value_skip_of(layer, &job->plan);
    t->value_rows_read += add_rows(state, t->logits, CLAIM_ROWS, n, layer->values + row * d, skip);
}

/* ---- Blocks: many queries share a selection ------------------------------------------ */

static void add_contiguous(struct sqz_softmax *state, const float *queries, float scale, const uint16_t *keys,
                           const uint16_t *values, size_t begin, size_t end, struct thread_scratch *t)
{
    const size_t d = state->head_dim;
    for (size_t at = begin; at < end; at += SQZ_TILE_ROWS) {
        const size_t n = end - at < SQZ_TILE_ROWS ? end - at : SQZ_TILE_ROWS;
        sqz_softmax_add_tile(state, queries, scale, keys + at * d, values + at * d, n, NULL, NULL, &t->tile);
    }
}

/* Rows [begin, end) of which query row r sees [first(r), last(r)). */
static void add_limited(struct sqz_softmax *state, const float *queries, float scale, const uint16_t *keys,
                        const uint16_t *values, size_t begin, size_t end, const size_t *first, const size_t *last,
                        size_t group, struct thread_scratch *t)
{
    const size_t d = state->head_dim;
    for (size_t at = begin; at < end; at += SQZ_TILE_ROWS) {
        const size_t n = end - at < SQZ_TILE_ROWS ? end - at : SQZ_TILE_ROWS;
        for (size_t r = 0; r < state->n_rows; r++) {
            const size_t low = first[r / group] > at ? first[r / group] - at : 0;
            const size_t high = last[r / group] > at ? last[r / group] - at : 0;
            t->last[r] = (uint32_t)(high < n ? high : n);
            t->first[r] = (uint32_t)(low < t->last[r] ? low : t->last[r]);
        }
        sqz_softmax_add_tile(state, queries, scale, keys + at * d, values + at * d, n, t->first, t->last, &t->tile);
    }
}

/* Retained rows, copied side by side so that short ranges fill whole tiles. */
static void add_gathered(struct sqz_softmax *state, const float *queries, float scale, const uint16_t *keys,
                         const uint16_t *values, const struct sqz_range *ranges, size_t n_ranges,
                         struct thread_scratch *t)
{
    const size_t d = state->head_dim;
    size_t filled = 0;
    for (size_t i = 0; i < n_ranges; i++) {
        size_t at = ranges[i].begin;
        while (at < ranges[i].end) {
            size_t n = ranges[i].end - at;
            if (n > SQZ_TILE_ROWS - filled) n = SQZ_TILE_ROWS - filled;
            memcpy(t->gather_keys + filled * d, keys + at * d, n * d * sizeof *keys);
            memcpy(t->gather_values + filled * d, values + at * d, n * d * sizeof *values);
            filled += n;
            at += n;
            if (filled == SQZ_TILE_ROWS) {
                sqz_softmax_add_tile(state, queries, scale, t->gather_keys, t->gather_values, filled, NULL, NULL,
                                     &t->tile);
                filled = 0;
            }
        }
    }
    if (filled)
        sqz_softmax_add_tile(state, queries, scale, t->gather_keys, t->gather_values, filled, NULL, NULL, &t->tile);
}

static size_t add_tail_block(struct sqz_softmax *state, const struct sqz_layer *layer, struct job *job, float skip_below,
                             struct thread_scratch *t)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const struct sqz_selection *s = &job->selection;
    const size_t d = state->head_dim;
    size_t read = 0, filled = 0;
    if (!layer->tail) return 0;
    for (size_t r = 0; r < state->n_rows; r++) {
        sqz_softmax_raise(state, r, reference_of(layer, s, r, state->maximum[r]));
        k->exp_sum(s->pruned_logit + r * s->pruned_stride, s->n_pruned, state->maximum[r]);
    }
    for (size_t p = 0; p <= s->n_pruned; p++) {
        if (filled == SQZ_TILE_ROWS || (p == s->n_pruned && filled)) {
            k->f16_to_f32(t->tile.values, t->gather_values, filled * d);
            k->gemm(state->out, d, t->tile.logits, SQZ_TILE_ROWS, t->tile.values, d, state->n_rows, d, filled, 1.0f,
                    true);
            read += filled;
            filled = 0;
        }
        if (p == s->n_pruned) break;
        float largest = 0;
        for (size_t r = 0; r < state->n_rows; r++) largest = fmaxf(largest, s->pruned_logit[r * s->pruned_stride + p]);
        if (!(largest * s->pruned_keys[p] >= skip_below)) continue;
        for (size_t r = 0; r < state->n_rows; r++) {
            const float weight = s->pruned_logit[r * s->pruned_stride + p] * s->pruned_keys[p];
            t->tile.logits[r * SQZ_TILE_ROWS + filled] = weight;
            state->sum[r] += weight;
        }
        const struct sqz_level *level = &layer->level[s->pruned[p].level];
        const size_t row = (size_t)job->head * level->n_clusters + s->pruned[p].cluster;
        memcpy(t->gather_values + filled * d, level->value_centroids + row * d, d * sizeof(uint16_t));
        filled++;
    }
    return read;
}

/* Retained rows that bring a block to the head's share of the bytes: value centroids may all be read. */
static size_t rows_for_share(const struct sqz_layer *layer, uint32_t head, float budget, float log_offset)
{
    const struct sqz_head_plan plan = sqz_head_plan_at(layer, head, budget, log_offset);
    const float *share = layer->share + (size_t)head * layer->n_curve;
    size_t i = 0;
    while (i + 1 < layer->n_curve && layer->log_threshold[i + 1] <= plan.log_threshold) i++;
    const double row_bytes = 4.0 * layer->shape.head_dim;
    double bytes = (double)share[i] * layer->n_rows * row_bytes;
    if (i + 1 < layer->n_curve) {
        const double step = layer->log_threshold[i + 1] - layer->log_threshold[i];
        const double fraction = step > 0 ? (plan.log_threshold - layer->log_threshold[i]) / step : 0;
        bytes = (share[i] + fraction * (share[i + 1] - share[i])) * layer->n_rows * row_bytes;
    }
    bytes -= layer->n_fixed * row_bytes;
    bytes -= (double)layer->level[layer->n_levels - 1].n_clusters * (double)sqz_centroid_bytes(layer);
    if (layer->tail) bytes -= layer->level[layer->n_levels - 1].n_clusters * row_bytes / 2;
    return bytes > row_bytes ? (size_t)(bytes / row_bytes) : 1;
}

static void run_block(const struct sqz_attend_call *c, struct job *job, size_t n_tokens, struct thread_scratch *t,
                      struct sqz_softmax *state)
{
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv;
    const uint16_t *keys = layer->keys + (size_t)job->head * layer->n_rows * d;
    const uint16_t *values = layer->values + (size_t)job->head * layer->n_rows * d;
    const float scale = layer->shape.scale;
    gather_queries(c, job, n_tokens);
    job->plan = sqz_head_plan_at(layer, job->head, c->budget, c->log_offset);
    job->centroid_rows_read = job->value_centroid_rows_read = 0;

    size_t first[SQZ_MAX_BLOCK_TOKENS], last[SQZ_MAX_BLOCK_TOKENS];
    if (c->n_user) {
        for (size_t i = 0; i < n_tokens; i++) {
            first[i] = first_visible_user_row(c, job->token + i);
            last[i] = user_rows_seen(c, job->token + i);
        }
        const size_t base = (size_t)job->head * c->user_capacity_rows * d;
        add_limited(state, job->queries, scale, c->user_keys + base, c->user_values + base, first[0],
                    last[n_tokens - 1], first, last, group, t);
    }
    if (is_dense(c, &job->plan)) {
        if (layer->sliding_window) {
            for (size_t i = 0; i < n_tokens; i++) {
                first[i] = first_visible_row(c, job->token + i);
                last[i] = layer->n_rows;
            }
            add_limited(state, job->queries, scale, keys, values, first[0], layer->n_rows, first, last, group, t);
        } else {
            add_contiguous(state, job->queries, scale, keys, values, 0, layer->n_rows, t);
        }
        job->key_rows_read = layer->n_rows;
        t->value_rows_read += layer->n_rows;
        return;
    }
    add_contiguous(state, job->queries, scale, keys, values, 0, layer->n_fixed, t);
    for (size_t r = 0; r < state->n_rows; r++)
        job->base[r] = state->sum[r] > 0 ? state->maximum[r] + logf(state->sum[r]) : -INFINITY;
    const bool paper = layer->rule == SQZ_RULE_PAPER;
    sqz_lookup(&job->selection, layer, job->head, &job->plan, job->queries, job->norms, state->n_rows,
               paper ? NULL : job->base, paper ? 0 : rows_for_share(layer, job->head, c->budget, c->log_offset),
               job->lookup);
    add_gathered(state, job->queries, scale, keys, values, job->selection.ranges, job->selection.n_ranges, t);
    job->value_centroid_rows_read = add_tail_block(state, layer, job, value_skip_of(layer, &job->plan), t);
    job->centroid_rows_read = job->selection.n_centroids_read;
    job->key_rows_read = layer->n_fixed + job->selection.n_retained;
    t->value_rows_read += job->key_rows_read;
}

/* ---- The call -------------------------------------------------------------------------- */

static void write_out(const struct sqz_attend_call *c, const struct job *job, size_t n_tokens,
                      const struct sqz_softmax *state)
{
    const size_t d = state->head_dim, group = c->layer->shape.n_head / c->layer->shape.n_head_kv;
    for (size_t r = 0; r < n_tokens * group; r++) {
        const size_t token = job->token + r / group, head = job->head * group + r % group;
        float *out = c->out + token * c->out_token_stride + head * c->out_head_stride;
        const bool any = state->sum[r] >= FLT_MIN; /* nothing seen at all, or next to nothing: output 0 */
        const float inverse = any ? 1.0f / state->sum[r] : 0.0f;
        for (size_t i = 0; i < d; i++) out[i] = state->out[r * d + i] * inverse;
        if (c->lse)
            c->lse[token * c->layer->shape.n_head + head] =
                any ? state->maximum[r] + logf(state->sum[r]) : -INFINITY;
    }
}

struct totals {
    uint64_t selections, centroid_rows, value_centroid_rows, key_rows, value_rows;
};

static void count_job(const struct job *job, struct totals *totals)
{
    totals->selections++;
    totals->centroid_rows += job->centroid_rows_read;
    totals->value_centroid_rows += job->value_centroid_rows_read;
    totals->key_rows += job->key_rows_read;
}

static void add_stats(const struct sqz_attend_call *c, const struct totals *t)
{
    /* Layers that keep only a window cost the same at any context length: no budget applies to them. */
    if (!c->stats || c->layer->sliding_window) return;
    const uint64_t row_bytes = (uint64_t)c->layer->shape.head_dim * sizeof(uint16_t);
    c->stats->n_selections += t->selections;
    c->stats->context_bytes += t->selections * 2 * c->layer->n_rows * row_bytes;
    c->stats->centroid_bytes += t->centroid_rows * sqz_centroid_bytes(c->layer) + t->value_centroid_rows * row_bytes;
    c->stats->key_bytes += t->key_rows * row_bytes;
    c->stats->value_bytes += t->value_rows * row_bytes;
    c->stats->retained_keys += t->key_rows;
    c->stats->total_keys += t->selections * c->layer->n_rows;
}

/* Takes slots of a job's claims until none is left. parts[1 + slot] receives the slot's sum. */
static void run_slots(const struct sqz_attend_call *c, struct job *job, struct thread_scratch *t,
                      struct sqz_softmax *parts)
{
    for (;;) {
        const size_t slot = atomic_fetch_add_explicit(&job->next_slot, 1, memory_order_relaxed);
        if (slot >= N_SLOTS) return;
        struct sqz_softmax *part = &parts[1 + slot];
        sqz_softmax_reset(part);
        if (!is_dense(c, &job->plan))
            for (size_t r = 0; r < part->n_rows; r++) sqz_softmax_raise(part, r, job->reference[r]);
        for (size_t i = slot * job->n_claims / N_SLOTS; i < (slot + 1) * job->n_claims / N_SLOTS; i++)
            run_claim(c, job, i, t, part);
    }
}

static int thread_number(void)
{
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* Waits until another thread has looked a head up. Spins briefly, then lets others run: on a busy machine that thread
 * may have lost its core. */
static void wait_ready(struct job *job)
{
    for (unsigned spins = 0; !atomic_load_explicit(&job->ready, memory_order_acquire); spins++) {
        if (spins > 1000) sched_yield();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
    }
}

static uint64_t claimed_rows(const struct job *job)
{
    uint64_t n = 0;
    for (size_t i = 0; i < job->n_claims; i++) n += job->claims[i].end - job->claims[i].begin;
    return n;
}

/* One token: every head is a job, all threads share the claims of all jobs. */
static void attend_one(const struct sqz_attend_call *c, struct job *jobs, struct thread_scratch *threads,
                       struct sqz_softmax *parts, struct totals *totals)
{
    const size_t n_heads = c->layer->shape.n_head_kv;
    atomic_size_t next_head = 0;
    for (size_t h = 0; h < n_heads; h++) {
        jobs[h].head = (uint32_t)h;
        jobs[h].token = 0;
        atomic_init(&jobs[h].next_slot, 0);
        atomic_init(&jobs[h].ready, 0);
    }
#pragma omp parallel num_threads(c->n_threads)
    {
        struct thread_scratch *t = &threads[thread_number()];
        for (;;) {
            const size_t h = atomic_fetch_add_explicit(&next_head, 1, memory_order_relaxed);
            if (h >= n_heads) break;
            sqz_softmax_reset(&parts[h * (1 + N_SLOTS)]);
            begin_job(c, &jobs[h], t, &parts[h * (1 + N_SLOTS)]);
            atomic_store_explicit(&jobs[h].ready, 1, memory_order_release);
        }
        for (size_t h = 0; h < n_heads; h++) {
            wait_ready(&jobs[h]);
            run_slots(c, &jobs[h], t, &parts[h * (1 + N_SLOTS)]);
        }
#pragma omp barrier
#pragma omp for schedule(static, 1)
        for (size_t h = 0; h < n_heads; h++) {
            struct sqz_softmax *sum = &parts[h * (1 + N_SLOTS)];
            for (size_t slot = 0; slot < N_SLOTS; slot++) sqz_softmax_merge(sum, &sum[1 + slot]);
            fill_empty_rows(c, &jobs[h], t, sum);
            write_out(c, &jobs[h], 1, sum);
        }
    }
    for (size_t h = 0; h < n_heads; h++) {
        jobs[h].key_rows_read += claimed_rows(&jobs[h]);
        count_job(&jobs[h], totals);
    }
}

/* Many tokens: items of (block x head) go to threads whole. */
static void attend_many(const struct sqz_attend_call *c, struct job *jobs, struct thread_scratch *threads,
                        struct totals *totals)
{
    const size_t n_heads = c->layer->shape.n_head_kv, group = c->layer->shape.n_head / n_heads;
    const size_t step = c->block_tokens, n_blocks = (c->n_tokens + step - 1) / step;
    const bool rows = step == 1 && group <= SQZ_MAX_GROUP_QUERIES;
    uint64_t selections = 0, centroid_rows = 0, value_centroid_rows = 0, key_rows = 0;
#pragma omp parallel num_threads(c->n_threads) reduction(+ : selections, centroid_rows, value_centroid_rows, key_rows)
    {
        const int number = thread_number();
        struct thread_scratch *t = &threads[number];
        struct job *job = &jobs[number];
        struct sqz_softmax *state = &t->state;
        struct totals mine = {0};
#pragma omp for schedule(dynamic, 1)
        for (size_t item = 0; item < n_blocks * n_heads; item++) {
            job->head = (uint32_t)(item % n_heads);
            job->token = item / n_heads * step;
            const size_t n = c->n_tokens - job->token < step ? c->n_tokens - job->token : step;
            state->n_rows = n * group;
            sqz_softmax_reset(state);
            if (rows) {
                begin_job(c, job, t, state);
                for (size_t i = 0; i < job->n_claims; i++) run_claim(c, job, i, t, state);
                fill_empty_rows(c, job, t, state);
                job->key_rows_read += claimed_rows(job);
            } else {
                run_block(c, job, n, t, state);
            }
            write_out(c, job, n, state);
            count_job(job, &mine);
        }
        selections += mine.selections;
        centroid_rows += mine.centroid_rows;
        value_centroid_rows += mine.value_centroid_rows;
        key_rows += mine.key_rows;
    }
    totals->selections += selections;
    totals->centroid_rows += centroid_rows;
    totals->value_centroid_rows += value_centroid_rows;
    totals->key_rows += key_rows;
}

void sqz_attend(const struct sqz_attend_call *c)
{
    const struct sqz_layer *layer = c->layer;
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv;
    const struct layout l = layout_of(layer, c->n_user, c->block_tokens, c->n_threads);
    struct sqz_arena arena = sqz_arena_on(c->workspace);
    struct job *jobs = sqz_arena_take(&arena, l.n_jobs, sizeof *jobs);
    struct thread_scratch *threads = sqz_arena_take(&arena, (size_t)c->n_threads, sizeof *threads);
    for (size_t i = 0; i < l.n_jobs; i++) carve_job(&arena, &jobs[i], &l, layer->shape.head_dim);
    for (int i = 0; i < c->n_threads; i++) {
        carve_thread(&arena, &threads[i], &l, &layer->shape);
        threads[i].value_rows_read = 0;
    }
    struct sqz_softmax *parts = carve_parts(&arena, &l, &layer->shape);
    struct totals totals = {0};
    if (c->n_tokens == 1 && group <= SQZ_MAX_GROUP_QUERIES) attend_one(c, jobs, threads, parts, &totals);
    else attend_many(c, jobs, threads, &totals);
    for (int i = 0; i < c->n_threads; i++) totals.value_rows += threads[i].value_rows_read;
    add_stats(c, &totals);
}
