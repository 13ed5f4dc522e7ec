/*
 * Rows of 4 + 4 bits beside F16 (`squeeze bench kernels --rows`): one token that reads everything, one at the budget, and a few
 * at once as a verified draft has them, of the same layer with its rows in F16, by both planes, and by the upper plane
 * alone. All select the same rows. Every result is held against attention in double precision over the numbers that the
 * rows hold, before anything is timed.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench_kernels.h"
#include "common.h"
#include "json_output.h"
#include "times.h"

enum { KINDS = 3, FORMS = 4, MOST_TOKENS = SQZ_ROWS_BENCH_TOKENS };
enum { PLAIN, BOTH, UPPER };
static const char *const kind_names[KINDS] = {"f16", "int4+4", "upper"};

/* A form of call: so many tokens, at the budget or reading everything. */
static const struct {
    const char *name;
    size_t n_tokens;
    bool squeezed;
} forms[FORMS] = {{"dense", 1, false}, {"squeezed", 1, true}, {"dense", 5, false}, {"dense", MOST_TOKENS, false}};

/* Of a query in 16 bits, weights of values in 15, and logits of a row in planes that are two numbers added. */
static const double plane_tolerance = 2e-3;

struct rows_bench {
    const struct bench_layer *layer;
    struct bench_variant variant; /* at the budget */
    struct sqz_layer layers[KINDS];
    struct pages planes, work;
    float *queries, *out, *mean;
    struct sqz_attend_call calls[KINDS][FORMS];
    struct bench_times times[KINDS][FORMS];
    struct sqz_attention_stats stats[KINDS][FORMS];
    double errors[KINDS][FORMS];
};

/* Lays the planes out; on nothing it only counts. */
static void carve_planes(const struct sqz_layer *l, struct sqz_arena *arena, struct sqz_rows *rows)
{
    const size_t k = l->shape.n_head_kv, d = l->shape.head_dim, n = l->n_rows - l->n_fixed;
    rows->type = SQZ_ROW_I44;
    rows->data = sqz_arena_take(arena, k * n, sqz_plane_bytes(d), 1);
    rows->planes.lower = sqz_arena_take(arena, k * n, sqz_plane_bytes(d), 1);
    rows->planes.step = sqz_arena_take(arena, k, n, sizeof(uint16_t));
    rows->planes.whole = sqz_arena_take(arena, k * l->n_fixed, d, sizeof(uint16_t));
    rows->planes.n_whole = l->n_fixed;
}

static void store_head(const struct sqz_layer *l, const struct sqz_rows *from, const struct sqz_rows *to, size_t head)
{
    const size_t d = l->shape.head_dim;
    const struct sqz_rows a = sqz_rows_of_head(from, l->n_rows, d, head), b = sqz_rows_of_head(to, l->n_rows, d, head);
    float row[256];
    for (size_t r = 0; r < l->n_rows && !signal_caught(); r++) {
        sqz_rows_to_f32(row, &a, r, 1, d);
        sqz_rows_store(&b, r, row, d);
    }
}

/* The layer again in planes: keys relative to their clusters' centroids, values to 0, which is what they were drawn
 * around. */
static void make_planes(struct rows_bench *b, bool huge_pages, int n_threads)
{
    const struct sqz_layer *l = &b->variant.layer;
    const struct sqz_rows *centroids = &l->level[0].centroids;
    struct sqz_arena arena = sqz_arena_on(NULL);
    struct sqz_rows keys = {0}, values = {0};
    carve_planes(l, &arena, &keys);
    carve_planes(l, &arena, &values);
    b->mean = calloc((size_t)l->shape.n_head_kv * l->shape.head_dim, sizeof *b->mean);
    if (!b->mean || !pages_take(&b->planes, sqz_arena_bytes(&arena), huge_pages))
        die("out of memory for rows in planes");
    arena = sqz_arena_on(b->planes.data);
    carve_planes(l, &arena, &keys);
    carve_planes(l, &arena, &values);
    keys.planes.centres = (struct sqz_centres){.type = centroids->type,
                                               .data = centroids->data,
                                               .scale = centroids->scale,
                                               .mean = centroids->mean,
                                               .offset = l->level[0].offset,
                                               .n = l->level[0].n_clusters};
    values.mean = b->mean;
    (void)n_threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
    for (size_t h = 0; h < l->shape.n_head_kv; h++) {
        store_head(l, &l->keys, &keys, h);
        store_head(l, &l->values, &values, h);
    }
    b->layers[PLAIN] = b->layers[BOTH] = b->layers[UPPER] = *l;
    b->layers[BOTH].keys = keys;
    b->layers[BOTH].values = values;
    b->layers[UPPER].keys = sqz_rows_upper(&keys);
    b->layers[UPPER].values = sqz_rows_upper(&values);
}

