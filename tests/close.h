/*
 * Two numbers that are equal within a share of the wanted one, for tests of
 * predictions; and what console/ calls at an error, which here ends the test.
 */
#ifndef SQZ_TESTS_CLOSE_H
#define SQZ_TESTS_CLOSE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "common.h"

_Noreturn void die(const char *format, ...)
{
    fprintf(stderr, "die: %s\n", format);
    exit(1);
}

#define assert_close(got, wanted, tolerance) check_close(got, wanted, tolerance, __LINE__)

static inline void check_close(double got, double wanted, double tolerance, int line)
{
    if (!(fabs(got - wanted) <= tolerance * fabs(wanted)))
        fail_msg("line %d: got %.17g, wanted %.17g within %g of it", line, got, wanted, tolerance);
}

#endif
