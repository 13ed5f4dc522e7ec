/*
 * Attention over rows that somebody else chooses: the seam at which other
 * methods (page bounds, windows, an oracle) are compared with the lookup. Same
 * kernels, same engine, same counting of bytes; built for comparisons, not for
 * speed, and used by nothing else.
 */
#ifndef SQZ_RESEARCH_ATTEND_SELECTED_H
#define SQZ_RESEARCH_ATTEND_SELECTED_H

#include "attention.h"

/* One choice: which rows of a KV head the queries of one token read. */
struct sqz_select_call {
    const struct sqz_layer *layer;
    uint32_t layer_index, head_kv;
    const float *queries; /* F32 [n_query_rows][D], all query heads of the KV head's group */
    size_t n_query_rows;
    float budget; /* share of the layer's KV bytes, what is read to choose included */
    void *workspace;
};

struct sqz_selector {
    /* Writes row numbers of the layer, ascending, to rows[0..n_rows) and returns how many; *index_bytes: what was read to
     * choose. Called by several threads at once, each with a workspace of its own. */
    size_t (*select)(const void *data, const struct sqz_select_call *call, uint32_t *rows, uint64_t *index_bytes);
    size_t (*workspace_bytes)(const void *data, const struct sqz_layer *layer); /* of one call */
    const void *data;
};

/* Bytes for any call on `layer` with n_user up to max_user_rows. */
size_t sqz_attend_selected_workspace_bytes(const struct sqz_layer *layer, const struct sqz_selector *selector,
                                           size_t max_user_rows, int n_threads);

/* As sqz_attend(), every token with a selection of its own; log_offset and block_tokens are not looked at. The layer is
 * no sliding window. */
void sqz_attend_selected(const struct sqz_attend_call *call, const struct sqz_selector *selector, uint32_t layer_index);

#endif
