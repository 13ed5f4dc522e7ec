/* A problem of k-means: its arrays and its costs. */
#include "kmeans_problem.h"

float sqz_kmeans_bias(const struct kmeans *km, const float *centroid)
{
    return km->cosine ? 0.0f : -0.5f * sqz_kmeans_dot(centroid, centroid, km->dim);
}

double sqz_kmeans_total_cost(const struct kmeans *km)
{
    double total = 0;
    for (size_t p = 0; p < km->n; p++) total += (double)sqz_kmeans_cost(km, p, km->score[p]);
    return total;
}

void sqz_kmeans_carve_scratch(struct kmeans *km, struct sqz_arena *arena, size_t tile_columns)
{
    km->scratch = sqz_arena_take(arena, (size_t)km->n_threads, 1, sizeof *km->scratch);
    for (int t = 0; t < km->n_threads; t++) {
        const struct kmeans_scratch scratch = {
            .rows = sqz_arena_take(arena, SQZ_KMEANS_ROWS, km->dim, sizeof *scratch.rows),
            .tile = sqz_arena_take(arena, SQZ_KMEANS_ROWS, tile_columns, sizeof *scratch.tile),
            .panel = sqz_arena_take(arena, SQZ_KMEANS_SEED_BATCH, km->dim, sizeof *scratch.panel),
            .sum = sqz_arena_take(arena, km->dim, 1, sizeof *scratch.sum),
        };
        if (km->scratch) km->scratch[t] = scratch;
    }
}

void sqz_kmeans_carve(struct kmeans *km, struct sqz_arena *arena, bool with_panel)
{
    const size_t n = km->n, dim = km->dim, k = km->n_clusters;
    km->n_columns = sqz_kmeans_columns(k);
    km->x = sqz_arena_take(arena, n, dim, sizeof *km->x);
    km->self = sqz_arena_take(arena, n, 1, sizeof *km->self);
    km->score = sqz_arena_take(arena, n, 1, sizeof *km->score);
    km->cumulative = sqz_arena_take(arena, n, 1, sizeof *km->cumulative);
    km->order = sqz_arena_take(arena, n, 1, sizeof *km->order);
    km->start = sqz_arena_take(arena, k + 1, 1, sizeof *km->start);
    km->centroid = sqz_arena_take(arena, k, dim, sizeof *km->centroid);
    km->bias = sqz_arena_take(arena, km->n_columns, 1, sizeof *km->bias);
    km->panel = with_panel ? sqz_arena_take(arena, km->n_columns, dim, sizeof *km->panel) : NULL;
}
