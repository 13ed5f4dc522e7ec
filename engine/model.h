/*
 * Internals of struct sqz_model: a llama.cpp model, one llama.cpp context that
 * only ever holds the batch in flight, and the seam through which attention
 * leaves llama.cpp and comes to lib/.
 */
#ifndef SQZ_ENGINE_MODEL_H
#define SQZ_ENGINE_MODEL_H

#include "context_file.h"
#include "model_files.h"
#include "squeeze.h"

#include "crew.h"
#include "gguf.h"
#include "llama.h"

/* Tokens a batch: llama.cpp's matrix products reach their rate here, and its cache stays small. */
enum { SQZ_BATCH_TOKENS = 512 };

/* One attention node of the model's graph, as the seam hands it over. Strides in elements. */
struct sqz_attention_node {
    uint32_t layer;
    size_t n_tokens;
    const float *queries; /* token t, head h at t * query_token_stride + h * query_head_stride */
    size_t query_token_stride, query_head_stride;
    const uint16_t *keys, *values; /* F16, row of batch token t and head h */
    size_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;
    float *out; /* [T][H][D] */
};

/* Copies the node's keys and values, F16, into arrays [K][capacity_rows][D] from row first_row on. */
void sqz_node_store_rows(const struct sqz_attention_node *node, const struct sqz_layer_shape *shape, uint16_t *keys,
                         uint16_t *values, size_t capacity_rows, size_t first_row);

typedef enum sqz_status (*sqz_attention_handler)(void *user_data, const struct sqz_attention_node *node,
                                                 struct sqz_error *error);

/* How positions become angles. */
struct sqz_rope {
    float scale;                   /* how far the model's own scaling is stretched */
    enum sqz_rope_factors factors; /* never UNSAID */
};

struct sqz_model_layer {
    struct sqz_layer_shape shape;
    bool sliding_window;
};

struct sqz_model {
    struct sqz_model_files files;
    struct llama_model *llama;
    struct llama_context *context;
    const struct llama_vocab *vocab;
    struct sqz_model_info info;
    struct sqz_model_layer *layers; /* [info.n_layer] */
    struct sqz_crew crew; /* threads: info.n_threads at most */
    uint32_t n_trained_tokens;      /* the longest text, as the file says */
    uint32_t n_original_tokens;     /* of LongRoPE: a longer one gets the long factors; 0: the model has none */
    float own_rope_scale;           /* the frequency scale that the file says, at most 1 as a rule */
    char rope_type[16];             /* "linear", "yarn", "longrope", "none" */
    float rope_scale;               /* as opened */
    struct sqz_rope rope;           /* of `context` as it is now */
    const char *chat_template; /* the model's own; NULL: none that llama.cpp knows */

    /* The seam, valid during sqz_model_run(). */
    sqz_attention_handler handler;
    void *handler_data;
    uint32_t next_layer;
    struct ggml_tensor *replaced; /* node whose own computation is switched off */
    struct sqz_error seam_error;
    bool probing;
    bool (*cancelled)(void *user_data);
    void *cancel_data;
};

/* Runs tokens at positions first_position.. through the model, every attention node through `handler`. n_tokens at
 * most SQZ_BATCH_TOKENS. With want_logits the last token's logits are in llama_get_logits_ith(context, -1). */
enum sqz_status sqz_model_run(struct sqz_model *model, const int32_t *tokens, size_t n_tokens, size_t first_position,
                              bool want_logits, sqz_attention_handler handler, void *handler_data,
                              struct sqz_error *error);

/* ARGUMENT for a token that the model does not have. */
enum sqz_status sqz_model_check_tokens(const struct sqz_model *model, const int32_t *tokens, size_t n_tokens,
                                       struct sqz_error *error);

/* Makes the model's llama.cpp context one for this RoPE; cheap when it is already. */
enum sqz_status sqz_model_set_rope(struct sqz_model *model, struct sqz_rope rope, struct sqz_error *error);

/* Most tokens the model holds when it is stretched so far. */
uint32_t sqz_model_limit(const struct sqz_model *model, float rope_scale);

/* The factors that llama.cpp takes where n_tokens are to fit. */
enum sqz_rope_factors sqz_model_rope_factors(const struct sqz_model *model, size_t n_tokens);

/* The RoPE that a context was read with. MISMATCH when this model cannot have read it so. */
enum sqz_status sqz_model_rope_of(const struct sqz_model *model, const struct sqz_context_meta *meta,
                                  struct sqz_rope *rope, struct sqz_error *error);

/* A thread count as options give it: 0 becomes one a core, and 1 is all there is without OpenMP. Errors: ARGUMENT. */
enum sqz_status sqz_choose_threads(int *n_threads, struct sqz_error *error);

/* Context parameters all our llama.cpp contexts share: the model's own RoPE scaling, stretched. */
struct llama_context_params sqz_llama_context_params(const struct sqz_model *model, float rope_scale);

/* llama.cpp's log is kept from now on, not printed; what it complained about before is forgotten. */
void sqz_llama_log_keep(void);
/* What llama.cpp last complained about, for error messages; "" when nothing. */
const char *sqz_llama_complaint(void);
void sqz_llama_complaint_clear(void);

/* Seam callback; user_data is the struct sqz_model. */
bool sqz_seam_callback(struct ggml_tensor *node, bool ask, void *user_data);

#endif
