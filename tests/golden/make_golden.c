/*
 * Writes the golden context files: make_golden FOLDER, once for a version of
 * the format; what it wrote is committed and stays. Layers of two heads are
 * clustered and calibrated as `prepare` does it, from rows around a few centres;
 * damaged files are the short one with one thing wrong and, where its name says
 * so, checksums that are right again.
 */
#define _GNU_SOURCE /* memmem */
#include "build.h"
#include "context_input.h"
#include "format.h"
#include "kernels.h"
#include "random.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_TOKENS = 80, MAX_LAYERS = 2, N_HEAD = 2, HEAD_DIM = 32, N_QUERIES = 4, N_CENTRES = 6, WINDOW = 16 };

static const char *out;

size_t LLVMFuzzerMutate(uint8_t *bytes, size_t n, size_t capacity)
{
    (void)bytes;
    (void)capacity;
    return n;
}

static void *take(size_t n, size_t bytes)
{
    void *block = calloc(n, bytes);
    if (!block) fuzz_fail("there is memory", "calloc failed");
    return block;
}

/* ---- Whole files ------------------------------------------------------------------ */

struct golden {
    const char *name;
    enum sqz_rule rule;
    uint32_t n_tokens, n_levels, code_words;
    enum sqz_index index, keys;
    bool sliding; /* the first of the layers */
    enum sqz_row_format rows;
};

static const struct golden files[] = {
    {"codes", SQZ_RULE_DEFAULT, N_TOKENS, 1, 2, SQZ_INDEX_INT8, SQZ_INDEX_F16, false, SQZ_ROWS_F16},
    {"no-codes", SQZ_RULE_DEFAULT, N_TOKENS, 1, 0, SQZ_INDEX_INT8, SQZ_INDEX_F16, false, SQZ_ROWS_F16},
    {"two-levels", SQZ_RULE_DEFAULT, N_TOKENS, 2, 1, SQZ_INDEX_INT8, SQZ_INDEX_F16, false, SQZ_ROWS_F16},
    {"int8-alone", SQZ_RULE_DEFAULT, N_TOKENS, 1, 2, SQZ_INDEX_F16, SQZ_INDEX_INT8, false,
     SQZ_ROWS_F16}, /* version 3 */
    {"sliding", SQZ_RULE_DEFAULT, N_TOKENS, 1, 2, SQZ_INDEX_INT8, SQZ_INDEX_F16, true, SQZ_ROWS_F16},
    {"paper", SQZ_RULE_PAPER, N_TOKENS, 1, 0, SQZ_INDEX_F16, SQZ_INDEX_F16, false, SQZ_ROWS_F16},
    {"dense", SQZ_RULE_DEFAULT, N_TOKENS, 0, 0, SQZ_INDEX_INT8, SQZ_INDEX_F16, false, SQZ_ROWS_F16},
    {"short", SQZ_RULE_DEFAULT, 5, 1, 2, SQZ_INDEX_INT8, SQZ_INDEX_F16, true, SQZ_ROWS_F16},
    {"int4-4", SQZ_RULE_DEFAULT, N_TOKENS, 1, 2, SQZ_INDEX_INT8, SQZ_INDEX_F16, false, SQZ_ROWS_INT4_4}, /* version 4 */
    {"int4", SQZ_RULE_DEFAULT, N_TOKENS, 2, 1, SQZ_INDEX_F16, SQZ_INDEX_F16, true, SQZ_ROWS_INT4},
};

static struct sqz_squeeze_options options_of(const struct golden *golden)
{
    struct sqz_squeeze_options options;
    sqz_squeeze_options_default(&options, golden->rule);
    options.n_levels = golden->n_levels;
    options.code_words = golden->code_words;
    options.index = golden->index;
    options.keys = golden->keys;
    options.rows = golden->rows;
    options.centroid_share[0] = 0.2f;
    options.centroid_share[1] = 0.05f;
    options.n_sinks = golden->rule == SQZ_RULE_PAPER ? 0 : 4;
    options.n_window = 8;
    options.n_calibration = N_QUERIES;
    return options;
}

/* Rows around the centres that every layer of a seed has, F16. */
static uint16_t *make_rows(size_t n, uint64_t seed)
{
    struct sqz_random random, centres;
    uint16_t *rows = take(n * HEAD_DIM, sizeof *rows);
    sqz_random_seed(&random, seed);
    for (size_t i = 0; i < n; i++) {
        float row[HEAD_DIM];
        sqz_random_seed(&centres, 100 + sqz_random_below(&random, N_CENTRES));
        for (size_t j = 0; j < HEAD_DIM; j++)
            row[j] = (float)(3 * sqz_random_unit(&centres) - 1.5 + 0.6 * sqz_random_unit(&random));
        sqz_kernels_get()->f32_to_f16(rows + i * HEAD_DIM, row, HEAD_DIM);
    }
    return rows;
}

