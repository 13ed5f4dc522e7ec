/* Every operation of a workload, machines and ridge points, the asymptotic table; analyze.h describes them. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "analyze.h"
#include "asymptotic.h"
#include "common.h"
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
        if (c < SQZ_CLASS_AGGREGATE) {
            bar->seconds[c] = seconds;
        }
    }
    snprintf(bar->label, sizeof bar->label, "%s B=%zu %s", phase_names[phase], batch, short_count(length, tokens));
}

int view_operations(struct analysis *a)
{
    fill_counts(&a->batches, 1, 1);
    fill_counts(&a->tokens, 4096, 1);
    const size_t n = N_PHASES * a->batches.n * a->tokens.n;
    struct workload_rows rows = {.a = a, .points = calloc(n * SQZ_N_OPS, sizeof *rows.points),
                                 .bars = calloc(n, sizeof *rows.bars)};
    int code = 0;
    if (!rows.points || !rows.bars) {
        die("out of memory");
    }
    table_begin(&rows.table, "operations", NULL, operation_columns, COUNT_OF(operation_columns));
    for (size_t b = 0; b < a->batches.n; b++) {
        for (size_t s = 0; s < a->tokens.n; s++) {
            for (int phase = 0; phase < N_PHASES; phase++) {
                add_workload(&rows, (enum analyze_phase)phase, a->batches.value[b], a->tokens.value[s]);
            }
        }
    }
    if (a->plot) {
        code = plot_roofline(a->plot, a, rows.points, rows.n_points, rows.bars, rows.n_bars);
    }
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

static int plot_ridges(const struct analysis *a, const struct machine_list *list)
{
    struct text_buffer script = {0};
    plot_begin(&script, a->plot, 760, 480);
    text_buffer_print(&script, "$ridge << END\n");
    for (size_t i = 0; i < list->n; i++) {
        const struct sqz_machine *m = &list->machines[i];
        if (m->year) {
            text_buffer_print(&script, "%u %.9g \"%s\"\n", m->year,
                              m->flops_per_second[m->precision] / m->bytes_per_second,
                              strpbrk(m->name, "\"\\") ? "?" : m->name);
        }
    }
    text_buffer_print(&script, "END\nset title 'Ridge points: below memory-bound, above compute-bound'\n"
                               "set xlabel 'year of announcement'\nset ylabel 'ridge point (FLOP/byte)'\n"
                               "set xrange [2015:2025]\nset yrange [0:*]\nunset key\n"
                               "plot $ridge using 1:2 with points pt 7 ps 1 lc rgb '#1f77b4', "
                               "$ridge using 1:2:3 with labels noenhanced left offset 1,0.2\n");
    return plot_finish(&script, a->plot);
}

int view_machines(struct analysis *a, const struct machine_list *list)
{
    struct table table;
    int code = 0;
    table_begin(&table, "machines", NULL, machine_columns, COUNT_OF(machine_columns));
    for (size_t i = 0; i <= list->n; i++) {
        /* Behind those known, this one where it was asked for. */
        if (i == list->n && strcmp(a->machine.name, "here") != 0) {
            break;
        }
        const struct sqz_machine *m = i < list->n ? &list->machines[i] : &a->machine;
        add_machine(&table, m, m->precision);
        for (int p = 0; p < SQZ_N_PRECISIONS; p++) {
            if (p != (int)m->precision && m->flops_per_second[p] > 0) {
                add_machine(&table, m, (enum sqz_precision)p);
            }
        }
    }
    if (a->plot) {
        code = plot_ridges(a, list);
    }
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
    {"deviation", "deviation", 1, 2},
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

int view_asymptotic(struct analysis *a)
{
    struct table table;
    if (a->plot) {
        usage_error("--plot: the asymptotic table has no picture; allowed with the other views");
    }
    table_begin(&table, "asymptotic", NULL, growth_columns, COUNT_OF(growth_columns));
    for (int phase = 0; phase < N_GROWTH_PHASES; phase++) {
        for (int c = 0; c < N_GROWTH_CLASSES; c++) {
            add_growth(&table, (enum growth_phase)phase, (enum growth_class)c);
        }
    }
    return analysis_print(a, &table, 1, NULL);
}
