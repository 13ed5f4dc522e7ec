/*
 * K-means and the hierarchy against double-precision brute force: objective,
 * optimality of the assignment, no empty cluster, order and offsets, hostile
 * points; its inner loops, every variant. The library stops when its objective
 * changes by less than 1e-4, so an assignment may cost at most that order more
 * than the best one.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cluster.h"
#include "cpu_features.h"
#include "kernels.h"
#include "kmeans_kernels.h"
#include "random.h"

#define STOP_SLACK 2e-3

struct shape {
    size_t n, dim;
    uint32_t k;
    enum sqz_metric metric;
    uint64_t seed;
    const char *data;
    int n_threads;
};

static void fail_shape(const struct shape *s, const char *op, size_t index, double got, double wanted)
{
    fail_msg("%s: variant %s, %s, n %zu, dim %zu, clusters %u, metric %d, seed %llu, index %zu: got %.9g, wanted %.9g",
             op, sqz_kernels_get()->name, s->data, s->n, s->dim, s->k, (int)s->metric, (unsigned long long)s->seed,
             index, got, wanted);
}

static void *allocate(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64 + (bytes == 0 ? 64 : 0));
    assert_non_null(p);
    return p;
}

static double gauss(struct sqz_random *random)
{
    const double u = sqz_random_unit(random) + 0x1p-54;
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * sqz_random_unit(random));
}

/* A mixture of n_groups elongated groups with heavy tails and a common offset, as keys have. */
static float *clustered_points(size_t n, size_t dim, size_t n_groups, uint64_t seed, double magnitude)
{
    struct sqz_random random;
    float *x = allocate(n * dim * sizeof *x);
    float *frame = allocate(n_groups * 3 * dim * sizeof *frame); /* centre and two axes */
    sqz_random_seed(&random, seed);
    for (size_t i = 0; i < n_groups * 3 * dim; i++) frame[i] = (float)gauss(&random);
    for (size_t p = 0; p < n; p++) {
        const float *centre = frame + sqz_random_below(&random, n_groups) * 3 * dim;
        const double stretch = 1 / sqrt(fabs(gauss(&random)) + 0.2);
        const double a = gauss(&random) * stretch, b = gauss(&random) * stretch;
        for (size_t i = 0; i < dim; i++) {
            const double v = 2 * centre[i] + 0.7 * a * centre[dim + i] + 0.4 * b * centre[2 * dim + i] +
                             0.2 * stretch * gauss(&random) + (i == 3 ? 5 : 0);
            x[p * dim + i] = (float)(v * magnitude);
        }
    }
    free(frame);
    return x;
}

/* ---- Reference --------------------------------------------------------------- */

struct reference {
    double objective; /* of the assignment */
    double best;      /* with every point moved to the nearest of the same centroids */
    double tolerance;
};

/* The points as documented: non-finite is 0; for cosine of length 1. */
static double *reference_points(const struct shape *s, const float *points, double *largest)
{
    double *x = allocate(s->n * s->dim * sizeof *x);
    *largest = 0;
    for (size_t p = 0; p < s->n; p++) {
        double square = 0;
        for (size_t i = 0; i < s->dim; i++) {
            const float v = points[p * s->dim + i];
            x[p * s->dim + i] = isfinite(v) ? (double)v : 0;
            square += x[p * s->dim + i] * x[p * s->dim + i];
            *largest = fmax(*largest, fabs(x[p * s->dim + i]));
        }
        for (size_t i = 0; s->metric == SQZ_METRIC_COSINE && i < s->dim; i++)
            x[p * s->dim + i] *= square > 0 ? 1 / sqrt(square) : 0;
    }
    return x;
}

static double *reference_centroids(const struct shape *s, const double *x, const uint32_t *assignment)
{
    double *c = allocate(s->k * s->dim * sizeof *c);
    uint32_t *size = allocate(s->k * sizeof *size);
    memset(c, 0, s->k * s->dim * sizeof *c);
    memset(size, 0, s->k * sizeof *size);
    for (size_t p = 0; p < s->n; p++) {
        if (assignment[p] >= s->k) fail_shape(s, "assignment in range", p, assignment[p], s->k);
        size[assignment[p]]++;
        for (size_t i = 0; i < s->dim; i++) c[assignment[p] * s->dim + i] += x[p * s->dim + i];
    }
    for (size_t j = 0; j < s->k; j++) {
        double square = 0;
        if (size[j] == 0) fail_shape(s, "cluster not empty", j, 0, 1);
        for (size_t i = 0; i < s->dim; i++) {
            c[j * s->dim + i] /= size[j];
            square += c[j * s->dim + i] * c[j * s->dim + i];
        }
        for (size_t i = 0; s->metric == SQZ_METRIC_COSINE && i < s->dim; i++)
            c[j * s->dim + i] *= square > 0 ? 1 / sqrt(square) : 0;
    }
    free(size);
    return c;
}

