/*
 * lib/cuda/ against lib/: layers that sqz_layer_create() built are copied to the
 * GPU; what the lookup retains there must be what sqz_lookup() retains, rounded
 * up to groups of 8 rows, and the output must be double-precision attention over
 * those rows. Clusters must be as good as sqz_kmeans() makes them. Skipped (exit 77)
 * where there is no GPU.
 *
 * Queries are rounded to F16 for both sides. Tolerance: the output is F16 (2^-11
 * relative), logits are F32 sums of exact products; 2e-3 of the largest value
 * leaves room for both and is far below what one wrong row changes.
 */
#include "layer_fixture.h"

#include <cuda_runtime_api.h>

#include "attention.h"
#include "cuda/calls.h"
#include "cuda/planes.h"
#include "cuda/weights.h"
#include "cluster.h"
#include "lookup.h"
#include "squeeze_cuda.h"

static void *upload(const void *host, size_t bytes)
{
    void *device = NULL;
    if (!host) return NULL;
    assert_int_equal(cudaMalloc(&device, bytes ? bytes : 1), cudaSuccess);
    assert_int_equal(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice), cudaSuccess);
    return device;
}

static void download(void *host, const void *device, size_t bytes)
{
    assert_int_equal(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), cudaSuccess);
}

static void *device_zeros(size_t bytes)
{
    void *p = NULL;
    assert_int_equal(cudaMalloc(&p, bytes ? bytes : 1), cudaSuccess);
    assert_int_equal(cudaMemset(p, 0, bytes), cudaSuccess);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess); /* the library's streams do not wait for the default one */
    return p;
}

/* F16 rows that the host's layers get in place of those in planes; freed with the layer. */
static void *made[64];
static size_t n_made;

/* Rows in planes become F16 ones of the same numbers. */
static void flatten(struct sqz_rows *rows, size_t n_heads, size_t n, size_t d)
{
    if (!sqz_row_is_planes(rows->type)) return;
    assert_true(n_made < COUNT(made));
    uint16_t *half = made[n_made++] = take(n_heads * n * d, sizeof *half);
    for (size_t h = 0; h < n_heads; h++) {
        const struct sqz_rows head = sqz_rows_of_head(rows, n, d, h);
        sqz_rows_to_f16(half + h * n * d, &head, 0, n, d);
    }
    *rows = sqz_f16_rows(half);
}

static void free_layer(struct sqz_layer *l)
{
    while (n_made) free(made[--n_made]);
    sqz_layer_free(l);
}

static struct sqz_rows upload_rows(const struct sqz_rows *rows, size_t n_heads, size_t n, size_t d)
{
    const struct sqz_planes *planes = &rows->planes;
    const size_t n_rounded = n_heads * (n - planes->n_whole);
    return (struct sqz_rows){.type = rows->type,
                             .data = upload(rows->data, n_rounded * sqz_row_data_bytes(rows->type, d)),
                             .scale = upload(rows->scale, n_heads * n * sizeof(float)),
                             .mean = upload(rows->mean, n_heads * d * sizeof(float)),
                             .planes = {.lower = upload(planes->lower, n_rounded * sqz_plane_bytes(d)),
                                        .step = upload(planes->step, n_rounded * sizeof(uint16_t)),
                                        .whole = upload(planes->whole, n_heads * planes->n_whole * d * 2),
                                        .n_whole = planes->n_whole}};
}

/* A layer on the GPU, of what is looked at there; its arrays are freed by cudaDeviceReset() at the end of a test. Rows in
 * planes are there as they are, and on the host F16 from then on, of what they say. */
static struct sqz_layer upload_layer(struct sqz_layer *l)
{
    const size_t k = l->shape.n_head_kv, d = l->shape.head_dim, row = d * sizeof(uint16_t);
    struct sqz_layer out = {.space = SQZ_SPACE_CUDA,
                            .shape = l->shape,
                            .n_rows = l->n_rows,
                            .n_fixed = l->n_fixed,
                            .n_levels = l->n_levels,
                            .rule = l->rule,
                            .group = l->group};
    out.keys = upload_rows(&l->keys, k, l->n_rows, d);
    out.values = upload_rows(&l->values, k, l->n_rows, d);
    for (uint32_t i = 0; i < l->n_levels; i++) {
        struct sqz_level *v = &l->level[i];
        const size_t c = v->n_clusters;
        flatten(&v->value_centroids, k, c, d);
        out.level[i].n_clusters = v->n_clusters;
        out.level[i].centroids = upload_rows(&v->centroids, k, c, d);
        out.level[i].value_centroids = upload_rows(&v->value_centroids, k, c, d);
        out.level[i].offset = upload(v->offset, k * (c + 1) * sizeof(uint32_t));
        out.level[i].variance = upload(v->variance, k * c * sizeof(float));
    }
    const struct sqz_codes *codes = &l->codes;
    const size_t w = codes->n_words, m = codes->n_directions;
    if (w) {
        out.codes.n_words = codes->n_words;
        out.codes.n_directions = codes->n_directions;
        out.codes.words = upload(codes->words, k * w * (l->n_rows - l->n_fixed) * sizeof(uint32_t));
        out.codes.directions = upload(codes->directions, k * m * row);
        out.codes.book = upload(codes->book, k * 16 * m * sizeof(uint16_t));
        out.codes.first = upload(codes->first, k * (8 * w + 1) * sizeof(uint32_t));
        out.codes.spread = upload(codes->spread, k * m * sizeof(float));
    }
    if (sqz_row_is_planes(l->keys.type)) {
        void *index = device_zeros(sqz_cuda_plane_index_bytes(&out));
        assert_int_equal(sqz_cuda_plane_index(&out, index, NULL), SQZ_OK);
        assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
        out.plane_index = index;
    }
    flatten(&l->keys, k, l->n_rows, d);
    flatten(&l->values, k, l->n_rows, d);
    return out;
}

struct variation {
    uint32_t n_head, n_head_kv, head_dim, n_levels;
    enum sqz_index index;
    enum sqz_rule rule;
    enum sqz_group group;
    size_t n_rows;
    uint32_t code_words;
    enum sqz_row_format rows;
    bool upper; /* of rows of 4 + 4 bits the upper planes alone are read */
};

static const struct variation variations[] = {
    {4, 4, 64, 1, SQZ_INDEX_F16, SQZ_RULE_DEFAULT, SQZ_GROUP_MEAN, 1203, 0, SQZ_ROWS_F16, false},
    {8, 2, 128, 1, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, SQZ_GROUP_MEAN, 900, 0, SQZ_ROWS_F16, false},
    {6, 1, 96, 1, SQZ_INDEX_F16, SQZ_RULE_DEFAULT, SQZ_GROUP_MAX, 800, 0, SQZ_ROWS_F16, false},
    {2, 1, 256, 1, SQZ_INDEX_F16, SQZ_RULE_PAPER, SQZ_GROUP_MEAN, 700, 0, SQZ_ROWS_F16, false},
    {4, 2, 64, 2, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, SQZ_GROUP_MEAN, 1500, 0, SQZ_ROWS_F16, false},
    {4, 2, 128, 2, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, SQZ_GROUP_MAX, 1500, 0, SQZ_ROWS_F16, false},
    {4, 4, 64, 1, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, SQZ_GROUP_MAX, 1203, 2, SQZ_ROWS_F16, false},
    {8, 2, 128, 1, SQZ_INDEX_F16, SQZ_RULE_DEFAULT, SQZ_GROUP_MAX, 900, 1, SQZ_ROWS_F16, false},
    {6, 1, 96, 1, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, SQZ_GROUP_MEAN, 800, 2, SQZ_ROWS_F16, false},
    {4, 2, 64, 2, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, SQZ_GROUP_MEAN, 1500, 2, SQZ_ROWS_F16, false},
    {32, 2, 128, 2, SQZ_INDEX_F16, SQZ_RULE_DEFAULT, SQZ_GROUP_MAX, 1300, 4, SQZ_ROWS_F16, false},
    {20, 1, 64, 1, SQZ_INDEX_F16, SQZ_RULE_DEFAULT, SQZ_GROUP_MEAN, 700, 2, SQZ_ROWS_F16,
     false}, /* whole clusters: G above 16 */
    {16, 2, 128, 1, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, SQZ_GROUP_MEAN, 2900, 0, SQZ_ROWS_F16,
     false}, /* some tiles of clusters */
    {4, 2, 64, 1, SQZ_INDEX_F16, SQZ_RULE_DEFAULT, SQZ_GROUP_MAX, 1700, 0, SQZ_ROWS_F16, false},
    {4, 2, 64, 1, SQZ_INDEX_F16, SQZ_RULE_DEFAULT, SQZ_GROUP_MAX, 1700, 0, SQZ_ROWS_INT4_4, false},
    {8, 2, 128, 1, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, SQZ_GROUP_MEAN, 900, 0, SQZ_ROWS_INT4, false},
    {8, 2, 128, 1, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, SQZ_GROUP_MAX, 1203, 2, SQZ_ROWS_INT4_4, false},
    {4, 4, 64, 1, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, SQZ_GROUP_MEAN, 1300, 2, SQZ_ROWS_INT4, false},
    {4, 2, 128, 2, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, SQZ_GROUP_MAX, 1500, 0, SQZ_ROWS_INT4_4, false},
    {16, 2, 128, 1, SQZ_INDEX_F16, SQZ_RULE_DEFAULT, SQZ_GROUP_MAX, 2900, 0, SQZ_ROWS_INT4_4, true},
    {2, 1, 64, 1, SQZ_INDEX_F16, SQZ_RULE_PAPER, SQZ_GROUP_MEAN, 700, 0, SQZ_ROWS_INT4, false},
    /* More query rows of a head than go through planes together. */
    {40, 1, 64, 1, SQZ_INDEX_F16, SQZ_RULE_DEFAULT, SQZ_GROUP_MAX, 800, 0, SQZ_ROWS_INT4_4, false},
};

static struct sqz_layer *make_layer(const struct variation *v, size_t seed)
{
    struct sqz_squeeze_options o;
    struct sqz_error error;
    struct sqz_layer *layer;
    sqz_squeeze_options_default(&o, v->rule);
    o.n_levels = v->n_levels;
    o.centroid_share[0] = 0.1f;
    o.centroid_share[1] = 0.02f;
    o.index = v->index;
    o.keys = SQZ_INDEX_F16;
    o.rows = v->rows;
    o.code_words = v->code_words;
    o.group = v->group;
    o.tail = v->rule != SQZ_RULE_PAPER;
    o.value_skip = false;
    struct material m = make_material(make_shape(v->n_head, v->n_head_kv, v->head_dim), v->n_rows, 24, seed);
    float *queries = make_queries(&m, 32, seed + 9, 0.3);
    if (sqz_layer_create(&layer, &m.shape, m.keys, m.values, m.n_rows, queries, 32, &o, 2, &error) != SQZ_OK)
        fail_msg("%s", error.message);
    if (v->upper) {
        layer->keys = sqz_rows_upper(&layer->keys);
        layer->values = sqz_rows_upper(&layer->values);
    }
    free(queries);
    free_material(&m);
    return layer;
}

static struct reference reference;
static struct reference_result wanted;

#define TAIL_GAIN 0.3f
#define TAIL_SKIP 0.5f

/* Whether a block's tail goes with its rows: keys that are read for their group's sake are not counted again then, and
 * each token looks at its own weights alone. */
static bool tail_with_rows(const struct sqz_layer *l, size_t t)
{
    const size_t g = l->shape.n_head / l->shape.n_head_kv, d = l->shape.head_dim;
    int device, major;
    assert_int_equal(cudaGetDevice(&device), cudaSuccess);
    assert_int_equal(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), cudaSuccess);
    return t > 1 && l->n_levels == 1 && (d == 64 || d == 128) && (g == 1 || g == 2 || g == 4 || g == 8) && major == 9;
}

/* The tokens of one sequence, one or a block that shares a selection: the lists, then the output over exactly those
 * rows and the tail. retain: rows of a block's clusters, in place of the threshold; 0: the threshold. */
static void check_tokens(const struct sqz_layer *l, const struct sqz_layer *on_gpu, float log_threshold, bool dense,
                         bool tail, size_t t, size_t retain, size_t seed)
{
    const size_t k = l->shape.n_head_kv, heads = l->shape.n_head, g = heads / k, d = l->shape.head_dim, n = l->n_rows;
    const size_t h = t * heads; /* query rows, [t][heads] */
    const size_t capacity = (n + 15) / 16 * 2;
    float *queries = random_floats(h * d, seed, 0.6), *norms = take(h, sizeof *norms);
    uint16_t *halves = take(h * d, sizeof *halves), *out = take(h * d, sizeof *out);
    float *thresholds = take(k, sizeof *thresholds), *gains = take(k, sizeof *gains), *lse = take(h, sizeof *lse);
    to_half(halves, queries, h * d);
    for (size_t i = 0; i < h * d; i++) queries[i] = (float)half_value(halves[i]);
    for (size_t r = 0; r < h; r++) {
        norms[r] = 0;
        for (size_t i = 0; i < d; i++) norms[r] += queries[r * d + i] * queries[r * d + i];
    }
    for (size_t i = 0; i < k; i++) {
        thresholds[i] = log_threshold;
        gains[i] = l->variance_gain ? l->variance_gain[i] : 0;
    }

    struct sqz_cuda_attend_args a;
    memset(&a, 0, sizeof a);
    a.layer = on_gpu;
    a.plan.log_threshold = upload(thresholds, k * sizeof *thresholds);
    a.plan.variance_gain = upload(gains, k * sizeof *gains);
    if (tail) {
        float *tail_gains = take(k, sizeof *tail_gains);
        for (size_t i = 0; i < k; i++) tail_gains[i] = TAIL_GAIN;
        a.plan.tail_gain = upload(tail_gains, k * sizeof *tail_gains);
        a.plan.tail_skip = TAIL_SKIP;
        free(tail_gains);
    }
    if (retain) {
        uint32_t *rows = take(k, sizeof *rows);
        for (size_t i = 0; i < k; i++) rows[i] = (uint32_t)retain;
        a.plan.retain_rows = upload(rows, k * sizeof *rows);
        free(rows);
    }
    a.dense = dense;
    a.n_sequences = 1;
    a.n_tokens = (uint32_t)t;
    a.queries = upload(halves, h * d * sizeof *halves);
    a.out = device_zeros(h * d * sizeof *out);
    a.lse = device_zeros(h * sizeof *lse);
    assert_true(sqz_cuda_attend_supported(&a));
    a.workspace_bytes = sqz_cuda_attend_workspace_bytes(&a);
    a.workspace = device_zeros(a.workspace_bytes);
    struct sqz_cuda_selection s = {NULL, NULL, 0, NULL};
    uint32_t *groups = take(k * capacity, sizeof *groups), *n_groups = take(k, sizeof *n_groups);
    if (!dense) {
        assert_int_equal(sqz_cuda_select(&a, &s, NULL), SQZ_OK);
        download(groups, s.groups, k * capacity * sizeof *groups);
        download(n_groups, s.n_groups, k * sizeof *n_groups);
    }
    assert_int_equal(sqz_cuda_attend(&a, NULL), SQZ_OK);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
    download(out, a.out, h * d * sizeof *out);
    download(lse, a.lse, h * sizeof *lse);

    bool *read = take(n, sizeof *read);
    void *workspace = malloc(sqz_lookup_workspace_bytes(l, t * g));
    float *mine = take(t * g * d, sizeof *mine), *mine_norms = take(t * g, sizeof *mine_norms);
    for (size_t head = 0; head < k; head++) {
        const uint16_t *keys = sqz_rows_f16(&l->keys) + head * n * d, *values = sqz_rows_f16(&l->values) + head * n * d;
        for (size_t r = 0; r < t * g; r++) { /* the head's query rows, one after the other */
            const size_t from = r / g * heads + head * g + r % g;
            memcpy(mine + r * d, queries + from * d, d * sizeof *mine);
            mine_norms[r] = norms[from];
        }
        for (size_t i = 0; i < n; i++) read[i] = dense;
        struct sqz_selection cpu = {0};
        if (!dense) {
            struct sqz_head_plan plan = {log_threshold, TAIL_GAIN, gains[head]};
            float *base = take(t * g, sizeof *base);
            for (size_t r = 0; r < t * g; r++) {
                reference_reset(&reference);
                for (size_t i = 0; i < l->n_fixed; i++)
                    reference_add(&reference, mine + r * d, keys + i * d, values, d, l->shape.scale);
                base[r] = (float)reference_lse(&reference);
            }
            sqz_lookup(&cpu, l, (uint32_t)head, &plan, mine, mine_norms, t * g, l->rule == SQZ_RULE_PAPER ? NULL : base,
                       retain, workspace);
            for (size_t i = 0; i < l->n_fixed; i++) read[i] = true;
            for (size_t i = 0; i < cpu.n_ranges; i++)
                for (size_t row = cpu.ranges[i].begin; row < cpu.ranges[i].end; row++) read[row] = true;
            size_t found = 0;
            for (size_t at = 0; at < n; at += 8) {
                const size_t end = at + 8 < n ? at + 8 : n;
                bool any = false;
                for (size_t row = at; row < end; row++) any = any || read[row];
                for (size_t row = at; row < end; row++) read[row] = any;
                if (any) {
                    check_true("groups are listed", found, found, n_groups[head], found < n_groups[head]);
                    check_close("group", found, groups[head * capacity + found], (double)at / 8, 0);
                    found++;
                }
            }
            check_close("number of groups", head, n_groups[head], (double)found, 0);
            free(base);
        }
        const bool with_rows = tail && tail_with_rows(l, t);
        const uint32_t *offset = l->n_levels ? l->level[0].offset + head * (l->level[0].n_clusters + 1) : NULL;
        for (size_t p = 0; tail && p < cpu.n_pruned; p++) { /* the largest weight relative to log Z */
            size_t left = 0;
            for (size_t i = offset[cpu.pruned_cluster[p]]; with_rows && i < offset[cpu.pruned_cluster[p] + 1]; i++)
                left += !read[l->n_fixed + i];
            cpu.pruned_largest[p] = 0;
            for (size_t r = 0; r < t * g; r++) {
                const size_t i = r * cpu.pruned_stride + p;
                if (with_rows) cpu.pruned_keys[i] = (float)left;
                const float weight = cpu.pruned_keys[i] * expf(cpu.pruned_logit[i] - cpu.log_total[r]);
                cpu.pruned_largest[p] = fmaxf(cpu.pruned_largest[p], weight);
            }
        }
        for (size_t r = 0; r < t * g; r++) {
            const size_t at = r / g * heads + head * g + r % g;
            reference_reset(&reference);
            for (size_t i = 0; i < n; i++)
                if (read[i]) reference_add(&reference, mine + r * d, keys + i * d, values + i * d, d, l->shape.scale);
            for (size_t p = 0; tail && p < cpu.n_pruned; p++) {
                const struct sqz_level *level = &l->level[cpu.pruned_level[p]];
                const size_t i = r * cpu.pruned_stride + p, row = head * level->n_clusters + cpu.pruned_cluster[p];
                float largest = cpu.pruned_largest[p];
                if (with_rows) {
                    largest = 0;
                    for (size_t q = r / g * g; q < r / g * g + g; q++) {
                        const size_t j = q * cpu.pruned_stride + p;
                        largest = fmaxf(largest, cpu.pruned_keys[j] * expf(cpu.pruned_logit[j] - cpu.log_total[q]));
                    }
                    if (cpu.pruned_keys[i] == 0) continue;
                }
                if (largest >= TAIL_SKIP * expf(log_threshold))
                    reference_add_logit(&reference, cpu.pruned_logit[i] + log(cpu.pruned_keys[i]),
                                        sqz_rows_f16(&level->value_centroids) + row * d);
            }
            reference_finish(&reference, d, &wanted);
            check_close("lse", at, lse[at], wanted.lse, 1e-3);
            for (size_t i = 0; i < d; i++) check_close("output", i, half_value(out[at * d + i]), wanted.out[i], 1e-2);
        }
    }
    free(mine_norms);
    free(mine);
    free(workspace);
    free(read);
    free(groups);
    free(n_groups);
    free(lse);
    free(gains);
    free(thresholds);
    free(out);
    free(halves);
    free(norms);
    free(queries);
}

