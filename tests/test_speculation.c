/*
 * Exact sessions on the default model: their tokens are those that the verifying
 * runs alone choose, what was drafted in vain leaves nothing behind, draws keep the
 * exact distribution, and limits hold.
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
#include <unistd.h>

#include "divergence.h"
#include "rejection.h"
#include "session.h"

enum { N_CONTEXT = 900, N_ASKED = 24, MOST_ASKED = 365, N_ANSWER = 40, DRAFT = 4 };

static struct sqz_model *model;
static struct sqz_model_info model_info;
static struct sqz_context *context, *planes; /* planes: the same text in rows of 4 + 4 bits */
static int32_t *text_tokens;
static char path[1024], planes_path[1024], rounded_path[1024];
static size_t n_question = N_ASKED; /* tokens that sessions are asked first */

static void must(enum sqz_status status, const struct sqz_error *error)
{
    if (status != SQZ_OK) fail_msg("%s: %s", sqz_status_name(status), error->message);
}

static int32_t likeliest(const float *logits, float *lead)
{
    uint32_t best = 0;
    float second = -INFINITY;
    for (uint32_t i = 1; i < model_info.n_vocab; i++)
        if (logits[i] > logits[best]) second = logits[best], best = i;
        else if (logits[i] > second) second = logits[i];
    if (lead) *lead = logits[best] - second;
    return (int32_t)best;
}

static double divergence(const float *a, const float *b)
{
    return logits_divergence(a, b, model_info.n_vocab);
}

static int set_up(void **state)
{
    struct sqz_error error;
    struct sqz_prepare_options options;
    const char *file = getenv("SQUEEZE_MODEL"), *folder = getenv("SQUEEZE_TEST_FOLDER");
    size_t n = 0, length = 0;
    char *text = malloc(1 << 17);
    (void)state;
    if (!file || !folder || !text) return 1;
    sqz_llama_log_take();
    if (sqz_model_open(&model, file, NULL, &error) != SQZ_OK) {
        fprintf(stderr, "%s\n", error.message);
        return 1;
    }
    sqz_model_get_info(model, &model_info);
    for (int i = 0; length < (1 << 16); i++)
        length += (size_t)sprintf(text + length, "Box %d, in row %d, holds %d red and %d green stones. ", i, i * 7 % 31,
                                  i * i % 17, i * 5 % 23);
    snprintf(path, sizeof path, "%s/speculation.sqz.gguf", folder);
    snprintf(planes_path, sizeof planes_path, "%s/planes.sqz.gguf", folder);
    snprintf(rounded_path, sizeof rounded_path, "%s/rounded.sqz.gguf", folder);
    sqz_prepare_options_default(&options);
    if (sqz_model_tokenize(model, text, length, &text_tokens, &n, &error) != SQZ_OK || n < N_CONTEXT + MOST_ASKED ||
        sqz_prepare_tokens(model, text_tokens, N_CONTEXT, path, &options, NULL, &error) != SQZ_OK ||
        sqz_context_open(&context, path, NULL, &error) != SQZ_OK) {
        fprintf(stderr, "%zu tokens: %s\n", n, error.message);
        return 1;
    }
    options.squeeze.rows = SQZ_ROWS_INT4_4;
    if (sqz_context_squeeze(context, planes_path, &options, 0, NULL, &error) != SQZ_OK ||
        sqz_context_open(&planes, planes_path, NULL, &error) != SQZ_OK) {
        fprintf(stderr, "4 + 4 bits: %s\n", error.message);
        return 1;
    }
    free(text);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    sqz_context_free(planes);
    sqz_context_free(context);
    sqz_model_free(model);
    free(text_tokens);
    unlink(path);
    unlink(planes_path);
    unlink(rounded_path);
    return 0;
}

static struct sqz_session_options exact_options(int draft)
{
    struct sqz_session_options options;
    sqz_session_options_default(&options);
    options.exact = SQZ_EXACT_F16;
    options.draft = draft;
    options.draft_tokens = DRAFT;
    options.draft_steady = true; /* nothing depends on this machine's speed */
    return options;
}

