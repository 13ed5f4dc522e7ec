/*
 * The shape of a model from its GGUF file. Head counts and the like come from
 * the metadata; widths, the kind of FFN, tied embeddings and bits a weight from
 * the tensors that are there, which cannot disagree with what would be read.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "error.h"
#include "model.h"
#include "squeeze_roofline.h"

struct reader {
    const char *path;
    struct gguf_context *gguf;
    char architecture[SQZ_NAME_MAX];
    struct sqz_error *error;
};

/* ---- Metadata -------------------------------------------------------------------- */

/* "llama.block_count" */
static int64_t find_key(const struct reader *r, const char *name)
{
    char key[2 * SQZ_NAME_MAX];
    snprintf(key, sizeof key, "%s.%s", r->architecture, name);
    return gguf_find_key(r->gguf, key);
}

static bool integer_at(const struct reader *r, int64_t key, uint32_t *value)
{
    uint64_t wide;
    switch (gguf_get_kv_type(r->gguf, key)) {
    case GGUF_TYPE_UINT16: wide = gguf_get_val_u16(r->gguf, key); break;
    case GGUF_TYPE_UINT32: wide = gguf_get_val_u32(r->gguf, key); break;
    case GGUF_TYPE_UINT64: wide = gguf_get_val_u64(r->gguf, key); break;
    case GGUF_TYPE_INT32: wide = (uint64_t)gguf_get_val_i32(r->gguf, key); break;
    default: return false;
    }
    *value = (uint32_t)wide;
    return wide <= UINT32_MAX;
}

/* A number of the model; `value` stays when the key is missing and not needed. */
static enum sqz_status read_number(const struct reader *r, const char *name, bool needed, uint32_t *value)
{
    const int64_t key = find_key(r, name);
    if (key < 0 && !needed) return SQZ_OK;
    if (key < 0)
        return sqz_error_set(r->error, SQZ_ERROR_FORMAT, "%s: %s.%s is missing", r->path, r->architecture, name);
    if (gguf_get_kv_type(r->gguf, key) == GGUF_TYPE_ARRAY)
        return sqz_error_set(r->error, SQZ_ERROR_UNSUPPORTED,
                             "%s: %s.%s differs between layers, which the analysis "
                             "cannot express",
                             r->path, r->architecture, name);
    if (!integer_at(r, key, value))
        return sqz_error_set(r->error, SQZ_ERROR_FORMAT, "%s: %s.%s has type %s: allowed is a 32-bit count", r->path,
                             r->architecture, name, gguf_type_name(gguf_get_kv_type(r->gguf, key)));
    return SQZ_OK;
}

static enum sqz_status read_architecture(struct reader *r)
{
    static const char *const unsupported[][2] = {
        {"ssm.state_size", "it has recurrent layers"},
        {"wkv.head_size", "it has recurrent layers"},
        {"attention.kv_lora_rank", "its keys and values are latent (MLA)"},
    };
    const int64_t key = gguf_find_key(r->gguf, "general.architecture");
    snprintf(r->architecture, sizeof r->architecture, "%s", gguf_get_val_str(r->gguf, key));
    for (size_t i = 0; i < sizeof unsupported / sizeof *unsupported; i++)
        if (find_key(r, unsupported[i][0]) >= 0)
            return sqz_error_set(r->error, SQZ_ERROR_UNSUPPORTED, "%s: architecture %s cannot be analysed: %s", r->path,
                                 r->architecture, unsupported[i][1]);
    return SQZ_OK;
}

