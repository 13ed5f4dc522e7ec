/* Shards and their index, written; write_shards.h. */
#define _POSIX_C_SOURCE 200809L /* strdup */
#include "write_shards.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "floor.h"

struct sqz_shards_writing {
    struct sqz_context_meta meta; /* of the whole; its shard place is the index's */
    struct sqz_deal deal;
    struct sqz_held_shards held;
    const struct sqz_exchange *exchange; /* NULL: all are held */
    const struct sqz_layer_input *whole; /* [n_layer] */
    struct sqz_layer_input *inputs;      /* [count][n_layer] */
    struct sqz_layer *layers;            /* [count][n_layer] */
    struct sqz_context_writer **writers; /* [count]; NULL: of shards held elsewhere */
    int32_t *tokens;                     /* of all shards, one after another */
    char *path, **paths;                 /* of the index; [count] */
    const char **names;                  /* [count] into paths */
    uint64_t *checksums;                 /* [count] */
};

void sqz_shards_writing_free(struct sqz_shards_writing *w)
{
    if (!w) return;
    const size_t n = (size_t)w->deal.count * w->meta.n_layer;
    for (size_t i = 0; w->layers && i < n; i++) sqz_layer_release(&w->layers[i]);
    for (uint32_t s = 0; w->writers && s < w->deal.count; s++) sqz_context_writer_abort(w->writers[s]);
    for (uint32_t s = 0; w->paths && s < w->deal.count; s++) free(w->paths[s]);
    free(w->inputs);
    free(w->layers);
    free(w->writers);
    free(w->tokens);
    free(w->path);
    free(w->paths);
    free(w->names);
    free(w->checksums);
    free(w);
}

/* ---- Plans ------------------------------------------------------------------------------- */

char *sqz_shard_path(const char *path, uint32_t shard, uint32_t count)
{
    static const char ending[] = ".sqz.gguf";
    const size_t n = strlen(path), room = n + sizeof ending + 32, e = sizeof ending - 1;
    const size_t stem = n > e && strcmp(path + n - e, ending) == 0 ? n - e : n;
    char *text = malloc(room);
    if (text) snprintf(text, room, "%.*s-%05u-of-%05u%s", (int)stem, path, shard + 1, count, ending);
    return text;
}

static enum sqz_status allocate(struct sqz_shards_writing *w, const char *path, struct sqz_error *error)
{
    const uint32_t count = w->deal.count;
    const size_t n = (size_t)count * w->meta.n_layer;
    w->inputs = calloc(n, sizeof *w->inputs);
    w->layers = calloc(n, sizeof *w->layers);
    w->writers = calloc(count, sizeof *w->writers);
    w->tokens = malloc(w->meta.n_tokens * sizeof *w->tokens);
    w->path = strdup(path);
    w->paths = calloc(count, sizeof *w->paths);
    w->names = calloc(count, sizeof *w->names);
    w->checksums = calloc(count, sizeof *w->checksums);
    bool there = w->inputs && w->layers && w->writers && w->tokens && w->path && w->paths && w->names && w->checksums;
    for (uint32_t s = 0; there && s < count; s++) {
        w->paths[s] = sqz_shard_path(path, s, count);
        there = w->paths[s];
        const char *slash = there ? strrchr(w->paths[s], '/') : NULL;
        w->names[s] = slash ? slash + 1 : w->paths[s];
    }
    return there ? SQZ_OK : sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for %u shards", count);
}

/* Of a layer with a window the first shard has all of the rows, the others none. */
static struct sqz_layer_input window_input(const struct sqz_layer_input *whole, uint32_t shard, bool is_here)
{
    return (struct sqz_layer_input){.shape = whole->shape,
                                    .keys = whole->keys,
                                    .values = whole->values,
                                    .n_rows = shard ? 0 : whole->n_rows,
                                    .window_tokens = whole->window_tokens,
                                    .first_position = whole->first_position,
                                    .elsewhere = !is_here};
}

