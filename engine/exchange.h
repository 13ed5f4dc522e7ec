/*
 * Processes that prepare one document together: each computes its blocks of it,
 * and holds the shards that these are. Whoever starts them (console/ranks_*.c, by
 * MPI) says how they send each other something; nothing here knows what carries it.
 */
#ifndef SQZ_ENGINE_EXCHANGE_H
#define SQZ_ENGINE_EXCHANGE_H

#include "squeeze.h"

struct sqz_message {
    void *bytes;
    size_t n_bytes; /* 0: none is sent */
};

/* One of them, number `rank` of n. Every process makes the same calls in the same order. */
struct sqz_exchange {
    uint32_t n, rank;
    void *user_data;
    /* Begins to send out[r] to every other process r, and to receive in[r] from it; the sizes are what the other one says,
     * too. One at a time: finish() comes before the next one, and until then the memory stays as it is. The arrays are
     * not looked at any more. */
    void (*start)(void *user_data, const struct sqz_message *out, const struct sqz_message *in);
    /* Until all of that is done. Errors: what another process stopped with, IO (one is lost). None of these
     * calls may come after an error, and memory of messages under way must stay until the process ends. */
    enum sqz_status (*finish)(void *user_data, struct sqz_error *error);
    /* Has the others' finish() fail with this error, and says which process it is from. Of an error that came from another,
     * and the second time: nothing. */
    void (*stop)(void *user_data, const struct sqz_error *error);
};

/* Those of which this process is one, for whatever is prepared into shards and all at once (sqz_prepare()) from now on;
 * NULL, at first: it is alone. */
void sqz_exchange_use(const struct sqz_exchange *exchange);
const struct sqz_exchange *sqz_exchange_used(void);

/* Behind what each does by itself: OK once every process has come here with OK. One that comes with an error stops the
 * others. exchange NULL: status. */
enum sqz_status sqz_exchange_agree(const struct sqz_exchange *exchange, enum sqz_status status,
                                   struct sqz_error *error);

/* all [n][n_bytes]: what each has, of which this one's is there already. Errors: as finish(). */
enum sqz_status sqz_exchange_gather(const struct sqz_exchange *exchange, void *all, size_t n_bytes,
                                    struct sqz_error *error);

#endif
