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
#include "many_ranks.h"
#include "memory.h"
#include "progress.h"
#include "shards.h"
#include "signals.h"
#include "text.h"
#include "text_buffer.h"
#include "write_shards.h"

/* ---- Temporary files ------------------------------------------------------------ */

static char temporary_folder[512]; /* "" while there is none */
static char temporary_file[560];
static char **temporary_shards; /* [n_temporary_shards] whose index the file is */
static uint32_t n_temporary_shards;

/* Also in a signal handler. */
static void remove_files(void)
{
    unlink(temporary_file);
    for (uint32_t s = 0; s < n_temporary_shards; s++) unlink(temporary_shards[s]);
}

/* As that. */
static void remove_temporary(void)
{
    if (temporary_folder[0]) {
        remove_files();
        if (rmdir(temporary_folder) == 0) temporary_folder[0] = '\0'; /* else unfinished files are there, for now */
    }
}

static void make_temporary(uint32_t n_shards)
{
    const char *parent = temporary_parent();
    int n = snprintf(temporary_folder, sizeof temporary_folder, "%s/squeeze-XXXXXX", parent);
    errno = ENAMETOOLONG;
    if (n < 0 || (size_t)n >= sizeof temporary_folder || !mkdtemp(temporary_folder)) {
        temporary_folder[0] = '\0';
        die("cannot make a folder for temporary files under %s: %s", parent, strerror(errno));
    }
    snprintf(temporary_file, sizeof temporary_file, "%s/context.sqz.gguf", temporary_folder);
    if (n_shards > 1) {
        temporary_shards = allocate(n_shards, sizeof *temporary_shards);
        for (uint32_t s = 0; s < n_shards; s++)
            if (!(temporary_shards[s] = sqz_shard_path(temporary_file, s, n_shards))) die("out of memory");
        n_temporary_shards = n_shards;
    }
    atexit(remove_temporary);
    on_sudden_end(remove_temporary);
    if (ranks_count() > 1) tidy_at_first_signal();
}

void kept_contexts_take_shards(size_t *n_shards, struct gpu_flags *gpu, const struct sqz_squeeze_options *squeeze)
{
    ranks_take_shards(n_shards, &gpu->n_layers);
    gpu->in_shards = *n_shards > 1;
    if (gpu->in_shards && (squeeze->rows != SQZ_ROWS_F16 || squeeze->keys != SQZ_INDEX_F16))
        usage_error(
            "contexts in shards (--shards, mpirun): dense answers are read from the same files; allowed are --rows "
            "f16 and --keys f16");
}

void kept_contexts_begin(const struct kept_contexts *kept)
{
    if (kept->folder && mkdir(kept->folder, 0777) != 0 && errno != EEXIST) die("%s: %s", kept->folder, strerror(errno));
    make_temporary(kept->n_shards);
}

/* Opens the temporary file; nothing of it stays in the folder, its mapping does. Other ranks have yet to open theirs. */
static struct sqz_context *take_temporary(struct sqz_error *error)
{
    struct sqz_context *context = NULL;
    sqz_context_open(&context, temporary_file, NULL, error);
    if (ranks_count() == 1) remove_files();
    return context;
}

/* ---- Contexts ---------------------------------------------------------------------- */

/* The name of a text's context: same text, length, model, stretch and calibration queries, same file; in shards also the
 * same options. */
