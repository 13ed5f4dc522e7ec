/*
 * Writes the seeds of the fuzz targets: make_seeds FOLDER, once, by hand; what
 * it wrote is committed. Context files are of made layers, one file for every
 * optional part of the format; models, data sets and texts are a few hundred
 * bytes each.
 */
#include "context_input.h"
#include "format.h"
#include "made_layer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

size_t LLVMFuzzerMutate(uint8_t *bytes, size_t n, size_t capacity)
{
    (void)bytes;
    (void)capacity;
    return n;
}

static const char *out;

static FILE *create(const char *target, const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", out, target);
    mkdir(path, 0777);
    snprintf(path, sizeof path, "%s/%s/%s", out, target, name);
    FILE *file = fopen(path, "wb");
    if (!file) fuzz_fail("a seed can be written", path);
    return file;
}

static void put(const char *target, const char *name, const void *bytes, size_t n)
{
    FILE *file = create(target, name);
    if (fwrite(bytes, 1, n, file) != n || fclose(file)) fuzz_fail("a seed can be written", name);
}

static void put_text(const char *target, const char *name, const char *text)
{
    put(target, name, text, strlen(text));
}

/* ---- Context files ------------------------------------------------------------- */

enum { MAX_LAYERS = 2, MAX_TOKENS = 128 };

/* One bit for each part of the format that a layer has. */
static uint32_t parts_of(const struct sqz_layer *layer)
{
    const bool parts[] = {
        layer->sliding_window,
        layer->n_levels == 0 && !layer->sliding_window,
        layer->n_levels == 1,
        layer->n_levels == 2,
        layer->n_levels == 3,
        layer->n_levels && layer->level[0].centroids.type == SQZ_ROW_I8,
        layer->retained_keys.type == SQZ_ROW_I8,
        layer->keys.type == SQZ_ROW_I8,
        layer->keys.type == SQZ_ROW_I4,
        layer->keys.type == SQZ_ROW_I44,
        layer->codes.n_words == 1,
        layer->codes.n_words == 4,
        layer->tail && layer->n_levels,
        layer->tail_gain != NULL,
        layer->variance_gain != NULL,
        layer->global_share != NULL,
        layer->value_skip && layer->n_levels,
        layer->rule == SQZ_RULE_PAPER && layer->n_levels,
        layer->n_queries > 0 && layer->n_levels,
        layer->shape.n_head_kv > 1,
        layer->n_fixed == 0 && layer->n_levels,
    };
    uint32_t bits = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) bits |= (uint32_t)parts[i] << i;
    return bits;
}

/* n_layer 0: the index of shards. */
static bool write_context(const char *path, const struct made_form *form, struct made_layer *made, uint32_t n_layer,
                          const struct sqz_shard_place *shard)
{
    int32_t tokens[MAX_TOKENS];
    struct sqz_layer layers[MAX_LAYERS];
    struct sqz_context_writer *writer;
    struct sqz_error error;
    for (int32_t i = 0; i < MAX_TOKENS; i++) tokens[i] = 7 * i;
    struct sqz_context_meta meta = {.model_name = "A model",
                                    .model_architecture = "llama",
                                    .model_fingerprint = "0123456789abcdef",
                                    .source_name = "book.txt",
                                    .tokens = tokens,
                                    .n_tokens = form->n_tokens,
                                    .has_template = true,
                                    .rope_scale = 1.0f,
                                    .n_layer = n_layer ? n_layer : MAX_LAYERS};
    if (shard) meta.shard = *shard;
    sqz_squeeze_options_default(&meta.squeeze, form->rule);
    meta.squeeze.index = form->index;
    meta.squeeze.keys = form->key_format;
    meta.squeeze.rows = form->rows;
    for (uint32_t i = 0; i < n_layer; i++) layers[i] = made[i].layer;
    enum sqz_status status = sqz_context_writer_create(&writer, path, &meta, n_layer ? layers : NULL, &error);
    for (uint32_t i = 0; i < n_layer && !status; i++)
        status = sqz_context_writer_put_layer(writer, i, &layers[i], &error);
    if (status) fuzz_fail("a made context can be written", error.message);
    if (sqz_context_writer_commit(writer, NULL, &error)) fuzz_fail("a made context can be written", error.message);
    return true;
}

/* The file, and behind it the bytes that choose what is done with it. */
static void put_context(const char *target, const char *name, const struct made_form *form, struct made_layer *made,
                        uint32_t n_layer, const struct sqz_shard_place *shard, struct choices *c)
{
    char path[512];
    uint8_t more[CONTEXT_CHOICES];
    fclose(create(target, name));
    snprintf(path, sizeof path, "%s/%s/%s", out, target, name);
    write_context(path, form, made, n_layer, shard);
    for (size_t i = 0; i < sizeof more; i++) more[i] = (uint8_t)random_u32(c);
    more[0] = 0;
    more[1] &= 127; /* without failing system calls */
    more[3] = 0;    /* and the file itself */
    FILE *file = fopen(path, "ab");
    if (!file || fwrite(more, 1, sizeof more, file) != sizeof more || fclose(file))
        fuzz_fail("a seed can be written", path);
}

