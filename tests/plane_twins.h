/*
 * What the tests of rows in planes share: layers whose keys and values are kept so,
 * each with a twin that has the same numbers as F16, and one call of attention.
 */
#ifndef SQZ_TESTS_PLANE_TWINS_H
#define SQZ_TESTS_PLANE_TWINS_H

#include "layer_fixture.h"

#include "attention.h"
#include "build.h"

struct twins {
    struct material material;
    struct sqz_layer *layer; /* in planes */
    struct sqz_layer twin;
    uint16_t *arrays[2 + SQZ_MAX_LEVELS];
};

/* Rows as F16 ones. */
static inline uint16_t *as_halves(const struct sqz_rows *rows, size_t n_rows, size_t n_heads, size_t d)
{
    uint16_t *halves = take(n_heads * n_rows * d, sizeof *halves);
    for (size_t h = 0; h < n_heads; h++) {
        const struct sqz_rows head = sqz_rows_of_head(rows, n_rows, d, h);
        sqz_rows_to_f16(halves + h * n_rows * d, &head, 0, n_rows, d);
    }
    return halves;
}

static inline void make_twin(struct twins *t, bool upper)
{
    const struct sqz_layer *l = t->layer;
    const size_t k = l->shape.n_head_kv, d = l->shape.head_dim;
    const struct sqz_rows keys = upper ? sqz_rows_upper(&l->keys) : l->keys;
    const struct sqz_rows values = upper ? sqz_rows_upper(&l->values) : l->values;
    t->twin = *l;
    t->arrays[0] = as_halves(&keys, l->n_rows, k, d);
    t->arrays[1] = as_halves(&values, l->n_rows, k, d);
    t->twin.keys = sqz_f16_rows(t->arrays[0]);
    t->twin.values = sqz_f16_rows(t->arrays[1]);
    for (uint32_t i = 0; i < l->n_levels && l->tail; i++) {
        t->arrays[2 + i] = as_halves(&l->level[i].value_centroids, l->level[i].n_clusters, k, d);
        t->twin.level[i].value_centroids = sqz_f16_rows(t->arrays[2 + i]);
    }
}

struct variation {
    uint32_t n_head, n_head_kv, head_dim, n_levels, code_words;
    enum sqz_row_format rows;
    enum sqz_index index;
    enum sqz_rule rule;
    bool tail, upper;
};

static inline struct twins make_twins(const struct variation *v, size_t n_rows, uint64_t seed)
{
    const struct sqz_layer_shape shape = make_shape(v->n_head, v->n_head_kv, v->head_dim);
    struct twins t = {.material = make_material(shape, n_rows, 24, seed)};
    struct sqz_squeeze_options o;
    struct sqz_error error;
    float *queries = make_queries(&t.material, 24, seed + 5, 0.5);
    sqz_squeeze_options_default(&o, v->rule);
    o.n_levels = v->n_levels;
    o.centroid_share[0] = v->n_levels > 1 ? 0.1f : 0.05f;
    o.centroid_share[1] = 0.03f;
    o.centroid_share[2] = 0.01f;
    o.n_window = 20;
    o.n_sinks = 4;
    o.n_iterations = 5;
    o.tail = v->tail;
    o.value_skip = false; /* at the limit one is read and the other is not */
    o.index = v->index;
    o.code_words = v->code_words;
    o.rows = v->rows;
    if (sqz_layer_create(&t.layer, &shape, t.material.keys, t.material.values, n_rows, queries, 24, &o, 2, &error))
        fail_msg("sqz_layer_create: %s", error.message);
    free(queries);
    assert_true(sqz_row_is_planes(t.layer->keys.type) && sqz_row_is_planes(t.layer->values.type));
    assert_int_equal(t.layer->keys.planes.n_whole, t.layer->n_fixed);
    make_twin(&t, v->upper);
    return t;
}

static inline void free_twins(struct twins *t)
{
    for (size_t i = 0; i < COUNT(t->arrays); i++) free(t->arrays[i]);
    free_material(&t->material);
    sqz_layer_free(t->layer);
}

/* One call, and what came out. */
struct run {
    float *out, *lse;
    struct sqz_attention_stats stats;
};

static inline struct run run(const struct sqz_layer *layer, const struct sqz_attend_call *how)
{
    const size_t d = layer->shape.head_dim, h = layer->shape.n_head;
    struct run r = {.out = take(how->n_tokens * h * d, sizeof(float)), .lse = take(how->n_tokens * h, sizeof(float))};
    struct sqz_attend_call c = *how;
    struct guarded workspace = workspace_take(sqz_attend_workspace_bytes(layer, c.n_user, c.block_tokens, c.n_threads));
    c.layer = layer;
    c.out = r.out;
    c.lse = r.lse;
    c.stats = &r.stats;
    c.query_token_stride = c.out_token_stride = h * d;
    c.query_head_stride = c.out_head_stride = d;
    c.workspace = workspace.data;
    sqz_attend(&c);
    guarded_free(workspace);
    return r;
}

static inline void free_run(struct run *r)
{
    free(r->out);
    free(r->lse);
}

/* The largest sum of magnitudes of a logit's products. */
static inline double largest_magnitude(const struct sqz_layer *l, const float *queries, size_t n_tokens)
{
    const size_t d = l->shape.head_dim, h = l->shape.n_head, group = h / l->shape.n_head_kv;
    double most = 0;
    for (size_t q = 0; q < n_tokens * h; q++)
        for (size_t i = 0; i < l->n_rows; i++) {
            const uint16_t *key = sqz_rows_f16(&l->keys) + (q % h / group * l->n_rows + i) * d;
            exact_logit(queries + q * d, key, d, (double)l->shape.scale, &most);
        }
    return most;
}

#endif