static struct sqz_attend_call make_call(const struct rows_bench *b, int kind, int form, double budget, int n_threads)
{
    const struct sqz_layer *l = &b->layer->layer;
    const size_t d = l->shape.head_dim;
    return (struct sqz_attend_call){
        .layer = &b->layers[kind],
        .queries = b->queries,
        .out = b->out,
        .query_token_stride = l->shape.n_head * d,
        .out_token_stride = l->shape.n_head * d,
        .query_head_stride = d,
        .out_head_stride = d,
        .n_tokens = forms[form].n_tokens,
        .n_user = forms[form].n_tokens,
        .user_keys = sqz_rows_f16(&l->keys) + l->n_rows * d, /* see bench_kernels.h */
        .user_values = sqz_rows_f16(&l->values) + l->n_rows * d,
        .user_capacity_rows = l->n_rows,
        .n_context_tokens = l->n_rows,
        .budget = forms[form].squeezed ? (float)budget : 1.0f,
        .log_offset = forms[form].squeezed ? b->variant.log_offset : 0.0f,
        .block_tokens = 1,
        .n_threads = n_threads,
        .workspace = b->work.data,
    };
}

/* Scratch memory for any of the calls, queries and outputs. */
static void take_work(struct rows_bench *b, int n_threads)
{
    const struct sqz_layer *l = &b->layer->layer;
    const size_t numbers = MOST_TOKENS * (size_t)l->shape.n_head * l->shape.head_dim;
    size_t most = 0;
    for (int kind = 0; kind < KINDS; kind++) {
        const size_t bytes = sqz_attend_workspace_bytes(&b->layers[kind], MOST_TOKENS, 1, n_threads);
        most = bytes > most ? bytes : most;
    }
    if (!pages_take(&b->work, most, false)) die("out of memory for attention");
    b->queries = malloc(numbers * sizeof *b->queries);
    b->out = malloc(numbers * sizeof *b->out);
    if (!b->queries || !b->out) die("out of memory for attention");
    bench_layer_queries(b->layer, b->queries, MOST_TOKENS);
}

/* Runs one call of each kind and form, and dies where one is wrong. */
static void check_all(struct rows_bench *b)
{
    for (int form = 0; form < FORMS; form++)
        for (int kind = 0; kind < KINDS && !signal_caught(); kind++) {
            struct sqz_attend_call call = b->calls[kind][form];
            const double tolerance = kind == PLAIN ? 0 : plane_tolerance;
            call.stats = &b->stats[kind][form];
            sqz_attend(&call);
            const struct check_result result =
                forms[form].squeezed ? check_squeezed(&call, tolerance) : check_dense(&call, tolerance);
            if (!result.ok && !signal_caught())
                die("%s, %zu tokens, rows of %s: wrong result, nothing was timed: %s", forms[form].name,
                    forms[form].n_tokens, kind_names[kind], result.message);
            b->errors[kind][form] = result.error;
        }
}

static void time_all(struct rows_bench *b, const struct bench_rows_options *o)
{
    for (size_t round = 0; round < o->n_repeats; round++)
        for (int form = 0; form < FORMS; form++)
            for (int kind = 0; kind < KINDS && !signal_caught(); kind++) {
                struct bench_times *times = &b->times[kind][form];
                if (o->cold || round == 0) times->bandwidth[times->n] = memory_probe_read(o->probe);
                else times->bandwidth[times->n] = times->bandwidth[0];
                const double since = now_seconds();
                sqz_attend(&b->calls[kind][form]);
                times->seconds[times->n++] = now_seconds() - since;
            }
}

