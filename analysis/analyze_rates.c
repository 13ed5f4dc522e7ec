/*
 * Rates of attention, analyze_rates.h. Time of a layer is taken to be
 *
 *   dense      a + b bytes of keys and values
 *   squeezed   c + d bytes of centroids + e keys estimated by codes + f bytes of retained rows
 *              + g bytes of value centroids
 *
 * and all of a to g are fitted to layers of two lengths at several budgets: a budget changes what is retained and
 * opened, a length what is compared. Centroids and codes grow with the length alike, so layers with codes are
 * measured beside the same layers without them, which share d and g and have c and f of their own.
 *
 * Before every point the caches are filled with something else, as weights do between two layers of a model. The
 * arrays lie in mapped files, as a context's do: a file system may keep a file in larger pages than malloc() gives,
 * which reads 8,192 keys and values of 3 heads in 0.38 ms in place of 0.52 (one Zen 4 core, ext4, Linux 6.18).
 */
#define _POSIX_C_SOURCE 200809L /* mkstemp */

#include "analyze_rates.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "attention.h"
#include "codes.h"
#include "common.h"
#include "inputs.h"
#include "kernels.h"
#include "layer.h"
#include "least_squares.h"
#include "lookup.h"
#include "machine.h"
#include "memory.h"
#include "times.h"

enum {
    N_LENGTHS = 2,
    LENGTH_RATIO = 4,
    ROWS_MAX = 8192,
    ROWS_MIN = 512,
    N_QUERIES = 64,
    KEYS_A_CENTRE = 20,
    N_LAYERS = 4,               /* of a point: heads differ in what they open and retain */
    N_KEPT = 2 * N_LENGTHS + 1, /* kinds and lengths of layers */
    FILES_MAX = 6 + 3 * SQZ_MAX_LEVELS,
};
static const double layer_bytes_max = 32e6;
/* Keys in (-1, 1) around their centres, so far; queries so large: a budget then opens and retains about what it does in
 * text (0.12, 0.2 and 0.35 read the codes of 39, 56 and 76% of 8,192 keys; SmolLM2-135M 37, 51 and 71% of 7,900), and
 * threads that look heads up and read rows share the work alike. */
static const double key_spread = 0.4, query_size = 8;
static const double budgets[] = {0.06, 0.12, 0.2, 0.35};
/* Where sinks, window and tables alone take more than a budget, it is not kept to, and the point is left out. */
static const double kept_to = 0.3;

/* With a context's own options; the same without codes; without a lookup. */
enum kind { KIND_CODES, KIND_CLUSTERS, KIND_DENSE, N_KINDS };

enum { N_BUDGETS = sizeof budgets / sizeof *budgets, POINTS_MAX = 2 * N_LENGTHS * N_BUDGETS + N_LENGTHS + 1 };

/* A layer whose large arrays are in files. */
struct probe_layer {
    struct sqz_layer *made; /* NULL: there is none of the kind */
    struct sqz_layer layer;
    struct {
        void *map;
        size_t n_bytes;
    } files[FILES_MAX];
    size_t n_files;
};

struct point {
    enum kind kind;
    const struct probe_layer *layers; /* [N_LAYERS] */
    float budget;
    double share;                                           /* read of the keys and values */
    double lookup_bytes, coded_keys, row_bytes, tail_bytes; /* of all layers */
    struct times times;
};

struct rate_probe {
    int n_threads;
    size_t width;                                /* floats of a query token */
    struct probe_layer layers[N_KEPT][N_LAYERS]; /* see kept(); the last ones are of SHORT_TOKENS */
    struct point points[POINTS_MAX];
    size_t n_points;
    float *queries, *out; /* [N_QUERIES][width], [RATE_PROBE_TOKENS][width] */
    struct memory_probe memory;
    struct {
        size_t n_tokens;
        struct times times[N_LENGTHS];
    } runs[RATE_PROBE_SIZES];
    size_t n_runs;
    bool in_shards; /* attention as of shards, behind so many bytes of something else: */
    size_t layer_weights;
    float *elsewhere, *total; /* [n_head] of a layer that is the whole context; what it adds up */
    void *workspace;
};

/* ---- Layers ---------------------------------------------------------------------------- */

static double random_number(uint64_t *state) /* (-1, 1), splitmix64 */
{
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return (double)(int64_t)(z ^ z >> 31) * 0x1p-63;
}

