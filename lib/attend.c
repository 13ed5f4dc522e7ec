/*
 * Attention of tokens that follow a context: lookup, exact attention on what is
 * retained, the tail, the user's own rows, and the merge. This file hands the
 * jobs of attend_job.h to threads and writes what comes out.
 *
 * A generated token is one job a KV head. A job first looks up (centroids, the
 * fixed rows and the user's rows), which also gives an estimate of the softmax
 * denominator; its retained rows are then split into slots that all threads
 * take in turn, so that one query keeps every core busy even when heads retain
 * very different amounts. Slots follow from what is retained and are summed in
 * order, so results do not depend on which thread was faster; the thread that
 * finishes a head's last slot adds them up. Many tokens are many jobs, and a
 * thread takes whole ones.
 */
#define _POSIX_C_SOURCE 200809L /* sched_yield */
#include <float.h>
#include <math.h>
#include <sched.h>
#include <stdatomic.h>

#include "attend_job.h"
#include "kernels.h"
#include "threads.h"

/* ---- Buffers ---------------------------------------------------------------- */

/* Partial results of one token: for every KV head what its lookup gives, then one for each slot. */
static struct sqz_softmax *carve_parts(struct sqz_arena *arena, const struct sqz_job_sizes *sizes,
                                       const struct sqz_layer_shape *shape)
{
    const size_t n = shape->n_head_kv * (1 + (size_t)SQZ_MAX_SLOTS);
    struct sqz_softmax *parts = sqz_arena_take(arena, n, 1, sizeof *parts);
    for (size_t i = 0; i < n; i++) {
        const struct sqz_softmax state = sqz_job_carve_state(arena, sizes->group, shape->head_dim);
        if (arena->base) parts[i] = state;
    }
    return parts;
}

size_t sqz_attend_workspace_bytes(const struct sqz_layer *layer, size_t max_user_rows, size_t max_block_tokens,
                                  int n_threads)
{
    const struct sqz_job_sizes sizes = sqz_job_sizes(layer, max_user_rows, max_block_tokens, n_threads);
    struct sqz_arena arena = sqz_arena_on(NULL);
    struct sqz_job job;
    struct sqz_job_scratch scratch;
    sqz_arena_take(&arena, sizes.n_jobs, 1, sizeof(struct sqz_job));
    sqz_arena_take(&arena, (size_t)n_threads, 1, sizeof(struct sqz_job_scratch));
    for (size_t i = 0; i < sizes.n_jobs; i++) sqz_job_carve(&arena, &job, &sizes, layer->shape.head_dim);
    for (int i = 0; i < n_threads; i++) sqz_job_carve_scratch(&arena, &scratch, &sizes, &layer->shape);
    carve_parts(&arena, &sizes, &layer->shape);
    return sqz_arena_bytes(&arena);
}

/* ---- Results --------------------------------------------------------------------- */

static void write_out(const struct sqz_attend_call *c, const struct sqz_job *job, size_t n_tokens,
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
    uint64_t code_bytes, codes;
    uint64_t small_key_rows; /* of key_rows, those not read as F16 */
};

static void count_job(const struct sqz_job *job, struct totals *totals)
{
    totals->selections++;
    totals->centroid_rows += job->centroid_rows_read;
    totals->code_bytes += job->code_bytes_read;
    totals->codes += job->codes_read;
    totals->value_centroid_rows += job->value_centroid_rows_read;
    totals->key_rows += job->key_rows_read;
    totals->small_key_rows += job->small_key_rows_read;
}

