/* A sequence's own rows of one layer; user_rows.h says what each call does. */
#include "user_rows.h"

#include <string.h>

#include "kernels.h"
#include "threads.h"

enum { BLOCK = SQZ_USER_BLOCK, MAX_NUMBERS = 256 };

/* ---- Layout --------------------------------------------------------------------------- */

/* Most blocks that so many rows in a row are in. */
static size_t blocks_of(size_t n_rows)
{
    return (n_rows + BLOCK - 2) / BLOCK + 1;
}

/* The first row that row number `row` reads as F16. */
static size_t oldest_f16(const struct sqz_user_rows *u, size_t row)
{
    if (u->n_window_tokens) return row + 1 > u->n_window_tokens ? row + 1 - u->n_window_tokens : 0;
    return sqz_user_rows_flushed(u, row + 1);
}

/* Buffers for what a batch of a block of rows reads and writes as F16, and for what a run would go back to. */
static size_t buffers_for(const struct sqz_user_rows *u, size_t capacity_rows)
{
    const size_t before = u->n_window_tokens ? u->n_window_tokens - 1 : 0, all = (capacity_rows + BLOCK - 1) / BLOCK;
    const size_t n = u->n_window_tokens ? blocks_of(before + BLOCK) + blocks_of(before) : 3 + 2;
    return n < all ? n : all;
}

/* Planes of n rows a head. */
static struct sqz_rows carve_planes(struct sqz_arena *arena, enum sqz_row_type type, size_t n_heads, size_t n, size_t d)
{
    struct sqz_rows rows = {.type = type};
    rows.data = sqz_arena_take(arena, n_heads * n, sqz_plane_bytes(d), 1);
    if (type == SQZ_ROW_I44) rows.planes.lower = sqz_arena_take(arena, n_heads * n, sqz_plane_bytes(d), 1);
    rows.planes.step = sqz_arena_take(arena, n_heads * n, 1, sizeof(uint16_t));
    return rows;
}

/* What keys are relative to: one centroid a block. */
static void carve_centres(struct sqz_arena *arena, struct sqz_centres *c, size_t n_heads, size_t n_blocks, size_t d)
{
    uint32_t *offset;
    c->type = SQZ_ROW_F16;
    c->n = (uint32_t)n_blocks;
    c->data = sqz_arena_take(arena, n_heads * n_blocks, d, sizeof(uint16_t));
    c->offset = offset = sqz_arena_take(arena, n_heads, n_blocks + 1, sizeof *offset);
    for (size_t i = 0; offset && i < n_heads * (n_blocks + 1); i++) offset[i] = (uint32_t)(i % (n_blocks + 1) * BLOCK);
}

void sqz_user_rows_carve(struct sqz_arena *arena, struct sqz_user_rows *u, const struct sqz_layer *layer,
                         enum sqz_user_kind kind, size_t capacity_rows)
{
    const size_t k = layer->shape.n_head_kv, d = layer->shape.head_dim;
    *u = (struct sqz_user_rows){.n_head_kv = (uint32_t)k, .head_dim = (uint32_t)d, .block_rows = capacity_rows};
    u->n_buffers = 1;
    if (kind != SQZ_USER_WHOLE && capacity_rows > BLOCK) {
        u->block_rows = BLOCK;
        u->n_window_tokens = kind == SQZ_USER_WINDOW ? layer->n_window_tokens : 0;
        u->n_buffers = buffers_for(u, capacity_rows);
    }
    if (kind == SQZ_USER_PLANES && capacity_rows > 2 * BLOCK) {
        u->n_plane_rows = ((capacity_rows - 1) / BLOCK - 1) * BLOCK;
        u->keys = carve_planes(arena, layer->keys.type, k, u->n_plane_rows, d);
        u->values = carve_planes(arena, layer->keys.type, k, u->n_plane_rows, d);
        u->values.mean = layer->values.mean;
        carve_centres(arena, &u->keys.planes.centres, k, u->n_plane_rows / BLOCK, d);
    }
    u->buffers = sqz_arena_take(arena, u->n_buffers, 1, sizeof *u->buffers);
    for (size_t i = 0; i < u->n_buffers; i++) {
        uint16_t *keys = sqz_arena_take(arena, k * u->block_rows, d, sizeof *keys);
        uint16_t *values = sqz_arena_take(arena, k * u->block_rows, d, sizeof *values);
        if (arena->base) u->buffers[i] = (struct sqz_user_buffer){SIZE_MAX, keys, values};
    }
}

