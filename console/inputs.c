/* Files, models and contexts; inputs.h describes it. The only place that chooses by the environment. */
#define _POSIX_C_SOURCE 200809L

#include "inputs.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common.h"
#include "crew.h"
#include "gpu.h"

#define DEFAULT_MODEL "SmolLM2-135M-Instruct.Q4_1.gguf"

char *read_whole_file(const char *path, size_t *n_bytes)
{
    const size_t most = (size_t)1 << 32; /* far above any model's context; stops an endless pipe */
    bool is_stdin = strcmp(path, "-") == 0;
    const char *name = is_stdin ? "standard input" : path;
    FILE *file = is_stdin ? stdin : fopen(path, "rb");
    size_t capacity = 1 << 16, n = 0;
    char *text = malloc(capacity);
    if (!file) {
        free(text);
        die("%s: %s", name, strerror(errno));
    }
    while (text) {
        size_t got = fread(text + n, 1, capacity - n - 1, file);
        n += got;
        if (got == 0) break;
        if (n + 1 == capacity) {
            char *larger = capacity <= most / 2 ? realloc(text, capacity * 2) : NULL;
            if (!larger) {
                free(text);
                die("%s: larger than %s, or than the memory left", name, capacity > most / 2 ? "2 GiB" : "expected");
            }
            text = larger;
            capacity *= 2;
        }
    }
    if (!text || ferror(file)) {
        int reason = text ? errno : ENOMEM;
        free(text);
        die("%s: %s", name, signal_caught() ? "interrupted" : strerror(reason));
    }
    if (!is_stdin) fclose(file);
    text[n] = '\0';
    *n_bytes = n;
    return text;
}

static const char *environment(const char *name)
{
    const char *value = getenv(name);
    return value && *value ? value : NULL;
}

static char *join(const char *first, const char *second)
{
    size_t n = strlen(first) + strlen(second) + 1;
    char *text = malloc(n);
    if (!text) die("out of memory");
    snprintf(text, n, "%s%s", first, second);
    return text;
}

const char *temporary_parent(void)
{
    const char *given = getenv("TMPDIR");
    return given && *given ? given : "/tmp";
}

/* Folders above the last one. */
static void make_parents(char *path)
{
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(path, 0700);
        *slash = '/';
    }
}

/* Where models are that nobody gave a place; NULL: nowhere. */
static char *models_folder(void)
{
    const char *directory;
    if ((directory = environment("SQUEEZE_CACHE"))) return join(directory, "/models/");
    if ((directory = environment("XDG_CACHE_HOME"))) return join(directory, "/squeeze/models/");
    if ((directory = environment("HOME"))) return join(directory, "/.cache/squeeze/models/");
    return NULL;
}

char *choose_model(const char *option)
{
    struct stat status;
    if (!option) option = environment("SQUEEZE_MODEL");
    if (option) return join(option, "");
    char *const folder = models_folder();
    if (!folder)
        die("no model: give one with -m FILE.gguf or $SQUEEZE_MODEL ($HOME is not set, so there is no default)");
    char *const path = join(folder, DEFAULT_MODEL);
    free(folder);
    if (stat(path, &status) != 0) {
        warn("no model: %s: %s; 'make demo' fetches this default model, -m FILE.gguf or $SQUEEZE_MODEL chooses another",
             path, strerror(errno));
        free(path);
        exit(1);
    }
    return path;
}

char *choose_contexts(const char *option)
{
    const char *directory;
    char *path;
    if (!option) option = environment("SQUEEZE_CONTEXTS");
    if (option) return join(option, "");
    if ((directory = environment("XDG_DATA_HOME"))) path = join(directory, "/squeeze/contexts");
    else if ((directory = environment("HOME"))) path = join(directory, "/.local/share/squeeze/contexts");
    else die("no folder for contexts: give one with --contexts FOLDER ($HOME is not set, so there is no default)");
    make_parents(path);
    return path;
}

size_t measured_threads(size_t asked)
{
    return asked ? asked : (size_t)sqz_crew_most();
}

const char *const copies_names[] = {"auto", "never", "always", NULL};
const char *const split_names[] = {"layers", "rows", "turns", NULL};
const char *const together_names[] = {"cheapest", "each", "one", "all", NULL};

