/*
 * A place for attention that wraps the CPU's: layers that grow with the context
 * read the rows that a selector chooses, or what the lookup retains, and the
 * attention mass that they reach is added up. For comparisons: squeeze eval's
 * other methods, and its recall.
 */
#ifndef SQZ_RESEARCH_BACKEND_SELECTED_H
#define SQZ_RESEARCH_BACKEND_SELECTED_H

#include "attend_selected.h"
#include "backend_cpu.h"
#include "recall.h"

struct backend_selected {
    struct sqz_backend base;
    struct sqz_backend_ops ops;
    struct sqz_backend *cpu;
    const struct sqz_selector *selector; /* NULL: the lookup */
    struct sqz_recall *recall;           /* added to; NULL: not measured */
};

/* Places of comparisons read rows as one file has them. Errors: UNSUPPORTED, the session's context is in shards. */
enum sqz_status backend_check_one_file(const struct sqz_session *session, struct sqz_error *error);

/* A place for the session's attention or that of its drafts; _wrap() also has the session's go through it from the next run
 * on. selector and recall, each or both NULL, and `selected` outlive the session. Nothing is to be freed. Errors: MEMORY
 * (nothing changes). */
enum sqz_status backend_selected_make(struct backend_selected *selected, const struct sqz_session *session,
                                      const struct sqz_selector *selector, struct sqz_recall *recall,
                                      struct sqz_error *error);
enum sqz_status backend_selected_wrap(struct backend_selected *selected, struct sqz_session *session,
                                      const struct sqz_selector *selector, struct sqz_recall *recall,
                                      struct sqz_error *error);

#endif
