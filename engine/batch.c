/*
 * Running tokens of many sessions together. Their tokens share llama.cpp's
 * products; at every attention node each session reads its own context and its
 * own rows, where its attention is computed. A session that fails or is
 * cancelled is passed over from then on; the others never notice.
 */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include <string.h>

#include "clock.h"
#include "error.h"
#include "session.h"

/* One run of llama.cpp: the sessions that have tokens in it. */
struct pass {
    struct sqz_model *model;
    struct sqz_session *session[SQZ_MOST_SEQUENCES];
    size_t n_sessions, n_tokens;
    bool on_card; /* some of its nodes were */
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

/* What a session that is no more would have got does not matter, but it is a number. */
static void write_nothing(const struct sqz_attention_node *node, const struct sqz_session *s)
{
    const struct sqz_layer_shape *shape = &sqz_context_layer(s->context, node->layer)->shape;
    const struct sqz_backend_part *p = &s->lane.part;
    if (node->stream) return; /* numbers of its own rows, or of others' */
    const size_t row = (size_t)shape->n_head * shape->head_dim;
    memset(node->out + p->first_token * row, 0, p->n_tokens * row * sizeof *node->out);
}

static void begin_part(struct sqz_session *s)
{
    struct sqz_backend_part *p = &s->lane.part;
    memset(&s->lane.layer, 0, sizeof s->lane.layer);
    p->budget = s->budget;
    p->log_offset = s->log_offset;
    p->upper = s->upper;
    p->united = false;
    p->status = SQZ_OK;
}

static void end_part(struct sqz_session *s, const struct sqz_attention_node *node)
{
    struct sqz_lane *lane = &s->lane;
    if (lane->part.status != SQZ_OK) {
        lane->status = lane->part.status;
        write_nothing(node, s);
        return;
    }
    if (s->backend->ops->steered && !lane->part.united)
        sqz_session_feed_back(s, node->layer, &lane->layer, lane->part.n_tokens, lane->part.log_offset);
    sqz_attention_stats_add(&lane->pass, &lane->layer);
}

/* The next pieces of a call's parts, of which done[i] tokens are behind; returns how many parts have one. of: their
 * numbers. */
static size_t take_pieces(const struct sqz_backend *backend, const struct sqz_backend_call *call, const size_t *done,
                          struct sqz_backend_part *pieces, size_t *of)
{
    size_t n = 0;
    for (size_t i = 0; i < call->n_parts; i++) {
        const struct sqz_backend_part *p = call->parts[i];
        const size_t left = p->status == SQZ_OK ? p->n_tokens - done[i] : 0;
        if (left == 0) continue;
        const size_t most = backend->ops->most_tokens(p->own);
        pieces[n] = *p;
        pieces[n].first_token += done[i];
        pieces[n].n_own += done[i];
        pieces[n].n_tokens = left < most ? left : most;
        of[n++] = i;
    }
    return n;
}

/* Takes and attends to the tokens of the call's parts, as many at a time as the place has at once. Parts may fail. */
static void attend_in_pieces(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    struct sqz_backend_part pieces[SQZ_MOST_SEQUENCES], *list[SQZ_MOST_SEQUENCES];
    size_t done[SQZ_MOST_SEQUENCES] = {0}, of[SQZ_MOST_SEQUENCES], n;
    if (!backend->ops->most_tokens) {
        backend->ops->take(backend, call);
        backend->ops->attend(backend, call);
        return;
    }
    while ((n = take_pieces(backend, call, done, pieces, of))) {
        struct sqz_backend_call some = *call;
        some.parts = list;
        for (some.n_parts = 0; some.n_parts < n; some.n_parts++) list[some.n_parts] = &pieces[some.n_parts];
        backend->ops->take(backend, &some);
        some.n_parts = 0;
        for (size_t i = 0; i < n; i++)
            if (pieces[i].status == SQZ_OK) list[some.n_parts++] = &pieces[i];
        if (some.n_parts) backend->ops->attend(backend, &some);
        for (size_t i = 0; i < n; i++) {
            struct sqz_backend_part *p = call->parts[of[i]];
            p->status = pieces[i].status;
            p->united |= pieces[i].united;
            done[of[i]] += pieces[i].n_tokens;
        }
    }
}

/* Sessions whose attention is computed in one place go there together. */
static enum sqz_status batch_attention(void *user_data, const struct sqz_attention_node *node, struct sqz_error *error)
{
    struct pass *pass = user_data;
    struct sqz_backend_part *parts[SQZ_MOST_SEQUENCES];
    const double since = sqz_clock_seconds();
    (void)error;
    for (size_t at = 0; at < pass->n_sessions;) {
        struct sqz_backend *backend = pass->session[at]->backend;
        const size_t first = at;
        size_t n = 0;
        for (; at < pass->n_sessions && pass->session[at]->backend == backend; at++) {
            struct sqz_session *s = pass->session[at];
            if (is_alive(s)) begin_part(s), parts[n++] = &s->lane.part;
            else write_nothing(node, s);
        }
        const struct sqz_backend_call call = {
            .node = node, .parts = parts, .n_parts = n, .n_threads = pass->model->crew.now, .stream = node->stream};
        if (n == 0) continue;
        attend_in_pieces(backend, &call);
        for (size_t i = first; i < at; i++)
            if (is_alive(pass->session[i])) end_part(pass->session[i], node);
    }
    const double seconds = sqz_clock_seconds() - since;
    for (size_t i = 0; i < pass->n_sessions; i++) pass->session[i]->attention_seconds += seconds;
    return SQZ_OK;
}

/* The living sessions from number *at on whose attention is computed in the same place. */
static struct sqz_backend *next_place(const struct pass *pass, size_t *at, struct sqz_backend_part **parts, size_t *n)
{
    struct sqz_backend *backend = pass->session[*at]->backend;
    *n = 0;
    for (; *at < pass->n_sessions && pass->session[*at]->backend == backend; ++*at)
        if (is_alive(pass->session[*at])) parts[(*n)++] = &pass->session[*at]->lane.part;
    return backend;
}

/* On a card, before the first node. */
static uint64_t begin_on_card(void *user_data, int card, void *stream, struct sqz_gpu_beside *beside)
{
    struct pass *pass = user_data;
    struct sqz_backend_part *parts[SQZ_MOST_SEQUENCES];
    uint64_t key = 0;
    size_t n;
    pass->on_card = true;
    for (size_t i = 0; i < pass->n_sessions; i++) {
        if (!is_alive(pass->session[i])) continue;
        begin_part(pass->session[i]);
        pass->session[i]->lane.log_offset_of_pass = pass->session[i]->log_offset;
    }
    for (size_t at = 0; at < pass->n_sessions;) {
        struct sqz_backend *backend = next_place(pass, &at, parts, &n);
        const struct sqz_backend_call call = {.parts = parts,
                                              .n_parts = n,
                                              .n_threads = pass->model->crew.now,
                                              .card = card,
                                              .stream = stream,
                                              .beside = beside};
        const bool alone = at == pass->n_sessions && key == 0;
        key = n && backend->ops->begin ? backend->ops->begin(backend, &call) : 0;
        if (!alone) key = 0; /* several places: not captured */
    }
    for (size_t i = 0; i < pass->n_sessions; i++) {
        struct sqz_session *s = pass->session[i];
        if (is_alive(s)) s->lane.status = s->lane.part.status;
    }
    return key;
}

/* A layer's part in what was not counted at the nodes, of the sessions from number first to end. */
static void take_count(struct pass *pass, size_t first, size_t end, uint32_t layer)
{
    for (size_t i = first; i < end; i++) {
        struct sqz_session *s = pass->session[i];
        struct sqz_lane *lane = &s->lane;
        if (is_alive(s) && !lane->part.united && s->backend->ops->steered)
            sqz_session_feed_back(s, layer, &lane->layer, lane->part.n_tokens, lane->log_offset_of_pass);
        sqz_attention_stats_add(&lane->pass, &lane->layer);
        memset(&lane->layer, 0, sizeof lane->layer);
    }
}

/* What was not counted at the nodes; nothing of a run that failed. */
static void finish_on_card(struct pass *pass, bool failed)
{
    struct sqz_backend_part *parts[SQZ_MOST_SEQUENCES];
    size_t n;
    for (size_t i = 0; i < pass->n_sessions; i++)
        memset(&pass->session[i]->lane.layer, 0, sizeof pass->session[i]->lane.layer);
    for (size_t at = 0; at < pass->n_sessions;) {
        const size_t first = at;
        struct sqz_backend *backend = next_place(pass, &at, parts, &n);
        const struct sqz_backend_call call = {.parts = parts, .n_parts = failed ? 0 : n};
        for (uint32_t l = 0; l < pass->model->info.n_layer && call.n_parts && backend->ops->count_read; l++) {
            backend->ops->count_read(backend, &call, l);
            take_count(pass, first, at, l);
        }
        if (backend->ops->finish) backend->ops->finish(backend, &call);
    }
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
        const size_t n = left < room ? left : room;
        lane->part = (struct sqz_backend_part){.own = s->own,
                                               .n_own = s->n_user,
                                               .n_kept = lane->n_user_before,
                                               .first_token = pass->n_tokens,
                                               .n_tokens = n,
                                               .block_tokens = SQZ_QUESTION_BLOCK_TOKENS,
                                               .stats = &lane->layer,
                                               .map = n == 1 ? s->map : NULL,
                                               .map_turn = s->n_user,
                                               .error = lane->error};
        memset(&lane->pass, 0, sizeof lane->pass);
        for (size_t t = 0; t < n; t++)
            pass->tokens[pass->n_tokens++] = (struct sqz_run_token){
                .token = lane->tokens[lane->n_done + t],
                .position = (int32_t)(s->n_context + s->n_user + t),
                .sequence = (uint32_t)pass->n_sessions,
                .wants_logits = s->all_logits || lane->n_done + t + 1 == lane->n_tokens,
            };
        pass->session[pass->n_sessions++] = s;
    }
}

