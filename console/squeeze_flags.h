/* The options that say how a context is squeezed, the same for every subcommand that squeezes. */
#ifndef SQZ_CONSOLE_SQUEEZE_FLAGS_H
#define SQZ_CONSOLE_SQUEEZE_FLAGS_H

#include <stddef.h>
#include <stdint.h>

#include "options.h"
#include "squeeze.h"

struct squeeze_flags {
    int rule, metric, group, index, keys, rows;                              /* -1: as the rule says (rule: never) */
    int center, variance, per_head, tail, value_skip;                        /* 1, 0, or -1: as the rule says */
    size_t levels, code_words, iterations, sinks, window, calibration, seed; /* SIZE_MAX: as the rule says */
    struct real_list centroids;                                              /* n == 0: as the rule says */
};

extern const char *const rule_names[], *const metric_names[], *const group_names[], *const index_names[],
                                                                                        *const row_names[];

/* The name of a format of rows. */
const char *row_format_name(enum sqz_row_format format);

/* clang-format off */
#define SQUEEZE_FLAGS_INIT                                                                                          \
    {                                                                                                               \
        .metric = -1, .group = -1, .index = -1, .keys = -1, .rows = -1, .center = -1, .variance = -1, .per_head = -1,             \
        .tail = -1, .value_skip = -1,                                                                               \
        .levels = SIZE_MAX, .code_words = SIZE_MAX, .iterations = SIZE_MAX, .sinks = SIZE_MAX,                      \
        .window = SIZE_MAX, .calibration = SIZE_MAX, .seed = SIZE_MAX                                               \
    }
/* clang-format on */

/* The entries of an option table that fill the struct squeeze_flags f. */
/* clang-format off */
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
    {.kind = OPTION_CHOICE, .name = "index", .argument = "FORMAT", .value = &(f).index, .choices = index_names,     \
     .help = "centroids as f16 or, in half the bytes, int8"},                                                       \
    {.kind = OPTION_CHOICE, .name = "keys", .argument = "FORMAT", .value = &(f).keys, .choices = index_names,       \
     .help = "keys kept as f16 or, in half the bytes, int8: a budget of 1 then reads rounded keys, too"},            \
    {.kind = OPTION_CHOICE, .name = "rows", .argument = "FORMAT", .value = &(f).rows, .choices = row_names,         \
     .help = "keys and values, but sinks and window, kept as f16, int4+4 (int8 is another name of it: half the "    \
             "bytes) or int4 (a quarter)"},                                                                         \
    {.kind = OPTION_COUNT, .name = "code-words", .argument = "N", .value = &(f).code_words, .low = 0, .high = 4,     \
     .example = "1", .help = "32-bit words of code for every key, by which single keys are chosen; 0: none"},        \
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
/* clang-format on */

/* Those that say how clusters are made and used: names for a table of rules, and the rule of every subcommand. */
#define SQUEEZE_FLAG_NAMES                                                                                             \
    "centroids metric group index keys rows code-words iterations sinks window calibration center variance per-head "  \
    "tail "                                                                                                            \
    "value-skip seed"
#define SQUEEZE_FLAG_RULE                                                                                              \
    {                                                                                                                  \
        SQUEEZE_FLAG_NAMES, "levels=0", "nothing is clustered, everything is read"                                     \
    }

/* The rule's defaults with what was given on the command line. Usage error when they disagree. */
void squeeze_flags_apply(const struct squeeze_flags *flags, struct sqz_squeeze_options *options);

#endif
