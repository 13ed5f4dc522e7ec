/*
 * One run of a batch through a model, and the seam through which attention
 * leaves llama.cpp and comes to lib/. All that a run needs to know and all that
 * can go wrong with it is in struct sqz_run; the model only knows which one is
 * in work.
 */
#ifndef SQZ_ENGINE_RUN_H
#define SQZ_ENGINE_RUN_H

#include "bands.h"
#include "model.h"

/* Tokens a batch: llama.cpp's matrix products reach their rate here, and its cache stays small. On a card, where each
 * pass costs launches too, a text is read in larger ones. */
enum { SQZ_BATCH_TOKENS = 512, SQZ_READING_TOKENS = 2048 };

/* One attention node of the model's graph, as the seam hands it over. Strides in elements. */
struct sqz_attention_node {
    uint32_t layer;
    size_t n_tokens;
    const float *queries; /* token t, head h at t * query_token_stride + h * query_head_stride */
    size_t query_token_stride, query_head_stride;
    const uint16_t *keys, *values; /* F16, row of batch token t and head h */
    size_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;
    float *out;   /* [T][H][D] */
    void *stream; /* NULL: all of it is in host memory; else on a card, and this is where work on it is launched */
};

/* n_tokens of the node's tokens from first_token on, as a node. */
struct sqz_attention_node sqz_node_part(const struct sqz_attention_node *node, const struct sqz_layer_shape *shape,
                                        size_t first_token, size_t n_tokens);

/* Copies the node's keys and values, F16, into arrays [K][capacity_rows][D] from row first_row on. */
void sqz_node_store_rows(const struct sqz_attention_node *node, const struct sqz_layer_shape *shape, uint16_t *keys,
                         uint16_t *values, size_t capacity_rows, size_t first_row);

typedef enum sqz_status (*sqz_attention_handler)(void *user_data, const struct sqz_attention_node *node,
                                                 struct sqz_error *error);

/* Tokens of a sequence stand together, their positions ascend by one. */
struct sqz_run_token {
    int32_t token, position;
    uint32_t sequence; /* below the model's n_sequences */
    bool wants_logits; /* llama_get_logits_ith(model->running, number of the token) has them afterwards */
};

struct sqz_gpu_beside; /* backend.h */

struct sqz_run {
    const struct sqz_run_token *tokens;
    size_t n_tokens;               /* 1 to the model's n_batch_tokens */
    sqz_attention_handler handler; /* of every attention node, in layer order */
    /* On a card, before the first node of its part of the graph: a number with which the launches of all its nodes are the same as the
     * last time, when they may be launched again without the handler; 0: they are not. beside: as a place's begin() has
     * it. NULL: never. */
    uint64_t (*begin)(void *user_data, int card, void *stream, struct sqz_gpu_beside *beside);
    void *user_data;
    bool (*cancelled)(void *user_data); /* asked between llama.cpp's operations; NULL: never */
    void *cancel_data;
    struct sqz_bands *bands; /* NULL: all layers run */
    bool goes_on;            /* a card's work is not waited for: the next run follows, or sqz_model_wait() */

    /* While it runs. */
    bool probing; /* of sqz_model_open(): learns the layers' shapes, no handler */
    uint32_t next_layer;
    bool begun[SQZ_MOST_CARDS];   /* begin() was called for nodes that the callback hands over */
    struct ggml_tensor *replaced; /* node whose own computation is switched off */
    struct sqz_error error;
};

/* Errors: IO or FORMAT (the model's file changed), CANCELLED, INTERNAL, and those of the handler. */
enum sqz_status sqz_model_run(struct sqz_model *model, struct sqz_run *run, struct sqz_error *error);

/* Until all that runs of the model have launched is done. */
void sqz_model_wait(struct sqz_model *model);

/* llama.cpp's code for the batch: 0, or 2 when it was cancelled. */
int32_t sqz_run_decode(struct sqz_model *model, struct sqz_run *run);

/* Seam callback; user_data is the struct sqz_model. */
bool sqz_seam_callback(struct ggml_tensor *node, bool ask, void *user_data);

/* The same at nodes on a card. Between _enter() and _leave() the thread's runs are of this model. */
void sqz_seam_enter(struct sqz_model *model, bool probing);
void sqz_seam_leave(void);
/* What the seam has on cards is given back. */
void sqz_seam_close(struct sqz_model *model);

#endif
