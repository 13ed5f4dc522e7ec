/*
 * Writes a context of random tokens for a model, larger than its model could read in a test's time:
 *
 *   large_context MODEL.gguf TOKENS CONTEXT.sqz.gguf [SHARDS]
 *
 * Keys lie around the centres of their clusters, so that some clusters matter
 * to a query and most do not. What it answers is nonsense; what it reads is not.
 * In shards rows are repeated from a few thousand, and clusters are few: what is
 * sent between ranks depends on neither.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "build.h"
#include "codes.h"
#include "context_file.h"
#include "kernels.h"
#include "random.h"
#include "write_shards.h"

enum { CLUSTER_ROWS = 40, N_QUERIES = 8, MODEL_TOKENS = 8192, POOL_ROWS = 4099, SHARD_CLUSTER_ROWS = 1024 };

static void check(enum sqz_status status, const struct sqz_error *error)
{
    if (status == SQZ_OK) return;
    fprintf(stderr, "large_context: %s\n", error->message);
    exit(1);
}

static void *take(size_t count, size_t size)
{
    void *p = calloc(count, size);
    if (p) return p;
    fprintf(stderr, "large_context: no memory for %zu times %zu bytes\n", count, size);
    exit(1);
}

/* The builder's arrays are to const for their readers. */
static void *writable(const void *p)
{
    return (void *)(uintptr_t)p;
}

/* About normal, with the given deviation. */
static void fill(float *x, size_t n, float deviation, struct sqz_random *random)
{
    for (size_t i = 0; i < n; i++) {
        double sum = 0;
        for (int j = 0; j < 4; j++) sum += sqz_random_unit(random);
        x[i] = deviation * (float)((sum - 2) * sqrt(3.0));
    }
}

/* Rows of one head, cluster by cluster; centroids are the rows' means but for rounding. */
static void fill_head(struct sqz_layer *layer, uint32_t head, struct sqz_random *random)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const struct sqz_level *level = &layer->level[0];
    const size_t d = layer->shape.head_dim, first = (size_t)head * layer->n_rows, n = level->n_clusters;
    const uint32_t clustered = layer->n_rows - layer->n_fixed;
    uint16_t *keys = (uint16_t *)writable(layer->keys.data) + first * d;
    uint16_t *values = (uint16_t *)writable(layer->values.data) + first * d;
    uint32_t *offset = (uint32_t *)writable(level->offset) + head * (n + 1);
    float centre[256], row[256], noise[256];
    for (uint32_t i = 0; i < layer->n_rows; i++) ((int32_t *)writable(layer->position))[first + i] = (int32_t)i;
    for (uint32_t c = 0; c <= n; c++) offset[c] = (uint32_t)((uint64_t)clustered * c / n);
    fill(noise, d, 0.5f, random); /* one pattern of noise, turned for every row: the generator is slow */
    for (uint32_t c = 0, i = 0; c < n; c++) {
        fill(centre, d, 2.0f, random);
        k->f32_to_f16((uint16_t *)writable(level->centroids.data) + (head * n + c) * d, centre, d);
        k->f32_to_f16((uint16_t *)writable(level->value_centroids.data) + (head * n + c) * d, centre, d);
        ((float *)writable(level->variance))[head * n + c] = 0.25f * (float)d;
        const uint32_t end = c + 1 < n ? layer->n_fixed + offset[c + 1] : layer->n_rows;
        for (; i < end; i++) {
            for (size_t j = 0; j < d; j++) row[j] = centre[j] + noise[(j + i) % d];
            k->f32_to_f16(keys + (size_t)i * d, row, d);
            k->f32_to_f16(values + (size_t)i * d, row, d);
        }
    }
}

/* [n_rows][D] of each head from a few rows of its own, in turn. */
static void repeat_rows(uint16_t *rows, const struct sqz_layer_shape *shape, size_t n_rows, struct sqz_random *random)
{
    const size_t d = shape->head_dim;
    float *numbers = take(POOL_ROWS * d, sizeof *numbers);
    for (uint32_t h = 0; h < shape->n_head_kv; h++, rows += n_rows * d) {
        fill(numbers, POOL_ROWS * d, 1.0f, random);
        for (size_t at = 0; at < n_rows; at += POOL_ROWS)
            sqz_kernels_get()->f32_to_f16(rows + at * d, numbers,
                                          (n_rows - at < POOL_ROWS ? n_rows - at : POOL_ROWS) * d);
    }
    free(numbers);
}

