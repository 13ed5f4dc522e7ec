/* What single tokens attend to in a context without clusters: the arithmetic of snapkv.h. */
#ifndef SQZ_RESEARCH_SNAPKV_SCORES_H
#define SQZ_RESEARCH_SNAPKV_SCORES_H

#include "attention.h"

enum { SNAPKV_POOL = 7 };

/* Adds to weight[0..n_rows) the attention probabilities that token number `token` of the call has for the rows of a KV head,
 * over all query heads of its group; the user's rows up to its own are in the denominator. logits: room for all of these. */
void snapkv_add(float *weight, float *logits, const struct sqz_attend_call *call, size_t head, size_t token);

/* pooled[i]: the largest of the SNAPKV_POOL weights around i, fewer at the ends. */
void snapkv_pool(float *pooled, const float *weight, size_t n);

#endif
