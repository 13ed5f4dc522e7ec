/*
 * Opening a context file: map it, walk its metadata, check every key, tensor
 * and checksum, point one struct sqz_layer a layer into the map, then copy what
 * steers and check it. What is copied (the metadata, too) is checked after it
 * was copied: the file may change at any moment.
 *
 * Order matters for the message a user sees: what the file is, whether its
 * metadata is whole, whether its end is there, and only then what it says.
 */
#define _GNU_SOURCE /* madvise */
#include "open_context.h"
#include "error.h"
#include "floor.h"
#include "memory_limit.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* One core checks this much in some 4 ms; on a busy machine waking the others and waiting for them takes longer. */
enum { PARALLEL_BYTES = 32 << 20 };

/* Metadata of thirty layers have some 50 KB. */
enum { FIRST_METADATA_BYTES = 256 << 10 };

/* ---- Tensors ------------------------------------------------------------------------ */

static enum sqz_status check_tensor(const struct sqz_tensor_entry *entry, const char *name, enum ggml_type type,
                                    const int64_t ne[3], const struct sqz_report *report)
{
    if (entry->type != (int32_t)type || entry->ne[0] != ne[0] || entry->ne[1] != ne[1] || entry->ne[2] != ne[2] ||
        entry->ne[3] != 1)
        return sqz_report_fail(report,
                               "tensor %s is %s %" PRId64 " x %" PRId64 " x %" PRId64 " x %" PRId64
                               "; allowed: %s %" PRId64 " x %" PRId64 " x %" PRId64,
                               name, ggml_type_name((enum ggml_type)entry->type), entry->ne[0], entry->ne[1],
                               entry->ne[2], entry->ne[3], ggml_type_name(type), ne[0], ne[1], ne[2]);
    return SQZ_OK;
}

static enum sqz_status bind_layer(struct sqz_context *context, uint32_t index, const struct sqz_walk *walk,
                                  const struct sqz_report *report)
{
    struct sqz_tensor_spec specs[SQZ_FORMAT_LAYER_TENSORS];
    struct sqz_layer *layer = &context->layers[index];
    const size_t n = sqz_layer_tensors(specs, layer, index);
    for (size_t i = 0; i < n; i++) {
        struct sqz_tensor_entry *entry = sqz_walk_find(walk, specs[i].name);
        if (!entry) {
            if (specs[i].need == SQZ_NEED_ALWAYS) return sqz_report_fail(report, "tensor %s is missing", specs[i].name);
            continue;
        }
        const enum sqz_status status = check_tensor(entry, specs[i].name, specs[i].type, specs[i].ne, report);
        if (status) return status;
        entry->known = true;
        entry->bulk = specs[i].bulk;
        if (specs[i].rows) context->kv_bytes += entry->bytes;
        else if (specs[i].slot != offsetof(struct sqz_layer, queries)) context->index_bytes += entry->bytes;
        sqz_slot_set(layer, specs[i].slot, context->file.map + entry->offset);
    }
    sqz_layer_set_mean(layer, sqz_layer_mean(layer));
    for (uint32_t l = 0; l < layer->n_levels; l++) {
        struct sqz_rows *rows = &layer->level[l].value_centroids;
        const bool whole = rows->data && (rows->type != SQZ_ROW_I44 || (rows->planes.lower && rows->planes.step));
        if (!whole) *rows = (struct sqz_rows){.type = SQZ_ROW_NONE};
    }
    sqz_layer_join_planes(layer);
    return SQZ_OK;
}

static enum sqz_status bind_tensors(struct sqz_context *context, const struct sqz_walk *walk,
                                    const struct sqz_report *report)
{
    const int64_t token_ne[3] = {(int64_t)context->meta.n_tokens, 1, 1};
    struct sqz_tensor_entry *tokens = sqz_walk_find(walk, "tokens");
    enum sqz_status status;
    if (!tokens) return sqz_report_fail(report, "tensor tokens is missing");
    if ((status = check_tensor(tokens, "tokens", GGML_TYPE_I32, token_ne, report))) return status;
    tokens->known = true;
    context->meta.tokens = (const int32_t *)(const void *)(context->file.map + tokens->offset);
    for (uint32_t i = 0; context->layers && i < context->meta.n_layer; i++)
        if ((status = bind_layer(context, i, walk, report))) return status;
    return SQZ_OK;
}

