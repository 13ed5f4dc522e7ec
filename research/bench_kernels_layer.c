/*
 * A layer drawn from known clusters. Clustering half a million keys honestly takes minutes and is another measurement's
 * matter; here clusters come first and keys after them, in the order in which the library wants them.
 *
 * Of every KV head: coarse centres S ~ N(0, 0.64^2), a cluster's centre C ~ N(S, 0.42^2), its keys ~ N(C, s^2) with s
 * from 0.45 to 0.8, so that a component of a key has variance 1 over the head: 0.41 of it between coarse clusters, 0.18
 * between the clusters of one, 0.41 within a cluster. Those are the shares that the library's own two levels (5%, 1%)
 * leave on the keys of SmolLM2-135M over 6,383 tokens of English, the mean of its 90 heads; so is the spread of sizes,
 * log-normal with 0.7. Values lie around a centre of their own for each cluster. Centroids, value centroids and
 * variances are then those of the F16 rows, as the library's own build computes them. The first 16 rows are sinks (one
 * direction that no other key has), the next 64 the window.
 *
 * A head's queries are a random walk over the tokens, kappa N(0, 1), plus what makes retention uneven, as it is in real
 * heads: kappa, from 0.6 (flat attention) to 2.2 (sharp), differs from head to head; three coarse centres, other ones
 * every 64 tokens, get 3 more in the logit; and a part along the sinks' direction gives them from 5% to 70% of the
 * attention, by head.
 */
#include "bench_kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "codes.h"
#include "common.h"
#include "kernels.h"
#include "random.h"

enum {
    SINKS = 16,
    WINDOW = 64,
    FIXED = SINKS + WINDOW,
    CHILDREN = 5, /* clusters of a level that one of the next holds, on average */
    MAX_DIM = 256,
    NOISE = 1 << 16, /* normal numbers drawn in advance; a vector begins anywhere among them */
    TOPIC_TOKENS = 64,
    TOPICS = 3,
    CODE_QUERIES = 64, /* that codes are made for, as many as prepare keeps */
};

static const double coarse_deviation = 0.64, fine_deviation = 0.42, low_deviation = 0.45, high_deviation = 0.8;
static const double size_deviation = 0.7;
static const double topic_logit = 3.0, sink_length = 4.0; /* of a sink's key, in units of sqrt(D) */

static uint64_t seed_of(uint64_t what, uint64_t head, uint64_t number)
{
    uint64_t seed = (what * UINT64_C(0x9e3779b97f4a7c15)) ^ (head << 40) ^ number;
    return sqz_splitmix64(&seed);
}

static double normal(struct sqz_random *random)
{
    const double u = sqz_random_unit(random) + 0x1p-54;
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * sqz_random_unit(random));
}

static float *draw_noise(void)
{
    struct sqz_random random;
    float *noise = malloc((NOISE + MAX_DIM) * sizeof *noise);
    sqz_random_seed(&random, 1);
    for (size_t i = 0; noise && i < NOISE + MAX_DIM; i++) noise[i] = (float)normal(&random);
    return noise;
}

/* D normal numbers. */
static const float *normal_vector(const float *noise, struct sqz_random *random)
{
    return noise + sqz_random_below(random, NOISE);
}

/* n parts of `total`, each at least 1, log-normal: offset[0..n]. */
static void draw_sizes(uint32_t *offset, size_t n, size_t total, uint64_t seed)
{
    struct sqz_random random;
    double sum = 0.0, so_far = 0.0;
    sqz_random_seed(&random, seed);
    for (size_t i = 0; i < n; i++) sum += exp(size_deviation * normal(&random));
    sqz_random_seed(&random, seed);
    for (size_t i = 0; i < n; i++) {
        offset[i] = (uint32_t)(i + (size_t)((double)(total - n) * (so_far / sum)));
        so_far += exp(size_deviation * normal(&random));
    }
    offset[n] = (uint32_t)total;
}

/* ---- Memory ------------------------------------------------------------------------ */

struct arrays {
    uint16_t *keys, *values;
    uint16_t *centroids[BENCH_LEVELS], *value_centroids[BENCH_LEVELS];
    uint32_t *offset[BENCH_LEVELS];
    float *variance[BENCH_LEVELS], *variance_gain;
    int8_t *keys_i8, *centroids_i8[BENCH_LEVELS];
    float *key_scale, *centroid_scale[BENCH_LEVELS], *key_mean;
    struct sqz_codes codes;
    uint16_t *queries;
};

