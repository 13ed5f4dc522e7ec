/* A place for contexts in shards; backend_shards.h. */
#include "backend_shards.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "backend_cpu.h"
#include "error.h"
#include "lookup.h"

static const struct sqz_elsewhere *others;

void sqz_shards_elsewhere(const struct sqz_elsewhere *elsewhere)
{
    others = elsewhere;
}

struct shards {
    struct sqz_backend base;
    struct sqz_backend *place; /* of every shard that is here */
    const struct sqz_elsewhere *elsewhere;
    bool own_elsewhere;        /* sequences have their own rows in another process */
    uint32_t n_head, head_dim; /* the most of any layer */
    uint32_t n_room;           /* shards of a context that the arrays have room for */
    float *total;              /* [n_room][SQZ_BATCH_TOKENS][H] of each shard */
    float *partial;            /* outputs that wait to be merged: [SQZ_BATCH_TOKENS][H][D], then their LSE, each */
    float *whole, *left, *lse; /* [SQZ_BATCH_TOKENS][H] */
    float *node_lse;           /* the same, of tokens by their numbers in the node */
    struct sqz_bound *bounds;  /* a list */
    float *out;                /* [SQZ_BATCH_TOKENS][H][D] */
};

struct sqz_bound {
    struct shards *shards;
    const struct sqz_context *context;
    struct sqz_bound *next;
    uint32_t n_users; /* that have bound it */
    uint32_t id;      /* with others */
    bool with_others;
    uint32_t n; /* shards that are here */
    struct sqz_bound *bound[];
};

struct sqz_own_rows {
    const struct sqz_bound *bound;
    struct sqz_own_rows *own[]; /* [bound->n] */
};

static struct shards *shards_of(struct sqz_backend *backend)
{
    return (struct shards *)backend;
}

/* ---- Contexts and rows ------------------------------------------------------------------- */

static void unbind(struct sqz_bound *bound)
{
    if (!bound || --bound->n_users) return;
    struct shards *s = bound->shards;
    for (struct sqz_bound **at = &s->bounds; *at; at = &(*at)->next)
        if (*at == bound) {
            *at = bound->next;
            break;
        }
    for (uint32_t i = 0; i < bound->n; i++) s->place->ops->unbind(bound->bound[i]);
    if (bound->with_others) s->elsewhere->close(s->elsewhere->user_data, bound->id);
    free(bound);
}

/* Partial outputs that wait to be merged in pairs, at most: one for each power of two, and the one at hand. */
static size_t n_partials(uint32_t n)
{
    size_t depth = 1;
    for (uint32_t left = n; left; left /= 2) depth++;
    return depth;
}

/* Room for the denominators and outputs of so many shards. */
static enum sqz_status make_room(struct shards *s, uint32_t n, struct sqz_error *error)
{
    if (n <= s->n_room) return SQZ_OK;
    const size_t heads = (size_t)SQZ_BATCH_TOKENS * s->n_head;
    float *total = malloc(n * heads * sizeof *total);
    float *partial = malloc(n_partials(n) * heads * (s->head_dim + 1) * sizeof *partial);
    if (!total || !partial) {
        free(total);
        free(partial);
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for %u shards", n);
    }
    free(s->total);
    free(s->partial);
    s->total = total;
    s->partial = partial;
    s->n_room = n;
    return SQZ_OK;
}

