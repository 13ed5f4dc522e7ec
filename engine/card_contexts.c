/* Contexts in a card's memory; card.h. */
#include "card.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "layer.h"

/* ---- Memory on the card ---------------------------------------------------------------- */

static void evict(struct sqz_bound *b)
{
    struct sqz_card *cuda = b->cuda;
    if (!b->resident) return;
    for (uint32_t l = 0; l < b->n_layer; l++) {
        if (b->layers[l].memory) cuda->calls->release(b->layers[l].memory);
        b->layers[l].memory = NULL;
    }
    cuda->used -= b->bytes;
    b->bytes = 0;
    b->resident = false;
}

static struct sqz_bound *least_recently_used(struct sqz_card *cuda)
{
    struct sqz_bound *oldest = NULL;
    for (struct sqz_bound *b = cuda->contexts; b; b = b->next)
        if (b->resident && !b->busy && (!oldest || b->last_used < oldest->last_used)) oldest = b;
    return oldest;
}

/* The context that nobody has asked for longest leaves; false: all that are there are being asked. */
static bool evict_oldest(struct sqz_card *cuda)
{
    struct sqz_bound *oldest = least_recently_used(cuda);
    if (!oldest) return false;
    evict(oldest);
    cuda->n_evictions++;
    return true;
}

/* NULL where there is none, below the limit or on the card, also after all others have left. */
void *sqz_card_take(struct sqz_card *cuda, size_t bytes)
{
    void *memory = NULL;
    while (cuda->used + bytes > cuda->limit)
        if (!evict_oldest(cuda)) return NULL;
    while (!(memory = cuda->calls->allocate(bytes)))
        if (!evict_oldest(cuda)) return NULL;
    cuda->used += bytes;
    return memory;
}

void sqz_card_give(struct sqz_card *cuda, void *memory, size_t bytes)
{
    if (!memory) return;
    cuda->calls->release(memory);
    cuda->used -= bytes;
}

enum sqz_status sqz_card_no_memory(const struct sqz_card *cuda, size_t bytes, const char *what, struct sqz_error *error)
{
    return sqz_error_set(error, SQZ_ERROR_MEMORY,
                         "out of memory on the card: %zu MiB for %s, %zu of %zu MiB are taken (--gpu-memory)",
                         (bytes >> 20) + 1, what, cuda->used >> 20, cuda->limit >> 20);
}

/* A buffer of at least so many bytes; what it held is lost. */
bool sqz_card_grow(struct sqz_card *cuda, char **memory, size_t *room, size_t bytes)
{
    if (bytes <= *room) return true;
    sqz_card_give(cuda, *memory, *room);
    *memory = sqz_card_take(cuda, bytes);
    *room = *memory ? bytes : 0;
    return *memory != NULL;
}

bool sqz_card_grow_pinned(struct sqz_card *cuda, void **memory, size_t *room, size_t bytes)
{
    if (bytes <= *room) return true;
    if (*memory) cuda->calls->release_pinned(*memory);
    *memory = cuda->calls->allocate_pinned(bytes);
    *room = *memory ? bytes : 0;
    return *memory != NULL;
}

/* ---- Contexts ------------------------------------------------------------------------------ */

/* An array of a layer and whose pointer it becomes. */
struct piece {
    struct sqz_card_array array;
    const void **to;
};
enum { MOST_PIECES = 16 + 8 * SQZ_MAX_LEVELS };

static struct sqz_card_array *add_rows_piece(struct piece *pieces, size_t *n, struct sqz_card_array array,
                                             const void **to)
{
    struct piece *piece = &pieces[*n];
    *to = NULL;
    *piece = (struct piece){array, to};
    *n += array.host && array.n_rows && array.card_bytes;
    return &piece->array;
}

