/*
 * The lookup in double precision: the selection that the library made for one KV head and the tokens that share it,
 * followed from the coarsest clusters down to single keys. The selection is the library's, taken from sqz_lookup() for
 * that head alone, and every decision of it is held against its score.
 */
#include "bench_kernels_check.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "codes.h"
#include "common.h"
#include "kernels.h"
#include "lookup_keys.h"

/* ---- Rows ------------------------------------------------------------------------------- */

double check_dot(const float *x, const float *y, size_t d)
{
    double sum[4] = {0};
    for (size_t i = 0; i < d; i += 4) /* head dimensions are multiples of 16 */
        for (size_t j = 0; j < 4; j++) sum[j] += (double)x[i + j] * y[i + j];
    return sum[0] + sum[1] + sum[2] + sum[3];
}

void check_logits(double *logits, const float *query, const struct sqz_rows *rows, size_t n,
                  const struct sqz_layer *layer)
{
    float row[CHECK_MAX_DIM];
    for (size_t r = 0; r < n; r++) {
        sqz_rows_to_f32(row, rows, r, 1, layer->shape.head_dim);
        logits[r] = (double)layer->shape.scale * check_dot(query, row, layer->shape.head_dim);
    }
}

double check_log_sum(const double *logits, size_t n, double start)
{
    double maximum = start, sum;
    for (size_t i = 0; i < n; i++) maximum = logits[i] > maximum ? logits[i] : maximum;
    if (maximum == -INFINITY) return maximum;
    sum = exp(start - maximum);
    for (size_t i = 0; i < n; i++) sum += exp(logits[i] - maximum);
    return maximum + log(sum);
}

size_t check_user_rows(const struct sqz_attend_call *c, size_t token)
{
    return c->n_user ? c->n_user - c->n_tokens + token + 1 : 0;
}

const float *check_query(const struct sqz_attend_call *c, size_t token, size_t head)
{
    return c->queries + token * c->query_token_stride + head * c->query_head_stride;
}

void check_base_lse(const struct sqz_attend_call *c, uint32_t head_kv, float *base)
{
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv;
    const size_t n = layer->n_fixed;
    const struct sqz_rows keys = sqz_rows_of_head(&layer->keys, layer->n_rows, d, head_kv);
    const struct sqz_rows user_keys = sqz_f16_rows(c->user_keys + head_kv * c->user_capacity_rows * d);
    double *logits = malloc((n + c->n_user + 1) * sizeof *logits);
    if (!logits) die("out of memory");
    for (size_t t = 0; t < c->n_tokens; t++) {
        for (size_t g = 0; g < group; g++) {
            const float *query = check_query(c, t, head_kv * group + g);
            const size_t n_user = check_user_rows(c, t);
            check_logits(logits, query, &keys, n, layer);
            check_logits(logits + n, query, &user_keys, n_user, layer);
            base[t * group + g] = (float)check_log_sum(logits, n + n_user, -INFINITY);
        }
    }
    free(logits);
}

/* ---- One selection -------------------------------------------------------------------------- */

void check_part_free(struct check_part *p)
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
    for (size_t i = 0; i < d; i++) largest = fabsf(query[i]) > largest ? fabsf(query[i]) : largest;
    const float inverse = largest > 0.0f ? 32767.0f / largest : 0.0f;
    for (size_t i = 0; i < d; i++) rounded[i] = (float)((double)lrintf(query[i] * inverse) * largest / 32767.0);
}

double check_logit(const struct check_part *p, size_t r, const struct sqz_rows *rows, size_t at, const float *row)
{
    const size_t d = p->layer.shape.head_dim;
    float numbers[CHECK_MAX_DIM];
    if (rows->type != SQZ_ROW_I8) return (double)p->layer.shape.scale * check_dot(p->queries + r * d, row, d);
    for (size_t i = 0; i < d; i++) numbers[i] = (float)sqz_rows_i8(rows)[at * d + i];
    return (double)p->layer.shape.scale * (check_dot(p->rounded + r * d, numbers, d) * (double)rows->scale[at] +
                                           check_dot(p->queries + r * d, rows->mean, d));
}

