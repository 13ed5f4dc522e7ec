/*
 * Linked into the test programs that take long, in an emulator or with
 * sanitizers: cmocka leaves out the tests whose names match the pattern in
 * SQUEEZE_SKIP_TESTS, and all but those that match SQUEEZE_ONLY_TESTS.
 * tests/CMakeLists.txt says which those are.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdlib.h>

__attribute__((constructor)) static void set_skip_filter(void)
{
    const char *skipped = getenv("SQUEEZE_SKIP_TESTS"), *only = getenv("SQUEEZE_ONLY_TESTS");

    if (skipped) cmocka_set_skip_filter(skipped);
    if (only) cmocka_set_test_filter(only);
}
