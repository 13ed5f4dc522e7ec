/*
 * Cases of the engine that hold for any model: our dense run against
 * llama.cpp's own, batching, sessions side by side, limits. Included by the
 * test of each model with MODEL_VARIABLE, the environment variable that names
 * its file, and N_CONTEXT_TOKENS, the length of the context to prepare.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backend_cpu.h"
#include "baseline.h"
#include "divergence.h"
#include "model.h"
#include "squeeze.h"

enum { ANSWER_TOKENS = 12, N_CASE_TOKENS = N_CONTEXT_TOKENS + 24 };

static struct sqz_model *model;
static struct sqz_model_info model_info;
static struct sqz_context *context;
static struct sqz_context_info context_info;
static int32_t *text_tokens;
static char context_path[1024], second_path[1024];

static void must(enum sqz_status status, const struct sqz_error *error)
{
    if (status != SQZ_OK) fail_msg("%s: %s", sqz_status_name(status), error->message);
}

static int32_t likeliest(const float *logits)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < model_info.n_vocab; i++)
        if (logits[i] > logits[best]) best = i;
    return (int32_t)best;
}

/* KL(a || b) of two next-token distributions. */
static double divergence(const float *a, const float *b)
{
    return logits_divergence(a, b, model_info.n_vocab);
}

static int set_up(void **state)
{
    struct sqz_error error;
    struct sqz_prepare_options options;
    struct sqz_prepare_report report;
    const char *path = getenv(MODEL_VARIABLE), *folder = getenv("SQUEEZE_TEST_FOLDER");
    size_t n = 0;
    (void)state;
    if (!path || !folder) {
        fprintf(stderr, "%s and SQUEEZE_TEST_FOLDER must name the model and a folder to write into\n", MODEL_VARIABLE);
        return 1;
    }
    sqz_llama_log_take();
    if (sqz_model_open(&model, path, NULL, &error) != SQZ_OK) {
        fprintf(stderr, "%s\n", error.message);
        return 1;
    }
    sqz_model_get_info(model, &model_info);
    /* A text with enough variety for attention to have something to find: counted sentences. */
    char *text = malloc(1 << 20);
    size_t length = 0;
    for (int i = 0; length < (1 << 16); i++)
        length += (size_t)sprintf(text + length, "Box %d, in row %d, holds %d red and %d green stones. ", i, i * 7 % 31,
                                  i * i % 17, i * 5 % 23);
    if (sqz_model_tokenize(model, text, length, &text_tokens, &n, &error) != SQZ_OK || n < N_CASE_TOKENS) {
        fprintf(stderr, "%zu tokens: %s\n", n, error.message);
        return 1;
    }
    free(text);
    snprintf(context_path, sizeof context_path, "%s/engine.sqz.gguf", folder);
    snprintf(second_path, sizeof second_path, "%s/second.sqz.gguf", folder);
    sqz_prepare_options_default(&options);
    if (sqz_prepare_tokens(model, text_tokens, N_CONTEXT_TOKENS, context_path, &options, &report, &error) != SQZ_OK ||
        sqz_context_open(&context, context_path, NULL, &error) != SQZ_OK) {
        fprintf(stderr, "%s\n", error.message);
        return 1;
    }
    sqz_context_get_info(context, &context_info);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    sqz_context_free(context);
    sqz_model_free(model);
    free(text_tokens);
    unlink(context_path);
    unlink(second_path);
    return 0;
}

static struct sqz_session *new_session(const struct sqz_context *of, float budget)
{
    struct sqz_error error;
    struct sqz_session_options options;
    struct sqz_session *session;
    sqz_session_options_default(&options);
    options.budget = budget;
    must(sqz_session_create(&session, model, of, &options, &error), &error);
    return session;
}

static const int32_t *question(size_t *n)
{
    *n = 24;
    return text_tokens + N_CONTEXT_TOKENS;
}

/* Our dense attention, with the context read by us and stored in F16, gives llama.cpp's own distributions up to the
 * rounding of its F16 sums and 8-bit activations: a mean KL of 0.004 was measured on the default model. */