static enum sqz_status bind(struct sqz_backend *backend, const struct sqz_context *context, struct sqz_bound **out,
                            struct sqz_error *error)
{
    struct shards *s = shards_of(backend);
    for (struct sqz_bound *b = s->bounds; b; b = b->next)
        if (b->context == context) {
            b->n_users++;
            *out = b;
            return SQZ_OK;
        }
    const uint32_t count = sqz_context_n_shards(context);
    struct sqz_bound *bound = calloc(1, sizeof *bound + count * sizeof bound->bound[0]);
    enum sqz_status status = SQZ_OK;
    *out = NULL;
    if (!bound) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a bound context");
    bound->shards = s;
    bound->context = context;
    bound->n_users = 1;
    for (uint32_t i = 0; i < count && status == SQZ_OK; i++) {
        const struct sqz_context *shard = sqz_context_shard(context, i);
        if (!shard) continue;
        status = s->place->ops->bind(s->place, shard, &bound->bound[bound->n], error);
        bound->n += status == SQZ_OK;
    }
    if (status == SQZ_OK && !s->own_elsewhere && !sqz_context_shard(context, 0))
        status =
            sqz_error_set(error, SQZ_ERROR_INTERNAL, "shard 1 of %u, with own rows and windows, is elsewhere", count);
    if (status == SQZ_OK) status = make_room(s, bound->n, error);
    if (status == SQZ_OK && s->elsewhere) {
        status = s->elsewhere->open(s->elsewhere->user_data, context, &bound->id, error);
        bound->with_others = status == SQZ_OK;
    } else if (status == SQZ_OK && bound->n < count && !s->own_elsewhere) {
        status = sqz_error_set(error, SQZ_ERROR_INTERNAL, "%u of %u shards are nowhere", count - bound->n, count);
    }
    if (status != SQZ_OK) {
        unbind(bound);
        return status;
    }
    bound->next = s->bounds;
    s->bounds = *out = bound;
    return SQZ_OK;
}

static void free_own(struct sqz_own_rows *own)
{
    if (!own) return;
    for (uint32_t i = 0; i < own->bound->n; i++) own->bound->shards->place->ops->free_own(own->own[i]);
    free(own);
}

static enum sqz_status create_own(struct sqz_backend *backend, struct sqz_bound *bound, size_t capacity,
                                  struct sqz_own_rows **out, struct sqz_error *error)
{
    const struct shards *s = shards_of(backend);
    struct sqz_own_rows *own = calloc(1, sizeof *own + bound->n * sizeof own->own[0]);
    enum sqz_status status = SQZ_OK;
    *out = NULL;
    if (!own) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a sequence");
    own->bound = bound;
    for (uint32_t i = 0; i < bound->n && status == SQZ_OK; i++)
        status = s->place->ops->create_own(s->place, bound->bound[i], i || s->own_elsewhere ? 1 : capacity,
                                           &own->own[i], error);
    if (status != SQZ_OK) free_own(own);
    else *out = own;
    return status;
}

/* ---- One node ----------------------------------------------------------------------------------- */

/* Parts of a call as one of the shards gets them. */
struct dealt {
    struct sqz_backend_part part[SQZ_MOST_SEQUENCES];
    struct sqz_backend_part *list[SQZ_MOST_SEQUENCES];
    size_t at[SQZ_MOST_SEQUENCES]; /* tokens of the parts before */
    size_t n;
};

/* The parts, at shard number `i` of those here. */
static void deal(struct dealt *d, const struct shards *s, const struct sqz_backend_call *call, uint32_t i)
{
    size_t at = 0;
    d->n = 0;
    for (size_t p = 0; p < call->n_parts; at += call->parts[p]->n_tokens, p++) {
        struct sqz_backend_part *part = &d->part[d->n];
        *part = *call->parts[p];
        part->own = call->parts[p]->own->own[i];
        part->own_elsewhere = i > 0 || s->own_elsewhere;
        part->map = NULL; /* positions are the shard's */
        d->at[d->n] = at;
        d->list[d->n++] = part;
    }
}

/* Of a call whose parts are of one context. */
static uint32_t n_shards_of(const struct sqz_backend_call *call)
{
    return call->parts[0]->own->bound->n;
}

/* A sequence's own rows are behind the first shard. */
static void take(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    const struct shards *s = shards_of(backend);
    struct dealt d;
    struct sqz_backend_call mine = *call;
    if (s->own_elsewhere) return;
    deal(&d, s, call, 0);
    mine.parts = d.list;
    mine.n_parts = d.n;
    s->place->ops->take(s->place, &mine);
    for (size_t p = 0; p < d.n; p++) call->parts[p]->status = d.part[p].status;
}