/* All rows as F16 in arrays of the caller, [K][capacity_rows][D]. */
static const struct sqz_user_rows *lay_out(struct sqz_user_whole *whole, const struct sqz_layer_shape *shape,
                                           const uint16_t *keys, const uint16_t *values, size_t capacity_rows)
{
    whole->buffer = (struct sqz_user_buffer){0, (uint16_t *)(uintptr_t)keys, (uint16_t *)(uintptr_t)values};
    whole->rows = (struct sqz_user_rows){.n_head_kv = shape->n_head_kv,
                                         .head_dim = shape->head_dim,
                                         .block_rows = capacity_rows,
                                         .buffers = &whole->buffer,
                                         .n_buffers = 1};
    return &whole->rows;
}

const struct sqz_user_rows *sqz_user_rows_of_call(const struct sqz_attend_call *c, struct sqz_user_whole *whole)
{
    return c->user ? c->user : lay_out(whole, &c->layer->shape, c->user_keys, c->user_values, c->user_capacity_rows);
}

const struct sqz_user_rows *sqz_user_rows_of_token(const struct sqz_attend_call *c, const struct sqz_joint_token *token,
                                                   struct sqz_user_whole *whole)
{
    return token->user ? token->user
                       : lay_out(whole, &c->layer->shape, token->keys, token->values, token->capacity_rows);
}

struct sqz_user_rows sqz_user_rows_of_head(const struct sqz_user_rows *u, size_t head, struct sqz_user_buffer *buffers)
{
    const size_t d = u->head_dim, at = head * u->block_rows * d;
    struct sqz_user_rows one = *u;
    one.n_head_kv = 1;
    one.keys = sqz_rows_of_head(&u->keys, u->n_plane_rows, d, head);
    one.values = sqz_rows_of_head(&u->values, u->n_plane_rows, d, head);
    one.buffers = buffers;
    for (size_t i = 0; i < u->n_buffers; i++)
        buffers[i] = (struct sqz_user_buffer){u->buffers[i].number, u->buffers[i].keys + at, u->buffers[i].values + at};
    return one;
}

size_t sqz_user_rows_most(const struct sqz_user_rows *u)
{
    return u->n_buffers == 1 ? SIZE_MAX : BLOCK;
}

size_t sqz_user_rows_bytes(const struct sqz_user_rows *u)
{
    const size_t k = u->n_head_kv, d = u->head_dim, row = 2 * d * sizeof(uint16_t);
    const size_t block = 2 * BLOCK * sqz_row_bytes(u->keys.type, d) + d * sizeof(uint16_t);
    size_t n_used = 0;
    if (sqz_user_rows_most(u) > BLOCK) return k * u->n_put * row;
    for (size_t i = 0; i < u->n_buffers; i++) n_used += u->buffers[i].number != SIZE_MAX;
    return k * (n_used * BLOCK * row + u->n_flushed_blocks * block);
}

/* ---- Flushing --------------------------------------------------------------------------- */

/* Mean of a block's keys as F16, in the place of its centroid. */
static void make_centroid(const struct sqz_rows *keys, size_t block, const uint16_t *rows, size_t d)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    float sum[MAX_NUMBERS] = {0}, row[MAX_NUMBERS];
    for (size_t r = 0; r < BLOCK; r++) {
        k->f16_to_f32(row, rows + r * d, d);
        for (size_t i = 0; i < d; i++) sum[i] += row[i];
    }
    for (size_t i = 0; i < d; i++) sum[i] *= 1.0f / BLOCK;
    k->f32_to_f16((uint16_t *)(uintptr_t)keys->planes.centres.data + block * d, sum, d);
}

/* A block of one head's keys or values, which are F16. */
static void flush_rows(const struct sqz_rows *rows, size_t block, const uint16_t *from, size_t d)
{
    float row[MAX_NUMBERS];
    if (rows->planes.centres.type) make_centroid(rows, block, from, d);
    for (size_t r = 0; r < BLOCK; r++) {
        sqz_kernels_get()->f16_to_f32(row, from + r * d, d);
        sqz_rows_store(rows, block * BLOCK + r, row, d);
    }
}

static void flush_block(const struct sqz_user_rows *u, const struct sqz_user_buffer *from, int n_threads)
{
    const size_t k = u->n_head_kv, d = u->head_dim;
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
    for (size_t i = 0; i < 2 * k; i++) {
        const size_t head = i / 2, at = head * BLOCK * d;
        const struct sqz_rows rows = sqz_rows_of_head(i % 2 ? &u->values : &u->keys, u->n_plane_rows, d, head);
        flush_rows(&rows, from->number, (i % 2 ? from->values : from->keys) + at, d);
    }
}

