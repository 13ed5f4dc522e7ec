/* Options of exact answers, and what came of their drafts: what `ask`, `chat`, `bench generate` and `eval` share. */
#ifndef SQZ_CONSOLE_SPECULATION_H
#define SQZ_CONSOLE_SPECULATION_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "squeeze.h"

struct speculation_flags {
    int exact, draft, draft_rows; /* enum sqz_exact, enum sqz_draft, enum sqz_draft_rows */
    double draft_budget;
    size_t draft_tokens;
    bool steady;
    const char *draft_weights; /* NULL: the model's own; as open_model_drafting() takes them */
};

/* By their numbers; end with NULL. draft_row_names: those that can be asked for. */
extern const char *const exact_names[], *const draft_names[], *const draft_row_names[];

#define SPECULATION_FLAGS_INIT                                                                                         \
    {                                                                                                                  \
        .draft_budget = 0.05, .draft_tokens = 7                                                                        \
    }

#define SPECULATION_OPTIONS(f)                                                                                         \
    {.kind = OPTION_CHOICE,                                                                                            \
     .name = "exact",                                                                                                  \
     .argument = "KIND",                                                                                               \
     .value = &(f).exact,                                                                                              \
     .choices = exact_names,                                                                                           \
     .help = "answer exactly as with all of the context: f16, to the model; int8, to rows of 4 + 4 bits "              \
             "(prepare --rows int4+4); fast by drafts (off)"},                                                         \
        DRAFT_OPTIONS(f)

#define DRAFT_WEIGHTS_OPTION(target)                                                                                   \
    {                                                                                                                  \
        .kind = OPTION_TEXT, .name = "draft-weights", .argument = "4bit|FILE", .value = &(target),                     \
        .help = "weights that draft exact answers: 4bit, made of the model's by llama.cpp once and kept, or a "        \
                "GGUF file of the same model in fewer bits (the model's own)"                                          \
    }

/* The same without --exact. */
#define DRAFT_OPTIONS(f)                                                                                               \
    {.kind = OPTION_CHOICE,                                                                                            \
     .name = "draft",                                                                                                  \
     .argument = "KIND",                                                                                               \
     .value = &(f).draft,                                                                                              \
     .choices = draft_names,                                                                                           \
     .help = "who drafts exact answers: the model with a part of the context, the text, or whichever "                 \
             "promises more (chain)"},                                                                                 \
        {.kind = OPTION_BUDGET,                                                                                        \
         .name = "draft-budget",                                                                                       \
         .argument = "SHARE",                                                                                          \
         .value = &(f).draft_budget,                                                                                   \
         .example = "0.05",                                                                                            \
         .help = "share of the context that drafts read (0.05)"},                                                      \
        {.kind = OPTION_CHOICE,                                                                                        \
         .name = "draft-rows",                                                                                         \
         .argument = "KIND",                                                                                           \
         .value = &(f).draft_rows,                                                                                     \
         .choices = draft_row_names,                                                                                   \
         .help = "what drafts read of rows of 4 + 4 bits: their upper plane alone, or both (upper)"},                  \
        {.kind = OPTION_COUNT,                                                                                         \
         .name = "draft-tokens",                                                                                       \
         .argument = "N",                                                                                              \
         .value = &(f).draft_tokens,                                                                                   \
         .low = 1,                                                                                                     \
         .high = 16,                                                                                                   \
         .example = "7",                                                                                               \
         .help = "most tokens a draft (7)"},                                                                           \
        DRAFT_WEIGHTS_OPTION((f).draft_weights),                                                                       \
    {                                                                                                                  \
        .kind = OPTION_FLAG, .name = "draft-steady", .value = &(f).steady,                                             \
        .help = "drafts as long as they may be, so that answers do not depend on what was measured"                    \
    }

#define SPECULATION_RULES                                                                                              \
    {"draft draft-budget draft-rows draft-tokens draft-weights draft-steady", "exact=off",                             \
     "only exact answers are drafted (--exact f16, int8)"},                                                            \
        {"draft-rows", "exact=f16", "drafts read rows of F16 (--exact int8 has rows in planes)"},                      \
        {"draft-weights", "draft=ngram", "the text drafts, which needs no weights"},                                   \
    {                                                                                                                  \
        "draft-budget draft-rows", "draft=ngram", "the text drafts, which reads nothing of the context"                \
    }

void speculation_flags_apply(const struct speculation_flags *flags, struct sqz_session_options *options);

/* Of the drafted tokens, how many were kept; of those that were looked at; tokens a cycle. 0 without any. */
double speculation_accepted(const struct sqz_speculation_stats *stats);
double speculation_agreed(const struct sqz_speculation_stats *stats);
double speculation_tokens_a_cycle(const struct sqz_speculation_stats *stats);
/* A line of them, where anything was drafted. */
void print_speculation(const struct sqz_speculation_stats *stats, FILE *file);
/* What each of them is, as an object. */
json_t *speculation_json(const struct sqz_speculation_stats *stats);

#endif
