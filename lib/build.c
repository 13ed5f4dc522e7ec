/*
 * From raw keys and values to squeezed layers: which rows are fixed, clusters,
 * the sorted order, centroids, and the calls that calibrate.
 */
#include "build.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "cluster.h"
#include "codes.h"
#include "error.h"
#include "kernels.h"
#include "lookup.h"
#include "threads.h"

/* Fewer clusterable rows than this are left dense: the index would cost more than it saves. */
enum { MIN_CLUSTERABLE_ROWS = 64 };

void sqz_squeeze_options_default(struct sqz_squeeze_options *options, enum sqz_rule rule)
{
    memset(options, 0, sizeof *options);
    options->size = sizeof *options;
    options->rule = rule;
    options->n_levels = 1;
    options->centroid_share[0] = 0.05f;
    for (uint32_t l = 1; l < SQZ_MAX_LEVELS; l++) options->centroid_share[l] = options->centroid_share[l - 1] / 5;
    options->n_iterations = 10;
    options->n_calibration = 64;
    options->seed = 1;
    if (rule == SQZ_RULE_PAPER) {
        options->metric = SQZ_METRIC_COSINE;
        options->n_calibration = 100;
        options->n_window = 100; /* the published code keeps the observation window dense */
        return;
    }
    options->metric = SQZ_METRIC_EUCLIDEAN;
    options->group = SQZ_GROUP_MAX;
    options->index = SQZ_INDEX_INT8;
    options->code_words = 2;
    options->n_sinks = 16;
    options->n_window = 64;
    options->center = true;
    options->variance = true;
    options->per_head = false;
    options->tail = true;
    options->value_skip = true;
}

enum sqz_status sqz_squeeze_options_check(const struct sqz_squeeze_options *o, struct sqz_error *error)
{
    if (o->size != sizeof *o)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "squeeze options of %zu bytes: this library's have %zu",
                             o->size, sizeof *o);
    if (o->rule != SQZ_RULE_DEFAULT && o->rule != SQZ_RULE_PAPER)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "rule %d: allowed are 0 (default) and 1 (paper)", (int)o->rule);
    if (o->n_levels > SQZ_MAX_LEVELS)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%u levels: allowed are 0 to %d", o->n_levels, SQZ_MAX_LEVELS);
    if (o->metric != SQZ_METRIC_COSINE && o->metric != SQZ_METRIC_EUCLIDEAN)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "metric %d: allowed are 0 and 1", (int)o->metric);
    if (o->group != SQZ_GROUP_MEAN && o->group != SQZ_GROUP_MAX)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "group reduction %d: allowed are 0 and 1", (int)o->group);
    if ((uint32_t)o->rows > SQZ_ROWS_INT4)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "format %d of keys and values: allowed are 0 to %d",
                             (int)o->rows, SQZ_ROWS_INT4);
    if (o->rows != SQZ_ROWS_F16 && o->keys != SQZ_INDEX_F16)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT,
                             "INT8 keys and another format of keys and values: allowed is one of them");
    if ((o->index != SQZ_INDEX_F16 && o->index != SQZ_INDEX_INT8) ||
        (o->keys != SQZ_INDEX_F16 && o->keys != SQZ_INDEX_INT8))
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT,
                             "formats %d of centroids and %d of keys: allowed are 0 (F16) and 1 (INT8)", (int)o->index,
                             (int)o->keys);
    if (o->code_words > SQZ_CODE_MAX_WORDS)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%u words of code a key: allowed are 0 to %d", o->code_words,
                             SQZ_CODE_MAX_WORDS);
    for (uint32_t l = 0; l < o->n_levels; l++) {
        const float share = o->centroid_share[l], below = l ? o->centroid_share[l - 1] : 0.5f;
        if (!(share > 0 && share <= 0.5f && (l == 0 || share < below)))
            return sqz_error_set(error, SQZ_ERROR_ARGUMENT,
                                 "centroid share %g of level %u: allowed is more than 0, at most 0.5, and less than "
                                 "the level below",
                                 (double)share, l + 1);
    }
    if (o->n_levels && (o->n_iterations < 1 || o->n_iterations > 1000))
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%u iterations: allowed are 1 to 1000", o->n_iterations);
    if (o->n_levels && (o->n_calibration < 1 || o->n_calibration > 1024))
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%u calibration queries: allowed are 1 to 1024",
                             o->n_calibration);
    return SQZ_OK;
}

