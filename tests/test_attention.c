/*
 * Attention against double precision: the running softmax and its merge, dense
 * causal attention, and attention over one layer (dense, sliding window,
 * clustered with and without tail, blocks that share a selection, user rows),
 * with the bytes it says it read. The retained set of a clustered layer is
 * taken from sqz_lookup(), which test_lookup.c checks by itself.
 */
#include "layer_fixture.h"

#include "attend_job.h"
#include "attend_selected.h"
#include "attention.h"
#include "attention_map.h"
#include "codes.h"
#include "lookup.h"
#include "softmax.h"
#include "stride.h"

static struct reference reference;
static struct reference_result wanted;

static void check_output(const char *op, const float *out, size_t d)
{
    for (size_t i = 0; i < d; i++) check_close(op, i, out[i], wanted.out[i], wanted.out_tolerance[i]);
}

/* ---- Running softmax ------------------------------------------------------------- */

enum { STATE_ROWS = 5, STATE_DIM = 32 };

struct state {
    struct sqz_softmax softmax;
    float out[STATE_ROWS * STATE_DIM], maximum[STATE_ROWS], sum[STATE_ROWS];
};

static void state_reset(struct state *s)
{
    s->softmax = (struct sqz_softmax){STATE_ROWS, STATE_DIM, s->out, s->maximum, s->sum};
    sqz_softmax_reset(&s->softmax);
}

static void state_copy(struct state *to, const struct state *from)
{
    *to = *from;
    to->softmax = (struct sqz_softmax){STATE_ROWS, STATE_DIM, to->out, to->maximum, to->sum};
}

static struct sqz_tile_scratch tile_scratch(size_t rows, size_t d)
{
    struct sqz_tile_scratch s = {take(rows * SQZ_TILE_ROWS, sizeof(float)), take(SQZ_TILE_ROWS * d, sizeof(float)),
                                 take(SQZ_TILE_ROWS * d, sizeof(float))};
    return s;
}

static void free_scratch(struct sqz_tile_scratch *s)
{
    free(s->logits);
    free(s->keys);
    free(s->values);
}

/* Tiles of any size with limits, in any split, give the softmax over the rows seen; rows with empty limits stay empty.
 */
static void softmax_tiles(void **unused)
{
    (void)unused;
    static const size_t sizes[][4] = {{128, 128, 44, 0}, {1, 127, 128, 44}, {33, 3, 31, 32}, {17, 0, 0, 0}};
    static const double magnitudes[] = {0.2, 3, 60};
    struct sqz_tile_scratch scratch = tile_scratch(STATE_ROWS, STATE_DIM);
    for (size_t m = 0; m < COUNT(magnitudes); m++) {
        for (size_t s = 0; s < COUNT(sizes); s++) {
            const size_t total = sizes[s][0] + sizes[s][1] + sizes[s][2] + sizes[s][3];
            float *queries = random_floats(STATE_ROWS * STATE_DIM, 10 + s, magnitudes[m]);
            uint16_t *keys = random_halves(total * STATE_DIM, 20 + s, 1),
                     *values = random_halves(total * STATE_DIM, 3, 1);
            const size_t low[STATE_ROWS] = {0, 5, total / 2, total - 1, total}; /* row 4 sees nothing */
            const size_t high[STATE_ROWS] = {total, total - 3, total / 2 + 2, total, total};
            struct state state;
            state_reset(&state);
            for (size_t part = 0, at = 0; part < 4; at += sizes[s][part++]) {
                uint32_t first[STATE_ROWS], last[STATE_ROWS];
                const size_t n = sizes[s][part];
                if (!n) continue;
                for (size_t r = 0; r < STATE_ROWS; r++) {
                    const size_t end = high[r] > at ? (high[r] - at < n ? high[r] - at : n) : 0;
                    const size_t begin = low[r] > at ? low[r] - at : 0;
                    last[r] = (uint32_t)end;
                    first[r] = (uint32_t)(begin < end ? begin : end);
                }
                const struct sqz_rows key_rows = sqz_f16_rows(keys), value_rows = sqz_f16_rows(values);
                sqz_softmax_add_tile(&state.softmax, queries, 0.2f, &key_rows, &value_rows, at, n, first, last,
                                     &scratch);
            }
            for (size_t r = 0; r < 4; r++) {
                describe("query magnitude %g, split %zu, row %zu", magnitudes[m], s, r);
                reference_reset(&reference);
                for (size_t i = low[r]; i < high[r]; i++)
                    reference_add(&reference, queries + r * STATE_DIM, keys + i * STATE_DIM, values + i * STATE_DIM,
                                  STATE_DIM, 0.2f);
                reference_finish(&reference, STATE_DIM, &wanted);
                float out[STATE_DIM];
                for (size_t i = 0; i < STATE_DIM; i++) out[i] = state.out[r * STATE_DIM + i] / state.sum[r];
                check_output("softmax tile", out, STATE_DIM);
                check_close("softmax lse", r, state.maximum[r] + log((double)state.sum[r]), wanted.lse,
                            wanted.tolerance);
            }
            describe("query magnitude %g, split %zu, row 4", magnitudes[m], s);
            check_close("softmax empty sum", 4, state.sum[4], 0, 0);
            check_close("softmax empty maximum", 4, state.maximum[4], (double)-INFINITY, 0);
            for (size_t i = 0; i < STATE_DIM; i++)
                check_close("softmax empty out", i, state.out[4 * STATE_DIM + i], 0, 0);
            free(queries);
            free(keys);
            free(values);
        }
    }
    free_scratch(&scratch);
}

static void random_state(struct state *s, uint64_t seed, double maximum)
{
    struct sqz_random random;
    sqz_random_seed(&random, seed);
    state_reset(s);
    for (size_t r = 0; r < STATE_ROWS; r++) {
        s->maximum[r] = (float)(maximum + gauss(&random));
        s->sum[r] = (float)(1 + sqz_random_unit(&random));
        for (size_t i = 0; i < STATE_DIM; i++) s->out[r * STATE_DIM + i] = (float)gauss(&random);
    }
}

static void check_same_state(const char *op, const struct state *a, const struct state *b, double tolerance)
{
    for (size_t r = 0; r < STATE_ROWS; r++) {
        check_close(op, r, a->maximum[r], b->maximum[r], 0);
        check_close(op, r, a->sum[r], b->sum[r], tolerance * fabs((double)b->sum[r]));
        for (size_t i = 0; i < STATE_DIM; i++)
            check_close(op, r * STATE_DIM + i, a->out[r * STATE_DIM + i], b->out[r * STATE_DIM + i],
                        tolerance * (fabs((double)b->out[r * STATE_DIM + i]) + 4));
    }
}

static void softmax_merge(void **unused)
{
    (void)unused;
    static const double maxima[][3] = {{0, 0, 0},           {-5, 3, 1},   {-3e38, 3e38, 0},
                                       {1e30, -1e30, 1e30}, {-90, 0, 90}, {-300, -301, -302}};
    struct state a, b, c, empty, left, right, got;
    state_reset(&empty);
    for (size_t i = 0; i < COUNT(maxima); i++) {
        describe("maxima %g %g %g", maxima[i][0], maxima[i][1], maxima[i][2]);
        random_state(&a, 1 + i, maxima[i][0]);
        random_state(&b, 100 + i, maxima[i][1]);
        random_state(&c, 200 + i, maxima[i][2]);

        state_copy(&got, &a);
        sqz_softmax_merge(&got.softmax, &empty.softmax);
        check_same_state("merge of nothing", &got, &a, 0);
        state_reset(&got);
        sqz_softmax_merge(&got.softmax, &a.softmax);
        check_same_state("merge into nothing", &got, &a, 0);

        state_copy(&left, &a); /* (a b) c */
        sqz_softmax_merge(&left.softmax, &b.softmax);
        sqz_softmax_merge(&left.softmax, &c.softmax);
        state_copy(&right, &b); /* (b c) a */
        sqz_softmax_merge(&right.softmax, &c.softmax);
        sqz_softmax_merge(&right.softmax, &a.softmax);
        /* Seven roundings each, and the factors' exponents: off by a ulp of the maximum. */
        check_same_state("merge order", &left, &right, 1e-5);

        for (size_t r = 0; r < STATE_ROWS; r++) {
            const double high = fmax(fmax(a.maximum[r], b.maximum[r]), c.maximum[r]);
            const double x = exp(a.maximum[r] - high), y = exp(b.maximum[r] - high), z = exp(c.maximum[r] - high);
            check_close("merged sum", r, left.sum[r], x * a.sum[r] + y * b.sum[r] + z * c.sum[r], 1e-5 * left.sum[r]);
            for (size_t j = r * STATE_DIM; j < (r + 1) * STATE_DIM; j++)
                check_close("merged out", j, left.out[j], x * a.out[j] + y * b.out[j] + z * c.out[j], 3e-5);
        }
    }
    describe("both empty");
    state_reset(&got);
    sqz_softmax_merge(&got.softmax, &empty.softmax);
    check_same_state("merge of nothing into nothing", &got, &empty, 0);
    /* A state that was raised but holds nothing is empty too. */
    random_state(&a, 7, 0);
    state_reset(&got);
    sqz_softmax_raise(&got.softmax, 2, -3.0f);
    sqz_softmax_merge(&a.softmax, &got.softmax);
    random_state(&b, 7, 0);
    check_same_state("merge of raised nothing", &a, &b, 0);
}

/* ---- Causal ----------------------------------------------------------------------------- */

struct causal_case {
    uint32_t n_head, n_head_kv, head_dim;
    size_t n_tokens, first_position, window_tokens;
    int n_threads;
    bool strided;
    double magnitude;
    uint64_t seed;
    size_t most_checks; /* (token, head) pairs compared; spread over all when there are more */
};

static void check_causal(const struct causal_case *c)
{
    const size_t d = c->head_dim, h = c->n_head, rows = c->first_position + c->n_tokens, capacity = rows + 3;
    const struct sqz_layer_shape shape = make_shape(c->n_head, c->n_head_kv, c->head_dim);
    const size_t query_head = c->strided ? d + 5 : d, query_token = query_head * h + (c->strided ? 7 : 0);
    const size_t out_token = c->strided ? d + 3 : d * h, out_head = c->strided ? out_token * c->n_tokens + 11 : d;
    const size_t n_out = c->strided ? out_head * h : out_token * c->n_tokens;
    describe("heads %u/%u, dim %u, T %zu, position %zu, window %zu, threads %d, strided %d, magnitude %g, seed %llu",
             c->n_head, c->n_head_kv, c->head_dim, c->n_tokens, c->first_position, c->window_tokens, c->n_threads,
             (int)c->strided, c->magnitude, (unsigned long long)c->seed);
    float *queries = random_floats(query_token * c->n_tokens, c->seed, c->magnitude);
    uint16_t *keys = random_halves(c->n_head_kv * capacity * d, c->seed + 1, 1);
    uint16_t *values = random_halves(c->n_head_kv * capacity * d, c->seed + 2, 1);
    for (size_t k = 0; k < c->n_head_kv; k++) /* never to be read */
        for (size_t i = rows * d; i < capacity * d; i++)
            keys[k * capacity * d + i] = values[k * capacity * d + i] = HALF_NAN;
    float *out = take(n_out, sizeof *out);
    for (size_t i = 0; i < n_out; i++) out[i] = SENTINEL;
    struct guarded workspace = workspace_take(sqz_causal_workspace_bytes(&shape, c->n_threads));
    const struct sqz_causal_call call = {
        .shape = shape,
        .queries = queries,
        .out = out,
        .query_token_stride = query_token,
        .query_head_stride = query_head,
        .out_token_stride = out_token,
        .out_head_stride = out_head,
        .n_tokens = c->n_tokens,
        .first_position = c->first_position,
        .window_tokens = c->window_tokens,
        .keys = keys,
        .values = values,
        .capacity_rows = capacity,
        .n_threads = c->n_threads,
        .workspace = workspace.data,
    };
    sqz_attention_causal(&call);

    const size_t pairs = c->n_tokens * h;
    size_t step = pairs > c->most_checks ? pairs / c->most_checks : 1;
    if (step > 1) step |= 1;
    for (size_t pair = 0; pair < pairs; pair += pair + step >= pairs && pair + 1 < pairs ? pairs - 1 - pair : step) {
        const size_t t = pair / h, head = pair % h, position = c->first_position + t;
        const uint16_t *head_keys = keys + head / (h / c->n_head_kv) * capacity * d;
        const uint16_t *head_values = values + head / (h / c->n_head_kv) * capacity * d;
        reference_reset(&reference);
        for (size_t i = 0; i <= position; i++)
            if (!c->window_tokens || i + c->window_tokens > position)
                reference_add(&reference, queries + t * query_token + head * query_head, head_keys + i * d,
                              head_values + i * d, d, (double)shape.scale);
        reference_finish(&reference, d, &wanted);
        for (size_t i = 0; i < d; i++)
            check_close("causal", pair * d + i, out[t * out_token + head * out_head + i], wanted.out[i],
                        wanted.out_tolerance[i]);
    }
    size_t untouched = 0;
    for (size_t i = 0; i < n_out; i++) {
        check_true("causal out is finite", i, out[i], 0, isfinite(out[i]));
        untouched += out[i] == SENTINEL;
    }
    check_true("causal elements not written", 0, (double)untouched, (double)(n_out - pairs * d),
               untouched == n_out - pairs * d);
    guarded_free(workspace);
    free(queries);
    free(keys);
    free(values);
    free(out);
}

