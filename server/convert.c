/* Text of documents; convert.h describes it. */
#define _GNU_SOURCE /* memmem */
#include "convert.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "child.h"
#include "file_kind.h"

/* Far above what documents take, far below what hurts. */
enum { MOST_SECONDS = 120, MOST_GIBIBYTES = 2 };

struct document_kind {
    const char *kind; /* of sqz_file_kind() */
    const char *name, *program, *package;
    const char *arguments[8];
};

#define PANDOC(from)                                                                                                   \
    "pandoc", "pandoc",                                                                                                \
    {                                                                                                                  \
        "--sandbox", "--from", from, "--to", "plain", "--wrap", "none"                                                 \
    }
/* In --sandbox pandoc opens nothing but its input. Frames of HTML it would fetch all the same if it could: kept as they
 * are, they are not. */
static const struct document_kind kinds[] = {
    {"a PDF file", "PDF", "pdftotext", "poppler-utils", {"-q", "-enc", "UTF-8", "-", "-"}},
    {"a Word document (docx)", "Word", PANDOC("docx")},
    {"an OpenDocument file", "OpenDocument", PANDOC("odt")},
    {"an EPUB book", "EPUB", PANDOC("epub")},
    {"", "HTML", PANDOC("html+raw_html")},
};
enum { N_KINDS = sizeof kinds / sizeof *kinds, HTML = N_KINDS - 1 };

/* ---- What it is --------------------------------------------------------------------------- */

static size_t skip_to(const char *data, size_t n, const char *end)
{
    const char *found = memmem(data, n, end, strlen(end));
    return found ? (size_t)(found - data) + strlen(end) : n;
}

/* Bytes before the first element: a byte order mark, blanks, comments, <?xml ...?>. */
static size_t skip_prologue(const char *data, size_t n)
{
    size_t at = n >= 3 && memcmp(data, "\xef\xbb\xbf", 3) == 0 ? 3 : 0;
    while (at < n)
        if (strchr(" \t\r\n", data[at]) && data[at]) at++;
        else if (n - at > 4 && memcmp(data + at, "<!--", 4) == 0) at += skip_to(data + at, n - at, "-->");
        else if (n - at > 5 && memcmp(data + at, "<?xml", 5) == 0) at += skip_to(data + at, n - at, "?>");
        else break;
    return at;
}

static bool is_html(const char *data, size_t n)
{
    static const char *const beginnings[] = {"<!doctype html", "<html"};
    const size_t at = skip_prologue(data, n);
    for (size_t i = 0; i < 2; i++) {
        const size_t length = strlen(beginnings[i]);
        if (n - at > length && strncasecmp(data + at, beginnings[i], length) == 0 &&
            strchr("> \t\r\n", data[at + length]))
            return true;
    }
    return false;
}

const struct document_kind *document_kind(const char *data, size_t n)
{
    const struct sqz_file_kind *file = sqz_file_kind(data, n, false);
    for (size_t i = 0; file && i < HTML; i++)
        if (strcmp(file->name, kinds[i].kind) == 0) return &kinds[i];
    return !file && is_html(data, n) ? &kinds[HTML] : NULL;
}

/* ---- Its text ------------------------------------------------------------------------------- */

/* The program's path, by $PATH; false: it is not installed. */
static bool find_program(char path[512], const char *name)
{
    const char *folders = getenv("PATH");
    for (folders = folders ? folders : "/usr/bin:/bin"; *folders;) {
        const size_t n = strcspn(folders, ":");
        if (*folders == '/' && snprintf(path, 512, "%.*s/%s", (int)n, folders, name) < 512 && access(path, X_OK) == 0)
            return true;
        folders += n + (folders[n] == ':');
    }
    return false;
}

static bool missing(const struct document_kind *kind, struct fault *fault)
{
    return fault_set(
        fault, 501, "converter_missing", NULL,
        "%s documents are read by %s, which is not installed here (the package %s); text is taken as it is", kind->name,
        kind->program, kind->package);
}

bool convert_can(const struct document_kind *kind, struct fault *fault)
{
    char path[512];
    return find_program(path, kind->program) || missing(kind, fault);
}

static bool explain(const struct document_kind *kind, enum child_end end, int code, struct fault *fault)
{
    const char *name = kind->name, *program = kind->program;
    switch (end) {
    case CHILD_DONE: return true;
    case CHILD_STOPPED: return false;
    case CHILD_LATE:
        return fault_set(fault, 400, "document_unreadable", NULL,
                         "%s took longer than %d seconds over this %s document", program, (int)MOST_SECONDS, name);
    case CHILD_LARGE:
        return fault_set(fault, 400, "document_unreadable", NULL, "the text of this %s document is too large", name);
    case CHILD_KILLED:
        return fault_set(fault, 400, "document_unreadable", NULL,
                         "%s did not get through this %s document (memory: %d GiB)", program, name,
                         (int)MOST_GIBIBYTES);
    case CHILD_FAILED:
        if (code == 6) /* an option that it does not know */
            return fault_set(fault, 501, "converter_missing", NULL, "the %s that is installed here is too old",
                             program);
        return fault_set(fault, 400, "document_unreadable", NULL, "%s cannot read this %s document (exit code %d)",
                         program, name, code);
    default: return fault_set(fault, 503, "out_of_memory", NULL, "%s could not be started", program);
    }
}

bool convert_run(const struct document_kind *kind, const char *data, size_t n, size_t most_bytes,
                 bool (*go_on)(void *data), void *user_data, struct bytes *text, struct fault *fault)
{
    const struct child_limits limits = {
        .memory_bytes = (size_t)MOST_GIBIBYTES << 30, .output_bytes = most_bytes, .seconds = MOST_SECONDS};
    char path[512];
    const char *arguments[10] = {path};
    int code;
    if (!find_program(path, kind->program)) return missing(kind, fault);
    for (size_t i = 0; i < 8 && kind->arguments[i]; i++) arguments[i + 1] = kind->arguments[i];
    const enum child_end end = child_run(arguments, data, n, &limits, go_on, user_data, text, &code);
    return explain(kind, end, code, fault);
}
