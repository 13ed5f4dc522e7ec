/* mpirun and its ranks; ranks_job.h describes them. */
#define _GNU_SOURCE /* pipe2 */
#include "ranks_job.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "error.h"
#include "handover.h"

static char mpirun_path[4096], program_path[4096];

/* As a shell finds it. */
static bool find_in_path(const char *name, char *found, size_t size)
{
    const char *path = getenv("PATH");
    for (const char *at = path ? path : "/usr/bin:/bin"; at; at = strchr(at, ':') ? strchr(at, ':') + 1 : NULL) {
        const int n = (int)strcspn(at, ":");
        struct stat file;
        if (snprintf(found, size, "%.*s/%s", n ? n : 1, n ? at : ".", name) >= (int)size) continue;
        if (stat(found, &file) == 0 && S_ISREG(file.st_mode) && access(found, X_OK) == 0) return true;
    }
    return false;
}

enum sqz_status ranks_job_prepare(struct sqz_error *error)
{
    const ssize_t n = readlink("/proc/self/exe", program_path, sizeof program_path - 1);
    if (n <= 0) return sqz_error_set(error, SQZ_ERROR_IO, "/proc/self/exe: %s", strerror(errno));
    program_path[n] = '\0';
    if (!find_in_path("mpirun", mpirun_path, sizeof mpirun_path))
        return sqz_error_set(error, SQZ_ERROR_IO, "mpirun is not found in PATH: ranks need it (Debian's openmpi-bin)");
    prctl(PR_SET_CHILD_SUBREAPER, 1UL);
    /* By these mpirun and its other halves notice within 8 s that they do not reach each other any more. */
    setenv("OMPI_MCA_oob_tcp_keepalive_time", "5", 0);
    setenv("OMPI_MCA_oob_tcp_keepalive_intvl", "1", 0);
    setenv("OMPI_MCA_oob_tcp_keepalive_probes", "3", 0);
    return SQZ_OK;
}

/* ---- Start ------------------------------------------------------------------------------- */

_Noreturn static void become(const char *const *arguments, int said, pid_t parent)
{
    const int nothing = open("/dev/null", O_RDWR);
    sigset_t none;
    /* Its own group: an interrupt at the terminal is for the server, which ends ranks in peace. */
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) _exit(127);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGINT, SIG_DFL);
    signal(SIGPIPE, SIG_DFL);
    signal(SIGXFSZ, SIG_DFL);
    if (nothing < 0 || dup2(nothing, 0) < 0 || dup2(said, 1) < 0 || dup2(said, 2) < 0) _exit(127);
    execv(arguments[0], (char *const *)(uintptr_t)arguments);
    _exit(127);
}

enum sqz_status ranks_job_start(struct ranks_job *job, const struct ranks_job_options *o, struct sqz_error *error)
{
    enum { MOST_BEFORE = 16 };
    size_t n_given = 0, n = 0;
    char count[16];
    struct stat file;
    int pipe[2];
    while (o->arguments[n_given]) n_given++;
    const char **list = calloc(MOST_BEFORE + n_given, sizeof *list);
    if (!list) return sqz_error_set(error, SQZ_ERROR_MEMORY, "out of memory");
    snprintf(count, sizeof count, "%u", o->n);
    list[n++] = mpirun_path;
    list[n++] = "-n";
    list[n++] = count;
    list[n++] = "--oversubscribe"; /* as many as were asked for */
    list[n++] = "--bind-to";       /* they share processors out by themselves */
    list[n++] = "none";
    if (o->hosts) {
        list[n++] = stat(o->hosts, &file) == 0 && S_ISREG(file.st_mode) ? "--hostfile" : "--host";
        list[n++] = o->hosts;
    }
    list[n++] = "-x";
    list[n++] = HANDOVER_VARIABLE;
    if (o->start_variable && getenv(o->start_variable)) {
        list[n++] = "-x";
        list[n++] = o->start_variable;
    }
    list[n++] = program_path;
    for (size_t i = 0; i < n_given; i++) list[n++] = o->arguments[i];
    *job = (struct ranks_job){.said = -1, .n = o->n};
    if (pipe2(pipe, O_CLOEXEC) != 0) {
        free(list);
        return sqz_error_set(error, SQZ_ERROR_IO, "pipe: %s", strerror(errno));
    }
    const pid_t parent = getpid();
    job->mpirun = fork();
    if (job->mpirun == 0) become(list, pipe[1], parent);
    close(pipe[1]);
    free(list);
    if (job->mpirun < 0) {
        job->mpirun = 0;
        close(pipe[0]);
        return sqz_error_set(error, SQZ_ERROR_IO, "mpirun could not be started: %s", strerror(errno));
    }
    setpgid(job->mpirun, job->mpirun); /* whoever of the two is first */
    fcntl(pipe[0], F_SETFL, O_NONBLOCK);
    job->said = pipe[0];
    return SQZ_OK;
}

