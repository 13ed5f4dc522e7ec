/*
 * The passes over the points of a large problem. A wide pass compares a point
 * with all centroids of the groups it remembers, a narrow pass with the
 * centroids around its own. Between passes the sums of the clusters follow the
 * points that moved.
 *
 * Measured on 100,000 keys, dim 64, 5,000 clusters (bench/cluster.py): the
 * first pass wide and one more later for the points that are far from their
 * centroid leaves the objective 0.6% above that of comparisons with all
 * centroids in every pass; without the second wide pass it is 1.4%.
 */
#include "kmeans_passes.h"

#include <math.h>
#include <string.h>

#include "kmeans_update.h"
#include "threads.h"

#define WIDE_AGAIN  4     /* the pass that is wide once more */
#define STOP_CHANGE 1e-4  /* relative change of the cost after which the points have come to rest */
#define LEAST_GAIN  1e-6f /* of |x|^2: a wide pass moves a point for more than rounding */

static void note_move(struct kmeans_tree *tree, size_t piece, size_t point, uint32_t from)
{
    const size_t at = tree->piece_start[piece] + tree->piece_count[piece]++;
    tree->move[at] = (struct kmeans_move){(uint32_t)point, from};
}

/* ---- Wide passes ---------------------------------------------------------------- */

/* Lists the points of [begin, begin + m) by the groups they look into; those that cost less than `least` do not. */
static void sort_looks(const struct kmeans_tree *tree, size_t begin, size_t m, float least,
                       struct kmeans_tree_scratch *s)
{
    const struct kmeans *km = &tree->km;
    const size_t n_groups = tree->groups.n;
    memset(s->begin, 0, (n_groups + 1) * sizeof *s->begin);
    for (int writing = 0; writing < 2; writing++) {
        for (size_t p = begin; p < begin + m; p++) {
            const uint16_t *probe = tree->probe + (size_t)tree->point[p] * SQZ_KMEANS_PROBES;
            const bool looks = sqz_kmeans_cost(km, p, km->score[p]) >= least;
            for (size_t z = 0; looks && z < SQZ_KMEANS_PROBES && probe[z] != SQZ_KMEANS_NO_GROUP; z++)
                if (writing) s->looks[s->begin[probe[z]]++] = (uint32_t)p;
                else s->begin[probe[z] + 1]++;
        }
        for (size_t g = 0; !writing && g < n_groups; g++) s->begin[g + 1] += s->begin[g];
    }
    /* Every begin has become the next one's: shift back. */
    memmove(s->begin + 1, s->begin, n_groups * sizeof *s->begin);
    s->begin[0] = 0;
}

static void assign_wide_piece(struct kmeans_tree *tree, size_t piece, float least, struct kmeans_tree_scratch *s)
{
    struct kmeans *km = &tree->km;
    const struct kmeans_groups *groups = &tree->groups;
    const size_t begin = tree->piece_start[piece], m = sqz_kmeans_minimum(SQZ_KMEANS_WIDE_ROWS, km->n - begin);
    const size_t dim = km->dim;
    sort_looks(tree, begin, m, least, s);
    for (size_t r = 0; r < m; r++) {
        s->best[r] = -INFINITY;
        s->found[r] = km->assignment[begin + r];
    }
    for (size_t g = 0; g < groups->n; g++) {
        const size_t column = groups->first_column[g], n_columns = groups->first_column[g + 1] - column;
        const uint32_t *point = s->looks + s->begin[g];
        const size_t n = s->begin[g + 1] - s->begin[g];
        if (n == 0 || n_columns == 0) continue;
        km->inner->nearest(s->value, s->column, km->x, point, n, groups->panel + column * dim, groups->bias + column,
                           n_columns, dim);
        for (size_t i = 0; i < n; i++) {
            const size_t r = point[i] - begin;
            if (s->value[i] > s->best[r]) {
                s->best[r] = s->value[i];
                s->found[r] = groups->first_cluster[g] + s->column[i];
            }
        }
    }
    for (size_t r = 0; r < m; r++) {
        const size_t p = begin + r;
        const uint32_t from = km->assignment[p];
        /* Its own centroid may be in a group that the point does not remember. */
        const float own = km->kernels->dot(km->x + p * dim, km->centroid + from * dim, dim) + km->bias[from];
        const bool moves = s->found[r] != from && s->best[r] > own + LEAST_GAIN * km->self[p];
        km->score[p] = moves ? s->best[r] : own;
        if (moves) {
            km->assignment[p] = s->found[r];
            note_move(tree, piece, p, from);
        }
    }
}

