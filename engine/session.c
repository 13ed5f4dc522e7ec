/*
 * Sessions: one user's tokens on top of a shared, read-only context. The user's
 * own keys and values live here, so any number of sessions share one model.
 *
 * The budget is met by feedback: thresholds come from the context's calibrated
 * curve, and after every generated token the log threshold is corrected a
 * little towards the share that was asked for, so that questions unlike the
 * calibration queries still read what they should on average.
 */
#define _GNU_SOURCE /* mmap flags, clock_gettime, open flags */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "attention.h"
#include "clock.h"
#include "context_file.h"
#include "error.h"
#include "lookup.h"
#include "model.h"
#include "text.h"

/* Correction of the log threshold over one pass through all layers when the share read is off by a factor e: for one
 * token, and for a pass of many, which measures the share far better. A threshold twice as high reads about 0.7 times
 * as much, so these close a fifth and four fifths of a gap. The last is how far the correction may go in all. */
static const float feedback_gain_one = 0.5f, feedback_gain_many = 4.0f, feedback_limit = 6.0f;

/* Question tokens that share a selection; measured in docs/method.md. */
enum { QUESTION_BLOCK_TOKENS = 1 };

struct sqz_session {
    struct sqz_model *model;
    const struct sqz_context *context;
    const struct sqz_context_meta *meta;
    struct sqz_session_options options;
    size_t n_context, capacity, n_user;
    float log_offset;

    uint16_t *rows; /* user keys and values of all layers, F16 [K][capacity][D] each */
    size_t rows_bytes;
    uint16_t **keys, **values; /* [n_layer] into rows */
    void *workspace;
    float *logits;             /* [n_vocab] */
    bool has_logits;
    llama_token_data *candidates;
    struct llama_sampler *sampler;

    struct sqz_attention_stats stats, pass; /* since cleared; of the pass in flight */
    double run_seconds, attention_seconds;
    bool (*cancelled)(void *user_data);
    void *cancel_data;
};

void sqz_session_options_default(struct sqz_session_options *options)
{
    *options = (struct sqz_session_options){.size = sizeof *options, .budget = 0.1f, .top_p = 0.95f, .seed = 1};
}

static enum sqz_status check_budget(float budget, struct sqz_error *error)
{
    if (budget > 0 && budget <= 1) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "budget %g: allowed is more than 0 and at most 1, for example 0.1",
                         (double)budget);
}

static enum sqz_status check_match(const struct sqz_model *model, const struct sqz_context_meta *meta,
                                   const struct sqz_context *context, struct sqz_error *error)
{
    if (strcmp(model->info.fingerprint, meta->model_fingerprint) != 0)
        return sqz_error_set(error, SQZ_ERROR_MISMATCH,
                             "the context was prepared with another model: %s (%.16s...), this is %s (%.16s...); give the "
                             "right model or prepare the document again",
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
                                 "layer %u of the context has %u query and %u key-value heads of %u, the model's %u, %u "
                                 "and %u",
                                 l, a->n_head, a->n_head_kv, a->head_dim, b->n_head, b->n_head_kv, b->head_dim);
    }
    for (size_t i = 0; i < meta->n_tokens; i++)
        if ((uint32_t)meta->tokens[i] >= model->info.n_vocab)
            return sqz_error_set(error, SQZ_ERROR_MISMATCH, "token %zu of the context is %d: the model has %u", i,
                                 meta->tokens[i], model->info.n_vocab);
    return SQZ_OK;
}

static enum sqz_status allocate(struct sqz_session *s, struct sqz_error *error)
{
    const uint32_t n_layer = s->meta->n_layer;
    size_t workspace = 0;
    for (uint32_t l = 0; l < n_layer; l++) {
        const struct sqz_layer *layer = sqz_context_layer(s->context, l);
        const size_t need =
            sqz_attend_workspace_bytes(layer, s->capacity, QUESTION_BLOCK_TOKENS, s->model->info.n_threads);
        if (need > workspace) workspace = need;
        s->rows_bytes += (size_t)layer->shape.n_head_kv * layer->shape.head_dim * s->capacity * 2 * sizeof(uint16_t);
    }
    s->keys = calloc(2 * (size_t)n_layer, sizeof *s->keys);
    s->workspace = malloc(workspace);
    s->logits = malloc(s->model->info.n_vocab * sizeof *s->logits);
    s->candidates = malloc(s->model->info.n_vocab * sizeof *s->candidates);
    /* Address space for all the room there is; memory only for the tokens that come. */
    void *rows = mmap(NULL, s->rows_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    s->rows = rows == MAP_FAILED ? NULL : rows;
    if (!s->keys || !s->workspace || !s->logits || !s->candidates || !s->rows)
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory: %zu bytes for a session of %zu tokens",
                             s->rows_bytes + workspace, s->capacity);
    s->values = s->keys + n_layer;
    uint16_t *at = s->rows;
    for (uint32_t l = 0; l < n_layer; l++) {
        const struct sqz_layer *layer = sqz_context_layer(s->context, l);
        const size_t n = (size_t)layer->shape.n_head_kv * layer->shape.head_dim * s->capacity;
        s->keys[l] = at;
        s->values[l] = at + n;
        at += 2 * n;
    }
    return SQZ_OK;
}