static void test_dense_is_llama(void **state)
{
    struct sqz_error error;
    struct sqz_baseline *baseline;
    struct sqz_session *session = new_session(context, 1.0f);
    size_t n, n_equal = 0;
    const int32_t *asked = question(&n);
    double kl = 0;
    (void)state;
    must(sqz_baseline_create(&baseline, model, N_CASE_TOKENS + ANSWER_TOKENS, 1.0f, &error), &error);
    must(sqz_baseline_run(baseline, text_tokens, N_CONTEXT_TOKENS, &error), &error);
    must(sqz_baseline_run(baseline, asked, n, &error), &error);
    must(sqz_session_run(session, asked, n, &error), &error);
    for (int i = 0; i < ANSWER_TOKENS; i++) {
        const float *theirs = sqz_baseline_logits(baseline), *ours = sqz_session_logits(session);
        const int32_t token = likeliest(theirs);
        kl += divergence(theirs, ours) / ANSWER_TOKENS;
        n_equal += likeliest(ours) == token;
        must(sqz_baseline_run(baseline, &token, 1, &error), &error);
        must(sqz_session_run(session, &token, 1, &error), &error);
    }
    print_message("dense against llama.cpp: mean KL %.5f, top token equal %zu of %d\n", kl, n_equal, ANSWER_TOKENS);
    if (!(kl <= 0.02) || n_equal + 1 < ANSWER_TOKENS)
        fail_msg("mean KL %.5f (allowed 0.02), top token equal %zu of %d", kl, n_equal, ANSWER_TOKENS);
    sqz_session_free(session);
    sqz_baseline_free(baseline);
}

/* The answer to a question does not depend on how its tokens were cut into calls. */
static void test_cut_into_calls(void **state)
{
    struct sqz_error error;
    struct sqz_session *whole = new_session(context, 1.0f), *pieces = new_session(context, 1.0f);
    size_t n;
    const int32_t *asked = question(&n);
    (void)state;
    must(sqz_session_run(whole, asked, n, &error), &error);
    for (size_t i = 0; i < n; i++) must(sqz_session_run(pieces, asked + i, 1, &error), &error);
    const double kl = divergence(sqz_session_logits(whole), sqz_session_logits(pieces));
    if (!(kl <= 0.02)) fail_msg("KL %.5f between one call and one token at a time", kl);
    sqz_session_free(whole);
    sqz_session_free(pieces);
}

/* Two users share model and context; neither sees the other, and a reset session answers as a new one. */
static void test_sessions_apart(void **state)
{
    struct sqz_error error;
    struct sqz_session *a = new_session(context, 0.5f), *b = new_session(context, 1.0f), *alone;
    size_t n;
    const int32_t *asked = question(&n);
    (void)state;
    for (size_t i = 0; i < n; i++) {
        must(sqz_session_run(a, asked + i, 1, &error), &error);
        must(sqz_session_run(b, text_tokens + i, 1, &error), &error);
    }
    sqz_session_reset(b);
    assert_null(sqz_session_logits(b));
    must(sqz_session_run(b, asked, n, &error), &error);
    alone = new_session(context, 1.0f);
    must(sqz_session_run(alone, asked, n, &error), &error);
    double kl = divergence(sqz_session_logits(alone), sqz_session_logits(b));
    if (!(kl <= 0.01)) fail_msg("KL %.5f between a reset session and a new one", kl);
    sqz_session_free(alone);
    alone = new_session(context, 0.5f);
    for (size_t i = 0; i < n; i++) must(sqz_session_run(alone, asked + i, 1, &error), &error);
    kl = divergence(sqz_session_logits(alone), sqz_session_logits(a));
    if (!(kl <= 0.05)) fail_msg("KL %.5f between a session alone and one beside another", kl);
    sqz_session_free(alone);
    sqz_session_free(a);
    sqz_session_free(b);
}

