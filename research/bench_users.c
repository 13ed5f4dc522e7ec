/*
 * squeeze bench users: n users ask different questions about one context at
 * once, in our batches and in llama.cpp's own (one prefix that all sequences
 * share in its unified cache), and n users without any context, which is what
 * the matrix products alone allow. One process, the same threads, in turns;
 * medians with the fastest and the slowest. First each user's answer in the
 * batch is compared with the answer alone: where the two part, dense products
 * of another batch size have rounded a near tie the other way, or nothing is
 * timed.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "answer.h"
#include "baseline.h"
#include "bench_question.h"
#include "bench_users.h"
#include "common.h"
#include "inputs.h"
#include "json_output.h"
#include "machine.h"
#include "memory.h"
#include "options.h"
#include "outputs.h"
#include "plot.h"
#include "progress.h"
#include "signals.h"
#include "table.h"
#include "times.h"

static const struct command_help help = {"bench users", "",
                                         "Measures many users who ask different questions about one context at once: "
                                         "our batches beside llama.cpp's own, all "
                                         "users on one shared prefix, and beside what the matrix products alone allow; "
                                         "--apart gives each user a copy of the context.",
                                         "  squeeze bench users -c book.sqz.gguf\n"
                                         "  squeeze bench users -c book.sqz.gguf --users 1,8 --tokens 32 --json\n"
                                         "  squeeze bench users -c book.sqz.gguf --plot users.svg\n",
                                         NULL};

enum { MAX_USERS = 64, MAX_REPEATS = 16, MEMORY_TOKENS = 200 };

/* Of two answers, a step whose likeliest tokens are closer than this may go either way. */
static const double near_tie = 0.25; /* nats */

struct measured {
    double tokens_s[MAX_REPEATS], first_token[MAX_REPEATS];
    size_t n;
};

enum who { OURS, LLAMA, PRODUCTS, N_WHO };

struct row {
    size_t n_users;
    struct measured by[N_WHO];
    double budget_read;
};

struct bench {
    const char *context_path, *model_path, *plot;
    struct gpu_flags gpu;
    double budget;
    size_t n_threads, n_tokens, n_question_tokens, n_repeats, most_users;
    struct count_list users;
    bool apart, json, quiet;

    struct sqz_context *context[MAX_USERS]; /* one, or apart one a user */
    struct sqz_context_info info;
    struct sqz_model *model;
    struct sqz_model_info model_info;
    struct sqz_session *session[MAX_USERS];
    struct sqz_baseline *shared, *empty;
    int32_t *questions; /* [MAX_USERS][n_question_tokens] */
    int32_t *alone;     /* [most_users][n_tokens] */
    json_t *near_ties;
    size_t n_equal;
    double memory_a_user;
    struct row rows[COUNT_LIST_MAX];
};

static void say(const struct bench *bench, const char *what)
{
    if (!bench->quiet) fprintf(stderr, "bench: %s\n", what);
}

/* ---- Questions -------------------------------------------------------------------------- */

/* Question `user`: its own words, brought to the length asked for, its template whole. */
static void make_question(struct bench *bench, size_t user)
{
    static const char *const asked[] = {
        "What does the text say about its most important subject, and where is that said?",
        "Which names are given in the text, and what does it say about each of them?",
        "Which duties does the text lay on whom, and what follows when they are not met?",
        "What happens first, what happens last, and what lies between the two of them?",
        "Which numbers and dates does the text give, and what does each of them stand for?",
        "What is forbidden in the text, what is allowed, and on which conditions is it?",
        "How would you tell the whole of the text to somebody who has a minute for it?",
        "Which words does the text define, and how do those meanings differ from the usual?",
    };
    enum { N_ASKED = sizeof asked / sizeof *asked };
    char text[256];
    size_t n = bench->n_question_tokens;
    snprintf(text, sizeof text, "Part %zu: %s", user + 1, asked[user % N_ASKED]);
    int32_t *tokens = bench_question(bench->model, bench->session[0], text, &n);
    memcpy(bench->questions + user * n, tokens, n * sizeof *tokens);
    free(tokens);
}

/* ---- Ours ------------------------------------------------------------------------------- */