static void count_clusters(const struct bench_layer_options *o, size_t counts[BENCH_LEVELS])
{
    counts[0] = (size_t)(o->centroid_share * (double)(o->n_rows - FIXED) + 0.5);
    counts[0] = counts[0] < 2 * CHILDREN ? 2 * CHILDREN : counts[0];
    for (size_t l = 1; l < BENCH_LEVELS; l++) counts[l] = counts[l - 1] / CHILDREN;
}

/* Groups that select clusters have no codes, as in a prepared context. */
static void count_codes(const struct bench_layer_options *o, struct sqz_codes *codes)
{
    const bool small = o->shape.n_head / o->shape.n_head_kv <= SQZ_MAX_GROUP_QUERIES;
    memset(codes, 0, sizeof *codes);
    codes->n_words = small ? o->code_words : 0;
    codes->n_directions = sqz_code_directions(codes->n_words, o->shape.head_dim);
}

/* The two blocks; with `a` zero-based they only count. Keys and values begin a few pages apart from a power of two:
 * two streams whose addresses differ in high bits alone fall into the same banks of the memory (a Zen 4 machine reads
 * such a pair at 20 GB/s in place of 34). */
static void carve(const struct bench_layer_options *o, struct sqz_arena *rows, struct sqz_arena *index,
                  struct arrays *a)
{
    const size_t k = o->shape.n_head_kv, d = o->shape.head_dim;
    size_t counts[BENCH_LEVELS];
    count_clusters(o, counts);
    count_codes(o, &a->codes);
    a->keys = sqz_arena_take(rows, k * o->n_rows + o->n_user, d, sizeof(uint16_t));
    sqz_arena_take(rows, 24 * 1024 + 576, 1, 1);
    a->values = sqz_arena_take(rows, k * o->n_rows + o->n_user, d, sizeof(uint16_t));
    a->variance_gain = sqz_arena_take(index, k, 1, sizeof(float));
    a->key_mean = sqz_arena_take(index, k, d, sizeof(float));
    sqz_arena_take(rows, 24 * 1024 + 576, 1, 1);
    a->keys_i8 = o->int8_keys ? sqz_arena_take(rows, k * o->n_rows, d, 1) : NULL;
    a->key_scale = o->int8_keys ? sqz_arena_take(rows, k, o->n_rows, sizeof(float)) : NULL;
    for (size_t l = 0; l < BENCH_LEVELS; l++) {
        a->centroids[l] = sqz_arena_take(index, k * counts[l], d, sizeof(uint16_t));
        a->value_centroids[l] = sqz_arena_take(index, k * counts[l], d, sizeof(uint16_t));
        a->variance[l] = sqz_arena_take(index, k, counts[l], sizeof(float));
        a->offset[l] = sqz_arena_take(index, k, counts[l] + 1, sizeof(uint32_t));
        a->centroids_i8[l] = o->int8_centroids ? sqz_arena_take(index, k * counts[l], d, 1) : NULL;
        a->centroid_scale[l] = o->int8_centroids ? sqz_arena_take(index, k, counts[l], sizeof(float)) : NULL;
    }
    const size_t words = a->codes.n_words, directions = a->codes.n_directions;
    a->codes.words = sqz_arena_take(index, k * words, o->n_rows - FIXED, sizeof(uint32_t));
    a->codes.directions = sqz_arena_take(index, k * directions, d, sizeof(uint16_t));
    a->codes.book = sqz_arena_take(index, k * directions, SQZ_CODE_ENTRIES, sizeof(uint16_t));
    a->codes.first = sqz_arena_take(index, k, SQZ_CODE_PARTS * words + 1, sizeof(uint32_t));
    a->codes.spread = sqz_arena_take(index, k, directions, sizeof(float));
    a->queries = sqz_arena_take(index, words ? CODE_QUERIES : 0, o->shape.n_head * d, sizeof(uint16_t));
}