static size_t layer_bytes(const struct sqz_layer *layer)
{
    struct sqz_tensor_spec specs[SQZ_FORMAT_LAYER_TENSORS];
    const size_t n = sqz_layer_tensors(specs, layer, 0);
    size_t bytes = 0;
    for (size_t i = 0; i < n; i++) bytes += sqz_slot_get(layer, specs[i].slot) ? sqz_format_pad(specs[i].bytes) : 0;
    return bytes;
}

/* Random contexts of which those are kept that are small and have a part that two files before had not. Layers of less
 * than some 64 rows are too small to be clustered anew. */
static void make_contexts(const char *target, uint32_t n_tokens, size_t most_bytes, uint32_t most_files)
{
    uint32_t once = 0, twice = 0;
    struct choices random = {.state = n_tokens};
    for (uint32_t attempt = 0, kept = 0; attempt < 50000 && kept < most_files; attempt++) {
        uint8_t bytes[512];
        char name[16];
        struct made_layer made[MAX_LAYERS];
        for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (uint8_t)random_u32(&random);
        struct choices c = choices_of(bytes, sizeof bytes);
        struct made_form form = choose_form(&c, 24);
        form.n_tokens = n_tokens;
        const uint32_t n_layer = 1 + (attempt & 1);
        uint32_t parts = 0;
        size_t size = 3000;
        for (uint32_t i = 0; i < n_layer; i++) {
            make_layer(&made[i], &form, &c);
            parts |= parts_of(&made[i].layer);
            size += layer_bytes(&made[i].layer);
        }
        if (size <= most_bytes && parts & ~twice) {
            twice |= once & parts;
            once |= parts;
            snprintf(name, sizeof name, "made-%02u", ++kept);
            put_context(target, name, &form, made, n_layer, NULL, &c);
        }
        for (uint32_t i = 0; i < n_layer; i++) free_made_layer(&made[i]);
    }
}

/* A small layer of so many tokens without clusters, with a window or without; of F16 rows. */
static struct made_form make_dense(struct made_layer *made, uint32_t n_tokens, bool slides, struct choices *random)
{
    for (uint32_t attempt = 0; attempt < 50000; attempt++) {
        uint8_t bytes[512];
        for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (uint8_t)random_u32(random);
        struct choices c = choices_of(bytes, sizeof bytes);
        struct made_form form = choose_form(&c, 24);
        form.n_tokens = n_tokens;
        make_layer(made, &form, &c);
        const struct sqz_layer *layer = &made->layer;
        if (layer->sliding_window == slides && layer->n_levels == 0 && layer->n_queries == 0 &&
            layer_bytes(layer) < 10000 && form.rows == SQZ_ROWS_F16)
            return form;
        free_made_layer(made);
    }
    fuzz_fail("a layer without clusters is made", "none was");
}

/* The first of two shards, with all of a window, the second, with none of it, and their index. */
static void make_shards(void)
{
    static const char *const files[] = {"a.gguf", "b.gguf"};
    static const uint64_t checksums[] = {1, 2};
    struct sqz_shard_place shard = {
        .count = 2, .block_tokens = 8, .n_tokens = 40, .files = files, .checksums = checksums};
    struct choices random = {.state = 6};
    struct made_layer made[MAX_LAYERS];
    struct made_form form = make_dense(&made[1], 40, true, &random);
    for (shard.number = 1; shard.number < 3; shard.number++) {
        const struct made_form dense = make_dense(&made[0], shard.number == 1 ? 24 : 16, false, &random);
        if (shard.number == 2) made[1].layer.n_rows = made[1].layer.n_fixed = 0;
        put_context("context", shard.number == 1 ? "shard-window" : "shard-none", &dense, made, 2, &shard, &random);
        free_made_layer(&made[0]);
    }
    free_made_layer(&made[1]);
    shard.number = 0;
    put_context("context", "shard-index", &form, made, 0, &shard, &random);
}

/* The first of the files with a key that no context has: an array of texts. Its checksums are repaired when it is
 * read. */
