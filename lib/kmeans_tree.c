/*
 * K-means of large problems, at a cost of about sqrt(n_clusters) comparisons
 * per point where Lloyd's iterations take n_clusters each.
 *
 * 1. Groups. A sample of the points is clustered into about
 *    sqrt(2 n_clusters) groups; every point goes to the nearest one and
 *    remembers those that are hardly farther. Points are sorted by group.
 * 2. Seeds. K-means++ inside each group, in a few rounds that share the seeds
 *    still to be placed out by the groups' costs, so that all groups together
 *    come out as k-means++ over all points would.
 * 3. Passes. A wide pass compares a point with all centroids of the groups it
 *    remembers; a narrow pass with the centroids around its own. The first
 *    pass is wide, and one more after the centroids have settled a little
 *    finds what narrow passes cannot reach.
 *
 * Sums of clusters are kept in double and follow the points that move; seeds,
 * groups and lists have random streams and places of their own, so that the
 * result does not depend on the number of threads.
 */
#include "kmeans_tree.h"

#include <math.h>
#include <string.h>

#include "kmeans_lloyd.h"
#include "kmeans_passes.h"
#include "kmeans_seed.h"
#include "threads.h"

#define SAMPLE_PER_GROUP  128 /* points */
#define COARSE_ITERATIONS 6
#define GROUPS_FACTOR     2.0  /* groups: root of this times the clusters */
#define MEAN_PROBES       3.0  /* groups that a point remembers on average */
#define REACH_ROWS        1024 /* points that the reach is measured on */
#define REACH_BINS        1024
#define MAX_GROUPS        4096
#define AHEAD             8    /* points asked for before they are needed */
#define FIRST_SHARE       0.25 /* of the seeds in the first round */
#define NEXT_SHARE        0.5  /* of what is left in the second; the third has the rest */

/* From 2,000 points into 100 clusters on (dim 64, one core of Zen 4, bench cluster) the tree takes less time, 3.2
 * against 4.8 ms there, and comes out at no higher an objective; with few points a cluster it is faster only when all
 * comparisons are many, and 0.5 to 3% higher. */
bool sqz_kmeans_tree_worth(size_t n, size_t n_clusters)
{
    return n_clusters >= 64 && n >= 2000 && n / n_clusters >= (n < 4096 ? 8 : 2);
}

static size_t count_groups(size_t n_clusters)
{
    const size_t n = (size_t)(sqrt(GROUPS_FACTOR * (double)n_clusters) + 0.5);
    return n < MAX_GROUPS ? n : MAX_GROUPS;
}

static void carve_tree_scratch(struct kmeans_tree *tree, struct sqz_arena *arena)
{
    tree->scratch = sqz_arena_take(arena, (size_t)tree->km.n_threads, 1, sizeof *tree->scratch);
    for (int t = 0; t < tree->km.n_threads; t++) {
        struct kmeans_tree_scratch s;
        sqz_kmeans_carve_list_scratch(&s.list, arena, tree->km.n_clusters, tree->groups.n);
        s.best = sqz_arena_take(arena, SQZ_KMEANS_WIDE_ROWS, 1, sizeof *s.best);
        s.found = sqz_arena_take(arena, SQZ_KMEANS_WIDE_ROWS, 1, sizeof *s.found);
        s.begin = sqz_arena_take(arena, tree->groups.n + 1, 1, sizeof *s.begin);
        s.looks = sqz_arena_take(arena, SQZ_KMEANS_WIDE_ROWS, SQZ_KMEANS_PROBES, sizeof *s.looks);
        s.value = sqz_arena_take(arena, SQZ_KMEANS_WIDE_ROWS, 1, sizeof *s.value);
        s.column = sqz_arena_take(arena, SQZ_KMEANS_WIDE_ROWS, 1, sizeof *s.column);
        if (tree->scratch) tree->scratch[t] = s;
    }
}

