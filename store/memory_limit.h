/*
 * How much memory a process may count on: the machine's, or less where a
 * control group (a container, a service) sets a limit.
 */
#ifndef SQZ_STORE_MEMORY_LIMIT_H
#define SQZ_STORE_MEMORY_LIMIT_H

#include <stdint.h>

/* Bytes; UINT64_MAX where nothing can be found out. */
uint64_t sqz_memory_limit(void);

#endif
