/* A text to rows; reading.h. */
#define _GNU_SOURCE /* mmap flags */
#include "reading.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "clock.h"
#include "error.h"
#include "gpu.h"
#include "gpu_bands.h"
#include "kernels.h"
#include "run.h"

bool sqz_report_progress(const struct sqz_prepare_options *o, const char *phase, double done, double total,
                         const char *unit, double since)
{
    const struct sqz_progress p = {phase, done, total, unit, sqz_clock_seconds() - since};
    return !o->progress || o->progress(&p, o->user_data);
}

void sqz_reading_free(struct sqz_reading *r)
{
    if (r->model && r->placed) sqz_model_wait(r->model);
    sqz_reading_shards_free(r->into_shards);
    if (r->model && r->model->backend->ops->end_reading) r->model->backend->ops->end_reading(r->model->backend);
    if (r->rows) munmap(r->rows, r->rows_bytes);
    free(r->queries);
    free(r->inputs);
    memset(r, 0, sizeof *r);
}

/* ---- Memory ---------------------------------------------------------------------------------- */

/* Anonymous memory that costs nothing until touched; NULL when the system has none. */
static void *map_memory(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    madvise(p, bytes, MADV_HUGEPAGE); /* a hint: touching a page costs as much as what goes into it */
    return p;
}

enum sqz_status sqz_reading_begin(struct sqz_reading *r, uint32_t n_layer, struct sqz_error *error)
{
    r->n_layer = n_layer;
    r->inputs = calloc(n_layer, sizeof *r->inputs);
    if (!r->inputs) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for %u layers", n_layer);
    return SQZ_OK;
}

enum sqz_status sqz_reading_allocate(struct sqz_reading *r, size_t n_tokens, size_t n_queries, struct sqz_error *error)
{
    const uint32_t n_layer = r->n_layer;
    const bool into_shards = r->held.deal.count && r->model && !r->model->on_card; /* a card reads the text as one */
    size_t rows = 0, queries = 0;
    r->n_tokens = n_tokens;
    r->n_queries = n_queries;
    for (uint32_t l = 0; l < n_layer; l++) {
        const struct sqz_layer_shape *s = &r->inputs[l].shape;
        const size_t n_rows = into_shards ? sqz_held_room(&r->held, r->inputs[l].window_tokens) : n_tokens;
        size_t bytes;
        if (__builtin_mul_overflow((size_t)s->n_head_kv * s->head_dim * 2 * sizeof(uint16_t), n_rows, &bytes) ||
            __builtin_add_overflow(rows, bytes, &rows))
            return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory: keys and values of %zu tokens", n_tokens);
        queries += n_queries * s->n_head * s->head_dim;
    }
    r->rows_bytes = rows;
    r->rows = map_memory(rows);
    r->queries = calloc(queries ? queries : 1, sizeof *r->queries);
    if (!r->rows || !r->queries)
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory: %zu bytes for the keys and values of %zu tokens",
                             rows + queries * sizeof *r->queries, n_tokens);
    uint16_t *at = r->rows, *query = r->queries;
    for (uint32_t l = 0; l < n_layer; l++) {
        struct sqz_layer_input *in = &r->inputs[l];
        const size_t n_rows = into_shards ? sqz_held_room(&r->held, in->window_tokens) : n_tokens;
        const size_t n = (size_t)in->shape.n_head_kv * in->shape.head_dim * n_rows;
        in->keys = at;
        in->values = at + n;
        at += 2 * n;
        in->queries = query;
        in->n_queries = n_queries;
        query += n_queries * in->shape.n_head * in->shape.head_dim;
        const bool cut = in->window_tokens && in->window_tokens < n_tokens;
        in->n_rows = cut ? in->window_tokens : n_tokens;
        in->first_position = n_tokens - in->n_rows;
    }
    return SQZ_OK;
}

enum sqz_status sqz_reading_plan(struct sqz_reading *r, struct sqz_model *model, size_t n_tokens,
                                 const struct sqz_prepare_options *o, struct sqz_error *error)
{
    const size_t wanted = o->squeeze.n_levels ? o->squeeze.n_calibration : 0;
    r->model = model;
    enum sqz_status status = sqz_reading_begin(r, model->info.n_layer, error);
    if (status != SQZ_OK) return status;
    for (uint32_t l = 0; l < r->n_layer; l++) {
        r->inputs[l].shape = model->layers[l].shape;
        r->inputs[l].window_tokens = model->layers[l].sliding_window ? model->info.n_window_tokens : 0;
    }
    return sqz_reading_allocate(r, n_tokens, wanted < n_tokens ? wanted : n_tokens, error);
}

