/* Counters that any thread adds to, as Prometheus reads them. */
#ifndef SQZ_SERVER_METRICS_H
#define SQZ_SERVER_METRICS_H

#include <stdatomic.h>
#include <stdint.h>

#include "bytes.h"

enum metric {
    METRIC_REQUESTS,
    METRIC_REFUSED,
    METRIC_FAILED,
    METRIC_GONE,
    METRIC_PROMPT_TOKENS,
    METRIC_CACHED_TOKENS,
    METRIC_ANSWER_TOKENS,
    METRIC_DOCUMENT_TOKENS,
    METRIC_STEPS,
    METRIC_STEP_MICROSECONDS,
    METRIC_KEY_BYTES_READ,
    METRIC_KEY_BYTES_ALL,
    METRIC_COUNTERS, /* from here on: what is now */
    METRIC_ANSWERING = METRIC_COUNTERS,
    METRIC_WAITING,
    METRIC_CONNECTIONS,
    METRIC_LONGEST_STEP_MICROSECONDS,
    N_METRICS
};

struct metrics {
    atomic_uint_fast64_t value[N_METRICS];
};

static inline void metrics_add(struct metrics *m, enum metric which, uint64_t n)
{
    atomic_fetch_add_explicit(&m->value[which], n, memory_order_relaxed);
}
static inline void metrics_set(struct metrics *m, enum metric which, uint64_t n)
{
    atomic_store_explicit(&m->value[which], n, memory_order_relaxed);
}

/* Of a server that is several processes: how many there are, live, and were started again. */
struct metrics_ranks {
    unsigned n, n_alive, restarts;
};
void metrics_ranks_text(const struct metrics_ranks *ranks, struct bytes *text);

void metrics_text(struct metrics *metrics, struct bytes *text);

#endif
