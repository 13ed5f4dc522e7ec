/*
 * Sessions: one user's tokens on top of a shared, read-only context. The user's
 * own keys and values live here, so any number of sessions share one model.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention_map.h"
#include "backend_shards.h"
#include "error.h"
#include "session.h"
#include "text.h"

void sqz_session_options_default(struct sqz_session_options *options)
{
    *options = (struct sqz_session_options){
        .size = sizeof *options, .budget = 0.1f, .top_p = 0.95f, .seed = 1, .draft_budget = 0.05f, .draft_tokens = 7};
}

static enum sqz_status check_budget(float budget, struct sqz_error *error)
{
    if (budget > 0 && budget <= 1) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "budget %g: allowed is more than 0 and at most 1, for example 0.1",
                         (double)budget);
}

/* The budget that is aimed at when so much is asked for. The published rule, and places that do not steer by a context's
 * curve, stay as they are, for comparisons. */
static float budget_of(const struct sqz_session *s, float asked)
{
    const bool raised = s->backend->ops->steered && s->meta->squeeze.rule != SQZ_RULE_PAPER;
    return raised && asked < s->floor ? s->floor : asked;
}

/* What drafts aim at. Those that read upper planes alone select the rows that their budget has room for as F16: by bytes
 * as they are there would be twice as many, which takes a draft longer than it gains. */
static float draft_budget_of(const struct sqz_session *s, size_t head_dim)
{
    const struct sqz_session_options *o = &s->options;
    const bool upper = o->exact == SQZ_EXACT_INT8 && o->draft_rows == SQZ_DRAFT_ROWS_UPPER;
    const float rows = (float)sqz_row_bytes(SQZ_ROW_I44, head_dim) / (float)sqz_row_bytes(SQZ_ROW_F16, head_dim);
    return budget_of(s, upper ? o->draft_budget * rows : o->draft_budget);
}

static void set_budget(struct sqz_session *s, float asked)
{
    s->options.budget = asked;
    s->budget = budget_of(s, asked);
    s->log_offset = 0;
}

static enum sqz_status check_match(const struct sqz_model *model, const struct sqz_context_meta *meta,
                                   const struct sqz_context *context, struct sqz_error *error)
{
    if (strcmp(model->info.fingerprint, meta->model_fingerprint) != 0)
        return sqz_error_set(error, SQZ_ERROR_MISMATCH,
                             "the context was prepared with another model: %s (%.16s...), this is %s (%.16s...); give "
                             "the right model or prepare the document again",
                             meta->model_name, meta->model_fingerprint, model->info.name, model->info.fingerprint);
    if (meta->n_layer != model->info.n_layer)
        return sqz_error_set(error, SQZ_ERROR_MISMATCH, "the context has %u layers, the model %u", meta->n_layer,
                             model->info.n_layer);
    for (uint32_t l = 0; l < meta->n_layer; l++) {
        const struct sqz_layer *layer = sqz_context_layer(context, l);
        const struct sqz_layer_shape *a = &layer->shape, *b = &model->layers[l].shape;
        if (a->n_head != b->n_head || a->n_head_kv != b->n_head_kv || a->head_dim != b->head_dim ||
            a->scale != b->scale || layer->sliding_window != model->layers[l].sliding_window)
            return sqz_error_set(error, SQZ_ERROR_MISMATCH,
                                 "layer %u of the context has %u query and %u key-value heads of %u, the model's %u, "
                                 "%u and %u",
                                 l, a->n_head, a->n_head_kv, a->head_dim, b->n_head, b->n_head_kv, b->head_dim);
        if (layer->sliding_window && layer->n_window_tokens != model->info.n_window_tokens)
            return sqz_error_set(error, SQZ_ERROR_MISMATCH,
                                 "layer %u of the context has a window of %u tokens, the "
                                 "model's of %u",
                                 l, layer->n_window_tokens, model->info.n_window_tokens);
    }
    if (meta->has_template && !model->chat_template)
        return sqz_error_set(error, SQZ_ERROR_MISMATCH,
                             "the context has a chat template around its document, the model has none that llama.cpp "
                             "knows; prepare the document again");
    for (size_t i = 0; i < meta->n_tokens; i++)
        if ((uint32_t)meta->tokens[i] >= model->info.n_vocab)
            return sqz_error_set(error, SQZ_ERROR_MISMATCH, "token %zu of the context is %d: the model has %u", i,
                                 meta->tokens[i], model->info.n_vocab);
    return SQZ_OK;
}

