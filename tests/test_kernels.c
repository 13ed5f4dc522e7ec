/*
 * Every variant of every kernel, called directly through the table of variants,
 * against a double-precision reference written here.
 *
 * Buffers lie flush against an inaccessible page, at their end and then at
 * their start, with a pattern on the free side, so that any access outside is
 * a crash and any write outside is seen. Placing a buffer at the end of a page
 * also makes it unaligned for most sizes.
 *
 * Tolerances: u = 2^-24 is the rounding of one F32 operation. A sum of n
 * products in any order, fused or not, is off by at most about n u times the
 * sum of the magnitudes; two more u cover the factor in front and the last
 * addition, and 2^-126 what may be lost to subnormals. A kernel that drops or
 * doubles one of 256 terms is off by about 1/256 of that sum, 250 times more.
 */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* mmap's MAP_ANONYMOUS */
#endif

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels.h"
#include "squeeze.h"
#include "stride.h"

#define UNIT         0x1p-24
#define TINY         0x1p-126
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

struct variant {
    const struct sqz_kernels *kernels;
    bool supported;
};

/* Where a check stands, for the message when it fails. */
static struct {
    const char *op, *variant;
    char shape[128];
    uint64_t seed;
} where;

static const struct sqz_kernels *begin(void **state, const char *op)
{
    const struct variant *variant = *state;

    if (!variant->supported) {
        print_message("%s %s: not supported by this CPU, skipped\n", variant->kernels->name, op);
        skip();
    }
    where.op = op;
    where.variant = variant->kernels->name;
    where.shape[0] = '\0';
    where.seed = 0;
    return variant->kernels;
}

__attribute__((format(printf, 2, 3))) static void set_shape(uint64_t seed, const char *format, ...)
{
    va_list arguments;

    where.seed = seed;
    va_start(arguments, format);
    vsnprintf(where.shape, sizeof where.shape, format, arguments);
    va_end(arguments);
}

static void check(size_t index, double got, double wanted, double tolerance)
{
    const bool same = got == wanted || (isnan(got) && isnan(wanted));

    if (!same && (!isfinite(wanted) || !(fabs(got - wanted) <= tolerance))) {
        fail_msg("%s %s [%s] seed %llu index %zu: got %.9g, wanted %.9g, tolerance %.3g", where.op, where.variant,
                 where.shape, (unsigned long long)where.seed, index, got, wanted, tolerance);
    }
}

static void check_bits(size_t index, uint32_t got, uint32_t wanted)
{
    if (got != wanted) {
        fail_msg("%s %s [%s] seed %llu index %zu: got bits %08x, wanted %08x", where.op, where.variant, where.shape,
                 (unsigned long long)where.seed, index, got, wanted);
    }
}

/* ---- Random numbers and F16 ----------------------------------------------------------------------- */

static uint64_t random_state;

static uint64_t random_bits(void) /* splitmix64 */
{
    uint64_t z = random_state += UINT64_C(0x9e3779b97f4a7c15);

    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static float random_float(void) /* (-1, 1) */
{
    return (float)((double)(int64_t)random_bits() * 0x1p-63);
}

static float float_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t bits_from_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static double compute_f16(uint16_t half)
{
    const int exponent = half >> 10 & 31, mantissa = half & 0x3ff;
    const double sign = half & 0x8000 ? -1.0 : 1.0;

    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24));
}

static double f16_values[65536];

static double value_of_f16(uint16_t half)
{
    return f16_values[half];
}

static uint16_t f16_of_value(double value) /* round to nearest even; value is not NaN */
{
    const uint16_t sign = signbit(value) ? 0x8000 : 0;
    const double magnitude = fabs(value);
    int exponent;
    uint16_t steps;

    if (magnitude >= 65520.0) return sign | 0x7c00;
    exponent = magnitude < 0x1p-14 ? -14 : ilogb(magnitude);
    steps = (uint16_t)nearbyint(ldexp(magnitude, 10 - exponent)); /* 0 .. 2048, carries into the exponent by itself */
    return (uint16_t)(sign | (((exponent + 14) << 10) + steps));
}

/* ---- Guarded buffers -------------------------------------------------------------------------------- */

#define ARENA_BYTES  ((size_t)4 << 20)
#define MARGIN_BYTES 512
#define PATTERN      0xa5

enum place { AT_END, AT_START };

struct buffer {
    unsigned char *base; /* ARENA_BYTES between two inaccessible pages */
    unsigned char *data, *margin;
    size_t bytes;
};

static struct buffer buffers[8];

static void map_buffers(void)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);

    for (size_t i = 0; i < COUNT(buffers); i++) {
        unsigned char *map = mmap(NULL, ARENA_BYTES + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        if (map == MAP_FAILED || mprotect(map + page, ARENA_BYTES, PROT_READ | PROT_WRITE)) {
            perror("mmap");
            exit(1);
        }
        buffers[i].base = map + page;
    }
}

static void *place_buffer(size_t index, size_t bytes, enum place place)
{
    struct buffer *buffer = &buffers[index];

    assert_true(bytes + MARGIN_BYTES <= ARENA_BYTES);
    buffer->bytes = bytes;
    buffer->data = place == AT_END ? buffer->base + ARENA_BYTES - bytes : buffer->base;
    buffer->margin = place == AT_END ? buffer->data - MARGIN_BYTES : buffer->data + bytes;
    memset(buffer->margin, PATTERN, MARGIN_BYTES);
    return buffer->data;
}

static void check_margins(size_t n_buffers)
{
    for (size_t i = 0; i < n_buffers; i++) {
        for (size_t j = 0; j < MARGIN_BYTES; j++) {
            if (buffers[i].margin[j] != PATTERN) {
                fail_msg("%s %s [%s] seed %llu: buffer %zu of %zu bytes, wrote outside, margin byte %zu", where.op,
                         where.variant, where.shape, (unsigned long long)where.seed, i, buffers[i].bytes, j);
            }
        }
    }
}

static float *random_floats(size_t index, size_t n, enum place place)
{
    float *x = place_buffer(index, n * sizeof x[0], place);

    for (size_t i = 0; i < n; i++) x[i] = random_float();
    return x;
}

static uint16_t *random_halves(size_t index, size_t n, enum place place)
{
    uint16_t *x = place_buffer(index, n * sizeof x[0], place);

    for (size_t i = 0; i < n; i++) {
        /* one in 16 is a subnormal of either sign */
        x[i] = random_bits() % 16 ? f16_of_value(random_float()) : (uint16_t)(random_bits() & 0x83ff);
    }
    return x;
}

static const size_t sizes[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1023};
static const size_t head_dims[] = {32, 48, 64, 80, 96, 112, 128, 176, 240, 256};
static const uint64_t seeds[] = {1, 20, 300};

#define FOR_EACH_SEED_AND_PLACE(seed, place)                                                                           \
    for (size_t run_ = 0; run_ < 2 * (stride() > 1 ? 1 : COUNT(seeds)); run_++)                                        \
        for (int once_ = 1; once_; once_ = 0)                                                                          \
            for (const uint64_t seed = seeds[run_ / 2]; once_; once_ = 0)                                              \
                for (const enum place place = run_ % 2 ? AT_START : AT_END; once_; once_ = 0)

/* ---- Conversions ------------------------------------------------------------------------------------ */

static void test_f16_to_f32(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "f16_to_f32");

    for (size_t s = 0; s < COUNT(sizes); s++) {
        FOR_EACH_SEED_AND_PLACE(seed, place)
        {
            const size_t n = sizes[s];
            uint16_t *src;
            float *dst;

            random_state = seed;
            set_shape(seed, "n %zu", n);
            src = place_buffer(0, n * sizeof src[0], place);
            dst = random_floats(1, n, place);
            for (size_t i = 0; i < n; i++) src[i] = (uint16_t)random_bits();
            kernels->f16_to_f32(dst, src, n);
            for (size_t i = 0; i < n; i++) check(i, dst[i], value_of_f16(src[i]), 0.0);
            check_margins(2);
        }
    }
}

