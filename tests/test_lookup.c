/*
 * Lookup against the formulas of lookup.h in double precision: what is opened
 * at every level, the retained ranges, the pruned clusters and their tail
 * logits, the estimated denominator, the plan of a budget, and the logits that
 * all of it starts from. The same for layers with codes, down to single keys,
 * against the formulas of lookup_keys.c.
 *
 * A cluster or key whose score is within 1e-4 of its limit may go either way:
 * there the reference follows the library's decision, everywhere else it insists.
 */
#include "layer_fixture.h"

#include "lookup_keys.h"
#include "stride.h"

#include <float.h>

#define BORDER 1e-4

enum { N_ROWS = 1100, N_QUERIES = 24, MAX_CLUSTERS = 128, MAX_QUERY_ROWS = 40, N_PLAIN = 6 };

static struct material material;
/* 1, 2 and 3 levels; 3 levels with the maximum over the group; the first two with an INT8 index. The first N_PLAIN
 * without codes, then all of them again with 1, 2, 1, 4, 3 and 1 words. */
static struct sqz_layer *layers[2 * N_PLAIN];

static int set_up(void **unused)
{
    (void)unused;
    const struct sqz_layer_shape shape = make_shape(4, 2, 48);
    material = make_material(shape, N_ROWS, 30, 11);
    float *queries = make_queries(&material, N_QUERIES, 3, 0.6);
    for (uint32_t at = 0; at < COUNT(layers); at++) {
        static const uint32_t words[N_PLAIN] = {1, 2, 1, 4, 3, 1};
        const uint32_t i = at % N_PLAIN;
        struct sqz_squeeze_options o;
        struct sqz_error error;
        sqz_squeeze_options_default(&o, SQZ_RULE_DEFAULT);
        o.n_levels = i < 3 ? i + 1 : i == 3 ? 3 : i - 3;
        o.index = i < 4 ? SQZ_INDEX_F16 : SQZ_INDEX_INT8;
        o.centroid_share[0] = 0.1f;
        o.centroid_share[1] = 0.03f;
        o.centroid_share[2] = 0.01f;
        o.n_sinks = 3;
        o.n_window = 24;
        o.n_iterations = 4;
        o.group = i == 3 ? SQZ_GROUP_MAX : SQZ_GROUP_MEAN;
        o.per_head = i == 1;
        o.code_words = at < N_PLAIN ? 0 : words[i];
        if (sqz_layer_create(&layers[at], &shape, material.keys, material.values, N_ROWS, queries, N_QUERIES, &o, 2,
                             &error))
            fail_msg("sqz_layer_create: %s", error.message);
        assert_int_equal(layers[at]->n_levels, o.n_levels);
        assert_int_equal(layers[at]->codes.n_words, o.code_words);
        assert_true(layers[at]->level[0].n_clusters <= MAX_CLUSTERS);
    }
    free(queries);
    return 0;
}

static int tear_down(void **unused)
{
    (void)unused;
    for (size_t i = 0; i < COUNT(layers); i++) sqz_layer_free(layers[i]);
    free_material(&material);
    return 0;
}

/* ---- One lookup ------------------------------------------------------------------- */

struct lookup_case {
    const struct sqz_layer *layer;
    uint32_t head_kv;
    struct sqz_head_plan plan;
    const float *queries;
    size_t n_query_rows, retain_rows;
    const float *base; /* NULL: none */
};

struct numbers { /* of a level's active clusters */
    double score[MAX_CLUSTERS], keys[MAX_CLUSTERS], tail[MAX_CLUSTERS][MAX_QUERY_ROWS];
    double logit[MAX_CLUSTERS][MAX_QUERY_ROWS];
};

static double log_add(double a, double b)
{
    const double high = fmax(a, b), low = fmin(a, b);
    return low == (double)-INFINITY ? high : high + log1p(exp(low - high));
}

/* Logit of a query with centroid `at` of a level. An INT8 index is taken at its word, and so is the query's rounding,
 * which a test of its own bounds. */
static double centroid_logit(const struct sqz_layer *layer, const struct sqz_level *level, size_t at, const float *q)
{
    const size_t d = layer->shape.head_dim;
    const double scale = (double)layer->shape.scale;
    const struct sqz_rows *rows = &level->centroids;
    if (rows->type == SQZ_ROW_F16) return exact_logit(q, sqz_rows_f16(rows) + at * d, d, scale, NULL);
    int16_t row[64];
    float factor, unused;
    double sum = 0, mean = 0;
    const float *key_mean = rows->mean + at / level->n_clusters * d;
    assert_true(sqz_i16_stride(d) <= COUNT(row));
    sqz_i16_queries_set(&(struct sqz_i16_queries){row, &factor, &unused}, q, 1, d, layer->shape.scale, key_mean);
    for (size_t i = 0; i < d; i++) mean += (double)q[i] * key_mean[i];
    for (size_t i = 0; i < d; i++) sum += (double)row[i] * sqz_rows_i8(rows)[at * d + i];
    return (double)factor * (double)rows->scale[at] * sum + scale * mean;
}

