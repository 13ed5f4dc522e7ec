/*
 * A layer on its own, without model or file: sqz_layer_create(), _attend() and
 * _free() of the public header.
 */
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "build.h"
#include "error.h"
#include "kernels.h"

/* What a created layer owns beside its index: the struct, then its rows. */
struct created_layer {
    struct sqz_layer layer; /* first: the public pointer points here */
    uint16_t *rows;
};

void sqz_layer_free(struct sqz_layer *layer)
{
    if (!layer) return;
    struct created_layer *created = (struct created_layer *)layer;
    sqz_layer_release(layer);
    free(created->rows);
    free(created);
}

static enum sqz_status check_arguments(const struct sqz_layer_shape *shape, size_t n_rows, size_t n_queries,
                                       const float *queries, const struct sqz_squeeze_options *options, int n_threads,
                                       struct sqz_error *error)
{
    enum sqz_status status = sqz_layer_shape_check(shape, error);
    if (status != SQZ_OK) return status;
    status = sqz_squeeze_options_check(options, error);
    if (status != SQZ_OK) return status;
    if (n_rows < 1 || n_rows > INT32_MAX)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%zu rows: allowed are 1 to %d", n_rows, INT32_MAX);
    if (n_queries > n_rows)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%zu queries: allowed are no more than the %zu rows", n_queries,
                             n_rows);
    if (options->n_levels && (n_queries == 0 || !queries))
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "no calibration queries: %u levels need at least one",
                             options->n_levels);
    if (n_threads < 1) return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%d threads: at least 1", n_threads);
    return SQZ_OK;
}

enum sqz_status sqz_layer_create(struct sqz_layer **out, const struct sqz_layer_shape *shape, const uint16_t *keys,
                                 const uint16_t *values, size_t n_rows, const float *queries, size_t n_queries,
                                 const struct sqz_squeeze_options *options, int n_threads, struct sqz_error *error)
{
    *out = NULL;
    sqz_error_clear(error);
    enum sqz_status status = check_arguments(shape, n_rows, n_queries, queries, options, n_threads, error);
    if (status != SQZ_OK) return status;
    const size_t n = (size_t)shape->n_head_kv * shape->head_dim * n_rows;
    const size_t n_query_values = n_queries * shape->n_head * shape->head_dim;
    struct created_layer *created = calloc(1, sizeof *created);
    uint16_t *query_rows = malloc((n_query_values ? n_query_values : 1) * sizeof *query_rows);
    if (created) created->rows = n <= SIZE_MAX / 4 ? malloc(2 * n * sizeof *created->rows) : NULL;
    if (!created || !query_rows || !created->rows) {
        if (created) free(created->rows);
        free(created);
        free(query_rows);
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a layer of %zu rows", n_rows);
    }
    memcpy(created->rows, keys, n * sizeof *keys);
    memcpy(created->rows + n, values, n * sizeof *values);
    if (n_query_values) sqz_kernels_get()->f32_to_f16(query_rows, queries, n_query_values);
    const struct sqz_layer_input input = {
        .shape = *shape,
        .keys = created->rows,
        .values = created->rows + n,
        .n_rows = n_rows,
        .queries = query_rows,
        .n_queries = n_queries,
    };
    status = sqz_layers_plan(&created->layer, &input, 1, options, error);
    if (status == SQZ_OK)
        status = sqz_layers_cluster(&created->layer, &input, 1, options, n_threads, NULL, NULL, error);
    if (status == SQZ_OK) status = sqz_layers_calibrate(&created->layer, 1, options, n_threads, NULL, NULL, error);
    free(query_rows);
    if (status != SQZ_OK) {
        sqz_layer_free(&created->layer);
        return status;
    }
    *out = &created->layer;
    return SQZ_OK;
}

enum sqz_status sqz_layer_attend(const struct sqz_layer *layer, const float *queries, size_t n_tokens, float budget,
                                 float *out, float *lse, int n_threads, struct sqz_attention_stats *stats,
                                 struct sqz_error *error)
{
    sqz_error_clear(error);
    const enum sqz_status status = sqz_layer_check_host(layer, error);
    if (status != SQZ_OK) return status;
    if (!(budget > 0 && budget <= 1))
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "budget %g: allowed is more than 0 and at most 1",
                             (double)budget);
    if (n_threads < 1) return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%d threads: at least 1", n_threads);
    if (n_tokens == 0) return SQZ_OK;
    enum { SHARED_TOKENS = 64 }; /* see the header: so many tokens share a selection */
    const size_t block = n_tokens < SHARED_TOKENS ? n_tokens : SHARED_TOKENS;
    void *workspace = malloc(sqz_attend_workspace_bytes(layer, 0, block, n_threads));
    if (!workspace) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for attention");
    const size_t d = layer->shape.head_dim, token_stride = layer->shape.n_head * d;
    const struct sqz_attend_call call = {
        .layer = layer,
        .queries = queries,
        .out = out,
        .lse = lse,
        .query_token_stride = token_stride,
        .query_head_stride = d,
        .out_token_stride = token_stride,
        .out_head_stride = d,
        .n_tokens = n_tokens,
        .n_context_tokens = layer->n_rows,
        .budget = budget,
        .block_tokens = block,
        .n_threads = n_threads,
        .stats = stats,
        .workspace = workspace,
    };
    sqz_attend(&call);
    free(workspace);
    return SQZ_OK;
}
