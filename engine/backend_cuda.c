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

/* The same pass on the cards that share rows with this one. */
static bool begin_others(struct sqz_card *cuda, struct sqz_backend_part *const *parts, size_t n_parts, bool first,
                         void *stream)
{
    struct sqz_error error;
    const enum sqz_status status = sqz_card_begin_others(cuda, parts, n_parts, first, stream, &error);
    for (size_t i = 0; i < n_parts && status != SQZ_OK; i++)
        fail_part(parts[i], sqz_error_set(parts[i]->error, status, "%s", error.message));
    return status == SQZ_OK;
}

static uint64_t key_of_cards(const struct sqz_card *cuda)
{
    uint64_t key = sqz_card_key(cuda);
    for (uint32_t r = 1; cuda->ranks && r < cuda->ranks->n && key; r++) {
        const struct sqz_card *other = cuda->ranks->card[r];
        const uint64_t theirs = other->n_groups ? sqz_card_key(other) : 1;
        key = theirs ? sqz_card_mixed(key, theirs) : 0;
    }
    if (cuda->ranks && key) key = sqz_card_mixed(key, 2 * cuda->ranks->apart + cuda->ranks->first_of_pass);
    return key;
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
    bool ok = sqz_card_lay_out_frame(cuda, bound, n_tokens) && sqz_card_ready_scratch(cuda, bound);
    for (size_t i = 0; i < call->n_parts && ok; i++)
        if (call->parts[i]->status == SQZ_OK)
            sqz_card_fill_frame(cuda, call->parts[i]->own->bound, call->parts[i]->own, call->parts[i]);
    if (ok) ok = sqz_card_put_frame(cuda, first, call->stream);
    if (ok && cuda->ranks && !begin_others(cuda, parts, n_parts, first, call->stream)) {
        cuda->n_groups = 0;
        return 0;
    }
    if (ok && cuda->ranks && call->beside) sqz_card_tell_beside(cuda, call->beside);
    if (ok) return key_of_cards(cuda);
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
        args[j] = sqz_card_args(cuda, i + j, call->node->layer);
        n_tokens += g[j].n_tokens;
    }
    const struct sqz_gpu_node node = sqz_card_tokens(cuda, call->node, shape, g->first_token, n_tokens);
    float *out = call->node->out + g->first_token * shape->n_head * shape->head_dim;
    return n == 1 ? cuda->calls->attend_node(args, &node, out, stream)
                  : cuda->calls->attend_several(args, n, &node, out, stream);
}

/* The groups of the call that begins with number i. One that the card refuses is made of a call each, from the next pass
 * on side by side. */
static enum sqz_status attend_place(struct sqz_card *cuda, const struct sqz_backend_call *call, size_t i, void *stream)
{
    const size_t n = cuda->groups[i].n_joined;
    if (cuda->groups[i].bound->ranks.n_ranks) return sqz_card_attend_shards(cuda, call, i);
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
    const size_t n = sqz_card_streams(cuda);
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

/* Behind the last layer. */
static bool end_launches(struct sqz_card *cuda, void *stream)
{
    return sqz_card_bring_counts(cuda, stream) && (!cuda->ranks || sqz_card_join_others(cuda, stream));
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
    if (status == SQZ_OK && layer == cuda->last_layer && !end_launches(cuda, call->stream)) status = SQZ_ERROR_INTERNAL;
    if (status != SQZ_OK && cuda->ranks) cuda->ranks->broken = true;
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
    const struct sqz_layer *layer = sqz_context_layer(g->bound->context, l);
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
    if (cuda->ranks) sqz_card_wait_for_others(sqz_card_of(backend));
    for (size_t i = 0; i < call->n_parts; i++) {
        struct sqz_backend_part *p = call->parts[i];
        if (!sqz_card_computes(p->own->bound, layer) ||
            sqz_context_layer(p->own->bound->context, layer)->sliding_window)
            continue;
        const struct sqz_card_group *g = group_of(cuda, p);
        p->united = g->shared || g->way != SQZ_TOGETHER_EACH;
        add_stats(cuda, g, p, layer);
        for (uint32_t r = 1; r < g->bound->ranks.n_ranks; r++) {
            const struct sqz_card *other = cuda->ranks->card[r];
            add_stats(other, group_of(other, p), p, layer);
        }
    }
}

static void finish(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    for (size_t i = 0; i < cuda->n_groups && call->n_parts; i++) sqz_card_learn(cuda, &cuda->groups[i]);
    cuda->n_groups = 0;
    if (!cuda->ranks) return;
    const bool answered = sqz_card_others_answered(cuda);
    for (size_t i = 0; i < call->n_parts && !answered; i++)
        fail_part(call->parts[i], sqz_error_set(call->parts[i]->error, SQZ_ERROR_INTERNAL,
                                                "a card that holds a part of the context did not answer"));
}

/* ---- The place -------------------------------------------------------------------------------------------------- */

static const struct sqz_backend_ops ops = {
    .name = "CUDA",
    .steered = true,
    .bind = sqz_card_bind_any,
    .unbind = sqz_card_unbind_any,
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
    .build_shard = sqz_card_build_shard,
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
    if (cuda->ranks) {
        struct sqz_card_ranks *const ranks = cuda->ranks;
        sqz_card_end_sharing(cuda);
        for (uint32_t r = 1; r < ranks->n; r++) sqz_backend_cuda_free(&ranks->card[r]->base);
        free(ranks);
    }
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

enum sqz_status sqz_backend_cuda_share(struct sqz_backend *backend, int n_cards, size_t memory_bytes,
                                       struct sqz_error *error)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    struct sqz_backend *others[SQZ_CUDA_MOST_RANKS] = {0};
    const uint32_t n = n_cards < SQZ_CUDA_MOST_RANKS ? (uint32_t)n_cards : SQZ_CUDA_MOST_RANKS;
    enum sqz_status status = SQZ_OK;
    for (uint32_t r = 1; r < n && status == SQZ_OK; r++)
        status = sqz_backend_cuda_create(&others[r], cuda->calls, (int)r, memory_bytes, cuda->together, NULL,
                                         cuda->n_threads, error);
    if (status == SQZ_OK) status = sqz_card_share(cuda, others, n, error);
    for (uint32_t r = 1; r < n && status != SQZ_OK; r++) sqz_backend_cuda_free(others[r]);
    return status;
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