/* Points that cost less than `least` stay where they are. */
static void assign_wide(struct kmeans_tree *tree, float least)
{
    struct kmeans *km = &tree->km;
    sqz_kmeans_fill_groups(&tree->groups, km);
    tree->n_pieces = (km->n + SQZ_KMEANS_WIDE_ROWS - 1) / SQZ_KMEANS_WIDE_ROWS;
    for (size_t piece = 0; piece < tree->n_pieces; piece++) {
        tree->piece_start[piece] = (uint32_t)(piece * SQZ_KMEANS_WIDE_ROWS);
        tree->piece_count[piece] = 0;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(km->n_threads) if (km->n_threads > 1)
    for (size_t piece = 0; piece < tree->n_pieces; piece++)
        assign_wide_piece(tree, piece, least, &tree->scratch[sqz_thread_number()]);
}

/* ---- Narrow passes ---------------------------------------------------------------- */

static void find_lists(struct kmeans_tree *tree)
{
    struct kmeans *km = &tree->km;
    sqz_kmeans_fill_groups(&tree->groups, km);
#pragma omp parallel for schedule(dynamic, 4) num_threads(km->n_threads) if (km->n_threads > 1)
    for (size_t begin = 0; begin < km->n_clusters; begin += SQZ_KMEANS_LIST_ROWS) {
        const size_t m = sqz_kmeans_minimum(SQZ_KMEANS_LIST_ROWS, km->n_clusters - begin);
        const int t = sqz_thread_number();
        sqz_kmeans_find_neighbours(tree->neighbour, km, &tree->groups, begin, m, &km->scratch[t],
                                   &tree->scratch[t].list);
    }
}

/* Compares the points of cluster c with the centroids around it. */
static void assign_near_cluster(struct kmeans_tree *tree, size_t piece, size_t c, float *panel)
{
    struct kmeans *km = &tree->km;
    const uint32_t *neighbour = tree->neighbour + c * SQZ_KMEANS_NEIGHBOURS;
    float bias[SQZ_KMEANS_NEIGHBOURS];
    /* Points of a cluster lie scattered over those of its group; asked for now, they come while the panel is made:
     * 10.3 -> 6.5 ms a pass over 100,000 x 64 on one core of Zen 4. */
    for (size_t i = km->start[c]; i < sqz_kmeans_minimum(km->start[c + 1], km->start[c] + SQZ_KMEANS_ROWS); i++)
        sqz_kmeans_fetch(km->x + (size_t)km->order[i] * km->dim, km->dim);
    for (size_t j = 0; j < SQZ_KMEANS_NEIGHBOURS; j++) bias[j] = km->bias[neighbour[j]];
    km->inner->gather_panel(panel, SQZ_KMEANS_NEIGHBOURS, km->centroid, neighbour, SQZ_KMEANS_NEIGHBOURS, km->dim);
    for (size_t begin = km->start[c]; begin < km->start[c + 1]; begin += SQZ_KMEANS_ROWS) {
        const size_t m = sqz_kmeans_minimum(SQZ_KMEANS_ROWS, km->start[c + 1] - begin);
        const uint32_t *point = km->order + begin;
        float best[SQZ_KMEANS_ROWS];
        uint32_t column[SQZ_KMEANS_ROWS];
        km->inner->nearest(best, column, km->x, point, m, panel, bias, SQZ_KMEANS_NEIGHBOURS, km->dim);
        for (size_t r = 0; r < m; r++) {
            km->score[point[r]] = best[r];
            /* Of equals the first is taken, and a point's own centroid stands first. */
            if (neighbour[column[r]] != c) {
                km->assignment[point[r]] = neighbour[column[r]];
                note_move(tree, piece, point[r], (uint32_t)c);
            }
        }
    }
}

/* order and start are those of the last update. */
static void assign_near(struct kmeans_tree *tree)
{
    struct kmeans *km = &tree->km;
    tree->n_pieces = (km->n_clusters + SQZ_KMEANS_NEAR_CLUSTERS - 1) / SQZ_KMEANS_NEAR_CLUSTERS;
    for (size_t piece = 0; piece < tree->n_pieces; piece++) {
        tree->piece_start[piece] = km->start[piece * SQZ_KMEANS_NEAR_CLUSTERS];
        tree->piece_count[piece] = 0;
    }
#pragma omp parallel for schedule(dynamic, 4) num_threads(km->n_threads) if (km->n_threads > 1)
    for (size_t piece = 0; piece < tree->n_pieces; piece++) {
        const size_t first = piece * SQZ_KMEANS_NEAR_CLUSTERS;
        for (size_t c = first; c < sqz_kmeans_minimum(km->n_clusters, first + SQZ_KMEANS_NEAR_CLUSTERS); c++)
            assign_near_cluster(tree, piece, c, km->scratch[sqz_thread_number()].panel);
    }
}

/* ---- Centroids ------------------------------------------------------------------ */

static void set_centroids(struct kmeans_tree *tree)
{
    struct kmeans *km = &tree->km;
    const int n_threads = sqz_kmeans_team(km, km->n_clusters * km->dim);
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (size_t c = 0; c < km->n_clusters; c++)
        sqz_kmeans_set_centroid(km, c, tree->sum + c * km->dim, km->start[c + 1] - km->start[c]);
}

static void sum_all(struct kmeans_tree *tree)
{
    struct kmeans *km = &tree->km;
#pragma omp parallel for schedule(dynamic, 16) num_threads(km->n_threads) if (km->n_threads > 1)
    for (size_t c = 0; c < km->n_clusters; c++) sqz_kmeans_sum(km, c, tree->sum + c * km->dim);
}

void sqz_kmeans_update_all(struct kmeans_tree *tree)
{
    sqz_kmeans_sort(&tree->km);
    sum_all(tree);
    set_centroids(tree);
}

static void take_move(struct kmeans_tree *tree, struct kmeans_move move, size_t first, size_t last)
{
    const struct kmeans *km = &tree->km;
    const float *x = km->x + (size_t)move.point * km->dim;
    const size_t to = km->assignment[move.point];
    if (move.from >= first && move.from < last) {
        double *sum = tree->sum + move.from * km->dim;
        for (size_t i = 0; i < km->dim; i++) sum[i] -= (double)x[i];
    }
    if (to >= first && to < last) sqz_kmeans_add_row(tree->sum + to * km->dim, x, km->dim);
}

/* Takes the moves of a pass into the sums. Every thread walks all moves and takes the clusters of its share, so that a
 * sum sees them in the order of the pieces. */
static void sum_moves(struct kmeans_tree *tree, size_t n_moved)
{
    const struct kmeans *km = &tree->km;
    const int n_threads = sqz_kmeans_team(km, 8 * n_moved * km->dim); /* 8: rows from anywhere in memory */
    const size_t n_shares = (size_t)n_threads;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_threads > 1)
    for (size_t share = 0; share < n_shares; share++) {
        const size_t first = km->n_clusters * share / n_shares, last = km->n_clusters * (share + 1) / n_shares;
        for (size_t piece = 0; piece < tree->n_pieces; piece++)
            for (size_t i = 0; i < tree->piece_count[piece]; i++)
                take_move(tree, tree->move[tree->piece_start[piece] + i], first, last);
    }
}