static struct sqz_session *asked_of(const struct sqz_context *of, const struct sqz_session_options *options)
{
    struct sqz_error error;
    struct sqz_session *s;
    must(sqz_session_create(&s, model, of, options, &error), &error);
    must(sqz_session_run(s, text_tokens + N_CONTEXT, n_question, &error), &error);
    return s;
}

static struct sqz_session *asked_session(const struct sqz_session_options *options)
{
    return asked_of(context, options);
}

static struct sqz_speculation_stats stats_of(const struct sqz_session *s)
{
    struct sqz_session_stats stats;
    sqz_session_get_stats(s, &stats);
    return stats.speculation;
}

/* ---- Greedy ------------------------------------------------------------------------------- */

/* The batch that the session's last cycle verified, on a session that drafts nothing: its logits, and what it chooses. */
static void verify_alone(struct sqz_session *plain, const struct sqz_session *exact, int32_t token, float *logits)
{
    struct sqz_error error;
    const struct sqz_ahead *a = exact->ahead;
    int32_t batch[SQZ_MOST_DRAFT_TOKENS + 1] = {token};
    const size_t n_before = plain->n_user;
    memcpy(batch + 1, a->tokens, a->n * sizeof *batch);
    plain->all_logits = logits;
    must(sqz_session_run(plain, batch, a->n + 1, &error), &error);
    plain->all_logits = NULL;
    plain->n_user = n_before;
}

/* A place that forgets what the context says: for drafts. */
struct forgetful {
    struct sqz_backend base;
    struct sqz_backend_ops ops;
    size_t n_calls;
};
static const float forgetful_budget = 0.01f; /* below the context's floor */

static void forget(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    const struct sqz_layer_shape *shape = &sqz_context_layer(context, call->node->layer)->shape;
    const size_t row = (size_t)shape->n_head * shape->head_dim;
    assert_int_equal(call->n_parts, 1);
    assert_int_equal(call->parts[0]->n_tokens, 1); /* a draft's, not what is asked or verified */
    assert_true(call->parts[0]->budget == forgetful_budget);
    memset(call->node->out + call->parts[0]->first_token * row, 0, row * sizeof *call->node->out);
    ((struct forgetful *)backend)->n_calls++;
}

static void take_all(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    (void)backend;
    model->backend->ops->take(model->backend, call);
}

/* Token for token and bit for bit what the verifying runs alone give; beside that, where token by token goes another
 * way, by how little. drafts_in: a place for drafts; NULL: where all else is computed. */
