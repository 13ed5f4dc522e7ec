/*
 * Signals. The first that asks the program to end is noted, and the work stops
 * at the next place where it can; the second ends it at once. Neither leaves
 * unfinished files behind. What cannot go on (a page of a mapped file that is
 * gone, an abort of llama.cpp) is said in a sentence.
 */
#define _GNU_SOURCE /* siginfo_t, SIGXCPU */
#include "signals.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "common.h"
#include "squeeze.h"
#include "unfinished.h"

/* ---- What must not stay --------------------------------------------------------- */

enum { MOST_TIDY = 4 };
static void (*tidy_functions[MOST_TIDY])(void);
static volatile sig_atomic_t n_tidy;

void on_sudden_end(void (*tidy)(void))
{
    for (int i = 0; i < n_tidy; i++)
        if (tidy_functions[i] == tidy) return;
    if (n_tidy < MOST_TIDY) { /* one for each place that makes temporary files: there are two */
        tidy_functions[n_tidy] = tidy;
        n_tidy++;
    }
}

static volatile sig_atomic_t tidies_early;

void tidy_at_first_signal(void)
{
    tidies_early = 1;
}

/* Unfinished files first: some stand in a folder that a function then removes. */
static void tidy_up(void)
{
    sqz_unfinished_remove();
    for (int i = 0; i < n_tidy; i++) tidy_functions[i]();
}

/* ---- Signals that ask the program to end ---------------------------------------- */

/* Handlers run on any thread. */
static atomic_int caught_signal;

static void end_now(int number)
{
    tidy_up();
    signal(number, SIG_DFL);
    raise(number); /* takes effect when the handler returns */
}

/* SIGXCPU comes again every second until the program ends: a second one says nothing new. */
static void note_signal(int number)
{
    int none = 0;
    const int was = errno;
    for (int i = 0; tidies_early && i < n_tidy; i++) tidy_functions[i]();
    errno = was;
    if (!atomic_compare_exchange_strong(&caught_signal, &none, number) && number != SIGXCPU) end_now(number);
}

static void handle(int number, void (*handler)(int), bool even_if_ignored)
{
    struct sigaction action, before;
    memset(&action, 0, sizeof action);
    action.sa_handler = handler; /* no SA_RESTART: a read at a prompt must return */
    sigemptyset(&action.sa_mask);
    if (!even_if_ignored && sigaction(number, NULL, &before) == 0 && before.sa_handler == SIG_IGN) return;
    sigaction(number, &action, NULL);
}

/* What whoever started us wants ignored (nohup) stays so; but shells ignore SIGINT for every job in the background, and
 * one that is sent there all the same is meant. SIGQUIT dumps core as ever, only without leaving files. */
void catch_signals(void)
{
    handle(SIGINT, note_signal, true);
    handle(SIGTERM, note_signal, false);
    handle(SIGHUP, note_signal, false);
    handle(SIGXCPU, note_signal, false);
    handle(SIGQUIT, end_now, false);
}

int signal_caught(void)
{
    return caught_signal;
}

void signal_forget(void)
{
    caught_signal = 0;
}

bool signal_cancelled(void *unused)
{
    (void)unused;
    return caught_signal != 0;
}

/* ---- Signals of what cannot go on ------------------------------------------------ */

static void end_with(const char *message, size_t n_bytes)
{
    static atomic_flag said = ATOMIC_FLAG_INIT;
    if (atomic_flag_test_and_set(&said))
        for (;;) /* another thread met the same: it says so and ends the process */
            pause();
    tidy_up();
    ssize_t ignored = write(STDERR_FILENO, message, n_bytes);
    (void)ignored;
    _exit(1);
}

/* llama.cpp and the C++ library below it end the program where they cannot report, nearly always for lack of memory;
 * no C code can catch their exceptions. What they said stands on standard error already. */
static void explain_abort(int number)
{
    static const char message[] = "squeeze: llama.cpp gave up, most likely for lack of memory; nothing was written\n";
    (void)number;
    end_with(message, sizeof message - 1);
}

/* Contexts and the model are mapped: a file that became shorter, or a disk that fails, shows when a page of it is read.
 * Work on a context goes on and fails; llama.cpp's on the model cannot. What was printed so far stands where it is,
 * perhaps in the middle of a line. */
static void explain_lost_page(int number, siginfo_t *information, void *context)
{
    static const char message[] =
        "\nsqueeze: a file that is in use, most likely the model, became shorter or cannot be "
        "read from its disk any more; restore it\n";
    (void)context;
    if (sqz_context_page_lost(information->si_addr)) return;
    if (information->si_code == BUS_ADRERR || information->si_code == BUS_OBJERR) end_with(message, sizeof message - 1);
    signal(number, SIG_DFL); /* a fault of the program itself: it comes again at once */
}

void explain_faults(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = explain_lost_page;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, NULL);
    signal(SIGABRT, explain_abort);
}
