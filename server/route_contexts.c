/* /v1/contexts: what is prepared, and having more prepared. */
#include <stdio.h>
#include <string.h>

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
    struct entry *e =
        context_id_is_good(call->argument) ? library_get(&call->server->library, call->argument) : NULL;
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

static bool add_text(struct call *call, const char *name, const char *text, size_t n)
{
    if (!name || !context_id_is_good(name))
        return fault_set(&call->fault, 400, "invalid_value", "name",
                         "a context's name is 1 to %d letters, digits, '.', '_' and '-', beginning with a letter or "
                         "digit",
                         (int)CONTEXT_ID_MAX);
    if (!jobs_add_text(call->server->jobs, name, text, n, false, &call->fault)) return false;
    scheduler_wake(call->server->scheduler);
    struct entry *e = library_get(&call->server->library, name);
    if (!e) return fault_set(&call->fault, 409, NULL, NULL, "the context was deleted meanwhile");
    call_reply(call, 202, entry_json(&call->server->library, e));
    library_release(&call->server->library, e);
    return true;
}

/* JSON with name and text, or the text itself with ?name=. */
void route_create_context(struct call *call)
{
    const char *name = call->query(call->query_data, "name"), *text = NULL;
    if (call->content_type && strncmp(call->content_type, "application/json", 16) != 0) {
        add_text(call, name, call->body.data ? call->body.data : "", call->body.n);
        return;
    }
    json_t *body = input_parse(call->body.data, call->body.n, &call->fault);
    if (body && input_text(body, "name", &name, &call->fault) && input_text(body, "text", &text, &call->fault)) {
        if (!text) fault_set(&call->fault, 400, "invalid_value", "text", "text is missing: a string is wanted");
        else add_text(call, name, text, json_string_length(json_object_get(body, "text")));
    }
    json_decref(body);
}
