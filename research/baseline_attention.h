/*
 * ggml's own attention operator (GGML_OP_FLASH_ATTN_EXT on its CPU back end) over the caller's rows, for comparisons.
 * A graph of that one node, run through ggml's public API. Not installed; used by the bench.
 */
#ifndef SQZ_RESEARCH_BASELINE_ATTENTION_H
#define SQZ_RESEARCH_BASELINE_ATTENTION_H

#include "squeeze.h"

struct sqz_baseline_attention;

/* Arrays are the caller's, aligned to 64 bytes, and stay until _free(). keys and values: F16, row r of KV head k at
 * (k * head_rows + r) * D; heads may overlap, so head_rows below n_rows is allowed. Token t of T sees rows
 * [0, n_rows - T + t + 1). */
struct sqz_baseline_attention_args {
    struct sqz_layer_shape shape;
    const uint16_t *keys, *values;
    size_t n_rows, head_rows;
    const float *queries; /* F32 [T][H][D] */
    float *out;           /* F32 [T][H][D] */
    size_t n_tokens;
    int n_threads;
    bool (*cancelled)(void *user_data); /* asked now and then while it runs; NULL: never */
    void *user_data;
};

/* Bytes that _create() will allocate: the mask, F16 [T][n_rows] (none for one token), and the graph. */
size_t sqz_baseline_attention_bytes(size_t n_rows, size_t n_tokens);

/* Errors: MEMORY, UNSUPPORTED (this ggml has no CPU back end). */
enum sqz_status sqz_baseline_attention_create(struct sqz_baseline_attention **out,
                                              const struct sqz_baseline_attention_args *args, struct sqz_error *error);
void sqz_baseline_attention_free(struct sqz_baseline_attention *attention);

/* One run. Errors: CANCELLED, INTERNAL. */
enum sqz_status sqz_baseline_attention_run(struct sqz_baseline_attention *attention, struct sqz_error *error);

#endif
