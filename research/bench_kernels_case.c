/*
 * One context length and number of queries: what is run, what it reads and computes, and the rounds in which every
 * operation is run once, so that a machine whose speed drifts treats all alike.
 *
 * `sparse` has no entry of its own in the library, which reads a head's retained rows as soon as they are known. It is
 * what they add: the squeezed call less the same call when nothing is retained, in the same round.
 */
#include "bench_kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "attend_job.h" /* in how many parts a head is summed, for the merge */
#include "baseline_attention.h"
#include "common.h"
#include "kernels.h"

/* ggml keeps the sums of one token in F16: 2^-11 for each of many roundings. */
static const double ggml_tolerance = 0.1;

enum { FORMATS = 2, MAX_VARIANTS = BENCH_LEVELS * FORMATS * FORMATS, MAX_RUNS = 4 + FORMATS + 2 * MAX_VARIANTS };

/* Something that is run once a round. */
struct run {
    enum bench_op op;
    int variant; /* of those with one; -1 */
    struct bench_times times;
    bool skip, verified;
    double error;
    char why[96];
};

struct bench_case {
    const struct bench_case_options *o;
    const struct sqz_layer *layer;
    size_t group, dim, n_heads;
    struct pages memory;
    float *queries, *out, *ggml_out;
    void *attend_workspace, *causal_workspace;

    struct bench_variant variants[MAX_VARIANTS], nothing[MAX_VARIANTS]; /* the second kind: of those with `sparse` */
    size_t n_variants;
    struct sqz_attend_call dense, squeezed[MAX_VARIANTS], with_nothing[MAX_VARIANTS];
    struct sqz_causal_call causal;
    struct sqz_baseline_attention *ggml;
    struct bench_merge merge;
    struct bench_lookup lookup;
    struct bench_read read;
    struct bench_lookup_counts looked_up[MAX_VARIANTS], looked_up_for_nothing[MAX_VARIANTS]; /* by all of a run */
    size_t retain_rows[MAX_VARIANTS]; /* of a block; 0: the threshold decides */

    struct run runs[MAX_RUNS];
    size_t n_runs;
};

/* ---- Memory ------------------------------------------------------------------------------ */

/* In how many parts a head's sum is made: the slots of one query; the user's rows and the context's of many. */
static size_t merged_parts(const struct bench_case_options *o)
{
    if (o->n_queries > 1) return 2;
    const size_t parts = (size_t)(o->budget * (double)o->layer->layer.n_rows) / SQZ_CLAIM_ROWS + 1;
    return parts < SQZ_MAX_SLOTS ? parts : SQZ_MAX_SLOTS;
}

static void carve(struct bench_case *c, struct sqz_arena *arena, const struct bench_case_options *o)
{
    const struct sqz_layer *layer = &o->layer->layer;
    const size_t d = layer->shape.head_dim, rows = o->n_queries * layer->shape.n_head;
    c->queries = sqz_arena_take(arena, rows, d, sizeof(float));
    c->out = sqz_arena_take(arena, rows, d, sizeof(float));
    c->ggml_out = sqz_arena_take(arena, rows, d, sizeof(float));
    size_t attend_bytes = 0;
    for (uint32_t l = 1; l <= BENCH_LEVELS; l++) {
        const struct sqz_layer view =
            bench_layer_view(o->layer, (struct bench_format){l, SQZ_INDEX_F16, SQZ_INDEX_F16});
        size_t bytes = sqz_attend_workspace_bytes(&view, o->n_queries, o->block_tokens, o->n_threads);
        attend_bytes = bytes > attend_bytes ? bytes : attend_bytes;
    }
    c->attend_workspace = sqz_arena_take(arena, attend_bytes, 1, 1);
    c->causal_workspace = sqz_arena_take(arena, sqz_causal_workspace_bytes(&layer->shape, o->n_threads), 1, 1);
    bench_lookup_carve(&c->lookup, arena, layer, o->n_queries, o->block_tokens, o->n_threads);
    bench_read_carve(&c->read, arena, layer);
    bench_merge_carve(&c->merge, arena, layer, o->n_queries, merged_parts(o));
    c->merge.n_threads = o->n_threads;
}