enum sqz_status sqz_layer_shape_check(const struct sqz_layer_shape *s, struct sqz_error *error)
{
    if (s->n_head < 1 || s->n_head > 1024 || s->n_head_kv < 1 || s->n_head % s->n_head_kv)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT,
                             "%u query heads and %u key-value heads: allowed are 1 to 1024, the first a multiple of "
                             "the second",
                             s->n_head, s->n_head_kv);
    if (s->head_dim < 32 || s->head_dim > 256 || s->head_dim % 16)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "head dimension %u: allowed are 32 to 256 in steps of 16",
                             s->head_dim);
    if (!(s->scale > 0) || !isfinite(s->scale))
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "attention scale %g: allowed is a finite number above 0",
                             (double)s->scale);
    return SQZ_OK;
}

/* ---- Laying out a layer ----------------------------------------------------------- */

bool sqz_rows_cluster(size_t n_rows, const struct sqz_squeeze_options *options)
{
    return options->n_levels && n_rows >= (size_t)options->n_sinks + options->n_window + MIN_CLUSTERABLE_ROWS;
}

/* Decides fixed rows and cluster counts; n_levels 0 when there is too little to cluster. */
static void plan_layer(struct sqz_layer *layer, const struct sqz_layer_input *in, const struct sqz_squeeze_options *o)
{
    memset(layer, 0, sizeof *layer);
    layer->shape = in->shape;
    layer->n_rows = (uint32_t)in->n_rows;
    layer->keys = sqz_f16_rows(in->keys);
    layer->values = sqz_f16_rows(in->values);
    layer->rule = o->rule;
    layer->group = o->group;
    layer->tail = o->tail;
    layer->value_skip = o->value_skip;
    layer->sliding_window = in->window_tokens != 0;
    layer->n_window_tokens = (uint32_t)in->window_tokens;
    layer->n_fixed = layer->n_rows;
    if (layer->sliding_window || o->n_levels == 0 || in->n_queries == 0) return;
    layer->n_queries = (uint32_t)in->n_queries; /* also of a layer that stays dense: other options may cluster it */
    if (in->stays_dense || !sqz_rows_cluster(in->n_rows, o)) return;
    const size_t fixed = (size_t)o->n_sinks + o->n_window, clusterable = in->n_rows - fixed;
    uint32_t n_levels = 0;
    for (uint32_t l = 0; l < o->n_levels; l++) {
        const uint32_t n = (uint32_t)lround((double)o->centroid_share[l] * (double)clusterable);
        if (n < 1 || (l && n >= layer->level[l - 1].n_clusters)) break;
        layer->level[n_levels++].n_clusters = n;
    }
    if (!n_levels) return;
    layer->n_levels = n_levels;
    layer->n_fixed = (uint32_t)fixed;
    for (uint32_t l = 0; l < n_levels; l++) {
        layer->level[l].centroids.type = sqz_row_type_of(o->index);
        layer->level[l].value_centroids.type = o->tail ? SQZ_ROW_F16 : SQZ_ROW_NONE;
    }
    if (o->keys == SQZ_INDEX_INT8) layer->keys = (struct sqz_rows){.type = SQZ_ROW_I8};
    if (o->rows != SQZ_ROWS_F16) sqz_layer_plan_planes(layer, o->rows);
    /* Larger groups go by blocks, which select clusters. */
    if (layer->shape.n_head / layer->shape.n_head_kv <= SQZ_MAX_GROUP_QUERIES) {
        layer->codes.n_words = o->code_words;
        layer->codes.n_directions = sqz_code_directions(o->code_words, layer->shape.head_dim);
    }
    layer->n_curve = SQZ_CURVE_POINTS;
}

/* Arrays for n rows a head of the type that they have. */
static void carve_rows(struct sqz_rows *rows, struct sqz_arena *arena, size_t n_heads, size_t n, size_t d)
{
    const size_t n_whole = rows->planes.n_whole, rounded = n_heads * (n - n_whole);
    if (rows->type == SQZ_ROW_NONE) return;
    rows->data = sqz_arena_take(arena, rounded, sqz_row_data_bytes(rows->type, d), 1);
    if (rows->type == SQZ_ROW_I8) rows->scale = sqz_arena_take(arena, n_heads, n, sizeof(float));
    if (rows->type == SQZ_ROW_I44) rows->planes.lower = sqz_arena_take(arena, rounded, sqz_plane_bytes(d), 1);
    if (!sqz_row_is_planes(rows->type)) return;
    rows->planes.step = sqz_arena_take(arena, rounded, 1, sizeof(uint16_t));
    if (n_whole) rows->planes.whole = sqz_arena_take(arena, n_heads * n_whole, d, sizeof(uint16_t));
}

