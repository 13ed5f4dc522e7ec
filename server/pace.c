/* How much a step takes; pace.h describes it. */
#include "pace.h"

#include <math.h>
#include <string.h>

/* A pass takes so many tokens at most. */
enum { MOST_PIECE = 512, MOST_STEPS = 32 };

/* What a document may add to the answers' own step: streams stay near twice their usual gap, also where
 * something else takes the machine for a moment. */
static const double document_share = 0.8;

/* Of the longest step: what a token costs grows while a document is read, and is known from the piece before. */
static const double aim = 0.9;

/* A step of the answers alone is taken as so many times the usual one at most: when something else had the machine for a
 * moment, as when a request is read, documents would be let take as much for many steps. */
static const double outlier = 1.25;

/* Gaps with a document's piece in them may be so many times what steps of the answers alone take usually: what that is
 * grows slowly, by a fiftieth of what a step takes more, which counts as above. */
static const double most_gap = 2.5, growth = 0.02;

void pace_begin(struct pace *p, double step_seconds, size_t least_tokens)
{
    memset(p, 0, sizeof *p);
    p->step_seconds = step_seconds;
    p->least_tokens = least_tokens;
}

/* A step of so many answers alone; 0: nothing is known. */
static double alone_seconds(const struct pace *p, size_t n_answers)
{
    if (p->n_answers == 0) return 0;
    return p->answers_seconds * (double)n_answers / (double)p->n_answers;
}

bool pace_wants_alone(const struct pace *p, size_t n_answers)
{
    if (n_answers == 0) return false;
    if (p->n_answers == 0) return true;
    return p->n_steps > 0 && (p->n_answers != n_answers || p->n_steps >= MOST_STEPS);
}

double pace_seconds(const struct pace *p, size_t n_answers, bool document)
{
    const double most = aim * p->step_seconds;
    return n_answers && document ? fmin(most, document_share * alone_seconds(p, n_answers)) : most;
}

size_t pace_tokens(const struct pace *p, enum pace_pass pass, double seconds)
{
    const double token = p->token_seconds[pass], n = token > 0 ? floor(seconds / token) : 1;
    if (n < (double)p->least_tokens) return p->least_tokens;
    return n > MOST_PIECE ? MOST_PIECE : (size_t)n;
}

/* Follows what was measured, at once where it is more. */
static void follow(double *mean, double value)
{
    *mean = value > *mean || *mean == 0 ? value : *mean + 0.2 * (value - *mean);
}

static void note_answers(struct pace *p, size_t n_answers, size_t n_tokens, double seconds)
{
    if (n_answers == 0) return;
    p->last_seconds = seconds;
    if (n_tokens) return;
    if (p->n_answers != n_answers) p->usual_seconds = seconds;
    else if (seconds < p->usual_seconds) p->usual_seconds += 0.2 * (seconds - p->usual_seconds);
    else p->usual_seconds += growth * (fmin(seconds, outlier * p->usual_seconds) - p->usual_seconds);
}

/* A token of a document by itself takes no longer than one of an answer. */
bool pace_has_room(const struct pace *p, enum pace_pass pass, size_t n_answers)
{
    if (n_answers == 0 || p->n_answers != n_answers) return true;
    return p->last_seconds + fmin(p->token_seconds[pass], p->last_seconds) <= most_gap * p->usual_seconds;
}

void pace_note(struct pace *p, enum pace_pass pass, size_t n_answers, size_t n_tokens, double seconds)
{
    note_answers(p, n_answers, n_tokens, fmax(seconds - (double)n_tokens * p->token_seconds[pass], 0));
    if (n_tokens == 0) {
        if (p->n_answers == n_answers)
            p->answers_seconds += 0.3 * (fmin(seconds, outlier * p->answers_seconds) - p->answers_seconds);
        else p->answers_seconds = seconds;
        p->n_answers = n_answers;
        p->n_steps = 0;
        return;
    }
    if (n_answers) p->n_steps++;
    /* Some of it is the piece's, however wrong the guess of the rest. */
    follow(&p->token_seconds[pass], fmax(seconds - alone_seconds(p, n_answers), 0.2 * seconds) / (double)n_tokens);
}
