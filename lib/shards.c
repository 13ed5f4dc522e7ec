/* Shards of a context, and their common calibration; shards.h. */
#include "shards.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "lookup.h"

size_t sqz_deal_tokens(const struct sqz_deal *deal, uint32_t shard, size_t n)
{
    const size_t turn = deal->block_tokens * deal->count, rest = n % turn, before = shard * deal->block_tokens;
    const size_t of_turn = rest <= before ? 0 : rest - before;
    return n / turn * deal->block_tokens + (of_turn < deal->block_tokens ? of_turn : deal->block_tokens);
}

size_t sqz_deal_position(const struct sqz_deal *deal, uint32_t shard, size_t i)
{
    return (i / deal->block_tokens * deal->count + shard) * deal->block_tokens + i % deal->block_tokens;
}

/* ---- What the shards of other processes have ------------------------------------------------ */

/* Arrays of n floats, one for each shard, to be filled in by spread; freed by the caller with free(*arrays). */
static enum sqz_status spread_arrays(float ***arrays, uint32_t count, size_t n, struct sqz_error *error)
{
    float **list = malloc(count * (sizeof *list + n * sizeof **list));
    *arrays = list;
    if (!list) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for the calibration of %u shards", count);
    for (uint32_t s = 0; s < count; s++) list[s] = (float *)(list + count) + s * n;
    return SQZ_OK;
}

/* Numbers of a layer's curves. */
static size_t n_curves(const struct sqz_layer *layer)
{
    return (size_t)layer->shape.n_head_kv * layer->n_curve;
}

/* Curves of every shard, here. */
static enum sqz_status spread_curves(struct sqz_layer *layers, const struct sqz_layer_input *inputs, size_t n_layers,
                                     uint32_t count, const struct sqz_shards_spread *spread, struct sqz_error *error)
{
    float **of_shard;
    size_t n = 0;
    if (!spread) return SQZ_OK;
    for (size_t l = 0; l < n_layers; l++) n += 2 * n_curves(&layers[l]);
    enum sqz_status status = spread_arrays(&of_shard, count, n, error);
    if (status != SQZ_OK) return status;
    for (size_t i = 0, at = 0; i < n_layers * count; i++) {
        const size_t k = n_curves(&layers[i]);
        if (i % n_layers == 0) at = 0;
        if (!inputs[i].elsewhere && k) {
            memcpy(of_shard[i / n_layers] + at, layers[i].share, k * sizeof(float));
            memcpy(of_shard[i / n_layers] + at + k, layers[i].lost_mass, k * sizeof(float));
        }
        at += 2 * k;
    }
    status = spread->spread(spread->user_data, of_shard, n, error);
    for (size_t i = 0, at = 0; i < n_layers * count && status == SQZ_OK; i++) {
        const size_t k = n_curves(&layers[i]);
        if (i % n_layers == 0) at = 0;
        if (inputs[i].elsewhere && k) {
            memcpy((void *)(uintptr_t)layers[i].share, of_shard[i / n_layers] + at, k * sizeof(float));
            memcpy((void *)(uintptr_t)layers[i].lost_mass, of_shard[i / n_layers] + at + k, k * sizeof(float));
        }
        at += 2 * k;
    }
    if (status == SQZ_OK) free(of_shard); /* after an error messages may still come */
    return status;
}

/* ---- Denominators of all shards ---------------------------------------------------------- */

/* What the queries of one layer are, seen from every shard. */
struct sharing {
    struct sqz_shared_queries *shared; /* [count][n_layers] */
    int32_t *last_position;            /* [count][n_queries] */
    float **own;                       /* [count][n_own] denominators over the shard's rows, of all layers */
    size_t n_own;
    float *elsewhere; /* likewise, over all others */
};

static void sharing_end(struct sharing *s, struct sqz_layer *layers, size_t n, bool messages_under_way)
{
    for (size_t i = 0; i < n; i++) layers[i].shared = NULL;
    free(s->shared);
    free(s->last_position);
    free(s->elsewhere);
    if (!messages_under_way) free(s->own);
}

