/*
 * What the engine needs of a GPU, as one table of functions: libsqueeze_cuda is
 * loaded when the program runs, so that one program serves machines with and
 * without a card, and whoever tests the engine gives it a table of its own.
 *
 * Device memory, streams and events are the CUDA runtime's, as void *. Calls are
 * about the card that use() chose for the calling thread. Those that return bool
 * say false when CUDA refused, and complaint() has its words.
 */
#ifndef SQZ_LIB_CUDA_CALLS_H
#define SQZ_LIB_CUDA_CALLS_H

#include "curve_sums.h"
#include "squeeze_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

struct sqz_gpu_card {
    char name[128];
    int capability; /* 90 is 9.0 */
    int n_multiprocessors;
    size_t memory_bytes, free_bytes;
    bool supported; /* these kernels run on it */
};

/* The tokens of an attention node of llama.cpp's graph, F32 queries and F16 keys and values, as it has them: strides in
 * elements. Queries become F16 [T][H][P]; keys and values go to the sequence's own rows. Behind the head_dim numbers of
 * each, up to P, come zeros. */
struct sqz_gpu_node {
    uint32_t n_tokens, n_head, n_head_kv, head_dim, padded_dim; /* P */
    const float *queries;
    size_t query_token_stride, query_head_stride;
    const void *keys, *values; /* NULL: queries alone, which may lie on another card */
    size_t key_token_stride, key_head_stride, value_token_stride, value_head_stride;
    const struct sqz_cuda_user *users; /* device [T]: token t becomes row n_rows - 1 of users[t]; or NULL, and */
    void *own_keys, *own_values;       /* F16 [K][capacity_rows][P]: it becomes row first_row + t */
    size_t capacity_rows, first_row;
    void *queries_f16; /* out; NULL: rows alone */
};

/* Dense causal attention of T tokens that are the last of n_rows; with window_tokens of each over so many rows, its own
 * the last of them. */
struct sqz_gpu_causal {
    struct sqz_layer_shape shape;
    uint32_t n_tokens, n_rows, window_tokens; /* 0: no window */
    const void *queries;                      /* F16 [T][H][D] */
    const void *keys, *values;                /* F16 [K][capacity_rows][D] */
    size_t capacity_rows;
    float *out; /* F32 [T][H][D] */
    void *workspace;
    size_t workspace_bytes;
};

/* out = in W^T of many tokens: what a node of llama.cpp's graph multiplies with quantised weights. */
struct sqz_gpu_product {
    int type;            /* enum sqz_weights */
    const void *weights; /* [n_out][n_in] */
    uint32_t n_in, n_out, n_tokens;
    const float *in; /* [n_tokens][n_in] */
    bool same_in;    /* as in the call before, in the same workspace: what was made of it is still there */
    float *out;      /* [n_tokens][n_out] */
    void *workspace;
    size_t workspace_bytes;
};

/* Products of few tokens that share their input: matrices[i].out = in W_i^T (+ add); gated: the first one's alone,
 * silu(in W_0^T) times in W_1^T (+ add). An input may not lie where results do; what is added may be
 * where the result of the same token and place goes. */
enum { SQZ_MOST_PROJECTIONS = 3, SQZ_MOST_PROJECTED = 64 /* tokens */ };
struct sqz_gpu_projections {
    int type; /* enum sqz_weights, of all */
    uint32_t n_in, n_tokens, n_matrices;
    struct {
        const void *weights; /* [n_out][n_in], at a multiple of 16 bytes */
        uint32_t n_out;
        float *out;          /* [n_tokens][n_out] */
        const float *add;    /* [n_tokens][n_out] or, with a stride of 0, [n_out]; NULL: nothing */
        uint32_t add_stride; /* numbers */
    } matrices[SQZ_MOST_PROJECTIONS];
    bool gated;
    bool after_ours;   /* what comes before on the stream is of this library: see sqz_launch() */
    bool same_in;      /* as in the call before, of as many tokens, in the same workspace and with the same type */
    const float *in;   /* [n_tokens][n_in], at a multiple of 16 bytes */
    const float *norm; /* [n_in], so, too: a token's numbers are divided by the root of their mean square, to which the
                          epsilon is added, and multiplied by these; NULL: they are as they are */
    float norm_epsilon;
    void *workspace;
    size_t workspace_bytes;
};

