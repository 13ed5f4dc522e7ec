/*
 * Evaluation files: JSON lines, one document with its questions a line, in any
 * of these forms, told apart by their members:
 *
 *   L-Eval     input (the document), instructions (questions), outputs (a reference answer each), evaluation
 *              ("exam", "f1", "rouge")
 *   LongBench  context (the document), input (the question), answers (references), dataset, all_classes
 *   RULER      input (document and question, the question its last paragraph), outputs (texts that must occur), and an
 *              index in place of instructions
 *   plain      document, questions, answers: per question a text or a list of texts; optionally score, one of
 *              score_names, and max_tokens
 *
 * Everything in them is checked; messages name file and line. LongBench's own prompts are its file of prompts by
 * dataset, a JSON object of texts with {context} and {input}: what stands before and up to the context is the document,
 * the rest the question.
 */
#ifndef SQZ_PROGRAMS_EVAL_FILE_H
#define SQZ_PROGRAMS_EVAL_FILE_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "scores.h"
#include "text_buffer.h"

struct eval_file {
    FILE *file;
    const char *path;
    size_t line;              /* of the last document read, the first is 1 */
    struct text_buffer buffer;
    json_t *prompts;          /* by dataset; NULL: none */
};

struct eval_question {
    const char *text;
    const char **references;  /* one at least */
    size_t n_references;
    const char **classes;
    size_t n_classes;
    enum score_kind score;
    bool first_line;          /* the reply is judged by its first line */
    size_t max_tokens;        /* of the reply */
};

struct eval_document {
    json_t *root;             /* owns most of the texts */
    char *owned[2];           /* and the others, malloc'ed */
    const char *path;         /* of its file; NULL: it was made */
    size_t line;
    char task[64];            /* the dataset's name, else the file's without folder and ending */
    const char *text;
    size_t text_bytes, n_questions;
    struct eval_question *questions; /* malloc'ed, its arrays too */
};

/* prompts: path of LongBench's prompts, or NULL. Each dies when the file cannot be read or is not what it should be. */
void eval_open(struct eval_file *file, const char *path, const char *prompts);
bool eval_next(struct eval_file *file, struct eval_document *document); /* false at the end */
void eval_release(struct eval_document *document);
void eval_close(struct eval_file *file);

#endif
