/*
 * The reference of `squeeze bench kernels`: attention in double precision, one (token, head) at a time, over a sample
 * of them. Written for plainness; it shares with the library the layout of a layer, the kernel that converts F16, and
 * the formulas of docs/method.md.
 *
 * Tolerance of an output, u = 2^-24. A logit is a sum of D products, off by at most (D + 2) u M where M is the largest
 * sum of magnitudes scale |q_i k_i| of a row; a weight and the denominator both have that error, hence twice. Sums over
 * n rows are made of independent roundings: 4 sqrt(n) u, far above what they amount to. Exponentials are within 4e-7
 * (lib/kernels.h). All of it multiplies the sum of weight |value|.
 *
 * A squeezed result depends on decisions: which clusters are opened or retained, which of their keys are, which values
 * are read. The library decides in floats, so a cluster or a row within CLOSE of its threshold may be decided either
 * way. The selection itself is the library's, taken from sqz_lookup() for that head alone, and every decision of it is
 * checked; a row that is close widens the tolerance by what it weighs.
 */
#include "bench_kernels.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "codes.h"
#include "common.h"
#include "kernels.h"
#include "lookup_keys.h"

enum {
    MAX_DIM = 256,
    DENSE_SAMPLES = 6,
    SQUEEZED_SAMPLES = 6,       /* selections */
    SAMPLES_OF_LONG = 3,        /* the same, of a context above */
    LONG_CONTEXT = 1 << 16,
    ROW_SAMPLES = 4,            /* query rows of each */
};

static const double unit_roundoff = 0x1p-24;

/* Relative distance of a score to its threshold below which floats may decide otherwise: twice the largest error of a
 * logit that the shapes of the bench give (D = 128, M = 60). */
static const double close_to = 2e-3;

/* ---- Rows ------------------------------------------------------------------------------- */

static double dot(const float *x, const float *y, size_t d)
{
    double sum[4] = {0};
    for (size_t i = 0; i < d; i += 4) { /* head dimensions are multiples of 16 */
        for (size_t j = 0; j < 4; j++) {
            sum[j] += (double)x[i + j] * y[i + j];
        }
    }
    return sum[0] + sum[1] + sum[2] + sum[3];
}

static double magnitude(const float *x, const float *y, size_t d)
{
    double sum = 0.0;
    for (size_t i = 0; i < d; i++) {
        sum += fabs((double)x[i] * y[i]);
    }
    return sum;
}

static void load(float *row, const uint16_t *rows, size_t at, size_t d)
{
    sqz_kernels_get()->f16_to_f32(row, rows + at * d, d);
}

/* A weighted sum of rows: weights are exponentials relative to `reference`, a logit. */
struct state {
    size_t d;
    double reference, weights, out[MAX_DIM], absolute[MAX_DIM];
    double close[MAX_DIM], close_weights; /* the part that may be there or not */
    double largest; /* magnitude of a logit */
    size_t n;
};

static void state_add(struct state *s, double logit, const uint16_t *values, size_t at, bool close)
{
    float value[MAX_DIM];
    const double weight = exp(logit - s->reference);
    load(value, values, at, s->d);
    s->weights += weight;
    s->n++;
    for (size_t i = 0; i < s->d; i++) {
        s->out[i] += weight * value[i];
        s->absolute[i] += weight * fabs((double)value[i]);
        if (close) {
            s->close[i] += weight * fabs((double)value[i]);
        }
    }
    if (close) {
        s->close_weights += weight;
    }
}

/* Takes the state's own error tolerance, or a given one, and compares. `where` names the output. */
static void state_compare(const struct state *s, const float *got, double tolerance, const char *where,
                          struct check_result *result)
{
    const double own = 2.0 * (double)(s->d + 2) * unit_roundoff * s->largest +
                       4.0 * sqrt((double)s->n) * unit_roundoff + 2e-6;
    const double allowed = tolerance > own ? tolerance : own;
    for (size_t i = 0; i < s->d; i++) {
        const double wanted = s->out[i] / s->weights, absolute = s->absolute[i] / s->weights;
        const double close = (s->close[i] + fabs(wanted) * s->close_weights) / s->weights;
        const double difference = fabs((double)got[i] - wanted);
        if (difference / (absolute + FLT_MIN) > result->error) {
            result->error = difference / (absolute + FLT_MIN);
        }
        if (!(difference <= allowed * absolute + close + 1e-9) && result->ok) { /* NaN fails */
            result->ok = false;
            snprintf(result->message, sizeof result->message,
                     "%s, dimension %zu: %.9g where double precision gives %.9g; allowed is a difference of %.3g",
                     where, i, (double)got[i], wanted, allowed * absolute + close);
        }
    }
}

/* Logits of n rows from F16 rows. */
static void logits_of(double *logits, const float *query, const uint16_t *rows, size_t n, const struct sqz_layer *layer,
                      struct state *state)
{
    const size_t d = layer->shape.head_dim;
    const double scale = layer->shape.scale;
    float row[MAX_DIM];
    for (size_t r = 0; r < n; r++) {
        load(row, rows, r, d);
        logits[r] = scale * dot(query, row, d);
        if (state && (r & 15) == 0) { /* a sixteenth of the rows tells how large they are */
            const double m = scale * magnitude(query, row, d);
            state->largest = m > state->largest ? m : state->largest;
        }
    }
}

