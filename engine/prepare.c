/*
 * Prepare: run the model over a document chunk by chunk with our dense
 * attention, cluster and calibrate every layer, write the context file.
 */
#define _GNU_SOURCE /* mmap flags, clock_gettime */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "backend.h"
#include "building.h"
#include "context_file.h"
#include "clock.h"
#include "error.h"
#include "floor.h"
#include "kernels.h"
#include "preparing.h"
#include "read_shards.h"
#include "session.h"
#include "text.h"
#include "write_shards.h"

/* A document that leaves less room than this cannot be asked anything. */
enum { MIN_LEFT_TOKENS = 32 };

void sqz_prepare_options_default(struct sqz_prepare_options *options)
{
    memset(options, 0, sizeof *options);
    options->size = sizeof *options;
    sqz_squeeze_options_default(&options->squeeze, SQZ_RULE_DEFAULT);
    options->reserve_tokens = 256;
}

static bool report_progress(const struct sqz_prepare_options *o, const char *phase, double done, double total,
                            const char *unit, double since)
{
    const struct sqz_progress p = {phase, done, total, unit, sqz_clock_seconds() - since};
    return !o->progress || o->progress(&p, o->user_data);
}

/* ---- Keys and values of a context while it is read ---------------------------------- */

struct reading {
    struct sqz_model *model;
    size_t n_tokens, n_queries;
    size_t first_position;          /* of the chunk in flight */
    struct sqz_layer_input *inputs; /* [n_layer] */
    struct sqz_layer *layers;       /* [n_layer] planned from inputs */
    uint32_t n_layer;
    const struct sqz_context *source; /* whose rows and queries these are; NULL: a model's */
    struct sqz_context_writer *writer;
    struct sqz_held_shards held;            /* of a context in shards; 0 shards: it is one file */
    const struct sqz_exchange *exchange;    /* whoever holds the other shards, or NULL */
    struct sqz_reading_shards *into_shards; /* in place of read_attention()'s own way */
    struct sqz_shards_writing *shards;      /* in place of layers and writer */
    uint16_t *queries;                      /* of all layers */
    uint16_t *rows;                         /* keys and values of all layers */
    size_t rows_bytes;
    bool placed;                  /* the place was told */
    struct sqz_building building; /* begun when it has layers */
    double building_seconds;      /* of what was built while others were read */
};

static void reading_free(struct reading *r)
{
    if (r->model && r->placed) sqz_model_wait(r->model);
    sqz_early_rows_end(r->building.early, true, NULL);
    sqz_building_free(&r->building);
    sqz_context_writer_abort(r->writer);
    sqz_shards_writing_free(r->shards);
    sqz_reading_shards_free(r->into_shards);
    if (r->model && r->model->backend->ops->end_reading) r->model->backend->ops->end_reading(r->model->backend);
    for (uint32_t l = 0; r->layers && l < r->n_layer; l++) sqz_layer_release(&r->layers[l]);
    if (r->rows) munmap(r->rows, r->rows_bytes);
    free(r->layers);
    free(r->queries);
    free(r->inputs);
    memset(r, 0, sizeof *r);
}

/* Anonymous memory that costs nothing until touched; NULL when the system has none. */
static void *map_memory(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    madvise(p, bytes, MADV_HUGEPAGE); /* a hint: touching a page costs as much as what goes into it */
    return p;
}

/* inputs and layers, zeroed. */
static enum sqz_status reading_begin(struct reading *r, uint32_t n_layer, struct sqz_error *error)
{
    r->n_layer = n_layer;
    r->inputs = calloc(n_layer, sizeof *r->inputs);
    r->layers = calloc(n_layer, sizeof *r->layers);
    if (!r->inputs || !r->layers) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for %u layers", n_layer);
    return SQZ_OK;
}

/* Sets up the arrays for the layers whose shapes and windows are in inputs. Rows are kept for all tokens, or those of the
 * shards held here; a layer with a window ends with its last rows alone. */
