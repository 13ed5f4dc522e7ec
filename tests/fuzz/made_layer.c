/* Squeezed layers made of numbers that an input chooses; made_layer.h describes them. */
#include "made_layer.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_ELEMENTS = 12000 }; /* of an array: more is only slower */

/* ---- Arrays ------------------------------------------------------------------- */

static void *take(struct made_layer *made, size_t n, size_t bytes)
{
    void *block = calloc(n ? n : 1, bytes);
    if (!block || made->n_blocks == sizeof made->blocks / sizeof *made->blocks)
        fuzz_fail("a target has memory", "an array of a layer");
    return made->blocks[made->n_blocks++] = block;
}

/* Finite numbers up to 2; with a style above 7 also infinities, NaNs and numbers at the ends of the range. */
static uint16_t *make_halves(struct made_layer *made, size_t n, struct choices *c)
{
    static const uint16_t strange[] = {0x7e00, 0x7c00, 0xfc00, 0x7bff, 0xfbff, 1, 0};
    uint16_t *values = take(made, n, sizeof *values);
    const uint8_t style = choose_byte(c) % 16;
    for (size_t i = 0; i < n; i++) {
        values[i] = (uint16_t)(random_u32(c) & 0xb7ff);
        if (style > 7 && random_below(c, style > 11 ? 3 : 40) == 0) values[i] = strange[random_below(c, 7)];
    }
    return values;
}

static int8_t *make_bytes(struct made_layer *made, size_t n, struct choices *c)
{
    int8_t *values = take(made, n, sizeof *values);
    for (size_t i = 0; i < n; i++) values[i] = (int8_t)random_u32(c);
    return values;
}

static uint32_t *make_words(struct made_layer *made, size_t n, struct choices *c)
{
    uint32_t *values = take(made, n, sizeof *values);
    for (size_t i = 0; i < n; i++) values[i] = random_u32(c);
    return values;
}

/* Within [low, high], often at its ends; `any`: now and then a NaN or an infinity, where no check forbids it. */
static float *make_floats(struct made_layer *made, size_t n, float low, float high, bool any, struct choices *c)
{
    float *values = take(made, n, sizeof *values);
    const uint8_t style = choose_byte(c);
    for (size_t i = 0; i < n; i++) {
        const uint32_t part = random_below(c, 1024);
        values[i] = low + (high - low) * ((float)part / 1024.0f);
        if (style & 1 && part < 300) values[i] = part < 100 ? low : part < 200 ? high : 0;
        if (style & 2 && part > 900) values[i] = any ? (part & 1 ? NAN : INFINITY) : high;
        if (!any) values[i] = fminf(fmaxf(values[i], low), high);
    }
    return values;
}

/* Falls from 1 or from the largest that is allowed; thresholds rise. */
static float *make_curve(struct made_layer *made, size_t n_series, size_t n, bool rising, struct choices *c)
{
    float *values = take(made, n_series * n, sizeof *values);
    for (size_t series = 0; series < n_series; series++) {
        const uint8_t how = choose_byte(c);
        float value = rising ? (how % 3 == 0 ? -20.0f : how % 3 == 1 ? -1e6f : -1e-43f) : how & 1 ? 1.0f : 100.0f;
        for (size_t i = 0; i < n; i++) {
            values[series * n + i] = value;
            if (rising) value = how & 4 ? nextafterf(value, INFINITY) : value + 0.5f;
            else if (random_u32(c) & 1) value *= (float)random_below(c, 256) / 256.0f;
        }
    }
    return values;
}

/* Rises strictly from 0 to `below`; ranges of one, of many, and what is left in the last. */
static uint32_t *make_offsets(struct made_layer *made, size_t n_series, uint32_t n, uint32_t below, struct choices *c)
{
    uint32_t *offset = take(made, n_series * (n + 1), sizeof *offset);
    for (size_t series = 0; series < n_series; series++) {
        uint32_t *o = offset + series * (n + 1);
        const uint8_t how = choose_byte(c);
        for (uint32_t i = 1; i < n; i++) {
            const uint32_t room = below - (n - i) - o[i - 1]; /* at least 1 */
            o[i] = o[i - 1] + (how % 3 == 0 ? 1 : how % 3 == 1 ? 1 + random_below(c, room) : room);
        }
        o[n] = below;
    }
    return offset;
}

