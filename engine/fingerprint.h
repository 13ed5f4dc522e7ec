/* A file's fingerprint: what ties a context to its model. */
#ifndef SQZ_ENGINE_FINGERPRINT_H
#define SQZ_ENGINE_FINGERPRINT_H

#include "squeeze.h"

/* 32 hex digits and a zero into out. XXH3-128 of the whole file up to 512 MiB; of larger files the size, the first
 * 16 MiB (all of the metadata) and 256 samples of 1 MiB at even distances up to the end. */
enum sqz_status sqz_file_fingerprint(char out[65], const char *path, struct sqz_error *error);

#endif