/* Tensors of later versions may be there; what nobody looks at may not be most of the file. */
static enum sqz_status check_unknown(const struct sqz_context *context, const struct sqz_walk *walk,
                                     const struct sqz_report *report)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < walk->n_tensors; i++)
        bytes += walk->tensors[i].known ? 0 : sqz_format_pad(walk->tensors[i].bytes);
    if (bytes > context->file.bytes / 2)
        return sqz_report_fail(report,
                               "%" PRIu64 " of its %zu bytes are tensors that no context has; allowed: at most "
                               "half",
                               bytes, context->file.bytes);
    return SQZ_OK;
}

/* ---- Checksums ------------------------------------------------------------------------- */

/* Over the whole metadata with the checksum's own eight bytes taken as zero. */
static enum sqz_status verify_metadata(struct sqz_context *context, const struct sqz_walk *walk,
                                       const uint8_t *metadata, const struct sqz_report *report)
{
    static const uint8_t zeros[8];
    uint64_t expected;
    XXH3_state_t state;
    if (!walk->checksum_at) return sqz_report_fail(report, "key " SQZ_KEY_CHECKSUM_METADATA " is missing or not a u64");
    if (walk->data_offset > context->file.bytes)
        return sqz_report_fail(report, "cut off: at least %" PRIu64 " bytes expected, %zu found", walk->data_offset,
                               context->file.bytes);
    const uint64_t after = walk->checksum_at + sizeof zeros;
    memcpy(&expected, metadata + walk->checksum_at, sizeof expected);
    XXH3_64bits_reset(&state);
    XXH3_64bits_update(&state, metadata, (size_t)walk->checksum_at);
    XXH3_64bits_update(&state, zeros, sizeof zeros);
    XXH3_64bits_update(&state, metadata + after, (size_t)(walk->data_offset - after));
    const uint64_t found = XXH3_64bits_digest(&state);
    context->metadata_checksum = found;
    if (found != expected)
        return sqz_report_fail(
            report, "its metadata is damaged: checksum %016" PRIx64 " expected, %016" PRIx64 " found", expected, found);
    return SQZ_OK;
}

/* Data and the zeros that follow it up to the next tensor. */
static bool tensor_is_whole(const struct sqz_context *context, const struct sqz_tensor_entry *entry, uint64_t checksum)
{
    const uint8_t *data = context->file.map + entry->offset;
    const uint64_t padded = sqz_format_pad(entry->bytes);
    for (uint64_t i = entry->bytes; i < padded; i++)
        if (data[i]) return false;
    return XXH3_64bits(data, (size_t)entry->bytes) == checksum;
}

static enum sqz_status verify_tensors(const struct sqz_context *context, const struct sqz_walk *walk,
                                      const uint64_t *checksums, bool all, const struct sqz_report *report)
{
    const struct sqz_tensor_entry *damaged = NULL;
    const int64_t n = (int64_t)walk->n_tensors;
    size_t n_damaged = 0;
    const bool share = context->file.bytes - (all ? 0 : context->kv_bytes) > PARALLEL_BYTES;
    (void)share; /* without OpenMP */
#pragma omp parallel for schedule(dynamic) if (share) reduction(+ : n_damaged)
    for (int64_t i = 0; i < n; i++) {
        const struct sqz_tensor_entry *entry = &walk->tensors[i];
        if (!entry->known || (entry->bulk && !all) || tensor_is_whole(context, entry, checksums[entry->id])) continue;
        n_damaged++;
#pragma omp critical(sqz_verify_tensors)
        if (!damaged || entry->id < damaged->id)
            damaged = entry; /* the first in the file, whichever thread came first */
    }
    if (damaged)
        return sqz_report_fail(report,
                               "tensor %.*s (%" PRIu64 " bytes at %" PRIu64 ") is damaged: its checksum does "
                               "not match; %zu of %zu tensors are",
                               (int)damaged->name_bytes, damaged->name, damaged->bytes, damaged->offset, n_damaged,
                               walk->n_tensors);
    return SQZ_OK;
}

