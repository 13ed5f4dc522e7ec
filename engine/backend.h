/*
 * A place where attention is computed: what stands between the seam and
 * whoever computes. A context is bound to it once and shared by all sequences;
 * each sequence has rows of its own there, which the keys and values of its
 * tokens go to; then every attention node of a batch is one call, whatever
 * sequences and contexts its tokens belong to.
 *
 * Whoever adds a place writes one file beside backend_cpu.c. The pointers of a
 * node, and what its strides count, are in the memory that the place computes
 * in: host memory here, a GPU's there, whose stream comes with the call. A place
 * may wrap another and change what one of its operations does.
 */
#ifndef SQZ_ENGINE_BACKEND_H
#define SQZ_ENGINE_BACKEND_H

#include "build.h"
#include "context_file.h"
#include "run.h"
#include "shards.h"

/* Question tokens that share a selection; measured in docs/method.md. */
enum { SQZ_QUESTION_BLOCK_TOKENS = 1 };

struct sqz_backend;  /* begins with a struct sqz_backend_ops *; the rest is the place's own */
struct sqz_bound;    /* a context that is bound to a place */
struct sqz_own_rows; /* a sequence's rows behind a bound context */

/* A sequence's part of a batch at one attention node. */
struct sqz_backend_part {
    struct sqz_own_rows *own;
    size_t n_own;                 /* rows before the batch */
    size_t n_kept;                /* rows before the run that the batch is of, which it goes back to when it fails */
    size_t first_token, n_tokens; /* of the batch */
    float budget, log_offset;     /* as sqz_attend_call has them */
    bool upper;                   /* likewise */
    bool own_elsewhere;           /* the sequence's own rows count in another place: none are looked at here */
    size_t block_tokens;
    struct sqz_attention_stats *stats; /* added to */
    /* Set by count_read(), or on the CPU by attend(): stats are of what several tokens read together, not of what each of
     * them selected, and say nothing of its threshold. */
    bool united;
    struct sqz_attention_map *map; /* of a place on the CPU: added to by parts of one token; NULL: not wanted */
    size_t map_turn;               /* of the token; its layers and heads have turns one after another */

    /* Of a context in several places, or NULL; [T][H] each. */
    float *log_total;       /* receives this place's part of the denominator, for the others to choose by */
    const float *elsewhere; /* what the others have */
    /* Receives that of the output, by which outputs merge (sqz_merge_partial()). Those of a call's parts lie as their tokens do in
     * the node. */
    float *lse;

    enum sqz_status status; /* set by the place when this part alone fails; OK before */
    struct sqz_error *error;
};

/* Other GPUs' streams on which a pass launches, too, and which neither follow its own stream nor are followed: when it is
 * captured, they are captured apart, and launched whenever it is. */
enum { SQZ_MOST_BESIDE = 7 };
struct sqz_gpu_beside {
    void (*ready)(
        void *user_data); /* before what was captured is launched on them, behind the launch on its own stream */
    void *user_data;
    uint32_t n;
    struct {
        int card;
        void *stream;
    } of[SQZ_MOST_BESIDE];
};

struct sqz_backend_call {
    const struct sqz_attention_node *node;
    struct sqz_backend_part *const *parts;
    size_t n_parts;
    int n_threads;                 /* of a place on the CPU */
    int card;                      /* of several, that begin() is about */
    void *stream;                  /* of a GPU; NULL on the CPU, and behind the run */
    struct sqz_gpu_beside *beside; /* out, of begin(): empty before; or NULL */
};

/* The same of a text that is being read: dense, causal, rows in the order of their positions. Rows go to `keys` and
 * `values`, or stay on a card. */
struct sqz_backend_reading {
    const struct sqz_attention_node *node;
    struct sqz_layer_shape shape;
    uint16_t *keys, *values; /* F16 [K][capacity_rows][D] */
    size_t capacity_rows, first_position, window_tokens;
    uint32_t n_layers; /* that the text is read by */
    /* Of a place on the CPU, and a text in several of them: as sqz_causal_call has them. Nothing is taken of tokens whose
     * rows are not the place's own. */
    float *lse;
    bool not_own;
    int n_threads;
    void *stream;
};

