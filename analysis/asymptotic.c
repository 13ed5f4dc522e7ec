/*
 * Fitting exponents; asymptotic.h describes it. The model of a sweep has one
 * layer, heads that get wider with d (their number is a constant, as in the
 * talk) and an FFN of 3 d; its vocabulary is left out, whose cost is that of
 * one more linear layer.
 */
#include "asymptotic.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "common.h"
#include "squeeze_roofline.h"

enum { LEVELS = 3, N_HEADS = 4 };

/* The smallest value of a sweep; each is doubled LEVELS - 1 times. The lengths and widths of a regime lie a factor of
 * 2^10 or more apart, so that leading terms lead; the others are small, as in B S_L << d. */
static const double smallest[N_REGIMES][N_VARIABLES] = {
    [REGIME_SHORT] = {[VARIABLE_K] = 1, [VARIABLE_B] = 1, [VARIABLE_S] = 64, [VARIABLE_D] = 0x1p20},
    [REGIME_LONG] = {[VARIABLE_K] = 1, [VARIABLE_B] = 1, [VARIABLE_S] = 0x1p28, [VARIABLE_D] = 256},
};

struct point {
    double value[N_VARIABLES];
    struct sqz_op_cost cost;
};

static struct sqz_op_cost evaluate(enum growth_phase phase, enum growth_class growth_class,
                                   const double value[N_VARIABLES])
{
    static const enum sqz_op_class classes[] = {SQZ_CLASS_LINEAR, SQZ_CLASS_ATTENTION, SQZ_CLASS_AGGREGATE};
    const uint32_t d = (uint32_t)value[VARIABLE_D];
    const struct sqz_model_shape shape = {.n_layer = 1,
                                          .n_embd = d,
                                          .n_head = N_HEADS,
                                          .n_head_kv = N_HEADS,
                                          .head_dim = d / N_HEADS,
                                          .n_ff = 3 * d,
                                          .gated_ffn = true};
    const struct sqz_bit_widths bits = {16, 16, 16, 16};
    const uint64_t batch = (uint64_t)value[VARIABLE_B], tokens = (uint64_t)value[VARIABLE_S];
    const struct sqz_workload work = phase == GROWTH_PREFILL
                                         ? sqz_workload_prefill(batch, tokens)
                                         : sqz_workload_decode(batch, tokens, (uint64_t)value[VARIABLE_K]);
    struct sqz_costs costs;
    struct sqz_error error;
    if (sqz_roofline(&costs, &shape, &bits, &work, NULL, &error) != SQZ_OK) die("%s", error.message);
    return sqz_costs_sum(&costs, classes[growth_class]);
}

double growth_intensity(enum growth_phase phase, enum growth_class growth_class, double batch, double n_tokens,
                        double width)
{
    const double value[N_VARIABLES] = {
        [VARIABLE_K] = 1, [VARIABLE_B] = batch, [VARIABLE_S] = n_tokens, [VARIABLE_D] = width};
    const struct sqz_op_cost cost = evaluate(phase, growth_class, value);
    return sqz_op_cost_intensity(&cost);
}

enum { N_POINTS = LEVELS * LEVELS * LEVELS * LEVELS };

static void sweep(struct point points[N_POINTS], enum growth_phase phase, enum growth_class growth_class,
                  enum regime regime)
{
    for (int i = 0; i < N_POINTS; i++) {
        for (int v = 0, rest = i; v < N_VARIABLES; v++, rest /= LEVELS)
            points[i].value[v] = ldexp(smallest[regime][v], rest % LEVELS);
        points[i].cost = evaluate(phase, growth_class, points[i].value);
    }
}

typedef double (*quantity_fn)(const struct sqz_op_cost *cost);

static double flops_of(const struct sqz_op_cost *cost)
{
    return cost->flops;
}

static double activations_of(const struct sqz_op_cost *cost)
{
    return cost->activation_bytes + cost->kv_bytes;
}

static double weights_of(const struct sqz_op_cost *cost)
{
    return cost->weight_bytes;
}

static double scores_of(const struct sqz_op_cost *cost)
{
    return cost->score_bytes;
}

/* Least squares of the logarithms. Every combination of the values occurs once, so the variables do not correlate and
 * each slope can be had by itself. */