static double log_sum(const double *logits, size_t n, double start)
{
    double maximum = start, sum;
    for (size_t i = 0; i < n; i++) {
        maximum = logits[i] > maximum ? logits[i] : maximum;
    }
    if (maximum == -INFINITY) {
        return maximum;
    }
    sum = exp(start - maximum);
    for (size_t i = 0; i < n; i++) {
        sum += exp(logits[i] - maximum);
    }
    return maximum + log(sum);
}

/* ---- Calls ------------------------------------------------------------------------------ */

/* Rows of the user that a token sees; the layers of the bench keep no window. */
static size_t user_rows(const struct sqz_attend_call *c, size_t token)
{
    return c->n_user ? c->n_user - c->n_tokens + token + 1 : 0;
}

static const float *query_of(const struct sqz_attend_call *c, size_t token, size_t head)
{
    return c->queries + token * c->query_token_stride + head * c->query_head_stride;
}

static const float *out_of(const struct sqz_attend_call *c, size_t token, size_t head)
{
    return c->out + token * c->out_token_stride + head * c->out_head_stride;
}

static void where_text(char *where, size_t size, size_t token, size_t head)
{
    snprintf(where, size, "token %zu, head %zu", token, head);
}

/* Spreads sample i of n over `count` things: the first, the last and what lies between. */
static size_t spread(size_t i, size_t n, size_t count)
{
    return n > 1 ? i * (count - 1) / (n - 1) : 0;
}

/* ---- Dense ------------------------------------------------------------------------------ */

static void check_dense_one(const struct sqz_attend_call *c, size_t token, size_t head, double tolerance,
                            struct check_result *result)
{
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim, n = layer->n_rows, n_user = user_rows(c, token);
    const size_t head_kv = head / (layer->shape.n_head / layer->shape.n_head_kv);
    const uint16_t *keys = layer->keys + head_kv * n * d, *values = layer->values + head_kv * n * d;
    const uint16_t *user_keys = c->user_keys + head_kv * c->user_capacity_rows * d;
    const uint16_t *user_values = c->user_values + head_kv * c->user_capacity_rows * d;
    struct state state = {.d = d};
    char where[64];
    double *logits = malloc((n + n_user) * sizeof *logits);
    if (!logits) {
        die("out of memory");
    }
    logits_of(logits, query_of(c, token, head), keys, n, layer, &state);
    logits_of(logits + n, query_of(c, token, head), user_keys, n_user, layer, &state);
    state.reference = log_sum(logits, n + n_user, -INFINITY);
    for (size_t r = 0; r < n; r++) {
        state_add(&state, logits[r], values, r, false);
    }
    for (size_t r = 0; r < n_user; r++) {
        state_add(&state, logits[n + r], user_values, r, false);
    }
    where_text(where, sizeof where, token, head);
    state_compare(&state, out_of(c, token, head), tolerance, where, result);
    free(logits);
}

static void join(struct check_result *into, const struct check_result *from)
{
    into->error = from->error > into->error ? from->error : into->error;
    if (!from->ok && into->ok) {
        *into = *from;
    }
}

struct check_result check_dense(const struct sqz_attend_call *c, double tolerance)
{
    struct check_result all = {.ok = true}, one[DENSE_SAMPLES];
    const int n_threads = c->n_threads;
    (void)n_threads; /* without OpenMP it is one */
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
    for (size_t i = 0; i < DENSE_SAMPLES; i++) {
        one[i] = (struct check_result){.ok = true};
        if (!signal_caught()) {
            check_dense_one(c, spread(i, DENSE_SAMPLES, c->n_tokens),
                            spread((i * 5 + 2) % DENSE_SAMPLES, DENSE_SAMPLES, c->layer->shape.n_head), tolerance,
                            &one[i]);
        }
    }
    for (size_t i = 0; i < DENSE_SAMPLES; i++) {
        join(&all, &one[i]);
    }
    return all;
}

/* ---- Squeezed ----------------------------------------------------------------------------- */

void check_base_lse(const struct sqz_attend_call *c, uint32_t head_kv, float *base)
{
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv;
    const size_t n = layer->n_fixed;
    double *logits = malloc((n + c->n_user + 1) * sizeof *logits);
    if (!logits) {
        die("out of memory");
    }
    for (size_t t = 0; t < c->n_tokens; t++) {
        for (size_t g = 0; g < group; g++) {
            const float *query = query_of(c, t, head_kv * group + g);
            const size_t n_user = user_rows(c, t);
            logits_of(logits, query, layer->keys + head_kv * layer->n_rows * d, n, layer, NULL);
            logits_of(logits + n, query, c->user_keys + head_kv * c->user_capacity_rows * d, n_user, layer, NULL);
            base[t * group + g] = (float)log_sum(logits, n + n_user, -INFINITY);
        }
    }
    free(logits);
}

