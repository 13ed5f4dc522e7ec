/*
 * Lookup of queries in the centroids of one KV head. See lookup.h for the
 * formulas. No logarithm or allocation on the way: scores are compared in the
 * linear domain, counts enter as factors.
 */
#include "lookup.h"

#include <math.h>
#include <string.h>

#include "kernels.h"
#include "lookup_keys.h"

void sqz_lookup_carve(struct sqz_lookup_buffers *b, struct sqz_arena *arena, const struct sqz_layer *layer, size_t rows)
{
    const size_t head_dim = layer->shape.head_dim, max_clusters = layer->n_levels ? layer->level[0].n_clusters : 0;
    const size_t stride = (max_clusters + 15) / 16 * 16; /* level 0 has the most */
    const size_t n_keys = layer->codes.n_words ? layer->n_rows - layer->n_fixed : 0;
    const size_t coded_rows = n_keys == 0 ? 0 : rows < SQZ_MAX_GROUP_QUERIES ? rows : SQZ_MAX_GROUP_QUERIES;
    b->stride = stride;
    b->key_stride = (n_keys + 15) / 16 * 16;
    b->logit = sqz_arena_take(arena, rows, stride, sizeof(float));
    b->corrected = sqz_arena_take(arena, rows, stride, sizeof(float));
    b->score = sqz_arena_take(arena, stride, 1, sizeof(float));
    b->keys = sqz_arena_take(arena, stride, 1, sizeof(float));
    b->variance = sqz_arena_take(arena, stride, 1, sizeof(float));
    b->cluster = sqz_arena_take(arena, stride, 1, sizeof(uint32_t));
    b->active = sqz_arena_take(arena, stride + 1, 1, sizeof(struct sqz_range));
    b->next = sqz_arena_take(arena, stride + 1, 1, sizeof(struct sqz_range));
    /* Pruned clusters of all levels cover disjoint sets of level-0 clusters: never more than those. */
    b->pruned_logit = sqz_arena_take(arena, rows, stride, sizeof(float));
    b->pruned_keys = sqz_arena_take(arena, rows, stride, sizeof(float));
    b->pruned_level = sqz_arena_take(arena, stride, 1, sizeof(uint32_t));
    b->pruned_cluster = sqz_arena_take(arena, stride, 1, sizeof(uint32_t));
    b->log_total = sqz_arena_take(arena, rows, 1, sizeof(float));
    b->known_mass = sqz_arena_take(arena, rows, 1, sizeof(float));
    b->scratch = sqz_arena_take(arena, sqz_logits_scratch_floats(head_dim), 1, sizeof(float));
    b->quantised = sqz_i16_queries_take(arena, rows, head_dim);
    b->tables = sqz_arena_take(arena, sqz_code_table_floats(&layer->codes, coded_rows), 1, sizeof(float));
    b->deviation = sqz_arena_take(arena, coded_rows, 1, sizeof(float));
    b->key_weight = sqz_arena_take(arena, coded_rows, b->key_stride, sizeof(float));
    b->key_score = sqz_arena_take(arena, b->key_stride, 1, sizeof(float));
    b->key_list = sqz_arena_take(arena, b->key_stride, 1, sizeof(uint32_t));
    b->opened = sqz_arena_take(arena, n_keys ? stride : 0, 1, sizeof(uint32_t));
    b->count = sqz_arena_take(arena, n_keys ? stride : 0, 1, sizeof(uint32_t));
    b->left = sqz_arena_take(arena, n_keys ? stride : 0, 1, sizeof(uint32_t));
    b->key_ranges = sqz_arena_take(arena, n_keys ? n_keys / 2 + 1 : 0, 1, sizeof(struct sqz_range));
}

size_t sqz_lookup_workspace_bytes(const struct sqz_layer *layer, size_t max_query_rows)
{
    struct sqz_lookup_buffers b;
    struct sqz_arena arena = sqz_arena_on(NULL);
    sqz_lookup_carve(&b, &arena, layer, max_query_rows);
    return sqz_arena_bytes(&arena);
}