static double reference_cost(const struct shape *s, const double *x, const double *c)
{
    double dot = 0, square = 0;
    for (size_t i = 0; i < s->dim; i++) {
        dot += x[i] * c[i];
        square += (x[i] - c[i]) * (x[i] - c[i]);
    }
    return s->metric == SQZ_METRIC_COSINE ? 1 - dot : square;
}

/* Points are rounded to F32 after the mean is subtracted or the length set to 1: d = 2^-23 of the largest coordinate in
 * each of dim coordinates moves a distance by at most d sqrt(dim), its square as below; the cosine of unit vectors by
 * a few 2^-23. The relative part covers the last division. */
static double rounding(const struct shape *s, double objective, double largest)
{
    const double d = 2 * 0x1p-23 * largest;
    return s->metric == SQZ_METRIC_COSINE
               ? 1e-6
               : 1e-6 * objective + 2 * d * sqrt((double)s->dim * objective) + d * d * (double)s->dim;
}

static struct reference reference_of(const struct shape *s, const float *points, const uint32_t *assignment)
{
    struct reference r = {0, 0, 0};
    double largest;
    double *x = reference_points(s, points, &largest);
    double *c = reference_centroids(s, x, assignment);
    for (size_t p = 0; p < s->n; p++) {
        const double own = reference_cost(s, x + p * s->dim, c + assignment[p] * s->dim);
        double best = own;
        /* A point that is its own centroid has nothing to gain: spares the search where n_clusters is near n. */
        for (size_t j = 0; own > (s->metric == SQZ_METRIC_COSINE ? 1e-15 : 0) && j < s->k; j++)
            best = fmin(best, reference_cost(s, x + p * s->dim, c + j * s->dim));
        r.objective += own / (double)s->n;
        r.best += best / (double)s->n;
    }
    r.tolerance = rounding(s, r.objective, largest);
    free(x);
    free(c);
    return r;
}

static double run_kmeans(uint32_t *assignment, const struct shape *s, const float *points, uint32_t n_iterations)
{
    const struct sqz_kmeans_options options = {.n_clusters = s->k,
                                               .n_iterations = n_iterations,
                                               .metric = s->metric,
                                               .seed = s->seed,
                                               .n_threads = s->n_threads};
    const size_t bytes = sqz_kmeans_workspace_bytes(s->n, s->dim, &options);
    assert_true(bytes < SIZE_MAX / 2);
    void *workspace = allocate(bytes);
    memset(workspace, 0xff, bytes); /* NaN wherever something is read before it is written */
    memset(assignment, 0xff, s->n * sizeof *assignment);
    const double objective = sqz_kmeans(assignment, points, s->n, s->dim, &options, workspace);
    free(workspace);
    return objective;
}

static void check(const struct shape *s, const float *points)
{
    uint32_t *assignment = allocate(s->n * sizeof *assignment);
    const double objective = run_kmeans(assignment, s, points, 200);
    const struct reference r = reference_of(s, points, assignment);
    if (!(fabs(objective - r.objective) <= r.tolerance)) fail_shape(s, "objective", 0, objective, r.objective);
    if (!(r.objective - r.best <= STOP_SLACK * r.objective + r.tolerance))
        fail_shape(s, "assignment optimal", 0, r.objective, r.best);
    free(assignment);
}

/* ---- Tests --------------------------------------------------------------------- */

static void check_shape(size_t n, size_t dim, uint32_t k, uint64_t seed)
{
    for (int metric = 0; metric < 2; metric++) {
        const struct shape s = {n, dim, k, (enum sqz_metric)metric, seed, "clustered", 0};
        float *points = clustered_points(n, dim, 1 + n / 40, seed, 1);
        check(&s, points);
        free(points);
    }
}

static void test_slow_shapes(void **state)
{
    static const size_t dims[] = {32, 48, 64, 80, 128, 256};
    static const size_t small[] = {1, 2, 3, 17, 33};
    (void)state;
    for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
        for (size_t i = 0; i < sizeof small / sizeof *small; i++)
            for (uint32_t k = 1; k <= small[i]; k += k < 3 || k + 2 >= small[i] ? 1 : 6)
                check_shape(small[i], dims[d], k, 1 + d);
        check_shape(1000, dims[d], 1, 2);
        check_shape(1000, dims[d], 50, 3);
    }
    check_shape(1000, 48, 999, 4);
    check_shape(1000, 80, 1000, 5);
    check_shape(4099, 32, 4098, 6);
    check_shape(4099, 32, 4099, 7);
    check_shape(4099, 64, 205, 8);
    check_shape(4099, 80, 257, 9);
    check_shape(1700, 256, 193, 10);
    /* Just large enough for a tree, few points a cluster, clusters that fill no vector. */
    check_shape(2000, 32, 64, 11);
    check_shape(2001, 48, 65, 12);
    check_shape(2100, 128, 250, 13);
    check_shape(4096, 32, 2048, 14);
    check_shape(5003, 32, 1001, 15);
}