/* Cuts a part out of a call and runs it alone, which tells how many rows it retains. */
void check_part_make(struct check_part *p, const struct sqz_attend_call *whole, size_t token, size_t head_kv)
{
    const struct sqz_layer *layer = whole->layer;
    const size_t d = layer->shape.head_dim, group = layer->shape.n_head / layer->shape.n_head_kv;
    const size_t block = whole->block_tokens;
    size_t first = token / block * block;
    if (block > 1 && first > 0 && first + 1 == whole->n_tokens)
        first -= block; /* a block of one token, alone, would be run as one token is: the block before it instead */
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
    if (!p->queries || !p->rounded || !p->norms || !p->base || !p->out || !p->workspace || !p->lookup)
        die("out of memory");
    for (size_t r = 0; r < n_rows; r++) {
        const float *query = check_query(whole, first + r / group, head_kv * group + r % group);
        float norm = 0.0f;
        for (size_t i = 0; i < d; i++) norm += query[i] * query[i];
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
    p->call.n_user = check_user_rows(whole, first + n - 1);
    p->call.user_keys = whole->user_keys + user_at;
    p->call.user_values = whole->user_values + user_at;
    p->call.block_tokens = n;
    p->call.stats = &p->stats;
    p->call.workspace = p->workspace;
    p->by_rows = n == 1 && group <= SQZ_MAX_GROUP_QUERIES;
    p->plan = sqz_head_plan_at(&p->layer, 0, whole->budget, whole->log_offset);
    sqz_attend(&p->call);
    check_base_lse(&p->call, 0, p->base);
    const size_t n_retained = (size_t)(p->stats.retained_keys - p->layer.n_fixed);
    sqz_lookup(&p->selection, &p->layer, 0, &p->plan, p->queries, p->norms, n_rows, p->base,
               p->by_rows   ? 0
               : n_retained ? n_retained
                            : 1,
               p->lookup);
}

void check_lookup_free(struct check_lookup *l)
{
    for (size_t i = 0; i < BENCH_LEVELS; i++) free(l->pruned[i]);
    free(l->logit);
    free(l->corrected);
    free(l->tail_logit);
    free(l->tail_keys);
    free(l->known);
    free(l->total);
}

void check_lookup_make(struct check_lookup *l, const struct check_part *part)
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
    if (!ok || !l->logit || !l->corrected || !l->tail_logit || !l->tail_keys || !l->known || !l->total)
        die("out of memory");
    for (size_t p = 0; p < n_pruned; p++)
        l->pruned[part->selection.pruned_level[p]][part->selection.pruned_cluster[p]] = 1;
    for (size_t r = 0; r < rows; r++) l->known[r] = part->base[r];
}

