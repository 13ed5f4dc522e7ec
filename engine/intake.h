/*
 * The one way in for text: every document and question passes here, whether it
 * comes from a file, an argument, standard input, a chat line, a data set or a
 * caller of the library. What is no text is refused with its name and a command
 * that makes text of it; what is left is made the same on every route.
 */
#ifndef SQZ_ENGINE_INTAKE_H
#define SQZ_ENGINE_INTAKE_H

#include <stddef.h>

#include "squeeze.h"

enum sqz_text_role {
    SQZ_TEXT_PLAIN,    /* documents without a template, text that is only tokenized: both ends stay */
    SQZ_TEXT_DOCUMENT, /* new lines at the end go: a blank line follows the document anyway */
    SQZ_TEXT_QUESTION  /* blanks and new lines at both ends go */
};

/* Where a text comes from, for messages. */
struct sqz_text_source {
    const char *what; /* begins the message: "the document", "book.txt", "question 2" */
    const char *file; /* its name in commands, quoted for a shell; NULL: FILE */
    const char *then; /* what a command is piped into, such as " | squeeze prepare - -o book.sqz.gguf"; NULL: nothing */
};

/* Checks a text and brings it into one form, in place: byte order marks at its start go, CR LF and CR become LF, the
 * ends are cut as the role says. Doing it twice changes nothing more. *n_bytes shrinks or stays; a NUL stands behind the
 * text when it shrank. Errors, with the text as it was: TEXT for what is a known format or encoding (named, with a
 * command), has a NUL or is not UTF-8 (with the offset), or shows nothing: only white space, control characters and
 * characters that Unicode gives no shape. */
enum sqz_status sqz_text_intake(char *text, size_t *n_bytes, enum sqz_text_role role,
                                const struct sqz_text_source *source, struct sqz_error *error);

/* The same on a copy; *out is malloc'ed with a NUL behind it, NULL on failure. Errors: TEXT, MEMORY. */
enum sqz_status sqz_text_intake_copy(char **out, size_t *n_out, const char *text, size_t n_bytes,
                                     enum sqz_text_role role, const struct sqz_text_source *source,
                                     struct sqz_error *error);

#endif
