/*
 * The context file: every field survives a round trip; every damaged, cut,
 * planted or foreign file is refused with a message and without a crash;
 * writing leaves a whole file or none. Files are small, synthetic, and need no
 * model. Damage is tried twice: as it is (the checksums must see it) and with
 * the checksums made right again (the checks behind them must).
 */
#define _GNU_SOURCE /* memfd_create, fallocate */
#include "context_file.h"
#include "folder_mark.h"
#include "squeeze.h"
#include "unfinished.h"

#include <ggml.h>
#include <gguf.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

/* ---- Synthetic layers ------------------------------------------------------------ */

static uint64_t random_state;

static uint32_t random_u32(void)
{
    random_state += 0x9e3779b97f4a7c15u; /* splitmix64 */
    uint64_t z = random_state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) >> 16);
}

static uint32_t random_below(uint32_t n)
{
    return random_u32() % n;
}

static void *take(size_t n, size_t bytes)
{
    void *block = calloc(n ? n : 1, bytes);
    if (!block) fail_msg("no memory for %zu x %zu bytes", n, bytes);
    return block;
}

static uint16_t *random_f16(size_t n)
{
    uint16_t *values = take(n, sizeof *values);
    for (size_t i = 0; i < n; i++) values[i] = (uint16_t)(random_u32() & 0xbbff); /* finite */
    return values;
}

static float *random_f32(size_t n, float low, float high)
{
    float *values = take(n, sizeof *values);
    for (size_t i = 0; i < n; i++) values[i] = low + (high - low) * (float)random_below(1 << 20) / (float)(1 << 20);
    return values;
}

/* n_series falling series */
static float *falling_f32(size_t n_series, size_t n)
{
    float *values = take(n_series * n, sizeof *values);
    for (size_t s = 0; s < n_series; s++)
        for (size_t i = 0; i < n; i++) values[s * n + i] = 1.0f - (float)i / (float)(n + s);
    return values;
}

static uint32_t *random_offsets(size_t heads, uint32_t clusters, uint32_t below)
{
    uint32_t *offset = take(heads * (clusters + 1), sizeof *offset);
    for (size_t head = 0; head < heads; head++) {
        uint32_t *o = offset + head * (clusters + 1);
        for (uint32_t i = 1; i < clusters; i++) { /* room for one row in every cluster that is left */
            const uint32_t most = below - (clusters - i);
            o[i] = o[i - 1] + 1 + random_below(most - o[i - 1]);
        }
        o[clusters] = below;
    }
    return offset;
}

static int32_t *random_positions(uint32_t heads, uint32_t n_rows, uint32_t n_fixed, uint32_t first)
{
    int32_t *position = take((size_t)heads * n_rows, sizeof *position);
    for (uint32_t head = 0; head < heads; head++) {
        int32_t *p = position + (size_t)head * n_rows;
        for (uint32_t row = 0; row < n_rows; row++) p[row] = (int32_t)(first + row);
        for (uint32_t row = n_rows; row-- > n_fixed + 1;) {
            const uint32_t other = n_fixed + random_below(row - n_fixed + 1);
            const int32_t t = p[row];
            p[row] = p[other];
            p[other] = t;
        }
    }
    return position;
}

struct shape {
    uint32_t n_head, n_head_kv, head_dim, n_tokens, n_rows, n_fixed, n_levels, clusters[3];
    bool sliding, tail, value_skip, global, gains;
    enum sqz_group group;
    uint32_t n_curve, n_queries;
    enum sqz_index index;
    uint32_t code_words, code_directions;
    bool keys_alone; /* INT8 keys without F16 ones */
    enum sqz_row_format rows;
};

static int8_t *random_i8(size_t n)
{
    int8_t *numbers = take(n, sizeof *numbers);
    for (size_t i = 0; i < n; i++) numbers[i] = (int8_t)((int)random_below(255) - 127);
    return numbers;
}

static uint32_t *random_words(size_t n)
{
    uint32_t *words = take(n, sizeof *words);
    for (size_t i = 0; i < n; i++) words[i] = random_u32();
    return words;
}

/* Where the parts of the codes begin; some may be empty. */
static uint32_t *random_parts(size_t heads, uint32_t parts, uint32_t directions)
{
    uint32_t *first = take(heads * (parts + 1), sizeof *first);
    for (size_t head = 0; head < heads; head++) {
        uint32_t *f = first + head * (parts + 1);
        for (uint32_t i = 1; i < parts; i++) f[i] = f[i - 1] + random_below(directions - f[i - 1] + 1);
        f[parts] = directions;
    }
    return first;
}

static void make_codes(struct sqz_codes *codes, const struct shape *s)
{
    const size_t heads = s->n_head_kv, words = s->code_words, directions = s->code_directions;
    codes->n_words = s->code_words;
    codes->n_directions = s->code_directions;
    codes->words = random_words(heads * words * (s->n_rows - s->n_fixed));
    codes->directions = random_f16(heads * directions * s->head_dim);
    codes->book = random_f16(heads * 16 * directions);
    codes->first = random_parts(heads, 8 * s->code_words, s->code_directions);
    codes->spread = random_f32(heads * directions, 0.0f, 2.0f);
}

static struct sqz_rows random_i8_rows(size_t n, size_t dim, const float *mean)
{
    return (struct sqz_rows){
        .type = SQZ_ROW_I8, .data = random_i8(n * dim), .scale = random_f32(n, 0.0f, 0.1f), .mean = mean};
}

static uint8_t *random_bytes(size_t n)
{
    uint8_t *bytes = take(n, 1);
    for (size_t i = 0; i < n; i++) bytes[i] = (uint8_t)random_u32();
    return bytes;
}

/* Rows in planes of a type and count of whole rows that are set, n a head. */
static void random_planes(struct sqz_rows *rows, size_t heads, size_t n, size_t dim)
{
    const size_t n_whole = rows->planes.n_whole, rounded = heads * (n - n_whole);
    rows->data = random_bytes(rounded * sqz_plane_bytes(dim));
    if (rows->type == SQZ_ROW_I44) rows->planes.lower = random_bytes(rounded * sqz_plane_bytes(dim));
    rows->planes.step = random_f16(rounded);
    if (n_whole) rows->planes.whole = random_f16(heads * n_whole * dim);
}

static void drop(const void *block)
{
    free((void *)(uintptr_t)block);
}

static void drop_rows(const struct sqz_rows *rows)
{
    drop(rows->data);
    drop(rows->scale);
    drop(rows->planes.lower);
    drop(rows->planes.step);
    drop(rows->planes.whole);
}

/* In place of F16 keys and values. */
static void put_in_planes(struct sqz_layer *layer, const struct shape *s)
{
    const size_t heads = s->n_head_kv, dim = s->head_dim;
    drop_rows(&layer->keys);
    drop_rows(&layer->values);
    for (uint32_t i = 0; i < s->n_levels; i++) drop_rows(&layer->level[i].value_centroids);
    sqz_layer_plan_planes(layer, s->rows);
    random_planes(&layer->keys, heads, s->n_rows, dim);
    random_planes(&layer->values, heads, s->n_rows, dim);
    layer->values.mean = random_f32(heads * dim, -1.0f, 1.0f);
    for (uint32_t i = 0; i < s->n_levels && s->tail; i++) {
        layer->level[i].value_centroids = (struct sqz_rows){.type = SQZ_ROW_I44};
        random_planes(&layer->level[i].value_centroids, heads, s->clusters[i], dim);
    }
    sqz_layer_join_planes(layer);
}

static void make_layer(struct sqz_layer *layer, const struct shape *s)
{
    const size_t heads = s->n_head_kv, dim = s->head_dim, rows = heads * s->n_rows;
    memset(layer, 0, sizeof *layer);
    layer->shape = (struct sqz_layer_shape){s->n_head, s->n_head_kv, s->head_dim, 1.0f / sqrtf((float)s->head_dim)};
    layer->n_rows = s->n_rows;
    layer->n_fixed = s->n_fixed;
    layer->sliding_window = s->sliding;
    layer->n_window_tokens = !s->sliding ? 0 : s->n_rows == s->n_tokens ? s->n_rows + 1 : s->n_rows;
    layer->values = sqz_f16_rows(random_f16(rows * dim));
    layer->position = random_positions(s->n_head_kv, s->n_rows, s->n_fixed, s->sliding ? s->n_tokens - s->n_rows : 0);
    layer->n_levels = s->n_levels;
    layer->rule = SQZ_RULE_PAPER; /* as some_options() */
    layer->tail = s->tail;
    layer->value_skip = s->value_skip;
    layer->group = s->group;
    const float *mean = s->index == SQZ_INDEX_INT8 && s->n_levels ? random_f32(heads * dim, -1.0f, 1.0f) : NULL;
    if (mean && !s->keys_alone && !s->rows) layer->retained_keys = random_i8_rows(rows, dim, mean);
    layer->keys = mean && s->keys_alone ? random_i8_rows(rows, dim, mean) : sqz_f16_rows(random_f16(rows * dim));
    uint32_t below = s->n_rows - s->n_fixed;
    for (uint32_t i = 0; i < s->n_levels; i++) {
        struct sqz_level *level = &layer->level[i];
        level->n_clusters = s->clusters[i];
        if (mean) level->centroids = random_i8_rows(heads * level->n_clusters, dim, mean);
        else level->centroids = sqz_f16_rows(random_f16(heads * level->n_clusters * dim));
        level->value_centroids = sqz_f16_rows(s->tail ? random_f16(heads * level->n_clusters * dim) : NULL);
        level->offset = random_offsets(heads, level->n_clusters, below);
        level->variance = random_f32(heads * level->n_clusters, 0.0f, 9.0f);
        below = level->n_clusters;
    }
    if (s->n_levels) {
        layer->n_curve = s->n_curve;
        float *threshold = take(s->n_curve, sizeof *threshold);
        for (uint32_t i = 0; i < s->n_curve; i++) threshold[i] = -20.0f + 0.5f * (float)i;
        layer->log_threshold = threshold;
        layer->share = falling_f32(heads, s->n_curve);
        layer->lost_mass = random_f32(heads * s->n_curve, 0.0f, 1.0f);
        layer->tail_gain = s->gains ? random_f32(heads * s->n_curve, -3.0f, 3.0f) : NULL;
        layer->variance_gain = s->gains ? random_f32(heads, 0.0f, 2.0f) : NULL;
        layer->global_share = s->global ? falling_f32(1, s->n_curve) : NULL;
    }
    if (s->code_words) make_codes(&layer->codes, s);
    if (s->rows && s->n_levels) put_in_planes(layer, s);
    layer->n_queries = s->n_queries;
    layer->queries = s->n_queries ? random_f16((size_t)s->n_queries * s->n_head * dim) : NULL;
}

static void free_layer(struct sqz_layer *layer)
{
    drop(layer->values.mean);
    drop(sqz_layer_mean(layer));
    drop_rows(&layer->keys);
    drop_rows(&layer->retained_keys);
    drop_rows(&layer->values);
    drop(layer->position);
    for (uint32_t i = 0; i < layer->n_levels; i++) {
        drop_rows(&layer->level[i].centroids);
        drop_rows(&layer->level[i].value_centroids);
        drop(layer->level[i].offset);
        drop(layer->level[i].variance);
    }
    drop(layer->log_threshold);
    drop(layer->share);
    drop(layer->lost_mass);
    drop(layer->tail_gain);
    drop(layer->variance_gain);
    drop(layer->global_share);
    drop(layer->queries);
    drop(layer->codes.words);
    drop(layer->codes.directions);
    drop(layer->codes.book);
    drop(layer->codes.first);
    drop(layer->codes.spread);
}

static struct sqz_squeeze_options some_options(void)
{
    struct sqz_squeeze_options options = {.size = sizeof options,
                                          .rule = SQZ_RULE_PAPER,
                                          .n_levels = 2,
                                          .centroid_share = {0.05f, 0.01f},
                                          .metric = SQZ_METRIC_EUCLIDEAN,
                                          .group = SQZ_GROUP_MAX,
                                          .n_sinks = 16,
                                          .n_window = 3,
                                          .n_iterations = 20,
                                          .code_words = 3,
                                          .center = true,
                                          .variance = false,
                                          .per_head = true,
                                          .tail = false,
                                          .value_skip = true,
                                          .n_calibration = 100,
                                          .seed = 0xfedcba9876543210u};
    return options;
}

static struct sqz_context_meta some_meta(const int32_t *tokens, size_t n_tokens, uint32_t n_layer)
{
    return (struct sqz_context_meta){.model_name = "A model",
                                     .model_architecture = "llama",
                                     .model_fingerprint = "0123456789abcdef",
                                     .source_name = "book \xc3\xa4.txt",
                                     .tokens = tokens,
                                     .n_tokens = n_tokens,
                                     .has_template = true,
                                     .rope_scale = 2.5f,
                                     .rope_factors = SQZ_ROPE_FACTORS_SHORT,
                                     .n_layer = n_layer,
                                     .squeeze = some_options()};
}

static int32_t *some_tokens(size_t n)
{
    int32_t *tokens = take(n, sizeof *tokens);
    for (size_t i = 0; i < n; i++) tokens[i] = (int32_t)random_below(50000);
    return tokens;
}

/* Shapes that between them use every optional array. */
/* clang-format off */
static const struct shape shapes[] = {
    {.n_head = 1, .n_head_kv = 1, .head_dim = 32, .n_tokens = 40, .n_rows = 40, .n_fixed = 40},
    {.n_head = 9, .n_head_kv = 3, .head_dim = 64, .n_tokens = 40, .n_rows = 40, .n_fixed = 5, .n_levels = 1,
     .clusters = {7}, .tail = true, .gains = true, .n_curve = 9, .n_queries = 3, .code_words = 1,
     .code_directions = 24},
    {.n_head = 4, .n_head_kv = 4, .head_dim = 48, .n_tokens = 40, .n_rows = 40, .n_fixed = 0, .n_levels = 2,
     .clusters = {12, 3}, .global = true, .value_skip = true, .n_curve = 1, .group = SQZ_GROUP_MAX},
    {.n_head = 8, .n_head_kv = 1, .head_dim = 256, .n_tokens = 40, .n_rows = 40, .n_fixed = 17, .n_levels = 3,
     .clusters = {23, 5, 1}, .tail = true, .gains = true, .global = true, .n_curve = 5, .n_queries = 1, .code_words = 4,
     .code_directions = 256},
    {.n_head = 2, .n_head_kv = 2, .head_dim = 80, .n_tokens = 40, .n_rows = 11, .n_fixed = 11, .sliding = true},
    {.n_head = 2, .n_head_kv = 1, .head_dim = 32, .n_tokens = 40, .n_rows = 40, .n_fixed = 40, .sliding = true,
     .n_queries = 2},
};
/* clang-format on */
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

/* ---- Files ---------------------------------------------------------------------------- */

static char directory[PATH_MAX];

static const char *in_directory(const char *name)
{
    static char path[PATH_MAX + 64];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return path;
}

static size_t directory_entries(void)
{
    size_t n = 0;
    DIR *stream = opendir(directory);
    assert_non_null(stream);
    for (struct dirent *entry; (entry = readdir(stream));)
        n += strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..");
    closedir(stream);
    return n;
}

struct image {
    uint8_t *bytes;
    size_t size;
};

static struct image load(const char *path)
{
    struct image image = {NULL, 0};
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    assert_int_equal(fseek(file, 0, SEEK_END), 0);
    image.size = (size_t)ftell(file);
    rewind(file);
    image.bytes = take(image.size, 1);
    assert_int_equal(fread(image.bytes, 1, image.size, file), image.size);
    fclose(file);
    return image;
}

static enum sqz_status write_context(const char *path, const struct sqz_context_meta *meta,
                                     const struct sqz_layer *layers, uint64_t *bytes, struct sqz_error *error)
{
    struct sqz_context_writer *writer;
    enum sqz_status status = sqz_context_writer_create(&writer, path, meta, layers, error);
    if (status) return status;
    for (uint32_t i = meta->n_layer; i-- > 0;) /* backwards: any order is allowed */
        if ((status = sqz_context_writer_put_layer(writer, i, &layers[i], error))) {
            sqz_context_writer_abort(writer);
            return status;
        }
    return sqz_context_writer_commit(writer, bytes, error);
}

/* A file in memory that the reader opens through /proc. */
static int memory_file = -1;

static const char *memory_path(void)
{
    static char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", memory_file);
    return path;
}

static void set_memory(const uint8_t *bytes, size_t size)
{
    if (memory_file < 0) memory_file = memfd_create("context", 0);
    assert_true(memory_file >= 0);
    assert_int_equal(ftruncate(memory_file, (off_t)size), 0);
    if (size) assert_int_equal(pwrite(memory_file, bytes, size, 0), (ssize_t)size);
}

