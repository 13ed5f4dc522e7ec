/*
 * Inside clustering on the GPU: the steps that cluster.cu puts in order, each a
 * launcher. All work on all heads at once; arrays are per head, [K][...].
 *
 * A centre c of head h stands as d = c - mean(h), rounded to the keys' type, and
 * bias = mean.d + |d|^2 / 2, so that a product of 16-bit numbers with F32 sums,
 *     score(x, c) = x.d - bias = (x - mean).d - |d|^2 / 2,
 * orders centres by distance to x: |x - c|^2 = |x - mean|^2 - 2 score. Without the mean
 * rounding would be relative to it, and keys have means far from 0.
 *
 * Results do not depend on the order in which thread blocks run: sorts are stable,
 * sums go through members in ascending order, the best centre is a maximum.
 */
#ifndef SQZ_LIB_CUDA_CLUSTER_CUH
#define SQZ_LIB_CUDA_CLUSTER_CUH

#include "device.cuh"

enum {
    SQZ_CLUSTER_PROBES = 2 /* groups that a key looks into, in a pass */,
    SQZ_CLUSTER_TILE = 128 /* keys of a thread block */
};

/* Of every step. */
struct sqz_cluster_keys {
    enum sqz_row_type type;
    uint32_t n_heads, n_rows, head_dim;
    const void *keys;  /* [K][N][D] */
    const float *mean; /* [K][D] */
};

/* Item i of a list stands for row i * times / over. */
struct sqz_cluster_rows {
    uint32_t n, times, over;
    __host__ __device__ uint32_t row(uint32_t i) const
    {
        return (uint32_t)((uint64_t)i * times / over);
    }
};

struct sqz_cluster_centres {
    uint32_t n; /* of a head */
    void *d;    /* type [K][n][D] */
    float *bias;
};

/* A list of rows sorted by group: group g has items [start[g], start[g + 1]), in tiles of SQZ_CLUSTER_TILE from
 * tile_start[g] on. */
struct sqz_cluster_list {
    uint32_t capacity, n_groups;
    const uint32_t *row;        /* [K][capacity] */
    const uint32_t *start;      /* [K][G + 1] */
    const uint32_t *tile_start; /* [K][G + 1] */
};

/* ---- cluster_assign.cu: products ---------------------------------------------------- */

/* mean of some 4,096 rows of every head. */
enum sqz_status sqz_cluster_mean(const sqz_cluster_keys &k, float *mean, void *stream);
/* self[row] = |x - mean|^2 */
enum sqz_status sqz_cluster_self(const sqz_cluster_keys &k, float *self, void *stream);
/* The n_probes nearest centres of every row, nearest first: probe [K][n][n_probes], n_centres where there are no more;
 * score: with the nearest; or NULL. n_probes is 1 or SQZ_CLUSTER_PROBES. */
enum sqz_status sqz_cluster_nearest(const sqz_cluster_keys &k, const sqz_cluster_rows &rows,
                                    const sqz_cluster_centres &centres, uint32_t n_probes, uint32_t *probe,
                                    float *score, void *stream);
/* best[row] = max(best[row], score and number of the nearest of the group's centres) for every row of the list. Those of
 * group g are the centres number[first[g]] to number[first[g + 1] - 1], or, where number is NULL, base + first[g] to
 * base + first[g + 1] - 1; number: [K][centres.n], first: [K][G + 1]. */
enum sqz_status sqz_cluster_compare(const sqz_cluster_keys &k, const sqz_cluster_list &list,
                                    const sqz_cluster_centres &centres, const uint32_t *number, const uint32_t *first,
                                    uint32_t base, unsigned long long *best, void *stream);
/* The group of every centre: group [K][centres.n]. half_square: [K][groups.n] scratch. */
enum sqz_status sqz_cluster_group_centres(const sqz_cluster_keys &k, const sqz_cluster_centres &centres,
                                          const sqz_cluster_centres &groups, float *half_square, uint32_t *group,
                                          void *stream);

