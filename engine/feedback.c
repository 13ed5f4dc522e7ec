/*
 * The budget is met by feedback: thresholds come from the context's calibrated
 * curve, and after every layer the log threshold is corrected a little towards
 * the share that was asked for, so that questions unlike the calibration
 * queries still read what they should on average. On a card what the layers of a
 * pass have read is known behind it: the same steps, for the next one.
 */
#include <math.h>

#include "plan.h"
#include "session.h"

/* Correction of the log threshold over one pass through all layers when the share read is off by the whole budget: for
 * one token, and for a pass of many, which measures the share far better. A threshold higher by a factor e reads about
 * 0.7 times as much, so these close a fifth and nearly all of a gap; few layers correct less, no step more than
 * feedback_step. The error is the plain difference of shares, not of their logarithms, and not cut off: then it is the
 * mean share that comes out right, also where a few layers read several times their part. The last is how far the
 * correction may go in all. */
static const float feedback_gain_one = 0.5f, feedback_gain_many = 8.0f, feedback_step = 0.5f, feedback_limit = 6.0f;
static const double feedback_less = 0.7; /* times as much is read at a threshold higher by a factor e */

/* Share of a layer's bytes that the calibration expects at the session's budget. Looked up once: a card waits meanwhile. */
static double expected_share(struct sqz_session *s, uint32_t l)
{
    for (uint32_t i = 0; i < s->meta->n_layer && s->expected_budget != s->budget; i++) {
        const struct sqz_layer *layer = sqz_context_layer(s->context, i);
        double sum = 0;
        for (uint32_t h = 0; h < layer->shape.n_head_kv; h++) sum += (double)sqz_head_share_at(layer, h, s->budget);
        s->expected[i] = sum / layer->shape.n_head_kv;
    }
    s->expected_budget = s->budget;
    return s->expected[l];
}

/* What the layer would have read by the correction as it is, from what it read by that of log_offset. */
static double share_by_now(const struct sqz_session *s, double share, float log_offset)
{
    const float since = s->log_offset - log_offset;
    return since != 0 ? share * pow(feedback_less, (double)since) : share;
}

/* Share of the layer that was read; of rows that were read by their upper plane, what both would have been: a draft selects
 * the rows that its budget has room for by both. Sinks and window are F16, in no plane. */
static double share_of_both(const struct sqz_session *s, const struct sqz_layer *layer,
                            const struct sqz_attention_stats *read)
{
    struct sqz_attention_stats both = *read;
    const size_t d = layer->shape.head_dim;
    const uint64_t rows = read->key_bytes + read->value_bytes;
    const uint64_t whole = read->n_selections * layer->keys.planes.n_whole * 2 * sqz_row_bytes(SQZ_ROW_F16, d);
    if (s->upper && layer->keys.type == SQZ_ROW_I44 && rows > whole)
        both.key_bytes += (rows - whole) * (sqz_row_bytes(SQZ_ROW_I44, d) - sqz_row_bytes(SQZ_ROW_I4, d)) /
                          sqz_row_bytes(SQZ_ROW_I4, d);
    return sqz_attention_stats_share(&both);
}

/* The published rule has none. */
void sqz_session_feed_back(struct sqz_session *s, uint32_t l, const struct sqz_attention_stats *read, size_t n_tokens,
                           float log_offset)
{
    const struct sqz_layer *layer = sqz_context_layer(s->context, l);
    const double share = share_by_now(s, share_of_both(s, layer, read), log_offset);
    if (layer->rule == SQZ_RULE_PAPER || layer->n_levels == 0 || share <= 0 || s->budget >= 1) return;
    const float gain = (n_tokens > 1 ? feedback_gain_many : feedback_gain_one) / (float)s->n_clustered;
    const float error = (float)((share - expected_share(s, l)) / (double)s->budget);
    s->log_offset += fmaxf(-feedback_step, fminf(gain * error, feedback_step));
    if (s->log_offset > feedback_limit) s->log_offset = feedback_limit;
    if (s->log_offset < -feedback_limit) s->log_offset = -feedback_limit;
}