/* The shards' parts of the layers. The last queries that see a row of every shard calibrate. */
static void plan_inputs(struct sqz_shards_writing *w)
{
    const struct sqz_deal *deal = &w->deal;
    const size_t seen = deal->n_tokens - (deal->count - 1) * deal->block_tokens;
    const size_t fewest = sqz_deal_tokens(deal, deal->count - 1, deal->n_tokens);
    for (uint32_t l = 0; l < w->meta.n_layer; l++) {
        const struct sqz_layer_input *whole = &w->whole[l];
        const size_t d = whole->shape.head_dim, k = whole->shape.n_head_kv;
        size_t n_queries = whole->n_queries;
        if (n_queries > seen) n_queries = seen;
        if (n_queries > fewest) n_queries = fewest;
        for (uint32_t s = 0; s < deal->count; s++) {
            struct sqz_layer_input *in = &w->inputs[(size_t)s * w->meta.n_layer + l];
            const bool is_here = sqz_shard_is_held(&w->held, s);
            if (whole->window_tokens) {
                *in = window_input(whole, s, is_here);
                continue;
            }
            const size_t begin = is_here ? sqz_held_tokens(&w->held, s) * k * d : 0;
            *in = (struct sqz_layer_input){
                .shape = whole->shape,
                .keys = is_here ? whole->keys + begin : NULL,
                .values = is_here ? whole->values + begin : NULL,
                .n_rows = sqz_deal_tokens(deal, s, deal->n_tokens),
                .queries = whole->queries + (whole->n_queries - n_queries) * whole->shape.n_head * d,
                .n_queries = n_queries,
                .stays_dense = !sqz_clusters_pay(fewest, &w->meta.squeeze),
                .elsewhere = !is_here,
            };
        }
    }
}

/* What is written of a planned layer: its queries see rows of other shards, and calibrate nothing alone. */
static struct sqz_layer written(const struct sqz_layer *layer)
{
    struct sqz_layer copy = *layer;
    copy.queries = NULL;
    copy.n_queries = 0;
    return copy;
}

static enum sqz_status create_writers(struct sqz_shards_writing *w, struct sqz_error *error)
{
    const uint32_t n_layer = w->meta.n_layer;
    struct sqz_layer *shapes = malloc(n_layer * sizeof *shapes);
    enum sqz_status status = SQZ_OK;
    size_t at = 0;
    if (!shapes) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for %u layers", n_layer);
    for (uint32_t s = 0; s < w->deal.count && status == SQZ_OK; s++) {
        struct sqz_context_meta meta = w->meta;
        if (!sqz_shard_is_held(&w->held, s)) continue;
        meta.n_tokens = sqz_deal_tokens(&w->deal, s, w->deal.n_tokens);
        meta.tokens = w->tokens + at;
        meta.shard.number = s + 1;
        for (size_t i = 0; i < meta.n_tokens; i++)
            w->tokens[at + i] = w->meta.tokens[sqz_deal_position(&w->deal, s, i)];
        for (uint32_t l = 0; l < n_layer; l++) shapes[l] = written(&w->layers[(size_t)s * n_layer + l]);
        status = sqz_context_writer_create(&w->writers[s], w->paths[s], &meta, shapes, error);
        if (status == SQZ_OK) sqz_context_writer_tell_checksum(w->writers[s], &w->checksums[s]);
        at += meta.n_tokens;
    }
    free(shapes);
    return status;
}

enum sqz_status sqz_shards_check_deal(const struct sqz_deal *deal, struct sqz_error *error)
{
    if (deal->count > SQZ_MOST_SHARDS)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%u shards: allowed are 2 to %d", deal->count, SQZ_MOST_SHARDS);
    if (sqz_deal_tokens(deal, deal->count - 1, deal->n_tokens) == 0)
        return sqz_error_set(
            error, SQZ_ERROR_ARGUMENT,
            "%u shards of %zu tokens in blocks of %zu: the last would be empty; allowed are at most %zu", deal->count,
            deal->n_tokens, deal->block_tokens, (deal->n_tokens + deal->block_tokens - 1) / deal->block_tokens);
    return SQZ_OK;
}

