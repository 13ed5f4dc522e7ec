/*
 * llama.cpp's log belongs to the program: a callback of its own stays where it is whatever the library does, and only
 * sqz_llama_log_take() turns what llama.cpp complains about into a part of the library's messages.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <llama.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "squeeze.h"

static size_t n_lines;
static char first_error[256];
static char damaged[512];

static void own_log(enum ggml_log_level level, const char *text, void *user_data)
{
    assert_ptr_equal(user_data, &n_lines);
    n_lines++;
    if (level == GGML_LOG_LEVEL_ERROR && !first_error[0]) snprintf(first_error, sizeof first_error, "%s", text);
}

/* The first bytes of the model: a GGUF file that ends within its metadata. */
static int set_up(void **state)
{
    char bytes[200];
    (void)state;
    snprintf(damaged, sizeof damaged, "%s/damaged.gguf", getenv("SQUEEZE_TEST_FOLDER"));
    FILE *model = fopen(getenv("SQUEEZE_MODEL"), "rb"), *file = fopen(damaged, "wb");
    const bool ok =
        model && file && fread(bytes, sizeof bytes, 1, model) == 1 && fwrite(bytes, sizeof bytes, 1, file) == 1;
    if (model) fclose(model);
    return ok && fclose(file) == 0 ? 0 : 1;
}

static void open_damaged(struct sqz_error *error)
{
    struct sqz_model *model;
    n_lines = 0;
    first_error[0] = '\0';
    assert_int_equal(sqz_model_open(&model, damaged, NULL, error), SQZ_ERROR_FORMAT);
}

static void own_callback_stays(void **state)
{
    struct sqz_error error;
    struct sqz_model *model;
    (void)state;
    llama_log_set(own_log, &n_lines);
    open_damaged(&error);
    assert_true(first_error[0]);
    assert_non_null(strstr(error.message, "damaged GGUF file: llama.cpp's log says why"));
    n_lines = 0;
    assert_int_equal(sqz_model_open(&model, getenv("SQUEEZE_MODEL"), NULL, &error), SQZ_OK);
    assert_true(n_lines > 0);
    sqz_model_free(model);
    open_damaged(&error);
    assert_true(first_error[0]);
}

static void taken_log_is_quoted(void **state)
{
    struct sqz_error error;
    char complaint[sizeof first_error];
    (void)state;
    llama_log_set(own_log, &n_lines);
    open_damaged(&error);
    snprintf(complaint, sizeof complaint, "%s", first_error);
    complaint[strcspn(complaint, "\n")] = '\0';
    assert_true(complaint[0]);
    sqz_llama_log_take();
    open_damaged(&error);
    assert_int_equal(n_lines, 0);
    if (!strstr(error.message, complaint)) fail_msg("'%s' does not quote '%s'", error.message, complaint);
    llama_log_set(own_log, &n_lines);
    open_damaged(&error);
    assert_true(first_error[0]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(own_callback_stays), cmocka_unit_test(taken_log_is_quoted)};
    return cmocka_run_group_tests_name("log", tests, set_up, NULL);
}
