/*
 * A place for attention that wraps the CPU's: all rows of another context of
 * the same text are read in place of the session's own context's, such as those
 * in 4 bits. For comparisons: drafts that are exact to nothing, of answers that
 * are exact to F16.
 */
#ifndef SQZ_RESEARCH_BACKEND_OTHER_ROWS_H
#define SQZ_RESEARCH_BACKEND_OTHER_ROWS_H

#include "backend_cpu.h"

struct backend_other_rows {
    struct sqz_backend base;
    struct sqz_backend_ops ops;
    struct sqz_backend *cpu;
    const struct sqz_context *context;
};

/* For the session, or its drafts. `context` has the same tokens and was prepared with the same model; it and `other` outlive
 * the session. Nothing is to be freed. Errors: MEMORY (nothing changes). */
enum sqz_status backend_other_rows_make(struct backend_other_rows *other, const struct sqz_session *session,
                                        const struct sqz_context *context, struct sqz_error *error);

#endif
