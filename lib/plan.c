/*
 * From a budget to what each head does: the calibrated curves of a layer, read
 * between their points.
 */
#include "plan.h"

#include <math.h>

/* Index and fraction of the point where a decreasing curve passes `value`. */
static float curve_position(const float *curve, size_t n, float value)
{
    size_t low = 0, high = n - 1; /* curve[low] >= value > curve[high] is kept */
    if (value >= curve[0]) return 0.0f;
    if (value <= curve[high]) return (float)high;
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (curve[middle] >= value) low = middle;
        else high = middle;
    }
    float drop = curve[low] - curve[high];
    return (float)low + (drop > 0 ? (curve[low] - value) / drop : 0.0f);
}

static float curve_at(const float *curve, size_t n, float position)
{
    if (!(position > 0)) return curve[0]; /* NaN, too */
    if (position >= (float)(n - 1)) return curve[n - 1];
    size_t i = (size_t)position;
    float fraction = position - (float)i;
    return curve[i] + fraction * (curve[i + 1] - curve[i]);
}

float sqz_head_position(const struct sqz_layer *layer, uint32_t head_kv, float budget)
{
    if (layer->n_levels == 0 || layer->n_curve < 2 || budget >= 1.0f) return SQZ_NO_POSITION;
    const float *share = layer->global_share ? layer->global_share : layer->share + (size_t)head_kv * layer->n_curve;
    return curve_position(share, layer->n_curve, budget);
}

float sqz_head_share_at(const struct sqz_layer *layer, uint32_t head_kv, float budget)
{
    if (layer->n_levels == 0 || layer->n_curve < 2 || budget >= 1.0f) return sqz_dense_share(layer);
    return curve_at(layer->share + (size_t)head_kv * layer->n_curve, layer->n_curve,
                    sqz_head_position(layer, head_kv, budget));
}

float sqz_head_lost_at(const struct sqz_layer *layer, uint32_t head_kv, float budget)
{
    if (layer->n_levels == 0 || layer->n_curve < 2 || budget >= 1.0f) return 0.0f;
    return curve_at(layer->lost_mass + (size_t)head_kv * layer->n_curve, layer->n_curve,
                    sqz_head_position(layer, head_kv, budget));
}

float sqz_head_share_of(const struct sqz_layer *layer, uint32_t head_kv, const struct sqz_head_plan *plan)
{
    const float step = layer->log_threshold[1] - layer->log_threshold[0]; /* the grid is even */
    return curve_at(layer->share + (size_t)head_kv * layer->n_curve, layer->n_curve,
                    (plan->log_threshold - layer->log_threshold[0]) / step);
}

struct sqz_head_plan sqz_head_plan_at(const struct sqz_layer *layer, uint32_t head_kv, float budget, float offset)
{
    return sqz_head_plan_of(layer, head_kv, sqz_head_position(layer, head_kv, budget), offset);
}

struct sqz_head_plan sqz_head_plan_of(const struct sqz_layer *layer, uint32_t head_kv, float position, float offset)
{
    struct sqz_head_plan plan = {-INFINITY, 0.0f, 0.0f};
    size_t n = layer->n_curve;
    if (position == SQZ_NO_POSITION) return plan;
    float step = layer->log_threshold[1] - layer->log_threshold[0];
    position += offset / step;
    if (position < 0) position = 0;
    if (position > (float)(n - 1)) position = (float)(n - 1);
    plan.log_threshold = curve_at(layer->log_threshold, n, position);
    plan.tail_gain = layer->tail_gain ? curve_at(layer->tail_gain + (size_t)head_kv * n, n, position) : 0.0f;
    plan.variance_gain = layer->variance_gain ? layer->variance_gain[head_kv] : 0.0f;
    return plan;
}
