/*
 * The seam to llama.cpp: its public cb_eval callback. Asked about a flash
 * attention node, we say that we want to see it and switch its own computation
 * off (an op of GGML_OP_NONE computes nothing); called after it, we restore the
 * node, read queries, keys and values of the batch from its sources and write
 * our result in its place. Nodes come in layer order.
 *
 * llama.cpp's cache never holds more than the batch in flight: it is cleared
 * before every batch and positions go on counting. Everything older is ours.
 */
#include <string.h>

#include "error.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "llama_library.h"
#include "run.h"
#ifdef SQZ_GPU_DEVICE
#include "gpu_device.h"
#endif

static bool fail(struct sqz_model *model, enum sqz_status status, const char *what)
{
    sqz_error_set(&model->run->error, status, "%s: layer %u: %s", model->info.architecture, model->run->next_layer,
                  what);
    return false;
}

/* Fills `node` from a flash attention tensor, or says what cannot be expressed. */
static bool read_node(struct sqz_model *model, const struct ggml_tensor *t, struct sqz_attention_node *node,
                      float *scale)
{
    const struct ggml_tensor *q = t->src[0], *k = t->src[1], *v = t->src[2];
    float parameters[3];
    memcpy(parameters, t->op_params, sizeof parameters);
    *scale = parameters[0];
    if (parameters[1] != 0.0f) return fail(model, SQZ_ERROR_UNSUPPORTED, "ALiBi position bias is not supported");
    if (parameters[2] != 0.0f)
        return fail(model, SQZ_ERROR_UNSUPPORTED, "soft-capped attention logits are not supported");
    if (t->src[4]) return fail(model, SQZ_ERROR_UNSUPPORTED, "learned attention sinks are not supported");
    if (q->type != GGML_TYPE_F32 || k->type != GGML_TYPE_F16 || v->type != GGML_TYPE_F16 || t->type != GGML_TYPE_F32)
        return fail(model, SQZ_ERROR_UNSUPPORTED, "attention inputs are not F32 queries with F16 keys and values");
    if (k->ne[0] != q->ne[0] || v->ne[0] != q->ne[0])
        return fail(model, SQZ_ERROR_UNSUPPORTED, "keys and values of different width (such as MLA) are not supported");
    if (q->ne[3] != 1 || k->ne[3] != 1 || k->ne[2] != v->ne[2] || q->ne[0] < 32 || q->ne[0] > 256 || q->ne[0] % 16 ||
        q->ne[2] % k->ne[2])
        return fail(model, SQZ_ERROR_UNSUPPORTED,
                    "head shape outside what is supported (head dimension 32 to 256 in "
                    "steps of 16, query heads a multiple of key-value heads)");
    if (!q->data || !k->data || !v->data || !t->data || q->nb[0] != sizeof(float) || k->nb[0] != 2 || v->nb[0] != 2)
        return fail(model, SQZ_ERROR_INTERNAL, "attention inputs are not plain rows");
    node->layer = model->run->next_layer;
    node->n_tokens = (size_t)q->ne[1];
    node->queries = q->data;
    node->query_token_stride = q->nb[1] / sizeof(float);
    node->query_head_stride = q->nb[2] / sizeof(float);
    node->keys = k->data;
    node->values = v->data;
    node->key_token_stride = k->nb[1] / 2;
    node->key_head_stride = k->nb[2] / 2;
    node->value_token_stride = v->nb[1] / 2;
    node->value_head_stride = v->nb[2] / 2;
    node->out = t->data;
    node->stream = NULL;
    return true;
}

/* Cells that the first token of a batch sees. */
static int count_seen(const struct ggml_tensor *mask)
{
    ggml_fp16_t part[256];
    int n_seen = 0;
    for (int64_t at = 0; at < mask->ne[0]; at += 256) {
        const int64_t n = mask->ne[0] - at < 256 ? mask->ne[0] - at : 256;
        ggml_backend_tensor_get(mask, part, (size_t)at * sizeof *part, (size_t)n * sizeof *part);
        for (int64_t i = 0; i < n; i++) n_seen += ggml_fp16_to_fp32(part[i]) == 0.0f;
    }
    return n_seen;
}