/* Scores of the clusters with active[c], tail logits of all, log_total updated from log_known. */
static void score_level(const struct lookup_case *c, uint32_t l, const bool *active, const double *log_known,
                        double *log_total, double corrected[MAX_CLUSTERS][MAX_QUERY_ROWS], struct numbers *out)
{
    const struct sqz_layer *layer = c->layer;
    const struct sqz_level *level = &layer->level[l];
    const size_t d = layer->shape.head_dim, n = level->n_clusters;
    const double scale = (double)layer->shape.scale;
    for (size_t i = 0; i < n; i++) {
        out->score[i] = 0;
        out->keys[i] = sqz_cluster_keys(layer, c->head_kv, l, (uint32_t)i, NULL);
    }
    for (size_t r = 0; r < c->n_query_rows; r++) {
        const float *q = c->queries + r * d;
        double norm = 0;
        for (size_t i = 0; i < d; i++) norm += (double)q[i] * q[i];
        log_total[r] = log_known[r];
        for (size_t i = 0; i < n; i++) {
            const double v = scale * scale * norm * level->variance[c->head_kv * n + i] / (2 * (double)d);
            const double x = centroid_logit(layer, level, c->head_kv * n + i, q);
            out->logit[i][r] = x;
            corrected[i][r] = x + (double)c->plan.variance_gain * v;
            out->tail[i][r] = x + v + (double)c->plan.tail_gain;
            if (active[i]) log_total[r] = log_add(log_total[r], corrected[i][r] + log(out->keys[i]));
        }
        for (size_t i = 0; i < n; i++) {
            const double s = exp(corrected[i][r] - log_total[r]);
            if (layer->group == SQZ_GROUP_MAX) out->score[i] = fmax(out->score[i], s);
            else out->score[i] += s / (double)c->n_query_rows;
        }
    }
}

static void describe_lookup(const struct lookup_case *c)
{
    describe("levels %u, code words %u, group %d, head %u, query rows %zu, threshold e^%g, gains %g %g, retain %zu, "
             "base %d",
             c->layer->n_levels, c->layer->codes.n_words, (int)c->layer->group, c->head_kv, c->n_query_rows,
             (double)c->plan.log_threshold, (double)c->plan.variance_gain, (double)c->plan.tail_gain, c->retain_rows,
             c->base != NULL);
}

/* ---- From clusters to single keys --------------------------------------------------------- */

/* Coordinates of the query rows along a head's directions, and how far a logit of each lies from its centroid's. */
struct code_queries {
    double along[SQZ_MAX_GROUP_QUERIES][MAX_HEAD_DIM], deviation[SQZ_MAX_GROUP_QUERIES];
};

static void read_directions(const struct lookup_case *c, struct code_queries *out)
{
    const struct sqz_codes *codes = &c->layer->codes;
    const size_t d = c->layer->shape.head_dim, m = codes->n_directions;
    for (size_t r = 0; r < c->n_query_rows; r++) {
        double variance = 0;
        for (size_t i = 0; i < m; i++) {
            const double x = exact_logit(c->queries + r * d, codes->directions + (c->head_kv * m + i) * d, d, 1, NULL);
            out->along[r][i] = x;
            variance += x * x * (double)codes->spread[c->head_kv * m + i];
        }
        out->deviation[r] = (double)c->layer->shape.scale * sqrt(variance);
    }
}

/* What a key's code adds to its centroid's logit. */
static double code_logit(const struct lookup_case *c, const struct code_queries *q, size_t r, size_t key)
{
    const struct sqz_codes *codes = &c->layer->codes;
    const size_t m = codes->n_directions, parts = SQZ_CODE_PARTS * codes->n_words;
    const size_t n = c->layer->n_rows - c->layer->n_fixed;
    const uint32_t *first = codes->first + c->head_kv * (parts + 1);
    double sum = 0;
    for (size_t p = 0; p < parts; p++) {
        const uint32_t word = codes->words[(c->head_kv * codes->n_words + p / 8) * n + key];
        const uint16_t *entry = codes->book + (c->head_kv * SQZ_CODE_ENTRIES + (word >> 4 * (p % 8) & 15)) * m;
        for (uint32_t i = first[p]; i < first[p + 1]; i++) sum += q->along[r][i] * half_value(entry[i]);
    }
    return (double)c->layer->shape.scale * sum;
}

/* How far above log Z the likeliest key of a cluster may lie: what clusters of layers with codes are opened by. */
static double reach_of(const struct lookup_case *c, const struct code_queries *q, uint32_t level, size_t cluster,
                       const struct numbers *numbers, const double *log_total)
{
    const struct sqz_level *l = &c->layer->level[level];
    const double root = sqrt((double)l->variance[c->head_kv * l->n_clusters + cluster]);
    double reach = (double)-INFINITY;
    for (size_t r = 0; r < c->n_query_rows; r++)
        reach = fmax(reach, numbers->logit[cluster][r] - log_total[r] +
                                (double)sqz_open_deviations(level) * q->deviation[r] * root);
    return reach;
}

/* Level 0 with codes. pruned_at[c]: place in the pruned list, SIZE_MAX for none; log_total: of the clusters, becomes
 * that of the keys; opened becomes which clusters' keys were looked at. Returns the number of retained rows. */