/* Rises from 0 to `directions`, parts may be empty. */
static uint32_t *make_parts(struct made_layer *made, size_t n_series, uint32_t n, uint32_t directions,
                            struct choices *c)
{
    uint32_t *first = take(made, n_series * (n + 1), sizeof *first);
    for (size_t series = 0; series < n_series; series++) {
        uint32_t *f = first + series * (n + 1);
        for (uint32_t i = 1; i < n; i++)
            f[i] = f[i - 1] + (random_u32(c) & 1 ? random_below(c, directions - f[i - 1] + 1) : 0);
        f[n] = directions;
    }
    return first;
}

/* Fixed rows in order, the others shuffled. */
static int32_t *make_positions(struct made_layer *made, const struct sqz_layer *layer, uint32_t n_tokens,
                               struct choices *c)
{
    const uint32_t n = layer->n_rows;
    int32_t *position = take(made, (size_t)layer->shape.n_head_kv * n, sizeof *position);
    for (uint32_t head = 0; head < layer->shape.n_head_kv; head++) {
        int32_t *p = position + (size_t)head * n;
        for (uint32_t i = 0; i < n; i++) p[i] = (int32_t)(n_tokens - n + i);
        for (uint32_t i = n; i-- > layer->n_fixed + 1;) {
            const uint32_t other = layer->n_fixed + random_below(c, i - layer->n_fixed + 1);
            const int32_t kept = p[i];
            p[i] = p[other];
            p[other] = kept;
        }
    }
    return position;
}

/* ---- Counts --------------------------------------------------------------------- */

struct made_form choose_form(struct choices *c, uint32_t most_tokens)
{
    const uint8_t how = choose_byte(c);
    struct made_form form = {1 + choose_below(c, how >= 224         ? most_tokens
                                                 : most_tokens < 40 ? most_tokens
                                                                    : 40),
                             (enum sqz_rule)(how & 1),
                             (enum sqz_index)(how >> 1 & 1),
                             (enum sqz_index)(how >> 2 & 1),
                             (how >> 3 & 1) == 0,
                             SQZ_ROWS_F16};
    /* Of bits that only very long layers look at beside this. */
    if ((how >> 4 & 3) == 3) form.rows = how & 64 ? SQZ_ROWS_INT4 : SQZ_ROWS_INT4_4;
    if (form.rows) form.key_format = SQZ_INDEX_F16;
    return form;
}

static void choose_shape(struct sqz_layer_shape *shape, struct choices *c)
{
    static const uint32_t heads[] = {1, 2, 4, 4, 9, 16, 33, 1024}, dims[] = {32, 48, 64, 32, 96, 128, 256, 80};
    static const float scales[] = {0.125f, 0.125f, 1.0f, 1e-38f, 1e-45f, 3e38f, 1e6f, 0.0884f};
    const uint8_t how = choose_byte(c), size = choose_byte(c);
    shape->n_head = heads[size & 128 ? how % 8 : how % 4];
    shape->n_head_kv = 1 + (how >> 3) % shape->n_head;
    while (shape->n_head % shape->n_head_kv) shape->n_head_kv--;
    shape->head_dim = dims[size & 64 ? size % 8 : size % 4];
    shape->scale = scales[choose_byte(c) % 8];
}

