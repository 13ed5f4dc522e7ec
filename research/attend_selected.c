/* Attention over rows that a caller's function chooses; attend_selected.h says what for. */
#include "attend_selected.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "arena.h"
#include "kernels.h"
#include "softmax.h"
#include "threads.h"
#include "user_rows.h"

enum { PASS_ROWS = 256 };

struct selected_scratch {
    float *queries, *logits;                  /* [G][D], [MAX_GROUP_QUERIES][stride] */
    struct sqz_i16_queries quantised, turned; /* [G] */
    uint32_t *rows;                           /* [n_rows] */
    struct sqz_softmax state;
    void *workspace;
    size_t stride;
};

static void carve(struct selected_scratch *s, struct sqz_arena *arena, const struct sqz_layer *layer,
                  size_t workspace_bytes, size_t max_user_rows)
{
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv;
    s->stride = max_user_rows > PASS_ROWS ? max_user_rows : PASS_ROWS;
    s->queries = sqz_arena_take(arena, group, d, sizeof(float));
    s->logits = sqz_arena_take(arena, SQZ_MAX_GROUP_QUERIES, s->stride, sizeof(float));
    s->quantised = sqz_i16_queries_take(arena, group, d);
    s->turned = sqz_i16_queries_take(arena, group, d);
    s->rows = sqz_arena_take(arena, layer->n_rows, 1, sizeof(uint32_t));
    s->state = (struct sqz_softmax){.n_rows = group, .head_dim = d};
    s->state.out = sqz_arena_take(arena, group, d, sizeof(float));
    s->state.maximum = sqz_arena_take(arena, group, 1, sizeof(float));
    s->state.sum = sqz_arena_take(arena, group, 1, sizeof(float));
    s->workspace = sqz_arena_take(arena, workspace_bytes, 1, 1);
}

size_t sqz_attend_selected_workspace_bytes(const struct sqz_layer *layer, const struct sqz_selector *selector,
                                           size_t max_user_rows, int n_threads)
{
    struct sqz_arena arena = sqz_arena_on(NULL);
    struct selected_scratch scratch;
    for (int i = 0; i < n_threads; i++)
        carve(&scratch, &arena, layer, selector->workspace_bytes(selector->data, layer), max_user_rows);
    return sqz_arena_bytes(&arena);
}

/* Turns logits of `part`, whose rows are the first of the scratch, into weights and adds the values of n rows: those of
 * `index`, or from number `first` on. */
static void add_weighted(struct sqz_softmax *part, float *logits, size_t stride, const struct sqz_rows *values,
                         const uint32_t *index, size_t first, size_t n)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    for (size_t r = 0; r < part->n_rows; r++) {
        sqz_softmax_raise(part, r, k->max(logits + r * stride, n));
        part->sum[r] += k->exp_sum(logits + r * stride, n, part->maximum[r]);
    }
    sqz_rows_accumulate(part->out, logits, stride, part->n_rows, values, index, first, n, part->head_dim);
}

/* Query rows [first, first + n) of the state over the user's rows and the chosen ones. */
static void add_all(const struct sqz_attend_call *c, struct selected_scratch *s, size_t head, size_t token,
                    size_t first, size_t n_query_rows, size_t n_chosen)
{
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim;
    const size_t n_user = c->n_user ? c->n_user - c->n_tokens + token + 1 : 0;
    const struct sqz_rows keys = sqz_rows_of_head(&layer->keys, layer->n_rows, d, head);
    const struct sqz_rows values = sqz_rows_of_head(&layer->values, layer->n_rows, d, head);
    const struct sqz_row_queries all = {
        .f32 = s->queries, .i16 = s->quantised, .n = s->state.n_rows, .scale = layer->shape.scale, .turned = s->turned};
    const struct sqz_row_queries queries = sqz_row_queries_part(&all, first, n_query_rows, d);
    struct sqz_softmax part = {n_query_rows, d, s->state.out + first * d, s->state.maximum + first,
                               s->state.sum + first};
    struct sqz_user_whole whole;
    const struct sqz_user_rows *own = sqz_user_rows_of_call(c, &whole);
    const size_t n_flushed = sqz_user_rows_flushed(own, n_user);
    for (size_t at = 0, n_part; at < n_user; at += n_part) {
        struct sqz_user_part p = sqz_user_part(own, head, at, n_user, n_flushed, c->upper);
        n_part = p.end - at;
        sqz_row_queries_set(&queries, &p.keys, d);
        sqz_rows_logits(s->logits, s->stride, &queries, &p.keys, p.at, n_part, d, NULL);
        add_weighted(&part, s->logits, s->stride, &p.values, NULL, p.at, n_part);
    }
    sqz_row_queries_set(&queries, &keys, d);
    for (size_t i = 0, n; i < n_chosen; i += n) {
        n = n_chosen - i < PASS_ROWS ? n_chosen - i : PASS_ROWS;
        sqz_rows_listed_logits(s->logits, s->stride, &queries, &keys, s->rows + i, n, n_chosen - i, d);
        add_weighted(&part, s->logits, s->stride, &values, s->rows + i, 0, n);
    }
}