/* Points every array of a planned layer into `arena` (count-only when it has no base). The struct's pointers are to
 * const for its readers; the builder owns the block and writes through. */
static void carve_layer(struct sqz_layer *layer, struct sqz_arena *arena, bool per_head)
{
    const size_t k = layer->shape.n_head_kv, d = layer->shape.head_dim;
    layer->position = sqz_arena_take(arena, k, layer->n_rows, sizeof(int32_t));
    for (uint32_t l = 0; l < layer->n_levels; l++) {
        struct sqz_level *level = &layer->level[l];
        carve_rows(&level->centroids, arena, k, level->n_clusters, d);
        carve_rows(&level->value_centroids, arena, k, level->n_clusters, d);
        level->offset = sqz_arena_take(arena, k, level->n_clusters + 1, sizeof(uint32_t));
        level->variance = sqz_arena_take(arena, k, level->n_clusters, sizeof(float));
    }
    if (layer->n_queries)
        layer->queries = sqz_arena_take(arena, layer->n_queries, layer->shape.n_head * d, sizeof(uint16_t));
    if (!layer->n_levels) return;
    if (sqz_layer_has_mean(layer)) sqz_layer_set_mean(layer, sqz_arena_take(arena, k, d, sizeof(float)));
    if (layer->keys.type != SQZ_ROW_F16) carve_rows(&layer->keys, arena, k, layer->n_rows, d); /* else the input's */
    if (layer->values.type != SQZ_ROW_F16) {
        carve_rows(&layer->values, arena, k, layer->n_rows, d);
        layer->values.mean = sqz_arena_take(arena, k, d, sizeof(float));
    }
    sqz_layer_join_planes(layer);
    if (layer->codes.n_words) {
        struct sqz_codes *codes = &layer->codes;
        codes->words = sqz_arena_take(arena, k * codes->n_words, layer->n_rows - layer->n_fixed, sizeof(uint32_t));
        codes->directions = sqz_arena_take(arena, k * codes->n_directions, d, sizeof(uint16_t));
        codes->book = sqz_arena_take(arena, k * SQZ_CODE_ENTRIES, codes->n_directions, sizeof(uint16_t));
        codes->first = sqz_arena_take(arena, k, SQZ_CODE_PARTS * codes->n_words + 1, sizeof(uint32_t));
        codes->spread = sqz_arena_take(arena, k, codes->n_directions, sizeof(float));
    }
    layer->log_threshold = sqz_arena_take(arena, layer->n_curve, 1, sizeof(float));
    layer->share = sqz_arena_take(arena, k, layer->n_curve, sizeof(float));
    layer->lost_mass = sqz_arena_take(arena, k, layer->n_curve, sizeof(float));
    layer->tail_gain = sqz_arena_take(arena, k, layer->n_curve, sizeof(float));
    layer->variance_gain = sqz_arena_take(arena, k, 1, sizeof(float));
    if (!per_head) layer->global_share = sqz_arena_take(arena, layer->n_curve, 1, sizeof(float));
}

size_t sqz_layer_index_span(const struct sqz_layer *layer)
{
    return sqz_layer_index_bytes(layer) - SQZ_ARENA_ALIGNMENT;
}

size_t sqz_layer_index_bytes(const struct sqz_layer *layer)
{
    struct sqz_layer copy = *layer;
    struct sqz_arena count = sqz_arena_on(NULL);
    carve_layer(&copy, &count, !layer->global_share);
    return sqz_arena_bytes(&count);
}

struct sqz_layer sqz_layer_index_in(const struct sqz_layer *layer, void *memory)
{
    struct sqz_layer copy = *layer;
    struct sqz_arena arena = sqz_arena_on(memory);
    carve_layer(&copy, &arena, !layer->global_share);
    copy.owned = NULL;
    return copy;
}

void sqz_layer_release(struct sqz_layer *layer)
{
    free(layer->owned);
    memset(layer, 0, sizeof *layer);
}

/* ---- Clustering one head ------------------------------------------------------------- */

struct cluster_buffers {
    float *points, *mean, *row;
    uint32_t *order, *offset[SQZ_MAX_LEVELS];
    double *sum, *value_sum;
    uint16_t *sorted;
    void *kmeans, *codes;
};