/* Greedy tokens of an answer, run i of it with threads[i % n_threads] threads; false where stats tell otherwise. */
static bool answer_with_threads(const int *threads, size_t n_threads, int32_t tokens[ANSWER_TOKENS])
{
    struct sqz_error error;
    struct sqz_session_stats stats;
    struct sqz_session *session = new_session(context, 0.4f);
    size_t n;
    const int32_t *asked = question(&n);
    int least = threads[0], most = threads[0];
    model->crew.now = threads[0];
    must(sqz_session_run(session, asked, n, &error), &error);
    for (size_t i = 0; i < ANSWER_TOKENS; i++) {
        tokens[i] = likeliest(sqz_session_logits(session));
        model->crew.now = threads[(i + 1) % n_threads];
        least = model->crew.now < least ? model->crew.now : least;
        most = model->crew.now > most ? model->crew.now : most;
        must(sqz_session_run(session, &tokens[i], 1, &error), &error);
    }
    sqz_session_get_stats(session, &stats);
    sqz_session_free(session);
    return stats.least_threads == least && stats.most_threads == most;
}

/* An answer is the same on any number of threads, also when it changes on the way because a neighbour came or went. */
static void test_threads(void **state)
{
    static const int one[] = {1}, three[] = {3}, changing[] = {2, 3, 1, 1, 4};
    const struct sqz_crew crew = model->crew;
    const int n_threads = model->info.n_threads;
    int32_t wanted[ANSWER_TOKENS], got[ANSWER_TOKENS];
    (void)state;
    struct sqz_backend *const backend = model->backend;
    struct sqz_error error;
    must(sqz_backend_cpu_create(&model->backend, 4, &error), &error); /* room for them, whatever this machine has */
    model->info.n_threads = model->crew.most = 4;
    model->crew.fixed = true;
    assert_true(answer_with_threads(one, 1, wanted));
    assert_true(answer_with_threads(three, 1, got));
    assert_memory_equal(got, wanted, sizeof wanted);
    assert_true(answer_with_threads(changing, 5, got));
    assert_memory_equal(got, wanted, sizeof wanted);
    model->info.n_threads = n_threads;
    model->crew = crew;
    sqz_backend_cpu_free(model->backend);
    model->backend = backend;
}

static double share(const struct sqz_session *session)
{
    struct sqz_session_stats stats;
    sqz_session_get_stats(session, &stats);
    const struct sqz_attention_stats *a = &stats.attention;
    return (double)(a->centroid_bytes + a->key_bytes + a->value_bytes) / (double)a->context_bytes;
}

/* A squeezed session reads about what it was asked to, stays close to the dense one, and a context squeezed anew from
 * the file, without the model, is as good. */
static void test_squeezed(void **state)
{
    struct sqz_error error;
    struct sqz_prepare_options options;
    struct sqz_context *second;
    size_t n;
    const int32_t *asked = question(&n);
    (void)state;
    sqz_prepare_options_default(&options);
    options.squeeze.n_levels = 2;
    must(sqz_context_squeeze(context, second_path, &options, 0, NULL, &error), &error);
    must(sqz_context_open(&second, second_path, NULL, &error), &error);
    struct sqz_session *dense = new_session(context, 1.0f);
    must(sqz_session_run(dense, asked, n, &error), &error);
    const struct sqz_context *contexts[] = {context, second};
    for (int i = 0; i < 2; i++) {
        struct sqz_session *session = new_session(contexts[i], 0.4f);
        must(sqz_session_run(session, asked, n, &error), &error);
        const double kl = divergence(sqz_session_logits(dense), sqz_session_logits(session)), read = share(session);
        print_message("%d level(s), budget 0.4: read %.3f, KL %.5f\n", i + 1, read, kl);
        if (!(kl <= 0.3)) fail_msg("%d level(s): KL %.5f from dense", i + 1, kl);
        if (!(read >= 0.2 && read <= 0.6)) fail_msg("%d level(s): read %.3f for a budget of 0.4", i + 1, read);
        sqz_session_free(session);
    }
    assert_true(share(dense) == 1.0);
    sqz_session_free(dense);
    sqz_context_free(second);
}

static bool always(void *user_data)
{
    (void)user_data;
    return true;
}

static bool refuse_progress(const struct sqz_progress *progress, void *user_data)
{
    (void)progress;
    (void)user_data;
    return false;
}

