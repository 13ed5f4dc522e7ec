/* Conversations as tokens; prompt.h describes them. */
#include "prompt.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "conversation.h"

/* ---- Which context ------------------------------------------------------------------- */

bool prompt_model(struct server *server, const char *name, struct ask *ask, struct entry **entry, struct fault *fault)
{
    const size_t n = strlen(server->model_id);
    *entry = NULL;
    snprintf(ask->model, sizeof ask->model, "%s", server->model_id);
    if (!name || !*name || strcmp(name, server->model_id) == 0 || strcmp(name, "default") == 0) return true;
    const char *id = strncmp(name, server->model_id, n) == 0 && name[n] == ':' ? name + n + 1 : name;
    struct entry *e = NULL;
    if (context_id_is_good(id) && !(e = library_get(&server->library, id))) {
        library_scan(&server->library); /* another server may have written it */
        e = library_get(&server->library, id);
    }
    if (!e)
        return fault_set(fault, 404, "model_not_found", "model", "there is no model %.100s; /v1/models lists them",
                         name);
    if (!entry_is_ready(e, fault)) {
        library_release(&server->library, e);
        return false;
    }
    snprintf(ask->model, sizeof ask->model, "%s:%s", server->model_id, id);
    *entry = e;
    return true;
}

/* ---- Prompts --------------------------------------------------------------------------- */

static size_t limit_of(const struct server *server, const struct entry *entry)
{
    const double scale = entry ? (double)entry->info.rope_scale : 1.0;
    return (size_t)(round(server->info.n_context_tokens * scale));
}

bool prompt_tokens(struct server *server, struct ask *ask, int32_t *tokens, size_t n_tokens, struct entry *entry,
                   struct fault *fault)
{
    const size_t n_prefix = entry ? entry->info.n_tokens : 0, limit = limit_of(server, entry);
    const bool fits = n_prefix + n_tokens < limit;
    if (n_tokens == 0)
        fault_set(fault, 400, "empty_prompt", NULL, "there is nothing to answer: no tokens follow the context");
    else if (!fits)
        fault_set(
            fault, 400, "context_length_exceeded", NULL,
            "prompt is too long: it takes %zu tokens, and this model's maximum context length is %zu, of which an "
            "answer needs some",
            n_prefix + n_tokens, limit);
    else if (ask->n_prompts == MOST_CHOICES)
        fault_set(fault, 400, "invalid_value", NULL, "more than %d prompts at once", (int)MOST_CHOICES);
    if (fault->status) {
        free(tokens);
        library_release(&server->library, entry);
        return false;
    }
    if (ask->max_tokens > limit - n_prefix - n_tokens) ask->max_tokens = limit - n_prefix - n_tokens;
    ask->prompts[ask->n_prompts++] =
        (struct prompt){.tokens = tokens, .n_tokens = n_tokens, .context = entry, .n_prefix = n_prefix};
    return true;
}

/* Tokens from the beginning of a sequence: behind the longest context that they begin with. */
static bool add_matched(struct server *server, struct ask *ask, int32_t *tokens, size_t n_tokens, struct fault *fault)
{
    struct entry *entry = library_match_tokens(&server->library, tokens, n_tokens);
    if (entry) {
        n_tokens -= entry->info.n_tokens;
        memmove(tokens, tokens + entry->info.n_tokens, n_tokens * sizeof *tokens);
    }
    return prompt_tokens(server, ask, tokens, n_tokens, entry, fault);
}

bool prompt_text(struct server *server, struct ask *ask, const char *text, size_t n_bytes, struct entry *entry,
                 struct fault *fault)
{
    struct sqz_error error;
    int32_t *tokens = NULL;
    size_t n = 0;
    const enum sqz_status status = entry ? sqz_model_tokenize(server->model, text, n_bytes, &tokens, &n, &error)
                                         : sqz_beginning_tokens(server->model, text, n_bytes, &tokens, &n, &error);
    if (status != SQZ_OK) {
        library_release(&server->library, entry);
        return fault_from(fault, &error);
    }
    return entry ? prompt_tokens(server, ask, tokens, n, entry, fault) : add_matched(server, ask, tokens, n, fault);
}

/* ---- Conversations ------------------------------------------------------------------------- */

static struct sqz_message *messages_of(const struct talk *talk)
{
    struct sqz_message *messages = calloc(talk->n ? talk->n : 1, sizeof *messages);
    for (size_t i = 0; messages && i < talk->n; i++) {
        const struct turn *t = &talk->turns[i];
        messages[i] = (struct sqz_message){t->role, t->text.data ? t->text.data : "", t->text.n};
    }
    return messages;
}

/* What the client says of the answer stands behind where it begins. */
static bool append_begun(struct server *server, const struct talk *talk, int32_t **tokens, size_t *n,
                         struct fault *fault)
{
    struct sqz_error error;
    int32_t *more = NULL;
    size_t n_more = 0;
    if (talk->begun.n == 0) return true;
    if (sqz_model_tokenize(server->model, talk->begun.data, talk->begun.n, &more, &n_more, &error) != SQZ_OK) {
        free(*tokens);
        return fault_from(fault, &error);
    }
    int32_t *grown = realloc(*tokens, (*n + n_more) * sizeof *grown);
    if (grown) {
        memcpy(grown + *n, more, n_more * sizeof *more);
        *tokens = grown;
        *n += n_more;
    } else free(*tokens);
    free(more);
    return grown || fault_set(fault, 503, "out_of_memory", NULL, "out of memory");
}

