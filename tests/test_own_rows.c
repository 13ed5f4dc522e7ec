/*
 * Own rows of sessions on contexts in planes, on the default model: what it costs that
 * they go into planes, against the same session that keeps them as F16; that a run which is
 * cancelled behind many rows leaves no trace; what they take.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend_cpu.h"
#include "divergence.h"
#include "session.h"

enum { N_CONTEXT = 1000, N_ASKED = 600, N_ANSWER = 300, STEP = 60 };

static struct sqz_model *model;
static struct sqz_model_info model_info;
static struct sqz_context *context, *eight, *four; /* rows of F16, of 4 + 4 and of 4 bits */
static int32_t *tokens;
static char paths[3][1024];

static void must(enum sqz_status status, const struct sqz_error *error)
{
    if (status != SQZ_OK) fail_msg("%s: %s", sqz_status_name(status), error->message);
}

static enum sqz_status make_rounded(struct sqz_context **out, enum sqz_row_format rows, const char *path,
                                    struct sqz_error *error)
{
    struct sqz_prepare_options options;
    sqz_prepare_options_default(&options);
    options.squeeze.rows = rows;
    const enum sqz_status status = sqz_context_squeeze(context, path, &options, 0, NULL, error);
    return status == SQZ_OK ? sqz_context_open(out, path, NULL, error) : status;
}

static int set_up(void **state)
{
    struct sqz_error error;
    const char *file = getenv("SQUEEZE_MODEL"), *folder = getenv("SQUEEZE_TEST_FOLDER");
    char *text = malloc(1 << 17);
    size_t n = 0, length = 0;
    (void)state;
    if (!file || !folder || !text) return 1;
    sqz_llama_log_take();
    for (int i = 0; length < (1 << 15); i++)
        length += (size_t)sprintf(text + length, "Box %d, in row %d, holds %d red and %d green stones. ", i, i * 7 % 31,
                                  i * i % 17, i * 5 % 23);
    for (int i = 0; i < 3; i++) snprintf(paths[i], sizeof paths[i], "%s/own-rows-%d.sqz.gguf", folder, i);
    if (sqz_model_open(&model, file, NULL, &error) != SQZ_OK ||
        sqz_model_tokenize(model, text, length, &tokens, &n, &error) != SQZ_OK || n < N_CONTEXT + N_ASKED + N_ANSWER ||
        sqz_prepare_tokens(model, tokens, N_CONTEXT, paths[0], NULL, NULL, &error) != SQZ_OK ||
        sqz_context_open(&context, paths[0], NULL, &error) != SQZ_OK ||
        make_rounded(&eight, SQZ_ROWS_INT4_4, paths[1], &error) != SQZ_OK ||
        make_rounded(&four, SQZ_ROWS_INT4, paths[2], &error) != SQZ_OK) {
        fprintf(stderr, "%zu tokens: %s\n", n, error.message);
        return 1;
    }
    sqz_model_get_info(model, &model_info);
    free(text);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    sqz_context_free(four);
    sqz_context_free(eight);
    sqz_context_free(context);
    sqz_model_free(model);
    free(tokens);
    for (int i = 0; i < 3; i++) unlink(paths[i]);
    return 0;
}

/* own_f16: its own rows stay F16. */
static struct sqz_session *session_on(const struct sqz_context *of, float budget, bool own_f16)
{
    struct sqz_error error;
    struct sqz_session_options options;
    struct sqz_session *s;
    sqz_session_options_default(&options);
    options.budget = budget;
    sqz_backend_cpu_keep_own_f16(model->backend, own_f16);
    const enum sqz_status status = sqz_session_create(&s, model, of, &options, &error);
    sqz_backend_cpu_keep_own_f16(model->backend, false);
    must(status, &error);
    return s;
}

static size_t own_bytes(const struct sqz_session *s)
{
    struct sqz_session_stats stats;
    sqz_session_get_stats(s, &stats);
    return stats.own_bytes;
}

/* The answer's tokens in batches of STEP, every one with its logits. */
static void answer(struct sqz_session *s, size_t at, float *logits)
{
    struct sqz_error error;
    s->all_logits = logits;
    must(sqz_session_run(s, tokens + N_CONTEXT + N_ASKED + at, STEP, &error), &error);
    s->all_logits = NULL;
}

/* What differs from a session whose own rows are F16. */
enum other { OWN_IN_PLANES, CUT_ELSEWHERE };

/* Mean KL of the answer from the answer with own rows in F16, on the same context: with own rows in planes, or what any other
 * order of sums makes, with the question in other batches. *share: of the bytes. */
static double loss(const struct sqz_context *of, float budget, enum other how, double *share)
{
    struct sqz_error error;
    struct sqz_session *f16 = session_on(of, budget, true), *other = session_on(of, budget, how == CUT_ELSEWHERE);
    const size_t first = how == CUT_ELSEWHERE ? N_ASKED / 3 : N_ASKED;
    float *logits = malloc(2 * (size_t)STEP * model_info.n_vocab * sizeof *logits);
    double kl = 0;
    assert_non_null(logits);
    must(sqz_session_run(f16, tokens + N_CONTEXT, N_ASKED, &error), &error);
    must(sqz_session_run(other, tokens + N_CONTEXT, first, &error), &error);
    if (first < N_ASKED) must(sqz_session_run(other, tokens + N_CONTEXT + first, N_ASKED - first, &error), &error);
    for (size_t at = 0; at < N_ANSWER; at += STEP) {
        float *second = logits + (size_t)STEP * model_info.n_vocab;
        answer(f16, at, logits);
        answer(other, at, second);
        for (size_t i = 0; i < STEP; i++)
            kl +=
                logits_divergence(logits + i * model_info.n_vocab, second + i * model_info.n_vocab, model_info.n_vocab);
    }
    *share = (double)own_bytes(other) / (double)own_bytes(f16);
    free(logits);
    sqz_session_free(f16);
    sqz_session_free(other);
    return kl / N_ANSWER;
}

