/*
 * The engine on a graphics card against the engine on the CPU: the same model, the
 * same contexts, answers forced along the same tokens. Skipped (77) without a card.
 *
 * Distributions differ by what llama.cpp's own products differ between the two;
 * llama.cpp's dense run on both shows how much that is. SQUEEZE_TEST_NOISE names the
 * least that is allowed for, of a model whose products are about the same on both.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend_cards.h"
#include "baseline.h"
#include "gpu.h"
#include "gpu_device.h"
#include "model.h"
#include "squeeze.h"

enum { QUESTION_TOKENS = 32, USERS = 3 };

static struct sqz_model *on_cpu, *on_card;
static struct sqz_model_info info;
static struct sqz_context *from_cpu, *from_card;
static int32_t *text; /* of the source tree's own documentation */
static size_t n_text;
static char cpu_path[1024], card_path[1024];

/* The card is one of host memory (tests/fake_gpu), which is slow and chooses keys in a simpler way. */
static bool fake;
static size_t n_context = 6000, n_answer = 48, n_long = 230;
static size_t slack = (size_t)16 << 20; /* for all that is not contexts */
static double close_enough = 0.02;      /* divergence where a part of the context is read */
static double noise = 0.005; /* and what llama.cpp's products alone make of the model, found by test_llama() */

static void must(enum sqz_status status, const struct sqz_error *error)
{
    if (status != SQZ_OK) fail_msg("%s: %s", sqz_status_name(status), error->message);
}

/* KL(a || b) of two next-token distributions. */
static double divergence(const float *a, const float *b)
{
    double most_a = -INFINITY, most_b = -INFINITY, sum_a = 0, sum_b = 0, kl = 0;
    for (uint32_t i = 0; i < info.n_vocab; i++) {
        most_a = fmax(most_a, (double)a[i]);
        most_b = fmax(most_b, (double)b[i]);
    }
    for (uint32_t i = 0; i < info.n_vocab; i++) {
        sum_a += exp((double)a[i] - most_a);
        sum_b += exp((double)b[i] - most_b);
    }
    for (uint32_t i = 0; i < info.n_vocab; i++) {
        const double log_a = (double)a[i] - most_a - log(sum_a), log_b = (double)b[i] - most_b - log(sum_b);
        kl += exp(log_a) * (log_a - log_b);
    }
    return kl;
}

/* ---- Set-up ---------------------------------------------------------------------- */

static char *read_file(const char *folder, const char *name, size_t *n)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    char *bytes = file ? malloc(1 << 20) : NULL;
    *n = bytes ? fread(bytes, 1, 1 << 20, file) : 0;
    if (file) fclose(file);
    return bytes;
}

static void prepare(struct sqz_model *model, struct sqz_context **context, const char *path)
{
    struct sqz_error error;
    struct sqz_prepare_options options;
    struct sqz_prepare_report report;
    sqz_prepare_options_default(&options);
    must(sqz_prepare_tokens(model, text, n_context, path, &options, &report, &error), &error);
    printf("prepared in %.2f s, reading %.2f s\n", report.total_seconds, report.read_seconds);
    must(sqz_context_open(context, path, NULL, &error), &error);
}

static int set_up(void **state)
{
    const char *model = getenv("SQUEEZE_MODEL"), *folder = getenv("SQUEEZE_TEST_FOLDER"),
               *source = getenv("SQUEEZE_SOURCE");
    struct sqz_model_options options;
    struct sqz_error error;
    size_t n_bytes;
    (void)state;
    sqz_model_options_default(&options);
    must(sqz_model_open(&on_cpu, model, &options, &error), &error);
    options.n_gpu_layers = -1;
    must(sqz_model_open(&on_card, model, &options, &error), &error);
    sqz_model_get_info(on_card, &info);
    assert_int_equal(info.n_gpu_layers, info.n_layer + 1);
    printf("layers on %d cards\n", 1 + on_card->layers[info.n_layer - 1].card);
    char *bytes = read_file(source, "docs/method.md", &n_bytes);
    must(sqz_model_tokenize(on_cpu, bytes, n_bytes, &text, &n_text, &error), &error);
    free(bytes);
    assert_true(n_text >= n_context + n_long + n_answer);
    snprintf(cpu_path, sizeof cpu_path, "%s/gpu_a.sqz.gguf", folder);
    snprintf(card_path, sizeof card_path, "%s/gpu_b.sqz.gguf", folder);
    prepare(on_cpu, &from_cpu, cpu_path);
    prepare(on_card, &from_card, card_path);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    sqz_context_free(from_cpu);
    sqz_context_free(from_card);
    sqz_model_free(on_cpu);
    sqz_model_free(on_card);
    free(text);
    remove(cpu_path);
    remove(card_path);
    return 0;
}