static struct cluster_buffers carve_cluster(struct sqz_arena *arena, const struct sqz_layer *layer,
                                            const struct sqz_kmeans_options *options)
{
    const size_t n = layer->n_rows - layer->n_fixed, d = layer->shape.head_dim;
    struct cluster_buffers b;
    uint32_t counts[SQZ_MAX_LEVELS];
    b.points = sqz_arena_take(arena, n, d, sizeof(float));
    b.mean = sqz_arena_take(arena, d, 1, sizeof(float));
    b.row = sqz_arena_take(arena, d, 1, sizeof(float));
    b.sum = sqz_arena_take(arena, d, 1, sizeof(double));
    b.value_sum = sqz_arena_take(arena, d, 1, sizeof(double));
    b.order = sqz_arena_take(arena, n, 1, sizeof(uint32_t));
    for (uint32_t l = 0; l < layer->n_levels; l++) {
        counts[l] = layer->level[l].n_clusters;
        b.offset[l] = (uint32_t *)(uintptr_t)layer->level[l].offset;
    }
    b.sorted = sqz_arena_take(arena, layer->n_rows, d, sizeof(uint16_t));
    b.kmeans = sqz_arena_take(arena, sqz_hierarchy_workspace_bytes(n, d, layer->n_levels, counts, options), 1, 1);
    b.codes = layer->codes.n_words ? sqz_arena_take(arena, sqz_code_build_workspace_bytes(layer), 1, 1) : NULL;
    return b;
}

/* Writable view of an array the builder owns. */
static void *writable(const void *p)
{
    return (void *)(uintptr_t)p;
}

/* A head's sorted rows, F16, into the layer's own where it keeps them as another type. */
static void store_rows(const struct sqz_layer *layer, uint32_t head, const struct sqz_rows *rows,
                       const uint16_t *sorted, float *row)
{
    const size_t d = layer->shape.head_dim;
    const struct sqz_rows from = sqz_f16_rows(sorted);
    const struct sqz_rows to = sqz_rows_of_head(rows, layer->n_rows, d, head);
    for (size_t i = 0; i < layer->n_rows && rows->type != SQZ_ROW_F16; i++) {
        sqz_rows_to_f32(row, &from, i, 1, d);
        sqz_rows_store(&to, i, row, d);
    }
}

/* The mean of a head's clustered values, which those in planes are relative to. */
static void set_value_mean(const struct sqz_layer *layer, uint32_t head, const struct sqz_rows *values,
                           struct cluster_buffers *b)
{
    const size_t d = layer->shape.head_dim;
    if (!layer->values.mean) return;
    float *mean = (float *)writable(layer->values.mean) + (size_t)head * d;
    memset(b->value_sum, 0, d * sizeof *b->value_sum);
    for (size_t i = layer->n_fixed; i < layer->n_rows; i++) {
        sqz_rows_to_f32(b->row, values, i, 1, d);
        for (size_t j = 0; j < d; j++) b->value_sum[j] += b->row[j];
    }
    for (size_t j = 0; j < d; j++) mean[j] = (float)(b->value_sum[j] / (double)(layer->n_rows - layer->n_fixed));
}

/* Centroids, value centroids and variances of a level, from a head's sorted rows. */
static void summarise_level(struct sqz_layer *layer, uint32_t head, uint32_t l, const struct sqz_rows *keys,
                            const struct sqz_rows *values, struct cluster_buffers *b)
{
    const size_t d = layer->shape.head_dim, n = layer->level[l].n_clusters;
    const struct sqz_rows centroids = sqz_rows_of_head(&layer->level[l].centroids, n, d, head);
    const struct sqz_rows value_centroids = sqz_rows_of_head(&layer->level[l].value_centroids, n, d, head);
    float *variance = (float *)writable(layer->level[l].variance) + (size_t)head * n;
    for (uint32_t c = 0; c < n; c++) {
        uint32_t first_row;
        const size_t count = sqz_cluster_keys(layer, head, l, c, &first_row), first = first_row;
        double squared = 0;
        memset(b->sum, 0, d * sizeof *b->sum);
        memset(b->value_sum, 0, d * sizeof *b->value_sum);
        for (size_t i = first; i < first + count; i++) {
            sqz_rows_to_f32(b->row, keys, i, 1, d);
            for (size_t j = 0; j < d; j++) b->sum[j] += b->row[j];
            if (!layer->tail) continue;
            sqz_rows_to_f32(b->row, values, i, 1, d);
            for (size_t j = 0; j < d; j++) b->value_sum[j] += b->row[j];
        }
        for (size_t j = 0; j < d; j++) b->mean[j] = (float)(b->sum[j] / (double)count);
        sqz_rows_store(&centroids, c, b->mean, d);
        for (size_t i = first; i < first + count; i++) {
            sqz_rows_to_f32(b->row, keys, i, 1, d);
            float distance = 0;
            for (size_t j = 0; j < d; j++) distance += (b->row[j] - b->mean[j]) * (b->row[j] - b->mean[j]);
            squared += distance;
        }
        variance[c] = (float)(squared / (double)count);
        if (!layer->tail) continue;
        for (size_t j = 0; j < d; j++) b->mean[j] = (float)(b->value_sum[j] / (double)count);
        sqz_rows_store(&value_centroids, c, b->mean, d);
    }
}

