/* A context file as an input of the fuzzer; context_input.h describes it. */
#define _GNU_SOURCE /* memmem */
#include "context_input.h"
#include "format.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <stdlib.h>
#include <string.h>

enum { MAX_FILE_BYTES = 1 << 18 };

static struct sqz_error ignored;
static const struct sqz_report quiet = {NULL, SQZ_ERROR_FORMAT, "", &ignored};

/* First byte after a key's name: its type. NULL when the name is not there, or too few bytes follow it. */
static uint8_t *after_key(uint8_t *file, size_t n, const char *key, size_t n_after)
{
    uint8_t *at = memmem(file, n, key, strlen(key));
    return at && (size_t)(file + n - at) >= strlen(key) + n_after ? at + strlen(key) : NULL;
}

/* ---- Repair ------------------------------------------------------------------------ */

static void set_tensor_checksums(uint8_t *file, const struct sqz_walk *walk)
{
    uint64_t count = 0;
    uint8_t *key = after_key(file, (size_t)walk->data_offset, SQZ_KEY_CHECKSUM_TENSORS, 16 + 8 * walk->n_tensors);
    if (key) memcpy(&count, key + 8, 8); /* after the key's type and the elements' */
    for (size_t i = 0; i < walk->n_tensors; i++) {
        const struct sqz_tensor_entry *tensor = &walk->tensors[i];
        const uint64_t sum = XXH3_64bits(file + tensor->offset, (size_t)tensor->bytes);
        memset(file + tensor->offset + tensor->bytes, 0, (size_t)(sqz_format_pad(tensor->bytes) - tensor->bytes));
        if (count == walk->n_tensors) memcpy(key + 16 + 8 * (size_t)tensor->id, &sum, sizeof sum);
    }
}

static void set_metadata_checksum(uint8_t *file, const struct sqz_walk *walk)
{
    memset(file + walk->checksum_at, 0, 8);
    const uint64_t sum = XXH3_64bits(file, (size_t)walk->data_offset);
    memcpy(file + walk->checksum_at, &sum, sizeof sum);
}

/* Size, padding and checksums as the writer leaves them; a file that cannot be walked stays as it is. */
static void repair(struct context_input *input)
{
    struct sqz_walk walk = {.tensors = NULL};
    const enum sqz_status status = sqz_walk_metadata(&walk, input->file, input->n, &quiet);
    if (!status && walk.checksum_at && walk.data_offset <= input->n && walk.file_bytes <= MAX_FILE_BYTES) {
        /* The walk's names point into the old block: none is read here. */
        uint8_t *file = calloc(1, (size_t)walk.file_bytes);
        if (!file) fuzz_fail("a target has memory", "a copy of the file");
        memcpy(file, input->file, walk.file_bytes < input->n ? (size_t)walk.file_bytes : input->n);
        free(input->file);
        input->file = file;
        input->n = (size_t)walk.file_bytes;
        set_tensor_checksums(file, &walk);
        set_metadata_checksum(file, &walk);
    }
    free(walk.tensors);
}

struct context_input context_input_of(const uint8_t *bytes, size_t n)
{
    const size_t n_file = n > CONTEXT_CHOICES ? n - CONTEXT_CHOICES : 0;
    struct context_input input = {malloc(n_file ? n_file : 1), n_file, choices_of(bytes + n_file, n - n_file)};
    if (!input.file) fuzz_fail("a target has memory", "a copy of the file");
    memcpy(input.file, bytes, n_file);
    if (choose_byte(&input.choices) % 32 != 31) repair(&input);
    return input;
}

/* ---- Mutation ------------------------------------------------------------------------ */

/* Numbers at the edges of what a type, a check or a loop takes. */
static void put_strange(uint8_t *at, enum ggml_type type, uint32_t count, struct choices *c)
{
    static const uint32_t floats[] = {0x7fc00000, 0x7f800000, 0xff800000, 0,          0x80000000,
                                      1,          0x7f7fffff, 0xff7fffff, 0x3f800000, 0x00800000,
                                      0x49742400, 0xc9742400, 0x42c80000, 0x40000000};
    static const uint16_t halves[] = {0x7e00, 0x7c00, 0xfc00, 0, 0x8000, 1, 0x7bff, 0xfbff, 0x3c00};
    /* clang-format off */
    const uint32_t counts[] = {
        0,          1,       2,       3,  count, count - 1, count + 1, 0x7fffffff,          0x80000000,
        0xffffffff, 0x10000, 0x10001, 32, 48,    16,        255,       random_below(c, 64), random_below(c, 8)};
    uint32_t value = 0;
    if (type == GGML_TYPE_I8) {
        *at = (uint8_t)random_u32(c);
    } else if (type == GGML_TYPE_F16) {
        memcpy(at, &halves[random_below(c, 9)], 2);
    } else if (type == GGML_TYPE_F32) {
        memcpy(at, &floats[random_below(c, 14)], 4);
    } else {
        memcpy(&value, at, 4);
        value = random_below(c, 2) ? counts[random_below(c, 18)] : value + random_below(c, 5) - 2;
        memcpy(at, &value, 4);
    }
}

