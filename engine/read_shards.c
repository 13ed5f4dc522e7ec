/* Reading into shards; read_shards.h. */
#include "read_shards.h"

#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "error.h"
#include "kernels.h"

struct sqz_reading_shards {
    struct sqz_held_shards held;
    const struct sqz_exchange *exchange;
    struct sqz_backend *place;
    struct sqz_layer_input *inputs; /* [n_layer] */
    uint32_t n_layer;
    size_t *at, *n;  /* [step] tokens in work of each process */
    float *queries;  /* [step][block][H][D] */
    float *partial;  /* [depth][block][H][D + 1] outputs that wait to be merged, each with its LSE behind it */
    float *out, *in; /* [step] such outputs, of each process's tokens by us, of ours by each */
    struct sqz_message *messages; /* [2 step] */
    size_t block, floats;         /* tokens; floats of an output, at most */
    bool broken;                  /* the exchange has failed */
};

size_t sqz_held_tokens(const struct sqz_held_shards *held, uint32_t shard)
{
    size_t n = 0;
    for (uint32_t s = held->first; s < shard && s < held->deal.count; s += held->step)
        n += sqz_deal_tokens(&held->deal, s, held->deal.n_tokens);
    return n;
}

/* Outputs that wait at once: one for each halving of the shards held here, and the one at hand. */
static size_t depth_of(const struct sqz_held_shards *held)
{
    size_t depth = 2;
    for (uint32_t m = held->step; m < held->deal.count; m *= 2) depth++;
    return depth;
}

void sqz_reading_shards_free(struct sqz_reading_shards *r)
{
    if (!r) return;
    free(r->at);
    free(r->partial);
    free(r->messages);
    if (!r->broken) {
        free(r->queries);
        free(r->out);
        free(r->in);
    }
    free(r);
}

enum sqz_status sqz_reading_shards_begin(struct sqz_reading_shards **out, const struct sqz_held_shards *held,
                                         const struct sqz_exchange *exchange, struct sqz_backend *place,
                                         struct sqz_layer_input *inputs, uint32_t n_layer, struct sqz_error *error)
{
    const size_t step = held->step;
    size_t row = 0, heads = 0;
    struct sqz_reading_shards *r = calloc(1, sizeof *r);
    *out = NULL;
    if (!r) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for reading into shards");
    for (uint32_t l = 0; l < n_layer; l++) {
        const struct sqz_layer_shape *s = &inputs[l].shape;
        if ((size_t)s->n_head * s->head_dim > row) row = (size_t)s->n_head * s->head_dim;
        if (s->n_head > heads) heads = s->n_head;
    }
    r->held = *held;
    r->exchange = exchange;
    r->place = place;
    r->inputs = inputs;
    r->n_layer = n_layer;
    r->block = held->deal.block_tokens;
    r->floats = r->block * (row + heads);
    r->at = calloc(2 * step, sizeof *r->at);
    r->n = r->at + step;
    r->messages = calloc(2 * step, sizeof *r->messages);
    r->queries = malloc(step * r->block * row * sizeof *r->queries);
    r->partial = malloc(depth_of(held) * r->floats * sizeof *r->partial);
    r->out = malloc(step * r->floats * sizeof *r->out);
    r->in = malloc(step * r->floats * sizeof *r->in);
    if (!r->at || !r->messages || !r->queries || !r->partial || !r->out || !r->in) {
        sqz_reading_shards_free(r);
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for the queries and outputs of %zu processes",
                             step);
    }
    *out = r;
    return SQZ_OK;
}

void sqz_reading_shards_turn(struct sqz_reading_shards *r, size_t at, size_t n)
{
    const size_t mine = r->held.first, all = r->held.deal.n_tokens;
    for (size_t p = 0; p < r->held.step; p++) {
        r->at[p] = at + p * r->block - mine * r->block;
        r->n[p] = r->at[p] >= all ? 0 : all - r->at[p] < r->block ? all - r->at[p] : r->block;
    }
    r->at[mine] = at;
    r->n[mine] = n;
}

