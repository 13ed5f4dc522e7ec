/*
 * Ranks that prepare a document together: struct sqz_exchange by MPI. A rank that
 * cannot go on tells all others why, wherever they wait; one that says nothing any
 * more is noticed as everywhere (ranks_comm.h).
 */
#include "ranks_comm.h"

#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "error.h"
#include "ranks_exchange.h"

/* Why a rank has stopped. */
struct stop {
    uint32_t status;
    char message[1000];
};

static struct {
    MPI_Request *request; /* [3 n]: of messages that come, of those that go, of stops */
    struct stop stop;     /* ours, on its way */
    bool stopped;         /* some rank has */
    uint64_t sent_bytes;
    double waited_seconds;
} trade;

static void start(void *user_data, const struct sqz_message *out, const struct sqz_message *in)
{
    (void)user_data;
    for (int r = 0; r < ranks.n; r++) {
        trade.request[r] = trade.request[ranks.n + r] = MPI_REQUEST_NULL;
        if (r == ranks.rank) continue;
        if (in[r].n_bytes)
            MPI_Irecv(in[r].bytes, (int)in[r].n_bytes, MPI_BYTE, r, TAG_TRADE, ranks.work, &trade.request[r]);
        if (out[r].n_bytes)
            MPI_Isend(out[r].bytes, (int)out[r].n_bytes, MPI_BYTE, r, TAG_TRADE, ranks.work,
                      &trade.request[ranks.n + r]);
        trade.sent_bytes += out[r].n_bytes;
    }
}

/* Whether another rank has stopped. */
static bool hear_stop(struct sqz_error *error)
{
    struct stop stop;
    MPI_Status status;
    int there = 0;
    MPI_Iprobe(MPI_ANY_SOURCE, TAG_STOP, ranks.work, &there, &status);
    if (!there) return false;
    MPI_Recv(&stop, sizeof stop, MPI_BYTE, status.MPI_SOURCE, TAG_STOP, ranks.work, MPI_STATUS_IGNORE);
    stop.message[sizeof stop.message - 1] = '\0';
    sqz_error_set(error, (enum sqz_status)stop.status, "rank %d of %d: %s", status.MPI_SOURCE, ranks.n, stop.message);
    return trade.stopped = true;
}

static enum sqz_status finish(void *user_data, struct sqz_error *error)
{
    const double since = now_seconds();
    enum sqz_status status = SQZ_OK;
    (void)user_data;
    while (!ranks_are_done(trade.request, 2 * ranks.n)) {
        if (hear_stop(error)) status = error->status;
        else if (ranks_lost() >= 0) status = sqz_error_set(error, SQZ_ERROR_IO, "%s", ranks_lost_text());
        if (status != SQZ_OK) break;
        ranks_rest(since);
    }
    trade.waited_seconds += now_seconds() - since;
    return status;
}

static void stop(void *user_data, const struct sqz_error *error)
{
    (void)user_data;
    if (trade.stopped) return;
    trade.stopped = true;
    trade.stop.status = (uint32_t)error->status;
    strncpy(trade.stop.message,
            error->status == SQZ_ERROR_CANCELLED && signal_caught() ? "interrupted" : error->message,
            sizeof trade.stop.message - 1);
    for (int r = 0; r < ranks.n; r++)
        if (r != ranks.rank)
            MPI_Isend(&trade.stop, sizeof trade.stop, MPI_BYTE, r, TAG_STOP, ranks.work,
                      &trade.request[2 * ranks.n + r]);
}

const struct sqz_exchange *ranks_exchange_begin(void)
{
    static struct sqz_exchange exchange = {.start = start, .finish = finish, .stop = stop};
    exchange.n = (uint32_t)ranks.n;
    exchange.rank = (uint32_t)ranks.rank;
    if (!trade.request) trade.request = malloc(3 * (size_t)ranks.n * sizeof(MPI_Request));
    if (!trade.request) die("no room for %d ranks", ranks.n);
    for (int i = 0; i < 3 * ranks.n; i++) trade.request[i] = MPI_REQUEST_NULL;
    return &exchange;
}

bool ranks_exchange_end(void)
{
    bool clean = true;
    for (int i = 0; i < 3 * ranks.n; i++) {
        int done = 1;
        if (trade.request[i] == MPI_REQUEST_NULL) continue;
        if (i < ranks.n) MPI_Cancel(&trade.request[i]);
        MPI_Test(&trade.request[i], &done, MPI_STATUS_IGNORE);
        clean &= done;
    }
    return clean;
}

uint64_t ranks_exchange_sent(double *waited_seconds)
{
    *waited_seconds = trade.waited_seconds;
    return trade.sent_bytes;
}
