/*
 * Threshold calibration: how many rows each threshold of a grid would make the
 * calibration queries read.
 *
 * Queries go through the lookup as sequences of a batch. A cluster's point is the last of the grid that does
 * not exceed its score; a group of 8 rows is read up to the highest point of the
 * clusters that touch it, so one histogram over points and its running sum give
 * the curve of a head. With codes the highest point of a group's keys comes from
 * key_points.cu instead.
 */
#include "arena.h"
#include "device.cuh"
#include "planes.h"

namespace
{

enum { THREADS = 256, WARPS = THREADS / SQZ_WARP, BATCH = 8 /* queries of a lookup */, SPLITS = 16 };

struct point_args {
    sqz_cuda_lookup_rows lookup;
    int16_t *point;           /* [B][K][C] -1: read at no point */
    uint32_t *group_point;    /* [B][K][groups] with codes; else NULL */
    unsigned long long *rows; /* [K][P + 1] rows whose last point is i - 1 */
    float *share;             /* [K][P] */
    float first, step;        /* natural log */
    uint32_t n_points, n_fixed, n_queries;
    bool group_max;
};

/* Grid: (pair, split). */
__global__ void __launch_bounds__(THREADS) point_kernel(const point_args a)
{
    __shared__ float log2_total[SQZ_ROWS_MAX_GROUP];
    const sqz_cuda_lookup_rows &l = a.lookup;
    const uint32_t pair = blockIdx.x, group = l.n_head / l.n_head_kv, n = l.level.n_clusters;
    for (uint32_t r = threadIdx.x / SQZ_WARP; r < group; r += WARPS) {
        sqz_softmax_state s = sqz_merged_parts(l.parts + (size_t)pair * l.n_splits * group + r, l.n_splits, group);
        if (l.n_base)
            s = sqz_softmax_merged(
                s, sqz_merged_parts(l.base_parts + (size_t)pair * l.n_base * group + r, l.n_base, group));
        if (threadIdx.x % SQZ_WARP == 0) log2_total[r] = sqz_softmax_log2(s);
    }
    __syncthreads();
    for (uint32_t c = blockIdx.y * THREADS + threadIdx.x; c < n; c += gridDim.y * THREADS) {
        const float *y = l.logit + ((size_t)pair * n + c) * group;
        float score = 0;
        for (uint32_t r = 0; r < group; r++)
            score = sqz_add_score(score, exp2f(y[r] - log2_total[r]), group, a.group_max);
        a.point[(size_t)pair * n + c] =
            (int16_t)sqz_curve_point(sqz_cluster_read_to(logf(score), 0), a.first, a.step, (int)a.n_points);
    }
}

/* Grid: (pair, split). A thread finds the clusters of a group by bisection. */
__global__ void __launch_bounds__(THREADS) group_kernel(const point_args a)
{
    extern __shared__ uint32_t histogram[];
    const sqz_cuda_lookup_rows &l = a.lookup;
    const uint32_t pair = blockIdx.x, head = pair % l.n_head_kv, n = l.level.n_clusters;
    const uint32_t n_groups = (uint32_t)(((uint64_t)l.n_rows + SQZ_GROUP_ROWS - 1) / SQZ_GROUP_ROWS);
    const uint32_t *offset = l.level.offset + (size_t)head * (n + 1);
    const int16_t *point = a.point + (size_t)pair * n;
    for (uint32_t i = threadIdx.x; i <= a.n_points; i += THREADS) histogram[i] = 0;
    __syncthreads();
    for (uint32_t group = blockIdx.y * THREADS + threadIdx.x; group < n_groups; group += gridDim.y * THREADS) {
        const uint32_t begin = group * SQZ_GROUP_ROWS, end = min(begin + SQZ_GROUP_ROWS, l.n_rows);
        int best = begin < a.n_fixed ? (int)a.n_points - 1 : -1;
        if (a.group_point) {
            best = max(best, (int)a.group_point[(size_t)pair * n_groups + group] - 1);
        } else if (end > a.n_fixed) {
            const uint32_t from = begin > a.n_fixed ? begin - a.n_fixed : 0;
            uint32_t low = 0, high = n; /* offset[low] <= from < offset[high] */
            while (high - low > 1) {
                const uint32_t middle = (low + high) / 2;
                if (offset[middle] <= from) low = middle;
                else high = middle;
            }
            for (; low < n && offset[low] < end - a.n_fixed; low++) best = max(best, (int)point[low]);
        }
        atomicAdd(&histogram[best + 1], end - begin);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i <= a.n_points; i += THREADS)
        if (histogram[i]) atomicAdd(&a.rows[(size_t)head * (a.n_points + 1) + i], (unsigned long long)histogram[i]);
}

/* Grid: head. Integers, so the order of sums does not matter. */
__global__ void share_kernel(const point_args a)
{
    const uint32_t head = blockIdx.x;
    const double all = (double)a.n_queries * a.lookup.n_rows;
    unsigned long long read = 0;
    if (threadIdx.x) return;
    for (uint32_t i = a.n_points; i-- > 0;) {
        read += a.rows[(size_t)head * (a.n_points + 1) + i + 1];
        a.share[(size_t)head * a.n_points + i] = (float)((double)read / all);
    }
}

struct buffers {
    float *logit;
    struct sqz_cuda_part *parts, *base_parts;
    int16_t *point;
    unsigned long long *rows;
    /* with codes */
    float *tables;
    struct sqz_cuda_reach *reach;
    struct sqz_cuda_part *key_parts;
    uint32_t *group_point;
    size_t n_groups; /* of all pairs of a batch */
};

bool is_coded(const struct sqz_layer *l)
{
    return l->codes.n_words && l->shape.n_head / l->shape.n_head_kv <= SQZ_CODES_MAX_GROUP;
}

struct buffers carve(struct sqz_arena *arena, const struct sqz_cuda_calibrate_args *a)
{
    const struct sqz_layer *l = a->layer;
    const size_t batch = a->n_queries < BATCH ? a->n_queries : BATCH, h = l->shape.n_head, k = l->shape.n_head_kv;
    const size_t c = l->level[0].n_clusters;
    struct buffers b;
    b.logit = (float *)sqz_arena_take(arena, batch * h, c, sizeof(float));
    b.parts = (struct sqz_cuda_part *)sqz_arena_take(arena, batch * h, SQZ_ROWS_MAX_SPLITS, sizeof(*b.parts));
    b.base_parts = (struct sqz_cuda_part *)sqz_arena_take(arena, batch * h, 1, sizeof(*b.base_parts));
    b.point = (int16_t *)sqz_arena_take(arena, batch * k, is_coded(l) ? 0 : c, sizeof(int16_t));
    b.rows = (unsigned long long *)sqz_arena_take(arena, k, (size_t)a->n_points + 1, sizeof(*b.rows));
    b.group_point = NULL;
    if (!is_coded(l)) return b;
    b.n_groups = batch * k * (((size_t)l->n_rows + SQZ_GROUP_ROWS - 1) / SQZ_GROUP_ROWS);
    b.tables = (float *)sqz_arena_take(arena, batch * h * l->codes.n_words, SQZ_CODE_TABLE, sizeof(float));
    b.reach = (struct sqz_cuda_reach *)sqz_arena_take(arena, batch * h, 1, sizeof(*b.reach));
    b.key_parts = (struct sqz_cuda_part *)sqz_arena_take(arena, batch * h, SQZ_CODES_MAX_SPLITS, sizeof(*b.key_parts));
    b.group_point = (uint32_t *)sqz_arena_take(arena, b.n_groups, 1, sizeof(uint32_t));
    return b;
}

/* Behind the lookup of a batch: points of the groups of rows by their keys' codes. */
enum sqz_status find_key_points(const struct sqz_cuda_calibrate_args *a, const struct point_args *points,
                                const struct buffers *b, uint32_t n_multiprocessors, void *stream)
{
    const struct sqz_layer *l = a->layer;
    const struct sqz_cuda_lookup_rows *lookup = &points->lookup;
    struct sqz_cuda_code_tables tables = {};
    tables.type = sqz_cuda_number_type(l);
    tables.n_head = l->shape.n_head;
    tables.n_head_kv = l->shape.n_head_kv;
    tables.head_dim = l->shape.head_dim;
    tables.n_sequences = lookup->n_sequences;
    tables.scale = l->shape.scale;
    tables.queries = lookup->queries;
    tables.codes = l->codes;
    tables.variance_gain = a->variance_gain;
    tables.tables = b->tables;
    tables.reach = b->reach;
    enum sqz_status status = sqz_cuda_code_tables_launch(&tables, true, stream);
    if (status != SQZ_OK) return status;
    struct sqz_cuda_key_points keys = {};
    struct sqz_cuda_lookup_codes *c = &keys.lookup;
    c->n_head_kv = l->shape.n_head_kv;
    c->n_sequences = lookup->n_sequences;
    c->group = l->shape.n_head / l->shape.n_head_kv;
    c->codes = l->codes;
    c->n_rows = l->n_rows;
    c->n_fixed = l->n_fixed;
    c->offsets = lookup->offsets;
    c->variance = l->level[0].variance;
    c->logit = b->logit;
    c->reach = b->reach;
    c->tables = b->tables;
    c->group_max = points->group_max;
    c->open_all = true;
    c->parts = b->parts;
    c->base_parts = b->base_parts;
    c->n_parts = lookup->n_splits;
    c->n_base = lookup->n_base;
    c->n_splits = sqz_cuda_lookup_codes_splits(lookup->n_sequences * l->shape.n_head_kv, 0, l->level[0].n_clusters,
                                               n_multiprocessors);
    c->key_parts = b->key_parts;
    keys.first = points->first;
    keys.step = points->step;
    keys.n_points = points->n_points;
    keys.group_point = b->group_point;
    status = sqz_cuda_open_clusters_launch(c, true, stream);
    if (status == SQZ_OK) status = sqz_cuda_clear_launch(b->group_point, b->n_groups * sizeof(uint32_t), stream);
    return status == SQZ_OK ? sqz_cuda_key_points_launch(&keys, false, stream) : status;
}

bool sizes_valid(const struct sqz_cuda_calibrate_args *a)
{
    return a && a->layer && a->layer->n_levels > 0 && a->layer->n_levels <= SQZ_MAX_LEVELS && a->n_queries > 0 &&
           a->n_queries <= 1024 && a->n_points > 0 && a->n_points <= 4096 && a->step > 0;
}

} // namespace

