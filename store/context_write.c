/*
 * Writing a context file. The layout follows from the counts and is fixed at
 * create; the space is reserved then too, or by a call of its own, so a full
 * disk is found before the work and not after it. The file has no name until commit where the system
 * allows (O_TMPFILE), a hidden temporary one elsewhere.
 */
#define _GNU_SOURCE /* O_TMPFILE, fallocate, flock */
#include "output_place.h"
#include "error.h"
#include "unfinished.h"
#include "write_pieces.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

struct sqz_context_writer {
    char *path; /* as it was given, for messages */
    struct sqz_output_place place;
    int file;                                  /* descriptor, -1 when closed */
    char temporary[SQZ_UNFINISHED_NAME_BYTES]; /* in the place's directory; "" while the file has no name */
    int unfinished;                            /* what the temporary name is noted as; -1: not */

    struct gguf_context *gguf;
    uint64_t data_offset, file_bytes;
    uint64_t *offset, *checksum; /* [n_tensors], offset from the start of the file */
    size_t n_tensors;

    uint32_t n_layer; /* in the file: none in the index of shards */
    struct sqz_row_tokens tokens;
    const int32_t *token_ids; /* [n_token_ids] the caller's, until the space is reserved */
    size_t n_token_ids;
    uint64_t *metadata_checksum;        /* where it is told; NULL: nobody asked */
    struct sqz_squeeze_options options; /* of the context */
    uint32_t version;
    struct sqz_layer *shapes;         /* [n_layer] counts as declared; pointers say only that an array will come */
    size_t *first_index, *first_bulk; /* [n_layer] number of the layer's first index tensor, first key */
    bool *written, *rows_written;     /* [n_layer] */
    int n_threads;
};

/* ---- Paths and names ------------------------------------------------------------ */

static bool make_temporary_name(char name[SQZ_UNFINISHED_NAME_BYTES])
{
    uint64_t random;
    if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random) return false;
    snprintf(name, SQZ_UNFINISHED_NAME_BYTES, ".sqz-%016" PRIx64 ".tmp", random);
    return true;
}

#ifdef O_TMPFILE
/* A nameless file can only get its name later through /proc; without it the file is named from the start. */
static bool can_name_later(int file)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    return access(link, F_OK) == 0;
}
#endif

/* Another temporary name, noted before the file has it. */
static bool take_name(struct sqz_context_writer *writer)
{
    if (!make_temporary_name(writer->temporary)) {
        writer->temporary[0] = '\0';
        return false;
    }
    writer->unfinished = sqz_unfinished_note(writer->place.directory, writer->temporary);
    return true;
}

static void give_up_name(struct sqz_context_writer *writer)
{
    sqz_unfinished_drop(writer->unfinished);
    writer->unfinished = -1;
    writer->temporary[0] = '\0';
}

static bool open_nameless(struct sqz_context_writer *writer, mode_t mode)
{
#ifdef O_TMPFILE
    writer->file = openat(writer->place.directory, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, mode);
    if (writer->file >= 0 && !can_name_later(writer->file)) {
        close(writer->file);
        writer->file = -1;
    }
#endif
    return writer->file >= 0;
}

static enum sqz_status open_file(struct sqz_context_writer *writer, const struct sqz_report *report)
{
    const mode_t mode = writer->place.replaces ? 0600 : 0666;
    open_nameless(writer, mode);
    for (int attempt = 0; writer->file < 0 && attempt < 100; attempt++) {
        if (!take_name(writer))
            return sqz_report_as(report, SQZ_ERROR_IO, "no random name for a temporary file: %s", strerror(errno));
        writer->file = openat(writer->place.directory, writer->temporary, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, mode);
        if (writer->file < 0) {
            const int reason = errno;
            give_up_name(writer);
            errno = reason;
            if (errno != EEXIST) break;
        }
    }
    if (writer->file < 0)
        return sqz_report_as(report, SQZ_ERROR_IO, "no file can be made in its directory: %s", strerror(errno));
    flock(writer->file, LOCK_EX | LOCK_NB); /* as long as we live, whatever name the file gets; a hint where it fails */
    return sqz_output_place_dress(&writer->place, writer->file, report);
}

/* ---- Bytes ------------------------------------------------------------------------ */