static void test_f16_all_values(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "all F16 values");
    uint16_t *half = place_buffer(0, 65536 * sizeof half[0], AT_END);
    uint16_t *back = place_buffer(1, 65536 * sizeof back[0], AT_END);
    float *single = place_buffer(2, 65536 * sizeof single[0], AT_END);

    for (uint32_t i = 0; i < 65536; i++) half[i] = (uint16_t)i;
    kernels->f16_to_f32(single, half, 65536);
    kernels->f32_to_f16(back, single, 65536);
    for (uint32_t i = 0; i < 65536; i++) {
        const double value = value_of_f16(half[i]);

        if (isnan(value)) { /* stays a NaN of the same sign and payload, made quiet */
            check_bits(i, bits_from_float(single[i]), (i & 0x8000) << 16 | 0x7fc00000 | (i & 0x3ff) << 13);
            check_bits(i, back[i], i | 0x200);
        } else {
            check_bits(i, bits_from_float(single[i]), bits_from_float((float)value));
            check_bits(i, back[i], half[i]);
        }
    }
}

/* Around every F16 value: the value, half way to the next one, and the floats next to half way. */
static void test_f32_to_f16_rounding(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "f32_to_f16 rounding");
    const size_t n = 0x7c00 * 4;
    float *src = place_buffer(0, 2 * n * sizeof src[0], AT_END);
    uint16_t *dst = place_buffer(1, 2 * n * sizeof dst[0], AT_END);

    for (size_t i = 0; i < n; i += 4) {
        const uint16_t half = (uint16_t)(i / 4);
        const double value = value_of_f16(half), next = half == 0x7bff ? 65536.0 : value_of_f16(half + 1);
        const float middle = (float)((value + next) / 2);

        src[i] = (float)value;
        src[i + 1] = middle;
        src[i + 2] = nextafterf(middle, 0.0f);
        src[i + 3] = nextafterf(middle, INFINITY);
    }
    for (size_t i = 0; i < n; i++) src[n + i] = -src[i];
    kernels->f32_to_f16(dst, src, 2 * n);
    for (size_t i = 0; i < 2 * n; i++) {
        set_shape(0, "source %a", (double)src[i]);
        check_bits(i, dst[i], f16_of_value(src[i]));
    }
    check_margins(2);
}

static void test_f32_to_f16(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "f32_to_f16");
    static const float special[] = {0.0f,      -0.0f,    INFINITY, -INFINITY, FLT_MAX,  -FLT_MAX, 65504.0f,
                                    65519.99f, 65520.0f, 1e-45f,   -1e-45f,   0x1p-24f, 0x1p-25f, 0x1.8p-25f};

    for (size_t s = 0; s < COUNT(sizes); s++) {
        FOR_EACH_SEED_AND_PLACE(seed, place)
        {
            const size_t n = sizes[s];
            float *src;
            uint16_t *dst;

            random_state = seed;
            set_shape(seed, "n %zu", n);
            src = random_floats(0, n, place);
            dst = random_halves(1, n, place);
            for (size_t i = 0; i < n; i++) {
                const uint32_t bits = (uint32_t)random_bits();

                if (i % 3 == 0) src[i] = special[random_bits() % COUNT(special)];
                else if (i % 3 == 1 && !isnan(float_from_bits(bits))) src[i] = float_from_bits(bits);
            }
            kernels->f32_to_f16(dst, src, n);
            for (size_t i = 0; i < n; i++) check_bits(i, dst[i], f16_of_value(src[i]));
            check_margins(2);
        }
    }
    {
        const float nan_bits[2] = {float_from_bits(0x7fc12345), float_from_bits(0xff812345)}; /* quiet; signalling */
        uint16_t half[2];

        set_shape(0, "NaN");
        kernels->f32_to_f16(half, nan_bits, 2);
        check_bits(0, half[0], 0x7e09);
        check_bits(1, half[1], 0xfe09);
    }
}

/* ---- Row kernels -------------------------------------------------------------------------------------- */

#define SENTINEL 12345.0f

/* n_rows numbers of rows in random order, some twice, and some more behind them. NULL where rows are not listed. */
static uint32_t *random_list(size_t buffer, size_t n_rows, size_t n_listed, enum place place, bool listed)
{
    uint32_t *list = place_buffer(buffer, listed ? n_listed * sizeof *list : 0, place);

    for (size_t i = 0; listed && i < n_listed; i++) list[i] = (uint32_t)(random_bits() % n_rows);
    return listed ? list : NULL;
}

static void check_row_logits(const struct sqz_kernels *kernels, size_t n_rows, size_t head_dim, size_t n_queries,
                             uint64_t seed, enum place place, bool special, bool listed)
{
    const size_t n_listed = n_rows ? n_rows + seed % 100 : 0;
    const uint32_t *index;
    const size_t stride = n_rows + (seed & 1 ? 0 : 5);
    const float scale = 0.125f;
    const float *queries;
    uint16_t *rows;
    float *logits;

    random_state = seed;
    set_shape(seed, "rows %zu head_dim %zu queries %zu place %d special %d", n_rows, head_dim, n_queries, (int)place,
              special);
    queries = random_floats(0, n_queries * head_dim, place);
    rows = random_halves(1, n_rows * head_dim, place);
    if (special && n_rows) {
        rows[random_bits() % n_rows * head_dim + random_bits() % head_dim] = 0x7c00; /* infinity */
        rows[random_bits() % n_rows * head_dim + random_bits() % head_dim] = 0x7e00; /* NaN */
    }
    index = random_list(3, n_rows, n_listed, place, listed);
    /* The last query's row of logits may end with its last logit. */
    logits = random_floats(2, n_queries ? (n_queries - 1) * stride + n_rows : 0, place);
    for (size_t q = 0; q + 1 < n_queries; q++)
        for (size_t r = n_rows; r < stride; r++) logits[q * stride + r] = SENTINEL;
    if (listed)
        kernels->listed_logits(logits, stride, queries, n_queries, rows, index, n_rows, n_listed, head_dim, scale);
    else kernels->row_logits(logits, stride, queries, n_queries, rows, n_rows, head_dim, scale);
    for (size_t q = 0; q < n_queries; q++) {
        for (size_t r = 0; r < n_rows; r++) {
            const size_t at = listed ? index[r] : r;
            double sum = 0, size = 0;

            for (size_t i = 0; i < head_dim; i++) {
                const double product = (double)queries[q * head_dim + i] * value_of_f16(rows[at * head_dim + i]);
                sum += product;
                size += fabs(product);
            }
            check(q * stride + r, logits[q * stride + r], (double)scale * sum,
                  ((double)head_dim + 2) * UNIT * (double)scale * size + TINY);
        }
        for (size_t r = n_rows; q + 1 < n_queries && r < stride; r++)
            check(q * stride + r, logits[q * stride + r], SENTINEL, 0);
    }
    check_margins(4);
}

/* The whole grid with few rows, the large sizes on a part of it. */
static bool in_grid(size_t n_rows, size_t head_dim, size_t n_queries)
{
    const bool many_rows_here = (head_dim == 64 || head_dim == 176) && (n_queries <= 4 || n_queries == 7);

    if (passed_over((n_rows * 1000 + head_dim) * 100 + n_queries)) return false;
    return n_rows <= 33 || (n_rows <= 129 && n_queries <= 8) || many_rows_here;
}

static void check_row_logits_grid(const struct sqz_kernels *kernels, bool listed)
{
    for (size_t s = 0; s < COUNT(sizes); s++) {
        for (size_t d = 0; d < COUNT(head_dims); d++) {
            for (size_t n_queries = 1; n_queries <= SQZ_MAX_GROUP_QUERIES; n_queries++) {
                if (in_grid(sizes[s], head_dims[d], n_queries)) {
                    const uint64_t seed = seeds[(s + d + n_queries) % COUNT(seeds)];

                    check_row_logits(kernels, sizes[s], head_dims[d], n_queries, seed, AT_END, false, listed);
                    check_row_logits(kernels, sizes[s], head_dims[d], n_queries, seed + 1, AT_START, n_queries % 2,
                                     listed);
                }
            }
        }
    }
}

static void test_row_logits(void **state)
{
    check_row_logits_grid(begin(state, "row_logits"), false);
}

static void test_listed_logits(void **state)
{
    check_row_logits_grid(begin(state, "listed_logits"), true);
}