/* Sixteen tokens look at every head once; what the map has is attention, and noting it changes nothing. */
static void test_attention_map(void **state)
{
    enum { N = 16 };
    struct sqz_error error;
    struct sqz_session *plain = new_session(context, 0.3f), *session;
    struct sqz_session_options options;
    size_t n;
    const int32_t *asked = question(&n);
    float *shares = malloc(context_info.n_tokens * sizeof *shares);
    double sum = 0;
    (void)state;
    assert_non_null(shares);
    sqz_session_options_default(&options);
    options.budget = 0.3f;
    options.attention_map = true;
    must(sqz_session_create(&session, model, context, &options, &error), &error);
    must(sqz_session_run(session, asked, n, &error), &error);
    must(sqz_session_run(plain, asked, n, &error), &error);
    assert_int_equal(sqz_session_attention_map(session, shares), 0);
    for (int i = 0; i < N; i++) {
        const int32_t token = likeliest(sqz_session_logits(plain));
        must(sqz_session_run(plain, &token, 1, &error), &error);
        must(sqz_session_run(session, &token, 1, &error), &error);
    }
    assert_memory_equal(sqz_session_logits(plain), sqz_session_logits(session), model_info.n_vocab * sizeof(float));
    assert_int_equal(sqz_session_attention_map(plain, shares), 0);
    assert_int_equal(sqz_session_attention_map(session, shares),
                     (context_info.n_layer - context_info.n_window_layers) * context_info.n_head);
    for (size_t i = 0; i < context_info.n_tokens; i++) {
        assert_true(shares[i] >= 0);
        sum += (double)shares[i];
    }
    print_message("attention on the context: %.3f\n", sum);
    if (!(sum > 0.1 && sum < 1)) fail_msg("the map's shares sum to %g", sum);
    sqz_session_reset(session);
    assert_int_equal(sqz_session_attention_map(session, shares), 0);
    sqz_session_free(session);
    sqz_session_free(plain);
    free(shares);
}

static void expect(enum sqz_status got, enum sqz_status wanted, const struct sqz_error *error, const char *words)
{
    if (got != wanted || error->status != wanted || !strstr(error->message, words))
        fail_msg("got %s \"%s\", wanted %s with \"%s\"", sqz_status_name(got), error->message, sqz_status_name(wanted),
                 words);
}

static void test_limits(void **state)
{
    struct sqz_error error;
    struct sqz_session *session, *none;
    struct sqz_session_options options;
    struct sqz_prepare_options prepare;
    struct sqz_session_stats stats;
    size_t n;
    const int32_t *asked = question(&n), bad = (int32_t)model_info.n_vocab;
    (void)state;
    sqz_session_options_default(&options);
    options.budget = 1.5f;
    expect(sqz_session_create(&none, model, context, &options, &error), SQZ_ERROR_ARGUMENT, &error, "budget 1.5");
    options.budget = 0.5f;
    options.n_user_tokens = 8;
    must(sqz_session_create(&session, model, context, &options, &error), &error);
    expect(sqz_session_run(session, asked, 9, &error), SQZ_ERROR_LENGTH, &error, "8 of 8 are left");
    expect(sqz_session_run(session, &bad, 1, &error), SQZ_ERROR_ARGUMENT, &error, "allowed are 0 to");
    expect(sqz_session_set_budget(session, 0.0f, &error), SQZ_ERROR_ARGUMENT, &error, "budget 0");
    expect(sqz_session_set_budget(session, NAN, &error), SQZ_ERROR_ARGUMENT, &error, "budget");
    sqz_session_set_cancel(session, always, NULL);
    expect(sqz_session_run(session, asked, 4, &error), SQZ_ERROR_CANCELLED, &error, "cancelled");
    sqz_session_get_stats(session, &stats);
    assert_int_equal(stats.n_user_tokens, 0);
    sqz_session_set_cancel(session, NULL, NULL);
    must(sqz_session_run(session, asked, 4, &error), &error); /* nothing of the cancelled run stayed */
    sqz_session_free(session);

    sqz_prepare_options_default(&prepare);
    expect(sqz_context_squeeze(context, second_path, &prepare, -1, NULL, &error), SQZ_ERROR_ARGUMENT, &error,
           "-1 threads");
    expect(sqz_context_squeeze(context, second_path, &prepare, 1025, NULL, &error), SQZ_ERROR_ARGUMENT, &error,
           "1025 threads");
    prepare.progress = refuse_progress;
    expect(sqz_prepare_tokens(model, text_tokens, 600, second_path, &prepare, NULL, &error), SQZ_ERROR_CANCELLED,
           &error, "cancelled");
    prepare.progress = NULL;
    expect(sqz_prepare_tokens(model, &bad, 1, second_path, &prepare, NULL, &error), SQZ_ERROR_ARGUMENT, &error,
           "allowed are 0 to");
    expect(sqz_prepare(model, " \n", 2, second_path, &prepare, NULL, &error), SQZ_ERROR_TEXT, &error, "empty");
    expect(sqz_prepare(model, "a\xff z", 4, second_path, &prepare, NULL, &error), SQZ_ERROR_TEXT, &error, "offset 1");
}