static enum sqz_status write_pieces(const struct sqz_context_writer *writer, const struct sqz_piece *pieces, size_t n,
                                    const struct sqz_report *report)
{
    struct sqz_write_failure failure;
    if (sqz_write_pieces(writer->file, pieces, n, writer->n_threads, &failure)) return SQZ_OK;
    return sqz_report_as(report, SQZ_ERROR_IO, "writing %" PRIu64 " bytes at %" PRIu64 " failed: %s", failure.n_bytes,
                         failure.offset, failure.reason ? strerror(failure.reason) : "no bytes were taken");
}

/* What is written of a tensor. */
static struct sqz_piece piece_of(const struct sqz_context_writer *writer, size_t number, const void *data,
                                 uint64_t bytes)
{
    return (struct sqz_piece){data, bytes, writer->offset[number], &writer->checksum[number]};
}

static enum sqz_status reserve_space(const struct sqz_context_writer *writer, const struct sqz_report *report)
{
    struct statvfs system;
    const uint64_t available =
        fstatvfs(writer->file, &system) ? UINT64_MAX : (uint64_t)system.f_bavail * system.f_frsize;
    int reason = 0;
    do {
        reason = fallocate(writer->file, 0, 0, (off_t)writer->file_bytes) ? errno : 0;
    } while (reason == EINTR);
    /* Where a file system cannot reserve, what it says is free is the best guess; writing may still fail. */
    if (reason == EOPNOTSUPP || reason == ENOSYS)
        reason = available < writer->file_bytes                       ? ENOSPC
                 : ftruncate(writer->file, (off_t)writer->file_bytes) ? errno
                                                                      : 0;
    if (reason == ENOSPC || reason == EDQUOT)
        return sqz_report_as(report, SQZ_ERROR_IO,
                             "not enough space: %" PRIu64 " bytes are needed, %" PRIu64 " are free (%s)",
                             writer->file_bytes, available, strerror(reason));
    if (reason == EFBIG)
        return sqz_report_as(report, SQZ_ERROR_IO,
                             "%" PRIu64 " bytes are needed, more than a file may have here: the "
                             "file system's or the shell's limit (ulimit -f)",
                             writer->file_bytes);
    if (reason)
        return sqz_report_as(report, SQZ_ERROR_IO, "cannot reserve %" PRIu64 " bytes: %s", writer->file_bytes,
                             strerror(reason));
    return SQZ_OK;
}

/* ---- Metadata ------------------------------------------------------------------------ */

/* gguf.h has no call that sets the alignment of an empty context, its reader has: begin from a file of one key. */
static struct gguf_context *begin_gguf(void)
{
    static const char key[] = GGUF_KEY_GENERAL_ALIGNMENT;
    const uint32_t version = GGUF_VERSION, type = GGUF_TYPE_UINT32, alignment = SQZ_FORMAT_ALIGNMENT;
    const uint64_t n_tensors = 0, n_keys = 1, key_bytes = sizeof key - 1;
    unsigned char file[4 + 4 + 8 + 8 + 8 + sizeof key - 1 + 4 + 4], *next = file;
#define PUT(from, bytes) (memcpy(next, from, bytes), next += (bytes))
    PUT(GGUF_MAGIC, 4);
    PUT(&version, 4);
    PUT(&n_tensors, 8);
    PUT(&n_keys, 8);
    PUT(&key_bytes, 8);
    PUT(key, sizeof key - 1);
    PUT(&type, 4);
    PUT(&alignment, 4);
#undef PUT
    return gguf_init_from_buffer(file, sizeof file, (struct gguf_init_params){.no_alloc = true, .ctx = NULL});
}

static void set_meta_keys(struct gguf_context *gguf, const struct sqz_context_meta *meta)
{
    gguf_set_val_str(gguf, "squeeze.model.name", meta->model_name);
    gguf_set_val_str(gguf, "squeeze.model.architecture", meta->model_architecture);
    gguf_set_val_str(gguf, "squeeze.model.fingerprint", meta->model_fingerprint);
    gguf_set_val_str(gguf, "squeeze.source.name", meta->source_name);
    gguf_set_val_bool(gguf, "squeeze.has_template", meta->has_template);
    gguf_set_val_f32(gguf, "squeeze.rope_scale", meta->rope_scale);
    if (meta->rope_factors != SQZ_ROPE_FACTORS_UNSAID) gguf_set_val_u32(gguf, SQZ_KEY_ROPE_FACTORS, meta->rope_factors);
    gguf_set_val_u32(gguf, "squeeze.token_count", (uint32_t)meta->n_tokens);
    gguf_set_val_u32(gguf, "squeeze.layer_count", meta->n_layer);
}