static size_t check_keys(const struct lookup_case *c, const struct sqz_selection *s, const bool *active,
                         const size_t *pruned_at, const double *log_known, double *log_total,
                         double corrected[MAX_CLUSTERS][MAX_QUERY_ROWS], const struct numbers *numbers, bool *opened)
{
    const struct sqz_layer *layer = c->layer;
    const size_t n = layer->level[0].n_clusters;
    const uint32_t *offset = layer->level[0].offset + c->head_kv * (n + 1);
    const double limit = exp((double)c->plan.log_threshold), border = (double)c->plan.log_threshold;
    static double estimate[N_ROWS][SQZ_MAX_GROUP_QUERIES];
    static bool retained[N_ROWS];
    struct code_queries q;
    size_t n_read = 0, n_retained = 0, n_runs = 0;
    read_directions(c, &q);
    memset(retained, 0, sizeof retained);
    for (size_t i = 0; i < s->n_ranges; i++)
        for (size_t row = s->ranges[i].begin; row < s->ranges[i].end; row++) retained[row - layer->n_fixed] = true;

    for (size_t i = 0; i < n; i++) {
        opened[i] = false;
        if (!active[i]) continue;
        const double reach = reach_of(c, &q, 0, i, numbers, log_total);
        double nearest;
        opened[i] = reach >= border || numbers->score[i] >= limit;
        nearest = fmin(fabs(reach - border), fabs(numbers->score[i] / limit - 1));
        /* At the border as the library has it: a closed cluster stands in the list with the number of its keys. */
        if (nearest <= BORDER && (pruned_at[i] == SIZE_MAX || numbers->keys[i] > 1))
            opened[i] = pruned_at[i] == SIZE_MAX || (double)s->pruned_keys[pruned_at[i]] != numbers->keys[i];
        if (!opened[i]) check_true("a closed cluster is pruned", i, 0, 1, pruned_at[i] != SIZE_MAX);
        n_read += opened[i] ? offset[i + 1] - offset[i] : 0;
    }
    check_close("codes read", 0, (double)s->n_codes_read, (double)n_read, 0);
    check_close("bytes of codes", 0, (double)s->code_bytes_read,
                (double)(n_read * 4 * layer->codes.n_words + sqz_code_head_bytes(layer)), 0);

    for (size_t r = 0; r < c->n_query_rows; r++) {
        log_total[r] = log_known[r];
        for (size_t i = 0; i < n; i++) {
            if (active[i] && !opened[i]) log_total[r] = log_add(log_total[r], corrected[i][r] + log(numbers->keys[i]));
            for (size_t key = offset[i]; opened[i] && key < offset[i + 1]; key++) {
                estimate[key][r] = numbers->logit[i][r] + code_logit(c, &q, r, key);
                log_total[r] = log_add(log_total[r], estimate[key][r]);
            }
        }
        /* A logit is 50 products and a number for each of up to 32 parts. */
        check_close("log total of keys", r, s->log_total[r], log_total[r], 3e-5 + 2e-6 * fabs(log_total[r]));
    }

    for (size_t i = 0; i < n; i++) {
        size_t left = 0;
        double mass[SQZ_MAX_GROUP_QUERIES] = {0};
        for (size_t key = offset[i]; key < offset[i + 1]; key++) {
            if (!opened[i]) {
                check_true("a key of a closed cluster", key, 1, 0, !retained[key]);
                continue;
            }
            double score = 0;
            for (size_t r = 0; r < c->n_query_rows; r++) {
                const double weight = exp(estimate[key][r] - log_total[r]);
                score = layer->group == SQZ_GROUP_MAX ? fmax(score, weight) : score + weight / (double)c->n_query_rows;
                mass[r] += retained[key] ? 0 : weight;
            }
            if (fabs(score / limit - 1) > BORDER)
                check_true("key retained or pruned", key, retained[key], score / limit,
                           retained[key] == (score >= limit));
            n_retained += retained[key];
            left += !retained[key];
            n_runs += retained[key] && (key == 0 || !retained[key - 1]);
        }
        if (!opened[i]) continue;
        check_true("pruned keys of an opened cluster", i, (double)left, 0, (pruned_at[i] == SIZE_MAX) == (left == 0));
        for (size_t r = 0; r < c->n_query_rows && left; r++) {
            const size_t at = r * s->pruned_stride + pruned_at[i];
            const double wanted = fmin(log(mass[r]) + (double)c->plan.tail_gain, 0) + log_total[r];
            check_close("keys that an entry stands for", at, s->pruned_keys[at], 1, 0);
            /* Weights are floats from 1e-38 on. */
            if (mass[r] > 1e-30)
                check_close("logit of pruned keys", at, s->pruned_logit[at], wanted, 1e-4 + 2e-6 * fabs(wanted));
            else
                check_true("logit of no mass", at, s->pruned_logit[at], wanted,
                           s->pruned_logit[at] < log_total[r] - 65);
        }
    }
    check_close("ranges are as long as can be", 0, (double)s->n_ranges, (double)n_runs, 0);
    return n_retained;
}

