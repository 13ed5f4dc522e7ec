/*
 * Where the time of inference goes: the roofline model of squeeze.
 *
 * FLOPs and bytes of every operation of a Transformer, from its shape alone,
 * and the time that a machine needs for them: the bottleneck analysis of
 * QuantSpec (arXiv 2502.10424, table 1), from which docs/analyze.md derives
 * each formula. Plain arithmetic in double precision: but for
 * sqz_model_shape_read(), no model, file or machine is touched. A
 * multiplication and an addition are two FLOPs. A token attends to itself.
 *
 * The functions are in libsqueeze. Errors and NULL as in squeeze.h; calls may
 * come from any thread.
 */
#ifndef SQUEEZE_ROOFLINE_H
#define SQUEEZE_ROOFLINE_H

#include "squeeze.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SQZ_NAME_MAX 64

/* A decoder-only Transformer. sqz_shape_preset() and sqz_model_shape_read() fill it. */
struct sqz_model_shape {
    char name[SQZ_NAME_MAX];
    uint32_t n_layer;        /* 1 to 2^16 */
    uint32_t n_embd;         /* d, the hidden dimension, 1 to 2^24, as all widths below */
    uint32_t n_head;         /* H query heads */
    uint32_t n_head_kv;      /* K key-value heads; divides H */
    uint32_t head_dim;       /* D */
    uint32_t n_ff;           /* width of the feed-forward network (FFN), or of one expert */
    uint32_t n_vocab;        /* 0: layers alone, neither embedding nor output matrix */
    uint32_t n_expert;       /* experts a layer (MoE); 0: one dense FFN */
    uint32_t n_expert_used;  /* experts that a token takes; 1 to n_expert */
    uint32_t n_ff_shared;    /* width of the FFN that every token takes beside its experts; 0: none */
    uint32_t n_window_layer; /* layers that see only the last n_window_tokens; at most n_layer */
    uint32_t n_window_tokens;
    bool gated_ffn;       /* gate, up and down (SwiGLU, GeGLU); false: up and down */
    bool tied_embeddings; /* the output matrix is the embedding: held once, read as often */
};

/* Bits a stored number takes, scales of quantised blocks included (Q4_0 has 4.5): above 0, at most 64. */
struct sqz_bit_widths {
    double weight; /* matrices of the layers */
    double output; /* the output matrix and the embedding */
    double kv;     /* keys and values */
    double activation;
};

/* Where attention scores, one for each query, head and key, go. */
enum sqz_score_traffic {
    SQZ_SCORES_TALK = 0,     /* steps of more than one query token as CHIP, steps of one as MEMORY */
    SQZ_SCORES_ON_CHIP = 1,  /* flash attention: one F32 statistic for each query and head is written */
    SQZ_SCORES_IN_MEMORY = 2 /* written by the logits, read and written by the softmax, read with the values */
};

/* B sequences run n_steps steps of n_query_tokens tokens each; each step sees all tokens before it. Every product of
 * the numbers that counts tokens is a double, so only single fields are bounded. */
struct sqz_workload {
    uint64_t batch;            /* B, 1 to 2^32 */
    uint64_t n_context_tokens; /* in the KV cache before the first step, each sequence; to 2^48, as the next two */
    uint64_t n_query_tokens;   /* a sequence and step: the prompt in prefill, 1 in decode; at least 1 */
    uint64_t n_steps;          /* 1 in prefill, k generated tokens in decode */
    uint64_t n_logit_rows;     /* a sequence and step: rows that the output matrix sees; at most n_query_tokens */
    bool causal;               /* false counts the whole square of n_query_tokens queries and keys of a step */
    enum sqz_score_traffic scores;
};

/* The prefill of B prompts of S_L tokens, and the generation of k tokens behind S_L tokens. Causal, scores as the
 * talk has them, one row of logits a sequence and step. */
SQZ_API struct sqz_workload sqz_workload_prefill(uint64_t batch, uint64_t n_tokens);
SQZ_API struct sqz_workload sqz_workload_decode(uint64_t batch, uint64_t n_context_tokens, uint64_t n_generated);

enum sqz_lookup_kind {
    SQZ_LOOKUP_NONE = 0,   /* all keys are read: O(N) */
    SQZ_LOOKUP_SHARES = 1, /* levels of centroids as shares of the keys, as sqz_squeeze_options has them */
    SQZ_LOOKUP_COUNTS = 2  /* numbers that do not grow with the context: O(c + k), O(c' log N + k) */
};