static enum sqz_status reading_allocate(struct reading *r, size_t n_tokens, size_t n_queries, struct sqz_error *error)
{
    const uint32_t n_layer = r->n_layer;
    const size_t n_rows = r->held.deal.count ? sqz_held_tokens(&r->held, r->held.deal.count) : n_tokens;
    size_t rows = 0, queries = 0;
    r->n_tokens = n_tokens;
    r->n_queries = n_queries;
    for (uint32_t l = 0; l < n_layer; l++) {
        const struct sqz_layer_shape *s = &r->inputs[l].shape;
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

/* Keeps the queries of the node's tokens from number `first` on. */
static enum sqz_status keep_queries(struct reading *r, const struct sqz_attention_node *node, size_t first,
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
    struct reading *r = user_data;
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

/* A sliding-window layer needs the last rows alone: moves them to the front, head by head. */
static void keep_window(struct sqz_layer_input *in)
{
    const size_t d = in->shape.head_dim, keep = in->n_rows, all = in->first_position + keep;
    for (uint32_t h = 0; h < in->shape.n_head_kv && keep < all; h++) {
        memmove(in->keys + h * keep * d, in->keys + (h * all + all - keep) * d, keep * d * sizeof *in->keys);
        memmove(in->values + h * keep * d, in->values + (h * all + all - keep) * d, keep * d * sizeof *in->values);
    }
}

struct cancel_link {
    const struct sqz_prepare_options *options;
    double done, total, since;
};

/* llama.cpp asks between its operations; the bar is told where the chunk began. */
static bool read_cancelled(void *user_data)
{
    const struct cancel_link *c = user_data;
    return !report_progress(c->options, "read", c->done, c->total, "tokens", c->since);
}

/* Shapes of the model's layers into r->inputs, and memory for everything reading needs. */
static enum sqz_status plan_reading(struct reading *r, struct sqz_model *model, size_t n_tokens,
                                    const struct sqz_prepare_options *o, struct sqz_error *error)
{
    const size_t wanted = o->squeeze.n_levels ? o->squeeze.n_calibration : 0;
    r->model = model;
    enum sqz_status status = reading_begin(r, model->info.n_layer, error);
    if (status != SQZ_OK) return status;
    for (uint32_t l = 0; l < r->n_layer; l++) {
        r->inputs[l].shape = model->layers[l].shape;
        r->inputs[l].window_tokens = model->layers[l].sliding_window ? model->info.n_window_tokens : 0;
    }
    return reading_allocate(r, n_tokens, wanted < n_tokens ? wanted : n_tokens, error);
}

/* The place's own memory for reading, which its other work may be using until the first batch. */
static enum sqz_status plan_place(struct reading *r, struct sqz_error *error)
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

static bool on_several_cards(const struct reading *r)
{
    const struct sqz_model_layer *layers = r->model->layers;
    return r->model->all_on_card && layers[0].card != layers[r->n_layer - 1].card;
}

/* One batch of at most `most` tokens from token number `at` on. With bands it need not be done when this returns. */
static enum sqz_status read_batch(struct reading *r, const int32_t *tokens, size_t at, size_t most,
                                  struct sqz_bands *bands, struct cancel_link *link, struct sqz_error *error)
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
    link->done = bands ? share_read(bands, r->n_tokens, at + n) : (double)(at + n);
    if (status == SQZ_OK && read_cancelled(link)) status = sqz_error_set(error, SQZ_ERROR_CANCELLED, "cancelled");
    return status;
}

/* When layers [l, end) have read all tokens: rows that lie elsewhere come, and of windows the last ones stay. */
static enum sqz_status end_of_text(struct reading *r, uint32_t l, uint32_t end, struct sqz_error *error)
{
    struct sqz_backend *backend = r->model->backend;
    enum sqz_status status = SQZ_OK;
    for (; l < end && status == SQZ_OK; l++) {
        struct sqz_layer_input *in = &r->inputs[l];
        if (in->first_position == 0) continue;
        if (backend->ops->bring_rows) status = backend->ops->bring_rows(backend, l, in->keys, in->values, error);
        if (status == SQZ_OK) keep_window(in);
    }
    return status;
}

/* ---- Squeeze and write -------------------------------------------------------------------- */

struct build_link {
    const struct sqz_prepare_options *options;
    const char *phase;
    double since;
};

static bool build_progress(void *user_data, size_t done, size_t total)
{
    const struct build_link *b = user_data;
    return report_progress(b->options, b->phase, (double)done, (double)total, "heads", b->since);
}

/* Decides the layers' counts and reserves the file: a path that cannot be written or a disk without room is found
 * before minutes of work. */
static enum sqz_status plan_file(struct reading *r, const struct sqz_context_meta *meta, const char *out_path,
                                 const struct sqz_prepare_options *o, struct sqz_error *error)
{
    if (r->exchange && r->model && r->model->on_card)
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                             "several processes prepare shards by models on the CPU; --gpu-layers 0");
    if (o->n_shards > 1)
        return sqz_shards_writing_begin(&r->shards, r->inputs, meta, &r->held, r->exchange, out_path, error);
    for (uint32_t l = 0; l < r->n_layer; l++)
        r->inputs[l].stays_dense = !sqz_clusters_pay(r->inputs[l].n_rows, &o->squeeze);
    enum sqz_status status = sqz_layers_plan(r->layers, r->inputs, r->n_layer, &o->squeeze, error);
    if (status != SQZ_OK) return status;
    return sqz_context_writer_create(&r->writer, out_path, meta, r->layers, error);
}

enum { POLL_NS = 5000000 };

/* Bringing a file to the disk takes as long as the disk does. */
struct commit {
    struct sqz_context_writer *writer;
    uint64_t *file_bytes;
    struct sqz_error *error;
    enum sqz_status status;
    atomic_bool done;
};

static void *commit_apart(void *data)
{
    struct commit *c = data;
    c->status = sqz_context_writer_commit(c->writer, c->file_bytes, c->error);
    atomic_store(&c->done, true);
    return NULL;
}

/* Puts the file in its place, and tells meanwhile of what has come to its end. */
static enum sqz_status commit(struct reading *r, const struct sqz_prepare_options *o, uint64_t *file_bytes,
                              double since, struct sqz_error *error)
{
    struct commit c = {.writer = r->writer, .file_bytes = file_bytes, .error = error};
    pthread_t thread;
    const bool apart = o->progress && pthread_create(&thread, NULL, commit_apart, &c) == 0;
    r->writer = NULL;
    if (!apart) commit_apart(&c);
    while (!atomic_load(&c.done)) {
        report_progress(o, "write", r->n_layer, r->n_layer, "layers", since);
        nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    }
    if (apart) pthread_join(thread, NULL);
    return c.status;
}

/* Until the rows of layers that were built elsewhere are written: tells of it now and then, stops when cancelled. */
static enum sqz_status finish_rows(struct reading *r, struct sqz_early_rows *early, const struct sqz_prepare_options *o,
                                   double since, struct sqz_error *error)
{
    bool finished = false, go_on = true;
    while (!finished && go_on) {
        const uint32_t n = sqz_early_rows_done(early, &finished);
        go_on = report_progress(o, "write", n, r->n_layer, "layers", since);
        if (!finished) nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    }
    const enum sqz_status status = sqz_early_rows_end(early, !go_on, error);
    return status == SQZ_OK && !go_on ? sqz_error_set(error, SQZ_ERROR_CANCELLED, "cancelled") : status;
}

static enum sqz_status write_layers(struct reading *r, struct sqz_building *building,
                                    const struct sqz_prepare_options *o, struct sqz_prepare_report *report,
                                    struct sqz_error *error)
{
    const double since = sqz_clock_seconds();
    struct sqz_early_rows *early = building->early;
    enum sqz_status status = SQZ_OK;
    building->early = NULL;
    if (early) status = finish_rows(r, early, o, since, error);
    for (uint32_t l = 0; l < r->n_layer && status == SQZ_OK; l++) {
        struct sqz_layer layer;
        status = sqz_building_layer(building, l, &layer, error);
        if (status == SQZ_OK) status = sqz_context_writer_put_layer(r->writer, l, &layer, error);
        if (status == SQZ_OK && !report_progress(o, "write", early ? r->n_layer : l + 1, r->n_layer, "layers", since))
            status = sqz_error_set(error, SQZ_ERROR_CANCELLED, "cancelled");
    }
    if (status == SQZ_OK && r->source) status = sqz_context_check_unchanged(r->source, error);
    if (status == SQZ_OK) status = commit(r, o, &report->file_bytes, since, error);
    report->write_seconds = sqz_clock_seconds() - since;
    return status;
}

/* Layers may be built from now on, and where a place builds them their rows go to the file. */
static enum sqz_status begin_building(struct reading *r, const struct sqz_prepare_options *o, int n_threads,
                                      struct sqz_error *error)
{
    struct sqz_backend *backend = r->model ? r->model->backend : NULL;
    r->building = (struct sqz_building){.backend = backend,
                                        .layers = r->layers,
                                        .inputs = r->inputs,
                                        .n_layer = r->n_layer,
                                        .options = &o->squeeze,
                                        .n_threads = n_threads};
    sqz_context_writer_set_threads(r->writer, n_threads);
    if (!backend || !backend->ops->builder) return SQZ_OK;
    return sqz_early_rows_begin(&r->building.early, backend, r->writer, r->layers, r->inputs, r->n_layer, error);
}

/* Rows that were read on a card, to where they are dealt out. Those of windows, which are no shards', have come. */
static enum sqz_status bring_all_rows(struct reading *r, struct sqz_error *error)
{
    struct sqz_backend *backend = r->model ? r->model->backend : NULL;
    enum sqz_status status = SQZ_OK;
    for (uint32_t l = 0; backend && backend->ops->bring_rows && l < r->n_layer && status == SQZ_OK; l++)
        status = backend->ops->bring_rows(backend, l, r->inputs[l].keys, r->inputs[l].values, error);
    if (status == SQZ_OK && backend && backend->ops->end_reading) backend->ops->end_reading(backend);
    return status;
}

/* The same of a context in shards, which are built on the host. */
static enum sqz_status squeeze_and_write_shards(struct reading *r, const struct sqz_prepare_options *o, int n_threads,
                                                struct sqz_prepare_report *report, struct sqz_error *error)
{
    struct build_link link = {o, "cluster", sqz_clock_seconds()};
    enum sqz_status status = r->into_shards ? SQZ_OK : bring_all_rows(r, error);
    if (status == SQZ_OK && !r->into_shards) status = sqz_shards_deal(r->shards, error);
    if (status == SQZ_OK) status = sqz_shards_cluster(r->shards, n_threads, build_progress, &link, error);
    report->cluster_seconds = sqz_clock_seconds() - link.since;
    link = (struct build_link){o, "calibrate", sqz_clock_seconds()};
    if (status == SQZ_OK) status = sqz_shards_calibrate_all(r->shards, n_threads, build_progress, &link, error);
    report->calibrate_seconds = sqz_clock_seconds() - link.since;
    link = (struct build_link){o, "write", sqz_clock_seconds()};
    if (status == SQZ_OK && r->source) status = sqz_context_check_unchanged(r->source, error);
    if (status == SQZ_OK) status = sqz_shards_write(r->shards, build_progress, &link, &report->file_bytes, error);
    report->write_seconds = sqz_clock_seconds() - link.since;
    if (status == SQZ_OK) report->budget_floor = sqz_shards_budget_floor(r->shards);
    return status;
}

static enum sqz_status squeeze_and_write(struct reading *r, const struct sqz_prepare_options *o, int n_threads,
                                         struct sqz_prepare_report *report, struct sqz_error *error)
{
    if (r->shards) return squeeze_and_write_shards(r, o, n_threads, report, error);
    struct build_link link = {o, "cluster", sqz_clock_seconds()};
    struct sqz_building *building = &r->building;
    enum sqz_status status = building->layers ? SQZ_OK : begin_building(r, o, n_threads, error);
    building->progress = build_progress;
    building->user_data = &link;
    if (status == SQZ_OK) status = sqz_building_cluster(building, error);
    report->cluster_seconds = sqz_clock_seconds() - link.since + r->building_seconds;
    link = (struct build_link){o, "calibrate", sqz_clock_seconds()};
    if (status == SQZ_OK) status = sqz_building_calibrate(building, error);
    report->calibrate_seconds = sqz_clock_seconds() - link.since;
    if (status == SQZ_OK) status = write_layers(r, building, o, report, error);
    if (status == SQZ_OK) report->budget_floor = sqz_budget_floor(r->layers, r->n_layer);
    for (uint32_t l = 0; r->model && r->model->on_card && l < r->n_layer; l++) {
        const bool is_there = r->layers[l].n_levels && r->model->layers[l].card != SQZ_ON_HOST;
        report->n_card_layers += is_there;
        report->n_host_layers += is_there && !r->inputs[l].elsewhere;
    }
    return status;
}

/* ---- By bands of layers ------------------------------------------------------------------------ */

/* What is written beside reading need not be written behind it. But each batch of a band takes llama.cpp 30 to 40 ms of a
 * processor, beside which the card should not wait: 131,072 tokens of the 8B shape took 20 s in 8 bands, and 11 in one. */
enum { BANDS = 3, LEAST_BATCHES = 8 };

static uint32_t count_bands(const struct reading *r)
{
    const struct sqz_model *model = r->model;
    const char *asked = getenv("SQUEEZE_GPU_BANDS");
    const int n = asked ? atoi(asked) : r->n_tokens < LEAST_BATCHES * model->n_batch_tokens ? 1 : BANDS;
    if (n < 2 || r->shards || !model->all_on_card || sqz_gpu_by_callback() || !model->backend->ops->builder) return 1;
    for (uint32_t l = 0; l < r->n_layer; l++)
        if (model->layers[l].card != 0) return 1;
    return (uint32_t)n < r->n_layer ? (uint32_t)n : r->n_layer;
}

/* Where they do not share evenly, the last has fewest layers: it is waited for. */
static struct sqz_bands plan_bands(const struct reading *r)
{
    struct sqz_bands b = {.n = count_bands(r), .n_tokens = r->n_tokens, .rows_bytes = r->rows_bytes};
    if (b.n > SQZ_MOST_BANDS) b.n = SQZ_MOST_BANDS;
    for (uint32_t i = 0; i < b.n; i++) b.end[i] = (r->n_layer * (i + 1) + b.n - 1) / b.n;
    return b;
}

/* Behind a band: its layers are built, and begin to be written while the next one is read. */
static enum sqz_status build_band(struct reading *r, const struct sqz_bands *b, const struct sqz_prepare_options *o,
                                  struct sqz_error *error)
{
    const double since = sqz_clock_seconds();
    enum sqz_status status = r->building.layers ? SQZ_OK : begin_building(r, o, r->model->info.n_threads, error);
    if (status == SQZ_OK) status = sqz_building_place(&r->building, b->end[b->now], error);
    r->building_seconds += sqz_clock_seconds() - since;
    return status;
}

/* All tokens, band by band, in batches as large as the model takes. */
static enum sqz_status read_bands(struct reading *r, const int32_t *tokens, struct sqz_bands *b,
                                  struct cancel_link *link, struct sqz_error *error)
{
    enum sqz_status status = SQZ_OK;
    for (b->now = 0; b->now < b->n && status == SQZ_OK; b->now++) {
        for (size_t at = 0; at < r->n_tokens && status == SQZ_OK; at += r->model->n_batch_tokens)
            status = read_batch(r, tokens, at, r->model->n_batch_tokens, b, link, error);
        sqz_model_wait(r->model);
        if (status == SQZ_OK) status = end_of_text(r, sqz_band_begin(b), b->end[b->now], error);
        if (status == SQZ_OK && b->n > 1) status = build_band(r, b, link->options, error);
    }
    if (b->between) sqz_gpu_calls_of()->use(b->card), sqz_gpu_calls_of()->release(b->between);
    return status;
}

/* ---- Into shards --------------------------------------------------------------------------------- */

/* Which shards are held here, of a text of n_tokens. */
static void share_out(struct reading *r, size_t n_tokens, uint32_t n_shards, const struct sqz_exchange *exchange)
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
static enum sqz_status read_for_others(struct reading *r, size_t at, struct cancel_link *link, struct sqz_error *error)
{
    enum sqz_status status = plan_place(r, error);
    sqz_reading_shards_turn(r->into_shards, at, 0);
    for (uint32_t l = 0; l < r->n_layer && status == SQZ_OK; l++) {
        status = sqz_reading_shards_node(r->into_shards, l, NULL, r->model->crew.now, error);
        if (status == SQZ_OK && read_cancelled(link)) status = sqz_error_set(error, SQZ_ERROR_CANCELLED, "cancelled");
    }
    return status;
}

/* All tokens of this process: a block in every turn of all processes. */
static enum sqz_status read_turns(struct reading *r, const int32_t *tokens, struct cancel_link *link,
                                  struct sqz_error *error)
{
    const size_t block = r->held.deal.block_tokens, turn = block * r->held.step, n = r->n_tokens;
    enum sqz_status status = SQZ_OK;
    for (size_t begin = 0; begin < n && status == SQZ_OK; begin += turn) {
        const size_t at = begin + r->held.first * block;
        status = at < n ? read_batch(r, tokens, at, block, NULL, link, error) : read_for_others(r, at, link, error);
        link->done = (double)(begin + turn < n ? begin + turn : n);
    }
    return status;
}

/* ---- The calls --------------------------------------------------------------------------------- */

/* Puts the defaults in place of NULL and checks. */
static enum sqz_status take_options(const struct sqz_prepare_options **options, struct sqz_prepare_options *defaults,
                                    struct sqz_error *error)
{
    if (!*options) {
        sqz_prepare_options_default(defaults);
        *options = defaults;
    }
    const struct sqz_prepare_options *o = *options;
    if (o->size != sizeof *o)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "prepare options of %zu bytes: this library's have %zu",
                             o->size, sizeof *o);
    return sqz_squeeze_options_check(&o->squeeze, error);
}