static struct sqz_card_array *add_piece(struct piece *pieces, size_t *n, const void *from, size_t n_numbers,
                                        size_t bytes_of_each, const void **to)
{
    const struct sqz_card_array array = {from, n_numbers, bytes_of_each, bytes_of_each, 0, NULL, 0, 0};
    return add_rows_piece(pieces, n, array, to);
}

/* n rows, of all heads together, of numbers that head_dim of make a row. */
static void add_padded_piece(struct piece *pieces, size_t *n, const void *from, size_t n_rows, uint32_t head_dim,
                             size_t bytes_of_each, const void **to)
{
    const struct sqz_card_array array = {
        from, n_rows, head_dim * bytes_of_each, sqz_card_dim(head_dim) * bytes_of_each, 0, NULL, 0, 0};
    add_rows_piece(pieces, n, array, to);
}

/* n rows a head, of another type than the card takes, as F16: made so on the way. */
static void half_pieces(struct piece *pieces, size_t *n, const struct sqz_layer_shape *shape, size_t n_rows,
                        const struct sqz_rows *from, struct sqz_rows *to)
{
    *to = (struct sqz_rows){.type = SQZ_ROW_F16};
    add_padded_piece(pieces, n, from->data, (size_t)shape->n_head_kv * n_rows, shape->head_dim, sizeof(uint16_t),
                     &to->data);
    struct sqz_card_array *array = &pieces[*n - 1].array;
    array->rows = from;
    array->head_rows = n_rows;
    array->head_dim = shape->head_dim;
}

/* n rows a head; those in planes as F16. */
static void rows_pieces(struct piece *pieces, size_t *n, const struct sqz_layer_shape *shape, size_t n_rows,
                        const struct sqz_rows *from, struct sqz_rows *to)
{
    const size_t k = shape->n_head_kv;
    if (sqz_row_is_planes(from->type)) {
        half_pieces(pieces, n, shape, n_rows, from, to);
        return;
    }
    to->type = from->type;
    add_padded_piece(pieces, n, from->data, k * n_rows, shape->head_dim, sqz_row_data_bytes(from->type, 1), &to->data);
    add_piece(pieces, n, from->scale, k * n_rows, sizeof(float), (const void **)&to->scale);
    add_padded_piece(pieces, n, from->mean, k, shape->head_dim, sizeof(float), (const void **)&to->mean);
}

/* n rows a head in planes, as they are. */
static void planes_pieces(struct piece *pieces, size_t *n, const struct sqz_layer_shape *shape, size_t n_rows,
                          const struct sqz_rows *from, struct sqz_rows *to)
{
    const struct sqz_planes *planes = &from->planes;
    const size_t k = shape->n_head_kv, d = shape->head_dim, rounded = k * (n_rows - planes->n_whole);
    *to = (struct sqz_rows){.type = from->type, .planes.n_whole = planes->n_whole};
    add_piece(pieces, n, from->data, rounded, sqz_plane_bytes(d), &to->data);
    add_piece(pieces, n, planes->lower, rounded, sqz_plane_bytes(d), (const void **)&to->planes.lower);
    add_piece(pieces, n, planes->step, rounded, sizeof(uint16_t), (const void **)&to->planes.step);
    add_piece(pieces, n, planes->whole, k * planes->n_whole, d * sizeof(uint16_t), (const void **)&to->planes.whole);
    add_piece(pieces, n, from->mean, k * d, sizeof(float), (const void **)&to->mean);
}

/* Keys are F16 on the card, or in planes: those of an INT8 file that has them twice, or made so on the way. */
static void keys_pieces(struct piece *pieces, size_t *n, const struct sqz_layer *from, struct sqz_rows *to)
{
    const struct sqz_rows *keys = from->retained_keys.data ? &from->retained_keys : &from->keys;
    if (keys->type == SQZ_ROW_I8) half_pieces(pieces, n, &from->shape, from->n_rows, keys, to);
    else rows_pieces(pieces, n, &from->shape, from->n_rows, keys, to);
}

