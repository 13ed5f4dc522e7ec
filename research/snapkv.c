/* Keys chosen once for an answer; snapkv.h. */
#include "snapkv.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "eval_methods.h"
#include "largest.h"
#include "session.h"

/* ---- The question's run ------------------------------------------------------------------- */

static void watch(const struct snapkv *snapkv, const struct sqz_attend_call *call, uint32_t l)
{
    const struct snapkv_layer *layer = &snapkv->layers[l];
    const size_t n = call->layer->n_rows, n_heads = call->layer->shape.n_head_kv;
    const size_t first = call->n_tokens > SNAPKV_WINDOW_TOKENS ? call->n_tokens - SNAPKV_WINDOW_TOKENS : 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(call->n_threads)
    for (size_t h = 0; h < n_heads; h++) {
        float *weight = layer->weight + h * n;
        layer->n_kept[h] = 0;
        memset(weight, 0, n * sizeof *weight);
        for (size_t t = first; t < call->n_tokens; t++)
            snapkv_add(weight, layer->logits + h * (n + SQZ_BATCH_TOKENS), call, h, t);
        snapkv_pool(layer->pooled + h * n, weight, n);
    }
}

static void attend(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    const struct snapkv *snapkv = (const struct snapkv *)backend;
    snapkv->cpu->ops->attend(snapkv->cpu, call);
    for (size_t i = 0; i < call->n_parts; i++) {
        const struct sqz_backend_part *part = call->parts[i];
        const struct sqz_attend_call of_part = sqz_backend_cpu_attend_call(snapkv->cpu, call, part);
        if (part->n_own == 0 && part->n_tokens > 1 && !of_part.layer->sliding_window)
            watch(snapkv, &of_part, call->node->layer);
    }
}

static void take(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    const struct snapkv *snapkv = (const struct snapkv *)backend;
    snapkv->cpu->ops->take(snapkv->cpu, call);
}

/* ---- What is read ------------------------------------------------------------------------- */

/* At the first token behind the question each head chooses; one thread has a head. */
static size_t select_chosen(const void *data, const struct sqz_select_call *call, uint32_t *rows, uint64_t *index_bytes)
{
    const struct snapkv *snapkv = data;
    const struct snapkv_layer *layer = &snapkv->layers[call->layer_index];
    const size_t n = call->layer->n_rows, h = call->head_kv;
    uint32_t *kept = layer->rows + h * n;
    *index_bytes = 0;
    if (layer->n_kept[h] == 0) {
        layer->n_kept[h] = (uint32_t)rows_of_budget(call);
        sqz_list_largest(kept, layer->pooled + h * n, layer->weight + h * n, n, layer->n_kept[h]); /* done with */
    }
    memcpy(rows, kept, layer->n_kept[h] * sizeof *rows);
    return layer->n_kept[h];
}

static size_t no_workspace(const void *data, const struct sqz_layer *layer)
{
    (void)data;
    (void)layer;
    return 0;
}

/* ---- The places ----------------------------------------------------------------------------- */

void snapkv_free(struct snapkv *snapkv)
{
    for (uint32_t l = 0; snapkv->layers && l < snapkv->n_layer; l++) {
        free(snapkv->layers[l].weight);
        free(snapkv->layers[l].rows);
    }
    free(snapkv->layers);
    *snapkv = (struct snapkv){0};
}

static bool make_layer(struct snapkv_layer *to, const struct sqz_layer *layer)
{
    const size_t heads = layer->shape.n_head_kv, n = heads * layer->n_rows;
    if (layer->sliding_window) return true;
    to->weight = calloc(3 * n + heads * SQZ_BATCH_TOKENS, sizeof *to->weight);
    to->rows = calloc(n + heads, sizeof *to->rows);
    if (!to->weight || !to->rows) return false;
    to->pooled = to->weight + n;
    to->logits = to->pooled + n;
    to->n_kept = to->rows + n;
    return true;
}

enum sqz_status snapkv_make(struct snapkv *snapkv, struct sqz_session *session, struct sqz_error *error)
{
    struct sqz_backend *cpu = session->model->backend;
    bool room = true;
    *snapkv = (struct snapkv){.cpu = cpu, .ops = *cpu->ops, .n_layer = session->meta->n_layer};
    snapkv->layers = calloc(snapkv->n_layer, sizeof *snapkv->layers);
    for (uint32_t l = 0; l < snapkv->n_layer && snapkv->layers && room; l++)
        room = make_layer(&snapkv->layers[l], sqz_context_layer(session->context, l));
    snapkv->selector = (struct sqz_selector){select_chosen, no_workspace, snapkv};
    enum sqz_status status =
        snapkv->layers && room ? SQZ_OK : sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for chosen keys");
    if (status == SQZ_OK) status = backend_selected_make(&snapkv->chosen, session, &snapkv->selector, NULL, error);
    if (status != SQZ_OK) {
        snapkv_free(snapkv);
        return status;
    }
    snapkv->ops.name = "CPU, watched";
    snapkv->ops.take = take;
    snapkv->ops.attend = attend;
    snapkv->base.ops = &snapkv->ops;
    sqz_session_wrap(session, &snapkv->base);
    return SQZ_OK;
}
