/*
 * Parts of attention by themselves: all lookups of a call, the bare read of what
 * they retain, and the merge of partial sums. Each with what it works on, laid out
 * as sqz_attend() lays it out.
 */
#include "bench_kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "random.h"
#include "softmax.h"
#include "threads.h"

/* ---- The lookup --------------------------------------------------------------------------- */

void bench_lookup_carve(struct bench_lookup *l, struct sqz_arena *arena, const struct sqz_layer *layer,
                        size_t n_queries, size_t block_tokens, int n_threads)
{
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv;
    const size_t rows = n_queries * layer->shape.n_head;
    l->queries = sqz_arena_take(arena, rows, d, sizeof(float));
    l->norms = sqz_arena_take(arena, rows, 1, sizeof(float));
    l->base = sqz_arena_take(arena, rows, 1, sizeof(float));
    l->workspace_bytes = sqz_lookup_workspace_bytes(layer, block_tokens * group);
    l->workspace_bytes = (l->workspace_bytes + 4095) / 4096 * 4096; /* threads share no cache line */
    l->workspace = sqz_arena_take(arena, (size_t)n_threads, l->workspace_bytes, 1);
}

void bench_lookup_fill(struct bench_lookup *l, const struct sqz_attend_call *call)
{
    const struct sqz_layer_shape *shape = &call->layer->shape;
    const size_t d = shape->head_dim, group = shape->n_head / shape->n_head_kv, rows = call->n_tokens * group;
    const int n_threads = call->n_threads;
    (void)n_threads; /* without OpenMP it is one */
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
    for (size_t h = 0; h < shape->n_head_kv; h++) {
        for (size_t r = 0; r < rows; r++) {
            const float *query = call->queries + r / group * call->query_token_stride +
                                 (h * group + r % group) * call->query_head_stride;
            float norm = 0.0f;
            for (size_t i = 0; i < d; i++) norm += query[i] * query[i];
            memcpy(l->queries + (h * rows + r) * d, query, d * sizeof *query);
            l->norms[h * rows + r] = norm;
        }
        check_base_lse(call, (uint32_t)h, l->base + h * rows);
    }
}

struct bench_lookup_counts bench_lookup_run(struct bench_lookup *l, const struct sqz_attend_call *call,
                                            size_t retain_rows)
{
    const struct sqz_layer_shape *shape = &call->layer->shape;
    const size_t d = shape->head_dim, n_heads = shape->n_head_kv, group = shape->n_head / n_heads;
    const size_t step = call->block_tokens, rows = call->n_tokens * group;
    const size_t n_blocks = (call->n_tokens + step - 1) / step;
    size_t n_centroids = 0, n_codes = 0, code_bytes = 0, n_retained = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(call->n_threads)                                        \
    reduction(+ : n_centroids, n_codes, code_bytes, n_retained)
    for (size_t item = 0; item < n_blocks * n_heads; item++) {
        const size_t head = item % n_heads, first = item / n_heads * step;
        const size_t n = call->n_tokens - first < step ? call->n_tokens - first : step;
        const size_t at = head * rows + first * group;
        const struct sqz_head_plan plan = sqz_head_plan_at(call->layer, (uint32_t)head, call->budget, call->log_offset);
        struct sqz_selection selection;
        sqz_lookup(&selection, call->layer, (uint32_t)head, &plan, l->queries + at * d, l->norms + at, n * group,
                   l->base + at, retain_rows, l->workspace + (size_t)sqz_thread_number() * l->workspace_bytes);
        n_centroids += selection.n_centroids_read;
        n_codes += selection.n_codes_read;
        code_bytes += selection.code_bytes_read;
        n_retained += selection.n_retained;
    }
    return (struct bench_lookup_counts){n_centroids, code_bytes, n_codes, n_retained};
}

/* ---- The bare read -------------------------------------------------------------------------- */

enum { READ_PARTS = 32, READ_AHEAD = 2 }; /* parts a head is cut into; pieces asked for ahead, as attention does */

void bench_read_carve(struct bench_read *read, struct sqz_arena *arena, const struct sqz_layer *layer)
{
    read->layer = layer;
    read->max_ranges = layer->codes.n_words ? (layer->n_rows - layer->n_fixed) / 2 + 1 : layer->level[0].n_clusters;
    read->ranges = sqz_arena_take(arena, layer->shape.n_head_kv, read->max_ranges, sizeof *read->ranges);
    read->n_ranges = sqz_arena_take(arena, layer->shape.n_head_kv, 1, sizeof *read->n_ranges);
}

void bench_read_fill(struct bench_read *read, const struct bench_lookup *l, const struct sqz_attend_call *call)
{
    const struct sqz_layer_shape *shape = &call->layer->shape;
    const size_t d = shape->head_dim, group = shape->n_head / shape->n_head_kv;
    read->n_rows = 0;
    read->n_threads = call->n_threads;
    for (uint32_t h = 0; h < shape->n_head_kv; h++) {
        const struct sqz_head_plan plan = sqz_head_plan_at(call->layer, h, call->budget, call->log_offset);
        struct sqz_selection selection;
        sqz_lookup(&selection, call->layer, h, &plan, l->queries + h * group * d, l->norms + h * group, group,
                   l->base + h * group, 0, l->workspace);
        memcpy(read->ranges + h * read->max_ranges, selection.ranges, selection.n_ranges * sizeof *read->ranges);
        read->n_ranges[h] = selection.n_ranges;
        read->n_rows += selection.n_retained;
    }
}

static inline __attribute__((always_inline)) void ask_for_lines(const uint16_t *rows, struct sqz_range range, size_t d)
{
    const char *first = (const char *)(rows + range.begin * d);
    for (size_t i = 0; i < (range.end - range.begin) * d * sizeof *rows; i += 64) __builtin_prefetch(first + i, 0, 2);
}

