/*
 * Opening a context file: map it, walk its metadata, check every key, tensor,
 * checksum and steering number, then point one struct sqz_layer a layer into
 * the map. After that nothing of the file is copied or changed.
 *
 * Order matters for the message a user sees: what the file is, whether its
 * metadata is whole, whether its end is there, and only then what it says.
 */
#define _GNU_SOURCE /* madvise */
#include "format.h"
#include "error.h"
#include "memory_limit.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static_assert(sizeof(enum sqz_rule) == 4 && sizeof(enum sqz_metric) == 4 && sizeof(enum sqz_group) == 4 &&
              sizeof(enum sqz_index) == 4,
              "enums are read as u32");
static_assert(sizeof(bool) == 1, "bools are stored as one byte");

enum { N_TEXTS = 4 };

struct sqz_context {
    uint8_t *map;
    size_t map_bytes;
    struct sqz_context_meta meta;
    char *text[N_TEXTS];        /* what meta's strings point to */
    struct sqz_layer *layers;   /* [meta.n_layer] */
    uint64_t kv_bytes, index_bytes;
};

/* One core checks this much in some 4 ms; on a busy machine waking the others and waiting for them takes longer. */
enum { PARALLEL_BYTES = 32 << 20 };

/* ---- Keys ----------------------------------------------------------------------- */

/* gguf.h's typed getters abort on a wrong type, so no getter is called before this. */
static enum sqz_status find_key(const struct gguf_context *gguf, const char *key, enum gguf_type type, int64_t *id,
                                const struct sqz_report *report)
{
    *id = gguf_find_key(gguf, key);
    if (*id < 0)
        return sqz_report_fail(report, "key %s is missing", key);
    if (gguf_get_kv_type(gguf, *id) != type)
        return sqz_report_fail(report, "key %s has type %s; allowed: %s", key,
                               gguf_type_name(gguf_get_kv_type(gguf, *id)), gguf_type_name(type));
    return SQZ_OK;
}

static enum sqz_status find_array(const struct gguf_context *gguf, const char *key, enum gguf_type type, size_t n,
                                  const void **values, const struct sqz_report *report)
{
    int64_t id = -1;
    const enum sqz_status status = find_key(gguf, key, GGUF_TYPE_ARRAY, &id, report);
    if (status)
        return status;
    if (gguf_get_arr_type(gguf, id) != type || gguf_get_arr_n(gguf, id) != n)
        return sqz_report_fail(report, "key %s is an array of %zu %s; allowed: %zu %s", key, gguf_get_arr_n(gguf, id),
                               gguf_type_name(gguf_get_arr_type(gguf, id)), n, gguf_type_name(type));
    *values = gguf_get_arr_data(gguf, id);
    return SQZ_OK;
}

static size_t value_bytes(enum gguf_type type)
{
    return type == GGUF_TYPE_BOOL ? 1 : type == GGUF_TYPE_UINT64 ? 8 : 4;
}

/* One value of the file into one field of the same size; a bool is 0 or 1 whatever the byte was. */
static void store_value(void *field, const void *value, enum gguf_type type)
{
    if (type == GGUF_TYPE_BOOL)
        *(bool *)field = *(const int8_t *)value != 0;
    else
        memcpy(field, value, value_bytes(type));
}

struct key_field {
    const char *key;
    enum gguf_type type;
    size_t at; /* byte offset of the field */
};