/* ---- A context that loses pages ---------------------------------------------------------- */

static _Atomic int n_lost_pages;

static void lose_page(int number, siginfo_t *information, void *unused)
{
    (void)unused;
    n_lost_pages++;
    if (!sqz_context_page_lost(information->si_addr)) signal(number, SIG_DFL);
}

/* A file that is cut off early in a run, and is as long as before and of the same time when the run ends. */
struct cut_file {
    const char *path;
    struct stat before;
    int n_asked;
};

static bool cut_for_a_while(void *user_data)
{
    struct cut_file *f = user_data;
    enum { CUT_AT = 3 };
    f->n_asked++;
    if (f->n_asked == CUT_AT) assert_int_equal(truncate(f->path, 4096), 0);
    if (n_lost_pages && f->n_asked > CUT_AT) {
        const struct timespec times[2] = {f->before.st_atim, f->before.st_mtim};
        assert_int_equal(truncate(f->path, f->before.st_size), 0);
        assert_int_equal(utimensat(AT_FDCWD, f->path, times, 0), 0);
    }
    return false;
}

enum { N_TOGETHER = 3 };

/* Sessions at a small budget in batches that go through the context in this way, beside ones alone at another budget: a
 * question each, and an answer that those alone choose. Returns the mean KL; share: what the first ones have read. */
static double run_together(const struct sqz_context *of, enum sqz_together together, const struct sqz_cpu_cost *cost,
                           float budget_alone, double *share, size_t *n_equal)
{
    struct sqz_error error;
    struct sqz_session *session[N_TOGETHER], *alone[N_TOGETHER];
    struct sqz_batch_item items[N_TOGETHER];
    struct sqz_session_stats stats;
    int32_t token[N_TOGETHER];
    size_t n;
    double kl = 0;
    const int32_t *asked = question(&n);
    *n_equal = 0;
    for (size_t i = 0; i < N_TOGETHER; i++) {
        session[i] = new_session(of, 0.1f);
        alone[i] = new_session(of, budget_alone);
        items[i] = (struct sqz_batch_item){.session = session[i], .tokens = asked + i, .n_tokens = n - 7 * i};
    }
    for (int step = 0; step <= ANSWER_TOKENS; step++) {
        for (size_t i = 0; i < N_TOGETHER; i++)
            must(sqz_session_run(alone[i], items[i].tokens, items[i].n_tokens, &error), &error);
        sqz_backend_cpu_set_ways(model->backend, together, cost);
        must(sqz_batch_run(items, N_TOGETHER, &error), &error);
        sqz_backend_cpu_set_ways(model->backend, SQZ_TOGETHER_EACH, NULL);
        for (size_t i = 0; i < N_TOGETHER; i++) {
            const float *a = sqz_session_logits(alone[i]), *b = sqz_session_logits(session[i]);
            must(items[i].status, &items[i].error);
            kl += divergence(a, b) / (N_TOGETHER * (ANSWER_TOKENS + 1));
            token[i] = likeliest(a);
            *n_equal += likeliest(b) == token[i];
            items[i].tokens = &token[i];
            items[i].n_tokens = 1;
        }
    }
    *share = 0;
    for (size_t i = 0; i < N_TOGETHER; i++) {
        sqz_session_get_stats(session[i], &stats);
        *share += sqz_attention_stats_share(&stats.attention) / N_TOGETHER;
        sqz_session_free(session[i]);
        sqz_session_free(alone[i]);
    }
    return kl;
}

/* Tokens that go through a context together read everything, as at a budget of 1, and say so: where all is asked for, and
 * where it is cheapest. Where it is not, each reads its own. */
