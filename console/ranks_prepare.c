/*
 * Documents, each prepared by all ranks: rank 0 has it, its options and the names of
 * its files, the others are told of them; then each makes the same call of engine/.
 */
#define _DEFAULT_SOURCE /* realpath, nanosleep */
#include "many_ranks.h"

#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common.h"
#include "error.h"
#include "ranks_comm.h"
#include "ranks_exchange.h"

/* Behind the head of a CALL; then the model's path, the output's, the source's name, each with its 0, and the text. */
struct document {
    struct sqz_squeeze_options squeeze;
    uint64_t truncate_tokens, reserve_tokens, text_bytes;
    uint32_t n_threads, n_shards, raw, has_name, model_bytes, output_bytes, name_bytes;
    float rope_scale;
    char fingerprint[65];
};

/* How it went at a rank, when all it had of the document is gone. */
struct outcome {
    uint32_t clean; /* no message is under way */
    uint64_t sent_bytes;
};

enum { MOST_TEXT_BYTES = 1 << 30, POLL_NS = 2000000 };
static const double seconds_to_end = 2;

static struct {
    const struct sqz_exchange *exchange;
    struct outcome outcome, *of;        /* [n] in rank 0 */
    MPI_Request *request;               /* [n] */
    bool failed, orderly;               /* the document; and yet every rank has come to its end */
    double token_layers, partial_bytes; /* of all documents that went well */
} job;

/* ---- Rank 0 ------------------------------------------------------------------------------------ */

/* The file may not be there yet, its folder must. */
static char *full_path(const char *path)
{
    char *copy = strdup(path), *again = strdup(path), *full = NULL;
    char *folder = copy ? realpath(dirname(copy), NULL) : NULL;
    if (folder && again) {
        const char *base = basename(again);
        const size_t n = strlen(folder) + strlen(base) + 2;
        full = malloc(n);
        if (full) snprintf(full, n, "%s/%s", folder, base);
    }
    free(folder);
    free(copy);
    free(again);
    return full;
}

void ranks_prepare_begin(const struct sqz_prepare_options *o, const char *model, const char *fingerprint,
                         size_t n_threads, double rope_scale, const char *output, const char *text, size_t n_bytes)
{
    if (ranks.n < 2) return;
    char *model_path = realpath(model, NULL), *output_path = full_path(output);
    const char *name = o->source_name ? o->source_name : "";
    if (!model_path || !output_path) die("%s: not a path that other ranks could use", model_path ? output : model);
    if (n_bytes > MOST_TEXT_BYTES) die("a document of %zu bytes: ranks take at most %d", n_bytes, MOST_TEXT_BYTES);
    struct document d = {
        .squeeze = o->squeeze,
        .truncate_tokens = o->truncate_tokens,
        .reserve_tokens = o->reserve_tokens,
        .text_bytes = n_bytes,
        .n_threads = (uint32_t)n_threads,
        .n_shards = o->n_shards,
        .raw = o->raw,
        .has_name = o->source_name != NULL,
        .model_bytes = (uint32_t)strlen(model_path) + 1,
        .output_bytes = (uint32_t)strlen(output_path) + 1,
        .name_bytes = (uint32_t)strlen(name) + 1,
        .rope_scale = (float)rope_scale,
    };
    snprintf(d.fingerprint, sizeof d.fingerprint, "%s", fingerprint);
    const struct ranks_call call = {.kind = KIND_PREPARE};
    const size_t n = sizeof call + sizeof d + d.model_bytes + d.output_bytes + d.name_bytes + n_bytes;
    char *message = malloc(n), *at = message;
    if (!job.request) job.request = malloc((size_t)ranks.n * sizeof(MPI_Request));
    if (!job.of) job.of = calloc((size_t)ranks.n, sizeof *job.of);
    if (!message || !job.request || !job.of) die("out of memory for a document of %zu bytes", n_bytes);
    memcpy(at, &call, sizeof call);
    memcpy(at += sizeof call, &d, sizeof d);
    memcpy(at += sizeof d, model_path, d.model_bytes);
    memcpy(at += d.model_bytes, output_path, d.output_bytes);
    memcpy(at += d.output_bytes, name, d.name_bytes);
    memcpy(at + d.name_bytes, text, n_bytes);
    job.exchange = ranks_exchange_begin();
    job.failed = true; /* until it is known that it went well */
    job.orderly = false;
    for (int r = 1; r < ranks.n; r++)
        MPI_Isend(message, (int)n, MPI_BYTE, r, TAG_CALL, ranks.work, &job.request[r - 1]);
    if (!ranks_wait(job.request, ranks.n - 1)) die("%s", ranks_lost_text());
    free(message);
    free(model_path);
    free(output_path);
    sqz_exchange_use(job.exchange);
}

/* Until each other rank has come to its end, but one that is lost; what failed is not waited for long. */
static bool await_outcomes(bool failed)
{
    const double since = now_seconds();
    for (int r = 1; r < ranks.n; r++)
        if (r != ranks_lost())
            MPI_Irecv(&job.of[r], sizeof *job.of, MPI_BYTE, r, TAG_OUTCOME, ranks.work, &job.request[r - 1]);
    while (!ranks_are_done(job.request, ranks.n - 1)) {
        if (failed ? now_seconds() - since > seconds_to_end : ranks_lost() >= 0) return false;
        nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    }
    return true;
}

