/* Results of `squeeze bench kernels`: a table, JSON, a picture. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench_kernels.h"
#include "common.h"
#include "json_output.h"
#include "llama_library.h"
#include "plot.h"
#include "text_buffer.h"
#include "times.h"

const char *const bench_op_names[N_OPS] = {"dense", "causal", "ggml", "lookup", "read", "sparse", "merge", "squeezed"};

static const char *const format_names[] = {"f16", "int8"};

bool bench_same_format(struct bench_format a, struct bench_format b)
{
    return a.n_levels == b.n_levels && a.centroids == b.centroids && a.keys == b.keys;
}

/* ---- Figures ---------------------------------------------------------------------------------- */

double bench_quantile(const struct bench_times *times, double share)
{
    return times_quantile(times->seconds, times->n, share);
}

/* The median over the rounds of what was reached of the bandwidth measured beside a run, of the arithmetic peak, or of
 * whichever of the two allows less. */
static double share_of(const struct bench_report *report, const struct bench_row *row, bool memory, bool arithmetic)
{
    const double peak = peaks_best_f32(report->peaks, report->n_peaks);
    double shares[BENCH_REPEATS];
    if (row->op == OP_MERGE) /* in the caches, and hardly any arithmetic: neither is its limit */
        return NAN;
    for (size_t i = 0; i < row->times.n; i++) {
        const double seconds = row->times.seconds[i];
        const double read = memory ? row->bytes / row->times.bandwidth[i] : 0.0;
        const double computed = arithmetic ? row->flops / peak : 0.0;
        shares[i] = (read > computed ? read : computed) / seconds;
    }
    return row->times.n ? times_quantile(shares, row->times.n, 0.5) : NAN;
}

double bench_limit_share(const struct bench_report *report, const struct bench_row *row)
{
    return share_of(report, row, row->n_queries == 1, row->n_queries > 1);
}

/* The row of an operation that has no variants, in the case of `row`. */
static const struct bench_row *beside(const struct bench_report *report, const struct bench_row *row, enum bench_op op)
{
    for (size_t i = 0; i < report->rows->n; i++) {
        const struct bench_row *other = &report->rows->rows[i];
        if (other->op == op && other->shape == row->shape && other->n_tokens == row->n_tokens &&
            other->n_queries == row->n_queries && other->times.n > 0)
            return other;
    }
    return NULL;
}

/* How many times faster the row is: the median over the rounds of the two times of a round. */
static double times_faster(const struct bench_report *report, const struct bench_row *row, enum bench_op op)
{
    const struct bench_row *other = beside(report, row, op);
    double ratios[BENCH_REPEATS];
    if (!other || row->times.n == 0) return NAN;
    for (size_t i = 0; i < row->times.n; i++) ratios[i] = other->times.seconds[i] / row->times.seconds[i];
    return times_quantile(ratios, row->times.n, 0.5);
}

/* ---- Table -------------------------------------------------------------------------------------- */

static void label_of(char *label, size_t size, const struct bench_row *row)
{
    const struct bench_format format = row->format;
    if (format.n_levels == 0) {
        snprintf(label, size, "%s", bench_op_names[row->op]);
    } else if (row->op == OP_READ) {
        snprintf(label, size, "bare read of retained rows");
    } else if (row->op == OP_SPARSE) {
        snprintf(label, size, "%s%s", bench_op_names[row->op], format.keys == SQZ_INDEX_INT8 ? ", int8 keys" : "");
    } else {
        snprintf(label, size, "%s, %u level%s%s%s", bench_op_names[row->op], format.n_levels,
                 format.n_levels == 1 ? "" : "s", format.centroids == SQZ_INDEX_INT8 ? ", int8" : "",
                 format.keys == SQZ_INDEX_INT8 && row->op == OP_SQUEEZED ? ", int8 keys" : "");
    }
}

/* "12.3%", or "-" for what is no number. */
static const char *number_text(char text[NUMBER_TEXT_MAX], const char *format, double value)
{
    if (!isfinite(value)) return "-";
    snprintf(text, NUMBER_TEXT_MAX, format, value);
    return text;
}