static enum sqz_status sharing_begin(struct sharing *s, struct sqz_layer *layers, size_t n_layers,
                                     const struct sqz_deal *deal, struct sqz_error *error)
{
    const size_t n = n_layers * deal->count;
    size_t n_queries = 0, at = 0;
    for (size_t l = 0; l < n_layers; l++) {
        if (layers[l].n_queries > n_queries) n_queries = layers[l].n_queries;
        s->n_own += 2 * (size_t)layers[l].n_queries * layers[l].shape.n_head;
    }
    s->shared = calloc(n, sizeof *s->shared);
    s->last_position = malloc((deal->count * n_queries + 1) * sizeof *s->last_position);
    s->elsewhere = malloc((deal->count * s->n_own + 1) * sizeof *s->elsewhere);
    if (!s->shared || !s->last_position || !s->elsewhere ||
        spread_arrays(&s->own, deal->count, s->n_own, error) != SQZ_OK)
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for the calibration of %u shards", deal->count);
    for (size_t i = 0; i < deal->count * s->n_own; i++) s->own[0][i] = s->elsewhere[i] = -INFINITY;
    for (uint32_t shard = 0; shard < deal->count; shard++)
        for (size_t q = 0; q < n_queries; q++)
            s->last_position[shard * n_queries + q] =
                (int32_t)sqz_deal_tokens(deal, shard, deal->n_tokens - n_queries + q + 1) - 1;
    for (size_t i = 0; i < n; i++) {
        const size_t n_mine = (size_t)layers[i].n_queries * layers[i].shape.n_head;
        float *own = s->own[0] + at, *elsewhere = s->elsewhere + at;
        s->shared[i] = (struct sqz_shared_queries){
            .last_position = s->last_position + i / n_layers * n_queries,
            .own_true = own,
            .own_total = own + n_mine,
            .true_elsewhere = elsewhere,
            .total_elsewhere = elsewhere + n_mine,
        };
        layers[i].shared = &s->shared[i];
        at += 2 * n_mine;
    }
    return SQZ_OK;
}

/* What lies elsewhere, from what every shard has. */
static void sum_up(const struct sharing *s, const struct sqz_layer *layers, size_t n_layers, uint32_t count)
{
    for (size_t l = 0; l < n_layers; l++) {
        const size_t n = (size_t)layers[l].n_queries * layers[l].shape.n_head;
        for (uint32_t a = 0; a < count; a++)
            for (uint32_t b = 0; b < count; b++) {
                struct sqz_shared_queries *mine = &s->shared[a * n_layers + l];
                const struct sqz_shared_queries *other = &s->shared[b * n_layers + l];
                for (size_t i = 0; i < n && a != b; i++) {
                    mine->true_elsewhere[i] = sqz_log_add(mine->true_elsewhere[i], other->own_true[i]);
                    mine->total_elsewhere[i] = sqz_log_add(mine->total_elsewhere[i], other->own_total[i]);
                }
            }
    }
}

/* ---- Curves of the whole ---------------------------------------------------------------------- */

/* A layer's curves in all shards become those of the whole: shares by the rows they are of, lost mass as the sum. */
static void unite_curves(struct sqz_layer *layers, size_t n_layers, uint32_t count, size_t l)
{
    const size_t n = (size_t)layers[l].shape.n_head_kv * layers[l].n_curve;
    for (size_t i = 0; i < n; i++) {
        double share = 0, lost = 0, rows = 0;
        for (uint32_t s = 0; s < count; s++) {
            const struct sqz_layer *layer = &layers[s * n_layers + l];
            share += (double)layer->share[i] * layer->n_rows;
            lost += (double)layer->lost_mass[i];
            rows += layer->n_rows;
        }
        for (uint32_t s = 0; s < count; s++) {
            const struct sqz_layer *layer = &layers[s * n_layers + l];
            ((float *)(uintptr_t)layer->share)[i] = (float)(share / rows);
            ((float *)(uintptr_t)layer->lost_mass)[i] = (float)(lost < 1 ? lost : 1);
        }
    }
}

enum sqz_status sqz_shards_calibrate(struct sqz_layer *layers, const struct sqz_layer_input *inputs, size_t n_layers,
                                     const struct sqz_deal *deal, const struct sqz_shards_spread *spread,
                                     const struct sqz_squeeze_options *options, int n_threads,
                                     sqz_build_progress progress, void *user_data, struct sqz_error *error)
{
    const size_t n = n_layers * deal->count;
    struct sharing sharing = {NULL, NULL, NULL, 0, NULL};
    bool under_way = false;
    enum sqz_status status = sharing_begin(&sharing, layers, n_layers, deal, error);
    if (status == SQZ_OK) status = sqz_layers_weigh(layers, inputs, n, options, n_threads, progress, user_data, error);
    if (status == SQZ_OK && spread) {
        status = spread->spread(spread->user_data, sharing.own, sharing.n_own, error);
        under_way = status != SQZ_OK;
    }
    if (status == SQZ_OK) {
        sum_up(&sharing, layers, n_layers, deal->count);
        status = sqz_layers_count(layers, inputs, n, options, n_threads, progress, user_data, error);
    }
    if (status == SQZ_OK) status = spread_curves(layers, inputs, n_layers, deal->count, spread, error);
    if (status == SQZ_OK) {
        sqz_layers_join(layers, n);
        if (options->tail)
            status = sqz_layers_try_tails(layers, inputs, n, options, n_threads, progress, user_data, error);
    }
    if (status == SQZ_OK) status = spread_curves(layers, inputs, n_layers, deal->count, spread, error);
    if (status == SQZ_OK) {
        for (size_t l = 0; l < n_layers; l++) unite_curves(layers, n_layers, deal->count, l);
        sqz_layers_join(layers, n);
    }
    sharing_end(&sharing, layers, n, under_way);
    return status;
}
