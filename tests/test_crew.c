/*
 * How many threads a model runs with, on made-up readings: beside one busy process, beside many, beside another crew,
 * on an idle machine, under a quota; and where the threads run.
 */
#define _GNU_SOURCE /* sched_getaffinity */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "crew.h"
#include "threads.h"

static struct sqz_crew crew_of(int n_cores)
{
    struct sqz_crew crew = {.most = n_cores, .left = n_cores};
    crew.cores.n_allowed = n_cores;
    return crew;
}

/* What others get of a machine of n cores when p of their threads are always busy and ours keep `own` busy: each
 * thread the same. */
static double share_of_others(double n, double p, double own)
{
    return p + own <= n ? p : n * p / (p + own);
}

/* Looks after a fifth of a second in which others used so many cores. */
static int look(struct sqz_crew *crew, double others)
{
    struct sqz_cores_reading r = crew->last;
    r.at += 0.2;
    r.own += 0.2 * crew->left * 0.9;
    r.all += 0.2 * (crew->left * 0.9 + others);
    sqz_crew_decide(crew, &r);
    return crew->left;
}

/* n looks beside p busy threads. */
static int looks_beside(struct sqz_crew *crew, int n, double p)
{
    while (n-- > 0) look(crew, share_of_others(crew->cores.n_allowed, p, crew->left));
    return crew->left;
}

static void test_beside_busy(void **state)
{
    static const struct {
        int n_cores, busy, wanted;
    } cases[] = {{2, 1, 1}, {2, 2, 1}, {2, 9, 1}, {4, 1, 3}, {16, 1, 15}, {16, 8, 8}, {64, 1, 63}, {64, 40, 24}};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct sqz_crew crew = crew_of(cases[i].n_cores);
        const int got = looks_beside(&crew, 12, cases[i].busy), still = looks_beside(&crew, 40, cases[i].busy);
        if (got != cases[i].wanted || still != got)
            fail_msg("%d cores, %d busy: got %d and later %d threads, wanted %d", cases[i].n_cores, cases[i].busy, got,
                     still, cases[i].wanted);
        if (looks_beside(&crew, 2, 0) != cases[i].n_cores)
            fail_msg("%d cores, %d no longer busy: %d threads", cases[i].n_cores, cases[i].busy, crew.left);
    }
}

/* The one busy process on two cores is noticed by the first look, and by one look after it has gone. */
static void test_at_once(void **state)
{
    struct sqz_crew crew = crew_of(2);
    (void)state;
    assert_int_equal(look(&crew, share_of_others(2, 1, 1)), 1); /* while the model was opened, by one thread */
    assert_int_equal(look(&crew, 0.05), 2);
    assert_int_equal(look(&crew, 0.5), 1); /* two threads of three get less than two thirds each */
}

/* Small things that run everywhere, and hundredths of a second counted the other way, cost no thread. */
static void test_idle(void **state)
{
    static const double noise[] = {0, 0.3, 0.1, -0.2, 0.34, 0, -0.5, 0.2, 0.33, 0.02};
    (void)state;
    for (int n_cores = 1; n_cores <= 64; n_cores *= 2) {
        struct sqz_crew crew = crew_of(n_cores);
        assert_int_equal(look(&crew, 0.55), n_cores); /* the end of whatever ran before us */
        for (int i = 0; i < 100; i++)
            if (look(&crew, noise[i % 10]) != n_cores) fail_msg("%d cores, look %d: %d threads", n_cores, i, crew.left);
    }
}

/* Between what takes a thread and what gives it back nothing changes. */
static void test_hysteresis(void **state)
{
    struct sqz_crew crew = crew_of(2);
    (void)state;
    look(&crew, 0);
    for (int i = 0; i < 10; i++) assert_int_equal(look(&crew, 0.3), 2);
    assert_int_equal(look(&crew, 0.6), 1);
    for (int i = 0; i < 10; i++) assert_int_equal(look(&crew, 0.3), 1);
    assert_int_equal(look(&crew, 0.1), 2);
}

/* Two crews share out the machine and then keep to it. */
static void test_two_crews(void **state)
{
    (void)state;
    for (int n_cores = 2; n_cores <= 64; n_cores *= 2) {
        struct sqz_crew a = crew_of(n_cores), b = crew_of(n_cores);
        for (int i = 0; i < 40; i++) {
            const double of_b = share_of_others(n_cores, b.left, a.left);
            const double of_a = share_of_others(n_cores, a.left, b.left);
            look(&a, of_b);
            look(&b, of_a);
            if (i > 10 && (a.left != n_cores / 2 || b.left != n_cores / 2))
                fail_msg("%d cores, look %d: %d and %d threads", n_cores, i, a.left, b.left);
        }
    }
}

