/*
 * Calibration of one KV head: the kept queries (the last tokens of the context)
 * are run against the head's rows exactly and through the lookup's estimate,
 * and for every threshold of the grid the bytes that would be read and the
 * attention mass that would be lost are counted.
 *
 * Per query token, cluster i gets the score S_i of lookup.h. It is retained at
 * grid point t when S_i >= exp(log_threshold[t]), so everything is a histogram
 * over t followed by running sums:
 *   share[t]      centroids + fixed rows + retained keys + values of retained keys whose own weight passes
 *   lost_mass[t]  true mass of pruned clusters
 *   tail_gain[t]  g = log(true mass of pruned clusters / estimated mass), so that the tail's total is honest
 * The variance gain a is the candidate that loses least mass at the same number of retained keys; 0 switches the
 * correction off. Why it must be chosen by measurement: docs/method.md.
 */
#include <math.h>
#include <string.h>

#include "arena.h"
#include "build.h"
#include "codes.h"
#include "kernels.h"
#include "lookup_keys.h"

enum {
    POINTS = SQZ_CURVE_POINTS,
    BATCH_TOKENS = 8,    /* query tokens whose logits are computed together */
    CANDIDATE_STRIDE = 4 /* every fourth query chooses the variance gain */
};

static const float variance_candidates[] = {0.0f, 0.25f, 0.5f, 0.75f, 1.0f, 1.5f};
enum { N_CANDIDATES = sizeof variance_candidates / sizeof *variance_candidates };

/* Share of the clustered keys at which candidates are compared: about what a budget of a tenth retains. */
static const double COMPARE_SHARE = 0.08;

struct buffers {
    float *queries;  /* [BATCH x G][D] */
    float *norms;    /* [BATCH x G] */
    float *logits;   /* [BATCH x G][N] */
    float *centroid; /* [levels][BATCH x G][C0 stride] */
    float *scratch;
    float *log_true;                          /* [G] log denominator, exact */
    float *log_total;                         /* [G] log denominator, as the lookup estimates it */
    float *level_total;                       /* [G] the same as the lookup has it while it is at a level */
    float *best;                              /* [N] largest weight of a row over the group */
    float *mass;                              /* [G][C0] true mass of the clusters */
    float *corrected;                         /* [C0] */
    float *score;                             /* [C0] */
    struct sqz_i16_queries quantised, turned; /* [BATCH x G] */
    float *tables, *deviation;                /* of a batch's codes */
    float *estimate;            /* [BATCH x G][key stride] logits of the clustered keys as their codes give them */
    float *key_score;           /* [key stride] */
    double value_limit[POINTS]; /* of each grid point, below which a value centroid is left unread */
    int8_t *key_point;          /* [key stride] grid point up to which a key is retained; -1: never */
    size_t key_stride;
    int *bound; /* [C0] grid point up to which the parents of a cluster of level 0 are opened */
    int *point; /* [levels][C0] grid point up to which a cluster is retained; -1: never */
    size_t stride, centroid_stride;
};

static struct buffers carve(struct sqz_arena *arena, const struct sqz_layer *layer)
{
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv, d = layer->shape.head_dim;
    const size_t rows = BATCH_TOKENS * group, c = layer->level[0].n_clusters, n = layer->n_rows;
    struct buffers b;
    b.stride = (n + 15) / 16 * 16;
    b.centroid_stride = (c + 15) / 16 * 16;
    b.queries = sqz_arena_take(arena, rows, d, sizeof(float));
    b.norms = sqz_arena_take(arena, rows, 1, sizeof(float));
    b.logits = sqz_arena_take(arena, rows, b.stride, sizeof(float));
    b.centroid = sqz_arena_take(arena, layer->n_levels * rows, b.centroid_stride, sizeof(float));
    b.scratch = sqz_arena_take(arena, sqz_logits_scratch_floats(d), 1, sizeof(float));
    b.quantised = sqz_i16_queries_take(arena, rows, d);
    b.turned = sqz_i16_queries_take(arena, rows, d);
    b.log_true = sqz_arena_take(arena, group, 1, sizeof(float));
    b.log_total = sqz_arena_take(arena, group, 1, sizeof(float));
    b.level_total = sqz_arena_take(arena, group, 1, sizeof(float));
    b.best = sqz_arena_take(arena, n, 1, sizeof(float));
    b.mass = sqz_arena_take(arena, group, c, sizeof(float));
    b.corrected = sqz_arena_take(arena, b.centroid_stride, 1, sizeof(float));
    b.score = sqz_arena_take(arena, b.centroid_stride, 1, sizeof(float));
    const size_t n_keys = layer->codes.n_words ? n - layer->n_fixed : 0;
    b.key_stride = (n_keys + 15) / 16 * 16;
    b.tables = sqz_arena_take(arena, sqz_code_table_floats(&layer->codes, rows), 1, sizeof(float));
    b.deviation = sqz_arena_take(arena, rows, 1, sizeof(float));
    b.estimate = sqz_arena_take(arena, rows, b.key_stride, sizeof(float));
    b.key_score = sqz_arena_take(arena, b.key_stride, 1, sizeof(float));
    b.key_point = sqz_arena_take(arena, b.key_stride, 1, sizeof(int8_t));
    b.bound = sqz_arena_take(arena, c, 1, sizeof(int));
    b.point = sqz_arena_take(arena, layer->n_levels, c, sizeof(int));
    return b;
}

