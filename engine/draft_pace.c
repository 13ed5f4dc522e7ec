/* How many tokens a draft has; draft_pace.h. */
#include "draft_pace.h"

#include <math.h>

/* Few lengths: each has a graph that stays, on a card captured. */
static const size_t lengths[] = {2, 4, 7, 10, 15};
enum { N_LENGTHS = sizeof lengths / sizeof *lengths };

static const double kept_at_first[SQZ_DRAFT_SOURCES] = {0.92, 0.4, 0.6}; /* the default model's, docs/speculation.md */
static const double follow_kept = 0.04;                                  /* of what each token says */
static const double forget_kept = 0.001; /* what was kept long ago says less and less, with each token by itself */
/* What a second token adds to a batch, and each one behind it, of a token by itself, until that is known. */
static const double batch_step = 0.55, batch_slope = 0.2;
static const double worth = 1.04; /* a draft is expected to be so much faster at least: times are rough */
enum { FIRST_TOKENS = 2, FIRST_CAPTURED = 2, TOKEN_EVERY = 100, PATIENCE = 256 };

void sqz_draft_pace_begin(struct sqz_draft_pace *p, size_t most, bool steady, bool captured)
{
    *p = (struct sqz_draft_pace){.most = most, .steady = steady, .captured = captured, .patience = PATIENCE};
    for (int i = 0; i < SQZ_DRAFT_SOURCES; i++) p->kept[i] = kept_at_first[i];
}

bool sqz_draft_pace_repeats(const struct sqz_draft_pace *p, size_t n_tokens)
{
    bool repeats = n_tokens == 1 || n_tokens == p->most + 1;
    for (int i = 0; i < N_LENGTHS; i++) repeats = repeats || n_tokens == lengths[i] + 1;
    return repeats;
}

/* Whether this run makes ready what later ones find: llama.cpp's context, and on a card what is captured then. */
static bool is_first(const struct sqz_draft_pace *p, uint8_t *n_first)
{
    const bool first = *n_first < (p->captured ? 2 : 1);
    *n_first += first;
    return first;
}

/* What takes longer than it did may have been disturbed. */
static void follow(double *known, double seen)
{
    if (*known <= 0) *known = seen;
    else *known += (seen < *known ? 0.4 : 0.1) * (fmin(seen, 2 * *known) - *known);
}

void sqz_draft_pace_note_token(struct sqz_draft_pace *p, double seconds, double guess)
{
    if (!p->captured || p->n_tokens >= FIRST_CAPTURED) follow(&p->token, seconds);
    p->batch[1] = p->token;
    if (!p->draft_known) p->draft = guess;
    for (int i = 0; i < SQZ_DRAFT_SOURCES; i++)
        if (p->kept[i] < kept_at_first[i]) p->kept[i] += forget_kept * (kept_at_first[i] - p->kept[i]);
    p->n_tokens++;
    p->n_since++;
    p->n_cycles = 0;
}

void sqz_draft_pace_note_draft(struct sqz_draft_pace *p, double seconds)
{
    if (is_first(p, &p->n_first_drafts)) return;
    if (!p->draft_known) p->draft = 0;
    p->draft_known = true;
    follow(&p->draft, seconds);
}

void sqz_draft_pace_note_batch(struct sqz_draft_pace *p, size_t n, double seconds)
{
    if (!is_first(p, &p->n_first[n])) follow(&p->batch[n], seconds);
    p->n_cycles++;
    p->n_since = 0;
}

void sqz_draft_pace_note_kept(struct sqz_draft_pace *p, enum sqz_draft_source source, bool kept)
{
    p->kept[source] += follow_kept * ((kept ? 1.0 : 0.0) - p->kept[source]);
}

/* Seconds of a batch of n tokens: known, or on a line through what is. */
static double batch_seconds(const struct sqz_draft_pace *p, size_t n)
{
    size_t low = 1, high = 0;
    if (p->batch[n] > 0) return p->batch[n];
    for (size_t i = 1; i < n; i++)
        if (p->batch[i] > 0) low = i;
    for (size_t i = n + 1; i < sizeof p->batch / sizeof *p->batch && !high; i++)
        if (p->batch[i] > 0) high = i;
    double slope;
    if (low == 1 && !high) return p->token * (1 + batch_step + batch_slope * (double)(n - 2));
    if (high) slope = (p->batch[high] - p->batch[low]) / (double)(high - low);
    else slope = (p->batch[low] - p->batch[1]) / (double)(low - 1);
    return p->batch[low] + fmax(slope, 0.01 * p->token) * (double)(n - low);
}

/* Tokens that a cycle of n drafted ones brings: those that are kept, and one by the exact run. */
static double tokens_of(double kept, size_t n)
{
    double tokens = 1, reached = 1;
    for (size_t i = 0; i < n; i++) tokens += reached *= kept;
    return tokens;
}

/* How much faster answers are expected to be by drafts of n tokens. */
static double gain_of(const struct sqz_draft_pace *p, enum sqz_draft_source source, size_t n)
{
    const double drafting = source == SQZ_DRAFTED_BY_MODEL ? (double)n * p->draft : 0;
    return tokens_of(p->kept[source], n) * p->token / (drafting + batch_seconds(p, n + 1));
}

size_t sqz_draft_pace_length(const struct sqz_draft_pace *p, enum sqz_draft_source source, size_t most, double *gain)
{
    size_t best = 0;
    if (most > p->most) most = p->most;
    *gain = 1;
    if (p->steady) {
        *gain = source == SQZ_DRAFTED_BY_MODEL ? 2 : 3; /* the text goes first */
        return most;
    }
    if (p->token <= 0 || most == 0) return 0;
    for (int i = 0; i < N_LENGTHS && (i == 0 || lengths[i - 1] < most); i++) {
        const size_t n = lengths[i] < most ? lengths[i] : most;
        if (p->captured && !sqz_draft_pace_repeats(p, n + 1)) break;
        const double now = gain_of(p, source, n);
        if (now > fmax(*gain, worth)) best = n, *gain = now;
    }
    return best;
}

bool sqz_draft_pace_wants_token(const struct sqz_draft_pace *p)
{
    const size_t first = FIRST_TOKENS + (p->captured ? FIRST_CAPTURED : 0);
    return !p->steady && (p->n_tokens < first || p->n_cycles >= TOKEN_EVERY);
}

bool sqz_draft_pace_tries(struct sqz_draft_pace *p, enum sqz_draft_source source)
{
    static const double hope = 0.8;
    if (p->steady || p->token <= 0 || p->n_since < p->patience || gain_of(p, source, SQZ_DRAFT_TRIED) < hope)
        return false;
    p->patience *= 4;
    return true;
}
