/* Documents and questions on their way in: read, and passed through the engine's intake with the names that its messages
 * and commands need. */
#ifndef SQZ_PROGRAMS_TEXTS_H
#define SQZ_PROGRAMS_TEXTS_H

#include <stdbool.h>
#include <stddef.h>

#include "squeeze.h"

/* As one word of a shell command, quoted where it must be; malloc'ed. */
char *shell_word(const char *text);

/* The text of a document for `output`, "-": from standard input; malloc'ed. Dies when it cannot be read or is no text. */
char *read_document(const char *path, bool raw, const char *output, size_t *n_bytes);

struct question {
    char *text; /* malloc'ed, with a NUL behind it; as it came where it was refused */
    size_t n_bytes;
    struct sqz_error error; /* why it was refused, or could not be answered; SQZ_OK: nothing is known against it */
};

/* Passes a question through the intake; fills question->error. what: its name, "question 2". then: what a command that
 * makes text of it is piped into, or NULL. */
void take_question(struct question *question, const char *what, const char *then);

/* The questions of an `ask`, each checked; "-" reads standard input, which can be done once. Those refused are said.
 * malloc'ed, for questions_free(). */
struct question *read_questions(size_t n, char **arguments, const char *context);
void questions_free(struct question *questions, size_t n);

#endif
