/*
 * Opening a model: checks the file, loads it through llama.cpp, and probes its
 * attention with a few tokens, so that what cannot be expressed is refused
 * before any work, with the reason.
 */
#include "model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend_cpu.h"
#include "backend_shards.h"
#include "backend_cards.h"
#include "bands.h"
#include "gpu.h"
#include "draft_weights.h"
#include "error.h"
#include "llama_library.h"
#include "preparing.h"
#include "run.h"
#include "text.h"

/* ---- Options and info -------------------------------------------------------------- */

void sqz_model_options_default(struct sqz_model_options *options)
{
    *options = (struct sqz_model_options){
        .size = sizeof *options, .n_threads = 0, .rope_scale = 1.0f, .together_cpu = SQZ_TOGETHER_EACH};
}

enum sqz_status sqz_choose_threads(int *n_threads, struct sqz_error *error)
{
    if (*n_threads < 0 || *n_threads > 1024)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%d threads: allowed are 1 to 1024, or 0 for one a core",
                             *n_threads);
#ifdef _OPENMP
    if (*n_threads == 0) *n_threads = sqz_crew_most();
#else
    *n_threads = 1;
#endif
    return SQZ_OK;
}

void sqz_model_get_info(const struct sqz_model *model, struct sqz_model_info *info)
{
    *info = model->info;
    for (int i = 0; i < SQZ_MOST_CARDS; i++) info->weight_copies_bytes += sqz_gpu_weights_bytes(model->weights[i]);
}

/* ---- Context ----------------------------------------------------------------------------- */

struct llama_context_params sqz_llama_context_params(const struct sqz_model *model, float rope_scale)
{
    struct llama_context_params p = llama_context_default_params();
    p.n_seq_max = 1;
    p.kv_unified = true; /* one array of cells, in the order of the batch, whatever sequence a token is of */
    p.n_threads = p.n_threads_batch = model->info.n_threads;
    p.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    p.type_k = p.type_v = GGML_TYPE_F16;
    p.swa_full = true; /* cells in token order, also where a window slides */
    p.no_perf = true;
    p.offload_kqv = model->on_card;
    p.op_offload = false;
    p.yarn_orig_ctx = model->n_original_tokens;
    if (rope_scale > 1.0f) {
        p.rope_freq_scale = model->own_rope_scale / rope_scale;
        if (strcmp(model->rope_type, "none") == 0) p.rope_scaling_type = LLAMA_ROPE_SCALING_TYPE_LINEAR;
    }
    return p;
}

/* llama.cpp chooses LongRoPE's factors by the length of its own context, which for us is that of a batch. Models with
 * such factors are loaded with SQZ_BATCH_TOKENS for their original length (load() below), so that a context of just
 * that has the short factors, and one of a few tokens more the long ones. */
static struct llama_context *create_llama(struct sqz_model *model, struct llama_model *llama, struct sqz_rope rope,
                                          uint32_t n_sequences, uint32_t n_cells, uint32_t n_tokens,
                                          struct sqz_error *error)
{
    struct llama_context_params p = sqz_llama_context_params(model, rope.scale);
    p.n_seq_max = n_sequences;
    p.n_ctx = rope.factors == SQZ_ROPE_FACTORS_LONG ? n_cells + 1 : n_cells;
    p.n_batch = p.n_ubatch = n_tokens;
    if (!model->all_on_card || sqz_gpu_by_callback()) {
        p.cb_eval = sqz_seam_callback;
        p.cb_eval_user_data = model;
    }
    sqz_llama_complaint_clear();
    if (model->on_card) sqz_seam_enter(model, true); /* it is laid out as it will run */
    struct llama_context *context = llama_init_from_model(llama, p);
    if (model->on_card) sqz_seam_leave();
    if (!context)
        sqz_error_set(error, SQZ_ERROR_MEMORY, "llama.cpp could not create a context for %s: %s", model->info.name,
                      sqz_llama_complaint("out of memory"));
    return context;
}

