/* /v1/chat/completions and /v1/completions. */
#include <stdlib.h>
#include <string.h>

#include "asking.h"

enum { COMPLETION_TOKENS = 16 }; /* of a completion that says nothing about it, as OpenAI has it */

/* ---- Messages ----------------------------------------------------------------------- */

static const char *role_of(const char *name)
{
    static const char *const known[][2] = {{"system", "system"},       {"developer", "system"}, {"user", "user"},
                                           {"assistant", "assistant"}, {"tool", "user"},        {"function", "user"}};
    for (size_t i = 0; name && i < sizeof known / sizeof *known; i++)
        if (strcmp(name, known[i][0]) == 0) return known[i][1];
    return NULL;
}

static bool add_calls(struct bytes *text, enum call_format format, const json_t *message, struct fault *fault)
{
    size_t i;
    json_t *call;
    json_array_foreach(json_object_get(message, "tool_calls"), i, call)
    {
        const json_t *function = json_object_get(call, "function");
        const char *name = json_string_value(json_object_get(function, "name"));
        if (!name) return fault_set(fault, 400, "invalid_value", "messages", "a tool call without a function's name");
        calls_put(text, format, name, json_string_value(json_object_get(function, "arguments")));
    }
    return true;
}

static bool add_message(struct talk *talk, const json_t *message, struct fault *fault)
{
    const char *name = json_string_value(json_object_get(message, "role")), *role = role_of(name);
    const json_t *content = json_object_get(message, "content");
    if (!role)
        return fault_set(fault, 400, "invalid_value", "messages",
                         "a message's role is %.40s: allowed are system, developer, user, assistant and tool",
                         name ? name : "missing");
    struct bytes *text = talk_say(talk, role, fault);
    if (!text) return false;
    if (strcmp(name, "tool") != 0)
        return talk_content(text, content, "content", fault) && add_calls(text, talk->calls, message, fault);
    struct bytes said = {0};
    const bool good = talk_content(&said, content, "content", fault);
    if (good) calls_put_response(text, talk->calls, said.data ? said.data : "", said.n);
    bytes_free(&said);
    return good;
}

static bool take_messages(const json_t *body, struct talk *talk, struct fault *fault)
{
    const json_t *messages = NULL;
    size_t i;
    json_t *one;
    if (!input_array(body, "messages", &messages, fault)) return false;
    if (json_array_size(messages) == 0)
        return fault_set(fault, 400, "invalid_value", "messages", "messages is missing or empty: one is needed");
    json_array_foreach(messages, i, one)
    {
        if (!json_is_object(one))
            return fault_set(fault, 400, "invalid_type", "messages", "message %zu is %s: an object is wanted", i,
                             input_kind(one));
        if (!add_message(talk, one, fault)) return false;
    }
    return true;
}

/* ---- Tools ----------------------------------------------------------------------------- */

static bool take_tools(const json_t *body, struct tools *tools, struct fault *fault)
{
    const json_t *list = NULL;
    size_t i;
    json_t *one;
    if (!input_array(body, "tools", &list, fault)) return false;
    json_array_foreach(list, i, one)
    {
        const json_t *function = json_object_get(one, "function"),
                     *parameters = json_object_get(function, "parameters");
        if (!json_is_object(function))
            return fault_set(fault, 400, "invalid_value", "tools", "tool %zu has no function: others are not known", i);
        if (parameters && !json_is_object(parameters))
            return fault_set(fault, 400, "invalid_type", "tools", "the parameters of tool %zu are no object", i);
        const char *name = NULL, *description = NULL;
        if (!input_text(function, "name", &name, fault) || !input_text(function, "description", &description, fault) ||
            !tools_add(tools, name, description, parameters, fault))
            return false;
    }
    const json_t *choice = json_object_get(body, "tool_choice");
    return asking_tool_choice(choice, json_object_get(choice, "function"), tools, fault);
}

/* ---- Options ------------------------------------------------------------------------------ */

/* Of the answer's form: how many, how long, whether it streams. */
static bool take_form(const json_t *body, struct ask *ask, struct fault *fault)
{
    const json_t *stream = NULL;
    int64_t n = 1, most = -1;
    const int64_t limit = (int64_t)ask->max_tokens;
    if (!input_count(body, "n", 1, MOST_CHOICES, &n, fault) || !input_flag(body, "stream", &ask->events, fault) ||
        !input_count(body, "max_tokens", 1, INT32_MAX, &most, fault) ||
        !input_count(body, "max_completion_tokens", 1, INT32_MAX, &most, fault) ||
        !input_object(body, "stream_options", &stream, fault) ||
        (stream && !input_flag(stream, "include_usage", &ask->events_usage, fault)))
        return false;
    ask->n_each = (unsigned)n;
    if (most > 0 && most < limit) ask->max_tokens = (size_t)most;
    return asking_stops(body, "stop", ask, fault);
}

static bool take_chat_likely(const json_t *body, struct ask *ask, struct fault *fault)
{
    bool wanted = false;
    int64_t n = 0;
    if (!input_flag(body, "logprobs", &wanted, fault) ||
        !input_count(body, "top_logprobs", 0, SQZ_MOST_LIKELY, &n, fault))
        return false;
    if (n && !wanted)
        return fault_set(fault, 400, "invalid_value", "top_logprobs", "top_logprobs needs logprobs to be true");
    ask->n_likely = wanted ? (int)n : -1;
    return true;
}