/* Exact but for the last steps: the largest sums, of 256 times 127 times 32767, fit 32-bit lanes. */
static void check_row_logits_i8(const struct sqz_kernels *kernels, size_t n_rows, size_t head_dim, size_t n_queries,
                                uint64_t seed, enum place place, bool largest, bool listed)
{
    const size_t n_listed = n_rows ? n_rows + seed % 100 : 0;
    const uint32_t *index;
    const size_t stride = n_rows + (seed & 1 ? 0 : 3), query_stride = (head_dim + 31) / 32 * 32;
    int16_t *queries = place_buffer(0, n_queries * query_stride * sizeof *queries, place);
    int8_t *rows = place_buffer(1, n_rows * head_dim, place);
    float *query_factor, *row_factor, *logits;

    random_state = seed;
    set_shape(seed, "rows %zu head_dim %zu queries %zu place %d largest %d", n_rows, head_dim, n_queries, (int)place,
              largest);
    query_factor = random_floats(2, n_queries, place);
    row_factor = random_floats(3, n_rows, place);
    logits = random_floats(4, (n_queries - 1) * stride + n_rows, place);
    index = random_list(5, n_rows, n_listed, place, listed);
    for (size_t i = 0; i < n_queries * query_stride; i++) {
        const bool padding = i % query_stride >= head_dim;

        queries[i] = padding ? 0 : (int16_t)(largest ? 32767 : (int)(random_bits() % 65535) - 32767);
    }
    for (size_t i = 0; i < n_rows * head_dim; i++)
        rows[i] = (int8_t)(largest ? -127 : (int)(random_bits() % 255) - 127);
    if (listed) {
        kernels->listed_logits_i8(logits, stride, queries, query_factor, n_queries, rows, row_factor, index, n_rows,
                                  n_listed, head_dim);
    } else {
        kernels->row_logits_i8(logits, stride, queries, query_factor, n_queries, rows, row_factor, n_rows, head_dim);
    }
    for (size_t q = 0; q < n_queries; q++) {
        for (size_t r = 0; r < n_rows; r++) {
            const size_t at = listed ? index[r] : r;
            double sum = 0, size = 0;

            for (size_t i = 0; i < head_dim; i++) {
                const double product = (double)queries[q * query_stride + i] * rows[at * head_dim + i];

                sum += product;
                size += fabs(product);
            }
            /* The lanes' sums are rounded to F32 and added. */
            check(q * n_rows + r, logits[q * stride + r], (double)query_factor[q] * row_factor[at] * sum,
                  8 * UNIT * fabs((double)query_factor[q] * row_factor[at]) * size + TINY);
        }
    }
    check_margins(6);
}

static void check_row_logits_i8_grid(const struct sqz_kernels *kernels, bool listed)
{
    for (size_t s = 0; s < COUNT(sizes); s++) {
        for (size_t d = 0; d < COUNT(head_dims); d++) {
            for (size_t n_queries = 1; n_queries <= SQZ_MAX_GROUP_QUERIES; n_queries++) {
                if (in_grid(sizes[s], head_dims[d], n_queries)) {
                    const uint64_t seed = seeds[(s + d + n_queries) % COUNT(seeds)];

                    check_row_logits_i8(kernels, sizes[s], head_dims[d], n_queries, seed, AT_END, false, listed);
                    check_row_logits_i8(kernels, sizes[s], head_dims[d], n_queries, seed + 1, AT_START, n_queries % 2,
                                        listed);
                }
            }
        }
    }
}

static void test_row_logits_i8(void **state)
{
    check_row_logits_i8_grid(begin(state, "row_logits_i8"), false);
}

static void test_listed_logits_i8(void **state)
{
    check_row_logits_i8_grid(begin(state, "listed_logits_i8"), true);
}

/* Three kinds of weights: most rows dead in an irregular pattern, all live, all dead. Dead rows hold NaNs, which would
 * spoil the sum even with weight zero. */
enum weights { WEIGHTS_SPARSE, WEIGHTS_ALL, WEIGHTS_NONE };

static void check_row_accumulate(const struct sqz_kernels *kernels, size_t n_rows, size_t head_dim, size_t n_queries,
                                 uint64_t seed, enum place place, enum weights kind)
{
    static double sum[SQZ_MAX_GROUP_QUERIES * 256], size[SQZ_MAX_GROUP_QUERIES * 256];
    const size_t stride = n_rows + (seed & 1 ? 0 : 5), n_out = n_queries * head_dim;
    const bool indexed = (n_queries + kind) % 2;
    size_t n_live = 0, n_read;
    uint16_t *rows;
    uint32_t *index;
    float *weights, *out;

    random_state = seed;
    set_shape(seed, "rows %zu head_dim %zu queries %zu place %d weights %d", n_rows, head_dim, n_queries, (int)place,
              (int)kind);
    weights = random_floats(0, (n_queries - 1) * stride + n_rows, place);
    rows = random_halves(1, n_rows * head_dim, place);
    out = random_floats(2, n_out, place);
    index = place_buffer(3, n_rows * sizeof index[0], place);
    for (size_t i = 0; i < n_out; i++) {
        sum[i] = out[i];
        size[i] = fabs(sum[i]);
    }
    for (size_t r = 0; r < n_rows; r++) {
        const size_t other = indexed ? random_bits() % (r + 1) : r; /* a random order, grown by exchanges */

        index[r] = (uint32_t)r;
        index[r] = index[other];
        index[other] = (uint32_t)r;
    }
    for (size_t r = 0; r < n_rows; r++) {
        uint16_t *row = rows + index[r] * head_dim;
        const bool dead = kind == WEIGHTS_NONE || (kind == WEIGHTS_SPARSE && random_bits() % 10 < 7);
        const size_t only = random_bits() % n_queries; /* in a sparse live row, one weight is surely not zero */

        n_live += !dead;
        for (size_t q = 0; q < n_queries; q++) {
            float *weight = weights + q * stride + r;

            if (dead || (kind == WEIGHTS_SPARSE && q != only && random_bits() % 2))
                *weight = random_bits() % 2 ? 0.0f : -0.0f;
            else if (*weight == 0.0f) *weight = 1.0f;
            for (size_t i = 0; !dead && i < head_dim; i++) {
                const double product = (double)*weight * value_of_f16(row[i]);
                sum[q * head_dim + i] += product;
                size[q * head_dim + i] += fabs(product);
            }
        }
        for (size_t i = 0; dead && i < head_dim; i++) row[i] = 0x7e00;
    }
    n_read = kernels->row_accumulate(out, weights, stride, n_queries, rows, indexed ? index : NULL, n_rows, head_dim);
    for (size_t i = 0; i < n_out; i++) check(i, out[i], sum[i], ((double)n_rows + 2) * UNIT * size[i] + TINY);
    check(n_out, (double)n_read, (double)n_live, 0);
    check_margins(3);
}

static void test_row_accumulate(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "row_accumulate");

    for (size_t s = 0; s < COUNT(sizes); s++) {
        for (size_t d = 0; d < COUNT(head_dims); d++) {
            for (size_t n_queries = 1; n_queries <= SQZ_MAX_GROUP_QUERIES; n_queries++) {
                if (in_grid(sizes[s], head_dims[d], n_queries)) {
                    const uint64_t seed = seeds[(s + d + n_queries) % COUNT(seeds)];
                    const size_t n = sizes[s], dim = head_dims[d];

                    check_row_accumulate(kernels, n, dim, n_queries, seed, AT_END, WEIGHTS_SPARSE);
                    check_row_accumulate(kernels, n, dim, n_queries, seed + 1, AT_START, WEIGHTS_SPARSE);
                    check_row_accumulate(kernels, n, dim, n_queries, seed, AT_END, WEIGHTS_ALL);
                    check_row_accumulate(kernels, n, dim, n_queries, seed + 1, AT_START, WEIGHTS_NONE);
                }
            }
        }
    }
}

