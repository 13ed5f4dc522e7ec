/* What `squeeze serve` asks of the engine: conversations as tokens, choosing tokens, documents prepared in pieces. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "conversation.h"
#include "preparing.h"
#include "sampling.h"

static struct sqz_model *model;
static struct sqz_model_info info;
static struct sqz_context *context;
static char document[1501], path[1024], other_path[1024];

static void must(enum sqz_status status, const struct sqz_error *error)
{
    if (status != SQZ_OK) fail_msg("%s: %s", sqz_status_name(status), error->message);
}

static void prepare_in_pieces(const char *to, size_t piece)
{
    struct sqz_error error;
    struct sqz_preparing *preparing;
    struct sqz_prepare_report report;
    int32_t *tokens;
    size_t n;
    bool has_template;
    must(sqz_document_tokens(model, document, strlen(document), false, &tokens, &n, &has_template, &error), &error);
    must(sqz_preparing_begin(&preparing, model, tokens, n, has_template, to, NULL, &error), &error);
    free(tokens);
    assert_int_equal(sqz_preparing_finish(preparing, 1, NULL, &error), SQZ_ERROR_ARGUMENT); /* not read yet */
    for (size_t left = n; left > 0; left = sqz_preparing_left(preparing)) {
        assert_int_equal(left, sqz_preparing_left(preparing));
        must(sqz_preparing_step(preparing, piece, &error), &error);
        assert_int_equal(sqz_preparing_left(preparing), left > piece ? left - piece : 0);
    }
    must(sqz_preparing_finish(preparing, 2, &report, &error), &error);
    assert_int_equal(report.n_context_tokens, n);
    sqz_preparing_free(preparing);
}

static int set_up(void **state)
{
    struct sqz_error error;
    const char *file = getenv("SQUEEZE_MODEL"), *folder = getenv("SQUEEZE_TEST_FOLDER");
    (void)state;
    if (!file || !folder) {
        fprintf(stderr, "SQUEEZE_MODEL and SQUEEZE_TEST_FOLDER must name the model and a folder to write into\n");
        return 1;
    }
    for (size_t i = 0, n = 0; n + 100 < sizeof document; i++)
        n += (size_t)snprintf(document + n, sizeof document - n, "On day %zu the ship had gone %zu miles. ", i, i * 37);
    snprintf(path, sizeof path, "%s/serving.sqz.gguf", folder);
    snprintf(other_path, sizeof other_path, "%s/serving2.sqz.gguf", folder);
    sqz_llama_log_take();
    must(sqz_model_open(&model, file, NULL, &error), &error);
    sqz_model_get_info(model, &info);
    must(sqz_prepare(model, document, strlen(document), path, NULL, NULL, &error), &error);
    must(sqz_context_open(&context, path, NULL, &error), &error);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    sqz_context_free(context);
    sqz_model_free(model);
    remove(path);
    remove(other_path);
    return 0;
}

static char *read_file(const char *name, size_t *n)
{
    FILE *file = fopen(name, "rb");
    char *data = malloc(1 << 28);
    assert_non_null(file);
    assert_non_null(data);
    *n = fread(data, 1, 1 << 28, file);
    fclose(file);
    return data;
}

/* Batches of the same size give the same file, whoever asks for them. */
static void test_pieces_equal_whole(void **state)
{
    size_t n, m;
    (void)state;
    prepare_in_pieces(other_path, 512);
    char *whole = read_file(path, &n), *pieces = read_file(other_path, &m);
    assert_int_equal(n, m);
    assert_memory_equal(whole, pieces, n);
    free(whole);
    free(pieces);
}

static double log_probability(const struct sqz_context *of, const char *question, int32_t token, int32_t *likeliest)
{
    struct sqz_error error;
    struct sqz_session *session;
    struct sqz_session_options options;
    const struct sqz_message message = {"user", question, strlen(question)};
    int32_t *tokens;
    size_t n, best = 0;
    double sum = 0;
    sqz_session_options_default(&options);
    options.budget = 1;
    must(sqz_session_create(&session, model, of, &options, &error), &error);
    must(sqz_conversation_tokens_behind(model, true, &message, 1, &tokens, &n, &error), &error);
    must(sqz_session_run(session, tokens, n, &error), &error);
    const float *logits = sqz_session_logits(session);
    for (size_t i = 1; i < info.n_vocab; i++) best = logits[i] > logits[best] ? i : best;
    for (size_t i = 0; i < info.n_vocab; i++) sum += exp((double)logits[i] - (double)logits[best]);
    *likeliest = (int32_t)best;
    const double value = (double)logits[token < 0 ? (int32_t)best : token] - (double)logits[best] - log(sum);
    free(tokens);
    sqz_session_free(session);
    return value;
}

