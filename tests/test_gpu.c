/*
 * The engine on a graphics card against the engine on the CPU: the same model, the
 * same contexts, answers forced along the same tokens. Skipped (77) without a card.
 *
 * Distributions differ by what llama.cpp's own products differ between the two;
 * llama.cpp's dense run on both shows how much that is. SQUEEZE_TEST_NOISE names the
 * least that is allowed for, of a model whose products are about the same on both.
 */
#define _POSIX_C_SOURCE 200809L /* setenv */
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
#include "build.h"
#include "divergence.h"
#include "codes.h"
#include "gpu.h"
#include "gpu_device.h"
#include "kernels.h"
#include "model.h"
#include "plan.h"
#include "random.h"
#include "session.h"
#include "sessions.h"
#include "squeeze.h"

enum { QUESTION_TOKENS = 32, USERS = 3 };

static struct sqz_model *on_cpu, *on_card;
static struct sqz_model_info info;
static struct sqz_context *from_cpu, *from_card;
static int32_t *text; /* of the source tree's own documentation */
static size_t n_text;
static char cpu_path[1024], card_path[1024];

/* The card is one of host memory (tests/fake_gpu), which is slow. */
static bool fake;
static size_t n_context = 6000, n_answer = 48, n_long = 260;
static size_t slack = (size_t)16 << 20; /* for all that is not contexts */
static double close_enough = 0.02;      /* divergence where a part of the context is read */
static double rounding =
    0; /* what rows in planes make of the model, and two that are relative to other centroids differ by */
static double noise = 0.005; /* and what llama.cpp's products alone make of the model, found by test_llama() */

/* KL(a || b) of two next-token distributions. */
static double divergence(const float *a, const float *b)
{
    return logits_divergence(a, b, info.n_vocab);
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

/* SQUEEZE_TEST_ROWS: the contexts' keys and values in planes. */
static enum sqz_row_format row_format(void)
{
    const char *rows = getenv("SQUEEZE_TEST_ROWS");
    return !rows ? SQZ_ROWS_F16 : strcmp(rows, "int4") ? SQZ_ROWS_INT4_4 : SQZ_ROWS_INT4;
}

static void prepare(struct sqz_model *model, struct sqz_context **context, const char *path)
{
    struct sqz_error error;
    struct sqz_prepare_options options;
    struct sqz_prepare_report report;
    sqz_prepare_options_default(&options);
    if (getenv("SQUEEZE_TEST_KEYS")) options.squeeze.keys = SQZ_INDEX_INT8;
    options.squeeze.rows = row_format();
    must(sqz_prepare_tokens(model, text, n_context, path, &options, &report, &error), &error);
    printf("prepared in %.2f s, reading %.2f s, %u layers on a card\n", report.total_seconds, report.read_seconds,
           (unsigned)(report.n_card_layers - report.n_host_layers));
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
    options.together = SQZ_TOGETHER_EACH; /* as on the CPU */
    must(sqz_model_open(&on_card, model, &options, &error), &error);
    sqz_model_get_info(on_card, &info);
    assert_int_equal(info.n_gpu_layers, info.n_layer + 1);
    uint32_t n_first = 0; /* layers on the first card */
    for (uint32_t l = 0; l < info.n_layer; l++) n_first += on_card->layers[l].card == 0;
    printf("layers on %d cards, %u on the first\n", 1 + on_card->layers[info.n_layer - 1].card, n_first);
    char *bytes = read_file(source, "docs/method.md", &n_bytes);
    must(sqz_model_tokenize(on_cpu, bytes, n_bytes, &text, &n_text, &error), &error);
    free(bytes);
    assert_true(n_text >= n_context + n_long + n_answer);
    snprintf(cpu_path, sizeof cpu_path, "%s/gpu_a.sqz.gguf", folder);
    snprintf(card_path, sizeof card_path, "%s/gpu_b.sqz.gguf", folder);
    prepare(on_cpu, &from_cpu, cpu_path);
    prepare(on_card, &from_card, card_path);
    printf("%d products of ours\n", (int)sqz_gpu_device_count().products);
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
    assert_true(ours / (double)n_answer < 2 * noise + rounding);
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
                        QUESTION_TOKENS) < 2 * noise + rounding);
    assert_true(compare("the CPU's and the card's context, on the card", on_card, from_cpu, on_card, from_card, 0.1f,
                        QUESTION_TOKENS) < close_enough + noise);
}

/* Single tokens correct the thresholds on the card as on the CPU, and the share that is read comes to the budget. What a
 * card reads for the sake of whole groups and all values counts there: its thresholds come to lie higher. */
static void test_budget(void **state)
{
    const float budget = 0.2f;
    const size_t n_tokens = fake ? 60 : 200;
    struct sqz_session *session[] = {open_session(on_cpu, from_cpu, budget), open_session(on_card, from_cpu, budget)};
    double share[2];
    struct sqz_error error;
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct sqz_session_stats stats;
        for (size_t t = 0; t < n_tokens; t++) {
            if (t == n_tokens / 2) sqz_session_clear_stats(session[i]);
            must(sqz_session_run(session[i], text + n_context + t, 1, &error), &error);
        }
        sqz_session_get_stats(session[i], &stats);
        share[i] = sqz_attention_stats_share(&stats.attention);
    }
    const double cpu = (double)session[0]->log_offset, card = (double)session[1]->log_offset;
    printf("a budget of %.2f: read %.4f and %.4f, thresholds times exp(%.3f) and exp(%.3f)\n",
           (double)session[1]->budget, share[0], share[1], cpu, card);
    if (session[1]->budget < 1) {
        assert_true(cpu != 0 && card != 0);
        assert_true(fabs(share[1] - (double)session[1]->budget) < 0.15 * (double)session[1]->budget);
        /* INT8 keys: shares are of other bytes there. In planes what the two look up differently is as many bytes of rows
         * that have a half or a quarter of F16's, so that thresholds give way by more. */
        const double rows[] = {[SQZ_ROWS_F16] = 0.1, [SQZ_ROWS_INT4_4] = 0.2, [SQZ_ROWS_INT4] = 0.4};
        const double below = getenv("SQUEEZE_TEST_KEYS") ? 0.4 : rows[row_format()];
        assert_true(card > cpu - below && (!fake || card < cpu + 0.5));
    }
    for (size_t i = 0; i < 2; i++) sqz_session_free(session[i]);
}