static void test_together(void **state)
{
    static const struct sqz_cpu_cost free_pass = {.looked_up = 1, .selected = 1}, dear_pass = {.passed = 1, .joint = 1};
    const size_t n = N_TOGETHER * (ANSWER_TOKENS + 1);
    double share, kl;
    size_t n_equal;
    (void)state;
    for (int i = 0; i < 2; i++) {
        kl = run_together(context, i ? SQZ_TOGETHER_CHEAPEST : SQZ_TOGETHER_ALL, &free_pass, 1, &share, &n_equal);
        if (!(kl <= 0.02) || n_equal + 2 < n || share != 1)
            fail_msg("mean KL %.5f to a budget of 1 (allowed 0.02), top token equal %zu of %zu, share %.6f", kl,
                     n_equal, n, share);
    }
    kl = run_together(context, SQZ_TOGETHER_CHEAPEST, &dear_pass, 0.1f, &share, &n_equal);
    if (!(kl <= 0.02) || n_equal + 2 < n || !(share < 0.9))
        fail_msg("mean KL %.5f to itself alone (allowed 0.02), top token equal %zu of %zu, share %.6f", kl, n_equal, n,
                 share);
}

/* The same of a context in shards: all read everything of each, together, and outputs of shards merge. */
static void test_together_in_shards(void **state)
{
    const size_t n = N_TOGETHER * (ANSWER_TOKENS + 1);
    char path[1100], shard[1100];
    struct sqz_error error;
    struct sqz_prepare_options prepare;
    struct sqz_context *shards;
    double share, kl;
    size_t n_equal;
    (void)state;
    sqz_prepare_options_default(&prepare);
    prepare.n_shards = 2;
    snprintf(path, sizeof path, "%s.shards.sqz.gguf", context_path);
    must(sqz_prepare_tokens(model, text_tokens, N_CONTEXT_TOKENS, path, &prepare, NULL, &error), &error);
    must(sqz_context_open(&shards, path, NULL, &error), &error);
    kl = run_together(shards, SQZ_TOGETHER_ALL, NULL, 1, &share, &n_equal);
    if (!(kl <= 0.02) || n_equal + 2 < n || share != 1)
        fail_msg("mean KL %.5f to a budget of 1 (allowed 0.02), top token equal %zu of %zu, share %.6f", kl, n_equal, n,
                 share);
    sqz_context_free(shards);
    unlink(path);
    for (int i = 1; i <= 2; i++) {
        snprintf(shard, sizeof shard, "%s.shards-%05d-of-00002.sqz.gguf", context_path, i);
        unlink(shard);
    }
}

/* Its session is refused, whatever it computed, and stays so; one on another context in the batch never notices. */
static void test_lost_pages(void **state)
{
    struct sqz_error error;
    struct sqz_prepare_options prepare;
    struct sqz_context *second;
    struct sigaction action, before;
    struct cut_file file = {.path = second_path};
    size_t n;
    const int32_t *asked = question(&n);
    (void)state;
    sqz_prepare_options_default(&prepare);
    must(sqz_context_squeeze(context, second_path, &prepare, 0, NULL, &error), &error);
    must(sqz_context_open(&second, second_path, NULL, &error), &error);
    assert_int_equal(stat(second_path, &file.before), 0);
    memset(&action, 0, sizeof action);
    action.sa_sigaction = lose_page;
    action.sa_flags = SA_SIGINFO;
    assert_int_equal(sigaction(SIGBUS, &action, &before), 0);
    struct sqz_session *lost = new_session(second, 1.0f), *kept = new_session(context, 1.0f);
    struct sqz_batch_item items[] = {{.session = lost, .tokens = asked, .n_tokens = n},
                                     {.session = kept, .tokens = asked, .n_tokens = n}};
    sqz_session_set_cancel(lost, cut_for_a_while, &file);
    must(sqz_batch_run(items, 2, &error), &error);
    assert_in_range(n_lost_pages, 1, model_info.n_threads); /* before zeros are there, each thread may ask for them */
    expect(items[0].status, SQZ_ERROR_IO, &items[0].error,
           "second.sqz.gguf: a part of the context file could not be read");
    assert_null(sqz_session_logits(lost));
    must(items[1].status, &items[1].error);
    const int32_t answer = likeliest(sqz_session_logits(kept));
    sqz_session_reset(kept);
    must(sqz_session_run(kept, asked, n, &error), &error);
    assert_int_equal(likeliest(sqz_session_logits(kept)), answer);
    sqz_session_set_cancel(lost, NULL, NULL);
    expect(sqz_session_run(lost, asked, n, &error), SQZ_ERROR_IO, &error, "could not be read");
    sqz_session_free(lost);
    sqz_session_free(kept);
    sqz_context_free(second);
    assert_int_equal(sigaction(SIGBUS, &before, NULL), 0);
}

