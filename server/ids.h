/* Names that nobody guesses: of answers, and of requests. */
#ifndef SQZ_SERVER_IDS_H
#define SQZ_SERVER_IDS_H

#include <stddef.h>

/* prefix and 24 hexadecimal digits, as far as there is room. */
void id_make(char *id, size_t size, const char *prefix);

#endif