static void add_stats(const struct sqz_attend_call *c, const struct totals *t)
{
    /* Layers that keep only a window cost the same at any context length: no budget applies to them. */
    if (!c->stats || c->layer->sliding_window) return;
    const uint64_t row_bytes = (uint64_t)c->layer->shape.head_dim * sizeof(uint16_t);
    c->stats->n_selections += t->selections;
    c->stats->context_bytes += t->selections * 2 * c->layer->n_rows * row_bytes;
    c->stats->centroid_bytes += t->centroid_rows * sqz_centroid_bytes(c->layer) + t->value_centroid_rows * row_bytes;
    c->stats->centroid_bytes += t->code_bytes;
    c->stats->key_bytes += (t->key_rows - t->small_key_rows) * row_bytes + t->small_key_rows * sqz_key_bytes(c->layer);
    c->stats->value_bytes += t->value_rows * row_bytes;
    c->stats->retained_keys += t->key_rows;
    c->stats->total_keys += t->selections * c->layer->n_rows;
    c->stats->coded_keys += t->codes;
}

/* Adds up a head's parts and writes its result. */
static void finish(const struct sqz_attend_call *c, const struct sqz_job *job, struct sqz_job_scratch *t,
                   struct sqz_softmax *parts)
{
    for (size_t slot = 0; slot < job->n_slots; slot++) sqz_softmax_merge(parts, &parts[1 + slot]);
    sqz_job_fill_empty(c, job, t, parts);
    write_out(c, job, 1, parts);
}

/* Takes slots of a head until none is left. parts[1 + slot] receives the slot's sum. */
static void run_slots(const struct sqz_attend_call *c, struct sqz_job *job, struct sqz_job_scratch *t,
                      struct sqz_softmax *parts)
{
    for (;;) {
        const size_t slot = atomic_fetch_add_explicit(&job->next_slot, 1, memory_order_relaxed);
        if (slot >= job->n_slots) return;
        sqz_job_slot(c, job, slot, t, &parts[1 + slot]);
        if (atomic_fetch_sub_explicit(&job->n_slots_left, 1, memory_order_acq_rel) == 1) finish(c, job, t, parts);
    }
}

/* Waits until another thread has looked a head up. Spins briefly, then lets others run: on a busy machine that thread
 * may have lost its core. */
static void wait_ready(struct sqz_job *job)
{
    for (unsigned spins = 0; !atomic_load_explicit(&job->ready, memory_order_acquire); spins++) {
        if (spins > 1000) sched_yield();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
    }
}

static void count_claimed(struct sqz_job *job)
{
    job->key_rows_read += job->n_claimed_rows;
    if (job->reads_i8) job->small_key_rows_read = job->n_claimed_rows;
}

/* One token: every head is a job, all threads share the slots of all jobs. */
static void attend_one(const struct sqz_attend_call *c, struct sqz_job *jobs, struct sqz_job_scratch *threads,
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
        struct sqz_job_scratch *t = &threads[sqz_thread_number()];
        for (;;) {
            const size_t h = atomic_fetch_add_explicit(&next_head, 1, memory_order_relaxed);
            if (h >= n_heads) break;
            sqz_softmax_reset(&parts[h * (1 + SQZ_MAX_SLOTS)]);
            sqz_job_begin(c, &jobs[h], t, &parts[h * (1 + SQZ_MAX_SLOTS)]);
            atomic_store_explicit(&jobs[h].n_slots_left, jobs[h].n_slots, memory_order_relaxed);
            if (jobs[h].n_slots == 0) finish(c, &jobs[h], t, &parts[h * (1 + SQZ_MAX_SLOTS)]);
            atomic_store_explicit(&jobs[h].ready, 1, memory_order_release);
        }
        for (size_t h = 0; h < n_heads; h++) {
            wait_ready(&jobs[h]);
            run_slots(c, &jobs[h], t, &parts[h * (1 + SQZ_MAX_SLOTS)]);
        }
    }
    for (size_t h = 0; h < n_heads; h++) {
        count_claimed(&jobs[h]);
        count_job(&jobs[h], totals);
    }
}

/* Dense attention shares nothing but the conversion of a tile, so its blocks are as large as pays, but not so large
 * that there are too few to share out; never a matter of the number of threads, on which results must not depend. */
