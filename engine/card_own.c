/*
 * A sequence's own rows in a card's memory; card.h.
 *
 * Of a layer whose context rows are in planes there, own rows are, too, by the rules of lib/user_rows.h: token number p reads
 * rows before F(p) in planes, its own block of 128 rows and the one before as F16. F16 rows lie in a window over the newest ones,
 * which moves on by whole blocks when it is full; what tokens are told (struct sqz_cuda_user) begins within it, so that
 * kernels find F16 rows as if there were no others. Blocks are put into planes before a pass, from rows of passes before: launches
 * that are part of no captured graph, once in 128 tokens. Only a pass of more than a block of one sequence has blocks
 * that are put there within it, by the call that reads them.
 *
 * Rows that were put can be put again: what is in planes from there on counts as not there, and is made anew when its turn comes.
 * That needs its F16 rows, of which the window keeps three blocks at least. A run that is longer names the row that it
 * would go back to: what is read as F16 there is put aside when the window leaves it.
 *
 * Layers of other kinds have all rows as F16.
 */
#include "card.h"

#include <stdlib.h>

#include "error.h"

enum {
    FIRST_ROOM = 256, /* rows that there is room for at first; */
    ROOM_STEP = 1024, /* what room grows by at least */
    BLOCK = SQZ_CUDA_USER_BLOCK,
    KEPT_BLOCKS = 3 /* that stay when the window moves, the newest one among them */
};

bool sqz_card_own_in_planes(const struct sqz_bound *bound, uint32_t l)
{
    return bound->layers[l].planes && sqz_card_computes(bound, l);
}

static bool any_in_planes(const struct sqz_bound *bound)
{
    bool any = false;
    for (uint32_t l = 0; l < bound->n_layer; l++) any |= sqz_card_own_in_planes(bound, l);
    return any;
}

/* ---- Where they are ---------------------------------------------------------------------------- */

void sqz_card_free_own(struct sqz_own_rows *own)
{
    if (!own) return;
    struct sqz_card *cuda = own->bound->cuda;
    cuda->calls->use(cuda->card);
    sqz_card_give(cuda, own->whole.memory, own->whole.bytes);
    sqz_card_give(cuda, own->recent.memory, own->recent.bytes);
    sqz_card_give(cuda, own->kept.memory, own->kept.bytes);
    sqz_card_give(cuda, own->plane_memory, own->plane_bytes);
    if (own->cpu) cuda->cpu->ops->free_own(own->cpu);
    free(own->keys);
    free(own->planes);
    free(own);
}

enum sqz_status sqz_card_create_own(struct sqz_backend *backend, struct sqz_bound *bound, size_t capacity,
                                    struct sqz_own_rows **out, struct sqz_error *error)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    struct sqz_own_rows *own = calloc(1, sizeof *own);
    *out = NULL;
    if (!own) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a sequence");
    own->bound = bound;
    own->keys = calloc(2 * (size_t)bound->n_layer, sizeof *own->keys);
    own->values = own->keys ? own->keys + bound->n_layer : NULL;
    own->planes = calloc(bound->n_layer, sizeof *own->planes);
    /* Address space alone, where every layer has a kernel. */
    const enum sqz_status status = own->keys && own->planes
                                       ? cuda->cpu->ops->create_own(cuda->cpu, bound->cpu, capacity, &own->cpu, error)
                                       : sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a sequence");
    if (status != SQZ_OK) {
        sqz_card_free_own(own);
        return status;
    }
    *out = own;
    return SQZ_OK;
}

/* Bytes of a layer's F16 keys or values, a row of all heads; 0: the layer is not of this kind, or not computed here. */
static size_t layer_row_bytes(const struct sqz_bound *bound, uint32_t l, bool in_planes)
{
    const struct sqz_layer_shape *s = &sqz_context_layer(bound->context, l)->shape;
    return sqz_card_computes(bound, l) && sqz_card_own_in_planes(bound, l) == in_planes
               ? (size_t)s->n_head_kv * sqz_card_dim(s->head_dim) * sizeof(uint16_t)
               : 0;
}

/* Where n rows are to be: an eighth more than they take, in whole steps, so that many long answers hold little that is
 * empty; each row is copied some eight times in its life, which costs less than a microsecond a token. */
