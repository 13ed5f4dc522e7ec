/* Several cards as one place, backend_cards.h: every call goes on to the card of its layer. */
#include "backend_cards.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"

struct cards {
    struct sqz_backend base;
    const struct sqz_model_layer *layers;
    struct sqz_backend *card[SQZ_MOST_CARDS];
    int n_cards;

    /* Of the call in flight: what the card is given. */
    struct sqz_backend_part parts[SQZ_MOST_SEQUENCES], *pointers[SQZ_MOST_SEQUENCES];
    bool begun[SQZ_MOST_CARDS];
};

struct sqz_bound {
    struct cards *cards;
    struct sqz_bound *on[SQZ_MOST_CARDS];
};

struct sqz_own_rows {
    struct cards *cards;
    struct sqz_own_rows *on[SQZ_MOST_CARDS];
};

static struct cards *cards_of(struct sqz_backend *backend)
{
    return (struct cards *)backend;
}

static int card_of_layer(const struct cards *cards, uint32_t layer)
{
    const int card = cards->layers[layer].card;
    return card < 0 ? 0 : card;
}

static struct sqz_backend *place_of_layer(struct sqz_backend *backend, uint32_t layer)
{
    return cards_of(backend)->card[card_of_layer(cards_of(backend), layer)];
}

/* ---- Contexts and rows ------------------------------------------------------------------------- */

static void unbind(struct sqz_bound *bound)
{
    if (!bound) return;
    for (int i = 0; i < bound->cards->n_cards; i++)
        if (bound->on[i]) bound->cards->card[i]->ops->unbind(bound->on[i]);
    free(bound);
}

static enum sqz_status bind(struct sqz_backend *backend, const struct sqz_context *context, struct sqz_bound **out,
                            struct sqz_error *error)
{
    struct cards *cards = cards_of(backend);
    struct sqz_bound *bound = calloc(1, sizeof *bound);
    enum sqz_status status = SQZ_OK;
    *out = NULL;
    if (!bound) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a bound context");
    bound->cards = cards;
    for (int i = 0; i < cards->n_cards && status == SQZ_OK; i++)
        status = cards->card[i]->ops->bind(cards->card[i], context, &bound->on[i], error);
    if (status == SQZ_OK) *out = bound;
    else unbind(bound);
    return status;
}

/* Of the first card that has one: contexts have layers of a shape. */
static const char *fallback(const struct sqz_bound *bound)
{
    for (int i = 0; i < bound->cards->n_cards; i++) {
        const char *text = bound->cards->card[i]->ops->fallback(bound->on[i]);
        if (text[0]) return text;
    }
    return "";
}

static void free_own(struct sqz_own_rows *own)
{
    if (!own) return;
    for (int i = 0; i < own->cards->n_cards; i++)
        if (own->on[i]) own->cards->card[i]->ops->free_own(own->on[i]);
    free(own);
}

static enum sqz_status create_own(struct sqz_backend *backend, struct sqz_bound *bound, size_t capacity_rows,
                                  struct sqz_own_rows **out, struct sqz_error *error)
{
    struct cards *cards = cards_of(backend);
    struct sqz_own_rows *own = calloc(1, sizeof *own);
    enum sqz_status status = SQZ_OK;
    *out = NULL;
    if (!own) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a sequence");
    own->cards = cards;
    for (int i = 0; i < cards->n_cards && status == SQZ_OK; i++)
        status = cards->card[i]->ops->create_own(cards->card[i], bound->on[i], capacity_rows, &own->on[i], error);
    if (status == SQZ_OK) *out = own;
    else free_own(own);
    return status;
}

static size_t own_bytes(const struct sqz_own_rows *own)
{
    size_t bytes = 0;
    for (int i = 0; i < own->cards->n_cards; i++) bytes += own->cards->card[i]->ops->own_bytes(own->on[i]);
    return bytes;
}

/* ---- Passes ---------------------------------------------------------------------------------------- */

/* The call as that card has it. */
static struct sqz_backend_call call_on(struct cards *cards, int card, const struct sqz_backend_call *call)
{
    struct sqz_backend_call on = *call;
    on.parts = cards->pointers;
    for (size_t i = 0; i < call->n_parts; i++) {
        cards->parts[i] = *call->parts[i];
        cards->parts[i].own = call->parts[i]->own->on[card];
        cards->pointers[i] = &cards->parts[i];
    }
    return on;
}

static void return_status(const struct cards *cards, const struct sqz_backend_call *call)
{
    for (size_t i = 0; i < call->n_parts; i++) call->parts[i]->status = cards->parts[i].status;
}

static uint64_t begin(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    struct cards *cards = cards_of(backend);
    const struct sqz_backend_call on = call_on(cards, call->card, call);
    const uint64_t key = cards->card[call->card]->ops->begin(cards->card[call->card], &on);
    cards->begun[call->card] = true;
    return_status(cards, call);
    return key;
}

