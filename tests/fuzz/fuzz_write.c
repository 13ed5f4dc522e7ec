/*
 * The writer of context files: made layers, names and places that it must take
 * or refuse, calls in the wrong order, and system calls that fail. What it
 * writes is opened and compared; what it does not finish leaves nothing.
 */
#include "fuzz.h"
#include "format.h"
#include "made_layer.h"
#include "out_folder.h"
#include "unfinished.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LAYERS = 3, PATH_BYTES = 320 };

struct scene {
    struct sqz_context_meta meta;
    struct made_layer made[MAX_LAYERS];
    struct sqz_layer layers[MAX_LAYERS];
    int32_t *tokens;
};

/* ---- What is written ------------------------------------------------------------- */

static const char *choose_text(const char *usual, struct choices *c)
{
    static char longest[SQZ_FORMAT_MAX_NAME_BYTES + 2];
    const uint8_t how = choose_byte(c);
    if (how < 240) return usual;
    memset(longest, 'a', sizeof longest - 1);
    return how < 244 ? "" : how < 248 ? longest : how < 252 ? NULL : "\x1b[2J";
}

static float choose_scale(struct choices *c)
{
    static const float scales[] = {0.0f, 1.0f, 2.5f, 64.0f, 65.0f, -1.0f, 1e-30f, 3e38f};
    const uint8_t how = choose_byte(c);
    return how < 192 ? scales[how % 4] : how < 250 ? scales[4 + how % 4] : NAN;
}

/* Options are numbers without use for the writer: it refuses what the reader would. */
static struct sqz_squeeze_options choose_options(const struct made_form *form, struct choices *c)
{
    struct sqz_squeeze_options options;
    sqz_squeeze_options_default(&options, form->rule);
    options.index = form->index;
    options.keys = form->key_format;
    options.rows = form->rows;
    const uint8_t how = choose_byte(c);
    uint32_t *const counts[] = {&options.n_levels,      &options.code_words, &options.n_iterations,
                                &options.n_calibration, &options.n_sinks,    &options.n_window};
    if (how < 32) *counts[how % 6] = how & 8 ? 0xffffffffu : choose_byte(c);
    else if (how < 48) options.centroid_share[how % 8] = (float)choose_byte(c) / 16.0f - 1.0f;
    else if (how < 52) options.metric = (enum sqz_metric)choose_byte(c);
    else if (how < 56) options.group = (enum sqz_group)choose_byte(c);
    return options;
}

static void make_scene(struct scene *scene, struct choices *c)
{
    const struct made_form form = choose_form(c, 60);
    const uint32_t n_layer = 1 + choose_below(c, MAX_LAYERS);
    memset(scene, 0, sizeof *scene);
    scene->tokens = calloc(form.n_tokens, sizeof *scene->tokens);
    if (!scene->tokens) fuzz_fail("a target has memory", "tokens");
    for (uint32_t i = 0; i < form.n_tokens; i++) scene->tokens[i] = (int32_t)(random_u32(c) >> 1);
    for (uint32_t i = 0; i < n_layer; i++) {
        make_layer(&scene->made[i], &form, c);
        scene->layers[i] = scene->made[i].layer;
    }
    scene->meta = (struct sqz_context_meta){
        .model_name = choose_text("A model", c),
        .model_architecture = choose_text("llama", c),
        .model_fingerprint = choose_text("0123456789abcdef", c),
        .source_name = choose_text("book.txt", c),
        .tokens = scene->tokens,
        .n_tokens = form.n_tokens,
        .has_template = choose_byte(c) & 1,
        .rope_scale = choose_scale(c),
        .n_layer = n_layer,
        .rope_factors = choose_byte(c) % 5,
        .squeeze = choose_options(&form, c),
    };
}

static void free_scene(struct scene *scene)
{
    for (uint32_t i = 0; i < MAX_LAYERS; i++) free_made_layer(&scene->made[i]);
    free(scene->tokens);
}

/* One number of one layer, or one array, other than it was made. */
static void spoil(struct scene *scene, struct choices *c)
{
    struct sqz_layer *layer = &scene->layers[choose_below(c, scene->meta.n_layer)];
    struct sqz_tensor_spec specs[SQZ_FORMAT_LAYER_TENSORS];
    uint32_t *const counts[] = {
        &layer->shape.n_head,  &layer->shape.n_head_kv,    &layer->shape.head_dim,      &layer->n_rows,
        &layer->n_fixed,       &layer->n_levels,           &layer->level[0].n_clusters, &layer->n_curve,
        &layer->codes.n_words, &layer->codes.n_directions, &layer->n_queries,           &layer->n_window_tokens};
    static const uint32_t values[] = {0, 1, 2, 3, 5, 9, 31, 32, 33, 0x10001, 0x7fffffff, 0xffffffff};
    const uint8_t how = choose_byte(c), which = choose_byte(c);
    const size_t n = sqz_layer_tensors(specs, layer, 0);
    if (how < 96) *counts[which % 12] = values[how % 12];
    else if (how < 128) sqz_slot_set(layer, specs[which % n].slot, NULL);
    else if (how < 144) layer->rule = (enum sqz_rule)(which % 3);
    else if (how < 160) layer->level[which % 2].centroids.type = (enum sqz_row_type)(which % 5);
    else if (how < 176) layer->group = (enum sqz_group)which;
    else if (how < 192) layer->sliding_window = !layer->sliding_window;
    else if (how < 208) layer->shape.scale = which & 1 ? NAN : -1.0f;
    else if (how < 224) scene->tokens[which % scene->meta.n_tokens] = -1;
    else ((int32_t *)(uintptr_t)layer->position)[which % layer->n_rows] = (int32_t)how - 240;
}

