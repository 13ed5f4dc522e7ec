/*
 * Codes of single keys (lib/codes.h): the two decompositions they rest on, what
 * is stored of them against its definition in double precision, how well they
 * tell a key's logit, and keys that only they can find.
 *
 * Directions are F16, each number off by at most 2^-11 of itself. What is
 * computed from them here and in the library differs by no more than that
 * rounding carries through the same sums; bounds are such sums of magnitudes.
 */
#include "layer_fixture.h"

#include "codes.h"
#include "lookup.h"
#include "stride.h"
#include "symmetric.h"

#define HALF_UNIT   0x1p-11
#define QUERY_FLOOR 0.02 /* of codes.c */

enum { MAX_DIRECTIONS = 256, MAX_QUERY_ROWS = 20 };

static struct sqz_error error;

/* ---- Decompositions ------------------------------------------------------------------------- */

static const size_t orders[] = {1, 2, 3, 7, 32, 65, 128, 256};

/* Orthonormal rows by Gram and Schmidt, twice. */
static double *random_rotation(size_t n, uint64_t seed)
{
    struct sqz_random random;
    double *q = take(n * n, sizeof *q);
    sqz_random_seed(&random, seed);
    for (size_t i = 0; i < n * n; i++) q[i] = gauss(&random);
    for (size_t i = 0; i < n; i++) {
        double norm = 0;
        for (size_t j = 0; j < 2 * i; j++) {
            double dot = 0;
            for (size_t x = 0; x < n; x++) dot += q[i * n + x] * q[j % i * n + x];
            for (size_t x = 0; x < n; x++) q[i * n + x] -= dot * q[j % i * n + x];
        }
        for (size_t x = 0; x < n; x++) norm += q[i * n + x] * q[i * n + x];
        for (size_t x = 0; x < n; x++) q[i * n + x] /= sqrt(norm);
    }
    return q;
}

/* sum over i of values[i] times row i of q times itself */
static double *matrix_of(const double *q, const double *values, size_t n)
{
    double *a = take(n * n, sizeof *a);
    memset(a, 0, n * n * sizeof *a);
    for (size_t i = 0; i < n; i++)
        for (size_t x = 0; x < n; x++)
            for (size_t y = 0; y < n; y++) a[x * n + y] += values[i] * q[i * n + x] * q[i * n + y];
    for (size_t x = 0; x < n; x++) /* symmetric to the bit */
        for (size_t y = 0; y < x; y++) a[y * n + x] = a[x * n + y];
    return a;
}

/* Spectra: even, falling by a hundred thousand, mostly zeros, all zero, pairs of the same. */
static void fill_spectrum(double *values, size_t n, size_t kind)
{
    for (size_t i = 0; i < n; i++) {
        const double at = (double)i / (double)n;
        values[i] = kind == 0 ? 1 : kind == 1 ? pow(10, -5 * at) : kind == 2 ? i < (n + 3) / 4 : 0;
        if (kind == 4) values[i] = 2 - (double)(i / 2 * 2) / (double)n;
    }
}

enum { N_SPECTRA = 5 };

/* L is lower triangular with a positive diagonal and L L^T is the matrix: row i of L has the length sqrt(a_ii), so a sum
 * of products of two rows is off by at most n + 2 roundings of sqrt(a_ii a_jj). A singular matrix keeps L finite: pivots
 * of 1e-12, and what stands below them left out, which is rounding that earlier ones have multiplied. */
static void cholesky(void **unused)
{
    (void)unused;
    for (size_t o = 0; o < COUNT(orders); o++)
        for (size_t kind = 0; kind < N_SPECTRA; kind++) {
            const size_t n = orders[o];
            double values[256], *q = random_rotation(n, o + 1);
            fill_spectrum(values, n, kind);
            double *a = matrix_of(q, values, n), *l = take(n * n, sizeof *l), largest = 0;
            for (size_t i = 0; i < n; i++) largest = fmax(largest, a[i * n + i]);
            memcpy(l, a, n * n * sizeof *l);
            sqz_cholesky(l, n);
            describe("order %zu, spectrum %zu", n, kind);
            for (size_t i = 0; i < n; i++) {
                check_true("diagonal", i, l[i * n + i], 0, l[i * n + i] > 0 && isfinite(l[i * n + i]));
                for (size_t j = 0; j < n; j++) {
                    double sum = 0;
                    if (j > i) check_close("above the diagonal", i * n + j, l[i * n + j], 0, 0);
                    for (size_t k = 0; k < n; k++) sum += l[i * n + k] * l[j * n + k];
                    if (kind == 3) continue;
                    check_close("L L^T", i * n + j, sum, a[i * n + j],
                                ((double)(n + 2) * 0x1p-52 + (kind == 2 ? 1e-11 : 0)) * largest);
                }
            }
            free(q);
            free(a);
            free(l);
        }
}

/* The rotations stop when all numbers off the diagonal together are below 1e-7 of the matrix: that bounds the residual
 * of every pair, and how far a value is from one of the matrix. */
