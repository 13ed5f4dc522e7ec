/*
 * What the parts of `squeeze eval` share:
 *   cmd_eval.c      the command: options, files, synthetic tasks, documents in turn
 *   eval_file.c     files of documents with questions
 *   eval_methods.c  the other methods, as selectors
 *   eval_settings.c  which methods were asked for, at which budgets
 *   eval_context.c  the context that a method reads
 *   eval_run.c      one document under every setting
 *   eval_speculate.c  its exact answers with drafts of several methods, and without
 *   eval_draft_report.c  figures of these
 *   eval_report.c   figures over all documents: table, JSON, picture
 *
 * A document's figures are kept as a JSON object, a record: the same whether it was measured just now or read back from
 * the file of an interrupted run.
 *
 *   {"key": "...", "task": "quality", "tokens": 7000, "settings": [[answer, ...], ...]}     in the order of the settings
 *   "length" stands beside them where documents were cut to lengths that were asked for
 *   answer: {"kl": [nats a token], "top1": n, "nll": sum, "nll_dense": sum, "score": 0.5, "read": bytes,
 *            "context": bytes, "lead": nats}; `kl` and what goes with it, and `score`, only where they were measured;
 *            `lead`, by how much the dense run preferred the token at which this reply went another way
 *
 * "file" and "file_f16", by setting, the bytes of its own context's file and of the same with F16 rows; null of those that
 * round nothing.
 * With --speculate, "speculation": [{...}, ...], one a question and method, see eval_speculate.h.
 * With recall, "recall": [{"layers": L, "heads": K, "mass": [L * K sums], "keys": [...], "n": [...]}, ...] of the
 * settings: see engine/recall.h.
 */
#ifndef SQZ_RESEARCH_EVAL_H
#define SQZ_RESEARCH_EVAL_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "eval_file.h"
#include "eval_methods.h"
#include "kept_contexts.h"
#include "options.h"
#include "speculation.h"
#include "text_buffer.h"

enum { EVAL_SETTINGS = 128, EVAL_DRAFTS = 8 };

/* A method at a budget. */
struct eval_setting {
    enum eval_method method;
    uint32_t n_levels; /* of SQUEEZED and PAPER */
    double budget;
};

struct eval {
    struct sqz_model *model;
    struct sqz_model_info model_info;
    struct kept_contexts kept;
    size_t
        n_shards; /* above 1: contexts are in shards, read once as SQUEEZED has them, and nothing else can read them */
    struct sqz_squeeze_options squeeze;          /* of SQUEEZED; levels are the setting's, which in shards is one */
    struct eval_setting settings[EVAL_SETTINGS]; /* the first is dense */
    size_t n_settings;
    struct eval_setting drafts[EVAL_DRAFTS]; /* who drafts exact answers; budgets are the draft's */
    size_t n_drafts;
    size_t max_questions, max_answer_tokens, max_reply_tokens; /* a document; compared; generated */
    size_t least_tokens;                                       /* of a document */
    struct count_list lengths; /* contexts are cut to each of these numbers of tokens; n 0: they are whole */
    bool same_bytes;           /* other methods get the share that SQUEEZED, which comes before them, has read */
    bool distances, scores, recall, quiet;
    bool speculate; /* exact answers are drafted, too, as these say */
    struct speculation_flags speculation;
    json_t *left_out; /* of what was left out: {"file", "line", "task", "question", "why"}; question null: all of it */
};

/* Fills settings and, where eval speculates, drafts, from "squeezed,squeezed:2,paper,quest,window,oracle" and the budgets,
 * behind what is dense. Usage error when they make no sense. */
void eval_settings_parse(struct eval *eval, const char *methods, const struct real_list *budgets);

enum { EVAL_NAME = 64 };
/* "squeezed, 2 levels", "quest"; the budget is not in it. name: EVAL_NAME bytes at most. */
void eval_setting_name(char *name, size_t size, const struct eval_setting *setting);

/* The context that a setting reads, made of the document's, which is one file; NULL on failure. */
struct sqz_context *eval_context_for(const struct eval *eval, struct sqz_context *base,
                                     const struct eval_setting *setting, const char *label, struct sqz_error *error);

/* Says that a document, or one of its questions (the first is 1), is left out and why, and notes it. */
void eval_leave_out(struct eval *eval, const struct eval_document *document, size_t question, const char *format, ...)
    PRINTF_LIKE(4, 5);

/* The record of a document, without its key; NULL when it was left out, because no question fits or something failed.
 * Exits when a signal was caught. label begins the lines of progress. length: 0, or the context is cut to so many
 * tokens; NULL, too, for a document that is shorter. */
json_t *eval_run_document(struct eval *eval, const struct eval_document *document, size_t length, const char *label);

/* records: array of records. */
int eval_print_table(const struct eval *eval, const json_t *records);
int eval_print_json(const struct eval *eval, const json_t *records, double seconds);
int eval_plot(const struct eval *eval, const json_t *records, const char *path);
/* Lost attention mass and retained keys by layer and head, of the first squeezed setting; needs recall. */
int eval_plot_maps(const struct eval *eval, const json_t *records, const char *path);

#endif
