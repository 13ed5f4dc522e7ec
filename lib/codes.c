/* Codes of single keys; codes.h explains them. */
#include "codes.h"

#include <math.h>
#include <string.h>

#include "arena.h"
#include "kernels.h"
#include "symmetric.h"

enum {
    SAMPLE_ROWS = 4096, /* keys that entries are found from: 256 for each */
    ITERATIONS = 10
};

/* Added to the second moment of the queries, as a share of its mean eigenvalue: directions that no kept query looked
 * along may matter to a later one. */
static const double query_floor = 0.02;

static const float largest_half = 65504.0f;

uint32_t sqz_code_directions(uint32_t n_words, uint32_t head_dim)
{
    const uint32_t wanted = SQZ_CODE_DIRECTIONS * n_words;
    return wanted < head_dim ? wanted : head_dim;
}

struct buffers {
    double *query_moment, *difference_moment, *product, *vectors; /* [D][D] */
    double *values;                                               /* [D] */
    float *to_key;                                                /* [M][D] coordinates of a difference */
    float *coordinates;                                           /* [n][M] of all clustered keys */
    float *sample;                                                /* [SAMPLE_ROWS][M] of one part */
    float *row, *centroid;                                        /* [D] */
    float *distance;  /* [SAMPLE_ROWS] of the sample to the entry it is nearest to */
    uint32_t *chosen; /* [M] which eigenvector each direction is, part by part */
};

static struct buffers carve(struct sqz_arena *arena, const struct sqz_layer *layer)
{
    const size_t d = layer->shape.head_dim, m = layer->codes.n_directions, n = layer->n_rows - layer->n_fixed;
    struct buffers b;
    b.query_moment = sqz_arena_take(arena, d, d, sizeof(double));
    b.difference_moment = sqz_arena_take(arena, d, d, sizeof(double));
    b.product = sqz_arena_take(arena, d, d, sizeof(double));
    b.vectors = sqz_arena_take(arena, d, d, sizeof(double));
    b.values = sqz_arena_take(arena, d, 1, sizeof(double));
    b.to_key = sqz_arena_take(arena, m, d, sizeof(float));
    b.coordinates = sqz_arena_take(arena, n, m, sizeof(float));
    b.sample = sqz_arena_take(arena, SAMPLE_ROWS, m, sizeof(float));
    b.row = sqz_arena_take(arena, d, 1, sizeof(float));
    b.centroid = sqz_arena_take(arena, d, 1, sizeof(float));
    b.distance = sqz_arena_take(arena, SAMPLE_ROWS, 1, sizeof(float));
    b.chosen = sqz_arena_take(arena, m, 1, sizeof(uint32_t));
    return b;
}

size_t sqz_code_build_workspace_bytes(const struct sqz_layer *layer)
{
    struct sqz_arena arena = sqz_arena_on(NULL);
    carve(&arena, layer);
    return sqz_arena_bytes(&arena);
}

/* Writable view of an array the builder owns. */
static void *writable(const void *p)
{
    return (void *)(uintptr_t)p;
}

/* ---- Directions ---------------------------------------------------------------------- */

/* moment += row row^T, its lower triangle. */
static void add_moment(double *moment, const float *row, size_t d)
{
    for (size_t i = 0; i < d; i++)
        for (size_t j = 0; j <= i; j++) moment[i * d + j] += (double)row[i] * row[j];
}

static void finish_moment(double *moment, size_t d, double n)
{
    for (size_t i = 0; i < d; i++)
        for (size_t j = 0; j <= i; j++) moment[j * d + i] = moment[i * d + j] /= n;
}

/* Relative to its mean eigenvalue, so that the F16 of directions and entries hold whatever length queries have, zero
 * included: directions are numbers below 1 / sqrt(query_floor), entries about as large as the differences. */
static void query_moment(const struct sqz_layer *layer, uint32_t head, struct buffers *b)
{
    const size_t d = layer->shape.head_dim, n_head = layer->shape.n_head, group = n_head / layer->shape.n_head_kv;
    double mean = 0;
    memset(b->query_moment, 0, d * d * sizeof *b->query_moment);
    for (size_t t = 0; t < layer->n_queries; t++)
        for (size_t g = 0; g < group; g++) {
            sqz_kernels_get()->f16_to_f32(b->row, layer->queries + (t * n_head + head * group + g) * d, d);
            add_moment(b->query_moment, b->row, d);
        }
    finish_moment(b->query_moment, d, (double)(layer->n_queries * group));
    for (size_t i = 0; i < d; i++) mean += b->query_moment[i * d + i] / (double)d;
    for (size_t i = 0; i < d * d && mean > 0; i++) b->query_moment[i] /= mean;
    for (size_t i = 0; i < d; i++) b->query_moment[i * d + i] += query_floor;
}