static void test_variants(void **state)
{
    const char *before = sqz_kernels_get()->name;
    bool supported;
    (void)state;
    for (size_t v = 0; sqz_kernels_variant(v, &supported); v++) {
        if (supported) {
            assert_true(sqz_kernels_force(sqz_kernels_variant(v, &supported)->name));
            check_shape(33, 48, 7, 1);
            check_shape(1700, 32, 200, 2);
            check_shape(500, 64, 129, 3);
            check_shape(3001, 48, 151, 4);
        }
    }
    assert_true(sqz_kernels_force(before));
}

static void test_duplicates(void **state)
{
    static const uint32_t ks[] = {1, 2, 5, 16, 17, 199, 200};
    (void)state;
    for (int metric = 0; metric < 2; metric++) {
        for (size_t n_distinct = 1; n_distinct <= 40; n_distinct += 13) {
            for (int zero = 0; zero < 2; zero++) {
                float *points = clustered_points(200, 48, 4, 11, 1);
                for (size_t p = 0; p < 200; p++)
                    if (zero && p % 3 != 1) memset(points + p * 48, 0, 48 * sizeof *points);
                    else if (p >= n_distinct)
                        memcpy(points + p * 48, points + p % n_distinct * 48, 48 * sizeof *points);
                for (size_t i = 0; i < sizeof ks / sizeof *ks; i++) {
                    const struct shape s = {200, 48, ks[i], (enum sqz_metric)metric, i, zero ? "zeros" : "duplicates",
                                            0};
                    check(&s, points);
                }
                free(points);
            }
        }
    }
}

/* As many points as a tree takes, with far fewer different ones than clusters, and with a few more. */
static void test_many_duplicates(void **state)
{
    static const size_t n_distinct[] = {2, 100, 299, 300, 301, 700};
    (void)state;
    for (int metric = 0; metric < 2; metric++) {
        for (size_t i = 0; i < sizeof n_distinct / sizeof *n_distinct; i++) {
            const struct shape s = {3000, 32, 300, (enum sqz_metric)metric, i, "many duplicates", 0};
            float *points = clustered_points(s.n, s.dim, 30, 12, 1);
            for (size_t p = n_distinct[i]; p < s.n; p++)
                memcpy(points + p * s.dim, points + p % n_distinct[i] * s.dim, s.dim * sizeof *points);
            check(&s, points);
            free(points);
        }
    }
}

/* A few points far outside draw groups and seeds to themselves; nearly all points are left in one group. */
static void test_outliers(void **state)
{
    (void)state;
    for (int metric = 0; metric < 2; metric++) {
        const struct shape s = {4000, 32, 200, (enum sqz_metric)metric, 1, "outliers", 0};
        float *points = clustered_points(s.n, s.dim, 60, 13, 1);
        for (size_t p = 0; p < s.n; p += 50)
            for (size_t i = 0; i < s.dim; i++) points[p * s.dim + i] *= p % 100 ? 300.0f : -200.0f;
        check(&s, points);
        free(points);
    }
}

/* Clusters seldom lose all their points after k-means++: many small problems in one or two dimensions that matter.
 * With cosine and one dimension there are two directions only, so that it happens at once. */
static void test_repair(void **state)
{
    float points[24 * 32] = {0};
    (void)state;
    for (uint64_t seed = 1; seed <= 6000; seed++) {
        const struct shape s = {24, 32, 6 + (uint32_t)(seed % 9), (enum sqz_metric)(seed / 2 % 2), seed, "repair", 0};
        struct sqz_random random;
        uint32_t assignment[24];
        sqz_random_seed(&random, seed);
        for (size_t p = 0; p < s.n; p++) {
            points[p * s.dim] = (float)gauss(&random);
            points[p * s.dim + 1] = seed % 2 ? (float)gauss(&random) : 0;
        }
        run_kmeans(assignment, &s, points, 20);
        (void)reference_of(&s, points, assignment); /* fails on an empty cluster */
    }
}

static void test_slow_all_equal(void **state)
{
    static const float values[] = {0.0f, -0.0f, 1.0f, -3.0e38f, 1.0e-42f};
    static const uint32_t ks[] = {1, 2, 250, 2099, 2100};
    float *points = allocate(2100 * 32 * sizeof *points);
    (void)state;
    for (size_t v = 0; v < sizeof values / sizeof *values; v++) {
        for (size_t i = 0; i < 2100 * 32; i++) points[i] = values[v];
        for (size_t i = 0; i < sizeof ks / sizeof *ks; i++) {
            for (int metric = 0; metric < 2; metric++) {
                const struct shape s = {2100, 32, ks[i], (enum sqz_metric)metric, 3, "all equal", 0};
                check(&s, points);
            }
        }
    }
    free(points);
}