static void one_token(void **unused)
{
    (void)unused;
    static const float thresholds[] = {-6.03f, -4.51f, (float)-INFINITY, (float)INFINITY};
    for (size_t v = 0; v < COUNT(variations); v++) {
        struct sqz_layer *l = make_layer(&variations[v], 30 + v);
        struct sqz_layer on_gpu = upload_layer(l);
        for (size_t i = 0; i < COUNT(thresholds); i++) {
            /* With codes the tail leaves out rows that only the GPU reads: bench/gpu/check.py knows them. */
            for (int tail = 0; tail <= (variations[v].rule != SQZ_RULE_PAPER && !variations[v].code_words); tail++) {
                describe("variation %zu, log threshold %g, tail %d", v, thresholds[i], tail);
                check_tokens(l, &on_gpu, thresholds[i], false, tail, 1, 0, 80 + i);
            }
        }
        describe("variation %zu, dense", v);
        check_tokens(l, &on_gpu, 0, true, false, 1, 0, 7);
        free_layer(l);
        assert_int_equal(cudaDeviceReset(), cudaSuccess);
    }
}

/* What a sequence's lookup reads beside rows against lib/'s: numbers are rounded otherwise there, so that some clusters
 * lie on the other side of a threshold; of finer levels the card reads groups of 8. own_keys: [capacity][D] of the head. */
static void check_read(const struct sqz_layer *l, uint32_t head, const float *queries, const uint16_t *own_keys,
                       uint32_t n_own, float log_threshold, const struct sqz_cuda_read *read)
{
    const size_t group = l->shape.n_head / l->shape.n_head_kv, d = l->shape.head_dim;
    const struct sqz_head_plan plan = {.log_threshold = log_threshold};
    const float *q = queries + head * group * d;
    float *norms = take(group, sizeof *norms), *base = take(group, sizeof *base);
    void *workspace = take(sqz_lookup_workspace_bytes(l, group), 1);
    struct sqz_selection s;
    for (size_t g = 0; g < group; g++) {
        base[g] = -INFINITY;
        for (size_t r = 0; r < l->n_fixed + n_own; r++) {
            const uint16_t *key = r < l->n_fixed ? (const uint16_t *)l->keys.data + ((size_t)head * l->n_rows + r) * d
                                                 : own_keys + (r - l->n_fixed) * d;
            double x = 0;
            for (size_t i = 0; i < d; i++) x += (double)q[g * d + i] * (double)half_value(key[i]);
            base[g] = sqz_log_add(base[g], l->shape.scale * (float)x);
        }
        norms[g] = 0;
        for (size_t i = 0; i < d; i++) norms[g] += q[g * d + i] * q[g * d + i];
    }
    sqz_lookup(&s, l, head, &plan, q, norms, group, l->rule == SQZ_RULE_PAPER ? NULL : base, 0, workspace);
    const size_t finer = s.n_centroids_read - l->level[l->n_levels - 1].n_clusters;
    check_close("codes read", head, read->codes, (double)s.n_codes_read, 25 + 0.1 * (double)s.n_codes_read);
    assert_true((double)read->centroids + 8 >= 0.9 * (double)finer && read->centroids <= 8 * finer + 32);
    free(workspace);
    free(base);
    free(norms);
}

/* Sequences whose rows lie apart, with thresholds of their own, in one call; each alone gives the same. */
static void sequences_apart(void **unused)
{
    (void)unused;
    enum { B = 3 };
    static const uint32_t rows[B] = {1, 1030, 70}, capacity[B] = {8, 1100, 70};
    static const float thresholds[B] = {-6.03f, -4.51f, (float)-INFINITY};
    for (size_t v = 0; v < COUNT(variations); v++) {
        struct sqz_layer *l = make_layer(&variations[v], 30 + v);
        const struct sqz_layer on_gpu = upload_layer(l);
        const size_t k = l->shape.n_head_kv, h = l->shape.n_head, d = l->shape.head_dim;
        const bool tail = l->tail;
        uint16_t *halves = take(B * h * d, sizeof *halves), *together = take(B * h * d, sizeof *together),
                 *alone = take(h * d, sizeof *alone);
        float *plans = take(B * k, sizeof *plans), *gains = take(B * k, sizeof *gains);
        struct sqz_cuda_user users[B];
        uint32_t *retained = take(B * k, sizeof *retained), *one_retained = take(k, sizeof *one_retained);
        struct sqz_cuda_read *read = take(B * k, sizeof *read), *one_read = take(k, sizeof *one_read);
        uint16_t *own_keys[B];
        float *queries = random_floats(B * h * d, 77, 0.6);
        to_half(halves, queries, B * h * d);
        for (size_t b = 0; b < B; b++) {
            const size_t n = k * capacity[b] * d;
            float *numbers = random_floats(2 * n, 100 + b, 0.5);
            uint16_t *own = take(2 * n, sizeof *own);
            to_half(own, numbers, 2 * n);
            users[b] = (struct sqz_cuda_user){.keys = upload(own, n * sizeof *own),
                                              .values = upload(own + n, n * sizeof *own),
                                              .capacity_rows = capacity[b],
                                              .n_rows = rows[b]};
            for (size_t i = 0; i < k; i++) plans[b * k + i] = thresholds[b], gains[b * k + i] = 0.1f * (float)b;
            own_keys[b] = own;
            free(numbers);
        }
        struct sqz_cuda_attend_args a;
        memset(&a, 0, sizeof a);
        a.layer = &on_gpu;
        a.plan.log_threshold = upload(plans, B * k * sizeof *plans);
        a.plan.tail_gain = tail ? upload(gains, B * k * sizeof *gains) : NULL;
        a.plan.per_sequence = true;
        a.n_sequences = B;
        a.n_tokens = 1;
        a.queries = upload(halves, B * h * d * sizeof *halves);
        a.out = device_zeros(B * h * d * sizeof *together);
        a.users = upload(users, sizeof users);
        a.n_user = 2048;
        a.n_retained = device_zeros(B * k * sizeof *retained);
        a.read = device_zeros(B * k * sizeof *read);
        a.workspace_bytes = sqz_cuda_attend_workspace_bytes(&a);
        a.workspace = device_zeros(a.workspace_bytes);
        assert_int_equal(sqz_cuda_attend(&a, NULL), SQZ_OK);
        assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
        download(together, a.out, B * h * d * sizeof *together);
        download(retained, a.n_retained, B * k * sizeof *retained);
        download(read, a.read, B * k * sizeof *read);
        for (size_t b = 0; b < B; b++) {
            describe("variation %zu, sequence %zu", v, b);
            for (size_t i = 0; i < k; i++)
                check_read(l, (uint32_t)i, queries + b * h * d, own_keys[b] + i * capacity[b] * d, rows[b],
                           thresholds[b], &read[b * k + i]);
            struct sqz_cuda_attend_args one = a;
            one.plan.log_threshold = upload(plans + b * k, k * sizeof *plans);
            one.plan.tail_gain = tail ? upload(gains + b * k, k * sizeof *gains) : NULL;
            one.plan.per_sequence = false;
            one.n_sequences = 1;
            one.queries = upload(halves + b * h * d, h * d * sizeof *halves);
            one.users = NULL;
            one.user_keys = users[b].keys;
            one.user_values = users[b].values;
            one.user_capacity_rows = capacity[b];
            one.n_user = rows[b];
            one.read = device_zeros(k * sizeof *one_read);
            assert_int_equal(sqz_cuda_attend(&one, NULL), SQZ_OK);
            assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
            download(alone, one.out, h * d * sizeof *alone);
            download(one_retained, one.n_retained, k * sizeof *one_retained);
            download(one_read, one.read, k * sizeof *one_read);
            for (size_t i = 0; i < k; i++) {
                const struct sqz_cuda_read *x = &read[b * k + i], *y = &one_read[i];
                check_close("groups read", i, retained[b * k + i], one_retained[i], 0);
                check_close("centroids read", i, x->centroids, y->centroids, 0);
                check_close("codes read", i, x->codes, y->codes, 0);
                check_close("value centroids read", i, x->value_centroids, y->value_centroids, 2);
            }
            for (size_t i = 0; i < h * d; i++)
                check_close("output", i, half_value(together[b * h * d + i]), half_value(alone[i]), 2e-3);
        }
        for (size_t b = 0; b < B; b++) free(own_keys[b]);
        free(one_read);
        free(read);
        free(one_retained);
        free(retained);
        free(queries);
        free(gains);
        free(plans);
        free(alone);
        free(together);
        free(halves);
        free_layer(l);
        assert_int_equal(cudaDeviceReset(), cudaSuccess);
    }
}

/* ---- As llama.cpp has it --------------------------------------------------------------- */

enum { NODE_ROWS = 21, NODE_CAPACITY = 40 };

/* Own rows of a sequence, all but the last of NODE_ROWS there. */
static struct sqz_cuda_user node_user(size_t k, size_t d)
{
    const size_t n = 2 * k * NODE_CAPACITY * d;
    float *numbers = random_floats(n, 91, 0.5);
    uint16_t *own = take(n, sizeof *own);
    to_half(own, numbers, n);
    for (size_t head = 0; head < 2 * k; head++)
        memset(own + (head * NODE_CAPACITY + NODE_ROWS - 1) * d, 0, d * sizeof *own);
    uint16_t *keys = upload(own, n * sizeof *own);
    free(own);
    free(numbers);
    return (struct sqz_cuda_user){
        .keys = keys, .values = keys + n / 2, .capacity_rows = NODE_CAPACITY, .n_rows = NODE_ROWS};
}

/* A node's queries, keys and values become its output and a row behind the sequence's own, in one call as in three. */
static void nodes(void **unused)
{
    (void)unused;
    const struct sqz_gpu_calls *calls = sqz_gpu_calls();
    for (size_t v = 0; v < COUNT(variations); v++) {
        struct sqz_layer *l = make_layer(&variations[v], 50 + v);
        const struct sqz_layer on_gpu = upload_layer(l);
        const size_t k = l->shape.n_head_kv, h = l->shape.n_head, d = l->shape.head_dim,
                     own = 2 * k * NODE_CAPACITY * d;
        float *queries = random_floats(h * d, 78, 0.6), *rows = random_floats(2 * k * d, 79, 0.5), threshold[32],
              out[2][32 * 256];
        uint16_t *new_rows = take(2 * k * d, sizeof *new_rows), *own_rows[2];
        uint32_t retained[2][32];
        to_half(new_rows, rows, 2 * k * d);
        for (size_t i = 0; i < k; i++) threshold[i] = -5.0f;
        const uint16_t *on_card = upload(new_rows, 2 * k * d * sizeof *new_rows);
        float *result = device_zeros(h * d * sizeof *result);
        for (int once = 0; once < 2; once++) {
            const struct sqz_cuda_user user = node_user(k, d);
            struct sqz_cuda_attend_args a = {.layer = &on_gpu, .n_sequences = 1, .n_tokens = 1, .n_user = 1024};
            a.plan.log_threshold = upload(threshold, k * sizeof *threshold);
            a.plan.tail_gain = l->tail ? device_zeros(k * sizeof(float)) : NULL;
            a.plan.tail_skip = TAIL_SKIP;
            a.plan.per_sequence = true;
            a.queries = device_zeros(h * d * 2);
            a.out = device_zeros(h * d * 2);
            a.users = upload(&user, sizeof user);
            a.n_retained = device_zeros(k * sizeof(uint32_t));
            a.workspace_bytes = sqz_cuda_attend_workspace_bytes(&a);
            a.workspace = device_zeros(a.workspace_bytes);
            const struct sqz_gpu_node node = {1,           (uint32_t)h,
                                              (uint32_t)k, (uint32_t)d,
                                              (uint32_t)d, upload(queries, h * d * 4),
                                              h * d,       d,
                                              on_card,     on_card + k * d,
                                              k * d,       d,
                                              k * d,       d,
                                              a.users,     NULL,
                                              NULL,        0,
                                              0,           (void *)a.queries};
            describe("variation %zu, %s", v, once ? "one call" : "three calls");
            if (once) {
                assert_int_equal(calls->attend_node(&a, &node, result, NULL), SQZ_OK);
            } else {
                assert_int_equal(calls->take(&node, NULL), SQZ_OK);
                assert_int_equal(calls->attend(&a, NULL), SQZ_OK);
                assert_int_equal(calls->give(result, a.out, h, (uint32_t)d, (uint32_t)d, NULL), SQZ_OK);
            }
            assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
            download(out[once], result, h * d * sizeof *result);
            download(retained[once], a.n_retained, k * sizeof **retained);
            own_rows[once] = take(own, sizeof **own_rows);
            download(own_rows[once], user.keys, own * sizeof **own_rows);
        }
        for (size_t i = 0; i < h * d; i++) check_close("output", i, out[1][i], out[0][i], 2e-3);
        for (size_t i = 0; i < k; i++) check_close("groups read", i, retained[1][i], retained[0][i], 0);
        assert_memory_equal(own_rows[0], own_rows[1], own * sizeof **own_rows);
        for (size_t head = 0; head < 2 * k; head++)
            assert_memory_equal(own_rows[1] + (head * NODE_CAPACITY + NODE_ROWS - 1) * d, new_rows + head * d,
                                d * sizeof *new_rows);
        free(own_rows[0]);
        free(own_rows[1]);
        free(new_rows);
        free(rows);
        free(queries);
        free_layer(l);
        assert_int_equal(cudaDeviceReset(), cudaSuccess);
    }
}

/* ---- Several contexts -------------------------------------------------------------------- */

enum { CONTEXTS = 3, CONTEXT_TOKENS = 5 };
static const uint32_t context_tokens[CONTEXTS] = {1, 3, 1};

/* Tokens of several contexts, with what their calls and their node have on the card. */
struct contexts_case {
    struct sqz_layer *layers[CONTEXTS], on_gpu[CONTEXTS];
    struct sqz_cuda_attend_args calls[CONTEXTS];
    struct sqz_gpu_node node;
    struct sqz_cuda_user users[CONTEXT_TOKENS];
    float *result;
    size_t k, h, d;
};