/* What the system was told goes into the first question: the context's own beginning is before it already. */
static bool fold_system(struct talk *talk, struct fault *fault)
{
    if (strcmp(talk->turns[0].role, "system") != 0) return true;
    if (talk->n < 2 || strcmp(talk->turns[1].role, "user") != 0)
        return fault_set(fault, 400, "invalid_value", "messages",
                         "behind a prepared document the first turn must be the user's");
    struct bytes all = talk->turns[0].text;
    bytes_print(&all, "%s%s", all.n && talk->turns[1].text.n ? "\n\n" : "",
                talk->turns[1].text.n ? talk->turns[1].text.data : "");
    bytes_free(&talk->turns[1].text);
    talk->turns[1].text = all;
    memmove(talk->turns, talk->turns + 1, (talk->n - 1) * sizeof *talk->turns);
    talk->n--;
    return true;
}

static bool is_blank(char c)
{
    return c == '\n' || c == ' ' || c == '\t';
}

/* A question without the blanks at its ends, and without the document that it may repeat. */
static void cut_question(struct bytes *text, const struct entry *entry)
{
    const size_t n = entry->document_bytes;
    if (n && n <= text->n && memcmp(text->data, entry->document, n) == 0) bytes_drop(text, n);
    size_t blank = 0;
    while (blank < text->n && is_blank(text->data[blank])) blank++;
    bytes_drop(text, blank);
    while (text->n && is_blank(text->data[text->n - 1])) text->data[--text->n] = '\0';
}

static bool add_behind(struct server *server, struct ask *ask, struct talk *talk, struct entry *entry,
                       struct fault *fault)
{
    struct sqz_error error;
    int32_t *tokens;
    size_t n;
    if (!fold_system(talk, fault) || strcmp(talk->turns[0].role, "user") != 0) {
        library_release(&server->library, entry);
        return fault_set(fault, 400, "invalid_value", "messages",
                         "behind a prepared document the first turn must be the user's");
    }
    cut_question(&talk->turns[0].text, entry);
    struct sqz_message *messages = messages_of(talk);
    if (!messages) {
        library_release(&server->library, entry);
        return fault_set(fault, 503, "out_of_memory", NULL, "out of memory");
    }
    const enum sqz_status status =
        sqz_conversation_tokens_behind(server->model, entry->info.has_template, messages, talk->n, &tokens, &n, &error);
    free(messages);
    if (status != SQZ_OK) fault_from(fault, &error);
    if (status != SQZ_OK || !append_begun(server, talk, &tokens, &n, fault)) {
        library_release(&server->library, entry);
        return false;
    }
    ask->plain = !entry->info.has_template;
    return prompt_tokens(server, ask, tokens, n, entry, fault);
}

/* Where the last turn's last paragraph, most likely the question, begins. */
static size_t question_at(const struct bytes *text)
{
    for (size_t i = text->n; i-- > 1;)
        if (text->data[i] == '\n' && text->data[i - 1] == '\n') return i - 1;
    return 0;
}

/* A long beginning that others may have too is prepared for the next request: all but the last paragraph with what
 * follows it, and a few tokens less, since what follows may change how its end is cut into tokens. The paragraph is counted
 * by itself: a document takes tens of milliseconds to be cut, which it was already, and the model waits for the core. */
static void prepare_beginning(struct server *server, struct ask *ask, const struct talk *talk, const int32_t *tokens,
                              size_t n_tokens)
{
    enum { SAFE = 4 };
    struct sqz_error error;
    const size_t least = server->options.auto_prepare_tokens;
    const struct turn *last = &talk->turns[talk->n - 1];
    const size_t at = question_at(&last->text);
    const struct sqz_message question = {last->role, last->text.data ? last->text.data + at : "", last->text.n - at};
    int32_t *behind = NULL;
    size_t n_behind = 0;
    if (sqz_conversation_tokens_behind(server->model, true, &question, 1, &behind, &n_behind, &error) != SQZ_OK) return;
    free(behind);
    if (n_tokens < least + n_behind + SAFE) return;
    ask->jobs = server->jobs;
    ask->reader = jobs_add_tokens(server->jobs, tokens, n_tokens - n_behind - SAFE);
}

static bool add_whole(struct server *server, struct ask *ask, const struct talk *talk, struct fault *fault)
{
    struct sqz_error error;
    int32_t *tokens;
    size_t n;
    struct sqz_message *messages = messages_of(talk);
    if (!messages) return fault_set(fault, 503, "out_of_memory", NULL, "out of memory");
    const enum sqz_status status = sqz_conversation_tokens(server->model, true, messages, talk->n, &tokens, &n, &error);
    free(messages);
    if (status != SQZ_OK) return fault_from(fault, &error);
    const size_t n_turns = n;
    if (!append_begun(server, talk, &tokens, &n, fault)) return false;
    ask->plain = !server->info.has_chat_template;
    const size_t least = server->options.auto_prepare_tokens;
    struct entry *entry = library_match_tokens(&server->library, tokens, n);
    if (!entry && least && n >= least && n < limit_of(server, NULL))
        prepare_beginning(server, ask, talk, tokens, n_turns);
    library_release(&server->library, entry);
    return add_matched(server, ask, tokens, n, fault);
}

bool prompt_talk(struct server *server, struct ask *ask, struct talk *talk, struct entry *entry, struct fault *fault)
{
    if (talk->n == 0) {
        library_release(&server->library, entry);
        return fault_set(fault, 400, "invalid_value", "messages", "messages is empty: one is needed");
    }
    struct turn *first = &talk->turns[0];
    if (!entry && strcmp(first->role, "user") == 0 && first->text.n)
        entry = library_match_text(&server->library, first->text.data, first->text.n, server->info.has_chat_template);
    return entry ? add_behind(server, ask, talk, entry, fault) : add_whole(server, ask, talk, fault);
}