static void print_row(const struct bench_report *report, const struct bench_row *row)
{
    char label[48], range[48], text[6][NUMBER_TEXT_MAX];
    const double seconds = bench_quantile(&row->times, 0.5);
    label_of(label, sizeof label, row);
    if (row->times.n == 0) {
        printf("  %-36s not run: %s\n", label, row->skipped);
        return;
    }
    snprintf(range, sizeof range, "%.3f-%.3f", 1e3 * bench_quantile(&row->times, 0.0),
             1e3 * bench_quantile(&row->times, 1.0));
    printf("  %-36s %10.3f %21s %8s %8s %7s %8s %8s %8s\n", label, 1e3 * seconds, range,
           number_text(text[4], "%.1f", row->bytes / seconds / 1e9),
           number_text(text[5], "%.1f", row->flops / seconds / 1e9),
           number_text(text[0], "%.0f%%", 100.0 * bench_limit_share(report, row)),
           number_text(text[1], "%.2fx", times_faster(report, row, OP_DENSE)),
           number_text(text[2], "%.2fx", times_faster(report, row, OP_GGML)),
           row->budget_read > 0.0 ? number_text(text[3], "%.4f", row->budget_read) : "");
}

static void print_heading(const struct bench_report *report, const struct bench_row *row)
{
    const struct bench_shape *shape = &report->shapes[row->shape];
    char tokens[NUMBER_TEXT_MAX], part[64] = "";
    if (shape->shape.n_head_kv < shape->n_head_kv)
        snprintf(part, sizeof part, " (%u of %u KV heads)", shape->shape.n_head_kv, shape->n_head_kv);
    printf("\n%s%s, %s tokens, %zu quer%s, limit: %s\n", shape->name, part, count_text(tokens, row->n_tokens),
           row->n_queries, row->n_queries == 1 ? "y" : "ies",
           row->n_queries == 1 ? "read bandwidth" : "peak of multiply-adds");
    printf("  %-36s %10s %21s %8s %8s %7s %8s %8s %8s\n", "", "ms", "(fastest-slowest)", "GB/s", "GFLOP/s", "limit",
           "vs dense", "vs ggml", "read");
}

int bench_print_table(const struct bench_report *report)
{
    const struct bench_row *last = NULL;
    printf("read bandwidth %.1f GB/s (at times %.1f), ", report->bandwidth / 1e9, report->bandwidth_low / 1e9);
    for (size_t i = 0; i < report->n_peaks; i++)
        printf("%s %.0f, ", report->peaks[i].name, report->peaks[i].per_second / 1e9);
    printf("G operations/s; %d threads, budget %.3g, %s caches\n", report->n_threads, report->budget,
           report->cold ? "cold" : "warm");
    for (size_t i = 0; i < report->rows->n; i++) {
        const struct bench_row *row = &report->rows->rows[i];
        if (!last || last->shape != row->shape || last->n_tokens != row->n_tokens || last->n_queries != row->n_queries)
            print_heading(report, row);
        print_row(report, row);
        last = row;
    }
    return close_stdout();
}

/* ---- JSON ------------------------------------------------------------------------------------------ */

static json_t *row_json(const struct bench_report *report, const struct bench_row *row)
{
    const struct bench_shape *shape = &report->shapes[row->shape];
    const double seconds = bench_quantile(&row->times, 0.5);
    json_t *json = json_object();
    json_object_set_new(json, "op", json_string(bench_op_names[row->op]));
    json_object_set_new(json, "shape", json_text(shape->name));
    json_object_set_new(json, "heads", json_count(shape->shape.n_head));
    json_object_set_new(json, "kv_heads", json_count(shape->shape.n_head_kv));
    json_object_set_new(json, "head_dim", json_count(shape->shape.head_dim));
    json_object_set_new(json, "tokens", json_count(row->n_tokens));
    json_object_set_new(json, "queries", json_count(row->n_queries));
    if (row->format.n_levels > 0) {
        json_object_set_new(json, "levels", json_count(row->format.n_levels));
        json_object_set_new(json, "index", json_string(format_names[row->format.centroids]));
        json_object_set_new(json, "keys", json_string(format_names[row->format.keys]));
    }
    if (row->times.n == 0) {
        json_object_set_new(json, "skipped", json_text(row->skipped));
        return json;
    }
    json_object_set_new(json, "ms", json_number(1e3 * seconds));
    json_object_set_new(json, "ms_min", json_number(1e3 * bench_quantile(&row->times, 0.0)));
    json_object_set_new(json, "ms_max", json_number(1e3 * bench_quantile(&row->times, 1.0)));
    json_object_set_new(json, "repeats", json_count(row->times.n));
    json_object_set_new(json, "bytes", json_number(row->bytes));
    json_object_set_new(json, "gb_s", json_number(row->bytes / seconds / 1e9));
    json_object_set_new(json, "gflops", json_number(row->flops / seconds / 1e9));
    json_object_set_new(json, "limit", json_string(row->n_queries == 1 ? "bandwidth" : "fma"));
    json_object_set_new(json, "limit_share", json_number(bench_limit_share(report, row)));
    json_object_set_new(json, "roofline_share", json_number(share_of(report, row, true, true)));
    json_object_set_new(json, "bandwidth_beside_gb_s",
                        json_number(times_quantile(row->times.bandwidth, row->times.n, 0.5) / 1e9));
    json_object_set_new(json, "vs_dense", json_number(times_faster(report, row, OP_DENSE)));
    json_object_set_new(json, "vs_ggml", json_number(times_faster(report, row, OP_GGML)));
    if (row->budget_read > 0.0) json_object_set_new(json, "budget_read", json_number(row->budget_read));
    json_object_set_new(json, "error", json_number(row->error));
    json_object_set_new(json, "verified", json_boolean(row->verified));
    return json;
}

