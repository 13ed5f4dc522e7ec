/*
 * The budget is met by feedback: thresholds come from the context's calibrated
 * curve, and after every layer the log threshold is corrected a little towards
 * the share that was asked for, so that questions unlike the calibration
 * queries still read what they should on average.
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

/* Share of a layer's bytes that the calibration expects at the session's budget. */
static double expected_share(const struct sqz_session *s, const struct sqz_layer *layer)
{
    double sum = 0;
    for (uint32_t h = 0; h < layer->shape.n_head_kv; h++) sum += (double)sqz_head_share_at(layer, h, s->budget);
    return sum / layer->shape.n_head_kv;
}

/* The published rule has none. */
void sqz_session_feed_back(struct sqz_session *s, const struct sqz_layer *layer, const struct sqz_attention_stats *read,
                           size_t n_tokens)
{
    const double share = sqz_attention_stats_share(read);
    if (layer->rule == SQZ_RULE_PAPER || layer->n_levels == 0 || share <= 0 || s->budget >= 1) return;
    const float gain = (n_tokens > 1 ? feedback_gain_many : feedback_gain_one) / (float)s->n_clustered;
    const float error = (float)((share - expected_share(s, layer)) / (double)s->budget);
    s->log_offset += fmaxf(-feedback_step, fminf(gain * error, feedback_step));
    if (s->log_offset > feedback_limit) s->log_offset = feedback_limit;
    if (s->log_offset < -feedback_limit) s->log_offset = -feedback_limit;
}
