/*
 * Layers and rows: what attention over clustered keys reads, in the memory of a
 * CPU or a GPU; no model needed. lib/ builds layers, store/ points them at a
 * mapped file, squeeze_cuda.h takes those whose arrays lie on the device.
 *
 * Letters as in squeeze.h: H query heads, K key-value heads, N rows (keys) of a
 * head, D head dimension, C clusters. Arrays are contiguous, the slowest
 * dimension first.
 */
#ifndef SQUEEZE_ATTENTION_H
#define SQUEEZE_ATTENTION_H

#include "squeeze.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Rows ------------------------------------------------------------------ */

/* How a row of D numbers is kept. */
enum sqz_row_type {
    SQZ_ROW_NONE = 0, /* there are no rows */
    SQZ_ROW_F16 = 1,
    SQZ_ROW_BF16 = 2, /* on GPUs alone */
    SQZ_ROW_I8 = 3,   /* INT8, -127 to 127, times one scale a row, relative to the head's mean row */
    SQZ_ROW_I4 = 4,   /* 4 bits, turned, relative to a cluster's centroid or the head's mean row: struct sqz_planes */
    SQZ_ROW_I44 = 5   /* 4 + 4 bits: the same numbers with their next 4 bits, in a plane of their own */
};

/* What rows of 4 bits are relative to where that is the centroid of their cluster: clusters of [offset[c], offset[c + 1])
 * rows, counted behind the first n_whole. */
struct sqz_centres {
    enum sqz_row_type type; /* of the centroids: F16 or I8; NONE: the rows are relative to their mean */
    const void *data;
    const float *scale, *mean;
    const uint32_t *offset; /* [K][n + 1] */
    uint32_t n;
};

/*
 * Rows of 4 and of 4 + 4 bits. A row less what it is relative to is turned (an orthonormal Hadamard matrix for every run
 * of as many numbers as the largest power of two that divides D, which is its own inverse); what it is turned into is
 * (u + 1/2) * step, u from -8 to 7, and with the lower plane (u' + 1/2) * step / 16, u' from -128 to 127, whose upper 4
 * bits are u. A plane has sqz_plane_bytes(D) bytes a row, 16 for every 32 numbers, missing ones 0: byte i has number i
 * in its lower half and number i + 16 in its upper one; those of the upper plane are u + 8, of the lower one the lower
 * 4 bits of u'. The first n_whole rows are not rounded and in no plane.
 */
struct sqz_planes {
    const uint8_t *lower;  /* [K][n - n_whole][plane bytes]; NULL with I4 */
    const uint16_t *step;  /* F16 [K][n - n_whole] */
    const uint16_t *whole; /* F16 [K][n_whole][D] */
    uint32_t n_whole;
    struct sqz_centres centres;
};

/* Rows of all heads, n of each: keys, values or centroids. */
struct sqz_rows {
    enum sqz_row_type type;
    const void *data;         /* [K][n][D] numbers of the type; of I4 and I44 the upper plane, [K][n - n_whole] rows */
    const float *scale;       /* [K][n] what a row's numbers are to be multiplied by; I8, NULL with the others */
    const float *mean;        /* [K][D] what is to be added to a row then; I8, and I4 and I44 without centres */
    struct sqz_planes planes; /* I4 and I44; zeros with the others */
};

static inline bool sqz_row_is_planes(enum sqz_row_type type)
{
    return type == SQZ_ROW_I4 || type == SQZ_ROW_I44;
}

/* Bytes of a row in a plane. */
static inline size_t sqz_plane_bytes(size_t head_dim)
{
    return (head_dim + 31) / 32 * 16;
}

/* Bytes of a row's numbers in `data`, and of all that is read of it: its scale, too. */
static inline size_t sqz_row_data_bytes(enum sqz_row_type type, size_t head_dim)
{
    if (sqz_row_is_planes(type)) return sqz_plane_bytes(head_dim);
    return type == SQZ_ROW_NONE ? 0 : type == SQZ_ROW_I8 ? head_dim : head_dim * sizeof(uint16_t);
}
static inline size_t sqz_row_bytes(enum sqz_row_type type, size_t head_dim)
{
    const size_t lower = type == SQZ_ROW_I44 ? sqz_plane_bytes(head_dim) : 0;
    return sqz_row_data_bytes(type, head_dim) + lower +
           (type == SQZ_ROW_I8        ? sizeof(float)
            : sqz_row_is_planes(type) ? sizeof(uint16_t)
                                      : 0);
}

/* The numbers of row `row` of a head whose heads have n_rows rows each. */
static inline const void *sqz_row_at(const struct sqz_rows *rows, size_t n_rows, size_t head_dim, size_t head_kv,
                                     size_t row)
{
    const size_t n_whole = rows->planes.n_whole;
    if (row < n_whole) return rows->planes.whole + (head_kv * n_whole + row) * head_dim;
    return (const char *)rows->data +
           (head_kv * (n_rows - n_whole) + row - n_whole) * sqz_row_data_bytes(rows->type, head_dim);
}