/* Calls visit with every clustered key's difference to the centroid as the lookup knows it. */
static void each_difference(const struct sqz_layer *layer, uint32_t head, struct buffers *b,
                            void (*visit)(const struct sqz_layer *layer, struct buffers *b, size_t row))
{
    const size_t d = layer->shape.head_dim;
    const uint32_t n = layer->level[0].n_clusters;
    const uint32_t *offset = layer->level[0].offset + (size_t)head * (n + 1);
    const struct sqz_rows keys = sqz_rows_of_head(&layer->keys, layer->n_rows, d, head);
    const struct sqz_rows centroids = sqz_rows_of_head(&layer->level[0].centroids, n, d, head);
    for (uint32_t c = 0; c < n; c++) {
        sqz_rows_to_f32(b->centroid, &centroids, c, 1, d);
        for (uint32_t i = offset[c]; i < offset[c + 1]; i++) {
            sqz_rows_to_f32(b->row, &keys, layer->n_fixed + i, 1, d);
            for (size_t j = 0; j < d; j++) b->row[j] -= b->centroid[j];
            visit(layer, b, i);
        }
    }
}

static void visit_moment(const struct sqz_layer *layer, struct buffers *b, size_t row)
{
    (void)row;
    add_moment(b->difference_moment, b->row, layer->shape.head_dim);
}

static void visit_coordinates(const struct sqz_layer *layer, struct buffers *b, size_t row)
{
    const size_t d = layer->shape.head_dim, m = layer->codes.n_directions;
    for (size_t i = 0; i < m; i++) b->coordinates[row * m + i] = sqz_kernels_get()->dot(b->to_key + i * d, b->row, d);
}

/* values and vectors (rows) of L^T S_k L, the most valuable first; query_moment becomes L. */
static void find_directions(const struct sqz_layer *layer, uint32_t head, struct buffers *b)
{
    const size_t d = layer->shape.head_dim;
    query_moment(layer, head, b);
    sqz_cholesky(b->query_moment, d);
    memset(b->difference_moment, 0, d * d * sizeof *b->difference_moment);
    each_difference(layer, head, b, visit_moment);
    finish_moment(b->difference_moment, d, layer->n_rows - layer->n_fixed);
    const double *l = b->query_moment;
    /* product = S_k L, then vectors = L^T product; L is lower triangular. */
    for (size_t i = 0; i < d; i++)
        for (size_t j = 0; j < d; j++) {
            double sum = 0;
            for (size_t x = j; x < d; x++) sum += b->difference_moment[i * d + x] * l[x * d + j];
            b->product[i * d + j] = sum;
        }
    for (size_t i = 0; i < d; i++)
        for (size_t j = 0; j < d; j++) {
            double sum = 0;
            for (size_t x = i; x < d; x++) sum += l[x * d + i] * b->product[x * d + j];
            b->difference_moment[i * d + j] = sum;
        }
    sqz_symmetric_eigen(b->values, b->vectors, b->difference_moment, d);
}

static void share_directions(const struct sqz_layer *layer, uint32_t *first, struct buffers *b)
{
    double left[256], bits[256];
    uint32_t part_of[256];
    sqz_share_directions(layer->codes.n_directions, SQZ_CODE_PARTS * layer->codes.n_words, b->values, left, bits,
                         part_of, b->chosen, first);
}

