/* llama.cpp's own dense run, see baseline.h. */
#include "baseline.h"

#include <stdlib.h>

#include "error.h"
#include "run.h"

struct sqz_baseline {
    struct llama_model *own; /* NULL: the engine's is as llama.cpp would load it */
    struct llama_context *context;
    size_t n_tokens, capacity;
};

enum sqz_status sqz_baseline_create(struct sqz_baseline **out, const struct sqz_model *model, size_t n_tokens,
                                    float rope_scale, struct sqz_error *error)
{
    struct sqz_baseline *b = calloc(1, sizeof *b);
    *out = NULL;
    if (!b) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for llama.cpp's own run");
    struct llama_context_params p = sqz_llama_context_params(model, rope_scale);
    p.n_ctx = (uint32_t)((n_tokens + 255) / 256 * 256);
    p.n_batch = p.n_ubatch = SQZ_BATCH_TOKENS;
    if (model->n_original_tokens) { /* the engine's is loaded with another original length, see model.c */
        struct llama_model_params plain = llama_model_default_params();
        plain.n_gpu_layers = 0;
        b->own = llama_model_load_from_file(model->files.files[0].path, plain);
    }
    if (b->own || !model->n_original_tokens) b->context = llama_init_from_model(b->own ? b->own : model->llama, p);
    if (!b->context) {
        sqz_baseline_free(b);
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "llama.cpp could not create a context of %zu tokens", n_tokens);
    }
    b->capacity = p.n_ctx;
    *out = b;
    return SQZ_OK;
}

void sqz_baseline_free(struct sqz_baseline *b)
{
    if (!b) return;
    if (b->context) llama_free(b->context);
    if (b->own) llama_model_free(b->own);
    free(b);
}

enum sqz_status sqz_baseline_run(struct sqz_baseline *b, const int32_t *tokens, size_t n_tokens,
                                 struct sqz_error *error)
{
    llama_token copy[SQZ_BATCH_TOKENS];
    if (n_tokens > b->capacity - b->n_tokens)
        return sqz_error_set(error, SQZ_ERROR_LENGTH, "%zu tokens do not fit llama.cpp's context of %zu", n_tokens,
                             b->capacity);
    for (size_t at = 0; at < n_tokens; at += SQZ_BATCH_TOKENS) {
        const size_t n = n_tokens - at < SQZ_BATCH_TOKENS ? n_tokens - at : SQZ_BATCH_TOKENS;
        for (size_t i = 0; i < n; i++) copy[i] = tokens[at + i];
        if (llama_decode(b->context, llama_batch_get_one(copy, (int32_t)n)) != 0)
            return sqz_error_set(error, SQZ_ERROR_INTERNAL, "llama.cpp could not run %zu tokens", n);
        b->n_tokens += n;
    }
    return SQZ_OK;
}

const float *sqz_baseline_logits(const struct sqz_baseline *b)
{
    return llama_get_logits_ith(b->context, -1);
}

void sqz_baseline_truncate(struct sqz_baseline *b, size_t n_tokens)
{
    llama_memory_seq_rm(llama_get_memory(b->context), 0, (llama_pos)n_tokens, -1);
    b->n_tokens = n_tokens;
}

const char *sqz_llama_version(void)
{
    return llama_version();
}
