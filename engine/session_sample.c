/* The next token of a session: its logits, and its sampling over them. */
#include "error.h"
#include "rejection.h"
#include "session.h"

enum sqz_status sqz_session_create_sampling(struct sqz_session *s, struct sqz_error *error)
{
    const struct sqz_sampling_options options = {
        .temperature = s->options.temperature, .top_p = s->options.top_p, .seed = s->options.seed};
    const enum sqz_status status = sqz_sampling_create(&s->own_sampling, s->model, &options, error);
    s->sampling = s->own_sampling;
    return status;
}

void sqz_session_sample_by(struct sqz_session *s, struct sqz_sampling *sampling)
{
    s->sampling = sampling ? sampling : s->own_sampling;
}

const float *sqz_session_logits(const struct sqz_session *s)
{
    return s->has_logits ? s->logits : NULL;
}

/* Of a session that drafts: the draft where it may be kept, else another; or a draw. What is drawn at a place does not
 * depend on how the tokens before it came about. */
static int32_t draw(struct sqz_session *s)
{
    struct sqz_ahead *a = s->ahead;
    const size_t n = s->model->info.n_vocab;
    const uint32_t seed = sqz_sampling_seed(s->sampling);
    float *odds = a->odds + SQZ_MOST_DRAFT_TOKENS * n;
    const double u = sqz_draw_number(seed, s->n_user, SQZ_DRAW_WORD);
    sqz_sampling_odds(s->sampling, s->model, s->logits, odds);
    if (a->at == a->n) return sqz_draw(odds, n, u);
    return sqz_reject(odds, a->drawn[a->at] ? a->odds + a->at * n : NULL, n, a->tokens[a->at],
                      sqz_draw_number(seed, s->n_user, SQZ_DRAW_KEEP), u);
}

void sqz_session_next(struct sqz_session *s, int n_likely, struct sqz_choice *choice)
{
    if (s->ahead && sqz_sampling_has_odds(s->sampling) && sqz_ahead_make_odds(s))
        sqz_sampling_take(s->sampling, s->model, s->logits, draw(s), n_likely, choice);
    else sqz_sampling_next(s->sampling, s->model, s->logits, n_likely, choice);
}

int32_t sqz_session_sample(struct sqz_session *s, bool *end)
{
    struct sqz_choice choice;
    if (!s->has_logits) {
        *end = true;
        return -1;
    }
    sqz_session_next(s, -1, &choice);
    *end = choice.ends;
    return choice.token;
}
