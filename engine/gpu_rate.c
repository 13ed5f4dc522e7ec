/* gpu_rate.h: copies between two buffers that are larger than any cache, timed from the host. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include "gpu_rate.h"

#include <stdio.h>
#include <string.h>

#include "clock.h"
#include "error.h"
#include "gpu.h"

/* 8 copies take 0.5 ms at 4 TB/s: the host's few microseconds to launch them and to wait are under 2% of that. */
enum { COPY_BYTES = 128 << 20, COPIES = 8, ROUNDS = 3 };

static bool copy(const struct sqz_gpu_calls *calls, char *const buffer[2], size_t n, void *stream)
{
    bool ok = true;
    for (size_t i = 0; i < n && ok; i++)
        ok = calls->copy_runs(buffer[i % 2], COPY_BYTES, buffer[1 - i % 2], COPY_BYTES, COPY_BYTES, 1, stream);
    return ok && calls->wait(stream);
}

/* The fastest round; 0: the card refused. The first copy is not counted. */
static double best_rate(const struct sqz_gpu_calls *calls, char *const buffer[2], void *stream)
{
    double best = 0;
    if (!calls->clear(buffer[1], COPY_BYTES, stream) || !copy(calls, buffer, 1, stream)) return 0;
    for (int i = 0; i < ROUNDS; i++) {
        const double since = sqz_clock_seconds();
        if (!copy(calls, buffer, COPIES, stream)) return 0;
        const double rate = 2.0 * COPIES * COPY_BYTES / (sqz_clock_seconds() - since);
        if (rate > best) best = rate;
    }
    return best;
}

enum sqz_status sqz_gpu_measure_rate(struct sqz_gpu_rate *rate, int card, struct sqz_error *error)
{
    struct sqz_gpu_card info;
    memset(rate, 0, sizeof *rate);
    sqz_error_clear(error);
    if (card >= sqz_gpu_count() || !sqz_gpu_card(card, &info))
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED, "there is no card %d: %s", card, sqz_gpu_reason());
    const struct sqz_gpu_calls *const calls = sqz_gpu_calls_of();
    snprintf(rate->card, sizeof rate->card, "%s", info.name);
    rate->memory_bytes = (double)info.memory_bytes;
    if (!calls->use(card))
        return sqz_error_set(error, SQZ_ERROR_INTERNAL, "card %d cannot be used: %s", card, calls->complaint());
    char *const buffer[2] = {calls->allocate(COPY_BYTES), calls->allocate(COPY_BYTES)};
    void *const stream = calls->create_stream();
    const bool memory = buffer[0] && buffer[1];
    if (memory && stream) rate->copy_bytes_per_second = best_rate(calls, buffer, stream);
    for (size_t i = 0; i < 2; i++)
        if (buffer[i]) calls->release(buffer[i]);
    if (stream) calls->free_stream(stream);
    if (!memory)
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "card %d has no %d MiB left for a copy that is timed", card,
                             2 * (COPY_BYTES >> 20));
    if (rate->copy_bytes_per_second > 0) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_INTERNAL, "card %d took no copy: %s", card, calls->complaint());
}