enum sqz_status sqz_shards_writing_begin(struct sqz_shards_writing **out, const struct sqz_layer_input *inputs,
                                         const struct sqz_context_meta *meta, const struct sqz_held_shards *held,
                                         const struct sqz_exchange *exchange, const char *path, struct sqz_error *error)
{
    const uint32_t count = held->deal.count;
    struct sqz_shards_writing *w = calloc(1, sizeof *w);
    *out = NULL;
    if (!w) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for shards");
    w->meta = *meta;
    w->meta.shard = (struct sqz_shard_place){.count = count, .block_tokens = (uint32_t)held->deal.block_tokens};
    /* Only then, so that programs without windows in shards read the others. */
    for (uint32_t l = 0; l < meta->n_layer; l++)
        if (inputs[l].window_tokens) w->meta.shard.n_tokens = (uint32_t)meta->n_tokens;
    w->deal = held->deal;
    w->held = *held;
    w->exchange = exchange;
    w->whole = inputs;
    enum sqz_status status = sqz_shards_check_deal(&w->deal, error);
    if (status == SQZ_OK) status = allocate(w, path, error);
    if (status == SQZ_OK) {
        plan_inputs(w);
        status = sqz_layers_plan(w->layers, w->inputs, (size_t)count * meta->n_layer, &meta->squeeze, error);
    }
    if (status == SQZ_OK) status = create_writers(w, error);
    if (status != SQZ_OK) sqz_shards_writing_free(w);
    else *out = w;
    return status;
}

/* ---- Rows ----------------------------------------------------------------------------------- */

/* [K][T][D] in the order of positions becomes [K][n][D] of each shard, one after another. */
static void deal_rows(const struct sqz_deal *deal, uint16_t *rows, size_t n_heads, size_t d, uint16_t *scratch)
{
    const size_t n = deal->n_tokens;
    uint16_t *to = rows;
    memcpy(scratch, rows, n_heads * n * d * sizeof *rows);
    for (uint32_t s = 0; s < deal->count; s++) {
        const size_t n_mine = sqz_deal_tokens(deal, s, n);
        for (size_t h = 0; h < n_heads; h++)
            for (size_t i = 0, run; i < n_mine; i += run) {
                run = n_mine - i < deal->block_tokens ? n_mine - i : deal->block_tokens;
                memcpy(to, scratch + (h * n + sqz_deal_position(deal, s, i)) * d, run * d * sizeof *to);
                to += run * d;
            }
    }
}

/* Memory that any layer of the text is copied to while it is dealt out. */
static uint16_t *make_scratch(const struct sqz_shards_writing *w, struct sqz_error *error)
{
    size_t most = 0;
    for (uint32_t l = 0; l < w->meta.n_layer; l++) {
        const struct sqz_layer_shape *shape = &w->whole[l].shape;
        const size_t n = (size_t)shape->n_head_kv * shape->head_dim * w->deal.n_tokens;
        if (n > most) most = n;
    }
    uint16_t *scratch = malloc(most * sizeof *scratch);
    if (!scratch) sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory: %zu bytes to deal out a layer", 2 * most);
    return scratch;
}

static void deal_layer(const struct sqz_shards_writing *w, uint32_t l, uint16_t *scratch)
{
    const struct sqz_layer_input *in = &w->whole[l];
    if (in->window_tokens) return; /* its last rows lie as they will be written */
    deal_rows(&w->deal, in->keys, in->shape.n_head_kv, in->shape.head_dim, scratch);
    deal_rows(&w->deal, in->values, in->shape.n_head_kv, in->shape.head_dim, scratch);
}

enum sqz_status sqz_shards_deal(struct sqz_shards_writing *w, struct sqz_error *error)
{
    uint16_t *scratch = make_scratch(w, error);
    if (!scratch) return SQZ_ERROR_MEMORY;
    for (uint32_t l = 0; l < w->meta.n_layer; l++) deal_layer(w, l, scratch);
    free(scratch);
    return SQZ_OK;
}

/* All shards of a layer where its rows are; or none, and its rows come. */
static enum sqz_status build_layer(struct sqz_shards_writing *w, struct sqz_backend *backend, uint32_t l, bool *built,
                                   struct sqz_error *error)
{
    enum sqz_status status = SQZ_OK;
    *built = backend->ops->build_shard && !w->whole[l].window_tokens;
    for (uint32_t s = 0; s < w->deal.count && *built && status == SQZ_OK; s++) {
        const size_t i = (size_t)s * w->meta.n_layer + l;
        sqz_layer_take_queries(&w->layers[i], &w->inputs[i]);
        status = backend->ops->build_shard(backend, l, &w->deal, s, &w->layers[i], &w->meta.squeeze, built, error);
    }
    /* Those of a window that was cut have come. */
    if (status == SQZ_OK && !*built && backend->ops->bring_rows && w->whole[l].first_position == 0)
        status = backend->ops->bring_rows(backend, l, w->whole[l].keys, w->whole[l].values, error);
    return status;
}