size_t sqz_calibrate_workspace_bytes(const struct sqz_layer *layer)
{
    struct sqz_arena arena = sqz_arena_on(NULL);
    carve(&arena, layer);
    return sqz_arena_bytes(&arena);
}

/* The last point of the grid at which something is read that is read up to a log threshold. */
static int point_of(float read_to)
{
    return sqz_curve_point(read_to, SQZ_CURVE_FIRST, SQZ_CURVE_STEP, POINTS);
}

/* The factor of the tail's logits: query row of the batch. */
static float tail_factor(const struct sqz_layer *layer, const struct buffers *b, size_t row)
{
    return sqz_spread_factor(1.0f, layer->shape.scale, layer->shape.head_dim, b->norms[row]);
}

/* The last point at which the value centroid of a pruned cluster is read, by the largest logarithm of what it weighs. */
static int tail_point(const struct sqz_layer *layer, float log_weight)
{
    return layer->value_skip ? point_of(sqz_value_read_to(log_weight)) : POINTS - 1;
}

/* One query token of the batch: first_row of the buffers is its first head. */
struct query {
    size_t first_row;
    int32_t position;
    const float *true_elsewhere, *total_elsewhere; /* [G] what other places have, log; NULL: nothing lies there */
};

static struct query query_of(const struct sqz_layer *layer, uint32_t head, size_t number, uint32_t token)
{
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv;
    const struct sqz_shared_queries *shared = layer->shared;
    struct query q = {.first_row = number * group, .position = (int32_t)(layer->n_rows - layer->n_queries + token)};
    if (!shared) return q;
    const size_t at = (size_t)token * layer->shape.n_head + head * group;
    q.position = shared->last_position[token];
    q.true_elsewhere = shared->true_elsewhere + at;
    q.total_elsewhere = shared->total_elsewhere + at;
    return q;
}

/* Exact weights: logits become exp(logit - log_true) for the rows at or before the query's position; also the largest
 * weight of each row over the group, and the exact mass of the fixed rows. */
static void exact_weights(const struct sqz_layer *layer, uint32_t head, struct buffers *b, const struct query *q,
                          float *base_lse)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv, n = layer->n_rows;
    const int32_t *position = layer->position + (size_t)head * n;
    for (size_t g = 0; g < group; g++) {
        float *x = b->logits + (q->first_row + g) * b->stride;
        for (size_t i = 0; i < n; i++)
            if (position[i] > q->position) x[i] = -INFINITY;
        const float shift = k->max(x, n);
        float total = 0, fixed = 0;
        for (size_t i = 0; i < layer->n_fixed; i++) fixed += expf(x[i] - shift);
        base_lse[g] = fixed > 0 ? shift + logf(fixed) : -INFINITY;
        total = k->exp_sum(x, n, shift);
        b->log_true[g] = shift + logf(total);
        if (q->true_elsewhere) {
            b->log_true[g] = sqz_log_add(b->log_true[g], q->true_elsewhere[g]);
            k->scale(x, expf(shift - b->log_true[g]), n);
        } else {
            k->scale(x, 1.0f / total, n);
        }
        for (size_t i = 0; i < n; i++) b->best[i] = g == 0 || x[i] > b->best[i] ? x[i] : b->best[i];
    }
}