/* Writes directions (V^T L^-1, for queries), their spread, and to_key (V^T L^T). */
static void write_directions(const struct sqz_layer *layer, uint32_t head, struct buffers *b)
{
    const size_t d = layer->shape.head_dim, m = layer->codes.n_directions;
    const double *l = b->query_moment;
    uint16_t *directions = (uint16_t *)writable(layer->codes.directions) + head * m * d;
    float *spread = (float *)writable(layer->codes.spread) + head * m;
    const float *variance = layer->level[0].variance + (size_t)head * layer->level[0].n_clusters;
    const uint32_t *offset = layer->level[0].offset + (size_t)head * (layer->level[0].n_clusters + 1);
    double mean = 0, solution[256];
    for (uint32_t c = 0; c < layer->level[0].n_clusters; c++) mean += variance[c] * (double)(offset[c + 1] - offset[c]);
    mean /= layer->n_rows - layer->n_fixed;
    for (size_t i = 0; i < m; i++) {
        const double *v = b->vectors + (size_t)b->chosen[i] * d;
        for (size_t j = 0; j < d; j++) {
            double sum = 0;
            for (size_t x = 0; x <= j; x++) sum += l[j * d + x] * v[x];
            b->to_key[i * d + j] = (float)sum;
        }
        for (size_t j = d; j-- > 0;) { /* L^T solution = v */
            double sum = v[j];
            for (size_t x = j + 1; x < d; x++) sum -= l[x * d + j] * solution[x];
            solution[j] = sum / l[j * d + j];
        }
        for (size_t j = 0; j < d; j++) b->row[j] = (float)solution[j];
        sqz_kernels_get()->f32_to_f16(directions + i * d, b->row, d);
        spread[i] = mean > 0 ? (float)(b->values[b->chosen[i]] / mean) : 0.0f;
    }
}

/* ---- Entries ----------------------------------------------------------------------------- */

static size_t nearest_entry(const float *x, const float *entries, size_t n_dim)
{
    size_t best = 0;
    float least = INFINITY;
    for (size_t e = 0; e < SQZ_CODE_ENTRIES; e++) {
        float distance = 0;
        for (size_t i = 0; i < n_dim; i++) {
            const float t = x[i] - entries[e * n_dim + i];
            distance += t * t;
        }
        if (distance < least) {
            least = distance;
            best = e;
        }
    }
    return best;
}

/* Starts from points far from one another: each next is the one farthest from those before. */
static void seed_entries(float *entries, const float *sample, size_t n, size_t n_dim, float *distance)
{
    size_t next = 0;
    for (size_t i = 0; i < n; i++) distance[i] = INFINITY;
    for (size_t e = 0; e < SQZ_CODE_ENTRIES; e++) {
        memcpy(entries + e * n_dim, sample + next * n_dim, n_dim * sizeof *entries);
        size_t farthest = 0;
        for (size_t i = 0; i < n; i++) {
            float t = 0;
            for (size_t j = 0; j < n_dim; j++) {
                const float x = sample[i * n_dim + j] - entries[e * n_dim + j];
                t += x * x;
            }
            distance[i] = t < distance[i] ? t : distance[i];
            farthest = distance[i] > distance[farthest] ? i : farthest;
        }
        next = farthest;
    }
}

/* k-means of a part's sample; an entry that loses all its points stays where it is. */
static void find_entries(float *entries, const float *sample, size_t n, size_t n_dim, float *distance)
{
    double sum[SQZ_CODE_ENTRIES][256];
    size_t count[SQZ_CODE_ENTRIES];
    seed_entries(entries, sample, n, n_dim, distance);
    for (int iteration = 0; iteration < ITERATIONS; iteration++) {
        memset(sum, 0, sizeof sum);
        memset(count, 0, sizeof count);
        for (size_t i = 0; i < n; i++) {
            const size_t e = nearest_entry(sample + i * n_dim, entries, n_dim);
            count[e]++;
            for (size_t j = 0; j < n_dim; j++) sum[e][j] += sample[i * n_dim + j];
        }
        for (size_t e = 0; e < SQZ_CODE_ENTRIES; e++)
            for (size_t j = 0; j < n_dim && count[e]; j++)
                entries[e * n_dim + j] = (float)(sum[e][j] / (double)count[e]);
    }
}

