/* Parts of `squeeze serve` by themselves: bytes and UTF-8, a client's JSON, stops, conversations, tools, grammars, keys,
 * streams. */
#define _POSIX_C_SOURCE 200809L
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "grammar.h"
#include "input.h"
#include "keys.h"
#include "metrics.h"
#include "pace.h"
#include "passages.h"
#include "spoken.h"
#include "stream.h"
#include "talk.h"
#include "tools.h"

/* ---- Bytes and UTF-8 ----------------------------------------------------------------- */

static const struct {
    const char *text;
    size_t whole;      /* bytes that are no beginning of a character */
    const char *clean; /* what bytes_append_utf8() makes of it */
} texts[] = {
    {"", 0, ""},
    {"plain", 5, "plain"},
    {"caf\xc3\xa9", 5, "caf\xc3\xa9"},
    {"caf\xc3", 3, "caf\xef\xbf\xbd"},
    {"\xf0\x9f\x90\x8d", 4, "\xf0\x9f\x90\x8d"},
    {"a\xf0\x9f\x90", 1, "a\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
    {"\xc0\xaf", 2, "\xef\xbf\xbd\xef\xbf\xbd"},                 /* overlong */
    {"\xed\xa0\x80", 3, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"}, /* a surrogate */
    {"\xf4\x90\x80\x80", 4, "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
    {"\xff\x80", 2, "\xef\xbf\xbd\xef\xbf\xbd"},
    {"\xe2\x82z", 3, "\xef\xbf\xbd\xef\xbf\xbdz"},
};

static void test_utf8(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        struct bytes clean = {0};
        const size_t n = strlen(texts[i].text);
        assert_int_equal(utf8_whole(texts[i].text, n), texts[i].whole);
        bytes_append_utf8(&clean, texts[i].text, n);
        assert_string_equal(clean.data ? clean.data : "", texts[i].clean);
        bytes_free(&clean);
    }
}

static void test_bytes(void **state)
{
    struct bytes b = {0};
    (void)state;
    for (int i = 0; i < 1000; i++) bytes_print(&b, "%d,", i);
    assert_int_equal(b.n, strlen(b.data));
    bytes_drop(&b, 4);
    assert_memory_equal(b.data, "2,3,", 4);
    bytes_drop(&b, SIZE_MAX);
    assert_int_equal(b.n, 0);
    bytes_append(&b, "x", SIZE_MAX / 2);
    assert_true(b.failed);
    bytes_free(&b);
}

/* ---- A client's JSON ------------------------------------------------------------------- */

static const struct {
    const char *json, *code, *said;
} bad_bodies[] = {
    {"", "invalid_json", ""},
    {"nonsense", "invalid_json", ""},
    {"[1]", "invalid_json", ""},
    {"{\"a\": 1} x", "invalid_json", ""},
    {"{\"a\": 1, \"a\": 2}", "invalid_json", ""},
    {"{\"a\": 1e999}", "out_of_range", "near '1e999' (line 1, column 11)"},
    {"{\"a\": 99999999999999999999}", "out_of_range",
     "near '99999999999999999999' (line 1, column 26): allowed are whole numbers from -9223372036854775808 to "
     "9223372036854775807"},
    {"{\"a\": NaN}", "invalid_json", ""},
    {"{\"a\": \"\xff\"}", "invalid_json", ""},
    {"{\"a\": \"\\u0000\"}", "invalid_json", ""},
    {"{\"a\": \"\\ud800\"}", "invalid_json", ""},
    {"{\"a\": \"", "invalid_json", ""},
};

static void test_bad_bodies(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof bad_bodies / sizeof *bad_bodies; i++) {
        struct fault fault = {0};
        assert_null(input_parse(bad_bodies[i].json, strlen(bad_bodies[i].json), &fault));
        assert_int_equal(fault.status, 400);
        assert_string_equal(fault.code, bad_bodies[i].code);
        if (!strstr(fault.message, bad_bodies[i].said))
            fail_msg("%s: wanted '%s', got '%s'", bad_bodies[i].json, bad_bodies[i].said, fault.message);
    }
}

static json_t *parse_nested(size_t depth, struct fault *fault)
{
    struct bytes text = {0};
    bytes_put(&text, "{\"a\":");
    for (size_t i = 0; i < depth; i++) bytes_put(&text, "[");
    for (size_t i = 0; i < depth; i++) bytes_put(&text, "]");
    bytes_put(&text, "}");
    json_t *root = input_parse(text.data, text.n, fault);
    bytes_free(&text);
    return root;
}

static void test_depth_and_size(void **state)
{
    struct fault fault = {0};
    (void)state;
    json_t *root = parse_nested(INPUT_MOST_DEPTH - 1, &fault);
    assert_non_null(root);
    json_decref(root);
    assert_null(parse_nested(INPUT_MOST_DEPTH, &fault));
    assert_string_equal(fault.code, "json_too_deep");
    fault = (struct fault){0};
    assert_null(parse_nested(100000, &fault));
    assert_string_equal(fault.code, "json_too_deep");
    /* Brackets in strings are no depth. */
    static const char quoted[] =
        "{\"a\": \"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\\\"[[\"}";
    fault = (struct fault){0};
    root = input_parse(quoted, sizeof quoted - 1, &fault);
    assert_non_null(root);
    json_decref(root);
    struct bytes many = {0};
    bytes_put(&many, "{\"a\":[0");
    for (size_t i = 0; i < INPUT_MOST_VALUES; i++) bytes_put(&many, ",0");
    bytes_put(&many, "]}");
    assert_null(input_parse(many.data, many.n, &fault));
    assert_int_equal(fault.status, 413);
    bytes_free(&many);
}

static void test_numbers(void **state)
{
    static const struct {
        const char *value;
        int real, count; /* 1: good, 0: refused */
    } cases[] = {{"1", 1, 1},      {"1.0", 1, 1},   {"1.5", 1, 0},  {"-1", 0, 0},
                 {"3", 0, 0},      {"\"1\"", 0, 0}, {"true", 0, 0}, {"null", 1, 1},
                 {"[1]", 0, 0},    {"1e300", 0, 0}, {"-0.0", 1, 1}, {"9223372036854775807", 0, 0},
                 {"1e-320", 1, 0}, {"{}", 0, 0}};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[64];
        struct fault fault = {0}, other = {0};
        double real = 0.25;
        int64_t count = 2;
        const int n = snprintf(text, sizeof text, "{\"k\": %s}", cases[i].value);
        json_t *root = input_parse(text, (size_t)n, &fault);
        assert_non_null(root);
        assert_int_equal(input_real(root, "k", 0, 2, &real, &fault), cases[i].real);
        assert_int_equal(input_count(root, "k", 0, 2, &count, &other), cases[i].count);
        assert_true(real >= 0 && real <= 2 && count >= 0 && count <= 2);
        if (!cases[i].count) assert_string_equal(other.param, "k");
        json_decref(root);
    }
}