static void make_inputs(struct sqz_layer_input inputs[MAX_LAYERS], const struct golden *golden)
{
    for (uint32_t i = 0; i < MAX_LAYERS; i++) {
        struct sqz_layer_input *in = &inputs[i];
        const bool slides = golden->sliding && i == 0;
        const size_t window = slides ? WINDOW : 0;
        memset(in, 0, sizeof *in);
        in->shape = (struct sqz_layer_shape){N_HEAD, 1 + slides, HEAD_DIM, 1 / sqrtf(HEAD_DIM)};
        in->window_tokens = window;
        in->n_rows = window && window < golden->n_tokens ? window : golden->n_tokens;
        in->first_position = golden->n_tokens - in->n_rows;
        in->keys = make_rows(in->shape.n_head_kv * in->n_rows, 1 + i);
        in->values = make_rows(in->shape.n_head_kv * in->n_rows, 11 + i);
        in->n_queries = golden->n_levels ? N_QUERIES : 0;
        in->queries = make_rows(N_QUERIES * N_HEAD, 21 + i);
    }
}

static void check(enum sqz_status status, const char *name, const struct sqz_error *error)
{
    if (status) {
        fprintf(stderr, "%s: %s\n", name, error->message);
        exit(1);
    }
}

static void write_file(const struct golden *golden)
{
    char path[512];
    struct sqz_layer_input inputs[MAX_LAYERS];
    struct sqz_layer layers[MAX_LAYERS];
    struct sqz_context_writer *writer;
    struct sqz_error error;
    int32_t tokens[N_TOKENS];
    const struct sqz_squeeze_options options = options_of(golden);
    const struct sqz_context_meta meta = {.model_name = "Golden",
                                          .model_architecture = "llama",
                                          .model_fingerprint = "00112233445566778899aabbccddeeff",
                                          .source_name = "golden.txt",
                                          .tokens = tokens,
                                          .n_tokens = golden->n_tokens,
                                          .has_template = true,
                                          .rope_scale = 1.0f,
                                          .n_layer = MAX_LAYERS,
                                          .squeeze = options};
    for (int32_t i = 0; i < N_TOKENS; i++) tokens[i] = 31 * i % 997;
    memset(layers, 0, sizeof layers);
    make_inputs(inputs, golden);
    check(sqz_layers_plan(layers, inputs, MAX_LAYERS, &options, &error), golden->name, &error);
    check(sqz_layers_cluster(layers, inputs, MAX_LAYERS, &options, 1, NULL, NULL, &error), golden->name, &error);
    check(sqz_layers_calibrate(layers, MAX_LAYERS, &options, 1, NULL, NULL, &error), golden->name, &error);
    snprintf(path, sizeof path, "%s/%s.gguf", out, golden->name);
    check(sqz_context_writer_create(&writer, path, &meta, layers, &error), path, &error);
    for (uint32_t i = 0; i < MAX_LAYERS; i++)
        check(sqz_context_writer_put_layer(writer, i, &layers[i], &error), path, &error);
    check(sqz_context_writer_commit(writer, NULL, &error), path, &error);
    for (uint32_t i = 0; i < MAX_LAYERS; i++) {
        sqz_layer_release(&layers[i]);
        free(inputs[i].keys);
        free(inputs[i].values);
        free((void *)(uintptr_t)inputs[i].queries);
    }
}

/* ---- Damaged files ---------------------------------------------------------------------- */

/* What is wrong: bytes of a key's value (`at` from its first byte; arrays have 12 before their first element) or of a
 * tensor, or the file's length. */
struct damage {
    const char *name, *from, *key, *tensor;
    size_t at;
    uint32_t value;
    size_t n_bytes; /* of value */
    int longer;
    bool sealed;
};

