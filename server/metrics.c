/* Counters as text; metrics.h describes them. */
#include "metrics.h"

#include <inttypes.h>

static const struct {
    const char *name, *help;
} table[N_METRICS] = {
    [METRIC_REQUESTS] = {"requests_total", "Requests for answers that were taken."},
    [METRIC_REFUSED] = {"requests_refused_total", "Requests refused because the queue was full."},
    [METRIC_FAILED] = {"requests_failed_total", "Requests that failed while they were answered."},
    [METRIC_GONE] = {"requests_abandoned_total", "Requests whose client left before the end."},
    [METRIC_PROMPT_TOKENS] = {"prompt_tokens_total", "Tokens of questions that were read."},
    [METRIC_CACHED_TOKENS] = {"cached_tokens_total", "Tokens of prepared contexts that were not read again."},
    [METRIC_ANSWER_TOKENS] = {"answer_tokens_total", "Tokens of answers."},
    [METRIC_DOCUMENT_TOKENS] = {"document_tokens_total",
                                "Tokens of documents that jobs read, beside those that answers read for them."},
    [METRIC_STEPS] = {"steps_total", "Passes through the model."},
    [METRIC_STEP_MICROSECONDS] = {"step_microseconds_total", "Time of the passes."},
    [METRIC_KEY_BYTES_READ] = {"context_bytes_read_total", "Bytes of contexts that answers read."},
    [METRIC_KEY_BYTES_ALL] = {"context_bytes_total", "Bytes that exact attention would have read."},
    [METRIC_ANSWERING] = {"answers_active", "Answers in work."},
    [METRIC_WAITING] = {"requests_waiting", "Requests that wait for a place."},
    [METRIC_CONNECTIONS] = {"connections", "Open connections."},
    [METRIC_LONGEST_STEP_MICROSECONDS] = {"longest_step_microseconds", "The longest pass so far."},
};

void metrics_text(struct metrics *metrics, struct bytes *text)
{
    for (int i = 0; i < N_METRICS; i++)
        bytes_print(text, "# HELP squeeze_%s %s\n# TYPE squeeze_%s %s\nsqueeze_%s %" PRIuFAST64 "\n", table[i].name,
                    table[i].help, table[i].name, i < METRIC_COUNTERS ? "counter" : "gauge", table[i].name,
                    atomic_load_explicit(&metrics->value[i], memory_order_relaxed));
}

void metrics_ranks_text(const struct metrics_ranks *r, struct bytes *text)
{
    const struct {
        const char *name, *kind, *help;
        unsigned value;
    } rows[] = {
        {"ranks", "gauge", "Processes that answer together.", r->n},
        {"ranks_alive", "gauge", "Of these, those that live.", r->n_alive},
        {"degraded", "gauge", "1 while ranks are lost and there are no answers.", r->n_alive < r->n},
        {"ranks_restarts_total", "counter", "Times that the ranks were started again.", r->restarts},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        bytes_print(text, "# HELP squeeze_%s %s\n# TYPE squeeze_%s %s\nsqueeze_%s %u\n", rows[i].name, rows[i].help,
                    rows[i].name, rows[i].kind, rows[i].name, rows[i].value);
}
