/* /v1/contexts: what is prepared, and having more prepared. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "convert.h"
#include "input.h"
#include "core.h"

void route_contexts(struct call *call)
{
    library_scan(&call->server->library);
    call_reply(call, 200, library_json(&call->server->library));
}

/* The entry that the path names; NULL, and the fault: none. */
static struct entry *named(struct call *call)
{
    struct entry *e = context_id_is_good(call->argument) ? library_get(&call->server->library, call->argument) : NULL;
    if (!e) fault_set(&call->fault, 404, "context_not_found", NULL, "there is no such context");
    return e;
}

void route_context(struct call *call)
{
    struct entry *e = named(call);
    if (!e) return;
    call_reply(call, 200, entry_json(&call->server->library, e));
    library_release(&call->server->library, e);
}

/* Bytes [from, to) of a document, widened to whole characters, at most so many at once. */
static json_t *text_json(const struct entry *e, size_t from, size_t to)
{
    enum { MOST = 1 << 20 };
    if (to > e->document_bytes) to = e->document_bytes;
    if (from > to) from = to;
    if (to - from > MOST) to = from + MOST;
    while (from > 0 && ((unsigned char)e->document[from] & 0xc0) == 0x80) from--;
    while (to < e->document_bytes && ((unsigned char)e->document[to] & 0xc0) == 0x80) to++;
    struct bytes text = {0};
    bytes_append_utf8(&text, e->document + from, to - from);
    json_t *root = json_pack("{s:s, s:s, s:I, s:I, s:I, s:o}", "id", e->id, "object", "context.text", "from",
                             (json_int_t)from, "to", (json_int_t)to, "bytes", (json_int_t)e->document_bytes, "text",
                             json_stringn(text.data ? text.data : "", text.n));
    bytes_free(&text);
    return root;
}

/* A number of bytes in the query. */
static bool query_bytes(struct call *call, const char *name, size_t *value)
{
    const char *text = call->query(call->query_data, name);
    char *end;
    if (!text) return true;
    errno = 0;
    const unsigned long long n = strtoull(text, &end, 10);
    if (*text >= '0' && *text <= '9' && !*end && !errno) {
        *value = (size_t)n;
        return true;
    }
    return fault_set(&call->fault, 400, "invalid_value", name, "%s is %.40s: a number of bytes is wanted", name, text);
}

void route_context_text(struct call *call)
{
    char id[CONTEXT_ID_MAX + 1];
    size_t from = 0, to = SIZE_MAX;
    snprintf(id, sizeof id, "%.*s", (int)strcspn(call->argument, "/"), call->argument);
    struct entry *e = context_id_is_good(id) && strcmp(call->argument + strlen(id), "/text") == 0
                          ? library_get(&call->server->library, id)
                          : NULL;
    if (!e) fault_set(&call->fault, 404, "context_not_found", NULL, "there is no such context");
    else if (e->state != ENTRY_READY) fault_set(&call->fault, 409, "context_not_ready", NULL, "it is not prepared yet");
    else if (query_bytes(call, "from", &from) && query_bytes(call, "to", &to))
        call_reply(call, 200, text_json(e, from, to));
    library_release(&call->server->library, e);
}

void route_change_context(struct call *call)
{
    struct entry *e = named(call);
    if (!e) return;
    json_t *body = input_parse(call->body.data, call->body.n, &call->fault);
    bool pinned = e->pinned;
    if (body && input_flag(body, "pinned", &pinned, &call->fault)) {
        if (library_pin(&call->server->library, e, pinned))
            call_reply(call, 200, entry_json(&call->server->library, e));
        else fault_set(&call->fault, 500, NULL, NULL, "the contexts' folder cannot be written");
    }
    json_decref(body);
    library_release(&call->server->library, e);
}

void route_delete_context(struct call *call)
{
    struct entry *e = named(call);
    if (!e) return;
    json_t *reply = json_pack("{s:s, s:s, s:b}", "id", e->id, "object", "context.deleted", "deleted", 1);
    jobs_cancel(call->server->jobs, e);
    library_delete(&call->server->library, e);
    library_release(&call->server->library, e);
    call_reply(call, 200, reply);
}

/* ---- Uploads ------------------------------------------------------------------------------ */

static bool check_name(struct call *call, const char *name)
{
    if (name && context_id_is_good(name)) return true;
    return fault_set(&call->fault, 400, "invalid_value", "name",
                     "a context's name is 1 to %d letters, digits, '.', '_' and '-', beginning with a letter or digit",
                     (int)CONTEXT_ID_MAX);
}

static bool add(struct call *call, const char *name, const char *data, size_t n, bool is_text)
{
    struct jobs *jobs = call->server->jobs;
    if (!check_name(call, name)) return false;
    const bool is_file = !is_text && document_kind(data, n);
    const bool added =
        is_file ? jobs_add_file(jobs, name, data, n, &call->fault) : jobs_add_text(jobs, name, data, n, &call->fault);
    if (!added) return false;
    scheduler_wake(call->server->scheduler);
    struct entry *e = library_get(&call->server->library, name);
    if (!e) return fault_set(&call->fault, 409, NULL, NULL, "the context was deleted meanwhile");
    call_reply(call, 202, entry_json(&call->server->library, e));
    library_release(&call->server->library, e);
    return true;
}

/* JSON with name and text, or the document itself with ?name=: text, or another kind, told by its bytes alone. */
void route_create_context(struct call *call)
{
    const char *name = call->query(call->query_data, "name"), *text = NULL;
    if (name && !check_name(call, name)) return;
    if (call->content_type && strncmp(call->content_type, "application/json", 16) != 0) {
        add(call, name, call->body.data ? call->body.data : "", call->body.n, false);
        return;
    }
    json_t *body = input_parse(call->body.data, call->body.n, &call->fault);
    if (body && input_text(body, "name", &name, &call->fault) && input_text(body, "text", &text, &call->fault)) {
        if (!text) fault_set(&call->fault, 400, "invalid_value", "text", "text is missing: a string is wanted");
        else add(call, name, text, json_string_length(json_object_get(body, "text")), true);
    }
    json_decref(body);
}
