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
    size_t *first;   /* [n_layer] of layers with a window: the position of row 0 */
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

size_t sqz_held_room(const struct sqz_held_shards *held, size_t window_tokens)
{
    const size_t all = held->deal.n_tokens, turn = held->step * held->deal.block_tokens;
    if (!window_tokens) return sqz_held_tokens(held, held->deal.count);
    if (window_tokens >= all) return all;
    /* Those in work and a window before them; as much more, so that a row moves to the front about once. */
    const size_t room = window_tokens + (window_tokens > turn ? window_tokens : turn);
    return room < all ? room : all;
}

void sqz_rows_to_front(const struct sqz_layer_input *in, size_t capacity, size_t from, size_t n, size_t to_capacity)
{
    const size_t d = in->shape.head_dim;
    for (size_t h = 0; h < in->shape.n_head_kv && (from || to_capacity != capacity); h++) {
        memmove(in->keys + h * to_capacity * d, in->keys + (h * capacity + from) * d, n * d * sizeof *in->keys);
        memmove(in->values + h * to_capacity * d, in->values + (h * capacity + from) * d, n * d * sizeof *in->values);
    }
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
    free(r->first);
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
    r->first = calloc(n_layer, sizeof *r->first);
    r->messages = calloc(2 * step, sizeof *r->messages);
    r->queries = malloc(step * r->block * row * sizeof *r->queries);
    r->partial = malloc(depth_of(held) * r->floats * sizeof *r->partial);
    r->out = malloc(step * r->floats * sizeof *r->out);
    r->in = malloc(step * r->floats * sizeof *r->in);
    if (!r->at || !r->first || !r->messages || !r->queries || !r->partial || !r->out || !r->in) {
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

/* ---- A node of a layer with a window ------------------------------------------------------------ */

/* Whether process p has use for rows of the tokens in work at q: for its own tokens, of this turn or the next, or because they
 * are the window that stays. What no block behind sees crosses to nobody. */
static bool wants_rows(const struct sqz_reading_shards *r, const struct sqz_layer_input *in, uint32_t p, uint32_t q)
{
    const size_t all = r->held.deal.n_tokens, end = r->at[q] + r->n[q];
    const size_t next = r->at[p] > r->at[q] ? r->at[p] : r->at[p] + r->held.step * r->block;
    if (p == q || r->n[q] == 0) return false;
    return (next < all && next < end + in->window_tokens - 1) || (p == 0 && end + in->n_rows > all);
}

/* Room for all tokens in work behind the window of the first of them. */
static void advance(struct sqz_reading_shards *r, uint32_t layer)
{
    struct sqz_layer_input *in = &r->inputs[layer];
    const size_t room = sqz_held_room(&r->held, in->window_tokens), before = r->at[0];
    const size_t end = before + r->held.step * r->block, old = r->first[layer], window = in->window_tokens;
    size_t first = before > window ? before - window : 0;
    if ((end < r->held.deal.n_tokens ? end : r->held.deal.n_tokens) <= old + room || first <= old) return;
    sqz_rows_to_front(in, room, first - old, before - first, room);
    r->first[layer] = first;
}

/* Rows of the tokens in work: keys, then values, [K][n][D] each. */
static void start_rows(struct sqz_reading_shards *r, const struct sqz_layer_input *in,
                       const struct sqz_attention_node *node)
{
    const uint32_t n = r->held.step, me = r->held.first;
    const size_t head = (size_t)in->shape.n_head_kv * in->shape.head_dim;
    uint16_t *mine = (uint16_t *)r->queries;
    if (node) sqz_node_store_rows(node, &in->shape, mine, mine + r->n[me] * head, r->n[me], 0);
    for (uint32_t p = 0; p < n; p++) {
        r->messages[p] = (struct sqz_message){mine, wants_rows(r, in, p, me) ? 2 * r->n[me] * head * sizeof *mine : 0};
        r->messages[n + p] = (struct sqz_message){r->in + p * r->floats,
                                                  wants_rows(r, in, me, p) ? 2 * r->n[p] * head * sizeof *mine : 0};
    }
    r->exchange->start(r->exchange->user_data, r->messages, r->messages + n);
}

/* Rows that process p sent, to their place. */
static void put_rows(const struct sqz_reading_shards *r, uint32_t layer, uint32_t p)
{
    const struct sqz_layer_input *in = &r->inputs[layer];
    const size_t d = in->shape.head_dim, heads = in->shape.n_head_kv, n = r->n[p];
    const uint16_t *keys = (const uint16_t *)(r->in + p * r->floats), *values = keys + heads * n * d;
    const size_t room = sqz_held_room(&r->held, in->window_tokens), row = r->at[p] - r->first[layer];
    for (size_t h = 0; h < heads; h++) {
        memcpy(in->keys + (h * room + row) * d, keys + h * n * d, n * d * sizeof *keys);
        memcpy(in->values + (h * room + row) * d, values + h * n * d, n * d * sizeof *values);
    }
}

static enum sqz_status window_node(struct sqz_reading_shards *r, uint32_t layer, const struct sqz_attention_node *node,
                                   int n_threads, struct sqz_error *error)
{
    const struct sqz_layer_input *in = &r->inputs[layer];
    const uint32_t n = r->held.step, me = r->held.first;
    enum sqz_status status = SQZ_OK;
    advance(r, layer);
    if (n > 1) {
        start_rows(r, in, node);
        status = finish(r, error);
    }
    for (uint32_t p = 0; p < n && status == SQZ_OK; p++)
        if (wants_rows(r, in, me, p)) put_rows(r, layer, p);
    if (!node || status != SQZ_OK) return status;
    const struct sqz_backend_reading reading = {
        .node = node,
        .shape = in->shape,
        .keys = in->keys,
        .values = in->values,
        .capacity_rows = sqz_held_room(&r->held, in->window_tokens),
        .first_position = r->at[me] - r->first[layer],
        .window_tokens = in->window_tokens,
        .n_layers = r->n_layer,
        .n_threads = n_threads,
    };
    return r->place->ops->read(r->place, &reading, error);
}

void sqz_reading_shards_end(struct sqz_reading_shards *r)
{
    for (uint32_t l = 0; l < r->n_layer; l++) {
        struct sqz_layer_input *in = &r->inputs[l];
        const size_t room = sqz_held_room(&r->held, in->window_tokens), from = in->first_position - r->first[l];
        if (!in->window_tokens) continue;
        sqz_rows_to_front(in, room, from, in->n_rows, in->n_rows);
        r->first[l] = in->first_position;
    }
}

/* ---- Any node ------------------------------------------------------------------------------------ */

enum sqz_status sqz_reading_shards_node(struct sqz_reading_shards *r, uint32_t layer,
                                        const struct sqz_attention_node *node, int n_threads, struct sqz_error *error)
{
    if (r->inputs[layer].window_tokens) return window_node(r, layer, node, n_threads, error);
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