static void make_contexts_case(struct contexts_case *c, const struct variation *v, bool dense)
{
    const size_t k = c->k = v->n_head_kv, h = c->h = v->n_head, d = c->d = v->head_dim, t = CONTEXT_TOKENS;
    float *queries = random_floats(t * h * d, 178, 0.6), *rows = random_floats(2 * t * k * d, 179, 0.5),
          *thresholds = take(t * k, sizeof *thresholds), *gains = take(t * k, sizeof *gains);
    uint16_t *new_rows = take(2 * t * k * d, sizeof *new_rows);
    to_half(new_rows, rows, 2 * t * k * d);
    for (size_t i = 0; i < t * k; i++) thresholds[i] = -4.5f - 0.3f * (float)(i / k), gains[i] = 0.1f * (float)(i / k);
    for (size_t i = 0; i < t; i++) c->users[i] = node_user(k, d);
    const uint16_t *on_card = upload(new_rows, 2 * t * k * d * sizeof *new_rows);
    struct sqz_cuda_attend_args a = {.dense = dense, .n_tokens = 1, .n_user = 1024};
    a.plan.log_threshold = upload(thresholds, t * k * sizeof *thresholds);
    a.plan.tail_skip = TAIL_SKIP;
    a.plan.per_sequence = true;
    a.queries = device_zeros(t * h * d * 2);
    a.out = device_zeros(t * h * d * 2);
    a.users = upload(c->users, sizeof c->users);
    a.n_retained = device_zeros(t * k * sizeof(uint32_t));
    a.read = device_zeros(t * k * sizeof(struct sqz_cuda_read));
    const float *tail = upload(gains, t * k * sizeof *gains);
    c->node = (struct sqz_gpu_node){.n_tokens = (uint32_t)t,
                                    .n_head = (uint32_t)h,
                                    .n_head_kv = (uint32_t)k,
                                    .head_dim = (uint32_t)d,
                                    .padded_dim = (uint32_t)d,
                                    .queries = upload(queries, t * h * d * sizeof *queries),
                                    .query_token_stride = h * d,
                                    .query_head_stride = d,
                                    .keys = on_card,
                                    .values = on_card + t * k * d,
                                    .key_token_stride = k * d,
                                    .key_head_stride = d,
                                    .value_token_stride = k * d,
                                    .value_head_stride = d,
                                    .users = a.users,
                                    .queries_f16 = (void *)(uintptr_t)a.queries};
    c->result = device_zeros(t * h * d * sizeof(float));
    for (size_t i = 0, first = 0; i < CONTEXTS; first += context_tokens[i++]) {
        struct variation of = *v;
        of.n_rows = v->n_rows / (uint32_t)(i + 1) + 37 * (uint32_t)i;
        c->layers[i] = make_layer(&of, 300 + i);
        c->on_gpu[i] = upload_layer(c->layers[i]);
        struct sqz_cuda_attend_args *one = &c->calls[i];
        *one = a;
        one->layer = &c->on_gpu[i];
        one->n_sequences = context_tokens[i];
        one->plan.log_threshold += first * k;
        one->plan.variance_gain = upload(c->layers[i]->variance_gain, k * sizeof(float));
        if (c->layers[i]->tail && i != 1) one->plan.tail_gain = tail + first * k; /* one of the contexts has none */
        one->queries = (const char *)a.queries + first * h * d * 2;
        one->out = (char *)a.out + first * h * d * 2;
        one->users += first;
        one->n_retained += first * k;
        one->read += first * k;
    }
    free(queries);
    free(rows);
    free(thresholds);
    free(gains);
    free(new_rows);
}

/* What a run gave, on the host. */
struct contexts_result {
    float *out;
    uint32_t *retained;
    struct sqz_cuda_read *read;
    uint16_t *own; /* the first token's rows */
};

static struct contexts_result take_contexts_result(const struct contexts_case *c)
{
    const size_t n = CONTEXT_TOKENS * c->h * c->d, pairs = CONTEXT_TOKENS * c->k, own = 2 * c->k * NODE_CAPACITY * c->d;
    struct contexts_result r = {take(n, sizeof *r.out), take(pairs, sizeof *r.retained), take(pairs, sizeof *r.read),
                                take(own, sizeof *r.own)};
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
    download(r.out, c->result, n * sizeof *r.out);
    download(r.retained, c->calls->n_retained, pairs * sizeof *r.retained);
    download(r.read, c->calls->read, pairs * sizeof *r.read);
    download(r.own, c->users[0].keys, own * sizeof *r.own);
    assert_int_equal(cudaMemset(c->calls->read, 0, pairs * sizeof *r.read), cudaSuccess);
    assert_int_equal(cudaMemset(c->result, 0, n * sizeof *r.out), cudaSuccess);
    return r;
}

static void free_contexts_result(struct contexts_result *r)
{
    free(r->out);
    free(r->retained);
    free(r->read);
    free(r->own);
}

static void attend_each_context(struct contexts_case *c)
{
    for (size_t i = 0, first = 0; i < CONTEXTS; first += context_tokens[i++]) {
        struct sqz_gpu_node node = c->node;
        struct sqz_cuda_attend_args *a = &c->calls[i];
        a->workspace_bytes = sqz_cuda_attend_workspace_bytes(a);
        a->workspace = device_zeros(a->workspace_bytes);
        node.n_tokens = context_tokens[i];
        node.queries += first * node.query_token_stride;
        node.keys = (const uint16_t *)node.keys + first * node.key_token_stride;
        node.values = (const uint16_t *)node.values + first * node.value_token_stride;
        node.users = a->users;
        node.queries_f16 = (void *)(uintptr_t)a->queries;
        assert_int_equal(sqz_gpu_calls()->attend_node(a, &node, c->result + first * c->h * c->d, NULL), SQZ_OK);
    }
}

/* Tokens of several contexts in one call; false: it was refused, as it may be. */
static bool check_contexts(const struct variation *v, bool dense)
{
    const struct sqz_gpu_calls *calls = sqz_gpu_calls();
    struct contexts_case c;
    make_contexts_case(&c, v, dense);
    attend_each_context(&c);
    struct contexts_result each = take_contexts_result(&c);
    const size_t bytes = calls->several_workspace_bytes(c.calls, CONTEXTS);
    c.calls->workspace_bytes = bytes;
    c.calls->workspace = device_zeros(bytes);
    const enum sqz_status status = calls->attend_several(c.calls, CONTEXTS, &c.node, c.result, NULL);
    check_true("it is refused or done", 0, status, SQZ_OK, status == SQZ_OK || status == SQZ_ERROR_UNSUPPORTED);
    if (!bytes) assert_int_equal(status, SQZ_ERROR_UNSUPPORTED);
    struct contexts_result all = take_contexts_result(&c);
    for (size_t i = 0; i < CONTEXT_TOKENS * c.k && status == SQZ_OK && !dense; i++) {
        check_close("groups read", i, all.retained[i], each.retained[i], 0);
        check_close("codes read", i, all.read[i].codes, each.read[i].codes, 0);
        check_close("value centroids read", i, all.read[i].value_centroids, each.read[i].value_centroids, 2);
    }
    for (size_t i = 0; i < CONTEXT_TOKENS * c.h * c.d && status == SQZ_OK; i++)
        check_close("output", i, all.out[i], each.out[i], 2e-3);
    assert_memory_equal(all.own, each.own, 2 * c.k * NODE_CAPACITY * c.d * sizeof *all.own);
    /* Arrays that do not go on from call to call. */
    c.calls[1].users--;
    assert_int_equal(calls->several_workspace_bytes(c.calls, CONTEXTS), 0);
    assert_int_equal(calls->attend_several(c.calls, CONTEXTS, &c.node, c.result, NULL), SQZ_ERROR_UNSUPPORTED);
    free_contexts_result(&each);
    free_contexts_result(&all);
    for (size_t i = 0; i < CONTEXTS; i++) free_layer(c.layers[i]);
    assert_int_equal(cudaDeviceReset(), cudaSuccess);
    return status == SQZ_OK;
}

static void contexts_together(void **unused)
{
    int device, major;
    size_t n_chosen = 0;
    (void)unused;
    assert_int_equal(cudaGetDevice(&device), cudaSuccess);
    assert_int_equal(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), cudaSuccess);
    for (size_t v = 0; v < COUNT(variations); v++) {
        describe("variation %zu of several contexts", v);
        n_chosen += check_contexts(&variations[v], false);
        describe("variation %zu of several contexts, dense", v);
        assert_true(check_contexts(&variations[v], true) == (variations[v].rows == SQZ_ROWS_F16));
    }
    printf("%zu of %zu variations go together on several contexts\n", n_chosen, COUNT(variations));
    if (major == 9) assert_true(n_chosen >= 8);
}

/* ---- Rows of a block ----------------------------------------------------------------------- */

/* A block that may read all rows reads what counts at all: clusters above e^-80 of the whole. Queries are all alike, and
 * clusters' logits 0, -70 and -90 in turn. */
static void rows_that_count(void **unused)
{
    static const struct variation v = {8,   2, 128,          1,    SQZ_INDEX_F16, SQZ_RULE_DEFAULT, SQZ_GROUP_MEAN,
                                       900, 0, SQZ_ROWS_F16, false};
    static const float logits[] = {0, -70, -90};
    enum { T = 2 };
    (void)unused;
    struct sqz_layer *l = make_layer(&v, 41);
    const size_t k = v.n_head_kv, h = v.n_head, d = v.head_dim, c = l->level[0].n_clusters, n = l->n_rows;
    float *ones = take(T * h * d, sizeof *ones), *zeros = take(k * c, sizeof *zeros),
          *centroids = take(k * c * d, sizeof *centroids);
    uint16_t *halves = take(k * c * d, sizeof *halves), *queries = take(T * h * d, sizeof *queries);
    uint32_t rows[2] = {(uint32_t)n, (uint32_t)n}, retained[2];
    for (size_t i = 0; i < T * h * d; i++) ones[i] = 1;
    for (size_t i = 0; i < k * c * d; i++) centroids[i] = logits[i / d % c % 3] / (l->shape.scale * (float)d);
    to_half(queries, ones, T * h * d);
    to_half(halves, centroids, k * c * d);
    struct sqz_layer on_gpu = upload_layer(l);
    on_gpu.level[0].centroids.data = upload(halves, k * c * d * sizeof *halves);
    on_gpu.level[0].variance = upload(zeros, k * c * sizeof *zeros);
    struct sqz_cuda_attend_args a = {.layer = &on_gpu, .n_sequences = 1, .n_tokens = T};
    a.plan.log_threshold = upload(zeros, k * sizeof *zeros);
    a.plan.retain_rows = upload(rows, sizeof rows);
    a.queries = upload(queries, T * h * d * sizeof *queries);
    a.out = device_zeros(T * h * d * 2);
    a.n_retained = device_zeros(sizeof retained);
    a.workspace_bytes = sqz_cuda_attend_workspace_bytes(&a);
    a.workspace = device_zeros(a.workspace_bytes);
    assert_int_equal(sqz_cuda_attend(&a, NULL), SQZ_OK);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
    download(retained, a.n_retained, sizeof retained);
    for (size_t head = 0; head < k; head++) {
        const uint32_t *offset = l->level[0].offset + head * (c + 1);
        uint32_t groups = 0, unread = 0;
        for (size_t g = 0, cluster = 0; 8 * g < n; g++) {
            bool any = false;
            for (size_t row = 8 * g; row < 8 * g + 8 && row < n; row++) {
                while (row >= l->n_fixed && offset[cluster + 1] <= row - l->n_fixed) cluster++;
                any = any || row < l->n_fixed || cluster % 3 != 2;
            }
            groups += any;
            unread += !any;
        }
        describe("rows that count");
        check_true("some groups have none", head, unread, 1, unread > 0);
        check_close("groups read", head, retained[head], groups, 0);
    }
    free(ones);
    free(zeros);
    free(centroids);
    free(halves);
    free(queries);
    free_layer(l);
    assert_int_equal(cudaDeviceReset(), cudaSuccess);
}

/* ---- Windows ---------------------------------------------------------------------- */

enum { WINDOW_ROWS = 300, OWN_ROWS = 200, WINDOW_TOKENS = 150 };

/* A layer whose tokens see windows: rows of the context, then the tokens' own, on the host and on the GPU. */
struct window_case {
    struct sqz_layer layer;
    size_t window;
    uint16_t *rows, *own, *queries; /* keys, then values; F16 */
    const uint16_t *own_gpu;
    void *queries_gpu;
};

static struct window_case make_window_case(uint32_t n_head, uint32_t n_head_kv, uint32_t d, size_t window)
{
    const size_t n = (size_t)n_head_kv * WINDOW_ROWS * d, n_own = (size_t)n_head_kv * OWN_ROWS * d,
                 n_queries = (size_t)WINDOW_TOKENS * n_head * d;
    struct window_case w = {.layer = {.space = SQZ_SPACE_CUDA, .shape = make_shape(n_head, n_head_kv, d)},
                            .window = window};
    float *numbers = random_floats(2 * n + 2 * n_own + n_queries, 5 + window, 0.6);
    w.rows = take(2 * n, sizeof *w.rows);
    w.own = take(2 * n_own, sizeof *w.own);
    w.queries = take(n_queries, sizeof *w.queries);
    to_half(w.rows, numbers, 2 * n);
    to_half(w.own, numbers + 2 * n, 2 * n_own);
    to_half(w.queries, numbers + 2 * n + 2 * n_own, n_queries);
    free(numbers);
    const uint16_t *rows = upload(w.rows, 2 * n * sizeof *w.rows);
    w.own_gpu = upload(w.own, 2 * n_own * sizeof *w.own);
    w.queries_gpu = upload(w.queries, n_queries * sizeof *w.queries);
    w.layer.n_rows = WINDOW_ROWS;
    w.layer.keys = (struct sqz_rows){.type = SQZ_ROW_F16, .data = rows};
    w.layer.values = (struct sqz_rows){.type = SQZ_ROW_F16, .data = rows + n};
    return w;
}

static void free_window_case(const struct window_case *w)
{
    free(w->rows);
    free(w->own);
    free(w->queries);
}

/* The output of query row `head` of a token that is the last of n_own, from query row `row`; with_context: its window
 * also reaches the context. */
static void check_window_row(const struct window_case *w, size_t row, size_t head, size_t n_own, bool with_context,
                             const double *out)
{
    const struct sqz_layer_shape *s = &w->layer.shape;
    const size_t d = s->head_dim, k = s->n_head_kv, kv = head / (s->n_head / k), n = with_context ? WINDOW_ROWS : 0;
    const uint16_t *keys = w->rows + kv * WINDOW_ROWS * d, *values = keys + k * WINDOW_ROWS * d;
    const uint16_t *own_keys = w->own + kv * OWN_ROWS * d, *own_values = own_keys + k * OWN_ROWS * d;
    const size_t end = n + n_own, first = end > w->window ? end - w->window : 0;
    float query[MAX_HEAD_DIM];
    for (size_t i = 0; i < d; i++) query[i] = (float)half_value(w->queries[row * d + i]);
    reference_reset(&reference);
    for (size_t x = first; x < end; x++) {
        const size_t at = (x < n ? x : x - n) * d;
        reference_add(&reference, query, (x < n ? keys : own_keys) + at, (x < n ? values : own_values) + at, d,
                      s->scale);
    }
    reference_finish(&reference, d, &wanted);
    for (size_t i = 0; i < d; i++) check_close("output", row * d + i, out[i], wanted.out[i], 5e-3);
}

static void check_window_rows(const struct window_case *w, size_t n_tokens, const size_t *n_own, bool with_context,
                              const void *out_gpu, bool out_f32)
{
    const size_t h = w->layer.shape.n_head, d = w->layer.shape.head_dim, n = n_tokens * h * d;
    double out[MAX_HEAD_DIM];
    float *floats = take(n, sizeof *floats);
    download(floats, out_gpu, n * (out_f32 ? sizeof(float) : sizeof(uint16_t)));
    const uint16_t *halves = (const uint16_t *)floats;
    for (size_t row = 0; row < n_tokens * h; row++) {
        for (size_t i = 0; i < d; i++) out[i] = out_f32 ? (double)floats[row * d + i] : half_value(halves[row * d + i]);
        check_window_row(w, row, row % h, n_own[row / h], with_context, out);
    }
    free(floats);
}

/* Single tokens of one text, each with a window of its own: some still see all of the context, some nothing of it. */
static void check_window_tokens(const struct window_case *w)
{
    enum { B = 6 };
    static const size_t n_own[B] = {1, 2, 17, 64, 90, OWN_ROWS};
    const size_t d = w->layer.shape.head_dim, h = w->layer.shape.n_head;
    struct sqz_cuda_user users[B];
    for (size_t b = 0; b < B; b++) {
        const size_t end = WINDOW_ROWS + n_own[b], first = end > w->window ? end - w->window : 0;
        const size_t unseen = first > WINDOW_ROWS ? first - WINDOW_ROWS : 0;
        const uint16_t *keys = w->own_gpu + unseen * d;
        users[b] = (struct sqz_cuda_user){.keys = keys,
                                          .values = keys + w->layer.shape.n_head_kv * OWN_ROWS * d,
                                          .capacity_rows = OWN_ROWS,
                                          .n_rows = (uint32_t)(n_own[b] - unseen),
                                          .first_row = (uint32_t)(first - unseen)};
    }
    struct sqz_cuda_attend_args a = {.layer = &w->layer, .dense = true, .n_sequences = B, .n_tokens = 1};
    a.queries = w->queries_gpu;
    a.out = device_zeros(B * h * d * sizeof(uint16_t));
    a.users = upload(users, sizeof users);
    a.n_user = 1024;
    assert_true(sqz_cuda_attend_supported(&a));
    a.workspace_bytes = sqz_cuda_attend_workspace_bytes(&a);
    a.workspace = device_zeros(a.workspace_bytes);
    assert_int_equal(sqz_cuda_attend(&a, NULL), SQZ_OK);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
    check_window_rows(w, B, n_own, true, a.out, false);
}

