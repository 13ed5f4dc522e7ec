/* Intensity and time over batch and context, as in the talk's heat maps; analyze.h describes it. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "analyze.h"
#include "common.h"

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

static const struct table_column map_columns[] = {
    {"phase", "phase", 0, 0},
    {"batch", "batch", 1, 7},
    {"tokens", "tokens", 1, 10},
    {"intensity", "FLOP/byte", 1, 4},
    {"bound", "bound by", 0, 0},
    {"seconds", "ms", 1e3, 4},
    {"dominant", "most bytes", 0, 0},
    {"dominant_share", "bytes %", 100, 3},
    {"memory_bytes", "weights and KV GB", 1e-9, 4},
    {"fits", "fits", 0, 0},
};

static void add_cell(const struct analysis *a, struct table *t, enum analyze_phase phase, size_t batch, size_t tokens,
                     double *intensity, double *seconds)
{
    const struct sqz_costs costs = analysis_costs(a, phase, batch, tokens);
    const struct sqz_op_cost all = sqz_costs_sum(&costs, SQZ_CLASS_AGGREGATE);
    const double held = sqz_shape_weight_bytes(&a->shape, &a->bits) +
                        (double)batch * sqz_shape_kv_bytes(&a->shape, &a->bits, (double)tokens);
    double most = 0.0;
    const char *dominant = "";
    for (int c = 0; c < SQZ_CLASS_AGGREGATE; c++) {
        const struct sqz_op_cost sum = sqz_costs_sum(&costs, (enum sqz_op_class)c);
        if (sqz_op_cost_bytes(&sum) > most) {
            most = sqz_op_cost_bytes(&sum);
            dominant = sqz_op_class_name((enum sqz_op_class)c);
        }
    }
    *intensity = sqz_op_cost_intensity(&all);
    *seconds = sqz_costs_seconds(&costs, SQZ_CLASS_AGGREGATE, &a->roof);
    table_text(t, phase_names[phase]);
    table_number(t, (double)batch);
    table_number(t, (double)tokens);
    table_number(t, *intensity);
    table_text(t, bound_name(a, &all));
    table_number(t, *seconds);
    table_text(t, dominant);
    table_number(t, most / sqz_op_cost_bytes(&all));
    table_number(t, held);
    table_text(t, !(a->machine.memory_bytes > 0) ? "unknown" : held <= a->machine.memory_bytes ? "yes" : "no");
}

static int draw(const struct analysis *a, double *values[N_PHASES][2])
{
    char seconds_title[N_PHASES][96], intensity_title[N_PHASES][96];
    struct heat_map maps[2 * N_PHASES];
    for (int phase = 0; phase < N_PHASES; phase++) {
        snprintf(intensity_title[phase], sizeof *intensity_title, "%s: arithmetic intensity, ridge point %.3g",
                 phase_names[phase], sqz_roof_ridge(&a->roof));
        snprintf(seconds_title[phase], sizeof *seconds_title, "%s: time%s", phase_names[phase],
                 phase == PHASE_DECODE && a->n_generated == 1 ? " a token" : "");
        maps[2 * phase] =
            (struct heat_map){intensity_title[phase], "FLOP/byte", values[phase][0], sqz_roof_ridge(&a->roof)};
        maps[2 * phase + 1] = (struct heat_map){seconds_title[phase], "seconds", values[phase][1], 0.0};
    }
    return plot_heat_maps(a->plot, a, maps, 2 * N_PHASES, 2);
}

int view_maps(struct analysis *a)
{
    struct table table;
    double *values[N_PHASES][2];
    int code = 0;
    fill_counts(&a->batches, 1, 9);
    fill_counts(&a->tokens, 1024, 11);
    const size_t n = a->batches.n * a->tokens.n;
    double *block = calloc(2 * N_PHASES * n, sizeof *block);
    if (!block) die("out of memory");
    table_begin(&table, "map", NULL, map_columns, COUNT_OF(map_columns));
    for (int phase = 0; phase < N_PHASES; phase++) {
        values[phase][0] = block + 2 * (size_t)phase * n;
        values[phase][1] = values[phase][0] + n;
        for (size_t i = 0; i < n; i++) {
            add_cell(a, &table, (enum analyze_phase)phase, a->batches.value[i / a->tokens.n],
                     a->tokens.value[i % a->tokens.n], &values[phase][0][i], &values[phase][1][i]);
        }
    }
    if (a->plot) code = draw(a, values);
    free(block);
    print_subject(a);
    return analysis_print(a, &table, 1, NULL) || code;
}