void ranks_prepare_end(enum sqz_status status, const struct sqz_error *error, size_t n_tokens,
                       const struct sqz_model_info *model)
{
    if (ranks.n < 2) return;
    sqz_exchange_use(NULL);
    if (status != SQZ_OK) job.exchange->stop(NULL, error);
    job.orderly = await_outcomes(status != SQZ_OK) && ranks_exchange_end();
    for (int r = 1; r < ranks.n; r++) job.orderly &= job.of[r].clean != 0;
    job.failed = status != SQZ_OK;
    if (job.failed) return;
    job.token_layers += (double)n_tokens * model->n_layer;
    job.partial_bytes = (double)model->n_head * (model->head_dim + 1) * sizeof(float);
}

bool ranks_prepare_is_over(void)
{
    return !job.exchange || !job.failed || job.orderly;
}

json_t *ranks_prepare_json(void)
{
    double waited = 0;
    uint64_t most = ranks_exchange_sent(&waited);
    if (!job.token_layers) return NULL;
    for (int r = 1; r < ranks.n; r++)
        if (job.of[r].sent_bytes > most) most = job.of[r].sent_bytes;
    json_t *root = json_object();
    json_object_set_new(root, "n", json_integer(ranks.n));
    json_object_set_new(root, "bytes_a_token_layer", json_real((double)most / job.token_layers));
    json_object_set_new(root, "partial_output_bytes", json_real(job.partial_bytes));
    json_object_set_new(root, "waited_seconds", json_real(waited));
    return root;
}

/* ---- The others ---------------------------------------------------------------------------------- */

static bool go_on(const struct sqz_progress *progress, void *user_data)
{
    (void)progress;
    (void)user_data;
    return !signal_caught();
}

/* A string of n bytes, its 0 included, out of what is left of the message. */
static const char *take_string(const char **at, size_t n, size_t *left)
{
    const char *text = *at;
    if (n < 1 || n > *left || text[n - 1]) return NULL;
    *at += n;
    *left -= n;
    return text;
}

/* The model of the documents so far, which the next one most likely is of, too. */
static struct opened {
    struct sqz_model *model;
    char *path;
    uint32_t n_threads;
    float rope_scale;
} opened;

static enum sqz_status open_model_here(const struct document *d, const char *path, struct sqz_error *error)
{
    struct sqz_model_options options;
    struct sqz_model_info info;
    if (opened.model && strcmp(opened.path, path) == 0 && opened.n_threads == d->n_threads &&
        opened.rope_scale == d->rope_scale)
        return SQZ_OK;
    sqz_model_free(opened.model);
    free(opened.path);
    opened = (struct opened){.path = strdup(path), .n_threads = d->n_threads, .rope_scale = d->rope_scale};
    if (!opened.path) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a model's path");
    sqz_model_options_default(&options);
    options.n_threads = (int)d->n_threads;
    options.rope_scale = d->rope_scale;
    const enum sqz_status status = sqz_model_open(&opened.model, path, &options, error);
    if (status != SQZ_OK) return status;
    sqz_model_get_info(opened.model, &info);
    if (strcmp(info.fingerprint, d->fingerprint) == 0) return SQZ_OK;
    sqz_model_free(opened.model);
    opened.model = NULL;
    return sqz_error_set(error, SQZ_ERROR_MISMATCH, "%s is another model here than at rank 0", path);
}

static enum sqz_status prepare(const struct document *d, const char *strings, size_t left, struct sqz_error *error)
{
    struct sqz_prepare_options o;
    const char *at = strings, *path = take_string(&at, d->model_bytes, &left);
    const char *output = path ? take_string(&at, d->output_bytes, &left) : NULL;
    const char *name = output ? take_string(&at, d->name_bytes, &left) : NULL;
    if (!name || left != d->text_bytes) return sqz_error_set(error, SQZ_ERROR_INTERNAL, "a document that is cut off");
    sqz_prepare_options_default(&o);
    o.squeeze = d->squeeze;
    o.truncate_tokens = (size_t)d->truncate_tokens;
    o.reserve_tokens = (size_t)d->reserve_tokens;
    o.raw = d->raw;
    o.source_name = d->has_name ? name : NULL;
    o.n_shards = d->n_shards;
    o.progress = go_on;
    const enum sqz_status status = open_model_here(d, path, error);
    return status == SQZ_OK ? sqz_prepare(opened.model, at, left, output, &o, NULL, error) : status;
}

void ranks_prepare_work(const struct ranks_call *call, size_t n_bytes)
{
    struct document d;
    struct sqz_error error;
    double waited;
    MPI_Request request;
    catch_signals();
    job.exchange = ranks_exchange_begin();
    sqz_exchange_use(job.exchange);
    enum sqz_status status = SQZ_ERROR_INTERNAL;
    if (n_bytes < sizeof *call + sizeof d) {
        sqz_error_set(&error, status, "a document that is cut off");
    } else {
        memcpy(&d, call + 1, sizeof d);
        status = prepare(&d, (const char *)(call + 1) + sizeof d, n_bytes - sizeof *call - sizeof d, &error);
    }
    sqz_exchange_use(NULL);
    if (status != SQZ_OK) job.exchange->stop(NULL, &error);
    job.outcome.clean = ranks_exchange_end();
    job.outcome.sent_bytes = ranks_exchange_sent(&waited);
    MPI_Isend(&job.outcome, sizeof job.outcome, MPI_BYTE, 0, TAG_OUTCOME, ranks.work, &request);
    ranks_wait(&request, 1);
}