static void test_magnitudes(void **state)
{
    static const double magnitudes[] = {1e37, 1e20, 1e-20, 1e-36};
    (void)state;
    for (size_t m = 0; m < sizeof magnitudes / sizeof *magnitudes; m++) {
        for (int metric = 0; metric < 2; metric++) {
            const struct shape s = {300, 64, 20, (enum sqz_metric)metric, m, "huge or tiny", 0};
            float *points = clustered_points(s.n, s.dim, 10, 5, magnitudes[m]);
            check(&s, points);
            free(points);
        }
    }
}

static void test_not_finite(void **state)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    (void)state;
    for (size_t every = 1; every < 5000; every = every * 7 + 1) {
        for (int metric = 0; metric < 2; metric++) {
            const struct shape s = {2100, 32, 200, (enum sqz_metric)metric, every, "not finite", 0};
            float *points = clustered_points(s.n, s.dim, 30, 6, 1);
            for (size_t i = 0; i < s.n * s.dim; i += every) points[i] = bad[i % 3];
            check(&s, points);
            free(points);
        }
    }
}

static void test_slow_deterministic(void **state)
{
    (void)state;
    for (int metric = 0; metric < 2; metric++) {
        const struct shape s = {1700, 64, 201, (enum sqz_metric)metric, 77, "clustered", 0};
        struct shape other = s;
        float *points = clustered_points(s.n, s.dim, 50, 7, 1);
        uint32_t *a = allocate(s.n * sizeof *a), *b = allocate(s.n * sizeof *b);
        other.seed = 78;
        const double first = run_kmeans(a, &s, points, 10);
        const double second = run_kmeans(b, &s, points, 10);
        assert_memory_equal(a, b, s.n * sizeof *a);
        assert_true(first == second);
        run_kmeans(b, &other, points, 10);
        assert_memory_not_equal(a, b, s.n * sizeof *a);
        free(points);
        free(a);
        free(b);
    }
}

/* The same result on any number of threads. */
static void test_slow_threads(void **state)
{
    static const struct {
        size_t n, dim;
        uint32_t k;
    } shapes[] = {{6007, 32, 307}, {2100, 64, 1000}, {1500, 48, 37}};
    (void)state;
    for (size_t i = 0; i < 2 * sizeof shapes / sizeof *shapes; i++) {
        struct shape s = {
            shapes[i / 2].n, shapes[i / 2].dim, shapes[i / 2].k, (enum sqz_metric)(i % 2), 5, "threads", 1};
        float *points = clustered_points(s.n, s.dim, 70, 8, 1);
        uint32_t *one = allocate(s.n * sizeof *one), *many = allocate(s.n * sizeof *many);
        const double wanted = run_kmeans(one, &s, points, 12);
        for (s.n_threads = 2; s.n_threads <= 5; s.n_threads++) {
            const double got = run_kmeans(many, &s, points, 12);
            for (size_t p = 0; p < s.n; p++)
                if (one[p] != many[p]) fail_shape(&s, "same on any number of threads", p, many[p], one[p]);
            if (!(got == wanted))
                fail_shape(&s, "same objective on any number of threads", (size_t)s.n_threads, got, wanted);
        }
        free(points);
        free(one);
        free(many);
    }
}

/* The objective after Lloyd's iterations in double from seeds drawn uniformly. */
static double plain_lloyd(const struct shape *s, const float *points, int n_iterations)
{
    struct sqz_random random;
    double largest, objective = 0;
    double *x = reference_points(s, points, &largest);
    double *c = allocate(s->k * s->dim * sizeof *c);
    uint32_t *assignment = allocate(s->n * sizeof *assignment);
    sqz_random_seed(&random, s->seed);
    for (size_t j = 0; j < s->k; j++)
        memcpy(c + j * s->dim, x + sqz_random_below(&random, s->n) * s->dim, s->dim * sizeof *c);
    for (int t = 0; t <= n_iterations; t++) {
        uint32_t *size = allocate(s->k * sizeof *size);
        memset(size, 0, s->k * sizeof *size);
        objective = 0;
        for (size_t p = 0; p < s->n; p++) {
            double best = INFINITY;
            for (uint32_t j = 0; j < s->k; j++) {
                const double cost = reference_cost(s, x + p * s->dim, c + j * s->dim);
                if (cost < best) {
                    best = cost;
                    assignment[p] = j;
                }
            }
            objective += best / (double)s->n;
            size[assignment[p]]++;
        }
        for (size_t j = 0; j < s->k; j++)
            for (size_t i = 0; size[j] > 0 && i < s->dim; i++) c[j * s->dim + i] = 0;
        for (size_t p = 0; p < s->n; p++)
            for (size_t i = 0; i < s->dim; i++)
                c[assignment[p] * s->dim + i] += x[p * s->dim + i] / size[assignment[p]];
        for (size_t j = 0; s->metric == SQZ_METRIC_COSINE && j < s->k; j++) {
            double square = 0;
            for (size_t i = 0; i < s->dim; i++) square += c[j * s->dim + i] * c[j * s->dim + i];
            for (size_t i = 0; i < s->dim; i++) c[j * s->dim + i] *= square > 0 ? 1 / sqrt(square) : 0;
        }
        free(size);
    }
    free(x);
    free(c);
    free(assignment);
    return objective;
}

