/* Places that are written to; outputs.h describes what is checked. */
#define _GNU_SOURCE /* mkstemp, memmem */
#include "outputs.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common.h"
#include "plot.h"
#include "text_buffer.h"

/* The beginning of a file that tells its kind. */
enum { HEAD_BYTES = 4096 };

static const char *const kind_names[] = {"a context file", "a picture (SVG or PNG)", "a file of eval's records"};

/* ---- What is there ------------------------------------------------------------------ */

static bool begins_with(const char *head, size_t n, const char *text)
{
    return n >= strlen(text) && memcmp(head, text, strlen(text)) == 0;
}

static bool is_picture(const char *head, size_t n)
{
    const bool xml = begins_with(head, n, "<?xml") || begins_with(head, n, "<svg");
    return begins_with(head, n, "\x89PNG\r\n\x1a\n") || (xml && memmem(head, n, "<svg", 4));
}

/* The first line of a run that was cut off may be short. */
static bool is_records(const char *head, size_t n)
{
    const char *start = RECORD_START;
    size_t at = 0, digits = 0;
    while (at < n && head[at] == '\n') at++;
    for (; *start && at < n; start++, at++)
        if (head[at] != *start) return false;
    while (at + digits < n && digits < 32 && isxdigit((unsigned char)head[at + digits])) digits++;
    return at + digits == n || (digits == 32 && head[at + digits] == '"');
}

static bool is_of_kind(enum output_kind kind, const char *head, size_t n)
{
    static const char context[] = "squeeze-context"; /* its architecture, docs/format.md */
    switch (kind) {
    case OUTPUT_CONTEXT: return begins_with(head, n, "GGUF") && memmem(head, n, context, sizeof context - 1);
    case OUTPUT_PICTURE: return is_picture(head, n);
    case OUTPUT_RECORDS: return is_records(head, n);
    case OUTPUT_NUMBERS:
    case OUTPUT_FOLDER: break;
    }
    return false;
}

static void check_content(const struct output *output)
{
    char head[HEAD_BYTES];
    FILE *file = fopen(output->path, "rb");
    if (!file) {
        die("%s %s: what is there cannot be read, so it will not be replaced: %s", output->option, output->path,
            strerror(errno));
    }
    const size_t n = fread(head, 1, sizeof head, file);
    fclose(file);
    if (n > 0 && output->kind == OUTPUT_NUMBERS) {
        usage_error("%s %s: a file is there and will not be replaced; choose another name, or remove it first",
                    output->option, output->path);
    }
    if (n > 0 && !is_of_kind(output->kind, head, n)) {
        usage_error("%s %s: the file there is not %s and will not be replaced; choose another name, or remove it first",
                    output->option, output->path, kind_names[output->kind]);
    }
}

/* ---- Whether it can be written ------------------------------------------------------ */

/* The folder that a path is in; malloc'ed. */
static char *folder_of(const char *path)
{
    struct text_buffer folder = {0};
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') /* of a folder's own name */
        n--;
    while (n > 0 && path[n - 1] != '/') n--;
    text_buffer_append(&folder, n ? path : ".", n ? n : 1);
    return folder.text;
}

/* Makes a file beside the output as the work will, and removes it. */
static void try_file(const struct output *output, const char *folder)
{
    struct text_buffer name = {0};
    const bool beside = output->kind == OUTPUT_PICTURE; /* plot.c writes there */
    text_buffer_append(&name, beside ? output->path : folder, strlen(beside ? output->path : folder));
    text_buffer_print(&name, beside ? ".XXXXXX" : "/.squeeze-XXXXXX");
    const int file = mkstemp(name.text);
    if (file < 0) die("%s %s: no file can be made in its folder: %s", output->option, output->path, strerror(errno));
    close(file);
    unlink(name.text);
    text_buffer_free(&name);
}

static void check_folder(const struct output *output, const char *folder)
{
    struct stat status;
    struct text_buffer quoted = {0};
    text_buffer_quote(&quoted, folder);
    if (stat(folder, &status) != 0 && errno == ENOENT)
        die("%s %s: its folder is not there; make it first: mkdir -p %s", output->option, output->path, quoted.text);
    text_buffer_free(&quoted);
    if (stat(folder, &status) != 0 || access(folder, W_OK | X_OK) != 0)
        die("%s %s: nothing can be written into its folder: %s", output->option, output->path, strerror(errno));
    if (!S_ISDIR(status.st_mode)) die("%s %s: '%s' is no folder", output->option, output->path, folder);
    try_file(output, folder);
}

