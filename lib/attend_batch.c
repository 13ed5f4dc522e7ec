/*
 * Attention of many tokens, of one or of several sequences: jobs of a block of
 * tokens in one head go to threads whole. Jobs of a head come one after
 * another, so that sequences on the same context find its centroids and codes
 * in the cache. What a job computes does not depend on the others.
 */
#include "attend_job.h"
#include "kernels.h"
#include "threads.h"

/* A call and its part of the jobs. */
struct part {
    struct sqz_attend_totals totals;
    size_t first_block, step; /* blocks of all calls before; tokens a block */
};

/* A thread. */
struct worker {
    struct sqz_job job;
    struct sqz_job_scratch scratch;
    struct sqz_attend_totals totals;
    void *memory;
    size_t part; /* whose buffers and totals these are */
    bool begun;
};

/* Dense attention shares nothing but the conversion of a tile, so its blocks are as large as pays, but not so large
 * that there are too few to share out; never a matter of the number of threads or of other calls, on which results must
 * not depend. */
static size_t block_tokens(const struct sqz_attend_call *c)
{
    enum { FEWEST_TOKENS = 16, ENOUGH_JOBS = 16 };
    if (c->joint) return sqz_attend_joint_block(&c->layer->shape, c->n_tokens);
    if (c->n_tokens == 1) return 1;
    if (c->layer->n_levels != 0 && c->budget < 1.0f) return c->block_tokens;
    if (sqz_few_slices(c)) return c->n_tokens;
    size_t n = sqz_job_dense_tokens(&c->layer->shape);
    while (n > FEWEST_TOKENS && (c->n_tokens + n - 1) / n * c->layer->shape.n_head_kv < ENOUGH_JOBS) n = (n + 1) / 2;
    return n;
}

size_t sqz_attend_joint_block(const struct sqz_layer_shape *shape, size_t n_tokens)
{
    enum { FEWEST_TOKENS = 4, ENOUGH_JOBS = 6 }; /* what a token has for itself then costs as much as what all share */
    const size_t most = sqz_job_dense_tokens(shape);
    size_t n = n_tokens < most ? n_tokens : most;
    while (n > FEWEST_TOKENS && (n_tokens + n - 1) / n * shape->n_head_kv < ENOUGH_JOBS) n = (n + 1) / 2;
    return n;
}

/* ---- Buffers ---------------------------------------------------------------- */

/* Lays out one job and what its thread works with. */
static void carve(struct sqz_arena *arena, struct worker *w, const struct sqz_job_sizes *sizes,
                  const struct sqz_layer *layer)
{
    sqz_job_carve(arena, &w->job, sizes, layer->shape.head_dim);
    sqz_job_carve_scratch(arena, &w->scratch, sizes, &layer->shape);
}

size_t sqz_attend_thread_bytes(const struct sqz_layer *layer, size_t max_user_rows, size_t max_block_tokens)
{
    const struct sqz_job_sizes sizes = sqz_job_sizes(layer, max_user_rows, max_block_tokens, 1);
    struct sqz_arena arena = sqz_arena_on(NULL);
    struct worker w;
    carve(&arena, &w, &sizes, layer);
    return sqz_arena_bytes(&arena);
}

static struct part *take_memory(struct sqz_arena *arena, size_t n_calls, int n_threads, size_t thread_bytes,
                                struct worker **workers)
{
    struct part *parts = sqz_arena_take(arena, n_calls, 1, sizeof *parts);
    *workers = sqz_arena_take(arena, (size_t)n_threads, 1, sizeof **workers);
    for (int i = 0; i < n_threads; i++) {
        void *memory = sqz_arena_take(arena, thread_bytes, 1, 1);
        if (arena->base) (*workers)[i] = (struct worker){.memory = memory};
    }
    return parts;
}

size_t sqz_attend_batch_workspace_bytes(size_t thread_bytes, size_t max_calls, int n_threads)
{
    struct sqz_arena arena = sqz_arena_on(NULL);
    struct worker *workers;
    take_memory(&arena, max_calls, n_threads, thread_bytes, &workers);
    return sqz_arena_bytes(&arena);
}

/* ---- Jobs ------------------------------------------------------------------------ */

static void hand_in_totals(struct worker *w, struct part *parts)
{
    if (!w->begun) return;
    w->totals.value_bytes = w->scratch.value_bytes_read;
#pragma omp critical(sqz_attend_totals)
    sqz_attend_totals_add(&parts[w->part].totals, &w->totals);
}