/* Returns the number of retained rows. */
static size_t check_lookup(const struct lookup_case *c)
{
    const struct sqz_layer *layer = c->layer;
    const size_t d = layer->shape.head_dim;
    static bool active[MAX_CLUSTERS], pruned[SQZ_MAX_LEVELS][MAX_CLUSTERS];
    static double corrected[MAX_CLUSTERS][MAX_QUERY_ROWS];
    static struct numbers numbers;
    float norms[MAX_QUERY_ROWS];
    double log_known[MAX_QUERY_ROWS], log_total[MAX_QUERY_ROWS];
    struct sqz_selection s;
    describe_lookup(c);
    for (size_t r = 0; r < c->n_query_rows; r++) {
        double norm = 0;
        for (size_t i = 0; i < d; i++) norm += (double)c->queries[r * d + i] * c->queries[r * d + i];
        norms[r] = (float)norm;
        log_known[r] = c->base ? (double)c->base[r] : (double)-INFINITY;
    }
    const bool keys = layer->codes.n_words && !c->retain_rows && c->n_query_rows <= SQZ_MAX_GROUP_QUERIES;
    struct guarded workspace = workspace_take(sqz_lookup_workspace_bytes(layer, c->n_query_rows));
    sqz_lookup(&s, layer, c->head_kv, &c->plan, c->queries, norms, c->n_query_rows, c->base, c->retain_rows,
               workspace.data);

    static struct code_queries code_queries;
    if (keys) read_directions(c, &code_queries);
    size_t pruned_at[MAX_CLUSTERS];
    memset(pruned, 0, sizeof pruned);
    memset(pruned_at, 0xff, sizeof pruned_at);
    size_t n_falls = 0;
    for (size_t p = 0; p < s.n_pruned; p++) {
        const struct {
            uint32_t level, cluster;
        } x = {s.pruned_level[p], s.pruned_cluster[p]};
        check_true("pruned level", p, x.level, layer->n_levels, x.level < layer->n_levels);
        check_true("pruned cluster", p, x.cluster, 0, x.cluster < layer->level[x.level].n_clusters);
        check_true("pruned twice", p, x.cluster, 0, !pruned[x.level][x.cluster]);
        const bool falls = p && s.pruned_level[p - 1] == x.level && s.pruned_cluster[p - 1] > x.cluster;
        n_falls += falls; /* where the opened clusters of level 0 begin */
        check_true("pruned list runs by level, coarsest first", p, x.level, 0,
                   p == 0 || s.pruned_level[p - 1] >= x.level);
        check_true("clusters ascending, the closed ones first", p, x.cluster, n_falls,
                   !falls || (keys && x.level == 0 && n_falls == 1 && s.pruned_keys[p] == 1));
        pruned[x.level][x.cluster] = true;
        if (x.level == 0) pruned_at[x.cluster] = p;
    }

    size_t n_read = 0, n_pruned = 0, n_retained = 0;
    static bool opened[MAX_CLUSTERS];
    memset(active, 1, sizeof active);
    for (uint32_t l = layer->n_levels; l-- > 0;) {
        const size_t n = layer->level[l].n_clusters;
        const uint32_t *offset = layer->level[l].offset + c->head_kv * (n + 1);
        score_level(c, l, active, log_known, log_total, corrected, &numbers);
        if (l == 0 && keys) {
            for (size_t i = 0; i < n; i++) {
                n_read += active[i];
                n_pruned += pruned[0][i];
                if (!active[i]) check_true("pruned under a pruned cluster", i, l, 0, !pruned[0][i]);
            }
            n_retained = check_keys(c, &s, active, pruned_at, log_known, log_total, corrected, &numbers, opened);
            for (size_t i = 0; i < n; i++)
                for (size_t r = 0; r < c->n_query_rows && pruned[0][i] && !opened[i]; r++)
                    check_close("pruned keys", i, s.pruned_keys[r * s.pruned_stride + pruned_at[i]], numbers.keys[i],
                                0);
            break;
        }
        double limit = exp((double)c->plan.log_threshold - (l && !keys ? (double)SQZ_LEVEL_MARGIN : 0));
        double lowest = (double)INFINITY, highest = 0, next_keys = 0; /* of retained; of pruned */
        static bool below[MAX_CLUSTERS];
        memset(below, 0, sizeof below);
        memset(opened, 0, sizeof opened);
        for (size_t i = 0; i < n; i++) {
            if (!active[i]) {
                check_true("pruned under a pruned cluster", i, l, 0, !pruned[l][i]);
                continue;
            }
            n_read++;
            opened[i] = !pruned[l][i];
            if (opened[i]) lowest = fmin(lowest, numbers.score[i]);
            else if (numbers.score[i] > highest) {
                highest = numbers.score[i];
                next_keys = numbers.keys[i];
            }
            if (l > 0 || !c->retain_rows) {
                const double reach =
                    keys ? reach_of(c, &code_queries, l, i, &numbers, log_total) - (double)c->plan.log_threshold : -1;
                const bool open = numbers.score[i] >= limit || reach >= 0;
                if (fabs(numbers.score[i] / limit - 1) > BORDER && fabs(reach) > BORDER)
                    check_true("opened or pruned", l * 1000 + i, opened[i], open, opened[i] == open);
            }
            for (uint32_t child = offset[i]; opened[i] && child < offset[i + 1]; child++) below[l ? child : 0] = true;
            if (l == 0 && opened[i]) n_retained += offset[i + 1] - offset[i];
            if (opened[i]) continue;
            n_pruned++;
            for (size_t p = 0; p < s.n_pruned; p++) {
                if (s.pruned_level[p] != l || s.pruned_cluster[p] != i) continue;
                for (size_t r = 0; r < c->n_query_rows; r++)
                    check_close("pruned keys", p, s.pruned_keys[r * s.pruned_stride + p], numbers.keys[i], 0);
            }
        }
        if (l == 0 && c->retain_rows) {
            check_true("as many rows as asked at most", 0, (double)n_retained, (double)c->retain_rows,
                       n_retained <= c->retain_rows);
            check_true("the highest scores are retained", 0, lowest, highest, lowest >= highest * (1 - BORDER));
            /* Only a score that no threshold of its range reaches, or one that would be too many, is left out. */
            check_true("no room for the next cluster", 0, (double)n_retained + next_keys, (double)c->retain_rows,
                       highest < 1e-34 || (double)n_retained + next_keys > (double)c->retain_rows);
        }
        for (size_t r = 0; r < c->n_query_rows; r++)
            for (size_t i = 0; l > 0 && i < n; i++)
                if (active[i] && !opened[i])
                    log_known[r] = log_add(log_known[r], corrected[i][r] + log(numbers.keys[i]));
        /* 50 products of at most 20 in sum, then a sum over at most 128 clusters. */
        if (l == 0)
            for (size_t r = 0; r < c->n_query_rows; r++)
                check_close("log total", r, s.log_total[r], log_total[r], 2e-5 + 1e-6 * fabs(log_total[r]));
        if (l > 0) memcpy(active, below, sizeof active);
    }
    if (!keys) {
        check_close("codes read", 0, (double)s.n_codes_read, 0, 0);
        check_close("bytes of codes", 0, (double)s.code_bytes_read, 0, 0);
        memset(opened, 0, sizeof opened);
    }
    check_close("centroids read", 0, (double)s.n_centroids_read, (double)n_read, 0);
    check_close("pruned clusters", 0, (double)s.n_pruned, (double)n_pruned, 0);
    check_close("retained rows", 0, (double)s.n_retained, (double)n_retained, 0);

    /* Tail logits need the final denominator. */
    memset(active, 0, sizeof active);
    for (size_t p = 0; p < s.n_pruned; p++) {
        const struct sqz_level *level = &layer->level[s.pruned_level[p]];
        const size_t at = c->head_kv * level->n_clusters + s.pruned_cluster[p];
        if (s.pruned_level[p] == 0 && opened[s.pruned_cluster[p]]) continue; /* checked by its keys */
        for (size_t r = 0; r < c->n_query_rows; r++) {
            const double scale = (double)layer->shape.scale;
            const double y = centroid_logit(layer, level, at, c->queries + r * d) +
                             scale * scale * norms[r] * level->variance[at] / (2 * (double)d) +
                             (double)c->plan.tail_gain;
            check_close("tail logit", r * 1000 + p, s.pruned_logit[r * s.pruned_stride + p], fmin(y, log_total[r]),
                        3e-5 + 1e-6 * fabs(y));
        }
    }

    /* Ranges and pruned clusters cover the clustered rows exactly once. */
    static unsigned char covered[N_ROWS];
    memset(covered, 0, sizeof covered);
    for (size_t i = 0; i < s.n_ranges; i++) {
        check_true("range order", i, s.ranges[i].begin, s.ranges[i].end,
                   s.ranges[i].begin < s.ranges[i].end && s.ranges[i].end <= layer->n_rows &&
                       s.ranges[i].begin >= layer->n_fixed && (i == 0 || s.ranges[i - 1].end < s.ranges[i].begin));
        for (size_t row = s.ranges[i].begin; row < s.ranges[i].end; row++) covered[row]++;
    }
    for (size_t p = 0; p < s.n_pruned; p++) {
        uint32_t first, n = sqz_cluster_keys(layer, c->head_kv, s.pruned_level[p], s.pruned_cluster[p], &first);
        const bool partly = s.pruned_level[p] == 0 && opened[s.pruned_cluster[p]];
        for (size_t row = first; row < first + n; row++)
            covered[row] += !(partly && covered[row]); /* the rest of an opened cluster */
    }
    for (size_t row = layer->n_fixed; row < layer->n_rows; row++)
        check_close("rows covered once", row, covered[row], 1, 0);
    guarded_free(workspace);
    return n_retained;
}