static enum sqz_status open_memory(struct sqz_context **context, enum sqz_verify verify, struct sqz_error *error)
{
    struct sqz_context_options options;
    sqz_context_options_default(&options);
    options.verify = verify;
    return sqz_context_open(context, memory_path(), &options, error);
}

/* A small valid file: two clustered levels, tail, queries, everything present. */
static struct image small_image(void)
{
    static const struct shape shape = {.n_head = 2,
                                       .n_head_kv = 1,
                                       .head_dim = 32,
                                       .n_tokens = 12,
                                       .n_rows = 12,
                                       .n_fixed = 2,
                                       .n_levels = 2,
                                       .clusters = {4, 2},
                                       .tail = true,
                                       .gains = true,
                                       .global = true,
                                       .n_curve = 3,
                                       .n_queries = 1,
                                       .code_words = 2,
                                       .code_directions = 3};
    struct sqz_layer layer;
    struct sqz_error error = {SQZ_OK, ""};
    random_state = 77;
    int32_t *tokens = some_tokens(shape.n_tokens);
    make_layer(&layer, &shape);
    const struct sqz_context_meta meta = some_meta(tokens, shape.n_tokens, 1);
    const char *path = in_directory("small.gguf");
    if (write_context(path, &meta, &layer, NULL, &error)) fail_msg("writing the small file: %s", error.message);
    struct image image = load(path);
    assert_int_equal(unlink(path), 0);
    free_layer(&layer);
    free(tokens);
    return image;
}

static struct gguf_context *parse(const struct image *image)
{
    struct gguf_context *gguf =
        gguf_init_from_buffer(image->bytes, image->size, (struct gguf_init_params){.no_alloc = true, .ctx = NULL});
    assert_non_null(gguf);
    return gguf;
}

/* First byte after a key's name, NULL when the name is not there. */
static uint8_t *after_key(const struct image *image, const char *key)
{
    uint8_t *at = memmem(image->bytes, image->size, key, strlen(key));
    return at ? at + strlen(key) : NULL;
}

/* Makes every checksum right again. Tensor places are those of `gguf`, so bytes may have changed but not moved. */
static void seal(const struct image *image, const struct gguf_context *gguf)
{
    const size_t data = gguf_get_data_offset(gguf);
    uint8_t *tensors = after_key(image, "squeeze.checksum.tensors");
    uint8_t *metadata = after_key(image, "squeeze.checksum.metadata");
    for (int64_t i = 0; tensors && i < gguf_get_n_tensors(gguf); i++) {
        const uint64_t sum =
            XXH3_64bits(image->bytes + data + gguf_get_tensor_offset(gguf, i), gguf_get_tensor_size(gguf, i));
        uint8_t *place = tensors + 16 + 8 * i; /* after type, element type and length */
        if (place + 8 <= image->bytes + data) memcpy(place, &sum, 8);
    }
    if (metadata && metadata + 12 <= image->bytes + data) {
        memset(metadata + 4, 0, 8);
        const uint64_t sum = XXH3_64bits(image->bytes, data);
        memcpy(metadata + 4, &sum, 8);
    }
}

/* Sets every bit of the named tensors. */
static void fill_tensors(const struct image *image, const struct gguf_context *gguf, const char *const *names, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const int64_t id = gguf_find_tensor(gguf, names[i]);
        memset(image->bytes + gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, id), 0xff,
               gguf_get_tensor_size(gguf, id));
    }
}

/* The image with other metadata, checksums right. */
static struct image rebuild(const struct gguf_context *gguf, const struct image *original,
                            const struct gguf_context *original_gguf)
{
    const size_t old_data = gguf_get_data_offset(original_gguf), new_data = gguf_get_meta_size(gguf);
    struct image image = {take(new_data + original->size - old_data, 1), new_data + original->size - old_data};
    gguf_get_meta_data(gguf, image.bytes);
    memcpy(image.bytes + new_data, original->bytes + old_data, original->size - old_data);
    struct gguf_context *again = parse(&image);
    seal(&image, again);
    gguf_free(again);
    return image;
}

static void check_refused(const char *what, enum sqz_status wanted, const char *text)
{
    struct sqz_context *context;
    struct sqz_error error = {SQZ_OK, ""};
    const enum sqz_status status = open_memory(&context, SQZ_VERIFY_ALL, &error);
    if (status != wanted || context || error.status != wanted || !strstr(error.message, text))
        fail_msg("%s: got %s '%s', wanted %s with '%s'", what, sqz_status_name(status), error.message,
                 sqz_status_name(wanted), text);
}

static void check_opens(const char *what)
{
    struct sqz_context *context;
    struct sqz_error error = {SQZ_OK, ""};
    const enum sqz_status status = open_memory(&context, SQZ_VERIFY_ALL, &error);
    if (status) fail_msg("%s: got %s '%s', wanted SQZ_OK", what, sqz_status_name(status), error.message);
    sqz_context_free(context);
}

/* Reads all that an open context points to, as the kernels would: a wild pointer shows here. */
/* Reads every byte of rows of all heads. */
static uint64_t touch_rows(const struct sqz_rows *rows, size_t n, size_t dim)
{
    const uint8_t *bytes = rows->data;
    uint64_t sum = 0;
    for (size_t i = 0; i < n * sqz_row_data_bytes(rows->type, dim) && !rows->planes.n_whole; i++) sum += bytes[i];
    for (size_t i = 0; rows->scale && i < n; i++) sum += rows->scale[i] > 0;
    return sum;
}

static uint64_t touch(const struct sqz_context *context)
{
    struct sqz_context_info info;
    uint64_t sum = 0;
    sqz_context_get_info(context, &info);
    for (size_t i = 0; i < info.n_tokens; i++) sum += (uint64_t)info.tokens[i];
    sum += strlen(info.model_name) + strlen(info.source_name) + strlen(info.model_fingerprint);
    for (uint32_t l = 0; l < info.n_layer; l++) {
        const struct sqz_layer *layer = sqz_context_layer(context, l);
        const size_t heads = layer->shape.n_head_kv, rows = heads * layer->n_rows, dim = layer->shape.head_dim;
        for (size_t i = 0; i < rows; i++) sum += (uint64_t)info.tokens[layer->position[i]];
        sum += touch_rows(&layer->keys, rows, dim) + touch_rows(&layer->values, rows, dim) +
               touch_rows(&layer->retained_keys, rows, dim);
        for (uint32_t n = 0; n < layer->n_levels; n++)
            for (uint32_t head = 0; head < heads; head++)
                for (uint32_t c = 0; c < layer->level[n].n_clusters; c++) {
                    const size_t at = (size_t)head * layer->level[n].n_clusters + c;
                    sum += sqz_layer_cluster_rows(layer, head, n, c) + (layer->level[n].variance[at] > 0.0f);
                }
        for (uint32_t n = 0; n < layer->n_levels; n++)
            sum += touch_rows(&layer->level[n].centroids, heads * layer->level[n].n_clusters, dim) +
                   touch_rows(&layer->level[n].value_centroids, heads * layer->level[n].n_clusters, dim);
        for (uint32_t head = 0; head < heads; head++) {
            const float *threshold, *share, *lost;
            const size_t n = sqz_layer_curve(layer, head, &threshold, &share, &lost);
            for (size_t i = 0; i < n; i++)
                sum += (threshold[i] < 0) + (share[i] > 0) + (lost[i] > 0) +
                       (layer->tail_gain && layer->tail_gain[head * n + i] > 0) +
                       (layer->global_share && layer->global_share[i] > 0);
            sum += n && layer->variance_gain && layer->variance_gain[head] > 0;
        }
        for (size_t i = 0; i < (size_t)layer->n_queries * layer->shape.n_head * dim; i++) sum += layer->queries[i];
        const struct sqz_codes *codes = &layer->codes;
        for (size_t i = 0; i < heads * codes->n_words * (layer->n_rows - layer->n_fixed); i++) sum += codes->words[i];
        for (size_t head = 0; head < heads && codes->n_words; head++)
            for (uint32_t part = 0; part < 8 * codes->n_words; part++) {
                const uint32_t *first = codes->first + head * (8 * codes->n_words + 1);
                for (uint32_t i = first[part]; i < first[part + 1]; i++) {
                    const size_t at = head * codes->n_directions + i;
                    sum += codes->spread[at] > 0;
                    for (size_t e = 0; e < 16; e++) sum += codes->book[(head * 16 + e) * codes->n_directions + i];
                    for (size_t j = 0; j < dim; j++) sum += codes->directions[at * dim + j];
                }
            }
    }
    return sum;
}

/* Of everything that leads an access or a search, as an open context has it. */
static uint64_t steering_hash(const struct sqz_context *context)
{
    struct sqz_context_info info;
    XXH3_state_t state;
    XXH3_64bits_reset(&state);
    sqz_context_get_info(context, &info);
    XXH3_64bits_update(&state, info.tokens, info.n_tokens * sizeof *info.tokens);
    for (uint32_t l = 0; l < info.n_layer; l++) {
        const struct sqz_layer *layer = sqz_context_layer(context, l);
        const size_t heads = layer->shape.n_head_kv, points = layer->n_curve;
        for (uint32_t i = 0; i < layer->n_levels; i++) {
            const struct sqz_level *level = &layer->level[i];
            XXH3_64bits_update(&state, level->offset, heads * (level->n_clusters + 1) * 4);
            XXH3_64bits_update(&state, level->variance, heads * level->n_clusters * 4);
        }
        if (layer->codes.n_words) {
            XXH3_64bits_update(&state, layer->codes.first, heads * (8 * layer->codes.n_words + 1) * 4);
            XXH3_64bits_update(&state, layer->codes.spread, heads * layer->codes.n_directions * 4);
        }
        const float *const curves[] = {layer->log_threshold, layer->global_share, layer->share,
                                       layer->lost_mass,     layer->tail_gain,    layer->variance_gain};
        const size_t numbers[] = {points, points, heads * points, heads * points, heads * points, heads};
        for (size_t i = 0; i < sizeof curves / sizeof *curves; i++)
            if (curves[i]) XXH3_64bits_update(&state, curves[i], numbers[i] * sizeof(float));
    }
    return XXH3_64bits_digest(&state);
}

/* ---- Round trip ---------------------------------------------------------------------------- */

static void check_array(const char *what, uint32_t layer, const void *got, const void *wanted, size_t bytes)
{
    if (!got != !wanted) fail_msg("layer %u: %s is %s, wanted the opposite", layer, what, got ? "present" : "absent");
    if (!wanted) return;
    const uint8_t *a = got, *b = wanted;
    if ((uintptr_t)got % 64) fail_msg("layer %u: %s is not on a 64-byte boundary", layer, what);
    for (size_t i = 0; i < bytes; i++)
        if (a[i] != b[i]) fail_msg("layer %u: %s, byte %zu: got %02x, wanted %02x", layer, what, i, a[i], b[i]);
}