static enum sqz_status check_contents(const struct sqz_context *context, const struct sqz_report *report)
{
    const struct sqz_context_meta *meta = &context->meta;
    const struct sqz_row_tokens tokens = sqz_row_tokens_of(meta);
    enum sqz_status status = sqz_check_tokens(meta->tokens, meta->n_tokens, report);
    if (status) return status;
    const int64_t n = context->layers ? meta->n_layer : 0;
    int64_t first = n; /* the lowest layer with a fault is the one reported */
    struct sqz_error fault = {SQZ_OK, ""};
#pragma omp parallel for schedule(dynamic) if (context->index_bytes > PARALLEL_BYTES)
    for (int64_t i = 0; i < n; i++) {
        struct sqz_error error;
        struct sqz_report local = *report;
        local.error = &error;
        if (!sqz_check_layer_contents(&context->layers[i], (uint32_t)i, tokens, &local)) continue;
#pragma omp critical(sqz_check_contents)
        if (i < first) {
            first = i;
            fault = error;
        }
    }
    if (first < n && report->error) *report->error = fault;
    return fault.status;
}

/* ---- Opening ------------------------------------------------------------------------------ */

/* AUTO reads all of a file only where it will then stay in memory: of a larger one, the pages read first would be gone
 * again before they are used. */
static bool verifies_all(const struct sqz_context *context, const struct sqz_context_options *options)
{
    if (options->verify != SQZ_VERIFY_AUTO) return options->verify == SQZ_VERIFY_ALL;
    return context->file.bytes < options->memory_bytes / 2;
}

/*
 * What will be read now is asked for at once, so that the disk works ahead of the checks: the whole file when all
 * of it is verified, else the index, which the writer puts in front of keys and values. Keys and values keep the
 * kernel's default while they fit into memory: retained clusters are runs of rows, neighbours in cluster order tend to
 * be retained together, and read-ahead around a fault fetches just that. Of a file that does not fit, read-ahead would
 * throw out what the next token needs: there only the pages of retained rows are read, which attention asks for first.
 * MADV_POPULATE_READ was no faster on a 200 MB file, cached or not: it waits, where WILLNEED lets the checks begin.
 * A hint only: its failure changes nothing.
 */
static void advise(struct sqz_context *context, const struct sqz_walk *walk, uint64_t memory_bytes, bool all)
{
    const bool fits = context->file.bytes <= memory_bytes / 4 * 3;
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t end = context->file.bytes;
    for (size_t i = 0; i < walk->n_tensors; i++)
        if (walk->tensors[i].bulk && walk->tensors[i].offset < end) end = walk->tensors[i].offset;
    uint8_t *map = (uint8_t *)(uintptr_t)context->file.map;
    madvise(map, all ? context->file.bytes : (size_t)end, MADV_WILLNEED);
    end = (end + page - 1) / page * page;
    if (fits || end >= context->file.bytes) return;
    madvise(map + end, context->file.bytes - (size_t)end, MADV_RANDOM);
    for (uint32_t i = 0; context->layers && i < context->meta.n_layer; i++)
        context->layers[i].will_read = sqz_file_will_read;
}

/* gguf.h's reader lets a C++ exception out when memory ends. It needs a small multiple of the metadata (an array is
 * held twice while it is read, a tensor takes about 400 bytes where the file has 60), so that much is tried first. */
static struct gguf_context *parse_gguf(const struct sqz_walk *walk, const uint8_t *metadata)
{
    void *volatile probe = malloc(16 * (size_t)walk->data_offset + (1 << 16)); /* volatile: or it is optimised away */
    if (!probe) return NULL;
    free(probe);
    return gguf_init_from_buffer(metadata, (size_t)walk->data_offset,
                                 (struct gguf_init_params){.no_alloc = true, .ctx = NULL});
}

static enum sqz_status read_gguf(struct sqz_context *context, const struct gguf_context *gguf,
                                 const struct sqz_walk *walk, const struct sqz_context_options *options,
                                 const struct sqz_report *report)
{
    const void *checksums = NULL;
    enum sqz_status status;
    if ((size_t)gguf_get_n_tensors(gguf) != walk->n_tensors || gguf_get_data_offset(gguf) != walk->data_offset)
        return sqz_report_as(report, SQZ_ERROR_INTERNAL, "ggml and squeeze read the metadata differently");
    if ((status =
             sqz_find_array(gguf, SQZ_KEY_CHECKSUM_TENSORS, GGUF_TYPE_UINT64, walk->n_tensors, &checksums, report)) ||
        (status = sqz_read_keys(context, gguf, report)) || (status = bind_tensors(context, walk, report)) ||
        (status = check_unknown(context, walk, report)) || (status = sqz_file_check_holes(&context->file, report)))
        return status;
    const bool all = verifies_all(context, options);
    advise(context, walk, options->memory_bytes, all);
    if ((status = verify_tensors(context, walk, checksums, all, report)) ||
        (status = sqz_copy_steering(context, report)))
        return status;
    return check_contents(context, report);
}