/* ---- Batches ----------------------------------------------------------------------------------- */

/* Keeps the queries of the node's tokens from number `first` on. */
static enum sqz_status keep_queries(struct sqz_reading *r, const struct sqz_attention_node *node, size_t first,
                                    struct sqz_error *error)
{
    struct sqz_layer_input *in = &r->inputs[node->layer];
    struct sqz_backend *backend = r->model->backend;
    const struct sqz_attention_node last = sqz_node_part(node, &in->shape, first, node->n_tokens - first);
    struct sqz_attention_node host = last;
    const size_t d = in->shape.head_dim, first_query = r->n_tokens - r->n_queries;
    if (node->stream && !backend->ops->fetch_queries(backend, &last, &in->shape, node->stream, &host))
        return sqz_error_set(error, SQZ_ERROR_INTERNAL, "the card gave no queries");
    for (size_t t = 0; t < host.n_tokens; t++) {
        const size_t position = r->first_position + first + t;
        uint16_t *to = (uint16_t *)(uintptr_t)in->queries + (position - first_query) * in->shape.n_head * d;
        const float *from = host.queries + t * host.query_token_stride;
        for (uint32_t h = 0; h < in->shape.n_head; h++)
            sqz_kernels_get()->f32_to_f16(to + h * d, from + h * host.query_head_stride, d);
    }
    return SQZ_OK;
}

static enum sqz_status read_attention(void *user_data, const struct sqz_attention_node *node, struct sqz_error *error)
{
    struct sqz_reading *r = user_data;
    struct sqz_layer_input *in = &r->inputs[node->layer];
    if (r->into_shards) return sqz_reading_shards_node(r->into_shards, node->layer, node, r->model->crew.now, error);
    const size_t first_query = r->n_tokens - r->n_queries;
    const size_t first = first_query > r->first_position ? first_query - r->first_position : 0;
    const enum sqz_status status = first < node->n_tokens ? keep_queries(r, node, first, error) : SQZ_OK;
    if (status != SQZ_OK) return status;
    const struct sqz_backend_reading reading = {
        .node = node,
        .shape = in->shape,
        .keys = in->keys,
        .values = in->values,
        .capacity_rows = r->n_tokens,
        .first_position = r->first_position,
        .window_tokens = in->window_tokens,
        .n_layers = r->n_layer,
        .n_threads = r->model->crew.now,
        .stream = node->stream,
    };
    return r->model->backend->ops->read(r->model->backend, &reading, error);
}

/* llama.cpp asks between its operations; the bar is told where the chunk began. */
static bool read_cancelled(void *user_data)
{
    const struct sqz_reading_link *c = user_data;
    return !sqz_report_progress(c->options, "read", c->done, c->total, "tokens", c->since);
}

/* The place's own memory for reading, which its other work may be using until the first batch. */
static enum sqz_status plan_place(struct sqz_reading *r, struct sqz_error *error)
{
    enum sqz_status status = SQZ_OK;
    for (uint32_t l = 0; l < r->n_layer && status == SQZ_OK && !r->placed; l++)
        status = r->model->backend->ops->plan_reading(r->model->backend, &r->inputs[l].shape, error);
    r->placed = status == SQZ_OK;
    return status;
}

/* How far a text is when a band has been read up to a token. */
static double share_read(const struct sqz_bands *b, size_t n_tokens, size_t at)
{
    const double begin = sqz_band_begin(b), n_layers = b->end[b->n - 1];
    return (begin * (double)n_tokens + (b->end[b->now] - begin) * (double)at) / n_layers;
}

static bool on_several_cards(const struct sqz_reading *r)
{
    const struct sqz_model_layer *layers = r->model->layers;
    return r->model->all_on_card && layers[0].card != layers[r->n_layer - 1].card;
}