/* ---- Stops -------------------------------------------------------------------------------- */

static void put_in_pieces(struct spoken *spoken, const struct stops *stops, const char *text, size_t piece)
{
    size_t before = 0;
    for (size_t at = 0, n; text[at]; at += n) {
        const size_t left = strlen(text + at);
        n = left < piece ? left : piece;
        spoken_put(spoken, stops, text + at, n);
        assert_true(spoken->n_ready >= before && spoken->n_ready <= spoken->text.n);
        before = spoken->n_ready;
    }
}

static void test_stops(void **state)
{
    char first[] = "END", second[] = "\n\n", third[] = "NDX";
    const struct stops stops = {3, {first, second, third}};
    static const struct {
        const char *text, *wanted;
        int stop;
    } cases[] = {{"the ENDING", "the ", 0}, {"a\n\nb", "a", 1},     {"all EN", "all EN", -1},
                 {"ENEND", "EN", 0},        {"\n \n", "\n \n", -1}, {"caf\xc3\xa9 END", "caf\xc3\xa9 ", 0},
                 {"zNDX", "z", 2},          {"ENDX", "", 0},        {"EEEND\n\n", "EE", 0}};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (size_t piece = 1; piece <= 12; piece++) {
            struct spoken spoken;
            spoken_begin(&spoken);
            put_in_pieces(&spoken, &stops, cases[i].text, piece);
            spoken_end(&spoken);
            assert_string_equal(spoken.text.data ? spoken.text.data : "", cases[i].wanted);
            assert_int_equal(spoken.stop, cases[i].stop);
            assert_int_equal(spoken.n_ready, strlen(cases[i].wanted));
            spoken_free(&spoken);
        }
}

/* ---- Conversations and tools --------------------------------------------------------------- */

