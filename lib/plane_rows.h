/*
 * Rows of 4 and of 4 + 4 bits (struct sqz_planes says what is in them), for
 * rows.c. A logit of such a row is that of what it is relative to, computed once
 * for all rows of a cluster that follow one another, and the product of the
 * turned query with the planes in integers:
 *
 *   scale q.k = scale q.c + factor step (sum q' u + sum q' / 2),   q' the turned query in INT16
 *
 * Sums of values are made turned, and turned back once.
 */
#ifndef SQZ_LIB_PLANE_ROWS_H
#define SQZ_LIB_PLANE_ROWS_H

#include "rows.h"

/* What a row is multiplied by before it is rounded: its own inverse. */
void sqz_turn(float *row, size_t head_dim);

void sqz_plane_queries_set(const struct sqz_row_queries *queries, const struct sqz_rows *rows, size_t head_dim);

/* Logits of any number of query rows; index NULL: with rows [first, first + n). scratch: as sqz_rows_logits(). */
void sqz_plane_logits(float *logits, size_t stride, const struct sqz_row_queries *queries, const struct sqz_rows *rows,
                      const uint32_t *index, size_t first, size_t n, size_t n_listed, size_t head_dim, float *scratch);

/* sqz_rows_accumulate() for rows without centres. */
size_t sqz_plane_accumulate(float *out, const float *weights, size_t stride, size_t n_queries,
                            const struct sqz_rows *rows, const uint32_t *index, size_t first, size_t n,
                            size_t head_dim);

void sqz_plane_to_f32(float *out, const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim);
void sqz_plane_store(const struct sqz_rows *rows, size_t at, const float *row, size_t head_dim);

#endif