static enum sqz_status read_heads(const struct reader *r, struct sqz_model_shape *shape)
{
    enum sqz_status status;
    if ((status = read_number(r, "block_count", true, &shape->n_layer)) ||
        (status = read_number(r, "embedding_length", true, &shape->n_embd)) ||
        (status = read_number(r, "attention.head_count", true, &shape->n_head)))
        return status;
    shape->n_head_kv = shape->n_head;
    if ((status = read_number(r, "attention.head_count_kv", false, &shape->n_head_kv))) return status;
    shape->head_dim = shape->n_head ? shape->n_embd / shape->n_head : 0;
    uint32_t value_dim = 0;
    if ((status = read_number(r, "attention.key_length", false, &shape->head_dim)) ||
        (status = read_number(r, "attention.value_length", false, &value_dim)))
        return status;
    if (value_dim && value_dim != shape->head_dim)
        return sqz_error_set(r->error, SQZ_ERROR_UNSUPPORTED,
                             "%s: keys of %u numbers and values of %u: the analysis "
                             "needs them equal",
                             r->path, shape->head_dim, value_dim);
    return SQZ_OK;
}

/* Of every `n` layers the last sees everything; 0: not known, all layers are taken as full. A fact of the
 * architecture that files do not state. */
static uint32_t window_period(const char *architecture)
{
    static const struct {
        const char *architecture;
        uint32_t period;
    } known[] = {{"gemma2", 2}, {"gemma3", 6}, {"cohere2", 4}, {"gpt-oss", 2}, {"olmo2", 4}, {"exaone4", 4}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(architecture, known[i].architecture) == 0) return known[i].period;
    return 0;
}

static enum sqz_status read_windows(const struct reader *r, struct sqz_model_shape *shape)
{
    const uint32_t period = window_period(r->architecture);
    const enum sqz_status status = read_number(r, "attention.sliding_window", false, &shape->n_window_tokens);
    if (status == SQZ_OK && shape->n_window_tokens && period)
        shape->n_window_layer = shape->n_layer - shape->n_layer / period;
    return status;
}

static enum sqz_status read_experts(const struct reader *r, struct sqz_model_shape *shape)
{
    enum sqz_status status;
    if ((status = read_number(r, "expert_count", false, &shape->n_expert)) || shape->n_expert == 0) return status;
    return read_number(r, "expert_used_count", true, &shape->n_expert_used);
}

/* ---- Tensors ------------------------------------------------------------------------- */

/* 0 where there is no such tensor. */
static int64_t tensor_width(const struct reader *r, const char *name, int dimension)
{
    const int64_t tensor = gguf_find_tensor(r->gguf, name);
    return tensor < 0 ? 0 : gguf_get_tensor_ne(r->gguf, tensor)[dimension];
}

static double tensor_numbers(const struct reader *r, int64_t tensor)
{
    const int64_t *ne = gguf_get_tensor_ne(r->gguf, tensor);
    return (double)ne[0] * (double)ne[1] * (double)ne[2] * (double)ne[3];
}

static enum sqz_status width_from(const struct reader *r, const char *name, int64_t width, uint32_t *out)
{
    if (width < 1 || width > 1 << 24)
        return sqz_error_set(r->error, SQZ_ERROR_FORMAT, "%s: the width of %s is %" PRId64 ": allowed is 1 to 16777216",
                             r->path, name, width);
    *out = (uint32_t)width;
    return SQZ_OK;
}

static enum sqz_status read_ffn(const struct reader *r, struct sqz_model_shape *shape)
{
    if (shape->n_expert) {
        shape->gated_ffn =
            tensor_width(r, "blk.0.ffn_gate_exps.weight", 1) > 0 || tensor_width(r, "blk.0.ffn_gate.0.weight", 1) > 0;
        const int64_t shared = tensor_width(r, "blk.0.ffn_up_shexp.weight", 1);
        if (shared > 0 && shared <= 1 << 24) shape->n_ff_shared = (uint32_t)shared;
        uint32_t width = 0;
        const enum sqz_status status = read_number(r, "expert_feed_forward_length", false, &width);
        if (status != SQZ_OK) return status;
        if (!width) return read_number(r, "feed_forward_length", true, &shape->n_ff);
        shape->n_ff = width;
        return SQZ_OK;
    }
    const int64_t up = tensor_width(r, "blk.0.ffn_up.weight", 1), down = tensor_width(r, "blk.0.ffn_down.weight", 0);
    /* Gate and up may be one matrix, twice as wide as what goes down. */
    shape->gated_ffn = tensor_width(r, "blk.0.ffn_gate.weight", 1) > 0 || (down > 0 && up / 2 == down && up % 2 == 0);
    return width_from(r, "blk.0.ffn_down.weight", down, &shape->n_ff);
}