/* The logits of a token of the pass. */
static bool take_logits(struct sqz_session *s, size_t token, float *to)
{
    const float *logits = llama_get_logits_ith(s->model->running, (int32_t)token);
    if (logits) memcpy(to, logits, s->model->info.n_vocab * sizeof *logits);
    else s->lane.status = sqz_error_set(s->lane.error, SQZ_ERROR_INTERNAL, "llama.cpp gave no logits");
    return logits;
}

/* What a pass leaves with a session that is still alive. */
static void take_results(struct sqz_session *s)
{
    struct sqz_lane *lane = &s->lane;
    const struct sqz_backend_part *p = &lane->part;
    sqz_session_note_threads(s, s->model->crew.now);
    for (size_t t = 0; t < p->n_tokens && s->all_logits; t++)
        if (!take_logits(s, p->first_token + t, s->all_logits + (lane->n_done + t) * s->model->info.n_vocab)) return;
    s->n_user += p->n_tokens;
    lane->n_done += p->n_tokens;
    sqz_attention_stats_add(&s->stats, &lane->pass);
    if (lane->n_done == lane->n_tokens) s->has_logits = take_logits(s, p->first_token + p->n_tokens - 1, s->logits);
}

/* llama.cpp's context for the pass. */
static enum sqz_status make_ready(const struct pass *pass, struct sqz_error *error)
{
    const struct sqz_session *first = pass->session[0];
    const struct sqz_ahead *a = first->ahead;
    if (a && a->runs && sqz_draft_pace_repeats(&a->pace, pass->n_tokens))
        return sqz_model_make_ready_to_repeat(pass->model, first->rope, pass->n_tokens, a->drafts, error);
    return sqz_model_make_ready(pass->model, first->rope, (uint32_t)pass->n_sessions, error);
}