static void test_slow_quality_of_plain(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 3; seed++) {
        for (int metric = 0; metric < 2; metric++) {
            const struct shape s = {2000, 32, 200, (enum sqz_metric)metric, seed, "clustered", 0};
            float *points = clustered_points(s.n, s.dim, 80, seed, 1);
            uint32_t *assignment = allocate(s.n * sizeof *assignment);
            const double got = run_kmeans(assignment, &s, points, 10);
            const double plain = plain_lloyd(&s, points, 10);
            if (!(got <= plain)) fail_shape(&s, "no worse than plain Lloyd", 0, got, plain);
            free(points);
            free(assignment);
        }
    }
}

/* No groups at all, only coordinates of falling spread: seeds matter little, so what shows is how much is lost by not
 * comparing with all centroids. */
static float *smooth_points(size_t n, size_t dim, uint64_t seed)
{
    struct sqz_random random;
    float *x = allocate(n * dim * sizeof *x);
    sqz_random_seed(&random, seed);
    for (size_t p = 0; p < n; p++)
        for (size_t i = 0; i < dim; i++)
            x[p * dim + i] = (float)(gauss(&random) / (1 + 0.3 * (double)i) + (i == 0 ? 3 : 0));
    return x;
}

static void test_slow_quality_of_tree(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++) {
        const struct shape s = {6000, 48, 300, (enum sqz_metric)(i / 2), 21 + (uint64_t)i, "smooth or clustered", 0};
        float *points = i % 2 ? clustered_points(s.n, s.dim, 120, 22, 1) : smooth_points(s.n, s.dim, 23);
        uint32_t *assignment = allocate(s.n * sizeof *assignment);
        const double got = run_kmeans(assignment, &s, points, 10);
        const double plain = plain_lloyd(&s, points, 10);
        if (!(got <= 1.01 * plain)) fail_shape(&s, "within 1% of plain Lloyd", (size_t)i, got, plain);
        free(points);
        free(assignment);
    }
}

static void test_workspace_sizes(void **state)
{
    const struct sqz_kmeans_options ok = {.n_clusters = 4, .n_iterations = 10, .metric = SQZ_METRIC_COSINE};
    const struct sqz_kmeans_options none = {.n_clusters = 0, .n_iterations = 10, .metric = SQZ_METRIC_COSINE};
    const uint32_t growing[] = {10, 20};
    (void)state;
    struct sqz_kmeans_options threads = ok;
    threads.n_threads = -1;
    assert_true(sqz_kmeans_workspace_bytes(100, 64, &threads) == SIZE_MAX);
    threads.n_threads = SQZ_KMEANS_MAX_THREADS + 1;
    assert_true(sqz_kmeans_workspace_bytes(100, 64, &threads) == SIZE_MAX);
    const struct sqz_kmeans_options large = {.n_clusters = 5000, .n_iterations = 10, .metric = SQZ_METRIC_EUCLIDEAN};
    assert_true(sqz_kmeans_workspace_bytes(100000, 64, &large) < (size_t)64 << 20);
    assert_true(sqz_kmeans_workspace_bytes(SIZE_MAX / 256, 64, &large) == SIZE_MAX);
    assert_true(sqz_kmeans_workspace_bytes(UINT32_MAX - 1, SIZE_MAX / 16 * 16, &large) == SIZE_MAX);
    assert_true(sqz_kmeans_workspace_bytes(100, 64, &ok) < 1 << 20);
    assert_true(sqz_kmeans_workspace_bytes(3, 64, &ok) == SIZE_MAX);
    assert_true(sqz_kmeans_workspace_bytes(100, 64, &none) == SIZE_MAX);
    assert_true(sqz_kmeans_workspace_bytes(100, 63, &ok) == SIZE_MAX);
    assert_true(sqz_kmeans_workspace_bytes(100, SIZE_MAX / 16 * 16, &ok) == SIZE_MAX);
    assert_true(sqz_kmeans_workspace_bytes(SIZE_MAX, 64, &ok) == SIZE_MAX);
    assert_true(sqz_hierarchy_workspace_bytes(100, 64, 0, growing, &ok) == SIZE_MAX);
    assert_true(sqz_hierarchy_workspace_bytes(100, 64, 2, growing, &ok) == SIZE_MAX);
    assert_true(sqz_hierarchy_workspace_bytes(100, 64, SQZ_MAX_LEVELS + 1, growing, &ok) == SIZE_MAX);
}

