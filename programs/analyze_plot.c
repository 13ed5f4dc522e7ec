/* Pictures of the analysis as gnuplot scripts; analyze.h describes them. */
#include <math.h>
#include <stdio.h>

#include "analyze.h"
#include "common.h"
#include "plot.h"

void plot_begin(struct text_buffer *script, const char *path, int width, int height)
{
    text_buffer_print(script, "set terminal %s size %d,%d font 'sans,%d'%s\n",
                      plot_is_svg(path) ? "svg enhanced" : "pngcairo enhanced", width, height,
                      plot_is_svg(path) ? 13 : 10, plot_is_svg(path) ? " background 'white'" : "");
    text_buffer_print(script, "set border 3\nset tics nomirror\nset grid lt 1 lc rgb '#dddddd'\n");
}

int plot_finish(struct text_buffer *script, const char *path)
{
    const int code = plot_draw(path, script);
    text_buffer_free(script);
    return code;
}

/* ---- Heat maps ------------------------------------------------------------------------ */

static void write_axis(struct text_buffer *script, const char *axis, const struct count_list *list)
{
    char text[NUMBER_TEXT_MAX];
    text_buffer_print(script, "set %stics (", axis);
    for (size_t i = 0; i < list->n; i++) {
        text_buffer_print(script, "%s'%s' %zu", i ? ", " : "", short_count(text, list->value[i]), i);
    }
    text_buffer_print(script, ")\nset %srange [-0.5:%zu.5]\n", axis, list->n - 1);
}

static void write_map_data(struct text_buffer *script, const struct analysis *a, const struct heat_map *map, size_t k)
{
    text_buffer_print(script, "$map%zu << END\n", k);
    for (size_t b = 0; b < a->batches.n; b++) {
        for (size_t s = 0; s < a->tokens.n; s++) {
            const double value = map->value[b * a->tokens.n + s];
            const char *unit = value >= 999.5e3 ? "M" : value >= 999.5 ? "k" : "";
            text_buffer_print(script, "%zu %zu %.6g %.3g%s\n", s, b, value,
                              value >= 999.5e3 ? value / 1e6 : value >= 999.5 ? value / 1e3 : value, unit);
        }
        text_buffer_print(script, "\n");
    }
    text_buffer_print(script, "END\n");
}

/* A contour needs a grid of 2 x 2 and values on both sides. */
static bool has_contour(const struct analysis *a, const struct heat_map *map)
{
    bool below = false, above = false;
    for (size_t i = 0; i < a->batches.n * a->tokens.n; i++) {
        below = below || map->value[i] < map->contour;
        above = above || map->value[i] > map->contour;
    }
    return below && above && a->batches.n > 1 && a->tokens.n > 1;
}

static void write_contour(struct text_buffer *script, const struct heat_map *map, size_t k)
{
    text_buffer_print(script, "set contour base\nunset surface\nset cntrparam levels discrete %.9g\n"
                              "set table $ridge%zu\nsplot $map%zu using 1:2:(log10($3))\nunset table\n"
                              "unset contour\nset surface\n", log10(map->contour), k, k);
}

/* Where all values lie on one side of the contour the title says so. */
static void write_title(struct text_buffer *script, const struct heat_map *map, bool contour)
{
    const char *all = "";
    if (map->contour > 0 && !contour) {
        all = map->value[0] > map->contour ? ", all above: compute-bound" : ", all below: memory-bound";
    }
    text_buffer_print(script, "set title '%s%s'\nset cblabel '%s'\n", map->title, all, map->unit);
}

int plot_heat_maps(const char *path, const struct analysis *a, const struct heat_map *maps, size_t n, int columns)
{
    struct text_buffer script = {0};
    const int rows = ((int)n + columns - 1) / columns;
    plot_begin(&script, path, 640 * columns, 420 * rows);
    for (size_t k = 0; k < n; k++) {
        write_map_data(&script, a, &maps[k], k);
    }
    text_buffer_print(&script, "set multiplot layout %d,%d\nunset key\nset logscale cb\nset format cb '%%g'\n"
                               "set palette defined (0 '#3b4cc0', 0.5 '#dddddd', 1 '#b40426')\n"
                               "set xlabel 'context (tokens)'\nset ylabel 'batch (sequences)'\n"
                               "set xtics rotate by -40\nunset grid\n", rows, columns);
    write_axis(&script, "x", &a->tokens);
    write_axis(&script, "y", &a->batches);
    for (size_t k = 0; k < n; k++) {
        const bool contour = maps[k].contour > 0 && has_contour(a, &maps[k]);
        write_title(&script, &maps[k], contour);
        if (contour) {
            write_contour(&script, &maps[k], k);
        }
        text_buffer_print(&script, "plot $map%zu using 1:2:3 with image, $map%zu using 1:2:4 "
                                   "with labels font ',8'", k, k);
        if (contour) {
            text_buffer_print(&script, ", $ridge%zu using 1:2 with lines lw 3 lc rgb 'black'", k);
        }
        text_buffer_print(&script, "\n");
    }
    text_buffer_print(&script, "unset multiplot\n");
    return plot_finish(&script, path);
}

/* ---- Roofline and bars ------------------------------------------------------------------- */

/* Points nearer to each other than that, as a factor on both axes, share a label: names on top of one another say
 * nothing. */
static const double label_distance = 1.3;

enum { LABEL_NAMES = 3 }; /* most names of a label; more are counted */

static bool is_near(double x, double y)
{
    return x < y * label_distance && y < x * label_distance;
}

