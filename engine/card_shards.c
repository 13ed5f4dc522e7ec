/* Shards of a layer made on the card of rows that were read there; card.h, backend.h. */
#include "card.h"

/* A shard's rows of [K][T][D], one behind the other. */
static bool deal_half(struct sqz_card *cuda, const struct sqz_deal *deal, uint32_t shard,
                      const struct sqz_layer_shape *shape, uint16_t *to, const uint16_t *from)
{
    const size_t row = shape->head_dim * sizeof *to, block = deal->block_tokens * row;
    const size_t n = sqz_deal_tokens(deal, shard, deal->n_tokens), n_blocks = n / deal->block_tokens;
    const size_t left = n - n_blocks * deal->block_tokens;
    bool ok = true;
    for (size_t h = 0; h < shape->n_head_kv && ok; h++) {
        const char *head = (const char *)from + h * deal->n_tokens * row;
        char *mine = (char *)to + h * n * row;
        if (n_blocks)
            ok = cuda->calls->copy_runs(mine, block, head + shard * block, deal->count * block, block, n_blocks,
                                        cuda->stream);
        if (ok && left)
            ok = cuda->calls->copy_runs(mine + n_blocks * block, left * row,
                                        head + sqz_deal_position(deal, shard, n - left) * row, left * row, left * row,
                                        1, cuda->stream);
    }
    return ok;
}

/* What was built comes to lie where the planned layer has it. */
static bool bring_built(struct sqz_card *cuda, const struct sqz_card_built *b, const struct sqz_card_rows *part,
                        const struct sqz_layer *layer)
{
    return cuda->calls->get((void *)(uintptr_t)layer->position, b->layer.position, sqz_layer_index_span(&b->layer),
                            cuda->stream) &&
           cuda->calls->wait(cuda->stream) &&
           sqz_card_download(cuda, (void *)(uintptr_t)layer->keys.data, part->keys, part->bytes / 2) &&
           sqz_card_download(cuda, (void *)(uintptr_t)layer->values.data, part->values, part->bytes / 2);
}

enum sqz_status sqz_card_build_shard(struct sqz_backend *backend, uint32_t index, const struct sqz_deal *deal,
                                     uint32_t shard, const struct sqz_layer *layer,
                                     const struct sqz_squeeze_options *options, bool *built, struct sqz_error *error)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    const struct sqz_card_rows *rows = sqz_card_rows_to_build(cuda, index, deal->n_tokens, layer);
    const size_t n = (size_t)layer->shape.n_head_kv * layer->n_rows * layer->shape.head_dim;
    struct sqz_card_rows part = {.bytes = 2 * n * sizeof(uint16_t), .capacity = layer->n_rows};
    struct sqz_card_built b = {0};
    *built = false;
    if (!rows || layer->keys.type != SQZ_ROW_F16 || layer->values.type != SQZ_ROW_F16) return SQZ_OK;
    cuda->calls->use(cuda->card);
    part.keys = sqz_card_take(cuda, part.bytes);
    if (!part.keys) return SQZ_OK;
    part.values = part.keys + n;
    enum sqz_status status = SQZ_OK;
    if (!deal_half(cuda, deal, shard, &layer->shape, part.keys, rows->keys) ||
        !deal_half(cuda, deal, shard, &layer->shape, part.values, rows->values))
        status = sqz_card_building_failed(cuda, "dealing out a layer", error);
    if (status == SQZ_OK) status = sqz_card_build_rows(cuda, &b, &part, index, layer, options, built, error);
    if (status == SQZ_OK && *built && !bring_built(cuda, &b, &part, layer))
        status = sqz_card_building_failed(cuda, "bringing a shard's layer", error);
    cuda->calls->wait(cuda->stream);
    sqz_card_forget_built(cuda, &b);
    sqz_card_give(cuda, part.keys, part.bytes);
    return status;
}