static void eigenvectors(void **unused)
{
    (void)unused;
    for (size_t o = 0; o < COUNT(orders); o++)
        for (size_t kind = 0; kind < N_SPECTRA; kind++)
            for (int scaled = 0; scaled < 2; scaled++) {
                const size_t n = orders[o];
                if (n == 256 && (kind > 1 || scaled)) continue; /* for time */
                const double unit = scaled ? 1e12 : 1;
                double known[256], values[256], norm = 0, *q = random_rotation(n, 50 + o);
                fill_spectrum(known, n, kind);
                for (size_t i = 0; i < n; i++) known[i] *= unit;
                double *a = matrix_of(q, known, n), *work = take(n * n, sizeof *work), *v = take(n * n, sizeof *v);
                memcpy(work, a, n * n * sizeof *work);
                for (size_t i = 0; i < n * n; i++) norm += a[i] * a[i];
                const double tolerance = 2.1e-7 * sqrt(norm);
                sqz_symmetric_eigen(values, v, work, n);
                describe("order %zu, spectrum %zu, times %g", n, kind, unit);
                for (size_t i = 0; i < n; i++) {
                    check_close("eigenvalue", i, values[i], known[i], tolerance);
                    check_true("largest first", i, values[i], 0, values[i] >= 0 && (!i || values[i] <= values[i - 1]));
                    double residual = 0;
                    for (size_t x = 0; x < n; x++) {
                        double sum = -values[i] * v[i * n + x];
                        for (size_t y = 0; y < n; y++) sum += a[x * n + y] * v[i * n + y];
                        residual += sum * sum;
                    }
                    check_close("A v - value v", i, sqrt(residual), 0, tolerance);
                    for (size_t j = 0; j <= i; j++) { /* every rotation rounds twice a number */
                        double dot = 0;
                        for (size_t x = 0; x < n; x++) dot += v[i * n + x] * v[j * n + x];
                        check_close("orthonormal", i * n + j, dot, i == j, 1e-12 * (double)n);
                    }
                }
                free(q);
                free(a);
                free(work);
                free(v);
            }
}

/* ---- Layers made by hand ------------------------------------------------------------------------ */

/* One level of F16 centroids; keys and queries as the caller fills them. */
struct built {
    struct sqz_layer layer;
    float *centres, *differences; /* [K][C][D]; [K][n][D], before rounding to F16 */
    uint32_t *offset;
    uint16_t *centroids, *keys, *queries;
    float *variance;
    struct guarded workspace;
};

static void *const_cast(const void *p)
{
    return (void *)(uintptr_t)p;
}

/* n keys a head in clusters of 1 to 39, differences[i] around their centre; the queries of the layer are n_queries
 * tokens of [H][D]. */
static struct built build(struct sqz_layer_shape shape, size_t n, uint32_t n_words, const float *differences,
                          const float *queries, size_t n_queries, double centres, uint64_t seed)
{
    const size_t k = shape.n_head_kv, d = shape.head_dim, n_clusters = (n + 19) / 20;
    struct built b = {.layer = {.shape = shape, .n_rows = (uint32_t)n, .n_levels = 1}};
    struct sqz_random random;
    sqz_random_seed(&random, seed);
    b.centres = random_floats(k * n_clusters * d, seed + 1, centres);
    b.centroids = take(k * n_clusters * d, sizeof *b.centroids);
    to_half(b.centroids, b.centres, k * n_clusters * d);
    b.offset = take(k * (n_clusters + 1), sizeof *b.offset);
    b.variance = take(k * n_clusters, sizeof *b.variance);
    b.keys = take(k * n * d, sizeof *b.keys);
    b.queries = take(n_queries * shape.n_head * d, sizeof *b.queries);
    to_half(b.queries, queries, n_queries * shape.n_head * d);
    for (size_t h = 0; h < k; h++) {
        uint32_t *offset = b.offset + h * (n_clusters + 1);
        for (uint32_t c = 0; c <= n_clusters; c++) {
            const size_t at = c * n / n_clusters, wiggle = sqz_random_below(&random, 19);
            offset[c] = (uint32_t)(c && c < n_clusters && n_clusters > 2 ? at - wiggle % (n / n_clusters) : at);
        }
        for (size_t c = 0; c < n_clusters; c++) {
            double variance = 0;
            for (size_t i = offset[c]; i < offset[c + 1]; i++) {
                float key[MAX_HEAD_DIM];
                for (size_t j = 0; j < d; j++) {
                    const double centre = half_value(b.centroids[(h * n_clusters + c) * d + j]);
                    key[j] = (float)(centre + (double)differences[(h * n + i) * d + j]);
                }
                to_half(b.keys + (h * n + i) * d, key, d);
                for (size_t j = 0; j < d; j++)
                    variance += pow(half_value(b.keys[(h * n + i) * d + j]) -
                                        half_value(b.centroids[(h * n_clusters + c) * d + j]),
                                    2);
            }
            b.variance[h * n_clusters + c] = (float)(variance / (offset[c + 1] - offset[c]));
        }
    }
    struct sqz_layer *layer = &b.layer;
    struct sqz_codes *codes = &layer->codes;
    layer->n_queries = (uint32_t)n_queries;
    layer->keys = sqz_f16_rows(b.keys);
    layer->queries = b.queries;
    layer->level[0] = (struct sqz_level){.n_clusters = (uint32_t)n_clusters,
                                         .centroids = sqz_f16_rows(b.centroids),
                                         .offset = b.offset,
                                         .variance = b.variance};
    codes->n_words = n_words;
    codes->n_directions = sqz_code_directions(n_words, (uint32_t)d);
    const size_t m = codes->n_directions, parts = SQZ_CODE_PARTS * n_words;
    codes->words = take(k * n_words * n, sizeof(uint32_t));
    codes->directions = take(k * m * d, sizeof(uint16_t));
    codes->book = take(k * SQZ_CODE_ENTRIES * m, sizeof(uint16_t));
    codes->first = take(k * (parts + 1), sizeof(uint32_t));
    codes->spread = take(k * m, sizeof(float));
    memset(const_cast(codes->words), 0xff, k * n_words * n * sizeof(uint32_t));
    memset(const_cast(codes->book), 0xff, k * SQZ_CODE_ENTRIES * m * sizeof(uint16_t));
    for (uint32_t h = 0; h < k; h++) {
        struct guarded workspace = workspace_take(sqz_code_build_workspace_bytes(layer));
        sqz_code_build(layer, h, workspace.data);
        guarded_free(workspace);
    }
    return b;
}

static void free_built(struct built *b)
{
    free(b->centres);
    free(b->offset);
    free(b->centroids);
    free(b->keys);
    free(b->queries);
    free(b->variance);
    free(const_cast(b->layer.codes.words));
    free(const_cast(b->layer.codes.directions));
    free(const_cast(b->layer.codes.book));
    free(const_cast(b->layer.codes.first));
    free(const_cast(b->layer.codes.spread));
}