size_t bench_case_bytes(const struct bench_case_options *o)
{
    struct sqz_arena arena = sqz_arena_on(NULL);
    struct bench_case counted;
    const struct sqz_layer *layer = &o->layer->layer;
    carve(&counted, &arena, o);
    /* The check's numbers in double precision: a block's logits with all centroids, three times; a head's logits. */
    const size_t rows = o->block_tokens * (layer->shape.n_head / layer->shape.n_head_kv);
    const size_t by_codes = layer->codes.n_words ? SQZ_MAX_GROUP_QUERIES : 0; /* and the estimates of its keys */
    const size_t check = 3 * sizeof(double) * rows * layer->level[0].n_clusters +
                         sizeof(double) * by_codes * (layer->n_rows - layer->n_fixed) +
                         (size_t)o->n_threads * sizeof(double) * (layer->n_rows + o->n_queries);
    return sqz_arena_bytes(&arena) + check +
           (o->ggml ? sqz_baseline_attention_bytes(layer->n_rows + o->n_queries, o->n_queries) : 0);
}

/* ---- Calls ----------------------------------------------------------------------------------- */

static struct sqz_attend_call make_call(const struct bench_case *c, const struct sqz_layer *layer, double budget)
{
    const size_t d = c->dim, n_head = c->layer->shape.n_head;
    struct sqz_attend_call call = {0};
    call.layer = layer;
    call.queries = c->queries;
    call.out = c->out;
    call.query_token_stride = call.out_token_stride = n_head * d;
    call.query_head_stride = call.out_head_stride = d;
    call.n_tokens = call.n_user = c->o->n_queries;
    call.user_keys = sqz_rows_f16(&c->layer->keys) + c->layer->n_rows * d; /* see bench_kernels.h */
    call.user_values = sqz_rows_f16(&c->layer->values) + c->layer->n_rows * d;
    call.user_capacity_rows = c->layer->n_rows;
    call.n_context_tokens = c->layer->n_rows;
    call.budget = (float)budget;
    call.block_tokens = c->o->block_tokens;
    call.n_threads = c->o->n_threads;
    call.workspace = c->attend_workspace;
    return call;
}

/* Keys of the context and the user that all query rows see together. */
static double keys_seen(const struct bench_case *c)
{
    const double q = (double)c->o->n_queries;
    return (double)c->layer->shape.n_head * (q * (double)c->layer->n_rows + 0.5 * q * (q + 1.0));
}

static double user_bytes(const struct bench_case *c)
{
    return (double)(c->n_heads * c->o->n_queries * c->dim) * 4.0;
}

static double user_flops(const struct bench_case *c)
{
    const double q = (double)c->o->n_queries;
    return 4.0 * (double)(c->dim * c->layer->shape.n_head) * 0.5 * q * (q + 1.0);
}

static double dense_bytes(const struct bench_case *c)
{
    return (double)(c->n_heads * c->layer->n_rows * c->dim) * 4.0 + user_bytes(c);
}

/* Query rows that share a selection, on average: each F16 number read serves so many multiplications. */
static double rows_a_selection(const struct bench_case *c, const struct sqz_attention_stats *stats)
{
    return (double)(c->o->n_queries * c->layer->shape.n_head) / (double)stats->n_selections;
}

static double stats_bytes(const struct sqz_attention_stats *stats)
{
    return (double)stats->centroid_bytes + (double)stats->key_bytes + (double)stats->value_bytes;
}

/* ---- One operation once --------------------------------------------------------------------------- */

static void go(struct bench_case *c, const struct run *run)
{
    struct sqz_error error;
    switch (run->op) {
    case OP_DENSE: sqz_attend(&c->dense); break;
    case OP_CAUSAL: sqz_attention_causal(&c->causal); break;
    case OP_GGML:
        if (sqz_baseline_attention_run(c->ggml, &error) != SQZ_OK && error.status != SQZ_ERROR_CANCELLED)
            die("%s", error.message);
        break;
    case OP_LOOKUP: bench_lookup_run(&c->lookup, &c->squeezed[run->variant], c->retain_rows[run->variant]); break;
    case OP_READ: bench_read_run(&c->read); break;
    case OP_MERGE: bench_merge_run(&c->merge); break;
    case OP_SPARSE: sqz_attend(&c->with_nothing[run->variant]); break; /* see the top */
    case OP_SQUEEZED: sqz_attend(&c->squeezed[run->variant]); break;
    case N_OPS: break;
    }
}

