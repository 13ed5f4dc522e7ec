/*
 * K-means of one head's keys, Euclidean or spherical.
 *
 * Points are copied once: non-finite values become 0, a power of two brings
 * the largest to at most 1 (no square overflows or vanishes), the mean is
 * subtracted (Euclidean) or the length set to 1 (cosine). From then on a
 * point x is nearest to the centroid with the largest score
 *     x.c - |c|^2 / 2   (Euclidean)        x.c   (cosine)
 * computed by gemm over blocks of rows and columns that stay in cache.
 *
 * Seeding is exact k-means++ in batches: candidates are drawn from the current
 * distances and each is accepted with (distance now) / (distance when drawn),
 * so one gemm serves many seeds, and the last one leaves the first assignment.
 * Most iterations compare a point only with the N_NEIGHBOURS centroids nearest
 * to its own; points far from their centroid, the last iteration, and any that
 * decides to stop, compare with all.
 */
#include "cluster.h"
#include "kernels.h"
#include "arena.h"
#include "random.h"

#include <math.h>
#include <string.h>

/* Measured on keys of a 135M model (7,800 points, dim 64, 390 clusters, AVX2, one of two busy cores): about 45 ms for
 * 10 iterations, objective 0.4% above plain k-means++ and 10 full iterations. */
#define TILE_ROWS 64       /* rows of one gemm: 16 KiB of points at dim 64 */
#define TILE_COLUMNS 256   /* columns of one gemm: a tile of scores takes 64 KiB */
#define N_NEIGHBOURS 48    /* centroids compared in a restricted iteration */
#define NEAR_ROWS 16       /* centroids whose neighbours are looked up at a time */
#define REFRESH 3          /* restricted iterations between two look-ups of neighbours */
/* A point is compared with all when its cost is above this share of the cost that the last neighbour would have in its
 * cluster. Lower is slower and closer to full iterations: with 1.3 for both, cosine lost 1.5% on heavy tails. */
#define REACH_COSINE 0.9f
#define REACH_EUCLIDEAN 1.3f
#define SEED_BATCH 32      /* seeds accepted per pass over the points */
#define SEED_TRIES 96      /* draws for a batch at most */
#define STOP_CHANGE 1e-4   /* relative change of the objective that ends the iterations */

_Static_assert(SEED_BATCH % SQZ_GEMM_N == 0 && SEED_BATCH <= N_NEIGHBOURS && N_NEIGHBOURS % SQZ_GEMM_N == 0 &&
                   N_NEIGHBOURS <= TILE_COLUMNS && TILE_COLUMNS % SQZ_GEMM_N == 0,
               "near_panel holds a batch of seeds, a tile the scores with either");

struct far_point {
    float cost;
    uint32_t point;
};

struct kmeans {
    const struct sqz_kernels *kernels;
    size_t n, dim, n_clusters, n_columns; /* n_columns: n_clusters rounded up for gemm */
    bool cosine;
    float unscale;         /* points * unscale = the caller's points, before centring */
    uint32_t *assignment;  /* [n], the caller's */

    float *x;              /* [n][dim] prepared points */
    float *self;           /* [n] |x|^2 */
    float *score;          /* [n] score with the assigned centroid */
    union {
        double *cumulative;     /* [n] costs summed up, while seeding */
        struct far_point *heap; /* [n] farthest first, in repair */
    };
    uint32_t *order;       /* [n] points sorted by cluster */
    uint32_t *start;       /* [n_clusters + 1] */
    float *centroid;       /* [n_clusters][dim] */
    float *panel;          /* the same transposed, blocks of [dim][TILE_COLUMNS] */
    float *bias;           /* [n_columns] -|c|^2 / 2 or 0; -infinity in the padding */
    float *rows;           /* [TILE_ROWS][dim] gathered points */
    float *tile;           /* [TILE_ROWS][TILE_COLUMNS] scores */
    double *sum;           /* [dim] */
    uint32_t *neighbour;   /* [n_clusters][N_NEIGHBOURS] */
    float *reach;          /* [n_clusters] cost from which a point may be nearer to a centroid that is not listed */
    float *near_panel;     /* [dim][N_NEIGHBOURS] */
    float *similarity;     /* [NEAR_ROWS][n_columns] dot products of centroids */
    uint64_t *sort_key;    /* [n_columns] */
};

