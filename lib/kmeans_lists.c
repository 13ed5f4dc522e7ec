/* The centroids around a centroid, out of those in the groups nearest to it. */
#include "kmeans_lists.h"

#include <math.h>
#include <string.h>

#ifndef LIST_PROBES
#define LIST_PROBES 12 /* groups a centroid is compared with */
#endif
#define STRIDES 64 /* maxima that bound the candidates worth sorting */

void sqz_kmeans_carve_list_scratch(struct kmeans_list_scratch *scratch, struct sqz_arena *arena, size_t n_clusters,
                                   size_t n_groups)
{
    const size_t n_centres = sqz_kmeans_columns(n_groups);
    scratch->centre = sqz_arena_take(arena, SQZ_KMEANS_LIST_ROWS, n_centres, sizeof *scratch->centre);
    scratch->score = sqz_arena_take(arena, SQZ_KMEANS_LIST_ROWS, n_clusters, sizeof *scratch->score);
    scratch->cluster = sqz_arena_take(arena, SQZ_KMEANS_LIST_ROWS, n_clusters, sizeof *scratch->cluster);
    scratch->sort_key = sqz_arena_take(arena, n_clusters, 1, sizeof *scratch->sort_key);
}

void sqz_kmeans_score_centres(float *scores, const struct kmeans *centre, const float *rows, size_t m)
{
    const size_t dim = centre->dim, n = centre->n_columns;
    for (size_t column = 0; column < n; column += SQZ_KMEANS_COLUMNS) {
        const size_t width = sqz_kmeans_minimum(SQZ_KMEANS_COLUMNS, n - column);
        centre->kernels->gemm(scores + column, n, rows, dim, centre->panel + column * dim, width, m, width, dim, 1.0f,
                              false);
    }
    for (size_t r = 0; r < m; r++)
        for (size_t j = 0; j < n; j++) scores[r * n + j] += centre->bias[j];
}

void sqz_kmeans_fill_groups(struct kmeans_groups *groups, const struct kmeans *km)
{
    const int n_threads = sqz_kmeans_team(km, km->n_clusters * km->dim);
#pragma omp parallel for schedule(dynamic, 4) num_threads(n_threads) if (n_threads > 1)
    for (size_t g = 0; g < groups->n; g++) {
        const size_t first = groups->first_cluster[g], n = groups->first_cluster[g + 1] - first;
        const size_t column = groups->first_column[g], width = groups->first_column[g + 1] - column;
        km->inner->gather_panel(groups->panel + column * km->dim, width, km->centroid + first * km->dim, NULL, n,
                                km->dim);
        for (size_t j = 0; j < width; j++) groups->bias[column + j] = j < n ? km->bias[first + j] : -INFINITY;
    }
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
            while (key[i] < pivot) i++;
            while (key[j] > pivot) j--;
            if (i <= j) {
                const uint64_t swap = key[i];
                key[i++] = key[j];
                key[j--] = swap;
            }
        }
        if (wanted <= j) high = j;
        else if (wanted >= i) low = i;
        else return;
    }
}

/* A score that at least `count` of n reach, few more: the count-th largest of STRIDES maxima, each over scores a stride
 * apart. count <= STRIDES <= n. */
static float bound_of(const float *score, size_t n, size_t count)
{
    float largest[STRIDES];
    uint64_t key[STRIDES];
    size_t i = STRIDES;
    memcpy(largest, score, sizeof largest);
    for (; i + STRIDES <= n; i += STRIDES)
        for (size_t j = 0; j < STRIDES; j++) largest[j] = score[i + j] > largest[j] ? score[i + j] : largest[j];
    for (size_t j = 0; i + j < n; j++) largest[j] = score[i + j] > largest[j] ? score[i + j] : largest[j];
    for (size_t j = 0; j < STRIDES; j++) key[j] = descending_key(largest[j], j);
    select_smallest(key, STRIDES, count);
    return largest[(uint32_t)key[count - 1]];
}

/* The `count` best of n candidates, in no order. */
static size_t choose(uint32_t *chosen, const float *score, const uint32_t *cluster, size_t n, size_t count,
                     uint64_t *key)
{
    const float bound = n > 2 * STRIDES ? bound_of(score, n, count) : -INFINITY;
    size_t n_keys = 0;
    for (size_t j = 0; j < n; j++) {
        key[n_keys] = descending_key(score[j], cluster[j]);
        n_keys += score[j] >= bound;
    }
    if (n_keys > count) {
        select_smallest(key, n_keys, count);
        n_keys = count;
    }
    for (size_t j = 0; j < n_keys; j++) chosen[j] = (uint32_t)key[j];
    return n_keys;
}