static void set_shard_keys(struct gguf_context *gguf, const struct sqz_shard_place *shard)
{
    gguf_set_val_u32(gguf, SQZ_KEY_SHARD_COUNT, shard->count);
    gguf_set_val_u32(gguf, SQZ_KEY_SHARD_NUMBER, shard->number);
    gguf_set_val_u32(gguf, SQZ_KEY_SHARD_BLOCK, shard->block_tokens);
    if (shard->n_tokens) gguf_set_val_u32(gguf, SQZ_KEY_SHARD_TOKENS, shard->n_tokens);
    if (shard->number) return;
    gguf_set_arr_str(gguf, SQZ_KEY_SHARD_FILES, (const char **)(uintptr_t)shard->files, shard->count);
    gguf_set_arr_data(gguf, SQZ_KEY_SHARD_CHECKSUMS, GGUF_TYPE_UINT64, shard->checksums, shard->count);
}

static void set_option_keys(struct gguf_context *gguf, const struct sqz_squeeze_options *options, uint32_t version)
{
    if (version >= SQZ_FORMAT_PLANES) gguf_set_val_u32(gguf, SQZ_KEY_OPTION_ROWS, (uint32_t)options->rows);
    gguf_set_val_u32(gguf, "squeeze.option.rule", (uint32_t)options->rule);
    gguf_set_val_u32(gguf, "squeeze.option.level_count", options->n_levels);
    gguf_set_arr_data(gguf, "squeeze.option.centroid_share", GGUF_TYPE_FLOAT32, options->centroid_share,
                      SQZ_MAX_LEVELS);
    gguf_set_val_u32(gguf, "squeeze.option.metric", (uint32_t)options->metric);
    gguf_set_val_u32(gguf, "squeeze.option.group", (uint32_t)options->group);
    gguf_set_val_u32(gguf, "squeeze.option.sinks", options->n_sinks);
    gguf_set_val_u32(gguf, "squeeze.option.window", options->n_window);
    gguf_set_val_u32(gguf, "squeeze.option.index", (uint32_t)options->index);
    gguf_set_val_u32(gguf, "squeeze.option.keys", (uint32_t)options->keys);
    gguf_set_val_u32(gguf, "squeeze.option.code_words", options->code_words);
    gguf_set_val_u32(gguf, "squeeze.option.iterations", options->n_iterations);
    gguf_set_val_bool(gguf, "squeeze.option.center", options->center);
    gguf_set_val_bool(gguf, "squeeze.option.variance", options->variance);
    gguf_set_val_bool(gguf, "squeeze.option.per_head", options->per_head);
    gguf_set_val_bool(gguf, "squeeze.option.tail", options->tail);
    gguf_set_val_bool(gguf, "squeeze.option.value_skip", options->value_skip);
    gguf_set_val_u32(gguf, "squeeze.option.calibration", options->n_calibration);
    gguf_set_val_u64(gguf, "squeeze.option.seed", options->seed);
}

