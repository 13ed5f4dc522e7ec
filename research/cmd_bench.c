/*
 * squeeze bench generate: llama.cpp's own dense run, our dense run and the
 * squeezed run of one context, side by side in one process with the same
 * threads. Correctness comes first: our dense run is teacher-forced on
 * llama.cpp's greedy tokens and its distributions are compared before any time
 * is taken. The three runs then take turns, so that a machine whose speed
 * drifts treats them alike; medians are reported, with the fastest and slowest.
 */
#define _GNU_SOURCE /* mkdtemp, sysconf */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "answer.h"
#include "baseline.h"
#include "bench_cluster.h"
#include "bench_kernels.h"
#include "bench_logits.h"
#include "bench_question.h"
#include "bench_rounding.h"
#include "bench_users.h"
#include "common.h"
#include "distance.h"
#include "inputs.h"
#include "json_output.h"
#include "machine.h"
#include "options.h"
#include "progress.h"
#include "speculation.h"
#include "squeeze_flags.h"
#include "times.h"

static const struct option_rule rules[] = {
    SPECULATION_RULES, {"assume-kept", "exact=off", "only exact answers are drafted (--exact f16, int8)"}, {0}};

static const struct command_help help = {
    "bench generate", "",
    "Measures generation, time to first token and preparation against llama.cpp's own dense run of the same model, "
    "context and question.",
    "  squeeze bench generate -c book.sqz.gguf\n"
    "  squeeze bench generate -c book.sqz.gguf --budget 0.05 --tokens 64 --json\n"
    "  squeeze bench generate -c book.sqz.gguf --no-prepare\n"
    "  squeeze bench generate -c book.sqz.gguf --no-prepare --exact f16 --draft self\n",
    rules};

static const char default_question[] =
    "What does the text say about its most important subject, and where in the text is that said? Answer briefly, and "
    "quote the words that your answer rests on.";

enum { MAX_REPEATS = 32 };

enum method { LLAMA, DENSE, SQUEEZED, EXACT, N_METHODS }; /* EXACT: with --exact */
static const char *const method_names[] = {"llama.cpp dense", "squeeze dense", "squeezed", "exact, drafted"};
static const char *const method_keys[] = {"llama", "dense", "squeezed", "exact"};

struct bench {
    const char *context_path, *llama_state, *model_path, *question;
    struct gpu_flags gpu;
    double budget;
    size_t n_threads, n_tokens, n_question_tokens, n_long_tokens, n_repeats, n_llama_batch;
    int prepare, llama; /* llama: llama.cpp's own run is measured */
    bool llama_first;   /* to the end, before any of ours: a card holds the context once */
    struct speculation_flags speculation;
    double assumed_kept; /* 0: what was kept counts */
    bool json, quiet;

    struct sqz_context *context;
    struct sqz_context_info info;
    struct sqz_model *model;
    struct sqz_model_info model_info;
    struct sqz_baseline *baseline;
    struct sqz_session *dense, *squeezed, *exact; /* exact: NULL without --exact */
    int32_t *asked;                               /* [n_question_tokens] the question with its template */
    int32_t *long_one;                            /* [n_long_tokens] the same, longer; NULL: none is timed */
    int32_t *generated;                           /* [n_tokens] llama.cpp's greedy answer */
    float *logits; /* [n_tokens][n_vocab] llama.cpp's, each before the token of the same number */
    double open_seconds, llama_prefill_seconds, llama_save_seconds;
    size_t llama_state_bytes;
    struct times first_token[N_METHODS], generate[N_METHODS], long_question[N_METHODS];
    double long_question_read[N_METHODS];    /* share of the context */
    struct distance distance;                /* our dense run from llama.cpp's */
    struct sqz_attention_stats read;         /* by the squeezed generation */
    struct sqz_speculation_stats speculated; /* by all repeats of the exact one */
    double apart_lead;                       /* most that our dense run led by where the exact one chose otherwise */
    size_t n_apart;
    struct sqz_prepare_report prepared;
    double bandwidth;
};

static void say(const struct bench *bench, const char *what)
{
    if (!bench->quiet) fprintf(stderr, "bench: %s\n", what);
}

static double quantile(const struct times *times, double share)
{
    return times_quantile(times->seconds, times->n, share);
}