/* ---- What is run ------------------------------------------------------------------------------------ */

static void say(const struct bench_case *c, const char *what)
{
    char tokens[NUMBER_TEXT_MAX];
    if (!c->o->quiet) {
        fprintf(stderr, "bench: %s, %s tokens, %zu quer%s: %s\n", c->o->shape_name,
                count_text(tokens, c->layer->n_rows), c->o->n_queries, c->o->n_queries == 1 ? "y" : "ies", what);
    }
}

static struct run *add_run(struct bench_case *c, enum bench_op op, int variant)
{
    struct run *run = &c->runs[c->n_runs++];
    memset(run, 0, sizeof *run);
    run->op = op;
    run->variant = variant;
    return run;
}

static struct run *find_run(struct bench_case *c, enum bench_op op, int variant)
{
    for (size_t i = 0; i < c->n_runs; i++)
        if (c->runs[i].op == op && c->runs[i].variant == variant) return &c->runs[i];
    return NULL;
}

static struct bench_row describe_run(const struct bench_case *c, const struct run *run)
{
    struct bench_row row = {0};
    row.op = run->op;
    row.shape = c->o->shape;
    row.n_tokens = c->layer->n_rows;
    row.n_queries = c->o->n_queries;
    if (run->variant >= 0) row.format = c->variants[run->variant].format;
    return row;
}

/* Whether one run would take longer than is allowed, by the longest shorter context. */
static void skip_slow(const struct bench_case *c, struct run *run, const struct bench_rows *rows)
{
    const struct bench_row own = describe_run(c, run);
    size_t longest = 0;
    for (size_t i = 0; i < rows->n; i++) {
        const struct bench_row *row = &rows->rows[i];
        if (row->op != own.op || row->shape != own.shape || row->n_queries != own.n_queries ||
            !bench_same_format(row->format, own.format) || row->n_tokens >= own.n_tokens || row->n_tokens <= longest)
            continue;
        longest = row->n_tokens;
        if (row->times.n == 0) { /* too slow already */
            run->skip = true;
            memcpy(run->why, row->skipped, sizeof run->why);
            continue;
        }
        const double seconds = bench_quantile(&row->times, 0.5) * (double)own.n_tokens / (double)row->n_tokens;
        run->skip = seconds > c->o->seconds;
        snprintf(run->why, sizeof run->why, "about %.0f s a run, more than --seconds %.0f", seconds, c->o->seconds);
    }
}

static void list_runs(struct bench_case *c, const struct bench_rows *rows)
{
    for (uint32_t i = 0; i < MAX_VARIANTS; i++) {
        const struct bench_format format = {i / (FORMATS * FORMATS) + 1, (enum sqz_index)(i / FORMATS % FORMATS),
                                            (enum sqz_index)(i % FORMATS)};
        if (c->o->n_levels[format.n_levels] && c->o->centroids[format.centroids] && c->o->keys[format.keys])
            c->variants[c->n_variants++].format = format;
    }
    add_run(c, OP_DENSE, -1);
    if (c->o->n_queries > 1) add_run(c, OP_CAUSAL, -1);
    if (c->o->ggml) add_run(c, OP_GGML, -1);
    bool has_sparse[FORMATS] = {false};
    for (int v = 0; v < (int)c->n_variants; v++) {
        const struct bench_format format = c->variants[v].format;
        /* The lookup depends on the format of the keys by its threshold alone, what is retained not on that of the
         * centroids; with more levels less is looked up when nothing is retained, and the difference would hold that as
         * well, as it does the codes of clusters that are then not opened. */
        if (format.keys == SQZ_INDEX_F16 || !c->o->keys[SQZ_INDEX_F16]) add_run(c, OP_LOOKUP, v);
        if (format.n_levels == 1 && !has_sparse[format.keys]) {
            has_sparse[format.keys] = true;
            if (c->o->n_queries == 1 && format.keys == SQZ_INDEX_F16)
                add_run(c, OP_READ, v); /* of the rows that this variant retains */
            add_run(c, OP_SPARSE, v);
        }
        if (v == 0) add_run(c, OP_MERGE, -1);
        add_run(c, OP_SQUEEZED, v);
    }
    for (size_t i = 0; i < c->n_runs; i++) skip_slow(c, &c->runs[i], rows);
    for (size_t i = 0; i < c->n_runs; i++) { /* parts of a whole that is not run have no threshold */
        struct run *run = &c->runs[i];
        const struct run *whole = run->variant >= 0 ? find_run(c, OP_SQUEEZED, run->variant) : NULL;
        if (whole && whole->skip && !run->skip) {
            run->skip = true;
            memcpy(run->why, whole->why, sizeof run->why);
        }
    }
}