static void causal_positions(void **unused)
{
    (void)unused;
    static const size_t tokens[] = {1, 3, 31, 32, 33, 127, 128, 129}, positions[] = {0, 1, 63, 500};
    static const size_t windows[] = {0, 1, 5, 64, 200};
    uint64_t seed = 1;
    for (size_t t = 0; t < COUNT(tokens); t++)
        for (size_t p = 0; p < COUNT(positions); p++)
            for (size_t w = 0; w < COUNT(windows); w++, seed++) {
                if (passed_over(seed)) continue;
                check_causal(&(struct causal_case){4, 2, 32, tokens[t], positions[p], windows[w], (int)(seed % 3) + 1,
                                                   seed % 2 == 0, 2, seed, 12});
            }
}

static void causal_shapes(void **unused)
{
    (void)unused;
    static const uint32_t heads[][2] = {{1, 1}, {2, 1}, {3, 1}, {3, 3}, {4, 1}, {4, 2},  {5, 5},  {6, 2},
                                        {7, 1}, {8, 1}, {8, 2}, {9, 3}, {9, 9}, {71, 1}, {200, 1}};
    static const uint32_t dims[] = {32, 64, 80, 128, 256};
    static const size_t tokens[] = {3, 1, 33, 31, 129}, positions[] = {63, 0, 500, 1},
                        windows[] = {0, 64, 0, 5, 200, 1};
    uint64_t seed = 1000;
    for (size_t h = 0; h < COUNT(heads); h++)
        for (size_t d = 0; d < COUNT(dims); d++, seed++) {
            if (passed_over(seed)) continue;
            size_t n = tokens[seed % COUNT(tokens)];
            if (n * heads[h][0] * dims[d] > 60000) n = 3; /* time */
            check_causal(&(struct causal_case){heads[h][0], heads[h][1], dims[d], n, positions[seed % COUNT(positions)],
                                               windows[seed % COUNT(windows)], (int)(seed % 3) + 1, seed % 4 == 0, 1.5,
                                               seed, 10});
        }
}

/* Logits to +-300 and beyond, and queries of zeros, whose attention is the plain mean. */
static void causal_extremes(void **unused)
{
    (void)unused;
    static const double magnitudes[] = {0, 1e-30, 100, 300};
    for (size_t m = 0; m < COUNT(magnitudes); m++)
        for (size_t w = 0; w < 2; w++)
            check_causal(&(struct causal_case){6, 2, 64, 70, 130, w ? 40 : 0, 2, false, magnitudes[m], 77 + m,
                                               stride() > 1 ? 100 : 1000});
}

static void causal_nothing(void **unused)
{
    (void)unused;
    const struct sqz_layer_shape shape = make_shape(2, 1, 32);
    struct guarded workspace = workspace_take(sqz_causal_workspace_bytes(&shape, 2));
    const struct sqz_causal_call call = {.shape = shape, .n_threads = 2, .workspace = workspace.data};
    sqz_attention_causal(&call); /* no tokens: nothing is read or written */
    guarded_free(workspace);
}

/* ---- One layer: harness ------------------------------------------------------------------------ */

struct attend_case {
    const struct sqz_layer *layer;
    const float *queries; /* dense [T][H][D] unless strided */
    bool strided;
    size_t n_tokens, block_tokens, n_user, user_capacity, n_context_tokens;
    const uint16_t *user_keys, *user_values;
    float budget, log_offset;
    int n_threads;
    struct sqz_attention_map *map;
    size_t map_turn;
};

struct attend_result {
    float *out, *lse;
    struct sqz_attention_stats stats;
};

static void free_result(struct attend_result *r)
{
    free(r->out);
    free(r->lse);
}

static size_t group_of(const struct sqz_layer *layer)
{
    return layer->shape.n_head / layer->shape.n_head_kv;
}

static void describe_attend(const struct attend_case *c, const char *note)
{
    const struct sqz_layer *l = c->layer;
    describe("%s: heads %u/%u, dim %u, rows %u, fixed %u, levels %u, tail %d, skip %d, T %zu, block %zu, user %zu, "
             "budget %g, offset %g, threads %d",
             note, l->shape.n_head, l->shape.n_head_kv, l->shape.head_dim, l->n_rows, l->n_fixed, l->n_levels,
             (int)l->tail, (int)l->value_skip, c->n_tokens, c->block_tokens, c->n_user, (double)c->budget,
             (double)c->log_offset, c->n_threads);
}

/* The call of a case into a result, its queries and outputs dense. Without a workspace. */
static struct sqz_attend_call plain_call(const struct attend_case *c, struct attend_result *r)
{
    const size_t d = c->layer->shape.head_dim, h = c->layer->shape.n_head;
    return (struct sqz_attend_call){
        .layer = c->layer,
        .queries = c->queries,
        .out = r->out,
        .lse = r->lse,
        .query_token_stride = h * d,
        .query_head_stride = d,
        .out_token_stride = h * d,
        .out_head_stride = d,
        .n_tokens = c->n_tokens,
        .user_keys = c->user_keys,
        .user_values = c->user_values,
        .user_capacity_rows = c->user_capacity,
        .n_user = c->n_user,
        .n_context_tokens = c->n_context_tokens,
        .budget = c->budget,
        .log_offset = c->log_offset,
        .block_tokens = c->block_tokens,
        .n_threads = c->n_threads,
        .stats = &r->stats,
        .map = c->map,
        .map_turn = c->map_turn,
    };
}

static struct attend_result attend(const struct attend_case *c)
{
    const size_t d = c->layer->shape.head_dim, h = c->layer->shape.n_head;
    const size_t query_head = c->strided ? d + 3 : d, query_token = query_head * h + (c->strided ? 9 : 0);
    const size_t out_token = c->strided ? d : d * h, out_head = c->strided ? d * c->n_tokens : d;
    struct attend_result r = {take(c->n_tokens * h * d, sizeof(float)), take(c->n_tokens * h, sizeof(float)), {0}};
    float *queries = NULL, *out = take(c->n_tokens * h * d, sizeof *out);
    if (c->strided) {
        queries = take(query_token * c->n_tokens, sizeof *queries);
        for (size_t i = 0; i < query_token * c->n_tokens; i++) queries[i] = NAN;
        for (size_t i = 0; i < c->n_tokens * h; i++)
            memcpy(queries + i / h * query_token + i % h * query_head, c->queries + i * d, d * sizeof *queries);
    }
    for (size_t i = 0; i < c->n_tokens * h * d; i++) out[i] = NAN;
    struct guarded workspace =
        workspace_take(sqz_attend_workspace_bytes(c->layer, c->n_user, c->block_tokens, c->n_threads));
    struct sqz_attend_call call = plain_call(c, &r);
    call.workspace = workspace.data;
    call.out = out;
    call.out_token_stride = out_token;
    call.out_head_stride = out_head;
    call.query_token_stride = query_token;
    call.query_head_stride = query_head;
    if (c->strided) call.queries = queries;
    sqz_attend(&call);
    guarded_free(workspace);
    for (size_t i = 0; i < c->n_tokens * h; i++)
        memcpy(r.out + i * d, out + i / h * out_token + i % h * out_head, d * sizeof *out);
    for (size_t i = 0; i < c->n_tokens * h * d; i++)
        check_true("attend out is finite", i, r.out[i], 0, isfinite(r.out[i]));
    free(queries);
    free(out);
    return r;
}

/* User rows of all KV heads, NaN past n_user. */
static void make_user_rows(struct attend_case *c, uint64_t seed, double magnitude)
{
    const size_t d = c->layer->shape.head_dim, k = c->layer->shape.n_head_kv;
    c->user_capacity = c->n_user + 3;
    uint16_t *keys = random_halves(k * c->user_capacity * d, seed, magnitude);
    uint16_t *values = random_halves(k * c->user_capacity * d, seed + 1, 1);
    for (size_t i = 0; i < k * c->user_capacity * d; i++)
        if (i / d % c->user_capacity >= c->n_user) keys[i] = values[i] = HALF_NAN;
    c->user_keys = keys;
    c->user_values = values;
}

static void free_user_rows(struct attend_case *c)
{
    free((void *)(uintptr_t)c->user_keys);
    free((void *)(uintptr_t)c->user_values);
}

static const float *query_of(const struct attend_case *c, size_t token, size_t head)
{
    return c->queries + (token * c->layer->shape.n_head + head) * c->layer->shape.head_dim;
}

/* Whether tokens go through rows one by one, each with all its queries, in place of tiles of matrix products. */
static bool by_rows(const struct attend_case *c)
{
    const bool alone = c->n_tokens == 1 || (c->block_tokens == 1 && c->budget < 1 && c->layer->n_levels);
    return alone && group_of(c->layer) <= SQZ_MAX_GROUP_QUERIES;
}

/* What is read of a key. */
static const struct sqz_rows *keys_read(const struct attend_case *c, size_t row)
{
    const bool chosen = c->budget < 1 && c->layer->n_levels && row >= c->layer->n_fixed;
    return chosen && by_rows(c) ? sqz_retained_keys(c->layer) : &c->layer->keys;
}

/* The logit of a row as it is read; INT8 rows are taken at their word, and so is the rounding of a query that meets them
 * one by one. */
static double row_logit(const struct attend_case *c, size_t token, size_t head, size_t row, double *magnitude)
{
    const struct sqz_layer *l = c->layer;
    const struct sqz_rows *rows = keys_read(c, row);
    const size_t d = l->shape.head_dim, head_kv = head / group_of(l), at = head_kv * l->n_rows + row;
    const double scale = (double)l->shape.scale;
    const float *q = query_of(c, token, head);
    int16_t quantised[256];
    float factor, unused;
    double sum = 0, total = 0;
    if (rows->type == SQZ_ROW_F16) return exact_logit(q, sqz_rows_f16(rows) + at * d, d, scale, magnitude);
    const float *mean = rows->mean + head_kv * d;
    sqz_i16_queries_set(&(struct sqz_i16_queries){quantised, &factor, &unused}, q, 1, d, l->shape.scale, mean);
    for (size_t i = 0; i < d; i++) {
        const double x = by_rows(c) ? (double)factor / scale * quantised[i] : (double)q[i];
        const double part = x * (double)rows->scale[at] * sqz_rows_i8(rows)[at * d + i],
                     of_mean = (double)q[i] * mean[i];
        sum += part + of_mean;
        total += fabs(part) + fabs(of_mean);
    }
    if (magnitude && scale * total > *magnitude) *magnitude = scale * total;
    return scale * sum;
}

static void add_row(const struct attend_case *c, size_t token, size_t head, size_t row)
{
    const struct sqz_layer *l = c->layer;
    const size_t at = (head / group_of(l) * l->n_rows + row) * l->shape.head_dim;
    reference_add_logit(&reference, row_logit(c, token, head, row, &reference.magnitude),
                        sqz_rows_f16(&l->values) + at);
}

static void add_user_rows(const struct attend_case *c, size_t token, size_t head)
{
    const struct sqz_layer *l = c->layer;
    const size_t d = l->shape.head_dim;
    if (!c->n_user) return;
    const size_t own = c->n_user - c->n_tokens + token;
    for (size_t u = 0; u <= own; u++) {
        if (l->sliding_window && u + l->n_window_tokens <= own) continue;
        const size_t at = (head / group_of(l) * c->user_capacity + u) * d;
        reference_add(&reference, query_of(c, token, head), c->user_keys + at, c->user_values + at, d,
                      (double)l->shape.scale);
    }
}

static void check_token(const char *op, const struct attend_case *c, const struct attend_result *r, size_t token,
                        size_t head)
{
    const size_t d = c->layer->shape.head_dim, at = token * c->layer->shape.n_head + head;
    reference_finish(&reference, d, &wanted);
    check_output(op, r->out + at * d, d);
    check_close("lse", at, r->lse[at], wanted.lse, wanted.tolerance);
}

