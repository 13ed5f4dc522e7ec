/* Anthropic's /v1/messages and /v1/messages/count_tokens. */
#include <stdlib.h>
#include <string.h>

#include "asking.h"

/* ---- Messages ------------------------------------------------------------------------ */

static bool add_block(struct bytes *text, enum call_format format, const json_t *block, struct fault *fault)
{
    const char *type = json_string_value(json_object_get(block, "type"));
    if (type && (strcmp(type, "thinking") == 0 || strcmp(type, "redacted_thinking") == 0)) return true;
    if (type && strcmp(type, "tool_use") == 0) {
        const json_t *given = json_object_get(block, "input");
        const char *name = json_string_value(json_object_get(block, "name"));
        char *arguments = given ? json_dumps(given, JSON_COMPACT | JSON_ENCODE_ANY) : NULL;
        if (name) calls_put(text, format, name, arguments);
        free(arguments);
        return name || fault_set(fault, 400, "invalid_value", "messages", "a tool_use block without a name");
    }
    if (type && strcmp(type, "tool_result") == 0) {
        struct bytes said = {0};
        const bool good = talk_content(&said, json_object_get(block, "content"), "content", fault);
        if (good) calls_put_response(text, format, said.data ? said.data : "", said.n);
        bytes_free(&said);
        return good;
    }
    json_t *one = json_pack("[O]", block);
    const bool good = talk_content(text, one, "content", fault);
    json_decref(one);
    return good;
}

static bool add_message(struct talk *talk, const json_t *message, struct fault *fault)
{
    const char *role = json_string_value(json_object_get(message, "role"));
    const json_t *content = json_object_get(message, "content");
    size_t i;
    json_t *block;
    if (!role || (strcmp(role, "user") != 0 && strcmp(role, "assistant") != 0))
        return fault_set(fault, 400, "invalid_value", "messages",
                         "a message's role is %.40s: allowed are user and assistant", role ? role : "missing");
    if (!json_is_string(content) && !json_is_array(content))
        return fault_set(fault, 400, "invalid_type", "messages",
                         "a message's content is a string or an array of blocks");
    struct bytes *text = talk_say(talk, strcmp(role, "user") == 0 ? "user" : "assistant", fault);
    if (!text) return false;
    if (json_is_string(content)) return talk_content(text, content, "content", fault);
    json_array_foreach(content, i, block) if (!add_block(text, talk->calls, block, fault)) return false;
    return true;
}

static bool take_messages(const json_t *body, struct talk *talk, struct fault *fault)
{
    const json_t *messages = NULL, *system = json_object_get(body, "system");
    struct bytes told = {0};
    size_t i;
    json_t *one;
    if (!input_array(body, "messages", &messages, fault)) return false;
    if (json_array_size(messages) == 0)
        return fault_set(fault, 400, "invalid_value", "messages", "messages is missing or empty: one is needed");
    json_array_foreach(messages, i, one) if (!add_message(talk, one, fault)) return false;
    talk_begin_answer(talk);
    if (talk->n == 0)
        return fault_set(fault, 400, "invalid_value", "messages", "messages has none of the user's: one is needed");
    const bool good =
        talk_content(&told, system, "system", fault) && (told.n == 0 || talk_instruct(talk, told.data, told.n, fault));
    bytes_free(&told);
    return good;
}

/* ---- Tools and options ------------------------------------------------------------------- */

static bool take_choice(const json_t *body, struct tools *tools, struct fault *fault)
{
    const json_t *choice = NULL;
    const char *name = NULL;
    tools->choice = TOOL_AUTO;
    if (!input_object(body, "tool_choice", &choice, fault) || !choice || !input_text(choice, "name", &name, fault))
        return fault->status == 0;
    const char *type = json_string_value(json_object_get(choice, "type"));
    if (type && strcmp(type, "none") == 0) tools->choice = TOOL_NONE;
    else if (type && (strcmp(type, "any") == 0 || strcmp(type, "tool") == 0)) tools->choice = TOOL_REQUIRED;
    else if (!type || strcmp(type, "auto") != 0)
        return fault_set(fault, 400, "invalid_value", "tool_choice",
                         "tool_choice.type: allowed are auto, any, tool and none");
    if (type && strcmp(type, "tool") == 0) tools->named = tools_find(tools, name, "tool_choice", fault);
    return tools_check_choice(tools, fault);
}

static bool take_tools(const json_t *body, struct tools *tools, struct fault *fault)
{
    const json_t *list = NULL;
    size_t i;
    json_t *one;
    if (!input_array(body, "tools", &list, fault)) return false;
    json_array_foreach(list, i, one)
    {
        const json_t *schema = NULL;
        const char *name = NULL, *description = NULL;
        if (!input_object(one, "input_schema", &schema, fault) || !input_text(one, "name", &name, fault) ||
            !input_text(one, "description", &description, fault) || !tools_add(tools, name, description, schema, fault))
            return false;
    }
    return take_choice(body, tools, fault);
}

/* output_config.format, before that output_format: a JSON schema. */
static bool take_format(const json_t *body, struct ask *ask, struct fault *fault)
{
    const json_t *config = NULL, *format = NULL;
    if (!input_object(body, "output_format", &format, fault) || !input_object(body, "output_config", &config, fault) ||
        (config && !input_object(config, "format", &format, fault)))
        return false;
    return asking_format(format, "output_config.format", ask, fault);
}

static bool take_form(const json_t *body, struct ask *ask, struct fault *fault)
{
    int64_t most = 0;
    if (!input_count(body, "max_tokens", 1, INT32_MAX, &most, fault) ||
        !input_flag(body, "stream", &ask->events, fault))
        return false;
    if (most == 0) return fault_set(fault, 400, "invalid_value", "max_tokens", "max_tokens is missing");
    if ((size_t)most < ask->max_tokens) ask->max_tokens = (size_t)most;
    return asking_stops(body, "stop_sequences", ask, fault) && take_format(body, ask, fault);
}

/* Messages, tools and the model: what is counted, too. */
static bool take_prompt(struct call *call, const json_t *body, struct ask *ask, struct talk *talk, struct tools *tools,
                        bool answer)
{
    struct fault *fault = &call->fault;
    const char *model = NULL;
    return input_text(body, "model", &model, fault) && take_messages(body, talk, fault) &&
           take_tools(body, tools, fault) && (!answer || take_form(body, ask, fault)) &&
           asking_talk(call, body, model, ask, talk, tools, answer);
}

static bool take_message(struct call *call, const json_t *body, struct ask *ask, struct talk *talk, struct tools *tools)
{
    return take_prompt(call, body, ask, talk, tools, true);
}

static bool take_counted(struct call *call, const json_t *body, struct ask *ask, struct talk *talk, struct tools *tools)
{
    return take_prompt(call, body, ask, talk, tools, false);
}

void route_messages(struct call *call)
{
    asking_answer(call, ASK_MESSAGES, "msg_", take_message, &write_messages);
}

void route_count_tokens(struct call *call)
{
    struct ask ask;
    if (asking_read(call, &ask, ASK_MESSAGES, "msg_", take_counted))
        call_reply(call, 200,
                   json_pack("{s:I}", "input_tokens", (json_int_t)(ask.prompts[0].n_prefix + ask.prompts[0].n_tokens)));
    ask_free(&ask, &call->server->library);
}
