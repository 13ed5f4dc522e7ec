/*
 * What a layer tells about itself: shape, levels, cluster sizes and the
 * calibrated curve; and what attention over layers has read. Nothing here
 * changes a layer or cares who owns its arrays.
 */
#include "layer.h"
#include "error.h"

#include <string.h>

void sqz_layer_get_info(const struct sqz_layer *layer, struct sqz_layer_info *info)
{
    memset(info, 0, sizeof *info);
    info->shape = layer->shape;
    info->n_rows = layer->n_rows;
    info->n_fixed_rows = layer->n_fixed;
    info->sliding_window = layer->sliding_window;
    info->n_levels = layer->n_levels;
    for (uint32_t i = 0; i < layer->n_levels; i++) info->n_clusters[i] = layer->level[i].n_clusters;
    info->dense_share = sqz_dense_share(layer);
}

/* What rows may be beside F16. */
enum { SMALL = 1, PLANES = 2, NONE = 4 };

static enum sqz_status check_type(const char *what, const struct sqz_rows *rows, unsigned allowed,
                                  struct sqz_error *error)
{
    if (rows->type == SQZ_ROW_F16 || ((allowed & SMALL) && rows->type == SQZ_ROW_I8) ||
        ((allowed & PLANES) && sqz_row_is_planes(rows->type)) || ((allowed & NONE) && rows->type == SQZ_ROW_NONE))
        return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%s of type %s: allowed on the CPU are F16%s%s%s", what,
                         sqz_row_type_name(rows->type), allowed & SMALL ? ", I8" : "",
                         allowed & PLANES ? ", I4, I4+4" : "", allowed & NONE ? ", none" : "");
}

enum sqz_status sqz_layer_check_host(const struct sqz_layer *layer, struct sqz_error *error)
{
    enum sqz_status status;
    if (layer->space != SQZ_SPACE_HOST)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "a layer in memory space %d: allowed here is %d, the host's",
                             (int)layer->space, SQZ_SPACE_HOST);
    if ((status = check_type("keys", &layer->keys, SMALL | PLANES, error)) ||
        (status = check_type("values", &layer->values, PLANES, error)) ||
        (status = check_type("retained keys", &layer->retained_keys, SMALL | NONE, error)))
        return status;
    for (uint32_t l = 0; l < layer->n_levels; l++)
        if ((status = check_type("centroids", &layer->level[l].centroids, SMALL, error)) ||
            (status = check_type("value centroids", &layer->level[l].value_centroids,
                                 layer->tail ? PLANES : PLANES | NONE, error)))
            return status;
    return SQZ_OK;
}

size_t sqz_layer_cluster_rows(const struct sqz_layer *layer, uint32_t head_kv, uint32_t level, uint32_t cluster)
{
    if (layer->space != SQZ_SPACE_HOST || head_kv >= layer->shape.n_head_kv || level >= layer->n_levels ||
        cluster >= layer->level[level].n_clusters)
        return 0;
    return sqz_cluster_keys(layer, head_kv, level, cluster, NULL);
}

size_t sqz_layer_curve(const struct sqz_layer *layer, uint32_t head_kv, const float **log_threshold,
                       const float **share, const float **lost_mass)
{
    const bool present = head_kv < layer->shape.n_head_kv && layer->n_curve;
    const size_t at = (size_t)head_kv * layer->n_curve;
    if (log_threshold) *log_threshold = present ? layer->log_threshold : NULL;
    if (share) *share = present ? layer->share + at : NULL;
    if (lost_mass) *lost_mass = present ? layer->lost_mass + at : NULL;
    return present ? layer->n_curve : 0;
}

static const struct sqz_rows *first_i8_rows(const struct sqz_layer *layer)
{
    if (layer->n_levels && layer->level[0].centroids.type == SQZ_ROW_I8) return &layer->level[0].centroids;
    if (layer->keys.type == SQZ_ROW_I8) return &layer->keys;
    return layer->retained_keys.type == SQZ_ROW_I8 ? &layer->retained_keys : NULL;
}

bool sqz_layer_has_mean(const struct sqz_layer *layer)
{
    return first_i8_rows(layer) != NULL;
}

const float *sqz_layer_mean(const struct sqz_layer *layer)
{
    const struct sqz_rows *rows = first_i8_rows(layer);
    return rows ? rows->mean : NULL;
}

