/* Text of files made fit for a terminal, and that every error message is. */
#include "error.h"
#include "plain_text.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static const struct {
    const char *text, *wanted;
} texts[] = {
    {"", ""},
    {"plain", "plain"},
    {"M\xc3\xa4rchen \xe6\x9b\xb8 \xf0\x9f\x90\x8d", "M\xc3\xa4rchen \xe6\x9b\xb8 \xf0\x9f\x90\x8d"},
    {"\x1b[31mred", "?[31mred"},
    {"bell\a del\x7f", "bell? del?"},
    {"two\nlines\r\n\ttab", "two lines   tab"},
    {"csi\xc2\x9b"
     "31m",
     "csi?31m"},
    {"\xc2\x80\xc2\x9f\xc2\xa0", "??\xc2\xa0"},
    {"abc\xe2\x80\xae"
     "fdp.exe\xe2\x80\xac",
     "abc?fdp.exe?"},
    {"\xe2\x80\xa8\xe2\x80\xa9\xe2\x80\xaa\xe2\x81\xa6\xe2\x81\xa9", "?????"},
    {"\xe2\x80\xa7\xe2\x80\xaf\xe2\x81\xa5\xe2\x81\xaa", "\xe2\x80\xa7\xe2\x80\xaf\xe2\x81\xa5\xe2\x81\xaa"},
    {"raw \x9b"
     "31m",
     "raw ?31m"},
    {"cut \xe6\x9b", "cut ??"},
    {"overlong \xc0\x9b\xe0\x82\x9b", "overlong ?????"},
    {"surrogate \xed\xa0\x80", "surrogate ???"},
    {"beyond \xf4\x90\x80\x80\xf5", "beyond ?????"},
};

static void known_texts(void **unused)
{
    (void)unused;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        char text[64];
        snprintf(text, sizeof text, "%s", texts[i].text);
        sqz_plain_text(text);
        if (strcmp(text, texts[i].wanted)) fail_msg("text %zu: got '%s', wanted '%s'", i, text, texts[i].wanted);
    }
}

/* Any bytes: what comes out is UTF-8, steers nothing, is no longer, and stays as it is when done again. */
static void any_bytes(void **unused)
{
    uint32_t state = 1;
    (void)unused;
    for (int round = 0; round < 20000; round++) {
        char text[17], again[17];
        for (size_t i = 0; i < 16; i++) {
            state = state * 1664525u + 1013904223u;
            text[i] = (char)(state >> 24);
        }
        text[16] = '\0';
        const size_t before = strlen(text);
        sqz_plain_text(text);
        assert_true(strlen(text) <= before);
        for (const char *at = text; *at; at += sqz_character_bytes(at)) {
            assert_true(sqz_character_bytes(at) > 0);
            assert_false(sqz_character_steers(at, sqz_character_bytes(at)));
        }
        memcpy(again, text, sizeof again);
        sqz_plain_text(again);
        assert_string_equal(again, text);
    }
}

static void error_messages(void **unused)
{
    struct sqz_error error;
    char longest[3 * sizeof error.message];
    (void)unused;
    sqz_error_set(&error, SQZ_ERROR_IO, "model %s", "\x1b]0;title\a\n");
    assert_string_equal(error.message, "model ?]0;title? ");
    /* Cut off within a character: no half of one is left. */
    for (size_t i = 0; i + 3 < sizeof longest; i += 3) memcpy(longest + i, "\xe6\x9b\xb8", 4);
    for (int offset = 0; offset < 3; offset++) {
        sqz_error_set(&error, SQZ_ERROR_IO, "%.*s%s", offset, "ab", longest);
        assert_true(strlen(error.message) >= sizeof error.message - 4);
        for (const char *at = error.message; *at; at += sqz_character_bytes(at))
            assert_true(sqz_character_bytes(at) > 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(known_texts),
        cmocka_unit_test(any_bytes),
        cmocka_unit_test(error_messages),
    };
    return cmocka_run_group_tests_name("plain_text", tests, NULL, NULL);
}
