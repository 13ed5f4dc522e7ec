/*
 * Where in the context attention went: for every position the weight that it had, exactly, in heads that take turns.
 * Whole numbers, so that sums do not depend on which thread came first.
 */
#ifndef SQZ_LIB_ATTENTION_MAP_H
#define SQZ_LIB_ATTENTION_MAP_H

#include <stdatomic.h>
#include <stdint.h>

/* One KV head in so many is looked at, another each token: a look is another pass over the head's retained keys. Of a
 * token's time that is 0.4% at a budget of 0.1 and 2.0% at 1 (7,360 tokens, the default model, Zen 3). */
enum { SQZ_MAP_TURNS = 16 };

#define SQZ_MAP_UNIT 0x1p-32 /* of a query head's attention */

struct sqz_attention_map {
    atomic_uint_fast64_t n_queries; /* query heads that were looked at */
    atomic_uint_fast64_t mass[];    /* [n_context_tokens] the sum of their weights, in SQZ_MAP_UNITs */
};

#endif
