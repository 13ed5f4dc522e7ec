/* Selectors of other methods; eval_methods.h describes them. */
#include "eval_methods.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "common.h"
#include "kernels.h"
#include "largest.h"

enum { PAGE_ROWS = 16, SINKS = 4 };

const char *const method_names[N_METHODS] = {"dense",     "squeezed", "paper",     "quest",  "window", "oracle",
                                             "streaming", "snapkv",   "quantspec", "int4+4", "int4"};

size_t rows_of_budget(const struct sqz_select_call *call)
{
    const double rows = (double)call->budget * call->layer->n_rows;
    return rows < 1.0 ? 1 : rows < call->layer->n_rows ? (size_t)rows : call->layer->n_rows;
}

struct chosen {
    float *scores, *copy; /* [n_rows] */
    uint32_t *list;
};

static struct chosen carve_chosen(struct sqz_arena *arena, const struct sqz_layer *layer)
{
    struct chosen chosen;
    chosen.scores = sqz_arena_take(arena, layer->n_rows, 1, sizeof *chosen.scores);
    chosen.copy = sqz_arena_take(arena, layer->n_rows, 1, sizeof *chosen.copy);
    chosen.list = sqz_arena_take(arena, layer->n_rows, 1, sizeof *chosen.list);
    return chosen;
}

/* ---- QUEST ---------------------------------------------------------------------------- */

static size_t count_pages(const struct sqz_layer *layer)
{
    return (layer->n_rows + PAGE_ROWS - 1) / PAGE_ROWS;
}

/* Of rows [first, first + n_rows) of a head. */
static void bound_page(float *bounds, const struct sqz_rows *keys, size_t first, size_t n_rows, size_t dim)
{
    float row[256];
    for (size_t r = 0; r < n_rows; r++) {
        sqz_rows_to_f32(row, keys, first + r, 1, dim);
        for (size_t i = 0; i < dim; i++) {
            bounds[i] = r == 0 || row[i] < bounds[i] ? row[i] : bounds[i];
            bounds[dim + i] = r == 0 || row[i] > bounds[dim + i] ? row[i] : bounds[dim + i];
        }
    }
}

void page_bounds_make(struct page_bounds *pages, const struct sqz_context *context, uint32_t n_layer)
{
    pages->n_layer = n_layer;
    pages->bounds = calloc(n_layer, sizeof *pages->bounds);
    if (!pages->bounds) die("out of memory");
    for (uint32_t l = 0; l < n_layer; l++) {
        const struct sqz_layer *layer = sqz_context_layer(context, l);
        const size_t d = layer->shape.head_dim, n_pages = count_pages(layer);
        if (layer->sliding_window) continue;
        pages->bounds[l] = malloc(layer->shape.n_head_kv * n_pages * 2 * d * sizeof(float));
        if (!pages->bounds[l]) die("out of memory");
        for (size_t h = 0; h < layer->shape.n_head_kv; h++) {
            const struct sqz_rows keys = sqz_rows_of_head(&layer->keys, layer->n_rows, d, h);
            for (size_t p = 0; p < n_pages; p++) {
                const size_t first = p * PAGE_ROWS, left = layer->n_rows - first;
                bound_page(pages->bounds[l] + (h * n_pages + p) * 2 * d, &keys, first,
                           left < PAGE_ROWS ? left : PAGE_ROWS, d);
            }
        }
    }
}

void page_bounds_free(struct page_bounds *pages)
{
    for (uint32_t l = 0; pages->bounds && l < pages->n_layer; l++) free(pages->bounds[l]);
    free(pages->bounds);
    memset(pages, 0, sizeof *pages);
}

/* The largest bound over the query heads of the group. */
static float score_page(const struct sqz_select_call *call, const float *bounds)
{
    const size_t d = call->layer->shape.head_dim;
    float largest = -INFINITY;
    for (size_t r = 0; r < call->n_query_rows; r++) {
        const float *q = call->queries + r * d;
        float bound = 0.0f;
        for (size_t i = 0; i < d; i++) {
            const float low = q[i] * bounds[i], high = q[i] * bounds[d + i];
            bound += low > high ? low : high;
        }
        largest = bound > largest ? bound : largest;
    }
    return largest;
}