/* Scores of a level's clusters under a variance gain; also the estimated denominators when level is 0. */
static void score_level(const struct sqz_layer *layer, uint32_t head, uint32_t l, struct buffers *b,
                        const struct query *q, float gain, const float *base_lse)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv, n = layer->level[l].n_clusters;
    const size_t rows = BATCH_TOKENS * group;
    const float *variance = layer->level[l].variance + (size_t)head * n;
    memset(b->score, 0, n * sizeof *b->score);
    for (size_t g = 0; g < group; g++) {
        const float *x = b->centroid + (l * rows + q->first_row + g) * b->centroid_stride;
        const float factor =
            sqz_spread_factor(gain, layer->shape.scale, layer->shape.head_dim, b->norms[q->first_row + g]);
        for (size_t i = 0; i < n; i++) b->corrected[i] = x[i] + factor * variance[i];
        float shift = k->max(b->corrected, n);
        if (layer->rule != SQZ_RULE_PAPER) shift = fmaxf(shift, base_lse[g]);
        k->exp_sum(b->corrected, n, shift);
        if (l == 0 || layer->codes.n_words) {
            float total = layer->rule != SQZ_RULE_PAPER ? expf(base_lse[g] - shift) : 0.0f;
            for (size_t i = 0; i < n; i++)
                total += b->corrected[i] * (float)sqz_cluster_keys(layer, head, l, (uint32_t)i, NULL);
            b->level_total[g] = shift + logf(total);
            if (q->total_elsewhere) b->level_total[g] = sqz_log_add(b->level_total[g], q->total_elsewhere[g]);
        }
        if (l == 0) b->log_total[g] = b->level_total[g];
        const float inverse = expf(shift - b->log_total[g]);
        for (size_t i = 0; i < n; i++)
            b->score[i] =
                sqz_add_score(b->score[i], b->corrected[i] * inverse, (uint32_t)group, layer->group == SQZ_GROUP_MAX);
    }
}

static void cluster_masses(const struct sqz_layer *layer, uint32_t head, struct buffers *b, const struct query *q)
{
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv, n = layer->level[0].n_clusters;
    const uint32_t *offset = layer->level[0].offset + (size_t)head * (n + 1);
    for (size_t g = 0; g < group; g++) {
        const float *weight = b->logits + (q->first_row + g) * b->stride + layer->n_fixed;
        for (size_t c = 0; c < n; c++) {
            float mass = 0;
            for (uint32_t i = offset[c]; i < offset[c + 1]; i++) mass += weight[i];
            b->mass[g * n + c] = mass;
        }
    }
}

/* Logits of all clustered keys from their centroids and codes. */
static void estimate_keys(const struct sqz_layer *layer, uint32_t head, struct buffers *b, size_t n_rows)
{
    const uint32_t n = layer->level[0].n_clusters;
    const uint32_t *offset = layer->level[0].offset + (size_t)head * (n + 1);
    sqz_code_tables(b->tables, b->deviation, layer, head, b->queries, n_rows);
    for (size_t r = 0; r < n_rows; r++)
        for (uint32_t c = 0; c < n; c++)
            for (uint32_t i = offset[c]; i < offset[c + 1]; i++)
                b->estimate[r * b->key_stride + i] = b->centroid[r * b->centroid_stride + c];
    sqz_code_logits(b->estimate, b->key_stride, b->tables, n_rows, layer, head, 0, offset[n]);
}

/* Logits of a batch of query tokens with rows and centroids. */
static void load_batch(const struct sqz_layer *layer, uint32_t head, struct buffers *b, const uint32_t *tokens,
                       size_t n_tokens)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv, d = layer->shape.head_dim;
    const size_t rows = n_tokens * group;
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t g = 0; g < group; g++)
            k->f16_to_f32(b->queries + (t * group + g) * d,
                          layer->queries + ((size_t)tokens[t] * layer->shape.n_head + head * group + g) * d, d);
    for (size_t r = 0; r < rows; r++) {
        float norm = 0;
        for (size_t i = 0; i < d; i++) norm += b->queries[r * d + i] * b->queries[r * d + i];
        b->norms[r] = norm;
    }
    const struct sqz_row_queries queries = {
        .f32 = b->queries, .i16 = b->quantised, .n = rows, .scale = layer->shape.scale, .turned = b->turned};
    const struct sqz_rows keys = sqz_rows_of_head(&layer->keys, layer->n_rows, d, head);
    sqz_row_queries_set(&queries, &keys, d);
    sqz_rows_logits(b->logits, b->stride, &queries, &keys, 0, layer->n_rows, d, b->scratch);
    sqz_centroid_queries_set(&queries, layer, head);
    for (uint32_t l = 0; l < layer->n_levels; l++) {
        const size_t n = layer->level[l].n_clusters;
        sqz_centroid_logits(b->centroid + l * BATCH_TOKENS * group * b->centroid_stride, b->centroid_stride, layer, l,
                            head, &queries, 0, n, b->scratch);
    }
    if (layer->codes.n_words) estimate_keys(layer, head, b, rows);
}

