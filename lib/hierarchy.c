/*
 * The hierarchy over one head's keys: level 0 clusters the points, level L the
 * centroids of level L-1, each centroid one point whatever its size. The
 * result is an order of the points in which every cluster of every level is
 * one contiguous range.
 *
 * Levels are clustered from the finest up; then clusters are renumbered from
 * the coarsest down, children after children of earlier parents, which is one
 * stable counting sort a level and the same sort for the points.
 */
#include "cluster.h"
#include "arena.h"

#include <math.h>
#include <string.h>

struct hierarchy {
    uint32_t *assignment[SQZ_MAX_LEVELS]; /* [members of the level]: cluster of each, as k-means numbered them */
    float *centroid;                      /* [n_clusters[0]][dim] of the level being made into points */
    double *sum;                          /* [n_clusters[0]][dim] */
    uint32_t *new_parent;                 /* [n_clusters[0]] old number -> new number, of the level above */
    uint32_t *permutation;                /* [n_clusters[0]] new number -> old number */
    void *kmeans;                         /* workspace */
};

static size_t members_of(size_t n_points, const uint32_t *n_clusters, uint32_t level)
{
    return level == 0 ? n_points : n_clusters[level - 1];
}

static size_t lay_out(struct hierarchy *h, size_t n_points, size_t dim, uint32_t n_levels, const uint32_t *n_clusters,
                      const struct sqz_kmeans_options *options, void *workspace)
{
    struct sqz_arena arena = sqz_arena_on(workspace);
    struct sqz_kmeans_options level_options = *options;
    size_t kmeans_bytes = 0;
    if (n_levels < 1 || n_levels > SQZ_MAX_LEVELS) return SIZE_MAX;
    for (uint32_t level = 0; level < n_levels; level++) {
        const size_t members = members_of(n_points, n_clusters, level);
        level_options.n_clusters = n_clusters[level];
        const size_t bytes = sqz_kmeans_workspace_bytes(members, dim, &level_options);
        if (bytes == SIZE_MAX) return SIZE_MAX;
        kmeans_bytes = bytes > kmeans_bytes ? bytes : kmeans_bytes;
        h->assignment[level] = sqz_arena_take(&arena, members, 1, sizeof **h->assignment);
    }
    h->centroid = sqz_arena_take(&arena, n_clusters[0], dim, sizeof *h->centroid);
    h->sum = sqz_arena_take(&arena, n_clusters[0], dim, sizeof *h->sum);
    h->new_parent = sqz_arena_take(&arena, n_clusters[0], 1, sizeof *h->new_parent);
    h->permutation = sqz_arena_take(&arena, n_clusters[0], 1, sizeof *h->permutation);
    h->kmeans = sqz_arena_take(&arena, kmeans_bytes, 1, 1);
    return sqz_arena_bytes(&arena);
}

/* 1 / length, or 0 for what has no direction. */
static double inverse_length(const float *v, size_t dim)
{
    double square = 0;
    for (size_t i = 0; i < dim; i++) {
        const double x = isfinite(v[i]) ? (double)v[i] : 0.0;
        square += x * x;
    }
    return square > 0 ? 1.0 / sqrt(square) : 0.0;
}

/* h->centroid = centroids of a level: means of its members, or (cosine) their mean directions. Non-finite values
 * count as 0, as in sqz_kmeans(). members may be h->centroid itself. */
static void make_centroids(struct hierarchy *h, const float *members, size_t n_members, const uint32_t *assignment,
                           size_t n_clusters, size_t dim, bool cosine)
{
    uint32_t *size = h->permutation;
    memset(size, 0, n_clusters * sizeof *size);
    memset(h->sum, 0, n_clusters * dim * sizeof *h->sum);
    for (size_t m = 0; m < n_members; m++) {
        const float *row = members + m * dim;
        double *sum = h->sum + assignment[m] * dim;
        const double weight = cosine ? inverse_length(row, dim) : 1.0;
        size[assignment[m]]++;
        for (size_t i = 0; i < dim; i++) sum[i] += isfinite(row[i]) ? weight * (double)row[i] : 0.0;
    }
    for (size_t c = 0; c < n_clusters; c++)
        for (size_t i = 0; i < dim; i++) h->centroid[c * dim + i] = (float)(h->sum[c * dim + i] / (double)size[c]);
}

/* Sorts members by the new number of their cluster, ascending inside a cluster, into sorted[]; writes the ranges.
 * new_number: NULL keeps k-means' own numbers. */
static void sort_members(uint32_t *sorted, uint32_t *offset, const uint32_t *assignment, size_t n_members,
                         size_t n_clusters, const uint32_t *new_number)
{
    memset(offset, 0, (n_clusters + 1) * sizeof *offset);
    for (size_t m = 0; m < n_members; m++) offset[(new_number ? new_number[assignment[m]] : assignment[m]) + 1]++;
    for (size_t c = 0; c < n_clusters; c++) offset[c + 1] += offset[c];
    for (size_t m = 0; m < n_members; m++) {
        const uint32_t c = new_number ? new_number[assignment[m]] : assignment[m];
        sorted[offset[c]++] = (uint32_t)m;
    }
    memmove(offset + 1, offset, n_clusters * sizeof *offset);
    offset[0] = 0;
}

size_t sqz_hierarchy_workspace_bytes(size_t n_points, size_t dim, uint32_t n_levels, const uint32_t *n_clusters,
                                     const struct sqz_kmeans_options *options)
{
    struct hierarchy h;
    return lay_out(&h, n_points, dim, n_levels, n_clusters, options, NULL);
}

double sqz_hierarchy(uint32_t *order, uint32_t *const *offset, const float *points, size_t n_points, size_t dim,
                     uint32_t n_levels, const uint32_t *n_clusters, const struct sqz_kmeans_options *options,
                     void *workspace)
{
    struct hierarchy h;
    struct sqz_kmeans_options level_options = *options;
    double objective = 0;
    if (lay_out(&h, n_points, dim, n_levels, n_clusters, options, workspace) == SIZE_MAX) return 0;
    for (uint32_t level = 0; level < n_levels; level++) {
        const float *members = level == 0 ? points : h.centroid;
        const size_t n_members = members_of(n_points, n_clusters, level);
        level_options.n_clusters = n_clusters[level];
        level_options.seed = options->seed + level;
        const double value = sqz_kmeans(h.assignment[level], members, n_members, dim, &level_options, h.kmeans);
        objective = level == 0 ? value : objective;
        if (level + 1 < n_levels) {
            make_centroids(&h, members, n_members, h.assignment[level], n_clusters[level], dim,
                           options->metric == SQZ_METRIC_COSINE);
        }
    }
    for (uint32_t level = n_levels; level-- > 0;) {
        const bool top = level + 1 == n_levels;
        const size_t n_members = members_of(n_points, n_clusters, level);
        uint32_t *sorted = level == 0 ? order : h.permutation;
        sort_members(sorted, offset[level], h.assignment[level], n_members, n_clusters[level],
                     top ? NULL : h.new_parent);
        for (size_t m = 0; level > 0 && m < n_members; m++) h.new_parent[sorted[m]] = (uint32_t)m;
    }
    return objective;
}
