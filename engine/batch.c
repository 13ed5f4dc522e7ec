/*
 * Running tokens of many sessions together. Their tokens share llama.cpp's
 * products; at every attention node each session reads its own context through
 * lib/ and its own rows exactly. A session that fails or is cancelled is passed
 * over from then on; the others never notice.
 */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include <string.h>

#include "attention.h"
#include "clock.h"
#include "error.h"
#include "session.h"

enum { SQZ_MOST_LANES = 64 };

/* One run of llama.cpp: the sessions that have tokens in it. */
struct pass {
    struct sqz_model *model;
    struct sqz_session *session[SQZ_MOST_LANES];
    size_t n_sessions, n_tokens;
    struct sqz_run_token tokens[SQZ_BATCH_TOKENS];
};

static bool is_alive(const struct sqz_session *s)
{
    return s->lane.status == SQZ_OK;
}

static bool has_tokens_left(const struct sqz_session *s)
{
    return is_alive(s) && s->lane.n_done < s->lane.n_tokens;
}

static void look_at_cancel(struct sqz_session *s)
{
    if (is_alive(s) && s->cancelled && s->cancelled(s->cancel_data))
        s->lane.status = sqz_error_set(s->lane.error, SQZ_ERROR_CANCELLED, "cancelled");
}

/* Asked between llama.cpp's operations: whether nobody is left. */
static bool nobody_left(void *user_data)
{
    const struct pass *pass = user_data;
    bool left = false;
    for (size_t i = 0; i < pass->n_sessions; i++) {
        look_at_cancel(pass->session[i]);
        left |= is_alive(pass->session[i]);
    }
    return !left;
}

/* ---- Attention ------------------------------------------------------------------- */

static struct sqz_attend_call call_of(struct sqz_session *s, const struct sqz_attention_node *node,
                                      const struct sqz_layer *layer, struct sqz_attention_stats *read)
{
    const bool selected = s->selector && !layer->sliding_window;
    return (struct sqz_attend_call){
        .layer = layer,
        .queries = node->queries,
        .out = node->out,
        .query_token_stride = node->query_token_stride,
        .query_head_stride = node->query_head_stride,
        .out_token_stride = (size_t)layer->shape.n_head * layer->shape.head_dim,
        .out_head_stride = layer->shape.head_dim,
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
        .stats = read,
        .workspace = s->model->workspace,
    };
}

/* Few single tokens: all threads work on each in turn, so that none waits for the last head. Many jobs: each thread has
 * its own. */
static void attend_to(const struct sqz_attend_call *calls, size_t n)
{
    enum { ENOUGH_JOBS = 4 }; /* a thread */
    const size_t n_threads = (size_t)calls[0].n_threads;
    size_t n_tokens = 0;
    for (size_t i = 0; i < n; i++) n_tokens += calls[i].n_tokens;
    if (n > 1 && n_tokens * calls[0].layer->shape.n_head_kv >= ENOUGH_JOBS * n_threads) {
        sqz_attend_batch(&(struct sqz_attend_batch){calls, n, calls[0].n_threads, calls[0].workspace});
        return;
    }
    for (size_t i = 0; i < n; i++) sqz_attend(&calls[i]);
}