/* Dead rows on inaccessible pages: reading one is a crash. */
static void test_row_accumulate_reads_live_rows_only(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "row_accumulate, pages of dead rows inaccessible");
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), head_dim = 128, per_page = page / (head_dim * 2);
    const size_t n_pages = 24, n_rows = n_pages * per_page;
    uint16_t *rows;
    float *weights, *out;
    size_t n_live = 0;

    random_state = 5;
    rows = random_halves(0, n_rows * head_dim, AT_START);
    weights = random_floats(1, 3 * n_rows, AT_END);
    out = random_floats(2, 3 * head_dim, AT_END);
    memset(out, 0, 3 * head_dim * sizeof out[0]);
    for (size_t r = 0; r < n_rows; r++) {
        const bool dead = r / per_page % 3 != 1;

        n_live += !dead;
        for (size_t q = 0; q < 3; q++) weights[q * n_rows + r] = dead ? 0.0f : 1.0f;
    }
    for (size_t p = 0; p < n_pages; p++)
        assert_int_equal(mprotect((unsigned char *)rows + p * page, page, p % 3 == 1 ? PROT_READ : PROT_NONE), 0);
    set_shape(5, "rows %zu head_dim %zu", n_rows, head_dim);
    check(0, (double)kernels->row_accumulate(out, weights, n_rows, 3, rows, NULL, n_rows, head_dim), (double)n_live, 0);
    assert_int_equal(mprotect(rows, n_pages * page, PROT_READ | PROT_WRITE), 0);
    for (size_t i = 0; i < head_dim; i++) {
        double sum = 0, size = 0;

        for (size_t r = 0; r < n_rows; r++) {
            const double x = r / per_page % 3 == 1 ? value_of_f16(rows[r * head_dim + i]) : 0.0;
            sum += x;
            size += fabs(x);
        }
        for (size_t q = 0; q < 3; q++)
            check(q * head_dim + i, out[q * head_dim + i], sum, ((double)n_rows + 2) * UNIT * size);
    }
}

/* ---- Vectors of floats ---------------------------------------------------------------------------------- */

/* ---- Rows in planes ------------------------------------------------------------------------------ */

/* Number i of a row, by the definition in squeeze_attention.h. */
static int plane_number(const uint8_t *upper, const uint8_t *lower, size_t i)
{
    const size_t byte = i / 32 * 16 + i % 16, shift = i % 32 / 16 * 4;
    const int u = upper[byte] >> shift & 15;

    return lower ? 16 * u + (lower[byte] >> shift & 15) : u;
}

static uint8_t *random_plane(size_t index, size_t bytes, enum place place)
{
    uint8_t *x = place_buffer(index, bytes, place);

    for (size_t i = 0; i < bytes; i++) x[i] = (uint8_t)random_bits();
    return x;
}

/* Exact but for the last steps; the largest sums fit. */
static void check_plane_logits(const struct sqz_kernels *kernels, size_t n_rows, size_t head_dim, size_t n_queries,
                               uint64_t seed, enum place place, bool largest, bool listed, bool both)
{
    const size_t n_listed = n_rows ? n_rows + seed % 100 : 0, bytes = (head_dim + 31) / 32 * 16;
    const size_t stride = n_rows + (seed & 1 ? 0 : 3), query_stride = 2 * bytes;
    int16_t *queries = place_buffer(0, n_queries * query_stride * sizeof *queries, place);
    uint8_t *upper, *lower;
    float *logits, *query_factor, *row_factor, *half;
    const uint32_t *index;

    random_state = seed;
    set_shape(seed, "rows %zu head_dim %zu queries %zu place %d largest %d listed %d both %d", n_rows, head_dim,
              n_queries, (int)place, largest, listed, both);
    upper = random_plane(1, n_rows * bytes, place);
    lower = random_plane(2, both ? n_rows * bytes : 0, place);
    query_factor = random_floats(3, n_queries, place);
    logits = random_floats(4, (n_queries - 1) * stride + n_rows, place);
    index = random_list(5, n_rows, n_listed, place, listed);
    row_factor = random_floats(6, n_rows, place);
    half = random_floats(7, n_queries, place);
    for (size_t i = 0; i < n_queries * query_stride; i++) {
        const bool padding = i % query_stride >= head_dim;

        queries[i] =
            padding ? 0
                    : (int16_t)(largest ? SQZ_PLANE_QUERY_MOST
                                        : (int)(random_bits() % (2 * SQZ_PLANE_QUERY_MOST + 1)) - SQZ_PLANE_QUERY_MOST);
    }
    if (largest) memset(upper, 0, n_rows * bytes), memset(lower, 0, both ? n_rows * bytes : 0);
    kernels->plane_logits(logits, stride, queries, query_factor, half, n_queries, upper, both ? lower : NULL,
                          row_factor, listed ? index : NULL, n_rows, n_listed, head_dim);
    for (size_t q = 0; q < n_queries; q++) {
        for (size_t r = 0; r < n_rows; r++) {
            const size_t at = (listed ? index[r] : r) * bytes;
            double sum = (double)half[q], size = fabs(sum), factor = (double)query_factor[q] * (double)row_factor[r];

            for (size_t i = 0; i < head_dim; i++) {
                const int u = plane_number(upper + at, both ? lower + at : NULL, i) - (both ? 128 : 8);
                const double product = (double)queries[q * query_stride + i] * u;

                sum += product;
                size += fabs(product);
            }
            /* The lanes' sums are rounded to F32 and added. */
            check(q * n_rows + r, logits[q * stride + r], factor * sum, 10 * UNIT * fabs(factor) * size + TINY);
        }
    }
    check_margins(8);
}

static void test_plane_logits(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "plane_logits");

    for (size_t s = 0; s < COUNT(sizes); s++) {
        for (size_t d = 0; d < COUNT(head_dims); d++) {
            for (size_t n_queries = 1; n_queries <= SQZ_MAX_GROUP_QUERIES; n_queries++) {
                if (in_grid(sizes[s], head_dims[d], n_queries)) {
                    const uint64_t seed = seeds[(s + d + n_queries) % COUNT(seeds)];

                    for (int kind = 0; kind < 4; kind++)
                        check_plane_logits(kernels, sizes[s], head_dims[d], n_queries, seed + (uint64_t)kind,
                                           kind % 2 ? AT_START : AT_END, (n_queries + s) % 3 == 0, kind & 1, kind & 2);
                }
            }
        }
    }
}

static void check_plane_sums(const struct sqz_kernels *kernels, size_t n_rows, size_t head_dim, size_t n_queries,
                             uint64_t seed, enum place place, bool both)
{
    const size_t bytes = (head_dim + 31) / 32 * 16, numbers = 2 * bytes, stride = n_rows + (seed & 1 ? 0 : 5);
    static double sum[SQZ_MAX_GROUP_QUERIES * 256], size[SQZ_MAX_GROUP_QUERIES * 256];
    uint8_t *upper, *lower;
    float *weights, *out, *row_factor;
    uint32_t *index;
    size_t n_live = 0;
    const bool indexed = (n_queries + n_rows) % 2;
    double most[SQZ_MAX_GROUP_QUERIES] = {0}; /* of weights times factors */
    const double middle = both ? 128 : 8;

    random_state = seed;
    set_shape(seed, "rows %zu head_dim %zu queries %zu place %d both %d", n_rows, head_dim, n_queries, (int)place,
              both);
    weights = random_floats(0, (n_queries - 1) * stride + n_rows, place);
    upper = random_plane(1, n_rows * bytes, place);
    out = random_floats(2, n_queries * numbers, place);
    index = place_buffer(3, n_rows * sizeof index[0], place);
    lower = random_plane(4, both ? n_rows * bytes : 0, place);
    row_factor = random_floats(5, n_rows, place);
    for (size_t r = 0; r < n_rows; r++) {
        const bool dead = random_bits() % 3 == 0; /* a third of the rows, whose factor would spoil the sum */

        index[r] = indexed ? (uint32_t)(random_bits() % n_rows) : (uint32_t)r;
        for (size_t q = 0; q < n_queries; q++) {
            float *w = weights + q * stride + r;

            *w = dead ? 0.0f : *w == 0.0f ? 1.0f : *w;
        }
        if (dead) row_factor[r] = NAN;
        n_live += !dead;
    }
    for (size_t i = 0; i < n_queries * numbers; i++) {
        sum[i] = out[i];
        size[i] = fabs(sum[i]);
        for (size_t r = 0; r < n_rows; r++) {
            const size_t at = index[r] * bytes;
            if (weights[i / numbers * stride + r] == 0.0f) continue;
            const double product = (double)weights[i / numbers * stride + r] * (double)row_factor[r] *
                                   plane_number(upper + at, both ? lower + at : NULL, i % numbers);

            sum[i] += product;
            size[i] += fabs(product);
            most[i / numbers] =
                fmax(most[i / numbers], fabs((double)weights[i / numbers * stride + r] * (double)row_factor[r]));
        }
    }
    const size_t n_read = kernels->plane_sums(out, weights, stride, n_queries, upper, both ? lower : NULL, row_factor,
                                              indexed ? index : NULL, n_rows, head_dim);
    for (size_t i = 0; i < n_queries * numbers; i++)
        /* A product may be off by half of a 32639th of the largest, times a number less its middle. */
        check(i, out[i], sum[i],
              ((double)n_rows + 3) * UNIT * (size[i] + (double)n_rows * middle * most[i / numbers]) +
                  (double)n_rows * most[i / numbers] / 65278 * middle + TINY);
    check(n_queries * numbers, (double)n_read, (double)n_live, 0);
    check_margins(6);
}