/* A block of tokens behind the context, then the same as a text that is being read. */
static void check_window_block(const struct window_case *w, size_t t)
{
    size_t n_own[WINDOW_TOKENS];
    const size_t d = w->layer.shape.head_dim, h = w->layer.shape.n_head, k = w->layer.shape.n_head_kv;
    for (size_t i = 0; i < t; i++) n_own[i] = OWN_ROWS - t + i + 1;
    struct sqz_cuda_attend_args a = {.layer = &w->layer, .dense = true, .n_sequences = 1, .n_tokens = (uint32_t)t};
    a.queries = w->queries_gpu;
    a.out = device_zeros(t * h * d * sizeof(uint16_t));
    a.user_keys = w->own_gpu;
    a.user_values = w->own_gpu + k * OWN_ROWS * d;
    a.user_capacity_rows = a.n_user = OWN_ROWS;
    a.windowed = true;
    a.first_row = (int32_t)(WINDOW_ROWS + n_own[0]) - (int32_t)w->window;
    assert_true(sqz_cuda_attend_supported(&a));
    a.workspace_bytes = sqz_cuda_attend_workspace_bytes(&a);
    a.workspace = device_zeros(a.workspace_bytes);
    assert_int_equal(sqz_cuda_attend(&a, NULL), SQZ_OK);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
    check_window_rows(w, t, n_own, true, a.out, false);

    struct sqz_gpu_causal c = {.shape = w->layer.shape,
                               .n_tokens = (uint32_t)t,
                               .n_rows = OWN_ROWS,
                               .window_tokens = (uint32_t)w->window,
                               .queries = w->queries_gpu,
                               .keys = a.user_keys,
                               .values = a.user_values,
                               .capacity_rows = OWN_ROWS,
                               .out = device_zeros(t * h * d * sizeof(float))};
    c.workspace_bytes = sqz_gpu_calls()->causal_workspace_bytes(&c);
    assert_true(c.workspace_bytes > 0);
    c.workspace = device_zeros(c.workspace_bytes);
    assert_int_equal(sqz_gpu_calls()->causal(&c, NULL), SQZ_OK);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
    check_window_rows(w, t, n_own, false, c.out, true);
}

static void windows(void **unused)
{
    (void)unused;
    static const struct sqz_layer_shape shapes[] = {{4, 4, 64, 0}, {8, 2, 128, 0}, {6, 1, 96, 0}, {4, 1, 256, 0}};
    static const size_t lengths[] = {1, 40, 129, WINDOW_ROWS, WINDOW_ROWS + OWN_ROWS + 5},
                        tokens[] = {1, 2, 67, WINDOW_TOKENS};
    for (size_t s = 0; s < COUNT(shapes); s++)
        for (size_t i = 0; i < COUNT(lengths); i++) {
            const struct window_case w =
                make_window_case(shapes[s].n_head, shapes[s].n_head_kv, shapes[s].head_dim, lengths[i]);
            describe("head dimension %u, window of %zu, single tokens", shapes[s].head_dim, lengths[i]);
            check_window_tokens(&w);
            for (size_t t = 0; t < COUNT(tokens); t++) {
                describe("head dimension %u, window of %zu, %zu tokens", shapes[s].head_dim, lengths[i], tokens[t]);
                check_window_block(&w, tokens[t]);
            }
            free_window_case(&w);
            assert_int_equal(cudaDeviceReset(), cudaSuccess);
        }
}

/* ---- Own rows in planes ------------------------------------------------------------------------- */

enum {
    OWN_BLOCK = SQZ_CUDA_USER_BLOCK,
    OWN_ALL = 5 * OWN_BLOCK + 70, /* rows; */
    OWN_PLANES = 4 * OWN_BLOCK,   /* of which the last one reads so many in planes */
    OWN_FIRST = 2 * OWN_BLOCK,    /* that there is room for at first */
    OWN_SEQUENCES = 3,
    OWN_TOKENS = 50 /* of a call */
};

/* Own rows of a sequence behind a layer in planes, as F16, and in planes on the card and on the host. */
struct own_case {
    const struct sqz_layer *layer, *on_gpu; /* as F16 on the host */
    size_t k, h, d;
    uint16_t *f16; /* [keys, values][K][OWN_ALL][D] */
    const uint16_t *f16_gpu;
    void *planes;    /* of OWN_ALL rounded up */
    uint16_t *mixed; /* as f16, the rows in planes what they are there */
};

/* Rows that are near one another within a block; values of the second block are larger than those before. */
static void make_own_rows(struct own_case *c)
{
    const size_t n = 2 * c->k * OWN_ALL * c->d;
    float *x = random_floats(n, 301, 0.5);
    for (size_t i = 0; i < n; i++) {
        const size_t row = i / c->d % OWN_ALL, block = row / OWN_BLOCK;
        const bool value = i >= n / 2;
        if (value && block == 1) x[i] *= 4;
        if (!value) x[i] += (float)((block * 7 + i % c->d * 3) % 5) - 2;
    }
    c->f16 = take(n, sizeof *c->f16);
    to_half(c->f16, x, n);
    c->f16_gpu = upload(c->f16, n * sizeof *c->f16);
    free(x);
}

static struct sqz_cuda_flush_args flush_of(const struct own_case *c, void *planes, size_t capacity, size_t first,
                                           size_t n)
{
    const size_t from = first * OWN_BLOCK * c->d;
    return (struct sqz_cuda_flush_args){.layer = c->on_gpu,
                                        .planes = planes,
                                        .capacity_rows = (uint32_t)capacity,
                                        .first_block = (uint32_t)first,
                                        .n_blocks = (uint32_t)n,
                                        .keys = c->f16_gpu + from,
                                        .values = c->f16_gpu + c->k * OWN_ALL * c->d + from,
                                        .key_capacity_rows = OWN_ALL};
}

/* One head's keys or values in planes on the host: room for them, with the base that rows are relative to. */
struct host_planes {
    struct sqz_rows rows;
    uint8_t upper[OWN_PLANES * 64], lower[OWN_PLANES * 64];
    uint16_t step[OWN_PLANES], centroid[OWN_PLANES / OWN_BLOCK * 128];
    uint32_t offset[OWN_PLANES / OWN_BLOCK + 1];
    float mean[128];
};

static void set_host_planes(struct host_planes *p, enum sqz_row_type type, bool keys)
{
    memset(p->step, 0, sizeof p->step);
    p->rows = (struct sqz_rows){.type = type, .data = p->upper, .planes = {.step = p->step}};
    if (type == SQZ_ROW_I44) p->rows.planes.lower = p->lower;
    for (uint32_t i = 0; i <= OWN_PLANES / OWN_BLOCK; i++) p->offset[i] = i * OWN_BLOCK;
    if (keys)
        p->rows.planes.centres = (struct sqz_centres){
            .type = SQZ_ROW_F16, .data = p->centroid, .offset = p->offset, .n = OWN_PLANES / OWN_BLOCK};
    else p->rows.mean = p->mean;
}

/* What the card has of a head. */
static void download_planes(struct host_planes *p, const struct own_case *c, enum sqz_row_type type, bool keys,
                            size_t head, const char *planes, size_t capacity)
{
    const struct sqz_cuda_user_places at = sqz_cuda_user_places_of((uint32_t)c->k, (uint32_t)c->d, (uint32_t)capacity);
    const size_t row = head * capacity, plane = OWN_PLANES * c->d / 2;
    uint32_t steps[OWN_PLANES];
    float unit;
    set_host_planes(p, type, keys);
    download(p->upper, planes + at.upper[!keys] + row * c->d / 2, plane);
    if (type == SQZ_ROW_I44) download(p->lower, planes + at.lower[!keys] + row * c->d / 2, plane);
    download(steps, planes + at.steps + row * sizeof *steps, sizeof steps);
    download(&unit, planes + at.unit + head * sizeof unit, sizeof unit);
    download(p->centroid, planes + at.centroids + row / OWN_BLOCK * c->d * 2, OWN_PLANES / OWN_BLOCK * c->d * 2);
    download(p->mean, c->on_gpu->values.mean + head * c->d, c->d * sizeof(float));
    for (size_t i = 0; i < OWN_PLANES; i++) {
        const float step = keys ? 0 : (float)half_value((uint16_t)(steps[i] >> 16)) * unit;
        p->step[i] = (uint16_t)steps[i];
        if (!keys) to_half(&p->step[i], &step, 1);
    }
}

/* What lib/ makes of the same rows. */
static void store_planes(struct host_planes *p, const struct own_case *c, enum sqz_row_type type, bool keys,
                         size_t head)
{
    const uint16_t *rows = c->f16 + ((keys ? 0 : c->k) + head) * OWN_ALL * c->d;
    float row[128];
    set_host_planes(p, type, keys);
    download(p->mean, c->on_gpu->values.mean + head * c->d, c->d * sizeof(float));
    for (size_t block = 0; block < OWN_PLANES / OWN_BLOCK; block++)
        for (size_t i = 0; i < c->d; i++) {
            float sum = 0;
            for (size_t r = 0; r < OWN_BLOCK; r++) sum += (float)half_value(rows[(block * OWN_BLOCK + r) * c->d + i]);
            sum *= 1.0f / OWN_BLOCK;
            to_half(&p->centroid[block * c->d + i], &sum, 1);
        }
    for (size_t r = 0; r < OWN_PLANES; r++) {
        for (size_t i = 0; i < c->d; i++) row[i] = (float)half_value(rows[r * c->d + i]);
        sqz_rows_store(&p->rows, r, row, c->d);
    }
}

/* Number i of a row, as it is stored. */
static int stored_number(const struct host_planes *p, size_t row, size_t i, size_t d)
{
    const size_t byte = row * d / 2 + i / 32 * 16 + i % 16, shift = i % 32 < 16 ? 0 : 4;
    const int upper = p->upper[byte] >> shift & 15;
    return p->rows.planes.lower ? 16 * upper + (p->lower[byte] >> shift & 15) : upper;
}

/* Same steps, numbers one apart at most, and nearly all of them the same: sums add in another order nowhere, but a turned number may
 * be rounded once more. */
static void check_planes(const struct own_case *c, const char *planes, size_t capacity, enum sqz_row_type type)
{
    static struct host_planes card, host;
    size_t n_other = 0, n = 0;
    for (size_t i = 0; i < 2 * c->k; i++) {
        const bool keys = i % 2 == 0;
        download_planes(&card, c, type, keys, i / 2, planes, capacity);
        store_planes(&host, c, type, keys, i / 2);
        if (keys) assert_memory_equal(card.centroid, host.centroid, OWN_PLANES / OWN_BLOCK * c->d * 2);
        for (size_t r = 0; r < OWN_PLANES; r++) {
            check_close("step", r, half_value(card.step[r]) / half_value(host.step[r]), 1, 1e-3);
            for (size_t j = 0; j < c->d; j++, n++) {
                const int a = stored_number(&card, r, j, c->d), b = stored_number(&host, r, j, c->d);
                n_other += a != b;
                if (abs(a - b) > 1) check_close("number", r * c->d + j, a, b, 1);
            }
        }
    }
    assert_true(n_other <= n / 1000);
}

/* Says what it takes to put a block into planes again, which changes nothing. */
static void time_flush(const struct own_case *c, void *planes, size_t capacity)
{
    enum { TURNS = 20 };
    const struct sqz_cuda_flush_args flush = flush_of(c, planes, capacity, OWN_PLANES / OWN_BLOCK - 1, 1);
    cudaEvent_t begin, end;
    float ms = 0;
    assert_int_equal(cudaEventCreate(&begin), cudaSuccess);
    assert_int_equal(cudaEventCreate(&end), cudaSuccess);
    assert_int_equal(cudaEventRecord(begin, NULL), cudaSuccess);
    for (int i = 0; i < TURNS; i++) assert_int_equal(sqz_cuda_flush(&flush, NULL), SQZ_OK);
    assert_int_equal(cudaEventRecord(end, NULL), cudaSuccess);
    assert_int_equal(cudaEventSynchronize(end), cudaSuccess);
    assert_int_equal(cudaEventElapsedTime(&ms, begin, end), cudaSuccess);
    printf("a block of own rows, %zu heads of %zu, into planes: %.1f us\n", c->k, c->d, 1000.0 * (double)ms / TURNS);
    assert_int_equal(cudaEventDestroy(begin), cudaSuccess);
    assert_int_equal(cudaEventDestroy(end), cudaSuccess);
}

/* The F16 rows, of which those in planes are what they are there, read by what `type` has. */
static void mix_rows(struct own_case *c, size_t n_planes, enum sqz_row_type type)
{
    static struct host_planes card;
    const size_t capacity = (OWN_ALL + OWN_BLOCK - 1) / OWN_BLOCK * OWN_BLOCK;
    memcpy(c->mixed, c->f16, 2 * c->k * OWN_ALL * c->d * sizeof *c->mixed);
    for (size_t i = 0; i < 2 * c->k && n_planes; i++) {
        const bool keys = i < c->k;
        download_planes(&card, c, type, keys, i % c->k, c->planes, capacity);
        sqz_rows_to_f16(c->mixed + i * OWN_ALL * c->d, &card.rows, 0, n_planes, c->d);
    }
}

static size_t flushed_before(size_t row)
{
    return row < OWN_BLOCK ? 0 : (row / OWN_BLOCK - 1) * OWN_BLOCK;
}

/* Sequences that have seen so many of the rows, as a token of each asks. */
static const size_t own_seen[OWN_SEQUENCES] = {OWN_ALL, 3 * OWN_BLOCK + 1, 100};

/* One call with rows in planes against one with F16 rows that say the same. */
static void check_own_tokens(struct own_case *c, const struct sqz_layer *user_layer, bool dense, bool together)
{
    const size_t b = OWN_SEQUENCES, numbers = b * c->h * c->d, rows = c->k * OWN_ALL * c->d;
    const size_t capacity = (OWN_ALL + OWN_BLOCK - 1) / OWN_BLOCK * OWN_BLOCK;
    float *queries = random_floats(numbers, 302, 0.6), thresholds[OWN_SEQUENCES * 64], gains[OWN_SEQUENCES * 64];
    uint16_t *halves = take(numbers, sizeof *halves), *out[2];
    uint32_t retained[2][OWN_SEQUENCES * 64];
    float lse[2][OWN_SEQUENCES * 64];
    to_half(halves, queries, numbers);
    for (size_t i = 0; i < b * c->k; i++) thresholds[i] = -5.5f, gains[i] = TAIL_GAIN;
    struct sqz_cuda_attend_args a = {
        .layer = c->on_gpu,
        .plan = {.log_threshold = upload(thresholds, b * c->k * sizeof(float)),
                 .tail_gain = c->layer->tail ? upload(gains, b * c->k * sizeof(float)) : NULL,
                 .tail_skip = TAIL_SKIP,
                 .per_sequence = true},
        .dense = dense,
        .together = together,
        .n_sequences = (uint32_t)b,
        .n_tokens = 1,
        .queries = upload(halves, numbers * sizeof *halves)};
    a.n_retained = device_zeros(b * c->k * sizeof(uint32_t));
    a.lse = device_zeros(b * c->h * sizeof(float));
    for (size_t planes = 0; planes < 2; planes++) {
        struct sqz_cuda_user users[OWN_SEQUENCES];
        for (size_t i = 0; i < b; i++) {
            const size_t n = flushed_before(own_seen[i] - 1);
            mix_rows(c, n, user_layer->keys.type);
            const uint16_t *f16 = planes ? c->f16_gpu + n * c->d : upload(c->mixed, 2 * rows * sizeof *c->mixed);
            users[i] = (struct sqz_cuda_user){.keys = f16,
                                              .values = f16 + rows,
                                              .capacity_rows = OWN_ALL,
                                              .n_rows = (uint32_t)(planes ? own_seen[i] - n : own_seen[i]),
                                              .n_plane_rows = planes ? (uint32_t)n : 0,
                                              .planes = planes && n ? c->planes : NULL,
                                              .plane_capacity_rows = planes && n ? (uint32_t)capacity : 0};
        }
        a.users = upload(users, sizeof users);
        a.n_user = planes ? 2 * OWN_BLOCK : 1024;
        a.user_layer = planes ? user_layer : NULL;
        a.out = device_zeros(numbers * sizeof(uint16_t));
        assert_true(sqz_cuda_attend_supported(&a));
        a.workspace_bytes = sqz_cuda_attend_workspace_bytes(&a);
        a.workspace = device_zeros(a.workspace_bytes);
        assert_int_equal(cudaMemset(a.workspace, 0xff, a.workspace_bytes), cudaSuccess);
        assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
        for (int turn = 0; turn < 2; turn++) /* what the first leaves behind does not matter */
            assert_int_equal(sqz_cuda_attend(&a, NULL), SQZ_OK);
        assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
        out[planes] = take(numbers, sizeof **out);
        download(out[planes], a.out, numbers * sizeof **out);
        download(retained[planes], a.n_retained, b * c->k * sizeof(uint32_t));
        download(lse[planes], a.lse, b * c->h * sizeof(float));
    }
    for (size_t i = 0; i < b * c->k && !dense; i++)
        check_close("groups read", i, retained[1][i], retained[0][i], 1); /* F16 rows are rounded once more */
    for (size_t i = 0; i < b * c->h; i++) check_close("lse", i, lse[1][i], lse[0][i], 5e-3);
    for (size_t i = 0; i < numbers; i++) check_close("output", i, half_value(out[1][i]), half_value(out[0][i]), 1e-2);
    free(out[0]);
    free(out[1]);
    free(halves);
    free(queries);
}

