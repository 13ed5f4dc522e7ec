/* Every operation of a workload, machines and ridge points, the asymptotic table; analyze.h describes them. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "analyze.h"
#include "asymptotic.h"
#include "common.h"
#include "memory.h"
#include "plot.h"

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

/* ---- Operations --------------------------------------------------------------------- */

static const struct table_column operation_columns[] = {
    {"phase", "phase", 0, 0},
    {"batch", "batch", 1, 7},
    {"tokens", "tokens", 1, 10},
    {"operation", "operation", 0, 0},
    {"flops", "GFLOP", 1e-9, 4},
    {"bytes", "MB", 1e-6, 4},
    {"weight_bytes", NULL, 1, 4},
    {"activation_bytes", NULL, 1, 4},
    {"kv_bytes", NULL, 1, 4},
    {"score_bytes", NULL, 1, 4},
    {"intensity", "FLOP/byte", 1, 4},
    {"seconds", "ms", 1e3, 4},
    {"attained_flops_per_second", "GFLOP/s", 1e-9, 4},
    {"bound", "bound by", 0, 0},
    {"share_of_time", "time %", 100, 3},
};

struct workload_rows {
    struct analysis *a;
    struct table table;
    struct roof_point *points;
    struct time_bar *bars;
    size_t n_points, n_bars;
};

/* seconds: that of one operation, or a sum of several. */
static void add_operation(struct workload_rows *rows, enum analyze_phase phase, size_t batch, size_t tokens,
                          const char *name, const struct sqz_op_cost *cost, double seconds, double all)
{
    struct table *t = &rows->table;
    table_text(t, phase_names[phase]);
    table_number(t, (double)batch);
    table_number(t, (double)tokens);
    table_text(t, name);
    table_number(t, cost->flops);
    table_number(t, sqz_op_cost_bytes(cost));
    table_number(t, cost->weight_bytes);
    table_number(t, cost->activation_bytes);
    table_number(t, cost->kv_bytes);
    table_number(t, cost->score_bytes);
    table_number(t, sqz_op_cost_bytes(cost) > 0 ? sqz_op_cost_intensity(cost) : NAN);
    table_number(t, seconds);
    table_number(t, seconds > 0 ? cost->flops / seconds : 0);
    table_text(t, sqz_op_cost_bytes(cost) > 0 ? bound_name(rows->a, cost) : "compute");
    table_number(t, seconds / all);
}

static void add_point(struct workload_rows *rows, enum analyze_phase phase, const char *name,
                      const struct sqz_op_cost *cost)
{
    if (cost->flops > 0 && sqz_op_cost_bytes(cost) > 0) {
        struct roof_point *point = &rows->points[rows->n_points++];
        point->phase = phase;
        point->cost = *cost;
        snprintf(point->label, sizeof point->label, "%s", name);
    }
}

static void add_workload(struct workload_rows *rows, enum analyze_phase phase, size_t batch, size_t tokens)
{
    const struct analysis *a = rows->a;
    const struct sqz_costs costs = analysis_costs(a, phase, batch, tokens);
    const double all = sqz_costs_seconds(&costs, SQZ_CLASS_AGGREGATE, &a->roof);
    struct time_bar *bar = &rows->bars[rows->n_bars++];
    char length[NUMBER_TEXT_MAX];
    for (int op = 0; op < SQZ_N_OPS; op++) {
        const struct sqz_op_cost *cost = &costs.op[op];
        if (cost->flops > 0 || sqz_op_cost_bytes(cost) > 0) {
            add_operation(rows, phase, batch, tokens, sqz_op_name((enum sqz_op)op), cost,
                          sqz_op_cost_seconds(cost, &a->roof), all);
            add_point(rows, phase, sqz_op_name((enum sqz_op)op), cost);
        }
    }
    for (int c = 0; c < SQZ_N_CLASSES; c++) {
        const struct sqz_op_cost sum = sqz_costs_sum(&costs, (enum sqz_op_class)c);
        const double seconds = sqz_costs_seconds(&costs, (enum sqz_op_class)c, &a->roof);
        char name[64];
        snprintf(name, sizeof name, "= %s", sqz_op_class_name((enum sqz_op_class)c));
        add_operation(rows, phase, batch, tokens, name, &sum, seconds, all);
        if (c < SQZ_CLASS_AGGREGATE) bar->seconds[c] = seconds;
    }
    snprintf(bar->label, sizeof bar->label, "%s B=%zu %s", phase_names[phase], batch, short_count(length, tokens));
}

