/*
 * A context in shards: an index, which has the document's tokens and knows its
 * shards by name and checksum, and the shards, each a context file over its
 * tokens. A shard is what the index says or is refused by name.
 */
#include "open_context.h"
#include "shards.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static uint32_t held_by = 1, held_rank = 0;

void sqz_shards_hold(uint32_t n_ranks, uint32_t rank)
{
    held_by = n_ranks;
    held_rank = rank;
}

uint32_t sqz_context_n_shards(const struct sqz_context *context)
{
    return context->shards ? context->meta.shard.count : 0;
}

const char *sqz_context_path(const struct sqz_context *context)
{
    return context->file.path;
}

uint64_t sqz_context_checksum(const struct sqz_context *context)
{
    return context->metadata_checksum;
}

const struct sqz_context *sqz_context_shard(const struct sqz_context *context, uint32_t shard)
{
    return shard < sqz_context_n_shards(context) ? context->shards[shard] : NULL;
}

/* ---- Shards --------------------------------------------------------------------------------- */

/* Path of a file beside the index; malloc'ed. */
static char *path_beside(const char *path, const char *name)
{
    const char *slash = strrchr(path, '/');
    const size_t folder = slash ? (size_t)(slash - path) + 1 : 0;
    char *beside = malloc(folder + strlen(name) + 1);
    if (!beside) return NULL;
    memcpy(beside, path, folder);
    memcpy(beside + folder, name, strlen(name) + 1);
    return beside;
}

/* What a file that has the right checksum may still be, when an index was made by hand. */
static enum sqz_status check_shard(const struct sqz_context *context, uint32_t i, const struct sqz_context *shard,
                                   const struct sqz_report *report)
{
    const struct sqz_context_meta *whole = &context->meta, *part = &shard->meta;
    const struct sqz_deal deal = {whole->n_tokens, whole->shard.block_tokens, whole->shard.count};
    const char *name = whole->shard.files[i];
    if (part->shard.count == 0)
        return sqz_report_fail(report, "%s is a context by itself, not shard %" PRIu32 " of %" PRIu32, name, i + 1,
                               deal.count);
    if (part->shard.number != i + 1 || part->shard.count != deal.count)
        return sqz_report_fail(report, "%s is shard %" PRIu32 " of %" PRIu32 "; wanted: shard %" PRIu32 " of %" PRIu32,
                               name, part->shard.number, part->shard.count, i + 1, deal.count);
    if (shard->metadata_checksum != whole->shard.checksums[i] || part->shard.block_tokens != deal.block_tokens ||
        part->shard.n_tokens != whole->shard.n_tokens || part->n_layer != whole->n_layer ||
        part->n_tokens != sqz_deal_tokens(&deal, i, whole->n_tokens) ||
        strcmp(part->model_fingerprint, whole->model_fingerprint) != 0 || part->has_template != whole->has_template ||
        part->rope_scale != whole->rope_scale || part->rope_factors != whole->rope_factors ||
        memcmp(&part->squeeze, &whole->squeeze, sizeof part->squeeze) != 0)
        return sqz_report_fail(report, "%s is a shard of another context, or of another preparation of this one", name);
    for (size_t t = 0; t < part->n_tokens; t++)
        if (part->tokens[t] != whole->tokens[sqz_deal_position(&deal, i, t)])
            return sqz_report_fail(report, "%s has other tokens than the index", name);
    for (uint32_t l = 0; l < part->n_layer && !part->shard.n_tokens; l++)
        if (shard->layers[l].sliding_window)
            return sqz_report_as(report, SQZ_ERROR_UNSUPPORTED,
                                 "%s has layers with a sliding window, which its version of shards cannot", name);
    return SQZ_OK;
}

/* What a layer is alike in in every shard: by it one process chooses among the rows of all. */
struct layer_kind {
    uint32_t n_head, n_head_kv, head_dim, has_levels, n_curve, has_global_share, rule, group, tail, value_skip;
    uint32_t sliding_window, n_window_tokens;
    float scale;
};

static struct layer_kind kind_of(const struct sqz_layer *layer)
{
    return (struct layer_kind){.n_head = layer->shape.n_head,
                               .n_head_kv = layer->shape.n_head_kv,
                               .head_dim = layer->shape.head_dim,
                               .has_levels = layer->n_levels > 0,
                               .n_curve = layer->n_curve,
                               .has_global_share = layer->global_share != NULL,
                               .rule = (uint32_t)layer->rule,
                               .group = (uint32_t)layer->group,
                               .tail = layer->tail,
                               .value_skip = layer->value_skip,
                               .sliding_window = layer->sliding_window,
                               .n_window_tokens = layer->n_window_tokens,
                               .scale = layer->shape.scale};
}