static double bytes_read(const struct sqz_attention_stats *s)
{
    return (double)(s->centroid_bytes + s->key_bytes + s->value_bytes);
}

/* A form reads the rows once for all its tokens; statistics count them once a token. */
static json_t *row_json(const struct rows_bench *b, int kind, int form)
{
    const struct bench_times *times = &b->times[kind][form];
    const double seconds = bench_quantile(times, 0.5), bytes = bytes_read(&b->stats[kind][form]);
    json_t *row = json_object(), *all = json_array();
    for (size_t i = 0; i < times->n; i++) json_array_append_new(all, json_number(times->seconds[i]));
    json_object_set_new(row, "op", json_string(forms[form].name));
    json_object_set_new(row, "rows", json_string(kind_names[kind]));
    json_object_set_new(row, "tokens", json_count(b->layer->layer.n_rows));
    json_object_set_new(row, "queries", json_count(forms[form].n_tokens));
    json_object_set_new(row, "seconds", json_number(seconds));
    json_object_set_new(row, "seconds_all", all);
    json_object_set_new(row, "bytes", json_number(bytes));
    json_object_set_new(row, "gb_s", json_number(bytes / seconds / 1e9));
    json_object_set_new(row, "read_bandwidth_gb_s", json_number(times_quantile(times->bandwidth, times->n, 0.5) / 1e9));
    json_object_set_new(row, "vs_f16", json_number(bench_quantile(&b->times[PLAIN][form], 0.5) / seconds));
    json_object_set_new(row, "verified", json_true());
    json_object_set_new(row, "error", json_number(b->errors[kind][form]));
    return row;
}

bool bench_rows_run(const struct bench_rows_options *o, json_t *rows)
{
    const int n_threads = o->layer->options.n_threads;
    struct rows_bench b = {.layer = o->layer};
    bench_variant_make(&b.variant, o->layer, (struct bench_format){1, o->centroids, SQZ_INDEX_F16});
    make_planes(&b, o->layer->options.huge_pages, n_threads);
    take_work(&b, n_threads);
    b.layers[PLAIN] = b.variant.layer;
    struct sqz_attend_call call = make_call(&b, PLAIN, 1, o->budget, n_threads);
    call.layer = &b.variant.layer;
    const bool met = bench_variant_meet_budget(&b.variant, &call);
    for (int kind = 0; kind < KINDS; kind++)
        for (int form = 0; form < FORMS; form++) b.calls[kind][form] = make_call(&b, kind, form, o->budget, n_threads);
    if (met) check_all(&b);
    if (met && !signal_caught()) time_all(&b, o);
    const bool ok = met && !signal_caught();
    for (int form = 0; form < FORMS && ok; form++)
        for (int kind = 0; kind < KINDS; kind++) json_array_append_new(rows, row_json(&b, kind, form));
    bench_variant_free(&b.variant);
    pages_give_back(&b.planes);
    pages_give_back(&b.work);
    free(b.queries);
    free(b.out);
    free(b.mean);
    return ok;
}

size_t bench_rows_bytes(const struct bench_layer *layer)
{
    struct sqz_arena arena = sqz_arena_on(NULL);
    struct sqz_rows rows = {0};
    carve_planes(&layer->layer, &arena, &rows);
    return 2 * sqz_arena_bytes(&arena);
}

static double number_of(const json_t *row, const char *name)
{
    return json_number_value(json_object_get(row, name));
}

void bench_rows_print(const json_t *rows)
{
    printf("%8s  %-9s%8s  %-7s%11s%10s%9s\n", "tokens", "", "queries", "rows", "ms", "GB/s", "vs f16");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        printf("%8.0f  %-9s%8.0f  %-7s%11.3f%10.2f", number_of(row, "tokens"),
               json_string_value(json_object_get(row, "op")), number_of(row, "queries"),
               json_string_value(json_object_get(row, "rows")), number_of(row, "seconds") * 1e3,
               number_of(row, "gb_s"));
        if (json_object_get(row, "vs_f16")) printf("%8.2fx", number_of(row, "vs_f16"));
        printf("\n");
    }
}
