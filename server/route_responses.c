/* /v1/responses. */
#include <string.h>

#include "asking.h"

/* ---- Input -------------------------------------------------------------------------- */

static const char *role_of(const char *name)
{
    if (!name) return NULL;
    if (strcmp(name, "system") == 0 || strcmp(name, "developer") == 0) return "system";
    return strcmp(name, "user") == 0 ? "user" : strcmp(name, "assistant") == 0 ? "assistant" : NULL;
}

static bool add_output(struct talk *talk, const json_t *item, struct fault *fault)
{
    struct bytes said = {0}, *text = talk_say(talk, "user", fault);
    const bool good = text && talk_content(&said, json_object_get(item, "output"), "output", fault);
    if (good) calls_put_response(text, talk->calls, said.data ? said.data : "", said.n);
    bytes_free(&said);
    return good;
}

static bool add_item(struct talk *talk, const json_t *item, struct fault *fault)
{
    const char *type = json_string_value(json_object_get(item, "type"));
    const char *name = json_string_value(json_object_get(item, "role")), *role = role_of(name);
    if (type && strcmp(type, "reasoning") == 0) return true;
    if (type && strcmp(type, "function_call_output") == 0) return add_output(talk, item, fault);
    if (type && strcmp(type, "function_call") == 0) {
        const char *called = json_string_value(json_object_get(item, "name"));
        struct bytes *text = called ? talk_say(talk, "assistant", fault) : NULL;
        if (!text) return fault_set(fault, 400, "invalid_value", "input", "a function call without a name");
        calls_put(text, talk->calls, called, json_string_value(json_object_get(item, "arguments")));
        return true;
    }
    if ((type && strcmp(type, "message") != 0) || !role)
        return fault_set(fault, 400, "invalid_value", "input",
                         "an item of type %.40s and role %.40s: allowed are messages of system, developer, user and "
                         "assistant, function_call and function_call_output",
                         type ? type : "message", name ? name : "(none)");
    struct bytes *text = talk_say(talk, role, fault);
    return text && talk_content(text, json_object_get(item, "content"), "content", fault);
}

static bool take_input(const json_t *body, struct talk *talk, struct fault *fault)
{
    const json_t *input = json_object_get(body, "input");
    const char *instructions = NULL;
    size_t i;
    json_t *item;
    if (!input_text(body, "instructions", &instructions, fault)) return false;
    if (json_is_string(input)) {
        struct bytes *text = talk_say(talk, "user", fault);
        if (!text || !talk_content(text, input, "input", fault)) return false;
    } else if (json_is_array(input)) {
        json_array_foreach(input, i, item) if (!add_item(talk, item, fault)) return false;
    } else return fault_set(fault, 400, "invalid_type", "input", "input is a string or an array of items");
    return !instructions || talk_instruct(talk, instructions, strlen(instructions), fault);
}

/* ---- Options ----------------------------------------------------------------------------- */

static bool take_tools(const json_t *body, struct tools *tools, struct fault *fault)
{
    const json_t *list = NULL;
    size_t i;
    json_t *one;
    if (!input_array(body, "tools", &list, fault)) return false;
    json_array_foreach(list, i, one)
    {
        const char *type = json_string_value(json_object_get(one, "type"));
        const json_t *parameters = NULL;
        const char *name = NULL, *description = NULL;
        if (!type || strcmp(type, "function") != 0)
            return fault_set(fault, 400, "invalid_value", "tools", "tool %zu is no function: others are not known", i);
        if (!input_object(one, "parameters", &parameters, fault) || !input_text(one, "name", &name, fault) ||
            !input_text(one, "description", &description, fault) ||
            !tools_add(tools, name, description, parameters, fault))
            return false;
    }
    const json_t *choice = json_object_get(body, "tool_choice");
    return asking_tool_choice(choice, choice, tools, fault);
}

/* include and top_logprobs: whether probabilities are shown. */
static bool take_likely(const json_t *body, struct ask *ask, struct fault *fault)
{
    const json_t *include = NULL;
    int64_t n = 0;
    size_t i;
    json_t *one;
    if (!input_array(body, "include", &include, fault) ||
        !input_count(body, "top_logprobs", 0, SQZ_MOST_LIKELY, &n, fault))
        return false;
    json_array_foreach(include, i, one)
    {
        const char *name = json_string_value(one);
        if (name && strcmp(name, "message.output_text.logprobs") == 0) ask->n_likely = (int)n;
    }
    return true;
}

/* What the response repeats of its request. */
static bool take_shown(const json_t *body, struct ask *ask, struct fault *fault)
{
    static const char *const names[] = {"instructions", "metadata", "parallel_tool_calls", "text",
                                        "tool_choice",  "tools",    "top_logprobs",        "user"};
    const json_t *metadata = NULL;
    const char *user = NULL;
    bool parallel = true;
    if (!input_object(body, "metadata", &metadata, fault) || !input_text(body, "user", &user, fault) ||
        !input_flag(body, "parallel_tool_calls", &parallel, fault))
        return false;
    ask->shown = json_pack("{s:n, s:{}, s:b, s:{s:{s:s}}, s:s, s:[], s:i, s:n}", "instructions", "metadata",
                           "parallel_tool_calls", 1, "text", "format", "type", "text", "tool_choice", "auto", "tools",
                           "top_logprobs", 0, "user");
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        json_t *given = json_object_get(body, names[i]);
        if (given && !json_is_null(given)) json_object_set_new(ask->shown, names[i], json_deep_copy(given));
    }
    return ask->shown || fault_set(fault, 503, "out_of_memory", NULL, "out of memory");
}

static bool take_form(const json_t *body, struct ask *ask, struct fault *fault)
{
    const json_t *text = NULL, *format = NULL;
    int64_t most = -1;
    const char *previous = NULL;
    if (!input_flag(body, "stream", &ask->events, fault) ||
        !input_count(body, "max_output_tokens", 1, INT32_MAX, &most, fault) ||
        !input_text(body, "previous_response_id", &previous, fault) || !input_object(body, "text", &text, fault) ||
        (text && !input_object(text, "format", &format, fault)))
        return false;
    if (previous)
        return fault_set(fault, 400, "unsupported", "previous_response_id",
                         "nothing is kept between requests: send the whole conversation as input");
    if (most > 0 && (size_t)most < ask->max_tokens) ask->max_tokens = (size_t)most;
    return asking_format(format, "text.format", ask, fault) && take_likely(body, ask, fault) &&
           take_shown(body, ask, fault);
}

static bool take_response(struct call *call, const json_t *body, struct ask *ask, struct talk *talk,
                          struct tools *tools)
{
    struct fault *fault = &call->fault;
    const char *model = NULL;
    return input_text(body, "model", &model, fault) && take_input(body, talk, fault) &&
           take_tools(body, tools, fault) && take_form(body, ask, fault) &&
           asking_talk(call, body, model, ask, talk, tools, true);
}

void route_responses(struct call *call)
{
    asking_answer(call, ASK_RESPONSE, "resp_", take_response, &write_responses);
}