/* ---- Checks -------------------------------------------------------------------------------------------- */

static void judge(const struct bench_case *c, struct run *run, const struct check_result *result)
{
    if (!result->ok && !signal_caught()) {
        char tokens[NUMBER_TEXT_MAX];
        die("%s is wrong: %s, %s tokens, %zu queries: %s; nothing more is timed", bench_op_names[run->op],
            c->o->shape_name, count_text(tokens, c->layer->n_rows), c->o->n_queries, result->message);
    }
    run->verified = result->ok;
    run->error = result->error;
}

/* Runs an operation once and holds its result against the reference. */
static void check_run(struct bench_case *c, struct run *run)
{
    struct sqz_attend_call call;
    struct check_result result = {.ok = true};
    switch (run->op) {
    case OP_DENSE:
    case OP_CAUSAL:
        memset(c->out, 0, c->o->n_queries * c->layer->shape.n_head * c->dim * sizeof *c->out);
        go(c, run);
        result = check_dense(&c->dense, 0.0);
        break;
    case OP_GGML:
        go(c, run);
        call = c->dense;
        call.out = c->ggml_out;
        result = check_dense(&call, ggml_tolerance);
        break;
    case OP_MERGE: result = bench_merge_check(&c->merge); break;
    case OP_SQUEEZED:
        memset(c->out, 0, c->o->n_queries * c->layer->shape.n_head * c->dim * sizeof *c->out);
        go(c, run);
        result = check_squeezed(&c->squeezed[run->variant], 0);
        break;
    case OP_LOOKUP: { /* decisions are checked with the squeezed result; here, that the same ones are made */
        const struct sqz_attention_stats *stats = &c->variants[run->variant].stats;
        const double wanted = (double)stats->retained_keys - (double)(stats->n_selections * c->layer->n_fixed);
        go(c, run);
        const double got = (double)c->looked_up[run->variant].rows_retained;
        result.ok = c->retain_rows[run->variant] || fabs(got - wanted) <= 1e-3 * wanted + 1.0;
        snprintf(result.message, sizeof result.message, "%.0f rows retained, %.0f by the whole call", got, wanted);
        break;
    }
    case OP_READ: /* reads the rows that the lookup retains, which is checked; has no result */
        bench_read_fill(&c->read, &c->lookup, &c->squeezed[run->variant]);
        result.ok = c->read.n_rows == c->looked_up[run->variant].rows_retained;
        snprintf(result.message, sizeof result.message, "%zu rows, %zu by the lookup", c->read.n_rows,
                 c->looked_up[run->variant].rows_retained);
        break;
    case OP_SPARSE: /* a part of the squeezed result of its variant, and checked with it */
        result.ok = !find_run(c, OP_SQUEEZED, run->variant)->skip;
        break;
    case N_OPS: break;
    }
    judge(c, run, &result);
}

/* ---- Rounds -------------------------------------------------------------------------------------------- */

static void add_time(struct bench_times *times, double seconds, double bandwidth)
{
    times->seconds[times->n] = seconds;
    times->bandwidth[times->n++] = bandwidth;
}

/* Every operation once. The probe's pass before each empties the caches, and with the one behind it tells what the
 * memory could do just then: the better of the two counts. */
