/*
 * Attention on a graphics card; backend_cuda.h.
 *
 * A pass, which is one run of llama.cpp, begins with begin(): contexts are seen
 * to be on the card, own rows to have room, and what differs from token to token
 * goes there in one copy, the frame: where each token's own rows are and how many,
 * and its thresholds, for every layer. From then on a node is launches alone,
 * whose arguments stay the same as long as the key does that begin() gives, so
 * that all of a token can be one CUDA graph.
 *
 * Every token is a sequence of its own to the kernels, with a selection of its own,
 * as on the CPU. How those of one context go through it together card_ways.c says.
 * Groups of several contexts, each with selections of its own, are one call where
 * the card can; the others are launched side by side.
 */
#include "backend_cuda.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend_cpu.h"
#include "card.h"
#include "codes.h"
#include "error.h"
#include "lookup.h"
#include "method.h"
#include "plan.h"

static const size_t reserve_bytes = (size_t)1 << 30; /* left to llama.cpp when the limit is not given */

/* ---- A pass ------------------------------------------------------------------------------------ */

static enum sqz_status fail_part(struct sqz_backend_part *p, enum sqz_status status)
{
    p->status = status;
    return status;
}

static enum sqz_status prepare_part(struct sqz_card *cuda, struct sqz_backend_part *p, void *stream)
{
    struct sqz_own_rows *own = p->own;
    own->bound->busy = true;
    enum sqz_status status = sqz_card_make_resident(own->bound, p->error);
    if (status == SQZ_OK) status = sqz_card_ready_own(cuda, own, p->n_own, p->n_tokens, p->n_kept, stream, p->error);
    return status == SQZ_OK ? SQZ_OK : fail_part(p, status);
}

/* The frame's layout for n_tokens tokens of layers of this shape. */
static bool lay_out_frame(struct sqz_card *cuda, const struct sqz_bound *bound, size_t n_tokens)
{
    size_t at = 0, counts = 0;
    if (cuda->n_frame_layers < bound->n_layer) {
        struct sqz_card_frame *layers = realloc(cuda->frame_layers, bound->n_layer * sizeof *layers);
        if (!layers) return false;
        memset(layers + cuda->n_frame_layers, 0, (bound->n_layer - cuda->n_frame_layers) * sizeof *layers);
        cuda->frame_layers = layers;
        cuda->n_frame_layers = bound->n_layer;
    }
    for (uint32_t l = 0; l < bound->n_layer; l++) {
        struct sqz_card_frame *f = &cuda->frame_layers[l];
        if (!sqz_card_has(cuda, l)) continue;
        const size_t numbers = n_tokens * sqz_context_layer(bound->context, l)->shape.n_head_kv;
        f->users = at;
        f->thresholds = at += sqz_card_aligned(n_tokens * sizeof(struct sqz_cuda_user));
        f->tails = at += sqz_card_aligned(numbers * sizeof(float));
        at += sqz_card_aligned(numbers * sizeof(float));
        f->retained = counts;
        f->read = counts += numbers * sizeof(uint32_t);
        counts += numbers * sizeof(struct sqz_cuda_read);
        if (sqz_card_computes(bound, l)) cuda->last_layer = l;
    }
    cuda->counts_at = at;
    cuda->counts_bytes = counts;
    cuda->frame_bytes = at + counts;
    cuda->n_tokens = n_tokens;
    if (!sqz_card_grow(cuda, &cuda->frame, &cuda->frame_room, cuda->frame_bytes) ||
        !sqz_card_grow_pinned(cuda, (void **)&cuda->frame_host, &cuda->frame_host_room, cuda->frame_bytes) ||
        !sqz_card_grow_pinned(cuda, (void **)&cuda->counts_host, &cuda->counts_host_room, counts))
        return false;
    memset(cuda->frame_host + at, 0, counts);
    return true;
}

/* The first row that a token sees which is the last of n_own, counted over the context's rows and then its own; below 0:
 * all are within its window. */
static int64_t first_row_seen(const struct sqz_layer *layer, size_t n_own)
{
    return layer->sliding_window ? (int64_t)layer->n_rows + (int64_t)n_own - layer->n_window_tokens : 0;
}

