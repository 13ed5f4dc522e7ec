/*
 * Exact answers at squeezed speed: the token that was asked for and a draft of
 * those that may follow run in one batch by all rows of the context, whose logits
 * say which of the draft the session would have chosen itself. A draft comes from
 * the text (draft_ngram.h) or from the model with a small part of the context; its
 * keys and values are overwritten by the exact run's. What was run ahead waits to
 * be asked for (ahead.h), so that whoever runs and samples tokens one by one
 * notices nothing but the speed.
 */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include <math.h>
#include <string.h>

#include "clock.h"
#include "error.h"
#include "rejection.h"
#include "run.h"
#include "session.h"

static enum sqz_status run_as_asked(struct sqz_session *s, const int32_t *tokens, size_t n_tokens,
                                    struct sqz_error *error)
{
    struct sqz_batch_item item = {.session = s, .tokens = tokens, .n_tokens = n_tokens};
    sqz_error_clear(error);
    const enum sqz_status status = sqz_batch_run(&item, 1, error);
    if (status == SQZ_OK && item.status != SQZ_OK && error) *error = item.error;
    return status != SQZ_OK ? status : item.status;
}

/* ---- Drafts --------------------------------------------------------------------------- */

/* Changes the session to the way that drafts are run in, and back. */
static void change_way(struct sqz_session *s)
{
    struct sqz_draft_way *way = &s->ahead->way;
    const struct sqz_draft_way was = {
        .budget = s->budget, .log_offset = s->log_offset, .upper = s->upper, .backend = s->backend, .stats = s->stats};
    s->budget = way->budget;
    s->log_offset = way->log_offset;
    s->upper = way->upper;
    s->backend = way->backend;
    s->stats = way->stats;
    *way = was;
    s->ahead->drafts = !s->ahead->drafts;
}

/* Draft number i, from the logits as they are. */
static int32_t choose_draft(struct sqz_session *s, struct sqz_sampling *sampling, size_t i)
{
    struct sqz_ahead *a = s->ahead;
    const uint32_t n_vocab = s->model->info.n_vocab;
    a->drawn[i] = sqz_sampling_has_odds(s->sampling);
    if (!a->drawn[i]) return sqz_sampling_guess(sampling, s->model, s->logits);
    float *odds = a->odds + i * n_vocab;
    sqz_sampling_odds(sampling, s->model, s->logits, odds);
    return sqz_draw(odds, n_vocab, sqz_draw_number(sqz_sampling_seed(s->sampling), s->n_user, SQZ_DRAW_DRAFT));
}

/* Up to n tokens by the model; *n becomes how many. A token that ends the answer is none. */
static enum sqz_status draft_by_model(struct sqz_session *s, int32_t token, size_t *n, struct sqz_error *error)
{
    struct sqz_ahead *a = s->ahead;
    struct sqz_sampling *trial = sqz_sampling_trial(s->sampling);
    enum sqz_status status = SQZ_OK;
    size_t i = 0;
    change_way(s);
    while (i < *n) {
        struct sqz_choice taken;
        const double since = sqz_clock_seconds();
        status = run_as_asked(s, i ? &a->tokens[i - 1] : &token, 1, error);
        if (status != SQZ_OK) break;
        a->tokens[i] = choose_draft(s, trial ? trial : s->sampling, i);
        a->source[i] = SQZ_DRAFTED_BY_MODEL;
        if (trial) sqz_sampling_take(trial, s->model, s->logits, a->tokens[i], -1, &taken);
        sqz_draft_pace_note_draft(&a->pace, sqz_clock_seconds() - since);
        if (llama_vocab_is_eog(s->model->vocab, a->tokens[i])) break;
        i++;
    }
    change_way(s);
    sqz_sampling_free(trial);
    *n = i;
    return status;
}

/* ---- A cycle ----------------------------------------------------------------------------- */

/* The token and n drafts behind it, exactly. */
static enum sqz_status verify(struct sqz_session *s, int32_t token, size_t n, struct sqz_error *error)
{
    struct sqz_ahead *a = s->ahead;
    int32_t tokens[SQZ_MOST_DRAFT_TOKENS + 1] = {token};
    const double since = sqz_clock_seconds();
    memcpy(tokens + 1, a->tokens, n * sizeof *tokens);
    s->all_logits = a->logits;
    const enum sqz_status status = run_as_asked(s, tokens, n + 1, error);
    s->all_logits = NULL;
    if (status != SQZ_OK) return status;
    const double seconds = sqz_clock_seconds() - since;
    sqz_draft_pace_note_batch(&a->pace, n + 1, seconds);
    a->stats.verify_seconds += seconds;
    memcpy(s->logits, a->logits, s->model->info.n_vocab * sizeof *s->logits);
    a->n = n;
    a->at = 0;
    return SQZ_OK;
}

struct plan {
    enum sqz_draft_source source;
    size_t n; /* 0: no draft */
};