static bool take_chat(struct call *call, const json_t *body, struct ask *ask, struct talk *talk, struct tools *tools)
{
    struct fault *fault = &call->fault;
    const char *model = NULL;
    const json_t *format = NULL;
    return input_text(body, "model", &model, fault) && take_messages(body, talk, fault) &&
           take_tools(body, tools, fault) && take_form(body, ask, fault) && take_chat_likely(body, ask, fault) &&
           input_object(body, "response_format", &format, fault) &&
           asking_format(format, "response_format", ask, fault) &&
           asking_talk(call, body, model, ask, talk, tools, true);
}

void route_chat(struct call *call)
{
    asking_answer(call, ASK_CHAT, "chatcmpl-", take_chat, &write_openai);
}

/* ---- Completions ------------------------------------------------------------------------------- */

static bool add_numbers(struct call *call, struct ask *ask, const json_t *list, struct entry *entry)
{
    const size_t n = json_array_size(list);
    int32_t *tokens = n ? malloc(n * sizeof *tokens) : NULL;
    for (size_t i = 0; tokens && i < n; i++) {
        const json_t *one = json_array_get(list, i);
        const json_int_t value = json_integer_value(one);
        if (json_is_integer(one) && value >= 0 && value < (json_int_t)call->server->info.n_vocab) {
            tokens[i] = (int32_t)value;
            continue;
        }
        free(tokens);
        library_release(&call->server->library, entry);
        return fault_set(&call->fault, 400, "invalid_value", "prompt",
                         "prompt holds something that is no token: allowed are whole numbers below %u",
                         call->server->info.n_vocab);
    }
    return prompt_tokens(call->server, ask, tokens, n, entry, &call->fault);
}

/* The texts of a prompt's tokens. */
static char *text_of_tokens(const struct call *call, const json_t *list)
{
    struct bytes raw = {0}, text = {0};
    char piece[512];
    size_t i;
    json_t *one;
    json_array_foreach(list, i, one)
    {
        const int32_t token = (int32_t)json_integer_value(one);
        bytes_append(&raw, piece, sqz_model_token_text(call->server->model, token, piece, sizeof piece));
    }
    bytes_append_utf8(&text, raw.data ? raw.data : "", raw.n);
    bytes_free(&raw);
    return text.data;
}

static void note_echo(const struct call *call, struct ask *ask, const json_t *prompt)
{
    struct bytes text = {0};
    if (json_is_string(prompt)) bytes_put(&text, json_string_value(prompt));
    else text.data = text_of_tokens(call, prompt);
    ask->prompts[ask->n_prompts - 1].echo = text.data;
}

static bool add_prompt(struct call *call, struct ask *ask, const json_t *prompt, const char *context)
{
    struct entry *entry = context ? library_get(&call->server->library, context) : NULL;
    if (json_is_string(prompt))
        return prompt_text(call->server, ask, json_string_value(prompt), json_string_length(prompt), entry,
                           &call->fault);
    if (json_is_array(prompt)) return add_numbers(call, ask, prompt, entry);
    library_release(&call->server->library, entry);
    return fault_set(&call->fault, 400, "invalid_type", "prompt",
                     "prompt is a string, an array of tokens, or an array of these");
}

static bool take_prompts(struct call *call, struct ask *ask, const json_t *body, const char *context, bool echo)
{
    const json_t *prompt = json_object_get(body, "prompt");
    json_t *single = NULL;
    size_t i;
    json_t *one;
    bool good = true;
    if (!prompt || json_is_null(prompt))
        return fault_set(&call->fault, 400, "invalid_value", "prompt", "prompt is missing");
    if (!json_is_array(prompt) || json_is_integer(json_array_get(prompt, 0)))
        prompt = single = json_pack("[O]", prompt);
    if (json_array_size(prompt) == 0) good = fault_set(&call->fault, 400, "invalid_value", "prompt", "prompt is empty");
    json_array_foreach(prompt, i, one)
    {
        good = good && add_prompt(call, ask, one, context);
        if (good && echo) note_echo(call, ask, one);
    }
    json_decref(single);
    return good;
}

static bool is_given(const json_t *body, const char *key)
{
    const json_t *value = json_object_get(body, key);
    return value && !json_is_null(value);
}

static bool take_completion(struct call *call, const json_t *body, struct ask *ask)
{
    struct fault *fault = &call->fault;
    const char *model = NULL;
    const json_t *format = NULL;
    struct entry *entry = NULL;
    int64_t likely = -1;
    bool echo = false;
    if (ask->max_tokens > COMPLETION_TOKENS && !is_given(body, "max_tokens")) ask->max_tokens = COMPLETION_TOKENS;
    if (!input_text(body, "model", &model, fault) || !take_form(body, ask, fault) ||
        !input_flag(body, "echo", &echo, fault) || !input_count(body, "logprobs", 0, SQZ_MOST_LIKELY, &likely, fault) ||
        !input_object(body, "response_format", &format, fault) ||
        !asking_format(format, "response_format", ask, fault) || !prompt_model(call->server, model, ask, &entry, fault))
        return false;
    ask->n_likely = (int)likely;
    if (echo && likely >= 0)
        fault_set(fault, 400, "unsupported", "echo", "echo with logprobs: a prompt's probabilities are not computed");
    const bool good = fault->status == 0 && asking_sampling(body, ask, 1.0, entry, fault) &&
                      take_prompts(call, ask, body, entry ? entry->id : NULL, echo);
    library_release(&call->server->library, entry);
    return good;
}

void route_completions(struct call *call)
{
    struct ask ask;
    json_t *body = input_parse(call->body.data, call->body.n, &call->fault);
    asking_begin(&ask, ASK_COMPLETION, call->server, "cmpl-");
    const bool good = body && take_completion(call, body, &ask);
    json_decref(body);
    if (good) asking_submit(call, &ask, &write_openai);
    else ask_free(&ask, &call->server->library);
}