/* What such a token sees at a layer that has own rows in planes. */
static struct sqz_cuda_user user_of_planes(const struct sqz_own_rows *own, uint32_t l, size_t n_own)
{
    const size_t flushed = sqz_card_own_flushed(n_own - 1);
    const size_t at = (flushed - own->recent.first) * own->bound->layers[l].layer.shape.head_dim;
    return (struct sqz_cuda_user){.keys = own->keys[l] + at,
                                  .values = own->values[l] + at,
                                  .capacity_rows = (uint32_t)own->recent.room,
                                  .n_rows = (uint32_t)(n_own - flushed),
                                  .n_plane_rows = (uint32_t)flushed,
                                  .planes = own->planes[l],
                                  .plane_capacity_rows = (uint32_t)own->plane_room};
}

/* What such a token sees at a layer. Where its window leaves own rows out, they begin later. */
static struct sqz_cuda_user user_of(const struct sqz_own_rows *own, uint32_t l, size_t n_own)
{
    const struct sqz_layer *layer = sqz_context_layer(own->bound->context, l);
    if (sqz_card_own_in_planes(own->bound, l)) return user_of_planes(own, l, n_own);
    const int64_t first = first_row_seen(layer, n_own), n = layer->n_rows;
    const size_t unseen = first > n ? (size_t)(first - n) : 0, at = unseen * sqz_card_dim(layer->shape.head_dim);
    const uint32_t of_context = first < 0 ? 0 : (uint32_t)(first - (int64_t)unseen);
    return (struct sqz_cuda_user){.keys = own->keys[l] + at,
                                  .values = own->values[l] + at,
                                  .capacity_rows = (uint32_t)own->whole.room,
                                  .n_rows = (uint32_t)(n_own - unseen),
                                  .first_row = of_context};
}

static void fill_frame(struct sqz_card *cuda, const struct sqz_backend_part *p)
{
    const struct sqz_own_rows *own = p->own;
    for (uint32_t l = 0; l < own->bound->n_layer; l++) {
        if (!sqz_card_computes(own->bound, l)) continue;
        const struct sqz_layer *layer = sqz_context_layer(own->bound->context, l);
        const struct sqz_card_frame *f = &cuda->frame_layers[l];
        const size_t k = layer->shape.n_head_kv;
        struct sqz_cuda_user *users = (struct sqz_cuda_user *)(cuda->frame_host + f->users) + p->first_token;
        float *threshold = (float *)(cuda->frame_host + f->thresholds) + p->first_token * k;
        float *tail = (float *)(cuda->frame_host + f->tails) + p->first_token * k;
        float position = SQZ_NO_POSITION;
        for (size_t h = 0; h < k; h++) {
            if (h == 0 || !layer->global_share) position = sqz_head_position(layer, (uint32_t)h, p->budget);
            const struct sqz_head_plan plan = sqz_head_plan_of(layer, (uint32_t)h, position, p->log_offset);
            threshold[h] = plan.log_threshold;
            tail[h] = plan.tail_gain;
        }
        for (size_t t = 0; t < p->n_tokens; t++) {
            users[t] = user_of(own, l, p->n_own + t + 1);
            if (t == 0) continue;
            memcpy(threshold + t * k, threshold, k * sizeof *threshold);
            memcpy(tail + t * k, tail, k * sizeof *tail);
        }
    }
}

/* Of a token's queries on the card, and of its outputs. */
static size_t query_bytes(const struct sqz_layer_shape *shape)
{
    return (size_t)shape->n_head * sqz_card_dim(shape->head_dim) * sizeof(uint16_t);
}

/* Streams that the calls of the pass are launched on: the pass's own and sides. */
static size_t n_streams(const struct sqz_card *cuda)
{
    return cuda->n_places <= SQZ_CARD_SIDES ? cuda->n_places : SQZ_CARD_SIDES + 1;
}