/* One array a field, one element a layer. column: [n_layer] scratch of 4-byte elements. */
static void set_layer_keys(struct gguf_context *gguf, const struct sqz_layer *shapes, uint32_t n_layer, void *column)
{
#define COLUMN(key, gguf_type, c_type, field)                                                                          \
    do {                                                                                                               \
        c_type *values = column;                                                                                       \
        for (uint32_t i = 0; i < n_layer; i++) values[i] = (c_type)shapes[i].field;                                    \
        gguf_set_arr_data(gguf, "squeeze.layer." key, gguf_type, values, n_layer);                                     \
    } while (0)
    COLUMN("head_count", GGUF_TYPE_UINT32, uint32_t, shape.n_head);
    COLUMN("head_count_kv", GGUF_TYPE_UINT32, uint32_t, shape.n_head_kv);
    COLUMN("head_dim", GGUF_TYPE_UINT32, uint32_t, shape.head_dim);
    COLUMN("scale", GGUF_TYPE_FLOAT32, float, shape.scale);
    COLUMN("row_count", GGUF_TYPE_UINT32, uint32_t, n_rows);
    COLUMN("fixed_count", GGUF_TYPE_UINT32, uint32_t, n_fixed);
    COLUMN("sliding_window", GGUF_TYPE_BOOL, int8_t, sliding_window);
    COLUMN("window_tokens", GGUF_TYPE_UINT32, uint32_t, n_window_tokens);
    COLUMN("level_count", GGUF_TYPE_UINT32, uint32_t, n_levels);
    COLUMN("tail", GGUF_TYPE_BOOL, int8_t, tail);
    COLUMN("value_skip", GGUF_TYPE_BOOL, int8_t, value_skip);
    COLUMN("group", GGUF_TYPE_UINT32, uint32_t, group);
    COLUMN("curve_count", GGUF_TYPE_UINT32, uint32_t, n_curve);
    COLUMN("code_words", GGUF_TYPE_UINT32, uint32_t, codes.n_words);
    COLUMN("code_directions", GGUF_TYPE_UINT32, uint32_t, codes.n_directions);
    COLUMN("query_count", GGUF_TYPE_UINT32, uint32_t, n_queries);
#undef COLUMN
    uint32_t *clusters = column;
    memset(clusters, 0, (size_t)n_layer * SQZ_MAX_LEVELS * sizeof *clusters);
    for (uint32_t i = 0; i < n_layer; i++)
        for (uint32_t level = 0; level < shapes[i].n_levels; level++)
            clusters[(size_t)i * SQZ_MAX_LEVELS + level] = shapes[i].level[level].n_clusters;
    gguf_set_arr_data(gguf, "squeeze.layer.cluster_count", GGUF_TYPE_UINT32, clusters,
                      (size_t)n_layer * SQZ_MAX_LEVELS);
}

/* The same number of bytes whatever the values, so they may be set again once they are known. */
static void set_checksum_keys(struct sqz_context_writer *writer, uint64_t metadata)
{
    gguf_set_arr_data(writer->gguf, SQZ_KEY_CHECKSUM_TENSORS, GGUF_TYPE_UINT64, writer->checksum, writer->n_tensors);
    gguf_set_val_u64(writer->gguf, SQZ_KEY_CHECKSUM_METADATA, metadata);
}

static void add_tensor(struct sqz_context_writer *writer, const char *name, enum ggml_type type, const int64_t ne[3])
{
    struct ggml_tensor tensor;
    memset(&tensor, 0, sizeof tensor);
    tensor.type = type;
    for (int i = 0; i < GGML_MAX_DIMS; i++) tensor.ne[i] = i < 3 ? ne[i] : 1;
    tensor.nb[0] = ggml_type_size(type);
    for (int i = 1; i < GGML_MAX_DIMS; i++) tensor.nb[i] = tensor.nb[i - 1] * (size_t)tensor.ne[i - 1];
    snprintf(tensor.name, sizeof tensor.name, "%s", name);
    gguf_add_tensor(writer->gguf, &tensor);
    writer->n_tensors++;
}

/* ---- Layout ------------------------------------------------------------------------- */

/* A tensor is in the file when its array is there and the counts have a use for it. */
static enum sqz_status check_presence(const struct sqz_tensor_spec *spec, const struct sqz_layer *layer,
                                      const struct sqz_report *report)
{
    if (spec->need == SQZ_NEED_ALWAYS && !sqz_slot_get(layer, spec->slot))
        return sqz_report_fail(report, "%s is missing", spec->name);
    return SQZ_OK;
}

/* Adds the layers' index tensors, or their keys and values; *bytes grows by what they take. */
static enum sqz_status add_layer_tensors(struct sqz_context_writer *writer, bool bulk, uint64_t *bytes,
                                         const struct sqz_report *report)
{
    struct sqz_tensor_spec specs[SQZ_FORMAT_LAYER_TENSORS];
    enum sqz_status status;
    for (uint32_t index = 0; index < writer->n_layer; index++) {
        const struct sqz_layer *shape = &writer->shapes[index];
        const size_t n = sqz_layer_tensors(specs, shape, index);
        (bulk ? writer->first_bulk : writer->first_index)[index] = writer->n_tensors;
        for (size_t i = 0; i < n; i++) {
            if (specs[i].bulk != bulk) continue;
            if ((status = check_presence(&specs[i], shape, report))) return status;
            if (!sqz_slot_get(shape, specs[i].slot)) continue;
            if (specs[i].bytes > INT64_MAX / 4 - *bytes)
                return sqz_report_fail(report, "the context is larger than a file can be");
            *bytes += sqz_format_pad(specs[i].bytes);
            add_tensor(writer, specs[i].name, specs[i].type, specs[i].ne);
        }
    }
    return SQZ_OK;
}

