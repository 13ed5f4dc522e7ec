/* Documents that are no plain text, told by their bytes, and the programs that make text of them. */
#ifndef SQZ_SERVER_CONVERT_H
#define SQZ_SERVER_CONVERT_H

#include "fault.h"

struct document_kind; /* PDF, Word, EPUB, OpenDocument or HTML */

/* The kind; NULL: what these are is text, or nothing that text can be made of. */
const struct document_kind *document_kind(const char *data, size_t n);

/* Whether its program is installed; false, and the fault, when it is not. */
bool convert_can(const struct document_kind *kind, struct fault *fault);

/* Appends the text to *text. It takes up to minutes; go_on is asked meanwhile. False, with the fault (its status is 0 when
 * go_on said no): no text came of it. */
bool convert_run(const struct document_kind *kind, const char *data, size_t n, size_t most_bytes,
                 bool (*go_on)(void *data), void *user_data, struct bytes *text, struct fault *fault);

#endif