/* One KV head and the tokens that share a selection, as a call and a layer of their own. */
struct part {
    struct sqz_layer layer; /* K = 1 */
    struct sqz_attend_call call;
    struct sqz_attention_stats stats;
    size_t first_token, head_kv, n_query_rows;
    float *queries, *norms, *base; /* [n_query_rows][D], ... */
    float *rounded;                /* [n_query_rows][D] as INT16 with a scale holds them, where something is INT8 */
    bool keys_i8;                  /* logits of retained keys are made of INT8 */
    float *out;                    /* [n_query_rows][D] */
    void *workspace, *lookup;
    struct sqz_head_plan plan;
    bool by_rows;                  /* one token, its own threshold (false: a block, brought to a number of rows) */
    struct sqz_selection selection;
};

static void part_free(struct part *p)
{
    free(p->queries);
    free(p->rounded);
    free(p->norms);
    free(p->base);
    free(p->out);
    free(p->workspace);
    free(p->lookup);
}

/* INT16 with the largest magnitude as 32767, as the library rounds queries for INT8 rows. */
static void round_query(float *rounded, const float *query, size_t d)
{
    float largest = 0.0f;
    for (size_t i = 0; i < d; i++) {
        largest = fabsf(query[i]) > largest ? fabsf(query[i]) : largest;
    }
    const float inverse = largest > 0.0f ? 32767.0f / largest : 0.0f;
    for (size_t i = 0; i < d; i++) {
        rounded[i] = (float)((double)lrintf(query[i] * inverse) * largest / 32767.0);
    }
}

/* Logit of a query row with an INT8 row, which is relative to the head's mean key. */
static double logit_i8(const struct part *p, size_t r, const int8_t *row, float scale)
{
    const size_t d = p->layer.shape.head_dim;
    float numbers[MAX_DIM];
    for (size_t i = 0; i < d; i++) {
        numbers[i] = (float)row[i];
    }
    return (double)p->layer.shape.scale * (dot(p->rounded + r * d, numbers, d) * (double)scale +
                                           dot(p->queries + r * d, p->layer.key_mean, d));
}

/* Cuts a part out of a call and runs it alone, which tells how many rows it retains. */
static void part_make(struct part *p, const struct sqz_attend_call *whole, size_t token, size_t head_kv)
{
    const struct sqz_layer *layer = whole->layer;
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv;
    const size_t block = whole->block_tokens;
    size_t first = token / block * block;
    if (block > 1 && first > 0 && first + 1 == whole->n_tokens) {
        first -= block; /* a block of one token, alone, would be run as one token is: the block before it instead */
    }
    const size_t n = whole->n_tokens - first < block ? whole->n_tokens - first : block;
    const size_t n_rows = n * group, user_at = head_kv * whole->user_capacity_rows * d;
    memset(p, 0, sizeof *p);
    p->layer = sqz_layer_head(layer, (uint32_t)head_kv);
    p->first_token = first;
    p->head_kv = head_kv;
    p->n_query_rows = n_rows;
    p->queries = malloc(n_rows * d * sizeof *p->queries);
    p->rounded = malloc(n_rows * d * sizeof *p->rounded);
    p->norms = malloc(n_rows * sizeof *p->norms);
    p->base = malloc(n_rows * sizeof *p->base);
    p->out = malloc(n_rows * d * sizeof *p->out);
    p->workspace = malloc(sqz_attend_workspace_bytes(&p->layer, whole->n_user, n, whole->n_threads));
    p->lookup = malloc(sqz_lookup_workspace_bytes(&p->layer, n_rows));
    if (!p->queries || !p->rounded || !p->norms || !p->base || !p->out || !p->workspace || !p->lookup) {
        die("out of memory");
    }
    for (size_t r = 0; r < n_rows; r++) {
        const float *query = query_of(whole, first + r / group, head_kv * group + r % group);
        float norm = 0.0f;
        for (size_t i = 0; i < d; i++) {
            norm += query[i] * query[i];
        }
        memcpy(p->queries + r * d, query, d * sizeof *query);
        round_query(p->rounded + r * d, query, d);
        p->norms[r] = norm;
    }
    p->call = *whole;
    p->call.layer = &p->layer;
    p->call.queries = p->queries;
    p->call.out = p->out;
    p->call.query_token_stride = p->call.out_token_stride = group * d;
    p->call.query_head_stride = p->call.out_head_stride = d;
    p->call.n_tokens = n;
    p->call.n_user = user_rows(whole, first + n - 1);
    p->call.user_keys = whole->user_keys + user_at;
    p->call.user_values = whole->user_values + user_at;
    p->call.block_tokens = n;
    p->call.stats = &p->stats;
    p->call.workspace = p->workspace;
    p->by_rows = n == 1 && group <= SQZ_MAX_GROUP_QUERIES;
    p->keys_i8 = p->by_rows && p->layer.key_format == SQZ_INDEX_INT8; /* blocks convert tiles from F16 */
    p->plan = sqz_head_plan_at(&p->layer, 0, whole->budget, whole->log_offset);
    sqz_attend(&p->call);
    check_base_lse(&p->call, 0, p->base);
    const size_t n_retained = (size_t)(p->stats.retained_keys - p->layer.n_fixed);
    sqz_lookup(&p->selection, &p->layer, 0, &p->plan, p->queries, p->norms, n_rows, p->base,
               p->by_rows ? 0 : n_retained ? n_retained : 1, p->lookup);
}