static size_t attend_head(const struct sqz_attend_call *c, const struct sqz_selector *selector, uint32_t layer_index,
                          struct selected_scratch *s, size_t head, size_t token, uint64_t *index_bytes)
{
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv;
    for (size_t g = 0; g < group; g++)
        memcpy(s->queries + g * d,
               c->queries + token * c->query_token_stride + (head * group + g) * c->query_head_stride,
               d * sizeof *s->queries);
    const struct sqz_select_call call = {
        .layer = layer,
        .layer_index = layer_index,
        .head_kv = (uint32_t)head,
        .queries = s->queries,
        .n_query_rows = group,
        .budget = c->budget,
        .workspace = s->workspace,
    };
    uint64_t bytes = 0;
    const size_t n_chosen = selector->select(selector->data, &call, s->rows, &bytes);
    *index_bytes += bytes;
    sqz_softmax_reset(&s->state);
    for (size_t g = 0; g < group; g += SQZ_MAX_GROUP_QUERIES) {
        const size_t n = group - g < SQZ_MAX_GROUP_QUERIES ? group - g : SQZ_MAX_GROUP_QUERIES;
        add_all(c, s, head, token, g, n, n_chosen);
    }
    for (size_t g = 0; g < group; g++) {
        float *out = c->out + token * c->out_token_stride + (head * group + g) * c->out_head_stride;
        const float inverse = s->state.sum[g] >= FLT_MIN ? 1.0f / s->state.sum[g] : 0.0f;
        for (size_t i = 0; i < d; i++) out[i] = s->state.out[g * d + i] * inverse;
        if (c->lse)
            c->lse[token * layer->shape.n_head + head * group + g] =
                inverse > 0 ? s->state.maximum[g] + logf(s->state.sum[g]) : -INFINITY;
    }
    return n_chosen;
}

void sqz_attend_selected(const struct sqz_attend_call *c, const struct sqz_selector *selector, uint32_t layer_index)
{
    const struct sqz_layer *layer = c->layer;
    const size_t n_heads = layer->shape.n_head_kv, workspace_bytes = selector->workspace_bytes(selector->data, layer);
    struct sqz_arena one = sqz_arena_on(NULL);
    struct selected_scratch scratch;
    uint64_t n_chosen = 0, index_bytes = 0;
    carve(&scratch, &one, layer, workspace_bytes, c->n_user);
    const size_t thread_bytes = one.used;
#pragma omp parallel for schedule(dynamic, 1) num_threads(c->n_threads) private(scratch) \
    reduction(+ : n_chosen, index_bytes)
    for (size_t item = 0; item < c->n_tokens * n_heads; item++) {
        struct sqz_arena arena = sqz_arena_on(c->workspace);
        arena.used = (size_t)sqz_thread_number() * thread_bytes;
        carve(&scratch, &arena, layer, workspace_bytes, c->n_user);
        n_chosen += attend_head(c, selector, layer_index, &scratch, item % n_heads, item / n_heads, &index_bytes);
    }
    if (c->stats) {
        const uint64_t row_bytes = (uint64_t)layer->shape.head_dim * sizeof(uint16_t), n = c->n_tokens * n_heads;
        c->stats->n_selections += n;
        c->stats->context_bytes += n * 2 * layer->n_rows * row_bytes;
        c->stats->centroid_bytes += index_bytes;
        c->stats->key_bytes += n_chosen * sqz_row_bytes(layer->keys.type, layer->shape.head_dim);
        c->stats->value_bytes += n_chosen * sqz_row_bytes(layer->values.type, layer->shape.head_dim);
        c->stats->retained_keys += n_chosen;
        c->stats->total_keys += n * layer->n_rows;
    }
}
