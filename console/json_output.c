/* Results as JSON; json_output.h describes it. */
#include "json_output.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "plain_text.h"
#include "many_ranks.h"
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
    return json_bytes(text, strlen(text));
}

json_t *json_bytes(const char *bytes, size_t n_bytes)
{
    struct text_filter filter = {0};
    struct text_buffer buffer = {0};
    json_t *value = memchr(bytes, '\0', n_bytes) ? NULL : json_stringn(bytes, n_bytes);
    if (!value) {
        text_filter_put(&filter, &buffer, bytes, n_bytes);
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

/* jansson escapes control characters below U+0020. The others that steer a terminal stand in strings alone, where \u says
 * the same. */
static void put_escaped(const char *text)
{
    size_t n = 1;
    for (const char *at = text; *at; at += n) {
        n = sqz_character_bytes(at);
        n = n ? n : 1;
        if (*at == '\n' || !sqz_character_steers(at, n)) {
            fwrite(at, 1, n, stdout);
        } else {
            const unsigned char *s = (const unsigned char *)at;
            printf("\\u%04x", n == 1   ? s[0]
                              : n == 2 ? (s[0] & 0x1fu) << 6 | (s[1] & 0x3fu)
                                       : (s[0] & 0xfu) << 12 | (s[1] & 0x3fu) << 6 | (s[2] & 0x3fu));
        }
    }
}

int print_json(json_t *root)
{
    if (!root) die("out of memory");
    json_t *ranks = ranks_json();
    if (ranks) json_object_set_new(root, "ranks", ranks);
    /* Nine digits are a float's worth and keep 0.1 from being printed as 0.10000000000000001. */
    char *text = json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    if (!text) die("out of memory");
    put_escaped(text);
    putchar('\n');
    free(text);
    json_decref(root);
    return close_stdout();
}