size_t bench_layer_bytes(const struct bench_layer_options *options)
{
    struct sqz_arena rows = sqz_arena_on(NULL), index = sqz_arena_on(NULL);
    struct arrays arrays;
    struct bench_layer outline;
    bench_layer_outline(&outline, options);
    carve(options, &rows, &index, &arrays);
    const size_t work = arrays.codes.n_words ? sqz_code_build_workspace_bytes(&outline.layer) : 0;
    return sqz_arena_bytes(&rows) + sqz_arena_bytes(&index) + (size_t)options->n_threads * work;
}

/* ---- Rows --------------------------------------------------------------------------- */

/* Sums over the rows of a cluster. */
struct sums {
    double key[MAX_DIM], value[MAX_DIM], squared;
    size_t n;
};

static void store_row(uint16_t *out, const float *centre, double share, double deviation, const float *noise, size_t d)
{
    float row[MAX_DIM];
    for (size_t i = 0; i < d; i++) row[i] = (float)share * centre[i] + (float)deviation * noise[i];
    sqz_kernels_get()->f32_to_f16(out, row, d);
}

static void add_row(struct sums *sums, const uint16_t *key, const uint16_t *value, size_t d)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    float row[MAX_DIM];
    k->f16_to_f32(row, key, d);
    for (size_t i = 0; i < d; i++) {
        sums->key[i] += row[i];
        sums->squared += (double)row[i] * row[i];
    }
    k->f16_to_f32(row, value, d);
    for (size_t i = 0; i < d; i++) sums->value[i] += row[i];
    sums->n++;
}

static void add_sums(struct sums *into, const struct sums *from, size_t d)
{
    for (size_t i = 0; i < d; i++) {
        into->key[i] += from->key[i];
        into->value[i] += from->value[i];
    }
    into->squared += from->squared;
    into->n += from->n;
}

/* Cluster number `at` (over all heads) of level l. */
static void store_cluster(const struct arrays *a, size_t l, size_t at, const struct sums *sums, size_t d)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const double n = (double)sums->n;
    float mean[MAX_DIM];
    double squared = 0.0;
    for (size_t i = 0; i < d; i++) mean[i] = (float)(sums->value[i] / n);
    k->f32_to_f16(a->value_centroids[l] + at * d, mean, d);
    for (size_t i = 0; i < d; i++) {
        mean[i] = (float)(sums->key[i] / n);
        squared += sums->key[i] / n * (sums->key[i] / n);
    }
    k->f32_to_f16(a->centroids[l] + at * d, mean, d);
    const double variance = sums->squared / n - squared;
    a->variance[l][at] = variance > 0.0 ? (float)variance : 0.0f;
}

/* All clusters and rows below one coarse cluster of a head. */
static void make_coarse(const struct bench_layer *layer, const struct arrays *a, const float *noise, uint32_t head,
                        uint32_t coarse)
{
    const struct sqz_layer *l = &layer->layer;
    const size_t d = l->shape.head_dim, row0 = (size_t)head * l->n_rows + FIXED;
    const uint32_t *offset = a->offset[0] + (size_t)head * (l->level[0].n_clusters + 1);
    const uint32_t *coarse_offset = a->offset[1] + (size_t)head * (l->level[1].n_clusters + 1);
    struct sqz_random random;
    struct sums all, own;
    float centre[MAX_DIM], value_centre[MAX_DIM];
    memset(&all, 0, sizeof all);
    sqz_random_seed(&random, seed_of(2, head, coarse));
    const float *coarse_noise = normal_vector(noise, &random);
    for (uint32_t c = coarse_offset[coarse]; c < coarse_offset[coarse + 1]; c++) {
        const float *fine = normal_vector(noise, &random), *value = normal_vector(noise, &random);
        const double deviation = low_deviation + (high_deviation - low_deviation) * sqz_random_unit(&random);
        for (size_t i = 0; i < d; i++) {
            centre[i] = (float)(coarse_deviation * coarse_noise[i] + fine_deviation * fine[i]);
            value_centre[i] = value[i];
        }
        memset(&own, 0, sizeof own);
        for (size_t r = row0 + offset[c]; r < row0 + offset[c + 1]; r++) {
            store_row(a->keys + r * d, centre, 1.0, deviation, normal_vector(noise, &random), d);
            store_row(a->values + r * d, value_centre, 0.7, 0.7, normal_vector(noise, &random), d);
            add_row(&own, a->keys + r * d, a->values + r * d, d);
        }
        store_cluster(a, 0, (size_t)head * l->level[0].n_clusters + c, &own, d);
        add_sums(&all, &own, d);
    }
    store_cluster(a, 1, (size_t)head * l->level[1].n_clusters + coarse, &all, d);
}

