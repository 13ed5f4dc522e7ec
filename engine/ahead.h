/*
 * What an exact session runs before it is asked for: tokens that a draft expects
 * next were run in one batch with the token that was asked for, by all rows of
 * the context. Their rows lie behind the session's own, their logits here, until
 * each is asked for in its turn, which then costs nothing, or another token is,
 * which takes its place: n_user of the session is where its own rows end.
 */
#ifndef SQZ_ENGINE_AHEAD_H
#define SQZ_ENGINE_AHEAD_H

#include "draft_ngram.h"
#include "draft_pace.h"
#include "sampling.h"
#include "squeeze.h"

struct sqz_backend;

/* How the drafts of a session are run, in place of what the session itself has. */
struct sqz_draft_way {
    float budget, log_offset;
    struct sqz_backend *backend;
    bool upper; /* rows of 4 + 4 bits are read by their upper plane alone */
    struct sqz_attention_stats stats;
};

struct sqz_ahead {
    size_t n, at; /* tokens that were run ahead; how many of them were asked for */
    int32_t tokens[SQZ_MOST_DRAFT_TOKENS];
    enum sqz_draft_source source[SQZ_MOST_DRAFT_TOKENS];
    bool drawn[SQZ_MOST_DRAFT_TOKENS]; /* by its odds; else expected, as if its odds were 1 */
    float *logits; /* [SQZ_MOST_DRAFT_TOKENS + 1][n_vocab] behind the token asked for, and behind each of these */
    float *odds; /* the same, what each was drawn from, and the last row is the session's next token's; NULL: not yet */
    struct sqz_draft_way way;
    struct sqz_draft_pace pace;
    struct sqz_ngrams ngrams;
    struct sqz_speculation_stats stats;
    bool runs;   /* its own runs, which leave all this alone */
    bool drafts; /* and these are drafts */
};

struct sqz_session;

/* Whether the context's rows are what answers are to be exact to: F16, or 4 + 4 bits. Errors: UNSUPPORTED, with what is
 * allowed. */
enum sqz_status sqz_exact_check(const struct sqz_context *context, enum sqz_exact exact, struct sqz_error *error);

/* Of the session's options, and the budget that drafts aim at by them. Errors: ARGUMENT, UNSUPPORTED, MEMORY. */
enum sqz_status sqz_ahead_create(struct sqz_session *s, float draft_budget, struct sqz_error *error);
void sqz_ahead_free(struct sqz_session *s);
/* The session is as new. */
void sqz_ahead_reset(struct sqz_session *s);

/* Makes room for odds, where there is none yet; false: out of memory. */
bool sqz_ahead_make_odds(struct sqz_session *s);

/* Whether the token is the next that was run ahead. */
bool sqz_ahead_has(const struct sqz_session *s, int32_t token);
/* A token of the session's own is to be run. True: it was, ahead, and the session has it and its logits; else nothing is
 * ahead any more. */
bool sqz_ahead_take(struct sqz_session *s, const int32_t *tokens, size_t n_tokens);
/* Takes what still waits for its turn out of the counts of what was drafted. */
void sqz_ahead_leave_out_waiting(const struct sqz_ahead *ahead, struct sqz_speculation_stats *stats);
/* Nothing is ahead any more. */
void sqz_ahead_drop(struct sqz_session *s);

#endif
