/*
 * squeeze bench cluster: the clustering of one head's keys by itself. Keys are
 * read from a file or drawn; they can be written out, as can the result, so
 * that other programs cluster the same numbers and check ours
 * (bench/cluster.py does). The objective is computed anew in double precision
 * before a time is printed.
 */
#include "bench_cluster.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cluster.h"
#include "common.h"
#include "inputs.h"
#include "json_output.h"
#include "kernels.h"
#include "machine.h"
#include "options.h"
#include "outputs.h"
#include "random.h"

static const struct option_rule rules[] = {
    {"groups", "keys", "they are not drawn"},
    {"format", "!keys", "no file is read"},
    {0},
};

static const struct command_help help = {
    "bench cluster", "",
    "Times the clustering of one head's keys, read from a file or drawn. The objective is checked in double precision "
    "before a time is printed.",
    "  squeeze bench cluster\n"
    "  squeeze bench cluster --keys head.f32 --dim 128 --clusters 400 --metric cosine --json\n"
    "  squeeze bench cluster --count 500000 --threads 1 --repeats 3\n",
    rules};

static const char *const format_names[] = {"f32", "f16", NULL};
static const char *const metric_names[] = {"cosine", "euclidean", NULL};

enum { MAX_REPEATS = 64 };

struct cluster_bench {
    const char *keys_path, *keys_out, *assignment_out;
    int format, metric;
    size_t dim, count, n_groups, n_clusters, n_iterations, n_threads, n_repeats, seed;
    bool json;

    float *keys;
    uint32_t *assignment;
    double seconds[MAX_REPEATS];
    double objective; /* of the last repeat */
};

static void *allocate_rows(size_t rows, size_t columns, size_t element)
{
    void *p = columns <= SIZE_MAX / element / (rows ? rows : 1) ? malloc(rows * columns * element) : NULL;
    if (!p) die("out of memory");
    return p;
}

/* ---- Keys ---------------------------------------------------------------------------------- */

static double gauss(struct sqz_random *random)
{
    const double u = sqz_random_unit(random) + 0x1p-54;
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * sqz_random_unit(random));
}

/* A mixture of elongated groups with heavy tails around a common offset, as keys have. */
static void draw_keys(struct cluster_bench *b)
{
    enum { FRAME = 4 }; /* a centre and three axes */
    static const double length[FRAME] = {2.0, 0.7, 0.4, 0.3};
    const size_t dim = b->dim;
    struct sqz_random random;
    b->keys = allocate_rows(b->count, dim, sizeof *b->keys);
    float *frame = allocate_rows(b->n_groups, FRAME * dim, sizeof *frame);
    sqz_random_seed(&random, b->seed);
    for (size_t i = 0; i < b->n_groups * FRAME * dim; i++) frame[i] = (float)gauss(&random);
    for (size_t p = 0; p < b->count; p++) {
        const float *group = frame + sqz_random_below(&random, b->n_groups) * FRAME * dim;
        const double stretch = 1 / sqrt(fabs(gauss(&random)) + 0.2);
        double along[FRAME] = {length[0]};
        for (int a = 1; a < FRAME; a++) along[a] = length[a] * stretch * gauss(&random);
        for (size_t i = 0; i < dim; i++) {
            double v = 0.2 * stretch * gauss(&random) + (i == 3 ? 5 : 0);
            for (int a = 0; a < FRAME; a++) v += along[a] * (double)group[(size_t)a * dim + i];
            b->keys[p * dim + i] = (float)v;
        }
    }
    free(frame);
}

static void read_keys(struct cluster_bench *b)
{
    const size_t element = b->format ? sizeof(uint16_t) : sizeof(float), row = b->dim * element;
    size_t n_bytes;
    char *bytes = read_whole_file(b->keys_path, &n_bytes);
    if (n_bytes == 0 || n_bytes % row != 0) {
        die("%s: %zu bytes are no whole number of keys of %zu bytes (%zu numbers of %s)", b->keys_path, n_bytes, row,
            b->dim, format_names[b->format]);
    }
    const size_t there = n_bytes / row;
    if (b->count > there) die("%s: --count %zu: there are %zu keys", b->keys_path, b->count, there);
    b->count = b->count ? b->count : there;
    b->keys = allocate_rows(b->count, b->dim, sizeof *b->keys);
    if (b->format) sqz_kernels_get()->f16_to_f32(b->keys, (const uint16_t *)(const void *)bytes, b->count * b->dim);
    else memcpy(b->keys, bytes, b->count * row);
    free(bytes);
}

static void write_file(const char *path, const void *data, size_t n_bytes)
{
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(data, 1, n_bytes, file) != n_bytes || fclose(file) != 0) die("%s: %s", path, strerror(errno));
}

/* ---- Check --------------------------------------------------------------------------------- */