/* Every token and head against exact attention over all rows that it may see. */
static void check_exact(const char *op, const struct attend_case *c, const struct attend_result *r, size_t most_checks)
{
    const struct sqz_layer *l = c->layer;
    const size_t pairs = c->n_tokens * l->shape.n_head;
    size_t step = pairs > most_checks ? pairs / most_checks | 1 : 1;
    for (size_t pair = 0; pair < pairs; pair += pair + step >= pairs && pair + 1 < pairs ? pairs - 1 - pair : step) {
        const size_t token = pair / l->shape.n_head, head = pair % l->shape.n_head;
        const size_t position = c->n_context_tokens + c->n_user - c->n_tokens + token;
        reference_reset(&reference);
        add_user_rows(c, token, head);
        for (size_t i = 0; i < l->n_rows; i++)
            if (!l->sliding_window || c->n_context_tokens - l->n_rows + i + l->n_window_tokens > position)
                add_row(c, token, head, i);
        check_token(op, c, r, token, head);
    }
}

/* A dense layer over rows that the caller keeps. */
static struct sqz_layer dense_layer(struct sqz_layer_shape shape, const uint16_t *keys, const uint16_t *values,
                                    size_t n_rows, size_t window_tokens)
{
    struct sqz_layer layer;
    memset(&layer, 0, sizeof layer);
    layer.shape = shape;
    layer.n_rows = layer.n_fixed = (uint32_t)n_rows;
    layer.keys = sqz_f16_rows(keys);
    layer.values = sqz_f16_rows(values);
    layer.sliding_window = window_tokens != 0;
    layer.n_window_tokens = (uint32_t)window_tokens;
    return layer;
}

/* ---- Dense and sliding window --------------------------------------------------------------------- */

static void check_full_read(const struct attend_case *c, const struct attend_result *r)
{
    const struct sqz_layer *l = c->layer;
    /* How many tokens go through the rows together is the library's choice; the rows are the same for each. */
    const uint64_t selections = r->stats.n_selections;
    const uint64_t bytes = selections * l->n_rows * l->shape.head_dim * sizeof(uint16_t);
    check_true("selections", 0, (double)selections, (double)c->n_tokens * l->shape.n_head_kv,
               selections >= l->shape.n_head_kv && selections <= c->n_tokens * l->shape.n_head_kv &&
                   selections % l->shape.n_head_kv == 0);
    check_close("context bytes", 0, (double)r->stats.context_bytes, 2.0 * (double)bytes, 0);
    check_close("key bytes", 0, (double)r->stats.key_bytes,
                (double)(selections * l->n_rows * sqz_row_bytes(l->keys.type, l->shape.head_dim)), 0);
    check_close("value bytes", 0, (double)r->stats.value_bytes, (double)bytes, 0);
    check_close("centroid bytes", 0, (double)r->stats.centroid_bytes, 0, 0);
    check_close("retained keys", 0, (double)r->stats.retained_keys, (double)(selections * l->n_rows), 0);
    check_close("total keys", 0, (double)r->stats.total_keys, (double)(selections * l->n_rows), 0);
}

static void attend_dense(void **unused)
{
    (void)unused;
    static const uint32_t shapes[][3] = {{1, 1, 32},  {9, 3, 64},  {8, 2, 80},  {7, 1, 128}, {4, 4, 256},
                                         {16, 1, 32}, {17, 1, 32}, {71, 1, 64}, {40, 2, 48}};
    static const size_t rows[] = {1, 33, 127, 255, 256, 257, 700}, tokens[] = {1, 1, 3, 17, 64, 70};
    static const size_t blocks[] = {1, 4, 16, 64}, user[] = {0, 1, 5, 300};
    static const int threads[] = {1, 2, 3, 5};
    uint64_t seed = 1;
    for (size_t s = 0; s < COUNT(shapes); s++)
        for (size_t i = 0; i < 8; i++, seed++) {
            if (i != s % 8 && passed_over(seed)) continue;
            const struct sqz_layer_shape shape = make_shape(shapes[s][0], shapes[s][1], shapes[s][2]);
            const size_t n = rows[seed % COUNT(rows)], d = shape.head_dim;
            uint16_t *keys = random_halves(shape.n_head_kv * n * d, seed, 1);
            uint16_t *values = random_halves(shape.n_head_kv * n * d, seed + 50, 1);
            const struct sqz_layer layer = dense_layer(shape, keys, values, n, 0);
            struct attend_case c = {.layer = &layer,
                                    .strided = seed % 3 == 0,
                                    .n_tokens = tokens[i % COUNT(tokens)],
                                    .block_tokens = blocks[(seed / 2) % COUNT(blocks)],
                                    .n_user = user[(seed + i) % COUNT(user)],
                                    .n_context_tokens = n,
                                    .budget = i % 2 ? 1.0f : 0.05f,
                                    .n_threads = threads[seed % 4]};
            if (c.n_user && c.n_user < c.n_tokens) c.n_user = c.n_tokens + 2;
            float *queries = random_floats(c.n_tokens * shape.n_head * d, seed + 99, 1.5);
            c.queries = queries;
            if (c.n_user) make_user_rows(&c, seed + 7, 1);
            describe_attend(&c, "dense");
            struct attend_result r = attend(&c);
            check_exact("attend dense", &c, &r, 40);
            check_full_read(&c, &r);
            free_result(&r);
            if (c.n_user) free_user_rows(&c);
            free(queries);
            free(keys);
            free(values);
        }
}

/* ---- Rows that somebody else chooses ---------------------------------------------------------------- */

struct choice {
    unsigned keep; /* about one row of so many; 0: none */
};

static bool is_chosen(const struct choice *choice, uint32_t layer_index, uint32_t head, size_t row, float first_query)
{
    /* Depends on everything that a choice may depend on. */
    const size_t mixed = row * 2654435761u + head * 97 + layer_index * 31 + (first_query < 0 ? 7 : 0);
    return choice->keep && mixed % choice->keep == 0;
}

static size_t choose_rows(const void *data, const struct sqz_select_call *call, uint32_t *rows, uint64_t *index_bytes)
{
    size_t n = 0;
    memset(call->workspace, 0xff, 3 * sizeof(float)); /* its own to write to */
    for (size_t i = 0; i < call->layer->n_rows; i++)
        if (is_chosen(data, call->layer_index, call->head_kv, i, call->queries[0])) rows[n++] = (uint32_t)i;
    *index_bytes = 5;
    return n;
}

static size_t choice_workspace(const void *data, const struct sqz_layer *layer)
{
    (void)data;
    (void)layer;
    return 3 * sizeof(float);
}

static void check_chosen(const struct attend_case *c, unsigned keep)
{
    const struct sqz_layer *l = c->layer;
    const size_t d = l->shape.head_dim, h = l->shape.n_head;
    const struct choice choice = {keep};
    const struct sqz_selector selector = {choose_rows, choice_workspace, &choice};
    struct attend_result r = {take(c->n_tokens * h * d, sizeof(float)), take(c->n_tokens * h, sizeof(float)), {0}};
    struct guarded workspace =
        workspace_take(sqz_attend_selected_workspace_bytes(l, &selector, c->n_user, c->n_threads));
    struct sqz_attend_call call = plain_call(c, &r);
    call.workspace = workspace.data;
    sqz_attend_selected(&call, &selector, 3);
    guarded_free(workspace);
    uint64_t n_chosen = 0;
    for (size_t token = 0; token < c->n_tokens; token++) {
        for (size_t head = 0; head < h; head++) {
            const size_t head_kv = head / group_of(l);
            const float first = query_of(c, token, head_kv * group_of(l))[0];
            reference_reset(&reference);
            add_user_rows(c, token, head);
            size_t n = 0;
            for (size_t i = 0; i < l->n_rows; i++) {
                if (!is_chosen(&choice, 3, (uint32_t)head_kv, i, first)) continue;
                add_row(c, token, head, i);
                n++;
            }
            n_chosen += head % group_of(l) == 0 ? n : 0;
            if (n == 0 && c->n_user == 0) { /* nothing at all: zeros */
                for (size_t i = 0; i < d; i++)
                    check_close("nothing chosen", i, r.out[(token * h + head) * d + i], 0, 0);
                continue;
            }
            reference_finish(&reference, d, &wanted);
            check_output("attend chosen", r.out + (token * h + head) * d, d);
            check_close("chosen lse", head, r.lse[token * h + head], wanted.lse, wanted.tolerance);
        }
    }
    const uint64_t row_bytes = d * sizeof(uint16_t), n = c->n_tokens * l->shape.n_head_kv;
    check_close("chosen selections", 0, (double)r.stats.n_selections, (double)n, 0);
    check_close("chosen index bytes", 0, (double)r.stats.centroid_bytes, (double)(5 * n), 0);
    check_close("chosen key bytes", 0, (double)r.stats.key_bytes, (double)(n_chosen * row_bytes), 0);
    check_close("chosen value bytes", 0, (double)r.stats.value_bytes, (double)(n_chosen * row_bytes), 0);
    check_close("chosen context bytes", 0, (double)r.stats.context_bytes, (double)(n * 2 * l->n_rows * row_bytes), 0);
    free_result(&r);
}

static void attend_chosen(void **unused)
{
    (void)unused;
    static const uint32_t shapes[][3] = {{1, 1, 32}, {9, 3, 64}, {8, 2, 80}, {17, 1, 32}, {40, 2, 48}};
    static const size_t rows[] = {1, 33, 256, 700}, tokens[] = {1, 3, 17}, user[] = {0, 20, 300};
    static const unsigned keeps[] = {1, 2, 7, 0};
    uint64_t seed = 1;
    for (size_t s = 0; s < COUNT(shapes); s++)
        for (size_t i = 0; i < 8; i++, seed++) {
            if (i != s % 8 && passed_over(seed)) continue;
            const struct sqz_layer_shape shape = make_shape(shapes[s][0], shapes[s][1], shapes[s][2]);
            const size_t n = rows[seed % COUNT(rows)], d = shape.head_dim;
            uint16_t *keys = random_halves(shape.n_head_kv * n * d, seed, 1);
            uint16_t *values = random_halves(shape.n_head_kv * n * d, seed + 50, 1);
            const struct sqz_layer layer = dense_layer(shape, keys, values, n, 0);
            struct attend_case c = {.layer = &layer,
                                    .n_tokens = tokens[seed % COUNT(tokens)],
                                    .block_tokens = 1,
                                    .n_user = user[(seed / 3) % COUNT(user)],
                                    .n_context_tokens = n,
                                    .budget = 0.5f,
                                    .n_threads = 1 + (int)(seed % 3)};
            float *queries = random_floats(c.n_tokens * shape.n_head * d, seed + 99, 1.5);
            c.queries = queries;
            if (c.n_user) make_user_rows(&c, seed + 7, 1);
            describe_attend(&c, "chosen");
            check_chosen(&c, keeps[seed % COUNT(keeps)]);
            if (c.n_user) free_user_rows(&c);
            free(queries);
            free(keys);
            free(values);
        }
}

static void attend_sliding(void **unused)
{
    (void)unused;
    static const size_t windows[] = {1, 5, 40, 200}, contexts[] = {3, 39, 40, 500}, tokens[] = {1, 4, 33};
    static const size_t extra[] = {0, 3, 90};
    uint64_t seed = 1;
    for (size_t w = 0; w < COUNT(windows); w++)
        for (size_t n = 0; n < COUNT(contexts); n++)
            for (size_t t = 0; t < COUNT(tokens); t++)
                for (size_t e = 0; e < COUNT(extra); e++, seed++) {
                    if (passed_over(seed)) continue;
                    const struct sqz_layer_shape shape = make_shape(seed % 5 == 0 ? 20 : 4, seed % 2 + 1, 32);
                    const size_t rows = contexts[n] < windows[w] ? contexts[n] : windows[w];
                    uint16_t *keys = random_halves(shape.n_head_kv * rows * 32, seed, 1);
                    uint16_t *values = random_halves(shape.n_head_kv * rows * 32, seed + 1, 1);
                    const struct sqz_layer layer = dense_layer(shape, keys, values, rows, windows[w]);
                    struct attend_case c = {.layer = &layer,
                                            .n_tokens = tokens[t],
                                            .block_tokens = seed % 3 ? 16 : 1,
                                            .n_user = tokens[t] + extra[e],
                                            .n_context_tokens = contexts[n],
                                            .budget = 0.1f,
                                            .n_threads = (int)(seed % 3) + 1};
                    float *queries = random_floats(c.n_tokens * shape.n_head * 32, seed + 2, 1.5);
                    c.queries = queries;
                    make_user_rows(&c, seed + 3, 1);
                    describe_attend(&c, "sliding");
                    struct attend_result r = attend(&c);
                    check_exact("attend sliding", &c, &r, 30);
                    /* They cost the same at any context length, so they do not count. */
                    check_close("selections of a window layer", 0, (double)r.stats.n_selections, 0, 0);
                    check_close("bytes of a window layer", 0, (double)(r.stats.key_bytes + r.stats.context_bytes), 0,
                                0);
                    free_result(&r);
                    free_user_rows(&c);
                    free(queries);
                    free(keys);
                    free(values);
                }
}

