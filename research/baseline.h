/*
 * llama.cpp's own dense run of a model, for comparisons: its attention, its
 * cache, nothing of ours in between. Not installed; used by the bench.
 */
#ifndef SQZ_RESEARCH_BASELINE_H
#define SQZ_RESEARCH_BASELINE_H

#include "squeeze.h"

struct sqz_baseline;

/* Room for n_tokens in all. Flash attention on, F16 cache, the model's thread count. Errors: MEMORY. */
enum sqz_status sqz_baseline_create(struct sqz_baseline **out, const struct sqz_model *model, size_t n_tokens,
                                    float rope_scale, struct sqz_error *error);
void sqz_baseline_free(struct sqz_baseline *baseline);

/* The same with batches of another size than 512, which sqz_baseline_run() goes by. */
enum sqz_status sqz_baseline_create_batched(struct sqz_baseline **out, const struct sqz_model *model, size_t n_tokens,
                                            size_t n_batch_tokens, float rope_scale, struct sqz_error *error);

/* Runs tokens after all earlier ones in batches; logits of the last one in sqz_baseline_logits(). */
enum sqz_status sqz_baseline_run(struct sqz_baseline *baseline, const int32_t *tokens, size_t n_tokens,
                                 struct sqz_error *error);
const float *sqz_baseline_logits(const struct sqz_baseline *baseline);

/* Writes all that it has read to a file, by llama.cpp's own call, until the disk has it. Errors: IO. */
enum sqz_status sqz_baseline_save(struct sqz_baseline *baseline, const char *path, const int32_t *tokens,
                                  size_t n_tokens, size_t *n_bytes, struct sqz_error *error);

/* Forgets all tokens from position n_tokens on. */
void sqz_baseline_truncate(struct sqz_baseline *baseline, size_t n_tokens);

/* ---- Several sequences -------------------------------------------- */

/* As sqz_baseline_create(), with n_sequences sequences in one cache of n_tokens tokens in all, or, apart, in caches of
 * n_tokens tokens each: sqz_baseline_run() runs tokens of the first. Errors: MEMORY. */
enum sqz_status sqz_baseline_create_shared(struct sqz_baseline **out, const struct sqz_model *model, size_t n_tokens,
                                           size_t n_sequences, bool apart, float rope_scale, struct sqz_error *error);
/* What the first sequence holds becomes what each holds, and no more: llama_memory_seq_cp(), which copies nothing in one
 * cache, and the whole prefix, once, between several. */
void sqz_baseline_share(struct sqz_baseline *baseline);
/* Runs n_tokens tokens behind position `position` of each of the first n_sequences sequences, [n_sequences][n_tokens],
 * in batches of up to 512; all tokens of a sequence are in one. Errors: LENGTH, INTERNAL. */
enum sqz_status sqz_baseline_run_shared(struct sqz_baseline *baseline, const int32_t *tokens, size_t n_tokens,
                                        size_t n_sequences, size_t position, struct sqz_error *error);
/* The first of the largest of n logits. Whatever is timed beside llama.cpp chooses its tokens by this loop, too, for which
 * many users would wait. */
int32_t sqz_baseline_choose(const float *logits, size_t n);
/* The likeliest token of a sequence after the last run. */
int32_t sqz_baseline_likeliest(const struct sqz_baseline *baseline, size_t sequence);

#endif