struct sqz_preparing {
    struct reading reading;
    struct sqz_prepare_options options;
    struct sqz_rope rope;
    struct sqz_prepare_report report;
    struct cancel_link link;
    int32_t *tokens;
    size_t n_read;
};

static enum sqz_status check_length(const struct sqz_model *model, size_t n_tokens, const struct sqz_prepare_options *o,
                                    struct sqz_error *error)
{
    const size_t limit = model->info.n_context_tokens;
    const double trained = model->n_trained_tokens;
    if (n_tokens + MIN_LEFT_TOKENS <= limit) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_LENGTH,
                         "the document is %zu tokens too long: it takes %zu tokens, the model holds %zu and %d are "
                         "needed for a question and its answer; --truncate keeps the first tokens, --rope-scale "
                         "%.1f stretches the model's context (at some loss of quality)",
                         n_tokens + MIN_LEFT_TOKENS - limit, n_tokens, limit, MIN_LEFT_TOKENS,
                         (double)(n_tokens + o->reserve_tokens) / trained + 0.1);
}

/* Memory and the file of what will be read. */
static enum sqz_status plan(struct sqz_preparing *p, struct sqz_model *model, size_t n_tokens, bool has_template,
                            const char *out_path, struct sqz_error *error)
{
    const struct sqz_prepare_options *o = &p->options;
    const size_t limit = model->info.n_context_tokens;
    const size_t to_fit = o->reserve_tokens < limit - n_tokens ? n_tokens + o->reserve_tokens : limit;
    p->rope = (struct sqz_rope){model->rope_scale, sqz_model_rope_factors(model, to_fit)};
    const struct sqz_context_meta meta = {
        .model_name = model->info.name,
        .model_architecture = model->info.architecture,
        .model_fingerprint = model->info.fingerprint,
        .source_name = o->source_name ? o->source_name : "",
        .tokens = p->tokens,
        .n_tokens = n_tokens,
        .has_template = has_template,
        .rope_scale = p->rope.scale,
        .rope_factors = p->rope.factors,
        .n_layer = model->info.n_layer,
        .squeeze = o->squeeze,
    };
    struct reading *r = &p->reading;
    share_out(r, n_tokens, o->n_shards, sqz_exchange_used());
    enum sqz_status status = plan_reading(r, model, n_tokens, o, error);
    if (status == SQZ_OK) status = plan_file(r, &meta, out_path, o, error);
    if (status == SQZ_OK && r->shards && !model->on_card) /* a card reads the text as one */
        status = sqz_reading_shards_begin(&r->into_shards, &r->held, r->exchange, model->backend, r->inputs, r->n_layer,
                                          error);
    return status;
}

