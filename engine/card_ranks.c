/*
 * Contexts whose rows lie on several cards of the host, a shard on each; card.h.
 *
 * The first card has the model, the sessions' own rows and the results; the others
 * hold shards and compute attention alone. At a node each looks up, all share
 * their denominators, each reads what it chose by the sum, and results merge, on
 * streams: nothing of it is the host's, and all of a token is one captured graph a card.
 *
 * Tokens with a selection each meet in mailboxes (struct sqz_cuda_ranks), which the first
 * card leads: kernels wait for its queries and for each other's denominators, its own for
 * the others' results. No stream waits for another card's then: other cards' streams, lanes,
 * have graphs of their own, which begin with the card's frame and end with what was read,
 * and the host waits for all behind the pass. All calls of a node are launched before
 * anything waits for one of them.
 *
 * Where everything is read together, a long question at a budget of 1, each card's result
 * is a part that the first merges. Then lanes fork from the first card's stream before each
 * node, where queries are read from its memory, and join it behind that and behind the last,
 * all of which is one graph. Layers with a window are the first card's alone, which has all of
 * their rows.
 */
#include "card.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"

static const uint64_t patience_ns = 10000000000; /* that a kernel waits for another card's */

/* ---- Cards --------------------------------------------------------------------------------- */

void sqz_card_end_sharing(struct sqz_card *first)
{
    struct sqz_card_ranks *s = first->ranks;
    const struct sqz_gpu_calls *calls = first->calls;
    for (uint32_t r = 0; r < s->n; r++) {
        struct sqz_card *card = s->card[r];
        calls->use(card->card);
        for (uint32_t n = 2; n <= s->n; n++) sqz_card_give(card, s->of[n].mailbox[r], s->of[n].bytes);
        if (s->lane[r].stream) calls->free_stream(s->lane[r].stream);
        if (s->lane[r].done) calls->free_event(s->lane[r].done);
    }
    calls->use(first->card);
    sqz_card_give(first, s->parts, s->parts_room);
    if (s->come) calls->free_event(s->come);
    if (s->failed) calls->release_pinned(s->failed);
    first->ranks = NULL;
}

static bool make_lanes(struct sqz_card_ranks *s)
{
    const struct sqz_gpu_calls *calls = s->card[0]->calls;
    bool ok = true;
    for (uint32_t r = 1; r < s->n && ok; r++)
        ok = calls->use(s->card[r]->card) && (s->lane[r].stream = calls->create_stream()) &&
             (s->lane[r].done = calls->create_event());
    return calls->use(s->card[0]->card) && ok && (s->come = calls->create_event()) &&
           (s->failed = calls->allocate_pinned((SQZ_CUDA_MOST_RANKS + 1) * sizeof *s->failed));
}

enum sqz_status sqz_card_share(struct sqz_card *first, struct sqz_backend *const *others, uint32_t n,
                               struct sqz_error *error)
{
    struct sqz_card_ranks *s = calloc(1, sizeof *s);
    int cards[SQZ_CUDA_MOST_RANKS];
    char why[200] = "";
    if (!s) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for cards that share rows");
    s->n = n;
    for (uint32_t r = 0; r < n; r++) {
        s->card[r] = r ? sqz_card_of(others[r]) : first;
        cards[r] = s->card[r]->card;
    }
    first->ranks = s;
    enum sqz_status status = SQZ_OK;
    if (!first->calls->connect(cards, n, why, sizeof why))
        status = sqz_error_set(error, SQZ_ERROR_UNSUPPORTED, "cards cannot share a context's rows: %s", why);
    else if (!make_lanes(s))
        status = sqz_error_set(error, SQZ_ERROR_INTERNAL, "cards cannot share a context's rows: %s",
                               first->calls->complaint());
    if (status == SQZ_OK) {
        memset(s->failed, 0, (SQZ_CUDA_MOST_RANKS + 1) * sizeof *s->failed);
        return SQZ_OK;
    }
    sqz_card_end_sharing(first);
    free(s);
    return status;
}

/* Zeros in mailboxes for n shards, whose kernels have all ended. */
static bool clear_mailboxes(struct sqz_card_ranks *s, uint32_t n)
{
    bool ok = true;
    for (uint32_t r = 0; r < n && s->of[n].bytes; r++) {
        const struct sqz_card *card = s->card[r];
        ok = card->calls->use(card->card) && (!r || card->calls->wait(s->lane[r].stream)) &&
             card->calls->clear(s->of[n].mailbox[r], s->of[n].bytes, card->stream) && card->calls->wait(card->stream) &&
             ok;
    }
    s->failed[n] = 0;
    return s->card[0]->calls->use(s->card[0]->card) && ok;
}