/* Kernels divide a cluster's variance by the numbers of a row, which are more on the card; 0: as many. */
static float padding_factor(const struct sqz_layer *layer)
{
    const uint32_t d = layer->shape.head_dim;
    return sqz_card_dim(d) == d ? 0.0f : (float)sqz_card_dim(d) / (float)d;
}

static void level_pieces(struct piece *pieces, size_t *n, const struct sqz_layer *from, uint32_t i,
                         struct sqz_level *to)
{
    const struct sqz_level *v = &from->level[i];
    const size_t k = from->shape.n_head_kv, c = v->n_clusters;
    to->n_clusters = v->n_clusters;
    rows_pieces(pieces, n, &from->shape, c, &v->centroids, &to->centroids);
    rows_pieces(pieces, n, &from->shape, c, &v->value_centroids, &to->value_centroids);
    add_piece(pieces, n, v->offset, k * (c + 1), sizeof(uint32_t), (const void **)&to->offset);
    add_piece(pieces, n, v->variance, k * c, sizeof(float), (const void **)&to->variance)->factor =
        padding_factor(from);
}

static void codes_pieces(struct piece *pieces, size_t *n, const struct sqz_layer *from, struct sqz_codes *to)
{
    const struct sqz_codes *codes = &from->codes;
    const size_t k = from->shape.n_head_kv, m = codes->n_directions, w = codes->n_words;
    to->n_words = codes->n_words;
    to->n_directions = codes->n_directions;
    const float factor = padding_factor(from);
    add_piece(pieces, n, codes->words, k * w * (from->n_rows - from->n_fixed), sizeof(uint32_t),
              (const void **)&to->words);
    add_padded_piece(pieces, n, codes->directions, k * m, from->shape.head_dim, sizeof(uint16_t),
                     (const void **)&to->directions);
    add_piece(pieces, n, codes->book, k * 16 * m, sizeof(uint16_t), (const void **)&to->book);
    add_piece(pieces, n, codes->first, k * (8 * w + 1), sizeof(uint32_t), (const void **)&to->first);
    /* Times a cluster's variance: what that has more, this has less. */
    add_piece(pieces, n, codes->spread, k * m, sizeof(float), (const void **)&to->spread)->factor =
        factor == 0.0f ? 0.0f : 1.0f / factor;
}

/* Everything that the kernels know of a layer's structure is here. copy->planes: rows in planes stay so. */
static size_t describe_layer(struct sqz_card_layer *copy, const struct sqz_layer *from, struct piece *pieces)
{
    struct sqz_layer *to = &copy->layer;
    size_t n = 0;
    memset(to, 0, sizeof *to);
    to->space = SQZ_SPACE_CUDA;
    to->shape = sqz_card_shape(&from->shape);
    to->n_rows = from->n_rows;
    to->n_fixed = from->n_levels ? from->n_fixed : 0;
    to->n_levels = from->n_levels;
    to->rule = from->rule;
    to->group = from->group;
    if (copy->planes) {
        planes_pieces(pieces, &n, &from->shape, from->n_rows, &from->keys, &to->keys);
        planes_pieces(pieces, &n, &from->shape, from->n_rows, &from->values, &to->values);
    } else {
        keys_pieces(pieces, &n, from, &to->keys);
        rows_pieces(pieces, &n, &from->shape, from->n_rows, &from->values, &to->values);
    }
    add_piece(pieces, &n, from->variance_gain, from->shape.n_head_kv, sizeof(float),
              (const void **)&copy->variance_gain);
    for (uint32_t i = 0; i < from->n_levels; i++) level_pieces(pieces, &n, from, i, &to->level[i]);
    if (from->codes.n_words && from->n_levels) codes_pieces(pieces, &n, from, &to->codes);
    return n;
}