/* ---- Clustered ---------------------------------------------------------------------------------------- */

struct clustered {
    struct material material;
    struct sqz_layer *layer;
    struct sqz_rows twice; /* keys again as INT8, of a layer that has F16 ones as well */
};

static struct clustered make_clustered(struct sqz_layer_shape shape, size_t n_rows, const struct sqz_squeeze_options *o,
                                       uint64_t seed)
{
    struct clustered c = {make_material(shape, n_rows, 24, seed), NULL, {.type = SQZ_ROW_NONE}};
    struct sqz_error error;
    float *queries = make_queries(&c.material, 24, seed + 5, 0.5);
    if (sqz_layer_create(&c.layer, &shape, c.material.keys, c.material.values, n_rows, queries, 24, o, 2, &error))
        fail_msg("sqz_layer_create: %s", error.message);
    free(queries);
    assert_true(c.layer->n_levels > 0);
    return c;
}

static void free_clustered(struct clustered *c)
{
    free_material(&c->material);
    sqz_layer_free(c->layer);
    free((void *)(uintptr_t)c->twice.data);
    free((void *)(uintptr_t)c->twice.scale);
    free((void *)(uintptr_t)c->twice.mean);
}

static struct sqz_squeeze_options small_options(void)
{
    struct sqz_squeeze_options o;
    sqz_squeeze_options_default(&o, SQZ_RULE_DEFAULT);
    o.n_window = 20;
    o.n_sinks = 4;
    o.n_iterations = 5;
    o.value_skip = false;
    return o;
}

/* What one KV head selected for tokens [first, first + n) of a call, recomputed from the exact base. */
struct recount {
    struct sqz_selection selection;
    struct guarded workspace;
    struct sqz_head_plan plan;
    size_t n_value_centroids, fewest_values, most_values;
};

/* retained: SIZE_MAX to apply the plan's threshold, else the rows that the call says it retained. */
static void select_again(const struct attend_case *c, uint32_t head_kv, size_t first, size_t n, size_t retained,
                         struct recount *again)
{
    const struct sqz_layer *l = c->layer;
    const size_t d = l->shape.head_dim, group = group_of(l), rows = n * group;
    float *queries = take(rows * d, sizeof *queries), *norms = take(rows, sizeof *norms),
          *base = take(rows, sizeof *base);
    for (size_t r = 0; r < rows; r++) {
        const size_t token = first + r / group, head = head_kv * group + r % group;
        const float *q = query_of(c, token, head);
        double norm = 0;
        for (size_t i = 0; i < d; i++) norm += (double)q[i] * q[i];
        memcpy(queries + r * d, q, d * sizeof *q);
        norms[r] = (float)norm;
        reference_reset(&reference);
        add_user_rows(c, token, head);
        for (size_t i = 0; i < l->n_fixed; i++) add_row(c, token, head, i);
        base[r] = (float)reference_lse(&reference);
    }
    again->plan = sqz_head_plan_at(l, head_kv, c->budget, c->log_offset);
    struct sqz_head_plan plan = again->plan;
    if (retained == 0) plan.log_threshold = 50;
    /* A block that retains a number of rows chooses clusters, also where that number is none. */
    struct sqz_layer plain = *l;
    if (retained != SIZE_MAX) plain.codes = (struct sqz_codes){0};
    again->workspace = workspace_take(sqz_lookup_workspace_bytes(&plain, rows));
    sqz_lookup(&again->selection, &plain, head_kv, &plan, queries, norms, rows, l->rule == SQZ_RULE_PAPER ? NULL : base,
               retained == SIZE_MAX ? 0 : retained, again->workspace.data);
    free(queries);
    free(norms);
    free(base);
}

/* Exact attention over what was selected for row r of the selection, and the tail. */
static void add_selected(const struct attend_case *c, const struct recount *again, size_t r, size_t token, size_t head)
{
    const struct sqz_layer *l = c->layer;
    const struct sqz_selection *s = &again->selection;
    const size_t d = l->shape.head_dim;
    reference_reset(&reference);
    add_user_rows(c, token, head);
    for (size_t i = 0; i < l->n_fixed; i++) add_row(c, token, head, i);
    for (size_t i = 0; i < s->n_ranges; i++)
        for (size_t row = s->ranges[i].begin; row < s->ranges[i].end; row++) add_row(c, token, head, row);
    for (size_t p = 0; l->tail && p < s->n_pruned; p++) {
        const struct sqz_level *level = &l->level[s->pruned_level[p]];
        const size_t at = head / group_of(l) * level->n_clusters + s->pruned_cluster[p];
        reference_add_logit(&reference,
                            s->pruned_logit[r * s->pruned_stride + p] +
                                log((double)s->pruned_keys[r * s->pruned_stride + p]),
                            sqz_rows_f16(&level->value_centroids) + at * d);
    }
}

/* Value rows and value centroids that skipping leaves, by the documented rule: a weight relative to the estimated
 * denominator of at least SQZ_VALUE_SKIP thresholds in one head of the group. Rows within 1e-3 of the limit may go
 * either way. */
static void count_values(const struct attend_case *c, struct recount *again, uint32_t head_kv, size_t token,
                         size_t *fewest_centroids, size_t *most_centroids)
{
    const struct sqz_layer *l = c->layer;
    const struct sqz_selection *s = &again->selection;
    const size_t group = group_of(l);
    const double limit = l->value_skip ? (double)SQZ_VALUE_SKIP * exp((double)again->plan.log_threshold) : 0;
    /* Heads that skipping leaves with nothing read the fixed rows after all. A row kept for one head of the group
     * counts for all. */
    bool any = !l->value_skip || c->n_user > 0;
    for (size_t g = 0; !any && g < group; g++) {
        add_selected(c, again, g, token, head_kv * group + g);
        for (size_t i = 0; i < reference.n; i++) any |= exp(reference.logit[i] - s->log_total[g]) >= limit;
    }
    again->fewest_values = again->most_values = any ? 0 : group * l->n_fixed;
    for (size_t i = 0; i <= s->n_ranges; i++) {
        const size_t begin = i ? s->ranges[i - 1].begin : 0, end = i ? s->ranges[i - 1].end : l->n_fixed;
        for (size_t row = begin; row < end; row++) {
            double best = 0;
            for (size_t g = 0; g < group; g++) {
                const double x = row_logit(c, token, head_kv * group + g, row, NULL);
                best = fmax(best, exp(x - s->log_total[g]));
            }
            again->fewest_values += best >= limit * 1.001;
            again->most_values += best >= limit * 0.999;
        }
    }
    *fewest_centroids = *most_centroids = 0;
    for (size_t p = 0; l->tail && p < s->n_pruned; p++) {
        double best = 0;
        for (size_t g = 0; g < group; g++)
            best = fmax(best, exp((double)s->pruned_logit[g * s->pruned_stride + p] - s->log_total[g]) *
                                  s->pruned_keys[g * s->pruned_stride + p]);
        *fewest_centroids += best >= limit * 1.001;
        *most_centroids += best >= limit * 0.999;
    }
}

/* One token, or tokens that each select for themselves: output and bytes against the selection done again. */
static void check_rows_path(const struct attend_case *c)
{
    const struct sqz_layer *l = c->layer;
    const size_t row_bytes = l->shape.head_dim * sizeof(uint16_t), d = l->shape.head_dim;
    struct attend_result r = attend(c);
    uint64_t keys = 0, centroids = 0, codes = 0, coded_keys = 0, fewest = 0, most = 0, fewest_tail = 0, most_tail = 0;
    for (size_t token = 0; token < c->n_tokens; token++)
        for (uint32_t k = 0; k < l->shape.n_head_kv; k++) {
            struct recount again;
            size_t low, high;
            select_again(c, k, token, 1, SIZE_MAX, &again);
            count_values(c, &again, k, token, &low, &high);
            keys += l->n_fixed + again.selection.n_retained;
            centroids += again.selection.n_centroids_read;
            codes += again.selection.n_codes_read * sqz_code_key_bytes(&l->codes) + sqz_code_head_bytes(l);
            coded_keys += again.selection.n_codes_read;
            fewest += again.fewest_values;
            most += again.most_values;
            fewest_tail += low;
            most_tail += high;
            for (size_t g = 0; g < group_of(l); g++) {
                const size_t head = k * group_of(l) + g, at = token * l->shape.n_head + head;
                add_selected(c, &again, g, token, head);
                if (l->value_skip) {
                    /* Every row or centroid left out weighs less than the limit of the estimated denominator. */
                    reference_finish(&reference, d, &wanted);
                    const double limit = (double)SQZ_VALUE_SKIP * exp((double)again.plan.log_threshold);
                    const double lost =
                        1.001 * limit * (double)reference.n * exp((double)again.selection.log_total[g] - wanted.lse);
                    for (size_t i = 0; i < d; i++)
                        check_close("attend, values skipped", i, r.out[at * d + i], wanted.out[i],
                                    2 * 5 * lost + wanted.out_tolerance[i]);
                    check_true("lse, values skipped", at, r.lse[at], wanted.lse,
                               r.lse[at] <= wanted.lse + wanted.tolerance &&
                                   r.lse[at] >= wanted.lse + log1p(-fmin(lost, 0.999999)) - wanted.tolerance);
                } else if (reference.n) {
                    check_token("attend, selected rows", c, &r, token, head);
                } else {
                    check_close("attend, nothing at all: lse", at, r.lse[at], (double)-INFINITY, 0);
                    for (size_t i = 0; i < d; i++) check_close("attend, nothing at all", i, r.out[at * d + i], 0, 0);
                }
            }
            guarded_free(again.workspace);
        }
    const uint64_t n = c->n_tokens * l->shape.n_head_kv, all = n * l->n_rows;
    check_close("selections", 0, (double)r.stats.n_selections, (double)n, 0);
    check_close("context bytes", 0, (double)r.stats.context_bytes, 2.0 * (double)(all * row_bytes), 0);
    check_close("retained keys", 0, (double)r.stats.retained_keys, (double)keys, 0);
    check_close("total keys", 0, (double)r.stats.total_keys, (double)all, 0);
    check_close("keys whose codes were read", 0, (double)r.stats.coded_keys, (double)coded_keys, 0);
    const uint64_t fixed_keys = n * l->n_fixed;
    check_close("key bytes", 0, (double)r.stats.key_bytes,
                (double)(fixed_keys * sqz_row_bytes(l->keys.type, d) +
                         (keys - fixed_keys) * sqz_row_bytes(sqz_retained_keys(l)->type, d)),
                0);
    check_true("value bytes", 0, (double)r.stats.value_bytes, (double)(fewest * row_bytes),
               r.stats.value_bytes >= fewest * row_bytes && r.stats.value_bytes <= most * row_bytes);
    const size_t numbers = l->level[0].centroids.type == SQZ_ROW_I8 ? d + sizeof(float) : row_bytes;
    const uint64_t fixed = centroids * (numbers + sizeof(uint32_t) + sizeof(float)) + codes;
    check_true("centroid bytes", 0, (double)r.stats.centroid_bytes, (double)(fixed + fewest_tail * row_bytes),
               r.stats.centroid_bytes >= fixed + fewest_tail * row_bytes &&
                   r.stats.centroid_bytes <= fixed + most_tail * row_bytes);
    free_result(&r);
}

/* One block of one KV head: the rows it says it retained are those of the highest scores. */
static void check_block_path(const struct attend_case *c)
{
    const struct sqz_layer *l = c->layer;
    const size_t row_bytes = l->shape.head_dim * sizeof(uint16_t);
    assert_int_equal(l->shape.n_head_kv, 1);
    struct attend_result r = attend(c);
    struct recount again;
    const size_t retained = (size_t)r.stats.retained_keys - l->n_fixed;
    /* As published a block applies the threshold; else it retains as many rows as its share of the bytes allows. */
    select_again(c, 0, 0, c->n_tokens, l->rule == SQZ_RULE_PAPER ? SIZE_MAX : retained, &again);
    check_close("retained rows of a block", 0, (double)again.selection.n_retained, (double)retained, 0);
    for (size_t token = 0; token < c->n_tokens; token++)
        for (size_t head = 0; head < l->shape.n_head; head++) {
            add_selected(c, &again, token * l->shape.n_head + head, token, head);
            check_token("attend, block", c, &r, token, head);
        }
    check_close("selections", 0, (double)r.stats.n_selections, 1, 0);
    check_close("key bytes", 0, (double)r.stats.key_bytes,
                (double)(r.stats.retained_keys * sqz_row_bytes(l->keys.type, l->shape.head_dim)), 0);
    check_close("value bytes", 0, (double)r.stats.value_bytes, (double)(r.stats.retained_keys * row_bytes), 0);
    if (!l->value_skip)
        check_close("centroid bytes", 0, (double)r.stats.centroid_bytes,
                    (double)(again.selection.n_centroids_read * sqz_centroid_bytes(l) +
                             again.selection.code_bytes_read + (l->tail ? again.selection.n_pruned : 0) * row_bytes),
                    0);
    guarded_free(again.workspace);
    free_result(&r);
}

