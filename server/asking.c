/* What asking shares; asking.h describes it. */
#define _POSIX_C_SOURCE 200809L
#include "asking.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "ahead.h"
#include "grammar.h"
#include "ids.h"

void asking_begin(struct ask *ask, enum ask_kind kind, const struct server *server, const char *prefix)
{
    memset(ask, 0, sizeof *ask);
    ask->kind = kind;
    ask->created = time(NULL);
    ask->n_each = 1;
    ask->n_likely = -1;
    ask->budget = server->options.budget;
    ask->calls = server->calls;
    ask->max_tokens = server->options.most_answer_tokens;
    id_make(ask->id, sizeof ask->id, prefix);
}

/* ---- Options --------------------------------------------------------------------------- */

static bool take_biases(const json_t *body, struct ask *ask, struct fault *fault)
{
    const json_t *biases = NULL;
    const char *name;
    json_t *value;
    if (!input_object(body, "logit_bias", &biases, fault)) return false;
    const size_t n = json_object_size(biases);
    if (n == 0) return true;
    if (n > 1024) return fault_set(fault, 400, "invalid_value", "logit_bias", "logit_bias has more than 1024 tokens");
    ask->biases = calloc(n, sizeof *ask->biases);
    if (!ask->biases) return fault_set(fault, 503, "out_of_memory", NULL, "out of memory");
    json_object_foreach((json_t *)(uintptr_t)biases, name, value)
    {
        char *end;
        const long token = strtol(name, &end, 10);
        const double bias = json_number_value(value);
        if (end == name || *end || token < 0 || token > INT32_MAX || !json_is_number(value) || !(fabs(bias) <= 100))
            return fault_set(fault, 400, "invalid_value", "logit_bias",
                             "logit_bias holds numbers of tokens and biases from -100 to 100");
        ask->biases[ask->sampling.n_biases++] = (struct sqz_bias){(int32_t)token, (float)bias};
    }
    return true;
}

/* "exact": true, false, or the kind of rows. */
static bool take_exact(const json_t *squeeze, struct ask *ask, struct fault *fault)
{
    const json_t *exact = json_object_get(squeeze, "exact");
    const char *kind = json_string_value(exact);
    bool any = false;
    if (!kind) {
        if (!input_flag(squeeze, "exact", &any, fault)) return false;
        ask->exact = any ? ASK_EXACT_AS_KEPT : ASK_EXACT_NO;
        return true;
    }
    if (strcmp(kind, "f16") != 0 && strcmp(kind, "int8") != 0)
        return fault_set(fault, 400, "invalid_value", "exact", "exact is %.40s: allowed are true, false, f16 and int8",
                         kind);
    ask->exact = strcmp(kind, "int8") == 0 ? ASK_EXACT_INT8 : ASK_EXACT_F16;
    return true;
}

static bool take_squeeze(const json_t *body, struct ask *ask, const struct entry *entry, struct fault *fault)
{
    const json_t *squeeze = NULL;
    const char *rule = NULL;
    double budget = (double)ask->budget;
    if (!input_object(body, "squeeze", &squeeze, fault) || !squeeze) return fault->status == 0;
    if (!input_real(squeeze, "budget", 0, 1, &budget, fault) || !take_exact(squeeze, ask, fault) ||
        !input_flag(squeeze, "read_map", &ask->read_map, fault) || !input_text(squeeze, "rule", &rule, fault))
        return false;
    if (!(budget > 0)) return fault_set(fault, 400, "out_of_range", "budget", "budget is 0: allowed is more than 0");
    if (rule && strcmp(rule, "default") != 0 && strcmp(rule, "paper") != 0)
        return fault_set(fault, 400, "invalid_value", "rule", "rule is %.40s: allowed are default and paper", rule);
    if (rule && entry && (strcmp(rule, "paper") == 0) != (entry->info.squeeze.rule == SQZ_RULE_PAPER))
        return fault_set(fault, 400, "invalid_value", "rule", "the context was prepared with the other rule");
    ask->budget = ask->exact != ASK_EXACT_NO ? 1 : (float)budget;
    return true;
}