static void check_new(const struct output *output)
{
    const size_t n = strlen(output->path);
    if (output->kind != OUTPUT_FOLDER && output->path[n - 1] == '/')
        usage_error("%s %s: the name of a folder; allowed: the name of a file", output->option, output->path);
    char *folder = folder_of(output->path);
    check_folder(output, folder);
    free(folder);
}

static void check_there(const struct output *output, const struct stat *status)
{
    if (output->kind == OUTPUT_FOLDER) {
        if (!S_ISDIR(status->st_mode))
            usage_error("%s %s: there is a file of that name; allowed: a folder", output->option, output->path);
        check_folder(output, output->path);
        return;
    }
    if (S_ISDIR(status->st_mode))
        usage_error("%s %s: is a folder; allowed: the name of a file", output->option, output->path);
    if (!S_ISREG(status->st_mode)) {
        usage_error("%s %s: is not a regular file (a device, pipe or socket) and will not be replaced", output->option,
                    output->path);
    }
    check_content(output);
    if (access(output->path, W_OK) != 0)
        die("%s %s: the file there may not be written: %s", output->option, output->path, strerror(errno));
    check_new(output);
}

/* ---- Files that are one ------------------------------------------------------------- */

static bool is_same(const struct stat *a, const struct stat *b)
{
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

static bool look_at(const char *path, struct stat *status)
{
    return path && (strcmp(path, "-") == 0 ? fstat(STDIN_FILENO, status) : stat(path, status)) == 0;
}

static void check_inputs(const char *option, const char *path, const struct stat *status, const char *const *inputs,
                         size_t n_inputs)
{
    struct stat input;
    for (size_t i = 0; i < n_inputs; i++) {
        if (look_at(inputs[i], &input) && S_ISREG(input.st_mode) && is_same(status, &input)) {
            usage_error("%s %s is %s, which is read; choose another output", option, path,
                        strcmp(inputs[i], "-") == 0 ? "standard input" : inputs[i]);
        }
    }
}

/* A result sent into a file by the shell may be one that is read, or another output. */
static void check_standard_output(const struct output *outputs, const char *const *inputs, size_t n_inputs)
{
    struct stat status, other;
    if (fstat(STDOUT_FILENO, &status) != 0 || !S_ISREG(status.st_mode)) return;
    check_inputs("standard", "output", &status, inputs, n_inputs);
    for (; outputs->option; outputs++)
        if (outputs->path && stat(outputs->path, &other) == 0 && is_same(&status, &other))
            usage_error("%s %s is standard output, too; choose another name", outputs->option, outputs->path);
}

/* Two outputs of one name, also of a name that is still free. */
static void check_others(const struct output *outputs, const struct output *output, const struct stat *status)
{
    struct stat other;
    for (const struct output *o = outputs; o < output; o++) {
        const bool same = o->path && (strcmp(o->path, output->path) == 0 ||
                                      (status && stat(o->path, &other) == 0 && is_same(status, &other)));
        if (same) {
            usage_error("%s and %s both write %s; choose another name for one", o->option, output->option,
                        output->path);
        }
    }
}

void outputs_check(const struct output *outputs, const char *const *inputs, size_t n_inputs)
{
    struct stat link, status;
    for (const struct output *output = outputs; output->option; output++) {
        if (!output->path) continue;
        const bool there = stat(output->path, &status) == 0;
        const int reason = errno;
        if (there) check_inputs(output->option, output->path, &status, inputs, n_inputs);
        check_others(outputs, output, there ? &status : NULL);
        if (there) check_there(output, &status);
        else if (lstat(output->path, &link) == 0)
            die("%s %s: a symbolic link that leads nowhere: %s", output->option, output->path, strerror(reason));
        else if (reason != ENOENT) die("%s %s: %s", output->option, output->path, strerror(reason));
        else check_new(output);
    }
    check_standard_output(outputs, inputs, n_inputs);
    for (const struct output *output = outputs; output->option; output++) {
        if (output->path && output->kind == OUTPUT_PICTURE && !plot_has_gnuplot()) {
            die("%s: gnuplot is not there; install it (gnuplot-nox on Debian) or leave out %s", output->option,
                output->option);
        }
    }
}