/* Own rows outgrow their room, and those that are there come along. */
static void test_room(void **state)
{
    struct sqz_session *a = open_session(on_cpu, from_cpu, 1), *b = open_session(on_card, from_cpu, 1);
    const size_t parts[] = {fake ? 50 : 200, fake ? 220 : 1000, 1};
    struct sqz_error error;
    (void)state;
    for (size_t i = 0, at = 0; i < 3; at += parts[i++]) {
        must(sqz_session_run(a, text + at, parts[i], &error), &error);
        must(sqz_session_run(b, text + at, parts[i], &error), &error);
    }
    assert_true(divergence(sqz_session_logits(a), sqz_session_logits(b)) < 10 * noise);
    sqz_session_free(a);
    sqz_session_free(b);
}

/* A session's own tokens, in runs of several lengths: questions longer than a block of own rows in planes, single tokens, and a
 * few together across a block's end. */
static const size_t own_parts[] = {200, 100, 1, 70, 8, 8, 1, 1};
enum { OWN_PARTS = sizeof own_parts / sizeof *own_parts, OWN_AGAIN = 4 /* of them, the last, that are run again */ };

/* Runs number first and on; the largest divergence of b from a. a may be NULL. */
static double run_own_parts(struct sqz_session *a, struct sqz_session *b, size_t first)
{
    struct sqz_error error;
    double most = 0;
    for (size_t i = 0, at = 0; i < OWN_PARTS; at += own_parts[i++]) {
        if (i < first) continue;
        must(sqz_session_run(b, text + n_context + at, own_parts[i], &error), &error);
        if (!a) continue;
        must(sqz_session_run(a, text + n_context + at, own_parts[i], &error), &error);
        most = fmax(most, divergence(sqz_session_logits(a), sqz_session_logits(b)));
    }
    return most;
}

/* Own rows of a context in planes are so, too, but for the newest: as on the CPU, where everything is read and where a part is,
 * and in less memory. A session that goes back and on again has the same as before. */
static void test_own_rows(void **state)
{
    const float budgets[] = {1, 0.2f};
    size_t n_again = 0;
    (void)state;
    if (row_format() == SQZ_ROWS_F16) return;
    for (size_t i = OWN_PARTS - OWN_AGAIN; i < OWN_PARTS; i++) n_again += own_parts[i];
    for (size_t i = 0; i < 2; i++) {
        struct sqz_session *a = open_session(on_cpu, from_cpu, budgets[i]),
                           *b = open_session(on_card, from_cpu, budgets[i]);
        const double most = run_own_parts(a, b, 0);
        const size_t bytes = info.n_vocab * sizeof(float);
        float *logits = malloc(bytes);
        memcpy(logits, sqz_session_logits(b), bytes);
        b->n_user -= n_again;
        run_own_parts(NULL, b, OWN_PARTS - OWN_AGAIN);
        const double again = divergence(logits, sqz_session_logits(b));
        printf("own rows in planes, budget %.2f: largest KL of the card's to the CPU's %.2e, gone back and on %.2e\n",
               (double)budgets[i], most, again);
        assert_true(most < (budgets[i] < 1 ? close_enough : 0) + noise);
        assert_true(again < (budgets[i] < 1 ? close_enough : 1e-9)); /* thresholds are corrected by what was read */
        free(logits);
        sqz_session_free(a);
        sqz_session_free(b);
    }
}

/* A run of many tokens goes back to where it began, as one that fails does: as if it had never been. Nowhere else. */
static void test_own_rows_kept(void **state)
{
    enum { BEFORE = 200, MANY = 712, LESS = 100, MORE = 70 };
    struct sqz_error error;
    (void)state;
    if (row_format() == SQZ_ROWS_F16) return;
    struct sqz_session *a = open_session(on_card, from_cpu, 1), *b = open_session(on_card, from_cpu, 1);
    const int32_t *asked = text + n_context;
    struct sqz_session_stats stats;
    must(sqz_session_run(a, asked, BEFORE, &error), &error);
    must(sqz_session_run(b, asked, BEFORE, &error), &error);
    must(sqz_session_run(b, asked, MANY, &error), &error); /* other tokens than a has there */
    sqz_session_get_stats(b, &stats);
    assert_true(stats.own_bytes > 0);
    b->n_user = BEFORE + LESS;
    assert_int_equal(sqz_session_run(b, asked, 1, &error), SQZ_ERROR_INTERNAL);
    assert_non_null(strstr(error.message, "are no more"));
    b->n_user = BEFORE;
    for (size_t at = BEFORE; at < BEFORE + 3 * MORE; at += MORE) { /* across row 256, where a block goes into planes */
        must(sqz_session_run(a, asked + at, MORE, &error), &error);
        must(sqz_session_run(b, asked + at, MORE, &error), &error);
        assert_true(divergence(sqz_session_logits(a), sqz_session_logits(b)) < 1e-9);
    }
    sqz_session_free(a);
    sqz_session_free(b);
}

