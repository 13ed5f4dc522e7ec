/*
 * A sequence's own rows behind a context, of all its layers, in host memory:
 * address space for all the room there is, memory for the pages of rows that
 * come. Layers whose context rows are in planes keep theirs so, too; with them
 * layers that see a window keep what a token can still see (lib/user_rows.h). All
 * others keep every row as F16.
 */
#ifndef SQZ_ENGINE_OWN_ROWS_H
#define SQZ_ENGINE_OWN_ROWS_H

#include "context_file.h"
#include "run.h"
#include "user_rows.h"

struct sqz_own_layers {
    const struct sqz_context *context;
    struct sqz_user_rows *layers; /* [n_layer] */
    size_t most;                  /* rows that are put at once */
    void *memory;
    size_t memory_bytes;
};

/* Room for so many rows; f16: of any layer as F16. Errors: MEMORY (nothing is left behind). */
enum sqz_status sqz_own_layers_create(struct sqz_own_layers *own, const struct sqz_context *context,
                                      size_t capacity_rows, bool f16, struct sqz_error *error);
void sqz_own_layers_free(struct sqz_own_layers *own);

/* Puts the keys and values of the node's tokens behind the first n_before rows of its layer. n_kept: as
 * sqz_user_rows_ready(). False: rows that they would read are no more. */
bool sqz_own_layers_put(const struct sqz_own_layers *own, const struct sqz_attention_node *node, size_t n_before,
                        size_t n_kept, int n_threads);

/* Copies n rows of a layer that are all there as F16, from row number `first` on, into arrays [K][capacity_rows][D] from row
 * to_row on. */
void sqz_own_layers_copy(const struct sqz_own_layers *own, uint32_t layer, size_t first, size_t n, uint16_t *keys,
                         uint16_t *values, size_t capacity_rows, size_t to_row);

/* Bytes that the rows take. */
size_t sqz_own_layers_bytes(const struct sqz_own_layers *own);

#endif