/* The layer as drafts read it. */
static struct sqz_layer upper_of(const struct sqz_layer *layer)
{
    struct sqz_layer upper = *layer;
    upper.keys = sqz_rows_upper(&layer->keys);
    upper.values = sqz_rows_upper(&layer->values);
    return upper;
}

static enum sqz_status upload_layer(struct sqz_card *cuda, struct sqz_card_layer *copy, const struct sqz_layer *from,
                                    struct sqz_error *error)
{
    struct piece pieces[MOST_PIECES];
    const size_t n = describe_layer(copy, from, pieces);
    size_t bytes = 0;
    for (size_t i = 0; i < n; i++) bytes += sqz_card_aligned(sqz_card_array_bytes(&pieces[i].array));
    if (copy->planes) bytes += cuda->calls->plane_index_bytes(&copy->layer);
    copy->memory = sqz_card_take(cuda, bytes);
    copy->bytes = copy->memory ? bytes : 0;
    if (!copy->memory) return sqz_card_no_memory(cuda, bytes, "a layer of the context", error);
    char *at = copy->memory;
    bool ok = true;
    for (size_t i = 0; i < n && ok; i++) {
        *pieces[i].to = at;
        ok = sqz_card_upload(cuda, at, &pieces[i].array);
        at += sqz_card_aligned(sqz_card_array_bytes(&pieces[i].array));
    }
    if (copy->planes) copy->layer.plane_index = at;
    sqz_layer_join_planes(&copy->layer);
    copy->upper = upper_of(&copy->layer);
    if (sqz_card_send(cuda) && ok) return SQZ_OK;
    return sqz_error_set(error, SQZ_ERROR_INTERNAL, "the card took no copy: %s", cuda->calls->complaint());
}

/* What stands beside rows in planes, when all arrays have come. */
static bool make_plane_indexes(struct sqz_bound *b)
{
    const struct sqz_gpu_calls *calls = b->cuda->calls;
    bool ok = true, any = false;
    for (uint32_t l = 0; l < b->n_layer && ok; l++) {
        const struct sqz_layer *layer = &b->layers[l].layer;
        if (!sqz_card_computes(b, l) || !b->layers[l].planes) continue;
        ok = calls->plane_index(layer, (void *)(uintptr_t)layer->plane_index, b->cuda->stream) == SQZ_OK;
        any = true;
    }
    return ok && (!any || calls->wait(b->cuda->stream));
}

enum sqz_status sqz_card_make_resident(struct sqz_bound *b, struct sqz_error *error)
{
    struct sqz_card *cuda = b->cuda;
    enum sqz_status status = SQZ_OK;
    const bool was_busy = b->busy;
    b->last_used = ++cuda->clock;
    if (b->resident) return SQZ_OK;
    b->resident = b->busy = true; /* not to be evicted while it comes */
    for (uint32_t l = 0; l < b->n_layer && status == SQZ_OK; l++) {
        if (!sqz_card_computes(b, l)) continue;
        status = upload_layer(cuda, &b->layers[l], sqz_context_layer(b->context, l), error);
        b->bytes += b->layers[l].bytes;
    }
    if (!sqz_card_finish_uploads(cuda) && status == SQZ_OK)
        status = sqz_error_set(error, SQZ_ERROR_INTERNAL, "the card took no copy: %s", cuda->calls->complaint());
    if (status == SQZ_OK && !make_plane_indexes(b))
        status = sqz_error_set(error, SQZ_ERROR_INTERNAL, "the card made no index of rows in planes: %s",
                               cuda->calls->complaint());
    b->busy = was_busy;
    if (status != SQZ_OK) evict(b);
    b->generation = ++cuda->generation;
    cuda->n_uploads++;
    return status;
}