/* Entries and codes of one part. */
static void code_part(const struct sqz_layer *layer, uint32_t head, uint32_t part, struct buffers *b)
{
    const size_t m = layer->codes.n_directions, n = layer->n_rows - layer->n_fixed;
    const uint32_t *first = layer->codes.first + head * (SQZ_CODE_PARTS * layer->codes.n_words + 1);
    const size_t begin = first[part], n_dim = first[part + 1] - begin, n_sample = n < SAMPLE_ROWS ? n : SAMPLE_ROWS;
    const uint32_t word = part / SQZ_CODE_PARTS, shift = 4 * (part % SQZ_CODE_PARTS);
    uint32_t *words = (uint32_t *)writable(layer->codes.words) + ((size_t)head * layer->codes.n_words + word) * n;
    uint16_t *book = (uint16_t *)writable(layer->codes.book) + (size_t)head * SQZ_CODE_ENTRIES * m;
    float entries[SQZ_CODE_ENTRIES * 256];
    if (n_dim == 0) return;
    for (size_t i = 0; i < n_sample; i++)
        memcpy(b->sample + i * n_dim, b->coordinates + i * n / n_sample * m + begin, n_dim * sizeof *b->sample);
    find_entries(entries, b->sample, n_sample, n_dim, b->distance);
    for (size_t i = 0; i < SQZ_CODE_ENTRIES * n_dim; i++)
        entries[i] = fminf(fmaxf(entries[i], -largest_half), largest_half);
    for (size_t e = 0; e < SQZ_CODE_ENTRIES; e++) {
        sqz_kernels_get()->f32_to_f16(book + e * m + begin, entries + e * n_dim, n_dim);
        sqz_kernels_get()->f16_to_f32(entries + e * n_dim, book + e * m + begin, n_dim);
    }
    for (size_t i = 0; i < n; i++)
        words[i] |= (uint32_t)nearest_entry(b->coordinates + i * m + begin, entries, n_dim) << shift;
}

void sqz_code_build(const struct sqz_layer *layer, uint32_t head, void *workspace)
{
    const size_t n = layer->n_rows - layer->n_fixed, n_parts = SQZ_CODE_PARTS * layer->codes.n_words;
    struct sqz_arena arena = sqz_arena_on(workspace);
    struct buffers b = carve(&arena, layer);
    find_directions(layer, head, &b);
    share_directions(layer, (uint32_t *)writable(layer->codes.first) + head * (n_parts + 1), &b);
    write_directions(layer, head, &b);
    each_difference(layer, head, &b, visit_coordinates);
    memset((uint32_t *)writable(layer->codes.words) + (size_t)head * layer->codes.n_words * n, 0,
           layer->codes.n_words * n * sizeof(uint32_t));
    for (uint32_t part = 0; part < n_parts; part++) code_part(layer, head, part, &b);
}

/* ---- Reading --------------------------------------------------------------------------------- */

/* A query's 16 numbers for every part. */
static void fill_tables(float *tables, size_t word_stride, const struct sqz_codes *codes, const uint32_t *first,
                        const uint16_t *book, const float *coordinates, float scale)
{
    const size_t m = codes->n_directions;
    float entry[256];
    for (size_t e = 0; e < SQZ_CODE_ENTRIES; e++) {
        sqz_kernels_get()->f16_to_f32(entry, book + e * m, m);
        for (uint32_t p = 0; p < SQZ_CODE_PARTS * codes->n_words; p++) {
            float sum = 0;
            for (uint32_t i = first[p]; i < first[p + 1]; i++) sum += coordinates[i] * entry[i];
            tables[p / SQZ_CODE_PARTS * word_stride + p % SQZ_CODE_PARTS * SQZ_CODE_ENTRIES + e] = scale * sum;
        }
    }
}

void sqz_code_tables(float *tables, float *deviation, const struct sqz_layer *layer, uint32_t head,
                     const float *queries, size_t n_query_rows)
{
    const struct sqz_codes *codes = &layer->codes;
    const size_t d = layer->shape.head_dim, m = codes->n_directions, table = SQZ_CODE_PARTS * SQZ_CODE_ENTRIES;
    const uint16_t *directions = codes->directions + head * m * d;
    const float *spread = codes->spread + head * m, scale = layer->shape.scale;
    float coordinates[256];
    for (size_t r = 0; r < n_query_rows; r++) {
        float variance = 0;
        sqz_kernels_get()->row_logits(coordinates, m, queries + r * d, 1, directions, m, d, 1.0f);
        for (size_t i = 0; i < m; i++) variance += coordinates[i] * coordinates[i] * spread[i];
        deviation[r] = scale * sqrtf(variance);
        fill_tables(tables + r * table, n_query_rows * table, codes,
                    codes->first + head * (SQZ_CODE_PARTS * codes->n_words + 1),
                    codes->book + (size_t)head * SQZ_CODE_ENTRIES * m, coordinates, scale);
    }
}

void sqz_code_logits(float *logits, size_t stride, const float *tables, size_t n_query_rows,
                     const struct sqz_layer *layer, uint32_t head, size_t first_row, size_t n)
{
    const size_t n_rows = layer->n_rows - layer->n_fixed;
    sqz_kernels_get()->add_codes(logits, stride, tables, n_query_rows,
                                 layer->codes.words + (size_t)head * layer->codes.n_words * n_rows + first_row, n_rows,
                                 layer->codes.n_words, n);
}
