/*
 * Keys and values of built layers on their way to the file while others are built
 * and calibrated: a thread of its own brings them from where they were built and
 * writes them. The disk is what preparing on a card waits for, so it begins early.
 */
#ifndef SQZ_ENGINE_EARLY_ROWS_H
#define SQZ_ENGINE_EARLY_ROWS_H

#include "backend.h"
#include "context_file.h"

struct sqz_early_rows;

/* `layers` [n_layer] are the planned ones, `inputs` say which are elsewhere; nobody else touches the writer until the
 * end. Errors: MEMORY. */
enum sqz_status sqz_early_rows_begin(struct sqz_early_rows **out, struct sqz_backend *backend,
                                     struct sqz_context_writer *writer, const struct sqz_layer *layers,
                                     const struct sqz_layer_input *inputs, uint32_t n_layer, struct sqz_error *error);
/* Layers up to number l are built, where they are elsewhere: no more is done to their rows. */
void sqz_early_rows_built(struct sqz_early_rows *e, uint32_t l);
/* How many layers were looked at; *finished: nothing more will be. */
uint32_t sqz_early_rows_done(struct sqz_early_rows *e, bool *finished);
/* Waits for it to finish, or, where stop, for the layer in flight; frees. NULL is fine. Errors: its own. */
enum sqz_status sqz_early_rows_end(struct sqz_early_rows *e, bool stop, struct sqz_error *error);

#endif