/* ---- What is stored --------------------------------------------------------------------------- */

/* Number j of the centroid of a cluster of level 0, as the lookup knows it. */
static double centroid_number(const struct sqz_layer *layer, uint32_t head, size_t cluster, size_t j)
{
    const struct sqz_level *level = &layer->level[0];
    const size_t d = layer->shape.head_dim, at = head * level->n_clusters + cluster;
    const struct sqz_rows *rows = &level->centroids;
    if (rows->type == SQZ_ROW_F16) return half_value(sqz_rows_f16(rows)[at * d + j]);
    return (double)rows->mean[head * d + j] + (double)rows->scale[at] * sqz_rows_i8(rows)[at * d + j];
}

/* Second moment of the kept queries, relative to its mean eigenvalue, with the floor. */
static double *query_moment(const struct sqz_layer *layer, uint32_t head)
{
    const size_t d = layer->shape.head_dim, h = layer->shape.n_head, group = h / layer->shape.n_head_kv;
    double *s = take(d * d, sizeof *s), mean = 0;
    memset(s, 0, d * d * sizeof *s);
    for (size_t t = 0; t < layer->n_queries; t++)
        for (size_t g = 0; g < group; g++) {
            const uint16_t *q = layer->queries + (t * h + head * group + g) * d;
            for (size_t i = 0; i < d; i++)
                for (size_t j = 0; j < d; j++) s[i * d + j] += half_value(q[i]) * half_value(q[j]);
        }
    for (size_t i = 0; i < d; i++) mean += s[i * d + i] / (double)d;
    for (size_t i = 0; i < d * d; i++) s[i] = mean > 0 ? s[i] / mean : 0;
    for (size_t i = 0; i < d; i++) s[i * d + i] += QUERY_FLOOR;
    return s;
}

/* The differences of a head's keys to their centroids, [n][D], rows in their order. */
static double *differences_of(const struct sqz_layer *layer, uint32_t head)
{
    const size_t d = layer->shape.head_dim, n = layer->n_rows - layer->n_fixed;
    const uint32_t *offset = layer->level[0].offset + head * (layer->level[0].n_clusters + 1);
    const struct sqz_rows keys = sqz_rows_of_head(&layer->keys, layer->n_rows, d, head);
    float row[MAX_HEAD_DIM];
    double *x = take(n * d, sizeof *x);
    for (size_t c = 0; c < layer->level[0].n_clusters; c++)
        for (size_t i = offset[c]; i < offset[c + 1]; i++) {
            sqz_rows_to_f32(row, &keys, layer->n_fixed + i, 1, d);
            for (size_t j = 0; j < d; j++) x[i * d + j] = (double)row[j] - centroid_number(layer, head, c, j);
        }
    return x;
}

static unsigned code_of(const struct sqz_layer *layer, uint32_t head, size_t row, size_t part)
{
    const size_t n = layer->n_rows - layer->n_fixed;
    const uint32_t *words = layer->codes.words + (head * layer->codes.n_words + part / SQZ_CODE_PARTS) * n;
    return words[row] >> 4 * (part % SQZ_CODE_PARTS) & 15;
}

