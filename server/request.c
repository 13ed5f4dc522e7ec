/* A request at work; request.h describes it. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include "request.h"

#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "scheduler.h"

struct request *request_create(struct ask *ask, struct stream *stream, const struct writer *writer, unsigned user,
                               double seconds)
{
    struct request *r = calloc(1, sizeof *r);
    const unsigned n = ask->n_prompts * ask->n_each;
    if (r) r->choices = calloc(n, sizeof *r->choices);
    if (!r || !r->choices) {
        free(r);
        return NULL;
    }
    r->ask = *ask;
    memset(ask, 0, sizeof *ask);
    r->ask.sampling.grammar = r->ask.grammar;
    r->ask.sampling.biases = r->ask.biases;
    r->stream = stream;
    stream_retain(stream);
    r->writer = writer;
    r->n_choices = r->n_left = n;
    r->user = user;
    r->arrived = sqz_clock_seconds();
    r->deadline = r->arrived + seconds;
    for (unsigned i = 0; i < n; i++) {
        r->choices[i] = (struct choice){.request = r, .index = i};
        spoken_begin(&r->choices[i].spoken);
    }
    return r;
}

void request_free(struct request *r, struct library *library)
{
    if (!r) return;
    for (unsigned i = 0; i < r->n_choices; i++) {
        spoken_free(&r->choices[i].spoken);
        free(r->choices[i].said);
        free(r->choices[i].passages);
    }
    ask_free(&r->ask, library);
    stream_release(r->stream);
    free(r->choices);
    free(r);
}

struct usage request_usage(const struct request *r)
{
    struct usage usage = {.read_map = r->ask.read_map, .exact = r->ask.exact != ASK_EXACT_NO};
    unsigned n_squeezed = 0;
    for (unsigned i = 0; i < r->ask.n_prompts; i++) {
        usage.prompt += r->ask.prompts[i].n_prefix + r->ask.prompts[i].n_tokens;
        usage.cached += r->ask.prompts[i].n_prefix;
    }
    for (unsigned i = 0; i < r->n_choices; i++) {
        const struct choice *c = &r->choices[i];
        usage.completion += c->n_tokens;
        if (!r->ask.prompts[i / r->ask.n_each].context) continue;
        usage.share += c->share;
        usage.missed += c->missed;
        usage.drafted += c->drafted;
        usage.accepted += c->accepted;
        if (n_squeezed++ == 0) {
            usage.exact_to = c->exact == SQZ_EXACT_F16 ? "f16" : c->exact == SQZ_EXACT_INT8 ? "int8" : NULL;
            usage.passages = c->passages;
            usage.n_passages = c->n_passages;
        }
    }
    usage.squeezed = n_squeezed != 0;
    if (n_squeezed) {
        usage.share /= n_squeezed;
        usage.missed /= n_squeezed;
    }
    return usage;
}