static enum sqz_status create_context(struct sqz_model *model, struct sqz_rope rope, uint32_t n_sequences,
                                      uint32_t n_tokens, struct sqz_error *error)
{
    struct llama_context *const context =
        create_llama(model, model->llama, rope, n_sequences, n_tokens, n_tokens, error);
    if (!context) return SQZ_ERROR_MEMORY;
    if (model->context) llama_free(model->context);
    model->context = model->running = context;
    model->rope = rope;
    model->n_sequences = n_sequences;
    model->n_batch_tokens = n_tokens;
    return SQZ_OK;
}

uint32_t sqz_model_most_sequences(void)
{
    const size_t most = llama_max_parallel_sequences();
    return most < SQZ_MOST_SEQUENCES ? (uint32_t)most : SQZ_MOST_SEQUENCES;
}

static bool is_same(struct sqz_rope a, struct sqz_rope b)
{
    return a.scale == b.scale && a.factors == b.factors;
}

/* llama.cpp reserves a row of logits a sequence: room for a crowd only when it comes, then for twice as many. */
enum sqz_status sqz_model_make_ready(struct sqz_model *model, struct sqz_rope rope, uint32_t n_sequences,
                                     struct sqz_error *error)
{
    model->running = model->context;
    if (model->context && is_same(rope, model->rope) && n_sequences <= model->n_sequences &&
        model->n_batch_tokens == SQZ_BATCH_TOKENS)
        return SQZ_OK;
    uint32_t room = model->n_sequences ? model->n_sequences : 1;
    while (room < n_sequences) room *= 2;
    if (model->copies == SQZ_COPIES_AUTO && n_sequences >= SQZ_COPIES_SEQUENCES) model->wants_copies = true;
    if (room > sqz_model_most_sequences()) room = sqz_model_most_sequences();
    return create_context(model, rope, room, SQZ_BATCH_TOKENS, error);
}

/* The one for such runs, created when it is first asked for or was one for another RoPE; NULL: none is left, or no
 * memory for it. */
static struct llama_context *repeated_of(struct sqz_model *model, struct sqz_rope rope, size_t n_tokens, bool drafts,
                                         struct sqz_error *error)
{
    struct llama_model *const llama = drafts && model->drafting.llama ? model->drafting.llama : model->llama;
    const uint32_t n_cells = model->n_original_tokens ? SQZ_BATCH_TOKENS : (uint32_t)n_tokens;
    struct sqz_repeated *r = model->repeated, *const end = r + model->n_repeated;
    while (r < end && (r->n_tokens != n_tokens || r->drafts != drafts)) r++;
    if (r == model->repeated + SQZ_MOST_REPEATED) return NULL;
    if (r < end && r->context && is_same(rope, r->rope)) return r->context;
    if (r == end) model->n_repeated++;
    if (r < end && r->context) llama_free(r->context);
    *r = (struct sqz_repeated){create_llama(model, llama, rope, 1, n_cells, (uint32_t)n_tokens, error), rope, n_tokens,
                               drafts};
    return r->context;
}

enum sqz_status sqz_model_make_ready_to_repeat(struct sqz_model *model, struct sqz_rope rope, size_t n_tokens,
                                               bool drafts, struct sqz_error *error)
{
    const enum sqz_status status = sqz_model_make_ready(model, rope, 1, error);
    if (status != SQZ_OK) return status;
    struct llama_context *const own = repeated_of(model, rope, n_tokens, drafts, error);
    if (own) model->running = own;
    else if (drafts && model->drafting.llama) return SQZ_ERROR_MEMORY;
    sqz_error_clear(error);
    return SQZ_OK;
}

enum sqz_status sqz_model_expect_sessions(struct sqz_model *model, size_t n, struct sqz_error *error)
{
    const size_t most = sqz_model_most_sequences();
    sqz_error_clear(error);
    if (model->on_card) return SQZ_OK;
    return sqz_model_make_ready(model, model->rope, (uint32_t)(n < most ? n : most), error);
}