/* A copy of an array in a mapped file that has no name; NULL of NULL. */
static const void *map_copy(struct probe_layer *l, const void *array, size_t n_bytes)
{
    char name[4096];
    size_t done = 0;
    if (!array || n_bytes == 0) return array;
    snprintf(name, sizeof name, "%s/squeeze-analyze-XXXXXX", temporary_parent());
    const int file = mkstemp(name);
    if (file < 0) die("%s: %s", name, strerror(errno));
    unlink(name);
    while (done < n_bytes) {
        const ssize_t n = write(file, (const char *)array + done, n_bytes - done);
        if (n < 0 && errno != EINTR) die("%s: %s", name, strerror(errno));
        done += n > 0 ? (size_t)n : 0;
    }
    void *map = mmap(NULL, n_bytes, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (map == MAP_FAILED) die("%s: %s", name, strerror(errno));
    l->files[l->n_files].map = map;
    l->files[l->n_files++].n_bytes = n_bytes;
    return map;
}

/* The numbers of n rows a head. */
static void map_rows(struct probe_layer *l, struct sqz_rows *rows, size_t n)
{
    const size_t rounded = l->made->shape.n_head_kv * (n - rows->planes.n_whole);
    const size_t bytes = rounded * sqz_row_data_bytes(rows->type, l->made->shape.head_dim);
    rows->data = map_copy(l, rows->data, bytes);
    rows->planes.lower = map_copy(l, rows->planes.lower, bytes);
}

static void map_arrays(struct probe_layer *l)
{
    struct sqz_layer *layer = &l->layer;
    *layer = *l->made;
    const size_t heads = layer->shape.n_head_kv, rows = layer->n_rows;
    const size_t words = heads * layer->codes.n_words * (layer->n_rows - layer->n_fixed);
    map_rows(l, &layer->keys, rows);
    map_rows(l, &layer->values, rows);
    map_rows(l, &layer->retained_keys, rows);
    layer->codes.words = map_copy(l, layer->codes.words, words * sizeof *layer->codes.words);
    for (uint32_t i = 0; i < layer->n_levels; i++) {
        struct sqz_level *level = &layer->level[i];
        map_rows(l, &level->centroids, level->n_clusters);
        map_rows(l, &level->value_centroids, level->n_clusters);
    }
    sqz_layer_join_planes(layer);
}

static size_t longest(const struct sqz_model_shape *s)
{
    const double rows = layer_bytes_max / (4.0 * s->n_head_kv * s->head_dim);
    return (size_t)fmax(ROWS_MIN, fmin(ROWS_MAX, rows));
}

/* The layers of KIND_CODES or KIND_CLUSTERS, the shorter or the longer ones. */
static struct probe_layer *kept(struct rate_probe *p, enum kind kind, int length)
{
    return p->layers[kind * N_LENGTHS + length];
}

/* What all layers are made from. */
struct material {
    struct sqz_layer_shape shape;
    const struct sqz_squeeze_options *options;
    uint64_t random;
    size_t most;    /* rows */
    uint16_t *rows; /* keys, then values */
    float *centres, *row;
};

/* n rows of all heads: around centres, or around 0 where there are none. [n_centres][D] are drawn for each head. */
static void draw_array(struct material *m, uint16_t *rows, size_t n, size_t n_centres)
{
    const size_t d = m->shape.head_dim;
    for (size_t h = 0; h < m->shape.n_head_kv; h++) {
        for (size_t i = 0; i < n_centres * d; i++) m->centres[i] = (float)random_number(&m->random);
        for (size_t r = 0; r < n; r++) {
            const size_t centre = (size_t)(fabs(random_number(&m->random)) * (double)n_centres);
            for (size_t i = 0; i < d; i++) {
                const double mean = n_centres ? (double)m->centres[centre * d + i] : 0;
                m->row[i] = (float)(mean + key_spread * random_number(&m->random));
            }
            sqz_kernels_get()->f32_to_f16(rows + (h * n + r) * d, m->row, d);
        }
    }
}

static void draw_rows(struct material *m, size_t n)
{
    draw_array(m, m->rows, n, n / KEYS_A_CENTRE);
    draw_array(m, m->rows + n * m->shape.n_head_kv * m->shape.head_dim, n, 0);
}

static void make_layer(struct rate_probe *p, struct probe_layer *layer, const struct material *m, size_t n,
                       uint32_t n_levels, uint32_t code_words)
{
    struct sqz_error error;
    struct sqz_squeeze_options options = *m->options;
    const size_t n_queries = n < N_QUERIES ? n : N_QUERIES;
    options.n_levels = n_levels;
    options.code_words = code_words;
    stop_on(sqz_layer_create(&layer->made, &m->shape, m->rows, m->rows + n * m->shape.n_head_kv * m->shape.head_dim, n,
                             p->queries, n_queries, &options, p->n_threads, &error),
            &error);
    map_arrays(layer);
}

static void make_layers(struct rate_probe *p, struct material *m)
{
    const uint32_t n_levels = m->options->n_levels, code_words = m->options->code_words;
    for (size_t l = 0; l < N_LAYERS; l++) {
        for (int length = 0; length < N_LENGTHS; length++) {
            const size_t n = length ? m->most : m->most / LENGTH_RATIO;
            draw_rows(m, n);
            make_layer(p, &kept(p, KIND_CLUSTERS, length)[l], m, n, n_levels, 0);
            if (code_words) make_layer(p, &kept(p, KIND_CODES, length)[l], m, n, n_levels, code_words);
        }
        make_layer(p, &p->layers[N_KEPT - 1][l], m, SHORT_TOKENS, 0, 0);
    }
}

/* ---- Points ------------------------------------------------------------------------------ */

/* The layers of a point as shards of one layer: each one's part of the denominator, then what each chooses by the sum, which
 * here is its own, so that it chooses what it would by itself. */
static void attend_to_shards(const struct rate_probe *p, const struct point *point)
{
    const size_t d = point->layers[0].layer.shape.head_dim;
    struct sqz_attend_call calls[N_LAYERS];
    for (size_t l = 0; l < N_LAYERS; l++) {
        const struct sqz_layer *layer = &point->layers[l].layer;
        calls[l] = (struct sqz_attend_call){.layer = layer,
                                            .queries = p->queries + l * p->width,
                                            .out = p->out,
                                            .query_token_stride = p->width,
                                            .query_head_stride = d,
                                            .out_token_stride = p->width,
                                            .out_head_stride = d,
                                            .n_tokens = 1,
                                            .n_context_tokens = layer->n_rows,
                                            .elsewhere = p->elsewhere,
                                            .budget = point->budget,
                                            .block_tokens = 1,
                                            .n_threads = p->n_threads,
                                            .workspace = p->workspace};
        sqz_attend_totals(
            &(struct sqz_attend_batch){&calls[l], 1, p->n_threads, sqz_attend_thread_bytes(layer, 0, 1), p->workspace},
            &(float *const){p->total});
    }
    for (size_t l = 0; l < N_LAYERS; l++) sqz_attend(&calls[l]);
}

static struct sqz_attention_stats run(const struct rate_probe *p, const struct point *point)
{
    struct sqz_error error;
    struct sqz_attention_stats stats = {0};
    for (size_t l = 0; l < N_LAYERS; l++) {
        stop_on(sqz_layer_attend(&point->layers[l].layer, p->queries + l * p->width, 1, point->budget, p->out, NULL,
                                 p->n_threads, &stats, &error),
                &error);
    }
    return stats;
}

/* What a point reads. Levels above the finest read as many centroids as they open: those and value centroids cannot be
 * told apart and all count as looked up. */
static void count(const struct rate_probe *p, struct point *point)
{
    const struct sqz_layer *layer = &point->layers[0].layer;
    const struct sqz_attention_stats stats = run(p, point);
    const double codes = (double)stats.coded_keys * (double)sqz_code_key_bytes(&layer->codes) +
                         (point->kind == KIND_CODES ? (double)(stats.n_selections * sqz_code_head_bytes(layer)) : 0);
    const double beside = (double)stats.centroid_bytes - codes;
    const double once = (double)stats.n_selections * layer->level[0].n_clusters * (double)sqz_centroid_bytes(layer);
    point->coded_keys = (double)stats.coded_keys;
    point->lookup_bytes = point->kind == KIND_DENSE ? 0 : layer->n_levels == 1 ? once : beside;
    point->row_bytes = (double)stats.key_bytes + (double)stats.value_bytes;
    point->tail_bytes = beside - point->lookup_bytes;
    point->share = sqz_attention_stats_share(&stats);
}

static void add_point(struct rate_probe *p, enum kind kind, const struct probe_layer *layers, double budget)
{
    struct point *point = &p->points[p->n_points];
    *point = (struct point){.kind = kind, .layers = layers, .budget = (float)budget};
    count(p, point);
    p->n_points += fabs(point->share / budget - 1) < kept_to || budget >= budgets[N_BUDGETS - 1];
}

static void add_points(struct rate_probe *p)
{
    add_point(p, KIND_DENSE, p->layers[N_KEPT - 1], 1.0);
    for (int length = 0; length < N_LENGTHS; length++) {
        add_point(p, KIND_DENSE, kept(p, KIND_CLUSTERS, length), 1.0);
        for (enum kind kind = KIND_CODES; kind <= KIND_CLUSTERS; kind++)
            for (int b = 0; b < N_BUDGETS && kept(p, kind, length)->made; b++)
                add_point(p, kind, kept(p, kind, length), budgets[b]);
    }
}

struct rate_probe *rate_probe_open(const struct sqz_model_shape *shape, const struct sqz_squeeze_options *options,
                                   int n_threads)
{
    struct rate_probe *p = allocate(1, sizeof *p);
    const float scale = (float)(1 / sqrt((double)shape->head_dim));
    struct material m = {.shape = {shape->n_head, shape->n_head_kv, shape->head_dim, scale},
                         .options = options,
                         .random = 1,
                         .most = longest(shape)};
    const size_t width = (size_t)shape->n_head * shape->head_dim;
    if (!memory_probe_open(&p->memory, n_threads)) die("out of memory");
    p->n_threads = n_threads;
    p->width = width;
    p->queries = allocate(N_QUERIES * width, sizeof *p->queries);
    p->out = allocate(RATE_PROBE_TOKENS * width, sizeof *p->out);
    m.rows = allocate(2 * m.most * shape->n_head_kv * shape->head_dim, sizeof *m.rows);
    m.centres = allocate(m.most / KEYS_A_CENTRE * shape->head_dim, sizeof *m.centres);
    m.row = allocate(shape->head_dim, sizeof *m.row);
    for (size_t i = 0; i < N_QUERIES * width; i++) p->queries[i] = (float)(query_size * random_number(&m.random));
    make_layers(p, &m);
    free(m.rows);
    free(m.centres);
    free(m.row);
    add_points(p);
    return p;
}

void rate_probe_in_shards(struct rate_probe *p, size_t layer_weights)
{
    size_t bytes = 0;
    for (size_t i = 0; i < N_KEPT; i++) {
        const struct sqz_layer *layer = &p->layers[i][0].layer;
        if (!p->layers[i][0].made) continue;
        const size_t together = sqz_attend_batch_workspace_bytes(sqz_attend_thread_bytes(layer, 0, 1), 1, p->n_threads);
        const size_t one = sqz_attend_workspace_bytes(layer, 0, 1, p->n_threads);
        if (one > bytes) bytes = one;
        if (together > bytes) bytes = together;
    }
    const uint32_t n_head = p->layers[N_KEPT - 1][0].layer.shape.n_head;
    p->workspace = allocate(bytes, 1);
    p->elsewhere = allocate(n_head, sizeof *p->elsewhere);
    p->total = allocate(n_head, sizeof *p->total);
    for (uint32_t h = 0; h < n_head; h++) p->elsewhere[h] = -INFINITY;
    p->layer_weights = layer_weights;
    p->in_shards = true;
}

void rate_probe_close(struct rate_probe *p)
{
    if (!p) return;
    for (size_t i = 0; i < N_KEPT * N_LAYERS; i++) {
        struct probe_layer *l = &p->layers[i / N_LAYERS][i % N_LAYERS];
        for (size_t f = 0; f < l->n_files; f++) munmap(l->files[f].map, l->files[f].n_bytes);
        sqz_layer_free(l->made);
    }
    memory_probe_close(&p->memory);
    free(p->workspace);
    free(p->elsewhere);
    free(p->total);
    free(p->queries);
    free(p->out);
    free(p);
}

void rate_probe_add_run(struct rate_probe *p, size_t n_tokens)
{
    if (p->n_runs < RATE_PROBE_SIZES) p->runs[p->n_runs++].n_tokens = n_tokens;
}

static void measure_run(struct rate_probe *p, size_t n_tokens, int length, struct times *times)
{
    struct sqz_error error;
    memory_probe_read(&p->memory);
    const double since = now_seconds();
    for (size_t l = 0; l < N_LAYERS; l++)
        stop_on(sqz_layer_attend(&kept(p, KIND_CLUSTERS, length)[l].layer, p->queries + l * p->width, n_tokens, 1.0f,
                                 p->out, NULL, p->n_threads, NULL, &error),
                &error);
    times_add(times, now_seconds() - since);
}

double rate_probe_run_byte(const struct rate_probe *p, size_t n_tokens)
{
    const struct sqz_layer_shape *shape = &p->layers[N_KEPT - 1][0].layer.shape;
    const double row = 4.0 * shape->n_head_kv * shape->head_dim;
    const double rows = (double)p->layers[KIND_CLUSTERS * N_LENGTHS + 1][0].layer.n_rows -
                        (double)p->layers[KIND_CLUSTERS * N_LENGTHS][0].layer.n_rows;
    for (size_t i = 0; i < p->n_runs; i++)
        if (p->runs[i].n_tokens == n_tokens)
            return (times_median(&p->runs[i].times[1]) - times_median(&p->runs[i].times[0])) / (N_LAYERS * rows * row);
    return NAN;
}

void rate_probe_measure(struct rate_probe *p)
{
    for (size_t i = 0; i < p->n_runs; i++)
        for (int length = 0; length < N_LENGTHS; length++)
            measure_run(p, p->runs[i].n_tokens, length, &p->runs[i].times[length]);
    for (size_t i = 0; i < p->n_points; i++) {
        if (p->in_shards) memory_probe_read_some(&p->memory, p->layer_weights);
        else memory_probe_read(&p->memory);
        const double since = now_seconds();
        if (p->in_shards) attend_to_shards(p, &p->points[i]);
        else run(p, &p->points[i]);
        times_add(&p->points[i].times, now_seconds() - since);
    }
}

/* ---- The fit ------------------------------------------------------------------------------- */

enum term {
    TERM_DENSE_LAYER,
    TERM_DENSE_BYTE,
    TERM_LAYER,
    TERM_LOOKUP,
    TERM_CODES,
    TERM_ROWS,
    TERM_TAIL,
    TERM_OTHER_LAYER,
    TERM_OTHER_ROWS, /* of the kind that the context is not */
    N_TERMS
};

static void fill_terms(double terms[N_TERMS], const struct point *point, bool own)
{
    for (int t = 0; t < N_TERMS; t++) terms[t] = 0;
    if (point->kind == KIND_DENSE) {
        terms[TERM_DENSE_LAYER] = N_LAYERS;
        terms[TERM_DENSE_BYTE] = point->row_bytes;
        return;
    }
    terms[own ? TERM_LAYER : TERM_OTHER_LAYER] = N_LAYERS;
    terms[own ? TERM_ROWS : TERM_OTHER_ROWS] = point->row_bytes;
    terms[TERM_LOOKUP] = point->lookup_bytes;
    terms[TERM_CODES] = point->coded_keys;
    terms[TERM_TAIL] = point->tail_bytes;
}

struct attention_rates rate_probe_fit(const struct rate_probe *p)
{
    double a[POINTS_MAX][N_TERMS], b[POINTS_MAX], x[N_TERMS], misfit = 0;
    const enum kind own = p->layers[KIND_CODES * N_LENGTHS][0].made ? KIND_CODES : KIND_CLUSTERS;
    for (size_t i = 0; i < p->n_points; i++) {
        /* Relative errors count. */
        const double seconds = times_median(&p->points[i].times);
        fill_terms(a[i], &p->points[i], p->points[i].kind == own);
        for (int t = 0; t < N_TERMS; t++) a[i][t] /= seconds;
        b[i] = 1;
    }
    least_squares(x, a[0], b, p->n_points, N_TERMS);
    for (size_t i = 0; i < p->n_points; i++) {
        double fitted = 0;
        for (int t = 0; t < N_TERMS; t++) fitted += a[i][t] * x[t];
        misfit += fabs(fitted - 1) / (double)p->n_points;
    }
    const struct sqz_layer_shape *s = &p->layers[N_KEPT - 1][0].layer.shape;
    const double few = x[TERM_DENSE_LAYER] + x[TERM_DENSE_BYTE] * 4 * s->n_head_kv * s->head_dim * SHORT_TOKENS;
    return (struct attention_rates){.dense_layer = x[TERM_DENSE_LAYER],
                                    .dense_byte = x[TERM_DENSE_BYTE],
                                    .layer = x[TERM_LAYER],
                                    .layer_beyond = fmax(0, x[TERM_LAYER] - few),
                                    .lookup_byte = x[TERM_LOOKUP],
                                    .coded_key = x[TERM_CODES],
                                    .row_byte = x[TERM_ROWS],
                                    .misfit = misfit};
}