#define META(field) offsetof(struct sqz_context_meta, field)
static const struct key_field meta_fields[] = {
    {"squeeze.has_template", GGUF_TYPE_BOOL, META(has_template)},
    {"squeeze.rope_scale", GGUF_TYPE_FLOAT32, META(rope_scale)},
    {"squeeze.layer_count", GGUF_TYPE_UINT32, META(n_layer)},
    {"squeeze.option.rule", GGUF_TYPE_UINT32, META(squeeze.rule)},
    {"squeeze.option.level_count", GGUF_TYPE_UINT32, META(squeeze.n_levels)},
    {"squeeze.option.metric", GGUF_TYPE_UINT32, META(squeeze.metric)},
    {"squeeze.option.group", GGUF_TYPE_UINT32, META(squeeze.group)},
    {"squeeze.option.index", GGUF_TYPE_UINT32, META(squeeze.index)},
    {"squeeze.option.keys", GGUF_TYPE_UINT32, META(squeeze.keys)},
    {"squeeze.option.sinks", GGUF_TYPE_UINT32, META(squeeze.n_sinks)},
    {"squeeze.option.window", GGUF_TYPE_UINT32, META(squeeze.n_window)},
    {"squeeze.option.code_words", GGUF_TYPE_UINT32, META(squeeze.code_words)},
    {"squeeze.option.iterations", GGUF_TYPE_UINT32, META(squeeze.n_iterations)},
    {"squeeze.option.center", GGUF_TYPE_BOOL, META(squeeze.center)},
    {"squeeze.option.variance", GGUF_TYPE_BOOL, META(squeeze.variance)},
    {"squeeze.option.per_head", GGUF_TYPE_BOOL, META(squeeze.per_head)},
    {"squeeze.option.tail", GGUF_TYPE_BOOL, META(squeeze.tail)},
    {"squeeze.option.value_skip", GGUF_TYPE_BOOL, META(squeeze.value_skip)},
    {"squeeze.option.calibration", GGUF_TYPE_UINT32, META(squeeze.n_calibration)},
    {"squeeze.option.seed", GGUF_TYPE_UINT64, META(squeeze.seed)},
};

static const struct { const char *key; size_t at, max_bytes; } text_fields[N_TEXTS] = {
    {"squeeze.model.name", META(model_name), SQZ_FORMAT_MAX_NAME_BYTES},
    {"squeeze.model.architecture", META(model_architecture), SQZ_FORMAT_MAX_NAME_BYTES},
    {"squeeze.model.fingerprint", META(model_fingerprint), 64},
    {"squeeze.source.name", META(source_name), SQZ_FORMAT_MAX_NAME_BYTES},
};

#define LAYER(field) offsetof(struct sqz_layer, field)
static const struct key_field layer_fields[] = {
    {"squeeze.layer.head_count", GGUF_TYPE_UINT32, LAYER(shape.n_head)},
    {"squeeze.layer.head_count_kv", GGUF_TYPE_UINT32, LAYER(shape.n_head_kv)},
    {"squeeze.layer.head_dim", GGUF_TYPE_UINT32, LAYER(shape.head_dim)},
    {"squeeze.layer.scale", GGUF_TYPE_FLOAT32, LAYER(shape.scale)},
    {"squeeze.layer.row_count", GGUF_TYPE_UINT32, LAYER(n_rows)},
    {"squeeze.layer.fixed_count", GGUF_TYPE_UINT32, LAYER(n_fixed)},
    {"squeeze.layer.sliding_window", GGUF_TYPE_BOOL, LAYER(sliding_window)},
    {"squeeze.layer.window_tokens", GGUF_TYPE_UINT32, LAYER(n_window_tokens)},
    {"squeeze.layer.level_count", GGUF_TYPE_UINT32, LAYER(n_levels)},
    {"squeeze.layer.tail", GGUF_TYPE_BOOL, LAYER(tail)},
    {"squeeze.layer.value_skip", GGUF_TYPE_BOOL, LAYER(value_skip)},
    {"squeeze.layer.group", GGUF_TYPE_UINT32, LAYER(group)},
    {"squeeze.layer.curve_count", GGUF_TYPE_UINT32, LAYER(n_curve)},
    {"squeeze.layer.code_words", GGUF_TYPE_UINT32, LAYER(codes.n_words)},
    {"squeeze.layer.code_directions", GGUF_TYPE_UINT32, LAYER(codes.n_directions)},
    {"squeeze.layer.query_count", GGUF_TYPE_UINT32, LAYER(n_queries)},
};

static enum sqz_status read_texts(struct sqz_context *context, const struct gguf_context *gguf,
                                  const struct sqz_report *report)
{
    int64_t id = -1;
    for (size_t i = 0; i < N_TEXTS; i++) {
        const enum sqz_status status = find_key(gguf, text_fields[i].key, GGUF_TYPE_STRING, &id, report);
        if (status)
            return status;
        const char *text = gguf_get_val_str(gguf, id);
        if (strlen(text) > text_fields[i].max_bytes)
            return sqz_report_fail(report, "key %s has %zu bytes; allowed: at most %zu", text_fields[i].key,
                                   strlen(text), text_fields[i].max_bytes);
        context->text[i] = strdup(text);
        if (!context->text[i])
            return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for a name");
        const char *copy = context->text[i];
        memcpy((char *)&context->meta + text_fields[i].at, &copy, sizeof copy);
    }
    return SQZ_OK;
}