struct variation {
    uint32_t n_head, n_head_kv, head_dim, n_levels;
    bool tail, value_skip, per_head;
    enum sqz_group group;
    enum sqz_rule rule;
    size_t n_rows;
    enum sqz_index index, keys;
    uint32_t code_words;
};

#define KEYS_TWICE ((enum sqz_index)2) /* F16, and INT8 beside them */

static const struct variation variations[] = {
    {4, 2, 64, 1, true, true, true, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 900, SQZ_INDEX_INT8, SQZ_INDEX_INT8, 0},
    {3, 1, 80, 2, true, false, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 1000, SQZ_INDEX_F16, SQZ_INDEX_INT8, 0},
    {4, 2, 64, 1, true, false, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 900, SQZ_INDEX_F16, SQZ_INDEX_F16, 0},
    {4, 2, 64, 1, true, true, true, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 900, SQZ_INDEX_F16, SQZ_INDEX_F16, 0},
    {6, 2, 32, 2, true, false, false, SQZ_GROUP_MAX, SQZ_RULE_DEFAULT, 1200, SQZ_INDEX_F16, SQZ_INDEX_F16, 0},
    {6, 2, 32, 2, true, true, false, SQZ_GROUP_MAX, SQZ_RULE_DEFAULT, 1200, SQZ_INDEX_F16, SQZ_INDEX_F16, 0},
    {3, 1, 80, 3, false, false, true, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 1500, SQZ_INDEX_F16, SQZ_INDEX_F16, 0},
    {7, 1, 48, 1, false, true, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 700, SQZ_INDEX_F16, SQZ_INDEX_F16, 0},
    {8, 2, 64, 1, false, false, false, SQZ_GROUP_MEAN, SQZ_RULE_PAPER, 800, SQZ_INDEX_F16, SQZ_INDEX_F16, 0},
    {3, 1, 80, 2, true, false, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 1000, SQZ_INDEX_F16, KEYS_TWICE, 0},
    {71, 1, 64, 1, true, false, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 600, SQZ_INDEX_F16, SQZ_INDEX_INT8, 0},
    {8, 2, 64, 1, false, false, false, SQZ_GROUP_MEAN, SQZ_RULE_PAPER, 800, SQZ_INDEX_F16, SQZ_INDEX_INT8, 0},
    {16, 1, 32, 1, true, false, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 600, SQZ_INDEX_F16, SQZ_INDEX_F16, 0},
    {71, 1, 64, 1, true, false, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 600, SQZ_INDEX_F16, SQZ_INDEX_F16, 0},
    /* Single keys by their codes. */
    {4, 2, 64, 1, true, true, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 900, SQZ_INDEX_INT8, SQZ_INDEX_F16, 1},
    {4, 2, 64, 1, true, false, true, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 900, SQZ_INDEX_INT8, SQZ_INDEX_INT8, 1},
    {3, 1, 80, 2, true, false, false, SQZ_GROUP_MAX, SQZ_RULE_DEFAULT, 1000, SQZ_INDEX_F16, SQZ_INDEX_F16, 2},
    {7, 1, 48, 3, true, true, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 1200, SQZ_INDEX_INT8, SQZ_INDEX_F16, 3},
    {16, 1, 32, 1, false, false, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 600, SQZ_INDEX_F16, SQZ_INDEX_F16, 4},
    {2, 1, 256, 1, true, false, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 500, SQZ_INDEX_INT8, SQZ_INDEX_F16, 1},
    {8, 2, 64, 1, false, false, false, SQZ_GROUP_MEAN, SQZ_RULE_PAPER, 800, SQZ_INDEX_F16, SQZ_INDEX_F16, 1},
    {17, 1, 32, 1, true, false, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 600, SQZ_INDEX_F16, SQZ_INDEX_F16, 1},
};

/* Where a test begins that takes every stride()-th variation: not all tests take the same. */
static size_t first(size_t number)
{
    return number % stride();
}

static struct sqz_squeeze_options variation_options(const struct variation *v)
{
    struct sqz_squeeze_options o = small_options();
    o.rule = v->rule;
    o.n_levels = v->n_levels;
    o.centroid_share[0] = v->n_levels > 1 ? 0.1f : 0.05f;
    o.centroid_share[1] = 0.03f;
    o.centroid_share[2] = 0.01f;
    o.tail = v->tail;
    o.value_skip = v->value_skip;
    o.index = v->index;
    o.keys = v->keys == SQZ_INDEX_INT8 ? SQZ_INDEX_INT8 : SQZ_INDEX_F16;
    o.code_words = v->code_words;
    o.per_head = v->per_head;
    o.group = v->group;
    o.variance = v->rule == SQZ_RULE_DEFAULT;
    return o;
}

/* INT8 keys beside the F16 ones, as files of version 2 have them. */
static void keep_keys_twice(struct clustered *c)
{
    struct sqz_layer *l = c->layer;
    const size_t k = l->shape.n_head_kv, d = l->shape.head_dim, n = l->n_rows;
    float row[MAX_HEAD_DIM];
    c->twice = (struct sqz_rows){.type = SQZ_ROW_I8,
                                 .data = take(k * n, d),
                                 .scale = take(k * n, sizeof(float)),
                                 .mean = random_floats(k * d, 3, 0.2)};
    for (size_t h = 0; h < k; h++) {
        const struct sqz_rows from = sqz_rows_of_head(&l->keys, n, d, h), to = sqz_rows_of_head(&c->twice, n, d, h);
        for (size_t i = 0; i < n; i++) {
            sqz_rows_to_f32(row, &from, i, 1, d);
            sqz_rows_store(&to, i, row, d);
        }
    }
    l->retained_keys = c->twice;
}

static struct clustered make_variation(const struct variation *v, uint64_t seed)
{
    const struct sqz_squeeze_options o = variation_options(v);
    struct clustered c = make_clustered(make_shape(v->n_head, v->n_head_kv, v->head_dim), v->n_rows, &o, seed);
    if (v->keys == KEYS_TWICE) keep_keys_twice(&c);
    return c;
}

static void attend_selected_rows(void **unused)
{
    (void)unused;
    static const float budgets[] = {0.08f, 0.2f, 0.5f};
    static const size_t user[] = {0, 40, 300};
    for (size_t v = first(0); v < COUNT(variations); v += stride()) {
        if (variations[v].n_head / variations[v].n_head_kv > SQZ_MAX_GROUP_QUERIES) continue;
        struct clustered made = make_variation(&variations[v], 40 + v);
        for (size_t i = 0; i < 6; i++) {
            struct attend_case c = {.layer = made.layer,
                                    .n_tokens = i < 4 ? 1 : 5,
                                    .block_tokens = 1,
                                    .n_user = user[i % 3],
                                    .n_context_tokens = variations[v].n_rows,
                                    .budget = budgets[(i + v) % 3],
                                    .log_offset = i == 3 ? 0.7f : 0,
                                    .n_threads = (int)(i % 3) + 1,
                                    .strided = i % 2 == 1};
            float *queries = make_queries(&made.material, c.n_tokens, 900 + 10 * v + i, 0.4 + 0.2 * (double)(i % 3));
            c.queries = queries;
            if (c.n_user) make_user_rows(&c, 70 + i, 1);
            describe_attend(&c, "rows");
            check_rows_path(&c);
            if (c.n_user) free_user_rows(&c);
            free(queries);
        }
        free_clustered(&made);
    }
}

static void attend_selected_block(void **unused)
{
    (void)unused;
    static const struct variation shapes[] = {
        {3, 1, 64, 1, true, false, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 800, SQZ_INDEX_F16, SQZ_INDEX_F16, 0},
        {4, 1, 32, 1, false, false, true, SQZ_GROUP_MAX, SQZ_RULE_DEFAULT, 800, SQZ_INDEX_F16, SQZ_INDEX_F16, 0},
        {71, 1, 64, 1, true, false, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 600, SQZ_INDEX_F16, SQZ_INDEX_F16, 0},
        {2, 1, 80, 1, false, false, false, SQZ_GROUP_MEAN, SQZ_RULE_PAPER, 700, SQZ_INDEX_F16, SQZ_INDEX_F16, 0},
        {3, 1, 64, 1, true, false, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 800, SQZ_INDEX_INT8, SQZ_INDEX_F16, 1},
        {2, 1, 80, 1, true, false, false, SQZ_GROUP_MEAN, SQZ_RULE_PAPER, 700, SQZ_INDEX_F16, SQZ_INDEX_F16, 1},
        {3, 1, 64, 1, true, false, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 800, SQZ_INDEX_F16, SQZ_INDEX_INT8, 0},
        {3, 1, 64, 1, true, false, false, SQZ_GROUP_MEAN, SQZ_RULE_DEFAULT, 800, SQZ_INDEX_F16, KEYS_TWICE, 0},
    };
    static const size_t tokens[] = {2, 4, 16, 33, 64}, user[] = {0, 64, 150};
    static const float budgets[] = {0.1f, 0.3f};
    for (size_t v = 0; v < COUNT(shapes); v++) {
        struct clustered made = make_variation(&shapes[v], 60 + v);
        for (size_t i = 0; i < 6; i++) {
            if (i != v % 6 && passed_over(6 * v + i)) continue;
            struct attend_case c = {.layer = made.layer,
                                    .block_tokens = 64,
                                    .n_context_tokens = shapes[v].n_rows,
                                    .n_user = user[i % 3],
                                    .budget = budgets[i % 2],
                                    .n_threads = (int)(i % 2) + 1,
                                    .log_offset = i == 4 ? -0.5f : 0,
                                    .strided = i % 2 == 0};
            c.n_tokens = shapes[v].n_head > 16 ? (i == 0 ? 1 : i % 3 + 1) : tokens[i % COUNT(tokens)];
            float *queries = make_queries(&made.material, c.n_tokens, 300 + 10 * v + i, 0.5);
            c.queries = queries;
            if (c.n_user) make_user_rows(&c, 70 + i, 1);
            describe_attend(&c, "block");
            check_block_path(&c);
            if (c.n_user) free_user_rows(&c);
            free(queries);
        }
        free_clustered(&made);
    }
}

/* ---- What is announced before it is read ---------------------------------------------------------- */

/* Bytes that were announced, of each array that rows are read of. */
static struct announced {
    const char *begin;
    size_t bytes;
    unsigned char *told; /* [bytes] */
} announced[3];

static void note_announced(const void *begin, size_t bytes)
{
    for (size_t i = 0; i < COUNT(announced); i++) {
        struct announced *a = &announced[i];
        if (!a->begin || (const char *)begin < a->begin || (const char *)begin >= a->begin + a->bytes) continue;
        check_true("announced bytes are of one array", i, (double)bytes, (double)a->bytes,
                   (size_t)((const char *)begin - a->begin) + bytes <= a->bytes);
        memset(a->told + ((const char *)begin - a->begin), 1, bytes);
        return;
    }
    fail_msg("%zu bytes were announced that are not the layer's", bytes);
}

static size_t count_announced(const struct announced *a, size_t row_bytes)
{
    size_t n = 0;
    for (size_t i = 0; a->begin && i < a->bytes; i += row_bytes) n += a->told[i];
    return n;
}

/* One selection a head, so that what it retains beside the fixed rows has been announced, in keys as in values; and the
 * result is the same to the bit. */
static void check_announced(const struct attend_case *quiet)
{
    struct sqz_layer layer = *quiet->layer;
    struct attend_case c = *quiet;
    const size_t d = layer.shape.head_dim, rows = (size_t)layer.shape.n_head_kv * layer.n_rows;
    const struct sqz_rows *const arrays[] = {&layer.keys, &layer.values, &layer.retained_keys};
    for (size_t i = 0; i < COUNT(arrays); i++) {
        const size_t bytes = rows * sqz_row_data_bytes(arrays[i]->type, d);
        announced[i] = (struct announced){arrays[i]->data, bytes, take(bytes, 1)};
        memset(announced[i].told, 0, bytes);
    }
    struct attend_result before = attend(quiet);
    layer.will_read = note_announced;
    c.layer = &layer;
    struct attend_result r = attend(&c);
    assert_memory_equal(r.out, before.out, c.n_tokens * layer.shape.n_head * d * sizeof *r.out);
    const size_t keys = count_announced(&announced[0], sqz_row_data_bytes(layer.keys.type, d)) +
                        count_announced(&announced[2], sqz_row_data_bytes(layer.retained_keys.type, d));
    const size_t retained = r.stats.retained_keys - (size_t)layer.shape.n_head_kv * layer.n_fixed;
    check_true("retained rows are announced", 0, (double)keys, (double)retained, retained > 0 && keys >= retained);
    check_close("values as keys", 0, (double)count_announced(&announced[1], 2 * d), (double)keys, 0);
    for (size_t i = 0; i < COUNT(arrays); i++) free(announced[i].told);
    free_result(&before);
    free_result(&r);
}

