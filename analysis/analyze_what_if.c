/* What would change the time: squeezed attention, narrower numbers, speculation; and how lookups grow with the
 * context. analyze.h describes it. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "analyze.h"
#include "common.h"

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

enum { N_VARIANTS = 10 };

struct variant {
    const char *name;
    struct sqz_bit_widths bits;
    struct sqz_lookup_model lookup;
    bool speculates;
};

/* Seconds a generated token of the whole batch, and of its attention alone; bytes a token. */
struct prediction {
    double seconds, attention_seconds, bytes;
};

static struct sqz_costs step_costs(const struct analysis *a, const struct sqz_bit_widths *bits,
                                   const struct sqz_lookup_model *lookup, size_t batch, size_t tokens, size_t queries,
                                   size_t steps)
{
    struct sqz_costs costs;
    struct sqz_error error;
    struct sqz_workload work = sqz_workload_decode(batch, tokens, steps);
    work.n_query_tokens = work.n_logit_rows = queries;
    work.causal = a->causal;
    work.scores = a->scores;
    if (sqz_roofline(&costs, &a->shape, bits, &work, lookup, &error) != SQZ_OK) usage_error("%s", error.message);
    return costs;
}

static void add_scaled(struct prediction *sum, const struct analysis *a, const struct sqz_costs *costs, double scale)
{
    const struct sqz_op_cost all = sqz_costs_sum(costs, SQZ_CLASS_AGGREGATE);
    sum->seconds += scale * sqz_costs_seconds(costs, SQZ_CLASS_AGGREGATE, &a->roof);
    sum->attention_seconds += scale * sqz_costs_seconds(costs, SQZ_CLASS_ATTENTION, &a->roof);
    sum->bytes += scale * sqz_op_cost_bytes(&all);
}

/* Speculation: a cycle drafts gamma tokens with the draft's widths, then verifies them and one more in one step. */
static struct prediction predict(const struct analysis *a, const struct variant *v, size_t batch, size_t tokens)
{
    struct prediction sum = {0, 0, 0};
    const struct speculation *s = &a->speculation;
    if (!v->speculates) {
        const struct sqz_costs costs = step_costs(a, &v->bits, &v->lookup, batch, tokens, 1, a->n_generated);
        add_scaled(&sum, a, &costs, 1.0 / (double)a->n_generated);
        return sum;
    }
    struct sqz_bit_widths draft = v->bits;
    draft.weight = draft.output = fmin(draft.weight, s->weight_bits);
    draft.kv = fmin(draft.kv, s->kv_bits);
    const double per = 1.0 / sqz_speculation_tokens(s->acceptance, (uint32_t)s->gamma);
    const struct sqz_costs drafts = step_costs(a, &draft, &v->lookup, batch, tokens, 1, s->gamma);
    const struct sqz_costs check = step_costs(a, &v->bits, &v->lookup, batch, tokens, s->gamma + 1, 1);
    add_scaled(&sum, a, &drafts, per);
    add_scaled(&sum, a, &check, per);
    return sum;
}

static struct sqz_lookup_model two_levels(const struct sqz_lookup_model *asked)
{
    struct sqz_lookup_model lookup = *asked;
    if (lookup.kind == SQZ_LOOKUP_SHARES && lookup.n_levels == 1) {
        lookup.n_levels = 2;
        lookup.centroid_share[1] = lookup.centroid_share[0] / 5;
    }
    return lookup;
}

static struct sqz_lookup_model with_codes(const struct sqz_lookup_model *asked, uint32_t code_words)
{
    struct sqz_lookup_model lookup = *asked;
    lookup.code_words = code_words;
    return lookup;
}

/* Squeezed attention by whole clusters and by codes, beside each other; what is combined with it is as asked. */
static void make_variants(const struct analysis *a, struct variant variants[N_VARIANTS])
{
    const struct sqz_lookup_model none = {.kind = SQZ_LOOKUP_NONE}, clusters = with_codes(&a->lookup, 0);
    const struct sqz_lookup_model codes = with_codes(&a->lookup, a->lookup.code_words ? a->lookup.code_words : 2);
    const bool coded = a->lookup.code_words > 0;
    struct sqz_bit_widths kv8 = a->bits, kv4 = a->bits, w4 = a->bits;
    kv8.kv = 8;
    kv4.kv = 4;
    w4.weight = w4.output = 4;
    const struct variant all[N_VARIANTS] = {
        {"dense", a->bits, none, false},
        {"squeezed", a->bits, clusters, false},
        {"squeezed, two levels", a->bits, two_levels(&clusters), false},
        {"squeezed, codes", a->bits, codes, false},
        {"INT8 KV", kv8, none, false},
        {"INT4 KV", kv4, none, false},
        {"INT4 weights", w4, none, false},
        {"speculation", a->bits, none, true},
        {coded ? "squeezed, codes, INT4 weights" : "squeezed, INT4 weights", w4, a->lookup, false},
        {coded ? "squeezed, codes, speculation" : "squeezed, speculation", a->bits, a->lookup, true},
    };
    for (int i = 0; i < N_VARIANTS; i++) variants[i] = all[i];
}