/* Squeezed attention over the n_context_tokens of a workload, in layers without a window. Tokens behind them get exact
 * attention. A step of several query tokens shares one selection for each sequence and KV head. */
struct sqz_lookup_model {
    enum sqz_lookup_kind kind;
    uint32_t n_levels; /* SHARES: 1 to SQZ_MAX_LEVELS; COUNTS: 1, or 0 for as many as the context needs */
    double centroid_share[SQZ_MAX_LEVELS]; /* SHARES: clusters as a share of the keys, finest first, decreasing */
    double opened_share;  /* SHARES: of the centroids of each level below the coarsest, how many are compared */
    double budget;        /* SHARES: bytes read as a share of the context's KV bytes, centroids and codes included;
                               (0, 1] */
    double n_compared;    /* COUNTS: c (one level) or c' (a level): centroids compared; at least 1 */
    double fan_out;       /* COUNTS: clusters of a level below one of the level above; above 1 */
    double n_retained;    /* COUNTS: k, keys and values that get exact attention */
    double centroid_bits; /* 0: as keys and values */
    uint32_t code_words;  /* words of 32 bits of code a key, by which single keys are chosen; 0: whole clusters; to 4 */
    double coded_share;   /* SHARES with codes: keys of the clusters that are opened, whose codes are read; 0 to 1 */
    double n_coded;       /* COUNTS with codes: the same as a number of keys */
};

/* What one selection for one KV head reads. */
struct sqz_lookup_counts {
    double compared; /* centroids */
    double coded;    /* keys by their codes; 0 without codes */
    double retained; /* keys with their values */
};

/* The counts for N context keys of so many numbers each; none is above N. Where centroids and codes alone take more than
 * the budget, no key is retained. */
SQZ_API struct sqz_lookup_counts sqz_lookup_reads(const struct sqz_lookup_model *lookup,
                                                  const struct sqz_bit_widths *bits, uint32_t head_dim, double n_keys);

enum sqz_op {
    /* linear: products with weights */
    SQZ_OP_Q,
    SQZ_OP_K,
    SQZ_OP_V,
    SQZ_OP_O,
    SQZ_OP_ROUTER,
    SQZ_OP_FFN_GATE,
    SQZ_OP_FFN_UP,
    SQZ_OP_FFN_DOWN,
    SQZ_OP_OUTPUT,
    /* attention */
    SQZ_OP_LOOKUP,
    SQZ_OP_CODES,
    SQZ_OP_LOGITS,
    SQZ_OP_VALUES,
    /* others */
    SQZ_OP_SOFTMAX,
    SQZ_OP_NORM,
    SQZ_OP_ACTIVATION,
    SQZ_OP_EMBEDDING,
    SQZ_N_OPS
};

enum sqz_op_class {
    SQZ_CLASS_LINEAR = 0,
    SQZ_CLASS_ATTENTION = 1,
    SQZ_CLASS_OTHER = 2,
    SQZ_CLASS_AGGREGATE = 3,
    SQZ_N_CLASSES = 4
};

SQZ_API const char *sqz_op_name(enum sqz_op op);                   /* "W_q", "QK^T", ...; static storage */
SQZ_API const char *sqz_op_class_name(enum sqz_op_class op_class); /* "linear", ... */
SQZ_API enum sqz_op_class sqz_op_class_of(enum sqz_op op);         /* never AGGREGATE */

struct sqz_op_cost {
    double flops;
    double weight_bytes; /* each matrix once a step; of experts those that some token of the step is expected to take,
                                n (1 - (1 - used / n)^tokens) under even routing */
    double activation_bytes; /* operands and results, each once */
    double kv_bytes;         /* keys, values, centroids and codes read, each once a step and sequence */
    double score_bytes;
};

/* All layers and all steps of a workload. */
struct sqz_costs {
    struct sqz_op_cost op[SQZ_N_OPS];
};

/* lookup may be NULL: dense. Errors: ARGUMENT (a field, what was found, what is allowed); *costs is then zero. */
SQZ_API enum sqz_status sqz_roofline(struct sqz_costs *costs, const struct sqz_model_shape *shape,
                                     const struct sqz_bit_widths *bits, const struct sqz_workload *work,
                                     const struct sqz_lookup_model *lookup, struct sqz_error *error);