#define CHECK_FIELD(field)                                                                                             \
    do {                                                                                                               \
        if (!(got->field == wanted->field))                                                                            \
            fail_msg("layer %u: %s: got %g, wanted %g", index, #field, (double)got->field, (double)wanted->field);     \
    } while (0)

static void check_rows(const char *what, uint32_t index, const struct sqz_rows *got, const struct sqz_rows *wanted,
                       size_t n, size_t heads, size_t dim)
{
    if (got->type != wanted->type)
        fail_msg("layer %u: %s of type %s, wanted %s", index, what, sqz_row_type_name(got->type),
                 sqz_row_type_name(wanted->type));
    const struct sqz_planes *a = &got->planes, *b = &wanted->planes;
    const size_t rounded = heads * (n - b->n_whole);
    assert_int_equal(a->n_whole, b->n_whole);
    check_array(what, index, got->data, wanted->data, rounded * sqz_row_data_bytes(wanted->type, dim));
    check_array(what, index, a->lower, b->lower, rounded * sqz_plane_bytes(dim));
    check_array(what, index, a->step, b->step, rounded * sizeof *b->step);
    check_array(what, index, a->whole, b->whole, heads * b->n_whole * dim * sizeof *b->whole);
    assert_int_equal(a->centres.type, b->centres.type);
    assert_int_equal(a->centres.n, b->centres.n);
    check_array(what, index, a->centres.offset, b->centres.offset, heads * (b->centres.n + 1) * sizeof(uint32_t));
    check_array(what, index, a->centres.data, b->centres.data,
                heads * b->centres.n * sqz_row_data_bytes(b->centres.type, dim));
    check_array(what, index, got->scale, wanted->scale, heads * n * sizeof(float));
    check_array(what, index, got->mean, wanted->mean, heads * dim * sizeof(float));
}

static void check_layer(uint32_t index, const struct sqz_layer *got, const struct sqz_layer *wanted)
{
    const size_t heads = wanted->shape.n_head_kv, dim = wanted->shape.head_dim, points = wanted->n_curve;
    CHECK_FIELD(shape.n_head);
    CHECK_FIELD(shape.n_head_kv);
    CHECK_FIELD(shape.head_dim);
    CHECK_FIELD(shape.scale);
    CHECK_FIELD(n_rows);
    CHECK_FIELD(n_fixed);
    CHECK_FIELD(sliding_window);
    CHECK_FIELD(n_window_tokens);
    CHECK_FIELD(n_levels);
    CHECK_FIELD(rule);
    CHECK_FIELD(tail);
    CHECK_FIELD(value_skip);
    CHECK_FIELD(group);
    CHECK_FIELD(n_curve);
    CHECK_FIELD(n_queries);
    CHECK_FIELD(codes.n_words);
    CHECK_FIELD(codes.n_directions);
    check_rows("keys", index, &got->keys, &wanted->keys, wanted->n_rows, heads, dim);
    check_rows("values", index, &got->values, &wanted->values, wanted->n_rows, heads, dim);
    check_rows("retained keys", index, &got->retained_keys, &wanted->retained_keys, wanted->n_rows, heads, dim);
    check_array("position", index, got->position, wanted->position, heads * wanted->n_rows * 4);
    for (uint32_t i = 0; i < wanted->n_levels; i++) {
        const struct sqz_level *a = &got->level[i], *b = &wanted->level[i];
        assert_int_equal(a->n_clusters, b->n_clusters);
        check_rows("centroids", index, &a->centroids, &b->centroids, b->n_clusters, heads, dim);
        check_rows("value centroids", index, &a->value_centroids, &b->value_centroids, b->n_clusters, heads, dim);
        check_array("offset", index, a->offset, b->offset, heads * (b->n_clusters + 1) * 4);
        check_array("variance", index, a->variance, b->variance, heads * b->n_clusters * 4);
    }
    check_array("log_threshold", index, got->log_threshold, wanted->log_threshold, points * 4);
    check_array("share", index, got->share, wanted->share, heads * points * 4);
    check_array("lost_mass", index, got->lost_mass, wanted->lost_mass, heads * points * 4);
    check_array("tail_gain", index, got->tail_gain, wanted->tail_gain, heads * points * 4);
    check_array("variance_gain", index, got->variance_gain, wanted->variance_gain, heads * 4);
    check_array("global_share", index, got->global_share, wanted->global_share, points * 4);
    check_array("queries", index, got->queries, wanted->queries,
                (size_t)wanted->n_queries * wanted->shape.n_head * dim * 2);
    const struct sqz_codes *codes = &wanted->codes;
    const size_t directions = heads * codes->n_directions;
    check_array("code", index, got->codes.words, codes->words,
                heads * codes->n_words * (wanted->n_rows - wanted->n_fixed) * 4);
    check_array("code_direction", index, got->codes.directions, codes->directions, directions * dim * 2);
    check_array("code_book", index, got->codes.book, codes->book, 16 * directions * 2);
    check_array("code_first", index, got->codes.first, codes->first, heads * (8 * codes->n_words + 1) * 4);
    check_array("code_spread", index, got->codes.spread, codes->spread, directions * 4);
    assert_null(got->owned);
}

static void check_meta(const struct sqz_context_meta *got, const struct sqz_context_meta *wanted)
{
    assert_string_equal(got->model_name, wanted->model_name);
    assert_string_equal(got->model_architecture, wanted->model_architecture);
    assert_string_equal(got->model_fingerprint, wanted->model_fingerprint);
    assert_string_equal(got->source_name, wanted->source_name);
    assert_int_equal(got->n_tokens, wanted->n_tokens);
    assert_memory_equal(got->tokens, wanted->tokens, wanted->n_tokens * sizeof *wanted->tokens);
    assert_int_equal(got->has_template, wanted->has_template);
    assert_true(got->rope_scale == wanted->rope_scale);
    assert_int_equal(got->rope_factors, wanted->rope_factors);
    assert_int_equal(got->n_layer, wanted->n_layer);
    const struct sqz_squeeze_options *a = &got->squeeze, *b = &wanted->squeeze;
    assert_int_equal(a->size, sizeof *a);
    assert_memory_equal(a->centroid_share, b->centroid_share, sizeof a->centroid_share);
    assert_true(a->rule == b->rule && a->n_levels == b->n_levels && a->metric == b->metric && a->group == b->group &&
                a->index == b->index && a->keys == b->keys && a->rows == b->rows && a->code_words == b->code_words &&
                a->n_sinks == b->n_sinks && a->n_window == b->n_window && a->n_iterations == b->n_iterations &&
                a->center == b->center && a->variance == b->variance && a->per_head == b->per_head &&
                a->tail == b->tail && a->value_skip == b->value_skip && a->n_calibration == b->n_calibration &&
                a->seed == b->seed);
}

static void round_trip(enum sqz_index format, bool keys_alone, enum sqz_row_format rows)
{
    struct sqz_layer layers[N_SHAPES];
    struct sqz_error error = {SQZ_OK, ""};
    struct sqz_context_info info;
    uint64_t bytes = 0, kv_bytes = 0;
    random_state = 1;
    for (int i = 0; i < N_SHAPES; i++) {
        struct shape shape = shapes[i];
        shape.index = format;
        shape.keys_alone = keys_alone;
        shape.rows = rows;
        make_layer(&layers[i], &shape);
        kv_bytes +=
            (uint64_t)shapes[i].n_head_kv *
            (sqz_fixed_bytes(&layers[i]) + (shapes[i].n_rows - shapes[i].n_fixed) * sqz_row_pair_bytes(&layers[i]));
    }
    int32_t *tokens = some_tokens(40);
    struct sqz_context_meta meta = some_meta(tokens, 40, N_SHAPES);
    meta.squeeze.index = meta.squeeze.keys = format;
    meta.squeeze.rows = rows;
    if (rows) meta.squeeze.keys = SQZ_INDEX_F16;
    const char *path = in_directory("round.gguf");
    if (write_context(path, &meta, layers, &bytes, &error)) fail_msg("writing: %s", error.message);

    const enum sqz_verify modes[] = {SQZ_VERIFY_AUTO, SQZ_VERIFY_ALL, SQZ_VERIFY_INDEX};
    for (int mode = 0; mode < 3; mode++) {
        struct sqz_context_options options;
        struct sqz_context *context;
        sqz_context_options_default(&options);
        options.verify = modes[mode];
        if (sqz_context_open(&context, path, &options, &error))
            fail_msg("opening with verify %d: %s", mode, error.message);
        check_meta(sqz_context_get_meta(context), &meta);
        for (uint32_t i = 0; i < N_SHAPES; i++) check_layer(i, sqz_context_layer(context, i), &layers[i]);
        assert_null(sqz_context_layer(context, N_SHAPES));
        sqz_context_get_info(context, &info);
        assert_int_equal(info.n_layer, N_SHAPES);
        assert_int_equal(info.n_window_layers, 2);
        assert_int_equal(info.file_bytes, bytes);
        assert_int_equal(info.kv_bytes, kv_bytes);
        assert_int_equal(info.format_version, rows ? 4 : keys_alone ? 3 : 2);
        assert_int_equal(info.rounded_keys, keys_alone || rows);
        assert_true(info.index_bytes > 0 && info.index_bytes + info.kv_bytes < info.file_bytes);
        assert_int_equal(info.n_head, 1);
        assert_int_equal(info.head_dim, 32);
        assert_int_equal(info.squeeze.n_sinks, 16);
        assert_true(touch(context) > 0);
        sqz_context_free(context);
    }
    sqz_context_free(NULL);
    assert_int_equal(unlink(path), 0);
    for (int i = 0; i < N_SHAPES; i++) free_layer(&layers[i]);
    free(tokens);
}

static void test_round_trip(void **state)
{
    (void)state;
    round_trip(SQZ_INDEX_F16, false, SQZ_ROWS_F16);
    round_trip(SQZ_INDEX_INT8, false, SQZ_ROWS_F16); /* INT8 keys beside the F16 ones, as they were written once */
    round_trip(SQZ_INDEX_INT8, true, SQZ_ROWS_F16);
    round_trip(SQZ_INDEX_F16, false, SQZ_ROWS_INT4_4);
    round_trip(SQZ_INDEX_INT8, false, SQZ_ROWS_INT4_4);
    round_trip(SQZ_INDEX_INT8, false, SQZ_ROWS_INT4);
}

/* Each shape alone, so that a failure names it and layer 0 is not always dense. */
static void test_single_layers(void **state)
{
    struct sqz_error error = {SQZ_OK, ""};
    (void)state;
    for (uint32_t i = 0; i < N_SHAPES; i++) {
        struct sqz_layer layer;
        struct sqz_context *context = NULL;
        random_state = 100 + i;
        make_layer(&layer, &shapes[i]);
        int32_t *tokens = some_tokens(40);
        const struct sqz_context_meta meta = some_meta(tokens, 40, 1);
        const char *path = in_directory("single.gguf");
        if (write_context(path, &meta, &layer, NULL, &error) || sqz_context_open(&context, path, NULL, &error))
            fail_msg("shape %u: %s", i, error.message);
        check_layer(i, sqz_context_layer(context, 0), &layer);
        sqz_context_free(context);
        assert_int_equal(unlink(path), 0);
        free_layer(&layer);
        free(tokens);
    }
}

static void test_layer_facts(void **state)
{
    struct sqz_layer layer;
    struct sqz_layer_info info;
    const struct shape *s = &shapes[3];
    const float *threshold = NULL, *share = NULL, *lost = NULL;
    (void)state;
    random_state = 5;
    make_layer(&layer, s);
    sqz_layer_get_info(&layer, &info);
    assert_int_equal(info.n_rows, s->n_rows);
    assert_int_equal(info.n_fixed_rows, s->n_fixed);
    assert_int_equal(info.n_levels, 3);
    assert_int_equal(info.n_clusters[0], 23);
    assert_int_equal(info.n_clusters[2], 1);
    assert_int_equal(info.n_clusters[3], 0);
    for (uint32_t level = 0; level < 3; level++) { /* clusters of every level share out the same rows */
        size_t rows = 0;
        for (uint32_t c = 0; c < s->clusters[level]; c++) rows += sqz_layer_cluster_rows(&layer, 0, level, c);
        if (rows != s->n_rows - s->n_fixed)
            fail_msg("level %u: %zu rows in all clusters, wanted %u", level, rows, s->n_rows - s->n_fixed);
    }
    assert_int_equal(sqz_layer_cluster_rows(&layer, 0, 0, 4), layer.level[0].offset[5] - layer.level[0].offset[4]);
    assert_int_equal(sqz_layer_cluster_rows(&layer, 0, 1, 0), layer.level[0].offset[layer.level[1].offset[1]]);
    assert_int_equal(sqz_layer_cluster_rows(&layer, 1, 0, 0), 0);
    assert_int_equal(sqz_layer_cluster_rows(&layer, 0, 3, 0), 0);
    assert_int_equal(sqz_layer_cluster_rows(&layer, 0, 0, 23), 0);
    assert_int_equal(sqz_layer_curve(&layer, 0, &threshold, &share, &lost), 5);
    assert_ptr_equal(threshold, layer.log_threshold);
    assert_int_equal(sqz_layer_curve(&layer, 1, &threshold, &share, &lost), 0);
    assert_null(threshold);
    free_layer(&layer);
    make_layer(&layer, &shapes[1]);
    assert_int_equal(sqz_layer_curve(&layer, 2, NULL, &share, &lost), 9);
    assert_ptr_equal(share, layer.share + 18);
    assert_ptr_equal(lost, layer.lost_mass + 18);
    free_layer(&layer);
    make_layer(&layer, &shapes[0]);
    assert_int_equal(sqz_layer_curve(&layer, 0, &threshold, &share, &lost), 0);
    free_layer(&layer);
}

/* The file says in its own terms what docs/format.md promises: ggml's reader sees it too. */
/* Attends with every layer, at budgets that choose and at the dense one; the numbers mean nothing. */
static void attend_all(const struct sqz_context *context)
{
    struct sqz_context_info info;
    struct sqz_error error;
    sqz_context_get_info(context, &info);
    for (uint32_t l = 0; l < info.n_layer; l++) {
        const struct sqz_layer *layer = sqz_context_layer(context, l);
        const size_t n = (size_t)layer->shape.n_head * layer->shape.head_dim;
        float *query = random_f32(n, -1.0f, 1.0f), *out = take(n, sizeof *out);
        for (float budget = 0.25f; budget <= 1.0f; budget *= 2.0f)
            if (sqz_layer_attend(layer, query, 1, budget, out, NULL, 1, NULL, &error))
                fail_msg("layer %u, budget %g: %s", l, (double)budget, error.message);
        free(query);
        free(out);
    }
}

static void check_changed(const struct sqz_context *context, enum sqz_status wanted, const char *text)
{
    struct sqz_error error = {SQZ_OK, ""};
    const enum sqz_status status = sqz_context_check_unchanged(context, &error);
    if (status != wanted || error.status != wanted || !strstr(error.message, text))
        fail_msg("a file that changed: got %s '%s', wanted %s with '%s'", sqz_status_name(status), error.message,
                 sqz_status_name(wanted), text);
}

/* What steers is of the moment of opening, whatever is written over the file; and the change is seen. */
static void check_overwritten(const char *path, const struct image *image, uint8_t fill)
{
    struct sqz_context *context;
    struct sqz_error error = {SQZ_OK, ""};
    const int file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    assert_true(file >= 0);
    assert_int_equal(pwrite(file, image->bytes, image->size, 0), (ssize_t)image->size);
    /* Clocks of file systems are coarse: what was written was written some time ago. */
    const struct timespec past[2] = {{.tv_sec = 1000}, {.tv_sec = 1000}};
    assert_int_equal(futimens(file, past), 0);
    if (sqz_context_open(&context, path, NULL, &error)) fail_msg("a file to write over: %s", error.message);
    const uint64_t hash = steering_hash(context);
    check_changed(context, SQZ_OK, "");
    uint8_t *over = take(image->size, 1);
    memset(over, fill, image->size);
    assert_int_equal(pwrite(file, over, image->size, 0), (ssize_t)image->size);
    free(over);
    assert_true(steering_hash(context) == hash);
    attend_all(context);
    check_changed(context, SQZ_ERROR_IO, "changed while it was open: it was written to; open it again");
    assert_int_equal(sqz_context_squeeze(context, in_directory("again.gguf"), NULL, 1, NULL, &error), SQZ_ERROR_IO);
    assert_non_null(strstr(error.message, "changed while it was"));
    assert_int_equal(ftruncate(file, 64), 0);
    check_changed(context, SQZ_ERROR_IO, "bytes and has 64 now");
    sqz_context_free(context);
    close(file);
    assert_int_equal(unlink(path), 0);
}

static void test_changed_files(void **state)
{
    const struct image image = small_image();
    struct sqz_context *context;
    struct sqz_error error = {SQZ_OK, ""};
    char path[PATH_MAX + 64], other[PATH_MAX + 64];
    (void)state;
    snprintf(path, sizeof path, "%s", in_directory("open.gguf"));
    snprintf(other, sizeof other, "%s", in_directory("other.gguf"));
    const size_t before = directory_entries();
    check_overwritten(path, &image, 0xff);
    check_overwritten(path, &image, 0x00);
    check_overwritten(path, &image, 0x7f);
    assert_int_equal(directory_entries(), before);

    /* Another file of the name, and no name at all, are fine: this one is as it was. */
    for (int i = 0; i < 2; i++) {
        FILE *file = fopen(i ? other : path, "wb");
        assert_non_null(file);
        assert_int_equal(fwrite(image.bytes, 1, image.size, file), image.size);
        assert_int_equal(fclose(file), 0);
    }
    if (sqz_context_open(&context, path, NULL, &error)) fail_msg("a file that stays: %s", error.message);
    assert_int_equal(rename(other, path), 0);
    check_changed(context, SQZ_OK, "");
    assert_int_equal(unlink(path), 0);
    check_changed(context, SQZ_OK, "");
    assert_true(touch(context) > 0);
    sqz_context_free(context);
    free(image.bytes);
}

/* ---- Pages that are lost ------------------------------------------------------------------------ */

static _Atomic int n_lost;

static void lose_page(int number, siginfo_t *information, void *unused)
{
    (void)unused;
    n_lost++;
    if (!sqz_context_page_lost(information->si_addr)) signal(number, SIG_DFL);
}

/* What a program does that lives on: sqz_context_page_lost() in its handler. */
static void handle_lost_pages(bool handled)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    if (handled) action.sa_sigaction = lose_page, action.sa_flags = SA_SIGINFO;
    else action.sa_handler = SIG_DFL;
    assert_int_equal(sigaction(SIGBUS, &action, NULL), 0);
}

/* Keys and values are read as zeros, once and for all, and the context stays refused when the file has its size and
 * time again; another one that is open is as it was. Of maps that are closed nothing is ours. */
static void test_lost_pages(void **state)
{
    const struct image image = small_image();
    struct sqz_context *context, *other;
    struct sqz_error error = {SQZ_OK, ""};
    char path[PATH_MAX + 64], other_path[PATH_MAX + 64];
    const struct timespec past[2] = {{.tv_sec = 1000}, {.tv_sec = 1000}};
    (void)state;
    snprintf(path, sizeof path, "%s", in_directory("lost.gguf"));
    snprintf(other_path, sizeof other_path, "%s", in_directory("kept.gguf"));
    const char *const paths[] = {path, other_path};
    for (int i = 0; i < 2; i++) {
        const int file = open(paths[i], O_RDWR | O_CREAT | O_TRUNC, 0600);
        assert_true(file >= 0);
        assert_int_equal(pwrite(file, image.bytes, image.size, 0), (ssize_t)image.size);
        assert_int_equal(futimens(file, past), 0);
        close(file);
        if (sqz_context_open(i ? &other : &context, paths[i], NULL, &error))
            fail_msg("%s: %s", paths[i], error.message);
    }
    handle_lost_pages(true);
    n_lost = 0;
    assert_int_equal(truncate(path, 0), 0);
    attend_all(context);
    attend_all(other);
    assert_int_equal(n_lost, 1);
    check_changed(context, SQZ_ERROR_IO, "lost.gguf: the context file changed while it was open: it had");
    assert_int_equal(truncate(path, (off_t)image.size), 0);
    assert_int_equal(utimensat(AT_FDCWD, path, past, 0), 0);
    check_changed(context, SQZ_ERROR_IO, "lost.gguf: a part of the context file could not be read");
    assert_int_equal(sqz_context_squeeze(context, in_directory("again.gguf"), NULL, 1, NULL, &error), SQZ_ERROR_IO);
    check_changed(other, SQZ_OK, "");
    assert_true(touch(other) > 0);
    const void *inside = sqz_context_layer(other, 0)->keys.data;
    sqz_context_free(context);
    sqz_context_free(other);
    assert_false(sqz_context_page_lost(inside));
    assert_false(sqz_context_page_lost(NULL));
    handle_lost_pages(false);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(unlink(other_path), 0);
    free(image.bytes);
}

static void test_other_readers(void **state)
{
    const struct image image = small_image();
    struct gguf_context *gguf = parse(&image);
    (void)state;
    assert_int_equal(gguf_get_alignment(gguf), 64);
    assert_string_equal(gguf_get_val_str(gguf, gguf_find_key(gguf, "general.architecture")), "squeeze-context");
    assert_int_equal(gguf_get_val_u32(gguf, gguf_find_key(gguf, "squeeze.version")), 2);
    const int64_t key = gguf_find_tensor(gguf, "blk.0.key");
    assert_true(key >= 0);
    assert_int_equal(gguf_get_tensor_type(gguf, key), GGML_TYPE_F16);
    assert_int_equal(gguf_get_tensor_ne(gguf, key)[0], 32);
    assert_int_equal(gguf_get_tensor_ne(gguf, key)[1], 12);
    assert_true(gguf_find_tensor(gguf, "blk.0.value_centroid.1") >= 0);
    assert_true(gguf_find_tensor(gguf, "blk.0.centroid.2") < 0);
    /* 10 clustered rows with 2 words each; 3 directions in 16 parts. */
    static const struct {
        const char *name;
        enum ggml_type type;
        int64_t dimensions[3];
    } tensors[] = {{"blk.0.code", GGML_TYPE_I32, {10, 2, 1}},
                   {"blk.0.code_direction", GGML_TYPE_F16, {32, 3, 1}},
                   {"blk.0.code_book", GGML_TYPE_F16, {3, 16, 1}},
                   {"blk.0.code_first", GGML_TYPE_I32, {17, 1, 1}},
                   {"blk.0.code_spread", GGML_TYPE_F32, {3, 1, 1}}};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        const int64_t id = gguf_find_tensor(gguf, tensors[i].name);
        assert_true(id >= 0);
        assert_int_equal(gguf_get_tensor_type(gguf, id), tensors[i].type);
        for (int j = 0; j < 3; j++) assert_int_equal(gguf_get_tensor_ne(gguf, id)[j], tensors[i].dimensions[j]);
    }
    gguf_free(gguf);
    free(image.bytes);
}