/* ---- What it says --------------------------------------------------------------------------- */

/* Open MPI's words, and ranks' own: console/ranks_comm.c. The first who is named was lost first. */
static void learn(struct ranks_job *job, const char *line)
{
    unsigned rank, of;
    const char *at;
    if (job->lost[0]) return;
    if ((at = strstr(line, "noticed that process rank ")) && sscanf(at + 26, "%u", &rank) == 1) {
        const char *how = strstr(at, "exited on ");
        snprintf(job->lost, sizeof job->lost, "rank %u of %u %.60s", rank, job->n, how ? how : "has ended");
    } else if ((at = strstr(line, "Process name: [[")) && sscanf(at, "Process name: [[%*u,%*u],%u]", &rank) == 1) {
        snprintf(job->lost, sizeof job->lost, "rank %u of %u has ended with an error", rank, job->n);
    } else if ((at = strstr(line, "rank ")) && strstr(at, " was not heard of") &&
               (sscanf(at, "rank %u of %u was", &rank, &of) == 2 || sscanf(at, "rank %*u: rank %u was", &rank) == 1)) {
        snprintf(job->lost, sizeof job->lost, "rank %u of %u was not heard of for some seconds", rank, job->n);
    } else if (strstr(line, "MPI did not start within"))
        snprintf(job->lost, sizeof job->lost, "a rank of %u has died or hangs: MPI did not start", job->n);
    const size_t n = strlen(job->lost);
    if (n && job->lost[n - 1] == '.') job->lost[n - 1] = '\0';
}

static void take_line(struct ranks_job *job, const char *data, size_t n)
{
    bytes_append(&job->line, data, n);
    if (!n || (data[n - 1] != '\n' && job->line.n < 4096)) return;
    if (job->line.data) {
        fputs(job->line.data, stderr);
        learn(job, job->line.data);
    }
    bytes_free(&job->line);
}

void ranks_job_listen(struct ranks_job *job)
{
    char piece[4096];
    while (job->said >= 0) {
        const ssize_t n = read(job->said, piece, sizeof piece);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) {
            close(job->said);
            job->said = -1;
            return;
        }
        for (ssize_t at = 0; at < n;) {
            const char *end = memchr(piece + at, '\n', (size_t)(n - at));
            const ssize_t part = end ? end + 1 - (piece + at) : n - at;
            take_line(job, piece + at, (size_t)part);
            at += part;
        }
    }
}

/* ---- Ends --------------------------------------------------------------------------------------- */

/* A process whose parent we are. */
static bool is_child(pid_t pid)
{
    char path[64], text[512];
    pid_t parent = -1;
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    const ssize_t n = file >= 0 ? read(file, text, sizeof text - 1) : -1;
    if (file >= 0) close(file);
    if (n <= 0) return false;
    text[n] = '\0';
    const char *end = strrchr(text, ')'); /* of its name, which may hold anything */
    return end && sscanf(end + 1, " %*c %d", &parent) == 1 && parent == getpid();
}

/* Ranks that mpirun left alone became children of ours. */
static void kill_left(void)
{
    DIR *all = opendir("/proc");
    for (struct dirent *one = all ? readdir(all) : NULL; one; one = readdir(all)) {
        const pid_t pid = isdigit((unsigned char)one->d_name[0]) ? atoi(one->d_name) : 0;
        if (pid > 0 && is_child(pid)) kill(pid, SIGKILL);
    }
    if (all) closedir(all);
    while (waitpid(-1, NULL, 0) > 0) {
    }
}

bool ranks_job_ended(struct ranks_job *job)
{
    pid_t pid;
    int status;
    if (!job->mpirun) return true;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        if (pid != job->mpirun) continue; /* of a rank that became ours */
        job->mpirun = 0;
        job->status = status;
        kill_left();
        ranks_job_listen(job);
        if (job->said >= 0) close(job->said);
        job->said = -1;
        take_line(job, "\n", 1);
        return true;
    }
    return false;
}

void ranks_job_end(struct ranks_job *job)
{
    static const double most_seconds = 3;
    const double now = sqz_clock_seconds();
    if (!job->mpirun) return;
    if (job->asked <= 0) {
        job->asked = now;
        kill(job->mpirun, SIGTERM);
    } else if (now - job->asked > most_seconds) {
        kill(job->mpirun, SIGKILL);
    }
}