bool asking_sampling(const json_t *body, struct ask *ask, double temperature, const struct entry *entry,
                     struct fault *fault)
{
    double top_p = 1, min_p = 0, frequency = 0, presence = 0;
    int64_t seed = -1, top_k = 0;
    if (!input_real(body, "temperature", 0, 10, &temperature, fault) ||
        !input_real(body, "top_p", 0, 1, &top_p, fault) || !input_real(body, "min_p", 0, 1, &min_p, fault) ||
        !input_count(body, "top_k", 0, 1000000, &top_k, fault) ||
        !input_count(body, "seed", -1, 9007199254740991, &seed, fault) ||
        !input_real(body, "frequency_penalty", -2, 2, &frequency, fault) ||
        !input_real(body, "presence_penalty", -2, 2, &presence, fault) || !take_biases(body, ask, fault) ||
        !take_squeeze(body, ask, entry, fault))
        return false;
    uint32_t drawn = 1;
    const ssize_t got = getrandom(&drawn, sizeof drawn, 0);
    (void)got;
    ask->sampling.temperature = (float)temperature;
    ask->sampling.top_p = top_p > 0 ? (float)top_p : 1e-6f; /* the likeliest alone */
    ask->sampling.min_p = (float)min_p;
    ask->sampling.top_k = (int32_t)top_k;
    ask->sampling.seed = seed >= 0 ? (uint32_t)(seed ^ (seed >> 32)) : drawn;
    ask->sampling.frequency_penalty = (float)frequency;
    ask->sampling.presence_penalty = (float)presence;
    return true;
}

static bool add_stop(struct ask *ask, const json_t *stop, const char *key, struct fault *fault)
{
    const char *text = json_string_value(stop);
    const size_t n = text ? strlen(text) : 0;
    if (n == 0 || n > MOST_STOP_BYTES || ask->stops.n == MOST_STOPS)
        return fault_set(fault, 400, "invalid_value", key, "%s holds at most %d strings of 1 to %d bytes", key,
                         (int)MOST_STOPS, (int)MOST_STOP_BYTES);
    char *copy = malloc(n + 1);
    if (!copy) return fault_set(fault, 503, "out_of_memory", NULL, "out of memory");
    memcpy(copy, text, n + 1);
    ask->stops.text[ask->stops.n++] = copy;
    ask->n_client_stops = ask->stops.n;
    return true;
}

bool asking_stops(const json_t *body, const char *key, struct ask *ask, struct fault *fault)
{
    const json_t *stops = json_object_get(body, key);
    size_t i;
    json_t *one;
    if (!stops || json_is_null(stops)) return true;
    if (json_is_string(stops)) return add_stop(ask, stops, key, fault);
    if (!json_is_array(stops))
        return fault_set(fault, 400, "invalid_type", key, "%s is %s: a string or an array of strings is wanted", key,
                         input_kind(stops));
    json_array_foreach(stops, i, one) if (!add_stop(ask, one, key, fault)) return false;
    return true;
}

static bool set_grammar(struct ask *ask, struct bytes *grammar, struct fault *fault)
{
    if (grammar->failed || !grammar->data) fault_set(fault, 503, "out_of_memory", NULL, "out of memory");
    if (fault->status) {
        bytes_free(grammar);
        return false;
    }
    free(ask->grammar);
    ask->grammar = grammar->data;
    return true;
}

bool asking_format(const json_t *format, const char *key, struct ask *ask, struct fault *fault)
{
    struct bytes grammar = {0};
    const char *type = json_string_value(json_object_get(format, "type"));
    if (!format) return true;
    if (type && strcmp(type, "text") == 0) return true;
    if (type && strcmp(type, "json_object") == 0) {
        grammar_of_json(&grammar);
        return set_grammar(ask, &grammar, fault);
    }
    if (!type || strcmp(type, "json_schema") != 0)
        return fault_set(fault, 400, "invalid_value", key, "%s.type: allowed are text, json_object and json_schema",
                         key);
    const json_t *wrapped = json_object_get(format, "json_schema");
    const json_t *from = json_is_object(wrapped) ? wrapped : format, *schema = json_object_get(from, "schema");
    const char *name = NULL;
    bool strict = true; /* as it always is */
    if (!input_text(from, "name", &name, fault) || !input_flag(from, "strict", &strict, fault)) return false;
    if (!json_is_object(schema)) return fault_set(fault, 400, "invalid_value", key, "%s has no schema, an object", key);
    grammar_of_schema(&grammar, schema, fault);
    return set_grammar(ask, &grammar, fault);
}

