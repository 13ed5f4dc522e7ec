/* Contexts that are read once; kept_contexts.h describes them. */
#define _POSIX_C_SOURCE 200809L
#include "kept_contexts.h"

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common.h"
#include "identity.h"
#include "inputs.h"
#include "progress.h"
#include "signals.h"
#include "text.h"
#include "text_buffer.h"

/* ---- Temporary files ------------------------------------------------------------ */

static char temporary_folder[512]; /* "" while there is none */
static char temporary_file[560];

/* Also in a signal handler. */
static void remove_temporary(void)
{
    if (temporary_folder[0]) {
        unlink(temporary_file);
        rmdir(temporary_folder);
        temporary_folder[0] = '\0';
    }
}

static void make_temporary(void)
{
    const char *parent = temporary_parent();
    int n = snprintf(temporary_folder, sizeof temporary_folder, "%s/squeeze-XXXXXX", parent);
    errno = ENAMETOOLONG;
    if (n < 0 || (size_t)n >= sizeof temporary_folder || !mkdtemp(temporary_folder)) {
        temporary_folder[0] = '\0';
        die("cannot make a folder for temporary files under %s: %s", parent, strerror(errno));
    }
    snprintf(temporary_file, sizeof temporary_file, "%s/context.sqz.gguf", temporary_folder);
    atexit(remove_temporary);
    on_sudden_end(remove_temporary);
}

void kept_contexts_begin(const struct kept_contexts *kept)
{
    if (kept->folder && mkdir(kept->folder, 0777) != 0 && errno != EEXIST) die("%s: %s", kept->folder, strerror(errno));
    make_temporary();
}

/* Opens the temporary file; nothing of it stays in the folder, its mapping does. */
static struct sqz_context *take_temporary(struct sqz_error *error)
{
    struct sqz_context *context = NULL;
    sqz_context_open(&context, temporary_file, NULL, error);
    unlink(temporary_file);
    return context;
}

/* ---- Contexts ---------------------------------------------------------------------- */

/* The name of a text's context: same text, length, model, stretch and calibration queries, same file. */
static char *kept_path(const struct kept_contexts *kept, const char *text, size_t text_bytes, size_t most_tokens)
{
    struct text_buffer path = {0};
    char name[IDENTITY_TEXT];
    struct identity id = identity_begin();
    identity_add(&id, text, text_bytes);
    identity_print(&id, "%s|%.9g|%u|%s", kept->fingerprint, kept->rope_scale, kept->n_calibration, sqz_version());
    if (most_tokens) identity_print(&id, "%zu tokens", most_tokens);
    identity_end(&id, name);
    text_buffer_append(&path, kept->folder, strlen(kept->folder));
    text_buffer_print(&path, "/%s.sqz.gguf", name);
    return path.text;
}

static bool same_squeeze(const struct sqz_squeeze_options *a, const struct sqz_squeeze_options *b)
{
    for (uint32_t i = 0; i < a->n_levels && i < b->n_levels; i++)
        if (a->centroid_share[i] != b->centroid_share[i]) return false;
    return a->rule == b->rule && a->n_levels == b->n_levels && a->metric == b->metric && a->group == b->group &&
           a->index == b->index && a->code_words == b->code_words && a->keys == b->keys && a->rows == b->rows &&
           a->n_sinks == b->n_sinks && a->n_window == b->n_window && a->n_iterations == b->n_iterations &&
           a->center == b->center && a->variance == b->variance && a->per_head == b->per_head && a->tail == b->tail &&
           a->value_skip == b->value_skip && a->n_calibration == b->n_calibration && a->seed == b->seed;
}

/* Whether the context has the tokens that the text would have now. */
static bool same_tokens(const struct kept_contexts *kept, const struct sqz_context_info *info, const char *text,
                        size_t text_bytes, size_t most_tokens)
{
    struct sqz_tokens tokens = {NULL, 0};
    struct sqz_error error;
    size_t n;
    bool same = sqz_text_context(&tokens, kept->model, text, text_bytes, false, &n, &error) == SQZ_OK;
    n = most_tokens && most_tokens < tokens.n ? most_tokens : tokens.n;
    same = same && n == info->n_tokens && memcmp(tokens.data, info->tokens, n * sizeof *tokens.data) == 0;
    free(tokens.data);
    return same;
}