/* So that what one card's layers give the next one's takes the way between them, not that by host memory. Cards that have
 * none read as well. */
static void connect_cards(struct sqz_model *model)
{
    int cards[SQZ_CUDA_MOST_RANKS];
    uint32_t n = 0;
    char why[256];
    for (; n < SQZ_CUDA_MOST_RANKS && (int)n < model->n_model_cards; n++) cards[n] = (int)n;
    if (n > 1) sqz_gpu_calls_of()->connect(cards, n, why, sizeof why);
}

/* Where the larger context has no room, or its length would choose other factors, batches are as ever. */
enum sqz_status sqz_model_make_ready_to_read(struct sqz_model *model, struct sqz_rope rope, size_t n_tokens,
                                             struct sqz_error *error)
{
    const bool larger = model->all_on_card && !model->n_original_tokens && n_tokens > SQZ_BATCH_TOKENS;
    connect_cards(model);
    if (larger && create_context(model, rope, 1, SQZ_READING_TOKENS, error) == SQZ_OK) return SQZ_OK;
    return sqz_model_make_ready(model, rope, 1, error);
}

/* ---- Probe ---------------------------------------------------------------------------------- */

static bool probe_tokens(struct sqz_model *model, struct sqz_run *run, int32_t position, size_t n)
{
    const struct sqz_run_token tokens[2] = {{.position = position}, {.position = position + 1}};
    run->tokens = tokens;
    run->n_tokens = n;
    return sqz_run_decode(model, run) == 0 && run->error.status == SQZ_OK;
}

/* Runs a few tokens and learns each layer's shape. To see which layers slide, two tokens are placed just behind the
 * window, the first of them is moved back to the start, and a third is run: layers in which it sees only two tokens
 * slide (the first is masked there, or its cell already taken). */
static enum sqz_status probe(struct sqz_model *model, const char *path, struct sqz_error *error)
{
    const llama_pos far = (llama_pos)model->info.n_window_tokens + 16; /* fill_info() has seen to its size */
    llama_memory_t memory = llama_get_memory(model->context);
    const bool windowed = model->info.n_window_tokens != 0;
    struct sqz_run run = {.probing = true};
    sqz_llama_complaint_clear();
    llama_memory_clear(memory, false);
    bool ok = probe_tokens(model, &run, windowed ? far : 0, windowed ? 2 : 1);
    if (ok && windowed) {
        if (llama_memory_can_shift(memory)) {
            llama_memory_seq_add(memory, 0, far, far + 1, -(far - 2));
            ok = probe_tokens(model, &run, far + 2, 1);
        } else {
            ok = false;
            sqz_error_set(&run.error, SQZ_ERROR_UNSUPPORTED,
                          "%s: its sliding windows cannot be told apart from its full layers",
                          model->info.architecture);
        }
    }
    if (run.error.status != SQZ_OK) return sqz_error_set(error, run.error.status, "%s: %s", path, run.error.message);
    if (!ok)
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED, "%s: llama.cpp could not run the model: %s", path,
                             sqz_llama_complaint("unknown reason"));
    if (run.next_layer != model->info.n_layer)
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                             "%s: architecture %s has standard attention in %u of its %u layers; all are needed", path,
                             model->info.architecture, run.next_layer, model->info.n_layer);
    return SQZ_OK;
}

/* ---- Open, free -------------------------------------------------------------------------------- */

/* llama_pos and what is added to it have 31 bits. */
enum { SQZ_MAX_WINDOW = 1 << 30 };

static void meta_string(const struct llama_model *llama, const char *key, char *out, size_t size)
{
    if (llama_model_meta_val_str(llama, key, out, size) < 0) out[0] = '\0';
}

/* ---- What the file says of positions ----------------------------------------------------------- */