/* To what the processors of ranks that prepared them may round otherwise. */
static bool are_close(const float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!(fabsf(a[i] - b[i]) <= 1e-3F * (1 + fabsf(a[i])))) return false;
    return true;
}

static bool is_alike(const struct sqz_layer *a, const struct sqz_layer *b)
{
    const struct layer_kind x = kind_of(a), y = kind_of(b);
    const size_t n = a->n_curve, heads = a->shape.n_head_kv;
    return memcmp(&x, &y, sizeof x) == 0 && are_close(a->log_threshold, b->log_threshold, n) &&
           are_close(a->share, b->share, n * heads) && are_close(a->lost_mass, b->lost_mass, n * heads) &&
           (!a->global_share || are_close(a->global_share, b->global_share, n));
}

uint64_t sqz_context_kind(const struct sqz_context *context)
{
    uint64_t sum = 0;
    for (uint32_t l = 0; l < context->meta.n_layer; l++) {
        const struct layer_kind kind = kind_of(&context->layers[l]);
        sum = XXH3_64bits_withSeed(&kind, sizeof kind, sum);
    }
    return sum;
}

/* The layer without what is a shard's own: counts and curves. */
static struct sqz_layer view_of(const struct sqz_layer *layer, size_t n_tokens)
{
    const bool cut = layer->sliding_window && layer->n_window_tokens < n_tokens;
    const uint32_t n_rows = cut ? layer->n_window_tokens : (uint32_t)n_tokens;
    struct sqz_layer view = {
        .shape = layer->shape,
        .n_rows = n_rows,
        .n_fixed = layer->n_levels ? layer->n_fixed : n_rows,
        .sliding_window = layer->sliding_window,
        .n_window_tokens = layer->n_window_tokens,
        .keys.type = layer->keys.type,
        .values.type = layer->values.type,
        .keys.planes.n_whole = layer->keys.planes.n_whole,
        .retained_keys.type = layer->retained_keys.type,
        .rule = layer->rule,
        .group = layer->group,
        .tail = layer->tail,
        .value_skip = layer->value_skip,
        .n_levels = layer->n_levels,
        .n_curve = layer->n_curve,
        .log_threshold = layer->log_threshold,
        .share = layer->share,
        .lost_mass = layer->lost_mass,
        .tail_gain = layer->tail_gain,
        .variance_gain = layer->variance_gain,
        .global_share = layer->global_share,
    };
    return view;
}

static enum sqz_status form_layers(struct sqz_context *context, const struct sqz_report *report)
{
    const uint32_t n_layer = context->meta.n_layer;
    const struct sqz_context *first = NULL;
    context->layers = calloc(n_layer, sizeof *context->layers);
    if (!context->layers) return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for %" PRIu32 " layers", n_layer);
    for (uint32_t i = 0; i < context->meta.shard.count; i++) {
        const struct sqz_context *shard = context->shards[i];
        if (!shard) continue;
        if (!first) first = shard;
        context->kv_bytes += shard->kv_bytes;
        context->index_bytes += shard->index_bytes;
        for (uint32_t l = 0; l < n_layer; l++)
            if (!is_alike(&first->layers[l], &shard->layers[l]))
                return sqz_report_fail(report, "%s has another layer %" PRIu32 " than the shards before it",
                                       context->meta.shard.files[i], l);
    }
    if (!first)
        return sqz_report_as(report, SQZ_ERROR_ARGUMENT,
                             "rank %" PRIu32 " of %" PRIu32 " has none of its %" PRIu32
                             " shards; start at most as many "
                             "ranks",
                             held_rank, held_by, context->meta.shard.count);
    for (uint32_t l = 0; l < n_layer; l++) context->layers[l] = view_of(&first->layers[l], context->meta.n_tokens);
    return SQZ_OK;
}

enum sqz_status sqz_open_shards(struct sqz_context *context, const char *path,
                                const struct sqz_context_options *options, sqz_open_file open,
                                const struct sqz_report *report)
{
    const uint32_t n = context->meta.shard.count;
    enum sqz_status status = SQZ_OK;
    context->shards = calloc(n, sizeof *context->shards);
    if (!context->shards) return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for %" PRIu32 " shards", n);
    const uint32_t end = (uint32_t)(((uint64_t)held_rank + 1) * n / held_by);
    for (uint32_t i = (uint32_t)((uint64_t)held_rank * n / held_by); i < end && !status; i++) {
        char *beside = path_beside(path, context->meta.shard.files[i]);
        if (!beside) return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for a path");
        status = open(&context->shards[i], beside, options, report->error);
        free(beside);
        if (!status) status = check_shard(context, i, context->shards[i], report);
    }
    return status ? status : form_layers(context, report);
}