static enum sqz_status batch_attention(void *user_data, const struct sqz_attention_node *node, struct sqz_error *error)
{
    struct pass *pass = user_data;
    struct sqz_attend_call calls[SQZ_MOST_LANES];
    struct sqz_attention_stats read[SQZ_MOST_LANES] = {{0}};
    struct sqz_session *of[SQZ_MOST_LANES];
    size_t n = 0;
    const double since = sqz_clock_seconds();
    (void)error;
    for (size_t i = 0; i < pass->n_sessions; i++) {
        struct sqz_session *s = pass->session[i];
        const struct sqz_layer *layer = sqz_context_layer(s->context, node->layer);
        const struct sqz_attention_node part = sqz_node_part(node, &layer->shape, s->lane.first, s->lane.n);
        if (!is_alive(s)) { /* what it would have been does not matter, but it is a number */
            memset(part.out, 0, part.n_tokens * layer->shape.n_head * layer->shape.head_dim * sizeof *part.out);
            continue;
        }
        sqz_node_store_rows(&part, &layer->shape, s->keys[node->layer], s->values[node->layer], s->capacity,
                            s->n_user);
        const struct sqz_attend_call call = call_of(s, &part, layer, &read[n]);
        if (s->selector && !layer->sliding_window) {
            sqz_attend_selected(&call, s->selector, node->layer);
            sqz_attention_stats_add(&s->lane.pass, &read[n]);
        } else {
            calls[n] = call;
            of[n++] = s;
        }
    }
    if (n) attend_to(calls, n);
    const double seconds = sqz_clock_seconds() - since;
    for (size_t i = 0; i < n; i++) {
        sqz_session_feed_back(of[i], calls[i].layer, &read[i], calls[i].n_tokens);
        sqz_attention_stats_add(&of[i]->lane.pass, &read[i]);
    }
    for (size_t i = 0; i < pass->n_sessions; i++) {
        struct sqz_session *s = pass->session[i];
        const struct sqz_layer *layer = sqz_context_layer(s->context, node->layer);
        s->attention_seconds += seconds;
        if (!s->recall || layer->sliding_window || !is_alive(s)) continue;
        const struct sqz_attention_node part = sqz_node_part(node, &layer->shape, s->lane.first, s->lane.n);
        const struct sqz_attend_call call = call_of(s, &part, layer, NULL);
        s->lane.status = sqz_recall_add(s->recall, &call, s->selector, node->layer, s->lane.error);
    }
    return SQZ_OK;
}

/* ---- Passes ------------------------------------------------------------------------ */

/* Takes tokens of the sessions that run with this RoPE until the batch is full. */
static void fill(struct pass *pass, const struct sqz_batch_item *items, size_t n_items, struct sqz_rope rope)
{
    const size_t most = sqz_model_most_sequences();
    pass->n_sessions = pass->n_tokens = 0;
    for (size_t i = 0; i < n_items && pass->n_sessions < most && pass->n_tokens < SQZ_BATCH_TOKENS; i++) {
        struct sqz_session *s = items[i].session;
        struct sqz_lane *lane = &s->lane;
        if (!has_tokens_left(s) || s->rope.scale != rope.scale || s->rope.factors != rope.factors) continue;
        const size_t left = lane->n_tokens - lane->n_done, room = SQZ_BATCH_TOKENS - pass->n_tokens;
        lane->first = pass->n_tokens;
        lane->n = left < room ? left : room;
        memset(&lane->pass, 0, sizeof lane->pass);
        for (size_t t = 0; t < lane->n; t++)
            pass->tokens[pass->n_tokens++] = (struct sqz_run_token){
                .token = lane->tokens[lane->n_done + t],
                .position = (int32_t)(s->n_context + s->n_user + t),
                .sequence = (uint32_t)pass->n_sessions,
                .wants_logits = lane->n_done + t + 1 == lane->n_tokens,
            };
        pass->session[pass->n_sessions++] = s;
    }
}

/* What a pass leaves with a session that is still alive. */
static void take_results(struct sqz_session *s)
{
    struct sqz_lane *lane = &s->lane;
    sqz_session_note_threads(s, s->model->crew.now);
    s->n_user += lane->n;
    lane->n_done += lane->n;
    sqz_attention_stats_add(&s->stats, &lane->pass);
    if (lane->n_done < lane->n_tokens) return;
    const float *logits = llama_get_logits_ith(s->model->context, (int32_t)(lane->first + lane->n - 1));
    if (!logits) {
        lane->status = sqz_error_set(lane->error, SQZ_ERROR_INTERNAL, "llama.cpp gave no logits");
        return;
    }
    memcpy(s->logits, logits, s->model->info.n_vocab * sizeof *logits);
    s->has_logits = true;
}

static void run_pass(struct pass *pass)
{
    const double since = sqz_clock_seconds();
    struct sqz_error error;
    struct sqz_run run = {
        .tokens = pass->tokens,
        .n_tokens = pass->n_tokens,
        .handler = batch_attention,
        .user_data = pass,
        .cancelled = nobody_left,
        .cancel_data = pass,
    };
    const struct sqz_session *first = pass->session[0];
    enum sqz_status status =
        sqz_model_make_ready(pass->model, first->rope, (uint32_t)pass->n_sessions, &error);
    if (status == SQZ_OK) status = sqz_model_run(pass->model, &run, &error);
    const double seconds = sqz_clock_seconds() - since;
    for (size_t i = 0; i < pass->n_sessions; i++) {
        struct sqz_session *s = pass->session[i];
        s->run_seconds += seconds;
        if (!is_alive(s)) continue;
        if (status == SQZ_OK) take_results(s);
        else s->lane.status = sqz_error_set(s->lane.error, status, "%s", error.message);
    }
}

