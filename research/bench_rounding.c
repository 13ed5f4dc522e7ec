/*
 * What keys and values lose by 4 and by 8 bits a number, rounded as the library does and as it is published, on the rows and
 * the queries of a prepared context: the squared error of attention's output over all rows, as a share of its square, keys and
 * values by themselves. Sinks and window stay as they are, as they do in the library.
 *
 * As published (KIVI, arXiv 2402.02750, and QuantSpec, arXiv 2502.10424) keys are rounded by channel, in groups of rows that
 * follow one another, values by token; each group has its smallest number and a step, both F16. Groups of 2 D rows take
 * as many bytes as the library's one F16 step a row.
 */
#include "bench_rounding.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "context_file.h"
#include "inputs.h"
#include "json_output.h"
#include "kernels.h"
#include "layer.h"
#include "machine.h"
#include "options.h"
#include "rows.h"

static const struct command_help help = {
    "bench rounding", "",
    "Measures what keys and values of a context lose by 4 and by 8 bits a number: as prepare --rows rounds them, and "
    "as "
    "published, keys by channel and values by token, with the queries that the context keeps.",
    "  squeeze bench rounding -c book.sqz.gguf\n"
    "  squeeze bench rounding -c book.sqz.gguf --queries 32 --json\n",
    NULL};

enum way { KEYS_OURS, KEYS_BY_MEAN, KEYS_BY_CHANNEL, KEYS_BY_CHANNEL_SORTED, VALUES_OURS, VALUES_BY_TOKEN, N_WAYS };
enum { N_BITS = 2, MAX_DIM = 256 };
static const int bits_of[N_BITS] = {4, 8};
static const char *const way_names[N_WAYS] = {
    "keys less their centroid, turned",   "keys less their mean, turned",   "keys by channel, as they come",
    "keys by channel, sorted by cluster", "values less their mean, turned", "values by token",
};
static const char *const way_keys[N_WAYS] = {"keys_centroid_turned", "keys_mean_turned",   "keys_channel",
                                             "keys_channel_sorted",  "values_mean_turned", "values_token"};

struct rounding_bench {
    const char *context_path;
    size_t n_queries, n_threads;
    bool json;
    struct sqz_context *context;
    double error[N_WAYS][N_BITS], bits[N_WAYS][N_BITS]; /* sums over heads of errors' shares; bits a number */
    size_t n_heads;
};

/* One KV head. */
struct head {
    const struct sqz_layer *layer;
    uint32_t number;
    size_t n, d, group, n_queries;
    float *keys, *values, *queries, *rounded; /* [n][d], [n][d], [n_queries * group][d], [n][d] */
    double *exact;                            /* [n_queries * group][d] */
    uint32_t *order;                          /* clustered rows by their position */
    void *planes;                             /* of one of both */
};

/* ---- Ways to round ------------------------------------------------------------------------- */

static float as_half(float x)
{
    uint16_t half;
    sqz_kernels_get()->f32_to_f16(&half, &x, 1);
    sqz_kernels_get()->f16_to_f32(&x, &half, 1);
    return x;
}

/* n numbers, `stride` apart from that of each listed row. */
static void round_group(float *out, const float *in, const uint32_t *rows, size_t n, size_t d, size_t channel, int bits)
{
    float low = FLT_MAX, high = -FLT_MAX;
    for (size_t i = 0; i < n; i++) {
        low = fminf(low, in[rows[i] * d + channel]);
        high = fmaxf(high, in[rows[i] * d + channel]);
    }
    const float most = (float)((1 << bits) - 1), zero = as_half(low), step = as_half((high - low) / most);
    for (size_t i = 0; i < n; i++) {
        const float x = step > 0 ? rintf((in[rows[i] * d + channel] - zero) / step) : 0;
        out[rows[i] * d + channel] = zero + step * fmaxf(0, fminf(x, most));
    }
}

