/*
 * Next-token distributions of a model over texts, to be held against those of
 * other places, budgets and files of the model by bench/gpu/divergence.py:
 *
 *   distributions MODEL GPU-LAYERS CONTEXT-TOKENS TOKENS OUT TEXT...
 *
 * Of each text the first CONTEXT-TOKENS tokens are prepared and the next TOKENS
 * run one by one behind them, at budgets of 0.1 and 1 and by llama.cpp alone.
 * OUT-0.1, OUT-1 and OUT-llama receive log probabilities, F16 [text][token][vocabulary].
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "baseline.h"
#include "ggml.h"
#include "squeeze.h"

static struct sqz_model *model;
static struct sqz_model_info info;
static size_t n_context, n_after;

static void must(enum sqz_status status, const struct sqz_error *error)
{
    if (status == SQZ_OK) return;
    fprintf(stderr, "distributions: %s\n", error->message);
    exit(1);
}

static FILE *open_or_die(const char *path, const char *how)
{
    FILE *file = fopen(path, how);
    if (file) return file;
    perror(path);
    exit(1);
}

static int32_t *read_tokens(const char *path)
{
    enum { MOST_BYTES = 1 << 20 };
    static char bytes[MOST_BYTES];
    struct sqz_error error;
    int32_t *tokens;
    size_t n;
    FILE *file = open_or_die(path, "rb");
    const size_t n_bytes = fread(bytes, 1, sizeof bytes, file);
    fclose(file);
    must(sqz_model_tokenize(model, bytes, n_bytes, &tokens, &n, &error), &error);
    if (n >= n_context + n_after) return tokens;
    fprintf(stderr, "distributions: %s has %zu tokens, %zu are needed\n", path, n, n_context + n_after);
    exit(1);
}

static void write_distribution(FILE *out, const float *logits)
{
    static ggml_fp16_t row[1 << 20];
    double most = -INFINITY, sum = 0;
    for (size_t i = 0; i < info.n_vocab; i++) most = fmax(most, (double)logits[i]);
    for (size_t i = 0; i < info.n_vocab; i++) sum += exp((double)logits[i] - most);
    for (size_t i = 0; i < info.n_vocab; i++)
        row[i] = ggml_fp32_to_fp16((float)((double)logits[i] - most - log(sum)));
    fwrite(row, sizeof *row, info.n_vocab, out);
}

static void run_session(const struct sqz_context *context, float budget, const int32_t *after, FILE *out)
{
    struct sqz_session_options options;
    struct sqz_session *session;
    struct sqz_error error;
    sqz_session_options_default(&options);
    options.budget = budget;
    must(sqz_session_create(&session, model, context, &options, &error), &error);
    for (size_t i = 0; i < n_after; i++) {
        must(sqz_session_run(session, after + i, 1, &error), &error);
        write_distribution(out, sqz_session_logits(session));
    }
    sqz_session_free(session);
}

static void run_llama(const int32_t *tokens, FILE *out)
{
    struct sqz_baseline *baseline;
    struct sqz_error error;
    must(sqz_baseline_create(&baseline, model, n_context + n_after, 1.0f, &error), &error);
    must(sqz_baseline_run(baseline, tokens, n_context, &error), &error);
    for (size_t i = 0; i < n_after; i++) {
        must(sqz_baseline_run(baseline, tokens + n_context + i, 1, &error), &error);
        write_distribution(out, sqz_baseline_logits(baseline));
    }
    sqz_baseline_free(baseline);
}

static void run_text(const char *path, const char *folder_path, FILE *const out[3])
{
    char file[4096];
    struct sqz_error error;
    struct sqz_context *context;
    int32_t *tokens = read_tokens(path);
    snprintf(file, sizeof file, "%s.sqz.gguf", folder_path);
    must(sqz_prepare_tokens(model, tokens, n_context, file, NULL, NULL, &error), &error);
    must(sqz_context_open(&context, file, NULL, &error), &error);
    run_session(context, 0.1f, tokens + n_context, out[0]);
    run_session(context, 1.0f, tokens + n_context, out[1]);
    run_llama(tokens, out[2]);
    sqz_context_free(context);
    remove(file);
    free(tokens);
}

int main(int argc, char **argv)
{
    static const char *const names[3] = {"0.1", "1", "llama"};
    struct sqz_model_options options;
    struct sqz_error error;
    FILE *out[3];
    if (argc < 7) {
        fprintf(stderr, "usage: distributions MODEL GPU-LAYERS CONTEXT-TOKENS TOKENS OUT TEXT...\n");
        return 2;
    }
    n_context = (size_t)atol(argv[3]);
    n_after = (size_t)atol(argv[4]);
    sqz_model_options_default(&options);
    options.n_gpu_layers = atoi(argv[2]);
    sqz_llama_log_take();
    must(sqz_model_open(&model, argv[1], &options, &error), &error);
    sqz_model_get_info(model, &info);
    for (size_t i = 0; i < 3; i++) {
        char path[4096];
        snprintf(path, sizeof path, "%s-%s", argv[5], names[i]);
        out[i] = open_or_die(path, "wb");
    }
    for (int i = 6; i < argc; i++) run_text(argv[i], argv[5], out);
    int failed = 0;
    for (size_t i = 0; i < 3; i++) failed |= ferror(out[i]) || fclose(out[i]);
    sqz_model_free(model);
    return failed;
}