static void make_fixed(const struct bench_layer *layer, const struct arrays *a, const float *noise, uint32_t head)
{
    const size_t d = layer->layer.shape.head_dim, row0 = (size_t)head * layer->layer.n_rows;
    struct sqz_random random;
    float centre[MAX_DIM] = {0};
    sqz_random_seed(&random, seed_of(3, head, 0));
    for (size_t r = row0; r < row0 + FIXED; r++) {
        const bool sink = r < row0 + SINKS;
        centre[0] = sink ? (float)(sink_length * sqrt((double)d)) : 0.0f;
        store_row(a->keys + r * d, centre, 1.0, sink ? 0.1 : 1.0, normal_vector(noise, &random), d);
        store_row(a->values + r * d, centre, 0.0, sink ? 0.05 : 1.0, normal_vector(noise, &random), d);
    }
}

/* A head's n rows again in another type. */
static void store_small(const struct sqz_rows *small, const struct sqz_rows *rows, size_t n, size_t d, uint32_t head)
{
    const struct sqz_rows from = sqz_rows_of_head(rows, n, d, head), to = sqz_rows_of_head(small, n, d, head);
    float row[MAX_DIM];
    for (size_t r = 0; r < n; r++) {
        sqz_rows_to_f32(row, &from, r, 1, d);
        sqz_rows_store(&to, r, row, d);
    }
}

/* The mean of a head's clustered keys, from its coarse clusters. */
static void store_mean(const struct sqz_layer *l, float *mean, uint32_t head)
{
    const size_t d = l->shape.head_dim, n = l->level[1].n_clusters;
    double sum[MAX_DIM] = {0};
    float row[MAX_DIM];
    for (uint32_t c = 0; c < n; c++) {
        const double keys = sqz_cluster_keys(l, head, 1, c, NULL);
        sqz_rows_to_f32(row, &l->level[1].centroids, head * n + c, 1, d);
        for (size_t i = 0; i < d; i++) sum[i] += keys * row[i];
    }
    for (size_t i = 0; i < d; i++) mean[head * d + i] = (float)(sum[i] / (double)(l->n_rows - l->n_fixed));
}

static void make_int8(const struct bench_layer *layer, const struct arrays *a, uint32_t head)
{
    const struct sqz_layer *l = &layer->layer;
    const size_t d = l->shape.head_dim;
    store_mean(l, a->key_mean, head);
    for (size_t i = 0; i < BENCH_LEVELS && a->centroids_i8[i]; i++)
        store_small(&layer->small_centroids[i], &l->level[i].centroids, l->level[i].n_clusters, d, head);
    if (a->keys_i8) store_small(&layer->small_keys, &l->keys, l->n_rows, d, head);
}

static void describe(struct bench_layer *layer, const struct arrays *a)
{
    const struct bench_layer_options *o = &layer->options;
    struct sqz_squeeze_options defaults;
    size_t counts[BENCH_LEVELS];
    struct sqz_layer *l = &layer->layer;
    sqz_squeeze_options_default(&defaults, SQZ_RULE_DEFAULT);
    count_clusters(o, counts);
    memset(l, 0, sizeof *l);
    l->shape = o->shape;
    l->n_rows = (uint32_t)o->n_rows;
    l->n_fixed = FIXED;
    l->keys = (struct sqz_rows){.type = SQZ_ROW_F16, .data = a->keys};
    l->values = (struct sqz_rows){.type = SQZ_ROW_F16, .data = a->values};
    layer->small_keys =
        (struct sqz_rows){.type = SQZ_ROW_I8, .data = a->keys_i8, .scale = a->key_scale, .mean = a->key_mean};
    l->n_levels = BENCH_LEVELS;
    l->rule = SQZ_RULE_DEFAULT;
    l->tail = defaults.tail;
    l->value_skip = defaults.value_skip;
    l->group = defaults.group;
    l->variance_gain = a->variance_gain;
    count_codes(o, &l->codes);
    l->codes.words = a->codes.words;
    l->codes.directions = a->codes.directions;
    l->codes.book = a->codes.book;
    l->codes.first = a->codes.first;
    l->codes.spread = a->codes.spread;
    l->queries = a->queries;
    l->n_queries = l->codes.n_words ? CODE_QUERIES : 0;
    for (size_t i = 0; i < BENCH_LEVELS; i++) {
        l->level[i].n_clusters = (uint32_t)counts[i];
        l->level[i].centroids = (struct sqz_rows){.type = SQZ_ROW_F16, .data = a->centroids[i]};
        l->level[i].value_centroids = (struct sqz_rows){.type = SQZ_ROW_F16, .data = a->value_centroids[i]};
        layer->small_centroids[i] = (struct sqz_rows){
            .type = SQZ_ROW_I8, .data = a->centroids_i8[i], .scale = a->centroid_scale[i], .mean = a->key_mean};
        l->level[i].offset = a->offset[i];
        l->level[i].variance = a->variance[i];
    }
}