/* One number of one of our keys, or of a layer of one. */
static void change_key(uint8_t *file, size_t n, struct choices *c)
{
    /* clang-format off */
    static const char *const keys[] = {
        "squeeze.layer.head_count_kv", "squeeze.layer.head_count", "squeeze.layer.head_dim", "squeeze.layer.scale",
        "squeeze.layer.row_count", "squeeze.layer.fixed_count", "squeeze.layer.sliding_window",
        "squeeze.layer.window_tokens", "squeeze.layer.level_count", "squeeze.layer.cluster_count", "squeeze.layer.tail",
        "squeeze.layer.value_skip", "squeeze.layer.group", "squeeze.layer.curve_count", "squeeze.layer.code_words",
        "squeeze.layer.code_directions", "squeeze.layer.query_count", "squeeze.option.rule", "squeeze.option.index",
        "squeeze.option.keys", "squeeze.option.level_count", "squeeze.option.centroid_share", "squeeze.option.metric",
        "squeeze.option.group", "squeeze.option.code_words", "squeeze.option.iterations", "squeeze.option.calibration",
        "squeeze.option.sinks", "squeeze.option.window", "squeeze.token_count", "squeeze.layer_count",
        "squeeze.rope_scale", "squeeze.rope_factors", "squeeze.version",
    };
    /* clang-format on */
    uint8_t *at = after_key(file, n, keys[random_below(c, sizeof keys / sizeof *keys)], 16);
    uint32_t type = 0;
    uint64_t count = 1;
    if (!at) return;
    memcpy(&type, at, 4);
    at += 4;
    if (type == GGUF_TYPE_ARRAY) {
        memcpy(&type, at, 4);
        memcpy(&count, at + 4, 8);
        at += 12;
    }
    const size_t bytes = type == GGUF_TYPE_BOOL ? 1 : 4;
    at += bytes * random_below(c, count && count < 4096 ? (uint32_t)count : 1);
    if ((size_t)(file + n - at) < bytes) return;
    if (type == GGUF_TYPE_BOOL) *at ^= 1;
    else put_strange(at, type == GGUF_TYPE_FLOAT32 ? GGML_TYPE_F32 : GGML_TYPE_I32, 40, c);
}

static void change_tensor(uint8_t *file, size_t n, const struct sqz_tensor_entry *tensor, struct choices *c)
{
    const enum ggml_type type = (enum ggml_type)tensor->type;
    const size_t bytes = type == GGML_TYPE_I8 ? 1 : type == GGML_TYPE_F16 ? 2 : 4;
    if (tensor->offset > n || tensor->bytes > n - tensor->offset || tensor->bytes < bytes) return;
    const uint32_t count = (uint32_t)(tensor->bytes / bytes);
    uint8_t *data = file + tensor->offset, *one = data + bytes * random_below(c, count), kept[4];
    const uint32_t how = random_below(c, 8);
    if (how < 2) {
        uint8_t *other = data + bytes * random_below(c, count);
        memcpy(kept, one, bytes);
        memmove(one, other, bytes);
        memcpy(other, kept, bytes);
    } else if (how == 2) { /* one value throughout */
        put_strange(data, type, (uint32_t)tensor->ne[0], c);
        for (uint32_t i = 1; i < count; i++) memcpy(data + bytes * i, data, bytes);
    } else {
        put_strange(one, type, (uint32_t)tensor->ne[0], c);
    }
}

size_t context_input_mutate(uint8_t *bytes, size_t n, size_t capacity, unsigned seed)
{
    struct choices c = {.state = seed};
    struct sqz_walk walk = {.tensors = NULL};
    const uint32_t how = random_below(&c, 16);
    const size_t n_file = n > CONTEXT_CHOICES ? n - CONTEXT_CHOICES : 0;
    if (how >= 2 && !sqz_walk_metadata(&walk, bytes, n_file, &quiet)) {
        if (how < 3) LLVMFuzzerMutate(bytes, walk.data_offset < n_file ? (size_t)walk.data_offset : n_file, n_file);
        else if (how < 5) bytes[n_file + random_below(&c, CONTEXT_CHOICES)] = (uint8_t)random_u32(&c);
        else if (how < 9) change_key(bytes, walk.data_offset < n_file ? (size_t)walk.data_offset : n_file, &c);
        else
            for (uint32_t times = 1 + random_below(&c, 4); times > 0; times--)
                change_tensor(bytes, n_file, &walk.tensors[random_below(&c, (uint32_t)walk.n_tensors)], &c);
    } else {
        n = LLVMFuzzerMutate(bytes, n, capacity);
    }
    free(walk.tensors);
    return n;
}