/* Building layers where their rows are, of a text that was read: what the sqz_layers_ calls of build.h do on the host, for
 * one layer. In the order of these calls, all layers at each before the next, and before end_reading(). `layer` is the
 * planned one in host memory. Errors: INTERNAL. */
struct sqz_backend_builder {
    /* Which card a layer is on: calls for layers of different cards may come at the same time, from several threads. NULL: all
     * are on one. */
    int (*card)(struct sqz_backend *backend, uint32_t index);
    /* Clusters, sorts and codes layer number `index`. *built false: not here; the host has to, bring_rows() has its rows. */
    enum sqz_status (*build)(struct sqz_backend *backend, uint32_t index, const struct sqz_layer *layer,
                             const struct sqz_squeeze_options *options, bool *built, struct sqz_error *error);
    /* What calibration counts of each head, and its variance gain: [K]. */
    enum sqz_status (*count)(struct sqz_backend *backend, uint32_t index, const struct sqz_layer *layer,
                             bool fit_variance, struct sqz_curve_sums *sums, float *gain, struct sqz_error *error);
    /* keep[h] as sqz_choose_tail(): by the layer's curves, which have joined. */
    enum sqz_status (*try_tail)(struct sqz_backend *backend, uint32_t index, const struct sqz_layer *layer, bool *keep,
                                struct sqz_error *error);
    /* The layer with its index in host memory, until the next call; curves and queries stay the planned one's, rows are
     * not there. */
    enum sqz_status (*fetch)(struct sqz_backend *backend, uint32_t index, const struct sqz_layer *layer,
                             struct sqz_layer *host, struct sqz_error *error);
    /* The layer with its rows alone, until the call after the next. `layers` are all the planned ones. `next`: a layer that
     * was built and will be asked for next, or UINT32_MAX; it comes meanwhile. The one call that may come from another thread than the others, beside
     * them, once the layer and `next` are built. */
    enum sqz_status (*fetch_rows)(struct sqz_backend *backend, uint32_t index, const struct sqz_layer *layers,
                                  uint32_t next, struct sqz_layer *host, struct sqz_error *error);
};

struct sqz_backend_ops {
    const char *name;
    bool
        steered; /* keeps to the budget by the context's curve: asks below its floor are raised, thresholds corrected */

    /* The context outlives what is bound. Binding the same context again is cheap. Errors: MEMORY, UNSUPPORTED. */
    enum sqz_status (*bind)(struct sqz_backend *backend, const struct sqz_context *context, struct sqz_bound **bound,
                            struct sqz_error *error);
    void (*unbind)(struct sqz_bound *bound);
    /* A GPU's: which layers of the context are left to the CPU, and why, a sentence; "": none. NULL: as that. */
    const char *(*fallback)(const struct sqz_bound *bound);

    /* Room for capacity_rows rows behind the context, of every layer; memory for those that come. Also sees to it that
     * a call has the scratch memory it needs: calls allocate nothing. Errors: MEMORY. */
    enum sqz_status (*create_own)(struct sqz_backend *backend, struct sqz_bound *bound, size_t capacity_rows,
                                  struct sqz_own_rows **own, struct sqz_error *error);
    void (*free_own)(struct sqz_own_rows *own);
    /* Copies n of its rows of a layer, from row number `first` on, into arrays [K][capacity_rows][D] from row to_row on, of a
     * context none of whose layers has clusters. NULL: they are on a card. */
    void (*copy_own)(const struct sqz_own_rows *own, uint32_t layer, size_t first, size_t n, uint16_t *keys,
                     uint16_t *values, size_t capacity_rows, size_t to_row);