/* A call of group number i at a layer. */
static struct sqz_cuda_attend_args args_of(const struct sqz_card *cuda, size_t i, uint32_t l)
{
    const struct sqz_card_group *g = &cuda->groups[i];
    const struct sqz_layer *layer = sqz_context_layer(g->bound->context, l);
    const struct sqz_card_frame *f = &cuda->frame_layers[l];
    const size_t k = layer->shape.n_head_kv, row = query_bytes(&layer->shape);
    struct sqz_cuda_attend_args a = {
        .layer = g->upper ? &g->bound->layers[l].upper : &g->bound->layers[l].layer,
        .plan = {.log_threshold = (const float *)(cuda->frame + f->thresholds) + g->first_token * k,
                 .variance_gain = g->bound->layers[l].variance_gain,
                 .tail_skip = layer->value_skip ? SQZ_VALUE_SKIP : 0.0f,
                 .tail_gain = layer->tail ? (const float *)(cuda->frame + f->tails) + g->first_token * k : NULL},
        .dense = g->dense || layer->n_levels == 0,
        .together = !g->shared && g->way != SQZ_TOGETHER_EACH && g->n_tokens > 1 && !layer->sliding_window,
        .n_sequences = g->shared ? 1 : (uint32_t)g->n_tokens,
        .n_tokens = g->shared ? (uint32_t)g->n_tokens : 1,
        .queries = cuda->queries + g->first_token * row,
        .out = cuda->out + g->first_token * row,
        .n_user = (uint32_t)g->n_user,
        .n_retained = (uint32_t *)(cuda->frame + cuda->counts_at + f->retained) + g->first_token * k,
        .read = (struct sqz_cuda_read *)(cuda->frame + cuda->counts_at + f->read) + g->first_token * k,
        .workspace = cuda->workspace + g->place % n_streams(cuda) * cuda->workspace_each,
        .workspace_bytes = cuda->workspace_each,
    };
    const bool in_planes = sqz_card_own_in_planes(g->bound, l);
    if (in_planes && g->own_planes) a.user_layer = g->shared ? &g->bound->layers[l].layer : a.layer;
    if (in_planes && !g->shared) a.n_user = 2 * SQZ_CUDA_USER_BLOCK; /* as F16, at most */
    if (g->shared) {
        const struct sqz_card_f16_rows *rows = in_planes ? &g->own->recent : &g->own->whole;
        a.user_keys = g->own->keys[l];
        a.user_values = g->own->values[l];
        a.user_capacity_rows = (uint32_t)rows->room;
        a.user_first_row = (uint32_t)rows->first;
        a.user_planes = g->own->planes[l];
        a.user_plane_capacity_rows = (uint32_t)g->own->plane_room;
        a.n_plane_rows = (uint32_t)(g->own->n_flushed * SQZ_CUDA_USER_BLOCK);
        a.windowed = layer->sliding_window;
        a.first_row = (int32_t)first_row_seen(layer, g->n_user - g->n_tokens + 1);
    } else {
        a.users = (const struct sqz_cuda_user *)(cuda->frame + f->users) + g->first_token;
        a.plan.per_sequence = true;
    }
    return a;
}

/* What is missing of the sides that the pass needs. */
static bool make_sides(struct sqz_card *cuda)
{
    const struct sqz_gpu_calls *calls = cuda->calls;
    bool ok = n_streams(cuda) < 2 || cuda->come || (cuda->come = calls->create_event());
    for (size_t i = 0; i + 1 < n_streams(cuda) && ok; i++) {
        struct sqz_card_side *s = &cuda->sides[i];
        ok = (s->stream || (s->stream = calls->create_stream())) && (s->done || (s->done = calls->create_event()));
    }
    return ok;
}

/* Of n groups from number i on as one call at a layer; 0: they cannot be. */
static size_t joined_bytes(const struct sqz_card *cuda, size_t i, size_t n, uint32_t l)
{
    struct sqz_cuda_attend_args calls[SQZ_MOST_SEQUENCES];
    for (size_t j = 0; j < n; j++) calls[j] = args_of(cuda, i + j, l);
    return cuda->calls->several_workspace_bytes(calls, n);
}

static bool are_joined(const struct sqz_card *cuda, size_t i, size_t n)
{
    const struct sqz_bound *bound = cuda->groups[i].bound;
    bool joined = n < 2 || !bound->n_on_cpu;
    for (uint32_t l = 0; l < bound->n_layer && joined && n > 1; l++)
        joined = !sqz_card_computes(bound, l) || joined_bytes(cuda, i, n, l) > 0;
    return joined;
}

/* Whether a group may be computed together with the one before it. */
static bool may_join(const struct sqz_card *cuda, size_t i)
{
    const struct sqz_card_group *g = &cuda->groups[i], *before = g - 1;
    return !g->shared && !before->shared && !g->bound->apart && !before->bound->apart &&
           before->first_token + before->n_tokens == g->first_token && are_joined(cuda, i - 1, 2);
}

/* Groups from number i on that one call computes: as many as that takes, when neighbours go together. */
static size_t join_from(const struct sqz_card *cuda, size_t i)
{
    size_t n = 1;
    while (i + n < cuda->n_groups && may_join(cuda, i + n)) n++;
    while (!are_joined(cuda, i, n)) n--;
    return n;
}

