/*
 * What sqz_attend() is made of. A job is one KV head with one token (or one
 * block of tokens): its queries, its lookup, what it retains. There are two
 * ways to run one:
 *   attend_rows.c   few query rows: every key row is read once for all of them,
 *                   the retained rows are split into slots
 *                   (attend_map.c: where their weights went)
 *   attend_block.c  many query rows that share a selection: tiles of matrix
 *                   products
 *   attend_few.c    a few tokens that read everything: slices of the rows by
 *                   either
 * Both add rows by attend_add.c, and the sequence's own by attend_user.c.
 * attend_job.c has the buffers and what both ways need, attend_out.c what comes
 * out. attend.c hands the slots of one token's jobs to threads, attend_batch.c
 * whole jobs of many tokens.
 */
#ifndef SQZ_LIB_ATTEND_JOB_H
#define SQZ_LIB_ATTEND_JOB_H

#include <stdatomic.h>

#include "arena.h"
#include "attention.h"
#include "lookup.h"
#include "softmax.h"

enum {
    SQZ_CLAIM_ROWS = 256,  /* rows of one pass: 32 KiB of keys at head dim 64 */
    SQZ_MAX_SLOTS = 64,    /* parts in which a head's retained rows are summed, at most */
    SQZ_DENSE_ROWS = 192,  /* query rows of a dense block: logits, queries, outputs stay in a 512 KiB L2 cache */
    SQZ_LISTED_AHEAD = 64, /* rows listed behind those of a pass, for kernels to ask for */
    SQZ_LISTED_ROWS = 2 * SQZ_CLAIM_ROWS + SQZ_LISTED_AHEAD, /* of CLAIM + AHEAD - 1 and a piece more */
    SQZ_FEW_TOKENS = 16,     /* most that go through all rows together in attend_few.c */
    SQZ_EXPONENT_SLACK = 40, /* a logit this far above the estimated denominator rescales the state */
};

struct sqz_job {
    uint32_t head;
    size_t token;
    float *queries;                   /* [R][D] */
    float *norms, *base;              /* [R] */
    struct sqz_i16_queries quantised; /* [integer rows], of layers with INT8 keys or centroids */
    struct sqz_i16_queries turned;    /* [integer rows], of layers with keys in planes */
    size_t integer_rows;
    struct sqz_row_queries rows;  /* queries, quantised and turned */
    struct sqz_rows keys, values; /* of the head */
    struct sqz_rows retained;     /* what is read of retained keys: keys but where few query rows choose */
    float *reference;             /* [R] estimated log denominator */
    struct sqz_head_plan plan;
    struct sqz_selection selection;
    void *lookup;
    struct sqz_range *pieces; /* of the retained ranges, at most SQZ_CLAIM_ROWS rows each */
    size_t n_pieces, n_claimed_rows;
    uint32_t slot_first[SQZ_MAX_SLOTS + 1]; /* slot i: pieces [slot_first[i], slot_first[i + 1]) */
    size_t n_slots;
    atomic_size_t next_slot, n_slots_left;
    atomic_int ready;
    uint64_t centroid_rows_read, code_bytes_read, codes_read, value_centroid_bytes_read, key_rows_read, key_bytes_read;
};

/* What a thread works with. */
struct sqz_job_scratch {
    float *logits;   /* [G][logits_stride] */
    uint32_t *index; /* [LISTED_ROWS] rows of this pass and the next */
    struct sqz_tile_scratch tile;
    struct sqz_row_buffer gather_keys, gather_values; /* [TILE] */
    uint32_t *first, *last;
    struct sqz_softmax state; /* of the block in hand */
    struct sqz_softmax slot;  /* of a slot or a slice, [R] rows */
    uint64_t value_bytes_read;
};

/* ---- Buffers ---------------------------------------------------------------- */

/* Counts that the buffers follow from. */
struct sqz_job_sizes {
    size_t rows, lookup_bytes, group, n_jobs, logits_stride, max_clusters, max_pieces;
    size_t integer_rows; /* query rows that keys may be multiplied with in integers */
};
/* Tokens that go through the rows of a dense layer together: converting a tile is shared by all their queries. */
size_t sqz_job_dense_tokens(const struct sqz_layer_shape *shape);

struct sqz_job_sizes sqz_job_sizes(const struct sqz_layer *layer, size_t max_user_rows, size_t max_block_tokens,
                                   int n_threads);

