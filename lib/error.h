/* How lib/, store/ and engine/ report: fill a struct sqz_error and return its status in one expression. */
#ifndef SQZ_LIB_ERROR_H
#define SQZ_LIB_ERROR_H

#include "squeeze.h"

/* error may be NULL. Always returns `status`. */
#if defined(__GNUC__) || defined(__clang__)
__attribute__((format(printf, 3, 4)))
#endif
enum sqz_status
sqz_error_set(struct sqz_error *error, enum sqz_status status, const char *format, ...);

/* Clears to SQZ_OK, "". Returns SQZ_OK. */
enum sqz_status sqz_error_clear(struct sqz_error *error);

#endif