/* ---- Damage ----------------------------------------------------------------------------------- */

static void test_every_flip(void **state)
{
    static const uint8_t masks[] = {0x01, 0x80, 0xff};
    const struct image image = small_image();
    size_t n = 0;
    (void)state;
    set_memory(image.bytes, image.size);
    check_opens("the small file");
    for (size_t i = 0; i < image.size; i++)
        for (size_t m = 0; m < sizeof masks; m++) {
            struct sqz_context *context;
            struct sqz_error error = {SQZ_OK, ""};
            const uint8_t flipped = image.bytes[i] ^ masks[m];
            assert_int_equal(pwrite(memory_file, &flipped, 1, (off_t)i), 1);
            const enum sqz_status status = open_memory(&context, SQZ_VERIFY_ALL, &error);
            if ((status != SQZ_ERROR_FORMAT && status != SQZ_ERROR_UNSUPPORTED) || !error.message[0])
                fail_msg("byte %zu of %zu, mask %02x: got %s '%s', wanted SQZ_ERROR_FORMAT", i, image.size, masks[m],
                         sqz_status_name(status), error.message);
            assert_int_equal(pwrite(memory_file, &image.bytes[i], 1, (off_t)i), 1);
            n++;
        }
    check_opens("the small file again");
    print_message("%zu single-byte changes of a file of %zu bytes refused\n", n, image.size);
    free(image.bytes);
}

static void test_every_truncation(void **state)
{
    const struct image image = small_image();
    (void)state;
    set_memory(image.bytes, image.size);
    for (size_t size = image.size; size-- > 0;) {
        struct sqz_context *context;
        struct sqz_error error = {SQZ_OK, ""};
        assert_int_equal(ftruncate(memory_file, (off_t)size), 0);
        const enum sqz_status status = open_memory(&context, SQZ_VERIFY_INDEX, &error);
        if (status != SQZ_ERROR_FORMAT)
            fail_msg("cut to %zu of %zu bytes: got %s '%s'", size, image.size, sqz_status_name(status), error.message);
    }
    check_refused("cut to nothing", SQZ_ERROR_FORMAT, "is empty");
    set_memory(image.bytes, image.size - 100);
    char text[64];
    snprintf(text, sizeof text, "%zu bytes expected, %zu found", image.size, image.size - 100);
    check_refused("the last 100 bytes missing", SQZ_ERROR_FORMAT, text);

    uint8_t *longer = take(image.size + 64, 1);
    memcpy(longer, image.bytes, image.size);
    set_memory(longer, image.size + 64);
    check_refused("64 bytes too many", SQZ_ERROR_FORMAT, "64 bytes after its end");
    free(longer);
    free(image.bytes);
}

/* Damage in keys is seen by ALL and, as documented, not by INDEX; damage in the index by both, with its name. */
static void test_verify_modes(void **state)
{
    const struct image image = small_image();
    struct gguf_context *gguf = parse(&image);
    static const struct {
        const char *name;
        bool bulk;
    } tensors[] = {{"blk.0.key", true},
                   {"blk.0.value", true},
                   {"blk.0.centroid.0", false},
                   {"blk.0.query", false},
                   {"tokens", false}};
    (void)state;
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        const int64_t id = gguf_find_tensor(gguf, tensors[i].name);
        const size_t at = gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, id);
        image.bytes[at] ^= 1;
        set_memory(image.bytes, image.size);
        image.bytes[at] ^= 1;
        check_refused(tensors[i].name, SQZ_ERROR_FORMAT, tensors[i].name);
        struct sqz_context *context;
        struct sqz_error error = {SQZ_OK, ""};
        const enum sqz_status status = open_memory(&context, SQZ_VERIFY_INDEX, &error);
        if ((status == SQZ_OK) != tensors[i].bulk)
            fail_msg("%s damaged, verify INDEX: got %s '%s'", tensors[i].name, sqz_status_name(status), error.message);
        sqz_context_free(context);
    }
    gguf_free(gguf);
    free(image.bytes);
}

struct plant {
    const char *what, *after; /* NULL: from the start of the file */
    size_t at, bytes;
};

/* Numbers far too large where the reader takes counts from; the checksum is right, so only the bounds can refuse. */
static void test_huge_counts(void **state)
{
    static const struct plant plants[] = {
        {"n_tensors", NULL, 8, 8},
        {"n_kv", NULL, 16, 8},
        {"length of the first key", NULL, 24, 8},
        {"length of a string", "squeeze.model.name", 4, 8},
        {"length of an array", "squeeze.checksum.tensors", 8, 8},
        {"length of an array of layers", "squeeze.layer.row_count", 8, 8},
        {"number of tokens", "squeeze.token_count", 4, 4},
        {"number of layers", "squeeze.layer_count", 4, 4},
        {"rows", "squeeze.layer.row_count", 16, 4},
        {"heads", "squeeze.layer.head_count", 16, 4},
        {"levels", "squeeze.layer.level_count", 16, 4},
        {"clusters", "squeeze.layer.cluster_count", 16, 4},
        {"curve points", "squeeze.layer.curve_count", 16, 4},
        {"queries", "squeeze.layer.query_count", 16, 4},
        {"dimensions of a tensor", "blk.0.key", 0, 4},
        {"first dimension", "blk.0.key", 4, 8},
        {"second dimension", "blk.0.key", 12, 8},
        {"offset of a tensor", "blk.0.key", 24, 8},
        {"first dimension of tokens", "tokens", 4, 8},
    };
    static const uint64_t values[] = {UINT64_MAX, INT64_MAX, (uint64_t)1 << 62, (uint64_t)1 << 40,
                                      UINT32_MAX, INT32_MAX, 0x10001,           0};
    const struct image original = small_image();
    struct gguf_context *gguf = parse(&original);
    struct image image = {take(original.size, 1), original.size};
    struct rusage before, after;
    (void)state;
    getrusage(RUSAGE_SELF, &before);
    const clock_t start = clock();
    for (size_t p = 0; p < sizeof plants / sizeof *plants; p++)
        for (size_t v = 0; v < sizeof values / sizeof *values; v++) {
            memcpy(image.bytes, original.bytes, original.size);
            uint8_t *base = plants[p].after ? after_key(&image, plants[p].after) : image.bytes;
            assert_non_null(base);
            if (!memcmp(base + plants[p].at, &values[v], plants[p].bytes)) continue;
            if (!strcmp(plants[p].what, "queries") && !(uint32_t)values[v])
                continue; /* no queries are allowed; their tensor is then one that nobody asks for */
            memcpy(base + plants[p].at, &values[v], plants[p].bytes);
            seal(&image, gguf);
            set_memory(image.bytes, image.size);
            struct sqz_context *context;
            struct sqz_error error = {SQZ_OK, ""};
            const enum sqz_status status = open_memory(&context, SQZ_VERIFY_ALL, &error);
            if (status != SQZ_ERROR_FORMAT)
                fail_msg("%s = %llx: got %s '%s', wanted SQZ_ERROR_FORMAT", plants[p].what,
                         (unsigned long long)values[v], sqz_status_name(status), error.message);
        }
    const double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
    getrusage(RUSAGE_SELF, &after);
    if (!(seconds < 5.0 && after.ru_maxrss - before.ru_maxrss < 64 * 1024))
        fail_msg("planted counts took %g s and %ld KiB", seconds, after.ru_maxrss - before.ru_maxrss);
    gguf_free(gguf);
    free(image.bytes);
    free(original.bytes);
}

/* Every key in turn missing, then with another type. general.alignment cannot be changed through gguf.h. */
static void test_keys(void **state)
{
    const struct image original = small_image();
    struct gguf_context *gguf = parse(&original);
    const int64_t n = gguf_get_n_kv(gguf);
    (void)state;
    for (int64_t i = 0; i < n; i++) {
        char key[128];
        snprintf(key, sizeof key, "%s", gguf_get_key(gguf, i));
        if (!strcmp(key, "general.alignment")) continue;
        for (int type = 0; type < 3; type++) {
            const float wrong[] = {1.0f, 2.0f};
            struct gguf_context *changed = parse(&original);
            gguf_remove_key(changed, key);
            if (type == 1) gguf_set_arr_data(changed, key, GGUF_TYPE_FLOAT32, wrong, 2);
            if (type == 2) gguf_set_val_i64(changed, key, 1);
            struct image image = rebuild(changed, &original, gguf);
            set_memory(image.bytes, image.size);
            if (type == 0 && !strcmp(key, "squeeze.rope_factors")) check_opens("without the optional key");
            else check_refused(key, SQZ_ERROR_FORMAT, "");
            free(image.bytes);
            gguf_free(changed);
        }
    }

    struct gguf_context *changed = parse(&original);
    const char *strings[] = {"a", "b"};
    gguf_set_val_f64(changed, "squeeze.future", 1.5);
    gguf_set_arr_str(changed, "general.tags", strings, 2);
    struct image image = rebuild(changed, &original, gguf);
    set_memory(image.bytes, image.size);
    check_opens("unknown keys");
    free(image.bytes);

    gguf_set_val_u32(changed, "squeeze.version", 7);
    image = rebuild(changed, &original, gguf);
    set_memory(image.bytes, image.size);
    check_refused("version 7", SQZ_ERROR_UNSUPPORTED, "version 7; this build reads versions 2 to 6");
    free(image.bytes);

    /* A whole file of version 1, which knew no codes: its version is what is said of it, not what it lacks. */
    static const char *const newer[] = {"squeeze.option.code_words", "squeeze.layer.code_words",
                                        "squeeze.layer.code_directions"};
    struct gguf_context *older = parse(&original);
    for (size_t i = 0; i < sizeof newer / sizeof *newer; i++) assert_true(gguf_remove_key(older, newer[i]) >= 0);
    gguf_set_val_u32(older, "squeeze.version", 1);
    image = rebuild(older, &original, gguf);
    set_memory(image.bytes, image.size);
    check_refused(
        "version 1", SQZ_ERROR_UNSUPPORTED,
        "version 1; this build reads versions 2 to 6; use a build that knows it, or prepare the document again");
    gguf_free(older);
    free(image.bytes);
    gguf_set_val_u32(changed, "squeeze.version", 0);
    image = rebuild(changed, &original, gguf);
    set_memory(image.bytes, image.size);
    check_refused("version 0", SQZ_ERROR_FORMAT, "version 0");
    free(image.bytes);
    gguf_free(changed);

    /* Alignment, and a key twice, by hand. */
    image = (struct image){take(original.size, 1), original.size};
    memcpy(image.bytes, original.bytes, original.size);
    after_key(&image, "general.alignment")[4] = 32;
    seal(&image, gguf);
    set_memory(image.bytes, image.size);
    check_refused("alignment 32", SQZ_ERROR_FORMAT, "general.alignment is 32; allowed: 64");
    memcpy(image.bytes, original.bytes, original.size);
    memcpy(after_key(&image, "general.alignment") - 9, "alignmend", 9); /* then GGUF's default would hold */
    seal(&image, gguf);
    set_memory(image.bytes, image.size);
    check_refused("no alignment", SQZ_ERROR_FORMAT, "general.alignment is missing");
    memcpy(image.bytes, original.bytes, original.size);
    memcpy(after_key(&image, "squeeze.option.center") - 6, "metric", 6);
    seal(&image, gguf);
    set_memory(image.bytes, image.size);
    check_refused("a key twice", SQZ_ERROR_FORMAT, "key squeeze.option.metric stands there twice");
    memcpy(image.bytes, original.bytes, original.size);
    memcpy(after_key(&image, "blk.0.query") - 5, "share", 5);
    seal(&image, gguf);
    set_memory(image.bytes, image.size);
    check_refused("a tensor twice", SQZ_ERROR_FORMAT, "tensor blk.0.share stands there twice");
    free(image.bytes);
    gguf_free(gguf);
    free(original.bytes);
}

/* Range checks of the metadata, one value at a time. */
static void test_values(void **state)
{
    static const struct {
        const char *key;
        uint32_t value;
        const char *text;
    } values[] = {
        {"squeeze.option.rule", 2, "option rule is 2"},
        {"squeeze.option.metric", 2, "option metric is 2"},
        {"squeeze.option.group", 9, "option group is 9"},
        {"squeeze.option.index", 2, "option index is 2"},
        {"squeeze.option.keys", 2, "option keys is 2"},
        {"squeeze.option.level_count", 9, "option n_levels is 9; allowed: 0 to 8"},
        {"squeeze.option.iterations", 1001, "option n_iterations is 1001"},
        {"squeeze.option.code_words", 5, "option code_words is 5; allowed: 0 to 4"},
        {"squeeze.option.code_words", 0xffffffff, "option code_words is 4294967295"},
        {"squeeze.rope_scale", 0x7fc00000, "rope_scale is nan"},
        {"squeeze.rope_scale", 0xbf800000, "rope_scale is -1"},
        {"squeeze.rope_scale", 0, "rope_scale is 0; allowed: 1 to 64"},
        {"squeeze.rope_scale", 0x0da24260, "rope_scale is 1e-30; allowed: 1 to 64"},
        {"squeeze.rope_scale", 0x7f61b1e6, "rope_scale is 3e+38; allowed: 1 to 64"},
        {"squeeze.rope_scale", 0x42800001, "allowed: 1 to 64"},
        {"squeeze.rope_scale", 0x7f800000, "rope_scale is inf"},
        {"squeeze.rope_factors", 0, "rope_factors is 0; allowed: 1 to 3"},
        {"squeeze.rope_factors", 4, "rope_factors is 4; allowed: "},
        {"squeeze.layer_count", 0, "the number of layers is 0; allowed: 1 to 1024"},
    };
    static const struct {
        const char *key;
        uint32_t value;
        const char *text;
    } columns[] = {
        {"squeeze.layer.head_dim", 33, "head dimension 33"},
        {"squeeze.layer.head_dim", 272, "head dimension 272"},
        {"squeeze.layer.head_count_kv", 0, "0 key-value heads"},
        {"squeeze.layer.head_count", 0, "0 query heads"},
        {"squeeze.layer.scale", 0x7f800000, "scale is inf"},
        {"squeeze.layer.scale", 0, "scale is 0"},
        {"squeeze.layer.row_count", 11, "11 rows; allowed: 12"},
        {"squeeze.layer.fixed_count", 13, "13 fixed rows"},
        {"squeeze.layer.level_count", 3, "level 2: 0 clusters"},
        {"squeeze.layer.group", 2, "group is 2"},
        {"squeeze.layer.curve_count", 0, "0 curve points"},
        {"squeeze.layer.curve_count", 4, "tensor blk.0.threshold"},
        {"squeeze.layer.query_count", 2, "tensor blk.0.query"},
        {"squeeze.layer.code_words", 5, "5 words of code; allowed: 0 to 4"},
        {"squeeze.layer.code_words", 0x80000000, "2147483648 words of code; allowed: 0 to 4"},
        {"squeeze.layer.code_words", 0, "3 directions of codes; allowed: 0 without codes"},
        {"squeeze.layer.code_words", 1, "tensor blk.0.code"},
        {"squeeze.layer.code_directions", 0, "0 directions of codes; allowed: 1 to the head dimension"},
        {"squeeze.layer.code_directions", 33, "33 directions of codes; allowed: 1 to the head dimension"},
        {"squeeze.layer.code_directions", 0xffffffff, "directions of codes"},
        {"squeeze.layer.code_directions", 4, "tensor blk.0.code_direction"},
    };
    const struct image original = small_image();
    struct gguf_context *gguf = parse(&original);
    struct image image = {take(original.size, 1), original.size};
    (void)state;
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        memcpy(image.bytes, original.bytes, original.size);
        memcpy(after_key(&image, values[i].key) + 4, &values[i].value, 4);
        seal(&image, gguf);
        set_memory(image.bytes, image.size);
        check_refused(values[i].key, SQZ_ERROR_FORMAT, values[i].text);
    }
    for (size_t i = 0; i < sizeof columns / sizeof *columns; i++) {
        uint8_t tag[64]; /* head_count is the beginning of head_count_kv: look for the whole key with what follows */
        const uint32_t types[2] = {GGUF_TYPE_ARRAY,
                                   strstr(columns[i].key, "scale") ? GGUF_TYPE_FLOAT32 : GGUF_TYPE_UINT32};
        const size_t key_bytes = strlen(columns[i].key);
        memcpy(tag, columns[i].key, key_bytes);
        memcpy(tag + key_bytes, types, 8);
        memcpy(image.bytes, original.bytes, original.size);
        uint8_t *at = memmem(image.bytes, image.size, tag, key_bytes + 8);
        assert_non_null(at);
        memcpy(at + key_bytes + 16, &columns[i].value, 4);
        seal(&image, gguf);
        set_memory(image.bytes, image.size);
        check_refused(columns[i].key, SQZ_ERROR_FORMAT, columns[i].text);
    }
    gguf_free(gguf);
    free(image.bytes);
    free(original.bytes);
}