/* Directions, spread, parts, entries and codes of a head. */
static void check_codes(const struct sqz_layer *layer, uint32_t head)
{
    const struct sqz_codes *codes = &layer->codes;
    const size_t d = layer->shape.head_dim, m = codes->n_directions, n = layer->n_rows - layer->n_fixed;
    const size_t parts = SQZ_CODE_PARTS * codes->n_words;
    const uint32_t *first = codes->first + head * (parts + 1);
    double *moment = query_moment(layer, head), *x = differences_of(layer, head);
    double *to_query = take(m * d, sizeof *to_query), *to_key = take(m * d, sizeof *to_key);
    double *key_error = take(m * d, sizeof *key_error);
    double *coordinate = take(n * m, sizeof *coordinate), *coordinate_error = take(n * m, sizeof *coordinate_error);

    check_close("directions", 0, (double)m, fmin((double)(SQZ_CODE_DIRECTIONS * codes->n_words), (double)d), 0);
    check_close("first part", 0, first[0], 0, 0);
    check_close("last part", 0, first[parts], (double)m, 0);
    for (size_t p = 0; p < parts; p++)
        check_true("every part has a direction", p, first[p], first[p + 1], first[p] < first[p + 1]);

    /* V^T L^-1 from F16; V^T L^T = (V^T L^-1) (L L^T), with what the rounding becomes. */
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < d; j++) {
            to_query[i * d + j] = half_value(codes->directions[(head * m + i) * d + j]);
            check_true("direction", i * d + j, to_query[i * d + j], 0, fabs(to_query[i * d + j]) < 8);
        }
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < d; j++) {
            double sum = 0, magnitude = 0;
            for (size_t a = 0; a < d; a++) {
                sum += to_query[i * d + a] * moment[a * d + j];
                magnitude += fabs(to_query[i * d + a] * moment[a * d + j]);
            }
            to_key[i * d + j] = sum;
            key_error[i * d + j] = HALF_UNIT * magnitude;
        }
    /* They are eigenvectors, each there once: (V^T L^-1)(L L^T)(V^T L^-1)^T = 1. */
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < m; j++) {
            double sum = 0, slack = 1e-6;
            for (size_t a = 0; a < d; a++) {
                sum += to_key[i * d + a] * to_query[j * d + a];
                slack += 2.01 * key_error[i * d + a] * fabs(to_query[j * d + a]);
            }
            check_close("directions are independent", i * m + j, sum, i == j, slack);
        }
    /* Key coordinates are uncorrelated and their mean squares are what spread says of a cluster of variance 1. */
    double variance = 0, total = 0;
    for (size_t row = 0; row < n; row++)
        for (size_t i = 0; i < m; i++) {
            double sum = 0, slack = 0;
            for (size_t j = 0; j < d; j++) {
                sum += to_key[i * d + j] * x[row * d + j];
                slack += key_error[i * d + j] * fabs(x[row * d + j]);
            }
            coordinate[row * m + i] = sum;
            coordinate_error[row * m + i] = slack;
        }
    for (size_t c = 0; c < layer->level[0].n_clusters; c++) {
        const uint32_t *offset = layer->level[0].offset + head * (layer->level[0].n_clusters + 1);
        variance += (double)layer->level[0].variance[head * layer->level[0].n_clusters + c] *
                    (offset[c + 1] - offset[c]) / (double)n;
    }
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < m; j++) {
            double sum = 0, slack = 1e-12;
            for (size_t row = 0; row < n; row++) {
                const double a = coordinate[row * m + i], b = coordinate[row * m + j];
                sum += a * b / (double)n;
                slack += fabs(a) * coordinate_error[row * m + j] / (double)n;
                slack += fabs(b) * coordinate_error[row * m + i] / (double)n;
            }
            const double stored = i == j ? variance * (double)codes->spread[head * m + i] : 0;
            total += stored;
            check_close("moment of coordinates", i * m + j, sum, stored, 1.01 * slack + 1e-5 * fabs(stored));
        }
    /* The directions coded are the most valuable ones: the largest eigenvalues of L^T S_k L. */
    double *l = take(d * d, sizeof *l), *key_moment = take(d * d, sizeof *l), *product = take(d * d, sizeof *l);
    double values[MAX_HEAD_DIM], best = 0, all = 0;
    memcpy(l, moment, d * d * sizeof *l);
    sqz_cholesky(l, d);
    memset(key_moment, 0, d * d * sizeof *l);
    for (size_t row = 0; row < n; row++)
        for (size_t i = 0; i < d; i++) {
            double along = 0; /* L^T of the difference */
            for (size_t a = 0; a < d; a++) along += l[a * d + i] * x[row * d + a];
            product[i] = along;
            for (size_t j = 0; j <= i; j++) key_moment[i * d + j] += product[i] * product[j] / (double)n;
        }
    for (size_t i = 0; i < d; i++)
        for (size_t j = 0; j < i; j++) key_moment[j * d + i] = key_moment[i * d + j];
    sqz_symmetric_eigen(values, product, key_moment, d);
    for (size_t i = 0; i < d; i++) {
        best += i < m ? values[i] : 0;
        all += values[i];
    }
    check_close("value of the directions", 0, total, best, 1e-4 * all + 1e-12);

    /* Every code names the entry that is nearest in its part. */
    for (size_t row = 0; row < n; row++)
        for (size_t p = 0; p < parts; p++) {
            double chosen = 0, nearest = (double)INFINITY, slack = 1e-6;
            for (unsigned e = 0; e < SQZ_CODE_ENTRIES; e++) {
                double distance = 0;
                for (size_t i = first[p]; i < first[p + 1]; i++)
                    distance += pow(
                        coordinate[row * m + i] - half_value(codes->book[(head * SQZ_CODE_ENTRIES + e) * m + i]), 2);
                if (e == code_of(layer, head, row, p)) chosen = distance;
                nearest = fmin(nearest, distance);
            }
            for (size_t i = first[p]; i < first[p + 1]; i++) slack += coordinate_error[row * m + i];
            check_true("nearest entry", row * parts + p, sqrt(chosen), sqrt(nearest),
                       sqrt(chosen) <= sqrt(nearest) * (1 + 1e-5) + 2 * slack);
        }
    free(moment);
    free(x);
    free(to_query);
    free(to_key);
    free(key_error);
    free(coordinate);
    free(coordinate_error);
    free(l);
    free(key_moment);
    free(product);
}

/* ---- What a query reads ------------------------------------------------------------------------ */

/* Tables and deviations by their definition, and logits by the tables: any range of rows, any stride. */
static void check_reading(const struct sqz_layer *layer, uint32_t head, const float *queries, size_t n_query_rows)
{
    const struct sqz_codes *codes = &layer->codes;
    const size_t d = layer->shape.head_dim, m = codes->n_directions, parts = SQZ_CODE_PARTS * codes->n_words;
    const size_t n = layer->n_rows - layer->n_fixed;
    const uint32_t *first = codes->first + head * (parts + 1);
    const double scale = (double)layer->shape.scale;
    const size_t n_floats = sqz_code_table_floats(codes, n_query_rows);
    struct guarded memory = guarded_take(n_floats * sizeof(float));
    float *tables = memory.data, deviation[MAX_QUERY_ROWS];
    assert_int_equal(n_floats, codes->n_words * n_query_rows * 128);
    memset(tables, 0xff, n_floats * sizeof *tables);
    sqz_code_tables(tables, deviation, layer, head, queries, n_query_rows);
    for (size_t r = 0; r < n_query_rows; r++) {
        double along[MAX_DIRECTIONS], slack[MAX_DIRECTIONS], variance = 0, variance_slack = 0;
        for (size_t i = 0; i < m; i++) {
            double magnitude = 0;
            along[i] = exact_logit(queries + r * d, codes->directions + (head * m + i) * d, d, 1, &magnitude);
            slack[i] = (double)(d + 2) * UNIT * magnitude;
            variance += along[i] * along[i] * (double)codes->spread[head * m + i];
            variance_slack += 2 * fabs(along[i]) * slack[i] * (double)codes->spread[head * m + i];
        }
        check_close("deviation", r, deviation[r], scale * sqrt(variance),
                    scale * (sqrt(variance + variance_slack) - sqrt(variance)) +
                        (double)(m + 4) * UNIT * scale * sqrt(variance) + 1e-30);
        for (size_t p = 0; p < parts; p++)
            for (size_t e = 0; e < SQZ_CODE_ENTRIES; e++) {
                double sum = 0, tolerance = 1e-30;
                for (size_t i = first[p]; i < first[p + 1]; i++) {
                    const double entry = half_value(codes->book[(head * SQZ_CODE_ENTRIES + e) * m + i]);
                    sum += scale * along[i] * entry;
                    tolerance += scale * fabs(entry) * (slack[i] + (double)(m + 2) * UNIT * fabs(along[i]));
                }
                const size_t at = ((p / 8 * n_query_rows + r) * 8 + p % 8) * 16 + e;
                check_close("table", at, tables[at], sum, tolerance);
            }
    }
    const size_t ranges[][2] = {{0, n}, {0, 0}, {n - 1, 1}, {3, n - 3 < 31 ? n - 3 : 31}, {n / 3, n - n / 3}};
    for (size_t range = 0; range < COUNT(ranges); range++) {
        const size_t begin = ranges[range][0], count = ranges[range][1], stride = count + range;
        float *logits = random_floats(n_query_rows * stride, 70 + range, 3);
        float *before = random_floats(n_query_rows * stride, 70 + range, 3);
        sqz_code_logits(logits, stride, tables, n_query_rows, layer, head, begin, count);
        for (size_t at = 0; at < n_query_rows * stride; at++) {
            const size_t r = at / stride, i = at % stride;
            double sum = before[at], magnitude = fabs(sum);
            for (size_t p = 0; p < parts && i < count; p++) {
                const double entry =
                    tables[((p / 8 * n_query_rows + r) * 8 + p % 8) * 16 + code_of(layer, head, begin + i, p)];
                sum += entry;
                magnitude += fabs(entry);
            }
            check_close("logit by codes", at, logits[at], sum, i < count ? (double)(parts + 1) * UNIT * magnitude : 0);
        }
        free(logits);
        free(before);
    }
    guarded_free(memory);
}

