/*
 * Attention of tokens that follow a context: lookup, exact attention on what is
 * retained, the tail, the user's own rows, and the merge. This file hands the
 * jobs of attend_job.h to threads where there is one token; attend_batch.c does
 * where there are many.
 *
 * A generated token is one job a KV head. A job first looks up (centroids, the
 * fixed rows and the user's rows), which also gives an estimate of the softmax
 * denominator; its retained rows are then split into slots that all threads
 * take in turn, so that one query keeps every core busy even when heads retain
 * very different amounts. Slots follow from what is retained and are summed in
 * order, so results do not depend on which thread was faster; the thread that
 * finishes a head's last slot adds them up.
 */
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

static size_t one_token_bytes(const struct sqz_layer *layer, size_t max_user_rows, size_t max_block_tokens,
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

size_t sqz_attend_workspace_bytes(const struct sqz_layer *layer, size_t max_user_rows, size_t max_block_tokens,
                                  int n_threads)
{
    const size_t one = one_token_bytes(layer, max_user_rows, max_block_tokens, n_threads);
    const size_t thread = sqz_attend_thread_bytes(layer, max_user_rows, max_block_tokens);
    const size_t many = sqz_attend_batch_workspace_bytes(thread, 1, n_threads);
    const size_t few = sqz_few_bytes(layer, max_user_rows, max_block_tokens, n_threads);
    const size_t most = one > many ? one : many;
    return most > few ? most : few;
}

/* ---- Jobs and slots -------------------------------------------------------------------- */

/* Adds up a head's parts and writes its result. */
static void finish(const struct sqz_attend_call *c, const struct sqz_job *job, struct sqz_job_scratch *t,
                   struct sqz_softmax *parts)
{
    for (size_t slot = 0; slot < job->n_slots; slot++) sqz_softmax_merge(parts, &parts[1 + slot]);
    sqz_job_fill_empty(c, job, t, parts);
    sqz_job_write(c, job, 1, parts);
    sqz_job_note_weights(c, job, t, parts);
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

/* Waits until another thread has looked a head up. */
static void wait_ready(struct sqz_job *job)
{
    for (unsigned turn = 0; !atomic_load_explicit(&job->ready, memory_order_acquire); turn++) sqz_thread_wait(turn);
}

/* One token: every head is a job, all threads share the slots of all jobs. */
static void attend_one(const struct sqz_attend_call *c, struct sqz_job *jobs, struct sqz_job_scratch *threads,
                       struct sqz_softmax *parts, struct sqz_attend_totals *totals)
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
        sqz_job_count_claimed(c, &jobs[h]);
        sqz_job_count(&jobs[h], totals);
    }
}

void sqz_attend(const struct sqz_attend_call *c)
{
    const struct sqz_layer *layer = c->layer;
    const size_t n_slices = sqz_few_slices(c);
    if (n_slices) {
        sqz_attend_few(c, n_slices);
        return;
    }
    if (c->n_tokens > 1 || layer->shape.n_head / layer->shape.n_head_kv > SQZ_MAX_GROUP_QUERIES) {
        const size_t thread_bytes = sqz_attend_thread_bytes(layer, c->n_user, c->block_tokens);
        sqz_attend_batch(&(struct sqz_attend_batch){c, 1, c->n_threads, thread_bytes, c->workspace});
        return;
    }
    const struct sqz_job_sizes sizes = sqz_job_sizes(layer, c->n_user, c->block_tokens, c->n_threads);
    struct sqz_arena arena = sqz_arena_on(c->workspace);
    struct sqz_job *jobs = sqz_arena_take(&arena, sizes.n_jobs, 1, sizeof *jobs);
    struct sqz_job_scratch *threads = sqz_arena_take(&arena, (size_t)c->n_threads, 1, sizeof *threads);
    for (size_t i = 0; i < sizes.n_jobs; i++) sqz_job_carve(&arena, &jobs[i], &sizes, layer->shape.head_dim);
    for (int i = 0; i < c->n_threads; i++) {
        sqz_job_carve_scratch(&arena, &threads[i], &sizes, &layer->shape);
        threads[i].value_bytes_read = 0;
    }
    struct sqz_softmax *parts = carve_parts(&arena, &sizes, &layer->shape);
    struct sqz_attend_totals totals = {0};
    attend_one(c, jobs, threads, parts, &totals);
    for (int i = 0; i < c->n_threads; i++) totals.value_bytes += threads[i].value_bytes_read;
    sqz_attend_add_stats(c, &totals);
}
