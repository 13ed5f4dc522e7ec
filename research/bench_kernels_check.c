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
 * are read. The library decides in floats, so a cluster or a row within CHECK_CLOSE of its threshold may be decided either
 * way. The selection itself is the library's, taken from sqz_lookup() for that head alone, and every decision of it is
 * checked; a row that is close widens the tolerance by what it weighs.
 */
#include "bench_kernels_check.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "kernels.h"

enum {
    DENSE_SAMPLES = 6,
    SQUEEZED_SAMPLES = 6, /* selections */
    SAMPLES_OF_LONG = 3,  /* the same, of a context above */
    LONG_CONTEXT = 1 << 16,
    ROW_SAMPLES = 4, /* query rows of each */
};

static const double unit_roundoff = 0x1p-24;

/* ---- Rows ------------------------------------------------------------------------------- */

static double magnitude(const float *x, const float *y, size_t d)
{
    double sum = 0.0;
    for (size_t i = 0; i < d; i++) sum += fabs((double)x[i] * y[i]);
    return sum;
}

/* A weighted sum of rows: weights are exponentials relative to `reference`, a logit. */
struct state {
    size_t d;
    double reference, weights, out[CHECK_MAX_DIM], absolute[CHECK_MAX_DIM];
    double close[CHECK_MAX_DIM], close_weights; /* the part that may be there or not */
    double largest;                             /* magnitude of a logit */
    size_t n;
};

static void state_add(struct state *s, double logit, const struct sqz_rows *values, size_t at, bool close)
{
    float value[CHECK_MAX_DIM];
    const double weight = exp(logit - s->reference);
    sqz_rows_to_f32(value, values, at, 1, s->d);
    s->weights += weight;
    s->n++;
    for (size_t i = 0; i < s->d; i++) {
        s->out[i] += weight * value[i];
        s->absolute[i] += weight * fabs((double)value[i]);
        if (close) s->close[i] += weight * fabs((double)value[i]);
    }
    if (close) s->close_weights += weight;
}

/* Takes the state's own error tolerance, or a given one, and compares. `where` names the output. */
static void state_compare(const struct state *s, const float *got, double tolerance, const char *where,
                          struct check_result *result)
{
    const double own =
        2.0 * (double)(s->d + 2) * unit_roundoff * s->largest + 4.0 * sqrt((double)s->n) * unit_roundoff + 2e-6;
    const double allowed = tolerance > own ? tolerance : own;
    for (size_t i = 0; i < s->d; i++) {
        const double wanted = s->out[i] / s->weights, absolute = s->absolute[i] / s->weights;
        const double close = (s->close[i] + fabs(wanted) * s->close_weights) / s->weights;
        const double difference = fabs((double)got[i] - wanted);
        if (difference / (absolute + FLT_MIN) > result->error) result->error = difference / (absolute + FLT_MIN);
        if (!(difference <= allowed * absolute + close + 1e-9) && result->ok) { /* NaN fails */
            result->ok = false;
            snprintf(result->message, sizeof result->message,
                     "%s, dimension %zu: %.9g where double precision gives %.9g; allowed is a difference of %.3g",
                     where, i, (double)got[i], wanted, allowed * absolute + close);
        }
    }
}

/* A sixteenth of the rows tells how large logits are. */
static void note_magnitude(struct state *state, const float *query, const struct sqz_rows *rows, size_t n,
                           const struct sqz_layer *layer)
{
    float row[CHECK_MAX_DIM];
    for (size_t r = 0; r < n; r += 16) {
        sqz_rows_to_f32(row, rows, r, 1, state->d);
        state->largest = fmax(state->largest, layer->shape.scale * magnitude(query, row, state->d));
    }
}

