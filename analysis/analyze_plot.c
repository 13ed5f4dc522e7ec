/* Pictures of the analysis as gnuplot scripts; analyze.h describes them. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "analyze.h"
#include "common.h"
#include "memory.h"
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
    for (size_t i = 0; i < list->n; i++)
        text_buffer_print(script, "%s'%s' %zu", i ? ", " : "", short_count(text, list->value[i]), i);
    text_buffer_print(script, ")\nset %srange [-0.5:%zu.5]\n", axis, list->n - 1);
}

/* Three digits, with k and M for thousands and millions, m for thousandths. */
static const char *short_number(char text[NUMBER_TEXT_MAX], double value)
{
    const double unit = value >= 999.5e3 ? 1e6 : value >= 999.5 ? 1e3 : value < 0.0995 ? 1e-3 : 1;
    snprintf(text, NUMBER_TEXT_MAX, "%.3g%s", value / unit, unit > 1e3 ? "M" : unit > 1 ? "k" : unit < 1 ? "m" : "");
    return text;
}

static void write_map_data(struct text_buffer *script, const struct analysis *a, const struct heat_map *map, size_t k)
{
    char text[NUMBER_TEXT_MAX];
    text_buffer_print(script, "$map%zu << END\n", k);
    for (size_t b = 0; b < a->batches.n; b++) {
        for (size_t s = 0; s < a->tokens.n; s++) {
            const double value = map->value[b * a->tokens.n + s];
            text_buffer_print(script, "%zu %zu %.6g %s\n", s, b, value, short_number(text, value));
        }
        text_buffer_print(script, "\n");
    }
    text_buffer_print(script, "END\n");
}

/* Numbers beside the colours: a logarithmic axis of less than some decades has next to none of its own. */
static void write_colour_tics(struct text_buffer *script, const struct analysis *a, const struct heat_map *map)
{
    static const struct {
        double most; /* highest value over lowest */
        size_t n;
        double step[20];
    } kinds[] = {{2.5, 20, {1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 2, 2.2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9}},
                 {20, 9, {1, 1.2, 1.5, 2, 3, 4, 5, 6, 8}},
                 {1000, 3, {1, 2, 5}},
                 {INFINITY, 1, {1}}};
    double low = INFINITY, high = 0;
    for (size_t i = 0; i < a->batches.n * a->tokens.n; i++) {
        low = fmin(low, map->value[i]);
        high = fmax(high, map->value[i]);
    }
    size_t kind = 0;
    while (kind < 3 && !(high < kinds[kind].most * low)) kind++;
    char text[NUMBER_TEXT_MAX];
    const char *before = "set cbtics (";
    if (high > low) text_buffer_print(script, "set cbrange [%.9g:%.9g]\n", low, high);
    else text_buffer_print(script, "set cbrange [%.9g:%.9g]\n", low / 1.1, low * 1.1);
    for (double decade = pow(10, floor(log10(low))); decade <= high; decade *= 10) {
        for (size_t i = 0; i < kinds[kind].n; i++) {
            const double at = decade * kinds[kind].step[i];
            if (at >= low * 0.999 && at <= high * 1.001) {
                text_buffer_print(script, "%s'%s' %.9g", before, short_number(text, at), at);
                before = ", ";
            }
        }
    }
    text_buffer_print(script, "%s", *before == ',' ? ")\n" : "set cbtics autofreq\n");
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
    text_buffer_print(script,
                      "set contour base\nunset surface\nset cntrparam levels discrete %.9g\n"
                      "set table $ridge%zu\nsplot $map%zu using 1:2:(log10($3))\nunset table\n"
                      "unset contour\nset surface\n",
                      log10(map->contour), k, k);
}

/* Where all values lie on one side of the contour the title says so. */
static void write_title(struct text_buffer *script, const struct heat_map *map, bool contour)
{
    const char *all = "";
    if (map->contour > 0 && !contour)
        all = map->value[0] > map->contour ? ", all above: compute-bound" : ", all below: memory-bound";
    text_buffer_print(script, "set title '%s%s'\nset cblabel '%s' offset 1,0\n", map->title, all, map->unit);
}