/* ---- One block by the shards held here --------------------------------------------------------- */

/* One process's tokens at a node. */
struct block {
    uint32_t layer, shard; /* that their own rows are in */
    size_t at, n;
    const float *queries;                  /* packed */
    const struct sqz_attention_node *node; /* of ours: rows are taken from it */
    int n_threads;
};

/* out: [T][H][D], then the LSE, [T][H]. */
static enum sqz_status attend_shard(const struct sqz_reading_shards *r, const struct block *b, uint32_t shard,
                                    float *out, struct sqz_error *error)
{
    const struct sqz_layer_input *in = &r->inputs[b->layer];
    const size_t d = in->shape.head_dim, h = in->shape.n_head;
    const size_t begin = sqz_held_tokens(&r->held, shard) * in->shape.n_head_kv * d;
    struct sqz_attention_node node = {.layer = b->layer};
    if (b->node) node = *b->node;
    node.n_tokens = b->n;
    node.queries = b->queries;
    node.query_token_stride = h * d;
    node.query_head_stride = d;
    node.out = out;
    const struct sqz_backend_reading reading = {
        .node = &node,
        .shape = in->shape,
        .keys = in->keys + begin,
        .values = in->values + begin,
        .capacity_rows = sqz_deal_tokens(&r->held.deal, shard, r->held.deal.n_tokens),
        .first_position = sqz_deal_tokens(&r->held.deal, shard, b->at),
        .n_layers = r->n_layer,
        .lse = out + b->n * h * d,
        .not_own = shard != b->shard,
        .n_threads = b->n_threads,
    };
    return r->place->ops->read(r->place, &reading, error);
}

static void merge(const struct block *b, const struct sqz_layer_shape *shape, float *to, const float *from)
{
    const size_t heads = b->n * shape->n_head, out = heads * shape->head_dim;
    sqz_merge_partial(to, to + out, from, from + out, heads, shape->head_dim);
}

/* The shards of number a, a + m, a + 2 m, ..., merged into `to`; `spare`: room for those that wait. */
static enum sqz_status attend_class(const struct sqz_reading_shards *r, const struct block *b, uint32_t a, uint32_t m,
                                    float *to, float *spare, struct sqz_error *error)
{
    if (a + m >= r->held.deal.count) return attend_shard(r, b, a, to, error);
    enum sqz_status status = attend_class(r, b, a, 2 * m, to, spare, error);
    if (status == SQZ_OK) status = attend_class(r, b, a + m, 2 * m, spare, spare + r->floats, error);
    if (status == SQZ_OK) merge(b, &r->inputs[b->layer].shape, to, spare);
    return status;
}

/* ---- A node of all processes -------------------------------------------------------------------- */

static void pack_queries(float *to, const struct sqz_attention_node *node, const struct sqz_layer_shape *shape)
{
    const size_t d = shape->head_dim, h = shape->n_head;
    for (size_t t = 0; t < node->n_tokens; t++)
        for (size_t i = 0; i < h; i++)
            memcpy(to + (t * h + i) * d, node->queries + t * node->query_token_stride + i * node->query_head_stride,
                   d * sizeof *to);
}

/* Of the block's queries those that calibration wants. */
static void keep_queries(const struct sqz_reading_shards *r, const struct block *b)
{
    const struct sqz_layer_input *in = &r->inputs[b->layer];
    const size_t row = (size_t)in->shape.n_head * in->shape.head_dim;
    const size_t first = r->held.deal.n_tokens - in->n_queries, end = b->at + b->n;
    const size_t from = b->at > first ? b->at : first;
    if (from < end)
        sqz_kernels_get()->f32_to_f16((uint16_t *)(uintptr_t)in->queries + (from - first) * row,
                                      b->queries + (from - b->at) * row, (end - from) * row);
}

