/*
 * How tokens of a batch go through a context on a card; card.h.
 *
 * Tokens on one context, users' and a question's, can each read what they
 * selected; or what any of them selected is read once for all; or everything is,
 * without a lookup. What each way takes is reckoned from the bytes and from the
 * shares that passes before have read, which come back with every pass. The way
 * that was taken last stays until another is clearly cheaper: captured graphs are
 * of one way. The other ways never read less for anybody than the first.
 */
#include "card.h"

#include <math.h>
#include <stdlib.h>

#include "card_cost.h"
#include "plan.h"

enum {
    EACH_MOST = SQZ_CARD_EACH_MOST,
    ONE_PASS_MOST = 512, /* tokens of one pass that reads everything, */
    PAIRS_MOST = 8192,   /* and those times KV heads */
    USER_STEP = 1024,    /* launches are laid out for own rows in such steps */
};

static const double clearly = 0.9;   /* of what the way before takes */
static const double followed = 0.25; /* of a share that comes back with a pass; the rest is what was known */

/* ---- Choosing ------------------------------------------------------------------------------------ */

static bool selects(const struct sqz_bound *bound, uint32_t layer)
{
    return sqz_context_layer(bound->context, layer)->n_levels && sqz_card_computes(bound, layer);
}

/* The layer that stands for all that choose; NULL: there is none. *planes: its rows are in planes on the card. */
static const struct sqz_layer *layer_that_chooses(const struct sqz_bound *bound, bool *planes)
{
    for (uint32_t l = 0; l < bound->n_layer; l++) {
        *planes = bound->layers[l].planes;
        if (selects(bound, l)) return sqz_context_layer(bound->context, l);
    }
    return NULL;
}

static struct sqz_card_task task_of(const struct sqz_layer *l, bool planes, size_t n_tokens)
{
    struct sqz_card_task t = {.tokens = (double)n_tokens,
                              .heads = l->shape.n_head,
                              .heads_kv = l->shape.n_head_kv,
                              .dim = sqz_card_dim(l->shape.head_dim),
                              .rows = l->n_rows,
                              .coded = l->codes.n_words != 0,
                              .tail = l->tail,
                              .several_levels = l->n_levels > 1};
    if (planes) t.number_bytes = (double)sqz_row_bytes(l->keys.type, l->shape.head_dim) / l->shape.head_dim;
    for (uint32_t i = 0; i < l->n_levels; i++) t.clusters += l->level[i].n_clusters;
    return t;
}

/* Until passes say more: the mean over all layers, of which the first ones can be far from the rest. */
static struct sqz_card_habit *habit_of(struct sqz_bound *bound, float budget)
{
    struct sqz_card_habit *h = &bound->habit;
    if (h->share > 0) return h;
    double sum = 0, n = 0;
    for (uint32_t l = 0; l < bound->n_layer; l++) {
        const struct sqz_layer *layer = sqz_context_layer(bound->context, l);
        /* The curve's shares are of F16 rows' bytes. */
        const double cut = bound->layers[l].planes ? (double)sqz_row_bytes(layer->keys.type, layer->shape.head_dim) /
                                                         (double)sqz_row_bytes(SQZ_ROW_F16, layer->shape.head_dim)
                                                   : 1;
        for (uint32_t head = 0; selects(bound, l) && head < layer->shape.n_head_kv; head++, n++)
            sum += fmin((double)sqz_head_share_at(layer, head, budget) / cut, 1);
    }
    h->share = sum / n;
    h->spread = 0.28; /* of users' questions about a story, docs/gpu.md */
    return h;
}

/* What n tokens select together, of the rows. */
static double united_share(const struct sqz_card_habit *h, size_t n_tokens)
{
    return fmin(h->share * (1 + h->spread * log2((double)n_tokens)), 1);
}

/* Of n_tokens tokens. Those that select go through the context by EACH_MOST at most. */
static enum sqz_together choose(const struct sqz_card *cuda, struct sqz_bound *bound, size_t n_tokens, float budget)
{
    bool planes;
    const struct sqz_layer *layer = layer_that_chooses(bound, &planes);
    if (n_tokens < 2) return SQZ_TOGETHER_EACH;
    if (budget >= 1 || !layer) return SQZ_TOGETHER_ALL;
    if (cuda->together != SQZ_TOGETHER_CHEAPEST) return cuda->together;
    struct sqz_card_habit *h = habit_of(bound, budget);
    const size_t most = bound->each_most, n_calls = (n_tokens + most - 1) / most,
                 n_each = (n_tokens + n_calls - 1) / n_calls;
    const bool in_shards = bound->ranks.n_ranks; /* cards have no selections of several tokens in common */
    const struct sqz_card_task all = task_of(layer, planes, n_tokens), call = task_of(layer, planes, n_each);
    const double united = united_share(h, n_each);
    const double cost[] = {[SQZ_TOGETHER_EACH] = (double)n_calls * sqz_card_each_us(&call, h->share),
                           [SQZ_TOGETHER_ONE] = (double)n_calls * sqz_card_one_us(&call, h->share, united),
                           [SQZ_TOGETHER_ALL] = sqz_card_all_us(&all)};
    enum sqz_together *last = &h->way[(size_t)log2((double)n_tokens)], way = SQZ_TOGETHER_EACH;
    for (enum sqz_together i = SQZ_TOGETHER_ONE; i <= SQZ_TOGETHER_ALL; i++)
        if (cost[i] < cost[way] && !(in_shards && i == SQZ_TOGETHER_ONE)) way = i;
    if (*last != SQZ_TOGETHER_CHEAPEST && cost[way] > clearly * cost[*last]) way = *last;
    return *last = way;
}