static size_t room_for(size_t n)
{
    size_t room = FIRST_ROOM;
    while (room < n && room < ROOM_STEP) room *= 2;
    return n <= room ? room : (n + n / 8 + ROOM_STEP - 1) / ROOM_STEP * ROOM_STEP;
}

/* F16 rows of the layers of one kind in new memory for `room` rows, which begin with those from number `first` on, of which
 * n_kept stay. */
static enum sqz_status give_room(struct sqz_card *cuda, struct sqz_own_rows *own, struct sqz_card_f16_rows *rows,
                                 size_t room, size_t first, size_t n_kept, void *stream, struct sqz_error *error)
{
    const struct sqz_gpu_calls *calls = cuda->calls;
    const bool in_planes = rows == &own->recent;
    size_t row = 0;
    for (uint32_t l = 0; l < own->bound->n_layer; l++) row += 2 * layer_row_bytes(own->bound, l, in_planes);
    if (row == 0) {
        rows->room = room;
        return SQZ_OK;
    }
    char *memory = sqz_card_take(cuda, row * room), *at = memory;
    if (!memory) return sqz_card_no_memory(cuda, row * room, "a session's tokens", error);
    bool ok = true;
    for (uint32_t l = 0; l < own->bound->n_layer; l++) {
        const size_t heads = sqz_context_layer(own->bound->context, l)->shape.n_head_kv;
        const size_t each = layer_row_bytes(own->bound, l, in_planes) / heads; /* a row of a head */
        uint16_t **const arrays[2] = {&own->keys[l], &own->values[l]};
        for (size_t i = 0; i < 2 && each; i++, at += each * heads * room) {
            if (n_kept)
                ok &= calls->copy_runs(at, each * room, (char *)*arrays[i] + (first - rows->first) * each,
                                       each * rows->room, each * n_kept, heads, stream);
            *arrays[i] = (uint16_t *)at;
        }
    }
    ok &= calls->wait(stream);
    sqz_card_give(cuda, rows->memory, rows->bytes);
    *rows = (struct sqz_card_f16_rows){memory, room, row * room, first};
    if (ok) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_INTERNAL, "the card took no copy: %s", calls->complaint());
}

size_t sqz_card_own_bytes(const struct sqz_own_rows *own)
{
    const struct sqz_backend *cpu = own->bound->cuda->cpu;
    return own->whole.bytes + own->recent.bytes + own->kept.bytes + own->plane_bytes + cpu->ops->own_bytes(own->cpu);
}

/* ---- Rows in planes ----------------------------------------------------------------------------- */

/* Planes for so many rows; the blocks that are there stay. */
static enum sqz_status give_plane_room(struct sqz_card *cuda, struct sqz_own_rows *own, size_t room, void *stream,
                                       struct sqz_error *error)
{
    const struct sqz_gpu_calls *calls = cuda->calls;
    size_t bytes = 0;
    for (uint32_t l = 0; l < own->bound->n_layer; l++)
        if (sqz_card_own_in_planes(own->bound, l))
            bytes += sqz_card_aligned(calls->user_planes_bytes(&own->bound->layers[l].layer, (uint32_t)room));
    char *memory = sqz_card_take(cuda, bytes), *at = memory;
    if (!memory) return sqz_card_no_memory(cuda, bytes, "a session's tokens", error);
    bool ok = true;
    for (uint32_t l = 0; l < own->bound->n_layer; l++) {
        const struct sqz_layer *layer = &own->bound->layers[l].layer;
        if (!sqz_card_own_in_planes(own->bound, l)) continue;
        if (own->n_flushed)
            ok &= calls->move_user_planes(layer, at, (uint32_t)room, own->planes[l], (uint32_t)own->plane_room,
                                          (uint32_t)own->n_flushed, stream) == SQZ_OK;
        own->planes[l] = at;
        at += sqz_card_aligned(calls->user_planes_bytes(layer, (uint32_t)room));
    }
    ok &= calls->wait(stream);
    sqz_card_give(cuda, own->plane_memory, own->plane_bytes);
    own->plane_memory = memory;
    own->plane_bytes = bytes;
    own->plane_room = room;
    if (ok) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_INTERNAL, "the card took no copy: %s", calls->complaint());
}

