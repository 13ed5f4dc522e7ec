/* Memory that a program cannot do without. */
#include "memory.h"

#include <stdlib.h>

#include "common.h"

void *allocate(size_t count, size_t element_bytes)
{
    void *memory = calloc(count > 0 ? count : 1, element_bytes);
    if (!memory) die("out of memory");
    return memory;
}