static size_t select_quest(const void *data, const struct sqz_select_call *call, uint32_t *rows, uint64_t *index_bytes)
{
    const struct page_bounds *pages = data;
    const struct sqz_layer *layer = call->layer;
    const size_t d = layer->shape.head_dim, n_pages = count_pages(layer);
    const float *bounds = pages->bounds[call->layer_index] + call->head_kv * n_pages * 2 * d;
    struct sqz_arena arena = sqz_arena_on(call->workspace);
    struct chosen chosen = carve_chosen(&arena, layer);
    for (size_t p = 0; p < n_pages; p++) chosen.scores[p] = score_page(call, bounds + p * 2 * d);
    *index_bytes = n_pages * 2 * d * sizeof(uint16_t); /* as F16, like the keys */
    const double row_bytes = 4.0 * (double)d, bytes = (double)call->budget * layer->n_rows * row_bytes;
    const double left = (bytes - (double)*index_bytes) / (PAGE_ROWS * row_bytes);
    const size_t k = left < 1.0 ? 1 : left < (double)n_pages ? (size_t)left : n_pages;
    sqz_list_largest(chosen.list, chosen.scores, chosen.copy, n_pages, k);
    size_t n = 0;
    for (size_t i = 0; i < k; i++) {
        const uint32_t first = chosen.list[i] * PAGE_ROWS;
        for (uint32_t row = first; row < first + PAGE_ROWS && row < layer->n_rows; row++) rows[n++] = row;
    }
    return n;
}

/* ---- A window ------------------------------------------------------------------------- */

static size_t select_window(const void *data, const struct sqz_select_call *call, uint32_t *rows, uint64_t *index_bytes)
{
    const size_t n = rows_of_budget(call), n_sinks = n < SINKS ? n : SINKS;
    (void)data;
    *index_bytes = 0;
    for (size_t i = 0; i < n; i++) rows[i] = (uint32_t)(i < n_sinks ? i : call->layer->n_rows - n + i);
    return n;
}

/* ---- The oracle ------------------------------------------------------------------------ */

static size_t select_oracle(const void *data, const struct sqz_select_call *call, uint32_t *rows, uint64_t *index_bytes)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const struct sqz_layer *layer = call->layer;
    const size_t d = layer->shape.head_dim, n = layer->n_rows, n_best = rows_of_budget(call);
    struct sqz_arena arena = sqz_arena_on(call->workspace);
    struct chosen chosen = carve_chosen(&arena, layer);
    float *logits = chosen.copy; /* the copy is made when these are done with */
    const struct sqz_rows keys = sqz_rows_of_head(&layer->keys, n, d, call->head_kv);
    int16_t numbers[256], turned[256]; /* a query, as keys that are not F16 may take it */
    float factor, mean_logit, turned_factor, half;
    (void)data;
    *index_bytes = 0;
    memset(chosen.scores, 0, n * sizeof *chosen.scores);
    for (size_t r = 0; r < call->n_query_rows; r++) {
        const struct sqz_row_queries query = {.f32 = call->queries + r * d,
                                              .i16 = {numbers, &factor, &mean_logit},
                                              .n = 1,
                                              .scale = layer->shape.scale,
                                              .turned = {turned, &turned_factor, &half}};
        sqz_row_queries_set(&query, &keys, d);
        sqz_rows_logits(logits, n, &query, &keys, 0, n, d, NULL);
        const float sum = k->exp_sum(logits, n, k->max(logits, n));
        k->add_scaled(chosen.scores, chosen.scores, 1.0f / sum, logits, n);
    }
    sqz_list_largest(rows, chosen.scores, chosen.copy, n, n_best);
    return n_best;
}

/* ---- The interface --------------------------------------------------------------------- */

static size_t workspace_bytes(const void *data, const struct sqz_layer *layer)
{
    struct sqz_arena arena = sqz_arena_on(NULL);
    (void)data;
    carve_chosen(&arena, layer);
    return sqz_arena_bytes(&arena);
}

struct sqz_selector method_selector(enum eval_method method, const struct page_bounds *pages)
{
    struct sqz_selector selector = {select_oracle, workspace_bytes, pages};
    if (method == METHOD_QUEST) selector.select = select_quest;
    else if (method == METHOD_WINDOW || method == METHOD_STREAMING) selector.select = select_window;
    return selector;
}