static size_t minimum(size_t a, size_t b)
{
    return a < b ? a : b;
}

static bool arguments_ok(size_t n_points, size_t dim, const struct sqz_kmeans_options *options)
{
    return n_points >= 1 && n_points < UINT32_MAX && dim >= 16 && dim % 16 == 0 && options->n_clusters >= 1 &&
           options->n_clusters <= n_points;
}

/* Cuts the workspace into arrays; with workspace NULL only counts. Returns bytes, SIZE_MAX when they do not fit. */
static size_t lay_out(struct kmeans *km, size_t n, size_t dim, size_t n_clusters, void *workspace)
{
    struct sqz_arena arena = sqz_arena_on(workspace);
    const size_t n_columns = (n_clusters + SQZ_GEMM_N - 1) / SQZ_GEMM_N * SQZ_GEMM_N;
    km->n = n;
    km->dim = dim;
    km->n_clusters = n_clusters;
    km->n_columns = n_columns;
    km->x = sqz_arena_take(&arena, n, dim, sizeof *km->x);
    km->self = sqz_arena_take(&arena, n, 1, sizeof *km->self);
    km->score = sqz_arena_take(&arena, n, 1, sizeof *km->score);
    km->cumulative = sqz_arena_take(&arena, n, 1, sizeof *km->cumulative);
    km->order = sqz_arena_take(&arena, n, 1, sizeof *km->order);
    km->start = sqz_arena_take(&arena, n_clusters + 1, 1, sizeof *km->start);
    km->centroid = sqz_arena_take(&arena, n_clusters, dim, sizeof *km->centroid);
    km->panel = sqz_arena_take(&arena, n_columns, dim, sizeof *km->panel);
    km->bias = sqz_arena_take(&arena, n_columns, 1, sizeof *km->bias);
    km->rows = sqz_arena_take(&arena, TILE_ROWS, dim, sizeof *km->rows);
    km->tile = sqz_arena_take(&arena, TILE_ROWS, TILE_COLUMNS, sizeof *km->tile);
    km->sum = sqz_arena_take(&arena, dim, 1, sizeof *km->sum);
    km->neighbour = sqz_arena_take(&arena, n_clusters, N_NEIGHBOURS, sizeof *km->neighbour);
    km->reach = sqz_arena_take(&arena, n_clusters, 1, sizeof *km->reach);
    km->near_panel = sqz_arena_take(&arena, N_NEIGHBOURS, dim, sizeof *km->near_panel);
    km->similarity = sqz_arena_take(&arena, NEAR_ROWS, n_columns, sizeof *km->similarity);
    km->sort_key = sqz_arena_take(&arena, n_columns, 1, sizeof *km->sort_key);
    return sqz_arena_bytes(&arena);
}

/* ---- Preparing the points ---------------------------------------------------- */

static void copy_finite(struct kmeans *km, const float *points)
{
    const size_t count = km->n * km->dim;
    float largest = 0;
    int exponent = 0;
    for (size_t i = 0; i < count; i++) {
        const float v = isfinite(points[i]) ? points[i] : 0.0f;
        const float magnitude = fabsf(v);
        largest = magnitude > largest ? magnitude : largest;
        km->x[i] = v;
    }
    if (largest > 0) {
        (void)frexpf(largest, &exponent);
    }
    exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
    const float factor = ldexpf(1.0f, -exponent);
    km->unscale = ldexpf(1.0f, exponent);
    for (size_t i = 0; i < count; i++) {
        km->x[i] *= factor;
    }
}

static void add_row(double *sum, const float *row, size_t dim)
{
    for (size_t i = 0; i < dim; i += 16) {
        for (size_t j = 0; j < 16; j++) {
            sum[i + j] += (double)row[i + j];
        }
    }
}

