/*
 * A context in shards, each on a card, against the same shards in one process on the
 * CPU: answers forced along the same tokens, questions of few and many tokens, users
 * together, and what steers the budget. Skipped (77) with fewer than two cards.
 */
#define _POSIX_C_SOURCE 200809L
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "divergence.h"
#include "gpu.h"
#include "gpu_device.h"
#include "session.h"
#include "sessions.h"
#include "squeeze.h"

enum { QUESTION_TOKENS = 32, LONG_TOKENS = 150, USERS = 3 };

static struct sqz_model *on_cpu, *on_cards;
static struct sqz_model_info info;
static struct sqz_context *coded, *whole; /* keys with codes; whole clusters */
static int32_t *text;                     /* of the source tree's own documentation */
static size_t n_text, n_context = 6000, n_answer = 32;
static bool fake, spread_evenly;                /* the latter: of a random model, which reads alike everywhere */
static double noise = 0.005, some_noise = 0.02; /* divergence where all is read, and where a part is */
static char coded_path[1024], whole_path[1024];

/* ---- Set-up ---------------------------------------------------------------------- */

static void read_text(const char *source)
{
    char path[1024];
    struct sqz_error error;
    char *bytes = malloc(1 << 20);
    snprintf(path, sizeof path, "%s/docs/method.md", source);
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    const size_t n = fread(bytes, 1, 1 << 20, file);
    fclose(file);
    must(sqz_model_tokenize(on_cpu, bytes, n, &text, &n_text, &error), &error);
    free(bytes);
}

/* By that model, in as many shards as there are cards. */
static void prepare(struct sqz_model *model, struct sqz_context **context, const char *path, uint32_t code_words)
{
    struct sqz_error error;
    struct sqz_prepare_options options;
    struct sqz_prepare_report report;
    sqz_prepare_options_default(&options);
    options.n_shards = info.n_row_cards;
    options.squeeze.code_words = code_words;
    must(sqz_prepare_tokens(model, text, n_context, path, &options, &report, &error), &error);
    printf("prepared in %.2f s, reading %.2f s\n", report.total_seconds, report.read_seconds);
    must(sqz_context_open(context, path, NULL, &error), &error);
}

static int set_up(void **state)
{
    const char *path = getenv("SQUEEZE_MODEL"), *folder = getenv("SQUEEZE_TEST_FOLDER");
    struct sqz_model_options options;
    struct sqz_error error;
    (void)state;
    sqz_model_options_default(&options);
    must(sqz_model_open(&on_cpu, path, &options, &error), &error);
    options.n_gpu_layers = -1;
    options.split = SQZ_SPLIT_ROWS;
    options.together = SQZ_TOGETHER_EACH; /* as on the CPU */
    must(sqz_model_open(&on_cards, path, &options, &error), &error);
    sqz_model_get_info(on_cards, &info);
    assert_true(info.n_row_cards >= 2);
    read_text(getenv("SQUEEZE_SOURCE"));
    assert_true(n_text >= n_context + LONG_TOKENS + n_answer);
    snprintf(coded_path, sizeof coded_path, "%s/rows_a.sqz.gguf", folder);
    snprintf(whole_path, sizeof whole_path, "%s/rows_b.sqz.gguf", folder);
    prepare(on_cpu, &coded, coded_path, 1);
    prepare(on_cards, &whole, whole_path, 0); /* read on the first card */
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    sqz_context_free(coded);
    sqz_context_free(whole);
    sqz_model_free(on_cpu);
    sqz_model_free(on_cards);
    free(text);
    return 0;
}

/* ---- Tests -------------------------------------------------------------------------- */