/* Slot of a histogram: point -1 goes to slot 0. */
static size_t slot(int point)
{
    return (size_t)(point + 1);
}

/* Natural logarithm of a positive float from its bits, within 0.03: a tenth of a grid step. */
static inline float rough_log(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return ((float)bits * 0x1p-23f - 126.957f) * 0.69314718f;
}

/* Counts rows by the last point at which their value is read, and their key still retained: point_of() of
 * sqz_value_read_to(), by a rough logarithm. */
static void count_rows(double *histogram, const float *weight, size_t n, int at_most)
{
    const float zero = SQZ_CURVE_FIRST + logf(SQZ_VALUE_SKIP);
    for (size_t i = 0; i < n; i++) {
        const float at = (rough_log(weight[i]) - zero) * (1.0f / SQZ_CURVE_STEP);
        const int point = at >= 0 ? (int)at : -1;
        histogram[slot(point < at_most ? point : at_most)] += 1;
    }
}

/* The point up to which a cluster of a layer with codes is opened; own: that of its score. */
static int open_point(const struct sqz_layer *layer, uint32_t head, uint32_t l, const struct buffers *b,
                      const struct query *q, size_t c, int own)
{
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv;
    const float variance = layer->level[l].variance[(size_t)head * layer->level[l].n_clusters + c];
    const float deviation = sqz_open_deviations(l) * sqrtf(variance);
    for (size_t g = 0; g < group; g++) {
        const size_t row = l * BATCH_TOKENS * group + q->first_row + g;
        const float x = b->centroid[row * b->centroid_stride + c];
        const int point = point_of(sqz_reach(x, deviation, b->deviation[q->first_row + g], b->level_total[g]));
        own = point > own ? point : own;
    }
    return own;
}

/* Key scores from the estimates, which become weights under their total; also that total. */
static void score_keys(const struct sqz_layer *layer, struct buffers *b, const struct query *q, const float *base_lse,
                       size_t n_keys)
{
    const struct sqz_kernels *k = sqz_kernels_get();
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv;
    memset(b->key_score, 0, n_keys * sizeof *b->key_score);
    for (size_t g = 0; g < group; g++) {
        float *x = b->estimate + (q->first_row + g) * b->key_stride;
        const float base = layer->rule != SQZ_RULE_PAPER ? base_lse[g] : -INFINITY;
        const float shift = fmaxf(k->max(x, n_keys), base);
        const float total = expf(base - shift) + k->exp_sum(x, n_keys, shift);
        b->log_total[g] = shift + logf(total);
        if (q->total_elsewhere) {
            b->log_total[g] = sqz_log_add(b->log_total[g], q->total_elsewhere[g]);
            k->scale(x, expf(shift - b->log_total[g]), n_keys);
        } else {
            k->scale(x, 1.0f / total, n_keys);
        }
        if (layer->group == SQZ_GROUP_MAX)
            for (size_t i = 0; i < n_keys; i++) b->key_score[i] = fmaxf(b->key_score[i], x[i]);
        else k->add_scaled(b->key_score, b->key_score, 1.0f / (float)group, x, n_keys);
    }
}

/* Points at which the value centroid of an opened cluster is read: where what is left of its keys weighs enough. */
static void count_value_centroid(const struct sqz_layer *layer, const struct buffers *b, const struct query *q,
                                 uint32_t begin, uint32_t end, int open, struct sqz_curve_sums *sums)
{
    const int8_t *point = b->key_point;
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv;
    int first = POINTS, last = -1;
    double total = 0;
    for (uint32_t i = begin; i < end; i++) {
        first = point[i] < first ? point[i] : first;
        total += b->key_score[i] * (double)group; /* no less than the largest over the group */
    }
    last = tail_point(layer, logf((float)total));
    last = last < open ? last : open;
    if (last <= first) return;
    /* mass[g][t]: of the keys that are read up to t and no further; they are missing from t + 1 on. */
    double mass[SQZ_MAX_GROUP_QUERIES][POINTS], below[SQZ_MAX_GROUP_QUERIES] = {0};
    for (size_t g = 0; g < group; g++) {
        const float *weight = b->estimate + (q->first_row + g) * b->key_stride;
        for (int t = first; t < last; t++) mass[g][t - first] = 0;
        for (uint32_t i = begin; i < end; i++)
            if (point[i] < last) mass[g][point[i] - first] += (double)weight[i];
    }
    for (int t = first + 1; t <= last; t++) {
        double largest = 0;
        for (size_t g = 0; g < group; g++) {
            below[g] += mass[g][t - 1 - first];
            largest = below[g] > largest ? below[g] : largest;
        }
        if (layer->value_skip && largest < b->value_limit[t]) continue;
        sums->value_centroids[slot(t)] += 1;
        sums->value_centroids[slot(t) + 1] -= 1;
    }
}

