/*
 * What can be done with rows of keys, values or centroids of any type. Who adds
 * a number format adds a type and its cases here and in rows.c; nobody else asks
 * for the type of a row.
 *
 * Calls take the rows of one KV head, as sqz_rows_of_head() gives them, and count
 * rows from its first. The types of the CPU are F16 and I8.
 */
#ifndef SQZ_LIB_ROWS_H
#define SQZ_LIB_ROWS_H

#include "squeeze_attention.h"

/* The row type that an option of the format asks for. */
static inline enum sqz_row_type sqz_row_type_of(enum sqz_index format)
{
    return format == SQZ_INDEX_INT8 ? SQZ_ROW_I8 : SQZ_ROW_F16;
}

/* "F16"; static storage. */
const char *sqz_row_type_name(enum sqz_row_type type);

static inline struct sqz_rows sqz_f16_rows(const uint16_t *rows)
{
    return (struct sqz_rows){rows ? SQZ_ROW_F16 : SQZ_ROW_NONE, rows, NULL, NULL};
}

/* The numbers of rows of a known type, of all heads. */
static inline const uint16_t *sqz_rows_f16(const struct sqz_rows *rows)
{
    return rows->data;
}
static inline const int8_t *sqz_rows_i8(const struct sqz_rows *rows)
{
    return rows->data;
}

/* One head of rows of which every head has n_rows; rows of no type stay as they are. */
struct sqz_rows sqz_rows_of_head(const struct sqz_rows *rows, size_t n_rows, size_t head_dim, size_t head_kv);

/* Rows from number `first` on. */
struct sqz_rows sqz_rows_from(const struct sqz_rows *rows, size_t head_dim, size_t first);

/* ---- Logits --------------------------------------------------------------------- */

/* Queries in the form in which INT8 rows take them: INT16 rows, D rounded up to a multiple of 32 apart, what a row is to
 * be multiplied by, and its logit with the mean that INT8 rows are relative to. [n_query_rows] */
struct sqz_i16_queries {
    int16_t *rows;
    float *factor, *mean_logit;
};
static inline size_t sqz_i16_stride(size_t head_dim)
{
    return (head_dim + 31) / 32 * 32;
}
/* key_mean: [D] */
void sqz_i16_queries_set(const struct sqz_i16_queries *out, const float *queries, size_t n_query_rows, size_t head_dim,
                         float scale, const float *key_mean);

/* Query rows in the forms in which rows of any type take them. */
struct sqz_row_queries {
    const float *f32;           /* [n][D] */
    struct sqz_i16_queries i16; /* set by sqz_row_queries_set() where rows want it */
    size_t n;
    float scale; /* of logits */
};

/* Makes the form that `rows` want, if it is not F32. `queries` has arrays for it. */
void sqz_row_queries_set(const struct sqz_row_queries *queries, const struct sqz_rows *rows, size_t head_dim);

/* n of them, from number `first` on. */
struct sqz_row_queries sqz_row_queries_part(const struct sqz_row_queries *queries, size_t first, size_t n,
                                            size_t head_dim);

/* Logits of any number of query rows with rows [first, first + n): logits[q * stride + r]. scratch: of
 * sqz_logits_scratch_floats(D) floats; not looked at for up to SQZ_MAX_GROUP_QUERIES query rows. */
size_t sqz_logits_scratch_floats(size_t head_dim);
void sqz_rows_logits(float *logits, size_t stride, const struct sqz_row_queries *queries, const struct sqz_rows *rows,
                     size_t first, size_t n, size_t head_dim, float *scratch);

/* Logits of up to SQZ_MAX_GROUP_QUERIES query rows with the rows of a list, as listed_logits() of kernels.h. */
void sqz_rows_listed_logits(float *logits, size_t stride, const struct sqz_row_queries *queries,
                            const struct sqz_rows *rows, const uint32_t *index, size_t n, size_t n_listed,
                            size_t head_dim);

/* ---- Sums of values, tiles -------------------------------------------------------- */

/* row_accumulate() of kernels.h: index NULL for the first n rows. Values and value centroids are F16. */
size_t sqz_rows_accumulate(float *out, const float *weights, size_t stride, size_t n_queries,
                           const struct sqz_rows *rows, const uint32_t *index, size_t n, size_t head_dim);

/* Rows [first, first + n) as F32: [n][D], and across, as transpose_f16() of kernels.h. */
void sqz_rows_to_f32(float *out, const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim);
void sqz_rows_transpose(float *out, size_t ld, const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim);

/* The same rounded to F16. */
void sqz_rows_to_f16(uint16_t *out, const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim);

/* Room for rows of whatever type, to copy some side by side. */
struct sqz_row_buffer {
    void *data;
    float *scale;
};

/* Copies rows [first, first + n) to places `at` and on of a buffer, and gives them back as rows. */
struct sqz_rows sqz_rows_gather(const struct sqz_row_buffer *buffer, size_t at, const struct sqz_rows *rows,
                                size_t first, size_t n, size_t head_dim);

/* ---- Writing ------------------------------------------------------------------------ */

/* Writes an F32 row in the rows' type as row number `at`. The rows are the caller's to write; the mean of an INT8 type is
 * there. Without the mean, a few dimensions that are large in every key of some models would leave the others no steps. */
void sqz_rows_store(const struct sqz_rows *rows, size_t at, const float *row, size_t head_dim);

#endif
