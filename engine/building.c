/* Layers from rows; building.h. */
#include "building.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"

void sqz_building_free(struct sqz_building *b)
{
    for (uint32_t l = 0; b->sums && l < b->n_layer; l++) free(b->sums[l]);
    free(b->sums);
    b->sums = NULL;
}

static size_t count_elsewhere(const struct sqz_building *b)
{
    size_t n = 0;
    for (uint32_t l = 0; l < b->n_layer; l++) n += b->inputs[l].elsewhere ? b->layers[l].shape.n_head_kv : 0;
    return n;
}

/* Tells of one more layer; heads are counted. */
static enum sqz_status report(const struct sqz_building *b, size_t *done, uint32_t l, size_t total,
                              struct sqz_error *error)
{
    *done += b->layers[l].shape.n_head_kv;
    if (!b->progress || b->progress(b->user_data, *done, total)) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_CANCELLED, "cancelled");
}

static size_t count_heads(const struct sqz_building *b)
{
    size_t n = 0;
    for (uint32_t l = 0; l < b->n_layer; l++) n += b->layers[l].n_levels ? b->layers[l].shape.n_head_kv : 0;
    return n;
}

/* Where it lies, or else on the host, where its rows come then. */
static enum sqz_status build_layer(struct sqz_building *b, uint32_t l, struct sqz_error *error)
{
    const struct sqz_backend_ops *ops = b->backend->ops;
    struct sqz_layer_input *in = &b->inputs[l];
    enum sqz_status status = SQZ_OK;
    if (ops->builder && b->layers[l].n_levels)
        status = ops->builder->build(b->backend, l, &b->layers[l], b->options, &in->elsewhere, error);
    /* Those of a window that was cut have come already. */
    if (status == SQZ_OK && !in->elsewhere && in->first_position == 0 && ops->bring_rows)
        status = ops->bring_rows(b->backend, l, in->keys, in->values, error);
    return status;
}

enum sqz_status sqz_building_place(struct sqz_building *b, uint32_t end, struct sqz_error *error)
{
    const size_t total = count_heads(b);
    size_t done = 0;
    enum sqz_status status = SQZ_OK;
    for (uint32_t l = 0; l < b->n_placed; l++) done += b->inputs[l].elsewhere ? b->layers[l].shape.n_head_kv : 0;
    for (; b->n_placed < end && status == SQZ_OK; b->n_placed++) {
        const uint32_t l = b->n_placed;
        sqz_layer_take_queries(&b->layers[l], &b->inputs[l]);
        if (!b->backend) continue;
        status = build_layer(b, l, error);
        if (status == SQZ_OK && b->early) sqz_early_rows_built(b->early, l);
        if (status == SQZ_OK && b->inputs[l].elsewhere) status = report(b, &done, l, total, error);
    }
    return status;
}

enum sqz_status sqz_building_cluster(struct sqz_building *b, struct sqz_error *error)
{
    const enum sqz_status status = sqz_building_place(b, b->n_layer, error);
    if (status != SQZ_OK) return status;
    return sqz_layers_cluster(b->layers, b->inputs, b->n_layer, b->options, b->n_threads, b->progress, b->user_data,
                              error);
}

/* ---- Calibration --------------------------------------------------------------------------- */

static enum sqz_status count_layer(struct sqz_building *b, uint32_t l, struct sqz_error *error)
{
    const size_t k = b->layers[l].shape.n_head_kv;
    float *gain = malloc(k * sizeof *gain);
    b->sums[l] = malloc(k * sizeof *b->sums[l]);
    enum sqz_status status =
        gain && b->sums[l] ? b->backend->ops->builder->count(b->backend, l, &b->layers[l], b->options->variance,
                                                             b->sums[l], gain, error)
                           : sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for the curves of layer %u", l);
    if (status == SQZ_OK) sqz_layer_set_curves(&b->layers[l], b->sums[l], gain);
    free(gain);
    return status;
}

static enum sqz_status try_tail(struct sqz_building *b, uint32_t l, struct sqz_error *error)
{
    bool *keep = calloc(b->layers[l].shape.n_head_kv, sizeof *keep);
    enum sqz_status status = keep
                                 ? b->backend->ops->builder->try_tail(b->backend, l, &b->layers[l], keep, error)
                                 : sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for the tails of layer %u", l);
    if (status == SQZ_OK) sqz_layer_drop_tails(&b->layers[l], b->sums[l], keep);
    free(keep);
    return status;
}

/* Each layer that is elsewhere, there. */
static enum sqz_status each_elsewhere(struct sqz_building *b,
                                      enum sqz_status (*step)(struct sqz_building *b, uint32_t l,
                                                              struct sqz_error *error),
                                      struct sqz_error *error)
{
    const size_t total = count_elsewhere(b);
    size_t done = 0;
    enum sqz_status status = SQZ_OK;
    for (uint32_t l = 0; l < b->n_layer && status == SQZ_OK; l++) {
        if (!b->inputs[l].elsewhere) continue;
        status = step(b, l, error);
        if (status == SQZ_OK) status = report(b, &done, l, total, error);
    }
    return status;
}

enum sqz_status sqz_building_calibrate(struct sqz_building *b, struct sqz_error *error)
{
    enum sqz_status status = SQZ_OK;
    b->sums = calloc(b->n_layer, sizeof *b->sums);
    if (!b->sums)
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for the curves of %u layers", b->n_layer);
    status = each_elsewhere(b, count_layer, error);
    if (status == SQZ_OK)
        status = sqz_layers_count(b->layers, b->inputs, b->n_layer, b->options, b->n_threads, b->progress, b->user_data,
                                  error);
    if (status != SQZ_OK) return status;
    sqz_layers_join(b->layers, b->n_layer);
    if (!b->options->tail) return SQZ_OK;
    status = each_elsewhere(b, try_tail, error);
    if (status == SQZ_OK)
        status = sqz_layers_try_tails(b->layers, b->inputs, b->n_layer, b->options, b->n_threads, b->progress,
                                      b->user_data, error);
    if (status == SQZ_OK) sqz_layers_join(b->layers, b->n_layer);
    return status;
}

/* ---- Writing ------------------------------------------------------------------------------------ */

enum sqz_status sqz_building_layer(struct sqz_building *b, uint32_t l, struct sqz_layer *out, struct sqz_error *error)
{
    *out = b->layers[l];
    if (!b->inputs[l].elsewhere) return SQZ_OK;
    return b->backend->ops->builder->fetch(b->backend, l, &b->layers[l], out, error);
}