static int64_t find_key(const struct sqz_model *model, const char *name)
{
    const struct gguf_context *gguf = model->files.gguf;
    char key[256];
    snprintf(key, sizeof key, "%s.%s", gguf_get_val_str(gguf, gguf_find_key(gguf, "general.architecture")), name);
    return gguf_find_key(gguf, key);
}

/* llama.cpp ends the process at a type that it does not know. */
static enum sqz_status read_rope_type(struct sqz_model *model, const char *path, struct sqz_error *error)
{
    static const char *const known[] = {"none", "linear", "yarn", "longrope"};
    const int64_t key = find_key(model, "rope.scaling.type");
    const bool is_text = key >= 0 && gguf_get_kv_type(model->files.gguf, key) == GGUF_TYPE_STRING;
    const char *type = is_text ? gguf_get_val_str(model->files.gguf, key) : "linear";
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(type, known[i]) == 0) snprintf(model->rope_type, sizeof model->rope_type, "%s", type);
    if (model->rope_type[0]) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                         "%s: its RoPE scaling is of type \"%s\": allowed are none, linear, yarn and longrope", path,
                         type);
}

/* Original lengths of models with LongRoPE's factors: rope.scaling.original_context_length, or the trained one. */
static enum sqz_status read_original_length(struct sqz_model *model, const char *path, struct sqz_error *error)
{
    static const char *const names[] = {"rope.scaling.original_context_length", "context_length"};
    if (!model->files.long_factors) return SQZ_OK;
    for (size_t i = 0; i < 2 && !model->n_original_tokens; i++) {
        const int64_t key = find_key(model, names[i]);
        if (key >= 0 && gguf_get_kv_type(model->files.gguf, key) == GGUF_TYPE_UINT32)
            model->n_original_tokens = gguf_get_val_u32(model->files.gguf, key);
    }
    if (!model->n_original_tokens)
        return sqz_error_set(error, SQZ_ERROR_FORMAT,
                             "%s: it has long and short RoPE factors, and no length from which the long ones hold "
                             "(rope.scaling.original_context_length)",
                             path);
    if (find_key(model, "attention.temperature_scale") >= 0)
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                             "%s: long and short RoPE factors together with a temperature that follows the length are "
                             "not supported",
                             path);
    return SQZ_OK;
}

static enum sqz_status load(struct sqz_model *model, const char *path, struct sqz_error *error)
{
    enum sqz_status status = read_rope_type(model, path, error);
    if (status == SQZ_OK) status = read_original_length(model, path, error);
    if (status != SQZ_OK) return status;
    model->llama = sqz_model_load_llama(model, &model->files, path);
    if (!model->llama)
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED, "%s: llama.cpp cannot load this model: %s", path,
                             sqz_llama_complaint("unknown reason"));
    model->n_trained_tokens = (uint32_t)llama_model_n_ctx_train(model->llama);
    model->own_rope_scale = llama_model_rope_freq_scale_train(model->llama);
    if (strcmp(model->rope_type, "none") == 0) model->own_rope_scale = 1.0f;
    if (model->n_trained_tokens < 1)
        return sqz_error_set(error, SQZ_ERROR_FORMAT, "%s: it says that it holds texts of 0 tokens", path);
    if (!(model->own_rope_scale > 0 && isfinite(model->own_rope_scale)))
        return sqz_error_set(error, SQZ_ERROR_FORMAT, "%s: its RoPE scaling factor is %g: allowed is a number above 0",
                             path, 1.0 / (double)model->own_rope_scale);
    return SQZ_OK;
}

uint32_t sqz_model_limit(const struct sqz_model *model, float rope_scale)
{
    const double limit = round((double)model->n_trained_tokens * (double)rope_scale);
    return limit < INT32_MAX ? (uint32_t)limit : INT32_MAX; /* positions have 31 bits */
}