/* The command with absolute paths cut to their last part: results are committed and shared. */
static json_t *short_command(void)
{
    struct text_buffer text = {0};
    json_t *whole = json_command_line();
    const char *p = json_is_string(whole) ? json_string_value(whole) : "squeeze";
    while (*p) {
        const size_t n = strcspn(p, " "), name = strcspn(p, "=");
        const char *path = name + 1 < n && p[name + 1] == '/' ? p + name + 1 : *p == '/' ? p : NULL;
        const char *from = p;
        if (path) {
            text_buffer_append(&text, p, (size_t)(path - p));
            for (from = p + n; from > path && from[-1] != '/'; from--) {
            }
        }
        text_buffer_append(&text, from, (size_t)(p + n - from));
        p += n;
        while (*p == ' ') text_buffer_append(&text, p++, 1);
    }
    json_t *command = json_text(text.text ? text.text : "");
    text_buffer_free(&text);
    json_decref(whole);
    return command;
}

int bench_print_json(const struct bench_report *report)
{
    json_t *root = json_object(), *rows = json_array();
    for (size_t i = 0; i < report->rows->n; i++) json_array_append_new(rows, row_json(report, &report->rows->rows[i]));
    json_object_set_new(root, "read_bandwidth_gb_s", json_number(report->bandwidth / 1e9));
    json_object_set_new(root, "read_bandwidth_low_gb_s", json_number(report->bandwidth_low / 1e9));
    json_object_set_new(root, "peak_gflops", json_number(peaks_best_f32(report->peaks, report->n_peaks) / 1e9));
    json_object_set_new(root, "peaks_g_operations", peaks_json(report->peaks, report->n_peaks));
    json_object_set_new(root, "threads", json_count((uint64_t)report->n_threads));
    json_object_set_new(root, "budget", json_number(report->budget));
    json_object_set_new(root, "centroids", json_number(report->centroid_share));
    json_object_set_new(root, "code_words", json_count(report->code_words));
    json_object_set_new(root, "block_tokens", json_count(report->block_tokens));
    json_object_set_new(root, "cache", json_string(report->cold ? "cold" : "warm"));
    json_object_set_new(root, "huge_pages", json_boolean(report->huge_pages));
    json_object_set_new(root, "rows", rows);
    json_object_set_new(root, "machine", machine_json(report->n_threads));
    json_object_set_new(root, "version", json_text(sqz_version()));
    json_object_set_new(root, "llama_version", json_text(sqz_llama_version()));
    json_object_set_new(root, "command", short_command());
    return print_json(root);
}

/* One colour an operation. */
static const char *const colours[] = {
    [OP_DENSE] = "#333333", [OP_CAUSAL] = "#999999", [OP_GGML] = "#1f77b4",  [OP_LOOKUP] = "#2ca02c",
    [OP_READ] = "#8c564b",  [OP_SPARSE] = "#ff7f0e", [OP_MERGE] = "#9467bd", [OP_SQUEEZED] = "#d62728",
};
_Static_assert(sizeof colours / sizeof colours[0] == N_OPS, "a colour for every operation");

/* ---- Picture ------------------------------------------------------------------------------------------ */

/* Whether two rows belong to the same line of the same panel. */
static bool same_line(const struct bench_row *a, const struct bench_row *b)
{
    return a->op == b->op && a->shape == b->shape && a->n_queries == b->n_queries &&
           bench_same_format(a->format, b->format);
}

/* The exponent p of time ~ tokens^p through a line's points, by least squares of the logarithms; NAN for one point. */
static double fitted_slope(const struct bench_report *report, const struct bench_row *line)
{
    double n = 0, x = 0, y = 0, xx = 0, xy = 0;
    for (size_t i = 0; i < report->rows->n; i++) {
        const struct bench_row *row = &report->rows->rows[i];
        const double seconds = bench_quantile(&row->times, 0.5);
        if (same_line(line, row) && seconds > 0.0) {
            const double u = log((double)row->n_tokens), v = log(seconds);
            n += 1, x += u, y += v, xx += u * u, xy += u * v;
        }
    }
    const double spread = n * xx - x * x;
    return n >= 2 && spread > 1e-9 ? (n * xy - x * y) / spread : NAN;
}