enum sqz_status sqz_shards_build(struct sqz_shards_writing *w, struct sqz_backend *backend, uint32_t *n_built,
                                 sqz_build_progress progress, void *user_data, struct sqz_error *error)
{
    uint16_t *scratch = make_scratch(w, error);
    enum sqz_status status = scratch ? SQZ_OK : SQZ_ERROR_MEMORY;
    *n_built = 0;
    for (uint32_t l = 0; l < w->meta.n_layer && status == SQZ_OK; l++) {
        bool built;
        status = build_layer(w, backend, l, &built, error);
        if (status == SQZ_OK && !built) deal_layer(w, l, scratch);
        *n_built += status == SQZ_OK && built;
        for (uint32_t s = 0; s < w->deal.count && built; s++)
            w->inputs[(size_t)s * w->meta.n_layer + l].elsewhere = true;
        if (status == SQZ_OK && progress && !progress(user_data, l + 1, w->meta.n_layer))
            status = sqz_error_set(error, SQZ_ERROR_CANCELLED, "cancelled");
    }
    free(scratch);
    return status;
}

/* ---- Steps -------------------------------------------------------------------------------------- */

enum sqz_status sqz_shards_cluster(struct sqz_shards_writing *w, int n_threads, sqz_build_progress progress,
                                   void *user_data, struct sqz_error *error)
{
    const size_t n = (size_t)w->deal.count * w->meta.n_layer;
    for (uint32_t s = 0; s < w->deal.count; s++)
        if (w->writers[s]) sqz_context_writer_set_threads(w->writers[s], n_threads);
    const enum sqz_status status =
        sqz_layers_cluster(w->layers, w->inputs, n, &w->meta.squeeze, n_threads, progress, user_data, error);
    /* What was clustered by the place that read it is calibrated here. */
    for (size_t i = 0; i < n; i++)
        if (!w->whole[i % w->meta.n_layer].window_tokens)
            w->inputs[i].elsewhere = !sqz_shard_is_held(&w->held, (uint32_t)(i / w->meta.n_layer));
    return sqz_exchange_agree(w->exchange, status, error);
}

/* What struct sqz_shards_spread asks for: shard s is held by process s modulo their number, and each has as many. */
static enum sqz_status spread(void *user_data, float *const *of_shard, size_t n, struct sqz_error *error)
{
    const struct sqz_shards_writing *w = user_data;
    const struct sqz_exchange *e = w->exchange;
    struct sqz_message *out = calloc(2 * (size_t)e->n, sizeof *out), *in = out + e->n;
    enum sqz_status status = out ? SQZ_OK : sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for messages");
    for (uint32_t first = 0; first < w->deal.count && status == SQZ_OK; first += e->n) {
        for (uint32_t p = 0; p < e->n; p++) {
            out[p] = (struct sqz_message){of_shard[first + e->rank], n * sizeof **of_shard};
            in[p] = (struct sqz_message){of_shard[first + p], n * sizeof **of_shard};
        }
        e->start(e->user_data, out, in);
        status = e->finish(e->user_data, error);
    }
    free(out);
    return status;
}

enum sqz_status sqz_shards_calibrate_all(struct sqz_shards_writing *w, int n_threads, sqz_build_progress progress,
                                         void *user_data, struct sqz_error *error)
{
    const struct sqz_shards_spread others = {spread, w};
    const enum sqz_status status =
        sqz_shards_calibrate(w->layers, w->inputs, w->meta.n_layer, &w->deal, w->exchange ? &others : NULL,
                             &w->meta.squeeze, n_threads, progress, user_data, error);
    return sqz_exchange_agree(w->exchange, status, error);
}