static enum sqz_status read_meta(struct sqz_context *context, const struct gguf_context *gguf,
                                 const struct sqz_report *report)
{
    struct sqz_context_meta *meta = &context->meta;
    enum sqz_status status = read_texts(context, gguf, report);
    int64_t id = -1;
    for (size_t i = 0; i < sizeof meta_fields / sizeof *meta_fields && !status; i++)
        if (!(status = find_key(gguf, meta_fields[i].key, meta_fields[i].type, &id, report)))
            store_value((char *)meta + meta_fields[i].at, gguf_get_val_data(gguf, id), meta_fields[i].type);
    if (status)
        return status;

    const void *shares = NULL;
    if ((status = find_array(gguf, "squeeze.option.centroid_share", GGUF_TYPE_FLOAT32, SQZ_MAX_LEVELS, &shares,
                             report)))
        return status;
    memcpy(meta->squeeze.centroid_share, shares, sizeof meta->squeeze.centroid_share);
    meta->squeeze.size = sizeof meta->squeeze;
    if ((status = find_key(gguf, "squeeze.token_count", GGUF_TYPE_UINT32, &id, report)))
        return status;
    meta->n_tokens = gguf_get_val_u32(gguf, id);
    if ((status = find_key(gguf, "squeeze.checksum.kind", GGUF_TYPE_STRING, &id, report)))
        return status;
    if (strcmp(gguf_get_val_str(gguf, id), SQZ_FORMAT_CHECKSUM_KIND))
        return sqz_report_fail(report, "unknown kind of checksum; allowed: " SQZ_FORMAT_CHECKSUM_KIND);
    return sqz_check_meta(meta, report);
}

static enum sqz_status read_layers(struct sqz_context *context, const struct gguf_context *gguf,
                                   const struct sqz_report *report)
{
    const uint32_t n_layer = context->meta.n_layer; /* at most SQZ_FORMAT_MAX_LAYERS */
    const void *values = NULL;
    enum sqz_status status;
    context->layers = calloc(n_layer, sizeof *context->layers);
    if (!context->layers)
        return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for %" PRIu32 " layers", n_layer);
    for (size_t i = 0; i < sizeof layer_fields / sizeof *layer_fields; i++) {
        const struct key_field *field = &layer_fields[i];
        if ((status = find_array(gguf, field->key, field->type, n_layer, &values, report)))
            return status;
        for (uint32_t layer = 0; layer < n_layer; layer++)
            store_value((char *)&context->layers[layer] + field->at,
                        (const char *)values + layer * value_bytes(field->type), field->type);
    }
    if ((status = find_array(gguf, "squeeze.layer.cluster_count", GGUF_TYPE_UINT32, (size_t)n_layer * SQZ_MAX_LEVELS,
                             &values, report)))
        return status;
    for (uint32_t layer = 0; layer < n_layer; layer++)
        for (uint32_t level = 0; level < SQZ_MAX_LEVELS; level++)
            memcpy(&context->layers[layer].level[level].n_clusters,
                   (const char *)values + ((size_t)layer * SQZ_MAX_LEVELS + level) * 4, 4);
    for (uint32_t layer = 0; layer < n_layer; layer++) {
        context->layers[layer].rule = context->meta.squeeze.rule;
        context->layers[layer].index = context->meta.squeeze.index;
        context->layers[layer].key_format = context->meta.squeeze.keys;
        if ((status = sqz_check_layer_counts(&context->layers[layer], layer, context->meta.n_tokens, report)))
            return status;
    }
    return SQZ_OK;
}

/* ---- Tensors ------------------------------------------------------------------------ */