/* Others in our control group use up its quota; others on the machine do not. */
static void test_quota(void **state)
{
    struct sqz_crew crew = crew_of(64);
    (void)state;
    crew.most = crew.left = 4;
    crew.cores.quota = 4;
    strcpy(crew.cores.group_stat, "cpu.stat");
    for (int i = 0; i < 5; i++) {
        struct sqz_cores_reading r = crew.last;
        r.at += 1;
        r.own += crew.left;
        r.all += crew.left + 30;
        r.group += crew.left + (i < 3 ? 0 : 2);
        sqz_crew_decide(&crew, &r);
        assert_int_equal(crew.left, i < 3 ? 4 : 2);
    }
}

static void test_fixed(void **state)
{
    struct sqz_crew crew;
    (void)state;
    for (int n = 1; n <= 40; n += 13) {
        sqz_crew_begin(&crew, n);
        for (int i = 0; i < 10; i++) assert_int_equal(sqz_crew_step(&crew, i * 64), n);
    }
    sqz_crew_begin(&crew, 0);
    assert_int_equal(crew.now, sqz_crew_most());
    assert_in_range(sqz_crew_step(&crew, 1), 1, crew.most);
    crew.left = 1;
    assert_int_equal(sqz_crew_step(&crew, 512), crew.most); /* a batch gets all */
}

/* Threads of this process; 0 where they are not told. */
static int n_threads(void)
{
    int n = 0;
    DIR *folder = opendir("/proc/self/task");
    for (const struct dirent *d; folder && (d = readdir(folder));) n += d->d_name[0] != '.';
    if (folder) closedir(folder);
    return n;
}

/* Twice: threads that were let go come again. */
static void test_dismiss(void **state)
{
    const int before = n_threads();
    (void)state;
    for (int i = 0; i < 2; i++) {
        int n = 0;
#pragma omp parallel num_threads(3) reduction(+ : n)
        n++;
        sqz_crew_dismiss();
#if defined(__GLIBC__) && !defined(__clang__)
        assert_int_equal(n_threads(), before);
#endif
        assert_true(n >= 1 && before >= 0);
    }
}

enum { MOST_PLACED = 64 };

/* Where the threads of a team may run: CPUs in all masks together, of which the largest has *most. Returns the team's. */
static int look_at_places(int n, cpu_set_t *together, int *most)
{
    cpu_set_t mask[MOST_PLACED];
    int n_threads = 0;
#pragma omp parallel num_threads(n) reduction(+ : n_threads)
    {
        n_threads++;
        sched_getaffinity(0, sizeof mask[0], &mask[sqz_thread_number()]);
    }
    CPU_ZERO(together);
    *most = 0;
    for (int i = 0; i < n_threads; i++) {
        CPU_OR(together, together, &mask[i]);
        if (CPU_COUNT(&mask[i]) > *most) *most = CPU_COUNT(&mask[i]);
    }
    return n_threads;
}

/* One thread a CPU: each has its own during a run. Fewer threads: they go where they are sent. */
static void test_places(void **state)
{
    cpu_set_t before, during, after;
    int most;
    (void)state;
    assert_int_equal(sched_getaffinity(0, sizeof before, &before), 0);
    const int n = CPU_COUNT(&before);
    if (n < 2 || n > MOST_PLACED) skip();
    for (int i = 0; i < 2; i++) {
        struct sqz_crew crew;
        sqz_crew_begin(&crew, n);
        crew.placed = true;
        assert_int_equal(sqz_crew_step(&crew, 1), n);
        if (look_at_places(n, &during, &most) != n) skip(); /* the user's limit */
        assert_int_equal(most, 1);
        assert_true(CPU_EQUAL(&during, &before));
        sqz_crew_pause(&crew);
        assert_int_equal(sched_getaffinity(0, sizeof after, &after), 0);
        assert_true(CPU_EQUAL(&after, &before)); /* of the calling thread */
        sqz_crew_begin(&crew, n - 1);
        crew.placed = true;
        sqz_crew_step(&crew, 1);
        look_at_places(n - 1, &during, &most);
        assert_int_equal(most, n);
        sqz_crew_pause(&crew);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_beside_busy), cmocka_unit_test(test_at_once),   cmocka_unit_test(test_idle),
        cmocka_unit_test(test_hysteresis),  cmocka_unit_test(test_two_crews), cmocka_unit_test(test_quota),
        cmocka_unit_test(test_fixed),       cmocka_unit_test(test_dismiss),   cmocka_unit_test(test_places),
    };
    return cmocka_run_group_tests_name("crew", tests, NULL, NULL);
}