static void open_all(struct bench *bench)
{
    struct sqz_error error;
    struct sqz_session_options options;
    double since = now_seconds();
    bench->context = open_context(bench->context_path, NULL);
    sqz_context_get_info(bench->context, &bench->info);
    bench->gpu.in_shards = bench->info.n_shards > 0;
    bench->model = open_model_drafting(bench->model_path, measured_threads(bench->n_threads),
                                       (double)bench->info.rope_scale, &bench->gpu, bench->speculation.draft_weights);
    sqz_session_options_default(&options);
    options.budget = (float)bench->budget;
    stop_on(sqz_session_create(&bench->squeezed, bench->model, bench->context, &options, &error), &error);
    bench->open_seconds = now_seconds() - since;
    say_floor(bench->squeezed, "");
    say_fallback(bench->squeezed, "");
    options.budget = 1.0f;
    stop_on(sqz_session_create(&bench->dense, bench->model, bench->context, &options, &error), &error);
    if (bench->speculation.exact) {
        speculation_flags_apply(&bench->speculation, &options);
        options.draft_steady = options.draft_steady || bench->assumed_kept > 0;
        stop_on(sqz_session_create(&bench->exact, bench->model, bench->context, &options, &error), &error);
    }
    sqz_model_get_info(bench->model, &bench->model_info);
    bench->asked = bench_question(bench->model, bench->dense, bench->question, &bench->n_question_tokens);
    if (bench->n_long_tokens)
        bench->long_one = bench_question(bench->model, bench->dense, bench->question, &bench->n_long_tokens);
    const size_t n_longest =
        bench->n_long_tokens > bench->n_question_tokens ? bench->n_long_tokens : bench->n_question_tokens;
    size_t needed = bench->info.n_tokens + n_longest + bench->n_tokens;
    if (needed > bench->model_info.n_context_tokens) {
        die("context, question and answer take %zu tokens, the model holds %u: ask for fewer --tokens", needed,
            bench->model_info.n_context_tokens);
    }
    if (!bench->llama) return;
    stop_on(sqz_baseline_create_batched(&bench->baseline, bench->model, needed, bench->n_llama_batch,
                                        bench->info.rope_scale, &error),
            &error);
    bench->generated = malloc(bench->n_tokens * sizeof *bench->generated);
    bench->logits = calloc(bench->n_tokens, bench->model_info.n_vocab * sizeof *bench->logits);
    if (!bench->generated || !bench->logits) die("out of memory");
}

/* What llama.cpp has read, to a file that is removed: beside a prepared context, which is a file as well. */
static void save_reference(struct bench *bench)
{
    struct sqz_error error;
    if (!bench->llama_state) return;
    say(bench, "llama.cpp saves what it has read");
    const double since = now_seconds();
    const enum sqz_status status = sqz_baseline_save(bench->baseline, bench->llama_state, bench->info.tokens,
                                                     bench->info.n_tokens, &bench->llama_state_bytes, &error);
    bench->llama_save_seconds = now_seconds() - since;
    unlink(bench->llama_state);
    stop_on(status, &error);
}

/* llama.cpp reads the context, then answers greedily; its tokens and distributions are the reference. */
static void run_reference(struct bench *bench)
{
    struct sqz_error error;
    size_t n_vocab = bench->model_info.n_vocab;
    if (!bench->llama) return;
    say(bench, "llama.cpp reads the context");
    double since = now_seconds();
    stop_on(sqz_baseline_run(bench->baseline, bench->info.tokens, bench->info.n_tokens, &error), &error);
    sqz_baseline_logits(bench->baseline); /* waits for a card */
    bench->llama_prefill_seconds = now_seconds() - since;
    save_reference(bench);
    say(bench, "llama.cpp answers; our dense run is compared with it");
    stop_on(sqz_baseline_run(bench->baseline, bench->asked, bench->n_question_tokens, &error), &error);
    for (size_t i = 0; i < bench->n_tokens; i++) {
        memcpy(bench->logits + i * n_vocab, sqz_baseline_logits(bench->baseline), n_vocab * sizeof(float));
        bench->generated[i] = sqz_baseline_choose(bench->logits + i * n_vocab, n_vocab);
        stop_on(sqz_baseline_run(bench->baseline, &bench->generated[i], 1, &error), &error);
    }
}

static void compare_dense(struct bench *bench)
{
    struct sqz_error error;
    size_t n_vocab = bench->model_info.n_vocab;
    if (!bench->llama) return;
    stop_on(sqz_session_run(bench->dense, bench->asked, bench->n_question_tokens, &error), &error);
    for (size_t i = 0; i < bench->n_tokens; i++) {
        if (!distance_add(&bench->distance, bench->logits + i * n_vocab, sqz_session_logits(bench->dense), n_vocab,
                          bench->generated[i]))
            die("our dense run gave logits that are not numbers at token %zu; nothing was timed", i);
        stop_on(sqz_session_run(bench->dense, &bench->generated[i], 1, &error), &error);
    }
    double kl = bench->distance.kl_sum / (double)bench->n_tokens;
    double top1 = (double)bench->distance.n_top1 / (double)bench->n_tokens;
    if (!(kl <= 0.05) || !(top1 >= 0.9)) {
        die("our dense run differs from llama.cpp's: mean KL %.4f, top token equal %.1f%%; nothing was timed", kl,
            100.0 * top1);
    }
}