static enum sqz_status check_tensor(const struct sqz_tensor_entry *entry, const char *name, enum ggml_type type,
                                    const int64_t ne[3], const struct sqz_report *report)
{
    if (entry->type != (int32_t)type || entry->ne[0] != ne[0] || entry->ne[1] != ne[1] || entry->ne[2] != ne[2] ||
        entry->ne[3] != 1)
        return sqz_report_fail(report, "tensor %s is %s %" PRId64 " x %" PRId64 " x %" PRId64 " x %" PRId64
                               "; allowed: %s %" PRId64 " x %" PRId64 " x %" PRId64, name,
                               ggml_type_name((enum ggml_type)entry->type), entry->ne[0], entry->ne[1], entry->ne[2],
                               entry->ne[3], ggml_type_name(type), ne[0], ne[1], ne[2]);
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
            if (specs[i].need == SQZ_NEED_ALWAYS)
                return sqz_report_fail(report, "tensor %s is missing", specs[i].name);
            continue;
        }
        const enum sqz_status status = check_tensor(entry, specs[i].name, specs[i].type, specs[i].ne, report);
        if (status)
            return status;
        entry->bulk = specs[i].bulk;
        if (specs[i].slot == offsetof(struct sqz_layer, keys) || specs[i].slot == offsetof(struct sqz_layer, values))
            context->kv_bytes += entry->bytes;
        else if (specs[i].slot != offsetof(struct sqz_layer, queries))
            context->index_bytes += entry->bytes;
        sqz_slot_set(layer, specs[i].slot, context->map + entry->offset);
    }
    return SQZ_OK;
}

static enum sqz_status bind_tensors(struct sqz_context *context, const struct sqz_walk *walk,
                                    const struct sqz_report *report)
{
    const int64_t token_ne[3] = {(int64_t)context->meta.n_tokens, 1, 1};
    const struct sqz_tensor_entry *tokens = sqz_walk_find(walk, "tokens");
    enum sqz_status status;
    if (!tokens)
        return sqz_report_fail(report, "tensor tokens is missing");
    if ((status = check_tensor(tokens, "tokens", GGML_TYPE_I32, token_ne, report)))
        return status;
    context->meta.tokens = (const int32_t *)(const void *)(context->map + tokens->offset);
    for (uint32_t i = 0; i < context->meta.n_layer; i++)
        if ((status = bind_layer(context, i, walk, report)))
            return status;
    return SQZ_OK;
}

/* ---- Checksums ------------------------------------------------------------------------- */

/* Over the whole metadata with the checksum's own eight bytes taken as zero. */
static enum sqz_status verify_metadata(const struct sqz_context *context, const struct sqz_walk *walk,
                                       const struct sqz_report *report)
{
    static const uint8_t zeros[8];
    uint64_t expected;
    XXH3_state_t state;
    if (!walk->checksum_at)
        return sqz_report_fail(report, "key " SQZ_KEY_CHECKSUM_METADATA " is missing or not a u64");
    if (walk->data_offset > context->map_bytes)
        return sqz_report_fail(report, "cut off: at least %" PRIu64 " bytes expected, %zu found", walk->data_offset,
                               context->map_bytes);
    const uint64_t after = walk->checksum_at + sizeof zeros;
    memcpy(&expected, context->map + walk->checksum_at, sizeof expected);
    XXH3_64bits_reset(&state);
    XXH3_64bits_update(&state, context->map, (size_t)walk->checksum_at);
    XXH3_64bits_update(&state, zeros, sizeof zeros);
    XXH3_64bits_update(&state, context->map + after, (size_t)(walk->data_offset - after));
    const uint64_t found = XXH3_64bits_digest(&state);
    if (found != expected)
        return sqz_report_fail(report, "its metadata is damaged: checksum %016" PRIx64 " expected, %016" PRIx64
                               " found", expected, found);
    return SQZ_OK;
}

/* Data and the zeros that follow it up to the next tensor. */
static bool tensor_is_whole(const struct sqz_context *context, const struct sqz_tensor_entry *entry, uint64_t checksum)
{
    const uint8_t *data = context->map + entry->offset;
    const uint64_t padded = sqz_format_pad(entry->bytes);
    for (uint64_t i = entry->bytes; i < padded; i++)
        if (data[i])
            return false;
    return XXH3_64bits(data, (size_t)entry->bytes) == checksum;
}

static enum sqz_status verify_tensors(const struct sqz_context *context, const struct sqz_walk *walk,
                                      const uint64_t *checksums, bool all, const struct sqz_report *report)
{
    const struct sqz_tensor_entry *damaged = NULL;
    const int64_t n = (int64_t)walk->n_tensors;
    size_t n_damaged = 0;
    const bool share = context->map_bytes - (all ? 0 : context->kv_bytes) > PARALLEL_BYTES;
    (void)share; /* without OpenMP */
    #pragma omp parallel for schedule(dynamic) if (share) reduction(+ : n_damaged)
    for (int64_t i = 0; i < n; i++) {
        const struct sqz_tensor_entry *entry = &walk->tensors[i];
        if ((entry->bulk && !all) || tensor_is_whole(context, entry, checksums[entry->id]))
            continue;
        n_damaged++;
        #pragma omp critical(sqz_verify_tensors)
        if (!damaged || entry->id < damaged->id)
            damaged = entry; /* the first in the file, whichever thread came first */
    }
    if (damaged)
        return sqz_report_fail(report, "tensor %.*s (%" PRIu64 " bytes at %" PRIu64 ") is damaged: its checksum does "
                               "not match; %zu of %zu tensors are", (int)damaged->name_bytes, damaged->name,
                               damaged->bytes, damaged->offset, n_damaged, walk->n_tensors);
    return SQZ_OK;
}

