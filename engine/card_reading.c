/* A node's tokens in host memory, and texts that are read; card.h. */
#include "card.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

/* The node's tokens in host memory, plain rows. False: no memory, or the card refused. */
bool sqz_card_stage(struct sqz_card *cuda, const struct sqz_attention_node *node, const struct sqz_layer_shape *shape,
                    void *stream)
{
    const struct sqz_gpu_calls *calls = cuda->calls;
    const size_t t = node->n_tokens, d = shape->head_dim, q = shape->n_head * d, kv = shape->n_head_kv * d;
    if (!sqz_card_grow_pinned(cuda, (void **)&cuda->staging, &cuda->staging_room, t * (8 * q + 4 * kv))) return false;
    float *queries = (float *)cuda->staging, *out = queries + t * q;
    uint16_t *keys = (uint16_t *)(out + t * q), *values = keys + t * kv;
    bool ok = true;
    for (size_t h = 0; h < shape->n_head; h++)
        ok &= calls->copy_runs(queries + h * d, q * 4, node->queries + h * node->query_head_stride,
                               node->query_token_stride * 4, d * 4, t, stream);
    for (size_t h = 0; h < shape->n_head_kv; h++) {
        ok &= calls->copy_runs(keys + h * d, kv * 2, node->keys + h * node->key_head_stride, node->key_token_stride * 2,
                               d * 2, t, stream);
        ok &= calls->copy_runs(values + h * d, kv * 2, node->values + h * node->value_head_stride,
                               node->value_token_stride * 2, d * 2, t, stream);
    }
    cuda->staged = (struct sqz_attention_node){.layer = node->layer,
                                               .n_tokens = t,
                                               .queries = queries,
                                               .query_token_stride = q,
                                               .query_head_stride = d,
                                               .keys = keys,
                                               .values = values,
                                               .key_token_stride = kv,
                                               .key_head_stride = d,
                                               .value_token_stride = kv,
                                               .value_head_stride = d,
                                               .out = out};
    return calls->wait(stream) && ok;
}

bool sqz_card_put_staged(struct sqz_card *cuda, const struct sqz_attention_node *node,
                         const struct sqz_layer_shape *shape, void *stream)
{
    const size_t bytes = node->n_tokens * shape->n_head * shape->head_dim * sizeof *node->out;
    return cuda->calls->put(node->out, cuda->staged.out, bytes, stream) && cuda->calls->wait(stream);
}

struct sqz_gpu_node sqz_card_node(const struct sqz_attention_node *node, const struct sqz_layer_shape *shape)
{
    return (struct sqz_gpu_node){
        .n_tokens = (uint32_t)node->n_tokens,
        .n_head = shape->n_head,
        .n_head_kv = shape->n_head_kv,
        .head_dim = shape->head_dim,
        .padded_dim = sqz_card_dim(shape->head_dim),
        .queries = node->queries,
        .query_token_stride = node->query_token_stride,
        .query_head_stride = node->query_head_stride,
        .keys = node->keys,
        .values = node->values,
        .key_token_stride = node->key_token_stride,
        .key_head_stride = node->key_head_stride,
        .value_token_stride = node->value_token_stride,
        .value_head_stride = node->value_head_stride,
    };
}

/* ---- Reading a text ------------------------------------------------------------------------------------------ */

void sqz_card_end_reading(struct sqz_backend *backend)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    cuda->calls->use(cuda->card);
    cuda->calls->wait(cuda->stream);
    sqz_card_end_building(cuda);
    for (uint32_t l = 0; l < cuda->n_reading; l++) sqz_card_give(cuda, cuda->reading[l].keys, cuda->reading[l].bytes);
    free(cuda->reading);
    cuda->reading = NULL;
    cuda->n_reading = 0;
}

enum sqz_status sqz_card_plan_reading(struct sqz_backend *backend, const struct sqz_layer_shape *shape,
                                      struct sqz_error *error)
{
    sqz_card_end_reading(backend);
    sqz_card_of(backend)->read_fallback[0] = '\0';
    return sqz_card_of(backend)->cpu->ops->plan_reading(sqz_card_of(backend)->cpu, shape, error);
}

