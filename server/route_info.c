/* What the server says of itself: /health, /props, /metrics, /v1/models, /openapi.json, /tokenize. */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "conversation.h"
#include "input.h"
#include "openapi.h"
#include "prompt.h"

void call_reply(struct call *call, int status, json_t *value)
{
    char *text = value ? json_dumps(value, JSON_COMPACT) : NULL;
    json_decref(value);
    if (!text) {
        fault_set(&call->fault, 503, "out_of_memory", NULL, "out of memory");
        return;
    }
    call->status = status;
    call->reply_type = "application/json";
    bytes_put(&call->reply, text);
    free(text);
}

void route_health(struct call *call)
{
    const struct server_ranks *ranks = &call->server->options.ranks;
    const char *trouble = ranks->trouble ? ranks->trouble() : NULL;
    json_t *root = json_pack("{s:s, s:s*}", "status", trouble ? "degraded" : "ok", "reason", trouble);
    if (ranks->n > 1) {
        json_object_set_new(root, "ranks", json_integer(ranks->n));
        json_object_set_new(root, "ranks_alive", json_integer(ranks->n - (trouble != NULL)));
        json_object_set_new(root, "restarts", json_integer(ranks->restarts));
    }
    call_reply(call, trouble ? 503 : 200, root);
}

void route_props(struct call *call)
{
    const struct server *s = call->server;
    call_reply(call, 200,
               json_pack("{s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:f, s:I, s:b}", "version", sqz_version(), "model",
                         s->model_id, "description", s->info.description, "n_context_tokens",
                         (json_int_t)s->info.n_context_tokens, "n_slots", (json_int_t)s->options.n_slots, "queue_limit",
                         (json_int_t)s->options.queue_limit, "most_answer_tokens",
                         (json_int_t)s->options.most_answer_tokens, "most_body_bytes",
                         (json_int_t)s->options.most_body_bytes, "budget", (double)s->options.budget,
                         "auto_prepare_tokens", (json_int_t)s->options.auto_prepare_tokens, "has_chat_template",
                         s->info.has_chat_template));
}

void route_metrics(struct call *call)
{
    const struct server_ranks *ranks = &call->server->options.ranks;
    metrics_text(&call->server->metrics, &call->reply);
    if (ranks->n > 1)
        metrics_ranks_text(
            &(struct metrics_ranks){ranks->n, ranks->n - (ranks->trouble && ranks->trouble()), ranks->restarts},
            &call->reply);
    call->status = 200;
    call->reply_type = "text/plain; version=0.0.4; charset=utf-8";
}

void route_openapi(struct call *call)
{
    bytes_append(&call->reply, openapi_json, openapi_json_bytes);
    call->status = 200;
    call->reply_type = "application/json";
}

/* ---- Models --------------------------------------------------------------------------- */

/* As both APIs list models: the first four are OpenAI's, the others Anthropic's. */
static json_t *model_json(const struct server *s, const char *context, json_int_t created, json_int_t tokens)
{
    json_t *id = context ? json_sprintf("%s:%s", s->model_id, context) : json_string(s->model_id);
    char at[32] = "";
    const time_t seconds = (time_t)created;
    struct tm utc;
    if (gmtime_r(&seconds, &utc)) strftime(at, sizeof at, "%Y-%m-%dT%H:%M:%SZ", &utc);
    json_t *root = json_pack("{s:O, s:s, s:I, s:s, s:s, s:o, s:s, s:I}", "id", id, "object", "model", "created",
                             created, "owned_by", "squeeze", "type", "model", "display_name", id, "created_at", at,
                             "max_input_tokens", (json_int_t)s->info.n_context_tokens);
    if (context) json_object_set_new(root, "context_tokens", json_integer(tokens));
    return root;
}

struct listing {
    const struct server *server;
    json_t *list;
};

static void list_model(void *data, const struct entry *entry)
{
    const struct listing *l = data;
    json_array_append_new(
        l->list, model_json(l->server, entry->id, (json_int_t)entry->created, (json_int_t)entry->info.n_tokens));
}

void route_models(struct call *call)
{
    struct server *s = call->server;
    struct listing l = {s, json_array()};
    json_array_append_new(l.list, model_json(s, NULL, (json_int_t)s->started, 0));
    library_each(&s->library, list_model, &l);
    const size_t last = json_array_size(l.list) - 1;
    call_reply(call, 200,
               json_pack("{s:s, s:O, s:b, s:O, s:O}", "object", "list", "data", l.list, "has_more", 0, "first_id",
                         json_object_get(json_array_get(l.list, 0), "id"), "last_id",
                         json_object_get(json_array_get(l.list, last), "id")));
    json_decref(l.list);
}

void route_model(struct call *call)
{
    struct server *s = call->server;
    struct ask ask = {0};
    struct entry *entry;
    if (!prompt_model(s, call->argument, &ask, &entry, &call->fault)) return;
    if (entry)
        call_reply(call, 200, model_json(s, entry->id, (json_int_t)entry->created, (json_int_t)entry->info.n_tokens));
    else call_reply(call, 200, model_json(s, NULL, (json_int_t)s->started, 0));
    library_release(&s->library, entry);
}

/* ---- Tokens ---------------------------------------------------------------------------- */

void route_tokenize(struct call *call)
{
    json_t *body = input_parse(call->body.data, call->body.n, &call->fault), *list = json_array();
    struct sqz_error error;
    const char *content = NULL;
    bool special = false;
    int32_t *tokens = NULL;
    size_t n = 0;
    if (body && input_text(body, "content", &content, &call->fault) &&
        input_flag(body, "add_special", &special, &call->fault) && !content)
        fault_set(&call->fault, 400, "invalid_value", "content", "content is missing: a string is wanted");
    const size_t n_bytes = content ? json_string_length(json_object_get(body, "content")) : 0;
    if (!call->fault.status && n_bytes) {
        const struct sqz_model *model = call->server->model;
        const enum sqz_status status = special ? sqz_beginning_tokens(model, content, n_bytes, &tokens, &n, &error)
                                               : sqz_model_tokenize(model, content, n_bytes, &tokens, &n, &error);
        if (status != SQZ_OK) fault_from(&call->fault, &error);
    }
    for (size_t i = 0; i < n; i++) json_array_append_new(list, json_integer(tokens[i]));
    free(tokens);
    json_decref(body);
    if (call->fault.status) json_decref(list);
    else call_reply(call, 200, json_pack("{s:o}", "tokens", list));
}
