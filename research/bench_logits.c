/*
 * What a context makes of given texts, kept and compared: logits of every token of some texts behind a context, one token at a
 * time, are written to a file by one run and held against by another, of the same texts and vocabulary: of other ranks,
 * of the same document in shards, of another budget.
 *
 * The file: MAGIC, vocabulary, number of rows, checksum of the texts' tokens, as 64-bit numbers; then rows of F32. Its byte
 * order is the machine's.
 */
#include "bench_logits.h"

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "common.h"
#include "distance.h"
#include "inputs.h"
#include "json_output.h"
#include "machine.h"
#include "many_ranks.h"
#include "memory.h"
#include "options.h"
#include "outputs.h"
#include "signals.h"

static const struct option_rule rules[] = {{"save", "against", "a run is kept, or compared with one that was"}, {0}};

static const struct command_help help = {
    "bench logits", "TEXT.txt...",
    "Runs texts behind a context, token by token, and keeps the logits, or holds them against those of another run: of "
    "other ranks, of the same document in shards, of another budget.",
    "  squeeze bench logits -c book.sqz.gguf --budget 0.1 --save one.logits answers.txt\n"
    "  mpirun -n 4 squeeze bench logits -c book.sqz.gguf --budget 0.1 --against one.logits answers.txt --json\n",
    rules};

static const uint64_t MAGIC = UINT64_C(0x31534c5a51530a0d);

struct head {
    uint64_t magic, n_vocab, n_rows, texts;
};

struct logits_bench {
    const char *context_path, *model_path, *save, *against;
    size_t n_tokens, n_threads; /* n_tokens: of a text, at most */
    double budget;
    bool json;

    struct sqz_context *context;
    struct sqz_model *model;
    struct sqz_session *session;
    size_t n_vocab, n_texts;
    int32_t *tokens;    /* of all texts */
    size_t *text_first; /* [n_texts + 1] */
    FILE *file;
    float *row; /* of the file */
    struct distance distance;
    struct sqz_attention_stats read;
};

static void read_texts(struct logits_bench *b, char **paths, size_t n)
{
    struct sqz_error error;
    b->n_texts = n;
    b->tokens = allocate(n * b->n_tokens, sizeof *b->tokens);
    b->text_first = allocate(n + 1, sizeof *b->text_first);
    for (size_t i = 0; i < n; i++) {
        size_t n_bytes, n_found;
        int32_t *found;
        char *text = read_whole_file(paths[i], &n_bytes);
        stop_on(sqz_model_tokenize(b->model, text, n_bytes, &found, &n_found, &error), &error);
        if (n_found < 2)
            die("%s: %zu tokens; at least 2 are needed, one that is run and one that is predicted", paths[i], n_found);
        if (n_found > b->n_tokens) n_found = b->n_tokens;
        memcpy(b->tokens + b->text_first[i], found, n_found * sizeof *found);
        b->text_first[i + 1] = b->text_first[i] + n_found;
        free(found);
        free(text);
    }
}

static void open_file(struct logits_bench *b)
{
    const size_t n = b->text_first[b->n_texts];
    const struct head mine = {MAGIC, b->n_vocab, n, XXH3_64bits(b->tokens, n * sizeof *b->tokens)};
    const char *path = b->save ? b->save : b->against;
    struct head its = mine;
    b->file = fopen(path, b->save ? "wbx" : "rb");
    if (!b->file) die("%s: %s", path, strerror(errno));
    if (b->save && fwrite(&mine, sizeof mine, 1, b->file) != 1) die("%s: %s", path, strerror(errno));
    if (b->against && (fread(&its, sizeof its, 1, b->file) != 1 || its.magic != MAGIC))
        die("%s: not logits that bench logits --save wrote", path);
    if (its.n_vocab != mine.n_vocab || its.n_rows != mine.n_rows || its.texts != mine.texts)
        die("%s: logits of other texts or of another vocabulary: %llu rows of %llu numbers, here %zu of %zu", path,
            (unsigned long long)its.n_rows, (unsigned long long)its.n_vocab, n, b->n_vocab);
}

/* Those of the session behind a token, and the token that comes next in the text. */
static void add_row(struct logits_bench *b, int32_t next)
{
    const float *mine = sqz_session_logits(b->session);
    if (b->save) {
        if (fwrite(mine, sizeof *mine, b->n_vocab, b->file) != b->n_vocab) die("%s: %s", b->save, strerror(errno));
        return;
    }
    if (fread(b->row, sizeof *b->row, b->n_vocab, b->file) != b->n_vocab) die("%s: it is cut off", b->against);
    if (!distance_add(&b->distance, b->row, mine, b->n_vocab, next)) die("logits that are not finite numbers");
}

