/*
 * What the tests of attention, lookup and building share: seeded rows that look
 * like keys (groups around centres, a common offset), queries that look for one
 * of the groups, workspaces that end at an inaccessible page, and attention in
 * double precision.
 *
 * Tolerance of an attention output. u = 2^-24. A logit is a sum of D products:
 * off by at most (D + 2) u times M, the largest sum of magnitudes scale |q_i k_i|
 * of any row. Each weight is an exponential with 4e-7 relative error and the
 * sums over n rows add n u. A weight and the denominator both have these errors,
 * hence the factor 2. The bound multiplies the sum of weight |value|, so it stays
 * far below what one dropped or doubled row of the tests changes.
 */
#ifndef SQZ_TESTS_LAYER_FIXTURE_H
#define SQZ_TESTS_LAYER_FIXTURE_H

#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* mmap's MAP_ANONYMOUS */
#endif

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "arena.h"
#include "kernels.h"
#include "random.h"
#include "squeeze.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define UNIT         0x1p-24
#define HALF_NAN     0x7e00
#define SENTINEL     12345.678f

enum { MAX_REFERENCE_ROWS = 8192, MAX_HEAD_DIM = 256 };

/* Where a check stands, for the message when it fails. */
static char fixture_where[320];

#if defined(__GNUC__) || defined(__clang__)
__attribute__((format(printf, 1, 2)))
#endif
static inline void
describe(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(fixture_where, sizeof fixture_where, format, arguments);
    va_end(arguments);
}

static inline void check_close(const char *op, size_t index, double got, double wanted, double tolerance)
{
    if (got == wanted) return; /* equal infinities too */
    if (!(fabs(got - wanted) <= tolerance))
        fail_msg("%s: variant %s, %s, index %zu: got %.9g, wanted %.9g, tolerance %.3g", op, sqz_kernels_get()->name,
                 fixture_where, index, got, wanted, tolerance);
}

static inline void check_true(const char *op, size_t index, double got, double wanted, bool ok)
{
    if (!ok)
        fail_msg("%s: variant %s, %s, index %zu: got %.9g, wanted %.9g", op, sqz_kernels_get()->name, fixture_where,
                 index, got, wanted);
}

static inline void *take(size_t count, size_t size)
{
    void *p = malloc(count > 0 ? count * size : 1);
    assert_non_null(p);
    return p;
}

/* ---- Memory that ends at an inaccessible page -------------------------------- */

struct guarded {
    char *map;
    size_t map_bytes;
    void *data; /* data + bytes is the first inaccessible byte */
};

static inline struct guarded guarded_take(size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
    struct guarded g = {NULL, whole + page, NULL};
    g.map = mmap(NULL, g.map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(g.map != MAP_FAILED);
    assert_int_equal(mprotect(g.map + whole, page, PROT_NONE), 0);
    g.data = g.map + whole - bytes;
    return g;
}

/* A workspace of which `bytes` are promised to be enough. Sizes contain what aligning the block may cost; the block
 * given here is aligned, so that part is left off and the last byte in use lies right before the guard. Filled with
 * NaNs: nothing may depend on what a workspace holds. */
static inline struct guarded workspace_take(size_t bytes)
{
    assert_true(bytes >= SQZ_ARENA_ALIGNMENT);
    struct guarded g = guarded_take(bytes - SQZ_ARENA_ALIGNMENT);
    memset(g.data, 0xff, bytes - SQZ_ARENA_ALIGNMENT);
    return g;
}

static inline void guarded_free(struct guarded g)
{
    munmap(g.map, g.map_bytes);
}

/* ---- Random rows ----------------------------------------------------------------- */

static inline double half_value(uint16_t h)
{
    static double table[65536];
    static bool filled;
    if (!filled) {
        for (uint32_t i = 0; i < 65536; i++) {
            const int exponent = (int)(i >> 10 & 31), mantissa = (int)(i & 1023);
            double v = exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024 + mantissa, exponent - 25);
            if (exponent == 31) v = mantissa ? (double)NAN : (double)INFINITY;
            table[i] = i >> 15 ? -v : v;
        }
        filled = true;
    }
    return table[h];
}

static inline double gauss(struct sqz_random *random)
{
    const double u = sqz_random_unit(random) + 0x1p-54;
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * sqz_random_unit(random));
}

static inline void to_half(uint16_t *out, const float *x, size_t n)
{
    sqz_kernels_get()->f32_to_f16(out, x, n);
}

static inline float *random_floats(size_t n, uint64_t seed, double magnitude)
{
    struct sqz_random random;
    float *x = take(n, sizeof *x);
    sqz_random_seed(&random, seed);
    for (size_t i = 0; i < n; i++) x[i] = (float)(magnitude * gauss(&random));
    return x;
}

static inline uint16_t *random_halves(size_t n, uint64_t seed, double magnitude)
{
    float *x = random_floats(n, seed, magnitude);
    uint16_t *h = take(n, sizeof *h);
    to_half(h, x, n);
    free(x);
    return h;
}

/* Keys of a layer around n_groups centres a KV head; queries look for the same centres when made with the same seed. */
struct material {
    struct sqz_layer_shape shape;
    size_t n_rows, n_groups;
    uint64_t seed;
    float *centres;          /* [K][groups][D] */
    uint16_t *keys, *values; /* F16 [K][n_rows][D] */
};

