/* Recall of attention mass; recall.h says what it is. */
#include "recall.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "user_rows.h"

enum sqz_status sqz_recall_create(struct sqz_recall *recall, const struct sqz_context *context, uint32_t n_layer,
                                  struct sqz_error *error)
{
    memset(recall, 0, sizeof *recall);
    recall->n_layer = n_layer;
    for (uint32_t l = 0; l < n_layer; l++) {
        const uint32_t n = sqz_context_layer(context, l)->shape.n_head_kv;
        if (n > recall->n_head_kv) recall->n_head_kv = n;
    }
    const size_t n = (size_t)n_layer * recall->n_head_kv;
    recall->mass = calloc(3 * n, sizeof *recall->mass);
    if (!recall->mass) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for %zu heads", n);
    recall->keys = recall->mass + n;
    recall->n = recall->keys + n;
    return SQZ_OK;
}

void sqz_recall_free(struct sqz_recall *recall)
{
    free(recall->mass);
    memset(recall, 0, sizeof *recall);
}

/* What the calls write to. */
struct scratch {
    float *out, *reached, *all; /* [T][H][D], [T][H], [T][H] */
    void *workspace;
};

static void free_scratch(struct scratch *s)
{
    free(s->out);
    free(s->reached);
    free(s->all);
    free(s->workspace);
}

/* The part of a call that one KV head has, with outputs of its own. */
static struct sqz_attend_call head_call(const struct sqz_attend_call *call, const struct sqz_layer *head,
                                        const struct sqz_user_rows *own, uint32_t h, const struct scratch *s,
                                        float *lse)
{
    const size_t d = head->shape.head_dim, group = head->shape.n_head;
    struct sqz_attend_call part = *call;
    part.layer = head;
    part.queries += h * group * call->query_head_stride;
    part.user = own;
    part.out = s->out;
    part.out_token_stride = group * d;
    part.out_head_stride = d;
    part.lse = lse;
    part.stats = NULL;
    part.workspace = s->workspace;
    return part;
}

static void add_head(struct sqz_recall *recall, size_t at, const float *reached, const float *all, size_t n,
                     double key_share)
{
    for (size_t i = 0; i < n; i++) recall->mass[at] += fmin(exp((double)reached[i] - (double)all[i]), 1.0);
    recall->keys[at] += key_share * (double)n;
    recall->n[at] += (double)n;
}

enum sqz_status sqz_recall_add(struct sqz_recall *recall, const struct sqz_attend_call *call,
                               const struct sqz_selector *selector, uint32_t layer_index, struct sqz_error *error)
{
    const struct sqz_layer *layer = call->layer;
    const size_t d = layer->shape.head_dim, n_head = layer->shape.n_head, rows = call->n_tokens * n_head;
    const size_t group = n_head / layer->shape.n_head_kv, n = call->n_tokens * group;
    size_t bytes = sqz_attend_workspace_bytes(layer, call->n_user, call->block_tokens, call->n_threads);
    if (selector) {
        const size_t need = sqz_attend_selected_workspace_bytes(layer, selector, call->n_user, call->n_threads);
        if (need > bytes) bytes = need;
    }
    struct scratch s = {malloc(rows * d * sizeof(float)), malloc(rows * sizeof(float)), malloc(rows * sizeof(float)),
                        malloc(bytes)};
    if (!s.out || !s.reached || !s.all || !s.workspace) {
        free_scratch(&s);
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory: %zu bytes to measure recall", bytes);
    }
    struct sqz_attention_stats stats = {0};
    float *chosen = NULL; /* [T][H] of a selector's rows */
    if (selector) {
        struct sqz_attend_call whole = *call;
        whole.out = s.out;
        whole.out_token_stride = n_head * d;
        whole.out_head_stride = d;
        whole.lse = chosen = s.reached;
        whole.stats = &stats;
        whole.workspace = s.workspace;
        sqz_attend_selected(&whole, selector, layer_index);
    }
    struct sqz_user_whole whole_rows;
    const struct sqz_user_rows *user = sqz_user_rows_of_call(call, &whole_rows);
    struct sqz_user_buffer *buffers = malloc(user->n_buffers * sizeof *buffers);
    float *own = chosen ? malloc(n * sizeof *own) : s.reached; /* one head's */
    if (!own || !buffers) {
        if (chosen) free(own);
        free(buffers);
        free_scratch(&s);
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory to measure recall");
    }
    for (uint32_t h = 0; h < layer->shape.n_head_kv; h++) {
        const struct sqz_layer head = sqz_layer_head(layer, h);
        struct sqz_layer exact = head; /* selects the same; what it reads counts whole, what it estimates does not */
        exact.tail = exact.value_skip = false;
        const struct sqz_user_rows of_head = sqz_user_rows_of_head(user, h, buffers);
        struct sqz_attend_call part = head_call(call, &head, &of_head, h, &s, s.all);
        part.budget = 1.0f;
        sqz_attend(&part);
        if (selector) {
            for (size_t i = 0; i < n; i++) own[i] = chosen[i / group * n_head + h * group + i % group];
        } else {
            memset(&stats, 0, sizeof stats);
            part = head_call(call, &exact, &of_head, h, &s, own);
            part.stats = &stats;
            sqz_attend(&part);
        }
        add_head(recall, (size_t)layer_index * recall->n_head_kv + h, own, s.all, n,
                 (double)stats.retained_keys / (double)stats.total_keys);
    }
    if (chosen) free(own);
    free(buffers);
    free_scratch(&s);
    return SQZ_OK;
}