static bool named_type(const json_t *object, const char *name)
{
    const char *type = json_string_value(json_object_get(object, "type"));
    return type && strcmp(type, name) == 0;
}

/* {"type": "allowed_tools"}: the others are as if they had not been given. */
static bool allow_tools(const json_t *choice, struct tools *tools, struct fault *fault)
{
    const json_t *nested = json_object_get(choice, "allowed_tools"), *from = nested ? nested : choice;
    const json_t *list = json_object_get(from, "tools");
    const char *mode = json_string_value(json_object_get(from, "mode"));
    bool allowed[MOST_TOOLS] = {false};
    size_t i;
    json_t *one;
    if (!mode || (strcmp(mode, "auto") != 0 && strcmp(mode, "required") != 0) || json_array_size(list) == 0)
        return fault_set(fault, 400, "invalid_value", "tool_choice",
                         "allowed_tools has a mode, auto or required, and tools, an array of some");
    json_array_foreach(list, i, one)
    {
        const json_t *function = json_object_get(one, "function");
        const int found = tools_find(tools, json_string_value(json_object_get(function ? function : one, "name")),
                                     "tool_choice", fault);
        if (found < 0) return false;
        allowed[found] = true;
    }
    tools_keep(tools, allowed);
    tools->choice = strcmp(mode, "required") == 0 ? TOOL_REQUIRED : TOOL_AUTO;
    return true;
}

bool asking_tool_choice(const json_t *choice, const json_t *function, struct tools *tools, struct fault *fault)
{
    const char *word = json_string_value(choice);
    tools->choice = TOOL_AUTO;
    if (!choice || json_is_null(choice) || (word && strcmp(word, "auto") == 0)) return true;
    if (word && strcmp(word, "none") == 0) tools->choice = TOOL_NONE;
    else if (word && strcmp(word, "required") == 0) tools->choice = TOOL_REQUIRED;
    else if (named_type(choice, "allowed_tools")) return allow_tools(choice, tools, fault);
    else if (json_is_object(choice)) {
        tools->choice = TOOL_REQUIRED;
        tools->named = tools_find(tools, json_string_value(json_object_get(function, "name")), "tool_choice", fault);
    } else
        return fault_set(fault, 400, "invalid_value", "tool_choice",
                         "tool_choice: allowed are none, auto, required and a function's name in an object");
    return tools_check_choice(tools, fault);
}

/* The grammar of a call that must come. */
static bool take_call(const struct tools *tools, struct ask *ask, struct fault *fault)
{
    struct bytes grammar = {0};
    ask->tools = tools->n && tools->choice != TOOL_NONE;
    ask->tool_only = ask->tools && tools->choice == TOOL_REQUIRED;
    if (!ask->tool_only) return true;
    tools_grammar(tools, &grammar, fault);
    return set_grammar(ask, &grammar, fault);
}

bool asking_talk(struct call *call, const json_t *body, const char *model, struct ask *ask, struct talk *talk,
                 const struct tools *tools, bool answer)
{
    struct fault *fault = &call->fault;
    struct entry *entry = NULL;
    if (!take_call(tools, ask, fault) || !tools_tell(tools, talk, fault) ||
        !prompt_model(call->server, model, ask, &entry, fault))
        return false;
    if (answer && !asking_sampling(body, ask, 1.0, entry, fault)) {
        library_release(&call->server->library, entry);
        return false;
    }
    return prompt_talk(call->server, ask, talk, entry, fault);
}

bool asking_read(struct call *call, struct ask *ask, enum ask_kind kind, const char *prefix, asking_take *take)
{
    struct talk talk = {.calls = call->server->calls};
    struct tools tools = {.named = -1, .format = call->server->calls};
    json_t *body = input_parse(call->body.data, call->body.n, &call->fault);
    asking_begin(ask, kind, call->server, prefix);
    const bool good = body && take(call, body, ask, &talk, &tools);
    talk_free(&talk);
    tools_free(&tools);
    json_decref(body);
    return good;
}

/* ---- Handing over ---------------------------------------------------------------------------- */

void asking_answer(struct call *call, enum ask_kind kind, const char *prefix, asking_take *take,
                   const struct writer *writer)
{
    struct ask ask;
    if (asking_read(call, &ask, kind, prefix, take)) asking_submit(call, &ask, writer);
    else ask_free(&ask, &call->server->library);
}