static struct sqz_attention_stats greedy(const struct sqz_context *of, struct sqz_session_options options,
                                         const char *name, struct forgetful *drafts_in)
{
    struct sqz_error error;
    struct sqz_session_options dense;
    const int draft = options.draft;
    const bool rounded = options.exact == SQZ_EXACT_INT8;
    sqz_session_options_default(&dense);
    dense.budget = 1;
    struct sqz_session *s = asked_of(of, &options), *plain = asked_of(of, &dense), *single = asked_of(of, &dense);
    float *logits = malloc((SQZ_MOST_DRAFT_TOKENS + 1) * model_info.n_vocab * sizeof *logits);
    struct sqz_session_stats stats, plain_stats;
    if (drafts_in) sqz_session_draft_in(s, &drafts_in->base, forgetful_budget);
    uint64_t n_cycles = 0;
    size_t row = 0, n_apart = 0;
    assert_non_null(logits);
    for (int i = 0; i < N_ANSWER; i++) {
        bool end;
        float lead;
        const int32_t token = sqz_session_sample(s, &end);
        assert_int_equal(token, likeliest(i ? logits + row * model_info.n_vocab : sqz_session_logits(plain), NULL));
        if (likeliest(sqz_session_logits(single), &lead) != token) {
            print_message("%s, token %d: one by one another leads by %.3f\n", name, i, (double)lead);
            n_apart++;
            if (!(lead <= 0.5f)) fail_msg("%s, token %d: no tie, %.3f", name, i, (double)lead);
        }
        must(sqz_session_run(s, &token, 1, &error), &error);
        must(sqz_session_run(single, &token, 1, &error), &error);
        const uint64_t now = stats_of(s).n_cycles;
        if (now != n_cycles || s->ahead->n == 0) verify_alone(plain, s, token, logits), row = 0;
        else row++;
        plain->n_user++;
        n_cycles = now;
        assert_int_equal(s->n_user, n_question + (size_t)i + 1);
        assert_memory_equal(sqz_session_logits(s), logits + row * model_info.n_vocab,
                            model_info.n_vocab * sizeof *logits);
    }
    sqz_session_get_stats(s, &stats);
    const struct sqz_speculation_stats *p = &stats.speculation;
    print_message("%s: %llu cycles drafted %llu tokens, %llu from the text; %llu kept; drafts read %.3f\n", name,
                  (unsigned long long)p->n_cycles, (unsigned long long)p->n_drafted,
                  (unsigned long long)p->n_drafted_by_text, (unsigned long long)p->n_accepted,
                  sqz_attention_stats_share(&p->draft));
    assert_true(p->n_cycles > 0 && p->n_accepted <= p->n_tested && p->n_tested <= p->n_drafted);
    assert_true(drafts_in ? p->n_accepted * 2 < p->n_tested : p->n_accepted > 0);
    sqz_session_get_stats(plain, &plain_stats); /* all of the rows, by both planes */
    assert_true(sqz_attention_stats_share(&stats.attention) == sqz_attention_stats_share(&plain_stats.attention));
    assert_true(rounded ? sqz_attention_stats_share(&stats.attention) < 0.8
                        : sqz_attention_stats_share(&stats.attention) == 1.0);
    assert_int_equal(p->draft_rows, rounded ? options.draft_rows : SQZ_DRAFT_ROWS_F16);
    if (draft == SQZ_DRAFT_SELF && !drafts_in) {
        assert_true(p->n_drafted_by_text == 0);
        const double read = sqz_attention_stats_share(&p->draft);
        if (!(read > 0 && read < 0.6)) fail_msg("drafts read %.3f", read);
        if (!(p->n_accepted * 2 >= p->n_tested)) fail_msg("the model disagrees with itself");
    }
    if (draft == SQZ_DRAFT_NGRAM) assert_true(p->n_drafted_by_text == p->n_drafted && p->draft.context_bytes == 0);
    if (n_apart > 8) fail_msg("%zu of %d tokens apart", n_apart, N_ANSWER);
    free(logits);
    sqz_session_free(s);
    sqz_session_free(plain);
    sqz_session_free(single);
    return stats.speculation.draft;
}

static void test_greedy_self(void **state)
{
    (void)state;
    greedy(context, exact_options(SQZ_DRAFT_SELF), "self", NULL);
}

/* Drafts that know nothing of the context: what is kept is what the exact runs choose, all the same. */
static void test_greedy_elsewhere(void **state)
{
    struct forgetful place = {.ops = *model->backend->ops};
    (void)state;
    place.base.ops = &place.ops;
    place.ops.steered = false;
    place.ops.take = take_all;
    place.ops.attend = forget;
    greedy(context, exact_options(SQZ_DRAFT_SELF), "self, elsewhere", &place);
    assert_true(place.n_calls > 0);
}

static void test_greedy_ngram(void **state)
{
    (void)state;
    greedy(context, exact_options(SQZ_DRAFT_NGRAM), "ngram", NULL);
}

static void test_greedy_chain(void **state)
{
    (void)state;
    greedy(context, exact_options(SQZ_DRAFT_CHAIN), "chain", NULL);
}

/* Exact to rows of 4 + 4 bits: drafts by the upper plane read fewer rows than by both, those that the budget has room for
 * as F16, and less of them. */
static void test_greedy_planes(void **state)
{
    struct sqz_session_options options = exact_options(SQZ_DRAFT_SELF);
    (void)state;
    options.exact = SQZ_EXACT_INT8;
    options.draft_budget = 0.3f;
    const struct sqz_attention_stats upper = greedy(planes, options, "upper plane", NULL);
    options.draft_rows = SQZ_DRAFT_ROWS_BOTH;
    const struct sqz_attention_stats both = greedy(planes, options, "both planes", NULL);
    const double less = sqz_attention_stats_share(&upper) / sqz_attention_stats_share(&both);
    const double keys =
        (double)upper.retained_keys / (double)upper.total_keys * (double)both.total_keys / (double)both.retained_keys;
    print_message("by the upper plane %.3f of the bytes, %.3f of the keys\n", less, keys);
    assert_true(less > 0.1 && less < 0.9);
    assert_true(keys > 0.2 && keys < 1 && less < keys + 0.1);
}