/* The mean divergence of what comes after a question and along an answer, forced through both; what each reads. */
static double compare(const char *what, const struct sqz_context *context, float budget, size_t n_question)
{
    struct sqz_session *s[] = {open_session(on_cpu, context, budget), open_session(on_cards, context, budget)};
    const int32_t *question = text + n_context;
    double sum = 0, largest = 0, share[2];
    struct sqz_error error;
    for (size_t i = 0; i < 2; i++) must(sqz_session_run(s[i], question, n_question, &error), &error);
    for (size_t t = 0; t < n_answer; t++) {
        const double kl = logits_divergence(sqz_session_logits(s[0]), sqz_session_logits(s[1]), info.n_vocab);
        sum += kl;
        largest = fmax(largest, kl);
        for (size_t i = 0; i < 2; i++) must(sqz_session_run(s[i], question + n_question + t, 1, &error), &error);
    }
    for (size_t i = 0; i < 2; i++) {
        struct sqz_session_stats stats;
        sqz_session_get_stats(s[i], &stats);
        share[i] = sqz_attention_stats_share(&stats.attention);
        sqz_session_free(s[i]);
    }
    printf("%-40s budget %.2f: mean KL %.2e, largest %.2e, read %.4f and %.4f\n", what, (double)budget,
           sum / (double)n_answer, largest, share[0], share[1]);
    /* What a card has read is what others' results are steered by: a pass that is counted without one card's is found. */
    assert_true(fabs(share[0] - share[1]) < (spread_evenly ? 0.02 + 0.1 * share[0] : 0.05 + 0.3 * share[0]));
    return sum / (double)n_answer;
}

static void test_answers(void **state)
{
    (void)state;
    assert_true(compare("whole clusters", whole, 1, QUESTION_TOKENS) < 2 * noise);
    assert_true(compare("whole clusters", whole, 0.3f, QUESTION_TOKENS) < some_noise + noise);
    assert_true(compare("codes", coded, 1, QUESTION_TOKENS) < 2 * noise);
    assert_true(compare("codes", coded, 0.3f, QUESTION_TOKENS) < some_noise + noise);
}

static void test_long_question(void **state)
{
    (void)state;
    assert_true(compare("a long question, clusters", whole, 1, LONG_TOKENS) < 2 * noise);
    assert_true(compare("a long question, clusters", whole, 0.3f, LONG_TOKENS) < some_noise + noise);
    assert_true(compare("a long question, codes", coded, 0.3f, LONG_TOKENS) < some_noise + noise);
}

/* Users of one context, and of two, together: each as alone. */
static void test_users(void **state)
{
    struct sqz_batch_item items[USERS];
    struct sqz_session *alone[USERS];
    struct sqz_error error;
    double most = 0;
    (void)state;
    for (size_t u = 0; u < USERS; u++) {
        const struct sqz_context *context = u + 1 < USERS ? whole : coded;
        items[u] = (struct sqz_batch_item){.session = open_session(on_cards, context, 0.3f),
                                           .tokens = text + n_context + 7 * u,
                                           .n_tokens = 5 + 2 * u};
        alone[u] = open_session(on_cards, context, 0.3f);
        must(sqz_session_run(alone[u], items[u].tokens, items[u].n_tokens, &error), &error);
    }
    for (size_t t = 0; t < 4; t++) {
        must(sqz_batch_run(items, USERS, &error), &error);
        for (size_t u = 0; u < USERS; u++) {
            must(items[u].status, &items[u].error);
            most = fmax(most, logits_divergence(sqz_session_logits(alone[u]), sqz_session_logits(items[u].session),
                                                info.n_vocab));
            items[u].tokens = text + n_context + 100 + 4 * u + t;
            items[u].n_tokens = 1;
            must(sqz_session_run(alone[u], items[u].tokens, 1, &error), &error);
        }
    }
    printf("%d users together: largest KL to each alone %.2e\n", USERS, most);
    /* Products of other numbers of tokens are rounded otherwise, and a cluster at the threshold may be read by one of two. */
    assert_true(most < (spread_evenly ? 10 * some_noise : some_noise));
    for (size_t u = 0; u < USERS; u++) {
        sqz_session_free(items[u].session);
        sqz_session_free(alone[u]);
    }
}