static uint64_t sum_lines(const uint16_t *rows, struct sqz_range range, size_t d)
{
    const size_t n = (range.end - range.begin) * d;
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i += 32) /* one number of every line is enough to bring it */
        sum += rows[range.begin * d + i];
    return sum;
}

void bench_read_run(const struct bench_read *read)
{
    const struct sqz_layer *layer = read->layer;
    const size_t d = layer->shape.head_dim, n_heads = layer->shape.n_head_kv;
    volatile uint64_t sink;
    uint64_t sum = 0;
#pragma omp parallel for schedule(dynamic, 1) reduction(+ : sum) num_threads(read->n_threads)
    for (size_t item = 0; item < n_heads * READ_PARTS; item++) {
        const size_t head = item / READ_PARTS, part = item % READ_PARTS, n = read->n_ranges[head];
        const size_t end = n * (part + 1) / READ_PARTS;
        const struct sqz_range *ranges = read->ranges + head * read->max_ranges;
        const uint16_t *keys = sqz_rows_f16(&layer->keys) + head * layer->n_rows * d;
        const uint16_t *values = sqz_rows_f16(&layer->values) + head * layer->n_rows * d;
        for (size_t i = n * part / READ_PARTS; i < end; i++) {
            if (i + READ_AHEAD < end) {
                ask_for_lines(keys, ranges[i + READ_AHEAD], d);
                ask_for_lines(values, ranges[i + READ_AHEAD], d);
            }
            sum += sum_lines(keys, ranges[i], d) + sum_lines(values, ranges[i], d);
        }
    }
    sink = sum;
    (void)sink;
}

/* ---- The merge ----------------------------------------------------------------------------- */

void bench_merge_carve(struct bench_merge *m, struct sqz_arena *arena, const struct sqz_layer *layer, size_t n_queries,
                       size_t n_parts)
{
    const size_t d = layer->shape.head_dim, rows = n_queries * (layer->shape.n_head / layer->shape.n_head_kv);
    m->n_heads = layer->shape.n_head_kv;
    m->n_parts = n_parts;
    m->states = sqz_arena_take(arena, m->n_heads, n_parts, sizeof *m->states);
    for (size_t i = 0; i < m->n_heads * n_parts; i++) {
        struct sqz_softmax state = {rows, d, NULL, NULL, NULL};
        state.out = sqz_arena_take(arena, rows, d, sizeof(float));
        state.maximum = sqz_arena_take(arena, rows, 1, sizeof(float));
        state.sum = sqz_arena_take(arena, rows, 1, sizeof(float));
        if (arena->base) m->states[i] = state;
    }
}

void bench_merge_fill(struct bench_merge *m)
{
    struct sqz_random random;
    sqz_random_seed(&random, 7);
    for (size_t i = 0; i < m->n_heads * m->n_parts; i++) {
        struct sqz_softmax *state = &m->states[i];
        for (size_t r = 0; r < state->n_rows; r++) {
            state->maximum[r] = (float)(4.0 * sqz_random_unit(&random));
            state->sum[r] = (float)(1.0 + 9.0 * sqz_random_unit(&random));
            for (size_t j = 0; j < state->head_dim; j++)
                state->out[r * state->head_dim + j] = (float)(2.0 * sqz_random_unit(&random) - 1.0);
        }
    }
}

void bench_merge_run(struct bench_merge *m)
{
    const int n_threads = m->n_threads;
    (void)n_threads; /* without OpenMP it is one */
#pragma omp parallel for schedule(static) num_threads(n_threads)
    for (size_t h = 0; h < m->n_heads; h++) {
        struct sqz_softmax *parts = m->states + h * m->n_parts;
        for (size_t i = 1; i < m->n_parts; i++) sqz_softmax_merge(&parts[0], &parts[i]);
    }
}

/* The first head's parts merged in double precision, relative to a maximum of 0: [n_rows][D + 1], the sum last. */
static double *merge_exactly(const struct bench_merge *m)
{
    const size_t d = m->states[0].head_dim, n_rows = m->states[0].n_rows;
    double *rows = calloc(n_rows * (d + 1), sizeof *rows);
    if (!rows) die("out of memory");
    for (size_t r = 0; r < n_rows; r++) {
        double *row = rows + r * (d + 1);
        for (size_t i = 0; i < m->n_parts; i++) {
            const double factor = exp((double)m->states[i].maximum[r]);
            row[d] += factor * m->states[i].sum[r];
            for (size_t j = 0; j < d; j++) row[j] += factor * m->states[i].out[r * d + j];
        }
    }
    return rows;
}

struct check_result bench_merge_check(struct bench_merge *m)
{
    const struct sqz_softmax *merged = m->states;
    const size_t d = merged->head_dim;
    /* Outputs are weighted means of numbers below 1: a rounding or two a part. */
    const double allowed = 2.0 * (double)m->n_parts * 0x1p-24;
    struct check_result result = {.ok = true};
    bench_merge_fill(m);
    double *rows = merge_exactly(m);
    bench_merge_run(m);
    for (size_t i = 0; i < merged->n_rows * d; i++) {
        const size_t r = i / d;
        const double wanted = rows[r * (d + 1) + i % d] / rows[r * (d + 1) + d];
        const double got = (double)merged->out[i] / merged->sum[r], difference = fabs(got - wanted);
        result.error = difference > result.error ? difference : result.error;
        if (!(difference <= allowed) && result.ok) { /* NaN fails */
            result.ok = false;
            snprintf(result.message, sizeof result.message,
                     "row %zu, dimension %zu: %.9g where double precision gives %.9g; allowed is a difference of %.3g",
                     r, i % d, got, wanted, allowed);
        }
    }
    free(rows);
    return result;
}