/* Sets what calls compute the groups; known: as it is noted. */
static void join_groups(struct sqz_card *cuda, bool known)
{
    cuda->n_places = 1; /* streams are told apart when all are known */
    for (size_t i = 0; i < cuda->n_groups && !known; i++) cuda->groups[i].place = cuda->joined[i] = 0;
    for (size_t i = 0; i < cuda->n_groups && !known; i += cuda->joined[i]) cuda->joined[i] = join_from(cuda, i);
    size_t place = 0;
    for (size_t i = 0; i < cuda->n_groups; i++) {
        cuda->groups[i].n_joined = cuda->joined[i];
        if (cuda->joined[i]) place++;
        cuda->groups[i].place = place - 1;
    }
    cuda->n_places = place;
}

/* What the largest call of the pass takes; a call that has others joined may still be made for each of them. */
static size_t most_workspace(const struct sqz_card *cuda)
{
    size_t most = 0;
    for (size_t i = 0; i < cuda->n_groups; i++) {
        const struct sqz_card_group *g = &cuda->groups[i];
        for (uint32_t l = 0; l < g->bound->n_layer; l++) {
            if (!sqz_card_computes(g->bound, l)) continue;
            const struct sqz_cuda_attend_args a = args_of(cuda, i, l);
            const size_t bytes = cuda->calls->workspace_bytes(&a);
            const size_t joined = g->n_joined > 1 ? joined_bytes(cuda, i, g->n_joined, l) : 0;
            if (bytes > most) most = bytes;
            if (joined > most) most = joined;
        }
    }
    return most;
}

static bool make_scratch(struct sqz_card *cuda, const struct sqz_bound *bound)
{
    size_t row = 0;
    for (uint32_t l = 0; l < bound->n_layer; l++) {
        const size_t bytes = query_bytes(&sqz_context_layer(bound->context, l)->shape);
        if (bytes > row) row = bytes;
    }
    if (!sqz_card_grow(cuda, &cuda->queries, &cuda->queries_room, cuda->n_tokens * row) ||
        !sqz_card_grow(cuda, &cuda->out, &cuda->out_room, cuda->n_tokens * row))
        return false;
    join_groups(cuda, false);
    const size_t workspace = most_workspace(cuda);
    if (!sqz_card_grow(cuda, &cuda->workspace, &cuda->workspace_room, n_streams(cuda) * sqz_card_aligned(workspace)))
        return false;
    cuda->workspace_each = cuda->workspace_room / n_streams(cuda) / SQZ_CARD_ALIGN * SQZ_CARD_ALIGN;
    return make_sides(cuda);
}

static uint64_t mixed(uint64_t key, uint64_t x)
{
    return (key ^ x) * 0x100000001b3ull;
}

/* What the launches of the pass depend on; 0 where they cannot be the same twice. */
static uint64_t key_of_pass(const struct sqz_card *cuda)
{
    uint64_t key = 0xcbf29ce484222325ull;
    const void *const scratch[] = {cuda->frame, cuda->counts_host, cuda->queries, cuda->out, cuda->workspace};
    for (size_t i = 0; i < sizeof scratch / sizeof *scratch; i++) key = mixed(key, (uintptr_t)scratch[i]);
    key = mixed(mixed(key, cuda->n_tokens), cuda->workspace_each);
    for (size_t i = 0; i < cuda->n_groups; i++) {
        const struct sqz_card_group *g = &cuda->groups[i];
        if (g->shared || g->bound->n_on_cpu) return 0;
        key = mixed(mixed(mixed(key, g->bound->generation), g->first_token), g->n_tokens);
        key = mixed(mixed(mixed(mixed(mixed(key, g->n_user), g->dense), g->way), g->upper), g->own_planes);
    }
    return key ? key : 1;
}

/* Scratch for the pass, and how its groups are joined: as it was, where it is a pass like the one before. */
static bool ready_scratch(struct sqz_card *cuda, const struct sqz_bound *bound)
{
    const uint64_t before = key_of_pass(cuda);
    if (before && before == cuda->scratch_key) {
        join_groups(cuda, true);
        return true;
    }
    cuda->scratch_key = 0;
    if (!make_scratch(cuda, bound)) return false;
    cuda->scratch_key = key_of_pass(cuda);
    return true;
}