/* Of a card that had nothing of the pass no layer was read. */
static void count_read(struct sqz_backend *backend, const struct sqz_backend_call *call, uint32_t layer)
{
    struct cards *cards = cards_of(backend);
    const int card = card_of_layer(cards, layer);
    if (!cards->begun[card]) return;
    const struct sqz_backend_call on = call_on(cards, card, call);
    cards->card[card]->ops->count_read(cards->card[card], &on, layer);
    for (size_t i = 0; i < call->n_parts; i++) call->parts[i]->united = cards->parts[i].united;
}

static void finish(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    struct cards *cards = cards_of(backend);
    for (int i = 0; i < cards->n_cards; i++) {
        if (!cards->begun[i]) continue;
        cards->begun[i] = false;
        const struct sqz_backend_call on = call_on(cards, i, call);
        cards->card[i]->ops->finish(cards->card[i], &on);
        return_status(cards, call);
    }
}

/* A call about a node goes on to the card of its layer. */
static void hand_on(struct sqz_backend *backend, const struct sqz_backend_call *call,
                    void (*step)(struct sqz_backend *card, const struct sqz_backend_call *call))
{
    struct cards *cards = cards_of(backend);
    const int card = card_of_layer(cards, call->node->layer);
    const struct sqz_backend_call on = call_on(cards, card, call);
    step(cards->card[card], &on);
    return_status(cards, call);
}

static void take(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    hand_on(backend, call, place_of_layer(backend, call->node->layer)->ops->take);
}

static void attend(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    hand_on(backend, call, place_of_layer(backend, call->node->layer)->ops->attend);
}

static void total(struct sqz_backend *backend, const struct sqz_backend_call *call)
{
    hand_on(backend, call, place_of_layer(backend, call->node->layer)->ops->total);
}

/* ---- Reading ------------------------------------------------------------------------------------------- */

static enum sqz_status plan_reading(struct sqz_backend *backend, const struct sqz_layer_shape *shape,
                                    struct sqz_error *error)
{
    struct cards *cards = cards_of(backend);
    enum sqz_status status = SQZ_OK;
    for (int i = 0; i < cards->n_cards && status == SQZ_OK; i++)
        status = cards->card[i]->ops->plan_reading(cards->card[i], shape, error);
    return status;
}

static enum sqz_status read(struct sqz_backend *backend, const struct sqz_backend_reading *r, struct sqz_error *error)
{
    struct sqz_backend *card = place_of_layer(backend, r->node->layer);
    return card->ops->read(card, r, error);
}

static enum sqz_status bring_rows(struct sqz_backend *backend, uint32_t layer, uint16_t *keys, uint16_t *values,
                                  struct sqz_error *error)
{
    struct sqz_backend *card = place_of_layer(backend, layer);
    return card->ops->bring_rows(card, layer, keys, values, error);
}

/* ---- Building -------------------------------------------------------------------------------- */

static enum sqz_status build(struct sqz_backend *backend, uint32_t index, const struct sqz_layer *layer,
                             const struct sqz_squeeze_options *options, bool *built, struct sqz_error *error)
{
    struct sqz_backend *card = place_of_layer(backend, index);
    return card->ops->builder->build(card, index, layer, options, built, error);
}

static enum sqz_status build_shard(struct sqz_backend *backend, uint32_t index, const struct sqz_deal *deal,
                                   uint32_t shard, const struct sqz_layer *layer,
                                   const struct sqz_squeeze_options *options, bool *built, struct sqz_error *error)
{
    struct sqz_backend *card = place_of_layer(backend, index);
    return card->ops->build_shard(card, index, deal, shard, layer, options, built, error);
}

static enum sqz_status count(struct sqz_backend *backend, uint32_t index, const struct sqz_layer *layer,
                             bool fit_variance, struct sqz_curve_sums *sums, float *gain, struct sqz_error *error)
{
    struct sqz_backend *card = place_of_layer(backend, index);
    return card->ops->builder->count(card, index, layer, fit_variance, sums, gain, error);
}

static enum sqz_status try_tail(struct sqz_backend *backend, uint32_t index, const struct sqz_layer *layer, bool *keep,
                                struct sqz_error *error)
{
    struct sqz_backend *card = place_of_layer(backend, index);
    return card->ops->builder->try_tail(card, index, layer, keep, error);
}

static enum sqz_status fetch(struct sqz_backend *backend, uint32_t index, const struct sqz_layer *layer,
                             struct sqz_layer *host, struct sqz_error *error)
{
    struct sqz_backend *card = place_of_layer(backend, index);
    return card->ops->builder->fetch(card, index, layer, host, error);
}

