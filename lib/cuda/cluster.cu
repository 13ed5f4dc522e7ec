/*
 * sqz_cuda_cluster(): k-means of all heads together, at a cost of about sqrt(C)
 * comparisons a key, as lib/kmeans_tree.c does it on the CPU. Host code only.
 *
 * 1. Groups. A sample of the keys is clustered into about sqrt(2 C) groups; every key
 *    belongs to the nearest one.
 * 2. Seeds. In three rounds, rows drawn by their distance to the seeds of their group
 *    so far (cluster_seed.cu).
 * 3. Passes. Every pass makes groups of its own, from another sample: centres go to the
 *    nearest, and a key is compared with its own centre and with all of the
 *    SQZ_CLUSTER_PROBES groups that are nearest to it. Then centres become the means of
 *    their keys. The borders of groups cut through clusters, each time elsewhere: with the
 *    same groups in all passes the objective of keys in tight groups stayed 21% above
 *    Lloyd's (524,288 keys, 26,214 clusters).
 * 4. After the first pass and at the end empty clusters get a key (cluster_update.cu).
 */
#include <math.h>
#include <string.h>

#include "arena.h"
#include "cluster.cuh"

namespace
{

enum {
    SAMPLE_PER_GROUP = 128,
    COARSE_PASSES = 3,
    DEFAULT_PASSES = 10,
    MAX_GROUPS = 4096,
    PROBES = SQZ_CLUSTER_PROBES,
    ROUNDS = 3 /* of seeds */
};

struct plan {
    sqz_cluster_keys keys;
    sqz_cluster_rows all, looks, sample; /* rows, (row, probe) pairs, some rows */
    sqz_cluster_centres group, centre;
    uint32_t n_seeds[ROUNDS];
    float *mean, *self, *home, *half_square;
    unsigned long long *best;
    uint32_t *probe, *scratch[4], *look, *row, *histogram; /* row: sorted by home group */
    uint32_t *home_start, *home_tile, *look_start, *look_tile, *first;
    uint32_t *drawn, *place, *count, *centre_group, *number;
    uint2 *farthest;
    double *sums, *cost;
    uint32_t n_passes;
};

uint32_t least(uint64_t a, uint64_t b)
{
    return (uint32_t)(a < b ? a : b);
}

void lay_out(struct plan *p, struct sqz_arena *arena, const struct sqz_cuda_cluster_args *a)
{
    const size_t k = a->n_head_kv, n = a->n_rows, d = a->head_dim, c = a->n_clusters;
    memset(p, 0, sizeof *p);
    const size_t g = least(least((uint64_t)(sqrt(2.0 * (double)c) + 0.5), n), MAX_GROUPS);
    const uint32_t sample = least(n, SAMPLE_PER_GROUP * g);
    p->keys = {a->type, a->n_head_kv, a->n_rows, a->head_dim, a->keys, NULL};
    p->all = {a->n_rows, 1, 1};
    p->looks = {a->n_rows * PROBES, 1, PROBES};
    p->sample = {sample, a->n_rows, sample};
    p->n_passes = a->n_passes ? a->n_passes : (uint32_t)DEFAULT_PASSES;
    p->group.n = (uint32_t)g;
    p->centre.n = a->n_clusters;
    p->n_seeds[0] = (a->n_clusters + 3) / 4;
    p->n_seeds[1] = (a->n_clusters - p->n_seeds[0] + 1) / 2;
    p->n_seeds[2] = a->n_clusters - p->n_seeds[0] - p->n_seeds[1];
    auto words = [&](size_t each) { return (uint32_t *)sqz_arena_take(arena, k, each, sizeof(uint32_t)); };
    auto floats = [&](size_t each) { return (float *)sqz_arena_take(arena, k, each, sizeof(float)); };
    auto centres = [&](sqz_cluster_centres *x) {
        x->d = sqz_arena_take(arena, k * x->n, d, 2);
        x->bias = floats(x->n);
    };
    p->mean = floats(d);
    p->keys.mean = p->mean;
    p->self = floats(n);
    p->home = floats(n);
    p->best = (unsigned long long *)sqz_arena_take(arena, k, n, sizeof *p->best);
    p->probe = words(n * PROBES);
    for (int i = 0; i < 4; i++) p->scratch[i] = words(n * PROBES);
    p->look = words(n * PROBES);
    p->row = words(n);
    p->histogram = (uint32_t *)sqz_arena_take(arena, sqz_cluster_histogram_words(a->n_head_kv, a->n_rows * PROBES), 1,
                                              sizeof(uint32_t));
    p->home_start = words(g + 1);
    p->home_tile = words(g + 1);
    p->look_start = words(g + 1);
    p->look_tile = words(g + 1);
    p->first = words(g + 1);
    p->half_square = floats(g);
    centres(&p->group);
    centres(&p->centre);
    p->centre_group = words(c);
    p->number = words(c);
    p->drawn = words(c);
    p->place = words(c);
    p->count = words(c);
    p->farthest = (uint2 *)sqz_arena_take(arena, k, c, sizeof(uint2));
    p->sums = (double *)sqz_arena_take(arena, k, sqz_cluster_draw_chunks(a->n_rows) + 1, sizeof(double));
    p->cost = (double *)sqz_arena_take(arena, k, c, sizeof(double));
}

/* Rows or their looks by what `keys` says. */
enum sqz_status sort(const struct plan *p, const sqz_cluster_rows &rows, const uint32_t *keys, uint32_t n_keys,
                     uint32_t *sorted, uint32_t *start, uint32_t n_starts, void *stream)
{
    sqz_cluster_sort s;
    memset(&s, 0, sizeof s);
    s.n_heads = p->keys.n_heads;
    s.n_keys = n_keys;
    s.rows = rows;
    s.capacity = rows.n;
    s.keys = keys;
    for (int i = 0; i < 4; i++) s.scratch[i] = p->scratch[i];
    s.sorted = sorted;
    s.start = start;
    s.n_starts = s.start_stride = n_starts;
    s.histogram = p->histogram;
    return sqz_cluster_sort_launch(s, stream);
}

enum sqz_status update(const struct plan *p, const sqz_cluster_rows &rows, const uint32_t *row, const uint32_t *start,
                       const sqz_cluster_centres &centres, const struct sqz_cuda_cluster_args *at_end, void *stream)
{
    sqz_cluster_update u;
    memset(&u, 0, sizeof u);
    u.k = p->keys;
    u.row = row;
    u.start = start;
    u.capacity = rows.n;
    u.start_stride = centres.n + 1;
    u.centres = centres;
    if (centres.d == p->centre.d) u.best = p->best;
    if (at_end) {
        u.self = p->self;
        u.centroids = at_end->centroids;
        u.variance = at_end->variance;
        u.cost = p->cost;
    }
    return sqz_cluster_update_launch(u, stream);
}

/* Groups of a sample. */
enum sqz_status make_groups(const struct plan *p, uint64_t seed, void *stream)
{
    const sqz_cluster_keys &k = p->keys;
    const uint32_t g = p->group.n;
    enum sqz_status status = sqz_cluster_take_rows(k, p->group, 0, g, NULL, seed, stream);
    for (int pass = 0; pass < COARSE_PASSES && status == SQZ_OK; pass++) {
        status = sqz_cluster_nearest(k, p->sample, p->group, 1, p->probe, NULL, stream);
        if (status == SQZ_OK) status = sort(p, p->sample, p->probe, g, p->look, p->look_start, g + 1, stream);
        if (status == SQZ_OK) status = update(p, p->sample, p->look, p->look_start, p->group, NULL, stream);
    }
    return status;
}

enum sqz_status make_seeds(const struct plan *p, uint64_t seed, void *stream)
{
    const sqz_cluster_keys &k = p->keys;
    const uint32_t g = p->group.n;
    const sqz_cluster_list home = {k.n_rows, g, p->row, p->home_start, p->home_tile};
    enum sqz_status status = make_groups(p, seed, stream);
    if (status == SQZ_OK) status = sqz_cluster_nearest(k, p->all, p->group, 1, p->probe, p->home, stream);
    if (status == SQZ_OK) status = sort(p, p->all, p->probe, g, p->row, p->home_start, g + 1, stream);
    if (status == SQZ_OK) status = sqz_cluster_tiles(k.n_heads, g, p->home_start, p->home_tile, stream);
    if (status == SQZ_OK)
        status = sqz_cuda_clear_launch(p->best, (size_t)k.n_heads * k.n_rows * sizeof *p->best, stream);
    uint32_t before = 0;
    for (int r = 0; r < ROUNDS && p->n_seeds[r] && status == SQZ_OK; r++) {
        const uint32_t n = p->n_seeds[r];
        const sqz_cluster_draw draw = {k.n_heads, k.n_rows, n,       g,       seed + 1 + r, p->row,   p->home_start,
                                       p->self,   p->home,  p->best, p->sums, p->drawn,     p->place, p->first};
        status = sqz_cluster_draw_launch(draw, stream);
        if (status == SQZ_OK) status = sqz_cluster_take_rows(k, p->centre, before, n, p->drawn, 0, stream);
        if (status == SQZ_OK) status = sqz_cluster_compare(k, home, p->centre, NULL, p->first, before, p->best, stream);
        before += n;
    }
    return status;
}

/* Raises `best` of every row to the nearest centre of the groups it looks into. */
enum sqz_status look_around(const struct plan *p, void *stream)
{
    const sqz_cluster_keys &k = p->keys;
    const uint32_t g = p->group.n;
    const sqz_cluster_rows centres = {p->centre.n, 1, 1};
    const sqz_cluster_list looks = {p->looks.n, g, p->look, p->look_start, p->look_tile};
    enum sqz_status status = sqz_cluster_group_centres(k, p->centre, p->group, p->half_square, p->centre_group, stream);
    if (status == SQZ_OK) status = sort(p, centres, p->centre_group, g, p->number, p->first, g + 1, stream);
    if (status == SQZ_OK) status = sqz_cluster_nearest(k, p->all, p->group, PROBES, p->probe, NULL, stream);
    if (status == SQZ_OK) status = sort(p, p->looks, p->probe, g + 1, p->look, p->look_start, g + 1, stream);
    if (status == SQZ_OK) status = sqz_cluster_tiles(k.n_heads, g, p->look_start, p->look_tile, stream);
    return status == SQZ_OK ? sqz_cluster_compare(k, looks, p->centre, p->number, p->first, 0, p->best, stream)
                            : status;
}

enum sqz_status run_passes(const struct plan *p, const struct sqz_cuda_cluster_args *a, void *stream)
{
    const sqz_cluster_keys &k = p->keys;
    const uint32_t c = a->n_clusters;
    uint32_t *const assignment = p->probe; /* when looks are sorted, it is free */
    enum sqz_status status = SQZ_OK;
    for (uint32_t pass = 0; pass < p->n_passes && status == SQZ_OK; pass++) {
        const bool last = pass + 1 == p->n_passes;
        if (pass) status = make_groups(p, a->seed + 1000 * pass, stream);
        if (status == SQZ_OK) status = look_around(p, stream);
        if (status == SQZ_OK) status = sqz_cluster_unpack(k, p->centre, p->best, assignment, stream);
        if (status == SQZ_OK) status = sort(p, p->all, assignment, c, a->order, a->offset, c + 1, stream);
        if (status == SQZ_OK && (pass == 0 || last)) {
            const sqz_cluster_repair repair = {k.n_heads, k.n_rows,  c,           p->self,  p->best,
                                               a->order,  a->offset, p->farthest, p->count, assignment};
            status = sqz_cluster_repair_launch(repair, stream);
            if (status == SQZ_OK) status = sort(p, p->all, assignment, c, a->order, a->offset, c + 1, stream);
        }
        if (status == SQZ_OK) status = update(p, p->all, a->order, a->offset, p->centre, last ? a : NULL, stream);
    }
    if (status == SQZ_OK && a->objective)
        status = sqz_cluster_objective(k.n_heads, k.n_rows, c, p->cost, a->objective, stream);
    return status;
}

bool misaligned(const void *p)
{
    return (uintptr_t)p % 16 != 0;
}

} // namespace

