/*
 * What the files of the place on a card share: backend_cuda.c runs passes,
 * card_pass.c makes what they need, card_ranks.c has contexts whose rows lie on several cards,
 * card_ways.c says which of their tokens read together,
 * card_contexts.c has contexts there and card_own.c what follows them, card_upload.c brings them and
 * card_download.c brings them back,
 * card_reading.c reads texts and brings a node's tokens to the host,
 * card_building.c makes layers of what was read.
 */
#ifndef SQZ_ENGINE_CARD_H
#define SQZ_ENGINE_CARD_H

#include "backend.h"
#include "cuda/calls.h"
#include "rows.h"

/* A layer on the card. */
struct sqz_card_layer {
    struct sqz_layer layer;
    struct sqz_layer upper; /* the same, read by its upper planes alone where there are lower ones */
    void *memory;           /* all arrays; NULL: not there */
    const float *variance_gain;
    size_t bytes;
    bool on_cpu; /* has no kernel */
    bool planes; /* keys and values are in planes here, too */
};

enum { SQZ_CARD_FALLBACK_CHARS = 240 };

/* What passes over a context have read, and how (card_ways.c). */
struct sqz_card_habit {
    double share,
        shared_share; /* that a token selects, and a long question's tokens together, the last time; 0: not yet known */
    double spread;    /* selections of n tokens have together 1 + spread * log2(n) times what one has */
    enum sqz_together way[16]; /* taken last, by the logarithm of the tokens; CHEAPEST: none yet */
};

/* A context, shared by all who bound it. */
struct sqz_bound {
    struct sqz_card *cuda;
    const struct sqz_context *context;
    struct sqz_bound *cpu;         /* the CPU place's */
    struct sqz_card_layer *layers; /* [n_layer] */
    uint32_t n_layer, n_on_cpu;
    char fallback[SQZ_CARD_FALLBACK_CHARS]; /* what sqz_backend_ops has of it */
    size_t n_refs, bytes;
    bool resident, busy; /* busy: of the pass in flight */
    bool apart;          /* the card would not compute it in one call with others */
    uint64_t last_used, generation;
    struct sqz_card_habit habit;
    /* Of a context in shards, one on each of several cards. `context` is the shard that lies here. */
    struct sqz_cuda_ranks ranks;                    /* n_ranks 0: the whole context lies here */
    struct sqz_bound *of_card[SQZ_CUDA_MOST_RANKS]; /* of the first: those of all cards, itself in front */
    uint64_t rehearsed[2];                          /* calls of 1 + bit tokens, that choose and that read everything */
    size_t each_most;                               /* tokens of a call that have a selection each */
    struct sqz_bound *next;
};

/* F16 rows of all layers of a kind: those from number `first` on. */
struct sqz_card_f16_rows {
    void *memory; /* NULL: no room yet */
    size_t room, bytes, first;
};

struct sqz_own_rows {
    struct sqz_bound *bound;
    struct sqz_own_rows *cpu;               /* the CPU place's, for layers that are computed there */
    struct sqz_card_f16_rows whole, recent; /* of layers that have all rows so; of those that have others in planes */
    uint16_t **keys, **values;              /* [n_layer] into one or the other, F16 [K][room][D] each */
    struct sqz_card_f16_rows kept; /* of recent's layers: what rows from number n_kept on read as F16, 0: of none */
    size_t n_kept;
    char **planes; /* [n_layer] or NULL: for plane_room rows, of which n_flushed blocks are there */
    size_t plane_room, plane_bytes, n_flushed;
    size_t n_when_passed, n_flushed_then; /* blocks that are there once the pass in flight has put so many rows */
    void *plane_memory;
};