/* 900 own tokens, up to 768 of them in planes. What INT8 and INT4 of the whole context cost is 0.0004 and 0.01 beyond
 * the noise of 0.0025 that any other order of sums makes (docs/method.md); own rows are fewer, but near. */
static void test_loss(void **state)
{
    double share;
    (void)state;
    print_message("noise: mean KL %.5f\n", loss(eight, 1, CUT_ELSEWHERE, &share));
    assert_true(share == 1);
    const double of_eight = loss(eight, 1, OWN_IN_PLANES, &share);
    print_message("own rows of 4 + 4 bits: mean KL %.5f, %.3f of the bytes\n", of_eight, share);
    assert_true(share < 0.9); /* three blocks of F16 beside 768 rows in planes */
    assert_true(of_eight > 0 && of_eight <= 0.008);
    const double of_four = loss(four, 1, OWN_IN_PLANES, &share);
    print_message("own rows of 4 bits: mean KL %.5f, %.3f of the bytes\n", of_four, share);
    assert_true(share < 0.7);
    assert_true(of_four > 0 && of_four <= 0.05);
    const double squeezed = loss(eight, 0.3f, OWN_IN_PLANES, &share);
    print_message("of 4 + 4 bits at a budget of 0.3: mean KL %.5f\n", squeezed);
    assert_true(squeezed > 0 && squeezed <= 0.02);
}

/* A context of F16 rows: what the place is told makes no difference. */
static void test_f16(void **state)
{
    double share;
    (void)state;
    assert_true(loss(context, 1, OWN_IN_PLANES, &share) == 0);
    assert_true(share == 1);
}

/* Once 512 tokens of the run are there. */
static bool is_far(void *user_data)
{
    const struct sqz_session *s = user_data;
    return s->n_user >= 300 + 512;
}

/* A question that is cancelled behind hundreds of rows, on a session that has some already: as if it had never been. */
static void test_cancelled(void **state)
{
    struct sqz_error error;
    struct sqz_session *s = session_on(eight, 1, false), *never = session_on(eight, 1, false);
    struct sqz_session *const both[2] = {s, never};
    (void)state;
    for (int i = 0; i < 2; i++) must(sqz_session_run(both[i], tokens + N_CONTEXT, 300, &error), &error);
    sqz_session_set_cancel(s, is_far, s);
    assert_int_equal(sqz_session_run(s, tokens + N_CONTEXT, N_ASKED, &error), SQZ_ERROR_CANCELLED);
    sqz_session_set_cancel(s, NULL, NULL);
    assert_int_equal(s->n_user, 300);
    for (size_t at = 300; at < 700; at += 40) {
        for (int i = 0; i < 2; i++) must(sqz_session_run(both[i], tokens + N_CONTEXT + at, 40, &error), &error);
        assert_memory_equal(sqz_session_logits(s), sqz_session_logits(never), model_info.n_vocab * sizeof(float));
    }
    s->n_user = 400; /* further than rows are kept for: refused, not answered from what is left */
    assert_int_equal(sqz_session_run(s, tokens + N_CONTEXT, 1, &error), SQZ_ERROR_INTERNAL);
    assert_non_null(strstr(error.message, "are no more"));
    sqz_session_reset(s);
    sqz_session_reset(never);
    for (int i = 0; i < 2; i++) must(sqz_session_run(both[i], tokens + N_CONTEXT, 300, &error), &error);
    assert_memory_equal(sqz_session_logits(s), sqz_session_logits(never), model_info.n_vocab * sizeof(float));
    sqz_session_free(s);
    sqz_session_free(never);
}

/* Two sessions in one pass, one of them behind a boundary, get what each gets alone. */
static void test_together(void **state)
{
    struct sqz_error error;
    struct sqz_session *s[2] = {session_on(eight, 0.3f, false), session_on(eight, 0.3f, false)};
    (void)state;
    must(sqz_session_run(s[0], tokens + N_CONTEXT, 250, &error), &error);
    must(sqz_session_run(s[1], tokens + N_CONTEXT, 20, &error), &error);
    struct sqz_batch_item items[2] = {{.session = s[0], .tokens = tokens + N_CONTEXT + 250, .n_tokens = 300},
                                      {.session = s[1], .tokens = tokens + N_CONTEXT + 20, .n_tokens = 200}};
    must(sqz_batch_run(items, 2, &error), &error);
    struct sqz_session *f16 = session_on(eight, 0.3f, true);
    must(sqz_session_run(f16, tokens + N_CONTEXT, 550, &error), &error);
    assert_int_equal(s[0]->n_user, 550);
    assert_int_equal(s[1]->n_user, 220);
    const double kl = logits_divergence(sqz_session_logits(f16), sqz_session_logits(s[0]), model_info.n_vocab);
    print_message("together: KL %.5f\n", kl);
    assert_true(kl <= 0.1); /* one token, squeezed, in other batches */
    for (int i = 0; i < 2; i++) sqz_session_free(s[i]);
    sqz_session_free(f16);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_loss),
        cmocka_unit_test(test_f16),
        cmocka_unit_test(test_cancelled),
        cmocka_unit_test(test_together),
    };
    return cmocka_run_group_tests_name("own_rows", tests, set_up, tear_down);
}