/* Blocks up to number `end` into planes. */
static bool flush(struct sqz_card *cuda, struct sqz_own_rows *own, size_t end, void *stream)
{
    bool ok = true;
    for (uint32_t l = 0; l < own->bound->n_layer && own->n_flushed < end; l++) {
        const struct sqz_layer *layer = &own->bound->layers[l].layer;
        const size_t from = (own->n_flushed * BLOCK - own->recent.first) * layer->shape.head_dim;
        if (!sqz_card_own_in_planes(own->bound, l)) continue;
        const struct sqz_cuda_flush_args args = {.layer = layer,
                                                 .planes = own->planes[l],
                                                 .capacity_rows = (uint32_t)own->plane_room,
                                                 .first_block = (uint32_t)own->n_flushed,
                                                 .n_blocks = (uint32_t)(end - own->n_flushed),
                                                 .keys = own->keys[l] + from,
                                                 .values = own->values[l] + from,
                                                 .key_capacity_rows = (uint32_t)own->recent.room};
        ok &= cuda->calls->flush(&args, stream) == SQZ_OK;
    }
    if (ok && own->n_flushed < end) own->n_flushed = end;
    return ok;
}

/* The window begins with row number `first`, of n rows: in pieces that do not overlap where they come from. */
static bool move_window(struct sqz_card *cuda, struct sqz_own_rows *own, size_t first, size_t n, void *stream)
{
    const size_t by = first - own->recent.first;
    bool ok = true;
    for (uint32_t l = 0; l < own->bound->n_layer; l++) {
        const size_t heads = sqz_context_layer(own->bound->context, l)->shape.n_head_kv;
        const size_t each = layer_row_bytes(own->bound, l, true) / heads, stride = each * own->recent.room;
        char *const arrays[2] = {(char *)own->keys[l], (char *)own->values[l]};
        for (size_t i = 0; i < 2 && each; i++)
            for (size_t r = 0, some; r < n - first; r += some) {
                some = n - first - r < by ? n - first - r : by;
                ok &= cuda->calls->copy_runs(arrays[i] + r * each, stride, arrays[i] + (r + by) * each, stride,
                                             some * each, heads, stream);
            }
    }
    own->recent.first = first;
    return ok;
}

/* Rows from number kept.first up to n_kept, from the window to those that are kept, or back to the window, which then begins
 * with them. */
static bool copy_kept(struct sqz_card *cuda, struct sqz_own_rows *own, bool back, void *stream)
{
    struct sqz_card_f16_rows *const w = &own->recent, *const k = &own->kept;
    char *kept = k->memory;
    bool ok = true;
    if (back) w->first = k->first;
    for (uint32_t l = 0; l < own->bound->n_layer; l++) {
        const size_t heads = sqz_context_layer(own->bound->context, l)->shape.n_head_kv;
        const size_t each = layer_row_bytes(own->bound, l, true) / heads, bytes = (own->n_kept - k->first) * each;
        char *const arrays[2] = {(char *)own->keys[l], (char *)own->values[l]};
        for (size_t i = 0; i < 2 && each; i++, kept += each * heads * k->room) {
            char *at = arrays[i] + (k->first - w->first) * each;
            ok &= back ? cuda->calls->copy_runs(at, each * w->room, kept, each * k->room, bytes, heads, stream)
                       : cuda->calls->copy_runs(kept, each * k->room, at, each * w->room, bytes, heads, stream);
        }
    }
    return ok;
}

/* Puts aside what row number n_kept reads as F16, which the window has yet. */
static enum sqz_status keep_aside(struct sqz_card *cuda, struct sqz_own_rows *own, size_t n_kept, void *stream,
                                  struct sqz_error *error)
{
    struct sqz_card_f16_rows *k = &own->kept;
    if (!k->memory) {
        size_t row = 0;
        for (uint32_t l = 0; l < own->bound->n_layer; l++) row += 2 * layer_row_bytes(own->bound, l, true);
        k->room = 2 * BLOCK;
        k->memory = sqz_card_take(cuda, row * k->room);
        if (!k->memory) return sqz_card_no_memory(cuda, row * k->room, "a session's tokens", error);
        k->bytes = row * k->room;
    }
    k->first = sqz_card_own_flushed(n_kept);
    own->n_kept = n_kept;
    if (copy_kept(cuda, own, false, stream)) return SQZ_OK;
    own->n_kept = 0;
    return sqz_error_set(error, SQZ_ERROR_INTERNAL, "the card took no copy: %s", cuda->calls->complaint());
}

