/* Text that arrives in pieces: a buffer that grows, and a filter that lets only whole, harmless characters through. */
#ifndef SQZ_CONSOLE_TEXT_BUFFER_H
#define SQZ_CONSOLE_TEXT_BUFFER_H

#include <stddef.h>

#include "common.h"

/* Holds back characters until they are complete; what cannot be UTF-8, and control characters that could steer a
 * terminal, become U+FFFD. */
struct text_filter {
    unsigned char held[4];
    size_t n_held;
};

struct text_buffer {
    char *text; /* with a NUL behind it; NULL while empty */
    size_t n_bytes, capacity;
};

/* Appends the complete characters of n bytes to buffer. */
void text_filter_put(struct text_filter *filter, struct text_buffer *buffer, const char *bytes, size_t n);
void text_filter_end(struct text_filter *filter, struct text_buffer *buffer);
void text_buffer_append(struct text_buffer *buffer, const char *bytes, size_t n);
void text_buffer_print(struct text_buffer *buffer, const char *format, ...) PRINTF_LIKE(2, 3);
void text_buffer_quote(struct text_buffer *buffer, const char *word); /* as one word of a shell's command line */
void text_buffer_free(struct text_buffer *buffer);

#endif
