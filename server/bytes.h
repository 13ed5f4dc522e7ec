/* Bytes that arrive in pieces. Out of memory is noted and drops what would follow: a server says so and goes on. */
#ifndef SQZ_SERVER_BYTES_H
#define SQZ_SERVER_BYTES_H

#include <stdbool.h>
#include <stddef.h>

struct bytes {
    char *data; /* with a NUL behind it; NULL while empty */
    size_t n, capacity;
    bool failed;
};

void bytes_append(struct bytes *bytes, const void *data, size_t n);
void bytes_put(struct bytes *bytes, const char *text);
__attribute__((format(printf, 2, 3))) void bytes_print(struct bytes *bytes, const char *format, ...);
void bytes_drop(struct bytes *bytes, size_t n); /* the first n */
void bytes_free(struct bytes *bytes);

/* Of data[0..n), how many bytes are whole UTF-8 characters or can never become one: the rest is the beginning of a
 * character. */
size_t utf8_whole(const char *data, size_t n);
/* Appends data with U+FFFD in place of what is no UTF-8, and of NULs. */
void bytes_append_utf8(struct bytes *bytes, const char *data, size_t n);
/* Bytes of the character that data begins with; 0: it is none. */
size_t utf8_character(const char *data, size_t n);

#endif
