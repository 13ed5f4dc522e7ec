/*
 * Contexts of documents for measurements: read once by the model, squeezed
 * again for every set of options. With a folder the reading is kept across
 * runs. What is found there is used when it is of the same model and stretch,
 * holds the text's own tokens and was squeezed as it would be now; a name
 * alone proves nothing.
 *
 * Or contexts in shards (docs/ranks.md): these cannot be squeezed again, so the
 * model reads the text for every set of options. Under mpirun all ranks read it
 * together; each opens its shards by their names, so that files without a folder
 * of their own stay until the next context is prepared, or the program ends.
 */
#ifndef SQZ_RESEARCH_KEPT_CONTEXTS_H
#define SQZ_RESEARCH_KEPT_CONTEXTS_H

#include <stdbool.h>
#include <stddef.h>

#include "inputs.h"
#include "squeeze.h"

struct kept_contexts {
    struct sqz_model *model;
    const char *folder;      /* NULL: nothing is kept */
    const char *fingerprint; /* of the model */
    double rope_scale;
    int n_threads;
    uint32_t n_calibration; /* queries that kept contexts hold at least */
    bool quiet;
    uint32_t n_shards;      /* above 1: contexts are in so many */
    const char *model_path; /* by which other ranks open the model, with so many threads: */
    size_t n_asked_threads; /* --threads */
};

#define SHARDS_OPTION(n)                                                                                               \
    {                                                                                                                  \
        .kind = OPTION_COUNT, .name = "shards", .argument = "N", .value = &(n), .low = 1, .high = 1024,                \
        .example = "4",                                                                                                \
        .help = "prepare contexts in N shards (1: one file; under mpirun a multiple of the processes, "                \
                "by itself as many)"                                                                                   \
    }

/* What --shards says (0: nothing) becomes the number of shards, 1 and 0 for one file; gpu is set up for it. Usage error when
 * it cannot be with this many ranks, or so squeezed: dense answers are of the same rows, which must be the model's own. */
void kept_contexts_take_shards(size_t *n_shards, struct gpu_flags *gpu, const struct sqz_squeeze_options *squeeze);

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

/* The context of a text, squeezed as the options say; where that is in shards, there is no other way to it. NULL on failure.
 * Where ranks failed to prepare it, the program ends. */
struct sqz_context *kept_contexts_open(const struct kept_contexts *kept, const char *text, size_t text_bytes,
                                       size_t most_tokens, const struct sqz_squeeze_options *options, const char *label,
                                       struct sqz_error *error);

#endif