static void time_llama(struct bench *bench)
{
    struct sqz_error error;
    if (!bench->baseline) return;
    sqz_baseline_truncate(bench->baseline, bench->info.n_tokens);
    double since = now_seconds();
    stop_on(sqz_baseline_run(bench->baseline, bench->asked, bench->n_question_tokens, &error), &error);
    int32_t token = sqz_baseline_choose(sqz_baseline_logits(bench->baseline), bench->model_info.n_vocab);
    times_add(&bench->first_token[LLAMA], now_seconds() - since);
    since = now_seconds();
    for (size_t i = 0; i < bench->n_tokens; i++) {
        stop_on(sqz_baseline_run(bench->baseline, &token, 1, &error), &error);
        token = sqz_baseline_choose(sqz_baseline_logits(bench->baseline), bench->model_info.n_vocab);
    }
    times_add(&bench->generate[LLAMA], now_seconds() - since);
}

/* Until the logits behind the long question. */
static void time_llama_long_question(struct bench *bench)
{
    struct sqz_error error;
    if (!bench->long_one || !bench->baseline) return;
    sqz_baseline_truncate(bench->baseline, bench->info.n_tokens);
    const double since = now_seconds();
    stop_on(sqz_baseline_run(bench->baseline, bench->long_one, bench->n_long_tokens, &error), &error);
    sqz_baseline_logits(bench->baseline); /* waits for a card */
    times_add(&bench->long_question[LLAMA], now_seconds() - since);
}

/* All of llama.cpp's runs, and what it holds is given back. */
static void time_llama_first(struct bench *bench)
{
    if (!bench->llama_first || !bench->llama) return;
    for (size_t i = 0; i < bench->n_repeats; i++) {
        say(bench, "timing llama.cpp");
        time_llama(bench);
        time_llama_long_question(bench);
    }
    sqz_baseline_free(bench->baseline);
    bench->baseline = NULL;
}

static void time_session(struct bench *bench, struct sqz_session *session, enum method method)
{
    struct sqz_error error;
    struct sqz_session_stats stats;
    sqz_session_reset(session);
    double since = now_seconds();
    stop_on(sqz_session_run(session, bench->asked, bench->n_question_tokens, &error), &error);
    int32_t token = sqz_baseline_choose(sqz_session_logits(session), bench->model_info.n_vocab);
    times_add(&bench->first_token[method], now_seconds() - since);
    sqz_session_clear_stats(session);
    since = now_seconds();
    for (size_t i = 0; i < bench->n_tokens; i++) {
        stop_on(sqz_session_run(session, &token, 1, &error), &error);
        token = sqz_baseline_choose(sqz_session_logits(session), bench->model_info.n_vocab);
    }
    times_add(&bench->generate[method], now_seconds() - since);
    sqz_session_get_stats(session, &stats);
    if (method == SQUEEZED) sqz_attention_stats_add(&bench->read, &stats.attention);
}

static void add_speculated(struct bench *bench)
{
    struct sqz_speculation_stats *sum = &bench->speculated, one;
    struct sqz_session_stats stats;
    sqz_session_get_stats(bench->exact, &stats);
    one = stats.speculation;
    sum->n_cycles += one.n_cycles;
    sum->n_drafted += one.n_drafted;
    sum->n_drafted_by_text += one.n_drafted_by_text;
    sum->n_accepted += one.n_accepted;
    sum->n_tested += one.n_tested;
    sum->draft_seconds += one.draft_seconds;
    sum->verify_seconds += one.verify_seconds;
    sum->draft_budget = one.draft_budget;
    sum->draft_rows = one.draft_rows;
    sqz_attention_stats_add(&sum->draft, &one.draft);
}

static void time_exact(struct bench *bench)
{
    if (!bench->exact) return;
    time_session(bench, bench->exact, EXACT);
    add_speculated(bench);
}

/* The exact run's answer with drafts, along which our dense run goes token by token: where that would choose otherwise, its
 * lead is told. Batches round differently, and near ties turn. */
