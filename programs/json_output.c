/* Results as JSON; json_output.h describes it. */
#include "json_output.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common.h"
#include "text_buffer.h"

json_t *json_number(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

json_t *json_count(uint64_t value)
{
    return json_integer((json_int_t)value);
}

json_t *json_text(const char *text)
{
    struct text_filter filter = {0};
    struct text_buffer buffer = {0};
    json_t *value = json_string(text);
    if (!value) {
        text_filter_put(&filter, &buffer, text, strlen(text));
        text_filter_end(&filter, &buffer);
        value = json_string(buffer.text ? buffer.text : "");
        text_buffer_free(&buffer);
    }
    return value;
}

static struct text_buffer command_line;

void json_keep_command_line(int argc, char **argv)
{
    text_buffer_append(&command_line, "squeeze", 7);
    for (int i = 1; i < argc; i++) {
        text_buffer_append(&command_line, " ", 1);
        text_buffer_append(&command_line, argv[i], strlen(argv[i]));
    }
}

json_t *json_command_line(void)
{
    return command_line.text ? json_text(command_line.text) : json_null();
}

int print_json(json_t *root)
{
    if (!root) {
        die("out of memory");
    }
    /* Nine digits are a float's worth and keep 0.1 from being printed as 0.10000000000000001. */
    json_dumpf(root, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    putchar('\n');
    json_decref(root);
    return close_stdout();
}