enum sqz_status sqz_preparing_begin(struct sqz_preparing **out, struct sqz_model *model, const int32_t *tokens,
                                    size_t n_tokens, bool has_template, const char *out_path,
                                    const struct sqz_prepare_options *options, struct sqz_error *error)
{
    struct sqz_prepare_options defaults;
    *out = NULL;
    sqz_error_clear(error);
    enum sqz_status status = take_options(&options, &defaults, error);
    if (status != SQZ_OK) return status;
    if (n_tokens == 0) return sqz_error_set(error, SQZ_ERROR_TEXT, "the document is empty: 0 tokens");
    status = sqz_model_check_tokens(model, tokens, n_tokens, error);
    if (status != SQZ_OK) return status;
    const size_t n_document = n_tokens;
    if (options->truncate_tokens && n_tokens > options->truncate_tokens) n_tokens = options->truncate_tokens;
    status = check_length(model, n_tokens, options, error);
    if (status != SQZ_OK) return status;
    struct sqz_preparing *p = calloc(1, sizeof *p);
    if (p) p->tokens = malloc(n_tokens * sizeof *tokens);
    if (!p || !p->tokens) {
        free(p);
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for %zu tokens", n_tokens);
    }
    memcpy(p->tokens, tokens, n_tokens * sizeof *tokens);
    p->options = *options;
    p->report = (struct sqz_prepare_report){.n_document_tokens = n_document,
                                            .n_context_tokens = n_tokens,
                                            .n_left_tokens = model->info.n_context_tokens - n_tokens};
    p->link = (struct cancel_link){&p->options, 0, (double)n_tokens, sqz_clock_seconds()};
    status = plan(p, model, n_tokens, has_template, out_path, error);
    if (status != SQZ_OK) sqz_preparing_free(p);
    else *out = p;
    return status;
}