static void run_pass(struct pass *pass)
{
    const double since = sqz_clock_seconds();
    struct sqz_error error;
    struct sqz_run run = {
        .tokens = pass->tokens,
        .n_tokens = pass->n_tokens,
        .handler = batch_attention,
        .begin = begin_on_card,
        .user_data = pass,
        .cancelled = nobody_left,
        .cancel_data = pass,
    };
    enum sqz_status status = make_ready(pass, &error);
    pass->on_card = false;
    if (status == SQZ_OK) status = sqz_model_run(pass->model, &run, &error);
    if (pass->on_card) finish_on_card(pass, status != SQZ_OK);
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
    s->lane = (struct sqz_lane){.taken = true,
                                .tokens = tokens,
                                .n_tokens = n_tokens,
                                .n_user_before = s->n_user,
                                .log_offset_before = s->log_offset,
                                .error = error};
    if (n_tokens == 0) return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "no tokens to run");
    if (n_tokens > s->capacity - s->n_user)
        return sqz_error_set(error, SQZ_ERROR_LENGTH,
                             "%zu tokens do not fit: %zu of %zu are left after the context of %zu", n_tokens,
                             s->capacity - s->n_user, s->capacity, s->n_context);
    const enum sqz_status status = sqz_context_check_unchanged(s->context, error);
    if (status != SQZ_OK) return status;
    return sqz_model_check_tokens(s->model, tokens, n_tokens, error);
}

/* What was read of a context that was cut off meanwhile may have been zeros. */
static void look_at_file(struct sqz_session *s)
{
    if (!is_alive(s)) return;
    s->lane.status = sqz_context_check_unchanged(s->context, s->lane.error);
    if (!is_alive(s)) s->has_logits = false;
}

/* All tokens or none; one that was refused before it ran keeps its logits. */
static void end(struct sqz_session *s)
{
    struct sqz_lane *lane = &s->lane;
    if (!is_alive(s)) {
        s->n_user = lane->n_user_before;
        s->log_offset = lane->log_offset_before;
        sqz_ahead_drop(s);
    } else if (s->ahead && !s->ahead->runs) {
        sqz_ngrams_add(&s->ahead->ngrams, lane->n_user_before, lane->tokens, lane->n_tokens);
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
        if (status != SQZ_OK) continue;
        s->has_logits = sqz_ahead_take(s, items[i].tokens, items[i].n_tokens);
        if (s->has_logits) s->lane.n_done = 1;
    }
    for (size_t i = 0; i < n_items; i++)
        while (has_tokens_left(items[i].session)) {
            fill(&pass, items + i, n_items - i, items[i].session->rope);
            run_pass(&pass);
        }
    for (size_t i = 0; i < n_items; i++) {
        look_at_file(items[i].session);
        items[i].status = items[i].session->lane.status;
        end(items[i].session);
    }
    return SQZ_OK;
}
