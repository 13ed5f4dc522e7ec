/*
 * The table of a layer's tensors and the checks that writer and reader share:
 * what the writer accepts is what the reader accepts, so a file that was
 * written can be opened. Key, value, centroid and
 * query numbers themselves are not looked at: a NaN there spoils an answer, it
 * cannot steer a pointer.
 */
#include "format.h"
#include "shards.h"
#include "codes.h"
#include "error.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Reporting ------------------------------------------------------------ */

static void set_message(const struct sqz_report *report, enum sqz_status status, const char *message, const char *hint)
{
    const char *path = report->path ? report->path : "";
    size_t path_bytes = strlen(path);

    /* The end of a long path tells files apart; the message itself must not be cut off. */
    const bool cut = path_bytes > 160;
    if (cut) path += path_bytes - 160;
    sqz_error_set(report->error, status, "%s%s%s%s%s%s", cut ? "..." : "", path, *path ? ": " : "", message,
                  *hint ? "; " : "", hint);
}

enum sqz_status sqz_report_fail(const struct sqz_report *report, const char *format, ...)
{
    char message[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    set_message(report, report->status, message, report->hint);
    return report->status;
}

enum sqz_status sqz_report_as(const struct sqz_report *report, enum sqz_status status, const char *format, ...)
{
    char message[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    set_message(report, status, message, "");
    return status;
}

/* ---- A layer's tensors -------------------------------------------------------- */

const void *sqz_slot_get(const struct sqz_layer *layer, size_t slot)
{
    const void *array;
    memcpy(&array, (const char *)layer + slot, sizeof array); /* fields differ in pointer type, not in representation */
    return array;
}

void sqz_slot_set(struct sqz_layer *layer, size_t slot, const void *array)
{
    memcpy((char *)layer + slot, &array, sizeof array);
}

static struct sqz_tensor_spec *add_spec(struct sqz_tensor_spec *spec, enum ggml_type type, uint64_t ne0, uint64_t ne1,
                                        uint64_t ne2, size_t slot, enum sqz_need need)
{
    spec->type = type;
    spec->ne[0] = (int64_t)ne0;
    spec->ne[1] = (int64_t)ne1;
    spec->ne[2] = (int64_t)ne2;
    /* At most 2^8 * 2^31 * 2^10 elements of 4 bytes: no overflow with checked counts. */
    spec->bytes = ne0 * ne1 * ne2 * (type == GGML_TYPE_I8 ? 1 : type == GGML_TYPE_F16 ? 2 : 4);
    spec->need = need;
    spec->slot = slot;
    spec->bulk = spec->rows = spec->steers = false;
    return spec;
}

/* One tensor of rows: "blk.N.<what><part><suffix>". */
static void add_part(struct sqz_tensor_spec *spec, uint32_t index, const char *what, const char *part,
                     const char *suffix, enum ggml_type type, uint64_t ne0, uint64_t ne1, uint64_t ne2, size_t slot)
{
    snprintf(add_spec(spec, type, ne0, ne1, ne2, slot, SQZ_NEED_ALWAYS)->name, sizeof spec->name,
             "blk.%" PRIu32 ".%s%s%s", index, what, part, suffix);
}

/* Those of rows in planes. */
static size_t add_planes(struct sqz_tensor_spec *spec, uint32_t index, const char *what, const char *suffix,
                         const struct sqz_rows *rows, uint64_t n, uint64_t heads, uint64_t dim, size_t slot)
{
    const size_t planes = slot + offsetof(struct sqz_rows, planes);
    const uint64_t n_whole = rows->planes.n_whole, rounded = n - n_whole, bytes = sqz_plane_bytes(dim);
    struct sqz_tensor_spec *next = spec;
    add_part(next++, index, what, "_upper", suffix, GGML_TYPE_I8, bytes, rounded, heads,
             slot + offsetof(struct sqz_rows, data));
    if (rows->type == SQZ_ROW_I44)
        add_part(next++, index, what, "_lower", suffix, GGML_TYPE_I8, bytes, rounded, heads,
                 planes + offsetof(struct sqz_planes, lower));
    add_part(next++, index, what, "_step", suffix, GGML_TYPE_F16, rounded, heads, 1,
             planes + offsetof(struct sqz_planes, step));
    if (n_whole)
        add_part(next++, index, what, "_fixed", suffix, GGML_TYPE_F16, dim, n_whole, heads,
                 planes + offsetof(struct sqz_planes, whole));
    return (size_t)(next - spec);
}

/* Tensors of rows, n a head, whose struct begins at `slot`: their numbers, and with I8 their scales. `suffix`: "", or a
 * level's number. Returns how many. */
static size_t add_rows(struct sqz_tensor_spec *spec, uint32_t index, const char *what, const char *scale_what,
                       const char *suffix, const struct sqz_rows *rows, uint64_t n, uint64_t heads, uint64_t dim,
                       size_t slot, bool bulk)
{
    if (sqz_row_is_planes(rows->type)) {
        const size_t n_tensors = add_planes(spec, index, what, suffix, rows, n, heads, dim, slot);
        for (size_t i = 0; i < n_tensors; i++) spec[i].bulk = bulk;
        return n_tensors;
    }
    const enum ggml_type type = rows->type == SQZ_ROW_I8 ? GGML_TYPE_I8 : GGML_TYPE_F16;
    snprintf(add_spec(spec, type, dim, n, heads, slot + offsetof(struct sqz_rows, data), SQZ_NEED_ALWAYS)->name,
             sizeof spec->name, "blk.%" PRIu32 ".%s%s", index, what, suffix);
    spec->bulk = bulk;
    if (rows->type != SQZ_ROW_I8) return 1;
    snprintf(
        add_spec(++spec, GGML_TYPE_F32, n, heads, 1, slot + offsetof(struct sqz_rows, scale), SQZ_NEED_ALWAYS)->name,
        sizeof spec->name, "blk.%" PRIu32 ".%s%s", index, scale_what, suffix);
    spec->bulk = bulk;
    return 2;
}

static struct sqz_tensor_spec *add_steering(struct sqz_tensor_spec *spec, enum ggml_type type, uint64_t ne0,
                                            uint64_t ne1, size_t slot, enum sqz_need need)
{
    add_spec(spec, type, ne0, ne1, 1, slot, need)->steers = true;
    return spec;
}

static void name_spec(struct sqz_tensor_spec *spec, uint32_t index, const char *what)
{
    snprintf(spec->name, sizeof spec->name, "blk.%" PRIu32 ".%s", index, what);
}

static void name_level_spec(struct sqz_tensor_spec *spec, uint32_t index, const char *what, uint32_t level)
{
    snprintf(spec->name, sizeof spec->name, "blk.%" PRIu32 ".%s.%" PRIu32, index, what, level);
}

#define LAYER_SLOT(field) offsetof(struct sqz_layer, field)
#define LEVEL_SLOT(number, field)                                                                                      \
    (offsetof(struct sqz_layer, level) + (number) * sizeof(struct sqz_level) + offsetof(struct sqz_level, field))

/* Where the mean that I8 rows are relative to is bound, to be given to the others then; 0: there are none. */
static size_t mean_slot(const struct sqz_layer *layer)
{
    const size_t mean = offsetof(struct sqz_rows, mean);
    if (layer->n_levels && layer->level[0].centroids.type == SQZ_ROW_I8) return LEVEL_SLOT(0, centroids) + mean;
    if (layer->keys.type == SQZ_ROW_I8) return LAYER_SLOT(keys) + mean;
    return layer->retained_keys.type == SQZ_ROW_I8 ? LAYER_SLOT(retained_keys) + mean : 0;
}

size_t sqz_layer_tensors(struct sqz_tensor_spec specs[SQZ_FORMAT_LAYER_TENSORS], const struct sqz_layer *layer,
                         uint32_t index)
{
    const uint64_t heads = layer->shape.n_head_kv, dim = layer->shape.head_dim;
    const uint64_t rows = layer->n_rows, points = layer->n_curve;
    struct sqz_tensor_spec *next = specs;
    if (rows == 0) return 0; /* of a window, in a shard that has none of it */

    name_spec(add_spec(next++, GGML_TYPE_I32, rows, heads, 1, LAYER_SLOT(position), SQZ_NEED_ALWAYS), index,
              "position");

    for (uint32_t i = 0; i < layer->n_levels; i++) {
        const uint64_t clusters = layer->level[i].n_clusters;
        char suffix[16];
        snprintf(suffix, sizeof suffix, ".%" PRIu32, i);
        next += add_rows(next, index, "centroid", "centroid_scale", suffix, &layer->level[i].centroids, clusters, heads,
                         dim, LEVEL_SLOT(i, centroids), false);
        struct sqz_tensor_spec *tail = next;
        next += add_rows(next, index, "value_centroid", "value_centroid_scale", suffix,
                         &layer->level[i].value_centroids, clusters, heads, dim, LEVEL_SLOT(i, value_centroids), false);
        for (; !layer->tail && tail < next; tail++) tail->need = SQZ_NEED_MAYBE;
        name_level_spec(
            add_steering(next++, GGML_TYPE_I32, clusters + 1, heads, LEVEL_SLOT(i, offset), SQZ_NEED_ALWAYS), index,
            "offset", i);
        name_level_spec(add_steering(next++, GGML_TYPE_F32, clusters, heads, LEVEL_SLOT(i, variance), SQZ_NEED_ALWAYS),
                        index, "variance", i);
    }

    if (points) {
        name_spec(add_steering(next++, GGML_TYPE_F32, points, 1, LAYER_SLOT(log_threshold), SQZ_NEED_ALWAYS), index,
                  "threshold");
        name_spec(add_steering(next++, GGML_TYPE_F32, points, heads, LAYER_SLOT(share), SQZ_NEED_ALWAYS), index,
                  "share");
        name_spec(add_steering(next++, GGML_TYPE_F32, points, heads, LAYER_SLOT(lost_mass), SQZ_NEED_ALWAYS), index,
                  "lost_mass");
        name_spec(add_steering(next++, GGML_TYPE_F32, points, heads, LAYER_SLOT(tail_gain), SQZ_NEED_MAYBE), index,
                  "tail_gain");
        name_spec(add_steering(next++, GGML_TYPE_F32, heads, 1, LAYER_SLOT(variance_gain), SQZ_NEED_MAYBE), index,
                  "variance_gain");
        name_spec(add_steering(next++, GGML_TYPE_F32, points, 1, LAYER_SLOT(global_share), SQZ_NEED_MAYBE), index,
                  "global_share");
    }
    if (layer->n_queries)
        name_spec(add_spec(next++, GGML_TYPE_F16, dim, layer->shape.n_head, layer->n_queries, LAYER_SLOT(queries),
                           SQZ_NEED_ALWAYS),
                  index, "query");

    const size_t mean = mean_slot(layer);
    if (mean) name_spec(add_spec(next++, GGML_TYPE_F32, dim, heads, 1, mean, SQZ_NEED_ALWAYS), index, "key_mean");
    if (layer->codes.n_words) {
        const uint64_t words = layer->codes.n_words, directions = layer->codes.n_directions;
        name_spec(add_spec(next++, GGML_TYPE_I32, rows - layer->n_fixed, words, heads, LAYER_SLOT(codes.words),
                           SQZ_NEED_ALWAYS),
                  index, "code");
        name_spec(
            add_spec(next++, GGML_TYPE_F16, dim, directions, heads, LAYER_SLOT(codes.directions), SQZ_NEED_ALWAYS),
            index, "code_direction");
        name_spec(add_spec(next++, GGML_TYPE_F16, directions, SQZ_CODE_ENTRIES, heads, LAYER_SLOT(codes.book),
                           SQZ_NEED_ALWAYS),
                  index, "code_book");
        name_spec(add_steering(next++, GGML_TYPE_I32, SQZ_CODE_PARTS * words + 1, heads, LAYER_SLOT(codes.first),
                               SQZ_NEED_ALWAYS),
                  index, "code_first");
        name_spec(add_steering(next++, GGML_TYPE_F32, directions, heads, LAYER_SLOT(codes.spread), SQZ_NEED_ALWAYS),
                  index, "code_spread");
    }
    if (layer->retained_keys.type)
        next += add_rows(next, index, "key_i8", "key_scale", "", &layer->retained_keys, rows, heads, dim,
                         LAYER_SLOT(retained_keys), true);
    if (sqz_row_is_planes(layer->values.type))
        name_spec(add_spec(next++, GGML_TYPE_F32, dim, heads, 1, LAYER_SLOT(values) + offsetof(struct sqz_rows, mean),
                           SQZ_NEED_ALWAYS),
                  index, "value_mean");
    struct sqz_tensor_spec *first = next;
    next += add_rows(next, index, "key", "key_scale", "", &layer->keys, rows, heads, dim, LAYER_SLOT(keys), true);
    next +=
        add_rows(next, index, "value", "value_scale", "", &layer->values, rows, heads, dim, LAYER_SLOT(values), true);
    for (; first < next; first++) first->rows = true;
    return (size_t)(next - specs);
}

/* ---- Meta ------------------------------------------------------------------------ */

static enum sqz_status check_text(const char *what, const char *text, size_t max_bytes, const struct sqz_report *report)
{
    if (!text) return sqz_report_fail(report, "%s is missing", what);
    const size_t bytes = strlen(text);
    if (bytes > max_bytes)
        return sqz_report_fail(report, "%s has %zu bytes; allowed: at most %zu", what, bytes, max_bytes);
    return SQZ_OK;
}

static enum sqz_status check_range(const char *what, uint64_t value, uint64_t low, uint64_t high,
                                   const struct sqz_report *report)
{
    if (value < low || value > high)
        return sqz_report_fail(report, "%s is %" PRIu64 "; allowed: %" PRIu64 " to %" PRIu64, what, value, low, high);
    return SQZ_OK;
}

static enum sqz_status check_fingerprint(const char *fingerprint, const struct sqz_report *report)
{
    const size_t bytes = fingerprint ? strlen(fingerprint) : 0;
    if (bytes < 1 || bytes > 64 || strspn(fingerprint, "0123456789abcdefABCDEF") != bytes)
        return sqz_report_fail(report, "the model's fingerprint (%zu characters) is not 1 to 64 hex digits", bytes);
    return SQZ_OK;
}

static enum sqz_status check_options(const struct sqz_squeeze_options *options, const struct sqz_report *report)
{
    enum sqz_status status;
    if ((status = check_range("option rule", (uint32_t)options->rule, 0, SQZ_RULE_PAPER, report)) ||
        (status = check_range("option n_levels", options->n_levels, 0, SQZ_MAX_LEVELS, report)) ||
        (status = check_range("option metric", (uint32_t)options->metric, 0, SQZ_METRIC_EUCLIDEAN, report)) ||
        (status = check_range("option group", (uint32_t)options->group, 0, SQZ_GROUP_MAX, report)) ||
        (status = check_range("option index", (uint32_t)options->index, 0, SQZ_INDEX_INT8, report)) ||
        (status = check_range("option keys", (uint32_t)options->keys, 0, SQZ_INDEX_INT8, report)) ||
        (status = check_range("option rows", (uint32_t)options->rows, 0, SQZ_ROWS_INT4, report)) ||
        (options->rows != SQZ_ROWS_F16 &&
         (status = check_range("option keys beside option rows", (uint32_t)options->keys, 0, 0, report))) ||
        (status = check_range("option code_words", options->code_words, 0, SQZ_CODE_MAX_WORDS, report)) ||
        (status = check_range("option n_iterations", options->n_iterations, 0, 1000, report)) ||
        (status = check_range("option n_calibration", options->n_calibration, 0, 1024, report)))
        return status;
    for (uint32_t i = 0; i < options->n_levels; i++) {
        const float share = options->centroid_share[i];
        if (!(share > 0.0f && share <= 1.0f))
            return sqz_report_fail(report, "option centroid_share[%" PRIu32 "] is %g; allowed: above 0, at most 1", i,
                                   (double)share);
    }
    return SQZ_OK;
}

/* A name that stays in the index's folder. */
static bool is_plain_name(const char *name)
{
    return name[0] && !strchr(name, '/') && strcmp(name, ".") != 0 && strcmp(name, "..") != 0;
}

/* The file's tokens against those of the whole context. */
static enum sqz_status check_whole(const struct sqz_shard_place *shard, size_t n_tokens,
                                   const struct sqz_report *report)
{
    const struct sqz_deal deal = {shard->n_tokens, shard->block_tokens, shard->count};
    const size_t dealt = shard->number ? sqz_deal_tokens(&deal, shard->number - 1, deal.n_tokens) : deal.n_tokens;
    if (n_tokens == dealt) return SQZ_OK;
    return sqz_report_fail(
        report, "%zu tokens in part %" PRIu32 " of a context of %" PRIu32 " tokens in %" PRIu32 " shards; allowed: %zu",
        n_tokens, shard->number, shard->n_tokens, shard->count, dealt);
}

struct sqz_row_tokens sqz_row_tokens_of(const struct sqz_context_meta *meta)
{
    return (struct sqz_row_tokens){meta->n_tokens, meta->shard.number > 1 ? 0 : sqz_meta_text_tokens(meta)};
}

enum sqz_status sqz_check_shard_place(const struct sqz_shard_place *shard, size_t n_tokens,
                                      const struct sqz_report *report)
{
    enum sqz_status status;
    if (shard->count == 0) return SQZ_OK;
    if ((status = check_range("shard.count", shard->count, 2, SQZ_MOST_SHARDS, report)) ||
        (status = check_range("shard.number", shard->number, 0, shard->count, report)) ||
        (status = check_range("shard.block_tokens", shard->block_tokens, 1, INT32_MAX, report)) ||
        (status = check_range("shard.token_count", shard->n_tokens, 0, INT32_MAX, report)) ||
        (shard->n_tokens && (status = check_whole(shard, n_tokens, report))))
        return status;
    if (shard->number) return SQZ_OK;
    const struct sqz_deal deal = {n_tokens, shard->block_tokens, shard->count};
    if (sqz_deal_tokens(&deal, shard->count - 1, n_tokens) == 0)
        return sqz_report_fail(
            report,
            "%" PRIu32 " shards of blocks of %" PRIu32 " tokens: the last would be empty; allowed for "
            "%zu tokens: at most %zu",
            shard->count, shard->block_tokens, n_tokens, (n_tokens + shard->block_tokens - 1) / shard->block_tokens);
    for (uint32_t i = 0; i < shard->count; i++) {
        if ((status = check_text("name of a shard", shard->files[i], SQZ_FORMAT_MAX_NAME_BYTES, report))) return status;
        if (!is_plain_name(shard->files[i]))
            return sqz_report_fail(report, "shard %" PRIu32 " has no name of a file beside the index", i + 1);
        for (uint32_t j = 0; j < i; j++)
            if (strcmp(shard->files[i], shard->files[j]) == 0 || shard->checksums[i] == shard->checksums[j])
                return sqz_report_fail(report, "shards %" PRIu32 " and %" PRIu32 " are the same file, %s", j + 1, i + 1,
                                       shard->files[i]);
    }
    return SQZ_OK;
}

enum sqz_status sqz_check_meta(const struct sqz_context_meta *meta, const struct sqz_report *report)
{
    enum sqz_status status;
    if ((status = check_text("model name", meta->model_name, SQZ_FORMAT_MAX_NAME_BYTES, report)) ||
        (status = check_text("model architecture", meta->model_architecture, SQZ_FORMAT_MAX_NAME_BYTES, report)) ||
        (status = check_text("source name", meta->source_name, SQZ_FORMAT_MAX_NAME_BYTES, report)) ||
        (status = check_fingerprint(meta->model_fingerprint, report)) ||
        (status = check_range("the number of tokens", meta->n_tokens, 1, INT32_MAX, report)) ||
        (status = check_range("the number of layers", meta->n_layer, 1, SQZ_FORMAT_MAX_LAYERS, report)))
        return status;
    if (!(meta->rope_scale >= 1.0f && meta->rope_scale <= 64.0f))
        return sqz_report_fail(report, "rope_scale is %g; allowed: 1 to 64", (double)meta->rope_scale);
    if ((status =
             check_range("rope_factors", meta->rope_factors, SQZ_ROPE_FACTORS_UNSAID, SQZ_ROPE_FACTORS_LONG, report)))
        return status;
    if ((status = sqz_check_shard_place(&meta->shard, meta->n_tokens, report))) return status;
    return check_options(&meta->squeeze, report);
}

enum sqz_status sqz_check_tokens(const int32_t *tokens, size_t n_tokens, const struct sqz_report *report)
{
    for (size_t i = 0; i < n_tokens; i++)
        if (tokens[i] < 0)
            return sqz_report_fail(report, "token %zu is %" PRId32 "; allowed: not negative", i, tokens[i]);
    return SQZ_OK;
}

/* ---- Counts ------------------------------------------------------------------------ */

static enum sqz_status check_shape(const struct sqz_layer_shape *shape, uint32_t index, const struct sqz_report *report)
{
    if (shape->n_head < 1 || shape->n_head > 1024)
        return sqz_report_fail(report, "layer %" PRIu32 ": %" PRIu32 " query heads; allowed: 1 to 1024", index,
                               shape->n_head);
    if (shape->n_head_kv < 1 || shape->n_head % shape->n_head_kv)
        return sqz_report_fail(report, "layer %" PRIu32 ": %" PRIu32 " key-value heads; allowed: a divisor of %" PRIu32,
                               index, shape->n_head_kv, shape->n_head);
    if (shape->head_dim < 32 || shape->head_dim > 256 || shape->head_dim % 16)
        return sqz_report_fail(report,
                               "layer %" PRIu32 ": head dimension %" PRIu32 "; allowed: multiples of 16 from 32 to 256",
                               index, shape->head_dim);
    if (!(shape->scale > 0.0f && isfinite(shape->scale)))
        return sqz_report_fail(report, "layer %" PRIu32 ": scale is %g; allowed: finite, above 0", index,
                               (double)shape->scale);
    return SQZ_OK;
}

static enum sqz_status check_rows(const struct sqz_layer *layer, uint32_t index, struct sqz_row_tokens tokens,
                                  const struct sqz_report *report)
{
    if (layer->sliding_window) {
        if (layer->n_levels)
            return sqz_report_fail(
                report, "layer %" PRIu32 ": a sliding window with %" PRIu32 " levels of clusters; allowed: 0", index,
                layer->n_levels);
        if (layer->n_window_tokens < 1)
            return sqz_report_fail(report, "layer %" PRIu32 ": a sliding window of 0 tokens; allowed: 1 or more",
                                   index);
        /* Whoever puts the rows back in order counts from where the window begins. */
        const size_t seen = layer->n_window_tokens < tokens.window_end ? layer->n_window_tokens : tokens.window_end;
        if (tokens.window_end == 0 && (layer->n_rows || layer->n_queries))
            return sqz_report_fail(report,
                                   "layer %" PRIu32 ": %" PRIu32 " rows and %" PRIu32
                                   " queries with a sliding window; allowed: none, shard 1 has all of them",
                                   index, layer->n_rows, layer->n_queries);
        if (layer->n_rows != seen)
            return sqz_report_fail(report,
                                   "layer %" PRIu32 ": %" PRIu32 " rows with a sliding window of %" PRIu32
                                   " tokens; allowed: %zu, those of the context's %zu tokens that the window sees",
                                   index, layer->n_rows, layer->n_window_tokens, seen, tokens.window_end);
    } else if (layer->n_rows != tokens.n) {
        return sqz_report_fail(report, "layer %" PRIu32 ": %" PRIu32 " rows; allowed: %zu, one a token", index,
                               layer->n_rows, tokens.n);
    }
    if (layer->n_fixed > layer->n_rows || (!layer->n_levels && layer->n_fixed != layer->n_rows))
        return sqz_report_fail(report, "layer %" PRIu32 ": %" PRIu32 " fixed rows; allowed: %s %" PRIu32, index,
                               layer->n_fixed, layer->n_levels ? "at most" : "without clusters", layer->n_rows);
    return SQZ_OK;
}

enum sqz_status sqz_check_layer_counts(const struct sqz_layer *layer, uint32_t index, struct sqz_row_tokens tokens,
                                       const struct sqz_report *report)
{
    enum sqz_status status;
    if ((status = check_shape(&layer->shape, index, report))) return status;
    if (layer->n_levels > SQZ_MAX_LEVELS)
        return sqz_report_fail(report, "layer %" PRIu32 ": %" PRIu32 " levels; allowed: 0 to %d", index,
                               layer->n_levels, SQZ_MAX_LEVELS);
    if ((status = check_rows(layer, index, tokens, report))) return status;
    uint32_t below = layer->n_rows - layer->n_fixed;
    for (uint32_t i = 0; i < layer->n_levels; i++) {
        const uint32_t clusters = layer->level[i].n_clusters;
        if (clusters < 1 || clusters > below)
            return sqz_report_fail(report,
                                   "layer %" PRIu32 ", level %" PRIu32 ": %" PRIu32 " clusters; allowed: 1 to %" PRIu32,
                                   index, i, clusters, below);
        below = clusters;
    }
    if ((uint32_t)layer->group > SQZ_GROUP_MAX)
        return sqz_report_fail(report, "layer %" PRIu32 ": group is %u; allowed: 0 to %d", index,
                               (unsigned)layer->group, SQZ_GROUP_MAX);
    if (layer->n_levels ? layer->n_curve < 1 || layer->n_curve > SQZ_FORMAT_MAX_CURVE : layer->n_curve != 0)
        return sqz_report_fail(report, "layer %" PRIu32 ": %" PRIu32 " curve points; allowed: %s", index,
                               layer->n_curve, layer->n_levels ? "1 to 65536" : "0 without clusters");
    const struct sqz_codes *codes = &layer->codes;
    if (codes->n_words > SQZ_CODE_MAX_WORDS || (codes->n_words && !layer->n_levels))
        return sqz_report_fail(report, "layer %" PRIu32 ": %" PRIu32 " words of code; allowed: %s", index,
                               codes->n_words, layer->n_levels ? "0 to 4" : "0 without clusters");
    if (codes->n_words ? codes->n_directions < 1 || codes->n_directions > layer->shape.head_dim
                       : codes->n_directions != 0)
        return sqz_report_fail(report, "layer %" PRIu32 ": %" PRIu32 " directions of codes; allowed: %s", index,
                               codes->n_directions, codes->n_words ? "1 to the head dimension" : "0 without codes");
    if (layer->n_queries > SQZ_FORMAT_MAX_QUERIES)
        return sqz_report_fail(report, "layer %" PRIu32 ": %" PRIu32 " queries; allowed: at most %d", index,
                               layer->n_queries, SQZ_FORMAT_MAX_QUERIES);
    return SQZ_OK;
}

/* ---- Types of rows ---------------------------------------------------------------------- */

void sqz_layer_set_types(struct sqz_layer *layer, const struct sqz_squeeze_options *options, uint32_t version)
{
    const bool small = layer->n_levels && options->keys == SQZ_INDEX_INT8, alone = version >= SQZ_FORMAT_SMALL_KEYS;
    layer->keys.type = small && alone ? SQZ_ROW_I8 : SQZ_ROW_F16;
    layer->values.type = SQZ_ROW_F16;
    layer->keys.planes.n_whole = layer->values.planes.n_whole = 0;
    layer->retained_keys.type = small && !alone ? SQZ_ROW_I8 : SQZ_ROW_NONE;
    for (uint32_t i = 0; i < layer->n_levels; i++) {
        layer->level[i].centroids.type = sqz_row_type_of(options->index);
        layer->level[i].value_centroids.type = SQZ_ROW_F16;
    }
    if (layer->n_levels && options->rows != SQZ_ROWS_F16 && version >= SQZ_FORMAT_PLANES)
        sqz_layer_plan_planes(layer, options->rows);
}

static enum sqz_status check_type(const char *what, const struct sqz_rows *rows, enum sqz_row_type allowed,
                                  uint32_t index, const struct sqz_report *report)
{
    if (rows->type != allowed)
        return sqz_report_fail(report, "layer %" PRIu32 ": %s of type %s; allowed: %s, the context's", index, what,
                               sqz_row_type_name(rows->type), sqz_row_type_name(allowed));
    return SQZ_OK;
}

enum sqz_status sqz_check_layer_types(const struct sqz_layer *layer, uint32_t index,
                                      const struct sqz_squeeze_options *options, uint32_t version,
                                      const struct sqz_report *report)
{
    struct sqz_layer wanted = *layer;
    enum sqz_status status;
    sqz_layer_set_types(&wanted, options, version);
    if ((status = check_type("keys", &layer->keys, wanted.keys.type, index, report)) ||
        (status = check_type("values", &layer->values, wanted.values.type, index, report)) ||
        (status = check_type("retained keys", &layer->retained_keys, wanted.retained_keys.type, index, report)))
        return status;
    for (uint32_t i = 0; i < layer->n_levels; i++) {
        const struct sqz_level *level = &layer->level[i];
        if ((status = check_type("centroids", &level->centroids, wanted.level[i].centroids.type, index, report)) ||
            (level->value_centroids.data && (status = check_type("value centroids", &level->value_centroids,
                                                                 wanted.level[i].value_centroids.type, index, report))))
            return status;
    }
    if (layer->keys.planes.n_whole != wanted.keys.planes.n_whole ||
        layer->values.planes.n_whole != wanted.values.planes.n_whole)
        return sqz_report_fail(report,
                               "layer %" PRIu32 ": %" PRIu32 " keys and %" PRIu32
                               " values that are not rounded; allowed: %" PRIu32 ", the fixed rows",
                               index, layer->keys.planes.n_whole, layer->values.planes.n_whole,
                               wanted.keys.planes.n_whole);
    return SQZ_OK;
}

/* ---- Contents ------------------------------------------------------------------------ */

static enum sqz_status check_window_positions(const struct sqz_layer *layer, uint32_t index, size_t n_tokens,
                                              const struct sqz_report *report)
{
    const uint32_t first = (uint32_t)n_tokens - layer->n_rows;
    for (uint32_t head = 0; head < layer->shape.n_head_kv; head++)
        for (uint32_t row = 0; row < layer->n_rows; row++) {
            const int32_t position = layer->position[(size_t)head * layer->n_rows + row];
            if (position != (int32_t)(first + row))
                return sqz_report_fail(report,
                                       "layer %" PRIu32 ", head %" PRIu32 ": position of row %" PRIu32 " is %" PRId32
                                       "; allowed: %" PRIu32,
                                       index, head, row, position, first + row);
        }
    return SQZ_OK;
}

/* Every token once a head, the fixed rows in order. */
static enum sqz_status check_positions(const struct sqz_layer *layer, uint32_t index, size_t n_tokens,
                                       const struct sqz_report *report)
{
    const size_t n_words = (n_tokens + 63) / 64;
    uint64_t *seen = malloc(n_words * sizeof *seen);
    if (!seen) return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for %zu bytes", n_words * sizeof *seen);
    enum sqz_status status = SQZ_OK;
    for (uint32_t head = 0; head < layer->shape.n_head_kv && !status; head++) {
        const int32_t *position = layer->position + (size_t)head * layer->n_rows;
        memset(seen, 0, n_words * sizeof *seen);
        for (uint32_t row = 0; row < layer->n_rows; row++) {
            const uint32_t at = (uint32_t)position[row];
            if (at >= n_tokens) {
                status = sqz_report_fail(report,
                                         "layer %" PRIu32 ", head %" PRIu32 ": position of row %" PRIu32 " is %" PRId32
                                         "; allowed: 0 to %zu",
                                         index, head, row, position[row], n_tokens - 1);
                break;
            }
            const uint64_t bit = (uint64_t)1 << (at % 64);
            if ((seen[at / 64] & bit) || (row && row < layer->n_fixed && position[row] <= position[row - 1])) {
                status = sqz_report_fail(report,
                                         "layer %" PRIu32 ", head %" PRIu32 ": position of row %" PRIu32 " is %" PRId32
                                         ", a second time or out of order; allowed: each position once",
                                         index, head, row, position[row]);
                break;
            }
            seen[at / 64] |= bit;
        }
    }
    free(seen);
    return status;
}

static enum sqz_status check_offsets(const struct sqz_layer *layer, uint32_t index, uint32_t level,
                                     const struct sqz_report *report)
{
    const uint32_t clusters = layer->level[level].n_clusters;
    const uint32_t below = level ? layer->level[level - 1].n_clusters : layer->n_rows - layer->n_fixed;
    for (uint32_t head = 0; head < layer->shape.n_head_kv; head++) {
        const uint32_t *offset = layer->level[level].offset + (size_t)head * ((size_t)clusters + 1);
        bool good = offset[0] == 0 && offset[clusters] == below;
        for (uint32_t i = 0; i < clusters; i++) good &= offset[i] < offset[i + 1];
        if (!good)
            return sqz_report_fail(report,
                                   "layer %" PRIu32 ", head %" PRIu32 ", level %" PRIu32
                                   ": cluster offsets do not increase from 0 to %" PRIu32,
                                   index, head, level, below);
    }
    return SQZ_OK;
}

/* Parts of the codes: directions from the first to the last, none twice. */
static enum sqz_status check_code_parts(const struct sqz_layer *layer, uint32_t index, const struct sqz_report *report)
{
    const struct sqz_codes *codes = &layer->codes;
    const uint32_t parts = SQZ_CODE_PARTS * codes->n_words;
    for (uint32_t head = 0; head < layer->shape.n_head_kv && codes->n_words; head++) {
        const uint32_t *first = codes->first + (size_t)head * (parts + 1);
        bool good = first[0] == 0 && first[parts] == codes->n_directions;
        for (uint32_t i = 0; i < parts; i++) good &= first[i] <= first[i + 1];
        if (!good)
            return sqz_report_fail(report,
                                   "layer %" PRIu32 ", head %" PRIu32 ": the parts of the codes do not go from "
                                   "0 to %" PRIu32 " directions",
                                   index, head, codes->n_directions);
    }
    return SQZ_OK;
}

enum order { ANY_ORDER, INCREASING, NOT_INCREASING };

/* n_series series of n values each, all within [low, high]; an absent array is fine. */
static enum sqz_status check_floats(const char *what, const float *values, size_t n, size_t n_series, enum order order,
                                    float low, float high, uint32_t index, const struct sqz_report *report)
{
    if (!values) return SQZ_OK;
    for (size_t series = 0; series < n_series; series++, values += n)
        for (size_t i = 0; i < n; i++) {
            if (!(values[i] >= low && values[i] <= high))
                return sqz_report_fail(report, "layer %" PRIu32 ", series %zu: %s[%zu] is %g; allowed: %g to %g", index,
                                       series, what, i, (double)values[i], (double)low, (double)high);
            if (i && ((order == INCREASING && values[i] <= values[i - 1]) ||
                      (order == NOT_INCREASING && values[i] > values[i - 1])))
                return sqz_report_fail(report, "layer %" PRIu32 ", series %zu: %s[%zu] is %g after %g; allowed: %s",
                                       index, series, what, i, (double)values[i], (double)values[i - 1],
                                       order == INCREASING ? "increasing values" : "values that do not increase");
        }
    return SQZ_OK;
}

/* Bounds are far outside of what calibration gives. They keep what is computed from these numbers finite, and sizes
 * computed from shares within 64 bits. */
enum sqz_status sqz_check_layer_contents(const struct sqz_layer *layer, uint32_t index, struct sqz_row_tokens tokens,
                                         const struct sqz_report *report)
{
    const size_t heads = layer->shape.n_head_kv, points = layer->n_curve;
    const float most = 1e6f;
    enum sqz_status status = layer->sliding_window ? check_window_positions(layer, index, tokens.window_end, report)
                                                   : check_positions(layer, index, tokens.n, report);
    for (uint32_t i = 0; i < layer->n_levels && !status; i++)
        if (!(status = check_offsets(layer, index, i, report)))
            status = check_floats("variance", layer->level[i].variance, layer->level[i].n_clusters, heads, ANY_ORDER,
                                  0.0f, FLT_MAX, index, report);
    if (status || (status = check_code_parts(layer, index, report)) || !points) return status;
    if ((status = check_floats("code_spread", layer->codes.spread, layer->codes.n_directions, heads, ANY_ORDER, 0.0f,
                               FLT_MAX, index, report)))
        return status;
    if ((status = check_floats("threshold", layer->log_threshold, points, 1, INCREASING, -most, most, index, report)) ||
        (status = check_floats("share", layer->share, points, heads, NOT_INCREASING, 0.0f, 100.0f, index, report)) ||
        (status = check_floats("lost_mass", layer->lost_mass, points, heads, ANY_ORDER, 0.0f, 2.0f, index, report)) ||
        (status = check_floats("tail_gain", layer->tail_gain, points, heads, ANY_ORDER, -most, most, index, report)) ||
        (status = check_floats("variance_gain", layer->variance_gain, heads, 1, ANY_ORDER, -most, most, index, report)))
        return status;
    return check_floats("global_share", layer->global_share, points, 1, NOT_INCREASING, 0.0f, 100.0f, index, report);
}