/* Mailboxes for contexts of n shards and calls of n_rows query rows. */
static enum sqz_status make_mailboxes(struct sqz_card_ranks *s, uint32_t n, uint32_t n_rows, struct sqz_error *error)
{
    const size_t bytes = s->card[0]->calls->mailbox_bytes(n, n_rows);
    if (s->of[n].bytes) return SQZ_OK;
    if (!bytes)
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED, "%u cards do not share %u query rows a call", n, n_rows);
    for (uint32_t r = 0; r < n; r++) {
        struct sqz_card *card = s->card[r];
        card->calls->use(card->card);
        if (!s->of[n].mailbox[r] && !(s->of[n].mailbox[r] = sqz_card_take(card, bytes)))
            return sqz_card_no_memory(card, bytes, "what cards tell each other", error);
    }
    s->of[n].bytes = bytes;
    s->of[n].n_rows = n_rows;
    if (clear_mailboxes(s, n)) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_INTERNAL, "a card took no mailbox: %s", s->card[0]->calls->complaint());
}

/* ---- Contexts ------------------------------------------------------------------------------- */

void sqz_card_unbind_any(struct sqz_bound *bound)
{
    if (!bound) return;
    for (uint32_t r = 1; r < bound->ranks.n_ranks; r++) sqz_card_unbind(bound->of_card[r]);
    sqz_card_unbind(bound);
}

/* Why a layer is not for calls of n_tokens tokens over cards; NULL: it is. */
static const char *obstacle_of(const struct sqz_bound *b, uint32_t l, size_t n_tokens)
{
    static const float some[1];
    const struct sqz_layer *layer = sqz_context_layer(b->context, l);
    const struct sqz_cuda_attend_args args = {
        .layer = &b->layers[l].layer,
        .plan = {.log_threshold = some, .tail_gain = layer->tail ? some : NULL, .per_sequence = true},
        .dense = layer->n_levels == 0,
        .n_sequences = (uint32_t)n_tokens,
        .n_tokens = 1,
        .ranks = &b->ranks};
    return b->cuda->calls->obstacle(&args);
}

/* The most tokens of a call, at most that many; 0: there are none, *why. */
static size_t most_tokens(const struct sqz_bound *b, size_t most, const char **why)
{
    b->cuda->calls->use(b->cuda->card);
    for (uint32_t l = 0; l < b->n_layer && most; l++)
        while (most && !sqz_context_layer(b->context, l)->sliding_window && (*why = obstacle_of(b, l, most))) most /= 2;
    return most;
}

static uint32_t most_heads(const struct sqz_bound *b)
{
    uint32_t most = 0;
    for (uint32_t l = 0; l < b->n_layer; l++) {
        const uint32_t n = sqz_context_layer(b->context, l)->shape.n_head;
        if (n > most) most = n;
    }
    return most;
}

/* Shards that are each on their card become one context. */
static enum sqz_status join_shards(struct sqz_card_ranks *s, struct sqz_bound *const *of_card, uint32_t n,
                                   struct sqz_error *error)
{
    size_t most = SQZ_CARD_EACH_MOST;
    const char *why = NULL;
    for (uint32_t r = 0; r < n; r++)
        if (of_card[r]->n_on_cpu)
            return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED, "a context in shards on %u cards: %s", n,
                                 of_card[r]->fallback);
    const enum sqz_status status = make_mailboxes(s, n, SQZ_CARD_EACH_MOST * most_heads(of_card[0]), error);
    if (status != SQZ_OK) return status;
    for (uint32_t r = 0; r < n; r++) {
        struct sqz_cuda_ranks *ranks = &of_card[r]->ranks;
        *ranks = (struct sqz_cuda_ranks){.rank = r,
                                         .n_ranks = n,
                                         .n_rows = s->of[n].n_rows,
                                         .patience_ns = patience_ns,
                                         .led = true,
                                         .failed = &s->failed[n]};
        memcpy(ranks->mailbox, s->of[n].mailbox, sizeof ranks->mailbox);
    }
    for (uint32_t r = 0; r < n && most; r++) most = most_tokens(of_card[r], most, &why);
    for (uint32_t r = 0; r < n; r++) {
        of_card[r]->each_most = most;
        of_card[r]->apart = true;
        if (!most) of_card[r]->ranks.n_ranks = 0;
    }
    if (!most) return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED, "a context in shards on %u cards: %s", n, why);
    memcpy(of_card[0]->of_card, of_card, n * sizeof *of_card);
    return SQZ_OK;
}