/* ---- Many sessions together ------------------------------------------------------------ */

enum { N_CROWD = 64, CROWD_STEPS = 3, CROWD_TOKENS = 24 };
enum fate { LIVES, IS_CANCELLED, CANCELS_LATER, HAS_BAD_TOKEN, HAS_NO_TOKENS, N_FATES = 8 };

struct member {
    struct sqz_session *session;
    enum fate fate;
    const int32_t *asked;
    size_t n_asked;
    int32_t token; /* the answer's next, of the run alone */
    float *logits; /* [1 + CROWD_STEPS][n_vocab] alone */
    int asked_times;
};

/* After some layers of its first pass. */
static bool cancels_later(void *user_data)
{
    struct member *m = user_data;
    return ++m->asked_times > 40;
}

static void keep_logits(struct member *m, size_t step)
{
    memcpy(m->logits + step * model_info.n_vocab, sqz_session_logits(m->session),
           model_info.n_vocab * sizeof *m->logits);
}

/* The answer's tokens are those of the run alone. */
static int32_t crowd_token(const struct member *m, size_t step)
{
    return likeliest(m->logits + step * model_info.n_vocab);
}

static void run_alone(struct member *m)
{
    struct sqz_error error;
    must(sqz_session_run(m->session, m->asked, m->n_asked, &error), &error);
    keep_logits(m, 0);
    for (size_t step = 0; step < CROWD_STEPS; step++) {
        m->token = crowd_token(m, step);
        must(sqz_session_run(m->session, &m->token, 1, &error), &error);
        keep_logits(m, step + 1);
    }
    sqz_session_reset(m->session);
}

/* Everybody's first tokens, in one call; some fail, some are cancelled. */
static void run_questions(struct member *crowd, struct sqz_batch_item *items)
{
    static const int32_t bad = -1;
    static const enum sqz_status wanted[] = {SQZ_OK, SQZ_ERROR_CANCELLED, SQZ_ERROR_CANCELLED, SQZ_ERROR_ARGUMENT,
                                             SQZ_ERROR_ARGUMENT};
    struct sqz_error error;
    for (size_t i = 0; i < N_CROWD; i++) {
        struct member *m = &crowd[i];
        items[i] = (struct sqz_batch_item){.session = m->session, .tokens = m->asked, .n_tokens = m->n_asked};
        if (m->fate == IS_CANCELLED) sqz_session_set_cancel(m->session, always, NULL);
        if (m->fate == CANCELS_LATER) sqz_session_set_cancel(m->session, cancels_later, m);
        if (m->fate == HAS_BAD_TOKEN) items[i].tokens = &bad, items[i].n_tokens = 1;
        if (m->fate == HAS_NO_TOKENS) items[i].n_tokens = 0;
    }
    must(sqz_batch_run(items, N_CROWD, &error), &error);
    for (size_t i = 0; i < N_CROWD; i++) {
        struct sqz_session_stats stats;
        if (items[i].status != wanted[crowd[i].fate] || items[i].error.status != items[i].status)
            fail_msg("session %zu: %s \"%s\", wanted %s", i, sqz_status_name(items[i].status), items[i].error.message,
                     sqz_status_name(wanted[crowd[i].fate]));
        sqz_session_get_stats(crowd[i].session, &stats);
        assert_int_equal(stats.n_user_tokens, items[i].status == SQZ_OK ? items[i].n_tokens : 0);
        assert_int_equal(sqz_session_logits(crowd[i].session) != NULL, items[i].status == SQZ_OK);
    }
}