static const struct table_column what_if_columns[] = {
    {"variant", "variant", 0, 0},
    {"batch", "batch", 1, 7},
    {"tokens", "tokens", 1, 10},
    {"seconds_a_token", "ms a token", 1e3, 4},
    {"speed_up", "speed-up", 1, 3},
    {"attention_speed_up", "of attention", 1, 3},
    {"bytes_a_token", "MB a token", 1e-6, 4},
};

int view_what_if(struct analysis *a)
{
    struct variant variants[N_VARIANTS];
    struct heat_map maps[N_VARIANTS - 1];
    struct table table;
    int code = 0;
    fill_counts(&a->batches, 1, a->plot ? 9 : 1);
    fill_counts(&a->tokens, a->plot ? 1024 : 4096, a->plot ? 11 : 9);
    const size_t n = a->batches.n * a->tokens.n;
    double *values = calloc(N_VARIANTS * n, sizeof *values);
    if (!values) die("out of memory");
    make_variants(a, variants);
    table_begin(&table, "what_if", NULL, what_if_columns, COUNT_OF(what_if_columns));
    for (size_t i = 0; i < n; i++) {
        const size_t batch = a->batches.value[i / a->tokens.n], tokens = a->tokens.value[i % a->tokens.n];
        const struct prediction dense = predict(a, &variants[0], batch, tokens);
        for (int v = 0; v < N_VARIANTS; v++) {
            const struct prediction p = predict(a, &variants[v], batch, tokens);
            values[(size_t)v * n + i] = dense.seconds / p.seconds;
            table_text(&table, variants[v].name);
            table_number(&table, (double)batch);
            table_number(&table, (double)tokens);
            table_number(&table, p.seconds);
            table_number(&table, dense.seconds / p.seconds);
            table_number(&table, dense.attention_seconds / p.attention_seconds);
            table_number(&table, p.bytes);
        }
    }
    for (int v = 1; v < N_VARIANTS; v++)
        maps[v - 1] = (struct heat_map){variants[v].name, "times dense decode", values + (size_t)v * n, 0};
    if (a->plot) code = plot_heat_maps(a->plot, a, maps, N_VARIANTS - 1, 3);
    free(values);
    print_subject(a);
    return analysis_print(a, &table, 1, NULL) || code;
}

/* ---- How lookups grow ------------------------------------------------------------------- */

static const struct table_column complexity_columns[] = {
    {"method", "method", 0, 0},          {"complexity", "complexity", 0, 0},
    {"tokens", "tokens N", 1, 10},       {"compared", "centroids compared", 1, 6},
    {"coded", "codes read", 1, 6},       {"retained", "keys retained", 1, 6},
    {"seconds", "attention ms", 1e3, 4}, {"exponent", "exponent of N", 1, 3},
};

enum { N_METHODS = 5 };

struct method {
    struct variant variant;
    const char *law;
    double rows[COUNT_LIST_MAX], milliseconds[COUNT_LIST_MAX]; /* of each length: rows of all kinds; attention */
};