static size_t map_bytes(const struct sqz_session *s)
{
    return sizeof *s->map + s->n_context * sizeof *s->map->mass;
}

static enum sqz_status allocate(struct sqz_session *s, struct sqz_error *error)
{
    const struct sqz_backend_ops *ops = s->home->ops;
    for (uint32_t l = 0; l < s->meta->n_layer; l++) s->n_clustered += sqz_context_layer(s->context, l)->n_levels != 0;
    s->logits = malloc(s->model->info.n_vocab * sizeof *s->logits);
    s->expected = malloc(s->meta->n_layer * sizeof *s->expected);
    if (!s->logits || !s->expected)
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a session's logits");
    if (s->options.attention_map) {
        s->map = calloc(1, map_bytes(s));
        if (!s->map) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a session's map of attention");
    }
    const enum sqz_status status = ops->bind(s->home, s->context, &s->bound, error);
    return status != SQZ_OK ? status : ops->create_own(s->home, s->bound, s->capacity, &s->own, error);
}

enum sqz_status sqz_session_create(struct sqz_session **out, struct sqz_model *model, const struct sqz_context *context,
                                   const struct sqz_session_options *options, struct sqz_error *error)
{
    struct sqz_session_options defaults;
    struct sqz_context_info info;
    const struct sqz_context_meta *meta = sqz_context_get_meta(context);
    *out = NULL;
    sqz_error_clear(error);
    sqz_session_options_default(&defaults);
    if (!options) options = &defaults;
    if (options->size != sizeof *options)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "session options of %zu bytes: this library's have %zu",
                             options->size, sizeof *options);
    enum sqz_status status = check_budget(options->budget, error);
    if (status != SQZ_OK) return status;
    if (!(options->temperature >= 0 && options->temperature <= 100))
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "temperature %g: allowed is 0 to 100",
                             (double)options->temperature);
    if (!(options->top_p > 0 && options->top_p <= 1))
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "top-p %g: allowed is more than 0 and at most 1",
                             (double)options->top_p);
    status = check_match(model, meta, context, error);
    if (status != SQZ_OK) return status;
    const size_t limit = sqz_model_limit(model, meta->rope_scale);
    if (meta->n_tokens >= limit)
        return sqz_error_set(error, SQZ_ERROR_LENGTH, "the context fills all %zu tokens that the model holds", limit);

    struct sqz_rope rope;
    status = sqz_model_rope_of(model, meta, &rope, error);
    if (status == SQZ_OK) status = sqz_model_make_ready(model, rope, 1, error);
    if (status != SQZ_OK) return status;
    struct sqz_session *s = calloc(1, sizeof *s);
    if (!s) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a session");
    s->model = model;
    s->home = s->backend = model->backend;
    s->context = context;
    s->meta = meta;
    s->options = *options;
    sqz_context_get_info(context, &info);
    s->floor = info.budget_floor;
    if (sqz_context_n_shards(context) && !model->on_card) {
        status = sqz_backend_shards_of(&s->home, model, error);
        s->backend = s->home;
    }
    if (status != SQZ_OK) {
        free(s);
        return status;
    }
    set_budget(s, options->exact == SQZ_EXACT_NO ? options->budget : 1);
    s->rope = rope;
    s->n_context = meta->n_tokens;
    s->capacity = limit - meta->n_tokens;
    if (options->n_user_tokens && options->n_user_tokens < s->capacity) s->capacity = options->n_user_tokens;
    status = allocate(s, error);
    if (status == SQZ_OK) status = sqz_session_create_sampling(s, error);
    if (status == SQZ_OK) status = sqz_ahead_create(s, draft_budget_of(s, info.head_dim), error);
    if (status != SQZ_OK) {
        sqz_session_free(s);
        return status;
    }
    *out = s;
    return SQZ_OK;
}

void sqz_session_free(struct sqz_session *s)
{
    if (!s) return;
    if (s->own) s->home->ops->free_own(s->own);
    if (s->bound) s->home->ops->unbind(s->bound);
    sqz_sampling_free(s->own_sampling);
    sqz_ahead_free(s);
    free(s->logits);
    free(s->expected);
    free(s->map);
    free(s);
}

void sqz_session_reset(struct sqz_session *s)
{
    s->n_user = 0;
    s->log_offset = 0;
    s->has_logits = false;
    if (s->map) memset(s->map, 0, map_bytes(s));
    sqz_sampling_reset(s->own_sampling);
    sqz_ahead_reset(s);
    sqz_session_clear_stats(s);
}

