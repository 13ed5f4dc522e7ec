/* llama.cpp's own dense run, see baseline.h. */
#define _GNU_SOURCE /* O_CLOEXEC */
#include "baseline.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "error.h"
#include "run.h"

struct sqz_baseline {
    struct llama_model *own; /* NULL: the engine's is as llama.cpp would load it */
    struct llama_context *context;
    size_t n_tokens, capacity, n_sequences, n_batch, n_vocab;
    bool apart, copied; /* a cache of its own for every sequence; they hold the prefix */
    int32_t likeliest[SQZ_MOST_SEQUENCES];
};

static enum sqz_status create(struct sqz_baseline **out, const struct sqz_model *model, size_t n_tokens,
                              size_t n_sequences, size_t n_batch, bool apart, float rope_scale, struct sqz_error *error)
{
    struct sqz_baseline *b = calloc(1, sizeof *b);
    *out = NULL;
    if (!b) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for llama.cpp's own run");
    struct llama_context_params p = sqz_llama_context_params(model, rope_scale);
    p.n_ctx = (uint32_t)((n_tokens + 255) / 256 * 256 * (apart ? n_sequences : 1));
    p.kv_unified = !apart;
    p.n_seq_max = (uint32_t)n_sequences;
    p.n_batch = p.n_ubatch = (uint32_t)n_batch;
    if (model->n_original_tokens) { /* the engine's is loaded with another original length, see model.c */
        const struct llama_model_params plain = sqz_llama_model_params(model);
        b->own = llama_model_load_from_file(model->files.files[0].path, plain);
    }
    if (b->own || !model->n_original_tokens) b->context = llama_init_from_model(b->own ? b->own : model->llama, p);
    if (!b->context) {
        sqz_baseline_free(b);
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "llama.cpp could not create a context of %zu tokens", n_tokens);
    }
    b->capacity = p.n_ctx / (apart ? n_sequences : 1);
    b->apart = apart;
    b->n_sequences = n_sequences;
    b->n_batch = n_batch;
    b->n_vocab = model->info.n_vocab;
    *out = b;
    return SQZ_OK;
}

enum sqz_status sqz_baseline_create(struct sqz_baseline **out, const struct sqz_model *model, size_t n_tokens,
                                    float rope_scale, struct sqz_error *error)
{
    return create(out, model, n_tokens, 1, SQZ_BATCH_TOKENS, false, rope_scale, error);
}

enum sqz_status sqz_baseline_create_shared(struct sqz_baseline **out, const struct sqz_model *model, size_t n_tokens,
                                           size_t n_sequences, bool apart, float rope_scale, struct sqz_error *error)
{
    return create(out, model, n_tokens, n_sequences, SQZ_BATCH_TOKENS, apart, rope_scale, error);
}

enum sqz_status sqz_baseline_create_batched(struct sqz_baseline **out, const struct sqz_model *model, size_t n_tokens,
                                            size_t n_batch_tokens, float rope_scale, struct sqz_error *error)
{
    return create(out, model, n_tokens, 1, n_batch_tokens, false, rope_scale, error);
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
    if (n_tokens > b->capacity - b->n_tokens)
        return sqz_error_set(error, SQZ_ERROR_LENGTH, "%zu tokens do not fit llama.cpp's context of %zu", n_tokens,
                             b->capacity);
    for (size_t at = 0; at < n_tokens; at += b->n_batch) {
        const size_t n = n_tokens - at < b->n_batch ? n_tokens - at : b->n_batch;
        llama_token *part = (llama_token *)(uintptr_t)(tokens + at); /* it is only read */
        if (llama_decode(b->context, llama_batch_get_one(part, (int32_t)n)) != 0)
            return sqz_error_set(error, SQZ_ERROR_INTERNAL, "llama.cpp could not run %zu tokens", n);
        b->n_tokens += n;
    }
    return SQZ_OK;
}

const float *sqz_baseline_logits(const struct sqz_baseline *b)
{
    return llama_get_logits_ith(b->context, -1);
}