enum sqz_rope_factors sqz_model_rope_factors(const struct sqz_model *model, size_t n_tokens)
{
    if (!model->n_original_tokens) return SQZ_ROPE_FACTORS_NONE;
    return n_tokens > model->n_original_tokens ? SQZ_ROPE_FACTORS_LONG : SQZ_ROPE_FACTORS_SHORT;
}

enum sqz_status sqz_model_rope_of(const struct sqz_model *model, const struct sqz_context_meta *meta,
                                  struct sqz_rope *rope, struct sqz_error *error)
{
    static const char *const names[] = {"", "no choice of RoPE factors", "short RoPE factors", "long RoPE factors"};
    const bool own = model->own_rope_scale != 1.0f || strcmp(model->rope_type, "yarn") == 0;
    const bool unsaid = meta->rope_factors == SQZ_ROPE_FACTORS_UNSAID;
    rope->scale = meta->rope_scale;
    rope->factors =
        unsaid ? sqz_model_rope_factors(model, SQZ_BATCH_TOKENS) : (enum sqz_rope_factors)meta->rope_factors;
    if (unsaid && own && meta->rope_scale > 1.0f)
        return sqz_error_set(error, SQZ_ERROR_MISMATCH,
                             "the context was read with --rope-scale %g in place of the model's own RoPE scaling (%s), "
                             "by a version that did so: prepare the document again",
                             (double)meta->rope_scale, model->rope_type);
    if ((rope->factors == SQZ_ROPE_FACTORS_NONE) != (model->n_original_tokens == 0))
        return sqz_error_set(error, SQZ_ERROR_MISMATCH,
                             "the context was read with %s, the model has %s: prepare the document again",
                             names[rope->factors], model->n_original_tokens ? "long and short ones" : "none");
    return SQZ_OK;
}

/* ---- Info ----------------------------------------------------------------------------------------- */

static enum sqz_status fill_info(struct sqz_model *model, const char *path, const struct sqz_model_options *options,
                                 struct sqz_error *error)
{
    struct sqz_model_info *info = &model->info;
    const struct llama_model *llama = model->llama;
    meta_string(llama, "general.architecture", info->architecture, sizeof info->architecture);
    meta_string(llama, "general.name", info->name, sizeof info->name);
    if (!info->name[0]) snprintf(info->name, sizeof info->name, "%s", info->architecture);
    llama_model_desc(llama, info->description, sizeof info->description);
    info->n_layer = (uint32_t)llama_model_n_layer(llama);
    info->n_vocab = (uint32_t)llama_vocab_n_tokens(model->vocab);
    info->n_context_tokens = sqz_model_limit(model, model->rope_scale);
    info->n_window_tokens = (uint32_t)llama_model_n_swa(llama);
    info->n_parameters = llama_model_n_params(llama);
    info->size_bytes = llama_model_size(llama);
    info->n_threads = options->n_threads;
    info->n_gpu_layers = (uint32_t)model->n_gpu_layers;
    if (model->on_card && options->split == SQZ_SPLIT_ROWS)
        info->n_row_cards = sqz_gpu_count() < SQZ_CUDA_MOST_RANKS ? (uint32_t)sqz_gpu_count() : SQZ_CUDA_MOST_RANKS;
    model->chat_template = sqz_text_usable_template(llama_model_chat_template(llama, NULL));
    info->has_chat_template = model->chat_template != NULL;
    info->unknown_chat_template = !model->chat_template && llama_model_chat_template(llama, NULL) != NULL;
    const char *reason = NULL;
    if (llama_model_is_recurrent(llama)) reason = "recurrent layers have no keys and values";
    else if (llama_model_is_hybrid(llama)) reason = "hybrid models with recurrent layers are not supported";
    else if (llama_model_is_diffusion(llama)) reason = "diffusion models do not generate token by token";
    else if (llama_model_has_encoder(llama)) reason = "encoder-decoder models are not supported";
    else if (strcmp(info->architecture, "llama4") == 0) reason = "chunked local attention is not supported";
    else if (info->n_window_tokens > SQZ_MAX_WINDOW) reason = "its sliding window is longer than 2^30 tokens";
    if (reason)
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED, "%s: architecture %s: %s", path, info->architecture, reason);
    return sqz_model_files_fingerprint(info->fingerprint, &model->files, error);
}