static void lookup_threshold(void **unused)
{
    (void)unused;
    static const size_t query_rows[] = {1, 2, 16, 17, 40};
    static const double thresholds[] = {-40, -12, -9, -7.5, -6.5, -5.5, -4, 0, 20};
    static const float gains[][2] = {{0, 0}, {0.5f, -0.3f}, {1.5f, 0.4f}};
    size_t seed = 1, some = 0;
    for (size_t l = 0; l < COUNT(layers); l++)
        for (size_t r = 0; r < COUNT(query_rows); r++)
            for (size_t t = 0; t < COUNT(thresholds); t++, seed++) {
                if (passed_over(seed)) continue;
                /* 4 heads a token, of which a KV head's queries are pairs. */
                float *all = make_queries(&material, query_rows[r], 100 + seed, 0.2 + 0.2 * (double)(seed % 4));
                float *queries = take(query_rows[r] * 48, sizeof *queries), base[MAX_QUERY_ROWS];
                const uint32_t head = seed % 2;
                for (size_t i = 0; i < query_rows[r]; i++) {
                    memcpy(queries + i * 48, all + (i * 4 + 2 * head + i % 2) * 48, 48 * sizeof *queries);
                    base[i] = seed % 5 == 0 ? -INFINITY : (float)(3 + 0.5 * (double)(i % 7));
                }
                struct lookup_case c = {layers[l],
                                        head,
                                        {(float)thresholds[t], gains[seed % 3][1], gains[seed % 3][0]},
                                        queries,
                                        query_rows[r],
                                        0,
                                        seed % 3 == 1 ? NULL : base};
                const size_t n = check_lookup(&c), clustered = layers[l]->n_rows - layers[l]->n_fixed;
                some += n > 0 && n < clustered;
                if (thresholds[t] == 20) check_close("nothing is above e^20", 0, (double)n, 0, 0);
                free(all);
                free(queries);
            }
    assert_true(some > 40); /* the thresholds above do cut */
}