enum sqz_status sqz_reading_batch(struct sqz_reading *r, const int32_t *tokens, size_t at, size_t most,
                                  struct sqz_bands *bands, struct sqz_reading_link *link, struct sqz_error *error)
{
    struct sqz_run_token batch[SQZ_READING_TOKENS];
    const size_t left = r->n_tokens - at, n = left < most ? left : most;
    struct sqz_run run = {.tokens = batch,
                          .n_tokens = n,
                          .handler = read_attention,
                          .user_data = r,
                          .cancelled = link->options->progress ? read_cancelled : NULL,
                          .cancel_data = link,
                          .bands = bands,
                          .goes_on = bands != NULL};
    for (size_t i = 0; i < n; i++)
        batch[i] = (struct sqz_run_token){.token = tokens[at + i], .position = (int32_t)(at + i)};
    /* A graph like the last one llama.cpp takes again, and where there are several cards it first waits for all of them.
     * One with an output is another than one without, so with every other batch having one none is taken again: each
     * card goes on with the next batch while those behind it work on this one. */
    if (run.goes_on && on_several_cards(r)) batch[n - 1].wants_logits = at / r->model->n_batch_tokens % 2 != 0;
    r->first_position = at;
    if (r->into_shards) sqz_reading_shards_turn(r->into_shards, at, n);
    if (bands) bands->first_token = at;
    enum sqz_status status = plan_place(r, error);
    if (status == SQZ_OK) status = sqz_model_run(r->model, &run, error);
    const size_t n_read = n * (bands ? bands->n_batches : 1);
    link->done =
        bands && bands->n > 1 && !bands->whole ? share_read(bands, r->n_tokens, at + n_read) : (double)(at + n);
    if (status == SQZ_OK && read_cancelled(link)) status = sqz_error_set(error, SQZ_ERROR_CANCELLED, "cancelled");
    return status;
}

enum sqz_status sqz_reading_end_layers(struct sqz_reading *r, uint32_t l, uint32_t end, struct sqz_error *error)
{
    struct sqz_backend *backend = r->model->backend;
    enum sqz_status status = SQZ_OK;
    if (r->into_shards) sqz_reading_shards_end(r->into_shards);
    for (; l < end && status == SQZ_OK && !r->into_shards; l++) {
        struct sqz_layer_input *in = &r->inputs[l];
        if (in->first_position == 0) continue;
        if (backend->ops->bring_rows) status = backend->ops->bring_rows(backend, l, in->keys, in->values, error);
        if (status == SQZ_OK)
            sqz_rows_to_front(in, in->first_position + in->n_rows, in->first_position, in->n_rows, in->n_rows);
    }
    return status;
}

/* ---- By bands of layers ------------------------------------------------------------------------ */

/* Of a shorter text all layers are read at once. */
enum { LEAST_BATCHES = 8 };

/* Where cards have layers in turns, a band ends where the first card comes again; of one card it may end anywhere. */
static uint32_t plan_bands(const struct sqz_reading *r, uint32_t end[SQZ_MOST_BANDS], uint32_t *n_cards)
{
    const struct sqz_model *model = r->model;
    const struct sqz_model_layer *layers = model->layers;
    const bool is_long = getenv("SQUEEZE_GPU_BANDS") || r->n_tokens >= LEAST_BATCHES * model->n_batch_tokens;
    uint32_t n = 0;
    end[0] = r->n_layer;
    *n_cards = 1;
    if (!is_long || r->held.deal.count || !model->all_on_card || sqz_gpu_by_callback() || !model->backend->ops->builder)
        return 1;
    for (uint32_t l = 0; l < r->n_layer; l++) {
        if (layers[l].card < 0 || layers[l].card >= SQZ_MOST_CARDS) return 1;
        if ((uint32_t)layers[l].card >= *n_cards) *n_cards = (uint32_t)layers[l].card + 1;
        if (l > 0 && layers[l].card < layers[l - 1].card && n + 1 < SQZ_MOST_BANDS) end[n++] = l;
    }
    if (*n_cards == 1) return sqz_bands_plan(end, r->n_layer, 1, SQZ_MOST_BANDS);
    end[n++] = r->n_layer;
    return n;
}

/* What sqz_bands.batch asks. */
struct band_link {
    struct sqz_reading *reading;
    const struct sqz_bands *bands;
    struct sqz_reading_link *link;
    bool stopped;
};

static bool begin_batch(void *user_data, size_t first_token)
{
    struct band_link *b = user_data;
    b->reading->first_position = first_token;
    b->link->done = share_read(b->bands, b->reading->n_tokens, first_token);
    b->stopped = b->stopped || (b->link->options->progress && read_cancelled(b->link));
    return !b->stopped;
}