/* Logit of a query row with centroid c of a level; row: the centroid where it is F16. */
static double centroid_logit(const struct part *p, size_t r, const struct sqz_level *level, size_t c, const float *row)
{
    const size_t d = p->layer.shape.head_dim;
    if (p->layer.index == SQZ_INDEX_INT8) {
        return logit_i8(p, r, level->centroids_i8 + c * d, level->centroid_scale[c]);
    }
    return (double)p->layer.shape.scale * dot(p->queries + r * d, row, d);
}

/* The lookup in double precision, following the library's selection. */
struct lookup {
    const struct part *part;
    uint8_t *pruned[BENCH_LEVELS];  /* [n_clusters] by the library */
    double *logit, *corrected;      /* [n_query_rows][C of the finest level] of the level at hand */
    double *tail_logit;             /* [n_query_rows][n_pruned], before its bound */
    double *tail_keys;              /* [n_pruned] how many keys of that logit an entry stands for */
    double *known, *total;          /* [n_query_rows] log of the mass so far, log Z */
    size_t stride;
    double worst; /* by how much a decision was wrong, as a factor on the score: 1 is none */
};

static void lookup_free(struct lookup *l)
{
    for (size_t i = 0; i < BENCH_LEVELS; i++) {
        free(l->pruned[i]);
    }
    free(l->logit);
    free(l->corrected);
    free(l->tail_logit);
    free(l->tail_keys);
    free(l->known);
    free(l->total);
}

static void lookup_make(struct lookup *l, const struct part *part)
{
    const size_t rows = part->n_query_rows, n_pruned = part->selection.n_pruned;
    memset(l, 0, sizeof *l);
    l->part = part;
    l->stride = part->layer.level[0].n_clusters;
    l->worst = 1.0;
    bool ok = true;
    for (uint32_t i = 0; i < part->layer.n_levels; i++) {
        l->pruned[i] = calloc(part->layer.level[i].n_clusters, 1);
        ok = ok && l->pruned[i];
    }
    l->logit = malloc(rows * l->stride * sizeof(double));
    l->corrected = malloc(rows * l->stride * sizeof(double));
    l->tail_logit = malloc((rows * n_pruned + 1) * sizeof(double));
    l->tail_keys = malloc((n_pruned + 1) * sizeof(double));
    l->known = malloc(rows * sizeof(double));
    l->total = malloc(rows * sizeof(double));
    if (!ok || !l->logit || !l->corrected || !l->tail_logit || !l->tail_keys || !l->known || !l->total) {
        die("out of memory");
    }
    for (size_t p = 0; p < n_pruned; p++) {
        l->pruned[part->selection.pruned_level[p]][part->selection.pruned_cluster[p]] = 1;
    }
    for (size_t r = 0; r < rows; r++) {
        l->known[r] = part->base[r];
    }
}

/* Logits of the n active clusters of a level. */
static void lookup_logits(struct lookup *l, uint32_t level, const uint32_t *active, size_t n)
{
    const struct part *p = l->part;
    const size_t d = p->layer.shape.head_dim;
    const double scale = p->layer.shape.scale;
    const int n_threads = p->call.n_threads;
    (void)n_threads; /* without OpenMP it is one */
#pragma omp parallel for schedule(static) num_threads(n_threads)
    for (size_t i = 0; i < n; i++) {
        float centroid[MAX_DIM];
        if (p->layer.index == SQZ_INDEX_F16) {
            load(centroid, p->layer.level[level].centroids, active[i], d);
        }
        for (size_t r = 0; r < p->n_query_rows; r++) {
            l->logit[r * l->stride + i] = centroid_logit(p, r, &p->layer.level[level], active[i], centroid);
        }
    }
    for (size_t r = 0; r < p->n_query_rows; r++) {
        const double gain = p->plan.variance_gain * scale * scale * p->norms[r] / (2.0 * (double)d);
        for (size_t i = 0; i < n; i++) {
            l->corrected[r * l->stride + i] =
                l->logit[r * l->stride + i] + gain * p->layer.level[level].variance[active[i]];
        }
    }
}

/* log Z of every query row, from what is known and the active clusters. keys: of each of them. */
static void lookup_total(struct lookup *l, const double *keys, size_t n)
{
    const struct part *p = l->part;
    for (size_t r = 0; r < p->n_query_rows; r++) {
        double maximum = l->known[r], sum;
        const double *y = l->corrected + r * l->stride;
        for (size_t i = 0; i < n; i++) {
            maximum = y[i] > maximum ? y[i] : maximum;
        }
        sum = exp(l->known[r] - maximum);
        for (size_t i = 0; i < n; i++) {
            sum += keys[i] * exp(y[i] - maximum);
        }
        l->total[r] = maximum + log(sum);
    }
}

