/*
 * Progress of long work on standard error: one line that is redrawn when it is
 * a terminal, a plain line now and then otherwise, nothing when quiet.
 */
#ifndef SQZ_CONSOLE_PROGRESS_H
#define SQZ_CONSOLE_PROGRESS_H

#include <stdbool.h>

#include "common.h"

struct progress {
    bool quiet, terminal;
    char label[PLAIN_TEXT_MAX]; /* before the phase, "" for none */
    const char *phase;          /* the one shown last */
    double shown_seconds;       /* when something was last shown */
    bool line_open;             /* a bar stands on the terminal's last line */
};

void progress_begin(struct progress *progress, bool quiet, const char *label);

/* A sqz_progress_callback; user_data is a struct progress. Asks to stop once a signal was caught. */
bool progress_show(const struct sqz_progress *now, void *user_data);

/* Takes the bar off the terminal. */
void progress_end(struct progress *progress);

#endif