/* ---- Inner loops ------------------------------------------------------------------ */

static const struct sqz_kmeans_kernels *inner_variant(size_t index, bool *supported)
{
    *supported = true;
#if defined(__x86_64__)
    const uint32_t features = sqz_cpu_features();
    if (index == 1) {
        *supported = (features & SQZ_CPU_ALL_AVX2) == SQZ_CPU_ALL_AVX2;
        return &sqz_kmeans_kernels_avx2;
    }
    if (index == 2) {
        *supported = (features & SQZ_CPU_ALL_AVX512) == SQZ_CPU_ALL_AVX512;
        return &sqz_kmeans_kernels_avx512;
    }
#endif
    return index == 0 ? &sqz_kmeans_kernels_portable : NULL;
}

static void fail_inner(const char *op, const struct sqz_kmeans_kernels *k, size_t m, size_t n, size_t dim, size_t index,
                       double got, double wanted)
{
    fail_msg("%s: variant %s, m %zu, n %zu, dim %zu, index %zu: got %.9g, wanted %.9g", op, k->name, m, n, dim, index,
             got, wanted);
}

/* One float in front of every array: no alignment beyond 4 bytes. Arrays end where their memory ends, so that the
 * sanitizers see a byte too many. */
static float *drawn(size_t count, struct sqz_random *random)
{
    float *x = malloc((count + 1) * sizeof *x);
    assert_non_null(x);
    for (size_t i = 0; i <= count; i++) x[i] = (float)gauss(random);
    return x + 1;
}

/* Scores in double. A sum of dim products in F32 is off by at most about dim 2^-24 of the sum of their magnitudes; the
 * chosen column may be any whose score is that near to the largest. */
static void check_nearest(const struct sqz_kmeans_kernels *k, size_t m, size_t n, size_t dim, bool indexed)
{
    struct sqz_random random;
    sqz_random_seed(&random, m * 1000 + n * 10 + dim);
    const size_t n_rows = m + 5, n_real = n - n / 3 % 16;
    float *rows = drawn(n_rows * dim, &random), *columns = drawn(n * dim, &random), *bias = drawn(n, &random);
    float *panel = drawn(n * dim, &random), *best = drawn(m, &random);
    uint32_t *index = malloc((n_rows + 1) * sizeof *index), *column = malloc((m + 1) * sizeof *column);
    for (size_t j = n_real; j < n; j++) bias[j] = -INFINITY;
    if (n_real > 20) { /* a column that stands there twice: the first is taken */
        memcpy(columns + 20 * dim, columns + 3 * dim, dim * sizeof *columns);
        bias[20] = bias[3];
    }
    for (size_t r = 0; r < m; r++) index[r] = (uint32_t)sqz_random_below(&random, n_rows);
    k->gather_panel(panel, n, columns, NULL, n_real, dim);
    k->nearest(best, column, rows, indexed ? index : NULL, m, panel, bias, n, dim);
    for (size_t r = 0; r < m; r++) {
        const float *row = rows + (indexed ? index[r] : r) * dim;
        double largest = -INFINITY, chosen = NAN, tolerance = 0;
        for (size_t j = 0; j < n_real; j++) {
            double score = (double)bias[j], magnitude = fabs((double)bias[j]);
            for (size_t i = 0; i < dim; i++) {
                score += (double)row[i] * (double)columns[j * dim + i];
                magnitude += fabs((double)row[i] * (double)columns[j * dim + i]);
            }
            largest = fmax(largest, score);
            chosen = column[r] == j ? score : chosen;
            tolerance = fmax(tolerance, magnitude * (double)(dim + 1) * 0x1p-24);
        }
        if (!(fabs((double)best[r] - largest) <= tolerance) || !(largest - chosen <= 2 * tolerance) || column[r] == 20)
            fail_inner("nearest", k, m, n, dim, r, (double)best[r], largest);
    }
    free(rows - 1);
    free(columns - 1);
    free(bias - 1);
    free(panel - 1);
    free(best - 1);
    free(index);
    free(column);
}

static void check_gather(const struct sqz_kmeans_kernels *k, size_t n_columns, size_t n, size_t dim)
{
    struct sqz_random random;
    sqz_random_seed(&random, n_columns + n + dim);
    float *rows = drawn(n_columns * dim, &random), *panel = drawn(n_columns * dim, &random);
    uint32_t *index = malloc((n + 1) * sizeof *index);
    for (size_t j = 0; j < n; j++) index[j] = (uint32_t)sqz_random_below(&random, n_columns);
    k->gather_panel(panel, n_columns, rows, index, n, dim);
    for (size_t j = 0; j < n_columns; j++) {
        const size_t first = j / SQZ_KMEANS_BLOCK * SQZ_KMEANS_BLOCK;
        const size_t width = n_columns - first < SQZ_KMEANS_BLOCK ? n_columns - first : SQZ_KMEANS_BLOCK;
        for (size_t i = 0; i < dim; i++) {
            const float got = panel[first * dim + i * width + (j - first)];
            const float wanted = j < n ? rows[index[j] * dim + i] : 0.0f;
            if (!(got == wanted))
                fail_inner("gather_panel", k, n, n_columns, dim, j * dim + i, (double)got, (double)wanted);
        }
    }
    free(rows - 1);
    free(panel - 1);
    free(index);
}