/* Queries of which rows, head, base and gains vary, on layers with codes: what is retained of opened clusters. */
static void lookup_partly_opened(void **unused)
{
    (void)unused;
    static const double thresholds[] = {-8, -7, -6, -5, -4, -3};
    size_t partly = 0;
    for (size_t l = N_PLAIN; l < COUNT(layers); l++)
        for (size_t t = 0; t < COUNT(thresholds); t++) {
            const size_t rows = 1 + (l * 7 + t * 5) % 16;
            float *queries = random_floats(rows * 48, l * 100 + t, 1.5), base[MAX_QUERY_ROWS], norms[MAX_QUERY_ROWS];
            for (size_t r = 0; r < rows; r++) {
                base[r] = (float)(2 + r % 3);
                norms[r] = 0;
                for (size_t i = 0; i < 48; i++) norms[r] += queries[r * 48 + i] * queries[r * 48 + i];
            }
            const struct lookup_case c = {
                layers[l], t % 2, {(float)thresholds[t], 0.2f, t % 3 ? 0.5f : 0}, queries, rows, 0, base};
            check_lookup(&c);
            struct sqz_selection s;
            struct guarded workspace = workspace_take(sqz_lookup_workspace_bytes(layers[l], rows));
            sqz_lookup(&s, layers[l], c.head_kv, &c.plan, queries, norms, rows, base, 0, workspace.data);
            partly += s.n_codes_read > s.n_retained && s.n_retained > 0 &&
                      s.n_codes_read < layers[l]->n_rows - layers[l]->n_fixed;
            guarded_free(workspace);
            free(queries);
        }
    assert_true(partly > 10); /* the thresholds above do part clusters */
}

static void lookup_retain_rows(void **unused)
{
    (void)unused;
    static const size_t wanted[] = {1, 7, 50, 200, 600, N_ROWS, 100000};
    size_t seed = 1;
    for (size_t l = 0; l < COUNT(layers); l++)
        for (size_t w = 0; w < COUNT(wanted); w++, seed++) {
            const size_t rows = seed % 2 ? 12 : 33;
            float *queries = random_floats(rows * 48, seed, 0.8), base[MAX_QUERY_ROWS];
            for (size_t i = 0; i < rows; i++) base[i] = 4;
            /* Upper levels keep to the plan's threshold; a low one opens everything. */
            struct lookup_case c = {layers[l],
                                    seed % 2,
                                    {seed % 3 ? -40.0f : -7.0f, 0.1f, 0.5f},
                                    queries,
                                    rows,
                                    wanted[w],
                                    seed % 4 ? base : NULL};
            const size_t n = check_lookup(&c), clustered = layers[l]->n_rows - layers[l]->n_fixed;
            if (wanted[w] >= clustered && c.plan.log_threshold < -30)
                check_close("room for all", 0, (double)n, (double)clustered, 0);
            free(queries);
        }
}

/* Queries of zeros: every score is 1 / rows. */
static void lookup_zero_queries(void **unused)
{
    (void)unused;
    float queries[2 * 48] = {0};
    for (size_t l = 0; l < COUNT(layers); l++) {
        const double even = -log((double)(layers[l]->n_rows - layers[l]->n_fixed));
        struct lookup_case c = {layers[l], 0, {(float)(even - 0.01), 0, 1}, queries, 2, 0, NULL};
        check_close("all above", 0, (double)check_lookup(&c), layers[l]->n_rows - layers[l]->n_fixed, 0);
        c.plan.log_threshold = (float)(even + 0.01 + (double)SQZ_LEVEL_MARGIN);
        check_close("none above", 0, (double)check_lookup(&c), 0, 0);
    }
}

/* Every tail logit stays below the denominator, however long the queries are. */
static void lookup_huge_queries(void **unused)
{
    (void)unused;
    static const double magnitudes[] = {5, 50, 1000};
    for (size_t l = 0; l < COUNT(layers); l++)
        for (size_t m = 0; m < COUNT(magnitudes); m++) {
            float *queries = random_floats(4 * 48, 5, magnitudes[m]), norms[4];
            for (size_t r = 0; r < 4; r++) {
                norms[r] = 0;
                for (size_t i = 0; i < 48; i++) norms[r] += queries[r * 48 + i] * queries[r * 48 + i];
            }
            const struct sqz_head_plan plan = {-7, 0.5f, m == 1 ? 1.0f : 0.0f};
            struct sqz_selection s;
            struct guarded workspace = workspace_take(sqz_lookup_workspace_bytes(layers[l], 4));
            describe("levels %u, code words %u, query magnitude %g", layers[l]->n_levels, layers[l]->codes.n_words,
                     magnitudes[m]);
            sqz_lookup(&s, layers[l], 1, &plan, queries, norms, 4, NULL, 0, workspace.data);
            for (size_t r = 0; r < 4; r++) {
                check_true("log total is finite", r, s.log_total[r], 0, isfinite(s.log_total[r]));
                for (size_t p = 0; p < s.n_pruned; p++)
                    check_true("tail logit", p, s.pruned_logit[r * s.pruned_stride + p], s.log_total[r],
                               s.pruned_logit[r * s.pruned_stride + p] <= s.log_total[r]);
            }
            guarded_free(workspace);
            free(queries);
        }
}