static void test_talk(void **state)
{
    struct talk talk = {0};
    struct fault fault = {0};
    (void)state;
    talk_text(talk_say(&talk, "user", &fault), "\xef\xbb\xbfone\r\ntwo\rthree", 17);
    assert_string_equal(talk.turns[0].text.data, "one\ntwo\nthree");
    bytes_put(talk_say(&talk, "user", &fault), "more");
    assert_int_equal(talk.n, 1);
    assert_string_equal(talk.turns[0].text.data, "one\ntwo\nthree\n\nmore");
    assert_true(talk_instruct(&talk, "B", 1, &fault) && talk_instruct(&talk, "A", 1, &fault));
    assert_int_equal(talk.n, 2);
    assert_string_equal(talk.turns[0].role, "system");
    assert_string_equal(talk.turns[0].text.data, "A\n\nB");
    json_t *parts = json_loads("[{\"type\": \"text\", \"text\": \"x\"}, {\"type\": \"image_url\"}]", 0, NULL);
    struct bytes text = {0};
    assert_false(talk_content(&text, parts, "content", &fault));
    assert_string_equal(text.data, "x");
    assert_string_equal(fault.code, "unsupported");
    json_decref(parts);
    bytes_free(&text);
    talk_free(&talk);
}

static const struct {
    enum call_format format;
    const char *answer;
    int n_plain;                            /* -1: no calls */
    const char *first, *arguments, *second; /* second: NULL for none */
} called[] = {
    {CALLS_MARKED,
     "I look.\n<tool_call>\n{\"name\": \"find\", \"arguments\": {\"what\": \"a\"}}\n</tool_call><tool_call>{\"name\": "
     "\"go\"}",
     8, "find", "{\"what\":\"a\"}", "go"},
    {CALLS_MARKED, "<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"x\\\":1}\"}</tool_call>", 0, "f", "{\"x\":1}",
     NULL},
    {CALLS_MARKED, "<tool_call>nonsense</tool_call>", -1, NULL, NULL, NULL},
    {CALLS_MARKED, "<tool_call>nonsense</tool_call><tool_call>{\"name\": \"f\"}", 31, "f", "{}", NULL},
    {CALLS_MARKED, "{\"name\": \"f\", \"parameters\": {}}", -1, NULL, NULL, NULL}, /* JSON alone is an answer */
    {CALLS_MARKED, "", -1, NULL, NULL, NULL},
    {CALLS_MISTRAL,
     "[TOOL_CALLS][{\"name\": \"find\", \"arguments\": {\"what\": [1, 2]}}, {\"name\": \"go\", \"arguments\": {}}]", 0,
     "find", "{\"what\":[1,2]}", "go"},
    {CALLS_MISTRAL, "So.[TOOL_CALLS] {\"name\": \"find\", \"arguments\": {}}", 3, "find", "{}", NULL},
    {CALLS_MISTRAL, "[TOOL_CALLS]find[ARGS]{\"what\": \"]\"}[TOOL_CALLS]go[ARGS]{}", 0, "find", "{\"what\":\"]\"}",
     "go"},
    {CALLS_MISTRAL, "[TOOL_CALLS]find{\"a\":1}", 0, "find", "{\"a\":1}", NULL},
    {CALLS_MISTRAL, "[TOOL_CALLS][{\"name\": \"fi", -1, NULL, NULL, NULL}, /* cut off */
    {CALLS_LLAMA, "{\"name\": \"find\", \"parameters\": {\"what\": \"a\"}}", 0, "find", "{\"what\":\"a\"}", NULL},
    {CALLS_LLAMA, "\n{\"name\": \"find\", \"parameters\": {}}; {\"name\": \"go\", \"parameters\": {}}", 0, "find", "{}",
     "go"},
    {CALLS_LLAMA, "<|python_tag|>{\"name\": \"find\", \"parameters\": {\"n\": 5}}", 0, "find", "{\"n\":5}", NULL},
    {CALLS_LLAMA, "{\"name\": \"Ann\", \"parameters\": {}} is JSON.", -1, NULL, NULL, NULL},
    {CALLS_LLAMA, "{\"age\": 5}", -1, NULL, NULL, NULL},
    {CALLS_LLAMA, "<tool_call>{\"name\": \"find\", \"arguments\": {}}</tool_call>", 0, "find", "{}", NULL},
};

static const char *value_of(const json_t *calls, size_t i, const char *key)
{
    return json_string_value(json_object_get(json_array_get(calls, i), key));
}