static inline struct sqz_layer_shape make_shape(uint32_t n_head, uint32_t n_head_kv, uint32_t head_dim)
{
    return (struct sqz_layer_shape){n_head, n_head_kv, head_dim, (float)(1 / sqrt((double)head_dim))};
}

static inline struct material make_material(struct sqz_layer_shape shape, size_t n_rows, size_t n_groups, uint64_t seed)
{
    const size_t d = shape.head_dim, k = shape.n_head_kv;
    struct material m = {shape,
                         n_rows,
                         n_groups,
                         seed,
                         random_floats(k * n_groups * d, seed, 1.0),
                         NULL,
                         random_halves(k * n_rows * d, seed + 1, 1.0)};
    struct sqz_random random;
    float *row = take(d, sizeof *row);
    m.keys = take(k * n_rows * d, sizeof *m.keys);
    sqz_random_seed(&random, seed + 2);
    for (size_t i = 0; i < k * n_rows; i++) {
        const float *centre = m.centres + (i / n_rows * n_groups + sqz_random_below(&random, n_groups)) * d;
        for (size_t j = 0; j < d; j++) row[j] = (float)(centre[j] + 0.35 * gauss(&random) + (j == 1 ? 3 : 0));
        to_half(m.keys + i * d, row, d);
    }
    free(row);
    return m;
}

/* F32 [n_tokens][H][D]. sharpness 1: a query's group has logits about sqrt(D) above the others. */
static inline float *make_queries(const struct material *m, size_t n_tokens, uint64_t seed, double sharpness)
{
    const size_t d = m->shape.head_dim, h = m->shape.n_head, group = h / m->shape.n_head_kv;
    struct sqz_random random;
    float *q = take(n_tokens * h * d, sizeof *q);
    sqz_random_seed(&random, seed);
    for (size_t i = 0; i < n_tokens * h; i++) {
        const float *centre = m->centres + (i % h / group * m->n_groups + sqz_random_below(&random, m->n_groups)) * d;
        for (size_t j = 0; j < d; j++) q[i * d + j] = (float)(sharpness * (centre[j] + 0.5 * gauss(&random)));
    }
    return q;
}

static inline void free_material(struct material *m)
{
    free(m->centres);
    free(m->keys);
    free(m->values);
}

/* ---- Attention in double precision ---------------------------------------------------- */

struct reference {
    size_t n;
    double magnitude;
    double logit[MAX_REFERENCE_ROWS]; /* the logarithm of a row's count included */
    const uint16_t *value[MAX_REFERENCE_ROWS];
};

struct reference_result {
    double lse, tolerance; /* relative, of weights; absolute, of lse */
    double out[MAX_HEAD_DIM], out_tolerance[MAX_HEAD_DIM];
};

static inline double exact_logit(const float *query, const uint16_t *key, size_t d, double scale, double *magnitude)
{
    double sum = 0, total = 0;
    for (size_t i = 0; i < d; i++) {
        const double x = query[i] * half_value(key[i]);
        sum += x;
        total += fabs(x);
    }
    if (magnitude && scale * total > *magnitude) *magnitude = scale * total;
    return scale * sum;
}

static inline void reference_reset(struct reference *r)
{
    r->n = 0;
    r->magnitude = 0;
}

static inline void reference_add_logit(struct reference *r, double logit, const uint16_t *value)
{
    assert_true(r->n < MAX_REFERENCE_ROWS);
    r->logit[r->n] = logit;
    r->value[r->n++] = value;
}

static inline void reference_add(struct reference *r, const float *query, const uint16_t *key, const uint16_t *value,
                                 size_t d, double scale)
{
    reference_add_logit(r, exact_logit(query, key, d, scale, &r->magnitude), value);
}

static inline double reference_lse(const struct reference *r)
{
    double maximum = (double)-INFINITY, sum = 0;
    for (size_t i = 0; i < r->n; i++) maximum = fmax(maximum, r->logit[i]);
    for (size_t i = 0; i < r->n; i++) sum += exp(r->logit[i] - maximum);
    return r->n ? maximum + log(sum) : (double)-INFINITY;
}

static inline void reference_finish(const struct reference *r, size_t d, struct reference_result *result)
{
    result->lse = reference_lse(r);
    result->tolerance = 2 * (double)(d + 2) * UNIT * r->magnitude + 2 * ((double)r->n + 16) * UNIT + 2e-6;
    if (r->n) result->tolerance += 4 * UNIT * fabs(result->lse);
    memset(result->out, 0, sizeof result->out);
    memset(result->out_tolerance, 0, sizeof result->out_tolerance);
    for (size_t i = 0; i < r->n; i++) {
        const double weight = exp(r->logit[i] - result->lse);
        for (size_t j = 0; j < d; j++) {
            const double v = half_value(r->value[i][j]);
            result->out[j] += weight * v;
            result->out_tolerance[j] += weight * fabs(v);
        }
    }
    for (size_t j = 0; j < d; j++) result->out_tolerance[j] = result->out_tolerance[j] * result->tolerance + 1e-9;
}

#endif