static bool run_round(struct bench_case *c)
{
    double before = memory_probe_read(c->o->probe);
    for (size_t i = 0; i < c->n_runs; i++) {
        struct run *run = &c->runs[i];
        if (run->skip) continue;
        if (!c->o->cold || run->op == OP_MERGE) { /* what is merged was computed just before */
            if (run->op == OP_MERGE) bench_merge_fill(&c->merge);
            go(c, run);
        }
        const double since = now_seconds();
        go(c, run);
        const double seconds = now_seconds() - since, after = memory_probe_read(c->o->probe);
        if (signal_caught()) return false;
        add_time(&run->times, seconds, before > after ? before : after);
        before = after;
    }
    return true;
}

/* ---- Rows ---------------------------------------------------------------------------------------------- */

static double lookup_bytes_of(const struct bench_variant *v, const struct bench_lookup_counts *counts)
{
    return (double)counts->centroids * (double)sqz_centroid_bytes(&v->layer) + (double)counts->code_bytes;
}

/* A centroid is multiplied with every query row of its selection; of a key's code 8 numbers a word are added. */
static double lookup_flops_of(const struct bench_case *c, const struct bench_lookup_counts *counts, double rows)
{
    return rows * (2.0 * (double)c->dim * (double)counts->centroids +
                   8.0 * (double)c->layer->codes.n_words * (double)counts->codes);
}

/* F16 and INT8 numbers that a call read of keys, values and value centroids: each is multiplied and added once for
 * every query row that shares the selection. */
static double numbers_read(const struct bench_case *c, const struct sqz_attention_stats *stats, double lookup_bytes)
{
    return (double)stats->retained_keys * (double)c->dim +
           ((double)stats->value_bytes + (double)stats->centroid_bytes - lookup_bytes) / sizeof(uint16_t);
}

static void count_squeezed(const struct bench_case *c, const struct run *run, struct bench_row *row)
{
    const struct bench_variant *v = &c->variants[run->variant];
    if (run->skip) return;
    const struct bench_lookup_counts *counts = &c->looked_up[run->variant];
    const double rows = rows_a_selection(c, &v->stats), lookup_bytes = lookup_bytes_of(v, counts);
    const double lookup_flops = lookup_flops_of(c, counts, rows);
    if (run->op == OP_LOOKUP) {
        row->bytes = lookup_bytes;
        row->flops = lookup_flops;
        return;
    }
    row->budget_read = sqz_attention_stats_share(&v->stats);
    row->flops = 2.0 * rows * numbers_read(c, &v->stats, lookup_bytes);
    if (run->op == OP_SPARSE) {
        const struct sqz_attention_stats *nothing = &c->nothing[run->variant].stats;
        const struct bench_lookup_counts *no_counts = &c->looked_up_for_nothing[run->variant];
        row->bytes = stats_bytes(&v->stats) - stats_bytes(nothing);
        row->flops -= 2.0 * rows * numbers_read(c, nothing, lookup_bytes_of(v, no_counts));
        row->flops += lookup_flops - lookup_flops_of(c, no_counts, rows);
    } else {
        row->bytes = stats_bytes(&v->stats) + user_bytes(c);
        row->flops += lookup_flops + user_flops(c);
    }
}

static void count_run(struct bench_case *c, const struct run *run, struct bench_row *row)
{
    const double states = (double)(c->n_heads * c->merge.n_parts * c->o->n_queries * c->group);
    switch (run->op) {
    case OP_DENSE:
    case OP_CAUSAL:
    case OP_GGML:
        row->bytes = dense_bytes(c);
        row->flops = 4.0 * (double)c->dim * keys_seen(c);
        break;
    case OP_MERGE:
        row->bytes = states * (double)(c->dim + 2) * sizeof(float);
        row->flops = states * 2.0 * (double)c->dim;
        break;
    case OP_READ: row->bytes = (double)c->read.n_rows * (double)c->dim * 4.0; break;
    case OP_LOOKUP:
    case OP_SPARSE:
    case OP_SQUEEZED: count_squeezed(c, run, row); break;
    case N_OPS: break;
    }
}