static void test_calls(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof called / sizeof *called; i++) {
        size_t n_plain = 0;
        const size_t n = strlen(called[i].answer);
        json_t *calls = calls_read(called[i].format, called[i].answer, n, &n_plain);
        if (!calls != (called[i].n_plain < 0)) fail_msg("%s: %s", called[i].answer, calls ? "calls" : "no calls");
        assert_int_equal(n_plain, calls ? (size_t)called[i].n_plain : n);
        if (!calls) continue;
        assert_string_equal(value_of(calls, 0, "name"), called[i].first);
        assert_string_equal(value_of(calls, 0, "arguments"), called[i].arguments);
        assert_int_equal(json_array_size(calls), called[i].second ? 2 : 1);
        if (called[i].second) assert_string_equal(value_of(calls, 1, "name"), called[i].second);
        /* In pieces: nothing of a call goes out, and what did is the text before it. */
        for (size_t k = 0; k <= n; k++)
            if (calls_plain_bytes(called[i].format, called[i].answer, k) > n_plain)
                fail_msg("%s: %zu", called[i].answer, k);
        json_decref(calls);
    }
}

/* What a conversation holds of a call is read as it was. */
static void test_calls_written(void **state)
{
    (void)state;
    for (enum call_format format = CALLS_MARKED; format <= CALLS_LLAMA; format++) {
        struct bytes text = {0};
        size_t n_plain;
        calls_put(&text, format, "find", "{\"what\":\"a\"}");
        calls_put(&text, format, "go", NULL);
        json_t *calls = calls_read(format, text.data, text.n, &n_plain);
        assert_int_equal(json_array_size(calls), 2);
        assert_string_equal(value_of(calls, 0, "arguments"), "{\"what\":\"a\"}");
        assert_string_equal(value_of(calls, 1, "name"), "go");
        json_decref(calls);
        calls_put_response(&text, format, "said\r\n", 6);
        assert_non_null(strstr(text.data, "said\n"));
        bytes_free(&text);
    }
}

static void test_plain_bytes(void **state)
{
    static const struct {
        enum call_format format;
        const char *text;
        size_t plain;
    } cases[] = {{CALLS_MARKED, "see <tool", 4},  {CALLS_MARKED, "see <toll", 9}, {CALLS_MARKED, "see <tool_call>{", 4},
                 {CALLS_MARKED, "a <", 2},        {CALLS_MARKED, "{\"a\"", 4},    {CALLS_MISTRAL, "a [TOOL_", 2},
                 {CALLS_MISTRAL, "a [TOOLS]", 9}, {CALLS_LLAMA, "{\"name\"", 0},  {CALLS_LLAMA, " \n", 0},
                 {CALLS_LLAMA, "a {", 3},         {CALLS_LLAMA, "a <|python", 2}, {CALLS_MARKED, "", 0}};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_int_equal(calls_plain_bytes(cases[i].format, cases[i].text, strlen(cases[i].text)), cases[i].plain);
}

static void test_call_formats(void **state)
{
    (void)state;
    assert_int_equal(calls_format(NULL), CALLS_MARKED);
    assert_int_equal(calls_format("{{ '<|im_start|>' }}"), CALLS_MARKED);
    assert_int_equal(calls_format("return <tool_call> JSON"), CALLS_MARKED);
    assert_int_equal(calls_format("[AVAILABLE_TOOLS] [INST]"), CALLS_MISTRAL);
    assert_int_equal(calls_format("'<|start_header_id|>' 'Environment: ipython'"), CALLS_LLAMA);
    assert_true(calls_is_mark("[TOOL_CALLS]", 12) && calls_is_mark("[ARGS]", 6));
    assert_false(calls_is_mark("<|im_end|>", 10) || calls_is_mark("", 0));
}

static void test_tool_names(void **state)
{
    struct tools tools = {.named = -1};
    struct fault fault = {0};
    struct bytes grammar = {0};
    (void)state;
    assert_false(tools_add(&tools, "no blanks", NULL, NULL, &fault));
    fault = (struct fault){0};
    assert_true(tools_add(&tools, "find", "finds", NULL, &fault) && tools_add(&tools, "go", NULL, NULL, &fault));
    assert_int_equal(tools_find(&tools, "go", "tool_choice", &fault), 1);
    assert_int_equal(tools_find(&tools, "fly", "tool_choice", &fault), -1);
    fault = (struct fault){0};
    tools.choice = TOOL_REQUIRED;
    tools.named = 1;
    assert_true(tools_grammar(&tools, &grammar, &fault));
    assert_non_null(strstr(grammar.data, "\\\"go\\\""));
    assert_null(strstr(grammar.data, "find"));
    bytes_free(&grammar);
    tools_free(&tools);
}

/* ---- Grammars ----------------------------------------------------------------------------------- */

