/* Contexts for measurements; analyze.h. */
#define _GNU_SOURCE /* mkdtemp */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "analyze.h"
#include "analyze_rates.h"
#include "common.h"
#include "inputs.h"

struct sqz_context *analysis_context(struct sqz_model *model, const struct sqz_squeeze_options *squeeze,
                                     const int32_t *tokens, size_t n)
{
    struct sqz_error error;
    struct sqz_prepare_options options;
    char directory[4096], file[4200];
    struct sqz_context *context = NULL;
    snprintf(directory, sizeof directory, "%s/squeeze-analyze-XXXXXX", temporary_parent());
    if (!mkdtemp(directory)) die("%s: cannot make a temporary folder", directory);
    snprintf(file, sizeof file, "%s/context.sqz.gguf", directory);
    sqz_prepare_options_default(&options);
    options.squeeze = *squeeze;
    enum sqz_status status = sqz_prepare_tokens(model, tokens, n, file, &options, NULL, &error);
    if (status == SQZ_OK) status = sqz_context_open(&context, file, NULL, &error);
    unlink(file);
    rmdir(directory);
    stop_on(status, &error);
    return context;
}

/* The first tokens of the model's vocabulary that stand for something: their text does not matter. */
void short_run_open(struct short_run *run, const char *model_path, size_t n_threads,
                    const struct sqz_squeeze_options *squeeze)
{
    static const char text[] = "What is measured here does not depend on the words, so these are as good as any other "
                               "words that make a few dozen tokens, of which the first ones are taken.";
    const struct gpu_flags no_card = {.n_layers = 0};
    struct sqz_squeeze_options dense = *squeeze;
    struct sqz_error error;
    int32_t *tokens = NULL;
    size_t n = 0;
    dense.n_levels = 0;
    run->model = open_model_on(model_path, measured_threads(n_threads), 1, &no_card);
    stop_on(sqz_model_tokenize(run->model, text, strlen(text), &tokens, &n, &error), &error);
    run->context = analysis_context(run->model, &dense, tokens, n < SHORT_TOKENS ? n : SHORT_TOKENS);
    free(tokens);
    stop_on(sqz_session_create(&run->session, run->model, run->context, NULL, &error), &error);
}

void short_run_close(struct short_run *run)
{
    sqz_session_free(run->session);
    sqz_context_free(run->context);
    sqz_model_free(run->model);
}
