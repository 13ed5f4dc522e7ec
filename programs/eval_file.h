/*
 * Evaluation files: JSON lines as L-Eval has them, one document a line with
 * `input` (the document), `instructions` (questions) and `outputs` (reference
 * answers). Everything in them is checked; messages name file and line.
 */
#ifndef SQZ_PROGRAMS_EVAL_FILE_H
#define SQZ_PROGRAMS_EVAL_FILE_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "text_buffer.h"

struct eval_file {
    FILE *file;
    const char *path;
    size_t line;              /* of the last document read, the first is 1 */
    struct text_buffer buffer;
};

struct eval_document {
    json_t *root;             /* owns the strings */
    const char *text;
    size_t text_bytes, n_questions;
    json_t *questions, *answers; /* arrays of strings, n_questions each */
};

/* Each dies when the file cannot be read or is not what it should be. */
void eval_open(struct eval_file *file, const char *path);
bool eval_next(struct eval_file *file, struct eval_document *document); /* false at the end */
void eval_release(struct eval_document *document);
void eval_close(struct eval_file *file);

#endif