/* Puts rows [0, n_rows) of one head in the order of layer->position. */
static void sort_rows(uint16_t *rows, const int32_t *position, size_t n_rows, size_t d, uint16_t *scratch)
{
    memcpy(scratch, rows, n_rows * d * sizeof *rows);
    for (size_t i = 0; i < n_rows; i++) memcpy(rows + i * d, scratch + (size_t)position[i] * d, d * sizeof *rows);
}

static void cluster_head(struct sqz_layer *layer, const struct sqz_layer_input *in, uint32_t head,
                         const struct sqz_squeeze_options *o, const struct sqz_kmeans_options *kmeans, void *workspace)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const size_t d = layer->shape.head_dim, n = layer->n_rows - layer->n_fixed;
    struct sqz_arena arena = sqz_arena_on(workspace);
    struct cluster_buffers b = carve_cluster(&arena, layer, kmeans);
    uint16_t *keys = in->keys + (size_t)head * layer->n_rows * d;
    uint16_t *values = in->values + (size_t)head * layer->n_rows * d;
    const struct sqz_rows key_rows = sqz_f16_rows(keys), value_rows = sqz_f16_rows(values);
    float *mean = writable(sqz_layer_mean(layer)); /* of I8 rows; NULL: there are none */
    int32_t *position = (int32_t *)writable(layer->position) + (size_t)head * layer->n_rows;
    uint32_t counts[SQZ_MAX_LEVELS];

    k->f16_to_f32(b.points, keys + (size_t)o->n_sinks * d, n * d);
    if (o->center || mean) {
        memset(b.sum, 0, d * sizeof *b.sum);
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < d; j++) b.sum[j] += b.points[i * d + j];
        for (size_t j = 0; j < d; j++) b.mean[j] = (float)(b.sum[j] / (double)n);
    }
    if (mean) memcpy(mean + (size_t)head * d, b.mean, d * sizeof *b.mean);
    if (o->center) {
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < d; j++) b.points[i * d + j] -= b.mean[j];
    }
    for (uint32_t l = 0; l < layer->n_levels; l++) {
        counts[l] = layer->level[l].n_clusters;
        b.offset[l] += (size_t)head * (counts[l] + 1);
    }
    struct sqz_kmeans_options mine = *kmeans;
    mine.seed += head;
    sqz_hierarchy(b.order, b.offset, b.points, n, d, layer->n_levels, counts, &mine, b.kmeans);

    size_t at = 0;
    for (size_t i = 0; i < o->n_sinks; i++) position[at++] = (int32_t)i;
    for (size_t i = layer->n_rows - o->n_window; i < layer->n_rows; i++) position[at++] = (int32_t)i;
    for (size_t i = 0; i < n; i++) position[at++] = (int32_t)(o->n_sinks + b.order[i]);
    sort_rows(keys, position, layer->n_rows, d, b.sorted);
    sort_rows(values, position, layer->n_rows, d, b.sorted);
    set_value_mean(layer, head, &value_rows, &b);
    for (uint32_t l = 0; l < layer->n_levels; l++) summarise_level(layer, head, l, &key_rows, &value_rows, &b);
    store_rows(layer, head, &layer->keys, keys, b.row);
    store_rows(layer, head, &layer->values, values, b.row);
    if (layer->codes.n_words) sqz_code_build(layer, head, b.codes);
}

/* ---- All heads of all layers -------------------------------------------------------------- */

struct item {
    size_t layer;
    uint32_t head;
};

/* Runs `work` for every head of every clustered layer, each thread with a workspace of its own. */
struct team {
    struct sqz_layer *layers;
    const struct sqz_layer_input *inputs; /* NULL: all layers are worked on, and nobody looks at theirs */
    const struct sqz_squeeze_options *options;
    void (*work)(const struct team *team, struct item item, void *workspace);
    size_t (*workspace_bytes)(const struct team *team, const struct sqz_layer *layer);
};

