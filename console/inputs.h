/* What the subcommands read: documents, questions, models and contexts. */
#ifndef SQZ_CONSOLE_INPUTS_H
#define SQZ_CONSOLE_INPUTS_H

#include <stddef.h>
#include <stdint.h>

#include "options.h"
#include "squeeze.h"

/* The whole of a file, or of standard input for "-"; malloc'ed, with a NUL behind it. Dies when it cannot. */
char *read_whole_file(const char *path, size_t *n_bytes);

/* Where temporary files go: $TMPDIR, else /tmp. */
const char *temporary_parent(void);

/* -m, else $SQUEEZE_MODEL, else the default model in the cache, which must be there. malloc'ed. */
char *choose_model(const char *option);

/* --contexts, else $SQUEEZE_CONTEXTS, else squeeze/contexts in $XDG_DATA_HOME or ~/.local/share, whose folders are made.
 * malloc'ed. */
char *choose_contexts(const char *option);

/* Threads for what is measured: as many as asked for, or one a core, and then no fewer on a busy machine. */
size_t measured_threads(size_t asked);

/* Where the model runs. */
enum { TOGETHER_UNSAID = -1, SPLIT_UNSAID = -1 };
struct gpu_flags {
    size_t n_layers; /* on a card; SIZE_MAX: all where there is one */
    double memory;   /* GiB of it; 0: what is free */
    int together;    /* enum sqz_together; TOGETHER_UNSAID: cheapest on a card, on the CPU each */
    bool many_users; /* then cheapest on the CPU, too */
    int copies;      /* enum sqz_copies */
    int split;       /* enum sqz_split; SPLIT_UNSAID: rows of a context in shards */
    bool in_shards;  /* the context is */
    bool prepares;   /* then layers in turns */
};
int together_of(const struct gpu_flags *gpu, bool on_card); /* what was said of --together, or stands for it */
extern const char *const together_names[], *const copies_names[], *const split_names[]; /* in the order of the enums */

#define GPU_FLAGS_INIT                                                                                                 \
    {                                                                                                                  \
        .n_layers = SIZE_MAX, .together = TOGETHER_UNSAID, .split = SPLIT_UNSAID                                       \
    }
/* Where answers are compared: every token reads what it selects. */
#define GPU_FLAGS_EACH                                                                                                 \
    {                                                                                                                  \
        .n_layers = SIZE_MAX, .together = SQZ_TOGETHER_EACH, .split = SPLIT_UNSAID                                     \
    }
#define GPU_OPTIONS(f)                                                                                                 \
    {.kind = OPTION_COUNT,                                                                                             \
     .word = "ngl",                                                                                                    \
     .name = "gpu-layers",                                                                                             \
     .argument = "N",                                                                                                  \
     .value = &(f).n_layers,                                                                                           \
     .low = 0,                                                                                                         \
     .high = 10000,                                                                                                    \
     .example = "99",                                                                                                  \
     .help = "layers that run on an NVIDIA card, the output counted as one (default: all where there is one)"},        \
        {.kind = OPTION_REAL,                                                                                          \
         .name = "gpu-memory",                                                                                         \
         .argument = "GIB",                                                                                            \
         .value = &(f).memory,                                                                                         \
         .low = 0,                                                                                                     \
         .high = 1e6,                                                                                                  \
         .example = "16",                                                                                              \
         .help = "most that contexts take of the card's memory (default: what is free)"},                              \
        {.kind = OPTION_CHOICE,                                                                                        \
         .name = "split",                                                                                              \
         .argument = "WHAT",                                                                                           \
         .value = &(f).split,                                                                                          \
         .choices = split_names,                                                                                       \
         .help =                                                                                                       \
             "what several cards share out: the model's layers, or the rows of a context in shards, of which each "    \
             "card then has one (rows of such a context, else layers); turns: layers in turns, which 'prepare' does"}, \
    {                                                                                                                  \
        .kind = OPTION_CHOICE, .name = "gpu-copies", .argument = "WHEN", .value = &(f).copies,                         \
        .choices = copies_names,                                                                                       \
        .help = "16-bit copies of quantised weights on a card, for products of 65 to 255 tokens: auto (more than 64 "  \
                "sessions together), never, always (auto)"                                                             \
    }
#define TOGETHER_OPTION(f, DEFAULT)                                                                                    \
    {                                                                                                                  \
        .kind = OPTION_CHOICE, .name = "together", .argument = "WAY", .value = &(f).together,                          \
        .choices = together_names,                                                                                     \
        .help = "what tokens of one batch read of a context: each its own selection, one selection of all theirs "     \
                "(on a card alone), all of it, or whichever is cheapest (" DEFAULT ")"                                 \
    }

/* As open_model(), on a card where the flags say so and there is one. */
struct sqz_model *open_model_on(const char *option, size_t n_threads, double rope_scale, const struct gpu_flags *gpu);

/* The same, with weights that draft exact answers: NULL for the model's own, "4bit" for llama.cpp's Q4_0 of them, which is
 * made the first time and kept beside the default model (draft_weights.h), else a file. */
struct sqz_model *open_model_drafting(const char *option, size_t n_threads, double rope_scale,
                                      const struct gpu_flags *gpu, const char *draft_weights);

/* Opens the model with the threads (0: one a core, fewer while the machine is busy) and the rope scale given; dies
 * when it cannot. */
struct sqz_model *open_model(const char *option, size_t n_threads, double rope_scale);

/* Says what stands in place of a chat template that llama.cpp does not know. */
void warn_of_template(const struct sqz_model *model);

/* Dies when it cannot. options may be NULL. */
struct sqz_context *open_context(const char *path, const struct sqz_context_options *options);

/* The entries for -m and -t, the same everywhere. */
#define MODEL_OPTION(target)                                                                                           \
    {                                                                                                                  \
        .kind = OPTION_TEXT, .letter = 'm', .name = "model", .argument = "FILE", .value = &(target),                   \
        .help = "GGUF model (default: $SQUEEZE_MODEL, else the model that 'make demo' fetched)"                        \
    }
#define THREADS_OPTION(target)                                                                                         \
    {                                                                                                                  \
        .kind = OPTION_COUNT, .letter = 't', .name = "threads", .argument = "N", .value = &(target), .low = 1,         \
        .high = 1024, .example = "4",                                                                                  \
        .help = "threads, always as many (default: one a core, fewer while other processes are busy)"                  \
    }

#endif