/* Layers of every number of words and levels, both formats of the centroids, few keys and more than entries are found
 * from, head dimensions to the largest. A head by itself reads the same. */
static void stored_and_read(void **unused)
{
    (void)unused;
    static const struct {
        uint32_t n_head, n_head_kv, head_dim, words, levels;
        size_t n_rows;
        enum sqz_index index;
    } cases[] = {
        {4, 2, 32, 1, 1, 300, SQZ_INDEX_F16},     {4, 2, 48, 1, 2, 700, SQZ_INDEX_INT8},
        {2, 1, 32, 4, 1, 400, SQZ_INDEX_F16},     {16, 1, 64, 2, 3, 900, SQZ_INDEX_INT8},
        {3, 3, 80, 3, 1, 500, SQZ_INDEX_F16},     {1, 1, 256, 1, 1, 600, SQZ_INDEX_INT8},
        {1, 1, 256, 4, 1, 400, SQZ_INDEX_F16},    {2, 1, 32, 1, 1, 5000, SQZ_INDEX_F16},
        {6, 2, 64, 1, 1, 64 + 21, SQZ_INDEX_F16},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct material m = make_material(make_shape(cases[i].n_head, cases[i].n_head_kv, cases[i].head_dim),
                                          cases[i].n_rows, 20, 5 + i);
        struct sqz_squeeze_options o;
        sqz_squeeze_options_default(&o, SQZ_RULE_DEFAULT);
        o.n_levels = cases[i].levels;
        o.centroid_share[1] = 0.02f;
        o.centroid_share[2] = 0.005f;
        o.code_words = cases[i].words;
        o.index = cases[i].index;
        o.keys = i % 2 ? SQZ_INDEX_INT8 : SQZ_INDEX_F16;
        o.n_sinks = 4;
        o.n_window = 16;
        float *calibration = make_queries(&m, 9, 3, 0.5), *queries = random_floats(20 * cases[i].head_dim, 8 + i, 1);
        struct sqz_layer *layer;
        if (sqz_layer_create(&layer, &m.shape, m.keys, m.values, m.n_rows, calibration, 9, &o, 2, &error))
            fail_msg("sqz_layer_create: %s", error.message);
        assert_int_equal(layer->codes.n_words, cases[i].words);
        assert_int_equal(sqz_code_key_bytes(&layer->codes), 4 * cases[i].words);
        assert_int_equal(sqz_code_head_bytes(layer),
                         layer->codes.n_directions * (2 * (cases[i].head_dim + 16) + 4) + 4 * (8 * cases[i].words + 1));
        for (uint32_t h = 0; h < cases[i].n_head_kv; h++) {
            static const size_t query_rows[] = {1, 3, 16, 20};
            describe("case %zu, head %u, dim %u, words %u, rows %zu", i, h, cases[i].head_dim, cases[i].words,
                     cases[i].n_rows);
            if (h > 0 && passed_over(100 * i + h)) continue;
            if (!passed_over(i)) check_codes(layer, h);
            for (size_t r = 0; r < COUNT(query_rows); r++)
                if (!passed_over(10 * i + r)) check_reading(layer, h, queries, query_rows[r]);
            const struct sqz_layer head = sqz_layer_head(layer, h);
            describe("case %zu, head %u by itself", i, h);
            check_reading(&head, 0, queries, 2);
        }
        sqz_layer_free(layer);
        free(calibration);
        free(queries);
        free_material(&m);
    }
}

/* Without codes nothing is stored; nor for a layer that is not clustered, nor where a group is too large to select
 * single keys. */
static void absent(void **unused)
{
    (void)unused;
    for (int i = 0; i < 4; i++) {
        struct material m = make_material(make_shape(i == 2 ? 17 : 2, 1, 32), i == 1 ? 60 : 300, 10, 3);
        float *queries = make_queries(&m, 4, 3, 0.5);
        struct sqz_squeeze_options o;
        struct sqz_layer *layer;
        sqz_squeeze_options_default(&o, i == 3 ? SQZ_RULE_PAPER : SQZ_RULE_DEFAULT);
        assert_int_equal(o.code_words, i == 3 ? 0 : 2);
        if (i == 0) o.code_words = 0;
        if (sqz_layer_create(&layer, &m.shape, m.keys, m.values, m.n_rows, queries, 4, &o, 1, &error))
            fail_msg("sqz_layer_create: %s", error.message);
        assert_int_equal(layer->n_levels, i != 1);
        assert_int_equal(layer->codes.n_words, 0);
        assert_int_equal(layer->codes.n_directions, 0);
        assert_null(layer->codes.words);
        assert_int_equal(sqz_code_head_bytes(layer), 0);
        assert_int_equal(sqz_code_key_bytes(&layer->codes), 0);
        sqz_layer_free(layer);
        free(queries);
        free_material(&m);
    }
}

