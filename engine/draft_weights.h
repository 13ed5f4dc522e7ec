/*
 * Weights in fewer bits that draft exact answers, in place of the model's own:
 * another file of the same model, whose layers see the same keys and values
 * (QuantSpec, arXiv 2502.10424, drafts by 4-bit weights).
 */
#ifndef SQZ_ENGINE_DRAFT_WEIGHTS_H
#define SQZ_ENGINE_DRAFT_WEIGHTS_H

#include "model.h"

/* Loads the file at `path` to model->drafting, whose own weights and files are loaded. Errors: those of
 * sqz_model_files_open(), UNSUPPORTED, MISMATCH where it is not of the same model. */
enum sqz_status sqz_draft_weights_load(struct sqz_model *model, const char *path, struct sqz_error *error);
void sqz_draft_weights_free(struct sqz_model *model);

#endif
