/* A sequence's own rows of all layers; own_rows.h says what each call does. */
#define _GNU_SOURCE /* mmap flags */
#include "own_rows.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "error.h"

/* Whether some layer of the context keeps rows in planes. */
static bool has_planes(const struct sqz_context *context)
{
    const uint32_t n_layer = sqz_context_get_meta(context)->n_layer;
    for (uint32_t l = 0; l < n_layer; l++)
        if (sqz_row_is_planes(sqz_context_layer(context, l)->keys.type)) return true;
    return false;
}

/* Lays out the rows of all layers. */
static void carve(struct sqz_arena *arena, const struct sqz_own_layers *own, size_t capacity, bool f16)
{
    const uint32_t n_layer = sqz_context_get_meta(own->context)->n_layer;
    const bool planes = !f16 && has_planes(own->context);
    for (uint32_t l = 0; l < n_layer; l++) {
        const struct sqz_layer *layer = sqz_context_layer(own->context, l);
        enum sqz_user_kind kind = SQZ_USER_WHOLE;
        if (planes && layer->sliding_window) kind = SQZ_USER_WINDOW;
        else if (planes && sqz_row_is_planes(layer->keys.type)) kind = SQZ_USER_PLANES;
        sqz_user_rows_carve(arena, &own->layers[l], layer, kind, capacity);
    }
}

enum sqz_status sqz_own_layers_create(struct sqz_own_layers *own, const struct sqz_context *context,
                                      size_t capacity_rows, bool f16, struct sqz_error *error)
{
    const uint32_t n_layer = sqz_context_get_meta(context)->n_layer;
    struct sqz_arena arena = sqz_arena_on(NULL);
    *own = (struct sqz_own_layers){.context = context, .most = SIZE_MAX};
    own->layers = calloc(n_layer, sizeof *own->layers);
    if (!own->layers) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a sequence");
    carve(&arena, own, capacity_rows, f16);
    own->memory_bytes = sqz_arena_bytes(&arena);
    own->memory = own->memory_bytes == SIZE_MAX ? MAP_FAILED
                                                : mmap(NULL, own->memory_bytes, PROT_READ | PROT_WRITE,
                                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (own->memory == MAP_FAILED) {
        const size_t bytes = own->memory_bytes;
        own->memory = NULL;
        sqz_own_layers_free(own);
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory: %zu bytes for a session of %zu tokens", bytes,
                             capacity_rows);
    }
    arena = sqz_arena_on(own->memory);
    carve(&arena, own, capacity_rows, f16);
    for (uint32_t l = 0; l < n_layer; l++) {
        const size_t most = sqz_user_rows_most(&own->layers[l]);
        if (most < own->most) own->most = most;
    }
    return SQZ_OK;
}

void sqz_own_layers_free(struct sqz_own_layers *own)
{
    if (own->memory) munmap(own->memory, own->memory_bytes);
    free(own->layers);
    *own = (struct sqz_own_layers){0};
}

bool sqz_own_layers_put(const struct sqz_own_layers *own, const struct sqz_attention_node *node, size_t n_before,
                        size_t n_kept, int n_threads)
{
    struct sqz_user_rows *rows = &own->layers[node->layer];
    const struct sqz_layer_shape *shape = &sqz_context_layer(own->context, node->layer)->shape;
    if (!sqz_user_rows_ready(rows, n_before, node->n_tokens, n_kept, n_threads)) return false;
    for (size_t t = 0, n; t < node->n_tokens; t += n) {
        const struct sqz_user_buffer *b = sqz_user_rows_block(rows, n_before + t);
        const size_t at = (n_before + t) % rows->block_rows, room = rows->block_rows - at, left = node->n_tokens - t;
        n = left < room ? left : room;
        const struct sqz_attention_node part = sqz_node_part(node, shape, t, n);
        sqz_node_store_rows(&part, shape, b->keys, b->values, rows->block_rows, at);
    }
    return true;
}

void sqz_own_layers_copy(const struct sqz_own_layers *own, uint32_t l, size_t first, size_t n, uint16_t *keys,
                         uint16_t *values, size_t capacity_rows, size_t to_row)
{
    const struct sqz_user_rows *rows = &own->layers[l];
    const size_t d = rows->head_dim;
    for (size_t i = 0, some; i < n; i += some) {
        const struct sqz_user_buffer *b = sqz_user_rows_block(rows, first + i);
        const size_t at = (first + i) % rows->block_rows, room = rows->block_rows - at;
        assert(b);
        some = n - i < room ? n - i : room;
        for (size_t h = 0; h < rows->n_head_kv; h++) {
            const size_t from = (h * rows->block_rows + at) * d, to = (h * capacity_rows + to_row + i) * d;
            memcpy(keys + to, b->keys + from, some * d * sizeof *keys);
            memcpy(values + to, b->values + from, some * d * sizeof *values);
        }
    }
}

size_t sqz_own_layers_bytes(const struct sqz_own_layers *own)
{
    const uint32_t n_layer = sqz_context_get_meta(own->context)->n_layer;
    size_t bytes = 0;
    for (uint32_t l = 0; l < n_layer; l++) bytes += sqz_user_rows_bytes(&own->layers[l]);
    return bytes;
}
