/*
 * System calls and allocations that fail when a target says so; fuzz.h
 * describes it. The linker's --wrap puts the functions below in place of those
 * of the C library; CMakeLists.txt lists them once more.
 */
#define _GNU_SOURCE /* fallocate, realpath and others that are wrapped */
#include "fuzz.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <unistd.h>

static struct {
    uint32_t left; /* calls until one fails; 0: none will */
    int error;
    bool from_then_on, by_half;
} faults;

static struct {
    const uint8_t *bytes;
    size_t n;
} system_files;

void faults_begin(uint32_t n, uint8_t how, bool from_then_on)
{
    static const int errors[] = {ENOSPC, EIO, EINTR, EOPNOTSUPP, EFBIG, EEXIST, ENOMEM, EINVAL, EACCES, ENOENT};
    faults.left = n;
    faults.error = errors[how % 10];
    faults.by_half = how & 128;
    /* An interrupted call is tried again, rightly for ever. */
    faults.from_then_on = from_then_on && faults.error != EINTR && faults.error != EEXIST;
}

void faults_end(void)
{
    faults.left = 0;
    system_files.bytes = NULL;
}

void faults_system_files(const uint8_t *bytes, size_t n)
{
    system_files.bytes = bytes;
    system_files.n = n;
}

/* Whether the call that asks fails; errno is set. */
static bool fails(void)
{
    if (!faults.left || --faults.left) return false;
    faults.left = faults.from_then_on ? 1 : 0;
    errno = faults.error;
    return true;
}

#define WRAP(type, name, parameters, arguments, failed)                                                                \
    type __real_##name parameters;                                                                                     \
    type __wrap_##name parameters;                                                                                     \
    type __wrap_##name parameters                                                                                      \
    {                                                                                                                  \
        return fails() ? (failed) : __real_##name arguments;                                                           \
    }

WRAP(void *, malloc, (size_t n), (n), NULL)
WRAP(void *, calloc, (size_t n, size_t bytes), (n, bytes), NULL)
WRAP(void *, realloc, (void *block, size_t n), (block, n), NULL)
WRAP(int, posix_memalign, (void **block, size_t alignment, size_t n), (block, alignment, n), ENOMEM)
WRAP(char *, strdup, (const char *text), (text), NULL)
WRAP(char *, strndup, (const char *text, size_t n), (text, n), NULL)
WRAP(char *, realpath, (const char *path, char *resolved), (path, resolved), NULL)
WRAP(void *, mmap, (void *at, size_t n, int protection, int flags, int file, off_t offset),
     (at, n, protection, flags, file, offset), MAP_FAILED)
WRAP(int, stat, (const char *path, struct stat *status), (path, status), -1)
WRAP(int, lstat, (const char *path, struct stat *status), (path, status), -1)
WRAP(int, fstat, (int file, struct stat *status), (file, status), -1)
WRAP(int, fstatat, (int folder, const char *path, struct stat *status, int flags), (folder, path, status, flags), -1)
WRAP(int, access, (const char *path, int mode), (path, mode), -1)
WRAP(int, faccessat, (int folder, const char *path, int mode, int flags), (folder, path, mode, flags), -1)
WRAP(ssize_t, readlink, (const char *path, char *to, size_t n), (path, to, n), -1)
WRAP(ssize_t, readlinkat, (int folder, const char *path, char *to, size_t n), (folder, path, to, n), -1)
WRAP(int, fchown, (int file, uid_t owner, gid_t group), (file, owner, group), -1)
WRAP(DIR *, fdopendir, (int file), (file), NULL)
WRAP(int, fchmod, (int file, mode_t mode), (file, mode), -1)
WRAP(int, ftruncate, (int file, off_t n), (file, n), -1)
WRAP(int, fallocate, (int file, int mode, off_t offset, off_t n), (file, mode, offset, n), -1)
WRAP(int, fstatvfs, (int file, struct statvfs *status), (file, status), -1)
WRAP(int, linkat, (int from_folder, const char *from, int to_folder, const char *to, int flags),
     (from_folder, from, to_folder, to, flags), -1)
WRAP(int, renameat, (int from_folder, const char *from, int to_folder, const char *to),
     (from_folder, from, to_folder, to), -1)
WRAP(ssize_t, getrandom, (void *to, size_t n, unsigned flags), (to, n, flags), -1)
WRAP(ssize_t, pread, (int file, void *to, size_t n, off_t offset), (file, to, n, offset), -1)

/* A disk is not asked: that takes longer than all the rest. */
int __wrap_fsync(int file);
int __wrap_fsync(int file)
{
    (void)file;
    return fails() ? -1 : 0;
}

/* Also writes that end early, and one that takes no byte at all. */
ssize_t __real_pwrite(int file, const void *from, size_t n, off_t offset);
ssize_t __wrap_pwrite(int file, const void *from, size_t n, off_t offset);
ssize_t __wrap_pwrite(int file, const void *from, size_t n, off_t offset)
{
    if (!fails()) return __real_pwrite(file, from, n, offset);
    if (!faults.by_half || faults.from_then_on) return -1;
    return n < 2 ? 0 : __real_pwrite(file, from, n / 2, offset);
}

static mode_t mode_of(int flags, va_list arguments)
{
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
}

int __real_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = mode_of(flags, arguments);
    va_end(arguments);
    return fails() ? -1 : __real_open(path, flags, mode);
}

int __real_openat(int folder, const char *path, int flags, ...);
int __wrap_openat(int folder, const char *path, int flags, ...);
int __wrap_openat(int folder, const char *path, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = mode_of(flags, arguments);
    va_end(arguments);
    return fails() ? -1 : __real_openat(folder, path, flags, mode);
}

/* What the system says of control groups is the input's when a target gave it. */
FILE *__real_fopen(const char *path, const char *mode);
FILE *__wrap_fopen(const char *path, const char *mode);
FILE *__wrap_fopen(const char *path, const char *mode)
{
    const bool of_system = !strncmp(path, "/proc/self/cgroup", 17) || !strncmp(path, "/sys/fs/cgroup", 14);
    if (fails()) return NULL;
    if (!of_system || !system_files.bytes) return __real_fopen(path, mode);
    if (path[1] == 's' && system_files.n) { /* a limit: what stands behind the lines of groups */
        const uint8_t *end = memchr(system_files.bytes, '\0', system_files.n);
        const size_t at = end ? (size_t)(end - system_files.bytes) + 1 : system_files.n;
        return at < system_files.n ? fmemopen((void *)(uintptr_t)(system_files.bytes + at), system_files.n - at, "r")
                                   : NULL;
    }
    return system_files.n ? fmemopen((void *)(uintptr_t)system_files.bytes, system_files.n, "r") : NULL;
}