/* ---- Cards ------------------------------------------------------------------------------------------- */

/* Where layers are wanted on a card: all of them with -1, which no card at all makes none. */
static enum sqz_status choose_card(struct sqz_model *model, const struct sqz_model_options *o, struct sqz_error *error)
{
    if (o->n_gpu_layers < -1)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "%d layers on a card: allowed are 0 and more, or -1 for all",
                             (int)o->n_gpu_layers);
    if (o->together < SQZ_TOGETHER_CHEAPEST || o->together > SQZ_TOGETHER_ALL)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "together %d: allowed are 0 to %d, see enum sqz_together",
                             o->together, (int)SQZ_TOGETHER_ALL);
    if (o->together_cpu < SQZ_TOGETHER_CHEAPEST || o->together_cpu > SQZ_TOGETHER_ALL)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT,
                             "together on the CPU %d: allowed are 0 to %d, see enum sqz_together", o->together_cpu,
                             (int)SQZ_TOGETHER_ALL);
    if (o->weight_copies < SQZ_COPIES_AUTO || o->weight_copies > SQZ_COPIES_ALWAYS)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "weight copies %d: allowed are 0 to %d, see enum sqz_copies",
                             o->weight_copies, (int)SQZ_COPIES_ALWAYS);
    if (o->split < SQZ_SPLIT_LAYERS || o->split > SQZ_SPLIT_TURNS)
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "split %d: allowed are 0 to %d, see enum sqz_split", o->split,
                             (int)SQZ_SPLIT_TURNS);
    model->copies = (enum sqz_copies)o->weight_copies;
    model->wants_copies = model->copies == SQZ_COPIES_ALWAYS;
    if (o->n_gpu_layers == 0) return SQZ_OK;
    if (sqz_gpu_count() == 0) {
        if (o->n_gpu_layers < 0) return SQZ_OK;
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED, "%d layers on a card: %s", (int)o->n_gpu_layers,
                             sqz_gpu_reason());
    }
    model->on_card = true;
    const int n_model = o->split == SQZ_SPLIT_ROWS ? 1 : sqz_gpu_count(); /* cards that layers go to */
    for (int i = 0; i < n_model; i++) model->devices[i] = sqz_gpu_llama_device(i);
    model->n_model_cards = n_model;
    model->n_gpu_layers = o->n_gpu_layers < 0 ? INT16_MAX : o->n_gpu_layers;
    return SQZ_OK;
}

/* The model's layers, where cards of about the same free memory can have as many each; 0: they cannot. */
static uint32_t count_even_layers(const struct sqz_model *model)
{
    const int64_t key = find_key(model, "block_count");
    const uint32_t n_cards = (uint32_t)model->n_model_cards;
    size_t least = SIZE_MAX, most = 0, total;
    for (uint32_t i = 0; i < n_cards; i++) {
        size_t bytes;
        ggml_backend_dev_memory(model->devices[i], &bytes, &total);
        least = bytes < least ? bytes : least;
        most = bytes > most ? bytes : most;
    }
    if (n_cards < 2 || most - least > most / 10 || llama_max_devices() > SQZ_MOST_CARDS || key < 0 ||
        gguf_get_kv_type(model->files.gguf, key) != GGUF_TYPE_UINT32)
        return 0;
    const uint32_t n_layer = gguf_get_val_u32(model->files.gguf, key);
    return n_layer < n_cards || n_layer >= (uint32_t)model->n_gpu_layers ? 0 : n_layer;
}