/* Index first, keys and values after it: what opening reads is then one run of the file. */
static enum sqz_status lay_out(struct sqz_context_writer *writer, const struct sqz_context_meta *meta,
                               const struct sqz_report *report)
{
    const int64_t token_ne[3] = {(int64_t)meta->n_tokens, 1, 1};
    uint64_t bytes = sqz_format_pad(meta->n_tokens * sizeof *meta->tokens);
    enum sqz_status status;
    uint32_t *column = malloc(((size_t)writer->n_layer * SQZ_MAX_LEVELS + 1) * sizeof *column);
    writer->gguf = begin_gguf();
    if (!column || !writer->gguf) {
        free(column);
        return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for the metadata");
    }
    gguf_set_val_str(writer->gguf, "general.architecture", SQZ_FORMAT_ARCHITECTURE);
    gguf_set_val_u32(writer->gguf, SQZ_KEY_VERSION, writer->version);
    set_meta_keys(writer->gguf, meta);
    set_option_keys(writer->gguf, &meta->squeeze, writer->version);
    if (meta->shard.count) set_shard_keys(writer->gguf, &meta->shard);
    if (writer->n_layer) set_layer_keys(writer->gguf, writer->shapes, writer->n_layer, column);
    gguf_set_val_str(writer->gguf, "squeeze.checksum.kind", SQZ_FORMAT_CHECKSUM_KIND);
    free(column);

    add_tensor(writer, "tokens", GGML_TYPE_I32, token_ne);
    if ((status = add_layer_tensors(writer, false, &bytes, report)) ||
        (status = add_layer_tensors(writer, true, &bytes, report)))
        return status;
    writer->offset = calloc(writer->n_tensors, sizeof *writer->offset);
    writer->checksum = calloc(writer->n_tensors, sizeof *writer->checksum);
    if (!writer->offset || !writer->checksum)
        return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for %zu tensors", writer->n_tensors);
    set_checksum_keys(writer, 0);
    writer->data_offset = gguf_get_meta_size(writer->gguf);
    writer->file_bytes = writer->data_offset + bytes;
    for (size_t i = 0; i < writer->n_tensors; i++)
        writer->offset[i] = writer->data_offset + gguf_get_tensor_offset(writer->gguf, (int64_t)i);
    return SQZ_OK;
}

/* ---- The writer ---------------------------------------------------------------------- */

static void close_file(struct sqz_context_writer *writer)
{
    if (writer->file >= 0) close(writer->file);
    writer->file = -1;
    if (writer->temporary[0]) {
        unlinkat(writer->place.directory, writer->temporary, 0);
        give_up_name(writer);
    }
    sqz_output_place_close(&writer->place);
}

void sqz_context_writer_abort(struct sqz_context_writer *writer)
{
    if (!writer) return;
    close_file(writer);
    gguf_free(writer->gguf);
    free(writer->offset);
    free(writer->checksum);
    free(writer->shapes);
    free(writer->first_index);
    free(writer->first_bulk);
    free(writer->written);
    free(writer->rows_written);
    free(writer->path);
    free(writer);
}

/* The oldest version that can say what the layers are, and how they were asked for. */
static uint32_t version_for(const struct sqz_context_meta *meta, const struct sqz_layer *shapes, uint32_t n_layer)
{
    const struct sqz_squeeze_options *options = &meta->squeeze;
    if (meta->shard.count) return meta->shard.n_tokens ? SQZ_FORMAT_WINDOWS : SQZ_FORMAT_SHARDS;
    if (options->rows != SQZ_ROWS_F16) return SQZ_FORMAT_PLANES;
    for (uint32_t i = 0; i < n_layer; i++)
        if (shapes[i].keys.type == SQZ_ROW_I8) return SQZ_FORMAT_SMALL_KEYS;
    return SQZ_FORMAT_OLDEST;
}

