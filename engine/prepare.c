/*
 * Prepare: run the model over a document chunk by chunk with our dense
 * attention, cluster and calibrate every layer, write the context file.
 */
#define _GNU_SOURCE /* madvise */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "clock.h"
#include "context_file.h"
#include "error.h"
#include "finishing.h"
#include "floor.h"
#include "folder_mark.h"
#include "preparing.h"
#include "reading.h"
#include "session.h"
#include "text.h"

/* A document that leaves less room than this cannot be asked anything. */
enum { MIN_LEFT_TOKENS = 32 };

void sqz_prepare_options_default(struct sqz_prepare_options *options)
{
    memset(options, 0, sizeof *options);
    options->size = sizeof *options;
    sqz_squeeze_options_default(&options->squeeze, SQZ_RULE_DEFAULT);
    options->reserve_tokens = 256;
}

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
    struct sqz_reading reading;
    struct sqz_finishing finishing;
    struct sqz_prepare_options options;
    struct sqz_rope rope;
    struct sqz_prepare_report report;
    struct sqz_reading_link link;
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
    struct sqz_reading *r = &p->reading;
    p->finishing = (struct sqz_finishing){.reading = r, .options = o};
    sqz_reading_share_out(r, n_tokens, o->n_shards, sqz_exchange_used());
    enum sqz_status status = sqz_reading_plan(r, model, n_tokens, o, error);
    if (status == SQZ_OK) status = sqz_finishing_plan(&p->finishing, &meta, out_path, error);
    if (status == SQZ_OK && r->held.deal.count && !model->on_card) /* a card reads the text as one */
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
    p->link = (struct sqz_reading_link){&p->options, 0, (double)n_tokens, sqz_clock_seconds()};
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
    struct sqz_reading *r = &p->reading;
    sqz_error_clear(error);
    if (p->n_read == r->n_tokens) return SQZ_OK;
    enum sqz_status status = sqz_model_make_ready(r->model, p->rope, 1, error);
    if (n_tokens > r->model->n_batch_tokens) n_tokens = r->model->n_batch_tokens;
    if (r->into_shards && n_tokens > SQZ_SHARD_BLOCK_TOKENS - p->n_read % SQZ_SHARD_BLOCK_TOKENS)
        n_tokens = SQZ_SHARD_BLOCK_TOKENS - p->n_read % SQZ_SHARD_BLOCK_TOKENS;
    if (status == SQZ_OK) status = sqz_reading_batch(r, p->tokens, p->n_read, n_tokens, NULL, &p->link, error);
    if (status == SQZ_OK) status = sqz_finishing_look(&p->finishing, error);
    if (status != SQZ_OK) return status;
    p->n_read = (size_t)p->link.done;
    return p->n_read == r->n_tokens ? sqz_reading_end_layers(r, 0, r->n_layer, error) : SQZ_OK;
}

/* Whether what a session has read can be taken over as it lies. */
static bool can_follow(const struct sqz_preparing *p, const struct sqz_session *s)
{
    const struct sqz_reading *r = &p->reading;
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
    struct sqz_reading *r = &p->reading;
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
    p->report.read_seconds = sqz_clock_seconds() - p->link.since - p->finishing.building_seconds;
    if (backend->ops->reading_fallback)
        snprintf(p->report.fallback, sizeof p->report.fallback, "%s", backend->ops->reading_fallback(backend));
    const enum sqz_status status = sqz_finishing_write(&p->finishing, n_threads, &p->report, error);
    p->report.total_seconds = sqz_clock_seconds() - p->link.since;
    if (report) *report = p->report;
    return status;
}

void sqz_preparing_free(struct sqz_preparing *p)
{
    if (!p) return;
    sqz_finishing_free(&p->finishing);
    sqz_reading_free(&p->reading);
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

/* Every process of the exchange writes its shards into the folder of the path: into the same one, or the context would be in
 * pieces, and an old one under that name, too. */
static enum sqz_status check_folder(const struct sqz_exchange *e, const char *path, struct sqz_error *error)
{
    enum { NAME = SQZ_UNFINISHED_NAME_BYTES };
    struct sqz_folder_mark mark = {.directory = -1};
    char *all = calloc(e->n, NAME);
    enum sqz_status status =
        all ? SQZ_OK : sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for %u processes", e->n);
    if (status == SQZ_OK && e->rank == 0) {
        status = sqz_folder_mark_make(&mark, path, error);
        if (status == SQZ_OK) memcpy(all, mark.name, NAME);
    }
    status = sqz_exchange_agree(e, status, error);
    if (status == SQZ_OK) {
        status = sqz_exchange_gather(e, all, NAME, error);
        if (status != SQZ_OK) all = NULL; /* it may still be written to */
    }
    if (status == SQZ_OK) {
        all[NAME - 1] = '\0';
        if (e->rank > 0 && !sqz_folder_mark_is_seen(path, all))
            status = sqz_error_set(error, SQZ_ERROR_IO,
                                   "%s: its folder is another one here than at rank 0; all write into one, which every "
                                   "host must see",
                                   path);
        status = sqz_exchange_agree(e, status, error);
    }
    sqz_folder_mark_remove(&mark);
    free(all);
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
    if (status == SQZ_OK && exchange) status = check_folder(exchange, out_path, error);
    const struct sqz_band_taker taker = {sqz_finishing_look, sqz_finishing_band, &p->finishing};
    if (status == SQZ_OK && p->reading.into_shards)
        status = sqz_exchange_agree(exchange, sqz_reading_turns(&p->reading, p->tokens, &p->link, error), error);
    else if (status == SQZ_OK) status = sqz_reading_all(&p->reading, p->tokens, &taker, &p->link, error);
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
    struct sqz_reading r = {0};
    struct sqz_finishing f = {.reading = &r, .source = context};
    sqz_error_clear(error);
    enum sqz_status status = take_options(&options, &defaults, error);
    if (status != SQZ_OK) return status;
    if (sqz_context_n_shards(context))
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                             "a context in shards cannot be squeezed anew; prepare the document again");
    status = sqz_choose_threads(&n_threads, error);
    if (status != SQZ_OK) return status;
    f.options = options;
    sqz_reading_share_out(&r, old->n_tokens, options->n_shards, NULL);
    status = sqz_reading_begin(&r, old->n_layer, error);
    for (uint32_t l = 0; l < old->n_layer && status == SQZ_OK; l++) {
        const struct sqz_layer *layer = sqz_context_layer(context, l);
        r.inputs[l].shape = layer->shape;
        r.inputs[l].window_tokens = layer->sliding_window ? layer->n_window_tokens : 0;
    }
    if (status == SQZ_OK) status = sqz_reading_allocate(&r, old->n_tokens, 0, error);
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
    if (status == SQZ_OK) status = sqz_finishing_plan(&f, &meta, out_path, error);
    report.read_seconds = sqz_clock_seconds() - since;
    if (status == SQZ_OK) status = sqz_finishing_write(&f, n_threads, &report, error);
    sqz_finishing_free(&f);
    sqz_reading_free(&r);
    report.total_seconds = sqz_clock_seconds() - since;
    if (user_report) *user_report = report;
    return status;
}
