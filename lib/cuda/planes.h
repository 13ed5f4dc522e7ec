/*
 * Rows in planes (struct sqz_planes, squeeze_attention.h) on a GPU: what stands beside them there, attention that
 * reads them, and F16 rows made of them for whoever has no kernel for them.
 *
 * Groups are those of ops.h: 8 neighbouring rows of a head, fixed ones included.
 */
#ifndef SQZ_LIB_CUDA_PLANES_H
#define SQZ_LIB_CUDA_PLANES_H

#include "ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Keys or values of all heads. N - F rows of a head are in planes, the first F are not rounded. */
struct sqz_cuda_planes {
    const uint8_t *upper, *lower; /* [K][N - F][D / 2]; lower NULL: there is none, or it is not to be read */
    const uint16_t *whole;        /* F16 [K][F][D] */
};

/* A layer's keys and values. Keys are relative to their clusters' centroids, values to their mean. */
struct sqz_cuda_plane_layer {
    uint32_t n_head_kv, head_dim, n_rows, n_whole; /* K, D, N, F */
    struct sqz_cuda_planes keys, values;
    const float *value_mean;        /* [K][D] */
    uint32_t n_clusters;            /* C */
    struct sqz_cuda_rows centroids; /* [K][C][D] F16, or INT8 with scale and mean */

    /* Made of steps and offsets by sqz_cuda_plane_index_launch(): */
    uint32_t *steps;   /* [K][N - F] F16 steps of a key (lower half) and of its value, that over value_unit */
    uint32_t *place;   /* [K][ceil(N / 8)] of a group's first row in planes the cluster, times 256, and bit i where
                          row i of the group begins the next one */
    float *value_unit; /* [K] a power of two, not below any step of a value */
};

/* Of [K][N - F] F16 steps and [K][C + 1] offsets of clusters among the rows behind the first F. */
enum sqz_status sqz_cuda_plane_index_launch(const struct sqz_cuda_plane_layer *layer, const uint16_t *key_step,
                                            const uint16_t *value_step, const uint32_t *offset, void *stream);

/* All rows as F16, [K][N][D] each. With the lower planes where there are any. */
enum sqz_status sqz_cuda_planes_to_f16_launch(const struct sqz_cuda_plane_layer *layer, void *keys, void *values,
                                              void *stream);

/* What these calls are told of a layer: host arithmetic alone. index: as sqz_cuda_plane_index() has it. */
struct sqz_cuda_plane_layer sqz_cuda_plane_layer_of(const struct sqz_layer *layer, const void *index);

/* The type of all that is not in planes. */
static inline enum sqz_row_type sqz_cuda_number_type(const struct sqz_layer *layer)
{
    return sqz_row_is_planes(layer->keys.type) ? SQZ_ROW_F16 : layer->keys.type;
}

/* Whether attention can read such rows: head dimensions 64 and 128, clusters below 2^24. */
bool sqz_cuda_planes_supported(const struct sqz_cuda_plane_layer *layer);

/* ---- Own rows (user_planes.cu) ---- */

/* Arrays of a sequence's own rows in planes, N a head, one behind the other: offsets in bytes. Lower planes come last, so that
 * where the others are does not depend on them. */
struct sqz_cuda_user_places {
    size_t unit;      /* float [K] a power of two, not below any step of a value */
    size_t centroids; /* F16 [K][N / 128][D] */
    size_t steps;     /* uint32_t [K][N] as struct sqz_cuda_plane_layer's */
    size_t upper[2];  /* [K][N][D / 2] of keys, of values */
    size_t lower[2];
};

#ifdef __CUDACC__
__host__ __device__
#endif
    static inline struct sqz_cuda_user_places
    sqz_cuda_user_places_of(uint32_t n_head_kv, uint32_t head_dim, uint32_t n_rows)
{
    const size_t rows = (size_t)n_head_kv * n_rows, plane = rows * (head_dim / 2);
    struct sqz_cuda_user_places at;
    at.unit = 0;
    at.centroids = ((size_t)n_head_kv * sizeof(float) + 255) / 256 * 256;
    at.steps = at.centroids + rows / SQZ_CUDA_USER_BLOCK * head_dim * sizeof(uint16_t);
    at.upper[0] = at.steps + rows * sizeof(uint32_t);
    at.upper[1] = at.upper[0] + plane;
    at.lower[0] = at.upper[1] + plane;
    at.lower[1] = at.lower[0] + plane;
    return at;
}

/* Rows [first, end) of a sequence as F16: those before n_plane_rows from planes, the others from F16 rows. */
struct sqz_cuda_user_rows {
    const struct sqz_layer *layer;
    const void *planes;
    uint32_t plane_capacity_rows, n_plane_rows;
    const void *user_keys, *user_values; /* F16 [K][user_capacity_rows][D], from row user_first_row on */
    uint32_t user_capacity_rows, user_first_row;
    uint32_t first, end, n_rows;
    void *keys, *values; /* F16 [K][n_rows][D] out */
};
enum sqz_status sqz_cuda_user_rows_launch(const struct sqz_cuda_user_rows *args, void *stream);

/* Attention of one token of each of B sequences over rows in planes, those that were not rounded, and own F16 rows. */
struct sqz_cuda_attend_planes {
    struct sqz_cuda_plane_layer layer;
    uint32_t n_head, n_sequences;
    float scale;
    bool together;       /* all sequences read the same rows, once for up to 16 query rows of a head: everything, or one
                            list a head; and no own rows */
    const void *queries; /* F16 [B][H][D] */
    const uint32_t *groups, *n_groups; /* [B][K][group_capacity], [B][K], together without B; NULL: all rows. A list
                                          begins with all groups that have rows that are in no plane */
    uint32_t group_capacity;
    const void *user_keys, *user_values; /* as in struct sqz_cuda_attend_rows */
    uint32_t user_capacity_rows, n_user;
    const uint32_t *user_rows; /* these two are there before the kernel before this one begins */
    const struct sqz_cuda_user *users;
    uint32_t n_tail; /* partial results that come along */
    const struct sqz_cuda_part *tail_parts;
    const float *tail_out;
    uint32_t n_blocks;           /* thread blocks of a pass of query rows */
    struct sqz_cuda_part *parts; /* [sqz_cuda_attend_planes_slots()][query rows of a pair: G, together B G] scratch */
    float *part_out;             /* the same, [D] of each */
    uint32_t *arrived;           /* [sqz_cuda_attend_planes_counters()] zeros, which they are again when it is done */
    void *out;                   /* F16 [B][H][D], or */
    float *out_f32;              /* in its place, or */
    float *lse;                  /* [B][H] or NULL */
    struct sqz_cuda_part *to_parts; /* in place of all three: part `to` of n_to of [B][K][n_to][G], */
    float *to_out;                  /* [B][K][n_to][G][D] */
    uint32_t n_to, to;
    /* The users' own rows in planes in place of the layer's, of which head_dim, value_mean, n_head_kv and whether there are
     * lower planes are looked at; no groups, no other own rows, nothing that comes along; with to_parts. */
    bool of_users;
    struct sqz_cuda_part
        *base_parts; /* receives the same as to_parts: the last of n_base, [B][K][n_base][G]; or NULL */
    uint32_t n_base;
};
uint32_t sqz_cuda_attend_planes_slots(const struct sqz_cuda_attend_planes *args);
uint32_t sqz_cuda_attend_planes_counters(const struct sqz_cuda_attend_planes *args);
enum sqz_status sqz_cuda_attend_planes_launch(const struct sqz_cuda_attend_planes *args, bool after_ours, void *stream);

#ifdef __cplusplus
}
#endif

#endif