static struct sqz_gpu_causal causal_of(const struct sqz_backend_reading *r)
{
    return (struct sqz_gpu_causal){.shape = sqz_card_shape(&r->shape),
                                   .n_tokens = (uint32_t)r->node->n_tokens,
                                   .n_rows = (uint32_t)(r->first_position + r->node->n_tokens),
                                   .window_tokens = (uint32_t)r->window_tokens,
                                   .capacity_rows = r->capacity_rows,
                                   .out = r->node->out};
}

const char *sqz_card_reading_fallback(struct sqz_backend *backend)
{
    return sqz_card_of(backend)->read_fallback;
}

/* The first layer speaks for those behind it. */
static void note_fallback(struct sqz_card *cuda, uint32_t layer, const char *why)
{
    if (cuda->read_fallback[0]) return;
    snprintf(cuda->read_fallback, sizeof cuda->read_fallback,
             "attention of layer %u, and perhaps of others, was read on the CPU, from copies, because %s", layer, why);
}

/* The layer's rows on the card; NULL: it has no kernel, or there is no memory, and it is read on the CPU. */
static struct sqz_card_rows *rows_of_layer(struct sqz_card *cuda, const struct sqz_backend_reading *r)
{
    const uint32_t l = r->node->layer;
    if (l >= cuda->n_reading) {
        /* Of all layers at once: they stay where they are while rows of the first ones are brought by another thread. */
        const uint32_t n = l < r->n_layers ? r->n_layers : l + 1;
        struct sqz_card_rows *rows = realloc(cuda->reading, n * sizeof *rows);
        if (!rows) return NULL;
        memset(rows + cuda->n_reading, 0, (n - cuda->n_reading) * sizeof *rows);
        cuda->reading = rows;
        cuda->n_reading = n;
    }
    struct sqz_card_rows *rows = &cuda->reading[l];
    if (r->first_position == 0 && !rows->keys) {
        const struct sqz_gpu_causal causal = causal_of(r);
        const size_t n = (size_t)r->shape.n_head_kv * r->capacity_rows * causal.shape.head_dim;
        if (cuda->calls->causal_workspace_bytes(&causal) == 0) {
            note_fallback(cuda, l, "there is no kernel for its shape");
            return NULL;
        }
        rows->bytes = 2 * n * sizeof(uint16_t);
        rows->keys = sqz_card_take(cuda, rows->bytes);
        rows->values = rows->keys ? rows->keys + n : NULL;
        rows->capacity = r->capacity_rows;
        rows->head_dim = r->shape.head_dim;
        if (!rows->keys) note_fallback(cuda, l, "the card has no room for its keys and values (--gpu-memory)");
    }
    return rows->keys && rows->capacity == r->capacity_rows ? rows : NULL;
}

static enum sqz_status card_failed(const struct sqz_card *cuda, enum sqz_status status, struct sqz_error *error)
{
    return sqz_error_set(error, status, "attention on the card failed: %s", cuda->calls->complaint());
}

static enum sqz_status read_on_cpu(struct sqz_card *cuda, const struct sqz_backend_reading *r, struct sqz_error *error)
{
    struct sqz_backend_reading host = *r;
    host.stream = NULL;
    if (r->stream) {
        if (!sqz_card_stage(cuda, r->node, &r->shape, r->stream)) return card_failed(cuda, SQZ_ERROR_INTERNAL, error);
        host.node = &cuda->staged;
    }
    const enum sqz_status status = cuda->cpu->ops->read(cuda->cpu, &host, error);
    if (status != SQZ_OK || !r->stream || sqz_card_put_staged(cuda, r->node, &r->shape, r->stream)) return status;
    return card_failed(cuda, SQZ_ERROR_INTERNAL, error);
}

/* Keys or values, without the zeros behind each row. */
static bool bring_half(struct sqz_card *cuda, const struct sqz_card_rows *rows, uint16_t *to, const uint16_t *from)
{
    const size_t row = rows->head_dim * sizeof *to, padded = sqz_card_dim(rows->head_dim) * sizeof *to;
    if (row == padded) return sqz_card_download(cuda, to, from, rows->bytes / 2);
    return cuda->calls->copy_runs(to, row, from, padded, row, rows->bytes / 2 / padded, cuda->stream) &&
           cuda->calls->wait(cuda->stream);
}

/* Once, behind the text: on the way nothing waits for the host, whose memory takes longer to be touched for the first
 * time than the card takes to compute. */