static bool ends_in(const char *text, const char *end)
{
    const size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

/* Average bits of the layers' matrices, and those of the matrix that makes logits. */
static enum sqz_status read_bits(const struct reader *r, const char *output, struct sqz_bit_widths *bits)
{
    double numbers = 0, bytes = 0;
    for (int64_t i = 0; i < gguf_get_n_tensors(r->gguf); i++) {
        const char *name = gguf_get_tensor_name(r->gguf, i);
        const bool matrix =
            strncmp(name, "blk.", 4) == 0 && ends_in(name, ".weight") && gguf_get_tensor_ne(r->gguf, i)[1] > 1;
        if (!matrix) continue;
        numbers += tensor_numbers(r, i);
        bytes += (double)gguf_get_tensor_size(r->gguf, i);
    }
    const int64_t last = gguf_find_tensor(r->gguf, output);
    if (!(numbers > 0) || last < 0 || !(tensor_numbers(r, last) > 0))
        return sqz_error_set(r->error, SQZ_ERROR_FORMAT, "%s: it holds no weights of layers, or no %s", r->path,
                             output);
    bits->weight = 8 * bytes / numbers;
    bits->output = 8 * (double)gguf_get_tensor_size(r->gguf, last) / tensor_numbers(r, last);
    bits->kv = bits->activation = 16;
    return SQZ_OK;
}

static enum sqz_status read_tensors(const struct reader *r, struct sqz_model_shape *shape, struct sqz_bit_widths *bits)
{
    enum sqz_status status =
        width_from(r, "token_embd.weight", tensor_width(r, "token_embd.weight", 1), &shape->n_vocab);
    if (status == SQZ_OK) status = read_ffn(r, shape);
    shape->tied_embeddings = gguf_find_tensor(r->gguf, "output.weight") < 0;
    if (status != SQZ_OK) return status;
    return read_bits(r, shape->tied_embeddings ? "token_embd.weight" : "output.weight", bits);
}

static void read_name(const struct reader *r, struct sqz_model_shape *shape)
{
    const int64_t key = gguf_find_key(r->gguf, "general.name");
    const bool named = key >= 0 && gguf_get_kv_type(r->gguf, key) == GGUF_TYPE_STRING;
    snprintf(shape->name, sizeof shape->name, "%s", named ? gguf_get_val_str(r->gguf, key) : r->architecture);
}

/* The roofline's own checks, on one token. */
static enum sqz_status check(const struct reader *r, const struct sqz_model_shape *shape,
                             const struct sqz_bit_widths *bits)
{
    struct sqz_costs costs;
    struct sqz_error error;
    const struct sqz_workload work = sqz_workload_decode(1, 0, 1);
    if (sqz_roofline(&costs, shape, bits, &work, NULL, &error) == SQZ_OK) return SQZ_OK;
    return sqz_error_set(r->error, SQZ_ERROR_FORMAT, "%s: %s", r->path, error.message);
}

enum sqz_status sqz_model_shape_read(const char *path, struct sqz_model_shape *shape, struct sqz_bit_widths *bits,
                                     struct sqz_error *error)
{
    struct sqz_error own;
    struct reader r = {.path = path, .error = error ? error : &own};
    enum sqz_status status;
    memset(shape, 0, sizeof *shape);
    memset(bits, 0, sizeof *bits);
    sqz_error_clear(r.error);
    if ((status = sqz_model_file_open(&r.gguf, path, r.error)) != SQZ_OK) return status;
    if ((status = read_architecture(&r)) == SQZ_OK && (status = read_heads(&r, shape)) == SQZ_OK &&
        (status = read_experts(&r, shape)) == SQZ_OK && (status = read_windows(&r, shape)) == SQZ_OK &&
        (status = read_tensors(&r, shape, bits)) == SQZ_OK)
        status = check(&r, shape, bits);
    read_name(&r, shape);
    gguf_free(r.gguf);
    return status;
}