int together_of(const struct gpu_flags *gpu, bool on_card)
{
    if (gpu->together != TOGETHER_UNSAID) return gpu->together;
    return on_card || gpu->many_users ? SQZ_TOGETHER_CHEAPEST : SQZ_TOGETHER_EACH;
}

struct sqz_model *open_model(const char *option, size_t n_threads, double rope_scale)
{
    return open_model_on(option, n_threads, rope_scale, NULL);
}

/* The model's weights in 4 bits, made now if they are not there. */
static char *four_bits_of(const char *model, size_t n_threads)
{
    struct sqz_error error = {0};
    char fingerprint[65], name[NAME_MAX];
    const char *const slash = strrchr(model, '/'), *const base = slash ? slash + 1 : model;
    char *const folder = models_folder();
    if (!folder)
        die("--draft-weights 4bit: $HOME is not set, so there is no place for them: make them with llama-quantize, and "
            "give the file");
    if (sqz_model_fingerprint(fingerprint, model, &error) != SQZ_OK) exit(report(&error));
    const char *const end = strstr(base, ".gguf");
    const size_t n = end ? (size_t)(end - base) : strlen(base);
    snprintf(name, sizeof name, "%.*s-%.16s-q4_0.gguf", n < 160 ? (int)n : 160, base, fingerprint);
    char *const path = join(folder, name);
    make_parents(path);
    free(folder);
    if (access(path, F_OK) == 0) return path;
    fprintf(stderr, "making 4-bit weights that draft, once, kept as %s\n", path);
    if (sqz_model_quantize(path, model, (int)n_threads, &error) != SQZ_OK) exit(report(&error));
    return path;
}

struct sqz_model *open_model_on(const char *option, size_t n_threads, double rope_scale, const struct gpu_flags *gpu)
{
    return open_model_drafting(option, n_threads, rope_scale, gpu, NULL);
}

struct sqz_model *open_model_drafting(const char *option, size_t n_threads, double rope_scale,
                                      const struct gpu_flags *gpu, const char *draft_weights)
{
    struct sqz_error error = {0};
    struct sqz_model_options options;
    struct sqz_model *model = NULL;
    char *path = choose_model(option);
    sqz_model_options_default(&options);
    options.n_threads = (int)n_threads;
    options.rope_scale = (float)rope_scale;
    if (gpu) {
        options.n_gpu_layers = gpu->n_layers == SIZE_MAX ? -1 : (int)gpu->n_layers;
        options.gpu_memory_bytes = (size_t)(gpu->memory * 1024 * 1024 * 1024);
        options.together = together_of(gpu, true);
        options.together_cpu = together_of(gpu, false);
        options.weight_copies = gpu->copies;
        options.split = gpu->split != SPLIT_UNSAID ? gpu->split
                        : gpu->in_shards           ? SQZ_SPLIT_ROWS
                        : gpu->prepares            ? SQZ_SPLIT_TURNS
                                                   : SQZ_SPLIT_LAYERS;
    }
    char *const four_bits = draft_weights && strcmp(draft_weights, "4bit") == 0 ? four_bits_of(path, n_threads) : NULL;
    options.draft_path = four_bits ? four_bits : draft_weights;
    enum sqz_status status = sqz_model_open(&model, path, &options, &error);
    free(path);
    free(four_bits);
    if (status != SQZ_OK) exit(report(&error));
    struct sqz_model_info info;
    sqz_model_get_info(model, &info);
    if (gpu && gpu->split == SQZ_SPLIT_ROWS && info.n_row_cards < 2)
        die("--split rows: rows are shared by several cards, %s", info.n_row_cards ? "there is one"
                                                                  : sqz_gpu_count() > 0
                                                                      ? "--gpu-layers 0 leaves all to the CPU"
                                                                      : sqz_gpu_reason());
    return model;
}

void warn_of_template(const struct sqz_model *model)
{
    struct sqz_model_info info;
    sqz_model_get_info(model, &info);
    if (info.unknown_chat_template) {
        warn("the model's chat template is not one that llama.cpp knows; in its place stands plain text, "
             "\"Question: ...\" and \"Answer:\", and an answer ends before a blank line or the next \"Question:\"");
    }
}

struct sqz_context *open_context(const char *path, const struct sqz_context_options *options)
{
    struct sqz_error error = {0};
    struct sqz_context *context = NULL;
    if (sqz_context_open(&context, path, options, &error) != SQZ_OK) exit(report(&error));
    return context;
}