/* Short pieces change the rounding of llama.cpp's products, which follows the batch, and nothing else: differences of
 * some hundredths in a log probability are what two batch sizes differ by. */
static void test_short_pieces(void **state)
{
    static const char question[] = "How far had the ship gone on day 30?";
    struct sqz_error error;
    struct sqz_context *other;
    int32_t first, second;
    (void)state;
    prepare_in_pieces(other_path, 37);
    must(sqz_context_open(&other, other_path, NULL, &error), &error);
    const double whole = log_probability(context, question, -1, &first);
    const double pieces = log_probability(other, question, first, &second);
    print_message("log probability of the likeliest token: %.4f whole, %.4f in pieces\n", whole, pieces);
    assert_true(fabs(whole - pieces) <= 0.3);
    sqz_context_free(other);
}

/* A context of the tokens' first one: what stands under the session of a request. */
static struct sqz_context *blank_context(int32_t token, const char *to)
{
    struct sqz_error error;
    struct sqz_context *blank;
    struct sqz_prepare_options options;
    sqz_prepare_options_default(&options);
    options.squeeze.n_levels = 0;
    options.squeeze.code_words = 0;
    must(sqz_prepare_tokens(model, &token, 1, to, &options, NULL, &error), &error);
    must(sqz_context_open(&blank, to, NULL, &error), &error);
    remove(to);
    return blank;
}

/* What a session reads for its own answer is prepared from its rows, also when it stops before the end. */
static void follow_session(const char *to, size_t n_session)
{
    struct sqz_error error;
    struct sqz_preparing *preparing;
    struct sqz_session *session;
    int32_t *tokens;
    size_t n, calibration;
    bool has_template;
    struct sqz_squeeze_options squeeze;
    sqz_squeeze_options_default(&squeeze, SQZ_RULE_DEFAULT);
    calibration = squeeze.n_calibration;
    must(sqz_document_tokens(model, document, strlen(document), false, &tokens, &n, &has_template, &error), &error);
    struct sqz_context *blank = blank_context(tokens[0], to);
    must(sqz_session_create(&session, model, blank, NULL, &error), &error);
    must(sqz_preparing_begin(&preparing, model, tokens, n, has_template, to, NULL, &error), &error);
    if (n_session > n) n_session = n;
    for (size_t at = 1; at < n_session;) {
        const size_t piece = n_session - at < 100 ? n_session - at : 100;
        must(sqz_session_run(session, tokens + at, piece, &error), &error);
        at += piece;
        must(sqz_preparing_follow(preparing, session, &error), &error);
        const size_t left = sqz_preparing_left(preparing);
        assert_int_equal(left, n - at > calibration ? n - at : calibration);
        must(sqz_preparing_follow(preparing, session, &error), &error); /* nothing new */
        assert_int_equal(sqz_preparing_left(preparing), left);
    }
    sqz_session_free(session);
    sqz_context_free(blank);
    while (sqz_preparing_left(preparing)) must(sqz_preparing_step(preparing, 512, &error), &error);
    must(sqz_preparing_finish(preparing, 2, NULL, &error), &error);
    sqz_preparing_free(preparing);
    free(tokens);
}

static void test_follow(void **state)
{
    static const char question[] = "How far had the ship gone on day 30?";
    struct sqz_error error;
    int32_t first, second;
    (void)state;
    const double whole = log_probability(context, question, -1, &first);
    for (int i = 0; i < 2; i++) {
        struct sqz_context *other;
        struct sqz_context_info other_info, whole_info;
        follow_session(other_path, i ? 300 : SIZE_MAX);
        must(sqz_context_open(&other, other_path, NULL, &error), &error);
        sqz_context_get_info(other, &other_info);
        sqz_context_get_info(context, &whole_info);
        assert_int_equal(other_info.n_tokens, whole_info.n_tokens);
        assert_memory_equal(other_info.tokens, whole_info.tokens, whole_info.n_tokens * sizeof *whole_info.tokens);
        const double followed = log_probability(other, question, first, &second);
        print_message("log probability of the likeliest token: %.4f whole, %.4f followed\n", whole, followed);
        assert_true(fabs(whole - followed) <= 0.3);
        sqz_context_free(other);
    }
}

/* Of rows that are no longer in the order of the text nothing is taken. */
static void test_follow_refused(void **state)
{
    struct sqz_error error;
    struct sqz_preparing *preparing;
    struct sqz_session *session;
    struct sqz_context_info about;
    (void)state;
    sqz_context_get_info(context, &about);
    must(sqz_session_create(&session, model, context, NULL, &error), &error);
    must(sqz_preparing_begin(&preparing, model, about.tokens, about.n_tokens, true, other_path, NULL, &error), &error);
    assert_int_equal(sqz_preparing_follow(preparing, session, &error), SQZ_ERROR_UNSUPPORTED);
    assert_int_equal(sqz_preparing_left(preparing), about.n_tokens);
    sqz_preparing_free(preparing);
    sqz_session_free(session);
}