static void attend_announced(void **unused)
{
    (void)unused;
    for (size_t v = first(1); v < COUNT(variations); v += stride()) {
        struct clustered made = make_variation(&variations[v], 90 + v);
        for (size_t i = 0; i < 2; i++) {
            struct attend_case c = {.layer = made.layer,
                                    .n_tokens = i ? 3 : 1,
                                    .block_tokens = i ? 4 : 1,
                                    .n_context_tokens = variations[v].n_rows,
                                    .budget = 0.3f,
                                    .n_threads = 1};
            float *queries = make_queries(&made.material, c.n_tokens, 500 + 10 * v + i, 0.5);
            c.queries = queries;
            describe_attend(&c, "announced");
            check_announced(&c);
            free(queries);
        }
        free_clustered(&made);
    }
}

/* Budget 1 is dense; and so is a threshold that nothing fails, where every row makes its own selection. */
static void attend_everything(void **unused)
{
    (void)unused;
    static const size_t tokens[] = {1, 1, 6, 20, 40}, blocks[] = {1, 64, 1, 4, 16};
    for (size_t v = first(2); v < COUNT(variations); v += stride()) {
        struct clustered made = make_variation(&variations[v], 20 + v);
        for (size_t i = 0; i < COUNT(tokens); i++) {
            struct attend_case c = {.layer = made.layer,
                                    .n_tokens = tokens[i],
                                    .block_tokens = blocks[i],
                                    .n_user = i % 2 ? 45 : 0,
                                    .n_context_tokens = variations[v].n_rows,
                                    .budget = 1,
                                    .log_offset = i == 1 ? 5 : 0,
                                    .n_threads = (int)(i % 3) + 1};
            float *queries = make_queries(&made.material, c.n_tokens, 500 + i, 0.15);
            c.queries = queries;
            if (c.n_user) make_user_rows(&c, 9, 1);
            describe_attend(&c, "budget 1");
            struct attend_result r = attend(&c);
            check_exact("attend, budget 1", &c, &r, 24);
            check_full_read(&c, &r);
            free_result(&r);
            const bool rows = (c.n_tokens == 1 || c.block_tokens == 1) && group_of(made.layer) <= SQZ_MAX_GROUP_QUERIES;
            if (rows && !made.layer->value_skip) {
                c.budget = 0.5f;
                c.log_offset = -100;
                describe_attend(&c, "lowest threshold");
                r = attend(&c);
                check_exact("attend, lowest threshold", &c, &r, 24);
                check_close("retained keys", 0, (double)r.stats.retained_keys, (double)r.stats.total_keys, 0);
                free_result(&r);
            }
            if (c.n_user) free_user_rows(&c);
            free(queries);
        }
        free_clustered(&made);
    }
}

/* A threshold that nothing passes: fixed and user rows, and the tail; with none of these, zeros. */
static void attend_nothing_retained(void **unused)
{
    (void)unused;
    for (size_t v = first(3); v < COUNT(variations); v += stride()) {
        struct clustered made = make_variation(&variations[v], 80 + v);
        for (size_t i = 0; i < 4; i++) {
            struct attend_case c = {.layer = made.layer,
                                    .n_tokens = i < 2 ? 1 : 3,
                                    .block_tokens = 1,
                                    .n_user = i % 2 ? 30 : 0,
                                    .n_context_tokens = variations[v].n_rows,
                                    .budget = 0.1f,
                                    .log_offset = 1000,
                                    .n_threads = (int)i + 1};
            if (group_of(made.layer) > SQZ_MAX_GROUP_QUERIES) c.n_tokens = 1;
            float *queries = make_queries(&made.material, c.n_tokens, 40 + i, 0.3);
            c.queries = queries;
            if (c.n_user) make_user_rows(&c, 9, 1);
            describe_attend(&c, "nothing retained");
            if (group_of(made.layer) <= SQZ_MAX_GROUP_QUERIES) {
                struct attend_result r = attend(&c);
                check_close("retained keys", 0, (double)r.stats.retained_keys,
                            (double)(r.stats.n_selections * made.layer->n_fixed), 0);
                free_result(&r);
                check_rows_path(&c);
            } else {
                check_block_path(&c);
            }
            if (c.n_user) free_user_rows(&c);
            free(queries);
        }
        free_clustered(&made);
    }
    struct sqz_squeeze_options o = small_options();
    o.n_sinks = o.n_window = 0;
    o.tail = false;
    struct clustered made = make_clustered(make_shape(4, 2, 32), 300, &o, 5);
    for (size_t n_user = 0; n_user < 8; n_user += 7) {
        float *queries = make_queries(&made.material, 1, 8, 0.1);
        struct attend_case c = {.layer = made.layer,
                                .queries = queries,
                                .n_tokens = 1,
                                .block_tokens = 1,
                                .n_user = n_user,
                                .n_context_tokens = 300,
                                .budget = 0.1f,
                                .log_offset = 1000,
                                .n_threads = 3};
        if (n_user) make_user_rows(&c, 4, 1);
        describe_attend(&c, "nothing at all");
        check_rows_path(&c);
        if (n_user) free_user_rows(&c);
        free(queries);
    }
    free_clustered(&made);
}

/* Any number of threads reads the same rows and gives the same bits. */
static void attend_threads(void **unused)
{
    (void)unused;
    static const int threads[] = {2, 3, 5};
    static const size_t tokens[] = {1, 7, 70}, blocks[] = {64, 1, 16};
    for (size_t v = first(4); v < COUNT(variations); v += stride()) {
        struct clustered made = make_variation(&variations[v], 120 + v);
        const size_t d = made.layer->shape.head_dim, h = made.layer->shape.n_head;
        for (size_t i = 0; i < COUNT(tokens); i++) {
            struct attend_case c = {.layer = made.layer,
                                    .n_tokens = tokens[i],
                                    .block_tokens = blocks[i],
                                    .n_user = 80,
                                    .n_context_tokens = variations[v].n_rows,
                                    .budget = 0.3f,
                                    .n_threads = 1};
            if (h > 16 && c.n_tokens > 20) c.n_tokens = 20;
            float *queries = make_queries(&made.material, c.n_tokens, 900 + i, 0.5);
            c.queries = queries;
            make_user_rows(&c, 9, 1);
            describe_attend(&c, "threads");
            struct attend_result one = attend(&c);
            for (size_t t = 0; t < COUNT(threads); t++) {
                c.n_threads = threads[t];
                describe_attend(&c, "threads");
                struct attend_result r = attend(&c);
                assert_memory_equal(&r.stats, &one.stats, sizeof r.stats);
                /* Sums are parted the same way for any number of threads. */
                for (size_t j = 0; j < c.n_tokens * h * d; j++) check_close("threads", j, r.out[j], one.out[j], 0);
                for (size_t j = 0; j < c.n_tokens * h; j++) check_close("threads, lse", j, r.lse[j], one.lse[j], 0);
                free_result(&r);
            }
            free_result(&one);
            free_user_rows(&c);
            free(queries);
        }
        free_clustered(&made);
    }
}

/* The map of a token whose every head has had its turn. */
static struct sqz_attention_map *make_map(struct attend_case *c, int n_threads)
{
    struct sqz_attention_map *map = calloc(1, sizeof *map + c->n_context_tokens * sizeof *map->mass);
    assert_non_null(map);
    c->map = map;
    c->n_threads = n_threads;
    for (c->map_turn = 0; c->map_turn < SQZ_MAP_TURNS; c->map_turn++) {
        struct attend_result r = attend(c);
        free_result(&r);
    }
    c->map = NULL;
    return map;
}

/* Adds what a row of a head weighs at its position, and how far off that may be. */
static void add_expected(const struct attend_case *c, size_t head, size_t row, const float *lse, double *expected,
                         double *tolerance)
{
    const struct sqz_layer *l = c->layer;
    const size_t at = (size_t)l->position[head / group_of(l) * l->n_rows + row];
    double magnitude = 0;
    const double weight = exp(row_logit(c, 0, head, row, &magnitude) - (double)lse[head]);
    expected[at] += weight;
    /* The logit, that of the denominator, exponentials and sums as in layer_fixture.h; weights below 2^-24 are left out. */
    tolerance[at] += weight * UNIT * (2 * (l->shape.head_dim + 2) * magnitude + l->n_rows + 16) + UNIT;
}

static void check_map(struct attend_case *c)
{
    const struct sqz_layer *l = c->layer;
    double *expected = calloc(c->n_context_tokens, sizeof *expected);
    double *tolerance = calloc(c->n_context_tokens, sizeof *tolerance);
    assert_true(expected && tolerance);
    struct sqz_attention_map *one = make_map(c, 1), *many = make_map(c, 3);
    struct attend_result r = attend(c);
    const bool dense = c->budget == 1;
    for (uint32_t k = 0; k < l->shape.n_head_kv; k++) {
        struct recount again;
        if (!dense) select_again(c, k, 0, 1, SIZE_MAX, &again);
        for (size_t h = k * group_of(l); h < (k + 1) * group_of(l); h++) {
            for (size_t row = 0; row < (dense ? l->n_rows : l->n_fixed); row++)
                add_expected(c, h, row, r.lse, expected, tolerance);
            for (size_t i = 0; !dense && i < again.selection.n_ranges; i++)
                for (size_t row = again.selection.ranges[i].begin; row < again.selection.ranges[i].end; row++)
                    add_expected(c, h, row, r.lse, expected, tolerance);
        }
        if (!dense) guarded_free(again.workspace);
    }
    assert_int_equal(one->n_queries, l->shape.n_head);
    for (size_t i = 0; i < c->n_context_tokens; i++) {
        check_close("map", i, (double)one->mass[i] * SQZ_MAP_UNIT, expected[i], tolerance[i]);
        assert_int_equal(one->mass[i], many->mass[i]);
    }
    free_result(&r);
    free(expected);
    free(tolerance);
    free(one);
    free(many);
}

/* The map has the weight of every row that was read at its position, whatever the rows are kept as. */
static void attend_maps(void **unused)
{
    (void)unused;
    static const float budgets[] = {0.2f, 1};
    for (size_t v = first(5); v < COUNT(variations); v += stride()) {
        if (variations[v].n_head / variations[v].n_head_kv > SQZ_MAX_GROUP_QUERIES) continue;
        struct clustered made = make_variation(&variations[v], 160 + v);
        for (size_t b = 0; b < COUNT(budgets); b++) {
            struct attend_case c = {.layer = made.layer,
                                    .n_tokens = 1,
                                    .block_tokens = 1,
                                    .n_user = 30,
                                    .n_context_tokens = variations[v].n_rows,
                                    .budget = budgets[b]};
            float *queries = make_queries(&made.material, 1, 990 + v, 0.5);
            c.queries = queries;
            make_user_rows(&c, 11, 1);
            describe_attend(&c, "map");
            check_map(&c);
            free_user_rows(&c);
            free(queries);
        }
        free_clustered(&made);
    }
}

enum { MOST_CALLS = 24 };

static void check_batch(const struct attend_case *cases, const struct attend_result *alone, size_t n, int n_threads)
{
    struct sqz_attend_call calls[MOST_CALLS];
    struct attend_result together[MOST_CALLS];
    size_t thread_bytes = 0;
    for (size_t i = 0; i < n; i++) {
        const struct attend_case *c = &cases[i];
        const size_t rows = c->n_tokens * c->layer->shape.n_head;
        const size_t bytes = sqz_attend_thread_bytes(c->layer, c->n_user, c->block_tokens);
        if (bytes > thread_bytes) thread_bytes = bytes;
        together[i] = (struct attend_result){
            take(rows * c->layer->shape.head_dim, sizeof(float)), take(rows, sizeof(float)), {0}};
        calls[i] = plain_call(c, &together[i]);
    }
    struct guarded workspace = workspace_take(sqz_attend_batch_workspace_bytes(thread_bytes, n, n_threads));
    sqz_attend_batch(&(struct sqz_attend_batch){calls, n, n_threads, thread_bytes, workspace.data});
    guarded_free(workspace);
    for (size_t i = 0; i < n; i++) {
        const size_t rows = cases[i].n_tokens * cases[i].layer->shape.n_head;
        describe_attend(&cases[i], "batch");
        for (size_t j = 0; j < rows * cases[i].layer->shape.head_dim; j++)
            check_close("batch", j, together[i].out[j], alone[i].out[j], 0);
        for (size_t j = 0; j < rows; j++) check_close("batch, lse", j, together[i].lse[j], alone[i].lse[j], 0);
        assert_memory_equal(&together[i].stats, &alone[i].stats, sizeof alone[i].stats);
        free_result(&together[i]);
    }
}

