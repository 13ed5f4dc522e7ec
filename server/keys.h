/* API keys: a line each of a file. */
#ifndef SQZ_SERVER_KEYS_H
#define SQZ_SERVER_KEYS_H

#include <stddef.h>

#include "squeeze.h"

struct keys;

/* Errors: IO, ARGUMENT (no key, a short one, or a file that others may read). */
enum sqz_status keys_read(struct keys **out, const char *path, struct sqz_error *error);
void keys_free(struct keys *keys);

/* The number of a key, or -1. Takes as long for every key of that length. */
int keys_find(const struct keys *keys, const char *key);

#endif