/* While probing: remembers the shape of each layer, and its mask for the search for sliding windows. */
static bool probe_node(struct sqz_model *model, const struct ggml_tensor *t, int card, const void *stream)
{
    struct sqz_attention_node node;
    float scale;
    if (!read_node(model, t, &node, &scale)) return false;
    if (node.layer >= model->info.n_layer)
        return fail(model, SQZ_ERROR_UNSUPPORTED, "more attention nodes than layers");
    struct sqz_model_layer *layer = &model->layers[node.layer];
    layer->shape = (struct sqz_layer_shape){(uint32_t)t->src[0]->ne[2], (uint32_t)t->src[1]->ne[2],
                                            (uint32_t)t->src[0]->ne[0], scale};
    layer->card = card;
    /* In the last probe (see model.c) a full layer sees three tokens, a sliding one no longer the first. */
    const struct ggml_tensor *mask = t->src[3];
    if (mask && mask->data && mask->type == GGML_TYPE_F16)
        layer->sliding_window = model->info.n_window_tokens && count_seen(mask) < 3;
    if (!stream) memset(t->data, 0, ggml_nbytes(t));
    model->run->next_layer++;
    return true;
}

/* A node whose own computation did not happen. */
static bool handle(struct sqz_model *model, const struct ggml_tensor *t, int card, void *stream)
{
    struct sqz_run *run = model->run;
    if (run->error.status != SQZ_OK) return false;
    if (run->probing) return probe_node(model, t, card, stream);
    struct sqz_attention_node node;
    float scale;
    if (!read_node(model, t, &node, &scale)) return false;
    node.stream = stream;
    if (node.layer >= model->info.n_layer) return fail(model, SQZ_ERROR_INTERNAL, "more attention nodes than layers");
    if (run->handler(run->user_data, &node, &run->error) != SQZ_OK) return false;
    run->next_layer++;
    return true;
}

static bool is_on_host(const struct ggml_tensor *t)
{
    return !t->buffer || ggml_backend_buffer_is_host(t->buffer);
}

/* A node on a card: what we launch is waited for, because nothing else orders it before ggml's next operation. */
static bool handle_on_card(struct sqz_model *model, const struct ggml_tensor *t, int card)
{
    const struct sqz_gpu_calls *calls = sqz_gpu_calls_of();
    struct sqz_run *run = model->run;
    void **stream = &model->streams[card];
    if (!calls->use(card) || !(*stream || (*stream = calls->create_stream())))
        return fail(model, SQZ_ERROR_INTERNAL, calls->complaint());
    if (!run->begun[card] && run->begin) run->begin(run->user_data, card, *stream, NULL);
    run->begun[card] = true;
    if (!handle(model, t, card, *stream)) return false;
    return calls->wait(*stream) || fail(model, SQZ_ERROR_INTERNAL, calls->complaint());
}

void sqz_seam_close(struct sqz_model *model)
{
    for (int i = 0; i < SQZ_MOST_CARDS; i++)
        if (model->streams[i]) sqz_gpu_calls_of()->use(i), sqz_gpu_calls_of()->free_stream(model->streams[i]);
}

static int card_of(const struct ggml_tensor *t)
{
    if (is_on_host(t)) return SQZ_ON_HOST;
    return sqz_gpu_card_of(ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t->buffer)));
}

/* Nodes that a device of our own sees to are not ours to take. */
static bool is_wanted(const struct sqz_model *model, const struct ggml_tensor *t)
{
    if (t->op != GGML_OP_FLASH_ATTN_EXT) return false;
    return !model->on_card || is_on_host(t) || (sqz_gpu_by_callback() && card_of(t) >= 0);
}