int plot_heat_maps(const char *path, const struct analysis *a, const struct heat_map *maps, size_t n, int columns)
{
    struct text_buffer script = {0};
    const int rows = ((int)n + columns - 1) / columns;
    plot_begin(&script, path, 640 * columns, 420 * rows);
    for (size_t k = 0; k < n; k++) write_map_data(&script, a, &maps[k], k);
    text_buffer_print(&script,
                      "set multiplot layout %d,%d\nunset key\nset logscale cb\nset format cb '%%g'\n"
                      "set palette defined (0 '#3b4cc0', 0.5 '#dddddd', 1 '#b40426')\n"
                      "set xlabel 'context (tokens)'\nset ylabel 'batch (sequences)'\n"
                      "set xtics rotate by -40\nunset grid\n",
                      rows, columns);
    write_axis(&script, "x", &a->tokens);
    write_axis(&script, "y", &a->batches);
    for (size_t k = 0; k < n; k++) {
        const bool contour = maps[k].contour > 0 && has_contour(a, &maps[k]);
        write_title(&script, &maps[k], contour);
        write_colour_tics(&script, a, &maps[k]);
        if (contour) write_contour(&script, &maps[k], k);
        /* Boxes: gnuplot's images need a grid of 2 x 2. */
        text_buffer_print(&script,
                          "plot $map%zu using 1:2:(0.5):(0.5):3 with boxxyerror palette fillstyle solid "
                          "noborder, $map%zu using 1:2:4 with labels font ',8'",
                          k, k);
        if (contour) text_buffer_print(&script, ", $ridge%zu using 1:2 with lines lw 3 lc rgb 'black'", k);
        text_buffer_print(&script, "\n");
    }
    text_buffer_print(&script, "unset multiplot\n");
    return plot_finish(&script, path);
}

/* ---- Curves ------------------------------------------------------------------------------ */

/* Lengths as short_count() writes them: powers of 16 or, over less than three of those, of 4. */
static void write_length_tics(struct text_buffer *script, const struct plot_panel *panel)
{
    double low = INFINITY, high = 0;
    for (size_t c = 0; c < panel->n_curves; c++) {
        for (size_t i = 0; i < panel->curves[c].n; i++) {
            low = fmin(low, panel->curves[c].x[i]);
            high = fmax(high, panel->curves[c].x[i]);
        }
    }
    const double step = high / low >= 4096 ? 16 : 4;
    text_buffer_print(script, "set xrange [%.9g:%.9g]\nset xtics (", low, high > low ? high : 2 * low);
    char text[NUMBER_TEXT_MAX];
    size_t n = 0;
    for (double x = 1; x <= high; x *= step)
        if (x >= low) text_buffer_print(script, "%s'%s' %.9g", n++ ? ", " : "", short_count(text, (size_t)x), x);
    if (n == 0) text_buffer_print(script, "'%s' %.9g", short_count(text, (size_t)low), low);
    text_buffer_print(script, ")\n");
}

/* Half a decade's room where all values are alike. */
static void write_y_range(struct text_buffer *script, const struct plot_panel *panel)
{
    double low = panel->across > 0 ? panel->across : INFINITY, high = panel->across;
    for (size_t c = 0; c < panel->n_curves; c++) {
        for (size_t i = 0; i < panel->curves[c].n; i++) {
            low = fmin(low, panel->curves[c].y[i]);
            high = fmax(high, panel->curves[c].y[i]);
        }
    }
    text_buffer_print(script, "set yrange [%.9g:%.9g]\n", low / 1.5, 1.5 * high);
}

static void write_panel(struct text_buffer *script, const struct plot_panel *panel, size_t k)
{
    for (size_t c = 0; c < panel->n_curves; c++) {
        text_buffer_print(script, "$curve%zu_%zu << END\n", k, c);
        for (size_t i = 0; i < panel->curves[c].n; i++)
            text_buffer_print(script, "%.9g %.9g\n", panel->curves[c].x[i], panel->curves[c].y[i]);
        text_buffer_print(script, "END\n");
    }
}

static void draw_panel(struct text_buffer *script, const struct plot_panel *panel, size_t k)
{
    text_buffer_print(script, "unset arrow\nunset label\nset title \"%s\"\nset xlabel '%s'\nset ylabel '%s'\n",
                      panel->title, panel->x_label, panel->y_label);
    write_length_tics(script, panel);
    write_y_range(script, panel);
    if (panel->up > 0) {
        text_buffer_print(script,
                          "set arrow from %.9g,graph 0 to %.9g,graph 1 nohead dt 3 lc rgb '#666666'\n"
                          "set label '%s' at %.9g,graph 0.03 left offset 0.5,0\n",
                          panel->up, panel->up, panel->up_label, panel->up);
    }
    if (panel->across > 0) {
        text_buffer_print(script,
                          "set arrow from graph 0,first %.9g to graph 1,first %.9g nohead dt 3 "
                          "lc rgb '#666666'\nset label '%s' at graph 0.99,first %.9g right offset 0,0.5\n",
                          panel->across, panel->across, panel->across_label, panel->across);
    }
    for (size_t c = 0; c < panel->n_curves; c++) {
        const struct plot_curve *curve = &panel->curves[c];
        text_buffer_print(script, "%s$curve%zu_%zu using 1:2 with %s lw 2%s lc rgb '%s' title \"%s\"",
                          c ? ", " : "plot ", k, c, curve->n > 1 ? "lines" : "points pt 7",
                          curve->dashed ? " dt 2" : "", curve->colour, curve->label);
    }
    text_buffer_print(script, "\n");
}