int view_operations(struct analysis *a)
{
    fill_counts(&a->batches, 1, 1);
    fill_counts(&a->tokens, 4096, 1);
    const size_t n = N_PHASES * a->batches.n * a->tokens.n;
    struct workload_rows rows = {
        .a = a, .points = calloc(n * SQZ_N_OPS, sizeof *rows.points), .bars = calloc(n, sizeof *rows.bars)};
    int code = 0;
    if (!rows.points || !rows.bars) die("out of memory");
    table_begin(&rows.table, "operations", NULL, operation_columns, COUNT_OF(operation_columns));
    for (size_t b = 0; b < a->batches.n; b++) {
        for (size_t s = 0; s < a->tokens.n; s++)
            for (int phase = 0; phase < N_PHASES; phase++)
                add_workload(&rows, (enum analyze_phase)phase, a->batches.value[b], a->tokens.value[s]);
    }
    if (a->plot) code = plot_roofline(a->plot, a, rows.points, rows.n_points, rows.bars, rows.n_bars);
    free(rows.points);
    free(rows.bars);
    print_subject(a);
    return analysis_print(a, &rows.table, 1, NULL) || code;
}

/* ---- Machines ------------------------------------------------------------------------- */

static const struct table_column machine_columns[] = {
    {"machine", "machine", 0, 0},
    {"year", "year", 1, 4},
    {"bytes_per_second", "GB/s", 1e-9, 5},
    {"precision", "precision", 0, 0},
    {"flops_per_second", "TFLOP/s", 1e-12, 5},
    {"ridge_flop_per_byte", "ridge FLOP/byte", 1, 3},
    {"note", "note", 0, 0},
};

static void add_machine(struct table *t, const struct sqz_machine *m, enum sqz_precision precision)
{
    const struct sqz_roof roof = {m->flops_per_second[precision], m->bytes_per_second};
    table_text(t, m->name);
    table_number(t, m->year ? m->year : NAN);
    table_number(t, m->bytes_per_second);
    table_text(t, sqz_precision_name(precision));
    table_number(t, roof.flops_per_second);
    table_number(t, sqz_roof_ridge(&roof));
    table_text(t, precision == m->precision ? m->note : "");
}

struct ridge {
    const struct sqz_machine *machine;
    double flop_per_byte, label; /* where its name stands */
};

static int by_year_and_ridge(const void *a, const void *b)
{
    const struct ridge *x = a, *y = b;
    if (x->machine->year != y->machine->year) return x->machine->year < y->machine->year ? -1 : 1;
    return (x->flop_per_byte > y->flop_per_byte) - (x->flop_per_byte < y->flop_per_byte);
}

/* Sorted by year; names of a year, and those without a year, far enough apart. Returns the highest name. */
static double place_names(struct ridge *ridges, size_t n)
{
    double highest = 0, top = 0;
    for (size_t i = 0; i < n; i++) highest = fmax(highest, ridges[i].flop_per_byte);
    qsort(ridges, n, sizeof *ridges, by_year_and_ridge);
    for (size_t i = 0; i < n; i++) {
        const bool follows = i > 0 && ridges[i].machine->year == ridges[i - 1].machine->year;
        const double least = follows ? ridges[i - 1].label + 0.045 * highest : 0;
        ridges[i].label = fmax(ridges[i].flop_per_byte, least);
        top = fmax(top, ridges[i].label);
    }
    return top;
}

static const char *drawn_name(const struct sqz_machine *machine)
{
    return strpbrk(machine->name, "\"\\`") ? "?" : machine->name; /* gnuplot looks into its strings */
}

