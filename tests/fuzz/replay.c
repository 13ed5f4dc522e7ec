/* Runs a target on files, and on all files of folders, without libFuzzer: what `make check` does with any compiler. */
#include "fuzz.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

size_t LLVMFuzzerMutate(uint8_t *bytes, size_t n, size_t capacity)
{
    (void)bytes;
    (void)capacity;
    return n;
}

static void run_file(const char *path, size_t n)
{
    FILE *file = fopen(path, "rb");
    uint8_t *bytes = malloc(n ? n : 1); /* exactly as long as the file */
    if (!file || !bytes || fread(bytes, 1, n, file) != n) {
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        exit(1);
    }
    fclose(file);
    LLVMFuzzerTestOneInput(bytes, n);
    free(bytes);
}

/* Returns how many files were run. */
static size_t run_path(const char *path)
{
    struct stat status;
    size_t n = 0;
    if (stat(path, &status)) {
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        exit(1);
    }
    if (!S_ISDIR(status.st_mode)) {
        fprintf(stderr, "%s\n", path); /* the last one named is the one that failed */
        run_file(path, (size_t)status.st_size);
        return 1;
    }
    DIR *folder = opendir(path);
    for (struct dirent *entry; folder && (entry = readdir(folder));) {
        char inner[4096];
        if (entry->d_name[0] == '.') continue;
        snprintf(inner, sizeof inner, "%s/%s", path, entry->d_name);
        n += run_path(inner);
    }
    if (folder) closedir(folder);
    return n;
}

int main(int argc, char **argv)
{
    size_t n = 0;
    for (int i = 1; i < argc; i++) n += run_path(argv[i]);
    if (!n) {
        fprintf(stderr, "no input: give files or folders of them\n");
        return 2;
    }
    printf("%zu inputs\n", n);
    return 0;
}
