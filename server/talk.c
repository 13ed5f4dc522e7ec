/* A conversation; talk.h describes it. */
#include "talk.h"

#include <stdlib.h>
#include <string.h>

#include "input.h"

static bool reserve(struct talk *t, struct fault *fault)
{
    if (t->n < t->capacity) return true;
    const size_t capacity = t->capacity ? 2 * t->capacity : 8;
    struct turn *grown = t->n < MOST_TURNS ? realloc(t->turns, capacity * sizeof *grown) : NULL;
    if (!grown) return fault_set(fault, 400, NULL, "messages", "more than %d messages", (int)MOST_TURNS);
    t->turns = grown;
    t->capacity = capacity;
    return true;
}

struct bytes *talk_say(struct talk *t, const char *role, struct fault *fault)
{
    if (t->n && strcmp(t->turns[t->n - 1].role, role) == 0) {
        struct bytes *last = &t->turns[t->n - 1].text;
        if (last->n) bytes_put(last, "\n\n");
        return last;
    }
    if (!reserve(t, fault)) return NULL;
    t->turns[t->n] = (struct turn){.role = role};
    return &t->turns[t->n++].text;
}

void talk_free(struct talk *t)
{
    for (size_t i = 0; i < t->n; i++) bytes_free(&t->turns[i].text);
    free(t->turns);
    bytes_free(&t->begun);
    memset(t, 0, sizeof *t);
}

void talk_begin_answer(struct talk *t)
{
    if (t->n == 0 || strcmp(t->turns[t->n - 1].role, "assistant") != 0) return;
    t->begun = t->turns[--t->n].text;
}

void talk_text(struct bytes *text, const char *data, size_t n)
{
    static const char mark[] = "\xef\xbb\xbf";
    if (text->n == 0 && n >= 3 && memcmp(data, mark, 3) == 0) data += 3, n -= 3;
    for (size_t at = 0; at < n;) {
        const char *cr = memchr(data + at, '\r', n - at);
        const size_t end = cr ? (size_t)(cr - data) : n;
        bytes_append(text, data + at, end - at);
        if (!cr) return;
        bytes_append(text, "\n", 1);
        at = end + 1 + (end + 1 < n && data[end + 1] == '\n');
    }
}

static bool add_part(struct bytes *text, const json_t *part, const char *param, struct fault *fault)
{
    const char *type = json_string_value(json_object_get(part, "type"));
    const json_t *said = json_object_get(part, "text");
    const bool known =
        type && (strcmp(type, "text") == 0 || strcmp(type, "input_text") == 0 || strcmp(type, "output_text") == 0);
    if (!known || !json_is_string(said))
        return fault_set(fault, 400, "unsupported", param, "a part of type %.40s: only texts are understood",
                         type ? type : "(none)");
    talk_text(text, json_string_value(said), json_string_length(said));
    return true;
}

bool talk_content(struct bytes *text, const json_t *content, const char *param, struct fault *fault)
{
    size_t i;
    json_t *part;
    if (!content || json_is_null(content)) return true;
    if (json_is_string(content)) {
        talk_text(text, json_string_value(content), json_string_length(content));
        return true;
    }
    if (!json_is_array(content))
        return fault_set(fault, 400, "invalid_type", param, "%s is %s: a string or an array of parts is wanted", param,
                         input_kind(content));
    json_array_foreach(content, i, part) if (!add_part(text, part, param, fault)) return false;
    return true;
}

bool talk_instruct(struct talk *t, const char *text, size_t n, struct fault *fault)
{
    struct bytes all = {0};
    if (!reserve(t, fault)) return false;
    bytes_append(&all, text, n);
    if (t->n && strcmp(t->turns[0].role, "system") == 0) {
        const struct bytes *old = &t->turns[0].text;
        bytes_print(&all, "%s%s", old->n ? "\n\n" : "", old->n ? old->data : "");
        bytes_free(&t->turns[0].text);
    } else {
        memmove(t->turns + 1, t->turns, t->n * sizeof *t->turns);
        t->turns[0].role = "system";
        t->n++;
    }
    t->turns[0].text = all;
    return true;
}
