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
 * Everything in them is checked, and every text passes the intake (engine/intake.h). A mark at a file's start, CR LF,
 * and the NaN and Infinity that Python writes are read over. LongBench's own prompts are its file of prompts by
 * dataset, a JSON object of texts with {context} and {input}: what stands before and up to the context is the document,
 * the rest the question.
 */
#ifndef SQZ_RESEARCH_EVAL_FILE_H
#define SQZ_RESEARCH_EVAL_FILE_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

#include "scores.h"
#include "text_buffer.h"

struct eval_file {
    FILE *file;
    const char *path;
    size_t line; /* of the last document read, the first is 1 */
    struct text_buffer buffer;
    json_t *prompts;            /* by dataset; NULL: none */
    struct text_buffer problem; /* of a bad line */
    bool hopeless;              /* what is wrong is the whole file, not a line */
};

struct eval_question {
    const char *text;
    const char **references; /* one at least */
    size_t n_references;
    const char **classes;
    size_t n_classes;
    enum score_kind score;
    bool first_line;   /* the reply is judged by its first line */
    size_t max_tokens; /* of the reply */
};

struct eval_document {
    json_t *root; /* owns most of the texts */
    char **owned; /* and the others, all malloc'ed */
    size_t n_owned;
    const char *path; /* of its file; NULL: it was made */
    size_t line;
    char task[64]; /* the dataset's name, else the file's without folder and ending */
    const char *text;
    size_t text_bytes, n_questions;
    struct eval_question *questions; /* malloc'ed, its arrays too */
};

/* prompts: path of LongBench's prompts, or NULL. Dies when a file cannot be read or is of another kind altogether, which
 * is named with a command that converts it. */
void eval_open(struct eval_file *file, const char *path, const char *prompts);

enum eval_line { EVAL_END, EVAL_DOCUMENT, EVAL_BAD };
/* The next line with something in it. After EVAL_BAD, file->problem says in a sentence why it is no document. */
enum eval_line eval_next(struct eval_file *file, struct eval_document *document);

/* Reads a whole file and says of every bad line, of the first 20 at least, what is wrong; adds their number to *n_bad.
 * Returns the number of documents. */
size_t eval_check(const char *path, const char *prompts, size_t *n_bad);

/* Ends the program, with a word on their number, when there are any. */
void eval_stop_on_bad(size_t n_bad);
void eval_release(struct eval_document *document);
void eval_close(struct eval_file *file);

#endif
