/* The progress bar; progress.h describes it. */
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE /* TIOCGWINSZ */

#include "progress.h"

#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "common.h"

static const double terminal_interval_seconds = 0.1;
static const double line_interval_seconds = 5.0;

void progress_begin(struct progress *progress, bool quiet, const char *label)
{
    memset(progress, 0, sizeof *progress);
    progress->quiet = quiet;
    plain_text(progress->label, label);
    progress->terminal = isatty(STDERR_FILENO) == 1;
}

static int terminal_columns(void)
{
    struct winsize size;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col >= 20) return size.ws_col;
    return 80;
}

/* "12 s", "3 min 05 s", "2 h 10 min" */
static void duration_text(char *text, size_t capacity, double seconds)
{
    if (!(seconds < 360000.0)) snprintf(text, capacity, "more than 100 h");
    else if (seconds < 60.0) snprintf(text, capacity, "%.0f s", seconds);
    else if (seconds < 3600.0) snprintf(text, capacity, "%d min %02d s", (int)seconds / 60, (int)seconds % 60);
    else snprintf(text, capacity, "%d h %02d min", (int)seconds / 3600, (int)seconds / 60 % 60);
}

/* "3,584/7,639 tokens, 812 tokens/s, 5 s left" */
static void figures_text(char *text, size_t capacity, const struct sqz_progress *now)
{
    char done[NUMBER_TEXT_MAX], total[NUMBER_TEXT_MAX], left[40];
    size_t used = (size_t)snprintf(text, capacity, "%s/%s %s", count_text(done, (uint64_t)now->done),
                                   count_text(total, (uint64_t)now->total), now->unit);
    if (now->done > 0 && now->seconds > 0 && used < capacity) {
        double rate = now->done / now->seconds;
        duration_text(left, sizeof left, (now->total - now->done) / rate);
        snprintf(text + used, capacity - used, ", %.*f %s/s, %s left", rate < 10 ? 1 : 0, rate, now->unit, left);
    }
}

static void draw_bar(struct progress *progress, const struct sqz_progress *now, const char *figures)
{
    double share = now->done / now->total;
    int columns = terminal_columns();
    int room = columns - 1 - (int)(strlen(progress->label) + strlen(now->phase) + strlen(figures)) - 6;
    fprintf(stderr, "\r%s%-9s ", progress->label, now->phase);
    room = room > 40 ? 40 : room - 9 + (int)strlen(now->phase);
    if (room >= 8) {
        int filled = (int)((share < 0 ? 0 : share > 1 ? 1 : share) * room);
        fputc('[', stderr);
        for (int i = 0; i < room; i++) fputc(i < filled ? '#' : '.', stderr);
        fputs("] ", stderr);
    }
    fprintf(stderr, "%s\033[K", figures);
    fflush(stderr);
    progress->line_open = true;
}

bool progress_show(const struct sqz_progress *now, void *user_data)
{
    struct progress *progress = user_data;
    double seconds = now_seconds();
    bool new_phase = progress->phase != now->phase;
    double interval = progress->terminal ? terminal_interval_seconds : line_interval_seconds;
    if (signal_caught()) return false;
    if (progress->quiet || !(now->total > 0) || (!new_phase && seconds - progress->shown_seconds < interval))
        return true;
    char figures[160];
    figures_text(figures, sizeof figures, now);
    if (progress->terminal) draw_bar(progress, now, figures);
    else fprintf(stderr, "%s%s: %s\n", progress->label, now->phase, figures);
    progress->phase = now->phase;
    progress->shown_seconds = seconds;
    return true;
}

void progress_end(struct progress *progress)
{
    if (progress->line_open) {
        fputs("\r\033[K", stderr);
        fflush(stderr);
        progress->line_open = false;
    }
}