static void by_channel(const struct head *h, bool sorted, int bits)
{
    const size_t fixed = h->layer->n_fixed, group = 2 * h->d;
    uint32_t rows[2 * MAX_DIM];
    for (size_t first = fixed; first < h->n; first += group) {
        const size_t n = h->n - first < group ? h->n - first : group;
        for (size_t i = 0; i < n; i++) rows[i] = sorted ? (uint32_t)(first + i) : h->order[first - fixed + i];
        for (size_t c = 0; c < h->d; c++) round_group(h->rounded, h->keys, rows, n, h->d, c, bits);
    }
}

static void by_token(const struct head *h, int bits)
{
    for (size_t r = h->layer->n_fixed; r < h->n; r++) {
        const float *in = h->values + r * h->d;
        float *out = h->rounded + r * h->d, low = in[0], high = in[0];
        for (size_t i = 1; i < h->d; i++) low = fminf(low, in[i]), high = fmaxf(high, in[i]);
        const float most = (float)((1 << bits) - 1), zero = as_half(low), step = as_half((high - low) / most);
        for (size_t i = 0; i < h->d; i++)
            out[i] = zero + step * (step > 0 ? fmaxf(0, fminf(rintf((in[i] - zero) / step), most)) : 0);
    }
}

/* As the library keeps them. centres: those of keys; else they are less their mean. */
static void as_planes(const struct head *h, const float *in, bool centres, int bits)
{
    const size_t fixed = h->layer->n_fixed, n = h->n - fixed, bytes = sqz_plane_bytes(h->d);
    const struct sqz_level *level = &h->layer->level[0];
    float mean[MAX_DIM] = {0};
    char *at = h->planes;
    struct sqz_rows rows = {.type = bits == 4 ? SQZ_ROW_I4 : SQZ_ROW_I44, .data = at, .mean = centres ? NULL : mean};
    rows.planes.lower = bits == 4 ? NULL : (const uint8_t *)(at += n * bytes);
    rows.planes.whole = (const uint16_t *)(const void *)(at += n * bytes);
    rows.planes.step = (const uint16_t *)(const void *)(at += fixed * h->d * sizeof(uint16_t));
    rows.planes.n_whole = (uint32_t)fixed;
    if (centres) {
        const struct sqz_rows c = sqz_rows_of_head(&level->centroids, level->n_clusters, h->d, h->number);
        rows.planes.centres = (struct sqz_centres){.type = c.type,
                                                   .data = c.data,
                                                   .scale = c.scale,
                                                   .mean = c.mean,
                                                   .offset = level->offset + h->number * (level->n_clusters + 1),
                                                   .n = level->n_clusters};
    }
    for (size_t r = fixed; r < h->n; r++)
        for (size_t i = 0; i < h->d; i++) mean[i] += in[r * h->d + i] / (float)n;
    for (size_t r = 0; r < h->n; r++) sqz_rows_store(&rows, r, in + r * h->d, h->d);
    sqz_rows_to_f32(h->rounded, &rows, 0, h->n, h->d);
}

/* Leaves the rounded rows in h->rounded; those of sinks and window as they are. */
static void round_rows(const struct head *h, enum way way, int bits)
{
    const float *in = way < VALUES_OURS ? h->keys : h->values;
    memcpy(h->rounded, in, h->n * h->d * sizeof *in);
    switch (way) {
    case KEYS_OURS: as_planes(h, in, true, bits); break;
    case KEYS_BY_MEAN:
    case VALUES_OURS: as_planes(h, in, false, bits); break;
    case KEYS_BY_CHANNEL: by_channel(h, false, bits); break;
    case KEYS_BY_CHANNEL_SORTED: by_channel(h, true, bits); break;
    case VALUES_BY_TOKEN: by_token(h, bits); break;
    case N_WAYS: break;
    }
}

/* Bits a number, with what its group or row has beside it. */
static double bits_a_number(enum way way, int bits, size_t d)
{
    const double beside = way == KEYS_BY_CHANNEL || way == KEYS_BY_CHANNEL_SORTED ? 32.0 / (2.0 * (double)d)
                          : way == VALUES_BY_TOKEN                                ? 32.0 / (double)d
                                                                                  : 16.0 / (double)d;
    return bits + beside;
}

/* ---- Attention ---------------------------------------------------------------------------- */

