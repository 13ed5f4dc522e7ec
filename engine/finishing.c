/* Rows to a context's file; finishing.h. */
#define _GNU_SOURCE /* clock_gettime */
#include "finishing.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "clock.h"
#include "error.h"
#include "floor.h"

struct build_link {
    const struct sqz_prepare_options *options;
    const char *phase;
    double since;
};

static bool build_progress(void *user_data, size_t done, size_t total)
{
    const struct build_link *b = user_data;
    return sqz_report_progress(b->options, b->phase, (double)done, (double)total, "heads", b->since);
}

enum sqz_status sqz_finishing_plan(struct sqz_finishing *f, const struct sqz_context_meta *meta, const char *out_path,
                                   struct sqz_error *error)
{
    struct sqz_reading *r = f->reading;
    if (r->exchange && r->model && r->model->on_card)
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                             "several processes prepare shards by models on the CPU; --gpu-layers 0");
    if (r->held.deal.count)
        return sqz_shards_writing_begin(&f->shards, r->inputs, meta, &r->held, r->exchange, out_path, error);
    f->layers = calloc(r->n_layer, sizeof *f->layers);
    if (!f->layers) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for %u layers", r->n_layer);
    for (uint32_t l = 0; l < r->n_layer; l++)
        r->inputs[l].stays_dense = !sqz_clusters_pay(r->inputs[l].n_rows, &f->options->squeeze);
    enum sqz_status status = sqz_layers_plan(f->layers, r->inputs, r->n_layer, &f->options->squeeze, error);
    if (status != SQZ_OK) return status;
    status = sqz_context_writer_open(&f->writer, out_path, meta, f->layers, error);
    return status == SQZ_OK ? sqz_reserving_begin(&f->reserving, f->writer, error) : status;
}

enum sqz_status sqz_finishing_look(void *finishing, struct sqz_error *error)
{
    return sqz_reserving_look(((struct sqz_finishing *)finishing)->reserving, error);
}

void sqz_finishing_free(struct sqz_finishing *f)
{
    sqz_reserving_end(f->reserving, NULL);
    sqz_early_rows_end(f->building.early, true, NULL);
    sqz_building_free(&f->building);
    sqz_context_writer_abort(f->writer);
    sqz_shards_writing_free(f->shards);
    for (uint32_t l = 0; f->layers && l < f->reading->n_layer; l++) sqz_layer_release(&f->layers[l]);
    free(f->layers);
    memset(f, 0, sizeof *f);
}

/* ---- Writing --------------------------------------------------------------------------------- */

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
static enum sqz_status commit(struct sqz_finishing *f, uint64_t *file_bytes, double since, struct sqz_error *error)
{
    const struct sqz_prepare_options *o = f->options;
    const uint32_t n_layer = f->reading->n_layer;
    struct commit c = {.writer = f->writer, .file_bytes = file_bytes, .error = error};
    pthread_t thread;
    const bool apart = o->progress && pthread_create(&thread, NULL, commit_apart, &c) == 0;
    f->writer = NULL;
    if (!apart) commit_apart(&c);
    while (!atomic_load(&c.done)) {
        sqz_report_progress(o, "write", n_layer, n_layer, "layers", since);
        nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    }
    if (apart) pthread_join(thread, NULL);
    return c.status;
}

/* Until the rows of layers that were built elsewhere are written: tells of it now and then, stops when cancelled. */
static enum sqz_status finish_rows(const struct sqz_finishing *f, struct sqz_early_rows *early, double since,
                                   struct sqz_error *error)
{
    bool finished = false, go_on = true;
    while (!finished && go_on) {
        const uint32_t n = sqz_early_rows_done(early, &finished);
        go_on = sqz_report_progress(f->options, "write", n, f->reading->n_layer, "layers", since);
        if (!finished) nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    }
    const enum sqz_status status = sqz_early_rows_end(early, !go_on, error);
    return status == SQZ_OK && !go_on ? sqz_error_set(error, SQZ_ERROR_CANCELLED, "cancelled") : status;
}

static enum sqz_status write_layers(struct sqz_finishing *f, struct sqz_prepare_report *report, struct sqz_error *error)
{
    const double since = sqz_clock_seconds();
    const uint32_t n_layer = f->reading->n_layer;
    struct sqz_early_rows *early = f->building.early;
    enum sqz_status status = SQZ_OK;
    f->building.early = NULL;
    if (early) status = finish_rows(f, early, since, error);
    for (uint32_t l = 0; l < n_layer && status == SQZ_OK; l++) {
        struct sqz_layer layer;
        status = sqz_building_layer(&f->building, l, &layer, error);
        if (status == SQZ_OK) status = sqz_context_writer_put_layer(f->writer, l, &layer, error);
        if (status == SQZ_OK &&
            !sqz_report_progress(f->options, "write", early ? n_layer : l + 1, n_layer, "layers", since))
            status = sqz_error_set(error, SQZ_ERROR_CANCELLED, "cancelled");
    }
    if (status == SQZ_OK && f->source) status = sqz_context_check_unchanged(f->source, error);
    if (status == SQZ_OK) status = commit(f, &report->file_bytes, since, error);
    report->write_seconds = sqz_clock_seconds() - since;
    return status;
}