/* Whether tokens can share a selection: of clusters that any of them selects. A mean over unlike tokens says nothing of
 * single ones, but is what was published. */
static bool can_share(const struct sqz_layer *layer)
{
    return layer->group == SQZ_GROUP_MAX || layer->rule == SQZ_RULE_PAPER;
}

/* Whether a long question reads everything, in place of what any of its tokens selects. */
static bool long_reads_all(const struct sqz_card *cuda, struct sqz_bound *bound, size_t n_tokens, float budget)
{
    bool planes;
    const struct sqz_layer *layer = layer_that_chooses(bound, &planes);
    if (budget >= 1 || !layer || !can_share(layer)) return true;
    if (cuda->together != SQZ_TOGETHER_CHEAPEST) return cuda->together != SQZ_TOGETHER_ONE;
    const struct sqz_card_habit *h = habit_of(bound, budget);
    const double share = h->shared_share > 0 ? h->shared_share : united_share(h, n_tokens);
    const struct sqz_card_task t = task_of(layer, planes, n_tokens);
    return sqz_card_long_all_us(&t) < sqz_card_shared_us(&t, share);
}

/* The same of a context in shards, where what is not read together is a call each of so many tokens as one takes, each with a
 * selection of its own. */
static bool shards_read_all(const struct sqz_card *cuda, struct sqz_bound *bound, size_t n_tokens, float budget)
{
    bool planes;
    const struct sqz_layer *layer = layer_that_chooses(bound, &planes);
    if (budget >= 1 || !layer) return true;
    if (cuda->together != SQZ_TOGETHER_CHEAPEST) return cuda->together == SQZ_TOGETHER_ALL;
    const struct sqz_card_task all = task_of(layer, planes, n_tokens), each = task_of(layer, planes, bound->each_most);
    const size_t n_calls = (n_tokens + bound->each_most - 1) / bound->each_most;
    return sqz_card_long_all_us(&all) < (double)n_calls * sqz_card_each_us(&each, habit_of(bound, budget)->share);
}

/* ---- Groups --------------------------------------------------------------------------------------- */

/* What the kernels are told of own rows: more than there are, in steps, so that launches stay the same for long. */
static size_t user_bound(const struct sqz_backend_part *p)
{
    return (p->n_own + p->n_tokens + USER_STEP - 1) / USER_STEP * USER_STEP;
}

/* Whether a token of the part reads own rows in planes, where the layer has them. */
static bool reads_own_planes(const struct sqz_backend_part *p)
{
    return sqz_card_own_flushed(p->n_own + p->n_tokens - 1) > 0;
}

/* Tokens of one pass that reads everything. */
static size_t one_pass_most(const struct sqz_bound *bound)
{
    size_t most = ONE_PASS_MOST;
    for (uint32_t l = 0; l < bound->n_layer; l++) {
        const struct sqz_layer *layer = sqz_context_layer(bound->context, l);
        const size_t pairs = PAIRS_MOST / layer->shape.n_head_kv;
        if (pairs < most) most = pairs;
        if (layer->sliding_window && EACH_MOST < most) most = EACH_MOST; /* each has its own place in it */
    }
    return most;
}

static bool continues(const struct sqz_backend_part *a, const struct sqz_backend_part *b)
{
    return b->own->bound == a->own->bound && b->first_token == a->first_token + a->n_tokens && !sqz_card_is_long(b) &&
           (a->budget >= 1) == (b->budget >= 1) && a->upper == b->upper;
}

/* The first of n parts that go through a context together, and how many tokens they have. */
static size_t parts_together(struct sqz_backend_part *const *parts, size_t n, size_t most, size_t *n_tokens)
{
    size_t i = 1;
    *n_tokens = parts[0]->n_tokens;
    for (; i < n && continues(parts[i - 1], parts[i]) && *n_tokens + parts[i]->n_tokens <= most; i++)
        *n_tokens += parts[i]->n_tokens;
    return i;
}