static void choose_counts(struct sqz_layer *layer, const struct made_form *form, struct choices *c)
{
    const uint8_t how = choose_byte(c);
    layer->rule = form->rule;
    layer->tail = how & 1;
    layer->value_skip = how & 2;
    layer->group = (enum sqz_group)(how >> 2 & 1);
    layer->n_rows = form->n_tokens;
    layer->n_levels = how & 8 ? how >> 4 & 3 : how >> 4 & 1;
    if (layer->n_levels == 0 && how & 32) {
        layer->sliding_window = true;
        layer->n_window_tokens = 1 + choose_below(c, 2 * form->n_tokens);
        layer->n_rows = layer->n_window_tokens < form->n_tokens ? layer->n_window_tokens : form->n_tokens;
    }
    layer->n_fixed = layer->n_levels ? choose_below(c, layer->n_rows) : layer->n_rows;
    uint32_t below = layer->n_rows - layer->n_fixed;
    for (uint32_t i = 0; i < layer->n_levels; i++) below = layer->level[i].n_clusters = 1 + choose_below(c, below);
    layer->n_curve = layer->n_levels ? 1 + choose_byte(c) % 9 : 0;
    if (layer->n_levels && how & 128) {
        layer->codes.n_words = 1 + choose_byte(c) % 4;
        layer->codes.n_directions = 1 + choose_byte(c) % layer->shape.head_dim;
        while (layer->codes.n_directions > 1 &&
               layer->codes.n_directions * layer->shape.n_head_kv * layer->shape.head_dim > MAX_ELEMENTS)
            layer->codes.n_directions = (layer->codes.n_directions + 1) / 2;
    }
    layer->n_queries = choose_byte(c) % 3;
    if (layer->n_queries * layer->shape.n_head * layer->shape.head_dim > MAX_ELEMENTS) layer->n_queries = 0;
}

/* ---- The layer ------------------------------------------------------------------------ */

/* Of INT8 ones the mean is still missing. */
static struct sqz_rows make_rows(struct made_layer *made, enum sqz_index format, size_t n, size_t dim,
                                 struct choices *c)
{
    if (format == SQZ_INDEX_F16) return sqz_f16_rows(make_halves(made, n * dim, c));
    const int8_t *numbers = make_bytes(made, n * dim, c);
    return (struct sqz_rows){.type = SQZ_ROW_I8, .data = numbers, .scale = make_floats(made, n, -1.0f, 1.0f, true, c)};
}

/* Rows in planes of a type and count of whole rows that are set, n a head. */
static void make_planes(struct made_layer *made, struct sqz_rows *rows, size_t heads, size_t n, size_t dim,
                        struct choices *c)
{
    const size_t n_whole = rows->planes.n_whole, rounded = heads * (n - n_whole),
                 bytes = rounded * sqz_plane_bytes(dim);
    rows->data = make_bytes(made, bytes, c);
    if (rows->type == SQZ_ROW_I44) rows->planes.lower = (const uint8_t *)make_bytes(made, bytes, c);
    rows->planes.step = make_halves(made, rounded, c);
    if (n_whole) rows->planes.whole = make_halves(made, heads * n_whole * dim, c);
}

static void make_levels(struct made_layer *made, const struct made_form *form, struct choices *c)
{
    struct sqz_layer *layer = &made->layer;
    const size_t heads = layer->shape.n_head_kv, dim = layer->shape.head_dim;
    uint32_t below = layer->n_rows - layer->n_fixed;
    for (uint32_t i = 0; i < layer->n_levels; i++) {
        struct sqz_level *level = &layer->level[i];
        const size_t n = heads * level->n_clusters;
        level->centroids = make_rows(made, form->index, n, dim, c);
        if (layer->tail && form->rows) {
            level->value_centroids = (struct sqz_rows){.type = SQZ_ROW_I44};
            make_planes(made, &level->value_centroids, heads, level->n_clusters, dim, c);
        } else if (layer->tail) {
            level->value_centroids = make_rows(made, SQZ_INDEX_F16, n, dim, c);
        }
        level->offset = make_offsets(made, heads, level->n_clusters, below, c);
        level->variance = make_floats(made, n, 0.0f, choose_byte(c) & 1 ? FLT_MAX : 4.0f, false, c);
        below = level->n_clusters;
    }
}

