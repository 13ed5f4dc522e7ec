/*
 * What the subcommands share: messages and exit codes, signals, numbers as
 * people read them.
 *
 * Exit codes: 0 done, 1 failed, 2 usage, 3 done in part, 128 + signal when interrupted.
 * Everything that is not a result goes to standard error.
 */
#ifndef SQZ_CONSOLE_COMMON_H
#define SQZ_CONSOLE_COMMON_H

#include <stdbool.h>
#include <stdint.h>

#include "squeeze.h"

#if defined(__GNUC__) || defined(__clang__)
#define PRINTF_LIKE(text, arguments) __attribute__((format(printf, text, arguments)))
#else
#define PRINTF_LIKE(text, arguments)
#endif

/* Beside 0, 1, 2 and 128 + signal: done, but part of what was asked for had to be left out. */
enum { EXIT_INCOMPLETE = 3 };

/* ---- Messages ------------------------------------------------------------------ */

/* The name that begins every message: "squeeze ask: ...". */
void set_command(const char *name);

_Noreturn void die(const char *format, ...) PRINTF_LIKE(1, 2);         /* exit code 1 */
_Noreturn void usage_error(const char *format, ...) PRINTF_LIKE(1, 2); /* exit code 2 */
void warn(const char *format, ...) PRINTF_LIKE(1, 2);

/* Says what went wrong and returns the exit code. */
int report(const struct sqz_error *error);

/* Flushes standard output; false when it, or an earlier write, failed. The first reason is kept for close_stdout(). */
bool flush_stdout(void);

/* Flushes standard output. Returns 0, or 1 when it could not be written (said, unless the reader went away). */
int close_stdout(void);

/* ---- Signals --------------------------------------------------------------------- */

/* From now on SIGINT, SIGTERM, SIGHUP and SIGXCPU are noted instead of ending the program; a second one ends it at once.
 * Nothing unfinished stays in either case, nor after SIGQUIT. signals.h has what is removed. */
void catch_signals(void);
int signal_caught(void);             /* its number, 0: none */
void signal_forget(void);            /* the answer was stopped, the program goes on */
bool signal_cancelled(void *unused); /* for sqz_session_set_cancel() */
/* Ends the program when a signal was caught, or when the status is a failure, with the exit code of either. */
void stop_on(enum sqz_status status, const struct sqz_error *error);

/* ---- Names -------------------------------------------------------------------------- */

/* A name out of a file, fit for a terminal: control characters become '?', a long one is cut off. warn() and its like do
 * so by themselves; what else prints such a name goes through here (or through table.h, progress.h or text_buffer.h). */
enum { PLAIN_TEXT_MAX = 640 };
const char *plain_text(char text[PLAIN_TEXT_MAX], const char *name);

/* ---- Numbers ------------------------------------------------------------------------ */

double now_seconds(void); /* monotonic */

enum { NUMBER_TEXT_MAX = 32 };
const char *count_text(char text[NUMBER_TEXT_MAX], uint64_t count);   /* "7,639" */
const char *bytes_text(char text[NUMBER_TEXT_MAX], uint64_t n_bytes); /* "171.4 MB" */

/* ---- Subcommands ---------------------------------------------------------------------- */

/* argv[0] is the subcommand's name. Each returns the exit code. */
int cmd_prepare(int argc, char **argv);
int cmd_ask(int argc, char **argv);
int cmd_chat(int argc, char **argv);
int cmd_inspect(int argc, char **argv);
int cmd_compare(int argc, char **argv);
int cmd_eval(int argc, char **argv);
int cmd_analyze(int argc, char **argv);
int cmd_bench(int argc, char **argv);
int cmd_cpu(int argc, char **argv);
int cmd_gpu(int argc, char **argv);
int cmd_serve(int argc, char **argv);

#endif