extern "C" bool sqz_cuda_cluster_supported(const struct sqz_cuda_cluster_args *a)
{
    if (!a) return false;
    const uint32_t d = a->head_dim;
    return (a->type == SQZ_ROW_F16 || a->type == SQZ_ROW_BF16) && (d == 64 || d == 96 || d == 128 || d == 256) &&
           a->n_head_kv && a->n_head_kv <= 1024 && a->n_rows && a->n_rows <= SQZ_ROWS_MAX_ROWS && a->n_clusters &&
           a->n_clusters <= a->n_rows && a->n_passes <= 1000;
}

extern "C" size_t sqz_cuda_cluster_workspace_bytes(const struct sqz_cuda_cluster_args *a)
{
    if (!sqz_cuda_cluster_supported(a)) return 0;
    struct sqz_arena arena = sqz_arena_on(NULL);
    struct plan p;
    lay_out(&p, &arena, a);
    return sqz_arena_bytes(&arena);
}

extern "C" enum sqz_status sqz_cuda_cluster(const struct sqz_cuda_cluster_args *a, void *stream)
{
    if (!a || !a->keys || misaligned(a->keys) || !a->centroids || misaligned(a->centroids) || !a->offset || !a->order ||
        !a->workspace)
        return SQZ_ERROR_ARGUMENT;
    const size_t bytes = sqz_cuda_cluster_workspace_bytes(a);
    if (bytes == 0 || sqz_cuda_multiprocessors() == 0) return SQZ_ERROR_UNSUPPORTED;
    if (a->workspace_bytes < bytes) return SQZ_ERROR_ARGUMENT;
    struct sqz_arena arena = sqz_arena_on(a->workspace);
    struct plan p;
    lay_out(&p, &arena, a);
    enum sqz_status status = sqz_cluster_mean(p.keys, p.mean, stream);
    if (status == SQZ_OK) status = sqz_cluster_self(p.keys, p.self, stream);
    if (status == SQZ_OK) status = make_seeds(&p, a->seed, stream);
    return status == SQZ_OK ? run_passes(&p, a, stream) : status;
}