/* ---- Putting rows ------------------------------------------------------------------------- */

struct sqz_user_buffer *sqz_user_rows_block(const struct sqz_user_rows *u, size_t row)
{
    const size_t number = row / u->block_rows;
    for (size_t i = 0; i < u->n_buffers; i++)
        if (u->buffers[i].number == number) return &u->buffers[i];
    return NULL;
}

/* Blocks [first, end) that are to stay. */
struct span {
    size_t first, end;
};

static bool is_in(struct span span, size_t block)
{
    return block >= span.first && block < span.end;
}

/* F16 blocks that rows from `row` on read, up to row `end`. */
static struct span f16_blocks(const struct sqz_user_rows *u, size_t row, size_t end)
{
    return (struct span){oldest_f16(u, row) / BLOCK, (end + BLOCK - 1) / BLOCK};
}

/* A buffer for a block that has none. One that was used before, if there is: its memory is there. */
static struct sqz_user_buffer *choose_buffer(const struct sqz_user_rows *u, struct span needed, struct span kept)
{
    struct sqz_user_buffer *fresh = NULL;
    for (size_t i = u->n_buffers; i-- > 0;) {
        struct sqz_user_buffer *b = &u->buffers[i];
        if (b->number == SIZE_MAX) fresh = b;
        else if (!is_in(needed, b->number) && !is_in(kept, b->number)) return b;
    }
    return fresh;
}

bool sqz_user_rows_ready(struct sqz_user_rows *u, size_t n_before, size_t n_more, size_t n_kept, int n_threads)
{
    const size_t end = n_before + n_more;
    if (n_before > u->n_put || n_more == 0) return false;
    if (sqz_user_rows_most(u) > BLOCK) {
        u->buffers->number = 0;
        u->n_put = end;
        return true;
    }
    if (n_more > BLOCK) return false;
    const size_t back = end > BLOCK ? end - BLOCK : 0; /* where rows may be put again */
    const struct span needed = f16_blocks(u, back, end), kept = f16_blocks(u, n_kept, n_kept);
    const size_t last = (end - 1) / BLOCK, n_whole = n_before / BLOCK;
    for (size_t row = oldest_f16(u, n_before) / BLOCK * BLOCK; row < n_before; row += BLOCK)
        if (!sqz_user_rows_block(u, row)) return false;
    if (u->n_flushed_blocks > n_whole) u->n_flushed_blocks = n_whole;
    for (; u->keys.type && u->n_flushed_blocks + 2 <= last; u->n_flushed_blocks++) {
        const struct sqz_user_buffer *from = sqz_user_rows_block(u, u->n_flushed_blocks * BLOCK);
        if (!from) return false;
        flush_block(u, from, n_threads);
    }
    for (size_t b = n_whole; b <= last; b++) {
        if (sqz_user_rows_block(u, b * BLOCK)) continue;
        struct sqz_user_buffer *buffer = choose_buffer(u, needed, kept);
        if (!buffer) return false;
        buffer->number = b;
    }
    u->n_put = end;
    return true;
}

/* ---- Reading -------------------------------------------------------------------------------- */

size_t sqz_user_rows_flushed(const struct sqz_user_rows *u, size_t n_rows)
{
    const size_t block = n_rows ? (n_rows - 1) / BLOCK : 0;
    return u->keys.type && block ? (block - 1) * BLOCK : 0;
}

struct sqz_user_part sqz_user_part(const struct sqz_user_rows *u, size_t head, size_t begin, size_t past,
                                   size_t n_flushed, bool upper)
{
    const size_t d = u->head_dim;
    struct sqz_user_part part = {.begin = begin, .end = past};
    if (begin < n_flushed) {
        part.keys = sqz_rows_of_head(&u->keys, u->n_plane_rows, d, head);
        part.values = sqz_rows_of_head(&u->values, u->n_plane_rows, d, head);
        if (upper) {
            part.keys = sqz_rows_upper(&part.keys);
            part.values = sqz_rows_upper(&part.values);
        }
        part.at = begin;
        if (part.end > n_flushed) part.end = n_flushed;
        return part;
    }
    const struct sqz_user_buffer *buffer = sqz_user_rows_block(u, begin);
    const size_t first = begin / u->block_rows * u->block_rows, from = head * u->block_rows * d;
    part.keys = sqz_f16_rows(buffer->keys + from);
    part.values = sqz_f16_rows(buffer->values + from);
    part.at = begin - first;
    if (part.end > first + u->block_rows) part.end = first + u->block_rows;
    return part;
}
