/*
 * struct sqz_layer: one attention layer's squeezed keys and values, as every
 * room reads it. lib/ builds one in memory, store/ points one at a mapped
 * file; the kernels do not care which.
 *
 * Rows of each KV head: [0, n_fixed) are always retained (sinks and window in
 * position order, or the whole layer when n_levels is 0); [n_fixed, n_rows) are
 * sorted by cluster, coarsest level first, so a cluster of any level is one
 * range of the level below and one range of rows.
 */
#ifndef SQZ_LIB_LAYER_H
#define SQZ_LIB_LAYER_H

#include "squeeze.h"

struct sqz_level {
    uint32_t n_clusters;          /* C, the same for every head of the layer; 1 <= C */
    const uint16_t *centroids;    /* F16 [K][C][D] mean of the cluster's raw keys; NULL with an INT8 index, which has */
    const int8_t *centroids_i8;   /* [K][C][D] in their place, times */
    const float *centroid_scale;  /* [K][C] */
    const uint16_t *value_centroids; /* F16 [K][C][D] mean of its values; NULL without tail */
    const uint32_t *offset;       /* [K][C + 1], increasing strictly: cluster c is [offset[c], offset[c+1]) of the level
                                     below, for level 0 of the clustered rows (row = n_fixed + offset) */
    const float *variance;        /* [K][C] mean squared distance of the raw keys to the centroid */
};

/* Codes of single keys: where a key lies around its centroid, product quantised in the directions that the head's
 * queries look along. codes.h says how they are made and read. */
struct sqz_codes {
    uint32_t n_words;             /* W 32-bit words a key, 8 codes of 4 bits in each; 0: there are none */
    uint32_t n_directions;        /* M directions of a head that are coded */
    const uint32_t *words;        /* [K][W][n_rows - n_fixed] */
    const uint16_t *directions;   /* F16 [K][M][D] */
    const uint16_t *book;         /* F16 [K][16][M] what each code stands for along the directions of its part */
    const uint32_t *first;        /* [K][8W + 1] part p of a key has the directions [first[p], first[p + 1]) */
    const float *spread;          /* [K][M] variance of the keys along a direction, for a cluster of variance 1 */
};

struct sqz_layer {
    struct sqz_layer_shape shape;
    uint32_t n_rows, n_fixed;
    bool sliding_window;          /* rows are the last n_rows positions of the context, in order */
    uint32_t n_window_tokens;     /* with sliding_window: a query at p sees positions > p - n_window_tokens */
    const uint16_t *keys, *values; /* F16 [K][n_rows][D] */
    const int8_t *keys_i8;        /* [K][n_rows][D] the keys as INT8, times */
    const float *key_scale;       /* [K][n_rows]; both NULL where retained keys are read as F16 */
    const float *key_mean;        /* [K][D] what INT8 centroids and keys are relative to; NULL where neither is INT8 */
    const int32_t *position;      /* [K][n_rows] position in the context of every row */

    uint32_t n_levels;            /* 0: not clustered */
    struct sqz_level level[SQZ_MAX_LEVELS]; /* 0 is the finest */
    struct sqz_codes codes;
    enum sqz_rule rule;           /* PAPER: the softmax of the lookup is over clusters alone, as published */
    bool tail, value_skip;
    enum sqz_group group;
    enum sqz_index index;         /* of the centroids */
    enum sqz_index key_format;    /* of retained keys */

    /* Calibration; absent (n_curve 0) when n_levels is 0. */
    uint32_t n_curve;             /* points P */
    const float *log_threshold;   /* [P] increasing; the same for every head of a context */
    const float *share;           /* [K][P] share of the head's KV bytes read at a point, decreasing */
    const float *lost_mass;       /* [K][P] attention mass of what was pruned */
    const float *tail_gain;       /* [K][P] g of docs/method.md, natural log */
    const float *variance_gain;   /* [K] a of docs/method.md; 0: off */
    const float *global_share;    /* [P] mean share over all layers and heads; NULL: thresholds are per head */

    /* Queries kept for calibration, F16 [n_queries][H][D]; may be absent. */
    const uint16_t *queries;
    uint32_t n_queries;

    /* Of keys and values in a file larger than memory: told what is retained before it is read, so that the disk can be
     * asked for all of it at once in place of a page at a time. NULL: nobody wants to know. Called by any thread. */
    void (*will_read)(const void *begin, size_t bytes);

    void *owned;                  /* one block that holds all arrays above; NULL when they belong to a file */
};

/* One KV head as a layer of its own; points into the layer's arrays. */
struct sqz_layer sqz_layer_head(const struct sqz_layer *layer, uint32_t head_kv);

/* Keys of a cluster of any level; *first, when asked for, becomes its first row. A cluster is one range of the level
 * below, so its two ends lead down to its rows. */
static inline uint32_t sqz_cluster_keys(const struct sqz_layer *layer, uint32_t head_kv, uint32_t level,
                                        uint32_t cluster, uint32_t *first)
{
    uint32_t begin = cluster, end = cluster + 1;
    for (uint32_t l = level + 1; l-- > 0;) {
        const uint32_t *offset = layer->level[l].offset + (size_t)head_kv * (layer->level[l].n_clusters + 1);
        begin = offset[begin];
        end = offset[end];
    }
    if (first) *first = layer->n_fixed + begin;
    return end - begin;
}

#endif