/* What is asked to be exact to a kind of rows has to have a context with those. */
static bool exact_can_be(const struct ask *ask, struct fault *fault)
{
    struct sqz_error error;
    if (ask->exact != ASK_EXACT_F16 && ask->exact != ASK_EXACT_INT8) return true;
    for (unsigned i = 0; i < ask->n_prompts; i++) {
        const struct entry *entry = ask->prompts[i].context;
        const enum sqz_exact exact = ask->exact == ASK_EXACT_INT8 ? SQZ_EXACT_INT8 : SQZ_EXACT_F16;
        if (!entry && exact == SQZ_EXACT_INT8)
            return fault_set(fault, 400, "unsupported", "exact",
                             "exact int8 is of contexts with rows of 4 + 4 bits, and this conversation has no context; "
                             "allowed are true and f16");
        if (entry && sqz_exact_check(entry->context, exact, &error) != SQZ_OK) return fault_from(fault, &error);
    }
    return true;
}

void asking_submit(struct call *call, struct ask *ask, const struct writer *writer)
{
    struct server *server = call->server;
    struct fault *fault = &call->fault;
    if (ask->n_prompts * ask->n_each > MOST_CHOICES || ask->n_prompts * ask->n_each > server->options.n_slots) {
        const size_t most = server->options.n_slots < MOST_CHOICES ? server->options.n_slots : MOST_CHOICES;
        fault_set(fault, 400, "out_of_range", "n", "%u answers at once: at most %zu", ask->n_prompts * ask->n_each,
                  most);
        ask_free(ask, &server->library);
        return;
    }
    if (!exact_can_be(ask, fault)) {
        ask_free(ask, &server->library);
        return;
    }
    struct stream *stream = stream_create(ask->events);
    struct request *request =
        stream ? request_create(ask, stream, writer, call->user, server->options.request_seconds) : NULL;
    if (!request) {
        fault_set(fault, 503, "out_of_memory", NULL, "out of memory");
        stream_release(stream);
        ask_free(ask, &server->library);
        return;
    }
    request->model = server->model;
    if (scheduler_submit(server->scheduler, request, fault)) {
        call->stream = stream;
        return;
    }
    request_free(request, &server->library);
    stream_release(stream);
}

/* ---- Writing ------------------------------------------------------------------------------------ */

void write_event(struct stream *stream, const char *name, json_t *value)
{
    struct bytes event = {0};
    char *text = value ? json_dumps(value, JSON_COMPACT) : NULL;
    json_decref(value);
    if (name) bytes_print(&event, "event: %s\n", name);
    bytes_print(&event, "data: %s\n\n", text ? text : "{}");
    if (event.data) stream_write(stream, event.data, event.n);
    bytes_free(&event);
    free(text);
}

void write_whole(struct stream *stream, int status, json_t *value)
{
    char *text = value ? json_dumps(value, JSON_COMPACT) : NULL;
    json_decref(value);
    if (text) stream_write(stream, text, strlen(text));
    free(text);
    stream_finish(stream, text ? status : 500, 0);
}

json_t *write_calls(struct request *r, struct choice *c)
{
    const char *text = c->spoken.text.data;
    c->n_plain = c->spoken.text.n;
    json_t *calls = r->ask.tools && text ? calls_read(r->ask.calls, text, c->n_plain, &c->n_plain) : NULL;
    c->called = calls != NULL;
    while (calls && c->n_plain && text[c->n_plain - 1] == '\n') c->n_plain--;
    if (r->ask.events && c->n_plain > c->n_sent) {
        r->writer->piece(r, c, text + c->n_sent, c->n_plain - c->n_sent);
        c->n_sent = c->n_plain;
    }
    return calls;
}

json_t *write_squeeze(const struct usage *usage)
{
    if (!usage->squeezed) return NULL;
    json_t *root = json_pack("{s:f, s:f}", "share_read", usage->share, "missed_mass", usage->missed);
    if (usage->exact) {
        if (usage->exact_to) json_object_set_new(root, "exact", json_string(usage->exact_to));
        json_object_set_new(root, "drafted_tokens", json_integer((json_int_t)usage->drafted));
        json_object_set_new(root, "accepted_tokens", json_integer((json_int_t)usage->accepted));
    }
    if (usage->read_map) json_object_set_new(root, "passages", passages_json(usage->passages, usage->n_passages));
    return root;
}