/* Round by round what the retained rows add. */
static void subtract(struct bench_times *times, const struct bench_times *whole)
{
    for (size_t i = 0; i < times->n; i++) {
        const double seconds = whole->seconds[i] - times->seconds[i];
        times->seconds[i] = seconds > 0.0 ? seconds : 0.0;
    }
}

/* Zeroed; valid until the next is added. */
static struct bench_row *new_row(struct bench_rows *rows)
{
    if (rows->n == rows->capacity) {
        const size_t capacity = rows->capacity ? 2 * rows->capacity : 64;
        struct bench_row *larger = realloc(rows->rows, capacity * sizeof *larger);
        if (!larger) die("out of memory");
        rows->rows = larger;
        rows->capacity = capacity;
    }
    struct bench_row *row = &rows->rows[rows->n++];
    memset(row, 0, sizeof *row);
    return row;
}

static void add_rows(struct bench_case *c, struct bench_rows *rows)
{
    for (size_t i = 0; i < c->n_runs; i++) {
        struct run *run = &c->runs[i];
        struct bench_row row = describe_run(c, run);
        if (run->op == OP_SPARSE && !run->skip) subtract(&run->times, &find_run(c, OP_SQUEEZED, run->variant)->times);
        row.times = run->times;
        row.verified = run->verified;
        row.error = run->error;
        count_run(c, run, &row);
        memcpy(row.skipped, run->skip ? run->why : "", run->skip ? sizeof run->why : 1);
        *new_row(rows) = row;
    }
}

/* ---- The case ------------------------------------------------------------------------------------------ */

static void make_ggml(struct bench_case *c)
{
    struct sqz_error error;
    const struct sqz_baseline_attention_args args = {
        .shape = c->layer->shape,
        .keys = sqz_rows_f16(&c->layer->keys),
        .values = sqz_rows_f16(&c->layer->values),
        .n_rows = c->layer->n_rows + c->o->n_queries,
        .head_rows = c->layer->n_rows,
        .queries = c->queries,
        .out = c->ggml_out,
        .n_tokens = c->o->n_queries,
        .n_threads = c->o->n_threads,
        .cancelled = signal_cancelled,
    };
    if (sqz_baseline_attention_create(&c->ggml, &args, &error) != SQZ_OK) die("%s", error.message);
}

static void make_calls(struct bench_case *c)
{
    const struct sqz_attend_call *call = &c->dense;
    c->dense = make_call(c, c->layer, 1.0);
    c->causal = (struct sqz_causal_call){
        .shape = c->layer->shape,
        .queries = call->queries,
        .out = call->out,
        .query_token_stride = call->query_token_stride,
        .query_head_stride = call->query_head_stride,
        .out_token_stride = call->out_token_stride,
        .out_head_stride = call->out_head_stride,
        .n_tokens = call->n_tokens,
        .first_position = c->layer->n_rows,
        .keys = sqz_rows_f16(&c->layer->keys),
        .values = sqz_rows_f16(&c->layer->values),
        .capacity_rows = c->layer->n_rows, /* rows between heads, which overlap: see bench_kernels.h */
        .n_threads = call->n_threads,
        .workspace = c->causal_workspace,
    };
    for (size_t v = 0; v < c->n_variants; v++) {
        bench_variant_make(&c->variants[v], c->o->layer, c->variants[v].format);
        c->squeezed[v] = make_call(c, &c->variants[v].layer, c->o->budget);
    }
    for (size_t v = 0; v < c->n_variants; v++) {
        bench_variant_make(&c->nothing[v], c->o->layer, c->variants[v].format);
        bench_variant_retain_nothing(&c->nothing[v]);
        c->with_nothing[v] = make_call(c, &c->nothing[v].layer, c->o->budget);
    }
}