static int32_t likeliest(const float *logits, size_t n, double *lead)
{
    size_t best = 0;
    float next = -INFINITY;
    for (size_t i = 1; i < n; i++) {
        if (logits[i] > logits[best]) {
            next = logits[best];
            best = i;
        } else if (logits[i] > next) {
            next = logits[i];
        }
    }
    *lead = (double)(logits[best] - next);
    return (int32_t)best;
}

/* Runs n_tokens tokens of each of n users, [n][n_tokens], together. */
static void run_ours(struct bench *bench, const int32_t *tokens, size_t n_tokens, size_t n)
{
    static struct sqz_batch_item items[MAX_USERS];
    struct sqz_error error;
    for (size_t u = 0; u < n; u++) {
        items[u].session = bench->session[u];
        items[u].tokens = tokens + u * n_tokens;
        items[u].n_tokens = n_tokens;
    }
    stop_on(sqz_batch_run(items, n, &error), &error);
    for (size_t u = 0; u < n; u++) stop_on(items[u].status, &items[u].error);
}

/* The next token of each of the users. */
static void choose_ours(struct bench *bench, int32_t *next, size_t n)
{
    for (size_t u = 0; u < n; u++)
        next[u] = sqz_baseline_choose(sqz_session_logits(bench->session[u]), bench->model_info.n_vocab);
}

static void time_ours(struct bench *bench, struct row *row)
{
    int32_t next[MAX_USERS];
    struct measured *m = &row->by[OURS];
    struct sqz_attention_stats read = {0};
    for (size_t u = 0; u < row->n_users; u++) sqz_session_reset(bench->session[u]);
    double since = now_seconds();
    run_ours(bench, bench->questions, bench->n_question_tokens, row->n_users);
    choose_ours(bench, next, row->n_users);
    m->first_token[m->n] = now_seconds() - since;
    for (size_t u = 0; u < row->n_users; u++) sqz_session_clear_stats(bench->session[u]);
    since = now_seconds();
    for (size_t i = 0; i < bench->n_tokens; i++) {
        run_ours(bench, next, 1, row->n_users);
        choose_ours(bench, next, row->n_users);
    }
    m->tokens_s[m->n++] = (double)(row->n_users * bench->n_tokens) / (now_seconds() - since);
    for (size_t u = 0; u < row->n_users; u++) {
        struct sqz_session_stats stats;
        sqz_session_get_stats(bench->session[u], &stats);
        sqz_attention_stats_add(&read, &stats.attention);
    }
    row->budget_read = sqz_attention_stats_share(&read);
}

/* ---- llama.cpp ------------------------------------------------------------------------------ */

static void time_baseline(struct bench *bench, struct sqz_baseline *baseline, size_t n_prefix, size_t n_users,
                          struct measured *m)
{
    int32_t next[MAX_USERS];
    struct sqz_error error;
    sqz_baseline_truncate(baseline, n_prefix);
    sqz_baseline_share(baseline);
    double since = now_seconds();
    stop_on(sqz_baseline_run_shared(baseline, bench->questions, bench->n_question_tokens, n_users, n_prefix, &error),
            &error);
    for (size_t u = 0; u < n_users; u++) next[u] = sqz_baseline_likeliest(baseline, u);
    m->first_token[m->n] = now_seconds() - since;
    since = now_seconds();
    for (size_t i = 0; i < bench->n_tokens; i++) {
        stop_on(sqz_baseline_run_shared(baseline, next, 1, n_users, n_prefix + bench->n_question_tokens + i, &error),
                &error);
        for (size_t u = 0; u < n_users; u++) next[u] = sqz_baseline_likeliest(baseline, u);
    }
    m->tokens_s[m->n++] = (double)(n_users * bench->n_tokens) / (now_seconds() - since);
}

/* ---- Correctness ------------------------------------------------------------------------- */

/* Users may change what others get only where each does not read its own selection alone. */
static bool may_differ(const struct bench *bench)
{
    return together_of(&bench->gpu, bench->model_info.n_gpu_layers) != SQZ_TOGETHER_EACH;
}

static void note_parting(struct bench *bench, size_t user, size_t step, double lead)
{
    if (!(lead < near_tie) && !may_differ(bench)) {
        die("user %zu of %zu together gets another answer than alone, at token %zu where the likeliest led by %.3f "
            "nats; "
            "nothing was timed",
            user + 1, bench->most_users, step + 1, lead);
    }
    json_array_append_new(bench->near_ties, json_pack("{s:o,s:o,s:o}", "user", json_count(user + 1), "token",
                                                      json_count(step + 1), "lead", json_number(lead)));
}