/* Numbers of the active clusters of a level, side by side. Returns how many. */
static size_t gather_active(struct sqz_lookup_buffers *b, const struct sqz_layer *layer, uint32_t head, uint32_t l,
                            size_t n_active_ranges)
{
    const struct sqz_level *level = &layer->level[l];
    const float *variance = level->variance + (size_t)head * level->n_clusters;
    const uint32_t *offset = level->offset + (size_t)head * (level->n_clusters + 1);
    size_t n = 0;
    for (size_t i = 0; i < n_active_ranges; i++) {
        const uint32_t begin = b->active[i].begin, count = b->active[i].end - begin;
        uint32_t *cluster = b->cluster + n;
        float *keys = b->keys + n;
        memcpy(b->variance + n, variance + begin, count * sizeof *variance);
        for (uint32_t c = 0; c < count; c++) cluster[c] = begin + c;
        if (l == 0) /* of level 0 offsets are rows; fewer than 2^31, which converts faster */
            for (uint32_t c = 0; c < count; c++) keys[c] = (float)(int32_t)(offset[begin + c + 1] - offset[begin + c]);
        else
            for (uint32_t c = 0; c < count; c++) keys[c] = (float)sqz_cluster_keys(layer, head, l, begin + c, NULL);
        n += count;
    }
    return n;
}

/* A threshold that about `retain_rows` keys of the active level-0 clusters pass: bisection on the score, 24 halvings
 * of the logarithm's range are exact enough for counts of keys. */
static float threshold_for_rows(const float *score, const float *keys, size_t n, size_t retain_rows)
{
    float low = -80.0f, high = 0.0f;
    for (int i = 0; i < 24; i++) {
        float middle = 0.5f * (low + high), threshold = expf(middle), kept = 0;
        for (size_t c = 0; c < n; c++) kept += score[c] >= threshold ? keys[c] : 0.0f;
        if (kept > (float)retain_rows) low = middle;
        else high = middle;
    }
    return expf(high);
}

size_t sqz_block_rows(const struct sqz_layer *layer, uint32_t head_kv, float budget)
{
    const struct sqz_level *top = &layer->level[layer->n_levels - 1];
    const size_t d = layer->shape.head_dim;
    const double row_bytes = (double)sqz_row_pair_bytes(layer);
    double bytes = (double)sqz_head_share_at(layer, head_kv, budget) * (double)sqz_whole_bytes(layer);
    bytes -= (double)sqz_fixed_bytes(layer);
    bytes -= (double)top->n_clusters * (double)sqz_centroid_bytes(layer);
    if (layer->tail) bytes -= (double)top->n_clusters * (double)sqz_row_bytes(top->value_centroids.type, d);
    return bytes > row_bytes ? (size_t)(bytes / row_bytes) : 1;
}

float sqz_log_add(float a, float b)
{
    const float high = fmaxf(a, b), low = fminf(a, b);
    return low == -INFINITY ? high : high + log1pf(expf(low - high));
}

/* One lookup on its way. */
struct lookup {
    struct sqz_selection *selection;
    struct sqz_lookup_buffers b;
    const struct sqz_layer *layer;
    const struct sqz_head_plan *plan;
    const float *queries, *squared_norms;
    struct sqz_row_queries rows; /* queries as centroids take them */
    size_t n_query_rows;
    uint32_t head;
    bool coded; /* down to single keys */
};

