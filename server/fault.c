/* Faults of requests; fault.h describes them. */
#include "fault.h"

#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

bool fault_set(struct fault *fault, int status, const char *code, const char *param, const char *format, ...)
{
    va_list arguments;
    if (fault->status) return false;
    fault->status = status;
    fault->code = code;
    snprintf(fault->param, sizeof fault->param, "%s", param ? param : "");
    va_start(arguments, format);
    vsnprintf(fault->message, sizeof fault->message, format, arguments);
    va_end(arguments);
    return false;
}

bool fault_of_end(struct fault *fault, const char *trouble)
{
    if (!fault->retry_after) fault->retry_after = 5;
    return trouble ? fault_set(fault, 503, "rank_lost", NULL, "%s", trouble)
                   : fault_set(fault, 503, "shutting_down", NULL, "the server is stopping");
}

bool fault_from(struct fault *fault, const struct sqz_error *error)
{
    switch (error->status) {
    case SQZ_ERROR_LENGTH: return fault_set(fault, 400, "context_length_exceeded", NULL, "%s", error->message);
    case SQZ_ERROR_ARGUMENT:
    case SQZ_ERROR_TEXT: return fault_set(fault, 400, NULL, NULL, "%s", error->message);
    case SQZ_ERROR_UNSUPPORTED: return fault_set(fault, 400, "unsupported", NULL, "%s", error->message);
    case SQZ_ERROR_FORMAT:
    case SQZ_ERROR_MISMATCH: return fault_set(fault, 409, "context_unusable", NULL, "%s", error->message);
    case SQZ_ERROR_MEMORY: return fault_set(fault, 503, "out_of_memory", NULL, "%s", error->message);
    default: return fault_set(fault, 500, NULL, NULL, "%s", error->message);
    }
}

static const char *openai_type(int status)
{
    switch (status) {
    case 401: return "authentication_error";
    case 403: return "permission_error";
    case 404: return "not_found_error";
    case 429: return "rate_limit_error";
    default: return status < 500 ? "invalid_request_error" : "server_error";
    }
}

static const char *anthropic_type(int status)
{
    switch (status) {
    case 413: return "request_too_large";
    case 503: return "overloaded_error";
    default: return status < 500 ? openai_type(status) : "api_error";
    }
}

/* Messages may quote a client's words: what is no UTF-8 there must not spoil the answer. */
static json_t *safe_text(const char *text)
{
    struct bytes safe = {0};
    size_t n = 0;
    while (text[n]) n++;
    bytes_append_utf8(&safe, text, n);
    json_t *value = json_stringn(safe.data ? safe.data : "", safe.n);
    bytes_free(&safe);
    return value;
}

void fault_body(const struct fault *fault, enum api api, struct bytes *body)
{
    json_t *message = safe_text(fault->message), *root;
    if (api == API_ANTHROPIC)
        root = json_pack("{s:s, s:{s:s, s:o}, s:s?}", "type", "error", "error", "type", anthropic_type(fault->status),
                         "message", message, "request_id", fault->request_id[0] ? fault->request_id : NULL);
    else
        root = json_pack("{s:{s:o, s:s, s:o, s:s?}}", "error", "message", message, "type", openai_type(fault->status),
                         "param", fault->param[0] ? safe_text(fault->param) : json_null(), "code", fault->code);
    char *text = root ? json_dumps(root, JSON_COMPACT) : NULL;
    bytes_put(body, text ? text : "{\"error\":{\"message\":\"out of memory\",\"type\":\"server_error\"}}");
    free(text);
    json_decref(root);
}
