/*
 * Internals of struct sqz_session. session.c creates and frees it, batch.c runs
 * tokens of one or of many, feedback.c keeps them to the budget,
 * session_sample.c chooses the next one.
 */
#ifndef SQZ_ENGINE_SESSION_H
#define SQZ_ENGINE_SESSION_H

#include "attend_selected.h"
#include "context_file.h"
#include "recall.h"
#include "run.h"

/* Question tokens that share a selection; measured in docs/method.md. */
enum { SQZ_QUESTION_BLOCK_TOKENS = 1 };

/* A session's part of a batch, while sqz_batch_run() is at work. */
struct sqz_lane {
    bool taken; /* by a batch */
    const int32_t *tokens;
    size_t n_tokens, n_done;
    size_t first, n; /* tokens of the pass in flight */
    size_t n_user_before; /* where a failure leads back to */
    float log_offset_before;
    enum sqz_status status;
    struct sqz_error *error;
    struct sqz_attention_stats pass; /* read in the pass in flight */
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
    const struct sqz_selector *selector; /* NULL: the lookup */
    struct sqz_recall *recall;           /* added to; NULL: not measured */

    uint16_t *rows; /* user keys and values of all layers, F16 [K][capacity][D] each */
    size_t rows_bytes;
    uint16_t **keys, **values; /* [n_layer] into rows */
    float *logits;             /* [n_vocab] */
    bool has_logits;
    struct llama_sampler *sampler;
    struct sqz_lane lane;

    struct sqz_attention_stats stats; /* since cleared */
    double run_seconds, attention_seconds;
    int least_threads, most_threads; /* of the runs since cleared */
    bool (*cancelled)(void *user_data);
    void *cancel_data;
};

/* Layers that grow with the context read what the selector chooses, from the next run on; NULL: what the lookup does.
 * It must outlive the session or its replacement. For comparisons: squeeze eval's other methods. Errors: MEMORY (nothing
 * changes). */
enum sqz_status sqz_session_set_selector(struct sqz_session *s, const struct sqz_selector *selector,
                                         struct sqz_error *error);

/* Every later run adds to recall, which must outlive the session or its replacement; NULL: no more. */
void sqz_session_set_recall(struct sqz_session *s, struct sqz_recall *recall);

/* After a layer of n_tokens tokens that read so much: the correction of the thresholds towards the budget. */
void sqz_session_feed_back(struct sqz_session *s, const struct sqz_layer *layer,
                           const struct sqz_attention_stats *read, size_t n_tokens);

/* A run took n threads. */
void sqz_session_note_threads(struct sqz_session *s, int n);

/* Sets s->sampler up from s->options. Errors: MEMORY. */
enum sqz_status sqz_session_create_sampler(struct sqz_session *s, struct sqz_error *error);

#endif
