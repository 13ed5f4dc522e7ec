/*
 * Files that are no plain text, recognised by their first bytes, and what makes
 * text of them. Only bytes are looked at, never a file's name.
 */
#ifndef SQZ_ENGINE_FILE_KIND_H
#define SQZ_ENGINE_FILE_KIND_H

#include <stdbool.h>
#include <stddef.h>

struct sqz_file_kind {
    const char *name;           /* "a PDF file" */
    const char *before, *after; /* around the file's name: a command that prints its text. before NULL: there is none,
                                   and after, when it is not NULL, says what the file is good for */
};

/* The kind, or NULL. is_text: the bytes are UTF-8 without NUL; then what merely begins with the letters of a format,
 * such as "GIF89a is a format", is no file of it. */
const struct sqz_file_kind *sqz_file_kind(const char *bytes, size_t n_bytes, bool is_text);

/* UTF-16 or UTF-32, with a byte order mark or told from where its zero bytes and its scripts' bytes are. */
const struct sqz_file_kind *sqz_wide_text_kind(const char *bytes, size_t n_bytes);

#endif
