/* Tools; tools.h describes them. */
#include "tools.h"

#include <stdlib.h>
#include <string.h>

#include "ask.h"
#include "grammar.h"

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

/* How a call is to be written. */
static void put_example(struct bytes *text, enum call_format format)
{
    bytes_put(text, format == CALLS_LLAMA
                        ? "To call one, answer with its name and parameters as JSON and nothing else:\n"
                        : "To call one, answer with its name and arguments as JSON in these marks:\n");
    calls_put_before(text, format, "...");
    bytes_put(text, "{...}");
    bytes_put(text, calls_behind(format));
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
    bytes_put(&text, "</tools>\n");
    put_example(&text, t->format);
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
        calls_put_before(&texts[n], t->format, t->tool[i].name);
        before[n] = texts[n].data;
        schemas[n++] = t->tool[i].parameters ? t->tool[i].parameters : any;
    }
    const bool good = grammar_of_choices(grammar, before, schemas, n, calls_behind(t->format), fault);
    for (size_t i = 0; i < n; i++) bytes_free(&texts[i]);
    json_decref(any);
    return good;
}
