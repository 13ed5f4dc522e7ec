/*
 * What a layer tells about itself: shape, levels, cluster sizes and the
 * calibrated curve. Nothing here changes a layer or cares who owns its arrays.
 */
#include "layer.h"

#include <string.h>

void sqz_layer_get_info(const struct sqz_layer *layer, struct sqz_layer_info *info)
{
    memset(info, 0, sizeof *info);
    info->shape = layer->shape;
    info->n_rows = layer->n_rows;
    info->n_fixed_rows = layer->n_fixed;
    info->sliding_window = layer->sliding_window;
    info->n_levels = layer->n_levels;
    for (uint32_t i = 0; i < layer->n_levels; i++)
        info->n_clusters[i] = layer->level[i].n_clusters;
}

size_t sqz_layer_cluster_rows(const struct sqz_layer *layer, uint32_t head_kv, uint32_t level, uint32_t cluster)
{
    if (head_kv >= layer->shape.n_head_kv || level >= layer->n_levels || cluster >= layer->level[level].n_clusters)
        return 0;
    /* A cluster is one range of the level below, so its two ends lead down to its first and last row. */
    uint32_t begin = cluster, end = cluster + 1;
    for (uint32_t i = level + 1; i-- > 0;) {
        const uint32_t *offset = layer->level[i].offset + (size_t)head_kv * ((size_t)layer->level[i].n_clusters + 1);
        begin = offset[begin];
        end = offset[end];
    }
    return end - begin;
}

size_t sqz_layer_curve(const struct sqz_layer *layer, uint32_t head_kv, const float **log_threshold,
                       const float **share, const float **lost_mass)
{
    const bool present = head_kv < layer->shape.n_head_kv && layer->n_curve;
    const size_t at = (size_t)head_kv * layer->n_curve;
    if (log_threshold)
        *log_threshold = present ? layer->log_threshold : NULL;
    if (share)
        *share = present ? layer->share + at : NULL;
    if (lost_mass)
        *lost_mass = present ? layer->lost_mass + at : NULL;
    return present ? layer->n_curve : 0;
}