static enum sqz_status prepare_writer(struct sqz_context_writer *writer, const char *path,
                                      const struct sqz_context_meta *meta, const struct sqz_layer *shapes,
                                      const struct sqz_report *report)
{
    const uint32_t n_layer = shapes ? meta->n_layer : 0;
    enum sqz_status status;
    writer->path = strdup(path);
    if (!writer->path) return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for the path");
    if ((status = sqz_output_place_find(&writer->place, path, report)) || (status = sqz_check_meta(meta, report)) ||
        (status = sqz_check_tokens(meta->tokens, meta->n_tokens, report)))
        return status;
    writer->version = version_for(meta, shapes, n_layer);
    for (uint32_t i = 0; i < n_layer; i++)
        if ((status = sqz_check_layer_counts(&shapes[i], i, sqz_row_tokens_of(meta), report)) ||
            (status = sqz_check_layer_types(&shapes[i], i, &meta->squeeze, writer->version, report)))
            return status;

    writer->n_layer = n_layer;
    writer->tokens = sqz_row_tokens_of(meta);
    writer->options = meta->squeeze;
    writer->shapes = malloc((n_layer + 1) * sizeof *writer->shapes);
    writer->first_index = calloc(n_layer + 1, sizeof *writer->first_index);
    writer->first_bulk = calloc(n_layer + 1, sizeof *writer->first_bulk);
    writer->written = calloc(n_layer + 1, sizeof *writer->written);
    writer->rows_written = calloc(n_layer + 1, sizeof *writer->rows_written);
    if (!writer->shapes || !writer->first_index || !writer->first_bulk || !writer->written || !writer->rows_written)
        return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for %" PRIu32 " layers", n_layer);
    if (n_layer) memcpy(writer->shapes, shapes, n_layer * sizeof *shapes);
    sqz_output_place_clear(&writer->place);
    writer->token_ids = meta->tokens;
    writer->n_token_ids = meta->n_tokens;
    if ((status = lay_out(writer, meta, report))) return status;
    return open_file(writer, report);
}

enum sqz_status sqz_context_writer_reserve(struct sqz_context_writer *writer, struct sqz_error *error)
{
    const struct sqz_report report = {writer->path, SQZ_ERROR_ARGUMENT, "", error};
    const struct sqz_piece tokens =
        piece_of(writer, 0, writer->token_ids, writer->n_token_ids * sizeof *writer->token_ids);
    enum sqz_status status = reserve_space(writer, &report);
    if (status == SQZ_OK) status = write_pieces(writer, &tokens, 1, &report);
    writer->token_ids = NULL;
    return status;
}

enum sqz_status sqz_context_writer_open(struct sqz_context_writer **out, const char *path,
                                        const struct sqz_context_meta *meta, const struct sqz_layer *shapes,
                                        struct sqz_error *error)
{
    const struct sqz_report report = {path, SQZ_ERROR_ARGUMENT, "", error};
    if (!out) return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "no place for the writer");
    *out = NULL;
    const bool is_index = meta && meta->shard.count && !meta->shard.number;
    if (!path || !meta || !shapes != is_index || !meta->tokens)
        return sqz_report_fail(&report, "path, meta, tokens or shapes are missing");
    struct sqz_context_writer *writer = calloc(1, sizeof *writer);
    if (!writer) return sqz_report_as(&report, SQZ_ERROR_MEMORY, "no memory for a writer");
    writer->place.directory = writer->file = writer->unfinished = -1;
    writer->n_threads = 1;
    const enum sqz_status status = prepare_writer(writer, path, meta, shapes, &report);
    if (status) {
        sqz_context_writer_abort(writer);
        return status;
    }
    *out = writer;
    return sqz_error_clear(error);
}

enum sqz_status sqz_context_writer_create(struct sqz_context_writer **out, const char *path,
                                          const struct sqz_context_meta *meta, const struct sqz_layer *shapes,
                                          struct sqz_error *error)
{
    enum sqz_status status = sqz_context_writer_open(out, path, meta, shapes, error);
    if (status == SQZ_OK) status = sqz_context_writer_reserve(*out, error);
    if (status == SQZ_OK || !out) return status;
    sqz_context_writer_abort(*out);
    *out = NULL;
    return status;
}

void sqz_context_writer_set_threads(struct sqz_context_writer *writer, int n_threads)
{
    writer->n_threads = n_threads;
}

void sqz_context_writer_tell_checksum(struct sqz_context_writer *writer, uint64_t *checksum)
{
    writer->metadata_checksum = checksum;
}

