/* Exact answers with drafts of several methods, beside those without; eval_speculate.h. */
#include "eval_speculate.h"

#include <string.h>

#include "answer.h"
#include "backend_other_rows.h"
#include "common.h"
#include "json_output.h"
#include "session.h"
#include "snapkv.h"
#include "speculation.h"

/* ---- Who drafts ------------------------------------------------------------------------- */

/* A method's drafts of a document's answers. */
struct drafter {
    enum eval_method method;
    char name[EVAL_NAME];
    struct sqz_context *context; /* that answers are exact to */
    struct sqz_context *rounded; /* quantspec's; else NULL */
    struct sqz_session *drafts, *alone;
    struct sqz_selector window;
    struct backend_selected selected;
    struct snapkv snapkv;
    struct backend_other_rows other;
};

/* NULL on failure. */
static struct sqz_session *exact_session(const struct eval *eval, const struct sqz_context *context, bool drafts,
                                         struct sqz_error *error)
{
    struct speculation_flags flags = eval->speculation;
    struct sqz_session_options options;
    struct sqz_context_info info;
    struct sqz_session *session;
    sqz_session_options_default(&options);
    sqz_context_get_info(context, &info);
    flags.exact = info.squeeze.rows == SQZ_ROWS_INT4_4 ? SQZ_EXACT_INT8 : SQZ_EXACT_F16;
    if (!drafts) flags.draft = SQZ_DRAFT_NONE;
    speculation_flags_apply(&flags, &options);
    if (sqz_session_create(&session, eval->model, context, &options, error) != SQZ_OK) return NULL;
    sqz_session_set_cancel(session, signal_cancelled, NULL);
    return session;
}

/* Has the drafts of d->drafts made by the method, with `budget` of the context where it chooses rows. */
static enum sqz_status draft_by_method(struct drafter *d, float budget, struct sqz_error *error)
{
    enum sqz_status status = SQZ_OK;
    if (d->method == METHOD_STREAMING) {
        d->window = method_selector(d->method, NULL);
        status = backend_selected_make(&d->selected, d->drafts, &d->window, NULL, error);
        if (status == SQZ_OK) sqz_session_draft_in(d->drafts, &d->selected.base, budget);
    } else if (d->method == METHOD_SNAPKV) {
        status = snapkv_make(&d->snapkv, d->drafts, error);
        if (status == SQZ_OK) sqz_session_draft_in(d->drafts, &d->snapkv.chosen.base, budget);
    } else if (d->method == METHOD_QUANTSPEC) {
        status = backend_other_rows_make(&d->other, d->drafts, d->rounded, error);
        if (status == SQZ_OK) sqz_session_draft_in(d->drafts, &d->other.base, 1);
    }
    return status;
}

static void end_drafter(struct drafter *d)
{
    sqz_session_free(d->drafts);
    sqz_session_free(d->alone);
    snapkv_free(&d->snapkv);
    sqz_context_free(d->rounded);
    sqz_context_free(d->context);
}

/* False on failure; end_drafter() is called in either case. */
static bool begin_drafter(struct drafter *d, const struct eval *eval, struct sqz_context *base,
                          const struct eval_setting *draft, const char *label, struct sqz_error *error)
{
    struct sqz_context_info info;
    *d = (struct drafter){.method = draft->method};
    eval_setting_name(d->name, sizeof d->name, draft);
    sqz_context_get_info(base, &info);
    const double floor = (double)info.budget_floor, asked = eval->speculation.draft_budget;
    d->context = eval_context_for(eval, base, draft, label, error);
    if (!d->context) return false;
    if (d->method == METHOD_QUANTSPEC) {
        const struct eval_setting int4 = {METHOD_INT4, 1, 1};
        d->rounded = eval_context_for(eval, base, &int4, label, error);
        if (!d->rounded) return false;
    }
    d->drafts = exact_session(eval, d->context, true, error);
    d->alone = d->drafts ? exact_session(eval, d->context, false, error) : NULL;
    return d->alone && draft_by_method(d, (float)(asked > floor ? asked : floor), error) == SQZ_OK;
}

/* ---- Answers ---------------------------------------------------------------------------- */

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

/* Bytes that a drafted token reads of the context, whose keys and values are F16. */
static double draft_bytes(const struct drafter *d, const struct answer *answer)
{
    struct sqz_context_info info;
    sqz_context_get_info(d->context, &info);
    return sqz_attention_stats_share(&answer->speculation.draft) * (double)info.kv_bytes;
}

/* One question both ways; NULL on failure. */
static json_t *ask_both(const struct eval *eval, const struct drafter *d, const struct eval_question *question,
                        struct sqz_error *error)
{
    struct answer with, without;
    json_t *entry = NULL;
    enum sqz_status status = ask(eval, d->alone, question, &without, error);
    if (status == SQZ_OK) {
        status = ask(eval, d->drafts, question, &with, error);
        if (status == SQZ_OK) {
            const char *a = with.text.text ? with.text.text : "", *b = without.text.text ? without.text.text : "";
            entry = speculation_json(&with.speculation);
            json_object_set_new(entry, "method", json_string(d->name));
            json_object_set_new(entry, "n_tokens", json_count(with.n_tokens));
            json_object_set_new(entry, "seconds_a_token", json_number(token_seconds(&with)));
            json_object_set_new(entry, "seconds_a_token_alone", json_number(token_seconds(&without)));
            json_object_set_new(entry, "draft_bytes", json_number(draft_bytes(d, &with)));
            json_object_set_new(entry, "same", json_boolean(strcmp(a, b) == 0));
        }
        text_buffer_free(&with.text);
    }
    text_buffer_free(&without.text);
    return entry;
}

/* Adds the method's entries to `answers`; false on failure. */
static bool ask_all(const struct eval *eval, const struct drafter *d, const struct eval_document *document,
                    json_t *answers, struct sqz_error *error)
{
    for (size_t i = 0; i < document->n_questions && i < eval->max_questions; i++) {
        json_t *entry = ask_both(eval, d, &document->questions[i], error);
        if (entry) json_array_append_new(answers, entry);
        else if (error->status != SQZ_ERROR_LENGTH) return false; /* else left out, as it is elsewhere */
    }
    return true;
}

json_t *eval_speculate(const struct eval *eval, struct sqz_context *base, const struct eval_document *document,
                       const char *label, struct sqz_error *error)
{
    json_t *answers = json_array();
    bool ok = true;
    for (size_t i = 0; i < eval->n_drafts && ok; i++) {
        struct drafter drafter;
        ok = begin_drafter(&drafter, eval, base, &eval->drafts[i], label, error) &&
             ask_all(eval, &drafter, document, answers, error);
        end_drafter(&drafter);
    }
    if (ok) return answers;
    json_decref(answers);
    return NULL;
}