enum sqz_status sqz_session_set_budget(struct sqz_session *s, float budget, struct sqz_error *error)
{
    sqz_error_clear(error);
    enum sqz_status status = check_budget(budget, error);
    if (status != SQZ_OK) return status;
    if (s->ahead)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT,
                             "budget %g: exact answers read everything; a session that is not exact has a budget",
                             (double)budget);
    set_budget(s, budget);
    return SQZ_OK;
}

void sqz_session_wrap(struct sqz_session *s, struct sqz_backend *backend)
{
    s->backend = backend ? backend : s->home;
    set_budget(s, s->options.budget);
    if (s->ahead) s->ahead->way.backend = s->backend;
}

void sqz_session_draft_in(struct sqz_session *s, struct sqz_backend *backend, float budget)
{
    s->ahead->way.backend = backend;
    s->ahead->way.budget = budget;
}

void sqz_session_set_cancel(struct sqz_session *s, bool (*cancelled)(void *user_data), void *user_data)
{
    s->cancelled = cancelled;
    s->cancel_data = user_data;
}

enum sqz_status sqz_session_question_tokens(const struct sqz_session *s, const char *question, size_t question_bytes,
                                            bool first, int32_t **out, size_t *n_tokens, struct sqz_error *error)
{
    struct sqz_tokens tokens = {NULL, 0};
    sqz_error_clear(error);
    *out = NULL;
    *n_tokens = 0;
    enum sqz_status status =
        sqz_text_question(&tokens, s->model, s->meta->has_template, question, question_bytes, first, error);
    if (status != SQZ_OK) {
        free(tokens.data);
        return status;
    }
    *out = tokens.data;
    *n_tokens = tokens.n;
    return SQZ_OK;
}

size_t sqz_session_answer_bytes(const struct sqz_session *s, const char *text, size_t text_bytes, bool *ended)
{
    *ended = false;
    return s->meta->has_template ? text_bytes : sqz_text_answer_bytes(text, text_bytes, ended);
}

void sqz_session_get_stats(const struct sqz_session *s, struct sqz_session_stats *stats)
{
    *stats = (struct sqz_session_stats){
        .n_user_tokens = s->n_user,
        .n_left_tokens = s->capacity - s->n_user,
        .attention = s->stats,
        .run_seconds = s->run_seconds,
        .attention_seconds = s->attention_seconds,
        .least_threads = s->least_threads,
        .most_threads = s->most_threads,
        .budget_asked = s->options.budget,
        .budget_floor = s->floor,
        .budget = s->budget,
        .own_bytes = s->home->ops->own_bytes ? s->home->ops->own_bytes(s->own) : 0,
    };
    if (!s->ahead) return;
    stats->speculation = s->ahead->stats;
    sqz_ahead_leave_out_waiting(s->ahead, &stats->speculation);
    stats->speculation.draft = s->ahead->way.stats;
    stats->speculation.draft_budget = s->ahead->way.budget;
    stats->speculation.draft_rows = s->ahead->way.upper                  ? SQZ_DRAFT_ROWS_UPPER
                                    : s->options.exact == SQZ_EXACT_INT8 ? SQZ_DRAFT_ROWS_BOTH
                                                                         : SQZ_DRAFT_ROWS_F16;
}

uint64_t sqz_session_attention_map(const struct sqz_session *s, float *shares)
{
    const uint64_t n = s->map ? atomic_load(&s->map->n_queries) : 0;
    for (size_t i = 0; n && i < s->n_context; i++)
        shares[i] = (float)((double)atomic_load(&s->map->mass[i]) * SQZ_MAP_UNIT / (double)n);
    return n;
}

const char *sqz_session_fallback(const struct sqz_session *s)
{
    const struct sqz_backend_ops *ops = s->home->ops;
    return ops->fallback ? ops->fallback(s->bound) : "";
}

void sqz_session_clear_stats(struct sqz_session *s)
{
    memset(&s->stats, 0, sizeof s->stats);
    s->run_seconds = s->attention_seconds = 0;
    if (s->ahead) {
        memset(&s->ahead->stats, 0, sizeof s->ahead->stats);
        memset(&s->ahead->way.stats, 0, sizeof s->ahead->way.stats);
    }
    s->least_threads = s->most_threads = 0;
}

void sqz_session_note_threads(struct sqz_session *s, int n)
{
    if (s->least_threads == 0 || n < s->least_threads) s->least_threads = n;
    if (n > s->most_threads) s->most_threads = n;
}
