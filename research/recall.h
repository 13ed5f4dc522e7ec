/*
 * How much of the true attention a session's attention reaches, by layer and
 * KV head: the share of the softmax's mass, over the context and the user's
 * own tokens, that rows read exactly hold, and the share of the context's keys
 * that those rows are. Estimates for pruned clusters and values that were not
 * read do not count against it. For measurements: every attention is computed
 * twice more, once dense.
 */
#ifndef SQZ_RESEARCH_RECALL_H
#define SQZ_RESEARCH_RECALL_H

#include "attend_selected.h"

struct sqz_recall {
    uint32_t n_layer, n_head_kv; /* n_head_kv: the most of any layer */
    double *mass, *keys, *n;     /* [n_layer][n_head_kv] sums over tokens and query heads; how many of these */
};

/* Errors: MEMORY. */
enum sqz_status sqz_recall_create(struct sqz_recall *recall, const struct sqz_context *context, uint32_t n_layer,
                                  struct sqz_error *error);
void sqz_recall_free(struct sqz_recall *recall);

/* Adds the tokens of a call on a layer that is no sliding window, with the selector that it went through, if any; the
 * call's outputs are left alone. Errors: MEMORY. */
enum sqz_status sqz_recall_add(struct sqz_recall *recall, const struct sqz_attend_call *call,
                               const struct sqz_selector *selector, uint32_t layer_index, struct sqz_error *error);

#endif