static void run(struct logits_bench *b)
{
    struct sqz_error error;
    struct sqz_session_stats stats;
    for (size_t i = 0; i < b->n_texts; i++) {
        sqz_session_reset(b->session);
        for (size_t t = b->text_first[i]; t < b->text_first[i + 1]; t++) {
            const bool last = t + 1 == b->text_first[i + 1];
            stop_on(sqz_session_run(b->session, b->tokens + t, 1, &error), &error);
            add_row(b, last ? b->tokens[t] : b->tokens[t + 1]);
        }
        sqz_session_get_stats(b->session, &stats);
        sqz_attention_stats_add(&b->read, &stats.attention);
        sqz_session_clear_stats(b->session);
    }
    if (fclose(b->file) != 0) die("%s: %s", b->save ? b->save : b->against, strerror(errno));
}

static int print_results(struct logits_bench *b)
{
    const struct distance *d = &b->distance;
    const double n = (double)d->n_tokens, read = sqz_attention_stats_share(&b->read);
    json_t *root = json_object();
    const struct {
        const char *key;
        double value;
    } numbers[] = {
        {"kl_mean", d->kl_sum / n},
        {"kl_most", distance_kl_quantile(&b->distance, 1)},
        {"top1_equal", (double)d->n_top1 / n},
        {"nll_against", d->nll_dense_sum / n},
        {"nll", d->nll_squeezed_sum / n},
    };
    if (!b->json) {
        printf("%zu tokens of %zu texts, %.4f of the context read\n", b->text_first[b->n_texts], b->n_texts, read);
        if (b->against)
            printf("mean KL to %s %.3g, most %.3g; the likeliest token is the same %.4f\n", b->against,
                   numbers[0].value, numbers[1].value, numbers[2].value);
        json_decref(root);
        return close_stdout();
    }
    json_object_set_new(root, "tokens", json_count(b->text_first[b->n_texts]));
    json_object_set_new(root, "texts", json_count(b->n_texts));
    json_object_set_new(root, "budget_asked", json_number(b->budget));
    json_object_set_new(root, "budget_read", json_number(read));
    for (size_t i = 0; b->against && i < sizeof numbers / sizeof *numbers; i++)
        json_object_set_new(root, numbers[i].key, json_number(numbers[i].value));
    json_t *ranks = ranks_json();
    if (ranks) json_object_set_new(root, "ranks", ranks);
    add_origin_json(root, (int)b->n_threads);
    return print_json(root);
}

int bench_logits(int argc, char **argv)
{
    struct logits_bench b = {.n_tokens = 64, .budget = 0.1};
    /* clang-format off */
    const struct option options[] = {
        {.kind = OPTION_TEXT, .letter = 'c', .name = "context", .argument = "FILE", .value = &b.context_path,
         .help = "prepared context (needed)"},
        MODEL_OPTION(b.model_path),
        {.kind = OPTION_BUDGET, .name = "budget", .argument = "SHARE", .value = &b.budget, .example = "0.1",
         .help = "share of the KV cache that is read (0.1)"},
        {.kind = OPTION_COUNT, .name = "tokens", .argument = "N", .value = &b.n_tokens, .low = 2, .high = 65536,
         .example = "64", .help = "of each text, at most (64)"},
        {.kind = OPTION_TEXT, .name = "save", .argument = "FILE", .value = &b.save, .help = "write the logits to FILE"},
        {.kind = OPTION_TEXT, .name = "against", .argument = "FILE", .value = &b.against,
         .help = "compare them with those of FILE"},
        THREADS_OPTION(b.n_threads),
        JSON_OPTION(b.json),
        {.kind = OPTION_END},
    };
    /* clang-format on */
    const int n_texts = options_parse(&help, options, argc, argv, 1, 1024);
    if (!b.context_path) usage_error("no context; usage: squeeze bench logits -c CONTEXT --save FILE TEXT.txt...");
    if (!b.save && !b.against) usage_error("give --save FILE or --against FILE");
    const char *inputs[] = {b.context_path, b.model_path, b.against, argv[1]};
    const struct output outputs[] = {{"--save", b.save, OUTPUT_NUMBERS}, {0}};
    outputs_check(outputs, inputs, sizeof inputs / sizeof *inputs);
    struct sqz_context_info context;
    struct sqz_model_info model;
    struct sqz_session_options session;
    struct sqz_error error;
    const struct gpu_flags cpu = {.n_layers = 0};
    catch_signals();
    b.context = open_context(b.context_path, NULL);
    sqz_context_get_info(b.context, &context);
    b.model = open_model_on(b.model_path, measured_threads(b.n_threads), (double)context.rope_scale, &cpu);
    sqz_model_get_info(b.model, &model);
    b.n_threads = (size_t)model.n_threads;
    b.n_vocab = model.n_vocab;
    b.row = allocate(b.n_vocab, sizeof *b.row);
    sqz_session_options_default(&session);
    session.budget = (float)b.budget;
    stop_on(sqz_session_create(&b.session, b.model, b.context, &session, &error), &error);
    read_texts(&b, argv + 1, (size_t)n_texts);
    open_file(&b);
    run(&b);
    const int code = print_results(&b);
    sqz_session_free(b.session);
    sqz_context_free(b.context);
    sqz_model_free(b.model);
    distance_free(&b.distance);
    free(b.tokens);
    free(b.text_first);
    free(b.row);
    return code;
}