/* The objective of the assignment in double precision; dies on a cluster without a key. */
static double objective_of(const struct cluster_bench *b)
{
    const size_t dim = b->dim;
    double *sum = allocate_rows(b->n_clusters, dim, sizeof *sum), total = 0;
    size_t *size = allocate_rows(b->n_clusters, 1, sizeof *size);
    double *key = allocate_rows(dim, 1, sizeof *key);
    memset(sum, 0, b->n_clusters * dim * sizeof *sum);
    memset(size, 0, b->n_clusters * sizeof *size);
    for (int pass = 0; pass < 2; pass++) {
        for (size_t p = 0; p < b->count; p++) {
            const uint32_t c = b->assignment[p];
            double square = 0, distance = 0;
            if (c >= b->n_clusters) die("key %zu is in cluster %u of %zu; nothing was timed", p, c, b->n_clusters);
            for (size_t i = 0; i < dim; i++) {
                key[i] = (double)b->keys[p * dim + i];
                square += key[i] * key[i];
            }
            const double scale = b->metric == SQZ_METRIC_COSINE && square > 0 ? 1 / sqrt(square) : 1;
            for (size_t i = 0; i < dim; i++) {
                key[i] *= scale;
                if (pass == 0) {
                    sum[c * dim + i] += key[i];
                } else {
                    const double difference = key[i] - sum[c * dim + i] / (double)size[c];
                    distance += difference * difference;
                }
            }
            size[c] += pass == 0;
            total += distance;
        }
    }
    for (size_t c = 0; c < b->n_clusters; c++) {
        double square = 0;
        if (size[c] == 0) die("cluster %zu has no key; nothing was timed", c);
        for (size_t i = 0; i < dim; i++) square += sum[c * dim + i] * sum[c * dim + i];
        /* The cosines of a cluster's directions with the direction of their sum add up to its length. */
        total = b->metric == SQZ_METRIC_COSINE ? (c == 0 ? (double)b->count : total) - sqrt(square) : total;
    }
    free(sum);
    free(size);
    free(key);
    return total / (double)b->count;
}

/* ---- Times --------------------------------------------------------------------------------- */