/* The band's tokens from number `at` on: of all but the first one llama.cpp is asked once for all batches of a size. */
static enum sqz_status read_band(struct sqz_reading *r, const int32_t *tokens, size_t at, struct sqz_bands *b,
                                 const struct sqz_band_taker *taker, struct band_link *link, struct sqz_error *error)
{
    const size_t most = r->model->n_batch_tokens;
    enum sqz_status status = SQZ_OK;
    while (at < r->n_tokens && status == SQZ_OK) {
        const size_t n_whole = (r->n_tokens - at) / most;
        b->n_batches = b->now > 0 && b->repeats && n_whole > 1 ? n_whole : 1;
        status = sqz_reading_batch(r, tokens, at, most, b, link->link, error);
        if (link->stopped) status = sqz_error_set(error, SQZ_ERROR_CANCELLED, "cancelled");
        if (status == SQZ_OK) status = taker->look(taker->user_data, error);
        at += b->n_batches * most;
    }
    return status;
}

enum sqz_status sqz_reading_all(struct sqz_reading *r, const int32_t *tokens, const struct sqz_band_taker *taker,
                                struct sqz_reading_link *link, struct sqz_error *error)
{
    struct sqz_bands bands = {.n_tokens = r->n_tokens, .n_batches = 1, .batch = begin_batch}, *const b = &bands;
    struct band_link band_link = {r, b, link, false};
    enum sqz_status status = SQZ_OK;
    uint32_t n_cards;
    size_t begin = 0;
    b->user_data = &band_link;
    b->n = plan_bands(r, b->end, &n_cards);
    b->rows_bytes = r->rows_bytes / n_cards;
    if (b->n > 1) { /* the first batch goes through all layers */
        b->whole = true;
        status = sqz_reading_batch(r, tokens, 0, r->model->n_batch_tokens, b, link, error);
        b->whole = false;
        begin = r->model->n_batch_tokens;
    }
    for (b->now = 0; b->now < b->n && status == SQZ_OK; b->now++) {
        status = read_band(r, tokens, begin, b, taker, &band_link, error);
        sqz_model_wait(r->model);
        if (status == SQZ_OK) status = sqz_reading_end_layers(r, sqz_band_begin(b), b->end[b->now], error);
        if (status == SQZ_OK && b->n > 1) status = taker->take(taker->user_data, b->end[b->now], error);
    }
    if (b->gpu) sqz_model_wait(r->model);
    sqz_gpu_bands_free(b);
    return status;
}

/* ---- Into shards --------------------------------------------------------------------------------- */

void sqz_reading_share_out(struct sqz_reading *r, size_t n_tokens, uint32_t n_shards,
                           const struct sqz_exchange *exchange)
{
    if (n_shards < 2) return;
    r->exchange = exchange;
    r->held = (struct sqz_held_shards){
        .deal = {n_tokens, SQZ_SHARD_BLOCK_TOKENS, n_shards},
        .first = exchange ? exchange->rank : 0,
        .step = exchange ? exchange->n : 1,
    };
}

/* A turn in which the text has no block for this process, while the others' queries need its rows. */
static enum sqz_status read_for_others(struct sqz_reading *r, size_t at, struct sqz_reading_link *link,
                                       struct sqz_error *error)
{
    enum sqz_status status = plan_place(r, error);
    sqz_reading_shards_turn(r->into_shards, at, 0);
    for (uint32_t l = 0; l < r->n_layer && status == SQZ_OK; l++) {
        status = sqz_reading_shards_node(r->into_shards, l, NULL, r->model->crew.now, error);
        if (status == SQZ_OK && read_cancelled(link)) status = sqz_error_set(error, SQZ_ERROR_CANCELLED, "cancelled");
    }
    return status;
}

enum sqz_status sqz_reading_turns(struct sqz_reading *r, const int32_t *tokens, struct sqz_reading_link *link,
                                  struct sqz_error *error)
{
    const size_t block = r->held.deal.block_tokens, turn = block * r->held.step, n = r->n_tokens;
    enum sqz_status status = SQZ_OK;
    for (size_t begin = 0; begin < n && status == SQZ_OK; begin += turn) {
        const size_t at = begin + r->held.first * block;
        status =
            at < n ? sqz_reading_batch(r, tokens, at, block, NULL, link, error) : read_for_others(r, at, link, error);
        link->done = (double)(begin + turn < n ? begin + turn : n);
    }
    return status == SQZ_OK ? sqz_reading_end_layers(r, 0, r->n_layer, error) : status;
}