/* ---- Calls ------------------------------------------------------------------------------ */

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
    const size_t d = layer->shape.head_dim, n = layer->n_rows, n_user = check_user_rows(c, token);
    const size_t head_kv = head / (layer->shape.n_head / layer->shape.n_head_kv);
    const struct sqz_rows keys = sqz_rows_of_head(&layer->keys, n, d, head_kv);
    const struct sqz_rows values = sqz_rows_of_head(&layer->values, n, d, head_kv);
    const struct sqz_rows user_keys = sqz_f16_rows(c->user_keys + head_kv * c->user_capacity_rows * d);
    const struct sqz_rows user_values = sqz_f16_rows(c->user_values + head_kv * c->user_capacity_rows * d);
    struct state state = {.d = d};
    char where[64];
    double *logits = malloc((n + n_user) * sizeof *logits);
    if (!logits) die("out of memory");
    check_logits(logits, check_query(c, token, head), &keys, n, layer);
    check_logits(logits + n, check_query(c, token, head), &user_keys, n_user, layer);
    note_magnitude(&state, check_query(c, token, head), &keys, n, layer);
    note_magnitude(&state, check_query(c, token, head), &user_keys, n_user, layer);
    state.reference = check_log_sum(logits, n + n_user, -INFINITY);
    for (size_t r = 0; r < n; r++) state_add(&state, logits[r], &values, r, false);
    for (size_t r = 0; r < n_user; r++) state_add(&state, logits[n + r], &user_values, r, false);
    where_text(where, sizeof where, token, head);
    state_compare(&state, out_of(c, token, head), tolerance, where, result);
    free(logits);
}

static void join(struct check_result *into, const struct check_result *from)
{
    into->error = from->error > into->error ? from->error : into->error;
    if (!from->ok && into->ok) *into = *from;
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
    for (size_t i = 0; i < DENSE_SAMPLES; i++) join(&all, &one[i]);
    return all;
}

/* ---- Squeezed ----------------------------------------------------------------------------- */

/* Whether a column of weights is read: where the largest reaches the limit. *is_close: floats may decide otherwise. */
static bool is_read(double largest, double limit, bool *is_close)
{
    *is_close = limit > 0.0 && fabs(largest / limit - 1.0) < CHECK_CLOSE;
    return largest >= limit * (1.0 - CHECK_CLOSE);
}

/* The outputs of a part that are compared: some of its query rows. */
struct sample {
    size_t n, row[ROW_SAMPLES];
    size_t visible[ROW_SAMPLES]; /* of the user's rows */
    struct state state[ROW_SAMPLES];
};

/* Rows of one kind. */
struct rows {
    struct sqz_rows keys, values;
    size_t begin, end;
    double limit; /* a row whose weights are all below is left out */
    bool causal;  /* query rows see the first of them alone */
};

/* Logit of a query row with row `at`, whose key is `key` in floats: blocks take it so. */
static double key_logit(const struct check_part *p, size_t r, const struct rows *rows, size_t at, const float *key)
{
    const size_t d = p->layer.shape.head_dim;
    if (p->by_rows) return check_logit(p, r, &rows->keys, at, key);
    return (double)p->layer.shape.scale * check_dot(p->queries + r * d, key, d);
}

/* The largest weight that any query row gives a key. */
static double largest_weight(const struct check_lookup *l, const struct rows *rows, size_t at, const float *key)
{
    double largest = -INFINITY;
    for (size_t r = 0; r < l->part->n_query_rows; r++)
        largest = fmax(largest, key_logit(l->part, r, rows, at, key) - l->total[r]);
    return exp(largest);
}

static void add_rows(const struct check_lookup *l, struct sample *sample, const struct rows *rows)
{
    const struct check_part *p = l->part;
    const size_t d = p->layer.shape.head_dim;
    float key[CHECK_MAX_DIM];
    for (size_t at = rows->begin; at < rows->end; at++) {
        bool is_close = false;
        sqz_rows_to_f32(key, &rows->keys, at, 1, d);
        if (rows->limit > 0.0 && !is_read(largest_weight(l, rows, at, key), rows->limit, &is_close)) continue;
        for (size_t i = 0; i < sample->n; i++) {
            struct state *state = &sample->state[i];
            if (rows->causal && at >= sample->visible[i]) continue;
            if ((at & 15) == 0) { /* a sixteenth of the rows tells how large logits are */
                const double m = p->layer.shape.scale * magnitude(p->queries + sample->row[i] * d, key, d);
                state->largest = m > state->largest ? m : state->largest;
            }
            state_add(state, key_logit(p, sample->row[i], rows, at, key), &rows->values, at, is_close);
        }
    }
}