static enum sqz_status create_sampler(struct sqz_session *s, struct sqz_error *error)
{
    struct llama_sampler_chain_params p = llama_sampler_chain_default_params();
    s->sampler = llama_sampler_chain_init(p);
    if (!s->sampler) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a sampler");
    if (s->options.temperature > 0) {
        llama_sampler_chain_add(s->sampler, llama_sampler_init_top_p(s->options.top_p, 1));
        llama_sampler_chain_add(s->sampler, llama_sampler_init_temp(s->options.temperature));
        llama_sampler_chain_add(s->sampler, llama_sampler_init_dist(s->options.seed));
    } else {
        llama_sampler_chain_add(s->sampler, llama_sampler_init_greedy());
    }
    return SQZ_OK;
}

enum sqz_status sqz_session_create(struct sqz_session **out, struct sqz_model *model, const struct sqz_context *context,
                                   const struct sqz_session_options *options, struct sqz_error *error)
{
    struct sqz_session_options defaults;
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
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "temperature %g: allowed is 0 to 100", (double)options->temperature);
    if (!(options->top_p > 0 && options->top_p <= 1))
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "top-p %g: allowed is more than 0 and at most 1",
                             (double)options->top_p);
    status = check_match(model, meta, context, error);
    if (status != SQZ_OK) return status;
    const double trained = (double)model->info.n_context_tokens / (double)model->rope_scale;
    status = sqz_model_set_rope_scale(model, meta->rope_scale, error);
    if (status != SQZ_OK) return status;
    const size_t limit = (size_t)llround(trained * (double)meta->rope_scale);
    model->info.n_context_tokens = (uint32_t)limit;
    if (meta->n_tokens >= limit)
        return sqz_error_set(error, SQZ_ERROR_LENGTH, "the context fills all %zu tokens that the model holds", limit);

    struct sqz_session *s = calloc(1, sizeof *s);
    if (!s) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a session");
    s->model = model;
    s->context = context;
    s->meta = meta;
    s->options = *options;
    s->n_context = meta->n_tokens;
    s->capacity = limit - meta->n_tokens;
    if (options->n_user_tokens && options->n_user_tokens < s->capacity) s->capacity = options->n_user_tokens;
    status = allocate(s, error);
    if (status == SQZ_OK) status = create_sampler(s, error);
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
    if (s->rows) munmap(s->rows, s->rows_bytes);
    if (s->sampler) llama_sampler_free(s->sampler);
    free(s->keys);
    free(s->workspace);
    free(s->logits);
    free(s->candidates);
    free(s);
}

void sqz_session_reset(struct sqz_session *s)
{
    s->n_user = 0;
    s->log_offset = 0;
    s->has_logits = false;
    llama_sampler_reset(s->sampler);
    sqz_session_clear_stats(s);
}