/* Reads and walks the metadata, whose length only the walk tells: a little first, for most are short. */
static enum sqz_status read_metadata(const struct sqz_context *context, struct sqz_walk *walk, uint8_t **metadata,
                                     const struct sqz_report *report)
{
    enum sqz_status status;
    for (size_t room = FIRST_METADATA_BYTES;; room *= 8) {
        if (room > SQZ_FORMAT_MAX_METADATA_BYTES) room = SQZ_FORMAT_MAX_METADATA_BYTES;
        const size_t bytes = room < context->file.bytes ? room : context->file.bytes;
        const bool last = bytes == context->file.bytes || bytes == SQZ_FORMAT_MAX_METADATA_BYTES;
        free(*metadata);
        free(walk->tensors);
        walk->tensors = NULL;
        *metadata = malloc(bytes);
        if (!*metadata) return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for its metadata");
        if ((status = sqz_file_read(&context->file, *metadata, bytes, 0, report))) return status;
        status = sqz_walk_metadata(walk, *metadata, last ? context->file.bytes : bytes, report);
        if (!status || last) return status;
    }
}

static enum sqz_status check_size(const struct sqz_context *context, const struct sqz_walk *walk,
                                  const struct sqz_report *report)
{
    const size_t bytes = context->file.bytes;
    if (walk->file_bytes > bytes)
        return sqz_report_fail(report, "cut off: %" PRIu64 " bytes expected, %zu found", walk->file_bytes, bytes);
    if (walk->file_bytes < bytes)
        return sqz_report_fail(report, "%zu bytes after its end: %" PRIu64 " bytes expected, %zu found",
                               bytes - (size_t)walk->file_bytes, walk->file_bytes, bytes);
    return SQZ_OK;
}

static enum sqz_status open_file(struct sqz_context *context, const char *path, struct sqz_walk *walk,
                                 uint8_t **metadata, const struct sqz_context_options *options,
                                 const struct sqz_report *report)
{
    enum sqz_status status;
    if ((status = sqz_file_open(&context->file, path, report)) ||
        (status = read_metadata(context, walk, metadata, report)) ||
        (status = verify_metadata(context, walk, *metadata, report)) || (status = check_size(context, walk, report)))
        return status;
    struct gguf_context *gguf = parse_gguf(walk, *metadata);
    if (!gguf)
        return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for its metadata (%" PRIu64 " bytes in the file)",
                             walk->data_offset);
    status = read_gguf(context, gguf, walk, options, report);
    gguf_free(gguf);
    /* Of a page that was lost zeros were read, whatever was wrong with them. */
    if (status == SQZ_OK || sqz_watch_is_lost(context->file.watched))
        status = sqz_file_check_unchanged(&context->file, report->error);
    return status;
}

void sqz_context_options_default(struct sqz_context_options *options)
{
    memset(options, 0, sizeof *options);
    options->size = sizeof *options;
    options->verify = SQZ_VERIFY_AUTO;
}

/* One file, whatever part of a context it is. */
static enum sqz_status open_one(struct sqz_context **out, const char *path, const struct sqz_context_options *options,
                                struct sqz_error *error)
{
    struct sqz_walk walk = {.tensors = NULL};
    const struct sqz_report report = {path, SQZ_ERROR_FORMAT, "prepare the document again", error};
    struct sqz_context *context = calloc(1, sizeof *context);
    uint8_t *metadata = NULL;
    *out = NULL;
    if (!context) return sqz_report_as(&report, SQZ_ERROR_MEMORY, "no memory for a context");
    const enum sqz_status status = open_file(context, path, &walk, &metadata, options, &report);
    free(walk.tensors);
    free(metadata);
    if (status) sqz_context_free(context);
    else *out = context;
    return status;
}

