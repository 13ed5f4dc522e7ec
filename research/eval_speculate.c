/* Exact answers with drafts beside those without; eval_speculate.h. */
#include "eval_speculate.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "answer.h"
#include "common.h"
#include "json_output.h"
#include "speculation.h"

/* NULL on failure. */
static struct sqz_session *exact_session(const struct eval *eval, const struct sqz_context *context, bool drafts,
                                         struct sqz_error *error)
{
    struct speculation_flags flags = eval->speculation;
    struct sqz_session_options options;
    struct sqz_session *session;
    sqz_session_options_default(&options);
    flags.exact = SQZ_EXACT_F16;
    if (!drafts) flags.draft = SQZ_DRAFT_NONE;
    speculation_flags_apply(&flags, &options);
    if (sqz_session_create(&session, eval->model, context, &options, error) != SQZ_OK) return NULL;
    sqz_session_set_cancel(session, signal_cancelled, NULL);
    return session;
}

static enum sqz_status ask(const struct eval *eval, struct sqz_session *session, const struct eval_question *question,
                           struct answer *answer, struct sqz_error *error)
{
    const size_t most = question->max_tokens < eval->max_reply_tokens ? question->max_tokens : eval->max_reply_tokens;
    sqz_session_reset(session);
    return answer_question(session, eval->model, question->text, strlen(question->text), true, most, false, answer,
                           NULL, NULL, error);
}

static double token_seconds(const struct answer *answer)
{
    return answer->tokens_per_second > 0 ? 1 / answer->tokens_per_second : 0;
}

/* One question both ways; NULL on failure. */
static json_t *ask_both(const struct eval *eval, struct sqz_session *drafts, struct sqz_session *alone,
                        const struct eval_question *question, struct sqz_error *error)
{
    struct answer with, without;
    json_t *entry = NULL;
    enum sqz_status status = ask(eval, alone, question, &without, error);
    if (status == SQZ_OK) {
        status = ask(eval, drafts, question, &with, error);
        if (status == SQZ_OK) {
            const char *a = with.text.text ? with.text.text : "", *b = without.text.text ? without.text.text : "";
            entry = speculation_json(&with.speculation);
            json_object_set_new(entry, "n_tokens", json_count(with.n_tokens));
            json_object_set_new(entry, "seconds_a_token", json_number(token_seconds(&with)));
            json_object_set_new(entry, "seconds_a_token_alone", json_number(token_seconds(&without)));
            json_object_set_new(entry, "same", json_boolean(strcmp(a, b) == 0));
        }
        text_buffer_free(&with.text);
    }
    text_buffer_free(&without.text);
    return entry;
}

json_t *eval_speculate(const struct eval *eval, const struct sqz_context *context, const struct eval_document *document,
                       struct sqz_error *error)
{
    struct sqz_session *drafts = exact_session(eval, context, true, error);
    struct sqz_session *alone = drafts ? exact_session(eval, context, false, error) : NULL;
    json_t *answers = alone ? json_array() : NULL;
    for (size_t i = 0; i < document->n_questions && i < eval->max_questions && answers; i++) {
        json_t *entry = ask_both(eval, drafts, alone, &document->questions[i], error);
        if (entry) json_array_append_new(answers, entry);
        else if (error->status == SQZ_ERROR_LENGTH) continue; /* left out, as it is elsewhere */
        else json_decref(answers), answers = NULL;
    }
    sqz_session_free(drafts);
    sqz_session_free(alone);
    return answers;
}

/* ---- Figures ------------------------------------------------------------------------------- */

struct sums {
    double drafted, by_text, accepted, tested, cycles, tokens, same, answers, seconds, alone;
};

static double number(const json_t *entry, const char *key)
{
    return json_number_value(json_object_get(entry, key));
}

static void add(struct sums *s, const json_t *entry)
{
    const double n = number(entry, "n_tokens"), seconds = number(entry, "seconds_a_token"),
                 alone = number(entry, "seconds_a_token_alone");
    s->drafted += number(entry, "n_drafted");
    s->by_text += number(entry, "n_drafted_by_text");
    s->accepted += number(entry, "n_accepted");
    s->tested += number(entry, "n_tested");
    s->cycles += number(entry, "n_cycles");
    s->tokens += n;
    s->same += json_is_true(json_object_get(entry, "same"));
    s->answers++;
    if (seconds > 0 && alone > 0) s->seconds += n * seconds, s->alone += n * alone;
}

static double ratio(double a, double b)
{
    return b > 0 ? a / b : 0;
}

static json_t *sums_json(const struct sums *s)
{
    json_t *root = json_object();
    json_object_set_new(root, "answers", json_number(s->answers));
    json_object_set_new(root, "tokens", json_number(s->tokens));
    json_object_set_new(root, "acceptance", json_number(ratio(s->accepted, s->tested)));
    json_object_set_new(root, "accepted_of_drafted", json_number(ratio(s->accepted, s->drafted)));
    json_object_set_new(root, "drafted_by_text", json_number(ratio(s->by_text, s->drafted)));
    json_object_set_new(root, "tokens_a_cycle", json_number(ratio(s->accepted + s->cycles, s->cycles)));
    json_object_set_new(root, "vs_exact", json_number(ratio(s->alone, s->seconds)));
    json_object_set_new(root, "same_answers", json_number(s->same));
    return root;
}

static void print_sums(const char *name, double tokens, const struct sums *s)
{
    printf("%-24.24s %8.0f %10.1f%% %9.1f%% %9.2f %8.2fx %6.0f/%.0f\n", name, tokens,
           100 * ratio(s->accepted, s->tested), 100 * ratio(s->by_text, s->drafted),
           ratio(s->accepted + s->cycles, s->cycles), ratio(s->alone, s->seconds), s->same, s->answers);
}

static struct sums sums_of(const json_t *record, struct sums *all)
{
    const json_t *answers = json_object_get(record, "speculation");
    struct sums sums = {0};
    for (size_t i = 0; i < json_array_size(answers); i++) {
        add(&sums, json_array_get(answers, i));
        add(all, json_array_get(answers, i));
    }
    return sums;
}

void eval_print_speculation(const json_t *records)
{
    struct sums all = {0};
    double tokens = 0;
    printf("\nexact answers by drafts   tokens  kept in turn  by text  a cycle  speed  same answers\n");
    for (size_t d = 0; d < json_array_size(records); d++) {
        const json_t *record = json_array_get(records, d);
        const struct sums sums = sums_of(record, &all);
        tokens += number(record, "tokens");
        print_sums(json_string_value(json_object_get(record, "task")), number(record, "tokens"), &sums);
    }
    print_sums("all", json_array_size(records) ? tokens / (double)json_array_size(records) : 0, &all);
}

json_t *eval_speculation_json(const json_t *records)
{
    struct sums all = {0};
    json_t *root = json_object(), *documents = json_array();
    for (size_t d = 0; d < json_array_size(records); d++) {
        const json_t *record = json_array_get(records, d);
        const struct sums sums = sums_of(record, &all);
        json_t *document = sums_json(&sums);
        json_object_set(document, "task", json_object_get(record, "task"));
        json_object_set(document, "context_tokens", json_object_get(record, "tokens"));
        json_array_append_new(documents, document);
    }
    json_object_set_new(root, "all", sums_json(&all));
    json_object_set_new(root, "documents", documents);
    return root;
}