enum sqz_status sqz_session_set_budget(struct sqz_session *s, float budget, struct sqz_error *error)
{
    sqz_error_clear(error);
    enum sqz_status status = check_budget(budget, error);
    if (status != SQZ_OK) return status;
    s->options.budget = budget;
    s->log_offset = 0;
    return SQZ_OK;
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

/* ---- Running tokens ------------------------------------------------------------------- */

static void store_user_rows(struct sqz_session *s, uint16_t *rows, const struct sqz_layer_shape *shape,
                            const uint16_t *from, size_t token_stride, size_t head_stride, size_t n)
{
    const size_t d = shape->head_dim;
    for (uint32_t h = 0; h < shape->n_head_kv; h++)
        for (size_t t = 0; t < n; t++)
            memcpy(rows + (h * s->capacity + s->n_user + t) * d, from + t * token_stride + h * head_stride,
                   d * sizeof *rows);
}

static double share_read(const struct sqz_attention_stats *stats)
{
    return stats->context_bytes
               ? (double)(stats->centroid_bytes + stats->key_bytes + stats->value_bytes) / (double)stats->context_bytes
               : 0.0;
}

static void add_stats(struct sqz_attention_stats *into, const struct sqz_attention_stats *from)
{
    into->context_bytes += from->context_bytes;
    into->centroid_bytes += from->centroid_bytes;
    into->key_bytes += from->key_bytes;
    into->value_bytes += from->value_bytes;
    into->n_selections += from->n_selections;
    into->retained_keys += from->retained_keys;
    into->total_keys += from->total_keys;
}

/* Share of a layer's bytes that the calibration expects at the session's budget. */
static double expected_share(const struct sqz_session *s, const struct sqz_layer *layer)
{
    double sum = 0;
    for (uint32_t h = 0; h < layer->shape.n_head_kv; h++) sum += (double)sqz_head_share_at(layer, h, s->options.budget);
    return sum / layer->shape.n_head_kv;
}

/* After a layer: the correction of the thresholds towards the budget. The published rule has none. */
static void feed_back(struct sqz_session *s, const struct sqz_layer *layer, const struct sqz_attention_stats *read,
                      size_t n_tokens)
{
    const double share = share_read(read);
    if (layer->rule == SQZ_RULE_PAPER || layer->n_levels == 0 || share <= 0 || s->options.budget >= 1) return;
    const float gain = n_tokens > 1 ? feedback_gain_many : feedback_gain_one;
    s->log_offset += gain / (float)s->meta->n_layer * logf((float)(share / expected_share(s, layer)));
    if (s->log_offset > feedback_limit) s->log_offset = feedback_limit;
    if (s->log_offset < -feedback_limit) s->log_offset = -feedback_limit;
}

static enum sqz_status session_attention(void *user_data, const struct sqz_attention_node *node,
                                         struct sqz_error *error)
{
    struct sqz_session *s = user_data;
    const struct sqz_layer *layer = sqz_context_layer(s->context, node->layer);
    const size_t d = layer->shape.head_dim;
    const double since = sqz_clock_seconds();
    struct sqz_attention_stats read = {0};
    (void)error;
    store_user_rows(s, s->keys[node->layer], &layer->shape, node->keys, node->key_token_stride, node->key_head_stride,
                    node->n_tokens);
    store_user_rows(s, s->values[node->layer], &layer->shape, node->values, node->value_token_stride,
                    node->value_head_stride, node->n_tokens);
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
        .budget = s->options.budget,
        .log_offset = s->log_offset,
        .block_tokens = QUESTION_BLOCK_TOKENS,
        .n_threads = s->model->info.n_threads,
        .stats = &read,
        .workspace = s->workspace,
    };
    sqz_attend(&call);
    add_stats(&s->pass, &read);
    feed_back(s, layer, &read, node->n_tokens);
    s->attention_seconds += sqz_clock_seconds() - since;
    return SQZ_OK;
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
    for (size_t i = 0; i < n_tokens; i++)
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= s->model->info.n_vocab)
            return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "token %zu is %d: allowed are 0 to %u", i, tokens[i],
                                 s->model->info.n_vocab - 1);
    enum sqz_status status = sqz_model_set_rope_scale(s->model, s->meta->rope_scale, error);
    const size_t before = s->n_user;
    s->has_logits = false;
    s->model->cancelled = s->cancelled;
    s->model->cancel_data = s->cancel_data;
    for (size_t at = 0; at < n_tokens && status == SQZ_OK; at += SQZ_BATCH_TOKENS) {
        const size_t n = n_tokens - at < SQZ_BATCH_TOKENS ? n_tokens - at : SQZ_BATCH_TOKENS;
        memset(&s->pass, 0, sizeof s->pass);
        status = sqz_model_run(s->model, tokens + at, n, s->n_context + s->n_user, at + n == n_tokens, session_attention,
                               s, error);
        if (status != SQZ_OK) break;
        s->n_user += n;
        add_stats(&s->stats, &s->pass);
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
    if (status != SQZ_OK) s->n_user = before; /* all tokens or none */
    s->run_seconds += sqz_clock_seconds() - since;
    return status;
}

const float *sqz_session_logits(const struct sqz_session *s)
{
    return s->has_logits ? s->logits : NULL;
}

int32_t sqz_session_sample(struct sqz_session *s, bool *end)
{
    const uint32_t n = s->model->info.n_vocab;
    if (!s->has_logits) {
        *end = true;
        return -1;
    }
    for (uint32_t i = 0; i < n; i++) s->candidates[i] = (llama_token_data){(llama_token)i, s->logits[i], 0.0f};
    llama_token_data_array array = {s->candidates, n, -1, false};
    llama_sampler_apply(s->sampler, &array);
    const llama_token token = array.data[array.selected >= 0 ? array.selected : 0].id;
    llama_sampler_accept(s->sampler, token);
    *end = llama_vocab_is_eog(s->model->vocab, token);
    return token;
}

void sqz_session_get_stats(const struct sqz_session *s, struct sqz_session_stats *stats)
{
    *stats = (struct sqz_session_stats){
        .n_user_tokens = s->n_user,
        .n_left_tokens = s->capacity - s->n_user,
        .attention = s->stats,
        .run_seconds = s->run_seconds,
        .attention_seconds = s->attention_seconds,
    };
}

void sqz_session_clear_stats(struct sqz_session *s)
{
    memset(&s->stats, 0, sizeof s->stats);
    s->run_seconds = s->attention_seconds = 0;
}