static void test_plane_sums(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "plane_sums");

    for (size_t s = 0; s < COUNT(sizes); s++) {
        for (size_t d = 0; d < COUNT(head_dims); d++) {
            for (size_t n_queries = 1; n_queries <= SQZ_MAX_GROUP_QUERIES; n_queries++) {
                if (in_grid(sizes[s], head_dims[d], n_queries)) {
                    const uint64_t seed = seeds[(s + d + n_queries) % COUNT(seeds)];

                    check_plane_sums(kernels, sizes[s], head_dims[d], n_queries, seed, AT_END, n_queries % 2);
                    check_plane_sums(kernels, sizes[s], head_dims[d], n_queries, seed + 1, AT_START, s % 2);
                }
            }
        }
    }
}

/* Against the matrix, entry by entry; twice with the right factor is nothing. */
static void test_turn(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "turn");

    for (size_t length = 16; length <= 256; length *= 2) {
        for (size_t runs = 1; runs * length <= 256; runs++) {
            const size_t n = runs * length;
            double wanted[256], size[256], before[256];
            float *x;

            random_state = seeds[runs % COUNT(seeds)];
            set_shape(random_state, "length %zu numbers %zu", length, n);
            x = random_floats(0, n, runs % 2 ? AT_END : AT_START);
            for (size_t i = 0; i < n; i++) {
                wanted[i] = size[i] = 0;
                before[i] = x[i];
                for (size_t j = i / length * length; j < i / length * length + length; j++) {
                    wanted[i] += __builtin_popcountll(i & j & (length - 1)) % 2 ? -(double)x[j] : (double)x[j];
                    size[i] += fabs((double)x[j]);
                }
            }
            kernels->turn(x, n, length, 0.25f);
            for (size_t i = 0; i < n; i++) check(i, x[i], 0.25 * wanted[i], 0.25 * 10 * UNIT * size[i] + TINY);
            kernels->turn(x, n, length, 4.0f / (float)length);
            for (size_t i = 0; i < n; i++) check(n + i, x[i], before[i], 20 * UNIT * size[i] + TINY);
            check_margins(1);
        }
    }
}

static void test_max(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "max");

    for (size_t s = 0; s < COUNT(sizes); s++) {
        FOR_EACH_SEED_AND_PLACE(seed, place)
        {
            const size_t n = sizes[s];
            float *x;

            random_state = seed;
            set_shape(seed, "n %zu", n);
            x = random_floats(0, n, place);
            for (size_t i = 0; i < n; i++) x[i] -= 10.0f; /* all negative: a lane that starts from 0 would show */
            for (size_t i = 0; i < n; i++) {              /* the largest at every place in turn */
                const float old = x[i];

                x[i] = -8.0f;
                check(i, kernels->max(x, n), -8.0, 0);
                x[i] = INFINITY;
                check(i, kernels->max(x, n), INFINITY, 0);
                x[i] = old;
            }
            for (size_t i = 0; i < n; i++) x[i] = -INFINITY;
            check(n, kernels->max(x, n), -INFINITY, 0);
            check_margins(1);
        }
    }
}

#define EXP_TOLERANCE 4e-7

/* The reference takes the difference as the kernel must, in F32: its rounding belongs to the argument. */
static void check_exp(size_t i, float x, float shift, float got, double *sum)
{
    const float argument = x - shift;
    const double wanted = exp((double)argument);

    if (argument >= -87.0f) check(i, got, wanted, EXP_TOLERANCE * wanted);
    else if (argument < -103.0f) check(i, got, 0.0, 0);
    else /* in between anything from zero to the true value's neighbourhood */
        check(i, got, 0.5 * wanted, (0.5 + EXP_TOLERANCE) * wanted + 0x1p-149);
    *sum += wanted;
}

static void test_exp_sum(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "exp_sum");

    for (size_t s = 0; s < COUNT(sizes); s++) {
        FOR_EACH_SEED_AND_PLACE(seed, place)
        {
            const size_t n = sizes[s];
            const float shift = 3.0f * (float)(seed % 7);
            static float before[1023];
            double sum = 0;
            float *x, got;

            random_state = seed;
            set_shape(seed, "n %zu", n);
            x = random_floats(0, n, place);
            for (size_t i = 0; i < n; i++) {
                const float part = 0.5f * (1.0f - fabsf(x[i]));
                static const float limits[] = {0.0f, -87.0f, -87.33f, -87.34f, -103.0f, -103.1f, -200.0f, -FLT_MAX};

                switch (random_bits() % 4) {
                case 0: x[i] = -INFINITY; break;
                case 1: x[i] = shift + limits[random_bits() % COUNT(limits)]; break;
                case 2: x[i] = shift - 8.0f * part; break;
                default: x[i] = shift - 120.0f * part; break;
                }
            }
            memcpy(before, x, n * sizeof x[0]);
            got = kernels->exp_sum(x, n, shift);
            for (size_t i = 0; i < n; i++) check_exp(i, before[i], shift, x[i], &sum);
            /* exponentials, then n additions; arguments between -103 and -87 may count or not */
            check(n, got, sum, (EXP_TOLERANCE + (double)(n + 1) * UNIT) * sum + (double)n * exp(-87.0));
            check_margins(1);
        }
    }
}

/* 4 million arguments over the whole range, and a few outside of it. */
static void test_exp_sum_accuracy(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "exp_sum accuracy");
    const size_t n = 4096;
    float *x = place_buffer(0, n * sizeof x[0], AT_END);
    float special[5] = {INFINITY, 88.0f, 89.0f, NAN, -1e30f};
    static float before[4096];
    double unused = 0, worst = 0;

    for (size_t block = 0; block < 1024; block++) {
        set_shape(0, "block %zu", block);
        for (size_t i = 0; i < n; i++) before[i] = (float)(-87.0 * ((double)(block * n + i) / (1024.0 * (double)n)));
        memcpy(x, before, n * sizeof x[0]);
        kernels->exp_sum(x, n, 0.0f);
        for (size_t i = 0; i < n; i++) {
            check_exp(i, before[i], 0.0f, x[i], &unused);
            worst = fmax(worst, fabs((double)x[i] / exp((double)before[i]) - 1.0));
        }
    }
    print_message("%s exp_sum: largest relative error %.3g\n", kernels->name, worst);
    set_shape(0, "special values");
    kernels->exp_sum(special, 5, 0.0f);
    check(0, special[0], INFINITY, 0);
    check(1, special[1], exp(88.0), EXP_TOLERANCE * exp(88.0));
    check(2, special[2], INFINITY, 0);
    check(3, special[3], NAN, 0);
    check(4, special[4], 0.0, 0);
}