/* Neighbouring tokens of a batch that go through a context together. */
struct sqz_card_group {
    struct sqz_bound *bound;
    struct sqz_own_rows *own; /* of the only part, where the tokens are a long question's */
    size_t first_token, n_tokens, n_user;
    bool shared, dense; /* shared: a long question; dense: everything is read */
    bool upper;         /* by upper planes alone */
    bool own_planes;    /* some of its tokens read own rows in planes, too */
    enum sqz_together way;
    size_t n_joined; /* groups from this one on that one call computes; 0: one before it has this one, too */
    size_t place;    /* among all calls of the pass */
};

enum { SQZ_CARD_MOST_GROUPS = SQZ_MOST_SEQUENCES + SQZ_BATCH_TOKENS };

/* A stream beside a pass's own, for one of several groups or for another card's part. */
struct sqz_card_side {
    void *stream, *done;
};
enum { SQZ_CARD_SIDES = 7 };

/* Cards that share the rows of contexts: the first has the model's layers and the sessions' own rows. card_ranks.c. */
struct sqz_card_ranks {
    uint32_t n;
    struct sqz_card *card[SQZ_CUDA_MOST_RANKS];
    struct sqz_card_side lane[SQZ_CUDA_MOST_RANKS]; /* of each but the first: what it does for a pass */
    void *come;                                     /* on the first: that lanes wait for at a node, where they do */
    bool apart; /* the pass in flight: cards meet in mailboxes alone, lanes fork from nothing and join nothing */
    /* Of each card's frame: it is yet to be filled, and yet to go there by its lane, in front of the first node's calls. */
    bool fill[SQZ_CUDA_MOST_RANKS], put[SQZ_CUDA_MOST_RANKS];
    bool first_of_pass;       /* whether the pass begins, for all cards */
    bool waits, was_answered; /* for lanes that nothing has followed; all have ended without an error */
    struct sqz_backend_part *parts_of_pass[SQZ_MOST_SEQUENCES];
    size_t n_parts_of_pass;
    struct {
        void *mailbox[SQZ_CUDA_MOST_RANKS];
        size_t bytes;
        uint32_t n_rows;
    } of[SQZ_CUDA_MOST_RANKS + 1]; /* for contexts of so many shards */
    uint32_t *failed;              /* pinned, [SQZ_CUDA_MOST_RANKS + 1]: kernels tell that they have waited in vain */
    bool broken;                   /* mailboxes have to be cleared before the next call */
    char *parts;                   /* on the first: F32 [cards][T][H][D], then [cards][T][H] log-sum-exps */
    size_t parts_room;
};

/* Of one layer in the frame. */
struct sqz_card_frame {
    size_t users, thresholds, tails; /* offsets: struct sqz_cuda_user [T], float [T][K] twice */
    size_t retained, read;           /* in counts: uint32_t and struct sqz_cuda_read [T][K] */
    bool runs_here;                  /* with fewer layers on the card than the model has some never come */
};

/* Keys and values of a layer while a text is read. */
struct sqz_card_rows {
    uint16_t *keys, *values; /* [K][capacity][sqz_card_dim(D)]; NULL: on the CPU */
    size_t capacity, bytes;  /* bytes: of both */
    uint32_t head_dim;
};

/* A layer that is built on the card: its rows are where they were read. */
struct sqz_card_built {
    struct sqz_layer layer; /* of which the index is in */
    void *memory;           /* NULL: it is not built here */
    size_t bytes;
    float *value_mean; /* host [K][D], what values in planes will be relative to; NULL: they will not be in planes */
};

/* A built layer's rows or its index on their way to the host, and there. */
struct sqz_card_fetched {
    void *memory, *stream; /* pinned */
    size_t room;
    uint32_t index; /* whose; UINT32_MAX: nobody's */
};

/* A pinned buffer, and the stream by which it goes to the card. */
struct sqz_card_buffer {
    void *memory, *stream;
    char *device; /* where it goes */
    size_t used;
};
enum { SQZ_CARD_BUFFERS = 4, SQZ_CARD_BUFFER_BYTES = 16 << 20 };