/* The same where own rows go into planes while drafts come and go: at row 256 and at row 384. */
static void test_greedy_long(void **state)
{
    struct sqz_session_options options = exact_options(SQZ_DRAFT_SELF);
    (void)state;
    options.exact = SQZ_EXACT_INT8;
    options.draft_budget = 0.3f;
    for (n_question = 237; n_question <= MOST_ASKED; n_question += 128)
        greedy(planes, options, "behind a long question", NULL);
    n_question = N_ASKED;
}

/* Other tokens than those that were expected, and a pass with others: what was run ahead leaves nothing behind. */
static void test_rolled_back(void **state)
{
    struct sqz_error error;
    const struct sqz_session_options options = exact_options(SQZ_DRAFT_SELF);
    struct sqz_session_options dense;
    (void)state;
    sqz_session_options_default(&dense);
    dense.budget = 1;
    struct sqz_session *s = asked_session(&options), *plain = asked_session(&dense), *other = asked_session(&dense);
    double worst = 0;
    for (int i = 0; i < 16; i++) {
        const int32_t token = i % 3 == 2 ? likeliest(sqz_session_logits(s), NULL) : text_tokens[(i * 37) % N_CONTEXT];
        struct sqz_batch_item items[] = {{.session = s, .tokens = &token, .n_tokens = 1},
                                         {.session = other, .tokens = &token, .n_tokens = 1}};
        if (i % 4 == 3) {
            must(sqz_batch_run(items, 2, &error), &error);
            must(items[0].status, &items[0].error);
            must(items[1].status, &items[1].error);
        } else must(sqz_session_run(s, &token, 1, &error), &error);
        must(sqz_session_run(plain, &token, 1, &error), &error);
        worst = fmax(worst, divergence(sqz_session_logits(plain), sqz_session_logits(s)));
    }
    print_message("KL to token by token: at most %.5f\n", worst);
    if (!(worst <= 0.1))
        fail_msg("KL %.5f", worst); /* of single tokens; rows that were left behind make several nats */
    assert_int_equal(s->n_user, plain->n_user);
    sqz_session_reset(s);
    assert_null(sqz_session_logits(s));
    must(sqz_session_run(s, text_tokens + N_CONTEXT, N_ASKED, &error), &error);
    sqz_session_reset(plain);
    must(sqz_session_run(plain, text_tokens + N_CONTEXT, N_ASKED, &error), &error);
    assert_memory_equal(sqz_session_logits(s), sqz_session_logits(plain), model_info.n_vocab * sizeof(float));
    sqz_session_free(s);
    sqz_session_free(plain);
    sqz_session_free(other);
}

/* ---- Draws -------------------------------------------------------------------------------- */

static void draw_answer(const struct sqz_session_options *options, int32_t *tokens, size_t n)
{
    struct sqz_error error;
    struct sqz_session *s = asked_session(options);
    for (size_t i = 0; i < n; i++) {
        bool end;
        tokens[i] = sqz_session_sample(s, &end);
        assert_int_equal(tokens[i], sqz_session_sample(s, &end)); /* a place has its own numbers */
        must(sqz_session_run(s, &tokens[i], 1, &error), &error);
    }
    sqz_session_free(s);
}

static void test_seeds(void **state)
{
    enum { N = 24 };
    int32_t first[N], again[N], other[N];
    struct sqz_session_options options = exact_options(SQZ_DRAFT_CHAIN);
    (void)state;
    options.temperature = 1.0f;
    options.seed = 7;
    draw_answer(&options, first, N);
    draw_answer(&options, again, N);
    assert_memory_equal(first, again, sizeof first);
    options.seed = 8;
    draw_answer(&options, other, N);
    assert_memory_not_equal(first, other, sizeof first);
}

