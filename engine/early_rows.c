/* Rows to the file while layers are built; early_rows.h. */
#include "early_rows.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

struct sqz_early_rows {
    struct sqz_backend *backend;
    struct sqz_context_writer *writer;
    struct sqz_layer *layers; /* copies of the structs: calibration goes on with the others */
    const struct sqz_layer_input *inputs;
    uint32_t n_layer;

    pthread_t thread;
    bool threaded;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint32_t n_built, n_done; /* under the lock, as what follows */
    bool stop, finished;
    enum sqz_status status;
    struct sqz_error error;
};

/* How many are built, once that is more than l; 0: nothing more is wanted. */
static uint32_t wait_for(struct sqz_early_rows *e, uint32_t l)
{
    pthread_mutex_lock(&e->lock);
    while (e->n_built <= l && !e->stop) pthread_cond_wait(&e->changed, &e->lock);
    const uint32_t n = e->stop ? 0 : e->n_built;
    pthread_mutex_unlock(&e->lock);
    return n;
}

static enum sqz_status write_rows(struct sqz_early_rows *e, uint32_t l, uint32_t n_built)
{
    struct sqz_layer host;
    uint32_t next = l + 1;
    if (!e->inputs[l].elsewhere) return SQZ_OK;
    while (next < n_built && !e->inputs[next].elsewhere) next++;
    const enum sqz_status status = e->backend->ops->builder->fetch_rows(
        e->backend, l, e->layers, next < n_built ? next : UINT32_MAX, &host, &e->error);
    return status == SQZ_OK ? sqz_context_writer_put_rows(e->writer, l, &host, &e->error) : status;
}

static void *write_all(void *early)
{
    struct sqz_early_rows *e = early;
    enum sqz_status status = SQZ_OK;
    for (uint32_t l = 0; l < e->n_layer && status == SQZ_OK; l++) {
        const uint32_t n_built = wait_for(e, l);
        if (n_built == 0) break;
        status = write_rows(e, l, n_built);
        pthread_mutex_lock(&e->lock);
        e->n_done = l + 1;
        pthread_mutex_unlock(&e->lock);
    }
    pthread_mutex_lock(&e->lock);
    e->status = status;
    e->finished = true;
    pthread_mutex_unlock(&e->lock);
    return NULL;
}

enum sqz_status sqz_early_rows_begin(struct sqz_early_rows **out, struct sqz_backend *backend,
                                     struct sqz_context_writer *writer, const struct sqz_layer *layers,
                                     const struct sqz_layer_input *inputs, uint32_t n_layer, struct sqz_error *error)
{
    struct sqz_early_rows *e = calloc(1, sizeof *e);
    struct sqz_layer *copies = malloc(n_layer * sizeof *copies);
    *out = NULL;
    if (!e || !copies) {
        free(e);
        free(copies);
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for %u layers that are written", n_layer);
    }
    memcpy(copies, layers, n_layer * sizeof *copies);
    *out = e;
    e->backend = backend;
    e->writer = writer;
    e->layers = copies;
    e->inputs = inputs;
    e->n_layer = n_layer;
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->changed, NULL);
    e->threaded = pthread_create(&e->thread, NULL, write_all, e) == 0; /* else it is all done at the end */
    return SQZ_OK;
}

void sqz_early_rows_built(struct sqz_early_rows *e, uint32_t l)
{
    pthread_mutex_lock(&e->lock);
    e->n_built = l + 1;
    pthread_cond_signal(&e->changed);
    pthread_mutex_unlock(&e->lock);
}

uint32_t sqz_early_rows_done(struct sqz_early_rows *e, bool *finished)
{
    pthread_mutex_lock(&e->lock);
    const uint32_t n = e->n_done;
    *finished = e->finished || !e->threaded;
    pthread_mutex_unlock(&e->lock);
    return n;
}

enum sqz_status sqz_early_rows_end(struct sqz_early_rows *e, bool stop, struct sqz_error *error)
{
    if (!e) return SQZ_OK;
    pthread_mutex_lock(&e->lock);
    e->stop = stop;
    pthread_cond_signal(&e->changed);
    pthread_mutex_unlock(&e->lock);
    if (e->threaded) pthread_join(e->thread, NULL);
    else if (!stop) write_all(e);
    const enum sqz_status status = e->status;
    if (status != SQZ_OK && error) *error = e->error;
    pthread_cond_destroy(&e->changed);
    pthread_mutex_destroy(&e->lock);
    free(e->layers);
    free(e);
    return status;
}