static enum sqz_status check_contents(const struct sqz_context *context, const struct sqz_report *report)
{
    const struct sqz_context_meta *meta = &context->meta;
    enum sqz_status status = sqz_check_tokens(meta->tokens, meta->n_tokens, report);
    if (status)
        return status;
    const int64_t n = meta->n_layer;
    int64_t first = n; /* the lowest layer with a fault is the one reported */
    struct sqz_error fault = {SQZ_OK, ""};
    #pragma omp parallel for schedule(dynamic) if (context->index_bytes > PARALLEL_BYTES)
    for (int64_t i = 0; i < n; i++) {
        struct sqz_error error;
        struct sqz_report local = *report;
        local.error = &error;
        if (!sqz_check_layer_contents(&context->layers[i], (uint32_t)i, meta->n_tokens, &local))
            continue;
        #pragma omp critical(sqz_check_contents)
        if (i < first) {
            first = i;
            fault = error;
        }
    }
    if (first < n && report->error)
        *report->error = fault;
    return fault.status;
}

/* ---- Opening ------------------------------------------------------------------------------ */

static enum sqz_status map_file(struct sqz_context *context, const char *path, const struct sqz_report *report)
{
    struct stat file;
    /* Without O_NONBLOCK a pipe of that name would wait for a writer for ever. */
    const int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (descriptor < 0)
        return sqz_report_as(report, SQZ_ERROR_IO, "cannot be opened: %s", strerror(errno));
    enum sqz_status status = SQZ_OK;
    if (fstat(descriptor, &file))
        status = sqz_report_as(report, SQZ_ERROR_IO, "cannot be looked at: %s", strerror(errno));
    else if (!S_ISREG(file.st_mode))
        status = sqz_report_as(report, SQZ_ERROR_IO, "is %s; allowed: a regular file",
                               S_ISDIR(file.st_mode) ? "a directory" : "a device, pipe or socket");
    else if (file.st_size == 0)
        status = sqz_report_fail(report, "is empty; a context file begins with 'GGUF'");
    else {
        context->map_bytes = (size_t)file.st_size;
        void *map = mmap(NULL, context->map_bytes, PROT_READ, MAP_SHARED, descriptor, 0);
        if (map == MAP_FAILED)
            status = sqz_report_as(report, errno == ENOMEM ? SQZ_ERROR_MEMORY : SQZ_ERROR_IO, "cannot be mapped: %s",
                                   strerror(errno));
        else
            context->map = map;
    }
    close(descriptor);
    return status;
}

/* AUTO reads all of a file only where it will then stay in memory: of a larger one, the pages read first would be gone
 * again before they are used. */
static bool verifies_all(const struct sqz_context *context, const struct sqz_context_options *options)
{
    if (options->verify != SQZ_VERIFY_AUTO)
        return options->verify == SQZ_VERIFY_ALL;
    return context->map_bytes < options->memory_bytes / 2;
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
    const bool fits = context->map_bytes <= memory_bytes / 4 * 3;
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t end = context->map_bytes;
    for (size_t i = 0; i < walk->n_tensors; i++)
        if (walk->tensors[i].bulk && walk->tensors[i].offset < end)
            end = walk->tensors[i].offset;
    madvise(context->map, all ? context->map_bytes : (size_t)end, MADV_WILLNEED);
    end = (end + page - 1) / page * page;
    if (fits || end >= context->map_bytes)
        return;
    madvise(context->map + end, context->map_bytes - (size_t)end, MADV_RANDOM);
    for (uint32_t i = 0; i < context->meta.n_layer; i++)
        context->layers[i].out_of_core = true;
}

/* gguf.h's reader lets a C++ exception out when memory ends. It needs a small multiple of the metadata (an array is
 * held twice while it is read, a tensor takes about 400 bytes where the file has 60), so that much is tried first. */