/* The score of something that has these logits, `stride` apart, for the query rows. */
static double score_of(const struct lookup *l, const double *logits, size_t stride)
{
    const struct part *p = l->part;
    double score = 0.0;
    for (size_t r = 0; r < p->n_query_rows; r++) {
        const double s = exp(logits[r * stride] - l->total[r]);
        score = p->layer.group == SQZ_GROUP_MAX ? (s > score ? s : score) : score + s / (double)p->n_query_rows;
    }
    return score;
}

/* Coordinates of the part's query rows along the directions of the codes, and their deviations. */
struct code_queries {
    double along[SQZ_MAX_GROUP_QUERIES][MAX_DIM], deviation[SQZ_MAX_GROUP_QUERIES];
};

static void code_queries_make(struct code_queries *q, const struct part *p)
{
    const struct sqz_codes *codes = &p->layer.codes;
    const size_t d = p->layer.shape.head_dim;
    float direction[MAX_DIM];
    for (size_t r = 0; r < p->n_query_rows; r++) {
        double variance = 0.0;
        for (size_t i = 0; i < codes->n_directions; i++) {
            load(direction, codes->directions, i, d);
            q->along[r][i] = (double)p->layer.shape.scale * dot(p->queries + r * d, direction, d);
            variance += q->along[r][i] * q->along[r][i] * (double)codes->spread[i];
        }
        q->deviation[r] = sqrt(variance);
    }
}

/* How far above the threshold, in logarithms, a cluster's score or the likeliest of its keys may lie: what clusters of
 * layers with codes are opened by. */
static double reach_above(const struct lookup *l, const struct code_queries *q, uint32_t level, uint32_t cluster,
                          size_t i)
{
    const struct part *p = l->part;
    const double root = sqrt((double)p->layer.level[level].variance[cluster]);
    double above = log(score_of(l, l->corrected + i, l->stride));
    for (size_t r = 0; r < p->n_query_rows; r++) {
        above = fmax(above, l->logit[r * l->stride + i] - l->total[r] +
                                (double)sqz_open_deviations(level) * q->deviation[r] * root);
    }
    return above - (double)p->plan.log_threshold;
}

/* The coarse clusters of a layer with codes. */
static void lookup_decide_reach(struct lookup *l, uint32_t level, const uint32_t *active, size_t n)
{
    struct code_queries *q = malloc(sizeof *q);
    if (!q) {
        die("out of memory");
    }
    code_queries_make(q, l->part);
    for (size_t i = 0; i < n; i++) {
        const double above = reach_above(l, q, level, active[i], i);
        if (l->pruned[level][active[i]] != (above < 0.0)) {
            l->worst = fmax(l->worst, exp(fabs(above)));
        }
    }
    free(q);
}

/* How far the library's decisions are from the scores. */
static void lookup_decide(struct lookup *l, uint32_t level, const uint32_t *active, size_t n)
{
    const struct part *p = l->part;
    if (p->layer.codes.n_words && p->by_rows) {
        lookup_decide_reach(l, level, active, n);
        return;
    }
    const double threshold = exp((double)p->plan.log_threshold - (level > 0 ? (double)SQZ_LEVEL_MARGIN : 0.0));
    double lowest_kept = INFINITY, highest_pruned = 0.0;
    for (size_t i = 0; i < n; i++) {
        const double score = score_of(l, l->corrected + i, l->stride);
        if (l->pruned[level][active[i]]) {
            highest_pruned = score > highest_pruned ? score : highest_pruned;
        } else {
            lowest_kept = score < lowest_kept ? score : lowest_kept;
        }
    }
    /* A block's finest level is brought to a number of rows: every score kept is above every score that is not. */
    const double least = level == 0 && !p->by_rows ? highest_pruned : threshold;
    const double most = level == 0 && !p->by_rows ? lowest_kept : threshold;
    l->worst = least / lowest_kept > l->worst ? least / lowest_kept : l->worst;
    l->worst = highest_pruned / most > l->worst ? highest_pruned / most : l->worst;
}

/* ---- From clusters to single keys ---- */

/* Adds what the code of a key (counted from the first clustered one) says to the logits of all query rows. */
static void add_code(double *logits, size_t stride, const struct code_queries *q, const struct part *p, size_t key)
{
    const struct sqz_codes *codes = &p->layer.codes;
    float entry[MAX_DIM];
    for (size_t part = 0; part < SQZ_CODE_PARTS * codes->n_words; part++) {
        const uint32_t word = codes->words[part / SQZ_CODE_PARTS * (p->layer.n_rows - p->layer.n_fixed) + key];
        const uint32_t first = codes->first[part], n = codes->first[part + 1] - first;
        const size_t code = word >> 4 * (part % SQZ_CODE_PARTS) & 15;
        sqz_kernels_get()->f16_to_f32(entry, codes->book + code * codes->n_directions + first, n);
        for (size_t r = 0; r < p->n_query_rows; r++) {
            for (uint32_t i = 0; i < n; i++) {
                logits[r * stride] += q->along[r][first + i] * entry[i];
            }
        }
    }
}