static bool is_worked_on(const struct team *team, size_t l)
{
    return team->layers[l].n_levels && !(team->inputs && team->inputs[l].elsewhere);
}

static enum sqz_status run_team(const struct team *team, size_t n_layers, int n_threads, sqz_build_progress progress,
                                void *user_data, struct sqz_error *error)
{
    size_t n_items = 0, bytes = 0, at = 0;
    for (size_t l = 0; l < n_layers; l++) {
        if (!is_worked_on(team, l)) continue;
        const size_t need = team->workspace_bytes(team, &team->layers[l]);
        n_items += team->layers[l].shape.n_head_kv;
        if (need > bytes) bytes = need;
    }
    if (!n_items) return SQZ_OK;
    /* Whole pages, so that threads do not share cache lines; a size that saturated stays one that cannot be had. */
    bytes = bytes <= SIZE_MAX - 4095 ? (bytes + 4095) / 4096 * 4096 : SIZE_MAX;
    struct item *items = malloc(n_items * sizeof *items);
    char *workspace = bytes <= SIZE_MAX / (size_t)n_threads ? malloc(bytes * (size_t)n_threads) : NULL;
    if (!items || !workspace) {
        free(items);
        free(workspace);
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory: %zu bytes a thread for clustering on %d threads",
                             bytes, n_threads);
    }
    for (size_t l = 0; l < n_layers; l++)
        for (uint32_t h = 0; is_worked_on(team, l) && h < team->layers[l].shape.n_head_kv; h++)
            items[at++] = (struct item){l, h};
    atomic_bool cancelled = false;
    atomic_size_t done = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
    for (size_t i = 0; i < n_items; i++) {
        if (atomic_load_explicit(&cancelled, memory_order_relaxed)) continue;
        team->work(team, items[i], workspace + bytes * (size_t)sqz_thread_number());
        const size_t so_far = atomic_fetch_add(&done, 1) + 1;
        if (sqz_thread_number() == 0 && progress && !progress(user_data, so_far, n_items)) cancelled = true;
    }
    free(items);
    free(workspace);
    if (cancelled) return sqz_error_set(error, SQZ_ERROR_CANCELLED, "cancelled");
    return SQZ_OK;
}

static struct sqz_kmeans_options kmeans_options(const struct sqz_squeeze_options *o, const struct sqz_layer *layer,
                                                size_t index)
{
    return (struct sqz_kmeans_options){.n_clusters = layer->level[0].n_clusters,
                                       .n_iterations = o->n_iterations,
                                       .metric = o->metric,
                                       .seed = o->seed + 1000 * index};
}

static void cluster_item(const struct team *team, struct item item, void *workspace)
{
    struct sqz_layer *layer = &team->layers[item.layer];
    const struct sqz_kmeans_options kmeans = kmeans_options(team->options, layer, item.layer);
    cluster_head(layer, &team->inputs[item.layer], item.head, team->options, &kmeans, workspace);
}

static size_t cluster_bytes(const struct team *team, const struct sqz_layer *layer)
{
    struct sqz_arena arena = sqz_arena_on(NULL);
    const struct sqz_kmeans_options kmeans = kmeans_options(team->options, layer, 0);
    carve_cluster(&arena, layer, &kmeans);
    return sqz_arena_bytes(&arena);
}

enum sqz_status sqz_layers_plan(struct sqz_layer *layers, const struct sqz_layer_input *inputs, size_t n_layers,
                                const struct sqz_squeeze_options *options, struct sqz_error *error)
{
    enum sqz_status status = sqz_squeeze_options_check(options, error);
    if (status != SQZ_OK) return status;
    memset(layers, 0, n_layers * sizeof *layers);
    for (size_t l = 0; l < n_layers; l++) {
        const struct sqz_layer_input *in = &inputs[l];
        status = sqz_layer_shape_check(&in->shape, error);
        if (status != SQZ_OK) return status;
        const size_t fewest = in->window_tokens ? 0 : 1; /* another part of the context may have all of a window */
        if (in->n_rows < fewest || in->n_rows > INT32_MAX)
            return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%zu rows in a layer: allowed are %zu to %d", in->n_rows,
                                 fewest, INT32_MAX);
        if (in->n_queries > in->n_rows)
            return sqz_error_set(error, SQZ_ERROR_ARGUMENT,
                                 "%zu calibration queries for %zu rows: allowed are no more "
                                 "than rows",
                                 in->n_queries, in->n_rows);
        plan_layer(&layers[l], in, options);
        struct sqz_arena count = sqz_arena_on(NULL);
        carve_layer(&layers[l], &count, options->per_head);
        layers[l].owned = malloc(sqz_arena_bytes(&count));
        if (!layers[l].owned)
            return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory: %zu bytes for the index of layer %zu",
                                 sqz_arena_bytes(&count), l);
        struct sqz_arena arena = sqz_arena_on(layers[l].owned);
        carve_layer(&layers[l], &arena, options->per_head);
    }
    return SQZ_OK;
}