/* A block of the last tokens against calls of single ones, everything read; blocks that are not in planes are put there. */
static void check_own_block(struct own_case *c, size_t t)
{
    const size_t numbers = t * c->h * c->d, rows = c->k * OWN_ALL * c->d, first = OWN_ALL - t;
    const size_t capacity = (OWN_ALL + OWN_BLOCK - 1) / OWN_BLOCK * OWN_BLOCK,
                 bytes = sqz_cuda_user_planes_bytes(c->on_gpu, (uint32_t)capacity);
    float *queries = random_floats(numbers, 303, 0.6);
    uint16_t *halves = take(numbers, sizeof *halves), *block = take(numbers, sizeof *block),
             *alone = take(numbers, sizeof *alone);
    char *before = take(bytes, 1), *after = take(bytes, 1);
    to_half(halves, queries, numbers);
    const uint16_t *queries_gpu = upload(halves, numbers * sizeof *halves);
    download(before, c->planes, bytes);
    struct sqz_cuda_attend_args a = {
        .layer = c->on_gpu, .dense = true, .n_sequences = 1, .n_tokens = (uint32_t)t, .queries = queries_gpu};
    a.out = device_zeros(numbers * sizeof *block);
    a.user_first_row = (uint32_t)(flushed_before(first) < OWN_BLOCK ? flushed_before(first) : OWN_BLOCK);
    a.user_keys = c->f16_gpu + a.user_first_row * c->d;
    a.user_values = c->f16_gpu + rows + a.user_first_row * c->d;
    a.user_capacity_rows = a.n_user = OWN_ALL;
    a.user_layer = c->on_gpu;
    a.n_plane_rows = a.user_first_row;
    a.user_plane_capacity_rows = (uint32_t)capacity;
    a.user_planes = device_zeros(bytes);
    if (a.n_plane_rows) {
        const struct sqz_cuda_flush_args there = flush_of(c, a.user_planes, capacity, 0, a.n_plane_rows / OWN_BLOCK);
        assert_int_equal(sqz_cuda_flush(&there, NULL), SQZ_OK);
    }
    assert_true(sqz_cuda_attend_supported(&a));
    a.workspace_bytes = sqz_cuda_attend_workspace_bytes(&a);
    a.workspace = device_zeros(a.workspace_bytes);
    assert_int_equal(sqz_cuda_attend(&a, NULL), SQZ_OK);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
    download(block, a.out, numbers * sizeof *block);
    download(after, a.user_planes, bytes);
    assert_memory_equal(before, after, bytes);
    for (size_t from = 0; from < t; from += OWN_TOKENS) {
        const size_t n = t - from < OWN_TOKENS ? t - from : OWN_TOKENS;
        struct sqz_cuda_user users[OWN_TOKENS];
        for (size_t i = 0; i < n; i++) {
            const size_t in_planes = flushed_before(first + from + i);
            users[i] = (struct sqz_cuda_user){.keys = c->f16_gpu + in_planes * c->d,
                                              .values = c->f16_gpu + rows + in_planes * c->d,
                                              .capacity_rows = OWN_ALL,
                                              .n_rows = (uint32_t)(first + from + i + 1 - in_planes),
                                              .n_plane_rows = (uint32_t)in_planes,
                                              .planes = c->planes,
                                              .plane_capacity_rows = (uint32_t)capacity};
        }
        struct sqz_cuda_attend_args one = {.layer = c->on_gpu,
                                           .dense = true,
                                           .n_sequences = (uint32_t)n,
                                           .n_tokens = 1,
                                           .queries = queries_gpu + from * c->h * c->d,
                                           .users = upload(users, sizeof users),
                                           .n_user = 2 * OWN_BLOCK,
                                           .user_layer = c->on_gpu};
        one.out = device_zeros(n * c->h * c->d * sizeof *alone);
        one.workspace_bytes = sqz_cuda_attend_workspace_bytes(&one);
        one.workspace = device_zeros(one.workspace_bytes);
        assert_int_equal(sqz_cuda_attend(&one, NULL), SQZ_OK);
        assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
        download(alone + from * c->h * c->d, one.out, n * c->h * c->d * sizeof *alone);
    }
    for (size_t i = 0; i < numbers; i++) check_close("output", i, half_value(block[i]), half_value(alone[i]), 1e-2);
    free(after);
    free(before);
    free(alone);
    free(block);
    free(halves);
    free(queries);
}

/* Own rows go into planes as lib/ puts them there, in any number of calls, and are read as what they are there. */
static void own_planes(void **unused)
{
    (void)unused;
    for (size_t v = 0; v < COUNT(variations); v++) {
        if (variations[v].rows == SQZ_ROWS_F16 || variations[v].upper) continue;
        struct sqz_layer *l = make_layer(&variations[v], 60 + v);
        const struct sqz_layer on_gpu = upload_layer(l);
        const size_t capacity = (OWN_ALL + OWN_BLOCK - 1) / OWN_BLOCK * OWN_BLOCK;
        struct sqz_layer upper = on_gpu;
        struct own_case c = {
            .layer = l, .on_gpu = &on_gpu, .k = l->shape.n_head_kv, .h = l->shape.n_head, .d = l->shape.head_dim};
        describe("own rows, variation %zu", v);
        make_own_rows(&c);
        c.mixed = take(2 * c.k * OWN_ALL * c.d, sizeof *c.mixed);
        void *small = device_zeros(sqz_cuda_user_planes_bytes(&on_gpu, OWN_FIRST));
        c.planes = device_zeros(sqz_cuda_user_planes_bytes(&on_gpu, (uint32_t)capacity));
        struct sqz_cuda_flush_args flush = flush_of(&c, small, OWN_FIRST, 0, 1);
        assert_int_equal(sqz_cuda_flush(&flush, NULL), SQZ_OK);
        assert_int_equal(sqz_cuda_move_user_planes(&on_gpu, c.planes, (uint32_t)capacity, small, OWN_FIRST, 1, NULL),
                         SQZ_OK);
        flush = flush_of(&c, c.planes, capacity, 1, OWN_PLANES / OWN_BLOCK - 1);
        assert_int_equal(sqz_cuda_flush(&flush, NULL), SQZ_OK);
        assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
        check_planes(&c, c.planes, capacity, on_gpu.keys.type);
        time_flush(&c, c.planes, capacity);
        upper.keys = sqz_rows_upper(&on_gpu.keys);
        upper.values = sqz_rows_upper(&on_gpu.values);
        for (int i = 0; i < 8; i++) {
            describe("own rows, variation %zu, case %d", v, i);
            if (i & 4 && on_gpu.keys.type == SQZ_ROW_I4) continue;
            check_own_tokens(&c, i & 4 ? &upper : &on_gpu, i & 1, i & 2);
        }
        const size_t tokens[] = {90, 2 * OWN_BLOCK, OWN_ALL};
        for (size_t i = 0; i < COUNT(tokens); i++) {
            describe("own rows, variation %zu, a block of %zu", v, tokens[i]);
            check_own_block(&c, tokens[i]);
        }
        free(c.mixed);
        free(c.f16);
        free_layer(l);
        assert_int_equal(cudaDeviceReset(), cudaSuccess);
    }
}

/* ---- Sequences together -------------------------------------------------------------------------- */

enum { CROWD = 9 }; /* of four KV heads more pairs than a warp has lanes */
static const uint32_t crowd_rows[CROWD] = {1, 1030, 70, 3, 300, 2, 17, 64, 9},
                      crowd_room[CROWD] = {8, 1100, 70, 16, 512, 8, 24, 64, 16};
static const float crowd_thresholds[CROWD] = {-6.03f, -4.51f, -5.0f, (float)INFINITY, -5.5f, -5.2f,
                                              -4.9f,  -5.8f,  -4.7f};

/* Sequences with own rows and thresholds of their own: a call, and in host memory what it is made of. */
struct crowd {
    const struct sqz_layer *layer;
    size_t k, g, d, n;
    float *queries; /* [B][H][D] */
    uint16_t *own[CROWD];
    struct sqz_cuda_attend_args args;
};

static struct crowd make_crowd(const struct sqz_layer *l, const struct sqz_layer *on_gpu, bool dense, bool tail)
{
    struct crowd c = {.layer = l,
                      .k = l->shape.n_head_kv,
                      .g = l->shape.n_head / l->shape.n_head_kv,
                      .d = l->shape.head_dim,
                      .n = l->n_rows};
    const size_t numbers = CROWD * c.k * c.g * c.d;
    uint16_t *halves = take(numbers, sizeof *halves);
    float plans[2][CROWD * 64], gains[64];
    struct sqz_cuda_user users[CROWD];
    c.queries = random_floats(numbers, 177, 0.6);
    to_half(halves, c.queries, numbers);
    for (size_t i = 0; i < numbers; i++) c.queries[i] = (float)half_value(halves[i]);
    for (size_t b = 0; b < CROWD; b++) {
        const size_t n = c.k * crowd_room[b] * c.d;
        float *floats = random_floats(2 * n, 200 + b, 0.5);
        c.own[b] = take(2 * n, sizeof **c.own);
        to_half(c.own[b], floats, 2 * n);
        users[b] = (struct sqz_cuda_user){.keys = upload(c.own[b], n * sizeof **c.own),
                                          .values = upload(c.own[b] + n, n * sizeof **c.own),
                                          .capacity_rows = crowd_room[b],
                                          .n_rows = crowd_rows[b]};
        for (size_t i = 0; i < c.k; i++) {
            plans[0][b * c.k + i] = crowd_thresholds[b];
            plans[1][b * c.k + i] = TAIL_GAIN;
            gains[i] = l->variance_gain ? l->variance_gain[i] : 0;
        }
        free(floats);
    }
    c.args = (struct sqz_cuda_attend_args){
        .layer = on_gpu,
        .plan = {.log_threshold = upload(plans[0], CROWD * c.k * sizeof(float)),
                 .variance_gain = upload(gains, c.k * sizeof(float)),
                 .tail_gain = tail ? upload(plans[1], CROWD * c.k * sizeof(float)) : NULL,
                 .tail_skip = TAIL_SKIP,
                 .per_sequence = true},
        .dense = dense,
        .n_sequences = CROWD,
        .n_tokens = 1,
        .queries = upload(halves, numbers * sizeof *halves),
        .out = device_zeros(numbers * sizeof(uint16_t)),
        .lse = device_zeros(CROWD * c.k * c.g * sizeof(float)),
        .users = upload(users, sizeof users),
        .n_user = 2048,
        .n_retained = device_zeros(CROWD * c.k * sizeof(uint32_t)),
    };
    free(halves);
    return c;
}

static void free_crowd(struct crowd *c)
{
    free(c->queries);
    for (size_t b = 0; b < CROWD; b++) free(c->own[b]);
}

static void run_crowd(struct crowd *c, bool together)
{
    c->args.together = together;
    assert_true(sqz_cuda_attend_supported(&c->args));
    c->args.workspace_bytes = sqz_cuda_attend_workspace_bytes(&c->args);
    c->args.workspace = device_zeros(c->args.workspace_bytes);
    assert_int_equal(sqz_cuda_attend(&c->args, NULL), SQZ_OK);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
}

/* Rows of a head that any sequence selects, by a selection each. */
static void rows_of_any(struct crowd *c, size_t head, bool *read)
{
    const size_t capacity = (c->n + 15) / 16 * 2;
    struct sqz_cuda_selection s;
    uint32_t *groups = take(capacity, sizeof *groups), n;
    c->args.together = false;
    c->args.workspace_bytes = sqz_cuda_attend_workspace_bytes(&c->args);
    c->args.workspace = device_zeros(c->args.workspace_bytes);
    assert_int_equal(sqz_cuda_select(&c->args, &s, NULL), SQZ_OK);
    for (size_t i = 0; i < c->n; i++) read[i] = false;
    for (size_t b = 0; b < CROWD; b++) {
        const size_t pair = b * c->k + head;
        download(&n, s.n_groups + pair, sizeof n);
        download(groups, s.groups + pair * s.capacity, n * sizeof *groups);
        for (size_t i = 0; i < n; i++)
            for (size_t row = 8 * groups[i]; row < 8 * groups[i] + 8 && row < c->n; row++) read[row] = true;
    }
    free(groups);
}

/* Exact attention of sequence b over the rows that are read and its own. */
static void add_exact(const struct crowd *c, size_t b, size_t head, const float *query, const bool *read)
{
    const uint16_t *keys = sqz_rows_f16(&c->layer->keys) + head * c->n * c->d,
                   *values = sqz_rows_f16(&c->layer->values) + head * c->n * c->d;
    const size_t own = head * crowd_room[b] * c->d, own_values = c->k * crowd_room[b] * c->d;
    const float scale = c->layer->shape.scale;
    reference_reset(&reference);
    for (size_t i = 0; i < c->n; i++)
        if (read[i]) reference_add(&reference, query, keys + i * c->d, values + i * c->d, c->d, scale);
    for (size_t i = 0; i < crowd_rows[b]; i++)
        reference_add(&reference, query, c->own[b] + own + i * c->d, c->own[b] + own_values + own + i * c->d, c->d,
                      scale);
}

/* What sequence b has pruned, less the rows that others have brought. */
static void add_tail(const struct crowd *c, size_t b, size_t head, size_t r, const bool *read)
{
    const struct sqz_layer *l = c->layer;
    const struct sqz_level *level = &l->level[0];
    const uint32_t *offset = level->offset + head * (level->n_clusters + 1);
    const float *mine = c->queries + (b * c->k + head) * c->g * c->d;
    const struct sqz_head_plan plan = {crowd_thresholds[b], TAIL_GAIN, l->variance_gain ? l->variance_gain[head] : 0};
    struct sqz_selection s;
    float norms[64], base[64];
    bool *fixed = take(c->n, sizeof *fixed);
    void *workspace = malloc(sqz_lookup_workspace_bytes(l, c->g));
    const struct reference before = reference;
    for (size_t i = 0; i < c->n; i++) fixed[i] = i < l->n_fixed;
    for (size_t q = 0; q < c->g; q++) {
        norms[q] = 0;
        for (size_t i = 0; i < c->d; i++) norms[q] += mine[q * c->d + i] * mine[q * c->d + i];
        add_exact(c, b, head, mine + q * c->d, fixed);
        base[q] = (float)reference_lse(&reference);
    }
    reference = before;
    sqz_lookup(&s, l, (uint32_t)head, &plan, mine, norms, c->g, base, 0, workspace);
    for (size_t p = 0; p < s.n_pruned; p++) {
        const uint32_t cluster = s.pruned_cluster[p];
        size_t left = 0;
        bool counts = false;
        for (size_t i = offset[cluster]; i < offset[cluster + 1]; i++) left += !read[l->n_fixed + i];
        for (size_t q = 0; q < c->g; q++)
            counts |= (float)left * expf(s.pruned_logit[q * s.pruned_stride + p] - s.log_total[q]) >=
                      TAIL_SKIP * expf(crowd_thresholds[b]);
        if (left && counts)
            reference_add_logit(&reference, (double)s.pruned_logit[r * s.pruned_stride + p] + log((double)left),
                                sqz_rows_f16(&level->value_centroids) + (head * level->n_clusters + cluster) * c->d);
    }
    free(workspace);
    free(fixed);
}

static void check_crowd(struct crowd *c, bool tail)
{
    const size_t h = c->k * c->g;
    uint16_t *out = take(CROWD * h * c->d, sizeof *out);
    float *lse = take(CROWD * h, sizeof *lse);
    uint32_t *united = take(c->k, sizeof *united);
    bool *read = take(c->n, sizeof *read);
    run_crowd(c, true);
    download(out, c->args.out, CROWD * h * c->d * sizeof *out);
    download(lse, c->args.lse, CROWD * h * sizeof *lse);
    download(united, c->args.n_retained, c->k * sizeof *united);
    for (size_t head = 0; head < c->k; head++) {
        size_t n_united = 0;
        for (size_t i = 0; i < c->n; i++) read[i] = true;
        if (!c->args.dense) {
            rows_of_any(c, head, read);
            for (size_t i = 0; i < c->n; i += 8) n_united += read[i];
            check_close("groups of all", head, united[head], (double)n_united, 0);
        }
        for (size_t b = 0; b < CROWD; b++) {
            for (size_t r = 0; r < c->g; r++) {
                const size_t row = b * h + head * c->g + r;
                add_exact(c, b, head, c->queries + row * c->d, read);
                if (tail) add_tail(c, b, head, r, read);
                reference_finish(&reference, c->d, &wanted);
                check_close("lse", row, lse[row], wanted.lse, 1e-3);
                for (size_t i = 0; i < c->d; i++)
                    check_close("output", i, half_value(out[row * c->d + i]), wanted.out[i], 1e-2);
            }
        }
    }
    free(read);
    free(united);
    free(lse);
    free(out);
}

/* What any of them selected is read for all; each sees its own rows alone. */
static void sequences_together(void **unused)
{
    (void)unused;
    for (size_t v = 0; v < COUNT(variations); v++) {
        struct sqz_layer *l = make_layer(&variations[v], 30 + v);
        const struct sqz_layer on_gpu = upload_layer(l);
        /* The tail of several levels and of single keys: which share of a cluster is left is the same code. */
        const bool tails = l->tail && l->n_levels == 1 && !l->codes.n_words;
        for (int way = 0; way < 2 + tails; way++) {
            describe("variation %zu, %s", v, way == 0 ? "all rows" : way == 1 ? "no tail" : "with a tail");
            struct crowd c = make_crowd(l, &on_gpu, way == 0, way == 2);
            check_crowd(&c, way == 2);
            free_crowd(&c);
        }
        free_layer(l);
        assert_int_equal(cudaDeviceReset(), cudaSuccess);
    }
}

/* ---- Between llama.cpp's nodes and the kernels ---------------------------------------------- */