/* Logits of the n active clusters of a level. */
static void lookup_logits(struct check_lookup *l, uint32_t level, const uint32_t *active, size_t n)
{
    const struct check_part *p = l->part;
    const size_t d = p->layer.shape.head_dim;
    const double scale = p->layer.shape.scale;
    const int n_threads = p->call.n_threads;
    (void)n_threads; /* without OpenMP it is one */
#pragma omp parallel for schedule(static) num_threads(n_threads)
    for (size_t i = 0; i < n; i++) {
        float centroid[CHECK_MAX_DIM];
        const struct sqz_rows *rows = &p->layer.level[level].centroids;
        sqz_rows_to_f32(centroid, rows, active[i], 1, d);
        for (size_t r = 0; r < p->n_query_rows; r++)
            l->logit[r * l->stride + i] = check_logit(p, r, rows, active[i], centroid);
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
static void lookup_total(struct check_lookup *l, const double *keys, size_t n)
{
    const struct check_part *p = l->part;
    for (size_t r = 0; r < p->n_query_rows; r++) {
        double maximum = l->known[r], sum;
        const double *y = l->corrected + r * l->stride;
        for (size_t i = 0; i < n; i++) maximum = y[i] > maximum ? y[i] : maximum;
        sum = exp(l->known[r] - maximum);
        for (size_t i = 0; i < n; i++) sum += keys[i] * exp(y[i] - maximum);
        l->total[r] = maximum + log(sum);
    }
}

/* The score of something that has these logits, `stride` apart, for the query rows. */
static double score_of(const struct check_lookup *l, const double *logits, size_t stride)
{
    const struct check_part *p = l->part;
    double score = 0.0;
    for (size_t r = 0; r < p->n_query_rows; r++) {
        const double s = exp(logits[r * stride] - l->total[r]);
        score = p->layer.group == SQZ_GROUP_MAX ? (s > score ? s : score) : score + s / (double)p->n_query_rows;
    }
    return score;
}

/* Coordinates of the part's query rows along the directions of the codes, and their deviations. */
struct code_queries {
    double along[SQZ_MAX_GROUP_QUERIES][CHECK_MAX_DIM], deviation[SQZ_MAX_GROUP_QUERIES];
};

static void code_queries_make(struct code_queries *q, const struct check_part *p)
{
    const struct sqz_codes *codes = &p->layer.codes;
    const size_t d = p->layer.shape.head_dim;
    float direction[CHECK_MAX_DIM];
    for (size_t r = 0; r < p->n_query_rows; r++) {
        double variance = 0.0;
        for (size_t i = 0; i < codes->n_directions; i++) {
            sqz_kernels_get()->f16_to_f32(direction, codes->directions + i * d, d);
            q->along[r][i] = (double)p->layer.shape.scale * check_dot(p->queries + r * d, direction, d);
            variance += q->along[r][i] * q->along[r][i] * (double)codes->spread[i];
        }
        q->deviation[r] = sqrt(variance);
    }
}

/* How far above the threshold, in logarithms, a cluster's score or the likeliest of its keys may lie: what clusters of
 * layers with codes are opened by. */
static double reach_above(const struct check_lookup *l, const struct code_queries *q, uint32_t level, uint32_t cluster,
                          size_t i)
{
    const struct check_part *p = l->part;
    const double root = sqrt((double)p->layer.level[level].variance[cluster]);
    double above = log(score_of(l, l->corrected + i, l->stride));
    for (size_t r = 0; r < p->n_query_rows; r++) {
        above = fmax(above, l->logit[r * l->stride + i] - l->total[r] +
                                (double)sqz_open_deviations(level) * q->deviation[r] * root);
    }
    return above - (double)p->plan.log_threshold;
}

/* The coarse clusters of a layer with codes. */
static void lookup_decide_reach(struct check_lookup *l, uint32_t level, const uint32_t *active, size_t n)
{
    struct code_queries *q = malloc(sizeof *q);
    if (!q) die("out of memory");
    code_queries_make(q, l->part);
    for (size_t i = 0; i < n; i++) {
        const double above = reach_above(l, q, level, active[i], i);
        if (l->pruned[level][active[i]] != (above < 0.0)) l->worst = fmax(l->worst, exp(fabs(above)));
    }
    free(q);
}

/* How far the library's decisions are from the scores. */
static void lookup_decide(struct check_lookup *l, uint32_t level, const uint32_t *active, size_t n)
{
    const struct check_part *p = l->part;
    if (p->layer.codes.n_words && p->by_rows) {
        lookup_decide_reach(l, level, active, n);
        return;
    }
    const double threshold = exp((double)p->plan.log_threshold - (level > 0 ? (double)SQZ_LEVEL_MARGIN : 0.0));
    double lowest_kept = INFINITY, highest_pruned = 0.0;
    for (size_t i = 0; i < n; i++) {
        const double score = score_of(l, l->corrected + i, l->stride);
        if (l->pruned[level][active[i]]) highest_pruned = score > highest_pruned ? score : highest_pruned;
        else lowest_kept = score < lowest_kept ? score : lowest_kept;
    }
    /* A block's finest level is brought to a number of rows: every score kept is above every score that is not. */
    const double least = level == 0 && !p->by_rows ? highest_pruned : threshold;
    const double most = level == 0 && !p->by_rows ? lowest_kept : threshold;
    l->worst = least / lowest_kept > l->worst ? least / lowest_kept : l->worst;
    l->worst = highest_pruned / most > l->worst ? highest_pruned / most : l->worst;
}

/* ---- From clusters to single keys ---- */

/* Adds what the code of a key (counted from the first clustered one) says to the logits of all query rows. */
static void add_code(double *logits, size_t stride, const struct code_queries *q, const struct check_part *p,
                     size_t key)
{
    const struct sqz_codes *codes = &p->layer.codes;
    float entry[CHECK_MAX_DIM];
    for (size_t part = 0; part < SQZ_CODE_PARTS * codes->n_words; part++) {
        const uint32_t word = codes->words[part / SQZ_CODE_PARTS * (p->layer.n_rows - p->layer.n_fixed) + key];
        const uint32_t first = codes->first[part], n = codes->first[part + 1] - first;
        const size_t code = word >> 4 * (part % SQZ_CODE_PARTS) & 15;
        sqz_kernels_get()->f16_to_f32(entry, codes->book + code * codes->n_directions + first, n);
        for (size_t r = 0; r < p->n_query_rows; r++)
            for (uint32_t i = 0; i < n; i++) logits[r * stride] += q->along[r][first + i] * entry[i];
    }
}

/* Whether a cluster is opened, as the library has it where that can be told: a cluster that stays closed stands in the
 * list of the pruned ones with the number of its keys, an opened one with 1, or not at all. */
static bool is_opened(struct check_lookup *l, const struct code_queries *q, uint32_t cluster, size_t i, double n_keys,
                      size_t entry)
{
    const struct check_part *p = l->part;
    const double above = reach_above(l, q, 0, cluster, i);
    const bool pruned = l->pruned[0][cluster], wanted = above >= 0.0;
    const bool got = !pruned || (n_keys > 1.0 ? (double)p->selection.pruned_keys[entry] != n_keys : wanted);
    if (got != wanted) l->worst = fmax(l->worst, exp(fabs(above)));
    return got;
}

/* The n active clusters of the finest level: opens, estimates, sets log Z anew, judges what is retained of the opened
 * ones, and fills the tail's entries of this level. Returns how many those are. */
static size_t lookup_keys(struct check_lookup *l, const uint32_t *active, const double *keys, size_t n)
{
    const struct check_part *p = l->part;
    const uint32_t *offset = p->layer.level[0].offset;
    const size_t n_keys = p->layer.n_rows - p->layer.n_fixed, rows = p->n_query_rows, n_pruned = p->selection.n_pruned;
    const double scale = p->layer.shape.scale, d = p->layer.shape.head_dim;
    const double threshold = exp((double)p->plan.log_threshold);
    struct code_queries *q = malloc(sizeof *q);
    double *estimate = malloc(rows * n_keys * sizeof *estimate);
    bool *opened = calloc(n + 1, sizeof *opened), *retained = calloc(n_keys, sizeof *retained);
    size_t *entry_of = calloc(p->layer.level[0].n_clusters, sizeof *entry_of), n_entries = 0;
    if (!q || !estimate || !opened || !retained || !entry_of) die("out of memory");
    code_queries_make(q, p);
    for (size_t i = 0; i < n_pruned; i++)
        if (p->selection.pruned_level[i] == 0) entry_of[p->selection.pruned_cluster[i]] = i;
    for (size_t i = 0; i < p->selection.n_ranges; i++)
        for (size_t row = p->selection.ranges[i].begin; row < p->selection.ranges[i].end; row++)
            retained[row - p->layer.n_fixed] = true;
    for (size_t i = 0; i < n; i++) {
        opened[i] = is_opened(l, q, active[i], i, keys[i], entry_of[active[i]]);
        for (size_t key = offset[active[i]]; opened[i] && key < offset[active[i] + 1]; key++) {
            for (size_t r = 0; r < rows; r++) estimate[r * n_keys + key] = l->logit[r * l->stride + i];
            add_code(estimate + key, n_keys, q, p, key);
        }
    }
    for (size_t r = 0; r < rows; r++) {
        const double reference = l->total[r];
        double mass = exp(l->known[r] - reference);
        for (size_t i = 0; i < n; i++) {
            mass += opened[i] ? 0.0 : keys[i] * exp(l->corrected[r * l->stride + i] - reference);
            for (size_t key = offset[active[i]]; opened[i] && key < offset[active[i] + 1]; key++)
                mass += exp(estimate[r * n_keys + key] - reference);
        }
        l->total[r] = reference + log(mass);
    }
    for (size_t i = 0; i < n; i++) {
        const uint32_t c = active[i];
        const size_t entry = entry_of[c];
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
                for (size_t key = offset[c]; key < offset[c + 1]; key++)
                    mass += retained[key] ? 0.0 : exp(estimate[r * n_keys + key] - l->total[r]);
                tail = l->total[r] + log(mass) + p->plan.tail_gain;
            }
            l->tail_logit[r * n_pruned + entry] = tail;
        }
        n_entries++;
    }
    free(q);
    free(estimate);
    free(opened);
    free(retained);
    free(entry_of);
    return n_entries;
}