static size_t lay_out(struct kmeans_tree *tree, size_t n, size_t dim, const struct sqz_kmeans_options *options,
                      void *workspace)
{
    struct sqz_arena arena = sqz_arena_on(workspace);
    struct kmeans *km = &tree->km, *sample = &tree->sample;
    const size_t k = options->n_clusters, n_groups = count_groups(k), n_columns = k + SQZ_GEMM_N * n_groups;
    const size_t n_pieces = n / SQZ_KMEANS_WIDE_ROWS + k / SQZ_KMEANS_NEAR_CLUSTERS + 2;
    km->n = n;
    km->dim = dim;
    km->n_clusters = k;
    km->n_threads = options->n_threads > 1 ? options->n_threads : 1;
    sqz_kmeans_carve(km, &arena, false);
    km->assignment = sqz_arena_take(&arena, n, 1, sizeof *km->assignment);
    const size_t n_centres = sqz_kmeans_columns(n_groups);
    sqz_kmeans_carve_scratch(km, &arena, n_centres > SQZ_KMEANS_COLUMNS ? n_centres : SQZ_KMEANS_COLUMNS);

    sample->n = sqz_kmeans_minimum(n, SAMPLE_PER_GROUP * n_groups);
    sample->dim = dim;
    sample->n_clusters = n_groups;
    sample->n_threads = km->n_threads;
    sqz_kmeans_carve(sample, &arena, true);
    sample->assignment = sqz_arena_take(&arena, sample->n, 1, sizeof *sample->assignment);
    sample->scratch = km->scratch;

    tree->groups.n = n_groups;
    tree->groups.centre = sample;
    tree->groups.first_cluster = sqz_arena_take(&arena, n_groups + 1, 1, sizeof *tree->groups.first_cluster);
    tree->groups.first_column = sqz_arena_take(&arena, n_groups + 1, 1, sizeof *tree->groups.first_column);
    tree->groups.panel = sqz_arena_take(&arena, n_columns, dim, sizeof *tree->groups.panel);
    tree->groups.bias = sqz_arena_take(&arena, n_columns, 1, sizeof *tree->groups.bias);
    tree->scale.mean = sqz_arena_take(&arena, dim, 1, sizeof *tree->scale.mean);
    tree->partial = sqz_arena_take(&arena, sqz_kmeans_scale_chunks(n), dim, sizeof *tree->partial);
    tree->square = sqz_arena_take(&arena, n / SQZ_KMEANS_ROWS + 1, 1, sizeof *tree->square);
    tree->point = sqz_arena_take(&arena, n, 1, sizeof *tree->point);
    tree->group_start = sqz_arena_take(&arena, n_groups + 1, 1, sizeof *tree->group_start);
    tree->probe = sqz_arena_take(&arena, n, SQZ_KMEANS_PROBES, sizeof *tree->probe);
    tree->seeding = sqz_arena_take(&arena, n_groups, 1, sizeof *tree->seeding);
    tree->neighbour = sqz_arena_take(&arena, k, SQZ_KMEANS_NEIGHBOURS, sizeof *tree->neighbour);
    tree->sum = sqz_arena_take(&arena, k, dim, sizeof *tree->sum);
    tree->move = sqz_arena_take(&arena, n, 1, sizeof *tree->move);
    tree->piece_start = sqz_arena_take(&arena, n_pieces, 1, sizeof *tree->piece_start);
    tree->piece_count = sqz_arena_take(&arena, n_pieces, 1, sizeof *tree->piece_count);
    carve_tree_scratch(tree, &arena);
    return sqz_arena_bytes(&arena);
}

/* ---- Groups ------------------------------------------------------------------- */

static void find_groups(struct kmeans_tree *tree, struct sqz_random *random)
{
    struct kmeans *sample = &tree->sample;
    for (size_t i = 0; i < sample->n; i++) {
        /* Evenly spread over the text. The product needs more than 64 bits only beyond 2^32 points. */
        const size_t p = (size_t)((uint64_t)i * tree->km.n / sample->n);
        float *x = sample->x + i * sample->dim;
        sqz_kmeans_scale_row(&tree->scale, x, p);
        sample->self[i] = sqz_kmeans_dot(x, x, sample->dim);
    }
    sqz_kmeans_lloyd(sample, random, COARSE_ITERATIONS);
}

/* Chooses the reach so that a point remembers MEAN_PROBES groups on average: neighbouring groups matter most to points
 * between them, and how much farther "hardly farther" is depends on the data. */