/* A layer of one level from its rows, as lib/build.c makes it: clustered, sorted, summarised, coded. */
struct sqz_gpu_build {
    const struct sqz_layer
        *layer; /* the struct: host, planned by sqz_layers_plan(); its arrays: on the device. Keys and
                                      values, F16, are in the order of their positions and are sorted in place, queries
                                      are there; all others but the curves are written */
    const struct sqz_squeeze_options *options;
    uint64_t seed;
    void *workspace;
    size_t workspace_bytes;
};

/* What calibration counts of every head of such a layer (lib/calibrate.c). */
struct sqz_gpu_count {
    const struct sqz_layer *layer; /* as above, built; variance_gain is written */
    bool fit_variance;             /* else the gain is 0 */
    struct sqz_curve_sums *sums;   /* device [K] out */
    void *workspace;
    size_t workspace_bytes;
};

#define SQZ_GPU_VERSION (10000 * SQZ_VERSION_MAJOR + 100 * SQZ_VERSION_MINOR + SQZ_VERSION_PATCH)

struct sqz_gpu_calls {
    size_t size; /* of this struct: another one is of another version */
    int version; /* SQZ_GPU_VERSION of the library */

    int (*count)(void);
    bool (*card)(int device, struct sqz_gpu_card *card);
    bool (*use)(int device);
    const char *(*complaint)(void);

    void *(*allocate)(size_t bytes); /* NULL: none is left */
    void (*release)(void *memory);
    void *(*allocate_pinned)(size_t bytes); /* host memory that copies fast */
    void (*release_pinned)(void *memory);
    bool (*put)(void *device, const void *host, size_t bytes, void *stream);
    bool (*get)(void *host, const void *device, size_t bytes, void *stream);
    /* n runs of `bytes` bytes, device to device or to the host. */
    bool (*copy_runs)(void *to, size_t to_stride, const void *from, size_t from_stride, size_t bytes, size_t n,
                      void *stream);
    bool (*clear)(void *device, size_t bytes, void *stream);

    void *(*create_stream)(void);
    void (*free_stream)(void *stream);
    bool (*wait)(void *stream); /* until all of it is done */
    void *(*create_event)(void);
    void (*free_event)(void *event);
    bool (*record)(void *event, void *stream);
    bool (*follow)(void *stream, void *event); /* the stream waits for the event */

    bool (*begin_capture)(void *stream);
    void *(*end_capture)(void *stream); /* what was launched since, to be launched again and again; NULL: refused */
    bool (*launch)(void *captured, void *stream);
    void (*free_captured)(void *captured);

    const char *(*obstacle)(const struct sqz_cuda_attend_args *args); /* why a call cannot run; NULL: it can */
    size_t (*workspace_bytes)(const struct sqz_cuda_attend_args *args);
    enum sqz_status (*attend)(const struct sqz_cuda_attend_args *args, void *stream);
    enum sqz_status (*take)(const struct sqz_gpu_node *node, void *stream);
    /* F16 [n_rows][padded_dim] becomes F32 [n_rows][head_dim]; both even. */
    enum sqz_status (*give)(float *out, const void *f16, size_t n_rows, uint32_t head_dim, uint32_t padded_dim,
                            void *stream);
    size_t (*causal_workspace_bytes)(const struct sqz_gpu_causal *args); /* 0: not supported */
    enum sqz_status (*causal)(const struct sqz_gpu_causal *args, void *stream);

    /* Sizes are 0 where a layer is not supported; pointers are not looked at. */
    size_t (*build_workspace_bytes)(const struct sqz_gpu_build *args);
    enum sqz_status (*build)(const struct sqz_gpu_build *args, void *stream);
    size_t (*count_workspace_bytes)(const struct sqz_gpu_count *args);
    enum sqz_status (*count_layer)(const struct sqz_gpu_count *args, void *stream);

    /* take, attend and give in as few launches as there can be: F32 results of the node's tokens, each a sequence of args
     * or all tokens of one; args' queries and users are the node's. */
    enum sqz_status (*attend_node)(const struct sqz_cuda_attend_args *args, const struct sqz_gpu_node *node, float *out,
                                   void *stream);