static bool is_first_of(const struct bench_report *report, size_t i,
                        bool (*same)(const struct bench_row *, const struct bench_row *))
{
    for (size_t j = 0; j < i; j++)
        if (same(&report->rows->rows[j], &report->rows->rows[i])) return false;
    return true;
}

static bool same_panel(const struct bench_row *a, const struct bench_row *b)
{
    return a->shape == b->shape && a->n_queries == b->n_queries;
}

/* A dash type for each kind of lookup. */
static int dash_of(struct bench_format format)
{
    return 1 + (format.n_levels > 1 ? 1 : 0) + (format.centroids == SQZ_INDEX_INT8 ? 2 : 0);
}

static void write_lines(struct text_buffer *script, const struct bench_report *report, const struct bench_row *panel)
{
    bool first = true;
    for (size_t i = 0; i < report->rows->n; i++) {
        const struct bench_row *line = &report->rows->rows[i];
        if (!same_panel(line, panel) || !is_first_of(report, i, same_line)) continue;
        char label[48], slope[NUMBER_TEXT_MAX];
        label_of(label, sizeof label, line);
        text_buffer_print(script,
                          "%s$line%zu using 1:2 with linespoints pt %d ps 0.5 lw 2 lc rgb '%s' "
                          "dt %d title '%s: %s'",
                          first ? "plot " : ", ", i, line->format.keys == SQZ_INDEX_INT8 ? 6 : 7, colours[line->op],
                          dash_of(line->format), label, number_text(slope, "n^{%.2f}", fitted_slope(report, line)));
        first = false;
    }
    text_buffer_print(script, "\n");
}

static void write_script(struct text_buffer *script, const struct bench_report *report, const char *path)
{
    size_t n_panels = 0, shortest = SIZE_MAX, longest = 0;
    for (size_t i = 0; i < report->rows->n; i++) {
        const struct bench_row *line = &report->rows->rows[i];
        shortest = line->n_tokens < shortest ? line->n_tokens : shortest;
        longest = line->n_tokens > longest ? line->n_tokens : longest;
        n_panels += is_first_of(report, i, same_panel);
        if (!is_first_of(report, i, same_line)) continue;
        text_buffer_print(script, "$line%zu << END\n", i);
        for (size_t j = i; j < report->rows->n; j++) {
            const struct bench_row *row = &report->rows->rows[j];
            if (same_line(line, row) && row->times.n > 0 && bench_quantile(&row->times, 0.5) > 0.0)
                text_buffer_print(script, "%zu %.9g\n", row->n_tokens, 1e3 * bench_quantile(&row->times, 0.5));
        }
        text_buffer_print(script, "END\n");
    }
    const size_t columns = n_panels > 1 ? 2 : 1, lines = (n_panels + columns - 1) / columns;
    text_buffer_print(script, "set terminal %s size %zu,%zu font 'sans,%d'%s\n",
                      plot_is_svg(path) ? "svg enhanced" : "pngcairo enhanced", 760 * columns, 560 * lines,
                      plot_is_svg(path) ? 13 : 10, plot_is_svg(path) ? " background 'white'" : "");
    text_buffer_print(script,
                      "set multiplot layout %zu,%zu\nset logscale xy\nset format y '%%g'\nset border 3\n"
                      "set tics nomirror\nset grid xtics ytics lt 1 lc rgb '#dddddd'\n"
                      "set key outside right top\n",
                      lines, columns);
    text_buffer_print(script, "set xrange [%.9g:%.9g]\n", 0.8 * (double)shortest, 1.25 * (double)longest);
    text_buffer_print(script, "set xlabel 'tokens of context'\nset ylabel 'ms'\n"
                              "set xtics rotate by -40 ('4K' 4096, '8K' 8192, '16K' 16384, '32K' 32768, '64K' 65536, "
                              "'128K' 131072, '256K' 262144, '512K' 524288, '1M' 1048576)\n");
    for (size_t i = 0; i < report->rows->n; i++) {
        const struct bench_row *panel = &report->rows->rows[i];
        if (is_first_of(report, i, same_panel)) {
            text_buffer_print(script, "set title '%s, %zu quer%s, budget %.3g'\n", report->shapes[panel->shape].name,
                              panel->n_queries, panel->n_queries == 1 ? "y" : "ies", report->budget);
            write_lines(script, report, panel);
        }
    }
    text_buffer_print(script, "unset multiplot\n");
}

int bench_plot(const struct bench_report *report, const char *path)
{
    struct text_buffer script = {0};
    write_script(&script, report, path);
    int code = plot_draw(path, &script);
    text_buffer_free(&script);
    return code;
}