struct sqz_card {
    struct sqz_backend base;
    const struct sqz_gpu_calls *calls;
    struct sqz_backend *cpu;
    const struct sqz_model_layer *model_layers; /* or NULL */
    struct sqz_card_ranks *ranks;               /* of the first of several that share rows; else NULL */
    int card, n_threads;
    void *stream; /* of what belongs to no pass */
    struct sqz_card_buffer uploads[SQZ_CARD_BUFFERS];
    size_t n_flushed;
    enum sqz_together together; /* CHEAPEST, or the way that was asked for */
    size_t limit, used;
    uint64_t clock, generation;
    struct sqz_bound *contexts;
    size_t n_uploads, n_evictions, n_joined;

    /* The pass in flight. */
    struct sqz_card_group groups[SQZ_CARD_MOST_GROUPS];
    size_t n_groups, n_tokens, n_places;
    struct sqz_card_frame *frame_layers; /* [n_frame_layers] */
    uint32_t n_frame_layers;
    uint32_t last_layer; /* computed here: behind it, what was read goes to the host with what else the pass gives */
    char *frame, *frame_host; /* on the card; pinned */
    size_t frame_bytes, frame_room, frame_host_room;
    char *counts_host; /* what was read, which is the frame's end: zeros when it goes; pinned, when it comes back */
    size_t counts_at, counts_bytes, counts_host_room;

    struct sqz_card_side sides[SQZ_CARD_SIDES];
    void *come; /* the event that sides wait for at a node */

    /* Scratch on the card: of a pass of this key, whose groups are joined so. */
    uint64_t scratch_key;
    size_t joined[SQZ_CARD_MOST_GROUPS];
    char *queries, *out; /* F16 [T][H][D] */
    size_t queries_room, out_room;
    char *workspace;
    size_t workspace_room, workspace_each; /* of each stream that a pass has */

    /* Copies of a node's tokens for the CPU. */
    char *staging; /* pinned */
    size_t staging_room;
    struct sqz_attention_node staged;

    struct sqz_card_rows *reading;      /* [n_reading] */
    struct sqz_card_built *built;       /* [n_reading], when the first is */
    struct sqz_card_fetched fetched[2]; /* rows; whoever fetches them touches these alone */
    struct sqz_card_fetched index;
    uint32_t n_reading;
    char read_fallback[SQZ_CARD_FALLBACK_CHARS];
};

static inline struct sqz_card *sqz_card_of(struct sqz_backend *backend)
{
    return (struct sqz_card *)backend;
}

/* Whether a layer lies on this card. */
static inline bool sqz_card_has(const struct sqz_card *cuda, uint32_t layer)
{
    return !cuda->model_layers || cuda->model_layers[layer].card == cuda->card;
}

/* Whether it is computed here, too: it has a kernel, and rows: of a window in shards the first card has all. */
static inline bool sqz_card_computes(const struct sqz_bound *bound, uint32_t layer)
{
    return sqz_card_has(bound->cuda, layer) && !bound->layers[layer].on_cpu &&
           sqz_context_layer(bound->context, layer)->n_rows;
}

enum { SQZ_CARD_ALIGN = 256 };
static inline size_t sqz_card_aligned(size_t bytes)
{
    return (bytes + SQZ_CARD_ALIGN - 1) / SQZ_CARD_ALIGN * SQZ_CARD_ALIGN;
}

/* Numbers that a row of head_dim has on the card, the last ones zeros: kernels are made for these. Zeros add nothing to a
 * product, and what they become in an output is not given back. */
static inline uint32_t sqz_card_dim(uint32_t head_dim)
{
    return head_dim <= 64 ? 64 : head_dim <= 96 ? 96 : head_dim <= 128 ? 128 : head_dim <= 256 ? 256 : head_dim;
}
static inline struct sqz_layer_shape sqz_card_shape(const struct sqz_layer_shape *shape)
{
    return (struct sqz_layer_shape){shape->n_head, shape->n_head_kv, sqz_card_dim(shape->head_dim), shape->scale};
}

