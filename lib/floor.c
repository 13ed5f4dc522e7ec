/* The least budget that buys something; floor.h says how it is found. */
#include "floor.h"

#include <math.h>

#include "plan.h"

bool sqz_clusters_pay(size_t n_rows, const struct sqz_squeeze_options *o)
{
    const double rows = (double)o->n_sinks + o->n_window + (double)SQZ_FLOOR_FEWEST_ROWS;
    return o->rule == SQZ_RULE_PAPER || rows <= (double)SQZ_FLOOR_DENSE * (double)n_rows;
}

/* What a layer's heads count for in a mean over layers, as in the mean curve: by their rows. */
static double weight_of(const struct sqz_layer *layer)
{
    return layer->n_levels && layer->n_curve ? layer->n_rows : 0.0;
}

/* The mean over all heads of what is read at the highest threshold, where next to nothing is chosen. */
static double least_share(const struct sqz_layer *layers, size_t n_layers, double *weight)
{
    double sum = 0;
    *weight = 0;
    for (size_t l = 0; l < n_layers; l++) {
        const double rows = weight_of(&layers[l]);
        const size_t last = layers[l].n_curve - 1;
        for (uint32_t h = 0; rows > 0 && h < layers[l].shape.n_head_kv; h++, *weight += rows)
            sum += rows * (double)layers[l].share[(size_t)h * layers[l].n_curve + last];
    }
    return *weight > 0 ? sum / *weight : 1.0;
}

/* The mean over all heads of the attention mass that the calibration queries lost at a budget. */
static double lost_mass(const struct sqz_layer *layers, size_t n_layers, double weight, float budget)
{
    double sum = 0;
    for (size_t l = 0; l < n_layers; l++) {
        const double rows = weight_of(&layers[l]);
        for (uint32_t h = 0; rows > 0 && h < layers[l].shape.n_head_kv; h++)
            sum += rows * (double)sqz_head_lost_at(&layers[l], h, budget);
    }
    return sum / weight;
}

/* Rows of the clustered layers; those of a context are all the same. */
static double most_rows(const struct sqz_layer *layers, size_t n_layers)
{
    double most = 0;
    for (size_t l = 0; l < n_layers; l++) most = fmax(most, weight_of(&layers[l]));
    return most;
}

static enum sqz_rule rule_of(const struct sqz_layer *layers, size_t n_layers)
{
    for (size_t l = 0; l < n_layers; l++)
        if (weight_of(&layers[l]) > 0) return layers[l].rule;
    return SQZ_RULE_DEFAULT;
}

float sqz_budget_floor(const struct sqz_layer *layers, size_t n_layers)
{
    double weight;
    const double least = least_share(layers, n_layers, &weight), rows = most_rows(layers, n_layers);
    if (!(weight > 0) || !(least < 1)) return 1.0f;
    if (rule_of(layers, n_layers) == SQZ_RULE_PAPER) return (float)fmax(least, 1e-6);
    double low = least + (double)SQZ_FLOOR_FEWEST_ROWS / rows, high = least + (double)SQZ_FLOOR_MOST_ROWS / rows;
    if (lost_mass(layers, n_layers, weight, (float)low) <= (double)SQZ_FLOOR_LOST_MASS) high = low;
    for (int i = 0; i < 12 && low < high; i++) { /* a 4,096th of the room is finer than any curve */
        const double middle = 0.5 * (low + high);
        if (lost_mass(layers, n_layers, weight, (float)middle) > (double)SQZ_FLOOR_LOST_MASS) low = middle;
        else high = middle;
    }
    return high <= (double)SQZ_FLOOR_DENSE ? (float)high : 1.0f;
}

float sqz_layer_floor(const struct sqz_layer *layer)
{
    return sqz_budget_floor(layer, 1);
}