/* More tokens than have a selection each, and fewer than share one, read everything: an answer's first token is as exact. */
static void test_middle_question(void **state)
{
    enum { TOKENS = 100 };
    struct sqz_session *some = open_session(on_card, from_cpu, 0.1f), *all = open_session(on_card, from_cpu, 1);
    struct sqz_error error;
    (void)state;
    must(sqz_session_run(some, text + n_context, TOKENS, &error), &error);
    must(sqz_session_run(all, text + n_context, TOKENS, &error), &error);
    assert_true(divergence(sqz_session_logits(some), sqz_session_logits(all)) < 1e-6);
    sqz_session_free(some);
    sqz_session_free(all);
}

/* What a question of n_long tokens reads of a context. */
static double share_of_long_question(struct sqz_model *model, float budget)
{
    struct sqz_session *s = open_session(model, from_cpu, budget);
    struct sqz_session_stats stats;
    struct sqz_error error;
    must(sqz_session_run(s, text + n_context, n_long, &error), &error);
    sqz_session_get_stats(s, &stats);
    sqz_session_free(s);
    return sqz_attention_stats_share(&stats.attention);
}

/* Of a short context everything is read at any budget. */
static bool reads_everything(void)
{
    struct sqz_context_info context;
    sqz_context_get_info(from_cpu, &context);
    return context.budget_floor > 0.5f;
}

/* Many tokens read everything, or share a selection where that is asked for; then more own rows than there is room for at
 * first. */
static void test_long_question(void **state)
{
    struct sqz_model_options options;
    struct sqz_model *one;
    struct sqz_error error;
    (void)state;
    assert_true(compare("a long question", on_cpu, from_cpu, on_card, from_cpu, 1, n_long) < 2 * noise);
    assert_true(compare("a long question", on_cpu, from_cpu, on_card, from_cpu, 0.1f, n_long) < 2 * close_enough);
    if (getenv("SQUEEZE_FAKE_OBSTACLE")) return; /* nothing goes to the card */
    sqz_model_options_default(&options);
    options.n_gpu_layers = -1;
    options.together = SQZ_TOGETHER_ONE;
    must(sqz_model_open(&one, getenv("SQUEEZE_MODEL"), &options, &error), &error);
    assert_true(compare("one that shares a selection", on_cpu, from_cpu, one, from_cpu, 0.1f, n_long) <
                2 * close_enough);
    const double all = share_of_long_question(on_card, 0.1f), shared = share_of_long_question(one, 0.1f);
    const double everything = share_of_long_question(on_card, 1); /* rows in planes are read as fewer bytes */
    printf("a question of %zu tokens reads %.3f, %.3f where its tokens share a selection\n", n_long, all, shared);
    assert_true(all > 0.999 * everything && shared > 0.05);
    assert_true(shared < 0.9 * everything || reads_everything());
    sqz_model_free(one);
}

/* Sessions of two contexts and two budgets in one batch, each as it is alone. */
static void test_users(void **state)
{
    const float budget[USERS] = {0.1f, 0.2f, 0.1f};
    struct sqz_context *const context[USERS] = {from_cpu, from_card, from_cpu};
    const size_t joined = sqz_backend_cards_use(on_card->backend).n_joined;
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
    const size_t n_joined = sqz_backend_cards_use(on_card->backend).n_joined - joined;
    printf("%d users together and alone: mean KL %.2e, %zu calls of several contexts\n", USERS,
           sum / (double)(USERS * (n_answer + 1)), n_joined);
    assert_true(sum / (double)(USERS * (n_answer + 1)) < 2 * noise);
    if (fake && !getenv("SQUEEZE_FAKE_OBSTACLE")) assert_int_equal(n_joined > 0, !getenv("SQUEEZE_FAKE_APART"));
    for (size_t i = 0; i < USERS; i++) {
        sqz_session_free(together[i]);
        sqz_session_free(alone[i]);
    }
}

/* Questions and answers of USERS sessions in one batch, and of one alone: how far theirs are from its, and what share of
 * the context they read. */
static double run_users(struct sqz_session **users, struct sqz_session **alone, double *read)
{
    struct sqz_batch_item items[USERS];
    struct sqz_error error;
    struct sqz_attention_stats stats = {0};
    double sum = 0;
    for (size_t step = 0; step <= n_answer; step++) {
        for (size_t i = 0; i < USERS; i++) {
            const int32_t *from = text + n_context + 10 * i + (step ? QUESTION_TOKENS + step - 1 : 0);
            const size_t n = step ? 1 : QUESTION_TOKENS - 8 * i;
            items[i] = (struct sqz_batch_item){.session = users[i], .tokens = from, .n_tokens = n};
            must(sqz_session_run(alone[i], from, n, &error), &error);
        }
        must(sqz_batch_run(items, USERS, &error), &error);
        for (size_t i = 0; i < USERS; i++) {
            must(items[i].status, &items[i].error);
            sum += divergence(sqz_session_logits(alone[i]), sqz_session_logits(users[i]));
        }
    }
    for (size_t i = 0; i < USERS; i++) {
        struct sqz_session_stats s;
        sqz_session_get_stats(users[i], &s);
        sqz_attention_stats_add(&stats, &s.attention);
    }
    *read = (double)stats.retained_keys / (double)stats.total_keys;
    return sum / (double)(USERS * (n_answer + 1));
}

static double users_from(struct sqz_model *model, float budget, struct sqz_model *beside, float beside_budget,
                         double *read)
{
    struct sqz_session *users[USERS], *alone[USERS];
    for (size_t i = 0; i < USERS; i++) {
        users[i] = open_session(model, from_cpu, budget);
        alone[i] = open_session(beside, from_cpu, beside_budget);
    }
    const double kl = run_users(users, alone, read);
    for (size_t i = 0; i < USERS; i++) {
        sqz_session_free(users[i]);
        sqz_session_free(alone[i]);
    }
    return kl;
}