    void *(*create_multiplier)(void); /* one thread at a time uses it; NULL: this card's products are ggml's */
    void (*free_multiplier)(void *multiplier);
    size_t (*product_workspace_bytes)(const struct sqz_gpu_product *args); /* 0: ggml's is taken */
    enum sqz_status (*product)(void *multiplier, const struct sqz_gpu_product *args, void *stream);
    size_t (*projections_workspace_bytes)(const struct sqz_gpu_projections *args); /* 0: ggml's are taken */
    enum sqz_status (*project)(const struct sqz_gpu_projections *args, void *stream);
    /* n numbers of quantised weights (enum sqz_weights) as BF16. UNSUPPORTED: another type. */
    enum sqz_status (*widen)(int type, const void *weights, size_t n, void *out, void *stream);

    /* n calls of attend_node, of single tokens and each on a context of its own, in as many launches as one: arrays that are
     * [B] go on from call to call, the node has the tokens of all, the workspace is the first one's. UNSUPPORTED: they
     * do not go together, and nothing was launched. */
    size_t (*several_workspace_bytes)(const struct sqz_cuda_attend_args *calls, size_t n); /* 0: they do not */
    enum sqz_status (*attend_several)(const struct sqz_cuda_attend_args *calls, size_t n,
                                      const struct sqz_gpu_node *node, float *out, void *stream);

    /* Of a layer whose keys and values are in planes. */
    size_t (*plane_index_bytes)(const struct sqz_layer *layer); /* 0: such rows are not supported */
    enum sqz_status (*plane_index)(const struct sqz_layer *layer, void *index, void *stream);

    /* Of contexts whose rows lie on several cards (struct sqz_cuda_ranks); obstacle() is asked with ranks. Events of one card
     * may be followed on another's streams, kernels of one read and write another's memory once they are connected. Of
     * calls of attend_node that the first rank leads the others look at no queries of the node, and have no `out`. */
    bool (*connect)(const int *cards, uint32_t n, char *why, size_t room);
    size_t (*mailbox_bytes)(uint32_t n_ranks, uint32_t n_rows);
    enum sqz_status (*merge)(const struct sqz_cuda_merge_args *args, void *stream);

    /* Own rows of such a layer. */
    size_t (*user_planes_bytes)(const struct sqz_layer *layer, uint32_t n_rows);
    enum sqz_status (*flush)(const struct sqz_cuda_flush_args *args, void *stream);
    enum sqz_status (*move_user_planes)(const struct sqz_layer *layer, void *to, uint32_t to_rows, const void *from,
                                        uint32_t from_rows, uint32_t n_blocks, void *stream);
};

/* The one function that is looked up by name. */
SQZ_API const struct sqz_gpu_calls *sqz_gpu_calls(void);
#define SQZ_GPU_CALLS_NAME "sqz_gpu_calls"

/* Within lib/cuda/: what stands in the table. */
bool sqz_gpu_node_good(const struct sqz_gpu_node *node);
enum sqz_status sqz_gpu_take(const struct sqz_gpu_node *node, void *stream);
/* Also sets counters to 0 for who comes next. led: NULL, or ranks of which the first leads: it tells the others its queries,
 * and they take these in place of the node's. */
enum sqz_status sqz_gpu_take_and_clear(const struct sqz_gpu_node *node, uint32_t *counters, uint32_t n,
                                       const struct sqz_cuda_ranks *led, void *stream);
enum sqz_status sqz_gpu_give(float *out, const void *f16, size_t n_rows, uint32_t head_dim, uint32_t padded_dim,
                             void *stream);
enum sqz_status sqz_gpu_attend_node(const struct sqz_cuda_attend_args *args, const struct sqz_gpu_node *node,
                                    float *out, void *stream);
const char *sqz_gpu_ranks_obstacle(const struct sqz_cuda_attend_args *args); /* of a layer that has no other */
size_t sqz_gpu_several_workspace_bytes(const struct sqz_cuda_attend_args *calls, size_t n);
enum sqz_status sqz_gpu_attend_several(const struct sqz_cuda_attend_args *calls, size_t n,
                                       const struct sqz_gpu_node *node, float *out, void *stream);

#ifdef __cplusplus
}
#endif

#endif
