/*
 * Codes: what is known of a single key before it is read. A centroid tells what
 * a cluster's keys are like, not that one of twenty answers a query and the
 * others do not; heads that find the one place to copy from live by that key.
 *
 * The difference of a key to its centroid is product quantised (Jegou, Douze
 * and Schmid, "Product Quantization for Nearest Neighbor Search", 2011, its
 * IVFADC form): 4 bits for each of 8 parts in a word of 32 bits. The parts are
 * made of directions in which the head's own queries differ: with S_q the
 * second moment of the calibration queries, relative to its mean eigenvalue, S_q
 * = L L^T, and V the eigenvectors of L^T S_k L (S_k the second moment of the
 * differences), a logit's difference is
 *     q.(k - C) = sum over i of (V^T L^-1 q)_i (V^T L^T (k - C))_i
 * where all query coordinates have the same mean square and the key coordinates
 * are uncorrelated, so their variances say what each is worth. The most valuable
 * directions are coded, parts are filled so that each has about the same worth
 * in bits, and 16 entries a part are found by k-means.
 *
 * Reading: 16 numbers a part and query, once for all keys (sqz_code_tables());
 * then a key's logit is its centroid's plus one of them for each part.
 */
#ifndef SQZ_LIB_CODES_H
#define SQZ_LIB_CODES_H

#include "code_parts.h"
#include "layer.h"

/* Directions that a layer of this head dimension codes with so many words. */
uint32_t sqz_code_directions(uint32_t n_words, uint32_t head_dim);

/* Makes the codes of one KV head from its sorted rows, centroids and variances and the layer's kept queries. All arrays
 * of layer->codes are written. workspace: sqz_code_build_workspace_bytes(). */
size_t sqz_code_build_workspace_bytes(const struct sqz_layer *layer);
void sqz_code_build(const struct sqz_layer *layer, uint32_t head_kv, void *workspace);

/* Floats of the tables of n_query_rows queries: [W][n_query_rows][8][16]. */
static inline size_t sqz_code_table_floats(const struct sqz_codes *codes, size_t n_query_rows)
{
    return (size_t)codes->n_words * n_query_rows * SQZ_CODE_PARTS * SQZ_CODE_ENTRIES;
}

/* Fills the tables of query rows F32 [n_query_rows][D], and how far a logit of each lies from its centroid's: the
 * standard deviation over the keys of a cluster of variance 1. */
void sqz_code_tables(float *tables, float *deviation, const struct sqz_layer *layer, uint32_t head_kv,
                     const float *queries, size_t n_query_rows);

/* Adds the codes' part to logits[q * stride + i] of the clustered rows first_row + i (counted from n_fixed), i < n. */
void sqz_code_logits(float *logits, size_t stride, const float *tables, size_t n_query_rows,
                     const struct sqz_layer *layer, uint32_t head_kv, size_t first_row, size_t n);

/* Bytes of a key's code, and of what a lookup reads once a head: directions, book, parts and spread. */
static inline size_t sqz_code_key_bytes(const struct sqz_codes *codes)
{
    return codes->n_words * sizeof(uint32_t);
}
static inline size_t sqz_code_shape_bytes(size_t n_words, size_t n_directions, size_t head_dim)
{
    return n_directions * ((head_dim + SQZ_CODE_ENTRIES) * sizeof(uint16_t) + sizeof(float)) +
           (SQZ_CODE_PARTS * n_words + 1) * sizeof(uint32_t);
}
static inline size_t sqz_code_head_bytes(const struct sqz_layer *layer)
{
    const struct sqz_codes *codes = &layer->codes;
    return codes->n_words ? sqz_code_shape_bytes(codes->n_words, codes->n_directions, layer->shape.head_dim) : 0;
}

#endif
