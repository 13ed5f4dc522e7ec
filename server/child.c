/*
 * A confined child process; child.h describes it. Layers, each of which would do alone for what it is there for: limits
 * of the kernel on memory, time, files written and descriptors; no new privileges; Landlock, where the kernel has
 * it, which leaves it the system's folders to read; a filter of system calls without sockets and without reaching into
 * other processes. Its input is a file in memory, sealed; its output a pipe that is read here.
 */
#define _GNU_SOURCE /* memfd_create, pipe2 */
#include "child.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#if __has_include(<linux/landlock.h>)
#include <linux/landlock.h>
#endif

#include "clock.h"

/* ---- In the child, between fork and exec: system calls alone, since other threads may have held any lock --------- */

static void limit(int what, size_t most)
{
    const struct rlimit both = {most, most};
    setrlimit(what, &both);
}

/* What programs need to start and to run, to be read; nothing of anybody's. */
static void close_files(void)
{
#if defined(LANDLOCK_ACCESS_FS_EXECUTE) && defined(SYS_landlock_create_ruleset)
    static const char *const folders[] = {"/usr", "/bin", "/lib", "/lib64", "/opt", "/nix/store"};
    static const char *const files[] = {"/etc/ld.so.cache", "/dev/null", "/dev/urandom"};
    const struct landlock_ruleset_attr handled = {.handled_access_fs = (LANDLOCK_ACCESS_FS_MAKE_SYM << 1) - 1};
    const int rules = (int)syscall(SYS_landlock_create_ruleset, &handled, sizeof handled, 0);
    if (rules < 0) return;
    for (size_t i = 0; i < sizeof folders / sizeof *folders + sizeof files / sizeof *files; i++) {
        const size_t n = sizeof folders / sizeof *folders;
        struct landlock_path_beneath_attr beneath = {.allowed_access = LANDLOCK_ACCESS_FS_READ_FILE};
        if (i < n) beneath.allowed_access |= LANDLOCK_ACCESS_FS_READ_DIR | LANDLOCK_ACCESS_FS_EXECUTE;
        beneath.parent_fd = open(i < n ? folders[i] : files[i - n], O_PATH | O_CLOEXEC);
        if (beneath.parent_fd >= 0) syscall(SYS_landlock_add_rule, rules, LANDLOCK_RULE_PATH_BENEATH, &beneath, 0);
    }
    syscall(SYS_landlock_restrict_self, rules, 0);
#endif
}

#if defined(__x86_64__)
#define THIS_ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define THIS_ARCHITECTURE AUDIT_ARCH_AARCH64
#endif

static bool close_calls(void)
{
#ifdef THIS_ARCHITECTURE
    enum { OF_X32 = 0x40000000 }; /* the same calls by other numbers */
#define REFUSE(number)                                                                                                 \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM)
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, THIS_ARCHITECTURE, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, OF_X32, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        REFUSE(SYS_socket),
        REFUSE(SYS_socketpair),
        REFUSE(SYS_connect),
        REFUSE(425), /* io_uring_setup, by which sockets are opened as well */
        REFUSE(SYS_ptrace),
        REFUSE(SYS_process_vm_readv),
        REFUSE(SYS_process_vm_writev),
        REFUSE(SYS_kill),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
#undef REFUSE
    const struct sock_fprog program = {sizeof code / sizeof *code, code};
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
#else
    return true;
#endif
}

_Noreturn static void become(const char *const *arguments, int input, int output, const struct child_limits *l,
                             pid_t parent)
{
    static const char *const environment[] = {"PATH=/usr/bin:/bin", "LC_ALL=C.UTF-8", "HOME=/nonexistent", NULL};
    const int nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC);
    sigset_t none;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent || nowhere < 0) _exit(127);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    signal(SIGXFSZ, SIG_DFL);
    if (dup2(input, 0) < 0 || dup2(output, 1) < 0 || dup2(nowhere, 2) < 0) _exit(127);