/* The same tokens, chosen by each: how many of the first are the same. A tie that rounding turns ends them. */
static void test_greedy(void **state)
{
    struct sqz_session *s[] = {open_session(on_cpu, whole, 0.3f), open_session(on_cards, whole, 0.3f)};
    const struct sqz_gpu_device_counts before = sqz_gpu_device_count();
    struct sqz_error error;
    size_t n_same = 0;
    (void)state;
    for (size_t i = 0; i < 2; i++) must(sqz_session_run(s[i], text + n_context, QUESTION_TOKENS, &error), &error);
    for (size_t t = 0; t < n_answer; t++, n_same++) {
        bool ended;
        const int32_t cpu = sqz_session_sample(s[0], &ended), cards = sqz_session_sample(s[1], &ended);
        if (cpu != cards) {
            const float *logits = sqz_session_logits(s[1]);
            printf("token %zu is another one, a lead of %.4f\n", t, (double)(logits[cards] - logits[cpu]));
            assert_true(logits[cards] - logits[cpu] < 0.5f);
            break;
        }
        for (size_t i = 0; i < 2; i++) must(sqz_session_run(s[i], &cpu, 1, &error), &error);
    }
    const struct sqz_gpu_device_counts after = sqz_gpu_device_count();
    printf("%zu of %zu greedy tokens as on the CPU; %d captured, %d launched again, %d launch by launch\n", n_same,
           n_answer, (int)(after.captured - before.captured), (int)(after.replayed - before.replayed),
           (int)(after.eager - before.eager));
    /* A token costs no launches of the host's, from the second on. */
    if (!fake && !sqz_gpu_by_callback() && n_same > 4)
        assert_true(after.captured > before.captured && after.replayed - before.replayed + 4 >= n_same);
    for (size_t i = 0; i < 2; i++) sqz_session_free(s[i]);
}

/* What the cards read comes to the budget. */
static void test_budget(void **state)
{
    const size_t n_tokens = fake ? 24 : 200;
    struct sqz_session *s = open_session(on_cards, whole, 0.3f);
    struct sqz_session_stats stats;
    struct sqz_error error;
    (void)state;
    for (size_t t = 0; t < n_tokens; t++) {
        if (t == n_tokens / 2) sqz_session_clear_stats(s);
        must(sqz_session_run(s, text + n_context + t, 1, &error), &error);
    }
    sqz_session_get_stats(s, &stats);
    const double share = sqz_attention_stats_share(&stats.attention);
    printf("a budget of %.2f: read %.4f, thresholds times exp(%.3f)\n", (double)stats.budget, share,
           (double)s->log_offset);
    if (stats.budget < 1) {
        assert_true(s->log_offset != 0);
        assert_true(fabs(share - (double)stats.budget) < 0.3 * (double)stats.budget);
    }
    sqz_session_free(s);
}

/* A model whose layers are shared out has no place for shards. */
static void test_refused(void **state)
{
    struct sqz_model_options options;
    struct sqz_model *layers;
    struct sqz_session *session;
    struct sqz_error error;
    (void)state;
    sqz_model_options_default(&options);
    options.n_gpu_layers = -1;
    must(sqz_model_open(&layers, getenv("SQUEEZE_MODEL"), &options, &error), &error);
    assert_int_equal(sqz_session_create(&session, layers, whole, NULL, &error), SQZ_ERROR_UNSUPPORTED);
    assert_non_null(strstr(error.message, "--split rows"));
    sqz_model_free(layers);
    options.split = SQZ_SPLIT_ROWS;
    options.n_gpu_layers = 2;
    assert_int_equal(sqz_model_open(&layers, getenv("SQUEEZE_MODEL"), &options, &error), SQZ_ERROR_UNSUPPORTED);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answers), cmocka_unit_test(test_long_question), cmocka_unit_test(test_users),
        cmocka_unit_test(test_greedy),  cmocka_unit_test(test_budget),        cmocka_unit_test(test_refused),
    };
    if (sqz_gpu_count() < 2) {
        printf("skipped: %s\n", sqz_gpu_count() ? "there is one card" : sqz_gpu_reason());
        return 77;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 1) cmocka_set_skip_filter(argv[1]); /* what a variant of the model is not for */
    sqz_llama_log_take();
    fake = getenv("SQUEEZE_FAKE_GPU") != NULL;
    if (fake) n_context = 2600, n_answer = 4;
    if (getenv("SQUEEZE_TEST_TOKENS")) n_context = (size_t)atol(getenv("SQUEEZE_TEST_TOKENS"));
    if (getenv("SQUEEZE_TEST_NOISE")) noise = atof(getenv("SQUEEZE_TEST_NOISE"));
    spread_evenly = getenv("SQUEEZE_TEST_SOME_NOISE") != NULL;
    if (spread_evenly) some_noise = atof(getenv("SQUEEZE_TEST_SOME_NOISE"));
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