/* A machine without a year, such as this one, is a line. */
static void write_ridges(struct text_buffer *script, const struct ridge *ridges, size_t n)
{
    uint32_t first = 2016, last = 2023;
    text_buffer_print(script, "$ridge << END\n");
    for (size_t i = 0; i < n; i++) {
        const struct sqz_machine *m = ridges[i].machine;
        if (m->year) {
            text_buffer_print(script, "%u %.9g %.9g \"%s\"\n", m->year, ridges[i].flop_per_byte, ridges[i].label,
                              drawn_name(m));
            first = m->year < first ? m->year : first;
            last = m->year > last ? m->year : last;
        }
    }
    text_buffer_print(script, "END\nset xrange [%u:%u]\n", first - 1, last + 2);
    for (size_t i = 0; i < n; i++) {
        if (ridges[i].machine->year == 0) {
            text_buffer_print(script,
                              "set arrow from graph 0,first %.9g to graph 1,first %.9g nohead dt 2 "
                              "lc rgb '#999999'\nset label \"%s\" at graph 0.01,first %.9g left noenhanced "
                              "offset 0,0.5\n",
                              ridges[i].flop_per_byte, ridges[i].flop_per_byte, drawn_name(ridges[i].machine),
                              ridges[i].label);
        }
    }
}

static int plot_ridges(const struct analysis *a, const struct machine_list *list, bool here)
{
    struct text_buffer script = {0};
    struct ridge *ridges = allocate(list->n + 1, sizeof *ridges);
    for (size_t i = 0; i < list->n + here; i++) {
        const struct sqz_machine *m = i < list->n ? &list->machines[i] : &a->machine;
        ridges[i] = (struct ridge){m, m->flops_per_second[m->precision] / m->bytes_per_second, 0};
    }
    plot_begin(&script, a->plot, 760, 480);
    const double top = place_names(ridges, list->n + here);
    write_ridges(&script, ridges, list->n + here);
    text_buffer_print(&script,
                      "set title 'Ridge points: below memory-bound, above compute-bound'\n"
                      "set xlabel 'year of announcement'\nset ylabel 'ridge point (FLOP/byte)'\n"
                      "set yrange [0:%.9g]\nunset key\n"
                      "plot $ridge using 1:2 with points pt 7 ps 1 lc rgb '#1f77b4', "
                      "$ridge using 1:3:4 with labels noenhanced left offset 1,0.2\n",
                      1.1 * top);
    free(ridges);
    return plot_finish(&script, a->plot);
}

int view_machines(struct analysis *a, const struct machine_list *list)
{
    struct table table;
    int code = 0;
    const bool here = strcmp(a->machine.name, "here") == 0; /* behind those known, this one where it was asked for */
    table_begin(&table, "machines", NULL, machine_columns, COUNT_OF(machine_columns));
    for (size_t i = 0; i < list->n + here; i++) {
        const struct sqz_machine *m = i < list->n ? &list->machines[i] : &a->machine;
        add_machine(&table, m, m->precision);
        for (int p = 0; p < SQZ_N_PRECISIONS; p++)
            if (p != (int)m->precision && m->flops_per_second[p] > 0) add_machine(&table, m, (enum sqz_precision)p);
    }
    if (a->plot) code = plot_ridges(a, list, here);
    return analysis_print(a, &table, 1, NULL) || code;
}

/* ---- The asymptotic table ---------------------------------------------------------------- */

static const struct table_column growth_columns[] = {
    {"phase", "phase", 0, 0},
    {"class", "operations", 0, 0},
    {"flops", "FLOPs", 0, 0},
    {"bytes", "memory operations", 0, 0},
    {"intensity_short", "intensity, S_L << d", 0, 0},
    {"intensity_long", "S_L >> d", 0, 0},
    {"deviation", "deviation %", 100, 2},
};

static void add_growth(struct table *t, enum growth_phase phase, enum growth_class growth_class)
{
    static const char *const classes[] = {"linear", "attention", "aggregate"};
    struct growth growth[N_REGIMES];
    char text[GROWTH_TEXT_MAX], law[64];
    double deviation = 0.0;
    table_text(t, phase_names[phase]);
    table_text(t, classes[growth_class]);
    for (int r = 0; r < N_REGIMES; r++) {
        growth_fit(&growth[r], phase, growth_class, (enum regime)r);
        deviation = fmax(deviation, exp2(growth[r].intensity.deviation) - 1.0);
    }
    growth_flops_text(growth, text);
    table_text(t, text);
    growth_bytes_text(growth, growth_class, text);
    table_text(t, text);
    for (int r = 0; r < N_REGIMES; r++) {
        power_law_text(&growth[r].intensity, law, sizeof law);
        snprintf(text, sizeof text, "O(%s)", law);
        table_text(t, text);
    }
    table_number(t, deviation);
}

