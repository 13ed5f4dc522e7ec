/* Attention that a selector steers, and its recall; backend_selected.h. */
#include "backend_selected.h"

#include "error.h"
#include "session.h"

static void attend(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    const struct backend_selected *selected = (const struct backend_selected *)backend;
    const uint32_t layer = call->node->layer;
    for (size_t i = 0; i < call->n_parts; i++) {
        struct sqz_backend_part *part = call->parts[i];
        struct sqz_backend_part *const one[] = {part};
        struct sqz_backend_call alone = *call;
        alone.parts = one;
        alone.n_parts = 1;
        struct sqz_attend_call of_part = sqz_backend_cpu_attend_call(selected->cpu, call, part);
        const bool slides = of_part.layer->sliding_window;
        if (selected->selector && !slides) sqz_attend_selected(&of_part, selected->selector, layer);
        else selected->cpu->ops->attend(selected->cpu, &alone);
        if (!selected->recall || slides) continue;
        of_part.stats = NULL;
        part->status = sqz_recall_add(selected->recall, &of_part, selected->selector, layer, part->error);
    }
}

static void take(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    const struct backend_selected *selected = (const struct backend_selected *)backend;
    selected->cpu->ops->take(selected->cpu, call);
}

enum sqz_status backend_check_one_file(const struct sqz_session *session, struct sqz_error *error)
{
    const uint32_t n_shards = sqz_context_n_shards(session->context);
    if (n_shards == 0) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                         "other methods read contexts of one file; this one is in %u shards", n_shards);
}

enum sqz_status backend_selected_make(struct backend_selected *selected, const struct sqz_session *session,
                                      const struct sqz_selector *selector, struct sqz_recall *recall,
                                      struct sqz_error *error)
{
    const struct sqz_model *model = session->model;
    size_t most = 0;
    enum sqz_status status = backend_check_one_file(session, error);
    if (status != SQZ_OK) return status;
    for (uint32_t l = 0; l < session->meta->n_layer && selector; l++) {
        const struct sqz_layer *layer = sqz_context_layer(session->context, l);
        if (layer->sliding_window) continue;
        const size_t bytes =
            sqz_attend_selected_workspace_bytes(layer, selector, session->capacity, model->info.n_threads);
        if (bytes > most) most = bytes;
    }
    status = sqz_backend_cpu_reserve(model->backend, most, error);
    if (status != SQZ_OK) return status;
    *selected = (struct backend_selected){.cpu = model->backend, .selector = selector, .recall = recall};
    selected->ops = *model->backend->ops;
    selected->ops.name = "CPU, selected";
    selected->ops.steered = !selector; /* a selector has no cost beside its rows */
    selected->ops.take = take;
    selected->ops.attend = attend;
    selected->base.ops = &selected->ops;
    return SQZ_OK;
}

enum sqz_status backend_selected_wrap(struct backend_selected *selected, struct sqz_session *session,
                                      const struct sqz_selector *selector, struct sqz_recall *recall,
                                      struct sqz_error *error)
{
    const enum sqz_status status = backend_selected_make(selected, session, selector, recall, error);
    if (status == SQZ_OK) sqz_session_wrap(session, &selected->base);
    return status;
}