/* multiply, add_scaled (also in place) and dot */
static void test_two_vectors(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "multiply, add_scaled, dot");

    for (size_t s = 0; s < COUNT(sizes); s++) {
        FOR_EACH_SEED_AND_PLACE(seed, place)
        {
            const size_t n = sizes[s];
            static float before[1023];
            double sum = 0, size = 0;
            float *x, *y, *z;
            const float factor = 0.75f * (float)(seed % 5) - 1.3f;

            random_state = seed;
            set_shape(seed, "n %zu", n);
            x = random_floats(0, n, place);
            y = random_floats(1, n, place);
            z = random_floats(2, n, place);
            for (size_t i = 0; i < n; i++) {
                sum += (double)x[i] * y[i];
                size += fabs((double)x[i] * y[i]);
            }
            check(n, kernels->dot(x, y, n), sum, ((double)n + 2) * UNIT * size + TINY);
            kernels->add_scaled(z, x, factor, y, n);
            for (size_t i = 0; i < n; i++) {
                check(i, z[i], x[i] + (double)factor * y[i],
                      2 * UNIT * (fabs((double)x[i]) + fabs((double)factor * y[i])) + TINY);
            }
            memcpy(before, x, n * sizeof x[0]);
            kernels->add_scaled(x, x, factor, y, n);
            for (size_t i = 0; i < n; i++) check(i, x[i], z[i], 0);
            memcpy(x, before, n * sizeof x[0]);
            kernels->multiply(x, y, n);
            for (size_t i = 0; i < n; i++)
                check(i, x[i], (double)before[i] * y[i], 2 * UNIT * fabs((double)before[i] * y[i]) + TINY);
            check_margins(3);
        }
    }
}

static void test_drop_below(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "drop_below");

    for (size_t s = 0; s < COUNT(sizes); s++) {
        for (size_t n_queries = 1; n_queries <= SQZ_MAX_GROUP_QUERIES; n_queries++) {
            const size_t n = sizes[s], stride = n + n_queries % 3;
            const float limit = 0.25f * (float)(n_queries % 5);
            static float before[SQZ_MAX_GROUP_QUERIES * 1025];
            float *weights, *sums;
            double wanted[SQZ_MAX_GROUP_QUERIES] = {0};

            random_state = s * 100 + n_queries;
            set_shape(random_state, "n %zu queries %zu", n, n_queries);
            weights = random_floats(0, (n_queries - 1) * stride + n, s % 2 ? AT_END : AT_START);
            sums = random_floats(1, n_queries, AT_END);
            for (size_t i = 0; i < (n_queries - 1) * stride + n; i++)
                weights[i] = random_bits() % 9 == 0 ? limit : fabsf(weights[i]) * (random_bits() % 3 ? 0.3f : 1.0f);
            memcpy(before, weights, ((n_queries - 1) * stride + n) * sizeof weights[0]);
            kernels->drop_below(weights, stride, n_queries, n, limit, sums);
            for (size_t i = 0; i < n; i++) {
                bool kept = false;

                for (size_t q = 0; q < n_queries; q++) kept = kept || before[q * stride + i] >= limit;
                for (size_t q = 0; q < n_queries; q++) {
                    const float w = kept ? before[q * stride + i] : 0.0f;

                    check(q * n + i, weights[q * stride + i], w, 0);
                    wanted[q] += w;
                }
            }
            for (size_t q = 0; q < n_queries; q++)
                check(q, sums[q], wanted[q], ((double)n + 1) * UNIT * wanted[q] + TINY);
            check_margins(2);
        }
    }
}

/* Sums of 8 numbers a word and the one before; an entry taken from another place is off by about one of them. */
static void test_add_codes(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "add_codes");
    static const size_t queries[] = {0, 1, 2, 3, 4, 5, 7, 16, 40};

    for (size_t s = 0; s < COUNT(sizes); s++) {
        for (size_t run = 0; run < 2 * COUNT(queries); run++) {
            const size_t n = sizes[s], n_queries = queries[run / 2], stride = n + run % 3, n_words = run % 5;
            const size_t word_stride = n + run % 4, n_out = n_queries ? (n_queries - 1) * stride + n : 0;
            const size_t n_all = n_words ? (n_words - 1) * word_stride + n : 0;
            const enum place place = run % 2 ? AT_START : AT_END;
            static float before[40 * 1025];
            float *out, *tables;
            uint32_t *words;

            random_state = s * 100 + run;
            set_shape(random_state, "n %zu queries %zu stride %zu words %zu place %d", n, n_queries, stride, n_words,
                      (int)place);
            out = random_floats(0, n_out, place);
            tables = random_floats(1, n_words * n_queries * 8 * 16, place);
            words = place_buffer(2, n_all * sizeof words[0], place);
            for (size_t i = 0; i < n_all; i++) words[i] = (uint32_t)random_bits();
            memcpy(before, out, n_out * sizeof out[0]);
            kernels->add_codes(out, stride, tables, n_queries, words, word_stride, n_words, n);
            for (size_t i = 0; i < n_out; i++) {
                const size_t q = i / stride, at = i % stride;
                double sum = before[i], magnitude = fabs(sum);

                for (size_t p = 0; p < 8 * n_words && at < n; p++) { /* what lies between rows stays as it was */
                    const uint32_t code = words[p / 8 * word_stride + at] >> 4 * (p % 8) & 15;
                    const double entry = tables[((p / 8 * n_queries + q) * 8 + p % 8) * 16 + code];

                    sum += entry;
                    magnitude += fabs(entry);
                }
                check(i, out[i], sum, at < n ? (8 * (double)n_words + 1) * UNIT * magnitude : 0);
            }
            check_margins(3);
        }
    }
}

/* Segments of 0 to 40 numbers: their values are repeated, and what lies in them is summed. */
static void test_segments(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "repeat, segment_sums");
    enum { MOST_SEGMENTS = 17, MOST_QUERIES = 5 };

    for (size_t run = 0; run < 600; run++) {
        const size_t n = run % (MOST_SEGMENTS + 1), n_queries = run / 3 % (MOST_QUERIES + 1);
        const size_t value_stride = n + run % 3;
        const enum place place = run % 2 ? AT_START : AT_END;
        uint32_t *counts;
        size_t n_numbers = 0, stride;
        float *values, *numbers, *sums;

        random_state = run;
        set_shape(run, "segments %zu queries %zu place %d", n, n_queries, (int)place);
        counts = place_buffer(0, n * sizeof counts[0], place);
        for (size_t i = 0; i < n; i++) {
            counts[i] = (uint32_t)(random_bits() % (run % 4 ? 41 : 9));
            n_numbers += counts[i];
        }
        stride = n_numbers + run % 5;
        values = random_floats(1, n_queries ? (n_queries - 1) * value_stride + n : 0, place);
        numbers = random_floats(2, n_queries ? (n_queries - 1) * stride + n_numbers : 0, place);
        kernels->repeat(numbers, stride, values, value_stride, n_queries, counts, n);
        for (size_t q = 0; q < n_queries; q++) {
            for (size_t s = 0, at = 0; s < n; s++)
                for (size_t i = 0; i < counts[s]; i++, at++)
                    check(at, numbers[q * stride + at], values[q * value_stride + s], 0);
        }
        check_margins(3);

        numbers = random_floats(2, n_queries ? (n_queries - 1) * stride + n_numbers : 0, place);
        sums = random_floats(3, n_queries ? (n_queries - 1) * value_stride + n : 0, place);
        kernels->segment_sums(sums, value_stride, numbers, stride, n_queries, counts, n);
        for (size_t q = 0; q < n_queries; q++) {
            for (size_t s = 0, at = 0; s < n; s++) {
                double sum = 0, magnitude = 0;

                for (size_t i = 0; i < counts[s]; i++, at++) {
                    sum += numbers[q * stride + at];
                    magnitude += fabs((double)numbers[q * stride + at]);
                }
                check(s, sums[q * value_stride + s], sum, counts[s] * UNIT * magnitude);
            }
        }
        check_margins(4);
    }
}

static void test_scale_max(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "scale_max");

    for (size_t s = 0; s < COUNT(sizes); s++) {
        FOR_EACH_SEED_AND_PLACE(seed, place)
        {
            const size_t n = sizes[s];
            static float before[2][1023];
            float *x, *largest;

            random_state = seed;
            set_shape(seed, "n %zu", n);
            x = random_floats(0, n, place);
            largest = random_floats(1, n, place);
            memcpy(before[0], x, n * sizeof x[0]);
            memcpy(before[1], largest, n * sizeof largest[0]);
            kernels->scale_max(largest, x, 0.9f, n);
            for (size_t i = 0; i < n; i++) {
                const float y = before[0][i] * 0.9f;

                check(i, x[i], y, 0);
                check(i, largest[i], y > before[1][i] ? y : before[1][i], 0);
            }
            check_margins(2);
        }
    }
}