/* The next token of those who live. */
static size_t run_step(struct member *crowd, struct sqz_batch_item *items, size_t step)
{
    struct sqz_error error;
    size_t n = 0;
    for (size_t i = 0; i < N_CROWD; i++) {
        if (crowd[i].fate != LIVES) continue;
        crowd[i].token = crowd_token(&crowd[i], step);
        items[n++] = (struct sqz_batch_item){.session = crowd[i].session, .tokens = &crowd[i].token, .n_tokens = 1};
    }
    must(sqz_batch_run(items, n, &error), &error);
    for (size_t i = 0; i < n; i++) must(items[i].status, &items[i].error);
    return n;
}

static void check_against_alone(const struct member *crowd, size_t step, double *worst)
{
    for (size_t i = 0; i < N_CROWD; i++) {
        if (crowd[i].fate != LIVES) continue;
        const double kl = divergence(crowd[i].logits + step * model_info.n_vocab, sqz_session_logits(crowd[i].session));
        if (!(kl <= 0.15)) fail_msg("session %zu, token %zu: KL %.5f between together and alone", i, step, kl);
        if (kl > *worst) *worst = kl;
    }
}

/* Sessions of two contexts that were read with different stretches, at different budgets, run together: each gets what
 * it gets alone, up to the rounding of products of another size; those that fail or are cancelled disturb nobody. */
static void test_crowd(void **state)
{
    static struct member crowd[N_CROWD];
    static struct sqz_batch_item items[N_CROWD];
    static const float budgets[] = {0.4f, 1, 0.6f};
    struct sqz_error error;
    struct sqz_prepare_options options;
    struct sqz_context *second;
    double worst = 0;
    (void)state;
    sqz_prepare_options_default(&options);
    model->rope_scale = 2;
    must(sqz_prepare_tokens(model, text_tokens, N_CONTEXT_TOKENS, second_path, &options, NULL, &error), &error);
    model->rope_scale = 1;
    must(sqz_context_open(&second, second_path, NULL, &error), &error);
    for (size_t i = 0; i < N_CROWD; i++) {
        struct member *m = &crowd[i];
        const size_t fate = i / 3 % N_FATES;
        m->session = new_session(i % 2 ? second : context, budgets[i % 3]);
        m->fate = fate < 5 ? (enum fate)fate : LIVES;
        m->n_asked = 1 + i * 7 % CROWD_TOKENS;
        m->asked = text_tokens + N_CONTEXT_TOKENS - 5 * i;
        m->logits = malloc((1 + CROWD_STEPS) * model_info.n_vocab * sizeof *m->logits);
        assert_non_null(m->logits);
        if (m->fate == LIVES) run_alone(m);
    }
    run_questions(crowd, items);
    check_against_alone(crowd, 0, &worst);
    for (size_t step = 0; step < CROWD_STEPS; step++) {
        assert_true(run_step(crowd, items, step) > N_CROWD / 3);
        check_against_alone(crowd, step + 1, &worst);
    }
    print_message("%d sessions together: KL from alone at most %.5f\n", N_CROWD, worst);

    items[1].session = items[0].session;
    expect(sqz_batch_run(items, 2, &error), SQZ_ERROR_ARGUMENT, &error, "comes twice");
    items[1].session = NULL;
    expect(sqz_batch_run(items, 2, &error), SQZ_ERROR_ARGUMENT, &error, "has no session");
    must(sqz_batch_run(items, 0, &error), &error);
    for (size_t i = 0; i < N_CROWD; i++) {
        sqz_session_free(crowd[i].session);
        free(crowd[i].logits);
    }
    sqz_context_free(second);
}

static int run_engine_cases(const char *name)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dense_is_llama), cmocka_unit_test(test_cut_into_calls),
        cmocka_unit_test(test_sessions_apart), cmocka_unit_test(test_squeezed),
        cmocka_unit_test(test_threads),        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_crowd),          cmocka_unit_test(test_attention_map),
        cmocka_unit_test(test_together),       cmocka_unit_test(test_together_in_shards),
        cmocka_unit_test(test_lost_pages),
    };
    return cmocka_run_group_tests_name(name, tests, set_up, tear_down);
}