static uint64_t begin(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    struct sqz_backend_part *parts[SQZ_MOST_SEQUENCES];
    size_t n_tokens = 0, n_parts = 0;
    const struct sqz_bound *bound = NULL;
    const bool first = cuda->n_groups == 0; /* else there have been other nodes of the pass, which have counted */
    cuda->n_groups = cuda->n_places = 0;
    cuda->calls->use(cuda->card);
    for (struct sqz_bound *b = cuda->contexts; b; b = b->next) b->busy = false;
    for (size_t i = 0; i < call->n_parts; i++) {
        struct sqz_backend_part *p = call->parts[i];
        if (prepare_part(cuda, p, call->stream) != SQZ_OK) continue;
        bound = p->own->bound;
        if (p->first_token + p->n_tokens > n_tokens) n_tokens = p->first_token + p->n_tokens;
        parts[n_parts++] = p;
    }
    if (!bound) return 0;
    sqz_card_group_parts(cuda, parts, n_parts);
    bool ok = lay_out_frame(cuda, bound, n_tokens) && ready_scratch(cuda, bound);
    for (size_t i = 0; i < call->n_parts && ok; i++)
        if (call->parts[i]->status == SQZ_OK) fill_frame(cuda, call->parts[i]);
    const size_t bytes = first ? cuda->frame_bytes : cuda->counts_at;
    if (ok) ok = cuda->calls->put(cuda->frame, cuda->frame_host, bytes, call->stream);
    if (ok) return key_of_pass(cuda);
    for (size_t i = 0; i < call->n_parts; i++)
        fail_part(call->parts[i], sqz_card_no_memory(cuda, cuda->frame_bytes, "a batch", call->parts[i]->error));
    cuda->n_groups = 0;
    return 0;
}

/* ---- On the CPU, from copies --------------------------------------------------------------------- */

struct cpu_call {
    struct sqz_backend_call call;
    struct sqz_backend_part parts[SQZ_MOST_SEQUENCES], *pointers[SQZ_MOST_SEQUENCES];
};

static void cpu_call_of(struct cpu_call *c, const struct sqz_backend_call *call, const struct sqz_attention_node *node)
{
    c->call = *call;
    c->call.node = node;
    c->call.parts = c->pointers;
    c->call.stream = NULL;
    for (size_t i = 0; i < call->n_parts; i++) {
        c->parts[i] = *call->parts[i];
        c->parts[i].own = call->parts[i]->own->cpu;
        c->pointers[i] = &c->parts[i];
    }
}

static void fail_all(const struct sqz_card *cuda, const struct sqz_backend_call *call, enum sqz_status status)
{
    for (size_t i = 0; i < call->n_parts; i++)
        fail_part(call->parts[i], sqz_error_set(call->parts[i]->error, status, "attention on the card failed: %s",
                                                cuda->calls->complaint()));
}

/* Whether this node is the CPU's; all contexts of a model have layers of the same shapes. */
static bool is_on_cpu(const struct sqz_backend_call *call)
{
    return !call->stream || call->parts[0]->own->bound->layers[call->node->layer].on_cpu;
}

static const struct sqz_layer_shape *shape_of(const struct sqz_backend_call *call)
{
    return &sqz_context_layer(call->parts[0]->own->bound->context, call->node->layer)->shape;
}

static void take_on_cpu(struct sqz_card *cuda, const struct sqz_backend_call *call)
{
    struct cpu_call c;
    if (call->stream && !sqz_card_stage(cuda, call->node, shape_of(call), call->stream)) {
        fail_all(cuda, call, SQZ_ERROR_INTERNAL);
        return;
    }
    cpu_call_of(&c, call, call->stream ? &cuda->staged : call->node);
    cuda->cpu->ops->take(cuda->cpu, &c.call);
}

static void attend_on_cpu(struct sqz_card *cuda, const struct sqz_backend_call *call)
{
    struct cpu_call c;
    cpu_call_of(&c, call, call->stream ? &cuda->staged : call->node);
    cuda->cpu->ops->attend(cuda->cpu, &c.call);
    for (size_t i = 0; i < call->n_parts; i++)
        if (c.parts[i].status != SQZ_OK) call->parts[i]->status = c.parts[i].status;
    if (call->stream && !sqz_card_put_staged(cuda, call->node, shape_of(call), call->stream))
        fail_all(cuda, call, SQZ_ERROR_INTERNAL);
}

/* ---- Attention ---------------------------------------------------------------------- */