/* However tokens go through a context together, none reads less than alone, and what is not read is as small a loss; a
 * pass that reads all is as exact as one. */
static void test_ways(void **state)
{
    static const char *const names[] = {"the cheapest way", "a selection each", "one selection", "all"};
    double read[4], alone[4], exact[4];
    (void)state;
    if (getenv("SQUEEZE_FAKE_OBSTACLE")) return; /* nothing goes to the card */
    for (int way = SQZ_TOGETHER_CHEAPEST; way <= SQZ_TOGETHER_ALL; way++) {
        struct sqz_model_options options;
        struct sqz_model *model;
        struct sqz_error error;
        sqz_model_options_default(&options);
        options.n_gpu_layers = -1;
        options.together = way;
        must(sqz_model_open(&model, getenv("SQUEEZE_MODEL"), &options, &error), &error);
        alone[way] = users_from(model, 0.1f, on_card, 0.1f, &read[way]);
        exact[way] = users_from(model, 0.1f, on_card, 1, &read[way]);
        printf("%d users, %s: read %.3f, mean KL to each alone %.2e, to all of it %.2e\n", USERS, names[way], read[way],
               alone[way], exact[way]);
        sqz_model_free(model);
    }
    assert_true(alone[SQZ_TOGETHER_EACH] < 2 * noise && exact[SQZ_TOGETHER_ALL] < 2 * noise);
    assert_true(read[SQZ_TOGETHER_EACH] <= read[SQZ_TOGETHER_ONE] && read[SQZ_TOGETHER_ONE] <= read[SQZ_TOGETHER_ALL]);
    assert_true(read[SQZ_TOGETHER_ALL] == 1 && read[SQZ_TOGETHER_CHEAPEST] >= read[SQZ_TOGETHER_EACH]);
    /* What others read of a cluster leaves a rest whose mean value is not the cluster's. */
    for (int way = SQZ_TOGETHER_CHEAPEST; way <= SQZ_TOGETHER_ALL; way++)
        assert_true(exact[way] < exact[SQZ_TOGETHER_EACH] + 2 * noise + 5e-4);
}