/* ---- card_contexts.c: what backend.h says of each, and memory on the card ---- */

void *sqz_card_take(struct sqz_card *cuda, size_t bytes);
void sqz_card_give(struct sqz_card *cuda, void *memory, size_t bytes);
enum sqz_status sqz_card_no_memory(const struct sqz_card *cuda, size_t bytes, const char *what,
                                   struct sqz_error *error);
bool sqz_card_grow_pinned(struct sqz_card *cuda, void **memory, size_t *room, size_t bytes);
bool sqz_card_grow(struct sqz_card *cuda, char **memory, size_t *room, size_t bytes);
enum sqz_status sqz_card_make_resident(struct sqz_bound *b, struct sqz_error *error);
enum sqz_status sqz_card_bind(struct sqz_backend *backend, const struct sqz_context *context, struct sqz_bound **bound,
                              struct sqz_error *error);
void sqz_card_unbind(struct sqz_bound *b);
const char *sqz_card_fallback(const struct sqz_bound *b);

/* ---- card_own.c ---- */

void sqz_card_free_own(struct sqz_own_rows *own);
enum sqz_status sqz_card_create_own(struct sqz_backend *backend, struct sqz_bound *bound, size_t capacity,
                                    struct sqz_own_rows **out, struct sqz_error *error);
/* Room for n_more rows behind the first n, and all rows in planes that are to be there before they come. n_kept: rows
 * from there on may be put again after any number. */
enum sqz_status sqz_card_ready_own(struct sqz_card *cuda, struct sqz_own_rows *own, size_t n, size_t n_more,
                                   size_t n_kept, void *stream, struct sqz_error *error);
/* Bytes of memory that they have, on the card and of layers that the CPU computes. */
size_t sqz_card_own_bytes(const struct sqz_own_rows *own);
/* Whether a layer's own rows are in planes, but for the newest. */
bool sqz_card_own_in_planes(const struct sqz_bound *bound, uint32_t layer);
/* Rows that own row number `row` reads in planes, of such a layer. */
static inline size_t sqz_card_own_flushed(size_t row)
{
    return row < SQZ_CUDA_USER_BLOCK ? 0 : (row / SQZ_CUDA_USER_BLOCK - 1) * SQZ_CUDA_USER_BLOCK;
}

/* ---- card_upload.c ---- */

/* An array as it is to be on the card: rows of host_bytes, each with zeros behind it up to card_bytes. */
struct sqz_card_array {
    const void *host;
    size_t n_rows, host_bytes, card_bytes;
    float factor; /* of F32 numbers, where they are not as they were; else 0 */

    /* Rows that become F16 on the way, in place of `host`: head_rows of each head. NULL: as they are. */
    const struct sqz_rows *rows;
    size_t head_rows, head_dim;
};
static inline size_t sqz_card_array_bytes(const struct sqz_card_array *array)
{
    return array->n_rows * array->card_bytes;
}

/* Copies host memory to the card, the host's is free when the call returns; arrays of one allocation in the order of
 * their places. Behind the last array of each, send; the card has all of them after finish. False: CUDA refused. */
bool sqz_card_upload(struct sqz_card *cuda, void *device, const struct sqz_card_array *array);
void sqz_card_fill(char *to, const char *from, size_t bytes, int n_threads); /* memcpy() by all threads */
bool sqz_card_ready_buffer(struct sqz_card *cuda, struct sqz_card_buffer *b);
bool sqz_card_send(struct sqz_card *cuda);
bool sqz_card_finish_uploads(struct sqz_card *cuda);
void sqz_card_free_uploads(struct sqz_card *cuda);

/* ---- card_download.c ---- */

/* Copies from the card to host memory, by the buffers of uploads, which are all sent. Whatever was launched on the card
 * for what is copied is done. False: CUDA refused. */
bool sqz_card_download(struct sqz_card *cuda, void *host, const void *device, size_t bytes);