/* Process number p's tokens. */
static struct block block_of(const struct sqz_reading_shards *r, uint32_t layer, uint32_t p, int n_threads)
{
    const size_t row = (size_t)r->inputs[layer].shape.n_head * r->inputs[layer].shape.head_dim;
    return (struct block){
        .layer = layer,
        .shard = (uint32_t)(r->at[p] / r->block % r->held.deal.count),
        .at = r->at[p],
        .n = r->n[p],
        .queries = r->queries + p * r->block * row,
        .n_threads = n_threads,
    };
}

/* Everybody's queries to everybody. */
static void start_queries(struct sqz_reading_shards *r, const struct sqz_layer_shape *shape)
{
    const uint32_t n = r->held.step, me = r->held.first;
    const size_t row = (size_t)shape->n_head * shape->head_dim, stride = r->block * row;
    for (uint32_t p = 0; p < n; p++) {
        r->messages[p] = (struct sqz_message){r->queries + me * stride, r->n[me] * row * sizeof(float)};
        r->messages[n + p] = (struct sqz_message){r->queries + p * stride, r->n[p] * row * sizeof(float)};
    }
    r->exchange->start(r->exchange->user_data, r->messages, r->messages + n);
}

/* What each process has of another's output to that one. */
static void start_outputs(struct sqz_reading_shards *r, const struct sqz_layer_shape *shape)
{
    const uint32_t n = r->held.step, me = r->held.first;
    const size_t bytes = (size_t)shape->n_head * (shape->head_dim + 1) * sizeof(float);
    for (uint32_t p = 0; p < n; p++) {
        r->messages[p] = (struct sqz_message){r->out + p * r->floats, r->n[p] * bytes};
        r->messages[n + p] = (struct sqz_message){r->in + p * r->floats, r->n[me] * bytes};
    }
    r->exchange->start(r->exchange->user_data, r->messages, r->messages + n);
}

static enum sqz_status finish(struct sqz_reading_shards *r, struct sqz_error *error)
{
    const enum sqz_status status = r->exchange->finish(r->exchange->user_data, error);
    r->broken = status != SQZ_OK;
    return status;
}

/* The outputs of processes a, a + m, ... for our tokens, merged into the first one's, which is returned. */
static float *merge_processes(struct sqz_reading_shards *r, const struct block *b, uint32_t a, uint32_t m)
{
    if (a + m >= r->held.step) return (a == r->held.first ? r->out : r->in) + a * r->floats;
    float *to = merge_processes(r, b, a, 2 * m);
    merge(b, &r->inputs[b->layer].shape, to, merge_processes(r, b, a + m, 2 * m));
    return to;
}

enum sqz_status sqz_reading_shards_node(struct sqz_reading_shards *r, uint32_t layer,
                                        const struct sqz_attention_node *node, int n_threads, struct sqz_error *error)
{
    const struct sqz_layer_shape *shape = &r->inputs[layer].shape;
    const uint32_t n = r->held.step, me = r->held.first;
    struct block mine = block_of(r, layer, me, n_threads);
    enum sqz_status status = SQZ_OK;
    mine.node = node;
    if (node) pack_queries((float *)(uintptr_t)mine.queries, node, shape);
    if (n > 1) start_queries(r, shape);
    if (node) {
        keep_queries(r, &mine);
        status = attend_class(r, &mine, me, n, r->out + me * r->floats, r->partial, error);
    }
    if (n > 1 && status == SQZ_OK) status = finish(r, error);
    for (uint32_t p = 0; p < n && status == SQZ_OK; p++) {
        const struct block theirs = block_of(r, layer, p, n_threads);
        if (p == me || theirs.n == 0) continue;
        keep_queries(r, &theirs);
        status = attend_class(r, &theirs, me, n, r->out + p * r->floats, r->partial, error);
    }
    if (n > 1 && status == SQZ_OK) {
        start_outputs(r, shape);
        status = finish(r, error);
    }
    if (node && status == SQZ_OK)
        memcpy(node->out, merge_processes(r, &mine, 0, 1),
               mine.n * shape->n_head * shape->head_dim * sizeof *node->out);
    return status;
}
