/* Answers that pass through; answered.h describes it. */
#define _GNU_SOURCE /* memmem */
#include "answered.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "ids.h"

/* A head that is longer, and an event that is, go on as they come. */
enum { MOST_HEAD_BYTES = 32 * 1024, MOST_EVENT_BYTES = 1 << 20 };

enum asked_api asked_api_of(const char *path)
{
    static const char messages[] = "/v1/messages", responses[] = "/v1/responses";
    if (strncmp(path, messages, sizeof messages - 1) == 0) return ASKED_ANTHROPIC;
    return strncmp(path, responses, sizeof responses - 1) == 0 ? ASKED_RESPONSES : ASKED_OPENAI;
}

/* ---- Heads ---------------------------------------------------------------------------- */

bool head_value(const char *head, size_t n, const char *name, char *value, size_t most)
{
    const size_t n_name = strlen(name);
    const char *end = head + n;
    for (const char *line = head; line < end;) {
        const char *next = memchr(line, '\n', (size_t)(end - line));
        const char *last = next ? next : end;
        if ((size_t)(last - line) > n_name && line[n_name] == ':' && strncasecmp(line, name, n_name) == 0) {
            const char *from = line + n_name + 1;
            while (from < last && (*from == ' ' || *from == '\t')) from++;
            while (last > from && (last[-1] == ' ' || last[-1] == '\t' || last[-1] == '\r')) last--;
            const size_t bytes = (size_t)(last - from) < most ? (size_t)(last - from) : most - 1;
            memcpy(value, from, bytes);
            value[bytes] = '\0';
            return true;
        }
        line = next ? next + 1 : end;
    }
    return false;
}

/* The head of an answer is complete: what follows it. */
static void read_head(struct answered *a, const char *head, size_t n, struct bytes *out)
{
    char value[64];
    const int status = n > 12 ? atoi(head + 9) : 0;
    bytes_append(out, head, n);
    if (status >= 100 && status < 200) return; /* another head follows */
    a->begun = true;
    const bool events =
        head_value(head, n, "Content-Type", value, sizeof value) && strcasecmp(value, "text/event-stream") == 0;
    const bool chunked =
        head_value(head, n, "Transfer-Encoding", value, sizeof value) && strcasecmp(value, "chunked") == 0;
    if (a->bodiless || status == 204 || status == 304) a->state = ANSWER_DONE;
    else if (events) a->state = chunked ? ANSWER_CHUNKS : ANSWER_EVENTS;
    else if (!chunked && head_value(head, n, "Content-Length", value, sizeof value)) {
        a->left = strtoull(value, NULL, 10);
        a->state = a->left ? ANSWER_COUNTED : ANSWER_DONE;
    } else a->state = ANSWER_UNTIL_END;
}

/* False: it is not complete. */
static bool take_head(struct answered *a, struct bytes *out)
{
    const char *end = a->in.n ? memmem(a->in.data, a->in.n, "\r\n\r\n", 4) : NULL;
    if (!end) {
        if (a->in.n > MOST_HEAD_BYTES) a->state = ANSWER_UNTIL_END;
        return a->in.n > MOST_HEAD_BYTES;
    }
    const size_t n = (size_t)(end - a->in.data) + 4;
    read_head(a, a->in.data, n, out);
    bytes_drop(&a->in, n);
    return true;
}

/* ---- Events ------------------------------------------------------------------------------ */

/* Lines that begin an event with a name: those that are numbered have one each. */
static unsigned count_events(const char *data, size_t n)
{
    static const char mark[] = "event:";
    unsigned count = 0;
    for (const char *at = data, *end = data + n; at && at < end;) {
        count += (size_t)(end - at) >= sizeof mark - 1 && memcmp(at, mark, sizeof mark - 1) == 0;
        at = memchr(at, '\n', (size_t)(end - at));
        if (at) at++;
    }
    return count;
}

static void pass_events(struct answered *a, size_t n, struct bytes *out)
{
    if (!n) return;
    a->n_events += count_events(a->event.data, n);
    if (a->state == ANSWER_CHUNKS) bytes_print(out, "%zx\r\n", n);
    bytes_append(out, a->event.data, n);
    if (a->state == ANSWER_CHUNKS) bytes_append(out, "\r\n", 2);
    bytes_drop(&a->event, n);
}

static void take_events(struct answered *a, const char *data, size_t n, struct bytes *out)
{
    bytes_append(&a->event, data, n);
    size_t whole = a->event.n;
    while (whole >= 2 && !(a->event.data[whole - 1] == '\n' && a->event.data[whole - 2] == '\n')) whole--;
    pass_events(a, whole >= 2 ? whole : a->event.n > MOST_EVENT_BYTES ? a->event.n : 0, out);
}

