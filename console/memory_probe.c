/* Reading memory, for its rate; memory_probe.h. */
#include "memory_probe.h"

#include <stdint.h>

#include "common.h"

enum { PROBE_BYTES = 256 << 20 };

bool memory_probe_open(struct memory_probe *probe, int n_threads)
{
    probe->n_threads = n_threads;
    if (!pages_take(&probe->pages, PROBE_BYTES, true)) return false;
    uint64_t *words = (uint64_t *)(void *)probe->pages.data;
    /* The thread that will read a page touches it first: it then belongs to its memory node. */
#pragma omp parallel for schedule(static) num_threads(n_threads)
    for (size_t i = 0; i < PROBE_BYTES / sizeof *words; i++) words[i] = i;
    return true;
}

void memory_probe_close(struct memory_probe *probe)
{
    pages_give_back(&probe->pages);
}

double memory_probe_read_some(struct memory_probe *probe, size_t n_bytes)
{
    const uint64_t *words = (const uint64_t *)(const void *)probe->pages.data;
    const size_t n = (n_bytes < PROBE_BYTES ? n_bytes : PROBE_BYTES) / sizeof *words / 8 * 8;
    const size_t first = probe->at + n <= PROBE_BYTES / sizeof *words ? probe->at : 0;
    volatile uint64_t sink;
    uint64_t sum = 0;
    double since = now_seconds();
#pragma omp parallel for schedule(static) reduction(+ : sum) num_threads(probe->n_threads)
    for (size_t i = first; i < first + n; i += 8) {
        sum += words[i] + words[i + 1] + words[i + 2] + words[i + 3] + words[i + 4] + words[i + 5] + words[i + 6] +
               words[i + 7];
    }
    double seconds = now_seconds() - since;
    sink = sum;
    (void)sink;
    probe->at = first + n;
    return seconds;
}

double memory_probe_read(const struct memory_probe *probe)
{
    struct memory_probe all = {.pages = probe->pages, .n_threads = probe->n_threads};
    const double seconds = memory_probe_read_some(&all, PROBE_BYTES);
    return seconds > 0.0 ? PROBE_BYTES / seconds : 0.0;
}
