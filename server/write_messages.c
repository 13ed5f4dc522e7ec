/* Answers as Anthropic's /v1/messages gives them. */
#include <string.h>

#include "asking.h"

static const char *reason(const struct choice *c)
{
    if (c->called) return "tool_use";
    if (c->spoken.stop >= 0) return "stop_sequence";
    return c->finish == FINISH_LENGTH ? "max_tokens" : "end_turn";
}

static json_t *stop_json(const struct request *r, const struct choice *c)
{
    return c->spoken.stop >= 0 && !c->called ? json_string(r->ask.stops.text[c->spoken.stop]) : json_null();
}

static json_t *usage_json(const struct request *r)
{
    const struct usage u = request_usage(r);
    return json_pack("{s:I, s:i, s:I, s:I, s:o*}", "input_tokens", (json_int_t)(u.prompt - u.cached),
                     "cache_creation_input_tokens", 0, "cache_read_input_tokens", (json_int_t)u.cached, "output_tokens",
                     (json_int_t)u.completion, "squeeze", write_squeeze(&u));
}

/* content, reason and stop are taken. */
static json_t *message_json(const struct request *r, json_t *content, json_t *why, json_t *stop)
{
    return json_pack("{s:s, s:s, s:s, s:s, s:o, s:o, s:o, s:o}", "id", r->ask.id, "type", "message", "role",
                     "assistant", "model", r->ask.model, "content", content, "stop_reason", why, "stop_sequence", stop,
                     "usage", usage_json(r));
}

static json_t *tool_id(const struct request *r, size_t i)
{
    return json_sprintf("toolu_%s_%zu", strchr(r->ask.id, '_') + 1, i);
}

/* ---- As events -------------------------------------------------------------------------- */

static void begin(struct request *r)
{
    if (r->ask.events)
        write_event(r->stream, "message_start",
                    json_pack("{s:s, s:o}", "type", "message_start", "message",
                              message_json(r, json_array(), json_null(), json_null())));
}

/* block is taken. */
static void send_start(struct request *r, size_t index, json_t *block)
{
    write_event(r->stream, "content_block_start",
                json_pack("{s:s, s:I, s:o}", "type", "content_block_start", "index", (json_int_t)index, "content_block",
                          block));
}

static void send_delta(struct request *r, size_t index, const char *type, const char *key, json_t *value)
{
    write_event(r->stream, "content_block_delta",
                json_pack("{s:s, s:I, s:{s:s, s:o}}", "type", "content_block_delta", "index", (json_int_t)index,
                          "delta", "type", type, key, value));
}

static void send_stop(struct request *r, size_t index)
{
    write_event(r->stream, "content_block_stop",
                json_pack("{s:s, s:I}", "type", "content_block_stop", "index", (json_int_t)index));
}

static void piece(struct request *r, struct choice *c, const char *text, size_t n)
{
    if (!c->opened) send_start(r, 0, json_pack("{s:s, s:s}", "type", "text", "text", ""));
    c->opened = true;
    send_delta(r, 0, "text_delta", "text", json_stringn(text, n));
}

static void choice_end(struct request *r, struct choice *c)
{
    if (!r->ask.events) return;
    json_t *calls = write_calls(r, c), *call;
    size_t i;
    if (c->opened) send_stop(r, 0);
    json_array_foreach(calls, i, call)
    {
        const size_t index = i + c->opened;
        send_start(r, index,
                   json_pack("{s:s, s:o, s:O, s:{}}", "type", "tool_use", "id", tool_id(r, i), "name",
                             json_object_get(call, "name"), "input"));
        send_delta(r, index, "input_json_delta", "partial_json", json_incref(json_object_get(call, "arguments")));
        send_stop(r, index);
    }
    json_decref(calls);
}

/* ---- As a whole ------------------------------------------------------------------------------- */

static json_t *content_json(struct request *r, struct choice *c)
{
    json_t *content = json_array(), *calls = write_calls(r, c), *call;
    size_t i;
    if (c->n_plain)
        json_array_append_new(
            content, json_pack("{s:s, s:o}", "type", "text", "text", json_stringn(c->spoken.text.data, c->n_plain)));
    json_array_foreach(calls, i, call)
    {
        json_t *input = json_loads(json_string_value(json_object_get(call, "arguments")), 0, NULL);
        json_array_append_new(content,
                              json_pack("{s:s, s:o, s:O, s:o}", "type", "tool_use", "id", tool_id(r, i), "name",
                                        json_object_get(call, "name"), "input", input ? input : json_object()));
    }
    json_decref(calls);
    return content;
}

static void end(struct request *r)
{
    struct choice *c = &r->choices[0];
    if (!r->ask.events) {
        json_t *content = content_json(r, c);
        write_whole(r->stream, 200, message_json(r, content, json_string(reason(c)), stop_json(r, c)));
        return;
    }
    write_event(r->stream, "message_delta",
                json_pack("{s:s, s:{s:s, s:o}, s:o}", "type", "message_delta", "delta", "stop_reason", reason(c),
                          "stop_sequence", stop_json(r, c), "usage", usage_json(r)));
    write_event(r->stream, "message_stop", json_pack("{s:s}", "type", "message_stop"));
    stream_finish(r->stream, 200, 0);
}

static void fail(struct request *r, const struct fault *fault)
{
    struct bytes body = {0};
    fault_body(fault, API_ANTHROPIC, &body);
    if (r->ask.events) stream_write(r->stream, "event: error\ndata: ", 19);
    if (body.data) stream_write(r->stream, body.data, body.n);
    if (r->ask.events) stream_write(r->stream, "\n\n", 2);
    stream_finish(r->stream, fault->status, fault->retry_after);
    bytes_free(&body);
}

const struct writer write_messages = {begin, piece, choice_end, end, fail};
