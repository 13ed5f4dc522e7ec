/* Where a file will stand; output_place.h describes it. */
#define _GNU_SOURCE /* O_PATH, flock */
#include "output_place.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MOST_LINKS = 16, STALE_SECONDS = 60 };

/* ---- Finding it --------------------------------------------------------------------- */

/* Opens the directory part of a path that begins at an open directory, and keeps the rest. `from` is closed. */
static enum sqz_status step_to(struct sqz_output_place *place, int from, const char *path,
                               const struct sqz_report *report)
{
    const char *slash = strrchr(path, '/');
    const size_t bytes = slash ? (size_t)(slash - path) + 1 : 0;
    char *folder = bytes ? strndup(path, bytes) : strdup(".");
    char *base = strdup(path + bytes);
    int reason = ENOMEM;
    free(place->base);
    place->base = base;
    place->directory = folder && base ? openat(from, folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (folder && base) reason = errno;
    free(folder);
    if (from >= 0) close(from);
    if (place->directory < 0)
        return sqz_report_as(report, reason == ENOMEM ? SQZ_ERROR_MEMORY : SQZ_ERROR_IO,
                             "its directory cannot be opened: %s", strerror(reason));
    return SQZ_OK;
}

/* As the kernel does where fs.protected_symlinks is set: in a directory that everybody may write to, like /tmp, the link
 * of another user is not followed. */
static bool may_follow(int directory, const struct stat *link)
{
    struct stat around;
    if (fstat(directory, &around)) return false;
    return !((around.st_mode & S_ISVTX) && (around.st_mode & S_IWOTH)) || link->st_uid == geteuid() ||
           link->st_uid == around.st_uid;
}

/* Steps to what the symbolic link of the place leads to. */
static enum sqz_status follow(struct sqz_output_place *place, const struct stat *link, const struct sqz_report *report)
{
    char target[PATH_MAX];
    if (!may_follow(place->directory, link))
        return sqz_report_as(report, SQZ_ERROR_IO,
                             "is another user's symbolic link in a directory that everybody may "
                             "write to; it will not be followed");
    const ssize_t n = readlinkat(place->directory, place->base, target, sizeof target - 1);
    if (n < 0) return sqz_report_as(report, SQZ_ERROR_IO, "a symbolic link that cannot be read: %s", strerror(errno));
    target[n] = '\0';
    const int from = place->directory;
    place->directory = -1;
    if (step_to(place, from, target, report))
        return sqz_report_as(report, SQZ_ERROR_IO, "a symbolic link that leads nowhere: to %s", target);
    return SQZ_OK;
}

static enum sqz_status check_old_file(struct sqz_output_place *place, const struct stat *old,
                                      const struct sqz_report *report)
{
    if (S_ISDIR(old->st_mode))
        return sqz_report_as(report, SQZ_ERROR_IO, "is a directory; allowed: the name of a file");
    if (!S_ISREG(old->st_mode))
        return sqz_report_as(report, SQZ_ERROR_IO,
                             "is not a regular file (a device, pipe or socket); it will not be "
                             "replaced");
    if (faccessat(place->directory, place->base, W_OK, 0))
        return sqz_report_as(report, SQZ_ERROR_IO, "the file there may not be replaced: %s", strerror(errno));
    place->replaces = true;
    place->mode = old->st_mode & 0777;
    place->owner = old->st_uid;
    place->group = old->st_gid;
    return SQZ_OK;
}

static enum sqz_status check_name(const char *path, const struct sqz_report *report)
{
    struct stat found;
    if (!*path) return sqz_report_as(report, SQZ_ERROR_ARGUMENT, "an empty path; allowed: the name of a file");
    if (path[strlen(path) - 1] != '/') return SQZ_OK;
    return sqz_report_as(report, SQZ_ERROR_IO, "%s; allowed: the name of a file",
                         stat(path, &found) ? "the name of a directory" : "is a directory");
}

enum sqz_status sqz_output_place_find(struct sqz_output_place *place, const char *path, const struct sqz_report *report)
{
    struct stat found;
    enum sqz_status status;
    *place = (struct sqz_output_place){.directory = -1};
    if ((status = check_name(path, report)) || (status = step_to(place, AT_FDCWD, path, report))) return status;
    for (int links = 0; links <= MOST_LINKS; links++) {
        if (!*place->base) /* a link to a directory's name */
            return sqz_report_as(report, SQZ_ERROR_IO, "is a directory; allowed: the name of a file");
        if (fstatat(place->directory, place->base, &found, AT_SYMLINK_NOFOLLOW)) {
            if (errno != ENOENT) return sqz_report_as(report, SQZ_ERROR_IO, "cannot write here: %s", strerror(errno));
            if (links)
                return sqz_report_as(report, SQZ_ERROR_IO, "a symbolic link that leads nowhere: to %s", place->base);
            return SQZ_OK;
        }
        if (!S_ISLNK(found.st_mode)) return check_old_file(place, &found, report);
        if ((status = follow(place, &found, report))) return status;
    }
    return sqz_report_as(report, SQZ_ERROR_IO, "a symbolic link to more than %d others", MOST_LINKS);
}

void sqz_output_place_close(struct sqz_output_place *place)
{
    if (place->directory >= 0) close(place->directory);
    free(place->base);
    *place = (struct sqz_output_place){.directory = -1};
}

/* ---- Filling it ------------------------------------------------------------------------ */

enum sqz_status sqz_output_place_dress(const struct sqz_output_place *place, int file, const struct sqz_report *report)
{
    struct stat own;
    mode_t mode = place->mode;
    if (!place->replaces) return SQZ_OK;
    if (fstat(file, &own)) return sqz_report_as(report, SQZ_ERROR_IO, "cannot be looked at: %s", strerror(errno));
    /* Another's file in a directory of ours becomes ours; its group's rights are nobody else's. */
    if ((own.st_uid != place->owner || own.st_gid != place->group) && fchown(file, place->owner, place->group) &&
        own.st_gid != place->group && fchown(file, (uid_t)-1, place->group))
        mode &= ~(mode_t)070;
    /* A file that others could not read stays so. */
    if (fchmod(file, mode))
        return sqz_report_as(report, SQZ_ERROR_IO, "cannot set the permissions of the old file: %s", strerror(errno));
    return SQZ_OK;
}

enum sqz_status sqz_output_place_fill(struct sqz_output_place *place, const char *temporary, int file,
                                      const struct sqz_report *report)
{
    struct stat now;
    enum sqz_status status = SQZ_OK;
    if (fstatat(place->directory, place->base, &now, AT_SYMLINK_NOFOLLOW)) {
        if (errno != ENOENT)
            return sqz_report_as(report, SQZ_ERROR_IO, "cannot be looked at any more: %s", strerror(errno));
    } else if (!S_ISREG(now.st_mode)) {
        return sqz_report_as(report, SQZ_ERROR_IO, "became %s while it was prepared; it will not be replaced",
                             S_ISLNK(now.st_mode) ? "a symbolic link" : "something else than a file");
    } else if (!place->replaces || place->mode != (now.st_mode & 0777) || place->owner != now.st_uid ||
               place->group != now.st_gid) {
        place->replaces = true;
        place->mode = now.st_mode & 0777;
        place->owner = now.st_uid;
        place->group = now.st_gid;
        status = sqz_output_place_dress(place, file, report);
    }
    if (!status && renameat(place->directory, temporary, place->directory, place->base))
        status = sqz_report_as(report, SQZ_ERROR_IO, "the finished file cannot be put in place: %s", strerror(errno));
    return status;
}

/* ---- Clearing up after the killed --------------------------------------------------------- */

/* .sqz- and 16 hex digits and .tmp */
static bool is_temporary(const char *name)
{
    return strlen(name) == 25 && !memcmp(name, ".sqz-", 5) && strspn(name + 5, "0123456789abcdef") == 16 &&
           !strcmp(name + 21, ".tmp");
}

static void remove_if_stale(int directory, const char *name)
{
    struct stat found;
    const int file = openat(directory, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (file < 0) return;
    if (!fstat(file, &found) && S_ISREG(found.st_mode) && found.st_uid == geteuid() &&
        time(NULL) - found.st_mtime > STALE_SECONDS && !flock(file, LOCK_EX | LOCK_NB))
        unlinkat(directory, name, 0);
    close(file);
}

void sqz_output_place_clear(const struct sqz_output_place *place)
{
    const int again = openat(place->directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *names = again >= 0 ? fdopendir(again) : NULL;
    if (!names) {
        if (again >= 0) close(again);
        return;
    }
    for (struct dirent *entry; (entry = readdir(names));)
        if (is_temporary(entry->d_name)) remove_if_stale(place->directory, entry->d_name);
    closedir(names);
}