static void add_group(struct sqz_card *cuda, struct sqz_backend_part *const *parts, size_t n, size_t n_tokens,
                      enum sqz_together way)
{
    struct sqz_card_group *g = &cuda->groups[cuda->n_groups++];
    *g = (struct sqz_card_group){.bound = parts[0]->own->bound,
                                 .own = parts[0]->own,
                                 .first_token = parts[0]->first_token,
                                 .n_tokens = n_tokens,
                                 .dense = parts[0]->budget >= 1 || way == SQZ_TOGETHER_ALL,
                                 .upper = parts[0]->upper,
                                 .way = way};
    for (size_t i = 0; i < n; i++) {
        if (user_bound(parts[i]) > g->n_user) g->n_user = user_bound(parts[i]);
        g->own_planes |= reads_own_planes(parts[i]);
    }
}

static void add_long(struct sqz_card *cuda, const struct sqz_backend_part *p)
{
    const bool all = p->own->bound->ranks.n_ranks || long_reads_all(cuda, p->own->bound, p->n_tokens, p->budget);
    cuda->groups[cuda->n_groups++] = (struct sqz_card_group){.bound = p->own->bound,
                                                             .own = p->own,
                                                             .first_token = p->first_token,
                                                             .n_tokens = p->n_tokens,
                                                             .n_user = p->n_own + p->n_tokens,
                                                             .shared = true,
                                                             .dense = all,
                                                             .upper = p->upper,
                                                             .own_planes = reads_own_planes(p),
                                                             .way = all ? SQZ_TOGETHER_ALL : SQZ_TOGETHER_ONE};
}

/* Of a context in shards: a call each of so many tokens as one takes. */
static void add_pieces(struct sqz_card *cuda, struct sqz_backend_part *p)
{
    const size_t most = p->own->bound->each_most;
    for (size_t at = 0; at < p->n_tokens; at += most) {
        struct sqz_backend_part piece = *p, *const parts = &piece;
        piece.first_token += at;
        piece.n_own += at;
        piece.n_tokens = p->n_tokens - at < most ? p->n_tokens - at : most;
        add_group(cuda, &parts, 1, piece.n_tokens, SQZ_TOGETHER_EACH);
    }
}

void sqz_card_group_parts(struct sqz_card *cuda, struct sqz_backend_part *const *parts, size_t n)
{
    cuda->n_groups = 0;
    for (size_t i = 0, used; i < n; i += used) {
        size_t n_tokens;
        used = 1;
        struct sqz_bound *bound = parts[i]->own->bound;
        if (sqz_card_is_long(parts[i])) {
            if (bound->ranks.n_ranks && !shards_read_all(cuda, bound, parts[i]->n_tokens, parts[i]->budget))
                add_pieces(cuda, parts[i]);
            else add_long(cuda, parts[i]);
            continue;
        }
        used = parts_together(parts + i, n - i, one_pass_most(bound), &n_tokens);
        enum sqz_together way = choose(cuda, bound, n_tokens, parts[i]->budget);
        if (way != SQZ_TOGETHER_ALL && n_tokens > bound->each_most) {
            used = parts_together(parts + i, n - i, bound->each_most, &n_tokens);
            way = choose(cuda, bound, n_tokens, parts[i]->budget);
        }
        add_group(cuda, parts + i, used, n_tokens, way);
    }
}

/* ---- What passes read -------------------------------------------------------------------------------- */

/* Of the first n_counted selections of a group. */
static double mean_share(const struct sqz_card *cuda, const struct sqz_card_group *g, size_t n_counted)
{
    double sum = 0, n = 0;
    for (uint32_t l = 0; l < g->bound->n_layer; l++) {
        const struct sqz_layer *layer = sqz_context_layer(g->bound->context, l);
        const size_t k = layer->shape.n_head_kv;
        if (!cuda->frame_layers[l].runs_here || layer->n_levels == 0 || !sqz_card_computes(g->bound, l)) continue;
        for (size_t i = 0; i < n_counted * k; i++) sum += 8.0 * sqz_card_retained(cuda, l)[g->first_token * k + i];
        n += (double)(n_counted * k) * layer->n_rows;
    }
    return n > 0 ? sum / n : 0;
}

static void follow(double *known, double seen)
{
    *known += followed * (seen - *known);
}

void sqz_card_learn(struct sqz_card *cuda, const struct sqz_card_group *g)
{
    struct sqz_card_habit *h = &g->bound->habit;
    if (g->dense || h->share <= 0) return;
    const bool one = g->way == SQZ_TOGETHER_ONE;
    const double share = mean_share(cuda, g, one ? 1 : g->n_tokens);
    if (share <= 0) return;
    if (g->shared) h->shared_share = share;
    else if (one) follow(&h->spread, fmax(share / h->share - 1, 0) / log2((double)g->n_tokens));
    else follow(&h->share, share);
}
