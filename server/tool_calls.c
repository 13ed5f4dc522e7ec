/* Calls of tools; tool_calls.h describes them. */
#define _GNU_SOURCE /* memmem */
#include "tool_calls.h"

#include <stdlib.h>
#include <string.h>

#include "talk.h"

enum mark { MARK_TAG, MARK_MISTRAL, MARK_PYTHON, N_MARKS };

static const char *const marks[N_MARKS] = {"<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"};
static const char tag_end[] = "</tool_call>", args_mark[] = "[ARGS]";

enum call_format calls_format(const char *t)
{
    if (!t || strstr(t, marks[MARK_TAG])) return CALLS_MARKED;
    if (strstr(t, marks[MARK_MISTRAL]) || strstr(t, "[AVAILABLE_TOOLS]")) return CALLS_MISTRAL;
    return strstr(t, marks[MARK_PYTHON]) || strstr(t, "Environment: ipython") ? CALLS_LLAMA : CALLS_MARKED;
}

bool calls_is_mark(const char *text, size_t n)
{
    for (int i = 0; i < N_MARKS; i++)
        if (strlen(marks[i]) == n && memcmp(marks[i], text, n) == 0) return true;
    return (n == strlen(tag_end) && memcmp(tag_end, text, n) == 0) ||
           (n == strlen(args_mark) && memcmp(args_mark, text, n) == 0);
}

/* ---- Writing -------------------------------------------------------------------------------- */

void calls_put_before(struct bytes *text, enum call_format format, const char *name)
{
    static const char *const forms[] = {
        "<tool_call>\n{\"name\": \"%s\", \"arguments\": ", "[TOOL_CALLS][{\"name\": \"%s\", \"arguments\": ",
        "{\"name\": \"%s\", \"parameters\": "};
    const char *at = strstr(forms[format], "%s");
    bytes_append(text, forms[format], (size_t)(at - forms[format]));
    bytes_print(text, "%s%s", name, at + 2);
}

const char *calls_behind(enum call_format format)
{
    return format == CALLS_MARKED ? "}\n</tool_call>" : format == CALLS_MISTRAL ? "}]" : "}";
}

void calls_put(struct bytes *text, enum call_format format, const char *name, const char *arguments)
{
    if (text->n) bytes_put(text, "\n");
    calls_put_before(text, format, name);
    bytes_put(text, arguments && *arguments ? arguments : "{}");
    bytes_put(text, calls_behind(format));
}

void calls_put_response(struct bytes *text, enum call_format format, const char *said, size_t n)
{
    static const char *const around[][2] = {{"<tool_response>\n", "\n</tool_response>"},
                                            {"[TOOL_RESULTS]", "[/TOOL_RESULTS]"},
                                            {"The function's output:\n", "\n"}};
    bytes_put(text, around[format][0]);
    talk_text(text, said, n);
    bytes_put(text, around[format][1]);
}

/* ---- Where a call begins ---------------------------------------------------------------------- */

/* The first mark from byte `from` on; false: none. */
static bool find_mark(const char *text, size_t n, size_t from, size_t *at, enum mark *which)
{
    bool found = false;
    for (int i = 0; i < N_MARKS; i++) {
        const char *hit = n > from ? memmem(text + from, n - from, marks[i], strlen(marks[i])) : NULL;
        if (!hit || (found && (size_t)(hit - text) >= *at)) continue;
        *at = (size_t)(hit - text);
        *which = (enum mark)i;
        found = true;
    }
    return found;
}

static size_t skip(const char *text, size_t n, size_t at, const char *characters)
{
    while (at < n && text[at] && strchr(characters, text[at])) at++;
    return at;
}

/* Bytes at the end that are the beginning of a mark. */
static size_t held_back(const char *text, size_t n)
{
    size_t most = 0;
    for (int i = 0; i < N_MARKS; i++) {
        size_t held = strlen(marks[i]) - 1 < n ? strlen(marks[i]) - 1 : n;
        while (held > most && memcmp(text + n - held, marks[i], held) != 0) held--;
        if (held > most) most = held;
    }
    return most;
}

size_t calls_plain_bytes(enum call_format format, const char *text, size_t n)
{
    size_t at = 0;
    enum mark which;
    const size_t blank = skip(text, n, 0, " \n\r\t");
    if (format == CALLS_LLAMA && (blank == n || text[blank] == '{')) return 0;
    return find_mark(text, n, 0, &at, &which) ? at : n - held_back(text, n);
}