/* Whether it has a layer whose rows are in all shards. */
static bool is_shared(const struct sqz_context *context)
{
    const uint32_t n_layer = sqz_context_get_meta(context)->n_layer;
    for (uint32_t l = 0; l < n_layer; l++)
        if (!sqz_context_layer(context, l)->sliding_window) return true;
    return false;
}

static enum sqz_status check_shards(const struct sqz_card *first, const struct sqz_context *context,
                                    struct sqz_error *error)
{
    const uint32_t n = sqz_context_n_shards(context), n_cards = first->ranks ? first->ranks->n : 1;
    if (!first->ranks)
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                             "a context in %u shards is read by a card each: --split rows, where there are several; "
                             "--gpu-layers 0 reads it on the CPU",
                             n);
    if (n < 2 || n > n_cards)
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                             "a context in %u shards on %u cards: each shard has one of its own; prepare --shards %u "
                             "makes so many, --gpu-layers 0 reads it on the CPU",
                             n, n_cards, n_cards);
    if (first->together == SQZ_TOGETHER_ONE)
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                             "tokens have one selection together where a context lies on one card; this one is in %u "
                             "shards",
                             n);
    if (!is_shared(context))
        return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                             "every layer of this context has a sliding window, of which the first card has all rows: "
                             "there is nothing to share; prepare without --shards makes one file");
    for (uint32_t i = 0; i < n; i++)
        if (!sqz_context_shard(context, i))
            return sqz_error_set(error, SQZ_ERROR_UNSUPPORTED,
                                 "other processes hold shards of this context: several processes read it on the CPU "
                                 "(--gpu-layers 0), one by its cards");
    return SQZ_OK;
}

enum sqz_status sqz_card_bind_any(struct sqz_backend *backend, const struct sqz_context *context,
                                  struct sqz_bound **out, struct sqz_error *error)
{
    struct sqz_card *first = sqz_card_of(backend);
    const uint32_t n = sqz_context_n_shards(context);
    struct sqz_bound *of_card[SQZ_CUDA_MOST_RANKS] = {0};
    if (n == 0) return sqz_card_bind(backend, context, out, error);
    *out = NULL;
    enum sqz_status status = check_shards(first, context, error);
    for (uint32_t r = 0; r < n && status == SQZ_OK; r++)
        status = sqz_card_bind(&first->ranks->card[r]->base, sqz_context_shard(context, r), &of_card[r], error);
    if (status == SQZ_OK && !of_card[0]->ranks.n_ranks) status = join_shards(first->ranks, of_card, n, error);
    for (uint32_t r = n; r-- > 0 && status != SQZ_OK;) sqz_card_unbind(of_card[r]);
    if (status == SQZ_OK) *out = of_card[0];
    first->calls->use(first->card);
    return status;
}

/* ---- The beginning of a pass ---------------------------------------------------------------- */

/* The group of a card that begins with the same token. */
static size_t group_on(const struct sqz_card *card, const struct sqz_card_group *g)
{
    size_t i = 0;
    while (card->groups[i].first_token != g->first_token) i++;
    return i;
}

/* Groups whose context has a part on card number r. */
static void copy_groups(struct sqz_card *first, uint32_t r)
{
    struct sqz_card *card = first->ranks->card[r];
    card->n_groups = card->n_places = 0;
    for (size_t i = 0; i < first->n_groups; i++) {
        const struct sqz_card_group *g = &first->groups[i];
        if (g->bound->ranks.n_ranks <= r) continue;
        struct sqz_card_group *mine = &card->groups[card->n_groups++];
        *mine = *g;
        mine->bound = g->bound->of_card[r];
        mine->own = NULL;
        mine->n_user = 0;
    }
}

