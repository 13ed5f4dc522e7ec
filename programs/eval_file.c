/* JSON lines with documents, questions and answers; eval_file.h describes them. */
#include "eval_file.h"

#include <errno.h>
#include <string.h>

#include "common.h"

/* Documents of the longest evaluations have a few megabytes. */
static const size_t longest_line_bytes = (size_t)256 << 20;

void eval_open(struct eval_file *file, const char *path)
{
    memset(file, 0, sizeof *file);
    file->path = path;
    file->file = fopen(path, "rb");
    if (!file->file) {
        die("%s: %s", path, strerror(errno));
    }
}

/* Fills file->buffer with the next line; false at the end. */
static bool read_line(struct eval_file *file)
{
    char piece[1 << 14];
    bool any = false;
    file->buffer.n_bytes = 0;
    file->line++;
    for (;;) {
        size_t n = 0;
        int c = EOF;
        while (n < sizeof piece && (c = getc(file->file)) != EOF && c != '\n') {
            piece[n++] = (char)c;
        }
        any = any || n > 0 || c == '\n';
        text_buffer_append(&file->buffer, piece, n);
        if (file->buffer.n_bytes > longest_line_bytes) {
            die("%s:%zu: a line of more than %zu MiB", file->path, file->line, longest_line_bytes >> 20);
        }
        if (ferror(file->file)) {
            die("%s: %s", file->path, strerror(errno));
        }
        if (c == EOF && n < sizeof piece) {
            return any;
        }
        if (c == '\n') {
            return true;
        }
    }
}

/* An array of strings that are not empty. */
static json_t *texts(const struct eval_file *file, const json_t *root, const char *name)
{
    json_t *array = json_object_get(root, name);
    if (!json_is_array(array) || json_array_size(array) == 0) {
        die("%s:%zu: \"%s\" must be a list of texts", file->path, file->line, name);
    }
    for (size_t i = 0; i < json_array_size(array); i++) {
        const json_t *text = json_array_get(array, i);
        if (!json_is_string(text) || json_string_length(text) == 0) {
            die("%s:%zu: \"%s\", entry %zu: must be a text that is not empty", file->path, file->line, name, i + 1);
        }
    }
    return array;
}

static void parse_document(const struct eval_file *file, struct eval_document *document)
{
    json_error_t error;
    document->root = json_loadb(file->buffer.text, file->buffer.n_bytes, 0, &error);
    if (!document->root) {
        die("%s:%zu: column %d: %s", file->path, file->line, error.column, error.text);
    }
    const json_t *input = json_object_get(document->root, "input");
    if (!json_is_string(input) || json_string_length(input) == 0) {
        die("%s:%zu: \"input\" must be a text that is not empty", file->path, file->line);
    }
    document->text = json_string_value(input);
    document->text_bytes = json_string_length(input);
    document->questions = texts(file, document->root, "instructions");
    document->answers = texts(file, document->root, "outputs");
    document->n_questions = json_array_size(document->questions);
    if (json_array_size(document->answers) != document->n_questions) {
        die("%s:%zu: %zu \"instructions\" but %zu \"outputs\"; there must be one answer a question", file->path,
            file->line, document->n_questions, json_array_size(document->answers));
    }
}

bool eval_next(struct eval_file *file, struct eval_document *document)
{
    memset(document, 0, sizeof *document);
    while (read_line(file)) {
        if (file->buffer.text[strspn(file->buffer.text, " \t\r")] != '\0') {
            parse_document(file, document);
            return true;
        }
    }
    return false;
}

void eval_release(struct eval_document *document)
{
    json_decref(document->root);
    memset(document, 0, sizeof *document);
}

void eval_close(struct eval_file *file)
{
    fclose(file->file);
    text_buffer_free(&file->buffer);
}