static void run(struct cluster_bench *b)
{
    struct sqz_kmeans_options options = {
        .n_clusters = (uint32_t)b->n_clusters,
        .n_iterations = (uint32_t)b->n_iterations,
        .metric = (enum sqz_metric)b->metric,
        .seed = b->seed,
        .n_threads = (int)b->n_threads,
    };
    const size_t n_bytes = sqz_kmeans_workspace_bytes(b->count, b->dim, &options);
    void *workspace = n_bytes < SIZE_MAX ? malloc(n_bytes) : NULL;
    if (!workspace) die("out of memory");
    b->assignment = allocate_rows(b->count, 1, sizeof *b->assignment);
    /* Once untimed: in preparation the workspace is used again and again, its pages are there. */
    for (size_t i = 0; i <= b->n_repeats; i++) {
        const double since = now_seconds();
        const double value = sqz_kmeans(b->assignment, b->keys, b->count, b->dim, &options, workspace);
        if (i > 0) {
            b->seconds[i - 1] = now_seconds() - since;
            continue;
        }
        b->objective = objective_of(b);
        if (!(fabs(value - b->objective) <= 1e-5 * b->objective + 1e-6))
            die("the library says the objective is %.9g, it is %.9g; nothing was timed", value, b->objective);
        if (signal_caught()) exit(128 + signal_caught());
    }
    free(workspace);
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* What comparing every key with every centroid in every iteration takes, a second. */
static double lloyd_gflops(const struct cluster_bench *b, double seconds)
{
    return 2e-9 * (double)b->count * (double)b->n_clusters * (double)b->dim * (double)b->n_iterations / seconds;
}

static int print_results(struct cluster_bench *b)
{
    qsort(b->seconds, b->n_repeats, sizeof *b->seconds, compare_doubles);
    const double least = b->seconds[0], median = b->seconds[b->n_repeats / 2];
    if (!b->json) {
        printf("%zu keys of %zu numbers into %zu clusters, %s, at most %zu iterations, %zu threads\n"
               "%.1f ms (median %.1f, slowest %.1f), objective %.6g; as all comparisons: %.0f GFLOP/s\n",
               b->count, b->dim, b->n_clusters, metric_names[b->metric], b->n_iterations, b->n_threads, 1e3 * least,
               1e3 * median, 1e3 * b->seconds[b->n_repeats - 1], b->objective, lloyd_gflops(b, least));
        return close_stdout();
    }
    json_t *all = json_array();
    for (size_t i = 0; i < b->n_repeats; i++) json_array_append_new(all, json_number(b->seconds[i]));
    json_t *root = json_object();
    json_object_set_new(root, "op", json_text("cluster"));
    json_object_set_new(root, "data", json_text(b->keys_path ? "file" : "drawn"));
    json_object_set_new(root, "n", json_count(b->count));
    json_object_set_new(root, "d", json_count(b->dim));
    json_object_set_new(root, "k", json_count(b->n_clusters));
    json_object_set_new(root, "metric", json_text(metric_names[b->metric]));
    json_object_set_new(root, "iterations", json_count(b->n_iterations));
    json_object_set_new(root, "seed", json_count(b->seed));
    json_object_set_new(root, "seconds", json_number(least));
    json_object_set_new(root, "seconds_median", json_number(median));
    json_object_set_new(root, "seconds_all", all);
    json_object_set_new(root, "objective", json_number(b->objective));
    json_object_set_new(root, "lloyd_gflop_s", json_number(lloyd_gflops(b, least)));
    json_object_set_new(root, "machine", machine_json((int)b->n_threads));
    json_object_set_new(root, "version", json_text(sqz_version()));
    return print_json(root);
}

int bench_cluster(int argc, char **argv)
{
    struct cluster_bench b = {.metric = SQZ_METRIC_EUCLIDEAN,
                              .dim = 64,
                              .n_iterations = 10,
                              .n_repeats = 5,
                              .seed = 1,
                              .n_threads = measured_threads(0)};
    /* clang-format off */
    const struct option options[] = {
        {.kind = OPTION_TEXT, .name = "keys", .argument = "FILE", .value = &b.keys_path,
         .help = "keys to cluster, numbers one after the other (without: drawn from a mixture of groups)"},
        {.kind = OPTION_CHOICE, .name = "format", .argument = "NAME", .value = &b.format, .choices = format_names,
         .help = "of the numbers in the file: f32 or f16 (f32)"},
        {.kind = OPTION_COUNT, .name = "dim", .argument = "N", .value = &b.dim, .low = 16, .high = 1024,
         .example = "64", .help = "numbers a key, a multiple of 16 (64)"},
        {.kind = OPTION_COUNT, .name = "count", .argument = "N", .value = &b.count, .low = 1, .high = 1 << 28,
         .example = "100000", .help = "keys (100000; with --keys: all)"},
        {.kind = OPTION_COUNT, .name = "groups", .argument = "N", .value = &b.n_groups, .low = 1, .high = 1 << 24,
         .example = "2000", .help = "groups that keys are drawn from (one for 50 keys)"},
        {.kind = OPTION_COUNT, .name = "clusters", .argument = "N", .value = &b.n_clusters, .low = 1,
         .high = 1 << 28, .example = "5000", .help = "clusters (5% of the keys)"},
        {.kind = OPTION_COUNT, .name = "iterations", .argument = "N", .value = &b.n_iterations, .low = 0, .high = 1000,
         .example = "10", .help = "iterations at most (10)"},
        {.kind = OPTION_CHOICE, .name = "metric", .argument = "NAME", .value = &b.metric, .choices = metric_names,
         .help = "cosine or euclidean (euclidean)"},
        {.kind = OPTION_COUNT, .name = "seed", .argument = "N", .value = &b.seed, .low = 0, .high = 1 << 30,
         .example = "1", .help = "of the drawn keys and the clustering (1)"},
        {.kind = OPTION_COUNT, .name = "repeats", .argument = "N", .value = &b.n_repeats, .low = 1,
         .high = MAX_REPEATS, .example = "5", .help = "times it is measured (5)"},
        {.kind = OPTION_TEXT, .name = "write-keys", .argument = "FILE", .value = &b.keys_out,
         .help = "write the keys as f32"},
        {.kind = OPTION_TEXT, .name = "write-assignment", .argument = "FILE", .value = &b.assignment_out,
         .help = "write each key's cluster, 32-bit integers"},
        THREADS_OPTION(b.n_threads),
        JSON_OPTION(b.json),
        {.kind = OPTION_END},
    };
    /* clang-format on */
    options_parse(&help, options, argc, argv, 0, 0);
    if (b.dim % 16 != 0) usage_error("--dim %zu: allowed are multiples of 16, e.g. 64", b.dim);
    outputs_check((const struct output[]){{"--write-keys", b.keys_out, OUTPUT_NUMBERS},
                                          {"--write-assignment", b.assignment_out, OUTPUT_NUMBERS},
                                          {0}},
                  &b.keys_path, 1);
    catch_signals();
    if (b.keys_path) {
        read_keys(&b);
    } else {
        b.count = b.count ? b.count : 100000;
        b.n_groups = b.n_groups ? b.n_groups : (b.count + 49) / 50;
        draw_keys(&b);
    }
    b.n_clusters = b.n_clusters ? b.n_clusters : (b.count + 19) / 20;
    if (b.n_clusters > b.count)
        usage_error("--clusters %zu: allowed are no more than the %zu keys", b.n_clusters, b.count);
    if (b.keys_out) write_file(b.keys_out, b.keys, b.count * b.dim * sizeof *b.keys);
    run(&b);
    if (b.assignment_out) write_file(b.assignment_out, b.assignment, b.count * sizeof *b.assignment);
    int code = print_results(&b);
    free(b.keys);
    free(b.assignment);
    return code;
}