/* Tokens of an answer are one CUDA graph from the third on, and the graph gives what the launches gave. */
static void test_replay(void **state)
{
    struct sqz_session *a = open_session(on_card, from_cpu, 0.1f), *b = open_session(on_card, from_cpu, 0.1f);
    const struct sqz_gpu_device_counts before = sqz_gpu_device_count();
    struct sqz_error error;
    const int32_t *token = text + n_context;
    (void)state;
    if (sqz_gpu_by_callback()) skip(); /* nothing is captured that way */
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

/* Drafts and verifying batches of an exact answer take turns; what each of them launches is captured once and stays. */
static void test_replay_of_drafts(void **state)
{
    enum { N_ANSWER = 96 };
    struct sqz_session_options options;
    struct sqz_session_stats stats;
    struct sqz_session *s, *plain;
    struct sqz_error error;
    (void)state;
    if (getenv("SQUEEZE_TEST_KEYS") || row_format() == SQZ_ROWS_INT4 || reads_everything())
        return; /* no exact answers */
    plain = open_session(on_card, from_cpu, 1);
    sqz_session_options_default(&options);
    options.exact = row_format() == SQZ_ROWS_INT4_4 ? SQZ_EXACT_INT8 : SQZ_EXACT_F16;
    options.draft = SQZ_DRAFT_SELF;
    options.draft_tokens = 4;
    options.draft_steady = true;
    must(sqz_session_create(&s, on_card, from_cpu, &options, &error), &error);
    must(sqz_session_run(s, text + n_context, 8, &error), &error);
    must(sqz_session_run(plain, text + n_context, 8, &error), &error);
    const struct sqz_gpu_device_counts before = sqz_gpu_device_count();
    double most = 0;
    for (size_t i = 0; i < N_ANSWER; i++) {
        bool ended;
        const int32_t token = sqz_session_sample(s, &ended);
        must(sqz_session_run(s, &token, 1, &error), &error);
        must(sqz_session_run(plain, &token, 1, &error), &error);
        const double kl = divergence(sqz_session_logits(plain), sqz_session_logits(s));
        if (kl > most) most = kl;
    }
    const struct sqz_gpu_device_counts after = sqz_gpu_device_count();
    sqz_session_get_stats(s, &stats);
    printf("%d exact tokens: %d cycles, kept %d of %d, %d captured, %d launched again, %d launch by launch, KL %.2e\n",
           N_ANSWER, (int)stats.speculation.n_cycles, (int)stats.speculation.n_accepted,
           (int)stats.speculation.n_tested, (int)(after.captured - before.captured),
           (int)(after.replayed - before.replayed), (int)(after.eager - before.eager), most);
    assert_true(stats.speculation.n_cycles > 0 && stats.speculation.n_accepted > 0);
    assert_true(most < 20 * noise);
    /* Two kinds of runs and the plain session's: the first of each eagerly, and again where own rows outgrow a step. */
    const int n_cards = 1 + on_card->layers[info.n_layer - 1].card;
    if (!fake && !sqz_gpu_by_callback()) assert_true(after.eager - before.eager <= (uint64_t)(8 * n_cards));
    sqz_session_free(s);
    sqz_session_free(plain);
}

/* What a context takes of all cards. */
static size_t bytes_on_card(const struct sqz_context *context)
{
    const size_t before = sqz_backend_cards_use(on_card->backend).memory_bytes;
    struct sqz_session *session = open_session(on_card, context, 1);
    const size_t with = sqz_backend_cards_use(on_card->backend).memory_bytes;
    sqz_session_free(session);
    return with - before;
}

/* Two contexts where one fits: each is uploaded again when it is asked about, and answers as before. */
static void test_eviction(void **state)
{
    struct sqz_model_options options;
    struct sqz_model *small;
    struct sqz_error error;
    (void)state;
    if (getenv("SQUEEZE_FAKE_OBSTACLE")) return; /* nothing goes to the card */
    sqz_model_options_default(&options);
    options.n_gpu_layers = -1;
    uint32_t n_first = 0; /* layers on the first card */
    for (uint32_t l = 0; l < info.n_layer; l++) n_first += on_card->layers[l].card == 0;
    const size_t bytes = bytes_on_card(from_cpu) * n_first / info.n_layer;
    if (bytes * 3 / 4 <= slack) return; /* two fit into what follows */
    options.gpu_memory_bytes = bytes * 5 / 4 + slack;
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

/* What a context loses at a budget of 0.1 against everything, all of it on the CPU. */
static double lost_on_cpu(const char *what, const struct sqz_context *context)
{
    struct sqz_session *all = open_session(on_cpu, context, 1), *some = open_session(on_cpu, context, 0.1f);
    double largest;
    const double kl = run_both(all, some, QUESTION_TOKENS, &largest);
    printf("%-45s 0.1 against everything, on the CPU: mean KL %.2e, largest %.2e\n", what, kl, largest);
    sqz_session_free(all);
    sqz_session_free(some);
    return kl;
}

/* A context that was prepared on the card is whole, and as good as the CPU's for who asks on the CPU. */
static void test_prepared(void **state)
{
    const struct sqz_context_options options = {.size = sizeof options, .verify = SQZ_VERIFY_ALL};
    struct sqz_context *again;
    struct sqz_context_info a, b;
    struct sqz_error error;
    (void)state;
    must(sqz_context_open(&again, card_path, &options, &error), &error);
    sqz_context_free(again);
    sqz_context_get_info(from_cpu, &a);
    sqz_context_get_info(from_card, &b);
    assert_int_equal(a.file_bytes, b.file_bytes);
    printf("least budgets %.4f and %.4f\n", (double)a.budget_floor, (double)b.budget_floor);
    assert_true(fabs((double)a.budget_floor - (double)b.budget_floor) < 0.1 * (double)a.budget_floor);
    /* Of some dozens of tokens another clustering makes more or less by itself. */
    const double cpu = lost_on_cpu("the CPU's context", from_cpu), card = lost_on_cpu("the card's context", from_card);
    assert_true(card < 1.5 * cpu + fmax(noise, 0.005));
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

static uint64_t copied_bytes(const struct sqz_model *model)
{
    struct sqz_model_info now;
    sqz_model_get_info(model, &now);
    return now.weight_copies_bytes;
}

/* With 16-bit copies of its quantised weights, whatever number of tokens they are taken for, a model answers as without;
 * llama.cpp's own run has none of them. */
static void test_copies(void **state)
{
    const bool quantised = info.size_bytes < info.n_parameters * 3 / 2;
    struct sqz_model_options options;
    struct sqz_model *copied;
    struct sqz_error error;
    (void)state;
    if (sqz_gpu_by_callback()) skip(); /* graphs are not ours to change */
    sqz_model_options_default(&options);
    options.n_gpu_layers = -1;
    options.weight_copies = SQZ_COPIES_ALWAYS;
    setenv("SQUEEZE_GPU_COPIES_FROM", "2", true);
    must(sqz_model_open(&copied, getenv("SQUEEZE_MODEL"), &options, &error), &error);
    assert_int_equal(copied_bytes(copied), 0);
    assert_true(compare("16-bit copies of weights", on_cpu, from_cpu, copied, from_cpu, 1, QUESTION_TOKENS) <
                close_enough + noise);
    double read;
    const double kl = users_from(copied, 1, on_card, 1, &read);
    printf("%d users with %.1f MiB of copies: mean KL %.2e to each alone without\n", USERS,
           (double)copied_bytes(copied) / 0x1p20, kl);
    assert_true(kl < 5 * noise);
    assert_true(quantised == (copied_bytes(copied) > info.size_bytes));
    assert_int_equal(copied_bytes(on_card), 0);
    unsetenv("SQUEEZE_GPU_COPIES_FROM");
    sqz_model_free(copied);
}

/* ---- Layers that are built on the card ---------------------------------------------------- */

enum { LAYER_ROWS = 3000, LAYER_HEADS = 4, LAYER_KV = 2, LAYER_QUERIES = 20 };

struct made_layer {
    struct sqz_layer_input input;
    uint16_t *raw; /* the keys before they are sorted */
    struct sqz_layer layer;
};

static uint16_t *f16_copy(const float *x, size_t n)
{
    uint16_t *out = malloc(n * sizeof *out);
    sqz_kernels_get()->f32_to_f16(out, x, n);
    return out;
}

static float normal(struct sqz_random *random)
{
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += sqz_random_unit(random);
    return (float)sum;
}

/* Keys around 60 centres far from 0, some dimensions wider than others; queries near keys. */
static struct made_layer make_layer(size_t d, const struct sqz_squeeze_options *options)
{
    const size_t n = (size_t)LAYER_KV * LAYER_ROWS * d, n_queries = (size_t)LAYER_QUERIES * LAYER_HEADS * d;
    struct sqz_random random;
    struct made_layer m = {0};
    float *keys = malloc(n * sizeof *keys), *values = malloc(n * sizeof *values), *centres = malloc(60 * d * 4);
    float *queries = malloc(n_queries * sizeof *queries);
    struct sqz_error error;
    sqz_random_seed(&random, 7);
    for (size_t i = 0; i < 60 * d; i++) centres[i] = 3.0f * normal(&random) + (i % d == 3 ? 20.0f : 0.0f);
    for (size_t i = 0; i < n; i++) {
        const size_t centre = (i / d * 7919 + i / d / 13) % 60;
        keys[i] = centres[centre * d + i % d] + (i % d % 4 ? 0.3f : 1.5f) * normal(&random);
        values[i] = normal(&random);
    }
    for (size_t i = 0; i < n_queries; i++)
        queries[i] =
            i % d == 3 ? 0 : 0.09f * (keys[i / d * 131 % (LAYER_KV * LAYER_ROWS) * d + i % d] + normal(&random));
    m.raw = f16_copy(keys, n);
    m.input = (struct sqz_layer_input){.shape = {LAYER_HEADS, LAYER_KV, (uint32_t)d, 1.0f / sqrtf((float)d)},
                                       .keys = f16_copy(keys, n),
                                       .values = f16_copy(values, n),
                                       .n_rows = LAYER_ROWS,
                                       .queries = f16_copy(queries, n_queries),
                                       .n_queries = LAYER_QUERIES};
    must(sqz_layers_plan(&m.layer, &m.input, 1, options, &error), &error);
    sqz_layer_take_queries(&m.layer, &m.input);
    free(keys);
    free(values);
    free(centres);
    free(queries);
    return m;
}

static void free_made(struct made_layer *m)
{
    sqz_layer_release(&m->layer);
    free(m->input.keys);
    free(m->input.values);
    free((void *)(uintptr_t)m->input.queries);
    free(m->raw);
}

/* The layer on the card is built and counted there, and comes back into the made one. */
static void build_on_card(struct made_layer *m, const struct sqz_squeeze_options *options, struct sqz_curve_sums *sums)
{
    const struct sqz_gpu_calls *calls = sqz_gpu_calls_of();
    const size_t rows = (size_t)LAYER_KV * LAYER_ROWS * m->input.shape.head_dim * 2;
    const size_t index = sqz_layer_index_bytes(&m->layer), span = sqz_layer_index_span(&m->layer);
    const size_t queries = (size_t)LAYER_QUERIES * LAYER_HEADS * m->input.shape.head_dim * 2;
    calls->use(0);
    void *stream = calls->create_stream();
    char *memory = calls->allocate(index), *keys = calls->allocate(rows), *values = calls->allocate(rows);
    struct sqz_curve_sums *counted = calls->allocate(LAYER_KV * sizeof *counted);
    struct sqz_layer layer = sqz_layer_index_in(&m->layer, memory);
    layer.space = SQZ_SPACE_CUDA;
    layer.keys.data = keys;
    layer.values.data = values;
    struct sqz_gpu_build build = {.layer = &layer, .options = options, .seed = 3};
    struct sqz_gpu_count count = {.layer = &layer, .fit_variance = true, .sums = counted};
    build.workspace_bytes = calls->build_workspace_bytes(&build);
    count.workspace_bytes = calls->count_workspace_bytes(&count);
    assert_true(build.workspace_bytes && count.workspace_bytes);
    build.workspace = calls->allocate(build.workspace_bytes);
    count.workspace = calls->allocate(count.workspace_bytes);
    assert_true(calls->put(keys, m->input.keys, rows, stream) && calls->put(values, m->input.values, rows, stream));
    assert_true(calls->put((void *)(uintptr_t)layer.queries, m->layer.queries, queries, stream));
    assert_int_equal(calls->build(&build, stream), SQZ_OK);
    assert_int_equal(calls->count_layer(&count, stream), SQZ_OK);
    assert_true(calls->get(m->input.keys, keys, rows, stream) && calls->get(m->input.values, values, rows, stream));
    assert_true(calls->get((void *)(uintptr_t)m->layer.position, layer.position, span, stream));
    assert_true(calls->get(sums, counted, LAYER_KV * sizeof *sums, stream) && calls->wait(stream));
    void *all[] = {memory, keys, values, counted, build.workspace, count.workspace};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) calls->release(all[i]);
    calls->free_stream(stream);
}

/* Every row once, at the place that `position` says, and centroids of the right size where their keys are. Returns the
 * mean squared distance of the keys to their centroids. */
static double check_sorted(const struct made_layer *m)
{
    const struct sqz_layer *l = &m->layer;
    const size_t d = l->shape.head_dim, n = l->n_rows;
    const uint32_t c_n = l->level[0].n_clusters;
    float row[256], centroid[256];
    double all = 0;
    for (size_t h = 0; h < LAYER_KV; h++) {
        const struct sqz_rows rows = sqz_rows_of_head(&l->keys, n, d, h);
        const struct sqz_rows centroids = sqz_rows_of_head(&l->level[0].centroids, c_n, d, h);
        const uint32_t *offset = l->level[0].offset + h * (c_n + 1);
        bool *seen = calloc(n, sizeof *seen);
        for (size_t i = 0; i < n; i++) {
            const size_t from = (size_t)l->position[h * n + i];
            assert_true(from < n && !seen[from]);
            seen[from] = true;
            assert_memory_equal(m->input.keys + (h * n + i) * d, m->raw + (h * n + from) * d, d * 2);
        }
        free(seen);
        assert_int_equal(offset[c_n], n - l->n_fixed);
        for (uint32_t c = 0; c < c_n; c++) {
            double sum[256] = {0}, squared = 0;
            const double size = offset[c + 1] - offset[c];
            assert_true(offset[c + 1] > offset[c]);
            sqz_rows_to_f32(centroid, &centroids, c, 1, d);
            for (size_t i = offset[c]; i < offset[c + 1]; i++) {
                sqz_rows_to_f32(row, &rows, l->n_fixed + i, 1, d);
                for (size_t j = 0; j < d; j++) {
                    sum[j] += (double)row[j] / size;
                    squared += ((double)row[j] - (double)centroid[j]) * ((double)row[j] - (double)centroid[j]) / size;
                }
            }
            /* INT8: half a step of a 127th of the largest difference to the mean key, which is below 25 here. */
            for (size_t j = 0; j < d; j++) assert_true(fabs(sum[j] - (double)centroid[j]) < 0.11);
            const double variance = (double)l->level[0].variance[h * c_n + c];
            assert_true(fabs(squared - variance) < 0.02 * squared + 0.11 * 0.11 * (double)d);
            all += squared * size / (double)(LAYER_KV * (n - l->n_fixed));
        }
    }
    return all;
}

/* How far the logits that codes give lie from the exact ones. */
static double code_error(const struct sqz_layer *l)
{
    const size_t d = l->shape.head_dim, n = l->n_rows - l->n_fixed;
    const uint32_t c_n = l->level[0].n_clusters;
    float *logits = malloc(n * sizeof *logits), *tables = malloc(sqz_code_table_floats(&l->codes, 1) * sizeof *tables);
    float query[256], row[256], deviation;
    double error = 0;
    for (uint32_t t = 0; t < LAYER_QUERIES; t++)
        for (uint32_t q = 0; q < LAYER_HEADS; q++) {
            const uint32_t h = q / (LAYER_HEADS / LAYER_KV), *offset = l->level[0].offset + h * (c_n + 1);
            const struct sqz_rows keys = sqz_rows_of_head(&l->keys, l->n_rows, d, h);
            const struct sqz_rows centroids = sqz_rows_of_head(&l->level[0].centroids, c_n, d, h);
            sqz_kernels_get()->f16_to_f32(query, l->queries + (t * LAYER_HEADS + q) * d, d);
            sqz_code_tables(tables, &deviation, l, h, query, 1);
            for (uint32_t c = 0; c < c_n; c++) {
                sqz_rows_to_f32(row, &centroids, c, 1, d);
                const float x = l->shape.scale * sqz_kernels_get()->dot(query, row, d);
                for (uint32_t i = offset[c]; i < offset[c + 1]; i++) logits[i] = x;
            }
            sqz_code_logits(logits, n, tables, 1, l, h, 0, n);
            for (size_t i = 0; i < n; i++) {
                sqz_rows_to_f32(row, &keys, l->n_fixed + i, 1, d);
                const double e = (double)(l->shape.scale * sqz_kernels_get()->dot(query, row, d)) - (double)logits[i];
                error += e * e;
            }
        }
    free(logits);
    free(tables);
    return error / ((double)n * LAYER_QUERIES * LAYER_HEADS);
}

/* The curves of what the card counted against the CPU's of the same layer. Returns how many heads have the same gain. */
static int check_counts(struct made_layer *m, const struct sqz_curve_sums *on_the_card)
{
    struct sqz_layer *l = &m->layer;
    float share[2][SQZ_CURVE_POINTS], lost[2][SQZ_CURVE_POINTS], tail[2][SQZ_CURVE_POINTS], gain[2];
    void *workspace = malloc(sqz_calibrate_workspace_bytes(l));
    double most[3] = {0};
    int same = 0;
    for (uint32_t h = 0; h < LAYER_KV; h++) {
        struct sqz_curve_sums sums;
        gain[0] = sqz_choose_variance_gain(l, h, workspace);
        gain[1] = l->variance_gain[h];
        same += gain[0] == gain[1];
        sqz_count_head(l, h, gain[1], &sums, workspace);
        for (int i = 0; i < 2; i++) {
            const struct sqz_head_curve curve = {share[i], lost[i], tail[i], &gain[i]};
            sqz_curve_of_sums(l, i ? &on_the_card[h] : &sums, &curve);
        }
        printf("  head %u: gains %g and %g\n", h, (double)gain[0], (double)gain[1]);
        for (size_t t = 0; t < SQZ_CURVE_POINTS; t++) {
            most[0] = fmax(most[0], fabs((double)share[0][t] - (double)share[1][t]));
            most[1] = fmax(most[1], fabs((double)lost[0][t] - (double)lost[1][t]));
            if (lost[0][t] > 1e-3f) most[2] = fmax(most[2], fabs((double)tail[0][t] - (double)tail[1][t]));
        }
    }
    free(workspace);
    printf("  curves differ by %.1e in share, %.1e in lost mass, %.1e in tail gain\n", most[0], most[1], most[2]);
    /* Queries are INT16 and centroids INT8 there, both F16 here: a few keys lie on the other side of a point. */
    assert_true(most[0] < 0.01);
    assert_true(most[1] < 0.01);
    assert_true(most[2] < 0.1);
    return same;
}

static void test_built_layers(void **state)
{
    static const struct {
        size_t d;
        uint32_t words;
        enum sqz_index index;
        enum sqz_group group;
    } cases[] = {{64, 2, SQZ_INDEX_INT8, SQZ_GROUP_MAX},
                 {96, 1, SQZ_INDEX_INT8, SQZ_GROUP_MEAN},
                 {128, 0, SQZ_INDEX_F16, SQZ_GROUP_MAX},
                 {128, 2, SQZ_INDEX_INT8, SQZ_GROUP_MAX},
                 {256, 2, SQZ_INDEX_INT8, SQZ_GROUP_MAX}};
    int n_same = 0;
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct sqz_squeeze_options options;
        struct sqz_curve_sums sums[LAYER_KV];
        struct sqz_error error;
        sqz_squeeze_options_default(&options, SQZ_RULE_DEFAULT);
        options.code_words = cases[i].words;
        options.index = cases[i].index;
        options.group = cases[i].group;
        struct made_layer here = make_layer(cases[i].d, &options), there = make_layer(cases[i].d, &options);
        must(sqz_layers_cluster(&here.layer, &here.input, 1, &options, 1, NULL, NULL, &error), &error);
        build_on_card(&there, &options, sums);
        const double a = check_sorted(&here), b = check_sorted(&there);
        printf("head dimension %zu, %u words: mean squared distance %.4f on the CPU, %.4f on the card\n", cases[i].d,
               cases[i].words, a, b);
        assert_true(b < 1.15 * a); /* of so few clusters where they begin makes some hundredths */
        if (cases[i].words) {
            const double x = code_error(&here.layer), y = code_error(&there.layer);
            printf("  squared error of the codes' logits %.4f and %.4f\n", x, y);
            assert_true(y < 1.1 * x);
        }
        n_same += check_counts(&there, sums);
        free_made(&here);
        free_made(&there);
    }
    assert_true(n_same >= 7); /* of 10: between two gains that lose the same, rounding chooses */
}

/* Exact answers of a context of 4 + 4 bits, drafted on the upper planes: what is chosen is what all rows choose token by
 * token, or as likely to within what batches round otherwise, and drafts read less than both planes have. */
static void test_exact(void **state)
{
    struct sqz_session_options options;
    struct sqz_session_stats stats;
    struct sqz_session *exact, *plain = open_session(on_card, from_cpu, 1);
    struct sqz_error error;
    (void)state;
    if (row_format() != SQZ_ROWS_INT4_4 || reads_everything()) {
        sqz_session_free(plain);
        return;
    }
    sqz_session_options_default(&options);
    options.exact = SQZ_EXACT_INT8;
    options.draft = SQZ_DRAFT_SELF;
    options.draft_tokens = 4;
    options.draft_steady = true;
    options.draft_budget = 0.2f;
    must(sqz_session_create(&exact, on_card, from_cpu, &options, &error), &error);
    must(sqz_session_run(exact, text + n_context, QUESTION_TOKENS, &error), &error);
    must(sqz_session_run(plain, text + n_context, QUESTION_TOKENS, &error), &error);
    double largest = 0;
    for (size_t i = 0; i < n_answer; i++) {
        const float *logits = sqz_session_logits(plain);
        bool end;
        const int32_t token = sqz_session_sample(exact, &end);
        float most = -INFINITY;
        for (size_t v = 0; v < info.n_vocab; v++) most = fmaxf(most, logits[v]);
        largest = fmax(largest, (double)(most - logits[token]));
        must(sqz_session_run(exact, &token, 1, &error), &error);
        must(sqz_session_run(plain, &token, 1, &error), &error);
    }
    sqz_session_get_stats(exact, &stats);
    const double drafts = sqz_attention_stats_share(&stats.speculation.draft),
                 all = sqz_attention_stats_share(&stats.attention);
    printf(
        "exact to 4 + 4 bits: %llu of %llu drafted tokens kept, a lead of %.3f at most, drafts read %.3f of F16, exact "
        "runs %.3f\n",
        (unsigned long long)stats.speculation.n_accepted, (unsigned long long)stats.speculation.n_drafted, largest,
        drafts, all);
    assert_int_equal(stats.speculation.draft_rows, SQZ_DRAFT_ROWS_UPPER);
    assert_true(largest <= 0.5);
    assert_true(stats.speculation.n_drafted > 0 && drafts > 0 && drafts < 0.6 * all && all < 0.65);
    sqz_session_free(exact);
    sqz_session_free(plain);
}

/* Arguments: which tests to leave out, "test_built_*"; which to run alone. */
int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_llama),
        cmocka_unit_test(test_answers),
        cmocka_unit_test(test_long_question),
        cmocka_unit_test(test_middle_question),
        cmocka_unit_test(test_users),
        cmocka_unit_test(test_replay),
        cmocka_unit_test(test_replay_of_drafts),
        cmocka_unit_test(test_eviction),
        cmocka_unit_test(test_prepared),
        cmocka_unit_test(test_some_layers),
        cmocka_unit_test(test_ways),
        cmocka_unit_test(test_copies),
        cmocka_unit_test(test_built_layers),
        cmocka_unit_test(test_budget),
        cmocka_unit_test(test_room),
        cmocka_unit_test(test_own_rows),
        cmocka_unit_test(test_own_rows_kept),
        cmocka_unit_test(test_exact),
    };
    if (sqz_gpu_count() == 0) {
        printf("skipped: %s\n", sqz_gpu_reason());
        return 77;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    sqz_llama_log_take();
    fake = getenv("SQUEEZE_FAKE_GPU") != NULL;
    if (row_format() != SQZ_ROWS_F16) rounding = row_format() == SQZ_ROWS_INT4 ? 0.05 : 0.01;
    if (getenv("SQUEEZE_TEST_NOISE")) noise = atof(getenv("SQUEEZE_TEST_NOISE"));
    if (fake) n_context = 1200, n_answer = 4, slack = (size_t)3 << 19;
    if (getenv("SQUEEZE_TEST_TOKENS")) n_context = (size_t)atol(getenv("SQUEEZE_TEST_TOKENS"));
    if (argc > 1) cmocka_set_skip_filter(argv[1]);
    if (argc > 2) cmocka_set_test_filter(argv[2]);
    const int failed = cmocka_run_group_tests(tests, set_up, tear_down);
    printf("%d groups of products of few tokens\n", (int)sqz_gpu_device_count().groups);
    return failed;
}