/* A score and a centre as one number, larger for larger scores, then for smaller centres; 0: none. */
__device__ __forceinline__ unsigned long long sqz_cluster_pack(float score, uint32_t centre)
{
    const uint32_t bits = __float_as_uint(score), ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (unsigned long long)ordered << 32 | (uint32_t)~centre;
}
__device__ __forceinline__ float sqz_cluster_score(unsigned long long best)
{
    const uint32_t ordered = (uint32_t)(best >> 32);
    return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
__device__ __forceinline__ uint32_t sqz_cluster_centre(unsigned long long best)
{
    return ~(uint32_t)best;
}

/* ---- cluster_sort.cu ------------------------------------------------------------------- */

/* Keys below n_keys and the rows that they belong to, sorted by key, equal ones as they stood. */
struct sqz_cluster_sort {
    uint32_t n_heads, n_keys;
    sqz_cluster_rows rows; /* what item i is */
    uint32_t capacity;     /* stride of the arrays below, >= rows.n */
    const uint32_t *keys;  /* [K][capacity] left as they are */
    uint32_t *scratch[4];  /* [K][capacity] */
    uint32_t *sorted;      /* [K][capacity] out: rows */
    uint32_t *start;       /* [K][start_stride] out: where keys 0 to n_starts - 1 begin */
    uint32_t n_starts, start_stride;
    uint32_t *histogram; /* sqz_cluster_histogram_words() */
};
size_t sqz_cluster_histogram_words(uint32_t n_heads, uint32_t n);
enum sqz_status sqz_cluster_sort_launch(const sqz_cluster_sort &s, void *stream);
/* tile_start of a list from its start. */
enum sqz_status sqz_cluster_tiles(uint32_t n_heads, uint32_t n_groups, const uint32_t *start, uint32_t *tile_start,
                                  void *stream);

/* ---- cluster_seed.cu --------------------------------------------------------------------- */

/* Makes centres [first, first + n) of every head rows: row at[i], [K][n], or, where at is NULL, one out of every n-th part
 * of the rows. */
enum sqz_status sqz_cluster_take_rows(const sqz_cluster_keys &k, const sqz_cluster_centres &centres, uint32_t first,
                                      uint32_t n, const uint32_t *at, uint64_t seed, void *stream);

/* Rows drawn by what they cost, in the order of the groups. */
struct sqz_cluster_draw {
    uint32_t n_heads, n_rows, n_wanted, n_groups;
    uint64_t seed;
    const uint32_t *row;            /* [K][N] sorted by group */
    const uint32_t *start;          /* [K][G + 1] */
    const float *self, *home;       /* [K][N] by row; home: score with the group's centre, where best is 0 */
    const unsigned long long *best; /* [K][N] by row */
    double *sums;                   /* [K][sqz_cluster_draw_chunks() + 1] scratch */
    uint32_t *drawn, *place;        /* [K][n_wanted] out: rows, and their places in `row` */
    uint32_t *first;                /* [K][G + 1] out: how many were drawn before group g */
};
uint32_t sqz_cluster_draw_chunks(uint32_t n_rows);
enum sqz_status sqz_cluster_draw_launch(const sqz_cluster_draw &d, void *stream);

/* ---- cluster_update.cu ------------------------------------------------------------------- */

struct sqz_cluster_update {
    sqz_cluster_keys k;
    const uint32_t *row, *start; /* [K][capacity], [K][start_stride]: members */
    uint32_t capacity, start_stride;
    sqz_cluster_centres centres; /* in and out: of an empty cluster it stays what it is */
    unsigned long long *best;    /* [K][N] out: members' scores with the new centre; or NULL */
    /* At the end: */
    const float *self;           /* [K][N] */
    float *centroids, *variance; /* [K][C][D], [K][C]; or NULL */
    double *cost;                /* [K][C] summed squared distances; or NULL */
};
enum sqz_status sqz_cluster_update_launch(const sqz_cluster_update &u, void *stream);
/* assignment[row] of best[row]; where that is 0, both after a comparison with all centres. */
enum sqz_status sqz_cluster_unpack(const sqz_cluster_keys &k, const sqz_cluster_centres &centres,
                                   unsigned long long *best, uint32_t *assignment, void *stream);
/* objective[head] = sum of cost / N. */
enum sqz_status sqz_cluster_objective(uint32_t n_heads, uint32_t n_rows, uint32_t n_clusters, const double *cost,
                                      float *objective, void *stream);

/* Gives every empty cluster a row that is far from the centre it has, of a cluster that keeps another. */
struct sqz_cluster_repair {
    uint32_t n_heads, n_rows, n_clusters;
    const float *self;
    const unsigned long long *best;
    const uint32_t *row, *start; /* [K][N], [K][C + 1] members of the assignment before */
    uint2 *farthest;             /* [K][C] scratch: cost, row */
    uint32_t *count;             /* [K][C] scratch */
    uint32_t *assignment;        /* [K][N] in and out */
};
enum sqz_status sqz_cluster_repair_launch(const sqz_cluster_repair &r, void *stream);

#endif