/* Layers may be built from now on, and where a place builds them their rows go to the file. */
static enum sqz_status begin_building(struct sqz_finishing *f, int n_threads, struct sqz_error *error)
{
    struct sqz_reading *r = f->reading;
    struct sqz_backend *backend = r->model ? r->model->backend : NULL;
    const enum sqz_status status = sqz_reserving_end(f->reserving, error);
    f->reserving = NULL;
    if (status != SQZ_OK) return status;
    f->building = (struct sqz_building){.backend = backend,
                                        .layers = f->layers,
                                        .inputs = r->inputs,
                                        .n_layer = r->n_layer,
                                        .options = &f->options->squeeze,
                                        .n_threads = n_threads};
    sqz_context_writer_set_threads(f->writer, n_threads);
    if (!backend || !backend->ops->builder) return SQZ_OK;
    return sqz_early_rows_begin(&f->building.early, backend, f->writer, f->layers, r->inputs, r->n_layer, error);
}

enum sqz_status sqz_finishing_band(void *finishing, uint32_t end, struct sqz_error *error)
{
    struct sqz_finishing *f = finishing;
    const double since = sqz_clock_seconds();
    enum sqz_status status = f->building.layers ? SQZ_OK : begin_building(f, f->reading->model->info.n_threads, error);
    if (status == SQZ_OK) status = sqz_building_place(&f->building, end, error);
    f->building_seconds += sqz_clock_seconds() - since;
    return status;
}

/* ---- In shards --------------------------------------------------------------------------------- */

/* Rows that a card read: clustered there, if it can, and where they are dealt out. */
static enum sqz_status bring_shards(struct sqz_finishing *f, struct build_link *link, struct sqz_prepare_report *report,
                                    struct sqz_error *error)
{
    struct sqz_backend *backend = f->reading->model ? f->reading->model->backend : NULL;
    uint32_t n_built = 0;
    if (!backend || !backend->ops->builder) return sqz_shards_deal(f->shards, error);
    const enum sqz_status status = sqz_shards_build(f->shards, backend, &n_built, build_progress, link, error);
    if (status == SQZ_OK && backend->ops->end_reading) backend->ops->end_reading(backend);
    for (uint32_t l = 0; l < f->reading->n_layer; l++)
        report->n_card_layers += f->reading->model->layers[l].card != SQZ_ON_HOST;
    report->n_host_layers = report->n_card_layers > n_built ? report->n_card_layers - n_built : 0;
    return status;
}

/* The same of a context in shards, which are calibrated on the host. */
static enum sqz_status write_shards(struct sqz_finishing *f, int n_threads, struct sqz_prepare_report *report,
                                    struct sqz_error *error)
{
    struct sqz_reading *r = f->reading;
    const struct sqz_prepare_options *o = f->options;
    struct build_link link = {o, "cluster", sqz_clock_seconds()};
    enum sqz_status status = r->into_shards ? SQZ_OK : bring_shards(f, &link, report, error);
    if (status == SQZ_OK) status = sqz_shards_cluster(f->shards, n_threads, build_progress, &link, error);
    report->cluster_seconds = sqz_clock_seconds() - link.since;
    link = (struct build_link){o, "calibrate", sqz_clock_seconds()};
    if (status == SQZ_OK) status = sqz_shards_calibrate_all(f->shards, n_threads, build_progress, &link, error);
    report->calibrate_seconds = sqz_clock_seconds() - link.since;
    link = (struct build_link){o, "write", sqz_clock_seconds()};
    if (status == SQZ_OK && f->source) status = sqz_context_check_unchanged(f->source, error);
    if (status == SQZ_OK) status = sqz_shards_write(f->shards, build_progress, &link, &report->file_bytes, error);
    report->write_seconds = sqz_clock_seconds() - link.since;
    if (status == SQZ_OK) report->budget_floor = sqz_shards_budget_floor(f->shards);
    return status;
}

/* ---- Everything -------------------------------------------------------------------------------- */

enum sqz_status sqz_finishing_write(struct sqz_finishing *f, int n_threads, struct sqz_prepare_report *report,
                                    struct sqz_error *error)
{
    struct sqz_reading *r = f->reading;
    const struct sqz_prepare_options *o = f->options;
    if (f->shards) return write_shards(f, n_threads, report, error);
    struct build_link link = {o, "cluster", sqz_clock_seconds()};
    struct sqz_building *building = &f->building;
    enum sqz_status status = building->layers ? SQZ_OK : begin_building(f, n_threads, error);
    building->progress = build_progress;
    building->user_data = &link;
    if (status == SQZ_OK) status = sqz_building_cluster(building, error);
    report->cluster_seconds = sqz_clock_seconds() - link.since + f->building_seconds;
    link = (struct build_link){o, "calibrate", sqz_clock_seconds()};
    if (status == SQZ_OK) status = sqz_building_calibrate(building, error);
    report->calibrate_seconds = sqz_clock_seconds() - link.since;
    if (status == SQZ_OK) status = write_layers(f, report, error);
    if (status == SQZ_OK) report->budget_floor = sqz_budget_floor(f->layers, r->n_layer);
    for (uint32_t l = 0; r->model && r->model->on_card && l < r->n_layer; l++) {
        const bool is_there = f->layers[l].n_levels && r->model->layers[l].card != SQZ_ON_HOST;
        report->n_card_layers += is_there;
        report->n_host_layers += is_there && !r->inputs[l].elsewhere;
    }
    return status;
}