static bool alike(const struct variation *a, const struct variation *b)
{
    return a->n_head == b->n_head && a->n_head_kv == b->n_head_kv && a->head_dim == b->head_dim;
}

/* Calls of many sequences, on layers of different contexts that have one shape: each as alone, to the bit. */
static void attend_batches(void **unused)
{
    (void)unused;
    static const size_t tokens[] = {1, 1, 5, 1, 23}, user[] = {0, 80, 9, 300, 40};
    static const float budgets[] = {0.1f, 0.3f, 1, 0.05f};
    for (size_t v = first(6); v < COUNT(variations); v += stride()) {
        struct clustered made[4];
        struct attend_case cases[MOST_CALLS];
        struct attend_result alone[MOST_CALLS];
        size_t n_made = 0, n = 0, first_alike = 0;
        while (!alike(&variations[first_alike], &variations[v])) first_alike++;
        if (first_alike < v && stride() == 1) continue; /* these went together already */
        for (size_t w = v; w < COUNT(variations) && n_made < COUNT(made); w++)
            if (alike(&variations[w], &variations[v])) made[n_made++] = make_variation(&variations[w], 300 + w);
        for (size_t i = 0; i < n_made * COUNT(tokens); i++) {
            struct clustered *m = &made[i % n_made];
            struct attend_case *c = &cases[n];
            *c = (struct attend_case){.layer = m->layer,
                                      .n_tokens = tokens[i % COUNT(tokens)],
                                      .block_tokens = i % 7 == 5 ? 4 : 1,
                                      .n_user = user[i % COUNT(user)],
                                      .n_context_tokens = m->layer->n_rows,
                                      .budget = budgets[i % COUNT(budgets)],
                                      .log_offset = i % 3 == 1 ? 0.4f : 0,
                                      .n_threads = 2};
            if (c->n_user < c->n_tokens) c->n_user = 0;
            c->queries = make_queries(&m->material, c->n_tokens, 700 + i, 0.5);
            if (c->n_user) make_user_rows(c, 11 + i, 1);
            describe_attend(c, "batch, alone");
            alone[n++] = attend(c);
        }
        for (int n_threads = 1; n_threads <= 5; n_threads += 2) check_batch(cases, alone, n, n_threads);
        check_batch(cases + n - 1, alone + n - 1, 1, 2);
        for (size_t i = 0; i < n; i++) {
            free_result(&alone[i]);
            free((void *)(uintptr_t)cases[i].queries);
            if (cases[i].n_user) free_user_rows(&cases[i]);
        }
        for (size_t i = 0; i < n_made; i++) free_clustered(&made[i]);
    }
}

/* A few tokens that read everything of a long layer: exact, the same bits for any number of threads and in company. */
static void attend_few_tokens(void **unused)
{
    (void)unused;
    static const uint32_t shapes[][3] = {{9, 3, 64}, {8, 2, 80}, {16, 1, 32}, {17, 1, 32}, {12, 1, 128}};
    static const size_t rows[] = {2048, 2300, 5000, 7700, 2047}, tokens[] = {5, 2, 1, 16, 7};
    static const size_t user[] = {0, 80, 16, 300};
    for (size_t s = 0; s < COUNT(shapes); s++)
        for (size_t i = 0; i < COUNT(tokens); i++) {
            const uint64_t seed = 900 + s * COUNT(tokens) + i;
            if (i != s && passed_over(seed)) continue;
            const struct sqz_layer_shape shape = make_shape(shapes[s][0], shapes[s][1], shapes[s][2]);
            const size_t n = rows[(s + i) % COUNT(rows)], d = shape.head_dim;
            uint16_t *keys = random_halves(shape.n_head_kv * n * d, seed, 1);
            uint16_t *values = random_halves(shape.n_head_kv * n * d, seed + 50, 1);
            const struct sqz_layer layer = dense_layer(shape, keys, values, n, 0);
            struct attend_case cases[2];
            struct attend_result alone[2];
            for (int j = 0; j < 2; j++) {
                struct attend_case *c = &cases[j];
                *c = (struct attend_case){.layer = &layer,
                                          .n_tokens = tokens[(i + 2 * (size_t)j) % COUNT(tokens)],
                                          .block_tokens = 1,
                                          .n_user = user[(seed + (size_t)j) % COUNT(user)],
                                          .n_context_tokens = n,
                                          .budget = 1,
                                          .n_threads = j ? 2 : 3};
                c->queries = random_floats(c->n_tokens * shape.n_head * d, seed + 99, 1.5);
                if (c->n_user) make_user_rows(c, seed + 7, 1);
                describe_attend(c, "few tokens");
                alone[j] = attend(c);
                check_exact("attend few tokens", c, &alone[j], 40);
                check_full_read(c, &alone[j]);
            }
            for (int n_threads = 1; n_threads <= 3; n_threads += 2) {
                check_batch(cases, alone, 2, n_threads);
                check_batch(cases, alone, 1, n_threads);
            }
            for (int j = 0; j < 2; j++) {
                free_result(&alone[j]);
                free((void *)(uintptr_t)cases[j].queries);
                if (cases[j].n_user) free_user_rows(&cases[j]);
            }
            free(keys);
            free(values);
        }
}

/* ---- All rows for several sequences ---------------------------------------------------------- */

enum { MOST_JOINT = 71 };

/* Tokens of so many sequences, whose queries stand in another order: each gets exact attention over the context and its
 * own rows, and is told that it has read everything. */
static void check_joint(const struct clustered *m, size_t n, int n_threads, uint64_t seed)
{
    const size_t h = m->layer->shape.n_head, d = m->layer->shape.head_dim;
    struct attend_case whole = {.layer = m->layer,
                                .n_tokens = n,
                                .block_tokens = 1,
                                .n_context_tokens = m->layer->n_rows,
                                .budget = 1,
                                .n_threads = n_threads};
    struct attend_case cases[MOST_JOINT];
    struct sqz_joint_token joint[MOST_JOINT];
    struct sqz_attention_stats stats[MOST_JOINT];
    struct attend_result all = {take(n * h * d, sizeof(float)), take(n * h, sizeof(float)), {0}};
    float *queries = make_queries(&m->material, n, seed, 0.5);
    memset(stats, 0, sizeof stats);
    whole.queries = queries;
    for (size_t i = 0; i < n; i++) {
        const size_t at = (i * 7 + 3) % n;
        struct attend_case *c = &cases[i];
        *c = whole;
        c->n_tokens = 1;
        c->queries = queries + at * h * d;
        c->n_user = i % 4 * 23;
        if (c->n_user) make_user_rows(c, seed + i, 1);
        if (c->n_user > whole.n_user) whole.n_user = c->n_user;
        joint[i] =
            (struct sqz_joint_token){at, c->user_keys, c->user_values, c->user_capacity, c->n_user, &stats[i], NULL};
    }
    struct sqz_attend_call call = plain_call(&whole, &all);
    call.joint = joint;
    call.stats = NULL;
    const size_t thread_bytes = sqz_attend_thread_bytes(m->layer, whole.n_user, 1);
    struct guarded workspace = workspace_take(sqz_attend_batch_workspace_bytes(thread_bytes, 1, n_threads));
    sqz_attend_batch(&(struct sqz_attend_batch){&call, 1, n_threads, thread_bytes, workspace.data});
    guarded_free(workspace);
    for (size_t i = 0; i < n; i++) {
        const struct attend_result r = {all.out + joint[i].at * h * d, all.lse + joint[i].at * h, stats[i]};
        describe_attend(&cases[i], "joint");
        check_exact("joint", &cases[i], &r, n > 5 ? 3 : 20);
        check_full_read(&cases[i], &r);
        if (cases[i].n_user) free_user_rows(&cases[i]);
    }
    free_result(&all);
    free(queries);
}

static void attend_joint(void **unused)
{
    (void)unused;
    static const size_t tokens[] = {1, 2, 5, 23, MOST_JOINT};
    for (size_t v = first(3); v < COUNT(variations); v += stride()) {
        struct clustered made = make_variation(&variations[v], 400 + v);
        for (size_t i = v % 2; i < COUNT(tokens); i += 2) check_joint(&made, tokens[i], 1 + (int)(i % 3), 900 + v);
        free_clustered(&made);
    }
}

/* ---- A context in several places ------------------------------------------------------------ */

enum { N_PLACES = 3 };

/* Rows [begin, end) of the material as a layer of their own. */
static struct sqz_layer *make_place(const struct clustered *whole, const struct sqz_squeeze_options *o, size_t begin,
                                    size_t end)
{
    const struct material *m = &whole->material;
    const size_t d = m->shape.head_dim, n = end - begin, k = m->shape.n_head_kv;
    uint16_t *keys = take(k * n * d, sizeof *keys), *values = take(k * n * d, sizeof *values);
    for (size_t h = 0; h < k; h++) {
        memcpy(keys + h * n * d, m->keys + (h * m->n_rows + begin) * d, n * d * sizeof *keys);
        memcpy(values + h * n * d, m->values + (h * m->n_rows + begin) * d, n * d * sizeof *values);
    }
    struct sqz_layer *layer;
    struct sqz_error error;
    float *queries = make_queries(m, 24, m->seed + 5, 0.5);
    struct sqz_squeeze_options as_fine =
        *o; /* as many clusters as the whole has, or they would mix its groups of keys */
    for (uint32_t l = 0; l < o->n_levels; l++)
        as_fine.centroid_share[l] = fminf(0.5f / (float)(l + 1), o->centroid_share[l] * (float)m->n_rows / (float)n);
    if (sqz_layer_create(&layer, &m->shape, keys, values, n, queries, 24, &as_fine, 2, &error))
        fail_msg("sqz_layer_create: %s", error.message);
    free(queries);
    free(keys);
    free(values);
    return layer;
}

/* Totals of every place, what lies elsewhere for each, then each one's part; merged into `merged`. */
static void attend_in_places(const struct attend_case *cases, struct attend_result *merged, float *whole_total)
{
    struct sqz_attend_call calls[N_PLACES];
    struct attend_result part[N_PLACES];
    const size_t d = cases->layer->shape.head_dim, rows = cases->n_tokens * cases->layer->shape.n_head;
    float *total[N_PLACES], *elsewhere = take(rows, sizeof *elsewhere);
    size_t thread_bytes = 0;
    for (size_t p = 0; p < N_PLACES; p++) {
        const size_t bytes = sqz_attend_thread_bytes(cases[p].layer, cases[p].n_user, cases[p].block_tokens);
        if (bytes > thread_bytes) thread_bytes = bytes;
        part[p] = (struct attend_result){take(rows * d, sizeof(float)), take(rows, sizeof(float)), {0}};
        total[p] = take(rows, sizeof *total[p]);
        calls[p] = plain_call(&cases[p], &part[p]);
    }
    struct guarded workspace = workspace_take(sqz_attend_batch_workspace_bytes(thread_bytes, N_PLACES, 2));
    sqz_attend_totals(&(struct sqz_attend_batch){calls, N_PLACES, 2, thread_bytes, workspace.data}, total);
    for (size_t r = 0; r < rows; r++) {
        whole_total[r] = -INFINITY;
        merged->lse[r] = -INFINITY;
        for (size_t p = 0; p < N_PLACES; p++) whole_total[r] = sqz_log_add(whole_total[r], total[p][r]);
    }
    memset(merged->out, 0, rows * d * sizeof *merged->out);
    for (size_t p = 0; p < N_PLACES; p++) {
        for (size_t r = 0; r < rows; r++) {
            elsewhere[r] = -INFINITY;
            for (size_t q = 0; q < N_PLACES; q++)
                if (q != p) elsewhere[r] = sqz_log_add(elsewhere[r], total[q][r]);
        }
        calls[p].elsewhere = elsewhere;
        sqz_attend_batch(&(struct sqz_attend_batch){&calls[p], 1, 2, thread_bytes, workspace.data});
        sqz_merge_partial(merged->out, merged->lse, part[p].out, part[p].lse, rows, d);
        sqz_attention_stats_add(&merged->stats, &part[p].stats);
    }
    guarded_free(workspace);
    for (size_t p = 0; p < N_PLACES; p++) {
        free_result(&part[p]);
        free(total[p]);
    }
    free(elsewhere);
}

static double distance_between(const float *a, const float *b, size_t n)
{
    double difference = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        size += (double)b[i] * b[i];
    }
    return sqrt(difference / size);
}

