/* Answers as /v1/chat/completions and /v1/completions give them. */
#include <stdlib.h>
#include <string.h>

#include "asking.h"
#include "probabilities.h"

static bool is_chat(const struct request *r)
{
    return r->ask.kind == ASK_CHAT;
}

static const char *finish_name(const struct choice *c)
{
    if (c->called) return "tool_calls";
    return c->finish == FINISH_LENGTH ? "length" : "stop";
}

static json_t *usage_json(const struct request *r)
{
    const struct usage u = request_usage(r);
    return json_pack("{s:I, s:I, s:I, s:{s:I}, s:{s:i}, s:o*}", "prompt_tokens", (json_int_t)u.prompt,
                     "completion_tokens", (json_int_t)u.completion, "total_tokens",
                     (json_int_t)(u.prompt + u.completion), "prompt_tokens_details", "cached_tokens",
                     (json_int_t)u.cached, "completion_tokens_details", "reasoning_tokens", 0, "squeeze",
                     write_squeeze(&u));
}

/* What every object begins with; choices and usage are taken. */
static json_t *frame(const struct request *r, bool part, json_t *choices, json_t *usage)
{
    const char *object = !is_chat(r) ? "text_completion" : part ? "chat.completion.chunk" : "chat.completion";
    return json_pack("{s:s, s:s, s:I, s:s, s:o, s:o*}", "id", r->ask.id, "object", object, "created",
                     (json_int_t)r->ask.created, "model", r->ask.model, "choices", choices, "usage", usage);
}

/* ---- Probabilities ------------------------------------------------------------------------ */

static json_t *text_probabilities(const struct request *r, const struct choice *c, size_t from, size_t to)
{
    json_t *tokens = json_array(), *values = json_array(), *tops = json_array(), *offsets = json_array();
    for (size_t i = from; i < to; i++) {
        const struct sqz_choice *chosen = &c->said[i].choice;
        json_t *top = json_object();
        json_array_append_new(tokens, probability_text(r, chosen->token));
        json_array_append_new(values, json_real((double)chosen->log_probability));
        for (size_t k = 0; k < chosen->n_likely; k++) {
            json_t *name = probability_text(r, chosen->likely[k].token);
            json_object_set_new(top, json_string_value(name), json_real((double)chosen->likely[k].log_probability));
            json_decref(name);
        }
        json_array_append_new(tops, top);
        json_array_append_new(offsets, json_integer(i ? (json_int_t)c->said[i - 1].text_at : 0));
    }
    return json_pack("{s:o, s:o, s:o, s:o}", "tokens", tokens, "token_logprobs", values, "top_logprobs", tops,
                     "text_offset", offsets);
}

/* Of the tokens whose text has gone out and that were not shown yet. */
static json_t *probabilities(const struct request *r, struct choice *c, size_t text_bytes)
{
    const size_t from = c->n_said_sent;
    if (r->ask.n_likely < 0) return json_null();
    c->n_said_sent = probabilities_until(c, text_bytes);
    if (!is_chat(r)) return text_probabilities(r, c, from, c->n_said_sent);
    return json_pack("{s:o, s:n}", "content", probabilities_json(c, from, c->n_said_sent), "refusal");
}

/* ---- As events --------------------------------------------------------------------------------- */

static json_t *nullable(const char *text)
{
    return text ? json_string(text) : json_null();
}

/* One choice's part; delta is taken. */
static void send_delta(struct request *r, struct choice *c, json_t *delta, const char *finish, size_t text_bytes)
{
    json_t *choice = json_pack("{s:I, s:o, s:o, s:o}", "index", (json_int_t)c->index, "delta", delta, "logprobs",
                               probabilities(r, c, text_bytes), "finish_reason", nullable(finish));
    write_event(r->stream, NULL, frame(r, true, json_pack("[o]", choice), NULL));
}

static void send_text(struct request *r, struct choice *c, const char *text, size_t n, const char *finish)
{
    json_t *choice = json_pack("{s:I, s:o, s:o, s:o}", "index", (json_int_t)c->index, "text", json_stringn(text, n),
                               "logprobs", probabilities(r, c, c->n_sent + n), "finish_reason", nullable(finish));
    write_event(r->stream, NULL, frame(r, true, json_pack("[o]", choice), NULL));
}

/* The prompt before its answer, where it is wanted back. */
static const char *echo_of(const struct request *r, const struct choice *c)
{
    const char *echo = r->ask.prompts[c->index / r->ask.n_each].echo;
    return echo ? echo : "";
}

