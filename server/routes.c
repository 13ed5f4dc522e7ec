/* The table of routes; routes.h describes it. */
#include "routes.h"

#include <stdio.h>
#include <string.h>

static const struct route table[] = {
    {"GET", "/", route_page, API_OPENAI, true, false},
    {"GET", "/page.css", route_page_css, API_OPENAI, true, false},
    {"GET", "/page.js", route_page_js, API_OPENAI, true, false},
    {"GET", "/icon.svg", route_page_icon, API_OPENAI, true, false},
    {"GET", "/health", route_health, API_OPENAI, true, false},
    {"GET", "/props", route_props, API_OPENAI, false, false},
    {"GET", "/metrics", route_metrics, API_OPENAI, false, false},
    {"GET", "/openapi.json", route_openapi, API_OPENAI, true, false},
    {"GET", "/v1/models", route_models, API_OPENAI, false, false},
    {"GET", "/v1/models/", route_model, API_OPENAI, false, false},
    {"POST", "/tokenize", route_tokenize, API_OPENAI, false, false},
    {"POST", "/v1/chat/completions", route_chat, API_OPENAI, false, false},
    {"POST", "/v1/completions", route_completions, API_OPENAI, false, false},
    {"POST", "/v1/responses", route_responses, API_OPENAI, false, false},
    {"POST", "/v1/messages", route_messages, API_ANTHROPIC, false, false},
    {"POST", "/v1/messages/count_tokens", route_count_tokens, API_ANTHROPIC, false, false},
    {"GET", "/v1/contexts", route_contexts, API_OPENAI, false, false},
    {"POST", "/v1/contexts", route_create_context, API_OPENAI, false, true},
    {"GET", "/v1/contexts/*/text", route_context_text, API_OPENAI, false, false},
    {"GET", "/v1/contexts/", route_context, API_OPENAI, false, false},
    {"PATCH", "/v1/contexts/", route_change_context, API_OPENAI, false, false},
    {"DELETE", "/v1/contexts/", route_delete_context, API_OPENAI, false, false},
};

static bool path_matches(const struct route *route, const char *path, const char **argument)
{
    const char *star = strchr(route->path, '*'), *end = star ? star + 1 : "";
    const size_t n = star ? (size_t)(star - route->path) : strlen(route->path), n_path = strlen(path);
    *argument = "";
    if (n == 1 || route->path[n - 1] != '/') return strcmp(path, route->path) == 0;
    if (n_path <= n + strlen(end) || strncmp(path, route->path, n) != 0) return false;
    if (strcmp(path + n_path - strlen(end), end) != 0) return false;
    *argument = path + n;
    return true;
}

const struct route *routes_find(const char *method, const char *path, const char **argument, char allowed[64])
{
    const char *found = NULL; /* methods of one path alone: the first in the table that matches */
    size_t n = 0;
    /* What asks for no body of an answer is asked as GET. */
    const char *wanted = strcmp(method, "HEAD") == 0 ? "GET" : method;
    allowed[0] = '\0';
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if ((found && strcmp(found, table[i].path) != 0) || !path_matches(&table[i], path, argument)) continue;
        found = table[i].path;
        if (strcmp(table[i].method, wanted) == 0) return &table[i];
        n += (size_t)snprintf(allowed + n, 64 - n, "%s%s", n ? ", " : "", table[i].method);
    }
    return NULL;
}