/* Whether a cluster is opened, as the library has it where that can be told: a cluster that stays closed stands in the
 * list of the pruned ones with the number of its keys, an opened one with 1, or not at all. */
static bool is_opened(struct lookup *l, const struct code_queries *q, uint32_t cluster, size_t i, double n_keys,
                      size_t entry)
{
    const struct part *p = l->part;
    const double above = reach_above(l, q, 0, cluster, i);
    const bool pruned = l->pruned[0][cluster], wanted = above >= 0.0;
    const bool got = !pruned || (n_keys > 1.0 ? (double)p->selection.pruned_keys[entry] != n_keys : wanted);
    if (got != wanted) {
        l->worst = fmax(l->worst, exp(fabs(above)));
    }
    return got;
}

/* The n active clusters of the finest level: opens, estimates, sets log Z anew, judges what is retained of the opened
 * ones, and fills the entries of the tail from `entry` on. Returns how many those are. */
static size_t lookup_keys(struct lookup *l, const uint32_t *active, const double *keys, size_t n, size_t entry)
{
    const struct part *p = l->part;
    const uint32_t *offset = p->layer.level[0].offset;
    const size_t n_keys = p->layer.n_rows - p->layer.n_fixed, rows = p->n_query_rows, n_pruned = p->selection.n_pruned;
    const double scale = p->layer.shape.scale, d = p->layer.shape.head_dim;
    const double threshold = exp((double)p->plan.log_threshold);
    struct code_queries *q = malloc(sizeof *q);
    double *estimate = malloc(rows * n_keys * sizeof *estimate);
    bool *opened = calloc(n + 1, sizeof *opened), *retained = calloc(n_keys, sizeof *retained);
    if (!q || !estimate || !opened || !retained) {
        die("out of memory");
    }
    code_queries_make(q, p);
    for (size_t i = 0; i < p->selection.n_ranges; i++) {
        for (size_t row = p->selection.ranges[i].begin; row < p->selection.ranges[i].end; row++) {
            retained[row - p->layer.n_fixed] = true;
        }
    }
    for (size_t i = 0, at = entry; i < n; i++) {
        opened[i] = is_opened(l, q, active[i], i, keys[i], at);
        at += l->pruned[0][active[i]];
        for (size_t key = offset[active[i]]; opened[i] && key < offset[active[i] + 1]; key++) {
            for (size_t r = 0; r < rows; r++) {
                estimate[r * n_keys + key] = l->logit[r * l->stride + i];
            }
            add_code(estimate + key, n_keys, q, p, key);
        }
    }
    for (size_t r = 0; r < rows; r++) {
        const double reference = l->total[r];
        double mass = exp(l->known[r] - reference);
        for (size_t i = 0; i < n; i++) {
            mass += opened[i] ? 0.0 : keys[i] * exp(l->corrected[r * l->stride + i] - reference);
            for (size_t key = offset[active[i]]; opened[i] && key < offset[active[i] + 1]; key++) {
                mass += exp(estimate[r * n_keys + key] - reference);
            }
        }
        l->total[r] = reference + log(mass);
    }
    const size_t first = entry;
    for (size_t i = 0; i < n; i++) {
        const uint32_t c = active[i];
        size_t left = 0;
        for (size_t key = offset[c]; opened[i] && key < offset[c + 1]; key++) {
            const double score = score_of(l, estimate + key, n_keys) / threshold;
            left += !retained[key];
            l->worst = fmax(l->worst, retained[key] ? 1.0 / score : score);
        }
        if (!l->pruned[0][c]) {
            l->worst = left ? INFINITY : l->worst; /* keys that neither stand for themselves nor in the tail */
            continue;
        }
        l->tail_keys[entry] = opened[i] ? 1.0 : keys[i];
        for (size_t r = 0; r < rows; r++) {
            double tail = l->logit[r * l->stride + i] + p->plan.tail_gain +
                          scale * scale * p->norms[r] * p->layer.level[0].variance[c] / (2.0 * d);
            if (opened[i]) {
                double mass = 0.0;
                for (size_t key = offset[c]; key < offset[c + 1]; key++) {
                    mass += retained[key] ? 0.0 : exp(estimate[r * n_keys + key] - l->total[r]);
                }
                tail = l->total[r] + log(mass) + p->plan.tail_gain;
            }
            l->tail_logit[r * n_pruned + entry] = tail;
        }
        entry++;
    }
    free(q);
    free(estimate);
    free(opened);
    free(retained);
    return entry - first;
}