/* Why a layer has no kernel; NULL: it has. planes: that reads its rows in planes as they are. */
static const char *obstacle_of(const struct sqz_card *cuda, const struct sqz_layer *layer, bool planes)
{
    struct piece pieces[MOST_PIECES];
    struct sqz_card_layer copy = {.planes = planes};
    describe_layer(&copy, layer, pieces);
    struct sqz_cuda_attend_args args = {.layer = &copy.layer, .n_sequences = 1, .n_tokens = 1};
    const char *obstacle = cuda->calls->obstacle(&args);
    args.dense = layer->n_levels == 0;
    args.n_tokens = SQZ_BATCH_TOKENS;
    return obstacle ? obstacle : cuda->calls->obstacle(&args);
}

/* Whether a layer's rows are in planes and stay so: a head dimension that has kernels, of which none is padded. Others
 * become F16 on their way. */
static bool stays_in_planes(const struct sqz_card *cuda, const struct sqz_layer *layer)
{
    return sqz_row_is_planes(layer->keys.type) && sqz_card_dim(layer->shape.head_dim) == layer->shape.head_dim &&
           !obstacle_of(cuda, layer, true);
}

/* Which layers are the CPU's, and the sentence about them. */
static void choose_places(struct sqz_bound *b)
{
    uint32_t first = 0;
    const char *why = NULL;
    for (uint32_t l = 0; l < b->n_layer; l++) {
        if (!sqz_card_computes(b, l)) continue;
        const struct sqz_layer *layer = sqz_context_layer(b->context, l);
        b->layers[l].planes = stays_in_planes(b->cuda, layer);
        const char *obstacle = obstacle_of(b->cuda, layer, b->layers[l].planes);
        if (!obstacle) continue;
        if (!why) why = obstacle, first = l;
        b->layers[l].on_cpu = true;
        b->n_on_cpu++;
    }
    if (why)
        snprintf(
            b->fallback, sizeof b->fallback,
            "attention of %u of %u layers runs on the CPU, from copies, because there is no kernel for it: of layer "
            "%u, %s",
            b->n_on_cpu, b->n_layer, first, why);
}

const char *sqz_card_fallback(const struct sqz_bound *b)
{
    return b->fallback;
}

void sqz_card_unbind(struct sqz_bound *b)
{
    if (!b || --b->n_refs) return;
    struct sqz_card *cuda = b->cuda;
    cuda->calls->use(cuda->card);
    cuda->calls->wait(cuda->stream);
    evict(b);
    for (struct sqz_bound **p = &cuda->contexts; *p; p = &(*p)->next)
        if (*p == b) {
            *p = b->next;
            break;
        }
    if (b->cpu) cuda->cpu->ops->unbind(b->cpu);
    free(b->layers);
    free(b);
}

enum sqz_status sqz_card_bind(struct sqz_backend *backend, const struct sqz_context *context, struct sqz_bound **bound,
                              struct sqz_error *error)
{
    struct sqz_card *cuda = sqz_card_of(backend);
    *bound = NULL;
    cuda->calls->use(cuda->card);
    for (struct sqz_bound *b = cuda->contexts; b; b = b->next)
        if (b->context == context) {
            b->n_refs++;
            *bound = b;
            return SQZ_OK;
        }
    struct sqz_bound *b = calloc(1, sizeof *b);
    if (!b) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a bound context");
    b->cuda = cuda;
    b->context = context;
    b->n_refs = 1;
    b->each_most = SQZ_CARD_EACH_MOST;
    b->n_layer = sqz_context_get_meta(context)->n_layer;
    b->layers = calloc(b->n_layer, sizeof *b->layers);
    b->next = cuda->contexts;
    cuda->contexts = b;
    enum sqz_status status = b->layers ? cuda->cpu->ops->bind(cuda->cpu, context, &b->cpu, error)
                                       : sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory for a bound context");
    if (status == SQZ_OK) {
        choose_places(b);
        status = sqz_card_make_resident(b, error);
    }
    if (status != SQZ_OK) {
        sqz_card_unbind(b);
        return status;
    }
    *bound = b;
    return SQZ_OK;
}