void sqz_preparing_spread(struct sqz_preparing *p)
{
    madvise(p->reading.rows, p->reading.rows_bytes, MADV_NOHUGEPAGE); /* a kernel without large ones says no */
}

enum sqz_status sqz_preparing_step(struct sqz_preparing *p, size_t n_tokens, struct sqz_error *error)
{
    struct reading *r = &p->reading;
    sqz_error_clear(error);
    if (p->n_read == r->n_tokens) return SQZ_OK;
    enum sqz_status status = sqz_model_make_ready(r->model, p->rope, 1, error);
    if (n_tokens > r->model->n_batch_tokens) n_tokens = r->model->n_batch_tokens;
    if (r->into_shards && n_tokens > SQZ_SHARD_BLOCK_TOKENS - p->n_read % SQZ_SHARD_BLOCK_TOKENS)
        n_tokens = SQZ_SHARD_BLOCK_TOKENS - p->n_read % SQZ_SHARD_BLOCK_TOKENS;
    if (status == SQZ_OK) status = read_batch(r, p->tokens, p->n_read, n_tokens, NULL, &p->link, error);
    if (status != SQZ_OK) return status;
    p->n_read = (size_t)p->link.done;
    return p->n_read == r->n_tokens ? end_of_text(r, 0, r->n_layer, error) : SQZ_OK;
}