SQZ_API struct sqz_op_cost sqz_costs_sum(const struct sqz_costs *costs, enum sqz_op_class op_class);
SQZ_API double sqz_op_cost_bytes(const struct sqz_op_cost *cost);     /* memory operations: the sum of the four */
SQZ_API double sqz_op_cost_intensity(const struct sqz_op_cost *cost); /* FLOPs a byte; 0 where nothing is moved */

/* The shape of the model in a GGUF file and the bits that its weights take on average; keys, values and activations are
 * set to 16. Only metadata is read. Errors: IO, FORMAT (not a GGUF, damaged, or a field is missing; the message names
 * it), UNSUPPORTED (recurrent layers, latent attention, widths that differ between layers). */
SQZ_API enum sqz_status sqz_model_shape_read(const char *path, struct sqz_model_shape *shape,
                                             struct sqz_bit_widths *bits, struct sqz_error *error);

/* What a machine attains at most. */
struct sqz_roof {
    double flops_per_second, bytes_per_second; /* above 0 */
};
SQZ_API double sqz_roof_ridge(const struct sqz_roof *roof); /* FLOPs a byte where both limits meet */
/* max(FLOPs / peak, bytes / bandwidth), and FLOPs a second within that time. */
SQZ_API double sqz_op_cost_seconds(const struct sqz_op_cost *cost, const struct sqz_roof *roof);
SQZ_API double sqz_op_cost_attained(const struct sqz_op_cost *cost, const struct sqz_roof *roof);
/* One operation after another, each at its own limit: the sum of their times. */
SQZ_API double sqz_costs_seconds(const struct sqz_costs *costs, enum sqz_op_class op_class,
                                 const struct sqz_roof *roof);

/* Parameters with norms (an RMSNorm's d numbers before attention, before the FFN, and at the end), without biases. */
SQZ_API double sqz_shape_parameters(const struct sqz_model_shape *shape);
SQZ_API double sqz_shape_weight_bytes(const struct sqz_model_shape *shape, const struct sqz_bit_widths *bits);
/* Keys and values of n_tokens tokens of one sequence, windows applied. */
SQZ_API double sqz_shape_kv_bytes(const struct sqz_model_shape *shape, const struct sqz_bit_widths *bits,
                                  double n_tokens);

/* Tokens that one cycle of speculative decoding yields on average, when each of gamma drafted tokens is accepted with
 * probability acceptance (0 to 1) independently: (1 - a^(gamma+1)) / (1 - a) (Leviathan et al., arXiv 2211.17192). */
SQZ_API double sqz_speculation_tokens(double acceptance, uint32_t gamma);

/* Preset number `index`, or of that name; false past the last, or for none. Figures are those of the models' published
 * configurations. */
SQZ_API bool sqz_shape_get(size_t index, struct sqz_model_shape *shape);
SQZ_API bool sqz_shape_preset(const char *name, struct sqz_model_shape *shape);

enum sqz_precision {
    SQZ_PRECISION_FP32,
    SQZ_PRECISION_TF32,
    SQZ_PRECISION_FP16,
    SQZ_PRECISION_FP16_SPARSE,
    SQZ_PRECISION_FP8,
    SQZ_PRECISION_INT8,
    SQZ_PRECISION_INT4,
    SQZ_N_PRECISIONS
};
SQZ_API const char *sqz_precision_name(enum sqz_precision precision); /* "fp32", "fp16-sparse", ... */

struct sqz_machine {
    char name[SQZ_NAME_MAX];
    char note[128];                            /* where the figures come from */
    uint32_t year;                             /* of its announcement; 0: unknown */
    double bytes_per_second;                   /* peak memory bandwidth */
    double memory_bytes;                       /* 0: unknown */
    double flops_per_second[SQZ_N_PRECISIONS]; /* peak, dense unless the name says sparse; 0: has none, or unknown */
    enum sqz_precision precision;              /* the one taken unless another is asked for */
};
SQZ_API bool sqz_machine_get(size_t index, struct sqz_machine *machine);
SQZ_API bool sqz_machine_preset(const char *name, struct sqz_machine *machine);

#ifdef __cplusplus
}
#endif

#endif /* SQUEEZE_ROOFLINE_H */