/* Tokens as llama.cpp has them. */
static struct sqz_gpu_node node_of(const struct sqz_card *cuda, const struct sqz_backend_call *call, size_t first,
                                   size_t n)
{
    const struct sqz_layer_shape *shape = shape_of(call);
    const struct sqz_card_frame *f = &cuda->frame_layers[call->node->layer];
    const struct sqz_attention_node part = sqz_node_part(call->node, shape, first, n);
    struct sqz_gpu_node node = sqz_card_node(&part, shape);
    node.users = (const struct sqz_cuda_user *)(cuda->frame + f->users) + first;
    node.queries_f16 = cuda->queries + first * query_bytes(shape);
    return node;
}

/* On the card tokens are taken when they are attended to: that takes fewer launches. */
static void take(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    if (is_on_cpu(call)) take_on_cpu(sqz_card_of(backend), call);
}

/* From the node to the node, n groups from number i on. */
static enum sqz_status attend_joined(struct sqz_card *cuda, const struct sqz_backend_call *call, size_t i, size_t n,
                                     void *stream)
{
    const struct sqz_layer_shape *shape = shape_of(call);
    const struct sqz_card_group *g = &cuda->groups[i];
    struct sqz_cuda_attend_args args[SQZ_MOST_SEQUENCES];
    size_t n_tokens = 0;
    for (size_t j = 0; j < n; j++) {
        args[j] = args_of(cuda, i + j, call->node->layer);
        n_tokens += g[j].n_tokens;
    }
    const struct sqz_gpu_node node = node_of(cuda, call, g->first_token, n_tokens);
    float *out = call->node->out + g->first_token * shape->n_head * shape->head_dim;
    return n == 1 ? cuda->calls->attend_node(args, &node, out, stream)
                  : cuda->calls->attend_several(args, n, &node, out, stream);
}

/* The groups of the call that begins with number i. One that the card refuses is made of a call each, from the next pass
 * on side by side. */
static enum sqz_status attend_place(struct sqz_card *cuda, const struct sqz_backend_call *call, size_t i, void *stream)
{
    const size_t n = cuda->groups[i].n_joined;
    enum sqz_status status = attend_joined(cuda, call, i, n, stream);
    cuda->n_joined += n > 1 && status == SQZ_OK;
    if (status != SQZ_ERROR_UNSUPPORTED || n == 1) return status;
    cuda->scratch_key = 0;
    status = SQZ_OK;
    for (size_t j = i; j < i + n && status == SQZ_OK; j++) {
        cuda->groups[j].bound->apart = true;
        status = attend_joined(cuda, call, j, 1, stream);
    }
    return status;
}

/* Calls side by side; what follows on the stream follows all of them. */
static enum sqz_status attend_places(struct sqz_card *cuda, const struct sqz_backend_call *call)
{
    const struct sqz_gpu_calls *calls = cuda->calls;
    const size_t n = n_streams(cuda);
    enum sqz_status status = SQZ_OK;
    bool ok = n < 2 || calls->record(cuda->come, call->stream);
    for (size_t i = 0; i + 1 < n && ok; i++) ok = calls->follow(cuda->sides[i].stream, cuda->come);
    for (size_t i = 0; i < cuda->n_groups && ok && status == SQZ_OK; i += cuda->groups[i].n_joined) {
        const size_t side = cuda->groups[i].place % n;
        status = attend_place(cuda, call, i, side ? cuda->sides[side - 1].stream : call->stream);
    }
    for (size_t i = 0; i + 1 < n && ok; i++)
        ok = calls->record(cuda->sides[i].done, cuda->sides[i].stream) &&
             calls->follow(call->stream, cuda->sides[i].done);
    return ok ? status : SQZ_ERROR_INTERNAL;
}

/* What the pass has read comes with what else it gives: nobody waits for it. */
static bool bring_counts(const struct sqz_card *cuda, void *stream)
{
    return cuda->calls->get(cuda->counts_host, cuda->frame + cuda->counts_at, cuda->counts_bytes, stream);
}

static void attend(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    const uint32_t layer = call->node->layer;
    enum sqz_status status;
    if (is_on_cpu(call)) {
        attend_on_cpu(cuda, call);
        return;
    }
    cuda->frame_layers[layer].runs_here = true;
    status = attend_places(cuda, call);
    if (status == SQZ_OK && layer == cuda->last_layer && !bring_counts(cuda, call->stream)) status = SQZ_ERROR_INTERNAL;
    if (status != SQZ_OK) fail_all(cuda, call, status);
}