static void measure_reach(struct kmeans_tree *tree)
{
    const struct kmeans *sample = &tree->sample;
    const size_t n_probes = sqz_kmeans_minimum(SQZ_KMEANS_PROBES, sample->n_clusters), n_centres = sample->n_columns;
    const size_t n = sqz_kmeans_minimum(REACH_ROWS, sample->n);
    size_t count[REACH_BINS] = {0}, bin = 0;
    for (size_t begin = 0; begin < n; begin += SQZ_KMEANS_ROWS) {
        const size_t m = sqz_kmeans_minimum(SQZ_KMEANS_ROWS, n - begin);
        float *scores = sample->scratch->tile, *rows = sample->scratch->rows;
        size_t point[SQZ_KMEANS_ROWS];
        for (size_t r = 0; r < m; r++) {
            point[r] = (begin + r) * sample->n / n;
            memcpy(rows + r * sample->dim, sample->x + point[r] * sample->dim, sample->dim * sizeof *rows);
        }
        sqz_kmeans_score_centres(scores, sample, rows, m);
        for (size_t r = 0; r < m; r++) {
            float value[SQZ_KMEANS_PROBES];
            uint32_t at[SQZ_KMEANS_PROBES];
            sample->inner->few_largest(value, at, n_probes, scores + r * n_centres, n_centres);
            const float nearest = sqz_kmeans_cost(sample, point[r], value[0]);
            for (size_t z = 1; z < n_probes; z++) {
                /* From 1 to 2; what is farther than that, or the nearest at distance 0, is never remembered. */
                const float farther = (sqz_kmeans_cost(sample, point[r], value[z]) - nearest) * REACH_BINS;
                if (farther < nearest * REACH_BINS)
                    count[sqz_kmeans_minimum((size_t)(farther / nearest), REACH_BINS - 1)]++;
            }
        }
    }
    for (double seen = 0; bin < REACH_BINS && seen < (MEAN_PROBES - 1) * (double)n; bin++) seen += (double)count[bin];
    tree->reach = 1 + (float)bin / REACH_BINS;
}

/* Writes the groups that a point remembers; returns its score with the nearest. */
static float remember_groups(const struct kmeans_tree *tree, uint16_t *probe, const float *x, float *scores)
{
    const struct kmeans *centre = &tree->sample;
    const size_t n_centres = centre->n_columns;
    const float self = sqz_kmeans_dot(x, x, centre->dim);
    float home_score, value[SQZ_KMEANS_PROBES];
    uint32_t home, at[SQZ_KMEANS_PROBES];
    centre->inner->few_largest(&home_score, &home, 1, scores, n_centres);
    /* cost <= reach * nearest cost, as a score */
    const float least = centre->cosine ? self - tree->reach * (self - home_score)
                                       : 0.5f * (self - tree->reach * (self - 2 * home_score));
    /* few_largest() has taken the nearest out. */
    size_t n = centre->inner->at_least(at, SQZ_KMEANS_PROBES - 1, scores, n_centres, least);
    if (n > SQZ_KMEANS_PROBES - 1) {
        n = SQZ_KMEANS_PROBES - 1;
        centre->inner->few_largest(value, at, n, scores, n_centres);
    }
    probe[0] = (uint16_t)home;
    for (size_t z = 1; z < SQZ_KMEANS_PROBES; z++) probe[z] = z <= n ? (uint16_t)at[z - 1] : SQZ_KMEANS_NO_GROUP;
    return home_score;
}

/* Fills probe and home_score. */
static void assign_groups(struct kmeans_tree *tree)
{
    const struct kmeans *km = &tree->km, *centre = &tree->sample;
#pragma omp parallel for schedule(dynamic, 4) num_threads(km->n_threads) if (km->n_threads > 1)
    for (size_t begin = 0; begin < km->n; begin += SQZ_KMEANS_ROWS) {
        const struct kmeans_scratch *scratch = &km->scratch[sqz_thread_number()];
        const size_t m = sqz_kmeans_minimum(SQZ_KMEANS_ROWS, km->n - begin);
        for (size_t r = 0; r < m; r++) sqz_kmeans_scale_row(&tree->scale, scratch->rows + r * km->dim, begin + r);
        sqz_kmeans_score_centres(scratch->tile, centre, scratch->rows, m);
        for (size_t r = 0; r < m; r++) {
            tree->home_score[begin + r] =
                remember_groups(tree, tree->probe + (begin + r) * SQZ_KMEANS_PROBES, scratch->rows + r * km->dim,
                                scratch->tile + r * centre->n_columns);
        }
    }
}