/* Layer 0's number of an array with one u32 a layer. */
static void set_column(const struct image *image, const char *key, uint32_t value)
{
    uint8_t *at = after_key(image, key);
    assert_non_null(at);
    memcpy(at + 16, &value, 4);
}

/* The rows of a sliding window are those that it sees, no more and no fewer, for the reader and for the writer. */
static void test_window_rows(void **state)
{
    static const struct {
        uint32_t shape, window;
    } wrong[] = {
        {4, 1}, {4, 10}, {4, 12}, {4, 40}, {4, 0xffffffff}, {4, 0}, {5, 1}, {5, 39},
    };
    struct sqz_error error = {SQZ_OK, ""};
    const char *path = in_directory("window.gguf");
    (void)state;
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        struct sqz_layer layer;
        struct sqz_context_writer *writer;
        make_layer(&layer, &shapes[wrong[i].shape]);
        int32_t *tokens = some_tokens(40);
        const struct sqz_context_meta meta = some_meta(tokens, 40, 1);
        if (write_context(path, &meta, &layer, NULL, &error)) fail_msg("a window that agrees: %s", error.message);
        struct image image = load(path);
        struct gguf_context *gguf = parse(&image);
        set_column(&image, "squeeze.layer.window_tokens", wrong[i].window);
        seal(&image, gguf);
        set_memory(image.bytes, image.size);
        check_refused("window_tokens", SQZ_ERROR_FORMAT,
                      wrong[i].window ? "rows with a sliding window of" : "0 tokens");
        layer.n_window_tokens = wrong[i].window;
        assert_int_equal(sqz_context_writer_create(&writer, path, &meta, &layer, &error), SQZ_ERROR_ARGUMENT);
        assert_null(writer);
        gguf_free(gguf);
        free(image.bytes);
        free(tokens);
        free_layer(&layer);
    }
    assert_int_equal(unlink(path), 0);
}

/* ---- Marks in folders ----------------------------------------------------------------------------- */

static void test_folder_mark(void **state)
{
    struct sqz_folder_mark mark;
    struct sqz_error error = {SQZ_OK, ""};
    const char *path = in_directory("not-there.gguf");
    (void)state;
    assert_int_equal(sqz_folder_mark_make(&mark, path, &error), SQZ_OK);
    assert_true(sqz_folder_mark_is_seen(path, mark.name));
    assert_false(sqz_folder_mark_is_seen("/not-there.gguf", mark.name));
    assert_false(sqz_folder_mark_is_seen(in_directory("none/not-there.gguf"), mark.name));
    char name[SQZ_UNFINISHED_NAME_BYTES];
    memcpy(name, mark.name, sizeof name);
    sqz_folder_mark_remove(&mark);
    assert_false(sqz_folder_mark_is_seen(in_directory("not-there.gguf"), name));
    assert_int_equal(sqz_folder_mark_make(&mark, in_directory("none/not-there.gguf"), &error), SQZ_ERROR_IO);
    assert_non_null(strstr(error.message, "No such file or directory"));
    sqz_folder_mark_remove(&mark);
}

/* ---- Windows in shards -------------------------------------------------------------------------- */

/* 40 tokens in blocks of 8: 24 are the first shard's, which also has the last 11 rows of the second layer. */
enum { WHOLE = 40, PART = 24, OTHER_PART = 16, WINDOW_ROWS = 11 };

struct shard_scene {
    struct sqz_layer layers[2][2]; /* of each shard; the second one's window has no rows */
    int32_t *tokens, *part[2];
    struct sqz_context_meta meta[3]; /* of the shards, of the index */
    const char *names[2];
    uint64_t checksums[2];
};

static void make_shard_scene(struct shard_scene *s)
{
    const struct shape window = {.n_head = 2,
                                 .n_head_kv = 2,
                                 .head_dim = 32,
                                 .n_tokens = WHOLE,
                                 .n_rows = WINDOW_ROWS,
                                 .n_fixed = WINDOW_ROWS,
                                 .sliding = true};
    random_state = 12;
    s->tokens = some_tokens(WHOLE);
    s->names[0] = "window-1.gguf", s->names[1] = "window-2.gguf";
    for (uint32_t i = 0; i < 2; i++) {
        const uint32_t n = i ? OTHER_PART : PART;
        const struct shape dense = {
            .n_head = 2, .n_head_kv = 1, .head_dim = 32, .n_tokens = n, .n_rows = n, .n_fixed = n};
        make_layer(&s->layers[i][0], &dense);
        make_layer(&s->layers[i][1], &window);
        if (i) s->layers[i][1].n_rows = s->layers[i][1].n_fixed = 0;
        s->part[i] = take(n, sizeof *s->part[i]);
        for (uint32_t t = 0; t < n; t++) s->part[i][t] = s->tokens[(2 * (t / 8) + i) * 8 + t % 8];
        s->meta[i] = some_meta(s->part[i], n, 2);
    }
    s->meta[2] = some_meta(s->tokens, WHOLE, 2);
    for (uint32_t i = 0; i < 3; i++)
        s->meta[i].shard = (struct sqz_shard_place){.count = 2,
                                                    .number = (i + 1) % 3,
                                                    .block_tokens = 8,
                                                    .n_tokens = WHOLE,
                                                    .files = s->names,
                                                    .checksums = s->checksums};
}

static void free_shard_scene(struct shard_scene *s)
{
    for (uint32_t i = 0; i < 2; i++) {
        free_layer(&s->layers[i][0]);
        free_layer(&s->layers[i][1]);
        free(s->part[i]);
    }
    free(s->tokens);
}

static enum sqz_status write_shard(struct shard_scene *s, uint32_t i, struct sqz_error *error)
{
    struct sqz_context_writer *writer;
    enum sqz_status status =
        sqz_context_writer_create(&writer, in_directory(s->names[i]), &s->meta[i], s->layers[i], error);
    if (status) return status;
    sqz_context_writer_tell_checksum(writer, &s->checksums[i]);
    for (uint32_t l = 0; l < 2 && !status; l++)
        status = sqz_context_writer_put_layer(writer, l, &s->layers[i][l], error);
    if (!status) return sqz_context_writer_commit(writer, NULL, error);
    sqz_context_writer_abort(writer);
    return status;
}

/* Both shards, then the index, then all of it opened. */
static enum sqz_status open_scene(struct shard_scene *s, struct sqz_context **context, struct sqz_error *error)
{
    struct sqz_context_writer *writer;
    enum sqz_status status;
    *context = NULL;
    if ((status = write_shard(s, 0, error)) || (status = write_shard(s, 1, error)) ||
        (status = sqz_context_writer_create(&writer, in_directory("window.gguf"), &s->meta[2], NULL, error)) ||
        (status = sqz_context_writer_commit(writer, NULL, error)))
        return status;
    return sqz_context_open(context, in_directory("window.gguf"), NULL, error);
}

static void check_scene(const char *what, struct shard_scene *s, enum sqz_status wanted, const char *text)
{
    struct sqz_error error = {SQZ_OK, ""};
    struct sqz_context *context;
    const enum sqz_status status = open_scene(s, &context, &error);
    if (status != wanted || context || !strstr(error.message, text))
        fail_msg("%s: got %s '%s', wanted %s with '%s'", what, sqz_status_name(status), error.message,
                 sqz_status_name(wanted), text);
}

/* sqz_context_kind() of the scene as rank `rank` of 2 opens it, which has one of the shards. */
static uint64_t kind_at(struct shard_scene *s, uint32_t rank)
{
    struct sqz_error error = {SQZ_OK, ""};
    struct sqz_context *context;
    sqz_shards_hold(2, rank);
    const enum sqz_status status = open_scene(s, &context, &error);
    sqz_shards_hold(1, 0);
    if (status) fail_msg("a shard of two at rank %u: %s", rank, error.message);
    const uint64_t kind = sqz_context_kind(context);
    sqz_context_free(context);
    return kind;
}

/* A shard by itself is fine, but not beside its index or the other shard. */
static void check_unlike_shards(struct shard_scene *s)
{
    const char *const another = "window-2.gguf is a shard of another context", *const unlike =
                                                                                   "window-2.gguf has another layer 0";
    struct sqz_context_meta *meta = &s->meta[1];
    struct sqz_layer *layer = &s->layers[1][0];
    assert_true(kind_at(s, 0) == kind_at(s, 1));
    meta->has_template ^= true;
    check_scene("another template", s, SQZ_ERROR_FORMAT, another);
    meta->has_template ^= true;
    meta->rope_scale *= 2;
    check_scene("another RoPE scale", s, SQZ_ERROR_FORMAT, another);
    meta->rope_scale /= 2;
    meta->squeeze.seed++;
    check_scene("other options", s, SQZ_ERROR_FORMAT, another);
    meta->squeeze.seed--;
    layer->group ^= 1;
    check_scene("another group", s, SQZ_ERROR_FORMAT, unlike);
    assert_true(kind_at(s, 0) != kind_at(s, 1));
    layer->group ^= 1;
    layer->value_skip ^= true;
    check_scene("values that are skipped", s, SQZ_ERROR_FORMAT, unlike);
    assert_true(kind_at(s, 0) != kind_at(s, 1));
    layer->value_skip ^= true;
    layer->shape.scale *= 2;
    check_scene("another scale", s, SQZ_ERROR_FORMAT, unlike);
    assert_true(kind_at(s, 0) != kind_at(s, 1));
    layer->shape.scale /= 2;
}

static void test_windows_in_shards(void **state)
{
    struct shard_scene s;
    struct sqz_error error = {SQZ_OK, ""};
    struct sqz_context_info info;
    struct sqz_context *context;
    (void)state;
    make_shard_scene(&s);
    if (open_scene(&s, &context, &error)) fail_msg("windows in shards: %s", error.message);
    sqz_context_get_info(context, &info);
    assert_int_equal(info.format_version, 6);
    assert_int_equal(info.n_shards, 2);
    assert_int_equal(info.n_window_layers, 1);
    assert_int_equal(info.kv_bytes, 4 * 32 * WHOLE + 2 * 4 * 32 * WINDOW_ROWS);
    const struct sqz_layer *view = sqz_context_layer(context, 1);
    assert_true(view->sliding_window && view->n_rows == WINDOW_ROWS && view->n_window_tokens == WINDOW_ROWS);
    assert_int_equal(sqz_context_layer(context, 0)->n_rows, WHOLE);
    for (uint32_t l = 0; l < 2; l++)
        check_layer(l, sqz_context_layer(sqz_context_shard(context, 0), l), &s.layers[0][l]);
    const struct sqz_layer *none = sqz_context_layer(sqz_context_shard(context, 1), 1);
    assert_true(none->sliding_window && none->n_rows == 0 && !none->keys.data && !none->values.data && !none->position);
    assert_int_equal(sqz_meta_text_tokens(sqz_context_get_meta(sqz_context_shard(context, 1))), WHOLE);
    sqz_context_free(context);

    /* What the writer refuses. */
    s.meta[0].shard.n_tokens = 60;
    check_scene("another whole", &s, SQZ_ERROR_ARGUMENT,
                "24 tokens in part 1 of a context of 60 tokens in 2 shards; allowed: 32");
    s.meta[0].shard.n_tokens = 41;
    check_scene("a window that ends elsewhere", &s, SQZ_ERROR_ARGUMENT, "position of row 0 is 29; allowed: 30");
    s.meta[0].shard.n_tokens = WHOLE;
    s.layers[0][1].n_rows = s.layers[0][1].n_fixed = WINDOW_ROWS - 1;
    check_scene("too few rows", &s, SQZ_ERROR_ARGUMENT, "10 rows with a sliding window of 11 tokens; allowed: 11");
    s.layers[0][1].n_rows = s.layers[0][1].n_fixed = WINDOW_ROWS;
    s.layers[1][1].n_rows = s.layers[1][1].n_fixed = WINDOW_ROWS;
    check_scene("rows in shard 2", &s, SQZ_ERROR_ARGUMENT,
                "11 rows and 0 queries with a sliding window; allowed: none");
    s.layers[1][1].n_rows = s.layers[1][1].n_fixed = 0;
    s.layers[1][1].n_queries = 1;
    check_scene("queries in shard 2", &s, SQZ_ERROR_ARGUMENT,
                "0 rows and 1 queries with a sliding window; allowed: none");
    s.layers[1][1].n_queries = 0;
    s.meta[2].shard.n_tokens = 41;
    check_scene("another whole in the index", &s, SQZ_ERROR_ARGUMENT, "40 tokens in part 0 of a context of 41 tokens");

    /* What the reader does of files that belong together otherwise. */
    s.meta[2].shard.n_tokens = 0;
    check_scene("an index of version 5", &s, SQZ_ERROR_FORMAT, "window-1.gguf is a shard of another context");
    s.meta[2].shard.n_tokens = WHOLE;
    s.layers[1][1].n_window_tokens++;
    check_scene("another window in shard 2", &s, SQZ_ERROR_FORMAT, "window-2.gguf has another layer 1");
    s.layers[1][1].n_window_tokens--;
    check_unlike_shards(&s);
    s.layers[1][1].sliding_window = s.layers[0][1].sliding_window = false;
    check_scene("no window", &s, SQZ_ERROR_ARGUMENT, "layer 1: 11 rows; allowed: 24");
    free_shard_scene(&s);

    /* Version 5, with the last rows of the shard's own tokens. */
    make_shard_scene(&s);
    for (uint32_t i = 0; i < 3; i++) s.meta[i].shard.n_tokens = 0;
    for (uint32_t i = 0; i < 2 * WINDOW_ROWS; i++)
        ((int32_t *)(uintptr_t)s.layers[0][1].position)[i] = (int32_t)(PART - WINDOW_ROWS + i % WINDOW_ROWS);
    check_scene("windows in version 5", &s, SQZ_ERROR_UNSUPPORTED, "layers with a sliding window, which its version");
    free_shard_scene(&s);
    for (uint32_t i = 0; i < 2; i++) assert_int_equal(unlink(in_directory(s.names[i])), 0);
    assert_int_equal(unlink(in_directory("window.gguf")), 0);
}

/* Numbers of such files changed by hand, behind right checksums. */
static void test_changed_windows(void **state)
{
    static const struct {
        const char *what, *key;
        size_t at; /* from the key's end: a number, or the second layer's of an array */
        uint32_t value;
        const char *text;
    } changes[] = {
        {"no tokens", "squeeze.shard.token_count", 4, 0, "a context of 0 tokens in shards"},
        {"2^31 tokens", "squeeze.shard.token_count", 4, 0x80000000, "shard.token_count is 2147483648"},
        {"more tokens", "squeeze.shard.token_count", 4, 60, "24 tokens in part 1 of a context of 60 tokens"},
        {"one token more", "squeeze.shard.token_count", 4, 41, "position of row 0 is 29; allowed: 30"},
        {"version 5", "squeeze.version", 4, 5, "position of row 0 is 29; allowed: 13"},
        {"another shard", "squeeze.shard.number", 4, 2, "24 tokens in part 2 of a context of 40 tokens"},
        {"a longer window", "squeeze.layer.window_tokens", 20, 12, "11 rows with a sliding window of 12 tokens"},
        {"no window", "squeeze.layer.window_tokens", 20, 0, "a sliding window of 0 tokens"},
        {"no rows", "squeeze.layer.row_count", 20, 0, "0 rows with a sliding window of 11 tokens; allowed: 11"},
        {"no dense rows", "squeeze.layer.row_count", 16, 0, "layer 0: 0 rows; allowed: 24"},
    };
    struct shard_scene s;
    struct sqz_error error = {SQZ_OK, ""};
    (void)state;
    make_shard_scene(&s);
    if (write_shard(&s, 0, &error)) fail_msg("a shard: %s", error.message);
    const char *path = in_directory(s.names[0]);
    const struct image original = load(path);
    struct gguf_context *gguf = parse(&original);
    struct image image = {take(original.size, 1), original.size};
    set_memory(original.bytes, original.size);
    check_refused("as it was", SQZ_ERROR_UNSUPPORTED, "this is shard 1 of 2");
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        memcpy(image.bytes, original.bytes, original.size);
        uint8_t *at = after_key(&image, changes[i].key);
        assert_non_null(at);
        memcpy(at + changes[i].at, &changes[i].value, 4);
        seal(&image, gguf);
        set_memory(image.bytes, image.size);
        check_refused(changes[i].what, SQZ_ERROR_FORMAT, changes[i].text);
    }
    free(image.bytes);
    for (int type = 0; type < 2; type++) {
        struct gguf_context *changed = parse(&original);
        gguf_remove_key(changed, "squeeze.shard.token_count");
        if (type) gguf_set_val_u64(changed, "squeeze.shard.token_count", WHOLE);
        image = rebuild(changed, &original, gguf);
        set_memory(image.bytes, image.size);
        check_refused("squeeze.shard.token_count", SQZ_ERROR_FORMAT, "squeeze.shard.token_count");
        free(image.bytes);
        gguf_free(changed);
    }
    gguf_free(gguf);
    free(original.bytes);
    free_shard_scene(&s);
    assert_int_equal(unlink(in_directory(s.names[0])), 0);
}

