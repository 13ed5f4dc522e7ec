/* The server as a whole; server.h describes it. */
#define _POSIX_C_SOURCE 200809L
#include "server.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "conversation.h"
#include "core.h"
#include "descriptors.h"
#include "error.h"
#include "http.h"

static enum sqz_status open_all(struct server *s, struct http **http, unsigned *port, struct sqz_error *error)
{
    enum sqz_status status = SQZ_OK;
    if (s->options.key_file) status = keys_read(&s->keys, s->options.key_file, error);
    if (status == SQZ_OK) status = library_open(&s->library, s->options.contexts, s->model, error);
    if (status != SQZ_OK) return status;
    s->library.most_bytes = s->options.disk_bytes;
    status = jobs_open(&s->jobs, &s->library, s->model, s->options.model_on_card, s->options.most_upload_bytes, error);
    if (status != SQZ_OK) return status;
    const struct scheduler_options scheduler = {.model = s->model,
                                                .library = &s->library,
                                                .jobs = s->jobs,
                                                .metrics = &s->metrics,
                                                .n_slots = s->options.n_slots,
                                                .queue_limit = s->options.queue_limit,
                                                .step_seconds = s->options.step_seconds,
                                                .on_card = s->options.model_on_card,
                                                .trouble = s->options.ranks.trouble};
    status = scheduler_start(&s->scheduler, &scheduler, error);
    return status != SQZ_OK ? status : http_start(http, s, port, error);
}

static void count(void *data, const struct entry *entry)
{
    (void)entry;
    ++*(size_t *)data;
}

static const char *trouble_of(const struct server *s)
{
    return s->options.ranks.trouble ? s->options.ranks.trouble() : NULL;
}

static void run_until(const struct server *s, struct http *http, bool (*stop)(void))
{
    const struct timespec pause = {.tv_nsec = 100000000};
    while (!stop() && !trouble_of(s)) {
        nanosleep(&pause, NULL);
        http_tick(http);
    }
}

/* In this order: nobody comes any more, answers end, connections do. */
static void close_all(struct server *s, struct http *http)
{
    if (http) http_quiet(http);
    const char *trouble = trouble_of(s);
    if (s->scheduler) scheduler_stop(s->scheduler, trouble ? 0 : s->options.stop_seconds, trouble);
    http_stop(http);
    scheduler_free(s->scheduler);
    jobs_close(s->jobs);
    library_close(&s->library);
    keys_free(s->keys);
}

enum sqz_status server_run(struct sqz_model *model, const struct server_options *options, bool (*stop)(void),
                           void (*ready)(const char *host, unsigned port, size_t n_contexts), struct sqz_error *error)
{
    struct server *s = calloc(1, sizeof *s);
    struct http *http = NULL;
    unsigned port = 0;
    size_t n_contexts = 0;
    sqz_error_clear(error);
    if (!s) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory");
    s->options = *options;
    s->model = model;
    s->started = time(NULL);
    s->library.folder = -1;
    sqz_model_get_info(model, &s->info);
    s->calls = calls_format(sqz_model_template(model));
    snprintf(s->model_id, sizeof s->model_id, "%s", options->model_name);
    for (char *c = s->model_id; *c; c++)
        if (*c == ':' || *c == '/' || (unsigned char)*c <= ' ' || (unsigned char)*c > '~') *c = '-';
    raise_descriptors(options->most_connections);
    const enum sqz_status status = open_all(s, &http, &port, error);
    if (status == SQZ_OK) {
        library_each(&s->library, count, &n_contexts);
        ready(options->host, port, n_contexts);
        run_until(s, http, stop);
    }
    close_all(s, http);
    const char *trouble = status == SQZ_OK ? trouble_of(s) : NULL;
    free(s);
    return trouble ? sqz_error_set(error, SQZ_ERROR_IO, "%s", trouble) : status;
}