/* clang-format off */
static const struct damage damages[] = {
    {.name = "cut-off", .from = "short", .longer = -64},
    {.name = "bytes-behind", .from = "short", .longer = 64},
    {.name = "metadata-flipped", .from = "short", .key = "squeeze.source.name", .at = 9, .value = '?', .n_bytes = 1},
    {.name = "keys-flipped", .from = "short", .tensor = "blk.0.key", .at = 3, .value = 0x55, .n_bytes = 1},
    {.name = "version-1", .from = "short", .key = "squeeze.version", .value = 1, .n_bytes = 4, .sealed = true},
    {.name = "version-99", .from = "short", .key = "squeeze.version", .value = 99, .n_bytes = 4, .sealed = true},
    {.name = "alignment-32", .from = "short", .key = "general.alignment", .value = 32, .n_bytes = 4, .sealed = true},
    {.name = "model", .from = "short", .key = "general.architecture", .at = 8, .value = 'm', .n_bytes = 1,
     .sealed = true},
    {.name = "key-missing", .from = "short", .key = "squeeze.rope_scal", .at = (size_t)-4, .value = 'f', .n_bytes = 1,
     .sealed = true},
    {.name = "tensor-missing", .from = "short", .key = "blk.0.position", .at = (size_t)-5, .value = 'x', .n_bytes = 1,
     .sealed = true},
    {.name = "heads-7", .from = "short", .key = "squeeze.layer.head_count_kv", .at = 12, .value = 7, .n_bytes = 4,
     .sealed = true},
    {.name = "tokens-6", .from = "short", .key = "squeeze.token_count", .value = 6, .n_bytes = 4, .sealed = true},
    {.name = "token-negative", .from = "short", .tensor = "tokens", .value = 0x80000000, .n_bytes = 4, .sealed = true},
    {.name = "position-twice", .from = "short", .tensor = "blk.1.position", .at = 4, .value = 0, .n_bytes = 4,
     .sealed = true},
    {.name = "window-below-rows", .from = "short", .key = "squeeze.layer.window_tokens", .at = 12, .value = 1,
     .n_bytes = 4, .sealed = true},
    {.name = "offset-falls", .from = "sliding", .tensor = "blk.1.offset.0", .at = 4, .value = 0, .n_bytes = 4,
     .sealed = true},
    {.name = "threshold-nan", .from = "sliding", .tensor = "blk.1.threshold", .at = 8, .value = 0x7fc00000,
     .n_bytes = 4, .sealed = true},
    {.name = "rows-3", .from = "int4-4", .key = "squeeze.option.rows", .value = 3, .n_bytes = 4, .sealed = true},
    {.name = "rows-upper", .from = "int4", .key = "squeeze.option.rows", .value = 1, .n_bytes = 4, .sealed = true},
    {.name = "upper-flipped", .from = "int4", .tensor = "blk.1.key_upper", .at = 5, .value = 0x55, .n_bytes = 1},
};
/* clang-format on */

static uint8_t *load(const char *name, size_t *n)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s.gguf", out, name);
    FILE *file = fopen(path, "rb");
    uint8_t *bytes = take(1 << 20, 1);
    *n = file ? fread(bytes, 1, 1 << 20, file) : 0;
    if (!*n || fclose(file)) fuzz_fail("a golden file can be read", path);
    return bytes;
}

static uint8_t *place_of(uint8_t *bytes, size_t n, const struct damage *damage)
{
    struct sqz_walk walk = {.tensors = NULL};
    struct sqz_error error;
    const struct sqz_report report = {NULL, SQZ_ERROR_FORMAT, "", &error};
    uint8_t *place = NULL;
    if (damage->key) {
        place = memmem(bytes, n, damage->key, strlen(damage->key));
        if (place) place += strlen(damage->key) + 4;
    } else if (damage->tensor && !sqz_walk_metadata(&walk, bytes, n, &report)) {
        const struct sqz_tensor_entry *tensor = sqz_walk_find(&walk, damage->tensor);
        place = tensor ? bytes + tensor->offset : NULL;
    }
    free(walk.tensors);
    if (!place) fuzz_fail("a place to damage is there", damage->name);
    return place + damage->at;
}

static void write_damaged(const struct damage *damage)
{
    char path[512];
    size_t n;
    uint8_t *bytes = load(damage->from, &n);
    if (damage->n_bytes) memcpy(place_of(bytes, n, damage), &damage->value, damage->n_bytes);
    n += (size_t)damage->longer;
    struct context_input sealed = context_input_of(bytes, n + CONTEXT_CHOICES);
    snprintf(path, sizeof path, "%s/damaged/%s.gguf", out, damage->name);
    FILE *file = fopen(path, "wb");
    const size_t n_out = damage->sealed ? sealed.n : n;
    if (!file || fwrite(damage->sealed ? sealed.file : bytes, 1, n_out, file) != n_out || fclose(file))
        fuzz_fail("a file can be written", path);
    free(sealed.file);
    free(bytes);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "make_golden FOLDER\n");
        return 2;
    }
    out = argv[1];
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) write_file(&files[i]);
    for (size_t i = 0; i < sizeof damages / sizeof *damages; i++) write_damaged(&damages[i]);
    return 0;
}
