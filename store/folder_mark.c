/* Marks in folders; folder_mark.h. */
#define _GNU_SOURCE /* O_DIRECTORY */
#include "folder_mark.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"

/* -1, errno set: there is none, or no memory. */
static int open_folder_of(const char *path)
{
    char *copy = strdup(path);
    const int directory = copy ? open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    free(copy);
    return directory;
}

enum sqz_status sqz_folder_mark_make(struct sqz_folder_mark *mark, const char *path, struct sqz_error *error)
{
    uint64_t random = 0;
    int file = -1;
    *mark = (struct sqz_folder_mark){.directory = open_folder_of(path), .unfinished = -1};
    if (mark->directory >= 0 && getrandom(&random, sizeof random, 0) == (ssize_t)sizeof random) {
        snprintf(mark->name, sizeof mark->name, ".sqz-%016" PRIx64 ".tmp", random);
        mark->unfinished = sqz_unfinished_note(mark->directory, mark->name);
        file = openat(mark->directory, mark->name, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
    }
    if (file >= 0) {
        close(file);
        return SQZ_OK;
    }
    const int why = errno;
    sqz_folder_mark_remove(mark);
    return sqz_error_set(error, SQZ_ERROR_IO, "%s: nothing can be written in its folder: %s", path, strerror(why));
}

void sqz_folder_mark_remove(struct sqz_folder_mark *mark)
{
    if (mark->directory < 0) return;
    unlinkat(mark->directory, mark->name, 0);
    sqz_unfinished_drop(mark->unfinished);
    close(mark->directory);
    mark->directory = -1;
}

bool sqz_folder_mark_is_seen(const char *path, const char *name)
{
    struct stat info;
    const int directory = open_folder_of(path);
    if (directory < 0) return false;
    const bool is_seen = fstatat(directory, name, &info, AT_SYMLINK_NOFOLLOW) == 0;
    close(directory);
    return is_seen;
}