static void fill(struct bench_layer *layer, const struct arrays *a, const float *noise)
{
    const struct sqz_layer *l = &layer->layer;
    const size_t n_heads = l->shape.n_head_kv, n_fine = l->level[0].n_clusters, n_coarse = l->level[1].n_clusters;
    const size_t d = l->shape.head_dim, n_user = layer->options.n_user;
    const int n_threads = layer->options.n_threads;
    (void)n_threads; /* without OpenMP it is one */
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
    for (size_t h = 0; h < n_heads; h++) {
        a->variance_gain[h] = 1.0f; /* the clusters are normal: the expected exponential is exactly this */
        draw_sizes(a->offset[0] + h * (n_fine + 1), n_fine, l->n_rows - FIXED, seed_of(4, h, 0));
        draw_sizes(a->offset[1] + h * (n_coarse + 1), n_coarse, n_fine, seed_of(4, h, 1));
        make_fixed(layer, a, noise, (uint32_t)h);
    }
#pragma omp parallel for schedule(dynamic, 8) num_threads(n_threads)
    for (size_t i = 0; i < n_heads * n_coarse; i++)
        if (!signal_caught()) make_coarse(layer, a, noise, (uint32_t)(i / n_coarse), (uint32_t)(i % n_coarse));
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
    for (size_t h = 0; h < n_heads; h++)
        if (!signal_caught()) make_int8(layer, a, (uint32_t)h);
    memcpy(a->keys + n_heads * l->n_rows * d, a->keys, n_user * d * sizeof *a->keys);
    memcpy(a->values + n_heads * l->n_rows * d, a->values, n_user * d * sizeof *a->values);
}

/* ---- Queries --------------------------------------------------------------------------- */

/* Raises the logits of the keys around a coarse centre by topic_logit on average. */
static void add_topic(float *query, const struct sqz_layer *l, uint32_t head, struct sqz_random *random)
{
    const size_t d = l->shape.head_dim;
    const size_t c = (size_t)sqz_random_below(random, l->level[1].n_clusters);
    float centre[MAX_DIM];
    double squared = 0.0;
    sqz_rows_to_f32(centre, &l->level[1].centroids, (size_t)head * l->level[1].n_clusters + c, 1, d);
    for (size_t i = 0; i < d; i++) squared += (double)centre[i] * centre[i];
    for (size_t i = 0; i < d; i++) query[i] += (float)(topic_logit / l->shape.scale / squared * centre[i]);
}

/* Queries of the heads that share a KV head. */
static void make_queries(const struct sqz_layer *l, float *queries, size_t n_tokens, uint32_t head)
{
    const double kept = 0.95, shared = 0.8, own = 0.6; /* of the walk from token to token; of a head's query */
    const size_t d = l->shape.head_dim, group = l->shape.n_head / l->shape.n_head_kv;
    struct sqz_random random, topics;
    double walk[MAX_DIM];
    sqz_random_seed(&random, seed_of(5, head, 0));
    const double kappa = 0.6 * pow(2.2 / 0.6, sqz_random_unit(&random));
    const double sink_share = 0.05 + 0.65 * sqz_random_unit(&random);
    const double sink_logit = log((double)l->n_rows / SINKS) + 0.5 * kappa * kappa + log(sink_share / (1 - sink_share));
    for (size_t i = 0; i < d; i++) walk[i] = normal(&random);
    for (size_t t = 0; t < n_tokens; t++) {
        for (size_t i = 0; i < d; i++) walk[i] = kept * walk[i] + sqrt(1.0 - kept * kept) * normal(&random);
        for (size_t g = 0; g < group; g++) {
            float *query = queries + (t * l->shape.n_head + head * group + g) * d;
            for (size_t i = 0; i < d; i++) query[i] = (float)(kappa * (shared * walk[i] + own * normal(&random)));
            sqz_random_seed(&topics, seed_of(6, head, t / TOPIC_TOKENS));
            for (int topic = 0; topic < TOPICS; topic++) add_topic(query, l, head, &topics);
            query[0] = (float)(sink_logit / (sink_length * sqrt((double)d) * l->shape.scale));
        }
    }
}