static struct gguf_context *parse_gguf(const struct sqz_context *context, const struct sqz_walk *walk)
{
    void *volatile probe = malloc(16 * (size_t)walk->data_offset + (1 << 16)); /* volatile: or it is optimised away */
    if (!probe)
        return NULL;
    free(probe);
    return gguf_init_from_buffer(context->map, context->map_bytes,
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
    if ((status = find_array(gguf, SQZ_KEY_CHECKSUM_TENSORS, GGUF_TYPE_UINT64, walk->n_tensors, &checksums, report)) ||
        (status = read_meta(context, gguf, report)) || (status = read_layers(context, gguf, report)) ||
        (status = bind_tensors(context, walk, report)))
        return status;
    const bool all = verifies_all(context, options);
    advise(context, walk, options->memory_bytes, all);
    if ((status = verify_tensors(context, walk, checksums, all, report)))
        return status;
    return check_contents(context, report);
}

static enum sqz_status open_file(struct sqz_context *context, const char *path, struct sqz_walk *walk,
                                 const struct sqz_context_options *options, const struct sqz_report *report)
{
    enum sqz_status status;
    if ((status = map_file(context, path, report)) ||
        (status = sqz_walk_metadata(walk, context->map, context->map_bytes, report)) ||
        (status = verify_metadata(context, walk, report)))
        return status;
    if (walk->file_bytes > context->map_bytes)
        return sqz_report_fail(report, "cut off: %" PRIu64 " bytes expected, %zu found", walk->file_bytes,
                               context->map_bytes);
    if (walk->file_bytes < context->map_bytes)
        return sqz_report_fail(report, "%zu bytes after its end: %" PRIu64 " bytes expected, %zu found",
                               context->map_bytes - (size_t)walk->file_bytes, walk->file_bytes, context->map_bytes);
    struct gguf_context *gguf = parse_gguf(context, walk);
    if (!gguf)
        return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for its metadata (%" PRIu64 " bytes in the file)",
                             walk->data_offset);
    status = read_gguf(context, gguf, walk, options, report);
    gguf_free(gguf);
    return status;
}

void sqz_context_options_default(struct sqz_context_options *options)
{
    memset(options, 0, sizeof *options);
    options->size = sizeof *options;
    options->verify = SQZ_VERIFY_AUTO;
}

enum sqz_status sqz_context_open(struct sqz_context **out, const char *path,
                                 const struct sqz_context_options *options, struct sqz_error *error)
{
    struct sqz_walk walk = {.tensors = NULL};
    struct sqz_context_options chosen;
    const struct sqz_report report = {path, SQZ_ERROR_FORMAT, "prepare the document again", error};
    if (!out || !path)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "no path, or no place for the context");
    *out = NULL;
    sqz_context_options_default(&chosen);
    if (options && (options->size < sizeof *options || (uint32_t)options->verify > SQZ_VERIFY_INDEX))
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "context options of size %zu with verify %d; allowed: %zu as "
                             "sqz_context_options_default() sets it, and 0 to %d", options->size, (int)options->verify,
                             sizeof *options, SQZ_VERIFY_INDEX);
    if (options)
        chosen = *options;
    if (!chosen.memory_bytes)
        chosen.memory_bytes = sqz_memory_limit();
    struct sqz_context *context = calloc(1, sizeof *context);
    if (!context)
        return sqz_report_as(&report, SQZ_ERROR_MEMORY, "no memory for a context");
    const enum sqz_status status = open_file(context, path, &walk, &chosen, &report);
    free(walk.tensors);
    if (status) {
        sqz_context_free(context);
        return status;
    }
    *out = context;
    return sqz_error_clear(error);
}

void sqz_context_free(struct sqz_context *context)
{
    if (!context)
        return;
    for (size_t i = 0; i < N_TEXTS; i++)
        free(context->text[i]);
    free(context->layers);
    if (context->map)
        munmap(context->map, context->map_bytes);
    free(context);
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
    for (uint32_t i = 0; i < meta->n_layer; i++)
        info->n_window_layers += context->layers[i].sliding_window;
    info->rope_scale = meta->rope_scale;
    info->has_template = meta->has_template;
    info->squeeze = meta->squeeze;
    info->file_bytes = context->map_bytes;
    info->kv_bytes = context->kv_bytes;
    info->index_bytes = context->index_bytes;
}
