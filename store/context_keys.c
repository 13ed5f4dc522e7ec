/*
 * The keys of a context file: from ggml's reader into the meta and the counts
 * of the layers, one table for each. Types are looked at first, values are
 * checked here.
 */
#define _POSIX_C_SOURCE 200809L /* strdup */
#include "open_context.h"
#include "shards.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static_assert(sizeof(enum sqz_rule) == 4 && sizeof(enum sqz_metric) == 4 && sizeof(enum sqz_group) == 4 &&
                  sizeof(enum sqz_index) == 4 && sizeof(enum sqz_row_format) == 4,
              "enums are read as u32");
static_assert(sizeof(bool) == 1, "bools are stored as one byte");

enum sqz_status sqz_find_key(const struct gguf_context *gguf, const char *key, enum gguf_type type, int64_t *id,
                             const struct sqz_report *report)
{
    *id = gguf_find_key(gguf, key);
    if (*id < 0) return sqz_report_fail(report, "key %s is missing", key);
    if (gguf_get_kv_type(gguf, *id) != type)
        return sqz_report_fail(report, "key %s has type %s; allowed: %s", key,
                               gguf_type_name(gguf_get_kv_type(gguf, *id)), gguf_type_name(type));
    return SQZ_OK;
}

enum sqz_status sqz_find_array(const struct gguf_context *gguf, const char *key, enum gguf_type type, size_t n,
                               const void **values, const struct sqz_report *report)
{
    int64_t id = -1;
    const enum sqz_status status = sqz_find_key(gguf, key, GGUF_TYPE_ARRAY, &id, report);
    if (status) return status;
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
    if (type == GGUF_TYPE_BOOL) *(bool *)field = *(const int8_t *)value != 0;
    else memcpy(field, value, value_bytes(type));
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

static const struct {
    const char *key;
    size_t at, max_bytes;
} text_fields[SQZ_CONTEXT_TEXTS] = {
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
    for (size_t i = 0; i < SQZ_CONTEXT_TEXTS; i++) {
        const enum sqz_status status = sqz_find_key(gguf, text_fields[i].key, GGUF_TYPE_STRING, &id, report);
        if (status) return status;
        const char *text = gguf_get_val_str(gguf, id);
        if (strlen(text) > text_fields[i].max_bytes)
            return sqz_report_fail(report, "key %s has %zu bytes; allowed: at most %zu", text_fields[i].key,
                                   strlen(text), text_fields[i].max_bytes);
        context->text[i] = strdup(text);
        if (!context->text[i]) return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for a name");
        const char *copy = context->text[i];
        memcpy((char *)&context->meta + text_fields[i].at, &copy, sizeof copy);
    }
    return SQZ_OK;
}

/* The optional key; the meta says UNSAID without it. */
static enum sqz_status read_rope_factors(struct sqz_context_meta *meta, const struct gguf_context *gguf,
                                         const struct sqz_report *report)
{
    int64_t id = gguf_find_key(gguf, SQZ_KEY_ROPE_FACTORS);
    if (id < 0) return SQZ_OK;
    const enum sqz_status status = sqz_find_key(gguf, SQZ_KEY_ROPE_FACTORS, GGUF_TYPE_UINT32, &id, report);
    if (status) return status;
    meta->rope_factors = gguf_get_val_u32(gguf, id);
    if (meta->rope_factors == SQZ_ROPE_FACTORS_UNSAID)
        return sqz_report_fail(report, "rope_factors is 0; allowed: 1 to %d", SQZ_ROPE_FACTORS_LONG);
    return SQZ_OK;
}

/* Of files of versions that have it; older ones have F16 rows. */
static enum sqz_status read_option_rows(struct sqz_context *context, const struct gguf_context *gguf,
                                        const struct sqz_report *report)
{
    int64_t id = -1;
    if (context->version < SQZ_FORMAT_PLANES) return SQZ_OK;
    const enum sqz_status status = sqz_find_key(gguf, SQZ_KEY_OPTION_ROWS, GGUF_TYPE_UINT32, &id, report);
    if (!status) context->meta.squeeze.rows = (enum sqz_row_format)gguf_get_val_u32(gguf, id);
    return status;
}

static enum sqz_status read_u32(const struct gguf_context *gguf, const char *key, uint32_t *value,
                                const struct sqz_report *report)
{
    int64_t id = -1;
    const enum sqz_status status = sqz_find_key(gguf, key, GGUF_TYPE_UINT32, &id, report);
    if (!status) *value = gguf_get_val_u32(gguf, id);
    return status;
}

/* Names and checksums of the shards. */
static enum sqz_status read_files(struct sqz_context *context, const struct gguf_context *gguf,
                                  const struct sqz_report *report)
{
    const uint32_t n = context->meta.shard.count; /* at most SQZ_MOST_SHARDS */
    const void *checksums = NULL;
    int64_t id = -1;
    size_t bytes = 0;
    enum sqz_status status;
    if ((status = sqz_find_array(gguf, SQZ_KEY_SHARD_CHECKSUMS, GGUF_TYPE_UINT64, n, &checksums, report)) ||
        (status = sqz_find_key(gguf, SQZ_KEY_SHARD_FILES, GGUF_TYPE_ARRAY, &id, report)))
        return status;
    if (gguf_get_arr_type(gguf, id) != GGUF_TYPE_STRING || gguf_get_arr_n(gguf, id) != n)
        return sqz_report_fail(report, "key " SQZ_KEY_SHARD_FILES " is no array of %" PRIu32 " names", n);
    for (uint32_t i = 0; i < n; i++) bytes += strlen(gguf_get_arr_str(gguf, id, i)) + 1;
    context->shard_names = malloc(bytes);
    context->shard_files = malloc(n * sizeof *context->shard_files);
    context->shard_checksums = malloc(n * sizeof *context->shard_checksums);
    if (!context->shard_names || !context->shard_files || !context->shard_checksums)
        return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for the names of %" PRIu32 " shards", n);
    memcpy(context->shard_checksums, checksums, n * sizeof *context->shard_checksums);
    char *at = context->shard_names;
    for (uint32_t i = 0; i < n; i++) {
        const char *name = gguf_get_arr_str(gguf, id, i);
        context->shard_files[i] = memcpy(at, name, strlen(name) + 1);
        at += strlen(name) + 1;
    }
    context->meta.shard.files = context->shard_files;
    context->meta.shard.checksums = context->shard_checksums;
    return SQZ_OK;
}

static enum sqz_status read_shard_keys(struct sqz_context *context, const struct gguf_context *gguf,
                                       const struct sqz_report *report)
{
    struct sqz_shard_place *shard = &context->meta.shard;
    enum sqz_status status;
    if ((status = read_u32(gguf, SQZ_KEY_SHARD_COUNT, &shard->count, report)) ||
        (status = read_u32(gguf, SQZ_KEY_SHARD_NUMBER, &shard->number, report)) ||
        (status = read_u32(gguf, SQZ_KEY_SHARD_BLOCK, &shard->block_tokens, report)) ||
        (context->version >= SQZ_FORMAT_WINDOWS &&
         (status = read_u32(gguf, SQZ_KEY_SHARD_TOKENS, &shard->n_tokens, report))))
        return status;
    if (context->version >= SQZ_FORMAT_WINDOWS && shard->n_tokens == 0)
        return sqz_report_fail(report, "a context of 0 tokens in shards; allowed: 1 or more");
    if (shard->count < 2 || shard->count > SQZ_MOST_SHARDS)
        return sqz_report_fail(report, "%" PRIu32 " shards; allowed: 2 to %d", shard->count, SQZ_MOST_SHARDS);
    return shard->number ? SQZ_OK : read_files(context, gguf, report);
}

static enum sqz_status read_meta(struct sqz_context *context, const struct gguf_context *gguf,
                                 const struct sqz_report *report)
{
    struct sqz_context_meta *meta = &context->meta;
    enum sqz_status status = read_texts(context, gguf, report);
    int64_t id = -1;
    for (size_t i = 0; i < sizeof meta_fields / sizeof *meta_fields && !status; i++)
        if (!(status = sqz_find_key(gguf, meta_fields[i].key, meta_fields[i].type, &id, report)))
            store_value((char *)meta + meta_fields[i].at, gguf_get_val_data(gguf, id), meta_fields[i].type);
    if (!status) status = read_rope_factors(meta, gguf, report);
    if (status) return status;

    if ((status = sqz_find_key(gguf, SQZ_KEY_VERSION, GGUF_TYPE_UINT32, &id, report))) return status;
    context->version = gguf_get_val_u32(gguf, id); /* the walk over the metadata knows it */
    if ((status = read_option_rows(context, gguf, report))) return status;
    const void *shares = NULL;
    if ((status =
             sqz_find_array(gguf, "squeeze.option.centroid_share", GGUF_TYPE_FLOAT32, SQZ_MAX_LEVELS, &shares, report)))
        return status;
    memcpy(meta->squeeze.centroid_share, shares, sizeof meta->squeeze.centroid_share);
    meta->squeeze.size = sizeof meta->squeeze;
    if ((status = sqz_find_key(gguf, "squeeze.token_count", GGUF_TYPE_UINT32, &id, report))) return status;
    meta->n_tokens = gguf_get_val_u32(gguf, id);
    if ((status = sqz_find_key(gguf, "squeeze.checksum.kind", GGUF_TYPE_STRING, &id, report))) return status;
    if (strcmp(gguf_get_val_str(gguf, id), SQZ_FORMAT_CHECKSUM_KIND))
        return sqz_report_fail(report, "unknown kind of checksum; allowed: " SQZ_FORMAT_CHECKSUM_KIND);
    if (context->version >= SQZ_FORMAT_SHARDS && (status = read_shard_keys(context, gguf, report))) return status;
    return sqz_check_meta(meta, report);
}

static enum sqz_status read_layers(struct sqz_context *context, const struct gguf_context *gguf,
                                   const struct sqz_report *report)
{
    const uint32_t n_layer = context->meta.n_layer; /* at most SQZ_FORMAT_MAX_LAYERS */
    const struct sqz_row_tokens tokens = sqz_row_tokens_of(&context->meta);
    const void *values = NULL;
    enum sqz_status status;
    context->layers = calloc(n_layer, sizeof *context->layers);
    if (!context->layers) return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for %" PRIu32 " layers", n_layer);
    for (size_t i = 0; i < sizeof layer_fields / sizeof *layer_fields; i++) {
        const struct key_field *field = &layer_fields[i];
        if ((status = sqz_find_array(gguf, field->key, field->type, n_layer, &values, report))) return status;
        for (uint32_t layer = 0; layer < n_layer; layer++)
            store_value((char *)&context->layers[layer] + field->at,
                        (const char *)values + layer * value_bytes(field->type), field->type);
    }
    if ((status = sqz_find_array(gguf, "squeeze.layer.cluster_count", GGUF_TYPE_UINT32,
                                 (size_t)n_layer * SQZ_MAX_LEVELS, &values, report)))
        return status;
    for (uint32_t layer = 0; layer < n_layer; layer++)
        for (uint32_t level = 0; level < SQZ_MAX_LEVELS; level++)
            memcpy(&context->layers[layer].level[level].n_clusters,
                   (const char *)values + ((size_t)layer * SQZ_MAX_LEVELS + level) * 4, 4);
    for (uint32_t layer = 0; layer < n_layer; layer++) {
        context->layers[layer].rule = context->meta.squeeze.rule;
        if ((status = sqz_check_layer_counts(&context->layers[layer], layer, tokens, report))) return status;
        sqz_layer_set_types(&context->layers[layer], &context->meta.squeeze, context->version);
    }
    return SQZ_OK;
}

enum sqz_status sqz_read_keys(struct sqz_context *context, const struct gguf_context *gguf,
                              const struct sqz_report *report)
{
    const enum sqz_status status = read_meta(context, gguf, report);
    return status || sqz_context_is_index(context) ? status : read_layers(context, gguf, report);
}
