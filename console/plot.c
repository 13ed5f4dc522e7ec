/*
 * Pictures through gnuplot, started without a shell. It reads a script with
 * the data inside from a pipe and writes the picture to its standard output,
 * which is a temporary file beside the final one: no file name ever becomes
 * part of the script.
 */
#define _POSIX_C_SOURCE 200809L

#include "plot.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"
#include "signals.h"
#include "text_buffer.h"

extern char **environ;

void size_histogram_add(struct size_histogram *histogram, size_t size)
{
    int bin = 0;
    if (size == 0) return;
    while (bin + 1 < SIZE_BINS && ((size_t)1 << bin) < size) bin++;
    histogram->n[bin]++;
    histogram->sum += size;
    if (histogram->n_clusters == 0 || size < histogram->smallest) histogram->smallest = size;
    if (size > histogram->largest) histogram->largest = size;
    histogram->n_clusters++;
}

static bool ends_in(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);
    return n > m && strcmp(text + n - m, end) == 0;
}

bool plot_is_svg(const char *path)
{
    return ends_in(path, ".svg");
}

bool plot_can_draw(const char *path)
{
    return ends_in(path, ".png") || plot_is_svg(path);
}

bool plot_has_gnuplot(void)
{
    const char *path = getenv("PATH");
    for (const char *at = path ? path : "/usr/bin:/bin"; *at; at += strcspn(at, ":") + (at[strcspn(at, ":")] == ':')) {
        struct text_buffer name = {0};
        text_buffer_append(&name, at, strcspn(at, ":"));
        text_buffer_append(&name, "/gnuplot", 8);
        const bool there = access(name.text, X_OK) == 0;
        text_buffer_free(&name);
        if (there) return true;
    }
    return false;
}

/* ---- The script ---------------------------------------------------------------- */

static void bin_label(char *text, size_t capacity, int bin)
{
    unsigned long low = bin == 0 ? 1 : (1ul << (bin - 1)) + 1;
    unsigned long high = 1ul << bin;
    if (low == high) snprintf(text, capacity, "%lu", high);
    else snprintf(text, capacity, "%lu-%lu", low, high);
}

static void write_sizes(struct text_buffer *script, const struct size_histogram *levels, uint32_t n_levels)
{
    int n_bins = 0;
    for (uint32_t level = 0; level < n_levels; level++)
        for (int bin = 0; bin < SIZE_BINS; bin++) n_bins = levels[level].n[bin] && bin >= n_bins ? bin + 1 : n_bins;
    text_buffer_print(script, "$sizes << END\n");
    for (int bin = 0; bin < n_bins; bin++) {
        char label[48];
        bin_label(label, sizeof label, bin);
        text_buffer_print(script, "%s", label);
        for (uint32_t level = 0; level < n_levels; level++) {
            double all = levels[level].n_clusters ? (double)levels[level].n_clusters : 1.0;
            text_buffer_print(script, " %.9g", 100.0 * (double)levels[level].n[bin] / all);
        }
        text_buffer_print(script, "\n");
    }
    text_buffer_print(script, "END\n");
}

static void write_curve(struct text_buffer *script, const struct curve_set *curves)
{
    struct curve_point point;
    text_buffer_print(script, "$curve << END\n");
    for (int i = 0; i <= 40; i++) {
        double budget = pow(10.0, -2.0 + 0.05 * i);
        if (curve_at_budget(curves, budget, &point)) {
            text_buffer_print(script, "%.9g %.9g %.9g %.9g\n", 100.0 * point.share, 100.0 * point.lost_mean,
                              100.0 * point.lost_low, 100.0 * point.lost_high);
        }
    }
    text_buffer_print(script, "END\n");
}

static void write_script(struct text_buffer *script, const char *path, const struct size_histogram *levels,
                         uint32_t n_levels, const struct curve_set *curves)
{
    write_sizes(script, levels, n_levels);
    write_curve(script, curves);
    text_buffer_print(script, "set terminal %s\n",
                      plot_is_svg(path) ? "svg size 1200,480 font 'sans,14' background 'white'"
                                        : "pngcairo size 1200,480 font 'sans,11'");
    text_buffer_print(script, "set multiplot layout 1,2\nset grid ytics lt 1 lc rgb '#dddddd'\n"
                              "set key above\nset border 3\n"
                              "set tics nomirror\n"
                              "set title 'Cluster sizes'\nset xlabel 'keys in a cluster'\n"
                              "set ylabel 'share of the clusters (%%)'\nset yrange [0:*]\n"
                              "set style data histograms\nset style histogram clustered gap 1\n"
                              "set style fill solid 0.8 noborder\nset xtics rotate by -40\nplot ");
    for (uint32_t level = 0; level < n_levels; level++) {
        text_buffer_print(script, "%s$sizes using %u:xtic(1) title 'level %u (%llu clusters)'", level ? ", " : "",
                          level + 2, level + 1, (unsigned long long)levels[level].n_clusters);
    }
    text_buffer_print(script, "\nset title 'Budget curve'\nset xlabel 'share of the KV bytes read (%%)'\n"
                              "set ylabel 'attention mass lost (%%)'\nset xtics norotate\nset logscale x\n"
                              "set xrange [*:100]\nset grid xtics ytics lt 1 lc rgb '#dddddd'\n"
                              "plot $curve using 1:3:4 with filledcurves fs transparent solid 0.25 lc 1 "
                              "title '10th to 90th percentile over heads', "
                              "$curve using 1:2 with linespoints lc 1 pt 7 ps 0.4 title 'mean over heads'\n"
                              "unset multiplot\n");
}

