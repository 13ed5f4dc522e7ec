/* Questions of a length that is asked for; bench_question.h describes them. */
#include "bench_question.h"

#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "memory.h"

int32_t *bench_question(const struct sqz_model *model, const struct sqz_session *session, const char *text,
                        size_t *n_tokens)
{
    struct sqz_error error;
    int32_t *plain, *whole;
    size_t n_plain, n_whole;
    stop_on(sqz_model_tokenize(model, text, strlen(text), &plain, &n_plain, &error), &error);
    stop_on(sqz_session_question_tokens(session, text, strlen(text), true, &whole, &n_whole, &error), &error);
    if (n_whole < n_plain || n_plain == 0) die("the question's template gives fewer tokens than the question");
    const size_t n_after = n_whole - n_plain, wanted = *n_tokens ? *n_tokens : n_whole;
    if (wanted <= n_after) die("a question of %zu tokens: the template alone takes %zu", wanted, n_after);
    int32_t *tokens = allocate(wanted, sizeof *tokens);
    for (size_t i = 0; i < wanted - n_after; i++) tokens[i] = plain[i % n_plain];
    memcpy(tokens + wanted - n_after, whole + n_plain, n_after * sizeof *whole);
    free(plain);
    free(whole);
    *n_tokens = wanted;
    return tokens;
}