struct sqz_shared_queries;

/* ---- Layers ---------------------------------------------------------------- */

/* Where the arrays of a layer are. */
enum sqz_memory_space {
    SQZ_SPACE_HOST = 0,
    SQZ_SPACE_CUDA = 1 /* memory of the current CUDA device; arrays begin at multiples of 16 bytes */
};

/* One level of clusters; 0 is the finest. */
struct sqz_level {
    uint32_t n_clusters;             /* C, the same for every head of the layer; 1 <= C */
    struct sqz_rows centroids;       /* C a head: mean of the cluster's raw keys; F16 or I8, on GPUs also BF16 */
    struct sqz_rows value_centroids; /* C a head: mean of its values; NONE without tail */
    const uint32_t *offset;          /* [K][C + 1], increasing strictly: cluster c is [offset[c], offset[c+1]) of the
                                        level below, for level 0 of the clustered rows (row = n_fixed + offset) */
    const float *variance;           /* [K][C] mean squared distance of the raw keys to the centroid; on GPUs NULL: 0 */
};

/* Codes of single keys: where a key lies around its centroid, product quantised in the directions that the head's
 * queries look along. lib/codes.h says how they are made and read. */
struct sqz_codes {
    uint32_t n_words;           /* W 32-bit words a key, up to 4, 8 codes of 4 bits in each; 0: there are none */
    uint32_t n_directions;      /* M directions of a head that are coded, up to D */
    const uint32_t *words;      /* [K][W][n_rows - n_fixed] */
    const uint16_t *directions; /* F16 [K][M][D], whatever the rows' type */
    const uint16_t *book;       /* F16 [K][16][M] what each code stands for along the directions of its part */
    const uint32_t *first;      /* [K][8W + 1] part p of a key has the directions [first[p], first[p + 1]) */
    const float *spread;        /* [K][M] variance of the keys along a direction, for a cluster of variance 1 */
};

/*
 * The keys and values of one layer, clustered, sorted and calibrated. The struct
 * itself is in host memory.
 *
 * Rows of each KV head: [0, n_fixed) are always retained (sinks and window in
 * position order, or the whole layer when n_levels is 0); [n_fixed, n_rows) are
 * sorted by cluster, coarsest level first, so a cluster of any level is one
 * range of the level below and one range of rows.
 */
struct sqz_layer {
    enum sqz_memory_space space;
    struct sqz_layer_shape shape;
    uint32_t n_rows, n_fixed;
    struct sqz_rows keys, values; /* n_rows a head */

    uint32_t n_levels;                      /* 0: not clustered */
    struct sqz_level level[SQZ_MAX_LEVELS]; /* 0 is the finest */
    struct sqz_codes codes;
    enum sqz_rule rule; /* PAPER: the softmax of the lookup is over clusters alone, as published */
    enum sqz_group group;
    const void *plane_index; /* on GPUs, of keys and values in planes: what sqz_cuda_plane_index() made; else NULL */

    /* ---- From here on in host memory alone: not looked at on GPUs ---- */

    struct sqz_rows retained_keys; /* the keys again, n_rows a head: what is read of them where a lookup retained them
                                      and a query chose alone; NONE: keys are */
    const int32_t *position;       /* [K][n_rows] position in the context of every row */
    bool sliding_window;           /* rows are the last n_rows positions of the context, in order */
    uint32_t n_window_tokens;      /* with sliding_window: a query at p sees positions > p - n_window_tokens */
    bool tail, value_skip;

    /* Calibration; absent (n_curve 0) when n_levels is 0. */
    uint32_t n_curve;           /* points P */
    const float *log_threshold; /* [P] increasing; the same for every head of a context */
    const float *share;         /* [K][P] share of the head's KV bytes read at a point, decreasing */
    const float *lost_mass;     /* [K][P] attention mass of what was pruned */
    const float *tail_gain;     /* [K][P] g of docs/method.md, natural log */
    const float *variance_gain; /* [K] a of docs/method.md; 0: off */
    const float *global_share;  /* [P] mean share over all layers and heads; NULL: thresholds are per head */

    /* Queries kept for calibration, F16 [n_queries][H][D]; may be absent. */
    const uint16_t *queries;
    uint32_t n_queries;
    const struct sqz_shared_queries *shared; /* while a part of a context is calibrated (lib/shards.h); else NULL */

    /* Of keys and values in a file larger than memory: told what is retained before it is read, so that the disk can be
     * asked for all of it at once in place of a page at a time. NULL: nobody wants to know. Called by any thread. */
    void (*will_read)(const void *begin, size_t bytes);

    void *owned; /* one block that holds all arrays above; NULL when they belong to a file */
};

#ifdef __cplusplus
}
#endif

#endif /* SQUEEZE_ATTENTION_H */