int plot_panels(const char *path, const struct plot_panel *panels, size_t n)
{
    struct text_buffer script = {0};
    plot_begin(&script, path, 640 * (int)n, 560);
    for (size_t k = 0; k < n; k++) write_panel(&script, &panels[k], k);
    text_buffer_print(&script,
                      "set multiplot layout 1,%zu\nset logscale xy\nset format y '10^{%%T}'\n"
                      "set key below vertical maxcols 1 left Left reverse\n",
                      n);
    for (size_t k = 0; k < n; k++) draw_panel(&script, &panels[k], k);
    text_buffer_print(&script, "unset multiplot\n");
    return plot_finish(&script, path);
}

/* ---- Roofline ---------------------------------------------------------------------------- */

/*
 * Points that lie near each other share a label, and names on top of one another say nothing: labels stand below the
 * roof in rows, one a group, each beside a line that drops from its point. In the right half of the picture names end
 * at their line and the leftmost point has the highest row; in the left half they begin there and the rightmost has
 * it: no line then crosses a name of its half.
 */
enum { LABEL_NAMES = 3, LABELS_MAX = 5, N_HALVES = 2 }; /* most names of a label; most labels of a half */
static const double label_row = 0.048;                  /* height of a row as a share of the picture's */
static const double half = 0.45, right_top = 0.50, lowest_point = 0.30; /* as such shares, too */

struct point_place {
    double intensity, attained;
    const char *name;
};

struct label_group {
    double intensity, attained; /* of its first point */
    size_t first, n;            /* in the places, sorted by intensity */
};

struct roof_labels {
    struct point_place *places;
    size_t n_places;
    struct label_group groups[LABELS_MAX];
    size_t n_groups;
};

struct roof_range {
    double left, right, low, high;
};

static int by_intensity(const void *a, const void *b)
{
    const struct point_place *x = a, *y = b;
    return (x->intensity > y->intensity) - (x->intensity < y->intensity);
}

/* Groups of neighbours closer than a factor; false where that leaves more than LABELS_MAX. */
static bool group_places(struct roof_labels *labels, double distance)
{
    labels->n_groups = 0;
    for (size_t i = 0; i < labels->n_places; i++) {
        const struct point_place *place = &labels->places[i];
        struct label_group *last = &labels->groups[labels->n_groups > 0 ? labels->n_groups - 1 : 0];
        if (labels->n_groups > 0 && place->intensity < distance * last->intensity) {
            last->n++;
            continue;
        }
        if (labels->n_groups == LABELS_MAX) return false;
        labels->groups[labels->n_groups++] = (struct label_group){place->intensity, place->attained, i, 1};
    }
    return true;
}

/* Axes that hold all points, with room for the labels below them. */
static struct roof_range find_range(const struct analysis *a, const struct roof_point *points, size_t n)
{
    const double peak = a->roof.flops_per_second / 1e12;
    struct roof_range range = {0.1, 1e5, peak, 3 * peak};
    for (size_t i = 0; i < n; i++) {
        range.left = fmin(range.left, sqz_op_cost_intensity(&points[i].cost) / 2);
        range.right = fmax(range.right, sqz_op_cost_intensity(&points[i].cost) * 2);
        range.low = fmin(range.low, sqz_op_cost_attained(&points[i].cost, &a->roof) / 1e12);
    }
    range.low /= pow(range.high / range.low, lowest_point / (1 - lowest_point));
    return range;
}

static void make_labels(struct roof_labels labels[N_HALVES], const struct analysis *a, const struct roof_point *points,
                        size_t n, const struct roof_range *range)
{
    for (int h = 0; h < N_HALVES; h++)
        labels[h] = (struct roof_labels){.places = allocate(n, sizeof *labels[h].places)};
    for (size_t i = 0; i < n; i++) {
        const double intensity = sqz_op_cost_intensity(&points[i].cost);
        struct roof_labels *l = &labels[log(intensity / range->left) > half * log(range->right / range->left)];
        l->places[l->n_places++] =
            (struct point_place){intensity, sqz_op_cost_attained(&points[i].cost, &a->roof) / 1e12, points[i].label};
    }
    for (int h = 0; h < N_HALVES; h++) {
        double distance = 1.3;
        qsort(labels[h].places, labels[h].n_places, sizeof *labels[h].places, by_intensity);
        while (!group_places(&labels[h], distance)) distance *= 1.3;
    }
}

