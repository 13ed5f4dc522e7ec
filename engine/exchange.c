/* Several processes; exchange.h. */
#include "exchange.h"

#include <stdlib.h>

#include "error.h"

static const struct sqz_exchange *used;

void sqz_exchange_use(const struct sqz_exchange *exchange)
{
    used = exchange;
}

const struct sqz_exchange *sqz_exchange_used(void)
{
    return used;
}

enum sqz_status sqz_exchange_gather(const struct sqz_exchange *exchange, void *all, size_t n_bytes,
                                    struct sqz_error *error)
{
    struct sqz_message *message = calloc(2 * (size_t)exchange->n, sizeof *message);
    struct sqz_message *in = message + exchange->n;
    if (!message) {
        const enum sqz_status status = sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for messages");
        exchange->stop(exchange->user_data, error);
        return status;
    }
    for (uint32_t r = 0; r < exchange->n; r++) {
        message[r] = (struct sqz_message){(char *)all + exchange->rank * n_bytes, n_bytes};
        in[r] = (struct sqz_message){(char *)all + r * n_bytes, n_bytes};
    }
    exchange->start(exchange->user_data, message, in);
    free(message);
    return exchange->finish(exchange->user_data, error);
}

enum sqz_status sqz_exchange_agree(const struct sqz_exchange *exchange, enum sqz_status status, struct sqz_error *error)
{
    if (!exchange) return status;
    char *all = status == SQZ_OK ? calloc(exchange->n, 1) : NULL;
    if (status == SQZ_OK && !all) status = sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for messages");
    if (status != SQZ_OK) {
        exchange->stop(exchange->user_data, error);
        return status;
    }
    status = sqz_exchange_gather(exchange, all, 1, error);
    if (status == SQZ_OK) free(all); /* else it may still be written to */
    return status;
}
