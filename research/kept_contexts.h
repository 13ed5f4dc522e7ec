/*
 * Contexts of documents for measurements: read once by the model, squeezed
 * again for every set of options. With a folder the reading is kept across
 * runs. What is found there is used when it is of the same model and stretch,
 * holds the text's own tokens and was squeezed as it would be now; a name
 * alone proves nothing.
 */
#ifndef SQZ_RESEARCH_KEPT_CONTEXTS_H
#define SQZ_RESEARCH_KEPT_CONTEXTS_H

#include <stdbool.h>
#include <stddef.h>

#include "squeeze.h"

struct kept_contexts {
    struct sqz_model *model;
    const char *folder;      /* NULL: nothing is kept */
    const char *fingerprint; /* of the model */
    double rope_scale;
    int n_threads;
    uint32_t n_calibration; /* queries that kept contexts hold at least */
    bool quiet;
};

/* Makes the folder, where one is given, and one for temporary files that goes when the program ends. Dies when it
 * cannot. */
void kept_contexts_begin(const struct kept_contexts *kept);

/* The context of a text as the default rule squeezes it: the kept one, else prepared (and kept). NULL, with the error
 * set, when it cannot be prepared. label begins the lines of progress. most_tokens: 0, or the context's first so many are
 * kept. */
struct sqz_context *kept_contexts_base(const struct kept_contexts *kept, const char *text, size_t text_bytes,
                                       size_t most_tokens, const char *label, struct sqz_error *error);

/* Another context of the same text, squeezed as the options say; the base stays. NULL on failure. */
struct sqz_context *kept_contexts_squeeze(const struct kept_contexts *kept, struct sqz_context *base,
                                          const struct sqz_squeeze_options *squeeze, const char *label,
                                          struct sqz_error *error);

/* The context of a text, squeezed as the options say. NULL on failure. */
struct sqz_context *kept_contexts_open(const struct kept_contexts *kept, const char *text, size_t text_bytes,
                                       const struct sqz_squeeze_options *options, const char *label,
                                       struct sqz_error *error);

#endif