/* The first shard's: the others have none. */
static size_t most_tokens(const struct sqz_own_rows *own)
{
    const struct sqz_backend_ops *ops = own->bound->shards->place->ops;
    return own->bound->n && ops->most_tokens ? ops->most_tokens(own->own[0]) : SIZE_MAX;
}

static size_t own_bytes(const struct sqz_own_rows *own)
{
    const struct sqz_backend_ops *ops = own->bound->shards->place->ops;
    return own->bound->n && ops->own_bytes ? ops->own_bytes(own->own[0]) : 0;
}

float sqz_shards_log_sum(const float *first, size_t stride, size_t n)
{
    if (n == 1) return *first;
    const size_t half = sqz_shards_half(n);
    return sqz_log_add(sqz_shards_log_sum(first, stride, half),
                       sqz_shards_log_sum(first + half * stride, stride, n - half));
}

void sqz_shards_total(struct sqz_backend *backend, const struct sqz_shards_step *step, float *total)
{
    struct shards *s = shards_of(backend);
    const size_t n = step->n_tokens * step->n_head, stride = (size_t)SQZ_BATCH_TOKENS * s->n_head;
    const uint32_t n_shards = n_shards_of(step->call);
    struct dealt d;
    for (uint32_t i = 0; i < n_shards; i++) {
        struct sqz_backend_call mine = *step->call;
        deal(&d, s, step->call, i);
        mine.parts = d.list;
        mine.n_parts = d.n;
        for (size_t p = 0; p < d.n; p++) d.part[p].log_total = s->total + i * stride + d.at[p] * step->n_head;
        s->place->ops->total(s->place, &mine);
    }
    for (size_t j = 0; j < n; j++) total[j] = sqz_shards_log_sum(s->total + j, stride, n_shards);
}

/* The log of what is left of a sum when a part of it is taken away. What cancels is what hardly counts: the part and the
 * rest together are the sum, to its precision. */
static float log_left(float whole, float part)
{
    return part < whole ? whole + log1pf(-expf(part - whole)) : -INFINITY;
}

/* Shard number `i` of those here: its part of the output, packed. */
static void attend_shard(struct shards *s, const struct sqz_shards_step *step, const float *whole, uint32_t i,
                         float *out, float *lse)
{
    const size_t h = step->n_head;
    const float *of_shard = s->total ? s->total + (size_t)i * SQZ_BATCH_TOKENS * s->n_head : NULL;
    struct sqz_backend_call mine = *step->call;
    struct sqz_attention_node node = *step->call->node;
    struct dealt d;
    deal(&d, s, step->call, i);
    mine.parts = d.list;
    mine.n_parts = d.n;
    mine.node = &node;
    node.out = s->out;
    for (size_t p = 0; p < d.n; p++) {
        for (size_t j = d.at[p] * h; whole && j < (d.at[p] + d.part[p].n_tokens) * h; j++)
            s->left[j] = log_left(whole[j], of_shard[j]);
        d.part[p].elsewhere = whole ? s->left + d.at[p] * h : NULL;
        d.part[p].lse = s->node_lse + d.part[p].first_token * h; /* tokens may go together, in the node's order */
    }
    s->place->ops->attend(s->place, &mine);
    for (size_t p = 0; p < d.n; p++) {
        step->call->parts[p]->united = d.part[p].united;
        memcpy(lse + d.at[p] * h, d.part[p].lse, d.part[p].n_tokens * h * sizeof *lse);
        memcpy(out + d.at[p] * h * step->head_dim, s->out + d.part[p].first_token * h * step->head_dim,
               d.part[p].n_tokens * h * step->head_dim * sizeof *out);
    }
}