static enum sqz_status begin_on(struct sqz_card *first, uint32_t r, struct sqz_error *error)
{
    struct sqz_card *card = first->ranks->card[r];
    const struct sqz_bound *bound = card->groups[0].bound;
    enum sqz_status status = SQZ_OK;
    for (struct sqz_bound *b = card->contexts; b; b = b->next) b->busy = false;
    for (size_t i = 0; i < card->n_groups; i++) card->groups[i].bound->busy = true;
    for (size_t i = 0; i < card->n_groups && status == SQZ_OK; i++)
        status = sqz_card_make_resident(card->groups[i].bound, error);
    if (status != SQZ_OK) return status;
    if (!sqz_card_lay_out_frame(card, bound, first->n_tokens) || !sqz_card_ready_scratch(card, bound))
        return sqz_card_no_memory(card, card->frame_bytes, "a batch", error);
    first->ranks->fill[r] = first->ranks->put[r] = true;
    return SQZ_OK;
}

static void fill_frame(struct sqz_card_ranks *s, uint32_t r)
{
    for (size_t i = 0; i < s->n_parts_of_pass && s->fill[r]; i++) {
        const struct sqz_backend_part *p = s->parts_of_pass[i];
        const struct sqz_bound *whole = p->own->bound;
        if (p->status == SQZ_OK && whole->ranks.n_ranks > r)
            sqz_card_fill_frame(s->card[r], whole->of_card[r], NULL, p);
    }
    s->fill[r] = false;
}

/* A card's frame goes to it if it has not yet; the card is in use. */
static bool put_frame(struct sqz_card_ranks *s, uint32_t r)
{
    if (!s->put[r]) return true;
    fill_frame(s, r);
    s->put[r] = false;
    return sqz_card_put_frame(s->card[r], s->first_of_pass, s->lane[r].stream);
}

/* Whether all cards of a pass meet in mailboxes alone. */
static bool meet_apart(const struct sqz_card *first)
{
    for (size_t i = 0; i < first->n_groups; i++)
        if (first->groups[i].bound->ranks.n_ranks && first->groups[i].way != SQZ_TOGETHER_EACH) return false;
    return true;
}

/* Room for the parts of groups that read everything together. */
static bool make_parts(struct sqz_card *first)
{
    struct sqz_card_ranks *s = first->ranks;
    size_t most = 0;
    for (size_t i = 0; i < first->n_groups; i++) {
        const struct sqz_card_group *g = &first->groups[i];
        if (!g->bound->ranks.n_ranks || g->way == SQZ_TOGETHER_EACH) continue;
        for (uint32_t l = 0; l < g->bound->n_layer; l++) {
            const struct sqz_layer_shape *shape = &sqz_context_layer(g->bound->context, l)->shape;
            const size_t bytes =
                g->bound->ranks.n_ranks * g->n_tokens * shape->n_head * (shape->head_dim + 1) * sizeof(float);
            if (bytes > most) most = bytes;
        }
    }
    return sqz_card_grow(first, &s->parts, &s->parts_room, most);
}

/* One card's call of a group, to `out`; lse: NULL, or what results merge by. */
static enum sqz_status attend_on(struct sqz_card *card, const struct sqz_card_group *g,
                                 const struct sqz_attention_node *node, float *out, float *lse, void *stream)
{
    const size_t i = group_on(card, g);
    const struct sqz_layer_shape *shape = &sqz_context_layer(g->bound->context, node->layer)->shape;
    struct sqz_cuda_attend_args args = sqz_card_args(card, i, node->layer);
    struct sqz_gpu_node tokens = sqz_card_tokens(card, node, shape, g->first_token, g->n_tokens);
    args.lse = lse;
    card->frame_layers[node->layer].runs_here = true;
    if (!card->groups[i].own) {
        tokens.keys = tokens.values = NULL;
        tokens.users = NULL;
    }
    return card->calls->attend_node(&args, &tokens, out, stream);
}

/* CUDA loads a kernel when it is first launched or captured, and may wait for all that its card does, which would be in
 * vain where that waits for a kernel of another card that is yet to be launched. So what was never launched is captured
 * first, for nothing. */