/* Opens a kept context; NULL, with the reason said, when it is not what its name says. */
static struct sqz_context *open_kept(const struct kept_contexts *kept, const char *path, const char *text,
                                     size_t text_bytes, size_t most_tokens, const struct sqz_squeeze_options *squeeze)
{
    struct sqz_error error = {0};
    struct sqz_context *context = NULL;
    struct sqz_context_info info;
    if (sqz_context_open(&context, path, NULL, &error) != SQZ_OK) {
        warn("%s; preparing it again", error.message);
        return NULL;
    }
    sqz_context_get_info(context, &info);
    if (strcmp(info.model_fingerprint, kept->fingerprint) == 0 && info.rope_scale == (float)kept->rope_scale &&
        same_squeeze(&info.squeeze, squeeze) && same_tokens(kept, &info, text, text_bytes, most_tokens))
        return context;
    warn("%s: holds another model's context, another text's or one of other options; preparing it again", path);
    sqz_context_free(context);
    return NULL;
}

static bool prepare_text(const struct kept_contexts *kept, const char *text, size_t text_bytes, size_t most_tokens,
                         const char *label, const struct sqz_squeeze_options *squeeze, const char *path,
                         struct sqz_error *error)
{
    struct sqz_prepare_options options;
    struct progress progress;
    sqz_prepare_options_default(&options);
    options.squeeze = *squeeze;
    options.truncate_tokens = most_tokens;
    options.progress = progress_show;
    options.user_data = &progress;
    progress_begin(&progress, kept->quiet, label);
    const enum sqz_status status = sqz_prepare(kept->model, text, text_bytes, path, &options, NULL, error);
    progress_end(&progress);
    return status == SQZ_OK;
}

struct sqz_context *kept_contexts_base(const struct kept_contexts *kept, const char *text, size_t text_bytes,
                                       size_t most_tokens, const char *label, struct sqz_error *error)
{
    struct sqz_context *context = NULL;
    struct sqz_squeeze_options squeeze;
    sqz_squeeze_options_default(&squeeze, SQZ_RULE_DEFAULT);
    squeeze.n_calibration = kept->n_calibration;
    if (!kept->folder) {
        const bool ok = prepare_text(kept, text, text_bytes, most_tokens, label, &squeeze, temporary_file, error);
        return ok ? take_temporary(error) : NULL;
    }
    char *path = kept_path(kept, text, text_bytes, most_tokens);
    if (access(path, F_OK) == 0) context = open_kept(kept, path, text, text_bytes, most_tokens, &squeeze);
    if (!context && prepare_text(kept, text, text_bytes, most_tokens, label, &squeeze, path, error))
        sqz_context_open(&context, path, NULL, error);
    free(path);
    return context;
}

struct sqz_context *kept_contexts_squeeze(const struct kept_contexts *kept, struct sqz_context *base,
                                          const struct sqz_squeeze_options *squeeze, const char *label,
                                          struct sqz_error *error)
{
    struct sqz_prepare_options options;
    struct progress progress;
    sqz_prepare_options_default(&options);
    options.squeeze = *squeeze;
    options.progress = progress_show;
    options.user_data = &progress;
    progress_begin(&progress, kept->quiet, label);
    const enum sqz_status status = sqz_context_squeeze(base, temporary_file, &options, kept->n_threads, NULL, error);
    progress_end(&progress);
    return status == SQZ_OK ? take_temporary(error) : NULL;
}

struct sqz_context *kept_contexts_open(const struct kept_contexts *kept, const char *text, size_t text_bytes,
                                       const struct sqz_squeeze_options *options, const char *label,
                                       struct sqz_error *error)
{
    struct sqz_context_info info;
    if (!kept->folder) {
        return prepare_text(kept, text, text_bytes, 0, label, options, temporary_file, error) ? take_temporary(error)
                                                                                              : NULL;
    }
    struct sqz_context *base = kept_contexts_base(kept, text, text_bytes, 0, label, error);
    if (!base) return NULL;
    sqz_context_get_info(base, &info);
    if (same_squeeze(&info.squeeze, options)) return base;
    struct sqz_context *context = kept_contexts_squeeze(kept, base, options, label, error);
    sqz_context_free(base);
    return context;
}