enum sqz_status sqz_card_bring_rows(struct sqz_backend *backend, uint32_t layer, uint16_t *keys, uint16_t *values,
                                    struct sqz_error *error)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    const struct sqz_card_rows *rows = layer < cuda->n_reading ? &cuda->reading[layer] : NULL;
    if (!rows || !rows->keys) return SQZ_OK;
    cuda->calls->use(cuda->card);
    if (bring_half(cuda, rows, keys, rows->keys) && bring_half(cuda, rows, values, rows->values)) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_INTERNAL, "the card gave no rows: %s", cuda->calls->complaint());
}

/* sqz_card_grow() of what the batch before may still use. */
static bool grow_behind(struct sqz_card *cuda, void *stream, char **memory, size_t *room, size_t bytes)
{
    if (bytes > *room) cuda->calls->wait(stream);
    return sqz_card_grow(cuda, memory, room, bytes);
}

static enum sqz_status read_on_card(struct sqz_card *cuda, const struct sqz_backend_reading *r,
                                    struct sqz_card_rows *rows)
{
    struct sqz_gpu_causal causal = causal_of(r);
    struct sqz_gpu_node node = sqz_card_node(r->node, &r->shape);
    const size_t d = r->shape.head_dim, padded = causal.shape.head_dim, n = r->node->n_tokens * r->shape.n_head;
    if (!grow_behind(cuda, r->stream, &cuda->queries, &cuda->queries_room, n * padded * sizeof(uint16_t)) ||
        (d != padded && !grow_behind(cuda, r->stream, &cuda->out, &cuda->out_room, n * padded * sizeof(float))) ||
        !grow_behind(cuda, r->stream, &cuda->workspace, &cuda->workspace_room,
                     cuda->calls->causal_workspace_bytes(&causal)))
        return SQZ_ERROR_MEMORY;
    node.own_keys = rows->keys;
    node.own_values = rows->values;
    node.capacity_rows = r->capacity_rows;
    node.first_row = r->first_position;
    causal.queries = node.queries_f16 = cuda->queries;
    causal.keys = rows->keys;
    causal.values = rows->values;
    causal.workspace = cuda->workspace;
    causal.workspace_bytes = cuda->workspace_room;
    if (d != padded) causal.out = (float *)cuda->out;
    enum sqz_status status = cuda->calls->take(&node, r->stream);
    if (status == SQZ_OK) status = cuda->calls->causal(&causal, r->stream);
    if (status == SQZ_OK && d != padded &&
        !cuda->calls->copy_runs(r->node->out, d * sizeof(float), causal.out, padded * sizeof(float), d * sizeof(float),
                                n, r->stream))
        status = SQZ_ERROR_INTERNAL;
    return status;
}

/* There is no room for what attention needs beside the rows: what was read of the layer goes on in host memory. */
static enum sqz_status leave_card(struct sqz_card *cuda, const struct sqz_backend_reading *r,
                                  struct sqz_card_rows *rows, struct sqz_error *error)
{
    enum sqz_status status = SQZ_OK;
    cuda->calls->wait(r->stream);
    if (r->first_position) status = sqz_card_bring_rows(&cuda->base, r->node->layer, r->keys, r->values, error);
    sqz_card_give(cuda, rows->keys, rows->bytes);
    memset(rows, 0, sizeof *rows);
    return status;
}

enum sqz_status sqz_card_read(struct sqz_backend *backend, const struct sqz_backend_reading *r, struct sqz_error *error)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    struct sqz_card_rows *rows = r->stream ? rows_of_layer(cuda, r) : NULL;
    if (!rows) return read_on_cpu(cuda, r, error);
    enum sqz_status status = read_on_card(cuda, r, rows);
    if (status == SQZ_ERROR_MEMORY) {
        status = leave_card(cuda, r, rows, error);
        return status == SQZ_OK ? read_on_cpu(cuda, r, error) : status;
    }
    return status == SQZ_OK ? SQZ_OK : card_failed(cuda, status, error);
}

bool sqz_card_fetch_queries(struct sqz_backend *backend, const struct sqz_attention_node *node,
                            const struct sqz_layer_shape *shape, void *stream, struct sqz_attention_node *host)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    if (!sqz_card_stage(cuda, node, shape, stream)) return false;
    *host = cuda->staged;
    return true;
}