bool check_lookup_run(struct check_lookup *l, struct check_result *result)
{
    const struct check_part *p = l->part;
    const struct sqz_layer *layer = &p->layer;
    const double scale = layer->shape.scale, d = layer->shape.head_dim;
    uint32_t *active = malloc(l->stride * sizeof *active), *next = malloc(l->stride * sizeof *next);
    double *keys = malloc(l->stride * sizeof *keys);
    size_t n = layer->level[layer->n_levels - 1].n_clusters, first_pruned = 0;
    if (!active || !next || !keys) die("out of memory");
    for (size_t i = 0; i < n; i++) active[i] = (uint32_t)i;
    for (uint32_t level = layer->n_levels; level-- > 0;) {
        size_t n_next = 0, n_pruned = 0;
        for (size_t i = 0; i < n; i++) keys[i] = sqz_cluster_keys(layer, 0, level, active[i], NULL);
        lookup_logits(l, level, active, n);
        lookup_total(l, keys, n);
        if (level == 0 && p->by_rows && layer->codes.n_words) {
            first_pruned += lookup_keys(l, active, keys, n);
            break;
        }
        lookup_decide(l, level, active, n);
        for (size_t i = 0; i < n; i++) {
            const uint32_t c = active[i];
            if (!l->pruned[level][c]) {
                const uint32_t *offset = layer->level[level].offset;
                for (uint32_t child = offset[c]; level > 0 && child < offset[c + 1]; child++) next[n_next++] = child;
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
            for (size_t i = 0; i < n; i++)
                if (l->pruned[level][active[i]]) mass += keys[i] * exp(l->corrected[r * l->stride + i] - l->known[r]);
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
    if (first_pruned != p->selection.n_pruned || !(l->worst <= 1.0 + CHECK_CLOSE)) {
        result->ok = false;
        snprintf(result->message, sizeof result->message,
                 "lookup of token %zu, KV head %zu: %zu clusters pruned where %zu are reachable; a score is on the "
                 "wrong side of its threshold by a factor of %.6f, allowed is %.3f",
                 p->first_token, p->head_kv, p->selection.n_pruned, first_pruned, l->worst, 1.0 + CHECK_CLOSE);
    }
    return result->ok;
}
