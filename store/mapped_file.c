/* A mapped file and whether it is still as it was; mapped_file.h describes it. */
#define _GNU_SOURCE /* SEEK_HOLE, st_mtim */
#include "mapped_file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static enum sqz_status check_kind(const struct stat *found, const struct sqz_report *report)
{
    if (!S_ISREG(found->st_mode))
        return sqz_report_as(report, SQZ_ERROR_IO, "is %s; allowed: a regular file",
                             S_ISDIR(found->st_mode) ? "a directory" : "a device, pipe or socket");
    if (found->st_size == 0) return sqz_report_fail(report, "is empty; a context file begins with 'GGUF'");
    return SQZ_OK;
}

enum sqz_status sqz_file_open(struct sqz_mapped_file *file, const char *path, const struct sqz_report *report)
{
    struct stat found;
    enum sqz_status status;
    memset(file, 0, sizeof *file);
    /* Without O_NONBLOCK a pipe of that name would wait for a writer for ever. */
    file->descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (file->descriptor < 0) return sqz_report_as(report, SQZ_ERROR_IO, "cannot be opened: %s", strerror(errno));
    if (fstat(file->descriptor, &found))
        return sqz_report_as(report, SQZ_ERROR_IO, "cannot be looked at: %s", strerror(errno));
    if ((status = check_kind(&found, report))) return status;
    file->path = strdup(path);
    if (!file->path) return sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory for a name");
    file->bytes = (size_t)found.st_size;
    file->written = found.st_mtim;
    void *map = mmap(NULL, file->bytes, PROT_READ, MAP_SHARED, file->descriptor, 0);
    if (map == MAP_FAILED)
        return sqz_report_as(report, errno == ENOMEM ? SQZ_ERROR_MEMORY : SQZ_ERROR_IO, "cannot be mapped: %s",
                             strerror(errno));
    file->map = map;
    file->watched = sqz_watch_begin(map, file->bytes);
    return file->watched ? SQZ_OK : sqz_report_as(report, SQZ_ERROR_MEMORY, "no memory to watch it");
}

void sqz_file_close(struct sqz_mapped_file *file)
{
    sqz_watch_end(file->watched);
    if (file->map) munmap((void *)(uintptr_t)file->map, file->bytes);
    if (file->descriptor >= 0) close(file->descriptor);
    free(file->path);
    file->map = NULL;
    file->watched = NULL;
    file->descriptor = -1;
    file->path = NULL;
}

enum sqz_status sqz_file_read(const struct sqz_mapped_file *file, void *to, size_t bytes, uint64_t at,
                              const struct sqz_report *report)
{
    char *next = to;
    while (bytes) {
        const ssize_t n = pread(file->descriptor, next, bytes, (off_t)at);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0)
            return sqz_report_as(report, SQZ_ERROR_IO, "cannot be read at byte %" PRIu64 ": %s", at, strerror(errno));
        if (n == 0)
            return sqz_report_as(report, SQZ_ERROR_IO,
                                 "became shorter while it was opened: byte %" PRIu64 " of %zu is gone", at,
                                 file->bytes);
        next += n;
        bytes -= (size_t)n;
        at += (uint64_t)n;
    }
    return SQZ_OK;
}

void sqz_file_will_read(const void *begin, size_t bytes)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)begin / page * page;
    posix_madvise((void *)first, (uintptr_t)begin + bytes - first, POSIX_MADV_WILLNEED);
}

enum { MOST_HOLE_BYTES = 16 << 20 }; /* a few milliseconds of reading: never worth a complaint */

/* By holes, not by the space that is taken: file systems that compress take little for honest files. What tells no holes
 * apart says that all is data. */
enum sqz_status sqz_file_check_holes(const struct sqz_mapped_file *file, const struct sqz_report *report)
{
    const off_t end = (off_t)file->bytes;
    uint64_t holes = 0;
    for (off_t at = 0; at < end && file->bytes > MOST_HOLE_BYTES;) {
        const off_t hole = lseek(file->descriptor, at, SEEK_HOLE);
        if (hole < 0 || hole >= end) break;
        at = lseek(file->descriptor, hole, SEEK_DATA);
        if (at < 0) /* ENXIO: a hole up to the end */
            at = end;
        holes += (uint64_t)(at - hole);
        if (holes > MOST_HOLE_BYTES && holes > file->bytes / 2)
            return sqz_report_fail(report, "is a sparse file: more than half of its %zu bytes were never written",
                                   file->bytes);
    }
    return SQZ_OK;
}

/* Not the time of the inode's last change: a file that is renamed, or whose name another takes, gets a new one. */
enum sqz_status sqz_file_check_unchanged(const struct sqz_mapped_file *file, struct sqz_error *error)
{
    const struct sqz_report report = {file->path, SQZ_ERROR_IO, "open it again", error};
    struct stat now;
    if (fstat(file->descriptor, &now))
        return sqz_report_fail(&report, "the context file cannot be looked at any more: %s", strerror(errno));
    if ((uint64_t)now.st_size != file->bytes)
        return sqz_report_fail(&report,
                               "the context file changed while it was open: it had %zu bytes and has %" PRIu64 " now",
                               file->bytes, (uint64_t)now.st_size);
    if (sqz_watch_is_lost(file->watched))
        return sqz_report_fail(&report, "a part of the context file could not be read: it was cut off meanwhile, or "
                                        "its disk fails");
    if (now.st_mtim.tv_sec != file->written.tv_sec || now.st_mtim.tv_nsec != file->written.tv_nsec)
        return sqz_report_fail(&report, "the context file changed while it was open: it was written to");
    return SQZ_OK;
}