/* The layer against what create was told: a difference would write past a tensor's place. */
static enum sqz_status check_declared(const struct sqz_layer *layer, const struct sqz_layer *shape, uint32_t index,
                                      const struct sqz_report *report)
{
    bool same = layer->shape.n_head == shape->shape.n_head && layer->shape.n_head_kv == shape->shape.n_head_kv &&
                layer->shape.head_dim == shape->shape.head_dim && layer->shape.scale == shape->shape.scale &&
                layer->n_rows == shape->n_rows && layer->n_fixed == shape->n_fixed &&
                layer->sliding_window == shape->sliding_window && layer->n_window_tokens == shape->n_window_tokens &&
                layer->n_levels == shape->n_levels && layer->tail == shape->tail &&
                layer->value_skip == shape->value_skip && layer->group == shape->group &&
                layer->n_curve == shape->n_curve && layer->codes.n_words == shape->codes.n_words &&
                layer->codes.n_directions == shape->codes.n_directions && layer->n_queries == shape->n_queries;
    for (uint32_t i = 0; same && i < shape->n_levels; i++)
        same = layer->level[i].n_clusters == shape->level[i].n_clusters;
    if (!same) return sqz_report_fail(report, "layer %" PRIu32 ": its counts are not those that were declared", index);

    struct sqz_tensor_spec specs[SQZ_FORMAT_LAYER_TENSORS];
    const size_t n = sqz_layer_tensors(specs, shape, index);
    for (size_t i = 0; i < n; i++)
        if (!sqz_slot_get(layer, specs[i].slot) != !sqz_slot_get(shape, specs[i].slot))
            return sqz_report_fail(report, "%s is %s, but was declared to be %s", specs[i].name,
                                   sqz_slot_get(layer, specs[i].slot) ? "there" : "missing",
                                   sqz_slot_get(shape, specs[i].slot) ? "there" : "missing");
    return SQZ_OK;
}

/* What there is to write of a layer: its index, its rows. Returns how many pieces. */
static size_t pieces_of(const struct sqz_context_writer *writer, uint32_t index, const struct sqz_layer *layer,
                        bool with_index, bool with_rows, struct sqz_piece pieces[SQZ_FORMAT_LAYER_TENSORS])
{
    struct sqz_tensor_spec specs[SQZ_FORMAT_LAYER_TENSORS];
    const size_t n = sqz_layer_tensors(specs, layer, index);
    size_t next_index = writer->first_index[index], next_bulk = writer->first_bulk[index], n_pieces = 0;
    for (size_t i = 0; i < n; i++) {
        const void *array = sqz_slot_get(layer, specs[i].slot);
        if (!array) continue;
        const size_t number = specs[i].bulk ? next_bulk++ : next_index++;
        if (specs[i].bulk ? with_rows : with_index)
            pieces[n_pieces++] = piece_of(writer, number, array, specs[i].bytes);
    }
    return n_pieces;
}

static enum sqz_status check_place(const struct sqz_context_writer *writer, uint32_t index,
                                   const struct sqz_layer *layer, const struct sqz_report *report)
{
    if (layer->space != SQZ_SPACE_HOST)
        return sqz_report_fail(report, "layer %" PRIu32 ": in memory space %d; allowed: %d, the host's", index,
                               (int)layer->space, SQZ_SPACE_HOST);
    if (index >= writer->n_layer)
        return sqz_report_fail(report, "layer %" PRIu32 "; allowed: 0 to %" PRIu32, index, writer->n_layer - 1);
    return SQZ_OK;
}

enum sqz_status sqz_context_writer_put_rows(struct sqz_context_writer *writer, uint32_t index,
                                            const struct sqz_layer *layer, struct sqz_error *error)
{
    if (!writer || !layer) return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "no writer or no layer");
    const struct sqz_report report = {writer->path, SQZ_ERROR_ARGUMENT, "", error};
    struct sqz_piece pieces[SQZ_FORMAT_LAYER_TENSORS];
    enum sqz_status status;
    if ((status = check_place(writer, index, layer, &report)) ||
        (status = check_declared(layer, &writer->shapes[index], index, &report)) ||
        (status = sqz_check_layer_types(layer, index, &writer->options, writer->version, &report)))
        return status;
    const size_t n = pieces_of(writer, index, layer, false, true, pieces);
    if ((status = write_pieces(writer, pieces, n, &report))) return status;
    writer->rows_written[index] = true;
    return sqz_error_clear(error);
}