/* Every user alone, then all together; where a user's answers part, it was a near tie. */
static void compare_answers(struct bench *bench)
{
    int32_t next[MAX_USERS];
    double *leads = allocate(bench->most_users * bench->n_tokens, sizeof *leads);
    bool parted[MAX_USERS] = {false};
    const size_t n = bench->most_users, n_tokens = bench->n_tokens;
    struct sqz_error error;
    say(bench, "answers alone and together");
    for (size_t u = 0; u < n; u++) {
        sqz_session_reset(bench->session[u]);
        stop_on(sqz_session_run(bench->session[u], bench->questions + u * bench->n_question_tokens,
                                bench->n_question_tokens, &error),
                &error);
        for (size_t i = 0; i < n_tokens; i++) {
            int32_t *token = &bench->alone[u * n_tokens + i];
            *token =
                likeliest(sqz_session_logits(bench->session[u]), bench->model_info.n_vocab, &leads[u * n_tokens + i]);
            stop_on(sqz_session_run(bench->session[u], token, 1, &error), &error);
        }
    }
    for (size_t u = 0; u < n; u++) sqz_session_reset(bench->session[u]);
    run_ours(bench, bench->questions, bench->n_question_tokens, n);
    bench->n_equal = n;
    for (size_t i = 0; i < n_tokens; i++) {
        choose_ours(bench, next, n);
        for (size_t u = 0; u < n; u++) {
            if (!parted[u] && next[u] != bench->alone[u * n_tokens + i]) {
                note_parting(bench, u, i, leads[u * n_tokens + i]);
                parted[u] = true;
                bench->n_equal--;
            }
        }
        run_ours(bench, next, 1, n);
    }
    free(leads);
}

/* ---- Memory ------------------------------------------------------------------------------- */

/* Pages of this process that are in memory, in bytes; 0 where the system does not say. */
static double resident_bytes(void)
{
    FILE *file = fopen("/proc/self/statm", "r");
    unsigned long pages = 0;
    if (file) {
        if (fscanf(file, "%*u %lu", &pages) != 1) pages = 0;
        fclose(file);
    }
    return (double)pages * (double)sysconf(_SC_PAGESIZE);
}

/* What a user of MEMORY_TOKENS tokens adds beside its own keys and values. The first has made room for all that users
 * share; so it is the others that count. On a card their keys and values are not in this process's memory, and what is
 * left of the difference says nothing. */
static void measure_memory(struct bench *bench)
{
    struct sqz_error error;
    struct sqz_session_options options;
    struct sqz_session *users[MAX_USERS] = {0};
    enum { N_USERS = 8 };
    int32_t tokens[MEMORY_TOKENS];
    double before = 0;
    bench->memory_a_user = NAN;
    if (bench->model_info.n_gpu_layers) return;
    const double kv = (double)bench->info.kv_bytes / (double)bench->info.n_tokens * MEMORY_TOKENS;
    for (size_t i = 0; i < MEMORY_TOKENS; i++) tokens[i] = bench->questions[i % bench->n_question_tokens];
    sqz_session_options_default(&options);
    options.budget = (float)bench->budget;
    for (size_t u = 0; u <= N_USERS; u++) {
        stop_on(sqz_session_create(&users[u], bench->model, bench->context[0], &options, &error), &error);
        stop_on(sqz_session_run(users[u], tokens, MEMORY_TOKENS, &error), &error);
        if (u == 0) before = resident_bytes();
    }
    const double after = resident_bytes();
    if (before > 0) bench->memory_a_user = (after - before) / N_USERS - kv;
    for (size_t u = 0; u <= N_USERS; u++) sqz_session_free(users[u]);
}

/* ---- Results ------------------------------------------------------------------------------ */

static double median_rate(const struct row *row, enum who who)
{
    return times_quantile(row->by[who].tokens_s, row->by[who].n, 0.5);
}

static double median_first(const struct row *row, enum who who)
{
    return times_quantile(row->by[who].first_token, row->by[who].n, 0.5);
}

