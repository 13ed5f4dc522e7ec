/*
 * Sessions for tests that hold cards against the CPU.
 */
#ifndef SQZ_TESTS_SESSIONS_H
#define SQZ_TESTS_SESSIONS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "squeeze.h"

static inline void must(enum sqz_status status, const struct sqz_error *error)
{
    if (status != SQZ_OK) fail_msg("%s: %s", sqz_status_name(status), error->message);
}

static inline struct sqz_session *open_session(struct sqz_model *model, const struct sqz_context *context, float budget)
{
    struct sqz_session_options options;
    struct sqz_session *session;
    struct sqz_error error;
    sqz_session_options_default(&options);
    options.budget = budget;
    must(sqz_session_create(&session, model, context, &options, &error), &error);
    return session;
}

#endif