bool sqz_seam_callback(struct ggml_tensor *t, bool ask, void *user_data)
{
    struct sqz_model *model = user_data;
    struct sqz_run *run = model->run;
    if (ask) {
        if (!is_wanted(model, t)) return false;
        run->replaced = t;
        t->op = GGML_OP_NONE;
        return true;
    }
    t->op = GGML_OP_FLASH_ATTN_EXT;
    run->replaced = NULL;
    const int card = model->on_card ? card_of(t) : SQZ_ON_HOST;
    return card >= 0 ? handle_on_card(model, t, card) : handle(model, t, SQZ_ON_HOST, NULL);
}

/* ---- On a card -------------------------------------------------------------------------- */

#ifdef SQZ_GPU_DEVICE
static bool begin_graph(void *user_data, int card, void *stream, uint64_t *key, struct sqz_gpu_beside *beside)
{
    struct sqz_run *run = ((struct sqz_model *)user_data)->run;
    *key = run->begin ? run->begin(run->user_data, card, stream, beside) : 0;
    return run->error.status == SQZ_OK;
}

static bool handle_node(void *user_data, struct ggml_tensor *t, int card, void *stream)
{
    return handle(user_data, t, card, stream);
}

static void all_replayed(void *user_data, uint32_t n_nodes)
{
    struct sqz_model *model = user_data;
    model->run->next_layer += n_nodes;
}

static void go_to(void *user_data, uint32_t layer)
{
    ((struct sqz_model *)user_data)->run->next_layer = layer;
}

static void product_failed(void *user_data)
{
    struct sqz_model *model = user_data;
    sqz_error_set(&model->run->error, SQZ_ERROR_INTERNAL, "a product on the card failed: %s",
                  sqz_gpu_calls_of()->complaint());
}

static _Thread_local struct sqz_gpu_handler entered;

void sqz_seam_enter(struct sqz_model *model, bool probing)
{
    entered = (struct sqz_gpu_handler){.user_data = model,
                                       .inspect = probing,
                                       .begin = begin_graph,
                                       .node = handle_node,
                                       .weights = model->wants_copies ? model->weights : NULL,
                                       .bands = model->run ? model->run->bands : NULL,
                                       .go_to = go_to,
                                       .replayed = all_replayed,
                                       .product_failed = product_failed};
    sqz_gpu_device_enter(&entered);
}

void sqz_seam_leave(void)
{
    sqz_gpu_device_enter(NULL);
}
#else
void sqz_seam_enter(struct sqz_model *model, bool probing)
{
    (void)model, (void)probing;
}

void sqz_seam_leave(void)
{
}
#endif

/* ---- Parts of nodes ------------------------------------------------------------------------ */

struct sqz_attention_node sqz_node_part(const struct sqz_attention_node *node, const struct sqz_layer_shape *shape,
                                        size_t first_token, size_t n_tokens)
{
    struct sqz_attention_node part = *node;
    part.n_tokens = n_tokens;
    part.queries += first_token * node->query_token_stride;
    part.keys += first_token * node->key_token_stride;
    part.values += first_token * node->value_token_stride;
    part.out += first_token * shape->n_head * shape->head_dim;
    return part;
}

void sqz_node_store_rows(const struct sqz_attention_node *node, const struct sqz_layer_shape *shape, uint16_t *keys,
                         uint16_t *values, size_t capacity_rows, size_t first_row)
{
    const size_t d = shape->head_dim;
    for (uint32_t h = 0; h < shape->n_head_kv; h++)
        for (size_t t = 0; t < node->n_tokens; t++) {
            const size_t at = (h * capacity_rows + first_row + t) * d;
            memcpy(keys + at, node->keys + t * node->key_token_stride + h * node->key_head_stride, d * sizeof *keys);
            memcpy(values + at, node->values + t * node->value_token_stride + h * node->value_head_stride,
                   d * sizeof *values);
        }
}

enum sqz_status sqz_model_check_tokens(const struct sqz_model *model, const int32_t *tokens, size_t n_tokens,
                                       struct sqz_error *error)
{
    for (size_t i = 0; i < n_tokens; i++)
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= model->info.n_vocab)
            return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "token %zu is %d: allowed are 0 to %u", i, tokens[i],
                                 model->info.n_vocab - 1);
    return SQZ_OK;
}

static bool abort_callback(void *user_data)
{
    const struct sqz_run *run = user_data;
    return run->cancelled && run->cancelled(run->cancel_data);
}