/* Cards of about the same free memory get as many layers each. By memory alone llama.cpp gives the first of two one more,
 * because it counts the output as a layer of the last one, and the last waits for that with every batch of a text. Each
 * division lies halfway between two layers, so that rounding moves none. In turns each has its share of every band that
 * texts are read by. */
static void share_layers(struct sqz_model *model, enum sqz_split split)
{
    const uint32_t n_layer = count_even_layers(model), n_cards = (uint32_t)model->n_model_cards;
    uint32_t end[SQZ_MOST_BANDS] = {n_layer}, n = 1, k = 0;
    float before = 0;
    if (!n_layer) return;
    /* ggml's scheduler has room for as many, the CPU's two among them. */
    if (split == SQZ_SPLIT_TURNS && sqz_gpu_llama_device_again(0, 0))
        n = sqz_bands_plan(end, n_layer, n_cards, (uint32_t)(llama_max_devices() - 2) / n_cards);
    for (uint32_t band = 0, begin = 0; band < n; begin = end[band++])
        for (uint32_t i = 0; i < n_cards; i++, k++) {
            const uint32_t layer = begin + (end[band] - begin) * (i + 1) / n_cards;
            const float upto = layer < n_layer ? (float)layer - 0.5f : (float)n_layer + 1;
            if (band > 0) model->devices[k] = sqz_gpu_llama_device_again((int)i, band);
            model->card_shares[k] = upto - before;
            before = upto;
        }
}

static enum sqz_status create_backend(struct sqz_model *model, const struct sqz_model_options *o,
                                      struct sqz_error *error)
{
    if (!model->on_card) return sqz_backend_cpu_create(&model->backend, model->info.n_threads, error);
    return sqz_backend_cards_create(&model->backend, sqz_gpu_calls_of(), sqz_gpu_count(), (enum sqz_split)o->split,
                                    o->gpu_memory_bytes, (enum sqz_together)o->together, model->layers,
                                    model->info.n_threads, error);
}

/* How tokens go through contexts on the CPU; the model's layers are known. */
static enum sqz_status choose_ways(struct sqz_model *model, const struct sqz_model_options *o, struct sqz_error *error)
{
    const enum sqz_together together = (enum sqz_together)o->together_cpu;
    struct sqz_cpu_cost cost = {0};
    uint32_t l = 0;
    if (model->on_card || together == SQZ_TOGETHER_EACH) return SQZ_OK;
    if (together == SQZ_TOGETHER_ONE)
        return sqz_error_set(
            error, SQZ_ERROR_UNSUPPORTED,
            "one selection of all tokens together is made on a card alone; on the CPU each has its own, or "
            "all reads everything");
    while (l + 1 < model->info.n_layer && model->layers[l].sliding_window) l++;
    if (together == SQZ_TOGETHER_CHEAPEST) {
        const int n_threads = sqz_crew_step(&model->crew, SQZ_BATCH_TOKENS); /* each in its place */
        const enum sqz_status status = sqz_cpu_cost_measure(&cost, &model->layers[l].shape, n_threads, error);
        sqz_crew_pause(&model->crew);
        if (status != SQZ_OK) return status;
    }
    sqz_backend_cpu_set_ways(model->backend, together, &cost);
    return SQZ_OK;
}