static void make_foreign_key(void)
{
    static const char *words[] = {"one", "two", ""};
    static uint8_t data[1 << 14];
    char path[512];
    snprintf(path, sizeof path, "%s/context/made-01", out);
    struct gguf_context *gguf = gguf_init_from_file(path, (struct gguf_init_params){.no_alloc = true, .ctx = NULL});
    FILE *old = fopen(path, "rb");
    if (!gguf || !old || fseek(old, (long)gguf_get_data_offset(gguf), SEEK_SET)) fuzz_fail("a seed can be read", path);
    const size_t n_data = fread(data, 1, sizeof data, old);
    fclose(old);
    gguf_set_arr_str(gguf, "other.words", words, 3);
    const size_t n_metadata = gguf_get_meta_size(gguf);
    uint8_t *whole = calloc(n_metadata + n_data, 1);
    if (!whole) fuzz_fail("there is memory", "a copy of a seed");
    gguf_get_meta_data(gguf, whole);
    memcpy(whole + n_metadata, data, n_data);
    put("context", "foreign-key", whole, n_metadata + n_data);
    free(whole);
    gguf_free(gguf);
}

/* ---- Models --------------------------------------------------------------------- */

static void add_tensor(struct gguf_context *gguf, const char *name, enum ggml_type type, int64_t n0, int64_t n1,
                       int64_t n2)
{
    static const uint8_t zeros[4096];
    struct ggml_tensor tensor;
    memset(&tensor, 0, sizeof tensor);
    tensor.type = type;
    tensor.ne[0] = n0;
    tensor.ne[1] = n1;
    tensor.ne[2] = n2;
    tensor.ne[3] = 1;
    tensor.nb[0] = ggml_type_size(type);
    tensor.nb[1] = tensor.nb[0] * (size_t)n0 / (size_t)ggml_blck_size(type);
    tensor.nb[2] = tensor.nb[1] * (size_t)n1;
    tensor.nb[3] = tensor.nb[2] * (size_t)n2;
    tensor.data = (void *)(uintptr_t)zeros;
    snprintf(tensor.name, sizeof tensor.name, "%s", name);
    gguf_add_tensor(gguf, &tensor);
}

struct model {
    const char *name, *architecture;
    uint32_t n_experts, n_window, n_split;
    bool tied, gated;
    enum ggml_type type;
};

static void set_number(struct gguf_context *gguf, const struct model *model, const char *key, uint32_t value)
{
    char whole[96];
    snprintf(whole, sizeof whole, "%s.%s", model->architecture, key);
    gguf_set_val_u32(gguf, whole, value);
}

static void set_model_keys(struct gguf_context *gguf, const struct model *model)
{
    gguf_set_val_str(gguf, "general.architecture", model->architecture);
    gguf_set_val_str(gguf, "general.name", "tiny");
    set_number(gguf, model, "block_count", 1);
    set_number(gguf, model, "embedding_length", 32);
    set_number(gguf, model, "context_length", 128);
    set_number(gguf, model, "feed_forward_length", 64);
    set_number(gguf, model, "attention.head_count", 2);
    set_number(gguf, model, "attention.head_count_kv", 1);
    set_number(gguf, model, "attention.key_length", 16);
    set_number(gguf, model, "attention.value_length", 16);
    if (model->n_window) set_number(gguf, model, "attention.sliding_window", model->n_window);
    if (model->n_experts) {
        set_number(gguf, model, "expert_count", model->n_experts);
        set_number(gguf, model, "expert_used_count", 2);
        set_number(gguf, model, "expert_feed_forward_length", 32);
    }
    if (model->n_split) {
        gguf_set_val_u16(gguf, "split.no", 0);
        gguf_set_val_u16(gguf, "split.count", (uint16_t)model->n_split);
        gguf_set_val_i32(gguf, "split.tensors.count", 9);
    }
}

static void put_model(const struct model *model)
{
    struct gguf_context *gguf = gguf_init_empty();
    set_model_keys(gguf, model);
    add_tensor(gguf, "token_embd.weight", model->type, 32, 8, 1);
    if (!model->tied) add_tensor(gguf, "output.weight", model->type, 32, 8, 1);
    add_tensor(gguf, "blk.0.attn_q.weight", model->type, 32, 32, 1);
    if (model->n_experts) {
        add_tensor(gguf, "blk.0.ffn_up_exps.weight", model->type, 32, 4, model->n_experts);
        add_tensor(gguf, "blk.0.ffn_gate_exps.weight", model->type, 32, 4, model->n_experts);
        add_tensor(gguf, "blk.0.ffn_up_shexp.weight", model->type, 32, 4, 1);
    } else {
        add_tensor(gguf, "blk.0.ffn_up.weight", model->type, 32, 16, 1);
        add_tensor(gguf, "blk.0.ffn_down.weight", model->type, 32, 16, 1);
        if (model->gated) add_tensor(gguf, "blk.0.ffn_gate.weight", model->type, 32, 16, 1);
    }
    char path[512];
    fclose(create("model", model->name));
    snprintf(path, sizeof path, "%s/model/%s", out, model->name);
    if (!gguf_write_to_file(gguf, path, false)) fuzz_fail("a seed can be written", path);
    gguf_free(gguf);
}

