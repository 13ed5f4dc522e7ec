/*
 * Contexts of one token, for what is asked without a prepared one: the engine's sessions stand on a context, and the
 * first token of any sequence makes the least of them. Only the scheduler's thread calls.
 */
#ifndef SQZ_SERVER_BLANKS_H
#define SQZ_SERVER_BLANKS_H

#include <stdint.h>

#include "squeeze.h"

struct blank {
    int32_t token;
    struct sqz_context *context;
    unsigned references;
    uint64_t used;
};

struct blanks;

struct blanks *blanks_create(struct sqz_model *model); /* NULL: out of memory */
void blanks_free(struct blanks *blanks);

/* The context that holds this token alone; blanks_release() when done. */
enum sqz_status blanks_get(struct blanks *blanks, int32_t token, struct blank **out, struct sqz_error *error);
void blanks_release(struct blank *blank);

#endif
