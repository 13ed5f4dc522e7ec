/*
 * K-means++ in batches: candidates are drawn from the current distances and
 * each is accepted with (distance now) / (distance when drawn), which makes
 * the draw exact; one matrix product then serves many seeds, and the last
 * leaves the first assignment.
 */
#include "kmeans_seed.h"

#include <math.h>
#include <string.h>

#include "threads.h"

#define SEED_TRIES 96 /* draws for a batch at most */
#define TILES      8  /* tiles of points that a thread takes at a time */

/* Index drawn with probability proportional to the costs behind `cumulative`. */
static size_t draw(const struct kmeans *km, double target)
{
    size_t low = 0, high = km->n - 1;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (km->cumulative[middle] > target) high = middle;
        else low = middle + 1;
    }
    return low;
}

static float pair_cost(const struct kmeans *km, size_t a, size_t b)
{
    const float *x = km->x + a * km->dim, *y = km->x + b * km->dim;
    return sqz_kmeans_cost(km, a, sqz_kmeans_dot(x, y, km->dim) + sqz_kmeans_bias(km, y));
}

/* Draws up to `most` seeds; returns how many, 0 when every point lies on a seed already. */
static size_t draw_batch(struct kmeans *km, struct sqz_random *random, uint32_t *seed, size_t most)
{
    double total = 0;
    size_t count = 0;
    for (size_t p = 0; p < km->n; p++) {
        total += (double)sqz_kmeans_cost(km, p, km->score[p]);
        km->cumulative[p] = total;
    }
    if (!(total > 0)) return 0;
    for (int tries = 0; tries < SEED_TRIES && count < most; tries++) {
        const size_t p = draw(km, sqz_random_unit(random) * total);
        const float before = sqz_kmeans_cost(km, p, km->score[p]);
        const double chance = sqz_random_unit(random);
        float now = before;
        for (size_t s = 0; s < count; s++) {
            const float cost = seed[s] == p ? 0.0f : pair_cost(km, p, seed[s]);
            now = cost < now ? cost : now;
        }
        if (now > 0 && chance * (double)before < (double)now) seed[count++] = (uint32_t)p;
    }
    return count;
}

/* Moves every point that is nearer to one of the new seeds; a seed goes to its own cluster whatever the rounding. */
static void take_seeds(struct kmeans *km, const uint32_t *seed, size_t n_seeds, size_t count)
{
    const size_t n_columns = sqz_kmeans_columns(count), dim = km->dim;
    float bias[SQZ_KMEANS_SEED_BATCH], *panel = km->scratch->panel;
    for (size_t j = 0; j < n_columns; j++) bias[j] = j < count ? sqz_kmeans_bias(km, km->x + seed[j] * dim) : -INFINITY;
    km->inner->gather_panel(panel, n_columns, km->x, seed, count, dim);
    const int n_threads = sqz_kmeans_team(km, km->n * n_columns * dim / 16);
#pragma omp parallel for schedule(dynamic, TILES) num_threads(n_threads) if (n_threads > 1)
    for (size_t begin = 0; begin < km->n; begin += SQZ_KMEANS_ROWS) {
        const size_t m = sqz_kmeans_minimum(SQZ_KMEANS_ROWS, km->n - begin);
        float best[SQZ_KMEANS_ROWS];
        uint32_t column[SQZ_KMEANS_ROWS];
        km->inner->nearest(best, column, km->x + begin * dim, NULL, m, panel, bias, n_columns, dim);
        for (size_t r = 0; r < m; r++) {
            if (best[r] > km->score[begin + r]) {
                km->score[begin + r] = best[r];
                km->assignment[begin + r] = (uint32_t)(n_seeds + column[r]);
            }
        }
    }
    for (size_t j = 0; j < count; j++) {
        const size_t p = seed[j];
        km->assignment[p] = (uint32_t)(n_seeds + j);
        km->score[p] = km->cosine ? km->self[p] : 0.5f * km->self[p];
    }
}

static void forget_scores(struct kmeans *km)
{
    for (size_t p = 0; p < km->n; p++) km->score[p] = -INFINITY;
}

size_t sqz_kmeans_add_seeds(struct kmeans *km, struct sqz_random *random, size_t n_seeds, size_t wanted)
{
    uint32_t seed[SQZ_KMEANS_SEED_BATCH];
    const size_t last = n_seeds + wanted;
    while (n_seeds < last) {
        size_t count = 0;
        if (n_seeds > 0 || !isinf(km->score[0]))
            count = draw_batch(km, random, seed, sqz_kmeans_minimum(SQZ_KMEANS_SEED_BATCH, last - n_seeds));
        if (n_seeds == 0) {
            if (count == 0) seed[count++] = (uint32_t)sqz_random_below(random, km->n);
            forget_scores(km);
        }
        if (count == 0) break;
        take_seeds(km, seed, n_seeds, count);
        n_seeds += count;
    }
    return n_seeds;
}

/* Every point lies on a seed: the clusters that are left take points of clusters that have several. */
static void seed_duplicates(struct kmeans *km, size_t n_seeds)
{
    uint32_t *size = km->start;
    memset(size, 0, km->n_clusters * sizeof *size);
    for (size_t p = 0; p < km->n; p++) size[km->assignment[p]]++;
    for (size_t p = 0; p < km->n && n_seeds < km->n_clusters; p++) {
        if (size[km->assignment[p]] > 1) {
            size[km->assignment[p]]--;
            km->assignment[p] = (uint32_t)n_seeds++;
        }
    }
}

void sqz_kmeans_seed(struct kmeans *km, struct sqz_random *random)
{
    forget_scores(km);
    const size_t n_seeds = sqz_kmeans_add_seeds(km, random, 0, km->n_clusters);
    if (n_seeds < km->n_clusters) seed_duplicates(km, n_seeds);
}