/* ---- card_building.c ---- */

extern const struct sqz_backend_builder sqz_card_builder;
void sqz_card_end_building(struct sqz_card *cuda);
enum sqz_status sqz_card_building_failed(const struct sqz_card *cuda, const char *what, struct sqz_error *error);
/* The rows of a layer that was read here, n_rows a head; NULL: there are none, or they cannot be built here. */
const struct sqz_card_rows *sqz_card_rows_to_build(const struct sqz_card *cuda, uint32_t index, size_t n_rows,
                                                   const struct sqz_layer *layer);
/* Clusters, sorts and codes what is in `rows`, as build() of the builder; what is built is given back by _forget_built(). */
enum sqz_status sqz_card_build_rows(struct sqz_card *cuda, struct sqz_card_built *b, const struct sqz_card_rows *rows,
                                    uint32_t index, const struct sqz_layer *layer,
                                    const struct sqz_squeeze_options *options, bool *built, struct sqz_error *error);
void sqz_card_forget_built(struct sqz_card *cuda, struct sqz_card_built *b);

/* ---- card_shards.c ---- */

/* build_shard() of the place. */
enum sqz_status sqz_card_build_shard(struct sqz_backend *backend, uint32_t index, const struct sqz_deal *deal,
                                     uint32_t shard, const struct sqz_layer *layer,
                                     const struct sqz_squeeze_options *options, bool *built, struct sqz_error *error);

/* ---- card_pass.c ---- */

/* Of a token's queries on the card, and of its outputs. */
size_t sqz_card_query_bytes(const struct sqz_layer_shape *shape);
/* Streams that the calls of the pass are launched on: the pass's own and sides. */
size_t sqz_card_streams(const struct sqz_card *cuda);
/* The frame's layout for n_tokens tokens of layers of this shape. False: no memory. */
bool sqz_card_lay_out_frame(struct sqz_card *cuda, const struct sqz_bound *bound, size_t n_tokens);
/* A part's share of it. `bound` is what it is bound to here; own: NULL on a card that has no own rows. */
void sqz_card_fill_frame(struct sqz_card *cuda, const struct sqz_bound *bound, const struct sqz_own_rows *own,
                         const struct sqz_backend_part *p);
/* To the card; what was counted so far stays unless `first`. */
bool sqz_card_put_frame(struct sqz_card *cuda, bool first, void *stream);
/* Scratch for the pass, and how its groups are joined: as it was, where it is a pass like the one before. */
bool sqz_card_ready_scratch(struct sqz_card *cuda, const struct sqz_bound *bound);
/* What the launches of the pass depend on; 0 where they cannot be the same twice. */
uint64_t sqz_card_key(const struct sqz_card *cuda);
uint64_t sqz_card_mixed(uint64_t key, uint64_t x);
/* A call of group number i at a layer, and n of the node's tokens as llama.cpp has them. */
struct sqz_cuda_attend_args sqz_card_args(const struct sqz_card *cuda, size_t i, uint32_t layer);
struct sqz_gpu_node sqz_card_tokens(const struct sqz_card *cuda, const struct sqz_attention_node *node,
                                    const struct sqz_layer_shape *shape, size_t first, size_t n);
/* What the pass has read comes with what else it gives: nobody waits for it. */
bool sqz_card_bring_counts(const struct sqz_card *cuda, void *stream);

/* ---- card_ranks.c: contexts in shards, each on a card ---- */

/* As sqz_card_bind() and sqz_card_unbind(), of any context. */
enum sqz_status sqz_card_bind_any(struct sqz_backend *backend, const struct sqz_context *context,
                                  struct sqz_bound **bound, struct sqz_error *error);
void sqz_card_unbind_any(struct sqz_bound *bound);
/* Lets the first of n cards share rows with the others, which become its own. Errors: MEMORY, UNSUPPORTED. */
enum sqz_status sqz_card_share(struct sqz_card *first, struct sqz_backend *const *others, uint32_t n,
                               struct sqz_error *error);
