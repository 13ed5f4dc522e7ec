/* The folder that a target writes into; out_folder.h describes it. */
#define _GNU_SOURCE /* mkdtemp, utimensat */
#include "out_folder.h"
#include "fuzz.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int descriptor = -1;
static mode_t kept_mode; /* that "old" must have; 0: it need not be there */

static const char *const names[] = {"old",
                                    "link",
                                    "broken",
                                    "loop",
                                    "to-folder",
                                    "folder",
                                    "pipe",
                                    "new",
                                    "model-00001-of-00002.gguf",
                                    "model-00002-of-00002.gguf",
                                    ".sqz-0123456789abcdef.tmp"};
enum { N_NAMES = sizeof names / sizeof *names };

static void clear(void)
{
    for (size_t i = 0; i < N_NAMES; i++) unlinkat(descriptor, names[i], strcmp(names[i], "folder") ? 0 : AT_REMOVEDIR);
}

static void remove_folder(void)
{
    clear();
    rmdir(out_folder());
}

const char *out_folder(void)
{
    static char path[64];
    if (path[0]) return path;
    snprintf(path, sizeof path, "%s/squeeze-fuzz-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
    if (!mkdtemp(path) || (descriptor = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0)
        fuzz_fail("a target has a folder", path);
    atexit(remove_folder);
    return path;
}

void out_folder_fill(void)
{
    out_folder();
    const struct timespec long_ago[2] = {{.tv_sec = 1}, {.tv_sec = 1}};
    const int file = openat(descriptor, "old", O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    const int left = openat(descriptor, names[N_NAMES - 1], O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    if (file < 0 || left < 0 || close(file) || close(left) || symlinkat("old", descriptor, "link") ||
        symlinkat("nowhere", descriptor, "broken") || symlinkat("loop", descriptor, "loop") ||
        symlinkat("folder/", descriptor, "to-folder") || mkdirat(descriptor, "folder", 0700) ||
        mkfifoat(descriptor, "pipe", 0600) || utimensat(descriptor, names[N_NAMES - 1], long_ago, 0))
        fuzz_fail("a target can write", out_folder());
    kept_mode = 0600;
}

void out_folder_disturb(unsigned how)
{
    if (how % 4 == 0) {
        const int file = openat(descriptor, "new", O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
        if (file >= 0) close(file);
    } else if (how % 4 == 1) {
        (void)!symlinkat("old", descriptor, "new");
    } else if (how % 4 == 2) {
        if (kept_mode && !fchmodat(descriptor, "old", 0640, 0)) kept_mode = 0640;
    } else {
        unlinkat(descriptor, "old", 0);
        kept_mode = 0;
    }
}

/* Names that are none of ours: what a writer left behind. */
static size_t count_others(void)
{
    size_t n = 0;
    DIR *stream = opendir(out_folder());
    for (struct dirent *entry; stream && (entry = readdir(stream));) {
        bool ours = !strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..");
        for (size_t i = 0; i < N_NAMES; i++) ours |= !strcmp(entry->d_name, names[i]);
        n += !ours;
    }
    if (stream) closedir(stream);
    return n;
}

void out_folder_check(enum sqz_status status, const char *path, const char *message)
{
    struct sqz_context *context = NULL;
    struct sqz_error error;
    struct stat there;
    const bool exists = !stat(path, &there) && S_ISREG(there.st_mode);
    const bool opens = exists && there.st_size && !sqz_context_open(&context, path, NULL, &error);
    sqz_context_free(context);
    if (!status && !opens) fuzz_fail("what was written can be opened", path);
    if (status && exists && there.st_size && !opens) fuzz_fail("a failure leaves no half file", message);
    if (kept_mode && (fstatat(descriptor, "old", &there, 0) || (there.st_mode & 0777) != kept_mode))
        fuzz_fail("an old file keeps its place and its mode", message);
    kept_mode = 0;
    if (count_others()) fuzz_fail("nothing else stays in the folder", message);
    clear();
}