static bool make_grammar(const char *text, struct bytes *grammar, struct fault *fault)
{
    json_t *schema = json_loads(text, 0, NULL);
    assert_non_null(schema);
    const bool good = grammar_of_schema(grammar, schema, fault);
    json_decref(schema);
    return good;
}

static void test_grammars(void **state)
{
    static const char *const good[] = {
        "{}",
        "{\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"string\"}, \"b\": {\"type\": [\"integer\", "
        "\"null\"]}}, "
        "\"required\": [\"b\"]}",
        "{\"type\": \"array\", \"items\": {\"enum\": [1, \"two\", null]}, \"minItems\": 1, \"maxItems\": 3}",
        "{\"$defs\": {\"t\": {\"type\": \"object\", \"properties\": {\"next\": {\"$ref\": \"#/$defs/t\"}}}}, \"$ref\": "
        "\"#/$defs/t\"}",
        "{\"anyOf\": [{\"const\": \"x\\n\\\"\"}, {\"type\": \"number\"}]}",
        "{\"type\": \"string\", \"minLength\": 2, \"maxLength\": 5}"};
    static const char *const bad[] = {"{\"type\": \"text\"}",
                                      "{\"type\": \"string\", \"pattern\": \"(\"}",
                                      "{\"$ref\": \"#/$defs/none\"}",
                                      "{\"$ref\": \"file:///etc/passwd\"}",
                                      "{\"$defs\": {\"a\": {\"$ref\": \"#/$defs/a\"}}, \"$ref\": \"#/$defs/a\"}",
                                      "{\"enum\": []}",
                                      "{\"type\": \"array\", \"maxItems\": 1e9}",
                                      "{\"not\": {}}",
                                      "{\"type\": \"array\", \"minItems\": 3, \"maxItems\": 2}"};
    (void)state;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        struct bytes grammar = {0};
        struct fault fault = {0};
        assert_true(make_grammar(good[i], &grammar, &fault));
        assert_non_null(strstr(grammar.data, "root ::= "));
        bytes_free(&grammar);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct bytes grammar = {0};
        struct fault fault = {0};
        assert_false(make_grammar(bad[i], &grammar, &fault));
        assert_int_equal(fault.status, 400);
        bytes_free(&grammar);
    }
}

/* A schema as deep as JSON may be is refused, not followed. */
static void test_deep_schema(void **state)
{
    struct bytes grammar = {0};
    struct fault fault = {0};
    json_t *schema = json_pack("{s:s}", "type", "string");
    (void)state;
    for (int i = 0; i < 60; i++) schema = json_pack("{s:s, s:o}", "type", "array", "items", schema);
    assert_false(grammar_of_schema(&grammar, schema, &fault));
    json_decref(schema);
    bytes_free(&grammar);
}

/* ---- Keys ------------------------------------------------------------------------------------------ */

static enum sqz_status read_keys(const char *text, mode_t mode, struct keys **keys, struct sqz_error *error)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/keys", getenv("SQUEEZE_TEST_FOLDER"));
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
    chmod(path, mode);
    const enum sqz_status status = keys_read(keys, path, error);
    remove(path);
    return status;
}

static void test_keys(void **state)
{
    struct sqz_error error;
    struct keys *keys;
    (void)state;
    assert_int_equal(read_keys("# users\n\nsk-0123456789abcdef\r\nsk-fedcba9876543210\n", 0600, &keys, &error), SQZ_OK);
    assert_int_equal(keys_find(keys, "sk-0123456789abcdef"), 0);
    assert_int_equal(keys_find(keys, "sk-fedcba9876543210"), 1);
    assert_int_equal(keys_find(keys, "sk-0123456789abcde"), -1);
    assert_int_equal(keys_find(keys, "sk-0123456789abcdef0"), -1);
    assert_int_equal(keys_find(keys, ""), -1);
    keys_free(keys);
    assert_int_equal(read_keys("short\n", 0600, &keys, &error), SQZ_ERROR_ARGUMENT);
    assert_int_equal(read_keys("\n# none\n", 0600, &keys, &error), SQZ_ERROR_ARGUMENT);
    assert_int_equal(read_keys("sk-0123456789abcdef\n", 0644, &keys, &error), SQZ_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "chmod"));
    assert_int_equal(keys_read(&keys, "/nonexistent/keys", &error), SQZ_ERROR_IO);
    assert_null(keys);
}

/* ---- Streams ----------------------------------------------------------------------------------------- */

static void count_wake(void *owner)
{
    ++*(int *)owner;
}