/* ---- Their picture: intensity over the context at one width, what the exponents are read from ---- */

enum { GROWTH_LENGTHS = 49, GROWTH_BATCHES = 2, GROWTH_CURVES = N_GROWTH_CLASSES * GROWTH_BATCHES };
static const double growth_width = 4096, growth_batches[GROWTH_BATCHES] = {1, 64};

struct growth_curves {
    double lengths[GROWTH_LENGTHS], intensity[GROWTH_CURVES][GROWTH_LENGTHS];
    struct plot_curve curves[GROWTH_CURVES];
};

static void fill_curves(struct growth_curves *g, enum growth_phase phase)
{
    static const char *const classes[] = {"linear", "attention", "aggregate"};
    static const char *const colours[] = {"#3b4cc0", "#b40426", "#000000"};
    for (int i = 0; i < GROWTH_LENGTHS; i++) g->lengths[i] = round(exp2(0.5 * i));
    for (int c = 0; c < GROWTH_CURVES; c++) {
        const enum growth_class growth_class = (enum growth_class)(c % N_GROWTH_CLASSES);
        const double batch = growth_batches[c / N_GROWTH_CLASSES];
        struct plot_curve *curve = &g->curves[c];
        char laws[N_REGIMES][32];
        for (int i = 0; i < GROWTH_LENGTHS; i++)
            g->intensity[c][i] = growth_intensity(phase, growth_class, batch, g->lengths[i], growth_width);
        for (int r = 0; r < N_REGIMES; r++) {
            struct growth growth;
            growth_fit(&growth, phase, growth_class, (enum regime)r);
            power_law_text(&growth.intensity, laws[r], sizeof laws[r]);
        }
        *curve = (struct plot_curve){.x = g->lengths,
                                     .y = g->intensity[c],
                                     .n = GROWTH_LENGTHS,
                                     .colour = colours[growth_class],
                                     .dashed = c >= N_GROWTH_CLASSES};
        snprintf(curve->label, sizeof curve->label, "%s, B = %g: O(%s), then O(%s)", classes[growth_class], batch,
                 laws[REGIME_SHORT], laws[REGIME_LONG]);
    }
}

static int plot_growth(const struct analysis *a)
{
    struct growth_curves *growth = allocate(N_GROWTH_PHASES, sizeof *growth);
    struct plot_panel panels[N_GROWTH_PHASES];
    char titles[N_GROWTH_PHASES][64], ridge[128];
    snprintf(ridge, sizeof ridge, "ridge point, %.3g FLOP/byte", sqz_roof_ridge(&a->roof));
    for (int phase = 0; phase < N_GROWTH_PHASES; phase++) {
        fill_curves(&growth[phase], (enum growth_phase)phase);
        snprintf(titles[phase], sizeof titles[phase], "%s at d = %g", phase_names[phase], growth_width);
        panels[phase] = (struct plot_panel){.title = titles[phase],
                                            .x_label = "context S_L (tokens)",
                                            .y_label = "arithmetic intensity (FLOP/byte)",
                                            .curves = growth[phase].curves,
                                            .n_curves = GROWTH_CURVES,
                                            .across = sqz_roof_ridge(&a->roof),
                                            .across_label = ridge,
                                            .up = growth_width,
                                            .up_label = "S_L = d"};
    }
    const int code = plot_panels(a->plot, panels, N_GROWTH_PHASES);
    free(growth);
    return code;
}

int view_asymptotic(struct analysis *a)
{
    struct table table;
    int code = 0;
    table_begin(&table, "asymptotic", NULL, growth_columns, COUNT_OF(growth_columns));
    for (int phase = 0; phase < N_GROWTH_PHASES; phase++)
        for (int c = 0; c < N_GROWTH_CLASSES; c++) add_growth(&table, (enum growth_phase)phase, (enum growth_class)c);
    if (a->plot) code = plot_growth(a);
    return analysis_print(a, &table, 1, NULL) || code;
}