/* The token behind a given one, drawn by many seeds through drafts of one token: distributed as the exact odds, which the
 * first run has. By the model, whose draft is a draw, and by the text, whose draft is not. */
static void draws(const struct sqz_context *of, struct sqz_session_options options, size_t n_trials)
{
    enum { N_BINS = 4 };
    struct sqz_error error;
    struct sqz_sampling_options draw = {.temperature = 1.2f, .top_p = 0.95f, .top_k = 40, .min_p = 0.01f};
    const uint32_t n_vocab = model_info.n_vocab;
    float *odds = malloc(n_vocab * sizeof *odds);
    int32_t bin[N_BINS - 1];
    size_t seen[N_BINS] = {0}, n_kept = 0, n_drafted = 0;
    double expected[N_BINS] = {0}, left = 1, chi = 0;
    assert_non_null(odds);
    options.draft_tokens = 1;
    options.temperature = 1.2f;
    struct sqz_session *s = asked_of(of, &options);
    const size_t n_user = s->n_user;
    const int32_t token = likeliest(sqz_session_logits(s), NULL);
    for (size_t i = 0; i < n_trials; i++) {
        struct sqz_sampling *sampling;
        struct sqz_choice choice;
        draw.seed = (uint32_t)i;
        must(sqz_sampling_create(&sampling, model, &draw, &error), &error);
        sqz_session_sample_by(s, sampling);
        sqz_ahead_drop(s);
        s->n_user = n_user;
        s->ahead->way.log_offset = 0;
        must(sqz_session_run(s, &token, 1, &error), &error);
        if (i == 0) {
            sqz_sampling_odds(sampling, model, sqz_session_logits(s), odds);
            for (int b = 0; b < N_BINS - 1; b++) {
                bin[b] = 0;
                for (uint32_t v = 0; v < n_vocab; v++) {
                    bool taken = false;
                    for (int c = 0; c < b; c++) taken |= bin[c] == (int32_t)v;
                    if (!taken && (odds[v] > odds[bin[b]] || (b && bin[b] == bin[b - 1]))) bin[b] = (int32_t)v;
                }
                left -= expected[b] = (double)odds[bin[b]];
            }
            expected[N_BINS - 1] = left;
        }
        n_drafted += s->ahead->n;
        const int32_t drafted = s->ahead->n ? s->ahead->tokens[0] : -1;
        sqz_session_next(s, -1, &choice);
        n_kept += choice.token == drafted;
        assert_true(odds[choice.token] > 0);
        int b = 0;
        while (b < N_BINS - 1 && bin[b] != choice.token) b++;
        seen[b]++;
        sqz_session_sample_by(s, NULL);
        sqz_sampling_free(sampling);
    }
    for (int b = 0; b < N_BINS; b++) {
        const double e = expected[b] * (double)n_trials;
        if (e > 1) chi += ((double)seen[b] - e) * ((double)seen[b] - e) / e;
        print_message("  odds %.3f, drawn %.3f\n", expected[b], (double)seen[b] / (double)n_trials);
    }
    print_message("%zu draws, %zu drafted, %zu of them kept; chi-square %.2f\n", n_trials, n_drafted, n_kept, chi);
    assert_true(n_drafted > 0 && n_kept > 0 && n_kept < n_trials);
    if (!(chi < 25)) fail_msg("chi-square %.2f of %d bins: above 25 once in 60,000 times", chi, N_BINS);
    free(odds);
    sqz_session_free(s);
}

static void test_draws_by_model(void **state)
{
    (void)state;
    draws(context, exact_options(SQZ_DRAFT_SELF), 160);
}

static void test_draws_by_the_upper_plane(void **state)
{
    struct sqz_session_options options = exact_options(SQZ_DRAFT_SELF);
    (void)state;
    options.exact = SQZ_EXACT_INT8;
    draws(planes, options, 120);
}