/* out [n_queries * group][d] */
static void attend(const struct head *h, const float *keys, const float *values, double *out, double *weights)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    for (size_t q = 0; q < h->n_queries * h->group; q++) {
        double most = -INFINITY, sum = 0, *to = out + q * h->d;
        for (size_t r = 0; r < h->n; r++) {
            weights[r] = (double)(h->layer->shape.scale * k->dot(h->queries + q * h->d, keys + r * h->d, h->d));
            most = fmax(most, weights[r]);
        }
        for (size_t i = 0; i < h->d; i++) to[i] = 0;
        for (size_t r = 0; r < h->n; r++) {
            const double w = exp(weights[r] - most);
            sum += w;
            for (size_t i = 0; i < h->d; i++) to[i] += w * (double)values[r * h->d + i];
        }
        for (size_t i = 0; i < h->d; i++) to[i] /= sum;
    }
}

static double share_lost(const struct head *h, const double *out)
{
    double error = 0, size = 0;
    for (size_t i = 0; i < h->n_queries * h->group * h->d; i++) {
        error += (out[i] - h->exact[i]) * (out[i] - h->exact[i]);
        size += h->exact[i] * h->exact[i];
    }
    return size > 0 ? error / size : 0;
}

/* ---- Heads ---------------------------------------------------------------------------------- */

static const struct sqz_layer *sorted_layer; /* that qsort's comparison looks at; of this thread's head */
static uint32_t sorted_head;
#pragma omp threadprivate(sorted_layer, sorted_head)

static int by_position(const void *a, const void *b)
{
    const int32_t *position = sorted_layer->position + (size_t)sorted_head * sorted_layer->n_rows;
    const int32_t x = position[*(const uint32_t *)a], y = position[*(const uint32_t *)b];
    return (x > y) - (x < y);
}

static void *take(size_t n, size_t size)
{
    void *memory = calloc(n ? n : 1, size);
    if (!memory) die("out of memory for a head's rows");
    return memory;
}

static void measure_head(struct rounding_bench *b, const struct sqz_layer *l, uint32_t number)
{
    const size_t d = l->shape.head_dim, n = l->n_rows, group = l->shape.n_head / l->shape.n_head_kv;
    const size_t n_queries = l->n_queries < b->n_queries ? l->n_queries : b->n_queries, fixed = l->n_fixed;
    struct head h = {.layer = l, .number = number, .n = n, .d = d, .group = group, .n_queries = n_queries};
    double *out = take(n_queries * group * d, sizeof *out), *weights = take(n, sizeof *weights);
    const struct sqz_rows keys = sqz_rows_of_head(&l->keys, n, d, number);
    const struct sqz_rows values = sqz_rows_of_head(&l->values, n, d, number);
    h.keys = take(n * d, sizeof *h.keys);
    h.values = take(n * d, sizeof *h.values);
    h.rounded = take(n * d, sizeof *h.rounded);
    h.queries = take(n_queries * group * d, sizeof *h.queries);
    h.exact = take(n_queries * group * d, sizeof *h.exact);
    h.order = take(n - fixed, sizeof *h.order);
    h.planes = take(n * (2 * sqz_plane_bytes(d) + (d + 1) * sizeof(uint16_t)), 1);
    sqz_rows_to_f32(h.keys, &keys, 0, n, d);
    sqz_rows_to_f32(h.values, &values, 0, n, d);
    for (size_t q = 0; q < n_queries; q++) /* spread over those that are kept */
        sqz_kernels_get()->f16_to_f32(
            h.queries + q * group * d,
            l->queries + (q * l->n_queries / n_queries * l->shape.n_head + number * group) * d, group * d);
    for (size_t i = 0; i < n - fixed; i++) h.order[i] = (uint32_t)(fixed + i);
    sorted_layer = l;
    sorted_head = number;
    qsort(h.order, n - fixed, sizeof *h.order, by_position);
    attend(&h, h.keys, h.values, h.exact, weights);
    for (int way = 0; way < N_WAYS && !signal_caught(); way++)
        for (int i = 0; i < N_BITS; i++) {
            round_rows(&h, (enum way)way, bits_of[i]);
            attend(&h, way < VALUES_OURS ? h.rounded : h.keys, way < VALUES_OURS ? h.values : h.rounded, out, weights);
            const double lost = share_lost(&h, out);
#pragma omp critical(bench_rounding)
            {
                b->error[way][i] += lost;
                b->bits[way][i] += bits_a_number((enum way)way, bits_of[i], d);
            }
        }
#pragma omp atomic
    b->n_heads++;
    free(out);
    free(weights);
    free(h.keys);
    free(h.values);
    free(h.rounded);
    free(h.queries);
    free(h.exact);
    free(h.order);
    free(h.planes);
}