extern "C" size_t sqz_cuda_calibrate_workspace_bytes(const struct sqz_cuda_calibrate_args *a)
{
    struct sqz_arena arena = sqz_arena_on(NULL);
    if (!sizes_valid(a) || !sqz_cuda_layer_supported(a->layer) ||
        a->layer->shape.n_head / a->layer->shape.n_head_kv > SQZ_ROWS_MAX_GROUP)
        return 0;
    carve(&arena, a);
    return sqz_arena_bytes(&arena);
}

extern "C" enum sqz_status sqz_cuda_calibrate(const struct sqz_cuda_calibrate_args *a, void *stream)
{
    if (!sizes_valid(a) || !a->queries || !a->share || !a->workspace || a->layer->space != SQZ_SPACE_CUDA)
        return SQZ_ERROR_ARGUMENT;
    const size_t bytes = sqz_cuda_calibrate_workspace_bytes(a);
    const int n_multiprocessors = sqz_cuda_multiprocessors();
    if (bytes == 0 || n_multiprocessors == 0) return SQZ_ERROR_UNSUPPORTED;
    if (a->workspace_bytes < bytes) return SQZ_ERROR_ARGUMENT;
    const struct sqz_layer *l = a->layer;
    struct sqz_arena arena = sqz_arena_on(a->workspace);
    const struct buffers b = carve(&arena, a);
    const uint32_t k = l->shape.n_head_kv;
    enum sqz_status status = sqz_cuda_clear_launch(b.rows, (size_t)k * (a->n_points + 1) * sizeof(*b.rows), stream);

    struct point_args points = {};
    struct sqz_cuda_lookup_rows *lookup = &points.lookup;
    sqz_cuda_lookup_rows_set(lookup, l, 0);
    lookup->variance_gain = a->variance_gain;
    lookup->n_base = l->rule == SQZ_RULE_PAPER ? 0 : 1;
    lookup->n_splits = sqz_cuda_lookup_rows_splits(k, l->level[0].n_clusters, (uint32_t)n_multiprocessors);
    lookup->logit = b.logit;
    lookup->parts = b.parts;
    lookup->base_parts = b.base_parts;
    points.point = b.point;
    points.group_point = b.group_point;
    points.rows = b.rows;
    points.share = a->share;
    points.first = a->first;
    points.step = a->step;
    points.n_points = a->n_points;
    points.n_fixed = l->n_fixed;
    points.n_queries = a->n_queries;
    points.group_max = l->group == SQZ_GROUP_MAX;
    for (uint32_t first = 0; first < a->n_queries && status == SQZ_OK; first += BATCH) {
        const uint32_t n = a->n_queries - first < BATCH ? a->n_queries - first : (uint32_t)BATCH;
        lookup->n_sequences = n;
        lookup->queries = (const char *)a->queries + (size_t)first * l->shape.n_head * l->shape.head_dim * 2;
        status = sqz_cuda_lookup_rows_launch(lookup, false, stream);
        if (status == SQZ_OK && b.group_point)
            status = find_key_points(a, &points, &b, (uint32_t)n_multiprocessors, stream);
        else if (status == SQZ_OK)
            status = sqz_launch(point_kernel, dim3(n * k, SPLITS), THREADS, 0, 1, false, points, stream);
        if (status == SQZ_OK)
            status = sqz_launch(group_kernel, dim3(n * k, SPLITS), THREADS, (a->n_points + 1) * sizeof(uint32_t), 1,
                                false, points, stream);
    }
    return status == SQZ_OK ? sqz_launch(share_kernel, dim3(k), SQZ_WARP, 0, 1, false, points, stream) : status;
}