static bool share_label(const struct analysis *a, const struct roof_point *p, const struct roof_point *q)
{
    return p->phase == q->phase && is_near(sqz_op_cost_intensity(&p->cost), sqz_op_cost_intensity(&q->cost)) &&
           is_near(sqz_op_cost_attained(&p->cost, &a->roof), sqz_op_cost_attained(&q->cost, &a->roof));
}

/* Whether a point before point i shares its label, which then stands there. */
static bool is_labelled(const struct analysis *a, const struct roof_point *points, size_t i)
{
    for (size_t j = 0; j < i; j++) {
        if (share_label(a, &points[i], &points[j])) {
            return true;
        }
    }
    return false;
}

/* One label for every group of points of a phase, at the group's first point. */
static void write_labels(struct text_buffer *script, const struct analysis *a, const struct roof_point *points,
                         size_t n, enum analyze_phase phase)
{
    text_buffer_print(script, "$%s_labels << END\n", phase_names[phase]);
    for (size_t i = 0; i < n; i++) {
        if (points[i].phase != phase || is_labelled(a, points, i)) {
            continue;
        }
        size_t n_names = 0;
        text_buffer_print(script, "%.9g %.9g \"", sqz_op_cost_intensity(&points[i].cost),
                          sqz_op_cost_attained(&points[i].cost, &a->roof) / 1e12);
        for (size_t j = i; j < n; j++) {
            if (share_label(a, &points[i], &points[j]) && n_names++ < LABEL_NAMES) {
                text_buffer_print(script, "%s%s", n_names > 1 ? ", " : "", points[j].label);
            }
        }
        if (n_names > LABEL_NAMES) {
            text_buffer_print(script, " and %zu more", n_names - LABEL_NAMES);
        }
        text_buffer_print(script, "\"\n");
    }
    text_buffer_print(script, "END\n");
}

static void write_points(struct text_buffer *script, const struct analysis *a, const struct roof_point *points,
                         size_t n)
{
    for (int phase = 0; phase < N_PHASES; phase++) {
        text_buffer_print(script, "$%s << END\n", phase_names[phase]);
        for (size_t i = 0; i < n; i++) {
            if (points[i].phase == (enum analyze_phase)phase) {
                text_buffer_print(script, "%.9g %.9g\n", sqz_op_cost_intensity(&points[i].cost),
                                  sqz_op_cost_attained(&points[i].cost, &a->roof) / 1e12);
            }
        }
        text_buffer_print(script, "END\n");
        write_labels(script, a, points, n, (enum analyze_phase)phase);
    }
}

static void write_bars(struct text_buffer *script, const struct time_bar *bars, size_t n)
{
    text_buffer_print(script, "$bars << END\n");
    for (size_t i = 0; i < n; i++) {
        const double all = bars[i].seconds[0] + bars[i].seconds[1] + bars[i].seconds[2];
        text_buffer_print(script, "\"%s\" %.6g %.6g %.6g\n", bars[i].label, 100 * bars[i].seconds[0] / all,
                          100 * bars[i].seconds[1] / all, 100 * bars[i].seconds[2] / all);
    }
    text_buffer_print(script, "END\n");
}

int plot_roofline(const char *path, const struct analysis *a, const struct roof_point *points, size_t n_points,
                  const struct time_bar *bars, size_t n_bars)
{
    struct text_buffer script = {0};
    const double peak = a->roof.flops_per_second / 1e12, bandwidth = a->roof.bytes_per_second / 1e12;
    plot_begin(&script, path, 1280, 520);
    write_points(&script, a, points, n_points);
    write_bars(&script, bars, n_bars);
    text_buffer_print(&script, "set multiplot layout 1,2\nset logscale xy\nset format '%%g'\nset key left top\n"
                               "set title 'Roofline, ridge point %.0f FLOP/byte'\nset samples 400\n"
                               "set xlabel 'arithmetic intensity (FLOP/byte)'\nset ylabel 'attainable TFLOP/s'\n"
                               "set xrange [0.1:1e5]\nset yrange [*:%.9g]\n"
                               "plot (x * %.9g < %.9g ? x * %.9g : %.9g) with lines lw 2 lc rgb 'black' title 'roof'",
                      peak / bandwidth, 3 * peak, bandwidth, peak, bandwidth, peak);
    text_buffer_print(&script, ", $prefill using 1:2 with points pt 7 lc rgb '#b40426' title 'prefill', "
                               "$decode using 1:2 with points pt 5 lc rgb '#3b4cc0' title 'decode', "
                               "$prefill_labels using 1:2:3 with labels font ',8' right rotate by 60 offset 0,-0.6 "
                               "notitle, "
                               "$decode_labels using 1:2:3 with labels font ',8' left offset 0.7,-0.3 notitle\n");
    text_buffer_print(&script, "unset logscale\nunset xrange\nset title 'Where the time goes'\n"
                               "set xlabel 'phase, batch, context'\n"
                               "set ylabel 'share of the time (%%)'\nset xrange [*:*]\nset yrange [0:100]\n"
                               "set key above\nset style data histograms\nset style histogram rowstacked\n"
                               "set style fill solid 0.8 noborder\nset boxwidth 0.7\nset xtics rotate by -30\n"
                               "plot $bars using 2:xtic(1) title 'linear' lc rgb '#3b4cc0'");
    text_buffer_print(&script, ", $bars using 3 title 'attention' lc rgb '#b40426', $bars using 4 title 'norm, "
                               "softmax, activation' lc rgb '#999999'\nunset multiplot\n");
    return plot_finish(&script, path);
}