void sqz_shards_attend(struct sqz_backend *backend, const struct sqz_shards_step *step, const float *whole, float *out,
                       float *lse)
{
    struct shards *s = shards_of(backend);
    const uint32_t n_shards = n_shards_of(step->call);
    const size_t heads = step->n_tokens * step->n_head, floats = heads * (step->head_dim + 1);
    size_t n = 0; /* partial outputs that wait, of ever smaller powers of two */
    for (uint32_t i = 0; i < n_shards; i++) {
        float *mine = s->partial + n++ * floats;
        attend_shard(s, step, whole, i, mine, mine + heads * step->head_dim);
        for (uint32_t bit = i + 1; n > 1 && (bit % 2 == 0 || i + 1 == n_shards); bit /= 2, n--) {
            float *to = s->partial + (n - 2) * floats, *from = to + floats;
            sqz_merge_partial(to, to + heads * step->head_dim, from, from + heads * step->head_dim, heads,
                              step->head_dim);
        }
    }
    memcpy(out, s->partial, heads * step->head_dim * sizeof *out);
    memcpy(lse, s->partial + heads * step->head_dim, heads * sizeof *lse);
}

/* ---- Attention ------------------------------------------------------------------------------------ */

static void fail(const struct sqz_backend_call *call, const struct sqz_error *error)
{
    for (size_t p = 0; p < call->n_parts; p++)
        call->parts[p]->status = sqz_error_set(call->parts[p]->error, error->status, "%s", error->message);
}

/* At a layer with a window: the first shard's rows and own ones are all there are. */
static void attend_window(const struct shards *s, const struct sqz_backend_call *call)
{
    struct sqz_backend_call mine = *call;
    struct dealt d;
    deal(&d, s, call, 0);
    mine.parts = d.list;
    mine.n_parts = d.n;
    s->place->ops->attend(s->place, &mine);
    for (size_t p = 0; p < d.n; p++) {
        call->parts[p]->united = d.part[p].united;
        call->parts[p]->status = d.part[p].status;
    }
}

/* Parts of one context, at a layer that is shared out. */
static void attend_node(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    struct shards *s = shards_of(backend);
    const bool all = sqz_backend_cpu_reads_all(s->place);
    const struct sqz_elsewhere *e = s->elsewhere;
    const struct sqz_layer_shape *shape =
        &sqz_context_layer(call->parts[0]->own->bound->context, call->node->layer)->shape;
    struct sqz_elsewhere_part parts[SQZ_MOST_SEQUENCES];
    struct sqz_attention_stats *stats[SQZ_MOST_SEQUENCES];
    size_t first_token[SQZ_MOST_SEQUENCES], at = 0;
    struct sqz_shards_step step = {call, 0, shape->n_head, shape->head_dim};
    struct sqz_error error;
    enum sqz_status status = SQZ_OK;
    for (size_t p = 0; p < call->n_parts; p++) {
        const struct sqz_backend_part *part = call->parts[p];
        parts[p] = (struct sqz_elsewhere_part){.context = part->own->bound->id,
                                               .n_tokens = (uint32_t)part->n_tokens,
                                               .block_tokens = (uint32_t)part->block_tokens,
                                               .upper = part->upper,
                                               .all = all,
                                               .budget = part->budget,
                                               .log_offset = part->log_offset};
        stats[p] = part->stats;
        first_token[p] = part->first_token;
        step.n_tokens += part->n_tokens;
    }
    const struct sqz_elsewhere_node node = {.layer = call->node->layer,
                                            .n_head = shape->n_head,
                                            .head_dim = shape->head_dim,
                                            .n_parts = call->n_parts,
                                            .n_tokens = step.n_tokens,
                                            .parts = parts,
                                            .node = call->node,
                                            .first_token = first_token,
                                            .stats = stats};
    if (e) status = e->begin(e->user_data, &node, &error);
    if (status == SQZ_OK && !all) {
        sqz_shards_total(backend, &step, s->whole);
        if (e) status = e->sum(e->user_data, &node, s->whole, &error);
    }
    if (status == SQZ_OK) {
        sqz_shards_attend(backend, &step, all ? NULL : s->whole, s->out, s->lse);
        if (e) status = e->merge(e->user_data, &node, s->out, s->lse, &error);
    }
    const size_t row = (size_t)shape->n_head * shape->head_dim;
    for (size_t p = 0; p < call->n_parts; at += call->parts[p]->n_tokens, p++) {
        float *to = call->node->out + first_token[p] * row;
        if (status == SQZ_OK) memcpy(to, s->out + at * row, call->parts[p]->n_tokens * row * sizeof *to);
        else memset(to, 0, call->parts[p]->n_tokens * row * sizeof *to);
    }
    if (status != SQZ_OK) fail(call, &error);
}

