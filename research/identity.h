/*
 * 128 bits (XXH3) that stand for everything that decides a result: what is
 * added counts with its length, so that "ab", "c" and "a", "bc" differ.
 */
#ifndef SQZ_RESEARCH_IDENTITY_H
#define SQZ_RESEARCH_IDENTITY_H

#include <stddef.h>
#include <stdint.h>

#include "common.h"
#include "squeeze.h"

enum { IDENTITY_TEXT = 33 }; /* 32 hex digits and a NUL */

struct identity {
    void *state; /* malloc'ed */
};
struct identity identity_begin(void);
void identity_add(struct identity *identity, const void *bytes, size_t n);
void identity_add_text(struct identity *identity, const char *text);
void identity_print(struct identity *identity, const char *format, ...) PRINTF_LIKE(2, 3); /* up to 511 bytes */
/* All that decides how rows are squeezed. */
void identity_add_squeeze(struct identity *identity, const struct sqz_squeeze_options *squeeze);
void identity_end(struct identity *identity, char text[IDENTITY_TEXT]); /* releases it */

#endif