static void check_largest(const struct sqz_kmeans_kernels *k, size_t n, size_t count)
{
    struct sqz_random random;
    sqz_random_seed(&random, n + count);
    float *x = drawn(n, &random), *y = drawn(n, &random), *value = drawn(count, &random);
    uint32_t *at = malloc((n + 1) * sizeof *at);
    for (size_t j = 0; j < n; j++) {
        x[j] = (float)(int)(4 * x[j]); /* many equal ones */
        y[j] = x[j];
    }
    for (float limit = -9; limit <= 9; limit++) {
        size_t expected = 0;
        const size_t got = k->at_least(at, count, x, n, limit);
        for (size_t j = 0; j < n; j++)
            if (x[j] >= limit && expected++ < count && at[expected - 1] != j)
                fail_inner("at_least", k, count, n, 0, j, at[expected - 1], (double)j);
        if (got != expected) fail_inner("at_least, how many", k, count, n, 0, 0, (double)got, (double)expected);
    }
    k->few_largest(value, at, count, x, n);
    for (size_t i = 0; i < count; i++) {
        size_t best = 0;
        for (size_t j = 1; j < n; j++) best = y[j] > y[best] ? j : best;
        if (at[i] != best || !(value[i] == y[best])) fail_inner("few_largest", k, count, n, 0, i, at[i], (double)best);
        y[best] = -INFINITY;
    }
    free(x - 1);
    free(y - 1);
    free(value - 1);
    free(at);
}

static void test_inner_loops(void **state)
{
    static const size_t ms[] = {0, 1, 2, 3, 5, 6, 7, 8, 9, 13, 31, 32, 33, 129};
    static const size_t ns[] = {16, 32, 48, 64, 80, 96, 112, 128, 144, 1040};
    static const size_t dims[] = {16, 32, 80, 256};
    bool supported;
    (void)state;
    for (size_t v = 0; inner_variant(v, &supported); v++) {
        const struct sqz_kmeans_kernels *k = inner_variant(v, &supported);
        for (size_t b = 0; supported && b < sizeof ns / sizeof *ns; b++) {
            for (size_t c = 0; c < sizeof dims / sizeof *dims; c++) {
                for (size_t a = 0; a < sizeof ms / sizeof *ms && (ns[b] <= 144 || dims[c] == 80); a++)
                    check_nearest(k, ms[a], ns[b], dims[c], a % 2 == 0);
                check_gather(k, ns[b], ns[b], dims[c]);
                check_gather(k, ns[b], ns[b] - 9, dims[c]);
            }
            check_largest(k, ns[b], 1);
            check_largest(k, ns[b], 7);
            check_largest(k, ns[b], 16);
        }
    }
    assert_string_equal(sqz_kmeans_kernels_get()->name, strncmp(sqz_kernels_get()->name, "avx512", 6) == 0 ? "avx512"
                                                        : strcmp(sqz_kernels_get()->name, "avx2") == 0     ? "avx2"
                                                                                                       : "portable");
}

/* ---- Hierarchy ------------------------------------------------------------------- */

static void check_ranges(const struct shape *s, const uint32_t *offset, size_t n_clusters, size_t n_members)
{
    if (offset[0] != 0 || offset[n_clusters] != n_members)
        fail_shape(s, "ends of offset", n_clusters, offset[n_clusters], (double)n_members);
    for (size_t c = 0; c < n_clusters; c++)
        if (offset[c + 1] <= offset[c]) fail_shape(s, "offset increases", c, offset[c + 1], offset[c]);
}

/* Every level is a good clustering of the centroids below it, in the new numbers. */
static void check_level(const struct shape *s, const float *members, const uint32_t *offset)
{
    uint32_t *assignment = allocate(s->n * sizeof *assignment);
    for (uint32_t c = 0; c < s->k; c++)
        for (uint32_t m = offset[c]; m < offset[c + 1]; m++) assignment[m] = c;
    const struct reference r = reference_of(s, members, assignment);
    if (!(r.objective - r.best <= STOP_SLACK * r.objective + r.tolerance))
        fail_shape(s, "level optimal", 0, r.objective, r.best);
    free(assignment);
}

