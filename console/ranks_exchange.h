/* Ranks that prepare a document together; docs/ranks.md. */
#ifndef SQZ_CONSOLE_RANKS_EXCHANGE_H
#define SQZ_CONSOLE_RANKS_EXCHANGE_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "exchange.h"

/* Beside those of ranks_comm.h: between any two ranks, and to rank 0. */
enum { TAG_TRADE = 101, TAG_STOP, TAG_OUTCOME };
/* A CALL behind whose head is what ranks_prepare.c says. */
enum { KIND_PREPARE = 101 };

/* This rank's side of what engine/ asks for, from now on; for each document, as long as none has failed. A signal does not
 * end a wait: the others come to it, or are lost, and once files get their names nothing may stop between. */
const struct sqz_exchange *ranks_exchange_begin(void);

/* When nothing is expected any more: whether no message is under way, as behind a document that went well. */
bool ranks_exchange_end(void);

/* Bytes that this rank has sent, and how long it waited for messages. */
uint64_t ranks_exchange_sent(double *waited_seconds);

/* In a rank behind the first, a CALL of KIND_PREPARE: prepares the document with the others. */
struct ranks_call;
void ranks_prepare_work(const struct ranks_call *call, size_t n_bytes);
/* In rank 0: false when a document was not prepared, and some rank is not done with it. */
bool ranks_prepare_is_over(void);
/* What a rank has sent for a token and layer of a document; NULL: none was prepared. */
json_t *ranks_prepare_json(void);

#endif