/* Buffers as the call needs them. */
static void change_part(struct worker *w, struct part *parts, size_t part, const struct sqz_attend_call *c)
{
    hand_in_totals(w, parts);
    const struct sqz_job_sizes sizes = sqz_job_sizes(c->layer, c->n_user, c->block_tokens, 1);
    struct sqz_arena arena = sqz_arena_on(w->memory);
    carve(&arena, w, &sizes, c->layer);
    w->scratch.value_bytes_read = 0;
    w->totals = (struct sqz_attend_totals){0};
    w->part = part;
    w->begun = true;
}

/* A block of n tokens from job.token on, in head job.head. */
static void run_job(const struct sqz_attend_call *c, struct worker *w, size_t n, bool rows)
{
    struct sqz_job *job = &w->job;
    struct sqz_job_scratch *t = &w->scratch;
    struct sqz_softmax *state = &t->state;
    const size_t group = c->layer->shape.n_head / c->layer->shape.n_head_kv, n_slices = sqz_few_slices(c);
    state->n_rows = n * group;
    sqz_softmax_reset(state);
    if (rows) {
        t->slot.n_rows = group;
        sqz_job_begin(c, job, t, state);
        for (size_t slot = 0; slot < job->n_slots; slot++) {
            sqz_job_slot(c, job, slot, t, &t->slot);
            sqz_softmax_merge(state, &t->slot);
        }
        sqz_job_fill_empty(c, job, t, state);
        sqz_job_note_weights(c, job, t, state);
        sqz_job_count_claimed(c, job);
    } else if (n_slices) {
        sqz_job_few(c, job, n_slices, t, state);
    } else {
        sqz_job_block(c, job, n, t, state);
    }
    sqz_job_write(c, job, n, state);
    sqz_job_count(job, &w->totals);
}

/* The call that a block belongs to. */
static size_t find_part(const struct part *parts, size_t n_calls, size_t block)
{
    size_t low = 0, high = n_calls;
    while (high - low > 1) {
        const size_t middle = (low + high) / 2;
        if (parts[middle].first_block <= block) low = middle;
        else high = middle;
    }
    return low;
}

/* Numbers the blocks of all calls; returns how many there are. */
static size_t plan_parts(const struct sqz_attend_batch *b, struct part *parts, bool totals)
{
    size_t n_blocks = 0;
    for (size_t i = 0; i < b->n_calls; i++) {
        parts[i] = (struct part){.first_block = n_blocks, .step = totals ? 1 : block_tokens(&b->calls[i])};
        n_blocks += (b->calls[i].n_tokens + parts[i].step - 1) / parts[i].step;
    }
    return n_blocks;
}

/* Runs the jobs of all calls, each a block in one head: their attention, or where log_total is given that. */
static struct part *run_jobs(const struct sqz_attend_batch *b, float *const *log_total)
{
    const struct sqz_layer_shape *shape = &b->calls[0].layer->shape;
    const size_t group = shape->n_head / shape->n_head_kv;
    struct sqz_arena arena = sqz_arena_on(b->workspace);
    struct worker *workers;
    struct part *parts = take_memory(&arena, b->n_calls, b->n_threads, b->thread_bytes, &workers);
    const size_t n_blocks = plan_parts(b, parts, log_total);
#pragma omp parallel num_threads(b->n_threads)
    {
        struct worker *w = &workers[sqz_thread_number()];
#pragma omp for schedule(dynamic, 1)
        for (size_t item = 0; item < n_blocks * shape->n_head_kv; item++) {
            const size_t block = item % n_blocks, part = find_part(parts, b->n_calls, block);
            const struct sqz_attend_call *c = &b->calls[part];
            const size_t step = parts[part].step, token = (block - parts[part].first_block) * step;
            const size_t n_left = c->n_tokens - token;
            if (!w->begun || w->part != part) change_part(w, parts, part, c);
            w->job.head = (uint32_t)(item / n_blocks);
            w->job.token = token;
            if (log_total) {
                float *to = log_total[part] + token * shape->n_head + w->job.head * group;
                sqz_job_total(c, &w->job, &w->scratch, to);
            } else {
                run_job(c, w, n_left < step ? n_left : step, step == 1 && group <= SQZ_MAX_GROUP_QUERIES && !c->joint);
            }
        }
        hand_in_totals(w, parts);
    }
    return parts;
}

void sqz_attend_totals(const struct sqz_attend_batch *b, float *const *log_total)
{
    run_jobs(b, log_total);
}

void sqz_attend_batch(const struct sqz_attend_batch *b)
{
    const struct part *parts = run_jobs(b, NULL);
    for (size_t i = 0; i < b->n_calls; i++) sqz_attend_add_stats(&b->calls[i], &parts[i].totals);
}
