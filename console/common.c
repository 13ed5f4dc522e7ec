/*
 * What the subcommands share; common.h describes it. The only place that
 * writes messages.
 */
#define _POSIX_C_SOURCE 200809L

#include "common.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "plain_text.h"

/* ---- Messages ---------------------------------------------------------------- */

static char command_name[64] = "squeeze";

void set_command(const char *name)
{
    snprintf(command_name, sizeof command_name, "squeeze %s", name);
}

/* The message as it may stand on a terminal, whatever names are in it; malloc'ed, NULL where there is no memory. */
static char *plain_message(const char *format, va_list arguments)
{
    va_list again;
    va_copy(again, arguments);
    const int n = vsnprintf(NULL, 0, format, again);
    va_end(again);
    char *text = n >= 0 ? malloc((size_t)n + 1) : NULL;
    if (text) {
        vsnprintf(text, (size_t)n + 1, format, arguments);
        sqz_plain_text(text);
    }
    return text;
}

static void print_message(const char *format, va_list arguments)
{
    char *text = plain_message(format, arguments);
    flush_stdout();
    fprintf(stderr, "%s: %s\n", command_name, text ? text : "out of memory for a message");
    free(text);
}

_Noreturn void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    print_message(format, arguments);
    va_end(arguments);
    exit(1);
}

_Noreturn void usage_error(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    print_message(format, arguments);
    va_end(arguments);
    exit(2);
}

void warn(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    print_message(format, arguments);
    va_end(arguments);
}

int report(const struct sqz_error *error)
{
    if (error->status == SQZ_ERROR_CANCELLED && signal_caught()) {
        warn("interrupted; nothing was written");
        return 128 + signal_caught();
    }
    warn("%s", error->message[0] ? error->message : sqz_status_name(error->status));
    return 1;
}

/* Why standard output could not be written, once it could not; 0: it could. */
static int stdout_errno;

bool flush_stdout(void)
{
    if (fflush(stdout) != 0 && stdout_errno == 0) stdout_errno = errno;
    return !ferror(stdout) && stdout_errno == 0;
}

/* The reason when a full buffer was written behind our back and only the stream's mark is left: that of the next byte. */
static int find_write_errno(void)
{
    errno = 0;
    return write(STDOUT_FILENO, "\n", 1) < 0 ? errno : 0;
}

int close_stdout(void)
{
    if (flush_stdout()) return 0;
    const int reason = stdout_errno ? stdout_errno : find_write_errno();
    /* A reader that went away (squeeze ... | head) wants no message. */
    if (reason != EPIPE) warn("cannot write to standard output: %s", reason ? strerror(reason) : "a write failed");
    return 1;
}

void stop_on(enum sqz_status status, const struct sqz_error *error)
{
    if (signal_caught()) {
        warn("interrupted");
        exit(128 + signal_caught());
    }
    if (status != SQZ_OK) exit(report(error));
}

/* ---- Names ---------------------------------------------------------------------- */

const char *plain_text(char text[PLAIN_TEXT_MAX], const char *name)
{
    const int n = snprintf(text, PLAIN_TEXT_MAX, "%s", name);
    if (n >= PLAIN_TEXT_MAX) strcpy(text + PLAIN_TEXT_MAX - 4, "...");
    sqz_plain_text(text);
    return text;
}

/* ---- Numbers ---------------------------------------------------------------------- */

double now_seconds(void)
{
    return sqz_clock_seconds();
}

const char *count_text(char text[NUMBER_TEXT_MAX], uint64_t count)
{
    char digits[24];
    int n = snprintf(digits, sizeof digits, "%llu", (unsigned long long)count);
    int k = 0;
    for (int i = 0; i < n; i++) {
        if (i > 0 && (n - i) % 3 == 0) text[k++] = ',';
        text[k++] = digits[i];
    }
    text[k] = '\0';
    return text;
}

const char *bytes_text(char text[NUMBER_TEXT_MAX], uint64_t n_bytes)
{
    static const char *const units[] = {"kB", "MB", "GB", "TB", "PB", "EB"};
    double value = (double)n_bytes / 1e3;
    size_t unit = 0;
    if (n_bytes < 1000) {
        snprintf(text, NUMBER_TEXT_MAX, "%u bytes", (unsigned)n_bytes);
        return text;
    }
    while (value >= 999.95 && unit + 1 < sizeof units / sizeof units[0]) {
        value /= 1e3;
        unit++;
    }
    snprintf(text, NUMBER_TEXT_MAX, "%.1f %s", value, units[unit]);
    return text;
}