static void write_shards(const struct sqz_context_meta *meta, struct sqz_layer_input *one, uint32_t count,
                         const char *path, struct sqz_random *random)
{
    struct sqz_error error;
    struct sqz_shards_writing *writing;
    uint64_t bytes;
    struct sqz_layer_input *inputs = take(meta->n_layer, sizeof *inputs);
    const size_t numbers = (size_t)one->shape.n_head_kv * one->n_rows * one->shape.head_dim;
    for (uint32_t l = 0; l < meta->n_layer; l++) {
        inputs[l] = *one;
        if (l > 0) {
            inputs[l].keys = take(numbers, sizeof(uint16_t));
            inputs[l].values = take(numbers, sizeof(uint16_t));
        }
        repeat_rows(writable(inputs[l].keys), &one->shape, one->n_rows, random);
        repeat_rows(writable(inputs[l].values), &one->shape, one->n_rows, random);
    }
    const struct sqz_held_shards held = {.deal = {meta->n_tokens, SQZ_SHARD_BLOCK_TOKENS, count}, .step = 1};
    check(sqz_shards_writing_begin(&writing, inputs, meta, &held, NULL, path, &error), &error);
    check(sqz_shards_deal(writing, &error), &error);
    check(sqz_shards_cluster(writing, 2, NULL, NULL, &error), &error);
    check(sqz_shards_calibrate_all(writing, 2, NULL, NULL, &error), &error);
    check(sqz_shards_write(writing, NULL, NULL, &bytes, &error), &error);
    sqz_shards_writing_free(writing);
}

int main(int argc, char **argv)
{
    struct sqz_error error;
    struct sqz_model *model;
    struct sqz_model_info info;
    struct sqz_context_writer *writer;
    const int shards = argc == 5 ? atoi(argv[4]) : 0;
    if (argc < 4 || argc > 5 || atol(argv[2]) < 1000 || (argc == 5 && shards < 2)) {
        fprintf(stderr, "usage: large_context MODEL.gguf TOKENS CONTEXT.sqz.gguf [SHARDS]\n");
        return 2;
    }
    const size_t n = (size_t)atol(argv[2]);
    sqz_llama_log_take();
    check(sqz_model_open(&model, argv[1], NULL, &error), &error);
    sqz_model_get_info(model, &info);
    sqz_model_free(model);

    struct sqz_random random;
    sqz_random_seed(&random, 1);
    int32_t *tokens = take(n, sizeof *tokens);
    for (size_t i = 0; i < n; i++) tokens[i] = (int32_t)(sqz_random_unit(&random) * info.n_vocab);
    struct sqz_context_meta meta = {
        .model_name = info.name,
        .model_architecture = info.architecture,
        .model_fingerprint = info.fingerprint,
        .source_name = "random",
        .tokens = tokens,
        .n_tokens = n,
        .rope_scale = (float)((n + 1024 + MODEL_TOKENS - 1) / MODEL_TOKENS),
        .n_layer = info.n_layer,
    };
    sqz_squeeze_options_default(&meta.squeeze, SQZ_RULE_DEFAULT);
    meta.squeeze.index = SQZ_INDEX_F16; /* as filled below */
    meta.squeeze.centroid_share[0] = 1.0f / CLUSTER_ROWS;
    const struct sqz_layer_shape shape = {info.n_head, info.n_head_kv, info.head_dim,
                                          1.0f / sqrtf((float)info.head_dim)};
    const size_t row_numbers = (size_t)shape.n_head_kv * n * shape.head_dim;
    const size_t query_numbers = (size_t)N_QUERIES * shape.n_head * shape.head_dim;
    float *query = take(query_numbers, sizeof *query);
    struct sqz_layer_input input = {
        .shape = shape,
        .keys = take(row_numbers, sizeof(uint16_t)),
        .values = take(row_numbers, sizeof(uint16_t)),
        .n_rows = n,
        .queries = take(query_numbers, sizeof(uint16_t)),
        .n_queries = N_QUERIES,
    };
    fill(query, query_numbers, 2.0f, &random);
    sqz_kernels_get()->f32_to_f16(writable(input.queries), query, query_numbers);

    if (shards) {
        meta.squeeze.centroid_share[0] = 1.0f / SHARD_CLUSTER_ROWS;
        write_shards(&meta, &input, (uint32_t)shards, argv[3], &random);
        return 0;
    }

    /* One layer serves all: the same rows, index and curves. */
    struct sqz_layer layer, *shapes = take(info.n_layer, sizeof *shapes);
    check(sqz_layers_plan(&layer, &input, 1, &meta.squeeze, &error), &error);
    memcpy(writable(layer.queries), input.queries, query_numbers * sizeof(uint16_t));
    void *workspace = take(sqz_code_build_workspace_bytes(&layer), 1);
    for (uint32_t h = 0; h < shape.n_head_kv; h++) {
        fill_head(&layer, h, &random);
        if (layer.codes.n_words) sqz_code_build(&layer, h, workspace);
    }
    free(workspace);
    check(sqz_layers_calibrate(&layer, 1, &meta.squeeze, 2, NULL, NULL, &error), &error);
    for (uint32_t i = 0; i < info.n_layer; i++) shapes[i] = layer;
    check(sqz_context_writer_create(&writer, argv[3], &meta, shapes, &error), &error);
    for (uint32_t i = 0; i < info.n_layer; i++) check(sqz_context_writer_put_layer(writer, i, &layer, &error), &error);
    check(sqz_context_writer_commit(writer, NULL, &error), &error);
    return 0;
}
