/* Tools; tools.h describes them. */
#define _GNU_SOURCE /* memmem */
#include "tools.h"

#include <stdlib.h>
#include <string.h>

#include "ask.h"
#include "grammar.h"

static const char call_begin[] = "<tool_call>", call_end[] = "</tool_call>";

static bool name_is_good(const char *name)
{
    const size_t n = strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-");
    return n > 0 && n <= 64 && !name[n];
}

bool tools_add(struct tools *t, const char *name, const char *description, const json_t *parameters,
               struct fault *fault)
{
    if (!name || !name_is_good(name))
        return fault_set(fault, 400, "invalid_value", "tools",
                         "a tool's name is 1 to 64 letters, digits, '_' and '-': found %.80s", name ? name : "none");
    if (t->n == MOST_TOOLS)
        return fault_set(fault, 400, "invalid_value", "tools", "more than %d tools", (int)MOST_TOOLS);
    if (!t->tool) t->tool = calloc(MOST_TOOLS, sizeof *t->tool);
    if (!t->tool) return fault_set(fault, 503, "out_of_memory", NULL, "out of memory");
    t->tool[t->n++] = (struct tool){name, description, parameters};
    return true;
}

int tools_find(const struct tools *t, const char *name, const char *param, struct fault *fault)
{
    for (size_t i = 0; i < t->n; i++)
        if (name && strcmp(t->tool[i].name, name) == 0) return (int)i;
    fault_set(fault, 400, "invalid_value", param, "%s names a tool that is not among the tools: %.64s", param,
              name ? name : "(none)");
    return -1;
}

void tools_keep(struct tools *t, const bool *allowed)
{
    size_t kept = 0;
    for (size_t i = 0; i < t->n; i++)
        if (allowed[i]) t->tool[kept++] = t->tool[i];
    t->n = kept;
}

bool tools_check_choice(const struct tools *t, struct fault *fault)
{
    if (t->choice == TOOL_REQUIRED && t->n == 0)
        return fault_set(fault, 400, "invalid_value", "tool_choice",
                         "tool_choice wants a call, and there are no tools");
    return fault->status == 0;
}

void tools_free(struct tools *t)
{
    free(t->tool);
    memset(t, 0, sizeof *t);
}

bool tools_tell(const struct tools *t, struct talk *talk, struct fault *fault)
{
    struct bytes text = {0};
    if (t->n == 0 || t->choice == TOOL_NONE) return true;
    bytes_put(&text, "You may call functions to help with the user's request. They are given in <tools></tools>:\n"
                     "<tools>\n");
    for (size_t i = 0; i < t->n; i++) {
        json_t *one = json_pack("{s:s, s:{s:s, s:s*, s:O*}}", "type", "function", "function", "name", t->tool[i].name,
                                "description", t->tool[i].description, "parameters", t->tool[i].parameters);
        char *line = one ? json_dumps(one, JSON_COMPACT) : NULL;
        bytes_print(&text, "%s\n", line ? line : "");
        free(line);
        json_decref(one);
    }
    bytes_put(&text, "</tools>\nTo call one, answer with its name and arguments as JSON in these marks:\n<tool_call>\n"
                     "{\"name\": \"...\", \"arguments\": {...}}\n</tool_call>");
    const bool good = !text.failed && talk_instruct(talk, text.data, text.n, fault);
    bytes_free(&text);
    return good;
}

bool tools_grammar(const struct tools *t, struct bytes *grammar, struct fault *fault)
{
    const char *before[MOST_TOOLS];
    const json_t *schemas[MOST_TOOLS];
    struct bytes texts[MOST_TOOLS] = {0};
    size_t n = 0;
    json_t *any = json_pack("{s:s}", "type", "object");
    for (size_t i = 0; i < t->n; i++) {
        if (t->named >= 0 && (size_t)t->named != i) continue;
        bytes_print(&texts[n], "<tool_call>\n{\"name\": \"%s\", \"arguments\": ", t->tool[i].name);
        before[n] = texts[n].data;
        schemas[n++] = t->tool[i].parameters ? t->tool[i].parameters : any;
    }
    const bool good = grammar_of_choices(grammar, before, schemas, n, "}\n</tool_call>", fault);
    for (size_t i = 0; i < n; i++) bytes_free(&texts[i]);
    json_decref(any);
    return good;
}

void tools_put_call(struct bytes *text, const char *name, const char *arguments)
{
    bytes_print(text, "%s<tool_call>\n{\"name\": \"%s\", \"arguments\": %s}\n</tool_call>", text->n ? "\n" : "", name,
                arguments && *arguments ? arguments : "{}");
}

void tools_put_response(struct bytes *text, const char *said, size_t n)
{
    bytes_put(text, "<tool_response>\n");
    talk_text(text, said, n);
    bytes_put(text, "\n</tool_response>");
}

/* ---- In an answer ------------------------------------------------------------------------ */

size_t tools_plain_bytes(const char *text, size_t n)
{
    const size_t mark = strlen(call_begin);
    const char *found = n ? memmem(text, n, call_begin, mark) : NULL;
    if (found) return (size_t)(found - text);
    for (size_t held = mark - 1 < n ? mark - 1 : n; held > 0; held--)
        if (memcmp(text + n - held, call_begin, held) == 0) return n - held;
    return n;
}

static json_t *read_call(const char *text, size_t n)
{
    json_error_t error;
    json_t *call = json_loadb(text, n, JSON_DISABLE_EOF_CHECK, &error), *result = NULL;
    const char *name = json_string_value(json_object_get(call, "name"));
    const json_t *arguments = json_object_get(call, "arguments");
    char *said = json_is_object(arguments) ? json_dumps(arguments, JSON_COMPACT) : NULL;
    if (name) result = json_pack("{s:s, s:s}", "name", name, "arguments", said ? said : "{}");
    free(said);
    json_decref(call);
    return result;
}

json_t *tools_calls(const char *text, size_t n, size_t *n_plain)
{
    json_t *calls = json_array();
    size_t at = 0;
    *n_plain = n;
    while (at < n) {
        const char *begin = memmem(text + at, n - at, call_begin, strlen(call_begin));
        if (!begin) break;
        const size_t from = (size_t)(begin - text) + strlen(call_begin);
        const char *end = memmem(text + from, n - from, call_end, strlen(call_end));
        const size_t to = end ? (size_t)(end - text) : n;
        json_t *call = read_call(text + from, to - from);
        if (call) {
            if (json_array_size(calls) == 0) *n_plain = (size_t)(begin - text);
            json_array_append_new(calls, call);
        }
        at = end ? to + strlen(call_end) : n;
    }
    if (json_array_size(calls)) return calls;
    json_decref(calls);
    return NULL;
}