void sqz_layer_take_queries(struct sqz_layer *layer, const struct sqz_layer_input *input)
{
    const size_t row = (size_t)layer->shape.n_head * layer->shape.head_dim;
    if (layer->n_queries) memcpy(writable(layer->queries), input->queries, layer->n_queries * row * sizeof(uint16_t));
}

enum sqz_status sqz_layers_cluster(struct sqz_layer *layers, const struct sqz_layer_input *inputs, size_t n_layers,
                                   const struct sqz_squeeze_options *options, int n_threads,
                                   sqz_build_progress progress, void *user_data, struct sqz_error *error)
{
    for (size_t l = 0; l < n_layers; l++) {
        if (inputs[l].elsewhere) continue; /* whoever has it took its queries, if it is for this process */
        sqz_layer_take_queries(&layers[l], &inputs[l]);
        if (layers[l].n_levels) continue;
        int32_t *position = writable(layers[l].position);
        for (uint32_t h = 0; h < layers[l].shape.n_head_kv; h++)
            for (size_t i = 0; i < layers[l].n_rows; i++) *position++ = (int32_t)(inputs[l].first_position + i);
    }
    const struct team team = {layers, inputs, options, cluster_item, cluster_bytes};
    return run_team(&team, n_layers, n_threads, progress, user_data, error);
}

/* ---- Calibration --------------------------------------------------------------------------- */

static struct sqz_head_curve curve_of(const struct sqz_layer *layer, uint32_t head)
{
    const size_t at = (size_t)head * layer->n_curve;
    return (struct sqz_head_curve){
        (float *)writable(layer->share) + at,
        (float *)writable(layer->lost_mass) + at,
        (float *)writable(layer->tail_gain) + at,
        (float *)writable(layer->variance_gain) + head,
    };
}

static void switch_tail_off(const struct sqz_layer *layer, uint32_t head)
{
    float *gain = curve_of(layer, head).tail_gain;
    for (uint32_t t = 0; t < layer->n_curve; t++) gain[t] = SQZ_TAIL_OFF;
}

void sqz_layer_set_curves(struct sqz_layer *layer, const struct sqz_curve_sums *sums, const float *gain)
{
    for (uint32_t h = 0; h < layer->shape.n_head_kv; h++) {
        const struct sqz_head_curve curve = curve_of(layer, h);
        *curve.variance_gain = gain[h];
        sqz_curve_of_sums(layer, &sums[h], &curve);
    }
}

void sqz_layer_drop_tails(struct sqz_layer *layer, const struct sqz_curve_sums *sums, const bool *keep)
{
    struct sqz_layer bare = *layer;
    bare.tail = false;
    for (uint32_t h = 0; h < layer->shape.n_head_kv; h++) {
        const struct sqz_head_curve curve = curve_of(layer, h);
        if (keep[h]) continue;
        sqz_curve_of_sums(&bare, &sums[h], &curve);
        switch_tail_off(layer, h);
    }
}

static void calibrate_head(const struct sqz_layer *layer, uint32_t head, bool fit_variance, void *workspace)
{
    const struct sqz_head_curve curve = curve_of(layer, head);
    struct sqz_curve_sums sums;
    if (!layer->shared) {
        sqz_calibrate_head(layer, head, fit_variance, &curve, workspace);
        return;
    }
    sqz_count_head(layer, head, *curve.variance_gain, &sums, workspace);
    sqz_curve_of_sums(layer, &sums, &curve);
}

static void weigh_item(const struct team *team, struct item item, void *workspace)
{
    const struct sqz_layer *layer = &team->layers[item.layer];
    float *gain = curve_of(layer, item.head).variance_gain;
    *gain = team->options->variance ? sqz_choose_variance_gain(layer, item.head, workspace) : 0.0f;
    sqz_weigh_head(layer, item.head, *gain, layer->shared->own_true, layer->shared->own_total, workspace);
}

static void calibrate_item(const struct team *team, struct item item, void *workspace)
{
    calibrate_head(&team->layers[item.layer], item.head, team->options->variance, workspace);
}