static void subtract_mean(struct kmeans *km)
{
    float *mean = km->near_panel;
    memset(km->sum, 0, km->dim * sizeof *km->sum);
    for (size_t p = 0; p < km->n; p++) {
        add_row(km->sum, km->x + p * km->dim, km->dim);
    }
    for (size_t i = 0; i < km->dim; i++) {
        mean[i] = (float)(km->sum[i] / (double)km->n);
    }
    for (size_t p = 0; p < km->n; p++) {
        float *x = km->x + p * km->dim;
        for (size_t i = 0; i < km->dim; i++) {
            x[i] -= mean[i];
        }
    }
}

/* A fixed order of sixteen partial sums, so that compilers may use vectors without being allowed to reorder. */
static float dot(const float *a, const float *b, size_t dim)
{
    float partial[16] = {0};
    for (size_t i = 0; i < dim; i += 16) {
        for (size_t j = 0; j < 16; j++) {
            partial[j] += a[i + j] * b[i + j];
        }
    }
    for (size_t width = 8; width > 0; width /= 2) {
        for (size_t j = 0; j < width; j++) {
            partial[j] += partial[j + width];
        }
    }
    return partial[0];
}

/* Sets the length of v to 1. Two steps, because squares of what is small beside the largest point may vanish. */
static void normalise(float *v, size_t dim)
{
    float largest = 0;
    int exponent;
    for (size_t i = 0; i < dim; i++) {
        const float magnitude = fabsf(v[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest <= 0) {
        return;
    }
    (void)frexpf(largest, &exponent);
    if (exponent < -8) {
        for (size_t i = 0; i < dim; i++) {
            v[i] = ldexpf(v[i], -exponent);
        }
    }
    const float factor = 1.0f / sqrtf(dot(v, v, dim));
    for (size_t i = 0; i < dim; i++) {
        v[i] *= factor;
    }
}

static void prepare_points(struct kmeans *km, const float *points)
{
    copy_finite(km, points);
    if (!km->cosine) {
        subtract_mean(km);
    }
    for (size_t p = 0; p < km->n; p++) {
        float *x = km->x + p * km->dim;
        if (km->cosine) {
            normalise(x, km->dim);
        }
        km->self[p] = dot(x, x, km->dim);
    }
}

/* What the iterations minimise, of one point: |x - c|^2, or 1 - cosine (0 for a zero vector, whose direction is
 * anything). */
static float cost_of(const struct kmeans *km, size_t p, float score)
{
    const float cost = km->self[p] - (km->cosine ? score : 2 * score);
    return cost > 0 ? cost : 0;
}

/* ---- Centroids --------------------------------------------------------------- */

static float centroid_bias(const struct kmeans *km, const float *c)
{
    return km->cosine ? 0.0f : -0.5f * dot(c, c, km->dim);
}

/* Transposes centroids [first, last) of km->centroid into the panel. */
static void fill_panel(struct kmeans *km)
{
    const size_t dim = km->dim;
    for (size_t begin = 0; begin < km->n_columns; begin += TILE_COLUMNS) {
        const size_t width = minimum(TILE_COLUMNS, km->n_columns - begin);
        float *block = km->panel + begin * dim;
        for (size_t j = 0; j < width; j++) {
            const size_t c = begin + j;
            const float *row = km->centroid + c * dim;
            const bool real = c < km->n_clusters;
            km->bias[c] = real ? centroid_bias(km, row) : -INFINITY;
            for (size_t i = 0; i < dim; i++) {
                block[i * width + j] = real ? row[i] : 0.0f;
            }
        }
    }
}

static void sort_by_cluster(struct kmeans *km)
{
    uint32_t *start = km->start;
    memset(start, 0, (km->n_clusters + 1) * sizeof *start);
    for (size_t p = 0; p < km->n; p++) {
        start[km->assignment[p] + 1]++;
    }
    for (size_t c = 0; c < km->n_clusters; c++) {
        start[c + 1] += start[c];
    }
    for (size_t p = 0; p < km->n; p++) {
        km->order[start[km->assignment[p]]++] = (uint32_t)p;
    }
    /* Every start has become the next one's: shift back. */
    memmove(start + 1, start, km->n_clusters * sizeof *start);
    start[0] = 0;
}

static void sum_cluster(struct kmeans *km, size_t c)
{
    memset(km->sum, 0, km->dim * sizeof *km->sum);
    for (size_t k = km->start[c]; k < km->start[c + 1]; k++) {
        add_row(km->sum, km->x + km->order[k] * km->dim, km->dim);
    }
}

static void update_centroids(struct kmeans *km)
{
    sort_by_cluster(km);
    for (size_t c = 0; c < km->n_clusters; c++) {
        float *centroid = km->centroid + c * km->dim;
        const double share = 1.0 / (double)(km->start[c + 1] - km->start[c]);
        sum_cluster(km, c);
        for (size_t i = 0; i < km->dim; i++) {
            centroid[i] = (float)(km->sum[i] * share);
        }
        if (km->cosine) {
            normalise(centroid, km->dim);
        }
    }
    fill_panel(km);
}

/* ---- Seeding ----------------------------------------------------------------- */

/* Index drawn with probability proportional to the costs behind `cumulative`. */
static size_t draw(const struct kmeans *km, double target)
{
    size_t low = 0, high = km->n - 1;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (km->cumulative[middle] > target) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

static float pair_cost(const struct kmeans *km, size_t a, size_t b)
{
    const float *x = km->x + a * km->dim, *y = km->x + b * km->dim;
    return cost_of(km, a, dot(x, y, km->dim) + centroid_bias(km, y));
}

/* Draws up to `most` seeds for clusters n_seeds, n_seeds + 1, ...; returns how many, 0 when every point lies on a
 * seed already. */
static size_t draw_batch(struct kmeans *km, struct sqz_random *random, uint32_t *seed, size_t n_seeds, size_t most)
{
    double total = 0;
    size_t count = 0;
    if (n_seeds == 0) {
        seed[0] = (uint32_t)sqz_random_below(random, km->n);
        return 1;
    }
    for (size_t p = 0; p < km->n; p++) {
        total += (double)cost_of(km, p, km->score[p]);
        km->cumulative[p] = total;
    }
    if (!(total > 0)) {
        return 0;
    }
    for (int tries = 0; tries < SEED_TRIES && count < most; tries++) {
        const size_t p = draw(km, sqz_random_unit(random) * total);
        const float before = cost_of(km, p, km->score[p]);
        const double chance = sqz_random_unit(random);
        float now = before;
        for (size_t s = 0; s < count; s++) {
            const float cost = seed[s] == p ? 0.0f : pair_cost(km, p, seed[s]);
            now = cost < now ? cost : now;
        }
        if (now > 0 && chance * (double)before < (double)now) {
            seed[count++] = (uint32_t)p;
        }
    }
    return count;
}

/* Moves every point that is nearer to one of the new seeds; a seed goes to its own cluster whatever the rounding. */
static void add_seeds(struct kmeans *km, const uint32_t *seed, size_t n_seeds, size_t count)
{
    const size_t dim = km->dim, width = (count + SQZ_GEMM_N - 1) / SQZ_GEMM_N * SQZ_GEMM_N;
    float bias[SEED_BATCH];
    for (size_t j = 0; j < width; j++) {
        const float *row = j < count ? km->x + seed[j] * dim : NULL;
        bias[j] = row ? centroid_bias(km, row) : -INFINITY;
        for (size_t i = 0; i < dim; i++) {
            km->near_panel[i * width + j] = row ? row[i] : 0.0f;
        }
    }
    for (size_t begin = 0; begin < km->n; begin += TILE_ROWS) {
        const size_t m = minimum(TILE_ROWS, km->n - begin);
        km->kernels->gemm(km->tile, width, km->x + begin * dim, dim, km->near_panel, width, m, width, dim, 1.0f, false);
        for (size_t r = 0; r < m; r++) {
            float best;
            const size_t j = km->kernels->argmax_biased(km->tile + r * width, bias, width, &best);
            if (best > km->score[begin + r]) {
                km->score[begin + r] = best;
                km->assignment[begin + r] = (uint32_t)(n_seeds + j);
            }
        }
    }
    for (size_t j = 0; j < count; j++) {
        const size_t p = seed[j];
        km->assignment[p] = (uint32_t)(n_seeds + j);
        km->score[p] = km->cosine ? km->self[p] : 0.5f * km->self[p];
    }
}

/* Every point lies on a seed: the clusters that are left take points of clusters that have several. */
static void seed_duplicates(struct kmeans *km, size_t n_seeds)
{
    uint32_t *size = km->start;
    memset(size, 0, km->n_clusters * sizeof *size);
    for (size_t p = 0; p < km->n; p++) {
        size[km->assignment[p]]++;
    }
    for (size_t p = 0; p < km->n && n_seeds < km->n_clusters; p++) {
        if (size[km->assignment[p]] > 1) {
            size[km->assignment[p]]--;
            km->assignment[p] = (uint32_t)n_seeds++;
        }
    }
}

/* Assigns every point to the nearest of n_clusters k-means++ seeds. */
static void seed_clusters(struct kmeans *km, struct sqz_random *random)
{
    uint32_t seed[SEED_BATCH];
    size_t n_seeds = 0;
    for (size_t p = 0; p < km->n; p++) {
        km->score[p] = -INFINITY;
        km->assignment[p] = 0;
    }
    while (n_seeds < km->n_clusters) {
        const size_t count =
            draw_batch(km, random, seed, n_seeds, minimum(SEED_BATCH, km->n_clusters - n_seeds));
        if (count == 0) {
            seed_duplicates(km, n_seeds);
            return;
        }
        add_seeds(km, seed, n_seeds, count);
        n_seeds += count;
    }
}

/* ---- Assignment --------------------------------------------------------------- */

struct pass {
    size_t n_moved;
    double cost; /* sum over points, with the centroids that the pass saw */
};

static void settle(struct kmeans *km, struct pass *pass, size_t p, uint32_t cluster, float score)
{
    pass->n_moved += km->assignment[p] != cluster;
    pass->cost += (double)cost_of(km, p, score);
    km->assignment[p] = cluster;
    km->score[p] = score;
}

/* Compares `m` points (rows of x) with every centroid. A point moves only to a centroid strictly nearer than its own,
 * so that equal centroids do not empty each other. */
static void assign_tile(struct kmeans *km, struct pass *pass, const float *x, const uint32_t *point, size_t m)
{
    float best[TILE_ROWS], own[TILE_ROWS];
    uint32_t cluster[TILE_ROWS];
    for (size_t r = 0; r < m; r++) {
        best[r] = -INFINITY;
        own[r] = -INFINITY;
        cluster[r] = km->assignment[point[r]];
    }
    for (size_t column = 0; column < km->n_columns; column += TILE_COLUMNS) {
        const size_t width = minimum(TILE_COLUMNS, km->n_columns - column);
        km->kernels->gemm(km->tile, width, x, km->dim, km->panel + column * km->dim, width, m, width, km->dim, 1.0f,
                          false);
        for (size_t r = 0; r < m; r++) {
            const float *scores = km->tile + r * width;
            const size_t mine = km->assignment[point[r]] - column; /* wraps when it is not in this block */
            float value;
            const size_t j = km->kernels->argmax_biased(scores, km->bias + column, width, &value);
            if (value > best[r]) {
                best[r] = value;
                cluster[r] = (uint32_t)(column + j);
            }
            if (mine < width) {
                own[r] = scores[mine] + km->bias[column + mine];
            }
        }
    }
    for (size_t r = 0; r < m; r++) {
        const bool moves = best[r] > own[r];
        settle(km, pass, point[r], moves ? cluster[r] : km->assignment[point[r]], moves ? best[r] : own[r]);
    }
}

static void gather_rows(struct kmeans *km, const uint32_t *point, size_t m)
{
    for (size_t r = 0; r < m; r++) {
        memcpy(km->rows + r * km->dim, km->x + point[r] * km->dim, km->dim * sizeof *km->rows);
    }
}

/* Compares every point with every centroid. */
static struct pass assign_all(struct kmeans *km)
{
    struct pass pass = {0, 0};
    uint32_t point[TILE_ROWS];
    for (size_t begin = 0; begin < km->n; begin += TILE_ROWS) {
        const size_t m = minimum(TILE_ROWS, km->n - begin);
        for (size_t r = 0; r < m; r++) {
            point[r] = (uint32_t)(begin + r);
        }
        assign_tile(km, &pass, km->x + begin * km->dim, point, m);
    }
    return pass;
}

/* Order-preserving: a larger score gives a smaller key; ties go to the smaller index. */
static uint64_t descending_key(float score, size_t index)
{
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    bits = bits & UINT32_C(0x80000000) ? bits : bits ^ UINT32_C(0x7fffffff);
    return (uint64_t)bits << 32 | (uint32_t)index;
}

/* Reorders keys so that the `count` smallest come first; 1 <= count <= n (Hoare's FIND). */
static void select_smallest(uint64_t *key, size_t n, size_t count)
{
    const ptrdiff_t wanted = (ptrdiff_t)count - 1;
    ptrdiff_t low = 0, high = (ptrdiff_t)n - 1;
    while (low < high) {
        const uint64_t a = key[low], b = key[low + (high - low) / 2], c = key[high];
        const uint64_t pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
        ptrdiff_t i = low, j = high;
        while (i <= j) {
            while (key[i] < pivot) {
                i++;
            }
            while (key[j] > pivot) {
                j--;
            }
            if (i <= j) {
                const uint64_t swap = key[i];
                key[i++] = key[j];
                key[j--] = swap;
            }
        }
        if (wanted <= j) {
            high = j;
        } else if (wanted >= i) {
            low = i;
        } else {
            return;
        }
    }
}

/* Lists the centroids nearest to centroid c, c itself first. similarity: [n_columns] dot products of c with all. */
static void list_neighbours(struct kmeans *km, size_t c, const float *similarity)
{
    uint32_t *neighbour = km->neighbour + c * N_NEIGHBOURS;
    for (size_t j = 0; j < km->n_clusters; j++) {
        const float score = j == c ? INFINITY : similarity[j] + km->bias[j];
        km->sort_key[j] = descending_key(score, j);
    }
    select_smallest(km->sort_key, km->n_clusters, N_NEIGHBOURS);
    for (size_t j = 0; j < N_NEIGHBOURS; j++) {
        neighbour[j] = (uint32_t)km->sort_key[j];
        if (neighbour[j] == c) {
            neighbour[j] = neighbour[0];
            neighbour[0] = (uint32_t)c;
        }
    }
    const uint32_t last = (uint32_t)km->sort_key[N_NEIGHBOURS - 1];
    const float cost = km->cosine ? 1 - similarity[last] : -2 * (similarity[last] + km->bias[last] + km->bias[c]);
    km->reach[c] = (km->cosine ? REACH_COSINE : REACH_EUCLIDEAN) * (cost > 0 ? cost : 0);
}

static void find_neighbours(struct kmeans *km)
{
    for (size_t begin = 0; begin < km->n_clusters; begin += NEAR_ROWS) {
        const size_t m = minimum(NEAR_ROWS, km->n_clusters - begin);
        for (size_t column = 0; column < km->n_columns; column += TILE_COLUMNS) {
            const size_t width = minimum(TILE_COLUMNS, km->n_columns - column);
            km->kernels->gemm(km->similarity + column, km->n_columns, km->centroid + begin * km->dim, km->dim,
                              km->panel + column * km->dim, width, m, width, km->dim, 1.0f, false);
        }
        for (size_t r = 0; r < m; r++) {
            list_neighbours(km, begin + r, km->similarity + r * km->n_columns);
        }
    }
}

/* Fills near_panel and bias with the neighbours of a cluster. */
static void gather_neighbours(struct kmeans *km, const uint32_t *neighbour, float *bias)
{
    const size_t dim = km->dim;
    for (size_t j = 0; j < N_NEIGHBOURS; j += 4) {
        const float *row[4];
        for (size_t k = 0; k < 4; k++) {
            row[k] = km->centroid + neighbour[j + k] * dim;
            bias[j + k] = km->bias[neighbour[j + k]];
        }
        for (size_t i = 0; i < dim; i++) {
            float *to = km->near_panel + i * N_NEIGHBOURS + j;
            to[0] = row[0][i];
            to[1] = row[1][i];
            to[2] = row[2][i];
            to[3] = row[3][i];
        }
    }
}

/* Compares the points of cluster c with its neighbours. A point that lies out of their reach is left for later. */
static size_t assign_cluster(struct kmeans *km, size_t c, struct pass *pass, uint32_t *far, size_t n_far)
{
    const uint32_t *neighbour = km->neighbour + c * N_NEIGHBOURS;
    float bias[N_NEIGHBOURS];
    gather_neighbours(km, neighbour, bias);
    for (size_t begin = km->start[c]; begin < km->start[c + 1]; begin += TILE_ROWS) {
        const size_t m = minimum(TILE_ROWS, km->start[c + 1] - begin);
        const uint32_t *point = km->order + begin;
        gather_rows(km, point, m);
        km->kernels->gemm(km->tile, N_NEIGHBOURS, km->rows, km->dim, km->near_panel, N_NEIGHBOURS, m, N_NEIGHBOURS,
                          km->dim, 1.0f, false);
        for (size_t r = 0; r < m; r++) {
            const float *scores = km->tile + r * N_NEIGHBOURS;
            const float own = scores[0] + bias[0];
            float best;
            const size_t j = km->kernels->argmax_biased(scores, bias, N_NEIGHBOURS, &best);
            const bool moves = best > own;
            best = moves ? best : own;
            if (cost_of(km, point[r], best) > km->reach[c]) {
                far[n_far++] = point[r];
            } else {
                settle(km, pass, point[r], moves ? neighbour[j] : (uint32_t)c, best);
            }
        }
    }
    return n_far;
}

/* Compares every point with the centroids around its own, far points with all. order and start are those of the last
 * update; far points overwrite the part of order that has been read. */
static struct pass assign_near(struct kmeans *km)
{
    struct pass pass = {0, 0};
    size_t n_far = 0;
    for (size_t c = 0; c < km->n_clusters; c++) {
        n_far = assign_cluster(km, c, &pass, km->order, n_far);
    }
    for (size_t begin = 0; begin < n_far; begin += TILE_ROWS) {
        const size_t m = minimum(TILE_ROWS, n_far - begin);
        gather_rows(km, km->order + begin, m);
        assign_tile(km, &pass, km->rows, km->order + begin, m);
    }
    return pass;
}

/* ---- Empty clusters ------------------------------------------------------------ */

/* Farther first, then the smaller index. */
static bool farther(struct far_point a, struct far_point b)
{
    return a.cost > b.cost || (a.cost == b.cost && a.point < b.point);
}

static void sift_down(struct far_point *heap, size_t n, size_t i)
{
    const struct far_point moved = heap[i];
    for (size_t child = 2 * i + 1; child < n; child = 2 * i + 1) {
        child += child + 1 < n && farther(heap[child + 1], heap[child]);
        if (!farther(heap[child], moved)) {
            break;
        }
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = moved;
}

/* Gives every empty cluster the point that is farthest from its centroid, among points that leave nothing empty
 * behind. There are enough as n_clusters <= n. Returns the number of points moved. */
static size_t repair_empty(struct kmeans *km)
{
    struct far_point *heap = km->heap;
    uint32_t *size = km->start;
    size_t n_empty = 0, n_heap = km->n;
    memset(size, 0, km->n_clusters * sizeof *size);
    for (size_t p = 0; p < km->n; p++) {
        size[km->assignment[p]]++;
    }
    for (size_t c = 0; c < km->n_clusters; c++) {
        n_empty += size[c] == 0;
    }
    if (n_empty == 0) {
        return 0;
    }
    for (size_t p = 0; p < km->n; p++) {
        heap[p] = (struct far_point){cost_of(km, p, km->score[p]), (uint32_t)p};
    }
    for (size_t i = n_heap / 2; i-- > 0;) {
        sift_down(heap, n_heap, i);
    }
    size_t empty = 0;
    for (size_t left = n_empty; left > 0 && n_heap > 0;) {
        const uint32_t p = heap[0].point;
        heap[0] = heap[--n_heap];
        sift_down(heap, n_heap, 0);
        if (size[km->assignment[p]] < 2) {
            continue;
        }
        while (size[empty] != 0) {
            empty++;
        }
        size[km->assignment[p]]--;
        size[empty] = 1;
        km->assignment[p] = (uint32_t)empty;
        left--;
    }
    return n_empty;
}

/* ---- The whole ------------------------------------------------------------------ */

/* Of the assignment as it stands, in the caller's units. */
static double objective(struct kmeans *km)
{
    double total = 0;
    sort_by_cluster(km);
    for (size_t c = 0; c < km->n_clusters; c++) {
        sum_cluster(km, c);
        if (km->cosine) {
            double square = 0;
            for (size_t i = 0; i < km->dim; i++) {
                square += km->sum[i] * km->sum[i];
            }
            total += (double)(km->start[c + 1] - km->start[c]) - sqrt(square);
            continue;
        }
        const double share = 1.0 / (double)(km->start[c + 1] - km->start[c]);
        for (size_t k = km->start[c]; k < km->start[c + 1]; k++) {
            const float *x = km->x + km->order[k] * km->dim;
            for (size_t i = 0; i < km->dim; i++) {
                const double difference = (double)x[i] - km->sum[i] * share;
                total += difference * difference;
            }
        }
    }
    total = total > 0 ? total / (double)km->n : 0;
    return km->cosine ? total : total * (double)km->unscale * (double)km->unscale;
}

static void iterate(struct kmeans *km, uint32_t n_iterations)
{
    /* A restricted iteration pays for the products of all centroids with each other. */
    const bool restrict_worth = km->n_clusters >= 4 * N_NEIGHBOURS && km->n >= 8 * km->n_clusters;
    bool all = !restrict_worth;
    double before = 0;
    uint32_t n_near = 0;
    for (size_t p = 0; p < km->n; p++) {
        before += (double)cost_of(km, p, km->score[p]);
    }
    for (uint32_t i = 0; i < n_iterations; i++) {
        const bool now_all = all || i + 1 == n_iterations;
        update_centroids(km);
        if (!now_all && n_near++ % REFRESH == 0) {
            find_neighbours(km);
        }
        struct pass pass = now_all ? assign_all(km) : assign_near(km);
        pass.n_moved += repair_empty(km);
        const bool still = pass.n_moved == 0 || before - pass.cost <= STOP_CHANGE * before;
        if (still && now_all) {
            return;
        }
        all = !restrict_worth || still;
        before = pass.cost;
    }
}

size_t sqz_kmeans_workspace_bytes(size_t n_points, size_t dim, const struct sqz_kmeans_options *options)
{
    struct kmeans km;
    return arguments_ok(n_points, dim, options) ? lay_out(&km, n_points, dim, options->n_clusters, NULL) : SIZE_MAX;
}

double sqz_kmeans(uint32_t *assignment, const float *points, size_t n_points, size_t dim,
                  const struct sqz_kmeans_options *options, void *workspace)
{
    struct kmeans km;
    struct sqz_random random;
    if (!arguments_ok(n_points, dim, options)) {
        return 0;
    }
    (void)lay_out(&km, n_points, dim, options->n_clusters, workspace);
    km.kernels = sqz_kernels_get();
    km.cosine = options->metric == SQZ_METRIC_COSINE;
    km.assignment = assignment;
    prepare_points(&km, points);
    sqz_random_seed(&random, options->seed);
    seed_clusters(&km, &random);
    iterate(&km, options->n_iterations);
    return objective(&km);
}