static void rehearse(struct sqz_card *first, const struct sqz_card_group *g)
{
    const struct sqz_gpu_calls *calls = first->calls;
    struct sqz_bound *whole = g->bound;
    const uint64_t bit = (uint64_t)1 << (g->n_tokens - 1);
    if (whole->rehearsed[g->dense] & bit) return;
    for (uint32_t r = 0; r < whole->ranks.n_ranks; r++) {
        struct sqz_card *card = first->ranks->card[r];
        void *stream = r ? first->ranks->lane[r].stream : first->stream;
        if (!calls->use(card->card) || !calls->begin_capture(stream)) break;
        for (uint32_t l = 0; l < whole->n_layer; l++) {
            const struct sqz_layer_shape *shape = &sqz_context_layer(whole->context, l)->shape;
            const size_t d = shape->head_dim, h = shape->n_head, k = shape->n_head_kv;
            if (!sqz_card_computes(whole->of_card[r], l)) continue;
            const struct sqz_attention_node node = {.layer = l,
                                                    .n_tokens = first->n_tokens,
                                                    .queries = (const float *)card->queries,
                                                    .query_token_stride = h * d,
                                                    .query_head_stride = d,
                                                    .keys = (const uint16_t *)card->queries,
                                                    .values = (const uint16_t *)card->queries,
                                                    .key_token_stride = k * d,
                                                    .key_head_stride = d,
                                                    .value_token_stride = k * d,
                                                    .value_head_stride = d};
            const bool ran = card->frame_layers[l].runs_here;
            attend_on(card, g, &node, (float *)card->out, NULL, stream);
            card->frame_layers[l].runs_here = ran;
        }
        void *captured = calls->end_capture(stream);
        if (captured) calls->free_captured(captured);
    }
    calls->use(first->card);
    whole->rehearsed[g->dense] |= bit;
}

enum sqz_status sqz_card_begin_others(struct sqz_card *first, struct sqz_backend_part *const *parts, size_t n_parts,
                                      bool first_of_pass, void *stream, struct sqz_error *error)
{
    struct sqz_card_ranks *s = first->ranks;
    const struct sqz_gpu_calls *calls = first->calls;
    enum sqz_status status = SQZ_OK;
    bool ok = true;
    for (uint32_t n = 2; n <= s->n && s->broken && ok; n++) ok = clear_mailboxes(s, n);
    s->broken = !ok;
    s->apart = s->waits = meet_apart(first);
    s->was_answered = true;
    s->first_of_pass = first_of_pass;
    memcpy(s->parts_of_pass, parts, n_parts * sizeof *parts);
    s->n_parts_of_pass = n_parts;
    for (uint32_t r = 1; r < s->n && ok && status == SQZ_OK; r++) {
        copy_groups(first, r);
        if (!s->card[r]->n_groups) continue;
        ok = calls->use(s->card[r]->card);
        if (ok) status = begin_on(first, r, error);
        if (ok && status == SQZ_OK && !s->apart)
            ok = put_frame(s, r) && calls->record(s->lane[r].done, s->lane[r].stream);
    }
    ok = calls->use(first->card) && ok;
    for (uint32_t r = 1; r < s->n && ok && status == SQZ_OK && !s->apart; r++)
        ok = !s->card[r]->n_groups || calls->follow(stream, s->lane[r].done);
    if (ok && status == SQZ_OK && !make_parts(first))
        status = sqz_card_no_memory(first, s->parts_room, "the parts of a batch", error);
    for (size_t i = 0; i < first->n_groups && ok && status == SQZ_OK; i++)
        if (first->groups[i].bound->ranks.n_ranks && first->groups[i].way == SQZ_TOGETHER_EACH)
            rehearse(first, &first->groups[i]);
    if (ok) return status;
    return sqz_error_set(error, SQZ_ERROR_INTERNAL, "a card that shares rows failed: %s", calls->complaint());
}

/* What was captured takes frames along itself. */
static void fill_frames(void *first)
{
    struct sqz_card_ranks *s = ((struct sqz_card *)first)->ranks;
    for (uint32_t r = 1; r < s->n; r++)
        if (s->card[r]->n_groups) fill_frame(s, r);
}

void sqz_card_tell_beside(struct sqz_card *first, struct sqz_gpu_beside *beside)
{
    const struct sqz_card_ranks *s = first->ranks;
    beside->ready = fill_frames;
    beside->user_data = first;
    for (uint32_t r = 1; r < s->n && s->apart; r++) {
        if (!s->card[r]->n_groups) continue;
        beside->of[beside->n].card = s->card[r]->card;
        beside->of[beside->n++].stream = s->lane[r].stream;
    }
}

/* ---- A node ---------------------------------------------------------------------------------- */