static void compare_exact(struct bench *bench)
{
    struct sqz_error error;
    const size_t n_vocab = bench->model_info.n_vocab;
    if (!bench->exact) return;
    say(bench, "the exact run is compared with our dense run");
    sqz_session_reset(bench->dense);
    stop_on(sqz_session_run(bench->dense, bench->asked, bench->n_question_tokens, &error), &error);
    stop_on(sqz_session_run(bench->exact, bench->asked, bench->n_question_tokens, &error), &error);
    for (size_t i = 0; i < bench->n_tokens; i++) {
        const float *dense = sqz_session_logits(bench->dense);
        const int32_t token = sqz_baseline_choose(sqz_session_logits(bench->exact), n_vocab),
                      other = sqz_baseline_choose(dense, n_vocab);
        if (other != token) {
            bench->n_apart++;
            bench->apart_lead = fmax(bench->apart_lead, (double)dense[other] - (double)dense[token]);
        }
        stop_on(sqz_session_run(bench->dense, &token, 1, &error), &error);
        stop_on(sqz_session_run(bench->exact, &token, 1, &error), &error);
    }
    if (!(bench->apart_lead <= 1.0))
        die("the exact run chose a token that our dense run puts %.2f below its own; nothing was timed",
            bench->apart_lead);
}

static void time_long_session(struct bench *bench, struct sqz_session *session, enum method method)
{
    struct sqz_error error;
    struct sqz_session_stats stats;
    sqz_session_reset(session);
    sqz_session_clear_stats(session);
    const double since = now_seconds();
    stop_on(sqz_session_run(session, bench->long_one, bench->n_long_tokens, &error), &error);
    times_add(&bench->long_question[method], now_seconds() - since);
    sqz_session_get_stats(session, &stats);
    bench->long_question_read[method] = sqz_attention_stats_share(&stats.attention);
}

static void time_long_question(struct bench *bench)
{
    if (!bench->long_one) return;
    time_llama_long_question(bench);
    time_long_session(bench, bench->dense, DENSE);
    time_long_session(bench, bench->squeezed, SQUEEZED);
}

/* Prepares the same tokens again into a file that is removed. */
static void time_prepare(struct bench *bench)
{
    struct sqz_error error;
    struct sqz_prepare_options options;
    struct progress progress;
    char directory[4096], file[4200];
    snprintf(directory, sizeof directory, "%s/squeeze-bench-XXXXXX", temporary_parent());
    if (!mkdtemp(directory)) die("%s: cannot make a temporary folder", directory);
    snprintf(file, sizeof file, "%s/context.sqz.gguf", directory);
    sqz_prepare_options_default(&options);
    options.squeeze = bench->info.squeeze;
    options.progress = progress_show;
    options.user_data = &progress;
    progress_begin(&progress, bench->quiet, "");
    enum sqz_status status = sqz_prepare_tokens(bench->model, bench->info.tokens, bench->info.n_tokens, file, &options,
                                                &bench->prepared, &error);
    progress_end(&progress);
    unlink(file);
    rmdir(directory);
    stop_on(status, &error);
}

/* ---- Results ---------------------------------------------------------------------- */

static json_t *times_json(const struct times *times, double per)
{
    json_t *all = json_array();
    for (size_t i = 0; i < times->n; i++) json_array_append_new(all, json_number(times->seconds[i] / per));
    return json_pack("{s:o,s:o,s:o,s:o}", "median", json_number(quantile(times, 0.5) / per), "min",
                     json_number(quantile(times, 0.0) / per), "max", json_number(quantile(times, 1.0) / per), "all",
                     all);
}

/* What a cycle takes, and how many tokens it would bring if so many of the drafted ones were kept when their turn came. */
static double cycle_seconds(const struct bench *bench)
{
    const struct sqz_speculation_stats *s = &bench->speculated;
    return s->n_cycles ? (s->draft_seconds + s->verify_seconds) / (double)s->n_cycles : 0;
}

static double tokens_if_kept(const struct bench *bench)
{
    const struct sqz_speculation_stats *s = &bench->speculated;
    double tokens = 1, reached = 1;
    for (double left = s->n_cycles ? (double)s->n_drafted / (double)s->n_cycles : 0; left > 0; left--)
        tokens += (reached *= bench->assumed_kept) * fmin(left, 1);
    return tokens;
}

/* Of the exact run to another by which a token takes so long; by the acceptance that is assumed, where one is. */
static double exact_gain(const struct bench *bench, enum method method)
{
    const double token = quantile(&bench->generate[method], 0.5) / (double)bench->n_tokens;
    if (bench->assumed_kept > 0) return token * tokens_if_kept(bench) / cycle_seconds(bench);
    return token * (double)bench->n_tokens / quantile(&bench->generate[EXACT], 0.5);
}