/* ---- How well they tell ------------------------------------------------------------------------- */

/* Rows whose coordinates along a rotation have variances falling by `falls` from first to last: [n][D]. */
static float *correlated(size_t n, size_t d, double falls, double magnitude, uint64_t seed)
{
    double *q = random_rotation(d, seed);
    float *x = take(n * d, sizeof *x);
    struct sqz_random random;
    sqz_random_seed(&random, seed + 1);
    for (size_t i = 0; i < n; i++) {
        double row[MAX_HEAD_DIM] = {0};
        for (size_t a = 0; a < d; a++) {
            const double along = magnitude * gauss(&random) * pow(falls, -0.5 * (double)a / (double)d);
            for (size_t j = 0; j < d; j++) row[j] += along * q[a * d + j];
        }
        for (size_t j = 0; j < d; j++) x[i * d + j] = (float)row[j];
    }
    free(q);
    return x;
}

/* What is left of the variance of q.(k - C) after the codes, over the given queries. */
static double unexplained(const struct sqz_layer *layer, uint32_t head, const float *queries, size_t n_query_rows)
{
    const size_t d = layer->shape.head_dim, n = layer->n_rows - layer->n_fixed;
    double *x = differences_of(layer, head), left = 0, all = 0, coded = 0, variance = 0;
    float *tables = take(sqz_code_table_floats(&layer->codes, n_query_rows), sizeof *tables);
    float *deviation = take(n_query_rows, sizeof *deviation), *logits = take(n_query_rows * n, sizeof *logits);
    sqz_code_tables(tables, deviation, layer, head, queries, n_query_rows);
    for (size_t i = 0; i < n * d; i++) variance += x[i] * x[i] / (double)n;
    memset(logits, 0, n_query_rows * n * sizeof *logits);
    sqz_code_logits(logits, n, tables, n_query_rows, layer, head, 0, n);
    for (size_t r = 0; r < n_query_rows; r++) {
        double squares = 0;
        for (size_t i = 0; i < n; i++) {
            double exact = 0;
            for (size_t j = 0; j < d; j++) exact += (double)queries[r * d + j] * x[i * d + j];
            exact *= (double)layer->shape.scale;
            left += pow(logits[r * n + i] - exact, 2);
            squares += exact * exact;
        }
        /* Coordinates are uncorrelated: what is coded cannot vary more than the whole; nor, below, less than what the
         * codes explain. F16 rounds each direction by 2^-11. */
        check_true("deviation of a logit", r, pow(deviation[r], 2) * variance, squares / (double)n,
                   pow(deviation[r], 2) * variance <= 1.02 * squares / (double)n);
        coded += pow(deviation[r], 2) * variance * (double)n;
        all += squares;
    }
    check_true("deviations of all logits", 0, coded, all - left, coded >= 0.98 * (all - left));
    free(x);
    free(tables);
    free(deviation);
    free(logits);
    return left / all;
}

/* Least distortion of Gaussian coordinates of these variances at so many bits, as a share (reverse water-filling). */
static double least_distortion(const double *values, size_t n, double bits)
{
    double low = 0, high = 0, all = 0;
    for (size_t i = 0; i < n; i++) {
        high = fmax(high, values[i]);
        all += values[i];
    }
    for (int step = 0; step < 100; step++) {
        const double level = 0.5 * (low + high);
        double rate = 0;
        for (size_t i = 0; i < n; i++) rate += values[i] > level ? 0.5 * log2(values[i] / level) : 0;
        if (rate > bits) low = level;
        else high = level;
    }
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += fmin(values[i], high);
    return sum / all;
}

/* Codes against the rate-distortion bound of the coordinates, for queries that calibration has not seen. 16 entries for
 * one Gaussian coordinate leave 0.0115 of it, 2.96 times the bound at 4 bits and the worst that a part comes to: entries
 * of several coordinates leave less. Where there are as many parts as directions that is also the least. A quarter more is
 * for entries that k-means leaves in a local optimum and for what differs between kept queries and others. Measured:
 * 1.3 to 2 times the bound. */
static void most_of_the_variance(void **unused)
{
    (void)unused;
    static const struct {
        uint32_t head_dim, words;
        double query_fall, key_fall;
    } cases[] = {{64, 1, 1000, 1000}, {64, 1, 100, 10},   {64, 2, 100, 10},
                 {128, 1, 1e4, 100},  {128, 4, 1e4, 100}, {32, 4, 30, 30}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        const size_t d = cases[i].head_dim, n = 3000, n_queries = 200;
        const struct sqz_layer_shape shape = make_shape(2, 1, (uint32_t)d);
        float *differences = correlated(n, d, cases[i].key_fall, 0.5, 4 + i);
        float *queries = correlated(4 * n_queries, d, cases[i].query_fall, 2, 40 + i);
        struct built b = build(shape, n, cases[i].words, differences, queries, n_queries, 1, 9);
        describe("case %zu: dim %zu, words %u, falls %g and %g", i, d, cases[i].words, cases[i].query_fall,
                 cases[i].key_fall);
        /* Eigenvalues of the product of the two moments, those of queries not seen. */
        double *s = take(d * d, sizeof *s), *x = differences_of(&b.layer, 0), *v = take(d * d, sizeof *v), values[256];
        double *work = take(d * d, sizeof *work), along[256];
        memset(s, 0, d * d * sizeof *s);
        for (size_t r = 2 * n_queries; r < 4 * n_queries; r++)
            for (size_t a = 0; a < d; a++)
                for (size_t c = 0; c < d; c++)
                    s[a * d + c] += (double)queries[r * d + a] * (double)queries[r * d + c] / (2.0 * (double)n_queries);
        sqz_cholesky(s, d);
        memset(work, 0, d * d * sizeof *work);
        for (size_t row = 0; row < n; row++) {
            for (size_t a = 0; a < d; a++) {
                along[a] = 0;
                for (size_t c = 0; c < d; c++) along[a] += s[c * d + a] * x[row * d + c];
            }
            for (size_t a = 0; a < d; a++)
                for (size_t c = 0; c < d; c++) work[a * d + c] += along[a] * along[c] / (double)n;
        }
        sqz_symmetric_eigen(values, v, work, d);
        const double bound = least_distortion(values, d, 32.0 * cases[i].words);
        const double left = unexplained(&b.layer, 0, queries + 2 * n_queries * d, 2 * n_queries);
        check_true("variance left, against the least possible", 0, left, bound,
                   left <= 1.25 * fmax(2.96 * bound, 0.0115));

        free(s);
        free(x);
        free(v);
        free(work);
        free_built(&b);
        free(differences);
        free(queries);
    }
}

