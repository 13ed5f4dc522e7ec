/* Attention over another context's rows; backend_other_rows.h. */
#include "backend_other_rows.h"

#include "backend_selected.h"
#include "error.h"
#include "session.h"

static void attend(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    const struct backend_other_rows *other = (const struct backend_other_rows *)backend;
    for (size_t i = 0; i < call->n_parts; i++) {
        struct sqz_attend_call of_part = sqz_backend_cpu_attend_call(other->cpu, call, call->parts[i]);
        of_part.layer = sqz_context_layer(other->context, call->node->layer);
        of_part.budget = 1;
        of_part.map = NULL; /* by the rows of the session's own context */
        sqz_attend(&of_part);
    }
}

static void take(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    const struct backend_other_rows *other = (const struct backend_other_rows *)backend;
    other->cpu->ops->take(other->cpu, call);
}

enum sqz_status backend_other_rows_make(struct backend_other_rows *other, const struct sqz_session *session,
                                        const struct sqz_context *context, struct sqz_error *error)
{
    const struct sqz_model *model = session->model;
    size_t most = 0;
    enum sqz_status status = backend_check_one_file(session, error);
    if (status != SQZ_OK) return status;
    for (uint32_t l = 0; l < session->meta->n_layer; l++) {
        const size_t bytes = sqz_attend_workspace_bytes(sqz_context_layer(context, l), session->capacity,
                                                        SQZ_QUESTION_BLOCK_TOKENS, model->info.n_threads);
        if (bytes > most) most = bytes;
    }
    status = sqz_backend_cpu_reserve(model->backend, most, error);
    if (status != SQZ_OK) return status;
    *other = (struct backend_other_rows){.cpu = model->backend, .context = context, .ops = *model->backend->ops};
    other->ops.name = "CPU, other rows";
    other->ops.steered = false; /* everything is read */
    other->ops.take = take;
    other->ops.attend = attend;
    other->base.ops = &other->ops;
    return SQZ_OK;
}