enum sqz_status sqz_context_open(struct sqz_context **out, const char *path, const struct sqz_context_options *options,
                                 struct sqz_error *error)
{
    struct sqz_context_options chosen;
    const struct sqz_report report = {path, SQZ_ERROR_FORMAT, "prepare the document again", error};
    if (!out || !path) return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "no path, or no place for the context");
    *out = NULL;
    sqz_context_options_default(&chosen);
    if (options && (options->size < sizeof *options || (uint32_t)options->verify > SQZ_VERIFY_INDEX))
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT,
                             "context options of size %zu with verify %d; allowed: %zu as "
                             "sqz_context_options_default() sets it, and 0 to %d",
                             options->size, (int)options->verify, sizeof *options, SQZ_VERIFY_INDEX);
    if (options) chosen = *options;
    if (!chosen.memory_bytes) chosen.memory_bytes = sqz_memory_limit();
    struct sqz_context *context;
    enum sqz_status status = open_one(&context, path, &chosen, error);
    if (status) return status;
    if (context->meta.shard.number)
        status =
            sqz_report_as(&report, SQZ_ERROR_UNSUPPORTED,
                          "this is shard %" PRIu32 " of %" PRIu32 " of a context; give the index that it belongs to",
                          context->meta.shard.number, context->meta.shard.count);
    else if (sqz_context_is_index(context)) status = sqz_open_shards(context, path, &chosen, open_one, &report);
    if (status) {
        sqz_context_free(context);
        return status;
    }
    context->budget_floor = sqz_budget_floor(context->layers, context->meta.n_layer);
    *out = context;
    return sqz_error_clear(error);
}

void sqz_context_free(struct sqz_context *context)
{
    if (!context) return;
    for (size_t i = 0; i < SQZ_CONTEXT_TEXTS; i++) free(context->text[i]);
    for (uint32_t i = 0; context->shards && i < context->meta.shard.count; i++) sqz_context_free(context->shards[i]);
    free(context->shards);
    free(context->shard_files);
    free(context->shard_names);
    free(context->shard_checksums);
    free(context->layers);
    free(context->copies);
    sqz_file_close(&context->file);
    free(context);
}

enum sqz_status sqz_context_check_unchanged(const struct sqz_context *context, struct sqz_error *error)
{
    sqz_error_clear(error);
    enum sqz_status status = sqz_file_check_unchanged(&context->file, error);
    for (uint32_t i = 0; context->shards && i < context->meta.shard.count && !status; i++)
        if (context->shards[i]) status = sqz_file_check_unchanged(&context->shards[i]->file, error);
    return status;
}

bool sqz_context_page_lost(const void *address)
{
    return sqz_watched_page_lost(address);
}

/* ---- What an open context tells -------------------------------------------------------------- */

const struct sqz_context_meta *sqz_context_get_meta(const struct sqz_context *context)
{
    return &context->meta;
}

const struct sqz_layer *sqz_context_layer(const struct sqz_context *context, uint32_t layer)
{
    return layer < context->meta.n_layer ? &context->layers[layer] : NULL;
}

void sqz_context_get_info(const struct sqz_context *context, struct sqz_context_info *info)
{
    const struct sqz_context_meta *meta = &context->meta;
    memset(info, 0, sizeof *info);
    info->model_name = meta->model_name;
    info->model_fingerprint = meta->model_fingerprint;
    info->source_name = meta->source_name;
    info->tokens = meta->tokens;
    info->n_tokens = meta->n_tokens;
    info->n_layer = meta->n_layer;
    info->n_head = context->layers[0].shape.n_head;
    info->n_head_kv = context->layers[0].shape.n_head_kv;
    info->head_dim = context->layers[0].shape.head_dim;
    for (uint32_t i = 0; i < meta->n_layer; i++) {
        info->n_window_layers += context->layers[i].sliding_window;
        info->rounded_keys |= context->layers[i].keys.type != SQZ_ROW_F16;
    }
    info->n_shards = sqz_context_n_shards(context);
    info->rope_scale = meta->rope_scale;
    info->long_rope_factors = meta->rope_factors == SQZ_ROPE_FACTORS_LONG;
    info->has_template = meta->has_template;
    info->squeeze = meta->squeeze;
    info->file_bytes = context->file.bytes;
    info->kv_bytes = context->kv_bytes;
    info->index_bytes = context->index_bytes;
    info->budget_floor = context->budget_floor;
    info->format_version = context->version;
}