static void test_stream(void **state)
{
    char much[4096] = {0};
    int woken = 0;
    struct stream *s = stream_create(true);
    (void)state;
    stream_join(s, count_wake, &woken);
    s->sleeping = true;
    stream_write(s, "a", 1);
    stream_write(s, "b", 1);
    assert_int_equal(woken, 1); /* it is awake by now */
    assert_true(stream_has_room(s));
    for (int i = 0; i < 16; i++) stream_write(s, much, sizeof much);
    assert_false(stream_has_room(s)); /* until its client reads */
    bytes_free(&s->out);
    assert_true(stream_has_room(s));
    stream_keep_alive(s, s->written_at + 0.5, 1);
    assert_int_equal(s->out.n, 0);
    stream_keep_alive(s, s->written_at + 2, 1);
    assert_int_equal(s->out.data[0], ':');
    stream_leave(s);
    assert_true(stream_is_gone(s));
    stream_write(s, "c", 1);
    assert_int_equal(s->out.n, 0);
    stream_release(s);
}

static void test_metrics(void **state)
{
    static struct metrics metrics;
    struct bytes text = {0};
    (void)state;
    metrics_add(&metrics, METRIC_ANSWER_TOKENS, 7);
    metrics_set(&metrics, METRIC_WAITING, 3);
    metrics_text(&metrics, &text);
    assert_non_null(strstr(text.data, "# TYPE squeeze_answer_tokens_total counter\nsqueeze_answer_tokens_total 7\n"));
    assert_non_null(strstr(text.data, "# TYPE squeeze_requests_waiting gauge\nsqueeze_requests_waiting 3\n"));
    bytes_free(&text);
}

/* ---- Passages ------------------------------------------------------------------------ */

/* Passages follow one another over the whole text, are few, and begin at characters. */
static void check_passages(const char *text, size_t n_bytes)
{
    struct passage passages[MOST_PASSAGES];
    const size_t n = passages_cut(passages, text, n_bytes);
    size_t at = 0;
    assert_true(n <= MOST_PASSAGES && (n > 0) == (n_bytes > 0));
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(passages[i].from, at);
        assert_true(passages[i].to > at);
        if (at) assert_true(((unsigned char)text[at] & 0xc0) != 0x80);
        at = passages[i].to;
    }
    assert_int_equal(at, n_bytes);
}

static void test_passages(void **state)
{
    static const char *const words[] = {"word ", "A sentence. ", "a line\n", "\n", "caf\xc3\xa9", "\xf0\x9f\x90\x8d"};
    static const size_t lengths[] = {0, 1, 100, 239, 240, 241, 1000, 60000, 400000};
    (void)state;
    for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
        for (size_t only = 0; only < 7; only++) {
            struct bytes text = {0};
            for (size_t i = 0; text.n < lengths[l]; i++) bytes_put(&text, words[only < 6 ? only : i * i % 6]);
            check_passages(text.data ? text.data : "", text.n);
            bytes_free(&text);
        }
    struct bytes text = {0};
    for (int i = 0; i < 40; i++)
        bytes_print(&text,
                    "Paragraph %d says what it has to say and ends.\nAnother line of it, one that is "
                    "long enough.\n\n",
                    i);
    struct passage passages[MOST_PASSAGES];
    const size_t n = passages_cut(passages, text.data, text.n);
    assert_true(n > 5);
    for (size_t i = 1; i < n; i++) assert_memory_equal(text.data + passages[i].from, "Paragraph", 9);
    bytes_free(&text);
}

static void test_passage_shares(void **state)
{
    static const size_t lengths[] = {3, 3, 0, 4, 5, 1};
    static const float had[] = {0.1f, 0.2f, 0.05f, 0, 0.4f, 0.25f}, nothing[6] = {0};
    struct passage passages[] = {{0, 5, 0}, {5, 10, 0}, {10, 12, 0}}, others[] = {{0, 5, 0}};
    (void)state;
    /* Tokens begin at 0, 3, 6, 6, 10 and 15. */
    assert_true(passages_share(passages, 3, lengths, had, 6));
    assert_float_equal(passages[0].share, 0.3, 1e-6);
    assert_float_equal(passages[1].share, 0.05, 1e-6);
    assert_float_equal(passages[2].share, 0.65, 1e-6);
    assert_false(passages_share(others, 1, lengths, nothing, 6));
    assert_false(passages_share(others, 0, lengths, had, 6));
}

/* ---- Steps ------------------------------------------------------------------------------ */