/* Codes of all keys, as prepare makes them, for queries of each head as they are drawn above. Against INT8 centroids
 * where there are any: they are what prepare has, and the time is that of any. */
static void make_codes(const struct bench_layer *layer, uint16_t *queries)
{
    const struct sqz_layer *l = &layer->layer;
    struct sqz_layer view = *l;
    const size_t n = (size_t)CODE_QUERIES * l->shape.n_head * l->shape.head_dim;
    const size_t bytes = sqz_code_build_workspace_bytes(l);
    const int n_threads = layer->options.n_threads;
    float *drawn = malloc(n * sizeof *drawn);
    if (!drawn) die("out of memory");
    if (layer->options.int8_centroids) view.level[0].centroids = layer->small_centroids[0];
    (void)n_threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
    for (uint32_t h = 0; h < l->shape.n_head_kv; h++) make_queries(l, drawn, CODE_QUERIES, h);
    sqz_kernels_get()->f32_to_f16(queries, drawn, n);
    free(drawn);
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
    for (uint32_t h = 0; h < l->shape.n_head_kv; h++) {
        void *workspace = signal_caught() ? NULL : malloc(bytes);
        if (workspace) sqz_code_build(&view, h, workspace);
        else if (!signal_caught()) die("out of memory");
        free(workspace);
    }
}

/* ---- The whole --------------------------------------------------------------------------- */

void bench_layer_outline(struct bench_layer *layer, const struct bench_layer_options *options)
{
    struct arrays none;
    memset(&none, 0, sizeof none);
    memset(layer, 0, sizeof *layer);
    layer->options = *options;
    describe(layer, &none);
}

bool bench_layer_make(struct bench_layer *layer, const struct bench_layer_options *options)
{
    struct sqz_arena rows = sqz_arena_on(NULL), index = sqz_arena_on(NULL);
    struct arrays arrays;
    bench_layer_outline(layer, options);
    carve(options, &rows, &index, &arrays);
    float *noise = draw_noise();
    if (!noise || !pages_take(&layer->rows, sqz_arena_bytes(&rows), options->huge_pages) ||
        !pages_take(&layer->index, sqz_arena_bytes(&index), options->huge_pages)) {
        free(noise);
        bench_layer_free(layer);
        return false;
    }
    rows = sqz_arena_on(layer->rows.data);
    index = sqz_arena_on(layer->index.data);
    carve(options, &rows, &index, &arrays);
    describe(layer, &arrays);
    fill(layer, &arrays, noise);
    free(noise);
    if (layer->layer.codes.n_words && !signal_caught()) make_codes(layer, arrays.queries);
    return !signal_caught();
}

void bench_layer_free(struct bench_layer *layer)
{
    pages_give_back(&layer->rows);
    pages_give_back(&layer->index);
}

/* ---- Views --------------------------------------------------------------------------- */

struct sqz_layer bench_layer_view(const struct bench_layer *layer, struct bench_format format)
{
    struct sqz_layer view = layer->layer;
    view.n_levels = format.n_levels;
    if (format.keys == SQZ_INDEX_INT8) view.keys = layer->small_keys;
    for (uint32_t l = 0; l < BENCH_LEVELS; l++)
        if (l >= format.n_levels) memset(&view.level[l], 0, sizeof view.level[l]);
        else if (format.centroids == SQZ_INDEX_INT8) view.level[l].centroids = layer->small_centroids[l];
    return view;
}

void bench_layer_queries(const struct bench_layer *layer, float *queries, size_t n_tokens)
{
    const int n_threads = layer->options.n_threads;
    (void)n_threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
    for (uint32_t h = 0; h < layer->layer.shape.n_head_kv; h++) make_queries(&layer->layer, queries, n_tokens, h);
}
