/*
 * A sequence's own rows in the jobs of sqz_attend(), see attend_job.h: how they
 * are kept is the matter of user_rows.c, how rows are added of attend_add.c. What
 * a token reads in planes it reads whole, and so do all tokens behind it: only
 * F16 rows have limits.
 */
#include "attend_job.h"
#include "kernels.h"
#include "user_rows.h"

/* ---- One token ---------------------------------------------------------------------------- */

/* The job's queries for the part's keys. Those for keys of one type are the same whatever these are relative to, but for the
 * centroids' logits. *changed: they were not for this type. */
static struct sqz_row_queries queries_for(const struct sqz_job *job, const struct sqz_user_part *part, size_t head_dim,
                                          bool *changed)
{
    struct sqz_row_queries queries = job->rows;
    queries.centre_logits = NULL;
    if (!sqz_row_is_planes(part->keys.type) || part->keys.type == job->retained.type) return queries;
    sqz_row_queries_set(&queries, &part->keys, head_dim);
    *changed = true;
    return queries;
}

void sqz_job_add_own_rows(const struct sqz_attend_call *c, const struct sqz_job *job, struct sqz_job_scratch *t,
                          struct sqz_softmax *state)
{
    const size_t d = state->head_dim, last = sqz_job_last_user_row(c, job->token);
    struct sqz_user_whole whole;
    const struct sqz_user_rows *u = sqz_user_rows_of_call(c, &whole);
    bool changed = false;
    const size_t n_flushed = sqz_user_rows_flushed(u, last);
    for (size_t at = sqz_job_first_user_row(c, job->token), n; at < last; at += n) {
        const struct sqz_user_part part = sqz_user_part(u, job->head, at, last, n_flushed, c->upper);
        const struct sqz_row_queries queries = queries_for(job, &part, d, &changed);
        n = part.end - at;
        const size_t stride = n > SQZ_CLAIM_ROWS ? n : SQZ_CLAIM_ROWS;
        sqz_rows_logits(t->logits, stride, &queries, &part.keys, part.at, n, d, NULL);
        sqz_add_known(state, t->logits, stride, n, &part.values, part.at, 0);
    }
    if (changed) sqz_row_queries_set(&job->rows, &job->retained, d);
}

void sqz_job_total_own_rows(const struct sqz_attend_call *c, const struct sqz_job *job, struct sqz_job_scratch *t,
                            float *log_total)
{
    const size_t d = c->layer->shape.head_dim, last = sqz_job_last_user_row(c, job->token);
    struct sqz_user_whole whole;
    const struct sqz_user_rows *u = sqz_user_rows_of_call(c, &whole);
    bool changed = false;
    const size_t n_flushed = sqz_user_rows_flushed(u, last);
    for (size_t at = sqz_job_first_user_row(c, job->token), n; at < last; at += n) {
        const struct sqz_user_part part = sqz_user_part(u, job->head, at, last, n_flushed, c->upper);
        const struct sqz_row_queries queries = queries_for(job, &part, d, &changed);
        n = part.end - at;
        sqz_add_to_total(log_total, &queries, &part.keys, part.at, part.at + n, d, t);
    }
    if (changed) sqz_row_queries_set(&job->rows, &job->retained, d);
}

/* ---- Many ----------------------------------------------------------------------------------- */

/* All of a part for the query rows that begin with number `row` of the job: in planes as they are, where the job has room
 * for such queries, which are overwritten. */
static void add_part(const struct sqz_job *job, size_t row, const struct sqz_user_part *part, struct sqz_job_scratch *t,
                     struct sqz_softmax *state)
{
    const size_t d = state->head_dim, end = part->at + part->end - part->begin;
    const struct sqz_row_queries queries = {.f32 = job->queries + row * d,
                                            .i16 = job->quantised,
                                            .n = state->n_rows,
                                            .scale = job->rows.scale,
                                            .turned = job->turned};
    if (sqz_row_is_planes(part->keys.type) && state->n_rows <= job->integer_rows) {
        sqz_row_queries_set(&queries, &part->keys, d);
        sqz_add_few(state, &queries, &part->keys, &part->values, part->at, end, t);
        return;
    }
    sqz_add_tiles(state, queries.f32, queries.scale, &part->keys, &part->values, part->at, end, t);
}

static struct sqz_softmax rows_from(const struct sqz_softmax *state, size_t row, size_t n)
{
    return (struct sqz_softmax){n, state->head_dim, state->out + row * state->head_dim, state->maximum + row,
                                state->sum + row};
}

void sqz_job_add_user_rows(const struct sqz_attend_call *c, const struct sqz_job *job, size_t n_tokens,
                           struct sqz_job_scratch *t, struct sqz_softmax *state)
{
    const size_t group = c->layer->shape.n_head / c->layer->shape.n_head_kv;
    size_t first[SQZ_MAX_BLOCK_TOKENS], last[SQZ_MAX_BLOCK_TOKENS], flushed[SQZ_MAX_BLOCK_TOKENS];
    struct sqz_user_whole whole;
    const struct sqz_user_rows *u = sqz_user_rows_of_call(c, &whole);
    for (size_t i = 0; i < n_tokens; i++) {
        first[i] = sqz_job_first_user_row(c, job->token + i);
        last[i] = sqz_job_last_user_row(c, job->token + i);
        flushed[i] = sqz_user_rows_flushed(u, last[i]);
        if (first[i] < flushed[i]) first[i] = flushed[i];
    }
    for (size_t i = 0, at = 0; at < flushed[n_tokens - 1]; at = flushed[i]) {
        while (flushed[i] <= at) i++;
        struct sqz_softmax some = rows_from(state, i * group, (n_tokens - i) * group);
        const struct sqz_user_part part = sqz_user_part(u, job->head, at, flushed[i], flushed[i], c->upper);
        add_part(job, i * group, &part, t, &some);
    }
    for (size_t at = first[0], end; at < last[n_tokens - 1]; at = end) {
        const struct sqz_user_part part = sqz_user_part(u, job->head, at, last[n_tokens - 1], flushed[0], c->upper);
        end = part.end;
        sqz_add_limited(state, job->rows.f32, job->rows.scale, &part.keys, &part.values, part.at, at, end, first, last,
                        group, t);
    }
}

void sqz_job_add_joint_rows(const struct sqz_attend_call *c, const struct sqz_job *job, size_t n_tokens,
                            struct sqz_job_scratch *t, const struct sqz_softmax *state)
{
    const size_t group = c->layer->shape.n_head / c->layer->shape.n_head_kv;
    for (size_t i = 0; i < n_tokens; i++) {
        const struct sqz_joint_token *token = &c->joint[job->token + i];
        struct sqz_softmax some = rows_from(state, i * group, group);
        struct sqz_user_whole whole;
        const struct sqz_user_rows *u = sqz_user_rows_of_token(c, token, &whole);
        const size_t n_flushed = sqz_user_rows_flushed(u, token->n_rows);
        for (size_t at = 0, end; at < token->n_rows; at = end) {
            const struct sqz_user_part part = sqz_user_part(u, job->head, at, token->n_rows, n_flushed, c->upper);
            end = part.end;
            add_part(job, i * group, &part, t, &some);
        }
    }
}