static char *kept_path(const struct kept_contexts *kept, const char *text, size_t text_bytes, size_t most_tokens,
                       const struct sqz_squeeze_options *squeeze)
{
    struct text_buffer path = {0};
    char name[IDENTITY_TEXT];
    struct identity id = identity_begin();
    identity_add(&id, text, text_bytes);
    identity_print(&id, "%s|%.9g|%u|%s", kept->fingerprint, kept->rope_scale, kept->n_calibration, sqz_version());
    if (most_tokens) identity_print(&id, "%zu tokens", most_tokens);
    if (kept->n_shards > 1) {
        identity_print(&id, "%u shards", kept->n_shards);
        identity_add_squeeze(&id, squeeze);
    }
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

/* The context's tokens as the text would have them now, into tokens->data (caller frees it); returns how many are kept. 0
 * with the error set when there are none. */
static size_t tokens_of(const struct kept_contexts *kept, const char *text, size_t text_bytes, size_t most_tokens,
                        struct sqz_tokens *tokens, struct sqz_error *error)
{
    size_t n;
    *tokens = (struct sqz_tokens){NULL, 0};
    if (sqz_text_context(tokens, kept->model, text, text_bytes, false, &n, error) != SQZ_OK) return 0;
    return most_tokens && most_tokens < tokens->n ? most_tokens : tokens->n;
}

/* Whether the context has these tokens. */
static bool same_tokens(const struct kept_contexts *kept, const struct sqz_context_info *info, const char *text,
                        size_t text_bytes, size_t most_tokens)
{
    struct sqz_tokens tokens;
    struct sqz_error error;
    const size_t n = tokens_of(kept, text, text_bytes, most_tokens, &tokens, &error);
    const bool same = n > 0 && n == info->n_tokens && memcmp(tokens.data, info->tokens, n * sizeof *tokens.data) == 0;
    free(tokens.data);
    return same;
}

/* Whether the text has tokens for every shard; asked before ranks begin, who all end when one of them fails. */
static bool fills_shards(const struct kept_contexts *kept, const char *text, size_t text_bytes, size_t most_tokens,
                         struct sqz_error *error)
{
    struct sqz_tokens tokens;
    const size_t n = tokens_of(kept, text, text_bytes, most_tokens, &tokens, error);
    const struct sqz_deal deal = {n, SQZ_SHARD_BLOCK_TOKENS, kept->n_shards};
    free(tokens.data);
    return n > 0 && sqz_shards_check_deal(&deal, error) == SQZ_OK;
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
        info.n_shards == (kept->n_shards > 1 ? kept->n_shards : 0) && same_squeeze(&info.squeeze, squeeze) &&
        same_tokens(kept, &info, text, text_bytes, most_tokens))
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
    struct sqz_prepare_report report = {0};
    struct sqz_model_info info;
    struct progress progress;
    if (kept->n_shards > 1 && !fills_shards(kept, text, text_bytes, most_tokens, error)) return false;
    if (path == temporary_file) remove_files(); /* of the context before, that ranks have opened by name */
    sqz_prepare_options_default(&options);
    options.squeeze = *squeeze;
    options.n_shards = kept->n_shards;
    options.truncate_tokens = most_tokens;
    options.progress = progress_show;
    options.user_data = &progress;
    progress_begin(&progress, kept->quiet, label);
    sqz_model_get_info(kept->model, &info);
    ranks_prepare_begin(&options, kept->model_path, kept->fingerprint, kept->n_asked_threads, kept->rope_scale, path,
                        text, text_bytes);
    const enum sqz_status status = sqz_prepare(kept->model, text, text_bytes, path, &options, &report, error);
    ranks_prepare_end(status, error, report.n_context_tokens, &info);
    progress_end(&progress);
    if (ranks_count() > 1) stop_on(status, error);
    return status == SQZ_OK;
}

/* The context that the model has read with these options, kept or prepared; NULL on failure. */
static struct sqz_context *take_text(const struct kept_contexts *kept, const char *text, size_t text_bytes,
                                     size_t most_tokens, const struct sqz_squeeze_options *squeeze, const char *label,
                                     struct sqz_error *error)
{
    struct sqz_context *context = NULL;
    if (!kept->folder) {
        const bool ok = prepare_text(kept, text, text_bytes, most_tokens, label, squeeze, temporary_file, error);
        return ok ? take_temporary(error) : NULL;
    }
    char *path = kept_path(kept, text, text_bytes, most_tokens, squeeze);
    if (access(path, F_OK) == 0) context = open_kept(kept, path, text, text_bytes, most_tokens, squeeze);
    if (!context && prepare_text(kept, text, text_bytes, most_tokens, label, squeeze, path, error))
        sqz_context_open(&context, path, NULL, error);
    free(path);
    return context;
}

struct sqz_context *kept_contexts_base(const struct kept_contexts *kept, const char *text, size_t text_bytes,
                                       size_t most_tokens, const char *label, struct sqz_error *error)
{
    struct sqz_squeeze_options squeeze;
    sqz_squeeze_options_default(&squeeze, SQZ_RULE_DEFAULT);
    squeeze.n_calibration = kept->n_calibration;
    return take_text(kept, text, text_bytes, most_tokens, &squeeze, label, error);
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
                                       size_t most_tokens, const struct sqz_squeeze_options *options, const char *label,
                                       struct sqz_error *error)
{
    struct sqz_context_info info;
    if (!kept->folder || kept->n_shards > 1)
        return take_text(kept, text, text_bytes, most_tokens, options, label, error);
    struct sqz_context *base = kept_contexts_base(kept, text, text_bytes, most_tokens, label, error);
    if (!base) return NULL;
    sqz_context_get_info(base, &info);
    if (same_squeeze(&info.squeeze, options)) return base;
    struct sqz_context *context = kept_contexts_squeeze(kept, base, options, label, error);
    sqz_context_free(base);
    return context;
}