/* The first card's part is among them: they become the node's output. */
static enum sqz_status merge_parts(struct sqz_card *first, const struct sqz_card_group *g,
                                   const struct sqz_layer_shape *shape, float *out, void *stream)
{
    const struct sqz_card_ranks *s = first->ranks;
    const uint32_t n = g->bound->ranks.n_ranks, d = shape->head_dim;
    const size_t rows = g->n_tokens * shape->n_head;
    void *const f16 = first->out + g->first_token * sqz_card_query_bytes(shape);
    const struct sqz_cuda_merge_args merge = {.n_parts = n,
                                              .n_rows = (uint32_t)rows,
                                              .head_dim = d,
                                              .parts = (const float *)s->parts,
                                              .parts_lse = (const float *)s->parts + n * rows * d,
                                              .type = SQZ_ROW_F16,
                                              .out = f16};
    const enum sqz_status status = first->calls->merge(&merge, stream);
    return status == SQZ_OK ? first->calls->give(out, f16, rows, d, d, stream) : status;
}

enum sqz_status sqz_card_attend_shards(struct sqz_card *first, const struct sqz_backend_call *call, size_t i)
{
    struct sqz_card_ranks *s = first->ranks;
    const struct sqz_gpu_calls *calls = first->calls;
    const struct sqz_card_group *g = &first->groups[i];
    const struct sqz_layer *layer = sqz_context_layer(g->bound->context, call->node->layer);
    const struct sqz_layer_shape *shape = &layer->shape;
    const uint32_t n = layer->sliding_window ? 1 : g->bound->ranks.n_ranks;
    const size_t rows = g->n_tokens * shape->n_head, d = shape->head_dim;
    const bool meet = n == 1 || g->way == SQZ_TOGETHER_EACH; /* results meet in mailboxes, or there is one */
    float *const parts = (float *)s->parts, *const lse = parts + n * rows * d;
    float *const out = call->node->out + g->first_token * shape->n_head * d;
    enum sqz_status status = SQZ_OK;
    bool ok = s->apart || calls->record(s->come, call->stream);
    for (uint32_t r = 1; r < n && ok && status == SQZ_OK; r++) {
        struct sqz_card *card = s->card[r];
        const struct sqz_card_side *lane = &s->lane[r];
        ok = calls->use(card->card) && (s->apart ? put_frame(s, r) : calls->follow(lane->stream, s->come));
        if (ok)
            status = attend_on(card, g, call->node, meet ? NULL : parts + r * rows * d, meet ? NULL : lse + r * rows,
                               lane->stream);
        if (!meet && ok && status == SQZ_OK) ok = calls->record(lane->done, lane->stream);
    }
    ok = calls->use(first->card) && ok;
    if (ok && status == SQZ_OK)
        status = attend_on(first, g, call->node, meet ? out : parts, meet ? NULL : lse, call->stream);
    for (uint32_t r = 1; r < n && ok && !meet && status == SQZ_OK; r++)
        ok = calls->follow(call->stream, s->lane[r].done);
    if (ok && !meet && status == SQZ_OK) status = merge_parts(first, g, shape, out, call->stream);
    return ok ? status : SQZ_ERROR_INTERNAL;
}

/* ---- The end of a pass -------------------------------------------------------------------------- */

bool sqz_card_join_others(struct sqz_card *first, void *stream)
{
    struct sqz_card_ranks *s = first->ranks;
    const struct sqz_gpu_calls *calls = first->calls;
    bool ok = true;
    for (uint32_t r = 1; r < s->n && ok; r++) {
        if (!s->card[r]->n_groups) continue;
        ok = calls->use(s->card[r]->card) && sqz_card_bring_counts(s->card[r], s->lane[r].stream) &&
             (s->apart || calls->record(s->lane[r].done, s->lane[r].stream));
        ok = calls->use(first->card) && ok && (s->apart || calls->follow(stream, s->lane[r].done));
    }
    return ok;
}

void sqz_card_wait_for_others(struct sqz_card *first)
{
    struct sqz_card_ranks *s = first->ranks;
    for (uint32_t r = 1; r < s->n && s->waits; r++)
        if (s->card[r]->n_groups) s->was_answered = first->calls->wait(s->lane[r].stream) && s->was_answered;
    s->waits = false;
}

bool sqz_card_others_answered(struct sqz_card *first)
{
    struct sqz_card_ranks *s = first->ranks;
    sqz_card_wait_for_others(first);
    bool answered = s->was_answered;
    for (uint32_t r = 1; r < s->n; r++) s->card[r]->n_groups = 0;
    for (uint32_t n = 2; n <= s->n; n++) answered = answered && !s->failed[n];
    if (!answered) s->broken = true;
    return answered;
}