/* Means of the ranges (cosine: of directions), in place. */
static void climb(const struct shape *s, float *members, const uint32_t *offset)
{
    double largest;
    double *x = reference_points(s, members, &largest);
    for (size_t c = 0; c < s->k; c++) {
        for (size_t i = 0; i < s->dim; i++) {
            double sum = 0;
            for (size_t m = offset[c]; m < offset[c + 1]; m++) sum += x[m * s->dim + i];
            members[c * s->dim + i] = (float)(sum / (offset[c + 1] - offset[c]));
        }
    }
    free(x);
}

static void check_hierarchy(size_t n, size_t dim, uint32_t n_levels, const uint32_t *n_clusters, enum sqz_metric metric)
{
    struct shape s = {n, dim, n_clusters[0], metric, 5, "hierarchy", 0};
    const struct sqz_kmeans_options options = {.n_iterations = 200, .metric = metric, .seed = s.seed};
    float *points = clustered_points(n, dim, 1 + n / 40, 9, 1);
    float *sorted = allocate(n * dim * sizeof *sorted);
    unsigned char *seen = allocate(n);
    uint32_t *order = allocate(n * sizeof *order), *again = allocate(n * sizeof *again);
    uint32_t *offset[SQZ_MAX_LEVELS];
    const size_t bytes = sqz_hierarchy_workspace_bytes(n, dim, n_levels, n_clusters, &options);
    assert_true(bytes < SIZE_MAX / 2);
    void *workspace = allocate(bytes);
    memset(workspace, 0xff, bytes);
    for (uint32_t level = 0; level < n_levels; level++)
        offset[level] = allocate((n_clusters[level] + 1) * sizeof **offset);
    const double objective = sqz_hierarchy(order, offset, points, n, dim, n_levels, n_clusters, &options, workspace);
    memset(workspace, 0, bytes);
    sqz_hierarchy(again, offset, points, n, dim, n_levels, n_clusters, &options, workspace);
    assert_memory_equal(order, again, n * sizeof *order);

    memset(seen, 0, n);
    for (size_t p = 0; p < n; p++) {
        if (order[p] >= n || seen[order[p]]) fail_shape(&s, "order is a permutation", p, order[p], (double)n);
        seen[order[p]] = 1;
        memcpy(sorted + p * dim, points + order[p] * dim, dim * sizeof *sorted);
    }
    for (uint32_t level = 0; level < n_levels; level++) {
        s.n = level == 0 ? n : n_clusters[level - 1];
        s.k = n_clusters[level];
        check_ranges(&s, offset[level], s.k, s.n);
        check_level(&s, sorted, offset[level]);
        for (uint32_t c = 0; level == 0 && c < s.k; c++) {
            for (uint32_t m = offset[0][c] + 1; m < offset[0][c + 1]; m++)
                if (order[m] <= order[m - 1]) fail_shape(&s, "ascending inside a cluster", m, order[m], order[m - 1]);
        }
        if (level == 0) {
            uint32_t *assignment = again;
            for (uint32_t c = 0; c < s.k; c++)
                for (uint32_t m = offset[0][c]; m < offset[0][c + 1]; m++) assignment[m] = c;
            const struct reference r = reference_of(&s, sorted, assignment);
            if (!(fabs(objective - r.objective) <= r.tolerance))
                fail_shape(&s, "objective of level 0", 0, objective, r.objective);
        }
        climb(&s, sorted, offset[level]);
        free(offset[level]);
    }
    free(points);
    free(sorted);
    free(seen);
    free(order);
    free(again);
    free(workspace);
}

static void test_slow_hierarchy(void **state)
{
    static const uint32_t one[] = {1}, two[] = {205, 41}, three[] = {400, 60, 7}, four[] = {33, 32, 5, 1};
    static const uint32_t full[] = {33, 32};
    (void)state;
    for (int m = 0; m < 2; m++) {
        const enum sqz_metric metric = (enum sqz_metric)m;
        check_hierarchy(1, 64, 1, one, metric);
        check_hierarchy(17, 32, 1, one, metric);
        check_hierarchy(33, 48, 2, full, metric);
        check_hierarchy(1000, 80, 4, four, metric);
        check_hierarchy(4099, 64, 2, two, metric);
        check_hierarchy(4099, 32, 3, three, metric);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_inner_loops),
        cmocka_unit_test(test_slow_shapes),
        cmocka_unit_test(test_variants),
        cmocka_unit_test(test_duplicates),
        cmocka_unit_test(test_many_duplicates),
        cmocka_unit_test(test_outliers),
        cmocka_unit_test(test_slow_all_equal),
        cmocka_unit_test(test_magnitudes),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_slow_deterministic),
        cmocka_unit_test(test_slow_threads),
        cmocka_unit_test(test_slow_quality_of_plain),
        cmocka_unit_test(test_slow_quality_of_tree),
        cmocka_unit_test(test_repair),
        cmocka_unit_test(test_workspace_sizes),
        cmocka_unit_test(test_slow_hierarchy),
    };
    return cmocka_run_group_tests_name("cluster", tests, NULL, NULL);
}