/* Differences that take no more than 16 values, or of fewer keys than that: every part has an entry for each, so what is
 * left is rounding of the directions and the entries to F16. */
static void few_points(void **unused)
{
    (void)unused;
    static const size_t points[] = {1, 2, 5, 16};
    for (size_t i = 0; i < 4 * COUNT(points); i++) {
        const uint32_t words = 1 + i % 2 * 2;
        const size_t d = i % 4 < 2 ? 32 : 96, n = i < 8 ? 2000 : i < 12 ? 70 : 7, n_points = points[i / 4];
        float *offsets = random_floats(n_points * d, 7 + i, 1), *differences = take(n * d, sizeof *differences);
        float *queries = random_floats(40 * d, 9, 1);
        struct sqz_random random;
        sqz_random_seed(&random, i);
        for (size_t row = 0; row < n; row++)
            memcpy(differences + row * d, offsets + sqz_random_below(&random, n_points) * d, d * sizeof *differences);
        /* One point is every key on its centroid. */
        if (n_points == 1) memset(differences, 0, n * d * sizeof *differences);
        struct built b = build(make_shape(1, 1, (uint32_t)d), n, words, differences, queries, 30, 1, 5);
        describe("%zu points, words %u, dim %zu, keys %zu", n_points, words, d, n);
        check_codes(&b.layer, 0);
        check_reading(&b.layer, 0, queries, 3);
        /* Keys are rounded to F16 as well, so points are spread by 2^-11 of a key of length sqrt(2 d). */
        const double left = unexplained(&b.layer, 0, queries + 30 * d, 10);
        if (n_points > 1) check_true("variance left", 0, sqrt(left), 0, sqrt(left) < 16 * HALF_UNIT);
        free_built(&b);
        free(offsets);
        free(differences);
        free(queries);
    }
}

/* Queries of no length, of the shortest and the longest of F16; keys as long as F16 allows. Codes tell the same of a
 * key whatever the length of the kept queries; nothing comes to infinity. */
static void any_length(void **unused)
{
    (void)unused;
    static const double lengths[] = {0, 1e-4, 1, 1e3, 2e4}, key_lengths[] = {1e-3, 1, 300, 2e4};
    for (size_t k = 0; k < COUNT(key_lengths); k++) {
        const size_t d = 64, n = 600;
        double left[COUNT(lengths)];
        float *test = correlated(10, d, 100, 1, 80);
        for (size_t i = 0; i < COUNT(lengths); i++) {
            float *differences = correlated(n, d, 100, 0.5 * key_lengths[k], 4);
            float *queries = correlated(40, d, 100, lengths[i], 80);
            struct built b = build(make_shape(1, 1, 64), n, 1, differences, queries, 40, 1, 9);
            describe("queries of length %g, keys of length %g", lengths[i], key_lengths[k]);
            check_codes(&b.layer, 0);
            for (size_t e = 0; e < SQZ_CODE_ENTRIES * b.layer.codes.n_directions; e++) {
                const double entry = half_value(b.layer.codes.book[e]);
                check_true("entry", e, entry, 0, isfinite(entry));
            }
            left[i] = unexplained(&b.layer, 0, test, 10);
            check_true("variance left", i, left[i], 1, left[i] < (lengths[i] > 0 ? 0.3 : 0.6));
            free_built(&b);
            free(differences);
            free(queries);
        }
        /* F16 rounds the shortest to a few bits. */
        for (size_t i = 3; i < COUNT(lengths); i++) check_close("as at length 1", i, left[i], left[2], 0.02);
        free(test);
    }
}

/* Keys and queries that are no numbers spoil what is said of them, but lead nothing astray: parts stay in order, a lookup
 * returns rows that are there. */
static void no_numbers(void **unused)
{
    (void)unused;
    static const float bad[] = {NAN, INFINITY, -INFINITY, 65504};
    for (size_t i = 0; i < 2 * COUNT(bad); i++) {
        enum { D = 48, N = 300 };
        float *differences = random_floats(N * D, 3, 1), *queries = random_floats(20 * D, 4, 1);
        for (size_t j = 0; j < N * D; j += 97 * 48 + 1)
            *(i % 2 ? &queries[j % (20 * D)] : &differences[j]) = bad[i / 2];
        struct built b = build(make_shape(1, 1, D), N, 1 + (uint32_t)i % 4, differences, queries, 20, 1, 9);
        const struct sqz_codes *codes = &b.layer.codes;
        describe("%g among the %s", (double)bad[i / 2], i % 2 ? "queries" : "keys");
        check_close("last part", 0, codes->first[8 * codes->n_words], codes->n_directions, 0);
        for (size_t p = 0; p < 8 * codes->n_words; p++)
            check_true("parts", p, codes->first[p], codes->first[p + 1], codes->first[p] <= codes->first[p + 1]);
        const struct sqz_head_plan plan = {-5, 0, 0.5f};
        const float base = 1, norm = D;
        struct sqz_selection s;
        struct guarded workspace = workspace_take(sqz_lookup_workspace_bytes(&b.layer, 1));
        sqz_lookup(&s, &b.layer, 0, &plan, queries, &norm, 1, &base, 0, workspace.data);
        for (size_t r = 0; r < s.n_ranges; r++)
            check_true("range", r, s.ranges[r].begin, s.ranges[r].end,
                       s.ranges[r].begin < s.ranges[r].end && s.ranges[r].end <= N);
        check_true("pruned", 0, (double)s.n_pruned, b.layer.level[0].n_clusters,
                   s.n_pruned <= b.layer.level[0].n_clusters);
        guarded_free(workspace);
        free_built(&b);
        free(differences);
        free(queries);
    }
}