static bool stop_reading(const struct sqz_progress *progress, void *data)
{
    (void)progress;
    return --*(int *)data > 0;
}

/* One that is given up leaves no file. */
static void test_given_up(void **state)
{
    struct sqz_error error;
    struct sqz_preparing *preparing;
    struct sqz_prepare_options options;
    const int32_t tokens[64] = {1};
    int turns = 2;
    (void)state;
    remove(other_path);
    sqz_prepare_options_default(&options);
    options.progress = stop_reading;
    options.user_data = &turns;
    must(sqz_preparing_begin(&preparing, model, tokens, 64, false, other_path, &options, &error), &error);
    assert_int_equal(sqz_preparing_step(preparing, 32, &error), SQZ_ERROR_CANCELLED);
    sqz_preparing_free(preparing);
    assert_null(fopen(other_path, "rb"));
}

/* ---- Conversations ------------------------------------------------------------------ */

/* Written out, control tokens included. */
static void expect_text(const int32_t *tokens, size_t n, const char *wanted)
{
    struct sqz_error error;
    int32_t *again;
    size_t m;
    char text[4096] = "";
    for (size_t i = 0, at = 0; i < n; i++) {
        char piece[256];
        const size_t bytes = sqz_model_token_text(model, tokens[i], piece, sizeof piece);
        memcpy(text + at, bytes ? piece : "#", bytes ? bytes : 1);
        at += bytes ? bytes : 1;
        text[at] = '\0';
    }
    assert_string_equal(text, wanted);
    must(sqz_model_tokenize(model, wanted, strlen(wanted), &again, &m, &error), &error);
    free(again);
}

static void test_conversation(void **state)
{
    static const struct sqz_message messages[] = {{"system", "Be brief.", 9},
                                                  {"user", "Say <|im_end|> twice.", 21},
                                                  {"assistant", "No.", 3},
                                                  {"user", "Why?", 4}};
    struct sqz_error error;
    int32_t *tokens;
    size_t n;
    (void)state;
    must(sqz_conversation_tokens(model, true, messages, 4, &tokens, &n, &error), &error);
    /* '#' are control tokens: the words of one in a message are not. */
    expect_text(tokens, n,
                "#system\nBe brief.#\n#user\nSay <|im_end|> twice.#\n#assistant\nNo.#\n#user\nWhy?#\n#assistant\n");
    free(tokens);
    must(sqz_conversation_tokens_behind(model, true, messages + 1, 3, &tokens, &n, &error), &error);
    expect_text(tokens, n, "Say <|im_end|> twice.#\n#assistant\nNo.#\n#user\nWhy?#\n#assistant\n");
    free(tokens);
    must(sqz_conversation_tokens(model, false, messages, 4, &tokens, &n, &error), &error);
    expect_text(tokens, n, "Be brief.\n\nQuestion: Say <|im_end|> twice.\nAnswer: No.\n\nQuestion: Why?\nAnswer:");
    free(tokens);
    assert_int_equal(sqz_conversation_tokens(model, true, messages, 0, &tokens, &n, &error), SQZ_ERROR_ARGUMENT);
    assert_null(tokens);
}

/* The same tokens as a question of `ask` has. */
static void test_same_as_question(void **state)
{
    static const char question[] = "How far had the ship gone?";
    const struct sqz_message message = {"user", question, sizeof question - 1};
    struct sqz_error error;
    struct sqz_session *session;
    int32_t *a, *b;
    size_t n, m;
    (void)state;
    must(sqz_session_create(&session, model, context, NULL, &error), &error);
    must(sqz_session_question_tokens(session, question, sizeof question - 1, true, &a, &n, &error), &error);
    must(sqz_conversation_tokens_behind(model, true, &message, 1, &b, &m, &error), &error);
    assert_int_equal(n, m);
    assert_memory_equal(a, b, n * sizeof *a);
    free(a);
    free(b);
    sqz_session_free(session);
}

static void test_document_of_context(void **state)
{
    struct sqz_error error;
    char *text;
    size_t n, before;
    bool plainly;
    (void)state;
    must(sqz_context_document(model, context, &text, &n, &before, &plainly, &error), &error);
    assert_true(plainly && before > 0);
    assert_int_equal(n, strlen(document));
    assert_string_equal(text, document);
    free(text);
}

/* ---- Choosing ----------------------------------------------------------------------------- */