/* One chunk of HTTP's. False: it is not complete. */
static bool take_chunk(struct answered *a, struct bytes *out)
{
    char *end;
    const char *line = a->in.n ? memmem(a->in.data, a->in.n, "\r\n", 2) : NULL;
    if (!line) return false;
    const size_t head = (size_t)(line - a->in.data) + 2, n = strtoull(a->in.data, &end, 16);
    if (end == a->in.data || n > MOST_EVENT_BYTES) { /* nothing that libmicrohttpd writes */
        a->state = ANSWER_UNTIL_END;
        return true;
    }
    if (a->in.n < head + n + 2) return false;
    if (n) take_events(a, a->in.data + head, n, out);
    else {
        pass_events(a, a->event.n, out);
        bytes_put(out, "0\r\n\r\n");
        a->state = ANSWER_DONE;
    }
    bytes_drop(&a->in, head + n + 2);
    return true;
}

/* ---- An answer ----------------------------------------------------------------------------- */

void answered_take(struct answered *a, const char *data, size_t n, struct bytes *out)
{
    bytes_append(&a->in, data, n);
    for (bool more = true; more && a->in.n;) {
        size_t part = a->in.n;
        switch (a->state) {
        case ANSWER_HEAD: more = take_head(a, out); break;
        case ANSWER_CHUNKS: more = take_chunk(a, out); break;
        case ANSWER_EVENTS:
            take_events(a, a->in.data, part, out);
            bytes_drop(&a->in, part);
            break;
        case ANSWER_COUNTED:
            if (part > a->left) part = a->left;
            bytes_append(out, a->in.data, part);
            bytes_drop(&a->in, part);
            a->left -= part;
            if (!a->left) a->state = ANSWER_DONE;
            break;
        case ANSWER_UNTIL_END:
            a->begun = true;
            bytes_append(out, a->in.data, part);
            bytes_drop(&a->in, part);
            break;
        case ANSWER_DONE: bytes_drop(&a->in, part); break;
        }
    }
}

/* As write_openai.c, write_messages.c and write_responses.c end a stream that fails. */
static void last_event(const struct answered *a, const struct fault *fault, struct bytes *event)
{
    if (a->api == ASKED_RESPONSES) {
        json_t *root = json_pack("{s:s, s:s, s:s?, s:n, s:i}", "type", "error", "message", fault->message, "code",
                                 fault->code, "param", "sequence_number", (int)a->n_events);
        char *text = root ? json_dumps(root, JSON_COMPACT) : NULL;
        bytes_print(event, "event: error\ndata: %s\n\n", text ? text : "{}");
        free(text);
        json_decref(root);
        return;
    }
    bytes_put(event, a->api == ASKED_ANTHROPIC ? "event: error\ndata: " : "data: ");
    fault_body(fault, a->api == ASKED_ANTHROPIC ? API_ANTHROPIC : API_OPENAI, event);
    bytes_put(event, "\n\n");
}

bool answered_break(struct answered *a, const struct fault *fault, struct bytes *out)
{
    if (a->state == ANSWER_DONE) return true;
    if (a->state != ANSWER_CHUNKS && a->state != ANSWER_EVENTS) return false;
    bytes_free(&a->event); /* half an event would be no JSON */
    last_event(a, fault, &a->event);
    pass_events(a, a->event.n, out);
    if (a->state == ANSWER_CHUNKS) bytes_put(out, "0\r\n\r\n");
    a->state = ANSWER_DONE;
    return true;
}

void answered_free(struct answered *a)
{
    bytes_free(&a->in);
    bytes_free(&a->event);
}

/* ---- Answers of the supervisor's own ----------------------------------------------------------- */

static const char *reason_of(int status)
{
    switch (status) {
    case 200: return "OK";
    case 401: return "Unauthorized";
    case 503: return "Service Unavailable";
    default: return "Error";
    }
}

void answered_body(int status, const char *type, const struct bytes *body, int retry_after, bool bodiless,
                   struct bytes *out)
{
    char id[32];
    id_make(id, sizeof id, "req_");
    bytes_print(out,
                "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\nConnection: close\r\nCache-Control: "
                "no-store\r\nX-Content-Type-Options: nosniff\r\nx-request-id: %s\r\nrequest-id: %s\r\n",
                status, reason_of(status), type, body->n, id, id);
    if (retry_after > 0) bytes_print(out, "Retry-After: %d\r\n", retry_after);
    if (status == 401) bytes_put(out, "WWW-Authenticate: Bearer\r\n");
    bytes_put(out, "\r\n");
    if (!bodiless && body->n) bytes_append(out, body->data, body->n);
}

void answered_fault(const struct fault *fault, enum asked_api api, bool bodiless, struct bytes *out)
{
    struct bytes body = {0};
    fault_body(fault, api == ASKED_ANTHROPIC ? API_ANTHROPIC : API_OPENAI, &body);
    answered_body(fault->status, "application/json", &body, fault->retry_after, bodiless, out);
    bytes_free(&body);
}