static void set_mean(struct sqz_rows *rows, const float *mean)
{
    if (rows->type == SQZ_ROW_I8) rows->mean = mean;
}

void sqz_layer_set_mean(struct sqz_layer *layer, const float *mean)
{
    set_mean(&layer->keys, mean);
    set_mean(&layer->retained_keys, mean);
    for (uint32_t l = 0; l < layer->n_levels; l++) set_mean(&layer->level[l].centroids, mean);
}

void sqz_layer_plan_planes(struct sqz_layer *layer, enum sqz_row_format format)
{
    const struct sqz_planes planes = {.n_whole = layer->n_fixed};
    const enum sqz_row_type type = format == SQZ_ROWS_INT4 ? SQZ_ROW_I4 : SQZ_ROW_I44;
    layer->keys = layer->values = (struct sqz_rows){.type = type, .planes = planes};
    for (uint32_t l = 0; l < layer->n_levels; l++)
        if (layer->level[l].value_centroids.type) layer->level[l].value_centroids.type = SQZ_ROW_I44;
}

void sqz_layer_join_planes(struct sqz_layer *layer)
{
    if (sqz_row_is_planes(layer->keys.type) && layer->n_levels) {
        const struct sqz_level *level = &layer->level[0];
        const struct sqz_rows *centroids = &level->centroids;
        layer->keys.planes.centres = (struct sqz_centres){centroids->type, centroids->data, centroids->scale,
                                                          centroids->mean, level->offset,   level->n_clusters};
    }
    for (uint32_t l = 0; l < layer->n_levels; l++)
        if (sqz_row_is_planes(layer->level[l].value_centroids.type))
            layer->level[l].value_centroids.mean = layer->values.mean;
}

struct sqz_layer sqz_layer_head(const struct sqz_layer *layer, uint32_t h)
{
    struct sqz_layer head = *layer;
    const size_t d = layer->shape.head_dim;
    head.shape.n_head = layer->shape.n_head / layer->shape.n_head_kv;
    head.shape.n_head_kv = 1;
    head.keys = sqz_rows_of_head(&layer->keys, layer->n_rows, d, h);
    head.values = sqz_rows_of_head(&layer->values, layer->n_rows, d, h);
    head.retained_keys = sqz_rows_of_head(&layer->retained_keys, layer->n_rows, d, h);
    for (uint32_t l = 0; l < layer->n_levels; l++) {
        struct sqz_level *level = &head.level[l];
        const size_t at = (size_t)h * level->n_clusters;
        level->centroids = sqz_rows_of_head(&level->centroids, level->n_clusters, d, h);
        level->value_centroids = sqz_rows_of_head(&level->value_centroids, level->n_clusters, d, h);
        level->offset += at + h;
        level->variance += at;
    }
    if (layer->codes.n_words) {
        struct sqz_codes *codes = &head.codes;
        codes->words += (size_t)h * codes->n_words * (layer->n_rows - layer->n_fixed);
        codes->directions += h * codes->n_directions * d;
        codes->book += (size_t)h * 16 * codes->n_directions;
        codes->first += h * (8 * codes->n_words + 1);
        codes->spread += (size_t)h * codes->n_directions;
    }
    head.share = layer->share ? layer->share + (size_t)h * layer->n_curve : NULL;
    head.lost_mass = layer->lost_mass ? layer->lost_mass + (size_t)h * layer->n_curve : NULL;
    head.tail_gain = layer->tail_gain ? layer->tail_gain + (size_t)h * layer->n_curve : NULL;
    head.variance_gain = layer->variance_gain ? layer->variance_gain + h : NULL;
    return head;
}

double sqz_attention_stats_share(const struct sqz_attention_stats *stats)
{
    const double read = (double)stats->centroid_bytes + (double)stats->key_bytes + (double)stats->value_bytes;
    return stats->context_bytes ? read / (double)stats->context_bytes : 0.0;
}

void sqz_attention_stats_add(struct sqz_attention_stats *sum, const struct sqz_attention_stats *stats)
{
    sum->context_bytes += stats->context_bytes;
    sum->centroid_bytes += stats->centroid_bytes;
    sum->key_bytes += stats->key_bytes;
    sum->value_bytes += stats->value_bytes;
    sum->n_selections += stats->n_selections;
    sum->retained_keys += stats->retained_keys;
    sum->total_keys += stats->total_keys;
    sum->coded_keys += stats->coded_keys;
}