enum sqz_status sqz_context_writer_put_layer(struct sqz_context_writer *writer, uint32_t index,
                                             const struct sqz_layer *layer, struct sqz_error *error)
{
    if (!writer || !layer) return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "no writer or no layer");
    const struct sqz_report report = {writer->path, SQZ_ERROR_ARGUMENT, "", error};
    struct sqz_piece pieces[SQZ_FORMAT_LAYER_TENSORS];
    enum sqz_status status = check_place(writer, index, layer, &report);
    if (status) return status;
    if (layer->n_levels && layer->rule != writer->options.rule)
        return sqz_report_fail(&report, "layer %" PRIu32 ": clustered for rule %d; allowed: %d, the context's", index,
                               (int)layer->rule, (int)writer->options.rule);
    if ((status = check_declared(layer, &writer->shapes[index], index, &report)) ||
        (status = sqz_check_layer_types(layer, index, &writer->options, writer->version, &report)) ||
        (status = sqz_check_layer_contents(layer, index, writer->tokens, &report)))
        return status;
    writer->written[index] = false;
    const size_t n = pieces_of(writer, index, layer, true, !writer->rows_written[index], pieces);
    if ((status = write_pieces(writer, pieces, n, &report))) return status;
    writer->written[index] = true;
    return sqz_error_clear(error);
}

/* ---- Commit --------------------------------------------------------------------------- */

static enum sqz_status write_metadata(struct sqz_context_writer *writer, const struct sqz_report *report)
{
    char *metadata = malloc((size_t)writer->data_offset);
    if (!metadata)
        return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for %" PRIu64 " bytes of metadata",
                             writer->data_offset);
    set_checksum_keys(writer, 0);
    gguf_get_meta_data(writer->gguf, metadata);
    const uint64_t checksum = XXH3_64bits(metadata, (size_t)writer->data_offset);
    set_checksum_keys(writer, checksum);
    if (writer->metadata_checksum) *writer->metadata_checksum = checksum;
    gguf_get_meta_data(writer->gguf, metadata);
    const struct sqz_piece piece = {metadata, writer->data_offset, 0, NULL};
    const enum sqz_status status = write_pieces(writer, &piece, 1, report);
    free(metadata);
    return status;
}

/* Gives a nameless file a temporary name: rename() alone can replace, linkat() cannot. */
static enum sqz_status name_file(struct sqz_context_writer *writer, const struct sqz_report *report)
{
    char link[64];
    if (writer->temporary[0]) return SQZ_OK;
    snprintf(link, sizeof link, "/proc/self/fd/%d", writer->file);
    for (int attempt = 0; attempt < 100; attempt++) {
        if (!take_name(writer)) break;
        if (!linkat(AT_FDCWD, link, writer->place.directory, writer->temporary, AT_SYMLINK_FOLLOW)) return SQZ_OK;
        const int reason = errno;
        give_up_name(writer);
        errno = reason;
        if (errno != EEXIST) break;
    }
    return sqz_report_as(report, SQZ_ERROR_IO, "the finished file cannot be named: %s", strerror(errno));
}

static enum sqz_status commit(struct sqz_context_writer *writer, const struct sqz_report *report)
{
    enum sqz_status status;
    for (uint32_t i = 0; i < writer->n_layer; i++)
        if (!writer->written[i]) return sqz_report_fail(report, "layer %" PRIu32 " was not written", i);
    if ((status = write_metadata(writer, report))) return status;
    if (fsync(writer->file))
        return sqz_report_as(report, SQZ_ERROR_IO, "writing to the disk failed: %s", strerror(errno));
    if ((status = name_file(writer, report))) return status;
    if ((status = sqz_output_place_fill(&writer->place, writer->temporary, writer->file, report))) return status;
    give_up_name(writer);
    /* Some file systems have no sync of a directory and say EINVAL: nothing better can be had from them. */
    if (fsync(writer->place.directory) && errno != EINVAL && errno != ENOTSUP)
        return sqz_report_as(report, SQZ_ERROR_IO, "the file is complete, but its directory could not be synced: %s",
                             strerror(errno));
    return SQZ_OK;
}

enum sqz_status sqz_context_writer_commit(struct sqz_context_writer *writer, uint64_t *file_bytes,
                                          struct sqz_error *error)
{
    if (!writer) return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "no writer");
    const struct sqz_report report = {writer->path, SQZ_ERROR_ARGUMENT, "", error};
    const enum sqz_status status = commit(writer, &report);
    if (!status && file_bytes) *file_bytes = writer->file_bytes;
    sqz_context_writer_abort(writer);
    return status ? status : sqz_error_clear(error);
}
