/*
 * A document prepared in pieces, for programs that have other work to do between them. Reading takes the model and goes
 * in steps as short as is wanted; finishing does without it, so that another thread may do that, where the model is not
 * on a card.
 */
#ifndef SQZ_ENGINE_PREPARING_H
#define SQZ_ENGINE_PREPARING_H

#include "squeeze.h"

struct sqz_preparing;

/* Checks, and reserves memory and the file, as sqz_prepare_tokens() does. has_template: the tokens are a document in
 * the model's chat template. Tokens, path and options are copied, but for what options point to. Any thread may call, also
 * while the model runs. Errors: as there. */
enum sqz_status sqz_preparing_begin(struct sqz_preparing **out, struct sqz_model *model, const int32_t *tokens,
                                    size_t n_tokens, bool has_template, const char *out_path,
                                    const struct sqz_prepare_options *options, struct sqz_error *error);

/* Has memory for rows come a page at a time, with the tokens that they are of, where others wait meanwhile: in large pages
 * all of it comes with the first ones. Before anything is read; as _begin() for threads. */
void sqz_preparing_spread(struct sqz_preparing *p);

/* Reads the next n_tokens tokens, fewer at the end or where the model takes fewer at once. Others may run on the model
 * between steps. Errors: CANCELLED, and those of sqz_prepare_tokens(). */
enum sqz_status sqz_preparing_step(struct sqz_preparing *p, size_t n_tokens, struct sqz_error *error);

/* Takes over what a session has read already, whose context's tokens and own ones are p's first; to be called again when
 * it has more. The last tokens, which calibration asks for, stay to be read. Errors: UNSUPPORTED, when the session's rows
 * are on a card, its context has clusters, or its RoPE is another one: nothing was taken then. */
enum sqz_status sqz_preparing_follow(struct sqz_preparing *p, const struct sqz_session *session,
                                     struct sqz_error *error);

size_t sqz_preparing_left(const struct sqz_preparing *p); /* tokens that are not read yet */

/* When all is read: clusters, calibrates and writes the file, with n_threads threads. report may be NULL. */
enum sqz_status sqz_preparing_finish(struct sqz_preparing *p, int n_threads, struct sqz_prepare_report *report,
                                     struct sqz_error *error);

/* At any time; without _finish() nothing stays. */
void sqz_preparing_free(struct sqz_preparing *p);

/* Tokens of a whole document for sqz_preparing_begin(), as sqz_prepare() makes them: malloc'ed. */
enum sqz_status sqz_document_tokens(const struct sqz_model *model, const char *text, size_t n_bytes, bool raw,
                                    int32_t **tokens, size_t *n_tokens, bool *has_template, struct sqz_error *error);

/* Room for so many sessions in a batch from the start: otherwise it is made when they come, while others wait. Nothing
 * for a model on a card, where it has a price. Errors: those of a run. */
enum sqz_status sqz_model_expect_sessions(struct sqz_model *model, size_t n, struct sqz_error *error);

#endif
