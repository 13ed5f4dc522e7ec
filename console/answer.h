/* One question answered on a session: what `ask` and `chat` share. */
#ifndef SQZ_CONSOLE_ANSWER_H
#define SQZ_CONSOLE_ANSWER_H

#include <stdbool.h>
#include <stddef.h>

#include "inputs.h"
#include "speculation.h"
#include "squeeze.h"
#include "text_buffer.h"

/* A token of an answer, the end of the answer included, and how far its logit led the next likeliest token's. */
struct answer_step {
    int32_t token;
    float lead;
};

struct answer {
    struct text_buffer text;
    size_t n_question_tokens, n_tokens; /* n_tokens: of the answer */
    double first_token_seconds;         /* from the question to the first token */
    double seconds;                     /* from the question to the last */
    double tokens_per_second;           /* after the first token; 0 when there was one at most */
    double budget_read;                 /* share of the context's KV bytes, question and answer together */
    int least_threads, most_threads;    /* that the runs took */
    struct sqz_speculation_stats speculation;
    enum answer_end {
        ANSWER_ENDED, /* the model ended it */
        ANSWER_MAX_TOKENS,
        ANSWER_NO_ROOM, /* the model's context is full */
        ANSWER_STOPPED  /* a signal */
    } end;
};

/* Text options of `ask` and `chat`. */
struct answer_flags {
    double budget, prune_budget, temperature, top_p;
    bool budget_given, prune_given, seed_given;
    struct speculation_flags speculation;
    size_t seed, max_tokens, n_threads;
    struct gpu_flags gpu;
};

#define ANSWER_FLAGS_INIT                                                                                              \
    {                                                                                                                  \
        .budget = 0.1, .temperature = 0.0, .top_p = 0.95, .seed = 1, .max_tokens = 512, .gpu = GPU_FLAGS_INIT,         \
        .speculation = SPECULATION_FLAGS_INIT                                                                          \
    }

#define ANSWER_FLAG_OPTIONS(f)                                                                                         \
    {.kind = OPTION_BUDGET,                                                                                            \
     .letter = 'b',                                                                                                    \
     .name = "budget",                                                                                                 \
     .argument = "SHARE",                                                                                              \
     .value = &(f).budget,                                                                                             \
     .given = &(f).budget_given,                                                                                       \
     .help = "share of the context that is read, 0 to 1 (default 0.1; 1 reads all)"},                                  \
        {.kind = OPTION_PRUNE,                                                                                         \
         .name = "prune",                                                                                              \
         .argument = "SHARE",                                                                                          \
         .value = &(f).prune_budget,                                                                                   \
         .given = &(f).prune_given,                                                                                    \
         .help = "the same, said the other way: --prune 90% is --budget 0.1"},                                         \
        {.kind = OPTION_COUNT,                                                                                         \
         .letter = 'n',                                                                                                \
         .name = "max-tokens",                                                                                         \
         .argument = "N",                                                                                              \
         .value = &(f).max_tokens,                                                                                     \
         .low = 1,                                                                                                     \
         .high = 1e9,                                                                                                  \
         .example = "256",                                                                                             \
         .help = "longest answer (default 512)"},                                                                      \
        {.kind = OPTION_REAL,                                                                                          \
         .name = "temp",                                                                                               \
         .argument = "T",                                                                                              \
         .value = &(f).temperature,                                                                                    \
         .low = 0,                                                                                                     \
         .high = 10,                                                                                                   \
         .example = "0.7",                                                                                             \
         .help = "temperature of sampling; 0 takes the likeliest token (default)"},                                    \
        {.kind = OPTION_REAL,                                                                                          \
         .name = "top-p",                                                                                              \
         .argument = "P",                                                                                              \
         .value = &(f).top_p,                                                                                          \
         .low = 0,                                                                                                     \
         .high = 1,                                                                                                    \
         .above = true,                                                                                                \
         .example = "0.95",                                                                                            \
         .help = "sample from the likeliest tokens that hold P (default 0.95)"},                                       \
        {.kind = OPTION_COUNT,                                                                                         \
         .name = "seed",                                                                                               \
         .argument = "N",                                                                                              \
         .value = &(f).seed,                                                                                           \
         .given = &(f).seed_given,                                                                                     \
         .low = 0,                                                                                                     \
         .high = 4294967295.0,                                                                                         \
         .help = "of sampling; the same seed gives the same answer (default 1)"},                                      \
        SPECULATION_OPTIONS((f).speculation), THREADS_OPTION((f).n_threads), GPU_OPTIONS((f).gpu),                     \
        TOGETHER_OPTION((f).gpu, "cheapest on a card, each on the CPU")

#define ANSWER_FLAG_RULES                                                                                              \
    SPECULATION_RULES, {"budget prune", "exact=f16", "an exact answer reads everything"},                              \
        {"budget prune", "exact=int8", "an exact answer reads everything"},                                            \
    {                                                                                                                  \
        "top-p seed", "temp=0", "the likeliest token is taken, nothing is drawn (--temp 0.7 draws)"                    \
    }

/* Says on standard error, behind `label`, when a session reads more than it was asked to, and why. */
void say_floor(const struct sqz_session *session, const char *label);
/* The same when a part of its attention runs on the CPU that was meant for a card. */
void say_fallback(const struct sqz_session *session, const char *label);

/* Joins --budget and --prune, which exclude each other, and fills the options. */
void answer_flags_apply(struct answer_flags *flags, struct sqz_session_options *options);

/* Asks. `first`: nothing was asked on this session yet. With `stream` the text goes to standard output as it comes,
 * and the program ends when that is closed. answer is filled as far as it came, also on failure; free its text. steps:
 * [max_tokens] of a greedy answer, or NULL; *n_steps of them are filled. */
enum sqz_status answer_question(struct sqz_session *session, const struct sqz_model *model, const char *question,
                                size_t n_bytes, bool first, size_t max_tokens, bool stream, struct answer *answer,
                                struct answer_step *steps, size_t *n_steps, struct sqz_error *error);

/* "2 threads"; "1 to 2 threads" where the machine was busy. Returns text. */
const char *threads_text(char *text, size_t size, const struct answer *answer);

#endif
