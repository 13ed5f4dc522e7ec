/* Notes the weights of one token in one head by position, when its attention is done; see attention_map.h. */
#include <float.h>
#include <math.h>

#include "attend_job.h"
#include "attention_map.h"
#include "kernels.h"

/* Log of the softmax's denominator of each query row. False: one has none. */
static bool denominators(const struct sqz_attend_call *c, const struct sqz_job *job, const struct sqz_softmax *state,
                         float *log_total)
{
    for (size_t r = 0; r < state->n_rows; r++) {
        if (state->sum[r] < FLT_MIN) return false;
        log_total[r] = sqz_log_add(state->maximum[r] + logf(state->sum[r]), sqz_job_elsewhere(c, job, r));
    }
    return true;
}

/* Adds rows whose logits are known, which are overwritten. index: their numbers; NULL: from `first` on. */
static void add_weights(const struct sqz_attend_call *c, const struct sqz_job *job, float *logits, size_t n_queries,
                        const uint32_t *index, size_t first, size_t n, const float *log_total)
{
    const int32_t *position = c->layer->position + (size_t)job->head * c->layer->n_rows;
    for (size_t r = 0; r < n_queries; r++) sqz_kernels_get()->exp_sum(logits + r * SQZ_CLAIM_ROWS, n, log_total[r]);
    for (size_t i = 0; i < n; i++) {
        float sum = 0;
        for (size_t r = 0; r < n_queries; r++) sum += logits[r * SQZ_CLAIM_ROWS + i];
        if (sum < 0x1p-24f) continue; /* of most rows next to nothing */
        const uint64_t units = (uint64_t)((double)sum / SQZ_MAP_UNIT);
        atomic_fetch_add_explicit(&c->map->mass[position[index ? index[i] : first + i]], units, memory_order_relaxed);
    }
}

static void add_range(const struct sqz_attend_call *c, const struct sqz_job *job, size_t begin, size_t end,
                      struct sqz_job_scratch *t, const float *log_total)
{
    for (size_t at = begin, n; at < end; at += n) {
        n = end - at < SQZ_CLAIM_ROWS ? end - at : SQZ_CLAIM_ROWS;
        sqz_rows_logits(t->logits, SQZ_CLAIM_ROWS, &job->rows, &job->keys, at, n, c->layer->shape.head_dim, NULL);
        add_weights(c, job, t->logits, job->rows.n, NULL, at, n, log_total);
    }
}

/* Retained rows, many of them single ones: listed, so that they fill a pass. */
static void add_retained(const struct sqz_attend_call *c, const struct sqz_job *job, struct sqz_job_scratch *t,
                         const float *log_total)
{
    size_t n = 0;
    for (size_t i = 0; i <= job->n_pieces; i++) {
        const struct sqz_range piece = i < job->n_pieces ? job->pieces[i] : (struct sqz_range){0, 0};
        if (n && (i == job->n_pieces || n + piece.end - piece.begin > SQZ_CLAIM_ROWS)) {
            sqz_rows_listed_logits(t->logits, SQZ_CLAIM_ROWS, &job->rows, &job->retained, t->index, n, n,
                                   c->layer->shape.head_dim);
            add_weights(c, job, t->logits, job->rows.n, t->index, 0, n, log_total);
            n = 0;
        }
        for (uint32_t row = piece.begin; row < piece.end; row++) t->index[n++] = row;
    }
}

void sqz_job_note_weights(const struct sqz_attend_call *c, const struct sqz_job *job, struct sqz_job_scratch *t,
                          const struct sqz_softmax *state)
{
    float log_total[SQZ_MAX_GROUP_QUERIES];
    if (!c->map || c->layer->sliding_window || (c->map_turn + job->head) % SQZ_MAP_TURNS != 0) return;
    if (!denominators(c, job, state, log_total)) return;
    const bool dense = sqz_job_is_dense(c, &job->plan);
    add_range(c, job, 0, dense ? c->layer->n_rows : c->layer->n_fixed, t, log_total);
    if (!dense) add_retained(c, job, t, log_total);
    atomic_fetch_add_explicit(&c->map->n_queries, state->n_rows, memory_order_relaxed);
}