/* A context of this place lies in this place alone. */
static void total(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    (void)backend;
    for (size_t i = 0; i < call->n_parts; i++)
        fail_part(call->parts[i], sqz_error_set(call->parts[i]->error, SQZ_ERROR_UNSUPPORTED,
                                                "a context in several places is not supported on a card"));
}

/* ---- What a pass read ------------------------------------------------------------------------------------ */

static const struct sqz_card_group *group_of(const struct sqz_card *cuda, const struct sqz_backend_part *p)
{
    size_t i = 0;
    while (p->first_token >= cuda->groups[i].first_token + cuda->groups[i].n_tokens) i++;
    return &cuda->groups[i];
}

/* What selections read beside rows. */
static void add_beside(const struct sqz_card *cuda, const struct sqz_layer *layer, uint32_t l,
                       const struct sqz_backend_part *p, size_t n_selections)
{
    const size_t row = (size_t)layer->shape.head_dim * sizeof(uint16_t);
    const struct sqz_cuda_read *read = sqz_card_read_beside(cuda, l) + p->first_token * layer->shape.n_head_kv;
    uint64_t centroids = n_selections * layer->level[layer->n_levels - 1].n_clusters, values = 0, codes = 0, coded = 0;
    for (size_t i = 0; i < n_selections; i++) {
        centroids += read[i].centroids;
        values += read[i].value_centroids;
        codes += read[i].codes;
        coded += read[i].codes > 0;
    }
    p->stats->centroid_bytes += centroids * sqz_centroid_bytes(layer) + values * row +
                                codes * sqz_code_key_bytes(&layer->codes) + coded * sqz_code_head_bytes(layer);
    p->stats->coded_keys += codes;
}

/* What the context's pass for all has read is what each of its tokens has. */
static void add_stats(const struct sqz_card *cuda, const struct sqz_card_group *g, const struct sqz_backend_part *p,
                      uint32_t l)
{
    const struct sqz_layer *layer = sqz_context_layer(p->own->bound->context, l);
    const size_t k = layer->shape.n_head_kv, n = layer->n_rows, row = (size_t)layer->shape.head_dim * 2;
    const bool dense = g->dense || layer->n_levels == 0, one = g->way == SQZ_TOGETHER_ONE && !g->shared;
    const uint32_t *groups = sqz_card_retained(cuda, l) + (one ? g->first_token : p->first_token) * k;
    const size_t n_selections = (g->shared ? 1 : p->n_tokens) * k;
    const struct sqz_layer *there = g->upper ? &g->bound->layers[l].upper : &g->bound->layers[l].layer;
    uint64_t rows = 0;
    for (size_t i = 0; i < n_selections; i++) {
        const uint64_t groups_rows = dense ? n : (uint64_t)groups[one ? i % k : i] * 8;
        const uint64_t read = groups_rows < n ? groups_rows : n;
        rows += read;
        p->stats->key_bytes += sqz_rows_bytes(&there->keys, 0, read, layer->shape.head_dim);
        p->stats->value_bytes += sqz_rows_bytes(&there->values, 0, read, layer->shape.head_dim);
    }
    if (!dense) add_beside(cuda, layer, l, p, n_selections);
    p->stats->n_selections += n_selections;
    p->stats->context_bytes += n_selections * 2 * n * row;
    p->stats->retained_keys += rows;
    p->stats->total_keys += n_selections * n;
}

/* Layers that are not computed here have been counted at their nodes. */
static void count_read(struct sqz_backend *backend, const struct sqz_backend_call *call, uint32_t layer)
{
    const struct sqz_card *cuda = sqz_card_of(backend);
    if (cuda->n_groups == 0 || layer >= cuda->n_frame_layers || !cuda->frame_layers[layer].runs_here) return;
    for (size_t i = 0; i < call->n_parts; i++) {
        struct sqz_backend_part *p = call->parts[i];
        if (!sqz_card_computes(p->own->bound, layer) ||
            sqz_context_layer(p->own->bound->context, layer)->sliding_window)
            continue;
        const struct sqz_card_group *g = group_of(cuda, p);
        p->united = g->shared || g->way != SQZ_TOGETHER_EACH;
        add_stats(cuda, g, p, layer);
    }
}

static void finish(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    for (size_t i = 0; i < cuda->n_groups && call->n_parts; i++) sqz_card_learn(cuda, &cuda->groups[i]);
    cuda->n_groups = 0;
}

/* ---- The place -------------------------------------------------------------------------------------------------- */

