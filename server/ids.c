/* Names that nobody guesses; ids.h describes them. */
#define _POSIX_C_SOURCE 200809L
#include "ids.h"

#include <stdio.h>
#include <sys/random.h>

void id_make(char *id, size_t size, const char *prefix)
{
    unsigned char random[12] = {0};
    const ssize_t got = getrandom(random, sizeof random, 0);
    (void)got;
    int n = snprintf(id, size, "%s", prefix);
    for (size_t i = 0; i < sizeof random && (size_t)n < size; i++)
        n += snprintf(id + n, size - (size_t)n, "%02x", random[i]);
}