/* As the end of count_query(), where single keys are chosen. */
static void count_keys(const struct sqz_layer *layer, uint32_t head, struct buffers *b, const struct query *q,
                       const float *base_lse, struct sqz_curve_sums *sums)
{
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv;
    const uint32_t n = layer->level[0].n_clusters, *offset = layer->level[0].offset + (size_t)head * (n + 1);
    const float *variance = layer->level[0].variance + (size_t)head * n;
    double to_true[SQZ_MAX_GROUP_QUERIES];
    score_keys(layer, b, q, base_lse, offset[n]);
    for (size_t g = 0; g < group; g++) to_true[g] = exp((double)b->log_total[g] - (double)b->log_true[g]);
    for (uint32_t c = 0; c < n; c++) {
        const int open = b->point[c];
        double estimated = 0, closed = 0;
        float largest = -INFINITY;
        sums->codes[slot(open)] += offset[c + 1] - offset[c];
        for (size_t g = 0; g < group; g++) {
            const double x = sqz_tail_logit(b->centroid[(q->first_row + g) * b->centroid_stride + c],
                                            tail_factor(layer, b, q->first_row + g), variance[c], 0.0f);
            closed += (double)(offset[c + 1] - offset[c]) * exp(x - (double)b->log_true[g]);
            largest = fmaxf(largest, (float)x - b->log_total[g]);
        }
        for (uint32_t i = offset[c]; i < offset[c + 1]; i++) {
            int point = point_of(rough_log(b->key_score[i]));
            point = point < open ? point : open; /* sqz_key_read_to(), in points */
            b->key_point[i] = (int8_t)point;
            sums->keys[slot(point)] += 1;
            for (size_t g = 0; g < group; g++) {
                const size_t row = q->first_row + g;
                const double mass = b->logits[row * b->stride + layer->n_fixed + i];
                const double guess = b->estimate[row * b->key_stride + i] * to_true[g];
                sums->lost[slot(point)] += mass / (double)group;
                sums->true_mass[slot(point)] += mass;
                sums->estimated_mass[slot(point)] += guess;
                estimated += guess;
            }
            if (layer->value_skip) count_rows(sums->values, b->best + layer->n_fixed + i, 1, point);
            else sums->values[slot(point)] += 1;
        }
        if (layer->tail) count_value_centroid(layer, b, q, offset[c], offset[c + 1], open, sums);
        sums->estimated_mass[slot(open)] += closed - estimated; /* below, the cluster stands for its keys */
        if (!layer->tail) continue;
        const float keys = (float)(offset[c + 1] - offset[c]);
        int last = tail_point(layer, largest + logf(keys));
        if (last > b->bound[c]) last = b->bound[c]; /* above, a parent stands for it */
        if (last > open) {
            sums->value_centroids[slot(open) + 1] += 1;
            sums->value_centroids[slot(last) + 1] -= 1;
        }
    }
}

/* Points at which the value centroid of a coarse cluster is read: where it is pruned, its parents are opened, and what
 * it is estimated to weigh is enough. */
static void count_coarse_centroid(const struct sqz_layer *layer, uint32_t head, uint32_t l, const struct buffers *b,
                                  const struct query *q, size_t c, int bound, struct sqz_curve_sums *sums)
{
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv, n0 = layer->level[0].n_clusters;
    const float variance = layer->level[l].variance[(size_t)head * layer->level[l].n_clusters + c];
    const float keys = (float)sqz_cluster_keys(layer, head, l, (uint32_t)c, NULL);
    const int open = b->point[l * n0 + c];
    float largest = -INFINITY;
    for (size_t g = 0; g < group; g++) {
        const size_t row = q->first_row + g;
        const float x = b->centroid[(l * BATCH_TOKENS * group + row) * b->centroid_stride + c];
        largest = fmaxf(largest, sqz_tail_logit(x, tail_factor(layer, b, row), variance, -b->log_total[g]));
    }
    int last = tail_point(layer, largest + logf(keys));
    if (last > bound) last = bound;
    if (last <= open) return;
    sums->value_centroids[slot(open) + 1] += 1;
    sums->value_centroids[slot(last) + 1] -= 1;
}