/* Numbers inside tensors that would lead a kernel astray, behind right checksums. */
static void test_contents(void **state)
{
    static const struct {
        const char *tensor;
        size_t element;
        uint32_t value;
        const char *text;
    } faults[] = {
        {"tokens", 3, 0xffffffff, "token 3 is -1"},
        {"blk.0.position", 5, 12, "position of row 5 is 12; allowed: 0 to 11"},
        {"blk.0.position", 5, 0x80000000, "allowed: 0 to 11"},
        {"blk.0.position", 5, 0, "a second time"},
        {"blk.0.position", 1, 0, "a second time"},
        {"blk.0.offset.0", 0, 1, "offsets do not increase from 0 to 10"},
        {"blk.0.offset.0", 4, 11, "offsets do not increase from 0 to 10"},
        {"blk.0.offset.0", 2, 0, "offsets do not increase"},
        {"blk.0.offset.0", 2, 0xfffffff0, "offsets do not increase"},
        {"blk.0.offset.1", 2, 5, "level 1: cluster offsets do not increase from 0 to 4"},
        {"blk.0.variance.1", 0, 0xbf800000, "variance[0] is -1"},
        {"blk.0.variance.0", 3, 0x7fc00000, "variance[3] is nan"},
        {"blk.0.threshold", 1, 0xc2c80000, "increasing values"},
        {"blk.0.threshold", 0, 0xff800000, "threshold[0] is -inf"},
        {"blk.0.share", 2, 0x3f900000, "do not increase"},
        {"blk.0.share", 0, 0x7f800000, "share[0] is inf"},
        {"blk.0.lost_mass", 0, 0x7fc00000, "lost_mass[0] is nan"},
        {"blk.0.tail_gain", 2, 0x7f800000, "tail_gain[2] is inf"},
        {"blk.0.variance_gain", 0, 0x7fc00000, "variance_gain[0] is nan"},
        {"blk.0.global_share", 1, 0x40000000, "do not increase"},
        {"blk.0.code_first", 0, 1, "parts of the codes do not go from 0 to 3 directions"},
        {"blk.0.code_first", 16, 4, "parts of the codes do not go from 0 to 3 directions"},
        {"blk.0.code_first", 16, 2, "parts of the codes do not go from 0 to 3 directions"},
        {"blk.0.code_first", 5, 4, "parts of the codes"},
        {"blk.0.code_first", 5, 0xffffffff, "parts of the codes"},
        {"blk.0.code_spread", 2, 0x7fc00000, "code_spread[2] is nan"},
        {"blk.0.code_spread", 0, 0x7f800000, "code_spread[0] is inf"},
        {"blk.0.code_spread", 1, 0xbf800000, "code_spread[1] is -1"},
    };
    const struct image original = small_image();
    struct gguf_context *gguf = parse(&original);
    struct image image = {take(original.size, 1), original.size};
    (void)state;
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        const int64_t id = gguf_find_tensor(gguf, faults[i].tensor);
        assert_true(id >= 0);
        memcpy(image.bytes, original.bytes, original.size);
        memcpy(image.bytes + gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, id) + 4 * faults[i].element,
               &faults[i].value, 4);
        seal(&image, gguf);
        set_memory(image.bytes, image.size);
        check_refused(faults[i].tensor, SQZ_ERROR_FORMAT, faults[i].text);
    }

    /* Padding that is not zero, with the metadata's checksum right: no checksum covers it, its own check must. */
    const int64_t tokens = gguf_find_tensor(gguf, "tokens"); /* 12 tokens: 48 bytes, 16 of padding */
    memcpy(image.bytes, original.bytes, original.size);
    image.bytes[gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, tokens) + 50] = 1;
    seal(&image, gguf);
    set_memory(image.bytes, image.size);
    check_refused("padding", SQZ_ERROR_FORMAT, "tensor tokens");

    /* Codes, directions and entries may hold any bits. */
    static const char *const any[] = {"blk.0.code", "blk.0.code_direction", "blk.0.code_book"};
    memcpy(image.bytes, original.bytes, original.size);
    fill_tensors(&image, gguf, any, sizeof any / sizeof *any);
    seal(&image, gguf);
    set_memory(image.bytes, image.size);
    check_opens("codes of any bits");

    /* A tensor of another name or type. */
    memcpy(image.bytes, original.bytes, original.size);
    memcpy(after_key(&image, "blk.0.ke") - 2, "zz", 2);
    seal(&image, gguf);
    set_memory(image.bytes, image.size);
    check_refused("key renamed", SQZ_ERROR_FORMAT, "tensor blk.0.key is missing");
    memcpy(image.bytes, original.bytes, original.size);
    after_key(&image, "blk.0.position")[4 + 8] = GGML_TYPE_F32; /* one head: one dimension in the file */
    seal(&image, gguf);
    set_memory(image.bytes, image.size);
    check_refused("positions as F32", SQZ_ERROR_FORMAT, "tensor blk.0.position is f32");
    gguf_free(gguf);
    free(image.bytes);
    free(original.bytes);
}

/* The small file with a tensor of another name behind, of so many bytes, which are a hole; its checksum is wrong. */
static void write_with_unknown(const struct image *original, int64_t bytes)
{
    struct gguf_context *old = parse(original), *gguf = parse(original);
    const size_t old_data = gguf_get_data_offset(old);
    const size_t n = (size_t)gguf_get_n_tensors(gguf) + 1;
    uint64_t *sums = take(n, sizeof *sums);
    memcpy(sums, gguf_get_arr_data(old, gguf_find_key(old, "squeeze.checksum.tensors")), (n - 1) * sizeof *sums);
    struct ggml_tensor tensor;
    memset(&tensor, 0, sizeof tensor);
    tensor.type = GGML_TYPE_I8;
    snprintf(tensor.name, sizeof tensor.name, "blk.0.future");
    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        tensor.ne[i] = i ? 1 : bytes;
        tensor.nb[i] = i ? (size_t)bytes : 1;
    }
    gguf_add_tensor(gguf, &tensor);
    gguf_set_arr_data(gguf, "squeeze.checksum.tensors", GGUF_TYPE_UINT64, sums, n);
    gguf_set_val_u64(gguf, "squeeze.checksum.metadata", 0);
    const size_t meta = gguf_get_meta_size(gguf);
    struct image image = {take(meta + original->size - old_data, 1), meta + original->size - old_data};
    gguf_get_meta_data(gguf, image.bytes);
    gguf_set_val_u64(gguf, "squeeze.checksum.metadata", XXH3_64bits(image.bytes, meta));
    gguf_get_meta_data(gguf, image.bytes);
    memcpy(image.bytes + meta, original->bytes + old_data, original->size - old_data);
    set_memory(image.bytes, image.size);
    assert_int_equal(ftruncate(memory_file, (off_t)(image.size + ((size_t)bytes + 63) / 64 * 64)), 0);
    free(image.bytes);
    free(sums);
    gguf_free(gguf);
    gguf_free(old);
}

/* Tensors that nobody knows are not read, however large they say they are. */
static void test_unknown_tensors(void **state)
{
    const struct image original = small_image();
    (void)state;
    write_with_unknown(&original, 100);
    check_opens("an unknown tensor");
    write_with_unknown(&original, (int64_t)1 << 40);
    check_refused("an unknown tensor of 1 TiB", SQZ_ERROR_FORMAT,
                  "are tensors that no context has; allowed: at most half");
    free(original.bytes);
}

/* A tensor that is known, all of it a hole: refused for that, not read. */
static void test_sparse_file(void **state)
{
    static const struct shape shape = {
        .n_head = 2, .n_head_kv = 1, .head_dim = 128, .n_tokens = 12, .n_rows = 12, .n_fixed = 12, .n_queries = 65536};
    struct sqz_layer layer;
    struct sqz_context *context;
    struct sqz_error error = {SQZ_OK, ""};
    char path[PATH_MAX + 64];
    (void)state;
    snprintf(path, sizeof path, "%s", in_directory("sparse.gguf"));
    make_layer(&layer, &shape);
    int32_t *tokens = some_tokens(shape.n_tokens);
    const struct sqz_context_meta meta = some_meta(tokens, shape.n_tokens, 1);
    if (write_context(path, &meta, &layer, NULL, &error)) fail_msg("a file of many queries: %s", error.message);
    if (sqz_context_open(&context, path, NULL, &error)) fail_msg("a file without holes: %s", error.message);
    sqz_context_free(context);
    struct stat after;
    const int file = open(path, O_RDWR);
    const bool punched = !fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 1 << 20, 30 << 20);
    assert_int_equal(fstat(file, &after), 0);
    const bool known = punched && lseek(file, 0, SEEK_HOLE) < after.st_size;
    close(file);
    if (known) {
        assert_int_equal(sqz_context_open(&context, path, NULL, &error), SQZ_ERROR_FORMAT);
        assert_non_null(strstr(error.message, "is a sparse file"));
    }
    assert_int_equal(unlink(path), 0);
    free(tokens);
    free_layer(&layer);
    if (!known) skip();
}

static void test_foreign_files(void **state)
{
    struct sqz_context *context;
    struct sqz_error error = {SQZ_OK, ""};
    (void)state;
    set_memory((const uint8_t *)"%PDF-1.7 and so on, long enough for a header", 44);
    check_refused("not a GGUF", SQZ_ERROR_FORMAT, "not a GGUF file: it begins with '%PDF'");
    set_memory((const uint8_t *)"GG", 2);
    check_refused("two bytes", SQZ_ERROR_FORMAT, "not a GGUF file");

    struct gguf_context *model = gguf_init_empty();
    gguf_set_val_str(model, "general.architecture", "llama");
    gguf_set_val_u32(model, "llama.block_count", 30);
    struct image image = {NULL, gguf_get_meta_size(model)};
    image.bytes = take(image.size, 1);
    gguf_get_meta_data(model, image.bytes);
    set_memory(image.bytes, image.size);
    check_refused("a model", SQZ_ERROR_FORMAT, "this is a model (llama), not a prepared context; give it with -m");
    image.bytes[4] = 2;
    set_memory(image.bytes, image.size);
    check_refused("GGUF version 2", SQZ_ERROR_FORMAT, "GGUF version 2; allowed: 3");
    memcpy(image.bytes + 4, "\0\0\0\3", 4);
    set_memory(image.bytes, image.size);
    check_refused("big endian", SQZ_ERROR_FORMAT, "perhaps big endian");
    free(image.bytes);
    gguf_free(model);

    assert_int_equal(sqz_context_open(&context, in_directory("none.gguf"), NULL, &error), SQZ_ERROR_IO);
    assert_non_null(strstr(error.message, "No such file"));
    assert_int_equal(sqz_context_open(&context, directory, NULL, &error), SQZ_ERROR_IO);
    assert_non_null(strstr(error.message, "is a directory"));
    const char *pipe = in_directory("pipe");
    assert_int_equal(mkfifo(pipe, 0600), 0);
    assert_int_equal(sqz_context_open(&context, pipe, NULL, &error), SQZ_ERROR_IO);
    assert_non_null(strstr(error.message, "pipe"));
    assert_int_equal(unlink(pipe), 0);
    struct sqz_context_options options = {.size = 1};
    assert_int_equal(sqz_context_open(&context, directory, &options, &error), SQZ_ERROR_ARGUMENT);
    assert_int_equal(sqz_context_open(&context, NULL, NULL, NULL), SQZ_ERROR_ARGUMENT);
}

/* Mutations of one to eight places, half of them with the checksums made right; what still opens is read through. */
static void test_mutations(void **state)
{
    enum { N_MUTATIONS = 20000 };
    static const uint8_t interesting[] = {0, 1, 2, 3, 8, 9, 0x7f, 0x80, 0xfe, 0xff};
    const struct image original = small_image();
    struct gguf_context *gguf = parse(&original);
    struct image image = {take(original.size, 1), original.size};
    const size_t metadata = gguf_get_data_offset(gguf);
    size_t n_opened = 0, n_refused = 0;
    (void)state;
    random_state = 2024;
    for (int i = 0; i < N_MUTATIONS; i++) {
        struct sqz_context *context;
        struct sqz_error error = {SQZ_OK, ""};
        memcpy(image.bytes, original.bytes, original.size);
        size_t size = original.size;
        const uint32_t places = 1 + random_below(8);
        for (uint32_t p = 0; p < places; p++) {
            const size_t at = random_below((uint32_t)(random_below(4) ? metadata : size));
            switch (random_below(4)) {
            case 0: image.bytes[at] ^= (uint8_t)(1u << random_below(8)); break;
            case 1: image.bytes[at] = (uint8_t)random_u32(); break;
            case 2: image.bytes[at] = interesting[random_below(sizeof interesting)]; break;
            default: { /* a run copied from elsewhere */
                const size_t run = 1 + random_below(16), from = random_below((uint32_t)(size - run));
                if (at + run <= size) memmove(image.bytes + at, image.bytes + from, run);
            }
            }
        }
        if (i % 2) seal(&image, gguf);
        if (!random_below(16)) size = random_below((uint32_t)size + 1);
        set_memory(image.bytes, size);
        const enum sqz_status status = open_memory(&context, i % 3 ? SQZ_VERIFY_ALL : SQZ_VERIFY_INDEX, &error);
        if (!status) {
            touch(context);
            n_opened++;
        } else {
            if (context || !error.message[0] || (status != SQZ_ERROR_FORMAT && status != SQZ_ERROR_UNSUPPORTED))
                fail_msg("mutation %d, seed 2024: got %s '%s'", i, sqz_status_name(status), error.message);
            n_refused++;
        }
        sqz_context_free(context);
    }
    print_message("%d mutations: %zu refused, %zu opened and read through\n", N_MUTATIONS, n_refused, n_opened);
    assert_true(n_refused > N_MUTATIONS / 2 && n_opened > 0);
    gguf_free(gguf);
    free(image.bytes);
    free(original.bytes);
}

/* ---- Writing ------------------------------------------------------------------------------------- */

struct scene {
    struct sqz_layer layers[2];
    int32_t *tokens;
    struct sqz_context_meta meta;
};

static void make_scene_of(struct scene *scene, const struct shape *clustered)
{
    random_state = 9;
    make_layer(&scene->layers[0], clustered);
    make_layer(&scene->layers[1], &shapes[4]);
    scene->tokens = some_tokens(40);
    scene->meta = some_meta(scene->tokens, 40, 2);
    scene->meta.squeeze.index = scene->meta.squeeze.keys = clustered->index;
    scene->meta.squeeze.rows = clustered->rows;
    if (clustered->rows) scene->meta.squeeze.keys = SQZ_INDEX_F16;
}

static void make_scene(struct scene *scene)
{
    make_scene_of(scene, &shapes[1]);
}

static void free_scene(struct scene *scene)
{
    free_layer(&scene->layers[0]);
    free_layer(&scene->layers[1]);
    free(scene->tokens);
}

