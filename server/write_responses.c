/* Answers as /v1/responses gives them. */
#include <string.h>

#include "asking.h"
#include "probabilities.h"

static const char *number_of(const struct request *r)
{
    return strchr(r->ask.id, '_') + 1;
}

static json_t *usage_json(const struct request *r)
{
    const struct usage u = request_usage(r);
    return json_pack("{s:I, s:{s:I}, s:I, s:{s:i}, s:I, s:o*}", "input_tokens", (json_int_t)u.prompt,
                     "input_tokens_details", "cached_tokens", (json_int_t)u.cached, "output_tokens",
                     (json_int_t)u.completion, "output_tokens_details", "reasoning_tokens", 0, "total_tokens",
                     (json_int_t)(u.prompt + u.completion), "squeeze", write_squeeze(&u));
}

/* Probabilities of the answer's first n tokens. */
static json_t *likely_json(const struct request *r, const struct choice *c, size_t n)
{
    return r->ask.n_likely < 0 ? json_array() : probabilities_json(c, 0, n);
}

/* logprobs is taken. */
static json_t *part_json(const char *text, size_t n, json_t *logprobs)
{
    return json_pack("{s:s, s:o, s:[], s:o}", "type", "output_text", "text", json_stringn(text, n), "annotations",
                     "logprobs", logprobs);
}

static json_t *message_json(const struct request *r, const struct choice *c, bool done)
{
    json_t *content = json_array();
    if (done)
        json_array_append_new(content, part_json(c->spoken.text.data ? c->spoken.text.data : "", c->n_plain,
                                                 likely_json(r, c, c->n_said)));
    return json_pack("{s:s, s:o, s:s, s:s, s:o}", "type", "message", "id", json_sprintf("msg_%s", number_of(r)),
                     "status", done ? "completed" : "in_progress", "role", "assistant", "content", content);
}

static json_t *call_json(const struct request *r, const json_t *call, size_t i, bool done)
{
    json_t *arguments = json_object_get(call, "arguments");
    return json_pack("{s:s, s:o, s:o, s:O, s:o, s:s}", "type", "function_call", "id",
                     json_sprintf("fc_%s_%zu", number_of(r), i), "call_id",
                     json_sprintf("call_%s_%zu", number_of(r), i), "name", json_object_get(call, "name"), "arguments",
                     done ? json_incref(arguments) : json_string(""), "status", done ? "completed" : "in_progress");
}

/* output and usage are taken; NULL: none yet. */
static json_t *response_json(const struct request *r, const char *status, json_t *output, json_t *usage)
{
    const bool cut = strcmp(status, "incomplete") == 0;
    json_t *details = cut ? json_pack("{s:s}", "reason", "max_output_tokens") : json_null();
    json_t *root = json_pack("{s:s, s:s, s:I, s:s, s:n, s:o, s:s, s:o, s:o, s:f, s:f, s:I, s:n, s:b, s:b, s:s, s:s}",
                             "id", r->ask.id, "object", "response", "created_at", (json_int_t)r->ask.created, "status",
                             status, "error", "incomplete_details", details, "model", r->ask.model, "output",
                             output ? output : json_array(), "usage", usage ? usage : json_null(), "temperature",
                             (double)r->ask.sampling.temperature, "top_p", (double)r->ask.sampling.top_p,
                             "max_output_tokens", (json_int_t)r->ask.max_tokens, "previous_response_id", "background",
                             0, "store", 0, "truncation", "disabled", "service_tier", "default");
    json_object_update(root, r->ask.shown);
    return root;
}

/* ---- As events -------------------------------------------------------------------------- */

/* Takes value, a part of an event. */
static void send(struct request *r, const char *name, json_t *value)
{
    json_t *event = json_pack("{s:s, s:I}", "type", name, "sequence_number", (json_int_t)r->sequence++);
    json_object_update(event, value);
    json_decref(value);
    write_event(r->stream, name, event);
}

static void begin(struct request *r)
{
    if (!r->ask.events) return;
    send(r, "response.created", json_pack("{s:o}", "response", response_json(r, "in_progress", NULL, NULL)));
    send(r, "response.in_progress", json_pack("{s:o}", "response", response_json(r, "in_progress", NULL, NULL)));
}

static json_t *place(const struct request *r)
{
    return json_pack("{s:o, s:i, s:i}", "item_id", json_sprintf("msg_%s", number_of(r)), "output_index", 0,
                     "content_index", 0);
}