static void begin(struct request *r)
{
    for (unsigned i = 0; r->ask.events && i < r->n_choices; i++)
        if (*echo_of(r, &r->choices[i]))
            send_text(r, &r->choices[i], echo_of(r, &r->choices[i]), strlen(echo_of(r, &r->choices[i])), NULL);
    for (unsigned i = 0; r->ask.events && is_chat(r) && i < r->n_choices; i++)
        send_delta(r, &r->choices[i], json_pack("{s:s, s:s}", "role", "assistant", "content", ""), NULL, 0);
}

static void piece(struct request *r, struct choice *c, const char *text, size_t n)
{
    if (is_chat(r)) send_delta(r, c, json_pack("{s:o}", "content", json_stringn(text, n)), NULL, c->n_sent + n);
    else send_text(r, c, text, n, NULL);
}

/* Calls as the API says them; with_index: in a stream. */
static json_t *calls_json(const struct request *r, const struct choice *c, json_t *calls, bool with_index)
{
    json_t *list = json_array(), *call;
    size_t i;
    json_array_foreach(calls, i, call)
    {
        json_t *one = json_pack("{s:o, s:s, s:{s:O, s:O}}", "id",
                                json_sprintf("call_%s_%u_%zu", strchr(r->ask.id, '-') + 1, c->index, i), "type",
                                "function", "function", "name", json_object_get(call, "name"), "arguments",
                                json_object_get(call, "arguments"));
        if (with_index) json_object_set_new(one, "index", json_integer((json_int_t)i));
        json_array_append_new(list, one);
    }
    return list;
}

static void choice_end(struct request *r, struct choice *c)
{
    if (!r->ask.events) return;
    json_t *calls = write_calls(r, c);
    if (calls) send_delta(r, c, json_pack("{s:o}", "tool_calls", calls_json(r, c, calls, true)), NULL, SIZE_MAX);
    json_decref(calls);
    if (is_chat(r)) send_delta(r, c, json_object(), finish_name(c), SIZE_MAX);
    else send_text(r, c, "", 0, finish_name(c));
}

/* ---- As a whole ----------------------------------------------------------------------------------- */

static json_t *message_json(struct request *r, struct choice *c)
{
    json_t *calls = write_calls(r, c);
    const char *text = c->spoken.text.data ? c->spoken.text.data : "";
    const size_t n_plain = c->n_plain;
    json_t *message = json_pack("{s:s, s:o, s:n}", "role", "assistant", "content",
                                calls && n_plain == 0 ? json_null() : json_stringn(text, n_plain), "refusal");
    if (calls) json_object_set_new(message, "tool_calls", calls_json(r, c, calls, false));
    json_decref(calls);
    return message;
}

static json_t *choice_json(struct request *r, struct choice *c)
{
    json_t *root = json_pack("{s:I}", "index", (json_int_t)c->index);
    const char *text = c->spoken.text.data ? c->spoken.text.data : "";
    if (is_chat(r)) json_object_set_new(root, "message", message_json(r, c));
    else json_object_set_new(root, "text", json_sprintf("%s%s", echo_of(r, c), text));
    json_object_set_new(root, "logprobs", probabilities(r, c, SIZE_MAX));
    json_object_set_new(root, "finish_reason", json_string(finish_name(c)));
    return root;
}

static void end(struct request *r)
{
    if (r->ask.events) {
        if (r->ask.events_usage) write_event(r->stream, NULL, frame(r, true, json_array(), usage_json(r)));
        stream_write(r->stream, "data: [DONE]\n\n", 14);
        stream_finish(r->stream, 200, 0);
        return;
    }
    json_t *choices = json_array();
    for (unsigned i = 0; i < r->n_choices; i++) json_array_append_new(choices, choice_json(r, &r->choices[i]));
    write_whole(r->stream, 200, frame(r, false, choices, usage_json(r)));
}

static void fail(struct request *r, const struct fault *fault)
{
    struct bytes body = {0};
    fault_body(fault, API_OPENAI, &body);
    if (r->ask.events) stream_write(r->stream, "data: ", 6);
    if (body.data) stream_write(r->stream, body.data, body.n);
    if (r->ask.events) stream_write(r->stream, "\n\n", 2);
    stream_finish(r->stream, fault->status, fault->retry_after);
    bytes_free(&body);
}

const struct writer write_openai = {begin, piece, choice_end, end, fail};