static void write_text(const char *path, const char *text)
{
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

static void check_text(const char *path, const char *text)
{
    const struct image image = load(path);
    assert_int_equal(image.size, strlen(text));
    assert_memory_equal(image.bytes, text, image.size);
    free(image.bytes);
}

static void test_commit_and_abort(void **state)
{
    struct scene scene;
    struct sqz_error error = {SQZ_OK, ""};
    struct sqz_context_writer *writer;
    struct sqz_context *context;
    struct stat file;
    (void)state;
    make_scene(&scene);
    const size_t before = directory_entries();
    char path[PATH_MAX + 64], link[PATH_MAX + 64];
    snprintf(path, sizeof path, "%s", in_directory("out.gguf"));
    snprintf(link, sizeof link, "%s", in_directory("link.gguf"));

    /* Abort, without and with an old file. */
    for (int old = 0; old < 2; old++) {
        if (old) write_text(path, "the old file");
        assert_int_equal(sqz_context_writer_create(&writer, path, &scene.meta, scene.layers, &error), SQZ_OK);
        assert_int_equal(sqz_context_writer_put_layer(writer, 1, &scene.layers[1], &error), SQZ_OK);
        sqz_context_writer_abort(writer);
        assert_int_equal(directory_entries(), before + (size_t)old);
    }
    sqz_context_writer_abort(NULL);
    check_text(path, "the old file");

    /* A layer missing: refused, nothing replaced. */
    assert_int_equal(sqz_context_writer_create(&writer, path, &scene.meta, scene.layers, &error), SQZ_OK);
    assert_int_equal(sqz_context_writer_put_layer(writer, 0, &scene.layers[0], &error), SQZ_OK);
    assert_int_equal(sqz_context_writer_commit(writer, NULL, &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "layer 1 was not written"));
    check_text(path, "the old file");

    /* Commit replaces, through a link too, and keeps the permissions. */
    assert_int_equal(chmod(path, 0640), 0);
    assert_int_equal(symlink("out.gguf", link), 0);
    if (write_context(link, &scene.meta, scene.layers, NULL, &error)) fail_msg("through a link: %s", error.message);
    assert_int_equal(lstat(link, &file), 0);
    assert_true(S_ISLNK(file.st_mode));
    assert_int_equal(stat(path, &file), 0);
    assert_int_equal(file.st_mode & 0777, 0640);
    assert_int_equal(sqz_context_open(&context, path, NULL, &error), SQZ_OK);

    /* An open context keeps its own file when another is put in its place. */
    if (write_context(path, &scene.meta, scene.layers, NULL, &error)) fail_msg("a second time: %s", error.message);
    check_layer(0, sqz_context_layer(context, 0), &scene.layers[0]);
    sqz_context_free(context);
    assert_int_equal(directory_entries(), before + 2);
    assert_int_equal(unlink(link), 0);
    assert_int_equal(unlink(path), 0);

    /* A name without a directory goes where the process stands. */
    char home[PATH_MAX];
    assert_non_null(getcwd(home, sizeof home));
    assert_int_equal(chdir(directory), 0);
    const enum sqz_status status = write_context("plain.gguf", &scene.meta, scene.layers, NULL, &error);
    assert_int_equal(unlink("plain.gguf"), 0);
    assert_int_equal(chdir(home), 0);
    assert_int_equal(status, SQZ_OK);
    free_scene(&scene);
}

static void make_file(const char *path, const char *text, mode_t mode)
{
    write_text(path, text);
    assert_int_equal(chmod(path, mode), 0);
}

static enum sqz_status commit_scene(struct sqz_context_writer *writer, const struct scene *scene,
                                    struct sqz_error *error)
{
    for (uint32_t i = 0; i < 2; i++)
        assert_int_equal(sqz_context_writer_put_layer(writer, i, &scene->layers[i], error), SQZ_OK);
    return sqz_context_writer_commit(writer, NULL, error);
}

/* A name that becomes a link, a directory or another file while its context is prepared leads nowhere else, and rights
 * are those of what is replaced. */
static void test_swapped_places(void **state)
{
    struct scene scene;
    struct sqz_error error = {SQZ_OK, ""};
    struct sqz_context_writer *writer;
    struct stat file;
    char path[PATH_MAX + 64], victim[PATH_MAX + 64];
    (void)state;
    make_scene(&scene);
    const size_t before = directory_entries();
    snprintf(path, sizeof path, "%s", in_directory("out.gguf"));
    snprintf(victim, sizeof victim, "%s", in_directory("victim"));
    make_file(victim, "not yours", 0600);
    for (int old = 0; old < 2; old++) {
        if (old) make_file(path, "old", 0666);
        assert_int_equal(sqz_context_writer_create(&writer, path, &scene.meta, scene.layers, &error), SQZ_OK);
        if (old) assert_int_equal(unlink(path), 0);
        assert_int_equal(symlink(victim, path), 0);
        assert_int_equal(commit_scene(writer, &scene, &error), SQZ_ERROR_IO);
        assert_non_null(strstr(error.message, "became a symbolic link"));
        check_text(victim, "not yours");
        assert_int_equal(stat(victim, &file), 0);
        assert_int_equal(file.st_mode & 0777, 0600);
        assert_int_equal(unlink(path), 0);
    }

    /* Stricter rights that came meanwhile, and another's ownership, are kept. */
    make_file(path, "old", 0644);
    if (!geteuid()) assert_int_equal(chown(path, 4321, 1234), 0);
    assert_int_equal(sqz_context_writer_create(&writer, path, &scene.meta, scene.layers, &error), SQZ_OK);
    assert_int_equal(chmod(path, 0600), 0);
    assert_int_equal(commit_scene(writer, &scene, &error), SQZ_OK);
    assert_int_equal(stat(path, &file), 0);
    assert_int_equal(file.st_mode & 0777, 0600);
    assert_true(geteuid() || (file.st_uid == 4321 && file.st_gid == 1234));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(sqz_context_writer_create(&writer, path, &scene.meta, scene.layers, &error), SQZ_OK);
    assert_int_equal(mkdir(path, 0700), 0);
    assert_int_equal(commit_scene(writer, &scene, &error), SQZ_ERROR_IO);
    assert_int_equal(rmdir(path), 0);
    assert_int_equal(unlink(victim), 0);
    assert_int_equal(directory_entries(), before);
    free_scene(&scene);
}

/* Links through other directories are followed; in a directory that everybody may write to, not those of others. */
static void test_followed_links(void **state)
{
    struct scene scene;
    struct sqz_error error = {SQZ_OK, ""};
    struct sqz_context_writer *writer;
    struct stat file;
    char open_to_all[PATH_MAX + 64], link[PATH_MAX + 80], path[PATH_MAX + 64];
    (void)state;
    make_scene(&scene);
    snprintf(path, sizeof path, "%s", in_directory("out.gguf"));
    snprintf(open_to_all, sizeof open_to_all, "%s", in_directory("shared"));
    snprintf(link, sizeof link, "%s/link", open_to_all);
    make_file(path, "old", 0644);
    assert_int_equal(mkdir(open_to_all, 0700), 0);
    assert_int_equal(chmod(open_to_all, 01777), 0);
    assert_int_equal(symlink("../out.gguf", link), 0);
    if (write_context(link, &scene.meta, scene.layers, NULL, &error))
        fail_msg("a link of one's own: %s", error.message);
    assert_int_equal(lstat(path, &file), 0);
    assert_true(S_ISREG(file.st_mode) && file.st_size > 1000);
    if (!geteuid()) {
        assert_int_equal(chmod(path, 0600), 0);
        assert_int_equal(lchown(link, 65534, 65534), 0);
        assert_int_equal(sqz_context_writer_create(&writer, link, &scene.meta, scene.layers, &error), SQZ_ERROR_IO);
        assert_non_null(strstr(error.message, "another user's symbolic link"));
    }
    assert_int_equal(unlink(link), 0);
    assert_int_equal(symlink("link", link), 0);
    assert_int_equal(sqz_context_writer_create(&writer, link, &scene.meta, scene.layers, &error), SQZ_ERROR_IO);
    assert_int_equal(unlink(link), 0);
    assert_int_equal(rmdir(open_to_all), 0);
    assert_int_equal(unlink(path), 0);
    free_scene(&scene);
}

/* What a killed writer left goes with the next one; what a living one holds, what is young or named otherwise stays. */
static void test_stale_files(void **state)
{
    static const struct {
        const char *name;
        bool old, locked, stays;
    } files[] = {
        {".sqz-0123456789abcdef.tmp", true, false, false}, {".sqz-0123456789abcde0.tmp", true, true, true},
        {".sqz-0123456789abcde1.tmp", false, false, true}, {".sqz-0123456789abcde.tmp", true, false, true},
        {".sqz-0123456789abcdeX.tmp", true, false, true},  {"sqz-0123456789abcdef.tmp", true, false, true},
    };
    enum { N = sizeof files / sizeof *files };
    struct scene scene;
    struct sqz_error error = {SQZ_OK, ""};
    struct sqz_context_writer *writer;
    int descriptors[N];
    (void)state;
    make_scene(&scene);
    for (int i = 0; i < N; i++) {
        const struct timespec past[2] = {{.tv_sec = 1000}, {.tv_sec = 1000}};
        descriptors[i] = open(in_directory(files[i].name), O_RDWR | O_CREAT | O_EXCL, 0600);
        assert_true(descriptors[i] >= 0);
        assert_true(!files[i].old || !futimens(descriptors[i], past));
        assert_true(!files[i].locked || !flock(descriptors[i], LOCK_EX | LOCK_NB));
    }
    assert_int_equal(sqz_context_writer_create(&writer, in_directory("out.gguf"), &scene.meta, scene.layers, &error),
                     SQZ_OK);
    sqz_context_writer_abort(writer);
    for (int i = 0; i < N; i++) {
        close(descriptors[i]);
        if ((unlink(in_directory(files[i].name)) == 0) != files[i].stays)
            fail_msg("%s is %s", files[i].name, files[i].stays ? "gone" : "still there");
    }
    free_scene(&scene);
}

/* Version 3: keys that are INT8 alone, and the ways in which such a file can be wrong. */
static struct image scene_image(bool keys_alone, enum sqz_row_format rows)
{
    struct scene scene;
    struct sqz_error error = {SQZ_OK, ""};
    struct shape shape = shapes[1];
    const char *path = in_directory("small.gguf");
    shape.index = SQZ_INDEX_INT8;
    shape.keys_alone = keys_alone;
    shape.rows = rows;
    make_scene_of(&scene, &shape);
    if (write_context(path, &scene.meta, scene.layers, NULL, &error)) fail_msg("writing: %s", error.message);
    const struct image image = load(path);
    assert_int_equal(unlink(path), 0);
    free_scene(&scene);
    return image;
}

/* The file with another number under a key. */
static void check_key(const struct image *original, const struct gguf_context *gguf, const char *key, uint32_t value,
                      const char *text)
{
    struct gguf_context *changed = parse(original);
    gguf_set_val_u32(changed, key, value);
    struct image image = rebuild(changed, original, gguf);
    set_memory(image.bytes, image.size);
    check_refused(key, SQZ_ERROR_FORMAT, text);
    free(image.bytes);
    gguf_free(changed);
}

static void test_small_keys(void **state)
{
    const struct image original = scene_image(true, SQZ_ROWS_F16), twice = scene_image(false, SQZ_ROWS_F16);
    struct gguf_context *gguf = parse(&original), *gguf_twice = parse(&twice);
    struct image image = {take(original.size, 1), original.size};
    static const char *const needed[] = {"blk.0.key_scale", "blk.0.key_mean", "blk.0.centroid_scale.0"};
    (void)state;
    assert_int_equal(gguf_get_val_u32(gguf, gguf_find_key(gguf, "squeeze.version")), 3);
    assert_int_equal(gguf_get_val_u32(gguf_twice, gguf_find_key(gguf_twice, "squeeze.version")), 2);
    assert_true(gguf_find_tensor(gguf, "blk.0.key_i8") < 0 && gguf_find_tensor(gguf, "blk.1.key_scale") < 0);
    assert_true(original.size < twice.size);
    check_key(&original, gguf, "squeeze.version", 2, "tensor blk.0.key_i8 is missing");
    check_key(&original, gguf, "squeeze.option.keys", 0, "tensor blk.0.key is i8");
    check_key(&twice, gguf_twice, "squeeze.version", 3, "tensor blk.0.key is f16");
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        char text[80];
        memcpy(image.bytes, original.bytes, original.size);
        after_key(&image, needed[i])[-1] = '~';
        seal(&image, gguf);
        set_memory(image.bytes, image.size);
        snprintf(text, sizeof text, "tensor %s is missing", needed[i]);
        check_refused(needed[i], SQZ_ERROR_FORMAT, text);
    }
    memcpy(image.bytes, original.bytes, original.size);
    after_key(&image, "blk.0.key_scale")[4 + 2 * 8] = GGML_TYPE_I32; /* two dimensions */
    seal(&image, gguf);
    set_memory(image.bytes, image.size);
    check_refused("scales of another type", SQZ_ERROR_FORMAT, "tensor blk.0.key_scale is i32");

    /* Keys and scales may hold any bits. */
    static const char *const any[] = {"blk.0.key", "blk.0.key_scale", "blk.0.key_mean"};
    memcpy(image.bytes, original.bytes, original.size);
    fill_tensors(&image, gguf, any, sizeof any / sizeof *any);
    seal(&image, gguf);
    set_memory(image.bytes, image.size);
    check_opens("keys of any bits");
    gguf_free(gguf);
    gguf_free(gguf_twice);
    free(image.bytes);
    free(original.bytes);
    free(twice.bytes);
}

/* One tensor of a version 4 file under another name, of another type, and one dimension of it off by one. */
static void check_plane_tensor(const struct image *original, const struct gguf_context *gguf, const char *name)
{
    struct image image = {take(original->size, 1), original->size};
    char text[80];
    memcpy(image.bytes, original->bytes, original->size);
    after_key(&image, name)[-1] = '~';
    seal(&image, gguf);
    set_memory(image.bytes, image.size);
    snprintf(text, sizeof text, "tensor %s is missing", name);
    check_refused(name, SQZ_ERROR_FORMAT, text);
    for (size_t i = 0; i < 2; i++) { /* the lowest byte of the first and of the second dimension */
        memcpy(image.bytes, original->bytes, original->size);
        after_key(&image, name)[4 + 8 * i]--;
        seal(&image, gguf);
        set_memory(image.bytes, image.size);
        check_refused(name, SQZ_ERROR_FORMAT, "tensor"); /* of the wrong size, or the next one is not where it ends */
    }
    free(image.bytes);
}

/* Version 4: rows in planes, and the ways in which such a file can be wrong. */
static void test_planes(void **state)
{
    static const char *const both[] = {"blk.0.key_upper",
                                       "blk.0.key_lower",
                                       "blk.0.key_step",
                                       "blk.0.key_fixed",
                                       "blk.0.value_upper",
                                       "blk.0.value_lower",
                                       "blk.0.value_step",
                                       "blk.0.value_fixed",
                                       "blk.0.value_mean",
                                       "blk.0.value_centroid_upper.0",
                                       "blk.0.value_centroid_lower.0",
                                       "blk.0.value_centroid_step.0"};
    const struct image original = scene_image(false, SQZ_ROWS_INT4_4), upper = scene_image(false, SQZ_ROWS_INT4);
    struct gguf_context *gguf = parse(&original), *gguf_upper = parse(&upper);
    struct image image = {take(original.size, 1), original.size};
    (void)state;
    assert_int_equal(gguf_get_val_u32(gguf, gguf_find_key(gguf, "squeeze.version")), 4);
    assert_true(gguf_find_tensor(gguf, "blk.0.key") < 0 && gguf_find_tensor(gguf, "blk.1.key") >= 0);
    assert_true(gguf_find_tensor(gguf_upper, "blk.0.key_lower") < 0 &&
                gguf_find_tensor(gguf_upper, "blk.0.value_lower") < 0);
    assert_true(upper.size < original.size);
    check_key(&original, gguf, "squeeze.version", 3, "tensor blk.0.value_centroid.0 is missing");
    check_key(&original, gguf, "squeeze.option.rows", 0, "tensor blk.0.value_centroid.0 is missing");
    check_key(&original, gguf, "squeeze.option.rows", 3, "option rows is 3; allowed: 0 to 2");
    check_key(&original, gguf, "squeeze.option.keys", 1, "option keys beside option rows is 1; allowed: 0 to 0");
    check_key(&upper, gguf_upper, "squeeze.option.rows", 1, "tensor blk.0.key_lower is missing");
    for (size_t i = 0; i < sizeof both / sizeof *both; i++) check_plane_tensor(&original, gguf, both[i]);

    memcpy(image.bytes, original.bytes, original.size);
    after_key(&image, "squeeze.option.rows")[-1] = '~';
    seal(&image, gguf);
    set_memory(image.bytes, image.size);
    check_refused("no option", SQZ_ERROR_FORMAT, "key squeeze.option.rows is missing");

    /* Planes, steps, means and fixed rows may hold any bits. */
    memcpy(image.bytes, original.bytes, original.size);
    fill_tensors(&image, gguf, both, sizeof both / sizeof *both);
    seal(&image, gguf);
    set_memory(image.bytes, image.size);
    check_opens("planes of any bits");
    gguf_free(gguf);
    gguf_free(gguf_upper);
    free(image.bytes);
    free(original.bytes);
    free(upper.bytes);
}

static void check_create(const char *what, const char *path, const struct scene *scene, enum sqz_status wanted,
                         const char *text)
{
    struct sqz_error error = {SQZ_OK, ""};
    struct sqz_context_writer *writer;
    const enum sqz_status status = sqz_context_writer_create(&writer, path, &scene->meta, scene->layers, &error);
    if (status != wanted || writer || !strstr(error.message, text)) {
        sqz_context_writer_abort(writer);
        fail_msg("%s: got %s '%s', wanted %s with '%s'", what, sqz_status_name(status), error.message,
                 sqz_status_name(wanted), text);
    }
}