/* Rows of head_dim numbers get zeros up to padded_dim, and lose them again. */
static void check_node(uint32_t head_dim, uint32_t padded_dim)
{
    enum { T = 3, H = 4, K = 2, CAPACITY = 9, FIRST = 4 };
    const size_t d = head_dim, p = padded_dim, apart = 8; /* what lies between tokens in the node */
    const size_t q_stride = H * d + apart, kv_stride = K * d + apart;
    float *queries = random_floats(T * q_stride, 11, 1), *back = take(T * H * d, sizeof *back);
    float *rows = random_floats(2 * T * kv_stride, 12, 1);
    uint16_t *halves = take(2 * T * kv_stride, sizeof *halves), *q = take(T * H * p, sizeof *q),
             *own = take(2 * K * CAPACITY * p, sizeof *own), *round = take(T * q_stride, sizeof *round);
    to_half(halves, rows, 2 * T * kv_stride);
    to_half(round, queries, T * q_stride);
    const uint16_t *keys = upload(halves, 2 * T * kv_stride * sizeof *halves);
    const size_t own_bytes = K * CAPACITY * p * sizeof *own;
    char *own_gpu = device_zeros(2 * own_bytes);
    assert_int_equal(cudaMemset(own_gpu, 0x7e, 2 * own_bytes), cudaSuccess);
    struct sqz_gpu_node node = {.n_tokens = T,
                                .n_head = H,
                                .n_head_kv = K,
                                .head_dim = head_dim,
                                .padded_dim = padded_dim,
                                .queries = upload(queries, T * q_stride * sizeof *queries),
                                .query_token_stride = q_stride,
                                .query_head_stride = d,
                                .keys = keys,
                                .values = keys + T * kv_stride,
                                .key_token_stride = kv_stride,
                                .key_head_stride = d,
                                .value_token_stride = kv_stride,
                                .value_head_stride = d,
                                .own_keys = own_gpu,
                                .own_values = own_gpu + own_bytes,
                                .capacity_rows = CAPACITY,
                                .first_row = FIRST,
                                .queries_f16 = device_zeros(T * H * p * sizeof *q)};
    float *back_gpu = device_zeros(T * H * d * sizeof *back);
    assert_int_equal(sqz_gpu_calls()->take(&node, NULL), SQZ_OK);
    assert_int_equal(sqz_gpu_calls()->give(back_gpu, node.queries_f16, T * H, head_dim, padded_dim, NULL), SQZ_OK);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
    download(q, node.queries_f16, T * H * p * sizeof *q);
    download(own, own_gpu, 2 * own_bytes);
    download(back, back_gpu, T * H * d * sizeof *back);
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < p; i++) {
            for (size_t h = 0; h < H; h++) {
                const uint16_t wanted_half = i < d ? round[t * q_stride + h * d + i] : 0;
                check_close("query", i, half_value(q[(t * H + h) * p + i]), half_value(wanted_half), 0);
                if (i < d) check_close("given back", i, back[(t * H + h) * d + i], half_value(wanted_half), 0);
            }
            for (size_t h = 0; h < 2 * K; h++) { /* keys, then values */
                const size_t from = h / K * T * kv_stride + t * kv_stride + h % K * d + i;
                const uint16_t wanted_half = i < d ? halves[from] : 0;
                check_close("row", i, half_value(own[(h * CAPACITY + FIRST + t) * p + i]), half_value(wanted_half), 0);
            }
        }
    free(round);
    free(own);
    free(q);
    free(halves);
    free(rows);
    free(back);
    free(queries);
    node.padded_dim = head_dim - 8;
    assert_int_equal(sqz_gpu_calls()->take(&node, NULL), SQZ_ERROR_ARGUMENT);
}

/* The first test: the library has a CUDA runtime of its own, whose launches do not look whether the test's has reset the
 * card. */
static void node_rows(void **unused)
{
    (void)unused;
    static const uint32_t dims[][2] = {{64, 64}, {48, 64}, {80, 96}, {112, 128}, {144, 256}};
    for (size_t i = 0; i < COUNT(dims); i++) {
        describe("head dimension %u as %u", dims[i][0], dims[i][1]);
        check_node(dims[i][0], dims[i][1]);
    }
}

/* Blocks, whose scores are means or maxima over their tokens. */
static void block_of_tokens(void **unused)
{
    (void)unused;
    static const float thresholds[] = {-6.03f, (float)-INFINITY, (float)INFINITY};
    static const size_t tokens[] = {2, 67}, rows[] = {1, 150, 100000}; /* of clusters: none, some, all */
    for (size_t v = 0; v < COUNT(variations); v++) {
        struct sqz_layer *l = make_layer(&variations[v], 30 + v);
        struct sqz_layer on_gpu = upload_layer(l);
        l->codes.n_words = 0; /* the CPU looks at single keys for up to 16 query rows, the GPU for one token */
        for (size_t j = 0; j < COUNT(tokens); j++) {
            for (size_t i = 0; i < COUNT(thresholds); i++) {
                for (int tail = 0; tail <= (variations[v].rule != SQZ_RULE_PAPER); tail++) {
                    describe("variation %zu, %zu tokens, log threshold %g, tail %d", v, tokens[j], thresholds[i], tail);
                    check_tokens(l, &on_gpu, thresholds[i], false, tail, tokens[j], 0, 90 + i);
                }
            }
            for (size_t i = 0; i < COUNT(rows); i++) {
                describe("variation %zu, %zu tokens, %zu rows", v, tokens[j], rows[i]);
                check_tokens(l, &on_gpu, thresholds[0], false, l->tail, tokens[j], rows[i], 95 + i);
            }
            describe("variation %zu, %zu tokens, dense", v, tokens[j]);
            check_tokens(l, &on_gpu, 0, true, false, tokens[j], 0, 8);
        }
        free_layer(l);
        assert_int_equal(cudaDeviceReset(), cudaSuccess);
    }
}

/* The same keys on both sides: every row in one cluster, none empty, and an objective within 3% of the CPU's (both start
 * from seeds of their own). */
static void clusters(void **unused)
{
    (void)unused;
    static const struct {
        uint32_t n, c, d;
    } sizes[] = {{6000, 300, 64}, {3000, 150, 128}, {500, 5, 96}, {40, 40, 256}};
    for (size_t z = 0; z < COUNT(sizes); z++) {
        const size_t n = sizes[z].n, c = sizes[z].c, d = sizes[z].d;
        describe("%zu rows of %zu into %zu", n, d, c);
        struct material m = make_material(make_shape(1, 1, (uint32_t)d), n, 24, 50 + z);
        const uint16_t *halves = m.keys;
        float *points = take(n * d, sizeof *points);
        double *mean = take(d, sizeof *mean);
        memset(mean, 0, d * sizeof *mean);
        for (size_t i = 0; i < n * d; i++) {
            points[i] = (float)half_value(halves[i]);
            mean[i % d] += points[i] / (double)n;
        }
        for (size_t i = 0; i < n * d; i++) points[i] -= (float)mean[i % d];
        const struct sqz_kmeans_options o = {
            .n_clusters = (uint32_t)c, .n_iterations = 10, .metric = SQZ_METRIC_EUCLIDEAN, .seed = 3};
        uint32_t *assignment = take(n, sizeof *assignment);
        void *scratch = malloc(sqz_kmeans_workspace_bytes(n, d, &o));
        const double cpu = sqz_kmeans(assignment, points, n, d, &o, scratch);

        struct sqz_cuda_cluster_args a;
        memset(&a, 0, sizeof a);
        a.type = SQZ_ROW_F16;
        a.n_head_kv = 1;
        a.n_rows = (uint32_t)n;
        a.head_dim = (uint32_t)d;
        a.n_clusters = (uint32_t)c;
        a.keys = upload(halves, n * d * sizeof *halves);
        a.centroids = device_zeros(c * d * sizeof(float));
        a.offset = device_zeros((c + 1) * sizeof(uint32_t));
        a.order = device_zeros(n * sizeof(uint32_t));
        a.objective = device_zeros(sizeof(float));
        assert_true(sqz_cuda_cluster_supported(&a));
        a.workspace_bytes = sqz_cuda_cluster_workspace_bytes(&a);
        a.workspace = device_zeros(a.workspace_bytes);
        assert_int_equal(sqz_cuda_cluster(&a, NULL), SQZ_OK);
        assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
        uint32_t *offset = take(c + 1, sizeof *offset), *order = take(n, sizeof *order), *seen = take(n, sizeof *seen);
        memset(seen, 0, n * sizeof *seen);
        float *centroids = take(c * d, sizeof *centroids), objective;
        download(offset, a.offset, (c + 1) * sizeof *offset);
        download(order, a.order, n * sizeof *order);
        download(centroids, a.centroids, c * d * sizeof *centroids);
        download(&objective, a.objective, sizeof objective);

        double cost = 0;
        check_close("first offset", 0, offset[0], 0, 0);
        check_close("last offset", c, offset[c], (double)n, 0);
        for (size_t i = 0; i < c; i++) {
            check_true("clusters have rows", i, offset[i], offset[i + 1], offset[i] < offset[i + 1]);
            for (size_t j = offset[i]; j < offset[i + 1]; j++) {
                check_true("rows exist", j, order[j], (double)n, order[j] < n);
                seen[order[j]]++;
                for (size_t x = 0; x < d; x++) {
                    const double away = points[order[j] * d + x] + mean[x] - centroids[i * d + x];
                    cost += away * away;
                }
            }
        }
        for (size_t i = 0; i < n; i++) check_close("a row's clusters", i, seen[i], 1, 0);
        check_close("objective", 0, objective, cost / (double)n, 1e-4 * (cost / (double)n) + 1e-4);
        check_true("objective beside the CPU's", 0, objective, cpu, objective <= 1.03 * cpu + 1e-4);
        free(seen);
        free(order);
        free(offset);
        free(centroids);
        free(scratch);
        free(assignment);
        free(mean);
        free(points);
        free_material(&m);
        assert_int_equal(cudaDeviceReset(), cudaSuccess);
    }
}

/* ---- A text that is read -------------------------------------------------------------- */

struct text_case {
    uint32_t n_head, n_head_kv, head_dim, n_tokens, n_rows;
};

/* One token's output of a head in double precision, over the rows that it sees. */
static void causal_row(double *out, const struct text_case *c, size_t capacity, const uint16_t *queries,
                       const uint16_t *keys, const uint16_t *values, size_t token, size_t head)
{
    const size_t d = c->head_dim, kv = head / (c->n_head / c->n_head_kv), n = c->n_rows - c->n_tokens + token + 1;
    const uint16_t *query = queries + (token * c->n_head + head) * d;
    double sum = 0;
    for (size_t i = 0; i < d; i++) out[i] = 0;
    for (size_t r = 0; r < n; r++) {
        const size_t at = (kv * capacity + r) * d;
        double logit = 0;
        for (size_t i = 0; i < d; i++) logit += half_value(query[i]) * half_value(keys[at + i]);
        const double weight = exp(logit / sqrt((double)d));
        sum += weight;
        for (size_t i = 0; i < d; i++) out[i] += weight * half_value(values[at + i]);
    }
    for (size_t i = 0; i < d; i++) out[i] /= sum;
}

static void check_text(const struct text_case *c)
{
    const struct sqz_gpu_calls *calls = sqz_gpu_calls();
    const size_t d = c->head_dim, capacity = c->n_rows + 37, n_queries = (size_t)c->n_tokens * c->n_head * d;
    uint16_t *queries = random_halves(n_queries, 11, 1), *keys = random_halves(c->n_head_kv * capacity * d, 12, 1),
             *values = random_halves(c->n_head_kv * capacity * d, 13, 1);
    float *out = malloc(n_queries * sizeof *out);
    double *exact = malloc(d * sizeof *exact);
    struct sqz_gpu_causal a = {
        .shape = {c->n_head, c->n_head_kv, c->head_dim, 1 / sqrtf((float)d)},
        .n_tokens = c->n_tokens,
        .n_rows = c->n_rows,
        .capacity_rows = capacity,
        .queries = upload(queries, n_queries * 2),
        .keys = upload(keys, c->n_head_kv * capacity * d * 2),
        .values = upload(values, c->n_head_kv * capacity * d * 2),
        .out = device_zeros(n_queries * sizeof *out),
    };
    a.workspace_bytes = calls->causal_workspace_bytes(&a);
    assert_true(a.workspace_bytes > 0);
    a.workspace = device_zeros(a.workspace_bytes);
    void *stream = calls->create_stream();
    assert_int_equal(calls->causal(&a, stream), SQZ_OK);
    assert_true(calls->wait(stream));
    download(out, a.out, n_queries * sizeof *out);
    for (size_t t = 0; t < c->n_tokens; t += t < 3 || t + 4 > c->n_tokens ? 1 : 13)
        for (size_t h = 0; h < c->n_head; h += 3) {
            causal_row(exact, c, capacity, queries, keys, values, t, h);
            for (size_t i = 0; i < d; i++) {
                const double got = (double)out[(t * c->n_head + h) * d + i];
                if (!(fabs(got - exact[i]) <= 2e-3 * 3)) /* weights are F16, values reach 3 and more */
                    fail_msg("token %zu, head %zu, number %zu: got %g, wanted %g", t, h, i, got, exact[i]);
            }
        }
    calls->free_stream(stream);
    free(queries);
    free(keys);
    free(values);
    free(out);
    free(exact);
    assert_int_equal(cudaDeviceReset(), cudaSuccess);
}

/* The first tokens of a text, such that have little before them and such that have much, of every kernel's dimension. */
static void text(void **unused)
{
    static const struct text_case cases[] = {
        {6, 2, 128, 70, 70},   {6, 2, 128, 70, 140},   {6, 2, 128, 70, 450},   {8, 2, 128, 200, 3000},
        {6, 2, 64, 130, 1300}, {4, 2, 256, 90, 700},   {6, 2, 96, 70, 450},    {4, 4, 128, 33, 1500},
        {8, 1, 128, 1, 900},   {32, 8, 128, 64, 2048}, {4, 1, 128, 100, 1250},
    };
    (void)unused;
    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct text_case *c = &cases[i];
        describe("%u over %u heads of %u, %u tokens, the last of %u", c->n_head, c->n_head_kv, c->head_dim, c->n_tokens,
                 c->n_rows);
        check_text(c);
    }
}

/* ---- Products with quantised weights -------------------------------------------------- */

/* One product against double precision, weights and tokens rounded to F16 there as well: sums are F32. One token has
 * numbers that F16 does not hold. */
static void check_product(int type, uint32_t n_in, uint32_t n_out, uint32_t n_tokens, void *multiplier, bool again)
{
    const struct sqz_gpu_calls *calls = sqz_gpu_calls();
    const struct sqz_weights_block block = sqz_weights_block_of(type);
    const size_t bytes = (size_t)n_in * n_out / block.n * block.bytes, n = (size_t)n_tokens * n_in;
    struct sqz_random random;
    uint8_t *weights = malloc(bytes);
    float *in = malloc(n * sizeof *in), *out = malloc((size_t)n_tokens * n_out * sizeof *out);
    float *row = malloc(n_in * sizeof *row);
    sqz_random_seed(&random, 5);
    for (size_t i = 0; i < bytes; i++) weights[i] = (uint8_t)(sqz_random_unit(&random) * 256);
    for (size_t at = 0; at < bytes; at += block.bytes) { /* factors between 1/64 and 1/8 */
        uint8_t *factor = weights + at + (type == SQZ_WEIGHTS_Q6_K ? 209 : 1);
        *factor = (uint8_t)(0x24 + *factor % 12);
        if (block.n == 256 || type == SQZ_WEIGHTS_Q4_1 || type == SQZ_WEIGHTS_Q5_1)
            if (type != SQZ_WEIGHTS_Q6_K) weights[at + 3] = (uint8_t)(0x24 + weights[at + 3] % 12);
    }
    for (size_t i = 0; i < n; i++) in[i] = (float)gauss(&random) * (i / n_in == 3 ? 1e5f : 1.0f);
    struct sqz_gpu_product a = {.type = type, .n_in = n_in, .n_out = n_out, .n_tokens = n_tokens};
    a.workspace_bytes = calls->product_workspace_bytes(&a);
    assert_true(a.workspace_bytes > 0);
    a.weights = upload(weights, bytes);
    a.in = upload(in, n * sizeof *in);
    a.out = device_zeros((size_t)n_tokens * n_out * sizeof *out);
    a.workspace = device_zeros(a.workspace_bytes);
    void *stream = calls->create_stream();
    for (int i = 0; i <= again; i++, a.same_in = true) {
        assert_int_equal(calls->product(multiplier, &a, stream), SQZ_OK);
        assert_true(calls->wait(stream));
    }
    download(out, a.out, (size_t)n_tokens * n_out * sizeof *out);
    uint16_t *wide = malloc((size_t)n_in * n_out * sizeof *wide), *wide_there = device_zeros((size_t)n_in * n_out * 2);
    assert_int_equal(calls->widen(type, a.weights, (size_t)n_in * n_out, wide_there, stream), SQZ_OK);
    assert_int_equal(calls->widen(1, a.weights, 256, wide_there, stream), SQZ_ERROR_UNSUPPORTED);
    assert_true(calls->wait(stream));
    download(wide, wide_there, (size_t)n_in * n_out * sizeof *wide);
    for (size_t o = 0; o < n_out; o += n_out / 16 + 1) {
        for (size_t i = 0; i < n_in / 8; i++) sqz_weights_eight(type, weights, o * n_in / 8 + i, row + 8 * i);
        for (size_t i = 0; i < n_in; i++) { /* BF16: 8 bits */
            const uint32_t bits = (uint32_t)wide[o * n_in + i] << 16;
            float copied;
            memcpy(&copied, &bits, sizeof copied);
            if (!(fabsf(copied - row[i]) <= fabsf(row[i]) * 0x1p-8f))
                fail_msg("type %d, weight %zu of row %zu: got %g, wanted %g", type, i, o, (double)copied,
                         (double)row[i]);
        }
        for (size_t t = 0; t < n_tokens; t += t < 8 ? 1 : 37) {
            double sum = 0, size = 0;
            for (size_t i = 0; i < n_in; i++) {
                sum += (double)row[i] * (double)in[t * n_in + i];
                size += fabs((double)row[i] * (double)in[t * n_in + i]);
            }
            /* F16 makes 2^-11 of each factor, which mostly cancels; F32 sums add little. */
            const double got = (double)out[t * n_out + o];
            if (!(fabs(got - sum) <= size * 0x1p-11))
                fail_msg("type %d, %u to %u, token %zu, output %zu: got %g, wanted %g", type, n_in, n_out, t, o, got,
                         sum);
        }
    }
    calls->free_stream(stream);
    cudaFree((void *)(uintptr_t)a.weights);
    cudaFree((void *)(uintptr_t)a.in);
    cudaFree(a.out);
    cudaFree(a.workspace);
    cudaFree(wide_there);
    free(wide);
    free(weights);
    free(in);
    free(out);
    free(row);
}