static void count_query(const struct sqz_layer *layer, uint32_t head, struct buffers *b, const struct query *q,
                        float gain, const float *base_lse, struct sqz_curve_sums *sums)
{
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv, n0 = layer->level[0].n_clusters;

    score_level(layer, head, 0, b, q, gain, base_lse);
    for (size_t i = 0; i < n0; i++) b->point[i] = point_of(sqz_cluster_read_to(logf(b->score[i]), 0));
    for (size_t i = 0; i < n0 && layer->codes.n_words; i++)
        b->point[i] = open_point(layer, head, 0, b, q, i, b->point[i]);
    for (size_t i = 0; i < n0; i++) b->bound[i] = POINTS - 1;
    /* From the coarsest level down: a cluster is seen only where its parent is opened. */
    for (uint32_t l = layer->n_levels; l-- > 1;) {
        const size_t n = layer->level[l].n_clusters;
        score_level(layer, head, l, b, q, gain, base_lse);
        int *point = b->point + l * n0;
        for (size_t i = 0; i < n; i++) {
            const float log_score = logf(b->score[i]);
            const int own = layer->codes.n_words ? open_point(layer, head, l, b, q, i, point_of(log_score))
                                                 : point_of(sqz_cluster_read_to(log_score, l));
            const int bound = l + 1 == layer->n_levels ? POINTS - 1 : point[i];
            point[i] = own < bound ? own : bound;
            if (layer->codes.n_words && layer->tail) count_coarse_centroid(layer, head, l, b, q, i, bound, sums);
        }
        /* point[] of this level becomes the bound of its children. */
        const uint32_t *offset = layer->level[l].offset + (size_t)head * (n + 1);
        for (size_t i = 0; i < n; i++) {
            sums->centroids[slot(point[i])] += (double)(offset[i + 1] - offset[i]);
            for (uint32_t child = offset[i]; child < offset[i + 1]; child++) {
                int *bound = b->point + (l - 1) * n0 + child;
                if (l - 1 > 0) *bound = point[i];
                else if (*bound > point[i]) *bound = point[i];
                if (l == 1) b->bound[child] = point[i];
            }
        }
    }

    if (layer->value_skip) count_rows(sums->fixed_values, b->best, layer->n_fixed, POINTS - 1);
    else sums->fixed_values[slot(POINTS - 1)] += layer->n_fixed;
    sums->n_queries++;
    if (layer->codes.n_words) {
        count_keys(layer, head, b, q, base_lse, sums);
        return;
    }
    const uint32_t *offset = layer->level[0].offset + (size_t)head * (n0 + 1);
    const float *variance = layer->level[0].variance + (size_t)head * n0;
    for (size_t c = 0; c < n0; c++) {
        const int point = b->point[c];
        const double keys = offset[c + 1] - offset[c];
        float largest = -INFINITY;
        sums->keys[slot(point)] += keys;
        for (size_t g = 0; g < group; g++) {
            const float x = b->centroid[(q->first_row + g) * b->centroid_stride + c];
            const double mass = b->mass[g * n0 + c];
            sums->lost[slot(point)] += mass / (double)group;
            sums->true_mass[slot(point)] += mass;
            const float tail = sqz_tail_logit(x, tail_factor(layer, b, q->first_row + g), variance[c], 0.0f);
            sums->estimated_mass[slot(point)] += keys * exp((double)tail - (double)b->log_true[g]);
            largest = fmaxf(largest, tail - b->log_total[g]);
        }
        if (layer->tail) {
            /* Its value centroid is read at points after `point`, up to where its own mass passes: a histogram of
             * differences. */
            const int last = tail_point(layer, largest + logf((float)keys));
            if (last > point) {
                sums->value_centroids[slot(point) + 1] += 1;
                sums->value_centroids[slot(last) + 1] -= 1;
            }
        }
        if (layer->value_skip)
            count_rows(sums->values, b->best + layer->n_fixed + offset[c], offset[c + 1] - offset[c], point);
        else sums->values[slot(point)] += keys;
    }
}

