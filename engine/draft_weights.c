/* Weights that draft; draft_weights.h. */
#include "draft_weights.h"

#include <string.h>

#include "error.h"
#include "llama_library.h"

/* What of two models must be the same for one to draft with the other's keys and values. */
static enum sqz_status check_same(const struct sqz_model *model, const char *path, struct sqz_error *error)
{
    const struct llama_model *own = model->llama, *drafting = model->drafting.llama;
    const struct {
        const char *what;
        long own, drafting;
    } shared[] = {
        {"layers", llama_model_n_layer(own), llama_model_n_layer(drafting)},
        {"query heads", llama_model_n_head(own), llama_model_n_head(drafting)},
        {"key-value heads", llama_model_n_head_kv(own), llama_model_n_head_kv(drafting)},
        {"numbers a token", llama_model_n_embd(own), llama_model_n_embd(drafting)},
        {"tokens of its vocabulary", model->info.n_vocab, llama_vocab_n_tokens(llama_model_get_vocab(drafting))},
        {"parameters", (long)llama_model_n_params(own), (long)llama_model_n_params(drafting)},
        {"trained tokens", llama_model_n_ctx_train(own), llama_model_n_ctx_train(drafting)},
    };
    char architecture[64] = "";
    llama_model_meta_val_str(drafting, "general.architecture", architecture, sizeof architecture);
    if (strcmp(architecture, model->info.architecture) != 0)
        return sqz_error_set(error, SQZ_ERROR_MISMATCH,
                             "%s: it is to draft for a model of architecture %s, and is of %s: only a file of the same "
                             "model in fewer bits can",
                             path, model->info.architecture, architecture);
    for (size_t i = 0; i < sizeof shared / sizeof *shared; i++)
        if (shared[i].own != shared[i].drafting)
            return sqz_error_set(error, SQZ_ERROR_MISMATCH,
                                 "%s: it is to draft, and has %ld %s where the model has %ld: only a file of the same "
                                 "model in fewer bits can",
                                 path, shared[i].drafting, shared[i].what, shared[i].own);
    return SQZ_OK;
}

enum sqz_status sqz_draft_weights_load(struct sqz_model *model, const char *path, struct sqz_error *error)
{
    struct sqz_drafting *d = &model->drafting;
    enum sqz_status status = sqz_model_files_open(&d->files, path, error);
    if (status != SQZ_OK) return status;
    sqz_llama_complaint_clear();
    d->llama = sqz_model_load_llama(model, &d->files, path);
    if (!d->llama)
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED, "%s: llama.cpp cannot load these weights for drafts: %s",
                             path, sqz_llama_complaint("unknown reason"));
    model->info.draft_size_bytes = llama_model_size(d->llama);
    return check_same(model, path, error);
}

void sqz_draft_weights_free(struct sqz_model *model)
{
    if (model->drafting.llama) llama_model_free(model->drafting.llama);
    sqz_model_files_close(&model->drafting.files);
}
