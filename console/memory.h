/* Memory that a program cannot do without. */
#ifndef SQZ_CONSOLE_MEMORY_H
#define SQZ_CONSOLE_MEMORY_H

#include <stddef.h>

/* Zeroed elements, at an address that can be freed also for none; dies when there is not enough. */
void *allocate(size_t count, size_t element_bytes);

#endif