/* ---- Batches ------------------------------------------------------------------------- */

static enum sqz_status begin(struct sqz_session *s, const int32_t *tokens, size_t n_tokens, struct sqz_error *error)
{
    s->lane = (struct sqz_lane){.taken = true, .tokens = tokens, .n_tokens = n_tokens, .n_user_before = s->n_user,
                                .log_offset_before = s->log_offset, .error = error};
    if (n_tokens == 0) return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "no tokens to run");
    if (n_tokens > s->capacity - s->n_user)
        return sqz_error_set(error, SQZ_ERROR_LENGTH,
                             "%zu tokens do not fit: %zu of %zu are left after the context of %zu", n_tokens,
                             s->capacity - s->n_user, s->capacity, s->n_context);
    const enum sqz_status status = sqz_context_check_unchanged(s->context, error);
    if (status != SQZ_OK) return status;
    return sqz_model_check_tokens(s->model, tokens, n_tokens, error);
}

/* All tokens or none; one that was refused before it ran keeps its logits. */
static void end(struct sqz_session *s)
{
    struct sqz_lane *lane = &s->lane;
    if (!is_alive(s)) {
        s->n_user = lane->n_user_before;
        s->log_offset = lane->log_offset_before;
    }
    *lane = (struct sqz_lane){0};
}

/* Every session once, all of one model. */
static enum sqz_status check_items(struct sqz_batch_item *items, size_t n_items, struct sqz_error *error)
{
    enum sqz_status status = SQZ_OK;
    size_t n_taken = 0;
    for (size_t i = 0; i < n_items && status == SQZ_OK; i++) {
        struct sqz_session *s = items[i].session;
        if (!s) status = sqz_error_set(error, SQZ_ERROR_ARGUMENT, "item %zu has no session", i);
        else if (s->model != items[0].session->model)
            status = sqz_error_set(error, SQZ_ERROR_ARGUMENT, "item %zu is a session of another model than item 0", i);
        else if (s->lane.taken)
            status = sqz_error_set(error, SQZ_ERROR_ARGUMENT, "item %zu is a session that comes twice", i);
        else s->lane.taken = true, n_taken++;
    }
    for (size_t i = 0; i < n_taken; i++) items[i].session->lane.taken = false;
    return status;
}

enum sqz_status sqz_batch_run(struct sqz_batch_item *items, size_t n_items, struct sqz_error *error)
{
    struct pass pass;
    sqz_error_clear(error);
    enum sqz_status status = check_items(items, n_items, error);
    if (status != SQZ_OK || n_items == 0) return status;
    pass.model = items[0].session->model;
    for (size_t i = 0; i < n_items; i++) {
        struct sqz_session *s = items[i].session;
        sqz_error_clear(&items[i].error);
        status = begin(s, items[i].tokens, items[i].n_tokens, &items[i].error);
        s->lane.status = status;
        if (status == SQZ_OK) s->has_logits = false;
    }
    for (size_t i = 0; i < n_items; i++)
        while (has_tokens_left(items[i].session)) {
            fill(&pass, items + i, n_items - i, items[i].session->rope);
            run_pass(&pass);
        }
    for (size_t i = 0; i < n_items; i++) {
        items[i].status = items[i].session->lane.status;
        end(items[i].session);
    }
    return SQZ_OK;
}

enum sqz_status sqz_session_run(struct sqz_session *s, const int32_t *tokens, size_t n_tokens, struct sqz_error *error)
{
    struct sqz_batch_item item = {.session = s, .tokens = tokens, .n_tokens = n_tokens};
    sqz_error_clear(error);
    const enum sqz_status status = sqz_batch_run(&item, 1, error);
    if (status == SQZ_OK && item.status != SQZ_OK && error) *error = item.error;
    return status != SQZ_OK ? status : item.status;
}