/* Whether what a session has read can be taken over as it lies. */
static bool can_follow(const struct sqz_preparing *p, const struct sqz_session *s)
{
    const struct reading *r = &p->reading;
    if (r->into_shards || s->model != r->model || !s->backend->ops->copy_own ||
        s->n_context + r->n_queries > r->n_tokens)
        return false;
    for (uint32_t l = 0; l < r->n_layer; l++)
        if (sqz_context_layer(s->context, l)->n_levels) return false;
    return s->rope.scale == p->rope.scale && s->rope.factors == p->rope.factors;
}

/* Rows of a context without clusters, from position `first` to `end`. */
static void take_context_rows(const struct sqz_layer *layer, const struct sqz_layer_input *in, size_t capacity_rows,
                              size_t first, size_t end)
{
    const size_t d = layer->shape.head_dim, n = layer->n_rows;
    for (size_t h = 0; h < layer->shape.n_head_kv; h++) {
        const struct sqz_rows keys = sqz_rows_of_head(&layer->keys, n, d, h);
        const struct sqz_rows values = sqz_rows_of_head(&layer->values, n, d, h);
        for (size_t i = 0; i < n; i++) {
            const size_t position = (size_t)layer->position[h * n + i], to = (h * capacity_rows + position) * d;
            if (position < first || position >= end) continue;
            sqz_rows_to_f16(in->keys + to, &keys, i, 1, d);
            sqz_rows_to_f16(in->values + to, &values, i, 1, d);
        }
    }
}

enum sqz_status sqz_preparing_follow(struct sqz_preparing *p, const struct sqz_session *s, struct sqz_error *error)
{
    struct reading *r = &p->reading;
    const size_t most = r->n_tokens - r->n_queries, has = s->n_context + s->n_user, end = has < most ? has : most;
    sqz_error_clear(error);
    if (!can_follow(p, s))
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED, "what this session has read cannot be taken over");
    if (end <= p->n_read) return SQZ_OK;
    const size_t own = p->n_read > s->n_context ? p->n_read : s->n_context;
    for (uint32_t l = 0; l < r->n_layer; l++) {
        const struct sqz_layer_input *in = &r->inputs[l];
        if (p->n_read < s->n_context)
            take_context_rows(sqz_context_layer(s->context, l), in, r->n_tokens, p->n_read, end);
        if (own < end)
            s->backend->ops->copy_own(s->own, l, own - s->n_context, end - own, in->keys, in->values, r->n_tokens, own);
    }
    p->n_read = end;
    p->link.done = (double)end;
    return SQZ_OK;
}