static void measure(struct rounding_bench *b)
{
    struct sqz_context_info info;
    const int n_threads = (int)b->n_threads;
    (void)n_threads;
    sqz_context_get_info(b->context, &info);
    if (info.rounded_keys)
        die("%s: its keys and values are rounded already; prepare the document without --rows and --keys",
            b->context_path);
    for (uint32_t i = 0; i < info.n_layer; i++) {
        const struct sqz_layer *l = sqz_context_layer(b->context, i);
        if (l->n_levels == 0 || l->n_queries == 0) continue;
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
        for (uint32_t head = 0; head < l->shape.n_head_kv; head++)
            if (!signal_caught()) measure_head(b, l, head);
    }
    if (b->n_heads == 0 && !signal_caught()) die("%s: no layer has clusters and queries", b->context_path);
}

static int print_results(const struct rounding_bench *b)
{
    json_t *root = json_object(), *ways = json_array();
    if (!b->json)
        printf("%zu heads, squared error of attention's output as a share of its square\n%-36s%8s%12s%8s%12s\n",
               b->n_heads, "", "bits", "error", "bits", "error");
    for (int way = 0; way < N_WAYS; way++) {
        const double n = (double)b->n_heads;
        if (!b->json)
            printf("%-36s%8.3f%12.3g%8.3f%12.3g\n", way_names[way], b->bits[way][0] / n, b->error[way][0] / n,
                   b->bits[way][1] / n, b->error[way][1] / n);
        for (int i = 0; i < N_BITS; i++) {
            json_t *row = json_object();
            json_object_set_new(row, "way", json_string(way_keys[way]));
            json_object_set_new(row, "bits", json_count((uint64_t)bits_of[i]));
            json_object_set_new(row, "bits_a_number", json_number(b->bits[way][i] / n));
            json_object_set_new(row, "error", json_number(b->error[way][i] / n));
            json_array_append_new(ways, row);
        }
    }
    json_object_set_new(root, "heads", json_count(b->n_heads));
    json_object_set_new(root, "rows", ways);
    if (b->json) {
        add_origin_json(root, (int)b->n_threads);
        return print_json(root);
    }
    json_decref(root);
    return close_stdout();
}

int bench_rounding(int argc, char **argv)
{
    struct rounding_bench b = {.n_queries = 16, .n_threads = measured_threads(0)};
    /* clang-format off */
    const struct option options[] = {
        {.kind = OPTION_TEXT, .letter = 'c', .name = "context", .argument = "FILE", .value = &b.context_path,
         .help = "prepared context with F16 keys and values"},
        {.kind = OPTION_COUNT, .name = "queries", .argument = "N", .value = &b.n_queries, .low = 1, .high = 4096,
         .example = "16", .help = "tokens whose queries are taken, of those that the context keeps (16)"},
        THREADS_OPTION(b.n_threads),
        JSON_OPTION(b.json),
        {.kind = OPTION_END},
    };
    /* clang-format on */
    options_parse(&help, options, argc, argv, 0, 0);
    if (!b.context_path) usage_error("no context; usage: squeeze bench rounding -c CONTEXT");
    catch_signals();
    b.context = open_context(b.context_path, NULL);
    if (sqz_context_n_shards(b.context)) die("%s: a context in shards; give one of one file", b.context_path);
    measure(&b);
    sqz_context_free(b.context);
    if (signal_caught()) {
        warn("interrupted");
        return 128 + signal_caught();
    }
    return print_results(&b);
}