/* Sorts the points by group and prepares them in that order, each with the score of its group's centre. */
static void sort_by_group(struct kmeans_tree *tree)
{
    struct kmeans *km = &tree->km;
    const size_t n_groups = tree->groups.n;
    uint32_t *start = tree->group_start;
    memset(start, 0, (n_groups + 1) * sizeof *start);
    for (size_t p = 0; p < km->n; p++) start[tree->probe[p * SQZ_KMEANS_PROBES] + 1]++;
    for (size_t g = 0; g < n_groups; g++) start[g + 1] += start[g];
    for (size_t p = 0; p < km->n; p++) tree->point[start[tree->probe[p * SQZ_KMEANS_PROBES]]++] = (uint32_t)p;
    memmove(start + 1, start, n_groups * sizeof *start);
    start[0] = 0;
#pragma omp parallel for schedule(dynamic, 4) num_threads(km->n_threads) if (km->n_threads > 1)
    for (size_t begin = 0; begin < km->n; begin += SQZ_KMEANS_ROWS) {
        double square = 0;
        for (size_t i = begin; i < sqz_kmeans_minimum(km->n, begin + SQZ_KMEANS_ROWS); i++) {
            float *x = km->x + i * km->dim;
            sqz_kmeans_fetch(tree->scale.points + tree->point[sqz_kmeans_minimum(i + AHEAD, km->n - 1)] * km->dim,
                             km->dim);
            sqz_kmeans_scale_row(&tree->scale, x, tree->point[i]);
            km->self[i] = sqz_kmeans_dot(x, x, km->dim);
            km->score[i] = tree->home_score[tree->point[i]];
            for (size_t j = 0; j < km->dim; j++) square += (double)x[j] * (double)x[j];
        }
        tree->square[begin / SQZ_KMEANS_ROWS] = square;
    }
}

/* ---- Seeds -------------------------------------------------------------------- */

/* The points of a group as a problem of their own. */
static struct kmeans part_of(const struct kmeans_tree *tree, size_t group)
{
    const size_t begin = tree->group_start[group];
    struct kmeans part = tree->km;
    part.n = tree->group_start[group + 1] - begin;
    part.x += begin * part.dim;
    part.self += begin;
    part.score += begin;
    part.assignment += begin;
    part.cumulative += begin;
    part.n_threads = 1;
    part.scratch = &tree->km.scratch[sqz_thread_number()];
    return part;
}

static void seed_round(struct kmeans_tree *tree)
{
#pragma omp parallel for schedule(dynamic, 1) num_threads(tree->km.n_threads) if (tree->km.n_threads > 1)
    for (size_t g = 0; g < tree->groups.n; g++) {
        struct kmeans_seeding *seeding = &tree->seeding[g];
        struct kmeans part = part_of(tree, g);
        if (seeding->wanted > 0) {
            seeding->n_seeds = sqz_kmeans_add_seeds(&part, &seeding->random, seeding->n_seeds, seeding->wanted);
            seeding->cost = sqz_kmeans_total_cost(&part);
        }
    }
}

/* Shares `wanted` seeds out by cost, no group getting more seeds than it has points. */
static void share_seeds(struct kmeans_tree *tree, size_t wanted)
{
    double total = 0, up_to_here = 0;
    size_t given = 0;
    for (size_t g = 0; g < tree->groups.n; g++) total += tree->seeding[g].cost;
    for (size_t g = 0; g < tree->groups.n; g++) {
        struct kmeans_seeding *seeding = &tree->seeding[g];
        const size_t room = tree->group_start[g + 1] - tree->group_start[g] - seeding->n_seeds;
        up_to_here += seeding->cost;
        const size_t until = total > 0 ? (size_t)((double)wanted * (up_to_here / total) + 0.5) : given;
        seeding->wanted = sqz_kmeans_minimum(until > given ? until - given : 0, room);
        given = until > given ? until : given;
    }
}

/* Places the seeds; returns false when there are too few different points. The first round draws by the distances from
 * the centres of the groups, which are no seeds. */