static bool has_empty(const struct kmeans *km)
{
    for (size_t c = 0; c < km->n_clusters; c++)
        if (km->start[c + 1] == km->start[c]) return true;
    return false;
}

/* Brings sums and centroids up to date after a pass; returns how many points moved. */
static size_t update(struct kmeans_tree *tree)
{
    struct kmeans *km = &tree->km;
    size_t n_moved = 0;
    for (size_t piece = 0; piece < tree->n_pieces; piece++) n_moved += tree->piece_count[piece];
    /* A move costs two additions, new sums one for every point. */
    const bool few = n_moved < km->n / 3;
    if (few) sum_moves(tree, n_moved);
    sqz_kmeans_sort(km);
    const bool repair = has_empty(km);
    if (repair) {
        n_moved += sqz_kmeans_repair(km);
        sqz_kmeans_sort(km);
    }
    if (repair || !few) sum_all(tree);
    set_centroids(tree);
    return n_moved;
}

void sqz_kmeans_run_passes(struct kmeans_tree *tree, uint32_t n_iterations)
{
    struct kmeans *km = &tree->km;
    double before = sqz_kmeans_total_cost(km);
    bool at_rest = false, listed = false;
    for (uint32_t i = 0; i < n_iterations; i++) {
        const bool all_wide = i == 0 || at_rest, wide = all_wide || i == WIDE_AGAIN;
        if (wide) {
            assign_wide(tree, all_wide ? 0.0f : (float)(before / (double)km->n));
        } else {
            if (!listed) {
                find_lists(tree);
                listed = true;
            }
            assign_near(tree);
        }
        const size_t n_moved = update(tree);
        const double cost = sqz_kmeans_total_cost(km);
        const bool still = n_moved == 0 || before - cost <= STOP_CHANGE * before;
        if (still && at_rest) return;
        /* What has come to rest among its neighbours is looked at once more from afar, and then with new lists. */
        listed = listed && !at_rest;
        at_rest = still && !wide;
        before = cost;
    }
}