static void products(void **unused)
{
    static const int types[] = {SQZ_WEIGHTS_Q4_0, SQZ_WEIGHTS_Q4_1, SQZ_WEIGHTS_Q5_0, SQZ_WEIGHTS_Q5_1,
                                SQZ_WEIGHTS_Q8_0, SQZ_WEIGHTS_Q4_K, SQZ_WEIGHTS_Q5_K, SQZ_WEIGHTS_Q6_K};
    void *multiplier = sqz_gpu_calls()->create_multiplier();
    (void)unused;
    if (!multiplier) {
        printf("products: this card leaves them to ggml, or there is no cuBLAS\n");
        return;
    }
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) check_product(types[i], 768, 200, 300, multiplier, i % 2);
    check_product(SQZ_WEIGHTS_Q4_0, 32768, 2056, 256, multiplier, false); /* in two parts */
    sqz_gpu_calls()->free_multiplier(multiplier);
    assert_int_equal(cudaDeviceReset(), cudaSuccess);
}

/* ---- Products of few tokens ------------------------------------------------------------ */

/* Random codes, factors between 1/64 and 1/8. */
static uint8_t *random_weights(int type, size_t n, struct sqz_random *random)
{
    const struct sqz_weights_block block = sqz_weights_block_of(type);
    const size_t bytes = n / block.n * block.bytes;
    uint8_t *weights = malloc(bytes);
    for (size_t i = 0; i < bytes; i++) weights[i] = (uint8_t)(sqz_random_unit(random) * 256);
    for (size_t at = 0; at < bytes; at += block.bytes) {
        uint8_t *factor = weights + at + (type == SQZ_WEIGHTS_Q6_K ? 209 : 1);
        *factor = (uint8_t)(0x24 + *factor % 12);
        if (type == SQZ_WEIGHTS_Q4_K || type == SQZ_WEIGHTS_Q4_1)
            weights[at + 3] = (uint8_t)(0x24 + weights[at + 3] % 12);
    }
    return weights;
}

static float *random_numbers(size_t n, struct sqz_random *random)
{
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = (float)gauss(random);
    return x;
}

struct projection_case {
    uint32_t n_in, n_out[SQZ_MOST_PROJECTIONS], n_matrices;
    bool gated, add, norm;
};

/* Sum of a row of weights with a token, and of its products' sizes. */
static double row_sum(int type, const uint8_t *weights, size_t o, const float *in, size_t n_in, double *size)
{
    double sum = 0;
    for (size_t i = 0; i < n_in / 8; i++) {
        float row[8];
        sqz_weights_eight(type, weights, o * n_in / 8 + i, row);
        for (size_t j = 0; j < 8; j++) {
            const double x = (double)row[j] * (double)in[8 * i + j];
            sum += x;
            *size += fabs(x);
        }
    }
    return sum;
}

static void normalise(float *in, const float *factors, size_t n)
{
    double squares = 0;
    for (size_t i = 0; i < n; i++) squares += (double)in[i] * (double)in[i];
    for (size_t i = 0; i < n; i++)
        in[i] = (float)((double)in[i] / sqrt(squares / (double)n + 1e-5) * (double)factors[i]);
}

/* Each call against double precision; numbers are rounded to 2^-12 of themselves or 2^-16 of the largest near them. */
static void check_projections(int type, const struct projection_case *c, uint32_t n_tokens)
{
    const struct sqz_gpu_calls *calls = sqz_gpu_calls();
    struct sqz_gpu_projections a = {.type = type, .n_in = c->n_in, .n_tokens = n_tokens, .n_matrices = c->n_matrices};
    struct sqz_random random;
    uint8_t *weights[SQZ_MOST_PROJECTIONS];
    sqz_random_seed(&random, 7);
    float *in = random_numbers((size_t)n_tokens * c->n_in, &random), *factors = random_numbers(c->n_in, &random);
    float *add = random_numbers((size_t)n_tokens * c->n_out[0], &random);
    for (size_t i = 0; n_tokens > 2 && i < c->n_in; i++) in[2 * c->n_in + i] *= 1e5f; /* what F16 does not hold */
    a.in = upload(in, (size_t)n_tokens * c->n_in * sizeof *in);
    a.gated = c->gated;
    for (uint32_t k = 0; k < c->n_matrices; k++) {
        const size_t n = (size_t)c->n_out[k] * c->n_in;
        weights[k] = random_weights(type, n, &random);
        a.matrices[k].weights = upload(weights[k], n / sqz_weights_block_of(type).n * sqz_weights_block_of(type).bytes);
        a.matrices[k].n_out = c->n_out[k];
        a.matrices[k].out = device_zeros((size_t)n_tokens * c->n_out[k] * sizeof(float));
    }
    if (c->add) { /* to where the results go */
        a.matrices[0].add = a.matrices[0].out;
        a.matrices[0].add_stride = c->n_out[0];
        cudaMemcpy(a.matrices[0].out, add, (size_t)n_tokens * c->n_out[0] * sizeof *add, cudaMemcpyHostToDevice);
    }
    if (c->norm) a.norm = upload(factors, c->n_in * sizeof *factors), a.norm_epsilon = 1e-5f;
    a.workspace_bytes = calls->projections_workspace_bytes(&a);
    assert_true(a.workspace_bytes > 0);
    a.workspace = device_zeros(a.workspace_bytes);
    void *stream = calls->create_stream();
    assert_int_equal(calls->project(&a, stream), SQZ_OK);
    assert_true(calls->wait(stream));
    for (uint32_t t = 0; c->norm && t < n_tokens; t++) normalise(in + (size_t)t * c->n_in, factors, c->n_in);
    for (uint32_t k = 0; k < (c->gated ? 1 : c->n_matrices); k++) {
        const uint32_t n_out = c->n_out[k];
        float *out = malloc((size_t)n_tokens * n_out * sizeof *out);
        download(out, a.matrices[k].out, (size_t)n_tokens * n_out * sizeof *out);
        for (uint32_t o = 0; o < n_out; o += n_out / 40 + 1)
            for (uint32_t t = 0; t < n_tokens; t++) {
                const float *x = in + (size_t)t * c->n_in;
                double size = 0, right = row_sum(type, weights[k], o, x, c->n_in, &size);
                if (c->gated) {
                    const double up = row_sum(type, weights[1], o, x, c->n_in, &size);
                    size *= 1 + fabs(right) + fabs(up);
                    right *= up / (1 + exp(-right));
                }
                if (c->add && k == 0) right += (double)add[(size_t)t * n_out + o];
                const double got = (double)out[(size_t)t * n_out + o];
                if (!(fabs(got - right) <= size * 0x1p-13 + 1e-6))
                    fail_msg("type %d, %u inputs, %u tokens, matrix %u, token %u, output %u: got %g, wanted %g", type,
                             c->n_in, n_tokens, k, t, o, got, right);
            }
        free(out);
    }
    calls->free_stream(stream);
    for (uint32_t k = 0; k < c->n_matrices; k++) {
        cudaFree((void *)(uintptr_t)a.matrices[k].weights);
        cudaFree(a.matrices[k].out);
        free(weights[k]);
    }
    cudaFree((void *)(uintptr_t)a.in);
    cudaFree((void *)(uintptr_t)a.norm);
    cudaFree(a.workspace);
    free(in);
    free(factors);
    free(add);
}

static void projections(void **unused)
{
    static const int types[] = {SQZ_WEIGHTS_Q4_0, SQZ_WEIGHTS_Q4_1, SQZ_WEIGHTS_Q8_0, SQZ_WEIGHTS_Q4_K,
                                SQZ_WEIGHTS_Q6_K};
    static const struct projection_case cases[] = {
        {2048, {2064, 64, 48}, 3, false, true, true},
        {2048, {1040, 1040}, 2, true, false, true},
        {6144, {4240}, 1, false, true, false},
        {14336, {80}, 1, false, false, false},
    };
    static const uint32_t tokens[] = {1, 2, 8, 11, 17, 61};
    const struct sqz_gpu_projections unknown = {
        .type = SQZ_WEIGHTS_Q5_0, .n_in = 2048, .n_tokens = 1, .n_matrices = 1, .matrices[0].n_out = 64};
    struct sqz_gpu_projections known = unknown;
    known.type = SQZ_WEIGHTS_Q4_0;
    (void)unused;
    assert_int_equal(sqz_gpu_calls()->projections_workspace_bytes(&unknown), 0);
    if (sqz_gpu_calls()->projections_workspace_bytes(&known) == 0) {
        printf("products of few tokens: this card leaves them to ggml\n");
        return;
    }
    known.n_in = 2000;
    assert_int_equal(sqz_gpu_calls()->projections_workspace_bytes(&known), 0);
    for (size_t i = 0; i < COUNT(types); i++)
        for (size_t c = 0; c < COUNT(cases); c++)
            for (size_t t = 0; t < COUNT(tokens); t++) check_projections(types[i], &cases[c], tokens[t]);
    assert_int_equal(cudaDeviceReset(), cudaSuccess);
}

/* ---- Ranks --------------------------------------------------------------------------------- */

enum { RANKS = 2 };

/* Two ranks that have a layer's rows between them, each on a GPU of its own: on one, whether kernels that wait for each other run
 * side by side is not ours to say. Nothing here may wait for one stream alone, and what launches every kernel by itself
 * (CUDA_LAUNCH_BLOCKING, compute-sanitizer) cannot run it. */
struct ranks_case {
    struct sqz_layer part[RANKS];
    size_t first_row[RANKS];
    struct sqz_cuda_ranks ranks[RANKS];
    struct sqz_cuda_attend_args args[RANKS];
    cudaStream_t stream[RANKS];
    size_t mailbox_bytes;
};

static const void *moved(const void *from, size_t bytes)
{
    return from ? (const char *)from + bytes : NULL;
}

/* Half the clusters of a layer of one KV head, on the GPU; the first half has the fixed rows. */
static struct sqz_layer upload_half(const struct sqz_layer *l, uint32_t rank, size_t *first_row)
{
    const size_t d = l->shape.head_dim, half = l->level[0].n_clusters / 2, from = rank ? half : 0,
                 n = rank ? l->level[0].n_clusters - half : half, first = l->level[0].offset[from],
                 row = rank ? l->n_fixed + first : 0;
    struct sqz_layer part = *l;
    struct sqz_level *level = &part.level[0];
    uint32_t *offset = take(n + 1, sizeof *offset);
    assert_int_equal(l->shape.n_head_kv, 1);
    for (size_t i = 0; i <= n; i++) offset[i] = l->level[0].offset[from + i] - (uint32_t)first;
    if (rank) part.n_fixed = 0;
    part.n_rows = part.n_fixed + offset[n];
    part.keys.data = moved(l->keys.data, row * sqz_row_data_bytes(l->keys.type, d));
    part.values.data = moved(l->values.data, row * sqz_row_data_bytes(l->values.type, d));
    level->n_clusters = (uint32_t)n;
    level->offset = offset;
    level->centroids.data = moved(level->centroids.data, from * sqz_row_data_bytes(level->centroids.type, d));
    level->centroids.scale = moved(level->centroids.scale, from * sizeof(float));
    level->value_centroids.data =
        moved(level->value_centroids.data, from * sqz_row_data_bytes(level->value_centroids.type, d));
    level->value_centroids.scale = moved(level->value_centroids.scale, from * sizeof(float));
    level->variance = moved(level->variance, from * sizeof(float));
    part.codes.words = moved(part.codes.words, first * sizeof(uint32_t)); /* one word a key */
    *first_row = row;
    const struct sqz_layer on_gpu = upload_layer(&part);
    free(offset);
    return on_gpu;
}

static void use_device(uint32_t i)
{
    assert_int_equal(cudaSetDevice((int)i), cudaSuccess);
}

static void wait_for_devices(void)
{
    for (uint32_t i = 0; i < RANKS; i++) use_device(i), assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
}

/* Each rank's call, launched on its own device. */
static void attend_on_ranks(struct ranks_case *c)
{
    for (uint32_t i = 0; i < RANKS; i++) {
        use_device(i);
        assert_int_equal(sqz_cuda_attend(&c->args[i], c->stream[i]), SQZ_OK);
    }
}

static void make_ranks_case(struct ranks_case *c, const struct sqz_layer *l, const uint16_t *queries, const float *gain,
                            float log_threshold, bool dense)
{
    const size_t h = l->shape.n_head, d = l->shape.head_dim;
    memset(c, 0, sizeof *c);
    c->mailbox_bytes = sqz_cuda_mailbox_bytes(RANKS, (uint32_t)h);
    for (uint32_t i = 0; i < RANKS; i++) {
        use_device(i);
        void *mailbox = device_zeros(c->mailbox_bytes);
        for (uint32_t j = 0; j < RANKS; j++) c->ranks[j].mailbox[i] = mailbox;
    }
    for (uint32_t i = 0; i < RANKS; i++) {
        struct sqz_cuda_attend_args *a = &c->args[i];
        use_device(i);
        assert_int_equal(cudaStreamCreateWithFlags(&c->stream[i], cudaStreamNonBlocking), cudaSuccess);
        c->part[i] = upload_half(l, i, &c->first_row[i]);
        c->ranks[i].rank = i;
        c->ranks[i].n_ranks = RANKS;
        c->ranks[i].n_rows = (uint32_t)h;
        a->layer = &c->part[i];
        a->plan.log_threshold = upload(&log_threshold, sizeof log_threshold);
        a->plan.variance_gain = upload(gain, sizeof *gain);
        a->dense = dense;
        a->n_sequences = a->n_tokens = 1;
        a->queries = upload(queries, h * d * sizeof *queries);
        a->out = device_zeros(h * d * sizeof(uint16_t));
        a->lse = device_zeros(h * sizeof(float));
        a->ranks = &c->ranks[i];
        assert_true(sqz_cuda_attend_supported(a));
        a->workspace_bytes = sqz_cuda_attend_workspace_bytes(a);
        a->workspace = device_zeros(a->workspace_bytes);
    }
}

static uint32_t failed_rank(const struct ranks_case *c, uint32_t rank)
{
    struct sqz_cuda_mailbox header;
    download(&header, c->ranks[rank].mailbox[rank], sizeof header);
    return header.failed;
}

/* Each rank alone gives up, says on whom, and has no result; and all kernels are loaded then, which waits for those that
 * run. Mailboxes are clear afterwards. */
static void check_silence(struct ranks_case *c, size_t n_out)
{
    uint16_t *out = take(n_out, sizeof *out);
    for (uint32_t i = 0; i < RANKS; i++) {
        c->ranks[i].patience_ns = 1000000;
        use_device(i);
        assert_int_equal(sqz_cuda_attend(&c->args[i], c->stream[i]), SQZ_OK);
        assert_int_equal(cudaStreamSynchronize(c->stream[i]), cudaSuccess);
        check_close("rank that was silent", i, failed_rank(c, i), 1 + (RANKS - 1 - i), 0);
        download(out, c->args[i].out, n_out * sizeof *out);
        for (size_t j = 0; j < n_out; j++) {
            const double x = half_value(out[j]);
            check_true("no result without the other rank", j, x, NAN, x != x);
        }
        struct sqz_cuda_selection s;
        if (!c->args[i].dense) assert_int_equal(sqz_cuda_select(&c->args[i], &s, c->stream[i]), SQZ_OK);
        assert_int_equal(cudaStreamSynchronize(c->stream[i]), cudaSuccess);
        for (uint32_t j = 0; j < RANKS; j++)
            use_device(j), assert_int_equal(cudaMemset(c->ranks[j].mailbox[j], 0, c->mailbox_bytes), cudaSuccess);
        wait_for_devices();
    }
    for (uint32_t i = 0; i < RANKS; i++) c->ranks[i].patience_ns = 10000000000u;
    free(out);
}

/* Which rows both ranks list: those of `wanted_rows`, filled up to each rank's groups of 8, which are then wanted. */
static void check_ranks_lists(struct ranks_case *c, bool *wanted_rows)
{
    struct sqz_cuda_selection s[RANKS];
    for (uint32_t i = 0; i < RANKS; i++) {
        use_device(i);
        assert_int_equal(sqz_cuda_select(&c->args[i], &s[i], c->stream[i]), SQZ_OK);
    }
    for (int i = 0; i < RANKS; i++) assert_int_equal(cudaStreamSynchronize(c->stream[i]), cudaSuccess);
    for (uint32_t i = 0; i < RANKS; i++) {
        const size_t n = c->part[i].n_rows;
        bool *rows = wanted_rows + c->first_row[i];
        uint32_t n_groups, *groups = take(s[i].capacity, sizeof *groups), found = 0;
        check_close("rank that failed", i, failed_rank(c, i), 0, 0);
        download(&n_groups, s[i].n_groups, sizeof n_groups);
        download(groups, s[i].groups, s[i].capacity * sizeof *groups);
        for (size_t at = 0; at < n; at += 8) {
            const size_t end = at + 8 < n ? at + 8 : n;
            bool any = false;
            for (size_t row = at; row < end; row++) any = any || rows[row];
            for (size_t row = at; row < end; row++) rows[row] = any;
            if (!any) continue;
            check_true("groups are listed", i, found, n_groups, found < n_groups);
            check_close("group", found, groups[found], (double)at / 8, 0);
            found++;
        }
        check_close("number of groups", i, n_groups, found, 0);
        free(groups);
    }
}