void sqz_job_carve(struct sqz_arena *arena, struct sqz_job *job, const struct sqz_job_sizes *sizes, size_t head_dim);
void sqz_job_carve_scratch(struct sqz_arena *arena, struct sqz_job_scratch *s, const struct sqz_job_sizes *sizes,
                           const struct sqz_layer_shape *shape);
struct sqz_softmax sqz_job_carve_state(struct sqz_arena *arena, size_t rows, size_t head_dim);

/* ---- What both ways need --------------------------------------------------------- */

/* Rows of the context that a token sees begin here: at 0 but for layers that keep only a window. */
size_t sqz_job_first_row(const struct sqz_attend_call *c, size_t token);
/* The user's rows that a token sees. */
size_t sqz_job_first_user_row(const struct sqz_attend_call *c, size_t token);
size_t sqz_job_last_user_row(const struct sqz_attend_call *c, size_t token); /* one past the last */

/* Where a token's queries and outputs are. */
size_t sqz_job_place(const struct sqz_attend_call *c, size_t token);

/* Sets what does not depend on the way: the head's plan and rows; copies the queries of n_tokens tokens from job->token
 * on, with their squared norms; nothing has been read. */
void sqz_job_set(const struct sqz_attend_call *c, struct sqz_job *job, size_t n_tokens);

/* Counts n rows of keys, from row `first` on or of no less, as read. */
void sqz_job_count_keys(const struct sqz_attend_call *c, struct sqz_job *job, const struct sqz_rows *keys, size_t first,
                        size_t n);

/* Whether everything is read: a layer without clusters, or a budget of 1. */
bool sqz_job_is_dense(const struct sqz_attend_call *c, const struct sqz_head_plan *plan);

/* The weight below which a value row is not read; 0: all are. */
float sqz_job_value_skip(const struct sqz_layer *layer, const struct sqz_head_plan *plan);

/* What weights of query row r are taken relative to: the estimated log denominator. A wide cluster may be estimated far
 * too high; the reference then stays where the largest of the known rows and the tail neither underflows nor is
 * skipped. */
float sqz_job_reference(const struct sqz_layer *layer, const struct sqz_selection *s, size_t r, float known_maximum);

/* What lies elsewhere, seen by query row r of the job. */
float sqz_job_elsewhere(const struct sqz_attend_call *c, const struct sqz_job *job, size_t r);

/* Tells the owner of the layer's rows, which wants to know, which of them are retained. */
void sqz_job_announce(const struct sqz_layer *layer, const struct sqz_job *job);

/* ---- How rows are added: attend_add.c --------------------------------------------------- */

/* Turns logits [n_rows of state][stride] into weights and adds those to the sums. A column whose weights are all below
 * skip_below is left out altogether: its weights become zero. */
void sqz_add_weigh(struct sqz_softmax *state, float *logits, size_t stride, size_t n, float skip_below);

/* Adds rows whose logits are known, which are overwritten, with value rows from `first` on. Returns bytes of values read. */
size_t sqz_add_known(struct sqz_softmax *state, float *logits, size_t stride, size_t n, const struct sqz_rows *values,
                     size_t first, float skip_below);

/* All of rows [begin, end) as they are, F16 or in planes, for which the queries are set: as many as the state has rows. */
void sqz_add_few(struct sqz_softmax *state, const struct sqz_row_queries *queries, const struct sqz_rows *keys,
                 const struct sqz_rows *values, size_t begin, size_t end, struct sqz_job_scratch *t);

/* The same by tiles of matrix products, rows of any type. */
void sqz_add_tiles(struct sqz_softmax *state, const float *queries, float scale, const struct sqz_rows *keys,
                   const struct sqz_rows *values, size_t begin, size_t end, struct sqz_job_scratch *t);

/* Rows [begin, end), number `begin` of which is row `at` of keys and values; the token that query row r is of sees
 * [first, last) of them. group: query rows a token. */
void sqz_add_limited(struct sqz_softmax *state, const float *queries, float scale, const struct sqz_rows *keys,
                     const struct sqz_rows *values, size_t at, size_t begin, size_t end, const size_t *first,
                     const size_t *last, size_t group, struct sqz_job_scratch *t);

/* Adds the exponentials of the logits of rows [first, end) to log_total [queries]. */
void sqz_add_to_total(float *log_total, const struct sqz_row_queries *queries, const struct sqz_rows *keys,
                      size_t first, size_t end, size_t head_dim, struct sqz_job_scratch *t);

/* ---- A sequence's own rows: attend_user.c ------------------------------------------------- */

