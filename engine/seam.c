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
#include "ggml.h"
#include "model.h"

static bool fail(struct sqz_model *model, enum sqz_status status, const char *what)
{
    sqz_error_set(&model->seam_error, status, "%s: layer %u: %s", model->info.architecture, model->next_layer, what);
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
        return fail(model, SQZ_ERROR_UNSUPPORTED, "head shape outside what is supported (head dimension 32 to 256 in "
                                                  "steps of 16, query heads a multiple of key-value heads)");
    if (!q->data || !k->data || !v->data || !t->data || q->nb[0] != sizeof(float) || k->nb[0] != 2 || v->nb[0] != 2)
        return fail(model, SQZ_ERROR_INTERNAL, "attention inputs are not plain rows in host memory");
    node->layer = model->next_layer;
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
    return true;
}

/* While probing: remembers the shape of each layer, and its mask for the search for sliding windows. */
static bool probe_node(struct sqz_model *model, const struct ggml_tensor *t)
{
    struct sqz_attention_node node;
    float scale;
    if (!read_node(model, t, &node, &scale)) return false;
    if (model->next_layer >= model->info.n_layer)
        return fail(model, SQZ_ERROR_UNSUPPORTED, "more attention nodes than layers");
    struct sqz_model_layer *layer = &model->layers[model->next_layer];
    layer->shape = (struct sqz_layer_shape){(uint32_t)t->src[0]->ne[2], (uint32_t)t->src[1]->ne[2],
                                            (uint32_t)t->src[0]->ne[0], scale};
    /* In the last probe (see model.c) a full layer sees three tokens, a sliding one no longer the first. */
    const struct ggml_tensor *mask = t->src[3];
    if (mask && mask->data && mask->type == GGML_TYPE_F16) {
        const ggml_fp16_t *row = mask->data;
        int n_seen = 0;
        for (int64_t i = 0; i < mask->ne[0]; i++) n_seen += ggml_fp16_to_fp32(row[i]) == 0.0f;
        layer->sliding_window = model->info.n_window_tokens && n_seen < 3;
    }
    memset(t->data, 0, ggml_nbytes(t));
    model->next_layer++;
    return true;
}

bool sqz_seam_callback(struct ggml_tensor *t, bool ask, void *user_data)
{
    struct sqz_model *model = user_data;
    if (ask) {
        if (t->op != GGML_OP_FLASH_ATTN_EXT) return false;
        model->replaced = t;
        t->op = GGML_OP_NONE;
        return true;
    }
    t->op = GGML_OP_FLASH_ATTN_EXT;
    model->replaced = NULL;
    if (model->seam_error.status != SQZ_OK) return false;
    if (model->probing) return probe_node(model, t);
    struct sqz_attention_node node;
    float scale;
    if (!read_node(model, t, &node, &scale)) return false;
    if (node.layer >= model->info.n_layer) return fail(model, SQZ_ERROR_INTERNAL, "more attention nodes than layers");
    if (model->handler(model->handler_data, &node, &model->seam_error) != SQZ_OK) return false;
    model->next_layer++;
    return true;
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

static bool abort_callback(void *user_data)
{
    struct sqz_model *model = user_data;
    return model->cancelled && model->cancelled(model->cancel_data);
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

enum sqz_status sqz_model_run(struct sqz_model *model, const int32_t *tokens, size_t n_tokens, size_t first_position,
                              bool want_logits, sqz_attention_handler handler, void *handler_data,
                              struct sqz_error *error)
{
    llama_pos positions[SQZ_BATCH_TOKENS];
    int32_t n_seq_id[SQZ_BATCH_TOKENS];
    llama_seq_id zero = 0, *seq_id[SQZ_BATCH_TOKENS];
    int8_t logits[SQZ_BATCH_TOKENS];
    llama_token copy[SQZ_BATCH_TOKENS];
    if (n_tokens < 1 || n_tokens > SQZ_BATCH_TOKENS)
        return sqz_error_set(error, SQZ_ERROR_INTERNAL, "batch of %zu tokens", n_tokens);
    const enum sqz_status status = sqz_model_files_check(&model->files, false, error);
    if (status != SQZ_OK) return status;
    for (size_t i = 0; i < n_tokens; i++) {
        copy[i] = tokens[i];
        positions[i] = (llama_pos)(first_position + i);
        n_seq_id[i] = 1;
        seq_id[i] = &zero;
        logits[i] = want_logits && i + 1 == n_tokens;
    }
    const struct llama_batch batch = {
        .n_tokens = (int32_t)n_tokens,
        .token = copy,
        .pos = positions,
        .n_seq_id = n_seq_id,
        .seq_id = seq_id,
        .logits = logits,
    };
    model->handler = handler;
    model->handler_data = handler_data;
    model->next_layer = 0;
    sqz_error_clear(&model->seam_error);
    llama_set_abort_callback(model->context, abort_callback, model);
    llama_memory_clear(llama_get_memory(model->context), false);
    /* The same for both libraries: OpenMP builds its team anew when its size changes. */
    const int n_threads = sqz_crew_step(&model->crew, n_tokens);
    llama_set_n_threads(model->context, n_threads, n_threads);
    const int32_t result = llama_decode(model->context, batch);
    sqz_crew_pause(&model->crew);
    if (model->replaced) { /* stopped between switching a node off and coming back to it */
        model->replaced->op = GGML_OP_FLASH_ATTN_EXT;
        model->replaced = NULL;
    }
    model->handler = NULL;
    if (model->seam_error.status != SQZ_OK) {
        if (error) *error = model->seam_error;
        return model->seam_error.status;
    }
    if (result == 2) return sqz_error_set(error, SQZ_ERROR_CANCELLED, "cancelled");
    if (result != 0)
        return sqz_error_set(error, SQZ_ERROR_INTERNAL,
                             "llama.cpp could not run %zu tokens at position %zu (code %d) %s", n_tokens,
                             first_position, result, sqz_llama_complaint());
    if (model->next_layer != model->info.n_layer)
        return sqz_error_set(error, SQZ_ERROR_INTERNAL, "%u attention nodes ran in a model of %u layers",
                             model->next_layer, model->info.n_layer);
    return SQZ_OK;
}