/* ---- Plans and logits ------------------------------------------------------------------- */

/* Position on a decreasing curve where it passes a value, and a curve's value there, in double. */
static double position_at(const float *curve, size_t n, double value)
{
    if (value >= (double)curve[0]) return 0;
    for (size_t i = 0; i + 1 < n; i++)
        if ((double)curve[i] >= value && (double)curve[i + 1] < value)
            return (double)i + ((double)curve[i] - value) / ((double)curve[i] - (double)curve[i + 1]);
    return (double)(n - 1);
}

static double value_at(const float *curve, size_t n, double position)
{
    const double p = fmin(fmax(position, 0), (double)(n - 1));
    const size_t i = (size_t)p;
    return i + 1 < n ? curve[i] + (p - (double)i) * ((double)curve[i + 1] - curve[i]) : curve[i];
}

static void plans(void **unused)
{
    (void)unused;
    static const float budgets[] = {0.0001f, 0.05f, 0.1f, 0.17f, 0.4f, 0.8f, 0.99f},
                       offsets[] = {0, 0.3f, -0.6f, -100, 100};
    for (size_t l = 0; l < COUNT(layers); l++)
        for (uint32_t h = 0; h < 2; h++) {
            const struct sqz_layer *layer = layers[l];
            const size_t n = layer->n_curve;
            const float *share = layer->global_share ? layer->global_share : layer->share + h * n;
            assert_int_equal(layer->global_share == NULL, l % N_PLAIN == 1);
            for (size_t b = 0; b < COUNT(budgets); b++)
                for (size_t o = 0; o < COUNT(offsets); o++) {
                    describe("layer %zu, head %u, budget %g, offset %g", l, h, (double)budgets[b], (double)offsets[o]);
                    const struct sqz_head_plan plan = sqz_head_plan_at(layer, h, budgets[b], offsets[o]);
                    const double step = (double)layer->log_threshold[1] - (double)layer->log_threshold[0];
                    const double at = position_at(share, n, (double)budgets[b]) + (double)offsets[o] / step;
                    /* The curve may be steep: an F32 budget moves the position by a rounding over the slope. */
                    check_close("threshold", 0, plan.log_threshold, value_at(layer->log_threshold, n, at), 2e-3);
                    const double low = value_at(layer->tail_gain + h * n, n, at - 0.01);
                    const double middle = value_at(layer->tail_gain + h * n, n, at);
                    const double high = value_at(layer->tail_gain + h * n, n, at + 0.01);
                    check_close("tail gain", 0, plan.tail_gain, middle,
                                1e-5 + fabs(high - middle) + fabs(low - middle));
                    check_close("variance gain", 0, plan.variance_gain, layer->variance_gain[h], 0);
                }
            const struct sqz_head_plan dense = sqz_head_plan_at(layer, h, 1, 3);
            check_close("budget 1", 0, dense.log_threshold, (double)-INFINITY, 0);
        }
}

/* Queries that are no numbers, or too small for a factor: integers within range, and what is wrong shows in the logit. */
static void quantised_strange_queries(void **unused)
{
    (void)unused;
    static const float strange[] = {NAN, INFINITY, -INFINITY, 1e-38f, -1e-45f, FLT_MAX};
    enum { DIM = 32 };
    for (size_t s = 0; s < COUNT(strange); s++) {
        float q[DIM] = {0}, mean[DIM] = {0}, factor, mean_logit;
        int16_t rows[DIM + 64];
        assert_true(sqz_i16_stride(DIM) <= COUNT(rows));
        describe("a query of %g", (double)strange[s]);
        q[3] = strange[s];
        q[7] = isfinite(strange[s]) ? 0 : 1;
        mean[3] = 1;
        sqz_i16_queries_set(&(struct sqz_i16_queries){rows, &factor, &mean_logit}, q, 1, DIM, 1.0f, mean);
        for (size_t i = 0; i < sqz_i16_stride(DIM); i++) {
            const bool may_be_large = i == 3 && isfinite(strange[s]);
            check_true("range", i, rows[i], may_be_large ? 32767 : 1,
                       abs(rows[i]) <= (may_be_large || i == 7 ? 32767 : 0));
        }
        check_true("logit of the mean", 0, mean_logit, strange[s],
                   isfinite(strange[s]) ? mean_logit == strange[s] : !isfinite(mean_logit));
    }
}