static void make_calibration(struct made_layer *made, struct choices *c)
{
    struct sqz_layer *layer = &made->layer;
    const size_t heads = layer->shape.n_head_kv, n = layer->n_curve;
    const uint8_t how = choose_byte(c);
    layer->log_threshold = make_curve(made, 1, n, true, c);
    layer->share = make_curve(made, heads, n, false, c);
    layer->lost_mass = make_floats(made, heads * n, 0.0f, 2.0f, false, c);
    if (how & 1)
        layer->tail_gain = make_floats(made, heads * n, how & 8 ? -1e6f : -3.0f, how & 8 ? 1e6f : 3.0f, false, c);
    if (how & 2)
        layer->variance_gain = make_floats(made, heads, how & 16 ? -1e6f : 0.0f, how & 16 ? 1e6f : 2.0f, false, c);
    if (how & 4) layer->global_share = make_curve(made, 1, n, false, c);
}

static void make_codes(struct made_layer *made, struct choices *c)
{
    struct sqz_layer *layer = &made->layer;
    struct sqz_codes *codes = &layer->codes;
    const size_t heads = layer->shape.n_head_kv, words = codes->n_words, directions = codes->n_directions;
    codes->words = make_words(made, heads * words * (layer->n_rows - layer->n_fixed), c);
    codes->directions = make_halves(made, heads * directions * layer->shape.head_dim, c);
    codes->book = make_halves(made, heads * 16 * directions, c);
    codes->first = make_parts(made, heads, 8 * codes->n_words, codes->n_directions, c);
    codes->spread = make_floats(made, heads * directions, 0.0f, choose_byte(c) & 1 ? FLT_MAX : 2.0f, false, c);
}

void make_layer(struct made_layer *made, const struct made_form *form, struct choices *c)
{
    struct sqz_layer *layer = &made->layer;
    memset(made, 0, sizeof *made);
    choose_shape(&layer->shape, c);
    while (layer->shape.n_head_kv > 1 &&
           (size_t)layer->shape.n_head_kv * form->n_tokens * layer->shape.head_dim > MAX_ELEMENTS)
        layer->shape.n_head = layer->shape.n_head_kv = layer->shape.n_head_kv / 2;
    choose_counts(layer, form, c);
    const size_t heads = layer->shape.n_head_kv, dim = layer->shape.head_dim, rows = heads * layer->n_rows;
    const bool small = layer->n_levels && form->key_format == SQZ_INDEX_INT8;
    if (layer->n_levels && form->rows) {
        sqz_layer_plan_planes(layer, form->rows);
        make_planes(made, &layer->keys, heads, layer->n_rows, dim, c);
        make_planes(made, &layer->values, heads, layer->n_rows, dim, c);
        layer->values.mean = make_floats(made, heads * dim, -9.0f, 9.0f, true, c);
    } else {
        layer->keys = make_rows(made, small && form->keys_alone ? SQZ_INDEX_INT8 : SQZ_INDEX_F16, rows, dim, c);
        layer->values = make_rows(made, SQZ_INDEX_F16, rows, dim, c);
    }
    layer->position = make_positions(made, layer, form->n_tokens, c);
    const float *mean = NULL;
    if (layer->n_levels && (form->index == SQZ_INDEX_INT8 || small))
        mean = make_floats(made, heads * dim, -9.0f, 9.0f, true, c);
    if (small && !form->keys_alone) layer->retained_keys = make_rows(made, SQZ_INDEX_INT8, rows, dim, c);
    make_levels(made, form, c);
    sqz_layer_set_mean(layer, mean);
    sqz_layer_join_planes(layer);
    if (layer->n_curve) make_calibration(made, c);
    if (layer->codes.n_words) make_codes(made, c);
    if (layer->n_queries) layer->queries = make_halves(made, (size_t)layer->n_queries * layer->shape.n_head * dim, c);
}

void free_made_layer(struct made_layer *made)
{
    while (made->n_blocks) free(made->blocks[--made->n_blocks]);
}
