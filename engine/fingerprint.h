/* A file's fingerprint: what ties a context to its model. */
#ifndef SQZ_ENGINE_FINGERPRINT_H
#define SQZ_ENGINE_FINGERPRINT_H

#include "squeeze.h"

/* 32 hex digits and a zero into out. XXH3-128 of the whole file up to 512 MiB; of larger files the size, the first
 * 16 MiB (all of the metadata) and 256 samples of 1 MiB at even distances up to the end. path: for messages. */
enum sqz_status sqz_file_fingerprint(char out[65], int descriptor, const char *path, struct sqz_error *error);

/* The same of bytes in memory, all of them. */
void sqz_fingerprint_bytes(char out[65], const void *bytes, size_t n_bytes);

#endif