static void test_list_at_least(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "list_at_least");
    static const float limits[] = {-INFINITY, -0.99f, 0.0f, 0.9f, INFINITY};

    for (size_t s = 0; s < COUNT(sizes); s++) {
        for (size_t run = 0; run < 2 * COUNT(limits); run++) {
            const size_t n = sizes[s];
            const float limit = limits[run / 2];
            const enum place place = run % 2 ? AT_START : AT_END;
            uint32_t *list;
            float *x;
            size_t n_wanted = 0, n_listed;

            random_state = s * 100 + run;
            set_shape(random_state, "n %zu limit %g place %d", n, (double)limit, (int)place);
            x = random_floats(0, n, place);
            for (size_t i = run % 3; i < n; i += 7) x[i] = i % 2 ? limit : i % 4 ? NAN : -INFINITY;
            list = place_buffer(1, n * sizeof list[0], place);
            n_listed = kernels->list_at_least(list, x, n, limit);
            for (size_t i = 0; i < n; i++) {
                if (x[i] >= limit) {
                    check(i, n_wanted < n_listed ? list[n_wanted] : -1.0, (double)i, 0);
                    n_wanted++;
                }
            }
            check(n, (double)n_listed, (double)n_wanted, 0);
            check_margins(2);
        }
    }
}

static void test_log_shifted(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "log_shifted");
    const float special[] = {0.0f, 0x1p-127f, 0x1p-126f, 1.0f, 0x1p127f, 0x1.6a09e6p-1f, 0x1.6a09e8p-1f};
    static float before[4096], copy[COUNT(special)];
    double worst = 0;

    for (size_t block = 0; block < 256; block++) { /* every exponent, and more of what is near 1 */
        float *x;

        random_state = block;
        set_shape(block, "block %zu", block);
        x = place_buffer(0, sizeof before, AT_END);
        for (size_t i = 0; i < COUNT(before); i++) {
            const uint32_t exponent = i % 4 ? 1 + (uint32_t)block % 254 : 126 + (uint32_t)(i % 8) / 4;

            before[i] = float_from_bits(exponent << 23 | ((uint32_t)random_bits() & 0x7fffff));
        }
        memcpy(x, before, sizeof before);
        kernels->log_shifted(x, 0.0f, COUNT(before));
        for (size_t i = 0; i < COUNT(before); i++) {
            const double wanted = log((double)before[i]), off = fabs((double)x[i] - wanted) / (1 + fabs(wanted));

            check(i, x[i], wanted, 2e-7 * (1 + fabs(wanted)));
            worst = fmax(worst, off);
        }
        check_margins(1);
    }
    print_message("%s log_shifted: largest error %.3g (1 + |log x|)\n", kernels->name, worst);
    memcpy(copy, special, sizeof special);
    kernels->log_shifted(copy, 2.5f, COUNT(special));
    for (size_t i = 0; i < COUNT(special); i++) {
        const double wanted = special[i] < 0x1p-126f ? -INFINITY : log((double)special[i]) + 2.5;

        check(i, copy[i], wanted, 4e-7 * (1 + fabs(wanted)));
    }
    for (size_t s = 0; s < COUNT(sizes); s++) {
        FOR_EACH_SEED_AND_PLACE(seed, place)
        {
            float *x;

            random_state = seed;
            set_shape(seed, "n %zu", sizes[s]);
            x = random_floats(0, sizes[s], place);
            for (size_t i = 0; i < sizes[s]; i++) before[i] = x[i] = fabsf(x[i]) + 1e-3f;
            kernels->log_shifted(x, -1.0f, sizes[s]);
            for (size_t i = 0; i < sizes[s]; i++) check(i, x[i], log((double)before[i]) - 1.0, 3e-6);
            check_margins(1);
        }
    }
}

static void test_scale(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "scale");

    for (size_t s = 0; s < COUNT(sizes); s++) {
        FOR_EACH_SEED_AND_PLACE(seed, place)
        {
            const size_t n = sizes[s];
            static float before[1023];
            float *x;

            random_state = seed;
            set_shape(seed, "n %zu", n);
            x = random_floats(0, n, place);
            memcpy(before, x, n * sizeof x[0]);
            kernels->scale(x, 1.7f, n);
            for (size_t i = 0; i < n; i++) check(i, x[i], before[i] * 1.7f, 0);
            check_margins(1);
        }
    }
}

static void test_argmax_biased(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "argmax_biased");

    for (size_t s = 0; s < COUNT(sizes); s++) {
        FOR_EACH_SEED_AND_PLACE(seed, place)
        {
            const size_t n = sizes[s];
            size_t wanted = 0;
            float *x, *bias, best;

            if (n == 0) continue;
            random_state = seed;
            set_shape(seed, "n %zu", n);
            x = place_buffer(0, n * sizeof x[0], place);
            bias = place_buffer(1, n * sizeof bias[0], place);
            for (size_t i = 0; i < n; i++) { /* few different sums, so that there are many equals */
                x[i] = (float)(random_bits() % 4) - 9.0f;
                bias[i] = (float)(random_bits() % 4) * 0.5f;
                wanted = x[i] + bias[i] > x[wanted] + bias[wanted] ? i : wanted;
            }
            check(n, (double)kernels->argmax_biased(x, bias, n, &best), (double)wanted, 0);
            check(n, best, x[wanted] + bias[wanted], 0);
            for (size_t i = 0; i < n; i++) { /* the largest at every place, and its equal at every later one */
                const size_t later = i + random_bits() % (n - i);
                const float old = x[i], old_later = x[later];

                x[i] = 5.0f - bias[i];
                x[later] = 5.0f - bias[later];
                check(i, (double)kernels->argmax_biased(x, bias, n, &best), (double)i, 0);
                check(i, best, 5.0, 0);
                x[later] = old_later;
                x[i] = old;
            }
            for (size_t i = 0; i < n; i++) x[i] = -INFINITY;
            check(n, (double)kernels->argmax_biased(x, bias, n, &best), 0.0, 0);
            check(n, best, -INFINITY, 0);
            check_margins(2);
        }
    }
}

/* ---- Matrices ------------------------------------------------------------------------------------------- */

static void test_transpose_f16(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "transpose_f16");

    for (size_t s = 0; s < COUNT(sizes); s++) {
        for (size_t d = 0; d < COUNT(head_dims); d++) {
            for (size_t extra = 0; extra <= 32; extra += 16) {
                const size_t n_rows = sizes[s], head_dim = head_dims[d];
                const size_t ld = (n_rows + SQZ_GEMM_N - 1) / SQZ_GEMM_N * SQZ_GEMM_N + extra;
                const enum place place = (s + d + extra / 16) % 2 ? AT_START : AT_END;
                const uint16_t *rows;
                float *dst;

                random_state = s + d;
                set_shape(random_state, "rows %zu head_dim %zu ld %zu", n_rows, head_dim, ld);
                rows = random_halves(0, n_rows * head_dim, place);
                dst = random_floats(1, ld * head_dim, place);
                kernels->transpose_f16(dst, ld, rows, n_rows, head_dim);
                for (size_t i = 0; i < head_dim; i++) {
                    for (size_t r = 0; r < ld; r++) {
                        const double wanted = r < n_rows ? value_of_f16(rows[r * head_dim + i]) : 0.0;
                        check(i * ld + r, dst[i * ld + r], wanted, 0);
                    }
                }
                check_margins(2);
            }
        }
    }
}

static void check_gemm(const struct sqz_kernels *kernels, size_t m, size_t n, size_t k, size_t gap, uint64_t seed,
                       enum place place, bool accumulate)
{
    static float before[600 * 1024];
    const size_t lda = k + gap, ldb = n + gap, ldc = n + gap;
    const float alpha = seed & 1 ? 1.0f : -0.37f;
    const float *a, *b;
    float *c;

