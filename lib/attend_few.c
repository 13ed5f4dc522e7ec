/*
 * Attention of a few tokens to everything, such as a draft that is verified: the
 * rows of a head are cut into slices, each of which goes through once for all the
 * tokens; threads share the slices of all heads, and a head's are added up in
 * their order. Where slices end depends on the layer alone, so that results do not
 * depend on the number of threads, nor on whether the call has company.
 */
#include "attend_job.h"
#include "kernels.h"
#include "threads.h"

enum { MOST_TOKENS = SQZ_FEW_TOKENS, MOST_SLICES = 16, SLICE_ROWS = 1024 };

size_t sqz_few_slices(const struct sqz_attend_call *c)
{
    const struct sqz_layer *layer = c->layer;
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv, n = layer->n_rows / SLICE_ROWS;
    if (c->joint || c->n_tokens < 2 || c->n_tokens > MOST_TOKENS || c->n_tokens * group > SQZ_DENSE_ROWS) return 0;
    if (layer->sliding_window || (layer->n_levels != 0 && c->budget < 1.0f) || n < 2) return 0;
    return n < MOST_SLICES ? n : MOST_SLICES;
}

/* Slice number i of n: whole tiles, but the last. Up to 16 query rows take F16 keys as they are; for more it pays to convert
 * tiles for matrix products. Rows in planes are taken as they are by any number: their products are of bytes. */
static void add_slice(const struct sqz_job *job, size_t i, size_t n, size_t n_rows, struct sqz_job_scratch *t,
                      struct sqz_softmax *state)
{
    const size_t begin = n_rows * i / n / SQZ_TILE_ROWS * SQZ_TILE_ROWS;
    const size_t end = i + 1 < n ? n_rows * (i + 1) / n / SQZ_TILE_ROWS * SQZ_TILE_ROWS : n_rows;
    sqz_softmax_reset(state);
    const bool planes = sqz_row_is_planes(job->keys.type) && sqz_row_is_planes(job->values.type);
    if (planes) sqz_row_queries_set(&job->rows, &job->keys, state->head_dim);
    if (planes || (state->n_rows <= SQZ_MAX_GROUP_QUERIES && job->keys.type == SQZ_ROW_F16))
        sqz_add_few(state, &job->rows, &job->keys, &job->values, begin, end, t);
    else sqz_add_tiles(state, job->queries, job->rows.scale, &job->keys, &job->values, begin, end, t);
}

static void count_everything(const struct sqz_attend_call *c, struct sqz_job *job, struct sqz_job_scratch *t)
{
    sqz_job_count_keys(c, job, &job->keys, 0, c->layer->n_rows);
    t->value_bytes_read += sqz_rows_bytes(&job->values, 0, c->layer->n_rows, c->layer->shape.head_dim);
}

void sqz_job_few(const struct sqz_attend_call *c, struct sqz_job *job, size_t n_slices, struct sqz_job_scratch *t,
                 struct sqz_softmax *state)
{
    sqz_job_set(c, job, c->n_tokens);
    if (c->n_user) sqz_job_add_user_rows(c, job, c->n_tokens, t, state);
    t->slot.n_rows = state->n_rows;
    for (size_t i = 0; i < n_slices; i++) {
        add_slice(job, i, n_slices, c->layer->n_rows, t, &t->slot);
        sqz_softmax_merge(state, &t->slot);
    }
    count_everything(c, job, t);
}

/* ---- One call by all threads ---------------------------------------------------------------- */

/* A thread. */
struct worker {
    struct sqz_job job;
    struct sqz_job_scratch scratch;
};