/* What comes next, and from where; drafts from the text are there already. */
static struct plan make_plan(struct sqz_session *s, int32_t token)
{
    struct sqz_ahead *a = s->ahead;
    struct plan plan = {SQZ_DRAFTED_BY_MODEL, 0};
    const enum sqz_draft draft = (enum sqz_draft)s->options.draft;
    const bool reads_less = a->way.budget < 1 || a->way.backend != s->backend;
    const bool by_model = (draft == SQZ_DRAFT_CHAIN || draft == SQZ_DRAFT_SELF) && reads_less;
    const size_t room = s->capacity - s->n_user;
    size_t most = a->pace.most, n_text = 0, n_equal = 0;
    double gain = 1, gain_by_text = 1;
    if (room <= most) most = room ? room - 1 : 0;
    if (most == 0 || draft == SQZ_DRAFT_NONE || sqz_draft_pace_wants_token(&a->pace)) return plan;
    if (draft != SQZ_DRAFT_SELF) n_text = sqz_ngrams_find(&a->ngrams, &token, 1, a->tokens, most, &n_equal);
    for (size_t i = 0; i < n_text; i++)
        if (llama_vocab_is_eog(s->model->vocab, a->tokens[i])) n_text = i;
    const enum sqz_draft_source text = n_equal == 3 ? SQZ_DRAFTED_BY_THREE : SQZ_DRAFTED_BY_PAIR;
    if (by_model) plan.n = sqz_draft_pace_length(&a->pace, SQZ_DRAFTED_BY_MODEL, most, &gain);
    const size_t n = n_text ? sqz_draft_pace_length(&a->pace, text, n_text, &gain_by_text) : 0;
    if (n && gain_by_text > gain) plan = (struct plan){text, n};
    else if (plan.n == 0 && by_model && most >= SQZ_DRAFT_TRIED && sqz_draft_pace_tries(&a->pace, SQZ_DRAFTED_BY_MODEL))
        plan.n = SQZ_DRAFT_TRIED;
    else if (plan.n == 0 && n_text >= SQZ_DRAFT_TRIED && sqz_draft_pace_tries(&a->pace, text))
        plan = (struct plan){text, SQZ_DRAFT_TRIED};
    for (size_t i = 0; i < plan.n; i++) a->source[i] = plan.source, a->drawn[i] = false;
    return plan;
}

/* A share of a token's seconds: what attention takes, or the bytes that it reads of all. */
static double attention_share(const struct sqz_session *s, double seconds, double attention_seconds)
{
    struct sqz_context_info info;
    if (!s->model->on_card) return attention_seconds / seconds;
    sqz_context_get_info(s->context, &info);
    return (double)info.kv_bytes / (double)(info.kv_bytes + s->model->info.size_bytes);
}

/* What drafts read of the weights, of what an exact token reads. */
static double weights_share(const struct sqz_model_info *info)
{
    return info->draft_size_bytes ? (double)info->draft_size_bytes / (double)info->size_bytes : 1;
}

static enum sqz_status run_alone(struct sqz_session *s, int32_t token, struct sqz_error *error)
{
    struct sqz_ahead *a = s->ahead;
    const double since = sqz_clock_seconds(), attention = s->attention_seconds;
    const enum sqz_status status = run_as_asked(s, &token, 1, error);
    if (status != SQZ_OK) return status;
    const double seconds = sqz_clock_seconds() - since;
    const double share = attention_share(s, seconds, s->attention_seconds - attention);
    const double of_attention = fmin(2 * (double)a->way.budget, 1);
    sqz_draft_pace_note_token(&a->pace, seconds,
                              seconds * (share * of_attention + (1 - share) * weights_share(&s->model->info)));
    return SQZ_OK;
}

static enum sqz_status speculate(struct sqz_session *s, int32_t token, struct sqz_error *error)
{
    struct sqz_ahead *a = s->ahead;
    const size_t n_before = s->n_user;
    enum sqz_status status = SQZ_OK;
    sqz_ahead_take(s, &token, 1); /* another token was ahead: it is no more */
    struct plan plan = make_plan(s, token);
    if (plan.n == 0) return run_alone(s, token, error);
    if (sqz_sampling_has_odds(s->sampling) && !sqz_ahead_make_odds(s))
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for drafts");
    a->runs = true;
    if (plan.source == SQZ_DRAFTED_BY_MODEL) {
        const double since = sqz_clock_seconds();
        status = draft_by_model(s, token, &plan.n, error);
        a->stats.draft_seconds += sqz_clock_seconds() - since;
        s->n_user = n_before;
    }
    if (status == SQZ_OK) status = verify(s, token, plan.n, error);
    a->runs = false;
    s->n_user = n_before;
    if (status != SQZ_OK) {
        s->has_logits = false;
        return status;
    }
    s->n_user++;
    sqz_ngrams_add(&a->ngrams, n_before, &token, 1);
    a->stats.n_cycles++;
    a->stats.n_drafted += plan.n;
    if (plan.source != SQZ_DRAFTED_BY_MODEL) a->stats.n_drafted_by_text += plan.n;
    return SQZ_OK;
}

enum sqz_status sqz_session_run(struct sqz_session *s, const int32_t *tokens, size_t n_tokens, struct sqz_error *error)
{
    if (!s->ahead || n_tokens != 1 || sqz_ahead_has(s, tokens[0])) return run_as_asked(s, tokens, n_tokens, error);
    return speculate(s, tokens[0], error);
}