static void begin(struct lookup *u, const float *base_lse, void *workspace)
{
    struct sqz_selection *selection = u->selection;
    struct sqz_lookup_buffers *b = &u->b;
    struct sqz_arena arena = sqz_arena_on(workspace);
    sqz_lookup_carve(b, &arena, u->layer, u->n_query_rows);
    memset(selection, 0, sizeof *selection);
    selection->ranges = b->next;
    selection->pruned_level = b->pruned_level;
    selection->pruned_cluster = b->pruned_cluster;
    selection->pruned_logit = b->pruned_logit;
    selection->pruned_keys = b->pruned_keys;
    selection->pruned_largest = b->score; /* scores are done with when the lookup returns */
    selection->pruned_stride = b->stride;
    selection->log_total = b->log_total;
    selection->centroid_logit = u->layer->n_levels == 1 ? b->logit : NULL;
    /* What is already in the total: exact rows, then the clusters pruned at coarser levels. */
    for (size_t r = 0; r < u->n_query_rows; r++) b->known_mass[r] = base_lse ? base_lse[r] : -INFINITY;
    u->rows = (struct sqz_row_queries){
        .f32 = u->queries, .i16 = b->quantised, .n = u->n_query_rows, .scale = u->layer->shape.scale};
    sqz_centroid_queries_set(&u->rows, u->layer, u->head);
    if (u->coded) sqz_code_tables(b->tables, b->deviation, u->layer, u->head, u->queries, u->n_query_rows);
}

/* Logits of the active clusters of a level, side by side. Returns how many. */
static size_t active_logits(struct lookup *u, uint32_t l, size_t n_active)
{
    struct sqz_lookup_buffers *b = &u->b;
    size_t n = 0;
    for (size_t i = 0; i < n_active; i++) {
        const size_t count = b->active[i].end - b->active[i].begin;
        sqz_centroid_logits(b->logit + n, b->stride, u->layer, l, u->head, &u->rows, b->active[i].begin, count,
                            b->scratch);
        n += count;
    }
    gather_active(b, u->layer, u->head, l, n_active);
    u->selection->n_centroids_read += n;
    return n;
}

/* corrected becomes the shares of Z that single keys of the n active clusters have, score their mean or largest. */
static void score_clusters(struct lookup *u, size_t n)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const struct sqz_layer_shape *shape = &u->layer->shape;
    struct sqz_lookup_buffers *b = &u->b;
    memset(b->score, 0, n * sizeof *b->score);
    for (size_t r = 0; r < u->n_query_rows; r++) {
        float *y = b->corrected + r * b->stride;
        const float factor =
            sqz_spread_factor(u->plan->variance_gain, shape->scale, shape->head_dim, u->squared_norms[r]);
        k->add_scaled(y, b->logit + r * b->stride, factor, b->variance, n);
        const float shift = fmaxf(k->max(y, n), b->known_mass[r]);
        k->exp_sum(y, n, shift);
        const float total = expf(b->known_mass[r] - shift) + k->dot(b->keys, y, n);
        b->log_total[r] = shift + logf(total);
        if (u->layer->group == SQZ_GROUP_MAX) {
            k->scale_max(b->score, y, 1.0f / total, n);
        } else {
            k->scale(y, 1.0f / total, n);
            k->add_scaled(b->score, b->score, 1.0f / (float)u->n_query_rows, y, n);
        }
    }
}

/* Clusters whose score (with codes: reach) comes to the limit go to b->next, as clusters of the level below or as rows;
 * the others to the pruned list, which one of the active clusters each is to b->cluster. Returns the ranges in b->next. */
static size_t split_clusters(struct lookup *u, uint32_t l, size_t n, float limit)
{
    struct sqz_selection *selection = u->selection;
    struct sqz_lookup_buffers *b = &u->b;
    const struct sqz_level *level = &u->layer->level[l];
    const uint32_t *offset = level->offset + (size_t)u->head * (level->n_clusters + 1);
    const uint32_t first_row = l == 0 ? u->layer->n_fixed : 0;
    size_t n_next = 0, n_new = 0;
    for (size_t i = 0; i < n; i++) {
        const uint32_t c = b->cluster[i];
        if (b->score[i] >= limit) {
            if (l == 0) selection->n_retained += offset[c + 1] - offset[c];
            sqz_push_range(b->next, &n_next, first_row + offset[c], first_row + offset[c + 1]);
            continue;
        }
        const size_t p = selection->n_pruned++;
        b->pruned_level[p] = l;
        b->pruned_cluster[p] = c;
        for (size_t r = 0; r < u->n_query_rows; r++) b->pruned_keys[r * b->stride + p] = b->keys[i];
        b->cluster[n_new++] = (uint32_t)i; /* i is at least n_new: earlier entries are done with */
    }
    return n_next;
}