static void open_message(struct request *r, struct choice *c)
{
    if (c->opened) return;
    c->opened = true;
    send(r, "response.output_item.added",
         json_pack("{s:i, s:o}", "output_index", 0, "item", message_json(r, c, false)));
    json_t *part = place(r);
    json_object_set_new(part, "part", part_json("", 0, json_array()));
    send(r, "response.content_part.added", part);
}

static void piece(struct request *r, struct choice *c, const char *text, size_t n)
{
    open_message(r, c);
    json_t *delta = place(r);
    const size_t from = c->n_said_sent;
    if (r->ask.n_likely >= 0) c->n_said_sent = probabilities_until(c, c->n_sent + n);
    json_object_set_new(delta, "delta", json_stringn(text, n));
    json_object_set_new(delta, "logprobs", probabilities_json(c, from, c->n_said_sent));
    send(r, "response.output_text.delta", delta);
}

static void close_message(struct request *r, struct choice *c)
{
    const char *text = c->spoken.text.data ? c->spoken.text.data : "";
    json_t *done = place(r), *part = place(r);
    json_object_set_new(done, "text", json_stringn(text, c->n_plain));
    json_object_set_new(done, "logprobs", likely_json(r, c, c->n_said));
    send(r, "response.output_text.done", done);
    json_object_set_new(part, "part", part_json(text, c->n_plain, likely_json(r, c, c->n_said)));
    send(r, "response.content_part.done", part);
    send(r, "response.output_item.done", json_pack("{s:i, s:o}", "output_index", 0, "item", message_json(r, c, true)));
}

static void send_call(struct request *r, const json_t *call, size_t i, size_t index)
{
    json_t *id = json_sprintf("fc_%s_%zu", number_of(r), i), *arguments = json_object_get(call, "arguments");
    send(r, "response.output_item.added",
         json_pack("{s:I, s:o}", "output_index", (json_int_t)index, "item", call_json(r, call, i, false)));
    send(r, "response.function_call_arguments.delta",
         json_pack("{s:O, s:I, s:O}", "item_id", id, "output_index", (json_int_t)index, "delta", arguments));
    send(r, "response.function_call_arguments.done",
         json_pack("{s:O, s:I, s:O}", "item_id", id, "output_index", (json_int_t)index, "arguments", arguments));
    send(r, "response.output_item.done",
         json_pack("{s:I, s:o}", "output_index", (json_int_t)index, "item", call_json(r, call, i, true)));
    json_decref(id);
}

static void choice_end(struct request *r, struct choice *c)
{
    if (!r->ask.events) return;
    json_t *calls = write_calls(r, c), *call;
    size_t i;
    if (!calls) open_message(r, c);
    if (c->opened) close_message(r, c);
    json_array_foreach(calls, i, call) send_call(r, call, i, i + c->opened);
    json_decref(calls);
}

/* ---- As a whole ------------------------------------------------------------------------------- */

static json_t *output_json(struct request *r)
{
    struct choice *c = &r->choices[0];
    json_t *calls = write_calls(r, c), *output = json_array(), *call;
    size_t i;
    if (!calls || c->n_plain) json_array_append_new(output, message_json(r, c, true));
    json_array_foreach(calls, i, call) json_array_append_new(output, call_json(r, call, i, true));
    json_decref(calls);
    return output;
}

static void end(struct request *r)
{
    const bool cut = r->choices[0].finish == FINISH_LENGTH;
    json_t *whole = response_json(r, cut ? "incomplete" : "completed", output_json(r), usage_json(r));
    if (!r->ask.events) {
        write_whole(r->stream, 200, whole);
        return;
    }
    send(r, cut ? "response.incomplete" : "response.completed", json_pack("{s:o}", "response", whole));
    stream_finish(r->stream, 200, 0);
}

static void fail(struct request *r, const struct fault *fault)
{
    struct bytes body = {0};
    if (r->ask.events)
        send(r, "error", json_pack("{s:s, s:s?, s:n}", "message", fault->message, "code", fault->code, "param"));
    else {
        fault_body(fault, API_OPENAI, &body);
        if (body.data) stream_write(r->stream, body.data, body.n);
    }
    stream_finish(r->stream, fault->status, fault->retry_after);
    bytes_free(&body);
}

const struct writer write_responses = {begin, piece, choice_end, end, fail};
