/*
 * What can be done with rows of keys, values or centroids of any type. Who adds
 * a number format adds a type and its cases here and in rows.c; nobody else asks
 * for the type of a row.
 *
 * Calls take the rows of one KV head, as sqz_rows_of_head() gives them, and count
 * rows from its first. The types of the CPU are F16, I8, I4 and I44; the first two
 * are in plain_rows.c, the others in plane_rows.c.
 */
#ifndef SQZ_LIB_ROWS_H
#define SQZ_LIB_ROWS_H

#include "arena.h"
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
    return (struct sqz_rows){.type = rows ? SQZ_ROW_F16 : SQZ_ROW_NONE, .data = rows};
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

/* Bytes that rows [first, first + n) are read as: those that are not rounded are longer. */
static inline size_t sqz_rows_bytes(const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim)
{
    const size_t left = rows->planes.n_whole > first ? rows->planes.n_whole - first : 0, whole = left < n ? left : n;
    return whole * sqz_row_bytes(SQZ_ROW_F16, head_dim) + (n - whole) * sqz_row_bytes(rows->type, head_dim);
}

/* Tells where the numbers of rows [first, first + n) are. */
void sqz_rows_announce(const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim,
                       void (*will_read)(const void *begin, size_t bytes));

/* The same rows read by their upper plane alone, 4 bits of each number; rows of other types as they are. */
struct sqz_rows sqz_rows_upper(const struct sqz_rows *rows);

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
/* Arrays for n query rows. */
static inline struct sqz_i16_queries sqz_i16_queries_take(struct sqz_arena *arena, size_t n, size_t head_dim)
{
    struct sqz_i16_queries queries;
    queries.rows = (int16_t *)sqz_arena_take(arena, n, sqz_i16_stride(head_dim), sizeof(int16_t));
    queries.factor = (float *)sqz_arena_take(arena, n, 1, sizeof(float));
    queries.mean_logit = (float *)sqz_arena_take(arena, n, 1, sizeof(float));
    return queries;
}

/* One row rounded: its numbers times `most`, up to 32767, and over the largest of them, which is returned. */
float sqz_i16_round(int16_t *row, const float *q, size_t head_dim, float most);

/* key_mean: [D] */
void sqz_i16_queries_set(const struct sqz_i16_queries *out, const float *queries, size_t n_query_rows, size_t head_dim,
                         float scale, const float *key_mean);

/* Query rows in the forms in which rows of any type take them. */
struct sqz_row_queries {
    const float *f32;           /* [n][D] */
    struct sqz_i16_queries i16; /* set by sqz_row_queries_set() where rows want it */
    size_t n;
    float scale;                   /* of logits */
    struct sqz_i16_queries turned; /* likewise, for rows in planes: mean_logit is half the sum of a row's numbers */
    const float *centre_logits;    /* [n][centre_stride] logits with the centroids of level 0, which rows in planes are
                                      relative to, where these are known; NULL: they are computed */
    size_t centre_stride;
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

/* As row_accumulate() of kernels.h; index NULL: rows [first, first + n). Returns the bytes that were read. Rows of values
 * and value centroids: F16, or in planes and relative to their mean. */
size_t sqz_rows_accumulate(float *out, const float *weights, size_t stride, size_t n_queries,
                           const struct sqz_rows *rows, const uint32_t *index, size_t first, size_t n, size_t head_dim);

/* Rows [first, first + n) as F32: [n][D], and across, as transpose_f16() of kernels.h. */
void sqz_rows_to_f32(float *out, const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim);
void sqz_rows_transpose(float *out, size_t ld, const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim);

/* The same rounded to F16. */
void sqz_rows_to_f16(uint16_t *out, const struct sqz_rows *rows, size_t first, size_t n, size_t head_dim);

/* Room for rows of whatever type, to copy some side by side: as many F16 numbers, and scales. */
struct sqz_row_buffer {
    void *data;
    float *scale;
};

/* Copies rows [first, first + n) to places `at` and on of a buffer, and gives them back as rows: of their type, or where
 * that is in planes F16. */
struct sqz_rows sqz_rows_gather(const struct sqz_row_buffer *buffer, size_t at, const struct sqz_rows *rows,
                                size_t first, size_t n, size_t head_dim);

/* ---- Writing ------------------------------------------------------------------------ */

/* Writes an F32 row in the rows' type as row number `at`. The rows are the caller's to write; the mean of an INT8 type,
 * and the centroids or the mean of rows in planes, are there. Without the mean, a few dimensions that are large in every key of some models would leave the others no steps. */
void sqz_rows_store(const struct sqz_rows *rows, size_t at, const float *row, size_t head_dim);

#endif