static json_t *exact_json(const struct bench *bench)
{
    json_t *root = speculation_json(&bench->speculated);
    json_object_set_new(root, "kind", json_string(exact_names[bench->speculation.exact]));
    json_object_set_new(root, "draft", json_string(draft_names[bench->speculation.draft]));
    json_object_set_new(root, "draft_tokens", json_count(bench->speculation.draft_tokens));
    json_object_set_new(root, "vs_exact", json_number(exact_gain(bench, DENSE)));
    json_object_set_new(root, "vs_llama", bench->llama ? json_number(exact_gain(bench, LLAMA)) : json_null());
    json_object_set_new(root, "cycle_seconds", json_number(cycle_seconds(bench)));
    json_object_set_new(root, "assumed_kept", bench->assumed_kept > 0 ? json_number(bench->assumed_kept) : json_null());
    if (bench->assumed_kept > 0)
        json_object_set_new(root, "assumed_tokens_a_cycle", json_number(tokens_if_kept(bench)));
    json_object_set_new(root, "tokens_apart", json_count(bench->n_apart));
    json_object_set_new(root, "largest_lead_apart", json_number(bench->apart_lead));
    return root;
}

static void print_exact(const struct bench *bench)
{
    const struct sqz_speculation_stats *s = &bench->speculated;
    printf("exact: %.2fx of our run without drafts", exact_gain(bench, DENSE));
    if (bench->llama) printf(", %.2fx of llama.cpp's", exact_gain(bench, LLAMA));
    if (bench->assumed_kept > 0)
        printf(", if %.1f%% of the drafted tokens were kept in their turn, which is assumed (%.2f tokens a cycle of "
               "%.4f s)",
               100.0 * bench->assumed_kept, tokens_if_kept(bench), cycle_seconds(bench));
    printf("\nof the drafted tokens %.1f%% were kept, of those whose turn came %.1f%%; %.2f tokens a cycle, %.2f "
           "drafted\n",
           100.0 * speculation_accepted(s), 100.0 * speculation_agreed(s), speculation_tokens_a_cycle(s),
           s->n_cycles ? (double)s->n_drafted / (double)s->n_cycles : 0);
    printf("token by token the dense run would choose %zu of %zu tokens otherwise, leading by %.3f at most\n",
           bench->n_apart, bench->n_tokens, bench->apart_lead);
}

/* Whether a method was measured; what the others are compared with. */
static bool was_timed(const struct bench *bench, int method)
{
    return method == LLAMA ? bench->llama : method != EXACT || bench->exact;
}

static enum method reference(const struct bench *bench)
{
    return bench->llama ? LLAMA : DENSE;
}

static double ratio(const struct times *a, const struct times *b)
{
    return quantile(a, 0.5) / quantile(b, 0.5);
}

/* Bytes that one generated token of the squeezed run reads: the model's weights and the share of the KV cache. */
static double token_bytes(const struct bench *bench)
{
    double kv_bytes = sqz_attention_stats_share(&bench->read) * (double)bench->info.kv_bytes;
    return (double)bench->model_info.size_bytes + kv_bytes;
}

/* What is of llama.cpp's own run, which is the reference. */
static void add_llama_json(json_t *root, const struct bench *bench)
{
    const double n = (double)bench->n_tokens;
    json_object_set_new(root, "generate_vs_llama",
                        json_number(ratio(&bench->generate[LLAMA], &bench->generate[SQUEEZED])));
    json_object_set_new(root, "first_token_vs_llama",
                        json_number(ratio(&bench->first_token[LLAMA], &bench->first_token[SQUEEZED])));
    json_object_set_new(root, "dense_vs_llama", json_number(ratio(&bench->generate[LLAMA], &bench->generate[DENSE])));
    json_object_set_new(root, "dense_top1_vs_llama", json_number((double)bench->distance.n_top1 / n));
    json_object_set_new(root, "dense_kl_mean_vs_llama", json_number(bench->distance.kl_sum / n));
    json_object_set_new(root, "llama_seconds", json_number(bench->llama_prefill_seconds));
}