static void make_models(void)
{
    static const struct model models[] = {
        {"plain", "llama", 0, 0, 0, true, true, GGML_TYPE_Q4_0},
        {"window", "gemma3", 0, 64, 0, false, true, GGML_TYPE_Q4_0},
        {"experts", "qwen3moe", 4, 0, 0, true, false, GGML_TYPE_Q4_0},
        {"ungated", "gpt2", 0, 0, 0, false, false, GGML_TYPE_Q8_0},
        {"split", "llama", 0, 0, 2, true, true, GGML_TYPE_Q4_0},
    };
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) put_model(&models[i]);
}

/* ---- Texts --------------------------------------------------------------------------- */

static void make_datasets(void)
{
    put_text("dataset", "plain",
             "{\"document\":\"A cat sat.\",\"questions\":[\"Who sat?\",\"Where?\"],\"answers\":"
             "[\"a cat\",[\"there\",\"here\"]],\"score\":\"rouge_l\",\"max_tokens\":8}\n\n"
             "{\"document\":\"Two.\",\"questions\":[\"How many?\"],\"answers\":[\"2\"],\"score\":\"count\"}\n");
    put_text("dataset", "longbench",
             " {\"context\":\"Some text.\",\"input\":\"\",\"answers\":[\"x = 1\"],\"dataset\":"
             "\"lcc\",\"all_classes\":null}\n{\"context\":\"A\",\"input\":\"B?\",\"answers\":[\"yes\"],\"dataset\":"
             "\"qasper_e\"}\n{\"context\":\"A\",\"input\":\"B\",\"answers\":[\"big\"],\"dataset\":\"trec\","
             "\"all_classes\":[\"big\",\"small\"]}\n");
    put_text("dataset", "l-eval",
             "{\"input\":\"Text.\",\"instructions\":[\"Which?\"],\"outputs\":[\"A B\"],"
             "\"evaluation\":\"exam\"}\n{\"input\":\"Text.\",\"instructions\":[\"Say\"],\"outputs\":[\"It is. So.\"],"
             "\"evaluation\":\"rouge\"}\r\n");
    put_text("dataset", "ruler",
             "{\"index\":1,\"input\":\"Hay 7 hay.\\nWhat is the number?\\n\",\"outputs\":[\"7\"]}\n");
    put_text("dataset", "damaged",
             "{\"document\":\"\\ud83d\\ude00\",\"questions\":[\"?\"],\"answers\":[\"\\u00e9\"],"
             "\"score\":\"any_string\"}\n{\"document\":\n");
}

static void make_texts(void)
{
    put_text("text", "words", "Plain words.\r\nA second line.\n");
    put_text("text", "marked",
             "\xef\xbb\xbfGr\xc3\xbc\xc3\x9f"
             "e \xe2\x82\xac \xf0\x9f\x99\x82\n");
    put_text("text", "wrong", "ab\xff\xc3(\xe2\x82\xf0\x9f\xed\xa0\x80\xc0\xaf");
    put_text("text", "control",
             "\x1b[31mred\x1b[0m\x07\xc2\x9b"
             "2J\x7f");
    put_text("text", "invisible", " \t\n\xe2\x80\x8b\xc2\xa0\xef\xbb\xbf");
    put_text("text", "pdf", "%PDF-1.7\n1 0 obj\n");
    put_text("text", "zip", "PK\x03\x04 word/document.xml");
    put("text", "utf16", "\xff\xfeH\0e\0l\0l\0o\0\n\0", 14);
    put("text", "groups",
        "12:memory:/a/b\n0::/user.slice/c\n\0"
        "1073741824\n",
        44);
}

static void make_numbers(void)
{
    struct choices c = {.state = 7};
    for (unsigned i = 0; i < 16; i++) {
        uint8_t bytes[160];
        char name[16];
        for (size_t j = 0; j < sizeof bytes; j++) bytes[j] = (uint8_t)random_u32(&c);
        snprintf(name, sizeof name, "numbers-%02u", i);
        bytes[0] = (uint8_t)i;
        put("layer", name, bytes, sizeof bytes);
        bytes[0] = i < 4 ? 0 : bytes[0] & (i < 12 ? 7 : 31);
        put("write", name, bytes, sizeof bytes);
    }
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "make_seeds FOLDER\n");
        return 2;
    }
    out = argv[1];
    make_contexts("context", 19, 8000, 18);
    make_contexts("resqueeze", 90, 20000, 6);
    make_foreign_key();
    make_shards();
    make_models();
    make_datasets();
    make_texts();
    make_numbers();
    return 0;
}
