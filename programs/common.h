/*
 * What the subcommands share: messages and exit codes, signals, files, the
 * choice of the model, JSON and human-readable numbers, and the options that
 * say how a context is squeezed.
 *
 * Exit codes: 0 done, 1 failed, 2 usage, 128 + signal when interrupted.
 * Everything that is not a result goes to standard error.
 */
#ifndef SQZ_PROGRAMS_COMMON_H
#define SQZ_PROGRAMS_COMMON_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "options.h"
#include "squeeze.h"

#if defined(__GNUC__) || defined(__clang__)
#define PRINTF_LIKE(text, arguments) __attribute__((format(printf, text, arguments)))
#else
#define PRINTF_LIKE(text, arguments)
#endif

/* ---- Messages ------------------------------------------------------------------ */

/* The name that begins every message: "squeeze ask: ...". */
void set_command(const char *name);

_Noreturn void die(const char *format, ...) PRINTF_LIKE(1, 2);         /* exit code 1 */
_Noreturn void usage_error(const char *format, ...) PRINTF_LIKE(1, 2); /* exit code 2 */
void warn(const char *format, ...) PRINTF_LIKE(1, 2);

/* Says what went wrong and returns the exit code. */
int report(const struct sqz_error *error);

/* Flushes standard output. Returns 0, or 1 when it could not be written (said, unless the reader went away). */
int close_stdout(void);

/* ---- Signals --------------------------------------------------------------------- */

/* From now on SIGINT and SIGTERM are noted instead of ending the program; a second one ends it at once. */
void catch_signals(void);
int signal_caught(void);   /* its number, 0: none */
void signal_forget(void);  /* the answer was stopped, the program goes on */
bool signal_cancelled(void *unused); /* for sqz_session_set_cancel() */

/* ---- Files and models -------------------------------------------------------------- */

/* The whole of a file, or of standard input for "-"; malloc'ed, with a NUL behind it. Dies when it cannot. */
char *read_whole_file(const char *path, size_t *n_bytes);

/* -m, else $SQUEEZE_MODEL, else the default model in the cache, which must be there. malloc'ed. */
char *choose_model(const char *option);

/* Opens the model with the threads (0: one a core) and the rope scale given; dies when it cannot. */
struct sqz_model *open_model(const char *option, size_t n_threads, double rope_scale);

/* Dies when it cannot. options may be NULL. */
struct sqz_context *open_context(const char *path, const struct sqz_context_options *options);

/* ---- Numbers ------------------------------------------------------------------------ */

double now_seconds(void); /* monotonic */

enum { NUMBER_TEXT_MAX = 32 };
const char *count_text(char text[NUMBER_TEXT_MAX], uint64_t count);   /* "7,639" */
const char *bytes_text(char text[NUMBER_TEXT_MAX], uint64_t n_bytes); /* "171.4 MB" */

/* Share of the context's KV bytes that was read; 0 when nothing was asked for. */
double share_read(const struct sqz_attention_stats *stats);
void add_stats(struct sqz_attention_stats *sum, const struct sqz_attention_stats *stats);

/* ---- JSON ------------------------------------------------------------------------------ */

json_t *json_number(double value);        /* null when not finite */
json_t *json_count(uint64_t value);
json_t *json_text(const char *text);      /* bytes that are not UTF-8 are replaced */
json_t *json_command_line(int argc, char **argv);
int print_json(json_t *root);             /* to standard output; releases root; returns the exit code */

/* ---- Text that arrives in pieces ---------------------------------------------------------- */

/* Holds back characters until they are complete; what cannot be UTF-8, and control characters that could steer a
 * terminal, become U+FFFD. */
struct text_filter {
    unsigned char held[4];
    size_t n_held;
};

struct text_buffer {
    char *text; /* with a NUL behind it; NULL while empty */
    size_t n_bytes, capacity;
};

/* Appends the complete characters of n bytes to buffer. */
void text_filter_put(struct text_filter *filter, struct text_buffer *buffer, const char *bytes, size_t n);
void text_filter_end(struct text_filter *filter, struct text_buffer *buffer);
void text_buffer_append(struct text_buffer *buffer, const char *bytes, size_t n);
void text_buffer_print(struct text_buffer *buffer, const char *format, ...) PRINTF_LIKE(2, 3);
void text_buffer_free(struct text_buffer *buffer);

/* ---- How a context is squeezed -------------------------------------------------------------- */

struct squeeze_flags {
    int rule, metric, group;      /* metric, group: -1 as the rule says */
    int center, variance, per_head, tail, value_skip; /* 1, 0, or -1: as the rule says */
    size_t levels, iterations, sinks, window, calibration, seed; /* SIZE_MAX: as the rule says */
    struct real_list centroids;   /* n == 0: as the rule says */
};

extern const char *const rule_names[], *const metric_names[], *const group_names[];