/* Tail logits of what a level has pruned, [first, n_pruned); above level 0 its mass becomes known, since finer levels
 * will not see it. */
static void prune_clusters(struct lookup *u, uint32_t l, size_t first)
{
    const struct sqz_layer_shape *shape = &u->layer->shape;
    struct sqz_lookup_buffers *b = &u->b;
    const size_t n = u->selection->n_pruned - first;
    for (size_t r = 0; r < u->n_query_rows && n; r++) {
        const float *x = b->logit + r * b->stride, *y = b->corrected + r * b->stride;
        const float factor = sqz_spread_factor(1.0f, shape->scale, shape->head_dim, u->squared_norms[r]);
        float *out = b->pruned_logit + r * b->stride + first;
        for (size_t p = 0; p < n; p++) {
            const uint32_t i = b->cluster[p];
            out[p] = sqz_tail_logit(x[i], factor, b->variance[i], u->plan->tail_gain);
        }
        float mass = 0;
        for (size_t p = 0; l > 0 && p < n; p++) mass += b->keys[b->cluster[p]] * y[b->cluster[p]];
        if (mass > 0) b->known_mass[r] = sqz_log_add(b->known_mass[r], b->log_total[r] + logf(mass));
    }
}

static void bound_tail(const struct lookup *u)
{
    const struct sqz_lookup_buffers *b = &u->b;
    for (size_t r = 0; r < u->n_query_rows; r++) {
        float *out = b->pruned_logit + r * b->stride;
        for (size_t p = 0; p < u->selection->n_pruned; p++) out[p] = sqz_tail_bound(out[p], b->log_total[r]);
    }
}

void sqz_lookup(struct sqz_selection *selection, const struct sqz_layer *layer, uint32_t head,
                const struct sqz_head_plan *plan, const float *queries, const float *squared_norms, size_t n_query_rows,
                const float *base_lse, size_t retain_rows, void *workspace)
{
    const bool coded = layer->codes.n_words && !retain_rows && n_query_rows <= SQZ_MAX_GROUP_QUERIES;
    struct lookup u = {.selection = selection,
                       .layer = layer,
                       .plan = plan,
                       .queries = queries,
                       .squared_norms = squared_norms,
                       .n_query_rows = n_query_rows,
                       .head = head,
                       .coded = coded};
    struct sqz_lookup_buffers *b = &u.b;
    begin(&u, base_lse, workspace);
    size_t n_active = 1;
    b->active[0] = (struct sqz_range){0, layer->level[layer->n_levels - 1].n_clusters};
    for (uint32_t l = layer->n_levels; l-- > 0;) {
        const size_t n = active_logits(&u, l, n_active), first_pruned = selection->n_pruned;
        score_clusters(&u, n);
        if (coded) sqz_lookup_reach(b, plan, l, n_query_rows, n);
        if (coded && l == 0) {
            sqz_lookup_keys(selection, b, layer, head, plan, squared_norms, n_query_rows, n);
            break;
        }
        float limit = coded ? plan->log_threshold : expf(sqz_cluster_limit(plan->log_threshold, l));
        if (l == 0 && retain_rows) limit = threshold_for_rows(b->score, b->keys, n, retain_rows);
        n_active = split_clusters(&u, l, n, limit);
        prune_clusters(&u, l, first_pruned);
        if (l > 0) {
            struct sqz_range *swap = b->active;
            b->active = b->next;
            b->next = swap;
        }
    }
    if (!coded) {
        selection->ranges = b->next;
        selection->n_ranges = n_active;
    }
    bound_tail(&u);
}