/* ---- Keys that only codes find ------------------------------------------------------------------- */

/* Clusters of about 20 keys, in every third of which one key answers queries that look nowhere else: 10 deviations out
 * along a way of its own. Its centroid is a twentieth of the way there, so the cluster's score stays below the
 * threshold that the key itself passes by far. Clusters whose keys are expected to stay below are not opened, so some
 * needles stay where they are: 3 of 20, measured. */
static void needles(void **unused)
{
    (void)unused;
    enum { D = 64, N = 1200, NEEDLES = 20, QUERIES = 64 };
    const struct sqz_layer_shape shape = make_shape(1, 1, D);
    float *differences = random_floats(N * D, 3, 0.25), *queries = take(QUERIES * D, sizeof *queries);
    float *ways = random_floats(NEEDLES * D, 4, 1);
    double *kinds = random_rotation(D, 5);
    struct sqz_random random;
    sqz_random_seed(&random, 6);
    /* Ways lie in the 16 directions in which this head's queries differ. */
    for (size_t i = 0; i < NEEDLES; i++) {
        double way[D] = {0}, norm = 0;
        for (size_t a = 0; a < 16; a++) {
            const double along = gauss(&random);
            for (size_t j = 0; j < D; j++) way[j] += along * kinds[a * D + j];
        }
        for (size_t j = 0; j < D; j++) norm += way[j] * way[j];
        for (size_t j = 0; j < D; j++) ways[i * D + j] = (float)(way[j] / sqrt(norm));
    }
    for (size_t i = 0; i < NEEDLES; i++)
        for (size_t j = 0; j < D; j++) differences[(i * 60 + 7) * D + j] += 2.5f * ways[i * D + j];
    for (size_t t = 0; t < QUERIES; t++)
        for (size_t j = 0; j < D; j++) {
            double x = 0;
            for (size_t a = 0; a < 16; a++) x += gauss(&random) * kinds[a * D + j];
            queries[t * D + j] = (float)(5 * x);
        }
    struct built b = build(shape, N, 1, differences, queries, QUERIES, 0.1, 9);
    struct sqz_layer without = b.layer;
    without.codes = (struct sqz_codes){0};
    size_t by_codes = 0, by_centroids = 0, rows_by_codes = 0;
    for (uint32_t i = 0; i < NEEDLES; i++) {
        const uint32_t row = i * 60 + 7;
        float q[D], norm = 0;
        for (size_t j = 0; j < D; j++) q[j] = 30 * ways[i * D + j];
        for (size_t j = 0; j < D; j++) norm += q[j] * q[j];
        const float base = 6; /* log of the mass of fixed rows: keys of no importance stay far below the threshold */
        const struct sqz_head_plan plan = {-6, 0, 0};
        for (int codes = 0; codes < 2; codes++) {
            const struct sqz_layer *layer = codes ? &b.layer : &without;
            struct sqz_selection s;
            struct guarded workspace = workspace_take(sqz_lookup_workspace_bytes(layer, 1));
            sqz_lookup(&s, layer, 0, &plan, q, &norm, 1, &base, 0, workspace.data);
            bool found = false;
            for (size_t r = 0; r < s.n_ranges; r++) found |= s.ranges[r].begin <= row && row < s.ranges[r].end;
            if (codes) {
                by_codes += found;
                rows_by_codes += s.n_retained;
            } else {
                by_centroids += found;
            }
            guarded_free(workspace);
        }
    }
    describe("needles");
    check_true("needles found by codes", 0, (double)by_codes, NEEDLES, by_codes >= NEEDLES * 3 / 4);
    check_true("needles found by centroids", 0, (double)by_centroids, 0, by_centroids <= NEEDLES / 10);
    check_true("keys retained by codes", 0, (double)rows_by_codes, 0.03 * N * NEEDLES,
               (double)rows_by_codes <= 0.03 * N * NEEDLES);
    free_built(&b);
    free(kinds);
    free(ways);
    free(differences);
    free(queries);
}

/* What does not fit is a size that no allocation satisfies, never a small one. */
static void workspace_sizes(void **unused)
{
    struct sqz_layer layer = {.shape = make_shape(8, 8, 256), .n_rows = INT32_MAX, .n_levels = 1};
    (void)unused;
    layer.codes.n_words = SQZ_CODE_MAX_WORDS;
    layer.codes.n_directions = sqz_code_directions(SQZ_CODE_MAX_WORDS, 256);
    assert_int_equal(layer.codes.n_directions, 96);
    assert_true(sqz_code_build_workspace_bytes(&layer) > (size_t)INT32_MAX * 96 * sizeof(float));
    layer.n_rows = 1000;
    assert_true(sqz_code_build_workspace_bytes(&layer) < 8 << 20);
    assert_int_equal(sqz_code_directions(0, 64), 0);
    assert_int_equal(sqz_code_directions(1, 64), SQZ_CODE_DIRECTIONS);
    assert_int_equal(sqz_code_directions(4, 32), 32);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(cholesky),        cmocka_unit_test(eigenvectors),         cmocka_unit_test(stored_and_read),
        cmocka_unit_test(absent),          cmocka_unit_test(most_of_the_variance), cmocka_unit_test(few_points),
        cmocka_unit_test(any_length),      cmocka_unit_test(no_numbers),           cmocka_unit_test(needles),
        cmocka_unit_test(workspace_sizes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