/* Where much more lies elsewhere, nothing here deserves to be read but what always is. */
static void check_outweighed(const struct attend_case *c)
{
    const size_t d = c->layer->shape.head_dim, rows = c->n_tokens * c->layer->shape.n_head;
    struct attend_result r = {take(rows * d, sizeof(float)), take(rows, sizeof(float)), {0}};
    float *elsewhere = take(rows, sizeof *elsewhere);
    for (size_t i = 0; i < rows; i++) elsewhere[i] = 80;
    struct sqz_attend_call call = plain_call(c, &r);
    const size_t thread_bytes = sqz_attend_thread_bytes(c->layer, c->n_user, c->block_tokens);
    struct guarded workspace = workspace_take(sqz_attend_batch_workspace_bytes(thread_bytes, 1, 2));
    call.elsewhere = elsewhere;
    sqz_attend_batch(&(struct sqz_attend_batch){&call, 1, 2, thread_bytes, workspace.data});
    describe_attend(c, "outweighed");
    check_close("retained keys", 0, (double)r.stats.retained_keys, (double)(r.stats.n_selections * c->layer->n_fixed),
                0);
    for (size_t i = 0; i < rows * d; i++) check_true("out is finite", i, r.out[i], 0, isfinite(r.out[i]));
    guarded_free(workspace);
    free_result(&r);
    free(elsewhere);
}

/* As much again elsewhere, twice: the same keys as by a threshold that is three times as high. */
static void check_threefold(const struct attend_case *c)
{
    const size_t d = c->layer->shape.head_dim, rows = c->n_tokens * c->layer->shape.n_head;
    struct attend_result shifted = {take(rows * d, sizeof(float)), take(rows, sizeof(float)), {0}};
    struct attend_result raised = {take(rows * d, sizeof(float)), take(rows, sizeof(float)), {0}};
    float *total = take(rows, sizeof *total);
    struct sqz_attend_call call = plain_call(c, &shifted);
    const size_t thread_bytes = sqz_attend_thread_bytes(c->layer, c->n_user, c->block_tokens);
    struct guarded workspace = workspace_take(sqz_attend_batch_workspace_bytes(thread_bytes, 1, 2));
    const struct sqz_attend_batch batch = {&call, 1, 2, thread_bytes, workspace.data};
    sqz_attend_totals(&batch, &total);
    for (size_t r = 0; r < rows; r++) total[r] += logf(2);
    call.elsewhere = total;
    sqz_attend_batch(&batch);
    call = plain_call(c, &raised);
    call.log_offset = c->log_offset + logf(3);
    sqz_attend_batch(&batch);
    describe_attend(c, "threefold");
    const double keys = (double)raised.stats.retained_keys;
    check_close("retained keys", 0, (double)shifted.stats.retained_keys, keys, 0.02 * keys + 4);
    for (size_t i = 0; i < rows * d && !c->layer->tail; i++) /* the tail's gain follows the threshold */
        check_close("threefold", i, shifted.out[i], raised.out[i], 0.02);
    guarded_free(workspace);
    free_result(&shifted);
    free_result(&raised);
    free(total);
}

static void check_places(const struct attend_case *whole, struct attend_case *places)
{
    const size_t d = whole->layer->shape.head_dim, rows = whole->n_tokens * whole->layer->shape.n_head;
    struct attend_result merged = {take(rows * d, sizeof(float)), take(rows, sizeof(float)), {0}};
    float *total = take(rows, sizeof *total);
    struct attend_case dense = *whole;
    dense.budget = 1;
    struct attend_result exact = attend(&dense), squeezed = attend(whole);
    attend_in_places(places, &merged, total);
    describe_attend(whole, "places");
    const double error = distance_between(merged.out, exact.out, rows * d);
    const double alone = distance_between(squeezed.out, exact.out, rows * d);
    /* Each place rounds INT8 keys around a mean of its own. */
    const double rounding = whole->layer->keys.type == SQZ_ROW_I8 ? 0.02 : 1e-5;
    check_true("error of places against one", 0, error, alone,
               error <= 2 * alone + (whole->budget < 1 ? 0.2 : rounding));
    for (size_t r = 0; r < rows; r++) {
        check_close("total of all places", r, total[r], exact.lse[r], whole->budget < 1 ? 1.0 : 1e-3 + rounding);
        if (whole->budget == 1 || whole->layer->tail) /* without a tail what is not read is missing */
            check_close("lse of all places", r, merged.lse[r], exact.lse[r], whole->budget < 1 ? 0.5 : 1e-3 + rounding);
    }
    free_result(&merged);
    free_result(&exact);
    free_result(&squeezed);
    free(total);
}

/* Rows in three places, each clustered by itself; the user's own are in the first. */
static void attend_places(void **unused)
{
    (void)unused;
    static const float budgets[] = {1, 0.35f, 0.35f};
    static const size_t tokens[] = {3, 1, 6};
    for (size_t v = first(7); v < COUNT(variations); v += stride()) {
        struct clustered made = make_variation(&variations[v], 500 + v);
        const struct sqz_squeeze_options o = variation_options(&variations[v]);
        const size_t n = made.material.n_rows, cut[N_PLACES + 1] = {0, n / 2, n - n / 4, n};
        struct sqz_layer *layer[N_PLACES];
        for (size_t p = 0; p < N_PLACES; p++) layer[p] = make_place(&made, &o, cut[p], cut[p + 1]);
        for (size_t i = 0; i < COUNT(budgets); i++) {
            struct attend_case whole = {.layer = made.layer,
                                        .n_tokens = tokens[i],
                                        .block_tokens = 1,
                                        .n_user = i ? 30 : 0,
                                        .n_context_tokens = n,
                                        .budget = budgets[i],
                                        .n_threads = 2};
            struct attend_case places[N_PLACES];
            float *queries = make_queries(&made.material, whole.n_tokens, 40 + i, 0.5);
            whole.queries = queries;
            if (whole.n_user) make_user_rows(&whole, 3, 1);
            for (size_t p = 0; p < N_PLACES; p++) {
                places[p] = whole;
                places[p].layer = layer[p];
                if (p) places[p].n_user = 0;
                /* Few rows: what is always read takes most of a small budget. And where a place was calibrated it was
                 * the whole, of which a key had a larger share. */
                if (whole.budget < 1) places[p].budget = 0.7f;
                places[p].log_offset = -1.5f;
            }
            const bool by_threshold = whole.budget < 1 && group_of(made.layer) <= SQZ_MAX_GROUP_QUERIES;
            if (by_threshold) check_threefold(&whole);
            check_places(&whole, places);
            if (layer[2]->n_levels && by_threshold) check_outweighed(&places[2]);
            if (whole.n_user) free_user_rows(&whole);
            free(queries);
        }
        for (size_t p = 0; p < N_PLACES; p++) sqz_layer_free(layer[p]);
        free_clustered(&made);
    }
}

/* Logits to +-300 and beyond, zeros: never NaN; exact where nothing is pruned. */
static void attend_extremes(void **unused)
{
    (void)unused;
    static const double sharpness[] = {0, 1e-20, 3, 20, 60};
    static const float budgets[] = {0.05f, 0.3f, 1};
    for (size_t v = first(8); v < COUNT(variations); v += stride()) {
        struct clustered made = make_variation(&variations[v], 160 + v);
        for (size_t s = 0; s < COUNT(sharpness); s++)
            for (size_t i = 0; i < 6; i++) {
                struct attend_case c = {.layer = made.layer,
                                        .n_tokens = i < 3 ? 1 : 4,
                                        .block_tokens = i % 2 ? 64 : 1,
                                        .n_user = i % 2 ? 5 : 0,
                                        .n_context_tokens = variations[v].n_rows,
                                        .budget = budgets[i % 3],
                                        .n_threads = (int)(s % 3) + 1};
                float *queries = make_queries(&made.material, c.n_tokens, 30 + i, sharpness[s]);
                c.queries = queries;
                if (c.n_user) make_user_rows(&c, 5, 1);
                describe_attend(&c, "extreme");
                struct attend_result r = attend(&c);
                const double largest = 6; /* of any value */
                for (size_t j = 0; j < c.n_tokens * made.layer->shape.n_head; j++)
                    check_true("extreme lse", j, r.lse[j], 0, isfinite(r.lse[j]));
                for (size_t j = 0; j < c.n_tokens * made.layer->shape.n_head * made.layer->shape.head_dim; j++)
                    check_true("extreme out is a mean of values", j, r.out[j], largest,
                               fabs((double)r.out[j]) <= largest);
                if (c.budget == 1) check_exact("extreme, budget 1", &c, &r, 8);
                free_result(&r);
                if (c.n_user) free_user_rows(&c);
                free(queries);
            }
        free_clustered(&made);
    }
}

/* One entry that is wrong by thousands: its keys are chosen though they do not matter, and the estimated denominator is
 * far above every weight that is there. What comes out is still a mean of values. */
static void attend_overrated_codes(void **unused)
{
    (void)unused;
    for (size_t v = first(9); v < COUNT(variations); v += stride()) {
        if (!variations[v].code_words || variations[v].n_head > SQZ_MAX_GROUP_QUERIES) continue;
        struct clustered made = make_variation(&variations[v], 200 + v);
        const struct sqz_layer *l = made.layer;
        uint16_t *book = (uint16_t *)(uintptr_t)l->codes.book;
        for (size_t i = 0; i < (size_t)l->shape.n_head_kv * SQZ_CODE_ENTRIES * l->codes.n_directions; i++)
            book[i] = i % (SQZ_CODE_ENTRIES * l->codes.n_directions) ? 0 : 0x7000; /* 8,192 along one direction */
        for (size_t i = 0; i < 4; i++) {
            struct attend_case c = {.layer = l,
                                    .n_tokens = 3,
                                    .block_tokens = 1,
                                    .n_user = i % 2 ? 5 : 0,
                                    .n_context_tokens = variations[v].n_rows,
                                    .budget = i < 2 ? 0.1f : 0.5f,
                                    .n_threads = 2};
            float *queries = make_queries(&made.material, c.n_tokens, 30 + i, 0.5);
            c.queries = queries;
            if (c.n_user) make_user_rows(&c, 5, 1);
            describe_attend(&c, "overrated");
            struct attend_result r = attend(&c);
            for (size_t j = 0; j < c.n_tokens * l->shape.n_head; j++)
                check_true("overrated lse", j, r.lse[j], 0, isfinite(r.lse[j]));
            for (size_t j = 0; j < c.n_tokens * l->shape.n_head * l->shape.head_dim; j++)
                check_true("overrated out is a mean of values", j, r.out[j], 6, fabs((double)r.out[j]) <= 6);
            free_result(&r);
            if (c.n_user) free_user_rows(&c);
            free(queries);
        }
        free_clustered(&made);
    }
}

static void stats_share_and_sum(void **state)
{
    const struct sqz_attention_stats none = {0}, huge = {.context_bytes = UINT64_MAX, .key_bytes = UINT64_MAX},
                                     one = {.context_bytes = 800,
                                            .centroid_bytes = 40,
                                            .key_bytes = 100,
                                            .value_bytes = 60,
                                            .n_selections = 3,
                                            .retained_keys = 5,
                                            .total_keys = 7,
                                            .coded_keys = 6};
    struct sqz_attention_stats sum = one;
    (void)state;
    describe("statistics");
    check_close("share of nothing", 0, sqz_attention_stats_share(&none), 0, 0);
    check_close("share", 0, sqz_attention_stats_share(&one), 0.25, 0);
    check_close("share of the largest counts", 0, sqz_attention_stats_share(&huge), 1, 0);
    sqz_attention_stats_add(&sum, &none);
    sqz_attention_stats_add(&sum, &one);
    const uint64_t got[] = {sum.context_bytes, sum.centroid_bytes, sum.key_bytes,  sum.value_bytes,
                            sum.n_selections,  sum.retained_keys,  sum.total_keys, sum.coded_keys},
                   sums[] = {1600, 80, 200, 120, 6, 10, 14, 12};
    for (size_t i = 0; i < COUNT(sums); i++) check_close("sum", i, (double)got[i], (double)sums[i], 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(softmax_tiles),
        cmocka_unit_test(softmax_merge),
        cmocka_unit_test(causal_positions),
        cmocka_unit_test(causal_shapes),
        cmocka_unit_test(causal_extremes),
        cmocka_unit_test(causal_nothing),
        cmocka_unit_test(attend_dense),
        cmocka_unit_test(attend_chosen),
        cmocka_unit_test(attend_sliding),
        cmocka_unit_test(attend_selected_rows),
        cmocka_unit_test(attend_selected_block),
        cmocka_unit_test(attend_announced),
        cmocka_unit_test(attend_everything),
        cmocka_unit_test(attend_nothing_retained),
        cmocka_unit_test(attend_threads),
        cmocka_unit_test(attend_extremes),
        cmocka_unit_test(attend_overrated_codes),
        cmocka_unit_test(attend_batches),
        cmocka_unit_test(attend_few_tokens),
        cmocka_unit_test(attend_places),
        cmocka_unit_test(attend_joint),
        cmocka_unit_test(stats_share_and_sum),
        cmocka_unit_test(attend_maps),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