enum sqz_status sqz_baseline_save(struct sqz_baseline *b, const char *path, const int32_t *tokens, size_t n_tokens,
                                  size_t *n_bytes, struct sqz_error *error)
{
    *n_bytes = llama_state_seq_save_file(b->context, path, 0, tokens, n_tokens);
    const int file = *n_bytes ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    const bool synced = file >= 0 && fsync(file) == 0;
    const int reason = errno;
    if (file >= 0) close(file);
    if (synced) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_IO, "%s: llama.cpp could not save its state: %s", path, strerror(reason));
}

void sqz_baseline_truncate(struct sqz_baseline *b, size_t n_tokens)
{
    llama_memory_seq_rm(llama_get_memory(b->context), 0, (llama_pos)n_tokens, -1);
    b->n_tokens = n_tokens;
}

/* ---- Several sequences -------------------------------------------- */

void sqz_baseline_share(struct sqz_baseline *b)
{
    llama_memory_t memory = llama_get_memory(b->context);
    for (size_t s = 1; s < b->n_sequences; s++) {
        llama_memory_seq_rm(memory, (llama_seq_id)s, b->copied ? (llama_pos)b->n_tokens : -1, -1);
        if (!b->copied) llama_memory_seq_cp(memory, 0, (llama_seq_id)s, -1, -1);
    }
    b->copied = b->apart;
}

int32_t sqz_baseline_choose(const float *logits, size_t n)
{
    enum { LANES = 16 };
    float most[LANES], largest = -INFINITY;
    size_t i = 0;
    for (size_t j = 0; j < LANES; j++) most[j] = -INFINITY;
    for (; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; j++) most[j] = logits[i + j] > most[j] ? logits[i + j] : most[j];
    for (size_t j = 0; j < LANES; j++) largest = most[j] > largest ? most[j] : largest;
    for (; i < n; i++) largest = logits[i] > largest ? logits[i] : largest;
    for (i = 0; i + 1 < n && logits[i] != largest; i++) continue;
    return (int32_t)i;
}

enum sqz_status sqz_baseline_run_shared(struct sqz_baseline *b, const int32_t *tokens, size_t n_tokens,
                                        size_t n_sequences, size_t position, struct sqz_error *error)
{
    if (n_tokens < 1 || n_tokens > SQZ_BATCH_TOKENS || n_sequences > b->n_sequences || n_sequences > SQZ_MOST_SEQUENCES)
        return sqz_error_set(error, SQZ_ERROR_LENGTH,
                             "%zu tokens of %zu sequences: llama.cpp's run takes up to %d of "
                             "%zu",
                             n_tokens, n_sequences, SQZ_BATCH_TOKENS, b->n_sequences);
    const size_t most = SQZ_BATCH_TOKENS / n_tokens;
    struct llama_batch batch = llama_batch_init(SQZ_BATCH_TOKENS, 0, 1);
    enum sqz_status status = SQZ_OK;
    for (size_t first = 0; first < n_sequences && status == SQZ_OK; first += most) {
        const size_t n = n_sequences - first < most ? n_sequences - first : most;
        batch.n_tokens = 0;
        for (size_t s = first; s < first + n; s++)
            for (size_t t = 0; t < n_tokens; t++) {
                const int32_t at = batch.n_tokens++;
                batch.token[at] = tokens[s * n_tokens + t];
                batch.pos[at] = (llama_pos)(position + t);
                batch.n_seq_id[at] = 1;
                batch.seq_id[at][0] = (llama_seq_id)s;
                batch.logits[at] = t + 1 == n_tokens;
            }
        if (llama_decode(b->context, batch) != 0)
            status = sqz_error_set(error, SQZ_ERROR_INTERNAL, "llama.cpp could not run %d tokens of %zu sequences",
                                   batch.n_tokens, n);
        for (size_t s = 0; s < n && status == SQZ_OK; s++)
            b->likeliest[first + s] =
                sqz_baseline_choose(llama_get_logits_ith(b->context, (int32_t)((s + 1) * n_tokens - 1)), b->n_vocab);
    }
    llama_batch_free(batch);
    return status;
}

int32_t sqz_baseline_likeliest(const struct sqz_baseline *b, size_t sequence)
{
    return b->likeliest[sequence];
}