/* ---- Reading ------------------------------------------------------------------------------------- */

/* Arguments are an object, or its text. */
static bool add_call(json_t *calls, const char *name, const json_t *arguments)
{
    char *said = json_is_object(arguments) ? json_dumps(arguments, JSON_COMPACT) : NULL;
    const char *text = said ? said : json_is_string(arguments) ? json_string_value(arguments) : "{}";
    const bool good =
        name && json_array_append_new(calls, json_pack("{s:s, s:s}", "name", name, "arguments", text)) == 0;
    free(said);
    return good;
}

static bool add_object(json_t *calls, const json_t *object)
{
    const json_t *arguments = json_object_get(object, "arguments");
    if (!arguments) arguments = json_object_get(object, "parameters");
    return add_call(calls, json_string_value(json_object_get(object, "name")), arguments);
}

/* A value that begins at a byte, and where it ends; NULL: none. */
static json_t *take_json(const char *text, size_t n, size_t *at)
{
    json_error_t error;
    json_t *value = json_loadb(text + *at, n - *at, JSON_DISABLE_EOF_CHECK, &error);
    if (value) *at += (size_t)error.position;
    return value;
}

/* name[ARGS]{...}, as newer models of Mistral have it. */
static bool take_named(json_t *calls, const char *text, size_t n, size_t *at)
{
    char name[65];
    size_t end = *at;
    while (end < n && end - *at < 64 && strchr("[{ \n", text[end]) == NULL) end++;
    const size_t length = end - *at;
    memcpy(name, text + *at, length);
    name[length] = '\0';
    if (end + strlen(args_mark) <= n && memcmp(text + end, args_mark, strlen(args_mark)) == 0) end += strlen(args_mark);
    if (length == 0 || end >= n || text[end] != '{') return false;
    json_t *arguments = take_json(text, n, &end);
    const bool good = arguments && add_call(calls, name, arguments);
    json_decref(arguments);
    *at = end;
    return good;
}

/* What is called from a byte on, one after another. Returns where it ends. */
static size_t take_calls(json_t *calls, const char *text, size_t n, size_t at, bool named)
{
    for (;;) {
        size_t next = skip(text, n, at, " \n\r\t;,"), i;
        json_t *value = NULL, *one;
        bool good = false;
        if (next < n && (text[next] == '{' || text[next] == '[')) value = take_json(text, n, &next);
        else if (next < n && named) good = take_named(calls, text, n, &next);
        if (json_is_object(value)) good = add_object(calls, value);
        json_array_foreach(value, i, one) good |= add_object(calls, one);
        json_decref(value);
        if (!good) return at;
        at = next;
        named = false;
    }
}

/* The part of an answer that a mark begins. Returns where it ends. */
static size_t take_marked(json_t *calls, const char *text, size_t n, size_t at, enum mark which)
{
    at += strlen(marks[which]);
    if (which != MARK_TAG) return take_calls(calls, text, n, at, which == MARK_MISTRAL);
    const char *end = memmem(text + at, n - at, tag_end, strlen(tag_end));
    take_calls(calls, text, end ? (size_t)(end - text) : n, at, false);
    return end ? (size_t)(end - text) + strlen(tag_end) : n;
}

/* An answer that is nothing but calls. */
static void take_bare(json_t *calls, const char *text, size_t n)
{
    const size_t end = take_calls(calls, text, n, 0, false);
    if (skip(text, n, end, " \n\r\t;") < n) json_array_clear(calls);
}

json_t *calls_read(enum call_format format, const char *text, size_t n, size_t *n_plain)
{
    json_t *calls = json_array();
    size_t at = 0, begin = 0;
    enum mark which;
    *n_plain = n;
    if (format == CALLS_LLAMA) take_bare(calls, text, n);
    if (json_array_size(calls)) *n_plain = 0;
    else
        while (find_mark(text, n, at, &begin, &which)) {
            const bool first = json_array_size(calls) == 0;
            at = take_marked(calls, text, n, begin, which);
            if (first && json_array_size(calls)) *n_plain = begin;
        }
    if (json_array_size(calls)) return calls;
    json_decref(calls);
    return NULL;
}