void sqz_card_end_sharing(struct sqz_card *first); /* the others are freed by the caller, after it */
/* The other cards begin the pass whose groups are known, of these parts; `stream` follows them. Of an error parts have
 * nothing yet. */
enum sqz_status sqz_card_begin_others(struct sqz_card *first, struct sqz_backend_part *const *parts, size_t n_parts,
                                      bool first_of_pass, void *stream, struct sqz_error *error);
/* The streams that their part of the pass is on, where it is captured apart from the first card's. */
void sqz_card_tell_beside(struct sqz_card *first, struct sqz_gpu_beside *beside);
/* Group number i, whose context lies on several cards, from the node to the node. */
enum sqz_status sqz_card_attend_shards(struct sqz_card *first, const struct sqz_backend_call *call, size_t i);
/* Behind the pass's last layer: `stream` follows the other cards, whose counts come. False: CUDA refused. */
bool sqz_card_join_others(struct sqz_card *first, void *stream);
/* Behind the pass, of which the first card's part is done: until the others' is, and what they have read is here. */
void sqz_card_wait_for_others(struct sqz_card *first);
/* The same, which ends the pass. False: a card has waited for another in vain. */
bool sqz_card_others_answered(struct sqz_card *first);

/* ---- card_ways.c ---- */

enum { SQZ_CARD_EACH_MOST = 64 }; /* tokens with a selection each: sequences of one call */

/* Whether a part's tokens share a selection, or are more than one call has. */
static inline bool sqz_card_is_long(const struct sqz_backend_part *p)
{
    return p->n_tokens > p->own->bound->each_most;
}

/* Sets the groups of the pass: which of its tokens go through a context together, and how. */
void sqz_card_group_parts(struct sqz_card *cuda, struct sqz_backend_part *const *parts, size_t n_parts);
/* Groups that were read, of the first token of a layer; the others' and heads' follow, [T][K]. */
static inline const uint32_t *sqz_card_retained(const struct sqz_card *cuda, uint32_t layer)
{
    return (const uint32_t *)(cuda->counts_host + cuda->frame_layers[layer].retained);
}
/* The same of what was read beside rows. */
static inline const struct sqz_cuda_read *sqz_card_read_beside(const struct sqz_card *cuda, uint32_t layer)
{
    return (const struct sqz_cuda_read *)(cuda->counts_host + cuda->frame_layers[layer].read);
}
/* From what a pass has read, when that has come to the host. */
void sqz_card_learn(struct sqz_card *cuda, const struct sqz_card_group *group);

/* ---- card_reading.c ---- */

bool sqz_card_stage(struct sqz_card *cuda, const struct sqz_attention_node *node, const struct sqz_layer_shape *shape,
                    void *stream);
bool sqz_card_put_staged(struct sqz_card *cuda, const struct sqz_attention_node *node,
                         const struct sqz_layer_shape *shape, void *stream);
struct sqz_gpu_node sqz_card_node(const struct sqz_attention_node *node, const struct sqz_layer_shape *shape);
void sqz_card_end_reading(struct sqz_backend *backend);
const char *sqz_card_reading_fallback(struct sqz_backend *backend);
enum sqz_status sqz_card_plan_reading(struct sqz_backend *backend, const struct sqz_layer_shape *shape,
                                      struct sqz_error *error);
bool sqz_card_fetch_queries(struct sqz_backend *backend, const struct sqz_attention_node *node,
                            const struct sqz_layer_shape *shape, void *stream, struct sqz_attention_node *host);
enum sqz_status sqz_card_read(struct sqz_backend *backend, const struct sqz_backend_reading *r,
                              struct sqz_error *error);
enum sqz_status sqz_card_bring_rows(struct sqz_backend *backend, uint32_t layer, uint16_t *keys, uint16_t *values,
                                    struct sqz_error *error);

#endif
