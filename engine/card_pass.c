/*
 * What a pass needs on a card before its first node; card.h. The frame is what
 * differs from token to token: where each token's own rows are and how many, and
 * its thresholds, for every layer. Calls are laid out for the groups of the pass,
 * and scratch memory is sized for them, when passes change.
 */
#include "card.h"

#include <stdlib.h>
#include <string.h>

#include "lookup.h"
#include "method.h"
#include "plan.h"

bool sqz_card_lay_out_frame(struct sqz_card *cuda, const struct sqz_bound *bound, size_t n_tokens)
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

void sqz_card_fill_frame(struct sqz_card *cuda, const struct sqz_bound *bound, const struct sqz_own_rows *own,
                         const struct sqz_backend_part *p)
{
    for (uint32_t l = 0; l < bound->n_layer; l++) {
        if (!sqz_card_computes(bound, l)) continue;
        const struct sqz_layer *layer = sqz_context_layer(bound->context, l);
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
            if (own) users[t] = user_of(own, l, p->n_own + t + 1);
            if (t == 0) continue;
            memcpy(threshold + t * k, threshold, k * sizeof *threshold);
            memcpy(tail + t * k, tail, k * sizeof *tail);
        }
    }
}

bool sqz_card_put_frame(struct sqz_card *cuda, bool first, void *stream)
{
    const size_t bytes = first ? cuda->frame_bytes : cuda->counts_at;
    return cuda->calls->put(cuda->frame, cuda->frame_host, bytes, stream);
}

bool sqz_card_bring_counts(const struct sqz_card *cuda, void *stream)
{
    return cuda->calls->get(cuda->counts_host, cuda->frame + cuda->counts_at, cuda->counts_bytes, stream);
}

/* ---- Calls ---------------------------------------------------------------------------------------- */

size_t sqz_card_query_bytes(const struct sqz_layer_shape *shape)
{
    return (size_t)shape->n_head * sqz_card_dim(shape->head_dim) * sizeof(uint16_t);
}

size_t sqz_card_streams(const struct sqz_card *cuda)
{
    for (size_t i = 0; i < cuda->n_groups; i++)
        if (cuda->groups[i].bound->ranks.n_ranks) return 1; /* cards meet at one call at a time */
    return cuda->n_places <= SQZ_CARD_SIDES ? cuda->n_places : SQZ_CARD_SIDES + 1;
}

struct sqz_cuda_attend_args sqz_card_args(const struct sqz_card *cuda, size_t i, uint32_t l)
{
    const struct sqz_card_group *g = &cuda->groups[i];
    const struct sqz_layer *layer = sqz_context_layer(g->bound->context, l);
    const struct sqz_card_frame *f = &cuda->frame_layers[l];
    const size_t k = layer->shape.n_head_kv, row = sqz_card_query_bytes(&layer->shape);
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
        .workspace = cuda->workspace + g->place % sqz_card_streams(cuda) * cuda->workspace_each,
        .workspace_bytes = cuda->workspace_each,
    };
    if (g->bound->ranks.n_ranks && g->way == SQZ_TOGETHER_EACH && !layer->sliding_window) a.ranks = &g->bound->ranks;
    const bool in_planes = g->own && sqz_card_own_in_planes(g->bound, l);
    if (in_planes && g->own_planes) a.user_layer = g->shared ? &g->bound->layers[l].layer : a.layer;
    if (in_planes && !g->shared) a.n_user = 2 * SQZ_CUDA_USER_BLOCK; /* as F16, at most */
    if (g->shared && g->own) {
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
    } else if (!g->shared) {
        a.users = g->own ? (const struct sqz_cuda_user *)(cuda->frame + f->users) + g->first_token : NULL;
        a.plan.per_sequence = true;
    }
    return a;
}