/* From the coarsest level down. Returns false when a decision was wrong. */
static bool lookup_run(struct lookup *l, struct check_result *result)
{
    const struct part *p = l->part;
    const struct sqz_layer *layer = &p->layer;
    const double scale = layer->shape.scale, d = layer->shape.head_dim;
    uint32_t *active = malloc(l->stride * sizeof *active), *next = malloc(l->stride * sizeof *next);
    double *keys = malloc(l->stride * sizeof *keys);
    size_t n = layer->level[layer->n_levels - 1].n_clusters, first_pruned = 0;
    if (!active || !next || !keys) {
        die("out of memory");
    }
    for (size_t i = 0; i < n; i++) {
        active[i] = (uint32_t)i;
    }
    for (uint32_t level = layer->n_levels; level-- > 0;) {
        size_t n_next = 0, n_pruned = 0;
        for (size_t i = 0; i < n; i++) {
            keys[i] = sqz_cluster_keys(layer, 0, level, active[i], NULL);
        }
        lookup_logits(l, level, active, n);
        lookup_total(l, keys, n);
        if (level == 0 && p->by_rows && layer->codes.n_words) {
            first_pruned += lookup_keys(l, active, keys, n, first_pruned);
            break;
        }
        lookup_decide(l, level, active, n);
        for (size_t i = 0; i < n; i++) {
            const uint32_t c = active[i];
            if (!l->pruned[level][c]) {
                const uint32_t *offset = layer->level[level].offset;
                for (uint32_t child = offset[c]; level > 0 && child < offset[c + 1]; child++) {
                    next[n_next++] = child;
                }
                continue;
            }
            for (size_t r = 0; r < p->n_query_rows; r++) {
                const double v = scale * scale * p->norms[r] * layer->level[level].variance[c] / (2.0 * d);
                l->tail_logit[r * p->selection.n_pruned + first_pruned + n_pruned] =
                    l->logit[r * l->stride + i] + v + p->plan.tail_gain;
            }
            l->tail_keys[first_pruned + n_pruned] = keys[i];
            n_pruned++;
        }
        for (size_t r = 0; r < p->n_query_rows && level > 0; r++) { /* what finer levels will not see */
            double mass = 0.0;
            for (size_t i = 0; i < n; i++) {
                if (l->pruned[level][active[i]]) {
                    mass += keys[i] * exp(l->corrected[r * l->stride + i] - l->known[r]);
                }
            }
            l->known[r] += log1p(mass);
        }
        first_pruned += n_pruned;
        uint32_t *swap = active;
        active = next;
        next = swap;
        n = n_next;
    }
    free(active);
    free(next);
    free(keys);
    if (first_pruned != p->selection.n_pruned || !(l->worst <= 1.0 + close_to)) {
        result->ok = false;
        snprintf(result->message, sizeof result->message,
                 "lookup of token %zu, KV head %zu: %zu clusters pruned where %zu are reachable; a score is on the "
                 "wrong side of its threshold by a factor of %.6f, allowed is %.3f",
                 p->first_token, p->head_kv, p->selection.n_pruned, first_pruned, l->worst, 1.0 + close_to);
    }
    return result->ok;
}

/* Whether a column of weights is read: where the largest reaches the limit. *is_close: floats may decide otherwise. */
static bool is_read(double largest, double limit, bool *is_close)
{
    *is_close = limit > 0.0 && fabs(largest / limit - 1.0) < close_to;
    return largest >= limit * (1.0 - close_to);
}

/* The outputs of a part that are compared: some of its query rows. */
struct sample {
    size_t n, row[ROW_SAMPLES];
    size_t visible[ROW_SAMPLES]; /* of the user's rows */
    struct state state[ROW_SAMPLES];
};

/* Rows of one kind. */
struct rows {
    const uint16_t *keys, *values;
    size_t begin, end;
    double limit;   /* a row whose weights are all below is left out */
    bool causal;    /* query rows see the first of them alone */
    bool retained;  /* perhaps read as INT8 */
};

/* Logit of a query row with row `at`, whose key is `key` in floats. */
static double key_logit(const struct part *p, size_t r, const struct rows *rows, size_t at, const float *key)
{
    const size_t d = p->layer.shape.head_dim;
    if (rows->retained && p->keys_i8) {
        return logit_i8(p, r, p->layer.keys_i8 + at * d, p->layer.key_scale[at]);
    }
    return (double)p->layer.shape.scale * dot(p->queries + r * d, key, d);
}

/* The largest weight that any query row gives a key. */
static double largest_weight(const struct lookup *l, const struct rows *rows, size_t at, const float *key)
{
    double largest = -INFINITY;
    for (size_t r = 0; r < l->part->n_query_rows; r++) {
        largest = fmax(largest, key_logit(l->part, r, rows, at, key) - l->total[r]);
    }
    return exp(largest);
}