static int print_json_result(const struct bench *bench)
{
    json_t *root = json_object();
    double n = (double)bench->n_tokens, seconds = quantile(&bench->generate[SQUEEZED], 0.5) / n;
    if (bench->llama) add_llama_json(root, bench);
    if (bench->prepare) {
        const struct sqz_prepare_report *p = &bench->prepared;
        if (bench->llama)
            json_object_set_new(root, "prepare_vs_llama", json_number(bench->llama_prefill_seconds / p->total_seconds));
        json_object_set_new(root, "cluster_share_of_prepare",
                            json_number((p->cluster_seconds + p->calibrate_seconds) / p->total_seconds));
        json_object_set_new(root, "prepare",
                            json_pack("{s:o,s:o,s:o,s:o,s:o,s:o}", "seconds", json_number(p->total_seconds),
                                      "read_seconds", json_number(p->read_seconds), "cluster_seconds",
                                      json_number(p->cluster_seconds), "calibrate_seconds",
                                      json_number(p->calibrate_seconds), "write_seconds", json_number(p->write_seconds),
                                      "llama_prefill_seconds", json_number(bench->llama_prefill_seconds)));
    }
    json_object_set_new(root, "squeezed_vs_dense",
                        json_number(ratio(&bench->generate[DENSE], &bench->generate[SQUEEZED])));
    json_object_set_new(root, "budget_asked", json_number(bench->budget));
    json_object_set_new(root, "budget_read", json_number(sqz_attention_stats_share(&bench->read)));
    json_object_set_new(root, "open_seconds", json_number(bench->open_seconds));
    if (bench->llama_state) {
        json_object_set_new(root, "llama_save_seconds", json_number(bench->llama_save_seconds));
        json_object_set_new(root, "llama_state_bytes", json_count(bench->llama_state_bytes));
    }
    json_object_set_new(root, "llama_batch_tokens", json_count(bench->n_llama_batch));
    for (int m = 0; m < N_METHODS; m++) {
        if (!was_timed(bench, m)) continue;
        json_object_set_new(root, method_keys[m],
                            json_pack("{s:o,s:o,s:o}", "token_seconds", times_json(&bench->generate[m], n),
                                      "first_token_seconds", times_json(&bench->first_token[m], 1.0),
                                      "tokens_per_second", json_number(n / quantile(&bench->generate[m], 0.5))));
        if (bench->long_one && m != EXACT)
            json_object_set_new(json_object_get(root, method_keys[m]), "long_question_seconds",
                                times_json(&bench->long_question[m], 1.0));
    }
    if (bench->exact) json_object_set_new(root, "speculation", exact_json(bench));
    if (bench->long_one) {
        json_object_set_new(root, "long_question_tokens", json_count(bench->n_long_tokens));
        json_object_set_new(root, "long_question_read", json_number(bench->long_question_read[SQUEEZED]));
    }
    json_object_set_new(root, "read_bandwidth_gb_s", json_number(bench->bandwidth / 1e9));
    json_object_set_new(root, "squeezed_bytes_a_token", json_number(token_bytes(bench)));
    json_object_set_new(root, "squeezed_share_of_bandwidth",
                        json_number(token_bytes(bench) / seconds / bench->bandwidth));
    json_object_set_new(root, "context_tokens", json_count(bench->info.n_tokens));
    json_object_set_new(root, "weight_copies_bytes", json_count(bench->model_info.weight_copies_bytes));
    json_object_set_new(root, "question_tokens", json_count(bench->n_question_tokens));
    json_object_set_new(root, "generated_tokens", json_count(bench->n_tokens));
    json_object_set_new(root, "repeats", json_count(bench->n_repeats));
    json_object_set_new(root, "rule", json_string(rule_names[bench->info.squeeze.rule]));
    json_object_set_new(root, "levels", json_count(bench->info.squeeze.n_levels));
    json_object_set_new(root, "model", json_text(bench->model_info.description));
    add_origin_json(root, bench->model_info.n_threads);
    return print_json(root);
}