/* A token: both ranks retain what the CPU does of the whole layer, and have the same result, which is that of these. */
static void check_ranks(const struct sqz_layer *l, float log_threshold, bool dense)
{
    const size_t h = l->shape.n_head, d = l->shape.head_dim, n = l->n_rows;
    float *queries = random_floats(h * d, 84, 0.6), *norms = take(h, sizeof *norms), *base = take(h, sizeof *base);
    float *lse = take(h, sizeof *lse);
    uint16_t *halves = take(h * d, sizeof *halves), *out[RANKS];
    bool *read = take(n, sizeof *read);
    const float gain = l->variance_gain ? l->variance_gain[0] : 0;
    to_half(halves, queries, h * d);
    for (size_t i = 0; i < h * d; i++) queries[i] = (float)half_value(halves[i]);
    for (size_t r = 0; r < h; r++) {
        norms[r] = 0;
        for (size_t i = 0; i < d; i++) norms[r] += queries[r * d + i] * queries[r * d + i];
        reference_reset(&reference);
        for (size_t i = 0; i < l->n_fixed; i++)
            reference_add(&reference, queries + r * d, sqz_rows_f16(&l->keys) + i * d, sqz_rows_f16(&l->values), d,
                          l->shape.scale);
        base[r] = (float)reference_lse(&reference);
    }
    for (size_t i = 0; i < n; i++) read[i] = dense || i < l->n_fixed;
    if (!dense) {
        void *workspace = malloc(sqz_lookup_workspace_bytes(l, h));
        const struct sqz_head_plan plan = {log_threshold, 0, gain};
        struct sqz_selection cpu;
        assert_non_null(workspace);
        sqz_lookup(&cpu, l, 0, &plan, queries, norms, h, base, 0, workspace);
        for (size_t i = 0; i < cpu.n_ranges; i++)
            for (size_t row = cpu.ranges[i].begin; row < cpu.ranges[i].end; row++) read[row] = true;
        free(workspace);
    }
    struct ranks_case c;
    make_ranks_case(&c, l, halves, &gain, log_threshold, dense);
    check_silence(&c, h * d);
    if (!dense) check_ranks_lists(&c, read);
    for (int turn = 0; turn < 3; turn++) { /* both places of the mailboxes */
        for (uint32_t i = 0; i < RANKS; i++) {
            use_device(i);
            assert_int_equal(cudaMemsetAsync(c.args[i].out, 0xff, h * d * 2, c.stream[i]), cudaSuccess);
        }
        attend_on_ranks(&c);
        for (int i = 0; i < RANKS; i++) assert_int_equal(cudaStreamSynchronize(c.stream[i]), cudaSuccess);
    }
    for (uint32_t i = 0; i < RANKS; i++) {
        check_close("rank that failed", i, failed_rank(&c, i), 0, 0);
        out[i] = take(h * d, sizeof *out[i]);
        download(out[i], c.args[i].out, h * d * sizeof *out[i]);
    }
    download(lse, c.args[1].lse, h * sizeof *lse);
    assert_memory_equal(out[0], out[1], h * d * sizeof *out[0]);
    for (size_t r = 0; r < h; r++) {
        reference_reset(&reference);
        for (size_t i = 0; i < n; i++)
            if (read[i])
                reference_add(&reference, queries + r * d, sqz_rows_f16(&l->keys) + i * d,
                              sqz_rows_f16(&l->values) + i * d, d, l->shape.scale);
        reference_finish(&reference, d, &wanted);
        check_close("lse", r, lse[r], wanted.lse, 1e-3);
        for (size_t i = 0; i < d; i++) check_close("output", i, half_value(out[0][r * d + i]), wanted.out[i], 1e-2);
    }
    for (int i = 0; i < RANKS; i++) free(out[i]);
    free(read);
    free(halves);
    free(lse);
    free(base);
    free(norms);
    free(queries);
    for (uint32_t i = RANKS; i-- > 0;) use_device(i), assert_int_equal(cudaDeviceReset(), cudaSuccess);
}

/* Devices that were reset no longer know each other. */
static void connect_ranks(void)
{
    static const int devices[RANKS] = {0, 1};
    char why[256];
    if (sqz_cuda_ranks_connect(devices, RANKS, why, sizeof why) != SQZ_OK) fail_msg("%s", why);
}

static void ranks(void **unused)
{
    (void)unused;
    int n_devices = 0;
    assert_int_equal(cudaGetDeviceCount(&n_devices), cudaSuccess);
    if (n_devices < RANKS) {
        puts("one GPU: what two of them have between them is not tried");
        skip();
    }
    static const struct variation shapes[] = {
        {6, 1, 96, 1, SQZ_INDEX_F16, SQZ_RULE_DEFAULT, SQZ_GROUP_MAX, 800, 0, SQZ_ROWS_F16, false},
        {4, 1, 128, 1, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, SQZ_GROUP_MEAN, 2900, 0, SQZ_ROWS_F16, false},
        {4, 1, 128, 1, SQZ_INDEX_INT8, SQZ_RULE_DEFAULT, SQZ_GROUP_MAX, 1203, 1, SQZ_ROWS_F16, false}, /* codes */
    };
    int device, major;
    assert_int_equal(cudaGetDevice(&device), cudaSuccess);
    assert_int_equal(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), cudaSuccess);
    for (size_t v = 0; v < COUNT(shapes); v++) {
        struct sqz_layer *l = make_layer(&shapes[v], 70 + v);
        static const float thresholds[] = {-6.03f, -4.51f};
        const bool in_one_launch = major == 9; /* with codes there is no other way */
        for (size_t i = 0; i < COUNT(thresholds) && (!shapes[v].code_words || in_one_launch); i++) {
            describe("variation %zu, log threshold %g", v, thresholds[i]);
            connect_ranks();
            check_ranks(l, thresholds[i], false);
        }
        describe("variation %zu, dense", v);
        connect_ranks();
        check_ranks(l, 0, true);
        sqz_layer_free(l);
    }
}

/* What cannot run is refused before anything is launched. */
static void refusals(void **unused)
{
    (void)unused;
    struct sqz_layer layer;
    struct sqz_cuda_attend_args a;
    memset(&layer, 0, sizeof layer);
    memset(&a, 0, sizeof a);
    assert_false(sqz_cuda_attend_supported(NULL));
    assert_int_equal(sqz_cuda_attend(NULL, NULL), SQZ_ERROR_ARGUMENT);
    a.layer = &layer;
    a.n_sequences = a.n_tokens = 1;
    a.dense = true;
    layer.shape = (struct sqz_layer_shape){4, 2, 128, 0.1f};
    layer.n_rows = 100;
    assert_false(sqz_cuda_attend_supported(&a)); /* rows of no type */
    layer.keys.type = layer.values.type = SQZ_ROW_I8;
    assert_false(sqz_cuda_attend_supported(&a));
    layer.keys.type = SQZ_ROW_BF16;
    layer.values.type = SQZ_ROW_F16;
    assert_false(sqz_cuda_attend_supported(&a));
    layer.keys.type = SQZ_ROW_F16;
    assert_true(sqz_cuda_attend_supported(&a));
    assert_true(sqz_cuda_attend_workspace_bytes(&a) > 0);
    layer.shape.head_dim = 80;
    assert_false(sqz_cuda_attend_supported(&a));
    assert_true(sqz_cuda_attend_workspace_bytes(&a) == 0);
    layer.shape.head_dim = 128;
    layer.shape.n_head_kv = 3;
    assert_false(sqz_cuda_attend_supported(&a));
    layer.shape.n_head_kv = 2;
    layer.codes.n_words = 5;
    layer.codes.n_directions = 48;
    assert_false(sqz_cuda_attend_supported(&a));
    layer.codes.n_words = 4;
    assert_true(sqz_cuda_attend_supported(&a));
    layer.codes.n_directions = 257;
    assert_false(sqz_cuda_attend_supported(&a));
    layer.codes.n_words = 0;
    a.windowed = true;
    assert_true(sqz_cuda_attend_supported(&a));
    a.n_sequences = 2; /* of one text alone */
    assert_false(sqz_cuda_attend_supported(&a));
    a.windowed = false;
    a.n_sequences = 65;
    assert_false(sqz_cuda_attend_supported(&a));
    a.together = true; /* everything is read */
    assert_true(sqz_cuda_attend_supported(&a));
    a.n_tokens = 2;
    assert_false(sqz_cuda_attend_supported(&a));
    a.n_tokens = 1;
    a.n_sequences = 513;
    assert_false(sqz_cuda_attend_supported(&a));
    a.dense = false;
    layer.n_levels = 1;
    layer.level[0].n_clusters = 4;
    layer.level[0].centroids.type = SQZ_ROW_F16;
    a.n_sequences = 65;
    assert_false(sqz_cuda_attend_supported(&a));
    a.n_sequences = 64;
    assert_false(sqz_cuda_attend_supported(&a)); /* thresholds are each sequence's */
    a.plan.per_sequence = true;
    assert_true(sqz_cuda_attend_supported(&a));
    a.plan.per_sequence = false;
    a.together = false;
    a.n_sequences = 1;
    layer.n_fixed = layer.keys.planes.n_whole = layer.values.planes.n_whole = 20;
    layer.keys.type = layer.values.type = SQZ_ROW_I44;
    assert_true(sqz_cuda_attend_supported(&a));
    assert_true(sqz_cuda_plane_index_bytes(&layer) > 0);
    const size_t planes = sqz_cuda_attend_workspace_bytes(&a);
    a.n_tokens = 2; /* F16 rows are made first */
    assert_true(sqz_cuda_attend_workspace_bytes(&a) > planes + (size_t)2 * 2 * 100 * 128 * 2);
    a.dense = a.windowed = true;
    assert_false(sqz_cuda_attend_supported(&a));
    a.windowed = false;
    assert_true(sqz_cuda_attend_supported(&a));
    layer.values.planes.n_whole = 19;
    assert_false(sqz_cuda_attend_supported(&a));
    layer.values.planes.n_whole = 20;
    layer.values.type = SQZ_ROW_I4;
    assert_false(sqz_cuda_attend_supported(&a));
    layer.values.type = SQZ_ROW_I44;
    layer.shape.head_dim = 96;
    assert_false(sqz_cuda_attend_supported(&a));
    assert_true(sqz_cuda_plane_index_bytes(&layer) == 0);
    layer.shape.head_dim = 128;
    layer.keys.type = layer.values.type = SQZ_ROW_F16;
    assert_true(sqz_cuda_plane_index_bytes(&layer) == 0);
    a.n_tokens = 1;
    layer.n_levels = 0;
    a.n_sequences = 0;
    assert_false(sqz_cuda_attend_supported(&a));
}

/* Ranks that are not in order, and calls that are not for several. */
static void ranks_refused(void **unused)
{
    (void)unused;
    static _Alignas(256) char memory[512]; /* not looked at */
    char why[200];
    const int device = 0;
    struct sqz_layer layer = {.shape = {4, 2, 128, 0.1f}, .n_rows = 100, .keys.type = SQZ_ROW_F16};
    struct sqz_cuda_ranks r = {.n_ranks = 2, .n_rows = 4, .mailbox = {memory, memory + 256}};
    struct sqz_cuda_attend_args a = {.layer = &layer, .dense = true, .n_sequences = 1, .n_tokens = 1, .ranks = &r};
    layer.values = layer.keys;
    assert_true(sqz_cuda_mailbox_bytes(1, 4) == 0);
    assert_true(sqz_cuda_mailbox_bytes(SQZ_CUDA_MOST_RANKS + 1, 4) == 0);
    assert_true(sqz_cuda_mailbox_bytes(2, 0) == 0);
    assert_true(sqz_cuda_mailbox_bytes(2, 4) > sizeof(struct sqz_cuda_mailbox));
    assert_true(sqz_cuda_mailbox_bytes(SQZ_CUDA_MOST_RANKS, 64) > sqz_cuda_mailbox_bytes(2, 64));
    assert_int_equal(sqz_cuda_ranks_connect(&device, 1, why, sizeof why), SQZ_ERROR_ARGUMENT);
    assert_string_equal(why, "1 devices were given, 2 to 8 can be connected");
    assert_true(sqz_cuda_attend_supported(&a));
    r.rank = 2;
    assert_false(sqz_cuda_attend_supported(&a));
    r.rank = 1;
    r.n_ranks = 1;
    assert_false(sqz_cuda_attend_supported(&a));
    r.n_ranks = SQZ_CUDA_MOST_RANKS + 1;
    assert_false(sqz_cuda_attend_supported(&a));
    r.n_ranks = 3; /* no mailbox of the third */
    assert_false(sqz_cuda_attend_supported(&a));
    r.n_ranks = 2;
    r.n_rows = 3;
    assert_false(sqz_cuda_attend_supported(&a));
    r.n_rows = 4;
    r.mailbox[0] = memory + 8;
    assert_false(sqz_cuda_attend_supported(&a));
    r.mailbox[0] = memory;
    assert_true(sqz_cuda_attend_supported(&a));
    a.n_tokens = 2;
    assert_false(sqz_cuda_attend_supported(&a));
    a.n_tokens = 1;
    a.together = true;
    assert_false(sqz_cuda_attend_supported(&a));
    a.together = a.dense = false;
    layer.n_levels = 2;
    layer.level[0] = (struct sqz_level){.n_clusters = 40, .centroids.type = SQZ_ROW_F16};
    layer.level[1] = (struct sqz_level){.n_clusters = 4, .centroids.type = SQZ_ROW_F16};
    a.ranks = NULL;
    assert_true(sqz_cuda_attend_supported(&a));
    a.ranks = &r;
    assert_false(sqz_cuda_attend_supported(&a)); /* one level alone */
    layer.n_levels = 1;
    assert_true(sqz_cuda_attend_supported(&a));
    layer.n_fixed = layer.keys.planes.n_whole = layer.values.planes.n_whole = 20;
    layer.keys.type = layer.values.type = SQZ_ROW_I44;
    assert_false(sqz_cuda_attend_supported(&a)); /* nor rows in planes */
    a.ranks = NULL;
    assert_true(sqz_cuda_attend_supported(&a));
}

/* A layer whose arrays are in host memory is refused before any of them is looked at. */
static void wrong_space(void **unused)
{
    (void)unused;
    static _Alignas(256) char memory[4096];
    struct sqz_layer layer = {.shape = {4, 2, 128, 0.1f}, .n_rows = 100, .n_fixed = 10, .n_levels = 1};
    layer.keys = layer.values = (struct sqz_rows){.type = SQZ_ROW_F16, .data = memory};
    layer.level[0] = (struct sqz_level){.n_clusters = 4, .centroids = layer.keys};
    assert_int_equal(layer.space, SQZ_SPACE_HOST);
    const struct sqz_cuda_attend_args attend = {.layer = &layer,
                                                .dense = true,
                                                .n_sequences = 1,
                                                .n_tokens = 1,
                                                .queries = memory,
                                                .out = memory,
                                                .workspace = memory,
                                                .workspace_bytes = SIZE_MAX};
    const struct sqz_cuda_calibrate_args calibrate = {.layer = &layer,
                                                      .n_queries = 1,
                                                      .queries = memory,
                                                      .n_points = 4,
                                                      .step = 1,
                                                      .share = (float *)memory,
                                                      .workspace = memory,
                                                      .workspace_bytes = SIZE_MAX};
    struct sqz_cuda_selection selection;
    assert_int_equal(sqz_cuda_attend(&attend, NULL), SQZ_ERROR_ARGUMENT);
    assert_int_equal(sqz_cuda_select(&attend, &selection, NULL), SQZ_ERROR_ARGUMENT);
    assert_int_equal(sqz_cuda_calibrate(&calibrate, NULL), SQZ_ERROR_ARGUMENT);
}

/* An argument: which tests, "sequences_*". */
int main(int argc, char **argv)
{
    const struct CMUnitTest host[] = {cmocka_unit_test(refusals), cmocka_unit_test(ranks_refused),
                                      cmocka_unit_test(wrong_space)};
    const struct CMUnitTest device[] = {cmocka_unit_test(node_rows),       cmocka_unit_test(one_token),
                                        cmocka_unit_test(sequences_apart), cmocka_unit_test(sequences_together),
                                        cmocka_unit_test(nodes),           cmocka_unit_test(contexts_together),
                                        cmocka_unit_test(ranks),           cmocka_unit_test(rows_that_count),
                                        cmocka_unit_test(block_of_tokens), cmocka_unit_test(windows),
                                        cmocka_unit_test(clusters),        cmocka_unit_test(products),
                                        cmocka_unit_test(projections),     cmocka_unit_test(text),
                                        cmocka_unit_test(own_planes)};
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    int failed = cmocka_run_group_tests(host, NULL, NULL);
    if (!sqz_cuda_device_supported()) {
        fprintf(stderr, "skipped: no CUDA device of compute capability 8.0 or newer\n");
        return failed ? 1 : 77;
    }
    failed += cmocka_run_group_tests(device, NULL, NULL);
    return failed ? 1 : 0;
}
