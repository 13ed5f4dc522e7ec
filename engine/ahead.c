/* What an exact session runs before it is asked for; ahead.h. */
#include "ahead.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "session.h"

enum sqz_status sqz_exact_check(const struct sqz_context *context, enum sqz_exact exact, struct sqz_error *error)
{
    struct sqz_context_info info;
    sqz_context_get_info(context, &info);
    const enum sqz_row_format rows = info.squeeze.rows;
    if (info.rounded_keys && rows == SQZ_ROWS_INT4)
        return sqz_error_set(
            error, SQZ_ERROR_UNSUPPORTED,
            "the context keeps keys and values in 4 bits, to which no answer can be exact; prepare the "
            "document with --rows int4+4 for exact int8, or without --rows for exact f16");
    if (info.rounded_keys && rows != SQZ_ROWS_INT4_4)
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                             "the context keeps its keys as INT8 alone, so that no answer can be exact to the model; "
                             "prepare the document without --keys int8");
    if (info.rounded_keys && exact == SQZ_EXACT_F16)
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                             "the context keeps keys and values in 4 + 4 bits, so that no answer can be exact to the "
                             "model; allowed is exact int8, or prepare the document without --rows");
    if (rows != SQZ_ROWS_INT4_4 && exact == SQZ_EXACT_INT8)
        return sqz_error_set(
            error, SQZ_ERROR_UNSUPPORTED,
            "exact int8 needs a context with rows of 4 + 4 bits, this one has F16 rows; allowed is exact "
            "f16, or prepare the document with --rows int4+4");
    return SQZ_OK;
}

static enum sqz_status check(const struct sqz_session *s, struct sqz_error *error)
{
    const struct sqz_session_options *o = &s->options;
    if (o->exact != SQZ_EXACT_F16 && o->exact != SQZ_EXACT_INT8)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "exact %d: allowed are 0 to %d, see enum sqz_exact",
                             (int)o->exact, (int)SQZ_EXACT_INT8);
    const enum sqz_status status = sqz_exact_check(s->context, (enum sqz_exact)o->exact, error);
    if (status != SQZ_OK) return status;
    if (o->draft < SQZ_DRAFT_CHAIN || o->draft > SQZ_DRAFT_NONE)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "draft %d: allowed are 0 to %d, see enum sqz_draft",
                             (int)o->draft, (int)SQZ_DRAFT_NONE);
    if (o->draft_rows != SQZ_DRAFT_ROWS_UPPER && o->draft_rows != SQZ_DRAFT_ROWS_BOTH)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "draft rows %d: allowed are %d, the upper plane, and %d, both",
                             (int)o->draft_rows, (int)SQZ_DRAFT_ROWS_UPPER, (int)SQZ_DRAFT_ROWS_BOTH);
    if (!(o->draft_budget > 0 && o->draft_budget <= 1))
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT,
                             "draft budget %g: allowed is more than 0 and at most 1, for example 0.05",
                             (double)o->draft_budget);
    if (o->draft_tokens < 1 || o->draft_tokens > SQZ_MOST_DRAFT_TOKENS)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "drafts of %u tokens: allowed are 1 to %d", o->draft_tokens,
                             SQZ_MOST_DRAFT_TOKENS);
    return SQZ_OK;
}

enum sqz_status sqz_ahead_create(struct sqz_session *s, float draft_budget, struct sqz_error *error)
{
    const struct sqz_session_options *o = &s->options;
    const size_t n_vocab = s->model->info.n_vocab;
    if (o->exact == SQZ_EXACT_NO) return SQZ_OK;
    const enum sqz_status status = check(s, error);
    if (status != SQZ_OK) return status;
    struct sqz_ahead *a = s->ahead = calloc(1, sizeof *a);
    if (a) a->logits = malloc((SQZ_MOST_DRAFT_TOKENS + 1) * n_vocab * sizeof *a->logits);
    if (!a || !a->logits || !sqz_ngrams_create(&a->ngrams, s->meta->tokens, s->meta->n_tokens, s->capacity))
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for drafts");
    a->way.budget = draft_budget;
    a->way.backend = s->backend;
    a->way.upper = o->exact == SQZ_EXACT_INT8 && o->draft_rows == SQZ_DRAFT_ROWS_UPPER;
    sqz_draft_pace_begin(&a->pace, o->draft_tokens, o->draft_steady, s->model->on_card);
    return SQZ_OK;
}

void sqz_ahead_free(struct sqz_session *s)
{
    if (!s->ahead) return;
    sqz_ngrams_free(&s->ahead->ngrams);
    free(s->ahead->logits);
    free(s->ahead->odds);
    free(s->ahead);
}

void sqz_ahead_reset(struct sqz_session *s)
{
    struct sqz_ahead *a = s->ahead;
    if (!a) return;
    a->n = a->at = 0;
    a->way.log_offset = 0;
    sqz_ngrams_reset(&a->ngrams);
    if (a->pace.steady)
        sqz_draft_pace_begin(&a->pace, a->pace.most, true, a->pace.captured); /* else what is known of times stays */
}

bool sqz_ahead_make_odds(struct sqz_session *s)
{
    struct sqz_ahead *a = s->ahead;
    if (!a->odds) a->odds = malloc((SQZ_MOST_DRAFT_TOKENS + 1) * s->model->info.n_vocab * sizeof *a->odds);
    return a->odds;
}

void sqz_ahead_drop(struct sqz_session *s)
{
    if (s->ahead) s->ahead->n = s->ahead->at = 0;
}

bool sqz_ahead_has(const struct sqz_session *s, int32_t token)
{
    const struct sqz_ahead *a = s->ahead;
    return a && !a->runs && a->at < a->n && a->tokens[a->at] == token;
}

bool sqz_ahead_take(struct sqz_session *s, const int32_t *tokens, size_t n_tokens)
{
    struct sqz_ahead *a = s->ahead;
    if (!a || a->runs) return false;
    const bool tested = a->at < a->n && n_tokens == 1, kept = tested && a->tokens[a->at] == tokens[0];
    if (tested) {
        sqz_draft_pace_note_kept(&a->pace, a->source[a->at], kept);
        a->stats.n_tested++;
        a->stats.n_accepted += kept;
    }
    if (!kept) {
        a->n = a->at = 0;
        return false;
    }
    const size_t n_vocab = s->model->info.n_vocab;
    memcpy(s->logits, a->logits + ++a->at * n_vocab, n_vocab * sizeof *s->logits);
    s->n_user++;
    return true;
}

/* Of a draft from before counts were cleared there is nothing to take. */
static void leave_out(uint64_t *count, uint64_t n)
{
    *count -= *count < n ? *count : n;
}

void sqz_ahead_leave_out_waiting(const struct sqz_ahead *a, struct sqz_speculation_stats *stats)
{
    const size_t n = a->n - a->at;
    if (n == 0) return;
    leave_out(&stats->n_drafted, n);
    if (a->source[a->at] != SQZ_DRAFTED_BY_MODEL) leave_out(&stats->n_drafted_by_text, n);
}