/* Compares rows `which` of the m centroids from `begin` on with the centroids of a group and appends the scores. */
static void compare_with_group(const struct kmeans *km, const struct kmeans_groups *groups, size_t group, size_t begin,
                               const uint32_t *which, size_t m, size_t *n_candidates, struct kmeans_scratch *scratch,
                               struct kmeans_list_scratch *list)
{
    const size_t dim = km->dim, first = groups->first_cluster[group], n = groups->first_cluster[group + 1] - first;
    const size_t column = groups->first_column[group], n_columns = groups->first_column[group + 1] - column;
    for (size_t r = 0; r < m; r++)
        memcpy(scratch->rows + r * dim, km->centroid + (begin + which[r]) * dim, dim * sizeof *scratch->rows);
    for (size_t block = 0; block < n_columns; block += SQZ_KMEANS_BLOCK) {
        const size_t width = sqz_kmeans_minimum(SQZ_KMEANS_BLOCK, n_columns - block);
        const float *bias = groups->bias + column + block;
        km->kernels->gemm(scratch->tile, width, scratch->rows, dim, groups->panel + (column + block) * dim, width, m,
                          width, dim, 1.0f, false);
        for (size_t r = 0; r < m; r++) {
            const size_t at = which[r] * km->n_clusters + n_candidates[which[r]];
            const size_t mine = begin + which[r] - first - block; /* wraps when it is not in this block */
            const size_t n_here = sqz_kmeans_minimum(width, n - sqz_kmeans_minimum(n, block));
            size_t kept = 0;
            for (size_t j = 0; j < n_here; j++) {
                list->score[at + kept] = scratch->tile[r * width + j] + bias[j];
                list->cluster[at + kept] = (uint32_t)(first + block + j);
                kept += j != mine;
            }
            n_candidates[which[r]] += kept;
        }
    }
}

void sqz_kmeans_find_neighbours(uint32_t *neighbour, const struct kmeans *km, const struct kmeans_groups *groups,
                                size_t begin, size_t m, struct kmeans_scratch *scratch,
                                struct kmeans_list_scratch *list)
{
    const size_t n_probes = sqz_kmeans_minimum(LIST_PROBES, groups->n), n_pairs = m * n_probes;
    uint32_t probe[SQZ_KMEANS_LIST_ROWS][LIST_PROBES];
    size_t n_candidates[SQZ_KMEANS_LIST_ROWS] = {0};
    float value[LIST_PROBES];
    uint64_t pair[SQZ_KMEANS_LIST_ROWS * LIST_PROBES];
    sqz_kmeans_score_centres(list->centre, groups->centre, km->centroid + begin * km->dim, m);
    for (size_t r = 0; r < m; r++) {
        km->inner->few_largest(value, probe[r], n_probes, list->centre + r * groups->centre->n_columns,
                               groups->centre->n_columns);
        for (size_t z = 0; z < n_probes; z++) pair[r * n_probes + z] = (uint64_t)probe[r][z] << 32 | r;
    }
    /* By group, so that centroids that look into the same one share a product. */
    for (size_t i = 1; i < n_pairs; i++) {
        const uint64_t moved = pair[i];
        size_t j = i;
        for (; j > 0 && pair[j - 1] > moved; j--) pair[j] = pair[j - 1];
        pair[j] = moved;
    }
    for (size_t i = 0; i < n_pairs;) {
        uint32_t which[SQZ_KMEANS_LIST_ROWS];
        const size_t group = (size_t)(pair[i] >> 32);
        size_t count = 0;
        for (; i < n_pairs && pair[i] >> 32 == group; i++) which[count++] = (uint32_t)pair[i];
        compare_with_group(km, groups, group, begin, which, count, n_candidates, scratch, list);
    }
    for (size_t r = 0; r < m; r++) {
        uint32_t *mine = neighbour + (begin + r) * SQZ_KMEANS_NEIGHBOURS;
        mine[0] = (uint32_t)(begin + r);
        const size_t at = r * km->n_clusters;
        size_t n = 1 + choose(mine + 1, list->score + at, list->cluster + at, n_candidates[r],
                              SQZ_KMEANS_NEIGHBOURS - 1, list->sort_key);
        for (; n < SQZ_KMEANS_NEIGHBOURS; n++) mine[n] = mine[0];
    }
}
