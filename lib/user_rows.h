/*
 * A sequence's own rows behind a context: keys and values of its question and
 * answer, of one layer. Where the layer's rows are in planes its own are, too:
 *
 *   a token that is row p of them reads rows [0, F(p)) in planes, and as F16
 *   its own block of 128 rows and the one before: F(p) = 128 max(0, p / 128 - 1)
 *
 * So what a token reads follows from its place alone, whatever batch it came in
 * and whatever was drafted and forgotten before. A block that goes into planes
 * (flushed) has keys relative to their mean, one centroid a block, and values
 * relative to the layer's mean; all else is as in struct sqz_planes.
 *
 * F16 rows are in buffers of a block. Whoever wants to put rows makes them ready
 * first: blocks that no token to come reads as F16 are flushed, which needs only
 * rows of earlier batches. Two blocks are what a token reads; with the one before
 * them, whose buffer the next one takes, up to SQZ_USER_BLOCK rows can be put
 * again at any time, in which case nothing differs from never having put them: no
 * block that is flushed has one of these. A run that may fail names the row that
 * it would go back to (`n_kept`); the F16 blocks there stay as well.
 *
 * A layer that keeps only a window has F16 rows, and none that no token to come
 * can see. Without either, one buffer has all rows.
 */
#ifndef SQZ_LIB_USER_ROWS_H
#define SQZ_LIB_USER_ROWS_H

#include "arena.h"
#include "attention.h"
#include "rows.h"

enum { SQZ_USER_BLOCK = 128 };

/* F16 rows of block `number`, of all heads: [K][block_rows][D]. */
struct sqz_user_buffer {
    size_t number; /* SIZE_MAX: of none */
    uint16_t *keys, *values;
};

struct sqz_user_rows {
    uint32_t n_head_kv, head_dim;
    size_t block_rows; /* SQZ_USER_BLOCK, or as many as there may be */
    struct sqz_user_buffer *buffers;
    size_t n_buffers;
    size_t n_window_tokens;       /* 0, or a row sees no further back */
    struct sqz_rows keys, values; /* in planes, of n_plane_rows a head; type NONE: all rows are F16 */
    size_t n_plane_rows, n_flushed_blocks, n_put;
};

/* How the rows of a layer are kept. */
enum sqz_user_kind {
    SQZ_USER_WHOLE,  /* all as F16 */
    SQZ_USER_WINDOW, /* F16, those that the layer's window lets a token to come see */
    SQZ_USER_PLANES  /* as the layer's own */
};

/* Lays out room for so many rows; with a base, ready for the first. `layer` outlives them. */
void sqz_user_rows_carve(struct sqz_arena *arena, struct sqz_user_rows *rows, const struct sqz_layer *layer,
                         enum sqz_user_kind kind, size_t capacity_rows);

/* The rows of a call or of a joint token: `user`, or what its arrays are, laid out in `whole`, which stays where it is. */
struct sqz_user_whole {
    struct sqz_user_rows rows;
    struct sqz_user_buffer buffer;
};
const struct sqz_user_rows *sqz_user_rows_of_call(const struct sqz_attend_call *call, struct sqz_user_whole *whole);
const struct sqz_user_rows *sqz_user_rows_of_token(const struct sqz_attend_call *call,
                                                   const struct sqz_joint_token *token, struct sqz_user_whole *whole);

/* One head of them, to be read. buffers: room for as many, which the head's rows refer to. */
struct sqz_user_rows sqz_user_rows_of_head(const struct sqz_user_rows *rows, size_t head_kv,
                                           struct sqz_user_buffer *buffers);

/* Most rows that are put at once: SQZ_USER_BLOCK, or any number. */
size_t sqz_user_rows_most(const struct sqz_user_rows *rows);

/* Before n_more rows are put behind the first n_before: flushes, and sees to it that sqz_user_rows_block() has their
 * blocks. n_kept: rows from there on may be put again after any number. False: rows that those to come would read are
 * no more, nothing may be put. Allocates nothing. */
bool sqz_user_rows_ready(struct sqz_user_rows *rows, size_t n_before, size_t n_more, size_t n_kept, int n_threads);

/* The buffer with the block that a row is in, of those put or made ready; NULL: it is no more. */
struct sqz_user_buffer *sqz_user_rows_block(const struct sqz_user_rows *rows, size_t row);

/* Rows that the last of the first n_rows reads in planes. */
size_t sqz_user_rows_flushed(const struct sqz_user_rows *rows, size_t n_rows);

/* Bytes that the rows take: of blocks in planes, and of buffers that were ever used. */
size_t sqz_user_rows_bytes(const struct sqz_user_rows *rows);

/* ---- Reading -------------------------------------------------------------------------- */

/* Rows [begin, end) of one head: those of `keys` and `values` from number `at` on. */
struct sqz_user_part {
    struct sqz_rows keys, values;
    size_t at, begin, end;
};

/* From row `begin` on, up to row `past` or less: rows below n_flushed in planes, by their upper plane alone where `upper`, the
 * others as F16. */
struct sqz_user_part sqz_user_part(const struct sqz_user_rows *rows, size_t head_kv, size_t begin, size_t past,
                                   size_t n_flushed, bool upper);

#endif