#ifdef SYS_close_range
    syscall(SYS_close_range, 3u, ~0u, 0);
#endif
    setpriority(PRIO_PROCESS, 0, 10);
    limit(RLIMIT_AS, l->memory_bytes);
    limit(RLIMIT_CPU, l->seconds + 1); /* after the parent's clock, which says why */
    limit(RLIMIT_FSIZE, 0);
    limit(RLIMIT_CORE, 0);
    limit(RLIMIT_NOFILE, 64);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) _exit(127);
    close_files();
    if (!close_calls()) _exit(127);
    execve(arguments[0], (char *const *)(uintptr_t)arguments, (char *const *)(uintptr_t)environment);
    _exit(127);
}

/* ---- In the parent ------------------------------------------------------------------------------------------- */

static int file_of(const char *data, size_t n)
{
    const int file = memfd_create("input", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    while (file >= 0 && n) {
        const ssize_t done = write(file, data, n);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) {
            close(file);
            return -1;
        }
        data += done;
        n -= (size_t)done;
    }
    if (file >= 0 &&
        (fcntl(file, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK) != 0 || lseek(file, 0, SEEK_SET) != 0)) {
        close(file);
        return -1;
    }
    return file;
}

/* Reads until the end, which is CHILD_DONE, or what is not to be. */
static enum child_end read_all(int from, const struct child_limits *l, bool (*go_on)(void *), void *data,
                               struct bytes *output)
{
    enum { PIECE = 1 << 16 };
    char piece[PIECE];
    const double began = sqz_clock_seconds();
    for (;;) {
        struct pollfd any = {.fd = from, .events = POLLIN};
        if (!go_on(data)) return CHILD_STOPPED;
        if (sqz_clock_seconds() - began > l->seconds) return CHILD_LATE;
        if (poll(&any, 1, 100) <= 0) continue;
        const ssize_t n = read(from, piece, PIECE);
        if (n == 0) return CHILD_DONE;
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return CHILD_FAILED;
        if (output->n + (size_t)n > l->output_bytes) return CHILD_LARGE;
        bytes_append(output, piece, (size_t)n);
        if (output->failed) return CHILD_NOT_STARTED;
    }
}

/* One that has closed its output and does not end is killed, too. */
static enum child_end wait_for(pid_t child, enum child_end end, int *code)
{
    const struct timespec pause = {.tv_nsec = 10000000};
    int status = 0;
    pid_t ended = 0;
    for (int i = 0; end == CHILD_DONE && i < 200 && (ended = waitpid(child, &status, WNOHANG)) == 0; i++)
        nanosleep(&pause, NULL);
    if (ended == 0) {
        kill(child, SIGKILL);
        while (waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
        if (end == CHILD_DONE) return CHILD_LATE;
    }
    if (end != CHILD_DONE) return end;
    *code = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
    if (WIFSIGNALED(status)) return WTERMSIG(status) == SIGXCPU ? CHILD_LATE : CHILD_KILLED;
    return *code ? CHILD_FAILED : CHILD_DONE;
}

enum child_end child_run(const char *const *arguments, const void *input, size_t n, const struct child_limits *limits,
                         bool (*go_on)(void *data), void *data, struct bytes *output, int *code)
{
    int ends[2];
    const pid_t parent = getpid();
    *code = 0;
    const int file = file_of(input, n);
    if (file < 0) return CHILD_NOT_STARTED;
    if (pipe2(ends, O_CLOEXEC) != 0) {
        close(file);
        return CHILD_NOT_STARTED;
    }
    const pid_t child = fork();
    if (child == 0) become(arguments, file, ends[1], limits, parent);
    close(file);
    close(ends[1]);
    enum child_end end = CHILD_NOT_STARTED;
    if (child > 0) end = wait_for(child, read_all(ends[0], limits, go_on, data, output), code);
    close(ends[0]);
    return end;
}