/* Queries of an INT8 index: half a step of the largest number's 32767th, zeros behind, any length. */
static void quantised_queries(void **unused)
{
    (void)unused;
    static const size_t dims[] = {32, 48, 80, 256};
    static const double magnitudes[] = {0, 1e-20, 1, 1e20};
    for (size_t d = 0; d < COUNT(dims); d++)
        for (size_t m = 0; m < COUNT(magnitudes); m++) {
            const size_t dim = dims[d], stride = sqz_i16_stride(dim);
            float *q = random_floats(2 * dim, 7 + d, magnitudes[m]), *mean = random_floats(dim, 9, 1), factor[2];
            float mean_logit[2];
            int16_t *rows = take(2 * stride, sizeof *rows);
            describe("dim %zu, magnitude %g", dim, magnitudes[m]);
            memset(rows, 0xff, 2 * stride * sizeof *rows);
            sqz_i16_queries_set(&(struct sqz_i16_queries){rows, factor, mean_logit}, q, 2, dim, 0.5f, mean);
            for (size_t r = 0; r < 2; r++) {
                double largest = 0, sum = 0, size = 0;
                for (size_t i = 0; i < dim; i++) {
                    sum += (double)q[r * dim + i] * mean[i];
                    size += fabs((double)q[r * dim + i] * mean[i]);
                }
                check_close("logit of the mean", r, mean_logit[r], 0.5 * sum, (double)(dim + 2) * UNIT * size);
                for (size_t i = 0; i < dim; i++) largest = fmax(largest, fabs((double)q[r * dim + i]));
                for (size_t i = 0; i < stride; i++) {
                    const double wanted = i < dim ? 0.5 * (double)q[r * dim + i] : 0;
                    check_close("quantised", r * dim + i, (double)factor[r] * rows[r * stride + i], wanted,
                                0.5 * largest * (0.5 / 32767 + 4 * UNIT));
                    check_true("range", r * dim + i, rows[r * stride + i], 32767, rows[r * stride + i] >= -32767);
                }
            }
            free(q);
            free(mean);
            free(rows);
        }
}

static void logits(void **unused)
{
    (void)unused;
    static const size_t query_rows[] = {1, 3, 16, 17, 40}, rows[] = {0, 1, 15, 16, 17, 127, 128, 129, 300};
    static const size_t dims[] = {32, 80, 256};
    for (size_t d = 0; d < COUNT(dims); d++)
        for (size_t q = 0; q < COUNT(query_rows); q++)
            for (size_t n = 0; n < COUNT(rows); n++) {
                if (passed_over((100 * d + q) * 100 + n)) continue;
                const size_t dim = dims[d], stride = rows[n] + 5;
                describe("dim %zu, query rows %zu, rows %zu", dim, query_rows[q], rows[n]);
                float *queries = random_floats(query_rows[q] * dim, 1 + q, 1),
                      *out = take(stride * query_rows[q], sizeof *out);
                uint16_t *keys = random_halves(rows[n] * dim, 2 + n, 1);
                struct guarded scratch = guarded_take(sqz_logits_scratch_floats(dim) * sizeof(float));
                memset(scratch.data, 0xff, sqz_logits_scratch_floats(dim) * sizeof(float));
                for (size_t i = 0; i < stride * query_rows[q]; i++) out[i] = SENTINEL;
                const struct sqz_row_queries all = {.f32 = queries, .n = query_rows[q], .scale = 0.3f};
                const struct sqz_rows key_rows = sqz_f16_rows(keys);
                sqz_rows_logits(out, stride, &all, &key_rows, 0, rows[n], dim, scratch.data);
                for (size_t i = 0; i < query_rows[q]; i++)
                    for (size_t r = 0; r < stride; r++) {
                        double magnitude = 0, x = (double)SENTINEL;
                        if (r < rows[n])
                            x = exact_logit(queries + i * dim, keys + r * dim, dim, (double)0.3f, &magnitude);
                        check_close("logit", i * stride + r, out[i * stride + r], x,
                                    (double)(dim + 2) * UNIT * magnitude);
                    }
                guarded_free(scratch);
                free(queries);
                free(keys);
                free(out);
            }
}

/* What does not fit is a size that no allocation satisfies, never a small one. */
static void workspace_sizes(void **state)
{
    struct sqz_layer layer = {.shape = make_shape(1, 1, 256), .n_rows = 8000, .n_levels = 1};
    (void)state;
    layer.level[0].n_clusters = 400;
    const size_t plain = sqz_lookup_workspace_bytes(&layer, 64);
    assert_true(plain < 1 << 20);
    assert_true(sqz_lookup_workspace_bytes(&layer, SIZE_MAX / 4) == SIZE_MAX);
    assert_true(sqz_lookup_workspace_bytes(&layer, SIZE_MAX / 4 / 400) == SIZE_MAX);
    /* Codes add estimates for the rows of a group, never for those of a block. */
    layer.codes.n_words = 4;
    const size_t coded = sqz_lookup_workspace_bytes(&layer, 64);
    assert_true(coded > plain + 17 * 8000 * sizeof(float) && coded < plain + 18 * 8000 * sizeof(float) + (1 << 17));
    layer.n_rows = INT32_MAX;
    layer.level[0].n_clusters = INT32_MAX / 2;
    assert_true(sqz_lookup_workspace_bytes(&layer, SIZE_MAX / INT32_MAX) == SIZE_MAX);
    assert_true(sqz_lookup_workspace_bytes(&layer, 16) > (size_t)INT32_MAX * 17 * sizeof(float));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lookup_threshold),
        cmocka_unit_test(lookup_partly_opened),
        cmocka_unit_test(lookup_retain_rows),
        cmocka_unit_test(quantised_queries),
        cmocka_unit_test(quantised_strange_queries),
        cmocka_unit_test(lookup_zero_queries),
        cmocka_unit_test(lookup_huge_queries),
        cmocka_unit_test(plans),
        cmocka_unit_test(logits),
        cmocka_unit_test(workspace_sizes),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