void sqz_curve_of_sums(const struct sqz_layer *layer, const struct sqz_curve_sums *sums,
                       const struct sqz_head_curve *out)
{
    const double row = layer->shape.head_dim * sizeof(uint16_t), queries = sums->n_queries;
    const double total = 2.0 * row * layer->n_rows;
    const double fixed_keys = (double)sqz_rows_bytes(&layer->keys, 0, layer->n_fixed, layer->shape.head_dim);
    const double value = (double)sqz_row_bytes(layer->values.type, layer->shape.head_dim);
    const double fixed_value = layer->values.planes.n_whole ? row : value;
    const double value_centroid =
        layer->tail ? (double)sqz_row_bytes(layer->level[0].value_centroids.type, layer->shape.head_dim) : 0.0;
    const double top = layer->level[layer->n_levels - 1].n_clusters;
    double keys = 0, values = 0, centroids = 0, fixed_values = 0, lost = 0, true_mass = 0, estimated = 0, tail = 0;
    /* Read at t: everything whose point is t or later. */
    double codes = 0, codes_from[POINTS], keys_from[POINTS], values_from[POINTS], centroids_from[POINTS];
    double fixed_from[POINTS];
    for (int t = POINTS - 1; t >= 0; t--) {
        keys_from[t] = keys += sums->keys[slot(t)];
        codes_from[t] = codes += sums->codes[slot(t)];
        values_from[t] = values += sums->values[slot(t)];
        centroids_from[t] = centroids += sums->centroids[slot(t)];
        fixed_from[t] = fixed_values += sums->fixed_values[slot(t)];
    }
    for (int t = 0; t < POINTS; t++) {
        /* Pruned at t: everything whose point is before t. */
        lost += sums->lost[slot(t - 1)];
        true_mass += sums->true_mass[slot(t - 1)];
        estimated += sums->estimated_mass[slot(t - 1)];
        tail += sums->value_centroids[slot(t)];
        const double row_bytes = fixed_keys + (value * values_from[t] + fixed_value * fixed_from[t]) / queries;
        const double code_bytes =
            (double)sqz_code_head_bytes(layer) + codes_from[t] / queries * (double)sqz_code_key_bytes(&layer->codes);
        const double bytes = code_bytes + (top + centroids_from[t] / queries) * (double)sqz_centroid_bytes(layer) +
                             keys_from[t] / queries * (double)sqz_key_bytes(layer) + row_bytes +
                             value_centroid * tail / queries;
        out->share[t] = (float)(bytes / total);
        if (t > 0 && out->share[t] > out->share[t - 1]) out->share[t] = out->share[t - 1];
        out->lost_mass[t] = (float)(lost / queries);
        double gain = true_mass > 0 && estimated > 0 ? log(true_mass / estimated) : 0.0;
        out->tail_gain[t] = (float)(gain < -10 ? -10 : gain > 4 ? 4 : gain);
    }
}

/* The candidate that loses least mass when COMPARE_SHARE of the clustered keys are retained. */
static float choose_variance_gain(const struct sqz_layer *layer, uint32_t head, struct buffers *b)
{
    static const int points = POINTS + 1;
    double keys[N_CANDIDATES][POINTS + 1] = {{0}}, lost[N_CANDIDATES][POINTS + 1] = {{0}};
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv, n = layer->level[0].n_clusters;
    const uint32_t *offset = layer->level[0].offset + (size_t)head * (n + 1);
    float base_lse[1024];
    size_t used = 0;
    for (size_t first = 0; first < layer->n_queries; first += CANDIDATE_STRIDE * BATCH_TOKENS) {
        uint32_t tokens[BATCH_TOKENS];
        size_t n_tokens = 0;
        for (size_t t = first; t < layer->n_queries && n_tokens < BATCH_TOKENS; t += CANDIDATE_STRIDE)
            tokens[n_tokens++] = (uint32_t)t;
        load_batch(layer, head, b, tokens, n_tokens);
        for (size_t t = 0; t < n_tokens; t++, used++) {
            const struct query q = query_of(layer, head, t, tokens[t]);
            exact_weights(layer, head, b, &q, base_lse);
            cluster_masses(layer, head, b, &q);
            for (size_t a = 0; a < N_CANDIDATES; a++) {
                score_level(layer, head, 0, b, &q, variance_candidates[a], base_lse);
                for (size_t c = 0; c < n; c++) {
                    const size_t at = slot(point_of(logf(b->score[c])));
                    double mass = 0;
                    for (size_t g = 0; g < group; g++) mass += b->mass[g * n + c];
                    keys[a][at] += offset[c + 1] - offset[c];
                    lost[a][at] += mass / (double)group;
                }
            }
        }
    }
    const double target = COMPARE_SHARE * (double)offset[n] * (double)used;
    double best = INFINITY;
    float gain = 0;
    for (size_t a = 0; a < N_CANDIDATES; a++) {
        /* From the highest threshold down until the target is retained; the last bin counts in part. */
        double kept = 0, kept_mass = 0, total = 0;
        for (int i = 0; i < points; i++) total += lost[a][i];
        for (int i = points - 1; i >= 0 && kept < target; i--) {
            const double part = kept + keys[a][i] > target ? (target - kept) / keys[a][i] : 1.0;
            kept += part * keys[a][i];
            kept_mass += part * lost[a][i];
        }
        if (total - kept_mass < best) {
            best = total - kept_mass;
            gain = variance_candidates[a];
        }
    }
    return gain;
}