int32_t sqz_run_decode(struct sqz_model *model, struct sqz_run *run)
{
    llama_pos positions[SQZ_READING_TOKENS];
    int32_t n_seq_id[SQZ_READING_TOKENS];
    llama_seq_id sequence[SQZ_READING_TOKENS], *seq_id[SQZ_READING_TOKENS];
    int8_t logits[SQZ_READING_TOKENS];
    llama_token tokens[SQZ_READING_TOKENS];
    for (size_t i = 0; i < run->n_tokens; i++) {
        tokens[i] = run->tokens[i].token;
        positions[i] = run->tokens[i].position;
        sequence[i] = (llama_seq_id)run->tokens[i].sequence;
        n_seq_id[i] = 1;
        seq_id[i] = &sequence[i];
        logits[i] = run->tokens[i].wants_logits;
    }
    const struct llama_batch batch = {
        .n_tokens = (int32_t)run->n_tokens,
        .token = tokens,
        .pos = positions,
        .n_seq_id = n_seq_id,
        .seq_id = seq_id,
        .logits = logits,
    };
    run->next_layer = run->bands && !run->bands->whole ? sqz_band_begin(run->bands) : 0;
    if (run->bands) run->bands->n_seen = 0;
    run->replaced = NULL;
    memset(run->begun, 0, sizeof run->begun);
    model->run = run;
    llama_set_abort_callback(model->running, abort_callback, run);
    if (model->on_card) sqz_seam_enter(model, run->probing);
    const int32_t result = llama_decode(model->running, batch);
    if (model->on_card) {
        if (!run->goes_on) llama_synchronize(model->running);
        sqz_seam_leave();
    }
    llama_set_abort_callback(model->running, NULL, NULL);
    model->run = NULL;
    if (run->replaced) { /* stopped between switching a node off and coming back to it */
        run->replaced->op = GGML_OP_FLASH_ATTN_EXT;
        run->replaced = NULL;
    }
    return result;
}

void sqz_model_wait(struct sqz_model *model)
{
    if (model->context) llama_synchronize(model->context); /* texts are read there; `running` is whoever runs' */
}

enum sqz_status sqz_model_run(struct sqz_model *model, struct sqz_run *run, struct sqz_error *error)
{
    if (run->n_tokens < 1 || run->n_tokens > model->n_batch_tokens)
        return sqz_error_set(error, SQZ_ERROR_INTERNAL, "batch of %zu tokens", run->n_tokens);
    const enum sqz_status status = sqz_model_files_check(&model->files, false, error);
    if (status != SQZ_OK) return status;
    sqz_error_clear(&run->error);
    llama_memory_clear(llama_get_memory(model->running), false);
    /* The same for both libraries: OpenMP builds its team anew when its size changes. */
    const int n_threads = sqz_crew_step(&model->crew, run->n_tokens);
    llama_set_n_threads(model->running, n_threads, n_threads);
    const int32_t result = sqz_run_decode(model, run);
    sqz_crew_pause(&model->crew);
    if (run->error.status != SQZ_OK) {
        if (error) *error = run->error;
        return run->error.status;
    }
    if (result == 2) return sqz_error_set(error, SQZ_ERROR_CANCELLED, "cancelled");
    if (result != 0)
        return sqz_error_set(error, SQZ_ERROR_INTERNAL,
                             "llama.cpp could not run %zu tokens at position %d (code %d): %s%s%s", run->n_tokens,
                             run->tokens[0].position, result, sqz_llama_complaint("unknown reason"),
                             model->info.n_gpu_layers ? "; the card: " : "",
                             model->info.n_gpu_layers ? sqz_gpu_calls_of()->complaint() : "");
    if (run->next_layer != (run->bands && !run->bands->whole ? run->bands->end[run->bands->now] : model->info.n_layer))
        return sqz_error_set(error, SQZ_ERROR_INTERNAL, "%u attention nodes ran in a model of %u layers",
                             run->next_layer, model->info.n_layer);
    return SQZ_OK;
}
