/*
 * Internals of struct sqz_session. session.c creates and frees it, batch.c runs
 * tokens of one or of many, feedback.c keeps them to the budget,
 * session_sample.c chooses the next one; speculate.c runs those of an exact
 * session that may follow, ahead.c keeps them until they are asked for.
 */
#ifndef SQZ_ENGINE_SESSION_H
#define SQZ_ENGINE_SESSION_H

#include "ahead.h"
#include "backend.h"

/* A session's part of a batch, while sqz_batch_run() is at work. */
struct sqz_lane {
    bool taken; /* by a batch */
    const int32_t *tokens;
    size_t n_tokens, n_done;
    struct sqz_backend_part part; /* of the pass in flight */
    size_t n_user_before;         /* where a failure leads back to */
    float log_offset_before;
    enum sqz_status status;
    struct sqz_error *error;
    struct sqz_attention_stats pass, layer; /* read in the pass in flight; in its layer */
    float log_offset_of_pass;               /* that a card's layers have theirs by */
};

struct sqz_session {
    struct sqz_model *model;
    const struct sqz_context *context;
    const struct sqz_context_meta *meta;
    struct sqz_session_options options;
    struct sqz_rope rope; /* the context's */
    size_t n_context, capacity, n_user;
    uint32_t n_clustered; /* layers that have clusters */
    float floor, budget;  /* of the context; aimed at */
    float log_offset;
    bool upper;       /* rows of 4 + 4 bits are read by their upper plane alone */
    double *expected; /* [n_layer] shares at expected_budget */
    float expected_budget;

    struct sqz_backend *home;    /* that its rows are in: the model's, or its own for contexts in shards */
    struct sqz_backend *backend; /* where its attention is computed; its home, or one that wraps that */
    struct sqz_bound *bound;
    struct sqz_own_rows *own;
    float *logits;                 /* [n_vocab] */
    struct sqz_attention_map *map; /* NULL: not wanted */
    bool has_logits;
    float *all_logits; /* [tokens of the run][n_vocab], where those of each are wanted; else NULL */
    struct sqz_sampling *own_sampling, *sampling; /* by its options; by which tokens are chosen, drafts as well */
    struct sqz_ahead *ahead;                      /* NULL: not exact, nothing is drafted */
    struct sqz_lane lane;

    struct sqz_attention_stats stats; /* since cleared */
    double run_seconds, attention_seconds;
    int least_threads, most_threads; /* of the runs since cleared */
    bool (*cancelled)(void *user_data);
    void *cancel_data;
};

/* Attention is computed in `backend` from the next run on, that of drafts as well, which wraps the model's and outlives the
 * session: for comparisons. NULL: in the model's own. */
void sqz_session_wrap(struct sqz_session *s, struct sqz_backend *backend);
/* That of drafts alone, of a session that is exact, by this budget as it is, (0, 1]: behind sqz_session_wrap(), if any. */
void sqz_session_draft_in(struct sqz_session *s, struct sqz_backend *backend, float budget);

/* After layer number `layer` of n_tokens tokens that read so much, by the correction that was log_offset then: corrects
 * the thresholds towards the budget. */
void sqz_session_feed_back(struct sqz_session *s, uint32_t layer, const struct sqz_attention_stats *read,
                           size_t n_tokens, float log_offset);

/* A run took n threads. */
void sqz_session_note_threads(struct sqz_session *s, int n);

/* Sets s->sampling up from s->options. Errors: MEMORY. */
enum sqz_status sqz_session_create_sampling(struct sqz_session *s, struct sqz_error *error);
/* Tokens are chosen by this from now on, which outlives the session or is taken back; NULL: by its own again. */
void sqz_session_sample_by(struct sqz_session *s, struct sqz_sampling *sampling);
/* The next token, as sqz_sampling_next() has it; the session has logits. */
void sqz_session_next(struct sqz_session *s, int n_likely, struct sqz_choice *choice);

#endif
