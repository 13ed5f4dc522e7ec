/* MPI, heartbeats and waiting; ranks_comm.h. */
#define _GNU_SOURCE /* sched_setaffinity, syscall */
#include "ranks_comm.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "common.h"
#include "many_ranks.h"

/* A rank that was not heard of for so long is lost; an error is due within 10 s. */
static const double beat_seconds = 0.25, lost_seconds = 6;
static const double abort_seconds = 2;

struct ranks_comm ranks = {1, 0, 1, MPI_COMM_NULL};

static MPI_Comm beat;
static pthread_t beat_thread;
static atomic_bool beat_ends;
static atomic_int lost_rank = -1;

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void sleep_for(double s)
{
    nanosleep(&(struct timespec){.tv_sec = (time_t)s, .tv_nsec = (long)(1e9 * (s - (double)(time_t)s))}, NULL);
}

/* ---- Heartbeats -------------------------------------------------------------------------- */

/* Whom this rank listens to: rank 0 to all, all to rank 0. */
static bool is_peer(int r)
{
    return r != ranks.rank && (r == 0 || ranks.rank == 0);
}

struct pulse {
    double heard;
    MPI_Request sending;
};

/* One message under way to each, at most: a rank that takes none fills nobody's memory. */
static void send_pulses(struct pulse *pulse)
{
    static const char live = 1;
    for (int r = 0; r < ranks.n; r++) {
        int done = 1;
        if (!is_peer(r)) continue;
        if (pulse[r].sending != MPI_REQUEST_NULL) MPI_Test(&pulse[r].sending, &done, MPI_STATUS_IGNORE);
        if (done) MPI_Isend(&live, 1, MPI_CHAR, r, 0, beat, &pulse[r].sending);
    }
}

static void hear_pulses(struct pulse *pulse)
{
    for (int there = 1; there;) {
        MPI_Status status;
        char live;
        MPI_Iprobe(MPI_ANY_SOURCE, 0, beat, &there, &status);
        if (!there) break;
        MPI_Recv(&live, 1, MPI_CHAR, status.MPI_SOURCE, 0, beat, MPI_STATUS_IGNORE);
        pulse[status.MPI_SOURCE].heard = seconds();
    }
}

/* What it is about to do may wait for others that never come: then it ends all the same. Steps are counted, so that a machine
 * that stood still is not to blame. */
static void *end_it(void *steps)
{
    for (long left = *(long *)steps; left > 0; left--) sleep_for(beat_seconds);
    kill(getpid(), SIGKILL);
    return NULL;
}

static void end_within(double s)
{
    static long steps;
    pthread_t thread;
    steps = (long)(s / beat_seconds);
    if (pthread_create(&thread, NULL, end_it, &steps) == 0) pthread_detach(thread);
}

void ranks_abort(int code)
{
    end_within(abort_seconds);
    MPI_Abort(MPI_COMM_WORLD, code);
}

static atomic_bool started;

/* There are no heartbeats until MPI has started everywhere. A machine that stood still is not to blame here either. */
static void *watch_start(void *limit)
{
    const double seconds = *(const double *)limit;
    for (long left = (long)(seconds / beat_seconds); left > 0 && !started; left--) sleep_for(beat_seconds);
    if (started) return NULL;
    fprintf(stderr,
            "squeeze: MPI did not start within %g s: a rank has died or hangs, or one does not reach another "
            "(" RANKS_START_VARIABLE " allows more)\n",
            seconds);
    sleep_for(beat_seconds); /* or mpirun says first that this one was killed */
    kill(getpid(), SIGKILL);
    return NULL;
}

/* Where another host has rank 0, mpirun's daemon here started us. One that cannot reach mpirun any more stays for as long as TCP
 * hopes, a quarter of an hour. So a process of its own, which nobody ends with the job, ends it; soon, not at once: what was
 * said before goes through it. */
static void end_daemon(void)
{
    char path[64], name[16] = "";
    const int daemon = (int)syscall(SYS_pidfd_open, getppid(), 0);
    snprintf(path, sizeof path, "/proc/%d/comm", (int)getppid());
    FILE *file = fopen(path, "r");
    const bool read = file && fgets(name, sizeof name, file);
    if (file) fclose(file);
    if (daemon < 0 || !read || strcmp(name, "orted\n") != 0 || fork() != 0) return;
    setsid();
    sleep_for(abort_seconds);
    syscall(SYS_pidfd_send_signal, daemon, SIGTERM, NULL, 0);
    sleep_for(abort_seconds);
    syscall(SYS_pidfd_send_signal, daemon, SIGKILL, NULL, 0);
    _exit(0);
}

/* Without its head no rank has anything to do, nor has its daemon. */
static void note_lost(int r)
{
    int nobody = -1;
    if (!atomic_compare_exchange_strong(&lost_rank, &nobody, r) || ranks.rank == 0) return;
    fprintf(stderr, "squeeze: rank %d: rank 0 was not heard of for %.0f s; it ends\n", ranks.rank, lost_seconds);
    end_daemon();
    ranks_abort(1);
}

