/*
 * The method: its constants and formulas, once, for every place that computes
 * them. C and CUDA C compile this file; nothing here knows of memory, threads
 * or number formats.
 *
 * For a query q and a cluster with centroid C, count N and mean squared
 * distance s to its centroid:
 *   x = scale q.C                     logit of the centroid
 *   v = scale^2 |q|^2 s / (2 D)       second-order term of the expected exponential of a Gaussian cluster
 *   y = x + a v                       corrected logit; a is fitted per head (calibrate.c)
 *   Z = sum of N exp(y) over clusters + exact mass of rows known already
 *   S = exp(y) / Z                    score per key, reduced over the query rows of a block: mean or maximum
 *   y' = min(x + v + g, log Z)        logit of the tail: v grows with |q|^2 without bound, a weight does not pass 1
 * As published (arXiv 2411.09688, section 3.2): a = 0, no tail, and Z over clusters alone.
 *
 * What is retained at a threshold T. Everything has a level L, the largest
 * log T at which it is still read; a lookup asks whether L reaches log T,
 * calibration counts everything up to its L. See sqz_cluster_level() and
 * sqz_reach().
 */
#ifndef SQZ_LIB_METHOD_H
#define SQZ_LIB_METHOD_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#ifdef __CUDACC__
#define SQZ_FORMULA static __host__ __device__ __forceinline__
#else
#define SQZ_FORMULA static inline
#endif

/* ---- Constants, all measured in docs/method.md ------------------------------------- */

/* A cluster above level 0 is opened when its score is above threshold * exp(-SQZ_LEVEL_MARGIN): the mean over a large
 * cluster hides children far above it. */
#define SQZ_LEVEL_MARGIN 2.0f

/* How many standard deviations of its keys' logits above its centroid a cluster of a layer with codes is opened for: a
 * cluster whose keys are all further from the threshold than that is pruned unseen. Coarse clusters hold more keys, and
 * spread along directions that the deviation, measured at level 0, knows less of. */
#define SQZ_OPEN_DEVIATIONS        2.5f
#define SQZ_OPEN_DEVIATIONS_COARSE 4.0f

/* A value row is read when its own weight is at least this share of the threshold that its key had to pass. */
#define SQZ_VALUE_SKIP 0.5f

/* A head whose tail is switched off has this tail gain at every point: its weights vanish and nothing is read. */
#define SQZ_TAIL_OFF (-100.0f)

/* Points of the calibration grid: log thresholds SQZ_CURVE_FIRST + i * SQZ_CURVE_STEP. */
#define SQZ_CURVE_POINTS 81
#define SQZ_CURVE_FIRST  (-20.0f)
#define SQZ_CURVE_STEP   0.25f

/* The least budget that buys something; floor.h says what they are. */
#define SQZ_FLOOR_FEWEST_ROWS 160.0f
#define SQZ_FLOOR_MOST_ROWS   320.0f
#define SQZ_FLOOR_LOST_MASS   0.2f
#define SQZ_FLOOR_DENSE       (1.0f / 3.0f)

/* ---- Logits and scores --------------------------------------------------------------- */

/* What s is multiplied by in a v; gain: a, or 1 for v itself. */
SQZ_FORMULA float sqz_spread_factor(float gain, float scale, uint32_t head_dim, float squared_norm)
{
    return gain * (scale * scale / (2.0f * (float)head_dim)) * squared_norm;
}

/* y' but for its bound; factor: that of v. In base 2 where all of its arguments are. */
SQZ_FORMULA float sqz_tail_logit(float x, float factor, float s, float tail_gain)
{
    return x + factor * s + tail_gain;
}
SQZ_FORMULA float sqz_tail_bound(float tail_logit, float log_total)
{
    return tail_logit < log_total ? tail_logit : log_total;
}
SQZ_FORMULA bool sqz_tail_is_off(float tail_gain)
{
    return tail_gain <= SQZ_TAIL_OFF;
}

/* Adds a query row's score to that of its block of n_rows rows. */
SQZ_FORMULA float sqz_add_score(float block_score, float score, uint32_t n_rows, bool maximum)
{
    return maximum ? fmaxf(block_score, score) : block_score + score / (float)n_rows;
}

/* ---- What is retained ------------------------------------------------------------------
 * Everything is read up to a level of its own, a log threshold: a lookup reads what reaches its threshold, calibration
 * counts each thing for all thresholds up to its level. Below, one function for each kind of thing. */

/* A cluster without codes: retained at level 0, opened above it. */
SQZ_FORMULA float sqz_cluster_read_to(float log_score, uint32_t level)
{
    return level ? log_score + SQZ_LEVEL_MARGIN : log_score;
}
/* The same, asked the other way round: what the logarithm of its score has to reach. */
SQZ_FORMULA float sqz_cluster_limit(float log_threshold, uint32_t level)
{
    return level ? log_threshold - SQZ_LEVEL_MARGIN : log_threshold;
}

/* A cluster with codes is opened up to the largest, over query rows, of the logarithm of its own score and of how far
 * the likeliest of its keys may reach: x + deviations * deviation * sqrt(s) - log Z, where `deviation` is that of a
 * cluster of variance 1. width * other: the three factors of the middle term, grouped as the caller has them. */
SQZ_FORMULA float sqz_open_deviations(uint32_t level)
{
    return level ? SQZ_OPEN_DEVIATIONS_COARSE : SQZ_OPEN_DEVIATIONS;
}
SQZ_FORMULA float sqz_reach(float x, float width, float other, float log_total)
{
    return x + width * other - log_total;
}

/* A single key: retained where its cluster is opened and the logarithm of its own score reaches the threshold. */
SQZ_FORMULA float sqz_key_read_to(float log_score, float cluster_opened_to)
{
    return log_score < cluster_opened_to ? log_score : cluster_opened_to;
}

/* A value, or the value centroid of a pruned cluster, by what it weighs of the whole. */
SQZ_FORMULA float sqz_value_read_to(float log_weight)
{
    return log_weight - logf(SQZ_VALUE_SKIP);
}
SQZ_FORMULA float sqz_value_limit(float log_threshold)
{
    return SQZ_VALUE_SKIP * expf(log_threshold);
}

/* The last point of an even grid that does not exceed a level; -1 below the grid and for NaN. */
SQZ_FORMULA int sqz_curve_point(float level, float first, float step, int n_points)
{
    const float at = floorf((level - first) / step);
    if (!(at >= 0)) return -1;
    return at < (float)(n_points - 1) ? (int)at : n_points - 1;
}

#endif