size_t sqz_preparing_left(const struct sqz_preparing *p)
{
    return p->reading.n_tokens - p->n_read;
}

enum sqz_status sqz_preparing_finish(struct sqz_preparing *p, int n_threads, struct sqz_prepare_report *report,
                                     struct sqz_error *error)
{
    struct sqz_backend *backend = p->reading.model->backend;
    sqz_error_clear(error);
    if (sqz_preparing_left(p))
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%zu tokens are not read yet", sqz_preparing_left(p));
    p->report.read_seconds = sqz_clock_seconds() - p->link.since - p->reading.building_seconds;
    if (backend->ops->reading_fallback)
        snprintf(p->report.fallback, sizeof p->report.fallback, "%s", backend->ops->reading_fallback(backend));
    const enum sqz_status status = squeeze_and_write(&p->reading, &p->options, n_threads, &p->report, error);
    p->report.total_seconds = sqz_clock_seconds() - p->link.since;
    if (report) *report = p->report;
    return status;
}

void sqz_preparing_free(struct sqz_preparing *p)
{
    if (!p) return;
    reading_free(&p->reading);
    free(p->tokens);
    free(p);
}

enum sqz_status sqz_document_tokens(const struct sqz_model *model, const char *text, size_t n_bytes, bool raw,
                                    int32_t **out, size_t *n_tokens, bool *has_template, struct sqz_error *error)
{
    struct sqz_tokens tokens = {NULL, 0};
    size_t n_document;
    sqz_error_clear(error);
    const enum sqz_status status = sqz_text_context(&tokens, model, text, n_bytes, raw, &n_document, error);
    if (status != SQZ_OK) free(tokens.data);
    *out = status == SQZ_OK ? tokens.data : NULL;
    *n_tokens = status == SQZ_OK ? tokens.n : 0;
    *has_template = model->chat_template && !raw;
    return status;
}

/* All at once, in batches as large as the model takes. */
static enum sqz_status prepare(struct sqz_model *model, const int32_t *tokens, size_t n_tokens, bool has_template,
                               const char *out_path, const struct sqz_prepare_options *o,
                               struct sqz_prepare_report *report, struct sqz_error *error)
{
    struct sqz_preparing *p;
    const size_t n_document_tokens = report->n_document_tokens;
    const struct sqz_exchange *exchange = o->n_shards > 1 ? sqz_exchange_used() : NULL;
    enum sqz_status status = sqz_preparing_begin(&p, model, tokens, n_tokens, has_template, out_path, o, error);
    if (status == SQZ_OK) status = sqz_model_make_ready_to_read(model, p->rope, p->reading.n_tokens, error);
    status = sqz_exchange_agree(exchange, status, error);
    if (!p) return status;
    struct sqz_bands bands = plan_bands(&p->reading);
    if (status == SQZ_OK && p->reading.into_shards)
        status = sqz_exchange_agree(exchange, read_turns(&p->reading, p->tokens, &p->link, error), error);
    else if (status == SQZ_OK) status = read_bands(&p->reading, p->tokens, &bands, &p->link, error);
    p->n_read = p->reading.n_tokens;
    if (status == SQZ_OK) status = sqz_preparing_finish(p, model->info.n_threads, report, error);
    report->n_document_tokens = n_document_tokens;
    sqz_preparing_free(p);
    return status;
}

enum sqz_status sqz_prepare_tokens(struct sqz_model *model, const int32_t *tokens, size_t n_tokens,
                                   const char *out_path, const struct sqz_prepare_options *options,
                                   struct sqz_prepare_report *user_report, struct sqz_error *error)
{
    struct sqz_prepare_options defaults;
    struct sqz_prepare_report report = {.n_document_tokens = n_tokens};
    sqz_error_clear(error);
    enum sqz_status status = take_options(&options, &defaults, error);
    if (status != SQZ_OK) return status;
    if (n_tokens == 0) return sqz_error_set(error, SQZ_ERROR_TEXT, "the document is empty: 0 tokens");
    status = sqz_model_check_tokens(model, tokens, n_tokens, error);
    if (status != SQZ_OK) return status;
    status = prepare(model, tokens, n_tokens, false, out_path, options, &report, error);
    if (user_report) *user_report = report;
    return status;
}