static void add_rows(const struct lookup *l, struct sample *sample, const struct rows *rows)
{
    const struct part *p = l->part;
    const size_t d = p->layer.shape.head_dim;
    float key[MAX_DIM];
    for (size_t at = rows->begin; at < rows->end; at++) {
        bool is_close = false;
        load(key, rows->keys, at, d);
        if (rows->limit > 0.0 && !is_read(largest_weight(l, rows, at, key), rows->limit, &is_close)) {
            continue;
        }
        for (size_t i = 0; i < sample->n; i++) {
            struct state *state = &sample->state[i];
            if (rows->causal && at >= sample->visible[i]) {
                continue;
            }
            if ((at & 15) == 0) { /* a sixteenth of the rows tells how large logits are */
                const double m = p->layer.shape.scale * magnitude(p->queries + sample->row[i] * d, key, d);
                state->largest = m > state->largest ? m : state->largest;
            }
            state_add(state, key_logit(p, sample->row[i], rows, at, key), rows->values, at, is_close);
        }
    }
}

static void add_tail(const struct lookup *l, struct sample *sample, double limit)
{
    const struct part *p = l->part;
    const struct sqz_selection *s = &p->selection;
    if (!p->layer.tail || p->plan.tail_gain <= SQZ_TAIL_OFF) {
        return;
    }
    for (size_t c = 0; c < s->n_pruned; c++) {
        const double keys = l->tail_keys[c];
        double largest = 0.0;
        bool is_close;
        for (size_t r = 0; r < p->n_query_rows; r++) {
            const double logit = fmin(l->tail_logit[r * s->n_pruned + c], l->total[r]);
            largest = fmax(largest, keys * exp(logit - l->total[r]));
        }
        if (!is_read(largest, limit, &is_close)) {
            continue;
        }
        for (size_t i = 0; i < sample->n; i++) {
            const size_t r = sample->row[i];
            const double logit = fmin(l->tail_logit[r * s->n_pruned + c], l->total[r]);
            state_add(&sample->state[i], logit + log(keys), p->layer.level[s->pruned_level[c]].value_centroids,
                      s->pruned_cluster[c], is_close);
        }
    }
}

static void sample_make(struct sample *sample, const struct lookup *l)
{
    const struct part *p = l->part;
    memset(sample, 0, sizeof *sample);
    sample->n = p->n_query_rows < ROW_SAMPLES ? p->n_query_rows : ROW_SAMPLES;
    for (size_t i = 0; i < sample->n; i++) {
        sample->row[i] = spread(i, sample->n, p->n_query_rows);
        sample->visible[i] = user_rows(&p->call, sample->row[i] / p->layer.shape.n_head);
        sample->state[i].d = p->layer.shape.head_dim;
        sample->state[i].reference = l->total[sample->row[i]];
    }
}

/* Everything that the part reads, added up and compared with what the whole call wrote. */
static void compare_part(const struct sqz_attend_call *whole, const struct lookup *l, struct check_result *result)
{
    const struct part *p = l->part;
    const struct sqz_layer *layer = &p->layer;
    const size_t group = layer->shape.n_head;
    struct sample sample;
    sample_make(&sample, l);
    /* Where as many values were read as keys, none was skipped. */
    const double limit = layer->value_skip ? SQZ_VALUE_SKIP * exp((double)p->plan.log_threshold) : 0.0;
    const uint64_t values_read = p->stats.value_bytes / (layer->shape.head_dim * sizeof(uint16_t));
    const double row_limit = values_read < p->stats.retained_keys ? limit : 0.0;
    add_rows(l, &sample,
             &(struct rows){.keys = p->call.user_keys, .values = p->call.user_values, .end = p->call.n_user,
                            .causal = true});
    add_rows(l, &sample,
             &(struct rows){.keys = layer->keys, .values = layer->values, .end = layer->n_fixed, .limit = row_limit});
    for (size_t i = 0; i < p->selection.n_ranges; i++) {
        const struct sqz_range range = p->selection.ranges[i];
        add_rows(l, &sample,
                 &(struct rows){.keys = layer->keys, .values = layer->values, .begin = range.begin, .end = range.end,
                                .limit = row_limit, .retained = true});
    }
    add_tail(l, &sample, limit);
    for (size_t i = 0; i < sample.n; i++) {
        const size_t token = p->first_token + sample.row[i] / group, head = p->head_kv * group + sample.row[i] % group;
        char where[64];
        where_text(where, sizeof where, token, head);
        state_compare(&sample.state[i], out_of(whole, token, head), 0.0, where, result);
    }
}

static void check_part(const struct sqz_attend_call *whole, size_t token, size_t head_kv, struct check_result *result)
{
    struct part p;
    struct lookup l;
    part_make(&p, whole, token, head_kv);
    lookup_make(&l, &p);
    if (lookup_run(&l, result)) {
        compare_part(whole, &l, result);
    }
    lookup_free(&l);
    part_free(&p);
}

struct check_result check_squeezed(const struct sqz_attend_call *c)
{
    struct check_result all = {.ok = true};
    const size_t n = c->layer->n_rows > LONG_CONTEXT ? SAMPLES_OF_LONG : SQUEEZED_SAMPLES;
    for (size_t i = 0; i < n && !signal_caught(); i++) {
        struct check_result one = {.ok = true};
        check_part(c, spread(i, n, c->n_tokens), spread((i * 5 + 1) % n, n, c->layer->shape.n_head_kv), &one);
        join(&all, &one);
    }
    return all;
}
