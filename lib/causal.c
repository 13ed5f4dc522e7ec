/*
 * Dense causal attention of a chunk of queries over everything before them:
 * what reading a context costs. Work is split over (KV head x block of query
 * tokens); a block's query rows of all heads that share the keys go through
 * each tile of keys together, so a tile is converted once for all of them.
 */
#include <math.h>
#include <string.h>

#include "arena.h"
#include "attention.h"
#include "softmax.h"
#include "threads.h"

/* Query rows a block: enough to pay for converting a tile, few enough that logits, queries and outputs of head dim 64
 * (3 x 192 x 64 x 4 bytes) stay in a 512 KiB second-level cache. */
enum { BLOCK_ROWS = 192 };

struct causal_scratch {
    float *queries;
    struct sqz_softmax state;
    struct sqz_tile_scratch tile;
    uint32_t *first, *last;
};

static size_t block_tokens(const struct sqz_layer_shape *shape)
{
    size_t group = shape->n_head / shape->n_head_kv;
    return group >= BLOCK_ROWS ? 1 : BLOCK_ROWS / group;
}

static struct causal_scratch carve(struct sqz_arena *arena, const struct sqz_layer_shape *shape)
{
    const size_t rows = block_tokens(shape) * (shape->n_head / shape->n_head_kv), d = shape->head_dim;
    struct causal_scratch s;
    s.queries = sqz_arena_take(arena, rows, d, sizeof(float));
    s.state.out = sqz_arena_take(arena, rows, d, sizeof(float));
    s.state.maximum = sqz_arena_take(arena, rows, 1, sizeof(float));
    s.state.sum = sqz_arena_take(arena, rows, 1, sizeof(float));
    s.tile.logits = sqz_arena_take(arena, rows, SQZ_TILE_ROWS, sizeof(float));
    s.tile.keys = sqz_arena_take(arena, SQZ_TILE_ROWS, d, sizeof(float));
    s.tile.values = sqz_arena_take(arena, SQZ_TILE_ROWS, d, sizeof(float));
    s.first = sqz_arena_take(arena, rows, 1, sizeof(uint32_t));
    s.last = sqz_arena_take(arena, rows, 1, sizeof(uint32_t));
    return s;
}

size_t sqz_causal_workspace_bytes(const struct sqz_layer_shape *shape, int n_threads)
{
    struct sqz_arena arena = sqz_arena_on(NULL);
    for (int i = 0; i < n_threads; i++) carve(&arena, shape);
    return sqz_arena_bytes(&arena);
}

static void causal_block(const struct sqz_causal_call *c, size_t head, size_t token, size_t n_tokens,
                         struct causal_scratch *s)
{
    const size_t d = c->shape.head_dim, group = c->shape.n_head / c->shape.n_head_kv;
    const struct sqz_rows keys = sqz_f16_rows(c->keys + head * c->capacity_rows * d);
    const struct sqz_rows values = sqz_f16_rows(c->values + head * c->capacity_rows * d);
    s->state.n_rows = n_tokens * group;
    s->state.head_dim = d;
    sqz_softmax_reset(&s->state);
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t g = 0; g < group; g++)
            memcpy(s->queries + (t * group + g) * d,
                   c->queries + (token + t) * c->query_token_stride + (head * group + g) * c->query_head_stride,
                   d * sizeof(float));

    const size_t first_position = c->first_position + token;
    const size_t end = c->not_own ? c->first_position : first_position + n_tokens;
    size_t begin = 0;
    if (c->window_tokens && first_position + 1 > c->window_tokens) begin = first_position + 1 - c->window_tokens;
    for (size_t at = begin; at < end; at += SQZ_TILE_ROWS) {
        const size_t n = end - at < SQZ_TILE_ROWS ? end - at : SQZ_TILE_ROWS;
        /* Limits only where the diagonal or the window's edge crosses the tile. */
        const bool limited =
            !c->not_own && (at + n > first_position + 1 || (c->window_tokens && at + c->window_tokens < end));
        if (limited) {
            for (size_t r = 0; r < s->state.n_rows; r++) {
                const size_t position = first_position + r / group;
                const size_t oldest =
                    c->window_tokens && position + 1 > c->window_tokens ? position + 1 - c->window_tokens : 0;
                const size_t last = position + 1 > at ? position + 1 - at : 0;
                const size_t first = oldest > at ? oldest - at : 0;
                s->last[r] = (uint32_t)(last < n ? last : n);
                s->first[r] = (uint32_t)(first < s->last[r] ? first : s->last[r]);
            }
        }
        sqz_softmax_add_tile(&s->state, s->queries, c->shape.scale, &keys, &values, at, n, limited ? s->first : NULL,
                             limited ? s->last : NULL, &s->tile);
    }
    for (size_t r = 0; r < s->state.n_rows; r++) {
        float *out =
            c->out + (token + r / group) * c->out_token_stride + (head * group + r % group) * c->out_head_stride;
        const float sum = s->state.sum[r], inverse = sum == 0 ? 0.0f : 1.0f / sum;
        for (size_t i = 0; i < d; i++) out[i] = s->state.out[r * d + i] * inverse;
        if (c->lse)
            c->lse[(token + r / group) * c->shape.n_head + head * group + r % group] = s->state.maximum[r] + logf(sum);
    }
}

void sqz_attention_causal(const struct sqz_causal_call *c)
{
    const size_t step = block_tokens(&c->shape);
    const size_t n_blocks = (c->n_tokens + step - 1) / step, n_items = n_blocks * c->shape.n_head_kv;
    struct sqz_arena probe = sqz_arena_on(NULL);
    carve(&probe, &c->shape);
    const size_t stride = probe.used;
#pragma omp parallel num_threads(c->n_threads)
    {
        struct sqz_arena arena = sqz_arena_on(c->workspace);
        arena.used = stride * (size_t)sqz_thread_number();
        struct causal_scratch scratch = carve(&arena, &c->shape);
        /* Last blocks see the most keys: they go first, so that the threads end together. */
#pragma omp for schedule(dynamic, 1)
        for (size_t item = 0; item < n_items; item++) {
            const size_t block = n_blocks - 1 - item / c->shape.n_head_kv, token = block * step;
            const size_t n = c->n_tokens - token < step ? c->n_tokens - token : step;
            causal_block(c, item % c->shape.n_head_kv, token, n, &scratch);
        }
    }
}