/* Thresholds, and what the calls read at them. */
static bool meet_budgets(struct bench_case *c)
{
    for (size_t v = 0; v < c->n_variants; v++) {
        if (find_run(c, OP_SQUEEZED, (int)v)->skip) continue;
        if (!bench_variant_meet_budget(&c->variants[v], &c->squeezed[v])) return false;
        const struct sqz_attention_stats *stats = &c->variants[v].stats;
        if (c->o->block_tokens > 1 || c->group > SQZ_MAX_GROUP_QUERIES) {
            const uint64_t rows = stats->retained_keys / stats->n_selections;
            c->retain_rows[v] = rows > c->layer->n_fixed ? (size_t)rows - c->layer->n_fixed : 1;
        }
    }
    for (size_t v = 0; v < c->n_variants && !signal_caught(); v++) {
        if (find_run(c, OP_SPARSE, (int)v)) {
            c->with_nothing[v].stats = &c->nothing[v].stats;
            sqz_attend(&c->with_nothing[v]);
            c->with_nothing[v].stats = NULL;
        }
    }
    return !signal_caught();
}

/* What the lookups of all variants read. */
static void count_lookups(struct bench_case *c)
{
    for (size_t v = 0; v < c->n_variants && !signal_caught(); v++) {
        if (!find_run(c, OP_SQUEEZED, (int)v)->skip)
            c->looked_up[v] = bench_lookup_run(&c->lookup, &c->squeezed[v], c->retain_rows[v]);
        if (find_run(c, OP_SPARSE, (int)v))
            c->looked_up_for_nothing[v] = bench_lookup_run(&c->lookup, &c->with_nothing[v], c->retain_rows[v]);
    }
}

static void free_case(struct bench_case *c)
{
    for (size_t v = 0; v < c->n_variants; v++) {
        bench_variant_free(&c->variants[v]);
        bench_variant_free(&c->nothing[v]);
    }
    sqz_baseline_attention_free(c->ggml);
    pages_give_back(&c->memory);
    free(c);
}

static bool measure(struct bench_case *c, struct bench_rows *rows)
{
    double since;
    say(c, "finding thresholds");
    bench_layer_queries(c->o->layer, c->queries, c->o->n_queries);
    if (!meet_budgets(c)) return false;
    bench_lookup_fill(&c->lookup, &c->dense);
    count_lookups(c);
    say(c, "checking results");
    for (size_t i = 0; i < c->n_runs; i++) {
        if (!c->runs[i].skip) check_run(c, &c->runs[i]);
        if (signal_caught()) return false;
    }
    since = now_seconds();
    for (size_t i = 0; i < c->o->n_repeats && (i == 0 || now_seconds() - since < c->o->seconds); i++) {
        char what[64];
        snprintf(what, sizeof what, "round %zu of %zu", i + 1, c->o->n_repeats);
        say(c, what);
        if (!run_round(c)) return false;
    }
    add_rows(c, rows);
    return true;
}

static struct bench_case *new_case(const struct bench_case_options *o, const struct bench_rows *rows)
{
    struct bench_case *c = calloc(1, sizeof *c);
    if (!c) die("out of memory");
    c->o = o;
    c->layer = &o->layer->layer;
    c->group = c->layer->shape.n_head / c->layer->shape.n_head_kv;
    c->dim = c->layer->shape.head_dim;
    c->n_heads = c->layer->shape.n_head_kv;
    list_runs(c, rows);
    return c;
}

void bench_case_skip(const struct bench_case_options *o, struct bench_rows *rows, const char *why)
{
    struct bench_case *c = new_case(o, rows);
    for (size_t i = 0; i < c->n_runs; i++) {
        struct bench_row *row = new_row(rows);
        *row = describe_run(c, &c->runs[i]);
        snprintf(row->skipped, sizeof row->skipped, "%s", why);
    }
    free(c);
}

bool bench_case_run(const struct bench_case_options *o, struct bench_rows *rows)
{
    struct bench_case *c = new_case(o, rows);
    struct sqz_arena arena = sqz_arena_on(NULL);
    carve(c, &arena, o);
    if (!pages_take(&c->memory, sqz_arena_bytes(&arena), o->layer->options.huge_pages)) die("out of memory");
    arena = sqz_arena_on(c->memory.data);
    carve(c, &arena, o);
    make_calls(c);
    if (o->ggml) make_ggml(c);
    const bool done = measure(c, rows);
    free_case(c);
    return done;
}