static struct buffers prepare_buffers(const struct sqz_layer *layer, void *workspace)
{
    struct sqz_arena arena = sqz_arena_on(workspace);
    struct buffers b = carve(&arena, layer);
    for (int t = 0; t < POINTS; t++)
        b.value_limit[t] = SQZ_VALUE_SKIP * exp(SQZ_CURVE_FIRST + SQZ_CURVE_STEP * (double)t);
    return b;
}

/* The next kept queries from number `first` on; returns how many. */
static size_t take_tokens(const struct sqz_layer *layer, size_t first, uint32_t tokens[BATCH_TOKENS])
{
    size_t n = 0;
    for (; n < BATCH_TOKENS && first + n < layer->n_queries; n++) tokens[n] = (uint32_t)(first + n);
    return n;
}

void sqz_weigh_head(const struct sqz_layer *layer, uint32_t head, float gain, float *log_true, float *log_total,
                    void *workspace)
{
    struct buffers b = prepare_buffers(layer, workspace);
    const size_t group = layer->shape.n_head / layer->shape.n_head_kv;
    float base_lse[1024]; /* a group has at most 1024 heads */
    for (size_t first = 0; first < layer->n_queries; first += BATCH_TOKENS) {
        uint32_t tokens[BATCH_TOKENS];
        const size_t n_tokens = take_tokens(layer, first, tokens);
        load_batch(layer, head, &b, tokens, n_tokens);
        for (size_t t = 0; t < n_tokens; t++) {
            const struct query q = query_of(layer, head, t, tokens[t]);
            const size_t at = (size_t)tokens[t] * layer->shape.n_head + head * group;
            exact_weights(layer, head, &b, &q, base_lse);
            score_level(layer, head, 0, &b, &q, gain, base_lse);
            if (layer->codes.n_words) score_keys(layer, &b, &q, base_lse, layer->n_rows - layer->n_fixed);
            memcpy(log_true + at, b.log_true, group * sizeof *log_true);
            memcpy(log_total + at, b.log_total, group * sizeof *log_total);
        }
    }
}

float sqz_choose_variance_gain(const struct sqz_layer *layer, uint32_t head, void *workspace)
{
    struct buffers b = prepare_buffers(layer, workspace);
    return choose_variance_gain(layer, head, &b);
}

void sqz_count_head(const struct sqz_layer *layer, uint32_t head, float gain, struct sqz_curve_sums *sums,
                    void *workspace)
{
    struct buffers b = prepare_buffers(layer, workspace);
    float base_lse[1024]; /* a group has at most 1024 heads */
    memset(sums, 0, sizeof *sums);
    for (size_t first = 0; first < layer->n_queries; first += BATCH_TOKENS) {
        uint32_t tokens[BATCH_TOKENS];
        const size_t n_tokens = take_tokens(layer, first, tokens);
        load_batch(layer, head, &b, tokens, n_tokens);
        for (size_t t = 0; t < n_tokens; t++) {
            const struct query q = query_of(layer, head, t, tokens[t]);
            exact_weights(layer, head, &b, &q, base_lse);
            cluster_masses(layer, head, &b, &q);
            count_query(layer, head, &b, &q, gain, base_lse, sums);
        }
    }
}

void sqz_calibrate_head(const struct sqz_layer *layer, uint32_t head, bool fit_variance,
                        const struct sqz_head_curve *out, void *workspace)
{
    struct sqz_curve_sums sums;
    *out->variance_gain = fit_variance ? sqz_choose_variance_gain(layer, head, workspace) : 0.0f;
    sqz_count_head(layer, head, *out->variance_gain, &sums, workspace);
    sqz_curve_of_sums(layer, &sums, out);
}