enum sqz_status sqz_model_open(struct sqz_model **out, const char *path, const struct sqz_model_options *user_options,
                               struct sqz_error *error)
{
    struct sqz_model_options options;
    sqz_model_options_default(&options);
    *out = NULL;
    sqz_error_clear(error);
    if (user_options) {
        if (user_options->size != sizeof options)
            return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "model options of %zu bytes: this library's have %zu",
                                 user_options->size, sizeof options);
        options = *user_options;
    }
    if (options.rope_scale == 0) options.rope_scale = 1.0f;
    if (!(options.rope_scale >= 1.0f && options.rope_scale <= 64.0f))
        return sqz_error_set(error, SQZ_ERROR_ARGUMENT, "RoPE scale %g: allowed is 1 to 64",
                             (double)options.rope_scale);
    struct sqz_crew crew;
    sqz_crew_begin(&crew, options.n_threads); /* now: opening the model is time enough to see what others do */
    enum sqz_status status = sqz_choose_threads(&options.n_threads, error);
    if (status != SQZ_OK) return status;

    struct sqz_model *model = calloc(1, sizeof *model);
    if (!model) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a model");
    status = sqz_model_files_open(&model->files, path, error);
    if (status != SQZ_OK) goto out;
    model->rope_scale = options.rope_scale;
    model->crew = crew;
    llama_backend_init();
    sqz_llama_complaint_clear();
    status = choose_card(model, &options, error);
    if (status == SQZ_OK) share_layers(model, (enum sqz_split)options.split);
    if (status == SQZ_OK) status = load(model, path, error);
    if (status != SQZ_OK) goto out;
    const int32_t n_most = llama_model_n_layer(model->llama) + 1;
    if (model->n_gpu_layers > n_most) model->n_gpu_layers = n_most;
    model->all_on_card = model->on_card && model->n_gpu_layers == n_most;
    if (model->on_card && options.split == SQZ_SPLIT_ROWS && !model->all_on_card) {
        status = sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                               "%d of %d layers on a card: cards that share a context's rows have all of them",
                               (int)model->n_gpu_layers, (int)n_most);
        goto out;
    }
    model->vocab = llama_model_get_vocab(model->llama);
    status = fill_info(model, path, &options, error);
    if (status == SQZ_OK) status = sqz_model_files_check(&model->files, true, error);
    if (status == SQZ_OK && options.draft_path) status = sqz_draft_weights_load(model, options.draft_path, error);
    if (status != SQZ_OK) goto out;
    model->layers = calloc(model->info.n_layer, sizeof *model->layers);
    model->candidates = malloc(model->info.n_vocab * sizeof *model->candidates);
    if (!model->layers || !model->candidates) {
        status = sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for %u layers and %u words", model->info.n_layer,
                               model->info.n_vocab);
        goto out;
    }
    status = create_backend(model, &options, error);
    if (status != SQZ_OK) goto out;
    model->crew.placed = !model->on_card; /* a card's driver starts threads of its own during runs */
    const struct sqz_rope rope = {options.rope_scale, sqz_model_rope_factors(model, 0)};
    status = sqz_model_make_ready(model, rope, 1, error);
    if (status != SQZ_OK) goto out;
    status = probe(model, path, error);
    if (status != SQZ_OK) goto out;
    model->info.n_head = model->layers[0].shape.n_head;
    model->info.n_head_kv = model->layers[0].shape.n_head_kv;
    model->info.head_dim = model->layers[0].shape.head_dim;
    status = choose_ways(model, &options, error);
    if (status != SQZ_OK) goto out;
    sqz_crew_pause(&model->crew);
out:
    if (status != SQZ_OK) {
        sqz_model_free(model);
        return status;
    }
    *out = model;
    return SQZ_OK;
}

void sqz_model_free(struct sqz_model *model)
{
    if (!model) return;
    for (size_t i = 0; i < model->n_repeated; i++)
        if (model->repeated[i].context) llama_free(model->repeated[i].context);
    if (model->context) llama_free(model->context);
    for (int i = 0; i < SQZ_MOST_CARDS; i++) sqz_gpu_weights_free(model->weights[i]);
    sqz_draft_weights_free(model);
    if (model->llama) llama_model_free(model->llama);
    sqz_model_files_close(&model->files);
    free(model->candidates);
    sqz_seam_close(model);
    sqz_backend_shards_free(model->shards);
    if (model->on_card) sqz_backend_cards_free(model->backend);
    else sqz_backend_cpu_free(model->backend);
    free(model->layers);
    free(model);
}