/* ---- gnuplot --------------------------------------------------------------------- */

/* Starts gnuplot with its input and output on the two descriptors; returns errno's value, 0 when it runs. */
static int start_gnuplot(int input, int output, pid_t *process)
{
    char name[] = "gnuplot", from_input[] = "-";
    char *arguments[] = {name, from_input, NULL};
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t defaults;
    int failed = posix_spawn_file_actions_init(&actions);
    if (failed) return failed;
    failed = posix_spawnattr_init(&attributes);
    if (!failed) {
        sigemptyset(&defaults);
        sigaddset(&defaults, SIGPIPE);
        posix_spawnattr_setsigdefault(&attributes, &defaults);
        posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF);
        failed = posix_spawn_file_actions_adddup2(&actions, input, STDIN_FILENO);
        failed = failed ? failed : posix_spawn_file_actions_adddup2(&actions, output, STDOUT_FILENO);
        failed = failed ? failed : posix_spawnp(process, name, &actions, &attributes, arguments, environ);
        posix_spawnattr_destroy(&attributes);
    }
    posix_spawn_file_actions_destroy(&actions);
    return failed;
}

/* Runs gnuplot over the script; false with the reason said. */
static bool run_gnuplot(const struct text_buffer *script, int output)
{
    int ends[2];
    pid_t process;
    int status = 0;
    if (pipe(ends) != 0) {
        warn("cannot start gnuplot: %s", strerror(errno));
        return false;
    }
    fcntl(ends[1], F_SETFD, FD_CLOEXEC);
    int failed = start_gnuplot(ends[0], output, &process);
    close(ends[0]);
    if (failed) {
        close(ends[1]);
        warn("cannot start gnuplot: %s%s", strerror(failed),
             failed == ENOENT ? "; install it (gnuplot-nox on Debian) or leave out --plot" : "");
        return false;
    }
    size_t done = 0;
    while (done < script->n_bytes) {
        ssize_t n = write(ends[1], script->text + done, script->n_bytes - done);
        if (n < 0 && errno != EINTR) break;
        done += n > 0 ? (size_t)n : 0;
    }
    close(ends[1]);
    while (waitpid(process, &status, 0) < 0 && errno == EINTR) {
    }
    if (done < script->n_bytes || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        warn("gnuplot failed%s", WIFEXITED(status) && WEXITSTATUS(status) == 127 ? ": not found" : "");
        return false;
    }
    return true;
}

/* The picture that is being drawn, for a signal that ends the program. */
static const char *volatile unfinished;

static void remove_unfinished(void)
{
    if (unfinished) unlink(unfinished);
}

int plot_draw(const char *path, const struct text_buffer *script)
{
    struct text_buffer temporary = {0};
    struct stat size;
    catch_signals(); /* not every command that draws has done so */
    on_sudden_end(remove_unfinished);
    text_buffer_append(&temporary, path, strlen(path));
    text_buffer_append(&temporary, ".XXXXXX", 7);
    int output = mkstemp(temporary.text);
    int code = 1;
    if (output < 0) {
        warn("%s: %s", path, strerror(errno));
        text_buffer_free(&temporary);
        return 1;
    }
    unfinished = temporary.text;
    fcntl(output, F_SETFD, FD_CLOEXEC);
    if (run_gnuplot(script, output)) {
        if (signal_caught()) {
            warn("interrupted; %s was not written", path);
            code = 128 + signal_caught();
        } else if (fstat(output, &size) != 0 || size.st_size == 0) {
            warn("%s: gnuplot drew nothing", path);
        } else if (fchmod(output, 0644) != 0 || rename(temporary.text, path) != 0) {
            warn("%s: %s", path, strerror(errno));
        } else {
            code = 0;
        }
    }
    close(output);
    if (code != 0) unlink(temporary.text);
    unfinished = NULL;
    text_buffer_free(&temporary);
    return code;
}

int plot_context(const char *path, const struct size_histogram *levels, uint32_t n_levels,
                 const struct curve_set *curves)
{
    struct text_buffer script = {0};
    write_script(&script, path, levels, n_levels, curves);
    int code = plot_draw(path, &script);
    text_buffer_free(&script);
    return code;
}