static void test_bad_places(void **state)
{
    struct scene scene;
    char path[PATH_MAX + 64];
    (void)state;
    make_scene(&scene);
    const size_t before = directory_entries();
    check_create("a directory", directory, &scene, SQZ_ERROR_IO, "is a directory");
    check_create("an empty path", "", &scene, SQZ_ERROR_ARGUMENT, "empty path");
    check_create("a missing directory", in_directory("none/out.gguf"), &scene, SQZ_ERROR_IO, "No such file");
    check_create("a new directory's name", in_directory("none/"), &scene, SQZ_ERROR_IO, "name of a directory");
    check_create("a device", "/dev/null", &scene, SQZ_ERROR_IO, "not a regular file");
    check_create("a system without files", "/proc/out.gguf", &scene, SQZ_ERROR_IO, "no file can be made");

    snprintf(path, sizeof path, "%s", in_directory("dangling"));
    assert_int_equal(symlink("nowhere", path), 0);
    check_create("a dangling link", path, &scene, SQZ_ERROR_IO, "leads nowhere");
    assert_int_equal(unlink(path), 0);

    snprintf(path, sizeof path, "%s", in_directory("file"));
    write_text(path, "x");
    char below[PATH_MAX + 80];
    snprintf(below, sizeof below, "%s/out.gguf", path);
    check_create("a file as a directory", below, &scene, SQZ_ERROR_IO, "Not a directory");
    assert_int_equal(unlink(path), 0);

    /* Root may write anywhere, so it steps down for these. */
    snprintf(path, sizeof path, "%s", in_directory("closed"));
    assert_int_equal(mkdir(path, 0755), 0);
    snprintf(below, sizeof below, "%s/out.gguf", path);
    write_text(below, "mine");
    assert_int_equal(chmod(below, 0644), 0);
    assert_int_equal(chmod(path, 0555), 0);
    assert_int_equal(chmod(directory, 0755), 0);
    const uid_t user = geteuid();
    if (!user) assert_int_equal(seteuid(65534), 0);
    char new_file[PATH_MAX + 80];
    snprintf(new_file, sizeof new_file, "%s/new.gguf", path);
    check_create("an unwritable directory", new_file, &scene, SQZ_ERROR_IO, "Permission denied");
    assert_int_equal(seteuid(user), 0);
    if (!user) { /* access() asks for the real user, who is root: the directory refuses instead */
        assert_int_equal(seteuid(65534), 0);
        check_create("another's file", below, &scene, SQZ_ERROR_IO, "");
        assert_int_equal(seteuid(user), 0);
    }
    check_text(below, "mine");
    assert_int_equal(chmod(path, 0755), 0);
    assert_int_equal(unlink(below), 0);
    assert_int_equal(rmdir(path), 0);
    assert_int_equal(directory_entries(), before);
    free_scene(&scene);
}

/* Rows that are written first, by several threads, in any order: the same file. Rows alone are no layer. */
static void test_rows_apart(void **state)
{
    struct scene scene;
    struct sqz_error error = {SQZ_OK, ""};
    struct sqz_context_writer *writer;
    char whole[PATH_MAX + 64], apart[PATH_MAX + 64];
    (void)state;
    make_scene(&scene);
    snprintf(whole, sizeof whole, "%s", in_directory("whole.gguf"));
    snprintf(apart, sizeof apart, "%s", in_directory("apart.gguf"));
    if (write_context(whole, &scene.meta, scene.layers, NULL, &error)) fail_msg("whole: %s", error.message);
    assert_int_equal(sqz_context_writer_create(&writer, apart, &scene.meta, scene.layers, &error), SQZ_OK);
    sqz_context_writer_set_threads(writer, 4);
    assert_int_equal(sqz_context_writer_put_rows(NULL, 0, &scene.layers[0], &error), SQZ_ERROR_ARGUMENT);
    assert_int_equal(sqz_context_writer_put_rows(writer, scene.meta.n_layer, &scene.layers[0], &error),
                     SQZ_ERROR_ARGUMENT);
    assert_int_equal(sqz_context_writer_put_rows(writer, 1, &scene.layers[0], &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "not those that were declared"));
    for (uint32_t i = 0; i < scene.meta.n_layer; i++) { /* of which nothing else is there yet */
        struct sqz_layer rows = scene.layers[i];
        rows.position = (const int32_t *)(uintptr_t)16;
        assert_int_equal(sqz_context_writer_put_rows(writer, i, &rows, &error), SQZ_OK);
    }
    for (uint32_t i = scene.meta.n_layer; i-- > 0;) { /* and then the rows are not looked at any more */
        struct sqz_layer index = scene.layers[i];
        index.keys.data = index.values.data = (const void *)16;
        assert_int_equal(sqz_context_writer_put_layer(writer, i, &index, &error), SQZ_OK);
    }
    assert_int_equal(sqz_context_writer_commit(writer, NULL, &error), SQZ_OK);
    struct image a = load(whole), b = load(apart);
    assert_int_equal(a.size, b.size);
    assert_memory_equal(a.bytes, b.bytes, a.size);
    assert_int_equal(sqz_context_writer_create(&writer, apart, &scene.meta, scene.layers, &error), SQZ_OK);
    for (uint32_t i = 0; i < scene.meta.n_layer; i++)
        assert_int_equal(sqz_context_writer_put_rows(writer, i, &scene.layers[i], &error), SQZ_OK);
    assert_int_equal(sqz_context_writer_commit(writer, NULL, &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "layer 0 was not written"));
    free(a.bytes);
    free(b.bytes);
    unlink(whole);
    unlink(apart);
    free_scene(&scene);
}

static void test_bad_layers(void **state)
{
    struct scene scene;
    struct sqz_error error = {SQZ_OK, ""};
    struct sqz_context_writer *writer;
    (void)state;
    make_scene(&scene);
    const size_t before = directory_entries();
    const char *path = in_directory("bad.gguf");
    assert_int_equal(sqz_context_writer_create(&writer, path, &scene.meta, scene.layers, &error), SQZ_OK);
    assert_int_equal(sqz_context_writer_put_layer(writer, 2, &scene.layers[0], &error), SQZ_ERROR_ARGUMENT);
    assert_int_equal(sqz_context_writer_put_layer(writer, 1, &scene.layers[0], &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "not those that were declared"));
    struct sqz_layer changed = scene.layers[0];
    changed.level[0].n_clusters++;
    assert_int_equal(sqz_context_writer_put_layer(writer, 0, &changed, &error), SQZ_ERROR_ARGUMENT);
    changed = scene.layers[0];
    changed.rule = SQZ_RULE_DEFAULT;
    assert_int_equal(sqz_context_writer_put_layer(writer, 0, &changed, &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "clustered for rule 0; allowed: 1"));
    changed = scene.layers[0];
    changed.space = SQZ_SPACE_CUDA;
    assert_int_equal(sqz_context_writer_put_layer(writer, 0, &changed, &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "layer 0: in memory space 1; allowed: 0"));
    changed = scene.layers[0];
    changed.keys.type = SQZ_ROW_I8; /* which needs a file of version 3 */
    assert_int_equal(sqz_context_writer_put_layer(writer, 0, &changed, &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "layer 0: keys of type I8; allowed: F16"));
    changed = scene.layers[0];
    changed.values.planes.n_whole = 3;
    assert_int_equal(sqz_context_writer_put_layer(writer, 0, &changed, &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "layer 0: 0 keys and 3 values that are not rounded; allowed: 0"));
    changed = scene.layers[0];
    changed.level[0].centroids.type = SQZ_ROW_I8;
    assert_int_equal(sqz_context_writer_put_layer(writer, 0, &changed, &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "layer 0: centroids of type I8; allowed: F16"));
    changed = scene.layers[0];
    changed.tail_gain = NULL;
    assert_int_equal(sqz_context_writer_put_layer(writer, 0, &changed, &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "blk.0.tail_gain is missing, but was declared"));
    changed = scene.layers[0];
    float share[9 * 3];
    memcpy(share, changed.share, sizeof share);
    share[4] = NAN;
    changed.share = share;
    assert_int_equal(sqz_context_writer_put_layer(writer, 0, &changed, &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "share[4] is nan"));
    changed = scene.layers[0];
    changed.codes.n_directions--;
    assert_int_equal(sqz_context_writer_put_layer(writer, 0, &changed, &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "not those that were declared"));
    changed = scene.layers[0];
    changed.codes = (struct sqz_codes){0};
    assert_int_equal(sqz_context_writer_put_layer(writer, 0, &changed, &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "not those that were declared"));
    changed = scene.layers[0];
    uint32_t first[9 * 3];
    memcpy(first, changed.codes.first, sizeof first);
    first[9] = 1; /* of the second head */
    changed.codes.first = first;
    assert_int_equal(sqz_context_writer_put_layer(writer, 0, &changed, &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "layer 0, head 1: the parts of the codes"));
    sqz_context_writer_abort(writer);

    changed = scene.layers[0];
    scene.layers[0].codes.n_words = 5;
    check_create("five words", path, &scene, SQZ_ERROR_ARGUMENT, "5 words of code");
    scene.layers[0] = changed;
    scene.layers[1].codes.n_words = 1;
    check_create("codes without clusters", path, &scene, SQZ_ERROR_ARGUMENT, "1 words of code; allowed: 0 without");
    scene.layers[1].codes.n_words = 0;
    scene.layers[0].codes.book = NULL;
    check_create("codes without a book", path, &scene, SQZ_ERROR_ARGUMENT, "code_book is missing");
    scene.layers[0] = changed;
    scene.layers[0].shape.head_dim = 40;
    check_create("head dimension 40", path, &scene, SQZ_ERROR_ARGUMENT, "head dimension 40");
    scene.layers[0] = changed;
    scene.layers[0].level[0].value_centroids = (struct sqz_rows){0};
    check_create("a tail without value centroids", path, &scene, SQZ_ERROR_ARGUMENT, "value_centroid.0 is missing");
    scene.layers[0] = changed;
    scene.layers[1].n_levels = 1;
    check_create("a clustered window", path, &scene, SQZ_ERROR_ARGUMENT, "sliding window with 1 levels");
    scene.layers[1].n_levels = 0;
    scene.meta.model_fingerprint = "not hex";
    check_create("a fingerprint", path, &scene, SQZ_ERROR_ARGUMENT, "fingerprint");
    scene.meta.model_fingerprint = "ab";
    scene.tokens[7] = -5;
    check_create("a negative token", path, &scene, SQZ_ERROR_ARGUMENT, "token 7 is -5");
    scene.tokens[7] = 5;
    scene.meta.n_tokens = 0;
    check_create("no tokens", path, &scene, SQZ_ERROR_ARGUMENT, "number of tokens is 0");
    assert_int_equal(directory_entries(), before);
    free_scene(&scene);
}

/* A limit on file sizes stands for the disk that is full: found at create, before any work. */
static void test_file_limit(void **state)
{
    struct scene scene;
    struct rlimit old, limit;
    (void)state;
    make_scene(&scene);
    const size_t before = directory_entries();
    void (*const handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    limit = old;
    limit.rlim_cur = 8192;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    struct sqz_error error = {SQZ_OK, ""};
    struct sqz_context_writer *writer;
    const enum sqz_status status =
        sqz_context_writer_create(&writer, in_directory("limit.gguf"), &scene.meta, scene.layers, &error);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    signal(SIGXFSZ, handler);
    if (status != SQZ_ERROR_IO || !strstr(error.message, "bytes are needed"))
        fail_msg("limit of 8192 bytes: got %s '%s'", sqz_status_name(status), error.message);
    assert_int_equal(directory_entries(), before);
    free_scene(&scene);
}

static void test_full_disk(void **state)
{
    struct scene scene;
    char path[PATH_MAX + 80];
    (void)state;
    char mount_point[PATH_MAX + 64];
    snprintf(mount_point, sizeof mount_point, "%s", in_directory("full"));
    assert_int_equal(mkdir(mount_point, 0755), 0);
    if (mount("tmpfs", mount_point, "tmpfs", 0, "size=32k")) {
        print_message("skipped: a small tmpfs cannot be mounted: %s\n", strerror(errno));
        assert_int_equal(rmdir(mount_point), 0);
        skip();
    }
    make_scene(&scene);
    snprintf(path, sizeof path, "%s/out.gguf", mount_point);
    write_text(path, "the old file");
    struct sqz_error error = {SQZ_OK, ""};
    struct sqz_context_writer *writer;
    const enum sqz_status status = sqz_context_writer_create(&writer, path, &scene.meta, scene.layers, &error);
    sqz_context_writer_abort(writer);
    check_text(path, "the old file");
    assert_int_equal(umount(mount_point), 0);
    assert_int_equal(rmdir(mount_point), 0);
    if (status != SQZ_ERROR_IO || !strstr(error.message, "not enough space") || !strstr(error.message, "are free"))
        fail_msg("32 KiB of disk: got %s '%s'", sqz_status_name(status), error.message);
    free_scene(&scene);
}

/* Without /proc a file cannot get its name at the end: then it has a temporary one from the start. */
static int write_without_proc(struct scene *scene)
{
    struct sqz_error error = {SQZ_OK, ""};
    struct sqz_context_writer *writer;
    if (chroot(directory) || chdir("/")) return 77;
    snprintf(directory, sizeof directory, "/");
    const size_t before = directory_entries();
    if (sqz_context_writer_create(&writer, "/out.gguf", &scene->meta, scene->layers, &error)) return 1;
    if (directory_entries() != before + 1) /* the temporary file is seen */
        return 2;
    sqz_unfinished_remove(); /* as a signal handler would */
    if (directory_entries() != before) return 8;
    sqz_context_writer_abort(writer);
    if (directory_entries() != before ||
        sqz_context_writer_create(&writer, "/out.gguf", &scene->meta, scene->layers, &error))
        return 9;
    sqz_context_writer_abort(writer);
    if (directory_entries() != before) return 3;
    if (write_context("/out.gguf", &scene->meta, scene->layers, NULL, &error)) return 4;
    if (directory_entries() != before + 1) return 5;
    struct sqz_context *context;
    if (sqz_context_open(&context, "/out.gguf", NULL, &error)) return 6;
    sqz_context_free(context);
    return unlink("/out.gguf") ? 7 : 0;
}

static void test_named_temporary(void **state)
{
    struct scene scene;
    int status = 0;
    (void)state;
    make_scene(&scene);
    fflush(NULL);
    const pid_t child = fork();
    assert_true(child >= 0);
    if (!child) _exit(write_without_proc(&scene));
    assert_int_equal(waitpid(child, &status, 0), child);
    free_scene(&scene);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
        print_message("skipped: chroot is not allowed here\n");
        skip();
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status))
        fail_msg("writing without /proc ended with status %x", (unsigned)status);
}

/* ---- Running ---------------------------------------------------------------------------------------- */

static int set_up(void **state)
{
    const char *base = getenv("SQUEEZE_TEST_FOLDER");
    (void)state;
    snprintf(directory, sizeof directory, "%s/sqz-test-store-XXXXXX", base && *base ? base : "/tmp");
    return mkdtemp(directory) ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    if (memory_file >= 0) close(memory_file);
    return rmdir(directory); /* fails, and with it the group, when a test left a file behind */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_single_layers),
        cmocka_unit_test(test_small_keys),
        cmocka_unit_test(test_planes),
        cmocka_unit_test(test_layer_facts),
        cmocka_unit_test(test_changed_files),
        cmocka_unit_test(test_lost_pages),
        cmocka_unit_test(test_other_readers),
        cmocka_unit_test(test_every_flip),
        cmocka_unit_test(test_every_truncation),
        cmocka_unit_test(test_verify_modes),
        cmocka_unit_test(test_huge_counts),
        cmocka_unit_test(test_keys),
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_window_rows),
        cmocka_unit_test(test_folder_mark),
        cmocka_unit_test(test_windows_in_shards),
        cmocka_unit_test(test_changed_windows),
        cmocka_unit_test(test_contents),
        cmocka_unit_test(test_unknown_tensors),
        cmocka_unit_test(test_sparse_file),
        cmocka_unit_test(test_foreign_files),
        cmocka_unit_test(test_mutations),
        cmocka_unit_test(test_commit_and_abort),
        cmocka_unit_test(test_bad_places),
        cmocka_unit_test(test_swapped_places),
        cmocka_unit_test(test_followed_links),
        cmocka_unit_test(test_stale_files),
        cmocka_unit_test(test_rows_apart),
        cmocka_unit_test(test_bad_layers),
        cmocka_unit_test(test_file_limit),
        cmocka_unit_test(test_full_disk),
        cmocka_unit_test(test_named_temporary),
    };
    return cmocka_run_group_tests_name("store", tests, set_up, tear_down);
}
