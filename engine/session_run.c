/*
 * Running tokens on a session: every attention node reads the context through
 * lib/ and the user's own rows exactly.
 *
 * The budget is met by feedback: thresholds come from the context's calibrated
 * curve, and after every layer the log threshold is corrected a little towards
 * the share that was asked for, so that questions unlike the calibration
 * queries still read what they should on average.
 */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include <math.h>
#include <string.h>

#include "attention.h"
#include "clock.h"
#include "error.h"
#include "lookup.h"
#include "session.h"

/* Correction of the log threshold over one pass through all layers when the share read is off by the whole budget: for
 * one token, and for a pass of many, which measures the share far better. A threshold higher by a factor e reads about
 * 0.7 times as much, so these close a fifth and nearly all of a gap; few layers correct less, no step more than
 * feedback_step. The error is the plain difference of shares, not of their logarithms, and not cut off: then it is the
 * mean share that comes out right, also where a few layers read several times their part. The last is how far the
 * correction may go in all. */
static const float feedback_gain_one = 0.5f, feedback_gain_many = 8.0f, feedback_step = 0.5f, feedback_limit = 6.0f;

/* Share of a layer's bytes that the calibration expects at the session's budget. */
static double expected_share(const struct sqz_session *s, const struct sqz_layer *layer)
{
    double sum = 0;
    for (uint32_t h = 0; h < layer->shape.n_head_kv; h++) sum += (double)sqz_head_share_at(layer, h, s->budget);
    return sum / layer->shape.n_head_kv;
}

/* After a layer: the correction of the thresholds towards the budget. The published rule has none. */
static void feed_back(struct sqz_session *s, const struct sqz_layer *layer, const struct sqz_attention_stats *read,
                      size_t n_tokens)
{
    const double share = sqz_attention_stats_share(read);
    if (layer->rule == SQZ_RULE_PAPER || layer->n_levels == 0 || share <= 0 || s->budget >= 1) return;
    const float gain = (n_tokens > 1 ? feedback_gain_many : feedback_gain_one) / (float)s->n_clustered;
    const float error = (float)((share - expected_share(s, layer)) / (double)s->budget);
    s->log_offset += fmaxf(-feedback_step, fminf(gain * error, feedback_step));
    if (s->log_offset > feedback_limit) s->log_offset = feedback_limit;
    if (s->log_offset < -feedback_limit) s->log_offset = -feedback_limit;
}

static enum sqz_status session_attention(void *user_data, const struct sqz_attention_node *node,
                                         struct sqz_error *error)
{
    struct sqz_session *s = user_data;
    const struct sqz_layer *layer = sqz_context_layer(s->context, node->layer);
    const size_t d = layer->shape.head_dim;
    const bool selected = s->selector && !layer->sliding_window;
    const double since = sqz_clock_seconds();
    struct sqz_attention_stats read = {0};
    enum sqz_status status = SQZ_OK;
    sqz_node_store_rows(node, &layer->shape, s->keys[node->layer], s->values[node->layer], s->capacity, s->n_user);
    const struct sqz_attend_call call = {
        .layer = layer,
        .queries = node->queries,
        .out = node->out,
        .query_token_stride = node->query_token_stride,
        .query_head_stride = node->query_head_stride,
        .out_token_stride = (size_t)layer->shape.n_head * d,
        .out_head_stride = d,
        .n_tokens = node->n_tokens,
        .user_keys = s->keys[node->layer],
        .user_values = s->values[node->layer],
        .user_capacity_rows = s->capacity,
        .n_user = s->n_user + node->n_tokens,
        .n_context_tokens = s->n_context,
        .budget = selected ? s->options.budget : s->budget, /* a selector has no cost beside its rows */
        .log_offset = s->log_offset,
        .block_tokens = SQZ_QUESTION_BLOCK_TOKENS,
        .n_threads = s->model->crew.now,
        .stats = &read,
        .workspace = s->workspace,
    };
    if (selected) {
        sqz_attend_selected(&call, s->selector, node->layer);
    } else {
        sqz_attend(&call);
        feed_back(s, layer, &read, node->n_tokens);
    }
    sqz_attention_stats_add(&s->pass, &read);
    s->attention_seconds += sqz_clock_seconds() - since;
    if (s->recall && !layer->sliding_window)
        status = sqz_recall_add(s->recall, &call, s->selector, node->layer, error);
    return status;
}

enum sqz_status sqz_session_run(struct sqz_session *s, const int32_t *tokens, size_t n_tokens, struct sqz_error *error)
{
    const double since = sqz_clock_seconds();
    sqz_error_clear(error);
    if (n_tokens == 0) return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "no tokens to run");
    if (n_tokens > s->capacity - s->n_user)
        return sqz_error_set(error, SQZ_ERROR_LENGTH,
                             "%zu tokens do not fit: %zu of %zu are left after the context of %zu", n_tokens,
                             s->capacity - s->n_user, s->capacity, s->n_context);
    enum sqz_status status = sqz_context_check_unchanged(s->context, error);
    if (status == SQZ_OK) status = sqz_model_check_tokens(s->model, tokens, n_tokens, error);
    if (status != SQZ_OK) return status;
    status = sqz_model_set_rope(s->model, s->rope, error);
    const size_t before = s->n_user;
    const float offset_before = s->log_offset;
    s->has_logits = false;
    s->model->cancelled = s->cancelled;
    s->model->cancel_data = s->cancel_data;
    for (size_t at = 0; at < n_tokens && status == SQZ_OK; at += SQZ_BATCH_TOKENS) {
        const size_t n = n_tokens - at < SQZ_BATCH_TOKENS ? n_tokens - at : SQZ_BATCH_TOKENS;
        memset(&s->pass, 0, sizeof s->pass);
        status = sqz_model_run(s->model, tokens + at, n, s->n_context + s->n_user, at + n == n_tokens,
                               session_attention, s, error);
        if (status != SQZ_OK) break;
        sqz_session_note_threads(s, s->model->crew.now);
        s->n_user += n;
        sqz_attention_stats_add(&s->stats, &s->pass);
    }
    s->model->cancelled = NULL;
    if (status == SQZ_OK) {
        const float *logits = llama_get_logits_ith(s->model->context, -1);
        if (!logits) {
            status = sqz_error_set(error, SQZ_ERROR_INTERNAL, "llama.cpp gave no logits");
        } else {
            memcpy(s->logits, logits, s->model->info.n_vocab * sizeof *logits);
            s->has_logits = true;
        }
    }
    if (status != SQZ_OK) { /* all tokens or none */
        s->n_user = before;
        s->log_offset = offset_before;
    }
    s->run_seconds += sqz_clock_seconds() - since;
    return status;
}
