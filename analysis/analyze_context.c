/* Contexts for measurements; analyze.h. */
#define _GNU_SOURCE /* mkdtemp */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "analyze.h"
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