static const struct table_column columns[] = {
    {"users", "users", 1, 3},
    {"tokens_s", "tokens/s", 1, 4},
    {"tokens_s_least", "slowest", 1, 4},
    {"tokens_s_most", "fastest", 1, 4},
    {"tokens_s_a_user", "a user", 1, 4},
    {"vs_one", "vs one", 1, 3},
    {"llama_tokens_s", "llama.cpp", 1, 4},
    {"vs_llama", "vs llama.cpp", 1, 3},
    {"products_tokens_s", "no context", 1, 4},
    {"share_of_products", "% of it", 100, 3},
    {"first_token_s", "first token s", 1, 3},
    {"llama_first_token_s", "llama.cpp s", 1, 3},
    {"budget_read", NULL, 1, 3},
};

static struct table make_table(const struct bench *bench)
{
    struct table table;
    table_begin(&table, "rows", NULL, columns, sizeof columns / sizeof *columns);
    for (size_t i = 0; i < bench->users.n; i++) {
        const struct row *row = &bench->rows[i];
        const struct measured *ours = &row->by[OURS];
        const double rate = median_rate(row, OURS), llama = median_rate(row, LLAMA);
        const double products = median_rate(row, PRODUCTS);
        const bool has_one = bench->rows[0].n_users == 1;
        table_number(&table, (double)row->n_users);
        table_number(&table, rate);
        table_number(&table, times_quantile(ours->tokens_s, ours->n, 0));
        table_number(&table, times_quantile(ours->tokens_s, ours->n, 1));
        table_number(&table, rate / (double)row->n_users);
        table_number(&table, has_one ? rate / median_rate(&bench->rows[0], OURS) : NAN);
        table_number(&table, llama);
        table_number(&table, rate / llama);
        table_number(&table, products);
        table_number(&table, rate / products);
        table_number(&table, median_first(row, OURS));
        table_number(&table, median_first(row, LLAMA));
        table_number(&table, row->budget_read);
    }
    return table;
}

static int print_results_json(const struct bench *bench, const struct table *table)
{
    json_t *root = json_object();
    json_object_set_new(root, "rows", table_json(table));
    json_object_set_new(root, "answers_compared", json_count(bench->most_users));
    json_object_set_new(root, "answers_equal", json_count(bench->n_equal));
    json_object_set(root, "near_ties", bench->near_ties);
    json_object_set_new(root, "memory_a_user_bytes", json_number(bench->memory_a_user));
    json_object_set_new(root, "context_tokens", json_count(bench->info.n_tokens));
    json_object_set_new(root, "apart", json_boolean(bench->apart));
    json_object_set_new(root, "together",
                        json_text(together_names[together_of(&bench->gpu, bench->model_info.n_gpu_layers)]));
    json_object_set_new(root, "weight_copies_bytes", json_count(bench->model_info.weight_copies_bytes));
    json_object_set_new(root, "question_tokens", json_count(bench->n_question_tokens));
    json_object_set_new(root, "generated_tokens", json_count(bench->n_tokens));
    json_object_set_new(root, "budget_asked", json_number(bench->budget));
    json_object_set_new(root, "repeats", json_count(bench->n_repeats));
    json_object_set_new(root, "model", json_text(bench->model_info.description));
    add_origin_json(root, bench->model_info.n_threads);
    return print_json(root);
}

static int print_results(const struct bench *bench, const struct table *table)
{
    char tokens[NUMBER_TEXT_MAX], model[PLAIN_TEXT_MAX];
    printf("%s, %s tokens of context%s, budget %.3g, %d threads, %zu tokens a question, %zu an answer\n\n",
           plain_text(model, bench->model_info.description), count_text(tokens, bench->info.n_tokens),
           bench->apart ? " each" : "", bench->budget, bench->model_info.n_threads, bench->n_question_tokens,
           bench->n_tokens);
    table_print(table);
    printf("\nanswers together as alone: %zu of %zu", bench->n_equal, bench->most_users);
    size_t i;
    json_t *entry;
    json_array_foreach(bench->near_ties, i, entry)
    {
        printf("%suser %lld parts at token %lld, a near tie (%.3f nats)", i ? ", " : "; ",
               (long long)json_integer_value(json_object_get(entry, "user")),
               (long long)json_integer_value(json_object_get(entry, "token")),
               json_number_value(json_object_get(entry, "lead")));
    }
    printf("\n");
    if (isfinite(bench->memory_a_user)) {
        printf("a user of %d tokens adds %.2f MB beside its own keys and values\n", MEMORY_TOKENS,
               bench->memory_a_user / 1e6);
    }
    return close_stdout();
}