static struct sqz_session *open_session(struct sqz_model *model, const struct sqz_context *context, float budget)
{
    struct sqz_session_options options;
    struct sqz_session *session;
    struct sqz_error error;
    sqz_session_options_default(&options);
    options.budget = budget;
    must(sqz_session_create(&session, model, context, &options, &error), &error);
    return session;
}

/* ---- Tests -------------------------------------------------------------------------- */

/* Runs a question and an answer, forced, through both; the mean divergence of what comes after. */
static double run_both(struct sqz_session *a, struct sqz_session *b, size_t n_question, double *largest)
{
    struct sqz_error error;
    const int32_t *question = text + n_context;
    double sum = 0;
    *largest = 0;
    must(sqz_session_run(a, question, n_question, &error), &error);
    must(sqz_session_run(b, question, n_question, &error), &error);
    for (size_t i = 0; i < n_answer; i++) {
        const double kl = divergence(sqz_session_logits(a), sqz_session_logits(b));
        sum += kl;
        *largest = fmax(*largest, kl);
        must(sqz_session_run(a, question + n_question + i, 1, &error), &error);
        must(sqz_session_run(b, question + n_question + i, 1, &error), &error);
    }
    return sum / (double)n_answer;
}

static double compare(const char *what, struct sqz_model *m, const struct sqz_context *ca, struct sqz_model *n,
                      const struct sqz_context *cb, float budget, size_t n_question)
{
    struct sqz_session_stats sa, sb;
    struct sqz_session *a = open_session(m, ca, budget), *b = open_session(n, cb, budget);
    double largest;
    const double kl = run_both(a, b, n_question, &largest);
    sqz_session_get_stats(a, &sa);
    sqz_session_get_stats(b, &sb);
    printf("%-45s budget %.2f: mean KL %.2e, largest %.2e, read %.4f and %.4f\n", what, (double)budget, kl, largest,
           sqz_attention_stats_share(&sa.attention), sqz_attention_stats_share(&sb.attention));
    sqz_session_free(a);
    sqz_session_free(b);
    return kl;
}

/* llama.cpp's own run on the CPU and on the card: what their products alone differ by. */
static void test_llama(void **state)
{
    struct sqz_baseline *a, *b;
    struct sqz_error error;
    const size_t n = n_context + QUESTION_TOKENS + n_answer;
    double sum = 0, ours = 0;
    (void)state;
    must(sqz_baseline_create(&a, on_cpu, n, 1, &error), &error);
    must(sqz_baseline_create(&b, on_card, n, 1, &error), &error);
    struct sqz_session *s = open_session(on_card, from_card, 1);
    must(sqz_baseline_run(a, text, n_context + QUESTION_TOKENS, &error), &error);
    must(sqz_baseline_run(b, text, n_context + QUESTION_TOKENS, &error), &error);
    must(sqz_session_run(s, text + n_context, QUESTION_TOKENS, &error), &error);
    for (size_t i = 0; i < n_answer; i++) {
        const int32_t *token = text + n_context + QUESTION_TOKENS + i;
        sum += divergence(sqz_baseline_logits(a), sqz_baseline_logits(b));
        ours += divergence(sqz_baseline_logits(b), sqz_session_logits(s));
        must(sqz_baseline_run(a, token, 1, &error), &error);
        must(sqz_baseline_run(b, token, 1, &error), &error);
        must(sqz_session_run(s, token, 1, &error), &error);
    }
    printf("llama.cpp on the CPU and on the card: mean KL %.2e; llama.cpp and ours, dense, on the card: %.2e\n",
           sum / (double)n_answer, ours / (double)n_answer);
    noise = fmax(noise, sum / (double)n_answer);
    assert_true(ours / (double)n_answer < 2 * noise);
    sqz_baseline_free(a);
    sqz_baseline_free(b);
    sqz_session_free(s);
}