/* Those that one token sees, for few query rows, whose forms for the retained keys are set. */
void sqz_job_add_own_rows(const struct sqz_attend_call *c, const struct sqz_job *job, struct sqz_job_scratch *t,
                          struct sqz_softmax *state);
/* Their part of sqz_job_total(). */
void sqz_job_total_own_rows(const struct sqz_attend_call *c, const struct sqz_job *job, struct sqz_job_scratch *t,
                            float *log_total);
/* Of n_tokens tokens, of which each sees its own part; integer forms of the job's queries are not set then. */
void sqz_job_add_user_rows(const struct sqz_attend_call *c, const struct sqz_job *job, size_t n_tokens,
                           struct sqz_job_scratch *t, struct sqz_softmax *state);
/* Of joint tokens each sees its own sequence's rows. */
void sqz_job_add_joint_rows(const struct sqz_attend_call *c, const struct sqz_job *job, size_t n_tokens,
                            struct sqz_job_scratch *t, const struct sqz_softmax *state);

/* ---- Few query rows: attend_rows.c -------------------------------------------------- */

/* Lookup of one token in one head and everything but the retained rows: fixed rows, user rows, tail. */
void sqz_job_begin(const struct sqz_attend_call *c, struct sqz_job *job, struct sqz_job_scratch *t,
                   struct sqz_softmax *state);

/* The sum of one slot of retained rows, from nothing. */
void sqz_job_slot(const struct sqz_attend_call *c, const struct sqz_job *job, size_t slot, struct sqz_job_scratch *t,
                  struct sqz_softmax *state);

/* Skipping values may leave a query row with nothing, when no row weighs as much as the threshold: such a row gets
 * exact attention over the fixed rows. */
void sqz_job_fill_empty(const struct sqz_attend_call *c, const struct sqz_job *job, struct sqz_job_scratch *t,
                        struct sqz_softmax *state);

/* Adds the weights of context rows to the call's map, when it is the head's turn. state: all of the head's attention. */
void sqz_job_note_weights(const struct sqz_attend_call *c, const struct sqz_job *job, struct sqz_job_scratch *t,
                          const struct sqz_softmax *state);

/* What sqz_attend_totals() gives for one token in one head, [G]. */
void sqz_job_total(const struct sqz_attend_call *c, struct sqz_job *job, struct sqz_job_scratch *t, float *log_total);

/* ---- Many query rows: attend_block.c -------------------------------------------------- */

/* All of a block of n_tokens tokens in one head. */
void sqz_job_block(const struct sqz_attend_call *c, struct sqz_job *job, size_t n_tokens, struct sqz_job_scratch *t,
                   struct sqz_softmax *state);

/* ---- A few tokens, to everything: attend_few.c ---------------------------------------- */

/* Slices that a head's rows are cut into for all tokens of the call; 0: it is none of these. */
size_t sqz_few_slices(const struct sqz_attend_call *c);
/* All tokens of the call in one head. */
void sqz_job_few(const struct sqz_attend_call *c, struct sqz_job *job, size_t n_slices, struct sqz_job_scratch *t,
                 struct sqz_softmax *state);
/* All of the call; as many bytes of workspace, for any. */
void sqz_attend_few(const struct sqz_attend_call *c, size_t n_slices);
size_t sqz_few_bytes(const struct sqz_layer *layer, size_t max_user_rows, size_t max_block_tokens, int n_threads);

/* ---- What comes out: attend_out.c ------------------------------------------------------- */

/* What jobs have read. */
struct sqz_attend_totals {
    uint64_t selections, centroid_rows, key_rows, codes;
    uint64_t value_centroid_bytes, code_bytes, key_bytes, value_bytes; /* key_bytes: of key_rows */
};

/* Writes the outputs, and where asked for the LSE, of n_tokens tokens from job->token on. */
void sqz_job_write(const struct sqz_attend_call *c, const struct sqz_job *job, size_t n_tokens,
                   const struct sqz_softmax *state);
/* Counts the retained rows of slots. */
void sqz_job_count_claimed(const struct sqz_attend_call *c, struct sqz_job *job);
/* Adds what the job has read but for values, which its thread counts. */
void sqz_job_count(const struct sqz_job *job, struct sqz_attend_totals *totals);
void sqz_attend_totals_add(struct sqz_attend_totals *sum, const struct sqz_attend_totals *more);
/* Adds totals of the call to its stats; of one of joint tokens to theirs, each of which has read everything. */
void sqz_attend_add_stats(const struct sqz_attend_call *c, const struct sqz_attend_totals *totals);

#endif