/* F16 rows for n_more behind the first n. */
static enum sqz_status make_window(struct sqz_card *cuda, struct sqz_own_rows *own, size_t n, size_t n_more,
                                   size_t n_kept, void *stream, struct sqz_error *error)
{
    struct sqz_card_f16_rows *w = &own->recent;
    const size_t block = n / BLOCK, oldest = block < KEPT_BLOCKS ? 0 : (block + 1 - KEPT_BLOCKS) * BLOCK;
    const size_t first = oldest > w->first ? oldest : w->first;
    if (n + n_more <= w->first + w->room) return SQZ_OK;
    const size_t read = sqz_card_own_flushed(n_kept);
    if (n_kept && w->first <= read && read < first) {
        const enum sqz_status status = keep_aside(cuda, own, n_kept, stream, error);
        if (status != SQZ_OK) return status;
    }
    if (n + n_more > first + w->room) { /* three blocks and what comes, at least one */
        const size_t more = n_more < BLOCK ? BLOCK : n_more;
        const size_t room =
            n + n_more <= FIRST_ROOM ? FIRST_ROOM : (KEPT_BLOCKS * BLOCK + more + BLOCK - 1) / BLOCK * BLOCK;
        return give_room(cuda, own, w, room, first, n - first, stream, error);
    }
    if (move_window(cuda, own, first, n, stream)) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_INTERNAL, "the card took no copy: %s", cuda->calls->complaint());
}

/* What is there of rows before number n, when the rows from there on come, again or for the first time. */
static bool take_stock(struct sqz_card *cuda, struct sqz_own_rows *own, size_t n, void *stream)
{
    if (n == 0) own->recent.first = 0;
    if (n >= own->n_when_passed && own->n_flushed < own->n_flushed_then) own->n_flushed = own->n_flushed_then;
    if (own->n_flushed > n / BLOCK) own->n_flushed = n / BLOCK;
    own->n_when_passed = own->n_flushed_then = 0;
    if (n < own->n_kept) own->n_kept = 0;
    if (n == 0 || n != own->n_kept || own->recent.first <= own->kept.first) return true;
    return copy_kept(cuda, own, true, stream);
}

static enum sqz_status ready_planes(struct sqz_card *cuda, struct sqz_own_rows *own, size_t n, size_t n_more,
                                    size_t n_kept, void *stream, struct sqz_error *error)
{
    const size_t read = sqz_card_own_flushed(n), end = sqz_card_own_flushed(n + n_more - 1) / BLOCK, whole = n / BLOCK;
    enum sqz_status status = SQZ_OK;
    if (!take_stock(cuda, own, n, stream))
        return sqz_error_set(error, SQZ_ERROR_INTERNAL, "the card took no copy: %s", cuda->calls->complaint());
    const size_t needed = end > own->n_flushed && own->n_flushed * BLOCK < read ? own->n_flushed * BLOCK : read;
    if (needed < own->recent.first)
        return sqz_error_set(error, SQZ_ERROR_INTERNAL,
                             "rows of this sequence before row %zu are no more, those from %zu on are", n,
                             own->recent.first);
    if (end * BLOCK > own->plane_room) status = give_plane_room(cuda, own, room_for(end * BLOCK), stream, error);
    if (status == SQZ_OK && !flush(cuda, own, end < whole ? end : whole, stream))
        status =
            sqz_error_set(error, SQZ_ERROR_INTERNAL, "the card put no rows into planes: %s", cuda->calls->complaint());
    if (status == SQZ_OK) status = make_window(cuda, own, n, n_more, n_kept, stream, error);
    if (status == SQZ_OK && end > whole) { /* by the calls that read them */
        own->n_when_passed = n + n_more;
        own->n_flushed_then = end;
    }
    return status;
}

enum sqz_status sqz_card_ready_own(struct sqz_card *cuda, struct sqz_own_rows *own, size_t n, size_t n_more,
                                   size_t n_kept, void *stream, struct sqz_error *error)
{
    enum sqz_status status = SQZ_OK;
    if (n + n_more > own->whole.room)
        status = give_room(cuda, own, &own->whole, room_for(n + n_more), 0, n, stream, error);
    if (status != SQZ_OK || n_more == 0 || !any_in_planes(own->bound)) return status;
    return ready_planes(cuda, own, n, n_more, n_kept, stream, error);
}