    random_state = seed;
    set_shape(seed, "m %zu n %zu k %zu gap %zu place %d accumulate %d", m, n, k, gap, (int)place, accumulate);
    a = random_floats(0, m ? (m - 1) * lda + k : 0, place);
    b = random_floats(1, k ? (k - 1) * ldb + n : 0, place);
    c = random_floats(2, m ? (m - 1) * ldc + n : 0, place);
    if (!accumulate && m && n) c[0] = NAN; /* must be overwritten, not multiplied by zero */
    assert_true(m * ldc <= COUNT(before));
    memcpy(before, c, m ? ((m - 1) * ldc + n) * sizeof c[0] : 0);
    kernels->gemm(c, ldc, a, lda, b, ldb, m, n, k, alpha, accumulate);
    for (size_t i = 0; i < m; i++) {
        for (size_t j = 0; j < n; j++) {
            const double old = accumulate ? before[i * ldc + j] : 0.0;
            double sum = 0, size = 0;

            for (size_t l = 0; l < k; l++) {
                const double product = (double)a[i * lda + l] * b[l * ldb + j];
                sum += product;
                size += fabs(product);
            }
            check(i * ldc + j, c[i * ldc + j], old + (double)alpha * sum,
                  ((double)k + 2) * UNIT * (fabs((double)alpha) * size + fabs(old)) + TINY);
        }
        for (size_t j = n; i + 1 < m && j < ldc; j++) check(i * ldc + j, c[i * ldc + j], before[i * ldc + j], 0);
    }
    check_margins(3);
}

static void test_gemm(void **state)
{
    const struct sqz_kernels *kernels = begin(state, "gemm");
    static const size_t ms[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 31, 48, 65};
    static const size_t ns[] = {16, 32, 48, 64, 80, 112, 128, 144, 192, 400};
    static const size_t ks[] = {0, 1, 3, 32, 33, 64, 127, 257};

    for (size_t i = 0; i < COUNT(ms); i++) {
        for (size_t j = 0; j < COUNT(ns); j++) {
            for (size_t l = 0; l < COUNT(ks); l++) {
                const uint64_t seed = seeds[(i + j + l) % COUNT(seeds)];

                if (passed_over((ms[i] * 1000 + ns[j]) * 1000 + ks[l])) continue;
                check_gemm(kernels, ms[i], ns[j], ks[l], 0, seed, AT_END, l % 2);
                check_gemm(kernels, ms[i], ns[j], ks[l], 3, seed + 1, AT_START, !(l % 2));
            }
        }
    }
    check_gemm(kernels, 512, 64, 64, 0, 1, AT_END, false);
    check_gemm(kernels, 512, 64, 64, 7, 2, AT_START, true);
    check_gemm(kernels, 129, 1040, 64, 0, 3, AT_END, false);
    check_gemm(kernels, 33, 2048, 300, 0, 4, AT_START, true);
    /* k beyond what a variant may copy of b at a time */
    check_gemm(kernels, 33, 160, 1100, 0, 5, AT_END, false);
    check_gemm(kernels, 33, 160, 1100, 3, 6, AT_START, true);
}

/* ---- The table and the choice ------------------------------------------------------------------------------ */

static void test_table(void **state)
{
    const struct sqz_kernels *kernels, *before = sqz_kernels_get();
    struct sqz_variant_info info;
    size_t n = 0, n_chosen = 0;
    bool supported, chosen_is_listed = false;

    (void)state;
    for (size_t i = 0; (kernels = sqz_kernels_variant(i, &supported)); i++) {
        assert_int_equal(sqz_kernels_force(kernels->name), supported);
        if (supported) assert_ptr_equal(sqz_kernels_get(), kernels);
        chosen_is_listed |= kernels == before && supported;
        n++;
    }
    assert_true(n >= 1);
    assert_true(chosen_is_listed);
    assert_false(supported); /* past the end */
    assert_string_equal(sqz_kernels_variant(0, &supported)->name, "portable");
    assert_true(supported);
    assert_false(sqz_kernels_force("no such variant"));
    assert_true(sqz_kernels_force(before->name));

    for (size_t i = 0; sqz_variant_get(i, &info); i++) {
        assert_true(info.built || !info.supported);
        assert_true(info.supported || !info.chosen);
        assert_int_equal(info.chosen, strcmp(info.name, before->name) == 0);
        n -= info.built;
        n_chosen += info.chosen;
    }
    assert_int_equal(n, 0);
    assert_int_equal(n_chosen, 1);
}

/* Runs this program with features hidden; it prints the chosen variant. Returns the wait status. */
static int chosen_without(const char *features, char *name, size_t capacity)
{
    int ends[2], status;
    ssize_t n;
    pid_t child;

    assert_int_equal(pipe(ends), 0);
    child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        dup2(ends[1], STDOUT_FILENO);
        close(STDERR_FILENO);
        setenv("SQZ_DISABLE_CPU_FEATURES", features, 1);
        execl("/proc/self/exe", "test_kernels", "--chosen", (char *)NULL);
        _exit(127);
    }
    close(ends[1]);
    n = read(ends[0], name, capacity - 1);
    name[n > 0 ? n : 0] = '\0';
    close(ends[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    return status;
}

static void test_hidden_features(void **state)
{
    char name[32];
    int status;

    (void)state;
#if !defined(SQZ_TEST) || !defined(__linux__)
    print_message("hidden features: only in a build with SQZ_TEST, on Linux; skipped\n");
    skip();
#endif
    status = chosen_without("avx2", name, sizeof name);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_string_equal(name, "portable");
    status = chosen_without("avx512dq,f16c", name, sizeof name);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_string_equal(name, "portable");
    status = chosen_without("avx512f", name, sizeof name);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_null(strstr(name, "avx512"));
    status = chosen_without("avx512vnni", name, sizeof name);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_string_not_equal(name, "avx512-vnni");
    status = chosen_without("avx3", name, sizeof name);
    assert_false(WIFEXITED(status) && WEXITSTATUS(status) == 0); /* aborts on an unknown name */
    status = chosen_without("avx2,", name, sizeof name);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        CMUnitTestFunction function;
    } tests[] = {
        {"f16_to_f32", test_f16_to_f32},
        {"f16_all_values", test_f16_all_values},
        {"f32_to_f16", test_f32_to_f16},
        {"f32_to_f16_rounding", test_f32_to_f16_rounding},
        {"row_logits", test_row_logits},
        {"row_logits_i8", test_row_logits_i8},
        {"listed_logits", test_listed_logits},
        {"listed_logits_i8", test_listed_logits_i8},
        {"row_accumulate", test_row_accumulate},
        {"plane_logits", test_plane_logits},
        {"plane_sums", test_plane_sums},
        {"turn", test_turn},
        {"row_accumulate_reads_live_rows_only", test_row_accumulate_reads_live_rows_only},
        {"max", test_max},
        {"drop_below", test_drop_below},
        {"add_codes", test_add_codes},
        {"repeat, segment_sums", test_segments},
        {"scale_max", test_scale_max},
        {"list_at_least", test_list_at_least},
        {"log_shifted", test_log_shifted},
        {"multiply, add_scaled, dot", test_two_vectors},
        {"exp_sum", test_exp_sum},
        {"exp_sum_accuracy", test_exp_sum_accuracy},
        {"scale", test_scale},
        {"argmax_biased", test_argmax_biased},
        {"transpose_f16", test_transpose_f16},
        {"gemm", test_gemm},
    };
    enum { MAX_VARIANTS = 8 };
    static struct variant variants[MAX_VARIANTS];
    static char names[MAX_VARIANTS * COUNT(tests)][64];
    static struct CMUnitTest all[MAX_VARIANTS * COUNT(tests) + 2] = {
        cmocka_unit_test(test_table),
        cmocka_unit_test(test_hidden_features),
    };
    size_t n = 2;

    if (argc == 2 && strcmp(argv[1], "--chosen") == 0) {
        fputs(sqz_kernels_get()->name, stdout);
        return 0;
    }
    map_buffers();
    for (size_t i = 0; i < 65536; i++) f16_values[i] = compute_f16((uint16_t)i);
    for (size_t v = 0; v < MAX_VARIANTS; v++) {
        variants[v].kernels = sqz_kernels_variant(v, &variants[v].supported);
        for (size_t t = 0; variants[v].kernels && t < COUNT(tests); t++) {
            snprintf(names[n], sizeof names[n], "%s %s", variants[v].kernels->name, tests[t].name);
            all[n].name = names[n];
            all[n].test_func = tests[t].function;
            all[n].initial_state = &variants[v];
            n++;
        }
    }
    return _cmocka_run_group_tests("kernels", all, n, NULL, NULL) ? 1 : 0;
}