#define SQUEEZE_FLAGS_INIT                                                                                          \
    {                                                                                                               \
        .metric = -1, .group = -1, .center = -1, .variance = -1, .per_head = -1, .tail = -1, .value_skip = -1,      \
        .levels = SIZE_MAX, .iterations = SIZE_MAX, .sinks = SIZE_MAX, .window = SIZE_MAX,                          \
        .calibration = SIZE_MAX, .seed = SIZE_MAX                                                                   \
    }

/* The entries of an option table that fill the struct squeeze_flags f. */
#define SQUEEZE_FLAG_OPTIONS(f)                                                                                     \
    {.kind = OPTION_CHOICE, .name = "rule", .argument = "RULE", .value = &(f).rule, .choices = rule_names,          \
     .help = "default: all accuracy options; paper: Squeezed Attention as published"},                              \
    {.kind = OPTION_COUNT, .name = "levels", .argument = "N", .value = &(f).levels, .low = 0,                       \
     .high = SQZ_MAX_LEVELS, .example = "2", .help = "levels of clusters; 0 leaves the context dense"},             \
    {.kind = OPTION_SHARES, .name = "centroids", .argument = "SHARE[,...]", .value = &(f).centroids,                \
     .help = "clusters of every level as a share of the keys, the finest first (default 0.05, then a fifth of the " \
             "level below)"},                                                                                       \
    {.kind = OPTION_CHOICE, .name = "metric", .argument = "METRIC", .value = &(f).metric, .choices = metric_names,  \
     .help = "cluster by cosine or euclidean distance"},                                                            \
    {.kind = OPTION_CHOICE, .name = "group", .argument = "HOW", .value = &(f).group, .choices = group_names,        \
     .help = "join the scores of heads that share keys by their mean or max"},                                      \
    {.kind = OPTION_COUNT, .name = "iterations", .argument = "N", .value = &(f).iterations, .low = 1, .high = 1000, \
     .example = "10", .help = "iterations of k-means, at most"},                                                    \
    {.kind = OPTION_COUNT, .name = "sinks", .argument = "N", .value = &(f).sinks, .low = 0, .high = 1e6,            \
     .example = "16", .help = "first tokens that are always read"},                                                 \
    {.kind = OPTION_COUNT, .name = "window", .argument = "N", .value = &(f).window, .low = 0, .high = 1e6,          \
     .example = "64", .help = "last tokens that are always read"},                                                  \
    {.kind = OPTION_COUNT, .name = "calibration", .argument = "N", .value = &(f).calibration, .low = 1,             \
     .high = 1024, .example = "128", .help = "queries of the context's end that calibrate the thresholds"},         \
    {.kind = OPTION_SWITCH, .name = "center", .value = &(f).center,                                                 \
     .help = "cluster keys after their mean was subtracted"},                                                       \
    {.kind = OPTION_SWITCH, .name = "variance", .value = &(f).variance,                                             \
     .help = "correct scores by the spread of a cluster"},                                                          \
    {.kind = OPTION_SWITCH, .name = "per-head", .value = &(f).per_head,                                             \
     .help = "a threshold per head instead of one for all layers and heads"},                                       \
    {.kind = OPTION_SWITCH, .name = "tail", .value = &(f).tail,                                                     \
     .help = "estimate what pruned clusters would have contributed"},                                               \
    {.kind = OPTION_SWITCH, .name = "value-skip", .value = &(f).value_skip,                                         \
     .help = "do not read values whose own weight is below the threshold"},                                         \
    {.kind = OPTION_COUNT, .name = "seed", .argument = "N", .value = &(f).seed, .low = 0, .high = 9007199254740992, \
     .help = "of the clustering; the same seed gives the same file"}

/* The rule's defaults with what was given on the command line. Usage error when they disagree. */
void squeeze_flags_apply(const struct squeeze_flags *flags, struct sqz_squeeze_options *options);

/* The entry for -m, the same everywhere. */
#define MODEL_OPTION(target)                                                                                        \
    {.kind = OPTION_TEXT, .letter = 'm', .name = "model", .argument = "FILE", .value = &(target),                   \
     .help = "GGUF model (default: $SQUEEZE_MODEL, else the model that 'make demo' fetched)"}
#define THREADS_OPTION(target)                                                                                      \
    {.kind = OPTION_COUNT, .letter = 't', .name = "threads", .argument = "N", .value = &(target), .low = 1,         \
     .high = 1024, .example = "4", .help = "threads (default: one a core)"}
#define JSON_OPTION(target)                                                                                         \
    {.kind = OPTION_FLAG, .name = "json", .value = &(target), .help = "print one JSON object instead of text"}

/* The subcommands; argv[0] is the subcommand's name. Each returns the exit code. */
int cmd_prepare(int argc, char **argv);
int cmd_ask(int argc, char **argv);
int cmd_chat(int argc, char **argv);
int cmd_inspect(int argc, char **argv);
int cmd_compare(int argc, char **argv);
int cmd_bench(int argc, char **argv);
int cmd_cpu(int argc, char **argv);

#endif
