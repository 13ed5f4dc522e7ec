/* A model's files to llama.cpp; model.h. */
#include <stdio.h>

#include "model.h"
#include "run.h"

struct llama_model_params sqz_llama_model_params(const struct sqz_model *model)
{
    struct llama_model_params p = llama_model_default_params();
    p.devices = (ggml_backend_dev_t *)(uintptr_t)model->devices; /* it reads them alone */
    p.n_gpu_layers = model->n_gpu_layers;
    p.main_gpu = 0;
    p.split_mode = LLAMA_SPLIT_MODE_LAYER;
    p.tensor_split = model->card_shares[0] > 0 ? model->card_shares : NULL;
    return p;
}

struct llama_model *sqz_model_load_llama(const struct sqz_model *model, const struct sqz_model_files *files,
                                         const char *path)
{
    struct llama_model_kv_override overrides[2] = {{.tag = LLAMA_KV_OVERRIDE_TYPE_INT, .val_i64 = SQZ_BATCH_TOKENS}};
    const struct gguf_context *gguf = files->gguf;
    struct llama_model_params p = sqz_llama_model_params(model);
    const int n = snprintf(overrides[0].key, sizeof overrides[0].key, "%s.rope.scaling.original_context_length",
                           gguf_get_val_str(gguf, gguf_find_key(gguf, "general.architecture")));
    if (model->n_original_tokens && n > 0 && (size_t)n < sizeof overrides[0].key) p.kv_overrides = overrides;
    return llama_model_load_from_file(path, p);
}