static int print_table(const struct bench *bench)
{
    double n = (double)bench->n_tokens;
    char tokens[NUMBER_TEXT_MAX], model[PLAIN_TEXT_MAX];
    printf("%s, %s tokens of context, budget %.3g (read %.3f), %d threads\n\n",
           plain_text(model, bench->model_info.description), count_text(tokens, bench->info.n_tokens), bench->budget,
           sqz_attention_stats_share(&bench->read), bench->model_info.n_threads);
    printf("%-16s %12s %19s %8s %14s %8s\n", "", "tokens/s", "(slowest-fastest)", "ratio", "first token", "ratio");
    for (int m = 0; m < N_METHODS; m++) {
        char spread[48];
        if (!was_timed(bench, m)) continue;
        snprintf(spread, sizeof spread, "(%.1f-%.1f)", n / quantile(&bench->generate[m], 1.0),
                 n / quantile(&bench->generate[m], 0.0));
        printf("%-16s %12.1f %19s %7.2fx %12.3f s %7.2fx\n", method_names[m], n / quantile(&bench->generate[m], 0.5),
               spread, ratio(&bench->generate[reference(bench)], &bench->generate[m]),
               quantile(&bench->first_token[m], 0.5),
               ratio(&bench->first_token[reference(bench)], &bench->first_token[m]));
    }
    for (int m = reference(bench); m < EXACT && bench->long_one; m++) {
        printf("%s%-16s a question of %zu tokens: %.3f s %7.2fx\n", m ? "" : "\n", method_names[m],
               bench->n_long_tokens, quantile(&bench->long_question[m], 0.5),
               ratio(&bench->long_question[reference(bench)], &bench->long_question[m]));
    }
    if (bench->exact) putchar('\n');
    if (bench->exact) print_exact(bench);
    if (bench->llama)
        printf("\nour dense run against llama.cpp's: top token equal %.1f%%, mean KL %.5f over %zu tokens\n",
               100.0 * (double)bench->distance.n_top1 / n, bench->distance.kl_sum / n, bench->n_tokens);
    printf("squeezed: %.1f MB a token at %.0f%% of this machine's read bandwidth (%.1f GB/s)\n",
           token_bytes(bench) / 1e6,
           100.0 * token_bytes(bench) * n / quantile(&bench->generate[SQUEEZED], 0.5) / bench->bandwidth,
           bench->bandwidth / 1e9);
    if (bench->prepare) {
        const struct sqz_prepare_report *p = &bench->prepared;
        printf("prepare %.1f s (read %.1f, cluster %.1f, calibrate %.1f, write %.1f)", p->total_seconds,
               p->read_seconds, p->cluster_seconds, p->calibrate_seconds, p->write_seconds);
        if (bench->llama)
            printf("; llama.cpp reads the same in %.1f s: %.2fx", bench->llama_prefill_seconds,
                   bench->llama_prefill_seconds / p->total_seconds);
        putchar('\n');
    }
    printf("opening model and context: %.3f s\n", bench->open_seconds);
    return close_stdout();
}

static void close_all(struct bench *bench)
{
    sqz_session_free(bench->dense);
    sqz_session_free(bench->squeezed);
    sqz_session_free(bench->exact);
    sqz_baseline_free(bench->baseline);
    sqz_model_free(bench->model);
    sqz_context_free(bench->context);
    distance_free(&bench->distance);
    free(bench->asked);
    free(bench->long_one);
    free(bench->generated);
    free(bench->logits);
}