static size_t calibrate_bytes(const struct team *team, const struct sqz_layer *layer)
{
    (void)team;
    return sqz_calibrate_workspace_bytes(layer);
}

/* A whole layer at its first head, because attention runs over all heads at once. Heads that lose their tail are
 * calibrated anew without it: they read less at the same threshold. */
static void choose_tail_item(const struct team *team, struct item item, void *workspace)
{
    const struct sqz_layer *layer = &team->layers[item.layer];
    bool *keep = workspace;
    void *rest = keep + layer->shape.n_head_kv;
    if (item.head != 0 || !layer->tail) return;
    sqz_choose_tail(layer, keep, rest);
    struct sqz_layer bare = *layer;
    bare.tail = false;
    for (uint32_t h = 0; h < layer->shape.n_head_kv; h++) {
        if (keep[h]) continue;
        calibrate_head(&bare, h, team->options->variance, rest);
        switch_tail_off(layer, h);
    }
}

static size_t choose_tail_bytes(const struct team *team, const struct sqz_layer *layer)
{
    const size_t trial = sqz_choose_tail_workspace_bytes(layer), curve = calibrate_bytes(team, layer);
    return layer->shape.n_head_kv * sizeof(bool) + (trial > curve ? trial : curve);
}

/* The grid, and the mean share over all heads at each of its points: one threshold for a budget. */
void sqz_layers_join(struct sqz_layer *layers, size_t n_layers)
{
    double mean[SQZ_CURVE_POINTS] = {0}, weight = 0;
    for (size_t l = 0; l < n_layers; l++) {
        const struct sqz_layer *layer = &layers[l];
        if (!layer->n_levels) continue;
        const double rows = layer->n_rows;
        for (uint32_t h = 0; h < layer->shape.n_head_kv; h++, weight += rows)
            for (uint32_t t = 0; t < layer->n_curve; t++)
                mean[t] += rows * layer->share[(size_t)h * layer->n_curve + t];
    }
    for (size_t l = 0; l < n_layers; l++) {
        struct sqz_layer *layer = &layers[l];
        if (!layer->n_levels) continue;
        float *threshold = writable(layer->log_threshold), *global = writable(layer->global_share);
        for (uint32_t t = 0; t < layer->n_curve; t++) {
            threshold[t] = SQZ_CURVE_FIRST + SQZ_CURVE_STEP * (float)t;
            if (global) global[t] = (float)(mean[t] / weight);
        }
    }
}

enum sqz_status sqz_layers_weigh(struct sqz_layer *layers, const struct sqz_layer_input *inputs, size_t n_layers,
                                 const struct sqz_squeeze_options *options, int n_threads, sqz_build_progress progress,
                                 void *user_data, struct sqz_error *error)
{
    const struct team team = {layers, inputs, options, weigh_item, calibrate_bytes};
    return run_team(&team, n_layers, n_threads, progress, user_data, error);
}

enum sqz_status sqz_layers_count(struct sqz_layer *layers, const struct sqz_layer_input *inputs, size_t n_layers,
                                 const struct sqz_squeeze_options *options, int n_threads, sqz_build_progress progress,
                                 void *user_data, struct sqz_error *error)
{
    const struct team team = {layers, inputs, options, calibrate_item, calibrate_bytes};
    return run_team(&team, n_layers, n_threads, progress, user_data, error);
}

enum sqz_status sqz_layers_try_tails(struct sqz_layer *layers, const struct sqz_layer_input *inputs, size_t n_layers,
                                     const struct sqz_squeeze_options *options, int n_threads,
                                     sqz_build_progress progress, void *user_data, struct sqz_error *error)
{
    const struct team team = {layers, inputs, options, choose_tail_item, choose_tail_bytes};
    return run_team(&team, n_layers, n_threads, progress, user_data, error);
}

enum sqz_status sqz_layers_calibrate(struct sqz_layer *layers, size_t n_layers,
                                     const struct sqz_squeeze_options *options, int n_threads,
                                     sqz_build_progress progress, void *user_data, struct sqz_error *error)
{
    enum sqz_status status = sqz_layers_count(layers, NULL, n_layers, options, n_threads, progress, user_data, error);
    if (status != SQZ_OK) return status;
    sqz_layers_join(layers, n_layers);
    if (!options->tail) return SQZ_OK;
    status = sqz_layers_try_tails(layers, NULL, n_layers, options, n_threads, progress, user_data, error);
    if (status == SQZ_OK) sqz_layers_join(layers, n_layers);
    return status;
}