static struct power_law fit(const struct point points[N_POINTS], quantity_fn quantity)
{
    struct power_law law = {.deviation = NAN};
    double mean = 0.0, centre[N_VARIABLES] = {0};
    for (int i = 0; i < N_POINTS; i++) {
        if (!(quantity(&points[i].cost) > 0.0)) return law;
        mean += log2(quantity(&points[i].cost)) / N_POINTS;
        for (int v = 0; v < N_VARIABLES; v++) centre[v] += log2(points[i].value[v]) / N_POINTS;
    }
    for (int v = 0; v < N_VARIABLES; v++) {
        double product = 0.0, square = 0.0;
        for (int i = 0; i < N_POINTS; i++) {
            const double x = log2(points[i].value[v]) - centre[v];
            product += x * (log2(quantity(&points[i].cost)) - mean);
            square += x * x;
        }
        law.exponent[v] = product / square;
    }
    law.deviation = 0.0;
    for (int i = 0; i < N_POINTS; i++) {
        double rest = log2(quantity(&points[i].cost)) - mean;
        for (int v = 0; v < N_VARIABLES; v++) rest -= law.exponent[v] * (log2(points[i].value[v]) - centre[v]);
        law.deviation = fmax(law.deviation, fabs(rest));
    }
    return law;
}

void growth_fit(struct growth *growth, enum growth_phase phase, enum growth_class growth_class, enum regime regime)
{
    struct point points[N_POINTS];
    sweep(points, phase, growth_class, regime);
    growth->flops = fit(points, flops_of);
    growth->bytes = fit(points, sqz_op_cost_bytes);
    growth->intensity = fit(points, sqz_op_cost_intensity);
    growth->part[PART_ACTIVATIONS] = fit(points, activations_of);
    growth->part[PART_WEIGHTS] = fit(points, weights_of);
    growth->part[PART_SCORES] = fit(points, scores_of);
}

/* ---- Text ------------------------------------------------------------------------------- */

static const double whole = 0.1;

static bool is_whole(double exponent)
{
    return fabs(exponent - round(exponent)) <= whole;
}

int power_law_is_whole(const struct power_law *law)
{
    for (int v = 0; v < N_VARIABLES; v++)
        if (!is_whole(law->exponent[v])) return 0;
    return !isnan(law->deviation);
}

void power_law_text(const struct power_law *law, char *text, size_t size)
{
    static const char *const names[N_VARIABLES] = {"k", "B", "S_L", "d"};
    size_t used = 0;
    text[0] = '\0';
    if (isnan(law->deviation)) return;
    for (int v = 0; v < N_VARIABLES && used < size; v++) {
        const double e = law->exponent[v];
        const char *space = used ? " " : "";
        if (is_whole(e) && round(e) == 0.0) continue;
        if (is_whole(e) && round(e) == 1.0) used += (size_t)snprintf(text + used, size - used, "%s%s", space, names[v]);
        else used += (size_t)snprintf(text + used, size - used, "%s%s^%.*f", space, names[v], is_whole(e) ? 0 : 2, e);
    }
    if (used == 0) snprintf(text, size, "1");
}

/* Appends " + O(law)", with a name when there is one, unless the same term is there already. */
static void add_term(char text[GROWTH_TEXT_MAX], const struct power_law *law, const char *name)
{
    char term[64], whole_term[96];
    power_law_text(law, term, sizeof term);
    snprintf(whole_term, sizeof whole_term, "O(%s)%s%s", term, *name ? " " : "", name);
    if (!*term || strstr(text, whole_term)) return;
    const size_t used = strlen(text);
    snprintf(text + used, GROWTH_TEXT_MAX - used, "%s%s", used ? " + " : "", whole_term);
}

void growth_flops_text(const struct growth growth[N_REGIMES], char text[GROWTH_TEXT_MAX])
{
    text[0] = '\0';
    for (int regime = 0; regime < N_REGIMES; regime++) add_term(text, &growth[regime].flops, "");
}

void growth_bytes_text(const struct growth growth[N_REGIMES], enum growth_class growth_class,
                       char text[GROWTH_TEXT_MAX])
{
    static const char *const parts[N_PARTS] = {"activations", "weights", "scores"};
    text[0] = '\0';
    if (growth_class == GROWTH_AGGREGATE) {
        for (int regime = N_REGIMES; regime-- > 0;) add_term(text, &growth[regime].bytes, "");
        return;
    }
    for (int part = 0; part < N_PARTS; part++) add_term(text, &growth[REGIME_LONG].part[part], parts[part]);
}