static void add_tail(const struct check_lookup *l, struct sample *sample, double limit)
{
    const struct check_part *p = l->part;
    const struct sqz_selection *s = &p->selection;
    if (!p->layer.tail || p->plan.tail_gain <= SQZ_TAIL_OFF) return;
    for (size_t c = 0; c < s->n_pruned; c++) {
        const double keys = l->tail_keys[c];
        double largest = 0.0;
        bool is_close;
        for (size_t r = 0; r < p->n_query_rows; r++) {
            const double logit = fmin(l->tail_logit[r * s->n_pruned + c], l->total[r]);
            largest = fmax(largest, keys * exp(logit - l->total[r]));
        }
        if (!is_read(largest, limit, &is_close)) continue;
        for (size_t i = 0; i < sample->n; i++) {
            const size_t r = sample->row[i];
            const double logit = fmin(l->tail_logit[r * s->n_pruned + c], l->total[r]);
            state_add(&sample->state[i], logit + log(keys), &p->layer.level[s->pruned_level[c]].value_centroids,
                      s->pruned_cluster[c], is_close);
        }
    }
}

static void sample_make(struct sample *sample, const struct check_lookup *l)
{
    const struct check_part *p = l->part;
    memset(sample, 0, sizeof *sample);
    sample->n = p->n_query_rows < ROW_SAMPLES ? p->n_query_rows : ROW_SAMPLES;
    for (size_t i = 0; i < sample->n; i++) {
        sample->row[i] = spread(i, sample->n, p->n_query_rows);
        sample->visible[i] = check_user_rows(&p->call, sample->row[i] / p->layer.shape.n_head);
        sample->state[i].d = p->layer.shape.head_dim;
        sample->state[i].reference = l->total[sample->row[i]];
    }
}

/* Everything that the part reads, added up and compared with what the whole call wrote. */
static void compare_part(const struct sqz_attend_call *whole, const struct check_lookup *l, double tolerance,
                         struct check_result *result)
{
    const struct check_part *p = l->part;
    const struct sqz_layer *layer = &p->layer;
    const size_t group = layer->shape.n_head;
    struct sample sample;
    sample_make(&sample, l);
    /* Where as many values were read as keys, none was skipped. */
    const double limit = layer->value_skip ? SQZ_VALUE_SKIP * exp((double)p->plan.log_threshold) : 0.0;
    const uint64_t values_read = p->stats.value_bytes / (layer->shape.head_dim * sizeof(uint16_t));
    const bool skipped = sqz_row_is_planes(layer->values.type) ? p->stats.value_bytes < p->stats.key_bytes
                                                               : values_read < p->stats.retained_keys;
    const double row_limit = skipped ? limit : 0.0;
    add_rows(l, &sample,
             &(struct rows){.keys = sqz_f16_rows(p->call.user_keys),
                            .values = sqz_f16_rows(p->call.user_values),
                            .end = p->call.n_user,
                            .causal = true});
    add_rows(l, &sample,
             &(struct rows){.keys = layer->keys, .values = layer->values, .end = layer->n_fixed, .limit = row_limit});
    for (size_t i = 0; i < p->selection.n_ranges; i++) {
        const struct sqz_range range = p->selection.ranges[i];
        add_rows(l, &sample,
                 &(struct rows){.keys = p->by_rows ? *sqz_retained_keys(layer) : layer->keys,
                                .values = layer->values,
                                .begin = range.begin,
                                .end = range.end,
                                .limit = row_limit});
    }
    add_tail(l, &sample, limit);
    for (size_t i = 0; i < sample.n; i++) {
        const size_t token = p->first_token + sample.row[i] / group, head = p->head_kv * group + sample.row[i] % group;
        char where[64];
        where_text(where, sizeof where, token, head);
        state_compare(&sample.state[i], out_of(whole, token, head), tolerance, where, result);
    }
}

static void check_selection(const struct sqz_attend_call *whole, size_t token, size_t head_kv, double tolerance,
                            struct check_result *result)
{
    struct check_part p;
    struct check_lookup l;
    check_part_make(&p, whole, token, head_kv);
    check_lookup_make(&l, &p);
    if (check_lookup_run(&l, result)) compare_part(whole, &l, tolerance, result);
    check_lookup_free(&l);
    check_part_free(&p);
}

struct check_result check_squeezed(const struct sqz_attend_call *c, double tolerance)
{
    struct check_result all = {.ok = true};
    const size_t n = c->layer->n_rows > LONG_CONTEXT ? SAMPLES_OF_LONG : SQUEEZED_SAMPLES;
    for (size_t i = 0; i < n && !signal_caught(); i++) {
        struct check_result one = {.ok = true};
        check_selection(c, spread(i, n, c->n_tokens), spread((i * 5 + 1) % n, n, c->layer->shape.n_head_kv), tolerance,
                        &one);
        join(&all, &one);
    }
    return all;
}