static size_t block_tokens(const struct sqz_attend_call *c)
{
    enum { FEWEST_TOKENS = 16, ENOUGH_ITEMS = 16 };
    if (c->layer->n_levels != 0 && c->budget < 1.0f) return c->block_tokens;
    size_t n = sqz_job_dense_tokens(&c->layer->shape);
    while (n > FEWEST_TOKENS && (c->n_tokens + n - 1) / n * c->layer->shape.n_head_kv < ENOUGH_ITEMS) n = (n + 1) / 2;
    return n;
}

/* Many tokens: items of (block x head) go to threads whole. */
static void attend_many(const struct sqz_attend_call *c, struct sqz_job *jobs, struct sqz_job_scratch *threads,
                        struct totals *totals)
{
    const size_t n_heads = c->layer->shape.n_head_kv, group = c->layer->shape.n_head / n_heads;
    const size_t step = block_tokens(c), n_blocks = (c->n_tokens + step - 1) / step;
    const bool rows = step == 1 && group <= SQZ_MAX_GROUP_QUERIES;
    uint64_t selections = 0, centroid_rows = 0, code_bytes = 0, value_centroid_rows = 0, key_rows = 0;
    uint64_t codes = 0, small_key_rows = 0;
#pragma omp parallel num_threads(c->n_threads)                                          \
    reduction(+ : selections, centroid_rows, code_bytes, codes, value_centroid_rows, key_rows, small_key_rows)
    {
        const int number = sqz_thread_number();
        struct sqz_job_scratch *t = &threads[number];
        struct sqz_job *job = &jobs[number];
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
                sqz_job_begin(c, job, t, state);
                for (size_t slot = 0; slot < job->n_slots; slot++) {
                    sqz_job_slot(c, job, slot, t, &t->slot);
                    sqz_softmax_merge(state, &t->slot);
                }
                sqz_job_fill_empty(c, job, t, state);
                count_claimed(job);
            } else {
                sqz_job_block(c, job, n, t, state);
            }
            write_out(c, job, n, state);
            count_job(job, &mine);
        }
        selections += mine.selections;
        centroid_rows += mine.centroid_rows;
        code_bytes += mine.code_bytes;
        codes += mine.codes;
        value_centroid_rows += mine.value_centroid_rows;
        key_rows += mine.key_rows;
        small_key_rows += mine.small_key_rows;
    }
    totals->selections += selections;
    totals->centroid_rows += centroid_rows;
    totals->code_bytes += code_bytes;
    totals->codes += codes;
    totals->value_centroid_rows += value_centroid_rows;
    totals->key_rows += key_rows;
    totals->small_key_rows += small_key_rows;
}

void sqz_attend(const struct sqz_attend_call *c)
{
    const struct sqz_layer *layer = c->layer;
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv;
    const struct sqz_job_sizes sizes = sqz_job_sizes(layer, c->n_user, c->block_tokens, c->n_threads);
    struct sqz_arena arena = sqz_arena_on(c->workspace);
    struct sqz_job *jobs = sqz_arena_take(&arena, sizes.n_jobs, 1, sizeof *jobs);
    struct sqz_job_scratch *threads = sqz_arena_take(&arena, (size_t)c->n_threads, 1, sizeof *threads);
    for (size_t i = 0; i < sizes.n_jobs; i++) sqz_job_carve(&arena, &jobs[i], &sizes, layer->shape.head_dim);
    for (int i = 0; i < c->n_threads; i++) {
        sqz_job_carve_scratch(&arena, &threads[i], &sizes, &layer->shape);
        threads[i].value_rows_read = 0;
    }
    struct sqz_softmax *parts = carve_parts(&arena, &sizes, &layer->shape);
    struct totals totals = {0};
    if (c->n_tokens == 1 && group <= SQZ_MAX_GROUP_QUERIES) attend_one(c, jobs, threads, parts, &totals);
    else attend_many(c, jobs, threads, &totals);
    for (int i = 0; i < c->n_threads; i++) totals.value_rows += threads[i].value_rows_read;
    add_stats(c, &totals);
}