static enum sqz_status write_index(const struct sqz_shards_writing *w, uint64_t *file_bytes, struct sqz_error *error)
{
    struct sqz_context_writer *writer;
    struct sqz_context_meta meta = w->meta;
    meta.shard.files = w->names;
    meta.shard.checksums = w->checksums;
    const enum sqz_status status = sqz_context_writer_create(&writer, w->path, &meta, NULL, error);
    return status == SQZ_OK ? sqz_context_writer_commit(writer, file_bytes, error) : status;
}

static enum sqz_status put_layers(struct sqz_shards_writing *w, sqz_build_progress progress, void *user_data,
                                  struct sqz_error *error)
{
    const uint32_t n_layer = w->meta.n_layer;
    const size_t n = (size_t)w->deal.count / w->held.step * n_layer;
    enum sqz_status status = SQZ_OK;
    for (size_t i = 0; i < n && status == SQZ_OK; i++) {
        const size_t s = w->held.first + i / n_layer * w->held.step, l = i % n_layer;
        const struct sqz_layer layer = written(&w->layers[s * n_layer + l]);
        status = sqz_context_writer_put_layer(w->writers[s], (uint32_t)l, &layer, error);
        if (status == SQZ_OK && progress && !progress(user_data, i + 1, n))
            status = sqz_error_set(error, SQZ_ERROR_CANCELLED, "cancelled");
    }
    return status;
}

/* The shards held here get their names. */
static enum sqz_status commit_shards(struct sqz_shards_writing *w, uint64_t *file_bytes, struct sqz_error *error)
{
    enum sqz_status status = SQZ_OK;
    for (uint32_t s = w->held.first; s < w->deal.count && status == SQZ_OK; s += w->held.step) {
        uint64_t bytes = 0;
        status = sqz_context_writer_commit(w->writers[s], &bytes, error);
        w->writers[s] = NULL;
        *file_bytes += bytes;
    }
    return status;
}

/* Checksums and sizes of all shards, here. */
static enum sqz_status gather_sums(struct sqz_shards_writing *w, uint64_t *file_bytes, struct sqz_error *error)
{
    const struct sqz_exchange *e = w->exchange;
    const size_t each = w->deal.count / e->n + 1;
    uint64_t *all = calloc(e->n * each, sizeof *all);
    if (!all) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for messages");
    for (size_t i = 0; i + 1 < each; i++) all[e->rank * each + i] = w->checksums[e->rank + i * e->n];
    all[e->rank * each + each - 1] = *file_bytes;
    const enum sqz_status status = sqz_exchange_gather(e, all, each * sizeof *all, error);
    if (status != SQZ_OK) return status; /* what is still under way may come to `all` */
    *file_bytes = 0;
    for (size_t p = 0; p < e->n; p++) {
        for (size_t i = 0; i + 1 < each; i++) w->checksums[p + i * e->n] = all[p * each + i];
        *file_bytes += all[p * each + each - 1];
    }
    free(all);
    return SQZ_OK;
}

enum sqz_status sqz_shards_write(struct sqz_shards_writing *w, sqz_build_progress progress, void *user_data,
                                 uint64_t *file_bytes, struct sqz_error *error)
{
    uint64_t bytes = 0;
    *file_bytes = 0;
    /* No shard gets its name before every one is written. */
    enum sqz_status status = put_layers(w, progress, user_data, error);
    status = sqz_exchange_agree(w->exchange, status, error);
    if (status != SQZ_OK) return status;
    status = commit_shards(w, file_bytes, error);
    if (status == SQZ_OK && w->exchange) status = gather_sums(w, file_bytes, error);
    if (status == SQZ_OK && w->held.first == 0) status = write_index(w, &bytes, error);
    *file_bytes += bytes;
    return sqz_exchange_agree(w->exchange, status, error);
}

float sqz_shards_budget_floor(const struct sqz_shards_writing *w)
{
    float floor = 1;
    struct sqz_layer *whole = malloc(w->meta.n_layer * sizeof *whole);
    if (!whole) return floor;
    memcpy(whole, w->layers, w->meta.n_layer * sizeof *whole);
    for (uint32_t l = 0; l < w->meta.n_layer; l++) whole[l].n_rows = (uint32_t)w->deal.n_tokens;
    floor = sqz_budget_floor(whole, w->meta.n_layer);
    free(whole);
    return floor;
}