static void *keep_beating(void *data)
{
    struct pulse *pulse = data;
    double last = seconds();
    for (int r = 0; r < ranks.n; r++) pulse[r] = (struct pulse){last, MPI_REQUEST_NULL};
    while (!atomic_load(&beat_ends)) {
        send_pulses(pulse);
        hear_pulses(pulse);
        const double now = seconds();
        /* Who was stopped itself has heard of nobody. */
        for (int r = 0; r < ranks.n && now - last > 4 * beat_seconds; r++) pulse[r].heard = now;
        for (int r = 0; r < ranks.n; r++)
            if (is_peer(r) && now - pulse[r].heard > lost_seconds) note_lost(r);
        last = now;
        sleep_for(beat_seconds);
    }
    for (int r = 0; r < ranks.n; r++)
        if (pulse[r].sending != MPI_REQUEST_NULL) MPI_Request_free(&pulse[r].sending);
    free(pulse);
    return NULL;
}

int ranks_lost(void)
{
    return atomic_load(&lost_rank);
}

const char *ranks_lost_text(void)
{
    static char text[160];
    snprintf(text, sizeof text, "rank %d of %d was not heard of for %.0f s: it has died or hangs", ranks_lost(),
             ranks.n, lost_seconds);
    return text;
}

/* ---- Start and end ------------------------------------------------------------------------- */

/* Ranks of one host that may run on the same processors each take their share, or none would wait for another. */
static void share_processors(int local_rank, int local_n)
{
    cpu_set_t all, mine;
    int n, turn = 0;
    if (sched_getaffinity(0, sizeof all, &all) != 0) return;
    n = CPU_COUNT(&all);
    if (n < 2 || local_n < 2 || getenv("OMP_NUM_THREADS")) return;
    const int share = n >= local_n ? n / local_n : 1, first = local_rank * share % n;
    CPU_ZERO(&mine);
    for (int c = 0; c < CPU_SETSIZE; c++) {
        if (!CPU_ISSET(c, &all)) continue;
        if (turn >= first && turn < first + share) CPU_SET(c, &mine);
        turn++;
    }
    sched_setaffinity(0, sizeof mine, &mine);
}

void ranks_comm_begin(double start_seconds)
{
    int provided = 0, local_rank = 0, local_n = 1;
    MPI_Comm host;
    pthread_t watching;
    static double limit;
    limit = start_seconds;
    if (pthread_create(&watching, NULL, watch_start, &limit) != 0) die("a rank cannot start a thread");
    pthread_detach(watching);
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_MULTIPLE, &provided) != MPI_SUCCESS || provided < MPI_THREAD_MULTIPLE)
        die("this MPI does not take calls from several threads (MPI_THREAD_MULTIPLE), which ranks need");
    MPI_Comm_rank(MPI_COMM_WORLD, &ranks.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks.n);
    MPI_Comm_dup(MPI_COMM_WORLD, &ranks.work);
    MPI_Comm_dup(MPI_COMM_WORLD, &beat);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, ranks.rank, MPI_INFO_NULL, &host);
    MPI_Comm_rank(host, &local_rank);
    MPI_Comm_size(host, &local_n);
    MPI_Comm_free(&host);
    ranks.n_here = local_n;
    share_processors(local_rank, local_n);
    prctl(PR_SET_TIMERSLACK, 1UL); /* of the nanoseconds that a sleep may take longer */
    struct pulse *pulse = calloc((size_t)ranks.n, sizeof *pulse);
    if (!pulse || pthread_create(&beat_thread, NULL, keep_beating, pulse) != 0)
        die("rank %d cannot start a thread", ranks.rank);
    started = true;
}

void ranks_comm_end(void)
{
    atomic_store(&beat_ends, true);
    pthread_join(beat_thread, NULL);
    end_within(lost_seconds);
    MPI_Finalize();
}

/* ---- Waiting ------------------------------------------------------------------------------- */

void ranks_rest(double since)
{
    const double waited = seconds() - since;
    if (waited < 2e-5) sched_yield();
    else if (waited < 0.02) sleep_for(2e-5);
    else sleep_for(waited < 1 ? 2e-4 : 1e-3);
}

/* Open MPI looks at what it has matched first and fetches what has come behind that: one look finds a message a sleep late. */
enum { LOOKS = 2 };

bool ranks_are_done(MPI_Request *requests, int n)
{
    int done = 0;
    for (int i = 0; i < LOOKS && !done; i++) MPI_Testall(n, requests, &done, MPI_STATUSES_IGNORE);
    return done;
}

bool ranks_wait(MPI_Request *requests, int n)
{
    const double since = seconds();
    for (;;) {
        if (ranks_are_done(requests, n)) return true;
        if (ranks_lost() >= 0) return false;
        ranks_rest(since);
    }
}

bool ranks_wait_call(int *source, int *bytes)
{
    const double since = seconds();
    for (;;) {
        MPI_Status status;
        int there = 0;
        for (int i = 0; i < LOOKS && !there; i++) MPI_Iprobe(MPI_ANY_SOURCE, TAG_CALL, ranks.work, &there, &status);
        if (there) {
            *source = status.MPI_SOURCE;
            MPI_Get_count(&status, MPI_BYTE, bytes);
            return true;
        }
        if (ranks_lost() >= 0) return false;
        ranks_rest(since);
    }
}

size_t ranks_read_bytes(size_t n_parts)
{
    return offsetof(struct ranks_read, stats) + n_parts * sizeof(struct sqz_attention_stats);
}

int ranks_parent(void)
{
    return ranks.rank > 2 ? ranks.rank - 2 : 0;
}

int ranks_children(int child[2])
{
    int n = 0;
    for (int r = ranks.rank ? ranks.rank + 2 : 1; r <= ranks.rank + 2 && r < ranks.n; r++) child[n++] = r;
    return n;
}