/* A next layer on another card is not asked of this one. */
static enum sqz_status fetch_rows(struct sqz_backend *backend, uint32_t index, const struct sqz_layer *layers,
                                  uint32_t next, struct sqz_layer *host, struct sqz_error *error)
{
    const struct cards *cards = cards_of(backend);
    const int card = card_of_layer(cards, index);
    if (next != UINT32_MAX && card_of_layer(cards, next) != card) next = UINT32_MAX;
    return cards->card[card]->ops->builder->fetch_rows(cards->card[card], index, layers, next, host, error);
}

static int builder_card(struct sqz_backend *backend, uint32_t index)
{
    return card_of_layer(cards_of(backend), index);
}

static const struct sqz_backend_builder builder = {.card = builder_card,
                                                   .build = build,
                                                   .count = count,
                                                   .try_tail = try_tail,
                                                   .fetch = fetch,
                                                   .fetch_rows = fetch_rows};

static const char *reading_fallback(struct sqz_backend *backend)
{
    struct cards *cards = cards_of(backend);
    for (int i = 0; i < cards->n_cards; i++) {
        const char *text = cards->card[i]->ops->reading_fallback(cards->card[i]);
        if (text[0]) return text;
    }
    return "";
}

static void end_reading(struct sqz_backend *backend)
{
    struct cards *cards = cards_of(backend);
    for (int i = 0; i < cards->n_cards; i++) cards->card[i]->ops->end_reading(cards->card[i]);
}

static bool fetch_queries(struct sqz_backend *backend, const struct sqz_attention_node *node,
                          const struct sqz_layer_shape *shape, void *stream, struct sqz_attention_node *host)
{
    struct sqz_backend *card = place_of_layer(backend, node->layer);
    return card->ops->fetch_queries(card, node, shape, stream, host);
}

/* ---- The place ------------------------------------------------------------------------------------------- */

static const struct sqz_backend_ops ops = {
    .name = "CUDA",
    .steered = true,
    .bind = bind,
    .unbind = unbind,
    .fallback = fallback,
    .create_own = create_own,
    .free_own = free_own,
    .own_bytes = own_bytes,
    .begin = begin,
    .take = take,
    .attend = attend,
    .total = total,
    .count_read = count_read,
    .finish = finish,
    .plan_reading = plan_reading,
    .read = read,
    .bring_rows = bring_rows,
    .builder = &builder,
    .build_shard = build_shard,
    .reading_fallback = reading_fallback,
    .end_reading = end_reading,
    .fetch_queries = fetch_queries,
};

enum sqz_status sqz_backend_cards_create(struct sqz_backend **out, const struct sqz_gpu_calls *calls, int n_cards,
                                         enum sqz_split split, size_t memory_bytes, enum sqz_together together,
                                         const struct sqz_model_layer *layers, int n_threads, struct sqz_error *error)
{
    struct cards *cards = calloc(1, sizeof *cards);
    enum sqz_status status = SQZ_OK;
    *out = NULL;
    if (!cards) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for attention");
    cards->base.ops = &ops;
    cards->layers = layers;
    cards->n_cards = split == SQZ_SPLIT_ROWS ? 1 : n_cards < SQZ_MOST_CARDS ? n_cards : SQZ_MOST_CARDS;
    for (int i = 0; i < cards->n_cards && status == SQZ_OK; i++)
        status = sqz_backend_cuda_create(&cards->card[i], calls, i, memory_bytes, together, layers, n_threads, error);
    if (status == SQZ_OK && split == SQZ_SPLIT_ROWS && n_cards > 1)
        status = sqz_backend_cuda_share(cards->card[0], n_cards, memory_bytes, error);
    if (status == SQZ_OK) *out = &cards->base;
    else sqz_backend_cards_free(&cards->base);
    return status;
}

void sqz_backend_cards_free(struct sqz_backend *backend)
{
    if (!backend) return;
    struct cards *cards = cards_of(backend);
    for (int i = 0; i < cards->n_cards; i++) sqz_backend_cuda_free(cards->card[i]);
    free(cards);
}

struct sqz_backend_cuda_use sqz_backend_cards_use(const struct sqz_backend *backend)
{
    const struct cards *cards = (const struct cards *)backend;
    struct sqz_backend_cuda_use use = {0};
    for (int i = 0; i < cards->n_cards; i++) {
        const struct sqz_backend_cuda_use one = sqz_backend_cuda_use(cards->card[i]);
        use.memory_bytes += one.memory_bytes;
        use.limit_bytes += one.limit_bytes;
        use.n_resident += one.n_resident;
        use.n_uploads += one.n_uploads;
        use.n_evictions += one.n_evictions;
        use.n_joined += one.n_joined;
        use.n_cpu_layers += one.n_cpu_layers;
    }
    return use;
}