    /* Most tokens of a part that take() and attend() have at once; more come in pieces, one after the other. NULL: any
     * number. */
    size_t (*most_tokens)(const struct sqz_own_rows *own);
    /* Bytes that its rows take. NULL: not known. */
    size_t (*own_bytes)(const struct sqz_own_rows *own);

    /* A GPU's: before the first node of a graph, whose node is not looked at; call->stream is that of the launches to
     * come. Parts may fail here. What follows depends on the parts and on the number that is returned: with the same one,
     * the launches of take() and attend() are the same again; 0: they are not. NULL: there is nothing to do. */
    uint64_t (*begin)(struct sqz_backend *backend, const struct sqz_backend_call *call);
    /* Puts the keys and values of each part's tokens behind the n_own rows of its own. Up to 128 that were put before may be
     * put again, all of them, or those from n_kept on; otherwise a part fails here with INTERNAL. */
    void (*take)(struct sqz_backend *backend, const struct sqz_backend_call *call);
    /* Attention of each part's tokens over its context and its own rows, those of the batch included; writes the node's
     * output. What a part gets does not depend on the others but where tokens go through a context together
     * (enum sqz_together): more is read for it than it would select alone, never less. */
    void (*attend)(struct sqz_backend *backend, const struct sqz_backend_call *call);
    /* Between the two, where a context lies in several places: each part's log_total. Their sum over all other places is
     * what `elsewhere` has in attend(), whose output is then this place's part. */
    void (*total)(struct sqz_backend *backend, const struct sqz_backend_call *call);
    /* A GPU's, behind a run that went well, for every layer: adds to the parts' stats what it read, where that was not
     * counted at its node. NULL: it was. */
    void (*count_read)(struct sqz_backend *backend, const struct sqz_backend_call *call, uint32_t layer);
    /* A GPU's, behind that, and behind a run that failed, then without parts. NULL: nothing. */
    void (*finish)(struct sqz_backend *backend, const struct sqz_backend_call *call);

    /* Scratch memory for reading layers of this shape; then takes and attends to the tokens of a node. Errors: MEMORY. */
    enum sqz_status (*plan_reading)(struct sqz_backend *backend, const struct sqz_layer_shape *shape,
                                    struct sqz_error *error);
    enum sqz_status (*read)(struct sqz_backend *backend, const struct sqz_backend_reading *reading,
                            struct sqz_error *error);
    /* Behind the last read() of a text: keys and values of a layer whose rows a card kept, [K][capacity_rows][D] as
     * read() was given. Of a layer whose rows are in host memory nothing happens. NULL: they always are. */
    enum sqz_status (*bring_rows)(struct sqz_backend *backend, uint32_t layer, uint16_t *keys, uint16_t *values,
                                  struct sqz_error *error);
    const struct sqz_backend_builder *builder; /* NULL: layers are built on the host */
    /* As build() of the builder for a shard of the layer, which is brought then: its index and its sorted rows come to lie where `layer`, the
     * shard's planned one, has them, and nothing of it stays. NULL: the host does. */
    enum sqz_status (*build_shard)(struct sqz_backend *backend, uint32_t index, const struct sqz_deal *deal,
                                   uint32_t shard, const struct sqz_layer *layer,
                                   const struct sqz_squeeze_options *options, bool *built, struct sqz_error *error);
    /* A GPU's, of the reading since plan_reading(), as fallback(). NULL: as "". */
    const char *(*reading_fallback)(struct sqz_backend *backend);
    /* What reading and building needed is given back. NULL: nothing. */
    void (*end_reading)(struct sqz_backend *backend);
    /* The node's tokens in host memory until the next call; of a place on the CPU NULL: they are there. False: the card
     * refused. */
    bool (*fetch_queries)(struct sqz_backend *backend, const struct sqz_attention_node *node,
                          const struct sqz_layer_shape *shape, void *stream, struct sqz_attention_node *host);
};

struct sqz_backend {
    const struct sqz_backend_ops *ops;
};

#endif