/* The parts of a call that are of the same context as the first that is not `done` yet; their number. */
static size_t next_context(const struct sqz_backend_call *call, bool *done, struct sqz_backend_part **parts)
{
    const struct sqz_bound *bound = NULL;
    size_t n = 0;
    for (size_t p = 0; p < call->n_parts; p++) {
        if (done[p] || (bound && call->parts[p]->own->bound != bound)) continue;
        bound = call->parts[p]->own->bound;
        parts[n++] = call->parts[p];
        done[p] = true;
    }
    return n;
}

/* Everybody who asks about a context is in one node, and in one message to others. */
static void attend(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    struct sqz_backend_part *parts[SQZ_MOST_SEQUENCES];
    bool done[SQZ_MOST_SEQUENCES] = {false};
    struct sqz_backend_call one = *call;
    one.parts = parts;
    while ((one.n_parts = next_context(call, done, parts))) {
        const struct sqz_context *context = parts[0]->own->bound->context;
        if (sqz_context_layer(context, call->node->layer)->sliding_window) attend_window(shards_of(backend), &one);
        else attend_node(backend, &one);
    }
}

/* ---- The place --------------------------------------------------------------------------------------- */

static const struct sqz_backend_ops ops = {
    .name = "shards",
    .steered = true,
    .bind = bind,
    .unbind = unbind,
    .create_own = create_own,
    .free_own = free_own,
    .most_tokens = most_tokens,
    .own_bytes = own_bytes,
    .take = take,
    .attend = attend,
};

void sqz_backend_shards_free(struct sqz_backend *backend)
{
    if (!backend) return;
    struct shards *s = shards_of(backend);
    free(s->total);
    free(s->partial);
    free(s->whole);
    free(s->out);
    free(s);
}

enum sqz_status sqz_backend_shards_over(struct sqz_backend **out, struct sqz_backend *place, uint32_t n_head_most,
                                        uint32_t head_dim_most, bool own_elsewhere, struct sqz_error *error)
{
    const size_t heads = (size_t)SQZ_BATCH_TOKENS * n_head_most;
    struct shards *s = calloc(1, sizeof *s);
    *out = NULL;
    if (s) {
        s->whole = malloc(4 * heads * sizeof *s->whole);
        s->out = malloc(heads * head_dim_most * sizeof *s->out);
    }
    if (!s || !s->whole || !s->out) {
        if (s) sqz_backend_shards_free(&s->base);
        return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for the outputs of shards");
    }
    s->base.ops = &ops;
    s->place = place;
    s->elsewhere = own_elsewhere ? NULL : others;
    s->own_elsewhere = own_elsewhere;
    s->n_head = n_head_most;
    s->head_dim = head_dim_most;
    s->left = s->whole + heads;
    s->lse = s->left + heads;
    s->node_lse = s->lse + heads;
    *out = &s->base;
    return SQZ_OK;
}

enum sqz_status sqz_backend_shards_of(struct sqz_backend **out, struct sqz_model *model, struct sqz_error *error)
{
    uint32_t n_head = 0, head_dim = 0;
    enum sqz_status status = SQZ_OK;
    *out = NULL;
    for (uint32_t l = 0; l < model->info.n_layer; l++) {
        const struct sqz_layer_shape *shape = &model->layers[l].shape;
        if (shape->n_head > n_head) n_head = shape->n_head;
        if (shape->head_dim > head_dim) head_dim = shape->head_dim;
    }
    if (!model->shards)
        status = sqz_backend_shards_over(&model->shards, model->backend, n_head, head_dim, false, error);
    *out = model->shards;
    return status;
}
