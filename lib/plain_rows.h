/*
 * Rows of F16 and INT8, for rows.c and for what rows of 4 bits are made of; the
 * calls of rows.h for these types alone.
 */
#ifndef SQZ_LIB_PLAIN_ROWS_H
#define SQZ_LIB_PLAIN_ROWS_H

#include "rows.h"

/* Rows of a tile: what passes through the caches together. */
enum { SQZ_ROWS_TILE = 128 };

void sqz_plain_queries_set(const struct sqz_row_queries *queries, const struct sqz_rows *rows, size_t head_dim);
void sqz_plain_logits(float *logits, size_t stride, const struct sqz_row_queries *queries, const struct sqz_rows *rows,
                      size_t first, size_t n, size_t head_dim, float *scratch);
void sqz_plain_listed_logits(float *logits, size_t stride, const struct sqz_row_queries *queries,
                             const struct sqz_rows *rows, const uint32_t *index, size_t n, size_t n_listed,
                             size_t head_dim);
void sqz_plain_to_f32(float *out, const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim);

#endif