/* ---- Where it is written ------------------------------------------------------------- */

/* A place that is new, taken, a link, a folder, or not there; made in the folder, without which it is none. */
static const char *make_place(char path[PATH_BYTES], uint8_t how)
{
    static const char around[] = "/./././././././././././././././././././././././././././././././././././././././././."
                                 "/./././././././././././././././././././././././././././././././././././././././././.";
    static const char *const names[] = {"new",  "old",  "link", "broken",    "folder", "none/new",
                                        "new/", "pipe", "loop", "to-folder", "old/x"};
    /* A long path: messages keep its end. */
    snprintf(path, PATH_BYTES, "%s%s/%s", out_folder(), how & 64 ? around : "", names[how % 11]);
    if (how) out_folder_fill();
    return how == 127 ? "" : path;
}

/* Most of a writer's calls to the system are among its first; allocations and writes follow. */
static uint32_t choose_call(uint8_t fault)
{
    return fault & 128 ? fault & 127 : fault % 24;
}

/* ---- Writing ---------------------------------------------------------------------------- */

/* The steps of prepare, some left out or in another order. */
static enum sqz_status write_scene(const struct scene *scene, const struct sqz_layer *shapes, const char *path,
                                   uint8_t how, struct sqz_error *error)
{
    struct sqz_context_writer *writer = NULL;
    uint64_t n_bytes = 0;
    enum sqz_status status = sqz_context_writer_create(&writer, path, &scene->meta, shapes, error);
    if (!status != !!writer) fuzz_fail("creating gives a writer or a reason", error->message);
    if (!status && how % 32 >= 24) out_folder_disturb(how % 8);
    for (uint32_t i = scene->meta.n_layer; i-- > 0 && !status;)
        if (how % 32 != 1 || i)
            status = sqz_context_writer_put_layer(writer, how % 32 == 2 ? i + 1 : i, &scene->layers[i], error);
    if (!status && how % 32 == 4)
        sqz_unfinished_remove(); /* as a signal would: a file without its name cannot be put in place */
    if (status || how % 32 == 3) {
        sqz_context_writer_abort(writer);
        return status ? status : SQZ_ERROR_CANCELLED;
    }
    status = sqz_context_writer_commit(writer, how & 32 ? &n_bytes : NULL, error);
    if (!status && how & 32 && n_bytes < 1000) fuzz_fail("the size of a file is told", "it is too small");
    return status;
}

/* Calls without what they need give a message. */
static void misuse(const struct scene *scene, const char *path)
{
    struct sqz_error error;
    struct sqz_context_writer *writer = NULL;
    if (!sqz_context_writer_create(NULL, path, &scene->meta, scene->layers, &error) ||
        !sqz_context_writer_create(&writer, NULL, &scene->meta, scene->layers, &error) || writer ||
        !sqz_context_writer_put_layer(NULL, 0, &scene->layers[0], &error) ||
        !sqz_context_writer_commit(NULL, NULL, &error) || !error.message[0])
        fuzz_fail("a call without what it needs is refused", error.message);
    sqz_context_writer_abort(NULL);
}

static void compare(const char *path, const struct scene *scene)
{
    struct sqz_context *context = NULL;
    struct sqz_tensor_spec specs[SQZ_FORMAT_LAYER_TENSORS];
    struct sqz_error error;
    if (sqz_context_open(&context, path, NULL, &error)) fuzz_fail("what was written can be opened", error.message);
    for (uint32_t i = 0; i < scene->meta.n_layer; i++) {
        const struct sqz_layer *layer = sqz_context_layer(context, i);
        const size_t n = sqz_layer_tensors(specs, layer, i);
        for (size_t j = 0; j < n; j++) {
            const void *got = sqz_slot_get(layer, specs[j].slot);
            const void *wanted = sqz_slot_get(&scene->layers[i], specs[j].slot);
            if (!got != !wanted || (got && memcmp(got, wanted, specs[j].bytes)))
                fuzz_fail("what was written is read", specs[j].name);
        }
    }
    sqz_context_free(context);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    struct choices choices = choices_of(bytes, n), *c = &choices;
    struct scene scene;
    struct sqz_layer shapes[MAX_LAYERS];
    struct sqz_error error = {SQZ_OK, ""};
    char buffer[PATH_BYTES];
    const uint8_t how = choose_byte(c), place = choose_byte(c), fault = choose_byte(c), which = choose_byte(c);
    make_scene(&scene, c);
    memcpy(shapes, scene.layers, sizeof shapes);
    if (how & 1) spoil(&scene, c);
    if (how & 2) { /* the other way round: declared wrong */
        struct sqz_layer kept[MAX_LAYERS];
        memcpy(kept, scene.layers, sizeof kept);
        memcpy(scene.layers, shapes, sizeof shapes);
        memcpy(shapes, kept, sizeof kept);
    }
    const char *path = make_place(buffer, place & 1 ? place >> 1 : 0);
    faults_begin(how & 4 ? choose_call(fault) : 0, which, how & 8);
    const enum sqz_status status = write_scene(&scene, shapes, path, how & 16 ? which : 0, &error);
    faults_end();
    if (!status) compare(path, &scene);
    if (which == 0) misuse(&scene, path);
    out_folder_check(status, path, error.message);
    free_scene(&scene);
    return 0;
}