static int draw(const struct bench *bench)
{
    static const char *const names[] = {"squeeze", "llama.cpp, one shared prefix", "products alone (no context)"};
    struct text_buffer script = {0};
    for (int who = 0; who < N_WHO; who++) {
        text_buffer_print(&script, "$who%d << EOD\n", who);
        for (size_t i = 0; i < bench->users.n; i++)
            text_buffer_print(&script, "%zu %.6g\n", bench->rows[i].n_users, median_rate(&bench->rows[i], who));
        text_buffer_print(&script, "EOD\n");
    }
    text_buffer_print(&script,
                      "set terminal %s size 720,480\nset key outside top center horizontal\nset grid\n"
                      "set logscale xy 2\nset xlabel 'users at once'\nset ylabel 'tokens/s of all users'\nplot ",
                      plot_is_svg(bench->plot) ? "svg" : "pngcairo");
    for (int who = 0; who < N_WHO; who++) {
        text_buffer_print(&script, "%s$who%d using 1:2 with linespoints linewidth 2 title '%s'", who ? ", " : "", who,
                          names[who]);
    }
    text_buffer_print(&script, "\n");
    const int code = plot_draw(bench->plot, &script);
    text_buffer_free(&script);
    return code;
}

/* ---- The command ----------------------------------------------------------------------------- */

static void open_all(struct bench *bench)
{
    struct sqz_error error;
    struct sqz_session_options options;
    for (size_t u = 0; u < (bench->apart ? bench->most_users : 1); u++)
        bench->context[u] = open_context(bench->context_path, NULL);
    sqz_context_get_info(bench->context[0], &bench->info);
    bench->gpu.in_shards = bench->info.n_shards > 0;
    bench->model = open_model_on(bench->model_path, measured_threads(bench->n_threads), (double)bench->info.rope_scale,
                                 &bench->gpu);
    sqz_model_get_info(bench->model, &bench->model_info);
    const size_t a_user = bench->n_question_tokens + bench->n_tokens, needed = bench->info.n_tokens + a_user;
    if (needed > bench->model_info.n_context_tokens) {
        die("context, question and answer take %zu tokens, the model holds %u: ask for fewer --tokens", needed,
            bench->model_info.n_context_tokens);
    }
    sqz_session_options_default(&options);
    options.budget = (float)bench->budget;
    for (size_t u = 0; u < bench->most_users; u++)
        stop_on(sqz_session_create(&bench->session[u], bench->model, bench->context[bench->apart ? u : 0], &options,
                                   &error),
                &error);
    say_floor(bench->session[0], "");
    say_fallback(bench->session[0], "");
    bench->questions = allocate(MAX_USERS * bench->n_question_tokens, sizeof *bench->questions);
    bench->alone = allocate(bench->most_users * bench->n_tokens, sizeof *bench->alone);
    for (size_t u = 0; u < MAX_USERS; u++) make_question(bench, u);
    const size_t shared = bench->info.n_tokens + (bench->apart ? 1 : bench->most_users) * a_user;
    stop_on(sqz_baseline_create_shared(&bench->shared, bench->model, shared, bench->most_users, bench->apart,
                                       bench->info.rope_scale, &error),
            &error);
    stop_on(sqz_baseline_create_shared(&bench->empty, bench->model, bench->most_users * a_user, bench->most_users,
                                       false, bench->info.rope_scale, &error),
            &error);
}

static void close_all(struct bench *bench)
{
    for (size_t u = 0; u < bench->most_users; u++) sqz_session_free(bench->session[u]);
    sqz_baseline_free(bench->shared);
    sqz_baseline_free(bench->empty);
    sqz_model_free(bench->model);
    for (size_t u = 0; u < MAX_USERS; u++) sqz_context_free(bench->context[u]);
    json_decref(bench->near_ties);
    free(bench->questions);
    free(bench->alone);
}

