/*
 * llama.cpp's own dense run of a model, for comparisons: its attention, its
 * cache, nothing of ours in between. Not installed; used by the bench.
 */
#ifndef SQZ_ENGINE_BASELINE_H
#define SQZ_ENGINE_BASELINE_H

#include "squeeze.h"

struct sqz_baseline;

/* Room for n_tokens in all. Flash attention on, F16 cache, the model's thread count. Errors: MEMORY. */
enum sqz_status sqz_baseline_create(struct sqz_baseline **out, const struct sqz_model *model, size_t n_tokens,
                                    float rope_scale, struct sqz_error *error);
void sqz_baseline_free(struct sqz_baseline *baseline);

/* Runs tokens after all earlier ones in batches of 512; logits of the last one in sqz_baseline_logits(). */
enum sqz_status sqz_baseline_run(struct sqz_baseline *baseline, const int32_t *tokens, size_t n_tokens,
                                 struct sqz_error *error);
const float *sqz_baseline_logits(const struct sqz_baseline *baseline);

/* Forgets all tokens from position n_tokens on. */
void sqz_baseline_truncate(struct sqz_baseline *baseline, size_t n_tokens);

/* Version text of the llama.cpp linked in. */
const char *sqz_llama_version(void);

#endif
