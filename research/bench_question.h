/* Questions of a length that is asked for. */
#ifndef SQZ_RESEARCH_BENCH_QUESTION_H
#define SQZ_RESEARCH_BENCH_QUESTION_H

#include "squeeze.h"

/* The tokens of a question, malloc'ed, its text repeated or cut off to bring them to *n_tokens (0: as many as it has,
 * which are written there); the template of the session's context stays whole. Dies when the template alone takes
 * as many. */
int32_t *bench_question(const struct sqz_model *model, const struct sqz_session *session, const char *text,
                        size_t *n_tokens);

#endif