static bool place_seeds(struct kmeans_tree *tree, uint64_t seed)
{
    struct kmeans *km = &tree->km;
    const size_t n_groups = tree->groups.n, k = km->n_clusters;
    for (size_t g = 0; g < n_groups; g++) {
        const struct kmeans part = part_of(tree, g);
        tree->seeding[g] = (struct kmeans_seeding){.cost = sqz_kmeans_total_cost(&part)};
        sqz_random_seed(&tree->seeding[g].random, seed + g);
    }
    share_seeds(tree, (size_t)(FIRST_SHARE * (double)k));
    for (size_t g = 0; g < n_groups; g++) {
        const size_t n = tree->group_start[g + 1] - tree->group_start[g];
        tree->seeding[g].wanted += tree->seeding[g].wanted == 0 && n > 0;
    }
    for (size_t placed = 0, before = 0;; before = placed) {
        seed_round(tree);
        placed = 0;
        for (size_t g = 0; g < n_groups; g++) placed += tree->seeding[g].n_seeds;
        if (placed == k || placed == before) return placed == k;
        const size_t left = k - placed;
        share_seeds(tree, left <= 2 * n_groups || before > 0 ? left : (size_t)(NEXT_SHARE * (double)left));
    }
}

/* Numbers clusters by group and gives the groups their panels. */
static void number_clusters(struct kmeans_tree *tree)
{
    struct kmeans_groups *groups = &tree->groups;
    groups->first_cluster[0] = 0;
    groups->first_column[0] = 0;
    for (size_t g = 0; g < groups->n; g++) {
        const size_t n = tree->seeding[g].n_seeds;
        for (size_t i = tree->group_start[g]; i < tree->group_start[g + 1]; i++)
            tree->km.assignment[i] += groups->first_cluster[g];
        groups->first_cluster[g + 1] = groups->first_cluster[g] + (uint32_t)n;
        groups->first_column[g + 1] = groups->first_column[g] + (uint32_t)sqz_kmeans_columns(n);
    }
}

/* ---- The whole ------------------------------------------------------------------ */

/* Of the assignment as it stands, from the sums: |x|^2 less what the mean explains. */
static double objective(const struct kmeans_tree *tree)
{
    const struct kmeans *km = &tree->km;
    double total = 0;
    for (size_t i = 0; i * SQZ_KMEANS_ROWS < km->n; i++) total += tree->square[i];
    total = km->cosine ? (double)km->n : total;
    for (size_t c = 0; c < km->n_clusters; c++) {
        const double *sum = tree->sum + c * km->dim;
        double square = 0;
        for (size_t j = 0; j < km->dim; j++) square += sum[j] * sum[j];
        total -= km->cosine ? sqrt(square) : square / (double)(km->start[c + 1] - km->start[c]);
    }
    const double unscale = km->cosine ? 1.0 : (double)tree->scale.unscale;
    return total > 0 ? total / (double)km->n * unscale * unscale : 0;
}

size_t sqz_kmeans_tree_bytes(size_t n, size_t dim, const struct sqz_kmeans_options *options)
{
    struct kmeans_tree tree;
    return lay_out(&tree, n, dim, options, NULL);
}

double sqz_kmeans_tree(uint32_t *assignment, const float *points, size_t n, size_t dim,
                       const struct sqz_kmeans_options *options, void *workspace)
{
    struct kmeans_tree tree;
    struct sqz_random random;
    struct kmeans *km = &tree.km;
    (void)lay_out(&tree, n, dim, options, workspace);
    km->kernels = tree.sample.kernels = sqz_kernels_get();
    km->inner = tree.sample.inner = sqz_kmeans_kernels_get();
    km->cosine = tree.sample.cosine = tree.scale.cosine = options->metric == SQZ_METRIC_COSINE;
    tree.scale.points = points;
    tree.scale.n = n;
    tree.scale.dim = dim;
    sqz_kmeans_scale_find(&tree.scale, tree.partial, km->n_threads);
    sqz_random_seed(&random, options->seed);
    find_groups(&tree, &random);
    measure_reach(&tree);
    assign_groups(&tree);
    sort_by_group(&tree);
    if (!place_seeds(&tree, sqz_random_next(&random))) return -1;
    number_clusters(&tree);
    sqz_kmeans_update_all(&tree);
    sqz_kmeans_run_passes(&tree, options->n_iterations);
    for (size_t i = 0; i < n; i++) assignment[tree.point[i]] = km->assignment[i];
    return objective(&tree);
}
