/* What Linux says about cores: /proc/stat, quotas, control groups, and the number of threads that follows. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>

#include "cores.h"

static void check_seconds(double got, double wanted)
{
    if (!(fabs(got - wanted) <= 1e-9)) fail_msg("got %.9g, wanted %.9g", got, wanted);
}

static void test_stat(void **state)
{
    /* user nice system idle iowait irq softirq steal guest guest_nice */
    static const char text[] = "cpu  1010 200 304 5000 60 7 8 900 10 11\n"
                               "cpu0 500 100 100 2000 30 3 4 400 5 5\n"
                               "cpu1 400 50 100 2000 20 2 2 300 3 3\n"
                               "cpu12 100 50 100 1000 10 2 2 200 2 3\n"
                               "intr 666 0 1\nctxt 9\n";
    static struct sqz_cores cores;
    (void)state;
    cores.allowed[0] = cores.allowed[12] = true;
    check_seconds(sqz_cores_parse_stat(text, &cores, false, 100), (500 + 100 + 3 + 4 + 100 + 100 + 2 + 2) / 100.0);
    check_seconds(sqz_cores_parse_stat(text, &cores, true, 100), (607 + 100 + 204 + 50) / 100.0);
    cores.allowed[1] = true; /* every CPU: the sum that the kernel made */
    check_seconds(sqz_cores_parse_stat(text, &cores, false, 100), (1010 + 304 + 7 + 8) / 100.0);
    assert_true(sqz_cores_parse_stat("", &cores, false, 100) < 0);
    assert_true(sqz_cores_parse_stat("intr 1 2 3\n", &cores, false, 100) < 0);
    check_seconds(sqz_cores_parse_stat("cpu ", &cores, false, 100), 0);
}

static void test_parse_quota(void **state)
{
    (void)state;
    check_seconds(sqz_cores_parse_quota("200000 100000\n"), 2);
    check_seconds(sqz_cores_parse_quota("150000\n100000\n"), 1.5);
    check_seconds(sqz_cores_parse_quota("max 100000\n"), 0);
    check_seconds(sqz_cores_parse_quota("-1\n100000\n"), 0);
    check_seconds(sqz_cores_parse_quota("100000 0"), 0);
    check_seconds(sqz_cores_parse_quota(""), 0);
}

static void test_count(void **state)
{
    static const struct {
        double quota;
        int n_allowed, wanted;
    } cases[] = {{0, 8, 8}, {2, 8, 2}, {1.5, 8, 2}, {2.4, 8, 2}, {0.2, 8, 1}, {16, 8, 8}, {1, 1, 1}};
    static struct sqz_cores cores;
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        cores.quota = cases[i].quota;
        cores.n_allowed = cases[i].n_allowed;
        assert_int_equal(sqz_cores_count(&cores), cases[i].wanted);
    }
    sqz_cores_find(&cores);
    assert_in_range(sqz_cores_count(&cores), 1, cores.n_allowed);
}

static void test_group(void **state)
{
    static const char text[] = "12:memory:/m\n4:cpu,cpuacct:/docker/ab:c\n3:cpuset:/s\n0::/user.slice/me\n";
    char path[64];
    (void)state;
    assert_true(sqz_cores_parse_group(text, "cpu", path, sizeof path));
    assert_string_equal(path, "/docker/ab:c");
    assert_true(sqz_cores_parse_group(text, "cpuacct", path, sizeof path));
    assert_string_equal(path, "/docker/ab:c");
    assert_true(sqz_cores_parse_group(text, "", path, sizeof path));
    assert_string_equal(path, "/user.slice/me");
    assert_false(sqz_cores_parse_group(text, "acct", path, sizeof path));
    assert_false(sqz_cores_parse_group("", "cpu", path, sizeof path));
    assert_false(sqz_cores_parse_group("no such line\n", "", path, sizeof path));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stat),
        cmocka_unit_test(test_parse_quota),
        cmocka_unit_test(test_count),
        cmocka_unit_test(test_group),
    };
    return cmocka_run_group_tests_name("cores", tests, NULL, NULL);
}