/* Slices' sums [K][n_slices], and what threads work with. */
static struct sqz_softmax *carve(struct sqz_arena *arena, const struct sqz_layer *layer,
                                 const struct sqz_job_sizes *sizes, size_t n_slices, size_t n_rows, int n_threads,
                                 struct worker **workers)
{
    const size_t d = layer->shape.head_dim, n = layer->shape.n_head_kv * n_slices;
    struct sqz_softmax *sums = sqz_arena_take(arena, n, 1, sizeof *sums);
    *workers = sqz_arena_take(arena, (size_t)n_threads, 1, sizeof **workers);
    for (size_t i = 0; i < n; i++) {
        const struct sqz_softmax state = sqz_job_carve_state(arena, n_rows, d);
        if (arena->base) sums[i] = state;
    }
    for (int i = 0; i < n_threads; i++) {
        struct worker ignored, *w = arena->base ? &(*workers)[i] : &ignored;
        sqz_job_carve(arena, &w->job, sizes, d);
        sqz_job_carve_scratch(arena, &w->scratch, sizes, &layer->shape);
    }
    return sums;
}

size_t sqz_few_bytes(const struct sqz_layer *layer, size_t max_user_rows, size_t max_block_tokens, int n_threads)
{
    const struct sqz_job_sizes sizes = sqz_job_sizes(layer, max_user_rows, max_block_tokens, 1);
    const size_t most = MOST_TOKENS * sizes.group < SQZ_DENSE_ROWS ? MOST_TOKENS * sizes.group : SQZ_DENSE_ROWS;
    struct sqz_arena arena = sqz_arena_on(NULL);
    struct worker *workers;
    carve(&arena, layer, &sizes, MOST_SLICES, most, n_threads, &workers);
    return sqz_arena_bytes(&arena);
}

/* Adds a head's slices up and writes its result. */
static void finish(const struct sqz_attend_call *c, struct worker *w, const struct sqz_softmax *sums, size_t n_slices,
                   struct sqz_attend_totals *totals)
{
    struct sqz_softmax *state = &w->scratch.state;
    state->n_rows = sums->n_rows;
    sqz_softmax_reset(state);
    sqz_job_set(c, &w->job, c->n_tokens);
    if (c->n_user) sqz_job_add_user_rows(c, &w->job, c->n_tokens, &w->scratch, state);
    for (size_t i = 0; i < n_slices; i++) sqz_softmax_merge(state, &sums[i]);
    sqz_job_write(c, &w->job, c->n_tokens, state);
    w->scratch.value_bytes_read = 0;
    count_everything(c, &w->job, &w->scratch);
#pragma omp critical(sqz_attend_few)
    {
        sqz_job_count(&w->job, totals);
        totals->value_bytes += w->scratch.value_bytes_read;
    }
}

void sqz_attend_few(const struct sqz_attend_call *c, size_t n_slices)
{
    const struct sqz_layer *layer = c->layer;
    const size_t n_heads = layer->shape.n_head_kv, n_rows = c->n_tokens * (layer->shape.n_head / n_heads);
    const struct sqz_job_sizes sizes = sqz_job_sizes(layer, c->n_user, c->block_tokens, 1);
    struct sqz_arena arena = sqz_arena_on(c->workspace);
    struct worker *workers;
    struct sqz_softmax *sums = carve(&arena, layer, &sizes, n_slices, n_rows, c->n_threads, &workers);
    struct sqz_attend_totals totals = {0};
#pragma omp parallel num_threads(c->n_threads)
    {
        struct worker *w = &workers[sqz_thread_number()];
        w->job.token = 0;
#pragma omp for schedule(dynamic, 1)
        for (size_t item = 0; item < n_heads * n_slices; item++) {
            w->job.head = (uint32_t)(item / n_slices);
            sqz_job_set(c, &w->job, c->n_tokens);
            add_slice(&w->job, item % n_slices, n_slices, layer->n_rows, &w->scratch, &sums[item]);
        }
#pragma omp for schedule(dynamic, 1)
        for (size_t h = 0; h < n_heads; h++) {
            w->job.head = (uint32_t)h;
            finish(c, w, &sums[h * n_slices], n_slices, &totals);
        }
    }
    sqz_attend_add_stats(c, &totals);
}