static void test_answers(void **state)
{
    (void)state;
    assert_true(compare("CPU and card, the CPU's context", on_cpu, from_cpu, on_card, from_cpu, 1, QUESTION_TOKENS) <
                2 * noise);
    assert_true(compare("CPU and card, the CPU's context", on_cpu, from_cpu, on_card, from_cpu, 0.1f, QUESTION_TOKENS) <
                close_enough + noise);
    assert_true(compare("CPU and card, the card's context", on_cpu, from_card, on_card, from_card, 0.1f,
                        QUESTION_TOKENS) < close_enough + noise);
    assert_true(compare("the CPU's and the card's context, on the card", on_card, from_cpu, on_card, from_card, 1,
                        QUESTION_TOKENS) < 2 * noise);
    assert_true(compare("the CPU's and the card's context, on the card", on_card, from_cpu, on_card, from_card, 0.1f,
                        QUESTION_TOKENS) < close_enough + noise);
}

/* Tokens that share a selection; then more own rows than there is room for at first. */
static void test_long_question(void **state)
{
    (void)state;
    assert_true(compare("a long question", on_cpu, from_cpu, on_card, from_cpu, 1, n_long) < 2 * noise);
    assert_true(compare("a long question", on_cpu, from_cpu, on_card, from_cpu, 0.1f, n_long) < 5 * close_enough);
}

/* Sessions of two contexts and two budgets in one batch, each as it is alone. */
static void test_users(void **state)
{
    const float budget[USERS] = {0.1f, 0.2f, 0.1f};
    struct sqz_context *const context[USERS] = {from_cpu, from_cpu, from_card};
    struct sqz_session *together[USERS], *alone[USERS];
    struct sqz_batch_item items[USERS];
    struct sqz_error error;
    double sum = 0;
    (void)state;
    for (size_t i = 0; i < USERS; i++) {
        together[i] = open_session(on_card, context[i], budget[i]);
        alone[i] = open_session(on_card, context[i], budget[i]);
    }
    for (size_t step = 0; step <= n_answer; step++) {
        for (size_t i = 0; i < USERS; i++) {
            const int32_t *from = text + n_context + 10 * i + (step ? QUESTION_TOKENS + step - 1 : 0);
            const size_t n = step ? 1 : QUESTION_TOKENS - 8 * i;
            items[i] = (struct sqz_batch_item){.session = together[i], .tokens = from, .n_tokens = n};
            must(sqz_session_run(alone[i], from, n, &error), &error);
        }
        must(sqz_batch_run(items, USERS, &error), &error);
        for (size_t i = 0; i < USERS; i++) {
            must(items[i].status, &items[i].error);
            sum += divergence(sqz_session_logits(alone[i]), sqz_session_logits(together[i]));
        }
    }
    printf("%d users together and alone: mean KL %.2e\n", USERS, sum / (double)(USERS * (n_answer + 1)));
    assert_true(sum / (double)(USERS * (n_answer + 1)) < 2 * noise);
    for (size_t i = 0; i < USERS; i++) {
        sqz_session_free(together[i]);
        sqz_session_free(alone[i]);
    }
}

/* Tokens of an answer are one CUDA graph from the third on, and the graph gives what the launches gave. */
static void test_replay(void **state)
{
    struct sqz_session *a = open_session(on_card, from_cpu, 0.1f), *b = open_session(on_card, from_cpu, 0.1f);
    const struct sqz_gpu_device_counts before = sqz_gpu_device_count();
    struct sqz_error error;
    const int32_t *token = text + n_context;
    (void)state;
    for (size_t i = 0; i < 20; i++) must(sqz_session_run(a, token + i, 1, &error), &error);
    const struct sqz_gpu_device_counts after = sqz_gpu_device_count();
    printf("20 tokens: %d captured, %d launched again, %d launch by launch\n", (int)(after.captured - before.captured),
           (int)(after.replayed - before.replayed), (int)(after.eager - before.eager));
    const int n_cards = 1 + on_card->layers[info.n_layer - 1].card;
    if (fake) assert_int_equal(after.eager - before.eager, 20 * n_cards);
    else assert_true(after.replayed - before.replayed >= 16);
    /* The same tokens with a question's launches in between, which nothing is captured of. */
    for (size_t i = 0; i < 20; i += 2) must(sqz_session_run(b, token + i, 2, &error), &error);
    assert_true(divergence(sqz_session_logits(a), sqz_session_logits(b)) < 2 * noise);
    sqz_session_free(a);
    sqz_session_free(b);
}