struct sqz_gpu_node sqz_card_tokens(const struct sqz_card *cuda, const struct sqz_attention_node *node,
                                    const struct sqz_layer_shape *shape, size_t first, size_t n)
{
    const struct sqz_card_frame *f = &cuda->frame_layers[node->layer];
    const struct sqz_attention_node part = sqz_node_part(node, shape, first, n);
    struct sqz_gpu_node tokens = sqz_card_node(&part, shape);
    tokens.users = (const struct sqz_cuda_user *)(cuda->frame + f->users) + first;
    tokens.queries_f16 = cuda->queries + first * sqz_card_query_bytes(shape);
    return tokens;
}

/* What is missing of the sides that the pass needs. */
static bool make_sides(struct sqz_card *cuda)
{
    const struct sqz_gpu_calls *calls = cuda->calls;
    bool ok = sqz_card_streams(cuda) < 2 || cuda->come || (cuda->come = calls->create_event());
    for (size_t i = 0; i + 1 < sqz_card_streams(cuda) && ok; i++) {
        struct sqz_card_side *s = &cuda->sides[i];
        ok = (s->stream || (s->stream = calls->create_stream())) && (s->done || (s->done = calls->create_event()));
    }
    return ok;
}

/* Of n groups from number i on as one call at a layer; 0: they cannot be. */
static size_t joined_bytes(const struct sqz_card *cuda, size_t i, size_t n, uint32_t l)
{
    struct sqz_cuda_attend_args calls[SQZ_MOST_SEQUENCES];
    for (size_t j = 0; j < n; j++) calls[j] = sqz_card_args(cuda, i + j, l);
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
            const struct sqz_cuda_attend_args a = sqz_card_args(cuda, i, l);
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
        const size_t bytes = sqz_card_query_bytes(&sqz_context_layer(bound->context, l)->shape);
        if (bytes > row) row = bytes;
    }
    if (!sqz_card_grow(cuda, &cuda->queries, &cuda->queries_room, cuda->n_tokens * row) ||
        !sqz_card_grow(cuda, &cuda->out, &cuda->out_room, cuda->n_tokens * row))
        return false;
    join_groups(cuda, false);
    const size_t workspace = most_workspace(cuda);
    if (!sqz_card_grow(cuda, &cuda->workspace, &cuda->workspace_room,
                       sqz_card_streams(cuda) * sqz_card_aligned(workspace)))
        return false;
    cuda->workspace_each = cuda->workspace_room / sqz_card_streams(cuda) / SQZ_CARD_ALIGN * SQZ_CARD_ALIGN;
    return make_sides(cuda);
}

uint64_t sqz_card_mixed(uint64_t key, uint64_t x)
{
    return (key ^ x) * 0x100000001b3ull;
}

uint64_t sqz_card_key(const struct sqz_card *cuda)
{
    uint64_t key = 0xcbf29ce484222325ull;
    const void *const scratch[] = {cuda->frame,   cuda->frame_host, cuda->counts_host,
                                   cuda->queries, cuda->out,        cuda->workspace};
    for (size_t i = 0; i < sizeof scratch / sizeof *scratch; i++) key = sqz_card_mixed(key, (uintptr_t)scratch[i]);
    key = sqz_card_mixed(sqz_card_mixed(key, cuda->n_tokens), cuda->workspace_each);
    for (size_t i = 0; i < cuda->n_groups; i++) {
        const struct sqz_card_group *g = &cuda->groups[i];
        if (g->shared || g->bound->n_on_cpu) return 0;
        key = sqz_card_mixed(sqz_card_mixed(sqz_card_mixed(key, g->bound->generation), g->first_token), g->n_tokens);
        key = sqz_card_mixed(sqz_card_mixed(sqz_card_mixed(key, g->n_user), g->dense), g->way);
        key = sqz_card_mixed(sqz_card_mixed(key, g->upper), g->own_planes);
    }
    return key ? key : 1;
}

bool sqz_card_ready_scratch(struct sqz_card *cuda, const struct sqz_bound *bound)
{
    const uint64_t before = sqz_card_key(cuda);
    if (before && before == cuda->scratch_key) {
        join_groups(cuda, true);
        return true;
    }
    cuda->scratch_key = 0;
    if (!make_scratch(cuda, bound)) return false;
    cuda->scratch_key = sqz_card_key(cuda);
    return true;
}