/* Says n tokens behind a question; text gets them. */
static void say(const struct sqz_sampling_options *options, const char *question, size_t n, int n_likely, char *text)
{
    struct sqz_error error;
    struct sqz_session *session;
    struct sqz_sampling *sampling;
    struct sqz_choice choice;
    const struct sqz_message message = {"user", question, strlen(question)};
    int32_t *tokens;
    size_t n_tokens, at = 0;
    must(sqz_session_create(&session, model, context, NULL, &error), &error);
    must(sqz_sampling_create(&sampling, model, options, &error), &error);
    must(sqz_conversation_tokens_behind(model, true, &message, 1, &tokens, &n_tokens, &error), &error);
    must(sqz_session_run(session, tokens, n_tokens, &error), &error);
    free(tokens);
    for (size_t i = 0; i < n; i++) {
        sqz_sampling_next(sampling, model, sqz_session_logits(session), n_likely, &choice);
        assert_false(choice.stuck);
        assert_int_equal(choice.n_likely, n_likely < 0 ? 0 : n_likely);
        for (size_t k = 1; k < choice.n_likely; k++)
            assert_true(choice.likely[k].log_probability <= choice.likely[k - 1].log_probability);
        if (n_likely > 0 && options->temperature == 0 && !options->grammar) {
            assert_int_equal(choice.likely[0].token, choice.token);
            assert_true(choice.log_probability <= 0 && choice.likely[0].log_probability == choice.log_probability);
        }
        if (choice.ends) break;
        at += sqz_model_token_text(model, choice.token, text + at, 200);
        must(sqz_session_run(session, &choice.token, 1, &error), &error);
    }
    text[at] = '\0';
    sqz_sampling_free(sampling);
    sqz_session_free(session);
}

static void test_sampling(void **state)
{
    static const char question[] = "Tell a story about the ship.";
    struct sqz_sampling_options options = {.top_p = 1};
    char greedy[8192], first[8192], second[8192];
    (void)state;
    say(&options, question, 10, 5, greedy);
    say(&options, question, 10, -1, first);
    assert_string_equal(greedy, first);
    options.temperature = 2;
    options.seed = 7;
    say(&options, question, 10, 3, first);
    say(&options, question, 10, -1, second);
    assert_string_equal(first, second); /* one seed, one answer */
    options.seed = 8;
    say(&options, question, 10, -1, second);
    assert_string_not_equal(first, second);
    options.top_k = 1;
    say(&options, question, 10, -1, second);
    assert_string_equal(second, greedy);
}

static void test_grammar(void **state)
{
    static const char grammar[] = "root ::= \"{\\\"miles\\\": \" [0-9]{2} \"}\"\n";
    struct sqz_sampling_options options = {.top_p = 1, .temperature = 3, .grammar = grammar};
    struct sqz_sampling *sampling;
    struct sqz_error error;
    char text[8192];
    unsigned miles;
    (void)state;
    for (options.seed = 0; options.seed < 3; options.seed++) {
        say(&options, "How far?", 40, 2, text);
        assert_int_equal(strlen(text), 13);
        assert_int_equal(sscanf(text, "{\"miles\": %2u}", &miles), 1);
        assert_int_equal(text[12], '}');
    }
    options.grammar = "root ::= (";
    assert_int_equal(sqz_sampling_create(&sampling, model, &options, &error), SQZ_ERROR_ARGUMENT);
    assert_null(sampling);
}

/* A bias of 100 decides, one on a token that there is not is refused. */
static void test_bias(void **state)
{
    struct sqz_bias bias = {.bias = 100};
    struct sqz_sampling_options options = {.top_p = 1, .biases = &bias, .n_biases = 1};
    struct sqz_sampling *sampling;
    struct sqz_error error;
    char text[8192], piece[64];
    int32_t *tokens;
    size_t n;
    (void)state;
    must(sqz_model_tokenize(model, "ship", 4, &tokens, &n, &error), &error);
    bias.token = tokens[0];
    piece[sqz_model_token_text(model, tokens[0], piece, sizeof piece - 1)] = '\0';
    free(tokens);
    say(&options, "What is it?", 3, -1, text);
    for (int i = 0; i < 3; i++) assert_memory_equal(text + (size_t)i * strlen(piece), piece, strlen(piece));
    bias.token = (int32_t)info.n_vocab;
    assert_int_equal(sqz_sampling_create(&sampling, model, &options, &error), SQZ_ERROR_ARGUMENT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pieces_equal_whole),
        cmocka_unit_test(test_short_pieces),
        cmocka_unit_test(test_follow),
        cmocka_unit_test(test_follow_refused),
        cmocka_unit_test(test_given_up),
        cmocka_unit_test(test_conversation),
        cmocka_unit_test(test_same_as_question),
        cmocka_unit_test(test_document_of_context),
        cmocka_unit_test(test_sampling),
        cmocka_unit_test(test_grammar),
        cmocka_unit_test(test_bias),
    };
    return cmocka_run_group_tests_name("serving", tests, set_up, tear_down);
}
