/*
 * Internals of struct sqz_model: a llama.cpp model and one llama.cpp context
 * that only ever holds the batch in flight.
 */
#ifndef SQZ_ENGINE_MODEL_H
#define SQZ_ENGINE_MODEL_H

#include "context_file.h"
#include "model_files.h"
#include "squeeze.h"

#include "crew.h"
#include "gguf.h"
#include "gpu.h"
#include "gpu_weights.h"
#include "llama.h"

struct sqz_run;
struct sqz_backend;

/* How positions become angles. */
struct sqz_rope {
    float scale;                   /* how far the model's own scaling is stretched */
    enum sqz_rope_factors factors; /* never UNSAID */
};

/* With SQZ_COPIES_AUTO: so many sequences at once are worth the memory that copies take. Products of fewer are the
 * card's own (lib/cuda/calls.h). */
enum { SQZ_COPIES_SEQUENCES = 65 };

/* A llama.cpp context of its own for runs that come again and again: a drafted token, or a verifying batch of so many.
 * Its graph stays as it is, and on a card captured, whatever runs between. */
struct sqz_repeated {
    struct llama_context *context;
    struct sqz_rope rope;
    size_t n_tokens;
    bool drafts;
};
enum { SQZ_MOST_REPEATED = 8 };

/* Weights in fewer bits that draft in place of the model's own; draft_weights.h. */
struct sqz_drafting {
    struct sqz_model_files files;
    struct llama_model *llama; /* NULL: the model's own draft */
};

enum { SQZ_ON_HOST = -1 };
struct sqz_model_layer {
    struct sqz_layer_shape shape;
    bool sliding_window;
    int card; /* that llama.cpp put it on, or SQZ_ON_HOST */
};

struct sqz_model {
    struct sqz_model_files files;
    struct llama_model *llama;
    struct llama_context *context; /* of runs of any kind */
    struct llama_context *running; /* of the run in work or of the last: `context`, or one of these */
    struct sqz_repeated repeated[SQZ_MOST_REPEATED];
    size_t n_repeated;
    struct sqz_drafting drafting;
    const struct llama_vocab *vocab;
    struct sqz_model_info info;
    struct sqz_model_layer *layers; /* [info.n_layer] */
    struct sqz_crew crew;           /* threads: info.n_threads at most */
    uint32_t n_trained_tokens;      /* the longest text, as the file says */
    uint32_t n_original_tokens;     /* of LongRoPE: a longer one gets the long factors; 0: the model has none */
    float own_rope_scale;           /* the frequency scale that the file says, at most 1 as a rule */
    char rope_type[16];             /* "linear", "yarn", "longrope", "none" */
    float rope_scale;               /* as opened */
    struct sqz_rope rope;           /* of `context` as it is now */
    const char *chat_template;      /* the model's own; NULL: none that llama.cpp knows */

    struct sqz_run *run;   /* in work; NULL: none */
    uint32_t n_sequences;  /* that `context` takes in one run */
    size_t n_batch_tokens; /* and how many tokens: SQZ_BATCH_TOKENS, or more while a text is read */

    struct sqz_backend *backend;                    /* where attention is computed */
    struct sqz_backend *shards;                     /* that of contexts in shards; NULL until there is one */
    bool on_card, all_on_card;                      /* some layers of it are on a card; all of them, the output's too */
    int32_t n_gpu_layers;                           /* as llama.cpp is asked for them; 0: none */
    ggml_backend_dev_t devices[SQZ_MOST_CARDS + 1]; /* of our own, or none; ends with NULL; a card may come again */
    float card_shares[SQZ_MOST_CARDS];              /* of layers and output, in that order; zeros: by free memory */
    int n_model_cards;                              /* that have layers */
    void *streams[SQZ_MOST_CARDS];                  /* of nodes that the callback hands over, created when one comes */
    enum sqz_copies copies;                         /* as opened */
    bool wants_copies;                              /* now */
    struct sqz_gpu_weights *weights[SQZ_MOST_CARDS]; /* 16-bit copies; NULL: none */
    llama_token_data *candidates;                    /* [n_vocab] of all sessions: one samples at a time */
};

/* ARGUMENT for a token that the model does not have. */
enum sqz_status sqz_model_check_tokens(const struct sqz_model *model, const int32_t *tokens, size_t n_tokens,
                                       struct sqz_error *error);

/* Makes the model's llama.cpp context one for this RoPE and so many sequences, at most sqz_model_most_sequences(); cheap
 * when it is already. */
enum sqz_status sqz_model_make_ready(struct sqz_model *model, struct sqz_rope rope, uint32_t n_sequences,
                                     struct sqz_error *error);
/* The same for a drafted token (n_tokens is 1) or a verifying batch: in a context of its own, where one is left for that
 * many tokens and there is memory for it. Drafts are by the weights that draft. Its logits are those of model->running. */
enum sqz_status sqz_model_make_ready_to_repeat(struct sqz_model *model, struct sqz_rope rope, size_t n_tokens,
                                               bool drafts, struct sqz_error *error);
/* The same for reading a text of so many tokens, one sequence in batches of model->n_batch_tokens. */
enum sqz_status sqz_model_make_ready_to_read(struct sqz_model *model, struct sqz_rope rope, size_t n_tokens,
                                             struct sqz_error *error);
enum { SQZ_MOST_SEQUENCES = 64 }; /* or fewer, where llama.cpp takes fewer */
uint32_t sqz_model_most_sequences(void);

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

/* A file of the model to llama.cpp, its layers where the model's are; NULL: llama.cpp says why. */
struct llama_model *sqz_model_load_llama(const struct sqz_model *model, const struct sqz_model_files *files,
                                         const char *path);

/* Model parameters: where its layers are. */
struct llama_model_params sqz_llama_model_params(const struct sqz_model *model);

#endif