/* Penalties depend on the tokens so far, also on drafted ones; a grammar lets the draft be anything. */
static void test_other_sampling(void **state)
{
    struct sqz_error error;
    const struct sqz_sampling_options kinds[] = {
        {.temperature = 0.8f, .top_p = 0.9f, .seed = 3, .frequency_penalty = 0.7f, .presence_penalty = 0.3f},
        {.temperature = 0, .top_p = 1, .frequency_penalty = 1.5f},
        {.temperature = 0.8f, .top_p = 1, .seed = 3, .grammar = "root ::= [a-zA-Z ]+"},
        {.temperature = 0, .top_p = 1, .grammar = "root ::= [0-9 ,.]+"},
    };
    (void)state;
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        const struct sqz_session_options options = exact_options(SQZ_DRAFT_SELF);
        struct sqz_sampling *sampling, *beside;
        struct sqz_session *s = asked_session(&options);
        must(sqz_sampling_create(&sampling, model, &kinds[k], &error), &error);
        must(sqz_sampling_create(&beside, model, &kinds[k], &error), &error);
        sqz_session_sample_by(s, sampling);
        for (int i = 0; i < 12; i++) {
            struct sqz_choice choice, alone;
            sqz_sampling_next(beside, model, sqz_session_logits(s), 3, &alone); /* what the exact logits alone give */
            sqz_session_next(s, 3, &choice);
            assert_false(choice.stuck);
            assert_int_equal(choice.n_likely, 3);
            if (!sqz_sampling_has_odds(sampling)) assert_int_equal(choice.token, alone.token);
            if (sqz_sampling_has_odds(sampling)) break; /* drawn by other numbers: the state would be another */
            must(sqz_session_run(s, &choice.token, 1, &error), &error);
            if (choice.ends) break;
        }
        for (int i = 0; i < 12 && sqz_sampling_has_odds(sampling); i++) {
            struct sqz_choice choice;
            sqz_session_next(s, -1, &choice);
            must(sqz_session_run(s, &choice.token, 1, &error), &error);
        }
        sqz_session_free(s);
        sqz_sampling_free(sampling);
        sqz_sampling_free(beside);
    }
}

/* ---- Limits ---------------------------------------------------------------------------------- */

static void expect_refused(struct sqz_session_options options, const struct sqz_context *of, enum sqz_status wanted,
                           const char *words)
{
    struct sqz_error error;
    struct sqz_session *s;
    const enum sqz_status status = sqz_session_create(&s, model, of, &options, &error);
    if (status != wanted || s || !strstr(error.message, words))
        fail_msg("got %s \"%s\", wanted \"%s\"", sqz_status_name(status), error.message, words);
}