enum sqz_status sqz_prepare(struct sqz_model *model, const char *text, size_t text_bytes, const char *out_path,
                            const struct sqz_prepare_options *options, struct sqz_prepare_report *user_report,
                            struct sqz_error *error)
{
    struct sqz_prepare_options defaults;
    struct sqz_prepare_report report = {0};
    struct sqz_tokens tokens = {NULL, 0};
    sqz_error_clear(error);
    enum sqz_status status = take_options(&options, &defaults, error);
    if (status == SQZ_OK)
        status = sqz_text_context(&tokens, model, text, text_bytes, options->raw, &report.n_document_tokens, error);
    if (status == SQZ_OK)
        status = prepare(model, tokens.data, tokens.n, model->chat_template && !options->raw, out_path, options,
                         &report, error);
    free(tokens.data);
    if (user_report) *user_report = report;
    return status;
}

/* Rows of a stored layer back in the order of their positions. These were checked when the file was opened, but they are
 * read from the file again here: every one is held against the room there is. */
static enum sqz_status unsort(const struct sqz_layer *layer, const struct sqz_layer_input *in, struct sqz_error *error)
{
    const size_t d = layer->shape.head_dim, n = in->n_rows;
    if (layer->n_rows != n)
        return sqz_error_set(error, SQZ_ERROR_FORMAT, "a layer has %u rows where its window sees %zu",
                             (unsigned)layer->n_rows, n);
    for (size_t h = 0; h < layer->shape.n_head_kv; h++) {
        const struct sqz_rows keys = sqz_rows_of_head(&layer->keys, n, d, h);
        const struct sqz_rows values = sqz_rows_of_head(&layer->values, n, d, h);
        for (size_t i = 0; i < n; i++) {
            const size_t row = (size_t)layer->position[h * n + i] - in->first_position;
            if (row >= n)
                return sqz_error_set(error, SQZ_ERROR_IO, "the context file changed while it was read; open it again");
            sqz_rows_to_f16(in->keys + (h * n + row) * d, &keys, i, 1, d);
            sqz_rows_to_f16(in->values + (h * n + row) * d, &values, i, 1, d);
        }
    }
    return SQZ_OK;
}

enum sqz_status sqz_context_squeeze(const struct sqz_context *context, const char *out_path,
                                    const struct sqz_prepare_options *options, int n_threads,
                                    struct sqz_prepare_report *user_report, struct sqz_error *error)
{
    struct sqz_prepare_options defaults;
    const double since = sqz_clock_seconds();
    const struct sqz_context_meta *old = sqz_context_get_meta(context);
    struct sqz_prepare_report report = {.n_context_tokens = old->n_tokens};
    struct reading r = {.source = context};
    sqz_error_clear(error);
    enum sqz_status status = take_options(&options, &defaults, error);
    if (status != SQZ_OK) return status;
    if (sqz_context_n_shards(context))
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                             "a context in shards cannot be squeezed anew; prepare the document again");
    status = sqz_choose_threads(&n_threads, error);
    if (status != SQZ_OK) return status;
    share_out(&r, old->n_tokens, options->n_shards, NULL);
    status = reading_begin(&r, old->n_layer, error);
    for (uint32_t l = 0; l < old->n_layer && status == SQZ_OK; l++) {
        const struct sqz_layer *layer = sqz_context_layer(context, l);
        r.inputs[l].shape = layer->shape;
        r.inputs[l].window_tokens = layer->sliding_window ? layer->n_window_tokens : 0;
    }
    if (status == SQZ_OK) status = reading_allocate(&r, old->n_tokens, 0, error);
    for (uint32_t l = 0; l < old->n_layer && status == SQZ_OK; l++) {
        const struct sqz_layer *layer = sqz_context_layer(context, l);
        struct sqz_layer_input *in = &r.inputs[l];
        if (options->squeeze.n_levels && !layer->sliding_window && layer->n_queries) {
            const size_t wanted = options->squeeze.n_calibration;
            in->n_queries = layer->n_queries < wanted ? layer->n_queries : wanted;
            in->queries = layer->queries +
                          (size_t)(layer->n_queries - in->n_queries) * layer->shape.n_head * layer->shape.head_dim;
        } else if (!layer->sliding_window && sqz_rows_cluster(layer->n_rows, &options->squeeze) &&
                   sqz_clusters_pay(layer->n_rows, &options->squeeze)) {
            status = sqz_error_set(error, SQZ_ERROR_ARGUMENT,
                                   "this context has no clusters and keeps no queries to calibrate with; prepare the "
                                   "document again");
        }
        if (status == SQZ_OK) status = unsort(layer, in, error);
    }
    /* All of it from the file that was opened, or nothing is written: the queries are read from it later on, so this is
     * looked at again before the new file gets its name. */
    if (status == SQZ_OK) status = sqz_context_check_unchanged(context, error);
    struct sqz_context_meta meta = *old;
    meta.squeeze = options->squeeze;
    if (status == SQZ_OK) status = plan_file(&r, &meta, out_path, options, error);
    report.read_seconds = sqz_clock_seconds() - since;
    if (status == SQZ_OK) status = squeeze_and_write(&r, options, n_threads, &report, error);
    reading_free(&r);
    report.total_seconds = sqz_clock_seconds() - since;
    if (user_report) *user_report = report;
    return status;
}