static void measure(struct bench *bench)
{
    struct sqz_error error;
    for (size_t i = 0; i < bench->n_repeats; i++) {
        for (size_t r = 0; r < bench->users.n; r++) {
            char what[64];
            struct row *row = &bench->rows[r];
            snprintf(what, sizeof what, "round %zu of %zu, %zu users", i + 1, bench->n_repeats, row->n_users);
            say(bench, what);
            time_ours(bench, row);
            time_baseline(bench, bench->shared, bench->info.n_tokens, row->n_users, &row->by[LLAMA]);
            time_baseline(bench, bench->empty, 0, row->n_users, &row->by[PRODUCTS]);
        }
    }
    stop_on(SQZ_OK, &error);
}

int bench_users(int argc, char **argv)
{
    struct bench bench = {.budget = 0.1,
                          .gpu = GPU_FLAGS_INIT,
                          .n_tokens = 64,
                          .n_question_tokens = 40,
                          .n_repeats = 3,
                          .users = {5, {1, 2, 4, 8, 16}}};
    /* clang-format off */
    const struct option options[] = {
        {.kind = OPTION_TEXT, .letter = 'c', .name = "context", .argument = "FILE", .value = &bench.context_path,
         .help = "prepared context (needed)"},
        MODEL_OPTION(bench.model_path),
        {.kind = OPTION_COUNTS, .name = "users", .argument = "N[,...]", .value = &bench.users, .low = 1,
         .high = MAX_USERS, .example = "1,8", .help = "users at once (1,2,4,8,16)"},
        {.kind = OPTION_BUDGET, .letter = 'b', .name = "budget", .argument = "SHARE", .value = &bench.budget,
         .example = "0.1", .help = "share of the KV cache that is read (0.1)"},
        {.kind = OPTION_COUNT, .name = "tokens", .argument = "N", .value = &bench.n_tokens, .low = 1, .high = 4096,
         .example = "64", .help = "tokens of each answer (64)"},
        {.kind = OPTION_COUNT, .name = "question-tokens", .argument = "N", .value = &bench.n_question_tokens, .low = 1,
         .high = 256, .example = "40", .help = "tokens of each question (40)"},
        {.kind = OPTION_COUNT, .name = "repeats", .argument = "N", .value = &bench.n_repeats, .low = 1,
         .high = MAX_REPEATS, .example = "3", .help = "times each is measured, in turn (3)"},
        {.kind = OPTION_FLAG, .name = "apart", .value = &bench.apart,
         .help = "a copy of the context for each user; llama.cpp: a cache for each"},
        {.kind = OPTION_TEXT, .name = "plot", .argument = "FILE", .value = &bench.plot,
         .help = "draw tokens/s over users into a .png or .svg"},
        THREADS_OPTION(bench.n_threads),
        GPU_OPTIONS(bench.gpu),
        TOGETHER_OPTION(bench.gpu, "cheapest on a card, each on the CPU"),
        {.kind = OPTION_FLAG, .letter = 'q', .name = "quiet", .value = &bench.quiet, .help = "no progress"},
        JSON_OPTION(bench.json),
        {.kind = OPTION_END},
    };
    /* clang-format on */
    struct sqz_error error;
    options_parse(&help, options, argc, argv, 0, 0);
    if (!bench.context_path) usage_error("no context; usage: squeeze bench users -c CONTEXT");
    if (bench.plot && !plot_can_draw(bench.plot))
        usage_error("--plot %s: allowed are names that end in .png or .svg", bench.plot);
    const struct output outputs[] = {{"--plot", bench.plot, OUTPUT_PICTURE}, {0}};
    const char *inputs[] = {bench.context_path};
    outputs_check(outputs, inputs, 1);
    for (size_t i = 0; i < bench.users.n; i++) {
        bench.rows[i].n_users = bench.users.value[i];
        bench.most_users = bench.users.value[i] > bench.most_users ? bench.users.value[i] : bench.most_users;
    }
    bench.near_ties = json_array();
    catch_signals();
    open_all(&bench);
    measure_memory(&bench);
    compare_answers(&bench);
    say(&bench, "llama.cpp reads the context");
    stop_on(sqz_baseline_run(bench.shared, bench.info.tokens, bench.info.n_tokens, &error), &error);
    measure(&bench);
    sqz_model_get_info(bench.model, &bench.model_info);
    struct table table = make_table(&bench);
    int code = bench.plot ? draw(&bench) : 0;
    if (code == 0) code = bench.json ? print_results_json(&bench, &table) : print_results(&bench, &table);
    table_free(&table);
    close_all(&bench);
    return code;
}