static void test_limits(void **state)
{
    struct sqz_error error;
    struct sqz_session_options options = exact_options(SQZ_DRAFT_SELF);
    struct sqz_prepare_options rounded;
    struct sqz_context *second;
    (void)state;
    options.exact = SQZ_EXACT_INT8;
    expect_refused(options, context, SQZ_ERROR_UNSUPPORTED, "this one has F16 rows; allowed is exact f16");
    expect_refused(exact_options(SQZ_DRAFT_SELF), planes, SQZ_ERROR_UNSUPPORTED, "allowed is exact int8");
    options.draft_rows = 2;
    expect_refused(options, planes, SQZ_ERROR_ARGUMENT, "draft rows 2: allowed are 0");
    options.exact = 9;
    expect_refused(options, context, SQZ_ERROR_ARGUMENT, "exact 9");
    options = exact_options(7);
    expect_refused(options, context, SQZ_ERROR_ARGUMENT, "draft 7");
    options = exact_options(SQZ_DRAFT_SELF);
    options.draft_budget = 0;
    expect_refused(options, context, SQZ_ERROR_ARGUMENT, "draft budget 0");
    options.draft_budget = NAN;
    expect_refused(options, context, SQZ_ERROR_ARGUMENT, "draft budget");
    options = exact_options(SQZ_DRAFT_SELF);
    options.draft_tokens = 17;
    expect_refused(options, context, SQZ_ERROR_ARGUMENT, "17 tokens: allowed are 1 to 16");
    sqz_prepare_options_default(&rounded);
    rounded.squeeze.keys = SQZ_INDEX_INT8;
    must(sqz_context_squeeze(context, rounded_path, &rounded, 0, NULL, &error), &error);
    must(sqz_context_open(&second, rounded_path, NULL, &error), &error);
    expect_refused(exact_options(SQZ_DRAFT_SELF), second, SQZ_ERROR_UNSUPPORTED, "INT8 alone");
    sqz_context_free(second);
    rounded.squeeze.keys = SQZ_INDEX_F16;
    rounded.squeeze.rows = SQZ_ROWS_INT4;
    must(sqz_context_squeeze(context, rounded_path, &rounded, 0, NULL, &error), &error);
    must(sqz_context_open(&second, rounded_path, NULL, &error), &error);
    options.draft_rows = SQZ_DRAFT_ROWS_UPPER;
    expect_refused(exact_options(SQZ_DRAFT_SELF), second, SQZ_ERROR_UNSUPPORTED, "in 4 bits");
    options.exact = SQZ_EXACT_INT8;
    expect_refused(options, second, SQZ_ERROR_UNSUPPORTED, "in 4 bits");
    sqz_context_free(second);

    /* Room to the last token. */
    options = exact_options(SQZ_DRAFT_SELF);
    options.n_user_tokens = N_ASKED + 7;
    struct sqz_session *s = asked_session(&options);
    assert_int_equal(sqz_session_set_budget(s, 0.5f, &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "exact answers read everything"));
    for (int i = 0; i < 7; i++) {
        const int32_t token = likeliest(sqz_session_logits(s), NULL);
        must(sqz_session_run(s, &token, 1, &error), &error);
    }
    const int32_t one_more = 5, none = (int32_t)model_info.n_vocab;
    assert_int_equal(sqz_session_run(s, &one_more, 1, &error), SQZ_ERROR_LENGTH);
    assert_int_equal(s->n_user, N_ASKED + 7);
    sqz_session_reset(s);
    must(sqz_session_run(s, text_tokens + N_CONTEXT, N_ASKED, &error), &error);
    assert_int_equal(sqz_session_run(s, &none, 1, &error), SQZ_ERROR_ARGUMENT);
    assert_int_equal(s->n_user, N_ASKED);
    sqz_session_free(s);
}

static int n_asked, cancel_at;

static bool at_some_time(void *user_data)
{
    (void)user_data;
    return ++n_asked == cancel_at;
}

/* Cancelled in a draft, between two, and while they are verified: the token was not run, and can be. */
static void test_cancel(void **state)
{
    struct sqz_error error;
    const struct sqz_session_options options = exact_options(SQZ_DRAFT_SELF);
    struct sqz_session *s = asked_session(&options);
    const int32_t token = likeliest(sqz_session_logits(s), NULL);
    int n_all = 0;
    (void)state;
    for (int part = 0; part < 4; part++) {
        n_asked = 0;
        cancel_at = part ? n_all * part / 4 : -1;
        sqz_session_set_cancel(s, at_some_time, NULL);
        const enum sqz_status status = sqz_session_run(s, &token, 1, &error);
        sqz_session_set_cancel(s, NULL, NULL);
        if (part == 0) {
            must(status, &error);
            n_all = n_asked;
        } else {
            assert_int_equal(status, SQZ_ERROR_CANCELLED);
            assert_int_equal(s->n_user, N_ASKED);
            assert_null(sqz_session_logits(s));
        }
        sqz_session_reset(s);
        must(sqz_session_run(s, text_tokens + N_CONTEXT, N_ASKED, &error), &error);
    }
    must(sqz_session_run(s, &token, 1, &error), &error);
    sqz_session_free(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy_self),    cmocka_unit_test(test_greedy_elsewhere),
        cmocka_unit_test(test_greedy_ngram),   cmocka_unit_test(test_greedy_chain),
        cmocka_unit_test(test_rolled_back),    cmocka_unit_test(test_seeds),
        cmocka_unit_test(test_draws_by_model), cmocka_unit_test(test_other_sampling),
        cmocka_unit_test(test_limits),         cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_greedy_planes),  cmocka_unit_test(test_draws_by_the_upper_plane),
        cmocka_unit_test(test_greedy_long),
    };
    return cmocka_run_group_tests_name("speculation", tests, set_up, tear_down);
}