static int bench_generate(int argc, char **argv)
{
    struct bench bench = {.budget = 0.1,
                          .n_tokens = 128,
                          .n_question_tokens = 40,
                          .n_repeats = 5,
                          .n_llama_batch = 512,
                          .prepare = 1,
                          .llama = 1,
                          .gpu = GPU_FLAGS_INIT,
                          .speculation = SPECULATION_FLAGS_INIT,
                          .question = default_question};
    /* clang-format off */
    const struct option options[] = {
        {.kind = OPTION_TEXT, .letter = 'c', .name = "context", .argument = "FILE", .value = &bench.context_path,
         .help = "prepared context (needed)"},
        MODEL_OPTION(bench.model_path),
        {.kind = OPTION_BUDGET, .name = "budget", .argument = "SHARE", .value = &bench.budget, .example = "0.1",
         .help = "share of the KV cache that the squeezed run reads (0.1)"},
        {.kind = OPTION_COUNT, .name = "tokens", .argument = "N", .value = &bench.n_tokens, .low = 1, .high = 65536,
         .example = "128", .help = "tokens to generate (128)"},
        {.kind = OPTION_TEXT, .name = "question", .argument = "TEXT", .value = &bench.question,
         .help = "question to ask"},
        {.kind = OPTION_COUNT, .name = "question-tokens", .argument = "N", .value = &bench.n_question_tokens, .low = 0,
         .high = 65536, .example = "40", .help = "length the question is brought to; 0: as it is (40)"},
        {.kind = OPTION_COUNT, .name = "long-question", .argument = "N", .value = &bench.n_long_tokens, .low = 1,
         .high = 65536, .example = "512", .help = "also time a question of so many tokens"},
        {.kind = OPTION_COUNT, .name = "repeats", .argument = "N", .value = &bench.n_repeats, .low = 1,
         .high = MAX_REPEATS, .example = "5", .help = "times each run is measured, in turn (5)"},
        {.kind = OPTION_COUNT, .name = "llama-batch", .argument = "N", .value = &bench.n_llama_batch, .low = 1,
         .high = 65536, .example = "2048", .help = "tokens that llama.cpp reads at a time (512)"},
        {.kind = OPTION_TEXT, .name = "llama-state", .argument = "FILE", .value = &bench.llama_state,
         .help = "also time how llama.cpp saves what it has read, to FILE, which is removed"},
        {.kind = OPTION_SWITCH, .name = "llama", .value = &bench.llama,
         .help = "also measure llama.cpp's own run, and hold ours against it"},
        {.kind = OPTION_SWITCH, .name = "prepare", .value = &bench.prepare,
         .help = "also time preparing the context anew"},
        {.kind = OPTION_FLAG, .name = "llama-first", .value = &bench.llama_first,
         .help = "measure llama.cpp's own run to the end before ours, where a card holds the context only once"},
        SPECULATION_OPTIONS(bench.speculation),
        {.kind = OPTION_REAL, .name = "assume-kept", .argument = "SHARE", .value = &bench.assumed_kept, .low = 0, .high = 1,
         .above = true, .example = "0.95",
         .help = "reckon the exact run's speed as if this share of the drafted tokens were kept in their turn: of random "
                 "weights, where what is kept says nothing"},
        THREADS_OPTION(bench.n_threads),
        GPU_OPTIONS(bench.gpu),
        TOGETHER_OPTION(bench.gpu, "cheapest on a card, each on the CPU"),
        {.kind = OPTION_FLAG, .letter = 'q', .name = "quiet", .value = &bench.quiet, .help = "no progress"},
        JSON_OPTION(bench.json),
        {.kind = OPTION_END},
    };
    /* clang-format on */
    options_parse(&help, options, argc, argv, 0, 0);
    if (!bench.context_path) usage_error("no context; usage: squeeze bench generate -c CONTEXT");
    if (bench.llama_first && !bench.llama)
        usage_error("--llama-first with --no-llama: llama.cpp's own run is not measured");
    catch_signals();
    open_all(&bench);
    run_reference(&bench);
    time_llama_first(&bench);
    compare_dense(&bench);
    compare_exact(&bench);
    bench.bandwidth = machine_read_bandwidth(bench.model_info.n_threads);
    for (size_t i = 0; i < bench.n_repeats; i++) {
        say(&bench, "timing a round");
        time_llama(&bench);
        time_session(&bench, bench.dense, DENSE);
        time_session(&bench, bench.squeezed, SQUEEZED);
        time_exact(&bench);
        time_long_question(&bench);
    }
    if (bench.prepare) {
        say(&bench, "preparing the context anew");
        time_prepare(&bench);
    }
    sqz_model_get_info(bench.model, &bench.model_info);
    int code = bench.json ? print_json_result(&bench) : print_table(&bench);
    close_all(&bench);
    return code;
}

static const struct {
    const char *name, *summary;
    int (*run)(int argc, char **argv);
} subjects[] = {
    {"generate", "a model's generation and preparation against llama.cpp's own run", bench_generate},
    {"users", "many users' questions on one context at once against llama.cpp's own batches", bench_users},
    {"kernels", "attention and its parts on one layer against ggml's and the machine's limits", bench_kernels},
    {"cluster", "the clustering of one head's keys", bench_cluster},
    {"logits", "what a context makes of given texts, held against another run", bench_logits},
    {"rounding", "what a context's keys and values lose by 4 and 8 bits a number", bench_rounding},
};

int cmd_bench(int argc, char **argv)
{
    enum { N_SUBJECTS = sizeof subjects / sizeof subjects[0] };
    for (size_t i = 0; i < N_SUBJECTS && argc >= 2; i++)
        if (strcmp(argv[1], subjects[i].name) == 0) return subjects[i].run(argc - 1, argv + 1);
    if (argc >= 2 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
        printf("Usage: squeeze bench SUBJECT [OPTIONS]\n\nSubjects:\n");
        for (size_t i = 0; i < N_SUBJECTS; i++) printf("  %-10s%s\n", subjects[i].name, subjects[i].summary);
        printf("\n'squeeze bench SUBJECT --help' shows the options.\n");
        return close_stdout();
    }
    if (argc >= 2 && strcmp(argv[1], OPTIONS_LIST) == 0) {
        for (size_t i = 0; i < N_SUBJECTS; i++) options_list_word(subjects[i].name, subjects[i].summary);
        return close_stdout();
    }
    usage_error(argc < 2 ? "nothing to measure; allowed: generate, users, kernels, cluster, rounding"
                         : "cannot measure '%s'; allowed: generate, users, kernels, cluster, rounding",
                argc < 2 ? "" : argv[1]);
}