static const struct sqz_backend_ops ops = {
    .name = "CUDA",
    .steered = true,
    .bind = sqz_card_bind,
    .unbind = sqz_card_unbind,
    .fallback = sqz_card_fallback,
    .create_own = sqz_card_create_own,
    .free_own = sqz_card_free_own,
    .own_bytes = sqz_card_own_bytes,
    .begin = begin,
    .take = take,
    .attend = attend,
    .total = total,
    .count_read = count_read,
    .finish = finish,
    .plan_reading = sqz_card_plan_reading,
    .read = sqz_card_read,
    .bring_rows = sqz_card_bring_rows,
    .builder = &sqz_card_builder,
    .reading_fallback = sqz_card_reading_fallback,
    .end_reading = sqz_card_end_reading,
    .fetch_queries = sqz_card_fetch_queries,
};

static size_t free_on_card(const struct sqz_gpu_calls *calls, int card)
{
    struct sqz_gpu_card info;
    if (!calls->card(card, &info)) return 0;
    return info.free_bytes > reserve_bytes ? info.free_bytes - reserve_bytes : 0;
}

enum sqz_status sqz_backend_cuda_create(struct sqz_backend **out, const struct sqz_gpu_calls *calls, int card,
                                        size_t memory_bytes, enum sqz_together together,
                                        const struct sqz_model_layer *layers, int n_threads, struct sqz_error *error)
{
    struct sqz_card *cuda = calloc(1, sizeof *cuda);
    *out = NULL;
    if (!cuda) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for attention");
    cuda->base.ops = &ops;
    cuda->calls = calls;
    cuda->card = card;
    cuda->together = together;
    cuda->n_threads = n_threads;
    cuda->model_layers = layers;
    enum sqz_status status = sqz_backend_cpu_create(&cuda->cpu, n_threads, error);
    if (status == SQZ_OK) sqz_backend_cpu_keep_own_f16(cuda->cpu, true); /* of layers that it falls back for */
    if (status == SQZ_OK && (!calls->use(card) || !(cuda->stream = calls->create_stream())))
        status = sqz_error_set(error, SQZ_ERROR_UNSUPPORTED, "card %d cannot be used: %s", card, calls->complaint());
    cuda->limit = memory_bytes ? memory_bytes : free_on_card(calls, card);
    if (status != SQZ_OK) {
        sqz_backend_cuda_free(&cuda->base);
        return status;
    }
    *out = &cuda->base;
    return SQZ_OK;
}

void sqz_backend_cuda_free(struct sqz_backend *backend)
{
    if (!backend) return;
    struct sqz_card *cuda = sqz_card_of(backend);
    const struct sqz_gpu_calls *calls = cuda->calls;
    calls->use(cuda->card);
    if (cuda->stream) sqz_card_end_reading(backend), calls->free_stream(cuda->stream);
    sqz_card_free_uploads(cuda);
    for (size_t i = 0; i < SQZ_CARD_SIDES; i++) {
        if (cuda->sides[i].stream) calls->free_stream(cuda->sides[i].stream);
        if (cuda->sides[i].done) calls->free_event(cuda->sides[i].done);
    }
    if (cuda->come) calls->free_event(cuda->come);
    sqz_card_give(cuda, cuda->frame, cuda->frame_room);
    sqz_card_give(cuda, cuda->queries, cuda->queries_room);
    sqz_card_give(cuda, cuda->out, cuda->out_room);
    sqz_card_give(cuda, cuda->workspace, cuda->workspace_room);
    if (cuda->frame_host) calls->release_pinned(cuda->frame_host);
    if (cuda->counts_host) calls->release_pinned(cuda->counts_host);
    if (cuda->staging) calls->release_pinned(cuda->staging);
    sqz_backend_cpu_free(cuda->cpu);
    free(cuda->frame_layers);
    free(cuda);
}

struct sqz_backend_cuda_use sqz_backend_cuda_use(const struct sqz_backend *backend)
{
    const struct sqz_card *cuda = (const struct sqz_card *)backend;
    struct sqz_backend_cuda_use use = {.memory_bytes = cuda->used,
                                       .limit_bytes = cuda->limit,
                                       .n_uploads = cuda->n_uploads,
                                       .n_evictions = cuda->n_evictions,
                                       .n_joined = cuda->n_joined};
    for (const struct sqz_bound *b = cuda->contexts; b; b = b->next) {
        use.n_resident += b->resident;
        use.n_cpu_layers += b->n_on_cpu;
    }
    return use;
}
