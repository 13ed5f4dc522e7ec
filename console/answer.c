/* One question answered; answer.h describes it. */
#include "answer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"

void answer_flags_apply(struct answer_flags *flags, struct sqz_session_options *options)
{
    if (flags->budget_given && flags->prune_given)
        usage_error("--budget and --prune say the same thing; give one of them");
    if (flags->prune_given) flags->budget = flags->prune_budget;
    sqz_session_options_default(options);
    options->budget = (float)flags->budget;
    options->temperature = (float)flags->temperature;
    options->top_p = (float)flags->top_p;
    options->seed = (uint32_t)flags->seed;
    speculation_flags_apply(&flags->speculation, options);
    /* Whoever says the seed wants the same answer again, which what was measured must not change. */
    options->draft_steady = options->draft_steady || (flags->seed_given && flags->temperature > 0);
}

const char *threads_text(char *text, size_t size, const struct answer *answer)
{
    const char *s = answer->most_threads == 1 ? "" : "s";
    if (answer->least_threads == answer->most_threads) snprintf(text, size, "%d thread%s", answer->most_threads, s);
    else snprintf(text, size, "%d to %d threads", answer->least_threads, answer->most_threads);
    return text;
}

void say_floor(const struct sqz_session *session, const char *label)
{
    struct sqz_session_stats stats;
    sqz_session_get_stats(session, &stats);
    const double asked = (double)stats.budget_asked, floor = (double)stats.budget_floor;
    if (!(asked < floor)) return;
    if (stats.budget < stats.budget_floor) {
        warn("%sa budget of %g is less than the published rule reads of this context at least: %.3g", label, asked,
             floor);
    } else if (floor >= 1.0) {
        warn("%sa budget of %g leaves nothing for chosen keys in this context: all of it is read", label, asked);
    } else {
        warn("%sa budget of %g leaves too little for chosen keys in this context: %.3g is read, its floor", label,
             asked, floor);
    }
}

void say_fallback(const struct sqz_session *session, const char *label)
{
    const char *fallback = sqz_session_fallback(session);
    if (fallback[0]) warn("%s%s", label, fallback);
}

/* Sends what buffer holds from byte `from` up to `end` to standard output. */
static void stream_text(const struct text_buffer *buffer, size_t from, size_t end)
{
    if (end > from) {
        fwrite(buffer->text + from, 1, end - from, stdout);
        if (!flush_stdout()) exit(close_stdout());
    }
}

/* How far the largest logit leads the second. */
static float lead_of(const float *logits, size_t n)
{
    float first = -INFINITY, second = -INFINITY;
    for (size_t i = 0; i < n; i++) {
        if (logits[i] > first) {
            second = first;
            first = logits[i];
        } else if (logits[i] > second) {
            second = logits[i];
        }
    }
    return first - second;
}

static enum answer_end generate(struct sqz_session *session, const struct sqz_model *model, size_t max_tokens,
                                bool stream, double start, struct answer *answer, struct answer_step *steps,
                                size_t *n_steps, enum sqz_status *status, struct sqz_error *error)
{
    struct text_filter filter = {0};
    char piece[512];
    enum answer_end end = ANSWER_MAX_TOKENS;
    size_t sent = 0;
    struct sqz_model_info info;
    sqz_model_get_info(model, &info);
    while (answer->n_tokens < max_tokens) {
        bool ended = false;
        const float lead = steps ? lead_of(sqz_session_logits(session), info.n_vocab) : 0.0f;
        int32_t token = sqz_session_sample(session, &ended);
        if (steps) steps[(*n_steps)++] = (struct answer_step){token, lead};
        answer->seconds = now_seconds() - start;
        if (answer->n_tokens == 0) answer->first_token_seconds = answer->seconds;
        if (ended) {
            end = ANSWER_ENDED;
            break;
        }
        answer->n_tokens++;
        text_filter_put(&filter, &answer->text, piece, sqz_model_token_text(model, token, piece, sizeof piece));
        const size_t sure = sqz_session_answer_bytes(session, answer->text.text, answer->text.n_bytes, &ended);
        if (stream) stream_text(&answer->text, sent, sure);
        sent = sure;
        if (ended) {
            answer->text.n_bytes = sure;
            answer->text.text[sure] = '\0';
            return ANSWER_ENDED;
        }
        *status = sqz_session_run(session, &token, 1, error);
        if (*status != SQZ_OK) {
            end = *status == SQZ_ERROR_LENGTH ? ANSWER_NO_ROOM : ANSWER_STOPPED;
            break;
        }
    }
    text_filter_end(&filter, &answer->text);
    if (stream) stream_text(&answer->text, sent, answer->text.n_bytes);
    return end;
}

enum sqz_status answer_question(struct sqz_session *session, const struct sqz_model *model, const char *question,
                                size_t n_bytes, bool first, size_t max_tokens, bool stream, struct answer *answer,
                                struct answer_step *steps, size_t *n_steps, struct sqz_error *error)
{
    struct sqz_session_stats stats;
    int32_t *tokens = NULL;
    double start = now_seconds();
    memset(answer, 0, sizeof *answer);
    answer->end = ANSWER_STOPPED;
    sqz_session_clear_stats(session);
    enum sqz_status status =
        sqz_session_question_tokens(session, question, n_bytes, first, &tokens, &answer->n_question_tokens, error);
    if (status == SQZ_OK) status = sqz_session_run(session, tokens, answer->n_question_tokens, error);
    free(tokens);
    if (status != SQZ_OK) return status;
    answer->end = generate(session, model, max_tokens, stream, start, answer, steps, n_steps, &status, error);
    if (answer->n_tokens > 1 && answer->seconds > answer->first_token_seconds)
        answer->tokens_per_second = (double)(answer->n_tokens - 1) / (answer->seconds - answer->first_token_seconds);
    sqz_session_get_stats(session, &stats);
    answer->budget_read = sqz_attention_stats_share(&stats.attention);
    answer->speculation = stats.speculation;
    answer->least_threads = stats.least_threads;
    answer->most_threads = stats.most_threads;
    /* An answer cut short is an answer: the caller says why from `end`. */
    return status == SQZ_ERROR_LENGTH || status == SQZ_ERROR_CANCELLED ? SQZ_OK : status;
}