/* A machine that is not there: what its passes take. */
struct machine {
    double answer, pass, token, deeper; /* an answer's token; any pass; a piece's token, and more of it each token on */
};

static double pass_seconds(const struct machine *m, size_t n_answers, size_t n_tokens, size_t read)
{
    return m->pass + m->answer * (double)n_answers + (double)n_tokens * (m->token + m->deeper * (double)read);
}

/* Reads a document of 8,000 tokens beside answers, whose number changes. Whatever the machine, a piece adds no more to a
 * step than is allowed, but for one of a single token, and what the guess of a cost that grows lags behind. */
static void read_beside_answers(const struct machine *m, enum pace_pass pass, size_t n_answers, double step_seconds)
{
    struct pace pace;
    size_t n_steps = 0, n_alone = 0, read = 0;
    pace_begin(&pace, step_seconds, 1);
    for (size_t n = n_answers; read < 8000; n_steps++, n = n_answers + n_steps / 500 % 2) {
        const double alone = pass_seconds(m, n, 0, 0);
        if (pace_wants_alone(&pace, n)) {
            pace_note(&pace, PACE_WITH_ANSWERS, n, 0, alone);
            assert_false(pace_wants_alone(&pace, n));
            n_alone++;
            continue;
        }
        const double allowed = pace_seconds(&pace, n, true);
        const size_t piece = pace_tokens(&pace, pass, allowed);
        const double whole = pass_seconds(m, pass == PACE_APART ? 0 : n, piece, read);
        const double added = pass == PACE_APART ? whole : whole - alone;
        assert_in_range(piece, 1, 512);
        if (piece > 1 && !(added <= 1.05 * allowed))
            fail_msg("%zu answers, %zu tokens read: %zu more take %g s, allowed are %g", n, read, piece, added,
                     allowed);
        if (piece > 1 && !(added <= step_seconds && added <= alone))
            fail_msg("%zu answers of %g s wait %g s for %zu tokens", n, alone, added, piece);
        pace_note(&pace, pass, pass == PACE_APART ? 0 : n, piece, whole);
        if (pass == PACE_APART) pace_note(&pace, PACE_WITH_ANSWERS, n, 0, alone);
        read += piece;
    }
    assert_true(pass == PACE_APART || n_alone >= n_steps / 64); /* what is usual is looked at again and again */
    assert_true(n_alone <= n_steps / 8 + 8);
}

static void test_pace(void **state)
{
    static const double speeds[] = {0.001, 0.1, 1, 20, 1000}; /* times what a small model takes on two cores */
    (void)state;
    for (size_t i = 0; i < sizeof speeds / sizeof *speeds; i++) {
        const double x = speeds[i];
        const struct machine machine = {0.012 * x, 0.003 * x, 0.008 * x, 2e-6 * x};
        for (size_t n = 1; n <= 64; n *= 8) {
            read_beside_answers(&machine, PACE_APART, n, 0.1);
            read_beside_answers(&machine, PACE_WITH_ANSWERS, n, 0.1);
        }
    }
}

static void test_pace_of_questions(void **state)
{
    struct pace pace;
    (void)state;
    pace_begin(&pace, 0.1, 1);
    assert_int_equal(pace_tokens(&pace, PACE_WITH_ANSWERS, 0.1), 1); /* nothing is known yet */
    assert_false(pace_wants_alone(&pace, 0));
    pace_note(&pace, PACE_WITH_ANSWERS, 0, 1, 0.002);
    assert_int_equal(pace_tokens(&pace, PACE_WITH_ANSWERS, pace_seconds(&pace, 0, true)), 45);
    pace_note(&pace, PACE_WITH_ANSWERS, 1, 0, 0.01);
    /* Short questions have a whole step, documents what an answer hardly notices. */
    assert_true(pace_seconds(&pace, 1, false) == pace_seconds(&pace, 0, false));
    assert_true(pace_seconds(&pace, 1, true) <= 0.01);
    assert_true(pace_seconds(&pace, 64, true) == pace_seconds(&pace, 64, false));
    /* A pass that was slow once makes the next piece short at once, and is forgotten slowly. */
    pace_note(&pace, PACE_WITH_ANSWERS, 0, 50, 5);
    assert_int_equal(pace_tokens(&pace, PACE_WITH_ANSWERS, 0.1), 1);
    for (int i = 0; i < 40; i++) pace_note(&pace, PACE_WITH_ANSWERS, 0, 10, 0.02);
    assert_in_range(pace_tokens(&pace, PACE_WITH_ANSWERS, 0.1), 45, 50);
}