/* The names of a group, each once. */
static void write_names(struct text_buffer *script, const struct roof_labels *labels, const struct label_group *group)
{
    size_t n_names = 0;
    for (size_t i = group->first; i < group->first + group->n; i++) {
        bool again = false;
        for (size_t j = group->first; j < i; j++)
            again = again || strcmp(labels->places[i].name, labels->places[j].name) == 0;
        if (!again && n_names++ < LABEL_NAMES)
            text_buffer_print(script, "%s%s", n_names > 1 ? ", " : "", labels->places[i].name);
    }
    if (n_names > LABEL_NAMES) text_buffer_print(script, " and %zu more", n_names - LABEL_NAMES);
}

static void write_labels(struct text_buffer *script, const struct roof_labels *labels, bool right)
{
    for (size_t g = 0; g < labels->n_groups; g++) {
        const struct label_group *group = &labels->groups[right ? g : labels->n_groups - 1 - g];
        const double y = (right ? right_top : lowest_point - label_row) - label_row * (double)g;
        text_buffer_print(script, "set arrow from %.9g,%.9g to %.9g,graph %.3f nohead lc rgb '#999999'\n",
                          group->intensity, group->attained, group->intensity, y);
        text_buffer_print(script, "set label \"");
        write_names(script, labels, group);
        text_buffer_print(script, "\" at %.9g,graph %.3f %s offset %s,0 font ',8'\n", group->intensity, y,
                          right ? "right" : "left", right ? "-0.4" : "0.4");
    }
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
    }
}

static void draw_roof(struct text_buffer *script, const struct analysis *a, const struct roof_point *points, size_t n)
{
    const double peak = a->roof.flops_per_second / 1e12, bandwidth = a->roof.bytes_per_second / 1e12;
    const struct roof_range range = find_range(a, points, n);
    struct roof_labels labels[N_HALVES];
    text_buffer_print(script,
                      "set logscale xy\nset format '%%g'\nset key left top\n"
                      "set title 'Roofline, ridge point %.3g FLOP/byte'\nset samples 400\n"
                      "set xlabel 'arithmetic intensity (FLOP/byte)'\nset ylabel 'attainable TFLOP/s'\n"
                      "set xrange [%.9g:%.9g]\nset yrange [%.9g:%.9g]\n",
                      peak / bandwidth, range.left, range.right, range.low, range.high);
    make_labels(labels, a, points, n, &range);
    for (int h = 0; h < N_HALVES; h++) {
        write_labels(script, &labels[h], h == 1);
        free(labels[h].places);
    }
    text_buffer_print(script,
                      "plot (x * %.9g < %.9g ? x * %.9g : %.9g) with lines lw 2 lc rgb 'black' title 'roof', "
                      "$prefill using 1:2 with points pt 7 lc rgb '#b40426' title 'prefill', "
                      "$decode using 1:2 with points pt 5 lc rgb '#3b4cc0' title 'decode'\n"
                      "unset arrow\nunset label\n",
                      bandwidth, peak, bandwidth, peak);
}

/* ---- Bars ---------------------------------------------------------------------------------- */

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

static void draw_bars(struct text_buffer *script)
{
    text_buffer_print(script, "unset logscale\nset title 'Where the time goes'\nset xlabel 'phase, batch, context'\n"
                              "set ylabel 'share of the time (%%)'\nset xrange [*:*]\nset yrange [0:100]\n"
                              "set key above\nset style data histograms\nset style histogram rowstacked\n"
                              "set style fill solid 0.8 noborder\nset boxwidth 0.7\nset xtics rotate by -30\n"
                              "plot $bars using 2:xtic(1) title 'linear' lc rgb '#3b4cc0', "
                              "$bars using 3 title 'attention' lc rgb '#b40426', "
                              "$bars using 4 title 'norm, softmax, activation' lc rgb '#999999'\n");
}

int plot_roofline(const char *path, const struct analysis *a, const struct roof_point *points, size_t n_points,
                  const struct time_bar *bars, size_t n_bars)
{
    struct text_buffer script = {0};
    plot_begin(&script, path, 1280, 520);
    write_points(&script, a, points, n_points);
    write_bars(&script, bars, n_bars);
    text_buffer_print(&script, "set multiplot layout 1,2\n");
    draw_roof(&script, a, points, n_points);
    draw_bars(&script);
    text_buffer_print(&script, "unset multiplot\n");
    return plot_finish(&script, path);
}