/* Rows that do not grow: c, c' and k as asked, else what the shares take of the first length. */
static void make_methods(const struct analysis *a, struct method methods[N_METHODS])
{
    const struct sqz_lookup_model none = {.kind = SQZ_LOOKUP_NONE};
    struct sqz_lookup_model shares = a->lookup, counts = a->lookup;
    const double first = (double)a->tokens.value[0];
    const bool coded = a->lookup.code_words > 0;
    if (counts.kind != SQZ_LOOKUP_COUNTS) {
        counts.kind = SQZ_LOOKUP_COUNTS;
        counts.n_compared = fmax(1, 0.05 * first);
        counts.n_coded = fmax(1, 0.3 * first);
        counts.n_retained = fmax(1, 0.1 * first);
        counts.fan_out = 20;
    } else {
        shares.kind = SQZ_LOOKUP_SHARES;
        shares.n_levels = 1;
        shares.centroid_share[0] = 0.05;
        shares.budget = 0.125;
        shares.opened_share = 0.28;
        shares.coded_share = 0.3;
    }
    struct sqz_lookup_model one = counts, tree = counts;
    one.n_levels = 1;
    tree.n_levels = 0;
    const char *const in_proportion =
        coded ? "O(c + o + k), all in proportion to N" : "O(c + k), c and k in proportion to N";
    /* clang-format off */
    const struct method all[N_METHODS] = {
        {.variant = {"dense", a->bits, none, false}, .law = "O(N)"},
        {.variant = {"shares, one level", a->bits, shares, false}, .law = in_proportion},
        {.variant = {"shares, two levels", a->bits, two_levels(&shares), false}, .law = in_proportion},
        {.variant = {"counts, one level", a->bits, one, false}, .law = coded ? "O(c + o + k)" : "O(c + k)"},
        {.variant = {"counts, hierarchy", a->bits, tree, false},
         .law = coded ? "O(c' log N + o + k)" : "O(c' log N + k)"},
    };
    /* clang-format on */
    memcpy(methods, all, sizeof all);
}

static void add_lengths(const struct analysis *a, struct method *m, struct table *table)
{
    for (size_t i = 0; i < a->tokens.n; i++) {
        const double tokens = (double)a->tokens.value[i];
        const struct sqz_lookup_counts n = sqz_lookup_reads(&m->variant.lookup, &a->bits, a->shape.head_dim, tokens);
        const struct prediction p = predict(a, &m->variant, a->batches.value[0], a->tokens.value[i]);
        m->rows[i] = n.compared + n.coded + n.retained;
        m->milliseconds[i] = 1e3 * p.attention_seconds;
        table_text(table, m->variant.name);
        table_text(table, m->law);
        table_number(table, tokens);
        table_number(table, n.compared);
        table_number(table, n.coded);
        table_number(table, n.retained);
        table_number(table, p.attention_seconds);
        table_number(table, i ? log(m->rows[i] / m->rows[i - 1]) / log(tokens / (double)a->tokens.value[i - 1]) : NAN);
    }
}

static int draw_complexity(const struct analysis *a, const struct method methods[N_METHODS])
{
    static const char *const colours[N_METHODS] = {"#000000", "#3b4cc0", "#3b4cc0", "#b40426", "#b40426"};
    struct plot_curve rows[N_METHODS], times[N_METHODS];
    double lengths[COUNT_LIST_MAX];
    for (size_t i = 0; i < a->tokens.n; i++) lengths[i] = (double)a->tokens.value[i];
    for (int m = 0; m < N_METHODS; m++) {
        const bool dashed = m == 2 || m == 4;
        rows[m] = (struct plot_curve){
            .x = lengths, .y = methods[m].rows, .n = a->tokens.n, .colour = colours[m], .dashed = dashed};
        snprintf(rows[m].label, sizeof rows[m].label, "%s: %s", methods[m].variant.name, methods[m].law);
        times[m] = rows[m];
        times[m].y = methods[m].milliseconds;
    }
    /* clang-format off */
    const struct plot_panel panels[] = {
        {.title = "What a lookup and attention read", .x_label = "context N (tokens)",
         .y_label = "centroids, codes and keys read (number a KV head)", .curves = rows, .n_curves = N_METHODS},
        {.title = "Attention of a generated token", .x_label = "context N (tokens)", .y_label = "time at least (ms)",
         .curves = times, .n_curves = N_METHODS},
    };
    /* clang-format on */
    return plot_panels(a->plot, panels, COUNT_OF(panels));
}

int view_complexity(struct analysis *a)
{
    struct method methods[N_METHODS];
    struct table table;
    int code = 0;
    fill_counts(&a->batches, 1, 1);
    fill_counts(&a->tokens, 16384, 10);
    make_methods(a, methods);
    table_begin(&table, "complexity", NULL, complexity_columns, COUNT_OF(complexity_columns));
    for (int m = 0; m < N_METHODS; m++) add_lengths(a, &methods[m], &table);
    if (a->plot) code = draw_complexity(a, methods);
    print_subject(a);
    return analysis_print(a, &table, 1, NULL) || code;
}