/* On a card a piece takes what its launches take, however short it is: it is as long as costs nothing, else a document
 * beside answers would be read by single tokens. */
static void test_pace_on_a_card(void **state)
{
    const struct machine card = {0.0001, 0.004, 2e-6, 0};
    const double alone = 0.0025; /* of one answer, whose launches are captured */
    struct pace pace;
    (void)state;
    pace_begin(&pace, 0.1, 64);
    pace_note(&pace, PACE_WITH_ANSWERS, 1, 0, alone);
    for (size_t i = 0; i < 20; i++) {
        const size_t piece = pace_tokens(&pace, PACE_APART, pace_seconds(&pace, 1, true));
        assert_in_range(piece, 64, 512);
        assert_true(pace_has_room(&pace, PACE_APART, 1));
        pace_note(&pace, PACE_APART, 0, piece, pass_seconds(&card, 0, piece, 0));
        pace_note(&pace, PACE_WITH_ANSWERS, 1, 0, alone);
    }
}

/* One step of the answers alone that took long lets a document keep them hardly longer; many do. */
static void test_pace_of_outliers(void **state)
{
    struct pace pace;
    (void)state;
    pace_begin(&pace, 1, 1);
    for (int i = 0; i < 5; i++) pace_note(&pace, PACE_WITH_ANSWERS, 2, 0, 0.02);
    const double usual = pace_seconds(&pace, 2, true);
    pace_note(&pace, PACE_WITH_ANSWERS, 2, 0, 0.5);
    assert_true(pace_seconds(&pace, 2, true) <= 1.1 * usual);
    for (int i = 0; i < 100; i++) pace_note(&pace, PACE_WITH_ANSWERS, 2, 0, 0.5);
    assert_true(pace_seconds(&pace, 2, true) >= 20 * usual);
}

/* Beside a stranger steps take twice as long: documents wait, but not for ever. */
static void test_pace_of_strangers(void **state)
{
    struct pace pace;
    int n_waited = 0;
    (void)state;
    pace_begin(&pace, 1, 1);
    assert_true(pace_has_room(&pace, PACE_APART, 1)); /* nothing is known yet */
    for (int i = 0; i < 5; i++) pace_note(&pace, PACE_WITH_ANSWERS, 1, 0, 0.01);
    pace_note(&pace, PACE_APART, 0, 1, 0.009);
    assert_true(pace_has_room(&pace, PACE_APART, 1));
    pace_note(&pace, PACE_APART, 0, 1, 0.09); /* one piece that took long says nothing of the next */
    assert_true(pace_has_room(&pace, PACE_APART, 1));
    pace_note(&pace, PACE_WITH_ANSWERS, 1, 0, 0.02);
    assert_false(pace_has_room(&pace, PACE_APART, 1));
    assert_true(pace_has_room(&pace, PACE_APART, 0)); /* nobody waits */
    pace_note(&pace, PACE_WITH_ANSWERS, 1, 0, 0.01);
    assert_true(pace_has_room(&pace, PACE_APART, 1));
    for (; n_waited < 1000 && (n_waited == 0 || !pace_has_room(&pace, PACE_APART, 1)); n_waited++)
        pace_note(&pace, PACE_WITH_ANSWERS, 1, 0, 0.02);
    assert_in_range(n_waited, 20, 300);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_utf8),
        cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_bad_bodies),
        cmocka_unit_test(test_numbers),
        cmocka_unit_test(test_depth_and_size),
        cmocka_unit_test(test_stops),
        cmocka_unit_test(test_talk),
        cmocka_unit_test(test_calls),
        cmocka_unit_test(test_tool_names),
        cmocka_unit_test(test_calls_written),
        cmocka_unit_test(test_plain_bytes),
        cmocka_unit_test(test_call_formats),
        cmocka_unit_test(test_grammars),
        cmocka_unit_test(test_deep_schema),
        cmocka_unit_test(test_keys),
        cmocka_unit_test(test_stream),
        cmocka_unit_test(test_metrics),
        cmocka_unit_test(test_passages),
        cmocka_unit_test(test_passage_shares),
        cmocka_unit_test(test_pace),
        cmocka_unit_test(test_pace_of_questions),
        cmocka_unit_test(test_pace_on_a_card),
        cmocka_unit_test(test_pace_of_outliers),
        cmocka_unit_test(test_pace_of_strangers),
    };
    return cmocka_run_group_tests_name("serve_parts", tests, NULL, NULL);
}
