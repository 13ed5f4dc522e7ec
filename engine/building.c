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

/* ---- Layer by layer, on several cards at once ----------------------------------------------- */

typedef enum sqz_status (*building_step)(struct sqz_building *b, uint32_t l, struct sqz_error *error);

struct walk {
    struct sqz_building *b;
    uint32_t from, end;
    building_step step;
    bool elsewhere_alone; /* other layers are passed over */
    bool tells;           /* rows of those that are done may be written */
    size_t total;
    size_t done; /* heads that were told of; this and what follows under the lock of walk_card() */
    bool *is_done;
    uint32_t n_told;
    enum sqz_status status;
    struct sqz_error error;
};

static int card_of(const struct sqz_building *b, uint32_t l)
{
    const struct sqz_backend_builder *builder = b->backend ? b->backend->ops->builder : NULL;
    return builder && builder->card ? builder->card(b->backend, l) : 0;
}

/* Behind a layer. Progress is told by the thread that called. */
static void end_layer(struct walk *w, uint32_t l, bool is_caller, enum sqz_status status, const struct sqz_error *error)
{
    struct sqz_building *b = w->b;
    if (status != SQZ_OK) {
        if (w->status == SQZ_OK) w->error = *error;
        w->status = w->status == SQZ_OK ? status : w->status;
        return;
    }
    w->is_done[l - w->from] = true;
    while (w->tells && w->n_told < w->end && w->is_done[w->n_told - w->from]) {
        if (b->early) sqz_early_rows_built(b->early, w->n_told);
        w->n_told++;
    }
    if (!b->inputs[l].elsewhere) return;
    w->done += b->layers[l].shape.n_head_kv;
    if (!is_caller || !b->progress || b->progress(b->user_data, w->done, w->total) || w->status != SQZ_OK) return;
    w->status = sqz_error_set(&w->error, SQZ_ERROR_CANCELLED, "cancelled");
}

static void walk_card(struct walk *w, int card)
{
    for (uint32_t l = w->from; l < w->end; l++) {
        if (card_of(w->b, l) != card || (w->elsewhere_alone && !w->b->inputs[l].elsewhere)) continue;
        struct sqz_error error;
        enum sqz_status status;
        sqz_error_clear(&error);
#pragma omp critical(sqz_building)
        status = w->status;
        if (status != SQZ_OK) return;
        status = w->step(w->b, l, &error);
#pragma omp critical(sqz_building)
        end_layer(w, l, card == 0, status, &error);
    }
}

/* Each card's layers in order, on all cards at the same time. */
static enum sqz_status walk_all(struct walk *w, struct sqz_error *error)
{
    int n_cards = 1;
    for (uint32_t l = w->from; l < w->end; l++)
        if (card_of(w->b, l) >= n_cards) n_cards = card_of(w->b, l) + 1;
    w->is_done = calloc((size_t)(w->end - w->from) + 1, sizeof *w->is_done);
    if (!w->is_done) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for %u layers", w->end);
    w->n_told = w->from;
    w->status = SQZ_OK;
#pragma omp parallel for schedule(static, 1) num_threads(n_cards) if (n_cards > 1)
    for (int card = 0; card < n_cards; card++) walk_card(w, card);
    free(w->is_done);
    if (w->status != SQZ_OK && error) *error = w->error;
    return w->status;
}

enum sqz_status sqz_building_place(struct sqz_building *b, uint32_t end, struct sqz_error *error)
{
    struct walk w = {
        .b = b, .from = b->n_placed, .end = end, .step = build_layer, .tells = true, .total = count_heads(b)};
    enum sqz_status status = SQZ_OK;
    for (uint32_t l = 0; l < b->n_placed; l++) w.done += b->inputs[l].elsewhere ? b->layers[l].shape.n_head_kv : 0;
    for (uint32_t l = w.from; l < end; l++) sqz_layer_take_queries(&b->layers[l], &b->inputs[l]);
    if (b->backend && w.from < end) status = walk_all(&w, error);
    if (status == SQZ_OK && end > b->n_placed) b->n_placed = end;
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
static enum sqz_status each_elsewhere(struct sqz_building *b, building_step step, struct sqz_error *error)
{
    struct walk w = {.b = b, .end = b->n_layer, .step = step, .elsewhere_alone = true, .total = count_elsewhere(b)};
    return walk_all(&w, error);
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