/* Two contexts where one fits: each is uploaded again when it is asked about, and answers as before. */
static void test_eviction(void **state)
{
    struct sqz_model_options options;
    struct sqz_model *small;
    struct sqz_error error;
    struct sqz_context_info context;
    (void)state;
    if (getenv("SQUEEZE_FAKE_OBSTACLE")) return; /* nothing goes to the card */
    sqz_context_get_info(from_cpu, &context);
    sqz_model_options_default(&options);
    options.n_gpu_layers = -1;
    uint32_t n_first = 0; /* layers on the first card */
    for (uint32_t l = 0; l < info.n_layer; l++) n_first += on_card->layers[l].card == 0;
    options.gpu_memory_bytes = (size_t)(context.file_bytes * 5 / 4) * n_first / info.n_layer + slack;
    must(sqz_model_open(&small, getenv("SQUEEZE_MODEL"), &options, &error), &error);
    struct sqz_session *a = open_session(small, from_cpu, 1), *b = open_session(small, from_card, 1);
    struct sqz_session *reference = open_session(on_card, from_cpu, 1);
    for (size_t i = 0; i < 3; i++) {
        must(sqz_session_run(a, text + n_context + i, 1, &error), &error);
        must(sqz_session_run(b, text + n_context + i, 1, &error), &error);
        must(sqz_session_run(reference, text + n_context + i, 1, &error), &error);
        assert_true(divergence(sqz_session_logits(reference), sqz_session_logits(a)) < 2 * noise);
    }
    const struct sqz_backend_cuda_use use = sqz_backend_cards_use(small->backend);
    printf("%zu MiB of %zu: %zu uploads, %zu evictions, %zu on the card\n", use.memory_bytes >> 20,
           use.limit_bytes >> 20, use.n_uploads, use.n_evictions, use.n_resident);
    assert_true(use.memory_bytes <= use.limit_bytes);
    assert_true(use.n_evictions >= 3);
    sqz_session_free(a);
    sqz_session_free(b);
    sqz_session_free(reference);
    sqz_model_free(small);
}

/* Half of the layers on the card, half on the CPU. */
static void test_some_layers(void **state)
{
    struct sqz_model_options options;
    struct sqz_model *half;
    struct sqz_error error;
    (void)state;
    sqz_model_options_default(&options);
    options.n_gpu_layers = (int)info.n_layer / 2;
    must(sqz_model_open(&half, getenv("SQUEEZE_MODEL"), &options, &error), &error);
    assert_true(compare("half of the layers on the card", on_cpu, from_cpu, half, from_cpu, 0.1f, QUESTION_TOKENS) <
                close_enough + noise);
    sqz_model_free(half);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_llama),       cmocka_unit_test(test_answers), cmocka_unit_test(test_long_question),
        cmocka_unit_test(test_users),       cmocka_unit_test(test_replay),  cmocka_unit_test(test_eviction),
        cmocka_unit_test(test_some_layers),
    };
    if (sqz_gpu_count() == 0) {
        printf("skipped: %s\n", sqz_gpu_reason());
        return 77;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    sqz_llama_log_take();
    fake = getenv("SQUEEZE_FAKE_GPU") != NULL;
    if (getenv("SQUEEZE_TEST_NOISE")) noise = atof(getenv("SQUEEZE_TEST_NOISE"));
    if (fake) n_context = 1200, n_answer = 4, n_long = 80, close_enough = 1, slack = (size_t)3 << 19;
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
