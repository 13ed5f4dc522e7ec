/*
 * Signals that end the program, and what must not stay behind then. common.h
 * has what every subcommand needs of it: catch_signals() and who asks.
 */
#ifndef SQZ_CONSOLE_SIGNALS_H
#define SQZ_CONSOLE_SIGNALS_H

/* For main(): a page of a context that is gone becomes an error of whoever works on it; one of the model,
 * and llama.cpp's abort(), a sentence and exit code 1. */
void explain_faults(void);

/* tidy runs in a signal handler when the program ends suddenly: it may call what is async-signal-safe, such as
 * unlink() and rmdir(). Unfinished context files are removed without being asked for. Noted once for each function. */
void on_sudden_end(void (*tidy)(void));

/* From now on these run at the first signal already that asks the program to end, and again when it does: for who gets a
 * second and may spend it in a wait, as mpirun's processes do. */
void tidy_at_first_signal(void);

#endif
